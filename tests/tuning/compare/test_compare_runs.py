"""The command: where the page goes, and what MLflow gets of it."""

from pathlib import Path

import pytest

from models.config import InputError
from pipelines import storage
from pipelines.tracking.history import Histories, attach
from pipelines.tracking.run import EXPERIMENT, Tracker
from tests.support.comparison_cases import (
    BASE,
    check_page,
    checkpoint,
    grid,
    run_folder,
    scores,
    sweep,
)
from tests.support.mlflow_runs import run_of
from tuning.compare.collect import gather
from tuning.compare.compare_runs import compare_runs
from tuning.sweep.sweep_record import METRIC

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)


def test_mlflow_knows_curve_time_and_state_and_keeps_the_page_without_touching_the_run(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    tracker = Tracker.start(None, EXPERIMENT, "r", {}, {"triptych.val_manifest": "m2"})
    assert tracker.finish("KILLED") == 0
    client = MlflowClient(uri)
    # Step 20 came twice, for a worker was lost; what was logged last counts, in whatever order it arrives.
    for time, step, recall in ((4, 20, 0.2), (1, 10, 0.1), (2, 20, 0.15), (5, 30, 0.3)):
        client.log_metric(tracker.run_id, METRIC, recall, time, step)
        client.log_metric(tracker.run_id, "samples_seen", step * 64.0, time, step)
    client.log_metric(tracker.run_id, "samples_seen", 2000.0, 6, 31)  # a report without validation
    run = run_folder(tmp_path / "run", BASE, [checkpoint(640, 0.1)], mlflow={"run_id": tracker.run_id})
    (found,) = gather([run])
    assert found.curve == [(640.0, 0.1), (1280.0, 0.2), (1920.0, 0.3)] and found.samples == 1920
    assert found.status == "stopped" and found.seconds > 0 and found.protocol["validation manifest"] == "m2"

    folder = sweep(tmp_path, grid(), mlflow_run_id=tracker.run_id)
    outcome = compare_runs([folder])
    assert outcome.report == storage.join(folder, "report.html")
    entity = run_of(uri, tracker.run_id)
    assert entity.info.status == "KILLED"
    stored = Path(entity.info.artifact_uri.removeprefix("file://")) / "report.html"
    assert stored.read_bytes() == Path(outcome.report).read_bytes()
    assert Histories().read("0" * 32, METRIC) is None and not attach("0" * 32, stored)  # not there


def test_without_mlflow_the_comparison_goes_on_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    config = [BASE.override({"name": name}) for name in "ab"]
    runs = [
        run_folder(tmp_path / c.name, c, [checkpoint(900, 0.2)], metrics=scores(0.2), mlflow={"run_id": "x" * 32})
        for c in config
    ]
    found = gather(runs)
    assert [run.curve for run in found] == [[(900, 0.2)]] * 2
    assert len([record for record in caplog.records if "without MLflow" in record.message]) == 1
    file = tmp_path / "page.html"
    file.write_text("page")
    caplog.clear()
    assert not attach("x" * 32, file)
    assert "page.html is not in MLflow" in caplog.text


def test_the_command_writes_the_page_where_it_is_told_and_for_one_sweep_beside_it(tmp_path, no_mlflow, s3):
    uri = sweep(s3.bucket(), grid())
    outcome = compare_runs([uri])
    assert outcome.report == f"{uri}/report.html" and "Best: t4" in outcome.text
    check_page(storage.read_bytes(outcome.report).decode())
    other = sweep(tmp_path, grid())
    outcome = compare_runs([uri, other])
    assert outcome.report == "" and "sweep" in outcome.text
    outcome = compare_runs([uri, other], out=str(tmp_path / "new"))
    assert Path(outcome.report) == tmp_path / "new" / "report.html" and Path(outcome.report).is_file()
    assert not no_mlflow.exists()


def test_a_sweep_whose_folder_cannot_be_written_is_compared_all_the_same(tmp_path, caplog):
    uri = sweep(tmp_path, grid())
    Path(uri, "report.html").mkdir()
    outcome = compare_runs([uri])
    assert outcome.report == "" and "Best: t4" in outcome.text and "no report" in caplog.text
    with pytest.raises(InputError):
        compare_runs([uri], out=uri)
