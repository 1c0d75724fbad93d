"""Recall as the command line shows it."""


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
