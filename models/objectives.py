"""Which terms an objective has, what each needs, and how their parts make up the loss."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.config import EncoderConfig, InputError, ObjectiveConfig
from models.encoders import DualEncoder

TERMS = {
    "cma": ("i2t", "t2i"),
    "imc": ("i2i", "t2t"),
    "lmi": ("lmi_image", "lmi_text"),
    "itm": ("itm",),
    "mlm": ("mlm_hard", "mlm_distill"),
}
"""The parts of each term: its directions; of mlm, the two targets that alpha mixes."""


class Part(NamedTuple):
    """A loss summed over what it averages, and how many that were."""

    sum: Float[Tensor, ""]
    count: Float[Tensor, ""] | Int[Tensor, ""] | int  # type: ignore[assignment]  # shadows tuple.count


def needs_teacher(objective: ObjectiveConfig) -> bool:
    """Whether any term looks at the teacher."""
    w = objective.weights
    return infonce(objective) or w.imc > 0 or w.lmi > 0 or (w.mlm > 0 and objective.alpha > 0)


def needs_queue(objective: ObjectiveConfig) -> bool:
    """Whether any term looks at the queue."""
    return objective.queue.size > 0 and (infonce(objective) or objective.weights.imc > 0)


def infonce(objective: ObjectiveConfig) -> bool:
    """Whether cma contrasts with the teacher."""
    return objective.weights.cma > 0 and objective.cma.kind == "infonce"


def build_model(encoder: EncoderConfig, objective: ObjectiveConfig, pretrained: bool = False) -> DualEncoder:
    """The student with just the parts its objective needs; `pretrained` loads the named backbones' weights.

    Raises InputError where no term has a weight, or where published weights cannot be read.
    """
    w = objective.weights
    if not coefficients(objective, objective.alpha):
        raise InputError("objective.weights: every weight is 0, so nothing would be learnt; give a term a weight")
    sigmoid = w.cma > 0 and objective.cma.kind == "sigmoid"
    scaled = (w.cma > 0 and not sigmoid) or w.imc > 0 or w.lmi > 0
    temperature = objective.temperature.model_copy(update={"learn": objective.temperature.learn and scaled})
    return DualEncoder(encoder, w.itm > 0, w.mlm > 0, sigmoid, temperature, pretrained)


def coefficients(objective: ObjectiveConfig, alpha: float) -> dict[str, float]:
    """What the mean of each part is multiplied by; parts with 0 are left out and not computed."""
    w = objective.weights
    paired = (("cma", w.cma), ("imc", w.imc), ("lmi", w.lmi))
    parts = {part: weight / 2 for term, weight in paired for part in TERMS[term]}
    parts |= {"itm": w.itm, "mlm_hard": w.mlm * (1 - alpha), "mlm_distill": w.mlm * alpha}
    return {part: value for part, value in parts.items() if value > 0}


def term_means(means: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Unweighted value of each term from the means of its parts."""
    values = {}
    for term, names in TERMS.items():
        present = [means[name] for name in names if name in means]
        if term == "mlm" and len(present) == 2:
            values[term] = (1 - alpha) * present[0] + alpha * present[1]
        elif present:
            values[term] = torch.stack(present).mean()
    return values
