"""The `triptych` command. Each command imports what it needs when it runs, so that `--help` is instant."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pydantic import Field

from models.config import Config
from pipelines.cli.console import DONE, RESULTS, USAGE, Parser, exit_code, log_to_stderr, say
from pipelines.cli.flags import UsageError, flag_help, parse_two
from pipelines.cli.serving import embed, index, serve

if TYPE_CHECKING:
    from pipelines.config import ExperimentConfig

OptionsT = TypeVar("OptionsT", bound=Config)


class TrainOptions(Config):
    """What `train` takes besides the experiment."""

    resume: bool = False
    """Go on with the run OUT/NAME."""


class TuneOptions(Config):
    """What `tune` takes besides the experiment; empty values take the defaults."""

    space: str = Field("", examples=["temperature-codebook"])
    """temperature, codebook, weights, temperature-codebook (the default), or a JSON file such as
    {"objective.temperature.start": [0.05, 0.1], "optim.learning_rate": {"loguniform": [1e-4, 1e-2]}}"""
    trials: int | None = Field(None, examples=[16])
    """Trials (default: the whole grid where there is one, else 16)."""
    search: str = Field("", examples=["grid", "random", "optuna"])
    """How the trials' values are chosen (default: grid where the whole grid is tried, else random)."""
    scheduler: str = Field("", examples=["asha", "halving", "median", "none"])
    """What ends weak trials early (default: halving; with optuna asha)."""
    repeats: int = 0
    """Train the finalists so many more times with other seeds."""
    resume: bool = False
    """Go on with the sweep OUT/NAME."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    RESULTS.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what Ray and others print is no result
            log_to_stderr()
            words = list(sys.argv[1:] if arguments is None else arguments)
            return exit_code("triptych", lambda: _run(words))
    finally:
        RESULTS.pop()


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        say(_usage())
        return DONE if words else USAGE
    if words[0] not in COMMANDS:
        raise UsageError(f"unknown command {words[0]!r}; one of {', '.join(COMMANDS)}")
    return COMMANDS[words[0]].run(words[1:])


def train(words: Sequence[str]) -> int:
    """triptych train PRESET --train-data URI --val-data URI --out URI [--name NAME] [--resume] [flags]"""
    if (asked := _asked("train", words, train.__doc__ or "", TrainOptions())) is None:
        return DONE if words else USAGE
    experiment, options = asked

    from pipelines.recall import recall_table
    from pipelines.train.fit import fit

    result = fit(experiment, options.resume)
    say(recall_table(result.metrics))
    say(f"run folder: {result.run_folder}\nMLflow run: {result.mlflow_run_id}")
    return DONE


TUNE_HELP = "triptych tune PRESET --train-data URI --val-data URI --out URI [--name NAME] [--resume] [flags]"


def tune(words: Sequence[str]) -> int:
    """Search settings of a preset: many runs, the weak ones ended early."""
    if (asked := _asked("tune", words, TUNE_HELP, TuneOptions())) is None:
        return DONE if words else USAGE
    base, options = asked

    from tuning.sweep.plan import SweepRequest
    from tuning.sweep.run_sweep import tune as run_sweep

    outcome = run_sweep(SweepRequest(base=base, **options.model_dump()))
    say(outcome.text)
    return DONE


def compare(words: Sequence[str]) -> int:
    """Rank runs, or the trials of sweeps, with errors; where they were not scored alike, say so instead."""
    parser = Parser("triptych compare", description=compare.__doc__)
    parser.add_argument("paths", nargs="+", metavar="SWEEP|RUN", help="folders or URLs")
    parser.add_argument("--out", metavar="URI", help="folder for report.html (of one sweep by default its own)")
    options = parser.parse_args(words)

    from tuning.compare.compare_runs import compare_runs

    outcome = compare_runs(options.paths, options.out)
    say(outcome.text)
    if outcome.report:
        say(f"report: {outcome.report}")
    return DONE


def promote(words: Sequence[str]) -> int:
    """Check a run, or the best trial of a sweep, against the champion of NAME; register it and make it the champion."""
    parser = Parser("triptych promote", description=promote.__doc__)
    parser.add_argument("model", metavar="RUN|SWEEP", help="its folder or URL")
    parser.add_argument("--name", required=True, help="registered model")
    parser.add_argument("--data", metavar="URI", help="held-out pairs (default: the run's validation data)")
    parser.add_argument("--index", metavar="URI", help="index served with it; may contain {space}")
    parser.add_argument("--allow-worse", action="store_true", help="also where the champion scores better")
    options = parser.parse_args(words)

    from serving.service.smoke import served_vectors
    from tuning.promote.promote import promote as promote_model

    gate = options.data, options.index, options.allow_worse, served_vectors
    say(promote_model(options.model, options.name, *gate).text())
    return DONE


def rollback(words: Sequence[str]) -> int:
    """Make the version that the champion of NAME replaced the champion again."""
    parser = Parser("triptych rollback", description=rollback.__doc__)
    parser.add_argument("--name", required=True, help="registered model")
    options = parser.parse_args(words)

    from tuning.promote.promote import rollback as roll_back

    say(roll_back(options.name).text())
    return DONE


def _asked(
    command: str, words: Sequence[str], usage: str, options: OptionsT
) -> "tuple[ExperimentConfig, OptionsT] | None":
    """The preset that the words begin with and the options, changed by flags; None where help was asked for."""
    from pipelines.config import PRESETS

    if not words or words[0] in ("-h", "--help"):
        presets = f"presets: {' '.join(PRESETS)}\n\n`triptych {command} PRESET --help` lists every flag"
        say(f"{usage}\n\n{flag_help(options)}\n\n{presets}")
        return None
    if words[0] not in PRESETS:
        raise UsageError(f"unknown preset {words[0]!r}; one of {', '.join(PRESETS)}")
    if "-h" in words or "--help" in words:
        say(f"{usage}\n\n{flag_help(options, PRESETS[words[0]])}")
        return None
    return parse_two(words[1:], PRESETS[words[0]], options)


def evaluate(words: Sequence[str]) -> int:
    """Recall of a MODEL (run folder, checkpoint, encoder package or models:/NAME@ALIAS) on a held-out split."""
    parser = Parser("triptych evaluate", description=evaluate.__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True, metavar="URI", help="folder, file or URL of pairs")
    parser.add_argument("--json", metavar="FILE", help="also write the metrics there")
    parser.add_argument("--rerank-top", type=int, default=None, help="candidates re-ranked (default: the model's size)")
    options = parser.parse_args(words)

    from pipelines.evaluation.evaluate import evaluate_model
    from pipelines.recall import recall_table
    from pipelines.storage import write_bytes

    metrics = evaluate_model(options.model, options.data, options.rerank_top)
    if options.json:
        write_bytes(options.json, json.dumps(metrics, indent=1).encode())
    say(recall_table(metrics))
    return DONE


def data(words: Sequence[str]) -> int:
    """Generated corpora and a look at data: synth, index, lint, stats."""
    parser = Parser("triptych data", description=data.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    synth = commands.add_parser("synth", help="write a generated corpus to OUT/train, OUT/val, OUT/test")
    synth.add_argument("out", metavar="OUT")
    synth.add_argument(
        "--pairs", type=int, default=10_000, help="training pairs; val and test get a tenth, at least 100"
    )
    synth.add_argument("--noise", type=float, default=0.0, help="share of training pairs with another scene's caption")
    synth.add_argument("--broken", type=float, default=0.0, help="share of training pairs that cannot be used")
    synth.add_argument("--captions-per-image", type=int, default=1)
    synth.add_argument("--image-size", type=int, default=64, help="side of the images, pixels")
    synth.add_argument("--format", choices=["parquet", "webdataset"], default="parquet")
    synth.add_argument("--seed", type=int, default=0)
    for name, text in (
        ("index", "write _manifest.parquet beside the data, which training then uses"),
        ("lint", "read every sample and list those that training would skip"),
        ("stats", "counts, bytes, sizes, caption lengths, duplicates"),
    ):
        commands.add_parser(name, help=text).add_argument("uri", metavar="URI")
    options = vars(parser.parse_args(words))
    command = options.pop("command")
    if command == "synth":
        from pipelines.data.synthetic import synthesize

        counts = synthesize(options.pop("out"), **options)
        say("\n".join(f"{split}  {count:,} pairs" for split, count in counts.items()))
        return DONE
    from pipelines.data.inspect import index, lint, stats

    say({"index": index, "lint": lint, "stats": stats}[command](options["uri"]))
    return DONE


def submit(words: Sequence[str]) -> int:
    """triptych submit COMMAND...: run a triptych command as a job on the cluster of RAY_ADDRESS."""
    if not words or words[0] in ("-h", "--help"):
        say(submit.__doc__ or "")
        return DONE if words else USAGE
    from pipelines.cluster.submit import submit as submit_job

    return submit_job(list(words))


class Command(NamedTuple):
    """A command and what `triptych --help` says of it: {its form: what it does}."""

    run: Callable[[Sequence[str]], int]
    forms: dict[str, str]


COMMANDS = {
    "data": Command(data, {"data synth OUT": "write a generated corpus", "data index|lint|stats URI": "look at data"}),
    "train": Command(train, {"train PRESET ...": "train, track and package a model"}),
    "tune": Command(tune, {"tune PRESET ...": "search settings: many runs, the weak ones ended early"}),
    "compare": Command(compare, {"compare SWEEP|RUN ...": "rank runs with errors; table and report"}),
    "evaluate": Command(evaluate, {"evaluate MODEL ...": "retrieval recall on a held-out split"}),
    "promote": Command(promote, {"promote RUN|SWEEP ...": "gate, registry, alias champion"}),
    "rollback": Command(rollback, {"rollback --name NAME": "the champion before"}),
    "embed": Command(embed, {"embed MODEL ...": "a corpus to vectors"}),
    "index": Command(index, {"index VECTORS ...": "vectors to an index"}),
    "serve": Command(serve, {"serve MODEL ...": "embeddings and search over HTTP, and a page to try them"}),
    "submit": Command(submit, {"submit COMMAND...": "run any of these as a job on a Ray cluster"}),
}


def _usage() -> str:
    forms = [form for command in COMMANDS.values() for form in command.forms.items()]
    lines = "\n".join(f"  {form:<27}{meaning}" for form, meaning in forms)
    return f"""usage: triptych COMMAND ...

{lines}

MODEL is a run folder, a checkpoint, an encoder package or models:/NAME@ALIAS.
`triptych COMMAND --help` says more. Paths are local or URLs (s3://, gs://, file://)."""
