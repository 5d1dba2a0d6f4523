"""sampling.py: what it costs to pick tokens, and what penalties do to drafts.

    python bench.py sampling
    python bench.py sampling --checkpoint_path DIR       # of SmolLM2, for instance

The one idea: whoever picks a token has to read all logits, and the greedy pick does nothing else. So a pick
is given as a ratio to the greedy one of the same logits in the same run, and a step to a greedy step.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.common import (
    HELD_OUT,
    Parts,
    Prompt,
    build_decoders,
    chosen_paths,
    decode_all,
    fitting_prompts,
    held_out_prompts,
    load_parts,
    numbers,
    read_prompt_file,
    read_prompts,
    shipped,
)
from benchmarks.structure import SwitchedLookup, measure_structure
from benchmarks.timing import interleave, rotate_names
from checkpoints import SHIPPED_HEAD, SHIPPED_TARGET, load_model
from costs import Stats, Stopwatch
from eagle import TreeDrafter
from gpt_spec import Decoder, Level, LookupDrafter, SequentialDrafter
from heads import load_head
from model import Transformer
from sampling import Controls, Nodes, Sampling

VOCABULARIES = (49_152, 128_256)  # of which there are always logits: those of SmolLM2 and of Llama 3
PLACES = (1, 5, 16, 60)  # nodes that are picked after at once
ARGMAX, GREEDY, TOP_P, PENALIZED = "torch.argmax", "greedy", "top-p 0.95", "penalized"
PENALTIES = {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
SAMPLINGS = {  # all but the first at temperature 1
    GREEDY: Sampling(),
    "T = 1": Sampling(1.0),
    TOP_P: Sampling(1.0, top_p=0.95),
    "top-k 40": Sampling(1.0, top_k=40),
    "min-p 0.05": Sampling(1.0, min_p=0.05),
    PENALIZED: Sampling(1.0, top_p=0.95, **PENALTIES),
}
ALLOWED = {"peaked": 3.0, "flat": 6.0}  # times the greedy pick, for top-p


def report_sampling(args: argparse.Namespace) -> dict:
    """Four parts: a pick alone, steps at two temperatures, drafts under penalties, drafts under a schema.

    The first takes logits of the shipped target, and of --checkpoint_path. The second and the last decode
    with --checkpoint_path, or else with the shipped target.
    """
    parts = load_parts(args.precision, chosen_paths(args))
    return {
        "picks": measure_picks(parts, args),
        "steps": measure_steps(parts, args),
        "penalties": measure_penalties(args),
        "structure": measure_structure(parts, args),
    }


# --------------------------------------------------------------------------------------------------
# A pick alone
# --------------------------------------------------------------------------------------------------


def measure_picks(parts: Parts, args: argparse.Namespace) -> dict[str, dict]:
    """For each vocabulary, logits of real texts (peaked) and of a normal distribution (flat): seconds of a
    pick after n nodes, of `torch.argmax`, and of the noise of a whole vocabulary at one position.

    *Penalized* is `kernels.penalize`, for nodes of which each sees those before it, and then the pick with
    top-p.
    """
    results = {}
    print("A pick after n nodes, in ms; in parentheses, how many times the greedy one of the same logits")
    for name, (logits, source) in every_logits(parts, args).items():
        noise = partial(kernels.gumbel, torch.tensor([7]), torch.tensor([[200]]), logits.shape[-1])
        functions: dict[Any, Callable[[], object]] = {"noise": noise}
        for n in PLACES:
            picks = picks_after(logits[:, :n].contiguous())
            functions |= {(n, kind): function for kind, function in picks.items()}
        # A call finds the logits where the one before has left them: in a cache, if they fit into it.
        seconds = interleave(functions, args.repeats, burst=6)
        of = {n: {kind: seconds[n, kind] for kind in (ARGMAX, *SAMPLINGS)} for n in PLACES}
        results[name] = {"logits": source, "noise_seconds": seconds["noise"], "seconds": of}
        for base in (GREEDY, ARGMAX):
            ratios = {n: {kind: s / row[base] for kind, s in row.items()} for n, row in of.items()}
            results[name][f"over {base}"] = ratios
        print_picks(name, results[name])
    for kind, most in ALLOWED.items():
        mine = [row[f"over {GREEDY}"] for name, row in results.items() if kind in name]
        worst = max(ratios[TOP_P] for row in mine for ratios in row.values())
        print(f"{kind}: {TOP_P} takes up to {worst:.2f} times the greedy pick; {most:.0f} are allowed")
    return results


def every_logits(parts: Parts, args: argparse.Namespace) -> dict[str, tuple[Tensor, str]]:
    """Logits float32 [1, 60, V] by name, and what they are."""
    target = load_model(SHIPPED_TARGET, args.precision) if args.checkpoint_path else parts.target.model
    widest, source = real_logits(target, held_out_prompts(20)), "of the shipped target"
    peaked = {widest.shape[-1]: (widest, source)}
    if args.checkpoint_path:
        texts = read_prompt_file(HELD_OUT, parts.target.tokenizer, 20)
        widest, source = real_logits(parts.target.model, texts), f"of {args.checkpoint_path}"
        peaked[widest.shape[-1]] = (widest, source)
    for size in VOCABULARIES:
        if size > widest.shape[-1]:
            peaked[size] = (widen(widest, size), f"synthetic: {source}, widened")
    results, generator = {}, torch.Generator().manual_seed(0)
    for size, entry in peaked.items():
        flat = torch.randn(1, max(PLACES), size, generator=generator)
        results[f"{size:,} peaked"] = entry
        results[f"{size:,} flat"] = (flat, "synthetic: a normal distribution")
    return results


@torch.no_grad()
def real_logits(model: Transformer, prompts: list[Prompt]) -> Tensor:
    """What a model says at 60 places of a text that is made of prompts, float32 [1, 60, V]."""
    tokens = list(chain.from_iterable(prompt.tokens for prompt in prompts))[: max(PLACES) + 8]
    return model.lm_head(model.recompute(torch.tensor([tokens]))[:, 8:]).float()


def widen(logits: Tensor, size: int) -> Tensor:
    """Synthetic logits of a larger vocabulary, float32 [1, n, size]: the same peak, and more tokens like
    those behind its 64 best, each the rarer the more there are. They are shuffled."""
    generator = torch.Generator().manual_seed(0)
    tail = logits.sort(dim=-1, descending=True).values[..., 64:]
    chosen = torch.randint(tail.shape[-1], (size - logits.shape[-1],), generator=generator)
    rarer = tail[..., chosen] - math.log(size / logits.shape[-1])
    return torch.cat((logits, rarer), dim=-1)[..., torch.randperm(size, generator=generator)]


def picks_after(logits: Tensor) -> dict[str, Callable[[], object]]:
    """All ways to pick, given logits [1, n, V]."""
    _, n, size = logits.shape
    node, seed = torch.arange(n), torch.tensor([7])
    positions, functions = 200 + node[None], {ARGMAX: partial(torch.argmax, logits, dim=-1)}
    for name, sampling in SAMPLINGS.items():
        settings = torch.tensor([sampling.settings], dtype=torch.float64)
        functions[name] = partial(kernels.pick, logits, positions, seed, settings)
    controls = Controls(1, size, SAMPLINGS[PENALIZED], logits.device, every=False)
    controls.begin(0, SAMPLINGS[PENALIZED], node * 17 % size, ())
    seen = torch.ones(1, n, n, dtype=torch.bool).tril()
    nodes = Nodes(logits.argmax(dim=-1), node[None] - 1, seen, node[None])

    def penalized() -> Tensor:
        return kernels.pick(controls.penalize(logits, nodes), positions, seed, controls.settings)

    return functions | {PENALIZED: penalized}


def print_picks(name: str, result: dict[str, Any]) -> None:
    size = name.split()[0]
    print(
        f"{name}: logits {result['logits']}; noise for all {size} tokens {result['noise_seconds'] * 1e3:.3f}"
    )
    print(f"{'n':>6}" + "".join(f"{kind:>18}" for kind in (ARGMAX, *SAMPLINGS)))
    for n, seconds in result["seconds"].items():
        ratios = result[f"over {GREEDY}"][n]
        cells = [f"{s * 1e3:.3f} ({ratios[kind]:.2f})" for kind, s in seconds.items()]
        print(f"{n:6}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


# --------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------


def measure_steps(parts: Parts, args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of a step of `autoregressive` and `lookup`, by the number of nodes, at temperature 0 and at 1
    with top-p: medians, and their ratio. For each batch of prompts, all take turns.

    They are read off one decoder, since methods and temperatures run the same compiled graphs.
    """
    prompts, results = fitting_prompts(parts, args), {}
    kinds = {GREEDY: SAMPLINGS[GREEDY], TOP_P: SAMPLINGS[TOP_P]}
    for batch_size in numbers(args.batch_sizes):
        drafter = SwitchedLookup()
        settings = (prompts, args, batch_size)
        [decoder] = build_decoders(parts.target.model, {"": drafter}, *settings).values()
        times: dict[str, dict[str, dict[int, list[float]]]] = {"autoregressive": {}, "lookup": {}}
        for turn, begin in enumerate(range(0, len(prompts), batch_size)):
            some = [prompt.tokens for prompt in prompts[begin : begin + batch_size]]
            for method in rotate_names(list(times), turn):
                drafter.on = method == "lookup"
                for kind in rotate_names(list(kinds), turn):
                    steps = times[method].setdefault(kind, defaultdict(list))
                    for n, seconds in time_steps(decoder, some, kinds[kind], args.max_new_tokens):
                        steps[n].append(seconds)
        for method, of in times.items():
            name = f"{method}, batch {batch_size}"
            results[name] = {n: step_row(of, n) for n in sorted(of[GREEDY].keys() & of[TOP_P].keys())}
            print_steps(name, results[name])
    return results


