"""A corpus to search on, and an MLflow of the test's own."""

import shutil
from pathlib import Path

import pytest

from pipelines.data.synthetic import synthesize
from tests.support.sweep_cases import PAIRS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A generated corpus."""
    folder = tmp_path_factory.mktemp("corpus") / "data"
    synthesize(str(folder), pairs=PAIRS, image_size=32)
    return folder


@pytest.fixture
def store(tmp_path, monkeypatch, empty_mlflow) -> str:
    """MLflow's file of the test's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_mlflow, "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri
