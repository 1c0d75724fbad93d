"""Search and re-rank over a stand-in's index: against the definition, as JSON and as uploads."""

import base64
from typing import Any

import pytest

from models.preprocess import clean_caption
from serving.http.app import HttpApp
from tests.support.stand_in import (
    BLUE,
    RED,
    StandInPool,
    StandInVersion,
    data_url,
    image_vector,
    make_corpus,
    match_probability,
    one,
    seen,
    text_vector,
)


@pytest.fixture
def pool() -> StandInPool:
    return StandInPool(StandInVersion("2"), StandInVersion("3"))


@pytest.fixture
def app(pool: StandInPool) -> HttpApp:
    return HttpApp(pool)


@pytest.mark.parametrize("target", ["image", "text"])
@pytest.mark.parametrize("query", ["text", "image", "id"])
def test_hits_are_the_nearest_rows(app: HttpApp, query: str, target: Any) -> None:
    corpus = make_corpus()
    body, vector = {
        "text": ({"text": "A green square"}, text_vector("a green square")),
        "image": ({"image": data_url(BLUE)}, image_vector(seen(BLUE))),
        "id": ({"id": "red-square", "side": "text"}, corpus.vectors["text"][1]),
    }[query]
    reply = one(app, "/v1/search", body | {"target": target, "top_k": 7}).json
    cosines = [float(vector @ row) for row in corpus.vectors[target]]
    order = sorted(range(len(cosines)), key=lambda row: -cosines[row])[:7]
    assert [hit["id"] for hit in reply["data"]] == [corpus.hits[row].id for row in order]
    assert [hit["score"] for hit in reply["data"]] == pytest.approx([cosines[row] for row in order], abs=1e-6)
    assert [hit["index"] for hit in reply["data"]] == list(range(7))
    assert reply["model"] == "shapes" and reply["embedding_space"] == "space-of-shapes-3" and reply["object"] == "list"


def test_a_hit_carries_its_thumbnail_or_none(app: HttpApp) -> None:
    corpus = make_corpus()
    reply = one(app, "/v1/search", {"text": "red", "top_k": 18}).json["data"]
    assert {tuple(hit) for hit in reply} == {("object", "index", "id", "score", "caption", "thumbnail")}
    for hit in reply:
        row = next(row for row in corpus.hits if row.id == hit["id"])
        assert hit["object"] == "search_hit" and hit["caption"] == row.caption
        start = "data:image/jpeg;base64,"
        sent = base64.b64decode(hit["thumbnail"].removeprefix(start)) if hit["thumbnail"] else b""
        assert sent == row.thumbnail and (hit["thumbnail"] is None or hit["thumbnail"].startswith(start))


def test_rerank_of_a_search_orders_by_match_probability(app: HttpApp) -> None:
    corpus = make_corpus()
    scores = {
        hit.id: match_probability("a blue square", corpus.pixels[hit.uri])
        for hit in corpus.hits
        if hit.uri in corpus.pixels
    }
    best = sorted(scores, key=lambda name: -scores[name])
    hits = one(app, "/v1/search", {"text": "a blue square", "rerank": True, "top_k": 18}).json["data"]
    assert [hit["id"] for hit in hits] == [*best, corpus.hits[-1].id]
    assert [hit["score"] for hit in hits] == pytest.approx([scores[name] for name in best] + [0.0])
    top = one(app, "/v1/search", {"text": "a blue square", "rerank": True, "top_k": 2}).json["data"]
    assert top == hits[:2]


def test_texts_are_reranked_by_an_image(app: HttpApp) -> None:
    corpus = make_corpus()
    scores = {hit.id: match_probability(clean_caption(hit.caption), seen(BLUE)) for hit in corpus.hits}
    body = {"image": data_url(BLUE), "target": "text", "rerank": True, "top_k": 5}
    hits = one(app, "/v1/search", body).json["data"]
    assert [hit["id"] for hit in hits] == sorted(scores, key=lambda name: -scores[name])[:5]


