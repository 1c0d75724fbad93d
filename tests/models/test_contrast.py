"""Contrastive terms against plain loops written from their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import contrast

TAU = torch.tensor(0.2, dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def dot(left, right) -> float:
    return sum(float(a) * float(b) for a, b in zip(left, right, strict=True))


def log_softmax_loops(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(value - top) for value in row))
    return [value - total for value in row]


def test_similarities_are_cosines_over_temperature_batch_first():
    query, batch, queue = unit(3, 4), unit(5, 4, seed=1), unit(2, 4, seed=2)
    logits = contrast.similarities(query, batch, queue, TAU)
    for b in range(3):
        expected = [dot(query[b], key) / 0.2 for key in [*batch, *queue]]
        assert logits[b].tolist() == pytest.approx(expected)


def test_similarities_without_queue_or_rows():
    assert contrast.similarities(unit(2, 4), unit(3, 4), unit(0, 4), TAU).shape == (2, 3)
    assert contrast.similarities(unit(0, 4), unit(3, 4), unit(1, 4), TAU).shape == (0, 4)


def test_soft_nce_is_cross_entropy_row_by_row():
    logits, target = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    expected = 0.0
    for row, wanted in zip(logits.tolist(), target.tolist(), strict=True):
        expected -= sum(w * value for w, value in zip(wanted, log_softmax_loops(row), strict=True))
    total, count = contrast.soft_nce(logits, target)
    assert float(total) == pytest.approx(expected) and count == 4


@pytest.mark.parametrize("candidates", [1, 2, 9])
def test_equal_keys_cost_the_logarithm_of_their_number(candidates):
    logits = torch.full((3, candidates), 1.7, dtype=torch.float64)
    target = torch.eye(3, candidates, dtype=torch.float64)
    target[:, 0] = 1 - target[:, 1:].sum(1)
    total, count = contrast.soft_nce(logits, target)
    assert float(total) / count == pytest.approx(math.log(candidates), abs=1e-12)


def test_a_left_out_candidate_gets_no_probability_and_no_gradient():
    logits = torch.randn(1, 4, requires_grad=True)
    masked = logits.masked_fill(torch.tensor([[False, True, False, False]]), contrast.MASKED)
    total, _ = contrast.soft_nce(masked, torch.eye(1, 4))
    (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
    assert F.softmax(masked, 1)[0, 1].item() == 0.0 and gradient[0, 1] == 0.0
    kept, _ = contrast.soft_nce(masked[:, [0, 2, 3]], torch.eye(1, 3))
    assert total.item() == pytest.approx(kept.item(), rel=1e-6)


def test_hard_targets_share_out_equally():
    positive = torch.tensor([[True, False, True, True], [False, True, False, False]])
    for dtype in (torch.float32, torch.float64):
        target = contrast.hard_targets(positive, torch.zeros((), dtype=dtype))
        assert target.dtype == dtype
        assert target.tolist() == [[pytest.approx(1 / 3), 0, pytest.approx(1 / 3), pytest.approx(1 / 3)], [0, 1, 0, 0]]


def test_soft_targets_mix_the_teacher_in():
    teacher, hard = torch.randn(3, 5, dtype=torch.float64), torch.eye(3, 5, dtype=torch.float64)
    mixed = contrast.soft_targets(hard, teacher, 0.4)
    for b in range(3):
        soft = [math.exp(value) for value in log_softmax_loops(teacher[b].tolist())]
        assert mixed[b].tolist() == pytest.approx(
            [0.4 * s + 0.6 * h for s, h in zip(soft, hard[b].tolist(), strict=True)]
        )
    assert contrast.soft_targets(hard, teacher, 0.0) is hard
    assert torch.allclose(contrast.soft_targets(hard, teacher, 1.0), F.softmax(teacher, 1))


def local_global_loops(query, parts, valid, negative, offset) -> tuple[float, int]:
    """docs/spec/tcl.md 2.3, term by term."""
    total, counted = 0.0, 0
    for b, g in enumerate(query):
        own = [k for k in range(parts.shape[1]) if valid[offset + b, k]]
        if not own:
            continue
        others = sum(
            math.exp(dot(g, parts[j, k]) / 0.2)
            for j in range(len(parts))
            for k in range(parts.shape[1])
            if negative[b, j] and valid[j, k]
        )
        terms = [math.exp(dot(g, parts[offset + b, k]) / 0.2) for k in own]
        total += sum(-math.log(s / (s + others)) for s in terms) / len(own)
        counted += 1
    return total, counted


@pytest.mark.parametrize("offset", [0, 2])
def test_local_global_equals_its_definition(offset):
    query, parts = unit(3, 4), unit(5, 6, 4, seed=1)
    valid = torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    valid[offset] = False  # a caption that is [CLS] alone
    negative = torch.ones(3, 5, dtype=torch.bool)
    negative[torch.arange(3), torch.arange(offset, offset + 3)] = False
    negative[1, 4 - offset] = False  # the same caption elsewhere
    total, count = contrast.local_global(query, parts, valid, negative, offset, TAU)
    expected, counted = local_global_loops(query, parts, valid, negative, offset)
    assert float(total) == pytest.approx(expected) and int(count) == counted == 2


def test_equal_local_parts_cost_the_logarithm_of_their_number():
    part = unit(1, 4)
    parts = part.expand(3, 5, 4)
    negative = ~torch.eye(3, dtype=torch.bool)
    total, count = contrast.local_global(
        unit(3, 4, seed=4), parts, torch.ones(3, 5, dtype=torch.bool), negative, 0, TAU
    )
    assert float(total) / float(count) == pytest.approx(math.log(1 + 2 * 5))


def test_padding_changes_nothing_of_local_global():
    query, parts = unit(3, 4), unit(3, 5, 4, seed=1)
    valid = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    negative = ~torch.eye(3, dtype=torch.bool)
    expected = contrast.local_global(query, parts[:, :3], valid[:, :3], negative, 0, TAU)
    changed = parts.masked_fill(~valid[..., None], 7.0)
    actual = contrast.local_global(query, changed, valid, negative, 0, TAU)
    assert float(actual[0]) == pytest.approx(float(expected[0])) and actual[1] == expected[1]


@pytest.mark.parametrize(("rows", "parts"), [(1, 3), (3, 0), (0, 3)])
def test_local_global_of_a_single_row_no_part_or_no_row_is_zero_with_finite_gradient(rows, parts):
    query = unit(rows, 4).requires_grad_()
    valid, negative = torch.ones(rows, parts, dtype=torch.bool), ~torch.eye(rows, dtype=torch.bool)
    total, count = contrast.local_global(query, unit(rows, parts, 4, seed=1), valid, negative, 0, TAU)
    total.backward()
    assert float(total.detach()) == 0.0 and int(count) == (rows if parts else 0)
    assert query.grad is not None and torch.all(query.grad == 0)


def test_local_global_when_no_caption_has_a_word_is_zero_with_finite_gradient():
    query = unit(3, 4).requires_grad_()
    valid, negative = torch.zeros(3, 2, dtype=torch.bool), ~torch.eye(3, dtype=torch.bool)
    total, count = contrast.local_global(query, unit(3, 2, 4, seed=1), valid, negative, 0, TAU)
    total.backward()
    assert float(total.detach()) == 0.0 and int(count) == 0 and bool(torch.isfinite(query.grad).all())


def test_pairwise_sigmoid_equals_its_definition():
    image, text = unit(2, 4), unit(3, 4, seed=1)
    positive = torch.tensor([[False, True, False], [False, False, True]])
    left_out = torch.tensor([[True, False, False], [False, False, False]])
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    expected = 0.0
    for i in range(2):
        for j in range(3):
            if not left_out[i, j]:
                sign = 1 if positive[i, j] else -1
                expected += math.log1p(math.exp(-sign * (10 * dot(image[i], text[j]) - 3)))
    total, count = contrast.pairwise_sigmoid(image, text, positive, left_out, scale, bias)
    assert float(total) == pytest.approx(expected) and count == 2


def test_negative_weights_are_a_softmax_with_the_same_pair_taken_out():
    logits, same = torch.randn(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.bool)
    weights = contrast.negative_weights(logits, same)
    for b in range(3):
        soft = [math.exp(value) for value in log_softmax_loops(logits[b].tolist())]
        assert weights[b].tolist() == pytest.approx([0.0 if b == j else soft[j] for j in range(3)])


def test_a_negative_is_drawn_where_the_cumulative_weight_passes_the_number():
    weights = torch.tensor([[0.0, 0.2, 0.0, 0.3, 0.1, 0.0]], dtype=torch.float64).expand(600, 6)
    same = torch.tensor([[True, False, True, False, False, True]]).expand(600, 6)
    uniform = torch.arange(600, dtype=torch.float64) / 600
    chosen, exists = contrast.draw_negatives(weights, same, uniform)
    assert bool(exists.all())
    expected = [1 if u * 0.6 < 0.2 else 3 if u * 0.6 < 0.5 else 4 for u in ((n + 0.5) / 600 for n in range(600))]
    assert sum(a != b for a, b in zip(chosen.tolist(), expected, strict=True)) <= 2  # on the edges themselves
    assert torch.bincount(chosen, minlength=6).tolist() == pytest.approx([0, 200, 0, 300, 100, 0], abs=1)


def test_the_largest_and_smallest_numbers_never_draw_the_same_pair():
    generator = torch.Generator().manual_seed(0)
    same = torch.zeros(4000, 7, dtype=torch.bool)
    same[:, [0, 3, 6]] = True
    weights = contrast.negative_weights(5 * torch.randn(4000, 7, generator=generator), same)
    for u in (0.0, 1 - 2**-53):
        chosen, _ = contrast.draw_negatives(weights, same, torch.full((4000,), u, dtype=torch.float64))
        assert set(chosen.tolist()) <= {1, 2, 4, 5}


def test_vanished_weights_fall_back_to_all_others_alike():
    same = torch.eye(4, dtype=torch.bool)[:1].expand(300, 4)
    uniform = torch.arange(300, dtype=torch.float64) / 300
    chosen, exists = contrast.draw_negatives(torch.zeros(300, 4), same, uniform)
    assert bool(exists.all()) and torch.bincount(chosen).tolist() == pytest.approx([0, 100, 100, 100], abs=1)


def test_a_row_alone_has_no_negative():
    chosen, exists = contrast.draw_negatives(
        torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.tensor([0.9], dtype=torch.float64)
    )
    assert chosen.tolist() == [0] and exists.tolist() == [False]


PATCH = 16
ACCEPTED = {
    "sqrt": [*range(64, 81, PATCH), *range(144, 177, PATCH), *range(256, 305, PATCH)],
    "quarter": [64, 128, 144, *range(192, 225, PATCH), *range(256, 385, PATCH)],
}
"""Image sides in pixels from 64 to 384 that the reference pools (docs/spec/tcl.md 2.3)."""


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
    for image, pooled in zip(patches(side), contrast.pool_patches(patches(side), grid), strict=True):
        expected = windows(image, side, window)
        assert len(pooled) == len(expected) == (math.isqrt(side) ** 2 if grid == "sqrt" else 16)
        assert torch.allclose(pooled, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("grid", ["sqrt", "quarter"])
@pytest.mark.parametrize("side", range(1, 25))
def test_every_grid_gives_its_number_of_parts_and_keeps_a_constant(grid, side):
    cells = math.isqrt(side) if grid == "sqrt" else min(side, 4)
    pooled = contrast.pool_patches(patches(side), grid)
    assert pooled.shape == (2, cells * cells, 3) and bool(pooled.isfinite().all())
    assert torch.allclose(contrast.pool_patches(torch.ones(1, side * side, 2), grid), torch.ones(1))


def test_the_sizes_in_between_use_every_patch():
    """Grid 14 (224 px), which the reference's pre-training refuses: each patch has a share in some part."""
    image = patches(14)[:1].requires_grad_()
    contrast.pool_patches(image, "sqrt").sum().backward()
    assert bool((image.grad > 0).all())


def test_parts_are_in_rows_as_patches_are():
    image = torch.zeros(1, 16, 1)
    image[0, [0, 1, 4, 5]] = 1.0  # top left
    image[0, [2, 3, 6, 7]] = 2.0  # top right
    assert contrast.pool_patches(image, "sqrt").flatten().tolist() == [1.0, 2.0, 0.0, 0.0]


def test_no_rows_and_no_square():
    assert contrast.pool_patches(torch.zeros(0, 16, 3), "quarter").shape == (0, 16, 3)
    with pytest.raises(ValueError, match="15 patches are no square grid"):
        contrast.pool_patches(torch.zeros(1, 15, 3), "sqrt")
