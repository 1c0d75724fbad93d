"""What was written before the modules moved still opens and goes on; `tests/artifacts/README.md` says how it was made.

Whatever can be read is read where it lies. What is continued goes back to the bucket it was written to, for run and
sweep folders hold whole URIs and the data's etags: an S3 server gives the same ones again.
"""

import json
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.package import health_vectors, load_package, load_tensors, verify_files
from pipelines import storage
from pipelines.artifacts.resolve import best_checkpoint, listed_checkpoints, local_copy
from pipelines.cli.main import main
from pipelines.data.manifest import Manifest
from pipelines.data.skip_ledger import read_ledger
from pipelines.embed.job import embed
from pipelines.evaluation.evaluate import evaluate_model
from serving.index.build import build_index
from serving.index.index import open_index
from tests.support.mlflow_runs import history
from tuning.compare.compare_runs import compare_runs
from tuning.sweep.sweep_record import METRIC, Sweep

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
RUN = ARTIFACTS / "runs" / "finished"
PAIRS, BROKEN = 64, 3
BUCKET = "before-the-move"
ROOT = f"s3://{BUCKET}"
SMALL = """
--encoder.vision.image-size 16 --encoder.vision.patch-size 8 --encoder.vision.width 16 --encoder.vision.layers 1
--encoder.vision.heads 1 --encoder.text.vocab-size 128 --encoder.text.max-tokens 16 --encoder.text.max-positions 16
--encoder.text.width 16 --encoder.text.layers 1 --encoder.text.heads 1 --encoder.embed-dim 8
--optim.learning-rate 0.01 --optim.batch-size 16 --pairs.augment none --checkpoints.keep 1 --pairs.record-ids
--compute.threads 1
"""
DATA = f"--train-data {ROOT}/pairs --val-data {ROOT}/pairs"
TRAIN = f"""
train both-tiny {DATA} --out {ROOT}/runs --name interrupted --resume --optim.epochs 40 --checkpoints.every 0.25
--encoder.fusion.layers 1 --objective.queue.size 32 --objective.codebook.size 8 {SMALL}
"""
TUNE = f"""
tune clip-tiny {DATA} --out {ROOT}/sweeps --name interrupted --resume --space space.json --scheduler asha
--optim.epochs 12 {SMALL}
"""
MOVED = {"tuning": "absent", "pipelines": "elsewhere", "models": "lacked"}
"""{package: one of a name as long, which nobody has}; equal lengths, because a pickle counts them."""


@pytest.fixture
def bucket(s3, tmp_path, monkeypatch, empty_mlflow) -> str:
    """The bucket as it was, in objects of one part so that etags are those that were noted; and an empty MLflow."""
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for file in ARTIFACTS.rglob("*"):
        if file.is_file():
            client.put_object(Bucket=BUCKET, Key=file.relative_to(ARTIFACTS).as_posix(), Body=file.read_bytes())
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield ROOT
    for entry in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET).search("Contents"):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)


def read_json(path: Path | str) -> Any:
    return json.loads(storage.read_bytes(str(path)))


def ids_of(run: str) -> Counter:
    """How often each (epoch, sample) was trained in the lineage of the run's latest checkpoint."""
    with local_copy(listed_checkpoints(run)[-1].uri) as folder:
        rows = pq.read_table(folder / "ids.parquet").to_pylist()
    return Counter((row["epoch"], row["sample_id"]) for row in rows)


def good_ids(run: str, epochs: int) -> set[tuple[int, str]]:
    """All samples of the manifest, in each epoch, but those of the ledger."""
    units = Manifest.load(f"{run}/manifest.parquet").units
    every = {(epoch, f"{unit.unit}-{n}") for epoch in range(epochs) for unit in units for n in range(unit.count)}
    skipped = read_ledger(f"{run}/skipped.parquet").to_pylist()
    return every - {(row["epoch"], row["sample_id"]) for row in skipped}


# What is only read


def test_a_package_loads_whole_and_computes_its_health_vectors():
    verify_files(RUN / "package", "package")
    package = load_package(RUN / "package")
    stored = load_tensors(RUN / "package" / "health.safetensors")
    image, text, pixels = health_vectors(package)
    assert torch.equal(pixels, stored["pixels"])
    torch.testing.assert_close(image, stored["image_vectors"], atol=1e-5, rtol=0)
    torch.testing.assert_close(text, stored["text_vectors"], atol=1e-5, rtol=0)
    assert package.metrics == read_json(RUN / "metrics.json") and package.model.fusion is not None
    (space,) = {
        package.embedding_space,
        read_json(RUN / "package" / "config.json")["embedding_space"],
        read_json(ARTIFACTS / "vectors" / "vectors.json")["embedding_space"],
        read_json(ARTIFACTS / "index" / "index.json")["embedding_space"],
    }
    assert f"`{space}`" in (RUN / "package" / "README.md").read_text()


