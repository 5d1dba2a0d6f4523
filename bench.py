"""bench.py: what speculation costs and brings on this machine, measured.

    python bench.py all         # every report below with the settings of the README, tables and figures
    python bench.py cost        # T(n): one target forward over n tokens, and what drafting costs
    python bench.py methods     # every method in three precisions: tokens/s, tokens per step, speedup
    python bench.py auto        # `auto` against every fixed method: models, precisions, batch sizes
    python bench.py synthetic --shape llama-3-8b     # random weights, published acceptance
    python bench.py quality     # what a precision costs: perplexity, agreement with bf16, GSM8K
    python bench.py tree        # trees of 4 to 60 nodes, and of as many as pay, in three precisions
    python bench.py hierarchical  # a decoder as a drafter, next to flat methods, in two precisions
    python bench.py qspec       # the target's own weights as drafter, at several batch sizes
    python bench.py qspec_shape --shape llama-3.2-1b --max_new_tokens 32    # of random weights
    python bench.py confidence  # drafts of QSpec that end where it is not sure of itself
    python bench.py noise       # acceptance with noise shared by target and drafter, and independent
    python bench.py exact       # every method in every precision: is each text the autoregressive one?
    python bench.py perplexity  # of every precision and quantizer, on held-out modules
    python bench.py rotation    # accepted lengths on a rotated target and on the same one unrotated
    python bench.py hadamard    # what online rotations add to the linears that they belong to
    python bench.py kernels     # the linears of real models for 1 to 64 rows, next to PyTorch's and others'
    python bench.py decode --shape llama-3.2-1b --precision w4a8    # a whole model of random weights

    # your own models and prompts
    python bench.py methods --checkpoint_path DIR --draft_checkpoint_path DIR --prompt_file spec_bench.jsonl
    python bench.py quality --checkpoint_path DIR --prompt_file gsm8k_test.jsonl --max_new_tokens 400

The one idea: speedup = tau * T(1) / (drafting + T(n)), where tau is tokens per step. Everything is measured
in one process, interleaved, and given as a ratio: absolute times change with the machine's mood, ratios less.
Run it on an otherwise idle machine. The last line of the output is the results as JSON.

`kernels` and `cost` also give shares of the copy bandwidth: the bytes of the weights as they lie in memory
(nibbles, bytes or bf16, with scales and zeros) over the seconds of a call or a step, divided by what copying
one large tensor moves in a second, bytes read and written both counted (`copy_bandwidth`, measured once per
run). Weights are only read, which on a CPU is faster than copying: shares above 1 are possible there.

On a GPU (--device cuda; scripts/gpu_pass.py runs what belongs together) clocks are read when the device has
finished. `kernels` times CUDA graphs of many calls with events. T(n) and what drafts are made of are whole
calls, the host's share included; T(n) is also measured without it, as a graph. Tokens per second and speedups
are right, since a step counts when the host has read it. But how a step in the *texts* is split into drafting
and verification is seen from the host alone, which goes on while the device still drafts, and not at all
where a whole step is one graph: `drafting_seconds` (then 0), what is `predicted` from it (then too much), and
the seconds of `levels` are the host's.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.metadata
import importlib.util
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import generate
import gpt_spec
import kernels
import quantize
from gpt_spec import (
    AutoDrafter,
    BadInput,
    CheckpointModule,
    Decoder,
    Draft,
    Drafter,
    EagleHead,
    HierarchicalDrafter,
    Level,
    LookupDrafter,
    ModelConfig,
    Sampling,
    SequentialDrafter,
    State,
    Stats,
    Transformer,
    TreeDrafter,
    rope_frequencies,
)

HELD_OUT = generate.MODELS / "held_out.jsonl"
BASE = "autoregressive"  # what all methods are compared with
REFERENCE = "autoregressive in bf16"  # what the rows of other precisions are compared with, too


class IndependentDrafter(SequentialDrafter):
    """Draws with noise of its own, as every engine does that samples target and drafter separately."""

    def write(
        self, fed: Tensor, start: Tensor, last: Tensor, seed: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        return super().write(fed, start, last, seed + 2**40, count)


class GreedyDrafter(SequentialDrafter):
    """Proposes its most probable token, whatever the temperature."""

    def start(self, level: Level) -> None:
        super().start(level)
        self.sampling = Sampling()


class FixedTree(TreeDrafter):
    """The n best nodes of the trees that `auto` grows, so that both run the same compiled graphs."""

    def __init__(self, head, n: int, *shape: int):
        super().__init__(head, None, *shape)
        self.n, self.needs_costs = n, False

    def draft_sizes(self) -> list[int]:
        return [self.n]

    def choose(self, mean: Tensor) -> int:
        return self.n


class NoiselessTree(TreeDrafter):
    """Grows its tree from the head's logits alone, as EAGLE-2 does at every temperature."""

    def start(self, level: Level) -> None:
        super().start(level)
        self.sampling = Sampling()


# --------------------------------------------------------------------------------------------------
# Prompts, models and how they are run
# --------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    tokens: list[int]
    category: str = ""
    answer: str = ""  # the right one, where a file has it


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
            tokens, entry = generate.read_line(line, settings, tokenizer), json.loads(line)
        except BadInput as error:
            raise BadInput(f"--prompt_file: {path} line {number}: {error}") from None
        prompts.append(Prompt(tokens, str(entry.get("category", "")), str(entry.get("answer", ""))))
    return prompts


def held_out_prompts(count: int) -> list[Prompt]:
    """`count` prompts of held-out modules in the tokens of the shipped models."""
    return read_prompt_file(HELD_OUT, generate.load_tokenizer(generate.SHIPPED_TARGET), count)


def read_prompts(count: int) -> list[list[int]]:
    """The same, tokens alone."""
    return [prompt.tokens for prompt in held_out_prompts(count)]


def fitting_prompts(parts: Parts, args: argparse.Namespace) -> list[Prompt]:
    """The prompts of --prompt_file, or held-out ones, that leave room for --max_new_tokens; it says how many
    do not. In a chat template, where a file meets a model that has one."""
    tokenizer = parts.target.tokenizer
    chat = bool(args.prompt_file and tokenizer and tokenizer.template)
    prompts = read_prompt_file(args.prompt_file or HELD_OUT, tokenizer, args.prompts, chat)
    models = [parts.target.model] + ([parts.small] if parts.small else [])
    room = min(model.config.max_context for model in models) - args.max_new_tokens
    fitting = [prompt for prompt in prompts if len(prompt.tokens) <= room]
    if len(fitting) < len(prompts):
        print(f"{len(prompts) - len(fitting)} of {len(prompts)} prompts are left out: over {room} tokens")
    if not fitting:
        raise BadInput(f"--max_new_tokens {args.max_new_tokens}: no prompt leaves room for so many")
    return fitting


class Paths(NamedTuple):
    """Checkpoint directories; None is what there is not."""

    target: str | Path
    small: str | Path | None = None
    head: str | Path | None = None  # of the target
    small_head: str | Path | None = None


SHIPPED = Paths(generate.SHIPPED_TARGET, generate.SHIPPED_SMALL, generate.SHIPPED_HEAD, generate.SMALL_HEAD)
SHIPPED_ALONE = Paths(generate.SHIPPED_SMALL, head=generate.SMALL_HEAD)


@dataclass
class Parts:
    """What methods are made of, in one precision; None is what there is not."""

    target: generate.Target
    small: Transformer | None = None
    head: Callable[[Transformer], EagleHead] | None = None  # makes one for the target or its twin
    small_head: Callable[[Transformer], EagleHead] | None = None


def chosen_paths(args: argparse.Namespace) -> Paths:
    """Those of the flags, or the shipped ones. A head is for the model whose hidden size it has."""
    if args.checkpoint_path is None:
        return SHIPPED
    paths = Paths(args.checkpoint_path, args.draft_checkpoint_path, args.eagle_checkpoint_path)
    if paths.small and paths.head:
        named = zip(paths, ("--checkpoint_path", "--draft_checkpoint_path", generate.HEAD_FLAG))
        target, small, head = (
            generate.read_json(generate.find_checkpoint(str(path), flag) / "config.json")
            for path, flag in named
        )
        width = head.get("target_hidden_size", head.get("hidden_size"))
        if width == small.get("hidden_size") != target.get("hidden_size"):
            return Paths(paths.target, paths.small, small_head=paths.head)
    return paths


def load_parts(precision: str, paths: Paths, device: str = "cpu") -> Parts:
    flags = {"precision": precision, "draft_precision": None, "device": device, "ignore_eos": False}
    args = argparse.Namespace(checkpoint_path=paths.target, **flags)
    target = generate.load_target(args)
    small = generate.load_draft_model(str(paths.small), args, target) if paths.small else None
    heads = (partial(generate.load_head, path) if path else None for path in (paths.head, paths.small_head))
    return Parts(target, small, *heads)


def shipped(precision: str) -> tuple[Transformer, Transformer]:
    parts = load_parts(precision, SHIPPED)
    return parts.target.model, parts.small


def split(text: str) -> list[str]:
    return text.split(",")


def build_decoders(
    target: Transformer,
    drafters: dict[str, Drafter],
    prompts: list[Prompt],
    args: argparse.Namespace,
    batch_size: int = 1,
) -> dict[str, Decoder]:
    """A warm decoder for every drafter, with room for the longest prompt."""
    longest = max(len(prompt.tokens) for prompt in prompts) + args.max_new_tokens
    settings = (gpt_spec.cache_length(target.config, longest), batch_size, not args.uncompiled)
    sampling = Sampling(args.temperature, top_p=args.top_p)
    decoders = {name: Decoder(target, drafter, sampling, *settings) for name, drafter in drafters.items()}
    for decoder in decoders.values():
        decoder.warm_up()
    return decoders


def decode_all(
    decoder: Decoder,
    prompts: list[list[int]],
    tokens: int,
    stats: Stats | None = None,
    stop_ids: Iterable[int] = (),
) -> list[list[int]]:
    texts = [[] for _ in prompts]
    for emissions in decoder.run(prompts, tokens, stop_ids, stats=stats):
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
    decoder: Decoder, prompts: list[list[int]], tokens: int, total: Stats, stop_ids: Iterable[int] = ()
) -> Run:
    """Decode some prompts, and count it in `total`, too."""
    before = replace(total)
    texts = decode_all(decoder, prompts, tokens, total, stop_ids)
    names = ("new_tokens", "target_forwards", "decode_seconds", "prefill_seconds")
    new, steps, *seconds = (getattr(total, name) - getattr(before, name) for name in names)
    return Run(texts, new - len(prompts), steps, *seconds)


def interleave(
    functions: dict[Any, Callable[[], object]], repeats: int, burst: int = 1, device: str = "cpu"
) -> dict[Any, float]:
    """Median seconds of each function; they take turns, so that all see the same machine.

    In a turn, `burst` calls follow each other, and the first half only warms the caches up. A call on a GPU
    has ended when the device has finished.
    """
    times = {name: [] for name in functions}
    for turn in range(repeats + 3):
        for name, function in functions.items():
            for call in range(burst):
                finish(device)
                begin = time.perf_counter()
                function()
                finish(device)
                counts = turn >= 3 and call >= burst // 2
                times[name] += [time.perf_counter() - begin] if counts else []
    return {name: median(values) for name, values in times.items()}


