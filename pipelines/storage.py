"""Bytes by URI: a local path, file://, s3:// or gs://. Credentials and endpoints come from the environment alone.

Every failure of a file system or an object store leaves here as an InputError of one line: `Unavailable` where trying
again may help, InputError itself where it will not. Bytes go through `pyarrow.fs`, which releases the GIL; listings of
s3 go through s3fs, because `pyarrow.fs` has no etags.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from models.config import InputError
from models.redact import redact

_ENVIRONMENT = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION", "AWS_REGION")
_KINDS = (  # what an error's text holds, what it means, what to do; the first that fits counts
    (
        r"ACCESS_DENIED|AccessDenied|HTTP status 40[13]|SIGNATURE|Signature|INVALID_ACCESS_KEY|InvalidAccessKey|"
        r"Forbidden|\(40[13]\)|Unable to locate credentials|[Pp]ermission denied|Operation not permitted",
        "no permission",
        "check the credentials (AWS_* for s3) or the file's rights",
    ),
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|bucket .*not.*(?:exist|found)",
        "no such bucket",
        "check the name, and AWS_ENDPOINT_URL",
    ),
    (
        r"NO_SUCH_KEY|NoSuchKey|RESOURCE_NOT_FOUND|No such file|does not exist|HTTP status 404|\(404\)",
        "no such path",
        "check the path",
    ),
    (r"[Ii]s a directory|Cannot open directory|Not a regular file", "is a folder, not a file", "name a file"),
    (
        r"Not a directory|File exists|Cannot create directory",
        "a file stands where a folder should be",
        "name another path",
    ),
    (r"No space left", "no space left", "free some space or name another place"),
)


class Unavailable(InputError):
    """The store did not answer, or failed while answering: the same call may work later."""


class FileInfo(NamedTuple):
    """A file in a listing."""

    uri: str
    size: int
    """Bytes."""
    etag: str
    """What changes when the content does: the store's etag, or "<mtime_ns>-<size>"."""


def is_outage(error: Exception) -> bool:
    """Whether the error is the store's or the network's, and not the file's."""
    return bool(re.search(r"AWS Error|NETWORK_CONNECTION|curl|[Tt]imed? ?out|[Cc]onnection|google::cloud", str(error)))


def explain(uri: str, error: Exception) -> InputError:
    """The InputError for what a file system said about `uri`."""
    text = f"Permission denied: {error}" if isinstance(error, PermissionError) else str(error)
    for pattern, meaning, remedy in _KINDS:
        if re.search(pattern, text):
            return InputError(f"{uri}: {meaning}; {remedy}")
    detail = redact(text.splitlines()[0])[:200] if text else type(error).__name__
    if is_local(uri):
        return InputError(f"{uri}: {detail}")
    return Unavailable(f"{uri}: the store cannot be reached or fails ({detail}); check network and endpoint")


@contextmanager
def errors_about(uri: str) -> Iterator[None]:
    """Turn what file systems raise into InputError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise explain(uri, error) from error


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return "://" not in uri or uri.startswith("file://")


def _local_path(uri: str) -> Path:
    return Path(unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri).expanduser()


def make_absolute(uri: str) -> str:
    """Local paths become absolute, so that they mean the same in every process; URLs stay."""
    return uri if "://" in uri else str(_local_path(uri).absolute())


def join(uri: str, *names: str) -> str:
    """The URI of something below."""
    return "/".join([uri.rstrip("/"), *(name.strip("/") for name in names)])


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI and the path on it. Raises InputError for a scheme that is not known."""
    if is_local(uri):
        return pafs.LocalFileSystem(), str(_local_path(uri).absolute())
    scheme, _, rest = uri.partition("://")
    rest, _, query = rest.partition("?")
    host, _, path = rest.partition("/")
    if scheme not in ("s3", "gs", "gcs") or not host:
        raise InputError(f"{uri}: not a path that can be read; give a local path, file://, s3:// or gs://")
    with errors_about(uri):
        root = f"{scheme}://{host}" + (f"?{query}" if query else "")
        system = _remote(root, tuple(os.environ.get(name, "") for name in _ENVIRONMENT))
    return system, f"{host.rpartition('@')[2]}/{path}".rstrip("/")


@lru_cache(maxsize=64)
def _remote(root: str, _environment: tuple[str, ...]) -> pafs.FileSystem:
    """A client for one bucket, made once for each setting of the environment."""
    return pafs.FileSystem.from_uri(root)[0]


def open_input(uri: str) -> pa.NativeFile:
    """A file for reading at any place."""
    system, path = filesystem(uri)
    with errors_about(uri):
        return system.open_input_file(path)


