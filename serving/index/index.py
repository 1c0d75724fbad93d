"""Nearest neighbours: an index folder, memory-mapped, searched by images and by captions with exact scores.

Axes: N queries, M vectors of a modality, K hits, D width of the joint space.
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
from serving.interfaces import Hit, Modality

MODALITIES: tuple[Modality, Modality] = ("image", "text")
CANDIDATES = 128
"""An approximate index names so many, or four times the hits where that is more; they are then scored exactly."""


@dataclass(frozen=True)
class VectorIndex:
    """The vectors of one modality and the way they are searched."""

    vectors: np.ndarray
    """float32 (M, D), unit length."""
    ann_index: Any = None
    """An approximate faiss index of them (HNSW or IVF-PQ); None: all are compared."""
    search_parameter: int = 0
    """efSearch of an HNSW index, nprobe of an IVF-PQ index; `index.json` calls it `effort`."""

    def nearest(self, queries: np.ndarray, k: int, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Cosines float32 and positions int64, both (N, min(K, M)), the nearest first, of unit queries (N, D)."""
        faiss.omp_set_num_threads(threads)  # a setting of the calling thread, so it is made in each
        k = min(k, len(self.vectors))
        if self.ann_index is None:
            return self._exact(queries, k)
        count = min(max(CANDIDATES, 4 * k), len(self.vectors))
        _, found = self.ann_index.search(queries, count, params=self._faiss_parameters(count))
        # Scored here, not by faiss' IndexRefineFlat, which copies all vectors into memory: ours stay on the disk.
        cosines = np.matmul(self.vectors[found], queries[:, :, None])[:, :, 0]
        cosines[found < 0] = -np.inf
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        scores, positions = (np.take_along_axis(values, best, axis=1) for values in (cosines, found))
        short = positions[:, -1] < 0  # too few lists were probed to find k vectors
        if short.any():
            scores[short], positions[short] = self._exact(queries[short], k)
        return scores, positions

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray] = faiss.knn(queries, self.vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        return found

    def _faiss_parameters(self, count: int) -> Any:
        swig: Any = faiss  # its stubs know neither class
        if isinstance(self.ann_index, faiss.IndexIVF):
            return swig.SearchParametersIVF(nprobe=self.search_parameter)
        return swig.SearchParametersHNSW(efSearch=max(self.search_parameter, count))


class Index:
    """A corpus to search. Any number of threads may search at once."""

    def __init__(self, folder: Path, about: dict[str, Any], threads: int = 1) -> None:
        """`about` is the content of `index.json`; see `open_index`."""
        self._threads = threads
        self.embedding_space: str = about["embedding_space"]
        self.name: str = about["name"]
        """Name of the package that encoded the corpus."""
        self.dimensions: int = about["dimensions"]
        """D."""
        self.kind: str = about["kind"]
        """"flat", "hnsw" or "ivfpq", of the modality with more vectors."""
        self.recall: dict[str, float] = about["recall_at_10"]
        """By modality: share of the ten nearest that a search finds."""
        self._vectors = {one: _open_vectors(folder, one, about["sides"][one]) for one in MODALITIES}
        self._first_rows = {one: load_array(folder / files.rows_file(one)) for one in MODALITIES}
        self._rows = Table(folder / files.ROWS)
        self._thumbnails = Table(folder / files.THUMBNAILS)
        self._positions = load_array(folder / files.POSITIONS)
        self._ids = load_array(folder / files.IDS)

    @property
    def images(self) -> int:
        """Number of different images."""
        return len(self._vectors["image"].vectors)

    @property
    def texts(self) -> int:
        """Number of captions; equal captions of different images count each."""
        return len(self._vectors["text"].vectors)

    def require(self, space: str) -> None:
        """Raises InputError, naming both, unless the index was made in this embedding space."""
        if space != self.embedding_space:
            raise InputError(
                f"the index is of embedding space {self.embedding_space} ({self.name}), the model of {space}: "
                "their vectors cannot be compared; embed the corpus with this model and build an index of that"
            )

    def search(self, queries: np.ndarray, modality: Modality, k: int) -> list[list[Hit]]:
        """The `k` rows (all where there are fewer) nearest to each query float32 (N, D) by their vectors of `modality`.

        The nearest come first.

        `score` is the cosine, computed exactly whatever the kind. Raises InputError for queries of another width.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dimensions:
            raise InputError(f"queries of shape {queries.shape}: the index holds vectors of {self.dimensions} numbers")
        scores, positions = self._vectors[modality].nearest(unit(queries), k, self._threads)
        return [
            [self._hit(modality, position, score) for position, score in zip(found, cosines, strict=True)]
            for found, cosines in zip(positions.tolist(), scores.tolist(), strict=True)
        ]

    def vector_of(self, row_id: str, modality: Modality) -> np.ndarray | None:
        """The vector float32 (D,) of the first row with this id; None where there is no such row."""
        key = files.hash_id(row_id)
        hashes, rows = self._ids
        for entry in range(int(np.searchsorted(hashes, key)), len(hashes)):
            if hashes[entry] != key:
                return None
            row = int(rows[entry])
            if self._rows.cell(0, row) == row_id:  # ids may share a hash
                position = self._positions[row, MODALITIES.index(modality)]
                return np.array(self._vectors[modality].vectors[position])
        return None

    def _hit(self, modality: Modality, position: int, score: float) -> Hit:
        row = int(self._first_rows[modality][position])
        row_id, caption, uri = (self._rows.cell(column, row) for column in range(3))
        thumbnail = self._thumbnails.cell(0, int(self._positions[row, 0]))
        return Hit(row_id, score, caption, uri, thumbnail or b"")


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


def _open_vectors(folder: Path, modality: str, about: dict[str, Any]) -> VectorIndex:
    vectors = load_array(folder / files.vectors_file(modality))
    if about["kind"] == "flat":
        return VectorIndex(vectors)
    try:
        ann_index = faiss.read_index(str(folder / files.ann_index_file(modality)), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        name = files.ann_index_file(modality)
        raise InputError(f"{folder}: the index is damaged, {name} cannot be read; build it again") from error
    return VectorIndex(vectors, ann_index, about["effort"])
