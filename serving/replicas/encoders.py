"""Encoder replicas: each loads one version's package and encodes whole batches, off its event loop.

All they do is call `models/inference.py`; requests are gathered in the gateway, before the handle. Axes as there.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from models.config import InputError
from models.images import ImageRejected, decode_whole, open_image
from serving import model_source
from serving.config import ReplicaConfig
from serving.interfaces import Picture

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")
Timed = tuple[np.ndarray, float]
"""Vectors, and the seconds that computing them took."""


class Replica:
    """A package in a process of its own, and threads for its forward passes."""

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
            raise InputError(f"{model}: embedding space {self.package.embedding_space} there, {space} was asked for")
        self.bf16 = bf16
        self._pool = ThreadPoolExecutor(config.passes, thread_name_prefix="forward")

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """The result of `work`, done in a thread: health checks and new batches are not kept waiting."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def about(self) -> dict[str, Any]:
        """What a gateway needs to know of the version."""
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
    """The text tower of one version."""

    async def encode(self, ids: np.ndarray, lengths: np.ndarray) -> Timed:
        """Vectors float32 (N, D) of captions: `ids` int32, all one after the other, `lengths` int32 (N,) of each."""
        return await self.run(lambda: self._encode(np.split(ids, np.cumsum(lengths)[:-1])))

    def _encode(self, rows: Sequence[np.ndarray]) -> Timed:
        from models.inference import embed_texts

        started = time.perf_counter()
        return embed_texts(self.package, rows, self.bf16), time.perf_counter() - started


class ImageEncoder(Replica):
    """The image tower of one version."""

    async def encode(self, pixels: np.ndarray) -> Timed:
        """Vectors float32 (N, D) of pictures uint8 (N, S, S, 3)."""
        return await self.run(lambda: self._encode(pixels))

    def _encode(self, pixels: np.ndarray) -> Timed:
        from models.inference import embed_images

        started = time.perf_counter()
        return embed_images(self.package, pixels, self.bf16), time.perf_counter() - started


class Matcher(Replica):
    """The fusion encoder of one version, with both towers: it needs their token states, too large to be sent."""

    def __init__(self, model: str, space: str, settings: dict[str, Any], bf16: bool, max_pixels: int) -> None:
        """As `Replica`; pictures read by their URI have at most `max_pixels` pixels."""
        super().__init__(model, space, settings, bf16)
        self._max_pixels = max_pixels
        self._readers = ThreadPoolExecutor(8, thread_name_prefix="read")

    async def match(
        self, texts: list[str], pictures: list[Picture], pairs: list[tuple[int, int]]
    ) -> list[float | None]:
        """Probability of each (place in `texts`, place in `pictures`); None where the picture cannot be read."""
        loop = asyncio.get_running_loop()
        read = await asyncio.gather(*(loop.run_in_executor(self._readers, self._pixels, one) for one in pictures))
        return await self.run(lambda: self._match(texts, list(read), pairs))

    def _match(
        self, texts: list[str], read: list[np.ndarray | None], pairs: list[tuple[int, int]]
    ) -> list[float | None]:
        from models.inference import match

        good = [place for place, pixels in enumerate(read) if pixels is not None]
        where = {place: number for number, place in enumerate(good)}
        asked = [(text, where[picture]) for text, picture in pairs if picture in where]
        if not asked:
            return [None] * len(pairs)
        tokens = self.package.tokenizer
        ids, mask = tokens.encode(texts, self.package.preprocessor.max_tokens)
        rows = [row[: int(seen.sum())] for row, seen in zip(ids, mask, strict=True)]
        pixels = np.stack([one for one in read if one is not None])
        found = iter(match(self.package, rows, pixels, asked, self.bf16).tolist())
        return [next(found) if picture in where else None for _, picture in pairs]

    def _pixels(self, picture: Picture) -> np.ndarray | None:
        if isinstance(picture, np.ndarray):
            return picture
        size = self.package.preprocessor.image_size
        pixels = np.empty((size, size, 3), np.uint8)
        try:
            decode_whole(open_image(model_source.read_image(picture), self._max_pixels, 1), pixels)
        except (InputError, ImageRejected) as error:
            logger.warning("no picture to re-rank with: %s", error)
            return None
        return pixels
