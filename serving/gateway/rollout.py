"""What gateways are told to serve, and what they say they do: the two-phase switch, without Ray.

A version is first opened by every gateway, then made current; the one before is let go of by every gateway before its
replicas end. Each gateway switches in one assignment, so that a reply is never of two versions.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from serving.model_source import Wanted

FRESH = 10.0
"""Seconds for which a gateway's word counts; one that is silent for longer is taken for dead."""


@dataclass(frozen=True)
class Report:
    """What a gateway says of itself."""

    gateway: str
    opened: Mapping[str, Wanted]
    """Versions that it holds handles to, by application."""
    current: str
    """Application that new requests go to; "" before the first."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Applications that it could not open, and why."""


@dataclass(frozen=True)
class Orders:
    """What gateways are to do."""

    served: Mapping[str, Wanted]
    """Versions to hold open, by application; all others are let go of once their last request is answered."""
    current: str
    alarm: str = ""
    draining: bool = False
    """Take no more connections: the service ends."""

    def fulfilled(self, report: Report) -> bool:
        """Whether the gateway is where it should be."""
        return set(report.opened) == set(self.served) and report.current == self.current and not self.draining


class Rollout:
    """The orders of the moment and the last word of each gateway."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[Report, float]] = {}
        self.orders = Orders({}, "")

    def hear(self, report: Report) -> None:
        """Take a gateway's word."""
        self._heard[report.gateway] = report, self._clock()

    @property
    def gateways(self) -> list[Report]:
        """The last word of each gateway that is alive."""
        now = self._clock()
        self._heard = {name: heard for name, heard in self._heard.items() if now - heard[1] < FRESH}
        return [report for report, _ in self._heard.values()]

    def adopt(self) -> None:
        """Go on from what gateways have, after a restart; what most of them serve is current."""
        reports = [report for report in self.gateways if report.current]
        if reports:
            currents = [report.current for report in reports]
            served = {name: wanted for report in reports for name, wanted in report.opened.items()}
            self.orders = Orders(served, max(set(currents), key=currents.count))

    def opened_by_all(self, application: str) -> bool:
        """First phase: every gateway has opened the version; raises ValueError where one says that it cannot."""
        reports = self.gateways
        reasons = [report.failed[application] for report in reports if application in report.failed]
        if reasons:
            raise ValueError(reasons[0])
        return all(application in report.opened for report in reports)

    def served_by_all(self, application: str) -> bool:
        """Second phase: every gateway sends new requests there."""
        return all(report.current == application for report in self.gateways)

    def released_by_all(self, application: str) -> bool:
        """Whether no gateway has a request under way there any more."""
        return not any(application in report.opened for report in self.gateways)
