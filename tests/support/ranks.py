"""Runs functions on several gloo ranks, in processes of their own."""

import datetime
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def on_ranks(jobs: list[tuple[int, Callable[..., Any], tuple[Any, ...]]], timeout: float = 280.0) -> list[list[Any]]:
    """Run each (world size, function, arguments) in turn, all in one set of processes; results by job, then by rank.

    Functions must be importable by name and take the place of their rank from torch.distributed. Raises AssertionError
    with the traceback of the first rank that failed, or when `timeout` seconds are over.
    """
    world = max(size for size, _, _ in jobs)
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        processes = [context.Process(target=_rank, args=(rank, jobs, folder), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            [torch.load(Path(folder) / f"{job}-{rank}.pt", weights_only=False) for rank in range(size)]
            for job, (size, _, _) in enumerate(jobs)
        ]


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in processes):
        errors = sorted(folder.glob("*.error"))
        assert not errors, f"rank {errors[0].stem} failed:\n{errors[0].read_text()}"
        assert not any(process.exitcode for process in processes), "a rank died"
        assert time.monotonic() < deadline, "the ranks did not finish in time: does one wait for a call of the others?"
        time.sleep(0.05)
    errors = sorted(folder.glob("*.error"))
    assert not errors, f"rank {errors[0].stem} failed:\n{errors[0].read_text()}"


def _rank(rank: int, jobs: list[tuple[int, Callable[..., Any], tuple[Any, ...]]], folder: str) -> None:
    torch.set_num_threads(1)
    try:
        for number, (size, function, arguments) in enumerate(jobs):
            if rank >= size:
                continue
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store-{number}",
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=200),
            )
            torch.save(function(*arguments), Path(folder) / f"{number}-{rank}.pt")
            dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise
