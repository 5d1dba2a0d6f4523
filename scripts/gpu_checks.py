"""gpu_checks.py: every kernel against its slow twin at the shapes of real models, and its rows bitwise equal.

    python scripts/gpu_checks.py --shapes llama-3-8b --seconds 60
    python scripts/gpu_checks.py --shapes tiny --device cpu --output checks.json

For all shapes first what matters most. A check that raises an error has failed, and the others go on; after
an error that a GPU does not recover from, in a new process. With --output, what is known so far is on disk
after each check. The last line is JSON; the exit status is 1 if a check is not right.

The one idea: a check takes a device and a shape and says how far a kernel is from its twin. So the tests run
all of them on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels  # noqa: E402
from benchmarks.common import write_json  # noqa: E402
from benchmarks.machine import kernels_in_use  # noqa: E402
from benchmarks.shapes import SHAPES, linears_of, packed, random_rows  # noqa: E402
from benchmarks.timing import finish, first_line  # noqa: E402
from drafts import tree_geometry  # noqa: E402
from model import ModelConfig  # noqa: E402
from packing import PRECISIONS  # noqa: E402
from rotation import Rotations  # noqa: E402
from sampling import Sampling  # noqa: E402

ROWS = (1, 2, 8, 16, 64)
CHECKED = max(ROWS)


@dataclass
class Check:
    """What a check found."""

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


Checks = Iterator[tuple[str, str, Callable[[], Check]]]  # their names, the operations, and how


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
    return Check(error, tolerance, rows_agree(multiply, whole))


def check_attention(config: ModelConfig, device: str, slots: int = 1200) -> Check:
    """A chain and a tree in a batch of three texts. Rows: the first nodes without the others, a text alone,
    and a path scattered over the tree against the same keys side by side."""
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
    past = slots - CHECKED - 8
    length = torch.tensor([past, past // 2, 37], device=device)
    q = torch.randn(3, CHECKED, heads, size, device=device).bfloat16()
    keys, values = torch.randn(2, 3, slots, groups, size, device=device).bfloat16()
    node = torch.arange(CHECKED, device=device)
    comb = torch.where(node % 2 == 0, node - 2, node - 1)  # even nodes are a path, odd ones leaves
    comb = comb.clamp(min=-1)
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
    return Check(worst, 1e-2, bool(equal))


def check_rows(ours: Callable, exact: Callable, x: Tensor, tolerance: float) -> Check:
    """An operation on the rows of x, and its slow twin."""
    whole = ours(x)
    equal = rows_agree(lambda rows: ours(x[rows]), whole)
    return Check(difference(whole, exact(x)), tolerance, equal)


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
    return Check(difference(ours.cpu(), exact), 0.0, equal)


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
    return Check(difference(ours.cpu(), exact), 0.0, equal)


def check_logsumexp(config: ModelConfig, device: str) -> Check:
    """The same bits as on the CPU, and close to what PyTorch makes of it."""
    x = 4 * torch.randn(3, 2, config.vocab_size, device=device)
    ours, alone = kernels.logsumexp(x), kernels.logsumexp(x[1:2, 1:])
    equal = torch.equal(ours.cpu(), kernels.logsumexp_reference(x.cpu()))
    equal &= torch.equal(alone, ours[1:2, 1:])
    return Check(difference(ours, x.double().logsumexp(-1, keepdim=True)), 2e-6, equal)


def check_top_k(config: ModelConfig, device: str) -> Check:
    """Values and places, with many equal numbers."""
    x = (8 * torch.randn(CHECKED, config.vocab_size, device=device)).round() / 8

    def both(x: Tensor, body: Callable = kernels.top_k) -> Tensor:
        values, places = body(x, 8)
        return torch.cat((values.double(), places.double()), dim=-1)

    return check_rows(both, partial(both, body=kernels.top_k_reference), x, 0.0)


def check_move(config: ModelConfig, device: str) -> Check:
    """Slots of all layers' caches, bit for bit, those that nothing is moved to as well."""
    shape = (3, 200, config.num_kv_heads, config.head_dim)
    caches = list(torch.randn(4, *shape, device=device).bfloat16())
    expected, length = [cache.clone() for cache in caches], torch.tensor([0, 37, 130], device=device)
    path = torch.stack([torch.randperm(60)[:7].sort().values for _ in range(3)]).to(device)
    kernels.move_slots(caches, path, length)
    kernels.move_reference(expected, path, length)
    worst = max(difference(ours, exact) for ours, exact in zip(caches, expected))
    return Check(worst, 0.0, all(map(torch.equal, caches, expected)))


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
    return Check(max(difference(a.cpu(), b) for a, b in zip(ours, exact)), 0.0, equal)


def check_store(config: ModelConfig, device: str) -> Check:
    """Into caches of three texts, then into a view of one row. Slots that nothing is stored to count, too."""
    _, k, v, *_ = between_linears(config, device)
    caches = torch.randn(2, 3, 200, *k.shape[2:], device=device).bfloat16()
    expected, slots = caches.clone(), torch.rand(2, 3, 200, device=device).argsort(dim=-1)[..., :CHECKED]
    for into, body in ((caches, kernels.store), (expected, kernels.store_reference)):
        body(*into, k, v, slots[0])
        body(*into[:, 1:2], v[1:2], k[1:2], slots[1, 1:2])
    return Check(difference(caches, expected), 0.0, torch.equal(caches, expected))


