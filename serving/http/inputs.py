"""Texts and images of a request: sorted and cleaned, limits kept, then their pixels and vectors.

Axes: N inputs of a request, S image side, D width of the joint space.
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from models.preprocess import clean_caption
from serving.config import HttpConfig
from serving.http.responses import ApiError
from serving.http.route import Tools
from serving.http.schema import EmbeddingRequest, Message
from serving.interfaces import Description, ModelVersion

FirstT = TypeVar("FirstT")
SecondT = TypeVar("SecondT")


@dataclass
class Inputs:
    """Texts and images of a request, and the position of each in it."""

    texts: list[str] = field(default_factory=list)
    """Clean captions."""
    text_positions: list[int] = field(default_factory=list)
    images: list[tuple[str, bytes | str]] = field(default_factory=list)
    """(param, encoded bytes or URL); errors name the param."""
    image_positions: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts) + len(self.images)


def is_image(text: str) -> bool:
    """Whether a string is an image's data URL."""
    return text[:11].lower() == "data:image/"


def read_text(text: str, param: str, description: Description, config: HttpConfig) -> str:
    """A clean caption. Raises ApiError 400: too long, or nothing left."""
    if len(text) > config.max_text:
        raise ApiError(400, "text_too_long", f"{param}: more than {config.max_text} characters", param)
    caption = clean_caption(text, description.max_words)
    if not caption.strip():
        raise ApiError(400, "empty_text", f"{param}: no words", param)
    return caption


def read_inputs(
    strings: Sequence[str], names: Sequence[str], modality: str, description: Description, config: HttpConfig
) -> Inputs:
    """Sort strings into texts and images. Raises ApiError 400 that names the input at fault by its name in `names`."""
    whole = names[-1].partition("[")[0]
    if len(strings) > config.max_inputs:
        raise ApiError(400, "too_many_inputs", f"{len(strings)} inputs, more than {config.max_inputs}", whole)
    inputs = Inputs()
    for position, (text, name) in enumerate(zip(strings, names, strict=True)):
        if modality == "image" or (modality == "auto" and is_image(text)):
            inputs.images.append((name, text))
            inputs.image_positions.append(position)
        else:
            inputs.texts.append(read_text(text, name, description, config))
            inputs.text_positions.append(position)
    if len(inputs.images) > config.max_images:
        message = f"{len(inputs.images)} images, more than {config.max_images}"
        raise ApiError(400, "too_many_images", message, whole)
    return inputs


def embedding_inputs(request: EmbeddingRequest, description: Description, config: HttpConfig) -> Inputs:
    """The inputs of an embedding request in either form."""
    if request.messages:
        text, modality = _collapse_messages(request.messages, request.modality)
        return read_inputs([text], ["messages"], modality, description, config)
    if isinstance(request.input, str):
        return read_inputs([request.input], ["input"], request.modality, description, config)
    names = [f"input[{index}]" for index in range(len(request.input))]
    return read_inputs(request.input, names, request.modality, description, config)


def _collapse_messages(messages: Sequence[Message], modality: str) -> tuple[str, str]:
    """Collapse chat messages into one input: (text or image URL, modality). Raises ApiError 400 for more than one."""
    texts: list[str] = []
    images: list[str] = []
    for message in messages:
        if isinstance(message.content, str):
            texts.append(message.content)
            continue
        for part in message.content:
            if part.type == "text":
                texts.append(part.text)
            else:
                images.append(part.image_url.url)
    text = "\n".join(texts)
    if not images:
        if modality == "image":
            raise ApiError(400, "no_image", "messages: modality is image, and no image is sent", "messages")
        return text, "text"
    if len(images) > 1 or text.strip() or modality == "text":
        raise ApiError(
            400, "mixed_input", "messages: one input is a text or one image, not several of them", "messages"
        )
    return images[0], "image"


async def vectors_of(inputs: Inputs, model: ModelVersion, tools: Tools) -> tuple[np.ndarray, int]:
    """Unit vectors float32 (N, D) in the order of the request, and the number of tokens read."""
    if not inputs.images:
        return await model.embed_texts(inputs.texts)
    if not inputs.texts:
        return await _image_vectors(inputs, model, tools), 0
    texts, images = await _both(model.embed_texts(inputs.texts), _image_vectors(inputs, model, tools))
    vectors = np.empty((len(inputs), images.shape[1]), np.float32)
    vectors[inputs.text_positions], tokens = texts
    vectors[inputs.image_positions] = images
    return vectors, tokens


async def _image_vectors(inputs: Inputs, model: ModelVersion, tools: Tools) -> np.ndarray:
    return await model.embed_images(await pixels_of(inputs.images, model, tools))


async def pixels_of(images: Sequence[tuple[str, bytes | str]], model: ModelVersion, tools: Tools) -> np.ndarray:
    """Pixels uint8 (N, S, S, 3) of encoded images, fetched where they are URLs."""
    images = await tools.fetcher.replace(images)
    start = time.perf_counter()
    pixels = await tools.decoder(images, model.description.image_size)
    tools.metrics.decoded(time.perf_counter() - start)
    return pixels


async def _both(first: Awaitable[FirstT], second: Awaitable[SecondT]) -> tuple[FirstT, SecondT]:
    """Await two at once; where one fails the other is cancelled (`gather` alone would let it run on)."""
    one, two = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(one, two)
    finally:
        one.cancel()
        two.cancel()
