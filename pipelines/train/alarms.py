"""What is wrong with a run's codes and embeddings, and what to do about it: the bounds of docs/spec/codebook.md 5."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple

from models.config import CodebookConfig, ObjectiveConfig

ARMED = 0.1
"""Share of the planned samples before which nothing is judged."""
KAPPA_ARMED = 0.2
"""The same for agreement above chance."""
KL_STEPS = 1000
"""Steps without a new low after which the reducible loss counts as rising."""
KL_HALF_LIFE = 100
"""Steps in which a reading of the reducible loss loses half its weight in the smoothed one."""
KL_SETTLED = 5 * KL_HALF_LIFE
"""Steps of readings that make a smoothed one: a first that is low by chance must not be the mark of all later ones."""
COLLAPSE = "codebook/collapse"
"""Key of the alarm that pairs agree only because few codes are in use; its value is `codebook/agree1`."""

Level = Literal["range", "alarm", "stop"]
LEVELS: tuple[Level, ...] = ("range", "alarm", "stop")


class Alarm(NamedTuple):
    """A metric beyond a bound."""

    key: str
    value: float
    level: Level
    """range: it left its healthy range; alarm: likely broken; stop: going on is pointless."""
    message: str
    """One line: what, value, bound, what to do."""

    def ends(self, fatal: Collection[str]) -> bool:
        """Whether it ends a run to which alarms of the keys in `fatal` are a reason to stop."""
        return self.level == "stop" or (self.level == "alarm" and self.key in fatal)


class Against(NamedTuple):
    """What bounds are measured by."""

    codes: int
    rank: int
    """Largest rank that the codes can have."""
    ppl_share: float
    """The smaller of both modalities' perplexities over the number of codes; infinite where it is not known."""
    kl_low: float
    """Lowest smoothed kl, once there has been no lower one for `KL_STEPS`; infinite before."""
    gap_first: float
    """The gap when it was first judged; infinite before."""


Bound = Callable[[Against], float]


class Row(NamedTuple):
    """One side of a metric: from which bound on it is out of its healthy range, alarming, or a reason to stop."""

    key: str
    side: Literal["below", "above"]
    bounds: tuple[Bound | None, Bound | None, Bound | None]
    """In the order of `LEVELS`; the metric must be beyond, not at it."""
    advice: str
    after: float = 0.0
    """Share of the planned samples."""


def _above(key: str, healthy: float, alarm: float, advice: str) -> Row:
    return Row(key, "above", (lambda _: healthy, lambda _: alarm, None), advice)


def _perplexity(key: str, samples: str) -> Row:
    # The least is 4 codes; where 4 codes are more than the alarm's 0.1 K, a small codebook is well used by less.
    bounds = (lambda a: 0.3 * a.codes, lambda a: 0.1 * a.codes, lambda a: min(4, 0.1 * a.codes))
    advice = f"{samples} use few codes; set objective.codebook.balance 1, or a lower objective.codebook.eps"
    return Row(key, "below", bounds, advice)


def _uniformity(key: str, samples: str) -> tuple[Row, Row]:
    crowd = f"{samples} lie close together; give objective.weights.cma or objective.weights.imc more"
    spread = f"{samples} lie as if at random; see that embedding/align falls, else lower optim.learning_rate"
    return _above(key, -2, -0.5, crowd), Row(key, "below", (lambda _: -4, None, None), spread)


def _drift(key: str, samples: str) -> Row:
    advice = f"{samples}: the teacher lags; lower objective.teacher.momentum or optim.learning_rate"
    return _above(key, 0.2, 0.5, advice)


ROWS: tuple[Row, ...] = (
    _perplexity("codebook/ppl_v", "images"),
    _perplexity("codebook/ppl_t", "texts"),
    _above(
        "codebook/dead",
        0.2,
        0.5,
        "codes that nothing is nearest to; set objective.codebook.dead.enabled, or a smaller objective.codebook.size",
    ),
    _above(
        "codebook/H_student",
        0.8,
        0.97,
        "predictions are nearly uniform; lower objective.codebook.eps, or lengthen objective.codebook.freeze",
    ),
    Row(
        "codebook/H_student",
        "below",
        (lambda _: 0.2, lambda _: 0.05, None),
        "predictions are nearly one code each; raise objective.codebook.eps and objective.codebook.tau",
    ),
    # Within 2 % of 1 (docs/spec/codebook.md 3.6: identical or very few samples). The floor of 3.6 holds by itself. A
    # mean largest target near 1 is only sharp, and teaches.
    Row(
        "codebook/H_target",
        "above",
        (None, lambda _: 0.98, None),
        "targets are nearly uniform and teach nothing; lower objective.codebook.eps, or raise objective.queue.size",
    ),
    Row(
        "codebook/kl",
        "above",
        (None, lambda a: 1.05 * a.kl_low, None),
        f"smoothed, it has risen for {KL_STEPS:,} steps; lower optim.learning_rate, or lengthen "
        "objective.codebook.freeze",
    ),
    Row(
        "codebook/kappa",
        "below",
        (None, lambda _: 0.05, None),
        "image and text of a pair get unrelated codes; set objective.codebook.beta_same 0, or raise "
        "objective.weights.cma",
        after=KAPPA_ARMED,
    ),
    # Of agreement, with few codes in use: everything in the same few codes agrees, and says nothing.
    Row(
        COLLAPSE,
        "above",
        (None, lambda a: 0.9 if a.ppl_share < 0.1 else math.inf, None),
        "pairs agree because few codes are in use; set objective.codebook.balance 1, or raise objective.weights.cma",
    ),
    # Three iterations leave a mean relative error of 0.18 to 0.25 (docs/spec/codebook.md 3.2).
    _above(
        "codebook/marg_l1",
        0.25,
        0.5,
        "codes get uneven mass; raise objective.codebook.iters, or objective.codebook.eps",
    ),
    _above(
        "codebook/g_range",
        1,
        1.5,
        "codes need large shifts for even mass; set objective.codebook.balance below 1, or a smaller "
        "objective.codebook.size",
    ),
    _above(
        "codebook/nn_cos",
        0.8,
        0.95,
        "codes are near duplicates; set objective.weights.koleo 0.1, or a smaller objective.codebook.size",
    ),
    # 10 is the alarm of codes that could have a rank of 40 and more.
    Row(
        "codebook/erank",
        "below",
        (lambda a: a.rank / 4, lambda a: min(10, a.rank / 4), None),
        "codes lie in few dimensions; set objective.weights.koleo 0.1, or lower optim.learning_rate",
    ),
    *_uniformity("embedding/unif_v", "images"),
    *_uniformity("embedding/unif_t", "texts"),
    Row(
        "embedding/gap",
        "above",
        (None, lambda a: max(0.8, a.gap_first), None),
        "images and texts move apart; give objective.weights.cma or objective.weights.imc more",
    ),
    _drift("embedding/ts_drift_v", "images"),
    _drift("embedding/ts_drift_t", "texts"),
)
"""Every row of docs/spec/codebook.md 5 with a healthy range or an alarm, one side each; non-finite numbers aside."""


