"""The HTTP app: one ASGI callable that admits requests, keeps the limits, and answers each from one model version.

Inference routes are handled here without a framework: its routing and validation cost more than a batched forward pass
of a small model. The page's files are sent from memory; FastAPI answers the rest (`serving/http/status.py`).
"""

import asyncio
import logging
import time
import traceback
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from models.redact import redact
from serving.config import HttpConfig
from serving.http.asgi import Head, Receive, Scope, Send, lifespan, path_of, read_head, send_json
from serving.http.auth import Keys
from serving.http.body import ClientDisconnected, MemoryBudget, cancel_on_disconnect, read_body
from serving.http.decode import Decoder, quiet_decoders
from serving.http.embeddings import EMBEDDINGS
from serving.http.fetch import Fetcher
from serving.http.metrics import Metrics
from serving.http.rerank import RERANK
from serving.http.responses import (
    NO_SNIFFING,
    ApiError,
    Header,
    Reply,
    head,
    model_headers,
    not_modified,
    not_ready,
    overloaded,
)
from serving.http.route import InferenceRoute, Tools
from serving.http.search import SEARCH
from serving.http.static import PageFile, read_page
from serving.http.status import fastapi_app
from serving.interfaces import ModelVersion, NotReady, Overloaded, ReplicaUnavailable, VersionNotLoaded, VersionPool

_log = logging.getLogger(__name__)
_ROUTES = {route.path: route for route in (EMBEDDINGS, SEARCH, RERANK)}
_WITHOUT_KEY = frozenset(("/health", "/ready", "/openapi.json"))
"""Paths that need no key, beside the page's files: the page asks for a key itself. `/metrics` needs one."""
_TOO_MANY_REQUESTS = overloaded(1)


