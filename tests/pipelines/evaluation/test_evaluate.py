from dataclasses import replace

import numpy as np
import pytest
import torch

from models.config import EncoderConfig, InputError
from models.encoders import DualEncoder, Heads, resolve
from models.inference import Package
from models.metrics import retrieval_recall
from models.normalize import normalize
from models.preprocess import CaptionTokenizer, PreprocessorConfig, train_tokenizer
from pipelines.evaluation import rerank as rerank_module
from pipelines.evaluation.evaluate import encode, score, two_stage_scores
from pipelines.evaluation.rerank import UNRANKED, Gallery, Tokens, rerank

WORDS = ["red", "green", "blue", "tall", "small", "square", "circle", "star", "seven", "nine", "left", "above"]
IMAGES = 20


def captions_of(image):
    """One to three captions, all different over the images."""
    return [
        f"{WORDS[image % 12]} {WORDS[(image * 5 + turn) % 11]} number {image} {turn}" for turn in range(1 + image % 3)
    ]


def make_package(matching=True):
    texts = [caption for image in range(IMAGES) for caption in captions_of(image)]
    tokenizer = CaptionTokenizer.from_json(train_tokenizer(texts * 2, 200).to_str())
    config = EncoderConfig.model_validate(
        {"vision": {"image_size": 16, "width": 16, "layers": 1}, "text": {"width": 16, "layers": 1, "max_tokens": 9}}
    )
    torch.manual_seed(3)
    config = resolve(config, tokenizer.vocab_size)
    model = DualEncoder(config, Heads(matching=matching)).eval()
    for parameter in model.parameters():  # untrained weights hardly look at their input: make them
        parameter.data.mul_(4)
    preprocessor = PreprocessorConfig(image_size=16, max_tokens=9)
    return Package(config, model, tokenizer, preprocessor, "space", "name")


@pytest.fixture(scope="module")
def package():
    torch.set_num_threads(1)
    return make_package()


@pytest.fixture(scope="module")
def rows():
    """A row an image, with a picture that comes twice under one id and rows that cannot be used."""
    generator = np.random.default_rng(1)
    pictures = generator.integers(0, 256, (IMAGES, 16, 16, 3), np.uint8)
    listing = [(i, pictures[i], captions_of(i), "") for i in range(IMAGES)]
    listing.insert(7, (900, np.zeros_like(pictures[0]), ["broken"], "unreadable"))
    listing.append((3, pictures[3], ["a further caption of three"], ""))
    listing.append((901, pictures[0], [""], ""))
    return listing


def batches(listing, size):
    for start in range(0, len(listing), size):
        image_id, image, captions, reason = zip(*listing[start : start + size], strict=True)
        texts = np.empty(len(captions), object)
        texts[:] = captions
        yield {
            "image": np.stack(image),
            "image_id": np.array(image_id, np.int64),
            "captions": texts,
            "reason": np.array(reason),
        }


@pytest.fixture(scope="module")
def by_hand(package, rows):
    with torch.inference_mode():
        return single_pairs(package, rows)


def single_pairs(package, listing):
    """Cosines and match logits of all pairs, one at a time, and the image of each caption."""
    model = package.model
    images, texts, owner = [], [], []
    for image_id, picture, captions, reason in listing:
        if reason or not any(captions):
            continue
        if image_id not in [known for known, _ in images]:
            images.append((image_id, model.encode_image(normalize(torch.from_numpy(picture)[None]))))
        for caption in captions:
            ids, mask = (torch.from_numpy(array) for array in package.tokenizer.encode([caption], 9))
            texts.append((model.encode_text(ids.long(), mask.bool()), mask.bool()))
            owner.append([known for known, _ in images].index(image_id))
    cosine = torch.zeros(len(images), len(texts))
    match = torch.zeros(len(images), len(texts))
    for i, (_, image) in enumerate(images):
        for c, (text, mask) in enumerate(texts):
            cosine[i, c] = (model.project_image(image[:, 0]) * model.project_text(text[:, 0])).sum()
            match[i, c] = model.fusion.match_logits(text, mask, image)[0, 1]
    return cosine, match, owner


def keep_top(cosine, match, top):
    """The match logit of each row's nearest, one row at a time."""
    scores = torch.full_like(cosine, UNRANKED)
    for row in range(len(cosine)):
        for column in sorted(range(cosine.shape[1]), key=lambda c: -cosine[row, c])[:top]:
            scores[row, column] = match[row, column]
    return scores


