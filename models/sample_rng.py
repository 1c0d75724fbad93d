"""Random numbers that belong to a sample: pure functions of (key, stream), the same on any worker and device.

A counter-based generator (SplitMix64, Steele et al., OOPSLA 2014) over whole tensors: no state, no order of calls.
"""

import hashlib
from operator import index
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

CROP, COLOUR, MASK, MASK_KIND, MASK_WORD, NEGATIVE_IMAGE, NEGATIVE_TEXT, CAPTION = range(8)
"""Streams, one for each purpose, so that no two purposes draw the same numbers."""


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed number torch stores."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA, _MIX1, _MIX2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hash64(*parts: str | bytes | SupportsIndex) -> int:
    """A signed 64-bit hash of texts, bytes and whole numbers of any kind, stable over processes and machines."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part if isinstance(part, str) else index(part)).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _mix(state: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """SplitMix64's finaliser; int64 arithmetic wraps, shifts are made logical by masking the sign's copies."""
    state = (state ^ ((state >> 30) & (2**34 - 1))) * _MIX1
    state = (state ^ ((state >> 27) & (2**37 - 1))) * _MIX2
    return state ^ ((state >> 31) & (2**33 - 1))


def uniform(keys: Int[Tensor, " B"], stream: int, count: int) -> Float[Tensor, "B count"]:
    """`count` float64 numbers in [0, 1) for each key, of the stream of one purpose."""
    counter = torch.arange(1, count + 1, device=keys.device) + stream * 2**32
    bits = _mix(_mix(keys)[:, None] + counter[None] * _GAMMA)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53
