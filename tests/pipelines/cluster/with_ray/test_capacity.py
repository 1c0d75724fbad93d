import json

import pytest

from models.config import InputError
from pipelines.cluster import capacity
from pipelines.cluster.capacity import holds, is_scaled, require_capacity


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "data_cpus", "fits"),
    [
        (2, 0.5, 0, 0.25, True),
        (3, 0.5, 0, 0.5, True),  # to the last slot
        (4, 0.5, 0, 0.25, False),  # all slots, none left for the data
        (2, 1.0, 0, 0.25, False),
        (19, 0.1, 0, 0.1, True),  # twenty tenths are two
        (20, 0.1, 0, 0.1, False),
        (1, 0.5, 1, 0.25, False),  # no GPU
    ],
)
def test_two_slots_hold_workers_and_one_data_task(workers, cpus, gpus, data_cpus, fits):
    assert holds([{"CPU": 2.0}], workers, cpus, gpus, data_cpus) is fits


def test_a_worker_lies_on_one_node():
    assert not holds([{"CPU": 3.0}, {"CPU": 3.0}], 1, 4, 0, 1)
    assert holds([{"CPU": 4.0}, {"CPU": 1.0}], 1, 4, 0, 1)
    assert not holds([{"CPU": 4.0}, {"CPU": 1.0}], 1, 4, 0, 2)


def test_gpus_count_with_cpus_of_their_node():
    nodes = [{"memory": 1e9}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 16.0}]
    assert holds(nodes, 2, 4, 1, 1)
    assert not holds(nodes, 3, 1, 1, 1)
    assert not holds(nodes, 2, 5, 1, 1)  # two workers of five CPUs do not fit beside two GPUs with eight
    assert not holds([], 1, 1, 0, 1)


def test_an_autoscaler_is_seen():
    by_hand = {"ray.io/node-id": "e359"}
    assert not is_scaled([by_hand], None)
    assert is_scaled([by_hand | {"ray.io/node-group": "head"}], None)

    def report(kind: str) -> bytes:  # as Ray's first autoscaler writes it
        return json.dumps({"time": 1.0, "autoscaler_report": {"node_type_mapping": {"e359": kind}}}).encode()

    assert not is_scaled([by_hand], report("node_e359"))
    assert is_scaled([by_hand], report("head"))
    assert not is_scaled([by_hand], b'{"load_metrics_report": {}}')


def test_more_than_the_cluster_can_ever_give_is_refused_unless_it_grows(ray_local, monkeypatch):
    require_capacity(workers=2, cpus=0.5, gpus=0, data_cpus=0.25)
    with pytest.raises(InputError, match=r"--compute\.workers 5: .*\(2 CPU, 0 GPU on 1 nodes\)") as refusal:
        require_capacity(workers=5, cpus=0.5, gpus=0, data_cpus=0.25)
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr(capacity, "NODE_GROUP", "ray.io/node-id")  # a label that this node has
    require_capacity(workers=100, cpus=4, gpus=1, data_cpus=0.25)
