"""Learning rate, alpha and the codebook's ramp as functions of how far a run has come."""

import math

from models.config import ObjectiveConfig
from models.objectives import ScheduleState
from pipelines.config import OptimConfig

TCL_WARMUP_ITERATIONS = 100
"""The reference's "warm-up epoch" is so many iterations, inside the first epoch only (docs/spec/tcl.md 5)."""


def cosine_rate(optim: OptimConfig, progress: float) -> float:
    """Rate at `progress` (samples seen over planned): linear warm-up, then half a cosine down to the last rate."""
    if progress < optim.warmup:
        return optim.learning_rate * progress / optim.warmup
    share = min((progress - optim.warmup) / (1 - optim.warmup), 1.0)
    return (
        optim.min_learning_rate + (optim.learning_rate - optim.min_learning_rate) * (1 + math.cos(math.pi * share)) / 2
    )


def tcl_rate(optim: OptimConfig, epoch: int, iteration: int, epochs: float) -> float:
    """The reference's rate of iteration `iteration` of epoch `epoch`, both from 0 (docs/spec/tcl.md 5).

    Epoch 0 climbs a step each 100 iterations (the step after iteration 100 k is used from 100 k + 1 on); later epochs
    each have one value of the cosine.
    """
    base, start, steps = optim.learning_rate, optim.warmup_learning_rate, optim.warmup_epochs
    if epoch == 0:
        done = max(iteration - 1, 0) // TCL_WARMUP_ITERATIONS
        return base if done >= steps and (steps or iteration) else start + done * (base - start) / max(steps, 1)
    cosine = (1 + math.cos(math.pi * epoch / epochs)) / 2
    return optim.min_learning_rate + (base - optim.min_learning_rate) * cosine


def ramped_alpha(alpha: float, ramp_epochs: float, epochs_seen: float) -> float:
    """alpha, rising linearly from 0 over the first `ramp_epochs` epochs (docs/spec/tcl.md 2.6)."""
    return alpha * min(1.0, epochs_seen / ramp_epochs) if ramp_epochs > 0 else alpha


def schedule_state_at(
    objective: ObjectiveConfig, progress: float, epochs_seen: float, step: int, measured: bool
) -> ScheduleState:
    """The schedules at `progress` (samples seen over planned); the codebook's ramp: docs/spec/codebook.md 2.6."""
    codebook = objective.codebook
    after = progress - codebook.start
    ramp = min(max(after / codebook.ramp, 0.0), 1.0) if codebook.ramp > 0 else float(after >= 0)
    return ScheduleState(
        alpha=ramped_alpha(objective.alpha, objective.alpha_ramp_epochs, epochs_seen),
        ramp=ramp,
        frozen=progress < codebook.freeze,
        measured=measured,
        step=step,
    )
