"""Samples of a corpus, read and decoded, on their way to vectors: tables of Arrow, one row a sample.

Processes that read import this, and should not wait for a model's libraries. Axes: B rows, S image side.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from models.preprocess import clean_caption
from pipelines.data.reader import read_units
from pipelines.data.sample import Sample, Unit
from pipelines.data.transforms import PrepareSettings, prepare_eval
from pipelines.embed.thumbnails import thumbnail

KEY = "sample"
"""int64: unit * 2**32 + ordinal. Which samples are done is kept as these."""
_ROWS = 64


def sample_key(unit: int, ordinal: int) -> int:
    """The sample id as one number."""
    return (unit << 32) + ordinal


def read_prepared(
    units: Sequence[Unit], done: np.ndarray, thumbnail_side: int, settings: PrepareSettings
) -> Iterator[pa.Table]:
    """The units' samples in order, prepared, without those whose key is in `done` (int64, sorted)."""
    samples = read_units(units, settings.pairs)
    keys = np.array([sample_key(sample.unit, sample.ordinal) for sample in samples], np.int64)
    left = [sample for sample, skip in zip(samples, np.isin(keys, done), strict=True) if not skip]
    for start in range(0, len(left), _ROWS):
        yield prepare(left[start : start + _ROWS], settings, thumbnail_side)


def prepare(samples: Sequence[Sample], settings: PrepareSettings, thumbnail_side: int) -> pa.Table:
    """Decode and clean, exactly as evaluation does.

    Columns: KEY, unit, ordinal, id, uri, image_id (hash, int64), reason, detail, `pixels` (S x S x 3 bytes), `clean`
    (list of clean captions), `written` (the same captions as they were written), `thumbnail` (JPEG; null without).
    """
    columns = prepare_eval(samples, settings)
    bad, words = columns["reason"] != "", settings.pairs.max_caption_words
    written = [
        [] if skip else [text for text in sample.captions if clean_caption(text, words)]
        for sample, skip in zip(samples, bad, strict=True)
    ]
    small = [
        thumbnail(sample.image, thumbnail_side) if thumbnail_side and not skip else None
        for sample, skip in zip(samples, bad, strict=True)
    ]
    clean = [[] if skip else texts for texts, skip in zip(columns["captions"].tolist(), bad, strict=True)]
    texts = {name: pa.array(columns[name].tolist(), pa.string()) for name in ("id", "uri", "reason", "detail")}
    return pa.table(
        {
            KEY: pa.array([sample_key(sample.unit, sample.ordinal) for sample in samples], pa.int64()),
            **{name: pa.array(columns[name]) for name in ("unit", "ordinal", "image_id")},
            **texts,
            "pixels": _as_bytes(columns["image"]),
            "clean": pa.array(clean, pa.list_(pa.string())),
            "written": pa.array(written, pa.list_(pa.string())),
            "thumbnail": pa.array(small, pa.binary()),
        }
    )


def _as_bytes(pixels: np.ndarray) -> pa.Array:
    """uint8 (B, ...) as one binary value a row."""
    width = pixels[0].size if len(pixels) else 1
    buffers = [None, pa.py_buffer(np.ascontiguousarray(pixels))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(pixels), buffers)
