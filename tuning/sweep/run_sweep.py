"""`triptych tune`: a sweep over Ray Tune, whose trials are ordinary runs; `sweep.json` alone says how far it has come.

After an interruption a new Tuner continues the trials that have not ended. Tune's own state, in the folder `tune`, is
not read again: it lacks the results that schedulers have seen, and lags behind the record.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines import storage
from pipelines.cluster import connect
from pipelines.config import ExperimentConfig
from pipelines.tracking.run import Status
from tuning.sweep import schedulers
from tuning.sweep.concurrency import DRIVER_CPUS, plan_slots
from tuning.sweep.live_table import live_progress, summary
from tuning.sweep.optuna_search import Suggestions
from tuning.sweep.plan import SweepRequest, make_plan
from tuning.sweep.recorder import Recorder
from tuning.sweep.space import Space
from tuning.sweep.sweep_record import Sweep
from tuning.sweep.trial import Task, TrialRun
from tuning.sweep.tune_callback import TuneEvents

logger = logging.getLogger(__name__)

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the record and MLflow have it all
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's own handler would end the sweep as if all trials were done
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "600",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class SweepOutcome:
    """Result of a sweep."""

    folder: str
    sweep: Sweep
    text: str = field(repr=False)
    """The summary as the command prints it, several lines."""


def tune(request: SweepRequest) -> SweepOutcome:
    """Run or resume a sweep. Raises InputError before the first trial starts, for what the user can correct;

    TrainingFailed where most trials failed, after which the sweep can be resumed.
    """
    plan = make_plan(request)
    connect.connect()
    count, compute = plan_slots(plan.sweep.base.compute, max(plan.sweep.trials_planned, 1))
    base = plan.sweep.base.model_copy(update={"compute": compute})
    logger.info("%s: %d trials, %d at once", plan.sweep.name, plan.sweep.trials_planned, count)
    os.environ.update(QUIET)
    for name, level in (("ray.tune", logging.CRITICAL), ("optuna", logging.WARNING)):
        logging.getLogger(name).setLevel(level)
    recorder = Recorder(plan.sweep, plan.folder, plan.train_manifest)
    runner = _Runner(recorder, base, count)
    status: Status = "FAILED"
    try:
        with live_progress(recorder.sweep, recorder.progress, recorder.lock):
            _search(runner, plan.space)
            _repeat(runner)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        recorder.close(status, status.lower())
    return SweepOutcome(plan.folder, recorder.sweep, summary(recorder.sweep, plan.folder))


class _Runner:
    """Rounds of trials over Ray Tune."""

    def __init__(self, recorder: Recorder, base: ExperimentConfig, count: int) -> None:
        self.recorder, self.sweep = recorder, recorder.sweep
        self._base, self._count = base, count

    def run(
        self, tasks: Sequence[Task], scheduler: Any = None, pause_points: tuple[int, ...] = (), search: Any = None
    ) -> None:
        """Run the tasks, or what a searcher suggests, as many at once as fit, until all have ended or paused."""
        from ray import tune as ray_tune

        trainable = ray_tune.with_parameters(
            TrialRun, base=self._base, pause_points=pause_points, mailbox=self.recorder.mailbox
        )
        missing = self.sweep.trials_planned - sum(trial.ended for trial in self.sweep.trials)
        ray_tune.Tuner(
            ray_tune.with_resources(trainable, {"CPU": DRIVER_CPUS}),
            param_space={} if search else {"task": ray_tune.grid_search([task._asdict() for task in tasks])},
            tune_config=ray_tune.TuneConfig(
                scheduler=scheduler,
                search_alg=search,
                num_samples=missing if search else 1,
                max_concurrent_trials=self._count,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=ray_tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{time.monotonic_ns() % 1000:03d}",
                storage_path=storage.join(self.recorder.folder, "tune"),
                callbacks=[TuneEvents(self.recorder)],
                failure_config=ray_tune.FailureConfig(max_failures=0),
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
        self.recorder.flush_events()


def _trial_name(trial: Any) -> str:
    task = trial.config["task"]
    return task["trial_id"] if task["seed"] is None else f"{task['trial_id']}-{task['seed']}"


def _search(runner: _Runner, space: Space) -> None:
    """Train all trials, each to its end or as far as the scheduler lets it."""
    sweep, planned = runner.sweep, runner.sweep.samples_planned
    if sweep.scheduler == "halving":
        return _halve(runner)
    open_trials = [trial for trial in sweep.trials if not trial.ended]
    missing = sweep.trials_planned - len(sweep.trials)
    if not open_trials and not missing:
        return None
    scheduler = schedulers.tune_scheduler(sweep.scheduler, planned)
    schedulers.replay_history(scheduler, sweep)
    pause_points = schedulers.pause_points(sweep.scheduler, planned, sweep.base.checkpoints.every)
    search = Suggestions(sweep, space) if sweep.search == "optuna" else None
    tasks = [Task(t.trial_id, t.overrides, undecided=schedulers.undecided_validation(t, sweep)) for t in open_trials]
    return runner.run(tasks, scheduler, pause_points, search)


def _halve(runner: _Runner) -> None:
    """Synchronous halving: one round of Tune a rung, with the trials that have not reached it."""
    sweep = runner.sweep
    while True:
        turn = schedulers.halving(sweep.trials, sweep.samples_planned)
        for trial_id, reason in turn.pruned.items():
            if not sweep.trial(trial_id).ended:
                runner.recorder.trial_stopped(trial_id, reason)
        if not turn.trials:
            return
        until = turn.until if turn.until < sweep.samples_planned else 0
        runner.run([Task(trial.trial_id, trial.overrides, until=until) for trial in turn.trials])
        for trial in turn.trials:
            if not trial.ended and (not until or trial.at(until) is None):
                runner.recorder.trial_failed(trial.trial_id, "it ended before it was validated")


def _repeat(runner: _Runner) -> None:
    """Train the finalists again with the seeds that follow the sweep's, except repeats that the record has already."""
    sweep = runner.sweep
    tasks = [
        Task(trial.trial_id, trial.overrides, seed=seed)
        for trial in schedulers.finalists(sweep)
        for seed in range(sweep.seed + 1, sweep.seed + 1 + sweep.repeats_planned)
        if seed not in {repeat.seed for repeat in trial.repeats}
    ]
    if tasks:
        runner.recorder.begin_repeats()
        runner.run(tasks)
