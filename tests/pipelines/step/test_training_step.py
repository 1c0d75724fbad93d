"""One training step: the same on one process and on several ranks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models.collectives import SoloWorkers
from models.config import ObjectiveConfig
from models.fusion_losses import draw_targets, fusion_counts, fusion_sums
from models.losses import contrast_parts
from models.objectives import ScheduleState
from pipelines.step.context import build_context
from pipelines.step.grad_cache import encode
from pipelines.step.gradients import sum_gradients
from pipelines.step.state import make_state, parameter_groups
from pipelines.step.training_step import clamp_temperature, loss_and_gradients, training_step
from tests.support import step_cases, tiny
from tests.support.ranks import on_ranks

KEY_BIAS = re.compile(r"(key|k_proj)\.bias$")
"""Shifts every score of a query alike, so that its gradient is rounding noise."""
PRESETS = ("clip", "tcl", "tcl-dual", "albef", "sigmoid", "codis", "both")
RESUMED = ("codis", "both")
SPLITS = {1: [6], 2: [4, 2], 3: [1, 0, 5]}
"""How the next batch is split after a checkpoint of two workers."""
SHARDS = {2: [[3, 2], [5, 0]], 3: [[2, 0, 3], [1, 3, 1]]}
LOCAL = [[3, 3], [3, 3]]


def local_goal() -> ObjectiveConfig:
    return tiny.objective("tcl", negatives="local", duplicates="ignore", weights__mlm=0.0)


def jobs(folder: Path) -> dict[Any, tuple]:
    """Every case that needs ranks, by name: they share one set of processes."""
    cases: dict[Any, tuple] = {}
    for preset in RESUMED:
        goal, place = tiny.objective(preset), str(folder / preset)
        Path(place).mkdir()
        cases[preset, "saved"] = (2, step_cases.save, (goal, [2, 4], place))
        for world, split in SPLITS.items():
            cases[preset, "resumed", world] = (world, step_cases.resume, (goal, split, place))
    for world, shards in SHARDS.items():
        for preset in PRESETS:
            cases[preset, world, torch.float64] = (
                world,
                step_cases.run,
                (tiny.objective(preset), shards, torch.float64),
            )
    for preset in ("tcl", "codis", "both", "clip"):
        cases[preset, 2, torch.float32] = (2, step_cases.run, (tiny.objective(preset), SHARDS[2], torch.float32))
    for world in (2, 3):
        cases["chunks", world] = (
            world,
            step_cases.run,
            (tiny.objective("both"), SHARDS[world], torch.float64, True, 2),
        )
    for dist in ("replicated", "sharded"):
        goal = tiny.objective("both-dual", codebook__dist=dist, codebook__solver="ipot", codebook__ipot__outer=5)
        cases["ipot", dist] = (2, step_cases.run, (goal, SHARDS[2], torch.float64))
    cases["local"] = (2, step_cases.run, (local_goal(), LOCAL, torch.float64))
    cases["other seeds"] = (2, step_cases.run, (tiny.objective("tcl"), SHARDS[2], torch.float64, False))
    cases["gather"] = (3, step_cases.gather_kinds, ([2, 0, 3],))
    return cases


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = jobs(tmp_path_factory.mktemp("checkpoints"))
    yield dict(zip(cases, on_ranks(list(cases.values())), strict=True))
    torch.set_num_threads(threads)


def assert_equal_gradients(mine: list, expected: list) -> None:
    """To 1e-9 of each tensor's norm."""
    for one, other in zip(mine, expected, strict=True):
        assert one.keys() == other.keys()
        for name in (n for n in other if not KEY_BIAS.search(n)):
            error = float((one[name] - other[name]).norm())
            assert error <= 1e-9 * float(other[name].norm()), f"{name}: {error}"


CASES = [(preset, world) for world in SHARDS for preset in PRESETS]


@pytest.mark.parametrize(("preset", "world"), CASES)
def test_ranks_agree_with_one_process_on_all_rows(ranked, preset, world):
    alone = step_cases.run(tiny.objective(preset), SHARDS[world], torch.float64)
    for trace in ranked[preset, world, torch.float64]:
        assert trace.losses == pytest.approx(alone.losses, rel=1e-10)
        assert trace.norms == pytest.approx(alone.norms, rel=1e-9)
        assert_equal_gradients(trace.gradients, alone.gradients)


