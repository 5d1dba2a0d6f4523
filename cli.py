"""cli.py: what the command lines have in common: flags, devices, and lines of a file of prompts.

    parser = cli.OneLineParser("generate.py", allow_abbrev=False)
    cli.add_sampling_flags(parser)
    cli.check_device("cuda")
    cli.read_line('{"prompt": "def f"}', args, tokenizer)   # -> token ids

This file does not know models, methods or checkpoints.

The one idea: whatever a user gets wrong is a `BadInput` of one line, which names the flag.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

import kernels
from grammar import Matcher, Vocabulary, read_grammar
from model import BadInput
from sampling import Sampling
from text import Tokenizer


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises BadInput, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") != "0":  # of several processes, that one says it (parallel.py)
            sys.exit(2)
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


@contextmanager
def naming_flags() -> Iterator[None]:
    """Turn the engine's name of a field, with which its BadInput begins, into the flag of that name."""
    try:
        yield
    except BadInput as error:
        raise BadInput(str(error) if str(error).startswith("--") else f"--{error}") from None


def add_sampling_flags(p: argparse.ArgumentParser) -> None:
    """How tokens are picked: the fields of `Sampling`."""
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top_k", type=int, default=0, help="keep the k most probable tokens (0: all)")
    p.add_argument("--top_p", type=float, default=1.0, help="keep the smallest set with this probability")
    least = "keep tokens with this share of the largest probability"
    p.add_argument("--min_p", type=float, default=0.0, help=least)
    p.add_argument("--seed", type=int, default=1234, help="output i of a run uses seed + i")
    repeated = "divide logits of tokens in prompt or output by it (multiply those below 0)"
    p.add_argument("--repetition_penalty", type=float, default=1.0, help=repeated)
    present = "subtract it from the logit of every token in the output"
    p.add_argument("--presence_penalty", type=float, default=0.0, help=present)
    often = "subtract it as often as the output has the token"
    p.add_argument("--frequency_penalty", type=float, default=0.0, help=often)
    bias = "add to the logits of tokens; -inf forbids one; may be repeated"
    p.add_argument(
        "--logit_bias", metavar="ID:VALUE,...", type=logit_bias, action="append", default=[], help=bias
    )
    stops = "pick no stop token and look for no --stop before so many tokens"
    p.add_argument("--min_tokens", type=int, default=0, help=stops)
    words = "never write this, in its usual tokens; may be repeated"
    p.add_argument("--bad_words", action="append", default=[], metavar="TEXT", help=words)
    said = "with --json: log-probability of each token, and of the N best"
    p.add_argument("--logprobs", type=int, metavar="N", help=said)
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json_schema", metavar="FILE|TEXT", help="the output is JSON of this schema")
    form.add_argument("--regex", metavar="TEXT", help="the output matches this regular expression")
    form.add_argument("--grammar", metavar="FILE", help="the output follows this grammar, in Lark's language")


def logit_bias(text: str) -> list[tuple[int, float]]:
    """The type of --logit_bias."""
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return [(int(token), float(value)) for token, value in pairs]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not ID:VALUE,ID:VALUE like 15:-2.5") from None


def plain_sampling(args: argparse.Namespace, **more: Any) -> Sampling:
    """The flags that need no tokenizer, as `Sampling`, and `more` of its fields."""
    names = ("temperature", "top_k", "top_p", "seed", "min_p", "repetition_penalty", "presence_penalty")
    fields = {name: getattr(args, name) for name in (*names, "frequency_penalty", "min_tokens")}
    bias = [pair for pairs in args.logit_bias for pair in pairs]
    with naming_flags():
        return Sampling(**fields, logit_bias=dict(bias), **more)


