"""Terms against their definitions as loops: who is whose duplicate, contrast, matching, language."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from models import fusion_losses, losses
from models.batch import Batch, identify
from models.collectives import SoloWorkers
from models.config import ObjectiveConfig
from models.masking import mask_tokens
from models.objectives import ScheduleState
from models.teacher import FeatureQueue
from pipelines.step.context import build_context
from pipelines.step.grad_cache import encode
from pipelines.step.training_step import training_step
from tests.support import tiny


def one_step(goal: ObjectiveConfig, rows: Batch, alpha: float | None = None, state=None):
    state = state or tiny.state(goal)
    result = training_step(state, rows, tiny.settings(goal), ScheduleState(goal.alpha if alpha is None else alpha))
    return result, state


def context_of(goal: ObjectiveConfig, rows: Batch, state):
    student = encode(state.model, rows.view1, rows)
    return build_context(state, student, rows, tiny.settings(goal), ScheduleState(goal.alpha), SoloWorkers())[0]


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
        parts, _ = losses.contrast_parts(goal, state.model, one_row(context, row))
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
        context, student=type(context.student)(*fields), identity=identity, offset=row, schedule=ScheduleState(0.0)
    )


@pytest.mark.parametrize("duplicates", ["mask", "positive", "ignore"])
def test_contrast_with_teacher_queue_and_duplicates_equals_loops(duplicates):
    goal = tiny.objective("tcl-dual", queue__size=4, duplicates=duplicates)
    state, rows = state_with_queue(goal)
    context = context_of(goal, rows, state)
    parts, _ = losses.contrast_parts(goal, state.model, context)
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
        ("lmi_image", student.image, (context.local_parts.image, torch.ones(4, 4).bool())),
        ("lmi_text", student.text, (context.local_parts.text, rows.mask[:, 1:])),
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
    parts, _ = losses.contrast_parts(goal, state.model, context)
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
    _, match_logits = losses.contrast_parts(goal, state.model, context)
    targets = fusion_losses.draw_targets(goal, context, match_logits, tiny.TOKENS)
    image, text = targets.negatives.image, targets.negatives.text
    assert bool(targets.negatives.has_image.all()) and bool(targets.negatives.has_text.all())
    student, fusion = context.student, state.model.fusion
    memory = fusion.image_memory(student.image_tokens)
    sums = [
        fusion_losses.matching_sum(
            fusion, context, [m.rows(torch.arange(5)[rows]) for m in memory], targets.negatives, rows
        )
        for rows in (slice(0, 2), slice(2, 5))
    ]
    whole = fusion_losses.matching_sum(fusion, context, memory, targets.negatives, slice(0, 5))
    total = 0.0
    for b in range(5):
        for t, i, label in ((b, b, 1), (b, int(image[b]), 0), (int(text[b]), b, 0)):
            assert label or not context.identity.same[t, i]
            logits = fusion.match_logits(
                student.text_tokens[t : t + 1], rows.mask[t : t + 1], student.image_tokens[i : i + 1]
            )
            total -= F.log_softmax(logits, 1)[0, label].item()
    assert whole.item() == pytest.approx(total) and sum(sums).item() == pytest.approx(total)
    assert int(fusion_losses.fusion_counts(targets, goal.alpha)["itm"]) == 15


def test_a_pair_without_any_wrong_partner_counts_its_match_alone():
    goal = tiny.objective("albef", weights__mlm=0.0)
    rows = tiny.batch(3)
    rows = dataclasses.replace(rows, image_id=torch.zeros(3).long())  # one image thrice
    state = tiny.state(goal)
    context = context_of(goal, rows, state)
    _, match_logits = losses.contrast_parts(goal, state.model, context)
    memory = state.model.fusion.image_memory(context.student.image_tokens)
    targets = fusion_losses.draw_targets(goal, context, match_logits, tiny.TOKENS)
    total = fusion_losses.matching_sum(state.model.fusion, context, memory, targets.negatives, slice(0, 3))
    logits = state.model.fusion.match_logits(context.student.text_tokens, rows.mask, context.student.image_tokens)
    assert int(fusion_losses.fusion_counts(targets, goal.alpha)["itm"]) == 3
    assert total.item() == pytest.approx(-F.log_softmax(logits, 1)[:, 1].sum().item())


def wrong(context, match_logits):
    """(2, B): each row's wrong image and wrong caption."""
    return torch.stack(fusion_losses.hard_negatives(context, match_logits)[:2])


def test_hard_negatives_belong_to_the_sample():
    goal = tiny.objective("albef")
    state, rows = tiny.state(goal), tiny.batch(6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    fields = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    turned = Batch(**{name: value[order] for name, value in fields.items() if value is not None})
    drawn = []
    for batch in (rows, turned):
        context = context_of(goal, batch, state)
        _, match_logits = losses.contrast_parts(goal, state.model, context)
        drawn.append(wrong(context, match_logits))
    again = context_of(goal, rows, state)
    repeated = wrong(again, losses.contrast_parts(goal, state.model, again)[1])
    assert torch.equal(drawn[0], repeated)
    other_keys = dataclasses.replace(rows, key=rows.key + 1)
    changed = context_of(goal, other_keys, state)
    other = wrong(changed, losses.contrast_parts(goal, state.model, changed)[1])
    assert not torch.equal(other, drawn[0])
    for row in (0, 1):  # the draw is an interval of the cumulative weights, which depends on the order of candidates
        assert not any(int(drawn[1][row][place]) == place for place in range(6))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_language_modelling_equals_its_definition(alpha):
    goal = tiny.objective("clip", weights__mlm=1.0, alpha=alpha)
    state, rows = tiny.state(goal), tiny.batch(5)
    masked = mask_tokens(rows.ids, rows.mask, rows.key, tiny.TOKENS, goal.mlm_probability)
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
