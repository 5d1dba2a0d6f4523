"""cli.py: what the command lines have in common: flags, devices, and lines of a file of prompts.

    parser = cli.OneLineParser("generate.py", allow_abbrev=False)
    cli.check_device("cuda")
    cli.read_line('{"prompt": "def f"}', args, tokenizer)   # -> token ids

This file does not know models, methods or checkpoints.

The one idea: whatever a user gets wrong is a `BadInput` of one line, which names the flag.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn

import torch

import kernels
from model import BadInput
from text import Tokenizer


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises BadInput, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (python {self.prog} --help lists the flags)")


def json_object(text: str) -> dict[str, Any]:
    """The type of a flag whose value is an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a JSON object")
    return value


def check_device(name: str) -> None:
    """Make --device the current device. Raises BadInput if it is not usable."""
    try:
        device = torch.empty(0, device=name).device
        usable = device.type in ("cpu", "cuda")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched where the current device is
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise BadInput(f"--device: {name} is not usable here; cpu always is, cuda with an NVIDIA GPU")


def load_kernels() -> None:
    """Load the compiled kernels. Raises BadInput for a GPT_SPEC_KERNELS that this machine does not have."""
    try:
        kernels.load()
    except ValueError as error:  # of the environment variable
        raise BadInput(str(error)) from None


def encode_prompt(text: str, args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    """The token ids of a prompt: the text itself or, with --chat, a conversation that begins with it."""
    if tokenizer is None:
        raise BadInput(
            f"{args.checkpoint_path}: has no tokenizer, so texts cannot be read; give --prompt_ids"
        )
    if not args.chat:
        return tokenizer.encode(text)
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    variables = getattr(args, "template_kwargs", None) or {}
    return tokenizer.encode_chat([*system, {"role": "user", "content": text}], **variables)


def read_line(line: str, args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    """The token ids of one line of --prompts. Raises BadInput, without the number of the line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise BadInput("not a JSON object")
    if "prompt_ids" in entry:
        ids = entry["prompt_ids"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise BadInput("prompt_ids is not a list of integers")
        return ids
    key = next((key for key in ("prompt", "question", "turns") if key in entry), None)
    if key is None:
        raise BadInput("has none of prompt, prompt_ids, turns and question")
    turns = entry[key] if key == "turns" else [entry[key]]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise BadInput(f"{key} is not a text" if key != "turns" else "turns is not a list of texts")
    return encode_prompt(turns[0], args, tokenizer)
