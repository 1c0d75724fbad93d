"""One optimisation step in plain PyTorch: forward, teacher, terms, backward, one all-reduce, update, enqueue.

The loss is computed on detached features ("leaves"), whose gradients then go back through the towers. Between the two,
other workers' share of a feature's gradient is added by an ordinary all-reduce, so that autograd hides no collective;
and the towers may take their rows a chunk at a time (GradCache). Why no DDP: docs/decisions/0002-no-ddp-wrapper.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.batch import Batch, Context
from models.collectives import SoloWorkers, Workers
from models.config import ObjectiveConfig
from models.encoders import DualEncoder
from models.fusion_losses import draw_targets, fusion_counts, fusion_sums, needs_fusion
from models.losses import contrast_parts
from models.objectives import ScheduleState, coefficients, term_means
from models.teacher import update_teacher
from pipelines.step.codebook import count_usage, measure
from pipelines.step.context import QueueRows, build_context
from pipelines.step.grad_cache import backward_through_towers, chunk_rows, encode_all
from pipelines.step.gradients import Peers, leaf_gradients, reduce_scalars, sum_gradients
from pipelines.step.state import StepResult, StepSettings, TrainState, autocast


class LossOutcome(NamedTuple):
    """What `loss_and_gradients` returns besides the gradients."""

    means: dict[str, Tensor]
    """Mean of each part over the global batch."""
    queue_rows: QueueRows | None
    """What is to be enqueued after the update."""
    metrics: dict[str, Tensor]
    """As in `StepResult`."""
    finite: Tensor
    """As in `StepResult`."""


def training_step(
    state: TrainState,
    batch: Batch,
    settings: StepSettings,
    schedule: ScheduleState,
    workers: Workers | None = None,
) -> StepResult:
    """Train on this worker's rows of one global batch; every worker makes the call, also with no rows."""
    workers = workers or SoloWorkers()
    state.optimizer.zero_grad(set_to_none=True)
    means, queue_rows, metrics, finite = loss_and_gradients(state, batch, settings, schedule, workers)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    sum_gradients(parameters, workers)
    codebook = state.model.codebook
    if codebook is not None:
        if schedule.measured and codebook.weight.grad is not None:
            metrics["grad/codebook"] = codebook.weight.grad.norm()
        if schedule.frozen:  # before clipping, so that standing codes do not shorten the encoders' step
            codebook.weight.grad = None
    limit = settings.clip_norm or float("inf")  # the norm is computed in any case, for the log
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
    state.optimizer.step()
    if codebook is not None:
        codebook.renormalise()
    if state.queue is not None and queue_rows is not None:
        state.queue.enqueue(*queue_rows)
    weights = coefficients(settings.objective, schedule)
    loss = torch.stack([weights[name] * mean for name, mean in means.items()]).sum()
    return StepResult(loss, means, term_means(means, schedule.alpha), norm, metrics, finite)


def loss_and_gradients(
    state: TrainState,
    batch: Batch,
    settings: StepSettings,
    schedule: ScheduleState,
    workers: Workers,
) -> LossOutcome:
    """Mean of each part over the global batch; this worker's share of the loss's gradient goes to `grad`."""
    objective, model = settings.objective, state.model
    clamp_temperature(model, objective)
    # The order is the reference's: student, then the teacher's update, then the teacher sees the second view.
    encoded = encode_all(model, batch.view1, batch, settings)
    if state.teacher is not None:
        update_teacher(state.teacher, model, objective.teacher.momentum)
    context, queue_rows = build_context(state, encoded.features, batch, settings, schedule, workers)
    means, finite = backward_to_leaves(state, context, settings, workers)
    # With `negatives: local` nothing was gathered, so nothing of a feature's gradient is elsewhere.
    gradients = leaf_gradients(context, workers if objective.negatives == "global" else SoloWorkers())
    backward_through_towers(model, batch, encoded, gradients, settings)
    count_usage(state, context)
    metrics = measure(state, context, Peers.exchange_counts(workers, len(batch)), settings) if schedule.measured else {}
    return LossOutcome(means, queue_rows, metrics, finite)


def backward_to_leaves(
    state: TrainState, context: Context, settings: StepSettings, workers: Workers
) -> tuple[dict[str, Tensor], Tensor]:
    """Run every term back to the student's features; means of the parts, and whether this worker's sums are finite.

    Counts are exchanged before any gradient, so that the fusion encoder may take a chunk of rows forward and back
    before the next.
    """
    objective, rows = settings.objective, len(context.batch)
    parts, match_logits = contrast_parts(objective, state.model, context)
    weights = coefficients(objective, context.schedule)
    device = context.batch.ids.device
    local = {name: torch.as_tensor(part.count, device=device) for name, part in parts.items()}
    targets = draw_targets(objective, context, match_logits, settings.tokens)
    local |= fusion_counts(targets, context.schedule.alpha)
    counts = reduce_scalars({name: local[name] for name in weights}, workers)
    scales = {name: weights[name] / count.clamp(min=1) for name, count in counts.items()}
    sums = {name: part.sum for name, part in parts.items()}
    if sums:
        _backward(sums, scales)  # now, so that these terms' graphs are freed before the fusion encoder runs
    sums = {name: sums[name].detach() if name in sums else torch.zeros((), device=device) for name in weights}
    for chunk in chunk_rows(rows, settings.chunk) if rows and needs_fusion(targets) else ():
        with autocast(settings, device):
            fused = fusion_sums(state.model, state.teacher, context, targets, chunk)
        _backward(fused, scales)
        for name, value in fused.items():
            sums[name] = sums[name] + value.detach()
    finite = torch.stack([value.isfinite() for value in sums.values()]).all()
    totals = reduce_scalars(sums, workers)
    return {name: totals[name] / counts[name].clamp(min=1) for name in weights}, finite


def _backward(sums: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
    torch.stack([scales[name] * value for name, value in sums.items()]).sum().backward()


def clamp_temperature(model: DualEncoder, objective: ObjectiveConfig) -> None:
    """Keep the temperature in its range, in place (not in fine-tuning)."""
    if objective.temperature.clamp:
        with torch.no_grad():
            model.temperature.clamp_(objective.temperature.min, objective.temperature.max)
