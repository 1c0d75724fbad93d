"""Does the codebook stay in use, and do the alarms see it collapse? both-tiny on the generated corpus, balance 1 and 0.

    python -m benchmarks.codebook_health [--folder codebook-health] [--samples 40000] [--preset both-tiny]

Trains both on two workers, writes benchmarks/results/codebook_health.json and FOLDER/report.html with perplexity and
agreement of both. About four minutes a run on two CPU cores; the collapsed one may be stopped by its alarm before.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from pipelines.config import PRESETS
from pipelines.data.synthetic import CorpusConfig
from pipelines.demo.run import make_corpus, series
from pipelines.report.charts import Chart, Series
from pipelines.report.page import charts_page
from pipelines.train.events import Event
from pipelines.train.fit import TrainingFailed, fit

RESULT = Path(__file__).parent / "results" / "codebook_health.json"
LABELS = {1.0: "balanced", 0.0: "balance 0"}
CHARTS = {
    "ppl_v": "Perplexity of the nearest code, images",
    "ppl_t": "Perplexity of the nearest code, texts",
    "agree1": "Pairs with the same nearest code",
    "kappa": "The same above chance (kappa)",
    "H_student": "Entropy of the student's prediction, share of ln K",
    "kl": "Reducible part of the code loss",
}


def train(folder: Path, preset: str, balance: float, samples: int) -> dict[str, Any]:
    """One run: its curves, alarms, last values and recall; a stopped run keeps what it had."""
    name = f"balance-{balance:g}"
    shutil.rmtree(folder / name, ignore_errors=True)
    data = folder / "data"
    changes: dict[str, Any] = {
        "objective.codebook.balance": balance,
        "optim.min_samples": samples,
        "optim.epochs": 0.01,
    }
    experiment = PRESETS[preset].override(changes | {"compute.workers": 2, "name": name, "out": str(folder)})
    experiment = experiment.override({"train_data": str(data / "train"), "val_data": str(data / "val")})
    started, reason, recall = time.monotonic(), "", {}
    history: list[Event]
    try:
        result = fit(experiment)
        history, recall = list(result.history), result.metrics
    except TrainingFailed as error:
        history, reason = list(error.history), str(error)
    curves = series(history, "step", "codebook/", "samples")
    return {
        "balance": balance,
        "codes": experiment.objective.codebook.size,
        "samples": max(event["samples"] for event in history),
        "seconds": round(time.monotonic() - started, 1),
        "stopped": reason,
        "alarms": [
            {key: event[key] for key in ("step", "samples", "level", "key", "value", "text")}
            for event in history
            if event["kind"] == "alarm"
        ],
        "last": {key: points[-1][1] for key, points in curves.items()},
        "recall": {key: value for key, value in recall.items() if "recall_at" in key},
        "curves": {key: curves[key] for key in CHARTS if key in curves},
    }


def main() -> int:
    """Trains both, writes result and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("codebook-health"))
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--preset", default="both-tiny")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("pipelines").setLevel(logging.INFO)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    make_corpus(folder / "data", CorpusConfig())
    runs = [train(folder, options.preset, balance, options.samples) for balance in LABELS]
    result = {"machine": machine(), "preset": options.preset, "runs": runs}
    RESULT.write_text(json.dumps(result, indent=1))
    charts = []
    for key, title in CHARTS.items():
        lines: dict[str, Series] = {LABELS[r["balance"]]: r["curves"][key] for r in runs if key in r["curves"]}
        charts.append(Chart(title, "samples seen", lines))
    lead = (
        f"{options.preset}, {runs[0]['codes']} codes, on 10,000 generated scenes: with balanced assignment, and with "
        "none, where codes collapse. Agreement alone would call the collapsed run the better one."
    )
    charts_page(folder / "report.html", "Codebook health", lead, charts)
    for run in runs:
        used = f"perplexity {run['last']['ppl_v']:.0f} and {run['last']['ppl_t']:.0f} of {run['codes']}"
        alarms = sorted({alarm["key"] for alarm in run["alarms"] if alarm["level"] != "range"})
        end = f"stopped: {run['stopped']}" if run["stopped"] else f"alarms: {', '.join(alarms) or 'none'}"
        sys.stdout.write(f"balance {run['balance']:g}: {run['samples']:,} samples, {used}; {end}\n")
    sys.stdout.write(f"{folder / 'report.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
