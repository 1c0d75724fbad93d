"""A sweep before it starts: all that can be checked is checked, and nothing is written."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from models.config import InputError, dotted
from pipelines import storage
from pipelines.config import ExperimentConfig
from pipelines.data.epoch_plan import groups, require_groups
from pipelines.data.manifest import Manifest, build_manifest
from pipelines.lineage import commit
from pipelines.train.prepare import named
from pipelines.train.worker import planned_samples
from tuning.sweep import schedulers
from tuning.sweep.space import Point, Space, combinations, grid_points, random_points, read_space
from tuning.sweep.sweep_record import FILE_NAME, Protocol, Sweep, Trial, trial_id

TRIALS = 16
"""Trials of a search that does not say how many."""
MOST_GRID = 30
"""Most combinations of a space of lists that are all trained by default."""
SEARCHES = ("grid", "random", "optuna")


@dataclass(frozen=True)
class SweepRequest:
    """What the command line asks for; empty values take the defaults."""

    base: ExperimentConfig
    """Configuration that all trials share: preset, data, out, name and flags."""
    space: str = ""
    """Name of a ready space, or a file."""
    trials: int | None = None
    search: str = ""
    scheduler: str = ""
    repeats: int = 0
    """Times that finalists are trained again with other seeds."""
    resume: bool = False


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that may begin: its record and what the record does not hold."""

    sweep: Sweep
    folder: str
    space: Space
    train_manifest: str


def make_plan(request: SweepRequest) -> SweepPlan:
    """Check a request and lay out its trials, or those of the sweep that it resumes.

    Raises InputError for whatever is wrong with flags, space or data; nothing is written.
    """
    base = named(request.base)
    folder = storage.join(base.out, base.name)
    exists = storage.exists(storage.join(folder, FILE_NAME))
    if exists and not request.resume:
        raise InputError(f"{folder}: a sweep of that name exists; choose another --name, or go on with it by --resume")
    if storage.exists(storage.join(folder, "config.json")):
        raise InputError(f"{folder}: a run of that name exists; choose another --name")
    if request.resume and not exists:
        raise InputError(f"{folder}: no sweep to resume; check --out and --name")
    every = schedulers.validation_share(base.checkpoints.every)
    base = base.override({"checkpoints.every": every})
    space = read_space(request.space, base)
    search, scheduler = _method(request, space)
    points = _points(search, request, space, base)
    training = build_manifest(base.train_data, base.pairs)
    validation = build_manifest(base.val_data, base.pairs)
    require_groups(groups(training.units, base.seed, 0), base.compute.workers)
    sweep = _new_sweep(base, space, (search, scheduler), points, validation)
    sweep.trials_planned = len(points) if points else request.trials or TRIALS
    sweep.repeats_planned, sweep.samples_planned = request.repeats, planned_samples(base, training.count)
    if request.resume:
        sweep = _resumed(Sweep.load(folder), sweep)
    return SweepPlan(sweep, folder, space, training.hash)


def _method(request: SweepRequest, space: Space) -> tuple[str, str]:
    """(search, scheduler), asked for or by default; raises InputError for what does not exist or go together."""
    size = combinations(space)
    whole = size is not None and request.trials is None and size <= MOST_GRID
    search = request.search or ("grid" if whole else "random")
    scheduler = request.scheduler or ("asha" if search == "optuna" else "halving")
    names = (("--search", search, SEARCHES), ("--scheduler", scheduler, get_args(schedulers.SchedulerName)))
    for flag, name, known in names:
        if name not in known:
            raise InputError(f"{flag} {name}: one of {', '.join(known)}")
    for flag, number, least in (("--trials", request.trials, 1), ("--repeats", request.repeats, 0)):
        if number is not None and number < least:
            raise InputError(f"{flag} {number}: at least {least}")
    if search == "optuna" and scheduler == "halving":
        raise InputError("--search optuna learns from trials that halving makes wait for each other; --scheduler asha")
    return search, scheduler


def _points(search: str, request: SweepRequest, space: Space, base: ExperimentConfig) -> list[Point]:
    """All points of a grid or random search; none for optuna, which suggests them while the sweep runs."""
    if search == "grid":
        return grid_points(space, base, request.trials, base.seed)
    if search == "random":
        return random_points(space, base, request.trials or TRIALS, base.seed)
    return []


def _new_sweep(
    base: ExperimentConfig,
    space: Space,
    method: tuple[str, str],
    points: Sequence[Point],
    validation: Manifest,
) -> Sweep:
    """The record of a sweep before its first trial; `method`: (search, scheduler)."""
    pairs = min(base.validation.pairs, validation.count)
    record = {
        "name": base.name,
        "preset": base.preset,
        "base": base,
        "space": {key: dimension.json() for key, dimension in space.items()},
        "search": method[0],
        "scheduler": method[1],
        "trials_planned": len(points),
        "seed": base.seed,
        "protocol": Protocol(val_data=base.val_data, val_manifest=validation.hash, pairs=pairs),
        "commit": commit(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "trials": [
            Trial(trial_id=trial_id(number), overrides=point, run_folder=f"trials/{trial_id(number)}")
            for number, point in enumerate(points)
        ],
    }
    return Sweep.model_validate(record)


def _resumed(stored: Sweep, requested: Sweep) -> Sweep:
    """The stored sweep, its open trials pending; raises InputError where flags or data are not those it began with."""
    for name in ("space", "search", "scheduler", "trials_planned", "repeats_planned"):
        before, now = getattr(stored, name), getattr(requested, name)
        if before != now:
            raise InputError(f"--resume: {name} is {now}, but the sweep began with {before}; give the same flags")
    before, now = (dotted(sweep.base.model_dump(mode="json")) for sweep in (stored, requested))
    for key in before | now:
        if before.get(key) != now.get(key):
            raise InputError(
                f"--resume: {key} is {now.get(key)!r}, but the sweep began with {before.get(key)!r}; "
                "give the same flags"
            )
    if stored.protocol != requested.protocol or stored.samples_planned != requested.samples_planned:
        raise InputError("--resume: the data is not what the sweep began with, so its trials would not compare")
    for trial in stored.trials:
        if not trial.ended:
            trial.status = "pending"
    return stored
