"""Ray Tune's callbacks about its trials, handed on to the sweep's recorder."""

from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError, RayError

from tuning.sweep.recorder import Recorder
from tuning.sweep.sweep_record import METRIC


class TuneEvents(tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """Start, end and loss of trials as Ray Tune sees them; what a trial reports itself comes through its mailbox."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __reduce__(self) -> Any:
        """Pickled as a plain callback: Tune pickles its settings, and a recorder holds threads and locks."""
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process has started."""
        task = trial.config["task"]
        self._recorder.add_trial(task["trial_id"], task["overrides"])
        self._recorder.trial_started(task["trial_id"], task["seed"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself, or its scheduler stopped it at a pause point."""
        task, result = trial.config["task"], trial.last_result
        # Only the last result of a trial that ended by itself has a status (TrialRun._end), and it is recorded already.
        if "status" not in result and task["seed"] is None:
            reason = f"stopped by {self._recorder.sweep.scheduler} at {result['samples_seen']:,} samples"
            self._recorder.trial_stopped(task["trial_id"], f"{reason}: recall {result[METRIC]:.3f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; raises TrainingFailed where most have."""
        task = trial.config["task"]
        self._recorder.trial_failed(task["trial_id"], _why(trial), task["seed"])
        if task["seed"] is None:
            self._recorder.raise_if_most_failed()


def _why(trial: Any) -> str:
    """The reason of a failed trial, for one that could not report it: the exception's last line, or a lost process."""
    file = trial.pickled_error_file
    error = cloudpickle.loads(Path(file).read_bytes()) if file else None
    lost = isinstance(error, RayActorError) and not getattr(error, "actor_init_failed", False)
    if isinstance(error, RayError) and not lost:
        return str(error).strip().splitlines()[-1]
    return "its process was lost; perhaps the machine's memory is too small"
