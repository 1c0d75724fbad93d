"""`sweep.json`: what a sweep searches and how far each of its trials has come; whole at any moment."""

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from models.config import InputError
from models.redact import redact
from pipelines import storage
from pipelines.config import ExperimentConfig
from pipelines.recall import MEAN_RECALL, mean_recall

FILE_NAME = "sweep.json"
METRIC = MEAN_RECALL
"""What trials are judged by while they train."""
REPEAT_NOTE = "repeat with seed "
"""What a trial's note on a repeat that came to nothing begins with, among its alarms."""

TrialStatus = Literal["pending", "running", "finished", "pruned", "failed"]
ENDED: tuple[TrialStatus, ...] = ("finished", "pruned", "failed")


def place_of(folder: str, trial_id: str, seed: int | None = None) -> dict[str, Any]:
    """{dotted key: value} that puts a trial's run, or its repeat with another seed, into the sweep's `folder`."""
    if seed is None:
        return {"out": storage.join(folder, "trials"), "name": trial_id}
    return {"out": storage.join(folder, "trials", trial_id, "repeats"), "name": str(seed), "seed": seed}


Redacted = Annotated[str, AfterValidator(redact)]
"""Text of an error: everybody who may read the sweep's folder, its page or its run reads it."""


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
    reason: Redacted = ""
    """Why it was pruned or failed."""
    metrics: dict[str, float] = {}
    """Flat names: of the packaged model where finished, else of the last validation."""
    samples_seen: int = 0
    """Manifest positions in the lineage of its weights."""
    seconds: float = 0.0
    """Wall time of its process, start-up included."""
    curve: list[tuple[int, float]] = []
    """(samples seen, `Sweep.metric`) of each validation."""
    alarms: list[Redacted] = []
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
    def recall(self) -> float | None:
        """Of its packaged model where it finished, else of its last validation; None where that was not measured."""
        if self.status == "finished":
            return mean_recall(self.metrics)
        return mean_recall({METRIC: self.curve[-1][1]}) if self.curve else None

    @property
    def own_alarms(self) -> list[str]:
        """What the alarms of its own run said."""
        return [text for text in self.alarms if not text.startswith(REPEAT_NOTE)]

    def over_seeds(self) -> list[float]:
        """Recall of its packaged model, where it finished, and of each repeat, as far as they were measured."""
        own = [self.recall] if self.status == "finished" else []
        found = own + [mean_recall(repeat.metrics) for repeat in self.repeats]
        return [recall for recall in found if recall is not None]

    @property
    def repeated(self) -> bool:
        """Whether it finished, and has a recall with its own seed and with others."""
        return self.status == "finished" and self.recall is not None and len(self.over_seeds()) > 1

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
            raise InputError(f"{file}: no such sweep; check the path")
        try:
            return cls.model_validate_json(storage.read_bytes(file))
        except ValidationError as error:
            raise InputError(f"{file}: damaged, or written by another version") from error

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
        able = [
            (trial, recall)
            for trial in self.trials
            if trial.status != "failed" and (recall := trial.recall) is not None
        ]
        able.sort(key=lambda pair: (pair[0].status == "finished", pair[0].samples_seen, pair[1]), reverse=True)
        return [trial for trial, _ in able]

    def best(self) -> Trial | None:
        """The winner: of finished trials that were repeated the best over seeds, else the first of `ranked`."""
        repeated = best_over_seeds([trial for trial in self.trials if trial.repeated])
        return repeated or next(iter(self.ranked()), None)


def best_over_seeds(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial with the highest mean recall over its seeds; None where none finished with a recall.

    Where some were repeated, only they are looked at: a single run of another trial may have been lucky.
    """
    able = [trial for trial in trials if trial.status == "finished" and trial.recall is not None]
    return max(
        [trial for trial in able if trial.repeated] or able, key=lambda trial: fmean(trial.over_seeds()), default=None
    )
