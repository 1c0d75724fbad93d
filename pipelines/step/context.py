"""What the terms of a step look at: leaves of the student's features, the teacher's view, the other workers' rows."""

import torch
from torch import Tensor

from models.batch import Batch, Context, Features, FixedDraws, Locals, identify
from models.collectives import SoloWorkers, Workers
from models.encoders import DualEncoder
from models.objectives import ScheduleState
from models.pooling import pool_patches
from pipelines.step.codebook import assign_codes, init_codes
from pipelines.step.grad_cache import encode_all
from pipelines.step.gradients import Peers, gather_leaves
from pipelines.step.state import StepSettings, TrainState, autocast

QueueRows = tuple[Tensor, Tensor, Tensor, Tensor]
"""Teacher image and text vectors of all rows with their image and caption hashes: what is enqueued."""


def build_context(
    state: TrainState,
    student: Features,
    batch: Batch,
    settings: StepSettings,
    schedule: ScheduleState,
    workers: Workers,
    fixed_draws: FixedDraws | None = None,
) -> tuple[Context, QueueRows | None]:
    """Everything the terms need; every worker makes the call, also with no rows."""
    objective = settings.objective
    everyone = Peers.meet(workers, len(batch))
    peers = everyone if objective.negatives == "global" else Peers(SoloWorkers(), [len(batch)])
    leaves = Features(*(tensor.detach().requires_grad_() for tensor in student))
    ids = torch.stack([batch.image_id, batch.caption_id], 1)
    all_ids, all_mask = peers.gather(ids), peers.gather(batch.mask)
    teacher, keys, local_parts, queue_rows, plan = None, None, None, None, None
    if state.teacher is not None:
        with torch.no_grad():
            teacher = encode_all(state.teacher, batch.view2, batch, settings).features
            if objective.weights.lmi > 0:
                with autocast(settings, ids.device):
                    local_parts = teacher_locals(state.teacher, teacher, objective.local_grid, peers, all_mask)
        keys = (peers.gather(teacher.image), peers.gather(teacher.text))
        if state.queue is not None:
            # Queues take all workers' rows, also with `negatives: local`, so that they stay equal.
            queue_rows = (*keys, *all_ids.T) if peers is everyone else _gather_queue_rows(everyone, teacher, ids)
        init_codes(state, teacher, everyone, settings, schedule)
        plan = assign_codes(state, teacher, everyone, settings, schedule)
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
        schedule=schedule,
        codes=state.model.codebook.unit() if state.model.codebook is not None else None,
        plan=plan,
        fixed_draws=fixed_draws,
    )
    return context, queue_rows


def _gather_queue_rows(everyone: Peers, teacher: Features, ids: Tensor) -> QueueRows:
    return (everyone.gather(teacher.image), everyone.gather(teacher.text), *everyone.gather(ids).T)


def teacher_locals(model: DualEncoder, teacher: Features, grid: str, peers: Peers, all_mask: Tensor) -> Locals:
    """The teacher's pooled patches and its words, of all rows (TCL spec 2.3)."""
    image = pool_patches(model.project_image(teacher.image_tokens[:, 1:]), grid)
    text = model.project_text(teacher.text_tokens[:, 1:])
    return Locals(peers.gather(image), peers.gather(text), all_mask[:, 1:])
