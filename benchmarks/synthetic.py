"""synthetic.py: speculation for models without their trained weights.

    python bench.py synthetic --shape llama-3-8b --middle llama-3.2-1b
    python bench.py synthetic --shape llama-3-70b --batch_sizes 1,8 --methods tree,qspec

The one idea: the speedup depends on costs and on acceptance. The costs are real, those of random weights in
the right shape. The acceptance is drawn at published rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import kernels
from benchmarks.acceptance import PRESETS, Acceptance, read_acceptance
from benchmarks.common import (
    BASE,
    Parts,
    Prompt,
    chosen_methods,
    compiles,
    head_bits,
    in_each_precision,
    numbers,
)
from benchmarks.compare import compare
from benchmarks.shapes import SHAPES, SMALLER, random_parts
from drafts import Draft, Drafter
from eagle import TreeDrafter
from gpt_spec import Decoder, HierarchicalDrafter, Level, SequentialDrafter
from model import BadInput
from packing import lower_precisions, share_weights
from sampling import Nodes

SYNTHETIC = "synthetic acceptance, random weights"
RANKS = 16  # of children; later ones are as the last


class Synthetic:
    """Makes the acceptance of a level random. The model's own choice is computed, at its real cost, and then
    replaced: after each node that has children by one of them, with the probability of its depth and rank,
    else by a token that no node carries. The draw is a function of seed, `salt` and position."""

    def __init__(self, acceptance: Acceptance, salt: int, *args, **options):
        self.salt = salt
        super().__init__(*args, **options)
        self.odds = odds_of(acceptance, self.state.length.device)

    def pick(self, logits: Tensor, positions: Tensor, nodes: Nodes, mask: Tensor | None) -> Tensor:
        """int64 [B, n]; `positions` [B, n] are those of the tokens picked, each one behind its node."""
        choice, tokens, parent = super().pick(logits, positions, nodes, mask), nodes.tokens, nodes.parent
        node, state = torch.arange(tokens.shape[1], device=choice.device), self.state
        noise = kernels.gumbel(state.seed + self.salt, positions, 1)[..., 0]  # [B, n]
        drawn = (-(-noise).exp()).exp()  # uniform
        above = parent.clamp(min=0)
        depth = (positions - 1 - state.length[:, None]).clamp(min=0).gather(1, above)  # of the parents
        older = (parent[..., None] == parent[:, None]) & (node < node[:, None])  # [B, n, n]: siblings
        rank = older.sum(dim=2).clamp(max=self.odds.shape[1] - 1)  # [B, n]
        odds = self.odds[depth.clamp(max=len(self.odds) - 1), rank]
        begin = (older * odds[:, None]).sum(dim=2)  # [B, n]: where a node's part of 0 to 1 is
        drawn = drawn.gather(1, above)
        is_right = (drawn >= begin) & (drawn < begin + odds)
        is_child = parent[:, None] == node[:, None]  # [B, n, n]: is the last one a child of the other?
        right = is_child & is_right[:, None]
        guess = tokens.gather(1, right.int().argmax(dim=2))
        taken = (choice[..., None] == tokens[:, None]).any(dim=2)
        other = torch.where(taken, unused_token(tokens)[:, None], choice)
        replaced = torch.where(right.any(dim=2), guess, other)
        return torch.where(is_child.any(dim=2), replaced, choice)


def odds_of(acceptance: Acceptance, device: torch.device) -> Tensor:
    """Probabilities of the children of a node, float32 [depths, ranks]."""
    depths = range(max(len(acceptance.probabilities), 1))
    return torch.tensor(
        [[acceptance.of_child(d, rank) for rank in range(RANKS)] for d in depths], device=device
    )


def unused_token(tokens: Tensor) -> Tensor:
    """The lowest token that is not among int64 [B, n] -> int64 [B]."""
    n = tokens.shape[1]
    candidates = torch.arange(n + 1, device=tokens.device)
    used = (candidates[:, None] == tokens[:, None]).any(dim=2)  # [B, n + 1]
    return torch.where(used, n + 1, candidates).amin(dim=1)


class SyntheticDecoder(Synthetic, Decoder):
    pass


class SyntheticLevel(Synthetic, Level):
    pass


class SyntheticHierarchy(HierarchicalDrafter):
    """The middle model's acceptance of its own drafter's tokens is drawn, too."""

    def __init__(self, acceptance: Acceptance, *args, **options):
        super().__init__(*args, **options)
        self.acceptance = acceptance

    def make_level(self, above: Level, renewed: int) -> Level:
        shared = (self.model, self.drafter, above.setup, above, self.shares_cache, renewed)
        return SyntheticLevel(self.acceptance, 2**41, *shared)


class SyntheticTree(TreeDrafter):
    """A tree of a random head, grown by the odds of its acceptance: as sure of itself as it is right."""

    def __init__(self, acceptance: Acceptance, *args):
        self.acceptance = acceptance
        super().__init__(*args)

    def start(self, level: Level) -> None:
        self.length, self.odds = level.state.length, odds_of(self.acceptance, level.state.length.device)
        super().start(level)

    def children(self, features: Tensor, position: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        tokens, scores = super().children(features, position, *others)
        depth = (position - self.length - 1).clamp(0, len(self.odds) - 1)  # [B]
        odds = self.odds[depth, : self.topk].clamp(min=1e-9).log()  # [B, k]
        return tokens, odds[:, None].expand_as(scores)

    def learn(self, draft: Draft, verified: list, seconds: float) -> None:
        Drafter.learn(self, draft, verified, seconds)  # its trust has nothing to do with its odds


def synthetic_methods(parts: Parts, args: argparse.Namespace) -> dict[str, tuple[Drafter, list[Acceptance]]]:
    """Drafters by name, and the acceptance of their proposals: by the target, then by the middle model."""
    heads = read_acceptance(args.acceptance, "--acceptance")
    chains = read_acceptance(args.middle_acceptance, "--middle_acceptance")
    target, small, shape = parts.target.model, parts.small, (args.tree_depth, args.tree_topk)
    head, own = parts.head(target), parts.small_head(small)
    inner = SyntheticTree(heads, own, args.tree_size or 16, *shape)
    largest = min(60, 1 + args.tree_topk + (args.tree_depth - 1) * args.tree_topk**2)
    trees = {f"tree of {n}": n for n in (largest, 16) if n <= largest} | {"tree": None}
    methods = {BASE: (Drafter(), [chains]), "sequential K=3": (SequentialDrafter(small, 3), [chains])}
    methods |= {name: (SyntheticTree(heads, head, n, *shape), [heads]) for name, n in trees.items()}
    hierarchy = SyntheticHierarchy(heads, small, inner, args.min_draft_length)
    methods["hierarchical"] = (hierarchy, [chains, heads])
    for lower in lower_precisions(parts.target.precision)[-1:]:
        twin = share_weights(target, lower)
        methods[f"qspec {lower} K=3"] = (SequentialDrafter(twin, 3, shares_cache=True), [PRESETS["qspec"]])
    return chosen_methods(methods, args)


def report_synthetic(args: argparse.Namespace, save: Callable[[dict], None] = lambda rows: None) -> dict:
    """What speculation would gain on this machine with models that are not here: real forwards of target,
    middle model and head of --shape and --middle, with drawn acceptance. See `Synthetic` and `compare`.

    By default the middle model is the next smaller shape, or the first 4 layers of the smallest. For
    compilation see `compiles`. `save` is given all rows so far after each precision and batch.
    """
    batches = numbers(args.batch_sizes)
    results = in_each_precision(partial(synthetic_in, args), args, batches, save)
    levels = [level for rows in results.values() for row in rows.values() for level in row["acceptance"]]
    for source in dict.fromkeys(level["source"] for level in levels):
        print(f"{SYNTHETIC}: {source}")
    return results


def synthetic_in(args: argparse.Namespace, precision: str, batch_size: int) -> dict[str, dict]:
    """The rows of one precision and batch size."""
    target, generator = SHAPES[args.shape], torch.Generator().manual_seed(0)
    small = SHAPES[args.middle] if args.middle else SMALLER.get(args.shape, replace(target, num_layers=4))
    if small.vocab_size != target.vocab_size:
        raise BadInput(f"--middle: {args.middle} has another vocabulary than {args.shape}")
    count = max(args.prompts, batch_size)  # no row of a batch is empty
    ids = torch.randint(3, target.vocab_size, (count, 32), generator=generator).tolist()
    parts = random_parts(target, small, precision, args.device, head_bits(args, precision))
    methods, decoders = synthetic_methods(parts, args), {}
    for name, (drafter, acceptance) in methods.items():
        settings = {"max_length": 512, "batch_size": batch_size, "compile": compiles(args)}
        decoders[name] = SyntheticDecoder(acceptance[0], 2**40, parts.target.model, drafter, **settings)
        decoders[name].warm_up()
    print(f"{args.shape} {precision}, batch of {batch_size}: {SYNTHETIC}")
    prompts = [Prompt(tokens) for tokens in ids]
    rows = compare(decoders, prompts, args, effort=(5, 2), note=SYNTHETIC, batch_size=batch_size)
    for name, (_, acceptance) in methods.items():
        rows[name]["acceptance"] = [level._asdict() for level in acceptance]
    return rows
