"""Learning rate and alpha over a run (the reference's own tables are in test_tcl_parity)."""

import pytest

from pipelines.config import OptimConfig
from pipelines.step.schedule import cosine_rate, ramped_alpha, tcl_rate


def test_cosine_climbs_in_a_line_peaks_after_warm_up_and_ends_at_the_last_rate():
    optim = OptimConfig(learning_rate=1.0, min_learning_rate=0.2, warmup=0.1)
    for progress, rate in ((0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.55, 0.6), (1.0, 0.2)):
        assert cosine_rate(optim, progress) == pytest.approx(rate)
    falling = [cosine_rate(optim, 0.1 + step / 100) for step in range(90)]
    assert falling == sorted(falling, reverse=True)
    assert cosine_rate(optim, 1.3) == pytest.approx(0.2)  # a last batch may pass the plan's end
    assert cosine_rate(optim.override({"warmup": 0.0}), 0.0) == 1.0


def test_the_references_schedule_jumps_where_an_epoch_is_shorter_than_the_warm_up():
    optim = OptimConfig(
        schedule="tcl", learning_rate=1.0, min_learning_rate=0.0, warmup_epochs=4, warmup_learning_rate=0.2
    )
    assert [tcl_rate(optim, 0, i, 2) for i in (0, 100, 101, 200, 201, 401, 900)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.4, 0.6, 1.0, 1.0]
    )
    assert tcl_rate(optim, 1, 0, 2) == pytest.approx(0.5)


def test_alpha_rises_over_its_epochs_and_stays():
    assert [ramped_alpha(0.4, 2.0, epochs) for epochs in (0, 0.5, 1, 2, 7)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert ramped_alpha(0.4, 0.0, 0.0) == 0.4