def time_steps(
    decoder: Decoder, prompts: list[list[int]], sampling: Sampling, tokens: int
) -> Iterator[tuple[int, float]]:
    """Number of nodes and seconds of each step that decodes these prompts."""
    seeds, samplings = list(range(len(prompts))), [sampling] * len(prompts)
    steps = decoder.run(prompts, tokens, seeds=seeds, samplings=samplings)
    watch = Stopwatch()
    for emissions in steps:
        seconds, draft = watch.lap(), emissions[0].draft
        if draft is not None:  # a first token comes from prefill
            yield draft.tokens.shape[1], seconds
        watch.start()


def step_row(times: dict[str, dict[int, list[float]]], n: int) -> dict[str, Any]:
    seconds = {kind: median(of[n]) for kind, of in times.items()}
    counts = {kind: len(of[n]) for kind, of in times.items()}
    return {"seconds": seconds, "steps": counts, "ratio": seconds[TOP_P] / seconds[GREEDY]}


def print_steps(name: str, rows: dict[int, dict[str, Any]]) -> None:
    for n, row in rows.items():
        cells = [
            f"{kind} {seconds * 1e3:.3f} ms ({row['steps'][kind]} steps)"
            for kind, seconds in row["seconds"].items()
        ]
        print(f"{name}, steps of {n} nodes: {', '.join(cells)}, ratio {row['ratio']:.3f}", flush=True)


