"""Model versions in MLflow's registry, their aliases, and the right to move them; clients come from `tracking`.

A version's files lie in its run's artifacts under their own embedding space (`packages/SPACE`): going on with the run
writes a new `package`, and must not change what was registered.
"""

import contextlib
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.config import InputError
from pipelines.tracking.run import EXPERIMENT, Tracker, answers, connect, download
from pipelines.tracking.server import resolve_uri

logger = logging.getLogger(__name__)

CHAMPION, PREVIOUS = "champion", "previous"
SPACE = "triptych.embedding_space"
"""Tag of a version: what its vectors may be compared with."""
REPLACES = "triptych.replaces"
"""Tag of a version: the number of the champion that it was registered to replace; missing for the first."""
CLAIM_SUFFIX = ".promoting"
LAPSE_SECONDS = 900
"""A claim so old is a dead process's: what it guards takes seconds, and is asked for again before it matters."""


class Version(NamedTuple):
    """A registered version."""

    name: str
    number: int
    source: str
    """URI of its encoder package; `pipelines.artifacts.resolve` reads it."""
    run_id: str
    tags: dict[str, str]

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.number}"


class Run(NamedTuple):
    """What MLflow knows of a run."""

    status: str
    tags: dict[str, str]


def check_name(name: str) -> str:
    """`name`, if it can be registered and written as models:/NAME@ALIAS; raises InputError else."""
    if not re.fullmatch(r"\w[\w\-. ]*", name) or name.endswith(CLAIM_SUFFIX):
        raise InputError(f"--name {name!r}: letters, digits, - _ . and spaces, and not {CLAIM_SUFFIX} at the end")
    return name


