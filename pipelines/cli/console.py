"""What every command shares: one-line errors, results on standard output, everything else on standard error."""

import argparse
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from models.config import Failed, InputError
from models.redact import redact
from pipelines.cli.flags import UsageError
from pipelines.tracking.server import reason

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


def exit_code(name: str, command: Callable[[], int]) -> int:
    """What `command` returns; whatever it raises becomes one line on standard error, never a traceback, and a code.

    2 for wrong usage, 130 for Ctrl-C, else 1. InputError and Failed say themselves what is to be said, and so they do
    where a task on Ray raised them. Of every other error, Ray's own or one that nobody foresaw, the line has class and
    first words, and the file to which the traceback was written.
    """
    try:
        return command()
    except UsageError as error:
        return _complain(name, str(error), USAGE)
    except KeyboardInterrupt:
        return _complain(name, "stopped", 130)
    except Exception as error:
        return _complain(name, _foreseen(error) or _unforeseen(error), FAILED)


def _complain(name: str, text: str, code: int) -> int:
    sys.stderr.write(f"{name}: {redact(text.splitlines()[0])}\n")
    return code


def _foreseen(error: Exception) -> str:
    """The line of an InputError or Failed, also of one that Ray brings from a task as text, under tracebacks; or ""."""
    found = re.findall(r"^(?:[\w.]+\.)?(?:InputError|Unavailable): (.+)$", str(error), re.MULTILINE)
    if found:
        return str(found[-1])
    return str(error) if isinstance(error, InputError | Failed) else ""


def _unforeseen(error: Exception) -> str:
    """One line for an error of any other class, whose traceback it writes to a new file."""
    lines = str(error).strip().splitlines()
    words = lines[-1] if lines and "ray::" in lines[0] else reason(error)  # a task's own error is at the end
    what = f"{type(error).__name__}: {words.rstrip('.')}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="triptych-", suffix=".log", delete=False) as file:
            file.write(redact("".join(traceback.format_exception(error))))
        where = f"traceback: {file.name}"
    except OSError as refusal:
        where = f"no file for its traceback ({reason(refusal)})"
    if isinstance(error, getattr(sys.modules.get("ray.exceptions"), "RayError", ())):  # loaded where one was raised
        return f"Ray failed ({what}); run the command again, train and tune with --resume; {where}"
    return f"unexpected {what}; {where}"


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
