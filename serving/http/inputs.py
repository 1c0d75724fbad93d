"""What a request asks to embed: texts cleaned, pictures recognised, limits kept, each named by its place.

Axes: N inputs of a request, D width of the joint space.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from models.preprocess import clean_caption
from serving.config import DoorConfig
from serving.http.responses import Refusal
from serving.http.schema import EmbeddingRequest, Message
from serving.interfaces import Description

FirstT = TypeVar("FirstT")
SecondT = TypeVar("SecondT")


@dataclass
class Inputs:
    """Texts and pictures of a request, and where each belongs in the reply."""

    texts: list[str] = field(default_factory=list)
    """Clean captions."""
    text_places: list[int] = field(default_factory=list)
    pictures: list[tuple[str, bytes | str]] = field(default_factory=list)
    """(param, encoded bytes or URL)."""
    picture_places: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts) + len(self.pictures)


def is_picture(text: str) -> bool:
    """Whether a string is a picture's data URL."""
    return text[:11].lower() == "data:image/"


def read_text(text: str, param: str, description: Description, config: DoorConfig) -> str:
    """A clean caption. Raises Refusal 400: too long, or nothing left."""
    if len(text) > config.max_text:
        raise Refusal(400, "text_too_long", f"{param}: more than {config.max_text} characters", param)
    caption = clean_caption(text, description.max_words)
    if not caption.strip():
        raise Refusal(400, "empty_text", f"{param}: no words", param)
    return caption


def read_inputs(
    strings: Sequence[str], names: Sequence[str], modality: str, description: Description, config: DoorConfig
) -> Inputs:
    """Sort strings into texts and pictures. Raises Refusal 400 with the name of the one that is wrong."""
    whole = names[-1].partition("[")[0]
    if len(strings) > config.max_inputs:
        raise Refusal(400, "too_many_inputs", f"{len(strings)} inputs, more than {config.max_inputs}", whole)
    inputs = Inputs()
    for place, (text, name) in enumerate(zip(strings, names, strict=True)):
        if modality == "image" or (modality == "auto" and is_picture(text)):
            inputs.pictures.append((name, text))
            inputs.picture_places.append(place)
        else:
            inputs.texts.append(read_text(text, name, description, config))
            inputs.text_places.append(place)
    if len(inputs.pictures) > config.max_images:
        message = f"{len(inputs.pictures)} pictures, more than {config.max_images}"
        raise Refusal(400, "too_many_images", message, whole)
    return inputs


def embedding_inputs(request: EmbeddingRequest, description: Description, config: DoorConfig) -> Inputs:
    """The inputs of an embedding request in either form."""
    if request.messages:
        text, modality = _spoken(request.messages, request.modality)
        return read_inputs([text], ["messages"], modality, description, config)
    if isinstance(request.input, str):
        return read_inputs([request.input], ["input"], request.modality, description, config)
    names = [f"input[{place}]" for place in range(len(request.input))]
    return read_inputs(request.input, names, request.modality, description, config)


def _spoken(messages: Sequence[Message], modality: str) -> tuple[str, str]:
    """The one input that messages are: (text or URL, modality)."""
    texts: list[str] = []
    pictures: list[str] = []
    for message in messages:
        if isinstance(message.content, str):
            texts.append(message.content)
            continue
        for part in message.content:
            if part.type == "text":
                texts.append(part.text)
            else:
                pictures.append(part.image_url.url)
    text = "\n".join(texts)
    if not pictures:
        if modality == "image":
            raise Refusal(400, "no_image", "messages: modality is image, and no picture is sent", "messages")
        return text, "text"
    if len(pictures) > 1 or text.strip() or modality == "text":
        raise Refusal(
            400, "mixed_input", "messages: one input is a text or one picture, not several of them", "messages"
        )
    return pictures[0], "image"


async def both(first: Awaitable[FirstT], second: Awaitable[SecondT]) -> tuple[FirstT, SecondT]:
    """Await two at once; where one fails the other is given up."""
    one, two = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(one, two)
    finally:
        one.cancel()
        two.cancel()


def merged(inputs: Inputs, texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Vectors float32 (N, D) in the order of the request."""
    out = np.empty((len(inputs), texts.shape[1]), np.float32)
    out[inputs.text_places] = texts
    out[inputs.picture_places] = images
    return out
