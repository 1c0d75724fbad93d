"""A version as a gateway sees it: handles to its replicas, a batcher for each encoder, its tokeniser.

Axes: N inputs, S image side, D width of the joint space.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from models.tokenizer import CaptionTokenizer
from serving.config import ServingConfig
from serving.gateway.batcher import Batcher, Observe
from serving.interfaces import Broken, Description, Hit, IndexDescription, Overloaded, Picture, Target
from serving.replicas.encoders import Timed

TEXT, IMAGE, MATCHER, SEARCH = "text", "image", "matcher", "search"
"""Names of a version's deployments."""
ResultT = TypeVar("ResultT")
ObserveKind = Callable[[str, int, float, float], None]
"""(kind, rows, seconds of the forward pass, seconds waited) of each batch."""


async def twice(call: Callable[[], Awaitable[ResultT]]) -> ResultT:
    """The result of an idempotent call to a replica, tried once more where the replica died under it.

    Raises Overloaded where its queue is full, Broken where it fails again.
    """
    for last in (False, True):
        try:
            return await call()
        except BackPressureError as error:
            raise Overloaded() from error
        except (RayActorError, DeploymentUnavailableError) as error:
            if last:
                raise Broken(f"a replica died twice under the same call: {type(error).__name__}") from error
    raise AssertionError


class HandleSet:
    """One version's application, opened: the `ModelSet` of the door."""

    def __init__(
        self, application: str, about: dict[str, Any], index: dict[str, Any] | None, version: str, name: str
    ) -> None:
        """Made by `open_set`."""
        self.application = application
        self._text, self._image, self._search = (_handle(part, application) for part in (TEXT, IMAGE, SEARCH))
        self._matcher = _handle(MATCHER, application) if about["matching"] else None
        self._tokenizer = CaptionTokenizer.from_json(about["tokenizer"])
        self._max_tokens = int(about["max_tokens"])
        self._description = Description(
            name=name or about["name"],
            version=version,
            embedding_space=about["space"],
            dimensions=about["dimensions"],
            image_size=about["image_size"],
            max_words=about["max_words"],
            matching=about["matching"],
            index=IndexDescription(**index) if index else None,
            created=int(time.time()),
        )
        self._batchers: tuple[Batcher, Batcher] | None = None

    def start(self, config: ServingConfig, observe: ObserveKind | None) -> None:
        """Make the batchers; in the event loop that will use them."""

        def told(kind: str) -> Observe | None:
            return None if observe is None else lambda rows, seconds, waited: observe(kind, rows, seconds, waited)

        deadline = config.door.deadline
        self._batchers = (
            Batcher(self._encode_texts, config.text_batch, deadline, told(TEXT)),
            Batcher(self._encode_images, config.image_batch, deadline, told(IMAGE)),
        )

    @property
    def description(self) -> Description:
        """What it is."""
        return self._description

    @property
    def queues(self) -> dict[str, int]:
        """Inputs admitted and not answered yet, by kind."""
        assert self._batchers
        return {kind: batcher.held for kind, batcher in zip((TEXT, IMAGE), self._batchers, strict=True)}

    @contextmanager
    def admit(self, texts: int, images: int) -> Iterator[None]:
        """Holds places for so many inputs; raises Overloaded where there are none."""
        assert self._batchers
        with self._batchers[0].admit(texts), self._batchers[1].admit(images):
            yield

    async def embed_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Unit vectors float32 (N, D) of clean captions, and the number of tokens read."""
        assert self._batchers
        rows = self._tokenizer.encode_rows(list(texts), self._max_tokens)
        return await self._batchers[0](rows), sum(map(len, rows))

    async def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Unit vectors float32 (N, D) of pictures uint8 (N, S, S, 3)."""
        assert self._batchers
        return await self._batchers[1](list(pixels))

    async def _encode_texts(self, rows: list[np.ndarray]) -> np.ndarray:
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        ids = np.concatenate(rows, dtype=np.int32)
        timed: Timed = await twice(lambda: self._text.encode.remote(ids, lengths))
        return timed[0]

    async def _encode_images(self, rows: list[np.ndarray]) -> np.ndarray:
        pixels = np.stack(rows)
        timed: Timed = await twice(lambda: self._image.encode.remote(pixels))
        return timed[0]

    async def search(self, query: np.ndarray, target: Target, top_k: int) -> list[Hit]:
        """The nearest rows of the index to float32 (D,), the nearest first."""
        return await twice(lambda: self._search.search.remote(query, target, top_k))

    async def vector_of(self, id: str, side: Target) -> np.ndarray | None:
        """The index's own vector float32 (D,) of a row; None where it has no such row."""
        return await twice(lambda: self._search.vector_of.remote(id, side))

    async def match(self, pairs: Sequence[tuple[str, Picture]]) -> list[float | None]:
        """Probability that text and picture belong together; None where the picture is unreadable."""
        assert self._matcher is not None
        texts: dict[str, int] = {}
        pictures: dict[str | int, tuple[int, Picture]] = {}
        places = []
        for text, picture in pairs:
            key = picture if isinstance(picture, str) else id(picture)  # one that comes again is sent once
            pictures.setdefault(key, (len(pictures), picture))
            places.append((texts.setdefault(text, len(texts)), pictures[key][0]))
        matcher, shown = self._matcher, [picture for _, picture in pictures.values()]
        return await twice(lambda: matcher.match.remote(list(texts), shown, places))

    async def check(self, tolerance: float) -> float:
        """The largest difference between what its replicas answer and the vectors stored in its package.

        Raises ValueError where it exceeds `tolerance`.
        """
        health = await self._image.health.remote()
        with self.admit(len(health["captions"]), len(health["pixels"])):
            texts, _ = await self.embed_texts(health["captions"])
            images = await self.embed_images(health["pixels"])
        pairs = (texts, health["text_vectors"]), (images, health["image_vectors"])
        worst = max(float(np.abs(ours - stored).max()) for ours, stored in pairs)
        if not worst <= tolerance:
            raise ValueError(f"its vectors differ by {worst:.1e} from those stored in its package")
        return worst


def _handle(part: str, application: str) -> DeploymentHandle:
    return serve.get_deployment_handle(part, application)


async def open_set(application: str, version: str, name: str) -> HandleSet:
    """The running application as a set; also makes its handles ready. Raises what the calls raise."""
    image, text = _handle(IMAGE, application), _handle(TEXT, application)
    about, _, index = await asyncio.gather(
        image.about.remote(), text.about.remote(), _handle(SEARCH, application).about.remote()
    )
    return HandleSet(application, about, index, version, name)
