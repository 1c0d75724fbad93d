"""What a measured step logs of embeddings, codes and targets beside its losses (docs/spec/codebook.md 5).

Axes: B rows here, or of all workers where it says so; R rows of any matrix; K codes, D width of the joint space.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.codebook import full_precision

LIMIT = 2**26
"""Most bytes of a block of cosines."""


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
