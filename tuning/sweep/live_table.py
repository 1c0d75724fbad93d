"""How a sweep goes, while it goes: a table on a terminal, a line now and then elsewhere; and what came of it."""

import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from models.redact import redact
from pipelines import storage
from tuning.sweep.schedulers import finalists
from tuning.sweep.sweep_record import Sweep, Trial

logger = logging.getLogger(__name__)

LINE_SECONDS = 30.0
"""Between two lines where there is no terminal."""
STYLES = {"running": "cyan", "finished": "green", "pruned": "dim", "failed": "red", "pending": ""}


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """{key: its last two parts, or as many more as tell it from the others}."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-count:]) for count in range(min(2, len(parts)), len(parts) + 1)]
        single = (tail for tail in tails if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1)
        names[key] = next(single, key)
    return names


def settings(trial: Trial, names: Mapping[str, str]) -> str:
    """A trial's overrides in a few words."""
    return " ".join(f"{names.get(key, key)}={shown(value)}" for key, value in trial.overrides.items())


def shown(value: Any) -> str:
    """A value as a person would write it."""
    return f"{value:g}" if isinstance(value, float) else redact(str(value))


def percent(value: float | None) -> str:
    """A recall; a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


def sweep_table(sweep: Sweep, progress: Mapping[str, int]) -> Table:
    """trial, settings, samples, recall, state; a row a trial."""
    used = sum(progress.get(trial.trial_id, trial.samples_seen) for trial in sweep.trials)
    grid = sweep.samples_planned * max(sweep.trials_planned, 1)
    table = Table(title=f"{sweep.name}: {used:,} of at most {grid:,} samples ({used / grid:.0%})", title_justify="left")
    for column, side in (("trial", "left"), ("settings", "left"), ("samples", "right"), ("recall@1", "right")):
        table.add_column(column, justify="right" if side == "right" else "left")
    table.add_column("state", overflow="ellipsis", max_width=60)
    names = short_names(list(sweep.space))
    for trial in sweep.trials:
        samples = progress.get(trial.trial_id, trial.samples_seen)
        state = f"{trial.status}: {trial.reason}" if trial.reason else _state(sweep, trial)
        row = (trial.trial_id, settings(trial, names), f"{samples:,}", percent(trial.recall), state)
        table.add_row(*row, style=STYLES[trial.status])
    return table


def _state(sweep: Sweep, trial: Trial) -> str:
    if trial.status == "pending" and trial.curve:
        return "waiting at its rung"
    if trial.repeats:
        return f"{trial.status}, {len(trial.repeats)} of {sweep.repeats_planned} repeats"
    return trial.status


def progress_line(sweep: Sweep, progress: Mapping[str, int]) -> str:
    """The same in a line."""
    counts = {status: sum(trial.status == status for trial in sweep.trials) for status in STYLES}
    used = sum(progress.get(trial.trial_id, trial.samples_seen) for trial in sweep.trials)
    states = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    best = max((recall for trial in sweep.trials if (recall := trial.recall) is not None), default=None)
    return f"{sweep.name}: {states}; {used:,} samples; best recall@1 so far {percent(best)}"


@contextmanager
def showing(sweep: Sweep, progress: Mapping[str, int], lock: Any, every: float = LINE_SECONDS) -> Iterator[None]:
    """Show the sweep until the block ends: on standard error, whose terminal decides how."""

    def under_lock(make: Callable[[Sweep, Mapping[str, int]], Any]) -> Any:
        with lock:
            return make(sweep, progress)

    if sys.stderr.isatty():
        live = Live(get_renderable=lambda: under_lock(sweep_table), console=Console(stderr=True), refresh_per_second=2)
        with live, _logging_above():
            yield
        return
    done = threading.Event()

    def speak() -> None:
        while not done.wait(every):
            logger.info(under_lock(progress_line))

    speaker = threading.Thread(target=speak, name="table", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()


@contextmanager
def _logging_above() -> Iterator[None]:
    """Log lines go where the live table has put itself in place of standard error: above it, not through it."""
    streams = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    moved = [(handler, handler.setStream(sys.stderr)) for handler in streams if handler.stream is sys.__stderr__]
    try:
        yield
    finally:
        for handler, before in moved:
            handler.setStream(before)


def summary(sweep: Sweep, folder: str) -> str:
    """What came of the sweep: the best trial, its settings and recall, where it is, what it cost."""
    names = short_names(list(sweep.space))
    best = sweep.best()
    lines = []
    if best is not None:
        lines.append(f"best trial {best.trial_id} ({best.status}): {settings(best, names)}")
        lines.append(f"recall@1, mean of both sides: {percent(best.recall)}")
        lines += [_repeats_line(trial, names) for trial in finalists(sweep) if trial.repeats]
        lines.append(f"run folder: {storage.join(folder, best.run_folder)}")
    counts = [f"{sum(t.status == s for t in sweep.trials)} {s}" for s in ("finished", "pruned", "failed")]
    grid = sweep.samples_planned * len(sweep.trials)
    share = f" ({sweep.samples_used / grid:.0%} of all trials in full)" if grid else ""
    lines.append(f"{len(sweep.trials)} trials: {', '.join(counts)}; {sweep.samples_used:,} samples{share}")
    lines += [f"failed {trial.trial_id}: {trial.reason}" for trial in sweep.trials if trial.status == "failed"]
    return "\n".join([*lines, f"sweep: {folder}\nMLflow run: {sweep.mlflow_run_id}"])


def _repeats_line(trial: Trial, names: Mapping[str, str]) -> str:
    """Mean and spread over seeds, the trial's own included where it finished."""
    values = trial.over_seeds()
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    return f"over {len(values)} seeds: {percent(mean)} +- {percent(spread)}  {trial.trial_id}  {settings(trial, names)}"
