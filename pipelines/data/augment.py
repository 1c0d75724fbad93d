"""Augmentation in batch on the worker's device; crops are made at decoding (`pipelines/data/transforms.py`).

TCL's training transform after the crop, in its order: colour jitter, grayscale, blur, flip, RandAugment, normalise
(arXiv 2202.10401). Every number is drawn from the sample's key. Between operations a pixel is a whole level 0..255 in
float32, as in Pillow: sums of levels are exact in any order, so a sample looks the same in every batch. Operations are
Pillow's (one `blend` makes four of them), because kornia's forms take floating-point means. Chains work in place on
what they have just made: fresh memory costs more than the arithmetic at small sizes.
Axes: B rows, S image side, N rows an operation is applied to.
"""

import math
from collections.abc import Callable
from typing import Literal

import kornia.geometry.transform
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from models.normalize import normalize_levels
from models.sample_rng import COLOUR, uniform

JITTER, GRAY, BLUR, FLIP, RANDOM_OPERATION = 0.8, 0.2, 0.5, 0.5, 0.5
"""Probabilities."""
STRENGTH, HUE = 0.4, 0.1
"""Brightness, contrast and saturation are scaled by 1 +- STRENGTH, hue turns by +- HUE of a circle."""
BLUR_RADIUS = (0.1, 2.0)
LEVEL_FACTOR, SHEAR, SHIFT, ANGLE = 1.36, 0.21, 7.0, math.radians(21)
"""RandAugment at level 7 of 10: factor of brightness and sharpness, slope, pixels, radians."""
FILL = 128.0
_NUMBERS = 20
"""Draws of one view."""
_TAPS = 2
"""Pixels to each side that a box filter of the largest radius takes in."""

Levels = Float[Tensor, "N 3 S S"]
Operation = Callable[[Tensor, Tensor], Tensor]
Kind = Literal["full", "light", "none"]


def augment(
    views: UInt8[Tensor, "B S S 3"], keys: Int[Tensor, " B"], view: int, kind: Kind
) -> Float[Tensor, "B 3 S S"]:
    """Normalised model input of one of the two views (0 or 1).

    full: the whole chain; light and none: normalise only. Light crops are all that images get whose captions speak of
    colours and sides, which jitter and flips would belie.
    """
    levels = views.permute(0, 3, 1, 2).contiguous().float()
    if kind == "full":
        # on the CPU, where choosing rows needs no wait for the device
        draws = uniform(keys.cpu(), COLOUR, 2 * _NUMBERS)[:, view * _NUMBERS : (view + 1) * _NUMBERS].float()
        _jitter(levels, draws[:, :9])
        _change(levels, draws[:, 9] < GRAY, lambda some, _: gray(some).expand(-1, 3, -1, -1))
        radius = BLUR_RADIUS[0] + draws[:, 11] * (BLUR_RADIUS[1] - BLUR_RADIUS[0])
        _change(levels, draws[:, 10] < BLUR, blur, radius)
        _change(levels, draws[:, 12] < FLIP, lambda some, _: some.flip(3))
        _random_operation(levels, draws[:, 13:16])
        _random_operation(levels, draws[:, 16:19])
    return normalize_levels(levels)


def _change(levels: Levels, chosen: Tensor, operation: Operation, values: Tensor | None = None) -> None:
    """Put `operation` of the chosen rows, with their `values`, in their place."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        own = torch.zeros(len(rows)) if values is None else values[rows]
        place = rows.to(levels.device)
        levels.index_copy_(0, place, operation(levels.index_select(0, place), own.to(levels.device)))


def _jitter(levels: Levels, draws: Tensor) -> None:
    """Brightness, contrast, saturation and hue in an order of the sample's own; draws: whether, four factors, order."""
    factors = 1 + (2 * draws[:, 1:5] - 1) * torch.tensor([STRENGTH, STRENGTH, STRENGTH, HUE])
    order = draws[:, 5:9].argsort(1).masked_fill(draws[:, :1] >= JITTER, -1)
    for turn in order.unbind(1):
        factor = factors.gather(1, turn.clamp(min=0)[:, None])[:, 0]
        _change(levels, (turn >= 0) & (turn < 3), tone, torch.stack([turn, factor], 1))
        _change(levels, turn == 3, hue, factor)


