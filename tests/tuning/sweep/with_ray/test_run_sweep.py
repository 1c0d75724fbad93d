"""A whole sweep whose driver is killed, once or again and again."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from pipelines.artifacts.resolve import listed_checkpoints
from pipelines.config import ExperimentConfig
from tests.support.mlflow_runs import children, history, run_of
from tests.support.paths import ROOT
from tests.support.sweep_cases import PAIRS, base_of, every_id, trained_ids, write_space
from tuning.sweep.plan import SweepRequest
from tuning.sweep.sweep_record import METRIC, Sweep

RUN = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
logging.getLogger("tuning").setLevel("INFO")
from pipelines.config import ExperimentConfig
from tuning.sweep.plan import SweepRequest
from tuning.sweep.run_sweep import tune
base, options = json.loads(sys.argv[1])
print(tune(SweepRequest(ExperimentConfig.model_validate(base), **options)).text)
"""


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
    text = tune(SweepRequest(base, **options, resume=True)).text
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
