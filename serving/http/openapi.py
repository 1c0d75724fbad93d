"""The cold paths: what is loaded, health, metrics, and the OpenAPI document of the whole interface."""

from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serving.config import DoorConfig
from serving.http.metrics import Metrics
from serving.http.responses import Refusal, error_body, not_ready
from serving.http.schema import (
    EmbeddingReply,
    EmbeddingRequest,
    ErrorReply,
    RerankReply,
    RerankRequest,
    SearchReply,
    SearchRequest,
)
from serving.http.status import Health, ModelEntry, ModelList, entries
from serving.interfaces import Desk

_ABOUT = """Embeddings of texts and pictures in one space, and search over an index of them.

Every reply names the version that it comes from (`x-triptych-model`) and its embedding space (`x-triptych-space`):
vectors of different spaces cannot be compared. Pictures are sent as data URLs; their type is read from the bytes.
"""
_ERRORS: dict[int, tuple[str, str, str, str | None]] = {
    400: (
        "A text or picture that cannot be used, or a wish that this service does not grant.",
        "image_unreadable",
        "input[1]: not an image of a known format, begins with b'hello'",
        "input[1]",
    ),
    401: ("No key, or nobody's.", "invalid_api_key", "a key is needed: send Authorization: Bearer KEY", None),
    404: (
        "Another model, a version that is not loaded, no index, or a row that it does not have.",
        "model_not_found",
        "the model here is 'shapes'; leave model out, or name it",
        "model",
    ),
    408: ("The body took too long to arrive.", "body_timeout", "the body did not arrive within 20 s", None),
    413: ("Too many bytes: the body, or a picture.", "body_too_large", "the body has more than 33554432 bytes", None),
    415: ("Not JSON.", "unsupported_media_type", "send Content-Type: application/json, not text/plain", None),
    422: ("Not the schema.", "string_type", "input[2]: Input should be a valid string", "input[2]"),
    429: ("No room: try again after `Retry-After` s.", "overloaded", "the service is full; try again later", None),
    500: (
        "A fault; the log has the request's id.",
        "internal_error",
        "the service failed; its log has request 1f0c",
        None,
    ),
    503: ("No model is loaded, or a part does not answer.", "not_ready", "the model is not loaded yet", None),
    504: ("The deadline is past.", "deadline_exceeded", "no answer within 30 s", None),
}
"""(what it means, then code, message and param of an example) by status."""
_HEADERS = ("x-triptych-model", "x-triptych-space", "x-request-id")
_UPLOAD = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "image": {"type": "string", "format": "binary", "description": "A picture's file."},
        "text": {"type": "string"},
        "id": {"type": "string"},
        "model": {"type": "string"},
        "side": {"type": "string", "enum": ["image", "text"], "default": "image"},
        "target": {"type": "string", "enum": ["image", "text"], "default": "image"},
        "top_k": {"type": "integer", "minimum": 1, "default": 10},
        "rerank": {"type": "boolean", "default": False},
    },
    "oneOf": [{"required": ["image"]}, {"required": ["text"]}, {"required": ["id"]}],
}
"""The form of an upload, as SearchRequest."""
_Version = Annotated[
    str | None, Header(alias="x-triptych-version", description="Label of a loaded version; without it the current one.")
]


def cold_app(desk: Desk, metrics: Metrics, config: DoorConfig, keyed: bool) -> FastAPI:
    """The application of the cold paths; the hot ones are in its document only. `keyed`: requests need an API key."""
    app = FastAPI(
        title="Triptych",
        version="1",
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Refusal)(_refusal)
    _declare_hot(app)
    _add_models(app, desk)
    _add_health(app, desk, metrics)

    def document() -> dict[str, Any]:
        """Made when it is first asked for."""
        if app.openapi_schema is None:
            _complete(FastAPI.openapi(app), config, keyed)
        return app.openapi_schema or {}

    app.openapi = document  # type: ignore[method-assign]
    return app


