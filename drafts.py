"""drafts.py: what the loop works with: drafts, accepting them, texts in a cache, drafters.

Read it after `model.py` and `sampling.py`, and before `gpt_spec.py`, where the loop puts these parts
together. `Drafter` is all that a method of speculative decoding has to be.

    path, accepted = accept(tokens, parent, picks, *tree_geometry(parent, depth), depth)

The one idea: a draft is a tree of tokens whose node 0 is the root. What a model picks after a node never
depends on what was proposed (see `sampling.py`), so accepting a draft is comparing tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from costs import Pace, Stats
from model import BadInput, CheckpointModule, KVCache, Transformer
from sampling import Logprob, Sampling

# --------------------------------------------------------------------------------------------------
# Drafts: trees of tokens whose node 0 is the root
# --------------------------------------------------------------------------------------------------


@dataclass
class Draft:
    """What a drafter proposes, for B rows: n nodes each, node 0 the root, parents before children.

    A sequence is a tree with parent = node - 1. Nodes that only fill the shape have parent -1.
    """

    tokens: Tensor  # int64 [B, n]
    parent: Tensor  # int64 [B, n]; -1 for the root and for padding
    max_depth: int  # of any node: how far the longest path can reach
    branches: bool = True  # may a path skip nodes, so that it has to move when it is accepted?
    expected: Tensor | None = None  # float32 [B]: accepted length that the drafter expects, or no estimate
    drafter: str = ""  # its name, where there is a choice

    @staticmethod
    def chain(tokens: Tensor, count: Tensor | None = None) -> Draft:
        """Root and n - 1 tokens in a row; those beyond `count` int64 [B], if given, are padding."""
        n = tokens.shape[1]
        node = torch.arange(n, device=tokens.device)
        count = torch.full_like(tokens[:, 0], n - 1) if count is None else count
        parent = torch.where(node <= count[:, None], node - 1, -1)  # [B, n]
        return Draft(tokens, parent, n - 1, branches=False)


def tree_geometry(parent: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """parent int64 [B, n] -> ancestors bool [B, n, n] (j is i or above i) and depth int64 [B, n]."""
    node = torch.arange(parent.shape[1], device=parent.device)
    current = node.expand_as(parent)
    ancestors = (node[:, None] == node).expand(len(parent), -1, -1)  # [B, n, n]
    depth = torch.zeros_like(parent)
    for _ in range(max_depth):  # every node climbs to its parent; at the top it stays
        above = parent.gather(1, current)
        depth = depth + (above >= 0)
        current = torch.where(above >= 0, above, current)
        ancestors = ancestors | (current[..., None] == node)
    return ancestors, depth


def accept(
    tokens: Tensor, parent: Tensor, picks: Tensor, ancestors: Tensor, depth: Tensor, max_depth: int
) -> tuple[Tensor, Tensor]:
    """From the root, follow the child that carries the target's pick, until no child does.

    tokens, parent, picks, depth: int64 [B, n] -> path int64 [B, max_depth + 1], accepted length int64 [B].
    Path starts at the root, holds `accepted` more nodes, and is filled up with the last of them.
    """
    follows = (parent >= 0) & (tokens == picks.gather(1, parent.clamp(min=0)))
    follows[:, 0] = True  # the root is committed already
    reached = ~(ancestors & ~follows[:, None, :]).any(dim=-1)  # [B, n]: the whole way from the root agrees
    accepted, last = torch.where(reached, depth, -1).max(dim=-1)  # [B] each
    on_path = ancestors.gather(1, last[:, None, None].expand(-1, 1, tokens.shape[1])).squeeze(1)  # [B, n]
    depths = torch.arange(max_depth + 1, device=tokens.device)
    node = torch.arange(tokens.shape[1], device=tokens.device)
    at_depth = on_path[:, None, :] & (depth[:, None, :] == depths[:, None])  # [B, max_depth + 1, n]
    path = torch.where(at_depth, node, -1).amax(dim=-1)  # the only node of each depth on the way
    return torch.where(depths <= accepted[:, None], path, last[:, None]), accepted


# --------------------------------------------------------------------------------------------------
# Texts in a cache
# --------------------------------------------------------------------------------------------------

# Tokens of a prompt per forward. It bounds memory; where chunks end depends on the row alone.
PREFILL_CHUNK = 512


def extend(
    model: Transformer, cache: KVCache, tokens: Tensor, length: Tensor, taps: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Continue texts of `length` int64 [B] by chains of tokens int64 [B, n] -> see `Transformer.forward`."""
    n = tokens.shape[1]
    slots = positions = length[:, None] + torch.arange(n, device=tokens.device)  # in a chain they coincide
    ancestors = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril().expand(len(tokens), -1, -1)
    return model(tokens, positions, partial(cache.attend, slots, ancestors, length), taps)


