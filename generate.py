"""generate.py: the command line: a prompt goes in, text comes out as it is accepted.

    python generate.py                                          # the models in models/, offline
    python generate.py --method lookup --prompt "class Stack:"
    python generate.py --checkpoint_path DIR --draft_checkpoint_path DIR --chat --prompt "Hello"
    python generate.py --prompts prompts.jsonl --batch_size 4 --json

Text goes to stdout as it is accepted, statistics to stderr. This file does not know how a method works
(`gpt_spec.py`), how a checkpoint is read (`checkpoints.py`) or what a tokenizer does (`text.py`).

The one idea: a method is a name and a drafter. Flags choose the drafter (`build_drafter`), and everything
after that is the same for all methods.
"""

from __future__ import annotations

import process

if __name__ == "__main__":
    process.begin()

import argparse
import hashlib
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # PyTorch can do without

import torch  # noqa: E402

import kernels  # noqa: E402
from auto import AdaptiveLookup, AutoDrafter  # noqa: E402
from block_heads import BLOCK_HEAD_FLAG, load_block_head  # noqa: E402
from chat import check_tokens  # noqa: E402
from check_head import check_head  # noqa: E402
from check_head import show as show_readings  # noqa: E402
from checkpoints import (  # noqa: E402
    ALL_PRECISIONS,
    HEAD_FLAG,
    SHIPPED_HEAD,
    SHIPPED_SMALL,
    SHIPPED_TARGET,
    SMALL_HEAD,
    SOURCES,
    facts,
    find_checkpoint,
    load_model,
    stop_ids,
    weight_bytes,
)
from cli import (  # noqa: E402
    OneLineParser,
    add_sampling_flags,
    check_device,
    check_sampling,
    encode_prompt,
    json_object,
    load_kernels,
    naming_flags,
    read_line,
    read_sampling,
    read_text,
)
from costs import Stats, contestants  # noqa: E402
from dflash import BlockDrafter  # noqa: E402
from drafts import Drafter, check_vocabulary  # noqa: E402
from eagle import TREE_DEPTH, TREE_TOPK, TreeDrafter  # noqa: E402
from forced import ForcedDrafter  # noqa: E402
from gpt_spec import (  # noqa: E402
    MIN_DRAFT_LENGTH,
    Decoder,
    HierarchicalDrafter,
    LookupDrafter,
    SequentialDrafter,
    cache_length,
    check_prompt,
    check_window,
)
from heads import load_head, read_frequent_tokens, target_width  # noqa: E402
from model import BadInput, Transformer  # noqa: E402
from packing import lower_precisions, precision_of, share_weights  # noqa: E402
from parallel import Ranks, connected  # noqa: E402
from show import Output, Screen, draw_step, format_stats, stats_json  # noqa: E402
from text import TextStream, Tokenizer, load_tokenizer  # noqa: E402

