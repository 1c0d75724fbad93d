"""A sweep before it starts: everything that can be checked is, and nothing is written."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from models.config import InputError
from pipelines import storage
from pipelines.config import ExperimentConfig
from pipelines.data.epoch_plan import groups, require_groups
from pipelines.data.manifest import Manifest, build_manifest
from pipelines.lineage import commit
from pipelines.train.prepare import named
from pipelines.train.worker import planned_samples
from tuning.sweep import schedulers
from tuning.sweep.space import Point, Space, combinations, grid_points, random_points, read_space
from tuning.sweep.sweep_record import FILE_NAME, Protocol, Sweep, Trial

TRIALS = 16
"""Of a random search that does not say how many."""
MOST_GRID = 30
"""Combinations up to which a space of lists is searched whole unless told otherwise."""
SEARCHES = ("grid", "random", "optuna")


@dataclass(frozen=True)
class Request:
    """What the command line asks for; empty values take the defaults."""

    base: ExperimentConfig
    """All trials' configuration: preset, data, out, name and flags."""
    space: str = ""
    """A ready space or a file."""
    trials: int | None = None
    search: str = ""
    scheduler: str = ""
    repeats: int = 0
    """Times that finalists are trained again with other seeds."""
    resume: bool = False


@dataclass(frozen=True)
class Plan:
    """A sweep that may begin: all that can be checked has been."""

    sweep: Sweep
    folder: str
    space: Space
    train_manifest: str


def make_plan(request: Request) -> Plan:
    """Everything checked and nothing written."""
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
    search, scheduler, points = _points(request, space, base)
    training = build_manifest(base.train_data, base.pairs)
    validation = build_manifest(base.val_data, base.pairs)
    require_groups(groups(training.units, base.seed, 0), base.compute.workers)
    sweep = _new_sweep(base, space, (search, scheduler), points, validation)
    sweep.trials_planned = len(points) if points else request.trials or TRIALS
    sweep.repeats_planned, sweep.samples_planned = request.repeats, planned_samples(base, training.count)
    if request.resume:
        sweep = _resumed(Sweep.load(folder), sweep)
    return Plan(sweep, folder, space, training.hash)


def _points(request: Request, space: Space, base: ExperimentConfig) -> tuple[str, str, list[Point]]:
    """(search, scheduler, all points or, for optuna, none); raises InputError for what does not go together."""
    size = combinations(space)
    whole = size is not None and request.trials is None and size <= MOST_GRID
    search = request.search or ("grid" if whole else "random")
    scheduler = request.scheduler or ("asha" if search == "optuna" else "halving")
    if search not in SEARCHES:
        raise InputError(f"--search {search}: one of {', '.join(SEARCHES)}")
    if scheduler not in get_args(schedulers.Name):
        raise InputError(f"--scheduler {scheduler}: one of {', '.join(get_args(schedulers.Name))}")
    if request.trials is not None and request.trials < 1:
        raise InputError(f"--trials {request.trials}: at least 1")
    if request.repeats < 0:
        raise InputError(f"--repeats {request.repeats}: at least 0")
    if search == "optuna" and scheduler == "halving":
        raise InputError("--search optuna learns from trials that halving makes wait for each other; --scheduler asha")
    if search == "grid":
        return search, scheduler, grid_points(space, base, request.trials, base.seed)
    points = random_points(space, base, request.trials or TRIALS, base.seed) if search == "random" else []
    return search, scheduler, points


def _new_sweep(
    base: ExperimentConfig,
    space: Space,
    how: tuple[str, str],
    points: Sequence[Point],
    validation: Manifest,
) -> Sweep:
    pairs = min(base.validation.pairs, validation.count)
    record = {
        "name": base.name,
        "preset": base.preset,
        "base": base,
        "space": {key: dimension.json() for key, dimension in space.items()},
        "search": how[0],
        "scheduler": how[1],
        "trials_planned": len(points),
        "seed": base.seed,
        "protocol": Protocol(val_data=base.val_data, val_manifest=validation.hash, pairs=pairs),
        "commit": commit(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "trials": [
            Trial(trial_id=name, overrides=point, run_folder=f"trials/{name}")
            for name, point in zip(names(len(points)), points, strict=True)
        ],
    }
    return Sweep.model_validate(record)


def names(count: int) -> list[str]:
    """Trial ids: t00, t01, ..."""
    return [f"t{number:02d}" for number in range(count)]


def _resumed(stored: Sweep, asked: Sweep) -> Sweep:
    """The stored sweep; raises InputError where the same flags are not given again."""
    for name in ("space", "search", "scheduler", "trials_planned", "repeats_planned"):
        before, now = getattr(stored, name), getattr(asked, name)
        if before != now:
            raise InputError(f"--resume: {name} is {now}, but the sweep began with {before}; give the same flags")
    before, now = (_flat(sweep.base.model_dump(mode="json")) for sweep in (stored, asked))
    for key in before | now:
        if before.get(key) != now.get(key):
            raise InputError(
                f"--resume: {key} is {now.get(key)!r}, but the sweep began with {before.get(key)!r}; "
                "give the same flags"
            )
    if stored.protocol != asked.protocol or stored.samples_planned != asked.samples_planned:
        raise InputError("--resume: the data is not what the sweep began with, so its trials would not compare")
    for trial in stored.trials:
        if not trial.ended:
            trial.status = "pending"
    return stored


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
