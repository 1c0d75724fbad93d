"""The folder that `triptych embed` writes: whose it is, what is done, and what makes it complete.

    vectors/*.parquet      a row each image and caption: unit, ordinal, id, image_id, uri, caption, image_vector,
                           text_vector, thumbnail
    skipped.parquet        the ledger: every sample that is not among them, and why
    img_emb/ text_emb/ metadata/     the same vectors in clip-retrieval's layout (img_emb_0.npy, ...), row by row
    vectors.json           what they are; written last
    _embed.json _progress/ while the job is not done

Axes: R rows, D width of the joint space.
"""

import io
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from models.config import InputError
from models.redact import redact
from pipelines import storage
from pipelines.data.manifest import Manifest
from pipelines.data.skip_ledger import LEDGER, check_balance, check_skipped, read_ledger, reasons_of, write_ledger
from pipelines.embed.sink import SKIPPED
from pipelines.embed.transforms import KEY, sample_key

FORMAT = "triptych-vectors-1"
COMPLETE, BEGUN = "vectors.json", "_embed.json"
VECTORS, PROGRESS, LEDGER_FILE = "vectors", "_progress", "skipped.parquet"
NPY_ROWS = 100_000
"""Rows of one npy file."""
_READERS = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What decides the content of the folder."""

    embedding_space: str
    name: str
    """Of the package."""
    dimensions: int
    """D."""
    manifest: str
    """Hash of the data's index."""
    thumbnails: int
    """Longest side in pixels; 0 without."""
    npy: bool

    def differences(self, about: dict[str, Any]) -> str:
        """Why a folder is another job's; "" where it is this one's."""
        names = {
            "embedding_space": "embedding space",
            "manifest": "hash of the data's index",
            "thumbnails": "thumbnails of side",
            "npy": "npy files",
        }
        return ", ".join(
            f"{text} {about.get(name)} there and {getattr(self, name)} here"
            for name, text in names.items()
            if about.get(name) != getattr(self, name)
        )


def claim(out: str, job: Job) -> dict[str, Any] | None:
    """Take the folder for this job, or go on with it; the content of `vectors.json` where the job is done already.

    Raises InputError where the folder is another job's, naming what differs.
    """
    for name in (COMPLETE, BEGUN):
        uri = storage.join(out, name)
        if storage.exists(uri):
            about = _read_json(uri)
            differences = job.differences(about)
            if differences:
                raise InputError(f"{out}: holds other vectors ({differences}); name another --out")
            return about if name == COMPLETE else None
    if storage.exists(storage.join(out, VECTORS)):
        raise InputError(f"{out}: holds vectors of an unknown job; name another --out")
    storage.write_bytes(storage.join(out, BEGUN), json.dumps(job.__dict__).encode())
    return None


def _read_json(uri: str) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read_bytes(uri)))
    except (ValueError, TypeError) as error:
        raise InputError(f"{uri}: damaged; delete the folder, or name another --out") from error


def finished(out: str) -> np.ndarray:
    """Keys of the samples that are written, or in the ledger: int64, sorted, each once."""
    progress = storage.join(out, PROGRESS)
    if not storage.exists(progress):
        return np.empty(0, np.int64)
    files = [info.uri for info in storage.listing(progress) if not info.uri.endswith(".pending.parquet")]
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda uri: pq.read_table(pa.BufferReader(storage.read_bytes(uri))), files))
    return np.unique(np.concatenate([np.empty(0, np.int64), *(table.column(KEY).to_numpy() for table in tables)]))


