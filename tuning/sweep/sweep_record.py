"""`sweep.json`: what a sweep searches and how far each of its trials has come; whole at any moment."""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from models.config import InputError
from pipelines import storage
from pipelines.config import ExperimentConfig

FILE_NAME = "sweep.json"
METRIC = "val/recall_at_1_mean"
"""What trials are judged by while they train: mean of both sides' recall at 1 on the fixed validation sample."""
REPEAT_NOTE = "repeat with seed "
"""What a trial's note on a repeat that came to nothing begins with, among its alarms."""
_SIDES = ("val/image_retrieval_recall_at_1", "val/text_retrieval_recall_at_1")

TrialStatus = Literal["pending", "running", "finished", "pruned", "failed"]
ENDED: tuple[TrialStatus, ...] = ("finished", "pruned", "failed")


def mean_recall(metrics: dict[str, float]) -> float:
    """`METRIC` of a validation or of a packaged model, which has both sides only; NaN where they are missing."""
    if METRIC in metrics:
        return metrics[METRIC]
    return sum(metrics.get(side, math.nan) for side in _SIDES) / len(_SIDES)


def place_of(folder: str, trial_id: str, seed: int | None = None) -> dict[str, Any]:
    """{dotted key: value} that puts a trial's run, or its repeat with another seed, into the sweep's `folder`."""
    if seed is None:
        return {"out": storage.join(folder, "trials"), "name": trial_id}
    return {"out": storage.join(folder, "trials", trial_id, "repeats"), "name": str(seed), "seed": seed}


class _Record(BaseModel):
    """A part of the file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class Repeat(_Record):
    """A finalist trained again with another seed."""

    seed: int
    metrics: dict[str, float]
    samples_seen: int


class Trial(_Record):
    """One setting, and what came of it."""

    trial_id: str
    overrides: dict[str, Any] = {}
    """{dotted key of the configuration: value}."""
    status: TrialStatus = "pending"
    reason: str = ""
    """Why it was pruned or failed."""
    metrics: dict[str, float] = {}
    """Flat names: of the packaged model where finished, else of the last validation."""
    samples_seen: int = 0
    """Manifest positions in the lineage of its weights."""
    seconds: float = 0.0
    """Wall time of its process, start-up included."""
    curve: list[tuple[int, float]] = []
    """(samples seen, `Sweep.metric`) of each validation."""
    alarms: list[str] = []
    """What the alarms of its run said, and notes on repeats that came to nothing."""
    repeats: list[Repeat] = []
    mlflow_run_id: str = ""
    run_folder: str = ""
    """Below the sweep's folder."""

    @property
    def ended(self) -> bool:
        """Whether it will not train any more."""
        return self.status in ENDED

    @property
    def recall(self) -> float:
        """Its newest value of the sweep's metric; NaN where it has none."""
        own = mean_recall(self.metrics) if self.status == "finished" else math.nan
        return own if not math.isnan(own) else self.curve[-1][1] if self.curve else math.nan

    @property
    def own_alarms(self) -> list[str]:
        """What the alarms of its own run said."""
        return [text for text in self.alarms if not text.startswith(REPEAT_NOTE)]

    def over_seeds(self) -> list[float]:
        """Recall of its packaged model, where it finished, and of each repeat."""
        own = [mean_recall(self.metrics)] if self.status == "finished" else []
        return own + [mean_recall(repeat.metrics) for repeat in self.repeats]

    def at(self, samples: int) -> float | None:
        """The metric at the first validation after `samples` or more; None where it has not come so far."""
        return next((value for seen, value in self.curve if seen >= samples), None)

    def samples_at(self, samples: int) -> int | None:
        """The samples seen at that validation."""
        return next((seen for seen, _ in self.curve if seen >= samples), None)

    def add_point(self, samples: int, value: float) -> None:
        """Take a validation; work that was done again after a loss takes the place of what it repeats."""
        self.curve = [*(point for point in self.curve if point[0] < samples), (samples, value)]


class Protocol(_Record):
    """What all trials are validated on."""

    val_data: str
    val_manifest: str
    """The manifest's hash."""
    pairs: int
    """Validation pairs scored while training."""


class Sweep(_Record):
    """A whole sweep. `Sweep.load(folder)`, `sweep.save(folder)`."""

    name: str
    preset: str
    base: ExperimentConfig
    """All trials' configuration, before their overrides."""
    space: dict[str, dict[str, list[Any]]]
    """{dotted key: {"grid" | "choice" | "uniform" | "loguniform": [...]}}."""
    search: Literal["grid", "random", "optuna"]
    scheduler: Literal["asha", "halving", "median", "none"]
    trials_planned: int
    repeats_planned: int = 0
    seed: int = 0
    metric: str = METRIC
    samples_planned: int = 0
    """Of one trial that is not pruned."""
    protocol: Protocol
    mlflow_run_id: str = ""
    """The parent run."""
    commit: str = ""
    created: str = ""
    """UTC, ISO 8601."""
    trials: list[Trial] = []

    @classmethod
    def load(cls, uri: str) -> Self:
        """Read it from a sweep's folder, or from the file itself. Raises InputError where it is missing or damaged."""
        file = uri if uri.endswith(".json") else storage.join(uri, FILE_NAME)
        if not storage.exists(file):
            raise InputError(f"{storage.redact(file)}: no such sweep; check the path")
        try:
            return cls.model_validate_json(storage.read_bytes(file))
        except ValidationError as error:
            raise InputError(f"{storage.redact(file)}: damaged, or written by another version") from error

    def save(self, uri: str) -> None:
        """Write it into a sweep's folder; a reader sees the old file or the new one."""
        storage.write_bytes(storage.join(uri, FILE_NAME), (self.model_dump_json(indent=1) + "\n").encode())

    def trial(self, trial_id: str) -> Trial:
        """The trial of that id; raises KeyError."""
        for trial in self.trials:
            if trial.trial_id == trial_id:
                return trial
        raise KeyError(trial_id)

    @property
    def samples_used(self) -> int:
        """Samples of all trials, repeats left aside."""
        return sum(trial.samples_seen for trial in self.trials)

    def experiment(self, trial: Trial) -> ExperimentConfig:
        """The configuration that a trial trains with, its place in the sweep's folder included."""
        place = place_of(storage.join(self.base.out, self.name), trial.trial_id)
        return self.base.override(trial.overrides | place)

    def ranked(self) -> list[Trial]:
        """Trials that did not fail and were validated: finished ones first, then who came furthest; best first."""
        able = [trial for trial in self.trials if trial.status != "failed" and not math.isnan(trial.recall)]
        return sorted(able, key=lambda t: (t.status == "finished", t.samples_seen, t.recall), reverse=True)

    def best(self) -> Trial | None:
        """The winner: by the mean over seeds among finished trials that were repeated, else the first of `ranked`."""
        repeated = [trial for trial in self.trials if trial.status == "finished" and trial.repeats]
        if repeated:
            return max(repeated, key=lambda trial: sum(trial.over_seeds()) / len(trial.over_seeds()))
        return next(iter(self.ranked()), None)
