"""Runs and sweeps to compare, made by hand; a page's charts, taken apart."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.config import PRESETS, ExperimentConfig
from tuning.compare.collect import Compared
from tuning.sweep.sweep_record import METRIC, Protocol, Sweep, Trial

BASE = PRESETS["both-dual-tiny"]
T, K = "objective.temperature.start", "objective.codebook.size"
HEALTH = {"codebook/ppl_v_share": 0.62, "codebook/agree1": 0.3, "codebook/kappa": 0.25, "codebook/dead": 0.04}


def scores(image: float, text: float | None = None, pairs: float = 1000) -> dict[str, float]:
    """Metrics of a packaged model: recall at 1 of both ways, and what they were measured on."""
    return {
        "val/image_retrieval_recall_at_1": image,
        "val/text_retrieval_recall_at_1": image if text is None else text,
        "val/images": pairs,
        "val/captions": pairs,
    }


def item(name: str, recall: float | None = None, **changes: Any) -> Compared:
    """A finished run."""
    values = {
        "where": f"/runs/{name}",
        "config": BASE,
        "status": "finished",
        "metrics": {} if recall is None else scores(recall),
        "samples": 1000.0,
    }
    return Compared(name, **values | changes)


def trial(name: str, recall: float | None, settings: dict[str, Any], **changes: Any) -> Trial:
    values = {
        "overrides": settings,
        "status": "finished",
        "metrics": {} if recall is None else scores(recall),
        "samples_seen": 900,
        "seconds": 60.0,
        "curve": [] if recall is None else [(300, recall / 3), (900, recall)],
        "run_folder": f"trials/{name}",
    }
    return Trial(trial_id=name, **values | changes)


def sweep(folder: Path | str, trials: list[Trial], **changes: Any) -> str:
    """A sweep's folder with its `sweep.json`; returns it."""
    base = BASE.override({"train_data": "/data/train", "val_data": "/data/val", "out": str(folder), "name": "sweep"})
    values = {
        "name": "sweep",
        "preset": base.preset,
        "base": base,
        "space": {T: {"grid": [0.02, 0.05, 0.1]}, K: {"grid": [64, 256, 1024]}},
        "search": "grid",
        "scheduler": "halving",
        "trials_planned": len(trials),
        "samples_planned": 900,
        "protocol": Protocol(val_data="/data/val", val_manifest="m1", pairs=500),
        "trials": trials,
    }
    uri = storage.join(str(folder), "sweep")
    Sweep(**values | changes).save(uri)
    return uri


def grid(pruned: bool = True) -> list[Trial]:
    """Three temperatures by three codebook sizes; the six worst pruned at 300 samples."""
    trials = []
    for place, (t, k) in enumerate(itertools.product((0.02, 0.05, 0.1), (64, 256, 1024))):
        recall = 0.3 - 0.1 * abs(math.log(t / 0.05)) - 0.02 * abs(math.log2(k / 256))
        changes: dict[str, Any] = {}
        if pruned and t != 0.05:
            metrics = {METRIC: recall / 3, "val/pairs": 500.0}
            changes = {"status": "pruned", "reason": "halving", "metrics": metrics, "samples_seen": 300}
            changes |= {"curve": [(300, recall / 3)], "seconds": 25.0}
        trials.append(trial(f"t{place}", recall, {T: t, K: k}, **changes))
    return trials


def run_folder(folder: Path, config: ExperimentConfig, checkpoints: list[dict[str, float]], **files: Any) -> str:
    """A run's folder as training leaves it, made by hand; keywords are JSON files."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    entries = [{"checkpoint_dir_name": f"step-{i}", "metrics": metrics} for i, metrics in enumerate(checkpoints)]
    snapshot = {"checkpoint_results": entries, "latest_checkpoint_result": entries[-1] if entries else None}
    (folder / "checkpoints" / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    return str(folder)


def checkpoint(samples: float, recall: float, **more: float) -> dict[str, float]:
    both = {f"val/{modality}_retrieval_recall_at_1": recall for modality in ("image", "text")}
    return both | {METRIC: recall, "val/pairs": 500.0, "samples_seen": samples, "step": samples / 64} | HEALTH | more


def full_grid() -> list[Compared]:
    """Recall a sum of what each of two settings gives: 3 x 3."""
    items = []
    for (i, t), (j, k) in itertools.product(enumerate((0.02, 0.05, 0.1)), enumerate((64, 256, 1024))):
        config = BASE.override({T: t, K: k})
        overrides = {T: t, K: k}
        recall = 0.2 + 0.05 * i + 0.02 * (j == 1)
        items.append(item(f"{t}-{k}", recall, config=config, overrides=overrides, sweep="s"))
    return items


class Tags(HTMLParser):
    """Tags with attributes; checks that what is opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def check_page(html: str) -> list[ET.Element]:
    """Nothing from outside, no script, every chart well formed and in words; returns the charts."""
    tags = Tags(html).found
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [name for _, attrs in tags for name in attrs if name in ("src", "href", "srcset") or name[:2] == "on"]
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    charts = [ET.fromstring(svg) for svg in re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>(?=</figure>)', html)]
    assert all(svg.attrib["aria-label"] for svg in charts) and "nan" not in re.sub("[a-z]nan|nan[a-z]", "", html)
    return charts


def marks(svg: ET.Element, kind: str) -> list[ET.Element]:
    return [element for element in svg.iter() if kind in element.attrib.get("class", "").split()]
