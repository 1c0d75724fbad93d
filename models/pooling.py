"""Patch features to the local parts of an image (TCL spec 2.3)."""

import math

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def pool_patches(patches: Float[Tensor, "B P D"], grid: str) -> Float[Tensor, "B K D"]:
    """Average-pool a square grid of g x g patches to c x c, c = floor(sqrt(g)) (`sqrt`) or 4 (`quarter`), as they are.

    Window and stride are the reference's, floor(sqrt(g)) or floor(g / 4), trailing rows and columns dropped, wherever
    that gives c x c; any other grid is pooled adaptively, never to more parts than there are patches.
    """
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patches are no square grid")
    cells = math.isqrt(side) if grid == "sqrt" else min(4, side)
    window = math.isqrt(side) if grid == "sqrt" else side // cells
    image = rearrange(patches, "b (h w) d -> b d h w", h=side)
    fits = side // window == cells
    pooled = F.avg_pool2d(image, window) if fits else F.adaptive_avg_pool2d(image, cells)
    return rearrange(pooled, "b d h w -> b (h w) d")
