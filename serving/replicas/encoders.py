"""Encoder replicas: each loads the package of one version and encodes whole batches, off its event loop.

The mathematics is in `models/inference.py`; batches are made in the gateway. Axes: N inputs, S image side, D width of
the joint space.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from models.config import InputError
from models.images import ImageRejected, decode_whole, open_image
from serving import model_source
from serving.config import ReplicaConfig
from serving.interfaces import ImageOrUri

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


class Replica:
    """What all encoder replicas have: a package, and threads for its forward passes."""

    def __init__(self, model: str, space: str, settings: dict[str, Any], bf16: bool) -> None:
        """Raises InputError where MODEL is not there, or is not the one of embedding space `space` any more."""
        import torch

        from models.package import load_package

        config = ReplicaConfig.model_validate(settings)
        torch.set_num_threads(config.threads)
        device = "cuda" if config.num_gpus and torch.cuda.is_available() else "cpu"
        with model_source.local_package(model) as folder:
            self.package = load_package(folder, model, device)
            self._health = _stored_health(folder)
        if space and self.package.embedding_space != space:
            raise InputError(f"{model}: the package is of embedding space {self.package.embedding_space}, not {space}")
        self.bf16 = bf16
        self._pool = ThreadPoolExecutor(config.passes, thread_name_prefix="forward")

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """The result of `work`, done in a thread, so that health checks and new batches do not wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def about(self) -> dict[str, Any]:
        """Names, sizes and the tokeniser of the version, for `VersionClient`."""
        preprocessor, fusion = self.package.preprocessor, self.package.model.fusion
        return {
            "name": self.package.name,
            "space": self.package.embedding_space,
            "dimensions": self.package.config.embed_dim,
            "image_size": preprocessor.image_size,
            "max_words": preprocessor.max_caption_words,
            "max_tokens": preprocessor.max_tokens,
            "matching": fusion is not None and fusion.matching is not None,
            "tokenizer": self.package.tokenizer.to_json(),
        }

    def health(self) -> dict[str, Any]:
        """Inputs and vectors stored in the package when it was made: captions, text_vectors, pixels, image_vectors."""
        return self._health


def _stored_health(folder: Path) -> dict[str, Any]:
    from models.package import HEALTH_CAPTIONS, load_tensors

    return {"captions": HEALTH_CAPTIONS} | {
        name: tensor.numpy() for name, tensor in load_tensors(folder / "health.safetensors").items()
    }


class TextEncoder(Replica):
    """The text encoder of one version."""

    async def encode(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Vectors float32 (N, D) of captions: token `ids` int32 of all, one after the other, `lengths` int32 (N,)."""
        return await self.run(lambda: self._encode(np.split(ids, np.cumsum(lengths)[:-1])))

    def _encode(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        from models.inference import embed_texts

        return embed_texts(self.package, rows, self.bf16)


class ImageEncoder(Replica):
    """The image encoder of one version."""

    async def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors float32 (N, D) of images uint8 (N, S, S, 3)."""
        return await self.run(lambda: self._encode(pixels))

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        from models.inference import embed_images

        return embed_images(self.package, pixels, self.bf16)


class Matcher(Replica):
    """The fusion encoder of one version, with both towers: it needs their token states, too large to be sent."""

    def __init__(self, model: str, space: str, settings: dict[str, Any], bf16: bool, max_pixels: int) -> None:
        """As `Replica`; images read by their URI have at most `max_pixels` pixels."""
        super().__init__(model, space, settings, bf16)
        self._max_pixels = max_pixels
        self._readers = ThreadPoolExecutor(8, thread_name_prefix="read")

    async def match(
        self, texts: list[str], images: list[ImageOrUri], pairs: list[tuple[int, int]]
    ) -> list[float | None]:
        """Probability of each pair (index in `texts`, index in `images`); None where the image cannot be read."""
        loop = asyncio.get_running_loop()
        read = await asyncio.gather(*(loop.run_in_executor(self._readers, self._pixels, image) for image in images))
        return await self.run(lambda: self._match(texts, list(read), pairs))

    def _match(
        self, texts: list[str], images: list[np.ndarray | None], pairs: list[tuple[int, int]]
    ) -> list[float | None]:
        from models.inference import match

        readable = [index for index, pixels in enumerate(images) if pixels is not None]
        row_of = {index: row for row, index in enumerate(readable)}
        scored = [(text, row_of[image]) for text, image in pairs if image in row_of]
        if not scored:
            return [None] * len(pairs)
        tokens = self.package.tokenizer
        ids, mask = tokens.encode(texts, self.package.preprocessor.max_tokens)
        rows = [row[: int(real.sum())] for row, real in zip(ids, mask, strict=True)]
        pixels = np.stack([image for image in images if image is not None])
        found = iter(match(self.package, rows, pixels, scored, self.bf16).tolist())
        return [next(found) if image in row_of else None for _, image in pairs]

    def _pixels(self, image: ImageOrUri) -> np.ndarray | None:
        if isinstance(image, np.ndarray):
            return image
        size = self.package.preprocessor.image_size
        pixels = np.empty((size, size, 3), np.uint8)
        try:
            decode_whole(open_image(model_source.read_image(image), self._max_pixels, 1), pixels)
        except (InputError, ImageRejected) as error:
            logger.warning("no image to re-rank with: %s", error)
            return None
        return pixels
