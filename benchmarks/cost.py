"""cost.py: T(n), the time of one forward over n tokens, and the time of the units that drafts are made of.

    python bench.py cost
    python bench.py cost --shape llama-3-8b --device cuda

The one idea: these costs do not depend on what is drafted, so they are measured on frozen decoders, which
repeat the same step, and without any text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.common import (
    Parts,
    chosen_paths,
    compiles,
    fitting_prompts,
    freeze,
    head_bits,
    in_each_precision,
    load_parts,
    numbers,
)
from benchmarks.shapes import SHAPES, SMALLER, random_parts, weights_of_a_step
from benchmarks.timing import copy_bandwidth, interleave, interleave_on_device, on_gpu, shares_of_copy
from check_head import measure
from drafts import Draft, Drafter
from eagle import EagleHead, TreeDrafter
from gpt_spec import Decoder, SequentialDrafter, speculate
from model import Transformer
from packing import PRECISIONS, lower_precisions, share_weights

LEVEL = "a level of the EAGLE head"
DRAFTED = 16384  # tokens, of a vocabulary more than twice as large: a head that is restricted to these


def report_cost(args: argparse.Namespace, save: Callable[[dict], None] = lambda results: None) -> dict:
    """T(n) of the shipped target, or of --checkpoint_path, and what drafts are made of: see `measure_cost`.

    With --shape, all weights are random: the target, the next smaller shape as small model, and a head. They
    are not compiled: see `compiles`.

    `memory` and `share_of_copy` give how fast a step reads the target's weights: see bench.py. `save` is
    given all results so far, on a GPU as soon as T(n) is known.
    """
    done: dict[str, dict] = {}

    def keep(results: dict[str, dict]) -> None:
        done.update(results)
        save(done)

    return in_each_precision(partial(cost_in, args, copy_bandwidth(args.device), keep), args, save=keep)


def cost_in(
    args: argparse.Namespace, bandwidth: float, keep: Callable[[dict], None], precision: str
) -> dict[str, dict]:
    """The costs in one precision, printed as well; `keep` is given those of a GPU as soon as they are
    there."""
    bits = head_bits(args, precision)
    if args.shape:
        parts = random_parts(SHAPES[args.shape], SMALLER.get(args.shape), precision, args.device, bits)
    else:
        parts = load_parts(precision, chosen_paths(args), args.device, bits)
    # Calls in bursts bring what fits into the cache there first. The weights of a shape never fit.
    effort = (3 * args.repeats, 2 if args.shape else 10, compiles(args))
    heads = head_variants(parts)
    nbytes = sum(p.nbytes for p in weights_of_a_step(parts.target.model))

    def with_memory(costs: dict[str, dict]) -> dict[str, dict]:
        shares = {"memory": {"copy_bandwidth": bandwidth, "weight_bytes": nbytes}}
        for name, of_copy in (("verification", "share_of_copy"), ("on_device", "share_of_copy_on_device")):
            shares |= {of_copy: shares_of_copy(costs[name], nbytes, bandwidth)} if name in costs else {}
        return costs | shares

    def early(graphs: dict[str, dict]) -> None:
        keep({precision: with_memory(graphs)})

    costs = with_memory(measure_cost(parts, heads, numbers(args.sizes), *effort, early))
    if heads and not args.shape:  # random weights accept nothing
        costs["acceptance"] = measure_acceptance(parts, heads, args)
    print_cost(precision, costs)
    return costs


def measure_acceptance(
    parts: Parts, heads: dict[str, EagleHead], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Of chains of five that each head drafts, greedily, the share of steps that accepted at least 1, 2, ...
    tokens; by the name that its level has. A cheaper level accepts less."""
    prompts = [prompt.tokens for prompt in fitting_prompts(parts, args)]
    how = (prompts, args.max_new_tokens, parts.target.stop_ids, compiles(args))
    return {f"{LEVEL}{name}": measure(parts.target.model, head, *how)[0] for name, head in heads.items()}


