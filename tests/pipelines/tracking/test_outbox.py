import time

import pytest

from pipelines.tracking.outbox import Courier, Outbox, Point


def point(step: int) -> Point:
    return Point("train/loss/cma", step / 3, 1_700_000_000_000 + step, step)


def drained(outbox: Outbox, limit: int = 3) -> list[Point]:
    got: list[Point] = []
    while outbox:
        outbox.send(limit, got.extend)
    return got


def test_points_beyond_the_memory_go_on_in_a_file_and_none_is_lost(tmp_path):
    outbox = Outbox(tmp_path / "unsent.jsonl", capacity=5)
    for step in range(12):
        outbox.add([point(step)])
    assert len(outbox) == 12 and len(outbox.path.read_text().splitlines()) == 7
    assert drained(outbox) == [point(step) for step in range(12)]
    assert not outbox.path.exists()


def test_points_stay_when_delivery_fails(tmp_path):
    def refuse(points: list[Point]) -> None:
        raise ConnectionError

    outbox = Outbox(tmp_path / "unsent.jsonl", capacity=1)
    outbox.add([point(0)])
    outbox.add([point(1)])
    for _ in range(2):
        with pytest.raises(ConnectionError):
            outbox.send(10, refuse)
        outbox.send(10, lambda points: None)  # first the one in memory, then the one in the file
    assert len(outbox) == 0


def test_points_of_an_earlier_process_are_sent_and_half_a_line_is_cut_off(tmp_path):
    first = Outbox(tmp_path / "unsent.jsonl")
    first.add([point(0), point(1)])
    first.store()
    with first.path.open("a") as file:
        file.write('["train/loss')
    second = Outbox(first.path, capacity=0)
    second.add([point(2)])
    assert drained(second) == [point(0), point(1), point(2)]


def test_a_folder_that_cannot_be_written_keeps_points_in_memory(tmp_path, caplog):
    (tmp_path / "file").touch()
    outbox = Outbox(tmp_path / "file" / "unsent.jsonl", capacity=1)
    for step in range(4):
        outbox.add([point(step)])
    outbox.store()
    assert drained(outbox) == [point(step) for step in range(4)]
    assert len(caplog.records) == 1


def test_the_courier_goes_on_after_failures_and_reports_each_outage_once():
    answers = iter([True, False, False, True, False, True])
    calls: list[bool] = []
    reports: list[Exception] = []

    def send(last: bool) -> None:
        calls.append(last)
        if not next(answers, True):
            raise ConnectionError

    courier = Courier(send, reports.append, gather=0.001, longest=0.002)
    deadline = time.monotonic() + 10
    while len(calls) < 6 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert courier.finish(10) and calls[-1] and len(reports) == 2


def test_the_courier_gives_up_after_the_limit():
    def send(last: bool) -> None:
        raise ConnectionError

    started = time.monotonic()
    assert not Courier(send, lambda error: None).finish(limit=0.2)
    assert time.monotonic() - started < 5
