"""The one place where a trained model's vectors are computed: one pass of a tower, and passes over many inputs.

Serving, embedding, evaluation, validation in training and the health check of a package all come here, so that none of
them gets another vector for the same input. Axes: N rows, S image side, T tokens, P image tokens, D joint width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, UInt8
from torch import Tensor

from models.config import EncoderConfig
from models.encoders import DualEncoder
from models.normalize import normalize
from models.preprocess import MEAN, STD, CaptionTokenizer, PreprocessorConfig

LEAST = 16
"""Captions of a pass: sorted by length and cut into passes of at least so many, they carry little padding."""
PAIRS = 64
"""Pairs of one pass of the fusion encoder."""


@dataclass(frozen=True)
class Package:
    """What serving, embedding and evaluation need of a trained model; read and written by `models/package.py`."""

    config: EncoderConfig
    model: DualEncoder
    tokenizer: CaptionTokenizer
    preprocessor: PreprocessorConfig
    embedding_space: str
    name: str
    metrics: dict[str, float] = field(default_factory=dict)


class Encoded(NamedTuple):
    """What one pass of a tower gives, on the model's device."""

    vectors: Float[Tensor, "N D"]
    """Unit length."""
    states: Float[Tensor, "N L W"]
    """States of all tokens (L is P or T), [CLS] first: what the fusion encoder reads."""


def device_of(model: DualEncoder) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def _precision(model: DualEncoder, bf16: bool) -> AbstractContextManager[None]:
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=bf16)


@torch.inference_mode()
def encode_images(
    model: DualEncoder,
    pixels: UInt8[Tensor, "N S S 3"],
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    bf16: bool = False,
) -> Encoded:
    """One pass of the image tower; `mean` and `std` are those of the model's preprocessor."""
    with _precision(model, bf16):
        states = model.encode_image(normalize(pixels.to(device_of(model)), mean, std))
        return Encoded(model.project_image(states[:, 0]), states)


@torch.inference_mode()
def encode_texts(
    model: DualEncoder, ids: Integer[Tensor, "N T"], mask: Bool[Tensor, "N T"], bf16: bool = False
) -> Encoded:
    """One pass of the text tower; where `mask` is false there is padding, which changes no vector."""
    device = device_of(model)
    with _precision(model, bf16):
        states = model.encode_text(ids.to(device).long(), mask.to(device))
        return Encoded(model.project_text(states[:, 0]), states)


def pad(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Ids int64 and mask bool, both (N, T), of token rows; T is the longest row's."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = np.full((len(rows), longest), fill, np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return torch.from_numpy(ids), torch.arange(longest)[None, :] < lengths[:, None]


def embed_texts(package: Package, rows: Sequence[np.ndarray], bf16: bool = False) -> np.ndarray:
    """Unit vectors float32 (N, D) of rows of token ids, in the order given."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    vectors = np.empty((len(rows), package.config.embed_dim), np.float32)
    for places in np.array_split(np.array(order), max(1, len(rows) // LEAST)):
        ids, mask = pad([rows[place] for place in places], package.tokenizer.pad_id)
        vectors[places] = encode_texts(package.model, ids, mask, bf16).vectors.float().cpu().numpy()
    return vectors


def embed_images(package: Package, pixels: np.ndarray, bf16: bool = False) -> np.ndarray:
    """Unit vectors float32 (N, D) of images uint8 (N, S, S, 3), all in one pass."""
    return _encoded_pixels(package, pixels, bf16).vectors.float().cpu().numpy()


def _encoded_pixels(package: Package, pixels: np.ndarray, bf16: bool) -> Encoded:
    levels = torch.from_numpy(np.ascontiguousarray(pixels))
    return encode_images(package.model, levels, package.preprocessor.mean, package.preprocessor.std, bf16)


@torch.inference_mode()
def match(
    package: Package,
    rows: Sequence[np.ndarray],
    pixels: np.ndarray,
    pairs: Sequence[tuple[int, int]],
    bf16: bool = False,
) -> np.ndarray:
    """Probability float32 (pairs,) that a text (index into `rows`) and an image (index into `pixels`) match.

    Each text and image passes its tower once, whatever the number of pairs it is in.
    """
    fusion = package.model.fusion
    assert fusion is not None and fusion.matching is not None
    device = device_of(package.model)
    ids, mask = pad(rows, package.tokenizer.pad_id)
    texts = encode_texts(package.model, ids, mask, bf16).states
    images = _encoded_pixels(package, pixels, bf16).states
    mask = mask.to(device)
    probabilities = []
    with _precision(package.model, bf16):
        memory = fusion.image_memory(images)
        for start in range(0, len(pairs), PAIRS):
            text, image = torch.tensor(pairs[start : start + PAIRS], device=device).T
            states = fusion(texts[text], mask[text], [layer.rows(image) for layer in memory])
            probabilities.append(fusion.matching(states[:, 0]).float().softmax(-1)[:, 1].cpu())
    return torch.cat(probabilities).numpy()
