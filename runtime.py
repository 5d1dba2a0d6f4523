"""runtime.py: how functions of tensors are run: on a GPU compiled by `torch.compile` and launched by CUDA
graphs, on a CPU from a tape (`tape.py`).

The one idea: the engine is written as plain functions of tensors, and this file decides how they run. A
function goes in, a function with the same arguments and results comes out. Either way it is recorded once for
each set of shapes, and then called again without Python. `Runtime` and what records know no models and no
methods; `warm_up` asks a level for everything that it may run.

    runtime = Runtime(compile=True, device=torch.device("cuda"))
    fast = runtime.recorded(runtime.compiled(function))
"""

from __future__ import annotations

import gc
import inspect
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor

import kernels
from costs import Stopwatch, assume_costs, measure_costs
from tape import Tape, is_recording


@dataclass(frozen=True)
class Runtime:
    """How the parts of a decoder run."""

    compile: bool  # if not, every operator is called from Python
    device: torch.device
    clock: Callable[[], float] | None = None  # that all processes of a model read alike
    # What functions go by beside their arguments: there is a recording of its own for each content.
    mode: list[Any] = field(default_factory=list)

    def stopwatch(self) -> Stopwatch:
        """For what is decided by time."""
        return Stopwatch(self.clock or time.perf_counter)

    def compiled(self, function: Callable) -> Callable:
        """The function, compiled for every shape that it meets; itself where nothing is compiled. Of a
        method, what `without_owner` makes of it.

        On a CPU nothing is: all that takes time there is in the operators of kernels.py, and a tape calls
        these as fast as compiled code does, from the first step on. To compile thirty layers took a minute.
        """
        if not self.compile or self.device.type == "cpu":
            return without_owner(function)
        import torch._dynamo.config  # slow to import, and only needed here

        # One function serves every number of nodes, model and batch size of a process: that is not the
        # runaway recompilation which the default limit of 8 guards against.
        torch._dynamo.config.recompile_limit = 256
        # Round where the code says so. Otherwise fusion drops some roundings, depending on the number of
        # rows, and the text would depend on it, too.
        options = {"emulate_precision_casts": True}
        # Look for the graph to run among its own only; before PyTorch 2.13, among those of all decoders.
        can_isolate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
        isolate = {"isolate_recompiles": True} if can_isolate else {}
        compile = partial(torch.compile, fullgraph=True, dynamic=False, options=options, **isolate)
        return without_owner(function, compile)

    @property
    def records(self) -> bool:
        """Do CUDA graphs launch the parts of a step? Not with `--compile none`, nor on a CPU, nor with single
        operations on references, which may ask the host."""
        cuda = self.compile and self.device.type == "cuda" and kernels.load_cuda()
        return cuda and not kernels.ON_REFERENCE

    def recorded(self, function: Callable) -> Callable:
        """The function as CUDA graphs or tapes; itself where nothing is recorded. Of a method, what
        `without_owner` makes of it."""
        function = without_owner(function)
        if self.records:
            return Recorded(function, self.pool, self.mode)
        tapes = self.compile and self.device.type == "cpu" and kernels.load()  # tape.cpp comes with them
        return Taped(function, self.mode) if tapes else function

    @cached_property
    def pool(self) -> tuple[int, int]:
        """The memory that all graphs share: none needs its own any more when the next one is launched."""
        return torch.cuda.graph_pool_handle()


def no_grad(function: Callable) -> Callable:
    """`torch.no_grad`, and out of the inference mode that a caller may be in: what a decoder allocates there
    could not be written to outside."""
    usual = torch.no_grad()(function)

    @wraps(function)
    def in_either_mode(*arguments, **named):
        if not torch.is_inference_mode_enabled():
            return usual(*arguments, **named)
        with torch.inference_mode(False):
            return usual(*arguments, **named)

    return in_either_mode


