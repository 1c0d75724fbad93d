"""`triptych compare`: read runs and sweeps, print a table and write a page."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models.config import InputError
from pipelines import storage
from pipelines.tracking.history import attach
from tuning.compare.collect import gather
from tuning.compare.page import comparison_page
from tuning.compare.ranking import compare
from tuning.compare.table import table_text
from tuning.sweep.sweep_record import FILE_NAME, Sweep

logger = logging.getLogger(__name__)

REPORT = "report.html"


class CompareOutcome(NamedTuple):
    """Result of a comparison."""

    text: str
    """The table with headline and remarks, as the command prints it."""
    report: str
    """URI of the page; "" where none was written."""


def compare_runs(paths: Sequence[str], out: str | None = None) -> CompareOutcome:
    """Compare the runs and sweeps in these folders; the page goes to `out`, or of a single sweep into its own folder.

    The page of one sweep is also an artifact of its run in MLflow. Raises InputError for a path that is neither.
    """
    comparison = compare(gather(paths))
    text = table_text(comparison)
    sweep = _one_sweep(paths)
    folder = out or (storage.make_absolute(paths[0]) if sweep else "")
    if not folder:
        return CompareOutcome(text, "")
    page = comparison_page(comparison, sweep)
    uri = storage.join(storage.make_absolute(folder), REPORT)
    try:
        storage.write_bytes(uri, page.encode())
    except InputError as error:
        if out:
            raise
        # Nobody asked for this page, and the sweep may be somebody else's: the table is printed all the same.
        logger.warning("no report: %s; --out writes it elsewhere", error)
        return CompareOutcome(text, "")
    if sweep and sweep.mlflow_run_id:
        publish(page, sweep.mlflow_run_id)
    return CompareOutcome(text, uri)


def publish(page: str, run_id: str) -> bool:
    """Store the page as an artifact of a run in MLflow; returns whether that worked."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / REPORT
        file.write_text(page, encoding="utf-8")
        return attach(run_id, file)


def _one_sweep(paths: Sequence[str]) -> Sweep | None:
    alone = len(paths) == 1 and storage.exists(storage.join(paths[0], FILE_NAME))
    return Sweep.load(paths[0]) if alone else None
