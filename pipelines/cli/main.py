"""The `triptych` command. Each command imports what it needs when it runs, so that `--help` is instant."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from models.config import InputError
from pipelines.cli.console import DONE, FAILED, RESULTS, USAGE, Parser, complain, log_to_stderr, say
from pipelines.cli.flags import UsageError, flag_help, parse_flags
from pipelines.cli.serving import embed, index, serve

if TYPE_CHECKING:
    from pipelines.config import ExperimentConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    RESULTS.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what Ray and others print is no result
            return _run(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        RESULTS.pop()


def _run(words: list[str]) -> int:
    log_to_stderr()
    if not words or words[0] in ("-h", "--help"):
        say(USAGE_TEXT)
        return DONE if words else USAGE
    try:
        if words[0] not in COMMANDS:
            raise UsageError(f"unknown command {words[0]!r}; one of {', '.join(COMMANDS)}")
        return COMMANDS[words[0]](words[1:])
    except UsageError as error:
        return complain(error, USAGE)
    except InputError as error:
        return complain(error, FAILED)
    except KeyboardInterrupt:
        return complain("stopped", 130)
    except RuntimeError as error:
        if type(error).__name__ != "TrainingFailed":  # imported by the train command only
            raise
        return complain(error, FAILED)


def train(words: Sequence[str]) -> int:
    """triptych train PRESET --train-data URI --val-data URI --out URI [--name NAME] [--resume] [flags]"""
    if (preset := _preset("train", words, train.__doc__ or "")) is None:
        return DONE if words else USAGE
    resume = "--resume" in words
    experiment = _experiment(preset, [word for word in words[1:] if word != "--resume"])

    from pipelines.evaluation.recall_table import recall_table
    from pipelines.train.fit import fit

    result = fit(experiment, resume)
    say(recall_table(result.metrics))
    say(f"run folder: {result.run_folder}\nMLflow run: {result.mlflow_run_id}")
    return DONE


TUNE_HELP = """triptych tune PRESET --train-data URI --val-data URI --out URI [--name NAME] [--resume] [flags of train]

  --space NAME|FILE    temperature, codebook, weights, temperature-codebook (the default), or a JSON file such as
                       {"objective.temperature.start": [0.05, 0.1], "optim.learning_rate": {"loguniform": [1e-4, 1e-2]}}
  --trials N           trials (default: the whole grid where there is one, else 16)
  --search S           grid, random or optuna
  --scheduler S        asha, halving, median or none (default: halving; with optuna asha)
  --repeats R          train the finalists R more times with other seeds (default 0)
  --resume             go on with the sweep OUT/NAME"""


def tune(words: Sequence[str]) -> int:
    """Search settings of a preset: many runs, the weak ones ended early."""
    if (preset := _preset("tune", words, TUNE_HELP)) is None:
        return DONE if words else USAGE
    parser = Parser("triptych tune PRESET", add_help=False)
    for name in ("--space", "--search", "--scheduler"):
        parser.add_argument(name, default="")
    parser.add_argument("--trials", type=int)
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options, flags = parser.parse_known_args(words[1:])
    base = _experiment(preset, flags)

    from tuning.sweep.plan import Request
    from tuning.sweep.run_sweep import tune as run_sweep

    outcome = run_sweep(Request(base=base, **vars(options)))
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


def _preset(command: str, words: Sequence[str], text: str) -> "ExperimentConfig | None":
    """The preset that the words begin with; None where help was asked for, and printed."""
    from pipelines.config import PRESETS

    if not words or words[0] in ("-h", "--help"):
        say(f"{text}\n\npresets: {' '.join(PRESETS)}\n\n`triptych {command} PRESET --help` lists every flag")
        return None
    if words[0] not in PRESETS:
        raise UsageError(f"unknown preset {words[0]!r}; one of {', '.join(PRESETS)}")
    if "-h" in words or "--help" in words:
        say(f"{text}\n{flag_help(PRESETS[words[0]])}")
        return None
    return PRESETS[words[0]]


def _experiment(preset: "ExperimentConfig", flags: Sequence[str]) -> "ExperimentConfig":
    """The preset changed by flags; a length given by hand is not made longer."""
    if any(word.split("=")[0] == "--optim.epochs" for word in flags):
        preset = preset.override({"optim.min_samples": 0})
    return parse_flags(flags, preset)


def evaluate(words: Sequence[str]) -> int:
    """Recall of a MODEL (run folder, checkpoint, encoder package or models:/NAME@ALIAS) on a held-out split."""
    parser = Parser("triptych evaluate", description=evaluate.__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True, metavar="URI", help="folder, file or URL of pairs")
    parser.add_argument("--json", metavar="FILE", help="also write the metrics there")
    parser.add_argument("--rerank-top", type=int, default=None, help="candidates re-ranked (default: the model's size)")
    options = parser.parse_args(words)

    from pipelines.evaluation.evaluate import evaluate_model
    from pipelines.evaluation.recall_table import recall_table
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
    synth.add_argument("--image-size", type=int, default=64, help="side of the pictures, pixels")
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


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "data": data,
    "train": train,
    "tune": tune,
    "compare": compare,
    "evaluate": evaluate,
    "promote": promote,
    "rollback": rollback,
    "embed": embed,
    "index": index,
    "serve": serve,
    "submit": submit,
}

USAGE_TEXT = """usage: triptych COMMAND ...

  data synth OUT          write a generated corpus          data index|lint|stats URI   look at data
  train PRESET ...        train, track and package a model
  tune PRESET ...         search settings: many runs, the weak ones ended early
  compare SWEEP|RUN ...   rank runs with errors; table and report
  evaluate MODEL ...      retrieval recall on a held-out split
  promote RUN|SWEEP ...   gate, registry, alias champion    rollback --name NAME        the champion before
  embed MODEL ...         a corpus to vectors               index VECTORS ...           vectors to an index
  serve MODEL ...         embeddings and search over HTTP, and a page to try them
  submit COMMAND...       run any of these as a job on a Ray cluster

MODEL is a run folder, a checkpoint, an encoder package or models:/NAME@ALIAS.
`triptych COMMAND --help` says more. Paths are local or URLs (s3://, gs://, file://)."""
