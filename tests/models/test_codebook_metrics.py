"""Metrics of embeddings, codes, targets and mass against the golden case, loops and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.codebook import prediction_sum
from models.codebook_metrics import (
    code_metrics,
    embedding_metrics,
    mass_metrics,
    target_metrics,
    uniformity,
)
from tests.support.codebook_cases import as_floats, entropy, golden, mean, numbers, unit

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
    monkeypatch.setattr("models.codebook_metrics.LIMIT", 3 * 13 * 8)  # three rows
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
