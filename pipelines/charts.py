"""Line charts as inline SVG: no script, no library, nothing from outside; they scale, print and follow dark mode."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Series = Sequence[tuple[float, float]]
"""(x, y) pairs in order of x."""

WIDTH, HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 40
_POINTS = 400  # more are averaged in groups: a chart has no more pixels
_DASHES = ("", "7 3", "2 3", "9 3 2 3")  # lines differ by more than colour


@dataclass(frozen=True)
class Chart:
    """What one chart shows; `smooth` draws the values thin and their running mean over them."""

    title: str
    x_label: str
    series: Mapping[str, Series]
    percent: bool = False
    smooth: bool = False


def line_chart(chart: Chart) -> str:
    """A `<figure>`: title, legend where there is more than one series, and the drawing with a description in words."""
    series = {label: _thin(_finite(points)) for label, points in chart.series.items()}
    series = {label: points for label, points in series.items() if points}
    legend = (
        "".join(f"<li>{_sample(i)}{escape(label)}</li>" for i, label in enumerate(series)) if len(series) > 1 else ""
    )
    words = "; ".join(_words(label, points, chart.percent) for label, points in series.items()) or "no values"
    description = escape(f"{chart.title}, over {chart.x_label}: {words}", quote=True)
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}">'
        + (_drawing(chart, series) if series else f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}">no values</text>')
        + "</svg></figure>"
    )


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
    """Grid, axes and lines."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_ticks = nice_ticks(0.0 if 0 <= min(xs) <= 0.5 * max(xs) else min(xs), max(xs), 5)
    y_ticks = nice_ticks(0.0 if chart.percent else min(ys), max(ys), 5)
    x_ticks = [tick for tick in x_ticks if tick <= max(xs) * (1 + 1e-9)] if len(x_ticks) > 2 else x_ticks
    x_low, x_high, y_low, y_high = x_ticks[0], max(x_ticks[-1], *xs), y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        return _LEFT + across, HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        y, text = place(x_low, tick)[1], label(tick, y_ticks[1] - y_ticks[0], chart.percent)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 7}" y="{y + 4:.1f}">{text}</text>')
    bottom = HEIGHT - _BOTTOM
    for tick in x_ticks:
        x, text = place(tick, y_low)[0], label(tick, x_ticks[1] - x_ticks[0])
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v5"/><text x="{x:.1f}" y="{bottom + 18}">{text}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{WIDTH - _RIGHT}"/>')
    parts.append(f'<text class="name" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 5}">{escape(chart.x_label)}</text>')
    for i, points in enumerate(series.values()):
        if chart.smooth:
            parts.append(_line([place(x, y) for x, y in points], i, "raw"))
            points = running_mean(points)
        placed = [place(x, y) for x, y in points]
        parts.append(_line(placed, i, "line"))
        if len(placed) <= 30:
            parts += [f'<circle class="s{i % 4}" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>' for x, y in placed]
    return "".join(parts)


def _line(placed: Series, index: int, kind: str) -> str:
    """One curve."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    dash = f' stroke-dasharray="{_DASHES[index % 4]}"' if kind == "line" and index % 4 else ""
    return f'<path class="{kind} s{index % 4}" d="M{path}"{dash}/>'


def _sample(index: int) -> str:
    """A piece of the series' line, for the legend."""
    return f'<svg class="sample" viewBox="0 0 28 8" aria-hidden="true">{_line([(0, 4), (28, 4)], index, "line")}</svg>'


def _finite(points: Series) -> Series:
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
    """The series for those who do not see it."""
    first, last = (f"{y:.1%}" if percent else f"{y:.3g}" for y in (points[0][1], points[-1][1]))
    return f"{name} from {first} to {last}" if name else f"from {first} to {last}"
