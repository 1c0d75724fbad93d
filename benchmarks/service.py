"""A service as a process of its own, seen from outside: its replicas, what processor time and memory they use."""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Service:
    """A running `triptych serve`, or any other server that is a child of ours."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, *others: str) -> None:
        self.process, self.url = process, url
        self.urls = (url, *others)
        """All places at which it listens."""

    def processes(self) -> dict[int, str]:
        """Title of each of its processes, Ray's included."""
        return {pid: title for pid in sorted(_descendants(self.process.pid)) if (title := _title(pid))}

    def replicas(self, name: str) -> list[int]:
        """Process ids of a deployment's replicas."""
        return [pid for pid, title in self.processes().items() if title.startswith("ray::") and f":{name}" in title]

    def cpu_seconds(self) -> dict[int, float]:
        """Processor seconds used so far by each process."""
        return {pid: seconds for pid in _descendants(self.process.pid) if (seconds := _cpu(pid)) is not None}

    def resident(self) -> int:
        """Bytes of memory of its own (without shared pages) that all its processes have."""
        return sum(_private(pid) for pid in _descendants(self.process.pid))


def spent(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Processor seconds between two looks; a process that ended in between counts up to the first."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


@contextmanager
def triptych_serve(words: list[str], port: int, environment: Mapping[str, str] | None = None) -> Iterator[Service]:
    """`triptych serve` with these words, from when it says that it serves until it has ended.

    Raises RuntimeError with the end of its log where it does not start.
    """
    command = [sys.executable, "-m", "pipelines.cli", "serve", *words, "--port", str(port)]
    with _process(command, "serving ", environment) as process:
        yield Service(process, f"http://127.0.0.1:{port}")


@contextmanager
def _process(command: list[str], sign: str, environment: Mapping[str, str] | None) -> Iterator["subprocess.Popen[str]"]:
    """A child process, once a line of its standard error begins with `sign`; terminated afterwards."""
    variables = {**os.environ, "RAY_worker_niceness": "0", **(environment or {})}
    variables.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
    last: deque[str] = deque(maxlen=20)
    started = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            last.append(line)
            if line.startswith(sign):
                started.set()
        started.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        started.wait(600)
        if process.poll() is not None or not any(line.startswith(sign) for line in last):
            raise RuntimeError("it did not start: " + "".join(last))
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def server(
    command: list[str], ports: Sequence[int], sign: str, environment: Mapping[str, str] | None = None
) -> Iterator[Service]:
    """Any HTTP server that writes a line beginning with `sign` to standard error once it listens."""
    with _process(command, sign, environment) as process:
        yield Service(process, *(f"http://127.0.0.1:{port}" for port in ports))


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until `condition()` is true; raises TimeoutError after `seconds`."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.02)
    return time.monotonic() - started


def _descendants(root: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat(int(stat.parent.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, fresh = {root}, [root]
    while fresh:
        fresh = [child for parent in fresh for child in children.get(parent, [])]
        found.update(fresh)
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty where the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def _cpu(pid: int) -> float | None:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else None


def _private(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
