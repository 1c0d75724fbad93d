"""Flags: every one can be set by what its help shows, several values in any usual form, mistakes end in one line."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple, get_args

import pytest
from pydantic import Field, model_validator

from models.config import Config
from pipelines.cli.console import DONE, FAILED, USAGE
from pipelines.cli.flags import UsageError, flag_help, leaves, parse_flags, parse_two
from pipelines.cli.main import COMMANDS, TrainOptions, TuneOptions, main
from pipelines.config import PRESETS, ExperimentConfig, OptimConfig
from serving.config import ServingConfig

ENTRY = re.compile(r"^  --(?P<flag>\S+)(?: (?P<example>.+?))?  \(default: (?P<default>.*?)(?:; off: (?P<off>.*))?\)$")


class Entry(NamedTuple):
    """A flag as its help prints it."""

    flag: str
    settings: tuple[tuple[str, ...], ...]
    """Words of each example."""
    default: str

    @property
    def key(self) -> str:
        return self.flag.replace("-", "_")


class Several(Config):
    """Fields with several values, of all kinds."""

    pair: tuple[float, float] = (1.0, 2.0)
    """Exactly two."""
    names: tuple[str, ...] = ()
    """Any number."""
    counts: list[int] = Field([1])
    """A list."""
    kinds: frozenset[Literal["a", "b"]] = frozenset()
    """A set."""
    maybe: tuple[float, float] | None = None
    """Optional."""
    either: int | tuple[int, int] = 3
    """One or two."""
    table: dict[str, float] = Field({})
    """By name."""
    limit: int | None = 5
    """One, optional."""
    switch: bool | None = None
    """Optional switch."""


def entries(text: str) -> Iterator[Entry]:
    """The flags in a help text, each `a|b` as two examples and a switch as on and off."""
    for line in text.splitlines():
        if not line.startswith("  --"):
            continue
        found = ENTRY.match(line)
        assert found, f"no example or default: {line}"
        words = [shlex.split(option) for option in (found["example"] or "").split("|")]
        if found["off"]:
            off, *value = shlex.split(found["off"])
            assert off == f"--{found['flag']}"
            words.append(value)
        (default,) = shlex.split(found["default"])
        yield Entry(found["flag"], tuple(map(tuple, words)), default)


def meant(annotation: Any, words: Sequence[str]) -> Any:
    """What an example says, by the field's type alone."""
    if annotation is bool:
        return {"": True, "false": False}["".join(words)]
    (text,) = words
    if annotation == tuple[float, float]:
        return tuple(float(part) for part in text.split(","))
    if annotation == tuple[str, ...]:
        return tuple(text.split(","))
    if annotation in (int, float):
        return annotation(text)
    return int(text) if text.isdigit() else text


def at(tree: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), tree)


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def types_of(*trees: Config) -> dict[str, Any]:
    return {key: field.annotation for tree in trees for key, field, _ in leaves(tree)}


@pytest.mark.parametrize("tree", [*PRESETS.values(), ServingConfig(model="M"), TrainOptions(), TuneOptions()])
def test_every_flag_is_set_by_the_example_that_its_help_shows_and_back_by_its_default(tree):
    types, shown = types_of(tree), list(entries(flag_help(tree)))
    assert [entry.key for entry in shown] == list(types)
    for turn in range(max(len(entry.settings) for entry in shown)):
        words = {entry: entry.settings[turn % len(entry.settings)] for entry in shown}
        others = {
            entry.key: meant(types[entry.key], entry.settings[(turn + 1) % len(entry.settings)]) for entry in shown
        }
        apart = [word for entry, example in words.items() for word in (f"--{entry.flag}", *example)]
        joined = [f"--{entry.flag}{'=' if example else ''}{' '.join(example)}" for entry, example in words.items()]
        for arguments, start in ((apart, tree), (apart, tree.override(others)), (joined, tree)):
            changed = parse_flags(arguments, start)
            for entry, example in words.items():
                value, expected = at(changed, entry.key), meant(types[entry.key], example)
                assert (value, type(value)) == (expected, type(expected)), (entry.key, example)
        assert parse_flags([f"--{entry.flag}={entry.default}" for entry in shown], changed) == tree


