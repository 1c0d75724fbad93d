"""Hostile bodies: no 5xx, none hangs, memory stays flat, and honest requests beside them are answered."""

import asyncio
import gc
import os
import re
from pathlib import Path

import numpy as np
import pytest

from serving.config import HttpConfig
from serving.http.app import HttpApp
from tests.support.hostile_requests import LIMIT, MAKERS, Attack, attack
from tests.support.stand_in import Answer, StandInPool, ask, text_vector

pytestmark = pytest.mark.filterwarnings("ignore")  # decoders warn of damage; the service does not listen either
MARGIN = 48 << 20
"""Bytes that the process may have grown by."""


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def storm(app: HttpApp, attacks: list[Attack]) -> list[Answer]:
    """All of them, eight at once, each within ten seconds; an honest request after every eighth."""
    room = asyncio.Semaphore(8)

    async def one(attack: Attack) -> Answer:
        async with room, asyncio.timeout(10):
            return await ask(app, attack.path, attack.body, attack.headers, attack.receive)

    async def honest() -> None:
        async with room, asyncio.timeout(10):
            reply = await ask(app, "/v1/embeddings", {"input": "a red circle"})
        vector = np.array(reply.json["data"][0]["embedding"], np.float32)
        np.testing.assert_array_equal(vector, text_vector("a red circle"))

    beside = [asyncio.ensure_future(honest()) for _ in attacks[::8]]
    answers = await asyncio.gather(*map(one, attacks))
    await asyncio.gather(*beside)
    return answers


def withstand(app: HttpApp, seeds: range) -> set[int]:
    """Run the attacks of these seeds; returns the statuses seen."""
    attacks = [attack(seed) for seed in seeds]
    answers = asyncio.run(storm(app, attacks))
    for sent, answer in zip(attacks, answers, strict=True):
        assert answer.status < 500, (sent.kind, answer)
        if not answer.status:
            assert sent.kind.startswith("sending"), sent.kind  # only who hung up gets no answer
            continue
        assert answer.status == 200 or 400 <= answer.status < 500, (sent.kind, answer.status)
        if answer.status != 200:
            assert set(answer.json["error"]) == {"message", "type", "param", "code"}
            assert not re.search(r"Traceback|File \"|site-packages|/etc/passwd", answer.body.decode()), sent.kind
        assert len(answer.body) < 40_000 and "set-cookie" not in answer.headers
    assert app.in_progress == 0
    return {answer.status for answer in answers}


def make_app() -> tuple[HttpApp, StandInPool]:
    config = HttpConfig(max_body_mib=LIMIT / 2**20, max_pixels=1_000_000, body_seconds=0.2, deadline=8)
    pool = StandInPool()
    return HttpApp(pool, config), pool


def test_sixty_four_hostile_bodies() -> None:
    app, pool = make_app()
    assert {200, 400, 422} <= withstand(app, range(64))
    assert pool.model.admitted == 0 and len(MAKERS) * 8 == 64


@pytest.mark.slow
def test_five_hundred_hostile_bodies_leave_memory_flat() -> None:
    app, pool = make_app()
    withstand(app, range(1000, 1200))  # every decoder loaded, every buffer grown
    before = resident()
    withstand(app, range(500))
    assert resident() - before < MARGIN and pool.model.admitted == 0
