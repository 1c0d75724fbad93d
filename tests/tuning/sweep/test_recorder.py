"""Events of trials in the record and in MLflow: after interruptions, losses, and without a server."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import storage
from tests.support.mlflow_runs import children, history, run_of
from tests.support.sweep_cases import ended, events, recorded
from tests.support.trial_cases import ListenerWithoutThread
from tuning.sweep import recorder as recorder_module
from tuning.sweep.recorder import Recorder
from tuning.sweep.sweep_record import METRIC, Sweep


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """Events are handled when they are sent, in this process."""
    monkeypatch.setattr(recorder_module, "Listener", ListenerWithoutThread)
    monkeypatch.setattr(recorder_module, "ray", SimpleNamespace(get=lambda value: value))


def test_what_trials_say_is_in_the_record_and_in_one_run_each(store, tmp_path):
    folder = tmp_path / "sweep"
    recorder = Recorder(recorded(tmp_path, 5), str(folder), "manifest")
    for trial_id in ("t00", "t01", "t02", "t03"):
        recorder.trial_started(trial_id, None)
        for event in events(trial_id, [0.1, 0.2, 0.3]):
            recorder.record_event(event)
    assert [trial.status for trial in Sweep.load(str(folder)).trials] == ["running"] * 4 + ["pending"]
    alarm = {"trial_id": "t01", "seed": None, "kind": "alarm", "step": 3, "samples": 30, "key": "codebook/dead"}
    for level in ("range", "alarm", "alarm"):
        recorder.record_event(alarm | {"level": level, "text": f"many dead codes ({level})"})
    recorder.record_event(ended("t00", "finished", **{METRIC: 0.5, "val/images": float("nan")}))
    recorder.trial_stopped("t01", "stopped by asha at 30 samples")
    recorder.record_event(next(events("t01", [0.9])) | {"kind": "validation", "metrics": {METRIC: 0.9}})  # too late
    recorder.record_event(ended("t02", "failed", "step 3: cma is not finite"))
    recorder.trial_failed("t02", "its process was lost")
    recorder.record_event(ended("t03", "paused"))
    recorder.close("KILLED", "killed")

    sweep = Sweep.load(str(folder))
    assert [t.status for t in sweep.trials] == ["finished", "pruned", "failed", "pending", "pending"]
    assert [t.reason for t in sweep.trials[1:3]] == ["stopped by asha at 30 samples", "step 3: cma is not finite"]
    assert sweep.trials[0].metrics == {METRIC: 0.5} and sweep.trials[1].metrics[METRIC] == 0.3
    assert sweep.trials[1].alarms == ["many dead codes (alarm)"]
    assert all(t.curve == [(10, 0.1), (20, 0.2), (30, 0.3)] and t.samples_seen == 30 for t in sweep.trials[:4])
    runs = children(store, sweep.mlflow_run_id)
    shown = {name: (run.info.status, run.data.tags["triptych.status"]) for name, run in runs.items()}
    assert shown == {
        "t00": ("FINISHED", "finished"),
        "t01": ("KILLED", "pruned"),
        "t02": ("FAILED", "failed"),
        "t03": ("KILLED", "interrupted"),
    }
    assert {t.mlflow_run_id for t in sweep.trials[:4]} == {run.info.run_id for run in runs.values()}
    first = runs["t00"].info.run_id
    assert history(store, first, "train/loss/cma") == [(n, 1 / n) for n in (1, 2, 3)]
    assert history(store, first, METRIC) == [(1, 0.1), (2, 0.2), (3, 0.3), (3, 0.5)]
    assert runs["t00"].data.metrics["perf/startup_seconds"] == 2.5
    assert runs["t00"].data.params["optim.batch_size"] == "10"
    parent = run_of(store, sweep.mlflow_run_id)
    assert parent.info.status == "KILLED" and parent.data.tags["triptych.kind"] == "sweep"
    assert parent.data.metrics["sweep/samples_used"] == 120 and parent.data.params["sweep.scheduler"] == "asha"


def test_a_new_driver_goes_on_with_the_runs_of_the_old_one(store, tmp_path):
    folder = str(tmp_path / "sweep")
    old = Recorder(recorded(tmp_path, 3), folder, "manifest")
    for trial_id in ("t00", "t01"):
        old.trial_started(trial_id, None)
        for event in events(trial_id, [0.1, 0.2]):
            old.record_event(event)
    stored = Sweep.load(folder)
    parent, before = stored.mlflow_run_id, children(store, stored.mlflow_run_id)
    # the driver is killed here: one trial had just ended, and one child had not come to the record
    stored.trial("t00").status, stored.trial("t00").metrics = "finished", {METRIC: 0.4}
    stored.trial("t01").mlflow_run_id = ""
    storage.write_bytes(f"{folder}/trials/t00/package/config.json", b"{}")

    new = Recorder(stored, folder, "manifest")
    new.trial_started("t01", None)
    for event in events("t01", [0.1, 0.2, 0.3]):
        new.record_event(event)
    new.record_event(ended("t01", "pruned", "codebook/collapse 0.95 is above 0.9"))
    new.begin_repeats()
    for event in (*events("t00", [0.2, 0.3], seed=7), ended("t00", "finished", seed=7, **{METRIC: 0.35})):
        new.record_event(event)
    new.close("FINISHED", "finished")

    sweep, after = Sweep.load(folder), children(store, parent)
    assert sweep.mlflow_run_id == parent and {n: r.info.run_id for n, r in after.items()} == {
        n: r.info.run_id for n, r in before.items()
    }
    assert {n: (r.info.status, r.data.tags["triptych.status"]) for n, r in after.items()} == {
        "t00": ("FINISHED", "finished"),
        "t01": ("KILLED", "pruned"),
    }
    assert [(r.seed, r.metrics, r.samples_seen) for r in sweep.trial("t00").repeats] == [(7, {METRIC: 0.35}, 30)]
    assert after["t00"].data.metrics[f"repeat/7/{METRIC}"] == 0.35 and after["t00"].data.metrics[METRIC] == 0.4
    assert sweep.trial("t00").curve == [(10, 0.1), (20, 0.2)] and len(sweep.trials) == 3
    assert run_of(store, parent).info.status == "FINISHED"
    old.close("KILLED", "killed")  # only to end its threads


def test_a_trial_that_never_trained_and_a_lost_repeat_are_in_the_record_with_their_reason(store, tmp_path):
    recorder = Recorder(recorded(tmp_path, 1), str(tmp_path / "sweep"), "manifest")
    recorder.add_trial("t07", {})
    recorder.record_event(ended("t07", "failed", "no permission"))
    recorder.trial_failed("t07", "its process was lost")
    recorder.record_event(ended("t00", "finished", **{METRIC: 0.5}))
    recorder.begin_repeats()
    recorder.record_event(ended("t00", "failed", "step 3: cma is not finite", seed=1))
    for seed in (1, 2):
        recorder.trial_failed("t00", "its process was lost", seed)
    recorder.close("FINISHED", "finished")
    done, failed = Sweep.load(str(tmp_path / "sweep")).trials
    assert (failed.status, failed.reason) == ("failed", "no permission")
    assert done.status == "finished" and done.alarms == [
        "repeat with seed 1 failed: step 3: cma is not finite",
        "repeat with seed 2 failed: its process was lost",
    ]


def test_a_sweep_whose_trials_mostly_fail_is_given_up(store, tmp_path):
    from pipelines.train.fit import TrainingFailed

    recorder = Recorder(recorded(tmp_path, 9), str(tmp_path / "sweep"), "manifest")
    for number in range(2):
        recorder.record_event(ended(f"t0{number}", "failed", "out of memory"))
        recorder.raise_if_most_failed()
    for event in events("t02", [0.1]):
        recorder.record_event(event)  # it trains, so the failures may be the others' own
    with pytest.raises(TrainingFailed, match="2 of 3 trials failed, so the sweep stops; the last one: out of memory"):
        recorder.raise_if_most_failed()
    for trial_id in ("t03", "t04"):
        for event in events(trial_id, [0.1]):
            recorder.record_event(event)
    recorder.raise_if_most_failed()
    recorder.close("FAILED", "failed")


def test_a_server_that_is_away_loses_no_point_and_stops_nothing(store, tmp_path, monkeypatch):
    import tuning.sweep.mlflow_runs
    from pipelines.tracking import run as tracking

    away = threading.Event()
    connect = tracking.connect

    def connect_unless_away(uri: str) -> Any:
        if away.is_set():
            raise ConnectionError("nobody there")
        return connect(uri)

    monkeypatch.setattr(tracking, "connect", connect_unless_away)
    monkeypatch.setattr(tuning.sweep.mlflow_runs, "connect", connect_unless_away)
    monkeypatch.setattr(tuning.sweep.mlflow_runs, "RETRY_SECONDS", 0.2)
    recorder = Recorder(recorded(tmp_path, 1), str(tmp_path / "sweep"), "manifest")
    away.set()
    recorder.trial_started("t00", None)
    for event in events("t00", [0.1, 0.2, 0.3]):
        recorder.record_event(event)
    recorder.record_event(ended("t00", "failed", "out of memory"))
    assert Sweep.load(str(tmp_path / "sweep")).trials[0].status == "failed"
    away.clear()
    recorder.close("FINISHED", "finished")
    (run,) = children(store, recorder.sweep.mlflow_run_id).values()
    assert history(store, run.info.run_id, "train/loss/cma") == [(n, 1 / n) for n in (1, 2, 3)]
    assert run.info.status == "FAILED" and Sweep.load(str(tmp_path / "sweep")).trials[0].mlflow_run_id
