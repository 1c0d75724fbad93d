import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import InputError
from pipelines.data.epoch_plan import (
    BYTES_A_GROUP,
    Position,
    bundle,
    groups,
    merge,
    permutation,
    require_groups,
    shares,
)
from pipelines.data.sample import Unit


def units_of(counts, length=1000):
    return [Unit(number, "file", "parquet", number, 0, count, 0, length, 1, "") for number, count in enumerate(counts)]


def walk(units, seed, epoch, worlds, draw):
    """Train an epoch: each world in turn takes some rows of each of its shares, in order, then is replaced."""
    plan = groups(units, seed, epoch)
    done, order = {}, []
    for number, world in enumerate(worlds):
        parts = []
        for share in shares(plan, done, world):
            rows = [(group, place) for group, skip in share for place in range(skip, group.count)]
            taken = rows if number == len(worlds) - 1 else rows[: draw(len(rows))]
            part = {}
            for group, place in taken:
                order.append((group.group, place, group.units, int(permutation(group, seed, epoch)[place])))
                part[group.group] = place + 1
            parts.append(part)
        done = merge([done, *parts])
    return plan, order


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    worlds=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_every_sample_comes_once_an_epoch_wherever_it_is_cut(counts, worlds, seed):
    units, draw = units_of(counts), random.Random(seed)
    plan, order = walk(units, seed, 3, worlds, lambda most: draw.randint(0, most))
    assert sum(group.count for group in plan) == sum(counts) == len(order)
    ids = []
    for _, _, numbers, place in order:
        owners = [(unit, ordinal) for unit in numbers for ordinal in range(counts[unit])]
        ids.append(owners[place])
    assert len(set(ids)) == sum(counts)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 50), min_size=1, max_size=40), world=st.integers(1, 3))
def test_a_groups_order_is_the_same_in_every_world(counts, world):
    units = units_of(counts)
    _, alone = walk(units, 7, 0, [1], len)
    _, several = walk(units, 7, 0, [world], len)
    assert sorted(alone) == sorted(several)
    for share in shares(groups(units, 7, 0), {}, world):
        numbers = [group.group for group, _ in share]
        assert numbers == sorted(numbers)


def test_order_changes_with_seed_and_epoch_and_is_repeatable():
    units = units_of([5] * 40)
    orders = {(seed, epoch): groups(units, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(group.units for group in plan) for plan in orders.values()}) == 4
    assert groups(units, 0, 0) == orders[0, 0]
    first = orders[0, 0][0]
    assert sorted(permutation(first, 0, 0)) == list(range(first.count))
    assert list(permutation(first, 0, 0)) == list(permutation(first, 0, 0))
    assert list(permutation(first, 0, 0)) != list(permutation(first, 0, 1))


def test_permutations_are_fair():
    group = bundle(units_of([4]))[0]
    counts = np.zeros((4, 4), int)
    for epoch in range(4000):
        counts[np.arange(4), permutation(group, 0, epoch)] += 1
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_groups_hold_four_units_and_128_mib():
    assert [group.count for group in groups(units_of([3] * 10), 0, 0)] == [12, 12, 6]
    heavy = bundle(units_of([1] * 5, length=BYTES_A_GROUP // 2))
    assert [len(group.units) for group in heavy] == [2, 2, 1]
    assert [len(group.units) for group in bundle(units_of([1] * 3, length=BYTES_A_GROUP + 1))] == [1, 1, 1]


def test_groups_go_to_the_rank_with_the_fewest_rows():
    plan = bundle(units_of([10, 10, 10, 10, 1, 1, 1, 1, 2, 2, 2, 2, 3], length=1))
    first, second = shares(plan, {}, 2)
    assert [(g.group, skip) for g, skip in first] == [(0, 0)]
    assert [(g.group, skip) for g, skip in second] == [(1, 0), (2, 0), (3, 0)]
    first, second = shares(plan, {0: 38, 1: 4}, 2)
    assert [(g.group, skip) for g, skip in first] == [(0, 38), (3, 0)]
    assert [(g.group, skip) for g, skip in second] == [(2, 0)]


def test_positions_survive_json_and_merge_by_the_furthest():
    position = Position(4, {10: 3, 2: 7})
    assert Position.from_json(position.to_json()) == position
    assert Position.from_json({"epoch": 0, "done": {}}) == Position()
    assert merge([{1: 5}, {1: 3, 2: 1}, {}]) == {1: 5, 2: 1}
    assert position.replace_done({1: 1}) == Position(4, {1: 1})


def test_more_workers_than_groups_is_refused():
    plan = groups(units_of([1] * 12), 0, 0)
    require_groups(plan, 3)
    with pytest.raises(InputError, match=r"compute.workers: 4 workers.*only 3 groups"):
        require_groups(plan, 4)
