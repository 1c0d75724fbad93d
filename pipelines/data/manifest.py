"""The index of a data set: its units, in one Parquet file, and a fingerprint of them."""

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.config import InputError
from models.redact import redact
from pipelines import storage
from pipelines.config import PairsConfig
from pipelines.data.parquet import index_table
from pipelines.data.reader import read_captions
from pipelines.data.sample import Format, Span, Unit, damage
from pipelines.data.webdataset import index_archive
from pipelines.storage import FileInfo

__all__ = ["FILE_NAME", "Manifest", "Unit", "build_manifest", "captions_of"]

FILE_NAME = "_manifest.parquet"
"""Its name beside the data; listings leave such names out."""
MOST_SAMPLES = 1000
MOST_BYTES = 64 * 2**20
LEAST_UNITS = 64
"""A unit has at most so many samples and bytes, and at most one LEAST_UNITS-th of all samples."""
_FORMATS: dict[str, Format] = {".parquet": "parquet", ".tar": "webdataset"}
_INDEXERS = 16
_SCHEMA = pa.schema([(f.name, pa.int64() if f.type is int else pa.string()) for f in fields(Unit)])

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """All units of a data set; `units[i].unit` is i."""

    units: list[Unit]

    @property
    def count(self) -> int:
        """Samples."""
        return sum(unit.count for unit in self.units)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum({unit.uri: unit.size for unit in self.units}.values())

    @cached_property
    def hash(self) -> str:
        """The data's fingerprint: equal for equal units of unchanged files at the same place."""
        text = json.dumps([list(asdict(unit).values()) for unit in self.units])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def save(self, uri: str, pairs: PairsConfig | None = None) -> None:
        """Write it as Parquet, one row a unit; with `pairs`, the columns that were looked for are noted."""
        table = pa.Table.from_pylist([asdict(unit) for unit in self.units], _SCHEMA)
        sink = io.BytesIO()
        notes = {"triptych.hash": self.hash, "triptych.columns": _columns(pairs) if pairs else ""}
        pq.write_table(table.replace_schema_metadata(notes), sink)
        storage.write_bytes(uri, sink.getvalue())

    @classmethod
    def load(cls, uri: str) -> Self:
        """Read it back. Raises InputError where it is missing or damaged."""
        return cls._load(uri)[0]

    @classmethod
    def _load(cls, uri: str) -> tuple[Self, str]:
        """It and the columns noted."""
        data = storage.read_bytes(uri)
        try:
            table = pq.read_table(pa.BufferReader(data))
            manifest = cls([Unit(**row) for row in table.select(_SCHEMA.names).to_pylist()])
            notes = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            if notes.get("triptych.hash") == manifest.hash:
                return manifest, notes.get("triptych.columns", "")
        except (pa.ArrowException, OSError, KeyError, TypeError) as error:
            raise InputError(f"{uri}: not a manifest ({error}); index the data again") from error
        raise InputError(f"{uri}: the manifest is damaged; index the data again")


def build_manifest(uri: str, pairs: PairsConfig) -> Manifest:
    """Index all Parquet files and tars below a folder, or one file; a function of the data alone.

    An index that `data index` left there is taken where every file still is what it was.
    Raises InputError: no such path, no samples, missing columns. A damaged file is one unit of one bad sample.
    """
    uri = storage.make_absolute(uri)
    files = [info for info in storage.listing(uri) if _format(info)]
    if not files:
        raise InputError(f"{uri}: no pairs; neither *.parquet nor *.tar is there")
    saved = _saved(storage.join(uri, FILE_NAME), files, pairs)
    if saved is not None:
        return saved
    with ThreadPoolExecutor(min(_INDEXERS, len(files))) as pool:
        spans = list(pool.map(lambda info: _index(info, pairs), files))
    samples = sum(len(span.sizes) for found in spans for span in found)
    if not any(span.sizes.any() for found in spans for span in found):
        raise InputError(f"{uri}: no pairs in its {len(files)} files; {_state(spans)}")
    limit = min(MOST_SAMPLES, -(-samples // LEAST_UNITS))
    units: list[Unit] = []
    for info, found in zip(files, spans, strict=True):
        for span in found:
            units += _cut(span, limit, info, len(units))
    return Manifest(units)


def _columns(pairs: PairsConfig) -> str:
    return json.dumps([pairs.image_column, pairs.caption_column, pairs.id_column, pairs.image_id_column])


def _saved(uri: str, files: list[FileInfo], pairs: PairsConfig) -> Manifest | None:
    """The index at `uri`, if it is there and of these very files and columns."""
    if files[0].uri == uri.removesuffix(f"/{FILE_NAME}") or not storage.exists(uri):
        return None
    try:
        manifest, columns = Manifest._load(uri)
    except InputError as error:
        logger.warning("%s", error)
        return None
    known = {(unit.uri, unit.size, unit.etag) for unit in manifest.units}
    fits = known == {(info.uri, info.size, info.etag) for info in files} and columns == _columns(pairs)
    return manifest if fits else None


def _format(info: FileInfo) -> Format | None:
    return next((kind for suffix, kind in _FORMATS.items() if info.uri.endswith(suffix)), None)


def _state(spans: list[list[Span]]) -> str:
    return "all are damaged" if any(spans) else "all are empty"


def _index(info: FileInfo, pairs: PairsConfig) -> list[Span]:
    """A file's samples; what is damaged is one row that says so when it is read."""
    try:
        return index_table(info.uri, pairs) if _format(info) == "parquet" else index_archive(info.uri)
    except InputError:
        raise
    except (pa.ArrowException, OSError) as error:
        if storage.is_outage(error):
            raise storage.explain(info.uri, error) from error
        logger.warning("%s", redact(f"{info.uri}: damaged, counted as one bad sample ({error})"))
        return [damage(0, 0)]


def _cut(span: Span, limit: int, info: FileInfo, number: int) -> Iterator[Unit]:
    """Units of about equal counts within the limits; `number` is the first one's."""
    even = -(-len(span.sizes) // -(-len(span.sizes) // limit))
    kind = _format(info) or "parquet"
    start = 0
    places = np.concatenate([[0], np.cumsum(span.sizes)])
    for unit in itertools.count(number):
        if start == len(span.sizes):
            return
        fits = int(np.searchsorted(places, places[start] + MOST_BYTES, side="right")) - 1 - start
        count = min(even, max(1, fits), len(span.sizes) - start)
        length = int(places[start + count] - places[start])
        offset = span.offset + (int(places[start]) if kind == "webdataset" else 0)
        yield Unit(
            unit=unit,
            uri=info.uri,
            format=kind,
            row_group=span.row_group,
            first=span.first + start,
            count=count,
            offset=offset,
            length=length,
            size=info.size,
            etag=info.etag,
        )
        start += count


def captions_of(manifest: Manifest, pairs: PairsConfig, limit: int) -> Iterator[str]:
    """At most `limit` captions as they are written, from units spread over the whole data set; the same each time."""
    needed = -(-limit * len(manifest.units) // max(manifest.count, 1))
    step = max(1, len(manifest.units) // max(needed, 1))
    return itertools.islice(read_captions(manifest.units[::step], pairs), limit)
