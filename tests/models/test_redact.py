"""No secret of a URL is shown: the rule, and every way by which a text leaves: error, log, result, record, page."""

import ast
import asyncio
import io
import logging
import pickle
import time
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tuning.sweep.mlflow_runs
from models.config import Failed, InputError
from models.redact import redact
from pipelines import storage
from pipelines.artifacts.resolve import model_card
from pipelines.cli import console
from pipelines.config import PairsConfig
from pipelines.data import reader
from pipelines.data.manifest import Unit
from pipelines.lineage import ROOT
from pipelines.train.fit import _why
from serving.control.controller import VersionController
from serving.gateway.rollout import DesiredState, Rollout
from serving.model_source import VersionSpec
from serving.replicas.searcher import Searcher
from tests.support.comparison_cases import BASE, item, sweep
from tuning.compare.collect import _unique
from tuning.compare.page import comparison_page
from tuning.compare.ranking import compare
from tuning.compare.table import table_text
from tuning.promote.promotion_record import Promotion
from tuning.sweep.live_table import value_text
from tuning.sweep.sweep_record import Sweep, Trial

SECRET = "hunter2"
URLS = [f"s3://AKIA:{SECRET}@bucket/data", f"https://host/data?X-Amz-Signature={SECRET}", f"https://host/data#{SECRET}"]

# The rule


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://user:pass@host:5000/x", "https://***@host:5000/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("postgresql+psycopg2://u:p@ss@host/db", "postgresql+psycopg2://***@host/db"),
        ("s3://AKIA:sec/ret@bucket/x", "s3://***@bucket/x"),
        ("mysql://u:p?a#b@host/db", "mysql://***"),
        ("http://host:5000?token=a@b", "http://***"),
        ("s3://bucket/folder@2x/file", "s3://bucket/folder@2x/file"),
        ("https://h/a?X-Amz-Signature=abc&part=1", "https://h/a"),
        ("https://h/a?abc", "https://h/a"),
        ("https://h/a#access_token=abc", "https://h/a"),
        ("s3://b/x.parquet?token=abc#row=5", "s3://b/x.parquet"),
        ("s3://b/x.parquet#row=5: no picture", "s3://b/x.parquet#row=5: no picture"),
        ("gs://b/x.tar#a/b.jpg", "gs://b/x.tar#a/b.jpg"),
        ("s3://k:s@b/x?token=abc: no such path; check it", "s3://***@b/x: no such path; check it"),
        ("failed at http://u:p@h/ and (http://v:q@i/?r=s).", "failed at http://***@h/ and (http://***@i/)."),
        ('{"url":"http://h/?sig=abc","uri":\'http://h/?sig=abc\'}', '{"url":"http://h/","uri":\'http://h/\'}'),
        (
            "retries exceeded with url: /k?X-Amz-Signature=abc&part=1 (Caused by",
            "retries exceeded with url: /k (Caused by",
        ),
        ("RAY_ADDRESS u:p@host:8265: give http://", "RAY_ADDRESS ***@host:8265: give http://"),
        ("cannot parse postgresql//u:p@host/db", "cannot parse postgresql//***@host/db"),
        ("jdbc:postgresql://u:p@host/db", "jdbc:postgresql://***@host/db"),
        ("HTTPS://U:P@HOST/X?Y", "HTTPS://***@HOST/X"),
    ],
)
def test_what_is_left_of_a_url_names_the_place_alone(text, left):
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "models:/pairs@champion: no such version",
        "http://mlflow.internal:5000: not reachable (timed out)",
        "ask me@example.org? yes: why=not",
        "/data/what?.parquet: no such path",
        "sqlite:////data/mlflow.db",
        "--space {'a': [1, 2]}: which one? a=b",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(text):
    assert redact(text) == text


SIGNS = st.characters(codec="ascii", categories=("L", "N", "P", "S"), exclude_characters='"<>')
WORDS = st.text(SIGNS, min_size=1)


@given(user=st.text(SIGNS.filter(lambda sign: sign not in "/?#")), password=WORDS, path=WORDS)
def test_no_user_and_no_password_survives(user, password, path):
    left = redact(f"at postgresql://{user}:{password}@host/{path} it failed")
    assert left.startswith("at postgresql://***") and left.endswith(" it failed")
    kept = left.removeprefix("at postgresql://***").removesuffix(" it failed")
    assert kept in f"@host/{path}" or kept in path  # nothing of what came before the host


@given(query=WORDS, mark=st.sampled_from("?#"))
def test_no_query_and_no_fragment_survives(query, mark):
    left = redact(f"at https://host/path{mark}{query} it failed")
    assert left.startswith("at https://host/path") and left.endswith(" it failed")
    kept = left.removeprefix("at https://host/path").removesuffix(" it failed")
    assert set(kept) <= set(":;,.)]}'")  # what may end a sentence


@given(st.text(st.sampled_from("ab1:/@?#=&. '\"")))
@example("a://b:c?d@e")
@example("a://b?c=d?e=f")
def test_redacting_twice_changes_nothing(text):
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("part", ["a", "a:", "a:b@", "://", "?a", "?a=", "x?", "http://", "a:/", " a:"])
def test_long_texts_take_no_long_time(part):
    started = time.monotonic()
    redact(part * 100_000)
    assert time.monotonic() - started < 20  # quadratic: minutes


def test_there_is_one_rule():
    defined = [
        path.name
        for package in ("models", "pipelines", "tuning", "serving")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "redact" in node.name
    ]
    assert defined == ["redact.py"]


