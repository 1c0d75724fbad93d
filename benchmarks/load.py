"""A load generator for HTTP services: many keep-alive connections in one process, about 50 us of CPU a request.

Replies are counted by status and timed; `check` looks at each. A connection that breaks counts as a failure and is
made again.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

Check = Callable[[int, "Reply"], str]
"""(number of the request, its reply) -> what is wrong with it, "" for nothing."""


class Reply(NamedTuple):
    """One reply; status 0: the connection broke."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Tally:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Latency of each request, by status."""
    wrong: list[str] = field(default_factory=list)
    """What `check` said, the first hundred."""
    ended: list[tuple[float, int]] = field(default_factory=list)
    """(monotonic time, status) of each reply, in order."""

    def add(self, status: int, seconds: float, wrong: str) -> None:
        """Count one reply."""
        self.statuses[status] += 1
        self.seconds.setdefault(status, []).append(seconds)
        self.ended.append((time.monotonic(), status))
        if wrong and len(self.wrong) < 100:
            self.wrong.append(wrong)

    def percentile(self, share: float, status: int = 200) -> float:
        """Seconds within which `share` (in percent) of the replies of a status came; nan without any."""
        values = self.seconds.get(status)
        return float(np.percentile(values, share)) if values else float("nan")


def request(url: str, path: str, body: bytes, content_type: str = "application/json", extra: str = "") -> bytes:
    """The bytes of a POST; `extra` are further header lines, each with its \\r\\n."""
    head = f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: {content_type}\r\n"
    return f"{head}{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """One keep-alive connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._place = parts.hostname or "127.0.0.1", parts.port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, data: bytes) -> Reply:
        """Send a request's bytes and read its reply."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(*self._place)
            reader, writer = self._streams
            writer.write(data)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if headers.get("connection", "").lower() == "close":
                self.close()
            return Reply(int(head[0].split(" ", 2)[1]), headers, body)
        except (OSError, EOFError):
            self.close()
            return Reply(0, {}, b"")

    def close(self) -> None:
        """Let go of it; the next request makes a new one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def closed_loop(
    urls: Sequence[str],
    requests: Iterator[tuple[int, bytes]],
    clients: int,
    tally: Tally,
    check: Check | None = None,
    pause: float = 0.0,
) -> Tally:
    """`clients` connections, each asking the next of `requests` (number, bytes) `pause` seconds after its reply.

    They are dealt to the servers at `urls` in turn.
    """

    async def client(place: int) -> None:
        connection = Connection(urls[place % len(urls)])
        for number, data in requests:
            started = time.perf_counter()
            reply = await connection.ask(data)
            tally.add(reply.status, time.perf_counter() - started, check(number, reply) if check else "")
            if pause or not reply.status:
                await asyncio.sleep(max(pause, 0.01))
        connection.close()

    await asyncio.gather(*(client(place) for place in range(clients)))
    return tally


async def open_loop(
    url: str, requests: Iterator[tuple[int, bytes]], rate: float, seconds: float, tally: Tally, connections: int = 512
) -> Tally:
    """`rate` requests a second whatever comes back, over at most `connections`; those for which none is free wait.

    Latency counts from the moment a request was due.
    """
    free = asyncio.Queue[Connection]()
    for _ in range(connections):
        free.put_nowait(Connection(url))

    async def one(data: bytes, due: float) -> None:
        connection = await free.get()
        reply = await connection.ask(data)
        tally.add(reply.status, time.perf_counter() - due, "")
        free.put_nowait(connection)

    started, tasks = time.perf_counter(), set[asyncio.Task[None]]()
    for place in range(int(rate * seconds)):
        due = started + place / rate
        if due > time.perf_counter():
            await asyncio.sleep(due - time.perf_counter())
        task = asyncio.create_task(one(next(requests)[1], due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    while not free.empty():
        free.get_nowait().close()
    return tally


def forever(made: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """The requests in turn, without end."""
    number = 0
    while True:
        yield number % len(made), made[number % len(made)]
        number += 1


def until(stop: Callable[[], bool], requests: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Requests as long as `stop` says no."""
    for entry in requests:
        if stop():
            return
        yield entry
