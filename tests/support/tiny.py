"""Models and batches small enough for loops and several ranks."""

import torch

from models.batch import Batch
from models.config import EncoderConfig, FusionConfig, ObjectiveConfig, TextConfig, VisionConfig
from models.encoders import resolve
from models.masking import SpecialTokens
from models.objectives import build_model
from models.sample_rng import hash64
from pipelines.config import PRESETS
from pipelines.step.state import StepSettings, TrainState, make_state, parameter_groups

TOKENS = SpecialTokens(pad=0, cls=2, mask=4, vocab_size=40)
IMAGE = 16


def encoder(**changes) -> EncoderConfig:
    """A resolved encoder of a few thousand parameters; 4 x 4 patches."""
    config = EncoderConfig(
        vision=VisionConfig(image_size=IMAGE, patch_size=4, width=16, layers=1, heads=2, initializer_range=0.2),
        text=TextConfig(
            vocab_size=TOKENS.vocab_size,
            max_tokens=8,
            max_positions=8,
            width=16,
            layers=1,
            heads=2,
            mlp_ratio=2,
            initializer_range=0.2,
        ),
        fusion=FusionConfig(layers=1),
        embed_dim=8,
    )
    return resolve(config.override(changes))


def objective(preset: str, **changes) -> ObjectiveConfig:
    """The objective of a preset, `sigmoid` besides, a queue of 7, 5 codes; keywords are dotted keys, __ for the dot."""
    name = "clip" if preset == "sigmoid" else preset
    kind = {"cma.kind": "sigmoid"} if preset == "sigmoid" else {}
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return PRESETS[f"{name}-base"].objective.override(
        {"queue.size": 7, "codebook.size": 5, "mlm_probability": 0.4} | kind | dotted
    )


def batch(rows: int, seed: int = 0, tokens: int = 6, dtype: torch.dtype = torch.float64) -> Batch:
    """Random pairs with captions of 1 to `tokens` tokens; every third image and every fourth caption comes twice."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, rows, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(5, TOKENS.vocab_size, (rows, tokens), generator=generator)
    ids[:, 0] = TOKENS.cls
    lengths = torch.randint(min(2, tokens), tokens + 1, (rows,), generator=generator)
    mask = torch.arange(tokens)[None] < lengths[:, None]
    image_id = torch.tensor([hash64("image", seed, row - (row % 3 == 2)) for row in range(rows)], dtype=torch.int64)
    caption_id = torch.tensor([hash64("caption", seed, row - (row % 4 == 3)) for row in range(rows)], dtype=torch.int64)
    key = torch.tensor([hash64("key", seed, row) for row in range(rows)], dtype=torch.int64)
    return Batch(pixels[0], pixels[1], ids.masked_fill(~mask, TOKENS.pad), mask, key, image_id, caption_id)


def part(whole: Batch, first: int, count: int) -> Batch:
    """Some rows of a batch."""
    fields = {name: getattr(whole, name) for name in Batch.__dataclass_fields__}
    return Batch(**{name: value[first : first + count] for name, value in fields.items() if value is not None})


def state(goal: ObjectiveConfig, seed: int = 0, dtype: torch.dtype = torch.float64, rate: float = 1e-3) -> TrainState:
    """A fresh model with its teacher, queue and optimiser."""
    torch.manual_seed(seed)
    model = build_model(encoder(), goal).train().to(dtype)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=rate)
    return make_state(model, goal, optimizer)


def settings(goal: ObjectiveConfig, **changes) -> StepSettings:
    """Settings of a step on `batch`."""
    return StepSettings(goal, TOKENS, **changes)
