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

PASS = (2**21, 2**26)
"""Bytes of scores that a pass looks at together, on a CPU and on a GPU, where small blocks cost launches."""
SWALLOW = 1e30
"""Potential of every code where there is no sample: whatever score is added rounds away, so all codes are alike."""


class Scores:
    """Cosines of samples with codes in blocks of rows, of which at most `limit` bytes exist (one row at the least).

    Where all rows fit they are made once and kept, otherwise each pass makes them again. They are handed out in blocks
    that a processor's cache holds, four times as fast in a pass as all at once. They have the precision of
    `features` but 32 bits at the least, under autocast too, and no gradient (docs/spec/codebook.md 3.5).
    """

    def __init__(self, features: Float[Tensor, "S P D"], codes: Float[Tensor, "K D"], limit: int = 2**26) -> None:
        dtype = torch.promote_types(features.dtype, torch.float32)
        self.problems, self.samples, self.codes = len(features), features.shape[1], len(codes)
        self._features, self._codes = features.detach().to(dtype), codes.detach().to(dtype)
        row_bytes = self.problems * self.codes * dtype.itemsize
        self._rows = max(1, limit // row_bytes)
        self._at_once = max(1, PASS[features.device.type == "cuda"] // row_bytes)
        self._kept = self._make(slice(0, self.samples)) if self.samples <= self._rows else None

    @classmethod
    def given(cls, scores: Float[Tensor, "S P K"]) -> "Scores":
        """Scores that are known already: their own cosines with the unit vectors of the axes."""
        return cls(scores, torch.eye(scores.shape[2], dtype=scores.dtype, device=scores.device))

    def __iter__(self) -> Iterator[tuple[slice, Float[Tensor, "S B K"]]]:
        """Blocks in order: which rows, and their scores; no block where there is no row."""
        for first in range(0, self.samples, self._rows):
            last = min(first + self._rows, self.samples)
            made = self._make(slice(first, last)) if self._kept is None else self._kept
            for start in range(first, last, self._at_once):
                stop = min(start + self._at_once, last)
                yield slice(start, stop), made[:, start - first : stop - first]

    def filled(self, value: float) -> Float[Tensor, "S K"]:
        """`value` for each problem and code, where the scores are and in their precision."""
        return self._codes.new_full((self.problems, self.codes), value)

    def _make(self, rows: slice) -> Float[Tensor, "S B K"]:
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

    Step t is a Sinkhorn step at sharpness t / beta: with F_t = F_(t-1) + dl and G_t = G_(t-1) + s put into the log-dual
    form, F_(t-1) cancels and the codes enter the sample step with G_(t-1) + s_(t-1) = 2 G_(t-1) - G_(t-2). Constants of
    a problem (ln P, ln K, the 1 of 1 - S) cancel in q. Exchanges as in `sinkhorn`.
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
        logits = block * sharpness
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
    return (potentials - potentials.mean(1, keepdim=True)).masked_fill(nobody, SWALLOW)
