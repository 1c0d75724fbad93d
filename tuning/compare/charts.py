"""Charts of many runs as inline SVG: dots with intervals, learning curves, parallel coordinates, bars.

A run has the number of its row in the page's table. Marks of runs that did not finish are hollow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, NamedTuple

from models.redact import redact
from pipelines.report.charts import (
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Frame,
    Series,
    figure,
    finite,
    legend_sample,
    line,
    polyline,
    sample,
)

MOST_TICKS, MOST_NUMBERS = 7, 24
"""Most values that each get a tick; most dots that each get their run's number."""
GROUPS = 4
"""Number of different colours and shapes."""
LEADING = 3
"""Runs that are coloured where many lines are drawn, the best ones; the others are grey."""
_APART, _DODGE = 34.0, 18.0  # least distance of tick texts; distance of dots at the same value
_SHAPES = (  # around 0 0: circle, square, diamond, triangle
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3.2 -3.2h6.4v6.4h-6.4z",
    "M0 -4.6L4.6 0L0 4.6L-4.6 0z",
    "M0 -4.4L4.2 3.4h-8.4z",
)


class Dot(NamedTuple):
    """A run's recall `y` at the value `x`, with its interval; `solid`: it finished."""

    x: float
    y: float
    low: float
    high: float
    number: int
    solid: bool = True


@dataclass(frozen=True)
class Curve:
    """A run's learning curve."""

    number: int
    name: str
    points: Series
    pruned: bool = False


@dataclass(frozen=True)
class Line:
    """A run in parallel coordinates: its value on each axis, None where it has none, and its recall."""

    number: int
    values: Sequence[Any]
    recall: float
    solid: bool = True


def value_axis(values: Sequence[float]) -> Axis:
    """An axis with an eighth of room at both ends: logarithmic where the values span a factor of 4 or more.

    Few values have a tick each, many have ticks at round numbers.
    """
    distinct = sorted(set(values))
    low, high = distinct[0], distinct[-1]
    log = low > 0 and high / low >= 4
    if log:
        room = (high / low) ** 0.12
        span = (low / room, high * room)
    else:
        room = 0.12 * (high - low) or abs(high) / 2 or 1.0
        span = (low - room, high + room)
    axis = Axis(span, [], [], log)
    ticks = _apart(axis, distinct if len(distinct) <= MOST_TICKS else _round_ticks(low, high, axis))
    return Axis(span, ticks, [number_of(tick) for tick in ticks], log)


def _round_ticks(low: float, high: float, axis: Axis) -> list[float]:
    """Round numbers for values in [low, high], ascending: 1, 2 and 5 times the powers of ten on a logarithmic axis."""
    if axis.log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [tick for power in powers for factor in (1, 2, 5) if low <= (tick := factor * 10.0**power) <= high]
    return [tick for tick in Axis.within(low, high).ticks if axis.span[0] <= tick <= axis.span[1]]


def _apart(axis: Axis, ticks: Sequence[float]) -> list[float]:
    """The ticks, ascending, without those whose texts would touch the text before them."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or (axis.share(tick) - axis.share(kept[-1])) * (WIDTH - LEFT - RIGHT) >= _APART:
            kept.append(tick)
    return kept


def dot_chart(title: str, name: str, groups: Mapping[str, Sequence[Dot]], stairs: Sequence[Dot] = ()) -> str:
    """Recall against a value, each group in a shape and colour; the dots of `stairs` are joined, across and then up."""
    dots = [dot for group in groups.values() for dot in group]
    if not dots:
        return figure(title, "", f"{title}: no values")
    x_axis = value_axis([dot.x for dot in dots])
    frame = Frame(x_axis, Axis.rounded(min(dot.low for dot in dots), max(dot.high for dot in dots), percent=True))
    parts = [frame.draw(name)]
    if stairs:
        parts.append(_stairs([frame.place(dot.x, dot.y) for dot in stairs]))
    # Among many dots numbers would overlap: then only those on the stairs have one, which are far apart.
    numbered = {dot.number for dot in stairs or (dots if len(dots) <= MOST_NUMBERS else ())}
    for place, group in enumerate(groups.values()):
        for dot in group:
            shift = 0.0 if stairs else (place - (len(groups) - 1) / 2) * _DODGE + _aside(dot, group)
            parts.append(_dot(frame, dot, place, shift, dot.number in numbered))
    legend = [(legend_sample(marker(14, 4, place)), text) for place, text in enumerate(groups)]
    words = "; ".join(f"number {dot.number} at {dot.x:g}: {dot.y:.1%}" for dot in sorted(dots))
    return figure(title, "".join(parts), f"{title}, over {name}: {words}", legend if len(groups) > 1 else [])


def _stairs(placed: Series) -> str:
    """From point to point, across and then up, and on to the right edge."""
    (x, y), *others = placed
    path = "".join(f"H{x:.1f}V{y:.1f}" for x, y in others)
    return f'<path class="front" d="M{x:.1f} {y:.1f}{path}H{WIDTH - RIGHT}"/>'


def _aside(dot: Dot, group: Sequence[Dot]) -> float:
    """Shift to the right, so that dots of a group at the same value do not hide each other."""
    same = [other.number for other in group if other.x == dot.x]
    return (same.index(dot.number) - (len(same) - 1) / 2) * min(_DODGE, 60 / len(same))


def _dot(frame: Frame, dot: Dot, group: int, shift: float, numbered: bool) -> str:
    (x, y), low, high = frame.place(dot.x, dot.y), frame.place(dot.x, dot.low)[1], frame.place(dot.x, dot.high)[1]
    x += shift
    bar = f"M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6M{x:.1f} {low:.1f}V{high:.1f}"
    whisker = f'<path class="whisker s{group % GROUPS}" d="{bar}"/>' if dot.high > dot.low else ""
    number = f'<text class="no" x="{x + 5:.1f}" y="{y - 5:.1f}">{dot.number}</text>' if numbered else ""
    return whisker + marker(x, y, group, dot.solid) + number


def marker(x: float, y: float, group: int, solid: bool = True) -> str:
    """A run's mark, in the shape and colour of its group."""
    kind = f"dot s{group % GROUPS}" + ("" if solid else " hollow")
    return f'<path class="{kind}" transform="translate({x:.1f} {y:.1f})" d="{_SHAPES[group % GROUPS]}"/>'


