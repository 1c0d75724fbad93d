"""`triptych submit`: runs a command of ours as a job of a Ray cluster and takes over its log and its exit code.

Credentials never travel with a job: the cluster's machines have their own (an instance profile, or the environment of
the process that started Ray on the head). The cluster's token comes from RAY_AUTH_MODE=token with RAY_AUTH_TOKEN,
RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
"""

import asyncio
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from models.config import InputError
from models.redact import redact
from pipelines.cluster.connect import EXCLUDES, TOKEN
from pipelines.cluster.job_paths import check_paths, is_loopback, job_environment
from pipelines.lineage import COMMIT_VARIABLE, ROOT, commit
from pipelines.tracking.server import probe, reason

logger = logging.getLogger(__name__)

ENTRYPOINT = ("python", "-m", "pipelines.cli")
QUIET = {"working_dir": logging.ERROR, "packaging": logging.WARNING}
"""Levels of Ray's chatter about what it packages; what is near the size limit is still said."""
LOST_AFTER_S = 300.0
STOPPED_WITHIN_S = 30.0


def submit(command: Sequence[str], address: str = "", entrypoint: Sequence[str] = ENTRYPOINT) -> int:
    """Runs `command` (`train tcl-tiny ...`) on the cluster, its log on standard error; returns the job's exit code.

    `address` is the dashboard's, RAY_ADDRESS where empty. Ctrl-C stops the job and gives 130. Raises InputError for an
    address where nothing answers or a token is wanted, and for paths and addresses that the job would not see.
    """
    if not command:
        raise InputError("submit: no command given; write it as without the cluster: triptych submit train PRESET ...")
    address = _dashboard(address or os.environ.get("RAY_ADDRESS", ""))
    _check(command, is_loopback(address))  # first what is wrong whatever answers there
    client = _connect(address)
    environment = _check(command, is_loopback(address) and _is_here(address))
    try:
        job = client.submit_job(
            entrypoint=shlex.join([*entrypoint, *command]),
            runtime_env={
                "working_dir": str(ROOT),
                "excludes": EXCLUDES,
                "env_vars": environment | {COMMIT_VARIABLE: commit()},
            },
        )
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        raise InputError(f"{address}: the cluster did not take the job: {reason(error)}") from error
    logger.info("job %s runs on %s", job, redact(address))
    try:
        return _exit_code(_follow(client, job))
    except KeyboardInterrupt:
        return _stop(client, job)


def _check(command: Sequence[str], same_machine: bool) -> dict[str, str]:
    """The job's environment; raises InputError for whatever it would not see."""
    check_paths(command, same_machine)
    return job_environment(command, os.environ, same_machine)


def _dashboard(address: str) -> str:
    """The address, checked to be a dashboard's."""
    if not address:
        raise InputError("RAY_ADDRESS is not set: give the cluster's dashboard, such as http://127.0.0.1:8265")
    if urlsplit(address).scheme not in {"http", "https"}:
        raise InputError(f"RAY_ADDRESS {address}: jobs go to the dashboard: give http://HOST:8265")
    return address.rstrip("/")


def _connect(address: str) -> JobSubmissionClient:
    """A client of the job server. Raises InputError where there is none, or it wants another token."""
    if problem := probe(address):
        raise InputError(f"RAY_ADDRESS {address}: not reachable ({problem}): is the cluster up, and the tunnel to it?")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers its two variables to an argument
    for name, level in QUIET.items():
        logging.getLogger(f"ray._private.runtime_env.{name}").setLevel(level)
    for module in (JobSubmissionClient.__module__, "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(module).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise InputError(f"RAY_ADDRESS {address}: the cluster wants its token: {TOKEN}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"RAY_ADDRESS {address}: not a Ray dashboard: {reason(error)}") from error


def _is_here(address: str) -> bool:
    """Whether all nodes are this machine: behind a loopback address may be a tunnel to a cluster far away."""
    deadline = time.monotonic() + 15  # a head that has just started lists no node yet
    try:
        while not (nodes := list_nodes(address, filters=[("state", "=", "ALIVE")])) and time.monotonic() < deadline:
            time.sleep(0.5)
    except RayStateApiException:
        return False
    return bool(nodes) and all(_is_own(node.node_ip) for node in nodes)


def _is_own(ip: str) -> bool:
    """Whether the IP address is one of this machine's: only those can be bound."""
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
        try:
            probe_socket.bind((ip, 0))
        except OSError:
            return False
    return True


def _follow(client: JobSubmissionClient, job: str) -> JobDetails:
    """Copies the job's log to standard error until it has ended, over broken connections too."""
    written = 0

    async def copy() -> None:
        nonlocal written
        position = 0  # each connection sends the log from its start
        async for text in client.tail_job_logs(job):
            sys.stderr.write(text[max(0, written - position) :])
            sys.stderr.flush()
            position += len(text)
            written = max(written, position)

    answered = time.monotonic()
    while True:
        try:
            asyncio.run(copy())
            details = client.get_job_info(job)
            answered = time.monotonic()
            if details.status.is_terminal():
                return details
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            if time.monotonic() - answered > LOST_AFTER_S:
                raise InputError(f"job {job}: lost the cluster ({reason(error)}); it may still be running") from error
        time.sleep(0.5)


def _exit_code(details: JobDetails) -> int:
    """The exit code of the job's process; of a shell, 128 + signal, where a signal ended it."""
    code = details.driver_exit_code
    if code is None:  # it never started, or was stopped
        logger.error("job %s: %s", details.submission_id, details.message)
        return 1
    return int(code) if code >= 0 else 128 - int(code)


def _stop(client: JobSubmissionClient, job: str) -> int:
    """Stops the job and waits for its end; 130, what a shell gives for Ctrl-C."""
    logger.warning("stopping job %s", job)
    try:
        client.stop_job(job)
        deadline = time.monotonic() + STOPPED_WITHIN_S
        while not client.get_job_info(job).status.is_terminal() and time.monotonic() < deadline:
            time.sleep(0.5)
    except (OSError, RuntimeError) as error:
        logger.error("job %s may still be running: %s", job, reason(error))
    return 130
