"""`sweep.json`: written whole, read back equal, on a disk and on S3; what is read from it."""

import json

import pytest

from models.config import InputError
from pipelines import storage
from pipelines.config import PRESETS
from tuning.sweep.sweep_record import FILE_NAME, METRIC, Protocol, Repeat, Sweep, Trial, run_overrides, short_names

BOTH_DIRECTIONS = {"val/image_retrieval_recall_at_1": 0.5, "val/text_retrieval_recall_at_1": 0.3}


@pytest.fixture
def sweep() -> Sweep:
    """One with a trial of each status."""
    finished = Trial(
        trial_id="t00",
        overrides={"objective.temperature.start": 0.07, "optim.betas": [0.9, 0.98]},
        status="finished",
        metrics=BOTH_DIRECTIONS,
        samples_seen=900,
        seconds=12.5,
        curve=[(100, 0.1), (900, 0.39)],
        alarms=["codebook/dead 0.6 is above 0.5"],
        repeats=[Repeat(seed=1, metrics={METRIC: 0.2}, samples_seen=900)],
        mlflow_run_id="abc",
        run_folder="trials/t00",
    )
    others = [
        Trial(trial_id="t01", status="pruned", reason="place 2 of 3", samples_seen=300, curve=[(100, 0.2), (300, 0.3)]),
        Trial(trial_id="t02", status="failed", reason="NaN", samples_seen=700, curve=[(300, 0.9)]),
        Trial(trial_id="t03", status="running", samples_seen=300, curve=[(100, 0.1), (300, 0.4)]),
        Trial(trial_id="t04"),
    ]
    return Sweep(
        name="s",
        preset="both-tiny",
        base=PRESETS["both-tiny"].override({"out": "/out", "name": "s"}),
        space={"objective.temperature.start": {"grid": [0.035, 0.07]}, "optim.betas": {"choice": [[0.9, 0.98]]}},
        search="grid",
        scheduler="halving",
        trials_planned=5,
        repeats_planned=1,
        samples_planned=900,
        protocol=Protocol(val_data="/val", val_manifest="hash", pairs=100),
        commit="c",
        created="2026-01-01T00:00:00Z",
        trials=[finished, *others],
    )


def test_it_is_read_back_equal_from_a_folder(sweep, tmp_path):
    sweep.save(str(tmp_path))
    assert Sweep.load(str(tmp_path)) == sweep == Sweep.load(str(tmp_path / FILE_NAME))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_it_is_read_back_equal_from_s3(sweep, s3):
    folder = f"{s3.bucket()}/sweeps/s"
    sweep.save(folder)
    sweep.trials[3].status = "finished"
    sweep.save(folder)
    assert Sweep.load(folder) == sweep


def test_the_file_has_the_names_that_its_format_has(sweep, tmp_path):
    sweep.save(str(tmp_path))
    tree = json.loads((tmp_path / FILE_NAME).read_text(), parse_constant=pytest.fail)
    assert {"name", "preset", "base", "space", "search", "scheduler", "trials_planned", "repeats_planned"} <= set(tree)
    assert {"seed", "metric", "protocol", "mlflow_run_id", "commit", "created", "trials"} <= set(tree)
    assert tree["base"]["objective"]["weights"]["mlm"] == 1 and tree["metric"] == "val/recall_at_1_mean"
    names = {"trial_id", "overrides", "status", "reason", "metrics", "samples_seen", "seconds", "curve", "alarms"}
    assert set(tree["trials"][0]) == names | {"repeats", "mlflow_run_id", "run_folder"}
    assert tree["trials"][0]["curve"] == [[100, 0.1], [900, 0.39]]


def test_a_reader_never_sees_half_a_file(sweep, tmp_path, monkeypatch):
    sweep.save(str(tmp_path))

    def fail(*arguments: object) -> None:
        raise OSError("killed between writing and moving")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    changed = sweep.model_copy(update={"name": "other"})
    with pytest.raises(InputError):
        changed.save(str(tmp_path))
    assert Sweep.load(str(tmp_path)) == sweep


def test_a_missing_or_damaged_file_is_one_line(sweep, tmp_path):
    with pytest.raises(InputError, match=f"{FILE_NAME}: no such sweep"):
        Sweep.load(str(tmp_path))
    for text in ("{", '{"name": 1}', sweep.model_dump_json().replace('"status":"failed"', '"status":"lost"')):
        storage.write_bytes(str(tmp_path / FILE_NAME), text.encode())
        with pytest.raises(InputError, match="damaged, or written by another version") as caught:
            Sweep.load(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_recall_is_that_of_the_packaged_model_or_of_the_last_validation(sweep):
    recalls = [trial.recall for trial in sweep.trials]
    assert recalls == [0.4, 0.3, 0.9, 0.4, None]


def test_a_curve_keeps_the_newer_of_what_was_trained_twice():
    trial = Trial(trial_id="t")
    for seen, value in ((64, 0.1), (128, 0.2), (192, 0.3), (128, 0.25), (200, 0.4)):
        trial.add_point(seen, value)
    assert trial.curve == [(64, 0.1), (128, 0.25), (200, 0.4)]
    assert trial.at(1) == 0.1 and trial.at(65) == 0.25 and trial.at(201) is None
    assert trial.samples_at(65) == 128 and trial.samples_at(201) is None


def test_the_best_comes_first_and_failed_ones_not_at_all(sweep):
    assert [trial.trial_id for trial in sweep.ranked()] == ["t00", "t03", "t01"]
    assert sweep.samples_used == 2200
    assert sweep.trial("t02").ended and not sweep.trial("t03").ended
    with pytest.raises(KeyError):
        sweep.trial("t99")


def test_the_winner_is_the_best_over_seeds_where_finalists_were_repeated(sweep):
    lucky, steady = sweep.trials[0], sweep.trials[3]
    steady.status, steady.metrics = "finished", {METRIC: 0.35}
    assert sweep.best() is lucky
    steady.repeats = [Repeat(seed=1, metrics={METRIC: 0.36}, samples_seen=900)]
    assert lucky.over_seeds() == [0.4, 0.2] and sweep.best() is steady


def test_a_trials_configuration_is_the_base_with_its_overrides_in_its_own_folder(sweep):
    experiment = sweep.experiment(sweep.trials[0])
    assert experiment.objective.temperature.start == 0.07 and experiment.optim.betas == (0.9, 0.98)
    assert (experiment.out, experiment.name, experiment.seed) == ("/out/s/trials", "t00", 0)
    assert run_overrides("s3://b/s", "t00", 5) == {"out": "s3://b/s/trials/t00/repeats", "name": "5", "seed": 5}


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["objective.codebook.size", "objective.queue.size", "seed"], ["codebook.size", "queue.size", "seed"]),
        (["objective.temperature.start", "objective.codebook.start"], ["temperature.start", "codebook.start"]),
        (["a.x.y", "b.x.y", "objective.codebook.ipot.beta"], ["a.x.y", "b.x.y", "ipot.beta"]),
        (["x.y", "a.x.y"], ["x.y", "a.x.y"]),
    ],
)
def test_keys_are_named_as_shortly_as_they_can_be_told_apart(keys, names):
    assert short_names(keys) == dict(zip(keys, names, strict=True))
