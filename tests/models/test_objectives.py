"""Which terms an objective has, what they cost, and that they are what their definitions say."""

import dataclasses
import itertools
import math

import pytest
import torch

from models import fusion_losses, losses, sample_rng
from models.batch import Batch
from models.config import InputError, ObjectiveConfig, WeightsConfig
from models.objectives import ScheduleState, build_model, coefficients, needs_queue, needs_teacher, term_means
from pipelines.config import OBJECTIVES, PRESETS
from pipelines.step import codebook as codes_module
from pipelines.step import context as context_module
from pipelines.step import training_step as step_module
from pipelines.step.training_step import training_step
from tests.support import tiny

THIRD = 1 / 3
WEIGHTS = {  # cma, imc, lmi, code, ot, itm, mlm: docs/spec/codebook.md 2.3
    "clip": (1, 0, 0, 0, 0, 0, 0),
    "albef": (1, 0, 0, 0, 0, 1, 1),
    "tcl": (THIRD, THIRD, THIRD, 0, 0, 1, 1),
    "codis": (2, 2, 0, 2, 2, 1, 1),
    "both": (THIRD, THIRD, THIRD, THIRD, THIRD, 1, 1),
    "albef-dual": (1, 0, 0, 0, 0, 0, 0),
    "tcl-dual": (THIRD, THIRD, THIRD, 0, 0, 0, 0),
    "codis-dual": (2, 2, 0, 2, 2, 0, 0),
    "both-dual": (THIRD, THIRD, THIRD, THIRD, THIRD, 0, 0),
}


def one_step(goal: ObjectiveConfig, rows: Batch, alpha: float | None = None, state=None):
    state = state or tiny.state(goal)
    result = training_step(state, rows, tiny.settings(goal), ScheduleState(goal.alpha if alpha is None else alpha))
    return result, state


def assert_finite(result, state) -> None:
    for value in (result.loss, result.gradient_norm, *result.parts.values(), *result.terms.values()):
        assert math.isfinite(value.item())
    assert all(bool(p.grad.isfinite().all()) for p in state.model.parameters() if p.requires_grad)
    assert all(bool(p.isfinite().all()) for p in state.model.parameters())


# ---- presets ----


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_presets_have_the_published_weights(name, size):
    goal = PRESETS[f"{name}-{size}"].objective
    w = goal.weights
    assert (w.cma, w.imc, w.lmi, w.code, w.ot, w.itm, w.mlm) == pytest.approx(WEIGHTS[name])
    assert goal.cma.kind == ("clip" if name == "clip" else "infonce")
    assert goal.alpha == (0.0 if name == "clip" else 0.4) and goal.duplicates == "mask" and goal.negatives == "global"
    assert "clip-dual-tiny" not in PRESETS


def test_parts_are_weighted_so_that_tcl_is_the_mean_of_six_directions():
    weights = coefficients(OBJECTIVES["tcl"], ScheduleState(0.4))
    six = ("i2t", "t2i", "i2i", "t2t", "lmi_image", "lmi_text")
    assert all(weights[name] == pytest.approx(1 / 6) for name in six)
    assert (weights["itm"], weights["mlm_hard"], weights["mlm_distill"]) == pytest.approx((1, 0.6, 0.4))
    assert "mlm_distill" not in coefficients(OBJECTIVES["tcl"], ScheduleState(0.0))
    assert "mlm_hard" not in coefficients(OBJECTIVES["tcl"], ScheduleState(1.0))


def test_terms_are_means_of_their_directions_and_add_up_to_the_loss():
    goal = tiny.objective("tcl")
    result, _ = one_step(goal, tiny.batch(5))
    p, t = result.parts, result.terms
    assert t["cma"] == (p["i2t"] + p["t2i"]) / 2 and t["imc"] == (p["i2i"] + p["t2t"]) / 2
    assert t["lmi"] == (p["lmi_image"] + p["lmi_text"]) / 2 and t["itm"] == p["itm"]
    assert t["mlm"].item() == pytest.approx(0.6 * p["mlm_hard"].item() + 0.4 * p["mlm_distill"].item())
    total = (t["cma"] + t["imc"] + t["lmi"]) / 3 + t["itm"] + t["mlm"]
    assert result.loss.item() == pytest.approx(total.item())
    assert term_means({"mlm_hard": p["mlm_hard"]}, 0.0) == {"mlm": p["mlm_hard"]}


