"""The door: one ASGI callable that lets requests in, keeps the limits, and answers each with one version's reply.

The hot paths are handled here by hand: a framework's routing and validation cost more than a batched forward pass of a
small model. `serving/http/openapi.py` has the rest.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from models.redact import redact
from serving.config import DoorConfig
from serving.http.asgi import Head, Scope, Send, lifespan, path_of, read_head, send_json, watched
from serving.http.auth import Keys
from serving.http.body import Gone, Place, Receive, Room, read_body
from serving.http.decode import Decoder, quiet_decoders
from serving.http.embeddings import Route, Tools, embeddings
from serving.http.fetch import Fetcher
from serving.http.metrics import Metrics
from serving.http.openapi import cold_app
from serving.http.rerank import rerank
from serving.http.responses import NO_SNIFFING, Header, Refusal, full, head, model_headers, not_modified, not_ready
from serving.http.search import search
from serving.http.static import PageFile, read_page
from serving.interfaces import Broken, Desk, ModelSet, Overloaded

_log = logging.getLogger(__name__)
_HOT: dict[str, tuple[str, Route]] = {
    "/v1/embeddings": ("embeddings", embeddings),
    "/v1/search": ("search", search),
    "/v1/rerank": ("rerank", rerank),
}
_OPEN = frozenset(("/health", "/ready", "/openapi.json"))
"""Paths that need no key, beside the page's files: the page asks for a key itself. `/metrics` needs one."""
_FULL = full(1)
_FULL_BODY = _FULL.body


