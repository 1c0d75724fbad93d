"""Promotion: from a trained model to the registry's alias `champion`. Moving the alias is the only commit point.

Whatever fails before that leaves the alias as it was, and no new version. Two promotions at once: see `Registry.claim`.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from models.config import InputError
from models.package import FILES
from models.redact import redact
from pipelines.artifacts.resolve import local_copy, registered_package
from pipelines.tracking.registry import CHAMPION, PREVIOUS, REPLACES, SPACE, Registry, Version, check_name
from tuning.promote.candidate import Candidate, read_candidate
from tuning.promote.checks import HeldOut, Smoke, check_files, check_served, check_vectors, compare, evaluate, verify
from tuning.promote.promotion_record import Promotion, PromotionRefused, recorded

__all__ = ["Promotion", "PromotionRefused", "promote", "rollback"]

logger = logging.getLogger(__name__)


def promote(
    model: str,
    name: str,
    data: str | None = None,
    index: str | None = None,
    allow_worse: bool = False,
    smoke: Smoke | None = None,
) -> Promotion:
    """Make the run (or the best trial of the sweep) in folder `model` the champion of `name`.

    Candidate and champion are scored on the same manifest: `data`, else the run's validation data. `{space}` in
    `index` becomes the embedding space. Raises PromotionRefused, with the steps so far, where any check fails.
    """
    promotion, registry = Promotion(check_name(name), redact(model)), Registry()
    with recorded(promotion, registry), tempfile.TemporaryDirectory() as scratch:
        with promotion.step("read") as notes:
            champion = registry.by_alias(name, CHAMPION)  # a registry that refuses is known before anything is scored
            _repair(registry, name)
            candidate = read_candidate(model, registry)
            promotion.run_folder, promotion.run_id = redact(candidate.run), candidate.run_id
            promotion.replaces = champion.number if champion else None
            notes += [f"trial {candidate.trial}"] if candidate.trial else []
            notes.append(f"{promotion.run_folder} finished" if candidate.run_id else f"{candidate.run}: not in MLflow")
        held_out = HeldOut(data or candidate.experiment.val_data, candidate.experiment)
        evaluate(promotion, candidate, held_out, given=data is not None)
        package = Path(scratch) / "package"
        verify(promotion, candidate, held_out, package)
        check_served(promotion, package, smoke)
        compare(promotion, champion, held_out, allow_worse)
        tags = _tags(promotion, candidate, held_out, index)
        with contextlib.ExitStack() as claimed:
            with promotion.step("register") as notes:
                source = _publish(promotion, registry, package)
                check_claim = claimed.enter_context(registry.claim(name))
                _require_champion(registry, name, champion)
                version = registry.register(name, source, promotion.run_id, tags, promotion.metrics)
                notes.append(f"version {version.number}, {source}")
            _move_champion(promotion, registry, version, champion, check_claim)
    return promotion


def rollback(name: str) -> Promotion:
    """Make the version that the champion replaced the champion again; raises PromotionRefused where there is none."""
    promotion, registry = Promotion(check_name(name), "", "rollback"), Registry()
    with recorded(promotion, registry):
        with promotion.step("read") as notes:
            champion = registry.by_alias(name, CHAMPION)
            target = _replaced(registry, champion)
            if champion is None:
                raise InputError("nothing is promoted under that name")
            if target is None:
                raise InputError(f"version {champion.number} replaced no version that is still there")
            notes.append(f"version {champion.number} replaced version {target.number}")
            promotion.replaces, promotion.run_id = champion.number, target.run_id
            promotion.embedding_space = target.tags.get(SPACE, "")
        with promotion.step("verify") as notes, registered_package(target) as folder:
            notes.append(f"{target.source}: vectors within {check_vectors(folder, target.source):.0e}")
        with contextlib.ExitStack() as claimed:
            with promotion.step("champion") as notes:
                check_claim = claimed.enter_context(registry.claim(name))
                _set_champion(promotion, registry, target, champion, check_claim)
                notes.append(f"moved back from version {champion.number} to version {target.number}")
            _move_previous(promotion, registry)
            with contextlib.suppress(InputError):  # the record has it too
                registry.tag(champion, "triptych.rolled_back", f"{promotion.started} to {target.number}")
    return promotion


def _tags(promotion: Promotion, candidate: Candidate, held_out: HeldOut, index: str | None) -> dict[str, str]:
    """The version's tags: where it comes from, what it was scored on, what it replaces."""
    space = promotion.embedding_space
    tags = {
        SPACE: space,
        "triptych.run_folder": promotion.run_folder,
        "triptych.manifest": candidate.manifest,
        "triptych.val_data": promotion.data,
        "triptych.val_manifest": held_out.hash,
        "triptych.preset": candidate.experiment.preset,
        "triptych.commit": candidate.commit,
        "triptych.promotion": promotion.place,
    }
    optional = {
        "triptych.run_id": candidate.run_id,
        REPLACES: str(promotion.replaces or ""),
        "triptych.index_uri": (index or "").replace("{space}", space),
    }
    return tags | {key: value for key, value in optional.items() if value}


