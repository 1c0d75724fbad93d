"""faiss' approximate indexes: which for how many vectors, their sizes, and the search parameter for a stated recall.

Axes: N queries, M vectors of a modality, D width of the joint space.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import faiss
import numpy as np

from serving.index.index import VectorIndex

IndexKind = Literal["auto", "flat", "hnsw", "ivfpq"]
FLAT_UP_TO = 50_000
"""Up to so many vectors all are compared: a few milliseconds a query on one core."""
HNSW_UP_TO = 2_000_000
"""Up to so many an HNSW graph is built (half-precision vectors and some 150 bytes each); more are quantised."""
IVFPQ_FROM = 2_000
"""Fewer vectors cannot train a quantiser: they are searched exactly."""
RECALL = 0.95
"""Recall@10 that the search parameter is chosen for."""
K = 10
_LINKS = 16
"""Links of a vector in the HNSW graph."""
_HALF: Any = faiss.ScalarQuantizer.QT_fp16  # declared as another type than the constructor takes
_EF_CONSTRUCTION = 100
_CHUNK = 65_536
"""Vectors added in one call; each call copies its vectors."""
_TRAINING = 64
"""Training vectors per list of an IVF index."""
_LEAST_TRAINING = 20_000
_BITS = 8
"""Bits of a code of the product quantiser."""

logger = logging.getLogger(__name__)


def kind_of(kind: IndexKind, count: int) -> str:
    """How so many vectors of a modality are searched."""
    if kind == "auto":
        return "flat" if count <= FLAT_UP_TO else "hnsw" if count <= HNSW_UP_TO else "ivfpq"
    if kind == "ivfpq" and count < IVFPQ_FROM:
        logger.warning(
            "ivfpq needs %s vectors, there are %s: they are searched exactly", f"{IVFPQ_FROM:,}", f"{count:,}"
        )
        return "flat"
    return kind


def make_vector_index(kind: str, vectors: np.ndarray, queries: np.ndarray) -> tuple[VectorIndex, float]:
    """An index of float32 (M, D), and its recall@10 on unit `queries` (N, D) of the other modality.

    Its search parameter is the least that reaches RECALL, or the greatest there is.
    """
    threads = faiss.omp_get_max_threads()
    exact = VectorIndex(vectors)
    if kind == "flat":
        return exact, 1.0
    index = replace(exact, ann_index=_hnsw(vectors) if kind == "hnsw" else _ivfpq(vectors))
    k = min(K, len(vectors))
    truth, _ = exact.nearest(queries, k, threads)
    recall = 0.0
    for parameter in _search_parameters(index.ann_index):
        index = replace(index, search_parameter=parameter)
        scores, _ = index.nearest(queries, k, threads)
        recall = recall_of(scores, truth)
        if recall >= RECALL:
            break
    return index, recall


def recall_of(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of hits (scores (N, K)) that are as near as the K nearest, scored `truth` (N, K); ties count as found."""
    return float(np.mean(scores >= truth[:, -1:] - 1e-6))


def _hnsw(vectors: np.ndarray) -> Any:
    """An HNSW graph over half-precision copies; what it finds is scored with the vectors themselves."""
    ann_index = faiss.IndexHNSWSQ(vectors.shape[1], _HALF, _LINKS, faiss.METRIC_INNER_PRODUCT)
    ann_index.hnsw.efConstruction = _EF_CONSTRUCTION
    ann_index.train(vectors[:1])  # half precision learns nothing
    _fill(ann_index, vectors)
    return ann_index


def _ivfpq(vectors: np.ndarray) -> Any:
    """Lists of product-quantised vectors: 4 sqrt(M) lists as faiss advises, and a code for some four dimensions."""
    count, dimensions = vectors.shape
    lists = max(1, min(int(4 * math.sqrt(count)), count // 40))
    codes = next(number for number in range(max(1, dimensions // 4), 0, -1) if dimensions % number == 0)
    ann_index: Any = faiss.index_factory(dimensions, f"IVF{lists},PQ{codes}x{_BITS}", faiss.METRIC_INNER_PRODUCT)
    ann_index.cp.spherical = True
    ann_index.do_polysemous_training = False  # orders codes for a search that is not used, and takes most of the time
    ann_index.cp.min_points_per_centroid = ann_index.pq.cp.min_points_per_centroid = (
        1  # or faiss writes to standard error
    )
    size = min(count, max(_TRAINING * lists, _LEAST_TRAINING))
    chosen = np.sort(np.random.default_rng(0).choice(count, size, replace=False))
    ann_index.train(np.ascontiguousarray(vectors[chosen]))
    _fill(ann_index, vectors)
    return ann_index


def _fill(ann_index: Any, vectors: np.ndarray) -> None:
    for start in range(0, len(vectors), _CHUNK):
        ann_index.add(np.ascontiguousarray(vectors[start : start + _CHUNK]))


def _search_parameters(ann_index: Any) -> Iterator[int]:
    """Values to try, rising: efSearch of an HNSW index, or nprobe up to a quarter of the lists."""
    if not isinstance(ann_index, faiss.IndexIVF):
        yield from (64, 128, 256, 512, 1024)
        return
    nprobe, most = min(8, ann_index.nlist), max(8, ann_index.nlist // 4)
    while nprobe < most:
        yield nprobe
        nprobe *= 2
    yield min(most, ann_index.nlist)
