"""The commands of the third use: a corpus to vectors, vectors to an index, and the service over both."""

from collections.abc import Sequence

from pipelines.cli.console import DONE, USAGE, Parser, say
from pipelines.cli.flags import UsageError, flag_help, parse_flags

SERVE_HELP = """triptych serve MODEL [--index URI] [--host H] [--port N] [flags]

Serves embeddings and search over HTTP, and a page at /, until SIGTERM or Ctrl-C. MODEL is a run folder, a checkpoint,
an encoder package or models:/NAME@ALIAS, which is followed: when the alias moves, the new version is started, checked
and switched to without a failed request. API keys come from TRIPTYCH_API_KEYS or --door.api-keys FILE."""


def embed(words: Sequence[str]) -> int:
    """Encode a corpus with both encoders of a MODEL: vectors, captions and thumbnails as Parquet and npy."""
    parser = Parser("triptych embed", description=embed.__doc__)
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, package or models:/NAME@ALIAS")
    parser.add_argument("--data", required=True, metavar="URI", help="folder, file or URL of pairs")
    parser.add_argument("--out", required=True, metavar="URI", help="folder for the vectors")
    parser.add_argument("--no-thumbnails", action="store_true", help="leave the small images out")
    parser.add_argument("--workers", type=int, default=1, help="encoding processes (default: 1)")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each of them")
    options = parser.parse_args(words)

    from pipelines.embed.job import embed as embed_corpus

    result = embed_corpus(
        options.model,
        options.data,
        options.out,
        thumbnails=not options.no_thumbnails,
        workers=options.workers,
        gpus=options.gpus,
    )
    say(result.text())
    return DONE


def index(words: Sequence[str]) -> int:
    """Make the vectors of `triptych embed` searchable, and measure what the index finds against exact search."""
    parser = Parser("triptych index", description=index.__doc__)
    parser.add_argument("vectors", metavar="VECTORS", help="folder of `triptych embed`")
    parser.add_argument("--out", required=True, metavar="URI", help="folder for the index")
    parser.add_argument("--kind", choices=["auto", "flat", "hnsw", "ivfpq"], default="auto", help="default: by size")
    parser.add_argument("--register", metavar="models:/NAME/VERSION", help="the version that is served with it")
    options = parser.parse_args(words)

    from pipelines import storage
    from serving.index.build import build_index

    version = _version(options.register) if options.register else None
    out = storage.make_absolute(options.out)
    report = build_index(storage.make_absolute(options.vectors), out, options.kind, files=storage)
    say(report.text())
    if version is not None:
        _register(options.register, report.embedding_space, out)
        say(f"registered: {version} is served with {out}")
    return DONE


def _version(model: str) -> object:
    from pipelines.tracking.registry import Registry

    return Registry().resolve(model)


def _register(model: str, space: str, out: str) -> None:
    """Write the index's place to a version; raises InputError where the version's vectors are of another space."""
    from models.config import InputError
    from pipelines.tracking.registry import SPACE, Registry

    registry = Registry()
    version = registry.resolve(model)
    if version.tags.get(SPACE) != space:
        raise InputError(
            f"--register {model}: its embedding space is {version.tags.get(SPACE)}, the index's {space}; "
            "embed the corpus with this version"
        )
    registry.tag(version, "triptych.index_uri", out)


def serve(words: Sequence[str]) -> int:
    """Embeddings and search over HTTP."""
    from serving.config import ServingConfig

    if not words or "-h" in words or "--help" in words:
        say(f"{SERVE_HELP}\n\n{flag_help(ServingConfig(model='MODEL'))}")
        return DONE if words else USAGE
    if words[0].startswith("-"):
        raise UsageError(f"serve takes a MODEL before its flags, got {words[0]}")
    config = parse_flags(words[1:], ServingConfig(model=words[0]))

    from serving.service.run import run_until_stopped

    run_until_stopped(config)
    return DONE
