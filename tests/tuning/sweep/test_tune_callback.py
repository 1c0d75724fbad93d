"""A trial that could not report how it ended: the reason is taken from what Ray Tune knows."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError

from tuning.sweep.trial import TrialFailed
from tuning.sweep.tune_callback import TuneEvents

LOST = "its process was lost; perhaps the machine's memory is too small"


def raised(error: Exception) -> RayTaskError:
    """As Ray hands on what a method of an actor raised."""
    return RayTaskError("ray::TrialRun", f"Traceback:\n  a line\n{type(error).__name__}: {error}\n", error)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ActorDiedError(), LOST),
        (raised(ActorDiedError()).as_instanceof_cause(), LOST),
        (None, LOST),
        (ActorDiedError(raised(ImportError("no module named this"))), "ImportError: no module named this"),
        (raised(TrialFailed("why")).as_instanceof_cause(), "TrialFailed: why"),
    ],
)
def test_a_trial_that_could_not_say_why_fails_with_what_tune_knows(tmp_path, error, reason, seed):
    file = tmp_path / "error.pkl"
    file.write_bytes(cloudpickle.dumps(error))
    noted: list[Any] = []
    recorder: Any = SimpleNamespace(
        trial_failed=lambda *args: noted.append(args), raise_if_most_failed=lambda: noted.append("checked")
    )
    lost = SimpleNamespace(
        config={"task": {"trial_id": "t00", "seed": seed}}, pickled_error_file=str(file) if error else None
    )
    TuneEvents(recorder).on_trial_error(1, [], lost)
    assert noted == [("t00", reason, seed), *(["checked"] if seed is None else [])]
