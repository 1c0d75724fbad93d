"""Addresses of tracking servers and clusters: which is meant, and whether anything answers there."""

import contextlib
import os
import socket
import sqlite3
import ssl
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from models.redact import redact

SQLITE = "sqlite:///"
_PROBE_SECONDS = 10.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433, "ray": 10001}
"""Of servers that do not speak HTTP, where the address has none."""


def resolve_uri(uri: str | None = None) -> str:
    """`uri`, else MLFLOW_TRACKING_URI, else MLflow's own default file in this folder; SQLite paths become absolute."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    return SQLITE + str(Path(uri.removeprefix(SQLITE)).absolute()) if uri.startswith(SQLITE) else uri


def reason(error: Exception) -> str:
    """The first line of an error, short and without secrets."""
    lines = str(error).strip().splitlines()
    return redact(lines[0])[:200] if lines else type(error).__name__


def probe(uri: str) -> str:
    """Why nothing answers at `uri`, or "": within seconds, where MLflow and Ray themselves would try for minutes."""
    parts = urllib.parse.urlsplit(uri)
    dialect = parts.scheme.partition("+")[0]
    try:
        if uri.startswith(SQLITE):
            with contextlib.closing(sqlite3.connect(uri.removeprefix(SQLITE), timeout=_PROBE_SECONDS)) as store:
                store.execute("BEGIN IMMEDIATE")
        elif dialect in _PORTS:
            address = (parts.hostname or "localhost", parts.port or _PORTS[dialect])
            socket.create_connection(address, _PROBE_SECONDS).close()
        elif dialect in ("http", "https"):
            bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
            urllib.request.urlopen(bare.geturl(), timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return ""  # it answers; what it says is for the client to judge
    except urllib.error.URLError as error:
        return "" if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, ValueError, sqlite3.Error) as error:
        return str(error)
    return ""
