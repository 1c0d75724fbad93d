"""The HTTP app over a stand-in: contract 7, versions, keys, and what is around; without Ray and without a model."""

import asyncio
import base64
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from models.preprocess import clean_caption
from serving.config import HttpConfig
from serving.http.app import HttpApp
from serving.http.auth import Keys
from tests.support.stand_in import (
    BLUE,
    RED,
    Answer,
    StandInPool,
    StandInVersion,
    as_file,
    ask,
    data_url,
    drawing,
    image_vector,
    one,
    seen,
    text_vector,
)

KEY = "a-key-that-is-long-enough"


@pytest.fixture
def pool() -> StandInPool:
    return StandInPool(StandInVersion("2"), StandInVersion("3"))


@pytest.fixture
def app(pool: StandInPool) -> HttpApp:
    return HttpApp(pool)


def test_texts_and_images_mixed_keep_their_order(app: HttpApp) -> None:
    green = as_file(drawing("green", "triangle"), "PNG")
    inputs = ["A red circle!", data_url(BLUE), "two  Blue-squares", data_url(RED), data_url(green)]
    reply = one(app, "/v1/embeddings", {"input": inputs}).json
    expected = [
        text_vector("a red circle"),
        image_vector(seen(BLUE)),
        text_vector("two blue squares"),
        image_vector(seen(RED)),
        image_vector(seen(green)),
    ]
    assert reply["object"] == "list" and reply["model"] == "shapes" and reply["embedding_space"] == "space-of-shapes-3"
    assert [row["index"] for row in reply["data"]] == list(range(5))
    np.testing.assert_array_equal(np.array([row["embedding"] for row in reply["data"]], np.float32), expected)
    assert reply["usage"] == {"prompt_tokens": 4 + 4, "total_tokens": 4 + 4}


def test_base64_is_the_same_floats_little_endian(app: HttpApp) -> None:
    body = {"input": ["red", data_url(RED)]}
    floats = one(app, "/v1/embeddings", body).json["data"]
    packed = one(app, "/v1/embeddings", body | {"encoding_format": "base64"}).json["data"]
    for plain, other in zip(floats, packed, strict=True):
        assert np.frombuffer(base64.b64decode(other["embedding"]), "<f4").tolist() == pytest.approx(
            plain["embedding"], abs=1e-7
        )


def test_forty_images_each_get_their_own_vector(app: HttpApp) -> None:
    images = [as_file(Image.new("RGB", (9, 7), (5 * n, 200 - 5 * n, n))) for n in range(40)]
    rows = one(app, "/v1/embeddings", {"input": [data_url(one) for one in images]}).json["data"]
    expected = np.stack([image_vector(seen(image)) for image in images])
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], np.float32), expected)


def test_both_encoders_are_called_at_once() -> None:
    class Meeting(StandInVersion):
        """Each encoder answers once the other one is asked too."""

        def __init__(self) -> None:
            super().__init__()
            self.asked = {"text": asyncio.Event(), "image": asyncio.Event()}

        async def embed_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
            self.asked["text"].set()
            await self.asked["image"].wait()
            return await super().embed_texts(texts)

        async def embed_images(self, pixels: np.ndarray) -> np.ndarray:
            self.asked["image"].set()
            await self.asked["text"].wait()
            return await super().embed_images(pixels)

    app = HttpApp(StandInPool(Meeting()), HttpConfig(deadline=5))
    assert one(app, "/v1/embeddings", {"input": ["red", data_url(RED)]}).status == 200


def test_modality_decides_what_a_string_is(app: HttpApp) -> None:
    def first(**body: Any) -> np.ndarray:
        return np.array(one(app, "/v1/embeddings", body).json["data"][0]["embedding"], np.float32)

    url = "data:image/png, is how a data URL begins"
    np.testing.assert_array_equal(first(input=url, modality="text"), text_vector(clean_caption(url)))
    mislabelled = data_url(RED).replace("data:image/png", "data:application/pdf")
    np.testing.assert_array_equal(first(input=mislabelled, modality="image"), image_vector(seen(RED)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a red circle", text_vector("a red circle")),
        (
            [{"type": "text", "text": "a red"}, {"type": "text", "text": "circle"}],
            text_vector(clean_caption("a red\ncircle")),
        ),
        ([{"type": "image_url", "image_url": {"url": data_url(RED)}}], image_vector(seen(RED))),
        (
            [{"type": "image_url", "image_url": {"url": data_url(RED)}}, {"type": "text", "text": ""}],
            image_vector(seen(RED)),
        ),
    ],
)
def test_messages_are_one_input(app: HttpApp, content: Any, expected: np.ndarray) -> None:
    reply = one(app, "/v1/embeddings", {"messages": [{"role": "user", "content": content}]}).json
    np.testing.assert_array_equal(np.array([row["embedding"] for row in reply["data"]], np.float32), [expected])


