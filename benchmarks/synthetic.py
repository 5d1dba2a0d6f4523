"""synthetic.py: speculation for models without their trained weights.

    python bench.py synthetic --shape llama-3-8b
    python bench.py synthetic --shape llama-3-70b --acceptance eagle3-70b

The one idea: the speedup depends on costs and on acceptance. The costs are real, those of random weights in
the right shape. The acceptance is drawn at published rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from benchmarks.common import Parts, Prompt, compiles, head_bits, in_each_precision, split
from benchmarks.compare import compare
from benchmarks.shapes import SHAPES, SMALLER, random_parts
from drafts import Draft, Drafter
from eagle import TreeDrafter
from gpt_spec import Decoder, HierarchicalDrafter, Level, SequentialDrafter
from model import BadInput
from packing import lower_precisions, share_weights
from sampling import Nodes

SYNTHETIC = "synthetic acceptance, random weights"


class Acceptance(NamedTuple):
    """The probability that a draft token is accepted if all above it were, by depth. The last one holds
    for all deeper ones."""

    probabilities: tuple[float, ...]
    source: str

    def tokens_per_step(self, depth: int) -> float:
        """tau of drafts of this depth."""
        total, reached = 1.0, 1.0
        for i in range(depth):
            reached *= self.probabilities[min(i, len(self.probabilities) - 1)]
            total += reached
        return total


def from_shares(shares: Iterable[float], source: str) -> Acceptance:
    """`shares` of the steps that accepted at least 1, 2, ... tokens."""
    shares = [1.0, *shares]
    return Acceptance(tuple(b / a for a, b in zip(shares, shares[1:])), source)


def from_mean(tau: float, depth: int, source: str) -> Acceptance:
    """The constant probability with which drafts of this depth yield tau tokens per step, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = Acceptance((middle,), "").tokens_per_step(depth) < tau
        low, high = (middle, high) if below else (low, middle)
    return Acceptance((low,) * depth, source)


EAGLE_TABLE = "EAGLE-3 paper (arXiv 2503.01840), Table 1, MT-bench, T=0, only the mean is published"
PRESETS = {
    "eagle3-8b": from_shares(
        (0.74, 0.54, 0.41, 0.31, 0.23, 0.17, 0.13),
        "vLLM issue #26191: Llama-3.1-8B-Instruct, yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, chain, K=7, "
        "MT-bench, T=0",
    ),
    "eagle3-redhat-8b": from_shares(
        (0.7296, 0.5208, 0.3545),
        "vLLM tests/v1/spec_decode/test_acceptance_length.py at 029ba375, chain, MT-bench, T=0",
    ),
    "eagle2-8b": from_mean(4.05, 6, f"{EAGLE_TABLE}: Llama-3.1-8B, EAGLE-2, tau 4.05, as if of depth 6"),
    "eagle2-70b": from_mean(3.67, 6, f"{EAGLE_TABLE}: Llama-3.3-70B, EAGLE-2, tau 3.67, as if of depth 6"),
    "eagle3-70b": from_mean(5.63, 8, f"{EAGLE_TABLE}: Llama-3.3-70B, EAGLE-3, tau 5.63, as if of depth 8"),
    "sequential": Acceptance(
        (0.72,),
        "one user's aggregate for Llama-3.3-70B with a 3B drafter, Hugging Face Nexusflow/Athene-V2-Chat "
        "discussion 6: weak evidence, no numbers by position are published",
    ),
    "qspec": Acceptance((0.96,), "w4a4 drafts of an 8 B model, measured independently"),
}


