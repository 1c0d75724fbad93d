"""Usage counts and metrics against the golden case, loops and closed forms (codebook spec 5 and 9)."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_workers import ThreadWorkers, on_threads
from torch import Tensor

from models.codebook import prediction_sum
from models.gather import SoloWorkers
from models.usage import (
    Usage,
    code_metrics,
    embedding_metrics,
    kappa,
    mass_metrics,
    perplexity,
    target_metrics,
    uniformity,
)

SOLO = SoloWorkers()


def golden(case: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "golden" / "codebook" / f"{case}.json").read_text())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(numbers(*shape, seed=seed), dim=-1)


def nearest(codes: list[int], size: int) -> Tensor:
    """Scores whose largest are at the given codes."""
    return F.one_hot(torch.tensor(codes, dtype=torch.int64), size).double()


def as_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    assert all(value.shape == () for value in metrics.values())
    return {key: float(value) for key, value in metrics.items()}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def entropy(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def filled(size: int = 6, per_code: int = 20, image: list[int] | None = None, text: list[int] | None = None) -> Usage:
    """Usage whose last window has the given nearest codes, and an empty running one."""
    usage = Usage(size, per_code)
    usage.count(nearest(image or [], size), nearest(text or image or [], size))
    assert usage.flush(SOLO)
    return usage


# Counting.


def test_golden_d_usage():
    case = golden("D")
    usage = Usage(case["K"], 20)
    usage.count(nearest(case["argmax_v"], case["K"]), nearest(case["argmax_t"], case["K"]))
    usage.flush(SOLO)
    metrics = usage.metrics()
    assert metrics["codebook/ppl_v"] == pytest.approx(case["perplexity_v"], abs=1e-9)
    assert metrics["codebook/ppl_t"] == pytest.approx(case["perplexity_t"], abs=1e-9)
    assert metrics["codebook/ppl_v_share"] == pytest.approx(case["perplexity_v"] / 6, abs=1e-9)
    assert metrics["codebook/ppl_t_share"] == pytest.approx(case["perplexity_t"] / 6, abs=1e-9)
    assert metrics["codebook/dead"] == pytest.approx(case["dead_fraction_joint"], abs=1e-9)
    assert metrics["codebook/agree1"] == pytest.approx(case["agree"], abs=1e-9)
    assert metrics["codebook/kappa"] == pytest.approx(case["kappa"], abs=1e-9)


def test_counts_equal_loops_over_pairs():
    size, images = 9, [numbers(23, 9, seed=1), numbers(4, 9, seed=2)]
    batches = [(image, image + numbers(*image.shape, seed=3)) for image in images]
    usage = Usage(size, 20)
    hits, same, near, pairs = [[0] * size, [0] * size], 0, 0, 0
    for image, text in batches:
        usage.count(image, text)
        for row in range(len(image)):
            order = [sorted(range(size), key=lambda k: -scores[row, k]) for scores in (image, text)]
            best = order[0][0], order[1][0]
            hits[0][best[0]] += 1
            hits[1][best[1]] += 1
            same += best[0] == best[1]
            near += (best[1] in order[0][:5]) + (best[0] in order[1][:5])
            pairs += 1
    usage.flush(SOLO)
    assert usage.hits.tolist() == hits and usage.agree.tolist() == [same, near] and int(usage.pairs) == pairs
    metrics = usage.metrics()
    assert 0 < same < near < 2 * pairs
    assert metrics["codebook/agree1"] == pytest.approx(same / pairs)
    assert metrics["codebook/agree5"] == pytest.approx(near / (2 * pairs))
    chance = sum(v * t for v, t in zip(*hits, strict=True)) / pairs**2
    assert metrics["codebook/kappa"] == pytest.approx((same / pairs - chance) / (1 - chance))
    for key, row in (("codebook/ppl_v", hits[0]), ("codebook/ppl_t", hits[1])):
        assert metrics[key] == pytest.approx(math.exp(entropy([count / pairs for count in row])))


def test_a_code_that_one_modality_hits_is_not_dead():
    assert filled(4, 1, [0, 0, 0, 1], [0, 0, 0, 2]).metrics()["codebook/dead"] == 0.25


def test_with_five_codes_or_fewer_everything_is_in_the_top_five():
    for size in (1, 2, 5):
        usage = Usage(size, 20)
        usage.count(numbers(30, size, seed=1), numbers(30, size, seed=2))
        usage.flush(SOLO)
        assert usage.metrics()["codebook/agree5"] == 1.0


def test_a_pair_with_one_nearest_code_is_in_its_top_five_also_when_all_scores_tie():
    usage = Usage(8, 20)
    usage.count(torch.zeros(3, 8), torch.zeros(3, 8))
    usage.flush(SOLO)
    assert usage.metrics()["codebook/agree1"] == usage.metrics()["codebook/agree5"] == 1.0


def test_without_a_pair_there_are_no_metrics_no_dead_codes_and_no_full_window():
    usage = Usage(7, 20)
    assert usage.metrics() == {}
    usage.count(torch.zeros(0, 7), torch.zeros(0, 7))
    assert not usage.flush(SOLO)
    assert usage.metrics() == {} and not usage.full and not usage.dead(1.0).any()


def test_a_single_code_has_perplexity_one_and_no_agreement_above_chance():
    metrics = filled(1, 2, [0, 0]).metrics()
    assert metrics["codebook/ppl_v"] == 1 and metrics["codebook/agree1"] == 1 and metrics["codebook/kappa"] == 0
    assert metrics["codebook/dead"] == 0


def test_p06_permuting_codes_changes_no_metric():
    image, text, order = numbers(40, 7, seed=1), numbers(40, 7, seed=2), torch.tensor([3, 0, 6, 1, 2, 5, 4])
    plain, permuted = Usage(7, 20), Usage(7, 20)
    plain.count(image, text)
    permuted.count(image[:, order], text[:, order])
    plain.flush(SOLO)
    permuted.flush(SOLO)
    assert permuted.metrics() == pytest.approx(plain.metrics(), abs=1e-12)
    assert permuted.hits.tolist() == plain.hits[:, order].tolist()


def test_p17_swapping_modalities_swaps_perplexities_and_nothing_else():
    image, text = numbers(40, 7, seed=1), numbers(40, 7, seed=2)
    plain, swapped = Usage(7, 20), Usage(7, 20)
    plain.count(image, text)
    swapped.count(text, image)
    plain.flush(SOLO)
    swapped.flush(SOLO)
    exchange = {"v": "t", "t": "v"}
    expected = {
        f"codebook/ppl_{exchange[key[13]]}{key[14:]}" if key.startswith("codebook/ppl_") else key: value
        for key, value in plain.metrics().items()
    }
    assert swapped.metrics() == pytest.approx(expected, abs=1e-12)
    assert plain.metrics()["codebook/ppl_v"] != plain.metrics()["codebook/ppl_t"]


# Windows and workers.


def test_a_window_is_full_at_its_size_becomes_the_last_and_a_new_one_starts():
    usage = Usage(3, 4)
    usage.count(nearest([0] * 11, 3), nearest([1] * 11, 3))
    assert not usage.flush(SOLO) and not usage.full and int(usage.pairs) == 11
    usage.count(nearest([2], 3), nearest([2], 3))
    assert usage.flush(SOLO) and usage.full
    assert int(usage.pairs) == 0 and usage.hits.sum() == 0 and usage.agree.sum() == 0
    assert usage.last_hits.tolist() == [[11, 0, 1], [0, 11, 1]] and int(usage.last_pairs) == 12
    assert usage.last_agree.tolist() == [1, 24]


def test_metrics_cover_the_last_full_window_and_the_running_one():
    usage = filled(4, 2, [0] * 8)
    usage.count(nearest([1] * 4, 4), nearest([1] * 4, 4))
    usage.flush(SOLO)
    assert usage.metrics()["codebook/ppl_v"] == pytest.approx(math.exp(entropy([8 / 12, 4 / 12])))
    usage.count(nearest([2] * 4, 4), nearest([2] * 4, 4))
    assert usage.flush(SOLO)  # the first window is forgotten
    assert usage.metrics()["codebook/ppl_v"] == pytest.approx(2.0)
    assert usage.metrics()["codebook/dead"] == 0.5


def test_what_is_pending_counts_once_and_only_after_the_flush():
    usage = Usage(4, 20)
    usage.count(nearest([1, 2], 4), nearest([1, 3], 4))
    assert usage.metrics() == {}
    usage.flush(SOLO)
    usage.flush(SOLO)
    assert int(usage.pairs) == 2 and usage.hits.sum() == 4


PLACES = [[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 2, 2, 1], [2, 2, 2, 2, 2, 2, 2]]
"""By batch, the worker of each row: uneven, and worker 2, then all others, have none."""


def run_worker(workers: Any, batches: list[tuple[Tensor, Tensor]], places: list[list[int]]) -> tuple[Usage, list[bool]]:
    usage, closed = Usage(5, 2), []
    for (image, text), place in zip(batches, places, strict=True):
        rows = torch.tensor(place) == workers.rank
        usage.count(image[rows], text[rows])
        closed.append(usage.flush(workers))
    assert not isinstance(workers, ThreadWorkers) or workers.calls == ["sum"] * len(batches)
    return usage, closed


def test_windows_are_equal_on_all_workers_and_do_not_depend_on_their_number():
    batches = [(numbers(7, 5, seed=2 * n), numbers(7, 5, seed=2 * n + 1)) for n in range(3)]
    alone, closed = run_worker(SOLO, batches, [[0] * 7] * 3)
    assert closed == [False, True, False] and int(alone.pairs) == 7 and int(alone.last_pairs) == 14
    for usage, also_closed in on_threads(3, run_worker, batches, PLACES):
        assert also_closed == closed and usage.metrics() == alone.metrics()
        for name, buffer in alone.named_buffers():
            assert torch.equal(buffer, usage.get_buffer(name)), name


def test_the_windows_are_saved_and_what_is_pending_is_not():
    usage = filled(4, 2, [0, 1, 2, 3, 0, 1, 2, 3])
    usage.count(nearest([3], 4), nearest([2], 4))
    usage.flush(SOLO)
    usage.count(nearest([0], 4), nearest([0], 4))
    state = usage.state_dict()
    assert set(state) == {p + n for p in ("", "last_") for n in ("hits", "agree", "pairs")}
    resumed = Usage(4, 2)
    resumed.load_state_dict(copy.deepcopy(state))
    assert resumed.metrics() == usage.metrics() and resumed.full
    assert not resumed.pending_hits.any() and not resumed.pending_pairs


# Dead codes.


def test_dead_codes_have_less_than_their_share_of_the_even_one_in_both_modalities():
    usage = Usage(4, 100)
    usage.last_pairs.fill_(400)  # evenly 100 a code, of which 2 % are 2
    usage.last_hits.copy_(torch.tensor([[1, 1, 2, 396], [1, 2, 1, 396]]))
    assert usage.dead(0.02).tolist() == [True, False, False, False]
    assert usage.dead(0.01).tolist() == [False, False, False, False]
    assert usage.dead(0.021).tolist() == [True, True, True, False]


def test_dead_codes_are_those_of_the_last_full_window():
    usage = filled(4, 2, [0, 1, 2] * 3)
    usage.count(nearest([3], 4), nearest([3], 4))
    usage.flush(SOLO)
    assert usage.dead(0.01).tolist() == [False, False, False, True]


@pytest.mark.parametrize("codes", [torch.tensor([3, 1]), torch.tensor([False, True, False, True])])
def test_a_forgotten_code_is_not_dead_until_a_window_has_measured_it(codes):
    usage = filled(4, 2, [0, 2] * 4)
    assert usage.dead(0.01).tolist() == [False, True, False, True]
    usage.forget(codes)
    assert not usage.dead(1.0)[[1, 3]].any()
    usage.count(nearest([0, 1] * 4, 4), nearest([0, 1] * 4, 4))
    assert usage.flush(SOLO)
    assert usage.dead(0.01).tolist() == [False, False, True, True]


def test_a_code_that_is_forgotten_late_in_a_window_is_not_dead_at_its_end():
    usage = filled(4, 2, [0, 1, 2] * 3)
    usage.count(nearest([0, 1, 2, 0, 1, 2, 0], 4), nearest([0, 1, 2, 0, 1, 2, 0], 4))
    usage.flush(SOLO)
    usage.forget(torch.tensor([3]))
    usage.count(nearest([0], 4), nearest([0], 4))
    assert usage.flush(SOLO) and not usage.dead(0.5).any()


# Closed forms.


def test_perplexity_is_the_number_of_codes_used_alike():
    for used in (1, 3, 8):
        assert float(perplexity(torch.tensor([5] * used + [0] * (8 - used)))) == pytest.approx(used)
    assert float(perplexity(torch.zeros(8, dtype=torch.int64))) == 1


def test_kappa_is_one_for_full_agreement_and_zero_at_chance():
    even, one = torch.full((2, 4), 3), torch.tensor([[9, 0], [9, 0]])
    assert float(kappa(torch.tensor(1.0), even)) == pytest.approx(1.0)
    assert float(kappa(torch.tensor(0.25), even)) == pytest.approx(0.0)
    assert float(kappa(torch.tensor(0.0), even)) == pytest.approx(-1 / 3)
    assert float(kappa(torch.tensor(1.0), one)) == 0.0


# Embeddings and codes.


def case_b() -> dict[str, Tensor]:
    raw = golden("B")["inputs_raw"]
    return {name: F.normalize(torch.tensor(rows, dtype=torch.float64), dim=1) for name, rows in raw.items()}


def test_golden_d_geometry():
    case, views = golden("D"), case_b()
    metrics = as_floats(
        embedding_metrics(views["student_v"], views["student_t"], views["teacher_v"], views["teacher_t"])
    )
    assert metrics["embedding/align"] == pytest.approx(case["align_student_B"], abs=1e-9)
    assert metrics["embedding/unif_v"] == pytest.approx(case["uniformity_student_v_B"], abs=1e-9)
    assert metrics["embedding/gap"] == pytest.approx(case["modality_gap_student_B"], abs=1e-9)
    assert views["student_v"].mean(0).tolist() == pytest.approx(case["zv_mean"], abs=1e-9)
    assert float(code_metrics(views["codebook"])["codebook/nn_cos"]) == pytest.approx(
        mean(case["code_nn_cos_B"]), abs=1e-9
    )


def uniformity_by_loops(rows: Tensor) -> float:
    points = rows.tolist()
    terms = [
        math.exp(-2 * sum((a - b) ** 2 for a, b in zip(points[i], points[j], strict=True)))
        for j in range(len(points))
        for i in range(j)
    ]
    return math.log(mean(terms))


def test_embedding_metrics_equal_loops():
    image, text, image_ema, text_ema = (unit(9, 5, seed=n) for n in range(4))
    metrics = as_floats(embedding_metrics(image, text, image_ema, text_ema))
    distances = [sum((a - b) ** 2 for a, b in zip(image[i], text[i], strict=True)) for i in range(9)]
    gap = sum(mean([float(image[i, d] - text[i, d]) for i in range(9)]) ** 2 for d in range(5)) ** 0.5
    drifts = [
        1 - mean([float(sum(a * b for a, b in zip(x[i], y[i], strict=True))) for i in range(9)])
        for x, y in ((image, image_ema), (text, text_ema))
    ]
    assert metrics == pytest.approx(
        {
            "embedding/align": float(mean(distances)),
            "embedding/unif_v": uniformity_by_loops(image),
            "embedding/unif_t": uniformity_by_loops(text),
            "embedding/gap": gap,
            "embedding/ts_drift_v": drifts[0],
            "embedding/ts_drift_t": drifts[1],
            "embedding/ts_drift": mean(drifts),
        },
        abs=1e-12,
    )


def test_equal_rows_are_aligned_and_crowded_and_opposite_ones_are_not():
    row = unit(1, 6)
    metrics = as_floats(embedding_metrics(row.expand(4, 6), -row.expand(4, 6), row.expand(4, 6), row.expand(4, 6)))
    expected = {"align": 4, "unif_v": 0, "unif_t": 0, "gap": 2, "ts_drift_v": 0, "ts_drift_t": 2, "ts_drift": 1}
    assert metrics == pytest.approx({f"embedding/{name}": value for name, value in expected.items()}, abs=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_a_single_row_give_numbers(rows):
    views = [unit(rows, 4, seed=n) for n in range(4)]
    metrics = as_floats(embedding_metrics(*views))
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["embedding/unif_v"] == metrics["embedding/unif_t"] == 0
    assert rows or set(metrics.values()) == {0.0}


def test_embeddings_of_16_bits_are_measured_in_32():
    views = [unit(64, 8, seed=n).bfloat16() for n in range(4)]
    expected = as_floats(embedding_metrics(*(view.double() for view in views)))
    assert as_floats(embedding_metrics(*views)) == pytest.approx(expected, abs=1e-5)


def test_blocks_of_rows_change_nothing(monkeypatch):
    rows, codes = unit(13, 4), unit(11, 4, seed=1)
    whole = float(uniformity(rows)), as_floats(code_metrics(codes))
    monkeypatch.setattr("models.usage.LIMIT", 3 * 13 * 8)  # three rows
    assert (float(uniformity(rows)), as_floats(code_metrics(codes))) == (
        pytest.approx(whole[0], abs=1e-12),
        pytest.approx(whole[1], abs=1e-12),
    )
    assert whole[0] == pytest.approx(uniformity_by_loops(rows), abs=1e-12)


@pytest.mark.parametrize(("codes", "width"), [(9, 4), (4, 9), (6, 6)])
def test_code_metrics_equal_loops_and_singular_values(codes, width):
    rows = unit(codes, width)
    metrics = as_floats(code_metrics(rows))
    cosines = [max(float(rows[i] @ rows[j]) for j in range(codes) if j != i) for i in range(codes)]
    assert metrics["codebook/nn_cos"] == pytest.approx(mean(cosines), abs=1e-12)
    singular = torch.linalg.svdvals(rows)
    rank = math.exp(entropy((singular / singular.sum()).tolist()))
    assert metrics["codebook/erank"] == pytest.approx(rank, rel=1e-9)


def test_codes_on_the_axes_have_full_rank_and_equal_codes_have_rank_one():
    axes = as_floats(code_metrics(torch.cat([torch.eye(5), -torch.eye(5)])))
    assert axes == pytest.approx({"codebook/nn_cos": 0.0, "codebook/erank": 5.0}, abs=1e-6)
    equal = as_floats(code_metrics(F.normalize(torch.randn(1, 64), dim=1).expand(40, 64)))
    assert equal == pytest.approx({"codebook/nn_cos": 1.0, "codebook/erank": 1.0}, abs=1e-5)
    assert as_floats(code_metrics(unit(1, 5))) == pytest.approx({"codebook/nn_cos": 0.0, "codebook/erank": 1.0})


def test_codes_that_are_no_numbers_are_measured_as_such_and_raise_nothing():
    codes = unit(6, 3)
    codes[2, 1] = math.nan
    assert all(math.isnan(value) for value in as_floats(code_metrics(codes)).values())


# Targets and mass.


def softmax(row: list[float]) -> list[float]:
    terms = [math.exp(value - max(row)) for value in row]
    return [term / sum(terms) for term in terms]


@pytest.mark.parametrize("beta_same", [0.0, 0.3, 1.0])
def test_target_metrics_equal_loops(beta_same):
    rows, size, tau = 6, 5, 0.1
    scores = unit(rows, 4, seed=1) @ unit(size, 4).T, unit(rows, 4, seed=2) @ unit(size, 4).T
    targets = F.softmax(3 * numbers(rows, size, seed=3), 1), F.softmax(3 * numbers(rows, size, seed=4), 1)
    student, target, largest, divergence = [], [], [], []
    for own in range(2):
        for i in range(rows):
            p = softmax([float(score) / tau for score in scores[own][i]])
            q, other = targets[own][i].tolist(), targets[1 - own][i].tolist()
            y = [(1 - beta_same) * b + beta_same * a for a, b in zip(q, other, strict=True)]
            student.append(entropy(p) / math.log(size))
            target.append(entropy(q) / math.log(size))
            largest.append(max(q))
            divergence.append(sum(b * math.log(b / a) for a, b in zip(p, y, strict=True)))
    assert as_floats(target_metrics(scores, targets, tau, beta_same)) == pytest.approx(
        {
            "codebook/H_student": mean(student),
            "codebook/H_target": mean(target),
            "codebook/q_max": mean(largest),
            "codebook/kl": mean(divergence),
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("eps", ["eps0.05", "eps0.25"])
def test_golden_b_kl_is_the_loss_less_the_entropy_of_its_targets(eps):
    case, views = golden("B")[eps], case_b()
    targets = [torch.tensor(case[name], dtype=torch.float64) for name in ("Qv", "Qt")]
    scores = [views[name] @ views["codebook"].T for name in ("student_v", "student_t")]
    least = mean([entropy(row) for target in targets for row in target.tolist()])
    metrics = target_metrics((scores[0], scores[1]), (targets[0], targets[1]), case["tau_c"], 0.0)
    assert float(metrics["codebook/kl"]) == pytest.approx(case["code_cross"] - least, abs=2e-9)
    metrics = target_metrics((scores[0], scores[1]), (targets[0], targets[1]), case["tau_c"], 1.0)
    assert float(metrics["codebook/kl"]) == pytest.approx(case["code_same"] - least, abs=2e-9)


def test_p18_predictions_equal_to_their_targets_leave_nothing_to_learn():
    features, codes, tau = unit(8, 4), unit(6, 4, seed=1), 0.1
    scores = features @ codes.T
    target = F.softmax(scores / tau, 1)
    metrics = as_floats(target_metrics((scores, scores), (target, target), tau, 0.4))
    assert metrics["codebook/kl"] == pytest.approx(0.0, abs=1e-12)
    loss = float(prediction_sum(features, codes, target, tau)) / 8
    assert metrics["codebook/H_target"] * math.log(6) == pytest.approx(loss, abs=1e-12)
    assert metrics["codebook/H_student"] == pytest.approx(metrics["codebook/H_target"], abs=1e-12)


def test_entropies_are_one_for_even_rows_and_zero_for_single_codes():
    even, one = torch.zeros(4, 7), torch.eye(4, 7)
    metrics = as_floats(target_metrics((even, even), (one, one), 0.1, 0.0))
    expected = {"H_student": 1.0, "H_target": 0.0, "q_max": 1.0, "kl": math.log(7)}
    assert metrics == pytest.approx({f"codebook/{name}": value for name, value in expected.items()}, abs=1e-6)
    sharp = as_floats(target_metrics((100 * one, 100 * one), (even + 1 / 7, even + 1 / 7), 0.1, 0.0))
    assert sharp["codebook/H_student"] == pytest.approx(0.0, abs=1e-6)
    assert sharp["codebook/H_target"] == pytest.approx(1.0, abs=1e-6)
    assert sharp["codebook/q_max"] == pytest.approx(1 / 7, abs=1e-6)


@pytest.mark.parametrize(("rows", "size"), [(0, 5), (0, 1), (3, 1)])
def test_targets_of_no_row_or_of_a_single_code_have_no_entropy(rows, size):
    target = torch.full((rows, size), 1 / size)
    metrics = as_floats(target_metrics((target, target), (target, target), 0.1, 0.0))
    assert metrics == pytest.approx(
        {"codebook/H_student": 0, "codebook/H_target": 0, "codebook/q_max": 1 if rows else 0, "codebook/kl": 0}
    )


def test_mass_metrics_equal_loops():
    mass, potentials = F.softmax(numbers(2, 6), 1), numbers(2, 6, seed=1)
    errors = [[abs(float(mass[s, k]) - 1 / 6) for k in range(6)] for s in range(2)]
    ranges = [max(row) - min(row) for row in potentials.tolist()]
    assert as_floats(mass_metrics(mass, potentials, 0.05)) == pytest.approx(
        {
            "codebook/marg_l1": mean([sum(row) for row in errors]),
            "codebook/marg_max": max(6 * error for row in errors for error in row),
            "codebook/g_range": 0.05 * max(ranges),
        },
        abs=1e-12,
    )


def test_even_mass_has_no_error_and_equal_potentials_no_range():
    even = as_floats(mass_metrics(torch.full((2, 8), 1 / 8), torch.full((2, 8), 3.0), 0.05))
    assert even == {"codebook/marg_l1": 0.0, "codebook/marg_max": 0.0, "codebook/g_range": 0.0}
