"""Requests gathered into batches: each gets its own vectors, in order; one that would wait too long is refused."""

import asyncio
import random

import numpy as np
import pytest

from serving.config import BatchConfig
from serving.gateway.batcher import Batcher, Rate
from serving.interfaces import Overloaded


class Doubler:
    """An encoder of one-number rows that keeps the sizes of its batches and how many ran at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.sizes: list[int] = []
        self.now = self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, rows: list[int]) -> np.ndarray:
        self.sizes.append(len(rows))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        await self.gate.wait()
        self.now -= 1
        return np.array([[2.0 * row] for row in rows], np.float32)


def test_a_thousand_mixed_requests_each_get_their_own_in_order():
    async def run():
        encode = Doubler(0.001)
        batcher = Batcher(encode, BatchConfig(max_items=16, inflight=3, max_queue=100_000), 300)
        draw = random.Random(0)

        async def ask(start: int) -> bool:
            await asyncio.sleep(draw.random() / 20)
            rows = list(range(start, start + draw.randint(1, 40)))  # some are longer than a batch
            with batcher.admit(len(rows)):
                vectors = await batcher(rows)
            return vectors[:, 0].tolist() == [2.0 * row for row in rows]

        assert all(await asyncio.gather(*(ask(1000 * number) for number in range(1000))))
        assert max(encode.sizes) == 16 and encode.most == 3
        assert batcher.admitted == 0

    asyncio.run(run())


def test_an_idle_encoder_is_called_at_once_and_a_busy_one_with_full_batches():
    async def run():
        encode = Doubler()
        encode.gate.clear()
        batcher = Batcher(encode, BatchConfig(max_items=4, inflight=2, linger=60), 30)
        asked = [asyncio.ensure_future(batcher([number])) for number in range(6)]
        await asyncio.sleep(0.01)
        assert encode.sizes == [1, 4]  # the first alone, the next four together; the last lingers
        encode.gate.set()
        assert [float(one[0, 0]) for one in await asyncio.gather(*asked)] == [0, 2, 4, 6, 8, 10]
        assert encode.sizes == [1, 4, 1]

    asyncio.run(run())


def test_rows_that_linger_are_encoded_when_the_time_is_over():
    async def run():
        encode = Doubler()
        encode.gate.clear()
        batcher = Batcher(encode, BatchConfig(max_items=4, inflight=2, linger=0.01), 30)
        asked = [asyncio.ensure_future(batcher([number])) for number in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert encode.sizes == [1]
        await asyncio.sleep(0.05)
        assert encode.sizes == [1, 1]
        encode.gate.set()
        await asyncio.gather(*asked)

    asyncio.run(run())


def test_a_client_that_has_gone_is_not_encoded():
    async def run():
        encode = Doubler()
        encode.gate.clear()
        batcher = Batcher(encode, BatchConfig(max_items=4, inflight=1), 30)
        asked = [asyncio.ensure_future(batcher([number])) for number in range(4)]
        await asyncio.sleep(0.01)
        asked[2].cancel()
        await asyncio.sleep(0)
        encode.gate.set()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(results[2], asyncio.CancelledError)
        assert [float(results[number][0, 0]) for number in (0, 1, 3)] == [0, 2, 6]
        assert encode.sizes == [1, 2]

    asyncio.run(run())


def test_an_encoder_that_fails_fails_its_own_batch_only():
    async def run():
        async def encode(rows: list[int]) -> np.ndarray:
            if 3 in rows:
                raise ValueError("three")
            return np.array([[row] for row in rows], np.float32)

        batcher = Batcher(encode, BatchConfig(max_items=1), 30)
        results = await asyncio.gather(*(batcher([number]) for number in range(5)), return_exceptions=True)
        assert [isinstance(one, ValueError) for one in results] == [False, False, False, True, False]
        assert (await batcher([7]))[0, 0] == 7

    asyncio.run(run())


def test_no_more_is_admitted_than_can_be_done_within_the_share_of_the_deadline():
    async def run():
        encode = Doubler(0.02)
        batcher = Batcher(encode, BatchConfig(max_items=2, inflight=1, queue_share=0.5), 1.0)
        with batcher.admit(2):
            await batcher([0, 1])
        assert 25 < batcher.limit <= 50  # 2 rows in at least 20 ms, for half a second
        admitted, refused = 0, []

        async def ask(number: int) -> None:
            nonlocal admitted
            try:
                with batcher.admit(1):
                    admitted += 1
                    await batcher([number])
            except Overloaded as error:
                refused.append(error.retry_after)

        await asyncio.gather(*(ask(number) for number in range(200)))
        assert 25 <= admitted <= 50 and admitted + len(refused) == 200
        assert all(seconds >= 1 for seconds in refused)
        assert batcher.admitted == 0
        with batcher.admit(1000):  # an idle service takes a request of any size
            pass

    asyncio.run(run())


def test_capacity_is_given_back_whatever_happens():
    batcher = Batcher(Doubler(), BatchConfig(max_items=1, max_queue=1), 30)
    with pytest.raises(KeyError), batcher.admit(5):
        raise KeyError
    assert batcher.admitted == 0


def test_the_rate_is_rows_over_seconds_and_follows_a_change():
    rate = Rate()
    assert rate.value == 0
    for _ in range(100):
        rate.add(10, 0.1)
    assert rate.value == pytest.approx(100)
    for _ in range(100):
        rate.add(10, 1.0)
    assert rate.value == pytest.approx(10, rel=0.01)
