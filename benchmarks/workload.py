"""What a step benchmark works on: a preset's model with random weights, a random batch, a full queue.

Axes: B rows, T tokens, S image side, P samples assigned together, K codes, D width of the joint space.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.assignment import build_problem, queue_entries, solve
from models.batch import Batch
from models.codebook import Codebook, Pair, code_sums, transport_sums
from models.codebook_usage import CodeUsage
from models.collectives import SoloWorkers
from models.config import CodebookConfig, InputError
from models.encoders import resolve
from models.losses import block_bytes
from models.masking import SpecialTokens, select_tokens
from models.objectives import ScheduleState
from models.teacher import FeatureQueue
from pipelines.cli.flags import UsageError, parse_flags
from pipelines.config import PRESETS, ExperimentConfig
from pipelines.step.state import StepResult, StepSettings, TrainState
from pipelines.step.training_step import loss_and_gradients, training_step
from pipelines.train.setup import start_state

PAD, CLS, MASK, FIRST_WORD = 0, 2, 4, 5
MEAN_TOKENS, SPREAD_TOKENS, FEWEST_TOKENS = 13.0, 4.0, 4
"""Captions as of COCO and CC3M: ten to eleven words, some cut into pieces, and [CLS]."""


def experiment_of(preset: str, changes: list[str]) -> ExperimentConfig:
    """A preset with `key=value` changes and its architectures written in; raises UsageError for a wrong word."""
    if preset not in PRESETS:
        raise UsageError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    experiment = parse_flags([f"--{change}" for change in changes], PRESETS[preset])
    return experiment.model_copy(update={"encoder": resolve(experiment.encoder)})


@dataclass
class Workload:
    """All that a step takes."""

    state: TrainState
    batch: Batch
    settings: StepSettings
    schedule: ScheduleState

    def step(self) -> StepResult:
        """One whole optimisation step."""
        return training_step(self.state, self.batch, self.settings, self.schedule)


def make_workload(experiment: ExperimentConfig, rows: int, device: torch.device, full_queue: bool = True) -> Workload:
    """As in the middle of a run: codes initialised, terms at full weight, queue full of random directions."""
    state = start_state(experiment, "", device)
    state.codes_initialised = True
    if state.queue is not None and full_queue:
        fill(state.queue)
    tokens = SpecialTokens(PAD, CLS, MASK, experiment.encoder.text.architecture["vocab_size"])
    settings = StepSettings(
        objective=experiment.objective,
        tokens=tokens,
        clip_norm=experiment.optim.clip_norm,
        bf16=experiment.compute.bf16 and device.type == "cuda",
        chunk=experiment.compute.chunk_size,
    )
    batch = to_device(random_batch(experiment, rows, tokens), device)
    return Workload(state, batch, settings, ScheduleState(experiment.objective.alpha))


def random_batch(experiment: ExperimentConfig, rows: int, tokens: SpecialTokens) -> Batch:
    """Distinct random pairs on the CPU; the longest caption has all the tokens that the preset keeps."""
    generator = torch.Generator().manual_seed(0)
    side, width = experiment.encoder.vision.image_size, experiment.encoder.text.max_tokens
    views = torch.randn(2, rows, 3, side, side, generator=generator)
    ids = torch.randint(min(FIRST_WORD, tokens.vocab_size - 1), tokens.vocab_size, (rows, width), generator=generator)
    ids[:, 0] = CLS
    lengths = MEAN_TOKENS + SPREAD_TOKENS * torch.randn(rows, generator=generator)
    lengths = lengths.round().long().clamp(min(FEWEST_TOKENS, width), width)
    lengths[:1] = width
    mask = torch.arange(width)[None] < lengths[:, None]
    ids = ids.masked_fill(~mask, PAD)
    key, image_id, caption_id = torch.randint(-(2**62), 2**62, (3, rows), generator=generator)
    hidden = select_tokens(ids, mask, key, tokens, experiment.objective.mlm_probability).sum(1).tolist()
    return Batch(views[0], views[1], ids, mask, key, image_id, caption_id, tuple(hidden))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same rows on `device`."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(batch, **moved)


def fill(queue: FeatureQueue) -> None:
    """Make every entry a random direction of a pair of its own."""
    size, width = queue.image.shape
    image, text = (unit_rows(size, width, queue.image.device) for _ in range(2))
    ids = torch.randint(-(2**62), 2**62, (2, size), device=queue.image.device)
    queue.enqueue(image, text, ids[0], ids[1])


def unit_rows(rows: int, width: int, device: torch.device) -> Tensor:
    """Random directions."""
    return F.normalize(torch.randn(rows, width, device=device), dim=1)


def assigned(config: CodebookConfig, rows: int, queue: int) -> int:
    """Samples of each modality that are assigned together once the queue is full."""
    return rows + queue_entries(config, rows, queue)


class CodebookAlone:
    """All that a step does with the codebook, and nothing else, at the sizes of an experiment with a full queue."""

    def __init__(self, experiment: ExperimentConfig, rows: int, device: torch.device) -> None:
        objective, width = experiment.objective, experiment.encoder.embed_dim
        self._config, self._limit = objective.codebook, block_bytes(objective)
        self._codebook = Codebook(self._config.size, width).to(device)
        self._usage = CodeUsage(self._config.size, self._config.dead.window_samples_per_code).to(device)
        self._queue = FeatureQueue(objective.queue.size, width).to(device)
        if device.type != "meta":
            fill(self._queue)
        self._student = Pair(*(unit_rows(rows, width, device).requires_grad_() for _ in range(2)))
        self._teacher = Pair(*(unit_rows(rows, width, device) for _ in range(2)))

    def run(self) -> None:
        """Assign, both terms forward and back, count, renormalise."""
        config, rows, codes = self._config, len(self._student.image), self._codebook.unit()
        problem = build_problem(config, torch.stack(self._teacher), self._queue, [rows], SoloWorkers())
        plan = solve(config, problem, codes)
        sums = [
            *code_sums(self._student, self._teacher, codes, plan, config.tau, config.beta_same, self._limit),
            *transport_sums(self._teacher, codes, plan, self._limit),
        ]
        torch.autograd.backward(torch.stack(sums).sum() / rows)
        with torch.no_grad():
            self._usage.count(self._student.image @ codes.T, self._student.text @ codes.T)
        self._codebook.renormalise()


def step_flops(experiment: ExperimentConfig, rows: int) -> int:
    """Floating-point operations of the matrix products and convolutions of a step, attention's included.

    Counted on the meta device, where shapes alone run through the step: exact at any size, nothing is computed. The
    update after the gradients multiplies no matrices. Towers run twice in chunks, and are counted twice.
    """
    plain = experiment.override({"compute.compile": False, "compute.bf16": False})
    work = make_workload(plain, rows, torch.device("cpu"), full_queue=False)
    state = work.state
    modules: list[nn.Module | None] = [state.model, state.teacher, state.queue, state.usage]
    for module in modules:
        if module is not None:
            module.to("meta")
    batch = to_device(work.batch, torch.device("meta"))
    with on_meta(), FlopCounterMode(display=False) as counter:
        loss_and_gradients(state, batch, work.settings, work.schedule, SoloWorkers())
    return int(counter.get_total_flops())


def codebook_flops(experiment: ExperimentConfig, rows: int) -> int:
    """Of these the codebook's, with a full queue."""
    alone = CodebookAlone(experiment, rows, torch.device("meta"))
    with on_meta(), FlopCounterMode(display=False) as counter:
        alone.run()
    return int(counter.get_total_flops())


