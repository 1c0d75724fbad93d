"""Dotted flags of a configuration: `--optim.learning-rate 1e-3`, checked by pydantic, explained by `--help`.

Every mistake must end in one line that names flag and value, which parsers that draw a box around errors do not give.
"""

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from models.config import Config, InputError

C = TypeVar("C", bound=Config)

HIDDEN = ("preset", "encoder.vision.architecture", "encoder.text.architecture")
"""Filled in by the program, never by hand."""


class UsageError(InputError):
    """The command line itself is wrong (exit code 2)."""


def parse_flags(arguments: Sequence[str], default: C) -> C:
    """`default` changed by flags; raises UsageError for an unknown flag or a bad value."""
    given = dict(_pairs(arguments))
    known = {key: (field, value) for key, field, value in leaves(default)}
    changes: dict[str, Any] = {}
    for flag, values in given.items():
        key = flag.replace("-", "_")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean --{_spelled(close[0])}?" if close else "; see --help"
            raise UsageError(f"unknown flag --{flag}{hint}")
        changes[key] = _value(flag, values, isinstance(known[key][1], bool), isinstance(known[key][1], tuple))
    try:
        return default.override(changes)
    except ValidationError as error:
        first, *others = error.errors()
        place = [str(part) for part in first["loc"]]
        while place and ".".join(place) not in known:  # a union's error also names the alternative that failed
            place.pop()
        flag = _spelled(".".join(place or [str(part) for part in first["loc"]]))
        same = [e["msg"].lower() for e in others if [str(part) for part in e["loc"]][: len(place)] == place]
        raise UsageError(f"--{flag} {first['input']}: {' or '.join([first['msg'].lower(), *same])}") from None


def leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """(dotted key, field, value) of every field that a flag can set."""
    for name, field in type(config).model_fields.items():
        key, value = f"{prefix}{name}", getattr(config, name)
        if isinstance(value, Config):
            yield from leaves(value, f"{key}.")
        elif key not in HIDDEN:
            yield key, field, value


def flag_help(config: Config) -> str:
    """One entry a flag: its name, default and meaning, grouped by section."""
    lines, section = [], ""
    for key, field, value in leaves(config):
        head = key.rpartition(".")[0]
        if head != section:
            section = head
            lines.append(f"\n{_spelled(section)}:")
        lines.append(f"  --{_spelled(key)} {_kind(field)}  (default: {'none' if value == '' else value})")
        lines += textwrap.wrap(field.description or "", 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words that follow it."""
    flag, values = "", list[str]()
    for word in arguments:
        if word.startswith("--"):
            if flag:
                yield flag, values
            flag, _, value = word[2:].partition("=")
            values = [value] if "=" in word else []
        elif not flag:
            raise UsageError(f"unexpected {word!r}; flags begin with --")
        else:
            values.append(word)
    if flag:
        yield flag, values


def _value(flag: str, words: list[str], is_bool: bool, is_tuple: bool) -> Any:
    if is_bool and not words:
        return True
    if is_tuple:
        return words
    if len(words) != 1:
        raise UsageError(f"--{flag} takes one value, got {len(words)}")
    return words[0]


def _kind(field: FieldInfo) -> str:
    options = getattr(field.annotation, "__args__", None)
    if options and all(isinstance(option, str) for option in options):
        return "|".join(options)
    if get_origin(field.annotation) is Union:
        return "|".join(_kind(FieldInfo(annotation=option)) for option in options or ())
    if get_origin(field.annotation) is Annotated:
        return _kind(FieldInfo(annotation=get_args(field.annotation)[0]))
    return getattr(field.annotation, "__name__", str(field.annotation)).upper()


def _spelled(key: str) -> str:
    return key.replace("_", "-")
