"""A sweep before its first trial: defaults, what is refused, and a resume with the same flags."""

import pytest

from models.config import InputError
from tests.support.sweep_cases import PAIRS, base_of, write_space
from tuning.sweep.plan import SweepRequest, make_plan


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"search": "genetic"}, "--search genetic: one of grid, random, optuna"),
        ({"scheduler": "bohb"}, "--scheduler bohb: one of asha, halving, median, none"),
        ({"trials": 0}, "--trials 0"),
        ({"repeats": -1}, "--repeats -1"),
        ({"search": "optuna", "scheduler": "halving"}, "--scheduler asha"),
        ({"space": "codebook"}, "clip-tiny has no codebook"),
        ({"resume": True}, "no sweep to resume"),
    ],
)
def test_wrong_flags_are_one_line_and_leave_nothing(corpus, tmp_path, options, says):
    with pytest.raises(InputError) as caught:
        make_plan(SweepRequest(base_of(corpus, tmp_path / "out"), **options))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"val_data": "/no/such/folder"}, "/no/such/folder"),
        ({"train_data": ""}, "--train-data is missing"),
        ({"compute.workers": 99}, "compute.workers: 99 workers"),
        ({"name": "a/b"}, "--name"),
    ],
)
def test_wrong_data_is_one_line_and_leaves_nothing(corpus, tmp_path, changes, says):
    with pytest.raises(InputError) as caught:
        make_plan(SweepRequest(base_of(corpus, tmp_path / "out", **changes)))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_defaults_suit_the_space(corpus, tmp_path):
    def planned(**options: object) -> tuple[str, str, int]:
        base = base_of(corpus, tmp_path, "both-dual-tiny", **{"objective.queue.size": 4096})
        sweep = make_plan(SweepRequest(base, **options)).sweep
        return sweep.search, sweep.scheduler, sweep.trials_planned

    ranges = write_space(tmp_path, {"optim.learning_rate": {"loguniform": [1e-4, 1e-2]}})
    assert planned() == ("grid", "halving", 9)
    assert planned(trials=4) == ("random", "halving", 4)
    assert planned(trials=4, search="grid") == ("grid", "halving", 4)
    assert planned(space="weights") == ("random", "halving", 16)
    assert planned(space=ranges, search="optuna", trials=5) == ("optuna", "asha", 5)


def test_trials_share_protocol_and_length_and_are_validated_at_the_rungs(corpus, tmp_path):
    plan = make_plan(SweepRequest(base_of(corpus, tmp_path, "both-dual-tiny", **{"optim.epochs": 3})))
    sweep = plan.sweep
    assert sweep.samples_planned == 3 * PAIRS and sweep.protocol.pairs == 100
    assert [trial.trial_id for trial in sweep.trials] == [f"t{n:02d}" for n in range(9)]
    experiments = [sweep.experiment(trial) for trial in sweep.trials]
    assert {e.checkpoints.every for e in experiments} == {1 / 9}
    assert len({e.validation.model_dump_json() for e in experiments}) == 1
    assert len({(e.objective.temperature.start, e.objective.codebook.size) for e in experiments}) == 9


def test_a_sweep_is_resumed_with_the_same_flags_only(corpus, tmp_path, write_pairs):
    base = base_of(corpus, tmp_path)
    plan = make_plan(SweepRequest(base))
    plan.sweep.trials[0].status = "finished"
    plan.sweep.trials[1].status = "running"
    plan.sweep.save(plan.folder)
    with pytest.raises(InputError, match="a sweep of that name exists"):
        make_plan(SweepRequest(base))
    again = make_plan(SweepRequest(base, resume=True)).sweep
    assert [trial.status for trial in again.trials[:3]] == ["finished", "pending", "pending"]
    assert [trial.overrides for trial in again.trials] == [trial.overrides for trial in plan.sweep.trials]
    changed = {
        "trials_planned": SweepRequest(base, trials=3, search="grid", resume=True),
        "scheduler": SweepRequest(base, scheduler="none", resume=True),
        "repeats_planned": SweepRequest(base, repeats=1, resume=True),
        "optim.learning_rate": SweepRequest(base.override({"optim.learning_rate": 0.5}), resume=True),
        "seed": SweepRequest(base.override({"seed": 1}), resume=True),
        "preset": SweepRequest(base_of(corpus, tmp_path, "tcl-tiny"), space="temperature", resume=True),
        "val_data": SweepRequest(base.override({"val_data": write_pairs(20)}), resume=True),
    }
    for key, request in changed.items():
        with pytest.raises(InputError, match="--resume") as caught:
            make_plan(request)
        assert f"{key} is" in str(caught.value) and "\n" not in str(caught.value)
