"""Which samples come when, on which worker, and what is left: pure functions of manifest, seed, epoch and what is done.

Order never depends on the number of workers: a group's samples have one permutation, and a checkpoint says how many
places of it are done; what remains is dealt group by group, whatever the world size was before.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from models.config import InputError
from pipelines.data.sample import Unit

UNITS_A_GROUP = 4
BYTES_A_GROUP = 128 * 2**20


@dataclass(frozen=True)
class Group:
    """Units that one task reads and mixes."""

    group: int
    """Its number in the epoch's order."""
    units: tuple[int, ...]
    """Numbers of its units, in the order in which their samples are counted."""
    count: int
    """Samples."""


Share = list[tuple[Group, int]]
"""Groups of one worker in order, each with the places of its permutation that are done already."""


@dataclass(frozen=True)
class Position:
    """How far an epoch has come; the rest of it can be planned from this alone."""

    epoch: int = 0
    done: dict[int, int] = field(default_factory=dict)
    """Places consumed, by group; a group that is not named has not begun."""

    def replace_done(self, done: Mapping[int, int]) -> Self:
        """The same epoch, further on."""
        return type(self)(self.epoch, dict(done))

    def to_json(self) -> dict[str, Any]:
        """A tree for `position.json`."""
        return {"epoch": self.epoch, "done": {str(group): places for group, places in sorted(self.done.items())}}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Back from `to_json`; raises KeyError or ValueError for another tree."""
        return cls(int(tree["epoch"]), {int(group): int(places) for group, places in tree["done"].items()})


def merge(parts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """What all workers have done: of each group the most places."""
    done: dict[int, int] = {}
    for part in parts:
        for group, places in part.items():
            done[group] = max(places, done.get(group, 0))
    return done


def groups(units: Sequence[Unit], seed: int, epoch: int) -> list[Group]:
    """The epoch's groups in order: units shuffled by (seed, epoch), taken four at a time, at most 128 MiB together."""
    return bundle([units[place] for place in _shuffled(len(units), "units", seed, epoch)])


def bundle(units: Iterable[Unit]) -> list[Group]:
    """Groups of units that follow one another."""
    found: list[Group] = []
    taken: list[Unit] = []

    def close() -> None:
        found.append(Group(len(found), tuple(u.unit for u in taken), sum(u.count for u in taken)))
        taken.clear()

    for unit in units:
        if taken and (len(taken) == UNITS_A_GROUP or sum(u.length for u in taken) + unit.length > BYTES_A_GROUP):
            close()
        taken.append(unit)
    if taken:
        close()
    return found


def permutation(group: Group, seed: int, epoch: int) -> np.ndarray:
    """The order of a group's samples: int64 (count,), numbers into its units' samples one unit after the other."""
    return _shuffled(group.count, "samples", seed, epoch, group.group)


def shares(epoch_groups: Sequence[Group], done: Mapping[int, int], world: int) -> list[Share]:
    """What remains, dealt in order, each group to the rank with the fewest rows so far (of equals the lowest)."""
    dealt: list[Share] = [[] for _ in range(world)]
    rows = [0] * world
    for group in epoch_groups:
        skip = done.get(group.group, 0)
        if skip < group.count:
            rank = rows.index(min(rows))
            dealt[rank].append((group, skip))
            rows[rank] += group.count - skip
    return dealt


def require_groups(epoch_groups: Sequence[Group], world: int) -> None:
    """Raise InputError where some worker would have no group of its own."""
    if world > len(epoch_groups):
        raise InputError(
            f"compute.workers: {world} workers, but the data has only {len(epoch_groups)} groups of samples; "
            f"use at most {len(epoch_groups)}"
        )


def _shuffled(count: int, *key: object) -> np.ndarray:
    """The numbers below `count` in an order that depends on the key alone, on every version and machine.

    The order of SplitMix64's outputs (Steele et al., OOPSLA 2014), begun at a hash of the key.
    """
    start = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "<u8")
    state = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable").astype(np.int64)
