"""The fusion encoder's terms, itm and mlm, over any rows of a step: a step may take them a few rows at a time.

What is drawn (wrong partners, hidden tokens) is drawn for all rows of the worker first, so that counts are known before
any gradient. Axes as in `models/batch.py`; R rows taken at once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from models import contrast, sample_rng
from models.batch import Context
from models.codebook import full_precision
from models.config import ObjectiveConfig
from models.encoders import DualEncoder
from models.fusion import FusionEncoder, KeysValues
from models.losses import MatchLogits
from models.masking import Masked, SpecialTokens, mask_tokens


class Negatives(NamedTuple):
    """For each pair the row of a wrong image and of a wrong text among all rows, and whether there is one."""

    image: Int[Tensor, " B"]
    text: Int[Tensor, " B"]
    has_image: Bool[Tensor, " B"]
    has_text: Bool[Tensor, " B"]


class FusionTargets(NamedTuple):
    """What itm and mlm have to tell apart and to predict, drawn for all rows; None where the term is off."""

    negatives: Negatives | None
    masked: Masked | None
    hidden: tuple[int, ...] | None
    """Hidden tokens of each row, counted on the CPU; None: not counted."""


def needs_fusion(targets: FusionTargets) -> bool:
    """Whether any term runs the fusion encoder."""
    return targets.negatives is not None or targets.masked is not None


def draw_targets(
    objective: ObjectiveConfig, context: Context, match_logits: MatchLogits | None, tokens: SpecialTokens
) -> FusionTargets:
    """Draw for this worker's rows what itm and mlm need."""
    negatives, masked, hidden = None, None, None
    if objective.weights.itm > 0:
        assert match_logits is not None
        negatives = hard_negatives(context, match_logits)
    if objective.weights.mlm > 0:
        masked = context.batch.fixed_draws.masked if context.batch.fixed_draws is not None else None
        if masked is None:
            batch = context.batch
            masked, hidden = (
                mask_tokens(batch.ids, batch.mask, batch.key, tokens, objective.mlm_probability),
                batch.hidden,
            )
    return FusionTargets(negatives, masked, hidden)


def fusion_counts(targets: FusionTargets, alpha: float) -> dict[str, Int[Tensor, ""]]:
    """How many pairs or tokens each part will average over on this worker."""
    counts: dict[str, Tensor] = {}
    if targets.negatives is not None:
        wrong = targets.negatives
        counts["itm"] = len(wrong.image) + wrong.has_image.sum() + wrong.has_text.sum()
    if targets.masked is not None:
        chosen = targets.masked.selected.sum()
        counts |= {name: chosen for name, share in (("mlm_hard", 1 - alpha), ("mlm_distill", alpha)) if share > 0}
    return counts


def fusion_sums(
    model: DualEncoder, teacher: DualEncoder | None, context: Context, targets: FusionTargets, rows: slice
) -> dict[str, Float[Tensor, ""]]:
    """itm and mlm (docs/spec/tcl.md 2.4, 2.5) summed over `rows`; both use the same keys and values of the images."""
    sums: dict[str, Tensor] = {}
    assert model.fusion is not None
    memory = model.fusion.image_memory(context.student.image_tokens[rows])
    if targets.negatives is not None:
        sums["itm"] = matching_sum(model.fusion, context, memory, targets.negatives, rows)
    if targets.masked is not None:
        masked = Masked(*(values[rows] for values in targets.masked))
        places = positions(masked.selected, None if targets.hidden is None else sum(targets.hidden[rows]))
        sums |= language_sums(model, teacher, context, memory, Hidden(masked, places), rows)
    return sums


def hard_negatives(context: Context, logits: MatchLogits) -> Negatives:
    """A wrong image and a wrong caption for each pair, by similarity (docs/spec/tcl.md 2.4)."""
    same, key = context.identity.same, context.batch.key
    image, has_image = contrast.draw_negatives(
        contrast.negative_weights(logits.text_to_image, same),
        same,
        sample_rng.uniform(key, sample_rng.NEGATIVE_IMAGE, 1)[:, 0],
    )
    text, has_text = contrast.draw_negatives(
        contrast.negative_weights(logits.image_to_text, same),
        same,
        sample_rng.uniform(key, sample_rng.NEGATIVE_TEXT, 1)[:, 0],
    )
    if context.batch.fixed_draws is not None:
        image, text = context.batch.fixed_draws.negative_image, context.batch.fixed_draws.negative_text
    return Negatives(image, text, has_image, has_text)


