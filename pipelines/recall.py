"""Recall: the mean by which models are chosen, and the rows that the command line and pages show."""

import math
from collections.abc import Mapping
from typing import NamedTuple

MEAN_RECALL = "val/recall_at_1_mean"
"""Recall at 1 on the fixed validation sample, mean of both directions, as it is measured while a model trains."""
DIRECTIONS = {"image_retrieval": "text to image", "text_retrieval": "image to text"}
"""{first part of a metric's name: direction of the search}."""
DEPTHS = (1, 5, 10)


def mean_recall(metrics: Mapping[str, float]) -> float | None:
    """First-stage recall@1, mean of both directions: `MEAN_RECALL`, or of the two where only they were measured.

    None where it is missing or not finite. No number stands for that: -1 would lose against everything but another -1,
    and a comparison with NaN is false whichever way it is written, so that a check passes and `max` takes what comes
    first. None cannot be compared at all: whoever chooses has to leave such a model out.
    """
    both = [metrics.get(f"val/{task}_recall_at_1", math.nan) for task in DIRECTIONS]
    value = metrics.get(MEAN_RECALL, sum(both) / len(both))
    return value if math.isfinite(value) else None


class RecallRow(NamedTuple):
    """Recall of one direction and stage, at each of `DEPTHS`, as fractions."""

    direction: str
    reranked: bool
    values: list[float]


def recall_rows(metrics: Mapping[str, float]) -> list[RecallRow]:
    """The rows that flat metrics (`image_retrieval_recall_at_1`, ...) have, the first stage before re-ranking."""
    rows = []
    for suffix in ("", "_reranked"):
        for task, direction in DIRECTIONS.items():
            names = [f"{task}_recall_at_{depth}{suffix}" for depth in DEPTHS]
            if all(name in metrics for name in names):
                rows.append(RecallRow(direction, bool(suffix), [metrics[name] for name in names]))
    return rows


def rows_with_chance(metrics: Mapping[str, float]) -> list[tuple[str, list[float]]]:
    """(what, recall at `DEPTHS`) by direction; the last row is what chance gives, where images are counted."""
    found = recall_rows(metrics)
    rows = [
        (direction + (", re-ranked" if row.reranked else ""), row.values)
        for direction in DIRECTIONS.values()
        for row in found
        if row.direction == direction
    ]
    if rows and metrics.get("images"):
        rows.append(("chance, text to image", [min(1.0, depth / metrics["images"]) for depth in DEPTHS]))
    return rows


def recall_table(metrics: Mapping[str, float]) -> str:
    """Recall as lines of text, first stage and re-ranked, and what it was measured on; names with or without `val/`."""
    plain = {name.removeprefix("val/"): value for name, value in metrics.items()}
    lines = [f"{'':30}" + "".join(f"{f'R@{depth}':>8}" for depth in DEPTHS)]
    for direction, reranked, values in recall_rows(plain):
        title = f"{direction}, {'re-ranked' if reranked else 'first stage'}"
        lines.append(f"{title:30}" + "".join(f"{100 * value:7.1f}%" for value in values))
    counts = [f"{int(plain[n]):,} {n.replace('_', ' ')}" for n in ("images", "captions") if n in plain]
    if "rerank_queries" in plain:
        top, queries = int(plain["rerank_top"]), int(plain["rerank_queries"])
        counts.append(f"re-ranked: first {top} of {queries:,} queries a direction")
    return "\n".join([*lines, ", ".join(counts)])
