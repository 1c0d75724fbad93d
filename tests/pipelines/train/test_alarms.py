"""The bounds of docs/spec/codebook.md 5: each fires once, beyond its number, when it is armed."""

import math
import re
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F

from models.codebook_metrics import code_metrics, embedding_metrics, mass_metrics, target_metrics
from models.codebook_usage import CodeUsage
from models.collectives import SoloWorkers
from models.config import CodebookConfig, ObjectiveConfig
from pipelines.config import PRESETS
from pipelines.train.alarms import LEVELS, ROWS, Alarm, Alarms

CODES, WIDTH = 1000, 256


def alarms(width: int = WIDTH, **codebook: object) -> Alarms:
    return Alarms(ObjectiveConfig(codebook=CodebookConfig(**({"size": CODES} | codebook))), width)


def look(judge: Alarms, metrics: Mapping[str, float], step: int = 5000, progress: float = 0.5) -> list[Alarm]:
    return judge.check(metrics, step, progress, True)


def levels(judge: Alarms, metrics: Mapping[str, float], **when: float) -> list[tuple[str, str]]:
    return [(alarm.key, alarm.level) for alarm in look(judge, metrics, **when)]


BOUNDS = [
    ("codebook/ppl_v", "below", 300, "range"),
    ("codebook/ppl_v", "below", 100, "alarm"),
    ("codebook/ppl_v", "below", 4, "stop"),
    ("codebook/ppl_t", "below", 300, "range"),
    ("codebook/ppl_t", "below", 100, "alarm"),
    ("codebook/ppl_t", "below", 4, "stop"),
    ("codebook/dead", "above", 0.2, "range"),
    ("codebook/dead", "above", 0.5, "alarm"),
    ("codebook/H_student", "above", 0.8, "range"),
    ("codebook/H_student", "above", 0.97, "alarm"),
    ("codebook/H_student", "below", 0.2, "range"),
    ("codebook/H_student", "below", 0.05, "alarm"),
    ("codebook/H_target", "above", 0.98, "alarm"),
    ("codebook/kappa", "below", 0.05, "alarm"),
    ("codebook/marg_l1", "above", 0.25, "range"),
    ("codebook/marg_l1", "above", 0.5, "alarm"),
    ("codebook/g_range", "above", 1.0, "range"),
    ("codebook/g_range", "above", 1.5, "alarm"),
    ("codebook/nn_cos", "above", 0.8, "range"),
    ("codebook/nn_cos", "above", 0.95, "alarm"),
    ("codebook/erank", "below", 64, "range"),
    ("codebook/erank", "below", 10, "alarm"),
    ("embedding/unif_v", "above", -2.0, "range"),
    ("embedding/unif_v", "above", -0.5, "alarm"),
    ("embedding/unif_v", "below", -4.0, "range"),
    ("embedding/unif_t", "above", -2.0, "range"),
    ("embedding/unif_t", "above", -0.5, "alarm"),
    ("embedding/unif_t", "below", -4.0, "range"),
    ("embedding/ts_drift_v", "above", 0.2, "range"),
    ("embedding/ts_drift_v", "above", 0.5, "alarm"),
    ("embedding/ts_drift_t", "above", 0.2, "range"),
    ("embedding/ts_drift_t", "above", 0.5, "alarm"),
]
"""The specification's numbers for 1000 codes of width 256; those of rows with a memory have tests of their own."""
WITH_MEMORY = {"codebook/kl", "embedding/gap", "codebook/collapse"}


@pytest.mark.parametrize(("key", "side", "bound", "level"), BOUNDS)
def test_a_metric_beyond_its_bound_is_told_and_one_at_it_is_not(key, side, bound, level):
    beyond = 1e-6 if side == "above" else -1e-6
    milder = [found for k, s, _, found in BOUNDS if (k, s) == (key, side) and LEVELS.index(found) < LEVELS.index(level)]
    at = [(key, milder[-1])] if milder else []
    assert levels(alarms(), {key: bound}) == at
    assert levels(alarms(), {key: bound - beyond}) == at
    (alarm,) = look(alarms(), {key: bound + beyond})
    assert (alarm.key, alarm.value, alarm.level) == (key, bound + beyond, level)
    assert alarm.message.startswith(f"{key} ") and f"{side} " in alarm.message and f"{bound:g}" in alarm.message


def test_the_table_has_these_bounds_and_no_others():
    listed = {(row.key, row.side, level) for row in ROWS for level, b in zip(LEVELS, row.bounds, strict=True) if b}
    assert {line for line in listed if line[0] not in WITH_MEMORY} == {(k, s, level) for k, s, _, level in BOUNDS}
    assert {key for key, _, _ in listed} >= WITH_MEMORY


