"""What a training step changes, what stays the same over a run, and what a step returns."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.codebook_usage import CodeUsage
from models.collectives import Workers
from models.config import ObjectiveConfig
from models.encoders import DualEncoder
from models.masking import SpecialTokens
from models.objectives import assigns, needs_queue, needs_teacher
from models.teacher import FeatureQueue, make_teacher


@dataclass
class TrainState:
    """All that a step changes: weights, teacher, queue, optimiser and the codebook's counts."""

    model: DualEncoder
    teacher: DualEncoder | None
    queue: FeatureQueue | None
    optimizer: torch.optim.AdamW
    usage: CodeUsage | None = None
    """How often each code was nearest."""
    codes_initialised: bool = True
    """False until the codes have been drawn from the first features (codebook.init queue_sample)."""


@dataclass(frozen=True)
class StepSettings:
    """What stays the same over a run."""

    objective: ObjectiveConfig
    tokens: SpecialTokens
    clip_norm: float = 0.0
    bf16: bool = False
    chunk: int = 0
    """Rows that pass a tower at once on this worker; 0: all."""
    seed: int = 0
    """Seed of the run."""


class StepResult(NamedTuple):
    """Means over all workers, as tensors, because reading a number would wait for the device."""

    loss: Tensor
    parts: dict[str, Tensor]
    terms: dict[str, Tensor]
    gradient_norm: Tensor
    metrics: dict[str, Tensor]
    """Metrics of codes and embeddings in a measured step (docs/spec/codebook.md 5); else empty."""
    finite: Tensor
    """Whether this worker's own sums are finite."""


def make_state(model: DualEncoder, objective: ObjectiveConfig, optimizer: torch.optim.AdamW) -> TrainState:
    """Teacher, queue and usage counts beside a model, each where the objective needs it."""
    language = objective.weights.mlm > 0 and objective.alpha > 0
    state = TrainState(model, None, None, optimizer)
    if needs_teacher(objective):
        state.teacher = make_teacher(model, language)
    if needs_queue(objective):
        queue = FeatureQueue(objective.queue.size, model.image_projection.out_features)
        state.queue = queue.to(model.temperature.device, model.temperature.dtype)
    if model.codebook is not None and assigns(objective):
        config = objective.codebook
        state.usage = CodeUsage(config.size, config.dead.window_samples_per_code).to(model.temperature.device)
        state.codes_initialised = config.init == "normal"
    return state


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """AdamW's groups: matrices, tables and scalars decay, vectors (docs/spec/tcl.md 5) and codes do not."""
    groups: dict[str, list[nn.Parameter]] = {"plain": [], "decayed": [], "codes": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim != 1 and not name.endswith("bias")
            groups["codes" if name.startswith("codebook.") else "decayed" if decayed else "plain"].append(parameter)
    rates = {"plain": 0.0, "decayed": weight_decay, "codes": 0.0}
    return [{"params": group, "weight_decay": rates[name]} for name, group in groups.items() if group]


def equalise(state: TrainState, workers: Workers) -> None:
    """Give every worker rank 0's model and teacher."""
    for module in (state.model, state.teacher):
        for tensor in module.state_dict().values() if module is not None else ():
            workers.broadcast(tensor)


def autocast(settings: StepSettings, device: torch.device) -> AbstractContextManager[object]:
    """bf16 for towers and fusion where asked for; contrast, codebook and losses stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if settings.bf16 else nullcontext()