def test_without_fusion_encoder_or_index_search_says_so() -> None:
    bare = HttpApp(StandInPool(StandInVersion(matching=False, index=False)))
    reply = one(bare, "/v1/search", {"text": "red"})
    assert (reply.status, reply.json["error"]["code"]) == (404, "no_index")
    reply = one(HttpApp(StandInPool(StandInVersion(matching=False))), "/v1/search", {"text": "red", "rerank": True})
    assert (reply.status, reply.json["error"]["code"]) == (400, "rerank_not_supported")


def test_documents_of_the_other_modality_are_matched(app: HttpApp) -> None:
    documents = [data_url(BLUE), data_url(RED)]
    reply = one(app, "/v1/rerank", {"query": "A red circle.", "documents": documents, "return_documents": True}).json
    scores = [match_probability("a red circle", seen(BLUE)), match_probability("a red circle", seen(RED))]
    assert reply["score"] == "match_probability"
    assert [result["index"] for result in reply["results"]] == [1, 0]
    assert [result["relevance_score"] for result in reply["results"]] == pytest.approx([scores[1], scores[0]])
    assert [result["document"] for result in reply["results"]] == [{"image": documents[1]}, {"image": documents[0]}]
    turned = one(app, "/v1/rerank", {"query": data_url(RED), "documents": ["blue", "red"], "top_n": 1}).json
    assert turned["score"] == "match_probability" and [result["index"] for result in turned["results"]] == [1]


@pytest.mark.parametrize("matching", [True, False])
def test_documents_of_mixed_modality_are_compared_by_cosine(matching: bool) -> None:
    app = HttpApp(StandInPool(StandInVersion(matching=matching)))
    reply = one(app, "/v1/rerank", {"query": "red", "documents": ["blue circle", data_url(RED), "red"]}).json
    vectors = [text_vector("blue circle"), image_vector(seen(RED)), text_vector("red")]
    cosines = [float(text_vector("red") @ vector) for vector in vectors]
    assert reply["score"] == "cosine"
    assert [result["index"] for result in reply["results"]] == sorted(range(3), key=lambda row: -cosines[row])
    assert [r["relevance_score"] for r in reply["results"]] == pytest.approx(sorted(cosines, reverse=True), abs=1e-6)


def multipart(*parts: tuple[str, bytes], end: bytes = b"--frontier--\r\n") -> tuple[bytes, dict[str, str]]:
    """A multipart body and its headers."""
    head = (
        b'--frontier\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    body = b"".join(head % name.encode() + value + b"\r\n" for name, value in parts)
    return body + end, {"content-type": "multipart/form-data; boundary=frontier"}


def test_an_uploaded_file_finds_what_its_data_url_finds(app: HttpApp) -> None:
    body, headers = multipart(("image", BLUE), ("target", b"text"), ("top_k", b"4"), ("rerank", b"true"))
    expected = one(app, "/v1/search", {"image": data_url(BLUE), "target": "text", "top_k": 4, "rerank": True})
    assert expected.status == 200 and one(app, "/v1/search", body, headers=headers).json == expected.json
    body, headers = multipart(("text", "grün red".encode()))
    assert one(app, "/v1/search", body, headers=headers).json == one(app, "/v1/search", {"text": "grün red"}).json


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (*multipart(("image", BLUE), end=b""), 422),
        (*multipart(("image", BLUE), end=b"--frontier\r\n"), 422),
        (*multipart(("image", BLUE), ("image", RED)), 422),
        (*multipart(("image", BLUE), ("text", b"red")), 422),
        (*multipart(("text", b"\xff")), 422),
        (*multipart(("colour", b"red")), 422),
        (*multipart(("image", b"")), 400),
        (*multipart(("image", b"no image")), 400),
        (*multipart(*((f"n{n}", b"") for n in range(40))), 422),
        (b"", {"content-type": "multipart/form-data; boundary=frontier"}, 422),
        (b"--frontier--", {"content-type": "multipart/form-data"}, 422),
        (b"--frontier--", {"content-type": 'multipart/form-data; boundary="'}, 422),
        (b"--frontier\r\n\r\n\r\n--frontier--", {"content-type": "multipart/form-data; boundary=frontier"}, 422),
    ],
)
def test_a_broken_upload_is_refused(app: HttpApp, body: bytes, headers: dict[str, str], status: int) -> None:
    assert one(app, "/v1/search", body, headers=headers).status == status