def complete(out: str, job: Job, manifest: Manifest, max_skipped: float) -> dict[str, Any]:
    """Account for every sample, write the ledger, the npy files and, last, `vectors.json`; returns its content.

    Raises InputError where more than the share `max_skipped` was skipped, or nothing is left; RuntimeError where
    samples are lost or written twice, for that is our own mistake.
    """
    folder = storage.join(out, VECTORS)
    files = [info.uri for info in storage.listing(folder)]
    with ThreadPoolExecutor(_READERS) as pool:
        keys = list(pool.map(_keys, files))
        skipped_files = _skipped_files(folder)
        ledgers = list(pool.map(read_ledger, skipped_files))
    ledger = pa.concat_tables([LEDGER.empty_table(), *ledgers]).sort_by(
        [("unit", "ascending"), ("ordinal", "ascending")]
    )
    write_ledger(storage.join(out, LEDGER_FILE), ledger)
    samples = _samples(keys, ledger)
    check_balance(manifest.count, samples, len(ledger))
    check_skipped(manifest.count, len(ledger), max_skipped)
    if not samples:
        raise InputError(f"no usable pair among {len(ledger):,} samples; `triptych data lint URI` says why")
    order = sorted(range(len(files)), key=lambda number: int(keys[number][0]))
    files = [files[number] for number in order]
    about = job.__dict__ | {
        "format": FORMAT,
        "samples": samples,
        "skipped": len(ledger),
        "reasons": reasons_of(ledger),
        "rows": sum(map(len, keys)),
        "files": [
            {"name": f"{VECTORS}/{uri.rpartition('/')[2]}", "rows": len(keys[number])}
            for number, uri in zip(order, files, strict=True)
        ],
    }
    if job.npy:
        _write_npy(out, files, about["rows"])
    storage.write_bytes(storage.join(out, COMPLETE), json.dumps(about, indent=1).encode())
    _clean(out)
    return about


def _keys(uri: str) -> np.ndarray:
    """Key of each row of a file, int64 (rows,)."""
    with storage.open_input(uri) as file, storage.errors_about(uri):
        table = pq.read_table(file, columns=["unit", "ordinal"])
    return (table.column("unit").to_numpy().astype(np.int64) << 32) + table.column("ordinal").to_numpy()


def _skipped_files(folder: str) -> list[str]:
    place = storage.join(folder, SKIPPED)
    return [info.uri for info in storage.listing(place)] if storage.exists(place) else []


def _samples(keys: Sequence[np.ndarray], ledger: pa.Table) -> int:
    """Different samples among the rows. Raises RuntimeError where one is in two files, or skipped as well."""
    parts = [np.unique(part) for part in keys]
    pairs = zip(ledger.column("unit").to_pylist(), ledger.column("ordinal").to_pylist(), strict=True)
    skipped = np.array([sample_key(unit, ordinal) for unit, ordinal in pairs], np.int64)
    together = np.concatenate([skipped, *parts])
    if len(np.unique(together)) != len(together):
        raise RuntimeError("samples were written twice; did two jobs write to this folder?")
    return sum(map(len, parts))


def _write_npy(out: str, files: Sequence[str], rows: int) -> None:
    """clip-retrieval's layout: parts numbered alike in three folders, each row of one the same row of the others."""
    parts = -(-rows // NPY_ROWS)
    for number, table in enumerate(_parts(files)):
        name = str(number).zfill(len(str(parts)))
        for column, place in (("image_vector", "img_emb"), ("text_vector", "text_emb")):
            values = table.column(column).combine_chunks()
            vectors = values.flatten().to_numpy().reshape(len(values), -1)
            sink = io.BytesIO()
            np.save(sink, vectors, allow_pickle=False)
            storage.write_bytes(storage.join(out, place, f"{place}_{name}.npy"), sink.getvalue())
        sink = io.BytesIO()
        pq.write_table(table.select(["image_path", "caption", "id"]), sink)
        storage.write_bytes(storage.join(out, "metadata", f"metadata_{name}.parquet"), sink.getvalue())


def _parts(files: Sequence[str]) -> Iterator[pa.Table]:
    """All rows in order, NPY_ROWS at a time."""
    names = ["uri", "caption", "id", "image_vector", "text_vector"]
    kept: list[pa.Table] = []
    count = 0
    for uri in files:
        with storage.open_input(uri) as file, storage.errors_about(uri):
            table = pq.read_table(file, columns=names)
        table = table.rename_columns(["image_path", *names[1:]])
        while count + len(table) >= NPY_ROWS:
            yield pa.concat_tables([*kept, table.slice(0, NPY_ROWS - count)])
            table, kept, count = table.slice(NPY_ROWS - count), [], 0
        kept, count = [*kept, table], count + len(table)
    if count:
        yield pa.concat_tables(kept)


def _clean(out: str) -> None:
    """Remove what only a job that is not done needs."""
    system, path = storage.filesystem(out)
    for name in (PROGRESS, f"{VECTORS}/{SKIPPED}", BEGUN):
        try:
            kind = system.get_file_info(f"{path}/{name}").type
            if kind == pafs.FileType.Directory:
                system.delete_dir(f"{path}/{name}")
            elif kind == pafs.FileType.File:
                system.delete_file(f"{path}/{name}")
        except OSError as error:
            logger.warning("%s: %s could not be removed (%s)", redact(out), name, error)
