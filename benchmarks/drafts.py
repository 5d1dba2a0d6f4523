"""drafts.py: one kind of draft at a time: trees, hierarchies, drafts that end early, noise.

    python bench.py tree
    python bench.py hierarchical
    python bench.py confidence
    python bench.py noise

The one idea: each report changes one property of a drafter and leaves all else as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from benchmarks.common import decode_all, read_prompts, shipped
from benchmarks.compare import compare_drafters
from benchmarks.methods import FixedTree
from benchmarks.timing import quartiles
from checkpoints import SHIPPED_HEAD, SHIPPED_TARGET, SMALL_HEAD, load_model
from costs import Stats
from drafts import Drafter
from eagle import TreeDrafter
from gpt_spec import Decoder, HierarchicalDrafter, Level, SequentialDrafter
from heads import load_head
from model import Transformer
from packing import lower_precisions, share_weights
from sampling import Nodes, Sampling


def report_tree(args: argparse.Namespace) -> dict:
    """Trees of fixed sizes and of `auto`, in bf16, w4a16 and w4a8: see `compare`.

    `auto` is also compared with every fixed size, prompt by prompt: median and quartiles of auto / fixed.
    """
    results = {}
    for precision in ("bf16", "w4a16", "w4a8"):
        print(f"{precision}, tree depth {args.tree_depth}, top-k {args.tree_topk}")
        target = load_model(SHIPPED_TARGET, precision)
        head = load_head(SHIPPED_HEAD, target)
        shape = (args.tree_depth, args.tree_topk)
        auto = TreeDrafter(head, None, *shape)
        drafters = {"1": Drafter()} | {str(n): FixedTree(head, n, *shape) for n in auto.sizes}
        drafters["auto"] = auto
        rows = compare_drafters(target, drafters, args)
        for name, row in rows.items():
            ratios = [auto / this for auto, this in zip(rows["auto"]["speeds"], row["speeds"])]
            row["auto_against_this"] = low, middle, high = quartiles(ratios)
            print(f"auto / {name}: {middle:.2f} ({low:.2f} to {high:.2f})")
        row = rows["auto"]
        print(f"auto verified {dict(sorted(row['steps_by_nodes'].items()))} (nodes: steps),", end=" ")
        expected = row["expected_accepted_tokens"]
        print(f"expected {expected:.0f} accepted tokens and had {row['accepted_tokens']}\n", flush=True)
        results[precision] = rows
    return results


def report_hierarchical(args: argparse.Namespace) -> dict:
    """Flat methods, a small model with a head of its own in the middle, and the target itself with lower
    activations, in w4a16 and w4a8: see `compare`."""
    results = {}
    for precision in ("w4a16", "w4a8"):
        lower = lower_precisions(precision)[0]
        print(f"{precision}; its own middle is {lower}")
        results[precision] = compare_drafters(*hierarchies(precision, lower, args), args)
    return results


def hierarchies(
    precision: str, lower: str, args: argparse.Namespace
) -> tuple[Transformer, dict[str, Drafter]]:
    """The shipped target, and its drafters."""
    target, small = shipped(precision)
    twin, shape = share_weights(target, lower), (args.tree_depth, args.tree_topk)

    def tree(model: Transformer, path: Path) -> TreeDrafter:
        return TreeDrafter(load_head(path, model), args.tree_size, *shape)

    inner, own = tree(small, SMALL_HEAD), tree(twin, SHIPPED_HEAD)
    return target, {
        "autoregressive": Drafter(),
        "sequential": SequentialDrafter(small, 4),
        "tree": TreeDrafter(load_head(SHIPPED_HEAD, target)),
        "hierarchical": HierarchicalDrafter(small, inner, args.min_draft_length),
        f"hierarchical, {lower} self": HierarchicalDrafter(twin, own, args.min_draft_length, True),
    }


def report_confidence(args: argparse.Namespace) -> dict:
    """QSpec on the shipped target in w4a16: drafts of 3 tokens, and of up to 6 that end before an improbable
    one. See `compare`."""
    target, results = load_model(SHIPPED_TARGET, "w4a16"), {}
    for precision in lower_precisions("w4a16"):
        twin = share_weights(target, precision)
        drafters: dict[str, Drafter] = {"autoregressive": Drafter()}
        for k, confidence in ((3, 0.0), (6, 0.0), (6, 0.3), (6, 0.5), (6, 0.7), (6, 0.9)):
            name = f"K={k}" + (f", confidence {confidence}" if confidence else "")
            drafters[name] = SequentialDrafter(twin, k, confidence, shares_cache=True)
        print(f"drafts in {precision}")
        results[precision] = compare_drafters(target, drafters, args)
    return results


def report_noise(args: argparse.Namespace) -> dict:
    """Share of steps that accepted the first draft token, and tokens per step, by temperature and noise."""
    target, small = shipped(args.precision)
    head = load_head(SHIPPED_HEAD, target)
    kinds = {
        "shared": lambda: SequentialDrafter(small, 4),
        "independent": lambda: IndependentDrafter(small, 4),
        "greedy draft": lambda: GreedyDrafter(small, 4),
        "tree": lambda: TreeDrafter(head, 16, 4, 4),
        "tree, no noise": lambda: NoiselessTree(head, 16, 4, 4),
    }
    rows, prompts = {}, read_prompts(args.prompts)
    for temperature in (0.0, 0.3, 0.7, 1.0):
        for kind, drafter in kinds.items():
            sampling = Sampling(temperature, top_p=args.top_p)
            decoder = Decoder(target, drafter(), sampling, 1024, args.prompts, compile=False)
            stats = Stats()
            decode_all(decoder, prompts, args.max_new_tokens, stats)
            first = stats.acceptance_by_position[0]
            rows[f"{temperature} {kind}"] = {"first": first, "tokens_per_step": stats.tokens_per_step}
            print(
                f"T = {temperature}  {kind:14} first {first:.3f}  {stats.tokens_per_step:.2f} tokens per step"
            )
    return rows


class IndependentDrafter(SequentialDrafter):
    """Draws with noise of its own, as in engines that sample target and drafter separately."""

    def write(
        self, fed: Tensor, start: Tensor, last: Tensor, seed: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        return super().write(fed, start, last, seed + 2**40, count)


class GreedyDrafter(SequentialDrafter):
    """Proposes its most probable token, whatever the temperature."""

    def pick(self, logits: Tensor, positions: Tensor, seed: Tensor, nodes: Nodes) -> Tensor:
        return logits.argmax(dim=-1)


class NoiselessTree(TreeDrafter):
    """Grows its tree from the head's logits alone, as EAGLE-2 does at every temperature."""

    def start(self, level: Level) -> None:
        super().start(level)
        self.noisy = False
