"""A training checkpoint's folder (docs/formats.md, contract 4): what is in it, written and read back."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.config import InputError
from models.encoders import DualEncoder
from models.package import load_tensors, load_weights, save_tensors, write_files_json
from models.preprocess import CaptionTokenizer, PreprocessorConfig
from models.redact import redact
from pipelines.config import ExperimentConfig
from pipelines.data.epoch_plan import Position
from pipelines.step.state import TrainState

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps."""
    seen: int = 0
    """Manifest positions consumed by all workers, skipped samples included."""
    position: Position = field(default_factory=Position)
    """The running epoch, and what of it is done."""
    epoch_step: int = 0
    """Optimiser steps of the running epoch."""
    epoch_good: int = 0
    """Samples of the running epoch that were trained."""
    epoch_skipped: int = 0
    """Samples of the running epoch that are in the ledger."""

    def start_epoch(self, epoch: int) -> None:
        """Turn to an epoch of which nothing is done."""
        self.position, self.epoch_step, self.epoch_good, self.epoch_skipped = Position(epoch), 0, 0, 0

    def counters(self) -> dict[str, int]:
        """All but the position, by name."""
        return {name: value for name, value in vars(self).items() if name != "position"}


@dataclass(frozen=True)
class RunFiles:
    """What a checkpoint carries besides tensors and counters."""

    experiment: ExperimentConfig
    tokenizer: CaptionTokenizer
    preprocessor: PreprocessorConfig


def write_checkpoint(
    folder: Path,
    files: RunFiles,
    state: TrainState,
    progress: Progress,
    metrics: dict[str, float],
    tables: dict[str, pa.Table],
) -> None:
    """Write everything, `files.json` last. `tables` are `skipped` and, where recorded, `ids`."""
    (folder / "config.json").write_text(files.experiment.model_dump_json(indent=1))
    (folder / "tokenizer.json").write_text(files.tokenizer.to_json())
    (folder / "preprocessor_config.json").write_text(files.preprocessor.to_json())
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (folder / "position.json").write_text(json.dumps(progress.position.to_json()))
    save_tensors(state.model.state_dict(), folder / "model.safetensors")
    if state.teacher is not None:
        save_tensors(state.teacher.state_dict(), folder / "teacher.safetensors")
    if state.queue is not None:
        save_tensors(state.queue.state_dict(), folder / "state" / "queues.safetensors")
    if state.usage is not None:
        save_tensors(state.usage.state_dict(), folder / "state" / "codebook.safetensors")
    moments, counters = _optimizer_state(state)
    save_tensors(moments, folder / "state" / "optimizer.safetensors")
    save_tensors({"torch": torch.get_rng_state()}, folder / "state" / "generators.safetensors")
    counters |= {"progress": progress.counters(), "codes_planted": state.codes_initialised}
    (folder / "state" / "counters.json").write_text(json.dumps(counters, indent=1))
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    write_files_json(folder)


def read_checkpoint(folder: Path, state: TrainState, shown_as: str) -> Progress:
    """Fill `state` from a checkpoint and say how far the run had come. Raises InputError where it does not fit."""
    load_weights(state.model, folder / "model.safetensors", shown_as)
    if state.teacher is not None:
        load_weights(state.teacher, folder / "teacher.safetensors", shown_as)
    if state.queue is not None:
        load_weights(state.queue, folder / "state" / "queues.safetensors", shown_as)
    if state.usage is not None:
        load_weights(state.usage, folder / "state" / "codebook.safetensors", shown_as)
    try:
        counters = json.loads((folder / "state" / "counters.json").read_text())
        state.codes_initialised = counters.get("codes_planted", True)
        position = Position.from_json(json.loads((folder / "position.json").read_text()))
        _restore_optimizer(state, load_tensors(folder / "state" / "optimizer.safetensors"), counters)
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise InputError(f"{shown_as}: the training state does not fit the configuration ({error})") from error
    return Progress(position=position, **counters["progress"])


def load_initial(model: DualEncoder, uri: str) -> None:
    """Start from the weights of a run, checkpoint or package: every tensor of equal name and shape is taken."""
    from pipelines.artifacts.resolve import fetch_weights

    weights = fetch_weights(uri)
    own = model.state_dict()
    taken = {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape}
    if not taken:
        raise InputError(f"init: no weight of {uri} fits this model; choose the preset it was trained with")
    model.load_state_dict(taken, strict=False)
    logger.info("init: %d of %d tensors taken from %s", len(taken), len(own), redact(uri))


def read_table(folder: Path, name: str) -> pa.Table | None:
    """A checkpoint's table (`skipped`, `ids`), if it has it."""
    path = folder / f"{name}.parquet"
    return pq.read_table(path) if path.exists() else None


def _names(state: TrainState) -> dict[int, str]:
    return {id(parameter): name for name, parameter in state.model.named_parameters()}


def _optimizer_state(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """AdamW's moments as `<moment>/<parameter>` tensors; its step counts and groups as JSON."""
    names = _names(state)
    moments, steps = {}, {}
    for parameter, entry in state.optimizer.state.items():
        name = names[id(parameter)]
        moments[f"exp_avg/{name}"], moments[f"exp_avg_sq/{name}"] = entry["exp_avg"], entry["exp_avg_sq"]
        steps[name] = float(entry["step"])
    groups = [
        {"parameters": [names[id(p)] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in state.optimizer.param_groups
    ]
    return moments, {"optimizer_steps": steps, "optimizer_groups": groups}


def _restore_optimizer(state: TrainState, moments: dict[str, Tensor], counters: dict[str, Any]) -> None:
    parameters = dict(state.model.named_parameters())
    for name, step in counters["optimizer_steps"].items():
        parameter = parameters[name]
        state.optimizer.state[parameter] = {
            "step": torch.tensor(step, device=parameter.device),  # where AdamW's fused form wants it
            "exp_avg": moments[f"exp_avg/{name}"].to(parameter.device),
            "exp_avg_sq": moments[f"exp_avg_sq/{name}"].to(parameter.device),
        }
