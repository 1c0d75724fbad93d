"""The two-phase switch: opened by all, then current for all, then released by all; restarts and deaths in between."""

import dataclasses

import pytest

from serving.gateway.rollout import STATUS_SECONDS, DesiredState, GatewayStatus, Rollout
from serving.model_source import VersionSpec

OLD, NEW = VersionSpec("models:/shop/1", "shop", "1", "aa", ""), VersionSpec("models:/shop/2", "shop", "2", "bb", "")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_current_before_every_gateway_has_opened_it():
    rollout = Rollout(Clock())
    rollout.record_status(GatewayStatus("a", {"old": OLD, "new": NEW}, "old"))
    rollout.record_status(GatewayStatus("b", {"old": OLD}, "old"))
    assert not rollout.opened_by_all("new")
    rollout.record_status(GatewayStatus("b", {"old": OLD, "new": NEW}, "old"))
    assert rollout.opened_by_all("new")
    rollout.record_status(GatewayStatus("a", {"old": OLD, "new": NEW}, "new"))
    assert not rollout.served_by_all("new")
    rollout.record_status(GatewayStatus("b", {"old": OLD, "new": NEW}, "new"))
    assert rollout.served_by_all("new") and not rollout.released_by_all("old")
    rollout.record_status(GatewayStatus("a", {"new": NEW}, "new"))
    assert not rollout.released_by_all("old")  # b has a request under way there
    rollout.record_status(GatewayStatus("b", {"new": NEW}, "new"))
    assert rollout.released_by_all("old")


def test_a_gateway_that_cannot_open_a_version_ends_the_switch():
    rollout = Rollout(Clock())
    rollout.record_status(GatewayStatus("a", {"old": OLD}, "old", {"new": "TimeoutError"}))
    with pytest.raises(ValueError, match="TimeoutError"):
        rollout.opened_by_all("new")


def test_a_dead_gateway_delays_a_switch_until_its_status_is_too_old():
    clock = Clock()
    rollout = Rollout(clock)
    rollout.record_status(GatewayStatus("dead", {"old": OLD}, "old"))
    clock.now = STATUS_SECONDS - 1
    rollout.record_status(GatewayStatus("alive", {"old": OLD, "new": NEW}, "old"))
    assert not rollout.opened_by_all("new")
    clock.now = STATUS_SECONDS + 1
    assert rollout.opened_by_all("new")
    assert [report.gateway for report in rollout.gateways] == ["alive"]


def test_after_a_restart_what_most_gateways_serve_is_current():
    rollout = Rollout(Clock())
    rollout.record_status(GatewayStatus("a", {"old": OLD, "new": NEW}, "new"))
    rollout.record_status(GatewayStatus("b", {"old": OLD, "new": NEW}, "new"))
    rollout.record_status(GatewayStatus("c", {"old": OLD}, "old"))
    rollout.record_status(GatewayStatus("fresh", {}, ""))
    rollout.recover()
    assert rollout.desired == DesiredState({"old": OLD, "new": NEW}, "new")


def test_the_desired_state_is_reached_by_a_gateway_that_has_just_what_it_should():
    desired = DesiredState({"old": OLD, "new": NEW}, "new")
    there = GatewayStatus("a", {"old": OLD, "new": NEW}, "new")
    assert desired.reached_by(there)
    assert not desired.reached_by(dataclasses.replace(there, opened={"new": NEW}))
    assert not desired.reached_by(dataclasses.replace(there, current="old"))
    assert not dataclasses.replace(desired, draining=True).reached_by(there)


def test_another_index_or_space_is_another_application():
    names = {
        dataclasses.replace(NEW, **change).application
        for change in ({}, {"index": "s3://b/i"}, {"space": "cc"}, {"version": "3"}, {"model": "models:/shop/3"})
    }
    assert len(names) == 5 and all(name.startswith("triptych-shop-") for name in names)
    assert VersionSpec("/a b/ü", "my shop: ü/1", "", "aa", "").application.count("/") == 0
