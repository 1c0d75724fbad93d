"""How many trials fit at once: never so many that they wait for each other."""

import pytest

from models.config import InputError
from pipelines.config import ComputeConfig
from tuning.sweep.concurrency import DRIVER_CPUS, at_once, data_cpus


def node(cpus: float, gpus: float = 0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus}


@pytest.mark.parametrize(
    ("nodes", "compute", "count"),
    [
        ([node(2)], {}, 2),  # two cores: 2 x (0.25 driver + 0.5 worker + 0.25 data)
        ([node(4)], {}, 4),
        ([node(2)], {"workers": 2}, 1),
        ([node(2)], {"workers": 3}, 1),
        ([node(2)], {"workers": 4}, 0),
        ([node(1)], {"cpus_per_worker": 1}, 0),
        ([node(8), node(8)], {"workers": 4, "cpus_per_worker": 2}, 1),
        ([node(0), node(4), node(3, 4)], {"gpus": True, "workers": 2}, 2),
        ([node(64)], {}, 20),
    ],
)
def test_so_many_trials_fit_at_once(nodes, compute, count):
    assert at_once(nodes, ComputeConfig(**compute), most=20) == count


@pytest.mark.parametrize("cpus", [2, 3, 4, 8, 17])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_all_data_tasks_of_all_trials_fit_at_the_same_time(cpus, workers):
    compute = ComputeConfig(workers=workers)
    count = at_once([node(cpus)], compute, most=50)
    assert count > 0
    share = data_cpus([node(cpus)], compute, count)
    readers = count * workers * cpus  # a reader has at most as many tasks as there are cores
    taken = count * (DRIVER_CPUS + workers * compute.cpus_per_worker) + (readers + count) * share
    assert 0 < share <= compute.cpus_per_data_task and taken <= cpus + 1e-9


def test_a_trial_that_never_fits_is_refused_in_one_line(monkeypatch):
    import ray
    import ray.experimental.internal_kv as kv

    from tuning.sweep.concurrency import plan_slots

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node(2), "Labels": {}}])
    monkeypatch.setattr(kv, "_internal_kv_get", lambda key: None)
    assert plan_slots(ComputeConfig(), 9) == (2, ComputeConfig(cpus_per_data_task=0.0833, threads=1))
    with pytest.raises(
        InputError, match=r"--compute\.workers 5: a trial needs 0\.25 CPU for itself, 5 x 0\.5"
    ) as caught:
        plan_slots(ComputeConfig(workers=5), 9)
    assert "\n" not in str(caught.value)
