"""Small untrained packages and indexes over noise, for tests of serving: the same every time."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from models.config import EncoderConfig
from models.encoders import DualEncoder, Heads, resolve
from models.inference import Package, embed_images, embed_texts
from models.package import load_package, save_package
from models.preprocess import CaptionTokenizer, PreprocessorConfig, clean_caption, train_tokenizer
from serving.index.build import build_index
from tests.support.pairs import make_pairs

CAPTIONS = [pair["caption"] for pair in make_pairs(40)]


def save_small(folder: Path, seed: int = 0, name: str = "small", matching: bool = False, side: int = 16) -> Package:
    """A package of random weights in `folder`."""
    tokenizer = CaptionTokenizer.from_json(train_tokenizer(CAPTIONS * 2, 200).to_str())
    small = {
        "vision": {"image_size": side, "width": 16, "layers": 1},
        "text": {"width": 16, "layers": 1},
        "fusion": {"layers": 1},
        "embed_dim": 8,
    }
    config = resolve(EncoderConfig.model_validate(small), tokenizer.vocab_size)
    torch.manual_seed(seed)
    model = DualEncoder(config, Heads(matching=matching)).eval()
    for parameter in model.parameters():  # untrained weights hardly look at their input: make them
        parameter.data.mul_(4)
    preprocessor = PreprocessorConfig(image_size=side, max_tokens=config.text.max_tokens)
    save_package(folder, config, model, tokenizer, preprocessor, name)
    return load_package(folder)


def png(pixels: np.ndarray) -> bytes:
    """A file that decodes to exactly these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def vectors(package: Package, texts: Sequence[str]) -> np.ndarray:
    """Vectors of captions as they are written."""
    words, tokens = package.preprocessor.max_caption_words, package.preprocessor.max_tokens
    return embed_texts(package, package.tokenizer.encode_rows([clean_caption(one, words) for one in texts], tokens))


def save_index(folder: Path, package: Package, captions: Sequence[str], pixels: np.ndarray) -> str:
    """An index of pairs in `folder`/index, of vectors as `triptych embed` leaves them; returns its path."""
    (folder / "vectors").mkdir(parents=True)
    sides = {"image_vector": embed_images(package, pixels), "text_vector": vectors(package, captions)}
    columns = {
        "id": pa.array([f"id{row}" for row in range(len(captions))]),
        "image_id": pa.array(np.arange(len(captions), dtype=np.int64)),
        "caption": pa.array(list(captions)),
        "uri": pa.array([f"/images/{row}.png" for row in range(len(captions))]),
        "thumbnail": pa.array([png(one) for one in pixels]),
    }
    for name, rows in sides.items():
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    pq.write_table(pa.table(columns), folder / "vectors" / "0.parquet")
    about = {
        "format": "triptych-vectors-1",
        "name": package.name,
        "embedding_space": package.embedding_space,
        "dimensions": package.config.embed_dim,
        "manifest": "hash",
        "files": [{"name": "vectors/0.parquet", "rows": len(captions)}],
    }
    (folder / "vectors.json").write_text(json.dumps(about))
    build_index(str(folder), str(folder / "index"))
    return str(folder / "index")
