"""Patches to local parts, against the reference's pooling where it accepts the size (TCL spec 2.3)."""

import math

import pytest
import torch

from models.pooling import pool_patches

PATCH = 16
ACCEPTED = {
    "sqrt": [*range(64, 81, PATCH), *range(144, 177, PATCH), *range(256, 305, PATCH)],
    "quarter": [64, 128, 144, *range(192, 225, PATCH), *range(256, 385, PATCH)],
}
"""Image sides in pixels from 64 to 384 that the reference runs with."""


def patches(side: int) -> torch.Tensor:
    return torch.randn(2, side * side, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(side))


def windows(image: torch.Tensor, side: int, window: int) -> list[list[float]]:
    """Means over full windows, in rows, of a list of patches in rows."""
    places = range(0, side - window + 1, window)
    cells = [[(y + i) * side + x + j for i in range(window) for j in range(window)] for y in places for x in places]
    return [[sum(float(image[p, d]) for p in cell) / len(cell) for d in range(3)] for cell in cells]


@pytest.mark.parametrize(("grid", "pixels"), [(grid, size) for grid, sizes in ACCEPTED.items() for size in sizes])
def test_pools_as_the_reference_where_it_accepts_the_size(grid, pixels):
    side = pixels // PATCH
    window = math.isqrt(side) if grid == "sqrt" else side // 4
    for image, pooled in zip(patches(side), pool_patches(patches(side), grid), strict=True):
        expected = windows(image, side, window)
        assert len(pooled) == len(expected) == (math.isqrt(side) ** 2 if grid == "sqrt" else 16)
        assert torch.allclose(pooled, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("grid", ["sqrt", "quarter"])
@pytest.mark.parametrize("side", range(1, 25))
def test_every_grid_gives_its_number_of_parts_and_keeps_a_constant(grid, side):
    cells = math.isqrt(side) if grid == "sqrt" else min(side, 4)
    pooled = pool_patches(patches(side), grid)
    assert pooled.shape == (2, cells * cells, 3) and bool(pooled.isfinite().all())
    assert torch.allclose(pool_patches(torch.ones(1, side * side, 2), grid), torch.ones(1))


def test_the_sizes_in_between_use_every_patch():
    """Grid 14 (224 px), which the reference's pre-training refuses: each patch has a share in some part."""
    image = patches(14)[:1].requires_grad_()
    pool_patches(image, "sqrt").sum().backward()
    assert bool((image.grad > 0).all())


def test_parts_are_in_rows_as_patches_are():
    image = torch.zeros(1, 16, 1)
    image[0, [0, 1, 4, 5]] = 1.0  # top left
    image[0, [2, 3, 6, 7]] = 2.0  # top right
    assert pool_patches(image, "sqrt").flatten().tolist() == [1.0, 2.0, 0.0, 0.0]


def test_no_rows_and_no_square():
    assert pool_patches(torch.zeros(0, 16, 3), "quarter").shape == (0, 16, 3)
    with pytest.raises(ValueError, match="15 patches are no square grid"):
        pool_patches(torch.zeros(1, 15, 3), "sqrt")
