"""Fixtures for all: a local Ray of two slots, an S3 server, small files of pairs. Importing this starts nothing."""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.support.pairs import make_pairs, write_parquet_pairs, write_tar_pairs
from tests.support.paths import ROOT

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
settings.register_profile("tests", deadline=None)  # no timing stands in a test
settings.load_profile("tests")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts Ray, so that `make test` can run it beside the rest: tests in folders named `with_ray`."""
    for item in items:
        if "with_ray" in item.path.parts:
            item.add_marker(pytest.mark.ray)
        elif "ray_local" in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(f"{item.nodeid} starts Ray: it belongs into a folder with_ray")


@pytest.fixture(scope="session")
def ray_local(s3: ObjectStore) -> Iterator[None]:
    """Ray on this machine with two slots; its workers reach the S3 server."""
    import ray

    from pipelines.cluster.connect import SETTINGS

    for name, value in SETTINGS.items():  # before Ray's processes start, as the command line does
        os.environ.setdefault(name, value)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # tests too
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        options = {"include_dashboard": False, "_temp_dir": folder, "log_to_driver": False, "logging_level": "warning"}
        for last in (False, False, True):  # on a busy machine Ray's own deadline may pass
            try:
                ray.init(num_cpus=2, **options)
                break
            except Exception:
                ray.shutdown()
                if last:
                    raise
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow file without a run: a copy spares a test the seconds that its tables take."""
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


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
