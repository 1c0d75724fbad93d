import http.server
import os
import threading
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from models.config import InputError
from models.package import load_package
from pipelines.artifacts.resolve import locate, package_of
from pipelines.tracking.registry import CHAMPION, LAPSE_SECONDS, SPACE, Registry, check_name
from tests.support.promotion_cases import save_model, write_data

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry in a file of its own, which is what MLFLOW_TRACKING_URI names."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)
        yield Registry()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "package", write_data(folder / "data"), 3)
    return folder / "package"


# Versions and aliases


def test_a_version_keeps_what_it_was_registered_with(registry):
    first = registry.register("kept", "/models/one", "", {SPACE: "aa"}, {"val/recall": 0.25})
    second = registry.register("kept", "s3://bucket/two", "run", {}, {})
    assert [first.number, second.number] == [1, 2] and registry.versions("kept") == [first, second]
    assert first.tags == {SPACE: "aa", "triptych.val/recall": "0.25"}
    assert registry.version("kept", 2) == second and (second.source, second.run_id) == ("s3://bucket/two", "run")
    assert registry.aliases("kept") == {} and registry.by_alias("kept", CHAMPION) is None


def test_an_alias_moves_and_a_name_resolves_to_its_version(registry):
    for source in ("/one", "/two"):
        registry.register("named", source, "", {}, {})
    for number in (1, 2, 1):
        registry.set_alias("named", CHAMPION, number)
        assert registry.resolve("models:/named@champion").number == number
        assert locate(f"models:/named/{number}") == ("package", ["/one", "/two"][number - 1])
    registry.set_alias("named", CHAMPION, None)
    assert registry.aliases("named") == {}


@pytest.mark.parametrize("model", ["models:/there@champion", "models:/there/7", "models:/nowhere/1", "models:/a/b/c"])
def test_a_name_that_resolves_to_nothing_is_refused_in_one_line(registry, model):
    if not registry.versions("there"):
        registry.register("there", "/one", "", {}, {})
        registry.set_alias("there", "staging", 1)
    with pytest.raises(InputError) as caught:
        registry.resolve(model)
    assert "\n" not in str(caught.value) and model in str(caught.value)
    assert ("staging (version 1)" in str(caught.value)) == ("there" in model)


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "a:b", ".a", "shop.promoting", "a'b"])
def test_a_name_that_could_not_be_written_in_a_uri_is_refused(name):
    with pytest.raises(InputError, match="--name"):
        check_name(name)
    assert check_name("shop photos-2.1") == "shop photos-2.1"


def test_a_withdrawn_version_is_gone_and_its_number_is_not_used_again(registry):
    registry.withdraw(registry.register("gone", "/one", "", {}, {}))
    assert registry.versions("gone") == []
    assert registry.register("gone", "/two", "", {}, {}).number == 2


class Refusing:
    """MLflow's client, with one call replaced."""

    def __init__(self, client, name, call):
        self._client, self._name, self._call = client, name, call

    def __getattr__(self, name):
        return self._call if name == self._name else getattr(self._client, name)


def test_an_alias_whose_move_was_not_heard_of_counts_as_moved_only_if_it_did(registry, monkeypatch):
    for _ in range(2):
        registry.register("deaf", "/one", "", {}, {})
    registry.set_alias("deaf", CHAMPION, 1)
    client = registry._connected

    def lost_reply(*arguments):
        client.set_registered_model_alias(*arguments)
        raise TimeoutError("no reply")

    def not_sent(*arguments):
        raise TimeoutError("no reply")

    def overtaken(*arguments):
        client.set_registered_model_alias(*arguments)
        client.set_registered_model_alias("deaf", CHAMPION, "1")

    for call, hint in ((not_sent, "no reply"), (overtaken, "version 1 from outside")):
        monkeypatch.setattr(registry, "_connected", Refusing(client, "set_registered_model_alias", call))
        with pytest.raises(InputError, match=hint):
            registry.set_alias("deaf", CHAMPION, 2)
        assert registry.aliases("deaf") == {CHAMPION: 1}
    monkeypatch.setattr(registry, "_connected", Refusing(client, "set_registered_model_alias", lost_reply))
    registry.set_alias("deaf", CHAMPION, 2)
    assert registry.aliases("deaf") == {CHAMPION: 2}


