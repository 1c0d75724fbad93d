"""One sample's image by its `uri` (docs/formats.md, contract 1): FILE#row=N, FILE#MEMBER, or a path or URL."""

import io
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from models.config import InputError
from pipelines import storage

_ROWS = 64  # rows decoded at a time
_ARCHIVES = 16  # archives whose members are remembered


def read_image(uri: str, image_column: str = "image") -> bytes:
    """The encoded image. Of a Parquet file only the row group that holds the row is read, of a tar one member.

    Raises InputError where it is not there: file, row, member, column or image.
    """
    row = re.fullmatch(r"(.+\.parquet)#row=(\d+)", uri, re.DOTALL)
    if row:
        return _from_table(row[1], int(row[2]), image_column)
    for file, member in _splits(uri):
        if storage.exists(file):
            return _from_archive(file, member)
    return storage.read_bytes(uri)


def _splits(uri: str) -> Iterator[tuple[str, str]]:
    """(archive, member) for each place where the one may end: names of folders and members may hold a # too."""
    for found in re.finditer(r"\.tar#", uri):
        yield uri[: found.end() - 1], uri[found.end() :]


def _from_table(uri: str, row: int, image_column: str) -> bytes:
    with storage.open_input(uri) as file, storage.errors_about(uri):
        parquet = pq.ParquetFile(file)
        field = _field(parquet.schema_arrow, image_column)
        if field is None:
            raise InputError(f"{uri}: no column {image_column} of images")
        for number in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(number).num_rows
            if row < rows:
                image = _cell(parquet, number, row, field)
                if not image:
                    raise InputError(f"{uri}#row={row}: no image in this row")
                return image
            row -= rows
    raise InputError(f"{uri}: no such row; it has {parquet.metadata.num_rows:,}")


def _field(schema: pa.Schema, column: str) -> str | None:
    """The Parquet column of the bytes; None where there is none."""
    if column not in schema.names:
        return None
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        return f"{column}.bytes" if kind.get_field_index("bytes") >= 0 else None
    return column if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def _cell(parquet: pq.ParquetFile, group: int, row: int, field: str) -> bytes | None:
    """The bytes at a row of a row group."""
    for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=[field]):
        if row < len(batch):
            value = batch.column(0)[row].as_py()
            found: bytes | None = value["bytes"] if isinstance(value, dict) else value
            return found
        row -= len(batch)
    return None


def _from_archive(uri: str, member: str) -> bytes:
    system, path = storage.filesystem(uri)
    with storage.errors_about(uri):
        info = system.get_file_info(path)
    place = _members(uri, info.size, info.mtime_ns or 0).get(member)
    if place is None:
        raise InputError(f"{uri}: no member {member} in the archive")
    return storage.read_bytes(uri, *place)


@lru_cache(maxsize=_ARCHIVES)
def _members(uri: str, _size: int, _changed: int) -> dict[str, tuple[int, int]]:
    """(first byte, bytes) of each member, by its name as `uri` has it; headers alone are read, once a file."""
    places: dict[str, tuple[int, int]] = {}
    with storage.open_input(uri) as file, storage.errors_about(uri):
        try:
            with tarfile.open(fileobj=io.BufferedReader(file, 2**16), mode="r:") as archive:
                for info in archive:
                    name = info.name.removeprefix("./").encode("utf-8", "replace").decode()
                    if info.isreg():
                        places.setdefault(name, (info.offset_data, info.size))
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        except tarfile.TarError as error:
            if not places:
                raise InputError(f"{uri}: not a readable tar ({error})") from error
    return places
