"""`/v1/search`: nearest neighbours of a text, a picture or a row of the index, re-ordered by the fusion encoder.

Axes: S image side, D width of the joint space.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.preprocess import clean_caption
from serving.config import DoorConfig
from serving.http.body import parse_fields, parse_json, parse_multipart
from serving.http.embeddings import Tools, check_model, pixels_of, reply
from serving.http.inputs import read_text
from serving.http.responses import Refusal
from serving.http.schema import SearchRequest
from serving.interfaces import Description, Hit, ModelSet, Picture

RERANKED = 50
"""Hits that are re-ordered by the fusion encoder."""


@dataclass
class Query:
    """What is searched for: one of the three."""

    caption: str = ""
    """Clean."""
    picture: bytes | str = ""
    """Encoded, or its URL."""
    id: str = ""
    """A row of the index."""
    pixels: np.ndarray | None = None
    """uint8 (S, S, 3) of the picture, once it is decoded."""


async def search(set: ModelSet, body: bytes, content_type: str, tools: Tools) -> bytes:
    """POST /v1/search, as JSON or as multipart upload."""
    request, upload = _read(body, content_type)
    description = set.description
    check_model(request.model, description)
    _check(request, description, tools.config)
    query = _query(request, upload, description, tools.config)
    texts, images = int(query.caption != ""), int(bool(query.picture))
    tools.metrics.inputs(texts, images)
    with set.admit(texts, images):
        vector = await _vector(query, request, set, tools)
        hits = await set.search(vector, request.target, RERANKED if request.rerank else request.top_k)
        if request.rerank:
            hits = await _reranked(query, hits, set)
    data = [_hit(index, hit) for index, hit in enumerate(hits[: request.top_k])]
    return reply(set, {"object": "list", "data": data})


def _read(body: bytes, content_type: str) -> tuple[SearchRequest, bytes]:
    """The request, and the uploaded picture (b"": none)."""
    if not content_type.lower().startswith("multipart/form-data"):
        return parse_json(SearchRequest, body, content_type), b""
    fields = parse_multipart(body, content_type)
    upload = fields.pop("image", None)
    try:
        texts = {name: value.decode() for name, value in fields.items()}
    except UnicodeDecodeError:
        raise Refusal(422, "malformed_multipart", "multipart body: a field that is not UTF-8") from None
    if upload is None:
        return parse_fields(SearchRequest, texts), b""
    if not upload:
        raise Refusal(400, "image_unreadable", "image: no bytes", "image")
    return parse_fields(SearchRequest, texts | {"image": ""}), upload


def _asked(request: SearchRequest) -> str:
    """text, image or id."""
    return next(name for name in ("text", "image", "id") if name in request.model_fields_set)


def _check(request: SearchRequest, description: Description, config: DoorConfig) -> None:
    if description.index is None:
        raise Refusal(404, "no_index", "this service has no index to search")
    if request.top_k > config.max_top_k:
        raise Refusal(400, "too_many_hits", f"top_k: at most {config.max_top_k}", "top_k")
    if not request.rerank:
        return
    if not description.matching:
        raise Refusal(400, "rerank_not_supported", "rerank: this model has no fusion encoder", "rerank")
    if request.top_k > RERANKED:
        raise Refusal(400, "too_many_hits", f"top_k: at most {RERANKED} with rerank", "top_k")
    if _asked(request) in ("id", request.target):
        message = "rerank compares texts with pictures: search images by a text, or texts by a picture"
        raise Refusal(400, "rerank_not_supported", message, "rerank")


def _query(request: SearchRequest, upload: bytes, description: Description, config: DoorConfig) -> Query:
    asked = _asked(request)
    if asked == "text":
        return Query(caption=read_text(request.text, "text", description, config))
    if asked == "image":
        if not upload and not request.image:
            raise Refusal(400, "bad_data_url", "image: nothing is sent", "image")
        return Query(picture=upload or request.image)
    return Query(id=request.id)


async def _vector(query: Query, request: SearchRequest, set: ModelSet, tools: Tools) -> np.ndarray:
    """Unit vector float32 (D,) of the query; decodes its picture."""
    vectors: list[np.ndarray]
    if query.caption:
        vectors = list((await set.embed_texts([query.caption]))[0])
        return vectors[0]
    if query.picture:
        pixels = await pixels_of([("image", query.picture)], set, tools)
        query.pixels, vectors = pixels[0], list(await set.embed_images(pixels))
        return vectors[0]
    vector = await set.vector_of(query.id, request.side)
    if vector is None:
        raise Refusal(404, "row_not_found", "id: the index has no such row", "id")
    return vector


async def _reranked(query: Query, hits: Sequence[Hit], set: ModelSet) -> list[Hit]:
    """Hits by match probability, the highest first; those whose picture cannot be read come last, with score 0."""
    pairs: list[tuple[str, Picture]]
    if query.pixels is None:
        pairs = [(query.caption, hit.uri) for hit in hits]
    else:
        pairs = [(clean_caption(hit.caption, set.description.max_words), query.pixels) for hit in hits]
    scores = await set.match(pairs)
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
