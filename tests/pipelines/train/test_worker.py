"""How a worker's run ends, and what the driver makes of it: no Ray, ranks are threads."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.train import ControllerError, WorkerGroupError

from models.collectives import SoloWorkers, Workers
from models.config import InputError
from pipelines.config import PRESETS
from pipelines.step.state import StepResult
from pipelines.train import fit as training
from pipelines.train import worker
from pipelines.train.alarms import COLLAPSE
from pipelines.train.events import Event
from pipelines.train.fit import TrainingFailed, TrainingLeft
from pipelines.train.health import Watch
from pipelines.train.monitor import Meter
from pipelines.train.worker import Job, Run, train_worker
from tests.support import tiny
from tests.support.fake_workers import on_threads

CODES, STEP, PLANNED = 200, 50, 1000


class Box:
    """Stands for the driver's mailbox."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.put = SimpleNamespace(remote=self.events.append)


def job(fatal: tuple[str, ...]) -> Job:
    base, goal = PRESETS["both-dual-tiny"], tiny.objective("both-dual", codebook__size=CODES)
    experiment = base.model_copy(update={"objective": goal})
    manifest: Any = SimpleNamespace(count=PLANNED)
    return Job(experiment, manifest, manifest, "", "", Box(), fatal=fatal)


def reporting(job: Job, workers: Workers, codes: int, loss: float = 1.0) -> Run:
    """A run that has trained a step, with so many codes in use, alike and by both of each pair; then it reports."""
    goal = job.experiment.objective
    run = Run.__new__(Run)
    run.job, run.experiment, run.workers, run.planned, run.metrics = job, job.experiment, workers, PLANNED, {}
    run.state = tiny.state(goal)
    run.progress = SimpleNamespace(step=STEP, seen=PLANNED // 2)
    run.watch = Watch(run.state, tiny.settings(goal), workers, 8)
    run.meter, run.stream = Meter(), SimpleNamespace(close=lambda: None)
    value, usage = torch.tensor(loss), run.state.usage
    run.meter.add(StepResult(value, {}, {"code": value}, torch.tensor(1.0), {}, value.isfinite()), 4, STEP)
    usage.pending_hits[:, :codes] = 20 * CODES // codes
    usage.pending_agree.copy_(torch.tensor([20 * CODES, 40 * CODES]))
    usage.pending_pairs.fill_(20 * CODES)
    run.train = lambda: run._report_step(1e-3) or {}
    return run


def outcome(monkeypatch, job: Job, codes: int, loss: float = 1.0) -> dict[str, Any]:
    """What `train_worker` returns on both of two workers."""
    mine = threading.local()
    monkeypatch.setattr(worker, "Run", lambda job: reporting(job, mine.workers, codes, loss))

    def one(workers: Workers) -> dict[str, Any]:
        mine.workers = workers
        return train_worker(job)

    first, second = on_threads(2, one)
    assert first == second
    return first


def told(job: Job) -> list[tuple[str, str]]:
    return [(event["key"], event["level"]) for event in job.mailbox.events if event["kind"] == "alarm"]


def test_a_collapse_ends_the_run_on_all_workers_where_it_is_fatal(monkeypatch):
    fatal = job((COLLAPSE,))
    ended = outcome(monkeypatch, fatal, codes=10)
    assert ended["alarm"] == COLLAPSE
    assert ended["stopped"].startswith(f"step {STEP}: {COLLAPSE} 1 is above 0.9")
    assert (COLLAPSE, "alarm") in told(fatal)


def test_a_collapse_only_warns_where_it_is_not_fatal(monkeypatch):
    plain = job(())
    assert outcome(monkeypatch, plain, codes=10) == {}
    assert (COLLAPSE, "alarm") in told(plain)


def test_a_milder_level_of_a_fatal_key_ends_nothing(monkeypatch):
    fatal = job(("codebook/ppl_v",))
    assert outcome(monkeypatch, fatal, codes=50) == {}
    assert ("codebook/ppl_v", "range") in told(fatal)


@pytest.mark.parametrize("fatal", [(), (COLLAPSE,)])
def test_an_alarm_of_level_stop_ends_every_run_after_all_alarms_are_told(monkeypatch, fatal):
    stopped = job(fatal)
    ended = outcome(monkeypatch, stopped, codes=2)
    assert ended["alarm"] == "codebook/ppl_v" and "codebook/ppl_v 2 is below 4" in ended["stopped"]
    assert {("codebook/ppl_v", "stop"), ("codebook/ppl_t", "stop"), (COLLAPSE, "alarm")} <= set(told(stopped))


def test_a_loss_that_is_no_number_ends_the_run_by_no_alarm(monkeypatch):
    ended = outcome(monkeypatch, job((COLLAPSE,)), codes=10, loss=float("nan"))
    assert ended["alarm"] == "" and "code, total is not finite" in ended["stopped"]


def test_too_many_skipped_samples_end_the_run_by_no_alarm(monkeypatch):
    def skips(job: Job) -> Run:
        run = reporting(job, SoloWorkers(), 50)
        run.device = torch.device("cpu")
        run.progress = SimpleNamespace(
            step=STEP, epoch_skipped=0, epoch_good=PLANNED // 2, position=SimpleNamespace(epoch=0)
        )
        run.records = SimpleNamespace(skipped_in_epoch=PLANNED // 2)
        run.train = run._end_epoch
        return run

    monkeypatch.setattr(worker, "Run", skips)
    ended = train_worker(job((COLLAPSE,)))
    assert ended["alarm"] == "" and "500 of 1000 samples were skipped" in ended["stopped"]


# What the driver makes of it.


def end(monkeypatch, returned: dict[str, Any]) -> None:
    """The driver's part of a run whose workers return this."""
    trainer = SimpleNamespace(fit=lambda: SimpleNamespace(return_value=returned))
    monkeypatch.setattr(training, "TorchTrainer", lambda *_, **__: trainer)
    training._train(job(()), "/run")


@pytest.mark.parametrize("alarm", ["", COLLAPSE])
def test_a_stopped_run_failed_with_its_reason_and_the_alarm_that_ended_it(monkeypatch, alarm):
    with pytest.raises(TrainingFailed) as failed:
        end(monkeypatch, {"stopped": "step 9: why", "alarm": alarm})
    assert str(failed.value) == "step 9: why" and failed.value.alarm == alarm


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            WorkerGroupError("text", {0: RuntimeError("Traceback:\nOSError: no space")}),
            "a worker failed more than compute.max_failures times: OSError: no space; go on with --resume",
        ),
        (WorkerGroupError("text", {1: InputError("s3://bucket: no permission")}), "s3://bucket: no permission"),
        (
            ControllerError(RuntimeError("Traceback:\nValueError: no such state")),
            "Ray Train gave the run up: ValueError: no such state; go on with --resume",
        ),
    ],
)
def test_a_run_that_ray_train_gave_up_failed_for_what_ray_train_says_and_by_no_alarm(monkeypatch, error, reason):
    def fit() -> None:
        raise error

    monkeypatch.setattr(training, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=fit))
    with pytest.raises(TrainingFailed) as failed:
        training._train(job(()), "/run")
    assert str(failed.value) == reason and failed.value.alarm == ""


