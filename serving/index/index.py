"""Nearest neighbours: an index folder, memory-mapped, searched on both sides (pictures and captions) with exact scores.

Axes: N queries, M vectors of a side, K hits, D width of the joint space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from models.config import InputError
from serving.index import files
from serving.index.files import Table, load_array
from serving.interfaces import Hit, Target

SIDES: tuple[Target, Target] = ("image", "text")
CANDIDATES = 128
"""An approximate index names so many, or four times the hits where that is more; they are then scored exactly."""


@dataclass(frozen=True)
class Side:
    """The vectors of one side and the way they are searched."""

    vectors: np.ndarray
    """float32 (M, D), unit length."""
    graph: Any = None
    """A faiss index of them; None: all are compared."""
    effort: int = 0
    """Candidates looked at (hnsw) or lists probed (ivfpq)."""

    def nearest(self, queries: np.ndarray, k: int, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Cosines float32 and places int64, both (N, min(K, M)), the nearest first, of unit queries (N, D)."""
        faiss.omp_set_num_threads(threads)  # a setting of the calling thread, so it is made in each
        k = min(k, len(self.vectors))
        if self.graph is None:
            return self._exact(queries, k)
        asked = min(max(CANDIDATES, 4 * k), len(self.vectors))
        _, found = self.graph.search(queries, asked, params=self._parameters(asked))
        scores, places = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for number, query in enumerate(queries):
            candidates = found[number][found[number] >= 0]
            if len(candidates) < k:  # too few lists were probed to fill the answer
                whole = self._exact(query[None], k)
                scores[number], places[number] = whole[0][0], whole[1][0]
                continue
            cosines = self.vectors[candidates] @ query
            best = np.argsort(-cosines, kind="stable")[:k]
            scores[number], places[number] = cosines[best], candidates[best]
        return scores, places

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray] = faiss.knn(queries, self.vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        return found

    def _parameters(self, asked: int) -> Any:
        swig: Any = faiss  # its stubs know neither
        if isinstance(self.graph, faiss.IndexIVF):
            return swig.SearchParametersIVF(nprobe=self.effort)
        return swig.SearchParametersHNSW(efSearch=max(self.effort, asked))


class Index:
    """A corpus to search. Any number of threads may search at once."""

    def __init__(self, folder: Path, about: dict[str, Any], threads: int = 1) -> None:
        """`about` is the content of `index.json`; see `open_index`."""
        self._threads = threads
        self.embedding_space: str = about["embedding_space"]
        self.name: str = about["name"]
        """Of the package that encoded the corpus."""
        self.dimensions: int = about["dimensions"]
        """D."""
        self.kind: str = about["kind"]
        """"flat", "hnsw" or "ivfpq", of the larger side."""
        self.recall: dict[str, float] = about["recall_at_10"]
        """By side: share of the ten nearest that a search finds."""
        self._sides = {side: _open_side(folder, side, about["sides"][side]) for side in SIDES}
        self._side_rows = {side: load_array(folder / files.rows_file(side)) for side in SIDES}
        self._rows = Table(folder / files.ROWS)
        self._thumbnails = Table(folder / files.THUMBNAILS)
        self._places = load_array(folder / files.PLACES)
        self._ids = load_array(folder / files.IDS)

    @property
    def images(self) -> int:
        """Different pictures."""
        return len(self._sides["image"].vectors)

    @property
    def texts(self) -> int:
        """Captions; equal ones of different pictures are different."""
        return len(self._sides["text"].vectors)

    def require(self, space: str) -> None:
        """Raises InputError, naming both, unless the index was made in this embedding space."""
        if space != self.embedding_space:
            raise InputError(
                f"the index is of embedding space {self.embedding_space} ({self.name}), the model of {space}: "
                "their vectors cannot be compared; embed the corpus with this model and build an index of that"
            )

    def search(self, queries: np.ndarray, target: Target, k: int) -> list[list[Hit]]:
        """The `k` nearest rows (all where there are fewer) to each of float32 (N, D), the nearest first.

        `score` is the cosine, computed exactly whatever the kind. Raises InputError for queries of another width.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise InputError(f"queries of shape {queries.shape}: the index holds vectors of {self.dimensions} numbers")
        scores, places = self._sides[target].nearest(unit(queries), k, self._threads)
        return [
            [self._hit(target, place, score) for place, score in zip(found, cosines, strict=True)]
            for found, cosines in zip(places.tolist(), scores.tolist(), strict=True)
        ]

    def vector_of(self, id: str, side: Target) -> np.ndarray | None:
        """The vector float32 (D,) of the first row with this id; None where there is no such row."""
        key = files.hash_id(id)
        hashes, rows = self._ids
        for entry in range(int(np.searchsorted(hashes, key)), len(hashes)):
            if hashes[entry] != key:
                return None
            row = int(rows[entry])
            if self._rows.cell(0, row) == id:
                return np.array(self._sides[side].vectors[self._places[row, SIDES.index(side)]])
        return None

    def _hit(self, target: Target, place: int, score: float) -> Hit:
        row = int(self._side_rows[target][place])
        id, caption, uri = (self._rows.cell(column, row) for column in range(3))
        thumbnail = self._thumbnails.cell(0, int(self._places[row, 0]))
        return Hit(id, score, caption, uri, thumbnail or b"")


def open_index(folder: Path, verify: bool = False, threads: int = 1) -> Index:
    """Open an index folder on this machine; nothing is read before it is needed.

    Sizes of all files are checked, with `verify` their hashes too (reads everything). `threads` are faiss' own, in each
    search. Raises InputError where there is no index, or a damaged one.
    """
    return Index(folder, files.read_about(folder, verify), threads)


def unit(vectors: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """float32 (N, D) of length 1; a vector of zeros stays."""
    found = np.ascontiguousarray(vectors, np.float32)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.where(lengths > 0, lengths, 1)


def _open_side(folder: Path, side: str, about: dict[str, Any]) -> Side:
    vectors = load_array(folder / files.vectors_file(side))
    if about["kind"] == "flat":
        return Side(vectors)
    try:
        graph = faiss.read_index(str(folder / files.graph_file(side)), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        name = files.graph_file(side)
        raise InputError(f"{folder}: the index is damaged, {name} cannot be read; build it again") from error
    return Side(vectors, graph, about["effort"])