def read_acceptance(text: str, flag: str) -> Acceptance:
    """The name of a preset, or a list of probabilities like 0.8,0.7. Raises BadInput."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        probabilities = tuple(float(part) for part in split(text))
        if not all(0 <= p <= 1 for p in probabilities):
            raise ValueError
    except ValueError:
        names = ", ".join(PRESETS)
        raise BadInput(f"{flag}: {text!r} is neither a list like 0.8,0.7 nor one of {names}") from None
    return Acceptance(probabilities, f"{flag} {text}")


class Synthetic:
    """Makes the acceptance of a level random. The model's own choice is computed, at its real cost, and then
    replaced: after each node that has children by the token of the first, which is the best,
    with the probability of its depth, else by one that no node carries.

    The draw is a function of seed, `salt` and position. Only first children are ever accepted, so a tree
    gains nothing by its breadth: the probabilities must be those of some child being right.
    """

    def __init__(self, acceptance: Acceptance, salt: int, *args, **options):
        self.salt = salt
        super().__init__(*args, **options)
        self.probabilities = torch.tensor(acceptance.probabilities, device=self.state.length.device)

    def pick(self, logits: Tensor, positions: Tensor, nodes: Nodes, mask: Tensor | None) -> Tensor:
        """int64 [B, n]; `positions` [B, n] are those of the tokens picked, each one behind its node."""
        choice, tokens, state = super().pick(logits, positions, nodes, mask), nodes.tokens, self.state
        parent, n = nodes.parent, tokens.shape[1]
        node = torch.arange(n, device=choice.device)
        is_child = parent[:, None] == node[:, None]  # [B, n, n]: is the last one a child of the other?
        first = torch.where(is_child, node, n).amin(dim=2)  # [B, n]; n where there is none
        guess = tokens.gather(1, first.clamp(max=n - 1))
        unused = unused_token(tokens)[:, None]
        taken = (choice[..., None] == tokens[:, None]).any(dim=2)
        other = torch.where(taken, unused, choice)
        depth = (positions - 1 - state.length[:, None]).clamp(max=len(self.probabilities) - 1)
        noise = kernels.gumbel(state.seed + self.salt, positions, 1)[..., 0]  # [B, n]
        drawn = (-(-noise).exp()).exp()  # uniform
        replaced = torch.where(drawn < self.probabilities[depth], guess, other)
        return torch.where(first < n, replaced, choice)


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


class SureTree(TreeDrafter):
    """A tree with a path of full depth, made by a random head.

    Such a head gives all tokens about the same probability, so the best nodes are all near the root. With
    logits this sharp the first children form a path of full depth, as in trees of trained heads.
    """

    def start(self, level: Level) -> None:
        super().start(level)
        self.trust = 100.0

    def learn(self, draft: Draft, verified: list, seconds: float) -> None:
        Drafter.learn(self, draft, verified, seconds)


def synthetic_methods(parts: Parts, args: argparse.Namespace) -> dict[str, tuple[Drafter, list[Acceptance]]]:
    """Drafters by name, and the acceptance of their proposals: by the target, then by the middle model."""
    heads = read_acceptance(args.acceptance, "--acceptance")
    chains = read_acceptance(args.middle_acceptance, "--middle_acceptance")
    target, small, shape = parts.target.model, parts.small, (args.tree_depth, args.tree_topk)
    head, inner = parts.head(target), SureTree(parts.small_head(small), args.tree_size or 16, *shape)
    methods = {
        "autoregressive": (Drafter(), [chains]),
        "sequential K=3": (SequentialDrafter(small, 3), [chains]),
        "tree of 60": (SureTree(head, 60, *shape), [heads]),
        "tree of 16": (SureTree(head, 16, *shape), [heads]),
        "hierarchical": (SyntheticHierarchy(heads, small, inner, args.min_draft_length), [chains, heads]),
    }
    for lower in lower_precisions(parts.target.precision)[-1:]:
        twin = share_weights(target, lower)
        methods[f"qspec {lower} K=3"] = (SequentialDrafter(twin, 3, shares_cache=True), [PRESETS["qspec"]])
    return methods


def report_synthetic(args: argparse.Namespace) -> dict:
    """What speculation would gain on this machine with models that are not here: real forwards of target,
    middle model and head of --shape, with drawn acceptance. See `Synthetic` and `compare`.

    The middle model is the next smaller shape, or the first 4 layers of the smallest. For compilation see
    `compiles`.
    """
    results = in_each_precision(partial(synthetic_in, args), args)
    levels = [level for rows in results.values() for row in rows.values() for level in row["acceptance"]]
    for source in dict.fromkeys(level["source"] for level in levels):
        print(f"{SYNTHETIC}: {source}")
    return results


def synthetic_in(args: argparse.Namespace, precision: str) -> dict[str, dict]:
    """The rows of one precision."""
    target, generator = SHAPES[args.shape], torch.Generator().manual_seed(0)
    small = SMALLER.get(args.shape, replace(target, num_layers=4))
    ids = torch.randint(3, target.vocab_size, (args.prompts, 32), generator=generator).tolist()
    parts = random_parts(target, small, precision, args.device, head_bits(args, precision))
    methods, decoders = synthetic_methods(parts, args), {}
    for name, (drafter, acceptance) in methods.items():
        settings = {"max_length": 512, "compile": compiles(args)}
        decoders[name] = SyntheticDecoder(acceptance[0], 2**40, parts.target.model, drafter, **settings)
        decoders[name].warm_up()
    print(f"{args.shape} {precision}: {SYNTHETIC}")
    rows = compare(decoders, [Prompt(tokens) for tokens in ids], args, effort=(5, 2), note=SYNTHETIC)
    for name, (_, acceptance) in methods.items():
        rows[name]["acceptance"] = [level._asdict() for level in acceptance]
    return rows
