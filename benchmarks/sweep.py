"""What a sweep costs over its trials run by hand: wall time side by side, and the share of start-up in a trial.

    python -m benchmarks.sweep [--folder sweep-cost] [--trials 4] [--samples 20000] [--rounds 1] [--preset clip-tiny]

By hand is `triptych train` for each setting, as many at once as the sweep runs, each with a Ray of its own; the sweep
runs the same settings without pruning. Both write to one MLflow file, and every trial has one torch thread. Each goes
first in every other round. Writes benchmarks/results/sweep.json; some four minutes a round on two CPU cores.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from pipelines.data.synthetic import synthesize
from tuning.sweep.sweep_record import Sweep

RESULT = Path(__file__).parent / "results" / "sweep.json"
ROOT = Path(__file__).parent.parent
RATES = [0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0035, 0.004]
SWEEP = """
import json, sys
from pipelines.config import PRESETS
from tuning.sweep.plan import SweepRequest
from tuning.sweep.run_sweep import tune
preset, changes, space = json.loads(sys.argv[1])
tune(SweepRequest(PRESETS[preset].override(changes), space=space, scheduler="none"))
"""


def settings(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """{dotted key: value} that all trials share."""
    return {
        "train_data": str(folder / "data" / "train"),
        "val_data": str(folder / "data" / "val"),
        "out": str(folder / "runs"),
        "optim.min_samples": arguments.samples,
        "optim.epochs": 0.01,
        "checkpoints.every": 1 / 9,
        "compute.threads": 1,
    }


def by_hand(arguments: argparse.Namespace, folder: Path, rates: list[float], at_once: int) -> float:
    """Seconds for `triptych train` of every setting."""

    def train(rate: float) -> None:
        words = [sys.executable, "-m", "pipelines.cli", "train", arguments.preset]
        for key, value in (settings(arguments, folder) | {"optim.learning_rate": rate}).items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        run([*words, "--name", f"hand-{rate}-{time.time_ns()}"], folder)

    started = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(train, rates))
    return time.monotonic() - started


def by_sweep(arguments: argparse.Namespace, folder: Path, rates: list[float]) -> tuple[float, Sweep]:
    """Seconds for the same settings in a sweep, and its record."""
    space = folder / "space.json"
    space.write_text(json.dumps({"optim.learning_rate": rates}))
    changes = settings(arguments, folder) | {"name": f"sweep-{time.time_ns()}"}
    started = time.monotonic()
    run([sys.executable, "-c", SWEEP, json.dumps([arguments.preset, changes, str(space)])], folder)
    return time.monotonic() - started, Sweep.load(str(folder / "runs" / changes["name"]))


def run(words: list[str], folder: Path) -> None:
    """A process that sees nothing of this one's Ray; raises CalledProcessError, its messages shown, where it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    environment |= {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr[-3000:])
        done.check_returncode()


def startup_shares(sweep: Sweep, folder: Path) -> list[float]:
    """Of each trial, the share of its time before its first step."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    shares = []
    for trial in sweep.trials:
        first = client.get_metric_history(trial.mlflow_run_id, "perf/startup_seconds")[0]
        speeds = client.get_metric_history(trial.mlflow_run_id, "perf/samples_per_second")
        speed = statistics.median(point.value for point in speeds)
        trained = first.step * sweep.base.optim.batch_size / speed  # the first report comes after some steps
        shares.append((first.value - trained) / trial.seconds)
    return shares


def main() -> int:
    """Run it, write and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("sweep-cost"))
    parser.add_argument("--preset", default="clip-tiny")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=2, help="trials by hand at once: as the sweep does here")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    folder, rates = arguments.folder.absolute(), RATES[: arguments.trials]
    shutil.rmtree(folder, ignore_errors=True)
    synthesize(str(folder / "data"), pairs=arguments.pairs)
    rounds: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        hand = by_hand(arguments, folder, rates, arguments.at_once) if number % 2 == 0 else None
        seconds, sweep = by_sweep(arguments, folder, rates)
        hand = by_hand(arguments, folder, rates, arguments.at_once) if hand is None else hand
        shares = startup_shares(sweep, folder)
        rounds.append({"by_hand_seconds": hand, "sweep_seconds": seconds, "ratio": seconds / hand, "startup": shares})
    ratio = statistics.median(entry["ratio"] for entry in rounds)
    share = statistics.median(value for entry in rounds for value in entry["startup"])
    method = {name: getattr(arguments, name) for name in ("preset", "pairs", "samples", "trials", "at_once")}
    result = {"machine": machine(), "method": method, "ratio": ratio, "startup_share": share, "rounds": rounds}
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    for entry in rounds:
        sys.stdout.write(f"by hand {entry['by_hand_seconds']:.0f} s, sweep {entry['sweep_seconds']:.0f} s\n")
    sys.stdout.write(f"sweep over by hand: {ratio:.2f} (target under 1.15); start-up: {share:.0%} of a trial\n")
    return 0 if ratio < 1.15 else 1


if __name__ == "__main__":
    sys.exit(main())
