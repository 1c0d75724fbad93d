"""Image tower, text tower, their projections into the joint space, and the two together.

Axes: B rows, S image side, P patches, T tokens, V image width, W text width, D width of the joint space.
"""

import math
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, BertConfig, PreTrainedModel, ViTConfig

from models.codebook import Codebook
from models.config import EncoderConfig, InputError, TemperatureConfig, TextConfig, VisionConfig
from models.fusion import FusionEncoder


def resolve(config: EncoderConfig, vocab_size: int | None = None) -> EncoderConfig:
    """The configuration with every backbone's own architecture written in, so that it can be rebuilt without a hub.

    `vocab_size` is the tokeniser's. Raises InputError for a backbone that is not there or does not fit.
    """
    vision, text = config.vision, config.text
    if vocab_size is not None:
        text = text.model_copy(update={"vocab_size": vocab_size})
    if not vision.architecture:
        vision = vision.model_copy(update={"architecture": _vision_architecture(vision)})
    if not text.architecture:
        text = text.model_copy(update={"architecture": _text_architecture(text)})
    positions = _positions(text.architecture, text.max_tokens)
    if text.max_tokens > positions:
        raise InputError(
            f"encoder.text.max_tokens: {text.max_tokens} is more than the {positions} positions of the text tower"
        )
    return config.model_copy(update={"vision": vision, "text": text})


def _named_architecture(name: str, field: str) -> dict[str, Any]:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{field}: no transformers model at {name!r} ({str(error).splitlines()[0]})") from error
    part = getattr(config, "vision_config" if "vision" in field else "text_config", config)  # of a pair such as CLIP
    if type(part) not in MODEL_MAPPING:
        raise InputError(f"{field}: transformers has no encoder for the {part.model_type} of {name!r}; take another")
    return dict(part.to_dict())


def _vision_architecture(config: VisionConfig) -> dict[str, Any]:
    if config.backbone:
        return _named_architecture(config.backbone, "encoder.vision.backbone")
    if config.image_size < config.patch_size:
        raise InputError(f"encoder.vision.image_size: {config.image_size} is less than a patch ({config.patch_size})")
    _require_heads("vision", config.width, config.heads)
    return ViTConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=round(config.width * config.mlp_ratio),
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).to_dict()


def _text_architecture(config: TextConfig) -> dict[str, Any]:
    if config.backbone:
        return _named_architecture(config.backbone, "encoder.text.backbone")
    _require_heads("text", config.width, config.heads)
    return BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=round(config.width * config.mlp_ratio),
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
    ).to_dict()


def _require_heads(tower: str, width: int, heads: int) -> None:
    if width % heads:
        raise InputError(f"encoder.{tower}.heads: {heads} does not divide encoder.{tower}.width {width}")


def _positions(architecture: dict[str, Any], unlimited: int) -> int:
    """Tokens a text backbone takes; RoBERTa and models like it leave the rows up to the padding token's unused."""
    rows = int(architecture.get("max_position_embeddings") or unlimited)
    model = architecture["model_type"]
    numbered_late = "roberta" in model or model in ("camembert", "data2vec-text", "longformer", "mpnet", "xmod")
    return rows - architecture["pad_token_id"] - 1 if numbered_late else rows


def _backbone(architecture: dict[str, Any], pretrained: str) -> PreTrainedModel:
    """A `transformers` encoder in float32, without pooling layer; with published weights where `pretrained` names them.

    Raises InputError where those cannot be read.
    """
    config = AutoConfig.for_model(**architecture)
    model_class = MODEL_MAPPING[type(config)]
    has_pooler = "add_pooling_layer" in signature(model_class.__init__).parameters
    options = {"add_pooling_layer": False} if has_pooler else {}
    if not pretrained:
        return AutoModel.from_config(config, **options).float()
    try:
        return model_class.from_pretrained(pretrained, use_safetensors=True, **options).float()
    except (OSError, ValueError) as error:
        raise InputError(f"no weights in safetensors at {pretrained!r} ({str(error).splitlines()[0]})") from error


