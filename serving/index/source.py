"""What an index is built from: the folder of vectors that `triptych embed` wrote.

Axes: B rows of a batch, R rows in all, D width of the joint space.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.config import InputError

VECTORS_FORMAT = "triptych-vectors-1"
ABOUT = "vectors.json"
BATCH_ROWS = 4096
COLUMNS = ("id", "caption", "uri", "image_vector", "text_vector")
"""What every file has; `image_id` (int64) and `thumbnail` besides where they are there."""


@dataclass(frozen=True)
class Source:
    """A complete folder of vectors."""

    folder: Path
    name: str
    embedding_space: str
    dimensions: int
    manifest: str
    files: dict[str, int]
    """Rows of each Parquet file, by its name below the folder, in the order of the corpus."""

    @property
    def count(self) -> int:
        """R."""
        return sum(self.files.values())

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Record batches of these columns (of those that are there), in order, all R rows.

        Raises InputError where a file is missing, damaged or not what `vectors.json` says.
        """
        for name, expected in self.files.items():
            yield from _batches(self.folder / name, columns, expected)


def open_source(folder: Path) -> Source:
    """Read `vectors.json`. Raises InputError where the folder is none of vectors, or its writing did not end."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        if about.get("format") != VECTORS_FORMAT:
            raise InputError(f"{folder}: no vectors of this application (format {about.get('format')!r})")
        source = Source(
            folder=folder,
            name=str(about["name"]),
            embedding_space=str(about["embedding_space"]),
            dimensions=int(about["dimensions"]),
            manifest=str(about["manifest"]),
            files={str(entry["name"]): int(entry["rows"]) for entry in about["files"]},
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{folder}: no complete folder of vectors, {ABOUT} is missing; run `triptych embed` (again)"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: {ABOUT} is damaged; embed the corpus again") from error
    if not source.count:
        raise InputError(f"{folder}: it holds no vectors")
    return source


def _batches(path: Path, columns: Sequence[str], expected: int) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            rows = file.metadata.num_rows
            if rows != expected:
                raise InputError(f"{path}: {rows:,} rows instead of {expected:,}; embed again")
            there = [name for name in columns if name in file.schema_arrow.names]
            missing = [name for name in columns if name in COLUMNS and name not in there]
            if missing:
                raise InputError(f"{path}: no column {' and no column '.join(missing)}")
            yield from file.iter_batches(BATCH_ROWS, columns=there)
    except FileNotFoundError as error:
        raise InputError(f"{path}: the file is missing; embed again") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged ({error}); embed again") from error


def vectors_of(batch: pa.RecordBatch, column: str, dimensions: int, folder: Path) -> np.ndarray:
    """float32 (B, D) of a column of vectors. Raises InputError for another width, or vectors not of length 1."""
    flat = batch.column(column).flatten().to_numpy(zero_copy_only=False)
    if flat.size != len(batch) * dimensions:
        raise InputError(f"{folder}: {column} does not hold vectors of {dimensions} numbers; embed again")
    vectors = np.ascontiguousarray(flat, np.float32).reshape(-1, dimensions)
    if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        raise InputError(f"{folder}: {column} holds vectors that are not of length 1; embed again")
    return vectors