@pytest.mark.parametrize("tree", [*PRESETS.values(), ServingConfig(model="M"), TrainOptions(), TuneOptions()])
def test_one_example_of_every_flag_differs_from_its_default(tree):
    types = types_of(tree)
    for entry in entries(flag_help(tree)):
        changing = any(meant(types[entry.key], words) != at(tree, entry.key) for words in entry.settings)
        assert changing or len(get_args(types[entry.key])) == 1, entry.key


@pytest.mark.parametrize(
    ("words", "function"),
    [
        (["train", "both-tiny"], "pipelines.train.fit.fit"),
        (["tune", "both-dual-tiny"], "tuning.sweep.run_sweep.tune"),
        (["serve", "M"], "serving.service.run.run_until_stopped"),
    ],
)
def test_commands_take_all_examples_of_their_help_at_once(words, function, monkeypatch, capsys):
    assert main([*words, "--help"]) == DONE
    asked, seen = list(entries(capsys.readouterr().out)), []

    def run(*arguments):
        seen.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(function, run)
    assert main([*words, *(word for entry in asked for word in (f"--{entry.flag}", *entry.settings[0]))]) == 130
    tree, rest = (seen[0].base, vars(seen[0])) if words[0] == "tune" else (seen[0], {"resume": seen[-1]})
    types, own = types_of(tree), types_of(TuneOptions())
    assert set(types) <= {entry.key for entry in asked}
    for entry in asked:
        value = at(tree, entry.key) if entry.key in types else rest[entry.key]
        assert value == meant((types | own)[entry.key], entry.settings[0])


FORMS = [
    ["{0},{1}"],
    ["{0}, {1}"],
    ["[{0}, {1}]"],
    ["({0}, {1})"],
    ["[{0},{1}]"],
    ["({0}, {1},)"],
    ["{0} {1}"],
    ["{0}", "{1}"],
    ["{0},", "{1}"],
    ["[{0},", "{1}]"],
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("pair", (0.9, 0.98)),
        ("pair", (-1.0, -2e-3)),
        ("names", ("images.example.com", "*.example.com")),
        ("names", ("-a", "-")),
        ("counts", [3, -4]),
        ("kinds", frozenset("ab")),
        ("maybe", (0.5, -1.0)),
        ("either", (7, -8)),
    ],
)
def test_several_values_in_every_form(flag, values, form):
    words = [part.format(*values) for part in form]
    expected = Several().override({flag: values})
    assert parse_flags([f"--{flag}", *words], Several()) == expected
    assert parse_flags([f"--{flag}={words[0]}", *words[1:]], Several()) == expected


@pytest.mark.parametrize(
    ("words", "flag", "value"),
    [
        (["a"], "names", ("a",)),
        (["('a',)"], "names", ("a",)),
        (['["a", "b"]'], "names", ("a", "b")),
        (['["a, b", "c d"]'], "names", ("a, b", "c d")),
        (["()"], "names", ()),
        (["[]"], "counts", []),
        (["12"], "either", 12),
        (["-12"], "either", -12),
        (["none"], "maybe", None),
        (["None"], "limit", None),
        (["-7"], "limit", -7),
        (['{"a": 1, "b": 0.5}'], "table", {"a": 1.0, "b": 0.5}),
        (['{"a":', "1}"], "table", {"a": 1.0}),
        ([], "switch", True),
        (["false"], "switch", False),
        (["none"], "switch", None),
    ],
)
def test_values_of_unions_optional_fields_and_tables(words, flag, value):
    start = Several(maybe=(3.0, 4.0), names=("z",), counts=[9], limit=1, switch=None if words != ["none"] else True)
    assert at(parse_flags([f"--{flag}", *words], start), flag) == value


def test_fields_with_several_values_are_set_by_the_examples_of_their_help():
    for entry in entries(flag_help(Several())):
        for words in entry.settings:
            parse_flags([f"--{entry.flag}", *words], Several())
        assert at(parse_flags([f"--{entry.flag}", entry.default], Several()), entry.flag) == at(Several(), entry.flag)


