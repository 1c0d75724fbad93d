"""What the door (HTTP) needs of everything behind it: narrow interfaces, so that it is tested without Ray.

Axes: N inputs of a request, S image side, D width of the joint space.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Target = Literal["image", "text"]


class Overloaded(Exception):
    """There is no room now: HTTP 429."""

    def __init__(self, retry_after: float = 1.0) -> None:
        super().__init__("the service is full")
        self.retry_after = retry_after
        """Seconds after which a new try may have room."""


class Broken(Exception):
    """A part failed twice in a row: HTTP 503. Its text is for the log, never for a reply."""


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
    """One version of the served model."""

    name: str
    """What requests call the service: the registered name, or the package's."""
    version: str
    """Number in the registry; "" of a package that is not registered."""
    embedding_space: str
    dimensions: int
    """D."""
    image_size: int
    """S."""
    max_words: int
    """Words read of a text."""
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
    """One row of an index."""

    id: str
    score: float
    """Cosine."""
    caption: str
    uri: str
    thumbnail: bytes
    """A small JPEG; empty where the index has none."""


Picture = np.ndarray | str
"""uint8 (S, S, 3), or the `uri` of an index row, which is then read and decoded behind the door."""


class ModelSet(Protocol):
    """Everything of one version: encoders, fusion encoder, index. All of a request goes through one of these."""

    @property
    def description(self) -> Description:
        """What it is."""
        ...

    def admit(self, texts: int, images: int) -> AbstractContextManager[None]:
        """Holds places for so many inputs, before pictures are decoded. Raises Overloaded where there are none."""
        ...

    async def embed_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """Unit vectors float32 (N, D) of clean captions, and the number of tokens read."""
        ...

    async def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """Unit vectors float32 (N, D) of pictures uint8 (N, S, S, 3)."""
        ...

    async def search(self, query: np.ndarray, target: Target, top_k: int) -> list[Hit]:
        """The nearest rows of the index to float32 (D,), the nearest first."""
        ...

    async def vector_of(self, id: str, side: Target) -> np.ndarray | None:
        """The index's own vector float32 (D,) of a row; None where it has no such row."""
        ...

    async def match(self, pairs: Sequence[tuple[str, Picture]]) -> list[float | None]:
        """Probability that text and picture belong together (fusion encoder); None where the picture is unreadable."""
        ...


class Desk(Protocol):
    """Hands out the versions that are loaded."""

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        ...

    @property
    def alarm(self) -> str:
        """Why a newer version is not served, in a line; "" where all is well."""
        ...

    def versions(self) -> list[tuple[Description, bool]]:
        """(version, whether it is the current one) of all that are loaded."""
        ...

    def use(self, version: str | None = None) -> AbstractContextManager[ModelSet]:
        """The current version, or a loaded one by its label, held until the request is answered.

        Raises KeyError where that version is not loaded, Overloaded where none is.
        """
        ...
