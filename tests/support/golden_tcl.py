"""The golden set as data: configuration, models and recorded runs, all read from its folder."""

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models import contrast, fusion_losses, losses
from models.batch import Batch, FixedDraws
from models.collectives import SoloWorkers
from models.config import (
    EncoderConfig,
    FusionConfig,
    ObjectiveConfig,
    QueueConfig,
    TeacherConfig,
    TemperatureConfig,
    TextConfig,
    VisionConfig,
    WeightsConfig,
)
from models.encoders import resolve
from models.masking import Masked, SpecialTokens
from models.objectives import ScheduleState, build_model
from models.reference import Mismatch, load_reference
from models.teacher import update_teacher
from pipelines.step.context import build_context
from pipelines.step.grad_cache import encode
from pipelines.step.state import StepResult, StepSettings, TrainState, make_state, parameter_groups
from pipelines.step.training_step import clamp_temperature, training_step
from tests.support.paths import GOLDEN

FOLDER = Path(os.environ.get("TRIPTYCH_GOLDEN_DIR") or GOLDEN / "tcl")
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
PROTOCOL: dict[str, Any] = json.loads((FOLDER / "protocol.json").read_text())
TENSORS = load_file(FOLDER / "tensors.safetensors")
CONFIG = EXPECTED["config"]
FUSION_LAYER: int = CONFIG["text"]["fusion_layer"]
STEPS = range(len(EXPECTED["steps"]))


def encoder_config(image_size: int) -> EncoderConfig:
    vision, text = CONFIG["vision"], CONFIG["text"]
    return resolve(
        EncoderConfig(
            vision=VisionConfig(
                image_size=image_size,
                patch_size=vision["patch_size"],
                width=vision["width"],
                layers=vision["depth"],
                heads=vision["heads"],
                mlp_ratio=vision["mlp_ratio"],
                layer_norm_eps=vision["layer_norm_eps"],
            ),
            text=TextConfig(
                vocab_size=text["vocab_size"],
                max_positions=text["max_position_embeddings"],
                max_tokens=2,
                width=text["hidden_size"],
                layers=FUSION_LAYER,
                heads=text["num_attention_heads"],
                mlp_ratio=text["intermediate_size"] / text["hidden_size"],
                dropout=text["hidden_dropout_prob"],
                layer_norm_eps=text["layer_norm_eps"],
            ),
            fusion=FusionConfig(layers=text["num_hidden_layers"] - FUSION_LAYER),
            embed_dim=CONFIG["embed_dim"],
        )
    )


def objective(finetune: bool) -> ObjectiveConfig:
    queue = CONFIG["finetune"]["queue_size"] if finetune else CONFIG["queue_size"]
    return ObjectiveConfig(
        weights=WeightsConfig(cma=1 / 3, imc=1 / 3, lmi=1 / 3, itm=1, mlm=0 if finetune else 1),
        temperature=TemperatureConfig(start=CONFIG["initial_temp"], clamp=not finetune),
        teacher=TeacherConfig(momentum=CONFIG["momentum"]),
        queue=QueueConfig(size=queue),
        duplicates="positive" if finetune else "ignore",
        local_grid="quarter" if finetune else "sqrt",
        mlm_probability=CONFIG["mlm_probability"],
    )


def make_reference_state(finetune: bool = False) -> tuple[TrainState, StepSettings, Mismatch]:
    size = CONFIG["finetune"]["image_size"] if finetune else CONFIG["vision"]["image_size"]
    goal, adam = objective(finetune), CONFIG["optimizer"]
    model = build_model(encoder_config(size), goal).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, adam["weight_decay"]), lr=adam["lr"], betas=tuple(adam["betas"]), eps=adam["eps"]
    )
    state = make_state(model, goal, optimizer)
    mismatch = load_reference(
        load_file(FOLDER / "state_dict.safetensors"), state.model, state.teacher, state.queue, FUSION_LAYER
    )
    special = CONFIG["special_tokens"]
    tokens = SpecialTokens(special["pad"], special["cls"], special["mask"], CONFIG["text"]["vocab_size"])
    return state, StepSettings(goal, tokens), mismatch


