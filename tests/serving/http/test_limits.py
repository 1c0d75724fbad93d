"""Overload, deadlines, failing replicas, clients that hang up; then a real listener and the openai client."""

import asyncio
import re
import socket
import time
from typing import Any

import numpy as np
import openai
import pytest

from serving.config import HttpConfig
from serving.http.app import HttpApp
from serving.http.auth import Keys
from serving.interfaces import Overloaded, ReplicaUnavailable
from tests.support.stand_in import (
    COLOURS,
    DIMENSIONS,
    RED,
    Answer,
    StandInPool,
    StandInVersion,
    arriving,
    ask,
    data_url,
    image_vector,
    listening,
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


async def never() -> dict[str, Any]:
    raise AssertionError("the body was read")


def test_a_full_gateway_answers_429_before_the_body_is_read(pool: StandInPool) -> None:
    app = HttpApp(pool, HttpConfig(max_requests=2))
    pool.model.delay = 0.2

    async def crowd() -> tuple[Answer, float, list[Answer]]:
        inside = [asyncio.ensure_future(ask(app, "/v1/embeddings", {"input": "red"})) for _ in range(2)]
        await asyncio.sleep(0.02)
        start = time.perf_counter()
        turned_away = await ask(app, "/v1/search", receive=never)
        return turned_away, time.perf_counter() - start, await asyncio.gather(*inside)

    reply, seconds, others = asyncio.run(crowd())
    assert (reply.status, reply.json["error"]["code"], reply.headers["retry-after"]) == (429, "overloaded", "1")
    assert reply.json["error"]["type"] == "rate_limit_error" and reply.headers["x-triptych-model"] == "shapes/3"
    assert seconds < 0.05 and [other.status for other in others] == [200, 200] and app.in_progress == 0


def test_inputs_without_a_place_are_429_and_never_decoded(app: HttpApp, pool: StandInPool) -> None:
    pool.model.capacity = 2
    assert one(app, "/v1/embeddings", {"input": ["red", data_url(RED)]}).status == 200
    reply = one(app, "/v1/embeddings", {"input": ["red", "blue", data_url(b"no image")]})
    assert (reply.status, reply.headers["retry-after"]) == (429, "2")
    assert pool.model.admitted == 0


def test_overload_and_failure_inside_a_call_have_their_status(app: HttpApp, pool: StandInPool, caplog: Any) -> None:
    for failure, status, code in (
        (Overloaded(0.2), 429, "overloaded"),
        (ReplicaUnavailable("actor 17 died"), 503, "unavailable"),
        (RuntimeError("secret /etc/path"), 500, "internal_error"),
        (TimeoutError("inner"), 500, "internal_error"),
        (KeyError("shapes/3"), 500, "internal_error"),
    ):
        pool.model.failure = failure
        for path, body in (("/v1/embeddings", {"input": ["red", data_url(RED)]}), ("/v1/search", {"text": "red"})):
            caplog.clear()
            reply = one(app, path, body, headers={"x-request-id": "id-of-a-test"})
            assert (reply.status, reply.json["error"]["code"]) == (status, code)
            assert not re.search("secret|actor|Traceback|inner", reply.body.decode())
            errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
            assert any("id-of-a-test" in error for error in errors) == (status >= 500)
            assert pool.model.admitted == 0 and app.in_progress == 0


def test_past_the_deadline_a_request_is_504_and_gives_its_place_back(pool: StandInPool) -> None:
    app = HttpApp(pool, HttpConfig(deadline=0.05))
    pool.model.delay = 5
    start = time.perf_counter()
    reply = one(app, "/v1/embeddings", {"input": "red"}, headers={"x-request-timeout-seconds": "60"})
    assert (reply.status, reply.json["error"]["code"]) == (504, "deadline_exceeded")
    assert time.perf_counter() - start < 1 and app.in_progress == 0 and pool.model.admitted == 0


@pytest.mark.parametrize("body", [{"input": "red"}, {"input": ["red", data_url(RED)]}])
def test_who_hangs_up_gives_the_place_back_at_once(app: HttpApp, pool: StandInPool, body: Any) -> None:
    pool.model.delay = 5

    async def leave() -> None:
        import json

        chunks = json.dumps(body).encode()
        start = time.perf_counter()
        answer = await ask(app, "/v1/embeddings", receive=arriving(chunks, gone=0.05))
        assert answer.status == 0 and time.perf_counter() - start < 1
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0  # a time limit around the HTTP app goes on working

    asyncio.run(leave())
    assert app.in_progress == 0 and pool.model.admitted == 0


def test_who_hangs_up_within_the_body_gives_the_place_back(app: HttpApp) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert one(app, "/v1/embeddings", receive=receive).status == 0
    assert app.in_progress == 0


def test_outer_cancellation_is_passed_on(app: HttpApp, pool: StandInPool) -> None:
    pool.model.delay = 5

    async def stopped() -> None:
        task = asyncio.ensure_future(ask(app, "/v1/embeddings", {"input": "red"}))
        await asyncio.sleep(0.02)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(stopped())
    assert app.in_progress == 0


def test_bodies_have_a_limit_declared_or_not() -> None:
    app = HttpApp(StandInPool(), HttpConfig(max_body_mib=1))
    declared = one(app, "/v1/embeddings", headers={"content-length": str(2**20 + 1)}, receive=never)
    chunked = one(app, "/v1/embeddings", receive=arriving(*[b" " * 2**18] * 5))
    for reply in (declared, chunked):
        assert (reply.status, reply.json["error"]["code"]) == (413, "body_too_large")
    exactly = b'{"input": "red"}'.ljust(2**20)
    assert one(app, "/v1/embeddings", exactly).status == 200
    assert one(app, "/v1/embeddings", receive=arriving(exactly[:100], exactly[100:])).status == 200
    assert one(app, "/v1/embeddings", headers={"content-length": "-5"}, receive=never).status == 400


def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(app: HttpApp) -> None:
    reply = one(app, "/v1/embeddings", b'{"input": [' + b"0," * 600_000 + b"0]}")
    assert (reply.status, reply.json["error"]["code"]) == (413, "too_many_values")


def test_bodies_together_have_a_limit(pool: StandInPool) -> None:
    app = HttpApp(pool, HttpConfig(max_held_mib=1))
    pool.model.delay = 0.2
    big = b'{"input": "red"}'.ljust(700_000)

    async def crowd() -> tuple[Answer, Answer, Answer]:
        inside = asyncio.ensure_future(ask(app, "/v1/embeddings", big))
        await asyncio.sleep(0.02)
        declared = await ask(app, "/v1/embeddings", headers={"content-length": "700000"}, receive=never)
        chunked = await ask(app, "/v1/embeddings", receive=arriving(b" " * 300_000, b" " * 300_000))
        return await inside, declared, chunked

    inside, declared, chunked = asyncio.run(crowd())
    assert (inside.status, declared.status, chunked.status) == (200, 429, 429)
    assert one(app, "/v1/embeddings", big).status == 200


def test_a_body_that_comes_too_slowly_is_408(pool: StandInPool) -> None:
    app = HttpApp(pool, HttpConfig(body_seconds=0.05))
    start = time.perf_counter()
    reply = one(app, "/v1/embeddings", receive=arriving(*[b" "] * 100, pause=0.02))
    assert (reply.status, reply.json["error"]["code"]) == (408, "body_timeout")
    assert time.perf_counter() - start < 1 and app.in_progress == 0


def test_a_thousand_requests_at_once_each_get_their_own_answer(app: HttpApp, pool: StandInPool) -> None:
    pool.model.delay = 0.01
    texts = [f"{colour} number {number}" for number in range(167) for colour in COLOURS][:1000]

    async def crowd() -> list[Answer]:
        return await asyncio.gather(*(ask(app, "/v1/embeddings", {"input": text}) for text in texts))

    for text, answer in zip(texts, asyncio.run(crowd()), strict=True):
        got = np.array(answer.json["data"][0]["embedding"], np.float32)
        np.testing.assert_array_equal(got, text_vector(text))


@pytest.fixture(scope="module")
def live() -> Any:
    """(URL, app, pool) behind a real server that wants a key."""
    pool = StandInPool()
    app = HttpApp(pool, HttpConfig(max_body_mib=1), Keys({"shop": KEY}))
    with listening(app) as url:
        yield url, app, pool


def test_the_openai_client_reads_vectors_and_errors(live: Any) -> None:
    url, _, _ = live
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        packed = client.embeddings.create(model="shapes", input=["a red circle", data_url(RED)])
        plain = client.embeddings.create(model="shapes", input="a red circle", encoding_format="float")
        np.testing.assert_array_equal(np.array(packed.data[0].embedding, np.float32), text_vector("a red circle"))
        np.testing.assert_array_equal(np.array(packed.data[1].embedding, np.float32), image_vector(seen(RED)))
        np.testing.assert_array_equal(np.array(plain.data[0].embedding, np.float32), text_vector("a red circle"))
        assert packed.usage.prompt_tokens == 4 and [model.id for model in client.models.list()] == ["shapes"]
        assert len(client.embeddings.create(model="shapes", input="red", dimensions=DIMENSIONS).data) == 1
        for wrong, error in (
            ({"input": "."}, openai.BadRequestError),
            ({"input": [1, 2]}, openai.BadRequestError),
            ({"input": "red", "model": "gpt"}, openai.NotFoundError),
            ({"input": "red", "extra_body": {"modality": "sound"}}, openai.UnprocessableEntityError),
        ):
            with pytest.raises(error) as raised:
                client.embeddings.create(**({"model": "shapes"} | wrong))  # type: ignore[call-overload]
            assert raised.value.body["code"] == raised.value.code and raised.value.request_id
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="nobody's", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.embeddings.create(model="shapes", input="red")


def test_overload_is_the_openai_clients_rate_limit(live: Any) -> None:
    url, _, pool = live
    pool.model.capacity = 0
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        with client, pytest.raises(openai.RateLimitError) as raised:
            client.embeddings.create(model="shapes", input="red")
        assert raised.value.response.headers["retry-after"] == "2"
    finally:
        pool.model.capacity = 1000


def _connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), 5)


def test_a_closed_connection_frees_its_place(live: Any) -> None:
    url, app, pool = live
    pool.model.delay = 20
    try:
        with _connect(url) as line:
            body = b'{"input": "red"}'
            line.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (KEY.encode(), len(body), body)
            )
            _wait(lambda: pool.model.admitted == 1)
        _wait(lambda: app.in_progress == 0 and pool.model.admitted == 0)
    finally:
        pool.model.delay = 0


def _wait(condition: Any) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_refused_upload_can_be_read_by_its_sender(live: Any) -> None:
    url, _, _ = live
    with _connect(url) as line:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n"
        line.sendall(head % (KEY.encode(), 3 << 20) + b" " * (3 << 20))
        assert line.recv(65536).startswith(b"HTTP/1.1 413 ")
        line.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")  # and the connection goes on
        reply = b""
        while chunk := line.recv(65536):
            reply += chunk
        assert b"HTTP/1.1 200 " in reply
