"""The HTML page of a comparison: table, charts of settings, learning and cost, facts of the sweep."""

from html import escape

from models.redact import redact
from pipelines.report.page import facts_list, section, whole_page
from tuning.compare.charts import text_of
from tuning.compare.ranking import Comparison
from tuning.compare.sections import SECTIONS
from tuning.compare.table import Column, columns, headline, remarks
from tuning.sweep.sweep_record import Sweep, short_names


def comparison_page(comparison: Comparison, sweep: Sweep | None = None) -> str:
    """The page as HTML; with a sweep, also what was searched and how."""
    title = f"Sweep {sweep.name}" if sweep else f"{len(comparison.rows)} runs compared"
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{escape(headline(comparison))}</p></header>",
        section("Ranking" if not comparison.protocol else "Runs", _differences(comparison) + _table(comparison)),
    ]
    if comparison.protocol:  # a chart would put on one axis what cannot be compared
        parts.append(section("Charts", "<p>Left out, for these runs were not scored alike.</p>"))
    else:
        parts += [section(name, draw(comparison)) for name, draw in SECTIONS.items()]
    if sweep:
        parts.append(section("The sweep", facts_list(_facts(sweep))))
    return whole_page(title, "\n".join(parts), _STYLE)


def _differences(comparison: Comparison) -> str:
    """What differs in how the runs were scored; empty where nothing does."""
    items = "".join(f"<li>{escape(line)}</li>" for line in comparison.protocol)
    return f'<p>What differs in how they were scored:</p><ul class="notes">{items}</ul>' if items else ""


def _table(comparison: Comparison) -> str:
    """One row a run, which a phone shows as a card, with notes below."""
    shown = columns(comparison)
    head = "".join(f"<th {_marks(column)}>{escape(column.name)}</th>" for column in shown)
    body = ""
    for place, row in enumerate(comparison.rows):
        cells = "".join(
            f'<td data-name="{escape(column.name, quote=True)}" {_marks(column)}>{escape(column.cells[place])}</td>'
            for column in shown
        )
        body += f"<tr{' class=first' if row.rank == 1 else '' if row.rank else ' class=unranked'}>{cells}</tr>"
    meanings = [
        f"{column.name}: {column.meaning}"
        for column in shown
        if column.meaning and column.meaning not in comparison.keys
    ]
    notes = [*comparison.notes, "; ".join(meanings) + ".", *remarks(comparison)]
    below = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><ul class="notes">{below}</ul>'
    )


def _marks(column: Column) -> str:
    """Attributes of a column's cells: words stand left, long cells take a phone's whole width."""
    kinds = ["words"] * (not column.right) + ["long"] * (column.long or not column.right)
    return f'class="{" ".join(kinds)}" title="{escape(column.meaning, quote=True)}"'


def _facts(sweep: Sweep) -> dict[str, str]:
    """{name: text}: what was searched, on which data, and what it cost."""
    whole = sweep.samples_planned * sweep.trials_planned
    states = [trial.status for trial in sweep.trials]
    names = short_names(list(sweep.space))
    repeats = [repeat.samples_seen for trial in sweep.trials for repeat in trial.repeats]
    facts = {
        "Preset": sweep.preset,
        "Space": "; ".join(
            f"{names[key]} {', '.join(map(text_of, values))}" + ("" if kind in ("grid", "choice") else f" ({kind})")
            for key, entry in sweep.space.items()
            for kind, values in entry.items()
        ),
        "Search": f"{sweep.search}, scheduler {sweep.scheduler}, seed {sweep.seed}",
        "Trials": ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none",
        "Repeats": f"{len(repeats)} with other seeds, {sum(repeats):,} samples" if repeats else "none",
        "Samples of the trials": f"{sweep.samples_used:,}"
        + (f", {sweep.samples_used / whole:.0%} of all trials to their ends" if whole else ""),
        "Training data": redact(sweep.base.train_data),
        "Validation data": redact(sweep.protocol.val_data),
        "Validation manifest": sweep.protocol.val_manifest,
        "Pairs scored while training": f"{sweep.protocol.pairs:,}",
        "Begun": sweep.created,
        "Commit": sweep.commit,
        "MLflow run": sweep.mlflow_run_id,
    }
    return {name: text for name, text in facts.items() if text}


_STYLE = """
.runs td, .runs th { padding: .35rem 0 .35rem 1rem; vertical-align: top; white-space: nowrap; }
.runs .words { min-width: 7rem; text-align: left; white-space: normal; }
.runs { width: 100%; font-size: .9rem; }
.first td { font-weight: 600; }
.unranked td { color: var(--soft); }
.notes { margin-top: 1rem; max-width: 60rem; color: var(--soft); font-size: .85rem; }
.notes li { margin-bottom: .25rem; overflow-wrap: anywhere; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.sample { overflow: visible; }
svg text.no, svg text.after { text-anchor: start; }
svg text.no { font-size: 10px; }
svg text.halo { paint-order: stroke; stroke: var(--panel); stroke-width: 4px; stroke-linejoin: round; }
.dot { fill: currentColor; stroke: currentColor; stroke-width: 1.5; }
.hollow { fill: var(--panel); }
.whisker { fill: none; stroke: currentColor; stroke-width: 1.5; opacity: .55; }
.other { fill: none; stroke: var(--soft); stroke-width: 1; opacity: .5; }
.front { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 3; }
.cross { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.track { fill: var(--line); opacity: .5; }
.bar { fill: currentColor; }
.chance { fill: none; stroke: var(--ink); stroke-width: 1.5; }
@media (max-width: 52rem) {
  .runs thead { position: absolute; clip-path: inset(50%); }
  .runs, .runs tbody { display: block; }
  .runs tr { display: grid; grid-template-columns: 1fr 1fr; gap: .1rem 1rem; margin-bottom: .75rem;
    padding: .6rem .75rem; background: var(--panel); border-radius: .5rem; }
  .runs td, .runs .words { display: flex; justify-content: space-between; gap: .75rem; padding: .1rem 0; border: 0;
    text-align: right; white-space: normal; }
  .runs td::before { content: attr(data-name); color: var(--soft); font-weight: 400; text-align: left; }
  .runs td.long { grid-column: 1 / -1; }
  svg text { font-size: 14px; }
  svg text.no { font-size: 12px; }
}
"""