HEALTHY = {
    "codebook/ppl_v": 600.0,
    "codebook/ppl_t": 580.0,
    "codebook/ppl_v_share": 0.6,
    "codebook/ppl_t_share": 0.58,
    "codebook/dead": 0.05,
    "codebook/agree1": 0.35,
    "codebook/agree5": 0.7,
    "codebook/kappa": 0.35,
    "codebook/H_student": 0.6,
    "codebook/H_target": 0.2,
    "codebook/q_max": 0.99,
    "codebook/kl": 1.2,
    "codebook/marg_l1": 0.2,
    "codebook/marg_max": 1.3,
    "codebook/g_range": 0.4,
    "codebook/nn_cos": 0.5,
    "codebook/erank": 120.0,
    "embedding/align": 0.6,
    "embedding/unif_v": -3.5,
    "embedding/unif_t": -3.4,
    "embedding/gap": 0.1,
    "embedding/ts_drift_v": 0.05,
    "embedding/ts_drift_t": 0.1,
}
TOY_COLLAPSE = HEALTHY | {
    "codebook/ppl_v": 23.0,
    "codebook/ppl_t": 23.0,
    "codebook/ppl_v_share": 0.023,
    "codebook/ppl_t_share": 0.023,
    "codebook/agree1": 0.913,
}


def test_a_healthy_run_is_told_nothing():
    judge = alarms()
    assert [look(judge, HEALTHY, step) for step in range(2000, 9000, 50)] == [[]] * 140


def test_each_level_is_told_once_and_none_after_a_graver_one():
    judge = alarms()
    told = [levels(judge, HEALTHY | {"codebook/ppl_v": value}) for value in (250, 240, 90, 250, 80, 3, 90, 2)]
    assert [[level for _, level in found] for found in told] == [["range"], [], ["alarm"], [], [], ["stop"], [], []]
    judge = alarms()
    assert levels(judge, {"codebook/dead": 0.6}) == [("codebook/dead", "alarm")]
    assert levels(judge, {"codebook/dead": 0.3}) == []


def test_both_sides_of_a_metric_are_told_and_all_metrics_at_once():
    judge = alarms()
    assert levels(judge, {"codebook/H_student": 0.98}) == [("codebook/H_student", "alarm")]
    assert levels(judge, {"codebook/H_student": 0.01}) == [("codebook/H_student", "alarm")]
    both = {"embedding/ts_drift_v": 0.3, "codebook/nn_cos": 0.99}
    assert levels(judge, both) == [("codebook/nn_cos", "alarm"), ("embedding/ts_drift_v", "range")]


@pytest.mark.parametrize(
    ("level", "fatal", "ends"),
    [
        ("stop", (), True),
        ("stop", ("codebook/dead",), True),
        ("alarm", (), False),
        ("alarm", ("codebook/dead",), True),
        ("alarm", ("codebook/kl",), False),
        ("range", ("codebook/dead",), False),
    ],
)
def test_an_alarm_ends_a_run_by_its_level_or_by_a_key_that_is_fatal_there(level, fatal, ends):
    assert Alarm("codebook/dead", 0.9, level, "many").ends(fatal) is ends


# When it is armed.


@pytest.mark.parametrize(
    ("config", "armed"),
    [
        ({}, 0.1),
        ({"freeze": 0.15}, 0.15),
        ({"start": 0.25, "ramp": 0.125}, 0.375),
        ({"start": 0.25, "ramp": 0.0, "freeze": 0.5}, 0.5),
    ],
)
def test_nothing_is_told_before_a_tenth_of_the_run_the_freeze_and_the_ramp_are_over(config, armed):
    judge, bad = alarms(**config), {"codebook/ppl_v": 2.0}
    for progress in (0.0, armed / 2, armed - 1e-6):
        assert look(judge, bad, progress=progress) == []
    assert levels(judge, bad, progress=armed) == [("codebook/ppl_v", "stop")]


def test_nothing_is_told_before_a_full_window():
    judge, bad = alarms(), {"codebook/ppl_v": 2.0, "embedding/ts_drift_v": 0.9}
    assert judge.check(bad, 5000, 0.9, False) == []
    assert len(judge.check(bad, 5000, 0.9, True)) == 2


def test_agreement_above_chance_is_judged_after_a_fifth_of_the_run():
    judge, bad = alarms(), {"codebook/kappa": 0.01, "codebook/dead": 0.6}
    assert levels(judge, bad, progress=0.2 - 1e-6) == [("codebook/dead", "alarm")]
    assert levels(judge, bad, progress=0.2) == [("codebook/kappa", "alarm")]


