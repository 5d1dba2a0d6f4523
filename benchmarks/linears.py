"""linears.py: the linears of real models alone, next to the operators of PyTorch and of others.

    python bench.py kernels     # 1 to 64 rows, all contestants
    python bench.py hadamard    # what online rotations add

The one idea: a linear of few rows is bound by reading its weight. Copies of the weight, together larger than
the cache, take turns, and the result is a share of the bandwidth, which can be compared across machines.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from benchmarks.common import split
from benchmarks.shapes import SHAPES, linears_of, random_rows, random_weight
from benchmarks.timing import (
    copy_bandwidth,
    finish,
    first_line,
    interleave,
    interleave_on_device,
    on_gpu,
    read_all,
    shares_of_copy,
)
from packing import PRECISIONS, best_group
from rotation import hadamard

MOST_COPIES = 256  # of a tiny weight, which stays in the cache
LARGER_THAN_CACHE = {"cpu": 200e6, "cuda": 1e9}  # bytes of the weights that take turns
Multiply = Callable[[Tensor, Any], Tensor]  # x [n, in] and a weight -> [n, out]
Contestant = tuple[Any, Multiply]  # its weight, and how to multiply with it


def torch_on_cpu(out: int, inputs: int) -> dict[str, Callable[[], Contestant]]:
    """PyTorch's own 4-bit and 8-bit operators, each made on demand."""
    group = best_group([inputs])

    def int4() -> Contestant:
        numbers = torch.randint(0, 16, (out, inputs), dtype=torch.int32)
        weight = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
        scales = torch.rand(inputs // group, out, 2, dtype=torch.bfloat16)
        return (weight, scales), lambda x, w: torch._weight_int4pack_mm_for_cpu(x, w[0], group, w[1])

    def int8() -> Contestant:
        weight = torch.randint(-127, 128, (inputs, out), dtype=torch.int8)
        return weight, lambda x, w: torch._int_mm(x.to(torch.int8), w)

    return {"torch int4": int4, "torch int8 x int8": int8}


def others_on_gpu(out: int, inputs: int) -> dict[str, Callable[[], Contestant]]:
    """tinygemm, which is PyTorch's 4-bit operator, and gemlite, where it is installed (in its float16)."""

    def int4() -> Contestant:
        numbers = torch.randint(0, 256, (out, inputs // 2), dtype=torch.uint8, device="cuda")
        weight = torch.ops.aten._convert_weight_to_int4pack(numbers, 8)
        scales = torch.rand(inputs // 128, out, 2, dtype=torch.bfloat16, device="cuda")
        return (weight, scales), lambda x, w: torch.ops.aten._weight_int4pack_mm(x, w[0], 128, w[1])

    def gemlite() -> Contestant:
        from gemlite.core import DType, GemLiteLinear

        linear = GemLiteLinear(4, 128, inputs, out, input_dtype=DType.FP16, output_dtype=DType.FP16)
        numbers = torch.randint(0, 16, (out, inputs), dtype=torch.uint8, device="cuda")
        scales, zeros = torch.rand(2, out, inputs // 128, dtype=torch.float16, device="cuda")
        linear.pack(numbers, scales, zeros, None)
        return linear, lambda x, w: w(x.half())

    installed = importlib.util.find_spec("gemlite") is not None
    return {"torch int4": int4} | ({"gemlite int4": gemlite} if installed else {})


def contestants(out: int, inputs: int, device: str = "cpu") -> dict[str, Callable[[], Contestant]]:
    """What multiplies with a weight of this shape, ours and others', each made on demand."""

    def ours(precision: str) -> Contestant:
        bits = 16 if precision == "bf16" else PRECISIONS[precision][1]
        weight = random_weight(out, inputs, precision, device)
        return weight, lambda x, w: kernels.linear(x, *w, out_features=out, activation_bits=bits)

    def bf16() -> Contestant:
        return random_rows(out, inputs, "bf16", device)[0], torch.nn.functional.linear

    entries = {precision: partial(ours, precision) for precision in ("bf16", *PRECISIONS)}
    entries["torch bf16"] = bf16
    return entries | (others_on_gpu(out, inputs) if on_gpu(device) else torch_on_cpu(out, inputs))


def tensors_of(weight: object) -> list[Tensor]:
    """All tensors of a contestant's weight."""
    if isinstance(weight, torch.nn.Module):
        return [*weight.parameters(), *weight.buffers()]
    return [t for t in (weight if isinstance(weight, tuple) else (weight,)) if t is not None]


class Entry(NamedTuple):
    """A contestant that works here: copies of its weight, together larger than the cache."""

    weights: list
    multiply: Multiply
    bytes: int  # of one weight

    def in_turn(self, x: Tensor) -> Callable[[], Tensor]:
        """Multiplies x with the next copy at every call."""
        weights = cycle(self.weights)
        return lambda: self.multiply(x, next(weights))


def make_entries(
    makers: dict[str, Callable[[], Contestant]], inputs: int, sizes: list[int], device: str
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The contestants that work for all numbers of rows, and the reasons why others do not, by name."""
    entries, failed = {}, {}
    for name, make in makers.items():
        try:
            weight, multiply = make()
            for n in sizes:
                multiply(torch.randn(n, inputs, device=device).bfloat16(), weight)
            finish(device)
        except Exception as error:  # others' code can fail in any way; the reason is reported
            failed[name] = first_line(error)
            continue
        size = sum(t.nbytes for t in tensors_of(weight))
        count = min(int(LARGER_THAN_CACHE[torch.device(device).type] / size), MOST_COPIES)
        entries[name] = Entry([weight, *(copy.deepcopy(weight) for _ in range(count))], multiply, size)
    return entries, failed


@torch.no_grad()
def measure_linear(
    out: int, inputs: int, sizes: list[int], repeats: int, device: str, bandwidth: float, chosen: list[str]
) -> tuple[dict[str, dict], dict[str, str]]:
    """Seconds of every contestant for every number of rows, taking turns, with the bytes of its weight and
    its shares of the copy bandwidth; and why others did not take part. `chosen`: names; [] is all."""
    makers = contestants(out, inputs, device)
    makers = {name: make for name, make in makers.items() if not chosen or name in chosen}
    entries, failed = make_entries(makers, inputs, sizes, device)
    rows: dict[str, dict] = {name: {"seconds": {}} for name in entries}
    calls = max((len(entry.weights) for entry in entries.values()), default=1)
    for n in sizes:
        x = torch.randn(n, inputs, device=device).bfloat16()
        turns = {name: entry.in_turn(x) for name, entry in entries.items()}
        for name, seconds in interleave_on_device(turns, repeats, device, max(calls, 32)).items():
            rows[name]["seconds"][n] = seconds
    one_row = torch.randn(1, inputs, device=device).bfloat16()
    for name, entry in entries.items():
        tensors = cycle([tensors_of(weight) for weight in entry.weights])
        pair = {"read": lambda t=tensors: read_all(next(t)), "multiply": entry.in_turn(one_row)}
        count = repeats if len(entry.weights) > 1 else 3 * repeats
        seconds = interleave_on_device(pair, count, device, max(calls, 32))
        rows[name]["bytes"] = entry.bytes
        rows[name]["read_bandwidth"] = entry.bytes / seconds["read"]
        rows[name]["share_of_bandwidth"] = seconds["read"] / seconds["multiply"]
        rows[name]["share_of_copy"] = shares_of_copy(rows[name]["seconds"], entry.bytes, bandwidth)
        rows[name]["relative"] = {n: t / rows[name]["seconds"][1] for n, t in rows[name]["seconds"].items()}
    return rows, failed


def report_kernels(args: argparse.Namespace, save: Callable[[dict], None] = lambda rows: None) -> dict:
    """Every linear of real models, n = 1 to 64, with nothing before or after it: time, T(n) / T(1), and
    shares of the bandwidth with which its bytes can be read and of the copy bandwidth: see bench.py. `save`
    is given the results after each linear."""
    kernels.load()
    bandwidth = copy_bandwidth(args.device)
    results: dict[str, Any] = {"copy_bandwidth": bandwidth}
    print(f"copying {bandwidth / 1e9:.1f} GB/s")
    for shape in split(args.shapes):
        for name, (out, inputs) in linears_of(SHAPES[shape]).items():
            chosen = split(args.contestants) if args.contestants else []
            settings = (args.repeats, args.device, bandwidth, chosen)
            rows, failed = measure_linear(out, inputs, [1, 2, 4, 8, 16, 32, 64], *settings)
            results[f"{shape} {name}"] = {"out": out, "in": inputs, "linears": rows}
            results[f"{shape} {name}"] |= {"failed": failed} if failed else {}
            print_linear(f"{shape} {name}", results[f"{shape} {name}"])
            save(results)
    results["overhead_seconds"] = call_overhead(args.device)
    print(f"\na call of the smallest linear takes {results['overhead_seconds'] * 1e6:.1f} microseconds")
    return results


def print_linear(name: str, result: dict) -> None:
    print(f"\n{name}: {result['out']} x {result['in']}")
    sizes = list(next(iter(result["linears"].values()))["relative"])[1:] if result["linears"] else []
    print(f"{'':18}{'MB':>7}{'GB/s':>7}{'ms, n=1':>9}{'of reading':>11}{'of copying':>11}   ", end="")
    print(f"T(n) / T(1), n = {sizes}")
    for kind, row in result["linears"].items():
        ratios = " ".join(f"{row['relative'][n]:6.2f}" for n in sizes)
        megabytes, reading, first = row["bytes"] / 1e6, row["read_bandwidth"] / 1e9, row["seconds"][1] * 1e3
        shares = f"{row['share_of_bandwidth']:11.2f}{row['share_of_copy'][1]:11.2f}"
        print(f"{kind:18}{megabytes:7.1f}{reading:7.1f}{first:9.3f}{shares}   {ratios}", flush=True)
    for kind, reason in result.get("failed", {}).items():
        print(f"{kind:18}does not run here: {reason}", flush=True)


def call_overhead(device: str = "cpu") -> float:
    """Seconds of a linear with next to no work, which is what a call costs; on a GPU, the host's share."""
    if on_gpu(device):
        x, weight = torch.randn(1, 256, device=device).bfloat16(), random_weight(256, 256, "bf16", device)
        call = partial(kernels.linear, x, *weight, out_features=256)
    else:
        x, weight = torch.randn(1, 16).bfloat16(), random_weight(16, 16, "bf16")
        arguments = (x, *weight, None, None, None, 0.0, False, None, 1, 1, None, 16, 16, False)
        call = partial(torch.ops.gpt_spec.linear.default, *arguments)
    return interleave({"call": lambda: [call() for _ in range(1000)]}, 9, device=device)["call"] / 1000


def report_hadamard(args: argparse.Namespace) -> dict:
    """What the online rotations add to o_proj and down_proj of real models, w4a16, groups of 128."""
    rows = {}
    for shape in split(args.shapes):
        config = SHAPES[shape]
        heads = config.num_heads * config.head_dim
        for name, inputs, stride in (
            ("o_proj", heads, config.head_dim),
            ("down_proj", config.intermediate_size, 1),
        ):
            for n, row in rotation_costs(config.hidden_size, inputs, stride).items():
                rows[f"{shape} {name} n={n}"] = row
                plain, ratio = row["seconds"] * 1e3, row["rotated_seconds"] / row["seconds"]
                print(
                    f"{shape:13} {name:9} n = {n:2}: {plain:7.3f} ms, rotated {ratio:.3f} times", flush=True
                )
    return rows


def rotation_costs(out: int, inputs: int, stride: int) -> dict[int, dict[str, float]]:
    """Seconds of a linear, plain and with rotated inputs, by number of rows."""
    copies = max(2, int(LARGER_THAN_CACHE["cpu"] / (out * inputs / 2)))
    weights, rows = cycle([random_weight(out, inputs, "w4a16") for _ in range(copies)]), {}
    kinds = {"seconds": None, "rotated_seconds": (*hadamard(inputs // stride), stride)}

    def multiply(x: Tensor, rotation: tuple[Tensor, int, int] | None) -> Tensor:
        return kernels.linear(x, *next(weights), out_features=out, rotation=rotation)

    for n in (1, 8, 64):
        x = torch.randn(1, n, inputs).bfloat16()
        rows[n] = interleave({name: partial(multiply, x, kind) for name, kind in kinds.items()}, 60)
    return rows
