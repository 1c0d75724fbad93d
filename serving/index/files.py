"""What lies in an index folder, and how single rows are read from it.

Axes: R rows (image and caption pairs of the corpus), M vectors of one modality, D width of the joint space.
"""

import hashlib
import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from models.config import InputError

FORMAT = "triptych-index-1"
ABOUT = "index.json"
"""Written last: it names every other file with its size and hash, and makes the folder complete."""
ROWS = "rows.arrow"
"""Columns id, caption, uri: one row a pair, (R)."""
THUMBNAILS = "thumbnails.arrow"
"""Column thumbnail: one row an image, in the order of the image vectors."""
POSITIONS = "places.npy"
"""int64 (R, 2): positions of the row's image and of its caption among the vectors of their modality."""
IDS = "ids.npy"
"""int64 (2, R): hashes of ids, and the row of each; by hash, then by row."""


def vectors_file(modality: str) -> str:
    """File of the vectors float32 (M, D), unit length."""
    return f"{modality}_vectors.npy"


def rows_file(modality: str) -> str:
    """File of the first row of each vector, int64 (M,)."""
    return f"{modality}_rows.npy"


def ann_index_file(modality: str) -> str:
    """faiss' own file, where the modality is not searched exactly."""
    return f"{modality}.faiss"


def hash_id(row_id: str) -> int:
    """A signed 64-bit hash of a row's id."""
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "little", signed=True)


def load_array(path: Path) -> np.ndarray:
    """An array of a file, memory-mapped, read only."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


class Table:
    """An Arrow IPC file, memory-mapped: single cells, without reading what stands before them. Thread-safe."""

    def __init__(self, path: Path) -> None:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def cell(self, column: int, row: int) -> Any:
        """One value; the row counts over the whole file."""
        number = bisect_right(self._starts, row) - 1
        return self._batches[number].column(column)[row - self._starts[number]].as_py()


def read_about(folder: Path, verify: bool) -> dict[str, Any]:
    """`index.json`, once every file that it names is checked (size; with `verify` also the hash).

    Raises InputError where there is no index, or one that is incomplete, damaged or of another format.
    """
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        if about.get("format") != FORMAT:
            raise InputError(f"{folder}: no index of this application (format {about.get('format')!r})")
        for name, entry in about["files"].items():
            _check_file(folder / name, entry, verify)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder}: no complete index, {ABOUT} is missing; build it with `triptych index`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: {ABOUT} is damaged; build the index again") from error
    return about


def _check_file(path: Path, entry: dict[str, Any], verify: bool) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size != entry["size"]:
        state = "is missing" if size < 0 else f"has {size:,} bytes instead of {entry['size']:,}"
        raise InputError(f"{path.parent}: the index is damaged, {path.name} {state}; fetch or build it again")
    if verify and sha256(path) != entry["sha256"]:
        raise InputError(f"{path.parent}: the index is damaged, {path.name} was changed; fetch or build it again")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
