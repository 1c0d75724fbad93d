"""What the kinds of an index find, against exact search, and what they cost: `python -m benchmarks.index_recall`.

The vectors are made up: of a few dozen directions that matter less and less, as a trained model's are, and noise. A
caption differs from its image in both; how often its nearest image is its own is in the results. Queries are
captions, answers images.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import machine
from serving.index.approximate import IndexKind
from serving.index.build import build_index
from serving.index.index import open_index

QUERIES = 200
K = 10
_PART = 50_000
_DIRECTIONS = 48
_APART, _NOISE = 1.0, 0.5

logger = logging.getLogger(__name__)


def write_corpus(folder: Path, count: int, dimensions: int) -> None:
    """A folder of vectors as `triptych embed` leaves it."""
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((_DIRECTIONS, dimensions)) / np.sqrt(np.arange(1, _DIRECTIONS + 1))[:, None]
    entries = []
    (folder / "vectors").mkdir(parents=True)
    for start in range(0, count, _PART):
        rows = min(_PART, count - start)
        meaning = generator.standard_normal((rows, _DIRECTIONS))
        images = _seen(meaning, directions, generator)
        texts = _seen(meaning + _APART * generator.standard_normal(meaning.shape), directions, generator)
        numbers = np.arange(start, start + rows)
        columns = {name: [f"{name} {number}" for number in numbers] for name in ("id", "caption", "uri")}
        table = pa.table(
            columns | {"image_id": numbers, "image_vector": _column(images), "text_vector": _column(texts)}
        )
        name = f"vectors/{start}.parquet"
        pq.write_table(table, folder / name, use_dictionary=False)
        entries.append({"name": name, "rows": rows})
    about = {"name": "made up", "embedding_space": "none", "dimensions": dimensions, "manifest": "", "files": entries}
    (folder / "vectors.json").write_text(json.dumps({"format": "triptych-vectors-1"} | about))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / lengths, np.float32)


def _seen(meaning: np.ndarray, directions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Unit vectors float32 (rows, dimensions)."""
    whole = meaning @ directions
    return _unit(whole + _NOISE * generator.standard_normal(whole.shape))


def _column(vectors: np.ndarray) -> pa.Array:
    column: pa.Array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    return column


def measure(vectors: Path, folder: Path, kind: IndexKind, threads: int) -> dict[str, Any]:
    """Build one kind; then recall and time of a query."""
    report = build_index(str(vectors), str(folder), kind, threads=threads)
    index = open_index(folder)
    texts = np.load(folder / "text_vectors.npy", mmap_mode="r")
    images = np.load(folder / "image_vectors.npy", mmap_mode="r")
    own = np.arange(0, len(texts), max(1, len(texts) // QUERIES))[:QUERIES]
    queries = np.ascontiguousarray(texts[own])
    faiss.omp_set_num_threads(threads)
    truth, nearest = faiss.knn(queries, np.asarray(images), K, metric=faiss.METRIC_INNER_PRODUCT)
    index.search(queries[:20], "image", K)  # pages that a first search reads
    found, seconds, processor = [], [], time.process_time()
    for query in queries:
        started = time.perf_counter()
        (hits,) = index.search(query[None], "image", K)
        seconds.append(time.perf_counter() - started)
        found.append([hit.score for hit in hits])
    processor = time.process_time() - processor
    about = json.loads((folder / "index.json").read_text())
    return {
        "kind": report.kinds["image"],
        "effort": about["sides"]["image"]["effort"],
        "own_picture_first": float(np.mean(nearest[:, 0] == own)),
        "recall_at_10": float(np.mean(np.array(found) >= truth[:, -1:] - 1e-6)),
        "stated_recall_at_10": report.recall_at_10["image"],
        "query_ms_median": float(np.median(seconds)) * 1e3,
        "query_cpu_ms": processor / len(queries) * 1e3,
        "build_seconds_both_sides": report.seconds,
        "bytes_per_vector": sum(path.stat().st_size for path in folder.glob("image.faiss")) / report.counts["image"],
    }


def main() -> None:
    """Measure all kinds at each size; what is measured is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/index_recall.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results: list[dict[str, Any]] = []
    kinds: tuple[IndexKind, ...] = ("flat", "hnsw", "ivfpq")
    for count in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            vectors = Path(folder) / "vectors"
            write_corpus(vectors, count, options.dimensions)
            for kind in kinds:
                result = {"vectors": count} | measure(vectors, Path(folder) / kind, kind, options.threads)
                results.append(result)
                logger.info("%s", json.dumps(result))
        document = {"machine": machine(), "dimensions": options.dimensions, "k": K, "queries": QUERIES}
        options.out.write_text(json.dumps(document | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
