"""Which terms an objective has, what each needs, and how their parts make up the loss."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.assignment import queue_entries
from models.config import EncoderConfig, InputError, ObjectiveConfig
from models.encoders import DualEncoder, Heads

TERMS = {
    "cma": ("i2t", "t2i"),
    "imc": ("i2i", "t2t"),
    "lmi": ("lmi_image", "lmi_text"),
    "code": ("i2p", "t2p"),
    "ot": ("ot_v", "ot_t"),
    "koleo": ("koleo",),
    "itm": ("itm",),
    "mlm": ("mlm_hard", "mlm_distill"),
}
"""The parts of each term: its directions; of mlm, the two targets that alpha mixes."""


class ScheduleState(NamedTuple):
    """The values that schedules give the objective at one step of a run."""

    alpha: float
    """Share of the teacher's soft targets."""
    ramp: float = 1.0
    """Share of their weights that the codebook's terms have reached; at 0 they are not computed."""
    frozen: bool = False
    """Whether the codes stand still."""
    measured: bool = False
    """Whether the step's embeddings, codes and targets are measured (docs/spec/codebook.md 5)."""
    step: int = 0
    """Optimiser steps before this one."""


class Part(NamedTuple):
    """One direction of a term, not averaged yet: the sum of its losses and how many there are."""

    sum: Float[Tensor, ""]
    count: Float[Tensor, ""] | Int[Tensor, ""] | int  # type: ignore[assignment]  # shadows tuple.count


def needs_teacher(objective: ObjectiveConfig) -> bool:
    """Whether any term reads the teacher's features."""
    w = objective.weights
    distils = w.mlm > 0 and objective.alpha > 0
    return infonce(objective) or w.imc > 0 or w.lmi > 0 or distils or assigns(objective)


def needs_queue(objective: ObjectiveConfig) -> bool:
    """Whether any term reads the queue."""
    in_assignment = assigns(objective) and objective.codebook.assign_queue != 0
    return objective.queue.size > 0 and (infonce(objective) or objective.weights.imc > 0 or in_assignment)


def assigns(objective: ObjectiveConfig) -> bool:
    """Whether samples are assigned to codes."""
    return objective.weights.code > 0 or objective.weights.ot > 0


def needs_codebook(objective: ObjectiveConfig) -> bool:
    """Whether there are codes at all."""
    return assigns(objective) or koleo_weight(objective) > 0


def koleo_weight(objective: ObjectiveConfig) -> float:
    """The weight of KoLeo, which has two names. Raises InputError where both are given and differ."""
    weight, same = objective.weights.koleo, objective.codebook.koleo
    if weight and same and weight != same:
        raise InputError(
            f"objective.weights.koleo {weight} and objective.codebook.koleo {same} differ; give one of them"
        )
    return weight or same


def infonce(objective: ObjectiveConfig) -> bool:
    """Whether cma contrasts with the teacher."""
    return objective.weights.cma > 0 and objective.cma.kind == "infonce"


def build_model(encoder: EncoderConfig, objective: ObjectiveConfig, pretrained: bool = False) -> DualEncoder:
    """The student with just the parts its objective needs; `pretrained` loads the named backbones' weights.

    Raises InputError where no term has a weight, or where published weights cannot be read.
    """
    w = objective.weights
    if not coefficients(objective, ScheduleState(objective.alpha)):
        raise InputError("objective.weights: every weight is 0, so nothing would be learnt; give a term a weight")
    sigmoid = w.cma > 0 and objective.cma.kind == "sigmoid"
    scaled = (w.cma > 0 and not sigmoid) or w.imc > 0 or w.lmi > 0
    temperature = objective.temperature.model_copy(update={"learn": objective.temperature.learn and scaled})
    heads = Heads(w.itm > 0, w.mlm > 0, sigmoid, objective.codebook.size if needs_codebook(objective) else 0)
    return DualEncoder(encoder, heads, temperature, pretrained)


def coefficients(objective: ObjectiveConfig, schedule: ScheduleState) -> dict[str, float]:
    """What the mean of each part is multiplied by; parts with 0 are left out and not computed."""
    w, alpha = objective.weights, schedule.alpha
    paired = (
        ("cma", w.cma),
        ("imc", w.imc),
        ("lmi", w.lmi),
        ("code", w.code * schedule.ramp),
        ("ot", w.ot * schedule.ramp),
    )
    parts = {part: weight / 2 for term, weight in paired for part in TERMS[term]}
    parts |= {"koleo": koleo_weight(objective) * schedule.ramp}
    parts |= {"itm": w.itm, "mlm_hard": w.mlm * (1 - alpha), "mlm_distill": w.mlm * alpha}
    return {part: value for part, value in parts.items() if value > 0}


def term_means(means: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Value of each term, without its weight, from the means of its parts; of mlm's two, mixed by alpha."""
    values = {}
    for term, names in TERMS.items():
        present = [means[name] for name in names if name in means]
        if term == "mlm" and len(present) == 2:
            values[term] = (1 - alpha) * present[0] + alpha * present[1]
        elif present:
            values[term] = torch.stack(present).mean()
    return values


def check_codebook(objective: ObjectiveConfig, batch_size: int) -> list[str]:
    """Warnings, a line each, of what may train badly (docs/spec/codebook.md 7); InputError for what cannot work."""
    koleo_weight(objective)
    if not assigns(objective):
        return []
    most = batch_size + queue_entries(objective.codebook, batch_size, objective.queue.size)
    _require_possible(objective, most)
    return _warnings(objective, most)


def _require_possible(objective: ObjectiveConfig, most: int) -> None:
    """Raises InputError for settings that cannot work, where at most `most` samples are assigned together."""
    config, name = objective.codebook, "objective.codebook"
    if most < 2 and config.balance == 1:
        raise InputError(
            f"{name}.balance 1: one sample at a time is spread evenly over all codes; raise the batch size"
        )
    if most < config.size and config.init == "queue_sample":
        raise InputError(f"{name}.init queue_sample: {config.size} codes, but at most {most} samples; use normal")
    if config.dead.enabled and objective.queue.size == 0:
        raise InputError(f"{name}.dead.enabled: repair takes features from the queue; set objective.queue.size")


def _warnings(objective: ObjectiveConfig, most: int) -> list[str]:
    """Settings that work and may train badly, where at most `most` samples are assigned together."""
    config, name = objective.codebook, "objective.codebook"
    notes = []
    if config.solver == "sinkhorn" and config.eps >= config.tau:
        notes.append(f"{name}.eps {config.eps} is not below tau {config.tau}: such targets teach nothing; lower eps")
    if most < config.size and config.balance == 1:
        notes.append(
            f"{name}.size {config.size}: at most {most} samples are assigned together, so no target is sharp; "
            "take fewer codes, a larger objective.queue.size or balance below 1"
        )
    if config.dead.enabled and config.dead.max_frac * config.size < 1:
        notes.append(f"{name}.dead.max_frac {config.dead.max_frac} of {config.size} codes is none: no code is repaired")
    if config.size % 8:
        notes.append(f"{name}.size {config.size} is no multiple of 8, which GPUs multiply slowly")
    if not objective.weights.cma:
        notes.append("objective.weights.cma is 0: the codebook alone aligns classes, hardly single pairs")
    return notes
