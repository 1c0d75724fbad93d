"""From the vectors of a corpus to an index folder.

A row is one image with one of its captions. There is one image vector and one thumbnail for each image (rows of equal
`image_id`), and one text vector for each caption of an image. Axes: R rows, M vectors of a modality, D width of the
joint space.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import pyarrow as pa

from models.config import InputError
from serving.index import files as index_files
from serving.index.approximate import IndexKind, kind_of, make_vector_index
from serving.index.files import hash_id, load_array, sha256
from serving.index.index import MODALITIES
from serving.index.source import COLUMNS, Source, open_source, vectors_of
from serving.interfaces import Modality

QUERIES = 200
"""Vectors of the other modality that recall is measured with."""
ROW_SCHEMA = pa.schema([("id", pa.string()), ("caption", pa.string()), ("uri", pa.string())])
THUMBNAIL_SCHEMA = pa.schema([("thumbnail", pa.binary())])

logger = logging.getLogger(__name__)


class Files(Protocol):
    """Folders at URLs; the command line passes a module that has these."""

    def exists(self, uri: str) -> bool:
        """Whether something is there."""
        ...

    def download(self, uri: str, local_folder: str) -> None:
        """Copy a folder here."""
        ...

    def upload(self, local_folder: str, uri: str) -> None:
        """Copy a folder there."""
        ...


@dataclass(frozen=True)
class IndexReport:
    """Sizes, kinds and recall of an index that was built."""

    out: str
    embedding_space: str
    rows: int
    counts: dict[str, int]
    """Vectors, by modality."""
    kinds: dict[str, str]
    """"flat", "hnsw" or "ivfpq", by modality."""
    recall_at_10: dict[str, float]
    """By modality: share of the ten nearest to vectors of the other modality that a search finds."""
    seconds: float

    def text(self) -> str:
        """A line for each modality, and where the index is."""
        lines = [
            f"{one:5}  {self.counts[one]:>10,} vectors  {self.kinds[one]:5}  recall@10 {self.recall_at_10[one]:.3f}"
            for one in MODALITIES
        ]
        return "\n".join([*lines, f"index of embedding space {self.embedding_space}: {self.out}"])


def build_index(
    vectors: str, out: str, kind: IndexKind = "auto", files: Files | None = None, threads: int | None = None
) -> IndexReport:
    """Build the index of a folder of vectors (written by `triptych embed`) in the folder `out`.

    `files` reaches URLs; without it both are local folders. With `kind` auto a modality is searched exactly up to
    50,000 vectors, by a graph (hnsw) up to two million, and quantised (ivfpq) beyond. `threads` are those of the build
    (default: all cores).
    Raises InputError: vectors missing, incomplete or damaged; an index that is there already.
    """
    started = time.monotonic()
    for uri in (vectors, out):
        if files is None and "://" in uri:
            raise InputError(f"{uri}: only local folders can be read here")
    there = f"{out.rstrip('/')}/{index_files.ABOUT}"
    if files.exists(there) if files else Path(there).exists():
        raise InputError(f"{out}: there is an index already; name another folder (a service may be reading this one)")
    with ExitStack() as stack:
        source = open_source(_local(vectors, files, stack))
        folder = Path(out) if "://" not in out else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{out}: no folder can be made there ({error.strerror})") from error
        about = _build(source, folder, kind, threads or os.cpu_count() or 1)
        if "://" in out and files:  # the file that makes the index complete comes last
            files.upload(str(folder), out)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _write_about(folder, about)
            files.upload(str(folder), out)
        else:
            _write_about(folder, about)
    sides: dict[str, dict[str, Any]] = about["sides"]
    return IndexReport(
        out=out,
        embedding_space=source.embedding_space,
        rows=source.count,
        counts={modality: entry["count"] for modality, entry in sides.items()},
        kinds={modality: entry["kind"] for modality, entry in sides.items()},
        recall_at_10=about["recall_at_10"],
        seconds=time.monotonic() - started,
    )


def _local(uri: str, files: Files | None, stack: ExitStack) -> Path:
    if files is None or "://" not in uri:
        return Path(uri)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    files.download(uri, folder)
    return Path(folder)


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    temporary = folder / f".{index_files.ABOUT}"  # so that the name appears with the whole content
    temporary.write_text(json.dumps(about, indent=1))
    temporary.replace(folder / index_files.ABOUT)


def _build(source: Source, folder: Path, kind: IndexKind, threads: int) -> dict[str, Any]:
    """All files but `index.json`, whose content is returned."""
    first_rows, positions = _number(source, folder)
    _write_rows(source, folder, first_rows)
    written = [index_files.ROWS, index_files.THUMBNAILS, index_files.POSITIONS, index_files.IDS]
    sides: dict[str, dict[str, Any]] = {}
    recall: dict[str, float] = {}
    vectors = {modality: load_array(folder / index_files.vectors_file(modality)) for modality in MODALITIES}
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        for modality, other in zip(MODALITIES, reversed(MODALITIES), strict=True):
            count = len(first_rows[modality])
            made, recall[modality] = make_vector_index(kind_of(kind, count), vectors[modality], _sample(vectors[other]))
            used = kind_of(kind, count) if made.ann_index is not None else "flat"
            sides[modality] = {"kind": used, "count": count, "effort": made.search_parameter}
            written += [index_files.vectors_file(modality), index_files.rows_file(modality)]
            if made.ann_index is not None:
                faiss.write_index(made.ann_index, str(folder / index_files.ann_index_file(modality)))
                written.append(index_files.ann_index_file(modality))
            logger.info("index: %s, %s vectors, %s", modality, f"{count:,}", used)
    finally:
        faiss.omp_set_num_threads(before)
    larger = max(sides.values(), key=lambda entry: entry["count"])
    return {
        "format": index_files.FORMAT,
        "name": source.name,
        "embedding_space": source.embedding_space,
        "dimensions": source.dimensions,
        "manifest": source.manifest,
        "kind": larger["kind"],
        "rows": len(positions),
        "sides": sides,
        "recall_at_10": recall,
        "files": {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in written},
    }


def _sample(vectors: np.ndarray) -> np.ndarray:
    """At most QUERIES vectors, spread over all."""
    chosen = np.unique(np.linspace(0, len(vectors) - 1, QUERIES).round().astype(np.int64))
    return np.ascontiguousarray(vectors[chosen])


def _number(source: Source, folder: Path) -> tuple[dict[Modality, np.ndarray], np.ndarray]:
    """The first row of each vector, by modality, and the positions (R, 2) of all rows; writes both, and the ids.

    Equal keys are one vector: an image's key is its `image_id`, a caption's is its text together with its image.
    """
    images, captions, ids = (np.empty(source.count, np.int64) for _ in range(3))
    row = 0
    for batch in source.batches(["id", "caption", "image_id"]):
        part = slice(row, row + len(batch))
        keys = batch.column("id").to_pylist()
        ids[part] = [hash_id(key) for key in keys]
        named = "image_id" in batch.schema.names
        images[part] = batch.column("image_id").to_numpy() if named else np.arange(part.start, part.stop)
        texts = batch.column("caption").to_pylist()
        captions[part] = [hash_id(f"{image} {text}") for image, text in zip(images[part].tolist(), texts, strict=True)]
        row += len(batch)
    first: dict[Modality, np.ndarray] = {}
    positions = np.empty((source.count, 2), np.int64)
    for column, (modality, keys_of_modality) in enumerate(zip(MODALITIES, (images, captions), strict=True)):
        first[modality], positions[:, column] = _first_of(keys_of_modality)
        np.save(folder / index_files.rows_file(modality), first[modality], allow_pickle=False)
    order = np.argsort(ids, kind="stable")
    np.save(folder / index_files.POSITIONS, positions, allow_pickle=False)
    np.save(folder / index_files.IDS, np.stack([ids[order], order]), allow_pickle=False)
    return first, positions


def _first_of(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows int64 (M,) whose key int64 (R,) is new, in order, and which of these each row's key belongs to (R,)."""
    _, first, member = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[member]


