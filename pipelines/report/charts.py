"""Charts as inline SVG: no script, no library, nothing from outside; they scale, print and follow dark mode.

Line charts, and the parts of every chart: figure, axes, the frame that they span. Coordinates are those of the SVG.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Series = Sequence[tuple[float, float]]
"""(x, y) pairs in order of x."""

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 40
"""Margins of the frame."""
_POINTS = 400  # longer series are averaged in groups: a chart has no more pixels
_DASHES = ("", "7 3", "2 3", "9 3 2 3")  # lines differ by more than colour


@dataclass(frozen=True)
class Chart:
    """What one chart shows; `smooth` draws the values thin and their running mean over them."""

    title: str
    x_label: str
    series: Mapping[str, Series]
    percent: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis: the span it shows, and the values with a tick and their texts; `log`: equal ratios, equal distances."""

    span: tuple[float, float]
    ticks: Sequence[float]
    texts: Sequence[str]
    log: bool = False

    def share(self, value: float) -> float:
        """Position of a value along the axis: 0 at the low end, 1 at the high one."""
        low, high, value = (math.log(v) if self.log else v for v in (*self.span, value))
        return (value - low) / (high - low)

    @classmethod
    def rounded(cls, low: float, high: float, percent: bool = False) -> "Axis":
        """Ticks at round numbers that cover [low, high]."""
        ticks = nice_ticks(low, high)
        return cls((ticks[0], ticks[-1]), ticks, [label(tick, ticks[1] - ticks[0], percent) for tick in ticks])

    @classmethod
    def within(cls, low: float, high: float) -> "Axis":
        """Ticks at round numbers, the last one not beyond `high`."""
        ticks = nice_ticks(low, high)
        kept = [tick for tick in ticks if tick <= high * (1 + 1e-9)] if len(ticks) > 2 else ticks
        return cls((kept[0], max(kept[-1], high)), kept, [label(tick, ticks[1] - ticks[0]) for tick in kept])


@dataclass(frozen=True)
class Frame:
    """The rectangle that two axes span, in the coordinates of the SVG."""

    x: Axis
    y: Axis

    def place(self, x: float, y: float) -> tuple[float, float]:
        """(x, y) in the SVG of a point with these values."""
        across, up = self.x.share(x) * (WIDTH - LEFT - RIGHT), self.y.share(y) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    def draw(self, name: str) -> str:
        """Grid lines, ticks and their texts, the horizontal axis and its name."""
        bottom, parts = HEIGHT - BOTTOM, []
        for tick, text in zip(self.y.ticks, self.y.texts, strict=True):
            y = self.place(self.x.span[0], tick)[1]
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="y" x="{LEFT - 7}" y="{y + 4:.1f}">{escape(text)}</text>')
        for tick, text in zip(self.x.ticks, self.x.texts, strict=True):
            x = self.place(tick, self.y.span[0])[0]
            mark = f'<path class="axis" d="M{x:.1f} {bottom}v5"/>'
            parts.append(f'{mark}<text x="{x:.1f}" y="{bottom + 18}">{escape(text)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="name" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 5}">{escape(name)}</text>')
        return "".join(parts)


def figure(title: str, drawing: str, words: str, legend: Sequence[tuple[str, str]] = (), height: float = HEIGHT) -> str:
    """A `<figure>`: title, legend of (sample, text), and the drawing, which `words` describe to a screen reader.

    An empty drawing says that there are no values.
    """
    rows = "".join(f"<li>{piece}{escape(text)}</li>" for piece, text in legend)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        + (f'<ul class="legend">{rows}</ul>' if rows else "")
        + f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(words, quote=True)}">'
        + (drawing or f'<text x="{WIDTH / 2}" y="{height / 2}">no values</text>')
        + "</svg></figure>"
    )


def line_chart(chart: Chart) -> str:
    """A figure of all series, with a legend where there is more than one."""
    series = {label: _thin(finite(points)) for label, points in chart.series.items()}
    series = {label: points for label, points in series.items() if points}
    legend = [(sample(i), label) for i, label in enumerate(series)] if len(series) > 1 else []
    words = "; ".join(_words(label, points, chart.percent) for label, points in series.items()) or "no values"
    drawing = _drawing(chart, series) if series else ""
    return figure(chart.title, drawing, f"{chart.title}, over {chart.x_label}: {words}", legend)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def label(value: float, step: float, percent: bool = False) -> str:
    """A tick's text, with as many decimals as the step between ticks needs; thousands as `12k`."""
    if percent:
        return f"{value * 100:.{max(0, -math.floor(math.log10(step * 100) + 1e-9))}f}%"
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if step >= unit / 2 and abs(value) >= unit / 2:
            return f"{value / unit:g}{suffix}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _drawing(chart: Chart, series: Mapping[str, Series]) -> str:
    """Grid, axes and lines; the horizontal axis begins at 0 where the values are not far from it."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    across = Axis.within(0.0 if 0 <= min(xs) <= 0.5 * max(xs) else min(xs), max(xs))
    frame = Frame(across, Axis.rounded(0.0 if chart.percent else min(ys), max(ys), chart.percent))
    parts = [frame.draw(chart.x_label)]
    for i, points in enumerate(series.values()):
        if chart.smooth:
            parts.append(line([frame.place(x, y) for x, y in points], i, "raw"))
            points = running_mean(points)
        placed = [frame.place(x, y) for x, y in points]
        parts.append(line(placed, i))
        if len(placed) <= 30:
            parts += [f'<circle class="s{i % 4}" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>' for x, y in placed]
    return "".join(parts)


def polyline(placed: Series) -> str:
    """The `d` of a path through points of the SVG."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)


def line(placed: Series, index: int, kind: str = "line") -> str:
    """A curve through points of the SVG, in the colour and dashes of series number `index`."""
    dash = f' stroke-dasharray="{_DASHES[index % 4]}"' if kind == "line" and index % 4 else ""
    return f'<path class="{kind} s{index % 4}" d="{polyline(placed)}"{dash}/>'


def legend_sample(drawing: str, height: int = 8) -> str:
    """A small drawing, 28 wide, in front of a legend's text."""
    return f'<svg class="sample" viewBox="0 0 28 {height}" aria-hidden="true">{drawing}</svg>'


def sample(index: int) -> str:
    """A piece of the line of series number `index`, for the legend."""
    return legend_sample(line([(0, 4), (28, 4)], index))


def finite(points: Series) -> Series:
    """The points without those that are not numbers."""
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thin(points: Series) -> Series:
    """At most `_POINTS` points: means of neighbours."""
    size = math.ceil(len(points) / _POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def running_mean(points: Series) -> Series:
    """Each y replaced by the mean of its neighbours, a twentieth of the points to either side."""
    half = len(points) // 20
    smooth = []
    for i, (x, _) in enumerate(points):
        window = points[max(0, i - half) : i + half + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


def _words(name: str, points: Series, percent: bool) -> str:
    """The series in words, for a screen reader."""
    first, last = (f"{y:.1%}" if percent else f"{y:.3g}" for y in (points[0][1], points[-1][1]))
    return f"{name} from {first} to {last}" if name else f"from {first} to {last}"
