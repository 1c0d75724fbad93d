"""Places of a run at which it asks whoever follows it whether to go on; a sweep's scheduler answers there."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from models.collectives import Workers

PAUSE = 0.1
"""Seconds between two looks for the answer."""


class Holds:
    """The holds that a run has still before it; every worker asks alike and hears the same."""

    def __init__(self, holds: Sequence[int], seen: int, planned: int, mailbox: Any) -> None:
        """`holds` are samples seen; those that are behind and the run's end ask nothing."""
        self._left = sorted(hold for hold in holds if seen < hold < planned)
        self._planned, self._mailbox = planned, mailbox

    def may_go_on(self, seen: int, tell: Callable[[], None], workers: Workers, device: torch.device) -> bool:
        """Whether training goes on after `seen` samples; at a hold it tells, and waits for the answer."""
        passed = sum(hold <= seen for hold in self._left)
        self._left = self._left[passed:]
        if not passed or seen >= self._planned:
            return True
        tell()
        leaves = torch.zeros(1, device=device)
        if workers.rank == 0:
            while (answer := ray.get(self._mailbox.answered.remote())) is None:
                time.sleep(PAUSE)
            leaves += not answer
        return not workers.all_reduce_sum(leaves).item()
