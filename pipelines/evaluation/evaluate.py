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
from models.inference import Encoded, Package, device_of, encode_images, encode_texts
from models.metrics import Relevance, recall_from_features
from models.package import load_package
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
        """The places of images not seen before, and all captions, of a batch's good rows."""
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
            image_parts += _image_parts(package, rows["image"][fresh], keep_tokens)
        text_parts += _text_parts(package, captions, keep_tokens)
    if not register.owner:
        raise InputError(f"no usable pair among {register.skipped:,} rows; `triptych data lint URI` says why")
    images, texts = ([torch.cat(part) for part in zip(*parts, strict=True)] for parts in (image_parts, text_parts))
    relevance = Relevance(len(register.images), torch.tensor(register.owner), torch.tensor(register.wording))
    tokens = Tokens(images[1], texts[1], texts[2]) if keep_tokens else None
    return Gallery(images[0], texts[0], relevance, tokens, register.skipped)


def _image_parts(package: Package, pixels: np.ndarray, keep_tokens: bool) -> list[list[Tensor]]:
    """[vectors, token states if asked for] of each pass over images uint8 (N, S, S, 3)."""
    mean, std = package.preprocessor.mean, package.preprocessor.std
    passes = torch.from_numpy(np.ascontiguousarray(pixels)).split(BATCH)
    return [_in_memory(encode_images(package.model, some, mean, std), keep_tokens) for some in passes]


def _text_parts(package: Package, captions: list[str], keep_tokens: bool) -> list[list[Tensor]]:
    """[vectors, token states and mask if asked for] of each pass over clean captions.

    All are padded to the length of the longest that the package takes, so that states of all passes fit together.
    """
    parts = []
    for start in range(0, len(captions), BATCH):
        encoded = package.tokenizer.encode(captions[start : start + BATCH], package.preprocessor.max_tokens)
        ids, mask = torch.from_numpy(encoded[0]), torch.from_numpy(encoded[1]).bool()
        parts.append(
            [*_in_memory(encode_texts(package.model, ids, mask), keep_tokens), *([mask] if keep_tokens else [])]
        )
    return parts


def _in_memory(encoded: Encoded, keep_tokens: bool) -> list[Tensor]:
    return [tensor.float().cpu() for tensor in (encoded if keep_tokens else encoded[:1])]


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
        metrics |= rerank(gallery, fusion, device_of(package.model), rerank_top, rerank_queries)
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
