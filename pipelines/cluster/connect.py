"""Joining or starting Ray, quietly and within what the machine has."""

import logging
import os
import socket

import ray

from models.config import InputError
from pipelines.lineage import ROOT

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


def connect(dashboard: bool = True) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine, on loopback; does nothing where Ray runs already.

    Raises InputError where the cluster does not answer.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        if address.startswith(("http://", "https://")):
            raise InputError("RAY_ADDRESS: an HTTP address takes jobs; use `triptych submit`, or ray://host:10001")
        try:
            ray.init(address, runtime_env=_runtime_env(), **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"RAY_ADDRESS {address}: no Ray cluster answers there ({_first_line(error)})") from error
        return
    cpus = max(os.cpu_count() or 1, 2)
    if not dashboard:
        ray.init(num_cpus=cpus, include_dashboard=False, **options)
        return
    port = _free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"  # or a second Ray here would be asked instead
    ray.init(num_cpus=cpus, dashboard_host="127.0.0.1", dashboard_port=port, **options)


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


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
