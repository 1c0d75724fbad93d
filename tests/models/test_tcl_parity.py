"""Parity with the published TCL implementation, number by number, on whatever golden set the folder holds."""

import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.metrics import retrieval_recall
from models.preprocess import clean_caption, clean_question
from models.reference import from_reference, reference_name, to_reference
from pipelines.config import OptimConfig
from pipelines.evaluation.evaluate import two_stage_scores
from pipelines.step.schedule import ramped_alpha, tcl_rate
from pipelines.step.state import parameter_groups
from tests.support import golden_tcl as golden

KEY_BIAS = re.compile(r"\.key\.bias$|attn\.qkv\.bias$")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def records(one_thread):
    return golden.run_pretraining()[0]


@pytest.fixture(scope="module")
def finetuning(one_thread):
    return golden.run_finetuning()


def assert_close(actual: Tensor, expected: Tensor, name: str, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape, name
    scale = max(float(expected.double().abs().max()), 1e-12)
    worst = float((actual.double() - expected.double()).abs().max())
    assert worst <= tolerance * scale, f"{name}: off by {worst:.3g} at a scale of {scale:.3g}"


def assert_outputs(records, names: tuple[str, ...]) -> None:
    checked = 0
    for step in golden.STEPS:
        for name in names:
            expected = golden.TENSORS.get(f"step{step}.out.{name}")
            if expected is not None:
                assert_close(records[step].out[name], expected, f"step {step} {name}")
                checked += 1
    assert checked >= len(names)


def without_aliases(names) -> list[str]:
    """Leave out the tied copies that the reference lists beside the tensors they are."""
    return [name for name in names if "predictions.decoder." not in name]


def assert_checksums(tensors: dict[str, Tensor], expected: dict[str, list[float]], rate: float = 0.0) -> None:
    assert set(tensors) == set(without_aliases(expected))
    for name, tensor in tensors.items():
        total, norm = expected[name]
        slack = rate * math.sqrt(tensor.numel()) if KEY_BIAS.search(name) else 0.0
        bias_steps = rate * tensor.numel() if KEY_BIAS.search(name) else 0.0
        assert float(tensor.double().norm()) == pytest.approx(norm, rel=1e-5, abs=slack), name
        assert float(tensor.double().sum()) == pytest.approx(total, abs=1e-4 * max(1.0, norm) + bias_steps), name


def momentum_name(name: str) -> str:
    top, dot, rest = name.partition(".")
    return f"{top}_m{dot}{rest}"


def test_every_parameter_has_a_reference_name_and_comes_back():
    state, _, mismatch = golden.make_reference_state()
    ours = {name: p.detach() for name, p in state.model.named_parameters()}
    theirs = to_reference(ours, golden.FUSION_LAYER)
    stored = load_file(golden.FOLDER / "state_dict.safetensors")
    for name, tensor in theirs.items():
        assert torch.equal(tensor, stored[name]), name
    back = from_reference(theirs, list(ours), golden.FUSION_LAYER)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert mismatch.missing == ["idx_queue"] and mismatch.unexpected == []
    with pytest.raises(KeyError):
        reference_name("codebook.weight", golden.FUSION_LAYER)


def test_image_and_text_states(records):
    assert_outputs(records, ("image_cls", "text_cls", "image_cls_m", "text_cls_m"))
    assert_outputs(records, ("image_tokens", "text_tokens"))


def test_joint_space_features(records):
    assert_outputs(records, ("image_feat", "text_feat", "image_feat_m", "text_feat_m"))


def test_local_features(records):
    assert_outputs(records, ("image_local_m", "text_local_m"))


def test_similarities(records):
    assert_outputs(records, ("sim_i2t", "sim_t2i", "sim_i2i", "sim_t2t"))


def test_soft_targets(records):
    assert_outputs(records, ("targets_i2t", "targets_t2i"))


def test_sampling_weights_of_hard_negatives(records):
    assert_outputs(records, ("neg_weights_i2t", "neg_weights_t2i"))


def test_matching_states_and_logits(records):
    assert_outputs(records, ("itm_embeds", "itm_logits"))


def test_masked_language_logits(records):
    assert_outputs(records, ("mlm_logits_masked", "mlm_logits_m_masked"))


def test_queues_and_pointer(records):
    assert_outputs(records, ("image_queue", "text_queue", "queue_ptr"))


@pytest.mark.parametrize("step", golden.STEPS)
def test_losses(records, step):
    expected, result = golden.EXPECTED["steps"][step], records[step].result
    parts = {"loss_i2t": "i2t", "loss_t2i": "t2i", "loss_i2i": "i2i", "loss_t2t": "t2t", "loss_itm": "itm"}
    parts |= {name: name for name in ("lmi_image", "lmi_text", "mlm_hard", "mlm_distill")}
    terms = {"cma": "cma", "imc": "imc", "lmi": "lmi", "loss_mlm": "mlm"}
    assert set(expected["losses"]) == {*parts, *terms, "loss_ita", "total"}
    for name, part in parts.items():
        assert records[step].parts[part] == pytest.approx(expected["losses"][name], rel=1e-5), name
    for name, term in terms.items():
        assert float(result.terms[term]) == pytest.approx(expected["losses"][name], rel=1e-5), name
    contrastive = sum(float(result.terms[term]) for term in ("cma", "imc", "lmi")) / 3
    assert contrastive == pytest.approx(expected["losses"]["loss_ita"], rel=1e-5)
    assert float(result.loss) == pytest.approx(expected["losses"]["total"], rel=1e-5)
    assert records[step].temperature == pytest.approx(expected["temp_after_clamp"], rel=1e-6)


@pytest.mark.parametrize("step", golden.STEPS)
def test_gradient_norms(records, step):
    expected = golden.EXPECTED["steps"][step]
    gradients = to_reference(records[step].gradients, golden.FUSION_LAYER)
    norms = {name: float(g.double().norm()) for name, g in gradients.items()}
    assert set(norms) == set(without_aliases(expected["grad_norm_by_parameter"]))
    for name, norm in norms.items():
        if not name.endswith(".key.bias"):
            assert norm == pytest.approx(expected["grad_norm_by_parameter"][name], rel=1e-3, abs=1e-7), name
    for group, norm in expected["grad_norm_by_group"].items():
        members = [n for n in norms if n == group or n.startswith(f"{group}.")]
        assert math.hypot(*(norms[n] for n in members)) == pytest.approx(norm, rel=1e-3), group
    assert math.hypot(*norms.values()) == pytest.approx(expected["grad_norm_total"], rel=1e-3)


@pytest.mark.parametrize("step", golden.STEPS)
def test_momentum_after_update(records, step):
    teacher = to_reference(records[step].teacher, golden.FUSION_LAYER)
    named = {momentum_name(name): tensor for name, tensor in teacher.items()}
    assert_checksums(named, golden.EXPECTED["steps"][step]["momentum_params_after"], golden.CONFIG["optimizer"]["lr"])
    prefix = f"step{step}.out.momentum."
    for name in (n for n in golden.TENSORS if n.startswith(prefix)):
        assert_close(named[name.removeprefix(prefix)], golden.TENSORS[name], name)


@pytest.mark.parametrize("step", golden.STEPS)
def test_online_weights_after_adamw(records, step):
    online = to_reference(records[step].online, golden.FUSION_LAYER)
    rate = golden.CONFIG["optimizer"]["lr"] * (step + 1)
    assert_checksums(online, golden.EXPECTED["steps"][step]["online_params_after_step"], rate)


def test_optimizer_groups():
    state, _, _ = golden.make_reference_state()
    name_of = {id(p): reference_name(n, golden.FUSION_LAYER) for n, p in state.model.named_parameters()}
    groups = parameter_groups(state.model, golden.CONFIG["optimizer"]["weight_decay"])
    ours = {
        group["weight_decay"]: {re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", name_of[id(p)]) for p in group["params"]}
        for group in groups
    }
    expected = {g["weight_decay"]: set(without_aliases(g["names"])) for g in golden.EXPECTED["optimizer_groups"]}
    assert ours == expected


def test_finetuning_tensors(finetuning):
    record, _ = finetuning
    skipped = {"idx_queue", "queue_ptr"}
    names = [n.removeprefix("finetune.out.") for n in golden.TENSORS if n.startswith("finetune.out.")]
    assert {"sim_targets", "targets_i2t", "itm_logits"} <= set(names)
    for name in names:
        expected = golden.TENSORS[f"finetune.out.{name}"]
        if name in skipped:
            assert torch.equal(record.out[name], expected), name
        else:
            assert_close(record.out[name], expected, name)
    assert_close(
        record.out["pos_embed_interpolated"], golden.TENSORS["finetune.pos_embed_interpolated"], "position table"
    )


def test_finetuning_losses_gradient_and_loading(finetuning):
    record, mismatch = finetuning
    expected = golden.EXPECTED["finetune"]
    parts = {"loss_i2t": "i2t", "loss_t2i": "t2i", "loss_i2i": "i2i", "loss_t2t": "t2t", "loss_itm": "itm"}
    for name in ("lmi_image", "lmi_text"):
        parts[name] = name
    for name, part in parts.items():
        assert float(record.result.parts[part]) == pytest.approx(expected["losses"][name], rel=1e-5), name
    assert float(record.result.loss) == pytest.approx(expected["losses"]["total"], rel=1e-5)
    total = math.hypot(*(float(g.double().norm()) for g in record.gradients.values()))
    assert total == pytest.approx(expected["grad_norm_total"], rel=1e-3)
    assert mismatch.missing == expected["missing_keys"]
    assert sorted(mismatch.unexpected) == sorted(expected["unexpected_keys"])


def test_two_stage_evaluation():
    state, _, _ = golden.make_reference_state()
    model = state.model.eval()
    ids, mask = golden.TENSORS["eval.in.caption_ids"], golden.TENSORS["eval.in.caption_mask"].bool()
    image_steps = re.findall(r"step(\d+)\.in\.image", golden.EXPECTED["eval"]["images"])
    pixels = torch.cat([golden.step_input(int(step), "image").float() for step in image_steps])
    with torch.no_grad():
        image, text = model.encode_image(pixels), model.encode_text(ids, mask)
        scores = two_stage_scores(
            model.project_image(image[:, 0]),
            model.project_text(text[:, 0]),
            image,
            text,
            mask,
            model.fusion.match_logits,
            golden.EXPECTED["eval"]["k_test"],
        )
    assert_close(scores[0], golden.TENSORS["eval.out.score_i2t"], "score_i2t")
    assert_close(scores[1], golden.TENSORS["eval.out.score_t2i"], "score_t2i")
    recall = retrieval_recall(*scores, golden.EXPECTED["eval"]["txt2img"])
    for k in (1, 5):
        metrics = golden.EXPECTED["eval"]["metrics"]
        assert 100 * recall[f"text_retrieval_recall_at_{k}"] == pytest.approx(metrics[f"txt_r{k}"])
        assert 100 * recall[f"image_retrieval_recall_at_{k}"] == pytest.approx(metrics[f"img_r{k}"])


def test_protocol_recall():
    case = golden.PROTOCOL["recall"]
    i2t, t2i = (torch.tensor(case[name]) for name in ("scores_i2t", "scores_t2i"))
    owners = [caption // case["captions_per_image"] for caption in range(len(t2i))]
    recall = retrieval_recall(i2t, t2i, owners)
    for k in (1, 5, 10):
        assert 100 * recall[f"text_retrieval_recall_at_{k}"] == pytest.approx(case["metrics"][f"txt_r{k}"])
        assert 100 * recall[f"image_retrieval_recall_at_{k}"] == pytest.approx(case["metrics"][f"img_r{k}"])


def test_protocol_captions_and_questions():
    for case in golden.PROTOCOL["pre_caption"]:
        assert clean_caption(case["in"], case["max_words"]) == case["out"]
    for case in golden.PROTOCOL["pre_question"]:
        assert clean_question(case["in"], case["max_words"]) == case["out"]


@pytest.mark.parametrize("name", golden.PROTOCOL["lr_schedule"])
def test_protocol_learning_rate(name):
    case = golden.PROTOCOL["lr_schedule"][name]
    schedule = case["schedule"]
    optim = OptimConfig(
        schedule="tcl",
        learning_rate=case["optimizer_lr"],
        min_learning_rate=schedule["min_lr"],
        warmup_epochs=schedule["warmup_epochs"],
        warmup_learning_rate=schedule["warmup_lr"],
    )
    rows = [tuple(row) for row in case["rows_epoch_iter_lr"]]
    changes, last = [], None
    for epoch in range(schedule["epochs"]):
        for iteration in range(case["iterations_per_epoch"]):
            rate = tcl_rate(optim, epoch, iteration, schedule["epochs"])
            if rate != last:
                changes.append((epoch, iteration, rate))
            last = rate
    assert [row[:2] for row in changes] == [row[:2] for row in rows]
    assert np.allclose([row[2] for row in changes], [row[2] for row in rows], rtol=1e-9)


def test_protocol_alpha():
    case = golden.PROTOCOL["alpha"]
    for epoch, iteration, total, value in case["rows_epoch_iter_total_value"]:
        assert ramped_alpha(case["alpha"], 1.0, epoch + iteration / total) == pytest.approx(value, rel=1e-9, abs=1e-12)
