"""bench.py: what speculation costs and brings on this machine, measured.

    python bench.py cost        # T(n): one target forward over n tokens, and one step of the drafter
    python bench.py methods     # every method on held-out prompts: tokens/s, tokens per step, speedup
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
    python bench.py kernels     # the linears of real models for 1 to 64 rows, next to PyTorch's
    python bench.py decode --shape llama-3.2-1b --precision w4a8    # a whole model of random weights

The one idea: speedup = tau * T(1) / (drafting + T(n)), where tau is tokens per step. Everything is measured
in one process, interleaved, and given as a ratio: absolute times change with the machine's mood, ratios less.
Run it on an otherwise idle machine. The last line of the output is the results as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import generate
import gpt_spec
import kernels
import quantize
from gpt_spec import (
    Decoder,
    Draft,
    Drafter,
    HierarchicalDrafter,
    Level,
    LookupDrafter,
    ModelConfig,
    Sampling,
    SequentialDrafter,
    Stats,
    Transformer,
    TreeDrafter,
    rope_frequencies,
)

HELD_OUT = generate.MODELS / "held_out.jsonl"


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

    def choose(self, total: Tensor) -> int:
        return self.n


class NoiselessTree(TreeDrafter):
    """Grows its tree from the head's logits alone, as EAGLE-2 does at every temperature."""

    def start(self, level: Level) -> None:
        super().start(level)
        self.sampling = Sampling()


