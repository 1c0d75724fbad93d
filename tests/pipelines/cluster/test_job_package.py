"""What a job gets of the checkout, by Ray's own packaging: every module, also below folders that are called like data.

Three ways lead there: a driver that joins a cluster (`connect`), `triptych submit`, and the line of Ray's own command
line that docs/cluster.md shows. Nothing is started: Ray's packaging is given what each of them would give it.
"""

import json
import re
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

from pipelines.cluster import connect
from pipelines.cluster import submit as submit_module
from pipelines.lineage import ROOT

PACKAGES = ("models", "pipelines", "tuning", "serving")
LOOKALIKES = [f"{package}/{folder}" for package in PACKAGES for folder in ("data", "demo", "runs", "mlruns", "tests")]
LOOKALIKES += [
    "serving/http",
    "serving/http/page",
    "pipelines/data/runs",
    "serving/benchmarks/results",
    "tuning/golden",
]
"""Folders that may come to be, named like some that stay at home."""
LEFT = (
    "data/train/0.parquet",
    "data/notes.txt",
    "demo/run/config.json",
    "runs/a/package/config.json",
    "runs/a/model.safetensors",
    "mlruns/1/meta.yaml",
    "mlflow.db",
    "mlflow-unsent-1.jsonl",
    "benchmarks/results/a.json",
    "tests/test_a.py",
    "out.log",
    "pairs.tar",
    "pairs.parquet",
    "triptych.egg-info/PKG-INFO",
    ".env",
    ".aws/credentials",
    "examples/.secret",
    ".git/config",
    ".venv/bin/python",
    "models/__pycache__/config.pyc",
)
"""Data, runs and secrets, which stay at home."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the packages and of `.gitignore`, with such folders and with what must stay."""
    copy = tmp_path_factory.mktemp("checkout")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", copy)
    for folder in LOOKALIKES:
        for name in ("__init__.py", "manifest.py", "page.css", "page.html.j2", "font.woff2", "icon.png"):
            (copy / folder).mkdir(parents=True, exist_ok=True)
            (copy / folder / name).write_text("x")
    for name in LEFT:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
    return copy


def own_files(checkout: Path) -> set[str]:
    """Every file of the packages."""
    found = {path for package in PACKAGES for path in (checkout / package).rglob("*") if path.is_file()}
    return {str(path.relative_to(checkout)) for path in found if path.parent.name != "__pycache__"}


def by_connect(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name in ("RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    for name in connect.SETTINGS:
        monkeypatch.setenv(name, connect.SETTINGS[name])  # restored afterwards
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **options: given.update(options))
    monkeypatch.setattr(connect, "ROOT", checkout)
    monkeypatch.setattr(connect, "probe", lambda address: "")
    monkeypatch.setattr(connect, "_say_if_lost", lambda: None)
    connect.connect()
    return dict(given["runtime_env"])


def by_submit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    given: dict[str, Any] = {}

    class Client:
        def submit_job(self, **options: Any) -> str:
            given.update(options)
            raise KeyboardInterrupt

    monkeypatch.setattr(submit_module, "_connect", lambda address: Client())
    monkeypatch.setattr(submit_module, "ROOT", checkout)
    with pytest.raises(KeyboardInterrupt):
        submit_module.submit(["data", "stats", "s3://bucket/train"], "http://10.1.2.3:8265")
    return dict(given["runtime_env"])


def by_docs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (line,) = re.findall(
        r"^ray job submit .*?(?=^```$)", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE | re.DOTALL
    )
    words = shlex.split(line)
    monkeypatch.chdir(checkout)
    folder = words[words.index("--working-dir") + 1]
    return json.loads(words[words.index("--runtime-env-json") + 1]) | {"working_dir": str(Path(folder).absolute())}


WAYS = [by_connect, by_submit, by_docs]


def packaged(runtime_env: dict[str, Any], scratch: Path) -> set[str]:
    """The files that Ray puts into a job's package."""
    target = scratch / "package.zip"

    def pack(folder: str, excludes: list[str], is_file: bool = False) -> None:
        create_package(folder, target, include_gitignore=True, excludes=excludes)

    upload_working_dir_if_needed(dict(runtime_env), include_gitignore=True, upload_fn=pack)
    with zipfile.ZipFile(target) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.mark.parametrize("way", WAYS)
def test_every_module_arrives_and_nothing_private_does(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[..., dict[str, Any]]
) -> None:
    files = packaged(way(checkout, monkeypatch), tmp_path)
    expected = own_files(checkout)
    assert {"serving/page/index.html", "pipelines/cli/main.py", "pipelines/data/manifest.py"} <= expected
    assert files == expected


def test_all_ways_leave_the_same_at_home(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = []
    for way in WAYS:
        with monkeypatch.context() as patch:
            lists.append(way(checkout, patch)["excludes"])
    assert lists == [connect.EXCLUDES] * 3


def test_a_pattern_with_a_folder_means_the_checkouts_own() -> None:
    folders = [pattern for pattern in connect.EXCLUDES if "/" in pattern and "*" not in pattern]
    assert folders and all(pattern.startswith("/") and pattern.endswith("/") for pattern in folders)


def test_git_sees_every_module_too(checkout: Path, tmp_path: Path) -> None:
    git = ["git", f"--git-dir={tmp_path}/git", f"--work-tree={checkout}", "-c", "core.excludesFile=/dev/null"]
    subprocess.run([*git, "init", "-q"], check=True)
    command = [*git, "ls-files", "--others", "--exclude-standard", "--full-name"]
    listed = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True)
    files = set(listed.stdout.splitlines())
    assert own_files(checkout) <= files
    assert not files & {"data/notes.txt", "runs/a/package/config.json", "demo/run/config.json", "mlruns/1/meta.yaml"}
