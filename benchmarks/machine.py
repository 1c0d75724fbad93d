"""What a measurement ran on, as every result in benchmarks/results says it (no host names, no paths); its memory."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def machine() -> dict[str, Any]:
    """Processor, cores, GPU, versions, threads and commit; `dirty` where the checkout differs from the commit."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _processor() -> str:
    """The CPU's name as Linux knows it; elsewhere its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def reset_peak(device: torch.device) -> None:
    """Let the peak memory start anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


def status_bytes(field: str) -> int | None:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM), as Linux tells it; None elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(field)]
    return found[0] if found else None
