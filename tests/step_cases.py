"""What test_step runs on one process and on several ranks; importable by the ranks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.config import ObjectiveConfig
from models.fusion_terms import hard_negatives
from models.gather import DistributedWorkers, SoloWorkers, Workers
from models.objectives import Moment
from models.terms import contrast_parts
from pipelines.context import build_context
from pipelines.state import TrainState, equalise
from pipelines.step import training_step
from pipelines.towers import encode
from tests import tiny

ROWS = 5


@dataclass
class Trace:
    """One rank's view of consecutive steps."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    negatives: list[Tensor]
    """Per step (2, B): global indices of each row's wrong image and caption."""
    norms: list[float]
    state: dict[str, Tensor]
    """Everything that must be equal on all ranks at the end."""


def run(goal: ObjectiveConfig, shards: list[list[int]], dtype: torch.dtype, shared_seed: bool = True) -> Trace:
    """Consecutive steps, `shards[s]` saying how many rows of batch s each rank has; on one process all of them."""
    solo = not torch.distributed.is_initialized()
    workers: Workers = SoloWorkers() if solo else DistributedWorkers()
    state = tiny.state(goal, 0 if shared_seed else workers.rank, dtype)
    equalise(state, workers)
    trace = Trace([], [], [], [], {})
    for step, counts in enumerate(shards):
        rows = tiny.batch(sum(counts), step, dtype=dtype)
        if not solo:
            rows = tiny.part(rows, sum(counts[: workers.rank]), counts[workers.rank])
        trace.negatives.append(negatives(state, rows, goal, workers))
        result = training_step(state, rows, tiny.settings(goal), Moment(goal.alpha), workers)
        trace.losses.append(float(result.loss))
        trace.norms.append(float(result.gradient_norm))
        trace.gradients.append({name: p.grad.clone() for name, p in state.model.named_parameters() if p.requires_grad})
    trace.state = everything(state)
    return trace


def negatives(state: TrainState, rows: Any, goal: ObjectiveConfig, workers: Workers) -> Tensor:
    """The wrong images and captions that a step would draw, as global indices."""
    if goal.weights.itm == 0:
        return torch.zeros(2, 0, dtype=torch.int64)
    with torch.no_grad():
        student = encode(state.model, rows.view1, rows)
    context, _ = build_context(state, student, rows, tiny.settings(goal), Moment(goal.alpha), workers)
    _, match_logits = contrast_parts(goal, state.model, context)
    return torch.stack(hard_negatives(context, match_logits)[:2])


def everything(state: TrainState) -> dict[str, Tensor]:
    """Model, teacher and queue under one set of names."""
    parts = {"model": state.model, "teacher": state.teacher, "queue": state.queue, "usage": state.usage}
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in parts.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }


def gather_kinds(counts: list[int]) -> list[Tensor]:
    """Rows of each kind that workers exchange, after a gather."""
    workers = DistributedWorkers()
    mine, first = counts[workers.rank], sum(counts[: workers.rank])
    assert workers.row_counts(mine) == counts
    places = torch.arange(first, first + mine)
    kinds = [places, places.double(), places.float()[:, None].expand(-1, 3), places % 2 == 0]
    return [workers.all_gather_rows(rows, counts) for rows in kinds]