class VisionTower(nn.Module):
    """A vision backbone whose output is always [CLS, patches in rows]."""

    def __init__(self, config: VisionConfig, pretrained: bool = False) -> None:
        super().__init__()
        self.backbone = _backbone(config.architecture, config.backbone if pretrained else "")
        self.width = int(getattr(self.backbone.config, "hidden_size", 0) or self.backbone.config.hidden_sizes[-1])
        resizes = "interpolate_pos_encoding" in signature(self.backbone.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if resizes else {}
        patch_size = config.architecture.get("patch_size")
        self._patch_size = patch_size if isinstance(patch_size, int) else 0

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N V"]:
        """Tokens of each image, CLS first; a backbone without CLS gets the mean of its patches there."""
        if (
            len(pixels) == 0
        ):  # backbones refuse an empty batch; a worker without rows still needs its parameters in the graph
            return self(pixels.new_zeros(1, *pixels.shape[1:]))[:0]
        tokens = self.backbone(pixel_values=pixels, **self._options).last_hidden_state
        if tokens.dim() == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        extra = tokens.shape[1] - self._patches(pixels.shape[-1], tokens.shape[1])
        if extra == 1:
            return tokens
        first = tokens[:, :1] if extra else tokens.mean(1, keepdim=True)
        return torch.cat([first, tokens[:, extra:]], 1)  # distillation and register tokens are left out

    def _patches(self, side: int, tokens: int) -> int:
        """How many of a model's tokens are patches: its grid, or, where it merges patches, all that make a square."""
        grid = side // self._patch_size if self._patch_size else tokens
        return grid**2 if grid**2 <= tokens else math.isqrt(tokens) ** 2


class TextTower(nn.Module):
    """A text backbone; the first token's state stands for the caption."""

    def __init__(self, config: TextConfig, pretrained: bool = False) -> None:
        super().__init__()
        self.backbone = _backbone(config.architecture, config.backbone if pretrained else "")
        self.width = int(self.backbone.config.hidden_size)
        self._looks_back = _looks_back(self.backbone)
        architecture = self.backbone.config
        self._takes_table = (architecture.model_type, architecture._attn_implementation) == ("bert", "sdpa")

    @property
    def word_embeddings(self) -> Tensor:
        """Table of word embeddings (vocabulary, W); the masked-language head shares it."""
        return self.backbone.get_input_embeddings().weight

    def forward(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T W"]:
        """State of each token; where a token sees only those before it, the last one's state is put first."""
        if len(ids) == 0:
            return self(ids.new_zeros(1, ids.shape[1]), mask.new_ones(1, ids.shape[1]))[:0]
        # BERT takes the table of who sees whom as it is; a mask of tokens it would first read back from the device.
        seen = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1) if self._takes_table else mask
        states = self.backbone(input_ids=ids, attention_mask=seen).last_hidden_state
        if self._looks_back:
            last = states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
            states = torch.cat([last[:, None], states[:, 1:]], 1)
        return states


@torch.no_grad()
def _looks_back(backbone: PreTrainedModel) -> bool:
    """Whether a token's state is blind to what follows (CLIP's text tower): found by changing the second of two."""
    ids, training = torch.tensor([[0, 0], [0, 1]]), backbone.training
    first = backbone.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    backbone.train(training)
    return torch.equal(first[0], first[1])


class Heads(NamedTuple):
    """What an objective's terms need besides the towers and projections; nothing is built that no term needs."""

    matching: bool = False
    """Matching head for itm, with a fusion encoder."""
    language: bool = False
    """Masked-language head for mlm, with a fusion encoder."""
    sigmoid: bool = False
    """Scale and bias for cma of kind sigmoid."""
    codes: int = 0
    """Rows of the codebook; 0: no codebook."""


class DualEncoder(nn.Module):
    """Both towers and their projections; fusion encoder and codebook where the objective has them."""

    def __init__(
        self,
        config: EncoderConfig,
        heads: Heads | None = None,
        temperature: TemperatureConfig | None = None,
        pretrained: bool = False,
    ) -> None:
        """`config` must be resolved."""
        super().__init__()
        heads = heads or Heads()
        self.vision = VisionTower(config.vision, pretrained)
        self.text = TextTower(config.text, pretrained)
        self.image_projection = nn.Linear(self.vision.width, config.embed_dim)
        self.text_projection = nn.Linear(self.text.width, config.embed_dim)
        self.fusion: FusionEncoder | None = None
        if heads.matching or heads.language:
            widths = self.text.width, self.vision.width
            self.fusion = FusionEncoder(config, *widths, heads.matching, heads.language)
        temperature = temperature or TemperatureConfig()
        self.temperature = nn.Parameter(torch.tensor(temperature.start), requires_grad=temperature.learn)
        if heads.sigmoid:  # SigLIP's scale (as a logarithm) and bias, arXiv 2303.15343
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
            self.bias = nn.Parameter(torch.tensor(-10.0))
        # Last, so that the other weights of a seed are the same with and without it.
        self.codebook = Codebook(heads.codes, config.embed_dim) if heads.codes else None

    def encode_image(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N V"]:
        """Image tokens, CLS first, then patches in rows."""
        return self.vision(pixels)

    def encode_text(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T W"]:
        """Text tokens, CLS first."""
        return self.text(ids, mask)

    def project_image(self, states: Float[Tensor, "... V"]) -> Float[Tensor, "... D"]:
        """Unit vectors of image states in the joint space, in the precision of the weights."""
        return F.normalize(self.image_projection(states).to(self.image_projection.weight.dtype), dim=-1)

    def project_text(self, states: Float[Tensor, "... W"]) -> Float[Tensor, "... D"]:
        """Unit vectors of text states in the joint space, in the precision of the weights."""
        return F.normalize(self.text_projection(states).to(self.text_projection.weight.dtype), dim=-1)
