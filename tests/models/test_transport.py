"""The assignment solver against direct forms, closed forms and the golden cases (docs/spec/codebook.md 8 and 9)."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import transport
from models.collectives import Workers
from models.transport import Scores, TransportPlan, ipot, sinkhorn
from tests.support import fake_workers
from tests.support.codebook_cases import SOLO, golden, unit

SAMPLES, CODES, WIDTH = 37, 11, 16


def toy(problems: int = 1, samples: int = SAMPLES, codes: int = CODES, seed: int = 0) -> Tensor:
    return unit(problems, samples, WIDTH, seed=seed) @ unit(codes, WIDTH, seed=seed + 1000).T


def everyone(samples: int) -> Tensor:
    return torch.ones(samples, dtype=torch.bool)


def known(scores: Tensor) -> Scores:
    """Scores (problems, samples, codes) as they are: their own cosines with the axes of the codes."""
    return Scores(scores, torch.eye(scores.shape[2], dtype=scores.dtype))


def assign(scores: Tensor, eps: float = 0.05, iters: int = 3, balance: float = 1.0) -> Tensor:
    """Targets of all samples of one worker's problems."""
    return sinkhorn(known(scores), everyone(scores.shape[1]), eps, iters, balance, SOLO).targets(scores)


def assign_ipot(scores: Tensor, beta: float = 0.5, outer: int = 50) -> Tensor:
    return ipot(known(scores), everyone(scores.shape[1]), beta, outer, SOLO).targets(scores)


def close(actual: Tensor, expected: Any, atol: float) -> None:
    """A number, a nested list or a tensor of the same shape, within an absolute tolerance."""
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("iters", [1, 2, 3, 50])
@pytest.mark.parametrize("balance", [0.0, 0.3, 0.8, 1.0])
def test_p01_rows_of_the_targets_sum_to_one(iters, balance):
    scores = toy(problems=2)
    close(assign(scores, 0.05, iters, balance).sum(2), 1.0, 1e-12)
    close(assign(scores.float(), 0.05, iters, balance).sum(2), 1.0, 1e-6)


def test_p02_codes_get_equal_mass_when_converged():
    mass = assign(toy(), iters=200).mean(1)
    torch.testing.assert_close(mass, torch.full_like(mass, 1 / CODES), rtol=1e-10, atol=0)


def test_p03_the_error_of_the_code_masses_never_increases():
    scores = toy(problems=100)
    errors = torch.stack([(assign(scores, iters=n).mean(1) - 1 / CODES).abs().sum(1) for n in range(1, 13)])
    assert bool((errors.diff(dim=0) <= 1e-12).all())
    assert float(errors[0].min()) > 0.1 > float(errors[-1].max())  # so that there was something to decrease


@pytest.mark.parametrize("iters", [1, 3, 7])
def test_p04_equals_the_procedure_without_logarithms(iters):
    scores = toy()[0]
    plan = torch.exp(scores / 0.05)
    plan /= plan.sum()
    for _ in range(iters):
        plan = plan / plan.sum(0, keepdim=True) / CODES
        plan = plan / plan.sum(1, keepdim=True) / SAMPLES
    close(assign(scores[None], iters=iters)[0], plan * SAMPLES, 1e-12)


SHARES = [slice(0, 20), slice(20, 20), slice(20, 37)]


def solve_share(
    workers: Workers, solver: str, iters: int, features: Tensor, codes: Tensor, valid: Tensor
) -> TransportPlan:
    share = SHARES[workers.rank] if workers.world_size > 1 else slice(None)
    scores = Scores(features[:, share], codes)
    if solver == "ipot":
        return ipot(scores, valid[share], 0.5, iters, workers)
    return sinkhorn(scores, valid[share], 0.05, iters, 1.0, workers)


@pytest.mark.parametrize("solver", ["sinkhorn", "ipot"])
@pytest.mark.parametrize("iters", [3, 50])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_p05_workers_with_uneven_shares_and_masks_agree_with_one(solver, iters, dtype, atol):
    features, codes = unit(2, SAMPLES, WIDTH).to(dtype), unit(CODES, WIDTH, seed=1).to(dtype)
    valid = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(2)) < 0.8
    alone = solve_share(SOLO, solver, iters, features, codes, valid)
    plans = fake_workers.on_threads(3, solve_share, solver, iters, features, codes, valid)
    scores = features @ codes.T
    for plan in plans:
        close(plan.targets(scores), alone.targets(scores), atol)
        assert torch.equal(plan.potentials, plans[0].potentials)


