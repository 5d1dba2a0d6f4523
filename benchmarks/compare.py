"""compare.py: several decoders on the same prompts, taking turns.

    rows = compare(decoders, prompts, args)    # a row for each decoder; the first is the baseline

The one idea: speedup = tau * T(1) / (drafting + T(n)). Each row has what was measured as well as what this
formula makes of tau, drafting and T(n), so it also shows how well the formula holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from statistics import mean, median
from typing import Any

import torch

from benchmarks.common import Prompt, Run, build_decoders, freeze, held_out_prompts, timed
from benchmarks.timing import interleave, on_gpu, quartiles, shuffle_names
from costs import Stats
from drafts import Drafter
from gpt_spec import Decoder
from model import BadInput, Transformer
from show import levels_json

LEAST = 0.15  # seconds of a burst on a CPU


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
    effort: tuple[int, int] | None = None,
    note: str = "",
    batch_size: int = 1,
) -> dict[str, dict]:
    """Every decoder on the same prompts, taking turns: see `groups_of`. The others are compared with the
    first.

    Per decoder: tokens per step (tau), seconds of drafting in a step (of `auto`, with catching up), T(n)
    averaged over the steps, n being what each verified; tokens/s, speedups (quartiles of the turns' ratios,
    and the ratio of all texts together), and what the cost model makes of the first three for all texts
    together, tau * T(1) / (drafting + T(n)). In a batch, tau is of all rows, those without a text included.
    T(n) / T(1) is measured between the texts, since the machine may change, with as many tokens in the cache
    as halfway through a mean text, `effort` being the turns (--repeats) and the calls in each; T(1) is what
    a step of the first decoder took in the texts.

    `over` names the decoder of the bf16 target, if the others are to be compared with it as well. Its own
    texts are not those of the others, and it gets no row. With a `note`, which ends every line and row,
    texts are not compared.
    """
    base = next(iter(decoders))
    held = int(mean(len(prompt.tokens) for prompt in prompts)) + args.max_new_tokens // 2
    totals = {name: Stats() for name in decoders}
    groups, effort = groups_of(prompts, batch_size), effort or (args.repeats, 4)
    runs, used, different, cost = take_turns(
        decoders, groups, totals, effort, held, (args.max_new_tokens, stop_ids)
    )
    if not used:
        raise BadInput("--prompt_file: no prompt is answered with more than one token")
    rows, first = {}, totals[base].decode_seconds * batch_size / totals[base].row_forwards
    if on_gpu(decoders[base].setup.runtime.device):
        print("drafting is what the host sees of it, without waiting for the GPU; predicted follows from it")
    slowness = first / cost[base][1]
    for name in decoders:
        if name == base or name != over:
            seconds = {n: slowness * apart for n, apart in cost[name].items()}
            rows[name] = summarize(totals, name, base, runs, seconds, batch_size)
            rows[name] |= by_category(used, runs[name], runs[base]) if batch_size == 1 else {}
            rows[name] |= {"note": note} if note else {"different_texts": different[name]}
        if over and name in rows:
            ratio = cost[over][1] / cost[base][1]
            rows[name]["speedup_over_bf16"] = quartiles(speed_ratios(runs[name], runs[over]))
            rows[name]["predicted_over_bf16"] = rows[name]["predicted"] * ratio
    print_rows(rows, first)
    return rows


def take_turns(
    decoders: dict[str, Decoder],
    groups: list[list[Prompt]],
    totals: dict[str, Stats],
    effort: tuple[int, int],
    held: int,
    ends: tuple[int, Iterable[int]],
) -> tuple[dict[str, list[Run]], list[str], dict[str, int], dict[str, dict[int, float]]]:
    """All texts, and T(n) between them, in turns spread evenly -> the runs that took a step, by decoder, and
    the categories of their prompts; how many texts are not those of the first decoder; T(n) by decoder."""
    runs, used, different = {name: [] for name in decoders}, [], dict.fromkeys(decoders, 0)
    turns, burst = effort
    apart = [measure_verification(decoders, held, burst)]  # this turn does not count
    for turn, group in enumerate(groups):
        tokens = [prompt.tokens for prompt in group]
        once = {
            name: timed(decoders[name], tokens, ends[0], totals[name], ends[1])
            for name in shuffle_names(list(decoders), turn)
        }
        for name, run in once.items():
            different[name] += count_different([run], [once[next(iter(decoders))]])
        if all(run.tokens for run in once.values()):  # a text of one token takes no step
            used.append(group[0].category)
            for name, run in once.items():
                runs[name].append(run)
        for _ in range((turn + 1) * turns // len(groups) - turn * turns // len(groups)):
            apart.append(measure_verification(decoders, held, burst))
    cost = {name: {n: mean(each[name][n] for each in apart[1:]) for n in of} for name, of in apart[0].items()}
    return runs, used, different, cost


def speed_ratios(ours: list[Run], theirs: list[Run]) -> list[float]:
    return [a.speed / b.speed for a, b in zip(ours, theirs)]


def count_different(ours: list[Run], theirs: list[Run]) -> int:
    pairs = [pair for a, b in zip(ours, theirs) for pair in zip(a.texts, b.texts)]
    return sum(a != b for a, b in pairs)


def summarize(
    totals: dict[str, Stats],
    name: str,
    base: str,
    runs: dict[str, list[Run]],
    cost: dict[int, float],
    batch_size: int,
) -> dict[str, Any]:
    """A row of `compare`; `cost`: seconds by number of nodes."""
    stats, ratios = totals[name], speed_ratios(runs[name], runs[base])
    # Steps, and tokens of a step: of all rows at once.
    steps, bases = (each.row_forwards / batch_size for each in (stats, totals[base]))
    gained, plain = (each.new_tokens - each.outputs for each in (stats, totals[base]))
    first = totals[base].decode_seconds / bases
    verification = sum(cost[n] * count for n, count in stats.nodes_histogram.items()) / stats.target_forwards
    drafting = stats.drafting_seconds / steps if stats.drafted_tokens else 0.0
    return {
        "tokens_per_step": stats.tokens_per_step,
        "drafting_seconds": drafting,
        "verification_seconds": verification,
        "tokens_per_second": median(run.speed for run in runs[name]),
        "speedup": quartiles(ratios),
        "slowest": min(ratios),
        "fastest": max(ratios),
        "speedup_of_totals": total_speed(runs[name]) / total_speed(runs[base]),
        "predicted": gained / steps / (plain / bases) * first / (drafting + verification),
        "occupancy": stats.occupancy,
        "time_to_first_token_seconds": median(run.prefill_seconds / len(run.texts) for run in runs[name]),
        "prefill_seconds": stats.prefill_seconds,
        "expected_accepted_tokens": stats.expected_accepted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "drafted_tokens": stats.drafted_tokens,
        "acceptance_by_position": [round(share, 3) for share in stats.acceptance_by_position],
        "steps_by_nodes": stats.nodes_histogram,
        "levels": levels_json(stats),
        "speeds": [run.speed for run in runs[name]],
    } | ({"steps_by_drafter": stats.drafter_histogram} if stats.drafter_histogram else {})


def total_speed(runs: list[Run]) -> float:
    """Tokens per second of all texts together."""
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def groups_of(prompts: list[Prompt], batch_size: int) -> list[list[Prompt]]:
    """What a decoder is given at once: a prompt or, for a batch, three times as many as it has rows, so that
    rows are refilled twice."""
    some = 1 if batch_size == 1 else 3 * batch_size
    return [prompts[i : i + some] for i in range(0, len(prompts), some)]


def by_category(categories: list[str], runs: list[Run], base: list[Run]) -> dict[str, dict]:
    """A few of these numbers for every category of prompts, if there are several. `categories`: of the
    runs."""
    rows = {}
    for category in dict.fromkeys(categories):
        chosen = [i for i, each in enumerate(categories) if each == category]
        mine, theirs = [runs[i] for i in chosen], [base[i] for i in chosen]
        rows[category or "other"] = {
            "prompts": len(chosen),
            "tokens_per_step": sum(run.tokens for run in mine) / sum(run.steps for run in mine),
            "tokens_per_second": median(run.speed for run in mine),
            "speedup": quartiles(speed_ratios(mine, theirs)),
        }
    return {"categories": rows} if len(rows) > 1 else {}


def print_rows(rows: dict[str, dict], first: float) -> None:
    print(f"T(1) is {first * 1e3:.2f} ms")
    print(
        f"{'':28}   tau  drafting/T(1)  T(n)/T(1)  tokens/s  speedup (slowest, fastest)  of all  predicted  "
        "over bf16  occupancy  first token, ms"
    )
    for name, row in rows.items():
        draft, verify = row["drafting_seconds"] / first, row["verification_seconds"] / first
        over = f"{row['speedup_over_bf16'][1]:11.2f}" if "speedup_over_bf16" in row else " " * 11
        note = f"   {row['note']}" if "note" in row else ""
        print(
            f"{name:28}{row['tokens_per_step']:6.2f}{draft:15.2f}{verify:11.2f}{row['tokens_per_second']:10.0f}"
            f"{row['speedup'][1]:9.2f} ({row['slowest']:.2f}, {row['fastest']:.2f})"
            f"{row['speedup_of_totals']:16.2f}{row['predicted']:11.2f}{over}{row['occupancy']:11.2f}"
            f"{row['time_to_first_token_seconds'] * 1e3:17.1f}{note}",
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
    off = [abs(rows[name]["predicted"] / rows[name]["speedup_of_totals"] - 1) for name in others]
    if off:
        print(f"predicted is off by {median(off):.1%} (median of the methods){note}\n", flush=True)


def measure_verification(decoders: dict[str, Decoder], held: int, burst: int) -> dict[str, dict[int, float]]:
    """Seconds of verifying n nodes, for every n that a decoder meets, with `held` tokens in the cache: the
    median of the later half of a burst of calls."""
    functions = {}
    for name, decoder in decoders.items():
        freeze(decoder, held)
        for n in decoder.drafter.draft_sizes():
            functions[name, n] = partial(decoder.commit, decoder.blank_draft(n))
    with torch.no_grad():
        device = next(iter(decoders.values())).setup.runtime.device
        # In bursts, because a decoder in use finds its own data in the caches, and those of CPUs take many
        # steps to learn what is used again.
        seconds = interleave(functions, 1, burst, device, 0, 0.0 if on_gpu(device) else LEAST)
    return {
        name: {n: seconds[name, n] for n in decoder.drafter.draft_sizes()}
        for name, decoder in decoders.items()
    }
