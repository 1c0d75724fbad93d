"""An MLflow that is not there."""

from pathlib import Path

import pytest


@pytest.fixture
def no_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "no.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    return file
