"""What a training step knows of its rows: inputs, features, who is who.

Axes: B rows here, N rows of all workers (of this one with `negatives: local`), M queue entries, D joint width; tokens
as in `models/encoders.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.masking import Masked
from models.objectives import ScheduleState
from models.teacher import FeatureQueue
from models.transport import TransportPlan


@dataclass(frozen=True)
class Batch:
    """A worker's rows of one step, on its device; `key` owns the draws, the ids are hashes of image and caption."""

    view1: Float[Tensor, "B 3 S S"]
    view2: Float[Tensor, "B 3 S S"]
    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    key: Int[Tensor, " B"]
    image_id: Int[Tensor, " B"]
    caption_id: Int[Tensor, " B"]
    hidden: tuple[int, ...] | None = None
    """How many tokens of each row masked language modelling hides, where the host knows: it need not ask the device."""

    def __len__(self) -> int:
        return len(self.key)


class Features(NamedTuple):
    """What one branch (student or teacher) says of rows: token states and unit vectors."""

    image_tokens: Float[Tensor, "B P V"]
    text_tokens: Float[Tensor, "B T W"]
    image: Float[Tensor, "B D"]
    text: Float[Tensor, "B D"]


class Locals(NamedTuple):
    """The teacher's local parts of all rows (TCL spec 2.3): pooled patches, and tokens without [CLS]."""

    image: Float[Tensor, "N K D"]
    text: Float[Tensor, "N L D"]
    text_valid: Bool[Tensor, "N L"]


class Identity(NamedTuple):
    """Which candidates are which; C = N + M: the batch's columns, then the queue's."""

    positive: Bool[Tensor, "B C"]
    """The own pair, and what counts as another view of it."""
    left_out: Bool[Tensor, "B C"]
    """Neither positive nor negative."""
    same: Bool[Tensor, "B N"]
    """Never drawn as a mismatch."""
    local_negative: Bool[Tensor, "B N"]
    """Samples whose local parts are negatives."""


@dataclass(frozen=True)
class FixedDraws:
    """Draws given from outside in place of the samples' own, to compare with other implementations."""

    negative_image: Int[Tensor, " B"]
    negative_text: Int[Tensor, " B"]
    masked: Masked | None = None


@dataclass(frozen=True)
class Context:
    """Everything the terms look at. `all_*` stand for the rows of all workers, this one's from `offset` on."""

    batch: Batch
    student: Features
    all_student: Features
    all_mask: Bool[Tensor, "N T"]
    teacher: Features | None
    keys: tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]] | None
    """Teacher vectors (image, text) of all rows."""
    locals: Locals | None
    queue: FeatureQueue | None
    identity: Identity
    offset: int
    temperature: Float[Tensor, ""]
    schedule: ScheduleState
    codes: Float[Tensor, "codes D"] | None = None
    """The codebook's unit rows, with their gradient."""
    plan: TransportPlan | None = None
    """How samples are assigned to them: problem 0 are the images, 1 the texts."""
    fixed_draws: FixedDraws | None = None


def identify(
    mine: Int[Tensor, "2 B"],
    everyone: Int[Tensor, "2 N"],
    offset: int,
    queue: FeatureQueue | None,
    duplicates: str,
) -> Identity:
    """Tell own pair, positives and left-out candidates apart; ids are rows of (image hash, caption hash).

    `mask` leaves out candidates of equal image or caption other than the own pair, `positive` makes equal images
    positives (TCL spec 3), `ignore` treats all but the own pair as negatives (the reference's pre-training).
    """
    rows, columns, device = mine.shape[1], everyone.shape[1], mine.device
    known, filled = everyone, torch.ones(columns, dtype=torch.bool, device=device)
    if queue is not None:
        known = torch.cat([everyone, torch.stack([queue.image_id, queue.caption_id])], 1)
        filled = torch.cat([filled, queue.valid])
    places = torch.arange(known.shape[1], device=device)
    own = places[None] == torch.arange(offset, offset + rows, device=device)[:, None]
    positive = same = own
    left_out = torch.zeros_like(own)
    if duplicates != "ignore":
        same_image, same_caption = (mine[:, :, None] == known[:, None, :]) & filled
        if duplicates == "mask":
            same = own | same_image | same_caption
            left_out = same & ~own
        else:
            positive = same = own | same_image
    local_negative = ~same if duplicates == "mask" else ~own
    return Identity(positive, left_out | ~filled, same[:, :columns], local_negative[:, :columns])
