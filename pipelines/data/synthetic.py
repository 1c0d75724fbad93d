"""A generated image-caption set for tests, demos and benchmarks: OUT/train, OUT/val and OUT/test, at any path or URL.

The same seed gives the same bytes. A scene belongs to one split for good (by a hash of its content), so train, val and
test never share one, whatever their sizes and seeds. Nearly identical scenes and captions that leave things out keep
even a perfect reader below 90 % recall@1 (`scenes.ideal_recall`).
"""

import io
import json
import logging
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Ge, Le
from pydantic import PositiveInt, ValidationError

from models.config import Config, InputError
from pipelines import storage
from pipelines.data.synthetic_scenes import Scene, alter, describe, draw, draw_scene

SPLITS = ("train", "val", "test")
DEFECTS = ("truncated", "not_an_image", "empty", "empty_caption")
"""What a broken pair suffers from, in turn: half a file, a web page, no bytes, a caption without words."""

_FILE_ROWS = 2000
_NEAR = 0.1  # share of the scenes that repeat an earlier one of their split with one attribute changed
_HELD_OUT = 12  # one scene in so many belongs to val, and one to test
_PAGE = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"

log = logging.getLogger(__name__)


class CorpusConfig(Config):
    """A generated corpus. Noise and broken files are for training; val and test stay clean, so that scores are fair."""

    pairs: Annotated[int, Ge(1), Le(1_000_000)] = 10_000
    """Training pairs (images); val and test get a tenth each but at least 100."""
    noise: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the training pairs that carry the caption of another scene, untrue of the image."""
    broken: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the training pairs that are unusable: truncated, not an image, empty, or with an empty caption."""
    captions_per_image: PositiveInt = 1
    """Captions of each image; several are a list in `caption`."""
    image_size: Annotated[int, Ge(16), Le(4096)] = 64
    """Side of the square images, pixels."""
    format: Literal["parquet", "webdataset"] = "parquet"
    """Parquet with image bytes, or tar files of image and text members."""
    seed: int = 0
    """The same seed gives the same files."""


@dataclass(frozen=True)
class Sample:
    """One pair as planned: what is seen (`scene`), what is said, and what is wrong with it ("" or one of DEFECTS)."""

    id: str
    scene: Scene
    captions: list[str]
    mismatched: bool
    defect: str
    image: bytes
    extension: str

    @property
    def image_id(self) -> str:
        """The image's identity: the scene's content, which no two pairs share."""
        return "-".join(map(str, (self.scene.axis, *self.scene.first, *self.scene.second)))


def split_of(scene: Scene) -> str:
    """The one split in which a scene may appear."""
    return {0: "val", 1: "test"}.get(zlib.crc32(repr(tuple(scene)).encode()) % _HELD_OUT, "train")