DEFAULT_PROMPT = '''def load(path, mode='r', **kwargs):
    """Load a document from a file, returning a new document.

    The file is opened with the given mode, and closed when the document has
    been read.  See the Document class for available keyword args.
    """
    reader = Reader(mode=mode, **kwargs)
    return reader.load(path)

def save(document, path, **kwargs):
'''
CHAT_CONTEXT = 8192  # tokens of an --interactive conversation, where the model has that many
SPECULATE_K = 4  # tokens of a sequence, unless --speculate_k gives another number
METHODS = ["autoregressive", "lookup", "sequential", "tree", "dflash", "hierarchical", "qspec", "auto"]
COSTS_LAST = 24 * 3600  # seconds; a machine changes


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def tree_size(text: str) -> int | str:
    """The type of --tree_size."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of nodes nor auto")
    return text if text == "auto" else int(text)


def build_parser() -> argparse.ArgumentParser:
    """The flags of generate.py."""
    p = OneLineParser(
        prog="generate.py",
        description="Decode text with a Llama-family model and speculative decoding.",
        allow_abbrev=False,
    )
    directory = "a Hugging Face directory or hub repository id"
    p.add_argument("--checkpoint_path", help=f"the target: {directory} (default: the shipped model)")
    p.add_argument(
        "--method", choices=METHODS, help="the drafter (default: sequential where there is a draft model)"
    )
    p.add_argument(
        "--precision", choices=ALL_PRECISIONS, help="of weights and activations (default: the file's own)"
    )
    head = "of the target's lm_head, where --precision quantizes 16-bit weights; 4 only with w4 (default: 8)"
    p.add_argument("--lm_head_bits", type=int, choices=[4, 8, 16], help=head)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="a text; - reads standard input, @FILE a file, @@ is the text @")
    source.add_argument("--prompt_ids", help="token ids, 1,2,3, used as they are")
    source.add_argument(
        "--prompts", metavar="FILE", help='JSON lines: {"prompt": TEXT} or {"prompt_ids": [...]}'
    )
    p.add_argument("--batch_size", type=int, default=1, help="texts decoded at a time")
    add_draft_flags(p, directory)
    p.add_argument("--max_new_tokens", type=int, default=200)
    add_sampling_flags(p)
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    p.add_argument("--ignore_eos", action="store_true", help="end-of-text tokens do not end the text")
    talk = p.add_mutually_exclusive_group()
    talk.add_argument("--chat", action="store_true", help="the prompt is a message: apply the chat template")
    talk.add_argument(
        "--interactive", action="store_true", help="a conversation; history is kept, so is the cache"
    )
    p.add_argument("--system", metavar="TEXT", help="system message of a chat")
    kwargs_help = 'variables of the chat template, as in {"enable_thinking": false}'
    p.add_argument("--template_kwargs", metavar="JSON", type=json_object, help=kwargs_help)
    p.add_argument("--num_samples", type=int, default=1, help="outputs of each prompt")
    compiles = "none: call every operator from Python, which is slower"
    p.add_argument("--compile", choices=["none", "default"], default="default", help=compiles)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sums = "add up o_proj and down_proj in N parts, as N processes of torchrun do (default: as many as these)"
    p.add_argument("--sum_parts", type=int, metavar="N", help=sums)
    checks = "measure the head of --method tree or dflash, in every way to read its file"
    p.add_argument("--check_head", action="store_true", help=checks)
    p.add_argument("--profile", metavar="FILE", help="write a Chrome trace of the decoding")
    p.add_argument(
        "--explain", action="store_true", help="colour tokens by their origin; every draft to stderr"
    )
    p.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    return p


def add_draft_flags(p: argparse.ArgumentParser, directory: str) -> None:
    """Flags for the draft models and the length of drafts."""
    p.add_argument(
        "--draft_checkpoint_path",
        help=f"sequential, hierarchical, auto: the small model, {directory}, or self",
    )
    p.add_argument(
        "--eagle_checkpoint_path",
        help=f"tree, hierarchical, auto: an EAGLE head of the target or the small model, {directory}",
    )
    block = f"dflash, hierarchical, auto: a block head (DFlash) instead of an EAGLE head, {directory}"
    p.add_argument("--dflash_checkpoint_path", help=block)
    p.add_argument(
        "--draft_precision",
        choices=ALL_PRECISIONS,
        help="of the draft model (default: --precision; of qspec, and of hierarchical with self: the next "
        "lower activations, w4a8 for w4a16), or of the head of --method tree or dflash (default, "
        "and in hierarchies: 16 bits)",
    )
    k = f"tokens a sequence drafter proposes (default: {SPECULATE_K}; of auto: what pays, step by step)"
    p.add_argument("--speculate_k", type=int, help=k)
    p.add_argument(
        "--draft_confidence", type=float, default=0.0, help="stop a draft before a less probable token"
    )
    nodes = "nodes to verify, the root included (default: auto, what pays, step by step)"
    p.add_argument("--tree_size", type=tree_size, metavar="N|auto", help=nodes)
    deepest = f"depth of the deepest node (default: {TREE_DEPTH}; of dflash: the whole block)"
    p.add_argument("--tree_depth", type=int, help=deepest)
    children = f"children of a node, nodes of a beam (default: {TREE_TOPK}; of dflash: what pays; 1: a chain)"
    p.add_argument("--tree_topk", type=int, help=children)
    vocabulary = "tokens that an EAGLE head can draft, the most frequent ones (default: all that it knows)"
    p.add_argument("--draft_vocab_size", type=int, metavar="N", help=vocabulary)
    source = "where --draft_vocab_size counts (default: the tokenizer's own order)"
    p.add_argument("--draft_vocab_text", metavar="FILE", help=source)
    least = f"hierarchical: tokens to hand up at least (default: {MIN_DRAFT_LENGTH})"
    p.add_argument("--min_draft_length", type=int, help=least)


def check_arguments(args: argparse.Namespace) -> None:
    """Check what argparse does not. Raises BadInput, which names the flag."""
    counts = ("batch_size", "speculate_k", "max_new_tokens", "num_samples", "sum_parts")
    for name in (*counts, "tree_depth", "tree_topk", "min_draft_length", "draft_vocab_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} is {value}; it must be at least 1")
    if not 0 <= args.draft_confidence <= 1:
        raise BadInput(f"--draft_confidence is {args.draft_confidence}; it is a probability, 0 (off) to 1")
    if args.draft_vocab_text and not args.draft_vocab_size:
        raise BadInput("--draft_vocab_text needs --draft_vocab_size: how many of its tokens to draft")
    if "" in args.stop:
        raise BadInput("--stop is empty; give the text before which to stop")
    for name in ("system", "template_kwargs"):
        if getattr(args, name) is not None and not (args.chat or args.interactive):
            raise BadInput(f"--{name} needs --chat or --interactive")
    one_text = args.prompts or args.prompt_ids or args.prompt or args.num_samples > 1
    if args.interactive and (args.json or one_text):
        raise BadInput("--interactive reads standard input; leave out --json, --prompt and the like")
    if args.chat and args.prompt_ids:
        raise BadInput("--chat needs a text to put into the template, not --prompt_ids")
    if args.profile:
        path = Path(args.profile)  # what is no file, like /dev/null, would be replaced by one
        if (path.exists() and not path.is_file()) or not path.absolute().parent.is_dir():
            raise BadInput(f"--profile: {args.profile} is no file that can be written")
    check_device(args.device)


# --------------------------------------------------------------------------------------------------
# The target and its drafter
# --------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """A loaded checkpoint: the model and what its directory says about text."""

    model: Transformer
    tokenizer: Tokenizer | None
    stop_ids: list[int]
    precision: str
    drafts: dict[str, Transformer] = field(default_factory=dict)  # draft models that were loaded, by path


def load_target(args: argparse.Namespace, ranks: Ranks = Ranks()) -> Target:
    """The target of the flags, or the shipped one. `ranks`: the processes that share it."""
    directory = find_checkpoint(str(args.checkpoint_path or SHIPPED_TARGET))
    model = load_model(directory, args.precision, args.device, lm_head_bits=args.lm_head_bits, ranks=ranks)
    precision = precision_of(model)
    tokenizer = load_tokenizer(directory, model.config.max_context)
    stops = [] if args.ignore_eos else stop_ids(directory, tokenizer)
    return Target(model, tokenizer, stops, precision)


FLAGS_OF = {
    "draft_checkpoint_path": ["sequential", "hierarchical", "auto"],
    "draft_precision": ["sequential", "tree", "dflash", "hierarchical", "qspec"],
    "draft_confidence": ["sequential", "qspec"],
    "min_draft_length": ["hierarchical", "auto"],
    "eagle_checkpoint_path": ["tree", "hierarchical", "auto"],
    "dflash_checkpoint_path": ["dflash", "hierarchical", "auto"],
    **dict.fromkeys(
        ["tree_size", "tree_depth", "tree_topk", "draft_vocab_size"],
        ["tree", "dflash", "hierarchical", "auto"],
    ),
}


def build_drafter(args: argparse.Namespace, target: Target) -> tuple[str, Drafter]:
    """(method, drafter) of the flags. Which drafter a method needs is settled here and nowhere else."""
    shipped = args.checkpoint_path is None
    eagle, block = args.eagle_checkpoint_path, args.dflash_checkpoint_path
    paths, alone = (bool(args.draft_checkpoint_path), bool(eagle or block)), "dflash" if block else "tree"
    named = {(True, True): "hierarchical", (False, True): alone, (True, False): "sequential"}
    method = args.method or named.get(paths, "sequential" if shipped else "autoregressive")
    for flag, methods in FLAGS_OF.items():
        unset = 0.0 if flag == "draft_confidence" else None
        if getattr(args, flag) != unset and method not in methods:
            raise BadInput(f"--{flag}: method {method} does not use it; --method {' or '.join(methods)} does")
    if method == "hierarchical" and eagle and block:
        raise BadInput(f"{BLOCK_HEAD_FLAG}: a hierarchy has one head, this or that of {HEAD_FLAG}")
    if method == "auto":
        names = available_methods(args, target)
        for flag, methods in FLAGS_OF.items():
            if getattr(args, flag) not in (None, 0.0) and not set(names) & set(methods):
                raise BadInput(f"--{flag}: method auto has nothing to use it for; it chooses among {names}")
        return method, AutoDrafter({name: one_drafter(name, args, target, None) for name in names})
    return method, one_drafter(method, args, target, SPECULATE_K)


def one_drafter(method: str, args: argparse.Namespace, target: Target, speculate_k: int | None) -> Drafter:
    """The drafter of a method; `speculate_k` where no flag says it, None for as many as pay."""
    shipped, k = args.checkpoint_path is None, args.speculate_k or speculate_k
    if method == "autoregressive":
        return Drafter()
    if method == "lookup":
        return LookupDrafter(k) if k else AdaptiveLookup()
    if method in ("tree", "dflash"):
        return tree_drafter(args, target, method, target.model, SHIPPED_HEAD if shipped else None)
    if method == "qspec":
        twin = own_twin(args, target, "--method qspec drafts with")
        return SequentialDrafter(twin, k, args.draft_confidence, shares_cache=True)
    path = args.draft_checkpoint_path or (str(SHIPPED_SMALL) if shipped else None)
    if path is None:
        raise BadInput(
            f"--method {method} needs --draft_checkpoint_path: a smaller model with the target's vocabulary"
        )
    own = path == "self" and method == "hierarchical"
    reason = "--draft_checkpoint_path: self means"
    model = own_twin(args, target, reason) if own else load_draft_model(path, args, target)
    if method == "sequential":
        return SequentialDrafter(model, k, args.draft_confidence)
    head = SMALL_HEAD if Path(path).resolve() == SHIPPED_SMALL else SHIPPED_HEAD if own and shipped else None
    tree = tree_drafter(args, target, method, model, head)
    least = args.min_draft_length or MIN_DRAFT_LENGTH
    with naming_flags():
        return HierarchicalDrafter(model, tree, least, shares_cache=own)


def available_methods(args: argparse.Namespace, target: Target) -> list[str]:
    """What `auto` chooses from, beside drafting nothing: each method that there is a model for.

    A head of the target's hidden size belongs to the target. Any other head belongs to the small model, and
    makes a hierarchy. One of the shipped models is not tried: it loses.
    """
    shipped, small = args.checkpoint_path is None, args.draft_checkpoint_path
    names = ["lookup"]
    if small != "self" and (small or shipped):
        names.append("sequential")
    paths = {"tree": (args.eagle_checkpoint_path, HEAD_FLAG)}
    paths |= {"dflash": (args.dflash_checkpoint_path, BLOCK_HEAD_FLAG)}
    width, alone = target.model.config.hidden_size, not (small or shipped)
    own = {name: alone or target_width(*given) == width for name, given in paths.items() if given[0]}
    own = ({"tree": True} if shipped else {}) | own
    names += [name for name, of_target in own.items() if of_target]
    if not all(own.values()) or (small == "self" and own):
        names.append("hierarchical")
    if lower_precisions(target.precision):
        names.append("qspec")
    return names


def tree_drafter(
    args: argparse.Namespace, target: Target, method: str, model: Transformer, default: Path | None
) -> Drafter:
    """For the target or, in a hierarchy, for the model in the middle."""
    eagle, block = args.eagle_checkpoint_path, args.dflash_checkpoint_path
    is_block = method == "dflash" or (method == "hierarchical" and block is not None and eagle is None)
    path, kind = (block, "a block head") if is_block else (eagle or default, "an EAGLE head")
    if path is None:
        whose = "the model in --draft_checkpoint_path" if method == "hierarchical" else "this very target"
        flag = BLOCK_HEAD_FLAG if is_block else HEAD_FLAG
        raise BadInput(f"--method {method} needs {flag}: {kind} of {whose}")
    load = load_block_head if is_block else load_head
    head = load(path, model, None if method == "hierarchical" else args.draft_precision)
    if args.draft_vocab_size:
        numbers = (args.draft_vocab_size, target.model.config.vocab_size)
        head.restrict(read_frequent_tokens(args.draft_vocab_text, target.tokenizer, *numbers))
    size = args.tree_size if isinstance(args.tree_size, int) else None
    with naming_flags():
        if is_block:
            return BlockDrafter(head, size, args.tree_depth, args.tree_topk)
        return TreeDrafter(head, size, args.tree_depth or TREE_DEPTH, args.tree_topk or TREE_TOPK)


def load_draft_model(path: str, args: argparse.Namespace, target: Target) -> Transformer:
    """The draft model. Raises BadInput if its vocabulary is not the target's."""
    precision = args.draft_precision or target.precision
    if path == "self":
        if precision != target.precision:
            raise BadInput(
                "--draft_precision: self drafts with the target's own weights, in its precision; --method "
                "qspec drafts with them at lower activations"
            )
        return target.model
    if path in target.drafts:
        return target.drafts[path]
    directory = find_checkpoint(path, "--draft_checkpoint_path")
    model = load_model(directory, precision, args.device, "--draft_checkpoint_path")
    try:
        check_vocabulary(model.config.vocab_size, target.model.config.vocab_size)
        check_tokens(load_tokenizer(directory), target.tokenizer)
    except BadInput as error:
        raise BadInput(f"--draft_checkpoint_path: {path}: {error}") from None
    target.drafts[path] = model
    return model


