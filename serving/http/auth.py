"""API keys from the environment and a file, and the addresses on which a service without any may listen."""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from models.config import InputError

VARIABLE = "TRIPTYCH_API_KEYS"
"""Environment variable of keys, `label:key` or `key`, separated by commas."""
_SHORTEST = 16


class Keys:
    """The keys of a service, kept as digests; empty: no key is needed."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """`keys` by label. Raises InputError for one that is too short, or that two labels share."""
        seen: dict[bytes, str] = {}
        for label, key in keys.items():
            if len(key) < _SHORTEST:
                raise InputError(f"API key {label!r} has {len(key)} characters; give at least {_SHORTEST}")
            digest = _digest(key.encode())
            if digest in seen:
                raise InputError(f"API keys {seen[digest]!r} and {label!r} are the same key; give each label its own")
            seen[digest] = label
        self._labels = seen

    def __len__(self) -> int:
        return len(self._labels)

    def label_of(self, authorization: bytes) -> str | None:
        """Label of the key in an `Authorization: Bearer KEY` header; None where it is no key of this service.

        Every key is compared, over digests of one length, so that the time of a request does not depend on the key.
        """
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest, found = _digest(given.strip()), None
        for own, label in self._labels.items():
            if hmac.compare_digest(own, digest):
                found = label
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(file: str, environ: Mapping[str, str] = os.environ) -> Keys:
    """Keys of TRIPTYCH_API_KEYS, then those of `file` ("": none), a line each; lines that begin with # are comments.

    Raises InputError: the file is not there or holds no key, a label is given twice, a key is too short.
    """
    lines = environ.get(VARIABLE, "").split(",")
    if file:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the API keys in {file}: {error}") from error
        own = [line for line in text.splitlines() if not line.strip().startswith("#")]
        if not any(line.strip() for line in own):
            raise InputError(f"{file} holds no API key; write lines like label:key, or leave --door.api-keys out")
        lines += own
    return Keys(_labelled(_split(lines)))


def _split(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(label, key); a key without a label is named by its position (`key-3`)."""
    for number, line in enumerate(filter(None, map(str.strip, lines)), start=1):
        label, colon, key = line.partition(":")
        yield (label.strip(), key.strip()) if colon else (f"key-{number}", line)


def _labelled(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    keys: dict[str, str] = {}
    for label, key in pairs:
        if not label:
            raise InputError("an API key has an empty label; write label:key, or the key alone")
        if label in keys:
            raise InputError(f"two API keys are labelled {label!r}; give each its own label")
        keys[label] = key
    return keys


def check_bind(host: str, keys: Keys, allow_open: bool) -> None:
    """Raises InputError where other machines could send requests without a key and --allow-open is not set."""
    if keys or allow_open or is_loopback(host):
        return
    raise InputError(
        f"{host or 'an empty host'} is reachable from other machines and the service has no API key: set {VARIABLE} "
        "or --door.api-keys, or give --allow-open"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
