"""Moving average and queue: what a step leaves behind."""

import pytest
import torch

from models.objectives import build_model
from models.teacher import FeatureQueue, make_teacher, update_teacher
from tests.support import tiny


def entries(first: int, count: int) -> tuple[torch.Tensor, ...]:
    """Entries first, first + 1, ...: image rows (n, n), text rows (-n, -n), ids n and 1000 + n."""
    numbers = torch.arange(first, first + count)
    image = numbers[:, None].float().expand(-1, 2)
    return image, -image, numbers, numbers + 1000


def contents(queue: FeatureQueue) -> list[int]:
    """Entry numbers by place, 0 where nothing was written; checks that all columns agree."""
    numbers = queue.image[:, 0].long()
    assert torch.equal(queue.image[:, 1], queue.image[:, 0]) and torch.equal(queue.text, -queue.image)
    written = queue.valid
    assert torch.equal(queue.image_id[written], numbers[written])
    assert torch.equal(queue.caption_id[written], numbers[written] + 1000)
    assert not numbers[~written].any()
    return numbers.tolist()


def test_moving_average_is_taken_of_every_parameter_the_teacher_has():
    model = build_model(tiny.encoder(), tiny.objective("tcl"))
    teacher = make_teacher(model, language=True)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    update_teacher(teacher, model, 0.9)
    online = dict(model.named_parameters())
    for name, parameter in teacher.named_parameters():
        assert torch.allclose(parameter, 0.9 * before[name] + 0.1 * online[name], atol=1e-7), name


@pytest.mark.parametrize(("momentum", "follows"), [(1.0, False), (0.0, True)])
def test_the_ends_of_the_moving_average(momentum, follows):
    model = build_model(tiny.encoder(), tiny.objective("tcl-dual"))
    teacher = make_teacher(model, language=False)
    before = teacher.image_projection.weight.clone()
    model.image_projection.weight.data.add_(1.0)
    update_teacher(teacher, model, momentum)
    assert torch.equal(teacher.image_projection.weight, before + 1.0 if follows else before)


@pytest.mark.parametrize("preset", ["tcl", "albef", "sigmoid"])
def test_a_teacher_starts_equal_learns_nothing_and_has_no_matching_head_nor_scale(preset):
    model = build_model(tiny.encoder(), tiny.objective(preset, weights__imc=1.0))
    teacher = make_teacher(model, language=preset != "sigmoid")
    names = {name for name, _ in teacher.named_parameters()}
    absent = {"temperature", "log_scale", "bias", "fusion.matching.weight", "fusion.matching.bias"}
    assert names == {name for name, _ in model.named_parameters()} - absent
    online = dict(model.named_parameters())
    assert all(torch.equal(p, online[name]) and not p.requires_grad for name, p in teacher.named_parameters())
    assert model.temperature is not None and teacher.image_projection.weight is not model.image_projection.weight


def test_a_teacher_without_language_has_no_fusion_encoder():
    model = build_model(tiny.encoder(), tiny.objective("tcl"))
    assert make_teacher(model, language=False).fusion is None and model.fusion is not None


def test_entries_are_written_at_the_pointer_round_the_end():
    queue = FeatureQueue(5, 2)
    steps = [(1, 2, [1, 2, 0, 0, 0], 2), (3, 2, [1, 2, 3, 4, 0], 4), (5, 2, [6, 2, 3, 4, 5], 1)]
    for first, count, expected, pointer in steps:
        queue.enqueue(*entries(first, count))
        assert contents(queue) == expected and int(queue.pointer) == pointer
        assert int(queue.filled) == min(first + count - 1, 5)


def test_of_a_batch_larger_than_the_queue_the_last_entries_stay():
    queue = FeatureQueue(5, 2)
    queue.enqueue(*entries(1, 3))
    queue.enqueue(*entries(4, 12))
    everything = list(range(1, 16))
    expected = [0] * 5
    for place, number in enumerate(everything):  # one after the other
        expected[place % 5] = number
    assert contents(queue) == expected and int(queue.pointer) == 15 % 5 and int(queue.filled) == 5


def test_any_batches_leave_what_one_at_a_time_leaves():
    whole, single = FeatureQueue(7, 2), FeatureQueue(7, 2)
    first = 1
    for count in (3, 0, 7, 1, 16, 5, 8):
        whole.enqueue(*entries(first, count))
        for number in range(first, first + count):
            single.enqueue(*entries(number, 1))
        first += count
        assert contents(whole) == contents(single)
        assert int(whole.pointer) == int(single.pointer) and int(whole.filled) == int(single.filled)


def test_a_queue_of_no_entries_takes_none():
    queue = FeatureQueue(0, 2)
    queue.enqueue(*entries(1, 3))
    assert len(queue.image) == 0 and int(queue.filled) == 0 and not len(queue.valid)


def test_a_queue_is_read_back_from_its_state():
    queue, again = FeatureQueue(5, 2), FeatureQueue(5, 2)
    queue.enqueue(*entries(1, 7))
    again.load_state_dict(queue.state_dict())
    for target in (queue, again):
        target.enqueue(*entries(8, 2))
    assert contents(again) == contents(queue)
