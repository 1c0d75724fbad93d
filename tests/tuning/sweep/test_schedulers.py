"""Which trials go on, decided on recorded curves, without training."""

import itertools
import random

import pytest

from benchmarks.replay import grid_samples, replay_asha, replay_halving
from tests.support.sweep_cases import PLANNED, make_sweep
from tuning.sweep import schedulers
from tuning.sweep.schedulers import (
    TIME,
    finalists,
    halving,
    pause_points,
    replay_history,
    rungs,
    undecided_validation,
    validation_share,
)
from tuning.sweep.sweep_record import METRIC, Trial


def curve(final: float, batch: int = 64, late: float = 0.0) -> list[tuple[int, float]]:
    """Nine validations, each at the first batch's end after its share; recall rises as a root, `late` ones later."""
    points = []
    for place in range(1, 10):
        seen = min(-(-place * PLANNED // 9 // batch) * batch, PLANNED)
        share = max(seen / PLANNED - late, 0.0)
        points.append((seen, final * (share / (1 - late)) ** 0.5))
    return points


def grid(count: int = 9) -> dict[str, list[tuple[int, float]]]:
    return {f"t{n}": curve(0.1 + 0.05 * ((4 * n) % count)) for n in range(count)}


def test_rungs_are_a_ninth_and_a_third():
    assert rungs(9000) == [1000, 3000]
    assert rungs(20_000) == [2222, 6666]
    assert rungs(1) == [] and rungs(3) == [1]


@pytest.mark.parametrize("every", [0.2, 1.0, 1 / 9, 0.1, 0.05, 1 / 18, 0.01])
def test_validations_meet_the_rungs_and_are_not_rarer_than_asked(every):
    share = validation_share(every)
    assert share <= every + 1e-12
    for rung in (1 / 9, 1 / 3):
        assert (rung / share) == pytest.approx(round(rung / share))
    assert share >= min(every, 1 / 9) / 2, "and no finer than that takes"


def test_a_trial_waits_for_the_scheduler_only_where_it_decides():
    assert pause_points("none", PLANNED, 1 / 9) == pause_points("halving", PLANNED, 1 / 9) == ()
    assert pause_points("asha", PLANNED, 1 / 9) == (1000, 3000)
    assert pause_points("median", PLANNED, 1 / 9) == tuple(range(1000, 9000, 1000))


def test_halving_keeps_a_third_at_each_rung_and_finds_the_best():
    curves = grid()
    replayed = replay_halving(curves, list(curves), PLANNED)
    best = max(curves, key=lambda name: curves[name][-1][1])
    assert replayed.winner == best and replayed.finished == [best]
    first, second, last = (curves["t0"][place][0] for place in (0, 2, 8))
    assert replayed.samples == 6 * first + 2 * second + last
    assert replayed.samples / grid_samples(curves) < 0.4


def test_the_order_of_trials_does_not_matter_to_halving():
    curves = grid()
    orders = [list(curves), list(curves)[::-1], random.Random(0).sample(list(curves), 9)]
    assert len({replay_halving(curves, order, PLANNED)[:2] for order in orders}) == 1


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [1, 1]), (2, [1, 1]), (3, [1, 1]), (4, [2, 1]), (7, [3, 1]), (30, [10, 4])]
)
def test_halving_takes_any_number_of_trials(count, kept):
    curves = {f"t{n:02d}": curve(0.1 + n / 100) for n in range(count)}
    samples = [curves["t00"][place][0] for place in (0, 2, 8)]
    expected = (count - kept[0]) * samples[0] + (kept[0] - kept[1]) * samples[1] + kept[1] * samples[2]
    replayed = replay_halving(curves, list(curves), PLANNED)
    assert replayed.samples == expected and replayed.winner == f"t{count - 1:02d}"


def test_all_wait_for_the_last_trial_of_a_rung():
    curves = grid()
    trials = [Trial(trial_id=name, curve=points[:1]) for name, points in curves.items()]
    trials[4].curve = []
    turn = halving(trials, PLANNED)
    assert turn.until == 1000 and turn.trials == [trials[4]] and not turn.pruned


def test_a_failed_trial_counts_in_its_rung_and_holds_nobody_up():
    curves = grid()
    trials = [Trial(trial_id=name, curve=points[:1]) for name, points in curves.items()]
    best = max(trials, key=lambda trial: trial.recall)
    best.curve, best.status = [], "failed"
    turn = halving(trials, PLANNED)
    assert turn.until == 3000 and len(turn.trials) == 3 and best not in turn.trials
    assert set(turn.pruned) == {t.trial_id for t in trials} - {t.trial_id for t in turn.trials} - {best.trial_id}
    assert all("of 9 at 1,024 samples: recall 0." in reason for reason in turn.pruned.values())


def test_a_trial_that_fails_later_changes_nothing_behind_it():
    curves = grid()
    trials = [Trial(trial_id=name, curve=points[:1]) for name, points in curves.items()]
    before = halving(trials, PLANNED)
    for trial in trials:
        if trial.trial_id in before.pruned:
            trial.status, trial.reason = "pruned", before.pruned[trial.trial_id]
    before.trials[0].status = "failed"
    after = halving(trials, PLANNED)
    assert after.pruned == before.pruned and after.trials == before.trials[1:]


