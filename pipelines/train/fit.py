"""A training run from the driver's side: prepare the run folder, let Ray Train work, package and score the best."""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from models.config import Failed, InputError
from models.package import write_files_json
from models.redact import redact
from pipelines import storage
from pipelines.artifacts.resolve import best_checkpoint, build_package, listed_checkpoints, local_copy, model_card
from pipelines.cluster import connect
from pipelines.cluster.capacity import require_capacity
from pipelines.config import ExperimentConfig
from pipelines.evaluation.evaluate import evaluate_package
from pipelines.lineage import commit
from pipelines.recall import MEAN_RECALL
from pipelines.tracking.run import EXPERIMENT, Status, Tracker, flatten
from pipelines.train.events import Event, Listener, step_line, validation_line
from pipelines.train.prepare import Prepared, named, prepare
from pipelines.train.worker import Job, planned_samples, train_worker

logger = logging.getLogger(__name__)


class TrainingFailed(Failed):
    """A run ended without a model; one line that says why."""

    history: Sequence[Event] = ()
    """The run's events in this process, in order."""

    def __init__(self, reason: str, alarm: str = "") -> None:
        """`alarm` is the key of the alarm that ended it; empty where something else did."""
        super().__init__(reason)
        self.alarm = alarm


class TrainingLeft(RuntimeError):
    """A run that is followed was told to leave at a hold: its last checkpoint is there to go on from."""


@dataclass(frozen=True)
class Following:
    """How a sweep follows a run, which then writes neither log nor MLflow."""

    mailbox: Any
    """The Mailbox that takes the run's events; at a hold the run waits there for an answer."""
    holds: tuple[int, ...] = ()
    """Samples seen after which, once validated, the run asks whether to go on."""
    fatal: tuple[str, ...] = ()
    """Keys of which an alarm ends the run, besides whatever has level stop."""

    def job(self, prepared: Prepared) -> Job:
        """The workers' job."""
        return Job(mailbox=self.mailbox, holds=self.holds, fatal=self.fatal, **prepared.job())


@dataclass
class FitResult:
    """What a finished run left."""

    run_folder: str
    metrics: dict[str, float]
    """Scores of the packaged model on the validation data, flat names with `val/`."""
    history: list[Event] = field(default_factory=list)
    """Step and validation events of this process, in order."""
    mlflow_run_id: str = ""

    @property
    def alarms(self) -> list[str]:
        """What the codebook's alarms said, healthy ranges left aside."""
        return [event["text"] for event in self.history if event["kind"] == "alarm" and event["level"] != "range"]


def fit(experiment: ExperimentConfig, resume: bool = False, following: Following | None = None) -> FitResult:
    """Train, or go on training; returns when the package is written and scored.

    Raises InputError for whatever the user can mend before anything is trained, TrainingFailed after, and TrainingLeft
    where `following` told the run to leave.
    """
    experiment = named(experiment)
    run = storage.join(experiment.out, experiment.name)
    logger.info("reading %s", redact(experiment.train_data))
    prepared = prepare(experiment, run, resume)
    experiment = prepared.experiment
    connect.connect()
    compute = experiment.compute
    require_capacity(compute.workers, compute.cpus_per_worker, float(compute.gpus), compute.cpus_per_data_task)
    if following:
        _train(following.job(prepared), run)
        return FitResult(run, finish_run(experiment, run, None))
    tracker = _start_tracking(experiment, run, prepared, resume)
    history: list[Event] = []
    listener = Listener(lambda event: _handle(event, tracker, history))
    status: Status = "FAILED"
    try:
        _train(Job(mailbox=listener.mailbox, **prepared.job()), run)
        listener.close()
        metrics = finish_run(experiment, run, tracker)
        status = "FINISHED"
        return FitResult(run, metrics, history, tracker.run_id)
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except TrainingFailed as error:
        listener.close()
        error.history = history
        raise
    finally:
        listener.close()
        tracker.finish(status)