class Alarms:
    """Judges a run's metrics at every report; the same metrics give the same alarms, so all workers decide alike.

    Each side of a metric is told once a level, and no milder one after a graver. What was told, the lowest kl and the
    first gap are not kept over a resume: a warning may come again.
    """

    def __init__(self, objective: ObjectiveConfig, width: int) -> None:
        config = objective.codebook
        self._armed = max(config.freeze, config.start + config.ramp, ARMED)
        self._against = Against(config.size, min(config.size, width), math.inf, math.inf, math.inf)
        self._rows = [row for row in ROWS if _applies(row.key, config)]
        self._told: dict[tuple[str, str], int] = {}
        self._trend = Trend()

    def check(self, metrics: Mapping[str, float], step: int, progress: float, window_full: bool) -> list[Alarm]:
        """What is beyond a bound for the first time; metrics that are missing or not finite are passed over.

        `progress` is samples seen over planned. Nothing before the codes are free, their terms have their whole weight,
        a tenth of the run is over and a window of usage is full.
        """
        if progress < self._armed or not window_full:
            return []
        values = {key: value for key, value in metrics.items() if math.isfinite(value)}
        if "codebook/kl" in values:
            values["codebook/kl"] = self._trend.add(values["codebook/kl"], step)
        if "codebook/agree1" in values:
            values[COLLAPSE] = values["codebook/agree1"]
        first = self._against.gap_first
        self._against = self._against._replace(
            ppl_share=min(values.get(f"codebook/ppl_{modality}_share", math.inf) for modality in "vt"),
            kl_low=self._trend.low_before(step),
            gap_first=first if first < math.inf else values.get("embedding/gap", math.inf),
        )
        judged = [
            self._judge(row, values[row.key]) for row in self._rows if row.key in values and progress >= row.after
        ]
        return [alarm for alarm in judged if alarm is not None]

    def _judge(self, row: Row, value: float) -> Alarm | None:
        """The gravest level that is beyond its bound, where it is graver than what was told."""
        told = self._told.get((row.key, row.side), -1)
        for place in range(len(LEVELS) - 1, told, -1):
            bound = row.bounds[place]
            limit = bound(self._against) if bound is not None else math.nan  # nothing is beyond NaN
            if value < limit if row.side == "below" else value > limit:
                self._told[row.key, row.side] = place
                level = LEVELS[place]
                kind = "the healthy range's " if level == "range" else ""
                verdict = "collapsed, " if level == "stop" else ""
                message = f"{row.key} {value:.4g} is {row.side} {kind}{limit:.4g}: {verdict}{row.advice}"
                return Alarm(row.key, value, level, message)
        return None


class Trend:
    """A smoothed metric, the mean of its readings weighted by age, and its lowest value."""

    def __init__(self) -> None:
        self._first, self._last, self._smooth, self._weight = -1, -1, 0.0, 0.0
        self._low, self._low_step = math.inf, 0

    def add(self, value: float, step: int) -> float:
        """Take a reading; returns the smoothed value."""
        if self._first < 0:
            self._first = self._last = step
        older = self._weight * 0.5 ** ((step - self._last) / KL_HALF_LIFE)
        self._weight, self._last = older + 1, step
        self._smooth = (older * self._smooth + value) / self._weight
        if self._smooth < self._low or step - self._first < KL_SETTLED:
            self._low, self._low_step = self._smooth, step
        return self._smooth

    def low_before(self, step: int) -> float:
        """The lowest smoothed value if it is `KL_STEPS` old; infinite otherwise."""
        return self._low if step - self._low_step >= KL_STEPS else math.inf


def _applies(key: str, config: CodebookConfig) -> bool:
    """A single code is neither used well nor badly; unequal mass is what a balance below 1 asks for."""
    if key == "codebook/marg_l1":
        return config.size > 1 and (config.balance == 1 or config.solver == "ipot")
    return config.size > 1 or not key.startswith("codebook/")
