"""common.py: what every report needs: prompts, models with their drafters, and decoding that is timed.

    parts = load_parts("w4a8", SHIPPED)
    decoders = build_decoders(parts.target.model, {"autoregressive": Drafter()}, held_out_prompts(4), args)

The one idea: `Parts` holds the models of one precision, loaded or made of random weights. A report adds only
the drafters that it makes of them.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import packing
import quantize
from benchmarks.timing import on_gpu
from block_heads import load_block_head
from building import cache_directory
from checkpoints import (
    HEAD_FLAG,
    MODELS,
    SHIPPED_HEAD,
    SHIPPED_SMALL,
    SHIPPED_TARGET,
    SMALL_HEAD,
    find_checkpoint,
)
from cli import read_line
from costs import Stats
from dflash import BlockHead
from drafts import Drafter
from eagle import EagleHead
from generate import METHODS, Target, load_draft_model, load_target
from gpt_spec import Decoder, Request, cache_length
from heads import load_head
from model import BadInput, Transformer
from packing import PRECISIONS
from parallel import Ranks
from sampling import Sampling
from text import load_tokenizer, read_json

HELD_OUT = MODELS / "held_out.jsonl"
BASE = "autoregressive"  # what all methods are compared with


def write_json(path: Path, results: dict) -> None:
    """At once, so that nobody meets half of it, should this process be ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def split(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(part) for part in split(text)]


class Prompt(NamedTuple):
    tokens: list[int]
    category: str = ""
    answer: str = ""  # the right one, if the file has it
    text: str = ""
    test: str = ""  # a program for what the text is continued with, if the file has it (HumanEval)
    function: str = ""  # which that program calls
    solution: str = ""  # a right text, if the file has one that is longer than its answer


