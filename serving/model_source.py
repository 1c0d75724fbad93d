"""The only module of serving that imports `pipelines`: where a model is, what the registry knows of it, bytes by URI.

`pipelines` is imported inside the functions: a process that only searches loads neither torch nor MLflow.
"""

import hashlib
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
"""Tag of a registered version: URI of its index (docs/formats.md, contract 8)."""


@dataclass(frozen=True)
class VersionSpec:
    """One version to serve, so precisely that all its processes load the same."""

    model: str
    """A path or URL, or models:/NAME/NUMBER; never an alias."""
    name: str
    version: str
    """Number in the registry; "" of a package that is not registered."""
    space: str
    """Its embedding space; "" where the registry does not have it."""
    index: str
    """URI of its index; "" for none."""

    @property
    def application(self) -> str:
        """Name of its Serve application: another version, model or index is another application."""
        digest = hashlib.sha256(json.dumps([self.model, self.space, self.index]).encode()).hexdigest()[:8]
        return "-".join(re.sub(r"\W+", "_", part) for part in ("triptych", self.name, self.version, digest) if part)


def is_followed(model: str) -> bool:
    """Whether MODEL is an alias, which may move."""
    return model.startswith("models:/") and "@" in model


def resolve(model: str, index: str) -> VersionSpec:
    """The version that MODEL means now; `index` may contain {space}, "" takes the version's own.

    Raises InputError where there is none.
    """
    if model.startswith("models:/"):
        from pipelines.tracking.registry import SPACE, Registry

        version = Registry().resolve(model)
        space = version.tags.get(SPACE, "")
        index_uri = (index or version.tags.get(INDEX_TAG, "")).replace("{space}", space)
        return VersionSpec(str(version), version.name, str(version.number), space, _absolute(index_uri))
    with local_package(model) as folder:
        document = json.loads((folder / "config.json").read_text())
    space = str(document["embedding_space"])
    return VersionSpec(_absolute(model), str(document["name"]), "", space, _absolute(index.replace("{space}", space)))


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
    """The folder at a path or URL on this machine; where it is remote a copy, removed afterwards. Raises InputError."""
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

    file = storage.join(uri, name)
    if not storage.exists(file):
        raise InputError(f"{uri}: {name} is not there")
    try:
        document = json.loads(storage.read_bytes(file))
    except ValueError as error:
        raise InputError(f"{file}: damaged, not JSON") from error
    return dict(document)


def read_image(uri: str) -> bytes:
    """The encoded image that the `uri` of a sample names (docs/formats.md, contract 1). Raises InputError."""
    from pipelines.data.lookup import read_image as read

    return bytes(read(uri))


def check(config: ServingConfig) -> ServingConfig:
    """`config` with absolute paths, once its model and index are found to be there. Raises InputError."""
    require(resolve(config.model, config.index), bool(config.index))
    model = config.model if config.model.startswith("models:/") else _absolute(config.model)
    return config.model_copy(update={"model": model, "index": _absolute(config.index)})


def require(spec: VersionSpec, needs_index: bool) -> bool:
    """Check a version cheaply, before anything is started; returns whether its package can re-rank.

    Raises InputError: no package, not the registered one, no index, or an index of another embedding space.
    """
    if needs_index and not spec.index:
        raise InputError(f"it has no index (registry tag {INDEX_TAG}), and the service runs with one")
    with local_package(spec.model) as folder:
        document = read_document(str(folder), "config.json")
    if spec.space and document["embedding_space"] != spec.space:
        raise InputError(
            f"the package is of embedding space {document['embedding_space']}, the registry says {spec.space}"
        )
    if spec.index:
        space = read_document(spec.index, "index.json").get("embedding_space")
        if space != document["embedding_space"]:
            raise InputError(
                f"{spec.index}: an index of embedding space {space}, the model's is {document['embedding_space']}; "
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

    os.environ["MLFLOW_TRACKING_URI"] = resolve_uri(None)  # absolute: Ray's processes run in another folder
    starts_ray = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    join(dashboard=False)
    return starts_ray
