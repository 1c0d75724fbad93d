"""How many trials a cluster runs at once, so that drivers of trials, their workers and data tasks never wait in a ring.

A trial takes its driver's CPUs from Tune, its workers' from Train and its data tasks' from Ray Data, one after another.
Whoever starts too many has drivers that wait for workers, or workers that wait for data, with nothing left to give.
"""

import math
from collections.abc import Mapping, Sequence

from models.config import InputError
from pipelines.cluster.capacity import STATUS_KEY, is_scaled
from pipelines.config import ComputeConfig

DRIVER_CPUS = 0.25
"""Of a trial's own process: it waits while the workers train, and packages when they have gone."""
SCALED = 4
"""At least so many where an autoscaler adds nodes for those that wait."""

Node = Mapping[str, float]


def at_once(nodes: Sequence[Node], compute: ComputeConfig, most: int) -> int:
    """Trials, at most `most`, that fit together, each with driver, workers and one data task; 0 where none does."""
    count = 0
    while count < most and _fits(nodes, compute, count + 1):
        count += 1
    return count


def _fits(nodes: Sequence[Node], compute: ComputeConfig, count: int) -> bool:
    """Whether `count` trials do; drivers and data tasks lie where they take the fewest workers' places."""
    free = [float(node.get("CPU", 0)) for node in nodes]
    gpus = [float(node.get("GPU", 0)) for node in nodes]

    def places(node: int, cpus: float) -> int:
        fit = int(cpus / compute.cpus_per_worker + 1e-4)
        return min(fit, int(gpus[node] + 1e-4)) if compute.gpus else fit

    for size in [DRIVER_CPUS, compute.cpus_per_data_task] * count:
        able = [node for node, cpus in enumerate(free) if cpus >= size - 1e-6]
        if not able:
            return False
        node = min(able, key=lambda n: (places(n, free[n]) - places(n, free[n] - size), free[n]))
        free[node] -= size
    return sum(places(node, cpus) for node, cpus in enumerate(free)) >= count * compute.workers


def data_cpus(nodes: Sequence[Node], compute: ComputeConfig, count: int) -> float:
    """CPUs of a data task, at most the configured ones, with which all tasks of `count` trials fit at once.

    A worker's reader has at most as many tasks as there are cores, and they may wait for it with full hands while it
    waits for the tasks of its validation. The number is logical: it bounds how many run, not what they use.
    """
    total = sum(float(node.get("CPU", 0)) for node in nodes)
    left = total - count * (DRIVER_CPUS + compute.workers * compute.cpus_per_worker)
    tasks = count * compute.workers * max(1, int(total)) + count
    share = math.floor(1e4 * left / tasks) / 1e4
    return min(compute.cpus_per_data_task, share) if share > 0 else compute.cpus_per_data_task


def plan_slots(compute: ComputeConfig, trials: int) -> tuple[int, ComputeConfig]:
    """How many trials to run at once on the cluster that Ray is connected to, and what each takes of it.

    Raises InputError where not even one fits. Torch threads share the cores of a single machine, unless they are set.
    """
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node["Resources"] for node in alive]
    count = at_once(nodes, compute, trials)
    if is_scaled([node["Labels"] for node in alive], _internal_kv_get(STATUS_KEY)):
        return min(trials, max(count, SCALED)), compute
    if not count:
        there = sum(float(node.get("CPU", 0)) for node in nodes)
        raise InputError(
            f"--compute.workers {compute.workers}: a trial needs {DRIVER_CPUS:g} CPU for itself, {compute.workers} x "
            f"{compute.cpus_per_worker:g} for workers and {compute.cpus_per_data_task:g} for data, and the cluster of "
            f"{there:g} CPU has no place for one: ask for fewer or smaller workers (--compute.cpus-per-worker)"
        )
    changes: dict[str, float] = {"cpus_per_data_task": data_cpus(nodes, compute, count)}
    if len(nodes) == 1 and not compute.gpus and not compute.threads:
        changes["threads"] = max(1, int(nodes[0].get("CPU", 1)) // (count * compute.workers))
    return count, compute.override(changes)
