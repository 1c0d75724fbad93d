"""One optimisation step in plain PyTorch: forward, teacher, terms, backward, one all-reduce, update, enqueue.

The loss is taken on detached features ("leaves"), whose gradients then go back through the towers: so what other
workers contribute to a feature's gradient is added between the two, in the open, and autograd hides no collective.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.batch import Batch, Context, Features, Locals, Pinned, identify
from models.config import ObjectiveConfig
from models.encoders import DualEncoder
from models.gather import SoloWorkers, Workers
from models.masking import SpecialTokens
from models.objectives import coefficients, needs_queue, needs_teacher, term_means
from models.pooling import pool_patches
from models.teacher import FeatureQueue, make_teacher, update_teacher
from models.terms import contrast_parts, fusion_parts
from pipelines.exchange import Peers, backward_through_towers, gather_leaves, reduce_parts, sum_gradients


@dataclass
class TrainState:
    """All that a step changes."""

    model: DualEncoder
    teacher: DualEncoder | None
    queue: FeatureQueue | None
    optimizer: torch.optim.AdamW


@dataclass(frozen=True)
class StepSettings:
    """What stays the same over a run."""

    objective: ObjectiveConfig
    tokens: SpecialTokens
    clip_norm: float = 0.0
    bf16: bool = False


class StepResult(NamedTuple):
    """Means over all workers, as tensors: reading them is what waits for the device."""

    loss: Tensor
    parts: dict[str, Tensor]
    terms: dict[str, Tensor]
    gradient_norm: Tensor


def make_state(model: DualEncoder, objective: ObjectiveConfig, optimizer: torch.optim.AdamW) -> TrainState:
    """Teacher and queue beside a model, where the objective looks at them."""
    language = objective.weights.mlm > 0 and objective.alpha > 0
    teacher = make_teacher(model, language) if needs_teacher(objective) else None
    queue = None
    if needs_queue(objective):
        queue = FeatureQueue(objective.queue.size, model.image_projection.out_features)
        queue = queue.to(model.temperature.device, model.temperature.dtype)
    return TrainState(model, teacher, queue, optimizer)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """AdamW's two groups: vectors without decay; matrices, tables and scalars with it (TCL spec 5)."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim != 1 and not name.endswith("bias")].append(parameter)
    return [{"params": groups[False], "weight_decay": 0.0}, {"params": groups[True], "weight_decay": weight_decay}]


def equalise(state: TrainState, workers: Workers) -> None:
    """Give every worker rank 0's model and teacher."""
    for module in (state.model, state.teacher):
        for tensor in module.state_dict().values() if module is not None else ():
            workers.broadcast(tensor)


def training_step(
    state: TrainState,
    batch: Batch,
    settings: StepSettings,
    alpha: float,
    workers: Workers | None = None,
    pinned: Pinned | None = None,
) -> StepResult:
    """Train on this worker's rows of one global batch; every worker makes the call, also with no rows."""
    workers = workers or SoloWorkers()
    state.optimizer.zero_grad(set_to_none=True)
    means, fresh = loss_and_gradients(state, batch, settings, alpha, workers, pinned)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    sum_gradients(parameters, workers)
    limit = settings.clip_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
    state.optimizer.step()
    if state.queue is not None and fresh is not None:
        state.queue.enqueue(*fresh)
    weights = coefficients(settings.objective, alpha)
    loss = torch.stack([weights[name] * mean for name, mean in means.items()]).sum()
    return StepResult(loss, means, term_means(means, alpha), norm)


Fresh = tuple[Tensor, Tensor, Tensor, Tensor]
"""Teacher image and text vectors of all rows with their image and caption hashes: what is enqueued."""