def test_an_objective_of_no_term_is_refused():
    with pytest.raises(InputError, match=r"objective\.weights: every weight is 0"):
        build_model(tiny.encoder(), ObjectiveConfig())


# ---- weight 0 costs nothing ----


def forbidden(*arguments, **keywords):
    raise AssertionError("this must not be called")


COSTS = {  # passes over the image tower, the text tower, the teacher's two, and the fusion encoder
    "clip": (1, 1, 0, 0, 0),
    "sigmoid": (1, 1, 0, 0, 0),
    "tcl-dual": (1, 1, 1, 1, 0),
    "albef": (1, 2, 1, 2, 2),
    "tcl": (1, 2, 1, 2, 2),
}


@pytest.mark.parametrize("preset", COSTS)
def test_a_step_makes_just_the_passes_its_terms_need(preset):
    goal = tiny.objective(preset)
    state = tiny.state(goal)
    passes = dict.fromkeys(("image", "text", "teacher image", "teacher text", "fusion"), 0)
    modules = {"image": state.model.vision, "text": state.model.text, "fusion": state.model.fusion}
    if state.teacher is not None:
        modules |= {"teacher image": state.teacher.vision, "teacher text": state.teacher.text}
    for name, module in modules.items():
        if module is not None:
            module.register_forward_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))
    one_step(goal, tiny.batch(4), state=state)
    assert tuple(passes.values()) == COSTS[preset]


@pytest.mark.parametrize(
    ("preset", "unused"),
    [
        (
            "clip",
            ("uniform", "mask_tokens", "local_parts", "sigmoid_parts", "pool_patches", "update_teacher", "fusion"),
        ),
        (
            "sigmoid",
            ("uniform", "mask_tokens", "local_parts", "cross_parts", "scores", "pool_patches", "update_teacher"),
        ),
        ("tcl-dual", ("uniform", "mask_tokens", "sigmoid_parts", "fusion", "solve", "code_sums", "koleo")),
        ("both", ("sigmoid_parts", "koleo")),
        ("albef", ("local_parts", "sigmoid_parts", "pool_patches")),
    ],
)
def test_what_no_term_needs_is_not_called(preset, unused, monkeypatch):
    places = {
        "uniform": sample_rng,
        "mask_tokens": fusion_losses,
        "pool_patches": context_module,
        "solve": codes_module,
        "update_teacher": step_module,
    }
    for name in unused:
        if name == "fusion":
            monkeypatch.setattr("models.fusion.FusionEncoder.__init__", forbidden)
        else:
            monkeypatch.setattr(places.get(name, losses), name, forbidden)
    one_step(tiny.objective(preset), tiny.batch(4))


def test_parameters_and_buffers_are_just_those_of_the_terms():
    def names(preset: str, **changes) -> set[str]:
        return {name for name, _ in build_model(tiny.encoder(), tiny.objective(preset, **changes)).named_parameters()}

    dual = names("clip")
    assert names("tcl-dual") == dual and not any(name.startswith("fusion") for name in dual)
    assert names("sigmoid") - dual == {"log_scale", "bias"}
    full = names("tcl")
    assert {n for n in full - names("tcl", weights__mlm=0.0)} == {n for n in full if n.startswith("fusion.language")}
    assert {n for n in full - names("tcl", weights__itm=0.0)} == {"fusion.matching.weight", "fusion.matching.bias"}
    for preset, teacher, queue in (("clip", 0, 0), ("sigmoid", 0, 0), ("tcl", 1, 1), ("albef-dual", 1, 1)):
        state = tiny.state(tiny.objective(preset))
        assert (state.teacher is not None, state.queue is not None) == (bool(teacher), bool(queue))
        if state.teacher is not None:
            assert (state.teacher.fusion is not None) == (preset == "tcl")
    lmi = tiny.objective("tcl-dual", weights__cma=0.0, weights__imc=0.0)
    assert needs_teacher(lmi) and not needs_queue(lmi) and tiny.state(lmi).queue is None
    hard = tiny.objective("clip", weights__mlm=1.0)
    assert not needs_teacher(hard) and tiny.state(hard).teacher is None


