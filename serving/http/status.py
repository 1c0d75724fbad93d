"""`/v1/models` and health: what is loaded, as it is told to clients."""

from typing import Literal

from serving.http.schema import Body
from serving.interfaces import Description, Desk


class IndexEntry(Body):
    """The corpus that searches go over."""

    uri: str
    images: int
    texts: int
    kind: str


class VersionEntry(Body):
    """A loaded version; its label may be sent in the request header `x-triptych-version`."""

    label: str
    version: str
    current: bool
    """Whether requests without that header get it."""
    embedding_space: str
    dimensions: int
    image_size: int
    matching: bool
    """Whether `rerank` is possible."""
    index: IndexEntry | None


class ModelEntry(Body):
    """A service name and the versions behind it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    versions: list[VersionEntry]


class ModelList(Body):
    """All that is served."""

    object: Literal["list"]
    data: list[ModelEntry]
    alarm: str
    """Why a newer version is not served; "" where all is well."""


class Health(Body):
    """Whether the service can answer."""

    status: Literal["ok", "not_ready"]
    model: str | None = None
    alarm: str = ""


def entries(desk: Desk) -> list[ModelEntry]:
    """One entry a name, with its loaded versions."""
    by_name: dict[str, list[tuple[Description, bool]]] = {}
    for description, current in desk.versions():
        by_name.setdefault(description.name, []).append((description, current))
    return [
        ModelEntry(
            id=name,
            object="model",
            created=max(one.created for one, _ in versions),
            owned_by="triptych",
            versions=[_version(one, current) for one, current in versions],
        )
        for name, versions in by_name.items()
    ]


def _version(one: Description, current: bool) -> VersionEntry:
    index = one.index
    return VersionEntry(
        label=one.label,
        version=one.version,
        current=current,
        embedding_space=one.embedding_space,
        dimensions=one.dimensions,
        image_size=one.image_size,
        matching=one.matching,
        index=IndexEntry(uri=index.uri, images=index.images, texts=index.texts, kind=index.kind) if index else None,
    )
