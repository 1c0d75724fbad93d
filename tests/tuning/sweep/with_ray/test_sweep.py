"""Sweeps: mistakes before the first trial, the record and MLflow, a trial's holds, and a driver that is killed."""

import io
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq
import pytest

from models.config import InputError
from pipelines import storage
from pipelines.artifacts.resolve import listed_checkpoints, local_copy
from pipelines.config import PRESETS, ExperimentConfig
from pipelines.data.manifest import Manifest
from pipelines.data.synthetic import synthesize
from tests.support.mlflow_runs import history, run_of
from tests.support.paths import ROOT
from tuning.sweep.live_table import progress_line, short_names, summary, sweep_table
from tuning.sweep.plan import Request, make_plan
from tuning.sweep.schedulers import TIME
from tuning.sweep.sweep_record import METRIC, Protocol, Sweep, Trial

PAIRS = 300
SMALL = {
    "optim.min_samples": 0,
    "optim.batch_size": 32,
    "validation.pairs": 100,
    "progress.every": 1,
    "pairs.record_ids": True,
    "compute.threads": 1,
}
RUN = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
logging.getLogger("tuning").setLevel("INFO")
from pipelines.config import ExperimentConfig
from tuning.sweep.plan import Request
from tuning.sweep.run_sweep import tune
base, options = json.loads(sys.argv[1])
print(tune(Request(ExperimentConfig.model_validate(base), **options)).text)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A generated corpus."""
    folder = tmp_path_factory.mktemp("corpus") / "data"
    synthesize(str(folder), pairs=PAIRS, image_size=32)
    return folder


@pytest.fixture
def store(tmp_path, monkeypatch, empty_mlflow) -> str:
    """MLflow's file of the test's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def base_of(corpus: Path, out: Path, preset: str = "clip-tiny", **changes: object) -> ExperimentConfig:
    paths = {"train_data": f"{corpus}/train", "val_data": f"{corpus}/val", "out": str(out), "name": "sweep"}
    return PRESETS[preset].override(SMALL | paths | changes)


def write_space(folder: Path, space: dict[str, Any]) -> str:
    path = folder / "space.json"
    path.write_text(json.dumps(space))
    return str(path)


# Before the first trial


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
        make_plan(Request(base_of(corpus, tmp_path / "out"), **options))
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
        make_plan(Request(base_of(corpus, tmp_path / "out", **changes)))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_defaults_suit_the_space(corpus, tmp_path):
    def planned(**options: object) -> tuple[str, str, int]:
        base = base_of(corpus, tmp_path, "both-dual-tiny", **{"objective.queue.size": 4096})
        sweep = make_plan(Request(base, **options)).sweep
        return sweep.search, sweep.scheduler, sweep.trials_planned

    ranges = write_space(tmp_path, {"optim.learning_rate": {"loguniform": [1e-4, 1e-2]}})
    assert planned() == ("grid", "halving", 9)
    assert planned(trials=4) == ("random", "halving", 4)
    assert planned(trials=4, search="grid") == ("grid", "halving", 4)
    assert planned(space="weights") == ("random", "halving", 16)
    assert planned(space=ranges, search="optuna", trials=5) == ("optuna", "asha", 5)


def test_trials_share_protocol_and_length_and_are_validated_at_the_rungs(corpus, tmp_path):
    plan = make_plan(Request(base_of(corpus, tmp_path, "both-dual-tiny", **{"optim.epochs": 3})))
    sweep = plan.sweep
    assert sweep.samples_planned == 3 * PAIRS and sweep.protocol.pairs == 100
    assert [trial.trial_id for trial in sweep.trials] == [f"t{n:02d}" for n in range(9)]
    experiments = [sweep.experiment(trial) for trial in sweep.trials]
    assert {e.checkpoints.every for e in experiments} == {1 / 9}
    assert len({e.validation.model_dump_json() for e in experiments}) == 1
    assert len({(e.objective.temperature.start, e.objective.codebook.size) for e in experiments}) == 9


