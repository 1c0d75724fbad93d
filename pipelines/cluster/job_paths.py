"""What a job can reach: paths and addresses that only the submitting machine knows are refused before it starts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from models.config import InputError
from models.redact import redact
from pipelines.tracking.server import resolve_uri

PATH_OPTIONS = frozenset({"--train-data", "--val-data", "--data", "--out", "--init", "--index", "--json"})
NAME_OPTIONS = frozenset(
    {"--encoder.vision.backbone", "--encoder.text.backbone", "--encoder.text.tokenizer", "--space"}
)
"""Options that take a name (of the hub, of a ready space) as well as a path."""
PASSED = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION")
"""All that a job gets of the environment: Ray's dashboard shows it to everyone, so no secret is among it."""
TRACKED = frozenset({"train", "tune", "promote", "rollback"})
_SECRET = re.compile(r"(?i)[?&#][^=&#]*(sig|token|secret|passw|pwd|key|credential)[^=&#]*=")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(url: str) -> bool:
    """Whether the URL names the machine it is used on."""
    return urlsplit(url).hostname in LOOPBACK


def holds_secret(url: str) -> bool:
    """Whether a URL signs somebody in: by user or password, or by a query such as a presigned URL has."""
    url = url.replace("gs://anonymous@", "gs://")  # how public buckets are read
    return "://" in url and (redact(url).count("***") > url.count("***") or bool(_SECRET.search(url)))


def local_path(value: str) -> str | None:
    """The path that `value` names on some machine's disk; None for a URL or a registered model (`models:/...`)."""
    if value.lower().startswith("file:"):
        return unquote(value[len("file:") :].removeprefix("//"))
    return None if re.match(r"[A-Za-z][\w+.-]+:", value) else value


def path_arguments(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(what it is called, value) of every argument that names a file or folder; `--out X` and `--out=X` alike."""
    words = list(takewhile(lambda word: not word.startswith("-"), command))
    for word in words[2 if words[0] in {"data", "train", "tune"} else 1 :]:  # behind a subcommand or a preset
        yield words[0], word
    for word, following in zip(command, [*command[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        name, value = flag.replace("_", "-"), value if equals else following
        is_folder = value.startswith(("/", ".", "~", "file:")) or Path(value).exists()
        if value and (name in PATH_OPTIONS or (name in NAME_OPTIONS and is_folder)):
            yield name, value


def check_paths(command: Sequence[str], same_machine: bool) -> None:
    """Refuses the paths that a job would not see; `same_machine`: whether the cluster runs on this machine alone.

    Raises InputError for them, and for a URL with a secret: Ray's dashboard shows a job's command to everyone.
    """
    for word in filter(holds_secret, command):
        raise InputError(
            f"{word}: carries a user, password or key, and Ray's dashboard shows a job's command: give the bare "
            "address and set credentials (AWS_* for s3) on the cluster's machines"
        )
    if not command or command[0].startswith("-"):
        return
    for name, value in path_arguments(command):
        _check_path(name, value, local_path(value), same_machine)


def _check_path(name: str, value: str, path: str | None, same_machine: bool) -> None:
    """Raises InputError for the path of one option or variable, unless the job sees it."""
    if path is None or (same_machine and path.startswith("/")):
        return
    if not path.startswith("/"):
        where = "an absolute path or a URL" if same_machine else "a URL such as s3://bucket/folder"
        raise InputError(
            f"{name} {value}: a relative path, but a job runs in a throw-away copy of the code: give {where}"
        )
    raise InputError(
        f"{name} {value}: a path of this machine, which the cluster's machines do not see: "
        "give a URL such as s3://bucket/folder"
    )


def job_environment(command: Sequence[str], environment: Mapping[str, str], same_machine: bool) -> dict[str, str]:
    """The variables of `environment` that a job gets. Raises InputError for a secret and for what it would not see."""
    passed = {name: environment[name] for name in PASSED if environment.get(name)}
    for name, value in passed.items():
        _check_address(name, value, same_machine)
    if "MLFLOW_TRACKING_URI" in passed or not _is_tracked(command):
        return passed
    if not same_machine:
        raise InputError(
            "MLFLOW_TRACKING_URI is not set, and the cluster would keep the run in a file that is thrown away: "
            "set it to a tracking server the cluster reaches, such as http://mlflow.internal:5000"
        )
    return passed | {"MLFLOW_TRACKING_URI": resolve_uri("sqlite:///mlflow.db")}  # this folder's, as without a cluster


def _is_tracked(command: Sequence[str]) -> bool:
    """Whether the command writes to or reads from MLflow."""
    if {"-h", "--help"} & set(command):
        return False
    return command[0] in TRACKED or any("models:/" in word for word in command)


def _check_address(name: str, value: str, same_machine: bool) -> None:
    """Raises InputError where a variable's value is a secret, or means another machine in the job than it does here."""
    parts = urlsplit(value)
    if holds_secret(value):
        raise InputError(
            f"{name} carries a user, password or key, and Ray's dashboard shows a job's environment: give the bare "
            "address and set credentials (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD) on the cluster's head"
        )
    if parts.scheme in {"http", "https"} and is_loopback(value) and not same_machine:
        raise InputError(f"{name} {value}: this machine's own address; give one that the cluster's machines reach")
    if name == "MLFLOW_TRACKING_URI" and not value.startswith("databricks"):
        path = re.sub(r"^sqlite:(///)?", "", value) if value.startswith("sqlite:") else local_path(value)
        if path is not None and not same_machine:
            raise InputError(
                f"{name} {value}: a file that the cluster's machines do not see; give a tracking server's URL"
            )
        _check_path(name, value, path, same_machine)
