"""What the terms of a step read: the student's features, the teacher's, the other workers' rows, the codes."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.batch import Batch, Context, Features, LocalParts, identify
from models.collectives import SoloWorkers, Workers
from models.contrast import pool_patches
from models.encoders import DualEncoder
from models.objectives import ScheduleState
from pipelines.step.codebook import assign_codes, init_codes
from pipelines.step.grad_cache import encode_all
from pipelines.step.gradients import Peers, gather_leaves
from pipelines.step.state import StepSettings, TrainState, autocast

QueueRows = tuple[Tensor, Tensor, Tensor, Tensor]
"""What a step enqueues: teacher image and text vectors of all workers' rows, their image and their caption hashes."""


class TeacherView(NamedTuple):
    """What the teacher makes of a step's rows."""

    features: Features
    """Of this worker's rows."""
    keys: tuple[Tensor, Tensor]
    """Vectors (image, text) of all rows that are candidates."""
    local_parts: LocalParts | None
    """Local parts of the same rows; None without lmi."""


def build_context(
    state: TrainState,
    student: Features,
    batch: Batch,
    settings: StepSettings,
    schedule: ScheduleState,
    workers: Workers,
) -> tuple[Context, QueueRows | None]:
    """Everything the terms need, and what the queue will get; every worker makes the call, also with no rows."""
    objective = settings.objective
    everyone = Peers.exchange_counts(workers, len(batch))
    peers = everyone if objective.negatives == "global" else Peers(SoloWorkers(), [len(batch)])
    # Leaves: the loss is differentiated up to here, and further by `backward_through_towers`.
    leaves = Features(*(tensor.detach().requires_grad_() for tensor in student))
    ids = torch.stack([batch.image_id, batch.caption_id], 1)
    all_ids, all_mask = peers.gather(ids), peers.gather(batch.mask)
    view = view_through_teacher(state.teacher, batch, settings, peers, all_mask) if state.teacher is not None else None
    plan, queue_rows = None, None
    if view is not None:
        if state.queue is not None:
            # Queues take all workers' rows, also with `negatives: local`, so that they stay equal.
            queue_rows = (*view.keys, *all_ids.T) if peers is everyone else gather_queue_rows(everyone, view, ids)
        init_codes(state, view.features, everyone, settings, schedule)
        plan = assign_codes(state, view.features, everyone, settings, schedule)
    context = Context(
        batch=batch,
        student=leaves,
        all_student=gather_leaves(leaves, objective, peers),
        all_mask=all_mask,
        teacher=None if view is None else view.features,
        keys=None if view is None else view.keys,
        local_parts=None if view is None else view.local_parts,
        queue=state.queue,
        identity=identify(ids.T, all_ids.T, peers.offset, state.queue, objective.duplicates),
        offset=peers.offset,
        temperature=state.model.temperature,
        schedule=schedule,
        # Only now: `init_codes` writes the weight in place, which would spoil an earlier graph.
        codes=state.model.codebook.unit() if state.model.codebook is not None else None,
        plan=plan,
    )
    return context, queue_rows


@torch.no_grad()
def view_through_teacher(
    teacher: DualEncoder, batch: Batch, settings: StepSettings, peers: Peers, all_mask: Tensor
) -> TeacherView:
    """Encode this worker's second views and texts by the teacher, and gather what other rows are compared with."""
    features = encode_all(teacher, batch.view2, batch, settings).features
    local_parts = None
    if settings.objective.weights.lmi > 0:
        with autocast(settings, batch.ids.device):
            local_parts = teacher_locals(teacher, features, settings.objective.local_grid, peers, all_mask)
    return TeacherView(features, (peers.gather(features.image), peers.gather(features.text)), local_parts)


def gather_queue_rows(everyone: Peers, view: TeacherView, ids: Tensor) -> QueueRows:
    """All workers' rows for the queue; `ids` (B, 2) are this worker's hashes of image and caption."""
    return (everyone.gather(view.features.image), everyone.gather(view.features.text), *everyone.gather(ids).T)


def teacher_locals(model: DualEncoder, teacher: Features, grid: str, peers: Peers, all_mask: Tensor) -> LocalParts:
    """The teacher's pooled patches and its tokens without [CLS], of all rows (docs/spec/tcl.md 2.3)."""
    image = pool_patches(model.project_image(teacher.image_tokens[:, 1:]), grid)
    text = model.project_text(teacher.text_tokens[:, 1:])
    return LocalParts(peers.gather(image), peers.gather(text), all_mask[:, 1:])
