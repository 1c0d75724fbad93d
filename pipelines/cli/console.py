"""What every command shares: one-line errors, results on standard output, everything else on standard error."""

import argparse
import logging
import os
import sys
from typing import Any, NoReturn, TextIO

from models.redact import redact
from pipelines.cli.flags import UsageError

DONE, FAILED, USAGE = 0, 1, 2
RESULTS: list[TextIO] = []
"""Standard output as it was when the command began."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes no shortened options."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raises UsageError with the line."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def say(text: str) -> None:
    """Write a result to standard output."""
    RESULTS[-1].write(redact(text).rstrip("\n") + "\n")
    RESULTS[-1].flush()


def complain(error: object, code: int) -> int:
    """Write an error's first line to standard error; returns `code`."""
    line = redact((str(error) or repr(error)).splitlines()[0])
    sys.stderr.write(f"triptych: {line}\n")
    return code


class _Redacting(logging.Formatter):
    """Whoever logs it: no secret of a URL, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_to_stderr() -> None:
    """Our own progress on standard error, everybody else's warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("models", "pipelines", "tuning", "serving"):
        logging.getLogger(name).setLevel(os.environ.get("TRIPTYCH_LOG_LEVEL", "INFO"))