def own_twin(args: argparse.Namespace, target: Target, reason: str) -> Transformer:
    """The target's own weights with lower activations; an error begins with the reason for wanting them."""
    own, lower = target.precision, lower_precisions(target.precision)
    if not lower:
        raise BadInput(
            f"{reason} the target's weights at lower activations, and {own} has no lower ones; "
            "use --precision w4a16"
        )
    draft = args.draft_precision or lower[0]
    if draft not in (own, *lower):
        raise BadInput(f"--draft_precision is {draft}; weights of {own} draft in {' or '.join(lower)}")
    return share_weights(target.model, draft)


# --------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------


def read_prompts(args: argparse.Namespace, target: Target) -> list[Output]:
    """One output for every sample of every prompt. A bad line of --prompts is an output with an error."""
    outputs = []

    def add(ids: list[int], error: str | None = None) -> None:
        for _ in range(args.num_samples):
            stream = TextStream(target.tokenizer, args.stop, args.min_tokens)
            outputs.append(Output(ids, stream, finish_reason="error" if error else None, error=error))

    if args.prompts is None:
        add(read_prompt(args, target))
        return outputs
    try:
        lines = Path(args.prompts).read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts: {args.prompts} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                ids = read_line(line, args, target.tokenizer)
                check_length(ids, args, target)
                add(ids)
            except BadInput as error:
                add([], f"{args.prompts} line {number}: {error}")
    if not outputs:
        raise BadInput(f"--prompts: {args.prompts} has no lines")
    return outputs


