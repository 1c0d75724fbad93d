"""Seconds of a training step by part, taken from outside: the step's own functions are wrapped while it is measured.

A part's time is exclusive, so parts and `other` add up to the step exactly. The step runs one backward pass over
several terms; here each part's terms go back by themselves, and what matching and masked language share of the fusion
encoder, the images' keys and values, is cut off as leaves and goes back last, once. Gradients are the same up to the
order in which they are summed (tests/benchmarks/test_step.py). On a GPU each boundary waits for the device.

    towers     student's image and text tower with projections, forward and backward
    teacher    its towers forward, and the moving average
    contrast   cma, imc, lmi with their share of the backward pass; the teacher's local parts; which rows are negatives
    codebook   assignment, code, ot, koleo with their backward, usage counts, renormalisation
    matching   hard negatives, fusion passes of itm, backward
    language   masks, text towers and fusion encoders over masked captions (student and teacher), backward
    memory     keys and values of the student's image tokens for matching and language, forward and backward
    optimiser  clearing, clipping and AdamW
    other      leaves, gathers, counts, queue
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import models.fusion_losses
import models.losses
import pipelines.step.context
import pipelines.step.training_step
from models.codebook import Codebook
from models.fusion import FusionEncoder, KeysValues
from models.objectives import TERMS

PARTS = ("towers", "teacher", "contrast", "codebook", "matching", "language", "memory", "optimiser", "other")
PART_OF_TERM = {term: "contrast" for term in ("cma", "imc", "lmi")} | {
    "code": "codebook",
    "ot": "codebook",
    "koleo": "codebook",
    "itm": "matching",
    "mlm": "language",
}
WRAPPED: tuple[tuple[Any, str, str], ...] = (
    (pipelines.step.training_step, "encode_all", "towers"),
    (pipelines.step.training_step, "backward_through_towers", "towers"),
    (pipelines.step.training_step, "update_teacher", "teacher"),
    (pipelines.step.context, "encode_all", "teacher"),
    (pipelines.step.context, "teacher_locals", "contrast"),
    (pipelines.step.context, "identify", "contrast"),
    (pipelines.step.training_step, "contrast_parts", "contrast"),
    (pipelines.step.context, "init_codes", "codebook"),
    (pipelines.step.context, "assign_codes", "codebook"),
    (models.losses, "codebook_parts", "codebook"),
    (pipelines.step.training_step, "count_usage", "codebook"),
    (Codebook, "unit", "codebook"),
    (Codebook, "renormalise", "codebook"),
    (models.fusion_losses, "hard_negatives", "matching"),
    (models.fusion_losses, "matching_sum", "matching"),
    (models.fusion_losses, "mask_tokens", "language"),
    (models.fusion_losses, "language_sums", "language"),
    (pipelines.step.training_step, "sum_gradients", "optimiser"),
    (torch.nn.utils, "clip_grad_norm_", "optimiser"),
    (torch.optim.AdamW, "step", "optimiser"),
    (torch.optim.AdamW, "zero_grad", "optimiser"),
)
"""Where a function is looked up, its name there, and the part that it belongs to."""


class Stopwatch:
    """Charges the time that passes to the innermost part that is running."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._running = ["other"]
        self._since = now(device)

    @property
    def idle(self) -> bool:
        """Whether no part is running."""
        return len(self._running) == 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time of the block, without that of parts within it, is this part's."""
        self.charge()
        self._running.append(name)
        try:
            yield
        finally:
            self.charge()
            self._running.pop()

    def charge(self) -> None:
        """Add the time since the last call to the part that is running."""
        current = now(self._device)
        self.seconds[self._running[-1]] += current - self._since
        self._since = current


def now(device: torch.device) -> float:
    """Seconds of the clock, once the device has finished all that was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class SharedMemory:
    """The images' keys and values that matching and language share, as leaves between forward and backward."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._make = FusionEncoder.image_memory
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def image_memory(self, fusion: FusionEncoder, tokens: Tensor) -> list[KeysValues]:
        """In place of `FusionEncoder.image_memory`; inside a part it is that part's own and is not cut."""
        if not self._stopwatch.idle:
            return self._make(fusion, tokens)
        with self._stopwatch.part("memory"):
            made = self._make(fusion, tokens)
            leaves = [KeysValues(*(tensor.detach().requires_grad_() for tensor in layer)) for layer in made]
            self._pairs = [pair for both in zip(made, leaves, strict=True) for pair in zip(*both, strict=True)]
        return leaves

    def backward(self) -> None:
        """Take the leaves' gradients on, if there are any."""
        pairs, self._pairs = self._pairs, []
        if pairs:
            with self._stopwatch.part("memory"):
                torch.autograd.backward([made for made, _ in pairs], [leaf.grad for _, leaf in pairs])


@contextmanager
def split(device: torch.device) -> Iterator[dict[str, float]]:
    """While the block runs, a training step's seconds are added up by part; complete when the block has ended."""
    stopwatch = Stopwatch(device)
    memory, backward = SharedMemory(stopwatch), pipelines.step.training_step._backward

    def backward_by_part(sums: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
        for part in dict.fromkeys(PART_OF_TERM.values()):
            names = [name for term, of in PART_OF_TERM.items() if of == part for name in TERMS[term]]
            mine = {name: sums[name] for name in names if name in sums}
            if mine:
                with stopwatch.part(part):
                    backward(mine, scales)
        memory.backward()

    with ExitStack() as stack:
        for owner, name, part in WRAPPED:
            stack.enter_context(patch.object(owner, name, _charged(getattr(owner, name), stopwatch, part)))
        stack.enter_context(patch.object(pipelines.step.training_step, "_backward", backward_by_part))
        stack.enter_context(
            patch.object(FusionEncoder, "image_memory", lambda fusion, tokens: memory.image_memory(fusion, tokens))
        )
        stopwatch.charge()
        stopwatch.seconds.update(dict.fromkeys(PARTS, 0.0))
        yield stopwatch.seconds
        stopwatch.charge()


def _charged(function: Callable[..., Any], stopwatch: Stopwatch, part: str) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.part(part):
            return function(*args, **kwargs)

    return timed
