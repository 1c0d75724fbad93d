"""Retrieval recall and zero-shot accuracy, as fractions 0 to 1.

Axes: Q queries, G gallery items, I images, C captions, D joint width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RECALL_AT = (1, 5, 10)
_CHUNK = 1024
_MISS = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Relevance:
    """Which captions belong to which images.

    An image has one caption or several, and any of them is right; equal captions are one caption, so an image that
    carries the same words is right too. With distinct captions this is the usual COCO and Flickr30K protocol.
    """

    images: int
    owner: Int[Tensor, " C"]
    """Image of each caption, 0 to images - 1."""
    wording: Int[Tensor, " C"]
    """Equal numbers, equal captions; 0 to the number of wordings - 1."""

    @classmethod
    def of(cls, images: int, owner: Int[Tensor, " C"], caption_id: Int[Tensor, " C"] | None = None) -> "Relevance":
        """From any hash of the captions; without one, all captions are different."""
        if caption_id is None:
            return cls(images, owner, torch.arange(len(owner)))
        return cls(images, owner, torch.unique(caption_id, return_inverse=True)[1])

    def of_images(self, rows: Int[Tensor, " Q"]) -> Bool[Tensor, "Q C"]:
        """True where a caption belongs to the image of the row; rows are all different."""
        place = torch.full((self.images,), -1)
        place[rows] = torch.arange(len(rows))
        mine = place[self.owner]
        # Over wordings first, so that the same words under another image count; there are at most C of them.
        has_wording = torch.zeros(len(rows), len(self.owner), dtype=torch.bool)
        has_wording[mine[mine >= 0], self.wording[mine >= 0]] = True
        return has_wording[:, self.wording]

    def of_captions(self, rows: Int[Tensor, " Q"]) -> Bool[Tensor, "Q I"]:
        """True where an image has the caption of the row."""
        wordings, which = torch.unique(self.wording[rows], return_inverse=True)
        place = torch.full((len(self.owner),), -1)
        place[wordings] = torch.arange(len(wordings))
        mine = place[self.wording]
        has_image = torch.zeros(len(wordings), self.images, dtype=torch.bool)
        has_image[mine[mine >= 0], self.owner[mine >= 0]] = True
        return has_image[which]


def best_ranks(scores: Float[Tensor, "Q G"], relevant: Bool[Tensor, "Q G"]) -> Int[Tensor, " Q"]:
    """Rank (0 = first) of the best relevant item of each row.

    A tie counts against it, and so does NaN, so that a collapsed model scores nothing; a row without a relevant item
    misses at every depth.
    """
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    above = (~(scores < best) & ~relevant).sum(1)
    return torch.where(relevant.any(1), above, _MISS)


def recall_at(name: str, ranks: Int[Tensor, " Q"], suffix: str = "") -> dict[str, float]:
    """`<name>_recall_at_<k><suffix>`: the share of queries whose rank is below k."""
    return {f"{name}_recall_at_{k}{suffix}": (ranks < k).double().mean().item() for k in RECALL_AT}


def _ranks(
    scores_of: Callable[[Tensor], Tensor], relevant_of: Callable[[Tensor], Tensor], queries: int
) -> Int[Tensor, " Q"]:
    return torch.cat([best_ranks(scores_of(rows), relevant_of(rows)) for rows in torch.arange(queries).split(_CHUNK)])


def retrieval_recall(
    score_i2t: Float[Tensor, "I C"],
    score_t2i: Float[Tensor, "C I"],
    owners: Sequence[int] | Int[Tensor, " C"],
    caption_id: Int[Tensor, " C"] | None = None,
) -> dict[str, float]:
    """Recall both ways from full score matrices: images find texts (text retrieval), captions find images.

    `owners` is the image of each caption; captions of equal `caption_id` are one caption.
    """
    relevance = Relevance.of(len(score_i2t), torch.as_tensor(owners), caption_id)
    text = _ranks(lambda rows: score_i2t[rows], relevance.of_images, len(score_i2t))
    image = _ranks(lambda rows: score_t2i[rows], relevance.of_captions, len(score_t2i))
    return recall_at("image_retrieval", image) | recall_at("text_retrieval", text)


def recall_from_features(
    images: Float[Tensor, "I D"], texts: Float[Tensor, "C D"], relevance: Relevance
) -> dict[str, float]:
    """Recall both ways by the cosine of unit vectors; a thousand rows of the score matrix exist at a time."""
    text = _ranks(lambda rows: images[rows] @ texts.T, relevance.of_images, len(images))
    image = _ranks(lambda rows: texts[rows] @ images.T, relevance.of_captions, len(texts))
    return recall_at("image_retrieval", image) | recall_at("text_retrieval", text)


def zero_shot_accuracy(images: Float[Tensor, "I D"], classes: Float[Tensor, "K D"], labels: Int[Tensor, " I"]) -> float:
    """Share of images nearest to their own class vector (the unit mean of its prompts); a tie counts as wrong."""
    label_of = torch.nn.functional.one_hot(labels, len(classes)).bool()
    ranks = _ranks(lambda rows: images[rows] @ classes.T, lambda rows: label_of[rows], len(images))
    return (ranks == 0).double().mean().item()