def read_bytes(uri: str, offset: int = 0, length: int | None = None) -> bytes:
    """The file's bytes from `offset`, at most `length` of them (fewer where the file ends)."""
    with open_input(uri) as file, errors_about(uri):
        size = file.size()
        wanted = max(0, size - offset if length is None else min(length, size - offset))
        return bytes(file.read_at(wanted, offset)) if wanted else b""


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file; its folders are made. A reader sees all of it or nothing."""
    if is_local(uri):
        path = _local_path(uri)
        with errors_about(uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            part.write_bytes(data)
            part.replace(path)
        return
    system, path_there = filesystem(uri)
    with errors_about(uri), system.open_output_stream(path_there) as stream:
        stream.write(data)


def exists(uri: str) -> bool:
    """Whether a file or a folder is there."""
    system, path = filesystem(uri)
    with errors_about(uri):
        return bool(system.get_file_info(path).type != pafs.FileType.NotFound)


def listing(uri: str) -> list[FileInfo]:
    """The files below a folder, or the one file, in the order of their names below `uri`.

    Folders' own zero-byte keys and names that begin with "." or "_" are left out. InputError where nothing is there.
    """
    root = uri if uri.strip("/") == "" else uri.rstrip("/")
    found = _list_s3(root) if uri.startswith("s3://") else _list_files(root)
    if not found and not uri.startswith("s3://") and not exists(uri):
        raise InputError(f"{uri}: no such path; check the path")
    kept = [(name, info) for name, info in found if not any(part.startswith((".", "_")) for part in name.split("/"))]
    return [info for _, info in sorted(kept, key=lambda pair: pair[0])]


def _list_files(root: str) -> list[tuple[str, FileInfo]]:
    """(name below root, file) of a local or Google folder; the one file has the name of its last part."""
    system, path = filesystem(root)
    with errors_about(root):
        info = system.get_file_info(path)
        if info.type == pafs.FileType.Directory:
            files = system.get_file_info(pafs.FileSelector(path, recursive=True))
            named = [(f.path[len(path.rstrip("/")) + 1 :], f) for f in files if f.type == pafs.FileType.File]
        else:
            named = [("", info)] if info.type == pafs.FileType.File else []
    return [(name, FileInfo(join(root, name) if name else root, f.size, f"{f.mtime_ns}-{f.size}")) for name, f in named]


def _list_s3(root: str) -> list[tuple[str, FileInfo]]:
    """(name below root, file) of an s3 prefix; InputError where there is no such key or prefix."""
    from botocore.exceptions import BotoCoreError, ClientError  # only whoever lists s3 waits for it

    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    try:
        entries = list(_s3_entries(bucket, prefix))
    except (OSError, BotoCoreError, ClientError) as error:
        raise explain(root, error) from error
    if prefix:  # without neighbours whose names begin alike
        entries = [entry for entry in entries if entry["Key"] == prefix or entry["Key"].startswith(f"{prefix}/")]
        if not entries:
            raise InputError(f"{root}: no such path; check the path")
    return [
        (
            entry["Key"][len(prefix) :].lstrip("/"),
            FileInfo(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["ETag"].strip('"')),
        )
        for entry in entries
        if not entry["Key"].endswith("/")  # a folder's own key
    ]


def _s3_entries(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """The store's own listing, page by page; s3fs' `find` is silent about a bucket that is missing or refused."""
    import s3fs

    limits = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3}}
    system = s3fs.S3FileSystem(config_kwargs=limits, skip_instance_cache=True)  # the environment may have changed
    page: dict[str, Any] = {"NextContinuationToken": None}
    while "NextContinuationToken" in page:
        token = page["NextContinuationToken"]
        more = {"ContinuationToken": token} if token else {}
        page = system.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        yield from page.get("Contents", [])


def read_json(uri: str) -> dict[str, Any]:
    """A JSON object; raises InputError where it is missing, not JSON or no object."""
    content = read_bytes(uri)
    try:
        document = json.loads(content)
    except ValueError as error:
        raise InputError(f"{uri}: damaged, not JSON ({error})") from error
    if not isinstance(document, dict):
        raise InputError(f"{uri}: damaged, no JSON object")
    return document


def upload(local_folder: str, uri: str) -> None:
    """Copy all files below a local folder to below `uri`."""
    _copy(local_folder, uri, about=uri)


def download(uri: str, local_folder: str) -> None:
    """Copy all files below `uri` to below a local folder, which is made."""
    if not exists(uri):
        raise InputError(f"{uri}: no such path; check the path")
    _copy(uri, local_folder, about=uri)


def _copy(source: str, target: str, about: str) -> None:
    (source_system, source_path), (target_system, target_path) = filesystem(source), filesystem(target)
    with errors_about(about):
        if is_local(target):
            Path(target_path).mkdir(parents=True, exist_ok=True)
        pafs.copy_files(source_path, target_path, source_system, target_system)