@contextmanager
def on_meta() -> Iterator[None]:
    """The meta device knows no autocast, which changes no count."""
    with patch.object(torch, "autocast", lambda *_args, **_options: nullcontext()):
        yield


def has_codes(experiment: ExperimentConfig) -> bool:
    """Whether the objective has code or ot."""
    return experiment.objective.weights.code > 0 or experiment.objective.weights.ot > 0


def clip_with(experiment: ExperimentConfig, term: str = "") -> ExperimentConfig:
    """The same model with the objective of `clip`, and one of the preset's terms beside it; cma takes clip's place."""
    objective = experiment.objective
    weights = objective.weights.model_dump()
    chosen = {name: 0.0 for name in weights} | {"cma": 1.0}
    changes: dict[str, object] = {"cma.kind": "clip", "alpha": 0.0}
    if term:
        chosen[term] = weights[term]
        changes["alpha"] = objective.alpha
    if term == "cma":
        changes["cma.kind"] = objective.cma.kind
    if term not in ("code", "ot", "koleo"):
        changes["codebook.koleo"] = 0.0
    changes |= {f"weights.{name}": value for name, value in chosen.items()}
    return experiment.override({f"objective.{key}": value for key, value in changes.items()})


def terms_of(experiment: ExperimentConfig) -> list[str]:
    """Terms of the objective whose cost can be set against `clip`."""
    weights = experiment.objective.weights.model_dump()
    if experiment.objective.cma.kind == "clip":
        weights["cma"] = 0.0
    terms = [name for name, weight in weights.items() if weight > 0]
    if not terms:
        raise InputError("terms: the objective has nothing beside clip")
    return terms
