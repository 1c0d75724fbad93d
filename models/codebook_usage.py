"""How often each code is used, over windows of pairs: metrics of use and dead codes (docs/spec/codebook.md 4.1, 5).

Axes: B rows of this worker, K codes.

All metrics of use take the nearest code or the softmax of the student's own scores, not the balanced targets: those
are spread evenly over the codes even where the codebook has collapsed.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.collectives import Workers

TOP = 5
"""How many nearest codes count for `agree5`."""


class CodeUsage(nn.Module):
    """How often each code was nearest, over a window of pairs: all the state the codebook has beside its parameter.

    Three equal sets of counts: `pending_*` of this worker since the last flush, the window that is being filled, and
    `last_*` of the last full one. The two windows are equal on all workers and do not depend on their number; pending
    counts are not saved, so flush before.
    """

    hits: Int[Tensor, "2 K"]
    """Samples that each code was nearest to: images, texts."""
    agree: Int[Tensor, "2"]
    """Pairs with one nearest code; directions of pairs in which the nearest of one is in the top 5 of the other."""
    pairs: Int[Tensor, ""]
    last_hits: Int[Tensor, "2 K"]
    last_agree: Int[Tensor, "2"]
    last_pairs: Int[Tensor, ""]
    pending_hits: Int[Tensor, "2 K"]
    pending_agree: Int[Tensor, "2"]
    pending_pairs: Int[Tensor, ""]

    def __init__(self, codes: int, samples_per_code: int) -> None:
        super().__init__()
        self._window = samples_per_code * codes
        for prefix in ("", "last_", "pending_"):
            for name, shape in (("hits", (2, codes)), ("agree", (2,)), ("pairs", ())):
                zeros = torch.zeros(shape, dtype=torch.int64)
                self.register_buffer(prefix + name, zeros, persistent=prefix != "pending_")

    def _counts(self, prefix: str) -> list[Tensor]:
        return [self.get_buffer(prefix + name) for name in ("hits", "agree", "pairs")]

    @torch.no_grad()
    def count(self, image_scores: Float[Tensor, "B K"], text_scores: Float[Tensor, "B K"]) -> None:
        """Count the nearest codes of this worker's pairs; exchanges nothing and does not wait for the device."""
        nearest = torch.stack([image_scores.argmax(1), text_scores.argmax(1)])
        near = _in_top(image_scores, nearest[1]) + _in_top(text_scores, nearest[0])
        # scatter_add_, for bincount reads its largest value from the device first.
        self.pending_hits.scatter_add_(1, nearest, torch.ones_like(nearest))
        self.pending_agree.add_(torch.stack([(nearest[0] == nearest[1]).sum(), near]))
        self.pending_pairs.add_(len(image_scores))

    @torch.no_grad()
    def flush(self, workers: Workers) -> bool:
        """Add all workers' pending counts to the window; true where that filled it, and it became the last full one.

        Every worker makes the call, also where it counted nothing. One exchange; reads the device.
        """
        pending, window, last = (self._counts(prefix) for prefix in ("pending_", "", "last_"))
        totals = workers.all_reduce_sum(torch.cat([counts.flatten() for counts in pending]))
        for counts, total in zip(window, totals.split([counts.numel() for counts in window]), strict=True):
            counts.add_(total.view_as(counts))
        _zero(pending)
        if int(self.pairs) < self._window:
            return False
        for kept, counts in zip(last, window, strict=True):
            kept.copy_(counts)
        _zero(window)
        return True

    @property
    def full(self) -> bool:
        """Whether there has been a full window; reads the device."""
        return bool(self.last_pairs > 0)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Perplexities, share of codes without any hit and agreement, over the last full window and the running one.

        That is one to two windows of pairs once there has been a full one; empty where there is no pair.
        """
        hits, agree, pairs = (a + b for a, b in zip(self._counts(""), self._counts("last_"), strict=True))
        shares = agree.double() / (pairs * torch.tensor([1, 2], device=pairs.device)).clamp(min=1)
        image, text = perplexity(hits[0]), perplexity(hits[1])
        values = {
            "codebook/ppl_v": image,
            "codebook/ppl_t": text,
            "codebook/ppl_v_share": image / hits.shape[1],
            "codebook/ppl_t_share": text / hits.shape[1],
            "codebook/dead": (hits == 0).all(0).double().mean(),
            "codebook/agree1": shares[0],
            "codebook/agree5": shares[1],
            "codebook/kappa": kappa(shares[0], hits),
        }
        count, *numbers = torch.stack([pairs.double(), *values.values()]).tolist()
        return dict(zip(values, numbers, strict=True)) if count else {}

    def dead(self, min_rel_hits: float) -> Bool[Tensor, " K"]:
        """Codes with less than `min_rel_hits` of an even share of hits in both modalities (docs/spec/codebook.md 4.1).

        Over the last full window; none before there was a full window.
        """
        even = self.last_pairs.double() / self.last_hits.shape[1]
        return (self.last_hits < min_rel_hits * even).all(0)

    def forget(self, codes: Bool[Tensor, " K"] | Int[Tensor, " R"]) -> None:
        """Set the counts of moved codes to the even share in both windows.

        Otherwise a code moved late in a window would be judged by the few pairs left of it, and be dead at once.
        """
        for hits, pairs in ((self.hits, self.pairs), (self.last_hits, self.last_pairs)):
            hits[:, codes] = (pairs + hits.shape[1] - 1) // hits.shape[1]


def _zero(counts: list[Tensor]) -> None:
    for tensor in counts:
        tensor.zero_()


def _in_top(scores: Float[Tensor, "B K"], codes: Int[Tensor, " B"]) -> Int[Tensor, ""]:
    """Rows in which fewer than `TOP` codes score above the named one."""
    return ((scores > scores.gather(1, codes[:, None])).sum(1) < TOP).sum()


def perplexity(hits: Int[Tensor, " K"]) -> Float[Tensor, ""]:
    """exp(entropy) of a histogram: how many codes, used alike, would be as varied; 1 for an empty one."""
    return torch.special.entr(hits.double() / hits.sum().clamp(min=1)).sum().exp()


def kappa(agree: Float[Tensor, ""], hits: Int[Tensor, "2 K"]) -> Float[Tensor, ""]:
    """Agreement above chance, (agree - chance) / (1 - chance); 0 where one code has every hit, so that chance is 1."""
    shares = hits.double() / hits.sum(1, keepdim=True).clamp(min=1)
    chance = (shares[0] * shares[1]).sum()
    return torch.where(chance < 1, (agree - chance) / (1 - chance).clamp(min=1e-12), 0.0)
