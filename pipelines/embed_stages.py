"""What happens to the samples of a corpus on their way to vectors: tables of Arrow, one row a sample.

Axes: B rows, S image side, D width of the joint space.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch

from models.checkpoint import Package, load_package
from models.preprocess import clean_caption
from pipelines.evaluate import encode
from pipelines.reader import read_units
from pipelines.stages import PrepareSettings, prepare_eval
from pipelines.thumbnails import thumbnail
from pipelines.units import Sample, Unit

KEY = "sample"
"""int64: unit * 2**32 + ordinal. Which samples are done is kept as these."""
PACKAGE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
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


def _as_pixels(column: pa.ChunkedArray, side: int) -> np.ndarray:
    """Back: uint8 (B, S, S, 3)."""
    whole = column.combine_chunks()
    levels = np.frombuffer(whole.buffers()[1], np.uint8).reshape(-1, side, side, 3)
    return levels[whole.offset : whole.offset + len(whole)]


class Encoder:
    """Both encoders in one process; a Ray Data actor."""

    def __init__(self, package: ray.ObjectRef, gpu: bool) -> None:
        """`package` are the bytes of PACKAGE_FILES by name."""
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            for name, data in ray.get(package).items():
                (Path(folder) / name).write_bytes(data)
            self._package: Package = load_package(Path(folder), device="cuda" if gpu else "cpu")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Prepared rows to rows with `image_vector` (D) and `text_vectors` (a list of one (D) a caption)."""
        side, width = self._package.preprocessor.image_size, self._package.config.embed_dim
        good = np.array([reason == "" for reason in table.column("reason").to_pylist()], bool)
        captions = np.empty(len(table), object)
        captions[:] = table.column("clean").to_pylist()
        counts = np.array([len(texts) for texts in captions], np.int64)
        images, texts = np.zeros((len(table), width), np.float32), np.zeros((0, width), np.float32)
        if good.any():
            rows = {
                "image": _as_pixels(table.column("pixels"), side)[good],
                "captions": captions[good],
                "image_id": table.column("image_id").to_numpy()[good],
                "reason": np.array([""] * int(good.sum()), object),
            }
            gallery = encode(self._package, [rows], keep_tokens=False)
            first = np.cumsum(counts[good]) - counts[good]  # each row's first caption knows its picture
            images[good] = gallery.images.numpy()[gallery.relevance.owner.numpy()[first]]
            texts = gallery.texts.numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        kept = table.drop_columns(["pixels", "clean"])
        kept = kept.append_column("image_vector", as_vectors(images))
        return kept.append_column("text_vectors", pa.ListArray.from_arrays(offsets, as_vectors(texts)))


def as_vectors(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """float32 (B, D) as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), vectors.shape[1])
