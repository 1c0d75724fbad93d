"""Small pieces of ASGI: a request's head, a plain reply, the life span, and noticing that a client has gone."""

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serving.http.body import Gone, Receive
from serving.http.responses import Header, head

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_PORT = re.compile(r":\d*$")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


@dataclass
class Head:
    """What the door looks at before a body is read."""

    request_id: bytes = b""
    """The client's own, or a new one."""
    content_length: bytes | None = None
    content_type: str = ""
    authorization: bytes = b""
    version: str | None = None
    """Label of the version that is asked for."""
    host: str = ""
    """The name that the client has for this service, without the port."""


def read_head(scope: Scope) -> Head:
    """Of all headers, those that count here."""
    found = Head()
    for name, value in scope["headers"]:
        if name == b"content-length":
            found.content_length = value
        elif name == b"content-type":
            found.content_type = value.decode("latin-1")
        elif name == b"authorization":
            found.authorization = value
        elif name == b"x-triptych-version":
            found.version = value.decode("latin-1") or None
        elif name == b"host":
            found.host = _PORT.sub("", value.decode("latin-1")).lower()
        elif name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            found.request_id = value
    found.request_id = found.request_id or uuid.uuid4().hex.encode()
    return found


def path_of(scope: Scope) -> str:
    """The path below where the application is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] or "/" if root and path.startswith(root) else path


async def send_json(send: Send, status: int, body: bytes, headers: Iterable[Header]) -> None:
    """A whole reply."""
    await send(head(status, len(body), headers))
    await send({"type": "http.response.body", "body": body})


@contextmanager
def watched(receive: Receive) -> Iterator[None]:
    """While a request is worked on: raises Gone in this task as soon as its client hangs up."""
    task = asyncio.current_task()
    assert task is not None
    over = gone = False

    def heard(watcher: asyncio.Task[MutableMapping[str, Any]]) -> None:
        nonlocal gone
        if over or watcher.cancelled() or watcher.exception() is not None:
            return
        if watcher.result()["type"] == "http.disconnect":
            gone = True
            task.cancel()

    watcher = asyncio.ensure_future(receive())
    watcher.add_done_callback(heard)
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise Gone from None
    finally:
        over = True
        watcher.cancel()


async def lifespan(receive: Receive, send: Send) -> None:
    """Nothing to start, nothing to end: the gateway does both."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