# Rows that look at more than one number.


def test_agreement_with_few_codes_in_use_is_a_collapse():
    (found,) = [alarm for alarm in look(alarms(), TOY_COLLAPSE) if alarm.key == "codebook/collapse"]
    assert found.level == "alarm" and found.value == 0.913
    judge = alarms()
    look(judge, TOY_COLLAPSE)
    assert look(judge, TOY_COLLAPSE) == []


@pytest.mark.parametrize(
    ("agree", "share_v", "share_t", "collapsed"),
    [
        (0.9, 0.02, 0.02, False),
        (0.901, 0.02, 0.02, True),
        (0.99, 0.1, 0.1, False),
        (0.99, 0.5, 0.099, True),
        (0.99, 0.099, 0.5, True),
        (0.5, 0.02, 0.02, False),
    ],
)
def test_a_collapse_needs_both_agreement_and_low_perplexity(agree, share_v, share_t, collapsed):
    metrics = {"codebook/agree1": agree, "codebook/ppl_v_share": share_v, "codebook/ppl_t_share": share_t}
    assert levels(alarms(), metrics) == ([("codebook/collapse", "alarm")] if collapsed else [])
    assert levels(alarms(), {"codebook/agree1": agree}) == []  # nobody knows how many codes are in use


def kl_alarms(values: list[float], every: int = 50, first: int = 1000) -> list[tuple[int, str]]:
    """Steps after the first, and level, of what is told where kl takes these values every so many steps."""
    judge = alarms()
    found = [(n * every, look(judge, {"codebook/kl": value}, first + n * every)) for n, value in enumerate(values)]
    return [(step, alarm.level) for step, told in found for alarm in told if alarm.key == "codebook/kl"]


def test_kl_that_falls_stands_still_or_swings_is_no_alarm():
    assert kl_alarms([2 * 0.999**n for n in range(200)]) == []
    assert kl_alarms([1.5] * 200) == []
    assert kl_alarms([1.5 * (1 + 0.02 * (-1) ** n) for n in range(200)]) == []


def test_a_single_high_reading_of_kl_is_no_alarm():
    assert kl_alarms([1.0] * 50 + [1.15] + [1.0] * 50) == []


def test_kl_that_fell_before_it_rises_is_held_against_its_low():
    (told,) = kl_alarms([2.0 - 0.02 * n for n in range(50)] + [1.0 + 0.005 * n for n in range(40)])
    assert 2450 + 1000 <= told[0] <= 2700 + 1000  # the smoothed value turns a few half-lives later


def test_kl_that_rises_for_a_thousand_steps_is_an_alarm_once():
    rises = [1.0] * 10 + [1.0 + 0.01 * n for n in range(1, 100)]
    (told,) = kl_alarms(rises)
    assert told[1] == "alarm" and 450 + 1000 <= told[0] <= 500 + 1000


def test_kl_less_than_five_percent_above_its_low_or_high_for_less_than_a_thousand_steps_is_no_alarm():
    assert kl_alarms([1.0] * 10 + [1.049] * 100) == []
    assert [level for _, level in kl_alarms([1.0] * 10 + [1.051] * 100)] == ["alarm"]
    assert kl_alarms([1.0] * 10 + [1.5] * 14 + [0.5] * 30) == []


def test_a_first_reading_that_is_low_by_chance_is_no_mark_for_later_ones():
    assert kl_alarms([0.5] + [1.0] * 100) == []


