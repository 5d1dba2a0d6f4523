"""rotation.py: do drafters of an unrotated target still fit after the target was rotated?

    python bench.py rotation

The one idea: a rotation does not change the function of a model, apart from rounding, so accepted lengths
should be the same on both.
"""

from __future__ import annotations

import argparse

from benchmarks.common import decode_all, quantized_target, read_prompts
from checkpoints import SHIPPED_HEAD, SHIPPED_SMALL, SMALL_HEAD, load_model
from costs import Stats
from drafts import Drafter
from eagle import TreeDrafter
from gpt_spec import Decoder, HierarchicalDrafter, LookupDrafter, SequentialDrafter
from heads import load_head
from model import Transformer
from packing import lower_precisions, precision_of, share_weights
from sampling import Sampling


def report_rotation(args: argparse.Namespace) -> dict:
    """The effect of rotating the target on its drafters, which were made for the unrotated one.

    Mean accepted length a of every method (draft tokens kept in a step, root and bonus not counted), and
    texts that are not the autoregressive ones of the same target: none should be. Uncompiled, batches of 4.
    """
    rows, prompts = {}, read_prompts(args.prompts)
    with quantized_target([]) as plain, quantized_target(["--rotate"]) as rotated:
        for precision in ("w4a16", "w4a8", "w4a4"):
            for temperature in (0.0, 1.0):
                for name, path in (("plain", plain), ("rotated", rotated)):
                    target = load_model(path, precision)
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
    small = load_model(SHIPPED_SMALL)
    precision = precision_of(target)
    lower = share_weights(target, [*lower_precisions(precision), precision][0])
    inner = TreeDrafter(load_head(SMALL_HEAD, small), 12, 3, 4)
    own = TreeDrafter(load_head(SHIPPED_HEAD, lower), 12, 3, 4)
    drafters = {
        "autoregressive": Drafter(),
        "lookup K=4": LookupDrafter(4),
        "sequential K=4": SequentialDrafter(small, 4),
        "tree of 16": TreeDrafter(load_head(SHIPPED_HEAD, target), 16, 4, 4),
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
