"""The codebook beside its terms (docs/spec/codebook.md 3.4, 3.6, 4, 7): queue, empty ranks, repair, first codes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import codebook
from models.assignment import build_problem, queue_entries, solve
from models.codebook import Pair, code_sums, transport_sums
from models.collectives import SoloWorkers
from models.config import CodebookConfig, InputError
from models.objectives import ScheduleState, check_codebook
from models.teacher import FeatureQueue
from models.transport import Scores, sinkhorn
from pipelines.step.context import build_context
from pipelines.step.grad_cache import encode
from pipelines.step.state import TrainState
from pipelines.step.training_step import loss_and_gradients, training_step
from tests.support import tiny
from tests.support.codebook_cases import LIMIT, SOLO, number, random_pairs
from tests.support.fake_workers import on_threads

# ---- the queue in the assignment ----


def queue_of(vectors: torch.Tensor, size: int) -> FeatureQueue:
    queue = FeatureQueue(size, vectors.shape[2]).double()
    ids = torch.arange(vectors.shape[1])
    queue.enqueue(vectors[0], vectors[1], ids, ids)
    return queue


def test_p23_an_empty_queue_is_no_queue_and_unfilled_slots_change_nothing():
    _, teacher, codes = random_pairs(codes=9)
    _, older, _ = random_pairs(seed=1)
    batch, past = torch.stack([*teacher]), torch.stack([*older])

    def potentials(queue: FeatureQueue | None, assign_queue: Any = "auto") -> torch.Tensor:
        config = CodebookConfig(size=9, assign_queue=assign_queue)
        return solve(config, build_problem(config, batch, queue, [6], SOLO), codes).potentials

    empty = FeatureQueue(20, 4).double()
    empty.image.fill_(7.0)  # what lies in slots that were never written must not matter
    without = potentials(None)
    assert torch.allclose(potentials(empty), without, atol=1e-12)
    assert torch.allclose(potentials(queue_of(past, 20), 0), without, atol=1e-12)
    exact = potentials(queue_of(past, 6))
    assert torch.allclose(potentials(queue_of(past, 20)), exact, atol=1e-12)
    assert not torch.allclose(exact, without, atol=1e-3)
    both = Scores(torch.cat([batch, past], 1), codes)
    expected = sinkhorn(both, torch.ones(12, dtype=torch.bool), 0.05, 3, 1.0, SOLO).potentials
    assert torch.allclose(exact, expected, atol=1e-12)


def test_p23_a_batch_meets_its_own_rows_in_the_queue_only_in_the_next_step():
    goal = tiny.objective("both-dual")
    state, rows, settings = tiny.state(goal), tiny.batch(4), tiny.settings(goal)
    student = encode(state.model, rows.view1, rows)
    first, queue_rows = build_context(state, student, rows, settings, ScheduleState(0.0), SOLO)
    alone_ = build_problem(goal.codebook, torch.stack([first.teacher.image, first.teacher.text]), None, [4], SOLO)
    assert torch.allclose(
        first.plan.potentials, solve(goal.codebook, alone_, state.model.codebook.unit()).potentials, atol=1e-12
    )
    state.queue.enqueue(*queue_rows)
    second, _ = build_context(state, student, rows, settings, ScheduleState(0.0), SOLO)
    assert torch.allclose(second.plan.potentials, first.plan.potentials, atol=1e-9)  # every sample twice: the same plan
    problem = build_problem(
        goal.codebook, torch.stack([second.teacher.image, second.teacher.text]), state.queue, [4], SOLO
    )
    assert int(problem.valid.sum()) == 8 and problem.valid.shape == (10,)  # 2 K - B entries are looked at


def test_the_newest_entries_come_first_and_auto_takes_two_samples_a_code():
    queue = FeatureQueue(4, 1).double()
    for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        row = torch.full((1, 1), value, dtype=torch.float64)
        queue.enqueue(row, -row, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    both, written = queue.newest(3)
    assert both[:, :, 0].tolist() == [[6, 5, 4], [-6, -5, -4]] and written.all()
    for rows, size, entries in ((10, 100, 6), (10, 4, 4), (40, 100, 0)):
        assert queue_entries(CodebookConfig(size=8), rows, size) == entries
    assert queue_entries(CodebookConfig(size=8, assign_queue=50), 10, 20) == 20


# ---- repair, sign, empty shards ----


def test_p26_dead_codes_are_repaired_alike_on_all_ranks():
    from pipelines.step.codebook import repair_dead_codes

    goal = tiny.objective("both-dual", codebook__size=200, codebook__dead__enabled=True, queue__size=64)

    def repaired(_: Any) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        state = tiny.state(goal)
        training_step(state, tiny.batch(8), tiny.settings(goal), ScheduleState(0.4))
        state.usage.last_hits.fill_(1000)
        state.usage.last_pairs.fill_(200_000)
        state.usage.last_hits[:, 7] = 0
        state.usage.last_hits[:, 9] = 0
        state.usage.last_hits[0, 11] = 0  # dead for images only: alive
        state.usage.last_hits[:, 13:17] = 0
        state.usage.last_hits[1, [7, 13, 14, 15]] = 3  # dead too, but not as empty as 9 and 16
        before = state.model.codebook.weight.detach().clone()
        count = repair_dead_codes(state, tiny.settings(goal, seed=5), step=30)
        return count, before, state.model.codebook.weight.detach().clone(), _moments(state)

    runs = [repaired(None) for _ in range(2)]
    count, before, after, moments = runs[0]
    changed = (before != after).any(1).nonzero()[:, 0].tolist()
    assert count == len(changed) == 2  # one per cent of 200
    assert changed == [9, 16]
    assert torch.allclose(after.norm(dim=1), torch.ones(200, dtype=after.dtype), atol=1e-12)
    assert not moments[:, changed].any() and moments[:, [0, 1]].any()
    assert torch.equal(after, runs[1][2])


def _moments(state: TrainState) -> torch.Tensor:
    entry = state.optimizer.state[state.model.codebook.weight]
    return torch.stack([entry["exp_avg"], entry["exp_avg_sq"]]).clone()


def test_p28_a_worker_without_rows_waits_for_no_one_and_changes_nothing():
    config = CodebookConfig(size=5)
    _, teacher, codes = random_pairs()
    batch = torch.stack([*teacher])

    def one(workers: Any) -> torch.Tensor:
        mine = batch if workers.rank == 1 else batch[:, :0]
        problem = build_problem(config, mine, None, [0, 6], workers)
        plan = solve(config, problem, codes)
        pair = Pair(mine[0], mine[1])
        sums = [*code_sums(pair, pair, codes, plan, 0.1, 0.0, LIMIT), *transport_sums(pair, codes, plan, LIMIT)]
        return torch.cat([plan.potentials.flatten(), workers.all_reduce_sum(torch.stack(sums))])

    alone_ = one(type("Last", (SoloWorkers,), {"rank": 1})())
    for result in on_threads(2, one):
        assert torch.allclose(result, alone_, atol=1e-12)


def test_p28_no_valid_sample_anywhere_gives_no_loss_and_no_nan():
    config = CodebookConfig(size=5)
    _, _, codes = random_pairs()
    nothing = torch.zeros(2, 0, 4, dtype=torch.float64)
    plan = solve(config, build_problem(config, nothing, None, [0], SOLO), codes)
    assert torch.allclose(plan.targets(torch.randn(2, 3, 5).double()), torch.full((2, 3, 5), 0.2).double())
    table = codes.clone().requires_grad_()
    pair = Pair(nothing[0], nothing[1])
    loss = sum(code_sums(pair, pair, table, plan, 0.1, 0.0, LIMIT)) + sum(transport_sums(pair, table, plan, LIMIT))
    loss.backward()
    assert number(loss) == 0 and not table.grad.any()


# ---- the parameter ----


def test_codes_stand_still_while_frozen_and_have_length_1_after_every_step():
    goal = tiny.objective("both-dual")
    state = tiny.state(goal, rate=0.1)
    start = state.model.codebook.weight.detach().clone()
    training_step(state, tiny.batch(5), tiny.settings(goal), ScheduleState(0.4, frozen=True))
    assert torch.allclose(state.model.codebook.weight, start, atol=1e-12)
    assert state.model.codebook.weight not in state.optimizer.state
    training_step(state, tiny.batch(5), tiny.settings(goal), ScheduleState(0.4))
    assert not torch.allclose(state.model.codebook.weight, start, atol=1e-3)
    assert torch.allclose(state.model.codebook.weight.norm(dim=1), torch.ones(5).double(), atol=1e-12)


def test_the_ramp_scales_the_codebooks_terms_and_at_0_skips_them():
    goal = tiny.objective("both-dual")
    grads = {}
    for ramp in (0.0, 0.5, 1.0):
        state = tiny.state(goal)
        outcome = loss_and_gradients(state, tiny.batch(5), tiny.settings(goal), ScheduleState(0.4, ramp=ramp), SOLO)
        assert ("i2p" in outcome.means) == (ramp > 0)
        grads[ramp] = state.model.codebook.weight.grad
    assert grads[0.0] is None
    assert torch.allclose(grads[0.5] * 2, grads[1.0], atol=1e-12)


def test_the_codebook_has_an_optimiser_group_of_its_own_without_decay_and_no_teacher():
    state = tiny.state(tiny.objective("both"))
    *_, last = state.optimizer.param_groups
    assert last["weight_decay"] == 0.0 and last["params"] == [state.model.codebook.weight]
    assert state.teacher.codebook is None
    assert torch.allclose(state.model.codebook.weight.norm(dim=1), torch.ones(5).double(), atol=1e-6)


def test_queue_sample_plants_the_codes_once_there_are_enough_samples():
    goal = tiny.objective("both-dual", codebook__size=6, codebook__init="queue_sample", queue__size=20)
    state = tiny.state(goal)
    start = state.model.codebook.weight.detach().clone()
    settings, still = tiny.settings(goal, seed=1), ScheduleState(0.4, frozen=True)
    training_step(state, tiny.batch(4), settings, still)
    assert not state.codes_initialised and torch.allclose(state.model.codebook.weight, start, atol=1e-12)
    queue = state.queue
    training_step(state, tiny.batch(4, 1), settings, still)
    assert state.codes_initialised
    seen = torch.cat([queue.image[:8], queue.text[:8]])
    cosines = state.model.codebook.weight.detach() @ seen.T
    assert bool((cosines.amax(1) > 0.98).all())
    planted = state.model.codebook.weight.detach().clone()
    training_step(state, tiny.batch(4, 2), settings, still)
    assert torch.allclose(state.model.codebook.weight, planted, atol=1e-12)


def test_planted_codes_are_distinct_and_of_both_modalities_alternately():
    vectors = F.normalize(torch.eye(8).double(), dim=1).view(2, 4, 8)
    rows = codebook.rows_from_features(vectors, 7, 0.0, torch.Generator().manual_seed(0))
    places = rows.argmax(1).tolist()
    assert len(set(places)) == 7 and [place >= 4 for place in places] == [False, True] * 3 + [False]
    with pytest.raises(ValueError, match="9 codes from 4 pairs"):
        codebook.rows_from_features(vectors, 9, 0.0, torch.Generator())


def test_badly_covered_features_take_the_place_of_dead_codes():
    codes = torch.eye(4).double()[:2]
    features = torch.cat([codes.repeat(50, 1), torch.eye(4).double()[2:]])
    rows = codebook.badly_covered(features, codes, 2, 0.0, torch.Generator().manual_seed(0))
    assert sorted(rows.argmax(1).tolist()) == [2, 3]


# ---- what is refused, what is warned about ----


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"codebook__eps": 0.0}, "eps"),
        ({"codebook__tau": 0.0}, "tau"),
        ({"codebook__balance": 1.1}, "balance"),
        ({"codebook__size": 0}, "size"),
        ({"codebook__assign_queue": -1}, "assign_queue"),
    ],
)
def test_values_out_of_range_are_refused_with_their_field(changes, field):
    with pytest.raises(ValueError, match=field):
        tiny.objective("both", **changes)


def test_what_cannot_work_is_refused_and_what_may_not_is_warned_about():
    def notes(batch: int = 64, **changes: Any) -> list[str]:
        return check_codebook(tiny.objective("both", **{"codebook__size": 64, "queue__size": 4096} | changes), batch)

    assert notes() == []
    for changes, batch, words in (
        ({"queue__size": 0}, 1, "balance 1"),
        ({"queue__size": 0, "codebook__init": "queue_sample"}, 32, "queue_sample"),
        ({"queue__size": 0, "codebook__dead__enabled": True}, 64, "dead"),
        ({"weights__koleo": 0.1, "codebook__koleo": 0.2}, 64, "koleo"),
    ):
        with pytest.raises(InputError, match=words):
            notes(batch, **changes)
    assert "eps" in notes(codebook__eps=0.1)[0]
    assert "at most 32 samples" in notes(32, queue__size=0)[0]
    assert notes(32, queue__size=0, codebook__balance=0.9) == []
    assert "no code is repaired" in notes(codebook__dead__enabled=True)[0]
    assert "multiple of 8" in notes(codebook__size=63)[0]
    assert "cma" in notes(weights__cma=0.0)[0]
    assert check_codebook(tiny.objective("tcl", codebook__eps=0.5), 1) == []
