"""Small files of pairs, good and broken."""

import io
import json
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines import storage


def png(colour: str) -> bytes:
    """An image of one colour."""
    return encoded(Image.new("RGB", (8, 8), colour), "PNG")


def jpeg(seed: int, width: int = 32, height: int = 32, **options: Any) -> bytes:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), "JPEG", **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The picture's bytes in a file format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Good pairs: columns image, caption, id."""
    return [
        {"image": jpeg(number), "caption": f"Picture number {number}, of noise.", "id": f"key{number}"}
        for number in range(start, start + count)
    ]


def write_parquet_pairs(uri: str, pairs: list[dict[str, Any]], **options: Any) -> str:
    """Write pairs (any columns) as one Parquet file; `options` go to pyarrow. Returns `uri`."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(pairs), buffer, **options)
    storage.write_bytes(uri, buffer.getvalue())
    return uri


def write_tar_pairs(uri: str, pairs: list[dict[str, Any]], **options: Any) -> str:
    """Write pairs as a tar: ID.jpg (or the pair's `extension`), then ID.txt, or ID.json for several captions.

    A pair without `image` or `caption` lacks that member; `options` go to tarfile. Returns `uri`.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for pair in pairs:
            members = {}
            if "image" in pair:
                members[pair.get("extension", "jpg")] = pair["image"]
            if isinstance(pair.get("caption"), str):
                members["txt"] = pair["caption"].encode()
            elif "caption" in pair:
                members["json"] = json.dumps({"caption": pair["caption"]}).encode()
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{pair['id']}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    storage.write_bytes(uri, buffer.getvalue())
    return uri
