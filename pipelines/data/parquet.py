"""Pairs in Parquet: how a file is indexed, and how ranges of its rows are read."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from models.config import InputError
from models.redact import redact
from pipelines import storage
from pipelines.config import PairsConfig
from pipelines.data.sample import Sample, Span, Unit, failed

_LARGE = 64 * 2**20  # a row group of more bytes is streamed page by page, not held as a whole
_ROWS = 1024  # rows decoded at a time

logger = logging.getLogger(__name__)


def index_table(uri: str, pairs: PairsConfig) -> list[Span]:
    """The row groups of a file. Raises InputError for missing columns, ArrowException or OSError for a damaged file."""
    with storage.open_input(uri) as file:
        parquet = pq.ParquetFile(file)
        needed = _columns(parquet.schema_arrow, uri, pairs)
        spans, first = [], 0
        for number in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(number)
            chunks = [group.column(i) for i in range(group.num_columns)]
            chunks = [c for c in chunks if any(f"{c.path_in_schema}.".startswith(f"{name}.") for name in needed)]
            size, rows = sum(c.total_uncompressed_size for c in chunks), group.num_rows
            offset = min((c.dictionary_page_offset or c.data_page_offset for c in chunks), default=0)
            if size > 4 * _LARGE:
                logger.warning(
                    "%s: row group %d holds %d rows in %d MiB and is read again for each group of samples; "
                    "written with row groups of at most 1000 rows it is read faster",
                    redact(uri),
                    number,
                    rows,
                    size >> 20,
                )
            spans.append(Span(number, first, offset, np.full(rows, -(-size // max(rows, 1)))))
            first += rows
        return [span for span in spans if len(span.sizes)]


def _columns(schema: pa.Schema, uri: str, pairs: PairsConfig) -> list[str]:
    """Columns to read: image (its bytes where it is a struct), caption, and the two ids where they are there."""
    missing = [name for name in (pairs.image_column, pairs.caption_column) if name not in schema.names]
    if missing:
        raise InputError(
            f"{uri}: no column {' and no column '.join(missing)}, it has {', '.join(schema.names)}; "
            "name yours with --pairs.image-column and --pairs.caption-column"
        )
    image, caption = schema.field(pairs.image_column).type, schema.field(pairs.caption_column).type
    if types.is_struct(image) and image.get_field_index("bytes") >= 0:
        columns = [f"{pairs.image_column}.bytes"]
        image = image.field("bytes").type
    else:
        columns = [pairs.image_column]
    if not (types.is_binary(image) or types.is_large_binary(image)):
        raise InputError(f"{uri}: column {pairs.image_column} holds {image}; the image's bytes are needed")
    if types.is_list(caption) or types.is_large_list(caption):
        caption = caption.value_type
    if types.is_dictionary(caption):
        caption = caption.value_type
    if not (types.is_string(caption) or types.is_large_string(caption) or types.is_null(caption)):
        raise InputError(
            f"{uri}: column {pairs.caption_column} holds {caption}; a string or a list of strings is needed"
        )
    extra = [name for name in (pairs.id_column, pairs.image_id_column) if name in schema.names]
    return [*columns, pairs.caption_column, *extra]


def read_table(units: list[Unit], pairs: PairsConfig) -> Iterator[Sample]:
    """Samples of units of one row group, unit by unit in the order of their rows; the row group is read once.

    Raises InputError where the file cannot be opened, ArrowException or OSError where it is damaged.
    """
    units = sorted(units, key=lambda unit: unit.first)
    with storage.open_input(units[0].uri) as file:
        number, metadata = units[0].row_group, pq.read_metadata(file)
        large = metadata.row_group(number).total_byte_size > _LARGE
        parquet = pq.ParquetFile(file, metadata=metadata, buffer_size=4 * 2**20 if large else 0, pre_buffer=not large)
        row = sum(metadata.row_group(i).num_rows for i in range(number))
        columns = _columns(parquet.schema_arrow, units[0].uri, pairs)
        end = units[-1].first + units[-1].count
        for batch in parquet.iter_batches(_ROWS, row_groups=[number], columns=columns):
            for unit in units:
                start, stop = max(unit.first, row), min(unit.first + unit.count, row + len(batch))
                if start < stop:
                    yield from _samples(unit, start, batch.slice(start - row, stop - start), pairs)
            row += len(batch)
            if row >= end:
                return


def _samples(unit: Unit, row: int, batch: pa.RecordBatch, pairs: PairsConfig) -> Iterator[Sample]:
    """The rows of `batch`, the first of which is row `row` of the file."""
    names, nothing = batch.schema.names, [None] * len(batch)

    def column(name: str) -> list[Any]:
        return batch.column(name).to_pylist() if name in names else nothing

    images = batch.column(pairs.image_column)
    if types.is_struct(images.type):
        images = images.field("bytes")
    columns = [column(name) for name in (pairs.caption_column, pairs.id_column, pairs.image_id_column)]
    rows = zip(images.to_pylist(), *columns, strict=True)
    for number, (image, caption, key, image_id) in enumerate(rows, row):
        ordinal = number - unit.first
        captions = (caption,) if isinstance(caption, str) else tuple(c for c in caption or () if c is not None)
        lacks = " and ".join(
            what for what, there in (("image", image is not None), ("caption", bool(captions))) if not there
        )
        yield Sample(
            unit.unit,
            ordinal,
            f"{unit.unit}-{ordinal}" if key is None else str(key),
            f"{unit.uri}#row={number}",
            image or b"",
            captions,
            "" if image_id is None else str(image_id),
            "missing_member" if lacks else "",
            f"no {lacks}" if lacks else "",
        )


def read_captions(units: list[Unit], pairs: PairsConfig) -> Iterator[str]:
    """The captions alone of units of one row group; no image is read."""
    with storage.open_input(units[0].uri) as file:
        parquet = pq.ParquetFile(file)
        row = sum(parquet.metadata.row_group(i).num_rows for i in range(units[0].row_group))
        column = parquet.read_row_group(units[0].row_group, columns=[pairs.caption_column]).column(0)
    for unit in units:
        for caption in column.slice(unit.first - row, unit.count).to_pylist():
            yield from (caption,) if isinstance(caption, str) else (c for c in caption or () if c is not None)


def why_damaged(unit: Unit) -> Sample:
    """The row that stands for a file without a readable footer."""
    try:
        with storage.open_input(unit.uri) as file:
            pq.ParquetFile(file)
    except InputError:
        raise
    except (pa.ArrowException, OSError) as error:
        return failed(unit, 0, "unreadable", f"not a readable Parquet file: {error}")
    return failed(unit, 0, "unreadable", "was damaged when it was indexed; index it again")