def test_manifest_ledger_and_checkpoint_of_a_run_are_read():
    manifest = Manifest.load(f"{RUN}/manifest.parquet")
    assert manifest.count == PAIRS and {unit.uri for unit in manifest.units} == {f"{ROOT}/pairs/00000.parquet"}
    rows = read_ledger(f"{RUN}/skipped.parquet").to_pylist()
    assert Counter(row["epoch"] for row in rows) == dict.fromkeys(range(40), BROKEN)
    checkpoint = Path(best_checkpoint(str(RUN)).uri)
    verify_files(checkpoint, "checkpoint")
    assert {path.stem for path in (checkpoint / "state").iterdir()} == {
        *("codebook", "counters", "generators", "optimizer", "queues")
    }
    ids = ids_of(str(RUN))
    assert set(ids) == good_ids(str(RUN), 40) and set(ids.values()) == {1}


@pytest.mark.parametrize("kind", ["run folder", "checkpoint", "package"])
def test_evaluation_finds_the_metrics_that_were_stored(ray_local, kind):
    models = {"run folder": str(RUN), "checkpoint": best_checkpoint(str(RUN)).uri, "package": f"{RUN}/package"}
    found = evaluate_model(models[kind], f"{ARTIFACTS}/pairs")
    stored = read_json(RUN / "metrics.json")
    assert {f"val/{name}": value for name, value in found.items()} == pytest.approx(stored)
    assert stored["val/image_retrieval_recall_at_10"] > 3 * 10 / (PAIRS - BROKEN), "what finds nothing shows nothing"


def vectors_table() -> pa.Table:
    about = read_json(ARTIFACTS / "vectors" / "vectors.json")
    return pa.concat_tables([pq.ParquetFile(ARTIFACTS / "vectors" / f["name"]).read() for f in about["files"]])


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), np.float32)


def check_index(folder: Path) -> None:
    """A caption's vector finds the pictures that a loop over all finds."""
    index, table = open_index(folder, verify=True), vectors_table()
    pictures, captions = matrix(table["image_vector"]), matrix(table["text_vector"])
    ids = table["id"].to_pylist()
    assert len(ids) == PAIRS - BROKEN == index.images
    for row, hits in enumerate(index.search(captions, "image", 5)):
        cosines = {name: float(captions[row] @ picture) for name, picture in zip(ids, pictures, strict=True)}
        assert [hit.score for hit in hits] == pytest.approx(sorted(cosines.values(), reverse=True)[:5], abs=1e-5)
        for hit in hits:
            assert hit.score == pytest.approx(cosines[hit.id], abs=1e-5) and hit.uri.startswith(f"{ROOT}/pairs/")
            assert hit.caption == table["caption"][ids.index(hit.id)].as_py() and hit.thumbnail[:2] == b"\xff\xd8"


def test_an_index_opens_and_is_searched():
    check_index(ARTIFACTS / "index")


def test_vectors_become_an_index(tmp_path):
    build_index(f"{ARTIFACTS}/vectors", str(tmp_path / "index"))
    check_index(tmp_path / "index")


def test_vectors_that_are_there_are_not_made_again(bucket):
    result = embed(f"{bucket}/runs/finished", f"{bucket}/pairs", f"{bucket}/vectors")
    assert (result.encoded, result.samples, result.skipped) == (0, PAIRS - BROKEN, BROKEN)


def percent(metrics: dict[str, float]) -> float:
    """Recall at 1, mean of both ways."""
    return 50 * sum(metrics[f"val/{side}_retrieval_recall_at_1"] for side in ("image", "text"))


def test_a_sweep_and_a_run_are_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    folder = ARTIFACTS / "sweeps" / "finished"
    trials = read_json(folder / "sweep.json")["trials"]
    assert [trial["status"] for trial in trials] == ["finished"] * 2
    recalls = {trial["trial_id"]: percent(trial["metrics"]) for trial in trials}
    outcome = compare_runs([str(folder)], str(tmp_path))
    assert f"Best: {max(recalls, key=recalls.__getitem__)} " in outcome.text and Path(outcome.report).is_file()
    beside = compare_runs([str(folder), str(RUN)]).text
    for text, prefix in ((outcome.text, ""), (beside, "finished/")):
        for name, recall in recalls.items():
            assert re.search(rf"{prefix}{name} +{recall:.1f}%", text)
    assert re.search(rf" finished +{percent(read_json(RUN / 'metrics.json')):.1f}%", beside)


