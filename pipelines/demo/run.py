"""`make demo`: a generated corpus, a trained `tcl-tiny`, its scores, a run in MLflow and a page to look at.

Everything lies in `demo/` of the current folder and may be deleted. A second call keeps the corpus and trains anew: the
earlier run's folder and the page are replaced, its run in MLflow stays beside the new one for comparison.
"""

import io
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from models.config import InputError
from models.inference import Package
from models.package import load_package
from models.preprocess import clean_caption, resize_for_eval
from pipelines.cli.console import DONE, exit_code
from pipelines.config import PRESETS, ExperimentConfig
from pipelines.data.synthetic import CorpusConfig, synthesize
from pipelines.demo.serving import serve_and_ask
from pipelines.evaluation.evaluate import encode, evaluate_model
from pipelines.lineage import commit
from pipelines.recall import recall_table
from pipelines.report.charts import Series
from pipelines.report.page import ContactRow, TrainingPage, training_report
from pipelines.tracking.run import EXPERIMENT, Tracker
from pipelines.train.events import Event
from pipelines.train.fit import FitResult, fit

logger = logging.getLogger(__name__)

PRESET, NAME = "tcl-tiny", "tcl-tiny-demo"
_TOP = 5  # images shown of each caption
_CAPTIONS = 24  # captions on the contact sheet

_NEXT = """
The page with curves and a contact sheet:  {page}
The page to search with, at http://127.0.0.1:8000/ while this runs (Ctrl-C ends it):
  .venv/bin/triptych serve {run} --index {index}

Look further:
  .venv/bin/mlflow ui                          then open http://127.0.0.1:5000, experiment {experiment}
  .venv/bin/triptych evaluate {run} --data {data}/test
Train on your own pairs (parquet with the columns image and caption, or webdataset), in a folder or a bucket:
  .venv/bin/triptych train tcl-tiny --train-data s3://BUCKET/train --val-data s3://BUCKET/val --out s3://BUCKET/runs
"""


def demo(folder: Path, corpus: CorpusConfig, experiment: ExperimentConfig) -> Path:
    """Corpus, training, scores, MLflow, the page and ten searches; prints what came out, returns the page's path."""
    started = time.monotonic()
    data = make_corpus(folder / "data", corpus)
    paths = {"train_data": str(data / "train"), "val_data": str(data / "val"), "out": str(folder), "name": NAME}
    experiment = experiment.model_copy(update=paths)
    shutil.rmtree(folder / NAME, ignore_errors=True)
    result = fit(experiment)
    trained = time.monotonic() - started
    metrics = evaluate_model(result.run_folder, str(data / "test"))
    pairs = read_pairs(data / "test", experiment.pairs.max_caption_words)
    package = load_package(Path(result.run_folder) / "package")
    page = TrainingPage(
        title=f"{PRESET} on {corpus.pairs:,} generated scenes",
        lead=_lead(metrics),
        facts=_facts(experiment, package, result, trained),
        recall=metrics,
        contact_sheet=contact_rows(package, pairs, _CAPTIONS),
        validation=series(result.history, "validation", "val/", "samples"),
        losses=series(result.history, "step", "train/loss/", "step"),
    )
    path = folder / "report.html"
    training_report(path, page)
    _track(result, metrics, path)
    asked = serve_and_ask(result.run_folder, data / "test", folder, [caption for caption, _ in pairs])
    places = {"run": _short(Path(result.run_folder)), "data": _short(data), "index": _short(folder / "index")}
    text = _NEXT.format(page=path, experiment=EXPERIMENT, **places)
    sys.stdout.write(f"\nOn scenes that training never saw:\n{recall_table(metrics)}\n\n{asked}\n{text}")
    return path


