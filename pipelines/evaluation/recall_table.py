"""Recall: the one number that models are chosen by, and all of it as the command line shows it."""

import math
from collections.abc import Mapping

MEAN_RECALL = "val/recall_at_1_mean"
"""Mean of both sides' recall at 1 on the fixed validation sample, as it is measured while a model trains."""
_SIDES = ("val/image_retrieval_recall_at_1", "val/text_retrieval_recall_at_1")


def mean_recall(metrics: Mapping[str, float]) -> float | None:
    """First-stage recall@1, mean of both ways: `MEAN_RECALL`, or of the two sides where only they were measured.

    None where it is missing or not finite. No number stands for that: -1 would lose against everything but another -1,
    and a comparison with NaN is false whichever way it is written, so that a check passes and `max` takes what comes
    first. None cannot be compared at all: whoever chooses has to leave such a model out.
    """
    value = metrics.get(MEAN_RECALL, sum(metrics.get(side, math.nan) for side in _SIDES) / len(_SIDES))
    return value if math.isfinite(value) else None


def recall_table(metrics: dict[str, float]) -> str:
    """Recall as a table, first stage and re-ranked, and what it was measured on."""
    plain = {name.removeprefix("val/"): value for name, value in metrics.items()}
    lines = [f"{'':30}{'R@1':>8}{'R@5':>8}{'R@10':>8}"]
    for suffix, stage in (("", "first stage"), ("_reranked", "re-ranked")):
        for side, title in (("image_retrieval", "text to image"), ("text_retrieval", "image to text")):
            names = [f"{side}_recall_at_{k}{suffix}" for k in (1, 5, 10)]
            if all(name in plain for name in names):
                cells = "".join(f"{100 * plain[name]:7.1f}%" for name in names)
                lines.append(f"{f'{title}, {stage}':30}{cells}")
    counts = [f"{int(plain[n]):,} {n.replace('_', ' ')}" for n in ("images", "captions") if n in plain]
    if "rerank_queries" in plain:
        counts.append(f"re-ranked: first {int(plain['rerank_top'])} of {int(plain['rerank_queries']):,} queries a side")
    return "\n".join([*lines, ", ".join(counts)])
