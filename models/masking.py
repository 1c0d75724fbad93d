"""Which tokens masked language modelling hides, and with what (docs/spec/tcl.md 2.5; BERT, arXiv 1810.04805)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from models import sample_rng


class Masked(NamedTuple):
    """A corrupted caption and what stood there."""

    ids: Int[Tensor, "B T"]
    selected: Bool[Tensor, "B T"]
    original: Int[Tensor, "B T"]


class SpecialTokens(NamedTuple):
    """Ids of the tokens that are not words; `mask` is -1 where the tokeniser has none."""

    pad: int
    cls: int
    mask: int
    vocab_size: int


def select_tokens(
    ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], keys: Int[Tensor, " B"], tokens: SpecialTokens, share: float
) -> Bool[Tensor, "B T"]:
    """Which real tokens other than [CLS] are hidden; the draw is the sample's own."""
    selected = sample_rng.uniform(keys, sample_rng.MASK, ids.shape[1]) < share
    return selected & mask & (ids != tokens.pad) & (ids != tokens.cls)


def mask_tokens(
    ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], keys: Int[Tensor, " B"], tokens: SpecialTokens, share: float
) -> Masked:
    """Select `share` of the real tokens other than [CLS]; 80 % become [MASK], 10 % any id, 10 % stay.

    The draws are the sample's own (`keys`), so they do not depend on the batch or the worker.
    """
    width = ids.shape[1]
    selected = select_tokens(ids, mask, keys, tokens, share)
    kind = sample_rng.uniform(keys, sample_rng.MASK_KIND, width)
    word = (sample_rng.uniform(keys, sample_rng.MASK_WORD, width) * tokens.vocab_size).long()
    corrupted = torch.where(kind < 0.8, torch.full_like(ids, tokens.mask), torch.where(kind < 0.9, word, ids))
    return Masked(torch.where(selected, corrupted, ids), selected, ids)
