"""The OpenAPI document: the inference routes' operations, the error replies, this service's limits."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from serving.config import HttpConfig
from serving.http.responses import error_body
from serving.http.route import InferenceRoute
from serving.http.schema import ErrorReply

ABOUT = """Embeddings of texts and images in one space, and search over an index of them.

Every reply names the version that it comes from (`x-triptych-model`) and its embedding space (`x-triptych-space`):
vectors of different spaces cannot be compared. Images are sent as data URLs; their type is read from the bytes.
"""
_ERRORS: dict[int, tuple[str, str, str, str | None]] = {
    400: (
        "A text or image that cannot be used, or an option that this service does not offer.",
        "image_unreadable",
        "input[1]: not an image of a known format, begins with b'hello'",
        "input[1]",
    ),
    401: ("No API key, or an unknown one.", "invalid_api_key", "a key is needed: send Authorization: Bearer KEY", None),
    404: (
        "Another model, a version that is not loaded, no index, or a row that the index does not have.",
        "model_not_found",
        "the model here is 'shapes'; leave model out, or name it",
        "model",
    ),
    408: ("The body took too long to arrive.", "body_timeout", "the body did not arrive within 20 s", None),
    413: ("Too many bytes: the body, or an image.", "body_too_large", "the body has more than 33554432 bytes", None),
    415: ("Not JSON.", "unsupported_media_type", "send Content-Type: application/json, not text/plain", None),
    422: ("Not the schema.", "string_type", "input[2]: Input should be a valid string", "input[2]"),
    429: (
        "The service is full: see `Retry-After`.",
        "overloaded",
        "the service is full; try again later",
        None,
    ),
    500: (
        "A fault; the log has the request's id.",
        "internal_error",
        "the service failed; its log has request 1f0c",
        None,
    ),
    503: (
        "No model is loaded, or a replica does not answer.",
        "not_ready",
        "the model is not loaded yet",
        None,
    ),
    504: ("The deadline is past.", "deadline_exceeded", "no answer within 30 s", None),
}
"""(what it means, then code, message and param of an example) by status."""
_HEADERS = ("x-triptych-model", "x-triptych-space", "x-request-id")
_REFERENCE = "#/components/schemas/{model}"
_VERSION_HEADER = {
    "name": "x-triptych-version",
    "in": "header",
    "required": False,
    "description": "Label of a loaded version; without it the current one.",
    "schema": {"type": "string"},
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route that may answer with these errors."""
    return {status: {"model": ErrorReply, "description": _ERRORS[status][0]} for status in statuses}


def make_document(app: FastAPI, routes: Sequence[InferenceRoute], config: HttpConfig, keyed: bool) -> dict[str, Any]:
    """The document of FastAPI's own routes and the inference routes. `keyed`: requests need an API key."""
    document = FastAPI.openapi(app)
    models = {model for route in routes for model in (route.request, route.reply)}
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)
    schemas = document["components"]["schemas"]
    schemas |= definitions["$defs"]
    document["paths"] = {route.path: {"post": _operation(route)} for route in routes} | document["paths"]
    schemas["SearchRequest"]["properties"]["top_k"]["maximum"] = config.max_top_k
    schemas["RerankRequest"]["properties"]["documents"]["maxItems"] = config.max_documents
    for form in schemas["EmbeddingRequest"]["properties"]["input"]["anyOf"]:
        if form["type"] == "array":
            form["maxItems"] = config.max_inputs
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own; this service answers in another form
        schemas.pop(name, None)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete_replies(operation["responses"])
            if keyed and (path.startswith("/v1/") or path == "/metrics"):
                operation["security"] = [{"key": []}]
    return document


def _operation(route: InferenceRoute) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(route.request)}}
    if route.upload is not None:
        content["multipart/form-data"] = {"schema": route.upload}
    return {
        "tags": ["inference"],
        "summary": route.summary,
        "description": route.description,
        "operationId": route.name + route.path.replace("/", "_") + "_post",  # as FastAPI names its own
        "parameters": [_VERSION_HEADER],
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": _response("Successful Response", route.reply),
            **{str(status): _response(meaning, ErrorReply) for status, (meaning, *_) in _ERRORS.items()},
        },
    }


def _response(description: str, model: type) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _reference(model)}}}


def _reference(model: type) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def _complete_replies(replies: dict[str, Any]) -> None:
    """Add the headers of every reply and examples of errors; drop the 422 that FastAPI adds where it has parameters."""
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
