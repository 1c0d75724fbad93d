"""The codebook's terms (docs/spec/codebook.md 2): golden numbers, closed forms, gradients, symmetries."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import codebook
from models.batch import FixedDraws
from models.codebook import Codebook, Pair, code_sums, koleo, transport_sums
from models.config import ObjectiveConfig
from models.objectives import ScheduleState, build_model
from pipelines.step.context import build_context
from pipelines.step.grad_cache import encode
from pipelines.step.state import TrainState
from pipelines.step.training_step import loss_and_gradients, training_step
from tests.support import tiny
from tests.support.codebook_cases import CASE, EPS, LIMIT, SOLO, number, plan_of, random_pairs, raw, unit_rows

# ---- golden numbers ----


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", EPS)
def test_losses_equal_the_golden_case(name, dtype, tolerance):
    case, (student, teacher, codes) = CASE[name], raw(dtype)
    codes = F.normalize(codes, dim=1)
    plan = plan_of(teacher, codes, case["eps"], case["iters"])
    near = dict(abs=tolerance)
    for key, beta in (("cross", 0.0), ("same", 1.0), ("mix25", 0.25)):
        i2p, t2p = (number(v) / 3 for v in code_sums(student, teacher, codes, plan, case["tau_c"], beta, LIMIT))
        assert (i2p + t2p) / 2 == pytest.approx(case[f"code_{key}"], **near)
        if key != "mix25":
            assert i2p == pytest.approx(case[f"i2p_{key}"], **near)
            assert t2p == pytest.approx(case[f"t2p_{key}"], **near)
    image, text = (number(v) / 3 for v in transport_sums(teacher, codes, plan, LIMIT))
    assert (image, text) == (pytest.approx(case["ot_v"], **near), pytest.approx(case["ot_t"], **near))
    assert (image + text) / 2 == pytest.approx(case["ot"], **near)


@pytest.mark.parametrize("name", EPS)
def test_gradients_equal_the_golden_case(name):
    case, (student, teacher, raw_codes) = CASE[name], raw()
    for side in student:
        side.requires_grad_()
    table = raw_codes.requires_grad_()
    codes = F.normalize(table, dim=1)
    plan = plan_of(teacher, codes.detach(), case["eps"], case["iters"])
    code = sum(code_sums(student, teacher, codes, plan, case["tau_c"], 0.0, LIMIT)) / 6
    wanted = (student.image, student.text, table)
    for mine, key in zip(torch.autograd.grad(code, wanted, retain_graph=True), ("dzv", "dzt", "dCraw"), strict=True):
        assert torch.allclose(mine, torch.tensor(case[f"dcode_{key}"], dtype=mine.dtype), atol=1e-9, rtol=0)
    cost = sum(transport_sums(teacher, codes, plan, LIMIT)) / 6
    (mine,) = torch.autograd.grad(cost, table)
    assert torch.allclose(mine, torch.tensor(case["dot_dCraw"], dtype=mine.dtype), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", EPS)
def test_p06_permuted_codes_change_no_loss_and_permute_gradient_rows(name):
    case, (student, teacher, table) = CASE[name], raw()
    order = torch.tensor(CASE["perm"])
    losses, gradients = [], []
    for rows in (table, table[order]):
        rows = rows.clone().requires_grad_()
        codes = F.normalize(rows, dim=1)
        plan = plan_of(teacher, codes.detach(), case["eps"])
        loss = sum(code_sums(student, teacher, codes, plan, 0.1, 0.0, LIMIT))
        loss = loss + sum(transport_sums(teacher, codes, plan, LIMIT))
        losses.append(number(loss))
        gradients.append(torch.autograd.grad(loss, rows)[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert torch.allclose(gradients[0][order], gradients[1], atol=1e-12)


# ---- definitions and symmetries ----


def test_terms_equal_their_definitions_as_loops():
    student, teacher, codes = random_pairs()
    plan = plan_of(teacher, codes, 0.2)
    targets = plan.targets(torch.stack([teacher.image @ codes.T, teacher.text @ codes.T]))
    tau, same = 0.1, 0.3
    sums = code_sums(student, teacher, codes, plan, tau, same, LIMIT)
    costs = transport_sums(teacher, codes, plan, LIMIT)
    for m, (query, own) in enumerate(((student.image, teacher.image), (student.text, teacher.text))):
        loss = cost = 0.0
        for i in range(6):
            logits = [number(query[i] @ c) / tau for c in codes]
            total = math.log(sum(math.exp(v) for v in logits))
            for k in range(5):
                target = (1 - same) * number(targets[1 - m, i, k]) + same * number(targets[m, i, k])
                loss -= target * (logits[k] - total)
                cost += number(targets[m, i, k]) * (1 - number(own[i] @ codes[k]))
        assert number(sums[m]) == pytest.approx(loss, rel=1e-12)
        assert number(costs[m]) == pytest.approx(cost, rel=1e-12)


def test_blocks_of_rows_change_neither_losses_nor_gradients():
    results = []
    for limit in (LIMIT, 1):  # one block of all rows, one row at a time
        student, teacher, codes = random_pairs()
        leaves = [side.requires_grad_() for side in (*student, codes)]
        plan = plan_of(teacher, codes.detach(), 0.2)
        loss = sum(code_sums(student, teacher, codes, plan, 0.1, 0.3, limit))
        loss = loss + sum(transport_sums(teacher, codes, plan, limit)) + koleo(codes, limit)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for whole, blocked in zip(*results, strict=True):
        assert torch.allclose(whole, blocked, rtol=1e-12, atol=1e-13)


def test_p17_swapping_modalities_swaps_the_parts():
    student, teacher, codes = random_pairs()
    plan = plan_of(teacher, codes, 0.1)
    turned = Pair(teacher.text, teacher.image)
    other = plan_of(turned, codes, 0.1)
    for same in (0.0, 0.4):
        i2p, t2p = code_sums(student, teacher, codes, plan, 0.1, same, LIMIT)
        again = code_sums(Pair(student.text, student.image), turned, codes, other, 0.1, same, LIMIT)
        assert torch.allclose(torch.stack([i2p, t2p]), torch.stack(again[::-1]), atol=1e-12)
    v, t = transport_sums(teacher, codes, plan, LIMIT)
    assert torch.allclose(torch.stack([t, v]), torch.stack(transport_sums(turned, codes, other, LIMIT)), atol=1e-12)


def test_p18_cross_entropy_is_at_least_the_targets_entropy_and_cost_lies_between_0_and_2():
    for seed in range(20):
        student, teacher, codes = random_pairs(seed=seed)
        plan = plan_of(teacher, codes, 0.05)
        text = plan.targets(torch.stack([teacher.image @ codes.T, teacher.text @ codes.T]))[1]
        loss, _ = code_sums(student, teacher, codes, plan, 0.1, 0.0, LIMIT)
        entropy = -torch.xlogy(text, text).sum()
        assert number(loss) >= number(entropy) - 1e-12
        for cost in transport_sums(teacher, codes, plan, LIMIT):
            assert 0 <= number(cost) / 6 <= 2
        # a student that predicts the target itself leaves nothing to learn
        assert number(codebook.prediction_sum((text.log() * 0.1), torch.eye(5).double(), text, 0.1)) == pytest.approx(
            number(entropy), abs=1e-12
        )


def test_p19_analytic_gradients_and_finite_differences_agree():
    student, teacher, codes = random_pairs()
    leaves = [side.clone().requires_grad_() for side in (*student, codes)]
    plan, tau = plan_of(teacher, codes, 0.2), 0.1
    pair, table = Pair(leaves[0], leaves[1]), leaves[2]
    code = sum(code_sums(pair, teacher, table, plan, tau, 0.0, LIMIT)) / 12
    dv, dt, dc = torch.autograd.grad(code, leaves)
    q = plan.targets(torch.stack([teacher.image @ codes.T, teacher.text @ codes.T]))
    p = [F.softmax(side @ codes.T / tau, 1) for side in student]
    scale = 1 / (2 * 6 * tau)
    assert torch.allclose(dv, scale * (p[0] - q[1]) @ codes, atol=1e-12)
    assert torch.allclose(dt, scale * (p[1] - q[0]) @ codes, atol=1e-12)
    # the targets hold still while codes move: they are constants of the step
    held = q.clone()
    analytic = scale * ((p[0] - held[1]).T @ student.image + (p[1] - held[0]).T @ student.text)
    assert torch.allclose(dc, analytic, atol=1e-12)
    cost = sum(transport_sums(teacher, table, plan, LIMIT)) / 12
    (dot,) = torch.autograd.grad(cost, table)
    assert torch.allclose(dot, -(q[0].T @ teacher.image + q[1].T @ teacher.text) / 12, atol=1e-12)

    def loss_of(c: torch.Tensor) -> float:
        z = F.normalize(c, dim=1)
        logs = [F.log_softmax(side @ z.T / tau, 1) for side in student]
        return number(-((held[1] * logs[0]).sum() + (held[0] * logs[1]).sum()) / 12)

    raw_codes = (codes * 1.7).requires_grad_()
    unit_codes = F.normalize(raw_codes, dim=1)
    loss = sum(code_sums(student, teacher, unit_codes, plan, tau, 0.0, LIMIT)) / 12
    (through,) = torch.autograd.grad(loss, raw_codes)
    for k in range(5):
        for d in range(4):
            step = torch.zeros_like(codes)
            step[k, d] = 1e-6
            base = raw_codes.detach()
            assert number(through[k, d]) == pytest.approx(
                (loss_of(base + step) - loss_of(base - step)) / 2e-6, abs=1e-8
            )


def gradients(goal: ObjectiveConfig, rows: int = 5, state: TrainState | None = None) -> dict[str, torch.Tensor | None]:
    state = state or tiny.state(goal)
    loss_and_gradients(state, tiny.batch(rows), tiny.settings(goal), ScheduleState(goal.alpha), SOLO)
    return {name: p.grad for name, p in state.model.named_parameters()}


def alone(term: str, **changes: Any) -> ObjectiveConfig:
    weights = {f"weights__{name}": float(name == term) for name in ("cma", "imc", "lmi", "code", "ot", "itm", "mlm")}
    return tiny.objective("both", **weights, **changes)


def test_p19_gradients_reach_exactly_the_parameters_of_the_table():
    def moved(goal: ObjectiveConfig, parts: tuple[str, ...]) -> set[str]:
        state = tiny.state(goal)
        rows = tiny.batch(5)
        student = encode(state.model, rows.view1, rows)
        context, _ = build_context(state, student, rows, tiny.settings(goal), ScheduleState(0.4), SOLO)
        from models.losses import contrast_parts

        found, _ = contrast_parts(goal, state.model, context)
        sum(found[name].sum for name in parts).backward()
        reached = {name for name in ("image", "text") if getattr(context.student, name).grad is not None}
        assert not any(p.grad is not None for p in state.teacher.parameters())
        named = {"codebook": state.model.codebook.weight, "temperature": state.model.temperature}
        return reached | {name for name, p in named.items() if p.grad is not None and bool(p.grad.any())}

    both = tiny.objective("both-dual")
    assert moved(both, ("i2p",)) == {"image", "codebook"}
    assert moved(both, ("t2p",)) == {"text", "codebook"}
    assert moved(both, ("ot_v", "ot_t")) == {"codebook"}
    assert moved(both, ("i2t",)) == {"image", "temperature"}
    assert moved(both, ("t2t", "t2i")) == {"text", "temperature"}
    assert moved(both, ("lmi_image", "lmi_text")) == {"image", "text", "temperature"}


def test_p20_weights_of_0_leave_no_trace_of_the_codebook():
    with_feature = tiny.objective("both", weights__code=0.0, weights__ot=0.0)
    without = tiny.objective("tcl")
    results = []
    for goal in (with_feature, without):
        torch.manual_seed(3)
        state = tiny.state(goal)
        assert state.model.codebook is None and state.usage is None
        assert not any("codebook" in name for name, _ in state.model.named_parameters())
        result = training_step(state, tiny.batch(5), tiny.settings(goal), ScheduleState(0.4))
        results.append((result.loss, torch.get_rng_state(), [p.grad for p in state.model.parameters()]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))


def test_the_other_weights_of_a_seed_do_not_depend_on_the_codebook():
    models = []
    for preset in ("tcl", "both"):
        torch.manual_seed(0)
        models.append(build_model(tiny.encoder(), tiny.objective(preset)).state_dict())
    assert models[1].keys() - models[0].keys() == {"codebook.weight"}
    assert all(torch.equal(models[1][name], tensor) for name, tensor in models[0].items())


def test_p21_gradients_of_single_terms_add_up():
    both = tiny.objective("both")
    partners = torch.tensor([3, 4, 0, 1, 2])  # without cma, itm would draw its own from other similarities
    rows = dataclasses.replace(tiny.batch(5), fixed_draws=FixedDraws(partners, partners))
    state = tiny.state(both)
    loss_and_gradients(state, rows, tiny.settings(both), ScheduleState(both.alpha), SOLO)
    whole = {name: p.grad for name, p in state.model.named_parameters()}
    total = {name: torch.zeros_like(g) for name, g in whole.items() if g is not None}
    for term in ("cma", "imc", "lmi", "code", "ot", "itm", "mlm"):
        state = tiny.state(both)  # of all terms, so that every parameter is the same
        weight = getattr(both.weights, term)
        single = {f"weights__{name}": 0.0 for name in ("cma", "imc", "lmi", "code", "ot", "itm", "mlm")}
        goal = tiny.objective("both", **single | {f"weights__{term}": weight})
        loss_and_gradients(state, rows, tiny.settings(goal), ScheduleState(goal.alpha), SOLO)
        for name, p in state.model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad
    for name, expected in total.items():
        assert number((whole[name] - expected).norm()) <= 1e-10 * max(number(expected.norm()), 1.0), name


# ---- precision ----


def test_p24_under_autocast_everything_is_fp32_and_the_same():
    student, teacher, codes = (
        type(side)(*(x.float() for x in side)) if isinstance(side, Pair) else side.float() for side in random_pairs()
    )
    book = Codebook(5, 4)
    book.weight.data = codes * 3

    def outputs() -> list[torch.Tensor]:
        table = book.unit()
        plan = plan_of(teacher, table.detach(), 0.05)
        taken = plan.targets(torch.stack([teacher.image, teacher.text]) @ table.detach().T.contiguous())
        return [
            table,
            plan.potentials,
            *code_sums(student, teacher, table, plan, 0.1, 0.0, LIMIT),
            *transport_sums(teacher, table, plan, LIMIT),
            koleo(table, LIMIT),
        ] + ([taken] if not torch.is_autocast_enabled("cpu") else [])

    plain = outputs()[:-1]
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs()
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.allclose(a, b, atol=1e-6)
    halves = Pair(*(side.bfloat16() for side in teacher))
    assert all(v.dtype == torch.float32 for v in transport_sums(halves, codes, plan_of(teacher, codes, 0.05), LIMIT))


def test_p27_the_codes_move_toward_their_samples_and_away_with_the_printed_sign():
    code, sample = unit_rows([[1.0, 0.2]]), unit_rows([[0.3, 1.0]])
    target = torch.ones(1, 1, dtype=torch.float64)
    for sign, closer in ((1.0, True), (-1.0, False)):
        table = code.clone().requires_grad_()
        (sign * codebook.transport_sum(sample, F.normalize(table, dim=1), target)).backward()
        moved = F.normalize(table.detach() - 0.1 * table.grad, dim=1)
        assert bool((moved @ sample.T > code @ sample.T).item()) == closer


def test_p29_ot_alone_leaves_the_encoders_untouched():
    base = gradients(tiny.objective("tcl-dual"))
    with_ot = gradients(tiny.objective("tcl-dual", weights__ot=2.0))
    assert with_ot["codebook.weight"].any()
    for name, expected in base.items():
        assert (expected is None) == (with_ot[name] is None)
        assert expected is None or torch.equal(with_ot[name], expected), name


def test_p30_presets_are_the_papers_sums():
    goal = tiny.objective("tcl")
    result = training_step(tiny.state(goal), tiny.batch(5), tiny.settings(goal), ScheduleState(0.4))
    six = [result.parts[name] for name in ("i2t", "t2i", "i2i", "t2t", "lmi_image", "lmi_text")]
    fused = result.terms["itm"] + result.terms["mlm"]
    assert number(result.loss) == pytest.approx(number(torch.stack(six).mean() + fused), abs=1e-12)
    goal = tiny.objective("codis-dual", weights__code=0.0, weights__ot=0.0)
    result = training_step(tiny.state(goal), tiny.batch(5), tiny.settings(goal), ScheduleState(0.4))
    four = [result.parts[name] for name in ("i2t", "t2i", "i2i", "t2t")]
    assert number(result.loss) == pytest.approx(number(torch.stack(four).sum()), abs=1e-12)
    goal = tiny.objective("codis-dual")
    result = training_step(tiny.state(goal), tiny.batch(5), tiny.settings(goal), ScheduleState(0.4))
    eight = [result.parts[name] for name in ("i2t", "t2i", "i2i", "t2t", "i2p", "t2p", "ot_v", "ot_t")]
    assert number(result.loss) == pytest.approx(number(torch.stack(eight).sum()), abs=1e-12)


def test_koleo_equals_its_definition():
    _, _, codes = random_pairs(codes=7)
    expected = 0.0
    for k in range(7):
        nearest = min(number((codes[k] - codes[j]).norm()) for j in range(7) if j != k)
        expected -= math.log(nearest + 1e-8) / 7
    assert number(koleo(codes, LIMIT)) == pytest.approx(expected, rel=1e-12)
    assert number(koleo(codes[:1], LIMIT)) == 0
    twins = codes[[0, 0, 1]].requires_grad_()
    koleo(twins, LIMIT).backward()
    assert bool(twins.grad.isfinite().all())


def test_koleo_may_be_given_by_either_of_its_names():
    for changes in ({"weights__koleo": 0.3}, {"codebook__koleo": 0.3}):
        goal = tiny.objective("both-dual", **changes)
        result = training_step(tiny.state(goal), tiny.batch(5), tiny.settings(goal), ScheduleState(0.4))
        plain = tiny.objective("both-dual")
        without = training_step(tiny.state(plain), tiny.batch(5), tiny.settings(plain), ScheduleState(0.4))
        assert number(result.loss - without.loss) == pytest.approx(0.3 * number(result.terms["koleo"]), rel=1e-9)