def test_a_sweep_is_resumed_with_the_same_flags_only(corpus, tmp_path, write_pairs):
    base = base_of(corpus, tmp_path)
    plan = make_plan(Request(base))
    plan.sweep.trials[0].status = "finished"
    plan.sweep.trials[1].status = "running"
    plan.sweep.save(plan.folder)
    with pytest.raises(InputError, match="a sweep of that name exists"):
        make_plan(Request(base))
    again = make_plan(Request(base, resume=True)).sweep
    assert [trial.status for trial in again.trials[:3]] == ["finished", "pending", "pending"]
    assert [trial.overrides for trial in again.trials] == [trial.overrides for trial in plan.sweep.trials]
    changed = {
        "trials_planned": Request(base, trials=3, search="grid", resume=True),
        "scheduler": Request(base, scheduler="none", resume=True),
        "repeats_planned": Request(base, repeats=1, resume=True),
        "optim.learning_rate": Request(base.override({"optim.learning_rate": 0.5}), resume=True),
        "seed": Request(base.override({"seed": 1}), resume=True),
        "preset": Request(base_of(corpus, tmp_path, "tcl-tiny"), space="temperature", resume=True),
        "val_data": Request(base.override({"val_data": write_pairs(20)}), resume=True),
    }
    for key, request in changed.items():
        with pytest.raises(InputError, match="--resume") as caught:
            make_plan(request)
        assert f"{key} is" in str(caught.value) and "\n" not in str(caught.value)


# The record and MLflow


def recorded(folder: Path, trials: int) -> Sweep:
    sweep = Sweep(
        name="sweep",
        preset="clip-tiny",
        base=PRESETS["clip-tiny"].override({"out": str(folder), "name": "sweep", "optim.batch_size": 10}),
        space={"optim.learning_rate": {"grid": [0.001]}},
        search="grid",
        scheduler="asha",
        trials_planned=trials,
        samples_planned=100,
        protocol=Protocol(val_data="v", val_manifest="h", pairs=10),
        trials=[Trial(trial_id=f"t{n:02d}", run_folder=f"trials/t{n:02d}") for n in range(trials)],
    )
    sweep.save(str(folder / "sweep"))
    return sweep


def events(trial_id: str, recalls: list[float], seed: int | None = None) -> Iterator[dict[str, Any]]:
    """What a trial says while it trains: a step and a validation after each 10 samples."""
    yield {"trial_id": trial_id, "seed": seed, "kind": "startup", "step": 1, "samples": 10, "seconds": 2.5}
    for step, recall in enumerate(recalls, 1):
        place = {"trial_id": trial_id, "seed": seed, "step": step, "samples": 10 * step, "planned": 100}
        yield place | {"kind": "step", "metrics": {"train/loss/cma": 1 / step}}
        yield place | {"kind": "validation", "metrics": {METRIC: recall, "val/pairs": 10.0}}


def ended(trial_id: str, status: str, reason: str = "", seed: int | None = None, **metrics: float) -> dict[str, Any]:
    place = {"trial_id": trial_id, "seed": seed, "samples": 30}
    return place | {"kind": "ended", "status": status, "reason": reason, "metrics": metrics}


