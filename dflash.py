"""dflash.py: block heads, which guess several tokens in one pass, and the trees that are made of that.

A block head (DFlash, arXiv 2602.06036) is a few layers that read a block: the root, then masks. Each place of
the block yields a distribution, so a draft costs one pass instead of one for each depth. Read `eagle.py`
first. Files of block heads are read in `block_heads.py`.

    head = load_block_head("DIR", target)  # from block_heads.py
    generate(target, prompt_ids, drafter=BlockDrafter(head, tree_size=16))

The one idea: what may come at a position does not depend on the path to it, so all nodes of one depth choose
from one list of tokens, and the best tree of n nodes is found by sorting (DDTree, arXiv 2604.12989).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from drafts import MAX_DRAFT_DEPTH, PREFILL_CHUNK, State
from eagle import EagleHead, Pool, TreeDrafter
from model import BadInput, CheckpointModule, Embedding, LanguageHead, Layer, Linear, ModelConfig, RMSNorm
from prompts import check_kind, whole_number
from runtime import no_grad
from sampling import Nodes

# --------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """What makes a block head, beside its layers. But for the last two, nothing in its tensors tells."""

    taps: tuple[int, ...]  # of the target: see `Transformer.forward`
    size: int  # places of a block, the root's included
    mask_token_id: int
    shifted: bool = False  # does a place guess the token after it? If not, the one that stands there
    causal: tuple[bool, ...] = ()  # by layer: does a place see only those before it? No layer, if empty
    windows: tuple[int | None, ...] = ()  # by layer: positions before the root that are seen; all, if empty
    drafted: int | None = None  # tokens of an lm_head of its own; None for the target's
    own_embedding: bool = False


class BlockHead(EagleHead):
    """A block of guesses from some states of the target, in one pass.

    The states of a committed token become one vector (`fuse`). Every layer makes a key and a value of it,
    with the weights that make those of the block, but without the layer's norm. They depend on nothing else,
    so they are computed once. The block stands at the positions of the root and those after it.
    """

    def __init__(self, config: ModelConfig, block: Block):
        CheckpointModule.__init__(self, config)
        self.block, hidden = block, config.hidden_size
        self.fc = Linear(len(block.taps) * hidden, hidden)
        self.hidden_norm = RMSNorm(hidden, config.norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(hidden, config.norm_eps)
        if block.drafted is not None:
            self.lm_head = LanguageHead(hidden, block.drafted)
        if block.own_embedding:
            self.embed_tokens = Embedding(config.vocab_size, hidden)
        self.register_buffer("draft_ids", None, persistent=False)

    def attach(self, target: Any) -> BlockHead:
        if not self.block.own_embedding:
            self.embed_tokens = target.embed_tokens
        if self.block.drafted is None:
            self.lm_head = target.lm_head
        return self

    def taps(self, layers: int) -> tuple[int, ...]:
        return self.block.taps

    @property
    def depth(self) -> int:
        """How many tokens a block guesses."""
        return self.block.size - (not self.block.shifted)

    def fuse(self, features: Tensor) -> Tensor:
        """What the target yields, [B, n, taps * hidden] -> what all layers read of it, [B, n, hidden]."""
        return self.hidden_norm(self.fc(features))

    def keys(self, context: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [B, n, G, D] that `forward` makes of `context` [B, n, hidden], layer by layer."""
        rope = self.rope(positions)
        for layer in self.layers:
            yield layer.self_attn.project(context, None, *rope)[1:]

    def forward(self, context: Tensor, tokens: Tensor, positions: Tensor, attend) -> Tensor:
        """A block of tokens int64 [B, n], after fused states `context` [B, m, hidden] -> [B, n, hidden].
        `positions`: int64 [B, m + n]. `attend(layer, q, k, v)` is given the queries of the block, and keys
        and values of context and block, and returns [B, n, H, D]."""
        x, rope, m = self.embed_tokens(tokens), self.rope(positions), context.shape[1]
        for i, layer in enumerate(self.layers):
            rows = torch.cat((context, layer.input_layernorm(x)), dim=1)  # [B, m + n, hidden]
            q, k, v = layer.self_attn.project(rows, None, *rope)
            attended = attend(i, q[:, m:], k, v)
            x = layer.self_attn.o_proj(attended.flatten(2), residual=x)  # [B, n, H D] -> [B, n, hidden]
            x = layer.mlp(x, layer.post_attention_layernorm)
        return x

    def open(self, root: Tensor) -> Tensor:
        """The block that `root` int64 [..., 1] begins, int64 [..., size]."""
        return F.pad(root, (0, self.block.size - 1), value=self.block.mask_token_id)

    def guesses(self, x: Tensor) -> Tensor:
        """The rows of a block [B, size, hidden] that guess the tokens after the root, in order."""
        return x if self.block.shifted else x[:, 1:]

    def logits(self, features: Tensor) -> Tensor:
        return self.lm_head(features, self.norm)

    def visible(self, layer: int, like: Tensor) -> Tensor:
        """Which places of the block each one sees, bool [size, size], where `like` is."""
        seen = torch.ones(self.block.size, self.block.size, dtype=torch.bool, device=like.device)
        return seen.tril() if self.block.causal and self.block.causal[layer] else seen


