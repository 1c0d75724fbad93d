"""The same service behind Serve's direct ingress instead of the gateways' own listener, for comparison only.

    RAY_SERVE_THROUGHPUT_OPTIMIZED=1 python -m benchmarks.direct_ingress PACKAGE --port N

Each gateway then listens on a port of its own, from N on; Serve's limits, drain and metrics apply to it.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from serving.config import ServingConfig
from serving.gateway import Gateway

GATEWAYS = 2


class DirectGateway(Gateway):
    """A gateway that is called by Serve's listener; the door is the same."""

    def _listen(self) -> None:
        return None

    async def __call__(self, request: Any) -> Any:
        """Answer a request that Serve has read."""
        from starlette.responses import Response

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await self.door(request.scope, request.receive, send)
        reply = Response(b"".join(message.get("body", b"") for message in sent[1:]), sent[0]["status"])
        reply.raw_headers = sent[0]["headers"]
        return reply


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    switches = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(options.port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(options.port + GATEWAYS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
    os.environ |= switches  # read when Ray's modules are imported
    stopped = threading.Event()
    from ray import serve

    from serving import packages, start
    from serving.versions import Versions

    config = packages.check(ServingConfig(model=options.package, port=options.port, gateways=GATEWAYS))
    for name, value in start.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    packages.connect()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port + 100})
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    part = {"ray_actor_options": {"num_cpus": 0.1}, "logging_config": quiet}
    versions = serve.deployment(Versions).options(name="Versions", max_ongoing_requests=1000, **part)
    gateway = serve.deployment(DirectGateway).options(
        name="Gateway", num_replicas=GATEWAYS, max_ongoing_requests=1024, max_queued_requests=1024, **part
    )
    tree = config.model_dump()
    serve.run(gateway.bind(tree, versions.bind(tree)), name="triptych", route_prefix="/")
    while not serve.get_deployment_handle("Versions", "triptych").state.remote().result()["current"]:
        time.sleep(0.5)
    time.sleep(3)
    sys.stderr.write(f"serving behind direct ingress, ports from {options.port}\n")
    sys.stderr.flush()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()


if __name__ == "__main__":
    main()
