"""A version as a gateway sees it: handles to its replicas, a batcher for each encoder, its tokeniser.

Axes: N inputs, S image side, D width of the joint space.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from models.tokenizer import CaptionTokenizer
from serving.config import ServingConfig
from serving.gateway.batcher import Batcher
from serving.interfaces import Description, Hit, ImageOrUri, IndexDescription, Modality, Overloaded, ReplicaUnavailable
from serving.model_source import VersionSpec

TEXT, IMAGE, MATCHER, SEARCH = "text", "image", "matcher", "search"
"""Names of a version's deployments."""
ResultT = TypeVar("ResultT")
ObserveBatch = Callable[[Modality, int, float, float], None]
"""(modality, rows, seconds of the forward pass, seconds that its first row had waited) of each batch."""


async def retry_once(call: Callable[[], Awaitable[ResultT]]) -> ResultT:
    """The result of an idempotent call to a replica, tried once more where the replica died under it.

    Raises Overloaded where its queue is full, ReplicaUnavailable where it fails again.
    """
    for last in (False, True):
        try:
            return await call()
        except BackPressureError as error:
            raise Overloaded() from error
        except (RayActorError, DeploymentUnavailableError) as error:
            if last:
                raise ReplicaUnavailable(f"a replica died twice under the same call: {type(error).__name__}") from error
    raise AssertionError


class VersionClient:
    """The `ModelVersion` of a running Serve application."""

    def __init__(self, spec: VersionSpec, about: dict[str, Any], index: dict[str, Any] | None) -> None:
        """`about` and `index` are what the image encoder and the search replica answer; see `open_version`."""
        self.spec = spec
        self._text, self._image, self._search = (_handle(name, spec) for name in (TEXT, IMAGE, SEARCH))
        self._matcher = _handle(MATCHER, spec) if about["matching"] else None
        self._tokenizer = CaptionTokenizer.from_json(about["tokenizer"])
        self._max_tokens = int(about["max_tokens"])
        self._description = Description(
            name=spec.name or about["name"],
            version=spec.version,
            embedding_space=about["space"],
            dimensions=about["dimensions"],
            image_size=about["image_size"],
            max_words=about["max_words"],
            matching=about["matching"],
            index=IndexDescription(**index) if index else None,
            created=int(time.time()),
        )
        self._batchers: dict[Modality, Batcher] = {}

    def start(self, config: ServingConfig, observe: ObserveBatch | None) -> None:
        """Make the batchers; in the event loop that will use them."""
        deadline = config.door.deadline
        self._batchers = {
            "text": Batcher(self._encode_texts, config.text_batch, deadline, observe and partial(observe, "text")),
            "image": Batcher(self._encode_images, config.image_batch, deadline, observe and partial(observe, "image")),
        }

    @property
    def description(self) -> Description:
        """Name, number, sizes and abilities of this version."""
        return self._description

    @property
    def queues(self) -> dict[Modality, int]:
        """Inputs admitted and not answered yet, by modality."""
        return {modality: batcher.admitted for modality, batcher in self._batchers.items()}

    @contextmanager
    def admit(self, texts: int, images: int) -> Iterator[None]:
        """Reserve queue capacity for so many inputs. Raises Overloaded."""
        with self._batchers["text"].admit(texts), self._batchers["image"].admit(images):
            yield

    async def embed_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Unit vectors float32 (N, D) of clean captions, and the number of tokens read."""
        rows = self._tokenizer.encode_rows(list(texts), self._max_tokens)
        return await self._batchers["text"](rows), sum(map(len, rows))

    async def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Unit vectors float32 (N, D) of images uint8 (N, S, S, 3)."""
        return await self._batchers["image"](list(pixels))

    async def _encode_texts(self, rows: list[np.ndarray]) -> np.ndarray:
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        ids = np.concatenate(rows, dtype=np.int32)
        return await retry_once(lambda: self._text.encode.remote(ids, lengths))

    async def _encode_images(self, rows: list[np.ndarray]) -> np.ndarray:
        pixels = np.stack(rows)
        return await retry_once(lambda: self._image.encode.remote(pixels))

    async def search(self, query: np.ndarray, modality: Modality, top_k: int) -> list[Hit]:
        """The rows of the index whose vectors of `modality` are nearest to float32 (D,), the nearest first."""
        return await retry_once(lambda: self._search.search.remote(query, modality, top_k))

    async def vector_of(self, row_id: str, modality: Modality) -> np.ndarray | None:
        """The index's own vector float32 (D,) of a row; None where it has no such row."""
        return await retry_once(lambda: self._search.vector_of.remote(row_id, modality))

    async def match(self, pairs: Sequence[tuple[str, ImageOrUri]]) -> list[float | None]:
        """Probability that text and image belong together; None where the image is unreadable."""
        assert self._matcher is not None
        # A query is paired with every hit: equal texts and images are sent once, and pairs are positions in both.
        text_positions: dict[str, int] = {}
        image_positions: dict[str | int, int] = {}
        sent: list[ImageOrUri] = []
        positions = []
        for text, image in pairs:
            key = image if isinstance(image, str) else id(image)  # an array has no hash
            if key not in image_positions:
                image_positions[key] = len(sent)
                sent.append(image)
            positions.append((text_positions.setdefault(text, len(text_positions)), image_positions[key]))
        matcher = self._matcher
        return await retry_once(lambda: matcher.match.remote(list(text_positions), sent, positions))

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


def _handle(deployment: str, spec: VersionSpec) -> DeploymentHandle:
    return serve.get_deployment_handle(deployment, spec.application)


async def open_version(spec: VersionSpec) -> VersionClient:
    """A client of the version's running application, its handles connected. Raises what the calls raise."""
    # The text encoder's answer is not needed, but the first call of a handle connects it, which takes a while.
    about, _, index = await asyncio.gather(
        _handle(IMAGE, spec).about.remote(), _handle(TEXT, spec).about.remote(), _handle(SEARCH, spec).about.remote()
    )
    return VersionClient(spec, about, index)
