"""prompts.py: what a caller hands over, as whole numbers and lists of them.

    token_lists(torch.tensor([[1, 300], [1, 301]]), None)  # -> [[1, 300], [1, 301]]
    token_lists("def f", tokenizer)                         # -> [[1, 822, 285]]

The one idea: tensors, arrays and NumPy's integers are welcome, and become plain Python at the door. Whatever
cannot is a `BadInput` of one line. Nothing here knows a model.
"""

from __future__ import annotations

import operator
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from model import BadInput

Prompts = Any  # a prompt, or several: token ids in a list, tensor or array, or a text; 2-D ids are a batch


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """An integer of Python, NumPy or PyTorch as one of Python's. Raises BadInput for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise BadInput(f"{name} is {short(value)}; it must be a whole number") from None
    if least is not None and number < least:
        raise BadInput(f"{name} is {number}; it must be at least {least}")
    return number


def number(name: str, value: Any) -> float:
    """A number of Python, NumPy or PyTorch as a float. Raises BadInput for anything else."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor of several
        raise BadInput(f"{name} is {short(value)}; it must be a number") from None


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise BadInput where a caller hands over something else than a `kind`."""
    if not isinstance(value, kind):
        raise BadInput(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}")


def whole_numbers(name: str, values: Any) -> list[int]:
    """A list, tensor or array of integers as a list. `name`: of one of them, for BadInput."""
    values = plain(values)
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise BadInput(f"{name}: {short(values)} is no list of whole numbers")
    values = list(values)
    return values if all(type(v) is int for v in values) else [whole_number(name, v) for v in values]


def token_lists(prompts: Prompts, tokenizer: Any) -> list[list[int]]:
    """Every prompt as token ids; of an empty list, none. Of a 2-D tensor, as transformers' `input_ids`, each
    row is a prompt, and padding counts as text. Raises BadInput for what is no prompt, and for texts without
    a tokenizer."""
    prompts = plain(prompts)
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise BadInput(f"prompts are token ids or texts, not {short(prompts)}")
    prompts = [prompts] if isinstance(prompts, str) else [plain(prompt) for prompt in prompts]
    if prompts and not isinstance(prompts[0], Iterable):  # a text is one, too
        prompts = [prompts]  # one prompt of token ids
    return [tokens_of(prompt, tokenizer) for prompt in prompts]


def tokens_of(prompt: Any, tokenizer: Any) -> list[int]:
    """One prompt as token ids."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise BadInput("a prompt is a text, and there is no tokenizer; give its token ids")
        prompt = tokenizer.encode(prompt)
    return whole_numbers("a token of the prompt", prompt)


def plain(value: Any) -> Any:
    """Tensors and arrays as lists and numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def short(value: Any) -> str:
    """A value as a message shows it: on one line, and not all of a long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_fields(given: Any, fields: dict[str, tuple[Any, ...]]) -> Namespace:
    """Fields of an object of JSON, by a table: what each is where it is missing or null; its kinds."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}
    if not isinstance(given, dict):
        raise BadInput(f"an object is wanted, not {short(given)}")
    found = Namespace(**{name: usual for name, (usual, *_) in fields.items()})
    for name, (_, *kinds) in fields.items():
        value = given.get(name)
        if value is not None and type(value) not in kinds:
            wanted = " or ".join(names[kind] for kind in kinds)
            raise BadInput(f"{name} is {short(value)}; it must be {wanted}")
        setattr(found, name, getattr(found, name) if value is None else value)
    return found
