"""What a service of a package answers for the inputs that the package carries: the last check before a promotion."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.package import HEALTH_CAPTIONS, load_tensors
from serving.config import ServingConfig
from serving.gateway.port import free_port
from serving.http.auth import VARIABLE
from serving.service.run import running


def served_vectors(package: Path) -> tuple[Tensor, Tensor]:
    """Vectors (images, D) and (captions, D) that a service of `package` gives over HTTP for its health inputs.

    A service is started on a free port of loopback, and ended. Raises InputError where it does not start.
    """
    config = ServingConfig(model=str(package), port=free_port(), gateways=1)
    pixels = load_tensors(package / "health.safetensors")["pixels"].numpy()
    with running(config) as url:
        texts = _embed(url, {"input": list(HEALTH_CAPTIONS), "modality": "text"})
        images = _embed(url, {"input": [_data_url(image) for image in pixels], "modality": "image"})
    return images, texts


def _embed(url: str, body: dict[str, Any]) -> Tensor:
    headers = {"Content-Type": "application/json"}
    label, colon, key = os.environ.get(VARIABLE, "").split(",")[0].strip().partition(":")
    if label:
        headers["Authorization"] = f"Bearer {key.strip() if colon else label}"
    request = Request(f"{url}/v1/embeddings", json.dumps(body | {"encoding_format": "base64"}).encode(), headers)
    with urlopen(request, timeout=60) as reply:
        rows = json.load(reply)["data"]
    return torch.from_numpy(np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows]))


def _data_url(pixels: np.ndarray) -> str:
    """An image that decodes to exactly these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
