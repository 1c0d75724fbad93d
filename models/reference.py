"""Names and layout of the published TCL implementation's state dict, both ways (docs/spec/tcl.md 9.2, 9.3).

Published weights are imported through it, and parity is tested through it. `fusion_layer` is the first fusion layer of
the reference's single text stack.
"""

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders import DualEncoder
from models.teacher import FeatureQueue

_FIXED = {
    "temperature": "temp",
    "vision.backbone.embeddings.cls_token": "visual_encoder.cls_token",
    "vision.backbone.embeddings.position_embeddings": "visual_encoder.pos_embed",
}
_RULES = [
    (r"^vision\.backbone\.embeddings\.patch_embeddings\.projection\.", "visual_encoder.patch_embed.proj."),
    (r"^vision\.backbone\.layernorm\.", "visual_encoder.norm."),
    (r"^vision\.backbone\.layers\.(\d+)\.layernorm_before\.", r"visual_encoder.blocks.\1.norm1."),
    (r"^vision\.backbone\.layers\.(\d+)\.layernorm_after\.", r"visual_encoder.blocks.\1.norm2."),
    (r"^vision\.backbone\.layers\.(\d+)\.attention\.o_proj\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"^vision\.backbone\.layers\.(\d+)\.attention\.([qkv])_proj\.", r"visual_encoder.blocks.\1.attn.\2."),
    (r"^vision\.backbone\.layers\.", "visual_encoder.blocks."),
    (r"^text\.backbone\.", "text_encoder.bert."),
    (r"^image_projection\.", "vision_proj."),
    (r"^text_projection\.", "text_proj."),
    (r"^fusion\.matching\.", "itm_head."),
    (r"^fusion\.language\.dense\.", "text_encoder.cls.predictions.transform.dense."),
    (r"^fusion\.language\.norm\.", "text_encoder.cls.predictions.transform.LayerNorm."),
    (r"^fusion\.language\.bias$", "text_encoder.cls.predictions.bias"),
]
_FUSION = {
    "self_attention.output": "attention.output.dense",
    "self_attention.norm": "attention.output.LayerNorm",
    "self_attention": "attention.self",
    "cross_attention.output": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "cross_attention": "crossattention.self",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "norm": "output.LayerNorm",
}


class Mismatch(NamedTuple):
    """Reference names the model wants and the file lacks, and the other way round."""

    missing: list[str]
    unexpected: list[str]


def reference_name(name: str, fusion_layer: int) -> str:
    """The reference's name of one of our parameters; query, key and value of the vision tower end in `attn.q.` etc."""
    if name in _FIXED:
        return _FIXED[name]
    fusion = re.match(r"^fusion\.layers\.(\d+)\.(.+)\.(\w+)$", name)
    if fusion:
        layer, module, leaf = int(fusion[1]) + fusion_layer, fusion[2], fusion[3]
        prefix = next(p for p in _FUSION if module == p or module.startswith(f"{p}."))
        return f"text_encoder.bert.encoder.layer.{layer}.{_FUSION[prefix]}{module[len(prefix) :]}.{leaf}"
    for pattern, replacement in _RULES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise KeyError(f"no reference name for {name}")


def to_reference(tensors: dict[str, Tensor], fusion_layer: int) -> dict[str, Tensor]:
    """Tensors under our parameter names (weights, gradients, ...) under the reference's, q, k and v stacked."""
    named = {reference_name(name, fusion_layer): tensor for name, tensor in tensors.items()}
    for name in [n for n in named if ".attn.q." in n]:
        stack = [named.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        named[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(stack)
    return named


def from_reference(state: dict[str, Tensor], names: list[str], fusion_layer: int) -> dict[str, Tensor]:
    """The tensors of a reference state dict under our `names`; those it lacks are left out."""
    tensors = {}
    for name in names:
        source = reference_name(name, fusion_layer)
        stacked = re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", source)
        if stacked in state:
            part = "qkv".index(source.split(".attn.")[1][0]) if stacked != source else None
            tensors[name] = state[stacked] if part is None else state[stacked].chunk(3)[part]
    return tensors


def resize_positions(table: Float[Tensor, "1 P V"], tokens: int) -> Float[Tensor, "1 Q V"]:
    """A position table for another patch grid: CLS row kept, the rest resized bicubically (docs/spec/tcl.md 9.3)."""
    if table.shape[1] == tokens:
        return table
    old, new = math.isqrt(table.shape[1] - 1), math.isqrt(tokens - 1)
    grid = rearrange(table[:, 1:], "1 (h w) d -> 1 d h w", h=old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], 1)


def load_reference(
    state: dict[str, Tensor],
    model: DualEncoder,
    teacher: DualEncoder | None,
    queue: FeatureQueue | None,
    fusion_layer: int,
) -> Mismatch:
    """Fill model, teacher and queue from a pre-training or retrieval state dict; an imported queue counts as full.

    Queues of another length are left empty. Raises RuntimeError where a tensor has another shape.
    """
    state = {re.sub(r"^(text_encoder(?:_m)?)\.(?!bert\.|cls\.)", r"\1.bert.", name): t for name, t in state.items()}
    used, missing = set(), []
    for module, suffix in ((model, ""), (teacher, "_m")):
        if module is not None:
            branch = {_without_suffix(n): t for n, t in state.items() if _is_momentum(n) == bool(suffix)}
            gaps, taken = _load_branch(branch, module, fusion_layer)
            used |= {_with_suffix(name, suffix) for name in taken}
            missing += [_with_suffix(name, suffix) for name in gaps]
    queue_names = {"image_queue", "text_queue", "queue_ptr", "idx_queue"}
    if queue is not None:
        missing += _load_queue(state, queue)
    return Mismatch(missing, [n for n in state if n not in queue_names and not _is_accounted_for(n, used)])


def _is_accounted_for(name: str, used: set[str]) -> bool:
    """Loaded, or an alias of something loaded, or a momentum copy that this objective's teacher does without."""
    alias = re.sub(r"decoder\.(weight|bias)$", "bias", name)
    online = _without_suffix(alias) if _is_momentum(alias) else alias
    return name.endswith("position_ids") or alias in used or online in used


def _load_branch(state: dict[str, Tensor], module: nn.Module, fusion_layer: int) -> tuple[list[str], set[str]]:
    names = [name for name, _ in module.named_parameters()]
    found = from_reference(state, names, fusion_layer)
    positions = "vision.backbone.embeddings.position_embeddings"
    if positions in found:
        found[positions] = resize_positions(found[positions], module.get_parameter(positions).shape[1])
    module.load_state_dict(found, strict=False)
    sources = {name: re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", reference_name(name, fusion_layer)) for name in names}
    gaps = sorted({source for name, source in sources.items() if name not in found})
    return gaps, {sources[name] for name in found}


def _load_queue(state: dict[str, Tensor], queue: FeatureQueue) -> list[str]:
    """The file's queue, where it has one of our length; identities that it lacks become -100, which no sample has."""
    queue.image_id.fill_(-100)
    missing = [name for name in ("image_queue", "text_queue", "queue_ptr", "idx_queue") if name not in state]
    if missing in ([], ["idx_queue"]) and state["image_queue"].shape[1] == len(queue.image):
        queue.image.copy_(state["image_queue"].T)
        queue.text.copy_(state["text_queue"].T)
        queue.pointer.copy_(state["queue_ptr"][0])
        queue.filled.fill_(len(queue.image))
        if not missing:
            queue.image_id.copy_(state["idx_queue"][0])
    return missing


def _is_momentum(name: str) -> bool:
    return name.split(".")[0].endswith("_m")


def _without_suffix(name: str) -> str:
    top, _, rest = name.partition(".")
    return f"{top.removesuffix('_m')}.{rest}" if rest else top


def _with_suffix(name: str, suffix: str) -> str:
    top, dot, rest = name.partition(".")
    return f"{top}{suffix}{dot}{rest}"
