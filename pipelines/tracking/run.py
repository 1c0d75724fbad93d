"""Runs in MLflow: the only file that imports it.

One process writes, the driver, and training never waits for the server. A **new** run needs an answer when it starts
(it has no id without one): a wrong address, a refused sign-in or a server that is down ends in one line within seconds,
before anything is trained. From then on, and for a run that is **continued**, a server that is away only delays: points
wait in memory and, beyond a bound, in a file, and are sent when it is back. What is left at the end stays in that file.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import posixpath
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from models.config import InputError, dotted
from models.redact import redact
from pipelines.tracking.outbox import Courier, Outbox, Point
from pipelines.tracking.server import SQLITE, probe, reason, resolve_uri

logger = logging.getLogger(__name__)

EXPERIMENT = "triptych"
Status = Literal["FINISHED", "FAILED", "KILLED"]

_POINTS, _PARAMS = 1000, 100  # the REST interface's limits of one log_batch
_PARAM_LENGTH, _TAG_LENGTH = 6000, 8000
_REFUSALS = {  # MLflow's error code -> what to do, "": MLflow's own words; every other failure may pass
    "UNAUTHENTICATED": "not signed in (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or a token",
    "PERMISSION_DENIED": "no permission (403): ask for write access, or set MLFLOW_TRACKING_URI to another server",
    "ENDPOINT_NOT_FOUND": "what answers there is no MLflow server (404): correct MLFLOW_TRACKING_URI",
    "INVALID_PARAMETER_VALUE": "",
    "RESOURCE_DOES_NOT_EXIST": "",
}


def flatten(tree: Mapping[str, Any]) -> dict[str, str]:
    """{"optim": {"learning_rate": 1e-3}} -> {"optim.learning_rate": "0.001"}; lists become JSON."""
    return {
        key: json.dumps(value) if isinstance(value, list | tuple) else str(value) for key, value in dotted(tree).items()
    }


def check_key(key: str) -> str:
    """`key`, if MLflow takes it as the name of a metric; raises ValueError else."""
    whole = posixpath.normpath(key) == key and key[:1] not in "/." and len(key) <= 250
    if not whole or not re.fullmatch(r"[\w\-. :/]+", key):
        raise ValueError(f"metric name {key!r}: needs letters, digits, _ - . : / or space, no empty part, at most 250")
    return key


class Tracker:
    """One MLflow run: `log` queues, a thread sends. Made by `start`, ended by `finish`."""

    def __init__(
        self, uri: str, run_id: str, params: Mapping[str, str], tags: Mapping[str, str], outbox: Outbox
    ) -> None:
        self.uri, self.run_id = uri, run_id
        self._params, self._tags = params, tags
        self._outbox = outbox
        self._client: Any = None
        self._described = not params and not tags
        self._status: Status = "FINISHED"
        self._courier: Courier | None = None

    @classmethod
    def start(
        cls,
        uri: str | None,
        experiment: str,
        run_name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        run_id: str | None = None,
    ) -> "Tracker":
        """Creates a run, or continues `run_id`: parameters that it has are not logged again.

        Raises InputError in one line where the server refuses, or (new run) is not there. A continued run that the
        server does not know begins anew, with a warning and the tag `triptych.continues`.
        """
        uri = resolve_uri(uri)
        tags = {key: redact(value)[:_TAG_LENGTH] for key, value in {**tags, "mlflow.runName": run_name}.items()}
        client = None
        try:
            with answers(uri):
                client = connect(uri)
                if run_id and not _exists(client, run_id):
                    logger.warning("MLflow run %s is not at %s: its history goes on in a new run", run_id, redact(uri))
                    tags, run_id = tags | {"triptych.continues": run_id}, None
                if not run_id:
                    home = _experiment(client, uri, experiment)
                    run_id = str(client.create_run(home, run_name=run_name, tags=tags).info.run_id)
        except ConnectionError as error:
            if not run_id:
                raise InputError(f"{error}; start the server, or correct or unset MLFLOW_TRACKING_URI") from error
            logger.warning("%s; points are kept and sent when it is back", error)
        tracker = cls(uri, run_id, params, tags, Outbox(Path(f"mlflow-unsent-{run_id}.jsonl").absolute()))
        if client is not None:
            with contextlib.suppress(ConnectionError), answers(uri):  # else the thread does it
                tracker._describe(client)
        tracker._courier = Courier(tracker._send, tracker._warn)
        return tracker

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the values of one step and returns at once; raises ValueError for a name MLflow would not take."""
        now = int(time.time() * 1000)
        self._outbox.add([Point(check_key(key), float(value), now, step) for key, value in metrics.items()])

    def log_artifacts(self, local: str, path: str | None = None, patience: float = 60.0) -> bool:
        """Uploads a folder's content, or one file, to `path` of the run; tries again for `patience` seconds.

        Returns whether it is there; if not, a warning says how to upload it later. Raises FileNotFoundError.
        """
        if not Path(local).exists():
            raise FileNotFoundError(local)
        deadline, pause = time.monotonic() + patience, 1.0
        while True:
            try:
                client = connect(self.uri)
                upload = client.log_artifacts if Path(local).is_dir() else client.log_artifact
                upload(self.run_id, local, path)
                return True
            except Exception as error:  # a lost server or a full disk must not spoil a run whose training is done
                if time.monotonic() + pause > deadline:
                    verb = "log-artifacts --local-dir" if Path(local).is_dir() else "log-artifact --local-file"
                    place = f" --artifact-path {path}" if path else ""
                    later = f"mlflow artifacts {verb} {local} --run-id {self.run_id}{place}"
                    logger.warning("%s is not in MLflow (%s); upload it later: %s", local, reason(error), later)
                    return False
            time.sleep(pause)
            pause *= 2

    def finish(self, status: Status = "FINISHED", limit: float = 60.0) -> int:
        """Sends what is left and closes the run, in at most `limit` seconds; returns how many points are unsent.

        They stay in a file which a warning names, together with the command that sends them.
        """
        assert self._courier, "made by start"
        self._status = status
        if not self._courier.done and not self._courier.finish(limit):
            self._outbox.store()
            logger.warning(
                "MLflow at %s: run %s is not closed and %d points are unsent, kept in %s; send them later: %s",
                *(redact(self.uri), self.run_id, len(self._outbox), self._outbox.path),
                f"python -m pipelines.tracking {self._outbox.path} {status}",
            )
        return len(self._outbox)

    def _send(self, last: bool) -> None:
        """Sends all that waits and, the last time, closes the run. Raises whatever the client raises."""
        if not self._outbox and not last and self._described:
            return
        client, self._client = self._client or connect(self.uri), None  # after a failure: probe first
        if not self._described:
            self._describe(client)
        while self._outbox and not (self._courier and self._courier.abandoned):
            self._outbox.send(_POINTS, lambda points: _log(client, self.run_id, points))
        if last and not self._outbox:
            client.set_terminated(self.run_id, self._status)
        self._client = client

    def _warn(self, error: Exception) -> None:
        """Once for each time the server goes away."""
        logger.warning("MLflow at %s: %s; points are kept and sent when it is back", redact(self.uri), reason(error))

    def _describe(self, client: Any) -> None:
        """Logs the parameters that the run lacks and the tags; marks it as running."""
        from mlflow.entities import Param, RunTag

        there = client.get_run(self.run_id).data.params
        names = {re.sub(r"[^\w\-. :/]", "_", key)[:250]: value for key, value in self._params.items()}
        params = [Param(name, redact(value)[:_PARAM_LENGTH]) for name, value in names.items() if name not in there]
        for first in range(0, len(params), _PARAMS):
            client.log_batch(self.run_id, params=params[first : first + _PARAMS])
        tags = [RunTag(key, value) for key, value in self._tags.items()]
        client.log_batch(self.run_id, tags=tags)
        client.update_run(self.run_id, status="RUNNING")
        self._described = True


