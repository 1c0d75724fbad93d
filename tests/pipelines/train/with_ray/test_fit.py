"""The main job end to end on real parts: Ray Data, Ray Train, an S3 server, MLflow; and what dies on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray.train

from models.config import InputError
from models.package import FILES, load_package, verify_files
from pipelines import storage
from pipelines.artifacts.resolve import best_checkpoint, listed_checkpoints, local_copy
from pipelines.cli.main import main
from pipelines.config import PRESETS, ExperimentConfig
from pipelines.data.manifest import Manifest, build_manifest
from pipelines.data.synthetic import synthesize
from pipelines.evaluation.evaluate import evaluate_model
from pipelines.train import fit as training
from pipelines.train.fit import FitResult, fit
from pipelines.train.worker import Job
from tests.support.paths import ROOT

PAIRS = 240
EPOCHS = 2
LAST_STEP = 12  # of the worker that is killed: the first checkpoint is at step 8, the next at 16
KILLED = {"name": "killed", "compute.workers": 2, "optim.epochs": EPOCHS, "optim.batch_size": 16}
SMALL = {
    "optim.min_samples": 0,
    "optim.batch_size": 32,
    "checkpoints.every": 0.25,
    "validation.pairs": 100,
    "objective.queue.size": 128,
    "objective.codebook.size": 16,
    "progress.every": 1,
    "pairs.record_ids": True,
    "compute.threads": 1,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A generated corpus with a few broken pairs."""
    folder = tmp_path_factory.mktemp("corpus") / "data"
    synthesize(str(folder), pairs=PAIRS, broken=0.05, image_size=32)
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory, empty_mlflow):
    """MLflow's default file lies in a folder of the module's own."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    shutil.copy(empty_mlflow, "mlflow.db")
    yield
    os.chdir(before)


def experiment(preset: str, corpus: Path | str, out: Path | str, **changes: object) -> ExperimentConfig:
    paths = {"train_data": f"{corpus}/train", "val_data": f"{corpus}/val", "out": str(out)}
    return PRESETS[preset].override(SMALL | paths | changes)


def worker_that_kills(run: str, step: int, driver: int = 0) -> Callable[[Job], Any]:
    """A worker's work, but at the end of this step its last rank sends SIGKILL to itself, or to the driver's group.

    It first waits for the run's first checkpoint, and a worker that starts from one kills nobody. So the steps since
    then are always lost, however busy the machine is.
    """

    def work(job: Job) -> Any:
        from pipelines.train import worker

        class Killing(worker.Run):
            def _step(self, rows, counts):
                super()._step(rows, counts)
                if self.progress.step == step and self.workers.rank == self.workers.world_size - 1:
                    while not listed_checkpoints(run):
                        time.sleep(0.05)
                    if driver:
                        os.killpg(driver, signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGKILL)

        if ray.train.get_checkpoint() is None:
            worker.Run = Killing
        return worker.train_worker(job)

    return work


def trained_ids(run: str) -> Counter:
    """How often each (epoch, sample) stands in the lineage of the run's latest checkpoint."""
    with local_copy(listed_checkpoints(run)[-1].uri) as folder:
        rows = pq.read_table(folder / "ids.parquet").to_pylist()
    return Counter((row["epoch"], row["sample_id"]) for row in rows)


def expected_ids(run: str, epochs: int) -> set[tuple[int, str]]:
    """All good samples of each epoch: the manifest without what the ledger names."""
    manifest = Manifest.load(f"{run}/manifest.parquet")
    every = {f"{unit.unit}-{ordinal}" for unit in manifest.units for ordinal in range(unit.count)}
    with local_copy(listed_checkpoints(run)[-1].uri) as folder:
        skipped = {(row["epoch"], row["sample_id"]) for row in pq.read_table(folder / "skipped.parquet").to_pylist()}
    return {(epoch, sample) for epoch in range(epochs) for sample in every} - skipped


