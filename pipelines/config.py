"""The experiment: all that decides a training run, and the presets."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from models.config import (
    CmaConfig,
    Config,
    EncoderConfig,
    FusionConfig,
    ObjectiveConfig,
    TextConfig,
    VisionConfig,
    WeightsConfig,
)


class PairsConfig(Config):
    """How pairs are read and looked at."""

    image_column: str = Field("image", examples=["picture"])
    """Parquet column of the image: bytes, or the Hugging Face struct with `bytes`."""
    caption_column: str = Field("caption", examples=["text"])
    """Parquet column of the caption: a string or a list of strings."""
    id_column: str = Field("id", examples=["sku"])
    """Parquet column of your own key, if there is one."""
    image_id_column: str = Field("image_id", examples=["picture_id"])
    """Parquet column of the image's identity, if there is one; else a hash of its bytes."""
    crop_area_min: Annotated[float, Gt(0), Le(1)] = 0.2
    """Smallest share of the image in a training crop."""
    augment: Literal["full", "light", "none"] = "full"
    """full: the reference's chain; light: crops only, so that colours and sides stay true; none: plain resize."""
    max_pixels: PositiveInt = 64_000_000
    """Images with more pixels are skipped before they are decoded."""
    min_side: PositiveInt = 4
    """Images with a shorter side are skipped."""
    max_caption_words: PositiveInt = 30
    """Words kept of a caption."""
    max_skipped: Annotated[float, Ge(0), Le(1)] = 0.2
    """Largest share of samples that may be skipped in an epoch before the run fails."""
    record_ids: bool = False
    """Whether each checkpoint carries `ids.parquet`: which sample was trained in which step."""


class OptimConfig(Config):
    """Optimiser and schedule."""

    learning_rate: PositiveFloat = 1e-3
    """Peak rate, reached after warm-up."""
    schedule: Literal["cosine", "tcl"] = "cosine"
    """cosine: by samples seen; tcl: the reference's, by epoch and iteration."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of the planned samples (cosine)."""
    min_learning_rate: NonNegativeFloat = Field(0.0, examples=[5e-6])
    """Last rate."""
    warmup_epochs: NonNegativeInt = 20
    """Steps of 100 iterations in the first epoch (tcl)."""
    warmup_learning_rate: NonNegativeFloat = 1e-5
    """First rate (tcl)."""
    weight_decay: NonNegativeFloat = 0.02
    """Decay of matrices, tables and scalars; never of vectors."""
    betas: tuple[float, float] = Field((0.9, 0.999), examples=[(0.9, 0.98)])
    """Decay rates of AdamW's moments."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    batch_size: PositiveInt = 64
    """Pairs of one step over all workers."""
    epochs: PositiveFloat = 1.0
    """Passes over the data, fractions allowed; given by hand, it also sets `min_samples` to 0."""
    min_samples: NonNegativeInt = Field(0, examples=[100_000])
    """Train at least so many samples, in more passes where needed; 0 where `epochs` is given by hand without it."""


class RecomputeConfig(Config):
    """Activation checkpointing: layers keep only their inputs and run again in the backward pass."""

    vision: bool = False
    """The image tower."""
    text: bool = False
    """The text tower."""
    fusion: bool = False
    """The fusion encoder."""


class ComputeConfig(Config):
    """What a run takes of the cluster."""

    workers: PositiveInt = 1
    """Training workers."""
    gpus: bool = False
    """One GPU a worker (nccl and bf16); else CPU (gloo and fp32)."""
    bf16: bool = True
    """bf16 autocast on GPUs that have it; never on a CPU."""
    cpus_per_worker: PositiveFloat = 0.5
    """Logical CPUs of a worker; what is left decodes the data."""
    cpus_per_data_task: PositiveFloat = 0.25
    """Logical CPUs of a data task."""
    chunk_size: NonNegativeInt = Field(0, examples=[32])
    """Pairs that a worker encodes at once, of its share of the batch; fewer need less memory; 0: all."""
    recompute: RecomputeConfig = RecomputeConfig()
    compile: bool = False
    """torch.compile for the towers; worth it on GPUs."""
    threads: NonNegativeInt = 0
    """Torch threads of a worker; 0 shares the machine's cores."""
    max_failures: NonNegativeInt = 3
    """How often a lost worker is replaced before the run fails."""


class ValidationConfig(Config):
    """Scores of the held-out split."""

    pairs: PositiveInt = 2000
    """Most pairs scored at a checkpoint."""
    rerank_top: PositiveInt = 16
    """Candidates re-ranked by the fusion encoder at the end."""
    rerank_queries: PositiveInt = 2000
    """Most queries re-ranked at the end."""


class CheckpointsConfig(Config):
    """When checkpoints are written and which are kept."""

    every: Annotated[float, Gt(0), Le(1)] = 0.2
    """Share of the run between two checkpoints."""
    keep: PositiveInt = 2
    """How many of the latest are kept, besides the best."""


class ProgressConfig(Config):
    """How often a run speaks."""

    every: PositiveInt = 10
    """Steps between two reports of losses and speed."""


