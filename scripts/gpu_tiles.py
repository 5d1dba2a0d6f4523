"""gpu_tiles.py: launch configurations of the 4-bit linear on a GPU, those in use and others around them.

    python scripts/gpu_tiles.py --shapes llama-3-8b --seconds 60

The last line is JSON. The one idea: tiles must not depend on the number of rows, or a row's bits would, too.
So the best ones are those that lose least over all numbers of rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_checks import difference  # noqa: E402

import kernels  # noqa: E402
from benchmarks.common import write_json  # noqa: E402
from benchmarks.linears import LARGER_THAN_CACHE, Entry  # noqa: E402
from benchmarks.shapes import SHAPES, linears_of, random_rows  # noqa: E402
from benchmarks.timing import finish, first_line, interleave_on_device, on_gpu  # noqa: E402

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


def working(
    plans: list[Any], words: list[tuple], x: Tensor, out: int, deadline: float
) -> dict[str, Callable[[], Tensor]]:
    """How to multiply with every plan that does run and says what the first one says, as far as there is time
    to compile them."""
    functions, first = {}, None
    for plan in plans:
        if functions and time.monotonic() > deadline:
            break
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
def measure_tiles(out: int, inputs: int, device: str, deadline: float) -> dict[str, Any]:
    """Seconds with all tiles that work, by number of rows; which are used, and which are best for all."""
    import kernels_cuda  # needs Triton

    weight, scales, _ = random_rows(out, inputs, "w4a16", device)
    pair, size = (kernels.pack_words(weight), scales.T.contiguous()), weight.nbytes + scales.nbytes
    copies = int(LARGER_THAN_CACHE["cuda"] / size) if on_gpu(device) else 0
    words = [pair, *(tuple(t.clone() for t in pair) for _ in range(copies))]
    plans, seconds = candidates(kernels_cuda.tiles(out, inputs, 4)), {}
    for n in TUNED_ROWS:
        x = torch.randn(n, inputs, device=device).bfloat16()
        functions = working(plans, [(*pair, None) for pair in words], x, out, deadline)
        seconds[str(n)] = interleave_on_device(functions, 3, device, max(len(words), 32))
    return {"used": str(plans[0]), "seconds": seconds, "best_for_all": best_for_all(seconds)}


def best_for_all(seconds: dict[str, dict[str, float]]) -> str:
    """The tiles that lose least to the best ones, over all numbers of rows: they must not depend on these."""
    everywhere = set.intersection(*(set(times) for times in seconds.values()))
    return min(everywhere, key=lambda t: sum(times[t] / min(times.values()) for times in seconds.values()))


def print_tiles(name: str, row: dict[str, Any]) -> None:
    print(f"{name}: for all n {row['best_for_all']}")
    for n, times in row["seconds"].items():
        best, used = min(times, key=times.__getitem__), times[row["used"]] * 1e6
        print(f"    n = {n:>2}  {times[best] * 1e6:7.1f} us with {best}; used: {used:.1f}", flush=True)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default="llama-3-8b", help=f"of {', '.join(SHAPES)}, with commas")
    p.add_argument("--seconds", type=float, default=1e9, help="compile no more tiles after so many")
    p.add_argument("--output", type=Path, help="write the results as JSON to this file, after each linear")
    args = p.parse_args()
    deadline, results = time.monotonic() + args.seconds, {}
    linears = {
        f"{s} {name}": size for s in args.shapes.split(",") for name, size in linears_of(SHAPES[s]).items()
    }
    for name, size in linears.items():
        if time.monotonic() < deadline:
            results[name] = measure_tiles(*size, "cuda", deadline)
            print_tiles(name, results[name])
            if args.output:
                write_json(args.output, results)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
