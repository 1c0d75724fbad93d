"""First-stage recall on a fixed validation sample while training goes on, encoded by all workers."""

import random

import numpy as np
import torch
from torch import Tensor

from models.collectives import Workers
from models.encoders import DualEncoder
from models.inference import encode_images, encode_texts
from models.metrics import Relevance, recall_from_features
from models.preprocess import CaptionTokenizer
from models.sample_rng import hash64
from pipelines.config import ExperimentConfig
from pipelines.data.manifest import Manifest, Unit
from pipelines.data.ray_data import PrepareSettings, eval_batches
from pipelines.recall import MEAN_RECALL

BATCH = 256


def sample_units(units: list[Unit], pairs: int) -> list[Unit]:
    """Units with at least `pairs` samples together (or all), the same for every run on the same data."""
    shuffled = list(units)
    random.Random(0).shuffle(shuffled)
    chosen, count = [], 0
    for unit in shuffled:
        if count >= pairs:
            break
        chosen.append(unit)
        count += unit.count
    return chosen


class Validation:
    """This worker's part of the validation sample, prepared once and kept as uint8 and token ids."""

    def __init__(
        self,
        manifest: Manifest,
        experiment: ExperimentConfig,
        tokenizer: CaptionTokenizer,
        workers: Workers,
        device: torch.device,
    ) -> None:
        self._manifest, self._experiment = manifest, experiment
        self._tokenizer, self._workers, self._device = tokenizer, workers, device
        self._prepared: list[dict[str, np.ndarray]] | None = None

    def score(self, model: DualEncoder) -> dict[str, float]:
        """`val/...` recall both ways at 1, 5 and 10, and how many pairs were scored; every worker makes the call."""
        if self._prepared is None:
            self._prepared = self._prepare()
        model.eval()
        columns = self._encode(model)
        model.train()
        counts = self._workers.row_counts(len(columns[0]))
        captions = self._workers.row_counts(len(columns[1]))
        image, image_id = (self._workers.all_gather_rows(columns[i], counts).cpu() for i in (0, 2))
        text, owner_id, caption_id = (self._workers.all_gather_rows(columns[i], captions).cpu() for i in (1, 3, 4))
        limit = self._experiment.validation.pairs
        image, image_id = image[:limit], image_id[:limit]
        kept = torch.isin(owner_id, image_id)
        gallery, first, owner = _unique(image_id, owner_id[kept])
        relevance = Relevance.of(len(gallery), owner, caption_id[kept])
        scores = recall_from_features(image[first].float(), text[kept].float(), relevance)
        metrics = {f"val/{name}": value for name, value in scores.items()}
        mean = (scores["image_retrieval_recall_at_1"] + scores["text_retrieval_recall_at_1"]) / 2
        return metrics | {MEAN_RECALL: mean, "val/pairs": float(len(image))}

    def _prepare(self) -> list[dict[str, np.ndarray]]:
        """Read, decode and tokenise this worker's units of the sample."""
        experiment, workers = self._experiment, self._workers
        units = sample_units(self._manifest.units, experiment.validation.pairs)[workers.rank :: workers.world_size]
        settings = PrepareSettings.of(experiment, self._tokenizer.to_json())
        prepared: list[dict[str, np.ndarray]] = []
        for rows in eval_batches(self._manifest, units, settings, BATCH) if units else ():
            good = rows["reason"] == ""
            captions = [list(c) for c in rows["captions"][good]]
            ids, mask = self._tokenizer.encode([c for cs in captions for c in cs], experiment.encoder.text.max_tokens)
            image_id = rows["image_id"][good]
            owner = np.repeat(image_id, [len(cs) for cs in captions])
            caption_id = np.array([hash64(c) for cs in captions for c in cs], np.int64)
            prepared.append(
                {
                    "image": rows["image"][good],
                    "image_id": image_id,
                    "ids": ids,
                    "mask": mask,
                    "owner": owner,
                    "caption_id": caption_id,
                }
            )
        return prepared

    def _encode(self, model: DualEncoder) -> list[Tensor]:
        """[image vectors, text vectors, image ids, owners of the captions, caption ids] of this worker's part."""
        width = model.image_projection.out_features
        none = torch.zeros(0, dtype=torch.int64, device=self._device)
        vectors = torch.zeros(0, width, device=self._device)
        parts: list[list[Tensor]] = [[vectors], [vectors], [none], [none], [none]]
        for rows in self._prepared or ():
            on_device = {name: torch.from_numpy(np.ascontiguousarray(v)).to(self._device) for name, v in rows.items()}
            parts[0].append(encode_images(model, on_device["image"]).vectors)
            parts[1].append(encode_texts(model, on_device["ids"], on_device["mask"].bool()).vectors)
            for place, name in ((2, "image_id"), (3, "owner"), (4, "caption_id")):
                parts[place].append(on_device[name])
        return [torch.cat(part) for part in parts]


def _unique(image_id: Tensor, owner_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct images, the first row of each, and the image's number of each caption."""
    gallery, inverse = torch.unique(image_id, return_inverse=True)
    first = torch.full((len(gallery),), len(image_id)).scatter_reduce(0, inverse, torch.arange(len(image_id)), "amin")
    return gallery, first, torch.searchsorted(gallery, owner_id)
