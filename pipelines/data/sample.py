"""What a data set is made of: units (ranges of a file, indexed once) and the raw samples read from them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

REASONS = (
    "unreadable",
    "too_large",
    "too_small",
    "empty_caption",
    "missing_member",
    "fetch_failed",
)
"""Why a sample is skipped: bytes that are no image (or a damaged file), too many pixels, too short a side, a caption
without words, no image or no caption at all, a file that has gone, changed or cannot be opened."""

Format = Literal["parquet", "webdataset"]


@dataclass(frozen=True)
class Unit:
    """A range of samples in one file: what is read in one go."""

    unit: int
    """Its number in the manifest."""
    uri: str
    """The file."""
    format: Format
    row_group: int
    """Parquet row group, -1 for a tar or a file that could not be indexed."""
    first: int
    """Number of its first sample in the file (Parquet: row, over all row groups)."""
    count: int
    """Samples."""
    offset: int
    """First byte of the range (Parquet: of the row group)."""
    length: int
    """Bytes of its samples (Parquet: its share of the row group's)."""
    size: int
    """Bytes of the file when it was indexed."""
    etag: str
    """The file's etag when it was indexed."""


@dataclass(frozen=True)
class Span:
    """Samples that stand together in a file, before they are cut into units."""

    row_group: int
    """Parquet row group, -1 for a tar or for damage."""
    first: int
    """Number of the first sample in the file."""
    offset: int
    """First byte."""
    sizes: np.ndarray
    """Bytes of each sample; int64 (samples,)."""


def damage(first: int, offset: int) -> Span:
    """Stands for what cannot be indexed in a file: one row, which says so when it is read."""
    return Span(-1, first, offset, np.zeros(1, np.int64))


class Sample(NamedTuple):
    """A pair as read, not yet decoded. `reason` is not empty where it could not be read."""

    unit: int
    ordinal: int
    """Its number in the unit."""
    id: str
    """The user's own key, else <unit>-<ordinal>."""
    uri: str
    """Names the one sample: FILE#row=N or FILE#MEMBER."""
    image: bytes
    captions: tuple[str, ...]
    image_id: str
    """The user's identity of the image; empty: by its bytes."""
    reason: str = ""
    detail: str = ""


def failed(unit: Unit, ordinal: int, reason: str, detail: str) -> Sample:
    """The row of a sample that could not be read."""
    uri = f"{unit.uri}#row={unit.first + ordinal}" if unit.format == "parquet" else f"{unit.uri}#sample={ordinal}"
    return Sample(unit.unit, ordinal, f"{unit.unit}-{ordinal}", uri, b"", (), "", reason, detail[:200])
