"""Read what is compared: runs and the trials of sweeps, each with its settings, scores, cost and state.

Folders lie on a disk or on object storage. A run's learning curve and time come from MLflow where it can be reached,
else from the list of its checkpoints.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from models.config import InputError
from models.redact import redact
from pipelines import storage
from pipelines.artifacts.resolve import Listed, best_of, listed_checkpoints, read_experiment
from pipelines.config import ExperimentConfig
from pipelines.recall import mean_recall
from pipelines.tracking.history import Histories, History
from tuning.sweep.sweep_record import FILE_NAME, METRIC, Sweep, Trial

logger = logging.getLogger(__name__)

HEALTH = ("codebook/", "embedding/")
"""Prefixes of the metrics of codes and vectors that are measured while a run trains."""
_READERS = 16  # threads: object storage answers slowly, but many requests at once


@dataclass(frozen=True)
class Compared:
    """A run or a trial of a sweep, as far as its files and MLflow tell."""

    name: str
    where: str
    """URI of its run folder."""
    config: ExperimentConfig
    status: str
    """finished, pruned, failed, stopped, running, pending, or unfinished: not over, and nothing says that it runs."""
    reason: str = ""
    sweep: str = ""
    """URI of its sweep's folder; "" for a run of its own."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """What its sweep set, by dotted key."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scores of the packaged model where finished, else of the last validation; `HEALTH` as last measured."""
    curve: Sequence[tuple[float, float]] = ()
    """(samples seen, recall) at each validation on the validation sample."""
    sample_pairs: float = 0.0
    """Pairs of that sample; 0 where it is not known."""
    samples: float = 0.0
    """Samples seen, without repeats."""
    seconds: float = 0.0
    """Wall time; 0 where it is not known."""
    alarms: Sequence[str] = ()
    repeats: Sequence[Mapping[str, float]] = ()
    """Metrics of the same settings with other seeds."""
    protocol: Mapping[str, str] = field(default_factory=dict)
    """{what: value} of how it was scored, as far as known; scores are comparable where no value differs."""

    @property
    def recall(self) -> float | None:
        """First-stage recall@1, mean of both directions; None where it was not measured."""
        return mean_recall(self.metrics)


def gather(paths: Sequence[str], histories: Histories | None = None) -> list[Compared]:
    """The runs, and all trials of the sweeps, in the order given; one that is named twice is there once.

    Raises InputError where a path is neither a run folder nor a sweep folder.
    """
    histories = histories or Histories()
    found: dict[str, Compared] = {}
    for path in paths:
        uri = storage.make_absolute(path.rstrip("/") or path)
        if storage.exists(storage.join(uri, FILE_NAME)):
            items = _trials(uri, with_name=len(paths) > 1)
        else:
            items = [_run(uri, histories)]
        for item in items:
            found.setdefault(item.where, item)
    return _unique(list(found.values()))


def _unique(items: list[Compared]) -> list[Compared]:
    """Runs of equal names are called by their folders."""
    names = [item.name for item in items]
    return [replace(item, name=redact(item.where)) if names.count(item.name) > 1 else item for item in items]


# Sweeps


def _trials(uri: str, with_name: bool) -> list[Compared]:
    """All trials of a sweep; `with_name`: called SWEEP/TRIAL instead of TRIAL."""
    sweep = Sweep.load(uri)
    prefix = f"{sweep.name}/" if with_name else ""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda trial: _trial(uri, sweep, trial, prefix), sweep.trials))


def _trial(uri: str, sweep: Sweep, trial: Trial, prefix: str) -> Compared:
    run = storage.join(uri, trial.run_folder or f"trials/{trial.trial_id}")
    config = sweep.base.override(trial.overrides)
    metrics = _health(run, trial.metrics, trial.status) | trial.metrics
    return Compared(
        name=f"{prefix}{trial.trial_id}",
        where=run,
        config=config,
        status=trial.status,
        reason=trial.reason,
        sweep=uri,
        overrides=trial.overrides,
        metrics=metrics,
        curve=trial.curve,
        sample_pairs=sweep.protocol.pairs,
        samples=trial.samples_seen,
        seconds=trial.seconds,
        alarms=trial.alarms,
        repeats=[repeat.metrics for repeat in trial.repeats],
        protocol=_protocol(config, metrics, sweep.protocol.val_manifest),
    )