# --------------------------------------------------------------------------------------------------
# Trees
# --------------------------------------------------------------------------------------------------

MAX_NODES = 1024  # of a tree
NEVER = 2**62  # a position that no text has


class BlockDrafter(TreeDrafter):
    """A block head guesses what may come at the next positions, and the best paths through that are a tree.

    A node is worth the product of the probabilities on its path, and of all trees of n nodes the one with the
    largest sum is proposed. It is a chain where the head is sure; with `tree_topk` 1 it always is one.

    At a temperature, logits become trust * (logits + noise / b). The guesses for deeper nodes are mixtures
    over all that may come before, so the noise may pick what cannot follow this path. `b` weakens it: of
    SHARES, each depth takes the one whose first choice has agreed most often with the text, of late. `trust`
    is that of `TreeDrafter`.

    Below `length` the head's cache holds keys and values made of the target's states. A block is in the slots
    from `length` on, and is overwritten by the next.
    """

    SHARES = (1.0, 0.5, 0.25, 0.0)  # of the noise: 1 / b
    MEMORY = 0.99  # by which what agreed counts less with every step
    deepens = False  # a block is one pass

    @no_grad
    def __init__(
        self,
        head: BlockHead,
        tree_size: int | None = None,
        tree_depth: int | None = None,
        tree_topk: int | None = None,
    ):
        """`tree_size` counts the root. `tree_depth`: as many places of the block; None for all. `tree_topk`:
        children of a node; None for as many as could be among the best."""
        check_kind("head", head, BlockHead)
        most = min(head.depth, MAX_DRAFT_DEPTH)
        depth = most if tree_depth is None else whole_number("tree_depth", tree_depth)
        if not 1 <= depth <= most:
            raise BadInput(f"tree_depth is {depth}; with this head it must be 1 to {most}")
        vocabulary = head.lm_head.out_features
        topk = vocabulary if tree_topk is None else whole_number("tree_topk", tree_topk, 1)
        if topk > vocabulary:
            raise BadInput(f"tree_topk is {topk}; the head knows {vocabulary} tokens")
        possible = min(sum(topk**d for d in range(depth + 1)), MAX_NODES)
        if tree_size is not None and not 2 <= whole_number("tree_size", tree_size) <= possible:
            raise BadInput(f"tree_size is {tree_size}; with depth {depth} it must be 2 to {possible}")
        self.head, self.models, self.scratch = head, (head,), head.block.size
        usual = [n for n in self.SIZES if n <= possible] or [possible]
        self.sizes = usual if tree_size is None else [tree_size]
        self.max_nodes, self.needs_costs = self.sizes[-1], tree_size is None
        self.needs_host = len(self.sizes) > 1
        self.depth, self.topk = min(depth, self.max_nodes - 1), min(topk, self.max_nodes - 1)
        self.trust_tensor = torch.ones((), device=head.norm.weight.device)
        self.trust = 1.0

    def start(self, level: Any) -> None:
        super().start(level)
        device, rows, ids = self.trust_tensor.device, level.setup.batch_size, self.head.draft_ids
        self.ids = None if ids is None else ids[: self.drafted]
        self.seen = [self.head.visible(i, self.trust_tensor) for i in range(len(self.head.layers))]
        lists = candidates(self.max_nodes - 1, self.depth, self.topk)
        self.candidates = [torch.tensor(pairs, device=device).T.contiguous() for pairs in lists]
        # What each share of the noise had first in the last block, its root, and how often that was right.
        self.shares = torch.tensor(self.SHARES, device=device)
        self.choices = torch.zeros(rows, self.depth, len(self.SHARES), dtype=torch.int64, device=device)
        self.asked = torch.full((rows,), NEVER, device=device)
        self.agreed = torch.zeros(self.depth, len(self.SHARES), device=device)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        self.asked[row].fill_(NEVER)
        for first in range(max(start - self.window, 0), len(tokens), PREFILL_CHUNK):
            place = torch.arange(first, min(first + PREFILL_CHUNK, len(tokens)), device=tokens.device)[None]
            context = self.head.fuse(state.features[row, place])  # [1, n, hidden]
            for layer, keys_values in enumerate(self.head.keys(context, place)):
                self.cache.row(row).write(place, layer, *keys_values)

    def fill_block(self, state: State) -> Tensor:
        """Write the last true keys and values, and let the head see a block -> [B, size, hidden]."""
        length, size = state.length, self.head.block.size
        start = (length - self.window).clamp(min=0)
        place = start[:, None] + torch.arange(self.window, device=start.device)  # [B, m]
        slots = length[:, None] + torch.arange(size, device=start.device)  # [B, size]: its positions, too
        row = torch.arange(len(start), device=start.device)[:, None]  # [B, 1]
        context = self.head.fuse(state.features[row, place])  # [B, m, hidden]
        block = self.head.open(state.tokens.gather(1, length[:, None]))
        attend = partial(self.attend, length, place, slots)
        return self.head(context, block, torch.cat((place, slots), dim=1), attend)

    def attend(self, length: Tensor, place: Tensor, slots: Tensor, layer: int, *qkv: Tensor) -> Tensor:
        """Store the keys and values of a context at `place` and of a block at `slots`, then attend."""
        (q, k, v), m = qkv, place.shape[1]
        self.cache.write(place, layer, k[:, :m], v[:, :m])
        self.cache.write(slots, layer, k[:, m:], v[:, m:])  # last: of a short text, `place` goes beyond it
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        window = self.head.block.windows[layer] if self.head.block.windows else None
        if window is not None and window < keys.shape[1]:
            start = (length - window).clamp(min=0)
            near = start[:, None] + torch.arange(window + slots.shape[1], device=start.device)
            near, row = near.clamp(max=keys.shape[1] - 1), torch.arange(len(near), device=near.device)
            keys, values = keys[row[:, None], near], values[row[:, None], near]  # [B, window + size, G, D]
            length = length - start
        seen = self.seen[layer].expand(len(length), -1, -1)  # [B, size, size]
        return kernels.attention(q, keys, values, seen, length)

    # The tree

    def add_noise(self, logits: Tensor, state: State, positions: Tensor) -> Tensor:
        """Logits [B, depth, V] and of the noise as much as has agreed with the text most often."""
        ids, size = self.ids, self.drafted if self.ids is None else self.head.config.vocab_size
        noise = kernels.gumbel(state.seed, positions, size)
        noise = noise if ids is None else noise[..., ids]  # [B, depth, V]
        noise = self.controls.settings[:, :1, None].float() * noise
        self.compare(state, positions)
        # [B, depth, shares]
        firsts = torch.cat([kernels.top_k(logits + s * noise, 1)[1] for s in self.SHARES], dim=-1)
        self.choices.copy_(firsts if ids is None else ids[firsts])
        self.asked.copy_(state.length)
        share = self.shares[kernels.top_k(self.agreed, 1)[1]]  # [depth, 1]; of equals the first
        return logits + share * noise

    def compare(self, state: State, positions: Tensor) -> None:
        """Count which shares of the noise were right where the text has come since the last block."""
        since = positions + (self.asked - state.length)[:, None]  # [B, depth]: what the choices were for
        known = (since <= state.length[:, None]) & state.active[:, None]
        said = state.tokens.gather(1, since.clamp(max=state.tokens.shape[1] - 1))
        right = (self.choices == said[..., None]) & known[..., None]  # [B, depth, shares]
        self.agreed.copy_(self.MEMORY * self.agreed + right.sum(dim=0))

    def grow(self, state: State, trust: Tensor, reach: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = self.head.guesses(self.fill_block(state))[:, : self.depth]  # [B, depth, hidden]
        logits = self.head.logits(rows)[..., : self.drafted]  # [B, depth, V]
        # With what the text has gained, but not yet this tree: cheap, and nearly the penalties of the target.
        logits = self.controls.penalize(logits, Nodes.after([], state.seed), self.ids)
        if self.noisy:
            depth = torch.arange(1, self.depth + 1, device=logits.device)
            logits = self.add_noise(logits, state, state.length[:, None] + depth)
        logits = trust * logits
        best, index = kernels.top_k(logits, self.topk)  # [B, depth, k] each
        # At most 0, though rounding may say otherwise: no child is better than its parent.
        steps = (best - kernels.logsumexp(logits)).float().clamp(max=0)
        tokens = index if self.ids is None else self.ids[index]
        return self.best_nodes(self.find_nodes(tokens, steps), state, self.sizes[:reach])

    def find_nodes(self, tokens: Tensor, steps: Tensor) -> Pool:
        """Depth by depth the nodes that may be among the best. tokens int64, steps float32 [B, depth, k]: the
        best of each depth and their log-probabilities, in order."""
        pool, scores, first = Pool([], [], []), torch.zeros_like(steps[:, 0, :1]), 0  # [B, 1]
        for i, (above, rank) in enumerate(self.candidates):
            keep = min(len(above), self.max_nodes - 1 - i)  # as many nodes are above a node
            scores, best = kernels.top_k(scores[:, above] + steps[:, i, rank], keep)  # [B, keep] each
            pool.tokens.append(tokens[:, i].gather(1, rank[best]))
            pool.scores.append(scores)
            pool.parents.append(first + above[best])
            first = pool.size - keep + 1
        return pool


def candidates(count: int, depth: int, topk: int) -> list[list[tuple[int, int]]]:
    """For each depth the nodes that may be among the best `count` of all: pairs of parent and token, numbers
    in the order of what is kept of the depth above and of the `topk` best tokens.

    Before parent i with token j come all parents up to i with all tokens up to j, which are no worse.
    """
    found, parents = [], 1
    for above in range(depth):
        pairs = ((i, j) for i in range(parents) for j in range(min(topk, count // (i + 1))))
        found.append(list(pairs))
        parents = min(len(found[-1]), count - above)
    return found
