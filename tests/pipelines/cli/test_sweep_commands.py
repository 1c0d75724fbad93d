"""The commands of a sweep: what they take, what they refuse in one line, and that they reach the right function."""

import pytest

from pipelines.cli.console import FAILED, USAGE
from pipelines.cli.main import main

PATHS = ["--train-data", "data/train", "--val-data", "data/val", "--out", "runs"]


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("triptych: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["tune"], USAGE, ""),
        (["tune", "no-such-preset"], USAGE, "unknown preset 'no-such-preset'"),
        (["tune", "both-dual-tiny", "--trials", "many"], USAGE, "--trials"),
        (["tune", "both-dual-tiny", "--optim.rate", "1"], USAGE, "--optim.rate"),
        (["tune", "both-dual-tiny", "--space", "nowhere", *PATHS], FAILED, "--space nowhere"),
        (["tune", "clip-tiny", "--space", "codebook", *PATHS], FAILED, "codebook"),
        (["tune", "both-dual-tiny", "--search", "grid", "--scheduler", "best", *PATHS], FAILED, "--scheduler best"),
        (["compare"], USAGE, "SWEEP|RUN"),
        (["compare", "nowhere"], FAILED, "nowhere"),
        (["promote", "run"], USAGE, "--name"),
        (["rollback"], USAGE, "--name"),
    ],
)
def test_wrong_use_is_one_line_with_its_exit_code(words, code, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    if says:
        assert says in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_tune_takes_its_own_options_and_all_of_train(monkeypatch, capsys):
    seen = []

    def run(request):
        seen.append(request)
        return type("Outcome", (), {"text": "done"})

    monkeypatch.setattr("tuning.sweep.run_sweep.tune", run)
    words = ["--trials", "5", "--search", "random", "--repeats=2", "--resume", "--optim.epochs", "2", "--name", "s"]
    assert main(["tune", "both-dual-tiny", *PATHS, *words]) == 0
    (request,) = seen
    assert (request.trials, request.search, request.repeats, request.resume) == (5, "random", 2, True)
    assert (request.space, request.scheduler) == ("", "")
    base = request.base
    assert (base.optim.epochs, base.optim.min_samples, base.name, base.out) == (2.0, 0, "s", "runs")
    assert capsys.readouterr().out == "done\n"


def test_compare_promote_and_rollback_print_what_they_did(monkeypatch, capsys):
    from serving.service.smoke import served_vectors
    from tuning.compare.compare_runs import CompareOutcome

    calls = []
    promotion = type("Promotion", (), {"text": lambda self: "read done"})()
    monkeypatch.setattr(
        "tuning.compare.compare_runs.compare_runs",
        lambda *a: calls.append(a) or CompareOutcome("table", "x/report.html"),
    )
    monkeypatch.setattr("tuning.promote.promote.promote", lambda *a: calls.append(a) or promotion)
    monkeypatch.setattr("tuning.promote.promote.rollback", lambda *a: calls.append(a) or promotion)
    assert main(["compare", "a", "b", "--out", "c"]) == 0
    assert main(["promote", "a", "--name", "shop", "--index", "i/{space}", "--allow-worse"]) == 0
    assert main(["rollback", "--name", "shop"]) == 0
    assert calls == [(["a", "b"], "c"), ("a", "shop", None, "i/{space}", True, served_vectors), ("shop",)]
    assert capsys.readouterr().out == "table\nreport: x/report.html\nread done\nread done\n"
