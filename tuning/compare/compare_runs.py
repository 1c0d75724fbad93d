"""`triptych compare`: runs and sweeps in, a table and a page out."""

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


class Outcome(NamedTuple):
    """What `triptych compare` has to say."""

    text: str
    report: str
    """URI of the page; "" where none was written."""


def compare_runs(paths: Sequence[str], out: str | None = None) -> Outcome:
    """Compare SWEEP|RUN...: the table, and the page in OUT, for one sweep by itself in its own folder.

    The page of one sweep is also an artifact of its run in MLflow. Raises InputError for a path that is neither.
    """
    comparison = compare(gather(paths))
    text = table_text(comparison)
    sweep = _one_sweep(paths)
    folder = out or (storage.make_absolute(paths[0]) if sweep else "")
    if not folder:
        return Outcome(text, "")
    page = comparison_page(comparison, sweep)
    uri = storage.join(storage.make_absolute(folder), REPORT)
    try:
        storage.write_bytes(uri, page.encode())
    except InputError as error:
        if out:
            raise
        logger.warning("no report: %s; --out writes it elsewhere", error)  # somebody else's sweep: the table stays
        return Outcome(text, "")
    if sweep and sweep.mlflow_run_id:
        publish(page, sweep.mlflow_run_id)
    return Outcome(text, uri)


def sweep_report(uri: str) -> str:
    """Write the page of a sweep into its folder, and return it; `publish` stores it in MLflow."""
    page = comparison_page(compare(gather([uri])), Sweep.load(uri))
    storage.write_bytes(storage.join(uri, REPORT), page.encode())
    return page


def publish(page: str, run_id: str) -> bool:
    """Store the page as an artifact of a run in MLflow; returns whether it is there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / REPORT
        file.write_text(page, encoding="utf-8")
        return attach(run_id, file)


def _one_sweep(paths: Sequence[str]) -> Sweep | None:
    alone = len(paths) == 1 and storage.exists(storage.join(paths[0], FILE_NAME))
    return Sweep.load(paths[0]) if alone else None