def _complete(document: dict[str, Any], config: DoorConfig, keyed: bool) -> None:
    """What the schema's classes cannot know: this service's limits, its headers, and whether it wants a key."""
    schemas = document["components"]["schemas"]
    schemas["SearchRequest"]["properties"]["top_k"]["maximum"] = config.max_top_k
    schemas["RerankRequest"]["properties"]["documents"]["maxItems"] = config.max_documents
    for form in schemas["EmbeddingRequest"]["properties"]["input"]["anyOf"]:
        if form["type"] == "array":
            form["maxItems"] = config.max_inputs
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, for what the door answers in another form
        schemas.pop(name, None)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete_replies(operation["responses"])
            if keyed and (path.startswith("/v1/") or path == "/metrics"):
                operation["security"] = [{"key": []}]


def _complete_replies(replies: dict[str, Any]) -> None:
    for status, reply in list(replies.items()):
        names = [*_HEADERS, "retry-after"] if status in ("429", "503") else _HEADERS
        reply["headers"] = {name: {"schema": {"type": "string"}} for name in names}
        if int(status) < 400:
            continue
        content = reply["content"]["application/json"]
        if content["schema"]["$ref"].endswith("/ErrorReply"):
            _, code, message, param = _ERRORS[int(status)]
            content["example"] = error_body(int(status), code, message, param)
        else:
            del replies[status]


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return JSONResponse(error_body(error.status_code, code, error.detail), error.status_code, error.headers)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body, error.status, headers, "application/json")


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documentation of error replies."""
    return {status: {"model": ErrorReply, "description": _ERRORS[status][0]} for status in statuses}


def _declare_hot(app: FastAPI) -> None:
    """The hot paths, for the document: the door answers them before this application is asked."""
    upload = {"requestBody": {"content": {"multipart/form-data": {"schema": _UPLOAD}}}}
    errors = _errors(*_ERRORS)

    @app.post("/v1/embeddings", tags=["hot"], summary="Vectors of texts and pictures", responses=errors)
    async def embeddings(body: EmbeddingRequest, version: _Version = None) -> EmbeddingReply:
        """In OpenAI's shape. Texts and pictures may be mixed; the order is kept."""
        raise NotImplementedError

    @app.post("/v1/search", tags=["hot"], summary="Nearest rows of the index", responses=errors, openapi_extra=upload)
    async def search(body: SearchRequest, version: _Version = None) -> SearchReply:
        """By a text, a picture (data URL, or a file in a multipart body), or the `id` of a row of the index."""
        raise NotImplementedError

    @app.post("/v1/rerank", tags=["hot"], summary="Documents by how well they fit a query", responses=errors)
    async def rerank(body: RerankRequest, version: _Version = None) -> RerankReply:
        """By the match probability of the fusion encoder, or by the cosine: `score` says which."""
        raise NotImplementedError


def _add_models(app: FastAPI, desk: Desk) -> None:
    @app.get("/v1/models", tags=["models"], summary="What is served", responses=_errors(401))
    async def models() -> ModelList:
        """The service's name, and the versions that are loaded."""
        return ModelList(object="list", data=entries(desk), alarm=desk.alarm)

    @app.get("/v1/models/{id:path}", tags=["models"], summary="One model", responses=_errors(401, 404))
    async def model(id: str) -> ModelEntry:
        """By the service's name."""
        for entry in entries(desk):
            if entry.id == id:
                return entry
        raise Refusal(404, "model_not_found", "no such model here; see /v1/models", "id")


def _add_health(app: FastAPI, desk: Desk, metrics: Metrics) -> None:
    @app.get("/health", tags=["health"], summary="Whether the process answers")
    async def health() -> Health:
        """200 as soon as the process listens."""
        current = next((one.label for one, is_current in desk.versions() if is_current), None)
        return Health(status="ok" if desk.ready else "not_ready", model=current, alarm=desk.alarm)

    @app.get("/ready", tags=["health"], summary="Whether requests can be answered", responses=_errors(503))
    async def ready() -> Health:
        """200 once a model is loaded and checked."""
        if not desk.ready:
            raise not_ready()
        return await health()

    @app.get("/metrics", tags=["health"], summary="Numbers for Prometheus", response_class=Response)
    async def numbers() -> Response:
        """In Prometheus's text format."""
        content, kind = metrics.render()
        return Response(content, media_type=kind)