@pytest.mark.parametrize("solve", [assign, assign_ipot])
def test_p06_permuting_codes_permutes_the_columns(solve):
    scores, order = toy(), torch.randperm(CODES, generator=torch.Generator().manual_seed(0))
    close(solve(scores[..., order]), solve(scores)[..., order], 1e-12)


@pytest.mark.parametrize("solve", [assign, assign_ipot])
def test_p07_permuting_samples_permutes_the_rows_and_doubles_are_alike(solve):
    scores, order = toy(), torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    close(solve(scores[:, order]), solve(scores)[:, order], 1e-12)
    doubled = solve(torch.cat([scores, scores[:, :5]], 1))
    close(doubled[:, SAMPLES:], doubled[:, :5], 1e-12)


def test_p08_a_constant_of_a_code_changes_nothing_one_of_a_sample_only_before_the_limit():
    scores, generator = toy(), torch.Generator().manual_seed(3)
    of_codes = scores + torch.randn(CODES, generator=generator, dtype=torch.float64)
    of_samples = scores + 0.3 * torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64)
    for iters in (1, 3):
        close(assign(of_codes, iters=iters), assign(scores, iters=iters), 1e-10)
        assert float((assign(of_samples, iters=iters) - assign(scores, iters=iters)).abs().max()) > 1e-3
    shifted, plain = assign(torch.cat([of_samples, scores]), iters=3000)
    close(shifted, plain, 1e-10)


def test_p09_one_sample_or_identical_ones_are_spread_evenly():
    one = toy(samples=1)
    for scores in (one, one.expand(1, 6, CODES)):
        close(assign(scores), 1 / CODES, 1e-12)
        close(assign_ipot(scores), 1 / CODES, 1e-12)


def test_p10_fewer_samples_than_codes_bound_the_sharpness():
    targets = assign(toy(samples=8, codes=64), iters=5000)
    assert float(targets.max()) <= 1 / 8 + 1e-9
    assert float(-(targets * targets.log()).sum(2).mean()) >= math.log(8) - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_p11_two_by_two_is_a_logistic_function(seed):
    scores = toy(samples=2, codes=2, seed=seed)
    s = scores[0].tolist()
    expected = 1 / (1 + math.exp(-(s[0][0] + s[1][1] - s[0][1] - s[1][0]) / (2 * 0.25)))
    close(assign(scores, 0.25, 500)[0, 0, 0], expected, 1e-10)


def test_p12_large_eps_is_uniform_and_small_eps_the_best_matching():
    close(assign(toy(), 1e6), 1 / CODES, 1e-6)
    tables = toy(problems=8, samples=5, codes=5)
    for scores, targets in zip(tables.tolist(), assign(tables, 0.01, 1000), strict=True):
        best = max(itertools.permutations(range(5)), key=lambda order, s=scores: sum(map(list.__getitem__, s, order)))
        assert targets.argmax(1).tolist() == list(best)


def test_p13_small_eps_with_equal_vectors_is_finite_in_float32():
    codes = unit(CODES, WIDTH).float()
    scores = codes[None] @ codes.T
    for targets in (assign(scores, 0.01), assign(scores, 0.01, 50), assign_ipot(scores)):
        assert bool(targets.isfinite().all()) and targets[0].argmax(1).tolist() == list(range(CODES))


def direct_ipot(scores: Tensor, beta: float, outer: int) -> Tensor:
    """The plan by the direct form of docs/spec/codebook.md 1.3, which carries all of it, entry by entry."""
    rows, columns = scores.shape
    kernel = [[math.exp(-(1 - s) / beta) for s in row] for row in scores.tolist()]
    plan, sigma = [[1.0] * columns for _ in range(rows)], [1 / columns] * columns
    for _ in range(outer):
        q = [[a * t for a, t in zip(*pair, strict=True)] for pair in zip(kernel, plan, strict=True)]
        delta = [1 / (rows * sum(x * s for x, s in zip(row, sigma, strict=True))) for row in q]
        sigma = [1 / (columns * sum(q[i][k] * delta[i] for i in range(rows))) for k in range(columns)]
        plan = [[delta[i] * q[i][k] * sigma[k] for k in range(columns)] for i in range(rows)]
    return torch.tensor(plan, dtype=torch.float64)


