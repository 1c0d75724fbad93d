"""Contrastive terms over unit vectors, each as (sum, count) so that workers can add theirs up; an image's local parts.

Axes: B rows here, N candidates in the batch, M queue entries, K local parts of a candidate, D width of the joint space.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.blockwise import sum_over_rows

MASKED = -1e9
"""Logit of a candidate that is left out: its softmax is exactly 0, and no infinity meets a zero."""


def similarities(
    query: Float[Tensor, "B D"],
    batch: Float[Tensor, "N D"],
    queue: Float[Tensor, "M D"],
    temperature: Float[Tensor, ""],
) -> Float[Tensor, "B N+M"]:
    """Cosines over temperature of each query with the batch's keys, then the queue's."""
    return torch.cat([query @ batch.T, query @ queue.T], 1) / temperature


def soft_nce(logits: Float[Tensor, "B C"], target: Float[Tensor, "B C"]) -> tuple[Float[Tensor, ""], int]:
    """Sum over rows, and their count, of the cross-entropy from softmax(logits) to `target`.

    One-hot `target` is plain contrast; blended with the teacher's softmax it distils (docs/spec/tcl.md 2.1).
    """
    return -(target * F.log_softmax(logits, 1)).sum(), len(logits)


def hard_targets(positive: Bool[Tensor, "B C"], like: Float[Tensor, "..."]) -> Float[Tensor, "B C"]:
    """Equal shares for the positives of each row, which has at least one, in the precision of `like`."""
    target = positive.to(like.dtype)
    return target / target.sum(1, keepdim=True)


def soft_targets(
    hard: Float[Tensor, "B C"], teacher_logits: Float[Tensor, "B C"], alpha: float
) -> Float[Tensor, "B C"]:
    """alpha softmax(teacher) + (1 - alpha) hard (momentum distillation, docs/spec/tcl.md 2.1)."""
    if alpha == 0:
        return hard
    return alpha * F.softmax(teacher_logits, 1) + (1 - alpha) * hard


def pool_patches(patches: Float[Tensor, "B P D"], grid: str) -> Float[Tensor, "B K D"]:
    """Patch features to the local parts of an image (docs/spec/tcl.md 2.3), neither projected nor normalised here.

    P = g x g patches are averaged to K = c x c cells, c = floor(sqrt(g)) (`sqrt`) or 4 (`quarter`). Window and stride
    are the reference's, floor(sqrt(g)) or floor(g / 4), trailing rows and columns dropped, wherever that gives c x c;
    any other grid is pooled adaptively, never to more parts than there are patches.
    Raises ValueError where P is no square.
    """
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patches are no square grid")
    cells = math.isqrt(side) if grid == "sqrt" else min(4, side)
    window = math.isqrt(side) if grid == "sqrt" else side // cells
    image = rearrange(patches, "b (h w) d -> b d h w", h=side)
    fits = side // window == cells
    pooled = F.avg_pool2d(image, window) if fits else F.adaptive_avg_pool2d(image, cells)
    return rearrange(pooled, "b d h w -> b (h w) d")


def local_global(
    query: Float[Tensor, "B D"],
    keys: Float[Tensor, "N K D"],
    valid: Bool[Tensor, "N K"],
    negative: Bool[Tensor, "B N"],
    offset: int,
    temperature: Float[Tensor, ""],
    limit: int = 2**26,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """lmi (docs/spec/tcl.md 2.3), summed over rows, with their count: mean over own parts of InfoNCE against others'.

    Row b's own parts are `keys[offset + b]`; `negative[b, j]` says whether sample j's parts are its negatives. A row
    without a valid part is not counted. The negatives' log-sum does not depend on the part, so it is taken once a row:
    B x N x K numbers, no B x K x N x K tensor; of these `limit` bytes at most exist at once, in blocks of rows.
    """
    samples, parts, width = keys.shape
    own_count = valid[offset : offset + len(query)].sum(1)

    def block(rows: slice) -> tuple[Tensor]:
        own = torch.arange(rows.start, rows.stop, device=query.device)
        scores = (query[rows] @ keys.reshape(samples * parts, width).T).view(len(own), samples, parts) / temperature
        others = scores.masked_fill(~(negative[rows, :, None] & valid[None]), MASKED).flatten(1)
        mine = scores[own - rows.start, offset + own]
        # InfoNCE of one positive s against negatives n: -ln(e^s / (e^s + sum e^n)) = softplus(lse(n) - s).
        terms = F.softplus(torch.logsumexp(others, 1, keepdim=True) - mine) * valid[offset + own]
        return ((terms.sum(1) / own_count[rows].clamp(min=1)).sum(),)

    (total,) = sum_over_rows(block, len(query), 3 * samples * parts * query.element_size(), limit)
    return total, (own_count > 0).sum().to(total.dtype)


def pairwise_sigmoid(
    image: Float[Tensor, "B D"],
    text: Float[Tensor, "N D"],
    positive: Bool[Tensor, "B N"],
    left_out: Bool[Tensor, "B N"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> tuple[Float[Tensor, ""], int]:
    """Sum and count (rows) of -log sigmoid(+-(scale cos + bias)) over all pairs (SigLIP, arXiv 2303.15343)."""
    logits = scale * (image @ text.T) + bias
    signs = positive.to(logits.dtype) * 2 - 1
    return -(F.logsigmoid(signs * logits) * ~left_out).sum(), len(image)


def negative_weights(logits: Float[Tensor, "B N"], same: Bool[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """Probability of each candidate as hard negative: softmax, 0 for the same pair (docs/spec/tcl.md 2.4)."""
    return F.softmax(logits, 1).masked_fill(same, 0.0)


def draw_negatives(
    weights: Float[Tensor, "B N"], same: Bool[Tensor, "B N"], uniform: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """One candidate a row by inverse transform of `uniform` in [0, 1), and whether the row has any candidate.

    Rows whose weights are all zero fall back to equal weights (the reference's pre-training, docs/spec/tcl.md 2.4).
    """
    allowed = (~same).double()
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights.double(), allowed)
    total = weights.cumsum(1)
    chosen = torch.searchsorted(total, uniform.double()[:, None] * total[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=weights.shape[1] - 1), allowed.any(1)