def read_prompt(args: argparse.Namespace, target: Target) -> list[int]:
    """The token ids of --prompt, --prompt_ids or the default prompt."""
    flag = "--prompt" if args.prompt_ids is None else "--prompt_ids"
    try:
        if args.prompt_ids is not None:
            ids = [int(part) for part in args.prompt_ids.split(",")]
        else:
            text = DEFAULT_PROMPT if args.prompt is None else read_text(args.prompt)
            ids = encode_prompt(text, args, target.tokenizer)
        check_length(ids, args, target)
    except BadInput as error:
        raise BadInput(str(error) if str(error).startswith("--") else f"{flag}: {error}") from None
    except ValueError:
        raise BadInput(f"{flag}: {args.prompt_ids!r} is not a list of integers like 1,2,3") from None
    return ids


def check_length(ids: list[int], args: argparse.Namespace, target: Target) -> None:
    """Raise BadInput for a prompt that the model cannot take, or cannot go on from."""
    config = target.model.config
    check_prompt(config, ids, config.max_context)
    cache_length(config, min(len(ids) + args.max_new_tokens, config.max_context))


# --------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------


def decode_all(
    decoder: Decoder,
    outputs: list[Output],
    args: argparse.Namespace,
    stops: list[int],
    stats: Stats,
    reuse: bool = False,
) -> None:
    """Decode all prompts without an error, and show what is new after every step."""
    todo = [output for output in outputs if output.error is None]
    seeds = [args.seed + i for i, output in enumerate(outputs) if output.error is None]
    explain_to = sys.stderr if args.json else sys.stdout
    screen = Screen(outputs, args.explain, explain_to) if args.explain or not args.json else None
    inner = decoder.drafter.inner if isinstance(decoder.drafter, ForcedDrafter) else decoder.drafter
    why, auto = "", inner if isinstance(inner, AutoDrafter) else None

    def completes_a_stop_string(prompt: int, token: int) -> bool:
        return todo[prompt].stream.add(token)

    prompts = [output.prompt_ids for output in todo]
    for emissions in decoder.run(
        prompts, args.max_new_tokens, stops, completes_a_stop_string, stats, reuse, seeds
    ):
        for emission in emissions:
            todo[emission.prompt_index].add(emission)
            if args.explain and emission.draft is not None:
                if auto and (reason := auto.explain()) != why:
                    why = reason
                    print(f"\n{why}", file=sys.stderr)
                print(draw_step(emission, todo[emission.prompt_index].stream.tokenizer), file=sys.stderr)
        if screen:
            screen.update()
    if screen:
        screen.update()