def test_halving_decides_from_the_record_alone_wherever_it_was_interrupted():
    curves = grid()
    whole = replay_halving(curves, list(curves), PLANNED)
    for rung, interrupted in itertools.product((1, 3), range(1, 9)):
        known = [
            Trial(trial_id=n, curve=points[:rung] if place < interrupted else points[: rung - 1])
            for place, (n, points) in enumerate(curves.items())
        ]
        turn = halving(known, PLANNED)
        members = {trial.trial_id for trial in turn.trials}
        assert members == {t.trial_id for t in known if t.at(turn.until) is None} - set(turn.pruned)
        assert whole.winner not in turn.pruned


def test_equal_trials_are_kept_in_their_order():
    trials = [Trial(trial_id=f"t{n}", curve=[(1024, 0.5)]) for n in range(6)]
    assert [trial.trial_id for trial in halving(trials, PLANNED).trials] == ["t0", "t1"]


def test_asha_finds_the_best_in_any_order_and_costs_less_than_the_grid():
    curves = grid()
    orders = [list(curves), list(curves)[::-1], random.Random(0).sample(list(curves), 9)]
    replayed = [replay_asha(curves, order, PLANNED, at_once=2) for order in orders]
    best = max(curves, key=lambda name: curves[name][-1][1])
    assert {result.winner for result in replayed} == {best}
    assert sum(result.samples for result in replayed) / 3 / grid_samples(curves) < 0.8


def test_asha_stops_whoever_is_below_the_best_third_of_those_before():
    falling = {f"t{n}": curve(0.9 - n / 10) for n in range(6)}
    assert replay_asha(falling, list(falling), PLANNED, at_once=1).finished == ["t0"]
    rising = dict(reversed(falling.items()))
    assert replay_asha(rising, list(rising), PLANNED, at_once=1).finished == list(rising)


class Live:
    """A trial of the present driver."""

    trial_id = "live"


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_resumed_scheduler_decides_as_the_earlier_one_would(name):
    past = [Trial(trial_id=f"t{n}", curve=curve(0.5 + n / 10), status="finished") for n in range(3)]
    fresh, resumed = (schedulers.tune_scheduler(name, PLANNED) for _ in range(2))
    replay_history(resumed, make_sweep(past, name))
    poor = {TIME: 1024, METRIC: 0.01}
    for scheduler, says in ((fresh, "CONTINUE"), (resumed, "STOP")):
        scheduler.on_trial_add(None, Live())
        assert scheduler.on_trial_result(None, Live(), poor) == says


def test_what_a_trial_will_report_again_is_not_replayed():
    held, between = Trial(trial_id="a", curve=[(1024, 0.3)]), Trial(trial_id="b", curve=[(1024, 0.3), (2048, 0.4)])
    sweep = make_sweep([held, between])
    assert undecided_validation(held, sweep) == (1024, 0.3) and undecided_validation(between, sweep) is None
    assert undecided_validation(Trial(trial_id="c"), sweep) is None
    scheduler = schedulers.tune_scheduler("asha", PLANNED)
    replay_history(scheduler, sweep)
    rung = scheduler._brackets[0]._rungs[-1]
    assert rung == (1000, {"b": 0.3})


def test_finalists_are_the_best_third_and_at_most_three():
    trials = [
        Trial(trial_id="half", status="pruned", samples_seen=3000, curve=[(3000, 0.9)]),
        Trial(trial_id="best", status="finished", samples_seen=9000, metrics={METRIC: 0.6}),
        Trial(trial_id="lost", status="failed", samples_seen=8000, curve=[(8000, 0.9)]),
        Trial(trial_id="next", status="finished", samples_seen=9000, metrics={METRIC: 0.5}),
        *(Trial(trial_id=f"t{n}", status="pruned", samples_seen=1000, curve=[(1000, n / 10)]) for n in range(5)),
    ]
    assert [trial.trial_id for trial in finalists(make_sweep(trials))] == ["best", "next", "half"]
    assert [trial.trial_id for trial in finalists(make_sweep(trials[:3]))] == ["best"]
    many = [Trial(trial_id=f"t{n}", status="finished", samples_seen=9000, metrics={METRIC: n / 99}) for n in range(40)]
    assert [trial.trial_id for trial in finalists(make_sweep(many))] == ["t39", "t38", "t37"]


def test_what_became_of_a_repeat_does_not_change_who_the_finalists_are():
    trials = [
        Trial(trial_id="half", status="pruned", samples_seen=3000, curve=[(3000, 0.9)]),
        Trial(trial_id="next", status="pruned", samples_seen=3000, curve=[(3000, 0.5)]),
    ]
    assert [trial.trial_id for trial in finalists(make_sweep(trials))] == ["half"]
    trials[0].alarms = ["repeat with seed 1 failed: step 3: cma is not finite"]
    assert [trial.trial_id for trial in finalists(make_sweep(trials))] == ["half"]
    trials[0].alarms = ["codebook/collapse 0.95 is above 0.9: pairs agree because few codes are in use"]
    assert [trial.trial_id for trial in finalists(make_sweep(trials))] == ["next"]