def children(store: str, parent: str) -> dict[str, Any]:
    """{trial id: run} of all runs with this parent; fails where two are of one trial."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs(
        [client.get_experiment_by_name("triptych").experiment_id], f"tags.mlflow.parentRunId = '{parent}'"
    )
    names = [run.data.tags["triptych.trial"] for run in runs]
    assert len(names) == len(set(names))
    return dict(zip(names, runs, strict=True))


def test_what_trials_say_is_in_the_record_and_in_one_run_each(ray_local, store, tmp_path):
    from tuning.sweep.recorder import Recorder

    folder = tmp_path / "sweep"
    recorder = Recorder(recorded(tmp_path, 5), str(folder), "manifest")
    for trial_id in ("t00", "t01", "t02", "t03"):
        recorder.started(trial_id, None)
        for event in events(trial_id, [0.1, 0.2, 0.3]):
            recorder.hear(event)
    assert [trial.status for trial in Sweep.load(str(folder)).trials] == ["running"] * 4 + ["pending"]
    alarm = {"trial_id": "t01", "seed": None, "kind": "alarm", "step": 3, "samples": 30, "key": "codebook/dead"}
    for level in ("range", "alarm", "alarm"):
        recorder.hear(alarm | {"level": level, "text": f"many dead codes ({level})"})
    recorder.hear(ended("t00", "finished", **{METRIC: 0.5, "val/images": float("nan")}))
    recorder.stopped("t01", "stopped by asha at 30 samples")
    recorder.hear(next(events("t01", [0.9])) | {"kind": "validation", "metrics": {METRIC: 0.9}})  # too late
    recorder.hear(ended("t02", "failed", "step 3: cma is not finite"))
    recorder.failed("t02", "its process was lost")
    recorder.hear(ended("t03", "paused"))
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


def test_a_new_driver_goes_on_with_the_runs_of_the_old_one(ray_local, store, tmp_path):
    from tuning.sweep.recorder import Recorder

    folder = str(tmp_path / "sweep")
    old = Recorder(recorded(tmp_path, 3), folder, "manifest")
    for trial_id in ("t00", "t01"):
        old.started(trial_id, None)
        for event in events(trial_id, [0.1, 0.2]):
            old.hear(event)
    stored = Sweep.load(folder)
    parent, before = stored.mlflow_run_id, children(store, stored.mlflow_run_id)
    # the driver is killed here: one trial had just ended, and one child had not come to the record
    stored.trial("t00").status, stored.trial("t00").metrics = "finished", {METRIC: 0.4}
    stored.trial("t01").mlflow_run_id = ""
    storage.write_bytes(f"{folder}/trials/t00/package/config.json", b"{}")

    new = Recorder(stored, folder, "manifest")
    new.started("t01", None)
    for event in events("t01", [0.1, 0.2, 0.3]):
        new.hear(event)
    new.hear(ended("t01", "pruned", "codebook/collapse 0.95 is above 0.9"))
    new.begin_repeats()
    for event in (*events("t00", [0.2, 0.3], seed=7), ended("t00", "finished", seed=7, **{METRIC: 0.35})):
        new.hear(event)
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


def test_a_trial_that_never_trained_and_a_lost_repeat_are_in_the_record_with_their_reason(ray_local, store, tmp_path):
    from tuning.sweep.recorder import Recorder

    recorder = Recorder(recorded(tmp_path, 1), str(tmp_path / "sweep"), "manifest")
    recorder.add("t07", {})
    recorder.hear(ended("t07", "failed", "no permission"))
    recorder.failed("t07", "its process was lost")
    recorder.hear(ended("t00", "finished", **{METRIC: 0.5}))
    recorder.begin_repeats()
    recorder.hear(ended("t00", "failed", "step 3: cma is not finite", seed=1))
    for seed in (1, 2):
        recorder.failed("t00", "its process was lost", seed)
    recorder.close("FINISHED", "finished")
    done, failed = Sweep.load(str(tmp_path / "sweep")).trials
    assert (failed.status, failed.reason) == ("failed", "no permission")
    assert done.status == "finished" and done.alarms == [
        "repeat with seed 1 failed: step 3: cma is not finite",
        "repeat with seed 2 failed: its process was lost",
    ]


def test_a_sweep_whose_trials_mostly_fail_is_given_up(ray_local, store, tmp_path):
    from pipelines.train.fit import TrainingFailed
    from tuning.sweep.recorder import Recorder

    recorder = Recorder(recorded(tmp_path, 9), str(tmp_path / "sweep"), "manifest")
    for number in range(2):
        recorder.hear(ended(f"t0{number}", "failed", "out of memory"))
        recorder.require_hope()
    for event in events("t02", [0.1]):
        recorder.hear(event)  # it trains, so the failures may be the others' own
    with pytest.raises(TrainingFailed, match="2 of 3 trials failed, so the sweep stops; the last one: out of memory"):
        recorder.require_hope()
    for trial_id in ("t03", "t04"):
        for event in events(trial_id, [0.1]):
            recorder.hear(event)
    recorder.require_hope()
    recorder.close("FAILED", "failed")


def test_a_server_that_is_away_loses_no_point_and_stops_nothing(ray_local, store, tmp_path, monkeypatch):
    import tuning.sweep.mlflow_runs
    from pipelines.tracking import run as tracking
    from tuning.sweep.recorder import Recorder

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
    recorder.started("t00", None)
    for event in events("t00", [0.1, 0.2, 0.3]):
        recorder.hear(event)
    recorder.hear(ended("t00", "failed", "out of memory"))
    assert Sweep.load(str(tmp_path / "sweep")).trials[0].status == "failed"
    away.clear()
    recorder.close("FINISHED", "finished")
    (run,) = children(store, recorder.sweep.mlflow_run_id).values()
    assert history(store, run.info.run_id, "train/loss/cma") == [(n, 1 / n) for n in (1, 2, 3)]
    assert run.info.status == "FAILED" and Sweep.load(str(tmp_path / "sweep")).trials[0].mlflow_run_id


# What is shown


def test_settings_are_named_as_shortly_as_they_can_be_told_apart():
    keys = ["objective.codebook.size", "objective.queue.size", "seed", "objective.codebook.ipot.beta"]
    assert list(short_names(keys).values()) == ["codebook.size", "queue.size", "seed", "ipot.beta"]


def test_table_line_and_summary_say_how_a_sweep_goes(tmp_path):
    from rich.console import Console

    sweep = recorded(tmp_path, 3)
    sweep.trials[0].overrides = {"optim.learning_rate": 0.001}
    sweep.trials[0].status, sweep.trials[0].samples_seen = "finished", 100
    sweep.trials[0].metrics = {METRIC: 0.25}
    sweep.trials[1].status, sweep.trials[1].reason = "failed", "out of memory"
    sweep.trials[2].status, sweep.trials[2].curve = "running", [(20, 0.5)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(sweep_table(sweep, {"t02": 40}))
    shown = console.export_text()
    for text in ("140 of at most 300 samples (47%)", "optim.learning_rate=0.001", "25.0%", "failed: out of memory"):
        assert text in shown
    assert progress_line(sweep, {"t02": 40}).endswith(
        "1 running, 1 finished, 1 failed; 140 samples; best recall@1 so far 50.0%"
    )
    text = summary(sweep, "/out/sweep")
    assert "best trial t00 (finished): optim.learning_rate=0.001" in text and "run folder: /out/sweep/" in text
    assert "3 trials: 1 finished, 0 pruned, 1 failed; 100 samples (33% of all trials in full)" in text
    assert "failed t01: out of memory" in text


# A trial by itself


def test_a_trials_process_imports_no_mlflow():
    program = "import sys, tuning.sweep.trial; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


class Post:
    """Stands for the driver's mailbox."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.put = self

    def remote(self, event: dict[str, Any]) -> Any:
        import ray

        self.events.append(event)
        return ray.put(None)


