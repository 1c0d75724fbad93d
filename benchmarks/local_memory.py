"""Memory of the local-to-global term (lmi) against batch size: bounded blocks of rows, and the whole table at once.

    python -m benchmarks.local_memory [--out FILE]

Forward and backward of `contrast.local_global` at the sizes of the base presets: vectors of 256, images of 16 parts and
texts of 24, one direction after the other and then one backward pass, as in a step. Peak: the most bytes that PyTorch's
CPU allocator had handed out at once beyond the inputs, temporaries inside kernels and gradients included; its own
record of every allocation, so exact; on one thread. Half a minute; writes benchmarks/results/local_memory.json.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import machine
from models.config import ObjectiveConfig
from models.contrast import local_global

RESULT = Path(__file__).parent / "results" / "local_memory.json"
WIDTH = 256
PARTS = {"image": 16, "text": 24}
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
DEFAULT = ObjectiveConfig().block_mib
LIMITS = {"1 MiB": 1.0, f"{DEFAULT:g} (default)": DEFAULT, "unlimited": math.inf}
"""`block_mib` of each column."""
UNLIMITED = 2**62


def peak_bytes(work: Callable[[], None]) -> int:
    """Most bytes that PyTorch's CPU allocator had handed out at once since the work began."""
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def quiet() -> Iterator[None]:
    """The profiler's library announces itself on standard error, past Python, and nothing switches that off."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def local_terms(batch: int, limit: int) -> Callable[[], None]:
    """Both directions of lmi, forward and back, on random inputs that exist already."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, WIDTH, generator=generator), dim=-1)

    negative = ~torch.eye(batch, dtype=torch.bool)
    temperature = torch.tensor(0.07, requires_grad=True)
    inputs = []
    for parts in PARTS.values():
        valid = torch.ones(batch, parts, dtype=torch.bool)
        inputs.append((unit(batch).requires_grad_(), unit(batch, parts), valid))

    def run() -> None:
        sums = [local_global(*one, negative, 0, temperature, limit)[0] for one in inputs]
        torch.autograd.backward(torch.stack(sums).sum() / batch)

    return run


def measure(batches: Sequence[int] = BATCHES) -> list[dict[str, Any]]:
    """Peak of each batch size and limit."""
    peak_bytes(local_terms(2, UNLIMITED))  # the profiler's own first time
    return [
        {
            "batch": batch,
            "table_bytes": batch * batch * sum(PARTS.values()) * 4,
            "peak_bytes": {
                name: peak_bytes(local_terms(batch, UNLIMITED if math.isinf(mib) else int(mib * 2**20)))
                for name, mib in LIMITS.items()
            },
        }
        for batch in batches
    ]


def growth(rows: list[dict[str, Any]], name: str) -> float:
    """Exponent of the peak over the last doubling of the batch: 1 linear, 2 quadratic."""
    before, last = rows[-2:]
    ratio = last["peak_bytes"][name] / before["peak_bytes"][name]
    return math.log(ratio) / math.log(last["batch"] / before["batch"])


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Peaks in MiB."""
    yield "batch  scores" + "".join(f"{name:>14}" for name in LIMITS) + "   (MiB; block_mib)"
    for row in rows:
        yield f"{row['batch']:5} {row['table_bytes'] / 2**20:7.1f}" + "".join(
            f"{row['peak_bytes'][name] / 2**20:14.2f}" for name in LIMITS
        )
    yield "growth       " + "".join(f"{growth(rows, name):14.2f}" for name in LIMITS) + "   (exponent, last doubling)"


def main() -> int:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure()
    limits = {name: None if math.isinf(mib) else mib for name, mib in LIMITS.items()}
    result = {"benchmark": "local_memory", "width": WIDTH, "parts": PARTS, "block_mib": limits, "rows": rows}
    result |= {"growth": {name: growth(rows, name) for name in LIMITS}, "machine": machine()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write("\n".join([*table(rows), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