# Every way out


def clean(text):
    """The text without its secrets, which says of what it is."""
    assert SECRET not in text and ("bucket" in text or "host" in text), text
    return True


@pytest.mark.parametrize("url", URLS)
def test_errors_hold_no_secret_in_other_processes_either(url):
    for kind in (InputError, storage.Unavailable):
        error = kind(f"{url}: no such path; check it")
        assert clean(str(error)) and clean(repr(error)) and clean(str(pickle.loads(pickle.dumps(error))))
        assert type(pickle.loads(pickle.dumps(error))) is kind
    failed = SimpleNamespace(worker_failures={0: RuntimeError(f"Traceback\nOSError: {url} is away")})
    assert clean(_why(failed))


def fail(error: Exception) -> int:
    raise error


@pytest.mark.parametrize("url", URLS)
def test_the_command_line_shows_no_secret(url, monkeypatch):
    results, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(console, "RESULTS", [results])
    monkeypatch.setattr("sys.stderr", errors)
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    try:
        console.log_to_stderr()
        try:
            raise OSError(f"{url} is away")
        except OSError:
            logging.getLogger("pipelines.any").exception("reading %s", url)
        assert console.exit_code("triptych", lambda: fail(Failed(f"{url}: failed"))) == 1
        console.say(f"run folder: {url}")
    finally:
        root.handlers[:] = kept
        root.setLevel(level)
    assert clean(results.getvalue()) and clean(errors.getvalue())
    assert "Traceback" in errors.getvalue() and errors.getvalue().endswith(": failed\n")


@pytest.mark.parametrize("url", URLS)
def test_records_hold_no_secret(url, tmp_path, monkeypatch):
    trial = Trial(trial_id="a", reason=f"OSError: {url}", alarms=[f"repeat with seed 1 failed: {url}"])
    assert clean(trial.reason) and clean(trial.alarms[0])
    trial.reason = f"{url}: lost"
    assert clean(trial.reason)
    promotion = Promotion("shapes", "/run")
    with pytest.raises(OSError, match="gone"), promotion.step("read") as said:
        raise OSError(f"{url} is gone")
    with promotion.step("register") as said:
        said.append(f"version 1, {url}")
    assert all(clean(step.text) for step in promotion.steps)
    experiment = BASE.override({"train_data": url, "val_data": url})
    model_card(tmp_path, experiment, {}, "space")
    assert clean((tmp_path / "README.md").read_text())
    unit = Unit(unit=0, uri="a.tar", format="tar", row_group=-1, first=0, count=1, offset=0, length=1, size=1, etag="")
    monkeypatch.setattr(reader, "_samples", lambda *_: (_ for _ in ()).throw(OSError(f"{url} broke off")))
    assert clean(reader._read_part([unit], PairsConfig())[0][0].detail)


@pytest.mark.parametrize("url", URLS)
def test_pages_and_tables_show_no_secret(url, tmp_path):
    configs = [BASE.override({"train_data": data, "val_data": data, "init": data}) for data in (url, f"{url}-too")]
    runs = [
        item(f"run {n}", 0.2, config=config, where=f"{url}/{n}", protocol={"validation data": config.val_data})
        for n, config in enumerate(configs)
    ]
    comparison = compare(runs)
    assert comparison.protocol and clean(comparison_page(comparison)) and clean(table_text(comparison))
    searched = Sweep.load(sweep(tmp_path, []))
    searched.base, searched.protocol.val_data = configs[0], url
    assert clean(comparison_page(compare(runs[:1]), searched))
    assert clean(value_text(url)) and clean(_unique([runs[0], runs[0]])[0].name)


def test_a_sweep_finds_its_run_by_the_folder_as_mlflow_has_it(monkeypatch):
    url, started = URLS[0], []
    monkeypatch.setattr(
        tuning.sweep.mlflow_runs, "find_runs", lambda tag, value: [SimpleNamespace(run_id=value, status="RUNNING")]
    )
    monkeypatch.setattr(tuning.sweep.mlflow_runs.Tracker, "start", lambda *arguments: started.append(arguments))
    tuning.sweep.mlflow_runs.start_parent("s", url, {}, {}, "")
    assert started[0][-1] == redact(url)


@pytest.mark.parametrize("url", URLS)
def test_a_service_tells_no_secret(url):
    class Index:
        images, texts, kind = 1, 1, "flat"

    searcher = Searcher("", "", {}, {})
    searcher._uri, searcher._index = url, Index()
    assert clean(searcher.about()["uri"])

    async def alarmed():
        controller = VersionController.__new__(VersionController)
        controller._rollout, controller._changed = Rollout(), asyncio.Event()
        controller._rollout.desired = DesiredState({"a": VersionSpec(url, "shapes", "1", "", "")}, "a")
        controller._alarm(f"RuntimeError: {url} is away")
        return controller.state()

    state = asyncio.run(alarmed())
    assert clean(state["alarm"]) and clean(state["current"])


def test_a_place_is_logged_redacted():
    """Log calls outside the command line have handlers of Ray's: what they are given must be fit to be shown."""
    places = {"uri", "train_data", "val_data", "out", "address", "model", "where", "source"}
    bare = [
        f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
        for package in ("models", "pipelines", "tuning", "serving")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("logger.", "_log."))
        if any(ast.unparse(argument).rpartition(".")[2] in places for argument in node.args)
    ]
    assert bare == []
