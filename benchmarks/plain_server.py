"""The server that one writes in ten minutes: FastAPI, a forward pass a request, no batching; ours is held against it.

python -m benchmarks.plain_server PACKAGE --port N
"""

import argparse
import base64
import io
from pathlib import Path

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

from models.inference import embed_images, embed_texts
from models.package import load_package
from models.preprocess import clean_caption, resize_for_eval


class Ask(BaseModel):
    """Texts, or images as data URLs."""

    input: str | list[str]


def make_app(package_folder: Path) -> FastAPI:
    """One model, called in the threads that FastAPI answers requests in."""
    package, app = load_package(package_folder), FastAPI()
    words, tokens = package.preprocessor.max_caption_words, package.preprocessor.max_tokens

    def encode(text: str) -> np.ndarray:
        """float32 (1, D)."""
        if text.startswith("data:"):
            image = Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2])))
            return embed_images(package, resize_for_eval(image, package.preprocessor.image_size)[None])
        return embed_texts(package, package.tokenizer.encode_rows([clean_caption(text, words)], tokens))

    @app.post("/v1/embeddings")
    def embeddings(ask: Ask) -> dict[str, object]:
        inputs = [ask.input] if isinstance(ask.input, str) else ask.input
        rows = [base64.b64encode(encode(text).astype("<f4").tobytes()).decode() for text in inputs]
        data = [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(rows)]
        return {"object": "list", "data": data, "model": package.name}

    return app


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    uvicorn.run(make_app(options.package), host="127.0.0.1", port=options.port, access_log=False)


if __name__ == "__main__":
    main()
