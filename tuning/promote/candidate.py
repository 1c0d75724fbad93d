"""Which model a promotion is about: a run that finished, or the best finished trial of a sweep."""

from typing import NamedTuple

from models.config import InputError
from models.package import FILES
from pipelines import storage
from pipelines.artifacts.resolve import read_experiment
from pipelines.config import ExperimentConfig
from pipelines.data.manifest import Manifest
from pipelines.tracking.registry import Registry
from pipelines.train.alarms import COLLAPSE
from tuning.sweep.sweep_record import FILE_NAME, Sweep, Trial, best_over_seeds


class Candidate(NamedTuple):
    """A finished run with a package."""

    run: str
    """Its folder."""
    trial: str
    """Its id in a sweep; "" of a run of its own."""
    experiment: ExperimentConfig
    measured: dict[str, float]
    """Scores of the package on the run's own validation data, from `metrics.json`."""
    manifest: str
    """Hash of the training data's manifest."""
    run_id: str
    """Its id in MLflow; "" where the registry's server does not know it."""
    commit: str
    """Commit of the code it was trained with; `unknown` where MLflow does not know it."""

    @property
    def package(self) -> str:
        """URI of its encoder package."""
        return storage.join(self.run, "package")


def read_candidate(model: str, registry: Registry) -> Candidate:
    """The run of a RUN or SWEEP folder; raises InputError unless it finished and left a package with its metrics."""
    run = storage.make_absolute(model.rstrip("/"))
    trial = _trial_of(run)
    if storage.exists(storage.join(run, FILE_NAME)):
        trial = best_trial(run)
        run = storage.join(run, trial.run_folder)
    for file in ("config.json", "manifest.parquet"):
        if not storage.exists(storage.join(run, file)):
            raise InputError(f"{run}: neither a run folder nor a sweep folder, {file} is not there")
    run_id = trial.mlflow_run_id if trial else _tracked_as(run)
    tracked = registry.run(run_id) if run_id else None
    if tracked and tracked.status != "FINISHED":
        raise InputError(f"{run}: the run did not finish, MLflow has it as {tracked.status}; go on with --resume")
    if not storage.exists(storage.join(run, "metrics.json")) or not storage.exists(storage.join(run, "package", FILES)):
        raise InputError(f"{run}: the run left no package with metrics, so it did not finish; go on with --resume")
    return Candidate(
        run,
        trial.trial_id if trial else "",
        read_experiment(storage.join(run, "config.json")),
        storage.read_json(storage.join(run, "metrics.json")),
        Manifest.load(storage.join(run, "manifest.parquet")).hash,
        run_id if tracked else "",
        tracked.tags.get("triptych.commit", "unknown") if tracked else "unknown",
    )


def best_trial(folder: str) -> Trial:
    """The finished trial of a sweep with the highest mean recall@1, of finalists the mean over their seeds.

    A trial with an alarm of a collapsed codebook is never chosen: it agrees with itself because few codes are in use.
    Raises InputError where there is none.
    """
    trials = Sweep.load(folder).trials
    sound = [trial for trial in trials if not any(COLLAPSE in text for text in trial.own_alarms)]
    best = best_over_seeds(sound)
    if best is None:
        finished = sum(trial.status == "finished" and trial.recall is not None for trial in trials)
        why = f"{finished} finished, but with a collapsed codebook" if finished else "none finished with a recall"
        raise InputError(f"{folder}: no trial to promote; of {len(trials)} {why}")
    return best


def _trial_of(run: str) -> Trial | None:
    """The trial whose run folder this is, else None; its id in MLflow is in the sweep's record, not in the folder."""
    sweep, _, trial_id = run.rpartition("/trials/")
    if not sweep or not storage.exists(storage.join(sweep, FILE_NAME)):
        return None
    return next((trial for trial in Sweep.load(sweep).trials if trial.trial_id == trial_id), None)


def _tracked_as(run: str) -> str:
    """Id of the run in MLflow, "" where it was not tracked."""
    record = storage.join(run, "mlflow.json")
    return str(storage.read_json(record).get("run_id", "")) if storage.exists(record) else ""
