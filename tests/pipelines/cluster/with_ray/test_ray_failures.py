"""Ray that does not start, cannot be joined or dies: every command ends with code 1 and one line that says so."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import ray
from ray import exceptions
from ray.serve.exceptions import RayServeException

from models.config import Failed, InputError
from pipelines.cli import console
from pipelines.cli.console import exit_code
from pipelines.cli.main import main
from pipelines.cluster import connect
from pipelines.evaluation import evaluate as evaluate_module
from pipelines.storage import Unavailable
from serving.service.run import _state
from tests.support.pairs import make_pairs, write_parquet_pairs
from tests.support.paths import ROOT
from tests.support.promotion_cases import make_run
from tests.support.serving_models import save_small

NOT_STARTED = {
    "a late raylet, Node.__init__": Exception(
        "The current node timed out during startup. This could happen because some of the raylet failed to startup or "
        "the GCS has become overloaded."
    ),
    "a late GCS, wait_for_persisted_port": RuntimeError(
        "Timed out waiting for file /tmp/ray/session_1/gcs_server_port_1"
    ),
    "a lost GCS, Node._init_gcs_client": RuntimeError(
        "Failed to start GCS.  Last 1 lines of error files:\n[E] bind\n.Please check gcs_server.out for details. "
        'Last connection error: Traceback (most recent call last):\n  File "x.py"\nRpcError: no'
    ),
    "validate_socket_filepath": OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes"),
    "try_to_create_directory": PermissionError(errno.EACCES, "Permission denied", "/tmp/ray"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "too little memory, resolve_object_store_memory": ValueError(
        "Attempting to cap object store memory usage at 1 bytes"
    ),
    "a taken port, start_api_server": ValueError("Failed to bind to 127.0.0.1:8265 because it's already occupied."),
    "no token, ensure_token_if_auth_enabled": exceptions.AuthenticationError("RAY_AUTH_TOKEN_PATH is set but empty"),
    "the core worker, worker.connect": exceptions.RaySystemError("System error: Failed to register worker"),
    "an RPC": exceptions.RpcError("failed to connect to all addresses"),
    "asserts without a word in node.py": AssertionError(),
}


class FakeRay:
    """Stands for ray.init: raises `outcomes` one after the other, then nothing; `calls` are the options it got."""

    def __init__(self) -> None:
        self.outcomes: list[Exception] = []
        self.calls: list[dict] = []

    def init(self, **options) -> None:
        self.calls.append(options)
        if self.outcomes:
            raise self.outcomes.pop(0)


@pytest.fixture
def fake_ray(monkeypatch):
    fake = FakeRay()
    with mock.patch.dict(os.environ):
        for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_gcs_server_port_wait_time_s"):
            os.environ.pop(name, None)
        monkeypatch.setattr(ray, "init", fake.init)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.setattr(connect, "_say_if_lost", lambda: None)
        yield fake


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "package"
    save_small(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_parquet_pairs(f"{folder}/0.parquet", make_pairs(20))
    return str(folder)


def last_line(err: str) -> str:
    """The last line on standard error, the only one of its kind; nothing looks like a traceback."""
    lines = err.strip().splitlines()
    assert "Traceback" not in err and [line for line in lines if line.startswith("triptych: ")] == lines[-1:], err
    return lines[-1]


@pytest.mark.parametrize("error", NOT_STARTED.values(), ids=NOT_STARTED)
def test_a_start_that_fails_once_is_tried_again_and_the_command_goes_on(
    error, fake_ray, package, data, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate_module, "evaluate_package", lambda *_: {"images": 20.0, "captions": 20.0})
    monkeypatch.setattr("pipelines.recall.recall_table", lambda metrics: f"{metrics['images']:.0f} images")
    fake_ray.outcomes = [error]
    assert main(["evaluate", package, "--data", data]) == 0
    out, err = capsys.readouterr()
    assert out == "20 images\n" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("Ray did not start (") and err.endswith("; trying once more\n")
    assert [options.get("include_dashboard", True) for options in fake_ray.calls] == [True, False]


@pytest.mark.parametrize("error", NOT_STARTED.values(), ids=NOT_STARTED)
def test_a_start_that_fails_twice_is_one_line_with_what_to_do(error, fake_ray, package, data, capsys):
    fake_ray.outcomes = [error, error]
    assert main(["evaluate", package, "--data", data]) == 1
    line = last_line(capsys.readouterr().err)
    assert line.startswith("triptych: Ray did not start on this machine, tried twice (") and "its logs: " in line
    assert (" ".join(str(error).split())[:60].strip(" .") or "AssertionError") in line
    advice = {
        OSError: "RAY_TMPDIR",
        PermissionError: "RAY_TMPDIR",
        exceptions.AuthenticationError: "RAY_AUTH_TOKEN_PATH",
    }
    assert advice.get(type(error), "close other programs, or join a running cluster by RAY_ADDRESS") in line
    assert len(fake_ray.calls) == 2


@pytest.mark.parametrize("command", ["train", "tune", "evaluate", "promote", "embed", "serve"])
def test_every_command_that_starts_ray_says_so(
    command, fake_ray, package, data, empty_mlflow, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    training = ["clip-tiny", "--train-data", data, "--val-data", data, "--out", "runs"]
    words = {
        "train": training,
        "tune": [*training, "--space", "temperature", "--trials", "2"],
        "evaluate": [package, "--data", data],
        "promote": [make_run(tmp_path / "run", data, 6, None), "--name", "shop"] if command == "promote" else [],
        "embed": [package, "--data", data, "--out", "vectors"],
        "serve": [package, "--port", str(free_port())],
    }[command]
    fake_ray.outcomes = [NOT_STARTED["a late raylet, Node.__init__"]] * 2
    assert main([command, *words]) == 1
    assert "Ray did not start on this machine, tried twice (The current node timed" in last_line(
        capsys.readouterr().err
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


VERSIONS = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.9.1\nThis process was started"
)
NOT_JOINED = {
    "another version, check_version_info": (RuntimeError(VERSIONS), "Ray: 2.9.0 Python: 3.9.1 This process"),
    "no Ray, ray.init": (ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"), "Failed to connect"),
    "another token": (
        exceptions.AuthenticationError("InvalidToken"),
        "does not take the token: set RAY_AUTH_MODE=token",
    ),
    "a head that goes": (exceptions.RpcError("Deadline Exceeded"), "Deadline Exceeded"),
}


@pytest.mark.parametrize(("error", "says"), NOT_JOINED.values(), ids=NOT_JOINED)
def test_a_cluster_that_does_not_take_us_is_one_line(error, says, fake_ray, package, data, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = os.environ["RAY_ADDRESS"] = f"127.0.0.1:{server.getsockname()[1]}"
        fake_ray.outcomes = [error]
        assert main(["evaluate", package, "--data", data]) == 1
    line = last_line(capsys.readouterr().err)
    assert line.startswith(f"triptych: RAY_ADDRESS {address}: ") and says in line
    assert [options["address"] for options in fake_ray.calls] == [address]  # a cluster is not asked twice


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}"])
def test_where_nothing_listens_ray_is_not_asked(address, fake_ray, package, data, capsys):
    address = os.environ["RAY_ADDRESS"] = address.format(free_port())
    assert main(["evaluate", package, "--data", data]) == 1
    line = last_line(capsys.readouterr().err)
    assert line.startswith(f"triptych: RAY_ADDRESS {address}: no Ray cluster answers there (") and not fake_ray.calls


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """The real command line, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables
    words = [sys.executable, "-m", "pipelines.cli", *words]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RAY_TMPDIR": "{folder}/" + 90 * "x"}, "AF_UNIX path length cannot exceed 107 bytes"),
        ({"RAY_TMPDIR": "{short}", "RAY_gcs_server_port_wait_time_s": "0"}, "Timed out waiting for file"),
        ({"RAY_ADDRESS": "127.0.0.1:{port}"}, "no Ray cluster answers there ([Errno 111] Connection refused)"),
    ],
    ids=["a long path", "a GCS that is too slow", "nobody there"],
)
def test_real_failures_of_the_real_command(variables, says, package, tmp_path, short_folder):
    places = {"folder": tmp_path, "short": short_folder, "port": free_port()}
    variables = {name: text.format(**places) for name, text in variables.items()}
    ended = run(["serve", package, "--port", str(free_port())], **variables)
    assert ended.returncode == 1 and says in last_line(ended.stderr)