class ExperimentConfig(Config):
    """All that decides a training run; stored beside every checkpoint."""

    preset: str = ""
    """The preset it started from."""
    train_data: str = Field("", examples=["s3://bucket/pairs/train"])
    """Folder, file or URL of the training pairs (parquet or webdataset)."""
    val_data: str = Field("", examples=["s3://bucket/pairs/val"])
    """Folder, file or URL of the validation pairs."""
    out: str = Field("", examples=["s3://bucket/runs"])
    """Folder or URL for the run's folder."""
    name: str = Field("", examples=["first"])
    """The run's name; empty: <preset>-<UTC time>."""
    init: str = Field("", examples=["s3://bucket/runs/first"])
    """A run folder, checkpoint or package whose weights are the start."""
    seed: NonNegativeInt = 0
    """Seed of weights, order and draws."""
    encoder: EncoderConfig = EncoderConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    pairs: PairsConfig = PairsConfig()
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    progress: ProgressConfig = ProgressConfig()

    def override(self, changes: Mapping[str, Any]) -> Self:
        """As of any configuration; a length given in `optim.epochs` is not made longer by `optim.min_samples`."""
        return super().override(({"optim.min_samples": 0} if "optim.epochs" in changes else {}) | dict(changes))


THIRD = 1 / 3
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "clip": ObjectiveConfig(weights=WeightsConfig(cma=1), cma=CmaConfig(kind="clip"), alpha=0.0),
    "albef": ObjectiveConfig(weights=WeightsConfig(cma=1, itm=1, mlm=1)),
    "tcl": ObjectiveConfig(weights=WeightsConfig(cma=THIRD, imc=THIRD, lmi=THIRD, itm=1, mlm=1)),
    "codis": ObjectiveConfig(weights=WeightsConfig(cma=2, imc=2, code=2, ot=2, itm=1, mlm=1)),
    "both": ObjectiveConfig(weights=WeightsConfig(cma=THIRD, imc=THIRD, lmi=THIRD, code=THIRD, ot=THIRD, itm=1, mlm=1)),
}
"""The papers' objectives, and both together; weights multiply the mean of a term's directions."""


def _dual(objective: ObjectiveConfig) -> ObjectiveConfig:
    return objective.override({"weights.itm": 0.0, "weights.mlm": 0.0})


def _tiny(preset: str, objective: ObjectiveConfig) -> ExperimentConfig:
    """Under half a million parameters: learns a few thousand pairs of small images in minutes on two CPU cores.

    Rates are measured: on 20,000 samples clip reaches recall@1 3.7 % at 1e-3 and 0.7 % at 3e-3, tcl-dual 1.3 and 2.7 %.
    """
    rate = 1e-3 if objective.cma.kind == "clip" else 3e-3
    return ExperimentConfig(
        preset=preset,
        encoder=EncoderConfig(
            vision=VisionConfig(image_size=32, patch_size=8, width=64, layers=4, heads=2, initializer_range=0.1),
            text=TextConfig(
                vocab_size=1536,
                max_tokens=25,
                max_positions=32,
                width=64,
                layers=2,
                heads=2,
                mlp_ratio=2,
                initializer_range=0.1,
            ),
            fusion=FusionConfig(layers=2),
            embed_dim=64,
        ),
        objective=objective.override(
            {
                "teacher.momentum": 0.95,  # a few hundred steps: the papers' 0.995 would never catch up
                "queue.size": 4096,
                "codebook.size": 256,
                "codebook.eps": 0.025,  # at 0.05 targets are too soft to agree on in the first 10,000 samples
                "temperature.learn": False,  # learnt at this rate it falls to a third and spoils the early steps
            }
        ),
        pairs=PairsConfig(augment="light", crop_area_min=0.8),
        optim=OptimConfig(learning_rate=rate, batch_size=64, epochs=3, min_samples=40_000),
        validation=ValidationConfig(rerank_top=16),
    )


def _small(preset: str, objective: ObjectiveConfig) -> ExperimentConfig:
    """About 20 million parameters: hours on a CPU, minutes on a GPU."""
    return ExperimentConfig(
        preset=preset,
        encoder=EncoderConfig(
            vision=VisionConfig(image_size=112, patch_size=16, width=256, layers=8, heads=8),
            text=TextConfig(
                vocab_size=8192, max_tokens=30, max_positions=64, width=256, layers=4, heads=8, dropout=0.1
            ),
            fusion=FusionConfig(layers=4),
            embed_dim=256,
        ),
        objective=objective.override({"teacher.momentum": 0.99, "queue.size": 16_384, "codebook.size": 1024}),
        pairs=PairsConfig(crop_area_min=0.3),
        optim=OptimConfig(learning_rate=5e-4, batch_size=128, epochs=10, min_samples=200_000),
        validation=ValidationConfig(rerank_top=32),
    )


def _base(preset: str, objective: ObjectiveConfig) -> ExperimentConfig:
    """The papers' model: ViT-B/16 and BERT-base, six layers of text and six of fusion, at 256 pixels."""
    return ExperimentConfig(
        preset=preset,
        encoder=EncoderConfig(
            vision=VisionConfig(image_size=256, patch_size=16, width=768, layers=12, heads=12),
            text=TextConfig(
                vocab_size=30_522, max_tokens=25, max_positions=512, width=768, layers=6, heads=12, dropout=0.1
            ),
            fusion=FusionConfig(layers=6),
            embed_dim=256,
        ),
        objective=objective,
        optim=OptimConfig(
            learning_rate=1e-4, min_learning_rate=1e-5, batch_size=512, epochs=30, clip_norm=0.0, schedule="cosine"
        ),
        validation=ValidationConfig(rerank_top=128),
    )


def _presets() -> dict[str, ExperimentConfig]:
    presets = {}
    for size, build in (("tiny", _tiny), ("small", _small), ("base", _base)):
        for name, objective in OBJECTIVES.items():
            presets[f"{name}-{size}"] = build(f"{name}-{size}", objective)
            if objective.weights.itm or objective.weights.mlm:
                presets[f"{name}-dual-{size}"] = build(f"{name}-dual-{size}", _dual(objective))
    return presets


PRESETS = _presets()
"""`<objective>[-dual]-<size>`: the starting points of every run."""
