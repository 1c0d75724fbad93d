"""Ray Tune's news of its trials, for the record."""

from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError, RayError

from tuning.sweep.recorder import Recorder
from tuning.sweep.sweep_record import METRIC


class Follow(tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """What Tune itself knows of trials: when they start, when the scheduler ends one, when one's process is lost."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __reduce__(self) -> Any:
        """Tune pickles its settings, which nobody reads here."""
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A process is there."""
        task = trial.config["task"]
        self._recorder.add(task["trial_id"], task["overrides"])
        self._recorder.started(task["trial_id"], task["seed"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself, or was stopped at a hold."""
        task, result = trial.config["task"], trial.last_result
        if "status" not in result and task["seed"] is None:
            reason = f"stopped by {self._recorder.sweep.scheduler} at {result['samples_seen']:,} samples"
            self._recorder.stopped(task["trial_id"], f"{reason}: recall {result[METRIC]:.3f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; raises TrainingFailed where most have."""
        task = trial.config["task"]
        self._recorder.failed(task["trial_id"], _why(trial), task["seed"])
        if task["seed"] is None:
            self._recorder.require_hope()


def _why(trial: Any) -> str:
    """What Tune knows of a trial that failed, for one that could not say it itself: what was raised, or a loss."""
    file = trial.pickled_error_file
    error = cloudpickle.loads(Path(file).read_bytes()) if file else None
    lost = isinstance(error, RayActorError) and not getattr(error, "actor_init_failed", False)
    if isinstance(error, RayError) and not lost:
        return str(error).strip().splitlines()[-1]
    return "its process was lost; perhaps the machine's memory is too small"
