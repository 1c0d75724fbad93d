import itertools
import json
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import local_memory, step, stopwatch, workload
from models.objectives import ScheduleState, coefficients
from pipelines.cli.flags import UsageError
from pipelines.step.training_step import training_step
from tests.support import tiny

CPU = torch.device("cpu")
SHALLOW = ["encoder.vision.layers=1", "encoder.text.layers=1", "encoder.fusion.layers=1", "objective.queue.size=256"]


@pytest.fixture(autouse=True)
def _small_matmul(monkeypatch):
    monkeypatch.setattr(step, "MATMUL_SIDE", {"cpu": 64})


def flags(changes: list[str]) -> list[str]:
    """The changes as words of the command line."""
    return [word for change in changes for word in ("--set", change)]


@pytest.mark.parametrize("chunk", [0, 2])
def test_a_step_split_by_part_is_the_same_step(chunk):
    goal = tiny.objective("both", codebook__koleo=0.1)
    runs = []
    for timed in (False, True):
        state, batch = tiny.state(goal), tiny.batch(5)
        take = partial(training_step, state, batch, tiny.settings(goal, chunk=chunk), ScheduleState(goal.alpha))
        if timed:
            with stopwatch.split(CPU) as parts:
                result = take()
        else:
            result = take()
        gradients = {name: p.grad for name, p in state.model.named_parameters() if p.grad is not None}
        runs.append((result.loss, gradients))
    (loss, whole), (same_loss, by_part) = runs
    assert loss == same_loss
    assert whole.keys() == by_part.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, by_part[name], rtol=1e-9, atol=1e-14), name
    # In chunks each term makes keys and values of wrong partners by itself, but those of the chunk are still shared.
    assert all(seconds > 0 for seconds in parts.values()), parts


def test_the_step_is_left_as_it_was():
    before = [getattr(place, name) for place, name, _ in stopwatch.WRAPPED]
    with stopwatch.split(CPU):
        assert all(getattr(place, name) not in before for place, name, _ in stopwatch.WRAPPED)
    assert [getattr(place, name) for place, name, _ in stopwatch.WRAPPED] == before


def test_a_part_does_not_count_the_parts_within_it(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch, "now", lambda device: float(next(ticks)))
    watch = stopwatch.Stopwatch(CPU)  # the clock says 0, and one more at each boundary
    with watch.part("contrast"), watch.part("codebook"), watch.part("contrast"):  # 1, 2, 3
        pass  # out again at 4, 5, 6
    watch.charge()  # 7
    assert {name: s for name, s in watch.seconds.items() if s} == {"other": 2.0, "contrast": 3.0, "codebook": 2.0}


def test_every_part_of_a_loss_has_its_place():
    names = coefficients(tiny.objective("both", codebook__koleo=0.1), ScheduleState(0.4))
    assert {name for term in stopwatch.PART_OF_TERM for name in stopwatch.TERMS[term]} == set(names)


def test_a_result_says_what_was_promised(tmp_path, capsys):
    out = tmp_path / "step.json"
    words = ["both-dual-tiny", "--batch", "8", "--steps", "2", "--warmup", "0", "--device", "cpu", "--out", str(out)]
    assert step.main([*words, *flags([*SHALLOW, "objective.codebook.size=64"]), "--terms"]) == 0
    result = json.loads(out.read_text())
    assert (result["preset"], result["batch"], result["precision"], result["kind"]) == (
        "both-dual-tiny",
        8,
        "fp32",
        "measured",
    )
    assert result["finite"]
    assert len(result["step_seconds"]) == 2
    assert result["samples_per_second"] == pytest.approx(8 / result["seconds"])
    assert set(result["parts"]) == set(stopwatch.PARTS)
    assert sum(result["parts"].values()) == pytest.approx(result["split_seconds"])
    assert sum(result["parts_share"].values()) == pytest.approx(1)
    assert result["parts"]["matching"] == result["parts"]["language"] == result["parts"]["memory"] == 0
    assert result["matmul_share"] == pytest.approx(
        result["flops"] / result["seconds"] / result["matmul_flops_per_second"]
    )
    assert (result["codebook"]["codes"], result["codebook"]["assigned"]) == (64, 128)
    assert set(result["terms"]) == {"cma", "imc", "lmi", "code", "ot", "all"}
    assert {"processor", "cores", "torch", "threads", "commit", "dirty"} <= result["machine"].keys()
    assert "peak_memory_bytes" in result
    printed = capsys.readouterr().out
    assert all(f"  {part} " in printed for part in stopwatch.PARTS)


