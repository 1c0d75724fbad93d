"""The codebook: codes shared by images and texts, and the terms that train on it (CODIS, arXiv 2203.00048).

Axes: B rows here, K codes, D width of the joint space. Vectors and codes have length 1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.blockwise import sum_over_rows
from models.transport import TransportPlan


class Codebook(nn.Module):
    """K code vectors, one a row (docs/spec/codebook.md 4); they have no moving-average copy."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(codes, width), dim=1))

    def unit(self) -> Float[Tensor, "K D"]:
        """The codes at length 1, so that their gradient is tangential; float32 under autocast too."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return F.normalize(self.weight, dim=1)

    @torch.no_grad()
    def renormalise(self) -> None:
        """Set the rows back to length 1: after an optimiser step, or their growth would shrink the next ones."""
        self.weight.copy_(F.normalize(self.weight, dim=1))


class Pair(NamedTuple):
    """Unit vectors of the same rows in both modalities."""

    image: Float[Tensor, "B D"]
    text: Float[Tensor, "B D"]


def code_sums(
    student: Pair,
    teacher: Pair,
    codes: Float[Tensor, "K D"],
    plan: TransportPlan,
    tau: float,
    beta_same: float,
    limit: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """L_i2p and L_t2p (docs/spec/codebook.md 2.2) summed over rows; tables of rows by codes stay under `limit` bytes.

    The targets are the plan's, of the teacher; with `beta_same` 0 each modality predicts the code of the other.
    """
    student = Pair(*map(full_precision, student))

    def block(rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            image, text = plan.targets(_views(teacher, rows) @ codes.T)
        return (
            prediction_sum(student.image[rows], codes, (1 - beta_same) * text + beta_same * image, tau),
            prediction_sum(student.text[rows], codes, (1 - beta_same) * image + beta_same * text, tau),
        )

    with torch.autocast(codes.device.type, enabled=False):
        # Of each modality a row has scores, log-softmax, targets and mixed targets.
        return sum_over_rows(block, len(student.image), 8 * len(codes) * codes.element_size(), limit)


def transport_sums(
    teacher: Pair, codes: Float[Tensor, "K D"], plan: TransportPlan, limit: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """L_ot_v and L_ot_t (docs/spec/codebook.md 2.2) summed over rows; only the codes get a gradient."""

    def block(rows: slice) -> tuple[Tensor, Tensor]:
        views = _views(teacher, rows)
        with torch.no_grad():
            image, text = plan.targets(views @ codes.T)
        return transport_sum(views[0], codes, image), transport_sum(views[1], codes, text)

    with torch.autocast(codes.device.type, enabled=False):
        return sum_over_rows(block, len(teacher.image), 4 * len(codes) * codes.element_size(), limit)


def _views(teacher: Pair, rows: slice) -> Float[Tensor, "2 R D"]:
    return torch.stack([full_precision(teacher.image[rows]), full_precision(teacher.text[rows])])


def prediction_sum(
    features: Float[Tensor, "B D"], codes: Float[Tensor, "K D"], target: Float[Tensor, "B K"], tau: float
) -> Float[Tensor, ""]:
    """Sum over rows of H(target, softmax(features . codes / tau)), the cross-entropy."""
    return -(target * F.log_softmax(features @ codes.T / tau, 1)).sum()


def transport_sum(
    features: Float[Tensor, "B D"], codes: Float[Tensor, "K D"], target: Float[Tensor, "B K"]
) -> Float[Tensor, ""]:
    """Sum over rows and codes of target (1 - cosine): the cost of the plan, <T, 1 - S> (docs/spec/codebook.md 1.10 a).

    The mass of each code is gathered first, K x D numbers in the graph instead of B x K.
    """
    return target.sum() - ((target.T @ features) * codes).sum()


def koleo(codes: Float[Tensor, "K D"], limit: int) -> Float[Tensor, ""]:
    """-(1/K) sum_k ln(min over other codes of their distance + 1e-8): spreads the codes (docs/spec/codebook.md 4.2).

    0 for a single code. Nearest codes are found without gradient, in blocks of at most `limit` bytes.
    """
    count = len(codes)
    if count < 2:
        return codes.sum() * 0
    with torch.no_grad():
        size = max(1, limit // (count * codes.element_size()))
        nearest = torch.cat([_nearest(codes, start, size) for start in range(0, count, size)])
    distance = (codes - codes[nearest]).square().sum(1).clamp(min=torch.finfo(codes.dtype).tiny).sqrt()
    return -(distance + 1e-8).log().mean()


def _nearest(codes: Float[Tensor, "K D"], start: int, size: int) -> Int[Tensor, " R"]:
    cosines = codes[start : start + size] @ codes.T
    cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -torch.inf
    return cosines.argmax(1)


@torch.no_grad()
def rows_from_features(
    features: Float[Tensor, "2 P D"], count: int, noise: float, generator: torch.Generator
) -> Float[Tensor, "count D"]:
    """First codes (docs/spec/codebook.md 4, queue_sample): distinct features, image and text in turn, with noise.

    At length 1. `generator` is on the CPU and seeded alike on all workers. Raises ValueError for too few samples.
    """
    samples = features.shape[1]
    if count > 2 * samples:
        raise ValueError(f"{count} codes from {samples} pairs")
    picks = [torch.randperm(samples, generator=generator) for _ in range(2)]
    rows = [features[turn % 2, picks[turn % 2][turn // 2]] for turn in range(count)]
    return _disturbed(torch.stack(rows), noise, generator)


@torch.no_grad()
def badly_covered(
    features: Float[Tensor, "R D"],
    codes: Float[Tensor, "K D"],
    count: int,
    noise: float,
    generator: torch.Generator,
) -> Float[Tensor, "count D"]:
    """New vectors for dead codes: features, with noise, drawn with probability in 1 - cosine to their nearest code."""
    weights = (1 - (features @ codes.T).amax(1)).clamp(min=0).double().cpu() + 1e-12
    chosen = torch.multinomial(weights, count, generator=generator)
    return _disturbed(features[chosen.to(features.device)], noise, generator)


def _disturbed(rows: Float[Tensor, "R D"], noise: float, generator: torch.Generator) -> Float[Tensor, "R D"]:
    shift = torch.randn(rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
    return F.normalize(rows + noise * shift, dim=1)


def full_precision(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The values with at least 32 bits, where autocast left 16."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