def prefill(
    model: Transformer,
    cache: KVCache,
    row: int,
    tokens: Tensor,
    start: int,
    features: Tensor | None = None,
    taps: tuple[int, ...] = (),
) -> Tensor:
    """Fill slots start .. P - 1 of one row with a prompt int64 [P] -> feature of its end, [1, 1, hidden].

    What is tapped on the way goes to the same places of `features` [slots, width].
    """
    view = cache.row(row)
    for begin in range(start, len(tokens), PREFILL_CHUNK):
        chunk = tokens[None, begin : begin + PREFILL_CHUNK]  # [1, n]
        last, tapped = extend(model, view, chunk, torch.tensor([begin], device=tokens.device), taps)
        if features is not None:
            features[begin : begin + chunk.shape[1]] = tapped[0]
    return last[:, -1:]


@dataclass
class State:
    """B texts being decoded at one level. tokens[length] is the root: committed, not yet in its cache."""

    tokens: Tensor  # int64 [B, slots]; valid up to and including the root
    features: Tensor  # [B, slots, width]; what the drafter wants of the model, of tokens below length
    length: Tensor  # int64 [B]; tokens whose K/V is in the cache of the level
    seed: Tensor  # int64 [B]; seed + prompt index, the key of the row's noise
    active: Tensor  # bool [B]; a row that is not active is frozen: it rides along, and its length stays

    @staticmethod
    def allocate(batch_size: int, slots: int, width: int, like: Tensor) -> State:
        """`width` of the features; `like`: any tensor of their dtype and device."""
        tokens = torch.zeros(batch_size, slots, dtype=torch.int64, device=like.device)
        seed = tokens.new_zeros(batch_size)
        length = torch.ones_like(seed)  # of a row without a text: 1, since drafters look one token back
        return State(tokens, like.new_zeros(batch_size, slots, width), length, seed, seed.bool())

    def row(self, row: int) -> State:
        """A view of one text."""
        tensors = (self.tokens, self.features, self.length, self.seed, self.active)
        return State(*(tensor[row : row + 1] for tensor in tensors))

    def append(self, emitted: Tensor, tapped: Tensor, path: Tensor) -> None:
        """Write the result of a verification after the text; `length` stays. emitted: tokens int64 [B, D + 1]
        after the root. path int64 [B, D + 1]: nodes from the root on, whose tapped states are kept."""
        depth = torch.arange(path.shape[1], device=path.device)
        self.tokens.scatter_(1, self.length[:, None] + 1 + depth, emitted)
        if tapped.shape[-1]:
            row = torch.arange(len(path), device=path.device)[:, None]  # [B, 1]
            self.features[row, self.length[:, None] + depth] = tapped[row, path]

    def before(self, end: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` tokens before position `end` int64 [B], and where they start: int64 [B, count],
        [B].

        They are fed once more where a cache may lack some; feeding the others writes what is there. Where
        fewer than `count` tokens come before `end`, the window starts at 0 and reaches beyond `end`.
        """
        start = (end - count).clamp(min=0)
        place = start[:, None] + torch.arange(count, device=end.device)  # [B, count]
        return self.tokens.gather(1, place), start


# --------------------------------------------------------------------------------------------------
# Drafters
# --------------------------------------------------------------------------------------------------

MAX_DRAFT_DEPTH = 64  # each unit of depth is a forward, or a move to the parent, unrolled in one graph
PADDING = 128  # tokens, or an eighth of a vocabulary: what sizes of one vocabulary may differ by


def check_vocabulary(size: int, target_size: int) -> int:
    """How many tokens, from 0 on, a drafter of `size` has in common with its target. BadInput if it is
    another vocabulary.

    Published models of one vocabulary have different sizes: Qwen2.5 pads its 151,665 tokens to 151,936 or to
    152,064. Where both tokenizers are at hand they are compared (`chat.check_tokens`); here only sizes are.
    """
    if abs(size - target_size) > max(PADDING, max(size, target_size) // 8):
        raise BadInput(f"the drafter has another vocabulary: {size} tokens, not {target_size}")
    return min(size, target_size)


class Verified(NamedTuple):
    """What the verifying model made of one row of a draft."""

    accepted: int  # draft tokens kept
    drafted: int  # draft tokens verified, root and padding not counted
    tokens: list[int]  # accepted + 1 new tokens
    expected: float  # accepted length that the drafter expected; 0 if it gives no estimate
    logprobs: list[Logprob] | None = None  # of the new tokens, where they were asked for


class Drafter:
    """Proposes what the target will verify. This one proposes nothing: autoregressive decoding.

    A drafter of your own overrides `propose` and sets `max_nodes`; if its drafts come in several sizes,
    `draft_sizes` too, and `max_depth` where they are no chains. It sets `needs_host = True` if `propose`
    reads a tensor in Python. All the rest has a default that is right for a drafter without a model and
    without a memory. docs/hacking.md adds one from start to end."""

    max_nodes = 1  # of any draft, root included
    models: tuple[CheckpointModule, ...] = ()  # whose weights count as the drafter's
    needs_costs = False  # does `propose` ask `self.pace` what a step costs?
    needs_host = False  # does `propose` look at a tensor, or decide anything, on the host?

    def propose(self, state: State, n: int | None = None) -> Draft:
        """What to verify next. With `n`, a draft of so many nodes, whatever the drafter would choose.

        Unless the drafter `needs_host`, this may be recorded as a CUDA graph, which repeats what it did.
        """
        root = state.tokens.gather(1, state.length[:, None])  # [B, 1]
        return Draft(root, torch.full_like(root, -1), 0, branches=False)

    # What it must say about sizes

    def draft_sizes(self) -> list[int]:
        """Every number of nodes that `propose` may return: one compiled verification each."""
        return [self.max_nodes]

    def max_depth(self, n: int) -> int:
        """Of drafts of n nodes."""
        return n - 1

    @property
    def slack(self) -> int:
        """Slots from `length` on that a step may touch, in the target's cache or in one of the drafter's."""
        return self.max_nodes

    # What a drafter with a model or a memory overrides

    def taps(self, layers: int) -> tuple[int, ...]:
        """What `State.features` must hold of a target with so many layers: see `Transformer.forward`."""
        return ()

    def start(self, level: Any) -> None:
        """Allocate and compile; called once, by the `gpt_spec.Level` that it drafts for."""
        self.pace = Pace(clock=level.clock)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        """A text int64 [P] was read in `row`, of which the caches have all before `start`: a prompt,
        or as much of it as the target has read so far."""

    def rewind(self, length: Tensor) -> None:
        """Go back to `length` int64 [B] in rows that are beyond it: other tokens follow. Only for drafters
        that have lengths of their own."""

    def learn(self, draft: Draft, verified: list[Verified], seconds: float) -> None:
        """What became of a draft, in every row that holds an unfinished text, and how long the step took."""
        tokens = sum(row.accepted + 1 for row in verified) / len(verified)
        self.pace.count(tokens, draft.tokens.shape[1], seconds)

    def warm_up(self, state: State) -> None:
        """Run once whatever `propose` may run, so that it is compiled. Nothing of the state changes."""
        self.propose(state)

    def count_into(self, stats: Stats) -> None:
        """Count the steps of levels inside the drafter, if it has any, in `stats.inside`."""


# --------------------------------------------------------------------------------------------------
# Texts, as the host sees them
# --------------------------------------------------------------------------------------------------


@dataclass
class Emission:
    """New tokens of one prompt; the first `accepted` were drafted, the others are the target's own."""

    prompt_index: int  # in the list of prompts
    tokens: list[int]
    accepted: int = 0
    finish_reason: str | None = None  # "stop" or "length" with the last emission of a prompt
    draft: Draft | None = None  # what was verified for it; the first token comes from prefill and has none
    row: int = 0  # of the batch
    logprobs: list[Logprob] | None = None  # of the tokens, where the decoder was asked for them


class Request(NamedTuple):
    """What is asked for a prompt."""

    sampling: Sampling
    seed: int  # the key of its noise
    stops: frozenset[int] = frozenset()  # the stop tokens, for `min_tokens`


@dataclass
class Text:
    """The host's view of a text: it waits for a row of the batch, reads its prompt there, then grows."""

    prompt_index: int
    prompt: list[int]
    request: Request
    budget: int  # new tokens it may still emit
    length: int = 0  # tokens of it that are in the caches
    shared: int = 0  # of its prompt, tokens that were in the caches of its row before

    @property
    def is_read(self) -> bool:
        return self.length >= len(self.prompt)


def cut(text: Text, gained: Verified, ends: Callable[[int, int], bool]) -> Emission:
    """The new tokens of a text up to and including the one that ends it."""
    reason, count = None, len(gained.tokens)
    for i, token in enumerate(gained.tokens, start=1):
        reason = "stop" if ends(text.prompt_index, token) else "length" if i == text.budget else None
        if reason:
            count = i
            break
    said = None if gained.logprobs is None else gained.logprobs[:count]
    accepted = min(gained.accepted, count)
    return Emission(text.prompt_index, gained.tokens[:count], accepted, reason, logprobs=said)
