"""What passes between workers, behind one small interface, so that the mathematics needs no process group.

`SoloWorkers` is one worker alone; `DistributedWorkers` is what torch.distributed (set up by Ray Train) offers. Every
rank must make the same calls in the same order, also with no rows of its own.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


@runtime_checkable
class Workers(Protocol):
    """The other workers, as the training step sees them."""

    rank: int
    world_size: int

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over workers, in place and returned; bit-identical on all of them."""
        ...

    def all_reduce_max(self, value: Tensor) -> Tensor:
        """Largest over workers, in place and returned."""
        ...

    def row_counts(self, count: int) -> list[int]:
        """How many rows each worker has in this step, by rank, where this one has `count`."""
        ...

    def all_gather_rows(self, rows: Shaped[Tensor, "B ..."], counts: list[int]) -> Shaped[Tensor, "N ..."]:
        """All workers' rows in rank order; `counts` may differ or be 0. No gradient passes."""
        ...

    def broadcast(self, value: Tensor) -> Tensor:
        """Rank 0's value, in place and returned."""
        ...


class SoloWorkers:
    """One worker alone: every exchange is the identity."""

    rank = 0
    world_size = 1

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def all_reduce_max(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def row_counts(self, count: int) -> list[int]:
        """This worker's count."""
        return [count]

    def all_gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows themselves, without gradient."""
        return rows.detach()

    def broadcast(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value


class DistributedWorkers:
    """Workers of the default torch.distributed process group (gloo or nccl)."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._host = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else None

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over workers, in place."""
        dist.all_reduce(value, dist.ReduceOp.SUM)
        return value

    def all_reduce_max(self, value: Tensor) -> Tensor:
        """Largest over workers, in place."""
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def row_counts(self, count: int) -> list[int]:
        """Every worker's count, by rank; exchanged on the host, so that no one waits for a GPU."""
        mine = torch.tensor([count])
        counts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(counts, mine, group=self._host)
        return [int(c) for c in counts]

    def all_gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """All workers' rows in rank order: padded to the longest, gathered, trimmed."""
        padded = rows.new_zeros(max(*counts, 1), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        buffers = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(buffers, padded)
        return torch.cat([buffer[:count] for buffer, count in zip(buffers, counts, strict=True)])

    def broadcast(self, value: Tensor) -> Tensor:
        """Rank 0's value, in place."""
        dist.broadcast(value, 0)
        return value