class Registry:
    """The registry of a tracking server or database.

    Every method raises InputError in one line where it is refused, or where nothing answers.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = resolve_uri(uri)
        self._connected: Any = None

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        try:
            with answers(self.uri):
                self._connected = self._connected or connect(self.uri)
                yield self._connected
        except ConnectionError as error:
            raise InputError(f"{error}; start the server, or correct or unset MLFLOW_TRACKING_URI") from error

    # Versions

    def aliases(self, name: str) -> dict[str, int]:
        """{alias: number of its version}; empty where the model is not registered."""
        with self._client() as client, _absent("RESOURCE_DOES_NOT_EXIST"):
            return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
        return {}

    def version(self, name: str, number: int) -> Version | None:
        """A version by its number; None where there is none, or no more."""
        with self._client() as client, _absent("RESOURCE_DOES_NOT_EXIST"):
            return _version(client.get_model_version(name, str(number)))
        return None

    def by_alias(self, name: str, alias: str) -> Version | None:
        """The version that an alias names; None where it names none."""
        number = self.aliases(name).get(alias)
        return None if number is None else self.version(name, number)

    def versions(self, name: str) -> list[Version]:
        """All versions, the oldest first."""
        with self._client() as client:
            found = [_version(entity) for entity in client.search_model_versions(f"name='{check_name(name)}'")]
        return sorted(found, key=lambda version: version.number)

    def resolve(self, model: str) -> Version:
        """The version of models:/NAME@ALIAS or models:/NAME/NUMBER; raises InputError where there is none."""
        parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([0-9]+))", model)
        if not parts:
            raise InputError(f"{model}: write models:/NAME@ALIAS or models:/NAME/VERSION")
        name, alias, number = parts.groups()
        found = self.by_alias(name, alias) if alias else self.version(name, int(number))
        if found is None:
            raise InputError(f"{model}: no such version at {self.uri}; {self._there_is(name)}")
        return found

    def _there_is(self, name: str) -> str:
        versions = ", ".join(str(version.number) for version in self.versions(check_name(name))) or "none"
        aliases = ", ".join(f"{alias} (version {number})" for alias, number in self.aliases(name).items()) or "none"
        return f"versions of {name}: {versions}; aliases: {aliases}"

    def register(
        self, name: str, source: str, run_id: str, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> Version:
        """A new version with its tags, made in one request; no alias moves. `metrics` become tags `triptych.NAME`."""
        tags = dict(tags) | {f"triptych.{key}": repr(value) for key, value in metrics.items()}
        with self._client() as client:
            with _absent("RESOURCE_ALREADY_EXISTS"):
                client.create_registered_model(check_name(name))
            return _version(client.create_model_version(name, source, run_id, tags))

    def withdraw(self, version: Version) -> None:
        """Delete a version; its number is not used again."""
        with self._client() as client:
            client.delete_model_version(version.name, str(version.number))

    def tag(self, version: Version, key: str, value: str) -> None:
        """Set one tag of a version."""
        with self._client() as client:
            client.set_model_version_tag(version.name, str(version.number), key, value)

    def set_alias(self, name: str, alias: str, number: int | None) -> None:
        """Move an alias, or drop it (None), and see that it is there.

        Raises InputError where it is not: then it is where it was, unless the line says otherwise.
        """
        try:
            with self._client() as client:
                if number is None:
                    client.delete_registered_model_alias(name, alias)
                else:
                    client.set_registered_model_alias(name, alias, str(number))
        except InputError:
            if self.aliases(name).get(alias) != number:
                raise
            return  # only the reply was lost
        now = self.aliases(name).get(alias)
        if now != number:
            raise InputError(f"{name}: {alias} was moved to {_named(now)} from outside at the same time")

    # Runs and their artifacts

    def run(self, run_id: str) -> Run | None:
        """A run that is there and not deleted."""
        with self._client() as client, _absent("RESOURCE_DOES_NOT_EXIST"):
            found = client.get_run(run_id)
            if found.info.lifecycle_stage == "active":
                return Run(str(found.info.status), dict(found.data.tags))
        return None

    def publish(self, package: Path, space: str, run_id: str) -> tuple[str, str]:
        """Log a package (local folder) to its run's artifacts; returns (its URI there, the run's id).

        A server takes no other local folder as a version's source. `run_id` "" makes a run for it.
        """
        if not run_id:
            carrier = Tracker.start(self.uri, EXPERIMENT, f"package-{space}", {}, {SPACE: space})
            carrier.finish()
            run_id = carrier.run_id
        place = f"packages/{space}"
        with self._client() as client:
            there = {entry.path: entry.file_size for entry in client.list_artifacts(run_id, place)}
            files = {f"{place}/{path.name}": path.stat().st_size for path in package.iterdir() if path.is_file()}
            if there != files:  # files that are being served are not written again
                client.log_artifacts(run_id, str(package), place)
            return f"{str(client.get_run(run_id).info.artifact_uri).rstrip('/')}/{place}", run_id

    def record(self, run_id: str, place: str, document: dict[str, Any]) -> None:
        """Log a JSON document to a run's artifacts."""
        with self._client() as client:
            client.log_dict(run_id, document, place)

    def fetch(self, artifacts: str, folder: str) -> Path:
        """Copy artifacts that only the server can read below a local folder; returns where they are."""
        with self._client():
            return Path(download(self.uri, artifacts, folder))

    # The right to move aliases

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[Callable[[], None]]:
        """Holds the right to move the aliases of `name`; gives a function that raises InputError once it is lost.

        MLflow cannot move an alias on the condition that it is where one thinks. But it makes a registered model only
        if there is none of that name, which is atomic in its databases: the claim is the model `NAME.promoting`. Of
        any number of processes one gets it, the others are told who has it. Limits: it binds only those that ask for
        it, so an alias moved by hand is noticed by looking before and after, not prevented; a claim is taken from
        whoever has held it for `LAPSE_SECONDS` by this machine's clock, and who held it then finds out by asking,
        unless that happens between asking and moving; after a kill, others wait for it to lapse or delete the model.
        """
        lock = f"{check_name(name)}{CLAIM_SUFFIX}"
        token = uuid.uuid4().hex
        holder = f"{socket.gethostname()}:{os.getpid()}"
        self._take(lock, {"triptych.token": token, "triptych.holder": holder, "triptych.since": str(time.time())})

        def held() -> None:
            if self._holder(lock).get("triptych.token") != token:
                raise InputError(f"{name}: another promotion took over, for this one took too long; start it again")

        try:
            yield held
        finally:
            try:
                held()
                with self._client() as client:
                    client.delete_registered_model(lock)
            except InputError as error:
                logger.warning("the claim %s is not given back (%s); it lapses by itself", lock, error)

    def _take(self, lock: str, tags: Mapping[str, str]) -> None:
        """Make the claim, after deleting one that has lapsed; raises InputError where somebody holds it."""
        for _ in range(2):
            with self._client() as client, _absent("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                client.create_registered_model(lock, dict(tags))
                return
            there = self._holder(lock)
            if not there:
                continue  # it was given back just now
            age = time.time() - float(there.get("triptych.since", 0))
            if age < LAPSE_SECONDS:
                who = f"by {there.get('triptych.holder')}, {age:.0f} s ago"
                raise InputError(
                    f"{lock.removesuffix(CLAIM_SUFFIX)}: another promotion is under way ({who}); try again"
                )
            with self._client() as client, _absent("RESOURCE_DOES_NOT_EXIST"):
                client.delete_registered_model(lock)
        raise InputError(f"{lock.removesuffix(CLAIM_SUFFIX)}: another promotion was faster; start this one again")

    def _holder(self, lock: str) -> dict[str, str]:
        with self._client() as client, _absent("RESOURCE_DOES_NOT_EXIST"):
            return dict(client.get_registered_model(lock).tags)
        return {}


@contextlib.contextmanager
def _absent(*codes: str) -> Iterator[None]:
    """Passes over MLflow's errors of these codes: what was asked for is not there, or is there already."""
    try:
        yield
    except Exception as error:  # MLflow's own class is not imported here
        if getattr(error, "error_code", "") not in codes:
            raise


def _version(entity: Any) -> Version:
    return Version(str(entity.name), int(entity.version), str(entity.source), entity.run_id or "", dict(entity.tags))


def _named(number: int | None) -> str:
    return "no version" if number is None else f"version {number}"
