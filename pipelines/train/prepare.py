"""Before a run: paths and name, index of the data, tokeniser, run folder; or what is there of them to go on with."""

import logging
import time
from dataclasses import dataclass
from typing import Any

from models.config import InputError
from models.encoders import resolve
from models.objectives import ScheduleState, check_codebook, coefficients
from models.package import verify_files
from models.preprocess import CaptionTokenizer, clean_caption, load_tokenizer, train_tokenizer
from pipelines import storage
from pipelines.artifacts.resolve import listed_checkpoints, local_copy, read_experiment
from pipelines.config import ExperimentConfig
from pipelines.data.epoch_plan import groups, require_groups
from pipelines.data.manifest import Manifest, build_manifest, captions_of

logger = logging.getLogger(__name__)

TOKENIZER_CAPTIONS = 200_000
"""Captions that a tokeniser is trained on."""


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
    if not coefficients(experiment.objective, ScheduleState(experiment.objective.alpha)):
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