def trained_ids(run: str) -> Counter:
    with local_copy(listed_checkpoints(run)[-1].uri) as folder:
        rows = pq.read_table(folder / "ids.parquet").to_pylist()
    return Counter((row["epoch"], row["sample_id"]) for row in rows)


def every_id(run: str, epochs: int) -> set[tuple[int, str]]:
    units = Manifest.load(f"{run}/manifest.parquet").units
    return {(e, f"{unit.unit}-{n}") for e in range(epochs) for unit in units for n in range(unit.count)}


def in_a_thread(work: Callable[[], Any], seconds: float = 240) -> Any:
    """What `work` returns; raises queue.Empty where it takes longer."""
    answers: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: answers.put(work()), daemon=True).start()
    return answers.get(timeout=seconds)


@pytest.mark.slow
def test_a_trial_waits_at_its_holds_leaves_when_told_and_goes_on_without_training_a_sample_twice(
    ray_local, corpus, tmp_path
):
    from tuning.sweep.trial import TrialRun

    base = base_of(corpus, tmp_path, **{"optim.epochs": 4, "checkpoints.every": 1 / 9})
    run = f"{tmp_path}/sweep/trials/t00"

    def trial(post: Post, **task: object) -> TrialRun:
        made = TrialRun.__new__(TrialRun)  # as Tune's actor makes it, without the actor
        whole = {"trial_id": "t00", "overrides": {}, "seed": None, "until": 0, "report": None}
        made.setup({"task": whole | task}, base, (133, 399), post)
        return made

    first, post = trial(Post(), report=(133, 0.25)), Post()
    assert first.step() == {TIME: 133, METRIC: 0.25}, "what an earlier driver had not decided on"
    first._post = post
    held = in_a_thread(first.step)
    assert 133 <= held[TIME] < 133 + 32 and 0 <= held[METRIC] <= 1
    time.sleep(1)
    assert max(event["samples"] for event in post.events) == held[TIME], "it waits"
    held = in_a_thread(first.step)
    assert 399 <= held[TIME] < 399 + 32
    first.cleanup()
    assert not first._thread.is_alive() and not Path(run, "metrics.json").exists()

    again = Post()
    last = in_a_thread(trial(again).step)
    assert last["done"] and last["status"] == "finished" and last[TIME] == 4 * PAIRS
    steps = [[event["step"] for event in events if "step" in event] for events in (post.events, again.events)]
    assert max(steps[0]) < min(steps[1])
    assert [event["kind"] for event in post.events + again.events].count("ended") == 1
    assert again.events[-1]["metrics"] == json.loads(Path(run, "metrics.json").read_text())
    assert set(trained_ids(run)) == every_id(run, 4) and set(trained_ids(run).values()) == {1}
    assert not Path(run, "mlflow.json").exists()

    third = trial(Post()).step()
    assert third["status"] == "finished" and third[TIME] == 4 * PAIRS, "a finished run is not trained again"


