"""Prepared samples to vectors, in a process that holds both encoders.

Axes: B rows, S image side, D width of the joint space.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch

from models.inference import embed_images, embed_texts
from models.package import load_package

PACKAGE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")


class Encoder:
    """Both encoders in one process; a Ray Data actor."""

    def __init__(self, package: ray.ObjectRef, gpu: bool) -> None:
        """`package` are the bytes of PACKAGE_FILES by name."""
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            for name, data in ray.get(package).items():
                (Path(folder) / name).write_bytes(data)
            self._package = load_package(Path(folder), device="cuda" if gpu else "cpu")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Prepared rows to rows with `image_vector` (D) and `text_vectors` (a list of one (D) a caption)."""
        side, width = self._package.preprocessor.image_size, self._package.config.embed_dim
        good = np.array([reason == "" for reason in table.column("reason").to_pylist()], bool)
        captions = np.empty(len(table), object)
        captions[:] = table.column("clean").to_pylist()
        counts = np.array([len(texts) for texts in captions], np.int64)
        images, texts = np.zeros((len(table), width), np.float32), np.zeros((0, width), np.float32)
        if good.any():
            pixels = _as_pixels(table.column("pixels"), side)[good]
            # An image that lies in several rows, one for each of its captions, is encoded once.
            _, first, row_of = np.unique(
                table.column("image_id").to_numpy()[good], return_index=True, return_inverse=True
            )
            images[good] = embed_images(self._package, pixels[first])[row_of]
            clean = [caption for row in captions[good] for caption in row]
            tokens = self._package.tokenizer.encode_rows(clean, self._package.preprocessor.max_tokens)
            texts = embed_texts(self._package, tokens)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        kept = table.drop_columns(["pixels", "clean"])
        kept = kept.append_column("image_vector", as_vectors(images))
        return kept.append_column("text_vectors", pa.ListArray.from_arrays(offsets, as_vectors(texts)))


def as_vectors(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """float32 (B, D) as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), vectors.shape[1])


def _as_pixels(column: pa.ChunkedArray, side: int) -> np.ndarray:
    """Back: uint8 (B, S, S, 3)."""
    whole = column.combine_chunks()
    width, start = side * side * 3, whole.offset
    levels = np.frombuffer(whole.buffers()[1], np.uint8, len(whole) * width, start * width)  # it may be longer
    return levels.reshape(-1, side, side, 3)
