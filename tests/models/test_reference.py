"""Published state dicts in and out: spellings, gaps, other sizes (docs/spec/tcl.md 9.2, 9.3)."""

import math

import pytest
import torch
from torch import Tensor

from models.objectives import build_model
from models.reference import load_reference, resize_positions, to_reference
from models.teacher import FeatureQueue, make_teacher
from tests.support import tiny

PRETRAINING = tiny.objective("tcl")


def published(seed: int = 0) -> dict[str, Tensor]:
    """A pre-training file under the reference's names, with random weights and a queue of 7."""
    torch.manual_seed(seed)
    model = build_model(tiny.encoder(), PRETRAINING)
    state: dict[str, Tensor] = {}
    for branch, suffix in ((model, ""), (make_teacher(model, language=True), "_m")):
        tensors = {name: torch.randn_like(p) for name, p in branch.named_parameters()}
        for name, tensor in to_reference(tensors, fusion_layer=1).items():
            top, dot, rest = name.partition(".")
            state[f"{top}{suffix}{dot}{rest}"] = tensor
        stack = f"text_encoder{suffix}"
        state[f"{stack}.bert.embeddings.position_ids"] = torch.arange(8)[None]
        state[f"{stack}.cls.predictions.decoder.bias"] = state[f"{stack}.cls.predictions.bias"]
        state[f"{stack}.cls.predictions.decoder.weight"] = state[f"{stack}.bert.embeddings.word_embeddings.weight"]
    queues = {"image_queue": torch.randn(8, 7), "text_queue": torch.randn(8, 7), "queue_ptr": torch.tensor([5])}
    return state | queues


def test_a_pretraining_file_fills_model_teacher_and_queue():
    state = published()
    model = build_model(tiny.encoder(), PRETRAINING)
    teacher, queue = make_teacher(model, language=True), FeatureQueue(7, 8)
    mismatch = load_reference(state, model, teacher, queue, 1)
    assert mismatch.missing == ["idx_queue"] and mismatch.unexpected == []
    online = to_reference(dict(model.named_parameters()), 1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in online.items())
    copies = to_reference(dict(teacher.named_parameters()), 1)
    assert torch.equal(copies["vision_proj.weight"], state["vision_proj_m.weight"])
    assert torch.equal(queue.image, state["image_queue"].T) and torch.equal(queue.text, state["text_queue"].T)
    assert int(queue.pointer) == 5 and bool(queue.valid.all()) and bool((queue.image_id == -100).all())


def test_both_spellings_of_a_text_encoder_load_alike():
    goal = tiny.objective("tcl", weights__mlm=0.0)
    state = {name: tensor for name, tensor in published().items() if ".cls." not in name}
    retrieval = {name.replace(".bert.", "."): tensor for name, tensor in state.items()}
    retrieval["idx_queue"] = torch.arange(7)[None]
    models = []
    for source in (state, retrieval):
        model, queue = build_model(tiny.encoder(), goal), FeatureQueue(7, 8)
        mismatch = load_reference(source, model, make_teacher(model, language=False), queue, 1)
        assert mismatch.unexpected == [] and mismatch.missing == ([] if source is retrieval else ["idx_queue"])
        models.append((model, queue))
    first, second = (model.state_dict() for model, _ in models)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert models[1][1].image_id.tolist() == list(range(7))


def test_what_file_and_model_lack_of_each_other_is_named():
    state = published()
    del state["vision_proj.weight"], state["visual_encoder_m.norm.bias"]
    model = build_model(tiny.encoder(), tiny.objective("tcl-dual"))
    mismatch = load_reference(state | {"codebook": torch.zeros(1)}, model, make_teacher(model, False), None, 1)
    assert set(mismatch.missing) == {"vision_proj.weight", "visual_encoder_m.norm.bias"}
    assert {"codebook", "itm_head.weight"} <= set(mismatch.unexpected)
    assert "text_encoder.bert.encoder.layer.1.attention.self.query.weight" in mismatch.unexpected
    assert "vision_proj_m.weight" not in mismatch.unexpected


def test_a_queue_of_another_length_stays_empty():
    model = build_model(tiny.encoder(), PRETRAINING)
    queue = FeatureQueue(9, 8)
    state = published() | {"idx_queue": torch.arange(7)[None]}
    assert load_reference(state, model, None, queue, 1).missing == []
    assert int(queue.filled) == 0 and not queue.image.any()


def test_a_tensor_of_another_shape_is_refused():
    state = published() | {"vision_proj.weight": torch.zeros(9, 16)}
    with pytest.raises(RuntimeError, match=r"image_projection\.weight"):
        load_reference(state, build_model(tiny.encoder(), PRETRAINING), None, None, 1)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, by which bicubic interpolation weighs neighbours."""
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


@pytest.mark.parametrize(("old", "new"), [(4, 6), (5, 3), (2, 7)])
def test_position_tables_are_resized_with_half_pixel_centres(old, new):
    table = torch.randn(1, 1 + old * old, 2, dtype=torch.float64)
    resized = resize_positions(table, 1 + new * new)
    assert resized.shape == (1, 1 + new * new, 2) and torch.equal(resized[:, 0], table[:, 0])
    for y in range(new):
        for x in range(new):
            expected = torch.zeros(2, dtype=torch.float64)
            at_y, at_x = ((place + 0.5) * old / new - 0.5 for place in (y, x))
            for i in range(math.floor(at_y) - 1, math.floor(at_y) + 3):
                for j in range(math.floor(at_x) - 1, math.floor(at_x) + 3):
                    row, column = (min(max(place, 0), old - 1) for place in (i, j))
                    expected += cubic(at_y - i) * cubic(at_x - j) * table[0, 1 + row * old + column]
            assert torch.allclose(resized[0, 1 + y * new + x], expected, atol=1e-9)


def test_a_table_that_fits_is_left_as_it_is():
    table = torch.randn(1, 17, 2)
    assert resize_positions(table, 17) is table