def step_input(step: int, name: str) -> Tensor:
    source = EXPECTED["steps"][step].get("inputs_same_as_step", step)
    return TENSORS[f"step{source}.in.{name}"]


def make_batch(
    ids: Tensor, mask: Tensor, images: tuple[Tensor, Tensor], draws: FixedDraws, image_id: Tensor | None = None
) -> Batch:
    rows = torch.arange(len(ids))
    identity = rows if image_id is None else image_id
    return Batch(images[0].float(), images[1].float(), ids, mask.bool(), rows, identity, rows, fixed_draws=draws)


@dataclass
class Record:
    """What one step did, under the golden set's names."""

    result: StepResult
    out: dict[str, Tensor]
    parts: dict[str, float]
    """Means of the terms' parts, those of mlm that the step's alpha leaves out included."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    online: dict[str, Tensor] = field(default_factory=dict)
    temperature: float = 0.0


def probe(state: TrainState, settings: StepSettings, batch: Batch, alpha: float) -> dict[str, Tensor]:
    """Features, similarities and targets of a step, from the product's own functions on a copy of the state."""
    state = copy.deepcopy(state)
    clamp_temperature(state.model, settings.objective)
    with torch.no_grad():
        student = encode(state.model, batch.view1, batch)
    update_teacher(state.teacher, state.model, settings.objective.teacher.momentum)
    context, _ = build_context(state, student, batch, settings, ScheduleState(alpha), SoloWorkers())
    temperature, queue, teacher = context.temperature.detach(), state.queue, context.teacher
    sims = {
        f"sim_{name}": contrast.similarities(query, keys, entries, temperature)
        for name, query, keys, entries in (
            ("i2t", student.image, teacher.text, queue.text),
            ("t2i", student.text, teacher.image, queue.image),
            ("i2i", student.image, teacher.image, queue.image),
            ("t2t", student.text, teacher.text, queue.text),
        )
    }
    momentum_i2t = contrast.similarities(teacher.image, teacher.text, queue.text, temperature)
    momentum_t2i = contrast.similarities(teacher.text, teacher.image, queue.image, temperature)
    _, match = losses.contrast_parts(settings.objective, state.model, context)
    target = contrast.hard_targets(context.identity.positive, student.image)
    return sims | {
        "image_tokens": student.image_tokens,
        "text_tokens": student.text_tokens,
        "image_cls": student.image_tokens[:, 0],
        "text_cls": student.text_tokens[:, 0],
        "image_cls_m": teacher.image_tokens[:, 0],
        "text_cls_m": teacher.text_tokens[:, 0],
        "image_feat": student.image,
        "text_feat": student.text,
        "image_feat_m": teacher.image,
        "text_feat_m": teacher.text,
        "image_local_m": context.local_parts.image,
        "text_local_m": context.local_parts.text,
        "sim_targets": target,
        "targets_i2t": contrast.soft_targets(target, momentum_i2t, alpha),
        "targets_t2i": contrast.soft_targets(target, momentum_t2i, alpha),
        "neg_weights_i2t": contrast.negative_weights(match.image_to_text, context.identity.same),
        "neg_weights_t2i": contrast.negative_weights(match.text_to_image, context.identity.same),
    }


