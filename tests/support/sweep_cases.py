"""Small sweeps: their configuration, a record made by hand, the events of trials, and what a run trained."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines.artifacts.resolve import listed_checkpoints, local_copy
from pipelines.config import PRESETS, ExperimentConfig
from pipelines.data.manifest import Manifest
from tuning.sweep.sweep_record import METRIC, Protocol, Sweep, Trial

PAIRS = 300
"""Of the generated corpus."""

PLANNED = 9000
"""Samples of a trial in a record of `make_sweep`."""
SMALL = {
    "optim.min_samples": 0,
    "optim.batch_size": 32,
    "validation.pairs": 100,
    "progress.every": 1,
    "pairs.record_ids": True,
    "compute.threads": 1,
}


def base_of(corpus: Path, out: Path, preset: str = "clip-tiny", **changes: object) -> ExperimentConfig:
    """The configuration that all trials of a small sweep share."""
    paths = {"train_data": f"{corpus}/train", "val_data": f"{corpus}/val", "out": str(out), "name": "sweep"}
    return PRESETS[preset].override(SMALL | paths | changes)


def write_space(folder: Path, space: dict[str, Any]) -> str:
    """A space file; returns its path."""
    path = folder / "space.json"
    path.write_text(json.dumps(space))
    return str(path)


def make_sweep(trials: list[Trial], scheduler: str = "asha") -> Sweep:
    """The record of a sweep with these trials, of `PLANNED` samples each."""
    return Sweep(
        name="s",
        preset="clip-tiny",
        base=PRESETS["clip-tiny"].override({"checkpoints.every": 1 / 9}),
        space={},
        search="grid",
        scheduler=scheduler,
        trials_planned=len(trials),
        samples_planned=PLANNED,
        protocol=Protocol(val_data="v", val_manifest="h", pairs=100),
        trials=trials,
    )


def recorded(folder: Path, trials: int) -> Sweep:
    """The record of a sweep of so many trials, none of which has started, written below `folder`."""
    sweep = Sweep(
        name="sweep",
        preset="clip-tiny",
        base=PRESETS["clip-tiny"].override({"out": str(folder), "name": "sweep", "optim.batch_size": 10}),
        space={"optim.learning_rate": {"grid": [0.001]}},
        search="grid",
        scheduler="asha",
        trials_planned=trials,
        samples_planned=100,
        protocol=Protocol(val_data="v", val_manifest="h", pairs=10),
        trials=[Trial(trial_id=f"t{n:02d}", run_folder=f"trials/t{n:02d}") for n in range(trials)],
    )
    sweep.save(str(folder / "sweep"))
    return sweep


def events(trial_id: str, recalls: list[float], seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Events of a trial that trains: a step and a validation after each 10 samples."""
    yield {"trial_id": trial_id, "seed": seed, "kind": "startup", "step": 1, "samples": 10, "seconds": 2.5}
    for step, recall in enumerate(recalls, 1):
        place = {"trial_id": trial_id, "seed": seed, "step": step, "samples": 10 * step, "planned": 100}
        yield place | {"kind": "step", "metrics": {"train/loss/cma": 1 / step}}
        yield place | {"kind": "validation", "metrics": {METRIC: recall, "val/pairs": 10.0}}


def ended(trial_id: str, status: str, reason: str = "", seed: int | None = None, **metrics: float) -> dict[str, Any]:
    """The event with which a trial ends."""
    place = {"trial_id": trial_id, "seed": seed, "samples": 30}
    return place | {"kind": "ended", "status": status, "reason": reason, "metrics": metrics}


def trained_ids(run: str) -> Counter:
    """{(epoch, sample id): times it was trained} of the run's last checkpoint."""
    with local_copy(listed_checkpoints(run)[-1].uri) as folder:
        rows = pq.read_table(folder / "ids.parquet").to_pylist()
    return Counter((row["epoch"], row["sample_id"]) for row in rows)


def every_id(run: str, epochs: int) -> set[tuple[int, str]]:
    """(epoch, sample id) of all samples of the run's corpus."""
    units = Manifest.load(f"{run}/manifest.parquet").units
    return {(e, f"{unit.unit}-{n}") for e in range(epochs) for unit in units for n in range(unit.count)}
