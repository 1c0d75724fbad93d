"""Vectors to Parquet through Ray Data, which notes what is written so that a killed job goes on where it was."""

import posixpath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ray.data._internal.planner.plan_write_op import WRITE_UUID_KWARG_NAME
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from pipelines import storage
from pipelines.data.skip_ledger import LEDGER, ledger_rows

SKIPPED = "_skipped"
"""Folder of ledger rows below the vectors, while a job runs; the leading _ hides it from readers of the vectors."""
_PLAIN = ("image_vector", "text_vector")
_ROW_GROUP = 4096
_DICTIONARY_BYTES = 16 * 2**20  # so that the thumbnail of an image with several captions is stored once


class VectorSink(BlockBasedFileDatasink):  # type: ignore[misc]  # Ray is not typed
    """Each write task makes one file of rows, and one of skipped rows where there are any, under the same name.

    Ray Data removes files that begin with a task's name when the task did not come to its end.
    """

    def __init__(self, uri: str, rows_per_file: int, thumbnails: bool) -> None:
        """`uri` is the folder of the vectors."""
        system, path = storage.filesystem(uri)
        super().__init__(path, filesystem=system, file_format="parquet", min_rows_per_file=rows_per_file)
        self._thumbnails = thumbnails

    def write_block(self, block: BlockAccessor, block_index: int, ctx: Any) -> None:
        """In a write task."""
        table = block.to_arrow()
        name = self.filename_provider.get_filename_for_task(ctx.kwargs[WRITE_UUID_KWARG_NAME], ctx.task_idx)
        skipped = ledger_of(table)
        if len(skipped):
            self._write(skipped, posixpath.join(self.path, SKIPPED, name))
        rows = pairs_of(table, self._thumbnails)
        if len(rows):
            self._write(rows, posixpath.join(self.path, name))

    def _write(self, table: pa.Table, path: str) -> None:
        plain = [name for name in table.column_names if name not in _PLAIN]
        with self.open_output_stream(path) as stream:
            pq.write_table(
                table,
                stream,
                row_group_size=_ROW_GROUP,
                use_dictionary=plain,
                dictionary_pagesize_limit=_DICTIONARY_BYTES,
            )


def pairs_of(table: pa.Table, thumbnails: bool) -> pa.Table:
    """Samples that were encoded, a row each caption: unit, ordinal, id, image_id, uri, caption, vectors, thumbnail."""
    good = table.filter(pc.equal(table.column("reason"), "")).combine_chunks()
    texts, vectors = (good.column(name).combine_chunks() for name in ("written", "text_vectors"))
    owner = pc.list_parent_indices(texts)
    columns = {name: good.column(name).take(owner) for name in ("unit", "ordinal", "id", "image_id", "uri")}
    columns["caption"] = pc.list_flatten(texts)
    columns["image_vector"] = good.column("image_vector").take(owner)
    columns["text_vector"] = pc.list_flatten(vectors)
    if thumbnails:
        columns["thumbnail"] = good.column("thumbnail").take(owner)
    return pa.table(columns)


def ledger_of(table: pa.Table) -> pa.Table:
    """Ledger rows of the samples that were skipped."""
    if not pc.any(pc.not_equal(table.column("reason"), "")).as_py():
        return LEDGER.empty_table()
    columns = {
        name: np.array(table.column(name).to_pylist(), object)
        for name in ("unit", "ordinal", "id", "uri", "reason", "detail")
    }
    return ledger_rows(columns, epoch=0)
