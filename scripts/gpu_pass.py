"""gpu_pass.py: everything that needs an NVIDIA GPU, in one command of less than ten minutes.

    python scripts/gpu_pass.py --output results                       # the table comes last
    python scripts/gpu_pass.py --output results --parts checks,exact  # only these parts
    python scripts/gpu_pass.py --output results --parts tune          # tiles of the 4-bit linear
    python scripts/gpu_pass.py --only checks --device cpu --shapes llama-3.2-1b    # one part, in this process

The parts: `tests` (pytest -m gpu); `checks`, every kernel against its slow twin at the shapes of real models,
and its rows bitwise equal, whatever rides along; then reports of bench.py: `kernels`, next to PyTorch's,
`cost` and `synthetic`, of models of random weights made on the device, `exact`, texts of the shipped models,
`gemlite`, where it is installed, and `compiled`, which is `exact` compiled; if asked for, `tune`. Nothing is
trained. They run in an order of importance, for all of them may take longer than there is time.

Without a GPU it says so and ends with 0. A part that fails keeps none of the others from running; the exit
status is then 1. What no longer fits into --minutes is named as skipped. In the folder of --output there will
be gpu_pass.json with the results of all parts, written anew after each of them, and the files of bench.py.

The one idea: this is only the conductor. Each part is a process with a time limit of its own, the measuring
belongs to bench.py, and what is checked here takes a device and a shape, so that the tests run it on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402
from benchmarks.common import BASE  # noqa: E402
from benchmarks.linears import LARGER_THAN_CACHE, Entry  # noqa: E402
from benchmarks.machine import kernels_in_use, machine  # noqa: E402
from benchmarks.shapes import SHAPES, linears_of, packed, random_rows  # noqa: E402
from benchmarks.synthetic import SYNTHETIC  # noqa: E402
from benchmarks.timing import finish, first_line, interleave_on_device, on_gpu, shares_of_copy  # noqa: E402
from drafts import tree_geometry  # noqa: E402
from model import ModelConfig  # noqa: E402
from packing import PRECISIONS  # noqa: E402
from rotation import Rotations  # noqa: E402
from sampling import Sampling  # noqa: E402

DEFAULT_SHAPES = "llama-3-8b,llama-3-70b"
SIZES = "1,2,4,8,16,32,60"  # n of T(n)
UNTIMED = {"tests", "checks", "exact"}  # kinds of parts that may run at the same time: nothing is timed
PAPER = {"autoregressive": 2.78, "tree of 60": 1.31}  # hierarchy over these: SpecMQuant, Llama-3-70B, W4A16


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


def precisions_of(shape: str) -> str:
    """bf16 where its weights leave room for a smaller model and heads."""
    c = SHAPES[shape]
    layer = sum(out * inputs for out, inputs in linears_of(c).values())
    fits = 2 * (c.num_layers * layer + 2 * c.vocab_size * c.hidden_size) < 60e9
    return "bf16,w4a16,w4a8" if fits else "w4a16,w4a8"


def plan(shapes: list[str], device: str) -> list[Part]:
    """All parts, the most important first."""
    where, ours = ["--device", device], ",".join(["bf16", *PRECISIONS, "torch bf16", "torch int4"])
    exact = ["bench.py", "exact", "--precisions", "w4a16,w4a8", "--prompts", "8", *where]
    exact += ["--max_new_tokens", "64"]
    parts = [Part("tests", ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"], 150)]
    for shape in shapes:  # a process each: Triton compiles one kernel at a time, on one core
        parts.append(Part(f"checks {shape}", only("checks", [shape], device), 90))
    parts.append(Part("exact", [*exact, "--uncompiled"], 150, "gpu_exact.json"))

    def add(report: str, seconds: float, shape: str, flags: list[str], name: str = "") -> None:
        short = shape.removeprefix("llama-3-").removeprefix("llama-")
        file = f"gpu_{name or report}_{short}.json"
        parts.append(Part(f"{name or report} {shape}", ["bench.py", report, *flags, *where], seconds, file))

    for shape in shapes:
        add("kernels", 80, shape, ["--shapes", shape, "--repeats", "3", "--contestants", ours])
    for shape in shapes:
        flags = ["--shape", shape, "--precisions", precisions_of(shape), "--sizes", SIZES, "--repeats", "2"]
        add("cost", 80, shape, flags)
    for shape in [shapes[-1], *shapes[:-1]]:  # the largest first, if they are in order
        add("synthetic", 90, shape, ["--shape", shape, "--precisions", precisions_of(shape)])
    if importlib.util.find_spec("gemlite"):
        for shape in shapes:
            flags = ["--shapes", shape, "--repeats", "3", "--contestants", "w4a16,gemlite int4"]
            add("kernels", 100, shape, flags, "gemlite")
    parts.append(Part("compiled", [*exact, "--compiled"], 300, "gpu_exact_compiled.json", least=60))
    return [*parts, Part("tune", only("tune", shapes, device), 500)]


def only(part: str, shapes: list[str], device: str) -> list[str]:
    """The command of a part that is in this file."""
    return ["scripts/gpu_pass.py", "--shapes", ",".join(shapes), "--device", device, "--only", part]


class Process:
    """A part while it runs, in a group of processes that ends with it."""

    def __init__(self, part: Part, seconds: float, folder: Path):
        self.part, self.seconds, self.begin = part, min(seconds, part.seconds), time.monotonic()
        self.file = folder / part.file
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (`end` closes it)
        command = [sys.executable, *part.command]
        if part.file:
            self.file.unlink(missing_ok=True)  # results of an earlier run are not those of this one
            command += ["--output", str(self.file)]
        command += ["--seconds", f"{self.seconds - 10:.0f}"] if "--only" in part.command else []
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
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
        lines = [anonymous(line) for line in lines if not line.startswith("{")]
        status = {0: "ok", None: "timed out"}.get(code, "failed")
        shown = "python " + " ".join(f'"{word}"' if " " in word else word for word in self.part.command)
        outcome = {"command": shown, "status": status, "exit_status": code, "results": results}
        return outcome | {"seconds": round(taken, 1), "last_lines": lines[-60:]}


def run_together(parts: list[Part], seconds: float, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Begin all of them -> their outcomes by name, each when it has ended."""
    running: list[Process] = []
    try:
        for part in parts:
            running.append(Process(part, seconds, folder))
        while running:
            for process in [process for process in running if process.over()]:
                running.remove(process)
                yield process.part.name, process.end()
            time.sleep(0.1)
    finally:
        for process in running:
            process.end()


