"""Run folders with real packages, made without training: what a promotion takes."""

import json
from pathlib import Path

import pytest
import torch

from models.config import EncoderConfig
from models.encoders import DualEncoder, Heads, resolve
from models.normalize import normalize
from models.package import load_package, save_package, write_files_json
from models.preprocess import CaptionTokenizer, PreprocessorConfig, train_tokenizer
from pipelines.config import ExperimentConfig
from pipelines.data.manifest import build_manifest
from pipelines.data.ray_data import PrepareSettings
from pipelines.data.reader import read_units
from pipelines.data.transforms import prepare_eval
from pipelines.evaluation.evaluate import score
from pipelines.recall import mean_recall
from pipelines.tracking.run import EXPERIMENT, Tracker
from tests.support.pairs import make_pairs, write_parquet_pairs
from tuning.promote.promote import PromotionRefused, promote

PAIRS = 12

CAPTIONS = [pair["caption"] for pair in make_pairs(PAIRS)]


def write_data(folder: Path) -> str:
    """The pairs that everything here is scored on."""
    write_parquet_pairs(f"{folder}/0.parquet", make_pairs(PAIRS))
    return str(folder)


def columns(data: str, package) -> dict:
    """The evaluation batch of all pairs, without Ray."""
    experiment = ExperimentConfig().model_copy(update={"encoder": package.config})
    manifest = build_manifest(data, experiment.pairs)
    settings = PrepareSettings.of(experiment, package.tokenizer.to_json())
    return prepare_eval(read_units(manifest.units, experiment.pairs), settings)


def evaluate_directly(folder: str, data: str, experiment: ExperimentConfig, rerank_top: int | None = None) -> dict:
    """What `evaluate_package` does, without Ray."""
    package = load_package(Path(folder))
    return score(package, [columns(data, package)], 0)


def save_model(folder: Path, data: str, fitted: int, seed: int = 0) -> None:
    """A package whose first `fitted` images have exactly the vectors of their captions; the others are at random."""
    tokenizer = CaptionTokenizer.from_json(train_tokenizer(CAPTIONS * 2, 200).to_str())
    small = {"vision": {"image_size": 16, "width": 16, "layers": 1}, "text": {"width": 16, "layers": 1}}
    config = resolve(EncoderConfig.model_validate(small | {"embed_dim": 8}), tokenizer.vocab_size)
    torch.manual_seed(seed)
    model = DualEncoder(config, Heads()).eval()
    for parameter in model.parameters():  # untrained weights hardly depend on their input: make them
        parameter.data.mul_(4)
    preprocessor = PreprocessorConfig(image_size=16, max_tokens=config.text.max_tokens)
    save_package(folder, config, model, tokenizer, preprocessor, folder.parent.name)
    rows = columns(data, load_package(folder))
    with torch.inference_mode():
        states = model.encode_image(normalize(torch.from_numpy(rows["image"])))[:fitted, 0].double()
        ids, mask = (torch.from_numpy(a) for a in tokenizer.encode([c[0] for c in rows["captions"]], 25))
        wanted = model.project_text(model.encode_text(ids.long(), mask.bool())[:fitted, 0]).double()
        ones = torch.ones(fitted, 1, dtype=torch.float64)
        solution = torch.linalg.lstsq(torch.cat([states, ones], 1), wanted, driver="gelsd").solution.float()
        model.image_projection.weight.copy_(solution[:-1].T)
        model.image_projection.bias.copy_(solution[-1])
    save_package(folder, config, model, tokenizer, preprocessor, folder.parent.name)


def make_run(run: Path, data: str, fitted: int, status: str | None = "FINISHED", seed: int = 0) -> str:
    """A run folder with its run in MLflow (`status` None: in none); returns its path."""
    package = run / "package"
    save_model(package, data, fitted, seed)
    config = load_package(package).config
    experiment = ExperimentConfig(preset="clip-tiny", name=run.name, train_data=data, val_data=data, encoder=config)
    (run / "config.json").write_text(experiment.model_dump_json())
    build_manifest(data, experiment.pairs).save(str(run / "manifest.parquet"))
    metrics = {f"val/{key}": value for key, value in evaluate_directly(str(package), data, experiment).items()}
    for folder in (run, package):
        (folder / "metrics.json").write_text(json.dumps(metrics))
    (package / "README.md").write_text("a model")
    write_files_json(package)
    if status:
        tracker = Tracker.start(None, EXPERIMENT, run.name, {}, {"triptych.commit": "c0ffee"})
        assert tracker.log_artifacts(str(package), "package")
        tracker.finish(status)
        (run / "mlflow.json").write_text(json.dumps({"run_id": tracker.run_id}))
    return str(run)


def state(registry, name):
    """Aliases, and the numbers of all versions."""
    return registry.aliases(name), [version.number for version in registry.versions(name)]


def nothing_held(registry, name):
    return registry._holder(f"{name}.promoting") == {}


def refused(run, name, hint, **options):
    """Promotion refuses in one line with the hint; returns the record."""
    with pytest.raises(PromotionRefused, match=hint) as caught:
        promote(str(run), name, **options)
    assert "\n" not in str(caught.value)
    return caught.value.promotion


def recall_of(run):
    return mean_recall(json.loads((run / "metrics.json").read_text()))