def read_prompts(count: int) -> list[list[int]]:
    """`count` prompts of held-out modules, evenly spread over all there are."""
    tokenizer = generate.load_tokenizer(generate.SHIPPED_TARGET)
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()
    return [tokenizer.encode(json.loads(lines[i * len(lines) // count])["prompt"]) for i in range(count)]


def shipped(precision: str) -> tuple[Transformer, Transformer]:
    paths = (generate.SHIPPED_TARGET, generate.SHIPPED_SMALL)
    target, small = (generate.load_model(path, precision) for path in paths)
    return target, small


def decode_all(
    decoder: Decoder, prompts: list[list[int]], tokens: int, stats: Stats | None = None
) -> list[list[int]]:
    texts = [[] for _ in prompts]
    for emissions in decoder.run(prompts, tokens, stats=stats):
        for emission in emissions:
            texts[emission.prompt_index] += emission.tokens
    return texts


def decode(decoder: Decoder, prompt: list[int], tokens: int, stats: Stats) -> list[int]:
    return [t for emissions in decoder.run([prompt], tokens, stats=stats) for t in emissions[0].tokens]


def interleave(functions: dict[Any, Callable[[], object]], repeats: int, burst: int = 1) -> dict[Any, float]:
    """Median seconds of each function; they take turns, so that all see the same machine.

    In a turn, `burst` calls follow each other, and the first half only warms the caches up.
    """
    times = {name: [] for name in functions}
    for turn in range(repeats + 3):
        for name, function in functions.items():
            for call in range(burst):
                begin = time.perf_counter()
                function()
                counts = turn >= 3 and call >= burst // 2
                times[name] += [time.perf_counter() - begin] if counts else []
    return {name: median(values) for name, values in times.items()}


def measure_cost(target: Transformer, small: Transformer, sizes: list[int]) -> dict[str, float]:
    """Seconds of a whole verification of n nodes and of a draft of 4 tokens, 200 tokens in the caches."""
    drafter = SequentialDrafter(small, 4)
    decoder = Decoder(target, drafter, max_length=512)
    decoder.warm_up()
    decoder.prefill(0, list(range(3, 203)), seed=0)
    decoder.state.active.fill_(False)  # frozen: every repetition does the same work

    def verify(n: int) -> None:
        decoder.commit(Draft.chain(torch.randint(3, 4000, (1, n))))

    functions = {f"T({n})": lambda n=n: verify(n) for n in sizes}
    functions["draft of 4"] = lambda: drafter.propose(decoder.state)
    with torch.no_grad():
        return interleave(functions, 100)


def report_cost(args: argparse.Namespace) -> dict:
    cost = measure_cost(*shipped(args.precision), [1, 2, 3, 5, 9, 17, 33, 65])
    for name, seconds in cost.items():
        print(f"{name:16} {seconds * 1e3:7.3f} ms   {seconds / cost['T(1)']:5.2f} T(1)")
    return {name: {"seconds": seconds, "relative": seconds / cost["T(1)"]} for name, seconds in cost.items()}


def compare(target: Transformer, drafters: dict[str, Drafter], args: argparse.Namespace) -> dict[str, dict]:
    """Every drafter on the same prompts, taking turns; the first is what the others are compared with.

    Per drafter: tokens per step (tau), seconds of drafting in a step, T(n) averaged over the steps, n being
    what each verified; tokens/s, speedups (quartiles of the prompts' ratios), and what the cost model makes
    of the first three, tau * T(1) / (drafting + T(n)). T(n) is measured apart from the texts.
    """
    sampling = Sampling(args.temperature, top_p=args.top_p)
    decoders = {name: Decoder(target, drafter, sampling) for name, drafter in drafters.items()}
    for decoder in decoders.values():
        decoder.warm_up()
    cost = measure_verification(decoders)
    totals, speeds = {name: Stats() for name in decoders}, {name: [] for name in decoders}
    different, base = dict.fromkeys(decoders, 0), next(iter(decoders))
    for turn, prompt in enumerate(read_prompts(args.prompts)):
        texts = {}
        for name in rotate_names(list(decoders), turn):
            before = totals[name].decode_seconds
            texts[name] = decode(decoders[name], prompt, args.max_new_tokens, totals[name])
            speeds[name].append((len(texts[name]) - 1) / (totals[name].decode_seconds - before))
        for name, text in texts.items():
            different[name] += text != texts[base]
    rows, [first] = {}, cost[base].values()
    for name, stats in totals.items():
        steps = stats.target_forwards
        verification = sum(cost[name][n] * count for n, count in stats.nodes_histogram.items()) / steps
        drafting = stats.drafting_seconds / steps if stats.drafted_tokens else 0.0
        ratios = [ours / theirs for ours, theirs in zip(speeds[name], speeds[base])]
        rows[name] = {
            "tokens_per_step": stats.tokens_per_step,
            "drafting_seconds": drafting,
            "verification_seconds": verification,
            "tokens_per_second": median(speeds[name]),
            "speedup": quartiles(ratios),
            "slowest": min(ratios),
            "fastest": max(ratios),
            "predicted": stats.tokens_per_step * first / (drafting + verification),
            "different_texts": different[name],
            "expected_accepted_tokens": stats.expected_accepted_tokens,
            "accepted_tokens": stats.accepted_tokens,
            "drafted_tokens": stats.drafted_tokens,
            "acceptance_by_position": [round(share, 3) for share in stats.acceptance_by_position],
            "steps_by_nodes": stats.nodes_histogram,
            "levels": generate.levels_json(stats),
            "speeds": speeds[name],
        }
    print_rows(rows, first)
    return rows


def print_rows(rows: dict[str, dict], first: float) -> None:
    print(f"T(1) is {first * 1e3:.2f} ms")
    print(f"{'':28}   tau  drafting/T(1)  T(n)/T(1)  tokens/s  speedup (slowest, fastest)  predicted")
    for name, row in rows.items():
        draft, verify = row["drafting_seconds"] / first, row["verification_seconds"] / first
        print(
            f"{name:28}{row['tokens_per_step']:6.2f}{draft:15.2f}{verify:11.2f}{row['tokens_per_second']:10.0f}"
            f"{row['speedup'][1]:9.2f} ({row['slowest']:.2f}, {row['fastest']:.2f})"
            f"{row['predicted']:19.2f}",
            flush=True,
        )
        for level in row["levels"][1:]:
            print(f"{'':14}inside: {level['tokens_per_step']:.2f} tokens per step of the middle model")
    wrong = sum(row["different_texts"] for row in rows.values())
    print(f"{wrong} texts are not those of {next(iter(rows))}\n")


def measure_verification(decoders: dict[str, Decoder]) -> dict[str, dict[int, float]]:
    """Seconds of verifying n nodes, for every n that a decoder meets, with 200 tokens in the cache."""
    functions = {}
    for name, decoder in decoders.items():
        decoder.prefill(0, list(range(3, 203)), seed=0)
        decoder.state.active.fill_(False)  # frozen: every repetition does the same work
        for n in decoder.drafter.draft_sizes():
            functions[name, n] = partial(decoder.commit, decoder.blank_draft(n))
    with torch.no_grad():
        seconds = interleave(functions, 20, burst=10)  # a decoder in use meets its own data in the caches
    return {
        name: {n: seconds[name, n] for n in decoder.drafter.draft_sizes()}
        for name, decoder in decoders.items()
    }


def report_methods(args: argparse.Namespace) -> dict:
    """Every flat method on the same prompts: see `compare`."""
    target, small = shipped(args.precision)
    drafters: dict[str, Drafter] = {"autoregressive": Drafter(), "lookup K=4": LookupDrafter(4)}
    drafters |= {f"sequential K={k}": SequentialDrafter(small, k) for k in (2, 3, 4, 6)}
    drafters["tree"] = TreeDrafter(generate.load_head(generate.SHIPPED_HEAD, target))
    return compare(target, drafters, args)


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
        rows = compare(target, drafters, args)
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
        results[precision] = compare(*hierarchies(precision, lower, args), args)
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
    sizes, results = batch_sizes(args), {}
    prompts = read_prompts(args.prompts)  # several for each row, because rows are idle at the end
    with quantized_target(["--rotate"]) as rotated:
        for name, path, some in (
            ("shipped", generate.SHIPPED_TARGET, sizes),
            ("rotated", rotated, sizes[:1]),
        ):
            target = generate.load_model(path, "w4a16")
            results[name] = {b: measure_qspec(name, target, prompts, b, args) for b in some}
    return results


def report_qspec_shape(args: argparse.Namespace) -> dict:
    """QSpec on a model of --shape with random weights, whose acceptance says nothing about a trained one.

    Uncompiled: a graph of so many layers takes a minute to compile, and its steps take tens of milliseconds.
    """
    target, rows = random_model(SHAPES[args.shape], "w4a16"), {}
    for b in batch_sizes(args):
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
        results[precision] = compare(target, drafters, args)
    return results


def batch_sizes(args: argparse.Namespace) -> list[int]:
    return [int(size) for size in args.batch_sizes.split(",")]


def measure_qspec(
    name: str,
    target: Transformer,
    prompts: list[list[int]],
    batch_size: int,
    args: argparse.Namespace,
    compile: bool = True,
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
            before = stats[p].decode_seconds, stats[p].new_tokens
            texts[p] = decode_all(decoders[p], prompts, args.max_new_tokens, stats[p])
            tokens = stats[p].new_tokens - before[1] - len(prompts)
            speeds[p].append(tokens / (stats[p].decode_seconds - before[0]))
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
            for _ in decoder.run(prompts, args.max_new_tokens, stats=stats):
                pass
            first = stats.acceptance_by_position[0]
            rows[f"{temperature} {kind}"] = {"first": first, "tokens_per_step": stats.tokens_per_step}
            print(
                f"T = {temperature}  {kind:14} first {first:.3f}  {stats.tokens_per_step:.2f} tokens per step"
            )
    return rows


def report_exact(args: argparse.Namespace) -> dict:
    """Texts that are not the autoregressive one, by method, precision and temperature: none should be.

    Compiled ones are compared with compiled ones. Batches of methods other than qspec, and hierarchies, run
    uncompiled, to save hours of compilation, and --uncompiled leaves out the others.
    """
    rows, prompts = {}, read_prompts(args.prompts)
    for precision in args.precisions.split(","):
        target, compiled, uncompiled = exact_contestants(precision)
        for temperature in (0.0, 1.0):
            for compile, entries in ((True, {} if args.uncompiled else compiled), (False, uncompiled)):
                expected = None
                for name, (drafter, batch_size) in entries.items():
                    sampling = Sampling(temperature)
                    decoder = Decoder(target, drafter, sampling, 1024, batch_size, compile)
                    decoder.warm_up()
                    texts = decode_all(decoder, prompts, args.max_new_tokens)
                    expected = expected or texts
                    different = sum(ours != base for ours, base in zip(texts, expected))
                    name = f"{precision} T={temperature} {name}, {'' if compile else 'un'}compiled"
                    rows[name] = {"texts": len(texts), "different": different}
                    print(f"{name:60} {different} of {len(texts)} differ", flush=True)
    total = sum(row["texts"] for row in rows.values()), sum(row["different"] for row in rows.values())
    print("{} texts, of which {} differ".format(*total))
    return rows


def exact_contestants(precision: str) -> tuple[Transformer, dict, dict]:
    """The shipped target; drafters and batch sizes by name, to run compiled and uncompiled. The first of each
    are what the others are compared with."""
    target, small = shipped(precision)
    inner = TreeDrafter(generate.load_head(generate.SMALL_HEAD, small))
    flat = {
        "autoregressive": Drafter(),
        "lookup": LookupDrafter(4),
        "sequential": SequentialDrafter(small, 4),
        "tree": TreeDrafter(generate.load_head(generate.SHIPPED_HEAD, target)),
    }
    qspecs, more = {}, {"hierarchical": HierarchicalDrafter(small, inner)}
    for lower in quantize.lower_precisions(precision):
        twin = quantize.share_weights(target, lower)
        own = TreeDrafter(generate.load_head(generate.SHIPPED_HEAD, twin))
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
LARGER_THAN_CACHE = 200e6  # bytes of weights that take turns, so that none waits in a cache


def read_all(tensors: Iterable[Tensor | None]) -> None:
    """Read every byte and do next to nothing with it: what a kernel cannot beat.

    On virtual machines bandwidth is a property of the pages, so it is measured on the very tensors that a
    kernel reads.
    """
    for tensor in tensors:
        if tensor is not None:
            tensor.flatten().view(torch.int64).sum()


def random_weight(out: int, inputs: int, precision: str) -> tuple[Tensor, Tensor | None]:
    """Packed weights with plausible scales: groups of 128 for 4 bits."""
    if precision == "bf16":
        return kernels.pack((torch.randn(out, inputs) / inputs**0.5).bfloat16()), None
    four = precision.startswith("w4")
    shape, kind = ((out, inputs // 2), torch.uint8) if four else ((out, inputs), torch.int8)
    weight = torch.randint(0, 256, shape, dtype=torch.uint8).view(kind)
    groups, size = (inputs // 128, 5) if four else (1, 74)  # size: of such integers, root mean square
    return kernels.pack(weight), kernels.pack_scales(torch.full((out, groups), 1 / size / inputs**0.5).half())


def contestants(out: int, inputs: int) -> dict[str, tuple[list, Callable]]:
    """Name -> copies of a weight, larger than the cache together, and how to multiply x [n, in] with one."""

    def copies(make: Callable) -> list:
        first = make()
        size = sum(t.nbytes for t in (first if isinstance(first, tuple) else (first,)) if t is not None)
        return [first] + [make() for _ in range(int(LARGER_THAN_CACHE / size))]

    def ours(precision: str) -> tuple[list, Callable]:
        bits = 16 if precision == "bf16" else quantize.PRECISIONS[precision][1]
        weights = copies(lambda: random_weight(out, inputs, precision))
        return weights, lambda x, w: kernels.linear(x, *w, out_features=out, activation_bits=bits)

    def torch_int4() -> tuple[Tensor, Tensor]:
        packed = torch._convert_weight_to_int4pack_for_cpu(
            torch.randint(0, 16, (out, inputs), dtype=torch.int32), 1
        )
        return packed, torch.rand(inputs // 128, out, 2, dtype=torch.bfloat16)

    entries = {precision: ours(precision) for precision in ("bf16", *quantize.PRECISIONS)}
    entries["torch bf16"] = (
        copies(lambda: (torch.randn(out, inputs) / inputs**0.5).bfloat16()),
        torch.nn.functional.linear,
    )
    entries["torch int4"] = (
        copies(torch_int4),
        lambda x, w: torch._weight_int4pack_mm_for_cpu(x, w[0], 128, w[1]),
    )
    entries["torch int8 x int8"] = (
        copies(lambda: torch.randint(-127, 128, (inputs, out), dtype=torch.int8)),
        lambda x, w: torch._int_mm(x.to(torch.int8), w),
    )
    return entries


def measure_linear(out: int, inputs: int, sizes: list[int], repeats: int) -> dict[str, dict]:
    """Seconds of every contestant for every number of rows, taking turns, and the bytes of its weight."""
    entries, rows = contestants(out, inputs), {}
    for n in sizes:
        x = torch.randn(n, inputs).bfloat16()

        def once(name: str, turn=iter(range(10**9)), x=x) -> None:
            weights, multiply = entries[name]
            multiply(x, weights[next(turn) % len(weights)])

        seconds = interleave({name: partial(once, name) for name in entries}, repeats)
        for name in entries:
            rows.setdefault(name, {"seconds": {}})["seconds"][n] = seconds[name]
    for name, (weights, multiply) in entries.items():
        tensors = [w if isinstance(w, tuple) else (w,) for w in weights]
        turn, one_row = iter(range(10**9)), torch.randn(1, inputs).bfloat16()
        pair = {
            "read": lambda t=tensors, turn=turn: read_all(t[next(turn) % len(t)]),
            "multiply": lambda w=weights, x=one_row, m=multiply, turn=turn: m(x, w[next(turn) % len(w)]),
        }
        seconds = interleave(pair, repeats if len(weights) > 1 else 3 * repeats)
        rows[name]["bytes"] = sum(t.nbytes for t in tensors[0] if t is not None)
        rows[name]["read_bandwidth"] = rows[name]["bytes"] / seconds["read"]
        rows[name]["share_of_bandwidth"] = seconds["read"] / seconds["multiply"]
    return rows


def report_kernels(args: argparse.Namespace) -> dict:
    """Every linear of real models, n = 1 to 64: time, share of the read bandwidth, T(n) / T(1)."""
    kernels.load()
    sizes, results = [1, 2, 4, 8, 16, 32, 64], {}
    for shape in args.shapes.split(","):
        c = SHAPES[shape]
        heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        linears = {"qkv": (heads, c.hidden_size), "o": (c.hidden_size, c.num_heads * c.head_dim)}
        linears |= {
            "gate_up": (2 * c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
        }
        for name, (out, inputs) in linears.items():
            rows = measure_linear(out, inputs, sizes, args.repeats)
            print(f"\n{shape} {name}: {out} x {inputs}")
            print(
                f"{'':18}{'MB':>7}{'GB/s':>7}{'ms, n=1':>9}{'of reading':>11}   T(n) / T(1), n = {sizes[1:]}"
            )
            for kind, row in rows.items():
                first = row["seconds"][1]
                row["relative"] = {n: t / first for n, t in row["seconds"].items()}
                ratios = " ".join(f"{row['relative'][n]:6.2f}" for n in sizes[1:])
                print(
                    f"{kind:18}{row['bytes'] / 1e6:7.1f}{row['read_bandwidth'] / 1e9:7.1f}{first * 1e3:9.3f}"
                    f"{row['share_of_bandwidth']:11.2f}   {ratios}",
                    flush=True,
                )
            results[f"{shape} {name}"] = {"out": out, "in": inputs, "linears": rows}
    results["overhead_seconds"] = call_overhead()
    print(f"\na call of the smallest linear takes {results['overhead_seconds'] * 1e6:.1f} microseconds")
    return results


def call_overhead() -> float:
    """Seconds of a linear of 16 x 16: what a call costs before there is work."""
    x, weight = torch.randn(1, 16).bfloat16(), random_weight(16, 16, "bf16")
    operator = torch.ops.gpt_spec.linear.default
    arguments = (x, *weight, None, None, None, None, 0.0, False, None, 1, 1, None, 16, 16, False)
    return interleave({"call": lambda: [operator(*arguments) for _ in range(1000)]}, 9)["call"] / 1000


def report_hadamard(args: argparse.Namespace) -> dict:
    """What the online rotations add to o_proj and down_proj of real models, w4a16, groups of 128."""
    rows = {}
    for shape in args.shapes.split(","):
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
    copies = max(2, int(LARGER_THAN_CACHE / (out * inputs / 2)))
    weights, rows = cycle([random_weight(out, inputs, "w4a16") for _ in range(copies)]), {}
    kinds = {"seconds": None, "rotated_seconds": (*quantize.hadamard(inputs // stride), stride)}

    def multiply(x: Tensor, rotation: tuple[Tensor, int, int] | None) -> Tensor:
        return kernels.linear(x, *next(weights), out_features=out, rotation=rotation)

    for n in (1, 8, 64):
        x = torch.randn(1, n, inputs).bfloat16()
        rows[n] = interleave({name: partial(multiply, x, kind) for name, kind in kinds.items()}, 60)
    return rows


def random_model(config: ModelConfig, precision: str) -> Transformer:
    """A model of random weights in the given precision; nothing larger than it is ever in memory."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
        if precision in quantize.PRECISIONS:
            quantize.reshape(model, quantize.default_quantization(model, precision))
    model = model.to_empty(device="cpu").requires_grad_(False)
    model.frequencies = rope_frequencies(config)
    for name, tensor in model.checkpoint_tensors().items():
        if tensor.dtype in (torch.uint8, torch.int8):
            tensor.view(torch.uint8).random_(0, 256)
        elif name.endswith("scales"):
            tensor.fill_(1 / (5 if tensor.shape[1] > 1 else 74) / config.hidden_size**0.5)
        else:
            tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=config.hidden_size**-0.5)
    if model.config.tied_embeddings and model.lm_head.scales is None:
        model.lm_head.weight = model.embed_tokens.weight
    if precision in quantize.PRECISIONS:
        quantize.set_precision(model, precision)
    return model.pack()


def report_decode(args: argparse.Namespace) -> dict:
    """Autoregressive decoding of a whole random model, against reading its weights once per token."""
    model = random_model(SHAPES[args.shape], args.precision)
    decoder = Decoder(model, max_length=512)
    decoder.warm_up()
    weights = [p for module in (model.layers, model.lm_head) for p in module.parameters()]
    nbytes = sum(p.nbytes for p in weights)  # of the embedding only one row is read
    reading, speeds = [], []
    for turn in range(6):
        stats = Stats()
        decode(decoder, list(range(3, 35)), args.max_new_tokens, stats)
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


REPORTS = {
    **{"cost": report_cost, "methods": report_methods, "noise": report_noise, "exact": report_exact},
    **{"tree": report_tree, "hierarchical": report_hierarchical, "qspec": report_qspec},
    **{"qspec_shape": report_qspec_shape},
    **{"confidence": report_confidence, "perplexity": report_perplexity, "rotation": report_rotation},
    **{"hadamard": report_hadamard, "kernels": report_kernels, "decode": report_decode},
}


def about(args: argparse.Namespace) -> dict:
    return {
        "report": args.report,
        "settings": vars(args),
        "date": str(date.today()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "kernels": kernels.PATH if kernels.load() else "reference",
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", choices=REPORTS)
    parser.add_argument("--precision", choices=generate.ALL_PRECISIONS, default="bf16")
    every = ",".join(["bf16", *quantize.PRECISIONS])
    parser.add_argument("--precisions", default=every, help="exact: which, with commas")
    parser.add_argument("--uncompiled", action="store_true", help="exact: only what runs uncompiled")
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts to use")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--tree_depth", type=int, default=gpt_spec.TREE_DEPTH, help="tree: levels")
    parser.add_argument("--tree_topk", type=int, default=gpt_spec.TREE_TOPK, help="tree: nodes of a beam")
    parser.add_argument("--tree_size", type=int, help="hierarchical: nodes (default: auto)")
    parser.add_argument("--batch_sizes", default="1,4,8,16", help="qspec, qspec_shape: rows, with commas")
    parser.add_argument("--speculate_k", type=int, default=3, help="qspec, qspec_shape: tokens of a draft")
    parser.add_argument("--min_draft_length", type=int, default=gpt_spec.MIN_DRAFT_LENGTH)
    parser.add_argument("--tokens", type=int, default=40000, help="perplexity: of so many tokens")
    parser.add_argument(
        "--shape", choices=SHAPES, default="llama-3.2-1b", help="decode, qspec_shape: which model"
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help="kernels: which models, with commas")
    parser.add_argument(
        "--repeats", type=int, default=7, help="kernels, qspec: measurements, of which the median counts"
    )
    parser.add_argument("--output", help="write the results as JSON to this file")
    args = parser.parse_args()
    for flag, possible in (("precisions", generate.ALL_PRECISIONS), ("shapes", SHAPES)):
        unknown = set(getattr(args, flag).split(",")) - set(possible)
        if unknown:
            parser.error(f"--{flag}: {', '.join(unknown)} is none of {', '.join(possible)}")
    if not all(size.isdecimal() and int(size) for size in args.batch_sizes.split(",")):
        parser.error(f"--batch_sizes: {args.batch_sizes} is no list of numbers like 1,8")
    results = about(args) | {"results": REPORTS[args.report](args)}
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
