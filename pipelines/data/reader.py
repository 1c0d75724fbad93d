"""Units to samples. Whatever is damaged or gone becomes rows with a reason; only a store that is down raises."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import pyarrow as pa

from models.config import InputError
from models.redact import redact
from pipelines import storage
from pipelines.config import PairsConfig
from pipelines.data import parquet, webdataset
from pipelines.data.sample import Sample, Unit, failed

_PAUSES = (1.0, 4.0)  # seconds before a store that is down is asked again
_READERS = 4

logger = logging.getLogger(__name__)


def read_units(units: Sequence[Unit], pairs: PairsConfig) -> list[Sample]:
    """All samples of the units, in the order of `units`, each with `count` rows whatever is wrong with its file.

    A Parquet row group is read once for all its units. Raises `storage.Unavailable` where the store stays down.
    """
    parts = [list(part) for _, part in groupby(sorted(units, key=_part), key=_part)]
    if len(parts) == 1 or storage.is_local(units[0].uri):
        read = [_read_part(part, pairs) for part in parts]
    else:
        with ThreadPoolExecutor(min(_READERS, len(parts))) as pool:
            read = list(pool.map(lambda part: _read_part(part, pairs), parts))
    by_unit = {unit: rows for part in read for unit, rows in part.items()}
    return [sample for unit in units for sample in by_unit[unit.unit]]


def _part(unit: Unit) -> tuple[str, int, int]:
    """What is read together: the units of a row group; a range of a tar stands alone."""
    return unit.uri, unit.row_group, unit.first if unit.row_group < 0 else 0


def _read_part(units: list[Unit], pairs: PairsConfig) -> dict[int, list[Sample]]:
    """Rows by unit, every unit complete."""
    rows: dict[int, dict[int, Sample]] = {unit.unit: {} for unit in units}
    reason, detail = "unreadable", "damaged: fewer samples than when it was indexed"
    try:
        for sample in patiently(lambda: _samples(units, pairs)):
            rows[sample.unit].setdefault(sample.ordinal, sample)
    except storage.Unavailable:
        raise
    except InputError as error:
        reason, detail = "fetch_failed", str(error)
    except (pa.ArrowException, OSError) as error:
        detail = redact(f"damaged file: {error}")
    return {
        unit.unit: [
            rows[unit.unit].get(ordinal) or failed(unit, ordinal, reason, detail) for ordinal in range(unit.count)
        ]
        for unit in units
    }


def patiently(read: Callable[[], Iterator[Sample]]) -> Iterator[Sample]:
    """`read`'s samples, from the start again while the store is down; raises `storage.Unavailable` in the end."""
    for pause in (*_PAUSES, None):
        try:
            yield from read()
            return
        except storage.Unavailable as error:
            if pause is None:
                raise
            logger.warning("%s; trying again", error)
            time.sleep(pause)


def _samples(units: list[Unit], pairs: PairsConfig) -> Iterator[Sample]:
    first = units[0]
    changed = _changed(first)
    if changed:
        raise InputError(changed)
    try:
        if first.format == "parquet":
            yield from parquet.read_table(units, pairs) if first.row_group >= 0 else [parquet.why_damaged(first)]
        else:
            yield from webdataset.read_archive(first) if first.length else [webdataset.why_damaged(first)]
    except (pa.ArrowException, OSError) as error:
        if storage.is_outage(error):
            raise storage.explain(first.uri, error) from error
        raise


def _changed(unit: Unit) -> str:
    """What is wrong with a file that is not the one that was indexed, else ""."""
    with storage.open_input(unit.uri) as file:
        size = file.size()
    if size == unit.size:
        return ""
    return f"{unit.uri}: {size} bytes, {unit.size} when it was indexed; index the data again"


def read_captions(units: Iterable[Unit], pairs: PairsConfig) -> Iterator[str]:
    """Captions as they are written, those of samples that can be read; from Parquet without the images."""
    for (_, row_group, _), part in groupby(units, key=_part):
        chosen = list(part)
        try:
            if row_group >= 0:
                yield from parquet.read_captions(chosen, pairs)
            else:
                for sample in _samples(chosen, pairs):
                    yield from sample.captions
        except storage.Unavailable:
            raise
        except (InputError, pa.ArrowException, OSError) as error:
            logger.warning("%s", redact(f"no captions from {chosen[0].uri}: {error}"))
