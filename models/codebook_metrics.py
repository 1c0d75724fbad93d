"""How the codes are used and how the embeddings lie: what is logged beside the loss (docs/spec/codebook.md 5).

Axes: B rows here, or of all workers where it says so; R rows of any matrix; K codes, D width of the joint space.
All metrics of use take the nearest code or the softmax of the student's own scores, not the balanced targets: those
are spread evenly over the codes even where the codebook has collapsed.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.codebook import full_precision
from models.collectives import Workers

TOP = 5
"""How many nearest codes count for `agree5`."""
LIMIT = 2**26
"""Most bytes of a block of cosines."""


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


def embedding_metrics(
    student_image: Float[Tensor, "B D"],
    student_text: Float[Tensor, "B D"],
    teacher_image: Float[Tensor, "B D"],
    teacher_text: Float[Tensor, "B D"],
) -> dict[str, Float[Tensor, ""]]:
    """Alignment, uniformity, modality gap, and how far the teacher lags; of all workers' unit rows.

    0 each without rows; uniformity also with a single one.
    """
    views = (full_precision(view) for view in (student_image, student_text, teacher_image, teacher_text))
    image, text, image_ema, text_ema = views
    drift_image, drift_text = _mean(1 - (image * image_ema).sum(1)), _mean(1 - (text * text_ema).sum(1))
    return {
        "embedding/align": _mean((image - text).square().sum(1)),
        "embedding/unif_v": uniformity(image),
        "embedding/unif_t": uniformity(text),
        "embedding/gap": (image - text).sum(0).norm() / max(len(image), 1),
        "embedding/ts_drift_v": drift_image,
        "embedding/ts_drift_t": drift_text,
        "embedding/ts_drift": (drift_image + drift_text) / 2,
    }


def uniformity(rows: Float[Tensor, "R D"]) -> Float[Tensor, ""]:
    """ln of the mean over pairs of exp(-2 |z_i - z_j|^2), of unit rows: 0 for equal rows, about -4 spread evenly."""
    count = len(rows)
    if count < 2:
        return rows.new_zeros(())
    # Of unit rows the squared distance is 2 - 2 cosine.
    sums = [(4 * cosines - 4).exp().sum(dtype=torch.float64) for cosines in _with_others(rows)]
    return (torch.stack(sums).sum() / (count * (count - 1))).log()


def code_metrics(codes: Float[Tensor, "K D"]) -> dict[str, Float[Tensor, ""]]:
    """Mean cosine of a code (of length 1) to its nearest other, 0 of a single one; effective rank of all.

    The rank is exp(entropy of the singular values, scaled to sum 1); its eigenvalues make a GPU wait for the host.
    """
    nearest = torch.cat([cosines.amax(1) for cosines in _with_others(codes)])
    return {
        "codebook/nn_cos": nearest.mean() if len(codes) > 1 else codes.new_zeros(()),
        "codebook/erank": _effective_rank(codes.double()),
    }


def _effective_rank(rows: Float[Tensor, "R D"]) -> Float[Tensor, ""]:
    """NaN where a row is not finite: `eigvalsh` would raise, and hide the error that training gives for it."""
    gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    finite = gram.isfinite().all()
    squares = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0)).clamp(min=0)
    # A zero eigenvalue comes out near eps; its root, near 1e-8, would count as a direction.
    noise = len(gram) * torch.finfo(gram.dtype).eps * squares.amax()
    values = torch.where(squares > noise, squares, 0.0).sqrt()
    rank = torch.special.entr(values / values.sum().clamp(min=1e-30)).sum().exp()
    return torch.where(finite, rank, torch.nan)


def _with_others(rows: Float[Tensor, "R D"]) -> Iterator[Float[Tensor, "B R"]]:
    """Cosines of unit rows with all of them, a block of rows at a time; -inf with themselves."""
    size = max(1, LIMIT // max(len(rows) * rows.element_size(), 1))
    for start in range(0, len(rows), size):
        cosines = rows[start : start + size] @ rows.T
        cosines.diagonal(start).fill_(-torch.inf)
        yield cosines


def target_metrics(
    scores: tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]],
    targets: tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]],
    tau: float,
    beta_same: float,
) -> dict[str, Float[Tensor, ""]]:
    """How sharp predictions and targets are, and the part of L_code that can be learnt, L_code - mean H(y).

    Of images and texts: the student's cosines with the codes, and the teacher's targets before they are mixed
    (docs/spec/codebook.md 2.2). Entropies are shares of ln K, 0 for one code; everything is a mean over modalities.
    """
    image, text = targets
    mixed = ((1 - beta_same) * text + beta_same * image, (1 - beta_same) * image + beta_same * text)
    values: dict[str, list[Tensor]] = {"H_student": [], "H_target": [], "q_max": [], "kl": []}
    most = max(math.log(image.shape[1]), 1e-12)
    for cosines, target, label in zip(scores, targets, mixed, strict=True):
        log_prediction = F.log_softmax(full_precision(cosines) / tau, 1)
        values["H_student"].append(_mean(torch.special.entr(log_prediction.exp()).sum(1)) / most)
        values["H_target"].append(_mean(torch.special.entr(target).sum(1)) / most)
        values["q_max"].append(_mean(target.amax(1)))
        values["kl"].append(_mean(-(torch.special.entr(label) + label * log_prediction).sum(1)))
    return {f"codebook/{name}": torch.stack(both).mean() for name, both in values.items()}


def mass_metrics(
    mass: Float[Tensor, "2 K"], potentials: Float[Tensor, "2 K"], eps: float
) -> dict[str, Float[Tensor, ""]]:
    """How far the codes' mass is from even, and how much their scores were shifted for it; mean q of each problem.

    `marg_l1`: the error's sum over codes, which is the mean relative one, a mean over modalities; `marg_max`: the
    largest relative error; `g_range`: eps (max g - min g), in units of cosine, of the modality with more.
    """
    error = (mass.shape[1] * mass - 1).abs()
    return {
        "codebook/marg_l1": error.mean(),
        "codebook/marg_max": error.amax(),
        "codebook/g_range": eps * (potentials.amax(1) - potentials.amin(1)).amax(),
    }


def _mean(values: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """0 of nothing."""
    return values.sum() / max(len(values), 1)
