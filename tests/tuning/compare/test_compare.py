import dataclasses
import math
import statistics
from pathlib import Path

import pytest

from models.config import InputError
from pipelines import storage
from pipelines.tracking.history import Histories, attach
from pipelines.tracking.run import EXPERIMENT, Tracker
from tests.support.comparison_cases import (
    BASE,
    K,
    T,
    check_page,
    checkpoint,
    full_grid,
    grid,
    item,
    run_folder,
    scores,
    sweep,
    trial,
)
from tests.support.mlflow_runs import run_of
from tuning.compare.collect import Compared, gather
from tuning.compare.compare_runs import compare_runs
from tuning.compare.importance import at, between_groups, front, importance, level, rank_correlation
from tuning.compare.ranking import compare, estimate, queries, seed_spread, short_names, wilson, within_error
from tuning.compare.table import headline, table_text
from tuning.sweep.sweep_record import METRIC, Repeat

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)


@pytest.fixture
def no_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "no.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    return file


# Intervals


@pytest.mark.parametrize(("share", "count"), [(0.0, 50), (0.1, 20), (0.37, 2000), (1.0, 7)])
def test_wilsons_bounds_are_the_shares_that_the_sample_just_does_not_rule_out(share, count):
    z = 1.96
    for bound in wilson(share, count, z):
        assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / count, abs=1e-12)
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1 and high > low


def test_the_mean_of_two_shares_is_worth_as_many_queries_as_give_it_its_variance():
    assert queries(scores(0.5, pairs=1000)) == 2000 and queries({"val/pairs": 500.0}) == 1000
    images, captions, p = 200.0, 1000.0, 0.3
    variance = (p * (1 - p) / images + p * (1 - p) / captions) / 4
    count = queries({"val/images": images, "val/captions": captions})
    assert p * (1 - p) / count == pytest.approx(variance)
    assert queries({}) == 0.0


def test_several_seeds_give_a_mean_its_spread_and_a_smaller_error():
    recalls = [0.30, 0.33, 0.27]
    repeated = item("a", recalls[0], repeats=[scores(r) for r in recalls[1:]])
    found = estimate(repeated)
    assert found.value == pytest.approx(0.30) and found.seeds == 3
    assert (found.high - found.low) / 2 == pytest.approx(statistics.stdev(recalls))
    assert found.error == pytest.approx(estimate(item("b", 0.30)).error / math.sqrt(3))


def test_the_spread_over_seeds_is_pooled_and_counts_for_single_runs_too():
    one, other = [0.2, 0.3], [0.5, 0.52, 0.6]
    items = [
        item("a", one[0], repeats=[scores(one[1])]),
        item("b", other[0], repeats=[scores(r) for r in other[1:]]),
        item("c", 0.4),
    ]
    squares = sum((r - statistics.fmean(rs)) ** 2 for rs in (one, other) for r in rs)
    assert seed_spread(items) == pytest.approx(math.sqrt(squares / 3))
    assert seed_spread([item("c", 0.4)]) == 0.0
    assert estimate(items[2], 0.05).error == 0.05 and estimate(items[2], 1e-6).error > 1e-3  # the larger of the two


def test_a_repeat_without_metrics_is_no_seed():
    assert estimate(item("a", 0.3, repeats=[{}])).seeds == 1


# Ranks


def test_runs_within_their_errors_share_a_rank_and_the_next_one_counts_them():
    comparison = compare([item("d", 0.10), item("b", 0.29), item("a", 0.30), item("c", 0.20), item("e", 0.205)])
    assert [(row.item.name, row.rank, row.tied, row.number) for row in comparison.rows] == [
        ("a", 1, True, 1),
        ("b", 1, True, 2),
        ("e", 3, True, 3),
        ("c", 3, True, 4),
        ("d", 5, False, 5),
    ]
    assert headline(comparison).endswith("Within its error: b.")


def test_a_group_is_all_that_its_first_cannot_be_told_from():
    """0.29 is like 0.27, which is like 0.25; but 0.25 is not like 0.29, so it begins a group."""
    rows = compare([item(f"{r}", r) for r in (0.29, 0.27, 0.25)]).rows
    a, b, c = (row.estimate for row in rows)
    assert within_error(a, b) and within_error(b, c) and not within_error(a, c)
    assert [row.rank for row in rows] == [1, 1, 3]


