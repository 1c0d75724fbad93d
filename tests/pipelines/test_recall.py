"""Recall: one rule for the mean wherever it is read, a missing one never wins, and the rows of tables."""

import math

import pytest

from models.config import InputError
from pipelines.artifacts.resolve import best_checkpoint
from pipelines.recall import MEAN_RECALL, mean_recall, recall_table, rows_with_chance
from tests.support.comparison_cases import BASE, item, run_folder
from tuning.compare.ranking import compare
from tuning.promote.candidate import best_trial
from tuning.sweep.live_table import progress_line, summary, sweep_table
from tuning.sweep.sweep_record import Protocol, Repeat, Sweep, Trial

IMAGE, TEXT = "val/image_retrieval_recall_at_1", "val/text_retrieval_recall_at_1"
UNMEASURED = [
    {},
    {IMAGE: 0.9},
    {TEXT: 0.9, "val/text_retrieval_recall_at_5": 1.0},
    {IMAGE: 0.9, TEXT: math.nan},
    {IMAGE: math.inf, TEXT: 0.9},
    {IMAGE: 0.9, TEXT: -math.inf},
    {MEAN_RECALL: math.nan},
    {MEAN_RECALL: math.inf, IMAGE: 0.9, TEXT: 0.9},
]


def measured(recall):
    return {IMAGE: recall, TEXT: recall}


def sweep_of(trials):
    return Sweep(
        name="s",
        preset="both-tiny",
        base=BASE,
        space={},
        search="grid",
        scheduler="none",
        trials_planned=len(trials),
        samples_planned=900,
        protocol=Protocol(val_data="/val", val_manifest="hash", pairs=100),
        trials=trials,
    )


def test_it_is_the_mean_of_both_ways_or_as_it_was_measured_while_training():
    assert mean_recall({IMAGE: 0.2, TEXT: 0.4}) == pytest.approx(0.3)
    assert mean_recall({IMAGE: 0.2, TEXT: 0.4, MEAN_RECALL: 0.25}) == mean_recall({MEAN_RECALL: 0.25}) == 0.25
    assert mean_recall({IMAGE: 0.0, TEXT: 0.0}) == 0.0


@pytest.mark.parametrize("metrics", UNMEASURED)
def test_what_is_missing_or_not_finite_is_no_number(metrics):
    assert mean_recall(metrics) is None


@pytest.mark.parametrize("metrics", UNMEASURED)
@pytest.mark.parametrize("order", ["abc", "bac", "bca"])
def test_the_best_checkpoint_is_one_that_was_measured(tmp_path, metrics, order):
    checkpoints = {"a": metrics, "b": measured(0.1) | {"step": 7}, "c": measured(0.0)}
    run = run_folder(tmp_path / "run", BASE, [checkpoints[name] for name in order])
    assert best_checkpoint(run).metrics == checkpoints["b"]


def test_a_run_of_which_no_checkpoint_was_measured_has_no_best_one(tmp_path):
    run = run_folder(tmp_path / "run", BASE, [*UNMEASURED])
    with pytest.raises(InputError, match=r"none of the run's checkpoints has a recall; name the one that is meant"):
        best_checkpoint(run)


@pytest.mark.parametrize("metrics", UNMEASURED)
@pytest.mark.parametrize("order", ["abc", "bac", "bca"])
def test_the_best_trial_is_one_that_was_measured(tmp_path, metrics, order):
    curve = [(900, 0.8)]  # of the validation sample: it does not stand for the packaged model
    trials = {
        "a": Trial(trial_id="a", status="finished", metrics=metrics, curve=curve, samples_seen=900),
        "b": Trial(trial_id="b", status="finished", metrics=measured(0.1), samples_seen=900),
        "c": Trial(trial_id="c", status="finished", metrics=measured(0.0), samples_seen=900),
    }
    sweep = sweep_of([trials[name] for name in order])
    assert sweep.best() is trials["b"] and [trial.trial_id for trial in sweep.ranked()] == ["b", "c"]
    storable = [trial if trial.trial_id != "a" else trial.model_copy(update={"metrics": {}}) for trial in sweep.trials]
    sweep_of(storable).save(str(tmp_path))
    assert best_trial(str(tmp_path)).trial_id == "b"
    rows = compare([item(name, metrics=trial.metrics) for name, trial in trials.items()]).rows
    assert [(row.item.name, row.rank) for row in rows] == [("b", 1), ("c", 2), ("a", 0)]


