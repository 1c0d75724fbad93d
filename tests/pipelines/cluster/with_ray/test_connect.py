import copy
import importlib.resources
import json
import re
import shlex
import subprocess
import sys
import tomllib

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.aws.config import DEFAULT_AMI
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.support.paths import ROOT

TEXT = (ROOT / "cluster.yaml").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def cluster():
    return yaml.safe_load(TEXT)


def leaves(node):
    """All plain values of a YAML tree, as text."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from leaves(value)
    else:
        yield str(node)


def keys(node):
    """All keys of a YAML tree."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield key
            yield from keys(value)


def test_it_is_what_our_ray_takes(cluster):
    schema = json.loads((importlib.resources.files("ray.autoscaler") / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "data", "gpu"}
    assert prepared["head_start_ray_commands"] == cluster["head_start_ray_commands"]  # no default took their place


def test_pools_are_told_apart_and_go_away_when_idle(cluster):
    types = cluster["available_node_types"]
    assert {name: kind["labels"]["pool"] for name, kind in types.items()} == {name: name for name in types}
    assert types["head"]["resources"]["CPU"] == 0
    for name in ("data", "gpu"):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= cluster["max_workers"]
    assert 0 < cluster["idle_timeout_minutes"] <= 30
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_nothing_is_open_to_the_outside(cluster):
    assert not [value for value in leaves(cluster) if re.search(r"0\.0\.0\.0|::/0", value)]
    assert not {"IpPermissions", "security_group", "run_options", "head_run_options"} & set(keys(cluster))
    head = " ".join(cluster["head_start_ray_commands"])
    assert re.findall(r"--(?:dashboard-host|node-ip-address)=(\S+)", head) == ["127.0.0.1"]
    assert "--dashboard-host" not in " ".join(cluster["worker_start_ray_commands"])
    for kind in cluster["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"], "Ray's own group would let the world try SSH"
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])


def test_every_machine_asks_for_the_token_and_has_it(cluster):
    for role in ("head", "worker"):
        start = next(line for line in cluster[f"{role}_start_ray_commands"] if "ray start" in line)
        assert start.index("RAY_AUTH_MODE=token") < start.index("ray start")
    assert cluster["file_mounts"][f"/home/{cluster['auth']['ssh_user']}/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"AKIA|aws_secret|RAY_AUTH_TOKEN=|password\s*[:=]", TEXT, re.IGNORECASE)


def test_machines_are_alike_and_named_by_the_user(cluster):
    configs = [kind["node_config"] for kind in cluster["available_node_types"].values()]
    assert len({config["ImageId"] for config in configs}) == 1  # one image, one Python
    assert configs[0]["ImageId"] not in DEFAULT_AMI.values()
    assert len({*map(str, (config["SecurityGroupIds"] for config in configs))}) == 1


def test_every_setting_has_its_comment():
    lines, seen = TEXT.splitlines(), set()
    for number, line in enumerate(lines):
        setting = re.match(r"[\s-]*(\w+):", line)
        if setting and setting[1] not in seen:  # where it stands first
            seen.add(setting[1])
            assert lines[number - 1].lstrip().startswith("#") or " # " in line, line


def test_it_installs_what_was_tested(cluster, tmp_path):
    pins = {
        requirement.name.lower(): requirement
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
        for requirement in [Requirement(line)]
    }
    assert pins["ray"].specifier == SpecifierSet(f"=={ray.__version__}")
    python = re.search(r"Python (3\.\d+)\)", TEXT)
    assert python and SpecifierSet(PROJECT["requires-python"]).contains(f"{python[1]}.0")
    assert not re.search(r"ray(\[[^]]*\])?[=<>]=", TEXT)  # the version stands in one place
    for target in ("pyproject.toml", "constraints.txt"):
        assert cluster["file_mounts"][f"/home/ubuntu/triptych/{target}"] == target
        (tmp_path / "triptych").mkdir(exist_ok=True)
        (tmp_path / "triptych" / target).write_text((ROOT / target).read_text())
    listing = next(line for line in cluster["setup_commands"] if "tomllib" in line)
    python_words, _, _ = listing.partition(">")
    words = [sys.executable, *shlex.split(python_words)[1:]]
    shown = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert shown.splitlines() == PROJECT["dependencies"]
    assert "--constraint ~/triptych/constraints.txt" in cluster["setup_commands"][-1]
