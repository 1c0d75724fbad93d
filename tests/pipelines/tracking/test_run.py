import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.config import InputError
from pipelines.tracking.run import EXPERIMENT, Tracker, check_key, flatten
from pipelines.tracking.server import resolve_uri
from tests.support.mlflow_runs import history, run_of
from tests.support.paths import ROOT

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)

WRITER = """
import sys
from pipelines.tracking.run import EXPERIMENT, Tracker
tracker = Tracker.start(None, EXPERIMENT, sys.argv[1], {"seed": sys.argv[1]}, {})
for step in range(200):
    tracker.log({"train/loss/cma": step / 7, "perf/samples_per_second": 2.0}, step)
sys.exit(tracker.finish())
"""


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