@pytest.mark.parametrize(("preset", "world"), CASES)
def test_model_teacher_and_queue_stay_equal_on_all_ranks(ranked, preset, world):
    traces = ranked[preset, world, torch.float64]
    alone = step_cases.run(tiny.objective(preset), SHARDS[world], torch.float64).state
    for trace in traces:
        assert trace.state.keys() == alone.keys()
        for name, tensor in trace.state.items():
            assert torch.equal(tensor, traces[0].state[name]), name
            assert torch.allclose(tensor, alone[name], rtol=1e-7, atol=1e-7), name


@pytest.mark.parametrize("world", [2, 3])
def test_p22_measurements_do_not_depend_on_the_workers(ranked, world):
    """Losses, gradients and state of the same are compared above."""
    for preset in ("codis", "both"):
        alone = step_cases.run(tiny.objective(preset), SHARDS[world], torch.float64)
        for trace in ranked[preset, world, torch.float64]:
            for mine, expected in zip(trace.metrics, alone.metrics, strict=True):
                assert len(expected) >= 16 and mine == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("world", [2, 3])
def test_chunks_on_several_ranks_agree_with_one_process_at_once(ranked, world):
    alone = step_cases.run(tiny.objective("both"), SHARDS[world], torch.float64)
    for trace in ranked["chunks", world]:
        assert trace.losses == pytest.approx(alone.losses, rel=1e-10)
        assert_equal_gradients(trace.gradients, alone.gradients)


def test_replicated_and_sharded_assignment_agree(ranked):
    goal = tiny.objective("both-dual", codebook__solver="ipot", codebook__ipot__outer=5)
    alone = step_cases.run(goal, SHARDS[2], torch.float64)
    for dist in ("replicated", "sharded"):
        for trace in ranked["ipot", dist]:
            assert trace.losses == pytest.approx(alone.losses, rel=1e-10)
            assert_equal_gradients(trace.gradients, alone.gradients)


@pytest.mark.parametrize("preset", RESUMED)
def test_p25_a_checkpoint_of_two_workers_goes_on_with_one_or_three(ranked, preset):
    expected, after = ranked[preset, "resumed", 1][0]
    assert int(after["usage.pairs"]) == 18 and int(after["queue.filled"]) == 7
    for world in SPLITS:
        for loss, state in ranked[preset, "resumed", world]:
            assert loss == pytest.approx(expected, rel=1e-10)
            for name, tensor in after.items():
                assert torch.allclose(state[name], tensor, rtol=1e-7, atol=1e-7), name


@pytest.mark.parametrize("preset", RESUMED)
def test_p25_going_on_is_what_a_run_without_a_stop_would_do(ranked, preset):
    goal = tiny.objective(preset)
    state = tiny.state(goal)
    for step in range(3):
        rows = tiny.batch(6, step)
        result = training_step(state, rows, tiny.settings(goal), ScheduleState(goal.alpha, step=step))
    assert ranked[preset, "resumed", 3][0][0] == pytest.approx(float(result.loss), rel=1e-9)


def test_wrong_images_and_captions_do_not_depend_on_the_rank(ranked):
    for preset in ("tcl", "albef"):
        for world, shards in SHARDS.items():
            alone = step_cases.run(tiny.objective(preset), shards, torch.float64)
            traces = ranked[preset, world, torch.float64]
            for step in range(len(shards)):
                together = torch.cat([trace.negatives[step] for trace in traces], 1)
                assert torch.equal(together, alone.negatives[step])


@pytest.mark.parametrize("preset", ["tcl", "codis", "both", "clip"])
def test_ranks_agree_in_single_precision(ranked, preset):
    alone = step_cases.run(tiny.objective(preset), SHARDS[2], torch.float32)
    for trace in ranked[preset, 2, torch.float32]:
        assert trace.losses == pytest.approx(alone.losses, rel=1e-5)
        for mine, expected in zip(trace.gradients, alone.gradients, strict=True):
            whole = torch.cat([expected[name].flatten() for name in expected])
            error = torch.cat([mine[name].flatten() for name in expected]) - whole
            assert float(error.norm()) <= 1e-5 * float(whole.norm())


