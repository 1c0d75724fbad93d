"""Suggestions: unfinished trials first, then new points under free ids."""

from tests.support.sweep_cases import make_sweep
from tuning.sweep.space import Dimension
from tuning.sweep.sweep_record import Trial


def test_optuna_goes_on_with_unfinished_trials_before_it_makes_up_others_under_free_ids():
    from tuning.sweep.optuna_search import Suggestions

    key = "optim.learning_rate"
    ended = Trial(trial_id="t00", overrides={key: 0.001}, status="finished", curve=[(9000, 0.5)])
    unfinished = Trial(trial_id="t02", overrides={key: 0.002}, curve=[(1024, 0.1)])
    sweep, space = make_sweep([ended, unfinished]), {key: Dimension("loguniform", [1e-4, 1e-2])}
    first, again = (Suggestions(sweep, space) for _ in range(2))
    tasks = [first.suggest(str(number))["task"] for number in range(3)]
    assert [task["trial_id"] for task in tasks] == ["t02", "t01", "t03"]
    assert tasks[0]["overrides"] == {key: 0.002} and tasks[0]["undecided"] == (1024, 0.1)
    assert all(1e-4 <= task["overrides"][key] <= 1e-2 for task in tasks) and tasks[1]["undecided"] is None
    assert tasks == [again.suggest(str(number))["task"] for number in range(3)], "drawn by the sweep's seed"
