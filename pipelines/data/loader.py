"""This worker's rows, step by step: its share of each epoch, planned from what is done, read ahead across epochs."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipelines.config import ExperimentConfig
from pipelines.data.epoch_plan import Group, Position, groups, shares
from pipelines.data.manifest import Manifest
from pipelines.data.ray_data import PrepareSettings, train_blocks

READ_AHEAD_TASKS = 512
"""Epochs are chained into one Ray Data execution of about so many read tasks: starting one takes a second or
two, for which short epochs would wait each time."""

Columns = Mapping[str, np.ndarray]


class Rows:
    """Rows of one epoch as columns; a row with a `reason` was skipped, but its position counts."""

    TENSORS = ("views", "ids", "mask", "key", "image_id", "caption_id")

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._good = columns["reason"] == ""

    def __len__(self) -> int:
        return len(self._good)

    @property
    def good(self) -> int:
        """Rows that are trained."""
        return int(self._good.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest good caption."""
        return int(self.columns["mask"][self._good].sum(1).max()) if self.good else 0

    def column(self, name: str) -> np.ndarray:
        """The good rows' values, writable and contiguous."""
        return np.ascontiguousarray(self.columns[name][self._good]).copy()

    def skipped(self) -> list[dict[str, Any]]:
        """Ledger rows."""
        return self._entries(~self._good, ("epoch", "unit", "ordinal", "id", "uri", "reason", "detail"))

    def trained(self) -> list[dict[str, Any]]:
        """Rows of `ids.parquet`, without step and rank."""
        return self._entries(self._good, ("epoch", "unit", "ordinal", "id"))

    def _entries(self, chosen: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
        entries = [
            dict(zip(names, values, strict=True))
            for values in zip(*(self.columns[name][chosen].tolist() for name in names), strict=True)
        ]
        return [entry | {"sample_id": f"{entry['unit']}-{entry['ordinal']}"} for entry in entries]


class EpochStream:
    """Hands out this worker's rows and keeps count of what it has consumed of each group."""

    def __init__(
        self,
        experiment: ExperimentConfig,
        manifest: Manifest,
        tokenizer_json: str,
        workers: tuple[int, int],
        position: Position,
        planned: int,
    ) -> None:
        """`workers` is (rank, world size); `planned` counts positions from the start of the run."""
        self._experiment, self._manifest = experiment, manifest
        self._rank, self._world = workers
        self._settings = PrepareSettings.of(experiment, tokenizer_json)
        total = experiment.optim.batch_size
        self._rows_a_step = total // self._world + (self._rank < total % self._world)
        self._next_epoch, self._last_epoch = position.epoch, -(-planned // manifest.count) - 1
        self._resume_from = position
        self._blocks: Iterator[Columns] = iter(())
        self._held: list[Columns] = []
        self.done: dict[int, int] = {}
        """Positions consumed by this worker of each of its groups, in the running epoch."""
        self._epoch = position.epoch

    def next_rows(self, epoch: int) -> Rows | None:
        """The next rows of `epoch` for one step; None when this worker has no more of it."""
        if epoch != self._epoch:
            self._epoch, self.done = epoch, {}
        taken: list[Columns] = []
        missing = self._rows_a_step
        while missing > 0:
            block = self._peek()
            if block is None or int(block["epoch"][0]) != epoch:
                break
            size = min(missing, _run_length(block["epoch"]))
            taken.append({name: values[:size] for name, values in block.items()})
            self._held[0] = {name: values[size:] for name, values in block.items()}
            missing -= size
        if not taken:
            return None
        rows = Rows({name: np.concatenate([part[name] for part in taken]) for name in taken[0]})
        for group, place in zip(rows.columns["group"].tolist(), rows.columns["place"].tolist(), strict=True):
            self.done[group] = max(place + 1, self.done.get(group, 0))
        return rows

    def close(self) -> None:
        """Stop reading."""
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()

    def _peek(self) -> Columns | None:
        """The rest of the block at hand, or the next one; None at the end of the plan."""
        while not self._held or len(self._held[0]["epoch"]) == 0:
            self._held = []
            block = next(self._blocks, None)
            if block is not None:
                self._held = [block]
            elif self._next_epoch > self._last_epoch:
                return None
            else:
                self._blocks = train_blocks(self._manifest, self._plan(), self._settings)
        return self._held[0]

    def _plan(self) -> list[tuple[int, list[tuple[Group, int]]]]:
        """This worker's shares of the next epochs, as far ahead as one execution should go."""
        plan: list[tuple[int, list[tuple[Group, int]]]] = []
        tasks = 0
        while self._next_epoch <= self._last_epoch and (not plan or tasks < READ_AHEAD_TASKS):
            epoch, seed = self._next_epoch, self._experiment.seed
            done = self._resume_from.done if epoch == self._resume_from.epoch else {}
            share = shares(groups(self._manifest.units, seed, epoch), done, self._world)[self._rank]
            plan.append((epoch, share))
            tasks += len(share)
            self._next_epoch += 1
        return plan


def _run_length(values: np.ndarray) -> int:
    """How many values at the beginning are equal."""
    different = np.flatnonzero(values != values[0])
    return int(different[0]) if len(different) else len(values)
