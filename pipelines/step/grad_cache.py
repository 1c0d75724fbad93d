"""Both towers over a worker's rows, all at once or a few at a time.

In chunks the first pass keeps no graph; when the loss's gradient in the features is known, each chunk is encoded again,
with the same dropout, and its share goes back through it (GradCache, Gao et al., arXiv 2101.06983). The loss is that of
the whole batch; only one chunk's activations are alive.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from models.batch import Batch, Features
from models.encoders import DualEncoder
from pipelines.step.state import StepSettings, autocast


class Chunk(NamedTuple):
    """Rows that are encoded again, and the random generators' state before they first were."""

    rows: slice
    generators: list[Tensor]


class Encoded(NamedTuple):
    """Features of all rows; without `chunks` they carry their graph."""

    features: Features
    chunks: list[Chunk]


def chunk_rows(rows: int, size: int) -> list[slice]:
    """Slices of at most `size` rows (0: all); one empty slice where there is no row."""
    size = size or rows
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)] if rows else [slice(0, 0)]


def encode(model: DualEncoder, pixels: Tensor, batch: Batch, rows: slice = slice(None)) -> Features:
    """Both towers over some of this worker's rows, `pixels` being all rows' views."""
    image_tokens = model.encode_image(pixels[rows])
    text_tokens = model.encode_text(batch.ids[rows], batch.mask[rows])
    image, text = model.project_image(image_tokens[:, 0]), model.project_text(text_tokens[:, 0])
    return Features(image_tokens, text_tokens, image, text)


def encode_all(model: DualEncoder, pixels: Tensor, batch: Batch, settings: StepSettings) -> Encoded:
    """Both towers over all rows of this worker, in chunks where the settings ask for it."""
    slices = chunk_rows(len(batch), settings.chunk)
    with autocast(settings, pixels.device):
        if len(slices) == 1:
            return Encoded(encode(model, pixels, batch), [])
        chunks, features = [], []
        with torch.no_grad():
            for rows in slices:
                chunks.append(Chunk(rows, _generators(pixels.device)))
                features.append(encode(model, pixels, batch, rows))
        return Encoded(Features(*map(torch.cat, zip(*features, strict=True))), chunks)


def backward_through_towers(
    model: DualEncoder, batch: Batch, encoded: Encoded, gradients: dict[str, Tensor], settings: StepSettings
) -> None:
    """Run the gradients in the student's features (by field name) back to its parameters."""
    if not encoded.chunks:
        backward_from(encoded.features, gradients)
    for rows, generators in encoded.chunks:
        with _replayed(generators, batch.view1.device), autocast(settings, batch.view1.device):
            again = encode(model, batch.view1, batch, rows)
        backward_from(again, {name: gradient[rows] for name, gradient in gradients.items()})


def backward_from(features: Features, gradients: dict[str, Tensor]) -> None:
    """Run `gradients`, by the features' field names, back to the parameters."""
    outputs = [getattr(features, name) for name in gradients]
    torch.autograd.backward(
        outputs, [gradient.to(output.dtype) for output, gradient in zip(outputs, gradients.values(), strict=True)]
    )


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _replayed(generators: list[Tensor], device: torch.device) -> Iterator[None]:
    """The generators at the given state inside, and as they were before afterwards: dropout repeats its masks."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.set_rng_state(generators[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(generators[1], device)
        yield
