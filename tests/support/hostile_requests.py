"""Hostile bodies, made from a seed: images, JSON, forms, and ways to send them."""

import base64
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, features

from tests.support.stand_in import Messages, arriving, as_file, drawing

LIMIT = 2**20
"""Bytes that the HTTP app under test takes."""
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF") + (("AVIF",) if features.check("avif") else ())
Random = np.random.Generator


@dataclass
class Attack:
    """One request."""

    kind: str
    body: bytes = b""
    path: str = "/v1/embeddings"
    headers: dict[str, str] = field(default_factory=dict)
    receive: Messages | None = None


def _png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _resized(kind: str) -> bytes:
    """A small image whose header claims a giant one."""
    data = bytearray(as_file(drawing("red", "square"), kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = b"\xff\xdc\xff\xdc"
    elif kind == "GIF":
        data[6:10] = b"\xff\xff\xff\xff"
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", 2**30, 2**30)
    elif kind == "TIFF":
        for tag in (256, 257):
            at = data.index(struct.pack("<H", tag))
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 2**31 - 1)
    return bytes(data)


@cache
def _bombs() -> list[bytes]:
    text, profile = (name + zlib.compress(bytes(20 << 20)) for name in (b"Comment\0\0", b"icc\0\0"))
    extended = b"VP8X" + struct.pack("<IB3x", 10, 0) + b"\xff\x3f\x00\xff\x3f\x00"
    return [
        _png(60_000, 60_000, rows=bytes(100)),
        _png(2**31 - 1, 2**31 - 1),
        _png(0, 0),
        _png(8, 8, (b"zTXt", text), rows=bytes(200)),
        _png(8, 8, (b"iCCP", profile), rows=bytes(200)),
        _png(900, 900, rows=bytes(3)),
        as_file(Image.new("L", (4000, 4000)), "PNG"),
        b"RIFF" + struct.pack("<I", len(extended) + 4) + b"WEBP" + extended,
        *map(_resized, ("JPEG", "GIF", "BMP", "TIFF")),
    ]


def _bomb(random: Random) -> bytes:
    return _bombs()[random.integers(len(_bombs()))]


def _image(random: Random) -> bytes:
    pixels = random.integers(0, 256, (random.integers(1, 60), random.integers(1, 60), 3), dtype=np.uint8)
    return as_file(Image.fromarray(pixels), str(random.choice(FORMATS)))


def _truncated(random: Random) -> bytes:
    data = _image(random)
    return data[: random.integers(len(data))]


def _garbled(random: Random) -> bytes:
    data = bytearray(_image(random))
    for _ in range(random.integers(1, 30)):
        data[random.integers(len(data))] = random.integers(256)
    return bytes(data)


def _polyglot(random: Random) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.html", "<script>alert(1)</script>")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(/etc/passwd) (r) file\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    choices = [
        _image(random) + archive.getvalue(),
        b"GIF89a/*" + b"\0" * 20 + b"*/=1;alert(1)",
        b"%PDF-1.4\n" + _image(random),
        script,
        script + _image(random),
        svg,
        b"P6\n99999999 99999999\n255\n",
        b"P6 4 4 255\n" + bytes(5),
        random.bytes(random.integers(1, 2000)),
    ]
    return choices[random.integers(len(choices))]


def _as_json(data: bytes, random: Random) -> Attack:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    if random.integers(2):
        return Attack("", json.dumps({"input": ["a red circle", url]}).encode())
    return Attack("", json.dumps({"image": url}).encode(), "/v1/search")


def _as_form(data: bytes, random: Random) -> Attack:
    head = b'--edge\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
    end = [b"\r\n--edge--\r\n", b"\r\n--edge\r\n", b"", b"\r\n--edge--" * 50][random.integers(4)]
    return Attack("", head + data + end, "/v1/search", {"content-type": "multipart/form-data; boundary=edge"})


