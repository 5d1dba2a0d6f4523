"""DOC"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from benchmarks.common import SHIPPED, decode_all, load_parts, read_prompts, recording_only, split
from benchmarks.timing import on_gpu
from gpt_spec import (
    Decoder,
    Drafter,
    HierarchicalDrafter,
    LookupDrafter,
    Sampling,
    SequentialDrafter,
    Transformer,
    TreeDrafter,
)
from quantize import lower_precisions, share_weights


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
    for lower in lower_precisions(precision):
        twin = share_weights(target, lower)
        own = TreeDrafter(parts.head(twin))
        qspecs[f"qspec {lower}"] = SequentialDrafter(twin, 3, shares_cache=True)
        more[f"hierarchical, {lower} self"] = HierarchicalDrafter(twin, own, shares_cache=True)
    one, eight = ", batch of 1", ", batch of 8"
    compiled = {name + one: (drafter, 1) for name, drafter in (flat | qspecs).items()}
    compiled |= {name + eight: (drafter, 8) for name, drafter in qspecs.items()}
    uncompiled = {"autoregressive" + one: (Drafter(), 1)}
    uncompiled |= {name + eight: (drafter, 8) for name, drafter in (flat | qspecs | more).items()}
    return target, compiled, uncompiled
