"""The Serve applications: the service (gateways, and who decides what they serve), and one more for each version."""

import tempfile
import uuid
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from serving.config import ReplicaConfig, ServingConfig
from serving.encoders import ImageEncoder, Matcher, TextEncoder
from serving.environment import REPLICA
from serving.gateway import METRICS_FOLDER, Gateway
from serving.keys import check_bind, read_keys
from serving.packages import Wanted
from serving.searcher import Searcher
from serving.sets import IMAGE, MATCHER, SEARCH, TEXT
from serving.versions import Versions

SERVICE = "triptych"
"""Name of the application that holds the gateways."""
_LOGGING = {"encoding": "TEXT", "log_level": "WARNING", "enable_access_log": False}
_HEALTH = {"health_check_period_s": 2, "health_check_timeout_s": 15, "graceful_shutdown_wait_loop_s": 0.2}


def build(args: dict[str, Any]) -> Application:
    """The service, from the `args` of `serving/serve.yaml`: a ServingConfig's tree. Raises InputError, ValueError."""
    config = ServingConfig.model_validate(args)
    check_bind(config.host, read_keys(config.door.api_keys), config.allow_open)
    versions = serve.deployment(Versions).options(
        name="Versions",
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.1},
        logging_config=_LOGGING,
        **_HEALTH,
    )
    gateway = serve.deployment(Gateway).options(
        name="Gateway",
        num_replicas=config.gateways,
        ray_actor_options={
            "num_cpus": 0.1,
            "runtime_env": {"env_vars": REPLICA | {METRICS_FOLDER: _metrics_folder()}},
        },
        graceful_shutdown_timeout_s=25,
        logging_config=_LOGGING,
        **_HEALTH,
    )
    tree = config.model_dump()
    return gateway.bind(tree, versions.bind(tree))


def _metrics_folder() -> str:
    """A new one for each start of the service."""
    return str(Path(tempfile.gettempdir()) / f"triptych-metrics-{uuid.uuid4().hex[:12]}")


def build_set(wanted: Wanted, config: ServingConfig, matching: bool) -> Application:
    """The application of one version: encoders, fusion encoder where it has one, and search, which binds them."""
    bf16 = config.precision == "bf16"
    encoders = {
        TEXT: _part(TextEncoder, TEXT, config.text).bind(wanted.model, wanted.space, config.text.model_dump(), bf16),
        IMAGE: _part(ImageEncoder, IMAGE, config.image).bind(
            wanted.model, wanted.space, config.image.model_dump(), bf16
        ),
    }
    if matching:
        encoders[MATCHER] = _part(Matcher, MATCHER, config.matcher).bind(
            wanted.model, wanted.space, config.matcher.model_dump(), bf16, config.door.max_pixels
        )
    search = _part(Searcher, SEARCH, config.search, max_ongoing_requests=256)
    return search.bind(wanted.index, wanted.space, config.search.model_dump(), encoders)


def _part(kind: type, name: str, settings: ReplicaConfig, max_ongoing_requests: int = 8) -> Any:
    """A deployment that scales by itself where it may."""
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas > settings.replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_batches,
                "upscale_delay_s": 5,
                "downscale_delay_s": 60,
                "metrics_interval_s": 1,
                "look_back_period_s": 5,
            }
        }
    return serve.deployment(kind).options(
        name=name,
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=64,
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "runtime_env": {"env_vars": REPLICA},
        },
        graceful_shutdown_timeout_s=10,
        logging_config=_LOGGING,
        **_HEALTH,
        **scaling,
    )
