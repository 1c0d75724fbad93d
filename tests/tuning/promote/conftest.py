"""Runs to promote, and a registry; Ray is left out but where a test asks for it."""

import itertools

import pytest

from pipelines.cluster import connect
from pipelines.tracking.registry import Registry
from tests.support.promotion_cases import PAIRS, evaluate_directly, make_run, write_data
from tuning.promote import checks
from tuning.promote.promote import promote

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of rising recall on one data set, in an MLflow that MLFLOW_TRACKING_URI names."""
    folder = tmp_path_factory.mktemp("promote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)
        data = write_data(folder / "data")
        for name, fitted in (("poor", 2), ("fair", 6), ("good", PAIRS)):
            make_run(folder / name, data, fitted)
        yield folder


@pytest.fixture(autouse=True)
def without_ray(request, monkeypatch):
    if "ray_local" not in request.fixturenames:
        monkeypatch.setattr(checks, "evaluate_package", evaluate_directly)
        monkeypatch.setattr(connect, "connect", lambda: None)


@pytest.fixture
def registry(folder):
    return Registry()


@pytest.fixture
def name(request):
    """A model name of the test's own."""
    return f"{request.node.name.split('[')[0][:80]}-{next(NUMBERS)}"


@pytest.fixture(scope="module")
def standing(folder):
    """A model whose champion is version 1, for what is refused."""
    promote_directly(str(folder / "poor"), "standing")
    return "standing"


def promote_directly(*arguments):
    """Promote from a fixture wider than a test, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "evaluate_package", evaluate_directly)
        patch.setattr(connect, "connect", lambda: None)
        return promote(*arguments)
