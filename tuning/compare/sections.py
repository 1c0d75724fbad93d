"""Sections of a comparison's page: each is a sentence or two and its charts."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from tuning.compare.charts import (
    GROUPS,
    Bar,
    Curve,
    Dot,
    Line,
    bar_chart,
    curve_chart,
    dot_chart,
    parallel_chart,
    text_of,
)
from tuning.compare.importance import LEAST, EqualSamples, at_equal_samples, front, importance
from tuning.compare.ranking import Comparison, ComparisonRow, wilson
from tuning.sweep.sweep_record import short_names

TEMPERATURE, CODES = "objective.temperature.start", "objective.codebook.size"
_AXES = 4  # most settings in parallel coordinates: more do not fit a phone's width


def _section(text: str, *charts: str) -> str:
    return f"<p>{escape(text)}</p>" + (f'<div class="charts">{"".join(charts)}</div>' if charts else "")


def _finished(row: ComparisonRow) -> bool:
    return row.item.status == "finished"


def _with_recall(comparison: Comparison) -> list[ComparisonRow]:
    return [row for row in comparison.rows if row.estimate is not None]


def _parallel(comparison: Comparison) -> str:
    """Parallel coordinates of the settings that matter most, and recall."""
    rows = _with_recall(comparison)
    if not comparison.keys or len(rows) < 2:
        return _section("It takes two runs with different settings.")
    weight = {share.key: share.share for share in importance(comparison).shares}
    keys = sorted(comparison.keys, key=lambda key: -weight.get(key, 0.0))[:_AXES]
    names = short_names(comparison.keys)
    lines = [
        Line(row.number, [comparison.value(row, key) for key in keys], row.estimate.value, _finished(row))
        for row in rows
        if row.estimate
    ]
    text = "Each line is a run, numbered as in the table; a dashed grey one did not finish."
    if len(keys) < len(comparison.keys):
        text += f" Of {len(comparison.keys)} settings that differ, those that matter most."
    return _section(text, parallel_chart("Settings and recall", [names[key] for key in keys], lines))


# Recall against temperature and codebook size


def _against(comparison: Comparison) -> str:
    """Recall against temperature and against codebook size, for those of the two that differ between runs."""
    charts, notes = [], []
    equal = at_equal_samples(comparison)
    for title, key in (("temperature", TEMPERATURE), ("codebook size", CODES)):
        rows = [row for row in _with_recall(comparison) if key != CODES or _has_codes(row)]
        if key in comparison.keys:
            charts += _charts_against(title, key, rows, equal)
        else:
            values = {text_of(_value(row, key)) for row in rows}
            notes.append(f"The {title} was {values.pop()} in all." if values else "No run has a codebook.")
    if charts:
        notes.append("Bars are 95 % intervals over the queries, with several seeds a standard deviation.")
    if charts and equal.samples:
        notes.append(f"Where runs were pruned, all can be compared after {equal.samples:,.0f} samples only.")
    return _section(" ".join(notes), *charts)


def _charts_against(title: str, key: str, rows: Sequence[ComparisonRow], equal: EqualSamples) -> list[str]:
    """After equal samples where some runs were pruned, for all runs; and at the end, for those that finished."""
    charts = []
    if equal.samples:
        compared = [row for row in rows if row.number in equal.scores]
        dots = {row.number: _equal_samples_dot(row, _value(row, key), equal) for row in compared}
        charts.append(_grouped(f"Recall against {title}, after {equal.samples:,.0f} samples", key, rows, dots))
    # Where none finished, the last recall of each run is all there is; with pruned ones it would mislead.
    ended = [row for row in rows if _finished(row)] or ([] if equal.samples else rows)
    if ended:
        dots = {row.number: _dot(row, _value(row, key)) for row in ended}
        when = ", at the end" if equal.samples else ""
        charts.append(_grouped(f"Recall against {title}{when}", key, rows, dots))
    return charts


def _grouped(title: str, key: str, rows: Sequence[ComparisonRow], dots: Mapping[int, Dot]) -> str:
    """A chart of `dots` {number of a run: dot}, in a colour for each value of the other of the two settings.

    Colours go by the values of all `rows`, so that they are the same in all charts of these rows.
    """
    other = CODES if key == TEMPERATURE else TEMPERATURE
    values = sorted({_value(row, other) for row in rows})
    name = f"{short_names([other])[other]} " if 1 < len(values) <= GROUPS else ""
    groups: dict[str, list[Dot]] = {f"{name}{text_of(value)}": [] for value in values} if name else {"": []}
    for row in rows:
        if row.number in dots:
            groups[f"{name}{text_of(_value(row, other))}" if name else ""].append(dots[row.number])
    return dot_chart(title, short_names([key])[key], groups)


def _value(row: ComparisonRow, key: str) -> float:
    objective = row.item.config.objective
    return objective.temperature.start if key == TEMPERATURE else objective.codebook.size


def _has_codes(row: ComparisonRow) -> bool:
    weights = row.item.config.objective.weights
    return weights.code > 0 or weights.ot > 0


def _dot(row: ComparisonRow, x: float) -> Dot:
    assert row.estimate
    return Dot(x, *row.estimate[:3], row.number, _finished(row))


def _equal_samples_dot(row: ComparisonRow, x: float, equal: EqualSamples) -> Dot:
    """Recall after equal samples, with its interval where the size of the validation sample is known."""
    value, pairs = equal.scores[row.number], row.item.sample_pairs
    low, high = wilson(value, 2 * pairs) if pairs else (value, value)
    return Dot(x, value, low, high, row.number, _finished(row))


# Learning, importance, cost


def _curves(comparison: Comparison) -> str:
    curves = [
        Curve(row.number, row.item.name, row.item.curve, row.item.status == "pruned")
        for row in comparison.rows
        if row.item.curve
    ]
    if not curves:
        return _section("No run has a learning curve.")
    return _section("On the validation sample, while training.", curve_chart("Recall while training", curves))


def _importance(comparison: Comparison) -> str:
    found = importance(comparison)
    if not found.shares:
        return _section(f"It takes {LEAST} runs whose settings and recall differ; here are {found.runs}.")
    when = f"after {found.samples:,.0f} samples, as far as all came" if found.samples else "at the end"
    names = short_names(comparison.keys)
    bars = [Bar(names[share.key], share.share, share.chance) for share in found.shares]
    text = (
        f"The share of the variance of recall, over {found.runs} runs and {when}, that each setting accounts for by "
        "itself: between the means of equal values, or, of numbers drawn anew for each run, as squared rank "
        "correlation. A bar that ends before the mark of chance says nothing."
    )
    return _section(text, bar_chart("Share of the variance", bars))


def _costs(comparison: Comparison) -> str:
    """Recall against samples and against time, with a line through the runs that no other beats for less."""
    rows, charts = _with_recall(comparison), []
    by_time = [row for row in rows if row.item.seconds]
    if len({row.item.samples for row in rows}) > 1 or not by_time:
        charts.append(_front("Recall for samples", "samples seen", [_dot(row, row.item.samples) for row in rows]))
    if by_time:
        charts.append(_front("Recall for time", "minutes", [_dot(row, row.item.seconds / 60) for row in by_time]))
    text = "The line joins the runs that no other beats for less; hollow marks did not finish. Repeats are not counted."
    return _section(text, *charts)


def _front(title: str, name: str, dots: Sequence[Dot]) -> str:
    best = [dots[place] for place in front([(dot.x, dot.y) for dot in dots])]
    return dot_chart(title, name, {"": dots}, stairs=best)


SECTIONS: dict[str, Callable[[Comparison], str]] = {
    "Settings and recall": _parallel,
    "Temperature and codebook": _against,
    "Learning curves": _curves,
    "What mattered": _importance,
    "Cost and quality": _costs,
}
"""{heading: function that draws the section}, in the order of the page."""
