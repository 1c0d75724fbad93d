"""The workers that tests put in the place of a process group keep the protocol of `models/collectives.py`."""

from typing import Any

import pytest
import torch

from models.collectives import Workers
from tests.support import fake_workers


def leave_one_out(workers: Workers) -> None:
    if workers.rank != 1:
        workers.all_reduce_sum(torch.zeros(1))


def fail_on_one(workers: Workers) -> None:
    if workers.rank == 1:
        raise ValueError("rank 1")
    workers.all_reduce_sum(torch.zeros(1))


def exchange_all(workers: Workers) -> list[Any]:
    rank = workers.rank
    counts = workers.row_counts(rank)
    rows = workers.all_gather_rows(torch.full((rank, 2), rank), counts)
    sums = workers.all_reduce_sum(torch.tensor([rank, 1]))
    return [counts, rows, sums, workers.all_reduce_max(torch.tensor(rank)), workers.broadcast(torch.tensor(rank + 5))]


def test_fake_workers_keep_the_protocol_and_show_mistakes():
    for counts, rows, sums, largest, first in fake_workers.on_threads(3, exchange_all):
        assert counts == [0, 1, 2] and rows.tolist() == [[1, 1], [2, 2], [2, 2]]
        assert sums.tolist() == [3, 3] and int(largest) == 2 and int(first) == 5
    with pytest.raises(ValueError, match="rank 1"):
        fake_workers.on_threads(3, fail_on_one)
    with pytest.raises(AssertionError, match="different calls"):
        fake_workers.on_threads(3, leave_one_out)
