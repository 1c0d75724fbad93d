"""Images of a request: from data URLs, uploads and allowed hosts to pixels, in threads.

Axes: N images of a request, S image side.
"""

import asyncio
import binascii
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
from PIL import Image

from models.images import ImageRejected, decode_whole, open_image
from serving.config import HttpConfig
from serving.http.responses import ApiError

_GROUP = 8
"""Images that a thread decodes in one call: handing over to a thread costs about as much as a small image."""


def quiet_decoders() -> None:
    """Once a process: silence Pillow's warnings. Pixels have our own limit, and damage that it repairs is normal."""
    Image.init()
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Decoder:
    """Decodes images in an executor's threads."""

    def __init__(self, config: HttpConfig, executor: Executor) -> None:
        self._config, self._executor = config, executor

    async def __call__(self, images: Sequence[tuple[str, bytes | str]], size: int) -> np.ndarray:
        """uint8 (N, S, S, 3) of (param, encoded bytes or data URL) pairs. Raises ApiError of the first that is bad."""
        out = np.empty((len(images), size, size, 3), np.uint8)
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(self._executor, self._group, images[at : at + _GROUP], out[at : at + _GROUP])
            for at in range(0, len(images), _GROUP)
        ]
        try:  # one after the other, so that the error is that of the first bad image in the request
            for job in jobs:
                await job
        finally:
            for job in jobs:
                job.cancel()
        return out

    def _group(self, images: Sequence[tuple[str, bytes | str]], out: np.ndarray) -> None:
        for row, (param, image) in enumerate(images):
            self._one(param, image, out[row])

    def _one(self, param: str, image: bytes | str, out: np.ndarray) -> None:
        data = from_data_url(param, image) if isinstance(image, str) else image
        limit = int(self._config.max_image_mib * 2**20)
        if len(data) > limit:
            raise ApiError(413, "image_too_large", f"{param}: the image has more than {limit} bytes", param)
        try:
            decode_whole(open_image(data, self._config.max_pixels, min_side=1), out)
        except ImageRejected as error:
            reason, detail = error.args
            raise ApiError(400, f"image_{reason}", f"{param}: {_plain(detail)}", param) from None


def from_data_url(param: str, url: str) -> bytes:
    """The bytes of `data:image/...;base64,...`; its media type is ignored. Raises ApiError 400."""
    head, comma, text = url.partition(",")
    if not comma or not head[:5].lower() == "data:" or not head.lower().endswith(";base64"):
        raise ApiError(400, "bad_data_url", f"{param}: an image is sent as data:image/jpeg;base64,...", param)
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except ValueError:
        raise ApiError(400, "bad_base64", f"{param}: the data URL is not base64", param) from None


def _plain(detail: str) -> str:
    """A decoder's message, short and printable: it may quote bytes of the file."""
    return "".join(letter if letter.isprintable() else "?" for letter in detail[:160])
