import json
import math

import pytest
import torch
import torch.nn.functional as F

from models.metrics import (
    RECALL_AT,
    Relevance,
    best_ranks,
    recall_from_features,
    retrieval_recall,
    zero_shot_accuracy,
)
from tests.support.paths import GOLDEN

PROTOCOL = GOLDEN / "tcl" / "protocol.json"


def by_loops(score_i2t, score_t2i, owner, caption_id):
    """The definition, one query at a time."""
    images, captions = len(score_i2t), len(score_t2i)
    words = [{int(caption_id[c]) for c in range(captions) if owner[c] == i} for i in range(images)]
    ranks = {"text_retrieval": [], "image_retrieval": []}
    for i in range(images):
        right = {c for c in range(captions) if int(caption_id[c]) in words[i]}
        best = max(score_i2t[i][c] for c in right)
        ranks["text_retrieval"].append(sum(score_i2t[i][c] >= best for c in range(captions) if c not in right))
    for c in range(captions):
        right = {i for i in range(images) if int(caption_id[c]) in words[i]}
        best = max(score_t2i[c][i] for i in right)
        ranks["image_retrieval"].append(sum(score_t2i[c][i] >= best for i in range(images) if i not in right))
    return {f"{n}_recall_at_{k}": sum(r < k for r in rows) / len(rows) for n, rows in ranks.items() for k in RECALL_AT}


def test_recall_equals_the_reference():
    case = json.loads(PROTOCOL.read_text())["recall"]
    i2t, t2i = torch.tensor(case["scores_i2t"]), torch.tensor(case["scores_t2i"])
    owner = torch.arange(len(t2i)) // case["captions_per_image"]
    ours = retrieval_recall(i2t, t2i, owner)
    for k in RECALL_AT:
        assert 100 * ours[f"text_retrieval_recall_at_{k}"] == pytest.approx(case["metrics"][f"txt_r{k}"])
        assert 100 * ours[f"image_retrieval_recall_at_{k}"] == pytest.approx(case["metrics"][f"img_r{k}"])


@pytest.mark.parametrize("wordings", [1000, 15])
def test_recall_equals_the_definition_with_uneven_captions_ties_and_equal_captions(wordings):
    generator = torch.Generator().manual_seed(wordings)
    owner = torch.cat([torch.arange(12), torch.randint(0, 12, (25,), generator=generator)])
    caption_id = torch.randint(-wordings, 0, (37,), generator=generator)
    i2t = torch.randint(0, 9, (12, 37), generator=generator).float()  # few levels: many ties
    t2i = torch.randint(0, 9, (37, 12), generator=generator).float()
    expected = by_loops(i2t.tolist(), t2i.tolist(), owner.tolist(), caption_id)
    assert retrieval_recall(i2t, t2i, owner.tolist(), caption_id) == pytest.approx(expected)


def test_features_and_their_score_matrix_give_the_same_recall_in_any_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    owner = torch.arange(60) // 2
    texts = F.normalize(images[owner] + torch.randn(60, 8, generator=generator), dim=1)
    relevance = Relevance.of(30, owner, torch.arange(60) // 3)
    whole = recall_from_features(images, texts, relevance)
    assert 0 < whole["image_retrieval_recall_at_1"] < whole["image_retrieval_recall_at_10"] < 1
    monkeypatch.setattr("models.metrics._CHUNK", 7)
    assert recall_from_features(images, texts, relevance) == pytest.approx(whole)
    assert retrieval_recall(images @ texts.T, texts @ images.T, owner, torch.arange(60) // 3) == pytest.approx(whole)


@pytest.mark.parametrize("collapsed", [0.5, math.nan])
def test_a_collapsed_model_has_no_recall(collapsed):
    scores = torch.full((20, 20), collapsed)
    result = retrieval_recall(scores, scores, range(20))
    assert set(result.values()) == {0.0}


def test_a_row_without_a_relevant_item_misses_at_every_depth():
    ranks = best_ranks(torch.zeros(2, 1), torch.tensor([[True], [False]]))
    assert ranks[0] == 0 and ranks[1] > 10**6


def test_zero_shot_accuracy_counts_nearest_classes():
    classes = torch.eye(3)
    images = F.normalize(torch.tensor([[3.0, 1, 0], [0, 2, 1], [1, 0, 0.5], [1, 1, 0]]), dim=1)
    assert zero_shot_accuracy(images, classes, torch.tensor([0, 1, 2, 0])) == 0.5
