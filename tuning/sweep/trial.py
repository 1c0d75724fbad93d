"""A trial in its own process: the same `fit` that `triptych train` calls, steered by Ray Tune.

A Tune step is the training up to the next pause point. There the run waits while the scheduler decides, so no sample is
trained in vain. A run that is not wanted any more is told to leave: it ends by itself, and its resources are free.
"""

import json
import queue
import threading
import time
from typing import Any, Literal, NamedTuple

import ray
from ray import tune

from models.config import InputError
from pipelines import storage
from pipelines.artifacts.resolve import listed_checkpoints
from pipelines.config import ExperimentConfig
from pipelines.data.manifest import Manifest
from pipelines.train.alarms import COLLAPSE
from pipelines.train.events import Event, Listener
from pipelines.train.fit import Following, TrainingFailed, TrainingLeft, fit
from pipelines.train.worker import planned_samples
from tuning.sweep.schedulers import TIME
from tuning.sweep.sweep_record import METRIC, run_overrides

FATAL_ALARMS = (COLLAPSE,)
"""Keys of alarms that end a trial, where `triptych train` only warns: it would cost samples and win nothing."""
LEAVING_SECONDS = 120.0
"""Longest wait for the end of a run that was told to leave."""
POLL_SECONDS = 0.2
"""Time between two polls for a run's events."""

Ending = Literal["finished", "paused", "pruned", "failed"]


class TrialFailed(RuntimeError):
    """A trial ended without a model; one line that says why."""


class Task(NamedTuple):
    """What a trial's process is to do."""

    trial_id: str
    overrides: dict[str, Any]
    """{dotted key: value}."""
    seed: int | None = None
    """The seed of a repeat; None for the trial itself."""
    until: int = 0
    """Samples after which the trial ends as paused, to go on later; 0: it trains to its end."""
    undecided: tuple[int, float] | None = None
    """(samples, value) of a validation before an interruption on which the scheduler has still to decide."""


class End(NamedTuple):
    """How a run ended."""

    status: Ending
    reason: str
    metrics: dict[str, float]
    """Scores of the packaged model of a finished run; empty for any other."""


class TrialRun(tune.Trainable):  # type: ignore[misc]  # Ray is not typed
    """A process that runs one trial after another, each in its own run folder.

    `base`, `pause_points` and `mailbox` of `setup` come from `tune.with_parameters`.
    """

    def setup(
        self, config: dict[str, Any], base: ExperimentConfig, pause_points: tuple[int, ...], mailbox: Any
    ) -> None:
        """`config` is {"task": Task as a dict}; `mailbox` is the Mailbox actor of the sweep's driver."""
        self._base, self._pause_points, self._mailbox = base, pause_points, mailbox
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another trial in the same process, which saves the time a process takes to start."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._task = Task(**config["task"])
        self._undecided = self._task.undecided
        self._thread: threading.Thread | None = None
        self._listener: Listener | None = None
        self._signals: queue.Queue[Event | End] = queue.Queue()  # what wakes `step`: a pause, or the run's end
        self._last: tuple[int, float] = (0, 0.0)
        self._started = time.monotonic()
        self._reported = False

    def step(self) -> dict[str, Any]:
        """Train up to the next pause point or to the end; returns samples seen and recall. Raises TrialFailed."""
        if self._undecided:
            (seen, value), self._undecided = self._undecided, None
            return {TIME: seen, METRIC: value}
        if self._listener is None:
            self._listener = Listener(self._forward, POLL_SECONDS)
            self._thread = threading.Thread(target=self._train, args=(self._listener,), name="trial", daemon=True)
            self._thread.start()
        else:
            self._listener.mailbox.answer.remote(True)
        while True:
            signal = self._signals.get()
            if isinstance(signal, End):
                return self._end(signal)
            # A pause before `until` asks the scheduler; the one at `until` is the end of this task, so the run leaves.
            if not self._task.until or signal["samples"] < self._task.until:
                return {TIME: signal["samples"], METRIC: signal["metrics"][METRIC]}
            self._listener.mailbox.answer.remote(False)

    def cleanup(self) -> None:
        """Tell a run that waits at a pause point to leave, and wait until it has."""
        if self._thread is not None and self._thread.is_alive() and self._listener is not None:
            self._listener.mailbox.answer.remote(False)
            self._thread.join(LEAVING_SECONDS)

    def _end(self, end: End) -> dict[str, Any]:
        """Report the end to the sweep's driver, then to Tune."""
        seen, value = self._last
        event = {"kind": "ended", "samples": seen, **end._asdict()}
        ray.get(self._mailbox.put.remote(self._of_trial(event)))
        if end.status == "failed":
            raise TrialFailed(end.reason)
        return {TIME: seen, METRIC: value, "status": end.status, "done": True}

    def _train(self, listener: Listener) -> None:
        """Body of the run's thread: whatever happens it puts an End, after all events have been forwarded."""
        end = End("failed", "the trial's process was told to stop", {})
        try:
            metrics, error = self._fit(listener)
            listener.close()
            end = _end_of_run(metrics, error)
        finally:
            self._signals.put(end)

    def _fit(self, listener: Listener) -> tuple[dict[str, float], Exception | None]:
        """(the packaged model's metrics, None), or ({}, what ended the run)."""
        folder = storage.join(self._base.out, self._base.name)
        location = run_overrides(folder, self._task.trial_id, self._task.seed)
        experiment = self._base.override(self._task.overrides | location)
        run = storage.join(experiment.out, experiment.name)
        scores = storage.join(run, "metrics.json")
        pause_points = (self._task.until,) if self._task.until else self._pause_points
        try:
            if storage.exists(scores):  # the driver was lost between the end of this run and its record
                samples = Manifest.load(storage.join(run, "manifest.parquet")).count
                value = float(listed_checkpoints(run)[-1].metrics[METRIC])
                self._last = (planned_samples(experiment, samples), value)
                return json.loads(storage.read_bytes(scores)), None
            resume = storage.exists(storage.join(run, "config.json"))
            return fit(experiment, resume, Following(listener.mailbox, pause_points, FATAL_ALARMS)).metrics, None
        except Exception as error:  # whatever it was, the sweep has to record it and go on
            return {}, error

    def _forward(self, event: Event) -> None:
        """Send an event of the run to the driver, or wake `step` where it is a pause; runs on the listener's thread."""
        if not self._reported:
            self._reported = True
            seconds = time.monotonic() - self._started
            where = {name: event[name] for name in ("step", "samples")}
            self._mailbox.put.remote(self._of_trial({"kind": "startup", "seconds": seconds, **where}))
        if event["kind"] == "validation":
            self._last = (event["samples"], event["metrics"][METRIC])
        if event["kind"] == "hold":
            self._signals.put(event)
        else:  # the driver has a validation before the scheduler decides on it
            ray.get(self._mailbox.put.remote(self._of_trial(event)))

    def _of_trial(self, event: Event) -> Event:
        return {"trial_id": self._task.trial_id, "seed": self._task.seed, **event}


def _end_of_run(metrics: dict[str, float], error: Exception | None) -> End:
    """How a run ended, by what it raised: pruned only where an alarm ended it, whatever alarms came before."""
    if error is None:
        return End("finished", "", metrics)
    if isinstance(error, TrainingLeft):
        return End("paused", "", {})
    text = (str(error) or "-").splitlines()[0]
    if isinstance(error, TrainingFailed):
        return End("pruned" if error.alarm else "failed", text, {})
    return End("failed", text if isinstance(error, InputError) else f"{type(error).__name__}: {text}", {})