def measure_cost(
    parts: Parts,
    heads: dict[str, EagleHead],
    sizes: list[int],
    turns: int,
    burst: int,
    compile: bool,
    early: Callable[[dict], None] = lambda graphs: None,
) -> dict[str, dict]:
    """Seconds of a whole verification of n nodes, by n, and of the units that drafts are made of, by name.
    All take turns, with 200 tokens in the caches.

    A token of the small model is a third of a draft of 3. A level of the head is the difference between trees
    of depth 6 and 2, divided by the 4 levels between them, for each of `heads`: see `head_variants`. On a
    GPU, `early` is given what its graphs take before all else.
    """
    target = parts.target.model

    def decoder(drafter: Drafter | None = None, model: Transformer = target) -> Decoder:
        return freeze(Decoder(model, drafter, max_length=512, compile=compile))

    device = target.norm.weight.device
    tokens = [torch.randint(3, target.config.vocab_size, (1, n), device=device) for n in sizes]
    drafts = [Draft.chain(some) for some in tokens]
    plain, drafters, graphs = decoder(), {}, {}
    if on_gpu(device):
        graphs = {"on_device": measure_graphs(plain, drafts, turns)}
        early(graphs)
    functions: dict[Any, Callable] = {n: partial(plain.commit, draft) for n, draft in zip(sizes, drafts)}
    for lower in lower_precisions(parts.target.precision):
        twin = decoder(model=share_weights(target, lower))
        functions[f"a token in {lower}"] = partial(twin.commit, Draft.chain(drafts[0].tokens[:, :1]))
    if parts.small:
        drafters["a token of the small model"] = SequentialDrafter(parts.small, 3)
    for name, head in heads.items():
        drafters |= {(name, depth): TreeDrafter(head, 8, depth) for depth in (2, 6)}
    for name, drafter in drafters.items():
        functions[name] = partial(drafter.propose, decoder(drafter).state)
    with torch.no_grad():
        seconds = interleave(functions, turns, burst, device)
    drafting = {name: value for name, value in seconds.items() if str(name).startswith("a token in")}
    if parts.small:
        drafting["a token of the small model"] = seconds["a token of the small model"] / 3
    for name in heads:
        drafting[f"{LEVEL}{name}"] = (seconds[name, 6] - seconds[name, 2]) / 4
    return {"verification": {str(n): seconds[n] for n in sizes}, "drafting": drafting} | graphs


def head_variants(parts: Parts) -> dict[str, EagleHead]:
    """The head, and what makes its levels cheaper, by what is added to its name: its own weights in the
    precision of the target, and, where the vocabulary is large, no more than DRAFTED tokens."""
    if parts.head is None:
        return {}
    target, precision = parts.target.model, parts.target.precision
    heads = {"": parts.head(target)}
    whole = heads[""].layers[0].self_attn.qkv_proj.scales is None  # not in 4 bits already
    if precision in PRECISIONS and whole:
        heads[f", in {precision}"] = parts.head(target, precision)
    if target.config.vocab_size > 2 * DRAFTED:
        ids = torch.arange(DRAFTED)
        some = f", {DRAFTED} tokens"
        heads |= {name + some: parts.head(target, *([precision] if name else [])) for name in tuple(heads)}
        heads = {name: head.restrict(ids) if name.endswith(some) else head for name, head in heads.items()}
    return heads


@torch.no_grad()
def measure_graphs(decoder: Decoder, drafts: list[Draft], turns: int) -> dict[str, float]:
    """T(n) without the host's share: seconds of a CUDA graph of all work that `commit` gives the GPU."""
    functions = {str(draft.tokens.shape[1]): partial(speculate, decoder, draft) for draft in drafts}
    return interleave_on_device(functions, turns, decoder.setup.runtime.device)


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
        shares = cost.get("acceptance", {}).get(name, [])
        accepted = "   accepted " + " ".join(f"{share:.2f}" for share in shares) if shares else ""
        print(f"    {name:45} {seconds * 1e3:9.3f} ms   {seconds / first:6.2f} T(1){accepted}", flush=True)
