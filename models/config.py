"""What a model and its objective are made of: frozen, checked, stored beside every checkpoint."""

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.fields import FieldInfo

from models.redact import redact

ConfigT = TypeVar("ConfigT", bound="Config")
PACKAGE_FORMAT = "triptych-package-1"
"""Value of `format` in the `config.json` of a package."""


class InputError(Exception):
    """Something the user gave is wrong: one line that says what, where and what to do; URLs in it are redacted.

    No ValueError, so that it passes the `except ValueError` around a parser. Pydantic's validators, which turn
    ValueErrors alone into their own kind, must not raise it.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(redact(str(text)))


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"learning_rate": 1e-3}} -> {"optim.learning_rate": 1e-3}; empty mappings vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


class Failed(RuntimeError):
    """Work that had begun ended without its result: one line that says why."""


class Config(BaseModel):
    """Immutable, without unknown keys; the strings under the fields are the flags' help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def override(self: ConfigT, changes: Mapping[str, Any]) -> ConfigT:
        """A copy with dotted keys changed, e.g. {"optim.learning_rate": 1e-4}; raises KeyError for an unknown key."""
        tree = self.model_dump()
        for dotted, value in changes.items():
            *parents, leaf = dotted.split(".")
            node = reduce(getitem, parents, tree)
            if leaf not in node:
                raise KeyError(dotted)
            node[leaf] = value
        return self.model_validate(tree)

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
        """(dotted key, field, value) of every field that is no section of its own, in the order of the fields."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Config):
                yield from value.leaves(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field, value


class VisionConfig(Config):
    """Image tower: a `transformers` vision model."""

    backbone: str = Field("", examples=["google/vit-base-patch16-224"])
    """Local folder or hub name of a `transformers` vision model; empty builds a ViT from the numbers below."""
    image_size: PositiveInt = 32
    """Side of the square input image, pixels."""
    patch_size: PositiveInt = 8
    """Side of a patch, pixels."""
    width: PositiveInt = 64
    """Width of a token."""
    layers: PositiveInt = 4
    """Transformer blocks."""
    heads: PositiveInt = 4
    """Attention heads."""
    mlp_ratio: PositiveFloat = 4.0
    """Width of the feed-forward layer over `width`."""
    layer_norm_eps: PositiveFloat = 1e-6
    """Epsilon of layer normalisation."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of new weights."""
    architecture: dict[str, Any] = {}
    """The backbone's own configuration, filled in when it is first loaded; a checkpoint needs no hub."""


class TextConfig(Config):
    """Text tower: a `transformers` text encoder."""

    backbone: str = Field("", examples=["google-bert/bert-base-uncased"])
    """Local folder or hub name of a `transformers` text encoder; empty builds a BERT from the numbers below."""
    tokenizer: str = Field("", examples=["google-bert/bert-base-uncased"])
    """Folder or hub name of a `transformers` tokeniser; empty: the backbone's own, or one trained on the corpus."""
    vocab_size: PositiveInt = 4096
    """Words of the vocabulary; a tokeniser trained on the corpus has at most so many."""
    max_tokens: Annotated[int, Ge(2)] = 25
    """Tokens kept of a caption, [CLS] included."""
    max_positions: PositiveInt = 64
    """Rows of the position table."""
    width: PositiveInt = 64
    """Width of a token."""
    layers: PositiveInt = 2
    """Transformer layers."""
    heads: PositiveInt = 4
    """Attention heads, of the fusion layers too."""
    mlp_ratio: PositiveFloat = 4.0
    """Width of the feed-forward layer over `width`, of the fusion layers too."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout of hidden states and attention, of the fusion layers too."""
    layer_norm_eps: PositiveFloat = 1e-12
    """Epsilon of layer normalisation, of the fusion layers too."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of new weights, of the fusion layers too."""
    architecture: dict[str, Any] = {}
    """The backbone's own configuration, filled in when it is first loaded; a checkpoint needs no hub."""


class FusionConfig(Config):
    """Cross-modal encoder: text states attend to image tokens. Built only where a term needs it."""

    layers: PositiveInt = 2
    """Fusion layers."""


