"""Line charts: ticks, and curves where the axes say."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from pipelines.report.charts import HEIGHT, WIDTH, Chart, label, line_chart, nice_ticks, running_mean

SVG = re.compile(r"<svg viewBox.*?</svg>", re.DOTALL)


def drawing(html: str) -> ET.Element:
    """The chart itself, without the legend's samples; fails on markup that is not well formed."""
    return ET.fromstring(next(svg for svg in SVG.findall(html) if "role" in svg))


def points_of(element: ET.Element) -> list[tuple[float, float]]:
    numbers = [float(text) for text in re.findall(r"-?[\d.]+", element.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


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