# What goes on


@pytest.mark.timeout(600)
def test_an_interrupted_run_goes_on_to_the_weights_of_one_that_was_not(ray_local, bucket, capsys):
    """Moments, teacher, queue and position are taken up.

    Where one of the first three is lost the weights end 0.001 to 0.03 off; here, on the machine that made them, equal.
    """
    run = f"{bucket}/runs/interrupted"
    before = listed_checkpoints(run)[-1]
    trained = ids_of(run)
    assert 0 < len(trained) < 40 * (PAIRS - BROKEN) and not storage.exists(f"{run}/metrics.json")
    assert main(TRAIN.split()) == 0
    steps = [int(step) for step in re.findall(r"^step (\d+) .* samples/s", capsys.readouterr().err, re.MULTILINE)]
    assert min(steps) > before.metrics["step"], "nothing is trained again"
    ids = ids_of(run)
    assert set(ids) == good_ids(run, 40) and set(ids.values()) == {1} and not trained - ids
    expected = Path(listed_checkpoints(str(RUN))[-1].uri)
    with local_copy(listed_checkpoints(run)[-1].uri) as folder:
        for name in ("model.safetensors", "teacher.safetensors", "state/queues.safetensors"):
            torch.testing.assert_close(load_tensors(folder / name), load_tensors(expected / name), atol=5e-4, rtol=0)
    assert read_json(f"{run}/metrics.json").keys() == read_json(RUN / "metrics.json").keys()


def goes_on(bucket: str, store: str) -> None:
    """`tune --resume` of the interrupted sweep comes to its end, each trial from its checkpoint."""
    folder = f"{bucket}/sweeps/interrupted"
    before = Sweep.load(folder)
    begun = {
        # by the checkpoint itself: the list of that commit may give it the numbers of a later step
        trial.trial_id: read_json(f"{listed[-1].uri}/metrics.json")["step"]
        for trial in before.trials
        if not trial.ended and (listed := listed_checkpoints(f"{folder}/{trial.run_folder}"))
    }
    assert begun
    Path("space.json").write_text(json.dumps({"optim.learning_rate": [0.003, 0.01]}))
    assert main(TUNE.split()) == 0
    sweep = Sweep.load(folder)
    assert [(t.trial_id, t.overrides) for t in sweep.trials] == [(t.trial_id, t.overrides) for t in before.trials]
    assert {t.status for t in sweep.trials} <= {"finished", "pruned"} and sweep.created == before.created
    assert any(t.status == "finished" for t in sweep.trials)
    for trial, old in zip(sweep.trials, before.trials, strict=True):
        run = f"{folder}/{trial.run_folder}"
        assert [seen for seen, _ in trial.curve][: len(old.curve)] == [seen for seen, _ in old.curve]
        assert set(ids_of(run).values()) == {1}
        if trial.status == "finished":
            assert set(ids_of(run)) == good_ids(run, 12) and trial.metrics == read_json(f"{run}/metrics.json")
        if trial.trial_id in begun:
            steps = [step for step, _ in history(store, trial.mlflow_run_id, METRIC)]
            assert min(steps) > begun[trial.trial_id], "nothing is trained again"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_sweep_goes_on(ray_local, bucket, tmp_path):
    goes_on(bucket, f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.timeout(600)
def test_an_interrupted_sweep_goes_on_though_nobody_can_unpickle_its_tune_folder(ray_local, bucket, tmp_path):
    """Ray Tune's state names modules that are not there any more: `sweep.json` and run folders have it all."""
    state = storage.listing(f"{bucket}/sweeps/interrupted/tune")
    renamed = 0
    for file in state:
        data = old = storage.read_bytes(file.uri)
        for name, other in MOVED.items():
            data = data.replace(name.encode(), other.encode())
            data = data.replace(name.encode().hex().encode(), other.encode().hex().encode())  # in JSON
        if data != old:
            storage.write_bytes(file.uri, data)
            renamed += 1
    assert renamed
    (tuner,) = [file.uri for file in state if file.uri.endswith("/tuner.pkl")]
    with pytest.raises(ModuleNotFoundError, match="absent"):
        pickle.loads(storage.read_bytes(tuner))
    goes_on(bucket, f"sqlite:///{tmp_path}/mlflow.db")
