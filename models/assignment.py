"""Which samples are assigned to codes in a step, and how that is spread over workers (docs/spec/codebook.md 3).

Axes: B rows here, N rows of all workers, P samples of this worker's problem, K codes, D width of the joint space.
Problem 0 assigns the images, problem 1 the texts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.codebook import full_precision
from models.collectives import SoloWorkers, Workers
from models.config import CodebookConfig
from models.teacher import FeatureQueue
from models.transport import Scores, TransportPlan, ipot, sinkhorn


@dataclass(frozen=True)
class Problem:
    """This worker's share of the samples that are assigned to codes together; image and text are two problems."""

    features: Float[Tensor, "2 P D"]
    valid: Bool[Tensor, " P"]
    workers: Workers
    """The workers that the samples are spread over."""

    def scores(self, codes: Float[Tensor, "K D"], limit: int) -> Scores:
        """Cosines with the codes, at most `limit` bytes of them at once."""
        return Scores(self.features, codes, limit)


def queue_entries(config: CodebookConfig, rows: int, size: int) -> int:
    """How many of `size` queue entries are assigned together with a batch of `rows`, written or not."""
    if config.assign_queue == "auto":
        return max(0, min(2 * config.size - rows, size))
    return min(config.assign_queue, size)


@torch.no_grad()
def build_problem(
    config: CodebookConfig,
    teacher: Float[Tensor, "2 B D"],
    queue: FeatureQueue | None,
    counts: list[int],
    workers: Workers,
) -> Problem:
    """The features whose codes are solved for together in this step (docs/spec/codebook.md 3.4).

    They are the teacher's of the batch (`counts` rows by worker), then the newest queue entries. `sharded`: each of W
    workers has its own rows and every W-th queue entry, and they exchange sums; `replicated`: each has all rows and
    entries; `local`: each has its own rows and the whole queue, without any exchange.
    """
    rows, step, first = full_precision(teacher), 1, 0
    if config.dist == "sharded":
        step, first = workers.world_size, workers.rank
    else:
        if config.dist == "replicated":
            both = workers.all_gather_rows(rows.transpose(0, 1).contiguous(), counts)
            rows = both.transpose(0, 1)
        else:
            counts = [rows.shape[1]]
        workers = SoloWorkers()
    valid = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
    entries = queue_entries(config, sum(counts), len(queue.image)) if queue is not None else 0
    if queue is not None and entries > 0:
        # Entries not written yet stay in, masked: shapes do not depend on the device's count, so nobody waits for it.
        older, written = queue.newest(entries)
        rows = torch.cat([rows, older[:, first::step].to(rows.dtype)], 1)
        valid = torch.cat([valid, written[first::step]])
    return Problem(rows, valid, workers)


def solve(config: CodebookConfig, problem: Problem, codes: Float[Tensor, "K D"]) -> TransportPlan:
    """Assign the problem's samples to the codes; the plan is the same on all workers that take part."""
    scores = problem.scores(codes.detach(), int(config.scores_mib * 2**20))
    if config.solver == "ipot":
        return ipot(scores, problem.valid, config.ipot.beta, config.ipot.outer, problem.workers)
    return sinkhorn(scores, problem.valid, config.eps, config.iters, config.balance, problem.workers)


@torch.no_grad()
def code_mass(problem: Problem, plan: TransportPlan, codes: Float[Tensor, "K D"], limit: int) -> Float[Tensor, "2 K"]:
    """Mean over all samples of the mass that each code gets: 1/K each where the plan is balanced."""
    mass = codes.new_zeros(2, len(codes))
    for rows, scores in problem.scores(codes.detach(), limit):
        mass += (plan.targets(scores) * problem.valid[rows, None]).sum(1)
    total = problem.workers.all_reduce_sum(torch.cat([mass.flatten(), problem.valid.sum()[None].to(mass.dtype)]))
    return total[:-1].view_as(mass) / total[-1].clamp(min=1)