def loss_and_gradients(
    state: TrainState, batch: Batch, settings: StepSettings, alpha: float, workers: Workers, pinned: Pinned | None
) -> tuple[dict[str, Tensor], Fresh | None]:
    """Mean of each part over the global batch; this worker's share of the loss's gradient goes to `grad`."""
    objective, model, teacher = settings.objective, state.model, state.teacher
    clamp_temperature(model, objective)
    with autocast(settings, batch):
        student = encode(model, batch.view1, batch)
    if teacher is not None:
        update_teacher(teacher, model, objective.teacher.momentum)
    context, fresh = build_context(state, student, batch, settings, alpha, workers, pinned)
    parts, match_logits = contrast_parts(objective, model, context)
    with autocast(settings, batch):
        parts |= fusion_parts(objective, model, teacher, context, match_logits, settings.tokens)
    weights = coefficients(objective, alpha)
    means, counts = reduce_parts(parts, workers)
    torch.stack([weights[name] * part.sum / counts[name] for name, part in parts.items()]).sum().backward()
    backward_through_towers(student, context, workers if objective.negatives == "global" else SoloWorkers())
    return means, fresh


def clamp_temperature(model: DualEncoder, objective: ObjectiveConfig) -> None:
    """Keep the temperature in its range, in place (not in fine-tuning)."""
    if objective.temperature.clamp:
        with torch.no_grad():
            model.temperature.clamp_(objective.temperature.min, objective.temperature.max)


def autocast(settings: StepSettings, batch: Batch) -> AbstractContextManager[object]:
    """bf16 for towers and fusion where asked for; contrast and losses stay in fp32."""
    return torch.autocast(batch.view1.device.type, torch.bfloat16) if settings.bf16 else nullcontext()


def encode(model: DualEncoder, pixels: Tensor, batch: Batch) -> Features:
    """Both towers over this worker's rows."""
    image_tokens, text_tokens = model.encode_image(pixels), model.encode_text(batch.ids, batch.mask)
    image, text = model.project_image(image_tokens[:, 0]), model.project_text(text_tokens[:, 0])
    return Features(image_tokens, text_tokens, image, text)


def build_context(
    state: TrainState,
    student: Features,
    batch: Batch,
    settings: StepSettings,
    alpha: float,
    workers: Workers,
    pinned: Pinned | None,
) -> tuple[Context, Fresh | None]:
    """Leaves of the student's features, the teacher's view, and all rows the terms may compare with."""
    objective = settings.objective
    peers = Peers.meet(workers if objective.negatives == "global" else SoloWorkers(), len(batch))
    leaves = Features(*(tensor.detach().requires_grad_() for tensor in student))
    ids = torch.stack([batch.image_id, batch.caption_id], 1)
    all_ids, all_mask = peers.gather(ids), peers.gather(batch.mask)
    teacher, keys, local_parts, fresh = None, None, None, None
    if state.teacher is not None:
        with torch.no_grad(), autocast(settings, batch):
            teacher = encode(state.teacher, batch.view2, batch)
            if objective.weights.lmi > 0:
                local_parts = teacher_locals(state.teacher, teacher, objective.local_grid, peers, all_mask)
        keys = (peers.gather(teacher.image), peers.gather(teacher.text))
        if state.queue is not None and peers.workers is workers:
            fresh = (*keys, *all_ids.T)
        elif state.queue is not None:  # negatives: local; the queue takes all workers' rows, so that queues stay equal
            everyone = Peers.meet(workers, len(batch))
            fresh = (everyone.gather(teacher.image), everyone.gather(teacher.text), *everyone.gather(ids).T)
    context = Context(
        batch=batch,
        student=leaves,
        all_student=gather_leaves(leaves, objective, peers),
        all_mask=all_mask,
        teacher=teacher,
        keys=keys,
        locals=local_parts,
        queue=state.queue,
        identity=identify(ids.T, all_ids.T, peers.offset, state.queue, objective.duplicates),
        offset=peers.offset,
        temperature=state.model.temperature,
        alpha=alpha,
        pinned=pinned,
    )
    return context, fresh


def teacher_locals(model: DualEncoder, teacher: Features, grid: str, peers: Peers, all_mask: Tensor) -> Locals:
    """The teacher's pooled patches and its words, of all rows (TCL spec 2.3)."""
    image = pool_patches(model.project_image(teacher.image_tokens[:, 1:]), grid)
    text = model.project_text(teacher.text_tokens[:, 1:])
    return Locals(peers.gather(image), peers.gather(text), all_mask[:, 1:])