def test_operations_counted_without_running_are_those_of_the_step():
    experiment = workload.experiment_of("both-tiny", [*SHALLOW, "compute.chunk_size=2"]).override(
        {"compute.bf16": False}
    )
    work = workload.make_workload(experiment, 4, CPU)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention hides its products
        work.step()
    assert workload.step_flops(experiment, 4) == counter.get_total_flops()


def test_the_codebooks_operations_are_the_products_of_its_formulas(tmp_path):
    codes, width, rows = 64, 64, 8
    changes = [*SHALLOW, f"objective.codebook.size={codes}"]
    experiment = workload.experiment_of("both-tiny", changes)
    product = 2 * rows * codes * width
    # Of each modality: scores of all 2 K samples; then of the batch: targets of code, and prediction with its two
    # gradients; targets of ot, and the codes' mass; usage.
    expected = 2 * (2 * 2 * codes * codes * width + product * (1 + 3 + 1 + 1 + 1))
    assert workload.codebook_flops(experiment, rows) == expected
    out = tmp_path / "computed.json"
    words = ["both-tiny", "--batch", str(rows), "--compute-only", "--steps", "1", "--device", "cpu", "--out", str(out)]
    assert step.main([*words, *flags(changes)]) == 0
    result = json.loads(out.read_text())
    assert result["kind"] == "computed"
    elementwise = 2 * 6 * 3 * (2 * codes) * codes
    assert result["operations_share"] == pytest.approx((expected + elementwise) / result["flops"])
    bound = result["estimates"]["full rate"]
    assert bound["codebook_share"] == pytest.approx(
        result["codebook"]["seconds"] * result["matmul_flops_per_second"] / result["flops"]
    )


def test_the_queue_is_full_and_captions_are_as_long_as_captions():
    experiment = workload.experiment_of("both-dual-tiny", [])
    work = workload.make_workload(experiment, 64, CPU)
    assert bool(work.state.queue.valid.all())
    assert torch.allclose(work.state.queue.image.norm(dim=1), torch.ones(4096))
    lengths = work.batch.mask.sum(1)
    assert int(lengths.max()) == experiment.encoder.text.max_tokens
    assert 11 < lengths.double().mean() < 15
    assert workload.assigned(experiment.objective.codebook, 64, 4096) == 512
    empty = workload.make_workload(experiment, 4, CPU, full_queue=False)
    assert not bool(empty.state.queue.valid.any())


def test_terms_are_set_against_clip_one_at_a_time():
    experiment = workload.experiment_of("both-tiny", [])
    terms = workload.terms_of(experiment)
    assert terms == ["cma", "imc", "lmi", "code", "ot", "itm", "mlm"]
    assert coefficients(workload.clip_with(experiment).objective, ScheduleState(0.0)) == {"i2t": 0.5, "t2i": 0.5}
    for term in terms:
        goal = workload.clip_with(experiment, term).objective
        parts = set(coefficients(goal, ScheduleState(goal.alpha)))
        assert parts == {"i2t", "t2i"} | set(stopwatch.TERMS[term])
        assert goal.cma.kind == ("infonce" if term == "cma" else "clip")
    assert workload.terms_of(workload.experiment_of("tcl-tiny", [])) == ["cma", "imc", "lmi", "itm", "mlm"]


def test_wrong_words_are_refused():
    with pytest.raises(UsageError, match="both-tinny"):
        workload.experiment_of("both-tinny", [])
    with pytest.raises(UsageError, match=r"did you mean --objective\.codebook\.size"):
        workload.experiment_of("both-tiny", ["objective.codebook.sise=8"])
    for words in (["--bf16", "--device", "cpu"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            step.parse(["both-tiny", *words])


def test_peak_bytes_are_those_alive_at_once():
    def alone() -> None:
        for _ in range(3):
            torch.empty(2**18)

    def together() -> None:
        kept = [torch.empty(2**18) for _ in range(3)]
        kept.clear()

    assert local_memory.peak_bytes(alone) == 2**20
    assert local_memory.peak_bytes(together) == 3 * 2**20


def test_local_memory_is_linear_in_blocks_and_quadratic_without():
    unlimited = [local_memory.peak_bytes(local_memory.local_terms(rows, 2**62)) for rows in (64, 128)]
    blocks = [local_memory.peak_bytes(local_memory.local_terms(rows, 2**17)) for rows in (64, 128)]
    assert 3.8 < unlimited[1] / unlimited[0] < 4.2
    assert blocks[1] <= 2 * blocks[0]
    assert blocks[1] < unlimited[1] / 8
