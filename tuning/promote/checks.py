"""Checks of a candidate for champion: files whole, vectors and recall reproduced, and not worse than the champion."""

from collections.abc import Callable
from math import sqrt
from pathlib import Path

from torch import Tensor

from models.config import InputError
from models.package import health_vectors, load_package, load_tensors, verify_files
from models.redact import redact
from pipelines import storage
from pipelines.artifacts.resolve import local_copy, registered_package
from pipelines.cluster import connect
from pipelines.config import ExperimentConfig
from pipelines.data.manifest import build_manifest
from pipelines.evaluation.evaluate import evaluate_package
from pipelines.recall import mean_recall
from pipelines.tracking.registry import SPACE, Version
from tuning.promote.candidate import Candidate
from tuning.promote.promotion_record import Promotion

VECTORS_TOLERANCE = 1e-5
RECALL_TOLERANCE = 1e-6
Smoke = Callable[[Path], tuple[Tensor, Tensor]]
"""Package folder -> vectors that a service of it returns for the health inputs: (images, D), (captions, D)."""


class HeldOut:
    """The held-out pairs on which candidate and champion are scored, checked to be the same for both."""

    def __init__(self, data: str, experiment: ExperimentConfig) -> None:
        self.data, self._experiment, self.hash = storage.make_absolute(data), experiment, ""

    def score(self, package: str, rerank_top: int | None = 0) -> dict[str, float]:
        """{`val/...`: value} of a package (local folder); raises InputError where the data have changed."""
        self.check()
        connect.connect()
        scores = evaluate_package(package, self.data, self._experiment, rerank_top)
        return {f"val/{key}": value for key, value in scores.items()}

    def check(self) -> None:
        """Raises InputError once the data differ from those of the first score."""
        found = build_manifest(self.data, self._experiment.pairs).hash
        if self.hash not in ("", found):
            raise InputError(f"{self.data}: the data changed meanwhile; start again")
        self.hash = found


def evaluate(promotion: Promotion, candidate: Candidate, held_out: HeldOut, given: bool) -> None:
    """Score the candidate, re-ranked too where its run was. `given`: the data were named by the user."""
    promotion.data = redact(held_out.data)
    with promotion.step("evaluate") as notes, local_copy(candidate.package) as folder:
        notes.append(f"on {promotion.data}" if given else f"on the run's validation data {promotion.data} (no --data)")
        promotion.metrics = held_out.score(str(folder), None)
        recall, own = require_recall(promotion.metrics, "candidate"), mean_recall(candidate.measured)
        line = f"recall@1 mean {recall:.4f} +- {standard_error(promotion.metrics):.4f}"
        notes.append(line + (f"; the run itself measured {own:.4f}" if own is not None else ""))


def verify(promotion: Promotion, candidate: Candidate, held_out: HeldOut, package: Path) -> None:
    """Copy the package to `package`; the copy must be whole, reproduce its health vectors and have the same recall."""
    with promotion.step("verify") as notes:
        storage.download(candidate.package, str(package))
        check_files(package, candidate.package)
        difference = check_vectors(package, candidate.package)
        promotion.embedding_space = load_package(package).embedding_space
        again, first = held_out.score(str(package)), promotion.metrics
        for key in sorted(key for key in again if "recall" in key):
            # `not <=`, so that a NaN is refused
            if not abs(again[key] - first[key]) <= RECALL_TOLERANCE:
                raise InputError(f"the reloaded package gives {key} {again[key]:.6f}, but {first[key]:.6f} before")
        notes.append(
            f"space {promotion.embedding_space}, vectors within {difference:.0e}, reloaded with the same recall"
        )


def check_files(folder: Path, shown_as: str) -> None:
    """Raises InputError unless every file of a package is there, whole and unchanged."""
    try:
        verify_files(folder, shown_as)
    except InputError as error:
        reason = str(error).rpartition(";")[0]
        raise InputError(f"{reason}; train the run again, or go on with it by --resume") from error


