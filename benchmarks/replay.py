"""Curves of a grid through a scheduler, without training: what it would have cost, and what it would have found.

`at_once` trials run side by side at one speed. A trial ends at a validation and each of its samples is trained once, so
samples used are those of its last validation.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tuning.sweep import schedulers
from tuning.sweep.schedulers import TrialStub
from tuning.sweep.sweep_record import METRIC, Trial

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""{trial id: [(samples seen, recall)]}, each to the planned samples."""


class Replayed(NamedTuple):
    """What a scheduler made of the grid."""

    winner: str
    """Of the trials that were trained to their end, the one with the highest recall."""
    samples: int
    finished: list[str]


def replay_asha(curves: Curves, order: Sequence[str], planned: int, at_once: int) -> Replayed:
    """Ray's own scheduler, which decides at its rungs in the order in which trials reach them."""
    scheduler = schedulers.tune_scheduler("asha", planned)
    pause_points = schedulers.pause_points("asha", planned, 1.0)
    waiting, running = list(order), dict[str, list[tuple[int, float]]]()
    clock, used, finished = dict[str, int](), dict[str, int](), list[str]()
    now = 0
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            scheduler.on_trial_add(None, TrialStub(name))
            running[name], clock[name] = _reports(curves[name], pause_points), now
        name = min(running, key=lambda n: (clock[n] + running[n][0][0], order.index(n)))
        seen, value = running[name].pop(0)
        now, used[name] = clock[name] + seen, seen
        result = {schedulers.TIME: seen, METRIC: value}
        if not running[name]:
            finished.append(name)
            scheduler.on_trial_complete(None, TrialStub(name), result)
        elif scheduler.on_trial_result(None, TrialStub(name), result) == scheduler.CONTINUE:
            continue
        del running[name]
    return Replayed(max(finished, key=lambda n: curves[n][-1][1]), sum(used.values()), finished)


def replay_halving(curves: Curves, order: Sequence[str], planned: int) -> Replayed:
    """Our synchronous rounds: each trains its trials up to the rung."""
    trials = [Trial(trial_id=name) for name in order]
    while True:
        turn = schedulers.halving(trials, planned)
        for trial in trials:
            if trial.trial_id in turn.pruned and not trial.ended:
                trial.status = "pruned"
        if not turn.trials:
            break
        for trial in turn.trials:
            points = curves[trial.trial_id]
            seen = next((seen for seen, _ in points if seen >= turn.until), points[-1][0])
            trial.curve = [point for point in points if point[0] <= seen]
            if turn.until >= planned:
                trial.status = "finished"
            elif seen < turn.until:  # an alarm ended it in the grid as well
                trial.status = "pruned"
    finished = [trial.trial_id for trial in trials if trial.status == "finished"]
    samples = sum(trial.curve[-1][0] for trial in trials)
    return Replayed(max(finished, key=lambda n: curves[n][-1][1]), samples, finished)


def _reports(curve: Sequence[tuple[int, float]], pause_points: Sequence[int]) -> list[tuple[int, float]]:
    """The validations at which a trial pauses for its scheduler, and its last."""
    reports, before = [], 0
    for seen, value in curve[:-1]:
        if any(before < point <= seen for point in pause_points):
            reports.append((seen, value))
        before = seen
    return [*reports, curve[-1]]


def rank(curves: Curves, name: str) -> int:
    """Place of a trial by its last recall, 1 for the best; of equals the same."""
    value = curves[name][-1][1]
    return 1 + sum(points[-1][1] > value for points in curves.values())


def grid_samples(curves: Curves) -> int:
    """Samples of all trials in full."""
    return sum(points[-1][0] for points in curves.values())


def within_error(curves: Curves, name: str, pairs: int) -> bool:
    """Whether a trial's recall is not clearly below the best: by at most two binomial errors of their difference."""
    best, own = max(points[-1][1] for points in curves.values()), curves[name][-1][1]
    # each recall is the mean of two directions, so of 2 x pairs queries
    error = math.sqrt((best * (1 - best) + own * (1 - own)) / (2 * pairs))
    return best - own <= 2 * error


def as_json(replayed: Replayed, curves: Curves) -> dict[str, Any]:
    """As a result file of the benchmark has it."""
    return {
        "winner": replayed.winner,
        "rank": rank(curves, replayed.winner),
        "samples": replayed.samples,
        "share_of_grid": replayed.samples / grid_samples(curves),
        "finished": replayed.finished,
    }
