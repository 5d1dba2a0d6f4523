"""heads.py: what an EAGLE head is worth to its target, by kind of prompt. Tokens are counted, not timed.

    python bench.py heads
    python bench.py heads --checkpoint_path DIR --eagle_checkpoint_path HEAD --prompt_file PROMPTS.jsonl

The one idea: a head is good or bad at something. One number for all prompts hides that it was trained on a
few kinds of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import zip_longest

from benchmarks.common import (
    by_kind,
    chosen_paths,
    decode_all,
    fitting_prompts,
    head_bits,
    in_each_precision,
    load_parts,
)
from costs import Stats
from eagle import TreeDrafter
from gpt_spec import Decoder
from model import BadInput, cache_length
from sampling import Sampling

DRAFTS = {"chain of 5": (6, 5, 1), "tree of 8": (8, 6, 10), "tree of 16": (16, 6, 10)}  # nodes, depth, width
ROWS = 8  # texts at a time


def report_heads(args: argparse.Namespace) -> dict:
    """Of each of `DRAFTS`, tokens per step, and the share of steps that accepted at least 1, 2, ... draft
    tokens, for every category of the prompts and for all of them. The root of a draft counts as a node."""
    return in_each_precision(lambda precision: heads_in(args, precision), args)


def heads_in(args: argparse.Namespace, precision: str) -> dict[str, dict]:
    parts = load_parts(precision, chosen_paths(args), args.device, head_bits(args, precision))
    if parts.head is None:
        raise BadInput("heads: --eagle_checkpoint_path is missing")
    prompts, head = fitting_prompts(parts, args), parts.head(parts.target.model)
    longest = max(len(prompt.tokens) for prompt in prompts) + args.max_new_tokens
    sizes = (cache_length(parts.target.model.config, longest), ROWS, not args.uncompiled)
    stops = parts.target.stop_ids if args.prompt_file else []
    kinds = by_kind(prompts)
    rows: dict[str, dict] = {kind: {"prompts": len(some)} for kind, some in kinds.items()}
    for name, shape in DRAFTS.items():
        decoder = Decoder(parts.target.model, TreeDrafter(head, *shape), Sampling(args.temperature), *sizes)
        counts = {kind: Stats() for kind in kinds}
        for kind, some in kinds.items():
            decode_all(decoder, [prompt.tokens for prompt in some], args.max_new_tokens, counts[kind], stops)
        for kind, stats in (counts | {"all": total(counts.values())}).items():
            found = {"tokens_per_step": stats.tokens_per_step, "steps": stats.target_forwards}
            shares = stats.acceptance_by_position[: shape[1]]
            rows.setdefault(kind, {"prompts": len(prompts)})[name] = found | {
                "acceptance_by_position": shares
            }
    print_rows(precision, rows)
    return rows


def total(counts: Iterable[Stats]) -> Stats:
    """What the tokens and steps of several runs add up to."""
    sums = Stats()
    for each in counts:
        sums.outputs, sums.new_tokens = sums.outputs + each.outputs, sums.new_tokens + each.new_tokens
        sums.target_forwards += each.target_forwards
        pairs = zip_longest(sums.accepted_histogram, each.accepted_histogram, fillvalue=0)
        sums.accepted_histogram = [one + other for one, other in pairs]
    return sums


def print_rows(precision: str, rows: dict[str, dict]) -> None:
    print(
        f"{precision:16}"
        + "".join(f"{name:>12}" for name in DRAFTS)
        + "   chain: accepted at least 1, 2, ..."
    )
    for category, row in rows.items():
        shares = " ".join(f"{share:.2f}" for share in row["chain of 5"]["acceptance_by_position"])
        lengths = "".join(f"{row[name]['tokens_per_step']:12.2f}" for name in DRAFTS)
        print(f"{category:16}{lengths}   {shares}", flush=True)
