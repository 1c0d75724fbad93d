"""Optuna as Ray Tune's searcher; each suggestion becomes a trial with an id of the sweep's record."""

from itertools import count
from pathlib import Path
from typing import Any

from ray.tune.search.optuna import OptunaSearch

from tuning.sweep.schedulers import undecided_validation
from tuning.sweep.space import Space, tune_domains
from tuning.sweep.sweep_record import METRIC, Sweep
from tuning.sweep.sweep_record import trial_id as numbered
from tuning.sweep.trial import Task


class Suggestions(OptunaSearch):  # type: ignore[misc]  # Ray is not typed
    """Suggests the unfinished trials of an interrupted sweep, then new points.

    What Optuna learns from an earlier driver's time are the trials that ended.
    """

    def __init__(self, sweep: Sweep, space: Space) -> None:
        self._open = [trial for trial in sweep.trials if not trial.ended]
        self._undecided = {trial.trial_id: undecided_validation(trial, sweep) for trial in self._open}
        self._used = {trial.trial_id for trial in sweep.trials}
        settings = {"metric": METRIC, "mode": "max", "seed": sweep.seed + len(sweep.trials)}
        domains = self.convert_search_space(tune_domains(space))
        super().__init__(domains, points_to_evaluate=[trial.overrides for trial in self._open], **settings)
        for trial in sweep.trials:
            if trial.ended and trial.recall is not None:
                self.add_evaluated_point(trial.overrides, trial.recall)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """{"task": Task as a dict} of the next trial; None where Optuna has no point. `trial_id` is Tune's own id."""
        point = super().suggest(trial_id)
        if point is None:
            return None
        if self._open:
            trial = self._open.pop(0)
            return {"task": Task(trial.trial_id, trial.overrides, undecided=self._undecided[trial.trial_id])._asdict()}
        name = next(name for name in map(numbered, count()) if name not in self._used)
        self._used.add(name)
        return {"task": Task(name, point)._asdict()}

    def save(self, checkpoint_path: str) -> None:
        """Tune wants a file; it stays empty, for a resumed search is built from `sweep.json` alone."""
        Path(checkpoint_path).touch()