# Packages


def test_a_published_package_is_read_by_its_name_and_its_files_stay(registry, package):
    space = load_package(package).embedding_space
    source, run_id = registry.publish(package, space, "")
    assert registry.run(run_id).status == "FINISHED" and source.endswith(f"packages/{space}")
    registry.register("shop", source, run_id, {SPACE: space}, {})
    registry.set_alias("shop", CHAMPION, 1)
    for model in ("models:/shop@champion", "models:/shop/1"):
        with package_of(model) as folder:
            assert load_package(folder).embedding_space == space
    weights = Path(source) / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    assert registry.publish(package, space, run_id) == (source, run_id)
    assert weights.stat().st_mtime_ns == 0
    weights.unlink()
    registry.publish(package, space, run_id)
    assert weights.read_bytes() == (package / "model.safetensors").read_bytes()


@pytest.mark.parametrize("source", ["package", "nothing"])
def test_a_version_whose_files_are_others_now_is_refused(registry, package, source):
    folder = package.parent / source
    version = registry.register("changed", str(folder), "", {SPACE: "0123"}, {})
    with pytest.raises(InputError, match=f"{version}: .*0123.* is not at {folder}"), package_of(str(version)):
        pass


def test_a_run_that_is_not_there_is_none(registry):
    assert registry.run("0123456789abcdef") is None


# The claim


def test_a_claim_excludes_others_and_is_given_back_whatever_happens(registry):
    with registry.claim("one"):
        with pytest.raises(InputError, match=f"under way \\(by .*:{os.getpid()}, "), registry.claim("one"):
            pass
        with registry.claim("two"):
            pass
    with pytest.raises(ZeroDivisionError), registry.claim("one"):
        raise ZeroDivisionError
    with registry.claim("one") as held:
        held()


def test_a_claim_that_lapsed_is_taken_over_and_its_holder_finds_out(registry, monkeypatch, caplog):
    older = registry.claim("old")
    held = older.__enter__()
    held()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + LAPSE_SECONDS - 60)
    with pytest.raises(InputError, match="under way"), registry.claim("old"):
        pass
    monkeypatch.setattr(time, "time", lambda: now + LAPSE_SECONDS + 60)
    with registry.claim("old") as newer:
        with pytest.raises(InputError, match="another promotion took over"):
            held()
        older.__exit__(None, None, None)  # gives nothing back that is not its own
        newer()
    assert "is not given back" in caplog.text


def test_of_many_at_once_one_at_a_time_holds_the_claim(registry):
    inside, most, refused, failures = [], [0], [], []
    start = threading.Barrier(6)

    def work():
        own = Registry(registry.uri)
        own.aliases("warm")  # its own connection
        start.wait()
        try:
            with own.claim("race"):
                inside.append(1)
                most[0] = max(most[0], len(inside))
                time.sleep(0.05)
                inside.pop()
        except InputError as error:
            refused.append(str(error))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and most == [1] and len(refused) < 6
    assert all("another promotion" in line for line in refused)


# Servers that refuse or are not there


class Forbidding(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(403)
        self.end_headers()

    do_POST = do_PATCH = do_DELETE = do_PUT = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def forbidding():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://user:secret@127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_what_is_refused_or_unreachable_is_said_in_one_line(forbidding):
    for uri, hint in ((forbidding, "no permission"), ("http://127.0.0.1:1", "start the server")):
        registry = Registry(uri)
        calls = [
            lambda r=registry: r.aliases("shop"),
            lambda r=registry: r.register("shop", "/one", "", {}, {}),
            lambda r=registry: r.set_alias("shop", CHAMPION, 1),
            lambda r=registry: r.claim("shop").__enter__(),
            lambda r=registry: r.run("a"),
        ]
        for call in calls:
            with pytest.raises(InputError, match=hint) as caught:
                call()
            assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_an_error_that_is_not_about_presence_is_no_absence(registry, monkeypatch):
    def broken(*arguments):
        raise MlflowException("damaged")

    monkeypatch.setattr(registry, "_connected", Refusing(registry._connected, "get_registered_model", broken))
    with pytest.raises(InputError, match="damaged"):
        registry.aliases("shop")