def matching_sum(
    fusion: FusionEncoder, context: Context, memory: list[KeysValues], negatives: Negatives, rows: slice
) -> Float[Tensor, ""]:
    """itm (docs/spec/tcl.md 2.4), summed over R matched pairs (class 1) and 2 R mismatched ones (class 0).

    In this order: own pairs, (text, wrong image), (wrong text, image).
    """
    wrong = Negatives(*(values[rows] for values in negatives))
    states, mask = context.student.text_tokens[rows], context.batch.mask[rows]
    if context.all_student is context.student and len(states) == len(context.batch):
        # Every wrong image is one of these rows, whose keys and values are there already.
        wrong_memory = [layer.rows(wrong.image) for layer in memory]
    else:
        wrong_memory = fusion.image_memory(context.all_student.image_tokens[wrong.image])
    fused = fusion(
        torch.cat([states, states, context.all_student.text_tokens[wrong.text]]),
        torch.cat([mask, mask, context.all_mask[wrong.text]]),
        [layer.join(other, layer) for layer, other in zip(memory, wrong_memory, strict=True)],
    )
    assert fusion.matching is not None
    label = torch.zeros(3 * len(states), dtype=torch.int64, device=states.device)
    label[: len(states)] = 1
    counted = torch.cat([torch.ones_like(wrong.has_image), wrong.has_image, wrong.has_text])
    losses = F.cross_entropy(full_precision(fusion.matching(fused[:, 0])), label, reduction="none")
    return (losses * counted).sum()


class Hidden(NamedTuple):
    """Corrupted captions of some rows, and where (row, token) their hidden tokens are, in row-major order."""

    masked: Masked
    places: Int[Tensor, "M 2"]

    def at(self, values: Shaped[Tensor, "R T ..."]) -> Shaped[Tensor, "M ..."]:
        """Values at the hidden tokens."""
        return values[self.places[:, 0], self.places[:, 1]]


def positions(selected: Bool[Tensor, "R T"], count: int | None) -> Int[Tensor, "M 2"]:
    """Where `selected` is true; a `count` known beforehand spares the host from waiting for the device."""
    return selected.nonzero() if count is None else torch.nonzero_static(selected, size=count)


def language_sums(
    model: DualEncoder,
    teacher: DualEncoder | None,
    context: Context,
    memory: list[KeysValues],
    hidden: Hidden,
    rows: slice,
) -> dict[str, Float[Tensor, ""]]:
    """mlm (docs/spec/tcl.md 2.5): logits at hidden tokens only; the teacher sees the other view of the image."""
    mask, alpha = context.batch.mask[rows], context.schedule.alpha
    logits = language_logits(model, hidden, mask, memory)
    sums = {}
    if alpha < 1:
        sums["mlm_hard"] = F.cross_entropy(logits, hidden.at(hidden.masked.original), reduction="sum")
    if alpha > 0:
        assert teacher is not None and teacher.fusion is not None and context.teacher is not None
        with torch.no_grad():
            teacher_memory = teacher.fusion.image_memory(context.teacher.image_tokens[rows])
            target = F.softmax(language_logits(teacher, hidden, mask, teacher_memory), 1)
        sums["mlm_distill"] = contrast.soft_nce(logits, target)[0]
    return sums


def language_logits(
    model: DualEncoder, hidden: Hidden, mask: Bool[Tensor, "R T"], memory: list[KeysValues]
) -> Float[Tensor, "M vocab"]:
    """Vocabulary logits at the hidden tokens."""
    assert model.fusion is not None and model.fusion.language is not None
    states = model.fusion(model.encode_text(hidden.masked.ids, mask), mask, memory)
    return full_precision(model.fusion.language(hidden.at(states), model.text.word_embeddings))
