"""What an optimisation step costs, and which part of it: any preset and size, CPU or CUDA, without Ray or MLflow.

    python -m benchmarks.step PRESET [--batch N] [--set objective.codebook.size=4096 ...] [--device cpu|cuda]
        [--threads N] [--steps N] [--warmup N] [--bf16] [--compile] [--chunk N] [--no-full-queue] [--terms] [--out FILE]
    python -m benchmarks.step both-base --batch 64 --compute-only [--like RESULT]

Random weights, random pairs, one process; writes JSON into benchmarks/results/ and prints it as a table.

- *seconds*: median of whole steps as training makes them, untouched.
- *parts*: further steps, made in turn with the untouched ones, whose functions are timed (benchmarks/stopwatch.py says
  what belongs to a part). Those of the step with the median time are reported, so they add up to that step exactly.
- *operations*: of matrix products and convolutions, counted without running them (workload.step_flops).
- *share of the matmul rate*: operations / seconds / the rate of a large square product measured in the same run.
- *peak memory*: CUDA: what PyTorch had allocated at most during a step, model and optimiser included. CPU: the
  process's largest resident memory during a step, less what was resident before the model was built.
- *terms*: the step of `clip` with one term beside it (cma: in its place) against `clip` alone, taken in turn; median
  of ratios, less 1. What a term needs besides, such as the teacher, it pays by itself, so they do not add up to `all`.

`--compute-only` does not run the step. It sets the codebook's operations, counted, and its seconds, measured alone at
the true size, against the operations of the step and the seconds that they would take: at the full matmul rate, which
no step reaches and which so makes the codebook's share too large; with --like also at the share that RESULT reached.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, reset_peak, status_bytes
from benchmarks.stopwatch import PARTS, now, split
from benchmarks.workload import (
    CodebookAlone,
    Workload,
    assigned,
    clip_with,
    codebook_flops,
    experiment_of,
    has_codes,
    make_workload,
    step_flops,
    terms_of,
)
from models.config import InputError
from pipelines.config import ExperimentConfig

RESULTS = Path(__file__).parent / "results"
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}


def measure(experiment: ExperimentConfig, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Times, parts, operations and memory of a step."""
    batch, resident = options.batch, status_bytes("VmRSS")
    rate = matmul_rate(device, options.bf16)
    flops = step_flops(experiment, batch)
    work = make_workload(experiment, batch, device, options.full_queue)
    for _ in range(options.warmup):
        work.step()
    steps = [time_step(work, device, resident) for _ in range(options.steps)]
    seconds = statistics.median(step["seconds"] for step in steps)
    parts = sorted((step["parts"] for step in steps), key=lambda one: float(sum(one.values())))[(len(steps) - 1) // 2]
    split_seconds = sum(parts.values())
    rate = max(rate, matmul_rate(device, options.bf16))  # whichever a busy machine disturbed less
    return {
        "parameters": sum(p.numel() for p in work.state.model.parameters()),
        "tokens": work.batch.mask.sum(1).double().mean().item(),
        "loss": steps[-1]["loss"],
        "finite": all(step["finite"] for step in steps),
        "seconds": seconds,
        "samples_per_second": batch / seconds,
        "step_seconds": [step["seconds"] for step in steps],
        "parts": parts,
        "parts_share": {name: value / split_seconds for name, value in parts.items()},
        "split_seconds": split_seconds,
        "flops": flops,
        "matmul_flops_per_second": rate,
        "matmul_share": flops / seconds / rate,
        "peak_memory_bytes": max((step["peak"] for step in steps if step["peak"] is not None), default=None),
        "peak_memory_of": "PyTorch's allocations" if device.type == "cuda" else "resident memory above the start's",
    }


def time_step(work: Workload, device: torch.device, resident: int | None) -> dict[str, Any]:
    """An untouched step with its peak memory, then one split by part."""
    reset_peak(device)
    start = now(device)
    result = work.step()
    seconds = now(device) - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")
    if peak is not None and device.type != "cuda":
        peak -= resident or 0
    with split(device) as parts:
        work.step()
    return {
        "seconds": seconds,
        "parts": parts,
        "peak": peak,
        "loss": float(result.loss),
        "finite": bool(result.finite) and bool(result.loss.isfinite()),
    }


def measure_codebook(experiment: ExperimentConfig, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """The codebook's work by itself, with a full queue: seconds (median) and operations."""
    config, queue = experiment.objective.codebook, experiment.objective.queue.size
    alone = CodebookAlone(experiment, options.batch, device)
    seconds = [clocked(alone.run, device) for _ in range(options.warmup + options.steps)][options.warmup :]
    samples = assigned(config, options.batch, queue)
    return {
        "codes": config.size,
        "assigned": samples,
        "queue": queue,
        "seconds": statistics.median(seconds),
        "flops": codebook_flops(experiment, options.batch),
        "sinkhorn_operations": 2 * 6 * config.iters * samples * config.size,  # docs/spec/codebook.md 6, both modalities
        "sinkhorn_bytes": 2 * 2 * config.iters * samples * config.size * 4,
    }


def measure_terms(
    experiment: ExperimentConfig, device: torch.device, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Seconds of `clip` with each term, and how much more than `clip` alone that is, as a share of `clip`."""
    plain = make_workload(clip_with(experiment), options.batch, device)

    def against_clip(variant: ExperimentConfig) -> dict[str, float]:
        work = make_workload(variant, options.batch, device, options.full_queue)
        pairs = [[clocked(one.step, device) for one in (plain, work)] for _ in range(options.warmup + options.steps)]
        clip, other = zip(*pairs[options.warmup :], strict=True)
        ratio = statistics.median(b / a for a, b in zip(clip, other, strict=True))
        return {"clip_seconds": statistics.median(clip), "seconds": statistics.median(other), "cost": ratio - 1}

    costs = {term: against_clip(clip_with(experiment, term)) for term in terms_of(experiment)}
    return costs | {"all": against_clip(experiment)}


def compute(experiment: ExperimentConfig, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """The codebook's share of a step that is not run."""
    if not has_codes(experiment):
        raise InputError("compute-only: the objective has no codebook; take a preset such as both-base")
    flops, rate = step_flops(experiment, options.batch), matmul_rate(device, options.bf16)
    codebook = measure_codebook(experiment, device, options)
    reached = {"full rate": 1.0}
    if options.like:
        reached["rate reached by " + options.like.stem] = json.loads(options.like.read_text())["matmul_share"]
    return {
        "flops": flops,
        "matmul_flops_per_second": rate,
        "codebook": codebook,
        "operations_share": (codebook["flops"] + codebook["sinkhorn_operations"]) / flops,
        "estimates": {
            name: {
                "matmul_share": share,
                "step_seconds": flops / rate / share,
                "codebook_share": codebook["seconds"] / (flops / rate / share),
            }
            for name, share in reached.items()
        },
    }


def matmul_rate(device: torch.device, bf16: bool) -> float:
    """Floating-point operations a second of a large square product, the fastest of five."""
    side = MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else None) for _ in range(2))
    return float(2 * side**3 / min(clocked(lambda: left @ right, device) for _ in range(5)))


def clocked(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that it takes."""
    start = now(device)
    work()
    return now(device) - start


def table(result: dict[str, Any]) -> Iterator[str]:
    """The result's lines."""
    yield " ".join([result["preset"], f"batch {result['batch']}", *result["changes"], *result["mode"]])
    if result["kind"] == "computed":
        yield f"computed: step {result['flops'] / 1e12:.2f} TFLOP, not run"
        yield f"  codebook share of operations: {result['operations_share']:.2%}"
        for name, estimate in result["estimates"].items():
            yield (
                f"  codebook share of seconds at {name}: {estimate['codebook_share']:.2%} "
                f"(codebook alone, measured: {result['codebook']['seconds']:.2f} s of {estimate['step_seconds']:.1f} s)"
            )
        return
    rate = f"{result['matmul_share']:.0%} of {result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s"
    yield f"  {result['seconds']:.3f} s a step, {result['samples_per_second']:.1f} samples/s, loss {result['loss']:.3f}"
    yield f"  {result['flops'] / 1e9:.1f} GFLOP a step, {rate}"
    if result["load_before"] > 0.5:
        yield f"  the machine was busy before the run (load {result['load_before']:.1f}): times may be too long"
    if result["peak_memory_bytes"] is not None:
        yield f"  peak memory {result['peak_memory_bytes'] / 2**20:.0f} MiB ({result['peak_memory_of']})"
    for name in PARTS:
        yield f"  {name:10} {result['parts'][name]:9.3f} s {result['parts_share'][name]:7.1%}"
    if result["codebook"] is not None:
        share = result["codebook"]["seconds"] / result["seconds"]
        yield f"  codebook alone {result['codebook']['seconds']:.3f} s, {share:.1%} of a step"
    for name, cost in (result["terms"] or {}).items():
        label = name if name == "all" else f"clip, {name}"
        yield f"  {label:10} {cost['seconds']:9.3f} s, {cost['cost']:+.0%} of clip's {cost['clip_seconds']:.3f} s"


def result_path(options: argparse.Namespace, device: torch.device) -> Path:
    """A name that tells settings apart."""
    words = ["step", options.preset, f"b{options.batch}"]
    words += ["".join(c if c.isalnum() else "-" for c in change.rpartition(".")[2]) for change in options.set]
    words += [name for name in ("bf16", "compile", "computed") if getattr(options, name)]
    words += [f"chunk{options.chunk}"] if options.chunk else []
    words += [device.type] if device.type != "cpu" else []
    return RESULTS / ("-".join(words) + ".json")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--batch", type=int, default=64, help="pairs of a step")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the preset")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as PyTorch chooses")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, of each kind")
    parser.add_argument("--warmup", type=int, default=1, help="steps before these")
    parser.add_argument("--bf16", action="store_true", help="autocast as in training, CUDA only")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the towers")
    parser.add_argument("--chunk", type=int, default=0, help="pairs that pass a tower at once; 0: all")
    parser.add_argument("--full-queue", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--terms", action="store_true", help="cost of each term relative to clip")
    parser.add_argument("--compute-only", action="store_true", dest="computed", help="the codebook's share, no step")
    parser.add_argument("--like", type=Path, help="with --compute-only: a result whose share of the rate is assumed")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.batch < 1 or options.steps < 1 or options.warmup < 0 or options.chunk < 0 or options.threads < 0:
        parser.error("--batch and --steps are at least 1, --warmup, --chunk and --threads at least 0")
    if options.bf16 and options.device == "cpu":
        parser.error("--bf16: only on CUDA; training never uses it on a CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes the result, prints it."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device, started, load = torch.device(options.device), time.monotonic(), os.getloadavg()[0]
    experiment = experiment_of(options.preset, options.set).override(
        {
            "compute.bf16": options.bf16,
            "compute.compile": options.compile,
            "compute.chunk_size": options.chunk,
        }
    )
    result: dict[str, Any] = {"benchmark": "step", "kind": "computed" if options.computed else "measured"}
    result |= {name: getattr(options, name) for name in ("preset", "batch", "device", "steps", "warmup", "chunk")}
    result |= {"changes": options.set, "precision": "bf16" if options.bf16 else "fp32", "compiled": options.compile}
    result["matmul_precision"] = torch.get_float32_matmul_precision()
    result["mode"] = [options.device, result["precision"], *(["compiled"] if options.compile else [])]
    if options.computed:
        result |= compute(experiment, device, options)
    else:
        result |= measure(experiment, device, options)
        result["codebook"] = measure_codebook(experiment, device, options) if has_codes(experiment) else None
        result["terms"] = measure_terms(experiment, device, options) if options.terms else None
    result |= {"machine": machine(), "load_before": load, "took_seconds": round(time.monotonic() - started, 1)}
    out = options.out or result_path(options, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write("\n".join([*table(result), ""]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"step: {error}")
