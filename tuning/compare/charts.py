"""Charts of many runs as inline SVG: dots with intervals, learning curves, parallel coordinates, bars.

Runs carry the numbers that they have in the page's table. Runs that did not finish are hollow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

from models.redact import redact
from pipelines.report.charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Frame, Series, figure, finite, line, sample

MOST_TICKS, MOST_NUMBERS = 7, 24
GROUPS = 4
"""Colours and shapes there are."""
LEADING = 3
"""Runs that have a colour of their own among many lines."""
_APART, _DODGE = 34.0, 18.0  # least distance of tick texts; distance of groups at the same value
_SHAPES = (  # around 0 0: circle, square, diamond, triangle
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3.2 -3.2h6.4v6.4h-6.4z",
    "M0 -4.6L4.6 0L0 4.6L-4.6 0z",
    "M0 -4.4L4.2 3.4h-8.4z",
)


class Dot(NamedTuple):
    """A run at a value, with its interval."""

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
    """A run across the axes: a value each, None where it has none, and its recall."""

    number: int
    values: Sequence[Any]
    recall: float
    solid: bool = True


def value_axis(values: Sequence[float]) -> Axis:
    """An axis with room at both ends: ticks at the values where they are few; logarithmic where they span much."""
    distinct = sorted(set(values))
    low, high = distinct[0], distinct[-1]
    log = low > 0 and high / low >= 4
    if log:
        room = (high / low) ** 0.12
        span = (low / room, high * room)
    else:
        room = 0.12 * (high - low) or abs(high) / 2 or 1.0
        span = (low - room, high + room)
    if len(distinct) <= MOST_TICKS:
        ticks = distinct
    elif log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [
            tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high
        ]
    else:
        ticks = [tick for tick in Axis.within(low, high).ticks if span[0] <= tick <= span[1]]
    axis = Axis(span, [], [], log)
    kept: list[float] = []
    for tick in ticks:
        if not kept or (axis.share(tick) - axis.share(kept[-1])) * (WIDTH - LEFT - RIGHT) >= _APART:
            kept.append(tick)
    return Axis(span, kept, [number_of(tick) for tick in kept], log)


def dot_chart(title: str, name: str, groups: Mapping[str, Sequence[Dot]], stairs: Sequence[Dot] = ()) -> str:
    """Recall against a value, a shape and colour a group; `stairs` are joined, from each across and then up."""
    dots = [dot for group in groups.values() for dot in group]
    if not dots:
        return figure(title, "", f"{title}: no values")
    x_axis = value_axis([dot.x for dot in dots])
    frame = Frame(x_axis, Axis.rounded(min(dot.low for dot in dots), max(dot.high for dot in dots), percent=True))
    parts = [frame.draw(name)]
    if stairs:
        path = "".join(f"H{x:.1f}V{y:.1f}" for x, y in (frame.place(dot.x, dot.y) for dot in stairs[1:]))
        x, y = frame.place(stairs[0].x, stairs[0].y)
        parts.append(f'<path class="front" d="M{x:.1f} {y:.1f}{path}H{WIDTH - RIGHT}"/>')
    numbered = {dot.number for dot in stairs or (dots if len(dots) <= MOST_NUMBERS else ())}
    for place, group in enumerate(groups.values()):
        for dot in group:
            shift = 0.0 if stairs else (place - (len(groups) - 1) / 2) * _DODGE + _aside(dot, group)
            parts.append(_dot(frame, dot, place, shift, dot.number in numbered))
    legend = [(_marker_sample(place), text) for place, text in enumerate(groups)] if len(groups) > 1 else []
    words = "; ".join(f"number {dot.number} at {dot.x:g}: {dot.y:.1%}" for dot in sorted(dots))
    return figure(title, "".join(parts), f"{title}, over {name}: {words}", legend)


def _aside(dot: Dot, group: Sequence[Dot]) -> float:
    """How far a dot stands to the right of its value, so that it does not hide others of its group there."""
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


def _marker_sample(group: int) -> str:
    return f'<svg class="sample" viewBox="0 0 28 8" aria-hidden="true">{marker(14, 4, group)}</svg>'


def curve_chart(title: str, curves: Sequence[Curve], leading: int = LEADING) -> str:
    """Recall against samples seen: the first ones in colour, the others thin; a cross where a run was pruned."""
    drawn = [Curve(curve.number, curve.name, finite(curve.points), curve.pruned) for curve in curves]
    drawn = [curve for curve in drawn if curve.points]
    if not drawn:
        return figure(title, "", f"{title}: no values")
    xs, ys = ([point[i] for curve in drawn for point in curve.points] for i in (0, 1))
    frame = Frame(Axis.within(0.0, max(xs)), Axis.rounded(0.0, max(ys) or 0.01, percent=True))
    parts, legend = [frame.draw("samples seen")], []
    for place in reversed(range(len(drawn))):  # the best on top
        parts.append(_curve(frame, drawn[place], place, place < leading))
    for place, curve in enumerate(drawn[:leading]):
        legend.append((sample(place), f"{curve.number}: {curve.name}"))
    if len(drawn) > leading:
        thin = '<path class="other" d="M0 4H28"/>'
        legend.append((f'<svg class="sample" viewBox="0 0 28 8" aria-hidden="true">{thin}</svg>', "others"))
    if any(curve.pruned for curve in drawn):
        cross = f'<svg class="sample" viewBox="0 0 28 8" aria-hidden="true">{_cross(14, 4)}</svg>'
        legend.append((cross, "pruned"))
    ends = (
        f"number {curve.number} {'pruned' if curve.pruned else 'ends'} at {curve.points[-1][0]:,.0f} samples "
        f"with {curve.points[-1][1]:.1%}"
        for curve in drawn
    )
    return figure(title, "".join(parts), f"{title}, over samples seen: {'; '.join(ends)}", legend)


def _curve(frame: Frame, curve: Curve, place: int, leads: bool) -> str:
    placed = [frame.place(x, y) for x, y in curve.points]
    x, y = placed[-1]
    path = (
        line(placed, place)
        if leads
        else f'<path class="other" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in placed)}"/>'
    )
    if curve.pruned:
        return path + _cross(x, y)
    return path + (f'<circle class="s{place % GROUPS}" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>' if leads else "")


def _cross(x: float, y: float) -> str:
    return f'<path class="cross" d="M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0 -7l-7 7"/>'


# Parallel coordinates

_DEPTH, _BELOW, _INSET = 300, 52, 44
_SPREAD = 16.0  # runs of the same value lie side by side over so many units of the picture


def parallel_chart(title: str, names: Sequence[str], lines: Sequence[Line]) -> str:
    """An axis a setting and the last one for recall; each run is a line, the first that finished in colour."""
    if not lines:
        return figure(title, "", f"{title}: no values")
    places = [LEFT + 12 + i * (WIDTH - LEFT - 12 - _INSET) / len(names) for i in range(len(names) + 1)]
    leading = min(LEADING, sum(entry.solid for entry in lines))
    recalls = [entry.recall for entry in lines]
    recall_axis = Axis.rounded(min(recalls), max(recalls), percent=True)
    columns = [_column([entry.values[i] for entry in lines]) for i in range(len(names))]
    heights = [column.heights for column in columns] + [[recall_axis.share(recall) for recall in recalls]]
    parts = []
    for place in reversed(range(len(lines))):
        points = [(x, _up(column[place])) for x, column in zip(places, heights, strict=True)]
        dash = "" if lines[place].solid else ' stroke-dasharray="3 3"'
        path = f'<path class="other" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"{dash}/>'
        parts.append(line(points, place) if place < leading else path)
    for x, name, column in zip(places, names, columns, strict=False):
        parts.append(_upright(x, name, column.ticks, after=False))
    ticks = [(recall_axis.share(tick), text) for tick, text in zip(recall_axis.ticks, recall_axis.texts, strict=True)]
    parts.append(_upright(places[-1], "recall@1", ticks, after=True))
    legend = [(sample(place), f"number {entry.number}") for place, entry in enumerate(lines[:leading])]
    words = "; ".join(f"number {e.number}: {', '.join(map(text_of, e.values))}: {e.recall:.1%}" for e in lines)
    return figure(title, "".join(parts), f"{title}: {', '.join(names)}, recall. {words}", legend, _DEPTH)


class _Column(NamedTuple):
    heights: list[float]
    """Of each run, 0 to 1."""
    ticks: list[tuple[float, str]]


def _column(values: Sequence[Any]) -> _Column:
    """Where runs cross an axis: numbers by their size, words evenly; equal values a little apart, in their order."""
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
    return TOP + (1 - share) * (_DEPTH - TOP - _BELOW)


def _upright(x: float, name: str, ticks: Sequence[tuple[float, str]], after: bool) -> str:
    """An upright axis with its ticks and, below, its name in lines."""
    parts = [f'<path class="axis" d="M{x:.1f} {TOP}V{_DEPTH - _BELOW}"/>']
    for share, text in ticks:
        y, kind, side = _up(share), "halo after" if after else "halo y", 6 if after else -6
        parts.append(f'<path class="axis" d="M{x:.1f} {y:.1f}h{side / 2:.0f}"/>')
        parts.append(f'<text class="{kind}" x="{x + side:.1f}" y="{y + 4:.1f}">{escape(text)}</text>')
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
    """A share, and what of it is expected by chance."""

    name: str
    share: float
    chance: float


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """A bar a share, 0 to 1, with a tick where chance would be."""
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
    mark = '<svg class="sample" viewBox="0 0 28 14" aria-hidden="true"><path class="chance" d="M14 0v14"/></svg>'
    legend = [(mark, "to be expected by chance")] if bars else []
    return figure(title, "".join(parts), f"{title}: {words}", legend, len(bars) * step + 8 if bars else HEIGHT)
