"""Ranks of runs as far as the measurements tell them apart: intervals, ties, differing protocols and settings.

A recall is a share of queries, so a run by itself has a binomial error (Wilson's interval, J. Am. Stat. Assoc. 22,
1927). That says nothing of another seed; where settings were trained with several, their spread over seeds does.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from models.config import dotted
from models.redact import redact
from pipelines.recall import mean_recall
from tuning.compare.collect import Compared

Z = 1.96
"""Standard errors of a 95 % interval."""
_NOT_SETTINGS = ("name", "out", "val_data")
"""Keys that name locations; the validation data are part of the protocol."""


class Estimate(NamedTuple):
    """A recall with its interval and standard error."""

    value: float
    """Mean over the seeds, where there are several."""
    low: float
    high: float
    """One seed: the 95 % interval over the queries; several: one standard deviation to either side."""
    error: float
    """Standard error, for the comparison of two recalls."""
    seeds: int = 1


@dataclass(frozen=True)
class ComparisonRow:
    """A run and its rank."""

    item: Compared
    number: int
    """Its number in tables and charts, from 1."""
    estimate: Estimate | None
    rank: int = 0
    """1 is best; runs that cannot be told from the first of their group share its rank; 0: not ranked."""
    tied: bool = False
    """Whether others share the rank."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, the best first; in the order given where they cannot be ranked."""

    rows: Sequence[ComparisonRow]
    keys: Sequence[str]
    """Dotted keys of the settings that differ."""
    protocol: Sequence[str] = ()
    """Differences in how they were scored, a line each; if there are any, no run has a rank."""
    notes: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """{name of a run: {dotted key: value}} of the keys that differ."""

    def value(self, row: ComparisonRow, key: str) -> Any:
        """A run's setting; None where it does not have the key."""
        return self.settings[row.item.name].get(key)

    @property
    def ranked(self) -> list[ComparisonRow]:
        """The rows with a rank, the best first."""
        return [row for row in self.rows if row.rank]


def compare(items: Sequence[Compared]) -> Comparison:
    """Rank the runs that finished; the others follow without a rank, by their last recall."""
    spread = seed_spread(items)
    estimates = {item.name: estimate(item, spread) for item in items}
    protocol = protocol_differences([item for item in items if item.recall is not None])
    ordered = list(items) if protocol else sorted(items, key=lambda item: _order(item, estimates[item.name]))
    rows = [ComparisonRow(item, number, estimates[item.name]) for number, item in enumerate(ordered, start=1)]
    settings = {item.name: _settings(item, items) for item in items}
    keys = _differing(list(settings.values()))
    return Comparison(
        rows=rows if protocol else _with_ranks(rows),
        keys=keys,
        protocol=protocol,
        notes=_notes(items, spread),
        settings={name: {key: values[key] for key in keys if key in values} for name, values in settings.items()},
    )


# Intervals and ranks