def test_local_negatives_are_the_mean_of_each_workers_own_terms(ranked):
    """The reference's form: every worker contrasts its own rows, gradients are averaged, queues take all rows."""
    goal = local_goal()
    traces = ranked["local"]
    state = tiny.state(goal)
    whole, size = tiny.batch(sum(LOCAL[0]), 0), LOCAL[0][0]
    losses, gradients = [], []
    for first in (0, size):
        copy = tiny.state(goal)
        means = loss_and_gradients(
            copy, tiny.part(whole, first, size), tiny.settings(goal), ScheduleState(goal.alpha), SoloWorkers()
        ).means
        losses.append(sum(float(mean) * weight for mean, weight in zip(means.values(), [1 / 6] * 6 + [1], strict=True)))
        gradients.append({name: p.grad for name, p in copy.model.named_parameters()})
    for trace in traces:
        assert trace.losses[0] == pytest.approx(sum(losses) / 2, rel=1e-10)
        for name in (n for n, _ in state.model.named_parameters() if not KEY_BIAS.search(n)):
            expected = (gradients[0][name] + gradients[1][name]) / 2
            assert float((trace.gradients[0][name] - expected).norm()) <= 1e-9 * float(expected.norm()), name
        for name, tensor in trace.state.items():
            assert torch.equal(tensor, traces[0].state[name]), name
        assert int(trace.state["queue.filled"]) == 7


def test_ranks_that_start_differently_are_made_equal(ranked):
    first, second = ranked["other seeds"]
    expected = ranked["tcl", 2, torch.float64][0]
    assert first.losses == second.losses == expected.losses
    assert all(torch.equal(tensor, second.state[name]) for name, tensor in first.state.items())


def test_rows_of_every_kind_are_gathered_in_rank_order(ranked):
    for gathered in ranked["gather"]:
        places = torch.arange(5)
        assert torch.equal(gathered[0], places) and torch.equal(gathered[1], places.double())
        assert torch.equal(gathered[2], places.float()[:, None].expand(-1, 3))
        assert torch.equal(gathered[3], places % 2 == 0)


