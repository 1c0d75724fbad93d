"""The Serve application of the service: the gateways, and the controller that decides what they serve."""

import tempfile
import uuid
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from serving.config import ServingConfig
from serving.control.controller import VersionController
from serving.environment import HEALTH, LOGGING, REPLICA
from serving.gateway.gateway import Gateway
from serving.http.auth import check_bind, read_keys
from serving.http.metrics import METRICS_FOLDER

SERVICE = "triptych"
"""Name of the application that holds the gateways and the controller."""
CONTROLLER = "Versions"
"""Name of the controller's deployment, as Ray's status and dashboard show it."""


def build(args: dict[str, Any]) -> Application:
    """The service, from the `args` of `serving/serve.yaml`: a ServingConfig's tree. Raises InputError, ValueError."""
    config = ServingConfig.model_validate(args)
    check_bind(config.host, read_keys(config.door.api_keys), config.allow_open)
    controller = serve.deployment(VersionController).options(
        name=CONTROLLER,
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.1},
        logging_config=LOGGING,
        **HEALTH,
    )
    gateway = serve.deployment(Gateway).options(
        name="Gateway",
        num_replicas=config.gateways,
        ray_actor_options={
            "num_cpus": 0.1,
            "runtime_env": {"env_vars": REPLICA | {METRICS_FOLDER: _metrics_folder()}},
        },
        graceful_shutdown_timeout_s=25,
        logging_config=LOGGING,
        **HEALTH,
    )
    tree = config.model_dump()
    return gateway.bind(tree, controller.bind(tree))


def _metrics_folder() -> str:
    """A new folder for each start of the service, so that no number of an earlier one is counted."""
    return str(Path(tempfile.gettempdir()) / f"triptych-metrics-{uuid.uuid4().hex[:12]}")
