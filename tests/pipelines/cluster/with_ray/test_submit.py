import contextlib
import http.server
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from models.config import InputError
from pipelines import lineage
from pipelines.cluster.submit import _is_own, submit

FAR = "http://10.1.2.3:8265"


def test_own_addresses_are_those_that_can_be_bound():
    assert _is_own("127.0.0.1")
    assert not _is_own("198.51.100.7")  # reserved for documentation


def test_wrong_addresses_are_one_line(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=r"RAY_ADDRESS is not set.*http://"):
        submit(["train"])
    for address in ("auto", "ray://head:10001", "10.0.0.1:6379"):
        with pytest.raises(InputError, match="http://HOST:8265"):
            submit(["train"], address)
    with pytest.raises(InputError, match=r"not reachable \(.*\)") as refusal:
        submit(["data", "stats", "s3://b/train"], f"http://127.0.0.1:{next(free_ports())}")
    assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match="--out"):  # before anything is asked of the network
        submit(["train", "tcl-tiny", "--out", "/data/runs"], FAR)
    with pytest.raises(InputError, match="no command"):
        submit([], FAR)


@pytest.mark.parametrize(
    ("status", "says"), [(401, "RAY_AUTH_MODE=token"), (403, "RAY_AUTH_TOKEN_PATH"), (404, "not a Ray")]
)
def test_a_refusing_server_is_one_line(status, says, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # submit sets it; restored afterwards

    class Refusal(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=says) as refusal:
            submit(["data", "stats", "s3://b/train"], f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "\n" not in str(refusal.value)


def test_the_commit_comes_from_git_or_from_the_submitter(tmp_path, monkeypatch):
    monkeypatch.setattr(lineage, "ROOT", tmp_path)
    monkeypatch.setenv("TRIPTYCH_COMMIT", "")
    assert lineage.commit() == "unknown"
    monkeypatch.setenv("TRIPTYCH_COMMIT", "abc-dirty")
    assert lineage.commit() == "abc-dirty"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert lineage.commit() == "abc-dirty"  # a repository without a commit
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert lineage.commit() == head
    (tmp_path / "new.py").touch()
    assert lineage.commit() == f"{head}-dirty"


def free_ports() -> Iterator[int]:
    """Ports that nothing listens on now: below those that the system gives to connections, above Ray's workers'."""
    for port in random.sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            yield port


class Head(NamedTuple):
    """A real head node: its dashboard's address and the environment of those who use it."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` in a folder of its own, ended with its process group: `ray stop` would end everybody's."""
    with tempfile.TemporaryDirectory(prefix="tr", ignore_cleanup_errors=True) as folder:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))
        }
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # jobs find `python` there
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
        ports = dict(zip(names, free_ports(), strict=False))
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        options = ["--num-cpus=2", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
        with Path(folder, "head.log").open("w") as log:
            process = subprocess.Popen(
                ["ray", "start", "--head", "--block", *options, *(f"--{name}={port}" for name, port in ports.items())],
                env=environment,
                cwd=folder,
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_for(f"{address}/api/version", process, Path(log.name))
            yield Head(address, environment)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Returns when the URL answers; fails after two minutes or when the process has ended, with what it said."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.3)
    raise AssertionError(f"no head at {url}, exit code {process.returncode}: {log.read_text()}")


SUBMIT = """
import logging, sys
from pipelines.cluster.submit import submit
logging.basicConfig(level=logging.INFO)
script, *command = sys.argv[1:]
sys.exit(submit(command, entrypoint=("python", "-c", script)) if script else submit(command))
"""


def start(head: Head, folder: Path, script: str, *command: str) -> "subprocess.Popen[str]":
    """Submits `command` to the real command line, or to `script` in its place, from `folder`, by RAY_ADDRESS."""
    environment = head.environment | {
        "RAY_ADDRESS": head.address,
        "PYTHONPATH": str(lineage.ROOT),
        "AWS_REGION": "eu-west-1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", SUBMIT, script, *command],
        env=environment | {"AWS_SECRET_ACCESS_KEY": "hunter2"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SHOW = """
import os, sys, models, pipelines
print(sys.argv[1:], models.__file__, sorted(os.listdir()))
print({name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_", "TRIPTYCH_"))})
sys.exit(7)
"""


def test_a_job_runs_our_code_and_gives_its_exit_code(head, tmp_path):
    command = ["train", "tcl-tiny", "--out", str(tmp_path / "a b"), "--name=$HOME"]
    shown = start(head, tmp_path, SHOW, *command)
    helped = start(head, tmp_path, "", "--help")
    unknown = start(head, tmp_path, "", "train", "no-such-preset")
    out, log = shown.communicate(timeout=120)
    assert shown.returncode == 7, log
    assert out == ""
    assert str(command) in log  # words reach the job as they were typed
    assert "_ray_pkg_" in log.split("models/__init__.py")[0]  # the packaged code, not an installed one
    listing = log[log.index("['", log.index("models/__init__.py")) :].splitlines()[0]
    assert "'pipelines'" in listing
    assert "tests" not in listing
    assert ".git" not in listing
    assert f"'MLFLOW_TRACKING_URI': 'sqlite:///{tmp_path}/mlflow.db'" in log
    assert f"'TRIPTYCH_COMMIT': '{lineage.commit()}'" in log
    assert "'AWS_REGION': 'eu-west-1'" in log
    assert "hunter2" not in log
    log = helped.communicate(timeout=120)[1]
    assert helped.returncode == 0, log
    log = unknown.communicate(timeout=120)[1]
    assert unknown.returncode == 2, log
    assert "no-such-preset" in log


WAIT = "import time; print('it', 'runs', flush=True); time.sleep(100)"


def test_interrupting_the_submission_stops_the_job(head, tmp_path):
    process = start(head, tmp_path, WAIT, "data", "stats", "s3://bucket/train")
    log = ""
    while "it runs\n" not in log:  # live, long before the job's end
        line = process.stderr.readline()
        assert line, log
        log += line
    process.send_signal(signal.SIGINT)
    log += process.communicate(timeout=200)[1]
    assert process.returncode == 130, log
    job = next(word for word in log.split() if word.startswith("raysubmit_")).rstrip(":")
    with urllib.request.urlopen(f"{head.address}/api/jobs/{job}") as reply:
        assert b'"status": "STOPPED"' in reply.read()