def test_a_temperature_that_no_term_looks_at_is_no_trained_parameter():
    for preset, changes, trained in (
        ("sigmoid", {}, False),
        ("sigmoid", {"weights__imc": 1.0}, True),
        ("clip", {}, True),
        ("clip", {"temperature__learn": False}, False),
        ("albef", {"weights__cma": 0.0}, False),
    ):
        model = build_model(tiny.encoder(), tiny.objective(preset, **changes))
        assert model.temperature.requires_grad == trained
        assert model.temperature.item() == pytest.approx(0.07)


# ---- any subset runs ----


TERMS = list(WeightsConfig.model_fields)
SUBSETS = [chosen for count in range(1, len(TERMS) + 1) for chosen in itertools.combinations(TERMS, count)]


@pytest.mark.parametrize("number", range(len(SUBSETS)))
def test_any_subset_of_terms_trains(number):
    chosen, kind = SUBSETS[number], ("infonce", "clip", "sigmoid")[number % 3]
    goal = tiny.objective("tcl", cma__kind=kind)
    goal = goal.model_copy(update={"weights": WeightsConfig(**dict.fromkeys(chosen, 0.7))})
    result, state = one_step(goal, tiny.batch(4))
    assert set(result.terms) == set(chosen)
    assert_finite(result, state)
    moved = {n.split(".")[0] for n, p in state.model.named_parameters() if p.requires_grad and bool(p.grad.any())}
    assert ({"vision", "text"} <= moved) == bool(set(chosen) - {"ot", "koleo"})
    assert ("codebook" in moved) == bool({"code", "ot", "koleo"} & set(chosen))


@pytest.mark.parametrize("duplicates", ["mask", "positive", "ignore"])
@pytest.mark.parametrize("preset", ["clip", "sigmoid", "tcl"])
def test_every_way_with_duplicates_trains_for_two_steps(preset, duplicates):
    goal = tiny.objective(preset, duplicates=duplicates)
    state = tiny.state(goal)
    for seed in (0, 0, 1):  # the second step meets its own rows in the queue
        result, _ = one_step(goal, tiny.batch(5, seed), state=state)
        assert_finite(result, state)


# ---- the edges ----


def changed_captions(rows: Batch, lengths: list[int]) -> Batch:
    mask = torch.arange(rows.ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    return dataclasses.replace(rows, mask=mask, ids=rows.ids.masked_fill(~mask, tiny.TOKENS.pad))


@pytest.mark.parametrize("preset", ["clip", "sigmoid", "albef", "tcl", "tcl-dual"])
@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (tiny.batch(1), {}),  # a batch of one pair
        (changed_captions(tiny.batch(3), [1, 4, 6]), {}),  # a caption without words
        (changed_captions(tiny.batch(3), [1, 1, 1]), {}),  # no caption has a word
        (tiny.batch(2, tokens=1), {}),  # nor room for one
        (tiny.batch(3), {"mlm_probability": 1 - 1e-9}),  # every word hidden
        (tiny.batch(3), {"mlm_probability": 1e-9}),  # none hidden
    ],
    ids=["one pair", "an empty caption", "empty captions", "one token", "all words hidden", "no word hidden"],
)
def test_odd_batches_give_finite_losses_and_gradients(preset, rows, changes):
    goal = tiny.objective(preset, **changes)
    state = tiny.state(goal)
    for _ in range(2):
        result, _ = one_step(goal, rows, state=state)
        assert_finite(result, state)


def test_the_padding_row_of_the_word_table_learns_as_output_only():
    """Looked up, [PAD] gets no gradient (docs/spec/tcl.md 1.1); as an output of the language head it does."""
    for preset, moves in (("tcl-dual", False), ("tcl", True)):
        _, state = one_step(tiny.objective(preset), changed_captions(tiny.batch(3), [2, 4, 6]))
        assert bool(state.model.text.word_embeddings.grad[tiny.TOKENS.pad].any()) == moves
