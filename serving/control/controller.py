"""Which version is served: follows the alias, starts a new version beside the old one, checks it, switches, drains.

A new version is a new Serve application (design, fourth decision). Whatever fails on the way changes nothing but an
alarm, and is tried again later.
"""

import asyncio
import dataclasses
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

from ray import serve

from models.config import InputError
from models.redact import redact
from serving import model_source
from serving.config import ServingConfig
from serving.gateway.rollout import Orders, Report, Rollout
from serving.gateway.version_client import open_set
from serving.model_source import Wanted

logger = logging.getLogger("ray.serve")
AGAIN = 60.0
"""Seconds after which a version that failed is tried again."""
_OPEN_SECONDS = 60.0
_ADOPT_SECONDS = 3.0
_PAUSE = 0.05


class Versions:
    """One process of a service: decides what its gateways serve."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        """`config` is a ServingConfig's tree."""
        self._config = ServingConfig.model_validate(config)
        self._rollout = Rollout()
        self._changed = asyncio.Event()
        self._adopted = False
        self._failed: dict[str, float] = {}
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def check_health(self) -> None:
        """Raises RuntimeError where following has ended."""
        if self._task.done():
            raise RuntimeError("following the alias has ended")

    async def sync(self, report: Report, wait: float) -> Orders | None:
        """A gateway's word; answers the orders at once where it is behind, else after `wait` seconds or a change.

        None: nothing is decided yet, go on as before.
        """
        self._rollout.hear(report)
        if self._adopted and self._rollout.orders.fulfilled(report):
            changed = self._changed
            with _quiet_timeout():
                await asyncio.wait_for(changed.wait(), wait)
        elif not self._adopted:
            await asyncio.sleep(_PAUSE)
        return self._rollout.orders if self._adopted else None

    def state(self) -> dict[str, Any]:
        """For whoever started the service: current version, alarm, gateways that are there."""
        orders = self._rollout.orders
        current = orders.served.get(orders.current)
        return {
            "current": redact(current.model) if current else "",
            "space": current.space if current else "",
            "alarm": orders.alarm,
            "gateways": len(self._rollout.gateways),
        }

    def drain(self) -> None:
        """Have every gateway stop taking requests and answer those it has."""
        self._order(draining=True)

    def _order(self, **changes: Any) -> None:
        self._rollout.orders = dataclasses.replace(self._rollout.orders, **changes)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _follow(self) -> None:
        """Look at the alias, and bring about what it names, as long as the service runs."""
        await self._adopt()
        while True:
            try:
                await self._look()
            except Exception as error:  # whatever it is, what is served goes on being served
                logger.error("looking after versions failed: %s", redact(traceback.format_exc()))
                self._alarm(f"{type(error).__name__}: {error}")
            followed = model_source.is_followed(self._config.model)
            settled = self._rollout.orders.current and not self._rollout.orders.alarm
            await asyncio.sleep(self._config.versions.poll if followed or not settled else 3600)

    async def _adopt(self) -> None:
        """After a restart gateways know what is served; applications that none of them knows are ended."""
        running = [
            name for name in (await asyncio.to_thread(serve.status)).applications if name.startswith("triptych-")
        ]
        if running:
            await asyncio.sleep(_ADOPT_SECONDS)
            self._rollout.adopt()
        for name in set(running) - set(self._rollout.orders.served):
            await asyncio.to_thread(serve.delete, name)
        self._adopted = True

    async def _look(self) -> None:
        try:
            wanted = await asyncio.to_thread(model_source.resolve, self._config.model, self._config.index)
        except InputError as error:
            self._alarm(str(error))
            return
        application = wanted.application
        if application == self._rollout.orders.current:
            if self._rollout.orders.alarm:
                self._order(alarm="")
            return
        if time.monotonic() - self._failed.get(application, -AGAIN) < AGAIN:
            return
        try:
            await self._bring(application, wanted)
        except (InputError, ValueError, RuntimeError, TimeoutError) as error:
            self._failed[application] = time.monotonic()
            self._alarm(f"{wanted.model} is not served: {_reason(error)}")
            await self._forget(application)

    async def _bring(self, application: str, wanted: Wanted) -> None:
        """Start, check, have all gateways open it, then switch. Raises where any of it fails: nothing has changed."""
        started = time.monotonic()
        if application not in self._rollout.orders.served:
            matching = await asyncio.to_thread(
                model_source.require, wanted, bool(self._config.index or self._has_index())
            )
            await self._make_room()
            await self._start(application, wanted, matching)
        served = {**self._rollout.orders.served, application: wanted}
        self._order(served=served)
        await self._until(lambda: self._rollout.opened_by_all(application), "opened by every gateway")
        before = self._rollout.orders.current
        self._order(current=application, alarm="")
        await self._until(lambda: self._rollout.served_by_all(application), "served by every gateway")
        logger.warning("%s is served now, after %.1f s", redact(wanted.model), time.monotonic() - started)
        self._failed.clear()
        if before and not self._config.versions.keep:
            await self._forget(before)

    def _has_index(self) -> bool:
        current = self._rollout.orders.served.get(self._rollout.orders.current)
        return bool(current and current.index)

    async def _start(self, application: str, wanted: Wanted, matching: bool) -> None:
        from serving.control.deployments import build_set  # imports torch: looking for a version does without

        target = build_set(wanted, self._config, matching)
        try:
            async with asyncio.timeout(self._config.versions.start_timeout):
                await asyncio.to_thread(serve.run, target, name=application, route_prefix=None)
        except TimeoutError as error:
            raise TimeoutError(f"not ready within {self._config.versions.start_timeout:.0f} s") from error
        except RuntimeError as error:
            raise RuntimeError(await asyncio.to_thread(why_failed, application) or str(error)) from error
        opened = await open_set(application, wanted.version, wanted.name)
        opened.start(self._config, None)
        worst = await opened.check(self._config.versions.tolerance)
        logger.warning("%s answers its own vectors within %.0e", redact(wanted.model), worst)

    async def _make_room(self) -> None:
        """Before a third version is loaded, the one that is kept for the way back goes."""
        for name in set(self._rollout.orders.served) - {self._rollout.orders.current}:
            await self._forget(name)

    async def _forget(self, application: str) -> None:
        """Let go of a version: its requests are answered, then its replicas end."""
        if application == self._rollout.orders.current:
            return
        served = {name: wanted for name, wanted in self._rollout.orders.served.items() if name != application}
        self._order(served=served)
        await self._until(lambda: self._rollout.released_by_all(application), "let go of by every gateway")
        if application in (await asyncio.to_thread(serve.status)).applications:
            await asyncio.to_thread(serve.delete, application)

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        limit = max(_OPEN_SECONDS, 2 * self._config.door.deadline)
        try:
            async with asyncio.timeout(limit):
                while not condition():
                    await asyncio.sleep(_PAUSE)
        except TimeoutError as error:
            raise TimeoutError(f"not {what} within {limit:.0f} s") from error

    def _alarm(self, text: str) -> None:
        text = redact(text)  # everybody may read it, at /health
        if text != self._rollout.orders.alarm:
            logger.error("alarm: %s", text)
            self._order(alarm=text)


class _quiet_timeout:
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> bool:
        return kind is not None and issubclass(kind, TimeoutError)


def why_failed(application: str) -> str:
    """The last line of what a replica said when it could not start; "" where none did."""
    found = serve.status().applications.get(application)
    parts = found.deployments.values() if found else ()
    messages = [part.message for part in parts if "rror" in part.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if "Error: " in line]
    return lines[-1] if lines else ""


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
