"""The same service behind Serve's direct ingress instead of the gateways' own listener, for comparison only.

    python -m benchmarks.direct_ingress PACKAGE

with the variables of `switches` in its environment, which Ray reads when it is imported. Each gateway then listens on
a port of its own, of PORTS; Serve's limits, drain and metrics apply to it.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

PORTS = range(28_000, 28_002)
"""Of the gateways; below those that the system gives to connections."""
SIGN = "serving behind direct ingress"
"""Begins the line on standard error that says that it serves."""


def switches() -> dict[str, str]:
    """Ray's variables for direct ingress on PORTS."""
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(PORTS[0]),
        # the first part of each application gets a port, so the encoders' too; the gateways start first
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(PORTS[-1] + 8),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def make_gateway() -> type[Any]:
    """A gateway that is called by Serve's listener; the HTTP app is the same."""
    from starlette.responses import Response

    from serving.gateway.gateway import Gateway

    class DirectGateway(Gateway):
        def _listen(self) -> None:
            return None

        async def __call__(self, request: Any) -> Any:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            await self.app(request.scope, request.receive, send)
            reply = Response(b"".join(message.get("body", b"") for message in sent[1:]), sent[0]["status"])
            reply.raw_headers = sent[0]["headers"]
            return reply

    return DirectGateway


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    options = parser.parse_args()
    missing = switches().items() - os.environ.items()
    if missing:
        parser.error("set " + " ".join(f"{name}={value}" for name, value in sorted(missing)))
    stopped = threading.Event()
    from ray import serve

    from serving import model_source
    from serving.config import ServingConfig
    from serving.control.controller import VersionController
    from serving.environment import CLUSTER, COMPUTE

    config = model_source.check(ServingConfig(model=options.package, port=PORTS[0], gateways=len(PORTS)))
    for name, value in (CLUSTER | COMPUTE).items():
        os.environ.setdefault(name, value)
    model_source.connect()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": PORTS[0] + 100})
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    part = {"ray_actor_options": {"num_cpus": 0.1}, "logging_config": quiet}
    versions = serve.deployment(VersionController).options(name="Versions", max_ongoing_requests=1000, **part)
    gateway = serve.deployment(make_gateway()).options(
        name="Gateway", num_replicas=len(PORTS), max_ongoing_requests=1024, max_queued_requests=1024, **part
    )
    tree = config.model_dump()
    serve.run(gateway.bind(tree, versions.bind(tree)), name="triptych", route_prefix="/")
    while not all(_is_ready(port) for port in PORTS):
        time.sleep(0.5)
    sys.stderr.write(f"{SIGN}, ports {PORTS[0]} to {PORTS[-1]}\n")
    sys.stderr.flush()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()


def _is_ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


if __name__ == "__main__":
    main()
