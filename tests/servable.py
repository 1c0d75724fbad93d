"""Small untrained packages and indexes over noise, for tests of serving: the same every time."""

import io
from pathlib import Path

import numpy as np
import torch
from conftest import make_pairs
from PIL import Image

from models.checkpoint import Package, load_package, save_package
from models.config import EncoderConfig
from models.encoders import DualEncoder, Heads, resolve
from models.preprocess import CaptionTokenizer, PreprocessorConfig, train_tokenizer

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
