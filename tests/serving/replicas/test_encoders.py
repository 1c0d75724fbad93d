"""Encoder replicas unpack what gateways send, and compute what `models/inference.py` does."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import inference
from models.config import InputError
from models.preprocess import clean_caption
from serving.replicas.encoders import ImageEncoder, Matcher, TextEncoder
from tests.support.serving_models import png, save_small

TEXTS = [clean_caption(text) for text in ["a", "image number seven of noise", "noise", "number 3 3 3 3 3 of 3"]]
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{path} is not there")
    return path.read_bytes()


def test_replicas_unpack_what_gateways_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = save_small(tmp_path / "p", matching=True)
    rows = package.tokenizer.encode_rows(TEXTS, package.preprocessor.max_tokens)
    lengths = np.array([len(row) for row in rows], np.int32)
    (tmp_path / "image.png").write_bytes(png(PIXELS[2]))
    monkeypatch.setattr("serving.model_source.read_image", lambda uri: read(tmp_path / uri))

    def replica(kind: Any, *more: Any) -> Any:
        return kind(str(tmp_path / "p"), package.embedding_space, {}, False, *more)

    async def run() -> None:
        texts = await replica(TextEncoder).encode(np.concatenate(rows), lengths)
        assert np.abs(texts - inference.embed_texts(package, rows)).max() < 1e-6
        images = await replica(ImageEncoder).encode(PIXELS)
        assert np.abs(images - inference.embed_images(package, PIXELS)).max() < 1e-6
        pairs = [(0, 0), (1, 2), (1, 1)]
        found = await replica(Matcher, 10_000).match(TEXTS[:2], [PIXELS[0], "image.png", "not-there.png"], pairs)
        expected = inference.match(package, rows[:2], PIXELS[[0, 2]], [(0, 0), (1, 1)])
        assert found[1] is None and [found[0], found[2]] == pytest.approx(expected.tolist(), abs=1e-5)

    asyncio.run(run())


def test_a_package_of_another_space_is_refused(tmp_path: Path) -> None:
    save_small(tmp_path / "p")
    with pytest.raises(InputError, match="not other-space"):
        TextEncoder(str(tmp_path / "p"), "other-space", {}, False)
