"""CodeUsage counts against the golden case, loops and closed forms (docs/spec/codebook.md 5 and 9)."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.codebook_usage import (
    CodeUsage,
    kappa,
    perplexity,
)
from tests.support.codebook_cases import SOLO, entropy, golden, nearest, numbers
from tests.support.fake_workers import ThreadWorkers, on_threads


def filled(
    size: int = 6, per_code: int = 20, image: list[int] | None = None, text: list[int] | None = None
) -> CodeUsage:
    """CodeUsage whose last window has the given nearest codes, and an empty running one."""
    usage = CodeUsage(size, per_code)
    usage.count(nearest(image or [], size), nearest(text or image or [], size))
    assert usage.flush(SOLO)
    return usage


# Counting.


def test_golden_d_usage():
    case = golden("D")
    usage = CodeUsage(case["K"], 20)
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
    usage = CodeUsage(size, 20)
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
        usage = CodeUsage(size, 20)
        usage.count(numbers(30, size, seed=1), numbers(30, size, seed=2))
        usage.flush(SOLO)
        assert usage.metrics()["codebook/agree5"] == 1.0


def test_a_pair_with_one_nearest_code_is_in_its_top_five_also_when_all_scores_tie():
    usage = CodeUsage(8, 20)
    usage.count(torch.zeros(3, 8), torch.zeros(3, 8))
    usage.flush(SOLO)
    assert usage.metrics()["codebook/agree1"] == usage.metrics()["codebook/agree5"] == 1.0


def test_without_a_pair_there_are_no_metrics_no_dead_codes_and_no_full_window():
    usage = CodeUsage(7, 20)
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
    plain, permuted = CodeUsage(7, 20), CodeUsage(7, 20)
    plain.count(image, text)
    permuted.count(image[:, order], text[:, order])
    plain.flush(SOLO)
    permuted.flush(SOLO)
    assert permuted.metrics() == pytest.approx(plain.metrics(), abs=1e-12)
    assert permuted.hits.tolist() == plain.hits[:, order].tolist()


def test_p17_swapping_modalities_swaps_perplexities_and_nothing_else():
    image, text = numbers(40, 7, seed=1), numbers(40, 7, seed=2)
    plain, swapped = CodeUsage(7, 20), CodeUsage(7, 20)
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
    usage = CodeUsage(3, 4)
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
    usage = CodeUsage(4, 20)
    usage.count(nearest([1, 2], 4), nearest([1, 3], 4))
    assert usage.metrics() == {}
    usage.flush(SOLO)
    usage.flush(SOLO)
    assert int(usage.pairs) == 2 and usage.hits.sum() == 4


PLACES = [[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 2, 2, 1], [2, 2, 2, 2, 2, 2, 2]]
"""By batch, the worker of each row: uneven, and worker 2, then all others, have none."""


def run_worker(
    workers: Any, batches: list[tuple[Tensor, Tensor]], places: list[list[int]]
) -> tuple[CodeUsage, list[bool]]:
    usage, closed = CodeUsage(5, 2), []
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
    resumed = CodeUsage(4, 2)
    resumed.load_state_dict(copy.deepcopy(state))
    assert resumed.metrics() == usage.metrics() and resumed.full
    assert not resumed.pending_hits.any() and not resumed.pending_pairs


# Dead codes.


def test_dead_codes_have_less_than_their_share_of_the_even_one_in_both_modalities():
    usage = CodeUsage(4, 100)
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
