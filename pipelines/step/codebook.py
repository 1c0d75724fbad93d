"""What a training step does with the codebook beside its loss: first codes, assignment, counts, metrics, repair."""

import torch
from torch import Tensor

from models.assignment import Problem, build_problem, code_mass, queue_entries, solve
from models.batch import Context, Features
from models.codebook import badly_covered, rows_from_features
from models.codebook_metrics import code_metrics, embedding_metrics, mass_metrics, target_metrics
from models.config import CodebookConfig
from models.losses import block_bytes
from models.objectives import ScheduleState, assigns
from models.sample_rng import hash64
from models.transport import TransportPlan
from pipelines.step.gradients import Peers
from pipelines.step.state import StepSettings, TrainState


def init_codes(
    state: TrainState, teacher: Features, everyone: Peers, settings: StepSettings, schedule: ScheduleState
) -> None:
    """Set the codes to teacher features, once there are enough of them (docs/spec/codebook.md 4, queue_sample)."""
    if state.codes_initialised or state.model.codebook is None:
        return
    config, queue = settings.objective.codebook, state.queue
    samples = torch.stack([everyone.gather(teacher.image), everyone.gather(teacher.text)])
    entries = queue_entries(config, samples.shape[1], len(queue.image)) if queue is not None else 0
    if queue is not None and entries:
        older, written = queue.newest(entries)
        samples = torch.cat([samples, older[:, : int(written.sum())].to(samples.dtype)], 1)
    if samples.shape[1] >= config.size:
        rows = rows_from_features(samples, config.size, config.dead.noise, _generator(settings.seed, schedule.step))
        place_codes(state, torch.arange(config.size), rows)
        state.codes_initialised = True


def assign_codes(
    state: TrainState, teacher: Features, everyone: Peers, settings: StepSettings, schedule: ScheduleState
) -> TransportPlan | None:
    """The step's assignment of samples to codes, shared by all workers; None where no term needs it."""
    codebook, objective = state.model.codebook, settings.objective
    if codebook is None or not assigns(objective) or schedule.ramp == 0:
        return None
    problem = _problem(state, teacher, everyone, settings)
    return solve(objective.codebook, problem, codebook.unit())


def _problem(state: TrainState, teacher: Features, everyone: Peers, settings: StepSettings) -> Problem:
    both = torch.stack([teacher.image, teacher.text])
    return build_problem(settings.objective.codebook, both, state.queue, everyone.counts, everyone.workers)


@torch.no_grad()
def count_usage(state: TrainState, context: Context) -> None:
    """Count which code is nearest to each student feature."""
    if state.usage is not None and context.codes is not None:
        state.usage.count(context.student.image @ context.codes.T, context.student.text @ context.codes.T)


@torch.no_grad()
def measure(state: TrainState, context: Context, everyone: Peers, settings: StepSettings) -> dict[str, Tensor]:
    """A step's own metrics of embeddings, codes and targets (docs/spec/codebook.md 5), over all workers' rows."""
    codes, teacher, config = context.codes, context.teacher, settings.objective.codebook
    if codes is None:
        return {}
    metrics = code_metrics(codes)
    if teacher is None:
        return metrics
    views = [everyone.gather(t) for t in (context.student.image, context.student.text, teacher.image, teacher.text)]
    metrics |= embedding_metrics(*views)
    if context.plan is not None:
        limit = block_bytes(settings.objective)
        metrics |= _target_metrics(views, codes, context.plan, config, limit)
        mass = code_mass(_problem(state, teacher, everyone, settings), context.plan, codes, limit)
        metrics |= mass_metrics(mass, context.plan.potentials, 1 / context.plan.sharpness)
    return metrics


def _target_metrics(
    views: list[Tensor], codes: Tensor, plan: TransportPlan, config: CodebookConfig, limit: int
) -> dict[str, Tensor]:
    """`target_metrics` of all rows, a block of at most `limit` bytes of scores at a time."""
    rows, size = len(views[0]), max(1, limit // (8 * len(codes) * codes.element_size()))
    totals: dict[str, Tensor] = {}
    for start in range(0, rows, size):
        image, text, *taught = (view[start : start + size] @ codes.T for view in views)
        targets = plan.targets(torch.stack(taught))
        part = target_metrics((image, text), (targets[0], targets[1]), config.tau, config.beta_same)
        for name, value in part.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value * len(image) / rows
    return totals


@torch.no_grad()
def repair_dead_codes(state: TrainState, settings: StepSettings, step: int) -> int:
    """Move dead codes, the emptiest first, to badly covered features of the queue (docs/spec/codebook.md 4.1).

    Every worker does the same from its equal queue and a generator seeded by run and step, without exchange. Returns
    how many were moved.
    """
    codebook, usage, queue, config = state.model.codebook, state.usage, state.queue, settings.objective.codebook
    if codebook is None or usage is None or queue is None:
        return 0
    dead = usage.dead(config.dead.min_rel_hits).nonzero()[:, 0]
    emptiest = usage.last_hits.sum(0)[dead].argsort(stable=True)
    dead = dead[emptiest[: int(config.dead.max_frac * config.size)]]
    features, written = queue.newest(len(queue.image))
    features = features[:, : int(written.sum())].flatten(0, 1)
    if len(dead) == 0 or len(features) < len(dead):
        return 0
    rows = badly_covered(features, codebook.unit(), len(dead), config.dead.noise, _generator(settings.seed, step))
    place_codes(state, dead, rows)
    usage.forget(dead)
    return len(dead)


@torch.no_grad()
def place_codes(state: TrainState, places: Tensor, rows: Tensor) -> None:
    """Set the codes of rows `places`, and clear the optimiser's averages of the old ones."""
    assert state.model.codebook is not None
    weight = state.model.codebook.weight
    places = places.to(weight.device)
    weight[places] = rows.to(weight.dtype)
    for moments in ("exp_avg", "exp_avg_sq"):
        remembered = state.optimizer.state.get(weight, {}).get(moments)
        if remembered is not None:
            remembered[places] = 0


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash64("codes", seed, step) % 2**63)
