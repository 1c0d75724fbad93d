"""What a run says while it runs: events from Train's rank 0 to the driver, which prints and tracks them."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray

logger = logging.getLogger(__name__)

Event = dict[str, Any]
"""{"kind": "step" | "validation" | "hold" | "alarm", "step": int, "samples": int, "planned": int, "metrics": {...}}.

An alarm has no metrics but key, value, level and text. A hold has those of the validation before it.
"""


@ray.remote(num_cpus=0)
class Mailbox:
    """Keeps events until the driver takes them, and the driver's answers until the run takes them."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._answers: list[bool] = []

    def put(self, event: Event) -> None:
        """Leave an event."""
        self._events.append(event)

    def take(self) -> list[Event]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events

    def answer(self, go_on: bool) -> None:
        """Tell a run that waits at a hold, or the next one, to go on or to leave."""
        self._answers.append(go_on)

    def answered(self) -> bool | None:
        """The next answer; None while there is none."""
        return self._answers.pop(0) if self._answers else None


class Listener:
    """A thread of the driver that hands each event to `handle`, in order, until closed."""

    def __init__(self, handle: Callable[[Event], None], interval: float = 0.5) -> None:
        self.mailbox = Mailbox.remote()  # type: ignore[attr-defined]
        self._handle, self._interval = handle, interval
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hand over what is left and stop."""
        self._closing.set()
        self._thread.join(timeout=30)

    def _listen(self) -> None:
        last = False
        while not last:
            last = self._closing.wait(self._interval)
            try:
                # However long a loaded machine takes: events of a call that is given up would be lost.
                events = ray.get(self.mailbox.take.remote())
            except ray.exceptions.RayError as error:  # the cluster is gone; fit says why
                logger.debug("no more events: %s", error)
                return
            for event in events:
                self._handle(event)


def step_line(event: Event) -> str:
    """One readable line of a step event: step, samples, losses, speed, waiting, time left."""
    metrics, planned = event["metrics"], event["planned"]
    losses = " ".join(
        f"{n.removeprefix('train/loss/')} {v:.3f}" for n, v in metrics.items() if n.startswith("train/loss/")
    )
    speed = metrics["perf/samples_per_second"]
    left = _duration((planned - event["samples"]) / speed) if speed > 0 else "?"
    return (
        f"step {event['step']}  {event['samples']:,}/{planned:,} samples  {losses}  "
        f"{speed:.0f} samples/s  waiting {metrics['perf/data_wait_share']:.0%}  {left} left"
    )


def validation_line(event: Event) -> str:
    """One readable line of a validation event."""
    metrics = event["metrics"]
    return (
        f"step {event['step']}  validation on {int(metrics['val/pairs']):,} pairs: "
        f"recall@1 text to image {metrics['val/image_retrieval_recall_at_1']:.1%}, "
        f"image to text {metrics['val/text_retrieval_recall_at_1']:.1%}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
