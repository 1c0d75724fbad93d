"""Which version is served: follows the alias, starts a new version beside the old one, checks it, switches, drains.

A new version is a new Serve application (docs/decisions/0004-version-is-an-application.md). Whatever fails on the way
changes nothing but an alarm, and is tried again later.
"""

import asyncio
import contextlib
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
from serving.gateway.rollout import DesiredState, GatewayStatus, Rollout
from serving.gateway.version_client import open_version
from serving.model_source import VersionSpec

logger = logging.getLogger("ray.serve")
RETRY_SECONDS = 60.0
"""A version that failed is tried again after so long."""
_PHASE_SECONDS = 60.0
"""Time that all gateways together have for a phase of the switch, at least."""
_RECOVER_SECONDS = 3.0
"""Time in which gateways that are alive report to a controller that was restarted."""
_PAUSE = 0.05


class VersionController:
    """One process of a service: decides what its gateways serve."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        """`config` is a ServingConfig's tree."""
        self._config = ServingConfig.model_validate(config)
        self._rollout = Rollout()
        self._changed = asyncio.Event()
        self._recovered = False
        self._failed: dict[str, float] = {}
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def check_health(self) -> None:
        """Raises RuntimeError where following has ended."""
        if self._task.done():
            raise RuntimeError("following the alias has ended")

    async def sync(self, status: GatewayStatus, wait: float) -> DesiredState | None:
        """Record a gateway's status; returns the desired state, None where it is not known yet (go on as before).

        A gateway that is not there yet is answered at once, another one after a change or `wait` seconds (long poll).
        """
        self._rollout.record_status(status)
        if self._recovered and self._rollout.desired.reached_by(status):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)
        elif not self._recovered:
            await asyncio.sleep(_PAUSE)
        return self._rollout.desired if self._recovered else None

    def state(self) -> dict[str, Any]:
        """Current version, its embedding space, the alarm and the number of live gateways; for `triptych serve`."""
        desired = self._rollout.desired
        current = desired.served.get(desired.current)
        return {
            "current": redact(current.model) if current else "",
            "space": current.space if current else "",
            "alarm": desired.alarm,
            "gateways": len(self._rollout.gateways),
        }

    def drain(self) -> None:
        """Have every gateway stop taking connections and answer the requests it has."""
        self._change(draining=True)

    def _change(self, **changes: Any) -> None:
        self._rollout.desired = dataclasses.replace(self._rollout.desired, **changes)
        self._changed.set()  # wakes all long polls; those that come from now on wait for the next change
        self._changed = asyncio.Event()

    async def _follow(self) -> None:
        """Resolve the alias and serve the version that it names, again and again, as long as the service runs."""
        await self._recover()
        while True:
            try:
                await self._check_alias()
            except Exception as error:  # whatever it is, what is served goes on being served
                logger.error("following the alias failed: %s", redact(traceback.format_exc()))
                self._alarm(f"{type(error).__name__}: {error}")
            followed = model_source.is_followed(self._config.model)
            settled = self._rollout.desired.current and not self._rollout.desired.alarm
            await asyncio.sleep(self._config.versions.poll if followed or not settled else 3600)

    async def _recover(self) -> None:
        """After a restart: take over what gateways report, and end the applications that none of them has open."""
        running = [
            name for name in (await asyncio.to_thread(serve.status)).applications if name.startswith("triptych-")
        ]
        if running:
            await asyncio.sleep(_RECOVER_SECONDS)
            self._rollout.recover()
        for name in set(running) - set(self._rollout.desired.served):
            await asyncio.to_thread(serve.delete, name)
        self._recovered = True

    async def _check_alias(self) -> None:
        """One round: resolve the model, and roll it out where it is not what is served. Failures raise the alarm."""
        try:
            spec = await asyncio.to_thread(model_source.resolve, self._config.model, self._config.index)
        except InputError as error:
            self._alarm(str(error))
            return
        application = spec.application
        if application == self._rollout.desired.current:
            if self._rollout.desired.alarm:
                self._change(alarm="")
            return
        if time.monotonic() - self._failed.get(application, -RETRY_SECONDS) < RETRY_SECONDS:
            return
        try:
            await self._roll_out(application, spec)
        except (InputError, ValueError, RuntimeError, TimeoutError) as error:
            self._failed[application] = time.monotonic()
            self._alarm(f"{spec.model} is not served: {_reason(error)}")
            await self._retire(application)

    async def _roll_out(self, application: str, spec: VersionSpec) -> None:
        """Start and check a version, have all gateways open it, then switch to it.

        Raises where any of it fails; what is current has not changed then.
        """
        started = time.monotonic()
        if application not in self._rollout.desired.served:
            matching = await asyncio.to_thread(
                model_source.require, spec, bool(self._config.index or self._has_index())
            )
            await self._retire_kept()
            await self._start(application, spec, matching)
        served = {**self._rollout.desired.served, application: spec}
        self._change(served=served)
        await self._until(lambda: self._rollout.opened_by_all(application), "opened by every gateway")
        before = self._rollout.desired.current
        self._change(current=application, alarm="")
        await self._until(lambda: self._rollout.served_by_all(application), "served by every gateway")
        logger.warning("%s is served now, after %.1f s", redact(spec.model), time.monotonic() - started)
        self._failed.clear()
        if before and not self._config.versions.keep:
            await self._retire(before)

    def _has_index(self) -> bool:
        current = self._rollout.desired.served.get(self._rollout.desired.current)
        return bool(current and current.index)

    async def _start(self, application: str, spec: VersionSpec, matching: bool) -> None:
        from serving.control.deployments import build_version  # imports torch, which following an alias does without

        target = build_version(spec, self._config, matching)
        try:
            async with asyncio.timeout(self._config.versions.start_timeout):
                await asyncio.to_thread(serve.run, target, name=application, route_prefix=None)
        except TimeoutError as error:
            raise TimeoutError(f"not ready within {self._config.versions.start_timeout:.0f} s") from error
        except RuntimeError as error:
            raise RuntimeError(await asyncio.to_thread(why_failed, application) or str(error)) from error
        client = await open_version(spec)
        client.start(self._config, None)
        worst = await client.check(self._config.versions.tolerance)
        logger.warning("%s answers the vectors of its package within %.0e", redact(spec.model), worst)

    async def _retire_kept(self) -> None:
        """End the version that is kept for the way back: memory is planned for two at once, not for three."""
        for name in set(self._rollout.desired.served) - {self._rollout.desired.current}:
            await self._retire(name)

    async def _retire(self, application: str) -> None:
        """Unless it is current: have gateways release a version once it is idle, then end its replicas."""
        if application == self._rollout.desired.current:
            return
        served = {name: spec for name, spec in self._rollout.desired.served.items() if name != application}
        self._change(served=served)
        await self._until(lambda: self._rollout.released_by_all(application), "released by every gateway")
        if application in (await asyncio.to_thread(serve.status)).applications:
            await asyncio.to_thread(serve.delete, application)

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for `condition`. Raises TimeoutError; a request may keep a version in use for the whole deadline."""
        limit = max(_PHASE_SECONDS, 2 * self._config.door.deadline)
        try:
            async with asyncio.timeout(limit):
                while not condition():
                    await asyncio.sleep(_PAUSE)
        except TimeoutError as error:
            raise TimeoutError(f"not {what} within {limit:.0f} s") from error

    def _alarm(self, text: str) -> None:
        text = redact(text)  # everybody may read it, at /health
        if text != self._rollout.desired.alarm:
            logger.error("alarm: %s", text)
            self._change(alarm=text)


def why_failed(application: str) -> str:
    """The last error line of a replica that could not start, from Serve's status; "" where there is none."""
    found = serve.status().applications.get(application)
    deployments = found.deployments.values() if found else ()
    messages = [one.message for one in deployments if "rror" in one.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if "Error: " in line]
    return lines[-1] if lines else ""


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
