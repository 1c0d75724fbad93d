"""Numbers of the service for Prometheus, under names in the style of text-embeddings-inference.

Several gateways that share one port also share one folder (PROMETHEUS_MULTIPROC_DIR, set before this module is
imported): whichever of them answers `/metrics` gives the sums over all. Without it each process counts for itself.
"""

import os
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable: folder in which the gateways of a machine add up their numbers."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All numbers of a process, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._count = self._counter("te_request_count", "Requests that were let in.", "method")
        self._success = self._counter("te_request_success", "Requests that were answered.", "method")
        self._failure = self._counter("te_request_failure", "Requests that failed, by the error's code.", "err")
        self._rejected = self._counter("te_request_rejected", "Requests turned away as the service was full.", "reason")
        self._inputs = self._counter("te_request_inputs", "Texts and images of the requests let in.", "kind")
        self._duration = self._histogram("te_request_duration", "Seconds from a request's head to its reply.", "method")
        self._decode = self._histogram("te_request_decode_duration", "Seconds that a request's images took to decode.")
        self._queued = self._histogram(
            "te_request_queue_duration", "Seconds that a batch's oldest input waited.", "kind"
        )
        self._inference = self._histogram("te_request_inference_duration", "Seconds that a batch took.", "kind")
        self._batch = self._histogram("te_batch_next_size", "Inputs of a batch.", "kind", buckets=_ITEMS)
        self._queue = self._gauge("te_queue_size", "Inputs that are admitted and not answered yet.", "kind")
        self._held = self._gauge("te_request_held", "Requests in progress now.")
        self._alarm = self._gauge("te_version_alarm", "1 while a newer version is not served, as its check failed.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        mode: Literal["livemax", "livesum"] = "livemax" if name.endswith("alarm") else "livesum"
        return Gauge(name, text, labels, multiprocess_mode=mode, registry=self._registry)

    def started(self, method: str) -> None:
        """Count a request that was let in."""
        self._count.labels(method).inc()
        self._held.inc()

    def inputs(self, texts: int, images: int) -> None:
        """Count the texts and images of a request."""
        if texts:
            self._inputs.labels("text").inc(texts)
        if images:
            self._inputs.labels("image").inc(images)

    def finished(self, method: str, error: str, seconds: float) -> None:
        """Count the end of a request that was let in; `error` is the code of its reply, "" where it succeeded."""
        self._held.dec()
        self._duration.labels(method).observe(seconds)
        if error:
            self._failure.labels(error).inc()
        else:
            self._success.labels(method).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that was turned away; `reason` is what there were too many of: `requests` or `inputs`."""
        self._rejected.labels(reason).inc()

    def decoded(self, seconds: float) -> None:
        """Record how long the images of a request took to decode."""
        self._decode.observe(seconds)

    def batch(self, modality: str, items: int, seconds: float, waited: float) -> None:
        """Record a batch: its size, seconds that the call took, seconds that its oldest input had waited before."""
        self._batch.labels(modality).observe(items)
        self._inference.labels(modality).observe(seconds)
        self._queued.labels(modality).observe(waited)

    def queue(self, modality: str, items: int) -> None:
        """Set the number of inputs that are admitted and not answered."""
        self._queue.labels(modality).set(items)

    def alarm(self, on: bool) -> None:
        """Set whether a newer version failed its checks."""
        self._alarm.set(on)

    def render(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type."""
        registry = self._registry
        if os.environ.get(METRICS_FOLDER):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST
