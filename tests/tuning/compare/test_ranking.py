"""Intervals, ranks with ties, protocols that differ, and the settings that are shown."""

import math
import statistics

import pytest

from tests.support.comparison_cases import (
    BASE,
    T,
    item,
    scores,
)
from tuning.compare.ranking import compare, estimate, queries, seed_spread, wilson, within_error
from tuning.compare.table import headline, table_text


@pytest.mark.parametrize(("share", "count"), [(0.0, 50), (0.1, 20), (0.37, 2000), (1.0, 7)])
def test_wilsons_bounds_are_the_shares_that_the_sample_just_does_not_rule_out(share, count):
    z = 1.96
    for bound in wilson(share, count, z):
        assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / count, abs=1e-12)
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1 and high > low


def test_the_mean_of_two_shares_is_worth_as_many_queries_as_give_it_its_variance():
    assert queries(scores(0.5, pairs=1000)) == 2000 and queries({"val/pairs": 500.0}) == 1000
    images, captions, p = 200.0, 1000.0, 0.3
    variance = (p * (1 - p) / images + p * (1 - p) / captions) / 4
    count = queries({"val/images": images, "val/captions": captions})
    assert p * (1 - p) / count == pytest.approx(variance)
    assert queries({}) == 0.0


def test_several_seeds_give_a_mean_its_spread_and_a_smaller_error():
    recalls = [0.30, 0.33, 0.27]
    repeated = item("a", recalls[0], repeats=[scores(r) for r in recalls[1:]])
    found = estimate(repeated)
    assert found.value == pytest.approx(0.30) and found.seeds == 3
    assert (found.high - found.low) / 2 == pytest.approx(statistics.stdev(recalls))
    assert found.error == pytest.approx(estimate(item("b", 0.30)).error / math.sqrt(3))


def test_the_spread_over_seeds_is_pooled_and_counts_for_single_runs_too():
    one, other = [0.2, 0.3], [0.5, 0.52, 0.6]
    items = [
        item("a", one[0], repeats=[scores(one[1])]),
        item("b", other[0], repeats=[scores(r) for r in other[1:]]),
        item("c", 0.4),
    ]
    squares = sum((r - statistics.fmean(rs)) ** 2 for rs in (one, other) for r in rs)
    assert seed_spread(items) == pytest.approx(math.sqrt(squares / 3))
    assert seed_spread([item("c", 0.4)]) == 0.0
    assert estimate(items[2], 0.05).error == 0.05 and estimate(items[2], 1e-6).error > 1e-3  # the larger of the two


def test_a_repeat_without_metrics_is_no_seed():
    assert estimate(item("a", 0.3, repeats=[{}])).seeds == 1


def test_runs_within_their_errors_share_a_rank_and_the_next_one_counts_them():
    comparison = compare([item("d", 0.10), item("b", 0.29), item("a", 0.30), item("c", 0.20), item("e", 0.205)])
    assert [(row.item.name, row.rank, row.tied, row.number) for row in comparison.rows] == [
        ("a", 1, True, 1),
        ("b", 1, True, 2),
        ("e", 3, True, 3),
        ("c", 3, True, 4),
        ("d", 5, False, 5),
    ]
    assert headline(comparison).endswith("Within its error: b.")


def test_a_group_is_all_that_its_first_cannot_be_told_from():
    """0.29 is like 0.27, which is like 0.25; but 0.25 is not like 0.29, so it begins a group."""
    rows = compare([item(f"{r}", r) for r in (0.29, 0.27, 0.25)]).rows
    a, b, c = (row.estimate for row in rows)
    assert within_error(a, b) and within_error(b, c) and not within_error(a, c)
    assert [row.rank for row in rows] == [1, 1, 3]


def test_of_those_that_are_as_good_the_repeated_ones_come_first():
    items = [item("lucky", 0.31), item("sure", 0.30, repeats=[scores(0.30)]), item("far", 0.2, repeats=[scores(0.2)])]
    comparison = compare([*items, item("on", 0.5, status="running")])
    found = [(row.item.name, row.rank, row.number) for row in comparison.rows]
    assert found == [("sure", 1, 1), ("lucky", 1, 2), ("far", 3, 3), ("on", 0, 4)]
    assert headline(comparison).startswith("Best: sure")


