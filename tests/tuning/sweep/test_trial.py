"""How a trial of a sweep ends: by what its run raised, and by nothing that was reported before."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from models.config import InputError
from pipelines import storage
from pipelines.config import PRESETS, ExperimentConfig
from pipelines.train import fit as training
from pipelines.train.alarms import COLLAPSE, ROWS
from pipelines.train.events import Event
from pipelines.train.fit import Following
from tests.support.paths import ROOT
from tests.support.trial_cases import TEXT, FakeMailbox, ListenerWithoutThread, trial_run
from tuning.sweep import trial
from tuning.sweep.schedulers import TIME
from tuning.sweep.sweep_record import METRIC
from tuning.sweep.trial import FATAL_ALARMS, TrialFailed

PLACE = {"step": 9, "samples": 90, "planned": 100}


@pytest.fixture
def ended(monkeypatch, tmp_path) -> Callable[[Callable[[], Any]], Event]:
    """How a trial ends that is validated, warned of a collapse, and then does this; no process is started."""

    def end(then: Callable[[], Any]) -> Event:
        def fit(experiment: ExperimentConfig, resume: bool, following: Following) -> Any:
            put = following.mailbox.put.remote
            put(PLACE | {"kind": "validation", "metrics": {METRIC: 0.5}})
            put(
                PLACE | {"kind": "alarm", "metrics": {}, "level": "alarm", "key": COLLAPSE, "value": 0.95, "text": TEXT}
            )
            return then()

        monkeypatch.setattr(trial, "fit", fit)
        monkeypatch.setattr(trial, "Listener", ListenerWithoutThread)
        monkeypatch.setattr(trial, "ray", SimpleNamespace(get=lambda value: value))
        mailbox = FakeMailbox()
        one = trial_run(PRESETS["clip-tiny"].override({"out": str(tmp_path), "name": "sweep"}), mailbox)
        try:
            result = one.step()
        except TrialFailed as error:
            assert str(error) == mailbox.events[-1]["reason"] and mailbox.events[-1]["status"] == "failed"
        else:
            assert result == {TIME: 90, METRIC: 0.5, "status": mailbox.events[-1]["status"], "done": True}
        return mailbox.events[-1]

    return end


def stopped_by(monkeypatch, returned: dict[str, Any]) -> Callable[[], None]:
    """The driver's part of a run whose workers return this."""
    trainer = SimpleNamespace(fit=lambda: SimpleNamespace(return_value=returned))
    monkeypatch.setattr(training, "TorchTrainer", lambda *_, **__: trainer)
    job: Any = SimpleNamespace(experiment=PRESETS["clip-tiny"], manifest=SimpleNamespace(count=100))
    return lambda: training._train(job, "/run")


def raising(error: Exception) -> Callable[[], None]:
    def throw() -> None:
        raise error

    return throw


def test_a_trial_that_an_alarm_ended_is_pruned_with_the_runs_own_reason(ended, monkeypatch):
    end = ended(stopped_by(monkeypatch, {"stopped": f"step 9: {TEXT}", "alarm": COLLAPSE}))
    assert (end["status"], end["reason"]) == ("pruned", f"step 9: {TEXT}")


def test_a_trial_that_left_is_paused_and_one_that_went_on_is_finished_whatever_it_was_warned_of(ended, monkeypatch):
    assert ended(stopped_by(monkeypatch, {"left": 90}))["status"] == "paused"
    end = ended(lambda: SimpleNamespace(metrics={METRIC: 0.6}))
    assert (end["status"], end["reason"], end["metrics"]) == ("finished", "", {METRIC: 0.6})


@pytest.mark.parametrize(
    "reason",
    [
        "step 9: cma is not finite; lower optim.learning_rate or set optim.clip_norm",
        "epoch 0: pairs.max_skipped: 500 of 1000 samples were skipped",
    ],
)
def test_whatever_else_stops_the_workers_after_a_collapse_is_a_failure_with_its_reason(ended, monkeypatch, reason):
    end = ended(stopped_by(monkeypatch, {"stopped": reason, "alarm": ""}))
    assert (end["status"], end["reason"]) == ("failed", reason)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("s3://bucket: no permission"), "s3://bucket: no permission"),
        (storage.Unavailable("s3://bucket: no answer"), "s3://bucket: no answer"),
        (OSError("no space left\non device"), "OSError: no space left"),
    ],
)
def test_what_the_run_raises_after_a_collapse_is_a_failure_with_its_reason(ended, error, reason):
    end = ended(raising(error))
    assert (end["status"], end["reason"]) == ("failed", reason)


def test_lost_workers_after_a_collapse_are_a_failure(ended, monkeypatch):
    trainer = SimpleNamespace(fit=raising(ActorDiedError()))
    stopped = stopped_by(monkeypatch, {})
    monkeypatch.setattr(training, "TorchTrainer", lambda *_, **__: trainer)
    end = ended(stopped)
    assert (end["status"], end["reason"]) == ("failed", "Ray lost the run (ActorDiedError); go on with --resume")


def test_what_ends_a_trial_is_an_alarm_that_there_is():
    assert set(FATAL_ALARMS) <= {row.key for row in ROWS if row.bounds[1] is not None}


def test_a_trials_process_imports_no_mlflow():
    program = "import sys, tuning.sweep.trial; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