def _random_operation(levels: Levels, draws: Tensor) -> None:
    """One operation of RandAugment; draws: which of ten (0 is the identity), whether, sign."""
    which = (draws[:, 0] * 10).long().masked_fill(draws[:, 1] >= RANDOM_OPERATION, 0)
    factor = torch.full((len(levels),), LEVEL_FACTOR)
    sign = 1 - 2 * (draws[:, 2] < 0.5).float()
    _change(levels, which == 1, lambda some, _: auto_contrast(some))
    _change(levels, which == 2, lambda some, _: equalise(some))
    _change(levels, which == 3, tone, torch.stack([torch.zeros(len(levels)), factor], 1))
    _change(levels, which == 4, sharpness, factor)
    _change(levels, which >= 5, affine, geometry(which - 5, sign, levels.shape[-1]))


def geometry(which: Int[Tensor, " N"], sign: Float[Tensor, " N"], size: int) -> Float[Tensor, "N 6"]:
    """Where a target pixel comes from, (a, b, c, d, e, f): x' = a x + b y + c, y' = d x + e y + f (Pillow's order).

    which: 0 shear x, 1 shear y, 2 shift x, 3 shift y, 4 rotate (counter-clockwise for sign 1); others have no meaning.
    Centres of pixels are whole numbers.
    """
    cosine, sine, middle = math.cos(ANGLE), math.sin(ANGLE), (size - 1) / 2
    straight = [[1, 0, 0, 0, 1, 0]] * 4 + [[cosine, 0, middle * (1 - cosine), 0, cosine, middle * (1 - cosine)]]
    turned = [
        [0, SHEAR, 0, 0, 0, 0],
        [0, 0, 0, SHEAR, 0, 0],
        [0, 0, SHIFT, 0, 0, 0],
        [0, 0, 0, 0, 0, SHIFT],
        [0, -sine, middle * sine, sine, 0, -middle * sine],
    ]
    which = which.clamp(0, 4)
    return torch.tensor(straight)[which] + sign[:, None] * torch.tensor(turned)[which]


def affine(levels: Levels, matrix: Float[Tensor, "N 6"]) -> Levels:
    """Bilinear; what lies outside the image is FILL."""
    steps = torch.arange(levels.shape[-1], device=levels.device, dtype=torch.float32)
    x, y = steps[None, None, :], steps[None, :, None]
    a, b, c, d, e, f = (column[:, None, None] for column in matrix.unbind(1))
    maps = (a * x + b * y + c, d * x + e * y + f)
    moved = kornia.geometry.transform.remap(levels - FILL, *maps, align_corners=True)
    return _round(moved.add_(FILL))


def _round(levels: Levels) -> Levels:
    """To the nearest level, in place."""
    return levels.add_(0.5).floor_()


def _each(values: Float[Tensor, " N"]) -> Float[Tensor, "N 1 1 1"]:
    return values[:, None, None, None]


def blend(base: Float[Tensor, "..."], levels: Levels, factor: Float[Tensor, " N"]) -> Levels:
    """From `base` (0) through `levels` (1) and beyond; fractions are dropped, as in Pillow's `Image.blend`."""
    return (levels - base).mul_(_each(factor)).add_(base).clamp_(0, 255).floor_()


def gray(levels: Levels) -> Float[Tensor, "N 1 S S"]:
    """Luma by ITU-R 601 in Pillow's 16-bit fixed point."""
    red, green, blue = levels.split(1, 1)
    weighted = (red * 19595).add_(green * 38470).add_(blue * 7471)
    return weighted.add_(2**15).mul_(2.0**-16).floor_()


def tone(levels: Levels, values: Float[Tensor, "N 2"]) -> Levels:
    """Blend by the second value, with a base by the first: black (0, brightness), the image's mean grey (1, contrast)
    or its grey self (2, saturation)."""
    kind, factor = values.unbind(1)
    own = gray(levels)
    mean = own.double().mean((2, 3), keepdim=True).add_(0.5).floor_().float()
    return blend(own * _each(kind == 2) + mean * _each(kind == 1), levels, factor)


