"""Golden cases, random unit vectors and loops that the tests of codebook and transport share."""

import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.codebook import Pair
from models.collectives import SoloWorkers
from models.transport import Scores, TransportPlan, sinkhorn
from tests.support.paths import GOLDEN


def golden(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "codebook" / f"{case}.json").read_text())


CASE = golden("B")
EPS = ("eps0.05", "eps0.25")
LIMIT = 2**26
SOLO = SoloWorkers()


def number(value: Tensor) -> float:
    return value.detach().item()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Random vectors of length 1."""
    return F.normalize(numbers(*shape, seed=seed), dim=-1)


def unit_rows(rows: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Given rows, scaled to length 1."""
    return F.normalize(torch.tensor(rows, dtype=dtype), dim=1)


def raw(dtype: torch.dtype = torch.float64) -> tuple[Pair, Pair, Tensor]:
    """Case B: students, teachers, raw codes."""
    inputs = CASE["inputs_raw"]
    student, teacher = (Pair(*(unit_rows(inputs[f"{b}_{m}"], dtype) for m in "vt")) for b in ("student", "teacher"))
    return student, teacher, torch.tensor(inputs["codebook"], dtype=dtype)


def plan_of(teacher: Pair, codes: Tensor, eps: float, iters: int = 3, balance: float = 1.0) -> TransportPlan:
    scores = Scores(torch.stack([teacher.image, teacher.text]), codes)
    return sinkhorn(scores, torch.ones(len(teacher.image), dtype=torch.bool), eps, iters, balance, SOLO)


def random_pairs(rows: int = 6, codes: int = 5, width: int = 4, seed: int = 0) -> tuple[Pair, Pair, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(4, rows, width, generator=generator, dtype=torch.float64), dim=2)
    table = F.normalize(torch.randn(codes, width, generator=generator, dtype=torch.float64), dim=1)
    return Pair(vectors[0], vectors[1]), Pair(vectors[2], vectors[3]), table


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
