"""Dotted flags of a configuration: `--optim.learning-rate 1e-3`, checked by pydantic, explained by `--help`.

Every mistake ends in one line that names flag and value; why no library does this: docs/decisions/0012-command-line.md.
"""

import csv
import difflib
import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from models.config import Config, InputError

C = TypeVar("C", bound=Config)
D = TypeVar("D", bound=Config)
Words = list[str]

HIDDEN = ("preset", "model", "encoder.vision.architecture", "encoder.text.architecture")
"""Filled in by the program, or from the word that follows the command; never by a flag."""
LISTS = (tuple, list, set, frozenset)


class UsageError(InputError):
    """The command line itself is wrong (exit code 2)."""


def parse_flags(arguments: Sequence[str], default: C) -> C:
    """`default` changed by flags; raises UsageError for an unknown flag, one that is given twice, or a bad value."""
    return parse_two(arguments, default, Config())[0]


def parse_two(arguments: Sequence[str], default: C, options: D) -> tuple[C, D]:
    """A configuration and a command's own options, each changed by its flags; raises UsageError as `parse_flags`."""
    fields = [{key: field for key, field, _ in leaves(tree)} for tree in (default, options)]
    given = _given(arguments, {key: field for own in fields for key, field in own.items()})
    of_default, of_options = ({key: given[key] for key in given if key in own} for own in fields)
    return _changed(default, of_default), _changed(options, of_options)


def leaves(config: Config) -> Iterator[tuple[str, FieldInfo, Any]]:
    """(dotted key, field, value) of every field that a flag can set."""
    return (leaf for leaf in config.leaves() if leaf[0] not in HIDDEN)