def test_a_run_that_left_or_came_to_its_end_has_not_failed(monkeypatch):
    end(monkeypatch, {})
    with pytest.raises(TrainingLeft):
        end(monkeypatch, {"left": 500})


def test_numbers_of_a_checkpoint_are_those_of_its_step_however_late_its_upload_ends(monkeypatch):
    reported: list[dict[str, float]] = []
    monkeypatch.setattr(worker.ray.train, "report", lambda metrics, **_: reported.append(metrics))
    for name in ("_report_step", "_gather_position"):
        monkeypatch.setattr(Run, name, lambda *_: None)
    run = Run.__new__(Run)
    run.job, run.workers, run.planned, run.metrics = job(()), SimpleNamespace(rank=1), PLANNED, {}
    run.state = SimpleNamespace(model=None, optimizer=SimpleNamespace(param_groups=[{"lr": 0.1}]))
    run.validation = SimpleNamespace(score=lambda model: {"val/recall_at_1_mean": 0.5})
    run.records, run.meter, run.device = SimpleNamespace(gather=lambda *_: None), Meter(), None
    run.progress = SimpleNamespace(step=6, seen=96)
    run._checkpoint()
    run.metrics |= {"step": 16, "val/recall_at_1_mean": 0.1}  # the next checkpoint's, while this one is uploaded
    assert (reported[0]["step"], reported[0]["val/recall_at_1_mean"]) == (6, 0.5)
