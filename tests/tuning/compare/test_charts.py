"""Charts of many runs: marks stand where their values say, and differ by more than colour."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from pipelines.report.charts import HEIGHT, WIDTH
from tests.support.comparison_cases import marks
from tuning.compare.charts import (
    Bar,
    Curve,
    Dot,
    Line,
    bar_chart,
    curve_chart,
    dot_chart,
    number_of,
    parallel_chart,
    value_axis,
)


def drawing(html: str) -> ET.Element:
    """The chart itself; fails on markup that is not well formed."""
    return ET.fromstring(re.search(r'<svg viewBox="[^"]*" role="img".*?</svg>(?=</figure>)', html, re.DOTALL).group())


def place_of(mark: ET.Element) -> tuple[float, float]:
    x, y = re.findall(r"-?[\d.]+", mark.attrib["transform"])
    return float(x), float(y)


def tick(svg: ET.Element, text: str) -> float:
    """The x of a tick's label, or the y of its line."""
    found = next(element for element in svg.iter("text") if element.text == text)
    return float(found.attrib["y"]) - 4 if found.attrib.get("class") == "y" else float(found.attrib["x"])


def test_dots_and_their_intervals_stand_where_the_axes_say():
    html = dot_chart("r", "t", {"": [Dot(1, 0.1, 0.1, 0.2, 1), Dot(10, 0.3, 0.2, 0.4, 2), Dot(100, 0.2, 0.2, 0.2, 3)]})
    svg = drawing(html)
    dots = [place_of(mark) for mark in marks(svg, "dot")]
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)  # equal ratios
    for (x, y), text, height in zip(dots, ("1", "10", "100"), ("10%", "30%", "20%"), strict=True):
        across = [float(e.attrib["x"]) for e in svg.iter("text") if e.text == text and not e.attrib.get("class")]
        assert x == pytest.approx(across[0], abs=0.2) and y == pytest.approx(tick(svg, height), abs=0.2)
    whiskers = marks(svg, "whisker")
    assert len(whiskers) == 2  # the third has no interval
    ends = [float(y) for y in re.findall(r"M[\d.-]+ ([\d.-]+)h6", whiskers[1].attrib["d"])]
    assert ends == pytest.approx([tick(svg, "20%"), tick(svg, "40%")], abs=0.2)
    assert "number 2 at 10: 30.0%" in svg.attrib["aria-label"]


def test_groups_differ_by_shape_and_runs_that_did_not_finish_are_hollow():
    html = dot_chart("r", "t", {"a": [Dot(1, 0.1, 0.1, 0.1, 1)], "b": [Dot(1, 0.1, 0.1, 0.1, 2, solid=False)]})
    one, other = marks(drawing(html), "dot")
    assert one.attrib["d"] != other.attrib["d"] and place_of(one)[0] < place_of(other)[0]  # side by side
    assert "hollow" in other.attrib["class"] and "hollow" not in one.attrib["class"]
    assert "a</li>" in html and "b</li>" in html


@pytest.mark.parametrize("values", [[0.07], [0.0], [5, 5], [0.02, 0.05, 0.1], [1, 2, 3], [2.0**i for i in range(12)]])
def test_a_value_axis_holds_its_values_with_room_and_texts_that_do_not_touch(values):
    axis = value_axis(values)
    shares = [axis.share(value) for value in values]
    assert all(0 < share < 1 for share in shares) and axis.ticks and len(axis.ticks) == len(axis.texts)
    places = [axis.share(tick) for tick in axis.ticks]
    assert all(0 <= place <= 1 for place in places)
    assert all(after - before > 0.09 for before, after in itertools.pairwise(places))


def test_numbers_are_short():
    assert [number_of(v) for v in (0.07, 4096.0, 13333.3, 2e6)] == ["0.07", "4096", "13.3k", "2M"]


def test_each_pruned_curve_ends_in_a_cross():
    curves = [Curve(i, f"r{i}", [(0, 0.0), (100.0 * i, 0.1 * i)], pruned=i > 2) for i in range(1, 6)]
    svg = drawing(curve_chart("c", curves))
    assert len(marks(svg, "cross")) == 3 and len(marks(svg, "line")) == 3 and len(marks(svg, "other")) == 2
    assert "number 4 pruned at 400 samples with 40.0%" in svg.attrib["aria-label"]
    x, y = (float(n) for n in re.findall(r"M([\d.]+) ([\d.]+)", marks(svg, "cross")[0].attrib["d"])[0])
    end = float(re.findall(r"([\d.]+) ([\d.]+)$", marks(svg, "other")[0].attrib["d"])[0][0])
    assert x + 3.5 == pytest.approx(end, abs=0.2) and 0 < y < HEIGHT


def test_parallel_lines_cross_each_axis_at_their_value():
    lines = [Line(1, [0.01, "no", None], 0.3), Line(2, [0.1, "yes", 5], 0.1), Line(3, [1.0, "no", 7], 0.2, solid=False)]
    svg = drawing(parallel_chart("p", ["x.temperature", "learn", "z"], lines))
    paths = [e for e in svg.iter("path") if e.attrib["class"].split()[0] in ("line", "other")]
    points = {}
    for path in paths:
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
        points[len(points)] = list(zip(numbers[::2], numbers[1::2], strict=True))
    third, second, first = points.values()  # the best is drawn last
    assert [x for x, _ in first] == sorted({x for x, _ in first}) and len(first) == 4
    assert all(0 <= x <= WIDTH for x, _ in first)
    assert second[0][1] - first[0][1] == pytest.approx(third[0][1] - second[0][1], abs=0.2)  # ratios of 10
    assert first[1][1] == pytest.approx(third[1][1], abs=20) and abs(first[1][1] - second[1][1]) > 50
    assert first[3][1] < third[3][1] < second[3][1]  # recall, up is more
    assert "stroke-dasharray" in paths[0].attrib and "number 3: 1, no, 7: 20.0%" in svg.attrib["aria-label"]


def test_bars_are_as_long_as_their_shares():
    html = bar_chart("b", [Bar("a<b", 0.5, 0.25), Bar("c", 0.0, 0.25)])
    svg = drawing(html)
    track, bar = marks(svg, "track")[0], marks(svg, "bar")[0]
    assert float(bar.attrib["width"]) == pytest.approx(float(track.attrib["width"]) / 2, abs=0.1)
    chance = float(re.findall(r"M([\d.]+)", marks(svg, "chance")[0].attrib["d"])[0])
    assert chance == pytest.approx(float(track.attrib["width"]) / 4, abs=0.1) and "a&lt;b" in html
