"""A training run from the driver's side: prepare the run folder, let Ray Train work, package and score the best."""

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from models.checkpoint import verify_files, write_files_json
from models.config import InputError
from models.encoders import resolve
from models.objectives import Moment, check_codebook, coefficients
from models.preprocess import CaptionTokenizer, clean_caption, load_tokenizer, train_tokenizer
from pipelines import cluster, storage
from pipelines.capacity import require_capacity
from pipelines.config import ExperimentConfig
from pipelines.evaluate import evaluate_package
from pipelines.lineage import commit
from pipelines.loop import Job, planned_samples, train_worker
from pipelines.manifest import Manifest, build_manifest, captions_of
from pipelines.package import (
    best_checkpoint,
    build_package,
    listed_checkpoints,
    local_copy,
    model_card,
    read_experiment,
)
from pipelines.plan import groups, require_groups
from pipelines.progress import Event, Listener, step_line, validation_line
from pipelines.tracking import EXPERIMENT, Status, Tracker, flatten

logger = logging.getLogger(__name__)

TOKENIZER_CAPTIONS = 200_000
"""Captions that a tokeniser is trained on."""


class TrainingFailed(RuntimeError):
    """A run ended without a model; one line that says why."""

    history: Sequence[Event] = ()
    """The run's events in this process, in order."""


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


def fit(experiment: ExperimentConfig, resume: bool = False) -> FitResult:
    """Train, or go on training; returns when the package is written and scored.

    Raises InputError for whatever the user can mend before anything is trained, TrainingFailed after.
    """
    experiment = named(experiment)
    run = storage.join(experiment.out, experiment.name)
    logger.info("reading %s", experiment.train_data)
    prepared = prepare(experiment, run, resume)
    experiment = prepared.experiment
    cluster.connect()
    compute = experiment.compute
    require_capacity(compute.workers, compute.cpus_per_worker, float(compute.gpus), compute.cpus_per_data_task)
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


def named(experiment: ExperimentConfig) -> ExperimentConfig:
    """The experiment with absolute paths and a name; raises InputError for a path that is not given."""
    for name in ("train_data", "val_data", "out"):
        if not getattr(experiment, name):
            raise InputError(f"--{name.replace('_', '-')} is missing: a folder or URL")
    name = experiment.name or f"{experiment.preset}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    if "/" in name or name.startswith("."):
        raise InputError(f"--name {name!r}: a name without / that does not begin with a dot")
    paths = {key: storage.make_absolute(getattr(experiment, key)) for key in ("train_data", "val_data", "out")}
    if experiment.init:
        paths["init"] = storage.make_absolute(experiment.init)
    return experiment.model_copy(update=paths | {"name": name})


@dataclass(frozen=True)
class Prepared:
    """A run folder ready to train in."""

    experiment: ExperimentConfig
    manifest: Manifest
    validation: Manifest
    tokenizer_json: str

    def job(self) -> dict[str, Any]:
        """The job's fields that do not depend on Ray."""
        return {
            "experiment": self.experiment,
            "manifest": self.manifest,
            "validation": self.validation,
            "tokenizer_json": self.tokenizer_json,
            "initial_weights": self.experiment.init,
        }