# --------------------------------------------------------------------------------------------------
# Drafts under penalties
# --------------------------------------------------------------------------------------------------


def measure_penalties(args: argparse.Namespace) -> dict[str, dict]:
    """The share of steps that accepted the first draft token, and tokens per step, on the shipped models:
    without penalties, with them, and with them where the drafter does not apply them to its own logits."""
    target, small = shipped(args.precision)
    head, prompts = load_head(SHIPPED_HEAD, target), read_prompts(args.prompts)
    kinds = {
        "sequential": (partial(SequentialDrafter, small, 4), partial(ForgetfulSequential, small, 4)),
        "tree": (partial(TreeDrafter, head, 16, 4, 4), partial(ForgetfulTree, head, 16, 4, 4)),
        "lookup": (LookupDrafter,),  # has no logits
    }
    rows, cases = {}, ("no penalties", "penalties", "penalties, not in drafts")
    print(f"Accepted first tokens, tokens per step{'':2}" + "".join(f"{case:>26}" for case in cases))
    for temperature in (0.0, 1.0):
        for name, makers in kinds.items():
            row = {}
            for case, make in zip(cases, (makers[0], *makers)):
                sampling = Sampling(temperature, **({} if case == cases[0] else PENALTIES))
                decoder = Decoder(target, make(), sampling, 1024, len(prompts), compile=False)
                stats = Stats()
                decode_all(decoder, prompts, args.max_new_tokens, stats)
                first = stats.acceptance_by_position[0]
                row[case] = {"first": first, "tokens_per_step": stats.tokens_per_step}
            cells = (f"{case['first']:.3f}, {case['tokens_per_step']:.2f}" for case in row.values())
            rows[f"{name}, T = {temperature:.0f}"] = row
            line = f"{name}, T = {temperature:.0f}"
            print(f"{line:40}" + "".join(f"{cell:>26}" for cell in cells), flush=True)
    return rows


def without_penalties(controls: Controls) -> Controls:
    """The same rows, of which nothing may change logits."""
    forgetful = copy(controls)
    forgetful.full = False
    return forgetful


class ForgetfulSequential(SequentialDrafter):
    """Picks as if there were no penalties."""

    def start(self, level: Level) -> None:
        super().start(level)
        self.controls = without_penalties(level.controls)


class ForgetfulTree(TreeDrafter):
    """Grows its tree as if there were no penalties."""

    def start(self, level: Level) -> None:
        super().start(level)
        self.controls = without_penalties(level.controls)
