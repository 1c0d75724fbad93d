"""The page of a comparison: whole, without anything from outside, escaped."""

import dataclasses
import re
from pathlib import Path

import pytest

from pipelines.config import PRESETS
from tests.support.comparison_cases import BASE, check_page, full_grid, grid, item, marks, scores, sweep
from tuning.compare.collect import gather
from tuning.compare.compare_runs import compare_runs
from tuning.compare.page import comparison_page
from tuning.compare.ranking import compare
from tuning.compare.table import table_text
from tuning.sweep.sweep_record import METRIC, Repeat

HEADINGS = ("Ranking", "Settings and recall", "Temperature and codebook", "Learning curves", "What mattered")


HEADINGS += ("Cost and quality", "The sweep")


def test_the_page_of_a_sweep_has_every_part_and_needs_nothing_from_outside(tmp_path):
    trials = grid()
    trials[4].repeats = [Repeat(seed=1, metrics=scores(0.31), samples_seen=900)]
    uri = sweep(tmp_path, trials)
    html = Path(compare_runs([uri]).report).read_text()
    assert Path(uri, "report.html").read_text(encoding="utf-8") == html
    charts = check_page(html)
    assert [text for text in HEADINGS if f"<h2>{text}</h2>" not in html] == []
    titles = re.findall("<figcaption>(.*?)</figcaption>", html)
    assert titles == [
        "Settings and recall",
        "Recall against temperature, after 300 samples",
        "Recall against temperature, at the end",
        "Recall against codebook size, after 300 samples",
        "Recall against codebook size, at the end",
        "Recall while training",
        "Share of the variance",
        "Recall for samples",
        "Recall for time",
    ]
    parts = dict(zip(titles, charts, strict=True))
    assert len(marks(parts["Recall while training"], "cross")) == 6
    everyone, finished = (parts[f"Recall against temperature, {when}"] for when in ("after 300 samples", "at the end"))
    assert len(marks(everyone, "dot")) == len(marks(everyone, "whisker")) == 9
    assert len(marks(everyone, "hollow")) == 6 and len(marks(finished, "dot")) == 3
    assert html.count("<tr") == 10 and "± " in html and "6 pruned" in html
    assert "4,500, 56% of all trials to their ends" in html  # 3 x 900 + 6 x 300 of 9 x 900
    assert "Best: t4 (temperature.start 0.05, codebook.size 256)" in html


def test_a_sweep_that_was_not_pruned_is_compared_at_its_end(tmp_path):
    html = comparison_page(compare(gather([sweep(tmp_path, grid(pruned=False))])))
    charts = check_page(html)
    assert "Bars are 95 %" in html and "can be compared after" not in html
    labels = [svg.attrib["aria-label"] for svg in charts]
    assert not any("after" in label for label in labels) and any(
        "against temperature, over" in label for label in labels
    )


def test_the_page_of_runs_that_cannot_be_compared_draws_none_of_it():
    items = [item(name, 0.2, protocol={"validation data": f"/{name}"}, curve=[(0, 0.1), (9, 0.2)]) for name in "ab"]
    html = comparison_page(compare(items))
    assert check_page(html) == [] and "validation data: /a (a); /b (b)" in html and "<h2>Runs</h2>" in html
    assert html.count("Left out") == 1 and "<td" in html
    assert ">rank<" not in html and "<h2>Learning curves" not in html


@pytest.mark.parametrize(
    "items",
    [
        [item("only", 0.2, curve=[(5, 0.2)])],
        [item("only")],
        [item("a", 0.2), item("b", 0.3, status="running", seconds=5.0)],
        [item("a", metrics={METRIC: 0.2}), item("b", metrics={METRIC: 0.3})],
        [item("a", 0.0), item("b", 0.0), item("c", 0.0), item("d", 0.0)],
        [dataclasses.replace(run, metrics=scores(0.0)) for run in full_grid()],
        [item("clip", 0.2, config=PRESETS["clip-tiny"]), item("tcl", 0.3, config=PRESETS["tcl-tiny"])],
    ],
    ids=["one", "no recall", "one finished", "no queries", "all 0", "grid of 0", "presets"],
)
def test_few_or_odd_runs_leave_a_page_and_a_table_that_can_be_read(items):
    comparison = compare(items)
    check_page(comparison_page(comparison))
    text = table_text(comparison, terminal=False)
    assert all(run.name in text for run in items) and "nan" not in text


def test_every_text_of_the_page_is_escaped():
    config = BASE.override({"train_data": "/<b>"})
    items = [
        item("<i>", 0.2, reason="<u>", alarms=["<s>"], status="pruned", curve=[(1, 0.1)]),
        item('"q"', 0.1, config=config, curve=[(1, 0.1)]),
    ]
    html = comparison_page(compare(items))
    check_page(html)
    for raw in ("<i>", "<u>", "<s>", "/<b>", 'name=""q'):
        assert raw not in html
    assert "&lt;i&gt;" in html and "/&lt;b&gt;" in html
