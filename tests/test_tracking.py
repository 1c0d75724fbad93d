import contextlib
import http.server
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.config import InputError
from pipelines import tracking
from pipelines.endpoint import redact, resolve_uri
from pipelines.outbox import Courier, Outbox, Point
from pipelines.tracking import EXPERIMENT, Tracker, check_key, flatten

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)

ROOT = Path(__file__).parent.parent
WRITER = """
import sys
from pipelines.tracking import EXPERIMENT, Tracker
tracker = Tracker.start(None, EXPERIMENT, sys.argv[1], {"seed": sys.argv[1]}, {})
for step in range(200):
    tracker.log({"train/loss/cma": step / 7, "perf/samples_per_second": 2.0}, step)
sys.exit(tracker.finish())
"""


def point(step: int) -> Point:
    return Point("train/loss/cma", step / 3, 1_700_000_000_000 + step, step)


def drained(outbox: Outbox, limit: int = 3) -> list[Point]:
    got: list[Point] = []
    while outbox:
        outbox.send(limit, got.extend)
    return got


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    return sorted((metric.step, metric.value) for metric in MlflowClient(uri).get_metric_history(run_id, key))


def run_of(uri: str, run_id: str):
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri).get_run(run_id)


# Names, addresses, secrets


def test_parameters_are_flattened_with_dots():
    tree = {"optim": {"learning_rate": 1e-3, "betas": (0.9, 0.999)}, "seed": 0, "encoder": {"text": {"tokenizer": ""}}}
    assert flatten(tree) == {
        "optim.learning_rate": "0.001",
        "optim.betas": "[0.9, 0.999]",
        "seed": "0",
        "encoder.text.tokenizer": "",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host:5000/x", "https://***@host:5000/x"),
        ("postgresql://u:p@ss@host/db", "postgresql://***@host/db"),
        ("s3://bucket/folder@2x/file", "s3://bucket/folder@2x/file"),
        ("https://h/a?X-Amz-Signature=abc&part=1", "https://h/a?X-Amz-Signature=***&part=1"),
        ("failed at http://u:p@h/ and http://v:q@i/", "failed at http://***@h/ and http://***@i/"),
    ],
)
def test_secrets_of_urls_are_not_shown(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize(
    "key", ["val/recall_at_1", "a b", "a:b", "é", "a@b", "a,b", "a//b", "/a", "../a", "a/", ".", "", "x" * 251]
)
def test_metric_names_are_refused_exactly_where_mlflow_refuses_them(key):
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_batch_log_data

    try:
        _validate_batch_log_data([Metric(key, 1.0, 0, 0)], [], [])
    except MlflowException:
        with pytest.raises(ValueError, match="metric name"):
            check_key(key)
    else:
        assert check_key(key) == key


def test_the_default_store_is_mlflows_own_file_in_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_uri() == "http://host:5000"
    assert resolve_uri("sqlite:///other.db") == f"sqlite:///{tmp_path}/other.db"


# What waits for the server


def test_points_beyond_the_memory_go_on_in_a_file_and_none_is_lost(tmp_path):
    outbox = Outbox(tmp_path / "unsent.jsonl", capacity=5)
    for step in range(12):
        outbox.add([point(step)])
    assert len(outbox) == 12 and len(outbox.path.read_text().splitlines()) == 7
    assert drained(outbox) == [point(step) for step in range(12)]
    assert not outbox.path.exists()


def test_points_stay_when_delivery_fails(tmp_path):
    def refuse(points: list[Point]) -> None:
        raise ConnectionError

    outbox = Outbox(tmp_path / "unsent.jsonl", capacity=1)
    outbox.add([point(0)])
    outbox.add([point(1)])
    for _ in range(2):
        with pytest.raises(ConnectionError):
            outbox.send(10, refuse)
        outbox.send(10, lambda points: None)  # first the one in memory, then the one in the file
    assert len(outbox) == 0


def test_points_of_an_earlier_process_are_sent_and_half_a_line_is_cut_off(tmp_path):
    first = Outbox(tmp_path / "unsent.jsonl")
    first.add([point(0), point(1)])
    first.store()
    with first.path.open("a") as file:
        file.write('["train/loss')
    second = Outbox(first.path, capacity=0)
    second.add([point(2)])
    assert drained(second) == [point(0), point(1), point(2)]


def test_a_folder_that_cannot_be_written_keeps_points_in_memory(tmp_path, caplog):
    (tmp_path / "file").touch()
    outbox = Outbox(tmp_path / "file" / "unsent.jsonl", capacity=1)
    for step in range(4):
        outbox.add([point(step)])
    outbox.store()
    assert drained(outbox) == [point(step) for step in range(4)]
    assert len(caplog.records) == 1


def test_the_courier_goes_on_after_failures_and_reports_each_outage_once():
    answers = iter([True, False, False, True, False, True])
    calls: list[bool] = []
    reports: list[Exception] = []

    def send(last: bool) -> None:
        calls.append(last)
        if not next(answers, True):
            raise ConnectionError

    courier = Courier(send, reports.append, gather=0.001, longest=0.002)
    deadline = time.monotonic() + 10
    while len(calls) < 6 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert courier.finish(10) and calls[-1] and len(reports) == 2


def test_the_courier_gives_up_after_the_limit():
    def send(last: bool) -> None:
        raise ConnectionError

    started = time.monotonic()
    assert not Courier(send, lambda error: None).finish(limit=0.2)
    assert time.monotonic() - started < 5


# A start that cannot work


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers /CODE/... with that status, and a page that is no JSON."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1] or 200))
        self.end_headers()
        self.wfile.write(b"<html>")

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def answering() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:secret@127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "hint"), [(401, "sign"), (403, "permission"), (404, "no MLflow server"), (200, "JSON")]
)
def test_a_server_that_refuses_ends_the_start_in_one_line(answering, code, hint):
    with pytest.raises(InputError, match=hint) as caught:
        Tracker.start(f"{answering}/{code}", EXPERIMENT, "run", {}, {})
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value) and "127.0.0.1" in str(caught.value)


