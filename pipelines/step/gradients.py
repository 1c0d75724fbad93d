"""What crosses workers in a training step: candidate rows, their gradients, sums of losses, the gradient itself."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.batch import Context, Features
from models.collectives import Workers
from models.config import ObjectiveConfig
from models.objectives import infonce


@dataclass(frozen=True)
class Peers:
    """The workers whose rows are candidates of each other, and how many rows each has in this step."""

    workers: Workers
    counts: list[int]

    @classmethod
    def exchange_counts(cls, workers: Workers, rows: int) -> "Peers":
        """Exchange how many rows each worker has in this step."""
        return cls(workers, workers.row_counts(rows))

    @property
    def offset(self) -> int:
        """Index of this worker's first row among all rows."""
        return sum(self.counts[: self.workers.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """Everyone's rows, without gradient."""
        return self.workers.all_gather_rows(rows, self.counts)


def gathered_fields(objective: ObjectiveConfig) -> tuple[str, ...]:
    """Student features whose gradient crosses workers: tokens for matching, vectors for the batch-only contrast."""
    fields: tuple[str, ...] = ()
    if objective.weights.itm > 0:
        fields += ("image_tokens", "text_tokens")
    if not infonce(objective) and (objective.weights.cma > 0 or objective.weights.itm > 0):
        fields += ("image", "text")
    return fields


def gather_leaves(leaves: Features, objective: ObjectiveConfig, peers: Peers) -> Features:
    """All rows of the fields that terms compare across rows, as leaves of their own; the same object on one worker."""
    if peers.workers.world_size == 1:
        return leaves
    fields = {name: peers.gather(getattr(leaves, name)).requires_grad_() for name in gathered_fields(objective)}
    return leaves._replace(**fields)


def reduce_scalars(values: dict[str, Tensor], workers: Workers) -> dict[str, Tensor]:
    """Each value summed over the workers, in float64."""
    if not values:
        return {}
    totals = workers.all_reduce_sum(torch.stack([value.detach().double() for value in values.values()]))
    return dict(zip(values, totals, strict=True))


def leaf_gradients(context: Context, workers: Workers) -> dict[str, Tensor]:
    """The whole loss's gradient in this worker's student features, by field: other workers' share is added here."""
    gradients = {}
    for name, leaf in context.student._asdict().items():
        everyone, gradient = getattr(context.all_student, name), leaf.grad
        if everyone is not leaf:
            # Each worker's terms read all rows: the gradient in one of them is the sum of all workers' gradients.
            shared = everyone.grad if everyone.grad is not None else torch.zeros_like(everyone)
            mine = workers.all_reduce_sum(shared)[context.offset : context.offset + len(leaf)]
            gradient = mine if gradient is None else gradient + mine
        if gradient is not None:
            gradients[name] = gradient
    return gradients


def sum_gradients(parameters: list[nn.Parameter], workers: Workers, bucket: int = 2**25) -> None:
    """Sum each gradient over the workers, in buckets of about `bucket` numbers.

    A missing gradient counts as zero on one worker too, so that weight decay does not depend on how many there are.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if workers.world_size == 1:
        return
    start = 0
    while start < len(parameters):
        end, size = start, 0
        while end < len(parameters) and (size == 0 or size + parameters[end].numel() <= bucket):
            size += parameters[end].numel()
            end += 1
        gradients = [p.grad for p in parameters[start:end] if p.grad is not None]
        totals = workers.all_reduce_sum(torch.cat([g.flatten() for g in gradients])).split(
            [g.numel() for g in gradients]
        )
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total.view_as(gradient))
        start = end
