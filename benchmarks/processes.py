"""processes.py: a model in one process with two threads, and in two with a thread each (parallel.py).

    python bench.py processes --precisions bf16,w4a16
    python bench.py processes --checkpoint_path DIR --repeats 5

The one idea: every figure is that of `generate.py --json`, started anew, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.common import split
from model import BadInput

ROOT = Path(__file__).resolve().parent.parent
KINDS = {  # processes, and threads of each
    "1 process, 2 threads": (1, 2),
    "1 process, 1 thread": (1, 1),
    "2 processes, 1 thread each": (2, 1),
}
METHODS = ("autoregressive", "lookup")


def report_processes(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per second, medians over --repeats, by precision and method."""
    results = {}
    print(f"tokens/s, {'':15}{''.join(f'{kind:>30}' for kind in KINDS)}")
    for precision in split(args.precisions):
        for method in METHODS:
            speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(args.repeats):
                for kind, numbers in KINDS.items():
                    speeds[kind].append(speed(*numbers, precision, method, args))
            row = {kind: median(found) for kind, found in speeds.items()}
            results[f"{precision} {method}"] = row
            print(
                f"{precision:8}{method:17}{''.join(f'{value:30.1f}' for value in row.values())}", flush=True
            )
    return results


def speed(processes: int, threads: int, precision: str, method: str, args: argparse.Namespace) -> float:
    """Tokens per second of one run. BadInput with its last line where it fails."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = [
        "--precision",
        precision,
        "--method",
        method,
        "--max_new_tokens",
        str(args.max_new_tokens),
        "--json",
    ]
    flags += ["--checkpoint_path", args.checkpoint_path] if args.checkpoint_path else []
    command = [sys.executable, *(start if processes > 1 else []), "generate.py", *flags, "--ignore_eos"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(
            f"generate.py failed: {next(iter(done.stderr.strip().splitlines()[::-1]), 'no reason')}"
        )
    return json.loads(done.stdout.splitlines()[-1])["stats"]["decode_tokens_per_second"]