def test_of_those_that_are_as_good_the_repeated_ones_come_first():
    items = [item("lucky", 0.31), item("sure", 0.30, repeats=[scores(0.30)]), item("far", 0.2, repeats=[scores(0.2)])]
    comparison = compare([*items, item("on", 0.5, status="running")])
    found = [(row.item.name, row.rank, row.number) for row in comparison.rows]
    assert found == [("sure", 1, 1), ("lucky", 1, 2), ("far", 3, 3), ("on", 0, 4)]
    assert headline(comparison).startswith("Best: sure")


@pytest.mark.parametrize(("pairs", "ranks"), [(100, [1, 1]), (100_000, [1, 2])])
def test_more_queries_tell_apart_what_fewer_do_not(pairs, ranks):
    items = [item("a", metrics=scores(0.32, pairs=pairs)), item("b", metrics=scores(0.30, pairs=pairs))]
    assert [row.rank for row in compare(items).rows] == ranks


def test_seeds_that_spread_tie_what_queries_alone_would_tell_apart():
    def two(spread: float) -> list[int]:
        many = {"pairs": 100_000}
        repeats = [scores(0.32 + spread, **many), scores(0.32 - spread, **many)]
        items = [item("a", metrics=scores(0.32, **many), repeats=repeats), item("b", metrics=scores(0.30, **many))]
        return [row.rank for row in compare(items).rows]

    assert two(0.001) == [1, 2] and two(0.03) == [1, 1]


def test_only_what_finished_has_a_rank_and_what_has_no_recall_comes_last():
    items = [
        item("lost", None, status="failed"),
        item("early", 0.9, status="pruned"),
        item("on", 0.95, status="running"),
        item("done", 0.2),
        item("odd", None),
    ]
    comparison = compare(items)
    assert [(row.item.name, row.rank) for row in comparison.rows] == [
        ("done", 1),
        ("on", 0),
        ("early", 0),
        ("lost", 0),
        ("odd", 0),
    ]
    assert headline(comparison).startswith("Best: done")
    assert "nothing to rank" in headline(compare(items[:3]))


def test_runs_that_were_scored_differently_are_not_ranked_but_told_apart():
    items = [
        item("x", 0.1, protocol={"validation data": "/val", "pictures scored": "1,000"}),
        item("y", 0.3, protocol={"validation data": "/val", "pictures scored": "500"}),
        item("z", 0.2, protocol={"validation data": "/val"}),
    ]
    comparison = compare(items)
    assert comparison.protocol == ["pictures scored: 1,000 (x); 500 (y)"]
    assert [row.item.name for row in comparison.rows] == ["x", "y", "z"] and not comparison.ranked
    text = table_text(comparison, terminal=False)
    assert (
        "rank" not in text.splitlines()[0].split()
        and "Not ranked" in text
        and "Differs: pictures scored: 1,000 (x); 500 (y)" in text
    )
    assert compare([items[0], items[2]]).ranked  # what z does not know is no difference


def test_who_has_no_recall_does_not_keep_the_others_from_being_ranked():
    items = [item("x", 0.1, protocol={"validation data": "/a"}), item("y", protocol={"validation data": "/b"})]
    assert compare(items).ranked


def test_another_depth_of_reranking_is_told_and_ranks_stay():
    items = [item("x", metrics=scores(0.1) | {"val/rerank_top": 16.0}), item("y", metrics=scores(0.2))]
    assert not any("Re-ranked" in note for note in compare(items).notes)
    items.append(item("z", metrics=scores(0.3) | {"val/rerank_top": 32.0}))
    comparison = compare(items)
    assert any("16, 32" in note for note in comparison.notes) and comparison.ranked[0].item.name == "z"


# Settings


def test_only_keys_that_differ_are_shown_and_places_are_no_settings():
    configs = [BASE.override({"name": "a", "out": "/a", T: 0.05}), BASE.override({"name": "b", T: 0.1, "seed": 3})]
    comparison = compare([item("a", 0.1, config=configs[0]), item("b", 0.2, config=configs[1])])
    assert comparison.keys == ["seed", T]
    assert [comparison.value(row, T) for row in comparison.rows] == [0.1, 0.05]
    assert "temperature.start" in table_text(comparison, terminal=False)


def test_the_vocabulary_that_training_counted_is_no_setting_unless_it_was_given():
    sizes = [BASE, BASE.override({"encoder.text.vocab_size": 900})]
    assert compare([item(f"{i}", 0.1, config=config) for i, config in enumerate(sizes)]).keys == []
    given = [config.override({"encoder.text.tokenizer": "some"}) for config in sizes]
    items = [item(f"{i}", 0.1, config=config) for i, config in enumerate(given)]
    assert compare(items).keys == ["encoder.text.vocab_size"]


