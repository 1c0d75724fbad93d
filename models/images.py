"""Encoded images to pixels: limits before decoding, the whole image as evaluation and serving see it.

Axes: S side of the result.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from models.preprocess import orientation, resize_for_eval

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Decoders that may be run on a stranger's bytes; Pillow has others that start programs."""


@dataclass
class OpenedImage:
    """An image whose header has been read."""

    image: Image.Image
    size: tuple[int, int]
    """(width, height) as shown, EXIF orientation applied."""
    turned: bool
    """Whether orientation swaps width and height."""


class ImageRejected(Exception):
    """An image that cannot be used: args are (reason, detail), `reason` being one of the skip ledger's."""


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def decoding() -> Iterator[None]:
    """Around opening and decoding: our own limit on pixels counts, Pillow's warnings about damage are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(data: bytes, max_pixels: int, min_side: int) -> OpenedImage:
    """Read an image's header. Raises ImageRejected: unreadable, too_large (before anything is decoded), too_small."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_large", str(error)) from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise ImageRejected("unreadable", describe_damage(error, data)) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageRejected("too_large", f"{width} x {height} pixels, more than {max_pixels}")
    if min(width, height) < min_side:
        raise ImageRejected("too_small", f"{width} x {height} pixels, the shorter side is less than {min_side}")
    turned = _is_turned(image)
    return OpenedImage(image, (height, width) if turned else (width, height), turned)


def _is_turned(image: Image.Image) -> bool:
    if image.format == "PNG" and "exif" not in image.info:
        return False  # Pillow would decode the whole image to search behind its pixels
    return orientation(image) in (5, 6, 7, 8)


def describe_damage(error: Exception, data: bytes) -> str:
    """A decoder's error as the detail of an ImageRejected."""
    if not data:
        return "no bytes"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a known format, begins with {data[:16]!r}"
    return f"{type(error).__name__}: {error}"


def decode_whole(opened: OpenedImage, out: np.ndarray) -> None:
    """Decode the whole image into `out`, uint8 (S, S, 3), as evaluation and serving do. Raises ImageRejected."""
    try:
        opened.image.load()  # raises on damage, which reading EXIF data in `to_rgb` would hide
        out[:] = resize_for_eval(opened.image, out.shape[0])
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise ImageRejected("unreadable", describe_damage(error, b"?")) from error
