"""Real servers for tests, on 127.0.0.1 only: MLflow over SQLite or PostgreSQL, which may be stopped and started."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class MlflowServer:
    """`mlflow server` on a store that outlives it."""

    def __init__(self, folder: Path, store: str = "sqlite:///server.db") -> None:
        self._folder, self._store, self.port = folder, store, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """What MLFLOW_TRACKING_URI would be."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._store, "--workers", "1"]
        command += ["--artifacts-destination", "./artifacts", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        log = self._folder / "log"
        with log.open("a") as file:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        for _ in range(480):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, log.read_text()
                time.sleep(0.5)
        raise AssertionError(f"the MLflow server does not answer:\n{log.read_text()}")

    def stop(self) -> None:
        """Kill it with its children."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def mlflow_server(folder: Path, store: str = "sqlite:///server.db") -> Iterator[MlflowServer]:
    """A server that answers."""
    server = MlflowServer(folder, store)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URI of an empty database; skips where PostgreSQL is not installed (.ci/run installs it)."""
    found = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    initdb = shutil.which("initdb", path=os.pathsep.join([*found, os.environ.get("PATH", "")]))
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    server, port = str(Path(initdb).parent / "postgres"), free_port()
    as_user: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="postgres", dir="/tmp"))
    if os.getuid() == 0:  # it refuses to run as root
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    data = str(folder / "data")
    subprocess.run([*as_user, initdb, "-D", data, "-A", "trust", "-U", "triptych"], check=True, capture_output=True)
    options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    command = [*as_user, server, "-D", data, "-p", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"postgresql+psycopg2://triptych@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
