"""tape.py: a function of tensors, recorded once as a list of operator calls, and called again without Python.

On a GPU, CUDA graphs do this. On a CPU it is done here, for the same reason: a step of a small model is
hundreds of short operators, and Python needs longer to call them than they need to run. Nothing is compiled,
so the first step is as fast as any, and a model of thirty layers starts as soon as one of three.

    tape, results = Tape.record(function, *arguments)  # runs it once
    results = tape.run(arguments)  # makes the same calls again, for tensors of the same shapes

The one idea: what a recorded call needs is a constant, a tensor of the caller, or a tensor that an earlier
call made. Calls that depend on constants alone are made once, when the tape is made, and so are those that
nobody needs. What changes from step to step must be in tensors: what the function reads in Python stays as it
was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1}  # their numbers in C++


class Call(NamedTuple):
    """An operator, its arguments in the order of its schema, and the tensors that it returned."""

    op: torch._ops.OpOverload
    arguments: list[Any]
    results: list[Tensor | None]

    @property
    def inputs(self) -> list[Tensor]:
        return tensors_in(self.arguments)

    @property
    def written(self) -> list[Tensor]:
        """The arguments that the operator changes."""
        pairs = zip(self.op._schema.arguments, self.arguments)
        return tensors_in([value for place, value in pairs if place.alias_info and place.alias_info.is_write])

    @property
    def is_view(self) -> bool:
        """Are its results nothing but other looks at its arguments?"""
        returns = self.op._schema.returns
        return bool(returns) and not self.written and all(result.alias_info for result in returns)

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.op.tags


def tensors_in(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def storages(tensors: list[Tensor]) -> set[int]:
    """Where in memory they lie."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Recorder(TorchDispatchMode):
    """Writes down every operator that is called while it is active."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch would import its compiler at the first call, which takes seconds

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        returned = op(*args, **(kwargs or {}))
        results = tree_leaves(returned)
        if not all(each is None or isinstance(each, Tensor) for each in results):
            raise RuntimeError(f"{op} reads a tensor in Python, which a recorded function cannot")
        self.calls.append(Call(op, in_order(op, args, kwargs or {}), results))
        return returned


def in_order(op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """All arguments of a call, defaults included, in the order of the schema."""
    named = {argument.name: argument.default_value for argument in op._schema.arguments}
    named |= dict(zip(named, args)) | kwargs
    return list(named.values())


def is_recording() -> bool:
    """Is a tape being recorded? Then a function that has one of its own becomes part of it."""
    return isinstance(_get_current_dispatch_mode(), Recorder)


def without_constants(calls: list[Call], arguments: list[Tensor], results: tuple[Tensor, ...]) -> list[Call]:
    """The calls that have to be made every time.

    The others are looks at tensors that stay, such as a cache or a state, and what is made of nothing but
    numbers, unless someone writes there.
    """
    changed = storages([t for call in calls for t in call.written] + list(results))
    moving = {id(tensor) for tensor in arguments}  # made anew in every run
    numbers: set[int] = set()  # made of numbers alone
    kept = []
    for call in calls:
        made, inputs = tensors_in(call.results), [id(tensor) for tensor in call.inputs]
        if call.op is torch.ops.aten.lift_fresh.default and changed & storages(made):
            raise RuntimeError(
                "torch.tensor(...) is made once in a recorded function: do not change or return it"
            )
        pure = numbers.issuperset(inputs) and not call.is_random and not changed & storages(made)
        if moving.isdisjoint(inputs) and (call.is_view or (pure and not call.written)):
            numbers.update(id(tensor) for tensor in made if pure)
            continue
        kept.append(call)
        moving.update(id(tensor) for tensor in made if id(tensor) not in inputs)  # not what it changed
    return kept


def without_unused(calls: list[Call], results: tuple[Tensor, ...]) -> list[Call]:
    """The calls that change something, or make what a later call or the caller wants."""
    wanted, kept = {id(tensor) for tensor in results}, []
    for call in reversed(calls):
        made = {id(tensor) for tensor in tensors_in(call.results)}
        if call.written or call.is_random or not made or wanted & made:
            kept.append(call)
            wanted.update(id(tensor) for tensor in call.inputs)
    return kept[::-1]


class Tape:
    """The calls of one run of a function, to be made again."""

    def __init__(self, calls: list[Call], arguments: list[Tensor], results: tuple[Tensor, ...]):
        self.tape = torch.classes.gpt_spec.Tape()
        kept = without_unused(without_constants(calls, arguments, results), results)
        self.numbers = {id(tensor): i for i, tensor in enumerate(arguments)}
        used = {id(tensor): i for i, call in enumerate(kept) for tensor in call.inputs}
        used |= {id(tensor): len(kept) for tensor in (*arguments, *results)}  # to the end
        over = [[] for _ in range(len(kept) + 1)]  # the tensors that no call after this one needs
        for call in kept:
            for tensor in tensors_in(call.results):
                if id(tensor) in used and id(tensor) not in map(id, call.inputs):
                    over[used[id(tensor)]].append(self.numbers.setdefault(id(tensor), len(self.numbers)))
        for call, last in zip(kept, over):
            self.add(call, last)
        # A result may be a tensor that stays, or a look at one.
        self.outputs = [self.numbers.get(id(tensor)) for tensor in results]
        self.fixed = [None if id(tensor) in self.numbers else tensor for tensor in results]

    @staticmethod
    def record(function: Callable, *arguments) -> tuple[Tape, tuple[Tensor, ...]]:
        """Run the function, which returns a tuple of tensors -> what it called, and what it returned.
        RuntimeError where it looks at a tensor in Python."""
        with Recorder() as recorder:
            results = function(*arguments)
        return Tape(recorder.calls, [a for a in arguments if isinstance(a, Tensor)], results), results

    def add(self, call: Call, last: list[int]) -> None:
        """Put a call at the end; after it, the tensors `last` are not needed any more."""
        holes, arguments = [], []
        for i, value in enumerate(call.arguments):
            if isinstance(value, Tensor) and id(value) in self.numbers:
                holes += [i, -1, self.numbers[id(value)]]
                value = None
            elif isinstance(value, (list, tuple)):
                found = [(place, self.numbers.get(id(each))) for place, each in enumerate(value)]
                holes += [n for place, number in found if number is not None for n in (i, place, number)]
                value = [
                    None if number is not None else each for each, (_, number) in zip(value, found)
                ] or None
            arguments.append(FORMATS[value] if isinstance(value, torch.memory_format) else value)
        results = [self.numbers.get(id(tensor), -1) for tensor in call.results]
        name, _, overload = call.op.name().partition(".")
        self.tape.add(name, overload, arguments, holes, results, last)

    def run(self, arguments: tuple) -> tuple[Tensor, ...]:
        """Make the calls again, for arguments of the same shapes -> what the function would return."""
        inputs = [a for a in arguments if isinstance(a, Tensor)]
        made = iter(self.tape.run(inputs, [number for number in self.outputs if number is not None]))
        return tuple(next(made) if tensor is None else tensor for tensor in self.fixed)
