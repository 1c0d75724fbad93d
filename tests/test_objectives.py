"""Which terms an objective has, what they cost, and that they are what their definitions say."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from models import draws, terms
from models.batch import Batch, identify
from models.config import InputError, ObjectiveConfig, WeightsConfig
from models.gather import SoloWorkers
from models.objectives import build_model, coefficients, needs_queue, needs_teacher, term_means
from models.teacher import FeatureQueue
from pipelines import step as step_module
from pipelines.config import OBJECTIVES, PRESETS
from pipelines.step import build_context, encode, training_step
from tests import tiny

THIRD = 1 / 3
WEIGHTS = {  # cma, imc, lmi, itm, mlm: spec/codebook.md 2.3
    "clip": (1, 0, 0, 0, 0),
    "albef": (1, 0, 0, 1, 1),
    "tcl": (THIRD, THIRD, THIRD, 1, 1),
    "albef-dual": (1, 0, 0, 0, 0),
    "tcl-dual": (THIRD, THIRD, THIRD, 0, 0),
}


def one_step(goal: ObjectiveConfig, rows: Batch, alpha: float | None = None, state=None):
    state = state or tiny.state(goal)
    result = training_step(state, rows, tiny.settings(goal), goal.alpha if alpha is None else alpha)
    return result, state


def assert_finite(result, state) -> None:
    for value in (result.loss, result.gradient_norm, *result.parts.values(), *result.terms.values()):
        assert math.isfinite(value.item())
    assert all(bool(p.grad.isfinite().all()) for p in state.model.parameters() if p.requires_grad)
    assert all(bool(p.isfinite().all()) for p in state.model.parameters())


def context_of(goal: ObjectiveConfig, rows: Batch, state):
    student = encode(state.model, rows.view1, rows)
    return build_context(state, student, rows, tiny.settings(goal), goal.alpha, SoloWorkers(), None)[0]


# ---- presets ----


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_presets_have_the_published_weights(name, size):
    goal = PRESETS[f"{name}-{size}"].objective
    w = goal.weights
    assert (w.cma, w.imc, w.lmi, w.itm, w.mlm) == pytest.approx(WEIGHTS[name])
    assert goal.cma.kind == ("clip" if name == "clip" else "infonce")
    assert goal.alpha == (0.0 if name == "clip" else 0.4) and goal.duplicates == "mask" and goal.negatives == "global"
    assert "clip-dual-tiny" not in PRESETS


def test_parts_are_weighted_so_that_tcl_is_the_mean_of_six_directions():
    weights = coefficients(OBJECTIVES["tcl"], 0.4)
    six = ("i2t", "t2i", "i2i", "t2t", "lmi_image", "lmi_text")
    assert all(weights[name] == pytest.approx(1 / 6) for name in six)
    assert (weights["itm"], weights["mlm_hard"], weights["mlm_distill"]) == pytest.approx((1, 0.6, 0.4))
    assert "mlm_distill" not in coefficients(OBJECTIVES["tcl"], 0.0)
    assert "mlm_hard" not in coefficients(OBJECTIVES["tcl"], 1.0)


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
        ("tcl-dual", ("uniform", "mask_tokens", "sigmoid_parts", "fusion")),
        ("albef", ("local_parts", "sigmoid_parts", "pool_patches")),
    ],
)
def test_what_no_term_needs_is_not_called(preset, unused, monkeypatch):
    places = {"uniform": draws, "pool_patches": step_module, "update_teacher": step_module}
    for name in unused:
        if name == "fusion":
            monkeypatch.setattr("models.fusion.FusionEncoder.__init__", forbidden)
        else:
            monkeypatch.setattr(places.get(name, terms), name, forbidden)
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
SUBSETS = [chosen for count in range(1, 6) for chosen in itertools.combinations(TERMS, count)]


@pytest.mark.parametrize("number", range(len(SUBSETS)))
def test_any_subset_of_terms_trains(number):
    chosen, kind = SUBSETS[number], ("infonce", "clip", "sigmoid")[number % 3]
    goal = tiny.objective("tcl", cma__kind=kind)
    goal = goal.model_copy(update={"weights": WeightsConfig(**dict.fromkeys(chosen, 0.7))})
    result, state = one_step(goal, tiny.batch(4))
    assert set(result.terms) == set(chosen)
    assert_finite(result, state)
    moved = [n for n, p in state.model.named_parameters() if p.requires_grad and bool(p.grad.any())]
    assert any(name.startswith("vision") for name in moved) and any(name.startswith("text") for name in moved)


@pytest.mark.parametrize("duplicates", ["mask", "positive", "ignore"])
@pytest.mark.parametrize("preset", ["clip", "sigmoid", "tcl"])
def test_every_way_with_duplicates_trains_for_two_steps(preset, duplicates):
    goal = tiny.objective(preset, duplicates=duplicates)
    state = tiny.state(goal)
    for seed in (0, 0, 1):  # the second step meets its own rows in the queue
        result, _ = one_step(goal, tiny.batch(5, seed), state=state)
        assert_finite(result, state)


# ---- who is who ----


def queue_of(image_id: list[int], caption_id: list[int], filled: int) -> FeatureQueue:
    queue = FeatureQueue(len(image_id), 8).double()
    generator = torch.Generator().manual_seed(5)
    for vectors in (queue.image, queue.text):
        vectors.copy_(F.normalize(torch.randn(len(image_id), 8, generator=generator, dtype=torch.float64), dim=1))
    queue.image_id.copy_(torch.tensor(image_id))
    queue.caption_id.copy_(torch.tensor(caption_id))
    queue.filled.fill_(filled)
    return queue


IDS = torch.tensor([[1, 2, 1, 3], [11, 12, 13, 12]])  # rows 0 and 2 share an image, 1 and 3 a caption
QUEUE = ([2, 9, 3, 1], [19, 11, 18, 19], 3)  # image of row 1; caption of row 0; image of row 3; not filled


@pytest.mark.parametrize("duplicates", ["mask", "positive", "ignore"])
def test_identity_follows_its_definition(duplicates):
    identity = identify(IDS[:, 1:3], IDS, 1, queue_of(*QUEUE), duplicates)
    images, captions = [1, 2, 1, 3, *QUEUE[0]], [11, 12, 13, 12, *QUEUE[1]]
    for b, row in enumerate((1, 2)):
        for c in range(8):
            own, filled = c == row, c != 7
            same_image, same_caption = (images[c] == images[row]) and filled, (captions[c] == captions[row]) and filled
            positive = own or (duplicates == "positive" and same_image)
            left_out = not filled or (duplicates == "mask" and not own and (same_image or same_caption))
            assert (bool(identity.positive[b, c]), bool(identity.left_out[b, c])) == (positive, left_out), (b, c)
            if c < 4:
                same = own or (duplicates != "ignore" and same_image) or (duplicates == "mask" and same_caption)
                negative = not own and not (duplicates == "mask" and (same_image or same_caption))
                assert (bool(identity.same[b, c]), bool(identity.local_negative[b, c])) == (same, negative)


def state_with_queue(goal: ObjectiveConfig):
    state = tiny.state(goal)
    state.queue.load_state_dict(queue_of(*QUEUE).state_dict() | {"pointer": torch.tensor(3)})
    rows = dataclasses.replace(tiny.batch(4), image_id=IDS[0], caption_id=IDS[1])
    return state, rows


def test_a_duplicates_key_gets_no_probability_and_no_gradient():
    goal = tiny.objective("clip", cma__kind="infonce", weights__imc=1.0, queue__size=4, alpha=0.4)
    state, rows = state_with_queue(goal)
    context = context_of(goal, rows, state)
    left_out = context.identity.left_out
    assert left_out.sum(1).tolist() == [3, 3, 2, 3]
    batch = [key.detach().clone().requires_grad_() for key in context.keys]
    context.queue.image = context.queue.image.clone().requires_grad_()
    context.queue.text = context.queue.text.clone().requires_grad_()
    context = dataclasses.replace(context, keys=tuple(batch))
    for row in range(4):
        parts, _ = terms.contrast_parts(goal, state.model, one_row(context, row))
        loss = sum(part.sum for part in parts.values())
        for keys, entries in zip(batch, (context.queue.image, context.queue.text), strict=True):
            of_batch, of_queue = torch.autograd.grad(loss, (keys, entries), retain_graph=True)
            touched = torch.cat([of_batch, of_queue]).abs().sum(1) > 0
            assert torch.equal(touched, ~left_out[row])


def one_row(context, row: int):
    """The same candidates for one of the rows; without soft targets, through which keys would get no gradient."""
    fields = [tensor[row : row + 1] for tensor in context.student]
    identity = type(context.identity)(*(table[row : row + 1] for table in context.identity))
    return dataclasses.replace(
        context, student=type(context.student)(*fields), identity=identity, offset=row, alpha=0.0
    )


@pytest.mark.parametrize("duplicates", ["mask", "positive", "ignore"])
def test_contrast_with_teacher_queue_and_duplicates_equals_loops(duplicates):
    goal = tiny.objective("tcl-dual", queue__size=4, duplicates=duplicates)
    state, rows = state_with_queue(goal)
    context = context_of(goal, rows, state)
    parts, _ = terms.contrast_parts(goal, state.model, context)
    tau, identity, teacher, student = state.model.temperature.item(), context.identity, context.teacher, context.student
    image_keys, text_keys = torch.cat([teacher.image, state.queue.image]), torch.cat([teacher.text, state.queue.text])
    directions = {
        "i2t": (student.image, teacher.image, text_keys),
        "t2i": (student.text, teacher.text, image_keys),
        "i2i": (student.image, None, image_keys),
        "t2t": (student.text, None, text_keys),
    }
    for name, (query, teacher_query, keys) in directions.items():
        total = 0.0
        for b in range(4):
            kept = [c for c in range(8) if not identity.left_out[b, c]]
            logits = [float((query[b] @ keys[c]).detach()) / tau for c in kept]
            log_total = math.log(sum(map(math.exp, logits)))
            hard = [float(identity.positive[b, c]) / int(identity.positive[b].sum()) for c in kept]
            if teacher_query is not None:
                soft = [math.exp(float(teacher_query[b] @ keys[c]) / tau) for c in kept]
                hard = [0.4 * s / sum(soft) + 0.6 * h for s, h in zip(soft, hard, strict=True)]
            total -= sum(h * (value - log_total) for h, value in zip(hard, logits, strict=True))
        assert parts[name].sum.item() == pytest.approx(total, rel=1e-9) and parts[name].count == 4
    for name, query, (local, valid) in (
        ("lmi_image", student.image, (context.locals.image, torch.ones(4, 4).bool())),
        ("lmi_text", student.text, (context.locals.text, rows.mask[:, 1:])),
    ):
        total = 0.0
        for b in range(4):
            score = [[math.exp(float((query[b] @ part).detach()) / tau) for part in sample] for sample in local]
            others = sum(
                score[j][k]
                for j in range(4)
                for k in range(local.shape[1])
                if identity.local_negative[b, j] and valid[j, k]
            )
            own = [score[b][k] for k in range(local.shape[1]) if valid[b, k]]
            total += sum(-math.log(s / (s + others)) for s in own) / len(own)
        assert parts[name].sum.item() == pytest.approx(total, rel=1e-9)


def test_an_unfilled_queue_is_as_no_queue():
    rows = tiny.batch(4)
    with_queue, _ = one_step(tiny.objective("tcl"), rows)
    without, _ = one_step(tiny.objective("tcl", queue__size=0), rows)
    for name, value in without.parts.items():
        assert with_queue.parts[name].item() == pytest.approx(value.item(), rel=1e-12), name


@pytest.mark.parametrize("kind", ["clip", "sigmoid"])
def test_batch_only_contrast_equals_loops(kind):
    goal = tiny.objective("clip", cma__kind=kind)
    state, rows = tiny.state(goal), tiny.batch(5)
    context = context_of(goal, rows, state)
    parts, _ = terms.contrast_parts(goal, state.model, context)
    image, text = context.student.image.detach(), context.student.text.detach()
    left_out = context.identity.left_out
    assert left_out.any()
    for name, query, keys in (("i2t", image, text), ("t2i", text, image)):
        total = 0.0
        for b in range(5):
            kept = [c for c in range(5) if not left_out[b, c]]
            cosines = {c: float(query[b] @ keys[c]) for c in kept}
            if kind == "clip":
                total += math.log(
                    sum(math.exp((cosines[c] - cosines[b]) / state.model.temperature.item()) for c in kept)
                )
            else:
                signs = {c: 1 if c == b else -1 for c in kept}
                total += sum(math.log1p(math.exp(-signs[c] * (10 * cosines[c] - 10))) for c in kept)
        assert parts[name].sum.item() == pytest.approx(total, rel=1e-6) and parts[name].count == 5


# ---- matching and language ----


def test_matching_equals_its_definition():
    goal = tiny.objective("albef")
    state, rows = tiny.state(goal), tiny.batch(5)
    context = context_of(goal, rows, state)
    _, match_logits = terms.contrast_parts(goal, state.model, context)
    (image, text), exists = terms.hard_negatives(context, match_logits)
    assert bool(exists.all())
    student, fusion = context.student, state.model.fusion
    memory = fusion.image_memory(student.image_tokens)
    part = terms.matching_part(fusion, context, memory, match_logits)
    total = 0.0
    for b in range(5):
        for t, i, label in ((b, b, 1), (b, int(image[b]), 0), (int(text[b]), b, 0)):
            assert label or not context.identity.same[t, i]
            logits = fusion.match_logits(
                student.text_tokens[t : t + 1], rows.mask[t : t + 1], student.image_tokens[i : i + 1]
            )
            total -= F.log_softmax(logits, 1)[0, label].item()
    assert part.sum.item() == pytest.approx(total) and int(part.count) == 15


def test_a_pair_without_any_wrong_partner_counts_its_match_alone():
    goal = tiny.objective("albef", weights__mlm=0.0)
    rows = tiny.batch(3)
    rows = dataclasses.replace(rows, image_id=torch.zeros(3).long())  # one image thrice
    state = tiny.state(goal)
    context = context_of(goal, rows, state)
    _, match_logits = terms.contrast_parts(goal, state.model, context)
    memory = state.model.fusion.image_memory(context.student.image_tokens)
    part = terms.matching_part(state.model.fusion, context, memory, match_logits)
    logits = state.model.fusion.match_logits(context.student.text_tokens, rows.mask, context.student.image_tokens)
    assert int(part.count) == 3
    assert part.sum.item() == pytest.approx(-F.log_softmax(logits, 1)[:, 1].sum().item())


def test_hard_negatives_belong_to_the_sample():
    goal = tiny.objective("albef")
    state, rows = tiny.state(goal), tiny.batch(6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    turned = Batch(*(getattr(rows, field.name)[order] for field in dataclasses.fields(rows)))
    drawn = []
    for batch in (rows, turned):
        context = context_of(goal, batch, state)
        _, match_logits = terms.contrast_parts(goal, state.model, context)
        drawn.append(terms.hard_negatives(context, match_logits)[0])
    again = context_of(goal, rows, state)
    repeated, _ = terms.hard_negatives(again, terms.contrast_parts(goal, state.model, again)[1])
    assert torch.equal(drawn[0], repeated)
    other_keys = dataclasses.replace(rows, key=rows.key + 1)
    changed = context_of(goal, other_keys, state)
    other, _ = terms.hard_negatives(changed, terms.contrast_parts(goal, state.model, changed)[1])
    assert not torch.equal(other, drawn[0])
    for row in (0, 1):  # the draw is an interval of the cumulative weights, which depends on the order of candidates
        assert not any(int(drawn[1][row][place]) == place for place in range(6))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_language_modelling_equals_its_definition(alpha):
    goal = tiny.objective("clip", weights__mlm=1.0, alpha=alpha)
    state, rows = tiny.state(goal), tiny.batch(5)
    masked = terms.mask_tokens(rows.ids, rows.mask, rows.key, tiny.TOKENS, goal.mlm_probability)
    assert int(masked.selected.sum()) > 3
    hard = soft = 0.0
    with torch.no_grad():
        for b in range(5):
            views = ((state.model, rows.view1), (state.teacher or state.model, rows.view2))
            logs = []
            for model, view in views:
                states = model.encode_text(masked.ids[b : b + 1], rows.mask[b : b + 1])
                memory = model.fusion.image_memory(model.encode_image(view[b : b + 1]))
                hidden = model.fusion(states, rows.mask[b : b + 1], memory)[0]
                logs.append(F.log_softmax(model.fusion.language(hidden, model.text.word_embeddings), 1))
            for t in range(rows.ids.shape[1]):
                if masked.selected[b, t]:
                    hard -= float(logs[0][t, rows.ids[b, t]])
                    soft -= float((logs[1][t].exp() * logs[0][t]).sum())
    result, _ = one_step(goal, rows, alpha)
    count = int(masked.selected.sum())
    expected = ({"mlm_hard": hard / count} if alpha < 1 else {}) | ({"mlm_distill": soft / count} if alpha > 0 else {})
    assert {n: v.item() for n, v in result.parts.items() if n.startswith("mlm")} == pytest.approx(expected)


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
    """Looked up, [PAD] gets no gradient (TCL spec 1.1); as an output of the language head it does."""
    for preset, moves in (("tcl-dual", False), ("tcl", True)):
        _, state = one_step(tiny.objective(preset), changed_captions(tiny.batch(3), [2, 4, 6]))
        assert bool(state.model.text.word_embeddings.grad[tiny.TOKENS.pad].any()) == moves
