"""Reading a request's body: limits before and while it arrives, JSON and multipart."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from email.parser import BytesHeaderParser
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from serving.http.responses import Refusal
from serving.http.schema import TOKENS
from serving.interfaces import Overloaded

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
ModelT = TypeVar("ModelT", bound=BaseModel)
_MOST_PARTS = 16
_TAGS = ("text", "image_url")
"""Kinds of a message's parts."""
_SMALL = 2**16
_MOST_COMMAS = 2**15
"""In a body of more than 64 KiB: each comma may begin a value, whose parsing costs many times its byte."""
_MOST_FAULTS = 100
"""More are not looked at one by one."""


class Gone(Exception):
    """The client hung up."""


class Room:
    """Bytes of bodies that a gateway may hold at once."""

    def __init__(self, total: int) -> None:
        self._total, self._held = total, 0

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._held

    @contextmanager
    def place(self) -> Iterator["Place"]:
        """What one request takes, given back at the end."""
        place = Place(self)
        try:
            yield place
        finally:
            self._held -= place.taken

    def take(self, size: int) -> None:
        """Raises Overloaded where there is no room for `size` more bytes; a request alone always has room."""
        if self._held and self._held + size > self._total:
            raise Overloaded
        self._held += size


class Place:
    """A request's share of the room."""

    def __init__(self, room: Room) -> None:
        self._room, self.taken = room, 0

    def grow(self, size: int) -> None:
        """Hold `size` bytes in all, at least. Raises Overloaded."""
        if size > self.taken:
            self._room.take(size - self.taken)
            self.taken = size


async def read_body(receive: Receive, declared: bytes | None, limit: int, seconds: float, place: Place) -> bytes:
    """The whole body.

    Raises Refusal: 413 above `limit` bytes, 408 after `seconds`, 400 bad length; Overloaded: no room; Gone.
    """
    if declared is not None:
        length = length_of(declared)
        if length > limit:
            raise _too_large(limit)
        place.grow(length)
    try:
        async with asyncio.timeout(seconds) as clock:
            return await _collect(receive, limit, place)
    except TimeoutError:
        if not clock.expired():
            raise
        raise Refusal(408, "body_timeout", f"the body did not arrive within {seconds:g} s") from None


async def _collect(receive: Receive, limit: int, place: Place) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        place.grow(size)
        if chunk:
            chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def length_of(declared: bytes) -> int:
    """The number in a `Content-Length` header."""
    if not declared.isdigit() or len(declared) > 18:
        raise Refusal(400, "bad_content_length", "content-length is not a number")
    return int(declared)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the body has more than {limit} bytes")


def parse_json(schema: type[ModelT], body: bytes, content_type: str) -> ModelT:
    """Read a JSON body. Raises Refusal: 413 too many values, 415 another content type, 422 not the schema."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise Refusal(415, "unsupported_media_type", f"send Content-Type: application/json, not {kind[:80]}")
    if len(body) > _SMALL and body.count(b",") > _MOST_COMMAS:
        raise Refusal(413, "too_many_values", f"the body has more than {_MOST_COMMAS} commas")
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise refused(error) from None


def parse_fields(schema: type[ModelT], fields: Mapping[str, Any]) -> ModelT:
    """Read form fields. Raises Refusal 422 against the schema."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise refused(error) from None


def refused(error: ValidationError) -> Refusal:
    """The most precise of the schema's complaints as a reply; nothing of what was sent is repeated."""
    if error.error_count() > _MOST_FAULTS:
        return Refusal(422, "schema_mismatch", f"{error.error_count()} faults; see /docs for what is expected")
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    deepest = max(errors, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    where = _path(deepest["loc"])
    message = f"{where}: {deepest['msg']}" if where else deepest["msg"]
    return Refusal(400 if deepest["type"] == TOKENS else 422, deepest["type"], message, where or None)


def _path(places: tuple[int | str, ...]) -> str:
    """input[3], messages[0].content[1].text: without the names of alternatives that pydantic puts in between."""
    path = ""
    for number, place in enumerate(places):
        if isinstance(place, int):
            path += f"[{place}]"
        elif number and ("[" in place or place == "str" or (isinstance(places[number - 1], int) and place in _TAGS)):
            continue
        else:
            name = place[:64].encode("utf-8", "replace").decode()
            path = f"{path}.{name}" if path else name
    return path


def parse_multipart(body: bytes, content_type: str) -> dict[str, bytes]:
    """The parts of a multipart/form-data body by name, all in memory: the body has its limit already.

    Raises Refusal 422: no boundary, no end, a part without a name, a name given twice, more than 16 parts.
    """
    boundary = (
        BytesHeaderParser().parsebytes(b"Content-Type: " + content_type.encode("latin-1", "replace")).get_boundary()
    )
    if not boundary or len(boundary) > 200:
        raise _malformed("no boundary in Content-Type")
    mark = b"\r\n--" + boundary.encode("latin-1", "replace")
    pieces = (b"\r\n" + body).split(mark, _MOST_PARTS + 2)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise _malformed(f"no end, or more than {_MOST_PARTS} parts")
    fields: dict[str, bytes] = {}
    for piece in pieces[1:-1]:
        head, blank, content = piece.partition(b"\r\n\r\n")
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


def _malformed(what: str) -> Refusal:
    return Refusal(422, "malformed_multipart", f"multipart body: {what}")
