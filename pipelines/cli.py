"""The `triptych` command. Each command imports what it needs when it runs, so that `--help` is instant."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from models.config import InputError
from pipelines.flags import UsageError, flag_help, parse_flags

DONE, FAILED, USAGE = 0, 1, 2


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes no shortened options."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raises UsageError with the line."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr()
    if not words or words[0] in ("-h", "--help"):
        _print(USAGE_TEXT)
        return DONE if words else USAGE
    try:
        if words[0] not in COMMANDS:
            raise UsageError(f"unknown command {words[0]!r}; one of {', '.join(COMMANDS)}")
        return COMMANDS[words[0]](words[1:])
    except UsageError as error:
        return _complain(error, USAGE)
    except InputError as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        return _complain("stopped", 130)
    except RuntimeError as error:
        if type(error).__name__ != "TrainingFailed":  # imported by the train command only
            raise
        return _complain(error, FAILED)


def train(words: Sequence[str]) -> int:
    """triptych train PRESET --train-data URI --val-data URI --out URI [--name NAME] [--resume] [flags]"""
    from pipelines.config import PRESETS

    if not words or words[0] in ("-h", "--help"):
        _print(f"{train.__doc__}\n\npresets: {' '.join(PRESETS)}\n\n`triptych train PRESET --help` lists every flag")
        return DONE if words else USAGE
    preset = words[0]
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}; one of {', '.join(PRESETS)}")
    if "-h" in words or "--help" in words:
        _print(f"{train.__doc__}\n{flag_help(PRESETS[preset])}")
        return DONE
    resume = "--resume" in words
    flags = [word for word in words[1:] if word != "--resume"]
    default = PRESETS[preset]
    if any(word.split("=")[0] == "--optim.epochs" for word in flags):
        default = default.override({"optim.min_samples": 0})
    experiment = parse_flags(flags, default)

    from pipelines.train import fit

    result = fit(experiment, resume)
    _print(recall_table(result.metrics))
    _print(f"run folder: {result.run_folder}\nMLflow run: {result.mlflow_run_id}")
    return DONE


def evaluate(words: Sequence[str]) -> int:
    """Retrieval recall of a MODEL (run folder, checkpoint or encoder package) on a held-out split."""
    parser = Parser("triptych evaluate", description=evaluate.__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True, metavar="URI", help="folder, file or URL of pairs")
    parser.add_argument("--json", metavar="FILE", help="also write the metrics there")
    parser.add_argument("--rerank-top", type=int, default=None, help="candidates re-ranked (default: the model's size)")
    options = parser.parse_args(words)

    from pipelines.evaluate import evaluate_model
    from pipelines.storage import write_bytes

    metrics = evaluate_model(options.model, options.data, options.rerank_top)
    if options.json:
        write_bytes(options.json, json.dumps(metrics, indent=1).encode())
    _print(recall_table(metrics))
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
        from pipelines.synthetic import synthesize

        counts = synthesize(options.pop("out"), **options)
        _print("\n".join(f"{split}  {count:,} pairs" for split, count in counts.items()))
        return DONE
    from pipelines.inspect_data import index, lint, stats

    _print({"index": index, "lint": lint, "stats": stats}[command](options["uri"]))
    return DONE


def submit(words: Sequence[str]) -> int:
    """triptych submit COMMAND...: run a triptych command as a job on the cluster of RAY_ADDRESS."""
    if not words or words[0] in ("-h", "--help"):
        _print(submit.__doc__ or "")
        return DONE if words else USAGE
    from pipelines.submit import submit as submit_job

    return submit_job(list(words))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "data": data,
    "train": train,
    "evaluate": evaluate,
    "submit": submit,
}

USAGE_TEXT = """usage: triptych COMMAND ...

  data synth OUT          write a generated corpus          data index|lint|stats URI   look at data
  train PRESET ...        train, track and package a model
  evaluate MODEL ...      retrieval recall on a held-out split
  submit COMMAND...       run any of these as a job on a Ray cluster

`triptych COMMAND --help` says more. Paths are local or URLs (s3://, gs://, file://)."""


def recall_table(metrics: dict[str, float]) -> str:
    """Recall as a table, first stage and re-ranked, and what it was measured on."""
    plain = {name.removeprefix("val/"): value for name, value in metrics.items()}
    lines = [f"{'':30}{'R@1':>8}{'R@5':>8}{'R@10':>8}"]
    for suffix, stage in (("", "first stage"), ("_reranked", "re-ranked")):
        for side, title in (("image_retrieval", "text to image"), ("text_retrieval", "image to text")):
            names = [f"{side}_recall_at_{k}{suffix}" for k in (1, 5, 10)]
            if all(name in plain for name in names):
                cells = "".join(f"{100 * plain[name]:7.1f}%" for name in names)
                lines.append(f"{f'{title}, {stage}':30}{cells}")
    counts = [f"{int(plain[n]):,} {n.replace('_', ' ')}" for n in ("images", "captions") if n in plain]
    if "rerank_queries" in plain:
        counts.append(f"re-ranked: first {int(plain['rerank_top'])} of {int(plain['rerank_queries']):,} queries a side")
    return "\n".join([*lines, ", ".join(counts)])


def _print(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")


def _complain(error: object, code: int) -> int:
    line = (str(error) or repr(error)).splitlines()[0]
    sys.stderr.write(f"triptych: {line}\n")
    return code


def _log_to_stderr() -> None:
    """Our own progress on standard error, everybody else's warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("models", "pipelines", "tuning", "serving"):
        logging.getLogger(name).setLevel(os.environ.get("TRIPTYCH_LOG_LEVEL", "INFO"))


if __name__ == "__main__":
    sys.exit(main())
