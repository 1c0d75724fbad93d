"""`/v1/rerank`: documents ordered by how well they fit a query; both may be texts or images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.http.body import parse_json
from serving.http.inputs import Inputs, is_image, pixels_of, read_inputs, vectors_of
from serving.http.responses import ApiError
from serving.http.route import InferenceRoute, Tools, check_model, encode_reply
from serving.http.schema import RerankReply, RerankRequest
from serving.interfaces import ImageOrUri, ModelVersion


async def rerank(model: ModelVersion, body: bytes, content_type: str, tools: Tools) -> bytes:
    """Answer POST /v1/rerank."""
    request, description = parse_json(RerankRequest, body, content_type), model.description
    check_model(request.model, description)
    count, most = len(request.documents), tools.config.max_documents
    if count > most:
        raise ApiError(400, "too_many_documents", f"{count} documents, more than {most}", "documents")
    strings = [request.query, *request.documents]
    names = ["query", *(f"documents[{index}]" for index in range(count))]
    inputs = read_inputs(strings, names, "auto", description, tools.config)
    tools.metrics.inputs(len(inputs.texts), len(inputs.images))
    matching = description.matching and _is_cross_modal(inputs)
    with model.admit(len(inputs.texts), len(inputs.images)):
        if matching:
            scores, tokens = await _matched(inputs, model, tools), 0
        else:
            vectors, tokens = await vectors_of(inputs, model, tools)
            scores = (vectors[1:] @ vectors[0]).tolist()
    content = {"results": _results(request, scores), "score": "match_probability" if matching else "cosine"}
    return encode_reply(model, content, tokens)


def _is_cross_modal(inputs: Inputs) -> bool:
    """Whether the query is of one modality and all documents of the other."""
    return inputs.text_positions == [0] or inputs.image_positions == [0]


async def _matched(inputs: Inputs, model: ModelVersion, tools: Tools) -> list[float]:
    """Match probability of each document with the query, in order."""
    pixels = await pixels_of(inputs.images, model, tools)
    pairs: Sequence[tuple[str, ImageOrUri]]
    if inputs.text_positions == [0]:
        pairs = [(inputs.texts[0], image) for image in pixels]
    else:
        pairs = [(text, pixels[0]) for text in inputs.texts]
    return [score or 0.0 for score in await model.match(pairs)]


def _results(request: RerankRequest, scores: Sequence[float]) -> list[dict[str, Any]]:
    """The best `top_n`; equal scores keep the order of the request."""
    order = np.argsort(-np.asarray(scores), kind="stable")[: request.top_n]
    results: list[dict[str, Any]] = [{"index": int(row), "relevance_score": scores[row]} for row in order]
    if request.return_documents:
        for result in results:
            document = request.documents[result["index"]]
            result["document"] = {"image" if is_image(document) else "text": document}
    return results


RERANK = InferenceRoute(
    path="/v1/rerank",
    name="rerank",
    handle=rerank,
    request=RerankRequest,
    reply=RerankReply,
    summary="Documents by how well they fit a query",
    description="By the match probability of the fusion encoder, or by the cosine: `score` says which.",
)