@pytest.mark.parametrize(("pairs", "ranks"), [(100, [1, 1]), (100_000, [1, 2])])
def test_more_queries_tell_apart_what_fewer_do_not(pairs, ranks):
    items = [item("a", metrics=scores(0.32, pairs=pairs)), item("b", metrics=scores(0.30, pairs=pairs))]
    assert [row.rank for row in compare(items).rows] == ranks


def test_seeds_that_spread_tie_what_queries_alone_would_tell_apart():
    def two(spread: float) -> list[int]:
        many = {"pairs": 100_000}
        repeats = [scores(0.32 + spread, **many), scores(0.32 - spread, **many)]
        items = [item("a", metrics=scores(0.32, **many), repeats=repeats), item("b", metrics=scores(0.30, **many))]
        return [row.rank for row in compare(items).rows]

    assert two(0.001) == [1, 2] and two(0.03) == [1, 1]


def test_only_what_finished_has_a_rank_and_what_has_no_recall_comes_last():
    items = [
        item("lost", None, status="failed"),
        item("early", 0.9, status="pruned"),
        item("on", 0.95, status="running"),
        item("done", 0.2),
        item("odd", None),
    ]
    comparison = compare(items)
    assert [(row.item.name, row.rank) for row in comparison.rows] == [
        ("done", 1),
        ("on", 0),
        ("early", 0),
        ("lost", 0),
        ("odd", 0),
    ]
    assert headline(comparison).startswith("Best: done")
    assert "nothing to rank" in headline(compare(items[:3]))


def test_runs_that_were_scored_differently_are_not_ranked_but_told_apart():
    items = [
        item("x", 0.1, protocol={"validation data": "/val", "images scored": "1,000"}),
        item("y", 0.3, protocol={"validation data": "/val", "images scored": "500"}),
        item("z", 0.2, protocol={"validation data": "/val"}),
    ]
    comparison = compare(items)
    assert comparison.protocol == ["images scored: 1,000 (x); 500 (y)"]
    assert [row.item.name for row in comparison.rows] == ["x", "y", "z"] and not comparison.ranked
    text = table_text(comparison, terminal=False)
    assert (
        "rank" not in text.splitlines()[0].split()
        and "Not ranked" in text
        and "Differs: images scored: 1,000 (x); 500 (y)" in text
    )
    assert compare([items[0], items[2]]).ranked  # what z does not know is no difference


def test_who_has_no_recall_does_not_keep_the_others_from_being_ranked():
    items = [item("x", 0.1, protocol={"validation data": "/a"}), item("y", protocol={"validation data": "/b"})]
    assert compare(items).ranked


def test_another_depth_of_reranking_is_told_and_ranks_stay():
    items = [item("x", metrics=scores(0.1) | {"val/rerank_top": 16.0}), item("y", metrics=scores(0.2))]
    assert not any("Re-ranked" in note for note in compare(items).notes)
    items.append(item("z", metrics=scores(0.3) | {"val/rerank_top": 32.0}))
    comparison = compare(items)
    assert any("16, 32" in note for note in comparison.notes) and comparison.ranked[0].item.name == "z"


def test_only_keys_that_differ_are_shown_and_places_are_no_settings():
    configs = [BASE.override({"name": "a", "out": "/a", T: 0.05}), BASE.override({"name": "b", T: 0.1, "seed": 3})]
    comparison = compare([item("a", 0.1, config=configs[0]), item("b", 0.2, config=configs[1])])
    assert comparison.keys == ["seed", T]
    assert [comparison.value(row, T) for row in comparison.rows] == [0.1, 0.05]
    assert "temperature.start" in table_text(comparison, terminal=False)


def test_the_vocabulary_that_training_counted_is_no_setting_unless_it_was_given():
    sizes = [BASE, BASE.override({"encoder.text.vocab_size": 900})]
    assert compare([item(f"{i}", 0.1, config=config) for i, config in enumerate(sizes)]).keys == []
    given = [config.override({"encoder.text.tokenizer": "some"}) for config in sizes]
    items = [item(f"{i}", 0.1, config=config) for i, config in enumerate(given)]
    assert compare(items).keys == ["encoder.text.vocab_size"]