def interact(decoder: Decoder, target: Target, args: argparse.Namespace, stats: Stats) -> None:
    """A conversation on standard input: lines are messages or, without a chat template, more text."""
    tokenizer, history = target.tokenizer, Conversation(target.tokenizer, args)
    if tokenizer.template is None:
        print("no chat template: what you type is continued as text", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line, output = sys.stdin.buffer.readline(), None
        if not line:
            return
        try:
            stream = TextStream(tokenizer, args.stop, args.min_tokens)
            output = Output(history.ask(line.decode("utf-8")), stream)
            decode_all(decoder, [output], args, target.stop_ids, stats, reuse=True)
        except KeyboardInterrupt:  # ends this answer, not the conversation
            if target.model.clock is not None:  # other processes are in another step
                raise
            print()
            if output is None:  # nothing was asked yet
                continue
            output.finish("stop")
        except UnicodeDecodeError as error:  # nothing was asked
            print(f"error: this line is not UTF-8 text: {error}", file=sys.stderr)
            continue
        except BadInput as error:
            print(f"error: {error}; the conversation starts anew", file=sys.stderr)
            history = Conversation(tokenizer, args)
            continue
        history.answer(output)


class Conversation:
    """What has been said, as the prompt of the next answer."""

    def __init__(self, tokenizer: Tokenizer, args: argparse.Namespace):
        self.tokenizer, self.ids, system = tokenizer, [], args.system
        self.template_kwargs = args.template_kwargs or {}
        self.messages = [{"role": "system", "content": system}] if system is not None else []

    def ask(self, line: str) -> list[int]:
        """The prompt that ends with this line from the user."""
        if self.tokenizer.template is None:
            encode = self.tokenizer.encode_text if self.ids else self.tokenizer.encode
            self.ids = self.ids + encode(line)
            return self.ids
        messages = [*self.messages, {"role": "user", "content": line.rstrip("\n")}]
        ids = self.tokenizer.encode_chat(messages, **self.template_kwargs)
        self.messages = messages  # last: Ctrl-C may have come before
        return ids

    def answer(self, output: Output) -> None:
        """Add the answer to the history."""
        self.ids = output.prompt_ids + output.token_ids
        self.messages.append({"role": "assistant", "content": output.stream.text})


# --------------------------------------------------------------------------------------------------
# Profiling
# --------------------------------------------------------------------------------------------------


@contextmanager
def trace(path: str | None) -> Iterator[None]:
    """Profile the body of the `with`, if a file is given for it."""
    if path is None:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(path)


# --------------------------------------------------------------------------------------------------
# What steps cost, kept between runs
# --------------------------------------------------------------------------------------------------


def settings_of(drafter: Drafter) -> list[Any]:
    """Everything that the costs of a drafter depend on: its numbers, its models, and its inner drafters."""
    values = {name: v if isinstance(v, (list, tuple)) else [v] for name, v in vars(drafter).items()}
    fields = [(name, v) for name, v in values.items() if all(isinstance(each, (int, float)) for each in v)]
    models = [(m.config, weight_bytes([m])) for m in vars(drafter).values() if isinstance(m, torch.nn.Module)]
    twins = [precision_of(m) for m in vars(drafter).values() if isinstance(m, Transformer)]
    inside = [settings_of(inner) for inner in vars(drafter).values() if isinstance(inner, Drafter)]
    return [type(drafter).__name__, fields, models, twins, inside]


def costs_file(decoder: Decoder, precision: str) -> Path:
    """The file with the costs of such a decoder on this device. Its name hashes all they depend on."""
    setup, device = decoder.setup, decoder.setup.runtime.device
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} {platform.node()}"
    sources = [path.stat().st_mtime_ns for path in SOURCES]  # any change may change what a step costs
    bodies = [kernels.PATH, sorted(kernels.ON_REFERENCE)]
    what = [machine, torch.__version__, bodies, torch.get_num_threads(), sources, precision]
    what += [decoder.model.config, weight_bytes([decoder.model])]
    what += [replace(setup.sampling, seed=0, grammar=None)]
    what += [setup.batch_size, setup.slots, setup.runtime.compile, setup.every_control, setup.logprobs]
    what += [setup.sampling.grammar is not None]
    what += [(name, settings_of(drafter)) for name, drafter in contestants(decoder.drafter).items()]
    return kernels.cache_directory() / f"costs-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"