def make_corpus(folder: Path, corpus: CorpusConfig) -> Path:
    """The corpus in `folder`; one of the same settings is kept. Raises InputError for a folder that is not the demo's.

    It is written beside its place and moved there when it is whole.
    """
    settings = folder / "corpus.json"
    if settings.is_file():
        if json.loads(settings.read_text()) == corpus.model_dump(mode="json"):
            logger.info("the corpus in %s is there already", folder)
            return folder
        shutil.rmtree(folder)
    elif folder.exists():
        raise InputError(f"{folder}: the demo did not make this folder; move it, or run the demo in another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    logger.info("drawing %s scenes", f"{corpus.pairs:,}")
    synthesize(str(partial), corpus)
    (partial / "corpus.json").write_text(corpus.model_dump_json(indent=1))
    return partial.rename(folder)


def read_pairs(folder: Path, max_words: int) -> list[tuple[str, bytes]]:
    """(clean caption, image file) of a Parquet split with one caption an image."""
    table = pq.read_table(folder, columns=["caption", "image"])
    captions, images = (table.column(name).to_pylist() for name in ("caption", "image"))
    return [(clean_caption(caption, max_words), image) for caption, image in zip(captions, images, strict=True)]


def contact_rows(package: Package, pairs: Sequence[tuple[str, bytes]], count: int) -> list[ContactRow]:
    """For `count` captions at even distances, the images nearest by cosine (first stage, no fusion encoder).

    An image with the same words is right too, as in the scores.
    """
    size = package.preprocessor.image_size
    captions = np.empty(len(pairs), dtype=object)
    captions[:] = [[caption] for caption, _ in pairs]
    rows = {
        "image": np.stack([resize_for_eval(Image.open(io.BytesIO(image)), size) for _, image in pairs]),
        "captions": captions,
        "image_id": np.arange(len(pairs)),
        "reason": np.full(len(pairs), "", dtype=object),
    }
    gallery = encode(package, [rows], keep_tokens=False)
    sheet = []
    for query in np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int):
        order = torch.argsort(gallery.texts[query] @ gallery.images.T, descending=True).tolist()
        right = [pairs[image][0] == pairs[query][0] for image in order]
        rank = right.index(True) + 1
        remark = "" if rank <= _TOP else f"The right one comes at place {rank:,} of {len(order):,}."
        images = [pairs[image][1] for image in order[:_TOP]]
        sheet.append(ContactRow(pairs[query][0], images, right[:_TOP], remark))
    return sheet


def series(history: Sequence[Event], kind: str, prefix: str, over: str) -> dict[str, Series]:
    """{metric without prefix: [(step or samples, value)]} of the events of a kind; a repeated step counts once."""
    found: dict[str, dict[float, float]] = {}
    for event in history:
        if event["kind"] == kind:
            for name, value in event["metrics"].items():
                if name.startswith(prefix):
                    found.setdefault(name.removeprefix(prefix), {})[event[over]] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def _lead(metrics: Mapping[str, float]) -> str:
    """What the scores mean, in a sentence."""
    first, ten = (metrics[f"image_retrieval_recall_at_{depth}"] for depth in (1, 10))
    chance = 1 / metrics["images"]
    return (
        f"Of {int(metrics['captions']):,} captions that training never saw, {first:.1%} find their image first and "
        f"{ten:.1%} among the first ten; guessing would find {chance:.1%} and {10 * chance:.1%}. "
        "The captions below were taken at even distances, not chosen."
    )


def _facts(experiment: ExperimentConfig, package: Package, result: FitResult, seconds: float) -> dict[str, str]:
    """What was trained, on what, how long, and where it is kept."""
    parameters = sum(parameter.numel() for parameter in package.model.parameters())
    weights = experiment.objective.weights.model_dump()
    return {
        "Model": f"{PRESET}, {parameters / 1e6:.2f} million parameters in the package",
        "Objective": " + ".join(f"{weight:.3g} {term}" for term, weight in weights.items() if weight),
        "Training": f"{max(event['samples'] for event in result.history):,} samples on {experiment.compute.workers} "
        f"workers, {seconds:.0f} s with corpus, packaging and validation",
        "Machine": f"{os.cpu_count()} cores, {platform.machine()}, PyTorch {torch.__version__}",
        "Seed": str(experiment.seed),
        "Commit": commit(),
        "MLflow run": result.mlflow_run_id,
        "Run folder": result.run_folder,
        "Embedding space": package.embedding_space,
    }


def _track(result: FitResult, metrics: Mapping[str, float], page: Path) -> None:
    """Adds test scores and the page to the run in MLflow."""
    tracker = Tracker.start(None, EXPERIMENT, NAME, {}, {}, run_id=result.mlflow_run_id)
    step = max(event["step"] for event in result.history)
    tracker.log({f"test/{name}": value for name, value in metrics.items()}, step)
    tracker.log_artifacts(str(page))
    tracker.finish()


def _short(path: Path) -> Path:
    """The path as seen from here, if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> int:
    """Runs the demo in ./demo; 0 done, 1 failed with one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pipelines").setLevel(logging.INFO)
    experiment = PRESETS[PRESET].override({"compute.workers": 2})

    def run() -> int:
        demo(Path("demo").absolute(), CorpusConfig(), experiment)
        return DONE

    return exit_code("demo", run)
