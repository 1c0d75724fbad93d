"""A corpus through both encoders of a model, to vectors: Ray Data reads, decodes, encodes and writes.

A row is one image with one of its captions, as evaluation counts pairs: an image with five captions has five rows,
which say the same `image_id`; an index holds the image once and finds it by any of them.
"""

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig, IdColumnCheckpointManager
from ray.experimental.internal_kv import _internal_kv_get

from models.config import PACKAGE_FORMAT, InputError
from models.inference import Package
from models.package import load_package
from pipelines import storage
from pipelines.artifacts.resolve import package_of, read_experiment
from pipelines.cluster import connect
from pipelines.cluster.capacity import STATUS_KEY, is_scaled
from pipelines.config import ExperimentConfig
from pipelines.data.epoch_plan import bundle
from pipelines.data.manifest import Manifest, build_manifest
from pipelines.data.ray_data import BLOCK_BYTES, NO_PROGRESS_SECONDS, QUIET, Pause, PrepareSettings, UnitsDatasource
from pipelines.embed.encoder import PACKAGE_FILES, Encoder
from pipelines.embed.folder import PROGRESS, VECTORS, Job, claim, complete, finished
from pipelines.embed.sink import SKIPPED, VectorSink
from pipelines.embed.thumbnails import SIDE
from pipelines.embed.transforms import KEY, read_prepared
from pipelines.evaluation.rerank import BATCH

ENCODER_CPUS = 0.5
"""Logical CPUs of an encoding process on CPUs: less than one, so that reading always has room."""
FEWEST_ROWS, MOST_ROWS = 256, 8192
"""Samples of one file: a sixteenth of all within these bounds. What a killed job had not written is encoded again."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedResult:
    """What lies in the folder now, and what this run did."""

    out: str
    embedding_space: str
    samples: int
    """Samples that were encoded, in all runs."""
    rows: int
    """Images with a caption each."""
    skipped: int
    reasons: dict[str, int]
    """Of the skipped, the most frequent first."""
    encoded: int
    """Samples that this run went through; the others were done before."""
    seconds: float

    def text(self) -> str:
        """For people."""
        why = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())
        before = self.samples + self.skipped - self.encoded
        if self.encoded:
            done = f"{self.encoded:,} in {self.seconds:.0f} s" + (f", {before:,} done before" if before else "")
        else:
            done = "all done before"
        return (
            f"{self.samples:,} samples encoded, {self.rows:,} rows, {self.skipped:,} skipped"
            f"{f' ({why})' if why else ''}; {done}\n"
            f"vectors of embedding space {self.embedding_space}: {self.out}"
        )


@dataclass(frozen=True)
class _Plan:
    """What the stages share."""

    settings: PrepareSettings
    package: ray.ObjectRef
    """Bytes of its files by name; to each node once."""
    thumbnails: int
    workers: int
    gpus: bool


def embed(
    model: str,
    data: str,
    out: str,
    thumbnails: bool = True,
    npy: bool = True,
    workers: int = 1,
    gpus: bool = False,
) -> EmbedResult:
    """Encode all pairs of `data` with a MODEL into the folder `out` (see `pipelines.embed.folder`).

    `workers` processes encode, each on a GPU of its own with `gpus`. A job that was killed goes on where it was; one
    that is done is not repeated. A run's own columns, limits and share of samples that may be skipped are used.
    Raises InputError: no such model or data, a folder that holds other vectors, more samples skipped than allowed.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: at least one process has to encode")
    started = time.monotonic()
    out = storage.make_absolute(out)
    with package_of(model) as folder:
        package = load_package(folder, shown_as=model)
        experiment = _experiment_of(model).override({"pairs.max_caption_words": package.preprocessor.max_caption_words})
        experiment = experiment.model_copy(update={"encoder": package.config})
        manifest = build_manifest(data, experiment.pairs)
        job = _job(package, manifest, thumbnails, npy)
        about, encoded = claim(out, job), 0
        if about is None:
            done = finished(out)
            encoded = manifest.count - len(done)
            if encoded:
                connect.connect()
                _check_gpus(gpus)
                logger.info("embed: %s of %s samples to encode", f"{encoded:,}", f"{manifest.count:,}")
                files = ray.put({name: (folder / name).read_bytes() for name in PACKAGE_FILES})
                settings = PrepareSettings.of(experiment, package.tokenizer.to_json())
                _run(out, manifest, done, _Plan(settings, files, job.thumbnails, workers, gpus))
            about = complete(out, job, manifest, experiment.pairs.max_skipped)
    return _result(out, about, encoded, time.monotonic() - started)


