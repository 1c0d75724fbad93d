"""An inference route: its path, handler and schemas in one declaration, and what all handlers use."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import BaseModel

from serving.config import HttpConfig
from serving.http.decode import Decoder
from serving.http.fetch import Fetcher
from serving.http.metrics import Metrics
from serving.http.responses import ApiError
from serving.interfaces import Description, ModelVersion


@dataclass
class Tools:
    """What the handlers share: settings, the decoder's threads, the fetcher of URLs, the counters."""

    config: HttpConfig
    decoder: Decoder
    fetcher: Fetcher
    metrics: Metrics


Handler = Callable[[ModelVersion, bytes, str, Tools], Awaitable[bytes]]
"""(version, body, content type, tools) -> JSON. Raises ApiError, Overloaded, ReplicaUnavailable."""


@dataclass(frozen=True)
class InferenceRoute:
    """`POST path`: how it is answered, and what the OpenAPI document says of it."""

    path: str
    name: str
    """Value of the metrics' label `method`."""
    handle: Handler
    request: type[BaseModel]
    reply: type[BaseModel]
    summary: str
    description: str
    upload: dict[str, Any] | None = None
    """JSON schema of the request as multipart/form-data; None: only JSON is read."""


def check_model(name: str | None, description: Description) -> None:
    """Raises ApiError 404 where a request names another model."""
    if name and name != description.name:
        message = f"the model here is {description.name!r}; leave model out, or name it"
        raise ApiError(404, "model_not_found", message, "model")


def encode_reply(model: ModelVersion, content: dict[str, Any], tokens: int | None = None) -> bytes:
    """JSON of `content` with the model, its embedding space and, where they were counted, the tokens read."""
    content["model"], content["embedding_space"] = model.description.name, model.description.embedding_space
    if tokens is not None:
        content["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
