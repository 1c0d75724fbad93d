"""Assignment of samples to codes by entropic optimal transport, in the log domain (docs/spec/codebook.md 3).

Axes: S problems solved side by side (image, text), P samples of this worker, B samples of a block, K codes, D width.
A problem's samples may be spread over workers; all that they need of each other are K numbers a step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from models.collectives import Workers

CPU_BLOCK_BYTES = 2**21
"""Scores that a pass reads at once on a CPU: what stays in its cache is read four times as fast."""
CUDA_BLOCK_BYTES = 2**26
"""The same on a GPU, where each block costs the launch of its kernels."""
NO_SAMPLE_POTENTIAL = 1e30
"""Potential of every code where there is no sample: any score added to it rounds away, so all codes are alike."""


class Scores:
    """Cosines of samples with codes, in blocks of rows; at most `limit` bytes of them exist (one row at the least).

    Where all rows fit into `limit` they are computed once and kept, otherwise again in each pass. They have the
    precision of `features` but at least 32 bits, under autocast too, and no gradient (docs/spec/codebook.md 3.5).
    """

    def __init__(self, features: Float[Tensor, "S P D"], codes: Float[Tensor, "K D"], limit: int = 2**26) -> None:
        dtype = torch.promote_types(features.dtype, torch.float32)
        self.problems, self.samples, self.codes = len(features), features.shape[1], len(codes)
        self._features, self._codes = features.detach().to(dtype), codes.detach().to(dtype)
        row_bytes = self.problems * self.codes * dtype.itemsize
        block_bytes = CUDA_BLOCK_BYTES if features.device.type == "cuda" else CPU_BLOCK_BYTES
        self._rows_in_memory = max(1, limit // row_bytes)
        self._rows_of_block = max(1, block_bytes // row_bytes)
        self._kept = self._compute(slice(0, self.samples)) if self.samples <= self._rows_in_memory else None

    def __iter__(self) -> Iterator[tuple[slice, Float[Tensor, "S B K"]]]:
        """Blocks in order: which rows, and their scores; no block where there is no row."""
        for first in range(0, self.samples, self._rows_in_memory):
            last = min(first + self._rows_in_memory, self.samples)
            scores = self._compute(slice(first, last)) if self._kept is None else self._kept
            for start in range(first, last, self._rows_of_block):
                stop = min(start + self._rows_of_block, last)
                yield slice(start, stop), scores[:, start - first : stop - first]

    def filled(self, value: float) -> Float[Tensor, "S K"]:
        """`value` for each problem and code, where the scores are and in their precision."""
        return self._codes.new_full((self.problems, self.codes), value)

    def _compute(self, rows: slice) -> Float[Tensor, "S B K"]:
        with torch.autocast(self._codes.device.type, enabled=False):
            return self._features[:, rows] @ self._codes.T


class TransportPlan(NamedTuple):
    """A solved assignment: what a worker needs to assign any row, also one that was not in the problem."""

    potentials: Float[Tensor, "S K"]
    """g, the same on all workers, with mean 0 over codes (a constant changes nothing)."""
    sharpness: float
    """1 / eps; of the proximal method outer / beta."""

    @torch.no_grad()
    def targets(self, scores: Float[Tensor, "S B K"]) -> Float[Tensor, "S B K"]:
        """q = softmax over codes of scores * sharpness + g (docs/spec/codebook.md 3.2).

        Uniform where the problem had no sample at all.
        """
        return F.softmax(scores * self.sharpness + self.potentials[:, None], 2)


@torch.no_grad()
def sinkhorn(
    scores: Scores, valid: Bool[Tensor, " P"], eps: float, iters: int, balance: float, workers: Workers
) -> TransportPlan:
    """Balanced assignment by `iters` Sinkhorn iterations, code step first (docs/spec/codebook.md 3.2, 3.3).

    `balance` 1 aims at equal mass for each code, 0 is the plain softmax. Samples that are not `valid` do not count.
    Two exchanges of S x K numbers an iteration, also of a worker without rows; nothing waits for the device.
    """
    potentials = None
    for _ in range(iters):
        potentials = _code_step(_log_code_sums(scores, valid, 1 / eps, potentials), balance, workers)
    assert potentials is not None, "at least one iteration"
    return TransportPlan(potentials, 1 / eps)


@torch.no_grad()
def ipot(scores: Scores, valid: Bool[Tensor, " P"], beta: float, outer: int, workers: Workers) -> TransportPlan:
    """Assignment by `outer` inexact proximal point steps with one inner iteration each (docs/spec/codebook.md 3.7).

    IPOT multiplies the last plan by the kernel exp(-C / beta) and rescales rows and columns once. In logarithms
    (F samples, G codes, both accumulated over steps) that is a Sinkhorn step at sharpness t / beta in which F cancels
    and the codes enter with G_(t-1) + s_(t-1) = 2 G_(t-1) - G_(t-2), s being the last step's change of G: no plan is
    ever stored. Constants of a problem (ln P, ln K, the 1 of 1 - S) cancel in q. Exchanges as in `sinkhorn`.
    """
    before = potentials = scores.filled(0.0)
    for step in range(1, outer + 1):
        sums = _log_code_sums(scores, valid, step / beta, 2 * potentials - before)
        before, potentials = potentials, _code_step(sums, 1.0, workers)
    return TransportPlan(potentials, outer / beta)


def _log_code_sums(
    scores: Scores, valid: Bool[Tensor, " P"], sharpness: float, potentials: Float[Tensor, "S K"] | None
) -> Float[Tensor, "S K"]:
    """LSE over this worker's samples of scores * sharpness + f; -inf without any.

    The sample step f_i = -LSE_k(scores * sharpness + g) is made on the way, so that each block is met once; f = 0 where
    there is no g yet. Needs two more tables of a block's size.
    """
    sums = scores.filled(-torch.inf)
    for rows, block in scores:
        logits = block * sharpness  # a new table, which the next lines may change in place
        if potentials is not None:
            logits -= torch.logsumexp(logits + potentials[:, None], 2, keepdim=True)
        logits += torch.where(valid[rows], 0.0, -torch.inf)[:, None]
        sums = torch.logaddexp(sums, torch.logsumexp(logits, 1))
    return sums


def _code_step(local: Float[Tensor, "S K"], balance: float, workers: Workers) -> Float[Tensor, "S K"]:
    """g = -balance LSE over all workers' samples, at mean 0, from each one's own log-sums (docs/spec/codebook.md 3.3).

    The uniform prior is a constant and drops out. Centred numbers are small, which spares digits in float32.
    """
    peak = workers.all_reduce_max(local.clone())
    peak = torch.where(peak.isfinite(), peak, 0.0)
    total = workers.all_reduce_sum(torch.exp(local - peak))
    nobody = total == 0
    potentials = -balance * (peak + total.masked_fill(nobody, 1.0).log())
    return (potentials - potentials.mean(1, keepdim=True)).masked_fill(nobody, NO_SAMPLE_POTENTIAL)
