"""`triptych serve`: the service on this machine (or in the Ray of RAY_ADDRESS), from start to drained end."""

import contextlib
import io
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

from models.config import Failed, InputError
from models.redact import redact
from serving import model_source
from serving.config import ServingConfig
from serving.environment import CLUSTER
from serving.gateway.port import shared_socket

logger = logging.getLogger(__name__)
_PAUSE = 0.2


def address(config: ServingConfig) -> str:
    """The URL at which the service is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


@contextmanager
def running(config: ServingConfig, start_seconds: float = 600) -> Iterator[str]:
    """The service, ready to answer, and its URL; drained and ended afterwards.

    Raises InputError where it cannot listen, its model cannot be loaded, or it is not ready in time.
    """
    with _reserved_port(config.host, config.port):
        yield from _running(config, start_seconds)


def _running(config: ServingConfig, start_seconds: float) -> Iterator[str]:
    for name, value in CLUSTER.items():
        os.environ.setdefault(name, value)
    from ray import serve  # imported once the variables it reads are set

    from serving.control.controller import why_failed
    from serving.service.app import SERVICE, build

    config = model_source.check(config)
    target = build(config.model_dump())
    started_ray = model_source.connect()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
        try:
            serve.run(target, name=SERVICE, route_prefix=None)
        except RuntimeError as error:
            raise InputError(f"the service does not start: {why_failed(SERVICE) or error}") from error
        _wait_ready(config, start_seconds)
        yield address(config)
    finally:
        with contextlib.suppress(Exception):
            _drain(config)
        _end(started_ray)


def run_until_stopped(config: ServingConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises what `running` raises, and Failed where the service is lost."""
    stopped = threading.Event()
    with running(config) as url:
        for number in (signal.SIGTERM, signal.SIGINT):  # set here, because Ray sets its own when it starts
            signal.signal(number, lambda *_: stopped.set())
        logger.info("serving %s at %s", redact(config.model), f"{url} (page, /docs, /v1/embeddings, /v1/search)")
        alarm = ""
        while not stopped.wait(5):
            state = _state()
            if state["alarm"] != alarm:
                alarm = state["alarm"]
                logger.warning("%s", f"alarm: {alarm}" if alarm else f"serving {state['current']}, no alarm any more")
        logger.info("draining")
    logger.info("ended")


def _end(started_ray: bool) -> None:
    """End Serve, and Ray where it was started for this service."""
    import ray
    from ray import serve

    with contextlib.redirect_stdout(io.StringIO()):  # Ray prints there that calls to the ended controller failed
        with contextlib.suppress(Exception):  # it has failed, or Ray is lost: that was said before
            serve.shutdown()
        if started_ray:
            ray.shutdown()


def _state() -> dict[str, str]:
    """What `VersionController.state` answers; raises Failed where it does not answer."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from serving.service.app import CONTROLLER, SERVICE

    try:
        return dict(serve.get_deployment_handle(CONTROLLER, SERVICE).state.remote().result(timeout_s=30))
    except (TimeoutError, RayError, RayServeException) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Failed(f"the service is lost, with Ray or a part of it ({what}); start it again") from error


def _wait_ready(config: ServingConfig, seconds: float) -> None:
    """Until a gateway answers; raises InputError with the reason where the first version cannot be served."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        with contextlib.suppress(URLError, OSError), urlopen(f"{address(config)}/ready", timeout=5) as reply:
            if reply.status == 200:
                return
        state = _state()
        if state["alarm"] and not state["current"]:
            raise InputError(state["alarm"])
        time.sleep(_PAUSE)
    raise InputError(f"{config.model}: not ready within {seconds:.0f} s; Ray's logs of the replicas say why")


def _drain(config: ServingConfig) -> None:
    """Have the gateways stop listening; returns once nothing listens, or the deadline has passed."""
    from ray import serve

    from serving.service.app import CONTROLLER, SERVICE

    serve.get_deployment_handle(CONTROLLER, SERVICE).drain.remote().result(timeout_s=5)
    limit = time.monotonic() + min(config.door.deadline, 20)
    while time.monotonic() < limit:
        try:
            socket.create_connection((config.host, config.port), timeout=1).close()
        except OSError:
            return
        time.sleep(_PAUSE)


@contextmanager
def _reserved_port(host: str, port: int) -> Iterator[None]:
    """Reserve the port for the gateways, which share it. Raises InputError where another program has it.

    The socket never listens, so it takes no connection, but no other program can bind the port meanwhile.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        raise InputError(f"--host {host}: give an address such as 127.0.0.1 or 0.0.0.0") from None
    try:
        with socket.socket(family) as probe:  # without SO_REUSEPORT: another service that shares its port is noticed
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        reserved = shared_socket(host, port)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: {(error.strerror or 'refused').lower()}; choose another"
        ) from error
    with reserved:
        yield