def small_checks(config: ModelConfig, device: str) -> Checks:
    """Everything but linears."""
    c, rotations = config, Rotations.of(config)
    yield "attention", "attention", partial(check_attention, c, device)
    weight = torch.rand(c.hidden_size, device=device).bfloat16()
    norms = [partial(normalized, weight, body) for body in (kernels.rms_norm, kernels.rms_norm_reference)]
    x = 3 * torch.randn(CHECKED, c.hidden_size, device=device).bfloat16()
    yield "rms_norm", "rms_norm", partial(check_rows, *norms, x, 1e-2)
    inputs = {"hidden": c.hidden_size, "heads": c.num_heads * c.head_dim, "inner": c.intermediate_size}
    for name, size in inputs.items():
        arguments = getattr(rotations, name).to(device).arguments
        bodies = [partial(turned, arguments, body) for body in (kernels.rotate, rotate_exactly)]
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
            x = torch.randn(CHECKED, size, device=device).to(dtype)
            yield f"rotate {name} {str(dtype)[6:]}", "rotate", partial(check_rows, *bodies, x, tolerance)
    for name, rules in RULES.items():
        for note, equal_ones in (("", False), (", equal logits", True)):
            yield f"pick {name}{note}", "pick", partial(check_pick, rules, equal_ones, c, device)
    others = {"gumbel": check_gumbel, "logsumexp": check_logsumexp, "top_k": check_top_k}
    others |= {"rope": check_rope, "store": check_store, "move": check_move}
    yield from ((name, name, partial(check, c, device)) for name, check in others.items())


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

    linears, note = linears_of(config), ", turned" if turned else ""
    for name in names:
        for form in forms:
            if form.precision[:2] != "w4" or linears[name][1] % form.group == 0:
                yield f"{name} {form.name}{note}", f"linear {form.name}{note}", partial(check, name, form)


def head_checks(config: ModelConfig, device: str) -> Checks:
    size = (config.vocab_size, config.hidden_size)
    for form in (*FORMS[:2], *FORMS[3:]):  # it never meets 4-bit activations
        how = partial(check_linear, *size, form, {}, device, float32_out=True)
        yield f"lm_head {form.name}", f"linear {form.name}", how


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
            yield from ((f"{shape} {name}", *rest) for name, *rest in checks(config))


# --------------------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------------------


def attempt(how: Callable[[], Check]) -> Check:
    """One that raises has failed, whatever it raises: the report is what this is for."""
    torch.manual_seed(0)
    try:
        return how()
    except Exception as error:
        return Check(math.nan, 0.0, False, first_line(error))


def is_lost(device: str) -> bool:
    """Does nothing run there any more? An access to memory that is not its own costs a process its GPU."""
    try:
        finish(device)
    except Exception:  # of whatever kind
        return True
    return False


@torch.no_grad()
def run_checks(
    configs: dict[str, ModelConfig],
    device: str,
    seconds: float,
    known: Iterable[dict] = (),
    save: Callable[[dict], None] = lambda results: None,
) -> dict[str, Any]:
    """Every check for which there is time, but those that are `known`. It ends early, with `lost`, where the
    device is. `save` is given the results after each check, and before it, with the operation that is
    `running`."""
    kernels.load()
    begin, names = time.monotonic(), {check["name"] for check in known}
    results = {"bodies": kernels_in_use(device), "not_reached": 0, "checks": list(known)}
    for name, operation, how in all_checks(configs, device):
        if name in names:
            continue
        if time.monotonic() - begin > seconds:
            results["not_reached"] += 1
            continue
        save(results | {"running": operation, "since": time.time()})  # should it never end
        check = attempt(how)
        results["checks"].append({"name": name, "operation": operation} | check.as_json())
        verdict = "" if check.right else "   WRONG " + (check.reason or f"(rows equal: {check.rows_equal})")
        print(f"{name:60} {check.error:.1e}{verdict}", flush=True)
        if check.reason and is_lost(device):
            results["lost"] = True
        save(results)
        if "lost" in results:
            break
    return results


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default="llama-3-8b", help=f"of {', '.join(SHAPES)}, with commas")
    p.add_argument("--device", default="cuda", help="cuda; cpu to try it out")
    p.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so many")
    p.add_argument("--output", type=Path, help="write the results as JSON to this file")
    p.add_argument("--resume", action="store_true", help="go on after what --output has")
    return p


def main(argv: list[str] | None = None) -> int:
    args, begin = build_parser().parse_args(argv), time.monotonic()
    known = json.loads(args.output.read_text())["checks"] if args.resume else []

    def save(results: dict) -> None:
        if args.output:
            write_json(args.output, results)

    configs = {shape: SHAPES[shape] for shape in args.shapes.split(",")}
    results = run_checks(configs, args.device, args.seconds, known, save)
    if args.output and "lost" in results:  # the others in a process that has its device
        again = ["--resume", "--seconds", str(args.seconds - (time.monotonic() - begin))]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv, *again])
    save(results)
    print(json.dumps(results))
    return int(not all(check["right"] for check in results["checks"]))


if __name__ == "__main__":
    sys.exit(main())
