"""Progress of a running sweep, as a table on a terminal and as log lines elsewhere; the summary of one that ended."""

import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from models.redact import redact
from pipelines import storage
from tuning.sweep.schedulers import finalists
from tuning.sweep.sweep_record import Sweep, Trial, short_names

logger = logging.getLogger(__name__)

LINE_SECONDS = 30.0
"""Time between two log lines where there is no terminal."""
STYLES = {"running": "cyan", "finished": "green", "pruned": "dim", "failed": "red", "pending": ""}


def overrides_text(trial: Trial, names: Mapping[str, str]) -> str:
    """A trial's overrides on one line: `temperature.start=0.07 codebook.size=256`."""
    return " ".join(f"{names.get(key, key)}={value_text(value)}" for key, value in trial.overrides.items())


def value_text(value: Any) -> str:
    """A value as a person would write it."""
    return f"{value:g}" if isinstance(value, float) else redact(str(value))


def percent(value: float | None) -> str:
    """A recall; a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


def sweep_table(sweep: Sweep, progress: Mapping[str, int]) -> Table:
    """Trials with settings, samples, recall and state. `progress`: {trial id: samples seen}, newer than the record."""
    used = sum(progress.get(trial.trial_id, trial.samples_seen) for trial in sweep.trials)
    grid = sweep.samples_planned * max(sweep.trials_planned, 1)
    table = Table(title=f"{sweep.name}: {used:,} of at most {grid:,} samples ({used / grid:.0%})", title_justify="left")
    for column in ("trial", "settings"):
        table.add_column(column)
    for column in ("samples", "recall@1"):
        table.add_column(column, justify="right")
    table.add_column("state", overflow="ellipsis", max_width=60)
    names = short_names(list(sweep.space))
    for trial in sweep.trials:
        samples = progress.get(trial.trial_id, trial.samples_seen)
        state = f"{trial.status}: {trial.reason}" if trial.reason else _state(sweep, trial)
        row = (trial.trial_id, overrides_text(trial, names), f"{samples:,}", percent(trial.recall), state)
        table.add_row(*row, style=STYLES[trial.status])
    return table


def _state(sweep: Sweep, trial: Trial) -> str:
    if trial.status == "pending" and trial.curve:
        return "waiting at its rung"
    if trial.repeats:
        return f"{trial.status}, {len(trial.repeats)} of {sweep.repeats_planned} repeats"
    return trial.status


def progress_line(sweep: Sweep, progress: Mapping[str, int]) -> str:
    """The sweep's state on one line: trials by status, samples, the best recall."""
    counts = {status: sum(trial.status == status for trial in sweep.trials) for status in STYLES}
    used = sum(progress.get(trial.trial_id, trial.samples_seen) for trial in sweep.trials)
    states = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    best = max((recall for trial in sweep.trials if (recall := trial.recall) is not None), default=None)
    return f"{sweep.name}: {states}; {used:,} samples; best recall@1 so far {percent(best)}"


@contextmanager
def live_progress(sweep: Sweep, progress: Mapping[str, int], lock: Any, every: float = LINE_SECONDS) -> Iterator[None]:
    """Show progress on standard error until the block ends: a live table, or a line every `every` seconds."""

    def under_lock(make: Callable[[Sweep, Mapping[str, int]], Any]) -> Any:
        with lock:
            return make(sweep, progress)

    if sys.stderr.isatty():
        live = Live(get_renderable=lambda: under_lock(sweep_table), console=Console(stderr=True), refresh_per_second=2)
        with live, _logging_above():
            yield
        return
    done = threading.Event()

    def log_progress() -> None:
        while not done.wait(every):
            logger.info(under_lock(progress_line))

    thread = threading.Thread(target=log_progress, name="table", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _logging_above() -> Iterator[None]:
    """While the live table is shown, log lines go above it.

    The table replaces `sys.stderr`; handlers that were made before hold the old stream and would write over the table.
    """
    streams = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    moved = [(handler, handler.setStream(sys.stderr)) for handler in streams if handler.stream is sys.__stderr__]
    try:
        yield
    finally:
        for handler, before in moved:
            handler.setStream(before)


def summary(sweep: Sweep, folder: str) -> str:
    """Several lines on a sweep that ended: the best trial, its settings, recall and folder, failures, and the cost."""
    names = short_names(list(sweep.space))
    best = sweep.best()
    lines = []
    if best is not None:
        lines.append(f"best trial {best.trial_id} ({best.status}): {overrides_text(best, names)}")
        lines.append(f"recall@1, mean of both directions: {percent(best.recall)}")
        lines += [_repeats_line(trial, names) for trial in finalists(sweep) if trial.repeats]
        lines.append(f"run folder: {storage.join(folder, best.run_folder)}")
    counts = [f"{sum(t.status == s for t in sweep.trials)} {s}" for s in ("finished", "pruned", "failed")]
    grid = sweep.samples_planned * len(sweep.trials)
    share = f" ({sweep.samples_used / grid:.0%} of all trials in full)" if grid else ""
    lines.append(f"{len(sweep.trials)} trials: {', '.join(counts)}; {sweep.samples_used:,} samples{share}")
    lines += [f"failed {trial.trial_id}: {trial.reason}" for trial in sweep.trials if trial.status == "failed"]
    return "\n".join([*lines, f"sweep: {folder}\nMLflow run: {sweep.mlflow_run_id}"])


def _repeats_line(trial: Trial, names: Mapping[str, str]) -> str:
    """Mean and standard deviation over seeds, the trial's own included where it finished."""
    values = trial.over_seeds()
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    seeds = f"over {len(values)} seeds: {percent(mean)} +- {percent(spread)}"
    return f"{seeds}  {trial.trial_id}  {overrides_text(trial, names)}"
