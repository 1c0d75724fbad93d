"""Which trials go on. At rungs of 1/9 and 1/3 of the planned samples the best third does (eta = 3).

`asha` and `median` are Ray Tune's own. `halving` is synchronous: all trials of a rung wait for each other, so their
order does not matter. Ray's HyperBandScheduler, the nearest to it, deals trials to brackets of fixed sizes, some of
which are never halved; here a rung is one round of Tune, and what comes next is read from the trials' curves alone.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from tuning.sweep.sweep_record import METRIC, Sweep, Trial

ETA = 3
"""One trial in ETA goes on from a rung, and the next rung has ETA times the samples."""
RUNGS = 3
"""Rungs, the end of training included."""
TIME = "samples_seen"
"""Key of a Tune result by which schedulers measure progress."""

SchedulerName = Literal["asha", "halving", "median", "none"]


def rungs(planned: int) -> list[int]:
    """Samples seen at which trials are judged, ascending; the end of training is not among them."""
    first = max(1, planned // ETA ** (RUNGS - 1))
    return [first * ETA**place for place in range(RUNGS - 1) if first * ETA**place < planned]


def validation_share(every: float) -> float:
    """The largest share of the run between two validations, at most `every`, that meets all rungs."""
    finest = ETA ** (RUNGS - 1)
    return 1 / float(finest * math.ceil(1 / (finest * every) - 1e-9))


def pause_points(name: SchedulerName, planned: int, every: float) -> tuple[int, ...]:
    """Samples seen at which a trial pauses until its scheduler has decided, ascending.

    None for `halving`, which ends a trial at its rung and starts it again if it goes on.
    """
    if name == "asha":
        return tuple(rungs(planned))
    if name == "median":
        return tuple(math.floor(place * every * planned + 1e-6) for place in range(1, round(1 / every)))
    return ()


def tune_scheduler(name: SchedulerName, planned: int) -> Any:
    """The Ray scheduler of that name: `asha`, `median`, or first in first out."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    grace = rungs(planned)[0] if rungs(planned) else planned
    shared = {"time_attr": TIME, "metric": METRIC, "mode": "max", "grace_period": grace}
    if name == "asha":
        # a trial at its end is packaged, so nobody has to stop it there
        return ASHAScheduler(**shared, max_t=planned, reduction_factor=ETA, stop_last_trials=False)
    if name == "median":
        return MedianStoppingRule(**shared, min_time_slice=math.inf)  # never pauses a trial to let others run
    return FIFOScheduler()


class TrialStub:
    """A trial as schedulers see one: nothing but its id."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def replay_history(scheduler: Any, sweep: Sweep) -> None:
    """Give a new scheduler the results of an interrupted sweep, for Tune saves the state of searchers only.

    What an unfinished trial reports again when it goes on (`undecided_validation`) is left out, or it counted twice.
    """
    for trial in sweep.trials:
        again = None if trial.ended else undecided_validation(trial, sweep)
        points = [point for point in trial.curve if point != again]
        if not points:
            continue
        past = TrialStub(trial.trial_id)
        scheduler.on_trial_add(None, past)
        for seen, value in points:
            scheduler.on_trial_result(None, past, {TIME: seen, METRIC: value})
        if trial.ended:
            scheduler.on_trial_complete(None, past, {TIME: points[-1][0], METRIC: points[-1][1]})


def undecided_validation(trial: Trial, sweep: Sweep) -> tuple[int, float] | None:
    """(samples, value) of the newest validation, if it was at a pause point, else None.

    The driver may have been lost before the scheduler decided on it, so a trial that goes on reports it again.
    """
    if not trial.curve:
        return None
    before = trial.curve[-2][0] if len(trial.curve) > 1 else 0
    points = pause_points(sweep.scheduler, sweep.samples_planned, sweep.base.checkpoints.every)
    return trial.curve[-1] if any(before < point <= trial.curve[-1][0] for point in points) else None


class Round(NamedTuple):
    """What synchronous halving does next."""

    until: int
    """Samples to train up to; the planned ones or more: to the end."""
    trials: list[Trial]
    """Trials of this round; none: the search is over."""
    pruned: dict[str, str]
    """{trial id: reason} of all trials that did not go on from some rung."""


def halving(trials: Sequence[Trial], planned: int) -> Round:
    """The next round, from the trials' curves and ends alone: the same after any interruption and in any order.

    A trial that failed counts in its rung and goes no further. Of equals the first goes on.
    """
    members, pruned = list(trials), dict[str, str]()
    for rung in rungs(planned):
        waiting = [trial for trial in members if not trial.ended and trial.at(rung) is None]
        if waiting:
            return Round(rung, waiting, pruned)
        values = {trial.trial_id: value for trial in members if (value := trial.at(rung)) is not None}
        ranked = sorted((t for t in members if t.trial_id in values), key=lambda t: -values[t.trial_id])
        kept = ranked[: math.ceil(len(members) / ETA)]
        # A failed trial has no value, but counts: a third of all `members` goes on, or failures would dilute the rung.
        for place, trial in enumerate(ranked[len(kept) :], len(kept) + 1):
            pruned[trial.trial_id] = (
                f"place {place} of {len(members)} at {trial.samples_at(rung):,} samples: recall "
                f"{values[trial.trial_id]:.3f}, the last to go on had {values[kept[-1].trial_id]:.3f}"
            )
        members = kept
    return Round(planned, [trial for trial in members if not trial.ended], pruned)


def finalists(sweep: Sweep) -> list[Trial]:
    """Trials to be trained again with other seeds: the best third, at most three, best first."""
    most = min(3, math.ceil(len(sweep.trials) / ETA))
    return [trial for trial in sweep.ranked() if not trial.own_alarms or trial.status == "finished"][:most]