def flag_help(*trees: Config) -> str:
    """One entry a flag: its name with a value that it takes, its default and its meaning, grouped by section."""
    lines, section = [], ""
    for key, field, value in (leaf for tree in trees for leaf in leaves(tree)):
        head = key.rpartition(".")[0]
        if head != section:
            section = head
            lines.append(f"\n{_spelled(section)}:")
        off = f"; off: {_flag(key)} false" if bool in _types(field.annotation) else ""
        lines.append(f"  {f'{_flag(key)} {_example(field, value)}'.rstrip()}  (default: {_written(value)}{off})")
        lines += textwrap.wrap(field.description or "", 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _given(arguments: Sequence[str], known: Mapping[str, FieldInfo]) -> dict[str, tuple[Words, Any]]:
    """{key: (its words, what they say)} of the flags among the arguments."""
    given: dict[str, tuple[Words, Any]] = {}
    for flag, words in _flags(arguments):
        key = flag.replace("-", "_")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise UsageError(f"unknown flag --{flag}; {f'did you mean {_flag(close[0])}?' if close else 'see --help'}")
        if key in given:
            raise UsageError(f"{_said(key, given[key][0])} and {_said(key, words)}: give the flag once")
        try:
            given[key] = words, _value(words, _types(known[key].annotation))
        except ValueError as error:
            example = f"{_flag(key)} {_example(known[key], known[key].default)}".rstrip()
            raise UsageError(f"{_said(key, words)}: {error}, such as {example}") from None
    return given


def _flags(arguments: Sequence[str]) -> list[tuple[str, Words]]:
    """Each flag with the words that follow it; a word that begins with -- is a value only where `=` precedes it."""
    flags: list[tuple[str, Words]] = []
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            flags.append((flag, [value] if equals else []))
        elif not flags:
            raise UsageError(f"unexpected {word!r}; flags begin with --")
        else:
            flags[-1][1].append(word)
    return flags


def _value(words: Words, types: Sequence[Any]) -> Any:
    """What the words say, as pydantic takes it for one of the types; raises ValueError for a wrong number of them."""
    if not words and bool in types:
        return True
    if not words:
        raise ValueError("needs a value")
    text = " ".join(words)
    if NoneType in types and text.lower() == "none":
        return None
    if text[:1] == "{" and dict in map(_container, types):
        return json.loads(text)
    lists = [kind for kind in types if _container(kind) in LISTS]
    only = all(kind in lists or kind is NoneType for kind in types)
    if lists and (only or len(text.split()) > 1 or "," in text or text[:1] in ("[", "(")):
        return _members(text, lists)
    if len(words) > 1:
        raise ValueError(f"takes one value, got {len(words)}")
    return words[0]


def _members(text: str, lists: Sequence[Any]) -> list[str]:
    """The members of `0.9,0.98`, `0.9 0.98`, `[0.9, 0.98]` or `(0.9, 0.98)`; quotes hold one with a comma or a blank.

    Raises ValueError where one is empty or a tuple's number of members is another.
    """
    inner = " ".join(text.split())
    if inner[:1] + inner[-1:] in ("[]", "()"):
        inner = inner[1:-1].strip().removesuffix(",")
    elif not inner:
        raise ValueError("needs a value")
    between, quote = "," if "," in inner else " ", "'" if "'" in inner else '"'
    rows = csv.reader([inner] if inner else [], delimiter=between, quotechar=quote, skipinitialspace=True)
    members = [member.strip() for row in rows for member in row]
    if "" in members:
        raise ValueError("a value is missing between commas")
    counts = {len(get_args(kind)) for kind in lists if get_origin(kind) is tuple and ... not in get_args(kind)}
    if counts and len(lists) == 1 and len(members) not in counts:
        raise ValueError(f"takes {counts.pop()} values, got {len(members)}")
    return members


def _changed(tree: C, given: Mapping[str, tuple[Words, Any]]) -> C:
    """The tree with what is given; raises UsageError with flag, words and reason where pydantic refuses."""
    try:
        return tree.override({key: value for key, (_, value) in given.items()})
    except ValidationError as error:
        first, *others = error.errors()
        place = [str(part) for part in first["loc"]]
        while place and ".".join(place) not in given:  # it also names the member, or the alternative of a union
            place.pop()
        section = ".".join(str(part) for part in first["loc"])  # all that a rule over several fields names
        blamed = [".".join(place)] if place else [key for key in given if key.startswith(section)]
        said = " ".join(_said(key, given[key][0]) for key in blamed)
        word = first["input"]
        member = f"{word}: " if isinstance(word, str) and [word] not in [given[key][0] for key in blamed] else ""
        reasons = [e["msg"].removeprefix("Value error, ") for e in (first, *others) if e["input"] == word]
        raise UsageError(f"{said}: {member}{' or '.join(dict.fromkeys(reasons)).lower()}") from None


def _types(annotation: Any) -> list[Any]:
    """The alternatives of a union, else the type itself, without annotations."""
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for option in get_args(annotation) for kind in _types(option)]
    return [annotation]


def _container(kind: Any) -> Any:
    return get_origin(kind) or kind


def _example(field: FieldInfo, default: Any) -> str:
    """A value that the flag takes, another than the default; `a|b` where several words are allowed, "" for a switch."""
    types = _types(field.annotation)
    if field.examples:
        return "|".join(shlex.quote(_written(example)) for example in field.examples)
    return "" if types == [bool] else "|".join(word for kind in types for word in _samples(kind, default))


def _samples(kind: Any, default: Any) -> list[str]:
    """Values of a type; a number is made from the default, so that it lies within the bounds too."""
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if kind is int:
        return [str(2 * default if isinstance(default, int) and default else 1)]
    if kind is float:
        return [f"{default / 2 if isinstance(default, int | float) and default else 0.5:.3g}"]
    if _container(kind) in LISTS:
        members = [_types(member)[0] for member in get_args(kind) if member is not ...]
        return [",".join(_samples(member, None)[0] for member in members)]
    return [{NoneType: "none", bool: "true", dict: shlex.quote('{"name": 1}')}.get(_container(kind), "TEXT")]


def _written(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, LISTS):
        return ",".join(map(_written, value)) or "()"
    if isinstance(value, dict):
        return json.dumps(value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) or '""'


def _said(key: str, words: Words) -> str:
    return " ".join([_flag(key), *(word or '""' for word in words)])


def _flag(key: str) -> str:
    return f"--{_spelled(key)}"


def _spelled(key: str) -> str:
    return key.replace("_", "-")