def test_an_image_is_seen_as_evaluation_sees_it(app: HttpApp) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((np.arange(900, dtype=np.uint16) * 70).reshape(30, 30))
    frames = [drawing("red", "square"), drawing("blue", "square")]
    images = [
        as_file(Image.fromarray(noise), "JPEG", exif=exif),
        as_file(Image.fromarray(noise).convert("CMYK"), "JPEG"),
        as_file(deep, "PNG"),
        as_file(Image.fromarray(noise).convert("RGBA"), "WEBP", lossless=True),
        as_file(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    ]
    rows = one(app, "/v1/embeddings", {"input": [data_url(one) for one in images]}).json["data"]
    expected = np.stack([image_vector(seen(image)) for image in images])
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], np.float32), expected)
    assert expected[4] @ image_vector(seen(as_file(frames[0], "GIF"))) > 0.999  # the first frame


LONG = "word " * 2000
IMAGE_PART = {"type": "image_url", "image_url": {"url": data_url(RED)}}


def said(*contents: Any) -> dict[str, Any]:
    """Messages of these contents."""
    return {"messages": [{"role": "user", "content": content} for content in contents]}


REFUSED: list[tuple[str, Any, int, str, str | None]] = [
    ("/v1/embeddings", b"{", 422, "json_invalid", None),
    ("/v1/embeddings", b"", 422, "json_invalid", None),
    ("/v1/embeddings", b'"text"', 422, "model_type", None),
    ("/v1/embeddings", b'{"input": "\\ud800"}', 422, "json_invalid", None),
    ("/v1/embeddings", {}, 422, "one_of", None),
    ("/v1/embeddings", {"input": "a", "messages": [{"role": "user", "content": "a"}]}, 422, "one_of", None),
    ("/v1/embeddings", {"input": []}, 422, "too_short", "input"),
    ("/v1/embeddings", {"input": ["a", None]}, 422, "string_type", "input[1]"),
    ("/v1/embeddings", {"input": "a", "modality": "sound"}, 422, "literal_error", "modality"),
    ("/v1/embeddings", {"input": "a", "colour": 1}, 422, "extra_forbidden", "colour"),
    ("/v1/embeddings", said([{"type": "text"}]), 422, "missing", "messages[0].content[0].text"),
    ("/v1/embeddings", {"input": [15496, 995]}, 400, "token_ids", "input"),
    ("/v1/embeddings", {"input": [[15496], [995]]}, 400, "token_ids", "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 8}, 400, "dimensions_not_supported", "dimensions"),
    ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "model_not_found", "model"),
    ("/v1/embeddings", {"input": ["a", "b", "", "c"]}, 400, "empty_text", "input[2]"),
    ("/v1/embeddings", {"input": ["a", "?!\n \u2003"]}, 400, "empty_text", "input[1]"),
    ("/v1/embeddings", {"input": LONG}, 400, "text_too_long", "input"),
    ("/v1/embeddings", {"input": ["a"] * 257}, 400, "too_many_inputs", "input"),
    ("/v1/embeddings", {"input": [data_url(RED)] * 65}, 400, "too_many_images", "input"),
    ("/v1/embeddings", {"input": ["a", data_url(b"no image")]}, 400, "image_unreadable", "input[1]"),
    ("/v1/embeddings", {"input": data_url(RED[:-30])}, 400, "image_unreadable", "input"),
    ("/v1/embeddings", {"input": "data:image/png;base64,###"}, 400, "bad_base64", "input"),
    ("/v1/embeddings", {"input": "data:image/png,abc"}, 400, "bad_data_url", "input"),
    ("/v1/embeddings", {"input": "abc", "modality": "image"}, 400, "bad_data_url", "input"),
    ("/v1/embeddings", {"input": "https://a.example/b.jpg", "modality": "image"}, 400, "url_not_allowed", "input"),
    ("/v1/embeddings", said([IMAGE_PART, IMAGE_PART]), 400, "mixed_input", "messages"),
    ("/v1/embeddings", said("a", [IMAGE_PART]), 400, "mixed_input", "messages"),
    ("/v1/embeddings", said("a") | {"modality": "image"}, 400, "no_image", "messages"),
    ("/v1/search", {"text": "a", "image": data_url(RED)}, 422, "one_of", None),
    ("/v1/search", {"top_k": 3}, 422, "one_of", None),
    ("/v1/search", {"text": "a", "top_k": 0}, 422, "greater_than_equal", "top_k"),
    ("/v1/search", b'{"text": "a", "top_k": NaN}', 422, "finite_number", "top_k"),
    ("/v1/search", {"text": "a", "top_k": 201}, 400, "too_many_hits", "top_k"),
    ("/v1/search", {"text": "a", "top_k": 51, "rerank": True}, 400, "too_many_hits", "top_k"),
    ("/v1/search", {"text": "a", "target": "text", "rerank": True}, 400, "rerank_not_supported", "rerank"),
    ("/v1/search", {"image": data_url(RED), "rerank": True}, 400, "rerank_not_supported", "rerank"),
    ("/v1/search", {"id": "red-circle", "rerank": True}, 400, "rerank_not_supported", "rerank"),
    ("/v1/search", {"id": "white-circle"}, 404, "row_not_found", "id"),
    ("/v1/search", {"id": ""}, 404, "row_not_found", "id"),
    ("/v1/search", {"image": ""}, 400, "bad_data_url", "image"),
    ("/v1/search", {"text": " "}, 400, "empty_text", "text"),
    ("/v1/rerank", {"query": "a", "documents": []}, 422, "too_short", "documents"),
    ("/v1/rerank", {"query": "a", "documents": ["a"] * 101}, 400, "too_many_documents", "documents"),
    ("/v1/rerank", {"query": "a", "documents": ["a", "."]}, 400, "empty_text", "documents[1]"),
    ("/v1/rerank", {"query": ".", "documents": ["a"]}, 400, "empty_text", "query"),
    ("/v1/nothing", {}, 404, "not_found", None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "content", "status", "code", "param"), REFUSED)
