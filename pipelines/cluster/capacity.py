"""Whether a cluster can ever run what is asked: Ray itself would wait for workers that never come."""

import json
from collections.abc import Mapping, Sequence

import ray
from ray.experimental.internal_kv import _internal_kv_get

from models.config import InputError

NODE_GROUP = "ray.io/node-group"
STATUS_KEY = "__autoscaling_status"


def require_capacity(workers: int, cpus: float, gpus: float, data_cpus: float) -> None:
    """Raises InputError where the nodes cannot hold `workers` and one data task at once, and nothing adds nodes.

    `cpus` and `gpus` are a worker's. Ray must be initialised. What is taken now does not count, only what there is.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = [node["Resources"] for node in nodes]
    if holds(resources, workers, cpus, gpus, data_cpus):
        return
    if is_scaled([node["Labels"] for node in nodes], _internal_kv_get(STATUS_KEY)):
        return
    needed = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    there = ", ".join(f"{sum(node.get(kind, 0) for node in resources):g} {kind}" for kind in ("CPU", "GPU"))
    raise InputError(
        f"--compute.workers {workers}: that many workers of {needed} beside a data task of {data_cpus:g} CPU never fit "
        f"on the cluster ({there} on {len(nodes)} nodes), and nothing adds nodes: "
        "ask for fewer or smaller workers (--compute.cpus-per-worker), or start more nodes"
    )


def holds(nodes: Sequence[Mapping[str, float]], workers: int, cpus: float, gpus: float, data_cpus: float) -> bool:
    """Whether nodes with these resources take all workers and, on one of them, a data task of `data_cpus` CPUs."""
    slots = [_slots(node.get("CPU", 0), node.get("GPU", 0), cpus, gpus) for node in nodes]
    for node, own in zip(nodes, slots, strict=True):
        left = node.get("CPU", 0) - data_cpus
        if left >= 0 and sum(slots) - own + _slots(left, node.get("GPU", 0), cpus, gpus) >= workers:
            return True
    return False


def _slots(cpu: float, gpu: float, cpus: float, gpus: float) -> int:
    """How many workers one node takes; Ray counts in ten-thousandths, so rounding errors must not cost a slot."""
    by_cpu = int(cpu / cpus + 1e-4)
    return min(by_cpu, int(gpu / gpus + 1e-4)) if gpus else by_cpu


def is_scaled(labels: Sequence[Mapping[str, str]], status: bytes | None) -> bool:
    """Whether an autoscaler manages the cluster, from the nodes' labels and the autoscaler's own report.

    Ray's autoscaler (v2: `ray up`, KubeRay) labels each node with its group; nodes started by hand have no such label.
    Version 1 writes a report instead, in which nodes started by hand are types of their own, named after the node.
    A KubeRay cluster with autoscaling off is labelled as well: there Ray Train's own time-out has to end the wait.
    """
    if any(node.get(NODE_GROUP) for node in labels):
        return True
    report = json.loads(status).get("autoscaler_report", {}) if status else {}
    return any(kind != f"node_{node}" for node, kind in report.get("node_type_mapping", {}).items())
