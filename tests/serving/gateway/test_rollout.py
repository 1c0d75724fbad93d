"""The two-phase switch: opened by all, then current for all, then let go of by all; restarts and deaths in between."""

import dataclasses

import pytest

from serving.gateway.rollout import FRESH, Orders, Report, Rollout
from serving.model_source import Wanted

OLD, NEW = Wanted("models:/shop/1", "shop", "1", "aa", ""), Wanted("models:/shop/2", "shop", "2", "bb", "")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_current_before_every_gateway_has_opened_it():
    rollout = Rollout(Clock())
    rollout.hear(Report("a", {"old": OLD, "new": NEW}, "old"))
    rollout.hear(Report("b", {"old": OLD}, "old"))
    assert not rollout.opened_by_all("new")
    rollout.hear(Report("b", {"old": OLD, "new": NEW}, "old"))
    assert rollout.opened_by_all("new")
    rollout.hear(Report("a", {"old": OLD, "new": NEW}, "new"))
    assert not rollout.served_by_all("new")
    rollout.hear(Report("b", {"old": OLD, "new": NEW}, "new"))
    assert rollout.served_by_all("new") and not rollout.released_by_all("old")
    rollout.hear(Report("a", {"new": NEW}, "new"))
    assert not rollout.released_by_all("old")  # b has a request under way there
    rollout.hear(Report("b", {"new": NEW}, "new"))
    assert rollout.released_by_all("old")


def test_a_gateway_that_cannot_open_a_version_ends_the_switch():
    rollout = Rollout(Clock())
    rollout.hear(Report("a", {"old": OLD}, "old", {"new": "TimeoutError"}))
    with pytest.raises(ValueError, match="TimeoutError"):
        rollout.opened_by_all("new")


def test_a_dead_gateway_holds_nothing_up_for_longer_than_its_word_is_fresh():
    clock = Clock()
    rollout = Rollout(clock)
    rollout.hear(Report("dead", {"old": OLD}, "old"))
    clock.now = FRESH - 1
    rollout.hear(Report("alive", {"old": OLD, "new": NEW}, "old"))
    assert not rollout.opened_by_all("new")
    clock.now = FRESH + 1
    assert rollout.opened_by_all("new")
    assert [report.gateway for report in rollout.gateways] == ["alive"]


def test_after_a_restart_what_most_gateways_serve_is_current():
    rollout = Rollout(Clock())
    rollout.hear(Report("a", {"old": OLD, "new": NEW}, "new"))
    rollout.hear(Report("b", {"old": OLD, "new": NEW}, "new"))
    rollout.hear(Report("c", {"old": OLD}, "old"))
    rollout.hear(Report("fresh", {}, ""))
    rollout.adopt()
    assert rollout.orders == Orders({"old": OLD, "new": NEW}, "new")


def test_orders_are_fulfilled_by_a_gateway_that_holds_just_what_it_should():
    orders = Orders({"old": OLD, "new": NEW}, "new")
    there = Report("a", {"old": OLD, "new": NEW}, "new")
    assert orders.fulfilled(there)
    assert not orders.fulfilled(dataclasses.replace(there, opened={"new": NEW}))
    assert not orders.fulfilled(dataclasses.replace(there, current="old"))
    assert not dataclasses.replace(orders, draining=True).fulfilled(there)


def test_another_index_or_space_is_another_application():
    names = {
        dataclasses.replace(NEW, **change).application
        for change in ({}, {"index": "s3://b/i"}, {"space": "cc"}, {"version": "3"}, {"model": "models:/shop/3"})
    }
    assert len(names) == 5 and all(name.startswith("triptych-shop-") for name in names)
    assert Wanted("/a b/ü", "my shop: ü/1", "", "aa", "").application.count("/") == 0
