"""How many trials a cluster runs at once without a deadlock between drivers of trials, workers and data tasks.

A trial takes its driver's CPUs from Tune, its workers' from Train and its data tasks' from Ray Data, one after another.
With too many trials, drivers hold CPUs while they wait for workers, or workers while they wait for data tasks, forever.
"""

import math
from collections.abc import Mapping, Sequence

from models.config import InputError
from pipelines.cluster.capacity import STATUS_KEY, is_scaled
from pipelines.config import ComputeConfig

DRIVER_CPUS = 0.25
"""CPUs of a trial's own process, which waits while the workers train and packages the model after them."""
SCALED = 4
"""Least trials at once where an autoscaler adds nodes for trials that wait."""

Node = Mapping[str, float]
"""Resources of a node as Ray names them: CPU, GPU."""


def at_once(nodes: Sequence[Node], compute: ComputeConfig, most: int) -> int:
    """How many trials, at most `most`, fit together, each with driver, workers and one data task; 0 where none does."""
    count = 0
    while count < most and _fits(nodes, compute, count + 1):
        count += 1
    return count


def _fits(nodes: Sequence[Node], compute: ComputeConfig, count: int) -> bool:
    """Whether `count` trials fit. Drivers and data tasks are placed first, each where it costs the fewest workers.

    Greedy, so it may answer no where a cleverer packing exists: too few trials at once are slow, too many deadlock.
    """
    free = [float(node.get("CPU", 0)) for node in nodes]
    gpus = [float(node.get("GPU", 0)) for node in nodes]

    def workers_on(node: int, cpus: float) -> int:
        fit = int(cpus / compute.cpus_per_worker + 1e-4)
        return min(fit, int(gpus[node] + 1e-4)) if compute.gpus else fit

    for size in [DRIVER_CPUS, compute.cpus_per_data_task] * count:
        able = [node for node, cpus in enumerate(free) if cpus >= size - 1e-6]
        if not able:
            return False
        node = min(able, key=lambda n: (workers_on(n, free[n]) - workers_on(n, free[n] - size), free[n]))
        free[node] -= size
    return sum(workers_on(node, cpus) for node, cpus in enumerate(free)) >= count * compute.workers


def data_cpus(nodes: Sequence[Node], compute: ComputeConfig, count: int) -> float:
    """CPUs of a data task, at most the configured ones, with which all tasks of `count` trials fit at once.

    A worker's reader has at most as many tasks as there are cores. They may all wait for that worker to take their
    output while it waits for the tasks of its validation, so there must be room for both. The number is what Ray
    schedules by: it bounds how many tasks run, not what they use.
    """
    total = sum(float(node.get("CPU", 0)) for node in nodes)
    left = total - count * (DRIVER_CPUS + compute.workers * compute.cpus_per_worker)
    tasks = count * compute.workers * max(1, int(total)) + count
    share = math.floor(1e4 * left / tasks) / 1e4
    return min(compute.cpus_per_data_task, share) if share > 0 else compute.cpus_per_data_task


def plan_slots(compute: ComputeConfig, trials: int) -> tuple[int, ComputeConfig]:
    """(trials to run at once on the cluster that Ray is connected to, what each takes of it).

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
        total = sum(float(node.get("CPU", 0)) for node in nodes)
        raise InputError(
            f"--compute.workers {compute.workers}: a trial needs {DRIVER_CPUS:g} CPU for itself, {compute.workers} x "
            f"{compute.cpus_per_worker:g} for workers and {compute.cpus_per_data_task:g} for data, and the cluster of "
            f"{total:g} CPU has no room for one: ask for fewer or smaller workers (--compute.cpus-per-worker)"
        )
    changes: dict[str, float] = {"cpus_per_data_task": data_cpus(nodes, compute, count)}
    if len(nodes) == 1 and not compute.gpus and not compute.threads:
        changes["threads"] = max(1, int(nodes[0].get("CPU", 1)) // (count * compute.workers))
    return count, compute.override(changes)
