"""compare.py: several decoders on the same prompts, taking turns.

    rows = compare(decoders, prompts, args)    # a row for each decoder; the first is the baseline

The one idea: speedup = tau * T(1) / (drafting + T(n)). Each row has what was measured as well as what this
formula makes of tau, drafting and T(n), so it also shows how well the formula holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.common import Prompt, Run, build_decoders, freeze, held_out_prompts, timed
from benchmarks.timing import interleave, on_gpu, quartiles, rotate_names
from costs import Stats
from drafts import Drafter
from gpt_spec import Decoder
from model import BadInput, Transformer
from show import levels_json


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
    batch_size: int = 1,
) -> dict[str, dict]:
    """Every decoder on the same prompts, taking turns, each with `batch_size` rows, which take so many
    prompts of a category at once. The others are compared with the first.

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
    for turn, group in enumerate(groups_of(prompts, batch_size)):
        tokens = [prompt.tokens for prompt in group]
        once = {
            name: timed(decoders[name], tokens, args.max_new_tokens, totals[name], stop_ids)
            for name in rotate_names(list(decoders), turn)
        }
        if all(run.tokens for run in once.values()):  # a text of one token takes no step
            used.append(group[0].category)
            for name, run in once.items():
                runs[name].append(run)
    if not used:
        raise BadInput("--prompt_file: no prompt is answered with more than one token")
    rows, first = {}, totals[base].decode_seconds * batch_size / totals[base].row_forwards
    if on_gpu(decoders[base].setup.runtime.device):
        print("drafting is what the host sees of it, without waiting for the GPU; predicted follows from it")
    slowness = first / cost[base][1]
    for name in decoders:
        if name == base or name != over:
            seconds = {n: slowness * apart for n, apart in cost[name].items()}
            steps = totals[name].row_forwards / batch_size
            rows[name] = summarize(totals[name], runs[name], runs[base], seconds, first, steps)
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
    stats: Stats, runs: list[Run], base: list[Run], cost: dict[int, float], first: float, steps: float
) -> dict[str, Any]:
    """A row of `compare`; `cost`: seconds by number of nodes, `first`: T(1), `steps`: of all rows at once."""
    ratios = speed_ratios(runs, base)
    verification = sum(cost[n] * count for n, count in stats.nodes_histogram.items()) / stats.target_forwards
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
        "levels": levels_json(stats),
        "speeds": [run.speed for run in runs],
    } | ({"steps_by_drafter": stats.drafter_histogram} if stats.drafter_histogram else {})


def groups_of(prompts: list[Prompt], size: int) -> list[list[Prompt]]:
    """So many prompts each, of one category. What a category has left over makes a smaller group."""
    categories = dict.fromkeys(prompt.category for prompt in prompts)
    same = [[prompt for prompt in prompts if prompt.category == category] for category in categories]
    return [some[i : i + size] for some in same for i in range(0, len(some), size)]


def by_category(categories: list[str], runs: list[Run], base: list[Run]) -> dict[str, dict]:
    """A few of these numbers for every category of prompts, if there are several. `categories`: of the
    runs."""
    rows = {}
    for category in dict.fromkeys(categories):
        chosen = [i for i, each in enumerate(categories) if each == category]
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
        device = next(iter(decoders.values())).setup.runtime.device
        # In bursts, because a decoder in use finds its own data in the caches.
        seconds = interleave(functions, turns, burst, device)
    return {
        name: {n: seconds[name, n] for n in decoder.drafter.draft_sizes()}
        for name, decoder in decoders.items()
    }
