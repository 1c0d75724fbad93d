"""`/v1/rerank`: documents by how well they fit a query; texts and pictures on either side."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.http.body import parse_json
from serving.http.embeddings import Tools, check_model, pixels_of, reply, vectors_of
from serving.http.inputs import Inputs, is_picture, read_inputs
from serving.http.responses import Refusal
from serving.http.schema import RerankRequest
from serving.interfaces import ModelSet, Picture


async def rerank(set: ModelSet, body: bytes, content_type: str, tools: Tools) -> bytes:
    """POST /v1/rerank."""
    request, description = parse_json(RerankRequest, body, content_type), set.description
    check_model(request.model, description)
    count, most = len(request.documents), tools.config.max_documents
    if count > most:
        raise Refusal(400, "too_many_documents", f"{count} documents, more than {most}", "documents")
    strings = [request.query, *request.documents]
    names = ["query", *(f"documents[{place}]" for place in range(count))]
    inputs = read_inputs(strings, names, "auto", description, tools.config)
    tools.metrics.inputs(len(inputs.texts), len(inputs.pictures))
    matching = description.matching and _crossing(inputs)
    with set.admit(len(inputs.texts), len(inputs.pictures)):
        if matching:
            scores, tokens = await _matched(inputs, set, tools), 0
        else:
            vectors, tokens = await vectors_of(inputs, set, tools)
            scores = (vectors[1:] @ vectors[0]).tolist()
    content = {"results": _results(request, scores), "score": "match_probability" if matching else "cosine"}
    return reply(set, content, tokens)


def _crossing(inputs: Inputs) -> bool:
    """Whether the query is of one modality and all documents of the other."""
    return inputs.text_places == [0] or inputs.picture_places == [0]


async def _matched(inputs: Inputs, set: ModelSet, tools: Tools) -> list[float]:
    pixels = await pixels_of(inputs.pictures, set, tools)
    pairs: Sequence[tuple[str, Picture]]
    if inputs.text_places == [0]:
        pairs = [(inputs.texts[0], picture) for picture in pixels]
    else:
        pairs = [(text, pixels[0]) for text in inputs.texts]
    return [score or 0.0 for score in await set.match(pairs)]


def _results(request: RerankRequest, scores: Sequence[float]) -> list[dict[str, Any]]:
    """The best `top_n`; equal scores keep the order of the request."""
    order = np.argsort(-np.asarray(scores), kind="stable")[: request.top_n]
    results: list[dict[str, Any]] = [{"index": int(row), "relevance_score": scores[row]} for row in order]
    if request.return_documents:
        for result in results:
            document = request.documents[result["index"]]
            result["document"] = {"image" if is_picture(document) else "text": document}
    return results
