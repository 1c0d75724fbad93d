import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pipelines.tracking import run
from pipelines.tracking.run import EXPERIMENT, Tracker
from tests.support.mlflow_runs import history, run_of
from tests.support.paths import ROOT
from tests.support.servers import MlflowServer, mlflow_server, postgres
from tests.support.tracking_load import value

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)


class Gate:
    """A TCP relay in front of a server: closed, it refuses connections, as a stopped server does."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.port = 0
        self.open()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._pairs.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=[source, sink], daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def on_postgresql(tmp_path_factory) -> Iterator[MlflowServer]:
    with postgres() as store, mlflow_server(tmp_path_factory.mktemp("server"), store) as server:
        yield server


@pytest.fixture(scope="module")
def gate(on_sqlite) -> Gate:
    """A real MLflow server, on a file of its own, behind a gate."""
    return Gate(on_sqlite.port)


def test_a_server_that_is_away_for_seconds_delays_and_loses_nothing(gate, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING)
    tracker = Tracker.start(f"http://127.0.0.1:{gate.port}", EXPERIMENT, "away", {"seed": "0"}, {})
    slowest = 0.0
    for step in range(200):
        if step == 50:
            gate.close()
        if step == 170:
            gate.open()
        started = time.monotonic()
        tracker.log({"train/loss/cma": step / 7, "train/loss/mlm": 1.0}, step)
        slowest = max(slowest, time.monotonic() - started)
        time.sleep(0.02)
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.safetensors").write_bytes(bytes(1000))
    assert tracker.log_artifacts(str(package), "package")
    assert tracker.finish() == 0 and slowest < 0.5
    uri = f"http://127.0.0.1:{gate.port}"
    assert history(uri, tracker.run_id, "train/loss/cma") == [(step, step / 7) for step in range(200)]
    assert len(history(uri, tracker.run_id, "train/loss/mlm")) == 200
    assert run_of(uri, tracker.run_id).info.status == "FINISHED"
    assert sum("points are kept" in record.message for record in caplog.records) == 1


def test_points_that_are_left_at_the_end_are_kept_in_a_file_and_sent_later(gate, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    uri = f"http://127.0.0.1:{gate.port}"
    first = Tracker.start(uri, EXPERIMENT, "late", {}, {})
    gate.close()
    first.log({"train/loss/cma": 1.0}, 1)
    assert not first.log_artifacts(str(tmp_path), "package", patience=0)
    assert first.finish("KILLED", limit=0.5) == 1
    unsent = tmp_path / f"mlflow-unsent-{first.run_id}.jsonl"
    assert str(unsent) in caplog.text and json.loads(unsent.read_text())[0] == "train/loss/cma"

    second = Tracker.start(uri, EXPERIMENT, "late", {"seed": "7"}, {}, first.run_id)  # the server is still away
    second.log({"train/loss/cma": 2.0}, 2)
    assert second.finish("KILLED", limit=0.5) == 2

    gate.open()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(sys, "argv", ["tracking", str(unsent), "KILLED"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 0 and not unsent.exists()
    assert history(uri, first.run_id, "train/loss/cma") == [(1, 1.0), (2, 2.0)]
    assert run_of(uri, first.run_id).info.status == "KILLED"


# Many writers at once


def start_writers(uri: str, processes: int, steps: int, pause: float) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tests.support.tracking_load", uri, str(processes), str(steps), str(pause)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)


def check_points(server: MlflowServer, runs: list[str], steps: int) -> None:
    """Every point of every run, with its value."""
    assert len(set(runs)) == len(runs)
    for process, run_id in enumerate(runs):
        expected = [(step, value(process, step)) for step in range(steps)]
        assert history(server.uri, run_id, "train/loss/total") == expected
        assert len(history(server.uri, run_id, "perf/samples_per_second")) == steps
        assert run_of(server.uri, run_id).info.status == "FINISHED"


@pytest.mark.parametrize("store", ["on_sqlite", "on_postgresql"])
def test_many_processes_that_write_at_once_lose_no_point(store, request):
    server = request.getfixturevalue(store)
    writers = start_writers(server.uri, 4, 20, 0.01)
    check_points(server, json.loads(writers.communicate(timeout=200)[0]), 20)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("store", ["on_sqlite", "on_postgresql"])
def test_eight_processes_of_200_steps_lose_no_point_though_the_server_stops_for_30_seconds(store, request):
    server = request.getfixturevalue(store)
    writers = start_writers(server.uri, 8, 200, 0.3)
    time.sleep(35)  # in the middle: they write for 60 s after their imports
    server.stop()
    time.sleep(30)
    server.start()
    check_points(server, json.loads(writers.communicate(timeout=400)[0]), 200)
