"""Pieces of ASGI: its types, the head of a request, a plain reply, the lifespan."""

import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from serving.http.responses import Header, head

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_PORT = re.compile(r":\d*$")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


@dataclass
class Head:
    """The headers of a request that count before its body is read."""

    request_id: bytes = b""
    """The `x-request-id` that the client sent, or a new one."""
    content_length: bytes | None = None
    content_type: str = ""
    authorization: bytes = b""
    version: str | None = None
    """Label of the version in `x-triptych-version`; None: the current one."""
    host: str = ""
    """Name that the client used for this service, without the port."""


def read_head(scope: Scope) -> Head:
    """The head of a request: one pass over its headers."""
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
    """Send a whole reply."""
    await send(head(status, len(body), headers))
    await send({"type": "http.response.body", "body": body})


async def lifespan(receive: Receive, send: Send) -> None:
    """Answer the server's lifespan messages; there is nothing to start or end here: the gateway does both."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