class EncoderConfig(Config):
    """The encoders: two towers, their projections and the fusion encoder."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    fusion: FusionConfig = FusionConfig()
    embed_dim: PositiveInt = 64
    """Width of the joint space."""


class TemperatureConfig(Config):
    """The scale of every contrastive softmax."""

    start: PositiveFloat = 0.07
    """First value."""
    learn: bool = True
    """Whether it is a parameter."""
    clamp: bool = True
    """Whether it is kept in [min, max]; retrieval fine-tuning of the reference does not."""
    min: PositiveFloat = 0.001
    """Smallest value."""
    max: PositiveFloat = 0.5
    """Largest value."""


class WeightsConfig(Config):
    """Weight of each term; 0 costs nothing: no parameter, no forward pass, no random draw."""

    cma: NonNegativeFloat = 0.0
    """Contrast across modalities."""
    imc: NonNegativeFloat = 0.0
    """Contrast within each modality."""
    lmi: NonNegativeFloat = 0.0
    """Contrast between local parts and the whole."""
    code: NonNegativeFloat = 0.0
    """Each modality predicts the code of the other."""
    ot: NonNegativeFloat = 0.0
    """Transport cost: draws the codes to the features assigned to them."""
    itm: NonNegativeFloat = 0.0
    """Image-text matching with hard negatives."""
    mlm: NonNegativeFloat = 0.0
    """Masked language modelling."""
    koleo: NonNegativeFloat = 0.0
    """Spreads the codes (KoLeo)."""


class CmaConfig(Config):
    """How modalities are contrasted."""

    kind: Literal["infonce", "clip", "sigmoid"] = "infonce"
    """infonce: against the teacher and its queue; clip: in the batch, no teacher; sigmoid: pairwise (SigLIP)."""


class TeacherConfig(Config):
    """Moving-average copy of the encoders."""

    momentum: Annotated[float, Ge(0), Le(1)] = Field(0.995, examples=[0.999])
    """Share of the old teacher kept in a step."""


class QueueConfig(Config):
    """Teacher features of earlier batches, used as further candidates."""

    size: NonNegativeInt = 65536
    """Entries of each modality."""


class DeadCodesConfig(Config):
    """Codes that no sample is nearest to, and their repair (docs/spec/codebook.md 4.1)."""

    enabled: bool = False
    """Whether they are moved to features that no code is near."""
    window_samples_per_code: PositiveInt = 20
    """Samples of each modality in a window, per code."""
    min_rel_hits: Annotated[float, Ge(0), Le(1)] = 0.01
    """Fewer than this share of a code's even share, in both modalities, is dead."""
    max_frac: Annotated[float, Ge(0), Le(1)] = 0.01
    """Largest share of the codes repaired in a window."""
    noise: NonNegativeFloat = 0.01
    """Standard deviation of what is added to the feature that a dead code becomes."""


class IpotConfig(Config):
    """Inexact proximal point transport, for fidelity experiments (docs/spec/codebook.md 3.7)."""

    beta: PositiveFloat = 0.5
    """Proximal step; the plan is about as sharp as Sinkhorn's at eps = beta / outer."""
    outer: PositiveInt = 50
    """Iterations, one exchange between workers each."""


class CodebookConfig(Config):
    """Codes shared by both modalities, and how samples are assigned to them (docs/spec/codebook.md 2.6)."""

    size: PositiveInt = 4096
    """Codes."""
    eps: PositiveFloat = 0.05
    """Regularisation of the assignment: the smaller, the sharper the targets; below tau."""
    iters: PositiveInt = 3
    """Sinkhorn iterations."""
    solver: Literal["sinkhorn", "ipot"] = "sinkhorn"
    """How the assignment is solved."""
    balance: Annotated[float, Ge(0), Le(1)] = 1.0
    """1: codes get equal mass; 0: plain softmax, which collapses; between: softly balanced."""
    tau: PositiveFloat = 0.1
    """Temperature of the student's prediction of codes; fixed."""
    beta_same: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the own modality in the targets; 0: wholly across."""
    init: Literal["normal", "queue_sample"] = "normal"
    """First codes: random directions, or teacher features once there are as many as codes."""
    freeze: Annotated[float, Ge(0), Le(1)] = 0.02
    """Share of the planned samples during which the codes stand still."""
    start: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the planned samples after which the codebook's terms set in."""
    ramp: Annotated[float, Ge(0), Le(1)] = 0.04
    """Share of the planned samples over which their weights rise from 0."""
    assign_queue: Literal["auto"] | NonNegativeInt = Field("auto", examples=["auto", 8192])
    """Queue entries in the assignment; auto: two samples a code where there are as many."""
    dist: Literal["sharded", "replicated", "local"] = "sharded"
    """Assignment over all workers with small exchanges, or on each with all rows; local: each its own (ablation)."""
    scores_mib: PositiveFloat = 512.0
    """Most memory of scores that the assignment keeps for its iterations, MiB; more are made again each time."""
    prior: Literal["uniform"] = "uniform"
    """Mass that codes should get; only uniform is there, and named because stored configurations name it."""
    koleo: NonNegativeFloat = 0.0
    """Another name of weights.koleo, beside the codebook's other settings; give one of the two."""
    dead: DeadCodesConfig = DeadCodesConfig()
    ipot: IpotConfig = IpotConfig()


class ObjectiveConfig(Config):
    """What is minimised: sum over terms of weight x term."""

    weights: WeightsConfig = WeightsConfig()
    temperature: TemperatureConfig = TemperatureConfig()
    cma: CmaConfig = CmaConfig()
    teacher: TeacherConfig = TeacherConfig()
    queue: QueueConfig = QueueConfig()
    codebook: CodebookConfig = CodebookConfig()
    alpha: Annotated[float, Ge(0), Le(1)] = 0.4
    """Share of the teacher's soft targets in cma and mlm."""
    alpha_ramp_epochs: NonNegativeFloat = 1.0
    """Epochs over which alpha rises from 0."""
    negatives: Literal["global", "local"] = "global"
    """Candidates of a batch: all workers' rows, or the worker's own (the reference's form)."""
    duplicates: Literal["mask", "positive", "ignore"] = "mask"
    """Candidates of equal image or caption: left out, positives too (retrieval fine-tuning), or negatives."""
    local_grid: Literal["sqrt", "quarter"] = "sqrt"
    """Pooled patch grid of lmi: floor(sqrt(g)) squared (pre-training) or 4 x 4 (fine-tuning), g patches a side."""
    mlm_probability: Annotated[float, Gt(0), Lt(1)] = 0.15
    """Share of the tokens that masked language modelling selects."""
    block_mib: PositiveFloat = 4.0
    """Most memory of a table of scores in lmi, code or ot, MiB; larger ones are computed in blocks of rows."""
