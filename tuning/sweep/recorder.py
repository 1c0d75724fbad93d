"""Events of trials, recorded as they come: in `sweep.json` and in MLflow, by the sweep's driver alone."""

import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray

from pipelines import storage
from pipelines.lineage import commit
from pipelines.tracking.run import Status, flatten
from pipelines.train.events import Event, Listener
from pipelines.train.fit import TrainingFailed
from tuning.sweep.mlflow_runs import (
    CLOSING_SECONDS,
    FOLDER_TAG,
    PARENT_TAG,
    TRIAL_TAG,
    ChildRun,
    find_runs,
    finish_parent,
    start_parent,
)
from tuning.sweep.sweep_record import FILE_NAME, METRIC, REPEAT_NOTE, Repeat, Sweep, Trial, TrialStatus

logger = logging.getLogger(__name__)

MLFLOW: dict[TrialStatus, Status] = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
FEWEST_DONE = 3
"""A sweep is given up once most of its trials failed, but not before so many are done."""
FLUSH_SECONDS = 30.0
"""Longest wait for events that are on their way."""


class Recorder:
    """The only writer of a sweep's record and of its runs in MLflow. Its methods may be called from any thread."""

    def __init__(self, sweep: Sweep, folder: str, train_manifest: str) -> None:
        """Creates or continues the parent run; raises InputError where MLflow refuses, or a new one needs it."""
        self.sweep, self.folder = sweep, folder
        self.progress: dict[str, int] = {trial.trial_id: trial.samples_seen for trial in sweep.trials}
        """{trial id: samples seen}, newer than in the record, which is written at validations."""
        self.lock = threading.RLock()
        self._steps: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._ended_repeats: set[tuple[str, int]] = set()
        """(trial id, seed) of repeats that have reported how they ended."""
        self._tags = {
            "triptych.commit": commit(),
            "triptych.preset": sweep.preset,
            "triptych.manifest": train_manifest,
            "triptych.val_manifest": sweep.protocol.val_manifest,
        }
        self._parent = start_parent(sweep.name, folder, _parameters(sweep), self._tags, sweep.mlflow_run_id)
        sweep.mlflow_run_id = self._parent.run_id
        self._children: dict[str, ChildRun] = {}
        self._recover()
        self.save()
        self._flushed = threading.Event()
        self._listener = Listener(self.record_event)

    @property
    def mailbox(self) -> Any:
        """The Ray actor to which trials send their events."""
        return self._listener.mailbox

    def flush_events(self) -> None:
        """Wait until every event that trials have sent so far is recorded.

        Tune's callbacks and the events come on different ways: without this, a trial could be closed before its last
        validation is in the record.
        """
        self._flushed.clear()
        ray.get(self.mailbox.put.remote({"kind": "flush"}))
        self._flushed.wait(FLUSH_SECONDS)

    def _recover(self) -> None:
        """Make record and MLflow agree after an interruption.

        A run may exist whose id the record lacks, and a trial may have ended whose run is still open.
        """
        if not self.sweep.trials:
            return
        for found in find_runs(PARENT_TAG, self.sweep.mlflow_run_id):
            trial = next((trial for trial in self.sweep.trials if trial.trial_id == found.trial_id), None)
            if trial is not None and not trial.mlflow_run_id:
                trial.mlflow_run_id = found.run_id
            if trial is not None and trial.ended and found.status == "RUNNING":
                self._close(trial)

    def save(self, last: bool = False) -> None:
        """Write `sweep.json`; if the store fails, the next change writes it, or with `last` Unavailable is raised."""
        with self.lock:
            try:
                self.sweep.save(self.folder)
            except storage.Unavailable as error:
                if last:
                    raise
                logger.warning("%s; it is written again with the next change", error)

    def add_trial(self, trial_id: str, overrides: Mapping[str, Any]) -> None:
        """Add a trial that a searcher suggested; one that the record has is left as it is."""
        with self.lock:
            if all(trial.trial_id != trial_id for trial in self.sweep.trials):
                folder = f"trials/{trial_id}"
                self.sweep.trials.append(Trial(trial_id=trial_id, overrides=dict(overrides), run_folder=folder))
                self.sweep.trials.sort(key=lambda trial: (len(trial.trial_id), trial.trial_id))
                self.save()

    def trial_started(self, trial_id: str, seed: int | None) -> None:
        """A trial's process has started; `seed` is that of a repeat."""
        if seed is not None:
            return
        with self.lock:
            trial = self.sweep.trial(trial_id)
            trial.status, self._since[trial_id] = "running", time.monotonic()
            if self._child(trial).open():
                trial.mlflow_run_id = self._child(trial).run_id
            self.save()

    def record_event(self, event: Event) -> None:
        """Record an event of a trial (`tuning.sweep.trial`); what a trial trains after its end is dropped."""
        if event["kind"] == "flush":
            self._flushed.set()
            return
        with self.lock:
            trial = self.sweep.trial(event["trial_id"])
            if event["seed"] is not None:
                self._record_repeat(trial, event)
            elif event["kind"] == "ended":
                self._record_end(trial, event)
            elif not trial.ended:
                self._record_training(trial, event)

    def _record_training(self, trial: Trial, event: Event) -> None:
        trial_id, child = trial.trial_id, self._child(trial)
        self.progress[trial_id], self._steps[trial_id] = event["samples"], event["step"]
        if event["kind"] == "startup":
            child.log({"perf/startup_seconds": event["seconds"]}, event["step"])
        elif event["kind"] == "alarm":
            if event["level"] != "range" and event["text"] not in trial.alarms:
                trial.alarms = [*trial.alarms, event["text"]]
        else:
            child.log(event["metrics"] | {"samples_seen": event["samples"]}, event["step"])
        trial.mlflow_run_id = child.run_id
        if event["kind"] == "validation":
            trial.metrics, trial.samples_seen = _finite(event["metrics"]), event["samples"]
            trial.add_point(event["samples"], event["metrics"][METRIC])
            self._add_time(trial)
            self.save()

    def _record_end(self, trial: Trial, event: Event) -> None:
        trial.samples_seen = max(trial.samples_seen, event["samples"])
        if event["status"] == "paused":
            self._add_time(trial)
            self._since.pop(trial.trial_id, None)
            trial.status = "pending"
            self.save()
            return
        if event["status"] == "finished":
            trial.metrics = _finite(event["metrics"])
        else:  # it ended between two validations, and was further than the last of them
            trial.samples_seen = max(trial.samples_seen, self.progress.get(trial.trial_id, 0))
        self._end(trial, event["status"], event["reason"])

    def _record_repeat(self, trial: Trial, event: Event) -> None:
        """Record a finalist's training with another seed: in its trial, and in its trial's run under `repeat/SEED/`."""
        seed, child = event["seed"], self._child(trial)
        if event["kind"] == "ended":
            self._ended_repeats.add((trial.trial_id, seed))
        if event["kind"] == "validation":
            child.log({f"repeat/{seed}/{name}": value for name, value in event["metrics"].items()}, event["step"])
        elif event["kind"] == "ended" and event["status"] == "finished":
            metrics = _finite(event["metrics"])
            repeat = Repeat(seed=seed, metrics=metrics, samples_seen=event["samples"])
            trial.repeats = [*(other for other in trial.repeats if other.seed != seed), repeat]
            child.log({f"repeat/{seed}/{name}": value for name, value in metrics.items()}, self._step(trial))
            self.save()
        elif event["kind"] == "ended" and event["status"] != "paused":
            self._note_lost_repeat(trial, seed, f"{event['status']}: {event['reason']}")

    def _note_lost_repeat(self, trial: Trial, seed: int, text: str) -> None:
        """Record that a repeat ended without a model, among the trial's alarms."""
        trial.alarms = [*trial.alarms, f"{REPEAT_NOTE}{seed} {text}"]
        self.save()

    def trial_stopped(self, trial_id: str, reason: str) -> None:
        """The scheduler has ended a trial, for that reason."""
        self.flush_events()
        with self.lock:
            trial = self.sweep.trial(trial_id)
            if not trial.ended:
                self._end(trial, "pruned", reason)

    def trial_failed(self, trial_id: str, reason: str, seed: int | None = None) -> None:
        """A trial, or its repeat with another seed, has failed, for that reason unless it reported one itself."""
        self.flush_events()
        with self.lock:
            trial = self.sweep.trial(trial_id)
            if seed is not None:
                if (trial_id, seed) not in self._ended_repeats:
                    self._note_lost_repeat(trial, seed, f"failed: {reason}")
            elif not trial.ended:
                self._end(trial, "failed", reason)

    def raise_if_most_failed(self) -> None:
        """Raises TrainingFailed where most of the trials that ended or were validated have failed."""
        with self.lock:
            done = [trial for trial in self.sweep.trials if trial.ended or trial.curve]
            lost = [trial for trial in done if trial.status == "failed"]
            if len(done) >= FEWEST_DONE and 2 * len(lost) > len(done):
                raise TrainingFailed(
                    f"{len(lost)} of {len(done)} trials failed, so the sweep stops; the last one: {lost[-1].reason}"
                )

    def _end(self, trial: Trial, status: TrialStatus, reason: str) -> None:
        self._add_time(trial)
        self._since.pop(trial.trial_id, None)
        trial.status, trial.reason = status, reason
        self.progress[trial.trial_id] = trial.samples_seen
        self.save()
        self._close(trial)

    def _add_time(self, trial: Trial) -> None:
        """Add the wall time since the last call to the trial's seconds, while its process runs."""
        now = time.monotonic()
        if trial.trial_id in self._since:
            trial.seconds = round(trial.seconds + now - self._since[trial.trial_id], 1)
            self._since[trial.trial_id] = now

    def _child(self, trial: Trial) -> ChildRun:
        if trial.trial_id not in self._children:
            experiment = self.sweep.experiment(trial)
            tags = self._tags | {
                PARENT_TAG: self.sweep.mlflow_run_id,
                TRIAL_TAG: trial.trial_id,
                FOLDER_TAG: storage.join(self.folder, trial.run_folder),
            }
            parameters = flatten(experiment.model_dump(mode="json"))
            name = f"{self.sweep.name}/{trial.trial_id}"
            self._children[trial.trial_id] = ChildRun(name, parameters, tags, trial.mlflow_run_id)
        return self._children[trial.trial_id]

    def _close(self, trial: Trial) -> None:
        """End the trial's run in MLflow, with the scores and the package of a finished one."""
        child, package = self._child(trial), ""
        if trial.status == "finished":
            child.log(trial.metrics, self._step(trial))
            package = storage.join(self.folder, trial.run_folder, "package")
        child.close(MLFLOW[trial.status], trial.status, package)

    def _step(self, trial: Trial) -> int:
        """The optimiser step that a trial's last numbers belong to."""
        return self._steps.get(trial.trial_id, trial.samples_seen // self.sweep.experiment(trial).optim.batch_size)

    def begin_repeats(self) -> None:
        """Finalists are trained again from here on: runs that are closed in MLflow will be opened anew."""
        with self.lock:
            self._wait_for_children()
            self._children.clear()

    def _wait_for_children(self) -> None:
        """Wait, at most `CLOSING_SECONDS` in all, for the runs in MLflow that are being closed."""
        deadline = time.monotonic() + CLOSING_SECONDS
        for trial_id, child in self._children.items():
            child.wait(deadline - time.monotonic())
            self.sweep.trial(trial_id).mlflow_run_id = child.run_id
        self.save(last=True)

    def close(self, status: Status, text: str) -> None:
        """Send what is left to MLflow and end the parent run. Trials that have not ended can be continued later."""
        self._listener.close()
        with self.lock:
            for trial_id, child in self._children.items():
                trial = self.sweep.trial(trial_id)
                self._add_time(trial)
                if trial.status == "running":
                    trial.status = "pending"
                if not child.closing:
                    child.close(MLFLOW.get(trial.status, "KILLED"), trial.status if trial.ended else "interrupted")
            self._wait_for_children()
        finish_parent(self._parent, status, _summary(self.sweep), text, storage.join(self.folder, FILE_NAME))


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers, for JSON has no NaN."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _parameters(sweep: Sweep) -> dict[str, str]:
    """The parent run's parameters: how it searches, and the configuration that its trials share."""
    names = ("search", "scheduler", "trials_planned", "repeats_planned", "samples_planned", "metric")
    own = {f"sweep.{name}": str(getattr(sweep, name)) for name in names}
    space = {f"space.{key}": json.dumps(entry) for key, entry in sweep.space.items()}
    return own | space | flatten(sweep.base.model_dump(mode="json"))


def _summary(sweep: Sweep) -> dict[str, float]:
    """The parent run's metrics."""
    counts = {status: sum(trial.status == status for trial in sweep.trials) for status in MLFLOW}
    summary = {f"sweep/{status}": float(count) for status, count in counts.items()}
    summary |= {"sweep/samples_used": float(sweep.samples_used)}
    best = next((trial.recall for trial in sweep.ranked()), None)
    return summary if best is None else summary | {"sweep/best_recall": best}