def curve_chart(title: str, curves: Sequence[Curve]) -> str:
    """Recall against samples seen: the first `LEADING` in colour, the others thin; a cross where a run was pruned."""
    drawn = [replace(curve, points=points) for curve in curves if (points := finite(curve.points))]
    if not drawn:
        return figure(title, "", f"{title}: no values")
    xs, ys = ([point[i] for curve in drawn for point in curve.points] for i in (0, 1))
    frame = Frame(Axis.within(0.0, max(xs)), Axis.rounded(0.0, max(ys) or 0.01, percent=True))
    # The best come first, and are drawn last, on top of the others.
    parts = [frame.draw("samples seen"), *reversed([_curve(frame, curve, place) for place, curve in enumerate(drawn)])]
    legend = [(sample(place), f"{curve.number}: {curve.name}") for place, curve in enumerate(drawn[:LEADING])]
    if len(drawn) > LEADING:
        legend.append((legend_sample('<path class="other" d="M0 4H28"/>'), "others"))
    if any(curve.pruned for curve in drawn):
        legend.append((legend_sample(_cross(14, 4)), "pruned"))
    ends = (
        f"number {curve.number} {'pruned' if curve.pruned else 'ends'} at {curve.points[-1][0]:,.0f} samples "
        f"with {curve.points[-1][1]:.1%}"
        for curve in drawn
    )
    return figure(title, "".join(parts), f"{title}, over samples seen: {'; '.join(ends)}", legend)


def _curve(frame: Frame, curve: Curve, place: int) -> str:
    placed = [frame.place(x, y) for x, y in curve.points]
    (x, y), leads = placed[-1], place < LEADING
    path = line(placed, place) if leads else _other(placed)
    if curve.pruned:
        return path + _cross(x, y)
    return path + (f'<circle class="s{place % GROUPS}" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>' if leads else "")


def _other(placed: Series, dash: str = "") -> str:
    """The thin grey line of a run that is not among the leading ones."""
    return f'<path class="other" d="{polyline(placed)}"{dash}/>'


def _cross(x: float, y: float) -> str:
    return f'<path class="cross" d="M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0 -7l-7 7"/>'


# Parallel coordinates

_DEPTH, _BELOW, _INSET = 300, 52, 44
_SPREAD = 16.0  # most units of the SVG over which lines of the same value are spread


