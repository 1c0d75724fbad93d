"""Reading the body of a request: limits before and while it arrives, clients that hang up, JSON and multipart."""

import asyncio
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from email.parser import BytesHeaderParser
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from serving.http.asgi import Receive
from serving.http.responses import ApiError
from serving.http.schema import TOKENS
from serving.interfaces import Overloaded

ModelT = TypeVar("ModelT", bound=BaseModel)
_MOST_PARTS = 16
_TAGS = ("text", "image_url")
"""Values of `type` of a message's content."""
_SMALL = 2**16
"""Bytes of a body whose values are not counted before it is parsed."""
_MOST_COMMAS = 2**15
"""In a larger body: each comma may begin a value, whose parsing costs many times its byte."""
_MOST_FAULTS = 100
"""Where a body breaks the schema in more places, the reply says only how many."""


class ClientDisconnected(Exception):
    """The client closed the connection before it was answered."""


class MemoryBudget:
    """Bytes of request bodies that a gateway may have in memory at once."""

    def __init__(self, total: int) -> None:
        self._total = total
        self.used = 0
        """Bytes reserved now."""

    @contextmanager
    def reserve(self) -> Iterator["Reservation"]:
        """A reservation for one request, empty at first; given back when the context ends."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            self.used -= reservation.size

    def take(self, size: int) -> None:
        """Reserve `size` more bytes. Raises Overloaded beyond the total, unless nothing else is reserved."""
        if self.used and self.used + size > self._total:
            raise Overloaded
        self.used += size


class Reservation:
    """The bytes of a budget that one request has reserved."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget, self.size = budget, 0

    def grow(self, size: int) -> None:
        """Reserve `size` bytes in all, at least. Raises Overloaded."""
        if size > self.size:
            self._budget.take(size - self.size)
            self.size = size


@contextmanager
def cancel_on_disconnect(receive: Receive) -> Iterator[None]:
    """Raises ClientDisconnected in this task as soon as the client hangs up; to be entered once the body is read."""
    task = asyncio.current_task()
    assert task is not None
    over = disconnected = False

    def on_message(watcher: asyncio.Task[MutableMapping[str, Any]]) -> None:
        nonlocal disconnected
        if over or watcher.cancelled() or watcher.exception() is not None:
            return
        if watcher.result()["type"] == "http.disconnect":
            disconnected = True
            task.cancel()

    watcher = asyncio.ensure_future(receive())
    watcher.add_done_callback(on_message)
    try:
        yield
    except asyncio.CancelledError:
        if not disconnected:  # cancelled from outside, as at shutdown or past a deadline
            raise
        task.uncancel()  # or a timeout around this task would take the cancellation for its own
        raise ClientDisconnected from None
    finally:
        over = True
        watcher.cancel()


async def read_body(
    receive: Receive, declared: bytes | None, limit: int, seconds: float, reservation: Reservation
) -> bytes:
    """The whole body; `declared` is its `Content-Length`.

    Raises ApiError: 413 above `limit` bytes, 408 after `seconds`, 400 for a bad length; Overloaded: the memory budget
    is spent; ClientDisconnected.
    """
    if declared is not None:
        length = length_of(declared)
        if length > limit:
            raise _too_large(limit)
        reservation.grow(length)
    try:
        async with asyncio.timeout(seconds) as clock:
            return await _collect(receive, limit, reservation)
    except TimeoutError:
        if not clock.expired():
            raise
        raise ApiError(408, "body_timeout", f"the body did not arrive within {seconds:g} s") from None


async def _collect(receive: Receive, limit: int, reservation: Reservation) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        reservation.grow(size)  # a body without Content-Length is counted as it arrives
        if chunk:
            chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def length_of(declared: bytes) -> int:
    """The number in a `Content-Length` header."""
    if not declared.isdigit() or len(declared) > 18:
        raise ApiError(400, "bad_content_length", "content-length is not a number")
    return int(declared)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"the body has more than {limit} bytes")


def parse_json(schema: type[ModelT], body: bytes, content_type: str) -> ModelT:
    """Read a JSON body. Raises ApiError: 413 too many values, 415 another content type, 422 not the schema."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "unsupported_media_type", f"send Content-Type: application/json, not {kind[:80]}")
    if len(body) > _SMALL and body.count(b",") > _MOST_COMMAS:
        raise ApiError(413, "too_many_values", f"the body has more than {_MOST_COMMAS} commas")
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error) from None


def parse_fields(schema: type[ModelT], fields: Mapping[str, Any]) -> ModelT:
    """Read form fields. Raises ApiError 422 against the schema."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error) from None


def validation_error(error: ValidationError) -> ApiError:
    """422 with the most precise of pydantic's errors; no value that was sent is repeated."""
    if error.error_count() > _MOST_FAULTS:
        return ApiError(422, "schema_mismatch", f"{error.error_count()} faults; see /docs for what is expected")
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # A union reports an error for each alternative: the deepest location is of the alternative that was meant.
    deepest = max(errors, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    where = _path(deepest["loc"])
    message = f"{where}: {deepest['msg']}" if where else deepest["msg"]
    return ApiError(400 if deepest["type"] == TOKENS else 422, deepest["type"], message, where or None)


def _path(location: tuple[int | str, ...]) -> str:
    """input[3], messages[0].content[1].text: without the names of alternatives that pydantic puts in between."""
    path = ""
    for number, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif number and ("[" in step or step == "str" or (isinstance(location[number - 1], int) and step in _TAGS)):
            continue
        else:
            name = step[:64].encode("utf-8", "replace").decode()
            path = f"{path}.{name}" if path else name
    return path


def parse_multipart(body: bytes, content_type: str) -> dict[str, bytes]:
    """The parts of a multipart/form-data body by name, all in memory: the body has its limit already.

    Raises ApiError 422: no boundary, no end, a part without a name, a name given twice, more than 16 parts.
    """
    boundary = (
        BytesHeaderParser().parsebytes(b"Content-Type: " + content_type.encode("latin-1", "replace")).get_boundary()
    )
    if not boundary or len(boundary) > 200:
        raise _malformed("no boundary in Content-Type")
    delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
    sections = (b"\r\n" + body).split(delimiter, _MOST_PARTS + 2)
    if len(sections) < 2 or not sections[-1].startswith(b"--"):
        raise _malformed(f"no end, or more than {_MOST_PARTS} parts")
    fields: dict[str, bytes] = {}
    for section in sections[1:-1]:
        head, blank, content = section.partition(b"\r\n\r\n")
        if not blank or len(head) > 4096:
            raise _malformed("a part without headers")
        name = _name(head.lstrip(b" \t\r\n"))
        if name in fields:
            raise _malformed(f"{name[:64]!r} is given twice")
        fields[name] = content
    return fields


def _name(head: bytes) -> str:
    name = BytesHeaderParser().parsebytes(head).get_param("name", header="content-disposition")
    if not isinstance(name, str) or not name:
        raise _malformed("a part without a name")
    return name


def _malformed(what: str) -> ApiError:
    return ApiError(422, "malformed_multipart", f"multipart body: {what}")
