import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from models.config import EncoderConfig, InputError, TextConfig, VisionConfig
from models.encoders import DualEncoder, resolve
from models.package import load_package, save_package
from models.preprocess import CaptionTokenizer, PreprocessorConfig, train_tokenizer
from pipelines.data.synthetic import CorpusConfig
from pipelines.demo.run import contact_rows, make_corpus, read_pairs, series
from pipelines.report.charts import HEIGHT, WIDTH, Chart, label, line_chart, nice_ticks, running_mean
from pipelines.report.page import ContactRow, TrainingPage, recall_rows, training_report

SVG = re.compile(r"<svg viewBox.*?</svg>", re.DOTALL)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def drawing(html: str) -> ET.Element:
    """The chart itself, without the legend's samples; fails on markup that is not well formed."""
    return ET.fromstring(next(svg for svg in SVG.findall(html) if "role" in svg))


def points_of(element: ET.Element) -> list[tuple[float, float]]:
    numbers = [float(text) for text in re.findall(r"-?[\d.]+", element.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


class Collector(HTMLParser):
    """Tags with attributes, in order; checks that what is opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


# Charts


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 50_000, [0, 10_000, 20_000, 30_000, 40_000, 50_000]),
        (3.1, 5.3, [3.0, 3.5, 4.0, 4.5, 5.0, 5.5]),
        (-2, 2, [-2, -1, 0, 1, 2]),
    ],
)
def test_ticks_are_round_numbers_that_cover_the_values(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-9, 1e12])
def test_equal_values_still_get_an_axis(value):
    ticks = nice_ticks(value, value)
    assert ticks[0] <= value <= ticks[-1] and ticks[0] < ticks[-1] and len(ticks) < 10


def test_tick_labels_have_the_decimals_they_need():
    assert [label(value, 10_000) for value in (0, 10_000)] == ["0", "10k"]
    assert label(0.5, 0.5) == "0.5" and label(2.0, 1.0) == "2" and label(0.125, 0.005) == "0.125"
    assert label(0.2, 0.1, percent=True) == "20%" and label(0.015, 0.005, percent=True) == "1.5%"


def tick(svg: ET.Element, text: str, axis: str) -> float:
    """Where a tick's label stands: its x, or the height of its grid line."""
    found = [e for e in svg.iter("text") if e.text == text and (e.attrib.get("class") == "y") == (axis == "y")]
    return float(found[0].attrib[axis]) - (4 if axis == "y" else 0)


def curve(svg: ET.Element) -> list[tuple[float, float]]:
    return points_of(next(path for path in svg.iter("path") if "line" in path.attrib["class"].split()))


def test_a_chart_draws_each_value_where_the_axes_say():
    svg = drawing(line_chart(Chart("loss", "step", {"": [(0.0, 0.0), (50.0, 10.0), (100.0, 5.0)]})))
    across, up = [tick(svg, "0", "x"), tick(svg, "100", "x")], [tick(svg, "0", "y"), tick(svg, "10", "y")]
    expected = [(across[0], up[0]), (sum(across) / 2, up[1]), (across[1], sum(up) / 2)]
    for got, wanted in zip(curve(svg), expected, strict=True):
        assert got == pytest.approx(wanted, abs=0.2)
    assert across[0] < across[1] <= WIDTH and 0 <= up[1] < up[0] <= HEIGHT


def test_a_long_series_is_thinned_to_means_of_neighbours():
    svg = drawing(line_chart(Chart("loss", "step", {"": [(i, i % 2 + i // 400) for i in range(800)]})))
    line = curve(svg)
    assert len(line) == 400
    assert {y for _, y in line[:200]} == {line[0][1]} and {y for _, y in line[200:]} == {line[-1][1]}
    assert line[0][1] > line[-1][1]


@pytest.mark.parametrize("points", [[], [(1.0, math.nan)], [(3.0, 2.0)], [(0.0, math.inf), (1.0, 1.0), (2.0, 1.0)]])
def test_missing_and_infinite_values_leave_a_chart_that_can_be_read(points):
    html = line_chart(Chart("loss", "step", {"a": points}, smooth=True))
    drawing(html)
    assert "nan" not in html.lower().replace("name", "") and "inf" not in html


def test_series_differ_by_more_than_colour_and_are_described_in_words():
    html = line_chart(
        Chart("recall", "samples", {"at 1": [(0, 0.0), (1, 0.5)], "at 5": [(0, 0), (1, 1)]}, percent=True)
    )
    svg = drawing(html)
    dashes = [p.attrib.get("stroke-dasharray", "") for p in svg.iter("path") if "line" in p.attrib["class"]]
    assert len(set(dashes)) == 2
    assert svg.attrib["role"] == "img" and "at 1 from 0.0% to 50.0%" in svg.attrib["aria-label"]
    legend = html.split('<ul class="legend">')[1].split("</ul>")[0]
    assert "at 1</li>" in legend and "at 5</li>" in legend and "stroke-dasharray" in legend


def test_the_running_mean_of_a_straight_line_is_the_line_inside():
    line = [(float(i), 2.0 * i) for i in range(100)]
    smooth = running_mean(line)
    assert len(smooth) == 100 and [y for _, y in smooth[5:-5]] == pytest.approx([y for _, y in line[5:-5]])
    assert smooth[0][1] == pytest.approx(5.0)  # at the ends the mean of what is there
    assert running_mean([(0.0, 3.0)]) == [(0.0, 3.0)]


# Pages


def page(**changes) -> TrainingPage:
    row = ContactRow("a <b>red</b> & round ring", [png("red"), png("blue")], [False, True], "remark <i>")
    values = {
        "title": "run <script>alert(1)</script>",
        "lead": "5 < 6",
        "facts": {"data": "s3://bucket/<x>"},
        "recall": {f"image_retrieval_recall_at_{k}": k / 100 for k in (1, 5, 10)}
        | {"images": 200.0, "captions": 200.0},
        "contact_sheet": [row],
        "validation": {"image_retrieval_recall_at_1": [(0, 0.0), (100, 0.1)]},
        "losses": {"<cma>": [(0, 5.0), (1, 4.0)]},
    }
    return TrainingPage(**values | changes)


def test_a_page_needs_nothing_from_outside_and_runs_no_script(tmp_path):
    training_report(tmp_path / "new" / "report.html", page())
    html = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    tags = Collector(html).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    addresses = [value for _, attrs in tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert addresses and all((value or "").startswith("data:image/png;base64,") for value in addresses)
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_every_text_is_escaped(tmp_path):
    training_report(tmp_path / "report.html", page())
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for raw in ("<script>", "<b>red", "<i>", "<x>", "<cma>"):
        assert raw not in html
    assert "a &lt;b&gt;red&lt;/b&gt; &amp; round ring" in html and "&lt;cma&gt;" in html


def test_right_pictures_are_marked_by_border_tick_and_words(tmp_path):
    training_report(tmp_path / "report.html", page())
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    hits = html.split('<ol class="hits">')[1].split("</ol>")[0].split("</li>")
    assert "right" not in hits[0] and "✓" not in hits[0]
    assert "class=right" in hits[1] and "✓" in hits[1] and 'alt="Rank 2, right"' in hits[1]


def test_empty_parts_are_left_out(tmp_path):
    training_report(tmp_path / "report.html", TrainingPage("only a title"))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<section>" not in html and "only a title" in html


def test_pictures_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JPEG, PNG"):
        training_report(tmp_path / "report.html", page(contact_sheet=[ContactRow("a", [b"<svg/>"], [True])]))


def test_the_recall_table_has_the_stages_that_were_measured_and_chance():
    first = {f"{task}_retrieval_recall_at_{k}": k / 50 for task in ("image", "text") for k in (1, 5, 10)}
    reranked = {f"image_retrieval_recall_at_{k}_reranked": k / 40 for k in (1, 5, 10)}
    assert recall_rows(first | reranked | {"images": 4.0}) == [
        ("text to image", [0.02, 0.1, 0.2]),
        ("text to image, re-ranked", [0.025, 0.125, 0.25]),
        ("image to text", [0.02, 0.1, 0.2]),
        ("chance, text to image", [0.25, 1.0, 1.0]),
    ]
    assert recall_rows({"images": 4.0}) == []


# The demo's parts


def test_a_corpus_of_the_same_settings_is_kept_and_another_one_replaced(tmp_path):
    folder = make_corpus(tmp_path / "data", CorpusConfig(pairs=20))
    file = next((folder / "train").iterdir())
    written = file.stat().st_mtime_ns
    make_corpus(folder, CorpusConfig(pairs=20))
    assert file.stat().st_mtime_ns == written
    make_corpus(folder, CorpusConfig(pairs=20, seed=1))
    assert json.loads((folder / "corpus.json").read_text())["seed"] == 1
    assert len(read_pairs(folder / "test", 30)) == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").touch()
    with pytest.raises(InputError, match="move it"):
        make_corpus(tmp_path / "data", CorpusConfig(pairs=20))
    assert (tmp_path / "data" / "mine").exists()


def test_history_becomes_curves_and_a_repeated_step_counts_once():
    step = {"kind": "step", "samples": 64, "metrics": {"train/loss/cma": 3.0, "perf/samples_per_second": 9.0}}
    history = [
        step | {"step": 2},
        step | {"step": 1},
        step | {"step": 2, "metrics": {"train/loss/cma": 2.0}},
        {"kind": "validation", "step": 2, "samples": 128, "metrics": {"val/image_retrieval_recall_at_1": 0.1}},
    ]
    assert series(history, "step", "train/loss/", "step") == {"cma": [(1, 3.0), (2, 2.0)]}
    assert series(history, "validation", "val/", "samples") == {"image_retrieval_recall_at_1": [(128, 0.1)]}


def test_the_contact_sheet_shows_the_nearest_pictures_and_marks_equal_words(tmp_path):
    colours = ["red", "green", "blue", "black", "white", "yellow", "red"]
    pairs = [(f"a {colour} square", png(colour)) for colour in colours]
    tokenizer = CaptionTokenizer.from_json(train_tokenizer([caption for caption, _ in pairs], 100).to_str())
    small = EncoderConfig(
        vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        text=TextConfig(max_tokens=8, max_positions=8, width=16, layers=1, heads=2),
        embed_dim=8,
    )
    config = resolve(small, tokenizer.vocab_size)
    torch.manual_seed(0)
    model = DualEncoder(config)
    save_package(tmp_path, config, model, tokenizer, PreprocessorConfig(image_size=16, max_tokens=8), "toy")
    package = load_package(tmp_path)
    rows = contact_rows(package, pairs, 3)
    assert [row.caption for row in rows] == [pairs[0][0], pairs[3][0], pairs[6][0]]
    for row in rows:
        assert len(row.images) == len(row.right) == 5
        own = {image for caption, image in pairs if caption == row.caption}
        assert [image in own for image in row.images] == row.right
        assert bool(row.remark) == (not any(row.right))
    assert rows[0].images == rows[2].images  # equal captions find equal pictures
