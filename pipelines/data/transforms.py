"""Samples to columns: decode, crop, clean, tokenise, a block at a time. Plain functions, no Ray.

A bad row travels on with zero pixels and its reason: it ends in the ledger, never in the step, and its position counts.
Axes: B rows, S image side, T tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import torch

from models import sample_rng
from models.images import ImageRejected, OpenedImage, decode_whole, decoding, open_image
from models.preprocess import CaptionTokenizer, clean_caption
from pipelines.config import ExperimentConfig, PairsConfig
from pipelines.data.crops import DRAWS, crop_twice, draw_boxes
from pipelines.data.sample import Sample

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class PrepareSettings:
    """What the stages need to know."""

    image_size: int
    """S."""
    max_tokens: int
    """T."""
    tokenizer_json: str
    pairs: PairsConfig
    seed: int
    cpus: float = 0.25
    """Logical CPUs of a data task."""

    @classmethod
    def of(cls, experiment: ExperimentConfig, tokenizer_json: str) -> Self:
        """The settings of an experiment."""
        return cls(
            image_size=experiment.encoder.vision.image_size,
            max_tokens=experiment.encoder.text.max_tokens,
            tokenizer_json=tokenizer_json,
            pairs=experiment.pairs,
            seed=experiment.seed,
            cpus=experiment.compute.cpus_per_data_task,
        )


def prepare_train(rows: Sequence[Sample], settings: PrepareSettings, epoch: int) -> Columns:
    """Columns of a training block.

    views uint8 (B, 2, S, S, 3): two crops; ids int32 and mask uint8 (B, T): one caption of each sample, drawn where it
    has several; key int64 owns the sample's draws in this epoch; image_id, caption_id int64: equal where image or clean
    caption are; unit, ordinal int32; id, uri, reason ("" where all is well), detail str.
    """
    key = np.array([sample_rng.hash64(settings.seed, epoch, row.unit, row.ordinal) for row in rows], np.int64)
    usable = [_clean(row, settings.pairs.max_caption_words) for row in rows]
    choice = _uniform(key, sample_rng.CAPTION, 1)[:, 0]
    captions = [texts[int(u * len(texts))] if texts else "" for texts, u in zip(usable, choice.tolist(), strict=True)]
    reasons = [row.reason or ("" if caption else "empty_caption") for row, caption in zip(rows, captions, strict=True)]
    details = [row.detail for row in rows]
    ids, mask = _tokenizer(settings.tokenizer_json).encode(captions, settings.max_tokens)
    return {
        "views": _views(rows, key, settings, reasons, details),
        "ids": ids,
        "mask": mask,
        "key": key,
        "caption_id": np.array([sample_rng.hash64(caption) for caption in captions], np.int64),
    } | _identity(rows, reasons, details)


def prepare_eval(rows: Sequence[Sample], settings: PrepareSettings) -> Columns:
    """Columns of an evaluation block.

    image uint8 (B, S, S, 3): the whole image as serving sees it; captions: a list of clean captions in each row;
    image_id, unit, ordinal, id, uri, reason, detail as in `prepare_train`.
    """
    captions = np.empty(len(rows), object)
    captions[:] = [_clean(row, settings.pairs.max_caption_words) for row in rows]
    reasons = [row.reason or ("" if texts else "empty_caption") for row, texts in zip(rows, captions, strict=True)]
    details = [row.detail for row in rows]
    image = np.zeros((len(rows), settings.image_size, settings.image_size, 3), np.uint8)
    opened = _open_all(rows, settings.pairs, reasons, details)

    def decode(place: int) -> None:
        decode_whole(opened[place], image[place])

    _each(opened, decode, image, reasons, details)
    return {"image": image, "captions": captions} | _identity(rows, reasons, details)


def _views(
    rows: Sequence[Sample], key: np.ndarray, settings: PrepareSettings, reasons: list[str], details: list[str]
) -> np.ndarray:
    """The crops of the rows that have no reason yet; writes reasons and details of those that then fail."""
    views = np.zeros((len(rows), 2, settings.image_size, settings.image_size, 3), np.uint8)
    opened = _open_all(rows, settings.pairs, reasons, details)
    sizes = np.ones((len(rows), 2), np.int64)
    for place, image in opened.items():
        sizes[place] = image.size
    if settings.pairs.augment == "none":
        boxes = np.tile(np.concatenate([0 * sizes, sizes], 1)[:, None], (1, 2, 1))
    else:
        boxes = draw_boxes(sizes, _uniform(key, sample_rng.CROP, DRAWS), settings.pairs.crop_area_min)

    def decode(place: int) -> None:
        crop_twice(opened[place], boxes[place], views[place])

    _each(opened, decode, views, reasons, details)
    return views


def _open_all(
    rows: Sequence[Sample], pairs: PairsConfig, reasons: list[str], details: list[str]
) -> dict[int, OpenedImage]:
    """Images by place, of the rows that have no reason yet."""
    opened: dict[int, OpenedImage] = {}
    with decoding():
        for place, row in enumerate(rows):
            if not reasons[place]:
                try:
                    opened[place] = open_image(row.image, pairs.max_pixels, pairs.min_side)
                except ImageRejected as refusal:
                    reasons[place], details[place] = refusal.args
    return opened


def _each(
    opened: dict[int, OpenedImage],
    decode: Callable[[int], None],
    pixels: np.ndarray,
    reasons: list[str],
    details: list[str],
) -> None:
    """Decode every image, and let go of it; a damaged one leaves zeros."""
    with decoding():
        for place in list(opened):
            try:
                decode(place)
            except ImageRejected as refusal:
                pixels[place] = 0
                reasons[place], details[place] = refusal.args
            del opened[place]


def _identity(rows: Sequence[Sample], reasons: list[str], details: list[str]) -> Columns:
    """Who the rows are, and what became of them."""
    return {
        "image_id": np.array([_image_id(row) for row in rows], np.int64),
        "unit": np.array([row.unit for row in rows], np.int32),
        "ordinal": np.array([row.ordinal for row in rows], np.int32),
        "id": np.array([row.id for row in rows], object),
        "uri": np.array([row.uri for row in rows], object),
        "reason": np.array(reasons, object),
        "detail": np.array([detail[:200] for detail in details], object),
    }


def _image_id(row: Sample) -> int:
    """A hash of the user's image id, else of the image's bytes."""
    return sample_rng.hash64(row.image_id or hashlib.blake2b(row.image, digest_size=16).digest())


def _clean(row: Sample, max_words: int) -> list[str]:
    """The sample's captions that have words left after clean-up."""
    return [caption for caption in (clean_caption(text, max_words) for text in row.captions) if caption]


def _uniform(key: np.ndarray, stream: int, count: int) -> np.ndarray:
    return sample_rng.uniform(torch.from_numpy(key), stream, count).numpy()


@lru_cache(maxsize=4)
def _tokenizer(text: str) -> CaptionTokenizer:
    """One tokeniser for all blocks of a process."""
    return CaptionTokenizer.from_json(text)
