"""qspec.py: the weights of the target, with lower activations, as its own drafter, in several batch sizes.

    python bench.py qspec
    python bench.py qspec_shape --shape llama-3.2-1b --max_new_tokens 32

The one idea: with E tokens per step, and r and v the times of a draft token and of a verification in units of
a plain step, the speedup should be E / (K r + v). It is given next to the measured one.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch

from benchmarks.common import numbers, quantized_target, read_prompts, timed
from benchmarks.shapes import SHAPES, random_model
from benchmarks.timing import quartiles, rotate_names
from checkpoints import SHIPPED_TARGET, load_model
from costs import Stats
from drafts import Drafter
from gpt_spec import Decoder, SequentialDrafter
from model import Transformer
from packing import lower_precisions, share_weights
from sampling import Sampling


def report_qspec(args: argparse.Namespace) -> dict:
    """QSpec on the shipped target in w4a16, in batches of several sizes, and on the same target rotated, in
    batches of the first size: a rotation changes acceptance, but hardly the costs. See `measure_qspec`."""
    sizes, results = numbers(args.batch_sizes), {}
    prompts = read_prompts(args.prompts)  # several for each row, because rows are idle at the end
    with quantized_target(["--rotate"]) as rotated:
        for name, path, some in (
            ("shipped", SHIPPED_TARGET, sizes),
            ("rotated", rotated, sizes[:1]),
        ):
            target = load_model(path, "w4a16")
            compile = not args.uncompiled
            results[name] = {b: measure_qspec(name, target, prompts, b, args, compile) for b in some}
    return results


def report_qspec_shape(args: argparse.Namespace) -> dict:
    """QSpec on a model of --shape with random weights. Its acceptance tells nothing about a trained model."""
    target, rows = random_model(SHAPES[args.shape], "w4a16"), {}
    for b in numbers(args.batch_sizes):
        prompts = torch.randint(3, 1000, (2 * b, 16), generator=torch.Generator().manual_seed(b)).tolist()
        rows[b] = measure_qspec(args.shape, target, prompts, b, args, not args.uncompiled)
    return {args.shape: rows}


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
    for precision in lower_precisions("w4a16"):
        twin = share_weights(target, precision)
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
            "r": r,
            "v": v,
            "tokens_per_step": e,
            "expected": e / (k * r + v),
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
