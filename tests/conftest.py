"""Fixtures for all: a local Ray of two slots, an S3 server, small files of pairs. Importing this starts nothing."""

import io
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines import storage

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_num_workers_soft_limit": "6",  # processes that are kept when idle: a new one takes seconds
    "RAY_worker_niceness": "0",  # Ray's own 15 lets whatever else runs here go first: under load its tests crawl
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait leave the core to the other half of the tests
}
_AWS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
torch.set_num_threads(1)


@dataclass
class ObjectStore:
    """A running S3 server; AWS_* in the environment point to it."""

    endpoint: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def bucket(self) -> str:
        """The URI of a new, empty bucket."""
        import boto3

        name = f"bucket-{next(self._numbers)}"
        boto3.client("s3").create_bucket(Bucket=name)
        return f"s3://{name}"

    def require_signatures(self, required: bool) -> None:
        """Whether from now on every request is refused, for the test's key is nobody's."""
        import requests

        requests.post(f"{self.endpoint}/moto-api/reset-auth", data=b"0" if required else b"inf", timeout=10)


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStore]:
    """An S3 server on this machine, for the whole session."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (_AWS | {"AWS_ENDPOINT_URL": endpoint}).items():
            patch.setenv(name, value)
        yield ObjectStore(endpoint)
    server.stop()


STARTS_RAY = {f"test_{name}" for name in ("capacity", "cluster", "ingest", "service", "submit", "sweep", "train")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts Ray, so that `make test` can run it beside the rest."""
    for item in items:
        if item.path.stem in STARTS_RAY or "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_local(s3: ObjectStore) -> Iterator[None]:
    """Ray on this machine with two slots; its workers reach the S3 server."""
    import ray

    from pipelines.cluster import SETTINGS

    for name, value in SETTINGS.items():  # before Ray's processes start, as the command line does
        os.environ.setdefault(name, value)
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))  # functions of tests
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False, logging_level="warning")
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow file without a run: a copy spares a test the seconds that its tables take."""
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


def jpeg(seed: int, width: int = 32, height: int = 32, **options: Any) -> bytes:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), "JPEG", **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The picture's bytes in a file format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_pairs(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Good pairs: columns image, caption, id."""
    return [
        {"image": jpeg(number), "caption": f"Picture number {number}, of noise.", "id": f"key{number}"}
        for number in range(start, start + count)
    ]


def write_parquet_pairs(uri: str, pairs: list[dict[str, Any]], **options: Any) -> str:
    """Write pairs (any columns) as one Parquet file; `options` go to pyarrow. Returns `uri`."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(pairs), buffer, **options)
    storage.write_bytes(uri, buffer.getvalue())
    return uri


def write_tar_pairs(uri: str, pairs: list[dict[str, Any]], **options: Any) -> str:
    """Write pairs as a tar: ID.jpg (or the pair's `extension`), then ID.txt, or ID.json for several captions.

    A pair without `image` or `caption` lacks that member; `options` go to tarfile. Returns `uri`.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for pair in pairs:
            members = {}
            if "image" in pair:
                members[pair.get("extension", "jpg")] = pair["image"]
            if isinstance(pair.get("caption"), str):
                members["txt"] = pair["caption"].encode()
            elif "caption" in pair:
                members["json"] = json.dumps({"caption": pair["caption"]}).encode()
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{pair['id']}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    storage.write_bytes(uri, buffer.getvalue())
    return uri


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., str]:
    """`write_pairs(count, "parquet" or "webdataset")` writes good pairs into one file of a folder, which it returns."""

    def write(count: int, kind: str = "parquet", folder: str | None = None, **options: Any) -> str:
        folder = folder or str(tmp_path / "pairs")
        if kind == "parquet":
            write_parquet_pairs(f"{folder}/0.parquet", make_pairs(count), **options)
        else:
            write_tar_pairs(f"{folder}/0.tar", make_pairs(count), **options)
        return folder

    return write
