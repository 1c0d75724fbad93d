"""What a run must be able to prove: which samples were skipped and why, and (on request) which were trained when."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from models.collectives import Workers
from pipelines.data.loader import Rows
from pipelines.data.ray_data import LEDGER

IDS = pa.schema(
    [
        ("step", pa.int64()),
        ("rank", pa.int32()),
        ("epoch", pa.int32()),
        ("sample_id", pa.string()),
        ("unit", pa.int32()),
        ("ordinal", pa.int32()),
        ("id", pa.string()),
    ]
)
"""`ids.parquet`: one row a trained sample; `sample_id` is `<unit>-<ordinal>` of the manifest."""


class Records:
    """Rows noted on this worker since the last checkpoint, and on rank 0 all rows of the run."""

    def __init__(self, record_ids: bool) -> None:
        self._record_ids = record_ids
        self._new: dict[str, list[dict[str, Any]]] = {"skipped": [], "ids": []}
        self._all = {"skipped": LEDGER.empty_table(), "ids": IDS.empty_table()}
        self.skipped_in_epoch = 0

    def restore(self, skipped: pa.Table | None, ids: pa.Table | None) -> None:
        """Go on from a checkpoint's tables."""
        self._all["skipped"] = LEDGER.empty_table() if skipped is None else skipped
        self._all["ids"] = IDS.empty_table() if ids is None else ids

    def add(self, rows: Rows | None, step: int, rank: int) -> None:
        """Note the rows that this worker took in one step."""
        if rows is None:
            return
        skipped = rows.skipped()
        self._new["skipped"] += skipped
        self.skipped_in_epoch += len(skipped)
        if self._record_ids:
            self._new["ids"] += [entry | {"step": step, "rank": rank} for entry in rows.trained()]

    def gather(self, workers: Workers, device: torch.device) -> None:
        """Bring the new rows of all workers to every worker; rank 0's tables are what is written."""
        for name, schema in (("skipped", LEDGER), ("ids", IDS)):
            mine = pa.Table.from_pylist(self._new[name], schema)
            self._new[name] = []
            self._all[name] = pa.concat_tables([self._all[name], *_exchange(mine, workers, device)])

    def tables(self) -> dict[str, pa.Table]:
        """What a checkpoint carries."""
        return dict(self._all) if self._record_ids else {"skipped": self._all["skipped"]}


def _exchange(table: pa.Table, workers: Workers, device: torch.device) -> list[pa.Table]:
    """Every worker's table, by rank: as Parquet bytes through the one collective there is."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8).to(device)
    counts = workers.row_counts(len(data))
    pieces = workers.all_gather_rows(data, counts).cpu().split(counts)
    return [pq.read_table(pa.BufferReader(piece.numpy().tobytes())) for piece in pieces]
