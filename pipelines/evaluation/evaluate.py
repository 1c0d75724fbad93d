"""Retrieval scores of a trained model: cosine first, then the fusion encoder over the nearest candidates.

The arithmetic of the two stages is in `models/metrics.py` and `pipelines/evaluation/rerank.py`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.config import PACKAGE_FORMAT, InputError
from models.metrics import Relevance, recall_from_features
from models.normalize import normalize
from models.package import Package, load_package
from pipelines import storage
from pipelines.artifacts.resolve import package_of, read_experiment
from pipelines.cluster import connect
from pipelines.config import ExperimentConfig
from pipelines.data.manifest import build_manifest
from pipelines.data.ray_data import PrepareSettings, eval_batches
from pipelines.evaluation.rerank import BATCH, Gallery, Tokens, rerank, two_stage_scores

__all__ = ["encode", "evaluate_model", "evaluate_package", "score", "two_stage_scores"]


class _Register:
    """Numbers images, captions and wordings in the order they come; an image that comes again keeps its number."""

    def __init__(self) -> None:
        self.images: dict[int, int] = {}
        self.wordings: dict[str, int] = {}
        self.owner: list[int] = []
        self.wording: list[int] = []
        self.skipped = 0

    def take(self, rows: Mapping[str, np.ndarray]) -> tuple[list[int], list[str]]:
        """The places of pictures not seen before, and all captions, of a batch's good rows."""
        fresh: list[int] = []
        texts: list[str] = []
        for place, reason in enumerate(rows["reason"]):
            own = [] if reason else [caption for caption in rows["captions"][place] if caption]
            if not own:
                self.skipped += 1
                continue
            identity = int(rows["image_id"][place])
            if identity not in self.images:
                self.images[identity] = len(self.images)
                fresh.append(place)
            self.owner += [self.images[identity]] * len(own)
            self.wording += [self.wordings.setdefault(caption, len(self.wordings)) for caption in own]
            texts += own
        return fresh, texts


@torch.inference_mode()
def encode(package: Package, batches: Iterable[Mapping[str, np.ndarray]], keep_tokens: bool) -> Gallery:
    """Encode evaluation batches (`image`, `captions`, `image_id`, `reason`) on the model's device.

    Raises InputError where no row can be used.
    """
    register = _Register()
    image_parts: list[list[Tensor]] = []
    text_parts: list[list[Tensor]] = []
    for rows in batches:
        fresh, captions = register.take(rows)
        if fresh:
            image_parts += _encode_images(package, rows["image"][fresh], keep_tokens)
        text_parts += _encode_texts(package, captions, keep_tokens)
    if not register.owner:
        raise InputError(f"no usable pair among {register.skipped:,} rows; `triptych data lint URI` says why")
    images, texts = ([torch.cat(part) for part in zip(*parts, strict=True)] for parts in (image_parts, text_parts))
    relevance = Relevance(len(register.images), torch.tensor(register.owner), torch.tensor(register.wording))
    tokens = Tokens(images[1], texts[1], texts[2]) if keep_tokens else None
    return Gallery(images[0], texts[0], relevance, tokens, register.skipped)


def _encode_images(package: Package, pixels: np.ndarray, keep_tokens: bool) -> list[list[Tensor]]:
    """[vectors, token states if asked for] of each pass over uint8 pictures."""
    model, device, parts = package.model, _device(package), []
    for some in torch.from_numpy(np.ascontiguousarray(pixels)).split(BATCH):
        levels = normalize(some.to(device), package.preprocessor.mean, package.preprocessor.std)
        states = model.encode_image(levels)
        parts.append([model.project_image(states[:, 0]), *([states] if keep_tokens else [])])
    return [[tensor.float().cpu() for tensor in part] for part in parts]


def _encode_texts(package: Package, captions: list[str], keep_tokens: bool) -> list[list[Tensor]]:
    """[vectors, token states and mask if asked for] of each pass over clean captions."""
    model, device, parts = package.model, _device(package), []
    for start in range(0, len(captions), BATCH):
        encoded = package.tokenizer.encode(captions[start : start + BATCH], package.preprocessor.max_tokens)
        ids, mask = (torch.from_numpy(array).to(device) for array in encoded)
        states = model.encode_text(ids.long(), mask.bool())
        vectors = model.project_text(states[:, 0]).float().cpu()
        parts.append([vectors, *([states.float().cpu(), mask.bool().cpu()] if keep_tokens else [])])
    return parts


def _device(package: Package) -> torch.device:
    return next(package.model.parameters()).device


def score(
    package: Package, batches: Iterable[Mapping[str, np.ndarray]], rerank_top: int = 0, rerank_queries: int = 2000
) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, as fractions, with what they were measured on.

    With `rerank_top` and a fusion encoder also `..._reranked`. Raises InputError where no row can be used.
    """
    fusion = package.model.fusion
    reranks = rerank_top > 0 and fusion is not None and fusion.matching is not None
    gallery = encode(package, batches, keep_tokens=reranks)
    counts = {"images": len(gallery.images), "captions": len(gallery.texts), "skipped": gallery.skipped}
    metrics = recall_from_features(gallery.images, gallery.texts, gallery.relevance)
    metrics |= {name: float(count) for name, count in counts.items()}
    if reranks and fusion is not None:
        metrics |= rerank(gallery, fusion, _device(package), rerank_top, rerank_queries)
    return metrics


def evaluate_package(
    folder: str, data: str, experiment: ExperimentConfig, rerank_top: int | None = None
) -> dict[str, float]:
    """Score an encoder package (local folder) on all pairs of a data set; Ray must run.

    Columns, limits and re-rank come from `experiment`, everything about the model from the package.
    """
    device = "cuda" if experiment.compute.gpus and torch.cuda.is_available() else "cpu"
    package = load_package(Path(folder), device=device)
    experiment = experiment.model_copy(update={"encoder": package.config})
    manifest = build_manifest(data, experiment.pairs)
    settings = PrepareSettings.of(experiment, package.tokenizer.to_json())
    top = experiment.validation.rerank_top if rerank_top is None else rerank_top
    return score(
        package, eval_batches(manifest, manifest.units, settings, BATCH), top, experiment.validation.rerank_queries
    )


def evaluate_model(model: str, data: str, rerank_top: int | None = None) -> dict[str, float]:
    """Score a MODEL (run folder, checkpoint or encoder package) on all pairs of a data set.

    A run's own columns and re-rank depth are used; of a bare package the depth its metrics were measured with.
    """
    with package_of(model) as folder:
        experiment = _experiment_of(model)
        if experiment is None:
            known = load_package(folder).metrics.get("val/rerank_top")
            experiment = ExperimentConfig()
            rerank_top = int(known) if rerank_top is None and known else rerank_top
        connect.connect()
        return evaluate_package(str(folder), data, experiment, rerank_top)


def _experiment_of(model: str) -> ExperimentConfig | None:
    """The experiment beside a run or checkpoint; None for a bare package."""
    uri = storage.join(model, "config.json")
    if not storage.exists(uri):
        return None
    document = json.loads(storage.read_bytes(uri))
    return None if document.get("format") == PACKAGE_FORMAT else read_experiment(uri)