def test_an_address_where_nothing_works_ends_the_start_in_one_line_within_seconds(tmp_path):
    (tmp_path / "text.db").write_text("this is no database" * 100)
    started = time.monotonic()
    for uri in (
        "http://127.0.0.1:1",
        "postgresql://user:secret@127.0.0.1:1/db",
        "htp://127.0.0.1",
        "./mlruns",
        f"sqlite:///{tmp_path}/missing/mlflow.db",
        f"sqlite:///{tmp_path}/text.db",
    ):
        with pytest.raises(InputError, match="MLflow at") as caught:
            Tracker.start(uri, EXPERIMENT, "run", {}, {})
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert time.monotonic() - started < 30


# SQLite


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """A SQLite store made by two processes that start at once in an empty folder, each with a run."""
    folder = tmp_path_factory.mktemp("store")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment["PYTHONPATH"] = str(ROOT)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(seed)], cwd=folder, env=environment) for seed in range(2)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    return f"sqlite:///{folder}/mlflow.db"


def test_two_processes_that_write_at_once_lose_no_point(store):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert sorted(run.data.params["seed"] for run in runs) == ["0", "1"]
    for run in runs:
        assert history(store, run.info.run_id, "train/loss/cma") == [(step, step / 7) for step in range(200)]
        assert run.info.status == "FINISHED" and run.info.run_name == run.data.params["seed"]
        assert run.info.artifact_uri.startswith(str(Path(store.removeprefix("sqlite:///")).parent / "mlruns"))


def test_a_continued_run_stays_the_same_run(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"optim.learning_rate": "0.001", "long": "x" * 7000, "data": "s3://key:secret@host/x"} | {
        f"many.{i}": "1" for i in range(150)
    }
    first = Tracker.start(store, EXPERIMENT, "again", params, {"preset": "tcl-tiny", "url": "http://a:secret@b"})
    first.log({"val/image_retrieval_recall_at_1": 0.1}, 1)
    assert first.finish("FAILED") == 0 and first.finish("FAILED") == 0
    assert run_of(store, first.run_id).info.status == "FAILED"

    second = Tracker.start(store, EXPERIMENT, "again", params | {"seed": "1", "long": "other"}, {}, first.run_id)
    assert run_of(store, first.run_id).info.status == "RUNNING"
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "config.json").write_text("{}")
    assert second.log_artifacts(str(tmp_path / "package"), "package")
    second.log({"val/image_retrieval_recall_at_1": 0.2, "train/loss/cma": float("nan")}, 2)
    assert second.finish() == 0 and second.run_id == first.run_id

    run = run_of(store, first.run_id)
    assert run.info.status == "FINISHED" and len(run.data.params) == 154
    assert run.data.params["long"] == "x" * 6000 and run.data.params["data"] == "s3://***@host/x"
    assert run.data.tags["url"] == "http://***@b" and run.data.tags["preset"] == "tcl-tiny"
    assert history(store, first.run_id, "val/image_retrieval_recall_at_1") == [(1, 0.1), (2, 0.2)]
    assert (Path(run.info.artifact_uri) / "package" / "config.json").read_text() == "{}"


def test_a_run_that_the_store_does_not_know_begins_anew(store, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.start(store, EXPERIMENT, "lost", {}, {}, run_id="0123456789abcdef")
    assert tracker.finish() == 0 and tracker.run_id != "0123456789abcdef"
    assert run_of(store, tracker.run_id).data.tags["triptych.continues"] == "0123456789abcdef"
    assert "0123456789abcdef" in caplog.text


def test_a_name_that_mlflow_refuses_is_a_mistake_of_ours(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.start(store, EXPERIMENT, "names", {}, {})
    with pytest.raises(ValueError, match="recall@1"):
        tracker.log({"recall@1": 0.5}, 0)
    assert tracker.finish() == 0


# A server that goes away and comes back


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
def gate(tmp_path_factory) -> Iterator[Gate]:
    """A real MLflow server, on a file of its own, behind a gate."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///server.db", "--workers", "1"]
    command += ["--artifacts-destination", "./artifacts", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield Gate(port)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


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
        tracking.main()
    assert ended.value.code == 0 and not unsent.exists()
    assert history(uri, first.run_id, "train/loss/cma") == [(1, 1.0), (2, 2.0)]
    assert run_of(uri, first.run_id).info.status == "KILLED"