def without_owner(method: Callable, change: Callable = lambda function: function) -> Callable:
    """A method as a function that does not keep its object alive, after a `change` to what takes the object
    as its first argument. Any other function goes through `change` alone.

    A decoder keeps its compiled methods. If these kept the decoder, its caches would stay in memory until
    Python looks for cycles, which it does by the number of objects, not by their size.
    """
    if not isinstance(method, MethodType):
        return change(method)
    function, owner = change(method.__func__), weakref.ref(method.__self__)
    return lambda *arguments: function(owner(), *arguments)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python may collect an abandoned decoder at any allocation, which destroys its CUDA graphs. CUDA does
    not allow that while another graph is being recorded: the recording becomes invalid, without a word."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Taped:
    """A function of tensors, and of anything else that stays the same, as tapes: the first call with new
    shapes or arguments records one, and later ones play it. Inputs are not copied."""

    def __init__(self, function: Callable, mode: Sequence[Any] = ()):
        self.function, self.tapes, self.mode = function, {}, mode

    def __call__(self, *arguments) -> tuple[Tensor, ...]:
        if is_recording() or kernels.is_quick():
            return self.function(*arguments)
        key = (*self.mode, *key_of(arguments))
        if key in self.tapes:
            return self.tapes[key].run(arguments)
        self.tapes[key], results = Tape.record(self.function, *arguments)
        return results


def key_of(arguments: tuple) -> tuple:
    """What a tape is for: shapes, dtypes and places of tensors, which of them are the same one, and the
    other arguments."""
    places = [id(a) for a in arguments]
    return tuple(
        (a.shape, a.dtype, a.is_contiguous() or a.stride(), places.index(id(a)))
        if isinstance(a, Tensor)
        else (type(a), a)
        for a in arguments
    )


class Recorded:
    """A function of tensors, and of anything else that stays the same, as CUDA graphs: a step of a small
    model is hundreds of launches, which take the host longer than the GPU.

    The first call with new shapes or arguments runs the function, which compiles it. The second one records
    it, and later ones replay the graph. Inputs and results are copied, so callers own what they get. A
    function that is called while another one is being recorded becomes part of that one.
    """

    def __init__(self, function: Callable, pool: tuple[int, int], mode: Sequence[Any] = ()):
        self.function, self.pool, self.mode = function, pool, mode
        self.seen: set[tuple] = set()  # keys of calls that have run
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]] = {}

    def __call__(self, *arguments) -> tuple[Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            return self.function(*arguments)
        # Inputs are copied: where they lie, and which of them are the same, makes no difference.
        key = (*self.mode, *(tuple(a.shape) if isinstance(a, Tensor) else a for a in arguments))
        if key not in self.seen:
            results = self.function(*arguments)
            self.seen.add(key)  # not before: it may have been interrupted
            return results
        if key not in self.graphs:
            self.graphs[key] = self.record(arguments)
        graph, inputs, outputs = self.graphs[key]
        for mine, given in zip(inputs, (a for a in arguments if isinstance(a, Tensor))):
            mine.copy_(given)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    def record(self, arguments: tuple) -> tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]:
        arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        graph = torch.cuda.CUDAGraph()
        with no_garbage_collection(), torch.cuda.graph(graph, pool=self.pool):
            outputs = self.function(*arguments)
        return graph, [a for a in arguments if isinstance(a, Tensor)], outputs


class Fetch:
    """Tensors on their way to the host. On a GPU they are copied while the host goes on; `wait` then blocks
    until they are there."""

    def __init__(self, *tensors: Tensor | None):
        self.tensors, self.done = tensors, None
        if any(t is not None and t.is_cuda for t in tensors):
            self.tensors = tuple(None if t is None else to_host(t) for t in tensors)
            self.done = torch.cuda.Event()
            self.done.record()

    def wait(self) -> tuple[Tensor | None, ...]:
        if self.done is not None:
            self.done.synchronize()
        return self.tensors


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the memory of the host, which is there once the device has come to it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@no_grad
def warm_up(level: Any, costs: dict[str, float] | None = None) -> float:
    """Run everything once that decoding will run, so that it is compiled and recorded -> seconds. The level
    must hold no text yet. `costs`: what steps cost, if it was measured before; what is missing is added.
    """
    if kernels.is_quick():  # then nothing is recorded, nor measured
        assume_costs(level.drafter)
        return 0.0
    watch = Stopwatch()
    level.extend_blank()
    for _ in range(2 if level.setup.runtime.records else 1):  # the second time records
        if level.is_one_graph:
            level.step()
        else:
            warm_up_parts(level)
    if level.drafter.needs_costs:
        measure_costs(level, {} if costs is None else costs)
    return watch.seconds


def warm_up_parts(level: Any) -> None:
    level.drafter.warm_up(level.state)
    if level.setup.runtime.compile or level.drafter.needs_costs:
        for n in level.drafter.draft_sizes():
            level.commit(level.blank_draft(n))
