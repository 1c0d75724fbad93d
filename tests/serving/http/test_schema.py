"""The interface's document, and how bodies are read: JSON, forms, chunks."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from serving.config import HttpConfig
from serving.http.app import HttpApp
from serving.http.auth import Keys
from serving.http.body import MemoryBudget, parse_json, parse_multipart, read_body
from serving.http.responses import ApiError
from serving.http.schema import EmbeddingRequest, SearchRequest
from serving.interfaces import Overloaded
from tests.support.stand_in import StandInPool, StandInVersion, arriving, ask

HOT = ("/v1/embeddings", "/v1/search", "/v1/rerank")
REQUESTS = {"/v1/embeddings": "EmbeddingRequest", "/v1/search": "SearchRequest", "/v1/rerank": "RerankRequest"}
REPLIES = {"/v1/embeddings": "EmbeddingReply", "/v1/search": "SearchReply", "/v1/rerank": "RerankReply"}


def read_document(app: HttpApp) -> Any:
    return asyncio.run(ask(app, "/openapi.json", method="GET")).json


@pytest.fixture(scope="module")
def app() -> HttpApp:
    return HttpApp(StandInPool(StandInVersion("3")))


@pytest.fixture(scope="module")
def document(app: HttpApp) -> Any:
    return read_document(app)


def validator(document: Any, name: str) -> Draft202012Validator:
    """Of one of the document's schemas."""
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})


@pytest.mark.parametrize("path", HOT)
def test_every_example_is_valid_and_answered_as_documented(app: HttpApp, document: Any, path: str) -> None:
    examples = document["components"]["schemas"][REQUESTS[path]]["examples"]
    assert len(examples) >= 2
    for example in examples:
        validator(document, REQUESTS[path]).validate(example)
        reply = asyncio.run(ask(app, path, example))
        assert reply.status == 200
        validator(document, REPLIES[path]).validate(reply.json)


@pytest.mark.parametrize("path", HOT)
def test_a_hot_path_documents_its_reply_and_every_error(document: Any, path: str) -> None:
    operation = document["paths"][path]["post"]
    statuses = {"200", "400", "401", "404", "408", "413", "415", "422", "429", "500", "503", "504"}
    assert set(operation["responses"]) == statuses
    for status, reply in operation["responses"].items():
        content = reply["content"]["application/json"]
        name = REPLIES[path] if status == "200" else "ErrorReply"
        assert content["schema"] == {"$ref": f"#/components/schemas/{name}"}
        assert {"x-triptych-model", "x-triptych-space", "x-request-id"} <= set(reply["headers"])
        if status != "200":
            validator(document, "ErrorReply").validate(content["example"])
    assert "retry-after" in operation["responses"]["429"]["headers"]
    assert "x-triptych-version" in [parameter["name"] for parameter in operation["parameters"]]


def test_every_field_of_a_request_says_what_it_is_or_is_plain(document: Any) -> None:
    schemas = document["components"]["schemas"]
    plain = {"query", "documents", "type", "text", "image_url", "content"}
    for name in REQUESTS.values():
        for field, schema in schemas[name]["properties"].items():
            assert field in plain or schema.get("description"), (name, field)


def test_the_document_carries_the_limits_and_the_key() -> None:
    config = HttpConfig(max_top_k=7, max_documents=8, max_inputs=9)
    document = read_document(HttpApp(StandInPool(), config, Keys({"shop": "a-key-that-is-long-enough"})))
    schemas = document["components"]["schemas"]
    assert schemas["SearchRequest"]["properties"]["top_k"]["maximum"] == 7
    assert schemas["RerankRequest"]["properties"]["documents"]["maxItems"] == 8
    assert [form.get("maxItems") for form in schemas["EmbeddingRequest"]["properties"]["input"]["anyOf"]] == [None, 9]
    keyed = {path for path, operations in document["paths"].items() for one in operations.values() if "security" in one}
    assert keyed == {*HOT, "/v1/models", "/v1/models/{id}", "/metrics"}


def test_without_keys_the_document_asks_for_none(document: Any) -> None:
    assert "securitySchemes" not in document["components"] and '"security"' not in json.dumps(document)


def test_requests_are_frozen_and_know_their_defaults() -> None:
    request = SearchRequest(text="red")
    assert (request.target, request.top_k, request.rerank, request.side) == ("image", 10, False, "image")
    with pytest.raises(ValueError, match="frozen"):
        request.top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({"messages": [{"role": "u", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "u", "content": [{"type": "sound"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "u", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "u", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": "a", "k" * 1000: 1}, "k" * 64),
    ],
)  # fmt: skip
def test_complaints_name_the_place_in_the_request(content: Any, param: str) -> None:
    with pytest.raises(ApiError) as raised:
        parse_json(EmbeddingRequest, json.dumps(content).encode(), "application/json")
    assert (raised.value.status, raised.value.param) == (422, param)
    assert raised.value.message.startswith(param)


def test_very_many_unknown_keys_are_not_told_one_by_one() -> None:
    body = json.dumps({f"k{number}": 0 for number in range(5000)}).encode()
    with pytest.raises(ApiError) as raised:
        parse_json(EmbeddingRequest, body, "")
    assert (raised.value.status, raised.value.code) == (422, "schema_mismatch") and len(raised.value.message) < 100


def read(body: list[bytes], limit: int, declared: bytes | None = None) -> bytes:
    with MemoryBudget(2 * limit).reserve() as reservation:
        return asyncio.run(read_body(arriving(*body), declared, limit, 5, reservation))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=8), st.integers(0, 100))
def test_a_body_is_its_chunks_joined_or_refused(chunks: list[bytes], limit: int) -> None:
    whole = b"".join(chunks)
    if len(whole) <= limit:
        assert read(chunks, limit) == whole
    else:
        with pytest.raises(ApiError) as raised:
            read(chunks, limit)
        assert raised.value.status == 413


def test_memory_is_given_back_and_a_request_alone_is_always_admitted() -> None:
    budget = MemoryBudget(10)
    with budget.reserve() as first:
        first.grow(100)
        first.grow(50)
        assert budget.used == 100
        with budget.reserve() as second, pytest.raises(Overloaded):
            second.grow(1)
        assert budget.used == 100
    assert budget.used == 0
    with pytest.raises(RuntimeError), budget.reserve() as third:
        third.grow(5)
        raise RuntimeError
    assert budget.used == 0


NAMES = st.text("abcdefgh_", min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, st.binary(max_size=60), min_size=1, max_size=5), st.binary(max_size=20))
def test_a_form_is_read_as_it_was_written(fields: dict[str, bytes], preamble: bytes) -> None:
    parts = [b'Content-Disposition: form-data; name="%s"\r\n\r\n%s' % (n.encode(), v) for n, v in fields.items()]
    body = preamble + b"".join(b"\r\n--edge-of-a-form\r\n" + part for part in parts) + b"\r\n--edge-of-a-form--\r\n"
    assert parse_multipart(body, 'multipart/form-data; boundary="edge-of-a-form"') == fields


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.text(max_size=60))
def test_any_bytes_are_a_form_or_refused(body: bytes, boundary: str) -> None:
    for content in (body, b"--a\r\n" + body + b"\r\n--a--"):
        for kind in (f"multipart/form-data; boundary={boundary}", "multipart/form-data; boundary=a"):
            try:
                fields = parse_multipart(content, kind)
            except ApiError as error:
                assert error.status == 422
            else:
                assert all(isinstance(name, str) and isinstance(value, bytes) for name, value in fields.items())
