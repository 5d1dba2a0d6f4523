"""methods.py: every method, and `auto` against each of them.

    python bench.py methods
    python bench.py auto --batch_sizes 1,8

The one idea: all drafters are made of the same `Parts`, so the methods differ in nothing but how they draft.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from auto import AdaptiveLookup, AutoDrafter
from benchmarks.common import (
    BASE,
    SHIPPED_ALONE,
    Parts,
    Paths,
    build_decoders,
    chosen_methods,
    chosen_paths,
    fitting_prompts,
    head_bits,
    in_each_precision,
    load_parts,
    numbers,
    quantized_by,
    split,
    timed,
)
from benchmarks.compare import compare, count_different, groups_of, total_speed
from benchmarks.timing import quartiles, shuffle_names
from checkpoints import find_checkpoint, load_model, open_checkpoint
from costs import Stats
from dflash import BlockDrafter
from drafts import Drafter
from eagle import TreeDrafter
from gpt_spec import HierarchicalDrafter, LookupDrafter, SequentialDrafter
from model import BadInput
from packing import lower_precisions, share_weights

REFERENCE = "autoregressive in bf16"  # rows of other precisions are compared with it, too


class FixedTree(TreeDrafter):
    """The n best nodes of the trees that `auto` grows, so that both run the same recorded steps."""

    def __init__(self, head, n: int, *shape: int):
        super().__init__(head, None, *shape)
        self.n, self.needs_costs = n, False

    def draft_sizes(self) -> list[int]:
        return [self.n]

    def choose_size(self, mean: Tensor) -> int:
        return self.n


def every_method(parts: Parts, args: argparse.Namespace) -> dict[str, Drafter]:
    """All drafters that these parts allow, by name."""
    target, shape = parts.target.model, (args.tree_depth, args.tree_topk)
    drafters = {"autoregressive": Drafter(), "lookup K=3": LookupDrafter(3), "lookup K=7": LookupDrafter(7)}
    if parts.small:
        drafters["sequential K=3"] = SequentialDrafter(parts.small, 3)
    if parts.head:
        head = parts.head(target)
        largest = min(60, 1 + args.tree_topk + (args.tree_depth - 1) * args.tree_topk**2)
        for n in sorted({largest, min(16, largest)}, reverse=True):
            drafters[f"tree of {n}"] = TreeDrafter(head, n, *shape)
        drafters["tree"] = TreeDrafter(head, None, *shape)
    if parts.small and parts.small_head:
        inner = TreeDrafter(parts.small_head(parts.small), args.tree_size, *shape)
        drafters["hierarchical"] = HierarchicalDrafter(parts.small, inner, args.min_draft_length)
    if parts.block_head:
        head = parts.block_head(target)
        drafters["dflash, chain"] = BlockDrafter(head, head.depth + 1, tree_topk=1)
        drafters["dflash of 16"], drafters["dflash"] = BlockDrafter(head, 16), BlockDrafter(head)
    for i, lower in enumerate(lower_precisions(parts.target.precision)):
        twin = share_weights(target, lower)
        if i == 0:
            inside = {"hierarchical, own middle, lookup": LookupDrafter(7)}
            if parts.head:
                own = TreeDrafter(parts.head(twin), args.tree_size, *shape)
                inside = {"hierarchical, own middle": own} | inside
            for name, inner in inside.items():
                middle = HierarchicalDrafter(twin, inner, args.min_draft_length, shares_cache=True)
                drafters[name] = middle
        drafters[f"qspec {lower} K=3"] = SequentialDrafter(twin, 3, shares_cache=True)
    return drafters | {"auto": auto_drafter(parts, args)}


def auto_drafter(parts: Parts, args: argparse.Namespace) -> AutoDrafter:
    """Of all drafters without a decoder inside. Each chooses its own lengths and sizes."""
    target, drafters = parts.target.model, {"lookup": AdaptiveLookup()}
    if parts.small:
        drafters["sequential"] = SequentialDrafter(parts.small, None)
    if parts.head:
        drafters["tree"] = TreeDrafter(parts.head(target), None, args.tree_depth, args.tree_topk)
    if parts.block_head:
        drafters["dflash"] = BlockDrafter(parts.block_head(target))
    for lower in lower_precisions(parts.target.precision)[:1]:
        twin = share_weights(target, lower)
        drafters["qspec"] = SequentialDrafter(twin, None, shares_cache=True)
    return AutoDrafter(drafters)


def report_methods(args: argparse.Namespace, save: Callable[[dict], None] = lambda rows: None) -> dict:
    """Every method in every precision and batch size on the same prompts, and next to them `autoregressive`
    of the bf16 target: see `compare`. Texts of --prompt_file end where the model ends them, others at the
    budget. `save` is given all rows so far."""
    measure = partial(methods_in, args, chosen_paths(args))
    return in_each_precision(measure, args, numbers(args.batch_sizes), save)


def methods_in(args: argparse.Namespace, paths: Paths, precision: str, batch_size: int) -> dict[str, dict]:
    """The chosen methods in one precision."""
    quantized = quantized_by(args.quantizer, paths.target, precision)
    settings = (args.device, head_bits(args, precision), args.ranks)
    parts = load_parts(precision, paths._replace(target=quantized), *settings)
    prompts = fitting_prompts(parts, args)
    print(f"{precision}, {len(prompts)} prompts, batch of {batch_size}", flush=True)
    drafters = chosen_methods(every_method(parts, args), args)
    decoders = build_decoders(parts.target.model, drafters, prompts, args, batch_size)
    over = BASE if precision == "bf16" else None
    if over is None and not is_quantized(paths.target):
        reference, over = load_model(paths.target, "bf16", args.device, ranks=args.ranks), REFERENCE
        decoders |= build_decoders(reference, {REFERENCE: Drafter()}, prompts, args, batch_size)
    stop_ids = parts.target.stop_ids if args.prompt_file else ()
    rows = compare(decoders, prompts, args, stop_ids, over, batch_size=batch_size)
    if "auto" in rows:
        print(judge_auto(rows) + "\n", flush=True)
    return rows


def judge_auto(rows: dict[str, dict[str, Any]]) -> str:
    """A sentence on `auto` next to the best fixed method, by the speed of all texts together."""
    speed = {name: row["speedup_of_totals"] for name, row in rows.items()}
    mine = speed.pop("auto")
    best = max(speed, key=speed.__getitem__)
    return (
        f"auto is {mine / speed[best]:.2f} of {best}, the best, and {mine:.2f} of {BASE} (all texts together)"
    )


def is_quantized(path: str | Path) -> bool:
    """Does the checkpoint hold 4-bit or 8-bit weights, so that there is no bf16 model to compare with?"""
    return open_checkpoint(find_checkpoint(str(path))).quantization is not None


def flat_methods(parts: Parts, args: argparse.Namespace) -> dict[str, Drafter]:
    """`auto`, and its rivals: those of --methods, or every method but hierarchies, which lose with the
    shipped models (see `methods`); and trees of 8, the size that is best most of the time."""
    drafters = chosen_methods(every_method(parts, args), args)
    if parts.head:
        shape = (args.tree_depth, args.tree_topk)
        drafters["tree of 8"] = FixedTree(parts.head(parts.target.model), 8, *shape)
    some = args.methods is not None
    drafters = {name: d for name, d in drafters.items() if some or not isinstance(d, HierarchicalDrafter)}
    return drafters | {"auto": auto_drafter(parts, args)}


def report_auto(args: argparse.Namespace, save: Callable[[dict], None] = lambda rows: None) -> dict:
    """`auto` against every fixed method that fits, for both shipped targets, every precision and batch size:
    see `measure_auto`. `save` is given all results so far."""
    targets, results = {"python-7m": chosen_paths(args), "python-1m": SHIPPED_ALONE}, {}
    if args.checkpoint_path:
        targets = {Path(args.checkpoint_path).name: chosen_paths(args)}
    for name, paths in targets.items():
        for precision in split(args.precisions):
            for batch_size in numbers(args.batch_sizes):
                key = f"{name} {precision} batch {batch_size}"
                chosen = paths._replace(target=quantized_by(args.quantizer, paths.target, precision))
                parts = load_parts(precision, chosen, args.device, head_bits(args, precision), args.ranks)
                results[key] = measure_auto(parts, batch_size, args)
                print_auto(key, results[key])
                save(results)
    return results


def measure_auto(parts: Parts, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """--repeats turns over the prompts.

    Within a turn the decoders alternate after every prompt, or, with a batch, after every group of
    `groups_of`. A turn's speed is that of all its texts together, without prefill; a group in which nothing
    is said but first tokens does not count. Speedups are the turns' ratios to `autoregressive` (quartiles).
    """
    prompts = fitting_prompts(parts, args)
    prompts = prompts if batch_size > 1 else prompts[::3]  # one by one they take three times as long
    decoders = build_decoders(parts.target.model, flat_methods(parts, args), prompts, args, batch_size)
    stats, different = {name: Stats() for name in decoders}, dict.fromkeys(decoders, 0)
    speeds, groups = {name: [] for name in decoders}, groups_of(prompts, batch_size)
    stop_ids = parts.target.stop_ids if args.prompt_file else ()
    for turn in range(args.repeats):
        runs = {name: [] for name in decoders}
        for i, group in enumerate(groups):
            tokens = [prompt.tokens for prompt in group]
            for name in shuffle_names(list(decoders), turn, i):
                runs[name].append(timed(decoders[name], tokens, args.max_new_tokens, stats[name], stop_ids))
        if not any(run.tokens for run in runs[BASE]):
            raise BadInput("--prompt_file: no prompt is answered with more than one token")
        for name, mine in runs.items():
            speeds[name].append(total_speed([run for run in mine if run.tokens]))
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
    """Does `auto` reach at least this share of a method's speed? Where the turns spread by more than the rest
    (interquartile range over median), the spread is allowed instead."""
    low, middle, high = row["against_auto"]
    spread = (high - low) / middle
    return {"ratio": middle, "spread": spread, "within": middle >= min(least, 1 - spread)}


def best_fixed(methods: dict[str, dict]) -> str:
    """The fixed method with the best median, which is known only in hindsight."""
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
