"""gpu_pass.py: what an NVIDIA GPU has to say about gpt-spec, in as many minutes as there are.

    python scripts/gpu_pass.py --minutes 5 --output results                   # checks, exact, linears, step
    python scripts/gpu_pass.py --minutes 9 --output results                   # and table, batches, tiles
    python scripts/gpu_pass.py --parts checks,exact --output results          # only these parts
    python scripts/gpu_pass.py --device cpu --shapes tiny --output results    # to try it out, without a GPU

The parts, the most important first, each with a budget of its own:

    checks    every kernel against its slow twin, at the shapes of real models (gpu_checks.py)
    exact     texts of the shipped models: is each the autoregressive one?
    linears   the 4-bit linear next to PyTorch's and gemlite's, for 1 to 64 rows
    step      T(n) of the first shape as a CUDA graph, and its share of the copy bandwidth
    table     trees and the hierarchy on the last shape, with published acceptance
    batches   QSpec on it, alone and in batches of 8
    tiles     other launch configurations of the 4-bit linear (gpu_tiles.py)
    tests, compiled    only if asked for: pytest -m gpu, and `exact` compiled by Inductor

A kernel that raises an error in `checks`, or does not end, is named with the error, and its operations run on
the reference in the parts that follow. A part that fails keeps none of the others from running; the exit
status is then 1. What no longer fits into --minutes is named as skipped. In the folder of --output are
gpu_pass.json, written anew after each part, with its table, and the file of every part, which most write as
they go.

The one idea: this is only the conductor. Each part is a process with a time limit, and measures by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.common import BASE, write_json  # noqa: E402
from benchmarks.machine import machine  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402
from benchmarks.synthetic import SYNTHETIC  # noqa: E402
from benchmarks.timing import on_gpu, shares_of_copy  # noqa: E402
from packing import PRECISIONS  # noqa: E402

DEFAULT_SHAPES = "llama-3-8b,llama-3-70b"
SIZES = "1,2,4,8,16,32,60"  # n of T(n)
CONTESTANTS = "w4a16,w4a8,torch bf16,torch int4,gemlite int4"
UNTIMED = {"checks", "exact"}  # kinds of parts that run side by side: nothing is timed
ASKED_FOR = {"tests", "compiled"}  # kinds that run only if --parts names them
HANGS = 20.0  # seconds after which a check will not end any more; compiling a kernel takes a part of them
REFERENCE = "GPT_SPEC_REFERENCE"  # the environment variable with operations that run on it: see kernels.py


# --------------------------------------------------------------------------------------------------
# The parts, and how they are run
# --------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A process: its name, its command behind `python`, and the seconds that it may take."""

    name: str
    command: list[str]
    seconds: float
    file: str = ""  # its results in the folder of --output
    least: float = 20.0  # with fewer seconds left it is skipped

    @property
    def kind(self) -> str:
        return self.name.split()[0]