def read_costs(file: Path) -> dict[str, float]:
    """Seconds by name and size; empty if the file is not there, too old, or damaged."""
    try:
        fresh = 0 <= time.time() - file.stat().st_mtime < COSTS_LAST
        costs = json.loads(file.read_text()) if fresh else {}
        usable = all(isinstance(seconds, float) and 0 < seconds < 1e6 for seconds in costs.values())
        return costs if usable else {}
    except (OSError, ValueError, AttributeError):
        return {}


def warm_up(decoder: Decoder, precision: str, ranks: Ranks = Ranks()) -> float:
    """`Decoder.warm_up` with the costs of steps that were measured last, if that was within a day."""
    if not decoder.drafter.needs_costs:
        return decoder.warm_up()
    file = costs_file(decoder, f"{precision} {ranks.parts} {ranks.count}")
    costs = ranks.tell(read_costs(file))
    known = len(costs)
    seconds = decoder.warm_up(costs)
    if len(costs) > known:
        with suppress(OSError):  # a full disk costs a measurement next time
            for old in file.parent.glob("costs-*"):
                if time.time() - old.stat().st_mtime > COSTS_LAST:
                    old.unlink()
            scratch = file.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(costs))
            scratch.replace(file)
    return seconds


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def can_compile(args: argparse.Namespace) -> bool:
    """May steps run without Python? On a CPU that takes our kernels, which need a C++ compiler; a line says
    so where there is none."""
    if args.compile == "none" or not args.device.startswith("cpu"):
        return args.compile != "none"
    if not kernels.load() and kernels.PATH != "reference":
        why = "near-ties may fall another way when several tokens are verified at once"
        slow = "running without our kernels, which is slower, and not exact across numbers of rows"
        print(f"{slow}: {why}", file=sys.stderr)
    return kernels.load()


