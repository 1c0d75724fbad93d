"""What a run is told about its health: stops, alarms, repair, alike on all workers."""

import math

import pytest
import torch

from models.collectives import SoloWorkers
from models.objectives import ScheduleState
from pipelines.step.state import StepResult, TrainState
from pipelines.step.training_step import training_step
from pipelines.train.health import TrainingStopped, Watch
from pipelines.train.monitor import Meter
from tests.support import tiny
from tests.support.fake_workers import on_threads

CODES = 200


def watched(**changes) -> tuple[TrainState, Watch]:
    goal = tiny.objective("both-dual", codebook__size=CODES, queue__size=64, **changes)
    state = tiny.state(goal)
    training_step(state, tiny.batch(8), tiny.settings(goal), ScheduleState(0.4))
    return state, Watch(state, tiny.settings(goal), SoloWorkers(), 8)


def fill_window(state: TrainState, hits: torch.Tensor) -> None:
    """As if so many images and texts had been nearest to each code since the last report."""
    state.usage.pending_hits.copy_(hits)
    state.usage.pending_pairs.fill_(int(hits[0].sum()))


def test_a_full_window_of_few_codes_stops_the_run_with_what_to_do():
    state, watch = watched()
    hits = torch.zeros(2, CODES, dtype=torch.int64)
    hits[:, :2] = 10 * CODES
    fill_window(state, hits)
    values = watch.usage(step=50, progress=0.5)
    assert values["codebook/ppl_v"] == pytest.approx(2)
    assert watch.alarms(values, 50, 0.05) == []  # too early to judge
    stops = [alarm for alarm in watch.alarms(values, 50, 0.5) if alarm.level == "stop"]
    assert {alarm.key for alarm in stops} == {"codebook/ppl_v", "codebook/ppl_t"}
    assert "objective.codebook.balance" in stops[0].message


@pytest.mark.parametrize(("enabled", "progress", "repaired"), [(True, 0.5, 2), (True, 0.95, 0), (False, 0.5, None)])
def test_dead_codes_are_repaired_after_a_full_window_but_not_in_the_last_tenth(enabled, progress, repaired):
    state, watch = watched(codebook__dead__enabled=enabled)
    hits = torch.full((2, CODES), 21, dtype=torch.int64)
    hits[:, [3, 40, 77]] = 0
    before = state.model.codebook.weight.detach().clone()
    fill_window(state, hits)
    values = watch.usage(step=50, progress=progress)
    assert values.get("codebook/repaired") == repaired
    changed = (state.model.codebook.weight != before).any(1).nonzero()[:, 0].tolist()
    assert len(changed) == (repaired or 0) and set(changed) <= {3, 40, 77}
    assert "codebook/repaired" not in watch.usage(step=60, progress=progress)  # no window has been filled since


def result(loss: float, finite: bool) -> StepResult:
    value = torch.tensor(loss)
    return StepResult(value, {}, {"code": value}, torch.tensor(1.0), {}, torch.tensor(finite))


def test_what_is_no_number_stops_every_worker_and_names_the_first():
    def one(workers) -> str:
        meter, watch = Meter(), watched()[1]
        watch._workers = workers
        for step in (1, 2, 3):
            bad = step == 3 or (step == 2 and workers.rank == 1)
            meter.add(result(math.nan if step >= 2 else 1.0, not bad), 4, step)
        values = meter.read() | {"codebook/ppl_v": 12.0}
        with pytest.raises(TrainingStopped) as stopped:
            watch.require_finite(values, meter.bad_steps, 3)
        return str(stopped.value)

    first, second = on_threads(2, one)
    assert first == second
    assert first.startswith("step 3: code, total is not finite (first in step 2 on worker 1), codebook/ppl_v 12;")


def test_finite_numbers_stop_nothing():
    watched()[1].require_finite({"train/loss/code": 1.0, "embedding/gap": math.nan}, [], 3)


def test_batches_without_a_good_sample_are_counted():
    meter = Meter()
    meter.empty_steps += 2
    meter.add(result(1.0, True), 4, 1)
    assert meter.read()["train/empty_steps"] == 2
    meter.add(result(1.0, True), 4, 2)
    assert "train/empty_steps" not in meter.read()
