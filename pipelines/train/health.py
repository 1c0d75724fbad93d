"""Whether training goes well: codebook usage, alarms, numbers that are not finite."""

import math
from collections.abc import Mapping

import torch

from models.collectives import Workers
from pipelines.step.codebook import repair_dead_codes
from pipelines.step.state import StepSettings, TrainState
from pipelines.train.alarms import Alarm, Alarms

REPAIR_UNTIL = 0.9
"""Dead codes are left alone in the last tenth of a run (docs/spec/codebook.md 4.1)."""


class TrainingStopped(RuntimeError):
    """Training cannot go on, and trying again would not help: one line that says why."""

    def __init__(self, reason: str, alarm: str = "") -> None:
        """`alarm` is the key of the alarm that ended it; empty where something else did."""
        super().__init__(reason)
        self.alarm = alarm


class Watch:
    """Looks at a run at every report; all workers see the same and decide alike."""

    def __init__(self, state: TrainState, settings: StepSettings, workers: Workers, width: int) -> None:
        self._state, self._settings, self._workers = state, settings, workers
        self._alarms = Alarms(settings.objective, width)

    def usage(self, step: int, progress: float) -> dict[str, float]:
        """Share what the workers counted; usage metrics; repair of dead codes after each full window."""
        usage, dead = self._state.usage, self._settings.objective.codebook.dead
        if usage is None:
            return {}
        closed = usage.flush(self._workers)
        values = usage.metrics()
        if closed and dead.enabled:
            repaired = repair_dead_codes(self._state, self._settings, step) if progress < REPAIR_UNTIL else 0
            values["codebook/repaired"] = float(repaired)
        return values

    def alarms(self, values: Mapping[str, float], step: int, progress: float) -> list[Alarm]:
        """What left its healthy range since the last report."""
        usage = self._state.usage
        if usage is None:
            return []
        return self._alarms.check(values, step, progress, usage.full)

    def require_finite(self, values: Mapping[str, float], bad_steps: list[int], step: int) -> None:
        """Raises TrainingStopped, with the first worker and step, where a loss, gradient or code is not a number."""
        watched = {n: v for n, v in values.items() if n.startswith(("train/loss/", "train/gradient_norm", "grad/"))}
        bad = [name for name, value in watched.items() if not math.isfinite(value)]
        if not bad:
            return
        mine = torch.tensor([bad_steps[0] if bad_steps else step + 1], device=self._state.model.temperature.device)
        firsts = self._workers.all_gather_rows(mine, [1] * self._workers.world_size).tolist()
        first, rank = min((first, rank) for rank, first in enumerate(firsts))
        names = ", ".join(n.removeprefix("train/loss/") for n in bad if n.startswith("train/loss/")) or "the gradient"
        where = f" (first in step {first} on worker {rank})" if first <= step else ""
        known = {n: v for n, v in values.items() if n.startswith("codebook/") and math.isfinite(v)}
        codes = "".join(f", {n} {known[n]:.3g}" for n in ("codebook/ppl_v", "codebook/g_range") if n in known)
        raise TrainingStopped(
            f"step {step}: {names} is not finite{where}{codes}; lower optim.learning_rate or set optim.clip_norm"
        )
