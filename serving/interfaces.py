"""Interfaces between the HTTP layer and the model replicas, and the values that cross them.

The HTTP layer sees protocols only, so that it is tested without Ray and without a model. Axes: N inputs of a request,
S image side, D width of the joint space.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Modality = Literal["image", "text"]


class Overloaded(Exception):
    """No capacity is left now: HTTP 429."""

    def __init__(self, retry_after: float = 1.0) -> None:
        super().__init__("the service is full")
        self.retry_after = retry_after
        """Seconds after which a new try may succeed."""


class NotReady(Exception):
    """No version is loaded yet: HTTP 503."""


class VersionNotLoaded(Exception):
    """A request names a version that is not loaded: HTTP 404."""


class ReplicaUnavailable(Exception):
    """A call to a replica failed twice: HTTP 503. Its text is for the log, never for a reply."""


@dataclass(frozen=True)
class IndexDescription:
    """The corpus that searches go over."""

    uri: str
    images: int
    texts: int
    kind: str
    """"flat", "hnsw" or "ivfpq"."""


@dataclass(frozen=True)
class Description:
    """What clients may know of one loaded version of the served model."""

    name: str
    """What requests call the model: its registered name, or the package's."""
    version: str
    """Number in the registry; "" of a package that is not registered."""
    embedding_space: str
    dimensions: int
    """D."""
    image_size: int
    """S, pixels."""
    max_words: int
    """Words read of a text; the rest is cut off."""
    matching: bool
    """Whether the package has a fusion encoder to re-rank with."""
    index: IndexDescription | None
    created: int
    """Unix time at which the service loaded it."""

    @property
    def label(self) -> str:
        """NAME/VERSION, or NAME: the reply header `x-triptych-model`."""
        return f"{self.name}/{self.version}" if self.version else self.name


@dataclass(frozen=True)
class Hit:
    """One row of an index that a search found."""

    id: str
    score: float
    """Cosine; the match probability once it is re-ranked."""
    caption: str
    uri: str
    thumbnail: bytes
    """A small JPEG; empty where the index has none."""


ImageOrUri = np.ndarray | str
"""Pixels uint8 (S, S, 3), or the `uri` of an index row, which the replica reads and decodes itself."""


class ModelVersion(Protocol):
    """One version of the model: encoders, fusion encoder, index. All of a request goes through one of these."""

    @property
    def description(self) -> Description:
        """Name, number, sizes and abilities of this version."""
        ...

    def admit(self, texts: int, images: int) -> AbstractContextManager[None]:
        """Reserve queue capacity for so many inputs, before images are decoded. Raises Overloaded."""
        ...

    async def embed_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Unit vectors float32 (N, D) of clean captions, and the number of tokens read."""
        ...

    async def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Unit vectors float32 (N, D) of images uint8 (N, S, S, 3)."""
        ...

    async def search(self, query: np.ndarray, modality: Modality, top_k: int) -> list[Hit]:
        """The rows of the index whose vectors of `modality` are nearest to float32 (D,), the nearest first."""
        ...

    async def vector_of(self, row_id: str, modality: Modality) -> np.ndarray | None:
        """The index's own vector float32 (D,) of a row; None where it has no such row."""
        ...

    async def match(self, pairs: Sequence[tuple[str, ImageOrUri]]) -> list[float | None]:
        """Probability that text and image belong together (fusion encoder); None where the image is unreadable."""
        ...


class VersionPool(Protocol):
    """The versions that are loaded, one of them current."""

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        ...

    @property
    def alarm(self) -> str:
        """Why a newer version is not served, in one line; "" where all is well."""
        ...

    def versions(self) -> list[tuple[Description, bool]]:
        """(version, whether it is the current one) of all that are loaded."""
        ...

    def use(self, label: str | None = None) -> AbstractContextManager[ModelVersion]:
        """The current version, or a loaded one by its label; it stays loaded until the context ends.

        Raises NotReady where none is current, VersionNotLoaded where `label` is not loaded.
        """
        ...
