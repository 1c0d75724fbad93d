"""A trial in its own process: the same `fit` that `triptych train` calls, which Ray Tune hears of and steers.

A Tune step is the training up to the next hold. The run waits there while the scheduler decides, so no sample is
trained that is not wanted, and leaves by itself when it is told to: its slots are free again, nothing is killed.
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
from tuning.sweep.sweep_record import METRIC, place_of

FATAL_ALARMS = (COLLAPSE,)
"""Keys of alarms that end a trial, where `triptych train` only warns: it would cost samples and win nothing."""
LEAVING_SECONDS = 120.0
"""Longest wait for a run that was told to leave."""
HEAR_SECONDS = 0.2
"""Seconds between two looks for a run's events."""

Ending = Literal["finished", "paused", "pruned", "failed"]


class TrialFailed(RuntimeError):
    """A trial ended without a model; one line that says why."""


class Task(NamedTuple):
    """What a trial's process is to do."""

    trial_id: str
    overrides: dict[str, Any]
    """{dotted key: value}."""
    seed: int | None = None
    """Of a repeat."""
    until: int = 0
    """Samples after which the trial leaves, to go on later; 0: it trains to its end."""
    report: tuple[int, float] | None = None
    """A validation of an earlier driver's time that the scheduler has still to decide on."""


class End(NamedTuple):
    """How a run ended."""

    status: Ending
    reason: str
    metrics: dict[str, float]
    """Of the packaged model, where finished."""


class TrialRun(tune.Trainable):  # type: ignore[misc]  # Ray is not typed
    """One trial after the other, each a run folder; `base`, `holds` and `post` come with `tune.with_parameters`."""

    def setup(self, config: dict[str, Any], base: ExperimentConfig, holds: tuple[int, ...], post: Any) -> None:
        """`config` is {"task": Task as a dict}; `post` is the Mailbox of the sweep's driver."""
        self._base, self._holds, self._post = base, holds, post
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another trial in the same process, which saves the time a process takes to start."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._task = Task(**config["task"])
        self._report = self._task.report
        self._thread: threading.Thread | None = None
        self._listener: Listener | None = None
        self._news: queue.Queue[Event | End] = queue.Queue()
        self._last: tuple[int, float] = (0, 0.0)
        self._started = time.monotonic()
        self._speaking = False

    def step(self) -> dict[str, Any]:
        """Train up to the next hold or to the end; returns samples seen and recall. Raises TrialFailed."""
        if self._report:
            (seen, value), self._report = self._report, None
            return {TIME: seen, METRIC: value}
        if self._listener is None:
            self._listener = Listener(self._hear, HEAR_SECONDS)
            self._thread = threading.Thread(target=self._train, args=(self._listener,), name="trial", daemon=True)
            self._thread.start()
        else:
            self._listener.mailbox.answer.remote(True)
        while True:
            news = self._news.get()
            if isinstance(news, End):
                return self._end(news)
            if not self._task.until or news["samples"] < self._task.until:
                return {TIME: news["samples"], METRIC: news["metrics"][METRIC]}
            self._listener.mailbox.answer.remote(False)

    def cleanup(self) -> None:
        """Let a run that waits at a hold leave, and wait until it has."""
        if self._thread is not None and self._thread.is_alive() and self._listener is not None:
            self._listener.mailbox.answer.remote(False)
            self._thread.join(LEAVING_SECONDS)

    def _end(self, end: End) -> dict[str, Any]:
        """Tell the driver, then Tune."""
        seen, value = self._last
        event = {"kind": "ended", "samples": seen, **end._asdict()}
        ray.get(self._post.put.remote(self._signed(event)))
        if end.status == "failed":
            raise TrialFailed(end.reason)
        return {TIME: seen, METRIC: value, "status": end.status, "done": True}

    def _train(self, listener: Listener) -> None:
        """The thread of the run: it always leaves an End behind, and all events have been heard before."""
        end = End("failed", "the trial's process was told to stop", {})
        try:
            metrics, error = self._fit(listener)
            listener.close()
            end = _judge(metrics, error)
        finally:
            self._news.put(end)

    def _fit(self, listener: Listener) -> tuple[dict[str, float], Exception | None]:
        """The packaged model's metrics, or what ended the run before."""
        folder = storage.join(self._base.out, self._base.name)
        place = place_of(folder, self._task.trial_id, self._task.seed)
        experiment = self._base.override(self._task.overrides | place)
        run = storage.join(experiment.out, experiment.name)
        scores = storage.join(run, "metrics.json")
        holds = (self._task.until,) if self._task.until else self._holds
        try:
            if storage.exists(scores):  # the driver was lost between the end of this run and its record
                samples = Manifest.load(storage.join(run, "manifest.parquet")).count
                value = float(listed_checkpoints(run)[-1].metrics[METRIC])
                self._last = (planned_samples(experiment, samples), value)
                return json.loads(storage.read_bytes(scores)), None
            resume = storage.exists(storage.join(run, "config.json"))
            return fit(experiment, resume, Following(listener.mailbox, holds, FATAL_ALARMS)).metrics, None
        except Exception as error:  # whatever it was, the sweep has to hear of it and go on
            return {}, error

    def _hear(self, event: Event) -> None:
        """An event of the run, on the listener's thread: the driver gets it, and a hold wakes `step`."""
        if not self._speaking:
            self._speaking = True
            seconds = time.monotonic() - self._started
            self._post.put.remote(self._signed({"kind": "startup", "seconds": seconds, **_place(event)}))
        if event["kind"] == "validation":
            self._last = (event["samples"], event["metrics"][METRIC])
        if event["kind"] == "hold":
            self._news.put(event)
        else:  # the driver has a validation before the scheduler decides on it
            ray.get(self._post.put.remote(self._signed(event)))

    def _signed(self, event: Event) -> Event:
        return {"trial_id": self._task.trial_id, "seed": self._task.seed, **event}


def _judge(metrics: dict[str, float], error: Exception | None) -> End:
    """What an ended run amounts to: pruned only where an alarm is what ended it, whatever it was warned of before."""
    if error is None:
        return End("finished", "", metrics)
    if isinstance(error, TrainingLeft):
        return End("paused", "", {})
    text = (str(error) or "-").splitlines()[0]
    if isinstance(error, TrainingFailed):
        return End("pruned" if error.alarm else "failed", text, {})
    return End("failed", text if isinstance(error, InputError) else f"{type(error).__name__}: {text}", {})


def _place(event: Event) -> Event:
    return {name: event[name] for name in ("step", "samples")}
