"""Two random crops of one decode of an image. No Ray; opening and decoding whole are in `models/images.py`.

Axes: B images, S side of the result.
"""

import numpy as np
from PIL import Image

from models.images import ImageRejected, OpenedImage, describe_damage
from models.preprocess import to_rgb

_TRIES = 10  # boxes drawn before the middle of the image is taken, as in torchvision
DRAWS = 2 * _TRIES * 4
"""Random numbers an image needs for its two crops."""


def draw_boxes(sizes: np.ndarray, draws: np.ndarray, area_min: float) -> np.ndarray:
    """Crops of images: random area (area_min..1 of the image) and aspect (3/4..4/3), at a random place.

    `sizes` (B, 2) are widths and heights, `draws` (B, DRAWS) numbers in [0, 1). Returns boxes int64 (B, 2, 4): left,
    top, right, bottom of each image's two crops, in pixels.
    """
    width, height = (sizes[:, axis, None, None] for axis in (0, 1))
    area, shape, left, top = np.moveaxis(draws.reshape(len(sizes), 2, _TRIES, 4), 3, 0)
    area = (area_min + (1 - area_min) * area) * width * height
    ratio = np.exp(np.log(3 / 4) + shape * np.log(16 / 9))
    across, down = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (across >= 1) & (across <= width) & (down >= 1) & (down <= height)
    first = fits.argmax(2)[..., None]
    across, down, left, top = (np.take_along_axis(a, first, 2)[..., 0] for a in (across, down, left, top))
    width, height, fits = width[..., 0], height[..., 0], fits.any(2)
    across = np.where(fits, across, np.minimum(width, np.rint(height * 4 / 3)))
    down = np.where(fits, down, np.minimum(height, np.rint(width * 4 / 3)))
    left = np.where(fits, np.floor(left * (width - across + 1)), (width - across) // 2)
    top = np.where(fits, np.floor(top * (height - down + 1)), (height - down) // 2)
    return np.stack([left, top, left + across, top + down], 2).astype(np.int64)


def crop_twice(opened: OpenedImage, boxes: np.ndarray, out: np.ndarray) -> None:
    """Decode once and write the two crops into `out`, uint8 (2, S, S, 3). Raises ImageRejected for damage.

    A JPEG is decoded at the smallest of its scales (1, 1/2, 1/4, 1/8) at which both crops still have S pixels a side.
    """
    size, (width, height) = out.shape[1], opened.size
    try:
        sides = boxes[:, 2:] - boxes[:, :2]
        scale = size / int(sides.min())
        if scale < 0.5 and opened.image.format in ("JPEG", "MPO"):
            least = (int(np.ceil(width * scale)), int(np.ceil(height * scale)))
            opened.image.draft(None, least[::-1] if opened.turned else least)
        opened.image.load()  # raises on damage, also where a look at EXIF data would hide it
        image = to_rgb(opened.image)
        across, down = image.width / width, image.height / height
        for view, (left, top, right, bottom) in enumerate(boxes.tolist()):
            box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
            out[view] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise ImageRejected("unreadable", describe_damage(error, b"?")) from error
