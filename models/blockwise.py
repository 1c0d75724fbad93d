"""Sums over rows in blocks, so that a large table of scores never exists as a whole, nor in the backward pass."""

from collections.abc import Callable
from typing import TypeVarTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Sums = TypeVarTuple("Sums")


def sum_over_rows(terms: Callable[[slice], tuple[*Sums]], rows: int, row_bytes: int, limit: int) -> tuple[*Sums]:
    """`terms(slice(0, rows))`, or the sum of `terms` over blocks of as many rows as fit into `limit` bytes.

    With more than one block each is computed again in the backward pass, so that only one block's intermediates are
    alive at a time. Exact: the terms must be sums over rows.
    """
    size = max(1, int(limit // max(row_bytes, 1)))
    if rows <= size:
        return terms(slice(0, rows))
    blocks = [
        checkpoint(terms, slice(start, min(start + size, rows)), use_reentrant=False, preserve_rng_state=False)
        for start in range(0, rows, size)
    ]
    return cast(tuple[*Sums], tuple(_add(column) for column in zip(*blocks, strict=True)))


def _add(values: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(values).sum(0)
