"""machine.py: the facts about this machine that every result file starts with.

    machine("cpu")    # versions, date, device, commit, kernels, threads

The one idea: a number without its machine and its commit cannot be compared, so each file has both.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

import kernels
from benchmarks.timing import on_gpu


def machine(device: str) -> dict:
    """What results depend on: versions, the date, the device."""
    return {
        "date": str(date.today()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"triton": triton_version(), "cuda": torch.version.cuda} if on_gpu(device) else {}),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": device_name(device),
        "commit": commit(),
        "kernels": kernels_in_use(device),
        "threads": torch.get_num_threads(),
    }


def kernels_in_use(device: str) -> str:
    """Which bodies the operations run in: triton, a CPU path, or the reference, and which run in another."""
    loaded = kernels.load_cuda() if on_gpu(device) else kernels.load()
    bodies = ("triton" if on_gpu(device) else kernels.PATH) if loaded else "reference"
    slow = " and ".join(sorted(kernels.ON_REFERENCE))
    return f"{bodies}, but the reference for {slow}" if slow else bodies


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str = "cpu") -> str:
    """The vendor's name for it."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"cpu {found[1] if found else platform.processor() or platform.machine()}"


def commit() -> str | None:
    """The commit of this checkout, with a + if files differ from it; None outside git."""

    def git(*command: str) -> subprocess.CompletedProcess:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True)

    try:
        head, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    except OSError:  # no git
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "") if head.returncode == 0 else None