def plan(shapes: list[str], device: str) -> list[Part]:
    """All parts, the most important first. The first four kinds fit into 5 minutes, three more into 9."""
    where, first, last, fast = ["--device", device], shapes[0], shapes[-1], on_gpu(device)
    prompts, tokens = ("8", "64") if fast else ("1", "8")
    texts = ["--prompts", prompts, "--max_new_tokens", tokens]
    checks = ["scripts/gpu_checks.py", *where, "--shapes"]
    exact = ["bench.py", "exact", *texts, *where, "--precisions"]
    all_shapes = ["--shapes", ",".join(shapes)]
    linears = ["bench.py", "kernels", *all_shapes, "--contestants", CONTESTANTS, "--repeats", "3", *where]
    one = ["--precisions", "w4a16", *where]
    step = ["bench.py", "cost", "--shape", first, "--sizes", SIZES, "--repeats", "2", *one]
    table = ["bench.py", "synthetic", "--shape", last, *one, *texts, "--methods"]
    rows = ["--batch_sizes", "1,8" if fast else "1,2"]
    tiles = ["scripts/gpu_tiles.py", *all_shapes]
    return [
        *(Part(f"checks {shape}", [*checks, shape], 80, f"gpu_checks_{shape}.json") for shape in shapes),
        *(
            Part(f"exact {precision}", [*exact, precision, "--uncompiled"], 80, f"gpu_exact_{precision}.json")
            for precision in (("w4a16", "w4a8") if fast else ("w4a16",))
        ),
        Part("linears", linears, 60, "gpu_linears.json"),
        Part(f"step {first}", step, 65, "gpu_step.json"),
        Part(f"table {last}", [*table, "tree,hierarchical"], 115, "gpu_table.json", least=60),
        Part(f"batches {last}", [*table, "qspec", *rows], 70, "gpu_batches.json", least=50),
        *([Part("tiles", tiles, 60, "gpu_tiles.json")] if fast else []),
        Part("tests", ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"], 200),
        Part("compiled", [*exact, "w4a16,w4a8", "--compiled"], 300, "gpu_exact_compiled.json", least=60),
    ]


class Process:
    """A part while it runs, in a group of processes that ends with it."""

    def __init__(self, part: Part, seconds: float, folder: Path, broken: dict[str, str]):
        self.part, self.seconds, self.begin = part, min(seconds, part.seconds), time.monotonic()
        self.file = folder / part.file
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (`end` closes it)
        command = [sys.executable, *part.command]
        if part.file:
            self.file.unlink(missing_ok=True)  # results of an earlier run are not those of this one
            command += ["--output", str(self.file)]
        if part.command[0].startswith("scripts/"):
            command += ["--seconds", f"{self.seconds - 10:.0f}"]
        operations = [*filter(None, os.environ.get(REFERENCE, "").split(";")), *broken]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", REFERENCE: ";".join(operations)}
        if part.kind in UNTIMED:  # threads of processes side by side would wait for each other
            environment.setdefault("OMP_NUM_THREADS", "1")
        options = {"cwd": ROOT, "env": environment, "stdout": self.log, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, start_new_session=True, **options)

    def over(self) -> bool:
        """Has it ended, or is its time up?"""
        return self.process.poll() is not None or time.monotonic() - self.begin > self.seconds

    def end(self) -> dict[str, Any]:
        """Its status, its results, and its last lines. The exit status is None if its time was up.

        Results are the JSON among the last lines, or in the file of a part that did not get so far.
        """
        code, taken = self.process.poll(), time.monotonic() - self.begin
        with suppress(OSError):  # the group has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with self.log:
            self.log.seek(0)
            lines = [line for line in self.log.read().splitlines() if line.strip()]
        results = next((r for line in lines[:-6:-1] if (r := read_json(line)) is not None), None)
        if results is None and self.file.is_file():
            results = read_json(self.file.read_text(encoding="utf-8"))
        if code is None and results and time.time() - results.get("since", math.inf) > HANGS:
            results["hanging"] = results["running"]  # or else it was only late
        lines = [anonymous(line) for line in lines if not line.startswith("{")]
        status = {0: "ok", None: "timed out"}.get(code, "failed")
        shown = "python " + " ".join(f'"{word}"' if " " in word else word for word in self.part.command)
        outcome = {"command": shown, "status": status, "exit_status": code, "results": results}
        return outcome | {"seconds": round(taken, 1), "last_lines": lines[-60:]}


def run_together(
    parts: list[Part], seconds: float, folder: Path, broken: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Begin all of them -> their outcomes by name, each when it has ended. `broken`: operations that run on
    the reference."""
    running: list[Process] = []
    try:
        for part in parts:
            running.append(Process(part, seconds, folder, broken))
        while running:
            for process in [process for process in running if process.over()]:
                running.remove(process)
                yield process.part.name, process.end()
            time.sleep(0.1)
    finally:
        for process in running:
            process.end()


def batches(parts: list[Part]) -> list[list[Part]]:
    """The same parts in their order, those together that run side by side."""
    groups = groupby(enumerate(parts), lambda pair: pair[1].kind if pair[1].kind in UNTIMED else pair[0])
    return [[part for _, part in group] for _, group in groups]


def broken_operations(outcomes: dict[str, dict]) -> dict[str, str]:
    """The first errors of kernels that raise one, by operation, and those that did not end."""
    checks = [check for results in found(outcomes, "checks").values() for check in results.get("checks", [])]
    broken = {check["operation"]: check["reason"] for check in reversed(checks) if check["reason"]}
    hanging = [results["hanging"] for results in found(outcomes, "checks").values() if "hanging" in results]
    return broken | dict.fromkeys(hanging, "did not end")


def read_json(line: str) -> Any:
    try:
        return json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None


def anonymous(line: str) -> str:
    """Without folders: results may be published, where a machine keeps its files should not."""
    return re.sub(r"(?<![\w.:/])(/[\w.+-]+)+/(?=[\w.+-])", "", line)


def run_all(parts: list[Part], minutes: float, folder: Path, settings: dict[str, Any]) -> dict[str, dict]:
    """Every part in its order, as long as there is time -> their outcomes by name."""
    deadline, outcomes = time.monotonic() + 60 * minutes - 5, {}

    def add(name: str, outcome: dict[str, Any]) -> None:
        outcomes[name] = outcome
        report = settings | {"parts": outcomes, "table": table(outcomes)}
        write_json(folder / "gpu_pass.json", report)

    for batch in batches(parts):
        left, broken = deadline - time.monotonic(), broken_operations(outcomes)
        for part in batch:
            if left < part.least:
                add(part.name, {"status": "skipped", "reason": f"{max(left, 0):.0f} seconds were left"})
        begun = [part for part in batch if left >= part.least]
        if begun:
            print(f"---- {', '.join(part.name for part in begun)}", flush=True)
        for name, outcome in run_together(begun, left, folder, broken):
            lines = [f"-- {name}"] if len(begun) > 1 else []
            print("\n".join([*lines, *outcome["last_lines"]]), flush=True)
            add(name, outcome)
    return outcomes


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------

PEERS = [("w4a16", "torch int4"), ("w4a16", "gemlite int4"), ("w4a16", "torch bf16"), ("w4a8", "torch int4")]


def found(outcomes: dict[str, dict], kind: str) -> dict[str, Any]:
    """Results of all parts of a kind that have some, by the shape in their name."""
    parts = {name.partition(" ")[2]: part for name, part in outcomes.items() if name.split()[0] == kind}
    return {name: part["results"] for name, part in parts.items() if part.get("results")}


def table(outcomes: dict[str, dict]) -> list[str]:
    """What it came to, in a few lines."""
    lines = [line for name, part in outcomes.items() for line in status_lines(name, part)]
    makers = (broken_lines, check_lines, exact_lines, linear_lines, step_lines, method_lines, tile_lines)
    for make in makers:
        try:
            lines += make(outcomes)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # of a part that broke off
            lines.append(f"{make.__name__}: the results are incomplete: {error!r}")
    return lines


def status_lines(name: str, part: dict[str, Any]) -> list[str]:
    last = part.get("last_lines", [])
    if part["status"] == "skipped":
        return [f"{name:24} skipped: {part['reason']}"]
    if name.startswith("checks") and part["results"]:
        last = []  # what is wrong has lines of its own
    note = last[-1].strip("= ") if last and (name == "tests" or part["status"] != "ok") else ""
    more = [f"    {line}" for line in last[-6:-1]] if part["status"] not in ("ok", "timed out") else []
    return [f"{name:24} {part['status']} in {part['seconds']:.0f} s  {note[:160]}", *more]


def broken_lines(outcomes: dict[str, dict]) -> list[str]:
    broken = broken_operations(outcomes)
    lines = [f"    {operation}: {reason}"[:180] for operation, reason in broken.items()]
    return ["DOES NOT RUN, and is on the reference in what follows the checks:", *lines] if lines else []


def check_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for shape, results in found(outcomes, "checks").items():
        checks = results["checks"]
        wrong, unequal = ([c for c in checks if not c[key]] for key in ("right", "rows_equal"))
        errors = {c["name"]: c["error"] for c in checks if c["error"] is not None}
        worst = max(errors, key=errors.__getitem__, default="")
        lines.append(
            f"checks {shape}: {len(checks) - len(wrong)} of {len(checks)} right ({results['bodies']})"
        )
        missed = f"the others after {results['running']}" if "running" in results else results["not_reached"]
        lines[-1] += f", rows differ in {len(unequal)}, {missed} not reached; largest error "
        lines[-1] += f"{errors.get(worst, math.nan):.1e} ({worst})"
        for c in wrong[:12]:
            rows = "rows equal" if c["rows_equal"] else "rows differ"
            lines.append(f"    wrong: {c['name']}: {c['reason'] or rows}, error {c['error']}"[:180])
    return lines


def exact_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for kind in ("exact", "compiled"):
        for name, results in found(outcomes, kind).items():
            rows = results["results"]
            texts, different = (sum(row[key] for row in rows.values()) for key in ("texts", "different"))
            lines.append(f"{kind} {name}".strip() + f": {different} of {texts} texts differ from {BASE}")
            wrong = {name: row for name, row in rows.items() if row["different"]}
            lines += [f"    {name}: {row['different']} of {row['texts']}" for name, row in wrong.items()]
    return lines


def linears_by_shape(outcomes: dict[str, dict]) -> dict[str, list[dict]]:
    """What `linears` measured: the entries of every shape."""
    entries: dict[str, list[dict]] = {}
    for results in found(outcomes, "linears").values():
        for name, entry in results["results"].items():
            if isinstance(entry, dict):
                entries.setdefault(name.split()[0], []).append(entry | {"name": name})
    return entries


def layer_seconds(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Seconds of all linears of a layer together, by contestant and number of rows."""
    kinds = [kind for kind in rows[0] if all(kind in row for row in rows)] if rows else []
    return {k: {n: sum(row[k]["seconds"][n] for row in rows) for n in rows[0][k]["seconds"]} for k in kinds}


def linear_lines(outcomes: dict[str, dict]) -> list[str]:
    lines, shares, failed = [], [], []
    for shape, entries in linears_by_shape(outcomes).items():
        [bandwidth] = [r["results"]["copy_bandwidth"] for r in found(outcomes, "linears").values()]
        rows = [entry["linears"] for entry in entries]
        seconds, missing = layer_seconds(rows), 4 - len(entries)
        shape += f" ({missing} missing)" if missing else ""
        for ours, peer in PEERS:
            if ours in seconds and peer in seconds:
                ratios = {n: seconds[peer][n] / t for n, t in seconds[ours].items()}
                cells = "".join(f"{ratio:7.2f}" for ratio in ratios.values())
                lines.append(f"    {shape:14} {ours + ' / ' + peer:24}{cells}")
        for kind, times in seconds.items():
            shares_of = shares_of_copy(times, sum(row[kind]["bytes"] for row in rows), bandwidth)
            shares.append(
                f"    {shape:14} {kind:24}" + "".join(f"{share:7.2f}" for share in shares_of.values())
            )
        failed += [
            f"    {e['name']} {k} FAILED: {why}"[:180]
            for e in entries
            for k, why in e.get("failed", {}).items()
        ]
    if not lines and not shares:
        return failed
    head = f"{'':43}" + "".join(f"{n:>7}" for n in times)
    titles = [
        "linears of a layer together, how many times as fast as peers, by n",
        "shares of the copy bandwidth",
    ]
    return [titles[0], head, *lines, titles[1], *shares, *failed]


def step_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for shape, results in found(outcomes, "step").items():
        for precision, costs in results["results"].items():
            for key, share in (("verification", "share_of_copy"), ("on_device", "share_of_copy_on_device")):
                if key in costs:
                    times, label = costs[key], "graph" * (key == "on_device")
                    ratios = "".join(
                        f"{seconds / times['1']:7.2f}" for n, seconds in times.items() if n != "1"
                    )
                    first = f"{times['1'] * 1e3:9.2f} ms{costs[share]['1']:7.2f}"
                    lines.append(f"    {shape:14} {precision:7}{label:8}{first}{ratios}")
    title = f"whole steps: T(1), its share of the copy bandwidth, T(n) / T(1), n = {SIZES[2:]}"
    return [f"{title}; `graph`: without the host", *lines] if lines else []


def method_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    parts = [*found(outcomes, "table").items(), *found(outcomes, "batches").items()]
    for shape, results in parts:
        for group, rows in results["results"].items():
            speeds = {name: row["speedup"][1] for name, row in rows.items() if name != BASE}
            cells = "  ".join(f"{name} {speed:.2f}" for name, speed in speeds.items())
            lines.append(f"    {shape} {group}: {cells}")
    title = (
        f"speedups over {BASE} ({SYNTHETIC}); SpecMQuant, Llama-3-70B W4A16: tree of 60 2.12, hierarchy 2.78"
    )
    return [title, *lines] if lines else []


def tile_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for results in found(outcomes, "tiles").values():
        for name, row in results.items():
            used, best = (
                "".join(f"{times[key] * 1e6:8.1f}" for times in row["seconds"].values())
                for key in (row["used"], row["best_for_all"])
            )
            lines.append(f"    {name:24} used{used}   {row['best_for_all']}{best}")
    return (
        ["tiles: microseconds with those in use and with the best, n = 1, 8, 16, 64", *lines] if lines else []
    )


def went_wrong(outcomes: dict[str, dict]) -> bool:
    """Did a part fail, one of our kernels not run, or a text differ? What was skipped has not failed."""
    if any(part["status"] in ("failed", "timed out") for part in outcomes.values()):
        return True
    texts = (found(outcomes, "exact") | found(outcomes, "compiled")).values()
    linears = [entry for entries in linears_by_shape(outcomes).values() for entry in entries]
    ours = {"bf16", *PRECISIONS} & {kind for entry in linears for kind in entry.get("failed", {})}
    return bool(ours) or any(row["different"] for part in texts for row in part["results"].values())


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, required=True, help="folder for the results")
    p.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    p.add_argument("--parts", help="which, with commas (default: all but tests and compiled)")
    p.add_argument("--shapes", default=DEFAULT_SHAPES, help=f"of {', '.join(SHAPES)}, with commas")
    p.add_argument("--device", default="cuda", help="cuda; cpu to try it out")
    return p


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    shapes = args.shapes.split(",")
    unknown = set(shapes) - set(SHAPES)
    if unknown:
        parser.error(f"--shapes: {', '.join(unknown)} is none of {', '.join(SHAPES)}")
    parts = plan(shapes, args.device)
    kinds = {part.kind for part in parts}
    chosen = set(args.parts.split(",")) if args.parts else kinds - ASKED_FOR
    if chosen - kinds:
        parser.error(f"--parts: {', '.join(chosen - kinds)} is none of {', '.join(sorted(kinds))}")
    if on_gpu(args.device) and not torch.cuda.is_available():
        print("gpu_pass.py: there is no GPU here, so nothing is run")
        return 0
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"report": "gpu_pass", "settings": {"minutes": args.minutes, "shapes": shapes}}
    settings |= machine(args.device)
    outcomes = run_all([part for part in parts if part.kind in chosen], args.minutes, folder, settings)
    print("\n" + "\n".join(table(outcomes)), flush=True)
    return int(went_wrong(outcomes))


if __name__ == "__main__":
    sys.exit(main())
