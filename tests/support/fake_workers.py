"""Workers that are threads of this process: the whole exchange between them without a process group."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Table:
    """Where the threads lay down what they have and read what the others have."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world)
        self._slots: list[tuple[str, Any]] = [("", None)] * world

    def exchange(self, rank: int, call: str, value: Any) -> list[Any]:
        """Everybody's value by rank. Raises AssertionError where the ranks do not all make the same call."""
        self._slots[rank] = call, value
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()  # nobody lays down the next value before all have read this one
        calls = [name for name, _ in everyone]
        assert len(set(calls)) == 1, f"the ranks make different calls: {calls}"
        return [value for _, value in everyone]

    def abort(self) -> None:
        self._barrier.abort()


class ThreadWorkers:
    """One rank's view of the others; every rank adds up the same numbers in the same order, so bits are equal."""

    def __init__(self, rank: int, world_size: int, table: _Table) -> None:
        self.rank, self.world_size, self._table = rank, world_size, table
        self.calls: list[str] = []

    def _exchange(self, call: str, value: Any) -> list[Any]:
        self.calls.append(call)
        return self._table.exchange(self.rank, call, value)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over workers, in place."""
        return value.copy_(torch.stack(self._exchange("sum", value.detach().clone())).sum(0))

    def all_reduce_max(self, value: Tensor) -> Tensor:
        """Largest over workers, in place."""
        return value.copy_(torch.stack(self._exchange("max", value.detach().clone())).amax(0))

    def row_counts(self, count: int) -> list[int]:
        """Every worker's count, by rank."""
        return self._exchange("counts", count)

    def all_gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """All workers' rows in rank order, without gradient."""
        everyone = self._exchange("gather", rows.detach().clone())
        assert [len(part) for part in everyone] == counts, "counts are not those of the rows"
        return torch.cat(everyone)

    def broadcast(self, value: Tensor) -> Tensor:
        """Rank 0's value, in place."""
        return value.copy_(self._exchange("broadcast", value.detach().clone())[0])


def on_threads(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(workers, *args)` in `world` threads at once; results by rank.

    Raises what the first thread to fail raised; the others are released. A thread that ends while others still call is
    a failure too, so a collective that one rank leaves out does not hang.
    """
    table = _Table(world)
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadWorkers(rank, world, table), *args)
            table.exchange(rank, "end", None)
        except threading.BrokenBarrierError:
            pass  # another thread failed, and its error is the one to show
        except BaseException as error:
            errors.append(error)
            table.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
