"""The skip ledger: every sample that was not trained, and why. Rows in = rows out + ledger rows."""

import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.config import InputError
from pipelines import storage

LEDGER = pa.schema(
    [
        ("sample_id", pa.string()),
        ("epoch", pa.int32()),
        ("unit", pa.int32()),
        ("ordinal", pa.int32()),
        ("id", pa.string()),
        ("uri", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""`skipped.parquet`: one row a skipped sample; `sample_id` is `<unit>-<ordinal>` of the manifest."""


def ledger_rows(batch: Mapping[str, np.ndarray], epoch: int) -> pa.Table:
    """The rows of a prepared batch that have a reason."""
    bad = batch["reason"] != ""
    columns = {name: batch[name][bad].tolist() for name in ("unit", "ordinal", "id", "uri", "reason", "detail")}
    sample_id = [f"{unit}-{ordinal}" for unit, ordinal in zip(columns["unit"], columns["ordinal"], strict=True)]
    return (
        pa.table(columns | {"sample_id": sample_id, "epoch": [epoch] * len(sample_id)})
        .select(LEDGER.names)
        .cast(LEDGER)
    )


def write_ledger(uri: str, table: pa.Table) -> None:
    """Write a ledger as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_bytes(uri, sink.getvalue())


def read_ledger(uri: str) -> pa.Table:
    """Read it back. Raises InputError where it is missing or not a ledger."""
    data = storage.read_bytes(uri)
    try:
        return pq.read_table(pa.BufferReader(data)).select(LEDGER.names).cast(LEDGER)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{uri}: not a ledger of skipped samples ({error})") from error


def check_balance(planned: int, trained: int, skipped: int) -> None:
    """Raise RuntimeError, for it is our own mistake, unless every planned row was either trained or skipped."""
    if planned != trained + skipped:
        raise RuntimeError(f"{planned} samples planned, but {trained} trained and {skipped} skipped")


def check_skipped(planned: int, skipped: int, max_skipped: float) -> None:
    """Raise InputError where more than the allowed share of an epoch was skipped."""
    if skipped > max_skipped * planned:
        raise InputError(
            f"pairs.max_skipped: {skipped} of {planned} samples were skipped, more than {max_skipped:.0%}; "
            "`triptych data lint` lists them with the reason"
        )


def reasons_of(table: pa.Table) -> dict[str, int]:
    """How many rows have each reason, the most frequent first."""
    counts: Counter[Any] = Counter(table.column("reason").to_pylist())
    return dict(counts.most_common())
