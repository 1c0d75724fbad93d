"""A gateway replica: speaks HTTP on a port it shares with the others, and has clients of the versions that are served.

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
from serving.gateway.rollout import DesiredState, GatewayStatus
from serving.gateway.version_client import VersionClient, open_version
from serving.http.app import HttpApp
from serving.http.auth import read_keys
from serving.http.metrics import METRICS_FOLDER, Metrics
from serving.interfaces import Description, Modality, ModelVersion, NotReady, VersionNotLoaded
from serving.model_source import VersionSpec

logger = logging.getLogger("ray.serve")
LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))
_OPEN_SECONDS = 30.0
_SYNC_SECONDS = 2.0
"""The controller answers after so long where nothing changes."""
_DRAIN_SECONDS = 20.0


class LoadedVersions:
    """The versions that this gateway has clients of, and how many requests each has in progress."""

    def __init__(self) -> None:
        self.clients: dict[str, VersionClient] = {}
        """By application."""
        self.current: VersionClient | None = None
        self.alarm = ""
        self._in_progress: Counter[str] = Counter()

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        return self.current is not None

    def versions(self) -> list[tuple[Description, bool]]:
        """(version, whether it is the current one) of all that are loaded."""
        return [(client.description, client is self.current) for client in self.clients.values()]

    @contextmanager
    def use(self, label: str | None = None) -> Iterator[ModelVersion]:
        """The current version, or a loaded one by its label; it stays loaded until the context ends.

        Raises NotReady where none is current, VersionNotLoaded where `label` is not loaded.
        """
        chosen = self.current  # read once: a switch meanwhile does not change which version answers
        if chosen is None:
            raise NotReady
        if label is not None:
            chosen = next((client for client in self.clients.values() if client.description.label == label), None)
            if chosen is None:
                raise VersionNotLoaded
        application = chosen.spec.application
        self._in_progress[application] += 1
        try:
            yield chosen
        finally:
            self._in_progress[application] -= 1

    def idle(self, application: str) -> bool:
        """Whether no request of this gateway is in progress there."""
        return not self._in_progress[application]


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: a replica's SIGTERM is Ray's to handle."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """Brings about the state that the controller desires; listens once it has a version to serve."""

    async def __init__(self, config: dict[str, Any], controller: DeploymentHandle) -> None:  # type: ignore[misc]
        """`config` is a ServingConfig's tree, `controller` a handle to the `VersionController`."""
        self._config = ServingConfig.model_validate(config)
        self._controller = controller
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._failed: dict[str, str] = {}
        self._draining = False
        _make_metrics_folder()
        self.metrics = Metrics()
        self.pool = LoadedVersions()
        keys = read_keys(self._config.door.api_keys)
        hosts = frozenset() if keys or self._config.allow_open else LOOPBACK | {self._config.host}
        self.app = HttpApp(self.pool, self._config.door, keys, self.metrics, hosts=hosts)
        self._server: uvicorn.Server | None = None
        self._listening: asyncio.Task[None] | None = None
        self._following = asyncio.get_running_loop().create_task(self._follow())

    def check_health(self) -> None:
        """Raises RuntimeError where following or listening has ended."""
        if self._following.done() and not self._draining:
            raise RuntimeError("following the controller has ended")
        if self._listening is not None and self._listening.done() and not self._draining:
            raise RuntimeError("the listener has ended")

    async def __del__(self) -> None:
        """Serve's last call to a replica that it stops: take no more connections, answer what is in progress."""
        await self._drain()

    async def _follow(self) -> None:
        """Report to the controller and bring about what it desires, as long as the gateway lives."""
        while not self._draining:
            desired = await self._sync()
            if desired is not None:
                await self._reconcile(desired)
        await self._sync()  # so that nobody waits for this gateway to release a version

    async def _sync(self) -> DesiredState | None:
        """Report the status; returns the desired state, None where there is none yet or nobody answers."""
        opened = {name: client.spec for name, client in self.pool.clients.items()}
        current = self.pool.current.spec.application if self.pool.current else ""
        status = GatewayStatus(self._name, opened, current, dict(self._failed))
        try:
            return await asyncio.wait_for(self._controller.sync.remote(status, _SYNC_SECONDS), _SYNC_SECONDS + 10)
        except Exception as error:  # it is being replaced; what is served goes on being served
            logger.warning("no answer of the controller: %s", type(error).__name__)
            await asyncio.sleep(0.5)
            return None

    async def _reconcile(self, desired: DesiredState) -> None:
        """Open the versions in `desired.served`, switch to `desired.current`, drop the others once they are idle."""
        self.pool.alarm = desired.alarm
        self.metrics.alarm(bool(desired.alarm))
        self._failed = {name: why for name, why in self._failed.items() if name in desired.served}
        for name, spec in desired.served.items():
            if name not in self.pool.clients:
                await self._open(name, spec)
        if desired.current in self.pool.clients:
            self.pool.current = self.pool.clients[desired.current]  # the switch: one assignment
        for name in set(self.pool.clients) - set(desired.served):
            if self.pool.clients[name] is not self.pool.current and self.pool.idle(name):
                del self.pool.clients[name]
        if self.pool.ready and self._listening is None:
            self._listen()
        if desired.draining and not self._draining:
            await self._drain()

    async def _open(self, name: str, spec: VersionSpec) -> None:
        try:
            client = await asyncio.wait_for(open_version(spec), _OPEN_SECONDS)
        except Exception as error:  # goes to the controller with the next status; it gives the version up
            self._failed[name] = redact(f"{type(error).__name__}: {error}")
            logger.warning("cannot open %s: %s", name, self._failed[name])
            return
        client.start(self._config, self._observe)
        self.pool.clients[name] = client

    def _observe(self, modality: Modality, rows: int, seconds: float, waited: float) -> None:
        self.metrics.batch(modality, rows, seconds, waited)
        self.metrics.queue(modality, sum(client.queues[modality] for client in self.pool.clients.values()))

    def _listen(self) -> None:
        listener = shared_socket(self._config.host, self._config.port)
        settings = uvicorn.Config(
            self.app, interface="asgi3", access_log=False, log_config=None, timeout_keep_alive=75, backlog=2048,
            server_header=False, lifespan="off", proxy_headers=False,
        )  # fmt: skip
        self._server = _Server(settings)
        self._listening = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))

    async def _drain(self) -> None:
        """Stop listening, and wait until what is in progress is answered, or for `_DRAIN_SECONDS`."""
        self._draining = True
        if self._server is not None and self._listening is not None:
            self._server.should_exit = True
            started = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._listening), _DRAIN_SECONDS)
            logger.info("drained in %.1f s", time.monotonic() - started)


def _make_metrics_folder() -> None:
    """Make the folder of the gateways' shared numbers; remove the gauges of processes that have died."""
    if METRICS_FOLDER not in os.environ:
        return
    folder = Path(os.environ[METRICS_FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("gauge_live*_*.db"):
        if not Path(f"/proc/{file.stem.rpartition('_')[2]}").exists():
            file.unlink(missing_ok=True)