def batches(parts: list[Part]) -> list[list[Part]]:
    """The same parts in their order, those together that may run at the same time."""
    result: list[list[Part]] = []
    for part in parts:
        if result and {part.kind, result[-1][-1].kind} <= UNTIMED:
            result[-1].append(part)
        else:
            result.append([part])
    return result


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
        (folder / "gpu_pass.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    for batch in batches(parts):
        left = deadline - time.monotonic()
        for part in batch:
            if left < part.least:
                add(part.name, {"status": "skipped", "reason": f"{max(left, 0):.0f} seconds were left"})
        begun = [part for part in batch if left >= part.least]
        if begun:
            print(f"---- {', '.join(part.name for part in begun)}", flush=True)
        for name, outcome in run_together(begun, left, folder):
            lines = [f"-- {name}"] if len(begun) > 1 else []
            print("\n".join([*lines, *outcome["last_lines"]]), flush=True)
            add(name, outcome)
    return outcomes


# --------------------------------------------------------------------------------------------------
# Checks: every kernel against its slow twin, and its rows against themselves
# --------------------------------------------------------------------------------------------------

ROWS = (1, 2, 8, 16, 64)
CHECKED = max(ROWS)


@dataclass
class Check:
    name: str
    error: float  # norm of the difference over the norm of what is right
    tolerance: float
    rows_equal: bool  # is each row the same bits, however many ride along?
    reason: str = ""  # why there is nothing to compare

    @property
    def right(self) -> bool:
        return not self.reason and self.error <= self.tolerance and self.rows_equal

    def as_json(self) -> dict[str, Any]:
        error = self.error if math.isfinite(self.error) else None
        return asdict(self) | {"error": error, "right": self.right}


Checks = Iterator[tuple[str, Callable[[], Check]]]  # their names, and how


def difference(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def rows_agree(compute: Callable[[slice], Tensor], whole: Tensor) -> bool:
    """Are the first and the last 1, 2, 8 .. rows alone the same bits as among all of them?"""
    ends = [rows for n in ROWS for rows in (slice(0, n), slice(len(whole) - n, len(whole)))]
    return all(torch.equal(compute(rows), whole[rows]) for rows in ends)


class Form(NamedTuple):
    """How a weight is stored, and what it is multiplied with."""

    precision: str
    group: int = 128
    asymmetric: bool = False

    @property
    def name(self) -> str:
        four = f", groups of {self.group}{', zeros' if self.asymmetric else ''}"
        return self.precision + (four if self.precision.startswith("w4") else "")


FORMS = [Form(name) for name in ("w4a16", "w4a8", "w4a4", "bf16", "w8a16", "w8a8")]
FOUR_BITS = FORMS[:3]


def neighbours(name: str, config: ModelConfig, device: str, turned: bool) -> dict[str, Any]:
    """What stands next to this linear in a model, as arguments of `kernels.linear`. With `turned`, also what
    only some models have: a rotation, or a bias and another order of the inputs."""
    out, inputs = linears_of(config)[name]
    around: dict[str, Any] = {"residual": torch.randn(CHECKED, out, device=device).bfloat16()}
    if name in ("qkv", "gate_up"):
        around = {"norm": torch.rand(inputs, device=device).bfloat16(), "eps": 1e-5}
    if turned and name in ("o", "down"):
        rotations = Rotations.of(config)
        around["rotation"] = (rotations.heads if name == "o" else rotations.inner).to(device).arguments
    elif turned:
        around["permutation"] = torch.randperm(inputs, device=device).int()
        around["bias"] = torch.randn(out, device=device).bfloat16()
    return around | ({"gated": True} if name == "down" else {})


def reference(
    x: Tensor, weights: tuple, out: int, bits: int, float32_out: bool, around: dict[str, Any]
) -> Tensor:
    """`kernels.linear` by its slow twin, on any device."""
    get, rotation = around.get, around.get("rotation", (None, 1, 1))
    extras = (get("bias"), get("residual"), get("norm"), get("eps", 0.0), get("gated", False), *rotation)
    return kernels.linear_reference(x, *weights, *extras, get("permutation"), out, bits, float32_out)


def check_linear(
    out: int, inputs: int, form: Form, around: dict[str, Any], device: str, float32_out: bool = False
) -> Check:
    rows = random_rows(out, inputs, form.precision, device, form.group, form.asymmetric)
    weights = packed(*(None if t is None else t.clone() for t in rows))
    x = torch.randn(CHECKED, inputs * (2 if around.get("gated") else 1), device=device).bfloat16()
    bits = 16 if form.precision == "bf16" else PRECISIONS[form.precision][1]

    def multiply(chosen: slice) -> Tensor:
        mine = {k: v[chosen] if k == "residual" else v for k, v in around.items()}
        settings = {"out_features": out, "activation_bits": bits, "float32_out": float32_out}
        return kernels.linear(x[chosen], *weights, **mine, **settings)

    whole = multiply(slice(None))
    # Where 4-bit activations are rounded the other way, it is by a seventh of the largest.
    tolerance = 3e-2 if bits == 4 and around else 1e-2
    error = difference(whole, reference(x, rows, out, bits, float32_out, around))
    return Check(form.name, error, tolerance, rows_agree(multiply, whole))


def check_attention(config: ModelConfig, device: str, slots: int = 1200) -> Check:
    """A chain and a tree in a batch of three texts. Rows: the first nodes without the others, a text alone,
    and a path scattered over the tree against the same keys side by side."""
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
    past = slots - CHECKED - 8
    length = torch.tensor([past, past // 2, 37], device=device)
    q = torch.randn(3, CHECKED, heads, size, device=device).bfloat16()
    keys, values = torch.randn(2, 3, slots, groups, size, device=device).bfloat16()
    node = torch.arange(CHECKED, device=device)
    comb = torch.where(node % 2 == 0, node - 2, node - 1).clamp(
        min=-1
    )  # even nodes are a path, odd ones leaves
    chain, tree = (tree_geometry(p.expand(3, -1), CHECKED - 1)[0] for p in (node - 1, comb))
    worst, equal = 0.0, True
    for ancestors in (chain, tree):
        ours = kernels.attention(q, keys, values, ancestors, length)
        exact = kernels.attention_reference(q.float(), keys.float(), values.float(), ancestors, length)
        worst = max(worst, difference(ours, exact))
        alone = kernels.attention(q[1:2], keys[1:2], values[1:2], ancestors[1:2], length[1:2])
        equal &= torch.equal(alone, ours[1:2])
        for n in ROWS:
            first = kernels.attention(q[:, :n].contiguous(), keys, values, ancestors[:, :n, :n], length)
            equal &= torch.equal(first, ours[:, :n])
    path = node[::2]  # `ours` is of the tree
    for b, start in enumerate(length.tolist()):
        order = torch.cat((torch.arange(start, device=device), start + path))
        straight = [cache[b : b + 1, order].contiguous() for cache in (keys, values)]
        ones = torch.ones(len(path), len(path), dtype=torch.bool, device=device).tril()[None]
        along = kernels.attention(q[b : b + 1, path], *straight, ones, length[b : b + 1])
        equal &= torch.equal(along, ours[b : b + 1, path])
    return Check("attention, chain and tree", worst, 1e-2, bool(equal))


def check_rows(name: str, ours: Callable, exact: Callable, x: Tensor, tolerance: float) -> Check:
    """An operation on the rows of x, and its slow twin."""
    whole = ours(x)
    equal = rows_agree(lambda rows: ours(x[rows]), whole)
    return Check(name, difference(whole, exact(x)), tolerance, equal)


def positions_and_seeds(device: str) -> tuple[Tensor, Tensor]:
    """[3, 2] and [3], with what does not fit into 32 bits."""
    positions = torch.tensor([[0, 2**33 + 5], [7, 1], [2**31, -1]], device=device)
    return positions, torch.tensor([1234, 2**40 + 7, -1], device=device)


def check_gumbel(config: ModelConfig, device: str) -> Check:
    """The same bits as on the CPU."""
    positions, seeds = positions_and_seeds(device)
    ours = kernels.gumbel(seeds, positions, config.vocab_size)
    exact = kernels.gumbel_reference(seeds.cpu(), positions.cpu(), config.vocab_size)
    alone = kernels.gumbel(seeds[1:2], positions[1:2, 1:], config.vocab_size)
    equal = torch.equal(ours.cpu(), exact) and torch.equal(alone, ours[1:2, 1:])
    return Check("gumbel", difference(ours.cpu(), exact), 0.0, equal)


RULES = {  # three rows of settings of `kernels.pick`, which may differ: temperature, top_k, top_p, min_p
    "largest": [(0.0, 0, 1.0, 0.0)] * 3,
    "any": [(1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (4.0, 0, 1.0, 0.0)],
    "top_k": [(1.0, 1, 1.0, 0.0), (0.8, 50, 1.0, 0.0), (3.0, 5000, 1.0, 0.0)],
    "top_p": [(1.0, 0, 0.95, 0.0), (0.8, 0, 0.5, 0.0), (3.0, 0, 0.9, 0.0)],
    "min_p": [(1.0, 0, 1.0, 0.05), (0.8, 0, 1.0, 0.5), (3.0, 0, 1.0, 1e-3)],
    "all of it": [(0.0, 5, 0.5, 0.1), (1.0, 40, 0.95, 0.01), (3.0, 300, 0.8, 1e-3)],
}


def check_pick(rules: list[tuple], equal_ones: bool, config: ModelConfig, device: str) -> Check:
    """The same tokens as by sorting, on the CPU, of rows cut from wider ones."""
    positions, seeds = positions_and_seeds(device)
    rows = [Sampling(*row[:3], min_p=row[3]).settings for row in rules]
    settings = torch.tensor(rows, dtype=torch.float64, device=device)
    x = 3 * torch.randn(3, 2, config.vocab_size + 64, device=device)
    x = (x.round() if equal_ones else x)[..., : config.vocab_size]
    given = (x, positions, seeds, settings)
    ours, exact = kernels.pick(*given), kernels.pick_reference(*(t.cpu() for t in given))
    alone = kernels.pick(x[1:2, 1:], positions[1:2, 1:], seeds[1:2], settings[1:2])
    equal = torch.equal(ours.cpu(), exact) and torch.equal(alone, ours[1:2, 1:])
    return Check("pick", difference(ours.cpu(), exact), 0.0, equal)


def check_logsumexp(config: ModelConfig, device: str) -> Check:
    """The same bits as on the CPU, and close to what PyTorch makes of it."""
    x = 4 * torch.randn(3, 2, config.vocab_size, device=device)
    ours, alone = kernels.logsumexp(x), kernels.logsumexp(x[1:2, 1:])
    equal = torch.equal(ours.cpu(), kernels.logsumexp_reference(x.cpu()))
    equal &= torch.equal(alone, ours[1:2, 1:])
    return Check("logsumexp", difference(ours, x.double().logsumexp(-1, keepdim=True)), 2e-6, equal)


def check_top_k(config: ModelConfig, device: str) -> Check:
    """Values and places, with many equal numbers."""
    x = (8 * torch.randn(CHECKED, config.vocab_size, device=device)).round() / 8

    def both(x: Tensor, body: Callable = kernels.top_k) -> Tensor:
        values, places = body(x, 8)
        return torch.cat((values.double(), places.double()), dim=-1)

    return check_rows("top_k", both, partial(both, body=kernels.top_k_reference), x, 0.0)


def check_move(config: ModelConfig, device: str) -> Check:
    """Slots of all layers' caches, bit for bit, those that nothing is moved to as well."""
    shape = (3, 200, config.num_kv_heads, config.head_dim)
    caches = list(torch.randn(4, *shape, device=device).bfloat16())
    expected, length = [cache.clone() for cache in caches], torch.tensor([0, 37, 130], device=device)
    path = torch.stack([torch.randperm(60)[:7].sort().values for _ in range(3)]).to(device)
    kernels.move_slots(caches, path, length)
    kernels.move_reference(expected, path, length)
    worst = max(difference(ours, exact) for ours, exact in zip(caches, expected))
    return Check("move", worst, 0.0, all(map(torch.equal, caches, expected)))


def between_linears(config: ModelConfig, device: str) -> tuple[Tensor, ...]:
    """Queries, keys and values of three texts, parts of one result, and their angles: cosines and sines."""
    counts, size = (config.num_heads, config.num_kv_heads, config.num_kv_heads), config.head_dim
    parts = torch.randn(3, CHECKED, sum(counts), size, device=device).bfloat16().split(counts, dim=2)
    angles = 1e4 * torch.rand(3, CHECKED, 1, size // 2, device=device)
    return (*parts, angles.cos(), angles.sin())


def check_rope(config: ModelConfig, device: str) -> Check:
    """The same bits as on the CPU."""
    q, k, _, *angles = between_linears(config, device)
    given = (q, k, *angles)
    ours, exact = kernels.rope(*given), kernels.rope_reference(*(t.cpu() for t in given))
    alone = kernels.rope(*(t[1:2, 5:6] for t in given))
    equal = all(torch.equal(one, all_of_them[1:2, 5:6]) for one, all_of_them in zip(alone, ours))
    equal &= all(torch.equal(mine.cpu(), its) for mine, its in zip(ours, exact))
    return Check("rope", max(difference(a.cpu(), b) for a, b in zip(ours, exact)), 0.0, equal)


def check_store(config: ModelConfig, device: str) -> Check:
    """Into caches of three texts, then into a view of one row. Slots that nothing is stored to count, too."""
    _, k, v, *_ = between_linears(config, device)
    caches = torch.randn(2, 3, 200, *k.shape[2:], device=device).bfloat16()
    expected, slots = caches.clone(), torch.rand(2, 3, 200, device=device).argsort(dim=-1)[..., :CHECKED]
    for into, body in ((caches, kernels.store), (expected, kernels.store_reference)):
        body(*into, k, v, slots[0])
        body(*into[:, 1:2], v[1:2], k[1:2], slots[1, 1:2])
    return Check("store", difference(caches, expected), 0.0, torch.equal(caches, expected))


def small_checks(config: ModelConfig, device: str) -> Checks:
    """Everything but linears."""
    c, rotations = config, Rotations.of(config)
    yield "attention", partial(check_attention, c, device)
    weight = torch.rand(c.hidden_size, device=device).bfloat16()
    norms = [partial(normalized, weight, body) for body in (kernels.rms_norm, kernels.rms_norm_reference)]
    x = 3 * torch.randn(CHECKED, c.hidden_size, device=device).bfloat16()
    yield "rms_norm", partial(check_rows, "rms_norm", *norms, x, 1e-2)
    inputs = {"hidden": c.hidden_size, "heads": c.num_heads * c.head_dim, "inner": c.intermediate_size}
    for name, size in inputs.items():
        arguments = getattr(rotations, name).to(device).arguments
        bodies = [partial(turned, arguments, body) for body in (kernels.rotate, rotate_exactly)]
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
            label, x = f"rotate {name} {str(dtype)[6:]}", torch.randn(CHECKED, size, device=device).to(dtype)
            yield label, partial(check_rows, label, *bodies, x, tolerance)
    for name, rules in RULES.items():
        for note, equal_ones in (("", False), (", equal logits", True)):
            yield f"pick {name}{note}", partial(check_pick, rules, equal_ones, c, device)
    others = {"gumbel": check_gumbel, "logsumexp": check_logsumexp, "top_k": check_top_k}
    others |= {"rope": check_rope, "store": check_store, "move": check_move}
    yield from ((name, partial(check, c, device)) for name, check in others.items())


def normalized(weight: Tensor, body: Callable, x: Tensor) -> Tensor:
    return body(x, weight, 1e-5)


def turned(arguments: tuple, body: Callable, x: Tensor) -> Tensor:
    return body(x, *arguments)


def rotate_exactly(x: Tensor, matrix: Tensor, power: int, stride: int) -> Tensor:
    return kernels.rotate_reference(x.double(), matrix, power, stride)


EVERY = ("qkv", "o", "gate_up", "down")


def linear_checks(
    config: ModelConfig, device: str, forms: list[Form], names: tuple[str, ...] = EVERY, turned: bool = False
) -> Checks:
    """Of a layer: each with what stands next to it."""

    def check(name: str, form: Form) -> Check:
        return check_linear(*linears[name], form, neighbours(name, config, device, turned), device)

    linears = linears_of(config)
    for name in names:
        for form in forms:
            if form.precision[:2] != "w4" or linears[name][1] % form.group == 0:
                yield f"{name}{', turned,' if turned else ''} {form.name}", partial(check, name, form)


def head_checks(config: ModelConfig, device: str) -> Checks:
    size = (config.vocab_size, config.hidden_size)
    for form in (*FORMS[:2], *FORMS[3:]):  # it never meets 4-bit activations
        yield f"lm_head {form.name}", partial(check_linear, *size, form, {}, device, float32_out=True)


def all_checks(configs: dict[str, ModelConfig], device: str) -> Checks:
    """For all shapes first what matters most."""
    zeros = [form._replace(asymmetric=True) for form in FOUR_BITS]
    groups = [Form(f.precision, g, a) for g in (64, 32) for a in (False, True) for f in FOUR_BITS]
    rounds: list[Callable[[ModelConfig], Checks]] = [
        lambda config: linear_checks(config, device, FORMS),
        lambda config: small_checks(config, device),
        lambda config: head_checks(config, device),
        lambda config: linear_checks(config, device, FOUR_BITS, turned=True),
        lambda config: linear_checks(config, device, zeros),
        lambda config: linear_checks(config, device, groups, ("o",)),
    ]
    for checks in rounds:
        for shape, config in configs.items():
            yield from ((f"{shape} {name}", how) for name, how in checks(config))


@torch.no_grad()
def run_checks(configs: dict[str, ModelConfig], device: str, seconds: float) -> dict[str, Any]:
    """Every check for which there is time; one that raises has failed, and the others go on."""
    kernels.load()
    begin, checks, missed = time.monotonic(), [], 0
    for name, how in all_checks(configs, device):
        if time.monotonic() - begin > seconds:
            missed += 1
            continue
        torch.manual_seed(0)
        try:
            check = replace(how(), name=name)
        except Exception as error:  # of whatever kind: the report is what this is for
            check = Check(name, math.nan, 0.0, False, first_line(error))
        checks.append(check)
        verdict = "" if check.right else "   WRONG " + (check.reason or f"(rows equal: {check.rows_equal})")
        print(f"{name:60} {check.error:.1e}{verdict}", flush=True)
    bodies = kernels_in_use(device)
    return {"bodies": bodies, "not_reached": missed, "checks": [check.as_json() for check in checks]}


# --------------------------------------------------------------------------------------------------
# Tiles: launch configurations of the 4-bit linear
# --------------------------------------------------------------------------------------------------

TUNED_ROWS = (1, 8, 16, 64)


def candidates(first: Any) -> list[Any]:
    """The one that is used, and others around it, of the same dataclass `kernels_cuda.Tiles`."""
    blocks = [replace(first, block_out=b, split=s) for b in (32, 64, 128) for s in (1, 2, 4, 8)]
    depths = [replace(first, stages=stages) for stages in (2, 3, 4, 5, 6)]
    widths = [replace(first, warps=warps) for warps in (2, 4, 8)]
    return list(dict.fromkeys([first, *blocks, *depths, *widths]))


def multiply_with(plan: Any, words: list[tuple], x: Tensor, out: int) -> Callable[[], Tensor]:
    """w4a16 with the next of several copies of a weight at every call."""
    import kernels_cuda  # needs Triton

    extras = (None, None, None, 0.0, False, None, 1, 1, None, out, 16, False)  # nothing before, nothing after
    return Entry(words, lambda x, w: kernels_cuda.linear(x, *w, *extras, plan), 0).in_turn(x)


def working(plans: list[Any], words: list[tuple], x: Tensor, out: int) -> dict[str, Callable[[], Tensor]]:
    """How to multiply with every plan that does run and says what the first one says."""
    functions, first = {}, None
    for plan in plans:
        function = multiply_with(plan, words, x, out)
        try:
            y = function()
            finish(x.device)
        except Exception as error:  # it needs too much of something, for one
            if not functions:  # then there is nothing to compare with
                raise
            print(f"    {plan}: {first_line(error)}", flush=True)
            continue
        first = first if functions else y
        functions |= {str(plan): function} if difference(y, first) < 1e-2 else {}
    return functions


@torch.no_grad()
def tune_linear(out: int, inputs: int, device: str, rows: tuple[int, ...] = TUNED_ROWS) -> dict[str, Any]:
    """Seconds with all tiles that work, by number of rows; and which are used."""
    import kernels_cuda  # needs Triton

    weight, scales, _ = random_rows(out, inputs, "w4a16", device)
    pair, size = (kernels.pack_words(weight), scales.T.contiguous()), weight.nbytes + scales.nbytes
    copies = int(LARGER_THAN_CACHE["cuda"] / size) if on_gpu(device) else 0
    words = [pair, *(tuple(t.clone() for t in pair) for _ in range(copies))]
    plans, seconds = candidates(kernels_cuda.tiles(out, inputs, 4)), {}
    for n in rows:
        x = torch.randn(n, inputs, device=device).bfloat16()
        functions = working(plans, [(*pair, None) for pair in words], x, out)
        seconds[str(n)] = interleave_on_device(functions, 3, device, max(len(words), 32))
    return {"used": str(plans[0]), "seconds": seconds}


def best_for_all(seconds: dict[str, dict[str, float]]) -> str:
    """The tiles that lose least to the best ones, over all numbers of rows: they must not depend on these."""
    everywhere = set.intersection(*(set(times) for times in seconds.values()))
    return min(everywhere, key=lambda t: sum(times[t] / min(times.values()) for times in seconds.values()))


def run_tuning(configs: dict[str, ModelConfig], device: str, seconds: float) -> dict[str, Any]:
    begin, results = time.monotonic(), {}
    for shape, config in configs.items():
        for name, (out, inputs) in linears_of(config).items():
            if time.monotonic() - begin > seconds:
                return results
            row = tune_linear(out, inputs, device)
            row["best_for_all"] = best_for_all(row["seconds"])
            results[f"{shape} {name}"] = row
            print(f"{shape} {name}: {out} x {inputs}, for all n {row['best_for_all']}")
            for n, times in row["seconds"].items():
                best, used = min(times, key=times.__getitem__), times[row["used"]] * 1e6
                print(
                    f"    n = {n:>2}  {times[best] * 1e6:7.1f} us with {best}; used: {used:.1f}", flush=True
                )
    return results


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------

PEERS = [("w4a16", "torch int4"), ("w4a8", "torch int4"), ("w4a16", "torch bf16"), ("bf16", "torch bf16")]


def found(outcomes: dict[str, dict], kind: str) -> dict[str, Any]:
    """Results of all parts of a kind that have some, by the shape in their name."""
    parts = {name.partition(" ")[2]: part for name, part in outcomes.items() if name.split()[0] == kind}
    return {name: part["results"] for name, part in parts.items() if part.get("results")}


def table(outcomes: dict[str, dict]) -> list[str]:
    """What it came to, in a few lines."""
    lines = [line for name, part in outcomes.items() for line in status_lines(name, part)]
    for make in (check_lines, exact_lines, peer_lines, share_lines, cost_lines, method_lines):
        try:
            lines += make(outcomes)
        except (KeyError, TypeError, ValueError) as error:  # results of a part that broke off
            lines.append(f"{make.__name__}: the results are incomplete: {error!r}")
    return lines


def status_lines(name: str, part: dict[str, Any]) -> list[str]:
    last = part.get("last_lines", [])
    if part["status"] == "skipped":
        return [f"{name:24} skipped: {part['reason']}"]
    note = last[-1].strip("= ") if last and (name == "tests" or part["status"] != "ok") else ""
    more = [f"    {line}" for line in last[-6:-1]] if part["status"] not in ("ok", "timed out") else []
    return [f"{name:24} {part['status']} in {part['seconds']:.0f} s  {note[:160]}", *more]


def check_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for shape, results in found(outcomes, "checks").items():
        checks = results["checks"]
        wrong, unequal = ([c for c in checks if not c[key]] for key in ("right", "rows_equal"))
        errors = {c["name"]: c["error"] for c in checks if c["error"] is not None}
        worst = max(errors, key=errors.__getitem__, default="")
        title = f"checks {shape}".strip()
        lines.append(f"{title}: {len(checks) - len(wrong)} of {len(checks)} right ({results['bodies']})")
        lines[-1] += f", rows differ in {len(unequal)}, {results['not_reached']} not reached; largest error "
        lines[-1] += f"{errors.get(worst, math.nan):.1e} ({worst})"
        for c in wrong[:12]:
            rows = "rows equal" if c["rows_equal"] else "rows differ"
            lines.append(f"    wrong: {c['name']}: {c['reason'] or rows}, error {c['error']}"[:180])
    return lines


def exact_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for kind in ("exact", "compiled"):
        for results in found(outcomes, kind).values():
            rows = results["results"]
            texts, different = (sum(row[key] for row in rows.values()) for key in ("texts", "different"))
            lines.append(f"{kind}: {different} of {texts} texts differ from the autoregressive ones")
            wrong = {name: row for name, row in rows.items() if row["different"]}
            lines += [f"    {name}: {row['different']} of {row['texts']}" for name, row in wrong.items()]
    return lines


def layer_seconds(linears: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds of all linears of a layer together, by contestant and number of rows."""
    rows = [entry["linears"] for entry in linears.values() if isinstance(entry, dict)]
    kinds = [kind for kind in rows[0] if all(kind in row for row in rows)] if rows else []
    return {k: {n: sum(row[k]["seconds"][n] for row in rows) for n in rows[0][k]["seconds"]} for k in kinds}


def peer_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for kind, pairs in (("kernels", PEERS), ("gemlite", [("w4a16", "gemlite int4")])):
        for shape, results in found(outcomes, kind).items():
            seconds = layer_seconds(results["results"])
            for ours, peer in pairs:
                if ours in seconds and peer in seconds:
                    ratios = {n: seconds[peer][n] / t for n, t in seconds[ours].items()}
                    cells = "".join(f"{ratio:7.2f}" for ratio in ratios.values())
                    lines.append(f"    {shape:14} {ours + ' / ' + peer:24}{cells}")
                    head = "".join(f"{n:>7}" for n in ratios)
    title = "ours against peers: how many times as fast, linears of a layer together, by n"
    return [f"{title}\n{'':43}{head}", *lines] if lines else []


def share_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for shape, results in found(outcomes, "kernels").items():
        seconds, content = layer_seconds(results["results"]), results["results"]
        rows = [entry["linears"] for entry in content.values() if isinstance(entry, dict)]
        for kind, times in seconds.items():
            nbytes = sum(row[kind]["bytes"] for row in rows)
            shares = shares_of_copy(times, nbytes, content["copy_bandwidth"])
            cells = "".join(f"{shares[n]:7.2f}" for n in ("1", "8", "16", "64"))
            lines.append(f"    {shape:14} {kind:24}{cells}")
        for name, entry in content.items():
            failed = entry.get("failed", {}) if isinstance(entry, dict) else {}
            lines += [f"    {name} {kind} FAILED: {why}"[:180] for kind, why in failed.items()]
    title = "share of the copy bandwidth, linears of a layer together, n = 1, 8, 16, 64"
    return [title, *lines] if lines else []


def cost_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for shape, results in found(outcomes, "cost").items():
        for precision, costs in results["results"].items():
            for key, share in (("verification", "share_of_copy"), ("on_device", "share_of_copy_on_device")):
                if key in costs:
                    times, label = costs[key], "graph" * (key == "on_device")
                    ratios = "".join(f"{times[n] / times['1']:7.2f}" for n in ("8", "16", "60"))
                    first = f"{times['1'] * 1e3:9.2f} ms{costs[share]['1']:7.2f}"
                    lines.append(f"    {shape:14} {precision:7}{label:8}{first}{ratios}")
    title = "whole steps: T(1), its share of the copy bandwidth, T(8), T(16), T(60) / T(1)"
    return [f"{title}; `graph`: without the host", *lines] if lines else []


def method_lines(outcomes: dict[str, dict]) -> list[str]:
    lines = []
    for shape, results in found(outcomes, "synthetic").items():
        for precision, rows in results["results"].items():
            speeds = {name: row["speedup"][1] for name, row in rows.items()}
            cells = "  ".join(f"{name} {speed:.2f}" for name, speed in speeds.items() if name != BASE)
            lines.append(f"    {shape} {precision}: {cells}")
            if "hierarchical" in speeds and "tree of 60" in speeds:
                over = speeds["hierarchical"] / speeds["tree of 60"]
                ours = f"{speeds['hierarchical']:.2f} over autoregressive, {over:.2f} over the tree of 60"
                paper = "SpecMQuant, Llama-3-70B W4A16: {autoregressive}, {tree of 60}".format_map(PAPER)
                lines.append(f"        hierarchical: {ours} ({paper})")
    title = f"speedups over {BASE} ({SYNTHETIC})"
    return [title, *lines] if lines else []


def went_wrong(outcomes: dict[str, dict]) -> bool:
    """Did a part fail, one of our kernels not run, or a text differ? What was skipped has not failed."""
    if any(part["status"] in ("failed", "timed out") for part in outcomes.values()):
        return True
    texts = (found(outcomes, "exact") | found(outcomes, "compiled")).values()
    linears = [entry for r in found(outcomes, "kernels").values() for entry in r["results"].values()]
    failed = [kind for entry in linears if isinstance(entry, dict) for kind in entry.get("failed", {})]
    ours = {"bf16", *PRECISIONS} & set(failed)
    return bool(ours) or any(row["different"] for part in texts for row in part["results"].values())


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, help="folder for the results")
    p.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    p.add_argument("--parts", help="which, with commas (default: all but tune)")
    p.add_argument("--tune", action="store_true", help="tune, too")
    p.add_argument("--shapes", default=DEFAULT_SHAPES, help=f"of {', '.join(SHAPES)}, with commas")
    p.add_argument("--device", default="cuda", help="cuda; cpu to try it out")
    p.add_argument("--only", choices=("checks", "tune"), help="this part, in this process; JSON comes last")
    p.add_argument("--seconds", type=float, default=1e9, help="--only: begin nothing after so many")
    return p


def run_only(args: argparse.Namespace) -> int:
    configs = {shape: SHAPES[shape] for shape in args.shapes.split(",")}
    run = run_checks if args.only == "checks" else run_tuning
    results = run(configs, args.device, args.seconds)
    print(json.dumps(results))
    return int(args.only == "checks" and not all(check["right"] for check in results["checks"]))


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    shapes = args.shapes.split(",")
    unknown = set(shapes) - set(SHAPES)
    if unknown:
        parser.error(f"--shapes: {', '.join(unknown)} is none of {', '.join(SHAPES)}")
    if on_gpu(args.device) and not torch.cuda.is_available():
        print("gpu_pass.py: there is no GPU here, so nothing is run")
        return 0
    if args.only:
        return run_only(args)
    if args.output is None:
        parser.error("--output: which folder are the results for?")
    parts = plan(shapes, args.device)
    kinds = {part.kind for part in parts}
    chosen = set(args.parts.split(",")) if args.parts else kinds - {"tune"}
    if chosen - kinds:
        parser.error(f"--parts: {', '.join(chosen - kinds)} is none of {', '.join(sorted(kinds))}")
    chosen |= {"tune"} if args.tune else set()
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"report": "gpu_pass", "settings": {"minutes": args.minutes, "shapes": shapes}}
    settings |= machine(args.device)
    outcomes = run_all([part for part in parts if part.kind in chosen], args.minutes, folder, settings)
    print("\n" + "\n".join(table(outcomes)), flush=True)
    return int(went_wrong(outcomes))


if __name__ == "__main__":
    sys.exit(main())