def plan_of_potentials(scores: Tensor, beta: float, outer: int) -> Tensor:
    """The plan itself, put together from our potentials.

    Its samples' factors come from the codes' potentials that the last sample step saw (2 G_(n-1) - G_(n-2)).
    """
    given, valid = known(scores[None]), everyone(len(scores))
    last, before, earlier = (ipot(given, valid, beta, n, SOLO).potentials[0] for n in (outer, outer - 1, outer - 2))
    logits = scores * outer / beta
    samples = -torch.logsumexp(logits + 2 * before - earlier, 1, keepdim=True)
    return torch.softmax((logits + samples + last).flatten(), 0).view_as(scores)


@pytest.mark.parametrize("outer", [2, 5, 50])
def test_p14_the_proximal_method_equals_its_direct_form_with_exact_code_sums_and_additive_logarithm(outer):
    scores, beta = toy()[0], 0.5
    direct, ours = direct_ipot(scores, beta, outer), plan_of_potentials(scores, beta, outer)
    close(ours, direct, 1e-12)
    close(assign_ipot(scores[None], beta, outer)[0], direct / direct.sum(1, keepdim=True), 1e-12)
    for plan in (direct, ours):
        close(plan.sum(0), 1 / CODES, 1e-12)
        rest = plan.log() + outer * (1 - scores) / beta
        close(rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean(), 0.0, 1e-12)


@pytest.mark.parametrize("iters", [1, 3, 50])
def test_p15_without_balance_it_is_the_plain_softmax(iters):
    scores = toy()
    close(assign(scores, iters=iters, balance=0.0), torch.softmax(scores / 0.05, 2), 1e-12)


@pytest.mark.parametrize("limit", [1, 2**26])
def test_p16_masked_samples_do_not_exist(limit):
    features, codes = unit(2, SAMPLES, WIDTH), unit(CODES, WIDTH, seed=1)
    valid = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(2)) < 0.5
    scores = features @ codes.T
    masked, kept = Scores(features, codes, limit), Scores(features[:, valid], codes, limit)
    pairs = [
        (sinkhorn(masked, valid, 0.05, 3, 1.0, SOLO), sinkhorn(kept, everyone(int(valid.sum())), 0.05, 3, 1.0, SOLO)),
        (ipot(masked, valid, 0.5, 20, SOLO), ipot(kept, everyone(int(valid.sum())), 0.5, 20, SOLO)),
    ]
    for with_mask, without in pairs:
        close(with_mask.targets(scores)[:, valid], without.targets(scores[:, valid]), 1e-12)


def test_golden_a_two_by_two():
    case = golden("A")
    scores = torch.tensor(case["S"], dtype=torch.float64)[None]
    for name, iters in (("Q_n1", 1), ("Q_n3", 3), ("Q_limit", 500)):
        close(assign(scores, case["eps"], iters)[0], case[name], 1e-9)
    close(assign(scores, case["eps"], 500)[0, 0, 0], case["closed_form_q11"], 1e-9)


