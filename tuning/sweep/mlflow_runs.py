"""A sweep in MLflow: one parent run, one child a trial, each created once and found again after whatever happens.

Only the sweep's driver writes. While the server is away, training goes on, and the metrics of its trials wait.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from models.config import InputError
from models.redact import redact
from pipelines import storage
from pipelines.artifacts.resolve import local_copy
from pipelines.tracking.run import EXPERIMENT, Status, Tracker, answers, connect
from pipelines.tracking.server import resolve_uri

logger = logging.getLogger(__name__)

PARENT_TAG, TRIAL_TAG, FOLDER_TAG, STATUS_TAG = (
    "mlflow.parentRunId",
    "triptych.trial",
    "triptych.run_folder",
    "triptych.status",
)
RETRY_SECONDS = 5.0
"""Between two attempts to create a child while the server is away."""
CLOSING_SECONDS, LAST_SECONDS = 60.0, 10.0
"""Longest wait at the end of the sweep for what the server has not taken yet, and for keeping the rest in files."""


class FoundRun(NamedTuple):
    """A run that the tracking server knows."""

    run_id: str
    status: str
    """MLflow's: RUNNING, FINISHED, FAILED, KILLED."""
    trial_id: str
    """"" for a run that is no trial."""


def find_runs(tag: str, value: str) -> list[FoundRun]:
    """The active runs of our experiment with a tag; none where the server does not answer, with a warning.

    Raises InputError where it refuses.
    """
    uri, found, token = resolve_uri(), list[FoundRun](), None
    quote = '"' if "'" in value else "'"
    try:
        with answers(uri):
            client = connect(uri)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            while experiment is not None:
                page = client.search_runs(
                    [experiment.experiment_id], f"tags.`{tag}` = {quote}{value}{quote}", page_token=token
                )
                found += [FoundRun(r.info.run_id, r.info.status, r.data.tags.get(TRIAL_TAG, "")) for r in page]
                token = page.token
                if not token:
                    break
    except ConnectionError as error:
        logger.warning("%s; runs of an interrupted start cannot be found there now", error)
    return found


class ChildRun:
    """The MLflow run of one trial, a child of the sweep's run.

    It is created as soon as the server answers. Until then `log` keeps the values, so training never waits for MLflow.
    """

    def __init__(self, name: str, params: Mapping[str, str], tags: Mapping[str, str], run_id: str = "") -> None:
        """`run_id`: the run to continue; empty: a new one is created."""
        self._name, self._params, self._tags = name, params, tags
        self.run_id = run_id
        self._waiting: list[tuple[Mapping[str, float], int]] = []
        self._tracker: Tracker | None = None
        self._next_attempt, self._warned = 0.0, False
        self._closing: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._lock = threading.Lock()

    @property
    def closing(self) -> bool:
        """Whether `close` has been called."""
        return self._closing is not None

    def open(self) -> bool:
        """Create or continue the run, at most every `RETRY_SECONDS`; returns whether the run exists."""
        with self._lock:
            if self._tracker is None and time.monotonic() >= self._next_attempt:
                self._next_attempt = time.monotonic() + RETRY_SECONDS
                try:
                    known = self.run_id or None
                    self._tracker = Tracker.start(None, EXPERIMENT, self._name, self._params, self._tags, known)
                    self.run_id = self._tracker.run_id
                except InputError as error:
                    if not self._warned:
                        logger.warning("trial %s is not in MLflow yet: %s", self._name, error)
                    self._warned = True
            if self._tracker is not None:
                for metrics, step in self._waiting:
                    self._tracker.log(metrics, step)
                self._waiting.clear()
            return self._tracker is not None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the values of one optimiser step; they are sent as soon as the run exists."""
        with self._lock:
            self._waiting.append((metrics, step))
        self.open()

    def close(self, status: Status, tag: str, package: str = "") -> None:
        """End the run, in a thread: upload the `package` folder (any URI), set `tag` as its status, send the rest."""
        self._abandoned.clear()
        self._closing = threading.Thread(target=self._close, args=(status, tag, package), daemon=True)
        self._closing.start()

    def wait(self, seconds: float) -> None:
        """Wait for `close` to end; after `seconds` what the server has not taken is kept in a file, with a warning."""
        if self._closing is not None:
            self._closing.join(max(seconds, 0.0))
            self._abandoned.set()
            self._closing.join(LAST_SECONDS)

    def _close(self, status: Status, tag: str, package: str) -> None:
        while not self.open() and not self._abandoned.wait(RETRY_SECONDS):
            pass
        tracker = self._tracker
        if tracker is None:
            logger.warning("trial %s never came to MLflow; sweep.json has its results", self._name)
            return
        if package:
            try:
                with local_copy(package) as folder:
                    tracker.log_artifacts(str(folder), "package")
            except (InputError, FileNotFoundError) as error:
                logger.warning("trial %s: its package is not in MLflow: %s", self._name, error)
        while not self._set_tag(tracker, tag) and not self._abandoned.wait(RETRY_SECONDS):
            pass
        tracker.finish(status, LAST_SECONDS / 2 if self._abandoned.is_set() else CLOSING_SECONDS)

    def _set_tag(self, tracker: Tracker, tag: str) -> bool:
        with contextlib.suppress(ConnectionError, InputError), answers(tracker.uri):
            connect(tracker.uri).set_tag(tracker.run_id, STATUS_TAG, tag)
            return True
        return False


def start_parent(name: str, folder: str, params: Mapping[str, str], tags: Mapping[str, str], run_id: str) -> Tracker:
    """The sweep's own run; raises InputError where a new one cannot be created.

    A new sweep first looks for one that was created for its folder by a start that was killed before it wrote there.
    """
    if not run_id:
        left = [run.run_id for run in find_runs(FOLDER_TAG, redact(folder)) if run.status == "RUNNING"]
        run_id = left[0] if left else ""
    kind = {FOLDER_TAG: folder, "triptych.kind": "sweep"}
    return Tracker.start(None, EXPERIMENT, name, params, dict(tags) | kind, run_id or None)


def finish_parent(tracker: Tracker, status: Status, metrics: Mapping[str, float], tag: str, file: str) -> None:
    """Log the summary metrics, store the record (`file`) as an artifact and end the sweep's own run."""
    tracker.log(metrics, 0)
    with contextlib.suppress(ConnectionError, InputError), answers(tracker.uri):
        connect(tracker.uri).set_tag(tracker.run_id, STATUS_TAG, tag)
    if storage.is_local(file):
        tracker.log_artifacts(str(Path(file)), patience=10.0)
    tracker.finish(status)