def wilson(share: float, count: float, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` trials: within [0, 1], and of some width at 0 and 1 too."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def queries(metrics: Mapping[str, float]) -> float:
    """Queries of both directions that the mean recall is worth: 4 / (1/images + 1/captions), 0 where that is not known.

    The mean of two shares, one of `images` and one of `captions` queries, has the variance of a share of so many.
    """
    pairs = metrics.get("val/pairs", 0.0)
    images, captions = metrics.get("val/images", pairs), metrics.get("val/captions", pairs)
    return 4 / (1 / images + 1 / captions) if images > 0 and captions > 0 else 0.0


def seed_spread(items: Sequence[Compared]) -> float:
    """Standard deviation of recall over seeds, pooled over all settings that have several; 0 where none has."""
    squares, freedom = 0.0, 0
    for recalls in map(_recalls, items):
        if len(recalls) > 1:
            squares += statistics.variance(recalls) * (len(recalls) - 1)
            freedom += len(recalls) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


def estimate(item: Compared, spread: float = 0.0) -> Estimate | None:
    """Recall with its interval. The error of a single run is the binomial one or the spread over seeds, if larger."""
    recalls = _recalls(item)
    if not recalls:
        return None
    value, count = statistics.fmean(recalls), queries(item.metrics)
    low, high = wilson(value, count) if count else (value, value)
    error = max((high - low) / (2 * Z), spread) / math.sqrt(len(recalls))
    if len(recalls) > 1:
        own = statistics.stdev(recalls)
        low, high = value - own, value + own
    return Estimate(value, low, high, error, len(recalls))


def _recalls(item: Compared) -> list[float]:
    """Recall with each seed, the run's own first; empty where the run has none."""
    found = [mean_recall(metrics) for metrics in (item.metrics, *item.repeats)]
    return [value for value in found if value is not None] if found[0] is not None else []


def within_error(one: Estimate, other: Estimate) -> bool:
    """Whether two recalls differ by no more than chance would make them differ in 19 of 20 cases."""
    return abs(one.value - other.value) <= Z * math.hypot(one.error, other.error)


def _order(item: Compared, found: Estimate | None) -> tuple[int, float]:
    """Finished runs first, those without a recall last, in between by recall."""
    if found is None:
        return 2, 0.0
    return (0 if item.status == "finished" else 1), -found.value


def _with_ranks(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """Ranks for the finished rows, which come first and by recall, and all numbered anew.

    A group is the best run not yet in one and all that cannot be told from it. In a group, runs that were trained with
    several seeds come first: a single run among them may have been lucky.
    """
    groups: list[list[ComparisonRow]] = []
    finished = [row for row in rows if row.estimate is not None and row.item.status == "finished"]
    for row in finished:
        leader = groups[-1][0].estimate if groups else None
        if leader and row.estimate and within_error(leader, row.estimate):
            groups[-1].append(row)
        else:
            groups.append([row])
    ranked: list[ComparisonRow] = []
    for group in groups:
        rank = len(ranked) + 1
        for row in sorted(group, key=lambda row: row.estimate is None or row.estimate.seeds == 1):
            ranked.append(ComparisonRow(row.item, len(ranked) + 1, row.estimate, rank, len(group) > 1))
    return [*ranked, *rows[len(ranked) :]]


# What differs


def protocol_differences(items: Sequence[Compared]) -> list[str]:
    """A line for each part of the protocol that is not the same for all that know it."""
    lines = []
    for part in dict.fromkeys(part for item in items for part in item.protocol):
        names: dict[str, list[str]] = {}
        for item in items:
            if part in item.protocol:
                names.setdefault(item.protocol[part], []).append(item.name)
        if len(names) > 1:
            lines.append(f"{part}: " + "; ".join(f"{redact(value)} ({some(who)})" for value, who in names.items()))
    return lines


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _notes(items: Sequence[Compared], spread: float) -> list[str]:
    """Remarks on how far the numbers can be compared."""
    notes = []
    depths = {int(item.metrics["val/rerank_top"]) for item in items if "val/rerank_top" in item.metrics}
    if len(depths) > 1:
        shown = ", ".join(map(str, sorted(depths)))
        notes.append(f"Re-ranked recall is not comparable: the first {shown} candidates; ranks go by the first stage.")
    if any(item.recall is not None and not queries(item.metrics) for item in items):
        notes.append("Runs without an interval do not say how many queries they were scored on.")
    if spread:
        notes.append(
            f"Spread over seeds: {100 * spread:.2f} points (standard deviation, pooled over what was repeated)."
        )
    elif len([item for item in items if item.recall is not None]) > 1:
        notes.append("Intervals are over the queries; what another seed would change is not known (tune --repeats).")
    return notes


def _settings(item: Compared, items: Sequence[Compared]) -> dict[str, Any]:
    """{dotted key: value}; within one sweep only what it searched, for the rest is the same."""
    values = dotted(item.config.model_dump(mode="json"))
    if item.sweep and all(other.sweep == item.sweep for other in items):
        searched = {key for other in items for key in other.overrides}
        return {key: value for key, value in values.items() if key in searched}
    text = item.config.encoder.text
    if not text.tokenizer and not text.backbone:
        values.pop("encoder.text.vocab_size", None)  # of a trained tokeniser: an outcome, once it is trained
    return {key: value for key, value in values.items() if key not in _NOT_SETTINGS and ".architecture" not in key}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all, in the order of the configuration."""
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({json.dumps(values.get(key)) for values in settings}) > 1]