# The whole, with a driver that is killed


class Driver:
    """A sweep in a process of its own, as the command line starts it."""

    def __init__(self, folder: Path, base: ExperimentConfig, **options: object) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": "/tmp"}
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
            environment.pop(name, None)
        words = [sys.executable, "-c", RUN, json.dumps([base.model_dump(mode="json"), options])]
        self.errors = (folder / "stderr.txt").open("a")
        self.process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """None outlives a test that fails."""
        self.kill()
        self.errors.close()

    def wait_for(self, happened: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, "the sweep ended before it could be killed"
            assert time.monotonic() < deadline, "nothing to wait for happened"
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9 of the driver itself; Ray's processes see for themselves."""
        self.process.kill()
        self.process.wait()

    def result(self, seconds: float = 280) -> str:
        text = self.process.communicate(timeout=seconds)[0].decode()
        assert self.process.returncode == 0, text
        return text


def at_some_validation(folder: Path, count: int) -> Callable[[], bool]:
    """Whether so many validations of unfinished trials are in the record and on their disk."""

    def reached() -> bool:
        if not (folder / "sweep.json").exists():
            return False
        sweep = Sweep.load(str(folder))  # whole at any moment, or this raises
        runs = [f"{folder}/{trial.run_folder}" for trial in sweep.trials if not trial.ended]
        return sum(len(t.curve) for t in sweep.trials) >= count and any(listed_checkpoints(run) for run in runs)

    return reached


def check_whole(folder: Path, sweep: Sweep, epochs: int) -> None:
    """One parent, one child a trial, ordinary run folders, nothing trained twice."""
    store = f"sqlite:///{folder.parent.parent}/mlflow.db"
    runs = children(store, sweep.mlflow_run_id)
    expected = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
    assert {n: r.info.status for n, r in runs.items()} == {t.trial_id: expected[t.status] for t in sweep.trials}
    assert {t.mlflow_run_id for t in sweep.trials} == {run.info.run_id for run in runs.values()}
    assert len(everything(store)) == len(sweep.trials) + 1, "no run but the parent and its children"
    assert run_of(store, sweep.mlflow_run_id).info.status == "FINISHED"
    for trial in sweep.trials:
        run = f"{folder}/{trial.run_folder}"
        if trial.status != "failed":
            assert set(trained_ids(run).values()) == {1}
        if trial.status == "finished":
            assert trial.samples_seen == epochs * PAIRS and set(trained_ids(run)) == every_id(run, epochs)
            assert trial.metrics == json.loads(Path(run, "metrics.json").read_text())
            assert Path(run, "package/model.safetensors").exists()
            assert dict(history(store, trial.mlflow_run_id, METRIC)).values()


def everything(store: str) -> list[str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    return [run.info.run_id for run in client.search_runs([e.experiment_id for e in client.search_experiments()])]


@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_and_a_failing_trial_does_not_stop_it(
    ray_local, corpus, tmp_path, monkeypatch, empty_mlflow
):
    """Two trials under asha, one of which meets NaN; the driver is killed at the first checkpoint.

    The next driver is this process: its Ray runs already. The long form starts each in a process of its own.
    """
    from tuning.sweep.run_sweep import tune

    space = write_space(tmp_path, {"optim.learning_rate": [0.001, 1e30]})
    base = base_of(corpus, tmp_path / "out", **{"optim.epochs": 2, "optim.clip_norm": 0})
    folder = tmp_path / "out" / "sweep"
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    options = {"space": space, "scheduler": "asha"}
    with Driver(tmp_path, base, **options) as first:
        first.wait_for(at_some_validation(folder, 1))
    before = Sweep.load(str(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    text = tune(Request(base, **options, resume=True)).text
    sweep = Sweep.load(str(folder))
    assert [trial.status for trial in sweep.trials] == ["finished", "failed"]
    assert "is not finite" in sweep.trials[1].reason
    assert sweep.mlflow_run_id == before.mlflow_run_id and sweep.created == before.created
    assert [(t.trial_id, t.overrides) for t in sweep.trials] == [(t.trial_id, t.overrides) for t in before.trials]
    assert "best trial t00 (finished): optim.learning_rate=0.001" in text
    check_whole(folder, sweep, epochs=2)
    assert "failed t01" in text and json.loads((folder / "sweep.json").read_text())["trials"][0]["mlflow_run_id"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scheduler", ["halving", "asha"])
def test_a_sweep_that_is_killed_again_and_again_ends_as_if_it_had_not_been(corpus, tmp_path, scheduler):
    """Five trials with a repeat of the finalists, killed at ever later validations."""
    space = write_space(tmp_path, {"optim.learning_rate": [0.0003, 0.001, 0.002, 0.003, 0.004]})
    base = base_of(corpus, tmp_path / "out", **{"optim.epochs": 4})
    folder = tmp_path / "out" / "sweep"
    options = {"space": space, "scheduler": scheduler, "repeats": 1}
    for number, validations in enumerate((1, 4, 7)):
        with Driver(tmp_path, base, **options, resume=number > 0) as driver:
            driver.wait_for(at_some_validation(folder, validations), 400)
    with Driver(tmp_path, base, **options, resume=True) as driver:
        driver.result(900)
    sweep = Sweep.load(str(folder))
    assert [trial.trial_id for trial in sweep.trials] == [f"t0{n}" for n in range(5)]
    counts = Counter(trial.status for trial in sweep.trials)
    assert counts["failed"] == 0 and counts["finished"] >= 1 and sum(counts.values()) == 5
    if scheduler == "halving":
        assert counts == {"finished": 1, "pruned": 4}
    assert sum(len(trial.repeats) for trial in sweep.trials) == 2
    assert not [name for name in (folder / "trials").iterdir() if name.name not in {t.trial_id for t in sweep.trials}]
    check_whole(folder, sweep, epochs=4)