def _start_tracking(experiment: ExperimentConfig, run: str, prepared: Prepared, resume: bool) -> Tracker:
    """The run in MLflow: created once, continued by `--resume` (its id is kept in the run folder)."""
    record = storage.join(run, "mlflow.json")
    run_id = json.loads(storage.read_bytes(record))["run_id"] if resume and storage.exists(record) else None
    tags = {
        "triptych.commit": commit(),
        "triptych.preset": experiment.preset,
        "triptych.manifest": prepared.manifest.hash,
        "triptych.run_folder": run,
    }
    tracker = Tracker.start(
        None, EXPERIMENT, experiment.name, flatten(experiment.model_dump(mode="json")), tags, run_id
    )
    storage.write_bytes(record, json.dumps({"run_id": tracker.run_id}).encode())
    return tracker


def _handle(event: Event, tracker: Tracker, history: list[Event]) -> None:
    """Print, remember and track one event."""
    history.append(event)
    if event["kind"] == "alarm":
        logger.warning("step %d  %s", event["step"], event["text"])
        return
    if event["kind"] == "validation":
        logger.info(validation_line(event))
    else:
        logger.info(step_line(event))
    tracker.log(event["metrics"] | {"samples_seen": event["samples"]}, event["step"])


def _train(job: Job, run: str) -> None:
    """Run the workers to the end of the plan; raises TrainingFailed or TrainingLeft."""
    experiment = job.experiment
    compute, planned = experiment.compute, planned_samples(experiment, job.manifest.count)
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": 1.0} if compute.gpus else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(num_workers=compute.workers, use_gpu=compute.gpus, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if compute.gpus else "gloo", timeout_s=600),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=run,
            failure_config=FailureConfig(max_failures=compute.max_failures, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(
                num_to_keep=experiment.checkpoints.keep,
                checkpoint_score_attribute=MEAN_RECALL,
                checkpoint_score_order="max",
            ),
            logging_config=LoggingConfig("ERROR"),
        ),
    )
    logger.info("training %s on %d workers: %s samples planned", experiment.name, compute.workers, f"{planned:,}")
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingFailed(_why(error)) from error
    except ray.exceptions.RayError as error:
        raise TrainingFailed(f"Ray lost the run ({type(error).__name__}); go on with --resume") from error
    outcome = result.return_value or {}
    if "stopped" in outcome:
        raise TrainingFailed(outcome["stopped"], outcome["alarm"])
    if "left" in outcome:
        raise TrainingLeft(f"left after {outcome['left']:,} samples")


def _why(error: TrainingFailedError) -> str:
    """One line out of a failed run's traceback; not every failure is a worker's (`ControllerError` of Ray Train)."""
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return f"Ray Train gave the run up: {str(error).strip().splitlines()[-1]}; go on with --resume"
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, InputError):
            return str(cause)
    texts = [str(failure).strip().splitlines()[-1] for failure in failures.values() if str(failure).strip()]
    reason = texts[0] if texts else str(error).strip().splitlines()[-1]
    return redact(f"a worker failed more than compute.max_failures times: {reason}; go on with --resume")


def finish_run(experiment: ExperimentConfig, run: str, tracker: Tracker | None) -> dict[str, float]:
    """Package the best checkpoint, score the package on all validation data, leave both in run folder and MLflow."""
    best = best_checkpoint(run)
    logger.info("packaging %s and scoring it on %s", best.uri.rsplit("/", 1)[-1], redact(experiment.val_data))
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package"
        with local_copy(best.uri) as checkpoint:
            space = build_package(checkpoint, package, experiment.name)
            storage.write_bytes(storage.join(run, "skipped.parquet"), (latest_file(run, "skipped.parquet", checkpoint)))
        scores = evaluate_package(str(package), experiment.val_data, experiment)
        metrics = {f"val/{name}": value for name, value in scores.items()}
        text = json.dumps(metrics, indent=1)
        (package / "metrics.json").write_text(text)
        model_card(package, experiment, metrics, space)
        write_files_json(package)
        storage.upload(str(package), storage.join(run, "package"))
        storage.write_bytes(storage.join(run, "metrics.json"), text.encode())
        if tracker is not None:
            tracker.log(metrics, int(listed_checkpoints(run)[-1].metrics["step"]))
            tracker.log_artifacts(str(package), "package")
    return metrics


def latest_file(run: str, name: str, otherwise: Path) -> bytes:
    """A file of the run's latest checkpoint, which knows the whole run; of `otherwise` where that has none."""
    latest = storage.join(listed_checkpoints(run)[-1].uri, name)
    return storage.read_bytes(latest) if storage.exists(latest) else (otherwise / name).read_bytes()
