"""Losses, speed and waiting between two reports; nothing here waits for the device before it is read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipelines.step.state import StepResult


class Meter:
    """Collects steps, is read at the logging interval."""

    def __init__(self) -> None:
        self.bad_steps: list[int] = []
        """Steps before the last reading in which this worker's own sums were not finite."""
        self.restart()

    def restart(self) -> None:
        """Forget everything; also called after a pause that is no training."""
        self._results: list[dict[str, torch.Tensor]] = []
        self._finite: list[tuple[int, torch.Tensor]] = []
        self.empty_steps = 0
        """Global batches of which no sample was good."""
        self._samples, self._waited, self._started = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def add(self, result: StepResult, samples: int, step: int) -> None:
        """One step over `samples` good samples of all workers."""
        named = {f"train/loss/{name}": value for name, value in result.terms.items()}
        named |= {"train/loss/total": result.loss, "train/gradient_norm": result.gradient_norm}
        self._results.append(named | result.metrics)
        self._finite.append((step, result.finite))
        self._samples += samples

    def read(self) -> dict[str, float]:
        """Means since the last reading, samples a second of all workers, this worker's share of waiting; then restart.

        Empty where there was no step.
        """
        if not self._results:
            return {}
        seconds = time.perf_counter() - self._started
        names = sorted({name for result in self._results for name in result})
        values = {n: [r[n].detach().double().cpu() for r in self._results if n in r] for n in names}
        means = {name: float(torch.stack(v).mean()) for name, v in values.items()}
        means["perf/samples_per_second"] = self._samples / seconds
        means["perf/data_wait_share"] = self._waited / seconds
        if self.empty_steps:
            means["train/empty_steps"] = float(self.empty_steps)
        self.bad_steps = [step for step, finite in self._finite if not bool(finite)]
        self.restart()
        return means
