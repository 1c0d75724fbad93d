"""Groups of units through Ray Data: each task reads a group, prepares it and streams its blocks, in plan order."""

import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import Datasource, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.experimental.internal_kv import _internal_kv_get

from pipelines.cluster.capacity import STATUS_KEY, is_scaled
from pipelines.data.epoch_plan import Group, Share, bundle, permutation
from pipelines.data.manifest import Manifest
from pipelines.data.reader import read_units
from pipelines.data.sample import Unit
from pipelines.data.skip_ledger import LEDGER, check_balance, check_skipped, ledger_rows, read_ledger, write_ledger
from pipelines.data.transforms import Columns, PrepareSettings, prepare_eval, prepare_train

__all__ = [
    "LEDGER",
    "PrepareSettings",
    "UnitsDatasource",
    "check_balance",
    "check_skipped",
    "eval_batches",
    "ledger_rows",
    "read_ledger",
    "train_batches",
    "train_blocks",
    "write_ledger",
]

BLOCK_BYTES = 8 * 2**20
BLOCK_ROWS = 256
"""A block of prepared rows is at most so large: small enough for a first batch soon, large enough to cost little."""
TASK_ROWS = 500
"""Small groups that follow one another are read by one task up to about so many rows; a task costs some 20 ms."""
NO_PROGRESS_SECONDS = 1800
QUIET = {
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,  # its news of every execution
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,  # what ends an execution is raised too
    "ray.data.exceptions": logging.CRITICAL,
}
"""Levels of Ray Data's loggers."""

PAUSE_SECONDS = 0.05

Piece = tuple[Group, list[Unit], int, int]
"""A group, its units, the places to leave out, and the epoch."""
Work = Callable[[PrepareSettings], Iterator[Columns]]


class UnitsDatasource(Datasource):  # type: ignore[misc]  # Ray is not typed
    """One read task for each piece of work; every block holds rows that are prepared already."""

    def __init__(self, works: Sequence[tuple[Work, int]], settings: PrepareSettings) -> None:
        """`works` are (what to do, rows that come of it) in order."""
        super().__init__()
        self._works, self._settings = works, settings

    def get_name(self) -> str:
        """Shown in Ray's logs."""
        return "Units"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all prepared rows, about."""
        return sum(rows for _, rows in self._works) * _row_bytes(self._settings)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """The tasks, in order, however many Ray would like."""
        shared = ray.put(self._settings)  # the tokeniser goes to each node once, not with each task
        size = _row_bytes(self._settings)
        return [
            ReadTask(
                partial(_run, work, shared),
                BlockMetadata(num_rows=rows, size_bytes=rows * size, input_files=None, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for work, rows in self._works
        ]


class Pause(ExecutionCallback):  # type: ignore[misc]  # Ray is not typed
    """Lets Ray Data's scheduling loop rest between two steps.

    While finished tasks wait for a slow consumer the loop never sleeps by itself; it took 2.3 times the processor time
    of the training that it fed (tiny, two cores), in the same process. Ray waits up to 0.1 s for tasks in each step
    anyway.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called after each step of the loop."""
        time.sleep(PAUSE_SECONDS)


def _run(work: Work, shared: ray.ObjectRef) -> Iterator[Block]:
    """In a data task: do the work, one core and no more."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for columns in work(ray.get(shared)):
        yield BlockAccessor.batch_to_block(columns)


def _row_bytes(settings: PrepareSettings) -> int:
    return 6 * settings.image_size**2 + 5 * settings.max_tokens + 200


def _block_rows(settings: PrepareSettings) -> int:
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // _row_bytes(settings)))


def read_train(pieces: Sequence[Piece], seed: int, settings: PrepareSettings) -> Iterator[Columns]:
    """The rest of each group in its permuted order, as columns of `prepare_train` with group, place and epoch."""
    for group, units, skip, epoch in pieces:
        samples = read_units(units, settings.pairs)
        order = permutation(group, seed, epoch)
        step = _block_rows(settings)
        for start in range(skip, group.count, step):
            places = np.arange(start, min(start + step, group.count), dtype=np.int32)
            columns = prepare_train([samples[i] for i in order[places]], settings, epoch)
            columns |= {
                name: np.full(len(places), n, np.int32) for name, n in (("group", group.group), ("epoch", epoch))
            }
            yield columns | {"place": places}


def read_eval(units: Sequence[Unit], settings: PrepareSettings) -> Iterator[Columns]:
    """The units' samples in order, as columns of `prepare_eval`."""
    samples = read_units(units, settings.pairs)
    step = _block_rows(settings)
    for start in range(0, len(samples), step):
        yield prepare_eval(samples[start : start + step], settings)


def train_blocks(
    manifest: Manifest, plan: Iterable[tuple[int, Share]], settings: PrepareSettings, seed: int | None = None
) -> Generator[Columns, None, None]:
    """Prepared blocks of one worker's (epoch, share) pairs, all in one execution, in order; closable.

    `seed` is that of the order where it is not the draws' (`settings.seed`). An empty plan has no blocks.
    """
    pieces = [
        (group, [manifest.units[number] for number in group.units], skip, epoch)
        for epoch, share in plan
        for group, skip in share
    ]
    order = settings.seed if seed is None else seed
    yield from _stream(_train_works(pieces, order), settings, None)


def train_batches(
    manifest: Manifest, share: Share, epoch: int, seed: int, settings: PrepareSettings, batch_size: int
) -> Generator[Columns, None, None]:
    """One epoch's share in batches of `batch_size` rows, the last one smaller; closable. `seed` decides the order."""
    pieces = [(group, [manifest.units[number] for number in group.units], skip, epoch) for group, skip in share]
    yield from _stream(_train_works(pieces, seed), settings, batch_size)


def eval_batches(
    manifest: Manifest, units: Sequence[Unit], settings: PrepareSettings, batch_size: int
) -> Generator[Columns, None, None]:
    """Samples of units of the manifest in their order, in batches of columns of `prepare_eval`; closable."""
    works: list[tuple[Work, int]] = []
    for group in bundle(units):
        chosen = [manifest.units[number] for number in group.units]
        works.append((partial(read_eval, chosen), group.count))
    yield from _stream(works, settings, batch_size)


def _stream(
    works: Sequence[tuple[Work, int]], settings: PrepareSettings, batch_size: int | None
) -> Generator[Columns, None, None]:
    """Run the work on the cluster; whoever closes the generator stops it."""
    if not works:
        return
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    dataset = ray.data.read_datasource(
        UnitsDatasource(works, settings),
        num_cpus=settings.cpus,
        concurrency=_concurrency(len(works)),
        override_num_blocks=len(works),
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Pause]
    context.target_max_block_size = BLOCK_BYTES  # or Ray would gather a task's blocks into one of 128 MiB
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS  # longer than any pause of whoever reads
    batches = iter(dataset.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=2))
    try:
        yield from batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def _concurrency(tasks: int) -> int | None:
    """Most tasks at once: as many as cores, for each uses one; no limit where more nodes come when tasks wait.

    Every further task would cost a process of its own, which takes seconds of a core to start.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if is_scaled([node["Labels"] for node in nodes], _internal_kv_get(STATUS_KEY)):
        return None
    return min(tasks, max(1, int(sum(node["Resources"].get("CPU", 0) for node in nodes))))


def _train_works(pieces: Iterable[Piece], seed: int) -> list[tuple[Work, int]]:
    return [
        (partial(read_train, task, seed), sum(group.count - skip for group, _, skip, _ in task))
        for task in _tasks(pieces)
    ]


def _tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that one task reads, one after the other."""
    task: list[Piece] = []
    rows = 0
    for piece in pieces:
        count = piece[0].count - piece[2]
        if task and rows + count > TASK_ROWS:
            yield task
            task, rows = [], 0
        task.append(piece)
        rows += count
    if task:
        yield task