def prepare(experiment: ExperimentConfig, run: str, resume: bool) -> Prepared:
    """Index the data, find or train the tokeniser, write the run folder; or read it back to go on."""
    config, manifest_file = storage.join(run, "config.json"), storage.join(run, "manifest.parquet")
    tokenizer_file = storage.join(run, "tokenizer.json")
    exists = storage.exists(config)
    if exists and not resume:
        raise InputError(f"{run}: a run of that name exists; choose another --name, or go on with it by --resume")
    if resume and not exists:
        raise InputError(f"{run}: no run to resume; check --out and --name")
    if not coefficients(experiment.objective, Moment(experiment.objective.alpha)):
        raise InputError("objective.weights: every weight is 0, so nothing would be learnt; give a term a weight")
    for note in check_codebook(experiment.objective, experiment.optim.batch_size):
        logger.warning(note)
    validation = build_manifest(experiment.val_data, experiment.pairs)
    if resume:
        stored = read_experiment(config)
        _require_same_model(experiment, stored)
        experiment = experiment.model_copy(update={"encoder": stored.encoder})
        manifest, tokenizer = Manifest.load(manifest_file), storage.read_bytes(tokenizer_file).decode()
        _check_latest(run)
    else:
        manifest = build_manifest(experiment.train_data, experiment.pairs)
        tokenizer, experiment = _tokenizer(experiment, manifest)
    require_groups(groups(manifest.units, experiment.seed, 0), experiment.compute.workers)
    if not resume:
        manifest.save(manifest_file)
        storage.write_bytes(tokenizer_file, tokenizer.encode())
    storage.write_bytes(config, experiment.model_dump_json(indent=1).encode())
    return Prepared(experiment, manifest, validation, tokenizer)


def _tokenizer(experiment: ExperimentConfig, manifest: Manifest) -> tuple[str, ExperimentConfig]:
    """The tokeniser's JSON, and the experiment with its vocabulary and every backbone resolved."""
    text = experiment.encoder.text
    source = text.tokenizer or text.backbone
    if source:
        tokenizer = load_tokenizer(source)
    else:
        words = experiment.pairs.max_caption_words
        captions = (clean_caption(c, words) for c in captions_of(manifest, experiment.pairs, TOKENIZER_CAPTIONS))
        tokenizer = CaptionTokenizer.from_json(train_tokenizer(captions, text.vocab_size).to_str())
    if experiment.objective.weights.mlm > 0 and tokenizer.mask_id < 0:
        raise InputError(f"encoder.text.tokenizer: {source} has no mask token; use another, or objective.weights.mlm 0")
    vocab_size = max(tokenizer.vocab_size, text.vocab_size) if text.backbone else tokenizer.vocab_size
    encoder = resolve(experiment.encoder, vocab_size)
    rows = encoder.text.architecture["vocab_size"]
    if tokenizer.vocab_size > rows:
        raise InputError(f"encoder.text.tokenizer: {tokenizer.vocab_size} words, but the text tower has {rows}")
    return tokenizer.to_json(), experiment.model_copy(update={"encoder": encoder})


def _require_same_model(asked: ExperimentConfig, stored: ExperimentConfig) -> None:
    """A run goes on with the model and objective it began with."""
    for name in ("preset", "seed", "train_data"):
        if getattr(asked, name) != getattr(stored, name):
            raise InputError(
                f"--resume: {name} is {getattr(asked, name)!r}, but the run began with {getattr(stored, name)!r}"
            )
    if asked.objective != stored.objective:
        raise InputError("--resume: the objective differs from the one the run began with; give the same flags")


def _check_latest(run: str) -> None:
    """Raises InputError where the checkpoint to go on from is damaged, before workers are started."""
    checkpoints = listed_checkpoints(run)
    if checkpoints:
        with local_copy(checkpoints[-1].uri) as folder:
            verify_files(folder, checkpoints[-1].uri)


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
    """Run the workers to the end of the plan; raises TrainingFailed."""
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
                checkpoint_score_attribute="val/recall_at_1_mean",
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
        raise TrainingFailed(outcome["stopped"])


def _why(error: TrainingFailedError) -> str:
    """One line out of a failed run's traceback."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, InputError):
            return str(cause)
    texts = [str(failure).strip().splitlines()[-1] for failure in failures.values() if str(failure).strip()]
    reason = texts[0] if texts else str(error).strip().splitlines()[-1]
    return f"a worker failed more than compute.max_failures times: {reason}; go on with --resume"


def finish_run(experiment: ExperimentConfig, run: str, tracker: Tracker | None) -> dict[str, float]:
    """Package the best checkpoint, score the package on all validation data, leave both in run folder and MLflow."""
    best = best_checkpoint(run)
    logger.info("packaging %s and scoring it on %s", best.uri.rsplit("/", 1)[-1], experiment.val_data)
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
