"""A stand-in for the model versions behind the HTTP app: no model, no Ray; every answer follows from the input alone.

Images and texts meet in colour: the word "red" and a red image have nearly the same vector.
"""

import asyncio
import base64
import io
import json
import socket
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import uvicorn
from PIL import Image, ImageDraw

from models.preprocess import clean_caption, resize_for_eval
from serving.interfaces import (
    Description,
    Hit,
    ImageOrUri,
    IndexDescription,
    Modality,
    NotReady,
    Overloaded,
    VersionNotLoaded,
)

SIZE = 32
DIMENSIONS = 16
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 190),
    "orange": (250, 140, 30),
}
SHAPES = ("circle", "square", "triangle")


def _unit(vector: np.ndarray) -> np.ndarray:
    return (vector / max(float(np.linalg.norm(vector)), 1e-9)).astype(np.float32)


def _speck(key: bytes) -> np.ndarray:
    """A small random vector that belongs to `key`, so that no two inputs have the same vector."""
    return 0.05 * np.random.default_rng(zlib.crc32(key)).standard_normal(DIMENSIONS)


def text_vector(caption: str) -> np.ndarray:
    """Unit vector float32 (D,) of a clean caption."""
    vector = _speck(caption.encode())
    for word in caption.split():
        if word in COLOURS:
            vector[:3] += np.array(COLOURS[word]) / 128 - 1
        elif word in SHAPES:
            vector[3 + SHAPES.index(word)] += 0.3
    return _unit(vector)


def image_vector(pixels: np.ndarray) -> np.ndarray:
    """Unit vector float32 (D,) of uint8 (S, S, 3): the colour of what is not white."""
    flat = pixels.reshape(-1, 3).astype(np.float64)
    marked = flat[flat.min(axis=1) < 200]
    colour = (marked if len(marked) else flat).mean(axis=0)
    vector = _speck(pixels.tobytes())
    vector[:3] += colour / 128 - 1
    return _unit(vector)


def match_probability(caption: str, pixels: np.ndarray) -> float:
    """What the stand-in's fusion encoder says of a clean caption and an image."""
    return float(1 / (1 + np.exp(-4 * float(text_vector(caption) @ image_vector(pixels)))))