@pytest.fixture
def short_folder(tmp_path_factory):
    """A folder whose path leaves room for the names of Ray's sockets."""
    folder = Path("/tmp") / f"r{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


FAILED_START = """
import sys
servers = []
def hook(event, words):
    if event == "subprocess.Popen" and "gcs_server" in words[0]:
        servers.append(words)
sys.addaudithook(hook)
from pipelines.cluster import connect as cluster
try:
    cluster.connect()
except cluster.InputError:
    import psutil
    print(len(servers), psutil.Process().children(recursive=True))
"""


def test_no_process_of_a_failed_start_is_left(short_folder):
    variables = {"RAY_TMPDIR": str(short_folder), "RAY_gcs_server_port_wait_time_s": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables
    program = [sys.executable, "-c", FAILED_START]
    ended = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "2 []\n"  # Ray started two servers, which outlive a start that fails
    assert str(short_folder) not in subprocess.run(["ps", "-e", "-o", "args="], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "error",
    [
        exceptions.LocalRayletDiedError(),
        exceptions.NodeDiedError("the node is dead"),
        exceptions.RaySystemError("System error: Broken pipe"),
        exceptions.RpcError("GCS is gone"),
        exceptions.ActorDiedError(),
        exceptions.ActorUnavailableError("not now", None),
        exceptions.WorkerCrashedError(),
        exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory: 1 / 1"),
        exceptions.OutOfDiskError("Local disk is full"),
        exceptions.ObjectStoreFullError("no room"),
        exceptions.ObjectLostError("ff", None, "here"),
        exceptions.OwnerDiedError("ff", None, "here"),
        exceptions.GetTimeoutError("Get timed out"),
        exceptions.RuntimeEnvSetupError("no such package"),
        exceptions.TaskUnschedulableError("no node"),
        exceptions.AuthenticationError("no token"),
        exceptions.RayTaskError(
            "f", 'ray::f()\n  File "x.py"\nZeroDivisionError: by zero', ZeroDivisionError("by zero")
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_ray_that_dies_at_work_is_one_line_and_a_file(error, capsys):
    kept = fails_with(error, capsys, f"triptych: Ray failed ({type(error).__name__}: ")
    assert "Traceback" in kept and type(error).__name__ in kept


def test_an_error_nobody_foresaw_is_one_line_and_a_file(capsys):
    kept = fails_with(KeyError("caption"), capsys, "triptych: unexpected KeyError: 'caption'; ")
    assert "in command" in kept and "KeyError: 'caption'" in kept


def fails_with(error: Exception, capsys, start: str) -> str:
    """What was written to the file that the line of a command with this error names."""

    def command() -> int:
        raise error

    assert exit_code("triptych", command) == 1
    line = last_line(capsys.readouterr().err)
    assert line.startswith(start)
    file = Path(line.rpartition("; traceback: ")[2])
    text = file.read_text()
    assert file.stat().st_mode & 0o077 == 0  # it may hold what others should not read
    file.unlink()
    return text


def test_where_no_file_can_be_written_the_line_stands_alone(monkeypatch, capsys):
    monkeypatch.setattr(console.tempfile, "NamedTemporaryFile", mock.Mock(side_effect=OSError(28, "No space left")))
    assert exit_code("triptych", lambda: 1 // 0) == 1
    line = last_line(capsys.readouterr().err)
    assert line.endswith(
        "ZeroDivisionError: integer division or modulo by zero; no file for its traceback ([Errno 28] No space left)"
    )


@pytest.mark.parametrize(
    "cause", [InputError("a.parquet: not Parquet; mend it"), Unavailable("a.parquet: not Parquet; mend it")]
)
def test_what_a_task_met_in_the_data_is_said_as_it_was_there(cause, capsys):
    tower = "".join(traceback.format_exception(cause)) + "\nray.exceptions.RayTaskError: (more of Ray)"
    error = exceptions.RayTaskError("read", f"ray::read() (pid=1)\n{tower}", cause).as_instanceof_cause()

    def command() -> int:
        raise error

    assert exit_code("triptych", command) == 1
    assert capsys.readouterr().err == "triptych: a.parquet: not Parquet; mend it\n"


def test_a_task_that_runs_says_it_too(ray_local, capsys):
    @ray.remote
    def read() -> None:
        raise Unavailable("s3://x: it fails; check it")

    assert exit_code("triptych", lambda: ray.get(read.remote())) == 1
    assert capsys.readouterr().err == "triptych: s3://x: it fails; check it\n"


@pytest.mark.parametrize(
    "error", [TimeoutError("Timed out resolving to ObjectRef."), RayServeException("gone"), exceptions.ActorDiedError()]
)
def test_a_service_that_is_lost_says_so(error, monkeypatch):
    monkeypatch.setattr("ray.serve.get_deployment_handle", mock.Mock(side_effect=error))
    with pytest.raises(Failed, match=rf"^the service is lost, .*\({type(error).__name__}: .*\); start it again$"):
        _state()


@pytest.mark.parametrize(
    ("end", "says"), [("os._exit(1)", True), ("os.kill(os.getpid(), 9)", True), ("", False), ("sys.exit(1)", False)]
)
def test_a_process_that_is_ended_without_pythons_doing_leaves_a_line(end, says):
    code = f"import os, sys; from pipelines.cluster import connect as cluster; cluster._say_if_lost(); {end}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == {"": 0, "os.kill(os.getpid(), 9)": -9}.get(end, 1)
    assert (ended.stderr == f"{connect.LOST}{ended.stderr.rpartition(' ')[2]}") if says else ended.stderr == ""


KILLS_RAYLET = """
import sys, time, ray, psutil
from pipelines.cli import console
from pipelines.cluster import connect as cluster

def command():
    cluster.connect(dashboard=False)
    task = ray.remote(max_retries=0)(lambda: time.sleep(600)).remote()
    next(child for child in psutil.Process().children() if child.name() == "raylet").kill()
    ray.get(task)

sys.exit(console.exit_code("triptych", command))
"""


@pytest.mark.slow
def test_a_raylet_that_is_lost_ends_the_command_with_a_line():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    program = [sys.executable, "-c", KILLS_RAYLET]
    ended = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    line = next(line for line in reversed(ended.stderr.splitlines()) if line.startswith("triptych: "))
    assert "lost a process of its own" in line or line.startswith("triptych: Ray failed (")
