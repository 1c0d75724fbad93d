"""The second stage of retrieval: the fusion encoder over each query's nearest candidates.

Axes: I images, C captions, Q queries, K candidates, D joint width, N image tokens, T text tokens.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.fusion import FusionEncoder
from models.metrics import Relevance, best_ranks, recall_at

logger = logging.getLogger(__name__)

BATCH = 256
"""Images, captions or pairs in one pass."""
UNRANKED = -100.0
"""Score of a pair that the fusion encoder has not seen (TCL's evaluation)."""
_QUERIES = 1024

Match = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(text tokens, text mask, tokens of some images, which of these belongs to each text) -> logits (pairs, 2)."""


@dataclass(frozen=True)
class Tokens:
    """Token states of a whole gallery, in main memory: kept only where pairs are re-ranked."""

    image: Tensor
    """(I, N, image width)"""
    text: Tensor
    """(C, T, text width)"""
    mask: Tensor
    """(C, T)"""


@dataclass(frozen=True)
class Gallery:
    """Encoded images and captions; an image with several captions, or in several rows, is there once."""

    images: Tensor
    """(I, D), unit length"""
    texts: Tensor
    """(C, D), unit length"""
    relevance: Relevance
    tokens: Tokens | None
    skipped: int
    """Rows that could not be used."""


def nearest(queries: Tensor, items: Tensor, top: int) -> Tensor:
    """Rows of the `top` items (or all) with the highest inner product, (Q, K); a part of the matrix at a time."""
    top = min(top, len(items))
    return torch.cat([(some @ items.T).topk(top, 1).indices for some in queries.split(_QUERIES)])


def _pair_logits(tokens: Tokens, images: Tensor, captions: Tensor, match: Match, device: torch.device) -> Tensor:
    """The match logit of each (image, caption); a pair that comes twice is computed once.

    Pairs are taken by image, so that what the fusion encoder makes of an image serves all its captions in a pass.
    """
    keys, back = torch.unique(images * len(tokens.text) + captions, return_inverse=True)
    logits = []
    for some in keys.split(BATCH):
        images, which = torch.unique_consecutive(some // len(tokens.text), return_inverse=True)
        rows = some % len(tokens.text)
        inputs = (tokens.text[rows], tokens.mask[rows], tokens.image[images], which)
        logits.append(match(*(tensor.to(device) for tensor in inputs))[:, 1].float().cpu())
    return torch.cat(logits)[back]


def _both_ways(
    tokens: Tokens, match: Match, device: torch.device, captions: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Match logits (Q, K) of image queries and of caption queries, each given as (query rows, candidate rows)."""
    asked_images, asked_captions = captions[0][:, None].expand_as(captions[1]), images[0][:, None].expand_as(images[1])
    first = torch.cat([asked_images.flatten(), images[1].flatten()])
    second = torch.cat([captions[1].flatten(), asked_captions.flatten()])
    logits = _pair_logits(tokens, first, second, match, device)
    return logits[: captions[1].numel()].view_as(captions[1]), logits[captions[1].numel() :].view_as(images[1])


@torch.inference_mode()
def two_stage_scores(
    image_features: Tensor,
    text_features: Tensor,
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_mask: Tensor,
    match_logits_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    top: int,
) -> tuple[Tensor, Tensor]:
    """Scores (I, C) and (C, I) of TCL's evaluation: the match logit of each query's `top` nearest, else UNRANKED.

    `match_logits_fn(text_tokens, text_mask, image_tokens)` gives logits of (mismatch, match).
    """
    captions = nearest(image_features, text_features, top).cpu()
    images = nearest(text_features, image_features, top).cpu()
    logits_i2t, logits_t2i = _both_ways(
        Tokens(image_tokens, text_tokens, text_mask),
        lambda text, mask, images, which: match_logits_fn(text, mask, images[which]),
        image_tokens.device,
        (torch.arange(len(captions)), captions),
        (torch.arange(len(images)), images),
    )
    score_i2t = torch.full((len(captions), len(images)), UNRANKED).scatter(1, captions, logits_i2t)
    score_t2i = torch.full((len(images), len(captions)), UNRANKED).scatter(1, images, logits_t2i)
    return score_i2t, score_t2i


def _matcher(fusion: FusionEncoder) -> Match:
    """Matching by the fusion encoder, with the keys and values of an image made once a pass."""
    head = fusion.matching
    assert head is not None

    def match(text: Tensor, mask: Tensor, images: Tensor, which: Tensor) -> Tensor:
        memory = [layer.rows(which) for layer in fusion.image_memory(images)]
        return head(fusion(text, mask, memory)[:, 0])

    return match


def _spread(count: int, most: int) -> Tensor:
    """At most `most` rows of `count`, evenly spaced, the same every time."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


@torch.inference_mode()
def rerank(gallery: Gallery, fusion: FusionEncoder, device: torch.device, top: int, queries: int) -> dict[str, float]:
    """`..._reranked` recall both ways: the match logit of the `top` nearest decides, all others come after them.

    At most `queries` queries a side are asked, evenly spaced over the gallery.
    """
    assert gallery.tokens is not None
    asked = _spread(len(gallery.images), queries), _spread(len(gallery.texts), queries)
    captions = nearest(gallery.images[asked[0]], gallery.texts, top)
    images = nearest(gallery.texts[asked[1]], gallery.images, top)
    logger.info("re-ranking %d candidates of %d and %d queries", top, len(asked[0]), len(asked[1]))
    logits = _both_ways(gallery.tokens, _matcher(fusion), device, (asked[0], captions), (asked[1], images))
    relevance = gallery.relevance
    text = _candidate_ranks(asked[0], captions, logits[0], relevance.of_images)
    image = _candidate_ranks(asked[1], images, logits[1], relevance.of_captions)
    scores = recall_at("image_retrieval", image, "_reranked") | recall_at("text_retrieval", text, "_reranked")
    counts = {
        "rerank_queries": max(map(len, asked)),
        "rerank_top": min(top, max(len(gallery.images), len(gallery.texts))),
    }
    return scores | {name: float(count) for name, count in counts.items()}


def _candidate_ranks(rows: Tensor, found: Tensor, logits: Tensor, relevant: Callable[[Tensor], Tensor]) -> Tensor:
    parts = zip(rows.split(_QUERIES), found.split(_QUERIES), logits.split(_QUERIES), strict=True)
    return torch.cat([best_ranks(score, relevant(row).gather(1, place)) for row, place, score in parts])