def drawing(colour: str, shape: str, side: int = 96) -> Image.Image:
    """A shape on white."""
    image = Image.new("RGB", (side, side), "white")
    draw, low, high = ImageDraw.Draw(image), side // 6, side - side // 6
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=COLOURS[colour])
    else:
        draw.polygon(((side // 2, low), (high, high), (low, high)), fill=COLOURS[colour])
    return image


def as_file(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The image's bytes in a file format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = as_file(drawing("red", "circle"), "PNG")
BLUE = as_file(drawing("blue", "square"), "PNG")


def data_url(data: bytes) -> str:
    """An image as it is sent."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


@dataclass
class Corpus:
    """The rows of the stand-in's index: every colour in every shape, a row without thumbnail, one without image."""

    hits: list[Hit] = field(default_factory=list)
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    """By uri: uint8 (S, S, 3)."""
    vectors: dict[Modality, np.ndarray] = field(default_factory=dict)
    """By modality: float32 (rows, D)."""


def make_corpus() -> Corpus:
    """Eighteen drawings; the first has no thumbnail, the last one's file is gone."""
    corpus = Corpus()
    images, texts = [], []
    for number, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES):
        image, caption, uri = drawing(colour, shape), f"A {colour} {shape}.", f"memory://images/{number}.jpg"
        pixels = resize_for_eval(image, SIZE)
        thumbnail = as_file(image) if number else b""
        corpus.hits.append(Hit(f"{colour}-{shape}", 0.0, caption, uri, thumbnail))
        corpus.pixels[uri] = pixels
        images.append(image_vector(pixels))
        texts.append(text_vector(clean_caption(caption)))
    del corpus.pixels[uri]
    corpus.vectors = {"image": np.stack(images), "text": np.stack(texts)}
    return corpus


class StandInVersion:
    """A ModelVersion. What a test may set: `delay`, `failure`, `capacity`; what it may read: `calls`, `admitted`."""

    def __init__(self, version: str = "3", matching: bool = True, index: bool = True, name: str = "shapes") -> None:
        self._corpus = make_corpus() if index else None
        count = len(self._corpus.hits) if self._corpus else 0
        self._description = Description(
            name=name,
            version=version,
            embedding_space=f"space-of-{name}-{version}",
            dimensions=DIMENSIONS,
            image_size=SIZE,
            max_words=30,
            matching=matching,
            index=IndexDescription("memory://index", count, count, "flat") if index else None,
            created=1_700_000_000,
        )
        self.delay = 0.0
        """Seconds that every call takes."""
        self.failure: Exception | None = None
        """Raised by every call."""
        self.capacity = 10_000
        """Inputs that may be in progress at once."""
        self.admitted = 0
        """Inputs in progress."""
        self.calls: list[tuple[str, int]] = []
        """(modality, or search, or match; items) of each call so far."""

    @property
    def description(self) -> Description:
        return self._description

    @contextmanager
    def admit(self, texts: int, images: int) -> Iterator[None]:
        if self.admitted + texts + images > self.capacity:
            raise Overloaded(1.5)
        self.admitted += texts + images
        try:
            yield
        finally:
            self.admitted -= texts + images

    async def _call(self, kind: str, items: int) -> None:
        self.calls.append((kind, items))
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.failure is not None:
            raise self.failure

    async def embed_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        await self._call("text", len(texts))
        return np.stack([text_vector(text) for text in texts]), sum(len(text.split()) + 1 for text in texts)

    async def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        await self._call("image", len(pixels))
        return np.stack([image_vector(image) for image in pixels])

    async def search(self, query: np.ndarray, modality: Modality, top_k: int) -> list[Hit]:
        await self._call("search", 1)
        assert self._corpus is not None
        scores = self._corpus.vectors[modality] @ query
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [replace(self._corpus.hits[row], score=float(scores[row])) for row in order]

    async def vector_of(self, row_id: str, modality: Modality) -> np.ndarray | None:
        assert self._corpus is not None
        for row, hit in enumerate(self._corpus.hits):
            if hit.id == row_id:
                return self._corpus.vectors[modality][row]
        return None

    async def match(self, pairs: Sequence[tuple[str, ImageOrUri]]) -> list[float | None]:
        await self._call("match", len(pairs))
        pixels = self._corpus.pixels if self._corpus else {}
        images = [pixels.get(image) if isinstance(image, str) else image for _, image in pairs]
        return [
            None if image is None else match_probability(text, image)
            for (text, _), image in zip(pairs, images, strict=True)
        ]


class StandInPool:
    """A VersionPool of stand-in versions; the last one is current until `current` is set."""

    def __init__(self, *loaded: StandInVersion) -> None:
        self.loaded = {one.description.label: one for one in loaded or (StandInVersion(),)}
        self.current: str | None = next(reversed(self.loaded))
        """Label of the current version; None: nothing is loaded yet."""
        self.alarm = ""
        self.used: list[str] = []
        """Labels handed out so far."""

    @property
    def ready(self) -> bool:
        return self.current is not None

    @property
    def model(self) -> StandInVersion:
        """The current version."""
        assert self.current is not None
        return self.loaded[self.current]

    def versions(self) -> list[tuple[Description, bool]]:
        if self.current is None:
            return []
        return [(one.description, label == self.current) for label, one in self.loaded.items()]

    @contextmanager
    def use(self, label: str | None = None) -> Iterator[StandInVersion]:
        if self.current is None:
            raise NotReady
        if (label or self.current) not in self.loaded:
            raise VersionNotLoaded
        one = self.loaded[label or self.current]
        self.used.append(one.description.label)
        yield one


@dataclass
class Answer:
    """A reply."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Messages = Callable[[], Awaitable[dict[str, Any]]]


def arriving(*chunks: bytes, gone: float | None = None, pause: float = 0.0) -> Messages:
    """A body in chunks, `pause` seconds before each; then the client stays, or leaves after `gone` seconds."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        if left:
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
        await (asyncio.get_running_loop().create_future() if gone is None else asyncio.sleep(gone))
        return {"type": "http.disconnect"}

    return receive


async def ask(
    app: Any,
    path: str,
    content: Any = b"",
    headers: Mapping[str, str] | None = None,
    receive: Messages | None = None,
    method: str = "POST",
) -> Answer:
    """One request, straight to the application; `content` is bytes, or something for JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    given = {"content-type": "application/json"} | dict(headers or {})
    if receive is None:
        given.setdefault("content-length", str(len(body)))
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive or arriving(body), send)
    if not sent:
        return Answer(0, {}, b"")
    pairs = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], pairs, b"".join(message.get("body", b"") for message in sent[1:]))


def one(app: Any, path: str, content: Any = b"", **options: Any) -> Answer:
    """One request, and nothing else."""
    return asyncio.run(ask(app, path, content, **options))


def seen(image: bytes) -> np.ndarray:
    """What the encoder gets of an image's file."""
    return resize_for_eval(Image.open(io.BytesIO(image)), SIZE)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The application behind uvicorn on a free port of loopback; yields its URL."""
    line = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    line.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, interface="asgi3", access_log=False, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([line],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{line.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        line.close()