def _health(run: str, metrics: Mapping[str, float], status: str) -> dict[str, float]:
    """The codebook's metrics of the packaged checkpoint, or of the latest, where `metrics` has none."""
    if status == "pending" or any(key.startswith(HEALTH) for key in metrics):
        return {}
    try:
        checkpoints = listed_checkpoints(run)
    except InputError as error:
        logger.warning("%s", error)  # one damaged trial must not hide the others
        return {}
    if not checkpoints:
        return {}
    chosen = best_of(checkpoints) if status == "finished" else checkpoints[-1]
    return {key: value for key, value in chosen.metrics.items() if key.startswith(HEALTH)} if chosen else {}


# Runs


_UNKNOWN = History("", 0.0, [], {})
"""The history of a run that MLflow does not have, or cannot be asked about."""


def _run(uri: str, histories: Histories) -> Compared:
    """A run of its own; raises InputError where the folder is none."""
    config = _config(uri)
    checkpoints, tracked = listed_checkpoints(uri), _json_if_there(uri, "mlflow.json") or {}
    history = histories.read(str(tracked.get("run_id", "")), METRIC) or _UNKNOWN
    scores = _json_if_there(uri, "metrics.json")  # written last: with it, the run has finished
    status = _STATUS.get(history.status, "unfinished") if scores is None else "finished"
    latest = dict(checkpoints[-1].metrics) if checkpoints else {}
    metrics = _health(uri, {}, status) | (latest if scores is None else scores)
    curve = history.curve or _curve(checkpoints)
    return Compared(
        name=config.name or uri.rsplit("/", 1)[-1],
        where=uri,
        config=config,
        status=status,
        metrics=metrics,
        curve=curve,
        sample_pairs=latest.get("val/pairs", 0.0),
        samples=max([latest.get("samples_seen", 0.0), *(samples for samples, _ in curve)]),
        seconds=history.seconds,
        protocol=_protocol(config, metrics, history.tags.get("triptych.val_manifest", "")),
    )


_STATUS = {"RUNNING": "running", "FAILED": "failed", "KILLED": "stopped"}


def _config(run: str) -> ExperimentConfig:
    """The run's configuration; raises InputError where the folder is a checkpoint, a package or nothing of ours."""
    uri = storage.join(run, "config.json")
    is_checkpoint = storage.exists(storage.join(run, "position.json"))
    if not storage.exists(uri) or is_checkpoint or storage.read_json(uri).get("format"):  # only a package has a format
        raise InputError(
            f"{run}: neither a run folder nor a sweep folder; give OUT/NAME of `triptych train` or `triptych tune`"
        )
    return read_experiment(uri)


def _json_if_there(run: str, name: str) -> dict[str, Any] | None:
    uri = storage.join(run, name)
    return storage.read_json(uri) if storage.exists(uri) else None


def _curve(checkpoints: Sequence[Listed]) -> list[tuple[float, float]]:
    """The learning curve as far as the checkpoints that were kept have it."""
    points = ((c.metrics.get("samples_seen"), c.metrics.get(METRIC)) for c in checkpoints)
    return sorted((float(samples), float(value)) for samples, value in points if samples and value is not None)


def _protocol(config: ExperimentConfig, metrics: Mapping[str, float], manifest: str) -> dict[str, str]:
    """How recall was measured: on which data, how many, and read how."""
    pairs = config.pairs
    fields = {
        "validation data": config.val_data,
        "validation manifest": manifest,
        "images scored": _count(metrics, "val/images"),
        "captions scored": _count(metrics, "val/captions"),
        "columns": f"{pairs.image_column}, {pairs.caption_column}, {pairs.image_id_column}",
        "words of a caption": str(pairs.max_caption_words),
    }
    return {name: value for name, value in fields.items() if value}


def _count(metrics: Mapping[str, float], name: str) -> str:
    return f"{int(metrics[name]):,}" if name in metrics else ""