def probe_language(
    state: TrainState, settings: StepSettings, batch: Batch
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Both targets of a step's mlm and the logits behind them: a step computes only those that its alpha mixes."""
    state = copy.deepcopy(state)
    with torch.no_grad():
        student = encode(state.model, batch.view1, batch)
        update_teacher(state.teacher, state.model, settings.objective.teacher.momentum)
        context, _ = build_context(state, student, batch, settings, ScheduleState(0.5), SoloWorkers())
        masked = batch.fixed_draws.masked
        hidden = fusion_losses.Hidden(masked, masked.selected.nonzero())
        memory = state.model.fusion.image_memory(student.image_tokens)
        teacher_memory = state.teacher.fusion.image_memory(context.teacher.image_tokens)
        logits = {
            "mlm_logits_masked": fusion_losses.language_logits(state.model, hidden, batch.mask, memory),
            "mlm_logits_m_masked": fusion_losses.language_logits(state.teacher, hidden, batch.mask, teacher_memory),
        }
        rows, count = slice(0, len(batch)), int(masked.selected.sum())
        sums = fusion_losses.language_sums(state.model, state.teacher, context, memory, hidden, rows)
    return logits, {name: float(value / count) for name, value in sums.items()}


def run_step(state: TrainState, settings: StepSettings, batch: Batch, alpha: float) -> Record:
    """One real training step with its intermediate tensors."""
    out, language = probe(state, settings, batch, alpha), {}
    if batch.fixed_draws.masked is not None:
        logits, language = probe_language(state, settings, batch)
        out |= logits
    hook = state.model.fusion.matching.register_forward_hook(
        lambda module, inputs, output: out.update(itm_embeds=inputs[0].detach(), itm_logits=output.detach())
    )
    result = training_step(state, batch, settings, ScheduleState(alpha))
    hook.remove()
    out |= {"image_queue": state.queue.image.T.clone(), "text_queue": state.queue.text.T.clone()}
    out |= {"queue_ptr": state.queue.pointer[None].clone(), "idx_queue": state.queue.image_id[None].clone()}
    return Record(
        result,
        out,
        language | {name: float(value) for name, value in result.parts.items()},
        {n: p.grad.clone() for n, p in state.model.named_parameters()},
        {n: p.detach().clone() for n, p in state.teacher.named_parameters()},
        {n: p.detach().clone() for n, p in state.model.named_parameters()},
    )


def run_pretraining() -> tuple[list[Record], StepSettings]:
    state, settings, _ = make_reference_state()
    records = []
    for step in STEPS:
        expected = EXPECTED["steps"][step]
        if "override_temp_before_forward" in expected:
            state.model.temperature.data.fill_(expected["override_temp_before_forward"])
        labels = TENSORS[f"step{step}.draw.mlm_labels"]
        ids = step_input(step, "input_ids")
        masked = Masked(TENSORS[f"step{step}.draw.mlm_input_ids"], labels != -100, ids)
        draws = FixedDraws(TENSORS[f"step{step}.draw.neg_image_idx"], TENSORS[f"step{step}.draw.neg_text_idx"], masked)
        images = (step_input(step, "image"), step_input(step, "image_aug"))
        batch = make_batch(ids, step_input(step, "attention_mask"), images, draws)
        before = state.model.temperature.detach().clone()
        clamp = settings.objective.temperature
        record = run_step(state, settings, batch, expected["alpha"])
        record.temperature = float(before.clamp(clamp.min, clamp.max))
        records.append(record)
    return records, settings


def run_finetuning() -> tuple[Record, Mismatch]:
    state, settings, mismatch = make_reference_state(finetune=True)
    state.queue.image_id.copy_(TENSORS["finetune.in.idx_queue"][0])
    draws = FixedDraws(TENSORS["finetune.draw.neg_image_idx"], TENSORS["finetune.draw.neg_text_idx"])
    images = tuple(TENSORS.get(f"finetune.in.{name}", step_input(0, name)) for name in ("image", "image_aug"))
    batch = make_batch(
        step_input(0, "input_ids"), step_input(0, "attention_mask"), images, draws, TENSORS["finetune.in.image_id"]
    )
    positions = state.model.vision.backbone.embeddings.position_embeddings.detach().clone()
    record = run_step(state, settings, batch, EXPECTED["finetune"]["alpha"])
    record.out["pos_embed_interpolated"] = positions
    return record, mismatch
