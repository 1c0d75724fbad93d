"""The table, the line and the summary of a sweep."""

import io

from tests.support.sweep_cases import recorded
from tuning.sweep.live_table import progress_line, summary, sweep_table
from tuning.sweep.sweep_record import METRIC


def test_table_line_and_summary_say_how_a_sweep_goes(tmp_path):
    from rich.console import Console

    sweep = recorded(tmp_path, 3)
    sweep.trials[0].overrides = {"optim.learning_rate": 0.001}
    sweep.trials[0].status, sweep.trials[0].samples_seen = "finished", 100
    sweep.trials[0].metrics = {METRIC: 0.25}
    sweep.trials[1].status, sweep.trials[1].reason = "failed", "out of memory"
    sweep.trials[2].status, sweep.trials[2].curve = "running", [(20, 0.5)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(sweep_table(sweep, {"t02": 40}))
    shown = console.export_text()
    for text in ("140 of at most 300 samples (47%)", "optim.learning_rate=0.001", "25.0%", "failed: out of memory"):
        assert text in shown
    assert progress_line(sweep, {"t02": 40}).endswith(
        "1 running, 1 finished, 1 failed; 140 samples; best recall@1 so far 50.0%"
    )
    text = summary(sweep, "/out/sweep")
    assert "best trial t00 (finished): optim.learning_rate=0.001" in text and "run folder: /out/sweep/" in text
    assert "3 trials: 1 finished, 0 pruned, 1 failed; 100 samples (33% of all trials in full)" in text
    assert "failed t01: out of memory" in text
