"""Batched forward passes of a package: all that an encoder replica computes, and the limit it is measured against.

Axes: N rows, S image side, D width of the joint space, T tokens.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from models.normalize import normalize
from models.package import Package

LEAST = 16
"""Captions of a pass: sorted by length and cut into passes of at least so many, they carry little padding."""
PAIRS = 64
"""Pairs of one pass of the fusion encoder."""


def _device(package: Package) -> torch.device:
    return next(package.model.parameters()).device


def _precision(package: Package, bf16: bool) -> AbstractContextManager[None]:
    return torch.autocast(_device(package).type, torch.bfloat16, enabled=bf16)


def pad(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Ids int64 and mask bool, both (N, T), of token rows; T is the longest row's."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = np.full((len(rows), longest), fill, np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return torch.from_numpy(ids), torch.arange(longest)[None, :] < lengths[:, None]


@torch.inference_mode()
def embed_texts(package: Package, rows: Sequence[np.ndarray], bf16: bool = False) -> np.ndarray:
    """Unit vectors float32 (N, D) of rows of token ids."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    vectors = np.empty((len(rows), package.config.embed_dim), np.float32)
    for places in np.array_split(np.array(order), max(1, len(rows) // LEAST)):
        ids, mask = (t.to(_device(package)) for t in pad([rows[place] for place in places], package.tokenizer.pad_id))
        with _precision(package, bf16):
            states = package.model.encode_text(ids, mask)
            vectors[places] = package.model.project_text(states[:, 0]).float().cpu().numpy()
    return vectors


@torch.inference_mode()
def embed_images(package: Package, pixels: np.ndarray, bf16: bool = False) -> np.ndarray:
    """Unit vectors float32 (N, D) of pictures uint8 (N, S, S, 3)."""
    levels = torch.from_numpy(np.ascontiguousarray(pixels)).to(_device(package))
    preprocessor = package.preprocessor
    with _precision(package, bf16):
        states = package.model.encode_image(normalize(levels, preprocessor.mean, preprocessor.std))
        return package.model.project_image(states[:, 0]).float().cpu().numpy()


@torch.inference_mode()
def match(
    package: Package,
    rows: Sequence[np.ndarray],
    pixels: np.ndarray,
    pairs: Sequence[tuple[int, int]],
    bf16: bool = False,
) -> np.ndarray:
    """Probability float32 (pairs,) that a text (place in `rows`) and a picture (place in `pixels`) belong together."""
    fusion = package.model.fusion
    assert fusion is not None and fusion.matching is not None
    device, preprocessor = _device(package), package.preprocessor
    ids, mask = (tensor.to(device) for tensor in pad(rows, package.tokenizer.pad_id))
    levels = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
    probabilities = []
    with _precision(package, bf16):
        texts = package.model.encode_text(ids, mask)
        pictures = package.model.encode_image(normalize(levels, preprocessor.mean, preprocessor.std))
        memory = fusion.image_memory(pictures)
        for start in range(0, len(pairs), PAIRS):
            some = torch.tensor(pairs[start : start + PAIRS], device=device)
            seen = [layer.rows(some[:, 1]) for layer in memory]
            states = fusion(texts[some[:, 0]], mask[some[:, 0]], seen)
            probabilities.append(fusion.matching(states[:, 0]).float().softmax(-1)[:, 1].cpu())
    return torch.cat(probabilities).numpy()
