"""How much of the differences in recall each setting accounts for; and which runs are worth their cost.

Simple on purpose, without models of the response:
 - A setting with few values (a grid's, a choice's, words): the share of variance between the means of its groups,
   eta squared = SS_between / SS_total. In a full grid the shares of all settings and of their interplay add up to 1.
 - A number drawn anew for each run: the square of Spearman's rank correlation with recall, which sees only what rises
   or falls throughout, not a best value in the middle.
Both are above 0 by chance: where nothing matters, (groups - 1) / (runs - 1) and 1 / (runs - 1) are to be expected.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from tuning.compare.ranking import Comparison, ComparisonRow

LEAST = 4
"""Fewest runs for which shares are computed."""
ENDED = ("finished", "pruned")


class SettingShare(NamedTuple):
    """A setting's share of the variance of recall."""

    key: str
    share: float
    chance: float
    """The share to be expected of a setting without influence."""


class EqualSamples(NamedTuple):
    """Recall of all runs that ended, after equally many samples."""

    scores: dict[int, float]
    """Number of a run -> recall."""
    samples: float
    """The samples after which they are compared; 0: each at its end, for all finished."""


class Importance(NamedTuple):
    """Shares of all settings that differ, the largest first, and the runs they were computed from."""

    shares: list[SettingShare]
    runs: int
    samples: float
    """See `EqualSamples.samples`."""


def at_equal_samples(comparison: Comparison) -> EqualSamples:
    """Recall by which finished and pruned runs can be compared: after as many samples as the first to end had seen."""
    rows = [row for row in comparison.rows if row.item.status in ENDED and row.estimate is not None]
    if all(row.item.status == "finished" for row in rows):
        return EqualSamples({row.number: row.estimate.value for row in rows if row.estimate}, 0.0)
    rows = [row for row in rows if row.item.curve]
    samples = min((row.item.curve[-1][0] for row in rows), default=0.0)
    begun = [row for row in rows if row.item.curve[0][0] <= samples]  # a list of checkpoints may begin later
    return EqualSamples({row.number: at(row.item.curve, samples) for row in begun}, samples)


def importance(comparison: Comparison) -> Importance:
    """Shares of the variance over the runs that finished or were pruned; none where they are fewer than `LEAST`."""
    scores, samples = at_equal_samples(comparison)
    if len(scores) < LEAST or statistics.pvariance(scores.values()) == 0:
        return Importance([], len(scores), samples)
    rows = [row for row in comparison.rows if row.number in scores]
    found = [_share(comparison, rows, scores, key) for key in comparison.keys]
    shares = sorted((share for share in found if share is not None), key=lambda share: -share.share)
    return Importance(shares, len(rows), samples)


def _share(
    comparison: Comparison, rows: Sequence[ComparisonRow], scores: dict[int, float], key: str
) -> SettingShare | None:
    values = [comparison.value(row, key) for row in rows]
    recalls = [scores[row.number] for row in rows]
    groups = len({json.dumps(value) for value in values})
    if groups < 2:
        return None
    if groups <= len(rows) / 2:
        return SettingShare(key, between_groups(values, recalls), (groups - 1) / (len(rows) - 1))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return SettingShare(key, rank_correlation(values, recalls) ** 2, 1 / (len(rows) - 1))
    return None  # words that are hardly ever the same


def between_groups(values: Sequence[Any], recalls: Sequence[float]) -> float:
    """Eta squared: the share of the variance of recall that lies between the means of equal values."""
    mean = statistics.fmean(recalls)
    groups: dict[str, list[float]] = {}
    for value, recall in zip(values, recalls, strict=True):
        groups.setdefault(json.dumps(value), []).append(recall)
    between = sum(len(group) * (statistics.fmean(group) - mean) ** 2 for group in groups.values())
    return between / sum((recall - mean) ** 2 for recall in recalls)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of ranks, of equal values their mean rank; 0 where one does not vary."""
    if len(set(one)) == 1 or len(set(other)) == 1:
        return 0.0
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def at(curve: Sequence[tuple[float, float]], samples: float) -> float:
    """A curve's value after `samples`: between two points on the straight line, outside them the nearest one's."""
    before = [point for point in curve if point[0] <= samples]
    after = [point for point in curve if point[0] >= samples]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (samples - x0) / (x1 - x0)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Pareto front: indices of the (cost, recall) points that no other point beats in one without losing in the other.

    They come by rising cost.
    """
    best, kept = float("-inf"), []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            best = points[place][1]
            kept.append(place)
    return kept
