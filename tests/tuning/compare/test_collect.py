"""What is read of runs and sweeps: from their folders, and from MLflow where it can be reached."""

from pathlib import Path

import pytest

from models.config import InputError
from tests.support.comparison_cases import (
    BASE,
    T,
    checkpoint,
    run_folder,
    scores,
    sweep,
    trial,
)
from tuning.compare.collect import gather
from tuning.compare.ranking import compare
from tuning.sweep.sweep_record import Repeat

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)


def test_a_sweep_is_all_its_trials_with_the_codebooks_health_from_their_checkpoints(tmp_path):
    trials = [
        trial("a", 0.2, {T: 0.05}, repeats=[Repeat(seed=1, metrics=scores(0.22), samples_seen=900)]),
        trial("b", None, {T: 0.1}, status="failed", reason="out of memory", run_folder="trials/b"),
        trial("c", 0.1, {T: 0.2}),
        trial("d", None, {T: 0.3}, status="pending", run_folder=""),
        trial("e", None, {T: 0.4}, status="pending", run_folder=""),
    ]
    uri = sweep(tmp_path, trials)
    best = checkpoint(600, 0.25, **{"codebook/dead": 0.5})
    run_folder(Path(uri) / "trials" / "a", BASE, [best, checkpoint(900, 0.2)])
    run_folder(Path(uri) / "trials" / "b", BASE, [])
    run_folder(Path(uri) / "trials" / "c", BASE, [checkpoint(900, 0.1)])
    (Path(uri) / "trials" / "c" / "checkpoints" / "checkpoint_manager_snapshot.json").write_text("{")
    a, b, c, d, e = gather([uri])
    assert (a.name, a.config.objective.temperature.start, a.sweep) == ("a", 0.05, uri)
    assert a.metrics["codebook/dead"] == 0.5  # of the checkpoint that was packaged, the one of the highest recall
    assert a.recall == 0.2 and "val/pairs" not in a.metrics and a.sample_pairs == 500
    assert a.curve == [(300, 0.2 / 3), (900, 0.2)] and a.repeats == [scores(0.22)] and a.seconds == 60
    assert a.protocol["validation manifest"] == "m1" and a.protocol["images scored"] == "1,000"
    assert (b.status, b.reason, b.recall) == ("failed", "out of memory", None)
    assert c.recall == 0.1 and "codebook/dead" not in c.metrics  # its list of checkpoints is damaged
    assert (d.status, d.name, e.name) == ("pending", "d", "e")
    assert compare([a, b, c, d, e]).keys == [T]


def test_a_finished_run_is_read_from_its_folder(tmp_path, no_mlflow):
    config = BASE.override({"name": "mine", "val_data": "/data/val"})
    points = [checkpoint(600, 0.25), checkpoint(900, 0.2)]
    uri = run_folder(tmp_path / "run", config, points, metrics=scores(0.24, 0.28), mlflow={"run_id": "gone"})
    (found,) = gather([uri + "/"])
    assert (found.name, found.status, found.where) == ("mine", "finished", uri)
    assert found.recall == pytest.approx(0.26) and found.samples == 900 and found.seconds == 0
    assert found.curve == [(600, 0.25), (900, 0.2)] and found.sample_pairs == 500
    assert found.metrics["codebook/kappa"] == 0.25 and found.protocol["validation data"] == "/data/val"
    assert not no_mlflow.exists()  # looking makes no store


def test_a_run_that_did_not_finish_has_the_recall_of_its_last_validation(tmp_path, no_mlflow):
    uri = run_folder(tmp_path / "run", BASE.override({"name": "r"}), [checkpoint(600, 0.25), checkpoint(900, 0.2)])
    (found,) = gather([uri])
    assert (found.status, found.recall) == ("unfinished", 0.2)
    (empty,) = gather([run_folder(tmp_path / "new", BASE, [])])
    assert empty.recall is None and empty.name == "new"


def test_runs_of_one_name_are_called_by_their_folders_and_none_comes_twice(tmp_path, no_mlflow):
    config = BASE.override({"name": "r"})
    one, other = (run_folder(tmp_path / name / "r", config, [], metrics=scores(0.1)) for name in "ab")
    assert [found.name for found in gather([one, other, one])] == [one, other]


def test_trials_beside_others_carry_their_sweeps_name(tmp_path, no_mlflow):
    uri = sweep(tmp_path, [trial("a", 0.2, {T: 0.05})])
    run = run_folder(tmp_path / "run", BASE.override({"name": "r"}), [], metrics=scores(0.1))
    assert [found.name for found in gather([uri, run])] == ["sweep/a", "r"]


@pytest.mark.parametrize("kind", ["missing", "empty", "checkpoint", "package"])
def test_a_path_that_is_neither_is_refused_in_one_line(tmp_path, kind, no_mlflow):
    folder = tmp_path / "x"
    if kind != "missing":
        folder.mkdir()
    if kind == "checkpoint":
        (folder / "config.json").write_text(BASE.model_dump_json())
        (folder / "position.json").write_text("{}")
    if kind == "package":
        (folder / "config.json").write_text('{"format": "triptych-package"}')
    with pytest.raises(InputError, match="neither a run folder nor a sweep folder") as raised:
        gather([str(folder)])
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
