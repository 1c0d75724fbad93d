"""The Serve application of one version: encoders, fusion encoder where it has one, and search."""

from typing import Any

from ray import serve
from ray.serve import Application

from serving.config import ReplicaConfig, ServingConfig
from serving.environment import HEALTH, LOGGING, REPLICA
from serving.gateway.version_client import IMAGE, MATCHER, SEARCH, TEXT
from serving.model_source import VersionSpec
from serving.replicas.encoders import ImageEncoder, Matcher, TextEncoder
from serving.replicas.searcher import Searcher


def build_version(spec: VersionSpec, config: ServingConfig, matching: bool) -> Application:
    """The application of one version: encoders, fusion encoder where it has one, and search, which binds them."""
    bf16 = config.precision == "bf16"
    encoders = {
        TEXT: _deployment(TextEncoder, TEXT, config.text).bind(spec.model, spec.space, config.text.model_dump(), bf16),
        IMAGE: _deployment(ImageEncoder, IMAGE, config.image).bind(
            spec.model, spec.space, config.image.model_dump(), bf16
        ),
    }
    if matching:
        encoders[MATCHER] = _deployment(Matcher, MATCHER, config.matcher).bind(
            spec.model, spec.space, config.matcher.model_dump(), bf16, config.door.max_pixels
        )
    search = _deployment(Searcher, SEARCH, config.search, max_ongoing_requests=256)
    return search.bind(spec.index, spec.space, config.search.model_dump(), encoders)


def _deployment(kind: type, name: str, settings: ReplicaConfig, max_ongoing_requests: int = 8) -> Any:
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
        logging_config=LOGGING,
        **HEALTH,
        **scaling,
    )
