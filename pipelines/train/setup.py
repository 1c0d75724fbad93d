"""What a Train worker builds before its first step: threads, model, optimiser, settings."""

import os

import torch

from models.encoders import DualEncoder
from models.masking import SpecialTokens
from models.objectives import build_model
from models.preprocess import CaptionTokenizer
from pipelines.config import ComputeConfig, ExperimentConfig
from pipelines.step.state import StepSettings, TrainState, make_state, parameter_groups
from pipelines.train.checkpoint import load_initial


def set_threads(compute: ComputeConfig, world_size: int) -> None:
    """Torch threads of this worker; Ray leaves one, and workers on one machine should share its cores."""
    if not compute.gpus:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(compute.threads or max(1, (os.cpu_count() or 1) // max(here, 1)))


def step_settings(experiment: ExperimentConfig, tokenizer: CaptionTokenizer, device: torch.device) -> StepSettings:
    """What the steps of a run have in common."""
    rows = experiment.encoder.text.architecture["vocab_size"]
    return StepSettings(
        objective=experiment.objective,
        tokens=SpecialTokens(tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id, rows),
        clip_norm=experiment.optim.clip_norm,
        bf16=experiment.compute.bf16 and device.type == "cuda" and torch.cuda.is_bf16_supported(),
        chunk=experiment.compute.chunk_size,
        seed=experiment.seed,
    )


def start_state(experiment: ExperimentConfig, initial_weights: str, device: torch.device) -> TrainState:
    """Model, teacher, queue and optimiser before the first step, the same for a seed on every worker."""
    optim, compute = experiment.optim, experiment.compute
    torch.manual_seed(experiment.seed)
    model = build_model(experiment.encoder, experiment.objective, pretrained=not initial_weights)
    if initial_weights:
        load_initial(model, initial_weights)
    model = model.to(device).train()
    groups = parameter_groups(model, optim.weight_decay)
    fused = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, fused=True)
    state = make_state(model, experiment.objective, fused)
    recompute_activations(model, compute)
    if compute.compile:
        compile_towers(state)
    return state


def recompute_activations(model: DualEncoder, compute: ComputeConfig) -> None:
    """Let layers run again in the backward pass where asked, in place of keeping what they computed."""
    for asked, tower in ((compute.recompute.vision, model.vision), (compute.recompute.text, model.text)):
        if asked:
            tower.backbone.activation_checkpointing_enable({"use_reentrant": False})
    if compute.recompute.fusion and model.fusion is not None:
        model.fusion.recompute = True


def compile_towers(state: TrainState, backend: str = "inductor") -> None:
    """torch.compile for both towers of student and teacher, in place: names of parameters stay as they are."""
    for branch in (state.model, state.teacher):
        if branch is not None:
            branch.vision.backbone.compile(backend=backend)
            branch.text.backbone.compile(backend=backend, dynamic=True)  # captions differ in length