def test_on_ranks_names_the_error_of_a_rank():
    with pytest.raises(AssertionError, match=r"rank 0 failed(.|\n)*ZeroDivisionError"):
        on_ranks([(1, divmod, (1, 0))])


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_is_that_of_the_loss(preset):
    """Leaves and the way back through the towers against plain autograd on the same terms."""
    goal = tiny.objective(preset)
    rows, options = tiny.batch(4), tiny.settings(goal)
    state = tiny.state(goal)
    means = loss_and_gradients(state, rows, options, ScheduleState(goal.alpha), SoloWorkers()).means
    again = tiny.state(goal)
    clamp_temperature(again.model, goal)
    student = encode(again.model, rows.view1, rows)
    if again.teacher is not None:
        with torch.no_grad():
            for copy, online in zip(again.teacher.parameters(), state.teacher.parameters(), strict=True):
                copy.copy_(online)
    context, _ = build_context(again, student, rows, options, ScheduleState(goal.alpha), SoloWorkers())
    context = type(context)(**{**vars(context), "student": student, "all_student": student})
    parts, match_logits = contrast_parts(goal, again.model, context)
    losses = {name: part.sum / part.count for name, part in parts.items()}
    targets = draw_targets(goal, context, match_logits, tiny.TOKENS)
    if again.model.fusion is not None:
        fused = fusion_sums(again.model, again.teacher, context, targets, slice(0, 4))
        losses |= {name: value / fusion_counts(targets, goal.alpha)[name] for name, value in fused.items()}
    assert losses.keys() == means.keys()
    weights = {"i2t": goal.weights.cma / 2, "t2i": goal.weights.cma / 2, "itm": goal.weights.itm}
    weights |= {name: goal.weights.imc / 2 for name in ("i2i", "t2t")}
    weights |= {name: goal.weights.lmi / 2 for name in ("lmi_image", "lmi_text")}
    weights |= {"mlm_hard": goal.weights.mlm * (1 - goal.alpha), "mlm_distill": goal.weights.mlm * goal.alpha}
    weights |= {name: goal.weights.code / 2 for name in ("i2p", "t2p")}
    weights |= {name: goal.weights.ot / 2 for name in ("ot_v", "ot_t")}
    sum(weights[name] * loss for name, loss in losses.items()).backward()
    for (name, mine), (_, expected) in zip(state.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert (mine.grad is None) == (expected.grad is None), name
        if mine.grad is not None and not KEY_BIAS.search(name):
            assert float((mine.grad - expected.grad).norm()) <= 1e-10 * max(float(expected.grad.norm()), 1e-12), name


def test_loss_falls_on_one_batch():
    goal = tiny.objective("tcl-dual", queue__size=0)
    state, rows = tiny.state(goal, rate=3e-3), tiny.batch(6)
    losses = [float(training_step(state, rows, tiny.settings(goal), ScheduleState(0.0)).loss) for _ in range(30)]
    assert losses[-1] < losses[0] / 2


def test_clipping_bounds_the_whole_gradient():
    goal = tiny.objective("clip")
    state = tiny.state(goal)
    result = training_step(state, tiny.batch(4), tiny.settings(goal, clip_norm=1e-3), ScheduleState(0.0))
    clipped = torch.stack([p.grad.norm() for p in state.model.parameters()]).norm()
    assert float(result.gradient_norm) > 1e-2 and float(clipped) == pytest.approx(1e-3, rel=1e-3)


def test_temperature_is_clamped_before_the_forward_pass_where_asked():
    for clamp, expected in ((True, 0.5), (False, 3.0)):
        goal = tiny.objective("clip", temperature__clamp=clamp)
        state = tiny.state(goal, rate=1e-12)
        state.model.temperature.data.fill_(3.0)
        training_step(state, tiny.batch(3), tiny.settings(goal), ScheduleState(0.0))
        assert state.model.temperature.item() == pytest.approx(expected)


def test_sixteen_bits_touch_towers_and_fusion_but_not_the_contrast():
    goal = tiny.objective("tcl")
    rows = tiny.batch(5, dtype=torch.float32)
    exact = training_step(tiny.state(goal, dtype=torch.float32), rows, tiny.settings(goal), ScheduleState(0.4))
    result = training_step(
        tiny.state(goal, dtype=torch.float32), rows, tiny.settings(goal, bf16=True), ScheduleState(0.4)
    )
    assert float(result.loss) == pytest.approx(float(exact.loss), rel=0.05)
    assert float(result.loss) != float(exact.loss)
    state = tiny.state(goal, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        student = encode(state.model, rows.view1, rows)
    context, _ = build_context(state, student, rows, tiny.settings(goal, bf16=True), ScheduleState(0.4), SoloWorkers())
    parts, match_logits = contrast_parts(goal, state.model, context)
    assert {part.sum.dtype for part in parts.values()} == {torch.float32}
    product = student.image.double() @ context.keys[1].double().T / context.temperature.item()
    kept = ~context.identity.left_out[:, : len(rows)]
    assert torch.allclose(match_logits.image_to_text.double()[kept], product[kept], atol=1e-4)


def test_weight_decay_goes_to_matrices_tables_and_scalars_only():
    model = tiny.state(tiny.objective("sigmoid")).model
    plain, decayed = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    assert all(p.ndim == 1 or names[id(p)] == "bias" for p in plain["params"])
    assert {"log_scale", "vision.backbone.embeddings.cls_token"} <= {names[id(p)] for p in decayed["params"]}
    assert not any(names[id(p)].endswith("bias") for p in decayed["params"])


def test_missing_gradients_count_as_zero_and_buckets_cover_all():
    class Doubling(SoloWorkers):
        world_size = 2

        def all_reduce_sum(self, value):
            return value.mul_(2)

    parameters = [torch.nn.Parameter(torch.full((n,), float(n))) for n in (3, 5, 1, 4)]
    for parameter in parameters[:3]:
        parameter.grad = torch.full_like(parameter, float(len(parameter)))
    sum_gradients(parameters, Doubling(), bucket=4)
    assert [p.grad.tolist() for p in parameters] == [[6.0] * 3, [10.0] * 5, [2.0], [0.0] * 4]


def test_state_takes_the_models_precision():
    goal = tiny.objective("tcl")
    for dtype in (torch.float32, torch.float64):
        state = tiny.state(goal, dtype=dtype)
        assert state.queue.image.dtype == dtype and state.queue.image_id.dtype == torch.int64
    assert make_state(state.model, tiny.objective("tcl", queue__size=0), state.optimizer).queue is None