def show_head(args: argparse.Namespace, target: Target, drafter: Drafter, outputs: list[Output]) -> int:
    """`--check_head`: see check_head.py -> the exit status."""
    if not isinstance(drafter, TreeDrafter):
        raise BadInput("--check_head is about the head of --method tree or dflash")
    unused = ("interactive", "explain", "profile", "draft_vocab_size", "tree_size", "tree_depth", "tree_topk")
    for name in (*unused, "temperature"):
        if getattr(args, name):
            raise BadInput(f"--{name}: --check_head drafts chains of its own, and prints nothing else")
    prompts = [output.prompt_ids for output in outputs if output.error is None]
    load = load_block_head if isinstance(drafter, BlockDrafter) else load_head
    path = args.dflash_checkpoint_path or args.eagle_checkpoint_path or SHIPPED_HEAD
    load = partial(load, path, target.model, args.draft_precision)
    stops = [] if args.ignore_eos else target.stop_ids
    if prompts:
        compile = can_compile(args)
        how = (target.model, prompts, args.max_new_tokens, stops, compile)
        show_readings(check_head(drafter.head, load, *how), args.json)
    return report_errors(outputs)


def report_errors(outputs: list[Output]) -> int:
    """Print what is wrong with prompts, a line each -> the exit status."""
    errors = [output.error for output in outputs if output.error]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0


