"""Shares of variance, curves compared after equal samples, the Pareto front."""

import dataclasses
import statistics

import pytest

from tests.support.comparison_cases import (
    BASE,
    K,
    T,
    full_grid,
    item,
    scores,
)
from tuning.compare.collect import Compared
from tuning.compare.importance import at, at_equal_samples, between_groups, front, importance, rank_correlation
from tuning.compare.ranking import compare


def test_in_a_full_grid_of_sums_the_shares_are_those_of_the_variances_and_make_up_the_whole():
    found = importance(compare(full_grid()))
    one, other = statistics.pvariance([0, 0.05, 0.1]), statistics.pvariance([0, 0.02, 0])
    assert [share.key for share in found.shares] == [T, K]
    assert [share.share for share in found.shares] == pytest.approx([one / (one + other), other / (one + other)])
    assert sum(share.share for share in found.shares) == pytest.approx(1)
    assert found.shares[0].chance == pytest.approx(2 / 8) and found.samples == 0


def test_the_share_between_groups_is_the_definitions():
    values, recalls = ["a", "b", "a", "b", "b"], [0.1, 0.4, 0.3, 0.2, 0.6]
    total = sum((r - statistics.fmean(recalls)) ** 2 for r in recalls)
    within = 0.0
    for name in "ab":
        group = [r for value, r in zip(values, recalls, strict=True) if value == name]
        within += sum((r - statistics.fmean(group)) ** 2 for r in group)
    assert between_groups(values, recalls) == pytest.approx(1 - within / total)


def test_the_correlation_of_ranks_sees_order_only():
    assert rank_correlation([1, 2, 3, 4], [0.1, 0.2, 0.9, 1.0]) == pytest.approx(1)
    assert rank_correlation([4, 3, 2, 1], [0.1, 0.2, 0.9, 1.0]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 2], [1, 2, 1, 2]) == pytest.approx(0)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0
    one, other = [3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 7.0, 1.0, 8.0, 2.0]
    mean_ranks = [statistics.correlation([3, 1.5, 4, 1.5, 5], [2.5, 4, 1, 5, 2.5])]
    assert [rank_correlation(one, other)] == pytest.approx(mean_ranks)


def test_numbers_drawn_anew_are_judged_by_rank_and_too_few_runs_not_at_all():
    def drawn(count: int) -> list[Compared]:
        return [
            item(f"{i}", 0.1 + 0.01 * i, config=BASE.override({T: 0.01 * 1.7**i}), overrides={T: 0.01 * 1.7**i})
            for i in range(count)
        ]

    found = importance(compare(drawn(6)))
    assert found.shares == [(T, pytest.approx(1.0), pytest.approx(1 / 5))]
    assert importance(compare(drawn(3))).shares == []
    same = [dataclasses.replace(run, metrics=scores(0.3)) for run in drawn(6)]
    assert importance(compare(same)).shares == []


def test_pruned_runs_are_compared_where_the_first_of_them_ended():
    items = [
        item("a", 0.3, curve=[(100, 0.1), (200, 0.2), (400, 0.3)]),
        item("b", 0.1, status="pruned", curve=[(100, 0.05), (150, 0.1)]),
        item("c", None, status="failed", curve=[(50, 0.01)]),
        item("d", 0.2),
        item("e", 0.4, curve=[(300, 0.3), (400, 0.4)]),  # what it was at 150, nobody knows
    ]
    comparison = compare(items)
    numbers = {row.item.name: row.number for row in comparison.rows}
    equal = at_equal_samples(comparison)
    assert equal.samples == 150
    assert equal.scores == {numbers["a"]: pytest.approx(0.15), numbers["b"]: 0.1}


@pytest.mark.parametrize(("samples", "value"), [(0, 1.0), (10, 1.0), (15, 1.5), (20, 2.0), (30, 4.0), (99, 6.0)])
def test_between_its_points_a_curve_is_straight_and_beyond_them_level(samples, value):
    assert at([(10, 1.0), (20, 2.0), (40, 6.0)], samples) == pytest.approx(value)


def test_the_front_is_all_that_nothing_beats():
    points = [(float((7 * i) % 10), float((3 * i * i) % 11)) for i in range(12)]
    beaten = {
        i
        for i, (cost, recall) in enumerate(points)
        for other, (less, more) in enumerate(points)
        if other != i and less <= cost and more >= recall and (less < cost or more > recall)
    }
    assert {points[i] for i in front(points)} == {points[i] for i in range(len(points)) if i not in beaten}
    costs = [points[i][0] for i in front(points)]
    assert costs == sorted(costs) and front([]) == []