def check_sampling(args: argparse.Namespace) -> str | None:
    """Check what can be checked without a model -> the structure of outputs, see `grammar.grammar_text`."""
    plain_sampling(args)
    counts = Counter(token for pairs in args.logit_bias for token, _ in pairs)
    twice = next((token for token, count in counts.items() if count > 1), None)
    if twice is not None:
        raise BadInput(f"--logit_bias names the token {twice} twice")
    if args.min_tokens > args.max_new_tokens:
        raise BadInput(f"--min_tokens is {args.min_tokens}, above --max_new_tokens {args.max_new_tokens}")
    if args.logprobs is not None and args.interactive:
        raise BadInput("--logprobs are written into the object of --json, which --interactive does not have")
    if args.logprobs is not None and not args.json:
        raise BadInput("--logprobs are written into the object of --json; give both")
    if "" in args.bad_words:
        raise BadInput("--bad_words is empty; give the text that must not be written")
    structure = read_grammar(args.json_schema, args.regex, args.grammar)
    if structure and args.ignore_eos:
        raise BadInput(
            "--ignore_eos: where a schema, regex or grammar ends, only the end of the text is left"
        )
    return structure


def read_sampling(
    args: argparse.Namespace,
    structure: str | None,
    tokenizer: Tokenizer | None,
    size: int,
    stops: Iterable[int],
) -> Sampling:
    """The flags as `Sampling`, for a model of `size` tokens; `structure`: see `check_sampling`."""
    if tokenizer is None and (structure or args.bad_words):
        raise BadInput("--json_schema, --regex, --grammar and --bad_words need a tokenizer")
    if args.logprobs is not None and not 0 <= args.logprobs <= size:
        raise BadInput(f"--logprobs is {args.logprobs}; it must be 0 to {size}")
    words = tuple(sorted({word for text in args.bad_words for word in spellings(text, tokenizer)}))
    grammar = Matcher(Vocabulary(tokenizer, size, list(stops)), structure) if structure else None
    return plain_sampling(args, bad_words=words, grammar=grammar)


def spellings(text: str, tokenizer: Tokenizer) -> set[tuple[int, ...]]:
    """The usual tokens of a text: at a beginning and in the middle of a line, where most words have a blank
    before them."""
    break_ = tokenizer.encode_text("\n")
    try:
        forms = [text] if text[0].isspace() else [text, " " + text]
        beginnings = [tokenizer.encode_text(form) for form in forms]
        middles = [tokenizer.encode_text("\n" + form)[len(break_) :] for form in forms]
    except BadInput as error:
        raise BadInput(f"--bad_words: {error}") from None
    wanted = {form.encode() for form in forms}
    written = [ids for ids in middles if b"".join(map(tokenizer.token_bytes, ids)) in wanted]
    return {tuple(ids) for ids in beginnings + written}


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


def load_kernels(patient: bool = True) -> None:
    """`kernels.load`. Raises BadInput for a GPT_SPEC_KERNELS that this machine does not have."""
    try:
        kernels.load(patient)
    except ValueError as error:  # of the environment variable
        raise BadInput(str(error)) from None


def read_text(value: str) -> str:
    """--prompt: a text, - for standard input, @FILE for a file, @@ for a text that begins with @."""
    try:
        if value == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        if value.startswith("@@") or not value.startswith("@"):
            return value.removeprefix("@")
        return Path(value[1:]).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompt: {value} cannot be read as UTF-8 text: {error}") from None


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
    said = read_turns(line)
    return encode_prompt(said[0], args, tokenizer) if isinstance(said[0], str) else said


def read_turns(line: str) -> list[str] | list[int]:
    """What a line of prompts says: the texts of a user, turn by turn, or token ids. Raises BadInput."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise BadInput("not a JSON object")
    key = next((key for key in ("prompt_ids", "prompt", "question", "turns") if key in entry), None)
    if key is None:
        raise BadInput("has none of prompt, prompt_ids, turns and question")
    said = entry[key] if key in ("prompt_ids", "turns") else [entry[key]]
    kind = int if key == "prompt_ids" else str
    if not isinstance(said, list) or not all(type(each) is kind for each in said):
        wanted = {"prompt_ids": "a list of integers", "turns": "a list of texts"}.get(key, "a text")
        raise BadInput(f"{key} is not {wanted}")
    if not said:
        raise BadInput(f"{key} is empty")
    return said