def run(args: argparse.Namespace) -> int:
    """Everything between the flags and the exit status."""
    with processes(args, args.interactive) as ranks:
        return run_with(ranks, args)


@contextmanager
def processes(args: argparse.Namespace, patient: bool = False) -> Iterator[Ranks]:
    """`parallel.connected`, for processes that have flags, versions, kernels and files in common."""
    with connected(args.device, args.sum_parts, patient) as ranks:
        if ranks.group:
            load_kernels()
            ranks.agree(facts(vars(args)))
        if ranks.group and args.device == "cuda":
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', ranks.rank)}"
        elif ranks.count > 1 and args.device.startswith("cuda"):
            raise BadInput(f"--device is {args.device}; say cuda, and each process takes its own GPU")
        yield ranks


def run_with(ranks: Ranks, args: argparse.Namespace) -> int:
    """`run`, in a process that knows the others."""
    check_arguments(args)
    alone = ranks.count == 1 and args.device.startswith("cpu")
    load_kernels(patient=not alone or args.check_head or bool(args.profile))
    structure = check_sampling(args)  # before a model is loaded
    target = load_target(args, ranks)
    method, drafter = build_drafter(args, target)
    config = target.model.config
    sampling = read_sampling(args, structure, target.tokenizer, config.vocab_size, target.stop_ids)
    drafter = drafter if sampling.grammar is None else ForcedDrafter(drafter)
    if args.interactive and target.tokenizer is None:
        raise BadInput(f"--interactive: {args.checkpoint_path} has no tokenizer")
    outputs = [] if args.interactive else read_prompts(args, target)
    if args.check_head:
        return show_head(args, target, drafter, outputs)
    longest = max((len(output.prompt_ids) for output in outputs), default=CHAT_CONTEXT) + args.max_new_tokens
    window = config.sliding_window or config.max_context
    max_length = cache_length(config, min(longest, config.max_context, window))
    for model in drafter.models:  # a conversation may grow to all of it
        check_window(model.config, max_length if args.interactive else min(longest, max_length))
    compile = can_compile(args)
    try:
        sizes = (max_length, args.batch_size, compile)
        decoder = Decoder(target.model, drafter, sampling, *sizes, logprobs=args.logprobs)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--batch_size {args.batch_size}: the caches cannot be allocated ({reason})") from None
    with naming_flags():
        decoder.controls.check(sampling, target.stop_ids)  # before anything is compiled
    stats = Stats(compile_seconds=warm_up(decoder, target.precision, ranks))
    if args.explain:
        print(Screen.legend(), file=sys.stderr, flush=True)
    with trace(args.profile if ranks.rank == 0 else None):
        if args.interactive:
            interact(decoder, target, args, stats)
        else:
            decode_all(decoder, outputs, args, target.stop_ids, stats)
    summary = stats_json(stats, [target.model, *drafter.models], args.device, method, outputs)
    if args.json:
        head = {"method": method, "precision": target.precision, "device": args.device, "seed": args.seed}
        print(json.dumps({**head, "outputs": [output.as_json() for output in outputs], "stats": summary}))
    print(f"\n{method}, {target.precision} on {args.device}: {format_stats(summary)}", file=sys.stderr)
    return report_errors(outputs)


def main(argv: list[str] | None = None) -> int:
    """Run the command line -> exit status."""
    return process.exit_status(lambda: run(build_parser().parse_args(argv)), BadInput)


if __name__ == "__main__":
    sys.exit(process.run(main))
