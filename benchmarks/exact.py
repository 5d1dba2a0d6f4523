"""exact.py: is every text the one that autoregressive decoding yields?

    python bench.py exact
    python bench.py exact --uncompiled --precisions w4a16 --output exact.json
    python bench.py exact --checkpoint_path DIR --eagle_checkpoint_path HEAD --prompt_file PROMPTS.jsonl

The one idea: speculation must not change a single token, so texts are compared as they are, in every method,
precision and temperature, and the right number of differences is 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext

from benchmarks.common import (
    Parts,
    chosen_paths,
    decode_all,
    fitting_prompts,
    head_bits,
    load_parts,
    recording_only,
    split,
)
from dflash import BlockDrafter
from drafts import Drafter
from eagle import TreeDrafter
from gpt_spec import Decoder, HierarchicalDrafter, LookupDrafter, SequentialDrafter
from model import Transformer, cache_length
from packing import lower_precisions, share_weights
from sampling import Sampling


def report_exact(args: argparse.Namespace, save: Callable[[dict], None] = lambda rows: None) -> dict:
    """Texts that differ from the autoregressive one, by method, precision and temperature: none should.

    Compiled ones (on a CPU: recorded ones) are compared with compiled ones. Batches of methods other than
    qspec, and hierarchies, are recorded as CUDA graphs or tapes, and compared with one that is not, to save
    hours of compilation on a GPU; --uncompiled leaves out the others, and --compiled these.

    `save` is given all rows so far after each new one, so that a time limit does not lose them.
    """
    rows = {}
    for precision in split(args.precisions):
        parts = load_parts(precision, chosen_paths(args), args.device, head_bits(args, precision), args.ranks)
        target, prompts = parts.target.model, [prompt.tokens for prompt in fitting_prompts(parts, args)]
        compiled, uncompiled = exact_contestants(parts)
        for temperature in (0.0, 1.0):
            kinds = {True: {} if args.uncompiled else compiled, False: {} if args.compiled else uncompiled}
            for compile, entries in kinds.items():
                expected = None
                for name, entry in entries.items():
                    records = not compile and expected is not None
                    settings = (Sampling(temperature), compile, records, args.max_new_tokens)
                    texts = decode_entry(target, entry, prompts, *settings)
                    expected = expected or texts
                    different = sum(ours != base for ours, base in zip(texts, expected))
                    how = "compiled" if compile else "recorded" if records else "uncompiled"
                    name = f"{precision} T={temperature} {name}, {how}"
                    rows[name] = {"texts": len(texts), "different": different}
                    print(f"{name:60} {different} of {len(texts)} differ", flush=True)
                    save(rows)
    total = sum(row["texts"] for row in rows.values()), sum(row["different"] for row in rows.values())
    print("{} texts, of which {} differ".format(*total))
    return rows


def decode_entry(
    target: Transformer,
    entry: tuple[Drafter, int],
    prompts: list[list[int]],
    sampling: Sampling,
    compile: bool,
    records: bool,
    tokens: int,
) -> list[list[int]]:
    """The texts of one drafter and batch size; `records`: recorded, but nothing compiled."""
    drafter, batch_size = entry
    with recording_only() if records else nullcontext():
        length = cache_length(target.config, max(len(prompt) for prompt in prompts) + tokens)
        decoder = Decoder(target, drafter, sampling, length, batch_size, compile or records)
        decoder.warm_up()
        return decode_all(decoder, prompts, tokens)


def exact_contestants(parts: Parts) -> tuple[dict, dict]:
    """All drafters that the parts allow, with batch sizes, by name, to run compiled and uncompiled. The first
    of each kind is the one that the others are compared with."""
    target, small = parts.target.model, parts.small
    flat = {"autoregressive": Drafter(), "lookup": LookupDrafter(4)}
    flat |= {"sequential": SequentialDrafter(small, 4)} if small else {}
    flat |= {"tree": TreeDrafter(parts.head(target))} if parts.head else {}
    flat |= {"dflash": BlockDrafter(parts.block_head(target))} if parts.block_head else {}
    qspecs, more = {}, {}
    if small and parts.small_head:
        more["hierarchical"] = HierarchicalDrafter(small, TreeDrafter(parts.small_head(small)))
    for lower in lower_precisions(parts.target.precision):
        twin = share_weights(target, lower)
        own = TreeDrafter(parts.head(twin)) if parts.head else LookupDrafter(7)
        qspecs[f"qspec {lower}"] = SequentialDrafter(twin, 3, shares_cache=True)
        more[f"hierarchical, {lower} self"] = HierarchicalDrafter(twin, own, shares_cache=True)
    one, eight = ", batch of 1", ", batch of 8"
    compiled = {name + one: (drafter, 1) for name, drafter in (flat | qspecs).items()}
    compiled |= {name + eight: (drafter, 8) for name, drafter in qspecs.items()}
    uncompiled = {"autoregressive" + one: (Drafter(), 1)}
    uncompiled |= {name + eight: (drafter, 8) for name, drafter in (flat | qspecs | more).items()}
    return compiled, uncompiled
