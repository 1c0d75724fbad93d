"""A look at a data set: `triptych data index | lint | stats`. Needs no Ray; reads with all cores of this machine."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from models.images import ImageRejected, decoding, open_image
from models.redact import redact
from pipelines import storage
from pipelines.config import PairsConfig
from pipelines.data.epoch_plan import bundle
from pipelines.data.manifest import FILE_NAME, Manifest, build_manifest
from pipelines.data.reader import read_units
from pipelines.data.sample import Sample
from pipelines.data.skip_ledger import LEDGER, ledger_rows, reasons_of
from pipelines.data.transforms import Columns, PrepareSettings, prepare_eval

_PAIRS = PairsConfig()


def index_data(uri: str, pairs: PairsConfig = _PAIRS) -> dict[str, Any]:
    """Write the manifest beside the data, where training finds it again; returns what it holds.

    Raises InputError where there is no such data or nothing to train on.
    """
    manifest = build_manifest(uri, pairs)
    target = storage.make_absolute(uri)
    single = any(unit.uri == target for unit in manifest.units)
    target = f"{target}.manifest" if single else storage.join(target, FILE_NAME)
    manifest.save(target, pairs)
    return {"manifest": redact(target)} | _summary(manifest)


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "samples": manifest.count,
        "files": len({unit.uri for unit in manifest.units}),
        "bytes": manifest.size,
        "formats": sorted({unit.format for unit in manifest.units}),
        "units": len(manifest.units),
        "hash": manifest.hash,
    }


def lint_data(uri: str, pairs: PairsConfig = _PAIRS) -> list[dict[str, Any]]:
    """Read and decode every sample: ledger rows of those that training would skip, by reason, unit and ordinal."""
    tables = [LEDGER.empty_table()]
    tables += [ledger_rows(columns, 0) for _, columns in _scan(build_manifest(uri, pairs), pairs)]
    order = [("reason", "ascending"), ("unit", "ascending"), ("ordinal", "ascending")]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).sort_by(order).to_pylist()
    return rows


def stats_data(uri: str, pairs: PairsConfig = _PAIRS) -> dict[str, Any]:
    """Counts, bytes, caption lengths in words, image sizes, duplicates, and samples skipped by reason."""
    manifest = build_manifest(uri, pairs)
    tables, words, sizes = [LEDGER.empty_table()], [], []
    images: Counter[int] = Counter()
    captions: Counter[str] = Counter()
    for samples, columns in _scan(manifest, pairs):
        tables.append(ledger_rows(columns, 0))
        good = np.flatnonzero(columns["reason"] == "").tolist()
        images.update(columns["image_id"][good].tolist())
        for place in good:
            captions.update(columns["captions"][place])
            words += [len(caption.split()) for caption in columns["captions"][place]]
        sizes += _sizes([samples[place] for place in good], pairs)
    skipped = pa.concat_tables(tables)
    return _summary(manifest) | {
        "good": manifest.count - len(skipped),
        "skipped": reasons_of(skipped),
        "captions": len(words),
        "caption_words": _spread(words),
        "image_width": _spread([width for width, _ in sizes]),
        "image_height": _spread([height for _, height in sizes]),
        "distinct_images": len(images),
        "repeated_images": sum(count - 1 for count in images.values()),
        "distinct_captions": len(captions),
        "repeated_captions": sum(count - 1 for count in captions.values()),
    }


def _sizes(samples: Sequence[Sample], pairs: PairsConfig) -> list[tuple[int, int]]:
    """(width, height) of images that are known to be good."""
    found = []
    with decoding():
        for sample in samples:
            try:
                found.append(open_image(sample.image, pairs.max_pixels, pairs.min_side).size)
            except ImageRejected as refusal:
                raise AssertionError(f"{sample.uri} was good before") from refusal
    return found


def _spread(values: Sequence[int]) -> dict[str, float]:
    """Smallest, middle, mean and largest value; zeros for none."""
    numbers = np.array(values or [0])
    return {
        "min": int(numbers.min()),
        "median": float(np.median(numbers)),
        "mean": round(float(numbers.mean()), 2),
        "max": int(numbers.max()),
    }


def _scan(manifest: Manifest, pairs: PairsConfig) -> Iterator[tuple[list[Sample], Columns]]:
    """All samples, a group of units at a time, as they were read and as `prepare_eval` sees them."""
    settings = PrepareSettings(image_size=8, max_tokens=2, tokenizer_json="", pairs=pairs, seed=0)

    def look(units: tuple[int, ...]) -> tuple[list[Sample], Columns]:
        samples = read_units([manifest.units[number] for number in units], pairs)
        return samples, prepare_eval(samples, settings)

    cores = os.cpu_count() or 1
    chosen = [group.units for group in bundle(manifest.units)]
    with decoding(), ThreadPoolExecutor(cores) as pool:  # once around: threads would restore each other's filters
        for start in range(0, len(chosen), cores):  # a handful at a time: their bytes are held
            yield from pool.map(look, chosen[start : start + cores])


def index(uri: str) -> str:
    """`index_data` as text."""
    return _lines(index_data(uri))


def lint(uri: str) -> str:
    """`lint_data` as text: a line a bad sample, then how many have each reason."""
    rows = lint_data(uri)
    lines = [f"{row['sample_id']}\t{row['reason']}\t{row['uri']}\t{row['detail']}" for row in rows]
    counts = Counter(row["reason"] for row in rows)
    total = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return "\n".join([*lines, f"{len(rows)} bad samples" + (f": {total}" if rows else "")])


def stats(uri: str) -> str:
    """`stats_data` as text."""
    return _lines(stats_data(uri))


def _lines(tree: Mapping[str, Any]) -> str:
    """A line a value."""
    return "\n".join(f"{name.replace('_', ' '):18} {_shown(value)}" for name, value in tree.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int | float) else str(value)
