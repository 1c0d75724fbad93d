"""Models, health, metrics and the OpenAPI document: what FastAPI answers, beside the inference routes."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serving.config import HttpConfig
from serving.http.metrics import Metrics
from serving.http.openapi import ABOUT, errors, make_document
from serving.http.responses import ApiError, error_body, not_ready
from serving.http.route import InferenceRoute
from serving.http.schema import Body
from serving.interfaces import Description, VersionPool


class IndexEntry(Body):
    """The corpus that searches go over."""

    uri: str
    images: int
    texts: int
    kind: str


class VersionEntry(Body):
    """A loaded version; its label may be sent in the request header `x-triptych-version`."""

    label: str
    version: str
    current: bool
    """Whether requests without that header get it."""
    embedding_space: str
    dimensions: int
    image_size: int
    matching: bool
    """Whether `rerank` is possible."""
    index: IndexEntry | None


class ModelEntry(Body):
    """A model's name and its loaded versions."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    versions: list[VersionEntry]


class ModelList(Body):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelEntry]
    alarm: str
    """Why a newer version is not served; "" where all is well."""


class Health(Body):
    """Whether the service can answer."""

    status: Literal["ok", "not_ready"]
    model: str | None = None
    alarm: str = ""


def fastapi_app(
    pool: VersionPool, metrics: Metrics, config: HttpConfig, routes: Sequence[InferenceRoute], keyed: bool
) -> FastAPI:
    """The application of all other routes; its document has the inference `routes` too.

    `keyed`: requests need an API key.
    """
    app = FastAPI(
        title="Triptych",
        version="1",
        description=ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(ApiError)(_api_error)
    _add_models(app, pool)
    _add_health(app, pool, metrics)

    def document() -> dict[str, Any]:
        """Made when it is first requested: it takes longer than a start of the app."""
        if app.openapi_schema is None:
            app.openapi_schema = make_document(app, routes, config, keyed)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the way that FastAPI documents
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """FastAPI's own errors (no such path, another method) in the shape of all others."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return JSONResponse(error_body(error.status_code, code, error.detail), error.status_code, error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body, error.status, headers, "application/json")


def _add_models(app: FastAPI, pool: VersionPool) -> None:
    @app.get("/v1/models", tags=["models"], summary="What is served", responses=errors(401))
    async def models() -> ModelList:
        """The service's name, and the versions that are loaded."""
        return ModelList(object="list", data=entries(pool), alarm=pool.alarm)

    @app.get("/v1/models/{id:path}", tags=["models"], summary="One model", responses=errors(401, 404))
    async def model(name: Annotated[str, Path(alias="id")]) -> ModelEntry:
        """By the service's name."""
        for entry in entries(pool):
            if entry.id == name:
                return entry
        raise ApiError(404, "model_not_found", "no such model here; see /v1/models", "id")


def _add_health(app: FastAPI, pool: VersionPool, metrics: Metrics) -> None:
    @app.get("/health", tags=["health"], summary="Whether the process answers")
    async def health() -> Health:
        """200 as soon as the process listens."""
        current = next((one.label for one, is_current in pool.versions() if is_current), None)
        return Health(status="ok" if pool.ready else "not_ready", model=current, alarm=pool.alarm)

    @app.get("/ready", tags=["health"], summary="Whether requests can be answered", responses=errors(503))
    async def ready() -> Health:
        """200 once a model is loaded and checked."""
        if not pool.ready:
            raise not_ready()
        return await health()

    @app.get("/metrics", tags=["health"], summary="Numbers for Prometheus", response_class=Response)
    async def numbers() -> Response:
        """In Prometheus's text format."""
        content, kind = metrics.render()
        return Response(content, media_type=kind)


def entries(pool: VersionPool) -> list[ModelEntry]:
    """One entry per model name, with its loaded versions."""
    by_name: dict[str, list[tuple[Description, bool]]] = {}
    for description, current in pool.versions():
        by_name.setdefault(description.name, []).append((description, current))
    return [
        ModelEntry(
            id=name,
            object="model",
            created=max(one.created for one, _ in versions),
            owned_by="triptych",
            versions=[_version(one, current) for one, current in versions],
        )
        for name, versions in by_name.items()
    ]


def _version(one: Description, current: bool) -> VersionEntry:
    index = one.index
    return VersionEntry(
        label=one.label,
        version=one.version,
        current=current,
        embedding_space=one.embedding_space,
        dimensions=one.dimensions,
        image_size=one.image_size,
        matching=one.matching,
        index=IndexEntry(uri=index.uri, images=index.images, texts=index.texts, kind=index.kind) if index else None,
    )
