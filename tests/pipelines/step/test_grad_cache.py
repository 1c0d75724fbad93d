"""A step in chunks, with recomputed activations or compiled, is the same step; and it never waits for the device."""

import dataclasses
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bert.modeling_bert import BertIntermediate
from transformers.models.vit.modeling_vit import ViTMLP

from models.config import ObjectiveConfig
from models.fusion import FusionLayer
from models.masking import select_tokens
from models.objectives import ScheduleState, build_model
from pipelines.config import ComputeConfig
from pipelines.step.grad_cache import chunk_rows
from pipelines.step.state import TrainState, make_state, parameter_groups
from pipelines.step.training_step import training_step
from pipelines.train.setup import compile_towers, recompute_activations
from tests.pipelines.step.test_training_step import assert_equal_gradients
from tests.support import step_cases, tiny

ROWS = [[7], [8]]


@pytest.mark.parametrize(("rows", "size", "lengths"), [(7, 2, [2, 2, 2, 1]), (4, 0, [4]), (3, 5, [3]), (0, 2, [0])])
def test_chunks_cover_the_rows_in_order(rows, size, lengths):
    slices = chunk_rows(rows, size)
    assert [part.stop - part.start for part in slices] == lengths
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))


@pytest.mark.parametrize("preset", ["both", "tcl", "codis", "both-dual", "clip", "sigmoid"])
def test_four_chunks_give_the_loss_and_gradients_of_one_batch(preset):
    goal = tiny.objective(preset)
    whole = step_cases.run(goal, ROWS, torch.float64)
    chunked = step_cases.run(goal, ROWS, torch.float64, chunk=2)
    assert chunked.losses == pytest.approx(whole.losses, rel=1e-10)
    assert_equal_gradients(chunked.gradients, whole.gradients)
    for name, tensor in whole.state.items():
        assert torch.allclose(chunked.state[name], tensor, rtol=1e-7, atol=1e-7), name


def test_four_chunks_agree_in_single_precision():
    goal = tiny.objective("both")
    whole, chunked = (step_cases.run(goal, ROWS, torch.float32, chunk=chunk) for chunk in (0, 2))
    assert chunked.losses == pytest.approx(whole.losses, rel=1e-5)
    for mine, expected in zip(chunked.gradients, whole.gradients, strict=True):
        flat = torch.cat([expected[name].flatten() for name in expected])
        error = torch.cat([mine[name].flatten() for name in expected]) - flat
        assert float(error.norm()) <= 1e-5 * float(flat.norm())


class ForwardPasses(torch.nn.Module):
    """Notes what a tower gives in each pass."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.tower, self.seen = tower, []
        self.width = tower.width

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        out = self.tower(*inputs)
        self.seen.append(out.detach().clone())
        return out


def test_dropout_is_replayed_in_the_second_pass_of_a_chunk():
    goal = tiny.objective("clip")
    state = tiny.state(goal)
    for module in state.model.text.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    tower = ForwardPasses(state.model.text)
    state.model.text = tower
    torch.manual_seed(4)
    training_step(state, tiny.batch(6), tiny.settings(goal, chunk=2), ScheduleState(0.0))
    after = torch.rand(3)
    assert len(tower.seen) == 6
    for first, second in zip(tower.seen[:3], tower.seen[3:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(tower.seen[0], tower.tower(*_text(tiny.batch(6), slice(0, 2))))  # dropout was on
    torch.manual_seed(4)
    for rows in chunk_rows(6, 2):
        tower.tower(*_text(tiny.batch(6), rows))
    assert torch.equal(torch.rand(3), after)  # the second pass drew nothing from the run's own generator


def _text(rows, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.ids[part], rows.mask[part]


def gradients(goal: ObjectiveConfig, state: TrainState) -> list[dict[str, torch.Tensor]]:
    result = training_step(state, tiny.batch(5), tiny.settings(goal), ScheduleState(0.4))
    named = {name: p.grad for name, p in state.model.named_parameters() if p.requires_grad}
    return [named | {"loss": result.loss}]


@pytest.mark.parametrize("tower", ["vision", "text", "fusion"])
def test_recomputed_activations_change_nothing_and_are_recomputed(tower):
    goal = tiny.objective("both")
    results, calls = [], []
    for asked in (False, True):
        state, seen = tiny.state(goal), []
        module = getattr(state.model, tower)
        layer = next(m for m in module.modules() if isinstance(m, (ViTMLP, BertIntermediate, FusionLayer)))
        layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        if asked:
            recompute_activations(state.model, ComputeConfig().override({f"recompute.{tower}": True}))
        results.append(gradients(goal, state))
        calls.append(len(seen))
    assert_equal_gradients(results[1], results[0])
    assert calls[1] > calls[0]


def test_compiled_towers_give_the_same_step_under_the_same_names():
    goal = tiny.objective("both")
    plain, state = gradients(goal, tiny.state(goal)), tiny.state(goal)
    names = list(state.model.state_dict())
    compile_towers(state, backend="aot_eager")
    assert_equal_gradients(gradients(goal, state), plain)
    assert list(state.model.state_dict()) == names


class Waits(TorchDispatchMode):
    """Notes every operation whose result or shape the host must read from the device."""

    READS = re.compile(r"aten\.(_local_scalar_dense|nonzero|masked_select|is_nonzero|equal|unique\w*|item)\b")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        by_mask = name.startswith("aten.index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if self.READS.match(name) or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["both-dual", "codis-dual", "tcl", "both", "clip"])
def test_a_step_reads_nothing_from_the_device(preset):
    goal = tiny.objective(preset)
    torch.manual_seed(0)
    model = build_model(tiny.encoder(), goal).train()
    state = make_state(model, goal, torch.optim.AdamW(parameter_groups(model, 0.02), fused=True))
    rows = tiny.batch(6, dtype=torch.float32)
    selected = select_tokens(rows.ids, rows.mask, rows.key, tiny.TOKENS, goal.mlm_probability)
    rows = dataclasses.replace(rows, hidden=tuple(selected.sum(1).tolist()))
    training_step(state, rows, tiny.settings(goal), ScheduleState(0.4))
    with Waits() as waits:
        training_step(state, rows, tiny.settings(goal), ScheduleState(0.4))
    assert waits.found == []
    with Waits() as waits:
        bool(rows.mask.all())
    assert waits.found == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("chunk", [0, 2])
def test_hidden_tokens_counted_beforehand_change_nothing(chunk):
    goal, rows = tiny.objective("both"), tiny.batch(5)
    selected = select_tokens(rows.ids, rows.mask, rows.key, tiny.TOKENS, goal.mlm_probability)
    counted = dataclasses.replace(rows, hidden=tuple(selected.sum(1).tolist()))
    losses = []
    for batch in (rows, counted):
        result = training_step(tiny.state(goal), batch, tiny.settings(goal, chunk=chunk), ScheduleState(0.4))
        losses.append(result.loss)
    assert torch.equal(*losses)