def connect(uri: str) -> Any:
    """An MLflow client; raises ConnectionError within seconds where nothing answers."""
    if problem := probe(uri):
        raise ConnectionError(problem)
    # MLflow's telemetry thread changes os.environ while requests reads it; its retries block for minutes, ours do not.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for results
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _alone(uri):
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: several that make the tables of one SQLite file together leave it broken (measured)."""
    if not uri.startswith(SQLITE):
        yield
        return
    folder = os.open(Path(uri.removeprefix(SQLITE)).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def answers(uri: str) -> Iterator[None]:
    """Turns what the client raises into one line: InputError (refused) or ConnectionError (not there, or not now)."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # MLflow lets the errors of requests, SQLAlchemy and database drivers through
        code = getattr(error, "error_code", "")
        refused = code in _REFUSALS or isinstance(error, ImportError)
        message = f"MLflow at {redact(uri)}: {_REFUSALS.get(code) or reason(error)}"
        raise (InputError if refused else ConnectionError)(message) from error


def download(uri: str, artifacts: str, folder: str) -> str:
    """Copies a folder of artifacts (a URI that the server at `uri` gave) below a local folder; returns where it is."""
    connect(uri)
    from mlflow.artifacts import download_artifacts

    return str(download_artifacts(artifact_uri=artifacts, dst_path=folder, tracking_uri=uri))


def _log(client: Any, run_id: str, points: list[Point]) -> None:
    """Sends points in one request."""
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


def _exists(client: Any, run_id: str) -> bool:
    """Whether the server has the run, not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_run(run_id).info.lifecycle_stage) == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _experiment(client: Any, uri: str, name: str) -> str:
    """The experiment's id; made where it is missing. Files of a SQLite store lie beside it, as by MLflow's default."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        beside = str(Path(uri.removeprefix(SQLITE)).parent / "mlruns" / name) if uri.startswith(SQLITE) else None
        try:
            return str(client.create_experiment(name, beside))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        raise InputError(f"MLflow at {uri}: experiment {name} was deleted; bring it back: {restore}")
    return str(found.experiment_id)


def main() -> None:
    """Sends the points that a run could not send before it ended, and closes the run."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.tracking", description=main.__doc__)
    parser.add_argument("file", type=Path, help="mlflow-unsent-RUN.jsonl")
    parser.add_argument("status", choices=["FINISHED", "FAILED", "KILLED"], help="how the run ended")
    arguments = parser.parse_args()
    if not arguments.file.is_file():
        parser.error(f"{arguments.file}: no such file")
    run_id = arguments.file.stem.removeprefix("mlflow-unsent-")
    tracker = Tracker(resolve_uri(), run_id, {}, {}, Outbox(arguments.file.absolute()))
    tracker._courier = Courier(tracker._send, tracker._warn)
    logging.basicConfig(format="%(message)s")
    tracker.finish(arguments.status)
    sys.exit(0 if tracker._courier.done else 1)