class Door:
    """ASGI application; run by uvicorn with interface="asgi3", or mounted in another one."""

    def __init__(
        self,
        desk: Desk,
        config: DoorConfig | None = None,
        keys: Keys | None = None,
        metrics: Metrics | None = None,
        fetcher: Fetcher | None = None,
        hosts: frozenset[str] = frozenset(),
    ) -> None:
        """`keys`: who may ask, everybody where there are none.

        `hosts`: names of the service that a request may carry, any where there are none: without keys a web page could
        otherwise have its own name point here, and read the replies (DNS rebinding).
        """
        self._desk = desk
        self._config = config or DoorConfig()
        self._keys, self._hosts = keys or Keys({}), hosts
        self._metrics = metrics or Metrics()
        quiet_decoders()
        decoder = Decoder(self._config, ThreadPoolExecutor(2, "decode"))
        self._tools = Tools(self._config, decoder, fetcher or Fetcher(self._config), self._metrics)
        self._page: dict[str, PageFile] = read_page()
        self._cold = cold_app(desk, self._metrics, self._config, keyed=bool(self._keys))
        self._limit = int(self._config.max_body_mib * 2**20)
        self._room = Room(int(self._config.max_held_mib * 2**20))
        self._held = 0

    @property
    def held(self) -> int:
        """Requests of the hot paths in progress."""
        return self._held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1000})
        path, asked = path_of(scope), read_head(scope)
        hot = _HOT.get(path) if scope["method"] == "POST" else None
        if hot is not None:
            await self._hot(hot, asked, receive, send)
        elif path in self._page and scope["method"] in ("GET", "HEAD"):
            await self._send_page(self._page[path], asked, scope, send)
        else:
            await self._cold_path(path, asked, scope, receive, send)

    def _labels(self) -> list[Header]:
        """Headers that name the current version; none before one is loaded."""
        return next((model_headers(one) for one, current in self._desk.versions() if current), [])

    async def _hot(self, hot: tuple[str, Route], asked: Head, receive: Receive, send: Send) -> None:
        """Lets a request in, or turns it away before its body is read."""
        method, route = hot
        if self._held >= self._config.max_requests:
            self._metrics.rejected("requests")
            headers = [*self._labels(), *_FULL.headers, (b"x-request-id", asked.request_id)]
            return await send_json(send, 429, _FULL_BODY, headers)
        start, code = time.perf_counter(), "gone"
        self._held += 1
        self._metrics.started(method)
        try:
            code = await self._answer(route, asked, receive, send)
        finally:
            self._held -= 1
            seconds = time.perf_counter() - start
            self._metrics.finished(method, code, seconds)
            if _log.isEnabledFor(logging.INFO):
                who = self._keys.who(asked.authorization) or "-"
                request_id = asked.request_id.decode()
                _log.info("request %s: %s, key %s, %s, %.1f ms", request_id, method, who, code or "ok", seconds * 1e3)

    async def _answer(self, route: Route, asked: Head, receive: Receive, send: Send) -> str:
        """Sends the reply; returns the error's code, "" where there is none."""
        status, code = 200, ""
        headers: list[Header] = []
        try:
            async with asyncio.timeout(self._config.deadline) as clock:
                with self._room.place() as place:
                    body = await self._worked_out(route, asked, receive, place, headers)
        except Gone:
            return "gone"
        except Exception as error:
            if isinstance(error, TimeoutError) and clock.expired():
                error = Refusal(504, "deadline_exceeded", f"no answer within {self._config.deadline:g} s")
            refusal = self._refusal(error, asked)
            status, code, body = refusal.status, refusal.code, refusal.body
            headers = [*(headers or self._labels()), *refusal.headers]
        headers.append((b"x-request-id", asked.request_id))
        await send_json(send, status, body, headers)
        return code

    async def _worked_out(
        self, route: Route, asked: Head, receive: Receive, place: Place, headers: list[Header]
    ) -> bytes:
        """The reply's body; `headers` gets the version that it comes from as soon as that is known."""
        self._check_caller(asked)
        content = await read_body(receive, asked.content_length, self._limit, self._config.body_seconds, place)
        with self._use(asked.version) as set:
            headers += model_headers(set.description)
            with watched(receive):
                return await route(set, content, asked.content_type, self._tools)

    def _check_caller(self, asked: Head) -> None:
        if self._keys and self._keys.who(asked.authorization) is None:
            message = "a key is needed: send Authorization: Bearer KEY"
            raise Refusal(401, "invalid_api_key", message, None, [(b"www-authenticate", b"Bearer")])
        if self._hosts and asked.host not in self._hosts:
            message = f"without keys this service answers as {', '.join(sorted(self._hosts))} only"
            raise Refusal(401, "host_not_allowed", message)

    @contextmanager
    def _use(self, version: str | None) -> Iterator[ModelSet]:
        """The version that a request is answered by. Raises Refusal: 404 it is not loaded, 503 none is."""
        if not self._desk.ready:
            raise not_ready()
        held = self._desk.use(version)
        try:
            set = held.__enter__()
        except KeyError:
            raise Refusal(404, "version_not_found", "x-triptych-version: that version is not loaded") from None
        try:
            yield set
        finally:
            held.__exit__(None, None, None)

    def _refusal(self, error: Exception, asked: Head) -> Refusal:
        """The reply to whatever went wrong; what the client is not told is logged."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, Overloaded):
            self._metrics.rejected("inputs")
            return full(error.retry_after)
        request_id = asked.request_id.decode()
        if isinstance(error, Broken):
            _log.error("request %s: a part does not answer: %s", request_id, redact(str(error)))
            return Refusal(503, "unavailable", "a part of the service does not answer; try again")
        _log.error("request %s failed: %s", request_id, redact("".join(traceback.format_exception(error))))
        return Refusal(500, "internal_error", f"the service failed; its log has request {request_id}")

    async def _send_page(self, file: PageFile, asked: Head, scope: Scope, send: Send) -> None:
        headers = [*file.headers, *self._labels(), (b"x-request-id", asked.request_id)]
        cached = file.is_cached(scope["headers"])
        await send(not_modified(headers) if cached else head(200, len(file.content), headers, file.kind))
        await send({"type": "http.response.body", "body": b"" if cached or scope["method"] == "HEAD" else file.content})

    async def _cold_path(self, path: str, asked: Head, scope: Scope, receive: Receive, send: Send) -> None:
        extra = [*self._labels(), (b"x-request-id", asked.request_id)]
        begun = False

        async def labelled(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], *extra, NO_SNIFFING]
            await send(message)

        try:
            if path not in _OPEN:
                self._check_caller(asked)
            await self._cold(scope, receive, labelled)
        except Exception as error:
            refusal = self._refusal(error, asked)
            if not begun:
                await send_json(send, refusal.status, refusal.body, [*extra, *refusal.headers])
