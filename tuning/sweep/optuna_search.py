"""Optuna as Ray Tune's searcher: each suggestion is a trial with an id of ours."""

from itertools import count
from pathlib import Path
from typing import Any

from ray.tune.search.optuna import OptunaSearch

from tuning.sweep.schedulers import last_report
from tuning.sweep.space import Space, tune_domains
from tuning.sweep.sweep_record import METRIC, Sweep
from tuning.sweep.trial import Task


class Suggestions(OptunaSearch):  # type: ignore[misc]  # Ray is not typed
    """Unfinished trials of an earlier driver first, then what Optuna makes of those that ended."""

    def __init__(self, sweep: Sweep, space: Space) -> None:
        self._open = [trial for trial in sweep.trials if not trial.ended]
        self._reports = {trial.trial_id: last_report(trial, sweep) for trial in self._open}
        self._used = {trial.trial_id for trial in sweep.trials}
        settings = {"metric": METRIC, "mode": "max", "seed": sweep.seed + len(sweep.trials)}
        domains = self.convert_search_space(tune_domains(space))
        super().__init__(domains, points_to_evaluate=[trial.overrides for trial in self._open], **settings)
        for trial in sweep.trials:
            if trial.ended and trial.recall is not None:
                self.add_evaluated_point(trial.overrides, trial.recall)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The task of the next trial."""
        point = super().suggest(trial_id)
        if point is None:
            return None
        if self._open:
            trial = self._open.pop(0)
            return {"task": Task(trial.trial_id, trial.overrides, report=self._reports[trial.trial_id])._asdict()}
        name = next(name for number in count() if (name := f"t{number:02d}") not in self._used)
        self._used.add(name)
        return {"task": Task(name, point)._asdict()}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record has it all."""
        Path(checkpoint_path).touch()
