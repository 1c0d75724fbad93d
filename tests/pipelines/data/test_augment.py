import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from models.normalize import normalize
from models.sample_rng import hash64
from pipelines.data import augment as ops

SIZE = 32


@pytest.fixture(scope="module")
def pictures():
    """Smooth and noisy, dark and flat pictures, uint8 (12, SIZE, SIZE, 3)."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (12, 5, 5, 3), np.uint8)
    large = np.stack([np.asarray(Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for p in small])
    large[4:8] = np.clip(large[4:8] + generator.integers(-30, 30, large[4:8].shape), 0, 255)
    large[8] //= 4
    large[9] = 77
    return large


def levels_of(pictures):
    return torch.tensor(pictures).permute(0, 3, 1, 2).float().contiguous()


def errors(ours, theirs):
    """Differences in levels, (pictures, S, S, 3)."""
    return np.abs(ours.permute(0, 2, 3, 1).numpy() - np.stack([np.asarray(p, np.float32) for p in theirs]))


def by_pillow(pictures, change):
    return [change(Image.fromarray(p)) for p in pictures]


def full(count, value):
    return torch.full((count,), float(value))


ENHANCERS = [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]


@pytest.mark.parametrize(("kind", "enhancer"), ENHANCERS)
@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.36])
def test_tone_equals_pillow_within_a_level(pictures, kind, enhancer, factor):
    values = torch.stack([full(12, kind), full(12, factor)], 1)
    theirs = by_pillow(pictures, lambda p: enhancer(p).enhance(factor))
    assert errors(ops.tone(levels_of(pictures), values), theirs).max() <= 1


def test_gray_and_equalise_equal_pillow(pictures):
    levels = levels_of(pictures)
    grey = ops.gray(levels).expand(-1, 3, -1, -1)
    assert errors(grey, by_pillow(pictures, lambda p: p.convert("L").convert("RGB"))).max() == 0
    assert errors(ops.equalise(levels), by_pillow(pictures, ImageOps.equalize)).max() == 0


def test_auto_contrast_and_sharpness_equal_pillow_within_a_level(pictures):
    levels = levels_of(pictures)
    assert errors(ops.auto_contrast(levels), by_pillow(pictures, ImageOps.autocontrast)).max() <= 1
    theirs = by_pillow(pictures, lambda p: ImageEnhance.Sharpness(p).enhance(1.36))
    assert errors(ops.sharpness(levels, full(12, 1.36)), theirs).max() <= 1


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.0])
def test_blur_equals_pillow_within_three_levels(pictures, radius):
    """Pillow rounds after each of its six passes; on average the difference is below one level."""
    theirs = by_pillow(pictures, lambda p: p.filter(ImageFilter.GaussianBlur(radius)))
    wrong = errors(ops.blur(levels_of(pictures), full(12, radius)), theirs)
    assert wrong.mean() <= 0.9 and wrong.max() <= 3


def test_blur_spreads_a_point_as_a_gaussian_of_the_radius():
    point = torch.zeros(1, 3, 31, 31)
    point[:, :, 15, 15] = 255
    row = ops.blur(point, full(1, 1.5))[0, 0].sum(0)
    offsets = torch.arange(31) - 15.0
    assert ((row * offsets**2).sum() / row.sum()).sqrt() == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("turn", [-0.1, 0.04, 0.1])
def test_hue_turns_the_hsv_circle(pictures, turn):
    ours = ops.hue(levels_of(pictures), full(12, 1 + turn)).permute(0, 2, 3, 1).reshape(-1, 3)[::37]
    for before, after in zip(pictures.reshape(-1, 3)[::37] / 255, ours.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert np.abs(np.array(after) - 255 * np.array(expected)).max() <= 0.51


MOVES = [
    (0, 1, lambda p: affine(p, (1, ops.SHEAR, 0, 0, 1, 0))),
    (0, -1, lambda p: affine(p, (1, -ops.SHEAR, 0, 0, 1, 0))),
    (1, 1, lambda p: affine(p, (1, 0, 0, ops.SHEAR, 1, 0))),
    (2, 1, lambda p: affine(p, (1, 0, 7, 0, 1, 0))),
    (3, -1, lambda p: affine(p, (1, 0, 0, 0, 1, -7))),
    (4, 1, lambda p: p.rotate(21, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))),
    (4, -1, lambda p: p.rotate(-21, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))),
]


def affine(picture, matrix):
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, **options)


@pytest.mark.parametrize(("which", "sign", "change"), MOVES)
def test_moves_equal_pillow_in_direction_size_and_fill(pictures, which, sign, change):
    """Nearly all within four levels: Pillow measures shears from the corner of the first pixel, and cuts edges hard."""
    smooth = pictures[:4]
    matrix = ops.geometry(torch.full((4,), which), full(4, sign), SIZE)
    wrong = errors(ops.affine(levels_of(smooth), matrix), by_pillow(smooth, change))
    backwards = ops.geometry(torch.full((4,), which), full(4, -sign), SIZE)
    assert (wrong <= 4).mean() >= 0.9
    assert errors(ops.affine(levels_of(smooth), backwards), by_pillow(smooth, change)).mean() > 5 * wrong.mean()


@pytest.mark.parametrize("kind", ["full", "light", "none"])
def test_a_sample_looks_the_same_alone_and_in_any_batch(pictures, kind):
    views = torch.tensor(np.concatenate([pictures] * 8))
    keys = torch.tensor([hash64("sample", i) for i in range(len(views))])
    for view in (0, 1):
        together = ops.augment(views, keys, view, kind)
        order = torch.randperm(len(views), generator=torch.Generator().manual_seed(1))
        assert torch.equal(ops.augment(views[order], keys[order], view, kind), together[order])
        for i in range(0, len(views), 5):
            alone = ops.augment(views[i : i + 1], keys[i : i + 1], view, kind)
            assert (alone - together[i : i + 1]).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["light", "none"])
def test_light_and_none_only_normalise(pictures, kind):
    views = torch.tensor(pictures)
    assert torch.equal(ops.augment(views, torch.arange(12), 0, kind), normalize(views))


def test_views_differ_and_depend_on_nothing_but_the_key(pictures):
    views = torch.tensor(pictures[:1]).expand(64, -1, -1, -1)
    first, second = (ops.augment(views, torch.arange(64), view, "full") for view in (0, 1))
    different = (first - second).abs().amax((1, 2, 3)) > 0
    assert different.float().mean() > 0.9
    assert torch.equal(ops.augment(views, torch.full((64,), 5), 0, "full"), first[5:6].expand_as(first))


def test_as_many_samples_change_as_the_probabilities_say(pictures):
    """Untouched are those that no step picks (in RandAugment: not applied, or the identity)."""
    views = torch.tensor(pictures[5:6]).expand(2000, -1, -1, -1)
    out = ops.augment(views, torch.arange(2000), 0, "full")
    touched = (out - normalize(views[:1])).abs().amax((1, 2, 3)) > 1e-6
    assert touched.float().mean().item() == pytest.approx(1 - 0.2 * 0.8 * 0.5 * 0.5 * 0.55**2, abs=0.025)


@pytest.mark.parametrize("size", [4, 7, 48])
def test_any_size_and_an_empty_batch_work(size):
    views = torch.randint(0, 256, (200, size, size, 3), dtype=torch.uint8)
    out = ops.augment(views, torch.arange(200), 0, "full")
    assert out.shape == (200, 3, size, size) and out.isfinite().all()
    assert ops.augment(views[:0], torch.arange(0), 1, "full").shape == (0, 3, size, size)
