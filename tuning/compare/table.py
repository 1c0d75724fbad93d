"""A comparison in words: its table's columns and cells, the headline, remarks, and the table for a terminal."""

import io
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuning.compare.charts import text_of
from tuning.compare.ranking import Comparison, ComparisonRow, Estimate, some
from tuning.sweep.sweep_record import short_names

MOST_COLUMNS = 4
"""Most settings that have a column each; more are put into one column."""
NOTHING = "–"


class Column(NamedTuple):
    """A column of the table: its heading, what that means, and one cell a row."""

    name: str
    meaning: str
    cells: Sequence[str]
    right: bool = True
    """Whether cells are aligned to the right, as numbers are."""
    long: bool = False
    """Whether heading and cell take the whole width of a phone."""


def recall_text(estimate: Estimate | None) -> str:
    """`12.3% (10.9 to 13.8)`, with several seeds `12.3% ± 0.4 (3 seeds)`."""
    if estimate is None:
        return NOTHING
    value, low, high = (f"{100 * part:.1f}" for part in estimate[:3])
    if estimate.seeds > 1:
        return f"{value}% ± {50 * (estimate.high - estimate.low):.1f} ({estimate.seeds} seeds)"
    return f"{value}% ({low} to {high})" if estimate.high > estimate.low else f"{value}%"


def rank_text(row: ComparisonRow) -> str:
    """`2`, or `2=` for one of several."""
    return f"{row.rank}{'=' if row.tied else ''}" if row.rank else NOTHING


def settings_text(comparison: Comparison, row: ComparisonRow) -> str:
    """All settings that differ: `temperature.start 0.07, codebook.size 256`."""
    names = short_names(comparison.keys)
    return ", ".join(f"{names[key]} {text_of(comparison.value(row, key))}" for key in comparison.keys)


def columns(comparison: Comparison) -> list[Column]:
    """The columns of the table that have a value in some row."""
    rows, names = comparison.rows, short_names(comparison.keys)
    found = [
        Column("no", "number in the charts", [str(row.number) for row in rows]),
        Column("rank", "= marks runs that their errors cannot tell apart", [rank_text(row) for row in rows]),
        Column("run", "", [row.item.name for row in rows], right=False),
        Column("recall@1", "mean of both directions", [recall_text(row.estimate) for row in rows], long=True),
        _metric(rows, "re-ranked", "the same by the fusion encoder", _reranked),
    ]
    if len(comparison.keys) > MOST_COLUMNS:
        found.append(Column("settings", "", [settings_text(comparison, row) for row in rows], right=False))
    else:
        for key in comparison.keys:
            found.append(Column(names[key], key, [text_of(comparison.value(row, key)) for row in rows], long=True))
    found += [
        _metric(rows, "codes used", "perplexity of the images' nearest codes over all codes", _share("ppl_v_share")),
        _metric(rows, "agree", "pairs whose nearest code is the same", _share("agree1")),
        _metric(rows, "kappa", "the same above chance", lambda metrics: _decimal(metrics.get("codebook/kappa"))),
        _metric(rows, "dead", "codes that are nearest to nothing", _share("dead")),
        Column("samples", "seen in training", [f"{row.item.samples:,.0f}" for row in rows]),
        Column("time", "", [duration(row.item.seconds) for row in rows]),
        Column("state", "", [state_text(row) for row in rows], right=False),
    ]
    return [column for column in found if any(cell != NOTHING for cell in column.cells)]


def _metric(
    rows: Sequence[ComparisonRow], name: str, meaning: str, cell: Callable[[Mapping[str, float]], str]
) -> Column:
    return Column(name, meaning, [cell(row.item.metrics) for row in rows])


def _share(name: str) -> Callable[[Mapping[str, float]], str]:
    def cell(metrics: Mapping[str, float]) -> str:
        value = metrics.get(f"codebook/{name}")
        return NOTHING if value is None else f"{value:.0%}"

    return cell


def _decimal(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _reranked(metrics: Mapping[str, float]) -> str:
    names = [f"val/{modality}_retrieval_recall_at_1_reranked" for modality in ("image", "text")]
    values = [metrics[name] for name in names if name in metrics]
    return f"{sum(values) / len(values):.1%}" if len(values) == len(names) else NOTHING


def duration(seconds: float) -> str:
    """`45 s`, `3.4 min`, `2.1 h`; nothing for 0."""
    if not seconds:
        return NOTHING
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def state_text(row: ComparisonRow) -> str:
    """The run's status, and how many alarms it had."""
    count = len(row.item.alarms)
    return row.item.status + (f", {count} alarm{'s' if count > 1 else ''}" if count else "")


def headline(comparison: Comparison) -> str:
    """The result in a sentence or two."""
    if comparison.protocol:
        return "Not ranked: these runs were not scored alike, so their recall cannot be compared."
    ranked = comparison.ranked
    if not ranked:
        return "No run has finished with a recall, so there is nothing to rank yet."
    best = ranked[0]
    settings = settings_text(comparison, best)
    text = f"Best: {best.item.name}" + (f" ({settings})" if settings else "")
    text += f" with recall@1 {recall_text(best.estimate)}."
    others = [row.item.name for row in ranked[1:] if row.rank == 1]
    if others:
        text += f" Within its error: {some(others)}."
    return text


def remarks(comparison: Comparison) -> list[str]:
    """Why runs ended early and what their alarms said, a line for each text."""
    names: dict[str, list[str]] = {}
    for row in comparison.rows:
        reasons = [row.item.reason] if row.item.reason else []
        for text in reasons + [alarm for alarm in row.item.alarms if alarm not in row.item.reason]:
            names.setdefault(text, []).append(row.item.name)
    return [f"{some(who)}: {text}" for text, who in names.items()]


def table_text(comparison: Comparison, terminal: bool | None = None) -> str:
    """The comparison for standard output: in colour and fitted where that is a terminal, else plain and unbroken."""
    terminal = bool(sys.__stdout__ and sys.__stdout__.isatty()) if terminal is None else terminal  # results go there
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    shown = columns(comparison)
    for column in shown:
        table.add_column(column.name, justify="right" if column.right else "left", no_wrap=not terminal)
    for place, row in enumerate(comparison.rows):
        style = "green" if row.rank == 1 else "" if row.rank else "dim"
        table.add_row(*(Text(column.cells[place]) for column in shown), style=style)
    console = Console(
        file=io.StringIO(),
        force_terminal=terminal,
        no_color=not terminal,
        width=shutil.get_terminal_size().columns if terminal else 1000,
        highlight=False,
        markup=False,
    )
    with console.capture() as captured:
        console.print(table)
    drawn = "\n".join(line.rstrip() for line in captured.get().splitlines())
    notes = [*(f"Differs: {line}" for line in comparison.protocol), *comparison.notes, *remarks(comparison)]
    return "\n".join([drawn, "", headline(comparison), *notes])