def check_vectors(folder: Path, shown_as: str) -> float:
    """The largest difference between what a package computes and the health vectors that it carries.

    Raises InputError where it is no package, or they differ by more than `VECTORS_TOLERANCE`.
    """
    package = load_package(folder, shown_as)
    stored = load_tensors(folder / "health.safetensors")
    image, text, _ = health_vectors(package)
    pairs = (("image_vectors", image), ("text_vectors", text))
    return max(_difference(stored.get(name), now, f"{shown_as}: {name}") for name, now in pairs)


def _difference(then: Tensor | None, now: Tensor, about: str) -> float:
    """The largest absolute difference; raises InputError beyond the tolerance, NaN included."""
    if then is None or then.shape != now.shape:
        raise InputError(f"{about} of other shapes than the package computes; build it again from its run")
    worst = float((then - now).abs().max())
    if not worst <= VECTORS_TOLERANCE:
        raise InputError(f"{about} differ by {worst:.1e} from what the package computes; build it again from its run")
    return worst


def check_served(promotion: Promotion, package: Path, smoke: Smoke | None) -> None:
    """A service of the package must return the package's own vectors."""
    if smoke is None:
        promotion.skip("served", "no service was asked for its vectors")
        return
    with promotion.step("served") as notes:
        expected = health_vectors(load_package(package))[:2]
        worst = max(_difference(e, s, "the service's vectors") for e, s in zip(expected, smoke(package), strict=True))
        notes.append(f"the service answers the same vectors within {worst:.0e}")


def compare(promotion: Promotion, champion: Version | None, held_out: HeldOut, allow_worse: bool) -> None:
    """Refuse a candidate whose mean recall@1 is below the champion's."""
    with promotion.step("compare") as notes:
        if champion is None:
            notes.append("there is no champion yet")
            return
        try:
            with registered_package(champion) as folder:
                promotion.champion_metrics = held_out.score(str(folder))
            theirs = require_recall(promotion.champion_metrics, "champion")
        except InputError as error:
            if not allow_worse:
                raise InputError(f"the champion cannot be scored ({error}); --allow-worse goes on without") from error
            held_out.check()
            notes.append(f"the champion cannot be scored ({error}); allowed")
            return
        held_out.check()
        ours = require_recall(promotion.metrics, "candidate")
        error_of_both = sqrt(standard_error(promotion.metrics) ** 2 + standard_error(promotion.champion_metrics) ** 2)
        line = f"recall@1 mean {ours:.4f}, champion version {champion.number} {theirs:.4f}: "
        line += f"{ours - theirs:+.4f} +- {error_of_both:.4f} (standard error)"
        if ours < theirs - RECALL_TOLERANCE and not allow_worse:
            raise InputError(f"worse than the champion: {line}; --allow-worse promotes it all the same")
        same = champion.tags.get(SPACE) == promotion.embedding_space
        notes += [line, *(["the champion has the same vectors"] if same else [])]
        notes += ["worse, and allowed"] if ours < theirs - RECALL_TOLERANCE else []


def standard_error(metrics: dict[str, float]) -> float:
    """Binomial standard error of the mean of recall@1 both directions, each over its own queries.

    For the difference of two models their errors are taken as independent, which mostly overestimates it: both answer
    the same queries.
    """
    text, image = metrics["val/text_retrieval_recall_at_1"], metrics["val/image_retrieval_recall_at_1"]
    variance = text * (1 - text) / metrics["val/images"] + image * (1 - image) / metrics["val/captions"]
    return sqrt(variance) / 2


def require_recall(metrics: dict[str, float], whose: str) -> float:
    """Mean recall@1; raises InputError where there is none, for then nothing can be compared."""
    value = mean_recall(metrics)
    if value is None:
        raise InputError(f"the {whose}'s recall@1 could not be measured; look at the data with `triptych data lint`")
    return value