def test_names_are_as_short_as_they_can_be():
    keys = ["objective.temperature.start", "objective.codebook.start", "seed", "a.x.y", "b.x.y"]
    assert list(short_names(keys).values()) == ["temperature.start", "codebook.start", "seed", "a.x.y", "b.x.y"]


# Reading


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
    assert a.protocol["validation manifest"] == "m1" and a.protocol["pictures scored"] == "1,000"
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


# MLflow


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


# What mattered


def test_in_a_full_grid_of_sums_the_shares_are_those_of_the_variances_and_make_up_the_whole():
    found = importance(compare(full_grid()))
    one, other = statistics.pvariance([0, 0.05, 0.1]), statistics.pvariance([0, 0.02, 0])
    assert [share.key for share in found.shares] == [T, K]
    assert [share.share for share in found.shares] == pytest.approx([one / (one + other), other / (one + other)])
    assert sum(share.share for share in found.shares) == pytest.approx(1)
    assert found.shares[0].chance == pytest.approx(2 / 8) and found.samples == 0


def test_the_share_between_groups_is_the_definitions():
    values, recalls = ["a", "b", "a", "b", "b"], [0.1, 0.4, 0.3, 0.2, 0.6]
    total = sum((r - statistics.fmean(recalls)) ** 2 for r in recalls)
    within = 0.0
    for name in "ab":
        group = [r for value, r in zip(values, recalls, strict=True) if value == name]
        within += sum((r - statistics.fmean(group)) ** 2 for r in group)
    assert between_groups(values, recalls) == pytest.approx(1 - within / total)


def test_the_correlation_of_ranks_sees_order_only():
    assert rank_correlation([1, 2, 3, 4], [0.1, 0.2, 0.9, 1.0]) == pytest.approx(1)
    assert rank_correlation([4, 3, 2, 1], [0.1, 0.2, 0.9, 1.0]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 2], [1, 2, 1, 2]) == pytest.approx(0)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0
    one, other = [3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 7.0, 1.0, 8.0, 2.0]
    mean_ranks = [statistics.correlation([3, 1.5, 4, 1.5, 5], [2.5, 4, 1, 5, 2.5])]
    assert [rank_correlation(one, other)] == pytest.approx(mean_ranks)


def test_numbers_drawn_anew_are_judged_by_rank_and_too_few_runs_not_at_all():
    def drawn(count: int) -> list[Compared]:
        return [
            item(f"{i}", 0.1 + 0.01 * i, config=BASE.override({T: 0.01 * 1.7**i}), overrides={T: 0.01 * 1.7**i})
            for i in range(count)
        ]

    found = importance(compare(drawn(6)))
    assert found.shares == [(T, pytest.approx(1.0), pytest.approx(1 / 5))]
    assert importance(compare(drawn(3))).shares == []
    same = [dataclasses.replace(run, metrics=scores(0.3)) for run in drawn(6)]
    assert importance(compare(same)).shares == []


def test_pruned_runs_are_compared_where_the_first_of_them_ended():
    items = [
        item("a", 0.3, curve=[(100, 0.1), (200, 0.2), (400, 0.3)]),
        item("b", 0.1, status="pruned", curve=[(100, 0.05), (150, 0.1)]),
        item("c", None, status="failed", curve=[(50, 0.01)]),
        item("d", 0.2),
        item("e", 0.4, curve=[(300, 0.3), (400, 0.4)]),  # what it was at 150, nobody knows
    ]
    comparison = compare(items)
    numbers = {row.item.name: row.number for row in comparison.rows}
    equal = level(comparison)
    assert equal.samples == 150
    assert equal.scores == {numbers["a"]: pytest.approx(0.15), numbers["b"]: 0.1}


@pytest.mark.parametrize(("samples", "value"), [(0, 1.0), (10, 1.0), (15, 1.5), (20, 2.0), (30, 4.0), (99, 6.0)])
def test_between_its_points_a_curve_is_straight_and_beyond_them_level(samples, value):
    assert at([(10, 1.0), (20, 2.0), (40, 6.0)], samples) == pytest.approx(value)


def test_the_front_is_all_that_nothing_beats():
    points = [(float((7 * i) % 10), float((3 * i * i) % 11)) for i in range(12)]
    beaten = {
        i
        for i, (cost, recall) in enumerate(points)
        for other, (less, more) in enumerate(points)
        if other != i and less <= cost and more >= recall and (less < cost or more > recall)
    }
    assert {points[i] for i in front(points)} == {points[i] for i in range(len(points)) if i not in beaten}
    costs = [points[i][0] for i in front(points)]
    assert costs == sorted(costs) and front([]) == []


# The command


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
