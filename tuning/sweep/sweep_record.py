"""`sweep.json`: what a sweep searches and how far each of its trials has come (docs/formats.md 9).

It is written whole or not at all, so a reader never sees half of it.
"""

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
"""Trials are judged by this while they train: recall at 1 on the fixed validation sample, mean of both directions."""
REPEAT_NOTE = "repeat with seed "
"""Start of a note, among a trial's alarms, on a repeat that ended without a model."""

TrialStatus = Literal["pending", "running", "finished", "pruned", "failed"]
ENDED: tuple[TrialStatus, ...] = ("finished", "pruned", "failed")


def trial_id(number: int) -> str:
    """Id of the trial of that number, from 0: t00, t01, ..."""
    return f"t{number:02d}"


def run_overrides(folder: str, trial_id: str, seed: int | None = None) -> dict[str, Any]:
    """{dotted key: value} by which a trial, or its repeat with another seed, trains inside the sweep's `folder`."""
    if seed is None:
        return {"out": storage.join(folder, "trials"), "name": trial_id}
    return {"out": storage.join(folder, "trials", trial_id, "repeats"), "name": str(seed), "seed": seed}


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """{dotted key: its last two parts, or as many more as tell it from the others}: `temperature.start`."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-count:]) for count in range(min(2, len(parts)), len(parts) + 1)]
        unique = (tail for tail in tails if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1)
        names[key] = next(unique, key)
    return names


Redacted = Annotated[str, AfterValidator(redact)]
"""Text of an error: everybody who may read the sweep's folder, its page or its run reads it."""


class _Record(BaseModel):
    """Base of the file's parts; unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class Repeat(_Record):
    """A finalist trained again with another seed."""

    seed: int
    metrics: dict[str, float]
    samples_seen: int


class Trial(_Record):
    """One point of the space, and how its training went."""

    trial_id: str
    overrides: dict[str, Any] = {}
    """{dotted key of the configuration: value}."""
    status: TrialStatus = "pending"
    reason: Redacted = ""
    """Why it was pruned or failed."""
    metrics: dict[str, float] = {}
    """Flat names: scores of the packaged model where finished, else of the last validation."""
    samples_seen: int = 0
    """Samples that its weights were trained on, over all interruptions."""
    seconds: float = 0.0
    """Wall time of its process, start-up included."""
    curve: list[tuple[int, float]] = []
    """(samples seen, `Sweep.metric`) of each validation."""
    alarms: list[Redacted] = []
    """Texts of its run's alarms, and notes on repeats that ended without a model (`REPEAT_NOTE`)."""
    repeats: list[Repeat] = []
    mlflow_run_id: str = ""
    run_folder: str = ""
    """Path relative to the sweep's folder."""

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
        """Texts of its own run's alarms."""
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
        """Add a validation; after a loss, samples are trained again and their points replaced."""
        self.curve = [*(point for point in self.curve if point[0] < samples), (samples, value)]


class Protocol(_Record):
    """The validation data, the same for all trials of a sweep."""

    val_data: str
    val_manifest: str
    """Hash of its manifest."""
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
    """Samples of one trial that is trained to its end."""
    protocol: Protocol
    mlflow_run_id: str = ""
    """Id of the sweep's own run, parent of its trials' runs."""
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
        """Samples of all trials, without repeats."""
        return sum(trial.samples_seen for trial in self.trials)

    def experiment(self, trial: Trial) -> ExperimentConfig:
        """The configuration that a trial trains with, in its own run folder."""
        location = run_overrides(storage.join(self.base.out, self.name), trial.trial_id)
        return self.base.override(trial.overrides | location)

    def ranked(self) -> list[Trial]:
        """Trials with a recall that did not fail, best first: finished ones, then by samples, then by recall."""
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

    Where some were repeated, only they are considered: a single run of another trial may have been lucky.
    """
    able = [trial for trial in trials if trial.status == "finished" and trial.recall is not None]
    return max(
        [trial for trial in able if trial.repeated] or able, key=lambda trial: fmean(trial.over_seeds()), default=None
    )