def _bytes_of_json(random: Random) -> Attack:
    path = str(random.choice(["/v1/embeddings", "/v1/search", "/v1/rerank"]))
    key = {"/v1/embeddings": b"input", "/v1/search": b"text", "/v1/rerank": b"query"}[path]
    number = [b"1e400", b"-1e400", b"9" * 5000, b"NaN", b"-Infinity", b"0x10", b"1.5", b"-0", b"true", b'"7"', b"[]"]
    depth = int(random.integers(100, 100_000))
    bodies = [
        b"[" * depth,
        b'{"%s":' % key + b"[" * depth + b"]" * depth + b"}",
        b'{"a":' * depth + b"1" + b"}" * depth,
        b'{"%s":"a","top_k":%s,"dimensions":%s}' % (key, number[random.integers(11)], number[random.integers(11)]),
        b'{"text":"a","top_k":%s}' % number[random.integers(11)],
        b'{"input":"a","dimensions":%s}' % number[random.integers(11)],
        b'{"%s":"\\ud83d"}' % key,
        b'{"%s":"\\ude00\\ud83d"}' % key,
        b'{"%s":"a\\u0000b"}' % key,
        b'{"%s":"\xff\xfe"}' % key,
        b'\xef\xbb\xbf{"%s":"a"}' % key,
        json.dumps({"a": "a"}).encode("utf-16"),
        b'{"%s":"a","%s":"b"}' % (key, key),
        b'{"%s":"a","%s":1}' % (key, b"k" * 100_000),
        b"{" + b",".join(b'"k%d":0' % number for number in range(20_000)) + b"}",
        b'{"%s":[%s]}' % (key, b",".join([b"null"] * 100_000)),
        b'{"%s":[%s]}' % (key, b",".join([b'""'] * 200)),
        json.dumps({key.decode(): "\u0301\u200d\u202e\U0001f468" * 1500}).encode(),
        json.dumps({key.decode(): " \n\t" * 2000}).encode(),
        json.dumps({"query": "a", "documents": ["a", "data:image/png;base64,A"]}).encode(),
        json.dumps({"messages": [{"role": "u", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}).encode(),
        json.dumps({"input": "http://169.254.169.254/latest/meta-data", "modality": "image"}).encode(),
        random.bytes(random.integers(1, 5000)),
    ]  # fmt: skip
    return Attack("", bodies[random.integers(len(bodies))], path)


def _base64(random: Random) -> Attack:
    texts = ["=", "====", "AAA", "A" * 99_999, "AA==AA==", "\u00e9" * 50, "%41%41", "-_-_", "A\nA=", " " * 100]
    start = ["data:image/png;base64,", "data:;base64,", "data:image/svg+xml,", "data:image/png;BASE64,", "data:"]
    url = str(random.choice(start)) + str(random.choice(texts))
    return Attack("", json.dumps({"input": url, "modality": "image"}).encode())


def _kinds(random: Random) -> Attack:
    form = "multipart/form-data"
    plain = ["text/html", "application/x-www-form-urlencoded", "application/json; charset=\xff", "/", ";;;"]
    types = [*plain, form, f"{form}; boundary=", f'{form}; boundary="\x00"', f"{form}; boundary*0=a; boundary*1=b"]
    types += [f"{form}; boundary=" + "a" * 5000, "multipart/mixed; boundary=a"]
    path = str(random.choice(["/v1/search", "/v1/embeddings"]))
    bodies = [b'{"input":"a"}', b"--a\r\n\r\n--a--", b"", b"--" * 5000, b"\r\n--a" * 5000]
    return Attack("", bodies[random.integers(5)], path, {"content-type": str(random.choice(types))})


def _sending(random: Random) -> Attack:
    body = b'{"input": "a red circle"}'
    length = str(random.choice(["-1", "1e3", "", "9" * 30, str(LIMIT + 1), "+5", "0x5"]))
    ways = [
        Attack("", receive=arriving(*[b" "] * 50, pause=0.02)),
        Attack("", receive=arriving(*[bytes(100_000)] * 12)),
        Attack("", receive=arriving(*[b" "] * 3000)),
        Attack("", receive=arriving(*(body[at : at + 1] for at in range(len(body))))),
        Attack("", receive=arriving(body, gone=0.0)),
        Attack("", receive=arriving(b"", b"", b"")),
        Attack("", body, headers={"content-length": length}),
        Attack("", body, headers={"x-triptych-version": "\xff" * 500}),
        Attack("", body, headers={"x-request-id": "\x00\r\nset-cookie: a=b"}),
        Attack("", body, headers={"authorization": "Bearer " + "\xff" * 5000}),
    ]
    return ways[random.integers(len(ways))]


def _sent(data: Callable[[Random], bytes]) -> Callable[[Random], Attack]:
    return lambda random: (_as_form if random.integers(4) == 0 else _as_json)(data(random), random)


MAKERS: dict[str, Callable[[Random], Attack]] = {
    "truncated": _sent(_truncated),
    "garbled": _sent(_garbled),
    "bomb": _sent(_bomb),
    "polyglot": _sent(_polyglot),
    "json": _bytes_of_json,
    "base64": _base64,
    "content type": _kinds,
    "sending": _sending,
}


def attack(seed: int) -> Attack:
    """The request of a seed; kinds take turns."""
    kind = list(MAKERS)[seed % len(MAKERS)]
    made: Any = MAKERS[kind](np.random.default_rng(seed))
    made.kind = f"{kind}, seed {seed}"
    return made
