"""The encoder of the embedding job, against one image and one text at a time."""

import numpy as np
import pyarrow as pa
import pytest

from models.inference import embed_images
from pipelines.embed.encoder import Encoder
from pipelines.embed.transforms import _as_bytes
from tests.support.serving_models import save_small, vectors


@pytest.fixture
def encoder(tmp_path):
    made = Encoder.__new__(Encoder)  # without Ray, which hands the package over
    made._package = save_small(tmp_path)
    return made


def test_rows_keep_their_order_images_of_several_rows_are_one_and_skipped_rows_have_none(encoder):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    which = [2, 0, 2, 1, 0]
    clean = [["number one"], ["noise", "a number"], ["a picture of number two"], [], ["noise"]]
    table = pa.table(
        {
            "reason": ["", "", "", "unreadable", ""],
            "pixels": _as_bytes(images[which]),
            "image_id": pa.array([70, -5, 70, 1, -5], pa.int64()),
            "clean": pa.array(clean, pa.list_(pa.string())),
        }
    )
    encoded = encoder(table)
    found = np.array(encoded["image_vector"].to_pylist(), np.float32)
    for row, image in enumerate(which):
        expected = embed_images(encoder._package, images[[image]])[0] if row != 3 else np.zeros(8)
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    texts = encoded["text_vectors"].to_pylist()
    assert [len(row) for row in texts] == [1, 2, 1, 0, 1]
    for row, captions in zip(texts, clean, strict=True):
        for vector, caption in zip(row, captions, strict=True):
            np.testing.assert_allclose(vector, vectors(encoder._package, [caption])[0], atol=1e-6)


def test_a_table_of_skipped_rows_alone_has_no_vectors(encoder):
    table = pa.table(
        {
            "reason": ["too_small"],
            "pixels": _as_bytes(np.zeros((1, 16, 16, 3), np.uint8)),
            "image_id": pa.array([0], pa.int64()),
            "clean": pa.array([[]], pa.list_(pa.string())),
        }
    )
    encoded = encoder(table)
    assert encoded["image_vector"].to_pylist() == [[0.0] * 8] and encoded["text_vectors"].to_pylist() == [[]]