def _job(package: Package, manifest: Manifest, thumbnails: bool, npy: bool) -> Job:
    return Job(
        embedding_space=package.embedding_space,
        name=package.name,
        dimensions=package.config.embed_dim,
        manifest=manifest.hash,
        thumbnails=SIDE if thumbnails else 0,
        npy=npy,
    )


def _result(out: str, about: dict[str, Any], encoded: int, seconds: float) -> EmbedResult:
    known = {name: about[name] for name in ("embedding_space", "samples", "rows", "skipped", "reasons")}
    return EmbedResult(out=out, encoded=encoded, seconds=seconds, **known)


def _experiment_of(model: str) -> ExperimentConfig:
    """The experiment of a run or checkpoint; the defaults for a bare package."""
    uri = storage.join(model, "config.json")
    if not storage.exists(uri) or PACKAGE_FORMAT.encode() in storage.read_bytes(uri):
        return ExperimentConfig()
    return read_experiment(uri)


def _check_gpus(gpus: bool) -> None:
    if gpus and not ray.cluster_resources().get("GPU", 0) and not _grows():
        raise InputError("--gpus: the cluster has no GPU, and nothing adds nodes; leave it out to encode on CPUs")


def _grows() -> bool:
    """Whether more nodes come when tasks wait."""
    return is_scaled([node["Labels"] for node in ray.nodes() if node["Alive"]], _internal_kv_get(STATUS_KEY))


def _run(out: str, manifest: Manifest, done: np.ndarray, plan: _Plan) -> None:
    """Everything but the samples in `done` (sorted keys), to files; Ray Data notes what is written."""
    folder = storage.join(out, VECTORS)
    system, path = storage.filesystem(folder)
    if storage.is_local(folder):
        with storage.errors_about(folder):
            system.create_dir(f"{path}/{SKIPPED}", recursive=True)
    dataset = _dataset(_works(manifest, done, plan.thumbnails), plan)
    system, path = storage.filesystem(storage.join(out, PROGRESS))
    dataset.context.checkpoint_config = CheckpointConfig(
        KEY,
        path,
        override_filesystem=system,
        delete_checkpoint_on_success=False,  # the folder is not complete yet
        checkpoint_manager_cls=_Progress,
    )
    rows = min(max(-(-manifest.count // 16), FEWEST_ROWS), MOST_ROWS)
    sink = VectorSink(folder, rows, bool(plan.thumbnails))
    dataset.write_datasink(sink, ray_remote_args={"num_cpus": plan.settings.cpus})


class _Progress(IdColumnCheckpointManager):  # type: ignore[misc]  # Ray is not typed
    """Ray Data's record of the rows that are written, restored by us.

    Its own way reads every file again, and sends all rows through a process that drops those that are done. What is
    done is known before reading here, so that whole files can be left out. Files of writes that did not end still go.
    """

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: Any = None
    ) -> tuple[ray.ObjectRef | None, int]:
        """Nothing to filter by."""
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0


def _works(manifest: Manifest, done: np.ndarray, thumbnail_side: int) -> list[Any]:
    """(what a read task does, its samples) for all that is not done."""
    counts = np.bincount(done >> 32, minlength=len(manifest.units))
    left = [unit for unit in manifest.units if counts[unit.unit] < unit.count]
    works = []
    for group in bundle(left):
        parts = [done[slice(*np.searchsorted(done, [unit << 32, (unit + 1) << 32]))] for unit in group.units]
        units, known = [manifest.units[unit] for unit in group.units], np.concatenate(parts)
        works.append((partial(read_prepared, units, known, thumbnail_side), group.count - len(known)))
    return works


def _dataset(works: list[Any], plan: _Plan) -> ray.data.Dataset:
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    dataset = ray.data.read_datasource(
        UnitsDatasource(works, plan.settings),
        num_cpus=plan.settings.cpus,
        concurrency=None if _grows() else min(len(works), cores),  # each more costs a process
        override_num_blocks=len(works),
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Pause]
    context.target_max_block_size = BLOCK_BYTES
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    return dataset.map_batches(
        Encoder,
        batch_size=BATCH,
        batch_format="pyarrow",
        fn_constructor_kwargs={"package": plan.package, "gpu": plan.gpus},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=plan.workers),
        num_cpus=ENCODER_CPUS,
        num_gpus=1 if plan.gpus else 0,
    )