def test_a_value_that_begins_with_dashes_stands_behind_an_equals_sign():
    assert parse_flags(["--init", "-x"], ExperimentConfig()).init == "-x"
    assert parse_flags(["--init=--x=y"], ExperimentConfig()).init == "--x=y"
    with pytest.raises(UsageError, match=r"--init: needs a value, such as --init s3://"):
        parse_flags(["--init", "--seed", "1"], ExperimentConfig())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optim.betas", "0.9,x"], "--optim.betas 0.9,x: x: input should be a valid number"),
        (["--optim.betas", "(0.9, 1"], "--optim.betas (0.9, 1: (0.9: input should be a valid number"),
        (["--optim.betas", "0.9"], "--optim.betas 0.9: takes 2 values, got 1, such as --optim.betas 0.9,0.98"),
        (["--optim.betas", "0.9", "0.98", "1"], "--optim.betas 0.9 0.98 1: takes 2 values, got 3, such as"),
        (["--optim.betas", "()"], "--optim.betas (): takes 2 values, got 0, such as"),
        (["--optim.betas", "0.9,,0.98"], "--optim.betas 0.9,,0.98: a value is missing between commas"),
        (["--optim.betas"], "--optim.betas: needs a value, such as --optim.betas 0.9,0.98"),
        (["--optim.betas="], '--optim.betas "": needs a value, such as'),
        (["--optim.epochs"], "--optim.epochs: needs a value, such as --optim.epochs "),
        (["--optim.epochs="], '--optim.epochs "": input should be a valid number'),
        (["--optim.epochs", "1", "2"], "--optim.epochs 1 2: takes one value, got 2"),
        (["--optim.epochs", "-1"], "--optim.epochs -1: input should be greater than 0"),
        (["--optim.epochs", "1", "--seed", "1", "--optim.epochs=2"], "--optim.epochs 1 and --optim.epochs 2: give"),
        (["--optim.learning-rate", "1", "--optim.learning_rate", "1"], "--optim.learning-rate 1: give the flag once"),
        (["--optim.betas", "0.9,1", "--optim.betas", "0.8,1"], "--optim.betas 0.9,1 and --optim.betas 0.8,1: give"),
        (["--compute.gpus", "--compute.gpus"], "--compute.gpus and --compute.gpus: give the flag once"),
        (["--resume", "--resume"], "--resume and --resume: give the flag once"),
        (["--resume", "perhaps"], "--resume perhaps: input should be a valid boolean"),
        (["--compute.gpus", "perhaps"], "--compute.gpus perhaps: input should be a valid boolean"),
        (["--optim.schedule", "linear"], "--optim.schedule linear: input should be 'cosine' or 'tcl'"),
        (["--objective.codebook.assign-queue", "x"], "--objective.codebook.assign-queue x: input should be 'auto' or"),
        (["--optim.beta", "0.9,0.98"], "unknown flag --optim.beta; did you mean --optim.betas?"),
        (["--resum"], "unknown flag --resum; did you mean --resume?"),
        (["--preset", "x"], "unknown flag --preset"),
        (["--", "--seed", "1"], "unknown flag --; see --help"),
        (["7"], "unexpected '7'; flags begin with --"),
    ],
)
def test_bad_flags_end_in_one_line_with_flag_and_value(words, says, capsys):
    for command in ("train", "tune"):
        assert main([command, "both-dual-tiny", *words]) == USAGE
        assert says in one_line(capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["M", "--door.url-images"],
            "--door.url-images: needs a value, such as --door.url-images 'images.example.com,",
        ),
        (["M", "--door.url-images", ""], '--door.url-images "": needs a value'),
        (["M", "--door.url-images", "a,,b"], "--door.url-images a,,b: a value is missing between commas"),
        (["M", "--port", "1", "--port", "2"], "--port 1 and --port 2: give the flag once"),
        (["M", "--model", "N"], "unknown flag --model"),
        (["--port", "1"], "MODEL"),
    ],
)
def test_bad_flags_of_serve_too(words, says, capsys):
    assert main(["serve", *words]) == USAGE
    assert says in one_line(capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--table", "{a: 1}"], "--table {a: 1}: expecting property name"),
        (["--table", '{"a": "x"}'], '--table {"a": "x"}: x: input should be a valid number'),
        (["--kinds", "a,c"], "--kinds a,c: c: input should be 'a' or 'b'"),
        (["--either", "x"], "--either x: input should be a valid integer"),
        (["--maybe", "1,2,3"], "--maybe 1,2,3: takes 2 values, got 3"),
    ],
)
def test_bad_values_of_every_kind_name_flag_value_and_member(words, says):
    with pytest.raises(UsageError) as caught:
        parse_flags(words, Several())
    assert says.lower() in str(caught.value).lower()


