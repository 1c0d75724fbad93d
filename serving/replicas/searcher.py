"""The search replica: one version's index, memory-mapped. It is also what the version's application starts from."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from models.redact import redact
from serving import model_source
from serving.config import ReplicaConfig
from serving.interfaces import Hit, Modality

if TYPE_CHECKING:
    from serving.index.index import Index

ResultT = TypeVar("ResultT")


class Searcher:
    """Nearest neighbours of one version's vectors; without an index it only binds the application together."""

    def __init__(self, uri: str, space: str, settings: dict[str, Any], encoders: dict[str, Any]) -> None:
        """`encoders` are handles of the application's other deployments, which Serve deploys as they are bound here.

        Raises InputError where the index is damaged or of another embedding space.
        """
        del encoders
        self._uri, self._keep = uri, ExitStack()
        self._index: Index | None = None
        if uri:
            from serving.index.index import open_index  # without an index, faiss is not loaded

            self._index = open_index(self._keep.enter_context(model_source.local_folder(uri)))
            self._index.require(space)
        self._pool = ThreadPoolExecutor(ReplicaConfig.model_validate(settings).passes, thread_name_prefix="search")

    def about(self) -> dict[str, Any] | None:
        """Fields of an `IndexDescription`; None without an index."""
        if self._index is None:
            return None
        index = self._index
        return {"uri": redact(self._uri), "images": index.images, "texts": index.texts, "kind": index.kind}

    async def search(self, query: np.ndarray, modality: Modality, top_k: int) -> list[Hit]:
        """The rows whose vectors of `modality` are nearest to float32 (D,), the nearest first."""
        index = self._opened()
        return (await self._run(lambda: index.search(query[None], modality, top_k)))[0]

    async def vector_of(self, row_id: str, modality: Modality) -> np.ndarray | None:
        """The vector float32 (D,) of a row; None where no row has that id."""
        index = self._opened()
        return await self._run(lambda: index.vector_of(row_id, modality))

    def _opened(self) -> "Index":
        assert self._index is not None
        return self._index

    async def _run(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
