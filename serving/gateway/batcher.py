"""Requests batched before an encoder is called, and rejected where they would wait too long.

A handle call costs more than a small model's forward pass, so it is made once a batch, not once a request. One event
loop, no locks.
"""

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from serving.config import BatchConfig
from serving.interfaces import Overloaded

Encode = Callable[[list[Any]], Awaitable[np.ndarray]]
"""Rows of any requests -> float32 (rows, D)."""
Observe = Callable[[int, float, float], None]
"""(rows, seconds of the call, seconds that its first row had waited) of each batch."""
_DECAY = 0.9
"""Weight of the past, per batch, in the measured rate."""


class _QueuedRows(NamedTuple):
    """At most one batch of a request's rows, waiting to be encoded."""

    rows: Sequence[Any]
    future: "asyncio.Future[np.ndarray]"
    since: float
    """Time (monotonic) at which they were queued."""


class Rate:
    """Rows a second while there is work, from the last few batches."""

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """Record a batch of `rows` that ended `seconds` after the one before, or after work began."""
        self._rows = _DECAY * self._rows + rows
        self._seconds = _DECAY * self._seconds + seconds

    @property
    def value(self) -> float:
        """Rows a second; 0 before the first batch."""
        return self._rows / self._seconds if self._seconds else 0.0


class Batcher:
    """Gathers rows, calls `encode` once a batch, and gives each request its own vectors back."""

    def __init__(self, encode: Encode, settings: BatchConfig, deadline: float, observe: Observe | None = None) -> None:
        """`deadline`: seconds that a request has; see `BatchConfig` for the rest."""
        self._encode, self._settings, self._observe = encode, settings, observe
        self._wait = settings.queue_share * deadline
        self._queue: collections.deque[_QueuedRows] = collections.deque()
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[None] | None] = set()
        self._last = 0.0
        self.rate = Rate()
        self.admitted = 0
        """Rows of requests that were admitted and are not answered yet."""

    @property
    def limit(self) -> int:
        """Most rows admitted at once: as many as are encoded within the share of the deadline given to waiting."""
        if not self.rate.value:
            return self._settings.max_queue
        return int(min(max(self._wait * self.rate.value, self._settings.max_items), self._settings.max_queue))

    @contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Reserve capacity for `rows` rows. Raises Overloaded where they would wait too long.

        An idle encoder takes a request of any size: else one that is larger than the limit could never be answered.
        """
        if rows and self.admitted and self.admitted + rows > self.limit:
            raise Overloaded(max(self.admitted / (self.rate.value or 1.0), 1.0))
        self.admitted += rows
        try:
            yield
        finally:
            self.admitted -= rows

    async def __call__(self, rows: Sequence[Any]) -> np.ndarray:
        """Vectors float32 (rows, D) of one request's rows, in order."""
        step, now, loop = self._settings.max_items, time.monotonic(), asyncio.get_running_loop()
        chunks = [
            _QueuedRows(rows[start : start + step], loop.create_future(), now) for start in range(0, len(rows), step)
        ]
        self._queue.extend(chunks)
        self._pump()
        if len(chunks) == 1:
            return await chunks[0].future
        return np.concatenate(await asyncio.gather(*(part.future for part in chunks)))

    def _pump(self, now: bool = False) -> None:
        """Send what is due: at once while nothing is under way, else once a batch is full or has lingered."""
        while self._queue and len(self._running) < self._settings.inflight:
            waiting = sum(len(part.rows) for part in self._queue)
            # While a pass runs, waiting costs nothing (the encoder is busy) and fills the next batch.
            if self._running and not now and waiting < self._settings.max_items and self._settings.linger:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(self._settings.linger, self._lingered)
                return
            batch: list[_QueuedRows] = []
            count = 0
            while self._queue and (not batch or count + len(self._queue[0].rows) <= self._settings.max_items):
                part = self._queue.popleft()
                if not part.future.done():  # else its request was cancelled
                    batch.append(part)
                    count += len(part.rows)
            if batch:
                task = asyncio.get_running_loop().create_task(self._run(batch, count))
                if not self._running:  # idle time before this batch does not count against the rate
                    self._last = time.monotonic()
                self._running.add(task)

    def _lingered(self) -> None:
        self._timer = None
        self._pump(now=True)

    async def _run(self, batch: list[_QueuedRows], count: int) -> None:
        started = time.monotonic()
        try:
            vectors = await self._encode([row for part in batch for row in part.rows])
            first = 0
            for part in batch:
                if not part.future.done():
                    part.future.set_result(vectors[first : first + len(part.rows)])
                first += len(part.rows)
        except Exception as error:  # each request of the batch gets it
            for part in batch:
                if not part.future.done():
                    part.future.set_exception(error)
        finally:
            now = time.monotonic()
            self.rate.add(count, now - self._last)
            self._last = now
            if self._observe:
                self._observe(count, now - started, started - batch[0].since)
            self._running -= {asyncio.current_task()}
            self._pump()
