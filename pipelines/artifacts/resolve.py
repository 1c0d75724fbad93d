"""From whatever a user calls a model (run folder, checkpoint, package, registered version) to a local package.

Torch is imported where weights are: processes that only look where a model is start seconds sooner.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.config import PACKAGE_FORMAT, InputError
from models.redact import redact
from pipelines import storage
from pipelines.config import ExperimentConfig
from pipelines.recall import mean_recall
from pipelines.tracking.registry import SPACE, Registry, Version

if TYPE_CHECKING:
    from torch import Tensor

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of a run's checkpoints; a folder that it does not name is not trusted."""
_REGISTERED = "models:/"
_ARTIFACTS = "mlflow-artifacts:"
"""What a tracking server calls files that only it can read."""


class Listed(NamedTuple):
    """A checkpoint that its run lists."""

    uri: str
    metrics: dict[str, float]

    @property
    def recall(self) -> float | None:
        """What "best" means: the mean of first-stage recall@1 both ways; None where it was not measured."""
        return mean_recall(self.metrics)


def listed_checkpoints(run: str) -> list[Listed]:
    """The checkpoints of a run folder, the latest last; empty where there is none yet."""
    snapshot = storage.join(run, "checkpoints", SNAPSHOT)
    if not storage.exists(snapshot):
        return []
    try:
        state = json.loads(storage.read_bytes(snapshot))
        entries = {e["checkpoint_dir_name"]: e["metrics"] for e in state["checkpoint_results"]}
        latest = state.get("latest_checkpoint_result")
        if latest:
            entries.pop(latest["checkpoint_dir_name"], None)
            entries[latest["checkpoint_dir_name"]] = latest["metrics"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{snapshot}: damaged; start the run again under another --name") from error
    return [Listed(storage.join(run, "checkpoints", name), metrics) for name, metrics in entries.items()]


def best_checkpoint(run: str) -> Listed:
    """The checkpoint with the highest recall; raises InputError where the run has none with a recall."""
    checkpoints = listed_checkpoints(run)
    if not checkpoints:
        raise InputError(f"{run}: the run has no checkpoint yet; let it train, or continue it with --resume")
    best = best_of(checkpoints)
    if best is None:
        raise InputError(f"{run}: none of the run's checkpoints has a recall; name the one that is meant by its folder")
    return best


def best_of(checkpoints: Sequence[Listed]) -> Listed | None:
    """The one with the highest recall, of equals the first; None where none has a recall."""
    measured = [(recall, listed) for listed in checkpoints if (recall := listed.recall) is not None]
    return max(measured, key=lambda pair: pair[0])[1] if measured else None


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A folder on this machine with the content of `uri`; a local folder is used as it is."""
    if uri.startswith(_ARTIFACTS):
        with tempfile.TemporaryDirectory() as folder:
            yield Registry().fetch(uri, folder)
        return
    if "://" not in uri:
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        storage.download(uri, folder)
        yield Path(folder)


@contextmanager
def package_of(model: str) -> Iterator[Path]:
    """The encoder package of a MODEL, as a local folder; of a checkpoint it is built on the way.

    Raises InputError where `model` is none of: run folder, checkpoint, encoder package, registered version.
    """
    if model.startswith(_REGISTERED):
        with registered_package(Registry().resolve(model)) as folder:
            yield folder
        return
    kind, uri = locate(model)
    with local_copy(uri) as folder:
        if kind == "package":
            yield folder
            return
        from models.package import verify_files

        verify_files(folder, uri)
        with tempfile.TemporaryDirectory() as target:
            build_package(folder, Path(target), _name_of(model))
            yield Path(target)


@contextmanager
def registered_package(version: Version) -> Iterator[Path]:
    """A version's package as a local folder; raises InputError where it is gone, or is not what was registered."""
    with local_copy(version.source) as folder:
        config, space = folder / "config.json", version.tags.get(SPACE)
        document = json.loads(config.read_bytes()) if config.is_file() else {}
        if space and document.get("embedding_space") != space:
            raise InputError(
                f"{version}: its package (space {space}) is not at {version.source} any more; promote again"
            )
        yield folder


def locate(model: str) -> tuple[str, str]:
    """("package" | "checkpoint", its URI) of a MODEL."""
    if model.startswith(_REGISTERED):
        return "package", Registry().resolve(model).source
    if not storage.exists(model):
        raise InputError(f"{model}: no such model; give a run folder, a checkpoint, a package or models:/NAME@ALIAS")
    if storage.exists(storage.join(model, "package", "config.json")):
        return "package", storage.join(model, "package")
    if storage.exists(storage.join(model, "position.json")):
        return "checkpoint", model
    if storage.exists(storage.join(model, "checkpoints", SNAPSHOT)):
        return "checkpoint", best_checkpoint(model).uri
    config = storage.join(model, "config.json")
    if storage.exists(config) and _format_of(config) == PACKAGE_FORMAT:
        return "package", model
    raise InputError(f"{model}: neither a run folder nor a checkpoint nor an encoder package")


def _format_of(uri: str) -> Any:
    try:
        document = json.loads(storage.read_bytes(uri))
    except ValueError:
        return None
    return document.get("format") if isinstance(document, dict) else None


def _name_of(model: str) -> str:
    parts = [part for part in model.rstrip("/").split("/") if part]
    return parts[parts.index("checkpoints") - 1] if "checkpoints" in parts[1:] else parts[-1]


def read_experiment(uri: str) -> ExperimentConfig:
    """A run's or checkpoint's `config.json`; raises InputError where it cannot be read."""
    try:
        return ExperimentConfig.model_validate_json(storage.read_bytes(uri))
    except ValueError as error:
        raise InputError(f"{uri}: damaged, or written by another version") from error


def build_package(checkpoint: Path, target: Path, name: str) -> str:
    """Write the encoder package of a checkpoint folder to `target`; returns its embedding-space id."""
    from models.objectives import build_model
    from models.package import load_weights, save_package
    from models.preprocess import CaptionTokenizer, PreprocessorConfig

    experiment = read_experiment(str(checkpoint / "config.json"))
    model = build_model(experiment.encoder, experiment.objective)
    load_weights(model, checkpoint / "model.safetensors", str(checkpoint))
    tokenizer = CaptionTokenizer.from_json((checkpoint / "tokenizer.json").read_text())
    preprocessor = PreprocessorConfig.from_json((checkpoint / "preprocessor_config.json").read_text())
    return save_package(target, experiment.encoder, model.eval(), tokenizer, preprocessor, name)


def fetch_weights(model: str) -> "dict[str, Tensor]":
    """All online weights of a MODEL, under our parameter names."""
    from models.package import load_tensors

    _, uri = locate(model)
    with local_copy(uri) as folder:
        return load_tensors(folder / "model.safetensors")


def model_card(package: Path, experiment: ExperimentConfig, metrics: dict[str, float], space: str) -> None:
    """Write the package's README.md: what it is, how it was trained, its scores and their protocol."""
    trained, scored = redact(experiment.train_data), redact(experiment.val_data)
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(metrics.items()))
    (package / "README.md").write_text(
        f"# {experiment.name}\n\n"
        f"An image and text encoder trained with Triptych (preset `{experiment.preset}`), embedding space `{space}`.\n"
        f"Images are resized to {experiment.encoder.vision.image_size} pixels square; "
        f"captions are cleaned and cut to {experiment.encoder.text.max_tokens} tokens; vectors have "
        f"{experiment.encoder.embed_dim} numbers and length 1.\n\n"
        f"Trained on `{trained}`. Scores on `{scored}`: recall as fractions, first stage by "
        f"cosine; `_reranked` by the fusion encoder. An image with several captions counts any of them as right.\n\n"
        f"| metric | value |\n| --- | --- |\n{rows}\n"
    )