def parallel_chart(title: str, names: Sequence[str], lines: Sequence[Line]) -> str:
    """One axis a setting, the last one for recall; each run is a line, coloured for the first that finished."""
    if not lines:
        return figure(title, "", f"{title}: no values")
    places = [LEFT + 12 + i * (WIDTH - LEFT - 12 - _INSET) / len(names) for i in range(len(names) + 1)]
    leading = min(LEADING, sum(entry.solid for entry in lines))
    recalls = [entry.recall for entry in lines]
    recall_axis = Axis.rounded(min(recalls), max(recalls), percent=True)
    columns = [_column([entry.values[i] for entry in lines]) for i in range(len(names))]
    heights = [column.heights for column in columns] + [[recall_axis.share(recall) for recall in recalls]]
    parts = []
    for place in reversed(range(len(lines))):  # the best on top
        points = [(x, _up(column[place])) for x, column in zip(places, heights, strict=True)]
        dash = "" if lines[place].solid else ' stroke-dasharray="3 3"'
        parts.append(line(points, place) if place < leading else _other(points, dash))
    for x, name, column in zip(places, names, columns, strict=False):
        parts.append(_upright(x, name, column.ticks, after=False))
    ticks = [(recall_axis.share(tick), text) for tick, text in zip(recall_axis.ticks, recall_axis.texts, strict=True)]
    parts.append(_upright(places[-1], "recall@1", ticks, after=True))
    legend = [(sample(place), f"number {entry.number}") for place, entry in enumerate(lines[:leading])]
    words = "; ".join(f"number {e.number}: {', '.join(map(text_of, e.values))}: {e.recall:.1%}" for e in lines)
    return figure(title, "".join(parts), f"{title}: {', '.join(names)}, recall. {words}", legend, _DEPTH)


class _Column(NamedTuple):
    heights: list[float]
    """Height of each run on the axis, 0 at the bottom to 1."""
    ticks: list[tuple[float, str]]


def _column(values: Sequence[Any]) -> _Column:
    """Where runs cross an axis: numbers by their size, words evenly; runs of equal values a little apart, in order."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        axis = value_axis(values)
        shares = {text_of(value): axis.share(value) for value in values}
        ticks = [(axis.share(tick), text) for tick, text in zip(axis.ticks, axis.texts, strict=True)]
    else:
        words = list(dict.fromkeys(map(text_of, values)))
        shares = {word: (i + 0.5) / len(words) for i, word in enumerate(words)}
        ticks = [(shares[word], word) for word in words]
    texts = [text_of(value) for value in values]
    heights, met = [], dict.fromkeys(texts, 0)
    for text in texts:
        count = texts.count(text)
        aside = (0.5 - (met[text] + 0.5) / count) * min(_SPREAD, 4.0 * (count - 1))
        heights.append(shares[text] + aside / (_DEPTH - TOP - _BELOW))
        met[text] += 1
    return _Column(heights, ticks)


def _up(share: float) -> float:
    """y in the SVG of a height from 0 to 1."""
    return TOP + (1 - share) * (_DEPTH - TOP - _BELOW)


def _upright(x: float, name: str, ticks: Sequence[tuple[float, str]], after: bool) -> str:
    """An upright axis with its ticks and, below, its name in lines."""
    parts = [f'<path class="axis" d="M{x:.1f} {TOP}V{_DEPTH - _BELOW}"/>']
    for share, text in ticks:
        y, kind, offset = _up(share), "halo after" if after else "halo y", 6 if after else -6
        parts.append(f'<path class="axis" d="M{x:.1f} {y:.1f}h{offset / 2:.0f}"/>')
        parts.append(f'<text class="{kind}" x="{x + offset:.1f}" y="{y + 4:.1f}">{escape(text)}</text>')
    for row, part in enumerate(name.rsplit(".", 1)):
        parts.append(f'<text class="name" x="{x:.1f}" y="{_DEPTH - _BELOW + 20 + 15 * row}">{escape(part)}</text>')
    return "".join(parts)


def text_of(value: Any) -> str:
    """A setting's value, short."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number_of(value) if isinstance(value, float) else redact(str(value))


def number_of(value: float) -> str:
    """A number, short: 0.07, 4096, 40k."""
    for least, unit, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.4g}"


# Bars


class Bar(NamedTuple):
    """A share from 0 to 1, and the share that chance alone would give."""

    name: str
    share: float
    chance: float


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """One bar a share, 0 to 1, with a mark at the share by chance."""
    wide, step = WIDTH - 60, 40
    parts = []
    for place, bar in enumerate(bars):
        y = place * step + 16
        parts.append(f'<text class="after" x="0" y="{y}">{escape(bar.name)}</text>')
        parts.append(f'<rect class="track" x="0" y="{y + 6}" width="{wide}" height="12" rx="2"/>')
        parts.append(f'<rect class="bar s0" x="0" y="{y + 6}" width="{bar.share * wide:.1f}" height="12" rx="2"/>')
        parts.append(f'<path class="chance" d="M{bar.chance * wide:.1f} {y + 3}v18"/>')
        parts.append(f'<text class="after" x="{wide + 8}" y="{y + 17}">{bar.share:.0%}</text>')
    words = "; ".join(f"{bar.name} {bar.share:.0%}, by chance {bar.chance:.0%}" for bar in bars) or "no values"
    mark = legend_sample('<path class="chance" d="M14 0v14"/>', 14)
    legend = [(mark, "to be expected by chance")] if bars else []
    return figure(title, "".join(parts), f"{title}: {words}", legend, len(bars) * step + 8 if bars else HEIGHT)
