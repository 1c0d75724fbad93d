"""Metric points on their way to a server that may be away: a queue that goes on in a file, a thread that retries."""

import contextlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from threading import Event, Lock, Thread
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """One value of one metric; the timestamp is in milliseconds since 1970."""

    key: str
    value: float
    timestamp: int
    step: int


class Outbox:
    """Points wait in memory, those beyond `capacity` in the file `path` (JSON lines). Many may add, one sends.

    A file left by an earlier process is sent as well. A point may be sent twice but is never lost: MLflow keeps equal
    points (run, key, timestamp, step, value) once.
    """

    def __init__(self, path: Path, capacity: int = 20_000) -> None:
        self.path = path
        self._capacity = capacity
        self._lock = Lock()
        self._memory: deque[Point] = deque()
        self._in_file = _whole_lines(path)
        self._sent_bytes = 0  # of the file
        self._writable = True

    def __len__(self) -> int:
        """Points that have not been sent."""
        return len(self._memory) + self._in_file

    def add(self, points: Sequence[Point]) -> None:
        """Takes points; waits for no server and does not raise."""
        with self._lock:
            if len(self._memory) + len(points) <= self._capacity or not self._append(points):
                self._memory.extend(points)

    def send(self, limit: int, deliver: Callable[[list[Point]], None]) -> None:
        """Gives the next points, at most `limit`, to `deliver`, and forgets them unless it raises."""
        with self._lock:
            points, end = list(islice(self._memory, limit)), 0
            if not points and self._in_file:
                points, end = self._read(limit)
        deliver(points)
        with self._lock:
            if not end:
                for _ in islice(points, len(self._memory)):  # `store` may have moved them to the file meanwhile
                    self._memory.popleft()
                return
            self._in_file, self._sent_bytes = self._in_file - len(points), end
            if not self._in_file:
                self.path.unlink(missing_ok=True)
                self._sent_bytes = 0

    def store(self) -> None:
        """Moves what waits in memory to the file."""
        with self._lock:
            if self._append(self._memory):
                self._memory.clear()

    def _append(self, points: Sequence[Point]) -> bool:
        """Writes points to the file; False where that fails, and they stay in memory: better large than lost."""
        if not points:
            return True
        try:
            before = self.path.stat().st_size if self.path.exists() else 0
            with self.path.open("a") as file:
                file.writelines(json.dumps(point) + "\n" for point in points)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, before)  # half a line would spoil the next one
            if self._writable:
                logger.warning("cannot keep metric points that wait for MLflow in %s: %s", self.path, error.strerror)
            self._writable = False
            return False
        self._in_file += len(points)
        return True

    def _read(self, limit: int) -> tuple[list[Point], int]:
        """At most `limit` points of the file that have not been sent, and where they end (bytes)."""
        with self.path.open() as file:
            file.seek(self._sent_bytes)
            points = [Point(*json.loads(line)) for line in islice(iter(file.readline, ""), limit)]
            return points, file.tell()


def _whole_lines(path: Path) -> int:
    """Lines of a file left behind, after cutting off a last one that was not finished; 0 where there is no file."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    return whole.count(b"\n")


class Courier:
    """A thread that calls `send(last=False)` again and again, and once `send(last=True)` when asked to finish.

    While `send` raises, the pauses grow and `failed(error)` is told of each first failure in a row.
    """

    def __init__(
        self,
        send: Callable[[bool], None],
        failed: Callable[[Exception], None],
        gather: float = 1.0,
        longest: float = 60.0,
    ) -> None:
        self._send, self._failed = send, failed
        self._gather, self._longest = gather, longest  # seconds: what is logged meanwhile is sent together
        self._finishing, self._abandoned = Event(), Event()
        self._thread = Thread(target=self._work, name="courier", daemon=True)
        self.done = False
        self._thread.start()

    def finish(self, limit: float) -> bool:
        """Asks for the last call and waits for it, at most `limit` seconds; returns whether it was made."""
        self._finishing.set()
        try:
            self._thread.join(limit)
        finally:  # also when Ctrl-C ends the wait
            self._abandoned.set()
        return self.done

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits any more: a long `send` should stop."""
        return self._abandoned.is_set()

    def _work(self) -> None:
        failures = 0
        while not self._abandoned.is_set():
            if self._finishing.is_set():
                self._abandoned.wait(1.0 if failures else 0.0)
            else:
                self._finishing.wait(min(self._gather * 2.0 ** min(failures, 30), self._longest))
            last = self._finishing.is_set()
            try:
                self._send(last)
            except Exception as error:  # the thread must outlive whatever goes wrong at the other end
                if not failures:
                    self._failed(error)
                failures += 1
                continue
            failures = 0
            if last:
                self.done = True
                return