def case_b(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The case, the teacher's features of both modalities, the codes."""
    case = golden("B")
    raw = {name: F.normalize(torch.tensor(rows, dtype=dtype), dim=1) for name, rows in case["inputs_raw"].items()}
    return case, torch.stack([raw["teacher_v"], raw["teacher_t"]]), raw["codebook"]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("eps", ["eps0.05", "eps0.25"])
def test_golden_b_both_modalities(eps, dtype, atol):
    case, features, codes = case_b(dtype)
    block, scores = case[eps], features @ codes.T
    plan = sinkhorn(Scores(features, codes), everyone(3), block["eps"], block["iters"], 1.0, SOLO)
    close(scores[0], case["S_v"], atol)
    close(plan.targets(scores), [block["Qv"], block["Qt"]], atol)
    close(plan.potentials, [block["gv_centred"], block["gt_centred"]], atol)


@pytest.mark.parametrize("name", ["ipot_n5", "ipot_n50"])
def test_golden_b_proximal_plans(name):
    case, features, codes = case_b()
    block, scores = case[name], features[0] @ codes.T
    targets = assign_ipot(scores[None], block["beta"], block["outer"])[0]
    close(targets, block["Q"], 1e-9)
    close((targets * (1 - scores)).sum() / 3, block["ot_from_Q"], 1e-9)
    for plan in (plan_of_potentials(scores, block["beta"], block["outer"]), direct_ipot(scores, 0.5, block["outer"])):
        close(plan, block["T"], 1e-9)
        close(plan.sum(1), block["row_sums"], 1e-9)
        close(plan.sum(0), block["col_sums"], 1e-9)
        close((plan * (1 - scores)).sum(), block["cost"], 1e-9)


def case_c_share(case: dict[str, Any], rank: int) -> tuple[Tensor, Tensor]:
    """Scores and validity of a worker: its samples, then its queue entry."""
    rows = [*case[f"rank{rank}_S"], case["queue_S"][rank]]
    valid = [[True, True, True, True], [*map(bool, case["rank1_valid"]), True]][rank]
    return torch.tensor([rows], dtype=torch.float64), torch.tensor(valid)


def solve_case_c(
    workers: Workers, case: dict[str, Any], iters: int, balance: float, masked: bool = True
) -> TransportPlan:
    scores, valid = case_c_share(case, workers.rank)
    return sinkhorn(known(scores), valid | (not masked), case["eps"], iters, balance, workers)


def test_golden_c_two_workers_a_padded_sample_and_queue_entries():
    case = golden("C")
    shares = [case_c_share(case, rank) for rank in range(2)]
    for iters, expected in enumerate(case["g_centred_per_iter"], 1):
        for plan in fake_workers.on_threads(2, solve_case_c, case, iters, 1.0):
            close(plan.potentials[0], expected, 1e-9)
    plan, again = fake_workers.on_threads(2, solve_case_c, case, case["iters"], 1.0)
    assert torch.equal(plan.potentials, again.potentials)
    close(plan.targets(shares[0][0])[0, :3], case["Q_rank0"], 1e-9)
    close(plan.targets(shares[1][0])[0, :1], case["Q_rank1_valid"], 1e-9)
    mass = torch.cat([plan.targets(scores)[0, valid] for scores, valid in shares]).mean(0)
    close(mass, case["Qbar_code_mass"], 1e-9)
    close((3 * mass - 1).abs().max(), case["max_rel_code_marginal_error"], 1e-9)
    for name, iters, balance in (("limit", 500, 1.0), ("balance0.5", 3, 0.5), ("balance0", 3, 0.0)):
        plan = fake_workers.on_threads(2, solve_case_c, case, iters, balance)[0]
        close(plan.targets(shares[0][0])[0, :3], case[f"Q_{name}_rank0"], 1e-9)


def test_golden_c_the_two_mistakes_give_the_wrong_targets_named_there():
    case = golden("C")
    scores = torch.tensor([case["rank0_S"]], dtype=torch.float64)
    right = fake_workers.on_threads(2, solve_case_c, case, 3, 1.0)[0].targets(scores)[0]
    unmasked = fake_workers.on_threads(2, solve_case_c, case, 3, 1.0, False)[0].targets(scores)[0]
    alone = assign(scores, case["eps"])[0]  # the case's worker that asks no one leaves its queue entry out too
    close(unmasked, case["wrong_if_mask_ignored_Q_rank0"], 1e-9)
    close(alone, case["wrong_if_local_only_Q_rank0"], 1e-9)
    for wrong in (unmasked, alone, solve_case_c(SOLO, case, 3, 1.0).targets(scores)[0]):
        assert float((right - wrong).abs().max()) > 0.05


@pytest.mark.parametrize("in_a_pass", [2, 37])
@pytest.mark.parametrize("rows", [1, 3, 37])
def test_blocks_of_rows_give_the_same_as_one_and_stay_under_the_limit(rows, in_a_pass, monkeypatch):
    monkeypatch.setattr(transport, "CPU_BLOCK_BYTES", in_a_pass * 2 * CODES * 8)
    features, codes = unit(2, SAMPLES, WIDTH), unit(CODES, WIDTH, seed=1)
    limit = rows * 2 * CODES * 8 + 7
    blocks, whole = Scores(features, codes, limit), Scores(features, codes)
    assert max(block.shape[1] for _, block in blocks) == min(rows, in_a_pass)
    assert [n for part, _ in blocks for n in range(part.start, part.stop)] == list(range(SAMPLES))
    close(torch.cat([block for _, block in blocks], 1), features @ codes.T, 1e-12)
    valid, scores = torch.arange(SAMPLES) % 5 > 0, features @ codes.T
    for solve in (lambda s: sinkhorn(s, valid, 0.05, 3, 1.0, SOLO), lambda s: ipot(s, valid, 0.5, 50, SOLO)):
        close(solve(blocks).targets(scores), solve(whole).targets(scores), 1e-12)


def test_scores_that_fit_are_made_once_and_others_in_each_pass():
    features, codes = unit(1, 4, WIDTH), unit(CODES, WIDTH, seed=1)
    kept, remade = Scores(features, codes), Scores(features, codes, 1)
    for scores, same, blocks in ((kept, True, 1), (remade, False, 4)):
        (_, first), (_, again) = next(iter(scores)), next(iter(scores))
        assert len(list(scores)) == blocks and (first.data_ptr() == again.data_ptr()) == same


def test_scores_have_32_bits_at_least_and_no_gradient():
    features, codes = unit(1, 4, WIDTH), unit(CODES, WIDTH, seed=1)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        low = features.to(dtype).requires_grad_()
        ((_, table),) = Scores(low, codes.to(dtype))
        assert table.dtype == expected and not table.requires_grad
        close(table, low.detach().to(expected) @ codes.to(dtype).to(expected).T, 0.0)


def test_two_problems_at_once_equal_the_two_alone():
    scores = toy(problems=2)
    for solve in (assign, assign_ipot):
        close(solve(scores), torch.cat([solve(scores[:1]), solve(scores[1:])]), 1e-12)


def solve_without_a_sample(workers: Workers, samples: int) -> tuple[list[TransportPlan], list[str]]:
    nobody = torch.zeros(samples, dtype=torch.bool)
    scores = known(toy(problems=2, samples=samples).float())
    plans = [sinkhorn(scores, nobody, 0.01, 3, b, workers) for b in (0.0, 0.5, 1.0)]
    return [*plans, ipot(scores, nobody, 0.5, 50, workers)], getattr(workers, "calls", [])


@pytest.mark.parametrize("samples", [0, 3])
def test_without_a_valid_sample_anywhere_targets_are_uniform_and_potentials_finite(samples):
    others = 5 * toy(problems=2).float()
    for plans, calls in fake_workers.on_threads(2, solve_without_a_sample, samples):
        assert calls == ["max", "sum"] * (3 * 3 + 50)
        for plan in plans:
            assert torch.equal(plan.targets(others), torch.full_like(others, 1 / CODES))
            assert bool(plan.potentials.isfinite().all()) and bool((plan.potentials.diff(dim=1) == 0).all())


def test_a_score_that_is_no_number_is_not_hidden():
    for bad in (math.nan, math.inf):
        scores = toy()
        scores[0, 3, 2] = bad
        for solve in (assign, assign_ipot):
            assert not bool(solve(scores).isfinite().any())


class NothingRead(TorchDispatchMode):
    """Refuses what copies a value to the host or has a shape that depends on values: both wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "masked_select", "index", "equal"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit", [20 * 2 * CODES * 8, 2**26])
def test_the_solver_never_waits_for_the_device(limit):
    features, codes, valid = unit(2, SAMPLES, WIDTH), unit(CODES, WIDTH, seed=1), everyone(SAMPLES)
    with NothingRead():
        scores = Scores(features, codes, limit)
        for plan in (sinkhorn(scores, valid, 0.05, 3, 1.0, SOLO), ipot(scores, valid, 0.5, 3, SOLO)):
            plan.targets(features @ codes.T)
        for forbidden in (lambda: bool(valid.all()), lambda: codes.sum().item(), lambda: features[:, valid]):
            with pytest.raises(AssertionError):
                forbidden()
