"""What a replica computes is what evaluation computes: batches, padding and order change nothing."""

import numpy as np
import pytest
import torch

from models import inference
from models.normalize import normalize
from models.preprocess import clean_caption
from tests.support.paths import ROOT
from tests.support.serving_models import save_small

TEXTS = [clean_caption(text) for text in ["a", "picture number seven of noise", "noise", "number 3 3 3 3 3 of 3"] * 9]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("package") / "p", matching=True)


def images(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def evaluated_texts(package) -> np.ndarray:
    """One at a time, with all padding, as evaluation pads."""
    rows = []
    for text in TEXTS:
        ids, mask = package.tokenizer.encode([text], package.preprocessor.max_tokens)
        with torch.inference_mode():
            states = package.model.encode_text(torch.from_numpy(ids).long(), torch.from_numpy(mask).bool())
            rows.append(package.model.project_text(states[:, 0])[0].numpy())
    return np.stack(rows)


def test_texts_of_any_length_in_any_batch_have_the_evaluated_vectors(package):
    rows = package.tokenizer.encode_rows(TEXTS, package.preprocessor.max_tokens)
    assert len({len(row) for row in rows}) > 2
    assert np.abs(inference.embed_texts(package, rows) - evaluated_texts(package)).max() < 1e-5


def test_images_have_the_evaluated_vectors(package):
    pixels = images(5)
    with torch.inference_mode():
        states = [package.model.encode_image(normalize(torch.from_numpy(one[None]))) for one in pixels]
        expected = np.stack([package.model.project_image(one[:, 0])[0].numpy() for one in states])
    assert np.abs(inference.embed_images(package, pixels) - expected).max() < 1e-5


def test_no_other_module_projects_into_the_joint_space_than_inference_and_the_training_step():
    sources = [path for room in ("models", "pipelines", "serving", "tuning") for path in (ROOT / room).rglob("*.py")]
    callers = {path.relative_to(ROOT).as_posix() for path in sources if ".project_" in path.read_text()}
    assert callers == {"models/inference.py", "pipelines/step/grad_cache.py", "pipelines/step/context.py"}


def test_matching_is_each_pairs_own(package):
    pixels = images(3)
    rows = package.tokenizer.encode_rows(TEXTS[:4], package.preprocessor.max_tokens)
    pairs = [(text, image) for text in range(4) for image in range(3)] * 7  # more than one pass
    together = inference.match(package, rows, pixels, pairs)
    for (text, image), probability in list(zip(pairs, together, strict=True))[:12]:
        alone = inference.match(package, [rows[text]], pixels[image : image + 1], [(0, 0)])
        assert probability == pytest.approx(float(alone[0]), abs=1e-5)
    assert together.std() > 1e-4 and ((together > 0) & (together < 1)).all()
