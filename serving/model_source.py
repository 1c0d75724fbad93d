"""The one door from serving to `pipelines`: where a model is, what the registry says of it, bytes by URI.

Imports are made when they are needed: a process that only searches loads neither torch nor MLflow.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.config import InputError
from serving.config import ServingConfig

INDEX_TAG = "triptych.index_uri"
"""Tag of a registered version: where its index is (design, contract 8)."""


@dataclass(frozen=True)
class Wanted:
    """One version to serve: all processes of it load the same."""

    model: str
    """A path or URL, or models:/NAME/NUMBER; never an alias."""
    name: str
    version: str
    space: str
    index: str
    """URI of its index; "" for none."""

    @property
    def application(self) -> str:
        """Name of its Serve application: another version, model or index is another application."""
        import hashlib

        what = hashlib.sha256(json.dumps([self.model, self.space, self.index]).encode()).hexdigest()[:8]
        return "-".join(re.sub(r"\W+", "_", part) for part in ("triptych", self.name, self.version, what) if part)


def is_followed(model: str) -> bool:
    """Whether MODEL is an alias, which may move."""
    return model.startswith("models:/") and "@" in model


def resolve(model: str, index: str) -> Wanted:
    """The version that MODEL means now; `index` may contain {space}, "" takes the version's own.

    Raises InputError where there is none.
    """
    if model.startswith("models:/"):
        from pipelines.tracking.registry import SPACE, Registry

        version = Registry().resolve(model)
        space = version.tags.get(SPACE, "")
        place = index.replace("{space}", space) or version.tags.get(INDEX_TAG, "").replace("{space}", space)
        return Wanted(str(version), version.name, str(version.number), space, _absolute(place))
    with local_package(model) as folder:
        document = json.loads((folder / "config.json").read_text())
    space = str(document["embedding_space"])
    return Wanted(_absolute(model), str(document["name"]), "", space, _absolute(index.replace("{space}", space)))


def _absolute(uri: str) -> str:
    from pipelines.storage import make_absolute

    return make_absolute(uri) if uri and not uri.startswith("models:/") else uri


@contextmanager
def local_package(model: str) -> Iterator[Path]:
    """The encoder package of a MODEL as a local folder, as long as the context lasts. Raises InputError."""
    from pipelines.artifacts.resolve import package_of

    with package_of(model) as folder:
        if not (folder / "config.json").is_file():
            raise InputError(f"{model}: no encoder package, config.json is missing")
        yield folder


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """The folder at a path or URL on this machine; a copy, gone afterwards, where it is remote. Raises InputError."""
    from pipelines import storage

    if storage.is_local(uri):
        yield Path(uri.removeprefix("file://"))
        return
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        storage.download(uri, folder)
        yield Path(folder)


def read_document(uri: str, name: str) -> dict[str, object]:
    """A JSON file of a folder; raises InputError where it is missing or damaged."""
    from pipelines import storage

    place = storage.join(uri, name)
    if not storage.exists(place):
        raise InputError(f"{uri}: {name} is not there")
    try:
        document = json.loads(storage.read_bytes(place))
    except ValueError as error:
        raise InputError(f"{place}: damaged, not JSON") from error
    return dict(document)


def read_image(uri: str) -> bytes:
    """The encoded picture that a sample's `uri` names (design, contract 1). Raises InputError."""
    from pipelines.data.lookup import read_image as read

    return bytes(read(uri))


def check(config: ServingConfig) -> ServingConfig:
    """`config` with absolute paths, after a look at its model and index. Raises InputError."""
    wanted = resolve(config.model, config.index)
    require(wanted, bool(config.index))
    model = config.model if config.model.startswith("models:/") else _absolute(config.model)
    return config.model_copy(update={"model": model, "index": _absolute(config.index)})


def require(wanted: Wanted, needs_index: bool) -> bool:
    """Cheap looks before anything is started; returns whether the package can re-rank.

    Raises InputError: no package, another one than wanted, no index, or one of another embedding space.
    """
    if needs_index and not wanted.index:
        raise InputError(f"it has no index (registry tag {INDEX_TAG}), and the service runs with one")
    with local_package(wanted.model) as folder:
        document = read_document(str(folder), "config.json")
    if wanted.space and document["embedding_space"] != wanted.space:
        raise InputError(f"embedding space {document['embedding_space']} there, {wanted.space} was asked for")
    if wanted.index:
        space = read_document(wanted.index, "index.json").get("embedding_space")
        if space != document["embedding_space"]:
            raise InputError(
                f"{wanted.index}: an index of embedding space {space}, the model's is {document['embedding_space']}; "
                "embed and index the corpus with this model"
            )
    return bool(document["matching"])


def connect() -> bool:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine without a dashboard; whether it was started.

    Its processes find the same registry as this one. Raises InputError.
    """
    import ray

    from pipelines.cluster.connect import connect as join
    from pipelines.tracking.server import resolve_uri

    os.environ["MLFLOW_TRACKING_URI"] = resolve_uri(None)  # absolute: their folder is another
    ours = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    join(dashboard=False)
    return ours
