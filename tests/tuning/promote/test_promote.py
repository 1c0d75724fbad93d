"""Promotion and rollback: what they leave in the registry, whatever fails or happens at the same time."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.tracking import MlflowClient

from models.config import InputError
from models.package import load_package
from pipelines.artifacts.resolve import package_of
from pipelines.tracking.registry import CHAMPION, PREVIOUS, REPLACES, SPACE, Registry
from tests.support.promotion_cases import (
    PAIRS,
    make_run,
    nothing_held,
    recall_of,
    refused,
    state,
    write_data,
)
from tuning.promote import promote as promote_module
from tuning.promote.promote import PromotionRefused, promote, rollback

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)


def test_the_made_runs_differ_as_their_names_say(folder):
    assert recall_of(folder / "good") == 1
    assert recall_of(folder / "poor") < recall_of(folder / "fair") < 1


def test_the_first_promotion_registers_the_package_with_its_origin_and_makes_it_champion(folder, registry, name):
    run = folder / "fair"
    done = promote(str(run), name, index="s3://bucket/{space}/index")
    version = registry.by_alias(name, CHAMPION)
    package = load_package(run / "package")
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    assert (done.version, done.replaces, version.number, version.run_id) == (1, None, 1, run_id)
    expected = {
        SPACE: package.embedding_space,
        "triptych.run_id": run_id,
        "triptych.run_folder": str(run),
        "triptych.commit": "c0ffee",
        "triptych.preset": "clip-tiny",
        "triptych.val_data": str(folder / "data"),
        "triptych.index_uri": f"s3://bucket/{package.embedding_space}/index",
    }
    assert expected.items() <= version.tags.items() and REPLACES not in version.tags
    assert len(version.tags["triptych.manifest"]) == 32
    assert float(version.tags["triptych.val/text_retrieval_recall_at_1"]) == pytest.approx(
        package.metrics["val/text_retrieval_recall_at_1"]
    )
    with package_of(f"models:/{name}@champion") as served:
        assert load_package(served).embedding_space == package.embedding_space
        assert Path(version.source) == served and served != run / "package"
    assert registry.aliases(name) == {CHAMPION: 1} and nothing_held(registry, name)


def test_every_step_is_told_and_kept_with_the_run(folder, registry, name, caplog):
    caplog.set_level("INFO")
    done = promote(str(folder / "fair"), name, data=str(folder / "data"))
    titles = ["read", "evaluate", "verify", "served", "compare", "register", "champion", "previous"]
    assert [step.title for step in done.steps] == titles
    assert [line.split()[0] for line in done.text().splitlines()] == titles
    assert "no service was asked" in done.text() and "no --data" not in done.text()
    assert all(step.text in caplog.text for step in done.steps)
    path = MlflowClient().download_artifacts(done.run_id, registry.by_alias(name, CHAMPION).tags["triptych.promotion"])
    kept = json.loads(Path(path).read_text())
    assert [step["title"] for step in kept["steps"]] == titles and kept["version"] == 1
    with pytest.raises(PromotionRefused):
        promote(str(folder / "poor"), name)
    run_id = json.loads((folder / "poor" / "mlflow.json").read_text())["run_id"]
    (record,) = [f.path for f in MlflowClient().list_artifacts(run_id, "promotions") if f.path.endswith(name)]
    kept = json.loads(Path(MlflowClient().download_artifacts(run_id, f"{record}/promotion.json")).read_text())
    assert kept["steps"][-1]["outcome"] == "refused" and kept["version"] is None


def test_a_better_one_replaces_and_rollback_goes_back_step_by_step(folder, registry, name):
    for run in ("poor", "fair", "good"):
        done = promote(str(folder / run), name)
    assert registry.aliases(name) == {CHAMPION: 3, PREVIOUS: 2} and done.replaces == 2
    assert [version.tags.get(REPLACES) for version in registry.versions(name)] == [None, "1", "2"]
    back = rollback(name)
    assert registry.aliases(name) == {CHAMPION: 2, PREVIOUS: 1} and (back.version, back.replaces) == (2, 3)
    assert registry.version(name, 3).tags["triptych.rolled_back"].endswith("to 2")
    rollback(name)
    assert registry.aliases(name) == {CHAMPION: 1}
    with pytest.raises(PromotionRefused, match="version 1 replaced no version") as caught:
        rollback(name)
    assert "\n" not in str(caught.value) and registry.aliases(name) == {CHAMPION: 1}
    assert promote(str(folder / "good"), name).version == 4
    assert registry.aliases(name) == {CHAMPION: 4, PREVIOUS: 1} and nothing_held(registry, name)


def test_rollback_refuses_where_there_is_nothing_to_go_back_to(folder, registry, name):
    with pytest.raises(PromotionRefused, match="nothing is promoted"):
        rollback(name)
    promote(str(folder / "poor"), name)
    promote(str(folder / "fair"), name)
    registry.withdraw(registry.version(name, 1))
    with pytest.raises(PromotionRefused, match="no version that is still there"):
        rollback(name)
    assert registry.aliases(name) == {CHAMPION: 2}


def test_rollback_refuses_a_version_whose_package_is_gone(folder, registry, name, tmp_path):
    make_run(tmp_path / "lost", str(folder / "data"), 3)
    promote(str(tmp_path / "lost"), name)
    promote(str(folder / "good"), name)
    (Path(registry.version(name, 1).source) / "config.json").unlink()
    with pytest.raises(PromotionRefused, match=r"refused at verify: .*is not at"):
        rollback(name)
    assert registry.aliases(name) == {CHAMPION: 2, PREVIOUS: 1}


def test_a_run_that_mlflow_does_not_know_gets_a_run_for_its_package(folder, registry, name, tmp_path):
    make_run(tmp_path / "elsewhere", str(folder / "data"), 4, status=None)
    promote(str(tmp_path / "elsewhere"), name)
    version = registry.by_alias(name, CHAMPION)
    assert registry.run(version.run_id).status == "FINISHED" and version.source.startswith(str(folder / "mlruns"))
    assert version.tags["triptych.commit"] == "unknown" and "triptych.run_id" not in version.tags


def forbid(monkeypatch, call, after=None):
    """MLflow answers 403 to that call from now on, `after` done first."""

    def answer(client, *arguments, **options):
        if after:
            after(client, *arguments, **options)
        raise MlflowException("forbidden", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(MlflowClient, call, answer)


@pytest.mark.parametrize(
    "call",
    [
        "get_registered_model",
        "log_artifacts",
        "create_registered_model",
        "create_model_version",
        "set_registered_model_alias",
    ],
)
def test_a_registry_that_answers_403_leaves_everything_as_it_was(folder, registry, name, monkeypatch, tmp_path, call):
    promote(str(folder / "poor"), name)
    make_run(tmp_path / "run", str(folder / "data"), PAIRS, seed=2)
    with monkeypatch.context() as patch:
        forbid(patch, call)
        record = refused(tmp_path / "run", name, r"no permission \(403\)")
    assert state(registry, name) == ({CHAMPION: 1}, [1]) and nothing_held(registry, name)
    if call == "get_registered_model":
        assert not record.metrics, "scored for nothing"
    assert promote(str(tmp_path / "run"), name).version is not None


def test_a_move_whose_reply_was_lost_is_a_promotion(folder, registry, name, monkeypatch):
    promote(str(folder / "poor"), name)
    real = MlflowClient.set_registered_model_alias
    with monkeypatch.context() as patch:
        forbid(patch, "set_registered_model_alias", after=real)
        assert promote(str(folder / "good"), name).version == 2
    assert state(registry, name) == ({CHAMPION: 2, PREVIOUS: 1}, [1, 2])


def test_a_previous_that_lags_is_said_and_repaired_by_what_comes_next(folder, registry, name, monkeypatch):
    promote(str(folder / "poor"), name)
    promote(str(folder / "fair"), name)
    real = MlflowClient.set_registered_model_alias

    def only_champion(client, model, alias, version):
        if alias == PREVIOUS:
            raise MlflowException("forbidden", error_code=PERMISSION_DENIED)
        real(client, model, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", only_champion)
        done = promote(str(folder / "good"), name)
    assert done.version == 3 and done.steps[-1].outcome == "skipped" and "repairs it" in done.steps[-1].text
    assert registry.aliases(name) == {CHAMPION: 3, PREVIOUS: 1}
    refused(folder / "poor", name, "worse")
    assert registry.aliases(name) == {CHAMPION: 3, PREVIOUS: 2}
    registry.set_alias(name, PREVIOUS, None)
    rollback(name)
    assert registry.aliases(name) == {CHAMPION: 2, PREVIOUS: 1}


@pytest.mark.parametrize("moved", [False, True])
def test_an_interruption_leaves_either_the_old_champion_or_the_new_one(folder, registry, name, monkeypatch, moved):
    promote(str(folder / "poor"), name)
    set_alias = Registry.set_alias

    def interrupted(*arguments):
        if moved:
            set_alias(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "set_alias", interrupted)
        with pytest.raises(KeyboardInterrupt):
            promote(str(folder / "good"), name)
    assert state(registry, name) == (({CHAMPION: 2}, [1, 2]) if moved else ({CHAMPION: 1}, [1]))
    assert nothing_held(registry, name)


def test_a_champion_that_changed_since_the_comparison_is_not_replaced(folder, registry, name, monkeypatch):
    """Another promotion is complete, or under way, between the comparison and the claim."""
    promote(str(folder / "poor"), name)
    publish = promote_module._publish
    others = ExitStack()

    def meanwhile(*arguments):
        source = publish(*arguments)
        monkeypatch.setattr(promote_module, "_publish", publish)
        promote(str(folder / "fair"), name)
        return source

    def under_way(*arguments):
        others.enter_context(Registry().claim(name))
        return publish(*arguments)

    monkeypatch.setattr(promote_module, "_publish", meanwhile)
    refused(folder / "good", name, "at register: the champion is now version 2, and was version 1")
    assert state(registry, name) == ({CHAMPION: 2, PREVIOUS: 1}, [1, 2])
    monkeypatch.setattr(promote_module, "_publish", under_way)
    refused(folder / "good", name, "at register: .*another promotion is under way")
    others.close()
    assert state(registry, name) == ({CHAMPION: 2, PREVIOUS: 1}, [1, 2]) and nothing_held(registry, name)


def test_an_alias_moved_by_hand_before_the_commit_point_stops_it_and_no_version_stays(
    folder, registry, name, monkeypatch
):
    promote(str(folder / "poor"), name)
    promote(str(folder / "fair"), name)
    register = Registry.register

    def and_by_hand(self, *arguments):
        version = register(self, *arguments)
        MlflowClient().set_registered_model_alias(name, CHAMPION, "1")
        return version

    monkeypatch.setattr(Registry, "register", and_by_hand)
    record = refused(folder / "good", name, "at champion: the champion is now version 1, and was version 2")
    assert record.steps[-1].title == "withdraw"
    assert registry.aliases(name)[CHAMPION] == 1 and state(registry, name)[1] == [1, 2]


@pytest.mark.parametrize("first", [True, False])
def test_of_two_promotions_at_once_one_becomes_champion_and_the_other_says_so(
    folder, registry, name, monkeypatch, first
):
    if not first:
        promote(str(folder / "poor"), name)
    before = state(registry, name)[1]
    publish, both = promote_module._publish, threading.Barrier(2)

    def together(*arguments):
        source = publish(*arguments)
        both.wait()
        return source

    monkeypatch.setattr(promote_module, "_publish", together)
    outcomes = {}

    def work(run):
        try:
            outcomes[run] = promote(str(folder / run), name)
        except BaseException as error:
            outcomes[run] = error

    threads = [threading.Thread(target=work, args=[run]) for run in ("fair", "good")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [outcome for outcome in outcomes.values() if not isinstance(outcome, BaseException)]
    (lost,) = [outcome for outcome in outcomes.values() if isinstance(outcome, BaseException)]
    assert isinstance(lost, PromotionRefused) and any(
        text in str(lost) for text in ("another promotion", "the champion is now version")
    )
    assert registry.aliases(name)[CHAMPION] == won.version and state(registry, name)[1] == [*before, won.version]
    assert nothing_held(registry, name)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real MLflow server that keeps artifacts itself, which MLFLOW_TRACKING_URI names."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///server.db", "--workers", "1"]
    command += ["--artifacts-destination", "./artifacts", "--host", "127.0.0.1", "--port", str(port)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.chdir(tmp_path)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)  # the server alone may take minutes to start on a busy machine
def test_on_a_real_server_packages_are_read_through_it(server, tmp_path):
    data = write_data(tmp_path / "data")
    for number, (fitted, status) in enumerate(((2, "FINISHED"), (PAIRS, None))):
        make_run(tmp_path / str(number), data, fitted, status)
        promote(str(tmp_path / str(number)), "shop")
    registry = Registry()
    assert registry.aliases("shop") == {CHAMPION: 2, PREVIOUS: 1}
    assert all(version.source.startswith("mlflow-artifacts:") for version in registry.versions("shop"))
    with package_of("models:/shop@champion") as folder:
        assert load_package(folder).embedding_space == load_package(tmp_path / "1" / "package").embedding_space
    refused(tmp_path / "0", "shop", "worse than the champion")
    rollback("shop")
    assert registry.aliases("shop") == {CHAMPION: 1}
    with pytest.raises(InputError, match="aliases: champion"):
        registry.resolve("models:/shop@previous")
