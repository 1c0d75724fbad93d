"""Behind the door: one version and a request's body in, JSON out. `/v1/embeddings`, and what all hot paths share.

Axes: N inputs of a request, D width of the joint space.
"""

import binascii
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from serving.config import DoorConfig
from serving.http.body import parse_json
from serving.http.decode import Decoder
from serving.http.fetch import Fetcher
from serving.http.inputs import Inputs, both, embedding_inputs, merged
from serving.http.metrics import Metrics
from serving.http.responses import Refusal
from serving.http.schema import EmbeddingRequest
from serving.interfaces import Description, ModelSet


@dataclass
class Tools:
    """What all requests use."""

    config: DoorConfig
    decoder: Decoder
    fetcher: Fetcher
    metrics: Metrics


Route = Callable[[ModelSet, bytes, str, Tools], Awaitable[bytes]]
"""(version, body, content type, tools) -> JSON. Raises Refusal, Overloaded, Broken."""


def check_model(asked: str | None, description: Description) -> None:
    """Raises Refusal 404 where a request names another model."""
    if asked and asked != description.name:
        raise Refusal(
            404, "model_not_found", f"the model here is {description.name!r}; leave model out, or name it", "model"
        )


async def vectors_of(inputs: Inputs, set: ModelSet, tools: Tools) -> tuple[np.ndarray, int]:
    """Unit vectors float32 (N, D) in the order of the request, and the number of tokens read."""
    if not inputs.pictures:
        return await set.embed_texts(inputs.texts)
    if not inputs.texts:
        return await image_vectors(inputs.pictures, set, tools), 0
    (texts, tokens), images = await both(set.embed_texts(inputs.texts), image_vectors(inputs.pictures, set, tools))
    return merged(inputs, texts, images), tokens


async def image_vectors(pictures: Sequence[tuple[str, bytes | str]], set: ModelSet, tools: Tools) -> np.ndarray:
    """Unit vectors float32 (N, D) of encoded pictures."""
    return await set.embed_images(await pixels_of(pictures, set, tools))


async def pixels_of(pictures: Sequence[tuple[str, bytes | str]], set: ModelSet, tools: Tools) -> np.ndarray:
    """uint8 (N, S, S, 3) of encoded pictures, fetched where they are URLs."""
    pictures = await tools.fetcher.replace(pictures)
    start = time.perf_counter()
    pixels = await tools.decoder(pictures, set.description.image_size)
    tools.metrics.decoded(time.perf_counter() - start)
    return pixels


async def embeddings(set: ModelSet, body: bytes, content_type: str, tools: Tools) -> bytes:
    """POST /v1/embeddings."""
    request, description = parse_json(EmbeddingRequest, body, content_type), set.description
    check_model(request.model, description)
    if request.dimensions not in (None, description.dimensions):
        message = f"this model's vectors have {description.dimensions} dimensions, and are not shortened"
        raise Refusal(400, "dimensions_not_supported", message, "dimensions")
    inputs = embedding_inputs(request, description, tools.config)
    tools.metrics.inputs(len(inputs.texts), len(inputs.pictures))
    with set.admit(len(inputs.texts), len(inputs.pictures)):
        vectors, tokens = await vectors_of(inputs, set, tools)
    vectors = np.ascontiguousarray(vectors, "<f4")
    encode: Callable[[np.ndarray], Any] = _base64 if request.encoding_format == "base64" else _itself
    data = [{"object": "embedding", "index": row, "embedding": encode(vector)} for row, vector in enumerate(vectors)]
    return reply(set, {"object": "list", "data": data}, tokens)


def _base64(vector: np.ndarray) -> str:
    return binascii.b2a_base64(vector.data, newline=False).decode("ascii")


def _itself(vector: np.ndarray) -> np.ndarray:
    return vector


def reply(set: ModelSet, content: dict[str, Any], tokens: int | None = None) -> bytes:
    """JSON of `content` with the model, its embedding space and, where they were counted, the tokens read."""
    content["model"], content["embedding_space"] = set.description.name, set.description.embedding_space
    if tokens is not None:
        content["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
