"""faiss' approximate indexes: which, how large, and how hard to look for a stated recall.

Axes: N queries, M vectors of a side, D width of the joint space.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import faiss
import numpy as np

from serving.index.index import Side

Kind = Literal["auto", "flat", "hnsw", "ivfpq"]
FLAT_UP_TO = 50_000
"""Vectors of a side that are all compared: a few milliseconds a query on one core."""
HNSW_UP_TO = 2_000_000
"""Vectors of a side for a graph (half-precision vectors and some 150 bytes each); more are quantised."""
IVFPQ_FROM = 2_000
"""Fewer vectors cannot train a quantiser: such a side is searched exactly."""
RECALL = 0.95
"""Recall@10 that the effort of a search is chosen for."""
K = 10
_LINKS = 16
_HALF: Any = faiss.ScalarQuantizer.QT_fp16  # declared as another type than the constructor takes
_BUILD_EFFORT = 100
_CHUNK = 65_536
_TRAINING = 64
"""Training vectors of a list."""
_LEAST_TRAINING = 20_000
_BITS = 8

logger = logging.getLogger(__name__)


def kind_of(kind: Kind, count: int) -> str:
    """How a side of so many vectors is searched."""
    if kind == "auto":
        return "flat" if count <= FLAT_UP_TO else "hnsw" if count <= HNSW_UP_TO else "ivfpq"
    if kind == "ivfpq" and count < IVFPQ_FROM:
        logger.warning("ivfpq needs %s vectors, a side has %s: it is searched exactly", f"{IVFPQ_FROM:,}", f"{count:,}")
        return "flat"
    return kind


def make_side(kind: str, vectors: np.ndarray, queries: np.ndarray) -> tuple[Side, float]:
    """A side of float32 (M, D) searched that way, and its recall@10 on unit `queries` (N, D) of the other side.

    The effort is the least that reaches RECALL, or the greatest there is.
    """
    threads = faiss.omp_get_max_threads()
    exact = Side(vectors)
    if kind == "flat":
        return exact, 1.0
    side = replace(exact, graph=_hnsw(vectors) if kind == "hnsw" else _ivfpq(vectors))
    k = min(K, len(vectors))
    truth, _ = exact.nearest(queries, k, threads)
    recall = 0.0
    for effort in _efforts(side.graph):
        side = replace(side, effort=effort)
        scores, _ = side.nearest(queries, k, threads)
        recall = recall_of(scores, truth)
        if recall >= RECALL:
            break
    return side, recall


def recall_of(scores: np.ndarray, truth: np.ndarray) -> float:
    """Share of hits (scores (N, K)) that are as near as the K nearest, scored `truth` (N, K); ties count as found."""
    return float(np.mean(scores >= truth[:, -1:] - 1e-6))


def _hnsw(vectors: np.ndarray) -> Any:
    """A graph over half-precision copies; what it finds is scored with the vectors themselves."""
    graph = faiss.IndexHNSWSQ(vectors.shape[1], _HALF, _LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = _BUILD_EFFORT
    graph.train(vectors[:1])  # half precision learns nothing
    _fill(graph, vectors)
    return graph


def _ivfpq(vectors: np.ndarray) -> Any:
    count, dimensions = vectors.shape
    lists = max(1, min(int(4 * math.sqrt(count)), count // 40))
    codes = next(parts for parts in range(max(1, dimensions // 4), 0, -1) if dimensions % parts == 0)
    graph: Any = faiss.index_factory(dimensions, f"IVF{lists},PQ{codes}x{_BITS}", faiss.METRIC_INNER_PRODUCT)
    graph.cp.spherical = True
    graph.do_polysemous_training = False  # orders codes for a search that is not used, and takes most of the time
    graph.cp.min_points_per_centroid = graph.pq.cp.min_points_per_centroid = 1  # or faiss writes to standard error
    size = min(count, max(_TRAINING * lists, _LEAST_TRAINING))
    chosen = np.sort(np.random.default_rng(0).choice(count, size, replace=False))
    graph.train(np.ascontiguousarray(vectors[chosen]))
    _fill(graph, vectors)
    return graph


def _fill(graph: Any, vectors: np.ndarray) -> None:
    for start in range(0, len(vectors), _CHUNK):
        graph.add(np.ascontiguousarray(vectors[start : start + _CHUNK]))


def _efforts(graph: Any) -> Iterator[int]:
    """From little to much: candidates of a graph, or lists probed up to a quarter of them."""
    if not isinstance(graph, faiss.IndexIVF):
        yield from (64, 128, 256, 512, 1024)
        return
    effort, most = min(8, graph.nlist), max(8, graph.nlist // 4)
    while effort < most:
        yield effort
        effort *= 2
    yield min(most, graph.nlist)