class Bounds(Config):
    """Two fields with a rule over both."""

    low: float = 0.0
    """Smallest."""
    high: float = 1.0
    """Largest."""

    @model_validator(mode="after")
    def _ordered(self) -> "Bounds":
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Bounded(Config):
    """A section with a rule over its fields."""

    bounds: Bounds = Bounds()
    seed: int = 0
    """Another field."""


def test_a_rule_over_several_fields_names_the_flags_of_its_section():
    with pytest.raises(UsageError) as caught:
        parse_flags(["--seed", "1", "--bounds.low", "3", "--bounds.high=2"], Bounded())
    assert str(caught.value) == "--bounds.low 3 --bounds.high 2: low is above high"


def test_the_choices_in_the_help_of_tune_are_those_of_a_sweep():
    from tuning.sweep import schedulers
    from tuning.sweep.plan import SEARCHES

    assert TuneOptions.model_fields["search"].examples == list(SEARCHES)
    assert sorted(TuneOptions.model_fields["scheduler"].examples or ()) == sorted(get_args(schedulers.SchedulerName))


def test_a_length_given_by_hand_is_not_made_longer():
    preset = PRESETS["both-tiny"]
    assert preset.optim.min_samples > 0
    for word in (["--optim.epochs", "2"], ["--optim.epochs=2"]):
        assert parse_flags(word, preset).optim.min_samples == 0
    assert preset.override({"optim.epochs": 2}).optim.min_samples == 0
    assert preset.override({"optim.epochs": 2, "optim.min_samples": 70}).optim.min_samples == 70
    assert parse_flags(["--optim.min-samples", "70", "--optim.epochs", "2"], preset).optim.min_samples == 70
    assert parse_flags(["--seed", "2"], preset).optim == preset.optim
    assert "min_samples" in (OptimConfig.model_fields["epochs"].description or "")


def test_options_of_a_command_and_its_configuration_are_parsed_together():
    words = ["--trials", "5", "--seed=3", "--resume", "--search", "random"]
    experiment, options = parse_two(words, PRESETS["both-tiny"], TuneOptions())
    assert experiment == PRESETS["both-tiny"].override({"seed": 3})
    assert options == TuneOptions(trials=5, resume=True, search="random")


@pytest.mark.parametrize(
    ("command", "function"), [("train", "pipelines.train.fit.fit"), ("tune", "tuning.sweep.run_sweep.tune")]
)
def test_a_failed_run_is_one_line_and_so_is_a_fault_of_ours(command, function, monkeypatch, capsys):
    from pipelines.train.fit import TrainingFailed

    def fail(error):
        def run(*arguments):
            raise error

        monkeypatch.setattr(function, run)
        return main([command, "both-dual-tiny"])

    assert fail(TrainingFailed("loss is not finite\nat step 3")) == FAILED
    assert one_line(capsys) == "triptych: loss is not finite"
    assert fail(RuntimeError("ours")) == FAILED
    assert one_line(capsys).startswith("triptych: unexpected RuntimeError: ours; traceback: ")


def test_the_list_of_commands_says_what_each_does(capsys):
    assert main(["--help"]) == DONE
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert list(dict.fromkeys(listed)) == list(COMMANDS)


def test_help_of_a_preset_and_of_serve_import_neither_torch_nor_ray():
    code = "import sys; from pipelines.cli.main import main; "
    code += "print(main(sys.argv[1:]), {'torch', 'ray'} & set(sys.modules))"
    for words in (["train", "both-tiny", "--help"], ["serve", "--help"], ["tune", "both-tiny", "--optim.beta", "1"]):
        run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert run.stdout.splitlines()[-1] in ("0 set()", "2 set()")
