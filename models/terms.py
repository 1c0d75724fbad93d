"""A term's parts on this worker as (sum, count), from what a step knows of its rows; axes as in `models/batch.py`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models import contrast, draws
from models.batch import Context
from models.config import ObjectiveConfig
from models.encoders import DualEncoder
from models.fusion import FusionEncoder, KeysValues
from models.masking import Masked, SpecialTokens, mask_tokens
from models.objectives import TERMS, Part, infonce


class MatchLogits(NamedTuple):
    """Similarities that choose hard negatives: of each image to all texts, of each text to all images."""

    image_to_text: Float[Tensor, "B N"]
    text_to_image: Float[Tensor, "B N"]


def contrast_parts(
    objective: ObjectiveConfig, model: DualEncoder, context: Context
) -> tuple[dict[str, Part], MatchLogits | None]:
    """cma, imc and lmi (TCL spec 2.1 to 2.3) of this worker's rows, and the batch's similarities where itm asks."""
    w = objective.weights
    parts: dict[str, Part] = {}
    match_logits = None
    sigmoid = w.cma > 0 and objective.cma.kind == "sigmoid"
    if sigmoid:
        parts |= sigmoid_parts(model, context)
    if w.itm > 0 or (w.cma > 0 and not sigmoid):
        image, text = candidates(context, infonce(objective))
        i2t, t2i = scores(context, context.student.image, text), scores(context, context.student.text, image)
        rows = context.identity.same.shape[1]
        match_logits = MatchLogits(i2t[:, :rows].detach(), t2i[:, :rows].detach())
        if w.cma > 0 and not sigmoid:
            soft = infonce(objective) and context.alpha > 0
            parts |= cross_parts(context, i2t, t2i, (image, text) if soft else None)
    if w.imc > 0:
        image, text = candidates(context, from_teacher=True)
        for name, query, keys in (("i2i", context.student.image, image), ("t2t", context.student.text, text)):
            logits = scores(context, query, keys)
            parts[name] = Part(*contrast.soft_nce(logits, hard_targets(context, logits)))
    if w.lmi > 0:
        parts |= local_parts(context)
    return parts, match_logits


class Candidates(NamedTuple):
    """What rows are compared with: the batch's vectors, then the queue's."""

    batch: Float[Tensor, "N D"]
    queue: Float[Tensor, "M D"]


def candidates(context: Context, from_teacher: bool) -> tuple[Candidates, Candidates]:
    """Images and texts of all rows: as the teacher and its queue see them, or as the student does."""
    if not from_teacher:
        image, text = context.all_student.image, context.all_student.text
        return Candidates(image, image[:0]), Candidates(text, text[:0])
    assert context.keys is not None
    image, text = context.keys
    if context.queue is None:
        return Candidates(image, image[:0]), Candidates(text, text[:0])
    return Candidates(image, context.queue.image.to(image.dtype)), Candidates(text, context.queue.text.to(text.dtype))


def scores(context: Context, query: Float[Tensor, "B D"], keys: Candidates) -> Float[Tensor, "B C"]:
    """Logits of each row over the candidates, those that are neither positive nor negative left out."""
    logits = contrast.similarities(query, keys.batch, keys.queue, context.temperature)
    return logits.masked_fill(context.identity.left_out[:, : logits.shape[1]], contrast.MASKED)


def hard_targets(context: Context, logits: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Equal shares for each row's positives among the candidates that `logits` has."""
    return contrast.hard_targets(context.identity.positive[:, : logits.shape[1]], logits)


def cross_parts(
    context: Context,
    i2t: Float[Tensor, "B C"],
    t2i: Float[Tensor, "B C"],
    keys: tuple[Candidates, Candidates] | None,
) -> dict[str, Part]:
    """cma (TCL spec 2.1); with `keys` (images, texts) the teacher's own similarities soften the targets."""
    to_text = to_image = hard_targets(context, i2t)
    if keys is not None:
        assert context.teacher is not None
        with torch.no_grad():
            teacher_i2t = scores(context, context.teacher.image, keys[1])
            teacher_t2i = scores(context, context.teacher.text, keys[0])
        to_text = contrast.soft_targets(to_text, teacher_i2t, context.alpha)
        to_image = contrast.soft_targets(to_image, teacher_t2i, context.alpha)
    return {"i2t": Part(*contrast.soft_nce(i2t, to_text)), "t2i": Part(*contrast.soft_nce(t2i, to_image))}


def sigmoid_parts(model: DualEncoder, context: Context) -> dict[str, Part]:
    """Pairwise sigmoid cma (SigLIP): every pair once, which is both directions."""
    texts = context.all_student.text
    positive, left_out = (table[:, : len(texts)] for table in (context.identity.positive, context.identity.left_out))
    both = contrast.pairwise_sigmoid(
        context.student.image, texts, positive, left_out, model.log_scale.exp(), model.bias
    )
    return dict.fromkeys(TERMS["cma"], Part(*both))


