"""What MLflow remembers of runs: learning curves, what they took, how they ended; for whoever compares them."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from models.config import InputError
from pipelines.tracking.run import answers, connect
from pipelines.tracking.server import SQLITE, resolve_uri

logger = logging.getLogger(__name__)


class History(NamedTuple):
    """A run's past."""

    status: str
    """MLflow's: RUNNING, FINISHED, KILLED, FAILED."""
    seconds: float
    """From its start to its end, the pause before a resume included; 0 while it runs."""
    curve: list[tuple[float, float]]
    """(samples seen, value of the metric) in order of samples; a step that was trained twice counts once."""
    tags: dict[str, str]


class Histories:
    """Reads runs of one tracking server; where it is away, says so once and knows nothing."""

    def __init__(self, uri: str | None = None) -> None:
        self.uri = resolve_uri(uri)
        self._client: Any = None
        self._away = _no_file(self.uri)

    def read(self, run_id: str, metric: str) -> History | None:
        """A run with the curve of one metric; None where the server is away, refuses, or does not have the run."""
        if self._away or not run_id:
            return None
        try:
            with answers(self.uri):
                self._client = self._client or connect(self.uri)
                run = self._client.get_run(run_id)
                values = self._client.get_metric_history(run_id, metric)
                samples = self._client.get_metric_history(run_id, "samples_seen")
        except InputError as error:
            logger.debug("%s", error)  # most often another server has it
            return None
        except ConnectionError as error:
            logger.warning("%s; the comparison goes on without MLflow", error)
            self._away = True
            return None
        at = {point.step: float(point.value) for point in sorted(samples, key=lambda point: point.timestamp)}
        last = {point.step: float(point.value) for point in sorted(values, key=lambda point: point.timestamp)}
        curve = sorted((at[step], value) for step, value in last.items() if step in at)
        seconds = (run.info.end_time - run.info.start_time) / 1000 if run.info.end_time else 0.0
        return History(str(run.info.status), seconds, curve, dict(run.data.tags))


def attach(run_id: str, file: Path, uri: str | None = None) -> bool:
    """Upload one file to the artifacts of a run, whatever its state, which stays; returns whether it is there.

    Tries once, for it can be done again; a warning says why it did not work.
    """
    uri = resolve_uri(uri)
    try:
        with answers(uri):
            if _no_file(uri):
                raise ConnectionError("there is no such file")
            connect(uri).log_artifact(run_id, str(file))
        return True
    except (InputError, ConnectionError) as error:
        logger.warning("%s is not in MLflow: %s", file.name, error)
        return False


def _no_file(uri: str) -> bool:
    """Whether it is a SQLite store that does not exist; connecting would make it."""
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file()
