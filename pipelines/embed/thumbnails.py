"""Small images for search results."""

import io

from PIL import Image

from models.images import decoding
from models.preprocess import to_rgb

SIDE = 160
"""Longest side, pixels."""
_QUALITY = 80


def thumbnail(data: bytes, side: int = SIDE) -> bytes | None:
    """A JPEG of at most `side` pixels a side, upright, without metadata; the aspect is kept, nothing is enlarged.

    None where the image cannot be decoded; limits on its size are the caller's (`models.images.open_image`).
    """
    with decoding():
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded at a fraction of its size
                small = to_rgb(image)
                small.thumbnail((side, side), Image.Resampling.BICUBIC)
                small.info = {}  # comments would be written again
                out = io.BytesIO()
                small.save(out, "JPEG", quality=_QUALITY)
        except Exception:  # decoders raise nearly anything on damaged bytes
            return None
    return out.getvalue()
