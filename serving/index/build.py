"""From the vectors of a corpus to an index folder.

A row is one picture with one of its captions. The image side holds each picture once (equal `image_id`), the text side
each caption of a picture once; thumbnails are kept once a picture. Axes: R rows, M vectors of a side, D width.
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
from serving.index.approximate import Kind, kind_of, make_side
from serving.index.files import hash_id, load_array, sha256
from serving.index.index import SIDES
from serving.index.source import COLUMNS, Source, open_source, vectors_of
from serving.interfaces import Target

QUERIES = 200
"""Vectors of the other side that recall is measured with."""
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
    """What was built."""

    out: str
    embedding_space: str
    rows: int
    counts: dict[str, int]
    """Vectors, by side."""
    kinds: dict[str, str]
    """By side."""
    recall_at_10: dict[str, float]
    """By side: share of the ten nearest to vectors of the other side that a search finds."""
    seconds: float

    def text(self) -> str:
        """For people."""
        lines = [
            f"{side:5}  {self.counts[side]:>10,} vectors  {self.kinds[side]:5}  recall@10 {self.recall_at_10[side]:.3f}"
            for side in SIDES
        ]
        return "\n".join([*lines, f"index of embedding space {self.embedding_space}: {self.out}"])


def build_index(
    vectors: str, out: str, kind: Kind = "auto", files: Files | None = None, threads: int | None = None
) -> IndexReport:
    """Build the index of a folder of vectors (written by `triptych embed`) in the folder `out`.

    `files` reaches URLs; without it both are local folders. A side of `kind` auto is exact up to 50,000 vectors, a
    graph (hnsw) up to two million, and quantised (ivfpq) beyond. `threads` are those of the build (default: all cores).
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
        counts={side: entry["count"] for side, entry in sides.items()},
        kinds={side: entry["kind"] for side, entry in sides.items()},
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
    part = folder / f".{index_files.ABOUT}"
    part.write_text(json.dumps(about, indent=1))
    part.replace(folder / index_files.ABOUT)


def _build(source: Source, folder: Path, kind: Kind, threads: int) -> dict[str, Any]:
    """All files but `index.json`, whose content is returned."""
    first_rows, places = _number(source, folder)
    _write_rows(source, folder, first_rows)
    written = [index_files.ROWS, index_files.THUMBNAILS, index_files.PLACES, index_files.IDS]
    sides: dict[str, dict[str, Any]] = {}
    recall: dict[str, float] = {}
    vectors = {side: load_array(folder / index_files.vectors_file(side)) for side in SIDES}
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        for side, other in zip(SIDES, reversed(SIDES), strict=True):
            count = len(first_rows[side])
            made, recall[side] = make_side(kind_of(kind, count), vectors[side], _sample(vectors[other]))
            used = kind_of(kind, count) if made.graph is not None else "flat"
            sides[side] = {"kind": used, "count": count, "effort": made.effort}
            written += [index_files.vectors_file(side), index_files.rows_file(side)]
            if made.graph is not None:
                faiss.write_index(made.graph, str(folder / index_files.graph_file(side)))
                written.append(index_files.graph_file(side))
            logger.info("index: %s side, %s vectors, %s", side, f"{count:,}", used)
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
        "rows": len(places),
        "sides": sides,
        "recall_at_10": recall,
        "files": {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in written},
    }


def _sample(vectors: np.ndarray) -> np.ndarray:
    """At most QUERIES vectors, spread over all."""
    chosen = np.unique(np.linspace(0, len(vectors) - 1, QUERIES).round().astype(np.int64))
    return np.ascontiguousarray(vectors[chosen])


def _number(source: Source, folder: Path) -> tuple[dict[Target, np.ndarray], np.ndarray]:
    """The first row of each vector, by side, and the places (R, 2) of all rows; writes these and the table of ids."""
    pictures, captions, ids = (np.empty(source.count, np.int64) for _ in range(3))
    row = 0
    for batch in source.batches(["id", "caption", "image_id"]):
        part = slice(row, row + len(batch))
        keys = batch.column("id").to_pylist()
        ids[part] = [hash_id(key) for key in keys]
        named = "image_id" in batch.schema.names
        pictures[part] = batch.column("image_id").to_numpy() if named else np.arange(part.start, part.stop)
        texts = batch.column("caption").to_pylist()
        captions[part] = [
            hash_id(f"{picture} {text}") for picture, text in zip(pictures[part].tolist(), texts, strict=True)
        ]
        row += len(batch)
    first: dict[Target, np.ndarray] = {}
    places = np.empty((source.count, 2), np.int64)
    for column, (side, keys_of_side) in enumerate(zip(SIDES, (pictures, captions), strict=True)):
        first[side], places[:, column] = _first_of(keys_of_side)
        np.save(folder / index_files.rows_file(side), first[side], allow_pickle=False)
    order = np.argsort(ids, kind="stable")
    np.save(folder / index_files.PLACES, places, allow_pickle=False)
    np.save(folder / index_files.IDS, np.stack([ids[order], order]), allow_pickle=False)
    return first, places


def _first_of(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows int64 (M,) whose key int64 (R,) is new, in order, and which of these each row's key belongs to (R,)."""
    _, first, member = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[member]


def _write_rows(source: Source, folder: Path, first_rows: dict[Target, np.ndarray]) -> None:
    """The table of rows, the thumbnails and the vectors of both sides, in one pass over the source."""
    vectors = {
        side: np.lib.format.open_memmap(
            folder / index_files.vectors_file(side),
            mode="w+",
            dtype=np.float32,
            shape=(len(first_rows[side]), source.dimensions),
        )
        for side in SIDES
    }
    with (
        pa.OSFile(str(folder / index_files.ROWS), "wb") as rows_out,
        pa.ipc.new_file(rows_out, ROW_SCHEMA) as rows,
        pa.OSFile(str(folder / index_files.THUMBNAILS), "wb") as pictures_out,
        pa.ipc.new_file(pictures_out, THUMBNAIL_SCHEMA) as pictures,
    ):
        for start, batch in _numbered(source):
            rows.write_batch(batch.select(ROW_SCHEMA.names).cast(ROW_SCHEMA))
            for side in SIDES:
                found = first_rows[side]
                begin, end = np.searchsorted(found, [start, start + len(batch)])
                chosen = found[begin:end] - start
                values = vectors_of(batch, f"{side}_vector", source.dimensions, source.folder)
                vectors[side][begin:end] = values[chosen]
                if side == "image":
                    pictures.write_batch(_thumbnails(batch, chosen))
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
