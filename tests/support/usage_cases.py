"""Numbers and loops shared by the tests of usage and of metrics."""

import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.collectives import SoloWorkers
from tests.support.paths import GOLDEN

SOLO = SoloWorkers()


def golden(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "codebook" / f"{case}.json").read_text())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(numbers(*shape, seed=seed), dim=-1)


def nearest(codes: list[int], size: int) -> Tensor:
    """Scores whose largest are at the given codes."""
    return F.one_hot(torch.tensor(codes, dtype=torch.int64), size).double()


def as_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    assert all(value.shape == () for value in metrics.values())
    return {key: float(value) for key, value in metrics.items()}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def entropy(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)