class HttpApp:
    """ASGI application; run by uvicorn with interface="asgi3", or mounted in another one."""

    def __init__(
        self,
        pool: VersionPool,
        config: HttpConfig | None = None,
        keys: Keys | None = None,
        metrics: Metrics | None = None,
        fetcher: Fetcher | None = None,
        hosts: frozenset[str] = frozenset(),
    ) -> None:
        """`keys`: API keys of which a request needs one; none are needed where there are none.

        `hosts`: host names that a request may be sent to, any where there are none: without keys a web page could
        otherwise have its own name resolve to this service, and read the replies (DNS rebinding).
        """
        self._pool = pool
        self._config = config or HttpConfig()
        self._keys, self._hosts = keys or Keys({}), hosts
        self._metrics = metrics or Metrics()
        quiet_decoders()
        decoder = Decoder(self._config, ThreadPoolExecutor(2, "decode"))
        self._tools = Tools(self._config, decoder, fetcher or Fetcher(self._config), self._metrics)
        self._page: dict[str, PageFile] = read_page()
        self._fastapi = fastapi_app(pool, self._metrics, self._config, list(_ROUTES.values()), keyed=bool(self._keys))
        self._max_body = int(self._config.max_body_mib * 2**20)
        self._budget = MemoryBudget(int(self._config.max_held_mib * 2**20))
        self._in_progress = 0

    @property
    def in_progress(self) -> int:
        """Inference requests that are not answered yet."""
        return self._in_progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1000})
        path, request = path_of(scope), read_head(scope)
        route = _ROUTES.get(path) if scope["method"] == "POST" else None
        if route is not None:
            await self._infer(route, request, receive, send)
        elif path in self._page and scope["method"] in ("GET", "HEAD"):
            await self._send_page(self._page[path], request, scope, send)
        else:
            await self._send_other(path, request, scope, receive, send)

    async def _infer(self, route: InferenceRoute, request: Head, receive: Receive, send: Send) -> None:
        """Admit an inference request, or turn it away before its body is read; count and log how it ends."""
        request_id = (b"x-request-id", request.request_id)
        if self._in_progress >= self._config.max_requests:
            self._metrics.rejected("requests")
            reply = _TOO_MANY_REQUESTS.reply(self._current_headers())
            return await send_json(send, reply.status, reply.body, [*reply.headers, request_id])
        start, code = time.perf_counter(), "gone"  # label of the metric where the client disconnects
        self._in_progress += 1
        self._metrics.started(route.name)
        try:
            reply = await self._reply(route, request, receive)
            code = reply.code
            await send_json(send, reply.status, reply.body, [*reply.headers, request_id])
        except ClientDisconnected:
            pass
        finally:
            self._in_progress -= 1
            seconds = time.perf_counter() - start
            self._metrics.finished(route.name, code, seconds)
            if _log.isEnabledFor(logging.INFO):  # finding the key's label compares all keys
                _log.info(
                    "request %s: %s, key %s, %s, %.1f ms", request.request_id.decode(), route.name,
                    self._keys.label_of(request.authorization) or "-", code or "ok", seconds * 1e3,
                )  # fmt: skip

    async def _reply(self, route: InferenceRoute, request: Head, receive: Receive) -> Reply:
        """The reply of one version of the model, or the error in its place. Raises ClientDisconnected."""
        model: ModelVersion | None = None
        try:
            async with asyncio.timeout(self._config.deadline) as deadline:
                with self._budget.reserve() as reservation:
                    self._check_caller(request)
                    seconds, length = self._config.body_seconds, request.content_length
                    content = await read_body(receive, length, self._max_body, seconds, reservation)
                    with self._pool.use(request.version) as model, cancel_on_disconnect(receive):
                        body = await route.handle(model, content, request.content_type, self._tools)
            return Reply(200, body, model_headers(model.description))
        except ClientDisconnected:
            raise
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                error = ApiError(504, "deadline_exceeded", f"no answer within {self._config.deadline:g} s")
            # An error names the version that made it, whatever is current by now.
            headers = model_headers(model.description) if model is not None else self._current_headers()
            return self._api_error(error, request).reply(headers)

    def _check_caller(self, request: Head) -> None:
        """Raises ApiError 401 without a valid key, or for a host name that is not the service's."""
        if self._keys and self._keys.label_of(request.authorization) is None:
            message = "a key is needed: send Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", message, None, [(b"www-authenticate", b"Bearer")])
        if self._hosts and request.host not in self._hosts:
            message = f"without keys this service answers as {', '.join(sorted(self._hosts))} only"
            raise ApiError(401, "host_not_allowed", message)

    def _api_error(self, error: Exception, request: Head) -> ApiError:
        """The error that the client is told; details that it is not told are logged."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Overloaded):
            self._metrics.rejected("inputs")
            return overloaded(error.retry_after)
        if isinstance(error, NotReady):
            return not_ready()
        if isinstance(error, VersionNotLoaded):
            return ApiError(404, "version_not_found", "x-triptych-version: that version is not loaded")
        request_id = request.request_id.decode()
        if isinstance(error, ReplicaUnavailable):
            _log.error("request %s: a part does not answer: %s", request_id, redact(str(error)))
            return ApiError(503, "unavailable", "a part of the service does not answer; try again")
        _log.error("request %s failed: %s", request_id, redact("".join(traceback.format_exception(error))))
        return ApiError(500, "internal_error", f"the service failed; its log has request {request_id}")

    def _current_headers(self) -> list[Header]:
        """Headers that name the current version; none before one is loaded."""
        return next((model_headers(one) for one, current in self._pool.versions() if current), [])

    async def _send_page(self, file: PageFile, request: Head, scope: Scope, send: Send) -> None:
        headers = [*file.headers, *self._current_headers(), (b"x-request-id", request.request_id)]
        cached = file.is_cached(scope["headers"])
        await send(not_modified(headers) if cached else head(200, len(file.content), headers, file.kind))
        await send({"type": "http.response.body", "body": b"" if cached or scope["method"] == "HEAD" else file.content})

    async def _send_other(self, path: str, request: Head, scope: Scope, receive: Receive, send: Send) -> None:
        """Have FastAPI answer, with our headers added; also what is neither a route nor a file (404, 405)."""
        headers = [*self._current_headers(), (b"x-request-id", request.request_id)]
        begun = False

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], *headers, NO_SNIFFING]
            await send(message)

        try:
            if path not in _WITHOUT_KEY:
                self._check_caller(request)
            if path in _ROUTES:
                raise ApiError(405, "method_not_allowed", "Method Not Allowed", None, [(b"allow", b"POST")])
            await self._fastapi(scope, receive, send_with_headers)
        except Exception as error:
            reply = self._api_error(error, request).reply(headers)
            if not begun:  # else the status is sent already, and the connection is all that can be cut
                await send_json(send, reply.status, reply.body, reply.headers)
