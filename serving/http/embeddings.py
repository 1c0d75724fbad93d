"""`/v1/embeddings`: vectors of texts and images, in OpenAI's shape."""

import binascii
from collections.abc import Callable
from typing import Any

import numpy as np

from serving.http.body import parse_json
from serving.http.inputs import embedding_inputs, vectors_of
from serving.http.responses import ApiError
from serving.http.route import InferenceRoute, Tools, check_model, encode_reply
from serving.http.schema import EmbeddingReply, EmbeddingRequest
from serving.interfaces import ModelVersion


async def embeddings(model: ModelVersion, body: bytes, content_type: str, tools: Tools) -> bytes:
    """Answer POST /v1/embeddings."""
    request, description = parse_json(EmbeddingRequest, body, content_type), model.description
    check_model(request.model, description)
    if request.dimensions not in (None, description.dimensions):
        message = f"this model's vectors have {description.dimensions} dimensions, and are not shortened"
        raise ApiError(400, "dimensions_not_supported", message, "dimensions")
    inputs = embedding_inputs(request, description, tools.config)
    tools.metrics.inputs(len(inputs.texts), len(inputs.images))
    with model.admit(len(inputs.texts), len(inputs.images)):
        vectors, tokens = await vectors_of(inputs, model, tools)
    vectors = np.ascontiguousarray(vectors, "<f4")
    encode: Callable[[np.ndarray], Any] = _base64 if request.encoding_format == "base64" else _as_numbers
    data = [{"object": "embedding", "index": row, "embedding": encode(vector)} for row, vector in enumerate(vectors)]
    return encode_reply(model, {"object": "list", "data": data}, tokens)


def _base64(vector: np.ndarray) -> str:
    return binascii.b2a_base64(vector.data, newline=False).decode("ascii")


def _as_numbers(vector: np.ndarray) -> np.ndarray:
    return vector  # orjson writes arrays as lists of numbers


EMBEDDINGS = InferenceRoute(
    path="/v1/embeddings",
    name="embeddings",
    handle=embeddings,
    request=EmbeddingRequest,
    reply=EmbeddingReply,
    summary="Vectors of texts and images",
    description="In OpenAI's shape. Texts and images may be mixed; the order is kept.",
)
