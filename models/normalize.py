"""The last step of preprocessing, on the model's device: uint8 pixels to what a tower takes.

Apart from `models/preprocess.py`, which a gateway imports without torch. Axes: B images, S side.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models.preprocess import MEAN, STD


def normalize(
    pixels: UInt8[Tensor, "B S S 3"], mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Float[Tensor, "B 3 S S"]:
    """Model input: channels first, 0..1, then `mean` and `std` of each channel taken out."""
    return normalize_levels(pixels.permute(0, 3, 1, 2).contiguous().float(), mean, std)


def normalize_levels(
    levels: Float[Tensor, "B 3 S S"], mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Float[Tensor, "B 3 S S"]:
    """The same from levels 0..255 that are channels first already."""
    centre = 255 * torch.tensor(mean, device=levels.device)[:, None, None]
    spread = 255 * torch.tensor(std, device=levels.device)[:, None, None]
    return (levels - centre).div_(spread)
