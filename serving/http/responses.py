"""Replies: JSON, errors in OpenAI's shape, and the headers that every reply carries."""

import math
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import orjson

from serving.interfaces import Description

Header = tuple[bytes, bytes]
NO_SNIFFING: Header = (b"x-content-type-options", b"nosniff")
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


@dataclass(frozen=True)
class Reply:
    """A reply of an inference route."""

    status: int
    body: bytes
    """JSON."""
    headers: list[Header]
    code: str = ""
    """The error's code; "" where there is none."""


class ApiError(Exception):
    """An error that a request is answered with; its text is for the client."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Iterable[Header] = ()
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = tuple(headers)

    @property
    def body(self) -> bytes:
        """The error as JSON in OpenAI's shape."""
        return orjson.dumps(error_body(self.status, self.code, self.message, self.param))

    def reply(self, headers: Iterable[Header]) -> Reply:
        """The error as a reply, with `headers` before its own."""
        return Reply(self.status, self.body, [*headers, *self.headers], self.code)


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """{"error": {"message", "type", "param", "code"}}."""
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def overloaded(retry_after: float) -> ApiError:
    """429: no capacity is left; seconds are rounded up."""
    seconds = max(1, math.ceil(retry_after))
    return ApiError(429, "overloaded", "the service is full; try again later", None, [retry(seconds)])


def not_ready(retry_after: float = 5) -> ApiError:
    """503: no version is loaded yet."""
    return ApiError(503, "not_ready", "the model is not loaded yet", None, [retry(math.ceil(retry_after))])


def retry(seconds: int) -> Header:
    """The header `Retry-After`."""
    return b"retry-after", b"%d" % seconds


def model_headers(description: Description) -> list[Header]:
    """The version that a reply comes from, and its embedding space."""
    return [
        (b"x-triptych-model", description.label.encode("latin-1", "replace")),
        (b"x-triptych-space", description.embedding_space.encode("latin-1", "replace")),
    ]


def not_modified(headers: Iterable[Header]) -> MutableMapping[str, Any]:
    """The first ASGI message of a 304. It has no length: uvicorn takes one as a promise of so many bytes."""
    return {"type": "http.response.start", "status": 304, "headers": [NO_SNIFFING, *headers]}


def head(
    status: int, length: int, headers: Iterable[Header], content_type: bytes = b"application/json"
) -> MutableMapping[str, Any]:
    """The first ASGI message of a reply."""
    own = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % length),
        NO_SNIFFING,
        *headers,
    ]
    return {"type": "http.response.start", "status": status, "headers": own}
