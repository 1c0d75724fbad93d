"""The terms without fusion encoder, as (sum, count) of this worker's rows; axes as in `models/batch.py`."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from models import contrast
from models.batch import Context
from models.codebook import Pair, code_sums, koleo, transport_sums
from models.config import ObjectiveConfig
from models.encoders import DualEncoder
from models.objectives import TERMS, Part, coefficients, infonce


class MatchLogits(NamedTuple):
    """Similarities that choose hard negatives: of each image to all texts, of each text to all images."""

    image_to_text: Float[Tensor, "B N"]
    text_to_image: Float[Tensor, "B N"]


def contrast_parts(
    objective: ObjectiveConfig, model: DualEncoder, context: Context
) -> tuple[dict[str, Part], MatchLogits | None]:
    """All terms that need no fusion encoder, of this worker's rows, and the similarities that itm needs, if any."""
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
            soft = infonce(objective) and context.schedule.alpha > 0
            parts |= cross_parts(context, i2t, t2i, (image, text) if soft else None)
    if w.imc > 0:
        image, text = candidates(context, from_teacher=True)
        for name, query, keys in (("i2i", context.student.image, image), ("t2t", context.student.text, text)):
            logits = scores(context, query, keys)
            parts[name] = Part(*contrast.soft_nce(logits, hard_targets(context, logits)))
    limit = block_bytes(objective)
    if w.lmi > 0:
        parts |= local_parts(context, limit)
    return parts | codebook_parts(objective, context, limit), match_logits


def block_bytes(objective: ObjectiveConfig) -> int:
    """Most bytes of scores at once in lmi, code and ot."""
    return int(objective.block_mib * 2**20)


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
    """cma (docs/spec/tcl.md 2.1); with `keys` (images, texts) the teacher's own similarities soften the targets."""
    to_text = to_image = hard_targets(context, i2t)
    if keys is not None:
        assert context.teacher is not None
        with torch.no_grad():
            teacher_i2t = scores(context, context.teacher.image, keys[1])
            teacher_t2i = scores(context, context.teacher.text, keys[0])
        to_text = contrast.soft_targets(to_text, teacher_i2t, context.schedule.alpha)
        to_image = contrast.soft_targets(to_image, teacher_t2i, context.schedule.alpha)
    return {"i2t": Part(*contrast.soft_nce(i2t, to_text)), "t2i": Part(*contrast.soft_nce(t2i, to_image))}


def sigmoid_parts(model: DualEncoder, context: Context) -> dict[str, Part]:
    """Pairwise sigmoid cma (SigLIP): every pair once, which is both directions."""
    texts = context.all_student.text
    positive, left_out = (table[:, : len(texts)] for table in (context.identity.positive, context.identity.left_out))
    both = contrast.pairwise_sigmoid(
        context.student.image, texts, positive, left_out, model.log_scale.exp(), model.bias
    )
    return dict.fromkeys(TERMS["cma"], Part(*both))


def local_parts(context: Context, limit: int) -> dict[str, Part]:
    """lmi (docs/spec/tcl.md 2.3): online vectors against the teacher's local parts of all rows."""
    assert context.local_parts is not None
    image, text, text_valid = context.local_parts
    image_valid = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    negative, offset, temperature = context.identity.local_negative, context.offset, context.temperature
    parts = {}
    for name, query, keys, valid in (
        ("lmi_image", context.student.image, image, image_valid),
        ("lmi_text", context.student.text, text, text_valid),
    ):
        parts[name] = Part(*contrast.local_global(query, keys, valid, negative, offset, temperature, limit))
    return parts


def codebook_parts(objective: ObjectiveConfig, context: Context, limit: int) -> dict[str, Part]:
    """code, ot and koleo (docs/spec/codebook.md 2.2, 4.2), those that have a weight at this point of the run."""
    wanted = coefficients(objective, context.schedule).keys() & {"i2p", "ot_v", "koleo"}
    parts: dict[str, Part] = {}
    if not wanted:
        return parts
    codes, plan, config = context.codes, context.plan, objective.codebook
    assert codes is not None
    rows = len(context.batch)
    if plan is not None and context.teacher is not None:
        student, teacher = (Pair(branch.image, branch.text) for branch in (context.student, context.teacher))
        if "i2p" in wanted:
            sums = code_sums(student, teacher, codes, plan, config.tau, config.beta_same, limit)
            parts |= {name: Part(value, rows) for name, value in zip(TERMS["code"], sums, strict=True)}
        if "ot_v" in wanted:
            sums = transport_sums(teacher, codes, plan, limit)
            parts |= {name: Part(value, rows) for name, value in zip(TERMS["ot"], sums, strict=True)}
    if "koleo" in wanted:  # the same on every worker: the mean over workers is the value itself
        parts["koleo"] = Part(koleo(codes, limit), 1)
    return parts
