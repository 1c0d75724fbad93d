"""Real pictures: Debian's public-domain clip art as train, val and test parquet. Usage: python examples/clipart.py OUT

Needs apt-get and dpkg (Debian, Ubuntu) and an `apt-get update` done before; 156 MB are fetched, nothing is installed.
Captions come from the titles, descriptions and keywords in the SVGs' metadata; the pictures are the ready-made PNGs.
"""

import argparse
import hashlib
import io
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from clipart_captions import COMMON, Entry, captions, read_entries, words_of
from PIL import Image

from models.config import InputError
from pipelines import storage
from pipelines.data.synthetic import SPLITS, pairs_parquet, require_empty

PACKAGES = ("openclipart-png", "openclipart-svg")
SIDE = 256
"""Longest side of a stored picture, pixels."""
log = logging.getLogger("clipart")


@dataclass(frozen=True)
class Pair:
    """A picture (PNG bytes) with its caption, and `outline`: 512 bits that look-alikes nearly share."""

    entry: Entry
    caption: str
    image: bytes
    outline: np.ndarray


# ---- packages


def fetch(folder: Path) -> Path:
    """Download and unpack the packages below `folder` (what is there already is kept); the clip art's own folder."""
    for package in PACKAGES:
        if not list(folder.glob(f"{package}_*.deb")):
            _run(["apt-get", "download", package], folder)
        for archive in folder.glob(f"{package}_*.deb"):
            _run(["dpkg", "-x", archive.name, "unpacked"], folder)
    return folder / "unpacked" / "usr" / "share" / "openclipart"


def _run(command: list[str], folder: Path) -> None:
    """Run a command in the folder; InputError with its last line where it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError(f"{command[0]}: not found; this example needs Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"{' '.join(command)}: {reason} (run `apt-get update` first)") from None


# ---- pictures


def load(path: Path) -> tuple[bytes, np.ndarray] | None:
    """A PNG of at most SIDE pixels over white, and its outline; None where it is unreadable, huge or nearly empty."""
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path) as image,
        ):
            picture = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        log.debug("%s: left out: %s", path, error)
        return None
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    grey = np.asarray(picture.convert("L").resize((17, 17), Image.Resampling.BOX), np.int16)
    if min(picture.size) < 8 or grey.std() < 2:
        return None
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    rising = np.diff(grey[:16], axis=1) > 2, np.diff(grey[:, :16], axis=0) > 2
    return buffer.getvalue(), np.concatenate([edges.ravel() for edges in rising])


# ---- splits


def series(entry: Entry) -> str:
    """The file name without serial numbers and (cut) author names: what the pictures of a series share."""
    authors = [word for name in entry.authors for word in re.findall(r"[^\W_]+", name.lower())]
    tokens = re.split(r"[_\W]+", entry.name.rsplit("/", 1)[-1].lower())
    while tokens and (
        not tokens[-1].strip("0123456789") or any(word.startswith(tokens[-1]) for word in authors) or tokens[-1] == "bw"
    ):
        tokens.pop()
    return " ".join(tokens).rstrip("0123456789 ")


def families(pairs: list[Pair]) -> list[list[int]]:
    """Indices of the pairs, those that belong together in one list: equal captions or titles, series, look-alikes."""
    parent = list(range(len(pairs)))  # union-find

    def head(member: int) -> int:
        while parent[member] != member:
            member = parent[member] = parent[parent[member]]
        return member

    seen: dict[tuple[str, object], int] = {}
    links = _look_alikes(np.array([pair.outline for pair in pairs], np.float32))
    for index, pair in enumerate(pairs):
        title = words_of(pair.caption.split(",")[0])
        for kind, key in (("caption", words_of(pair.caption)), ("title", title), ("series", series(pair.entry))):
            if key:
                links.append((index, seen.setdefault((kind, key), index)))
    for link in links:
        low, high = sorted(map(head, link))
        parent[high] = low
    members = defaultdict(list)
    for index in range(len(pairs)):
        members[head(index)].append(index)
    return list(members.values())


def _look_alikes(outlines: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows (N, 512) that differ in at most a tenth of the edges of the richer one."""
    edges, found = outlines.sum(1), []
    for index, row in enumerate(outlines):
        differing = edges[index] + edges[:index] - 2 * (outlines[:index] @ row)
        alike = np.flatnonzero(differing <= 0.1 * np.maximum(edges[index], edges[:index]))
        found += [(index, int(other)) for other in alike]
    return found


def divide(groups: Iterable[list[int]], count: int) -> dict[str, list[int]]:
    """Whole families to val and test, a tenth each, and the rest to train; chance decides, always the same way."""
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    ordered = sorted(groups, key=lambda group: hashlib.sha256(str(group[0]).encode()).digest())
    for group in ordered:
        small = len(group) <= max(1, count // 200)  # a large family would make a whole split of one thing
        wanting = [split for split in ("val", "test") if len(parts[split]) + len(group) <= count // 10]
        parts[wanting[0] if small and wanting else "train"].extend(group)
    return {split: sorted(indices) for split, indices in parts.items()}


# ---- all of it


def build(folder: Path, out: str) -> dict[str, int]:
    """Write OUT/train, val and test from an unpacked folder with svg and png; pairs of each. InputError if none."""
    require_empty(out)
    pairs: list[Pair] = []
    seen: dict[str, set[bytes]] = defaultdict(set)  # pictures of a caption
    for entry, caption in captions(list(read_entries(folder))):
        loaded = load(folder / "png" / f"{entry.name}.png")
        if loaded and len(seen[caption]) < COMMON and loaded[0] not in seen[caption]:
            seen[caption].add(loaded[0])
            pairs.append(Pair(entry, caption, *loaded))
    if not pairs:
        raise InputError(f"{folder}: no picture there has a usable title or description")
    parts = divide(families(pairs), len(pairs))
    for split, indices in parts.items():
        chosen = [pairs[index] for index in indices]
        columns: dict[str, list[Any]] = {
            "image": [pair.image for pair in chosen],
            "caption": [pair.caption for pair in chosen],
            "id": [pair.entry.name for pair in chosen],
            "image_id": [hashlib.sha256(pair.image).hexdigest()[:16] for pair in chosen],
        }
        if chosen:
            storage.write_bytes(storage.join(out, split, "00000.parquet"), pairs_parquet(columns, len(chosen)))
    return {split: len(indices) for split, indices in parts.items()}


def main(arguments: list[str] | None = None) -> int:
    """Fetch, unpack, build; prints the number of pairs."""
    parser = argparse.ArgumentParser(description="Debian's clip art as train, val and test parquet")
    parser.add_argument("out", help="new or empty folder or URL; gets train, val and test")
    parser.add_argument("--work", help="folder that keeps the downloaded packages; without it they are thrown away")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(options.work or temporary)
            work.mkdir(parents=True, exist_ok=True)
            counts = build(fetch(work), options.out)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("".join(f"{split}: {count} pairs\n" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