def read_prompt_file(path: str | Path, tokenizer, count: int, chat: bool = False) -> list[Prompt]:
    """`count` prompts, evenly spread over the lines of a file: JSON objects with "prompt", "question" (GSM8K)
    or "turns" (Spec-Bench), gzipped or not. Raises BadInput for a file or a line that is something else."""
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if str(path).endswith(".gz") else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInput(f"--prompt_file: {path} cannot be read: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise BadInput(f"--prompt_file: {path} has no lines")
    count, settings = min(count, len(lines)), argparse.Namespace(chat=chat, system=None, checkpoint_path=path)
    prompts = []
    for number, line in (lines[i * len(lines) // count] for i in range(count)):
        try:
            tokens, entry = read_line(line, settings, tokenizer), json.loads(line)
        except BadInput as error:
            raise BadInput(f"--prompt_file: {path} line {number}: {error}") from None
        names = ("category", "answer", "prompt", "test", "entry_point", "canonical_solution")
        prompts.append(Prompt(tokens, *(str(entry.get(name, "")) for name in names)))
    return prompts


def held_out_prompts(count: int) -> list[Prompt]:
    """`count` prompts of held-out modules in the tokens of the shipped models."""
    return read_prompt_file(HELD_OUT, load_tokenizer(SHIPPED_TARGET), count)


def by_kind(prompts: list[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts by their categories."""
    kinds = dict.fromkeys(prompt.category for prompt in prompts)
    return {kind or "prompts": [prompt for prompt in prompts if prompt.category == kind] for kind in kinds}


def read_prompts(count: int) -> list[list[int]]:
    """The same, tokens alone."""
    return [prompt.tokens for prompt in held_out_prompts(count)]


def fitting_prompts(parts: Parts, args: argparse.Namespace) -> list[Prompt]:
    """The prompts of --prompt_file, or held-out ones, that leave room for --max_new_tokens; the number of the
    others is printed. Of several files, with commas, each gives as many, and a category to those that have
    none. They go into the chat template of a model that has one."""
    tokenizer = parts.target.tokenizer
    chat = bool(args.prompt_file and tokenizer and tokenizer.template)
    files = split(args.prompt_file) if args.prompt_file else [HELD_OUT]
    each, prompts = -(-args.prompts // len(files)), []
    for file in files:
        some = read_prompt_file(file, tokenizer, each, chat)
        kind = Path(file).name.split(".")[0] if len(files) > 1 else ""
        prompts += [prompt._replace(category=prompt.category or kind) for prompt in some]
    models = [parts.target.model] + ([parts.small] if parts.small else [])
    room = min(model.config.max_context for model in models) - args.max_new_tokens
    fitting = [prompt for prompt in prompts if len(prompt.tokens) <= room]
    if len(fitting) < len(prompts):
        print(f"{len(prompts) - len(fitting)} of {len(prompts)} prompts are left out: over {room} tokens")
    if not fitting:
        raise BadInput(f"--max_new_tokens {args.max_new_tokens}: no prompt leaves room for so many")
    return fitting


class Paths(NamedTuple):
    """Checkpoint directories; None where there is none."""

    target: str | Path
    small: str | Path | None = None
    head: str | Path | None = None  # of the target
    small_head: str | Path | None = None
    block_head: str | Path | None = None  # of the target


SHIPPED = Paths(SHIPPED_TARGET, SHIPPED_SMALL, SHIPPED_HEAD, SMALL_HEAD)
SHIPPED_ALONE = Paths(SHIPPED_SMALL, head=SMALL_HEAD)


@dataclass
class Parts:
    """What methods are made of, in one precision; None where there is none."""

    target: Target
    small: Transformer | None = None
    head: Callable[..., EagleHead] | None = None  # makes one for the target or its twin
    small_head: Callable[..., EagleHead] | None = None
    block_head: Callable[..., BlockHead] | None = None


def chosen_paths(args: argparse.Namespace) -> Paths:
    """Those of the flags, or the shipped ones. A head belongs to the model with its hidden size."""
    block = args.dflash_checkpoint_path
    if args.checkpoint_path is None:
        return SHIPPED._replace(block_head=block)
    paths = Paths(
        args.checkpoint_path, args.draft_checkpoint_path, args.eagle_checkpoint_path, block_head=block
    )
    if paths.small and paths.head:
        named = zip(paths, ("--checkpoint_path", "--draft_checkpoint_path", HEAD_FLAG))
        target, small, head = (
            read_json(find_checkpoint(str(path), flag) / "config.json") for path, flag in named
        )
        width = head.get("target_hidden_size", head.get("hidden_size"))
        if width == small.get("hidden_size") != target.get("hidden_size"):
            return paths._replace(head=None, small_head=paths.head)
    return paths


def load_parts(
    precision: str,
    paths: Paths,
    device: str = "cpu",
    lm_head_bits: int | None = None,
    ranks: Ranks = Ranks(),
) -> Parts:
    """`lm_head_bits`: of the target; None for the default. `ranks`: the processes that share the target."""
    flags = {"precision": precision, "draft_precision": None, "device": device, "ignore_eos": False}
    args = argparse.Namespace(checkpoint_path=paths.target, lm_head_bits=lm_head_bits, **flags)
    target = load_target(args, ranks)
    small = load_draft_model(str(paths.small), args, target) if paths.small else None
    heads = (partial(load_head, path) if path else None for path in (paths.head, paths.small_head))
    block = partial(load_block_head, paths.block_head) if paths.block_head else None
    return Parts(target, small, *heads, block)


def head_bits(args: argparse.Namespace, precision: str) -> int | None:
    """--lm_head_bits, where a precision has that choice."""
    return int(args.lm_head_bits) if args.lm_head_bits and precision in PRECISIONS else None


def shipped(precision: str) -> tuple[Transformer, Transformer]:
    """The shipped target and the shipped small model."""
    parts = load_parts(precision, SHIPPED)
    return parts.target.model, parts.small


QUANTIZERS = {  # flags of quantize.py by name
    "rtn": [],
    "rtn, zeros": ["--asymmetric"],
    "hqq": ["--quantizer", "hqq"],
    "gptq": ["--quantizer", "gptq"],
    "rtn, rotated": ["--rotate"],
    "hqq, rotated": ["--quantizer", "hqq", "--rotate"],
    "gptq, rotated": ["--quantizer", "gptq", "--rotate"],
}


@contextmanager
def quantized_target(flags: list[str]) -> Iterator[str]:
    """A temporary directory with the shipped target, quantized by quantize.py with these flags."""
    with tempfile.TemporaryDirectory() as scratch:
        yield write_quantized(SHIPPED_TARGET, flags, scratch)


def write_quantized(checkpoint: str | Path, flags: list[str], folder: str) -> str:
    """The directory in that folder."""
    output = f"{folder}/quantized"
    flags = ["--checkpoint_path", str(checkpoint), "--output", output, *flags]
    quantize.run(quantize.build_parser().parse_args(flags))
    return output


def quantized_copy(checkpoint: str | Path, quantizer: str) -> Path:
    """A directory with a checkpoint in 4 bits, made once. It stays in the user's cache, since gptq takes
    minutes; another checkpoint, other flags or another quantize.py have another one."""
    flags, source = QUANTIZERS[quantizer], find_checkpoint(str(checkpoint))
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(source.iterdir())]
    code = [Path(module.__file__).read_bytes() for module in (quantize, packing)]
    key = hashlib.sha256(repr((str(source.resolve()), files, flags, code)).encode()).hexdigest()[:16]
    kept = cache_directory() / f"quantized-{key}"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            made = Path(write_quantized(source, flags, scratch))
            try:
                made.rename(kept)
            except OSError:
                if not kept.exists():  # else another process was faster
                    raise
        print(f"{quantizer}: kept in {kept}", flush=True)
    return kept


def quantized_by(quantizer: str | None, checkpoint: str | Path, precision: str) -> str | Path:
    """The checkpoint as this quantizer leaves it in 4 bits; itself where only rounding is asked for."""
    if quantizer in (None, "rtn") or PRECISIONS.get(precision, (16, 16))[0] != 4:
        return checkpoint
    return quantized_copy(checkpoint, quantizer)


def recording_only() -> AbstractContextManager:
    """CUDA graphs or tapes are recorded, and nothing is compiled: from here on, or until the end of a `with`.

    `compile` stands for both. Without recording, the host is slower than a GPU.
    """
    return torch.compiler.set_stance("force_eager")


def compiles(args: argparse.Namespace) -> bool:
    """The `compile` argument of a report's decoders. On a GPU a --shape takes minutes to compile, and is only
    recorded."""
    if args.shape and on_gpu(args.device):
        recording_only()
    return not args.uncompiled


def in_each_precision(
    measure: Callable[..., dict],
    args: argparse.Namespace,
    batch_sizes: Iterable[int] | None = None,
    save: Callable[[dict], None] = lambda results: None,
) -> dict[str, dict]:
    """What `measure` returns, for each of --precisions, and, if given, each of the batch sizes. `save` gets
    all so far after each.

    All models must be local to `measure`. Decoders and drafters refer to each other, so they are collected
    here, before the next models are made: both together may not fit a GPU.
    """
    results = {}
    for precision in split(args.precisions):
        for batch_size in batch_sizes or [None]:
            name = precision if batch_size in (None, 1) else f"{precision}, batch {batch_size}"
            results[name] = measure(precision, *([batch_size] if batch_sizes else []))
            save(results)
            gc.collect()
            if on_gpu(args.device):
                torch.cuda.empty_cache()
    return results


def chosen_methods(methods: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Those of --methods, by the first words of their names, and `autoregressive`. Raises BadInput."""
    if args.methods is None:
        return methods
    words = {name: name.replace(",", " ").split()[0] for name in methods}
    unknown = set(split(args.methods)) - set(words.values()) - set(METHODS)  # some precisions lack some
    if unknown:
        raise BadInput(
            f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(dict.fromkeys(words.values()))}"
        )
    return {name: m for name, m in methods.items() if words[name] in (BASE, *split(args.methods))}


def build_decoders(
    target: Transformer,
    drafters: dict[str, Drafter],
    prompts: list[Prompt],
    args: argparse.Namespace,
    batch_size: int = 1,
    sampling: Sampling | None = None,
) -> dict[str, Decoder]:
    """A warm decoder for every drafter, with room for the longest prompt. `sampling`: by default that of the
    flags."""
    longest = max(len(prompt.tokens) for prompt in prompts) + args.max_new_tokens
    settings = (cache_length(target.config, longest), batch_size, not args.uncompiled)
    sampling = sampling or Sampling(args.temperature, top_p=args.top_p)
    decoders = {name: Decoder(target, drafter, sampling, *settings) for name, drafter in drafters.items()}
    for decoder in decoders.values():
        decoder.warm_up()
    return decoders


def freeze(decoder: Decoder, held: int = 200) -> Decoder:
    """Put `held` tokens into the caches of every row. From then on a step does the same work each time."""
    vocabulary = decoder.model.config.vocab_size
    tokens = [3 + i % (vocabulary - 3) for i in range(held)]
    for row in range(decoder.setup.batch_size):
        decoder.prefill(row, tokens, Request(decoder.setup.sampling, row))
    decoder.state.active.fill_(False)
    return decoder


def decode_all(
    decoder: Decoder,
    prompts: list[list[int]],
    tokens: int,
    stats: Stats | None = None,
    stop_ids: Iterable[int] = (),
    **options: Any,
) -> list[list[int]]:
    """The new tokens of each prompt. `options`: see `Decoder.run`."""
    texts = [[] for _ in prompts]
    for emissions in decoder.run(prompts, tokens, stop_ids, stats=stats, **options):
        for emission in emissions:
            texts[emission.prompt_index] += emission.tokens
    return texts


class Run(NamedTuple):
    """What decoding some prompts came to."""

    texts: list[list[int]]
    tokens: int  # without the first one of each text, which prefill yields
    steps: int  # of the target, counted for each text
    seconds: float  # of decoding
    prefill_seconds: float  # of target and drafter

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def timed(
    decoder: Decoder,
    prompts: list[list[int]],
    tokens: int,
    total: Stats,
    stop_ids: Iterable[int] = (),
    **options: Any,
) -> Run:
    """Decode some prompts, and count it in `total`, too. `options`: see `Decoder.run`."""
    before = replace(total)
    texts = decode_all(decoder, prompts, tokens, total, stop_ids, **options)
    names = ("new_tokens", "target_forwards", "decode_seconds", "prefill_seconds")
    new, steps, *seconds = (getattr(total, name) - getattr(before, name) for name in names)
    return Run(texts, new - len(prompts), steps, *seconds)
