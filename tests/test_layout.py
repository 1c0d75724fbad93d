import importlib
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.paths import ROOT

PACKAGES = ("models", "pipelines", "tuning", "serving")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    show = f"import sys\n{code}\nprint('\\nLOADED', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("name", PACKAGES)
def test_our_common_words_mean_this_checkout(name):
    assert Path(importlib.import_module(name).__file__ or "").parent == ROOT / name
    shipped_by = importlib.metadata.packages_distributions().get(name, [])
    assert set(shipped_by) <= {PROJECT["name"]}


def test_a_package_is_a_docstring():
    for file in sorted(file for name in PACKAGES for file in (ROOT / name).rglob("__init__.py")):
        source = file.read_text().strip()
        assert source.startswith('"""') and source.endswith('"""') and source.count('"""') == 2, file


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("models", "models/__init__.py"),
        ("tests.models", "tests/models/__init__.py"),
        ("pipelines.data", "pipelines/data/__init__.py"),
        ("tests.pipelines.data", "tests/pipelines/data/__init__.py"),
        ("serving.http", "serving/http/__init__.py"),
        ("tests.serving.http", "tests/serving/http/__init__.py"),
        ("http", None),
        ("inspect", None),
    ],
)
def test_rooms_hide_no_other_module_and_tests_hide_no_room(name, file):
    found = Path(importlib.import_module(name).__file__ or "")
    assert found == ROOT / file if file else not found.is_relative_to(ROOT / "tests"), found
    assert file or not any(found.is_relative_to(ROOT / package) for package in PACKAGES), found


def test_a_package_has_few_files_of_its_own_and_every_test_a_room():
    for package in ("pipelines", "tuning", "serving"):
        assert len(list((ROOT / package).glob("*.py"))) <= 12, package
    rooms = {file.parent.relative_to(ROOT) for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
    rooms |= {Path("benchmarks"), Path("examples"), Path("serving/page"), Path()}
    for file in (ROOT / "tests").rglob("test_*.py"):
        room = file.parent.relative_to(ROOT / "tests")
        assert (room.parent if room.name == "with_ray" else room) in rooms, file


def test_help_is_instant():
    heavy = {"torch", "ray", "mlflow", "transformers", "pyarrow", "numpy"}
    for words in (["--help"], ["train", "--help"], ["train", "no-such-preset"], ["no-such-command"]):
        assert not heavy & loaded_by(f"from pipelines.cli import main; main.main({words})"), words


def test_a_process_that_only_looks_where_models_are_loads_neither_torch_nor_mlflow():
    loaded = loaded_by("import pipelines.artifacts.resolve, serving.control.controller, serving.service.run")
    assert not {"torch", "transformers", "mlflow"} & loaded


def test_models_know_no_ray_and_no_mlflow():
    names = sorted(path.stem for path in (ROOT / "models").glob("*.py"))
    assert "config" in names
    loaded = loaded_by("".join(f"import models.{name}\n" for name in names if name != "__init__"))
    assert "torch" in loaded
    assert not {"ray", "mlflow", "pipelines", "tuning", "serving"} & loaded


def test_the_tested_set_lies_within_the_ranges():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonical(requirement.name): requirement for requirement in map(Requirement, lines)}
    assert len(pins) == len(lines), "a package is named twice"
    for pin in pins.values():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], f"{pin}: not one exact version"
        assert not pin.url and "+" not in str(pin), f"{pin}: only from a package index, and of no one machine"
    for wanted in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]):
        (exact,) = pins[canonical(wanted.name)].specifier
        assert wanted.specifier.contains(exact.version), f"{wanted} but {exact}"


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_the_tested_set_holds_all_that_is_needed():
    pinned = {canonical(Requirement(line).name) for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]}
    open_ends = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
    needed: dict[str, set[str]] = {}  # name -> extras
    while open_ends:
        wanted = open_ends.pop()
        name, before = canonical(wanted.name), needed.get(canonical(wanted.name))
        extras = wanted.extras | (before or set())
        if before == extras:
            continue
        needed[name] = extras
        for line in importlib.metadata.requires(wanted.name) or []:
            further = Requirement(line)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                open_ends.append(further)
    assert {name for name in needed if not name.startswith("nvidia")} - {
        "triton"
    } <= pinned  # those come with CUDA's torch