def fusion_parts(
    objective: ObjectiveConfig,
    model: DualEncoder,
    teacher: DualEncoder | None,
    context: Context,
    match_logits: MatchLogits | None,
    tokens: SpecialTokens,
) -> dict[str, Part]:
    """itm and mlm (TCL spec 2.4, 2.5) of this worker's rows; both look at the images' keys and values, made once."""
    parts: dict[str, Part] = {}
    if model.fusion is None:
        return parts
    memory = model.fusion.image_memory(context.student.image_tokens)
    if objective.weights.itm > 0:
        assert match_logits is not None
        parts["itm"] = matching_part(model.fusion, context, memory, match_logits)
    if objective.weights.mlm > 0:
        parts |= language_parts(model, teacher, context, memory, objective.mlm_probability, tokens)
    return parts


def local_parts(context: Context) -> dict[str, Part]:
    """lmi (TCL spec 2.3): online vectors against the teacher's local parts of all rows."""
    assert context.locals is not None
    image, text, text_valid = context.locals
    image_valid = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    negative, offset, temperature = context.identity.local_negative, context.offset, context.temperature
    return {
        "lmi_image": Part(
            *contrast.local_global(context.student.image, image, image_valid, negative, offset, temperature)
        ),
        "lmi_text": Part(*contrast.local_global(context.student.text, text, text_valid, negative, offset, temperature)),
    }


def hard_negatives(context: Context, logits: MatchLogits) -> tuple[Int[Tensor, "2 B"], Bool[Tensor, "2 B"]]:
    """For each pair a wrong image and a wrong caption among all rows, and whether there is one (TCL spec 2.4)."""
    same, key = context.identity.same, context.batch.key
    image, has_image = contrast.draw_negatives(
        contrast.negative_weights(logits.text_to_image, same), same, draws.uniform(key, draws.NEGATIVE_IMAGE, 1)[:, 0]
    )
    text, has_text = contrast.draw_negatives(
        contrast.negative_weights(logits.image_to_text, same), same, draws.uniform(key, draws.NEGATIVE_TEXT, 1)[:, 0]
    )
    if context.pinned is not None:
        image, text = context.pinned.negative_image, context.pinned.negative_text
    return torch.stack([image, text]), torch.stack([has_image, has_text])


def matching_part(fusion: FusionEncoder, context: Context, memory: list[KeysValues], logits: MatchLogits) -> Part:
    """itm (TCL spec 2.4): B matched, B (caption, wrong image), B (wrong caption, image); class 1 = match."""
    (image, text), exists = hard_negatives(context, logits)
    states, mask = context.student.text_tokens, context.batch.mask
    if context.all_student is context.student:
        wrong_memory = [layer.rows(image) for layer in memory]
    else:
        wrong_memory = fusion.image_memory(context.all_student.image_tokens[image])
    fused = fusion(
        torch.cat([states, states, context.all_student.text_tokens[text]]),
        torch.cat([mask, mask, context.all_mask[text]]),
        [layer.join(wrong, layer) for layer, wrong in zip(memory, wrong_memory, strict=True)],
    )
    assert fusion.matching is not None
    rows = len(states)
    label = torch.zeros(3 * rows, dtype=torch.int64, device=states.device)
    label[:rows] = 1
    counted = torch.cat([torch.ones_like(exists[0]), *exists])
    losses = F.cross_entropy(full_precision(fusion.matching(fused[:, 0])), label, reduction="none")
    return Part((losses * counted).sum(), counted.sum())


def language_parts(
    model: DualEncoder,
    teacher: DualEncoder | None,
    context: Context,
    memory: list[KeysValues],
    share: float,
    tokens: SpecialTokens,
) -> dict[str, Part]:
    """mlm (TCL spec 2.5): logits at selected tokens only; the teacher sees the other view of the image."""
    batch = context.batch
    masked = context.pinned.masked if context.pinned is not None else None
    if masked is None:
        masked = mask_tokens(batch.ids, batch.mask, batch.key, tokens, share)
    logits = language_logits(model, masked, batch.mask, memory)
    count = len(logits)
    parts = {}
    if context.alpha < 1:
        parts["mlm_hard"] = Part(F.cross_entropy(logits, masked.original[masked.selected], reduction="sum"), count)
    if context.alpha > 0:
        assert teacher is not None and teacher.fusion is not None and context.teacher is not None
        with torch.no_grad():
            teacher_memory = teacher.fusion.image_memory(context.teacher.image_tokens)
            target = F.softmax(language_logits(teacher, masked, batch.mask, teacher_memory), 1)
        parts["mlm_distill"] = Part(*contrast.soft_nce(logits, target))
    return parts


def language_logits(
    model: DualEncoder, masked: Masked, mask: Bool[Tensor, "B T"], memory: list[KeysValues]
) -> Float[Tensor, "M vocab"]:
    """Vocabulary logits at the selected positions, in row-major order."""
    assert model.fusion is not None and model.fusion.language is not None
    states = model.fusion(model.encode_text(masked.ids, mask), mask, memory)
    return full_precision(model.fusion.language(states[masked.selected], model.text.word_embeddings))


def full_precision(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Logits in which a loss may be taken: autocast's 16 bits become 32."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
