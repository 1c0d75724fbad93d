"""Joining or starting Ray, quietly and within what the machine has; where that fails, one line that says why."""

import atexit
import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from models.config import InputError
from models.redact import redact
from pipelines.lineage import ROOT
from pipelines.tracking.server import probe

logger = logging.getLogger(__name__)

EXCLUDES = [
    ".?*",
    "/data/",
    "/demo/",
    "/runs/",
    "/mlruns/",
    "/tests/",
    "/docs/",
    "/site/",
    "/benchmarks/results/",
    "*.egg-info/",
    "*.parquet",
    "*.tar",
    "*.safetensors",
    "*.db",
    "*.log",
    "mlflow-unsent-*.jsonl",
]
"""What of the checkout no job gets (gitignore patterns, besides .gitignore's): data, runs, hidden files with secrets.

A folder's name is anchored by its first `/`, or a package's folder of that name would be left behind too.
docs/cluster.md shows the same list for Ray's own command line.
"""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it a worker's output arrives twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # only noise here: a lost node is noticed without it
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # ends, and registers checkpoints, sooner
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_num_workers_soft_limit": "6",  # idle processes that are kept: a new data task's takes seconds to start
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # glibc otherwise gives a tensor's memory back to the system at every step and asks for it again (10-20 % of a step)
    "MALLOC_MMAP_THRESHOLD_": str(64 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_TOP_PAD_": str(16 * 2**20),
}
"""Environment of driver and workers; whatever the user has set stays."""
LOST = (
    "triptych: the process was killed, by the system (out of memory?) or by Ray, which had lost a process of its own; "
    "run the command again, train and tune with --resume; Ray's logs: "
)
"""What stands on standard error after a process that could say nothing any more."""
TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token) to the cluster's own"
"""What to do where a cluster does not take the token."""


def connect(dashboard: bool = True) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine, on loopback; does nothing where Ray runs already.

    Raises InputError where the cluster does not answer or Ray does not start. A start is tried twice, the second time
    without the dashboard: its ten processes take the time that a busy machine lacks. Of a failed one no process stays.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    if (address := os.environ.get("RAY_ADDRESS", "")) not in ("", "local"):
        _join(address)
        return
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "60")  # Ray's own 30 are short on a busy machine
    for first in (True, False):
        try:
            return _start(dashboard and first)
        except Exception as error:  # of every class: for a raylet that is late Ray raises Exception itself
            if not first:
                raise InputError(_why_not_started(error)) from error
            logger.warning("Ray did not start (%s); trying once more", _said(error))


def _join(address: str) -> None:
    """Raises InputError where no cluster answers at `address`, or it does not take this process."""
    if address.startswith(("http://", "https://")):
        raise InputError("RAY_ADDRESS: an HTTP address takes jobs; use `triptych submit`, or ray://host:10001")
    # Ray tries for a quarter of an hour where nothing listens
    if ":" in address and (problem := probe(address if "://" in address else f"ray://{address}")):
        raise InputError(
            f"RAY_ADDRESS {address}: no Ray cluster answers there ({problem}): is it up, and the address right? "
            "Without RAY_ADDRESS Ray starts on this machine"
        )
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "2")  # here Ray takes it for a number of tries, 40 s each
    try:
        with _cleared_unless_up():
            _init(address=address, runtime_env=_runtime_env())
    except ray.exceptions.AuthenticationError as error:
        raise InputError(f"RAY_ADDRESS {address}: the cluster does not take the token: {TOKEN}") from error
    except Exception as error:
        raise InputError(f"RAY_ADDRESS {address}: no Ray cluster takes us there ({_said(error)})") from error


def _start(dashboard: bool) -> None:
    options: dict[str, Any] = {"num_cpus": max(os.cpu_count() or 1, 2)}
    if dashboard:
        port = _free_port()
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"  # or a second Ray here would be asked instead
        options |= {"dashboard_host": "127.0.0.1", "dashboard_port": port}
    else:
        options["include_dashboard"] = False
    with _cleared_unless_up():
        _init(**options)


def _init(**options: Any) -> None:
    """ray.init, whose own log of what goes wrong would come before our line."""
    ray.init(log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=True, **options)
    logging.getLogger("ray").setLevel(logging.ERROR)
    _say_if_lost()


def _say_if_lost() -> None:
    """Have a line on standard error where this process ends without Python's doing.

    Ray's core exits at once where raylet or GCS are lost: no exception, nothing to catch. So a shell waits for a word
    that only an orderly end sends, and speaks where it does not come.
    """
    words = ["sh", "-c", 'read -r word || echo "$0" >&2', f"{LOST}{_logs()}"]
    waiting = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    atexit.register(waiting.communicate, b"done\n")


@contextlib.contextmanager
def _cleared_unless_up() -> Iterator[None]:
    """Ends the processes that a failed start leaves: Ray forgets those of a node that did not come up."""
    import psutil  # Ray's own, which can be imported once Ray is

    here = psutil.Process()
    before = set(here.children(recursive=True))
    try:
        yield
    except BaseException:
        left = set(here.children(recursive=True)) - before
        with contextlib.suppress(Exception):
            ray.shutdown()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        raise


def _why_not_started(error: Exception) -> str:
    """One line: what Ray said, what to do, and where its logs are."""
    if isinstance(error, OSError):
        advice = "set RAY_TMPDIR to a short path of a folder that can be written and has space"
    elif isinstance(error, ray.exceptions.AuthenticationError):
        advice = "set RAY_AUTH_TOKEN_PATH to a file that holds a token, or RAY_AUTH_MODE=disabled"
    else:
        advice = "too little CPU or memory may be free: close other programs, or join a running cluster by RAY_ADDRESS"
    return f"Ray did not start on this machine, tried twice ({_said(error)}); {advice}; its logs: {_logs()}"


def _logs() -> Path:
    """The logs of the Ray that this process started last, else the folder where Ray's are."""
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")
    return max((session / "logs" for session in folder.glob(f"session_*_{os.getpid()}")), default=folder)


def _said(error: Exception) -> str:
    """What an error of Ray says before any traceback in it, as one line."""
    text = " ".join(str(error).partition("Traceback (most")[0].split())
    return redact(text)[:250].rstrip(" .") or type(error).__name__


def _runtime_env() -> dict[str, object] | None:
    """Inside a job the package is there already; from outside the checkout is sent along."""
    return (
        None
        if os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
        else {
            "working_dir": str(ROOT),
            "excludes": EXCLUDES,
        }
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
