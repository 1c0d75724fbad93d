"""What stands around the code: make, CI, hooks, the changelog."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def make(*words: str, **variables: str) -> str:
    """What make prints; variables of a make that runs these tests do not reach it."""
    outside = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "TRIPTYCH_UNPINNED"}}
    command = ["make", "--no-print-directory", *words]
    done = subprocess.run(command, cwd=ROOT, env=outside | variables, check=True, capture_output=True, text=True)
    return done.stdout


def test_help_says_what_each_target_does():
    phony = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    told = dict(re.findall(r"^make (\S+) +(\S.*)$", make("help"), re.MULTILINE))
    assert set(told) == {target for line in phony for target in line.split()}


def test_plain_make_prints_the_help():
    assert make() == make("help")


def test_the_tested_versions_are_installed_unless_the_newest_are_asked_for():
    tested, newest = (
        make("--dry-run", "--always-make", "install", **asked) for asked in ({}, {"TRIPTYCH_UNPINNED": "1"})
    )
    assert "--constraint constraints.txt" in tested and "--upgrade" not in tested
    assert "--upgrade --upgrade-strategy eager" in newest and "--constraint" not in newest


def read(workflow: Path) -> dict:
    """A workflow; YAML reads its key `on` as true."""
    content = yaml.safe_load(workflow.read_text())
    return content | {"on": content.pop(True)}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_runs_what_people_run(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job and job["timeout-minutes"] <= 90
        assert job["container"]["image"] == "python:${{ matrix.python }}"
        assert ".ci/run" in [step.get("run") for step in job["steps"]]
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+[.\d]*|[0-9a-f]{40})", step.get("uses", "a/b@v1")), step


def test_ci_runs_every_python_that_the_project_allows():
    allowed = SpecifierSet(PROJECT["requires-python"])
    (job,) = read(ROOT / ".github/workflows/ci.yml")["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == [f"3.{n}" for n in range(99) if allowed.contains(f"3.{n}.0")]


def test_the_newest_versions_are_tried_once_a_week():
    workflow = read(ROOT / ".github/workflows/newest.yml")
    ((_, _, day_of_month, month, weekday),) = [entry["cron"].split() for entry in workflow["on"]["schedule"]]
    assert (day_of_month, month) == ("*", "*") and re.fullmatch(r"[0-6]", weekday)
    assert all(job["env"]["TRIPTYCH_UNPINNED"] for job in workflow["jobs"].values())


def test_hooks_are_local_and_run_what_the_dev_extra_installs():
    binaries = Path(sys.executable).parent
    subprocess.run([binaries / "pre-commit", "validate-config"], cwd=ROOT, check=True)
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repository["repo"] for repository in repositories} == {"local"}
    for hook in repositories[0]["hooks"]:
        program = Path(hook["entry"].split()[0])
        assert hook["language"] == "system" and program.parent == Path(".venv/bin")
        assert (binaries / program.name).exists(), program


def test_the_changelog_begins_with_the_version_in_work():
    (first, *_) = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == PROJECT["version"]