def split_size(pairs: int, split: str) -> int:
    """Pairs of a split where train has `pairs`."""
    return pairs if split == "train" else max(100, pairs // 10)


def draw_scenes(seed: int, split: str, count: int) -> list[Scene]:
    """`count` different scenes of a split; a longer list begins with the shorter one."""
    random = Random(f"{seed}/{split}/scenes")
    scenes: dict[Scene, None] = {}
    order: list[Scene] = []
    while len(order) < count:
        near = order and random.random() < _NEAR
        while True:
            scene = alter(random.choice(order), random) if near else draw_scene(random)
            if scene not in scenes and split_of(scene) == split:
                break
        scenes[scene] = None
        order.append(scene)
    return order


def samples(config: CorpusConfig, split: str) -> Iterator[Sample]:
    """The pairs of a split in order, each with the truth about it: what tests and clean-up tools are judged by."""
    scenes = draw_scenes(config.seed, split, split_size(config.pairs, split))
    defects, mismatched = _faults(config, len(scenes)) if split == "train" else ({}, set())
    for index, scene in enumerate(scenes):
        random = Random(f"{config.seed}/{split}/{index}")
        told = _other(scene, scenes, random) if index in mismatched else scene
        captions = [describe(told, random).text for _ in range(config.captions_per_image)]
        defect = defects.get(index, "")
        image, extension = _encode(scene, config.image_size, random)
        yield Sample(
            id=f"{split}-{index:07d}",
            scene=scene,
            captions=[""] * len(captions) if defect == "empty_caption" else captions,
            mismatched=index in mismatched,
            defect=defect,
            image=_spoil(image, defect),
            extension=extension,
        )


def _faults(config: CorpusConfig, count: int) -> tuple[dict[int, str], set[int]]:
    """Which training pairs are broken, and how; which are mismatched. Exact counts, no pair is both."""
    broken, noisy = round(config.broken * count), round(config.noise * count)
    chosen = Random(f"{config.seed}/faults").sample(range(count), min(count, broken + noisy))
    defects = {index: DEFECTS[place % len(DEFECTS)] for place, index in enumerate(chosen[:broken])}
    return defects, set(chosen[broken:])


def _other(scene: Scene, scenes: list[Scene], random: Random) -> Scene:
    """A scene that shares no kind of object, so that nothing said of it is true of `scene`."""
    kinds = {scene.first.kind, scene.second.kind}
    others = (random.choice(scenes) for _ in range(100))
    fresh = (draw_scene(random) for _ in iter(int, 1))
    for candidates in (others, fresh):
        for other in candidates:
            if kinds.isdisjoint((other.first.kind, other.second.kind)):
                return other
    raise AssertionError("unreachable: fresh scenes never end")


def _encode(scene: Scene, size: int, random: Random) -> tuple[bytes, str]:
    """The drawn scene as JPEG or PNG (about as many of each), and the file name's extension."""
    image, buffer = draw(scene, size, random), io.BytesIO()
    if random.random() < 0.5:
        image.save(buffer, "JPEG", quality=random.randint(80, 95))
        return buffer.getvalue(), "jpg"
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue(), "png"


def _spoil(image: bytes, defect: str) -> bytes:
    """The image's bytes with the defect."""
    return {"truncated": image[: len(image) // 2], "not_an_image": _PAGE, "empty": b""}.get(defect, image)


def synthesize(out: str, config: CorpusConfig | None = None, **knobs: object) -> dict[str, int]:
    """Write OUT/train, OUT/val and OUT/test, each a folder with its files directly in it; pairs of each split.

    `knobs` are fields of CorpusConfig by name. Raises InputError for a bad knob and where OUT already holds files.
    """
    config = _checked((config or CorpusConfig()).model_dump() | knobs)
    require_empty(out)
    write = _parquet if config.format == "parquet" else _tar
    suffix = "parquet" if config.format == "parquet" else "tar"
    counts = {split: split_size(config.pairs, split) for split in SPLITS}
    for split, count in counts.items():
        for number, rows in enumerate(_chunks(samples(config, split))):
            storage.write_bytes(storage.join(out, split, f"{number:05d}.{suffix}"), write(rows, count))
        log.info("%s: %d pairs", storage.join(out, split), count)
    return counts


def require_empty(out: str) -> None:
    """Raise InputError where OUT already holds files."""
    if storage.exists(out) and storage.listing(out):
        raise InputError(f"{out}: already holds files; name a new or an empty folder")


def _checked(knobs: dict[str, object]) -> CorpusConfig:
    """The knobs as a config; InputError names the first bad one."""
    try:
        config = CorpusConfig.model_validate(knobs)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"data synth: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if config.noise + config.broken > 1:
        raise InputError(f"data synth: noise {config.noise} and broken {config.broken} add up to more than all pairs")
    return config


def _chunks(rows: Iterator[Sample]) -> Iterator[list[Sample]]:
    """The pairs of one file after the other."""
    chunk: list[Sample] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _FILE_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _parquet(rows: list[Sample], count: int) -> bytes:
    """A Parquet file of the pairs."""
    single = all(len(row.captions) == 1 for row in rows)
    return pairs_parquet(
        {
            "image": [row.image for row in rows],
            "caption": [row.captions[0] if single else row.captions for row in rows],
            "id": [row.id for row in rows],
            "image_id": [row.image_id for row in rows],
        },
        count,
    )


def pairs_parquet(columns: dict[str, list[Any]], count: int) -> bytes:
    """A Parquet file of pairs; row groups small enough that a split of `count` pairs is shared out evenly."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=min(128, max(16, count // 64)))
    return buffer.getvalue()


def _tar(rows: list[Sample], _count: int) -> bytes:
    """A webdataset tar: KEY.jpg or KEY.png, then KEY.txt (one caption) or KEY.json (several)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row in rows:
            single = len(row.captions) == 1
            text = row.captions[0] if single else json.dumps({"caption": row.captions, "image_id": row.image_id})
            for suffix, data in ((row.extension, row.image), ("txt" if single else "json", text.encode())):
                member = tarfile.TarInfo(f"{row.id}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