def on_gpu(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def finish(device: str | torch.device) -> None:
    """Wait for a GPU, so that a clock may be read."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def interleave_on_device(
    functions: dict[Any, Callable[[], object]], repeats: int, device: str = "cpu", calls: int = 1
) -> dict[Any, float]:
    """`interleave` for what is shorter than the host's work for it: on a GPU, events around CUDA graphs of so
    many calls each. All of a turn is queued at once, so that the device never waits for the host."""
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
    """So many calls as a CUDA graph: what replays it. What cannot be captured is called, and it is said."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and allocates what a graph must not
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        with gpt_spec.no_garbage_collection(), torch.cuda.graph(graph):
            for _ in range(calls):
                function()
    except RuntimeError as error:
        print(f"{name}: no CUDA graph, timed with its launches: {first_line(error)}", flush=True)
        return lambda: [function() for _ in range(calls)]
    return graph.replay


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def copy_bandwidth(device: str = "cpu", size: int | None = None) -> float:
    """Bytes per second that copying one large tensor moves, read and written both counted. `size`: its bytes;
    by default several times what a last-level cache holds."""
    size = size or (2**31 if on_gpu(device) else 2**28)
    source = torch.randint(2**62, (2**12,), device=device).repeat(size // 2**15)  # random bytes, made quickly
    goal = torch.empty_like(source)
    seconds = interleave_on_device({"copy": lambda: goal.copy_(source)}, 7, device, calls=4)["copy"]
    return 2 * source.nbytes / seconds


# --------------------------------------------------------------------------------------------------
# Costs
# --------------------------------------------------------------------------------------------------


def freeze(decoder: Decoder) -> Decoder:
    """200 tokens in its caches, and every repetition of a step does the same work."""
    vocabulary = decoder.model.config.vocab_size
    decoder.prefill(0, [3 + i % (vocabulary - 3) for i in range(200)], seed=0)
    decoder.state.active.fill_(False)
    return decoder


def measure_cost(parts: Parts, sizes: list[int], turns: int, burst: int, compile: bool) -> dict[str, dict]:
    """Seconds of a whole verification of n nodes, by n, and of the units that drafts are made of, by name;
    200 tokens in the caches, all taking turns.

    A token of the small model is a third of a draft of 3; a level of the head is what a tree of depth 6 takes
    longer than one of depth 2, divided by the 4 levels between.
    """
    target = parts.target.model

    def decoder(drafter: Drafter | None = None, model: Transformer = target) -> Decoder:
        return freeze(Decoder(model, drafter, max_length=512, compile=compile))

    device = target.norm.weight.device
    tokens = [torch.randint(3, target.config.vocab_size, (1, n), device=device) for n in sizes]
    drafts = [Draft.chain(some) for some in tokens]
    plain, drafters = decoder(), {}
    functions: dict[Any, Callable] = {n: partial(plain.commit, draft) for n, draft in zip(sizes, drafts)}
    for lower in quantize.lower_precisions(parts.target.precision):
        twin = decoder(model=quantize.share_weights(target, lower))
        functions[f"a token in {lower}"] = partial(twin.commit, Draft.chain(drafts[0].tokens[:, :1]))
    if parts.small:
        drafters["a token of the small model"] = SequentialDrafter(parts.small, 3)
    if parts.head:
        head = parts.head(target)
        drafters |= {"shallow": TreeDrafter(head, 8, 2), "deep": TreeDrafter(head, 8, 6)}
    for name, drafter in drafters.items():
        functions[name] = partial(drafter.propose, decoder(drafter).state)
    with torch.no_grad():
        seconds = interleave(functions, turns, burst, device)
    drafting = {name: value for name, value in seconds.items() if str(name).startswith("a token in")}
    if parts.small:
        drafting["a token of the small model"] = seconds["a token of the small model"] / 3
    if parts.head:
        drafting["a level of the EAGLE head"] = (seconds["deep"] - seconds["shallow"]) / 4
    costs = {"verification": {str(n): seconds[n] for n in sizes}, "drafting": drafting}
    return costs | ({"on_device": measure_graphs(plain, drafts, turns)} if on_gpu(device) else {})


@torch.no_grad()
def measure_graphs(decoder: Decoder, drafts: list[Draft], turns: int) -> dict[str, float]:
    """T(n) without the host's share: seconds of a CUDA graph of all that `commit` has the GPU do."""
    functions = {str(draft.tokens.shape[1]): partial(decoder.keep, draft) for draft in drafts}
    return interleave_on_device(functions, turns, decoder.setup.device)


def recording_only() -> AbstractContextManager:
    """On a GPU `compile` stands for CUDA graphs as well, without which the host is slower than the device.
    From here on, or in a `with` until its end, these are recorded, and nothing is compiled."""
    return torch.compiler.set_stance("force_eager")


def compiles(args: argparse.Namespace) -> bool:
    """What `Decoder` is told of compiling. Graphs of the layers of a --shape take minutes to compile, and its
    steps tens of milliseconds on a CPU: these run as they are, and on a GPU they are recorded only."""
    if args.shape and on_gpu(args.device):
        recording_only()
        return not args.uncompiled
    return not (args.shape or args.uncompiled)


def weights_of_a_step(model: Transformer) -> list[Tensor]:
    """All that one step reads of a model's weights; of the embedding it is only a few rows."""
    return [p for module in (model.layers, model.lm_head) for p in module.parameters()]


def shares_of_copy(seconds: dict[str, float], nbytes: int, bandwidth: float) -> dict[str, float]:
    """The share of the copy bandwidth with which so many bytes are read in each of these times."""
    return {name: nbytes / value / bandwidth for name, value in seconds.items()}


def report_cost(args: argparse.Namespace) -> dict:
    """T(n) of the shipped target, or of --checkpoint_path, and what drafts are made of: see `measure_cost`.

    With --shape, of random weights: the target, the next smaller shape as small model, and a head. Not
    compiled: see `compiles`.

    `memory` and `share_of_copy` say how fast a step reads the target's weights: see above.
    """
    sizes, results, bandwidth = numbers(args.sizes), {}, copy_bandwidth(args.device)
    for precision in split(args.precisions):
        if args.shape:
            parts = random_parts(SHAPES[args.shape], SMALLER.get(args.shape), precision, args.device)
        else:
            parts = load_parts(precision, chosen_paths(args), args.device)
        # What lies in the cache has to be brought there first; the weights of a shape never do.
        effort = (3 * args.repeats, 2 if args.shape else 10, compiles(args))
        costs = measure_cost(parts, sizes, *effort)
        nbytes = sum(p.nbytes for p in weights_of_a_step(parts.target.model))
        costs["memory"] = {"copy_bandwidth": bandwidth, "weight_bytes": nbytes}
        for name, shares in (("verification", "share_of_copy"), ("on_device", "share_of_copy_on_device")):
            costs |= {shares: shares_of_copy(costs[name], nbytes, bandwidth)} if name in costs else {}
        results[precision] = costs
        print_cost(precision, costs)
    return results


def print_cost(precision: str, cost: dict[str, dict]) -> None:
    first, memory = cost["verification"]["1"], cost["memory"]
    rows = {"T(n) / T(1)": {n: seconds / first for n, seconds in cost["verification"].items()}}
    rows["of copying"] = cost["share_of_copy"]
    if "on_device" in cost:
        rows["device, T(1)"] = {n: seconds / first for n, seconds in cost["on_device"].items()}
        rows["of copying"] = cost["share_of_copy_on_device"]
    weights, copying = f"{memory['weight_bytes'] / 1e6:.0f} MB", f"{memory['copy_bandwidth'] / 1e9:.1f} GB/s"
    print(f"{precision:6} T(1) is {first * 1e3:.3f} ms, weights {weights}, copying {copying}")
    print(f"    {'n':12}" + "".join(f"{n:>7}" for n in cost["verification"]))
    for name, values in rows.items():
        print(f"    {name:12}" + "".join(f"{value:7.2f}" for value in values.values()))
    for name, seconds in cost["drafting"].items():
        print(f"    {name:28} {seconds * 1e3:9.3f} ms   {seconds / first:6.2f} T(1)", flush=True)


# --------------------------------------------------------------------------------------------------
# Methods
# --------------------------------------------------------------------------------------------------


def compare_drafters(
    target: Transformer, drafters: dict[str, Drafter], args: argparse.Namespace
) -> dict[str, dict]:
    """Every drafter of a shipped target on held-out prompts: see `compare`."""
    prompts = held_out_prompts(args.prompts)
    return compare(build_decoders(target, drafters, prompts, args), prompts, args)


def compare(
    decoders: dict[str, Decoder],
    prompts: list[Prompt],
    args: argparse.Namespace,
    stop_ids: Iterable[int] = (),
    over: str | None = None,
    effort: tuple[int, int] = (20, 10),
    note: str = "",
) -> dict[str, dict]:
    """Every decoder on the same prompts, taking turns; the first is what the others are compared with.

    Per decoder: tokens per step (tau), seconds of drafting in a step (of `auto`, with catching up), T(n)
    averaged over the steps, n being what each verified; tokens/s, speedups (quartiles of the prompts'
    ratios), and what the cost model makes of the first three, tau * T(1) / (drafting + T(n)). T(n) / T(1) is
    measured apart from the texts, `effort` being the turns and the calls in each; T(1) is what a step of the
    first decoder took in them, since the machine may be slower by then, and drafting was.

    `over` names the decoder of the bf16 target, if the others are to be compared with it as well. Its own
    texts are not those of the others, and it gets no row. With a `note`, which ends every line and row,
    texts are not compared.
    """
    base, cost = next(iter(decoders)), measure_verification(decoders, *effort)
    totals, runs, used = {name: Stats() for name in decoders}, {name: [] for name in decoders}, []
    for turn, prompt in enumerate(prompts):
        once = {
            name: timed(decoders[name], [prompt.tokens], args.max_new_tokens, totals[name], stop_ids)
            for name in rotate_names(list(decoders), turn)
        }
        if all(run.tokens for run in once.values()):  # a text of one token takes no step
            used.append(prompt)
            for name, run in once.items():
                runs[name].append(run)
    if not used:
        raise BadInput("--prompt_file: no prompt is answered with more than one token")
    rows, first = {}, sum(run.seconds for run in runs[base]) / sum(run.steps for run in runs[base])
    if on_gpu(decoders[base].setup.device):
        print("drafting is what the host sees of it, without waiting for the GPU; predicted follows from it")
    slowness = first / cost[base][1]
    for name in decoders:
        if name == base or name != over:
            seconds = {n: slowness * apart for n, apart in cost[name].items()}
            rows[name] = summarize(totals[name], runs[name], runs[base], seconds, first)
            rows[name] |= by_category(used, runs[name], runs[base])
            different = {"different_texts": count_different(runs[name], runs[base])}
            rows[name] |= {"note": note} if note else different
        if over and name in rows:
            ratio = cost[over][1] / cost[base][1]
            rows[name]["speedup_over_bf16"] = quartiles(speed_ratios(runs[name], runs[over]))
            rows[name]["predicted_over_bf16"] = rows[name]["predicted"] * ratio
    print_rows(rows, first)
    return rows


def speed_ratios(ours: list[Run], theirs: list[Run]) -> list[float]:
    return [a.speed / b.speed for a, b in zip(ours, theirs)]


def count_different(ours: list[Run], theirs: list[Run]) -> int:
    pairs = [pair for a, b in zip(ours, theirs) for pair in zip(a.texts, b.texts)]
    return sum(a != b for a, b in pairs)


def summarize(
    stats: Stats, runs: list[Run], base: list[Run], cost: dict[int, float], first: float
) -> dict[str, Any]:
    """A row of `compare`; `cost`: seconds by number of nodes, `first`: T(1)."""
    steps, ratios = stats.target_forwards, speed_ratios(runs, base)
    verification = sum(cost[n] * count for n, count in stats.nodes_histogram.items()) / steps
    drafting = stats.drafting_seconds / steps if stats.drafted_tokens else 0.0
    return {
        "tokens_per_step": stats.tokens_per_step,
        "drafting_seconds": drafting,
        "verification_seconds": verification,
        "tokens_per_second": median(run.speed for run in runs),
        "speedup": quartiles(ratios),
        "slowest": min(ratios),
        "fastest": max(ratios),
        "predicted": stats.tokens_per_step * first / (drafting + verification),
        "time_to_first_token_seconds": median(run.prefill_seconds for run in runs),
        "prefill_seconds": stats.prefill_seconds,
        "expected_accepted_tokens": stats.expected_accepted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "drafted_tokens": stats.drafted_tokens,
        "acceptance_by_position": [round(share, 3) for share in stats.acceptance_by_position],
        "steps_by_nodes": stats.nodes_histogram,
        "levels": generate.levels_json(stats),
        "speeds": [run.speed for run in runs],
    } | ({"steps_by_drafter": stats.drafter_histogram} if stats.drafter_histogram else {})


def by_category(prompts: list[Prompt], runs: list[Run], base: list[Run]) -> dict[str, dict]:
    """The same for every category of prompts, if there are several."""
    rows = {}
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        chosen = [i for i, prompt in enumerate(prompts) if prompt.category == category]
        mine, theirs = [runs[i] for i in chosen], [base[i] for i in chosen]
        rows[category or "other"] = {
            "tokens_per_step": sum(run.tokens for run in mine) / sum(run.steps for run in mine),
            "tokens_per_second": median(run.speed for run in mine),
            "speedup": quartiles(speed_ratios(mine, theirs)),
        }
    return {"categories": rows} if len(rows) > 1 else {}


def print_rows(rows: dict[str, dict], first: float) -> None:
    print(f"T(1) is {first * 1e3:.2f} ms")
    print(
        f"{'':28}   tau  drafting/T(1)  T(n)/T(1)  tokens/s  speedup (slowest, fastest)  predicted  "
        "over bf16  first token, ms"
    )
    for name, row in rows.items():
        draft, verify = row["drafting_seconds"] / first, row["verification_seconds"] / first
        over = f"{row['speedup_over_bf16'][1]:11.2f}" if "speedup_over_bf16" in row else " " * 11
        note = f"   {row['note']}" if "note" in row else ""
        print(
            f"{name:28}{row['tokens_per_step']:6.2f}{draft:15.2f}{verify:11.2f}{row['tokens_per_second']:10.0f}"
            f"{row['speedup'][1]:9.2f} ({row['slowest']:.2f}, {row['fastest']:.2f})"
            f"{row['predicted']:19.2f}{over}{row['time_to_first_token_seconds'] * 1e3:17.1f}{note}",
            flush=True,
        )
        for level in row["levels"][1:]:
            print(f"{'':14}inside: {level['tokens_per_step']:.2f} tokens per step of the middle model{note}")
        for category, part in row.get("categories", {}).items():
            print(f"{'':14}{category}: tau {part['tokens_per_step']:.2f}, speedup {part['speedup'][1]:.2f}")
    base, *others = rows
    if "different_texts" in rows[base]:
        wrong = sum(row["different_texts"] for row in rows.values())
        print(f"{wrong} texts are not those of {base}")
    off = [abs(rows[name]["predicted"] / rows[name]["speedup"][1] - 1) for name in others]
    print(f"predicted is off by {median(off):.1%} (median of the methods){note}\n", flush=True)


def measure_verification(
    decoders: dict[str, Decoder], turns: int = 20, burst: int = 10
) -> dict[str, dict[int, float]]:
    """Seconds of verifying n nodes, for every n that a decoder meets, with 200 tokens in the cache."""
    functions = {}
    for name, decoder in decoders.items():
        freeze(decoder)
        for n in decoder.drafter.draft_sizes():
            functions[name, n] = partial(decoder.commit, decoder.blank_draft(n))
    with torch.no_grad():
        device = next(iter(decoders.values())).setup.device
        # In bursts, because a decoder in use meets its own data in the caches.
        seconds = interleave(functions, turns, burst, device)
    return {
        name: {n: seconds[name, n] for n in decoder.drafter.draft_sizes()}
        for name, decoder in decoders.items()
    }


def every_method(parts: Parts, args: argparse.Namespace) -> dict[str, Drafter]:
    """What can be made of the parts, by name."""
    target, shape = parts.target.model, (args.tree_depth, args.tree_topk)
    drafters = {"autoregressive": Drafter(), "lookup K=3": LookupDrafter(3), "lookup K=7": LookupDrafter(7)}
    if parts.small:
        drafters["sequential K=3"] = SequentialDrafter(parts.small, 3)
    if parts.head:
        head = parts.head(target)
        largest = min(60, 1 + args.tree_topk + (args.tree_depth - 1) * args.tree_topk**2)
        drafters[f"tree of {largest}"] = TreeDrafter(head, largest, *shape)
        drafters["tree"] = TreeDrafter(head, None, *shape)
    if parts.small and parts.small_head:
        inner = TreeDrafter(parts.small_head(parts.small), args.tree_size, *shape)
        drafters["hierarchical"] = HierarchicalDrafter(parts.small, inner, args.min_draft_length)
    for i, lower in enumerate(quantize.lower_precisions(parts.target.precision)):
        twin = quantize.share_weights(target, lower)
        if parts.head and i == 0:
            own = TreeDrafter(parts.head(twin), args.tree_size, *shape)
            middle = HierarchicalDrafter(twin, own, args.min_draft_length, shares_cache=True)
            drafters["hierarchical, own middle"] = middle
        drafters[f"qspec {lower} K=3"] = SequentialDrafter(twin, 3, shares_cache=True)
    return drafters | {"auto": auto_drafter(parts, args)}


def auto_drafter(parts: Parts, args: argparse.Namespace) -> AutoDrafter:
    """Of everything that does not have a decoder inside, each choosing its own lengths and sizes."""
    target, drafters = parts.target.model, {"lookup": LookupDrafter(None)}
    if parts.small:
        drafters["sequential"] = SequentialDrafter(parts.small, None)
    if parts.head:
        drafters["tree"] = TreeDrafter(parts.head(target), None, args.tree_depth, args.tree_topk)
    for lower in quantize.lower_precisions(parts.target.precision)[:1]:
        twin = quantize.share_weights(target, lower)
        drafters["qspec"] = SequentialDrafter(twin, None, shares_cache=True)
    return AutoDrafter(drafters)


def report_methods(args: argparse.Namespace) -> dict:
    """Every method in every precision on the same prompts, and next to them `autoregressive` of the bf16
    target: see `compare`. Texts of --prompt_file end where the model ends them, others at the budget."""
    results, paths = {}, chosen_paths(args)
    for precision in split(args.precisions):
        parts = load_parts(precision, paths, args.device)
        prompts = fitting_prompts(parts, args)
        print(f"{precision}, {len(prompts)} prompts", flush=True)
        decoders = build_decoders(parts.target.model, every_method(parts, args), prompts, args)
        over = BASE if precision == "bf16" else None
        if over is None and not is_quantized(paths.target):
            reference, over = generate.load_model(paths.target, "bf16", args.device), REFERENCE
            decoders |= build_decoders(reference, {REFERENCE: Drafter()}, prompts, args)
        stop_ids = parts.target.stop_ids if args.prompt_file else ()
        results[precision] = compare(decoders, prompts, args, stop_ids, over)
    return results


def is_quantized(path: str | Path) -> bool:
    """Does the checkpoint hold 4-bit or 8-bit weights, so that there is no bf16 model to compare with?"""
    return generate.open_checkpoint(generate.find_checkpoint(str(path))).quantization is not None


def flat_methods(parts: Parts, args: argparse.Namespace) -> dict[str, Drafter]:
    """`auto`, and what it is measured against: every method but hierarchies, which take minutes to compile
    and lose here (see `methods`), and trees of 8, the size that is best most of the time."""
    drafters = every_method(parts, args)
    if parts.head:
        shape = (args.tree_depth, args.tree_topk)
        drafters["tree of 8"] = FixedTree(parts.head(parts.target.model), 8, *shape)
    return {name: d for name, d in drafters.items() if not isinstance(d, HierarchicalDrafter)}


def report_auto(args: argparse.Namespace) -> dict:
    """`auto` against every fixed method that fits, for both shipped targets, every precision and batch size:
    see `measure_auto`."""
    targets, results = {"python-7m": SHIPPED, "python-1m": SHIPPED_ALONE}, {}
    if args.checkpoint_path:
        targets = {Path(args.checkpoint_path).name: chosen_paths(args)}
    for name, paths in targets.items():
        for precision in split(args.precisions):
            for batch_size in numbers(args.batch_sizes):
                key = f"{name} {precision} batch {batch_size}"
                results[key] = measure_auto(load_parts(precision, paths, args.device), batch_size, args)
                print_auto(key, results[key])
    return results


def measure_auto(parts: Parts, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """--repeats turns over the prompts; within a turn the decoders take turns prompt by prompt or, in a
    batch, after so many that rows are refilled twice. A turn's speed is that of all its texts together,
    without prefill; speedups are the turns' ratios to `autoregressive` (quartiles)."""
    prompts = fitting_prompts(parts, args)
    prompts = prompts if batch_size > 1 else prompts[::3]  # one by one they take three times as long
    decoders = build_decoders(parts.target.model, flat_methods(parts, args), prompts, args, batch_size)
    stats, different = {name: Stats() for name in decoders}, dict.fromkeys(decoders, 0)
    some = 1 if batch_size == 1 else 3 * batch_size
    speeds, begins = {name: [] for name in decoders}, range(0, len(prompts), some)
    stop_ids = parts.target.stop_ids if args.prompt_file else ()
    for turn in range(args.repeats):
        runs = {name: [] for name in decoders}
        for i, begin in enumerate(begins):
            tokens = [prompt.tokens for prompt in prompts[begin : begin + some]]
            for name in rotate_names(list(decoders), turn + i):
                runs[name].append(timed(decoders[name], tokens, args.max_new_tokens, stats[name], stop_ids))
        if not all(run.tokens for mine in runs.values() for run in mine):
            raise BadInput("--prompt_file: prompts that are answered with one token cannot be timed")
        for name, mine in runs.items():
            speeds[name].append(sum(run.tokens for run in mine) / sum(run.seconds for run in mine))
            different[name] += count_different(mine, runs[BASE])
    methods = {
        name: {
            "speedup": quartiles([a / b for a, b in zip(speeds[name], speeds[BASE])]),
            "against_auto": quartiles([a / b for a, b in zip(speeds["auto"], speeds[name])]),
            "tokens_per_second": median(speeds[name]),
            "tokens_per_step": stats[name].tokens_per_step,
            "different_texts": different[name],
        }
        for name in decoders
    }
    fixed, plain = (
        verdict(methods[name], share) for name, share in ((best_fixed(methods), 0.95), (BASE, 0.97))
    )
    verdicts = {"against_best_fixed": fixed, "against_autoregressive": plain}
    return verdicts | {"methods": methods, "chosen": stats["auto"].drafter_histogram}


def verdict(row: dict[str, Any], least: float) -> dict[str, float | bool]:
    """Is `auto` at least this share as fast as a method, or, where the turns differ by more, by that spread
    (interquartile range) of it?"""
    low, middle, high = row["against_auto"]
    spread = (high - low) / middle
    return {"ratio": middle, "spread": spread, "within": middle >= min(least, 1 - spread)}


def best_fixed(methods: dict[str, dict]) -> str:
    """The fastest fixed method, by its median; known only in hindsight."""
    return max((name for name in methods if name != "auto"), key=lambda name: methods[name]["speedup"][1])


def print_auto(key: str, result: dict[str, Any]) -> None:
    methods, total = result["methods"], sum(result["chosen"].values())
    print(
        f"{key}\n{'':20}tokens/s     tau  speedup (quartiles)    auto / this (quartiles)  texts that differ"
    )
    for name, row in methods.items():
        ratios = [f"{b:.2f} ({a:.2f} to {c:.2f})" for a, b, c in (row["speedup"], row["against_auto"])]
        print(
            f"{name:18}{row['tokens_per_second']:10.0f}{row['tokens_per_step']:8.2f}  {ratios[0]:23}"
            f"{ratios[1]:25}{row['different_texts']}"
        )
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in result["chosen"].items())
    for key, name in (("against_best_fixed", best_fixed(methods)), ("against_autoregressive", BASE)):
        row = result[key]
        print(f"auto is {row['ratio']:.2f} of {name} (spread {row['spread']:.2f}): ", end="")
        print("within the tolerance" if row["within"] else "NOT within the tolerance")
    print(f"it chose {shares}\n", flush=True)


def report_tree(args: argparse.Namespace) -> dict:
    """Trees of fixed sizes and of `auto`, in bf16, w4a16 and w4a8: see `compare`.

    `auto` is also compared with every fixed size, prompt by prompt: median and quartiles of auto / fixed.
    """
    results = {}
    for precision in ("bf16", "w4a16", "w4a8"):
        print(f"{precision}, tree depth {args.tree_depth}, top-k {args.tree_topk}")
        target = generate.load_model(generate.SHIPPED_TARGET, precision)
        head = generate.load_head(generate.SHIPPED_HEAD, target)
        shape = (args.tree_depth, args.tree_topk)
        auto = TreeDrafter(head, None, *shape)
        drafters = {"1": Drafter()} | {str(n): FixedTree(head, n, *shape) for n in auto.sizes}
        drafters["auto"] = auto
        rows = compare_drafters(target, drafters, args)
        for name, row in rows.items():
            ratios = [auto / this for auto, this in zip(rows["auto"]["speeds"], row["speeds"])]
            row["auto_against_this"] = low, middle, high = quartiles(ratios)
            print(f"auto / {name}: {middle:.2f} ({low:.2f} to {high:.2f})")
        row = rows["auto"]
        print(f"auto verified {dict(sorted(row['steps_by_nodes'].items()))} (nodes: steps),", end=" ")
        expected = row["expected_accepted_tokens"]
        print(f"expected {expected:.0f} accepted tokens and had {row['accepted_tokens']}\n", flush=True)
        results[precision] = rows
    return results


def report_hierarchical(args: argparse.Namespace) -> dict:
    """Flat methods, a small model with a head of its own in the middle, and the target itself with lower
    activations, in w4a16 and w4a8: see `compare`."""
    results = {}
    for precision in ("w4a16", "w4a8"):
        lower = quantize.lower_precisions(precision)[0]
        print(f"{precision}; its own middle is {lower}")
        results[precision] = compare_drafters(*hierarchies(precision, lower, args), args)
    return results


def hierarchies(
    precision: str, lower: str, args: argparse.Namespace
) -> tuple[Transformer, dict[str, Drafter]]:
    """The shipped target, and what drafts for it."""
    target, small = shipped(precision)
    twin, shape = quantize.share_weights(target, lower), (args.tree_depth, args.tree_topk)

    def tree(model: Transformer, path: Path) -> TreeDrafter:
        return TreeDrafter(generate.load_head(path, model), args.tree_size, *shape)

    inner, own = tree(small, generate.SMALL_HEAD), tree(twin, generate.SHIPPED_HEAD)
    return target, {
        "autoregressive": Drafter(),
        "sequential": SequentialDrafter(small, 4),
        "tree": TreeDrafter(generate.load_head(generate.SHIPPED_HEAD, target)),
        "hierarchical": HierarchicalDrafter(small, inner, args.min_draft_length),
        f"hierarchical, {lower} self": HierarchicalDrafter(twin, own, args.min_draft_length, True),
    }


def report_qspec(args: argparse.Namespace) -> dict:
    """QSpec on the shipped target in w4a16, in batches of several sizes, and on the same target rotated, in
    one of the first size: a rotation changes acceptance, hardly the costs. See `measure_qspec`."""
    sizes, results = numbers(args.batch_sizes), {}
    prompts = read_prompts(args.prompts)  # several for each row, because rows are idle at the end
    with quantized_target(["--rotate"]) as rotated:
        for name, path, some in (
            ("shipped", generate.SHIPPED_TARGET, sizes),
            ("rotated", rotated, sizes[:1]),
        ):
            target = generate.load_model(path, "w4a16")
            compile = not args.uncompiled
            results[name] = {b: measure_qspec(name, target, prompts, b, args, compile) for b in some}
    return results


def report_qspec_shape(args: argparse.Namespace) -> dict:
    """QSpec on a model of --shape with random weights, whose acceptance says nothing about a trained one.

    Uncompiled: a graph of so many layers takes a minute to compile, and its steps take tens of milliseconds.
    """
    target, rows = random_model(SHAPES[args.shape], "w4a16"), {}
    for b in numbers(args.batch_sizes):
        prompts = torch.randint(3, 1000, (2 * b, 16), generator=torch.Generator().manual_seed(b)).tolist()
        rows[b] = measure_qspec(args.shape, target, prompts, b, args, compile=False)
    return {args.shape: rows}


def report_confidence(args: argparse.Namespace) -> dict:
    """QSpec on the shipped target in w4a16, drafts of 3 tokens, and of 6 that end before an improbable one:
    see `compare`."""
    target, results = generate.load_model(generate.SHIPPED_TARGET, "w4a16"), {}
    for precision in quantize.lower_precisions("w4a16"):
        twin = quantize.share_weights(target, precision)
        drafters: dict[str, Drafter] = {"autoregressive": Drafter()}
        for k, confidence in ((3, 0.0), (6, 0.0), (6, 0.3), (6, 0.5), (6, 0.7), (6, 0.9)):
            name = f"K={k}" + (f", confidence {confidence}" if confidence else "")
            drafters[name] = SequentialDrafter(twin, k, confidence, shares_cache=True)
        print(f"drafts in {precision}")
        results[precision] = compare_drafters(target, drafters, args)
    return results


def numbers(text: str) -> list[int]:
    return [int(part) for part in split(text)]


def measure_qspec(
    name: str,
    target: Transformer,
    prompts: list[list[int]],
    batch_size: int,
    args: argparse.Namespace,
    compile: bool,
) -> dict[str, dict]:
    """By precision of the drafts: costs in units of T, a forward of one token of every row; what E tokens per
    step should then make of them; and the speedup that the prompts had, all decoders taking turns.

    r is a draft token, v the verification of K + 1, both as they were in the texts; expected = E / (K r + v),
    of means over all turns, which knows no occupancy and no work of the host; `at_096` is the same with the E
    of drafts of which each is accepted with the probability 0.96, as published for `w4a4` drafts of a real
    model of 8 B.
    """
    k, longest = args.speculate_k, max(map(len, prompts)) + args.max_new_tokens
    drafters = {"w4a16": Drafter()}
    for precision in quantize.lower_precisions("w4a16"):
        twin = quantize.share_weights(target, precision)
        drafters[precision] = SequentialDrafter(twin, k, shares_cache=True)
    sampling = Sampling(args.temperature)
    decoders = {p: Decoder(target, d, sampling, longest, batch_size, compile) for p, d in drafters.items()}
    for decoder in decoders.values():
        decoder.warm_up()
    stats, speeds, texts = {p: Stats() for p in decoders}, {p: [] for p in decoders}, {}
    for turn in range(args.repeats):
        for p in rotate_names(list(decoders), turn):
            run = timed(decoders[p], prompts, args.max_new_tokens, stats[p])
            texts[p] = run.texts
            speeds[p].append(run.speed)
    rows, steps = {}, {p: s.row_forwards / batch_size for p, s in stats.items()}
    one = stats["w4a16"].verification_seconds / steps["w4a16"]
    for p in decoders:
        drafting = stats[p].drafting_seconds / steps[p] if p != "w4a16" else 0.0
        verification, e = stats[p].verification_seconds / steps[p], stats[p].tokens_per_step
        r, v = drafting / k / one, verification / one
        rows[p] = {
            "prompts": len(prompts),
            "seconds_of_a_step": {"drafting": drafting, "verification": verification},
            **{"r": r, "v": v, "tokens_per_step": e, "expected": e / (k * r + v)},
            "at_096": (1 if p == "w4a16" else (1 - 0.96 ** (k + 1)) / 0.04) / (k * r + v),
            "speedup": quartiles([a / b for a, b in zip(speeds[p], speeds["w4a16"])]),
            "tokens_per_second": median(speeds[p]),
            "aggregate_tokens_per_second": stats[p].aggregate_tokens_per_second,
            "acceptance_by_position": stats[p].acceptance_by_position,
            "occupancy": stats[p].occupancy,
            "different_texts": sum(a != b for a, b in zip(texts[p], texts["w4a16"])),
        }
    print_qspec(name, batch_size, rows, one)
    return rows


def print_qspec(name: str, batch_size: int, rows: dict[str, dict], one: float) -> None:
    print(f"{name}, batch of {batch_size}: T is {one * 1e3:.2f} ms")
    for p, row in rows.items():
        shares = ", ".join(f"{share:.2f}" for share in row["acceptance_by_position"])
        print(
            f"    {p:6} {row['tokens_per_second']:7.0f} tokens/s, occupied {row['occupancy']:.2f}; "
            f"r {row['r']:.2f}, v {row['v']:.2f}, E {row['tokens_per_step']:.2f} ({shares}): expected "
            f"{row['expected']:.2f}, measured {row['speedup'][1]:.2f}, at 0.96 {row['at_096']:.2f}; "
            f"{row['different_texts']} texts differ",
            flush=True,
        )


def rotate_names(names: list[str], turn: int) -> list[str]:
    """Everybody is first once in a while."""
    return names[turn % len(names) :] + names[: turn % len(names)]


def quartiles(values: list[float]) -> list[float]:
    return [statistics.quantiles(values, n=4)[i] for i in (0, 1, 2)] if len(values) > 1 else 3 * values


def report_noise(args: argparse.Namespace) -> dict:
    """Share of steps that accepted the first draft token, and tokens per step, by temperature and noise."""
    target, small = shipped(args.precision)
    head = generate.load_head(generate.SHIPPED_HEAD, target)
    kinds = {
        "shared": lambda: SequentialDrafter(small, 4),
        "independent": lambda: IndependentDrafter(small, 4),
        "greedy draft": lambda: GreedyDrafter(small, 4),
        "tree": lambda: TreeDrafter(head, 16, 4, 4),
        "tree, no noise": lambda: NoiselessTree(head, 16, 4, 4),
    }
    rows, prompts = {}, read_prompts(args.prompts)
    for temperature in (0.0, 0.3, 0.7, 1.0):
        for kind, drafter in kinds.items():
            sampling = Sampling(temperature, top_p=args.top_p)
            decoder = Decoder(target, drafter(), sampling, 1024, args.prompts, compile=False)
            stats = Stats()
            decode_all(decoder, prompts, args.max_new_tokens, stats)
            first = stats.acceptance_by_position[0]
            rows[f"{temperature} {kind}"] = {"first": first, "tokens_per_step": stats.tokens_per_step}
            print(
                f"T = {temperature}  {kind:14} first {first:.3f}  {stats.tokens_per_step:.2f} tokens per step"
            )
    return rows


def report_exact(args: argparse.Namespace) -> dict:
    """Texts that are not the autoregressive one, by method, precision and temperature: none should be.

    Compiled ones are compared with compiled ones. Batches of methods other than qspec, and hierarchies, run
    uncompiled, to save hours of compilation; --uncompiled leaves out the others, and --compiled these. On a
    GPU what is not compiled is recorded as CUDA graphs, except for what it is compared with.
    """
    rows, prompts = {}, read_prompts(args.prompts)
    for precision in split(args.precisions):
        target, compiled, uncompiled = exact_contestants(precision, args.device)
        for temperature in (0.0, 1.0):
            kinds = {True: {} if args.uncompiled else compiled, False: {} if args.compiled else uncompiled}
            for compile, entries in kinds.items():
                expected = None
                for name, (drafter, batch_size) in entries.items():
                    records = not compile and expected is not None and on_gpu(args.device)
                    with recording_only() if records else nullcontext():
                        settings = (Sampling(temperature), 1024, batch_size, compile or records)
                        decoder = Decoder(target, drafter, *settings)
                        decoder.warm_up()
                        texts = decode_all(decoder, prompts, args.max_new_tokens)
                    expected = expected or texts
                    different = sum(ours != base for ours, base in zip(texts, expected))
                    how = "compiled" if compile else "recorded" if records else "uncompiled"
                    name = f"{precision} T={temperature} {name}, {how}"
                    rows[name] = {"texts": len(texts), "different": different}
                    print(f"{name:60} {different} of {len(texts)} differ", flush=True)
    total = sum(row["texts"] for row in rows.values()), sum(row["different"] for row in rows.values())
    print("{} texts, of which {} differ".format(*total))
    return rows


def exact_contestants(precision: str, device: str = "cpu") -> tuple[Transformer, dict, dict]:
    """The shipped target; drafters and batch sizes by name, to run compiled and uncompiled. The first of each
    are what the others are compared with."""
    parts = load_parts(precision, SHIPPED, device)
    target, small = parts.target.model, parts.small
    inner = TreeDrafter(parts.small_head(small))
    flat = {
        "autoregressive": Drafter(),
        "lookup": LookupDrafter(4),
        "sequential": SequentialDrafter(small, 4),
        "tree": TreeDrafter(parts.head(target)),
    }
    qspecs, more = {}, {"hierarchical": HierarchicalDrafter(small, inner)}
    for lower in quantize.lower_precisions(precision):
        twin = quantize.share_weights(target, lower)
        own = TreeDrafter(parts.head(twin))
        qspecs[f"qspec {lower}"] = SequentialDrafter(twin, 3, shares_cache=True)
        more[f"hierarchical, {lower} self"] = HierarchicalDrafter(twin, own, shares_cache=True)
    one, eight = ", batch of 1", ", batch of 8"
    compiled = {name + one: (drafter, 1) for name, drafter in (flat | qspecs).items()}
    compiled |= {name + eight: (drafter, 8) for name, drafter in qspecs.items()}
    uncompiled = {"autoregressive" + one: (Drafter(), 1)}
    uncompiled |= {name + eight: (drafter, 8) for name, drafter in (flat | qspecs | more).items()}
    return target, compiled, uncompiled


QUANTIZERS = {  # flags of quantize.py by name
    "rtn": [],
    "rtn, zeros": ["--asymmetric"],
    "hqq": ["--quantizer", "hqq"],
    "gptq": ["--quantizer", "gptq"],
    "rtn, rotated": ["--rotate"],
    "hqq, rotated": ["--quantizer", "hqq", "--rotate"],
    "gptq, rotated": ["--quantizer", "gptq", "--rotate"],
}


def report_perplexity(args: argparse.Namespace) -> dict:
    """Perplexity of the shipped target on held-out modules: 16 and 8 bits, and 4 bits by every quantizer.

    None of them has seen data: gptq is calibrated on text that the target writes itself.
    """
    texts = quantize.held_out_tokens(generate.SHIPPED_TARGET)
    rows, four = {}, [name for name, (bits, _) in quantize.PRECISIONS.items() if bits == 4]

    def measure(path: Path | str, precision: str, name: str) -> None:
        model = generate.load_model(path, precision)
        row = {"perplexity": math.exp(quantize.mean_loss(model, texts, args.tokens))}
        rows[name] = row | {"weight_bytes": generate.weight_bytes([model])}
        size = rows[name]["weight_bytes"] / 1e6
        print(f"{name:28} perplexity {row['perplexity']:.3f}   {size:.1f} MB", flush=True)

    for precision in [name for name in generate.ALL_PRECISIONS if name not in four]:
        measure(generate.SHIPPED_TARGET, precision, precision)
    for name, flags in QUANTIZERS.items():
        with quantized_target(flags) as directory:
            for precision in four:
                measure(directory, precision, f"{precision} {name}")
    return rows


@contextmanager
def quantized_target(flags: list[str]) -> Iterator[str]:
    """A directory with the shipped target as quantize.py makes it, which goes away again."""
    with tempfile.TemporaryDirectory() as scratch:
        output = f"{scratch}/quantized"
        quantize.run(
            quantize.build_parser().parse_args(
                ["--checkpoint_path", str(generate.SHIPPED_TARGET), "--output", output, *flags]
            )
        )
        yield output


def report_quality(args: argparse.Namespace) -> dict:
    """What each precision costs: perplexity, and the share of held-out positions where its greedy choice is
    that of bf16; with --prompt_file of problems and answers (GSM8K), how many it solves, too.

    Every precision quantizes the same checkpoint by itself, rounding to nearest.
    """
    paths, results = chosen_paths(args), {}
    directory = generate.find_checkpoint(str(paths.target))
    texts, reference = quantize.held_out_tokens(directory), None
    for precision in dict.fromkeys(["bf16", *split(args.precisions)]):
        parts = load_parts(precision, Paths(directory), args.device)
        model = parts.target.model
        choices = greedy_choices(model, texts, args.tokens)
        reference = choices if reference is None else reference
        row = {"perplexity": math.exp(quantize.mean_loss(model, texts, args.tokens))}
        row |= {"agreement": (choices == reference).float().mean().item(), "positions": len(choices)}
        row |= count_solved(parts, args) if args.prompt_file else {}
        results[precision] = row
        solved = f"   {row['solved']} of {row['problems']} solved" if "solved" in row else ""
        print(
            f"{precision:6} perplexity {row['perplexity']:.3f}   greedy choice that of bf16 in "
            f"{row['agreement']:.2%} of {row['positions']} positions{solved}",
            flush=True,
        )
    return results


@torch.no_grad()
def greedy_choices(model: Transformer, texts: list[list[int]], tokens: int) -> Tensor:
    """The most probable token after every one of about `tokens`, int64: the same share of every text, in rows
    of up to 512, as for `quantize.mean_loss`."""
    share, choices = max(tokens // len(texts), 1), []
    for text in texts:
        for begin in range(0, min(share, len(text)), 512):
            row = torch.tensor([text[begin : min(begin + 512, share)]], device=model.norm.weight.device)
            choices.append(model.lm_head(model.recompute(row))[0].argmax(dim=-1))
    return torch.cat(choices)


def count_solved(parts: Parts, args: argparse.Namespace) -> dict[str, int]:
    """How many problems of --prompt_file are decoded, greedily, to the number behind the #### of their
    answer: the last one in the text counts."""
    prompts = fitting_prompts(parts, args)
    if not all("####" in prompt.answer for prompt in prompts):
        raise BadInput(f"--prompt_file: {args.prompt_file} has no answers with #### and a number")
    args = argparse.Namespace(**vars(args) | {"temperature": 0.0})
    [decoder] = build_decoders(parts.target.model, {"": Drafter()}, prompts, args, 4).values()
    ids = [prompt.tokens for prompt in prompts]
    texts = decode_all(decoder, ids, args.max_new_tokens, stop_ids=parts.target.stop_ids)
    answers = [last_number(parts.target.tokenizer.decode(text)) for text in texts]
    right = [last_number(prompt.answer.split("####")[-1]) for prompt in prompts]
    return {"problems": len(prompts), "solved": sum(a == b for a, b in zip(answers, right))}


def last_number(text: str) -> str:
    """The last number in a text without what only formats it: "... is 1,234.50." -> "1234.5"; or nothing."""
    found = re.findall(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?", text)
    number = found[-1].replace(",", "") if found else ""
    return number.rstrip("0").rstrip(".") if "." in number else number


def report_rotation(args: argparse.Namespace) -> dict:
    """What rotating the target does to its drafters, which were made for the unrotated one.

    Mean accepted length a of every method (draft tokens kept in a step, root and bonus not counted), and
    texts that are not the autoregressive ones of the same target: none should be. Uncompiled, batches of 4.
    """
    rows, prompts = {}, read_prompts(args.prompts)
    with quantized_target([]) as plain, quantized_target(["--rotate"]) as rotated:
        for precision in ("w4a16", "w4a8", "w4a4"):
            for temperature in (0.0, 1.0):
                for name, path in (("plain", plain), ("rotated", rotated)):
                    target = generate.load_model(path, precision)
                    results = count_accepted(target, Sampling(temperature), prompts, args.max_new_tokens)
                    rows[f"{precision} T={temperature:.0f} {name}"] = results
                before, after = list(rows.values())[-2:]
                for method in before:
                    a, b = (of[method]["accepted_length"] for of in (before, after))
                    wrong = before[method]["different"] + after[method]["different"]
                    print(
                        f"{precision} T={temperature:.0f} {method:24} a = {a:.2f}, rotated {b:.2f} "
                        f"({100 * (b / max(a, 1e-9) - 1):+.1f} %)   {wrong} texts differ",
                        flush=True,
                    )
    return rows


def count_accepted(
    target: Transformer, sampling: Sampling, prompts: list[list[int]], tokens: int
) -> dict[str, dict]:
    """Accepted lengths and differing texts of every method, by name."""
    small = generate.load_model(generate.SHIPPED_SMALL)
    precision = quantize.precision_of(target)
    lower = quantize.share_weights(target, [*quantize.lower_precisions(precision), precision][0])
    inner = TreeDrafter(generate.load_head(generate.SMALL_HEAD, small), 12, 3, 4)
    own = TreeDrafter(generate.load_head(generate.SHIPPED_HEAD, lower), 12, 3, 4)
    drafters = {
        "autoregressive": Drafter(),
        "lookup K=4": LookupDrafter(4),
        "sequential K=4": SequentialDrafter(small, 4),
        "tree of 16": TreeDrafter(generate.load_head(generate.SHIPPED_HEAD, target), 16, 4, 4),
        "hierarchical": HierarchicalDrafter(small, inner),
        "hierarchical, own middle": HierarchicalDrafter(lower, own, shares_cache=True),
    }
    rows, expected = {}, None
    for name, drafter in drafters.items():
        decoder, stats = Decoder(target, drafter, sampling, 1024, 4, compile=False), Stats()
        texts = decode_all(decoder, prompts, tokens, stats)
        expected = expected or texts
        different = sum(ours != base for ours, base in zip(texts, expected))
        rows[name] = {
            "accepted_length": stats.tokens_per_step - 1,
            "different": different,
            "texts": len(texts),
        }
    del rows["autoregressive"]
    return rows


# --------------------------------------------------------------------------------------------------
# Kernels, and whole models of random weights
# --------------------------------------------------------------------------------------------------

SHAPES = {
    "llama-3.2-1b": ModelConfig(
        128256, 2048, 8192, 16, 32, 8, 64, 131072, rope_theta=5e5, tied_embeddings=True
    ),
    "llama-3-8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, rope_theta=5e5),
    "llama-3-70b": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, 8192, rope_theta=5e5),
}
SMALLER = {"llama-3-70b": SHAPES["llama-3-8b"], "llama-3-8b": SHAPES["llama-3.2-1b"]}  # of one vocabulary
LARGER_THAN_CACHE = {"cpu": 200e6, "cuda": 1e9}  # bytes of weights that take turns: none waits in a cache


def linears_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices of a layer: outputs and inputs by name."""
    heads, both = config.num_heads * config.head_dim, config.num_heads + 2 * config.num_kv_heads
    return {
        "qkv": (both * config.head_dim, config.hidden_size),
        "o": (config.hidden_size, heads),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
    }


def read_all(tensors: Iterable[Tensor | None]) -> None:
    """Read every byte and do next to nothing with it: what a kernel cannot beat.

    On virtual machines bandwidth is a property of the pages, so it is measured on the very tensors that a
    kernel reads.
    """
    for tensor in tensors:
        if tensor is not None:
            tensor.flatten().view(torch.int64).sum()


def random_rows(
    out: int, inputs: int, precision: str, device: str = "cpu", group: int = 128, asymmetric: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A weight in rows, plausible scales and perhaps zeros, for `kernels.linear`. `group`: of 4-bit ones."""
    if precision == "bf16":
        return (torch.randn(out, inputs, device=device) / inputs**0.5).bfloat16(), None, None
    four = precision.startswith("w4")
    shape, kind = ((out, inputs // 2), torch.uint8) if four else ((out, inputs), torch.int8)
    weight = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).view(kind)
    groups, size = (inputs // group, 5) if four else (1, 74)  # size: of such integers, root mean square
    scales = (0.5 + torch.rand(out, groups, device=device)) / size / inputs**0.5
    zeros = 15 * torch.rand(out, groups, device=device) if asymmetric else None
    return weight, scales.half(), None if zeros is None else zeros.half()


def packed(
    weight: Tensor, scales: Tensor | None = None, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a loaded model has of a weight in rows, which it takes over: as `Linear.pack` leaves it."""
    with torch.device("meta"):
        linear = gpt_spec.Linear(1, 1)
    linear.set_weights(weight, scales, zeros)
    linear.pack()
    return linear.weight, linear.scales, linear.zeros


def random_weight(
    out: int, inputs: int, precision: str, device: str = "cpu"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, scales and zeros as in a loaded model: groups of 128 for 4 bits, symmetric."""
    return packed(*random_rows(out, inputs, precision, device))


Multiply = Callable[[Tensor, Any], Tensor]  # x [n, in] and a weight -> [n, out]
Contestant = tuple[Any, Multiply]  # its weight and what it does


def torch_on_cpu(out: int, inputs: int) -> dict[str, Callable[[], Contestant]]:
    """PyTorch's own 4-bit and 8-bit operators, each made when it is asked for."""

    def int4() -> Contestant:
        numbers = torch.randint(0, 16, (out, inputs), dtype=torch.int32)
        weight = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
        scales = torch.rand(inputs // 128, out, 2, dtype=torch.bfloat16)
        return (weight, scales), lambda x, w: torch._weight_int4pack_mm_for_cpu(x, w[0], 128, w[1])

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
    """Who multiplies with a weight of this shape, ours and others', each made when it is asked for."""

    def ours(precision: str) -> Contestant:
        bits = 16 if precision == "bf16" else quantize.PRECISIONS[precision][1]
        weight = random_weight(out, inputs, precision, device)
        return weight, lambda x, w: kernels.linear(x, *w, out_features=out, activation_bits=bits)

    def bf16() -> Contestant:
        return random_rows(out, inputs, "bf16", device)[0], torch.nn.functional.linear

    entries = {precision: partial(ours, precision) for precision in ("bf16", *quantize.PRECISIONS)}
    entries["torch bf16"] = bf16
    return entries | (others_on_gpu(out, inputs) if on_gpu(device) else torch_on_cpu(out, inputs))


def tensors_of(weight: object) -> list[Tensor]:
    """All that is read of a contestant's weight."""
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
    """Those that work for all numbers of rows, and why the others do not, by name."""
    entries, failed = {}, {}
    for name, make in makers.items():
        try:
            weight, multiply = make()
            for n in sizes:
                multiply(torch.randn(n, inputs, device=device).bfloat16(), weight)
            finish(device)
        except Exception as error:  # of others, who may fail in any way: it is reported
            failed[name] = first_line(error)
            continue
        size = sum(t.nbytes for t in tensors_of(weight))
        count = int(LARGER_THAN_CACHE[torch.device(device).type] / size)
        entries[name] = Entry([weight, *(copy.deepcopy(weight) for _ in range(count))], multiply, size)
    return entries, failed


@torch.no_grad()
def measure_linear(
    out: int, inputs: int, sizes: list[int], repeats: int, device: str, bandwidth: float, chosen: list[str]
) -> tuple[dict[str, dict], dict[str, str]]:
    """Seconds of every contestant for every number of rows, taking turns, the bytes of its weight, and which
    shares of the copy bandwidth that makes; and why others did not take part. `chosen`: names; [] is all."""
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


def report_kernels(args: argparse.Namespace) -> dict:
    """Every linear of real models, n = 1 to 64, with nothing before or after it: time, T(n) / T(1), and
    shares of the bandwidth with which its bytes can be read and of the copy bandwidth: see above."""
    kernels.load()
    results, bandwidth = {}, copy_bandwidth(args.device)
    print(f"copying {bandwidth / 1e9:.1f} GB/s")
    for shape in split(args.shapes):
        for name, (out, inputs) in linears_of(SHAPES[shape]).items():
            chosen = split(args.contestants) if args.contestants else []
            settings = (args.repeats, args.device, bandwidth, chosen)
            rows, failed = measure_linear(out, inputs, [1, 2, 4, 8, 16, 32, 64], *settings)
            results[f"{shape} {name}"] = {"out": out, "in": inputs, "linears": rows}
            results[f"{shape} {name}"] |= {"failed": failed} if failed else {}
            print_linear(f"{shape} {name}", results[f"{shape} {name}"])
    results["overhead_seconds"] = call_overhead(args.device)
    print(f"\na call of the smallest linear takes {results['overhead_seconds'] * 1e6:.1f} microseconds")
    return results | {"copy_bandwidth": bandwidth}


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
    """Seconds of a linear so small that there is no work: what a call costs; on a GPU, the host's share."""
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
    """Seconds of a linear, plain and with its inputs rotated, by their number of rows."""
    copies = max(2, int(LARGER_THAN_CACHE["cpu"] / (out * inputs / 2)))
    weights, rows = cycle([random_weight(out, inputs, "w4a16") for _ in range(copies)]), {}
    kinds = {"seconds": None, "rotated_seconds": (*quantize.hadamard(inputs // stride), stride)}

    def multiply(x: Tensor, rotation: tuple[Tensor, int, int] | None) -> Tensor:
        return kernels.linear(x, *next(weights), out_features=out, rotation=rotation)

    for n in (1, 8, 64):
        x = torch.randn(1, n, inputs).bfloat16()
        rows[n] = interleave({name: partial(multiply, x, kind) for name, kind in kinds.items()}, 60)
    return rows


def random_model(config: ModelConfig, precision: str, device: str = "cpu") -> Transformer:
    """A model of random weights in the given precision; nothing larger than it is ever in memory."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
        if precision in quantize.PRECISIONS:
            quantize.reshape(model, quantize.default_quantization(model, precision))
    model = model.to_empty(device=device).requires_grad_(False)
    fill_randomly(model)
    if model.config.tied_embeddings and model.lm_head.scales is None:
        model.lm_head.weight = model.embed_tokens.weight
    if precision in quantize.PRECISIONS:
        quantize.set_precision(model, precision)
    return model.pack()


def fill_randomly(module: CheckpointModule) -> None:
    """Weights that keep states at about their size, in place, and never others."""
    torch.manual_seed(0)
    device = next(module.parameters()).device
    module.frequencies = rope_frequencies(module.config).to(device)
    for name, tensor in module.checkpoint_tensors().items():
        if tensor.dtype in (torch.uint8, torch.int8):
            tensor.view(torch.uint8).random_(0, 256)
        elif name.endswith("scales"):
            tensor.fill_(1 / (5 if tensor.shape[1] > 1 else 74) / module.config.hidden_size**0.5)
        else:
            tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=module.config.hidden_size**-0.5)


def random_head(target: Transformer) -> EagleHead:
    """An EAGLE-2 head of random weights in bf16, as large as a published one for such a target."""
    with torch.device("meta"):
        head = EagleHead(replace(target.config, num_layers=1)).to(torch.bfloat16)
    head = head.to_empty(device=target.norm.weight.device).requires_grad_(False)
    fill_randomly(head)
    return head.pack().attach(target)


def random_parts(target: ModelConfig, small: ModelConfig | None, precision: str, device: str) -> Parts:
    """A target, perhaps a small model, and heads, of random weights."""
    loaded = generate.Target(random_model(target, precision, device), None, [], precision)
    return Parts(loaded, small and random_model(small, precision, device), random_head, random_head)


def report_decode(args: argparse.Namespace) -> dict:
    """Autoregressive decoding of a whole random model, against reading its weights once per token."""
    model = random_model(SHAPES[args.shape], args.precision)
    decoder = Decoder(model, max_length=512)
    decoder.warm_up()
    weights = weights_of_a_step(model)
    nbytes = sum(p.nbytes for p in weights)
    reading, speeds = [], []
    for turn in range(6):
        stats = Stats()
        decode_all(decoder, [list(range(3, 35))], args.max_new_tokens, stats)
        begin = time.perf_counter()
        read_all(p for p in weights if p.nbytes > 2**16)
        reading += [time.perf_counter() - begin] if turn else []
        speeds += [stats.decode_tokens_per_second] if turn else []
    speed, rate = median(speeds), nbytes / median(reading)
    result = {"bytes_per_token": nbytes, "bandwidth": rate, "tokens_per_second": speed}
    result |= {"share_of_floor": speed * nbytes / rate, "operators": profile(decoder)}
    print(f"{args.shape} {args.precision}: {nbytes / 1e6:.0f} MB per token, reading {rate / 1e9:.1f} GB/s")
    print(f"{speed:.2f} tokens/s, {result['share_of_floor']:.2f} of {rate / nbytes:.2f}")
    for name, share in result["operators"].items():
        print(f"    {share:6.1%}  {name}")
    return result


# --------------------------------------------------------------------------------------------------
# Synthetic acceptance: real costs of models that we have no weights of
# --------------------------------------------------------------------------------------------------

SYNTHETIC = "synthetic acceptance, random weights"


class Acceptance(NamedTuple):
    """How probable it is that a draft token is accepted if all above it were, by depth; the last one holds
    for all deeper ones."""

    probabilities: tuple[float, ...]
    source: str

    def tokens_per_step(self, depth: int) -> float:
        """tau of drafts so deep."""
        total, reached = 1.0, 1.0
        for i in range(depth):
            reached *= self.probabilities[min(i, len(self.probabilities) - 1)]
            total += reached
        return total


def from_shares(shares: Iterable[float], source: str) -> Acceptance:
    """`shares` of the steps that accepted at least 1, 2, ... tokens."""
    shares = [1.0, *shares]
    return Acceptance(tuple(b / a for a, b in zip(shares, shares[1:])), source)


def from_mean(tau: float, depth: int, source: str) -> Acceptance:
    """The constant probability with which drafts so deep yield tau tokens per step, found by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = Acceptance((middle,), "").tokens_per_step(depth) < tau
        low, high = (middle, high) if below else (low, middle)
    return Acceptance((low,) * depth, source)


EAGLE_TABLE = "EAGLE-3 paper (arXiv 2503.01840), Table 1, MT-bench, T=0, only the mean is published"
PRESETS = {
    "eagle3-8b": from_shares(
        (0.74, 0.54, 0.41, 0.31, 0.23, 0.17, 0.13),
        "vLLM issue #26191: Llama-3.1-8B-Instruct, yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, chain, K=7, "
        "MT-bench, T=0",
    ),
    "eagle3-redhat-8b": from_shares(
        (0.7296, 0.5208, 0.3545),
        "vLLM tests/v1/spec_decode/test_acceptance_length.py at 029ba375, chain, MT-bench, T=0",
    ),
    "eagle2-8b": from_mean(4.05, 6, f"{EAGLE_TABLE}: Llama-3.1-8B, EAGLE-2, tau 4.05, as if of depth 6"),
    "eagle2-70b": from_mean(3.67, 6, f"{EAGLE_TABLE}: Llama-3.3-70B, EAGLE-2, tau 3.67, as if of depth 6"),
    "eagle3-70b": from_mean(5.63, 8, f"{EAGLE_TABLE}: Llama-3.3-70B, EAGLE-3, tau 5.63, as if of depth 8"),
    "sequential": Acceptance(
        (0.72,),
        "one user's aggregate for Llama-3.3-70B with a 3B drafter, Hugging Face Nexusflow/Athene-V2-Chat "
        "discussion 6: weak evidence, no numbers by position are published",
    ),
    "qspec": Acceptance((0.96,), "w4a4 drafts of an 8 B model, measured independently"),
}


def read_acceptance(text: str, flag: str) -> Acceptance:
    """The name of a preset, or a list of probabilities like 0.8,0.7. Raises BadInput."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        probabilities = tuple(float(part) for part in split(text))
        if not all(0 <= p <= 1 for p in probabilities):
            raise ValueError
    except ValueError:
        names = ", ".join(PRESETS)
        raise BadInput(f"{flag}: {text!r} is neither a list like 0.8,0.7 nor one of {names}") from None
    return Acceptance(probabilities, f"{flag} {text}")


class Synthetic:
    """What turns a level into one whose acceptance is drawn. The model's own choice is computed, at its
    cost, and then replaced: after each node that has children by the token of the first, which is the best,
    with the probability of its depth, else by one that no node carries.

    The draw is a function of seed, `salt` and position. Only first children are ever accepted, so a tree
    gains nothing by its breadth: the probabilities must be those of some child being right.
    """

    def __init__(self, acceptance: Acceptance, salt: int, *args, **options):
        self.salt = salt
        super().__init__(*args, **options)
        self.probabilities = torch.tensor(acceptance.probabilities, device=self.state.length.device)

    def choose(self, logits: Tensor, positions: Tensor, draft: Draft, state: State) -> Tensor:
        """int64 [B, n]; `positions` [B, n] are those of the tokens chosen, each one behind its node."""
        choice, n = super().choose(logits, positions, draft, state), draft.tokens.shape[1]
        node = torch.arange(n, device=choice.device)
        is_child = draft.parent[:, None] == node[:, None]  # [B, n, n]: is the last one a child of the other?
        first = torch.where(is_child, node, n).amin(dim=2)  # [B, n]; n where there is none
        guess = draft.tokens.gather(1, first.clamp(max=n - 1))
        unused = unused_token(draft.tokens)[:, None]
        taken = (choice[..., None] == draft.tokens[:, None]).any(dim=2)
        other = torch.where(taken, unused, choice)
        depth = (positions - 1 - state.length[:, None]).clamp(max=len(self.probabilities) - 1)
        drawn = kernels.uniform(state.seed + self.salt, positions, 1)[..., 0]  # [B, n]
        replaced = torch.where(drawn < self.probabilities[depth], guess, other)
        return torch.where(first < n, replaced, choice)


def unused_token(tokens: Tensor) -> Tensor:
    """The lowest token that is not among int64 [B, n] -> int64 [B]."""
    n = tokens.shape[1]
    candidates = torch.arange(n + 1, device=tokens.device)
    used = (candidates[:, None] == tokens[:, None]).any(dim=2)  # [B, n + 1]
    return torch.where(used, n + 1, candidates).amin(dim=1)


class SyntheticDecoder(Synthetic, Decoder):
    pass


class SyntheticLevel(Synthetic, Level):
    pass


class SyntheticHierarchy(HierarchicalDrafter):
    """Its middle model accepts what its own drafter proposes as drawn, too."""

    def __init__(self, acceptance: Acceptance, *args, **options):
        super().__init__(*args, **options)
        self.acceptance = acceptance

    def make_level(self, above: Level, renewed: int) -> Level:
        shared = (self.model, self.drafter, above.setup, above, self.shares_cache, renewed)
        return SyntheticLevel(self.acceptance, 2**41, *shared)


class SureTree(TreeDrafter):
    """Random heads are sure of nothing, and the best nodes of their trees are all near the root. With logits
    this sharp the first children form a path of full depth, as in trees of trained heads."""

    def start(self, level: Level) -> None:
        super().start(level)
        self.trust = 100.0

    def learn(self, draft: Draft, verified: list, seconds: float) -> None:
        Drafter.learn(self, draft, verified, seconds)


def synthetic_methods(parts: Parts, args: argparse.Namespace) -> dict[str, tuple[Drafter, list[Acceptance]]]:
    """Drafters by name, and how what they propose is accepted: by the target, then by what is inside."""
    heads = read_acceptance(args.acceptance, "--acceptance")
    chains = read_acceptance(args.middle_acceptance, "--middle_acceptance")
    target, small, shape = parts.target.model, parts.small, (args.tree_depth, args.tree_topk)
    head, inner = parts.head(target), SureTree(parts.small_head(small), args.tree_size or 16, *shape)
    methods = {
        "autoregressive": (Drafter(), [chains]),
        "sequential K=3": (SequentialDrafter(small, 3), [chains]),
        "tree of 60": (SureTree(head, 60, *shape), [heads]),
        "tree of 16": (SureTree(head, 16, *shape), [heads]),
        "hierarchical": (SyntheticHierarchy(heads, small, inner, args.min_draft_length), [chains, heads]),
    }
    for lower in quantize.lower_precisions(parts.target.precision)[-1:]:
        twin = quantize.share_weights(target, lower)
        methods[f"qspec {lower} K=3"] = (SequentialDrafter(twin, 3, shares_cache=True), [PRESETS["qspec"]])
    return methods


def report_synthetic(args: argparse.Namespace) -> dict:
    """What speculation would bring on this machine to models that we have no weights of: real forwards of
    target, middle model and head of --shape, whose acceptance is drawn. See `Synthetic` and `compare`.

    The middle model is the next smaller shape, or the first 4 layers of the smallest. Not compiled: see
    `compiles`.
    """
    target, results = SHAPES[args.shape], {}
    small, generator = (
        SMALLER.get(args.shape, replace(target, num_layers=4)),
        torch.Generator().manual_seed(0),
    )
    ids = torch.randint(3, target.vocab_size, (args.prompts, 32), generator=generator).tolist()
    for precision in split(args.precisions):
        parts, decoders = random_parts(target, small, precision, args.device), {}
        methods = synthetic_methods(parts, args)
        for name, (drafter, acceptance) in methods.items():
            settings = {"max_length": 512, "compile": compiles(args)}
            decoders[name] = SyntheticDecoder(acceptance[0], 2**40, parts.target.model, drafter, **settings)
            decoders[name].warm_up()
        print(f"{args.shape} {precision}: {SYNTHETIC}")
        rows = compare(decoders, [Prompt(tokens) for tokens in ids], args, effort=(5, 2), note=SYNTHETIC)
        for name, (_, acceptance) in methods.items():
            rows[name]["acceptance"] = [level._asdict() for level in acceptance]
        results[precision] = rows
    for source in dict.fromkeys(level.source for _, levels in methods.values() for level in levels):
        print(f"{SYNTHETIC}: {source}")
    return results


def profile(decoder: Decoder) -> dict[str, float]:
    """Share of a step's time that each operator takes, the largest first."""
    decoder.prefill(0, list(range(3, 35)), seed=0)
    with torch.profiler.profile(record_shapes=True) as profiler:
        for _ in range(5):
            decoder.step()
    times: dict[str, float] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        ours = event.key.startswith("gpt_spec::linear")
        key = (
            f"{event.key} {kernels.BLOCK * event.input_shapes[1][0]} x {event.input_shapes[0][-1]}"
            if ours
            else event.key
        )
        times[key] = times.get(key, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    return {key: t / total for key, t in sorted(times.items(), key=lambda entry: -entry[1])[:10]}


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------

REPORTS = {
    **{"cost": report_cost, "methods": report_methods, "auto": report_auto, "synthetic": report_synthetic},
    **{"quality": report_quality, "noise": report_noise, "exact": report_exact},
    **{"tree": report_tree, "hierarchical": report_hierarchical, "qspec": report_qspec},
    **{"qspec_shape": report_qspec_shape},
    **{"confidence": report_confidence, "perplexity": report_perplexity, "rotation": report_rotation},
    **{"hadamard": report_hadamard, "kernels": report_kernels, "decode": report_decode},
}
ON_GPU = ("cost", "methods", "auto", "synthetic", "quality", "exact", "kernels")  # reports that know --device
EVERY_PRECISION = ",".join(["bf16", *quantize.PRECISIONS])
DEFAULTS = {  # of flags whose default hangs on the report; "" is for all that do not say
    "": {"precisions": "bf16,w4a16,w4a8", "batch_sizes": "1,4,8,16", "prompts": 20, "max_new_tokens": 200}
    | {"acceptance": "eagle2-8b"},
    "auto": {"batch_sizes": "1,8", "prompts": 24, "max_new_tokens": 128},
    "synthetic": {"shape": "llama-3.2-1b", "prompts": 4, "max_new_tokens": 64},
    "synthetic llama-3-70b": {"acceptance": "eagle2-70b"},
    "quality": {"precisions": EVERY_PRECISION},
    "exact": {"precisions": EVERY_PRECISION},
    "qspec_shape": {"shape": "llama-3.2-1b"},
    "decode": {"shape": "llama-3.2-1b"},
}
STUDY = {  # file -> the report and the settings that it comes from: all tables and figures of the README
    "cpu_kernels.json": "kernels --repeats 5",
    "cpu_decode_w4a16.json": "decode --precision w4a16 --max_new_tokens 100",
    "cpu_decode_w4a8.json": "decode --precision w4a8 --max_new_tokens 100",
    "cpu_cost.json": "cost",
    "cpu_cost_1b.json": "cost --shape llama-3.2-1b",
    "cpu_methods.json": "methods",
    "cpu_auto.json": "auto",
    "cpu_synthetic.json": "synthetic",
    "cpu_quality.json": "quality",
    "cpu_tree.json": "tree --prompts 14",
    "cpu_hierarchical.json": "hierarchical --prompts 14",
    "cpu_qspec.json": "qspec --prompts 64 --repeats 3 --max_new_tokens 64",
    "cpu_qspec_1b.json": "qspec_shape --shape llama-3.2-1b --repeats 3 --max_new_tokens 32",
    "cpu_confidence.json": "confidence --prompts 12 --max_new_tokens 150",
    "cpu_noise.json": "noise --max_new_tokens 100",
    "cpu_perplexity.json": "perplexity",
    "cpu_rotation.json": "rotation",
    "cpu_hadamard.json": "hadamard --shapes llama-3.2-1b,llama-3-8b",
    "cpu_exact.json": "exact",
    "cpu_exact_qspec.json": "exact --precisions w4a16 --prompts 40",
    "cpu_exact_uncompiled.json": "exact --uncompiled",
    "cpu_exact_64.json": "exact --precisions w4a16 --uncompiled --prompts 64 --max_new_tokens 100",
}


def run_study(results: Path, only_list: bool) -> int:
    """Every report of `STUDY` in a process of its own, one after another, then tables and figures -> exit
    status: 1 if something failed, which keeps none of the others from running."""
    here, failed = Path(__file__).resolve().parent, []
    commands = {
        name: ["bench.py", *flags.split(), "--output", str(results / name)] for name, flags in STUDY.items()
    }
    for script, output in (("tables", "tables.md"), ("draw", "figures")):
        folders = ["--results", str(results), "--output", str(results.parent / output)]
        commands[f"the {output}"] = [f"scripts/{script}.py", *folders]
    for name, (script, *flags) in commands.items():
        print(" ".join(["python", script, *flags]), flush=True)
        if not only_list and subprocess.run([sys.executable, here / script, *flags]).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def about(args: argparse.Namespace) -> dict:
    return {
        "report": args.report,
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "results")},
    } | machine(args.device)


def machine(device: str) -> dict:
    """What results hang on: versions, the date, the device."""
    return {
        "date": str(date.today()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"triton": triton_version(), "cuda": torch.version.cuda} if on_gpu(device) else {}),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": device_name(device),
        "commit": commit(),
        "kernels": kernels_in_use(device),
        "threads": torch.get_num_threads(),
    }


def kernels_in_use(device: str) -> str:
    if on_gpu(device):
        return "triton" if kernels.load_cuda() else "reference"
    return kernels.PATH if kernels.load() else "reference"


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str = "cpu") -> str:
    """As its maker calls it."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"cpu {found[1] if found else platform.processor() or platform.machine()}"


def commit() -> str | None:
    """Of this checkout, with a + if files differ from it; None outside of git."""

    def git(*command: str) -> subprocess.CompletedProcess:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True)

    try:
        head, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    except OSError:  # no git
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "") if head.returncode == 0 else None


def build_parser() -> argparse.ArgumentParser:
    p = generate.OneLineParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("report", choices=[*REPORTS, "all"])
    p.add_argument("--precision", choices=generate.ALL_PRECISIONS, default="bf16", help="noise, decode")
    p.add_argument("--precisions", help="cost, methods, auto, synthetic, quality, exact: which, with commas")
    only = p.add_mutually_exclusive_group()
    only.add_argument("--uncompiled", action="store_true", help="exact: only what is not; others: all")
    only.add_argument("--compiled", action="store_true", help="exact: only what is compiled")
    p.add_argument("--prompts", type=int, help="prompts to use (default: 20; auto 24, synthetic 4)")
    p.add_argument("--max_new_tokens", type=int, help="(default: 200; auto 128, synthetic 64)")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--top_p", type=float, default=1.0)
    add_model_flags(p)
    p.add_argument("--tree_depth", type=int, default=gpt_spec.TREE_DEPTH, help="levels of all trees")
    p.add_argument("--tree_topk", type=int, default=gpt_spec.TREE_TOPK, help="nodes of a beam")
    p.add_argument(
        "--tree_size", type=int, help="nodes of trees in a hierarchy (default: auto; synthetic 16)"
    )
    p.add_argument("--batch_sizes", help="qspec, qspec_shape, auto: rows, with commas (auto: 1,8)")
    p.add_argument("--speculate_k", type=int, default=3, help="qspec, qspec_shape: tokens of a draft")
    p.add_argument("--min_draft_length", type=int, default=gpt_spec.MIN_DRAFT_LENGTH)
    p.add_argument("--tokens", type=int, default=40000, help="perplexity, quality: of so many tokens")
    p.add_argument("--sizes", default="1,2,3,4,6,8,12,16,24,32,48,64", help="cost: n of T(n), with commas")
    p.add_argument("--acceptance", help="synthetic: of heads, a preset or 0.8,0.7 (default: that of EAGLE-2)")
    p.add_argument("--middle_acceptance", default="sequential", help="synthetic: of chains, likewise")
    p.add_argument("--repeats", type=int, default=7, help="measurements, of which the median counts")
    p.add_argument("--output", help="write the results as JSON to this file")
    p.add_argument("--results", type=Path, default="benchmarks/results", help="all: folder of the files")
    p.add_argument("--list", action="store_true", help="all: print the commands, run nothing")
    return p


def add_model_flags(p: argparse.ArgumentParser) -> None:
    directory = "a Hugging Face directory or hub repository id"
    p.add_argument("--checkpoint_path", help=f"cost, methods, auto, quality: the target: {directory}")
    p.add_argument("--draft_checkpoint_path", help="a smaller model of its vocabulary")
    p.add_argument(generate.HEAD_FLAG, help="an EAGLE head of one of these two")
    p.add_argument("--device", default="cpu", help=f"{', '.join(ON_GPU)}: cpu or cuda")
    p.add_argument("--prompt_file", help="methods, auto, quality: Spec-Bench, GSM8K, HumanEval: .jsonl[.gz]")
    p.add_argument("--shape", choices=SHAPES, help="cost, decode, qspec_shape, synthetic: random weights")
    p.add_argument("--shapes", default=",".join(SHAPES), help="kernels, hadamard: which, with commas")
    p.add_argument("--contestants", help="kernels: names in its table, with commas (default: all)")


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in the defaults of the report. Raises BadInput for values that cannot be."""
    of_shape = DEFAULTS.get(f"{args.report} {args.shape}", {})
    for flag, value in (DEFAULTS[""] | DEFAULTS.get(args.report, {}) | of_shape).items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    for flag, possible in (("precisions", generate.ALL_PRECISIONS), ("shapes", SHAPES)):
        unknown = set(split(getattr(args, flag))) - set(possible)
        if unknown:
            raise BadInput(f"--{flag}: {', '.join(unknown)} is none of {', '.join(possible)}")
    for flag in ("batch_sizes", "sizes"):
        text = getattr(args, flag)
        if not all(size.isdecimal() and 0 < int(size) <= 256 for size in split(text)):
            raise BadInput(f"--{flag}: {text} is no list of numbers up to 256 like 1,8")
    if "1" not in split(args.sizes):
        raise BadInput(f"--sizes: {args.sizes} has no 1, with which the others are compared")
    for flag, least in (("prompts", 1), ("max_new_tokens", 2), ("repeats", 1), ("tokens", 1)):
        if getattr(args, flag) < least:
            raise BadInput(f"--{flag} is {getattr(args, flag)}; it must be at least {least}")
    generate.check_device(args.device)
    if on_gpu(args.device) and args.report not in ON_GPU:
        raise BadInput(f"--device: {args.report} runs on the CPU; on a GPU do {', '.join(ON_GPU)}")
    if args.checkpoint_path is None and (args.draft_checkpoint_path or args.eagle_checkpoint_path):
        raise BadInput(f"--draft_checkpoint_path and {generate.HEAD_FLAG} need --checkpoint_path")
    read_acceptance(args.acceptance, "--acceptance")
    read_acceptance(args.middle_acceptance, "--middle_acceptance")


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    if args.report == "all":
        return run_study(args.results, args.list)
    args.results = str(args.results)
    generate.load_kernels()
    results = about(args) | {"results": REPORTS[args.report](args)}
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(build_parser().parse_args(argv))
    except BadInput as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
