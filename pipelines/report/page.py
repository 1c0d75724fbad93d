"""HTML pages of one file each, with styles, charts and images inside; readable on a phone."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from pipelines.recall import DEPTHS, DIRECTIONS, rows_with_chance
from pipelines.report.charts import Chart, Series, line_chart

_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


@dataclass(frozen=True)
class ContactRow:
    """A caption and the images found for it: JPEG, PNG, GIF or WebP bytes, best first; `right` marks its own images."""

    caption: str
    images: Sequence[bytes]
    right: Sequence[bool]
    remark: str = ""


@dataclass(frozen=True)
class TrainingPage:
    """Contents of the page of one training run; empty parts are left out."""

    title: str
    lead: str = ""
    """A sentence or two under the title."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What was trained, on what, how long."""
    recall: Mapping[str, float] = field(default_factory=dict)
    """Flat metrics of the held-out split (`image_retrieval_recall_at_1` ...), fractions; `images` for chance."""
    contact_sheet: Sequence[ContactRow] = ()
    validation: Mapping[str, Series] = field(default_factory=dict)
    """The same metric names -> (samples seen, fraction)."""
    losses: Mapping[str, Series] = field(default_factory=dict)
    """Term -> (optimiser step, value)."""


def training_report(path: Path, page: TrainingPage) -> None:
    """Write the page of a training run to `path`; its folders are made."""
    sections = [
        f"<header><h1>{escape(page.title)}</h1>" + (f"<p>{escape(page.lead)}</p>" if page.lead else "") + "</header>",
        section("Recall", _recall_note(page.recall) + _recall_table(page.recall)) if page.recall else "",
        section("What it finds", _contact_sheet(page.contact_sheet)) if page.contact_sheet else "",
        section("Recall while training", _validation(page.validation)) if page.validation else "",
        section("Losses", _losses(page.losses)) if page.losses else "",
        section("The run", facts_list(page.facts)) if page.facts else "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(whole_page(page.title, "\n".join(sections)), encoding="utf-8")


def charts_page(path: Path, title: str, lead: str, charts: Sequence[Chart]) -> None:
    """Write a page of charts to `path`; its folders are made."""
    drawn = "".join(map(line_chart, charts))
    body = f'<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header><section class="charts">{drawn}</section>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(whole_page(title, body), encoding="utf-8")


def whole_page(title: str, body: str, style: str = "") -> str:
    """A whole HTML page around a body; `style` is CSS after the common one."""
    return _PAGE.format(title=escape(title), style=_STYLE + style, body=body)


def section(title: str, body: str) -> str:
    """A section of a page, under a heading."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _recall_note(metrics: Mapping[str, float]) -> str:
    """A sentence on how many captions and images were scored; empty where that is not known."""
    if not metrics.get("images") or not metrics.get("captions"):
        return ""
    note = f"{int(metrics['captions']):,} captions and {int(metrics['images']):,} images that training never saw."
    if metrics.get("rerank_queries") and metrics.get("rerank_top"):
        top, queries = int(metrics["rerank_top"]), int(metrics["rerank_queries"])
        note += f" Re-ranked: the first {top} candidates of {queries:,} queries."
    return f"<p>{note}</p>"


def _recall_table(metrics: Mapping[str, float]) -> str:
    head = "".join(f'<th scope="col">at {depth}</th>' for depth in DEPTHS)
    rows = "".join(
        f'<tr><th scope="row">{escape(what)}</th>'
        + "".join(f"<td>{value * 100:.1f}%</td>" for value in values)
        + "</tr>"
        for what, values in rows_with_chance(metrics)
    )
    return f'<table><thead><tr><th scope="col">Recall</th>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _contact_sheet(rows: Sequence[ContactRow]) -> str:
    """Captions, each with its images; right ones have a thick border and a tick."""
    key = f"<p>Each caption with the images it finds first, best on the left. {_TICK} marks the right one.</p>"
    return key + f'<ol class="sheet">{"".join(map(_contact_row, rows))}</ol>'


def _contact_row(row: ContactRow) -> str:
    images = "".join(
        f'<li{" class=right" if right else ""}><img src="{_data_uri(image)}" loading="lazy" '
        f'alt="Rank {rank}{", right" if right else ""}">{_TICK if right else ""}</li>'
        for rank, (image, right) in enumerate(zip(row.images, row.right, strict=True), start=1)
    )
    remark = f'<p class="remark">{escape(row.remark)}</p>' if row.remark else ""
    return f'<li><p class="caption">{escape(row.caption)}</p>{remark}<ol class="hits">{images}</ol></li>'


def _validation(validation: Mapping[str, Series]) -> str:
    """Recall against samples seen, a chart for each direction."""
    charts = []
    for task, direction in DIRECTIONS.items():
        names = {f"at {depth}": f"{task}_recall_at_{depth}" for depth in reversed(DEPTHS)}
        series = {label: validation[name] for label, name in names.items() if name in validation}
        if series:
            charts.append(line_chart(Chart(f"Recall, {direction}", "samples seen", series, percent=True)))
    return f'<div class="charts">{"".join(charts)}</div>'


def _losses(losses: Mapping[str, Series]) -> str:
    """A chart for each term, each with its own scale."""
    charts = (line_chart(Chart(term, "step", {"": points}, smooth=True)) for term, points in losses.items())
    note = "<p>Each term has its own scale: thin, the steps as logged; thick, their running mean.</p>"
    return f'{note}<div class="charts">{"".join(charts)}</div>'


def facts_list(facts: Mapping[str, str]) -> str:
    """{name: value} as a description list."""
    return "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()) + "</dl>"


def _data_uri(image: bytes) -> str:
    """The image as a `data:` URI; raises ValueError for bytes of another format."""
    kind = next((kind for signature, kind in _SIGNATURES.items() if image.startswith(signature)), None)
    if kind is None:
        raise ValueError(f"an image for a page must be JPEG, PNG, GIF or WebP, not {image[:8]!r}")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


_TICK = '<b class="tick" aria-hidden="true">✓</b>'

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --panel: #f5f7f9; --ink: #1c2229; --soft: #5a6672; --line: #d7dde3;
  --right: #14804a; --s0: #0b65b0; --s1: #b4520a; --s2: #14804a; --s3: #8a3f9e; }
@media (prefers-color-scheme: dark) { :root { --paper: #101418; --panel: #181e24; --ink: #e4eaf0; --soft: #9aa7b3;
  --line: #323b44; --right: #57d08f; --s0: #6bb4f8; --s1: #f2a65f; --s2: #57d08f; --s3: #d49be6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 0 0 .5rem; font-size: 1.2rem; }
header p { margin: .5rem 0 0; max-width: 46rem; font-size: 1.1rem; }
section { margin-top: 2.5rem; }
section > p { margin: 0 0 1rem; max-width: 46rem; color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 0 .4rem 1.5rem; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400; }
thead th { color: var(--soft); font-size: .9rem; }
th:first-child { padding-left: 0; text-align: left; }
tbody tr:last-child > * { border-bottom: 0; }
ol, ul { margin: 0; padding: 0; list-style: none; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.chart { margin: 0; padding: .75rem; background: var(--panel); border-radius: .5rem; }
.chart > svg { display: block; width: 100%; height: auto; max-width: 32rem; }
figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; color: var(--soft); font-size: .85rem; }
.sample { width: 28px; height: 8px; margin-right: .4rem; }
svg text { fill: var(--soft); font-size: 12px; text-anchor: middle; }
svg text.y { text-anchor: end; }
.grid, .axis { fill: none; stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); }
.line, .raw { fill: none; stroke: currentColor; stroke-linejoin: round; }
.line { stroke-width: 2; }
.raw { stroke-width: 1; opacity: .35; }
circle { fill: currentColor; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.sheet { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.sheet > li { display: flex; flex-direction: column; padding: .75rem; background: var(--panel); border-radius: .5rem; }
.caption { margin: 0 0 .6rem; line-height: 1.35; }
.remark { margin: -.4rem 0 .6rem; color: var(--soft); font-size: .85rem; }
.hits { margin-top: auto; display: grid; grid-template-columns: repeat(5, 1fr); gap: .4rem; }
.hits li { position: relative; aspect-ratio: 1; border: 1px solid var(--line); border-radius: 4px; }
.hits li.right { border: 0; outline: 4px solid var(--right); }
.hits img { display: block; width: 100%; height: 100%; object-fit: contain; border-radius: 3px; }
.tick { display: inline-block; width: 1.25rem; height: 1.25rem; border-radius: 50%; background: var(--right);
  color: var(--paper); font-size: .85rem; line-height: 1.25rem; text-align: center; }
.hits .tick { position: absolute; right: -.5rem; bottom: -.5rem; }
dl { display: grid; gap: .75rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr));
  margin: 0; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { .chart, .sheet > li { break-inside: avoid; } }
"""