def test_what_cannot_be_answered_is_refused_in_openai_form(
    app: HttpApp, path: str, content: Any, status: int, code: str, param: str | None
) -> None:
    reply = one(app, path, content)
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert (reply.status, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert reply.headers["x-triptych-model"] == "shapes/3" and reply.headers["x-triptych-space"] == "space-of-shapes-3"
    assert int(reply.headers["content-length"]) == len(reply.body)


def test_pixels_are_counted_before_they_are_decoded() -> None:
    app = HttpApp(StandInPool(), HttpConfig(max_pixels=1000))
    reply = one(app, "/v1/embeddings", {"input": data_url(as_file(Image.new("RGB", (40, 26)), "PNG"))})
    assert (reply.status, reply.json["error"]["code"]) == (400, "image_too_large")
    assert one(app, "/v1/embeddings", {"input": data_url(as_file(Image.new("RGB", (40, 25)), "PNG"))}).status == 200


def test_an_image_of_too_many_bytes_is_413() -> None:
    limit = len(RED) / 2**20
    assert (
        one(HttpApp(StandInPool(), HttpConfig(max_image_mib=limit)), "/v1/embeddings", {"input": data_url(RED)}).status
        == 200
    )
    reply = one(
        HttpApp(StandInPool(), HttpConfig(max_image_mib=limit * 0.99)), "/v1/embeddings", {"input": data_url(RED)}
    )
    assert (reply.status, reply.json["error"]["code"]) == (413, "image_too_large")


def test_other_content_types_are_415(app: HttpApp) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert one(app, "/v1/embeddings", {"input": "a"}, headers={"content-type": kind}).status == 415
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json", ""):
        assert one(app, "/v1/embeddings", {"input": "a"}, headers={"content-type": kind}).status == 200


def test_a_request_may_ask_for_a_loaded_version(app: HttpApp, pool: StandInPool) -> None:
    reply = one(app, "/v1/embeddings", {"input": "red"}, headers={"x-triptych-version": "shapes/2"})
    assert (reply.headers["x-triptych-model"], reply.json["embedding_space"]) == ("shapes/2", "space-of-shapes-2")
    missing = one(app, "/v1/embeddings", {"input": "red"}, headers={"x-triptych-version": "shapes/9"})
    assert (missing.status, missing.json["error"]["code"]) == (404, "version_not_found")
    assert pool.used == ["shapes/2"]


def test_a_reply_names_the_version_that_made_it_whatever_is_current_by_then(app: HttpApp, pool: StandInPool) -> None:
    async def switched() -> Answer:
        pool.model.delay = 0.05
        under_way = asyncio.ensure_future(ask(app, "/v1/embeddings", {"input": "red"}))
        await asyncio.sleep(0.01)
        pool.current = "shapes/2"
        return await under_way

    reply = asyncio.run(switched())
    assert (reply.headers["x-triptych-model"], reply.json["embedding_space"]) == ("shapes/3", "space-of-shapes-3")
    assert one(app, "/v1/embeddings", {"input": "red"}).headers["x-triptych-model"] == "shapes/2"


def test_before_a_model_is_loaded_everything_but_health_is_503(app: HttpApp, pool: StandInPool) -> None:
    pool.current = None
    reply = one(app, "/v1/embeddings", {"input": "red"})
    assert (reply.status, reply.json["error"]["code"]) == (503, "not_ready") and int(reply.headers["retry-after"]) > 0
    assert one(app, "/ready", method="GET").status == 503
    assert one(app, "/health", method="GET").json == {"status": "not_ready", "model": None, "alarm": ""}
    assert "x-triptych-model" not in reply.headers


def test_models_tell_what_is_loaded(app: HttpApp, pool: StandInPool) -> None:
    pool.alarm = "version 4 answers its health vectors wrongly"
    listed = one(app, "/v1/models", method="GET").json
    assert listed["alarm"] == pool.alarm and [entry["id"] for entry in listed["data"]] == ["shapes"]
    assert [(entry["label"], entry["current"]) for entry in listed["data"][0]["versions"]] == [
        ("shapes/2", False),
        ("shapes/3", True),
    ]
    assert one(app, "/v1/models/shapes", method="GET").json == listed["data"][0]
    assert one(app, "/v1/models/other", method="GET").json["error"]["code"] == "model_not_found"


def test_with_keys_only_the_page_health_and_the_document_are_open(pool: StandInPool) -> None:
    app = HttpApp(pool, keys=Keys({"shop": KEY}))
    for path, body, method in (
        ("/v1/embeddings", {"input": "red"}, "POST"),
        ("/v1/search", {"text": "red"}, "POST"),
        ("/v1/rerank", {"query": "red", "documents": ["red"]}, "POST"),
        ("/v1/models", b"", "GET"),
        ("/v1/models/shapes", b"", "GET"),
        ("/metrics", b"", "GET"),
    ):
        for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY}, {"authorization": "Bearer "}):
            refused = one(app, path, body, headers=headers, method=method)
            assert (refused.status, refused.json["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer" and "x-triptych-model" in refused.headers
        assert one(app, path, body, headers={"authorization": f"Bearer {KEY}"}, method=method).status == 200
    for path in ("/", "/docs", "/health", "/ready", "/openapi.json"):
        assert one(app, path, method="GET").status == 200


def test_a_service_without_keys_answers_under_its_own_names_only(pool: StandInPool) -> None:
    app = HttpApp(pool, hosts=frozenset(("localhost", "[::1]")))
    for host in ("localhost", "localhost:8000", "LOCALHOST:1", "[::1]", "[::1]:8000"):
        assert one(app, "/v1/embeddings", {"input": "red"}, headers={"host": host}).status == 200
    for host in ("rebound.example", "rebound.example:8000", "localhost.example", ""):
        refused = one(app, "/v1/embeddings", {"input": "red"}, headers={"host": host})
        assert (refused.status, refused.json["error"]["code"]) == (401, "host_not_allowed")
        assert one(app, "/v1/models", method="GET", headers={"host": host}).status == 401


async def never() -> dict[str, Any]:
    raise AssertionError("the body was read")


def test_a_request_without_a_key_is_refused_before_its_body_is_read(pool: StandInPool) -> None:
    assert one(HttpApp(pool, keys=Keys({"shop": KEY})), "/v1/embeddings", receive=never).status == 401


def test_the_log_names_a_key_by_its_label_alone(pool: StandInPool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serving.http.app")
    app = HttpApp(pool, keys=Keys({"shop": KEY}))
    one(app, "/v1/embeddings", {"input": "red"}, headers={"authorization": f"Bearer {KEY}"})
    assert "key shop" in caplog.text and KEY not in caplog.text


def test_request_ids_are_taken_over_or_made(app: HttpApp) -> None:
    for path, method in (("/v1/embeddings", "POST"), ("/health", "GET"), ("/", "GET"), ("/nothing", "GET")):
        assert one(app, path, {}, headers={"x-request-id": "abc-1"}, method=method).headers["x-request-id"] == "abc-1"
        made = {
            one(app, path, {}, headers={"x-request-id": "a b\n"}, method=method).headers["x-request-id"] for _ in "12"
        }
        assert len(made) == 2 and all(len(name) == 32 for name in made)


def test_the_page_may_load_nothing_from_elsewhere(app: HttpApp) -> None:
    for path in ("/", "/docs"):
        reply = one(app, path, method="GET")
        assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
        rules = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
        assert rules["default-src"] == "'self'" and rules["img-src"] == "'self' data: blob:"
        assert reply.headers["x-content-type-options"] == "nosniff"
        head = one(app, path, method="HEAD")
        assert head.body == b"" and head.headers["content-length"] == str(len(reply.body))
    for path in ("/../app.py", "/%2e%2e/app.py", "/page.css/..", "//etc/passwd"):
        assert one(app, path, method="GET").status == 404


def test_the_app_works_below_a_prefix(app: HttpApp) -> None:
    client = TestClient(Starlette(routes=[Mount("/inner", app)]))
    assert client.post("/inner/v1/embeddings", json={"input": "red"}).status_code == 200
    assert client.get("/inner/health").status_code == 200
    assert client.get("/inner/v1/embeddings").json()["error"]["code"] == "method_not_allowed"


def test_metrics_count_what_happened(app: HttpApp, pool: StandInPool) -> None:
    one(app, "/v1/embeddings", {"input": ["red", data_url(RED), "blue"]})
    one(app, "/v1/embeddings", {"input": ""})
    pool.model.capacity = 0
    one(app, "/v1/search", {"text": "red"})
    lines = one(app, "/metrics", method="GET").body.decode().splitlines()
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
    assert values['te_request_count_total{method="embeddings"}'] == 2
    assert values['te_request_success_total{method="embeddings"}'] == 1
    assert values['te_request_failure_total{err="empty_text"}'] == 1
    assert values['te_request_rejected_total{reason="inputs"}'] == 1
    assert values['te_request_inputs_total{kind="text"}'] == 3 and values['te_request_inputs_total{kind="image"}'] == 1
    assert values['te_request_duration_count{method="embeddings"}'] == 2 and values["te_request_held"] == 0
    assert values["te_request_decode_duration_count"] == 1


def test_two_processes_count_together(tmp_path: Path) -> None:
    program = (
        "import sys; from serving.http.metrics import Metrics; m = Metrics(); m.started('search'); m.queue('text', 4); "
        "m.batch('text', 8, 0.5, 0.1); m.alarm(sys.argv[1] == '2'); print(m.render()[0].decode())"
    )
    folder = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for number in "12":
        command = [sys.executable, "-c", program, number]
        text = subprocess.run(command, env=folder, capture_output=True, text=True, check=True).stdout
    assert 'te_request_count_total{method="search"} 2.0' in text
    assert 'te_queue_size{kind="text"} 8.0' in text and "te_version_alarm 1.0" in text
    assert 'te_batch_next_size_sum{kind="text"} 16.0' in text
