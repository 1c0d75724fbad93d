"""Parts of the demo: its corpus, and what it shows on its page."""

import json

import pytest
import torch

from models.config import EncoderConfig, InputError, TextConfig, VisionConfig
from models.encoders import DualEncoder, resolve
from models.package import load_package, save_package
from models.preprocess import CaptionTokenizer, PreprocessorConfig, train_tokenizer
from pipelines.data.synthetic import CorpusConfig
from pipelines.demo.run import contact_rows, make_corpus, read_pairs, series
from tests.support.pairs import png


def test_a_corpus_of_the_same_settings_is_kept_and_another_one_replaced(tmp_path):
    folder = make_corpus(tmp_path / "data", CorpusConfig(pairs=20))
    file = next((folder / "train").iterdir())
    written = file.stat().st_mtime_ns
    make_corpus(folder, CorpusConfig(pairs=20))
    assert file.stat().st_mtime_ns == written
    make_corpus(folder, CorpusConfig(pairs=20, seed=1))
    assert json.loads((folder / "corpus.json").read_text())["seed"] == 1
    assert len(read_pairs(folder / "test", 30)) == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").touch()
    with pytest.raises(InputError, match="move it"):
        make_corpus(tmp_path / "data", CorpusConfig(pairs=20))
    assert (tmp_path / "data" / "mine").exists()


def test_history_becomes_curves_and_a_repeated_step_counts_once():
    step = {"kind": "step", "samples": 64, "metrics": {"train/loss/cma": 3.0, "perf/samples_per_second": 9.0}}
    history = [
        step | {"step": 2},
        step | {"step": 1},
        step | {"step": 2, "metrics": {"train/loss/cma": 2.0}},
        {"kind": "validation", "step": 2, "samples": 128, "metrics": {"val/image_retrieval_recall_at_1": 0.1}},
    ]
    assert series(history, "step", "train/loss/", "step") == {"cma": [(1, 3.0), (2, 2.0)]}
    assert series(history, "validation", "val/", "samples") == {"image_retrieval_recall_at_1": [(128, 0.1)]}


def test_the_contact_sheet_shows_the_nearest_images_and_marks_equal_words(tmp_path):
    colours = ["red", "green", "blue", "black", "white", "yellow", "red"]
    pairs = [(f"a {colour} square", png(colour)) for colour in colours]
    tokenizer = CaptionTokenizer.from_json(train_tokenizer([caption for caption, _ in pairs], 100).to_str())
    small = EncoderConfig(
        vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
        text=TextConfig(max_tokens=8, max_positions=8, width=16, layers=1, heads=2),
        embed_dim=8,
    )
    config = resolve(small, tokenizer.vocab_size)
    torch.manual_seed(0)
    model = DualEncoder(config)
    save_package(tmp_path, config, model, tokenizer, PreprocessorConfig(image_size=16, max_tokens=8), "toy")
    package = load_package(tmp_path)
    rows = contact_rows(package, pairs, 3)
    assert [row.caption for row in rows] == [pairs[0][0], pairs[3][0], pairs[6][0]]
    for row in rows:
        assert len(row.images) == len(row.right) == 5
        own = {image for caption, image in pairs if caption == row.caption}
        assert [image in own for image in row.images] == row.right
        assert bool(row.remark) == (not any(row.right))
    assert rows[0].images == rows[2].images  # equal captions find equal pictures
