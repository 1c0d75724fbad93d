"""Golden case B and small random pairs for the tests of the codebook."""

import json
from typing import Any

import torch
import torch.nn.functional as F

from models.codebook import Pair
from models.collectives import SoloWorkers
from models.transport import Scores, TransportPlan, sinkhorn
from tests.support.paths import GOLDEN

GOLDEN = GOLDEN / "codebook"
CASE: dict[str, Any] = json.loads((GOLDEN / "B.json").read_text())
EPS = ("eps0.05", "eps0.25")
LIMIT = 2**26
SOLO = SoloWorkers()


def number(value: torch.Tensor) -> float:
    return value.detach().item()


def unit(rows: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return F.normalize(torch.tensor(rows, dtype=dtype), dim=1)


def raw(dtype: torch.dtype = torch.float64) -> tuple[Pair, Pair, torch.Tensor]:
    """Case B: students, teachers, raw codes."""
    inputs = CASE["inputs_raw"]
    student, teacher = (Pair(*(unit(inputs[f"{side}_{m}"], dtype) for m in "vt")) for side in ("student", "teacher"))
    return student, teacher, torch.tensor(inputs["codebook"], dtype=dtype)


def plan_of(teacher: Pair, codes: torch.Tensor, eps: float, iters: int = 3, balance: float = 1.0) -> TransportPlan:
    scores = Scores(torch.stack([teacher.image, teacher.text]), codes)
    return sinkhorn(scores, torch.ones(len(teacher.image), dtype=torch.bool), eps, iters, balance, SOLO)


def random_pairs(rows: int = 6, codes: int = 5, width: int = 4, seed: int = 0) -> tuple[Pair, Pair, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(4, rows, width, generator=generator, dtype=torch.float64), dim=2)
    table = F.normalize(torch.randn(codes, width, generator=generator, dtype=torch.float64), dim=1)
    return Pair(vectors[0], vectors[1]), Pair(vectors[2], vectors[3]), table
