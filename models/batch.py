"""What a training step knows of its rows: inputs, features, and which rows are the same image or caption.

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
class FixedDraws:
    """Draws given from outside in place of the samples' own, to compare with other implementations."""

    negative_image: Int[Tensor, " B"]
    """Row of the wrong image of each pair, among all rows."""
    negative_text: Int[Tensor, " B"]
    """Row of the wrong text of each pair, among all rows."""
    masked: Masked | None = None
    """Hidden tokens; None: the samples' own."""


@dataclass(frozen=True)
class Batch:
    """A worker's rows of one step, on its device.

    `key` seeds each row's random draws; `image_id` and `caption_id` are hashes of the image and of the caption.
    """

    view1: Float[Tensor, "B 3 S S"]
    view2: Float[Tensor, "B 3 S S"]
    ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    key: Int[Tensor, " B"]
    image_id: Int[Tensor, " B"]
    caption_id: Int[Tensor, " B"]
    hidden: tuple[int, ...] | None = None
    """Tokens that masked language modelling hides in each row, counted on the CPU to spare a wait for the device; None:
    not counted."""
    fixed_draws: FixedDraws | None = None

    def __len__(self) -> int:
        return len(self.key)


class Features(NamedTuple):
    """What one branch (student or teacher) makes of rows: token states, [CLS] first, and unit vectors."""

    image_tokens: Float[Tensor, "B P V"]
    text_tokens: Float[Tensor, "B T W"]
    image: Float[Tensor, "B D"]
    text: Float[Tensor, "B D"]


class LocalParts(NamedTuple):
    """The teacher's local parts of all rows (docs/spec/tcl.md 2.3): pooled patches, and tokens without [CLS]."""

    image: Float[Tensor, "N K D"]
    text: Float[Tensor, "N L D"]
    text_valid: Bool[Tensor, "N L"]


class Identity(NamedTuple):
    """What each candidate is to each row; C = N + M candidates: the batch's rows, then the queue's entries."""

    positive: Bool[Tensor, "B C"]
    """The row's own pair, and with `duplicates: positive` every pair with the same image."""
    left_out: Bool[Tensor, "B C"]
    """Neither positive nor negative: a duplicate of the row, or a queue entry not written yet."""
    same: Bool[Tensor, "B N"]
    """Same image or same caption as the row, so never drawn as its wrong partner."""
    local_negative: Bool[Tensor, "B N"]
    """Samples whose local parts are the row's negatives in lmi."""


@dataclass(frozen=True)
class Context:
    """Everything the terms read. `all_*` are the rows of all workers, of which this worker's begin at `offset`."""

    batch: Batch
    student: Features
    all_student: Features
    all_mask: Bool[Tensor, "N T"]
    teacher: Features | None
    keys: tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]] | None
    """Teacher vectors (image, text) of all rows."""
    local_parts: LocalParts | None
    queue: FeatureQueue | None
    identity: Identity
    offset: int
    temperature: Float[Tensor, ""]
    schedule: ScheduleState
    codes: Float[Tensor, "codes D"] | None = None
    """The codebook's unit rows, with their gradient."""
    plan: TransportPlan | None = None
    """How samples are assigned to the codes: problem 0 are the images, 1 the texts."""


def identify(
    mine: Int[Tensor, "2 B"],
    everyone: Int[Tensor, "2 N"],
    offset: int,
    queue: FeatureQueue | None,
    duplicates: str,
) -> Identity:
    """Tell own pair, positives and left-out candidates apart; ids are rows of (image hash, caption hash).

    `mask` leaves out candidates of equal image or caption other than the own pair, `positive` makes equal images
    positives (docs/spec/tcl.md 3), `ignore` treats all but the own pair as negatives (the reference's pre-training).
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
