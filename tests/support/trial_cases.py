"""A trial of a sweep without the actor that Tune makes of it, and a mailbox that keeps its events."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray

from pipelines.config import ExperimentConfig
from pipelines.train.alarms import COLLAPSE
from pipelines.train.events import Event
from tuning.sweep.trial import TrialRun

TEXT = f"{COLLAPSE} 0.95 is above 0.9: pairs agree because few codes are in use"


class FakeMailbox:
    """A mailbox in this process: keeps the events, and hands each to `handle`."""

    def __init__(self, handle: Callable[[Event], Any] = lambda event: None) -> None:
        self.events: list[Event] = []
        self.put, self._handle = SimpleNamespace(remote=self._put), handle

    def _put(self, event: Event) -> Any:
        self.events.append(event)
        self._handle(event)
        return ray.put(None) if ray.is_initialized() else None


class ListenerWithoutThread:
    """A listener that handles each event when it is sent, instead of in a thread."""

    def __init__(self, handle: Callable[[Event], None], interval: float = 0.0) -> None:
        self.mailbox = FakeMailbox(handle)

    def close(self) -> None:
        """Nothing is left."""


def trial_run(base: ExperimentConfig, mailbox: FakeMailbox) -> TrialRun:
    made = TrialRun.__new__(TrialRun)  # as Tune's actor makes it, without the actor
    made.setup({"task": {"trial_id": "t00", "overrides": {}}}, base, (), mailbox)
    return made
