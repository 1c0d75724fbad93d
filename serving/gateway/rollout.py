"""What gateways should serve and what they report: the two-phase switch, without Ray.

A version is first opened by every gateway, then made current; the one before is released by every gateway before its
replicas end. Each gateway switches in one assignment, so that no reply mixes two versions.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from serving.model_source import VersionSpec

STATUS_SECONDS = 10.0
"""Seconds for which a gateway's status counts; one that is silent for longer is taken for dead."""


@dataclass(frozen=True)
class GatewayStatus:
    """What a gateway reports of itself."""

    gateway: str
    opened: Mapping[str, VersionSpec]
    """Versions that it has handles to, by application."""
    current: str
    """Application that new requests go to; "" before the first."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Applications that it could not open, and why."""


@dataclass(frozen=True)
class DesiredState:
    """What every gateway should bring about."""

    served: Mapping[str, VersionSpec]
    """Versions to keep open, by application; all others are released once their last request is answered."""
    current: str
    """Application that new requests should go to."""
    alarm: str = ""
    """Why a newer version is not served; gateways show it to clients."""
    draining: bool = False
    """The service ends: take no more connections."""

    def reached_by(self, status: GatewayStatus) -> bool:
        """Whether the gateway serves exactly this. Never while draining: a draining gateway stops asking by itself."""
        return set(status.opened) == set(self.served) and status.current == self.current and not self.draining


class Rollout:
    """The desired state, and the latest status of each gateway."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._received: dict[str, tuple[GatewayStatus, float]] = {}
        self.desired = DesiredState({}, "")

    def record_status(self, status: GatewayStatus) -> None:
        """Store a gateway's latest status report, with the time it came."""
        self._received[status.gateway] = status, self._clock()

    @property
    def gateways(self) -> list[GatewayStatus]:
        """The latest status of each gateway that is alive; older ones are forgotten."""
        now = self._clock()
        self._received = {name: entry for name, entry in self._received.items() if now - entry[1] < STATUS_SECONDS}
        return [status for status, _ in self._received.values()]

    def recover(self) -> None:
        """After a restart, take the desired state from what gateways serve; what most of them serve is current."""
        statuses = [status for status in self.gateways if status.current]
        if statuses:
            currents = [status.current for status in statuses]
            served = {name: spec for status in statuses for name, spec in status.opened.items()}
            self.desired = DesiredState(served, max(set(currents), key=currents.count))

    def opened_by_all(self, application: str) -> bool:
        """First phase: every gateway has opened the version. Raises ValueError where one reports that it cannot."""
        statuses = self.gateways
        reasons = [status.failed[application] for status in statuses if application in status.failed]
        if reasons:
            raise ValueError(reasons[0])
        return all(application in status.opened for status in statuses)

    def served_by_all(self, application: str) -> bool:
        """Second phase: every gateway sends new requests there."""
        return all(status.current == application for status in self.gateways)

    def released_by_all(self, application: str) -> bool:
        """Whether no gateway has a request in progress there any more."""
        return not any(application in status.opened for status in self.gateways)
