"""Sums over rows in blocks: exact, and with a bounded memory in both directions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import contrast
from models.blockwise import sum_over_rows


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("limit", [10**9, 5 * 8, 1])
def test_blocks_add_up_in_value_and_gradient(limit):
    rows = torch.arange(7.0, dtype=torch.float64, requires_grad=True)
    taken: list[tuple[int, int]] = []

    def terms(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append((part.start, part.stop))
        return rows[part].square().sum(), rows[part].sin().sum()

    squares, sines = sum_over_rows(terms, 7, 8, limit)
    assert squares.item() == pytest.approx(91) and sines.item() == pytest.approx(rows.sin().sum().item())
    (squares + sines).backward()
    assert torch.allclose(rows.grad, 2 * rows + rows.cos())
    assert max(stop - start for start, stop in taken) == {10**9: 7, 40: 5, 1: 1}[limit]


def local_case(rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    query = torch.nn.functional.normalize(torch.randn(rows, 6, generator=generator, dtype=torch.float64), dim=1)
    keys = torch.nn.functional.normalize(torch.randn(rows, 5, 6, generator=generator, dtype=torch.float64), dim=2)
    valid = torch.rand(rows, 5, generator=generator) < 0.8
    negative = torch.rand(rows, rows, generator=generator) < 0.9
    return [query, keys, valid, negative & ~torch.eye(rows, dtype=torch.bool)]


def test_local_global_in_blocks_is_exact_and_never_makes_the_whole_table():
    results = []
    for limit in (2**30, 3 * 24 * 5 * 8 * 4):  # all rows; four rows at a time
        query, keys, valid, negative = local_case(24)
        query.requires_grad_()
        temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        with Largest() as largest:
            total, count = contrast.local_global(query, keys, valid, negative, 0, temperature, limit)
            total.backward()
        results.append((total.detach(), count, query.grad, temperature.grad, largest.numbers))
    whole, blocked = results
    assert whole[4] == 24 * 24 * 5 and blocked[4] == max(4 * 24 * 5, 24 * 5 * 6)
    for a, b in zip(whole[:4], blocked[:4], strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_the_largest_table_grows_with_the_batch_not_with_its_square():
    sizes = []
    for rows in (16, 32, 64):
        query, keys, valid, negative = local_case(rows)
        query.requires_grad_()
        with Largest() as largest:
            limit = 3 * 5 * 8 * 64 * 4  # four rows of the largest batch
            contrast.local_global(query, keys, valid, negative, 0, torch.tensor(0.1).double(), limit)[0].backward()
        sizes.append(largest.numbers)
    assert sizes[2] <= 2.2 * sizes[1] and sizes[1] <= 2.2 * sizes[0]