@pytest.fixture(scope="module")
def finished(ray_local, corpus, tmp_path_factory) -> FitResult:
    """Epochs of `both-tiny` on two workers, one of which is killed on the way."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_worker", worker_that_kills(str(out / "killed"), LAST_STEP))
        return fit(experiment("both-tiny", corpus, out, **KILLED))


def test_a_killed_worker_costs_no_sample_and_none_is_trained_twice(finished):
    counts = trained_ids(finished.run_folder)
    assert set(counts) == expected_ids(finished.run_folder, EPOCHS)
    assert set(counts.values()) == {1}
    steps = [event["step"] for event in finished.history if event["kind"] == "step"]
    (checkpoint, *_) = [event["step"] for event in finished.history if event["kind"] == "validation"]
    assert [pair for pair in pairwise(steps) if pair[1] != pair[0] + 1] == [(LAST_STEP, checkpoint + 1)]
    assert checkpoint < LAST_STEP < steps[-1], "steps since the checkpoint were done again, and no others"


def test_skipped_samples_are_in_the_ledger_with_their_reason(finished):
    rows = pq.read_table(f"{finished.run_folder}/skipped.parquet").to_pylist()
    assert Counter(row["epoch"] for row in rows) == {epoch: round(0.05 * PAIRS) for epoch in range(EPOCHS)}
    assert {row["reason"] for row in rows} == {"unreadable", "empty_caption"}
    assert all(row["id"] and "#row=" in row["uri"] for row in rows)


def test_the_run_folder_is_complete(finished):
    run = Path(finished.run_folder)
    names = {"config.json", "checkpoints", "package", "metrics.json", "skipped.parquet", "manifest.parquet"}
    assert names <= {path.name for path in run.iterdir()}
    checkpoint = Path(best_checkpoint(str(run)).uri)
    verify_files(checkpoint, "checkpoint")
    contents = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert contents == {
        *("config.json", "model.safetensors", "teacher.safetensors", "position.json", "tokenizer.json", "metrics.json"),
        *("preprocessor_config.json", "skipped.parquet", "ids.parquet", FILES),
        *(f"state/{name}" for name in ("optimizer.safetensors", "queues.safetensors", "generators.safetensors")),
        *("state/codebook.safetensors", "state/counters.json"),
    }
    assert ExperimentConfig.model_validate_json((run / "config.json").read_text()).preset == "both-tiny"


def test_metrics_are_those_of_the_packaged_model(finished, corpus):
    stored = json.loads(Path(finished.run_folder, "metrics.json").read_text())
    assert stored == finished.metrics
    names = [f"val/{side}_retrieval_recall_at_{k}" for side in ("image", "text") for k in (1, 5, 10)]
    assert set(names) | {f"{name}_reranked" for name in names} <= set(stored)
    package = load_package(Path(finished.run_folder) / "package")
    assert package.metrics == stored
    again = evaluate_model(f"{finished.run_folder}/package", f"{corpus}/val")
    assert {f"val/{name}": value for name, value in again.items()} == pytest.approx(stored)


def test_mlflow_has_the_run(finished):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    run = client.get_run(finished.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.batch_size"] == "16"
    assert run.data.tags["triptych.preset"] == "both-tiny" and run.data.tags["triptych.manifest"]
    points = client.get_metric_history(finished.mlflow_run_id, "train/loss/cma")
    assert {point.step for point in points} == set(range(1, max(point.step for point in points) + 1))
    assert run.data.metrics["val/image_retrieval_recall_at_1"] == finished.metrics["val/image_retrieval_recall_at_1"]
    assert {artifact.path for artifact in client.list_artifacts(finished.mlflow_run_id)} == {"package"}


CODEBOOK = {
    *("ppl_v", "ppl_t", "dead", "H_student", "H_target", "q_max", "kl", "agree1", "agree5", "kappa", "marg_l1"),
    *("marg_max", "g_range", "nn_cos", "erank"),
}


def test_codes_and_embeddings_are_measured_in_every_report(finished):
    import mlflow

    names = {f"codebook/{name}" for name in CODEBOOK} | {"grad/codebook", "train/loss/code", "train/loss/ot"}
    names |= {f"embedding/{name}" for name in ("align", "unif_v", "unif_t", "gap", "ts_drift")}
    last = [event for event in finished.history if event["kind"] == "step" and names <= event["metrics"].keys()][-1]
    assert 1 <= last["metrics"]["codebook/ppl_v"] <= 16 and 0 < last["metrics"]["codebook/H_student"] <= 1
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    assert names <= client.get_run(finished.mlflow_run_id).data.metrics.keys()
    assert all(event["text"].startswith(event["key"]) for event in finished.history if event["kind"] == "alarm")


def test_a_package_holds_no_codes(finished):
    package = load_package(Path(finished.run_folder) / "package")
    assert package.model.codebook is None


def test_an_existing_run_is_refused_and_a_damaged_checkpoint_named(finished, corpus, capsys):
    out = Path(finished.run_folder).parent
    with pytest.raises(InputError, match="--resume"):
        fit(experiment("both-tiny", corpus, out, name="killed"))
    weights = Path(listed_checkpoints(finished.run_folder)[-1].uri) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    try:
        with pytest.raises(InputError, match=r"model\.safetensors is missing or damaged"):
            fit(experiment("both-tiny", corpus, out, **KILLED), resume=True)
        assert main(["evaluate", str(weights.parent), "--data", f"{corpus}/val"]) == 1
        assert one_line(capsys).startswith("triptych: ")
    finally:
        weights.write_bytes(whole)


KILLED_DRIVER = """
import os, sys
from pipelines.train import fit
from pipelines.cli.main import main
from tests.pipelines.train.with_ray.test_fit import worker_that_kills
run, step, *words = sys.argv[1:]
fit.train_worker = worker_that_kills(run, int(step), os.getpid())
main(words)
"""


@pytest.mark.timeout(600)
def test_a_killed_driver_goes_on_by_hand_from_a_bucket_with_another_number_of_workers(ray_local, s3, corpus):
    """The driver dies with its Ray; data, checkpoints and package are in the bucket alone."""
    bucket = s3.bucket()
    storage.upload(str(corpus), f"{bucket}/data")
    run = f"{bucket}/runs/by-hand"
    words = train_words(f"{bucket}/data/train", f"{bucket}/data/val", f"{bucket}/runs", preset="clip-tiny")
    words += ["--name", "by-hand", "--optim.epochs", "2", "--optim.batch-size", "16", "--checkpoints.every", "0.25"]
    words += ["--pairs.record-ids"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": "/tmp"}
    environment.pop("RAY_ADDRESS", None)
    program = [sys.executable, "-c", KILLED_DRIVER, run, "12", *words]
    with subprocess.Popen(program, env=environment, start_new_session=True) as driver:
        assert driver.wait(250) == -signal.SIGKILL
    with local_copy(listed_checkpoints(run)[-1].uri) as folder:
        seen = json.loads((folder / "state" / "counters.json").read_text())["progress"]["seen"]
    assert seen == 8 * 16 and not storage.exists(f"{run}/metrics.json")
    assert main([*words, "--resume", "--compute.workers", "2"]) == 0
    counts = trained_ids(run)
    assert set(counts) == expected_ids(run, epochs=2) and set(counts.values()) == {1}
    here = build_manifest(f"{corpus}/train", PRESETS["clip-tiny"].pairs)
    there = Manifest.load(f"{run}/manifest.parquet")
    assert [(u.unit, u.first, u.count) for u in there.units] == [(u.unit, u.first, u.count) for u in here.units]
    again = evaluate_model(run, f"{bucket}/data/val")
    stored = json.loads(storage.read_bytes(f"{run}/metrics.json"))
    assert {f"val/{name}": value for name, value in again.items()} == pytest.approx(stored)


def ray_processes(kind: str) -> list[int]:
    """Ids of the Ray processes of one kind that descend from this one (other Rays on the machine are left alone)."""
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    table = [(int(line.split()[0]), int(line.split()[1]), line) for line in listing.splitlines()]
    family = {os.getpid()}
    for _ in range(5):
        family |= {pid for pid, parent, _ in table if parent in family}
    return [pid for pid, _, line in table if pid in family and f"ray::{kind}" in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_killed_from_outside_cost_no_sample_and_none_is_trained_twice(ray_local, corpus, tmp_path):
    """Whenever it comes: one kill as soon as the first checkpoint is registered, one at the third."""
    run, killed = str(tmp_path / "outside"), []

    def kill() -> None:
        for count, place in ((1, -1), (3, 0)):
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and (not listed_checkpoints(run) or reports(run) < count):
                time.sleep(0.05)
            killed.append(ray_processes("RayTrainWorker")[place])
            os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    changes = {"name": "outside", "optim.epochs": 6, "checkpoints.every": 1 / 6}
    fit(experiment("both-tiny", corpus, tmp_path, **KILLED | changes))
    killer.join()
    counts = trained_ids(run)
    assert len(set(killed)) == 2
    assert set(counts) == expected_ids(run, epochs=6) and set(counts.values()) == {1}


def reports(run: str) -> int:
    """Checkpoints registered so far, those included that have gone since."""
    return round(listed_checkpoints(run)[-1].metrics["samples_seen"] / PAIRS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_command_killed_from_outside_is_repeated_with_resume(corpus, tmp_path):
    """Both times the command line itself, with a Ray of its own, on a local folder."""
    words = train_words(f"{corpus}/train", f"{corpus}/val", str(tmp_path), preset="clip-tiny")
    words += ["--name", "by-hand", "--optim.epochs", "8", "--optim.batch-size", "8", "--checkpoints.every", "0.1"]
    command = [sys.executable, "-m", "pipelines.cli", *words, "--pairs.record-ids"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": "/tmp"}
    environment.pop("RAY_ADDRESS", None)
    run = str(tmp_path / "by-hand")
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True) as driver:
        deadline = time.monotonic() + 200
        while not listed_checkpoints(run) and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert driver.poll() is None, "the run ended before it could be killed"
        os.killpg(driver.pid, signal.SIGKILL)
    again = [*command, "--resume", "--compute.workers", "2"]
    finished = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stderr
    counts = trained_ids(run)
    assert set(counts) == expected_ids(run, epochs=8) and set(counts.values()) == {1}


def one_line(capsys) -> str:
    """The one line of standard error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("triptych: ")]
    assert len(lines) == 1
    return lines[0]


