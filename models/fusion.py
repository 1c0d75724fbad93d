"""Cross-modal encoder: text states attend to image tokens; heads for matching and masked language modelling.

Post-norm BERT layers with a cross-attention between self-attention and feed-forward (ALBEF, arXiv 2107.07651).
Axes as in `models/encoders.py`; H heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import EncoderConfig, InputError


class KeysValues(NamedTuple):
    """Image tokens as one layer's cross-attention sees them; computed once and reused by every pass over the image."""

    keys: Float[Tensor, "B H N E"]
    values: Float[Tensor, "B H N E"]

    def rows(self, index: Int[Tensor, " R"]) -> "KeysValues":
        """The images at `index`."""
        return KeysValues(self.keys[index], self.values[index])

    def join(self, *others: "KeysValues") -> "KeysValues":
        """These images followed by others'."""
        return KeysValues(
            torch.cat([self.keys, *(o.keys for o in others)]), torch.cat([self.values, *(o.values for o in others)])
        )


class Attention(nn.Module):
    """Multi-head attention with a residual and layer normalisation after it."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width, width)
        self.value = nn.Linear(memory_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, memory: Float[Tensor, "B N M"]) -> KeysValues:
        """Keys and values of what is attended to."""
        return KeysValues(self._split(self.key(memory)), self._split(self.value(memory)))

    def forward(
        self, states: Float[Tensor, "B T W"], memory: KeysValues, mask: Bool[Tensor, "B 1 1 N"] | None = None
    ) -> Float[Tensor, "B T W"]:
        """New states; `mask` is true where memory may be attended to."""
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(states)), memory.keys, memory.values, attn_mask=mask, dropout_p=dropout
        )
        return self.norm(states + self.dropout(self.output(rearrange(mixed, "b h t e -> b t (h e)"))))

    def _split(self, states: Tensor) -> Tensor:
        return rearrange(states, "b t (h e) -> b h t e", h=self.heads)


class FusionLayer(nn.Module):
    """Self-attention over the caption, cross-attention to the image, feed-forward."""

    def __init__(self, config: EncoderConfig, width: int, image_width: int) -> None:
        super().__init__()
        text = config.text
        self.self_attention = Attention(width, width, text.heads, text.dropout, text.layer_norm_eps)
        self.cross_attention = Attention(width, image_width, text.heads, text.dropout, text.layer_norm_eps)
        self.intermediate = nn.Linear(width, round(width * text.mlp_ratio))
        self.output = nn.Linear(round(width * text.mlp_ratio), width)
        self.norm = nn.LayerNorm(width, eps=text.layer_norm_eps)
        self.dropout = nn.Dropout(text.dropout)

    def forward(
        self, states: Float[Tensor, "B T W"], mask: Bool[Tensor, "B 1 1 T"], image: KeysValues
    ) -> Float[Tensor, "B T W"]:
        """New states of the caption's tokens."""
        states = self.self_attention(states, self.self_attention.keys_values(states), mask)
        states = self.cross_attention(states, image)
        return self.norm(states + self.dropout(self.output(F.gelu(self.intermediate(states)))))


class LanguageHead(nn.Module):
    """Masked-language head; its output matrix is the text tower's word embedding, which is passed in."""

    def __init__(self, width: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self, states: Float[Tensor, "M W"], word_embeddings: Float[Tensor, "vocab W"]
    ) -> Float[Tensor, "M vocab"]:
        """Logits of the vocabulary at each selected position."""
        return F.linear(self.norm(F.gelu(self.dense(states))), word_embeddings, self.bias)


class FusionEncoder(nn.Module):
    """A stack of fusion layers, with the heads of the terms that are on."""

    def __init__(self, config: EncoderConfig, width: int, image_width: int, matching: bool, language: bool) -> None:
        super().__init__()
        if width % config.text.heads:
            raise InputError(f"encoder.text.heads: {config.text.heads} does not divide the text tower's width {width}")
        self.recompute = False
        """Whether layers run again in the backward pass instead of keeping their activations."""
        self.layers = nn.ModuleList(FusionLayer(config, width, image_width) for _ in range(config.fusion.layers))
        self.apply(lambda module: _initialise(module, config.text.initializer_range))
        self.matching = nn.Linear(width, 2) if matching else None
        vocab_size = config.text.architecture["vocab_size"]
        self.language = LanguageHead(width, vocab_size, config.text.layer_norm_eps) if language else None

    def image_memory(self, tokens: Float[Tensor, "B N V"]) -> list[KeysValues]:
        """The image's keys and values of each layer."""
        return [f.cross_attention.keys_values(tokens) for f in self.layers if isinstance(f, FusionLayer)]

    def forward(
        self, states: Float[Tensor, "B T W"], mask: Bool[Tensor, "B T"], memory: list[KeysValues]
    ) -> Float[Tensor, "B T W"]:
        """Caption states that have attended to the image."""
        for layer, image in zip(self.layers, memory, strict=True):
            if self.recompute and torch.is_grad_enabled():
                states = checkpoint(layer, states, mask[:, None, None, :], image, use_reentrant=False)
            else:
                states = layer(states, mask[:, None, None, :], image)
        return states

    def match_logits(
        self, states: Float[Tensor, "B T W"], mask: Bool[Tensor, "B T"], image_tokens: Float[Tensor, "B N V"]
    ) -> Float[Tensor, "B 2"]:
        """Logits of (mismatch, match) of each caption with its image."""
        assert self.matching is not None
        return self.matching(self(states, mask, self.image_memory(image_tokens))[:, 0])


def _initialise(module: nn.Module, deviation: float) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=deviation)
        nn.init.zeros_(module.bias)
