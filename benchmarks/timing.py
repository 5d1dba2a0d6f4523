"""timing.py: clocks that can be compared, on a CPU and on a GPU.

    interleave({"a": f, "b": g}, repeats=7)    # seconds of each, measured in turns

The one idea: functions that are compared take turns, so that all of them meet the machine in the same state,
and the median counts. A clock is read only when the device has finished.

On a GPU (--device cuda; scripts/gpu_pass.py runs a whole set) clocks are read when the device has finished.
`kernels` times CUDA graphs of many calls with events. T(n) and the units of drafts are timed as whole calls,
with the host's share; T(n) is also timed without it, as a graph. Tokens per second and speedups are right,
since a step counts when the host has read it. But in the *texts* only the host sees how a step splits into
drafting and verification. It goes on while the device still drafts, and it sees no split where a whole step
is one graph. So `drafting_seconds` (then 0), `predicted` (then too high) and the seconds of `levels` are the
host's.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from runtime import no_garbage_collection


def on_gpu(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def finish(device: str | torch.device) -> None:
    """Wait for a GPU. After that a clock may be read."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def interleave(
    functions: dict[Any, Callable[[], object]],
    repeats: int,
    burst: int = 1,
    device: str = "cpu",
    warm_up: int = 3,
    least: float = 0.0,
) -> dict[Any, float]:
    """Median seconds of each function. They take turns, so that all see the same machine; the first `warm_up`
    turns do not count.

    In a turn, `burst` calls follow each other, or as many as take `least` seconds, and the first half only
    warms up the caches. A call on a GPU ends when the device has finished.
    """
    times = {name: [] for name in functions}
    for turn in range(repeats + warm_up):
        for name, function in functions.items():
            calls: list[float] = []
            while len(calls) < burst or sum(calls) < least:
                finish(device)
                begin = time.perf_counter()
                function()
                finish(device)
                calls.append(time.perf_counter() - begin)
            times[name] += calls[len(calls) // 2 :] if turn >= warm_up else []
    return {name: median(values) for name, values in times.items()}


def interleave_on_device(
    functions: dict[Any, Callable[[], object]], repeats: int, device: str = "cpu", calls: int = 1
) -> dict[Any, float]:
    """`interleave` for calls that take the host longer than the device.

    On a GPU it puts events around CUDA graphs of `calls` calls each. All of a turn is queued at once, so that
    the device never waits for the host.
    """
    if not on_gpu(device):
        return interleave(functions, repeats)
    replays = {name: capture(function, calls, str(name)) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for turn in range(repeats + 2):
        next(iter(replays.values()))()  # meanwhile the host gets ahead
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in functions}
        for name, (start, end) in events.items():
            start.record()
            replays[name]()
            end.record()
        finish(device)
        for name, (start, end) in events.items():
            times[name] += [start.elapsed_time(end) / 1e3 / calls] if turn >= 2 else []
    return {name: median(values) for name, values in times.items()}


def capture(function: Callable[[], object], calls: int, name: str = "") -> Callable[[], object]:
    """Record so many calls as a CUDA graph -> its replay. A function that cannot be captured is called
    instead, and a line says so."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and allocates what a graph must not
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        with no_garbage_collection(), torch.cuda.graph(graph):
            for _ in range(calls):
                function()
    except RuntimeError as error:
        print(f"{name}: no CUDA graph, timed with its launches: {first_line(error)}", flush=True)
        return lambda: [function() for _ in range(calls)]
    return graph.replay


def first_line(error: BaseException) -> str:
    """Type and message of an error, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def copy_bandwidth(device: str = "cpu", size: int | None = None) -> float:
    """Bytes per second that copying one large tensor moves, read and written both counted. `size`: its bytes;
    by default several times what a last-level cache holds."""
    size = size or (2**31 if on_gpu(device) else 2**28)
    source = torch.randint(2**62, (2**12,), device=device).repeat(size // 2**15)  # random bytes, made quickly
    goal = torch.empty_like(source)
    seconds = interleave_on_device({"copy": lambda: goal.copy_(source)}, 7, device, calls=4)["copy"]
    return 2 * source.nbytes / seconds


def shares_of_copy(seconds: dict[str, float], nbytes: int, bandwidth: float) -> dict[str, float]:
    """Reading `nbytes` in each of these times: which share of the copy bandwidth is that?"""
    return {name: nbytes / value / bandwidth for name, value in seconds.items()}


def read_all(tensors: Iterable[Tensor | None]) -> None:
    """Read every byte and do next to nothing with it: no kernel is faster.

    On virtual machines bandwidth is a property of the pages, so it is measured on the very tensors that a
    kernel reads.
    """
    for tensor in tensors:
        if tensor is not None:
            tensor.flatten().view(torch.int64).sum()


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [statistics.quantiles(values, n=4)[i] for i in (0, 1, 2)] if len(values) > 1 else 3 * values


def shuffle_names(names: list[str], *turn: int) -> list[str]:
    """The same names in an order of the turn's own, so that none always follows the same other one, which
    leaves its data in the caches."""
    return random.Random(repr(turn)).sample(names, len(names))


def rotate_names(names: list[str], turn: int) -> list[str]:
    """The same names from another one on, so that each comes first in some turn."""
    return names[turn % len(names) :] + names[: turn % len(names)]