@pytest.mark.parametrize("metrics", UNMEASURED)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_repeat_that_was_not_measured_does_not_count(tmp_path, metrics, order):
    def finished(name, recalls, *repeats):
        repeats = [Repeat(seed=1 + n, metrics=one, samples_seen=900) for n, one in enumerate(repeats)]
        return Trial(trial_id=name, status="finished", metrics=measured(recalls), samples_seen=900, repeats=repeats)

    trials = {"a": finished("a", 0.9, metrics), "b": finished("b", 0.4, metrics, measured(0.2))}
    sweep = sweep_of([trials[name] for name in order])
    assert trials["a"].over_seeds() == [0.9] and trials["b"].over_seeds() == [0.4, 0.2]
    assert sweep.best() is trials["b"]
    for trial in trials.values():  # JSON has no NaN
        kept = [repeat for repeat in trial.repeats if all(map(math.isfinite, repeat.metrics.values()))]
        trial.repeats = kept or [Repeat(seed=1, metrics={}, samples_seen=900)]
    sweep.save(str(tmp_path))
    assert best_trial(str(tmp_path)).trial_id == "b"


def test_a_sweep_in_which_nothing_was_measured_has_no_best_trial(tmp_path):
    sweep = sweep_of([Trial(trial_id="a", status="finished", curve=[(900, 0.8)]), Trial(trial_id="b")])
    assert sweep.best() is None and sweep.ranked() == []
    sweep.save(str(tmp_path))
    with pytest.raises(InputError, match="of 2 none finished with a recall"):
        best_trial(str(tmp_path))


def test_a_missing_recall_is_shown_as_a_dash():
    sweep = sweep_of([Trial(trial_id="a", status="finished", metrics={MEAN_RECALL: math.nan}), Trial(trial_id="b")])
    assert list(sweep_table(sweep, {}).columns[3].cells) == ["-", "-"]
    assert "best recall@1 so far -" in progress_line(sweep, {})
    assert "best trial" not in summary(sweep, "/s")


def test_the_recall_table_has_the_stages_that_were_measured_and_chance():
    first = {f"{task}_retrieval_recall_at_{k}": k / 50 for task in ("image", "text") for k in (1, 5, 10)}
    reranked = {f"image_retrieval_recall_at_{k}_reranked": k / 40 for k in (1, 5, 10)}
    assert rows_with_chance(first | reranked | {"images": 4.0}) == [
        ("text to image", [0.02, 0.1, 0.2]),
        ("text to image, re-ranked", [0.025, 0.125, 0.25]),
        ("image to text", [0.02, 0.1, 0.2]),
        ("chance, text to image", [0.25, 1.0, 1.0]),
    ]
    assert rows_with_chance({"images": 4.0}) == []


def test_the_lines_of_a_terminal_have_each_stage_and_what_it_was_measured_on():
    both = {f"val/{task}_retrieval_recall_at_{k}": k / 50 for task in ("image", "text") for k in (1, 5, 10)}
    reranked = {f"val/text_retrieval_recall_at_{k}_reranked": k / 40 for k in (1, 5, 10)}
    counts = {"val/images": 1000.0, "val/captions": 5000.0, "val/rerank_top": 16.0, "val/rerank_queries": 256.0}
    lines = recall_table(both | reranked | counts).splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["R@1", "R@5", "R@10"],
        ["text", "to", "image,", "first", "stage", "2.0%", "10.0%", "20.0%"],
        ["image", "to", "text,", "first", "stage", "2.0%", "10.0%", "20.0%"],
        ["image", "to", "text,", "re-ranked", "2.5%", "12.5%", "25.0%"],
    ]
    assert lines[-1] == "1,000 images, 5,000 captions, re-ranked: first 16 of 256 queries a direction"