def hue(levels: Levels, factor: Float[Tensor, " N"]) -> Levels:
    """Turned by (factor - 1) of the colour circle, saturation and value kept (the hexagonal HSV of Pillow).

    Written without branches, a fifth of the time of a way through `kornia.color`; levels are whole, so 1 - distance to
    the largest channel says which one it is.
    """
    red, green, blue = levels.split(1, 1)
    high = torch.maximum(torch.maximum(red, green), blue)
    spread = high - torch.minimum(torch.minimum(red, green), blue)
    is_red = (red - high).add_(1).clamp_(min=0)
    is_green = (green - high).add_(1).clamp_(min=0).mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    side = ((green - blue) * is_red).add_((blue - red).mul_(is_green)).add_((red - green).mul_(is_blue))
    sector = side.div_(spread.clamp(min=1)).add_(2 * is_green).add_(4 * is_blue).add_(6 * _each(factor - 1))
    place = sector + torch.tensor([5.0, 3.0, 1.0], device=levels.device)[:, None, None]
    place -= (place / 6).floor_().mul_(6)
    return _round(high - torch.minimum(place, 4 - place).clamp_(0, 1).mul_(spread))


def blur(levels: Levels, radius: Float[Tensor, " N"]) -> Levels:
    """Pillow's Gaussian: three box filters of together variance radius^2 (pixels), the edge repeated outwards.

    One matrix does rows and columns. Its weights are 16-bit fixed point and its rows sum to 1, so that a sum of levels
    is exact in float32 whatever its order.
    """
    size, device = levels.shape[-1], levels.device
    variance = radius.double()[:, None] ** 2 / 3
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = whole + part
    offsets = torch.arange(-_TAPS, _TAPS + 1, device=device)
    weights = (reach + 1 - offsets.abs()).clamp(0, 1) / (2 * reach + 1)
    source = (torch.arange(size, device=device)[:, None] + offsets).clamp(0, size - 1).expand(len(levels), -1, -1)
    box = torch.zeros(len(levels), size, size, dtype=torch.float64, device=device)
    box.scatter_add_(2, source, weights[:, None, :].expand(-1, size, -1))
    fixed = (box @ box @ box * 2**16).round_()
    fixed.diagonal(dim1=1, dim2=2).add_(2**16 - fixed.sum(2))
    matrix = fixed.float()[:, None]
    down = _round(matrix @ levels * 2.0**-16)
    return _round(down @ matrix.mT * 2.0**-16)


def sharpness(levels: Levels, factor: Float[Tensor, " N"]) -> Levels:
    """Away from a 3 x 3 smoothing above 1; the outermost pixels stay."""
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    window = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = levels[:, :, 1:-1, 1:-1]
    smooth = _round((window + 4 * inner) / 13)
    return F.pad(blend(smooth, inner, factor) - inner, (1, 1, 1, 1)) + levels


def auto_contrast(levels: Levels) -> Levels:
    """Each channel stretched to 0..255; a flat one stays."""
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    stretched = ((levels - low) * 255 / (high - low).clamp(min=1)).floor()
    return torch.where(high > low, stretched, levels)


def equalise(levels: Levels) -> Levels:
    """Each channel's histogram made level, by Pillow's integer table."""
    channels = levels.flatten(2).flatten(0, 1).long()
    offsets = torch.arange(len(channels), device=levels.device)[:, None] * 256
    counts = torch.bincount((channels + offsets).flatten(), minlength=256 * len(channels)).view(-1, 256)
    step = (counts.sum(1) - counts.gather(1, channels.amax(1, keepdim=True))[:, 0]) // 255
    before = counts.cumsum(1) - counts
    table = (before + step[:, None] // 2) // step.clamp(min=1)[:, None]
    table = torch.where(step[:, None] > 0, table.clamp(max=255), torch.arange(256, device=levels.device))
    return table.gather(1, channels).float().view_as(levels)