def train_words(train: str, val: str, out: str, *more: str, preset: str = "tcl-tiny") -> list[str]:
    return ["train", preset, "--train-data", train, "--val-data", val, "--out", out, *more]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train", "tcl-huge"], 2, "unknown preset 'tcl-huge'"),
        (["train", "tcl-tiny", "--optim.learning-rates", "1"], 2, "did you mean --optim.learning-rate"),
        (["train", "tcl-tiny", "--optim.learning-rate", "fast"], 2, "--optim.learning-rate fast"),
        (["train", "tcl-tiny", "--optim.learning-rate", "-1"], 2, "--optim.learning-rate -1"),
        (["train", "tcl-tiny", "--val-data", "x", "--out", "y"], 1, "--train-data is missing"),
        (["paint"], 2, "unknown command 'paint'"),
        (["evaluate"], 2, "MODEL"),
        (["evaluate", "nowhere", "--data", "x"], 1, "nowhere"),
        (["data", "stats", "nowhere"], 1, "nowhere"),
    ],
)
def test_wrong_usage_is_one_line(words, code, says, capsys):
    assert main(words) == code
    assert says in one_line(capsys)


def test_bad_data_is_one_line_and_leaves_nothing(s3, corpus, tmp_path, write_pairs, capsys):
    val, out = f"{corpus}/val", str(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    pq.write_table(pq.read_table(f"{corpus}/val").rename_columns(["a", "b", "c", "d"]), tmp_path / "columns.parquet")
    cases = {
        "/no/such/folder": "no such",
        "s3://no-such-bucket-here/train": "no such bucket",
        str(tmp_path / "empty"): "empty",
        str(tmp_path / "columns.parquet"): "image",
    }
    for train, says in cases.items():
        assert main(train_words(train, val, out)) == 1
        line = one_line(capsys)
        assert train in line and says in line, line
    assert not Path(out).exists()


def test_a_refused_bucket_is_one_line(s3, corpus, tmp_path, capsys):
    bucket = s3.bucket()
    s3.require_signatures(True)
    try:
        assert main(train_words(f"{bucket}/train", f"{corpus}/val", str(tmp_path))) == 1
        assert "no permission" in one_line(capsys)
    finally:
        s3.require_signatures(False)


def test_an_unwritable_output_is_one_line(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(train_words(f"{corpus}/train", f"{corpus}/val", str(tmp_path / "file"))) == 1
    assert str(tmp_path / "file") in one_line(capsys)


def test_more_workers_than_the_cluster_can_give(ray_local, corpus, tmp_path, capsys):
    words = train_words(f"{corpus}/train", f"{corpus}/val", str(tmp_path), "--compute.workers", "12")
    assert main(words) == 1
    assert "--compute.workers 12" in one_line(capsys)


@pytest.fixture
def in_this_process(ray_local, monkeypatch, tmp_path):
    """Ray Train's local mode: the same loop, without the seconds that a controller and a worker take to start."""
    monkeypatch.setattr(training, "ScalingConfig", lambda **_: ray.train.ScalingConfig(num_workers=0))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a checkpoint stays that nobody uploads


def check_non_finite(corpus: Path, out: Path, capsys) -> None:
    words = ["--optim.learning-rate", "1e30", "--optim.clip-norm", "0", "--optim.epochs", "2", "--progress.every", "1"]
    words += ["--compute.threads", "1"]
    assert main(train_words(f"{corpus}/train", f"{corpus}/val", str(out), *words, preset="tcl-dual-tiny")) == 1
    line = one_line(capsys)
    assert "is not finite" in line and "cma" in line


def test_a_non_finite_loss_stops_with_its_term(in_this_process, corpus, tmp_path, capsys):
    check_non_finite(corpus, tmp_path / "runs", capsys)


@pytest.mark.slow
def test_a_non_finite_loss_of_a_worker_stops_with_its_term(ray_local, corpus, tmp_path, capsys):
    check_non_finite(corpus, tmp_path / "runs", capsys)


def test_too_many_skipped_samples_stop_the_run_and_say_where_to_look(in_this_process, tmp_path, capsys):
    synthesize(str(tmp_path / "data"), pairs=120, broken=0.4, image_size=32)
    words = train_words(str(tmp_path / "data/train"), str(tmp_path / "data/val"), str(tmp_path / "runs"))
    assert main([words[0], "clip-tiny", *words[2:], "--optim.epochs", "1", "--compute.threads", "1"]) == 1
    line = one_line(capsys)
    assert "48 of 120 samples were skipped" in line and "triptych data lint" in line
