"""`/v1/search`: nearest neighbours of a text, an image or a row of the index, re-ordered by the fusion encoder.

Axes: S image side, D width of the joint space.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.preprocess import clean_caption
from serving.config import HttpConfig
from serving.http.body import parse_fields, parse_json, parse_multipart
from serving.http.inputs import pixels_of, read_text
from serving.http.responses import ApiError
from serving.http.route import InferenceRoute, Tools, check_model, encode_reply
from serving.http.schema import SearchReply, SearchRequest
from serving.interfaces import Description, Hit, ImageOrUri, ModelVersion

RERANKED = 50
"""Hits that are re-ordered by the fusion encoder."""


@dataclass
class Query:
    """What is searched for: a caption, an image or a row; exactly one is given."""

    caption: str = ""
    """Clean."""
    image: bytes | str = ""
    """Encoded, or its URL."""
    id: str = ""
    """A row of the index."""
    pixels: np.ndarray | None = None
    """uint8 (S, S, 3) of the image, once it is decoded."""


async def search(model: ModelVersion, body: bytes, content_type: str, tools: Tools) -> bytes:
    """Answer POST /v1/search, as JSON or as multipart upload."""
    request, upload = _read(body, content_type)
    description = model.description
    check_model(request.model, description)
    _check(request, description, tools.config)
    query = _read_query(request, upload, description, tools.config)
    texts, images = int(query.caption != ""), int(bool(query.image))
    tools.metrics.inputs(texts, images)
    with model.admit(texts, images):
        vector = await _vector(query, request, model, tools)
        hits = await model.search(vector, request.target, RERANKED if request.rerank else request.top_k)
        if request.rerank:
            hits = await _reranked(query, hits, model)
    data = [_hit(index, hit) for index, hit in enumerate(hits[: request.top_k])]
    return encode_reply(model, {"object": "list", "data": data})


def _read(body: bytes, content_type: str) -> tuple[SearchRequest, bytes]:
    """The request, and the uploaded image (b"": none)."""
    if not content_type.lower().startswith("multipart/form-data"):
        return parse_json(SearchRequest, body, content_type), b""
    fields = parse_multipart(body, content_type)
    upload = fields.pop("image", None)
    try:
        texts = {name: value.decode() for name, value in fields.items()}
    except UnicodeDecodeError:
        raise ApiError(422, "malformed_multipart", "multipart body: a field that is not UTF-8") from None
    if upload is None:
        return parse_fields(SearchRequest, texts), b""
    if not upload:
        raise ApiError(400, "image_unreadable", "image: no bytes", "image")
    return parse_fields(SearchRequest, texts | {"image": ""}), upload


def _query_field(request: SearchRequest) -> str:
    """Which of `text`, `image` and `id` the request gives; the schema makes sure that it is one."""
    return next(name for name in ("text", "image", "id") if name in request.model_fields_set)


def _check(request: SearchRequest, description: Description, config: HttpConfig) -> None:
    """Raises ApiError where this version, or its settings, cannot answer the request."""
    if description.index is None:
        raise ApiError(404, "no_index", "this service has no index to search")
    if request.top_k > config.max_top_k:
        raise ApiError(400, "too_many_hits", f"top_k: at most {config.max_top_k}", "top_k")
    if not request.rerank:
        return
    if not description.matching:
        raise ApiError(400, "rerank_not_supported", "rerank: this model has no fusion encoder", "rerank")
    if request.top_k > RERANKED:
        raise ApiError(400, "too_many_hits", f"top_k: at most {RERANKED} with rerank", "top_k")
    if _query_field(request) in ("id", request.target):
        message = "rerank compares texts with images: search images by a text, or texts by an image"
        raise ApiError(400, "rerank_not_supported", message, "rerank")


def _read_query(request: SearchRequest, upload: bytes, description: Description, config: HttpConfig) -> Query:
    given = _query_field(request)
    if given == "text":
        return Query(caption=read_text(request.text, "text", description, config))
    if given == "image":
        if not upload and not request.image:
            raise ApiError(400, "bad_data_url", "image: nothing is sent", "image")
        return Query(image=upload or request.image)
    return Query(id=request.id)


async def _vector(query: Query, request: SearchRequest, model: ModelVersion, tools: Tools) -> np.ndarray:
    """Unit vector float32 (D,) of the query; decodes its image."""
    if query.caption:
        vectors, _ = await model.embed_texts([query.caption])
        return np.asarray(vectors[0])
    if query.image:
        pixels = await pixels_of([("image", query.image)], model, tools)
        query.pixels = pixels[0]  # kept for the fusion encoder
        return np.asarray((await model.embed_images(pixels))[0])
    vector = await model.vector_of(query.id, request.side)
    if vector is None:
        raise ApiError(404, "row_not_found", "id: the index has no such row", "id")
    return vector


async def _reranked(query: Query, hits: Sequence[Hit], model: ModelVersion) -> list[Hit]:
    """Hits by match probability, the highest first; those whose image cannot be read come last, with score 0."""
    pairs: list[tuple[str, ImageOrUri]]
    if query.pixels is None:
        pairs = [(query.caption, hit.uri) for hit in hits]
    else:
        pairs = [(clean_caption(hit.caption, model.description.max_words), query.pixels) for hit in hits]
    scores = await model.match(pairs)
    scored = list(zip(hits, scores, strict=True))
    matched = [replace(hit, score=score) for hit, score in scored if score is not None]
    lost = [replace(hit, score=0.0) for hit, score in scored if score is None]
    return sorted(matched, key=lambda hit: -hit.score) + lost


def _hit(index: int, hit: Hit) -> dict[str, Any]:
    thumbnail = "data:image/jpeg;base64," + base64.b64encode(hit.thumbnail).decode() if hit.thumbnail else None
    return {
        "object": "search_hit",
        "index": index,
        "id": hit.id,
        "score": hit.score,
        "caption": hit.caption,
        "thumbnail": thumbnail,
    }


SEARCH = InferenceRoute(
    path="/v1/search",
    name="search",
    handle=search,
    request=SearchRequest,
    reply=SearchReply,
    summary="Nearest rows of the index",
    description="By a text, an image (data URL, or a file in a multipart body), or the `id` of a row of the index.",
    upload={
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "image": {"type": "string", "format": "binary", "description": "An image file."},
            "text": {"type": "string"},
            "id": {"type": "string"},
            "model": {"type": "string"},
            "side": {"type": "string", "enum": ["image", "text"], "default": "image"},
            "target": {"type": "string", "enum": ["image", "text"], "default": "image"},
            "top_k": {"type": "integer", "minimum": 1, "default": 10},
            "rerank": {"type": "boolean", "default": False},
        },
        "oneOf": [{"required": ["image"]}, {"required": ["text"]}, {"required": ["id"]}],
    },
)