def test_kl_is_judged_alike_at_any_reporting_interval():
    for every in (10, 100, 250, 1500):
        rises = [1.0 + 0.0001 * every * n for n in range(8000 // every)]
        assert [level for _, level in kl_alarms(rises, every)] == ["alarm"]


def test_a_gap_that_rises_past_its_bound_is_an_alarm():
    judge = alarms()
    told = [levels(judge, {"embedding/gap": value}) for value in (0.5, 0.8, 0.81, 0.9)]
    assert told == [[], [], [("embedding/gap", "alarm")], []]


def test_a_gap_that_was_large_from_the_first_is_an_alarm_only_where_it_grows():
    judge = alarms()
    judge.check({"embedding/gap": 0.1}, 10, 0.05, True)  # not armed, so not the mark
    told = [levels(judge, {"embedding/gap": value}) for value in (1.2, 1.1, 0.9, 1.2, 1.21)]
    assert told == [[], [], [], [], [("embedding/gap", "alarm")]]


# What there is to judge.


def test_metrics_that_are_missing_or_no_numbers_are_passed_over():
    assert look(alarms(), {}) == []
    bad = dict.fromkeys(HEALTHY, math.nan)
    judge = alarms()
    assert look(judge, bad) == [] and look(judge, bad | {"codebook/g_range": math.inf}) == []
    assert levels(judge, {"codebook/g_range": 1.6}) == [("codebook/g_range", "alarm")]
    for _ in range(2):  # neither memory has kept a number that is none
        assert look(judge, {"codebook/kl": 1.0, "embedding/gap": 0.9}) == []


def test_a_small_codebook_is_not_stopped_for_being_small():
    assert look(alarms(size=8), {"codebook/ppl_v": 2.5}) == []
    assert levels(alarms(size=20), {"codebook/ppl_v": 3.9}) == [("codebook/ppl_v", "range")]
    assert levels(alarms(size=20), {"codebook/ppl_v": 1.9}) == [("codebook/ppl_v", "stop")]
    assert levels(alarms(size=60), {"codebook/ppl_v": 4.1}) == [("codebook/ppl_v", "alarm")]
    assert levels(alarms(size=60), {"codebook/ppl_v": 3.9}) == [("codebook/ppl_v", "stop")]


def test_codes_are_not_blamed_for_a_rank_they_cannot_have():
    assert look(alarms(width=16), {"codebook/erank": 8.0}) == []
    assert levels(alarms(width=16), {"codebook/erank": 3.9}) == [("codebook/erank", "alarm")]
    assert look(alarms(size=8), {"codebook/erank": 7.5}) == []
    assert levels(alarms(size=8), {"codebook/erank": 1.9}) == [("codebook/erank", "alarm")]
    assert levels(alarms(width=64), {"codebook/erank": 15.9}) == [("codebook/erank", "range")]
    assert levels(alarms(width=64), {"codebook/erank": 9.9}) == [("codebook/erank", "alarm")]


def test_a_single_code_is_not_judged_but_the_embeddings_are():
    metrics = dict.fromkeys(HEALTHY, 0.0) | {"codebook/agree1": 1.0, "embedding/ts_drift_v": 0.6}
    metrics |= {"codebook/ppl_v": 1.0, "codebook/ppl_t": 1.0, "embedding/unif_v": -3.0, "embedding/unif_t": -3.0}
    assert levels(alarms(size=1), metrics) == [("embedding/ts_drift_v", "alarm")]


def test_uneven_mass_is_no_alarm_where_it_was_asked_for():
    uneven = {"codebook/marg_l1": 0.9}
    assert look(alarms(balance=0.8), uneven) == []
    assert levels(alarms(balance=0.8, solver="ipot"), uneven) == [("codebook/marg_l1", "alarm")]  # knows no balance


def test_the_same_metrics_give_every_worker_the_same_alarms():
    first, second = alarms(), alarms()
    generator = torch.Generator().manual_seed(0)
    told = 0
    for step in range(0, 4000, 50):
        drawn = torch.rand(len(HEALTHY), generator=generator, dtype=torch.float64).tolist()
        metrics = {key: 2 * value * share for (key, value), share in zip(HEALTHY.items(), drawn, strict=True)}
        found = look(first, metrics, step)
        assert found == look(second, dict(reversed(metrics.items())), step)
        told += len(found)
    assert told > 5


# What is told.


def measured_keys() -> set[str]:
    """Every metric that a measured step and the usage counts give."""
    rows = F.normalize(torch.randn(4, 3), dim=1)
    usage, scores = CodeUsage(4, 1), rows @ rows.T
    usage.count(scores, scores)
    usage.flush(SoloWorkers())
    targets = F.softmax(scores, 1)
    metrics = embedding_metrics(rows, rows, rows, rows) | code_metrics(rows)
    metrics |= target_metrics((scores, scores), (targets, targets), 0.1, 0.0)
    metrics |= mass_metrics(targets.mean(0).expand(2, 4), torch.zeros(2, 4), 0.05)
    return {*metrics, *usage.metrics()}


def test_every_row_judges_a_metric_that_exists():
    assert {row.key for row in ROWS} - measured_keys() == {"codebook/collapse"}
    assert set(HEALTHY) <= measured_keys()


def test_what_to_do_is_one_line_that_names_settings_there_are():
    settings = PRESETS["codis-tiny"].model_dump()
    for row in ROWS:
        assert "\n" not in row.advice and len(row.advice) < 160
        names = re.findall(r"\b(?:objective|optim)(?:\.\w+)+", row.advice)
        assert names, row.key
        for name in names:
            node = settings
            for part in name.split("."):
                node = node[part]