@pytest.mark.parametrize("size", [1, 5, 100])
def test_scores_equal_those_of_single_pairs_in_any_batches(package, rows, by_hand, size, monkeypatch):
    monkeypatch.setattr(rerank_module, "BATCH", 7)
    monkeypatch.setattr(rerank_module, "_QUERIES", 3)
    cosine, match, owner = by_hand
    metrics = score(package, batches(rows, size), rerank_top=6)
    expected = retrieval_recall(cosine, cosine.T, owner)
    second = retrieval_recall(keep_top(cosine, match, 6), keep_top(cosine.T, match.T, 6), owner)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
    for name, value in second.items():
        if not name.endswith("_10"):  # beyond the candidates all scores are equal
            assert metrics[name + "_reranked"] == pytest.approx(value), name
    assert 0 < metrics["text_retrieval_recall_at_10_reranked"] < 1
    counts = {name: metrics[name] for name in ("images", "captions", "skipped", "rerank_queries", "rerank_top")}
    assert counts == {"images": 20, "captions": len(owner), "skipped": 2, "rerank_queries": len(owner), "rerank_top": 6}


def test_two_stage_scores_are_the_match_logits_of_the_nearest(package, rows, by_hand, monkeypatch):
    monkeypatch.setattr(rerank_module, "BATCH", 11)
    cosine, match, _ = by_hand
    gallery = encode(package, batches(rows, 8), keep_tokens=True)
    tokens, fusion = gallery.tokens, package.model.fusion
    inputs = (gallery.images, gallery.texts, tokens.image, tokens.text, tokens.mask, fusion.match_logits)
    for top in (1, 4, 10_000):
        i2t, t2i = two_stage_scores(*inputs, top)
        torch.testing.assert_close(i2t, keep_top(cosine, match, top), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(t2i, keep_top(cosine.T, match.T, top), rtol=1e-4, atol=1e-5)


class Knowing(torch.nn.Module):
    """A fusion encoder that reads the image's number in its first token and the caption's in its own."""

    def image_memory(self, tokens):
        return [Memory(tokens)]

    def forward(self, states, mask, memory):
        return torch.cat([states, memory[0].tokens], 2)

    def matching(self, both):
        right = (both[:, 0] == both[:, 1]).float()
        return torch.stack([1 - right, right], 1)


class Memory:
    def __init__(self, tokens):
        self.tokens = tokens

    def rows(self, index):
        return Memory(self.tokens[index])


def test_a_perfect_matcher_lifts_what_the_first_stage_found_and_nothing_else(package, rows):
    gallery = encode(package, batches(rows, 50), keep_tokens=False)
    captions = len(gallery.texts)
    tokens = Tokens(
        torch.arange(IMAGES).float()[:, None, None],
        gallery.relevance.owner.float()[:, None, None],
        torch.ones(captions, 1, dtype=torch.bool),
    )
    first = score(package, batches(rows, 50))
    knowing = rerank(replace(gallery, tokens=tokens), Knowing(), torch.device("cpu"), 5, 2000)
    for side in ("image", "text"):
        found = first[f"{side}_retrieval_recall_at_5"]
        assert first[f"{side}_retrieval_recall_at_1"] < found < 1
        for depth in (1, 5, 10):
            assert knowing[f"{side}_retrieval_recall_at_{depth}_reranked"] == pytest.approx(found)


def test_queries_are_limited_and_counted(package, rows):
    metrics = score(package, batches(rows, 50), rerank_top=50, rerank_queries=7)
    assert metrics["rerank_queries"] == 7
    assert (metrics["text_retrieval_recall_at_1_reranked"] * 7) % 1 == pytest.approx(0, abs=1e-9)
    assert metrics["rerank_top"] == metrics["captions"]


@pytest.mark.parametrize(("matching", "top"), [(False, 16), (True, 0)])
def test_without_rerank_no_token_states_are_kept(rows, matching, top, monkeypatch):
    kept = []
    monkeypatch.setattr(
        "pipelines.evaluation.evaluate.Gallery", lambda *parts: kept.append(parts[3]) or Gallery(*parts)
    )
    metrics = score(make_package(matching), batches(rows, 50), rerank_top=top)
    assert kept == [None]
    assert not any("rerank" in name for name in metrics)


def test_no_usable_row_is_said_in_one_line(package, rows):
    broken = [row for row in rows if row[3]]
    with pytest.raises(InputError, match=r"^no usable pair among 1 rows; .*lint"):
        score(package, batches(broken, 4))
