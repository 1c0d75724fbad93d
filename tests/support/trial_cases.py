"""A trial of a sweep without the actor that Tune makes of it, and who hears what it says."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray

from pipelines.config import ExperimentConfig
from pipelines.train.alarms import COLLAPSE
from pipelines.train.events import Event
from tuning.sweep.trial import TrialRun

TEXT = f"{COLLAPSE} 0.95 is above 0.9: pairs agree because few codes are in use"


class Post:
    """Stands for a mailbox."""

    def __init__(self, hear: Callable[[Event], Any] = lambda event: None) -> None:
        self.events: list[Event] = []
        self.put, self._hear = SimpleNamespace(remote=self._put), hear

    def _put(self, event: Event) -> Any:
        self.events.append(event)
        self._hear(event)
        return ray.put(None) if ray.is_initialized() else None


def run_of(base: ExperimentConfig, post: Post) -> TrialRun:
    made = TrialRun.__new__(TrialRun)  # as Tune's actor makes it, without the actor
    made.setup({"task": {"trial_id": "t00", "overrides": {}}}, base, (), post)
    return made