def _write_rows(source: Source, folder: Path, first_rows: dict[Modality, np.ndarray]) -> None:
    """The table of rows, the thumbnails and the vectors of both modalities, in one pass over the source."""
    vectors = {
        modality: np.lib.format.open_memmap(
            folder / index_files.vectors_file(modality),
            mode="w+",
            dtype=np.float32,
            shape=(len(first_rows[modality]), source.dimensions),
        )
        for modality in MODALITIES
    }
    with (
        pa.OSFile(str(folder / index_files.ROWS), "wb") as rows_out,
        pa.ipc.new_file(rows_out, ROW_SCHEMA) as rows,
        pa.OSFile(str(folder / index_files.THUMBNAILS), "wb") as thumbnails_out,
        pa.ipc.new_file(thumbnails_out, THUMBNAIL_SCHEMA) as images,
    ):
        for start, batch in _numbered(source):
            rows.write_batch(batch.select(ROW_SCHEMA.names).cast(ROW_SCHEMA))
            for modality in MODALITIES:
                found = first_rows[modality]
                begin, end = np.searchsorted(found, [start, start + len(batch)])
                chosen = found[begin:end] - start
                values = vectors_of(batch, f"{modality}_vector", source.dimensions, source.folder)
                vectors[modality][begin:end] = values[chosen]
                if modality == "image":
                    images.write_batch(_thumbnails(batch, chosen))
    for written in vectors.values():
        written.flush()


def _numbered(source: Source) -> Iterator[tuple[int, pa.RecordBatch]]:
    start = 0
    for batch in source.batches([*COLUMNS, "thumbnail"]):
        yield start, batch
        start += len(batch)


def _thumbnails(batch: pa.RecordBatch, chosen: np.ndarray) -> pa.RecordBatch:
    if "thumbnail" in batch.schema.names:
        column = batch.column("thumbnail").take(pa.array(chosen)).cast(pa.binary())
    else:
        column = pa.nulls(len(chosen), pa.binary())
    return pa.RecordBatch.from_arrays([column], schema=THUMBNAIL_SCHEMA)