def _publish(promotion: Promotion, registry: Registry, package: Path) -> str:
    """Log the package to the run's artifacts and read it back; returns its URI there."""
    source, promotion.run_id = registry.publish(package, promotion.embedding_space, promotion.run_id)
    with local_copy(source) as back:
        check_files(back, source)
        if (back / FILES).read_bytes() != (package / FILES).read_bytes():
            raise InputError(f"{source}: holds other files than the package; delete them and start again")
    return source


def _require_champion(registry: Registry, name: str, expected: Version | None) -> None:
    """Raises InputError unless the champion is still the one that was compared with."""
    was, now = expected.number if expected else None, registry.aliases(name).get(CHAMPION)
    if now != was:
        before = f"version {was}" if was else "missing"
        raise InputError(
            f"the champion is now version {now or 'none'}, and was {before} when this began; start it again"
        )


def _set_champion(
    promotion: Promotion, registry: Registry, to: Version, champion: Version | None, check_claim: Callable[[], None]
) -> None:
    """Move the alias `champion`, unless the claim is lost or another champion was set meanwhile (InputError)."""
    check_claim()
    _require_champion(registry, to.name, champion)
    registry.set_alias(to.name, CHAMPION, to.number)
    promotion.version = to.number


def _move_champion(
    promotion: Promotion,
    registry: Registry,
    version: Version,
    champion: Version | None,
    check_claim: Callable[[], None],
) -> None:
    """Make a registered version the champion; delete the version again if that fails."""
    try:
        with promotion.step("champion") as notes:
            _set_champion(promotion, registry, version, champion, check_claim)
            notes.append(
                f"moved from {f'version {champion.number}' if champion else 'none'} to version {version.number}"
            )
    except BaseException:
        _withdraw(promotion, registry, version)
        raise
    _move_previous(promotion, registry)


def _withdraw(promotion: Promotion, registry: Registry, version: Version) -> None:
    """Delete a version that did not become champion.

    It stays where the registry says that it is champion (the move had arrived), or does not answer.
    """
    try:
        if registry.aliases(version.name).get(CHAMPION) == version.number:
            promotion.version = version.number
            promotion.skip("withdraw", f"version {version.number} is champion: the alias had moved already")
            return
        with promotion.step("withdraw") as notes:
            registry.withdraw(version)
            notes.append(f"version {version.number} deleted again")
    except InputError as error:
        promotion.skip("withdraw", f"version {version.number} may stay registered, without alias: {error}")


def _move_previous(promotion: Promotion, registry: Registry) -> None:
    """Move the alias `previous` too. If that fails the promotion still holds: the champion has moved."""
    try:
        moved = _repair_claimed(registry, promotion.name)
    except InputError as error:
        promotion.skip("previous", f"{error}; the next promote or rollback repairs it")
        return
    with promotion.step("previous") as notes:
        notes.append(moved or "is where it belongs")


def _replaced(registry: Registry, champion: Version | None) -> Version | None:
    """The version that the champion replaced; None where there is none, or it was deleted."""
    number = champion.tags.get(REPLACES, "") if champion else ""
    return registry.version(champion.name, int(number)) if champion and number.isdigit() else None


def _previous_now_and_due(registry: Registry, name: str) -> tuple[int | None, int | None]:
    """(version that has the alias `previous`, version that should have it); None: none."""
    aliases = registry.aliases(name)
    champion = registry.version(name, aliases[CHAMPION]) if CHAMPION in aliases else None
    replaced = _replaced(registry, champion)
    return aliases.get(PREVIOUS), replaced.number if replaced else None


def _repair_claimed(registry: Registry, name: str) -> str:
    """Move `previous` to where it belongs; returns what was done. The claim must be held."""
    there, wanted = _previous_now_and_due(registry, name)
    if there == wanted:
        return ""
    registry.set_alias(name, PREVIOUS, wanted)
    return f"moved from {there or 'none'} to {wanted or 'none'}"


def _repair(registry: Registry, name: str) -> None:
    """Correct the alias `previous` after an interrupted promotion, unless another one holds the claim and will."""
    there, wanted = _previous_now_and_due(registry, name)
    if there == wanted:
        return
    try:
        with registry.claim(name):
            logger.info("previous of %s lagged: %s", name, _repair_claimed(registry, name))
    except InputError as error:
        logger.warning("previous of %s lags: %s", name, error)
