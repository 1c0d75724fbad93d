"""What each Ray Train worker does: stream its share, step, validate, checkpoint."""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from models.batch import Batch
from models.collectives import DistributedWorkers, SoloWorkers, Workers
from models.config import InputError
from models.masking import SpecialTokens, select_tokens
from models.objectives import ScheduleState
from models.package import verify_files
from models.preprocess import CaptionTokenizer, PreprocessorConfig
from models.sample_rng import hash64
from pipelines.config import ExperimentConfig
from pipelines.data.augment import augment
from pipelines.data.epoch_plan import merge
from pipelines.data.loader import EpochStream, Rows
from pipelines.data.manifest import Manifest
from pipelines.data.skip_ledger import check_balance, check_skipped
from pipelines.evaluation.validate import Validation
from pipelines.step.schedule import cosine_rate, schedule_state_at, tcl_rate
from pipelines.step.state import equalise
from pipelines.step.training_step import training_step
from pipelines.train.checkpoint import Progress, RunFiles, read_checkpoint, read_table, write_checkpoint
from pipelines.train.health import TrainingStopped, Watch
from pipelines.train.monitor import Meter
from pipelines.train.pause_points import Holds
from pipelines.train.sample_log import Records
from pipelines.train.setup import set_threads, start_state, step_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What the driver gives every worker."""

    experiment: ExperimentConfig
    manifest: Manifest
    validation: Manifest
    tokenizer_json: str
    initial_weights: str
    mailbox: Any
    holds: tuple[int, ...] = ()
    """Samples seen after which, once validated, the run asks whether to go on."""
    fatal: tuple[str, ...] = ()
    """Keys of which an alarm ends the run, besides whatever has level stop."""


class Counts(NamedTuple):
    """One step over all workers: manifest positions, good samples, tokens of the longest caption."""

    positions: int
    good: int
    longest: int


def train_worker(job: Job) -> dict[str, Any]:
    """Train's entry point; alike on all ranks.

    Returns {} at the plan's end, {"left": samples} where the run was told to leave, and {"stopped": reason, "alarm":
    key} where it cannot go on, with an empty key unless an alarm ended it.
    """
    run = Run(job)
    try:
        return run.train()
    except TrainingStopped as error:
        return {"stopped": str(error), "alarm": error.alarm}
    finally:
        run.stream.close()


class Run:
    """One worker's view of a training run."""

    def __init__(self, job: Job) -> None:
        self.job, self.experiment = job, job.experiment
        self.workers: Workers = DistributedWorkers() if dist.is_initialized() else SoloWorkers()
        set_threads(self.experiment.compute, self.workers.world_size)
        self.device = get_device()
        self.tokenizer = CaptionTokenizer.from_json(job.tokenizer_json)
        self.settings = step_settings(self.experiment, self.tokenizer, self.device)
        self.state = start_state(self.experiment, job.initial_weights, self.device)
        self.records = Records(self.experiment.pairs.record_ids)
        self.progress = Progress()
        self._restore()
        equalise(self.state, self.workers)
        self.planned = planned_samples(self.experiment, job.manifest.count)
        self.validation = Validation(job.validation, self.experiment, self.tokenizer, self.workers, self.device)
        self.stream = EpochStream(
            self.experiment,
            job.manifest,
            job.tokenizer_json,
            (self.workers.rank, self.workers.world_size),
            self.progress.position,
            self.planned,
        )
        self.meter = Meter()
        self.watch = Watch(self.state, self.settings, self.workers, self.experiment.encoder.embed_dim)
        self.metrics: dict[str, float] = {}
        self.holds = Holds(job.holds, self.progress.seen, self.planned, job.mailbox)

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        seed = hash64(self.experiment.seed, self.workers.rank)
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                verify_files(Path(folder), checkpoint.path)
                self.progress = read_checkpoint(Path(folder), self.state, checkpoint.path)
                if self.workers.rank == 0:
                    self.records.restore(read_table(Path(folder), "skipped"), read_table(Path(folder), "ids"))
            seed = hash64(self.experiment.seed, self.workers.rank, self.progress.step)
        torch.manual_seed(seed % 2**63)  # dropout, the one draw that belongs to a rank

    def train(self) -> dict[str, Any]:
        """Run the plan to its end; returns what `train_worker` does. Raises TrainingStopped."""
        interval = self.experiment.checkpoints.every * self.planned
        due = (self.progress.seen // interval + 1) * interval
        while self.progress.seen < self.planned:
            counts, rows = self._next_rows()
            if counts.positions == 0:
                self._end_epoch()
                continue
            if counts.good:
                self._step(rows, counts)
            else:
                self.meter.empty_steps += 1
            self.progress.seen += counts.positions
            self.progress.epoch_good += counts.good
            self.records.add(rows, self.progress.step, self.workers.rank)
            if self.progress.seen >= min(due, self.planned):
                self._checkpoint()
                due += interval
                if not self.holds.may_go_on(self.progress.seen, self._tell_hold, self.workers, self.device):
                    return {"left": self.progress.seen}
        if self.progress.seen % self.job.manifest.count == 0:  # the last epoch is whole, so it is checked as well
            self._end_epoch()
        return {}

    def _next_rows(self) -> tuple[Counts, Rows | None]:
        """This worker's next rows of the epoch, and what all workers have: none anywhere ends the epoch."""
        with self.meter.waiting():
            rows = self.stream.next_rows(self.progress.position.epoch)
        mine = (len(rows), rows.good, rows.longest) if rows else (0, 0, 0)
        table = self.workers.all_gather_rows(
            torch.tensor([mine], device=self.device), [1] * self.workers.world_size
        ).cpu()
        return Counts(int(table[:, 0].sum()), int(table[:, 1].sum()), int(table[:, 2].max())), rows

    def _step(self, rows: Rows | None, counts: Counts) -> None:
        batch = to_batch(rows, counts.longest, self.experiment, self.device, self.settings.tokens)
        due = (self.progress.step + 1) % self.experiment.progress.every == 0
        rate = self._learning_rate()
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate
        result = training_step(self.state, batch, self.settings, self._schedule_state(due), self.workers)
        self.progress.step += 1
        self.progress.epoch_step += 1
        self.meter.add(result, counts.good, self.progress.step)
        if due:
            self._report_step(rate)

    def _schedule_state(self, measured: bool = False) -> ScheduleState:
        epochs = self.progress.seen / self.job.manifest.count
        share = self.progress.seen / self.planned
        return schedule_state_at(self.experiment.objective, share, epochs, self.progress.step, measured)

    def _learning_rate(self) -> float:
        optim = self.experiment.optim
        if optim.schedule == "cosine":
            return cosine_rate(optim, self.progress.seen / self.planned)
        epochs = max(1.0, self.planned / self.job.manifest.count)
        return tcl_rate(optim, self.progress.position.epoch, self.progress.epoch_step, epochs)

    def _report_step(self, rate: float) -> None:
        """Tell losses, speed and the codebook's state since the last report.

        Raises TrainingStopped, on all workers alike, where they are not finite or give an alarm that ends the run.
        """
        values, step = self.meter.read(), self.progress.step
        usage = self.watch.usage(step, self.progress.seen / self.planned)  # shared by all workers, so at every report
        if not values:
            return
        temperature = float(self.state.model.temperature.detach())
        values |= usage | {
            "train/learning_rate": rate,
            "train/alpha": self._schedule_state().alpha,
            "train/temperature": temperature,
        }
        self.metrics |= values | {"samples_seen": float(self.progress.seen)}
        self._tell("step", values)
        self.watch.require_finite(values, self.meter.bad_steps, step)
        alarms = self.watch.alarms(values, step, self.progress.seen / self.planned)
        for alarm in alarms:
            self._tell("alarm", {}, key=alarm.key, value=alarm.value, level=alarm.level, text=alarm.message)
        for alarm in alarms:  # when all have been told
            if alarm.ends(self.job.fatal):
                raise TrainingStopped(f"step {step}: {alarm.message}", alarm.key)

    def _end_epoch(self) -> None:
        """Check that every position of the epoch was trained or ledgered, then turn to the next."""
        totals = torch.tensor([self.records.skipped_in_epoch], device=self.device)
        skipped = self.progress.epoch_skipped + int(self.workers.all_reduce_sum(totals))
        self.records.skipped_in_epoch = 0
        count, epoch = self.job.manifest.count, self.progress.position.epoch
        try:
            check_balance(count, self.progress.epoch_good, skipped)
            check_skipped(count, skipped, self.experiment.pairs.max_skipped)
        except (RuntimeError, InputError) as error:
            raise TrainingStopped(f"epoch {epoch}: {error}") from error
        self.progress.start_epoch(epoch + 1)

    def _checkpoint(self) -> None:
        """Validate, write a checkpoint, hand it to Train (which uploads it while training goes on)."""
        self._report_step(self.state.optimizer.param_groups[0]["lr"])
        started = time.perf_counter()
        scores = self.validation.score(self.state.model)
        self.metrics |= scores | {"step": self.progress.step, "perf/validation_seconds": time.perf_counter() - started}
        self._tell("validation", scores)
        self._gather_position()
        self.records.gather(self.workers, self.device)
        checkpoint = None
        if self.workers.rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="triptych-checkpoint-"))
            files = RunFiles(self.experiment, self.tokenizer, preprocessor(self.experiment))
            write_checkpoint(folder, files, self.state, self.progress, self.metrics, self.records.tables())
            checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(
            dict(self.metrics),  # a copy: the upload may end, and be listed, when the next step has changed ours
            checkpoint=checkpoint,
            checkpoint_dir_name=f"step-{self.progress.step:08d}-{int(time.time()):x}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )
        self.meter.restart()

    def _gather_position(self) -> None:
        """Merge what every worker has consumed of the epoch, and count what was skipped."""
        counts = self.workers.row_counts(len(self.stream.done))
        mine = torch.tensor(sorted(self.stream.done.items()), dtype=torch.int64, device=self.device).view(-1, 2)
        consumed = dict(self.workers.all_gather_rows(mine, counts).tolist())  # a group is one worker's alone
        merged = merge([self.progress.position.done, consumed])
        self.progress.position = self.progress.position.replace_done(merged)
        skipped = torch.tensor([self.records.skipped_in_epoch], device=self.device)
        self.progress.epoch_skipped += int(self.workers.all_reduce_sum(skipped))
        self.records.skipped_in_epoch = 0

    def _tell_hold(self) -> None:
        self._tell("hold", self.metrics)

    def _tell(self, kind: str, metrics: dict[str, float], **more: Any) -> None:
        if self.workers.rank == 0:
            event = {"kind": kind, "step": self.progress.step, "samples": self.progress.seen, "planned": self.planned}
            self.job.mailbox.put.remote(event | {"metrics": metrics} | more)


def planned_samples(experiment: ExperimentConfig, count: int) -> int:
    """Manifest positions of the whole run."""
    return max(round(experiment.optim.epochs * count), experiment.optim.min_samples, 1)


def preprocessor(experiment: ExperimentConfig) -> PreprocessorConfig:
    """What serving must do to an image and a caption to see what training saw."""
    return PreprocessorConfig(
        image_size=experiment.encoder.vision.image_size,
        max_tokens=experiment.encoder.text.max_tokens,
        max_caption_words=experiment.pairs.max_caption_words,
    )


def to_batch(
    rows: Rows | None, longest: int, experiment: ExperimentConfig, device: torch.device, tokens: SpecialTokens
) -> Batch:
    """This worker's good rows on its device, colour-augmented and normalised; empty where it has none."""
    if rows is None or rows.good == 0:
        size = experiment.encoder.vision.image_size
        pixels = torch.zeros(0, 3, size, size, device=device)
        ids = torch.zeros(0, longest, dtype=torch.int64, device=device)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return Batch(pixels, pixels, ids, ids.bool(), none, none, none)
    host = {name: torch.from_numpy(rows.column(name)) for name in Rows.TENSORS}
    host |= {"ids": host["ids"][:, :longest].long(), "mask": host["mask"][:, :longest].bool()}
    hidden = None
    if experiment.objective.weights.mlm > 0:  # drawn twice, here only to know how many: cheaper than asking a GPU
        share = experiment.objective.mlm_probability
        hidden = tuple(select_tokens(host["ids"], host["mask"], host["key"], tokens, share).sum(1).tolist())
    columns = {name: column.to(device, non_blocking=True) for name, column in host.items()}
    first, second = (augment(columns["views"][:, i], columns["key"], i, experiment.pairs.augment) for i in (0, 1))
    return Batch(
        view1=first,
        view2=second,
        ids=columns["ids"],
        mask=columns["mask"],
        key=columns["key"],
        image_id=columns["image_id"],
        caption_id=columns["caption_id"],
        hidden=hidden,
    )
