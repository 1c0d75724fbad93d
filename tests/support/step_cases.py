"""What test_step runs on one process and on several ranks; importable by the ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.collectives import DistributedWorkers, SoloWorkers, Workers
from models.config import ObjectiveConfig
from models.fusion_losses import hard_negatives
from models.losses import contrast_parts
from models.objectives import ScheduleState
from models.preprocess import CaptionTokenizer, PreprocessorConfig, train_tokenizer
from pipelines.config import ExperimentConfig
from pipelines.step.context import build_context
from pipelines.step.grad_cache import encode
from pipelines.step.state import TrainState, equalise
from pipelines.step.training_step import training_step
from pipelines.train.checkpoint import Progress, RunFiles, read_checkpoint, write_checkpoint
from tests.support import tiny

ROWS = 5


@dataclass
class Trace:
    """One rank's view of consecutive steps."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    negatives: list[Tensor]
    """Per step (2, B): global indices of each row's wrong image and caption."""
    norms: list[float]
    metrics: list[dict[str, float]]
    state: dict[str, Tensor]
    """Everything that must be equal on all ranks at the end."""


def here() -> Workers:
    """This process's workers."""
    return DistributedWorkers() if torch.distributed.is_initialized() else SoloWorkers()


def share(rows: Any, counts: list[int], workers: Workers) -> Any:
    """This rank's part of a batch, of which each has `counts`; on one process all of it."""
    if workers.world_size == 1:
        return rows
    return tiny.part(rows, sum(counts[: workers.rank]), counts[workers.rank])


def run(
    goal: ObjectiveConfig, shards: list[list[int]], dtype: torch.dtype, shared_seed: bool = True, chunk: int = 0
) -> Trace:
    """Consecutive steps, `shards[s]` saying how many rows of batch s each rank has; on one process all of them."""
    workers = here()
    state = tiny.state(goal, 0 if shared_seed else workers.rank, dtype)
    equalise(state, workers)
    trace = Trace([], [], [], [], [], {})
    for step, counts in enumerate(shards):
        rows = share(tiny.batch(sum(counts), step, dtype=dtype), counts, workers)
        trace.negatives.append(negatives(state, rows, goal, workers))
        result = training_step(
            state, rows, tiny.settings(goal, chunk=chunk), ScheduleState(goal.alpha, measured=True), workers
        )
        trace.metrics.append({name: float(value) for name, value in result.metrics.items()})
        trace.losses.append(float(result.loss))
        trace.norms.append(float(result.gradient_norm))
        trace.gradients.append({name: p.grad.clone() for name, p in state.model.named_parameters() if p.requires_grad})
    if state.usage is not None:
        state.usage.flush(workers)
    trace.state = everything(state)
    return trace


def save(goal: ObjectiveConfig, counts: list[int], folder: str) -> None:
    """Two steps, then a checkpoint, as a run writes it."""
    workers, state = here(), tiny.state(goal)
    for step in range(2):
        rows = share(tiny.batch(sum(counts), step), counts, workers)
        training_step(state, rows, tiny.settings(goal), ScheduleState(goal.alpha, step=step), workers)
    if state.usage is not None:
        state.usage.flush(workers)
    if workers.rank == 0:
        tokenizer = CaptionTokenizer.from_json(train_tokenizer(["one two three"], 40).to_str())
        files = RunFiles(
            ExperimentConfig(objective=goal),
            tokenizer,
            PreprocessorConfig(image_size=tiny.IMAGE, max_tokens=6, max_caption_words=30),
        )
        write_checkpoint(Path(folder), files, state, Progress(step=2), {}, {})


def resume(goal: ObjectiveConfig, counts: list[int], folder: str) -> tuple[float, dict[str, Tensor]]:
    """The next step after a checkpoint on this many ranks: its loss, and everything after it."""
    workers, state = here(), tiny.state(goal, seed=9)
    assert read_checkpoint(Path(folder), state, "test").step == 2
    rows = share(tiny.batch(sum(counts), 2), counts, workers)
    result = training_step(state, rows, tiny.settings(goal), ScheduleState(goal.alpha, step=2), workers)
    if state.usage is not None:
        state.usage.flush(workers)
    return float(result.loss), everything(state)


def negatives(state: TrainState, rows: Any, goal: ObjectiveConfig, workers: Workers) -> Tensor:
    """The wrong images and captions that a step would draw, as global indices."""
    if goal.weights.itm == 0:
        return torch.zeros(2, 0, dtype=torch.int64)
    with torch.no_grad():
        student = encode(state.model, rows.view1, rows)
    context, _ = build_context(state, student, rows, tiny.settings(goal), ScheduleState(goal.alpha), workers)
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
