"""A gateway replica: speaks HTTP on a port it shares with the others, and holds the versions that are served.

HTTP does not go through Serve's proxy, which costs more than a small model's forward pass; Serve still starts, checks
and replaces the replica.
"""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from ray.serve.handle import DeploymentHandle

from models.redact import redact
from serving.config import ServingConfig
from serving.gateway.port import shared_socket
from serving.gateway.rollout import Orders, Report
from serving.gateway.version_client import HandleSet, open_set
from serving.http.app import Door
from serving.http.auth import read_keys
from serving.http.metrics import Metrics
from serving.interfaces import Description, ModelSet, Overloaded
from serving.model_source import Wanted

logger = logging.getLogger("ray.serve")
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of prometheus_client: processes that write there are one to whoever reads."""
LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))
_WAIT, _SOON = 2.0, 0.1
_DRAIN_SECONDS = 20.0


class Desk:
    """The versions that this gateway holds open, and how many requests each has under way."""

    def __init__(self) -> None:
        self.sets: dict[str, HandleSet] = {}
        self.current: HandleSet | None = None
        self.alarm = ""
        self._busy: Counter[str] = Counter()

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        return self.current is not None

    def versions(self) -> list[tuple[Description, bool]]:
        """(version, whether it is the current one)."""
        return [(one.description, one is self.current) for one in self.sets.values()]

    @contextmanager
    def use(self, version: str | None = None) -> Iterator[ModelSet]:
        """The current version, or a loaded one by its label, held until the request is answered."""
        chosen = self.current  # read once: everything of the request goes to this one
        if version is not None:
            chosen = next((one for one in self.sets.values() if one.description.label == version), None)
            if chosen is None:
                raise KeyError(version)
        if chosen is None:
            raise Overloaded()
        self._busy[chosen.application] += 1
        try:
            yield chosen
        finally:
            self._busy[chosen.application] -= 1

    def idle(self, application: str) -> bool:
        """Whether no request of this gateway is under way there."""
        return not self._busy[application]


class Gateway:
    """Follows the orders of `Versions`; listens once it has a version to serve."""

    async def __init__(self, config: dict[str, Any], versions: DeploymentHandle) -> None:  # type: ignore[misc]
        """`config` is a ServingConfig's tree."""
        self._config = ServingConfig.model_validate(config)
        self._versions = versions
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._wanted: dict[str, Wanted] = {}
        self._failed: dict[str, str] = {}
        self._draining = False
        _make_metrics_folder()
        self.metrics = Metrics()
        self.desk = Desk()
        door = self._config.door
        keys = read_keys(door.api_keys)
        hosts = frozenset() if keys or self._config.allow_open else LOOPBACK | {self._config.host}
        self.door = Door(self.desk, door, keys, self.metrics, hosts=hosts)
        self._server: uvicorn.Server | None = None
        self._listening: asyncio.Task[None] | None = None
        self._following = asyncio.get_running_loop().create_task(self._follow())

    def check_health(self) -> None:
        """Raises RuntimeError where following or listening has ended."""
        if self._following.done() and not self._draining:
            raise RuntimeError("following the orders has ended")
        if self._listening is not None and self._listening.done() and not self._draining:
            raise RuntimeError("the listener has ended")

    async def __del__(self) -> None:
        """Serve's last call: take no more connections, answer what is under way."""
        await self._drain()

    async def _follow(self) -> None:
        """Do what is ordered, and say what is done, as long as the gateway lives."""
        while not self._draining:
            orders = await self._ask()
            if orders is not None:
                await self._obey(orders)
        await self._ask()

    async def _ask(self) -> Orders | None:
        """The orders; None where there are none yet, or nobody answers."""
        report = Report(
            self._name,
            {name: self._wanted[name] for name in self.desk.sets},
            self.desk.current.application if self.desk.current else "",
            dict(self._failed),
        )
        wait = _SOON if self._draining or set(self.desk.sets) != set(self._wanted) else _WAIT
        try:
            return await asyncio.wait_for(self._versions.sync.remote(report, wait), wait + 10)
        except Exception as error:  # it is being replaced; what is served goes on being served
            logger.warning("no orders: %s", type(error).__name__)
            await asyncio.sleep(0.5)
            return None

    async def _obey(self, orders: Orders) -> None:
        self.desk.alarm = orders.alarm
        self.metrics.alarm(bool(orders.alarm))
        self._failed = {name: why for name, why in self._failed.items() if name in orders.served}
        for name, wanted in orders.served.items():
            if name not in self.desk.sets:
                await self._open(name, wanted)
        if orders.current in self.desk.sets:
            self.desk.current = self.desk.sets[orders.current]  # the switch
        for name in set(self.desk.sets) - set(orders.served):
            if self.desk.sets[name] is not self.desk.current and self.desk.idle(name):
                del self.desk.sets[name], self._wanted[name]
        if self.desk.ready and self._listening is None:
            self._listen()
        if orders.draining and not self._draining:
            await self._drain()

    async def _open(self, name: str, wanted: Wanted) -> None:
        try:
            opened = await asyncio.wait_for(open_set(name, wanted.version, wanted.name), 30)
        except Exception as error:  # told to `Versions`, which gives the version up
            self._failed[name] = redact(f"{type(error).__name__}: {error}")
            logger.warning("cannot open %s: %s", name, self._failed[name])
            return
        opened.start(self._config, self._observe)
        self.desk.sets[name], self._wanted[name] = opened, wanted

    def _observe(self, kind: str, rows: int, seconds: float, waited: float) -> None:
        self.metrics.batch(kind, rows, seconds, waited)
        self.metrics.queue(kind, sum(one.queues[kind] for one in self.desk.sets.values()))

    def _listen(self) -> None:
        listener = shared_socket(self._config.host, self._config.port)
        settings = uvicorn.Config(
            self.door, interface="asgi3", access_log=False, log_config=None, timeout_keep_alive=75, backlog=2048,
            server_header=False, lifespan="off", proxy_headers=False,
        )  # fmt: skip
        self._server = uvicorn.Server(settings)
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # SIGTERM is Ray's
        self._listening = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))

    async def _drain(self) -> None:
        self._draining = True
        if self._server is not None and self._listening is not None:
            self._server.should_exit = True
            started = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._listening), _DRAIN_SECONDS)
            logger.info("drained in %.1f s", time.monotonic() - started)


def _make_metrics_folder() -> None:
    """Gateways of a machine add up their numbers in files of one folder; gauges of dead processes go."""
    if METRICS_FOLDER not in os.environ:
        return
    folder = Path(os.environ[METRICS_FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("gauge_live*_*.db"):
        if not Path(f"/proc/{file.stem.rpartition('_')[2]}").exists():
            file.unlink(missing_ok=True)
