"""Promotion: checks between a trained model and the registry's alias `champion`, whose move is the only commit point.

Whatever fails before leaves the alias where it is, and no version behind. What two promotions at once may do, and the
limits of that, stand at `Registry.claim`.
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
from tuning.promote.promotion_record import Promotion, Refused, recorded

__all__ = ["Promotion", "Refused", "promote", "rollback"]

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
    `index` becomes the embedding space. Raises Refused, with the steps so far, where any check fails.
    """
    promotion, registry = Promotion(check_name(name), redact(model)), Registry()
    with recorded(promotion, registry), tempfile.TemporaryDirectory() as scratch:
        with promotion.step("read") as said:
            champion = registry.by_alias(name, CHAMPION)  # a registry that refuses is known before anything is scored
            _repair(registry, name)
            candidate = read_candidate(model, registry)
            promotion.run_folder, promotion.run_id = redact(candidate.run), candidate.run_id
            promotion.replaces = champion.number if champion else None
            said += [f"trial {candidate.trial}"] if candidate.trial else []
            said.append(f"{promotion.run_folder} finished" if candidate.run_id else f"{candidate.run}: not in MLflow")
        held_out = HeldOut(data or candidate.experiment.val_data, candidate.experiment)
        evaluate(promotion, candidate, held_out, given=data is not None)
        package = Path(scratch) / "package"
        verify(promotion, candidate, held_out, package)
        check_served(promotion, package, smoke)
        compare(promotion, champion, held_out, allow_worse)
        tags = _tags(promotion, candidate, held_out, index)
        with contextlib.ExitStack() as claimed:
            with promotion.step("register") as said:
                source = _publish(promotion, registry, package)
                held = claimed.enter_context(registry.claim(name))
                _require_champion(registry, name, champion)
                version = registry.register(name, source, promotion.run_id, tags, promotion.metrics)
                said.append(f"version {version.number}, {source}")
            _move(promotion, registry, version, champion, held)
    return promotion


def rollback(name: str) -> Promotion:
    """Make the version that the champion replaced the champion again; raises Refused where there is none."""
    promotion, registry = Promotion(check_name(name), "", "rollback"), Registry()
    with recorded(promotion, registry):
        with promotion.step("read") as said:
            champion = registry.by_alias(name, CHAMPION)
            target = _replaced(registry, champion)
            if champion is None:
                raise InputError("nothing is promoted under that name")
            if target is None:
                raise InputError(f"version {champion.number} replaced no version that is still there")
            said.append(f"version {champion.number} replaced version {target.number}")
            promotion.replaces, promotion.run_id = champion.number, target.run_id
            promotion.embedding_space = target.tags.get(SPACE, "")
        with promotion.step("verify") as said, registered_package(target) as folder:
            said.append(f"{target.source}: vectors within {check_vectors(folder, target.source):.0e}")
        with contextlib.ExitStack() as claimed:
            with promotion.step("champion") as said:
                held = claimed.enter_context(registry.claim(name))
                _set_champion(promotion, registry, target, champion, held)
                said.append(f"moved back from version {champion.number} to version {target.number}")
            _follow(promotion, registry)
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
    promotion: Promotion, registry: Registry, to: Version, champion: Version | None, held: Callable[[], None]
) -> None:
    """The commit point."""
    held()
    _require_champion(registry, to.name, champion)
    registry.set_alias(to.name, CHAMPION, to.number)
    promotion.version = to.number


def _move(
    promotion: Promotion, registry: Registry, version: Version, champion: Version | None, held: Callable[[], None]
) -> None:
    """Make a registered version the champion, or take it away again."""
    try:
        with promotion.step("champion") as said:
            _set_champion(promotion, registry, version, champion, held)
            said.append(
                f"moved from {f'version {champion.number}' if champion else 'none'} to version {version.number}"
            )
    except BaseException:
        _withdraw(promotion, registry, version)
        raise
    _follow(promotion, registry)


def _withdraw(promotion: Promotion, registry: Registry, version: Version) -> None:
    """Delete a version that did not become champion; where that is not sure (interrupted, unheard), leave it."""
    try:
        if registry.aliases(version.name).get(CHAMPION) == version.number:
            promotion.version = version.number
            promotion.skip("withdraw", f"version {version.number} is champion: the alias had moved already")
            return
        with promotion.step("withdraw") as said:
            registry.withdraw(version)
            said.append(f"version {version.number} deleted again")
    except InputError as error:
        promotion.skip("withdraw", f"version {version.number} may stay registered, without alias: {error}")


def _follow(promotion: Promotion, registry: Registry) -> None:
    """`previous` follows; where it cannot, the champion has moved all the same."""
    try:
        moved = _repair_claimed(registry, promotion.name)
    except InputError as error:
        promotion.skip("previous", f"{error}; the next promote or rollback repairs it")
        return
    with promotion.step("previous") as said:
        said.append(moved or "is where it belongs")


def _replaced(registry: Registry, champion: Version | None) -> Version | None:
    """The version that the champion replaced, if it is there."""
    number = champion.tags.get(REPLACES, "") if champion else ""
    return registry.version(champion.name, int(number)) if champion and number.isdigit() else None


def _lag(registry: Registry, name: str) -> tuple[int | None, int | None]:
    """Where `previous` is and where it belongs."""
    aliases = registry.aliases(name)
    champion = registry.version(name, aliases[CHAMPION]) if CHAMPION in aliases else None
    replaced = _replaced(registry, champion)
    return aliases.get(PREVIOUS), replaced.number if replaced else None


def _repair_claimed(registry: Registry, name: str) -> str:
    """Move `previous` to where it belongs; returns what was done. The claim must be held."""
    there, wanted = _lag(registry, name)
    if there == wanted:
        return ""
    registry.set_alias(name, PREVIOUS, wanted)
    return f"moved from {there or 'none'} to {wanted or 'none'}"


def _repair(registry: Registry, name: str) -> None:
    """Repair a `previous` that lags, unless a promotion is under way that will."""
    there, wanted = _lag(registry, name)
    if there == wanted:
        return
    try:
        with registry.claim(name):
            logger.info("previous of %s lagged: %s", name, _repair_claimed(registry, name))
    except InputError as error:
        logger.warning("previous of %s lags: %s", name, error)
