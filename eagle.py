"""eagle.py: EAGLE heads, and the trees that they grow.

A head is a decoder layer, rarely more. It guesses the target's next feature from the last one (EAGLE-1,
EAGLE-2), or from some states of the target (EAGLE-3). `TreeDrafter` has the head guess depth by depth, where
it is sure, and proposes the best nodes of all. Read `drafts.py` and `gpt_spec.py` first. Files of heads are
read in `heads.py`.

    head = load_head("DIR", target)  # from heads.py
    generate(target, prompt_ids, drafter=TreeDrafter(head, tree_size=16))

The one idea: a node is worth the probability of its whole path, so a tree of n nodes is the n best of all
nodes that the head has seen, and the best small tree is the beginning of the best large one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from drafts import MAX_DRAFT_DEPTH, PREFILL_CHUNK, Draft, Drafter, State, Verified, check_vocabulary
from model import (
    Attention,
    BadInput,
    CheckpointModule,
    Embedding,
    FeedForward,
    KVCache,
    LanguageHead,
    Linear,
    ModelConfig,
    RMSNorm,
    Transformer,
)
from prompts import check_kind, whole_number
from runtime import no_grad
from sampling import Nodes

# --------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------


class HeadLayer(nn.Module):
    """A layer of a head. What the first one attends with is not what it adds to (`EagleHead.enter`), so it
    has no norm of its own here; those above it are as in the target."""

    def __init__(self, config: ModelConfig, inputs: int | None = None):
        """`inputs`: width of what the first layer attends with."""
        super().__init__()
        self.self_attn = Attention(config, inputs)
        self.first = inputs is not None
        if not self.first:
            self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, n, inputs] -> queries [B, n, H, D], keys and values [B, n, G, D]."""
        return self.self_attn.project(x, None if self.first else self.input_layernorm, *rope)

    def add(self, attended: Tensor, residual: Tensor) -> Tensor:
        """attended [B, n, H, D], residual [B, n, hidden] -> what the layer makes of them, [B, n, hidden]."""
        x = self.self_attn.o_proj(attended.flatten(2), residual=residual)  # [B, n, H D] -> [B, n, hidden]
        return self.mlp(x, self.post_attention_layernorm)


def head_layers(config: ModelConfig, inputs: int) -> nn.ModuleList:
    """All layers of a head; `inputs`: width of what the first one attends with."""
    return nn.ModuleList(HeadLayer(config, None if i else inputs) for i in range(config.num_layers))


class EagleHead(CheckpointModule):
    """A decoder layer that guesses a model's features (EAGLE-1: arXiv 2401.15077; EAGLE-2: 2406.16858).

    Entry p of its cache is made from the feature of position p and the token of position p + 1. It stands at
    position p, and it guesses the feature of position p + 1. Embedding and lm_head are the target's
    (`attach`); there is no norm before the first layer, and none after the last.
    """

    embed_tokens: Embedding
    lm_head: LanguageHead
    draft_ids: Tensor | None  # int64 [drafted vocabulary]: tokens of the logits, if not 0, 1, 2, ...
    window: int | None = None  # see `Eagle3`

    def __init__(self, config: ModelConfig, fc_bias: bool = False):
        """`config`: of the head's layers, and the target's vocabulary."""
        super().__init__(config)
        self.fc = Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = head_layers(config, config.hidden_size)
        self.register_buffer("draft_ids", None, persistent=False)

    def attach(self, target: Transformer) -> EagleHead:
        """Borrow what the head has in common with its target -> self. A loader does it last."""
        self.embed_tokens, self.lm_head = target.embed_tokens, target.lm_head
        return self

    def taps(self, layers: int) -> tuple[int, ...]:
        """Which states of a target with so many layers are its features: see `Transformer.forward`."""
        return (layers,)

    def fuse(self, features: Tensor) -> Tensor:
        """What the target yields -> features as the head itself yields them, [B, n, hidden]."""
        return features

    def enter(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, n], features [B, n, hidden] -> what attention reads, and what is added to it."""
        embedded = self.embed_tokens(tokens)  # [B, n, hidden]
        x = self.fc(torch.cat((embedded, features), dim=-1))  # [B, n, 2 hidden] -> [B, n, hidden]
        return x, x

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, attend, last: Tensor | None = None
    ) -> Tensor:
        """Features [B, n, hidden] of `positions` int64 [B, n], tokens after them -> the next features.

        `attend(layer, q, k, v)` returns [B, ., H, D]. With `last` int64 [B], only that row of each text goes
        on to attend in the last layer, and the others are there for their keys and values -> [B, 1, hidden].
        """
        rope = self.rope(positions)
        x, residual = self.enter(tokens, features)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(x, rope)
            if last is not None and i == len(self.layers) - 1:
                row = (torch.arange(len(last), device=last.device)[:, None], last[:, None])  # [B, 1] each
                q, residual = q[row], residual[row]  # [B, 1, H, D], [B, 1, hidden]
            x = residual = layer.add(attend(i, q, k, v), residual)
        return self.leave(x)

    def leave(self, x: Tensor) -> Tensor:
        """What the last layer makes -> the features that go round, both [B, n, hidden]."""
        return x

    @property
    def target_hidden_size(self) -> int:
        return self.config.hidden_size

    def logits(self, features: Tensor) -> Tensor:
        """[B, n, hidden] -> float32 [B, n, drafted vocabulary]."""
        return self.lm_head(features)

    def restrict(self, ids: Tensor) -> EagleHead:
        """Draft no tokens but `ids` int64 [n], which makes drafting cheaper (FR-Spec, arXiv 2502.14856) ->
        self. After `attach`. BadInput if the head can draft none of them."""
        known = torch.arange(self.lm_head.out_features, device=ids.device)
        known = known if self.draft_ids is None else self.draft_ids.to(ids.device)
        keep = torch.isin(known, ids).nonzero().flatten().to(self.fc.weight.device)  # [kept]
        if len(keep) == 0:
            raise BadInput("the head can draft none of the tokens that it should be restricted to")
        self.lm_head, self.draft_ids = self.lm_head.rows(keep), known.to(keep.device)[keep]
        return self

    def drafted(self, vocabulary: int) -> int:
        """How many logits are of tokens below `vocabulary`, those that the target has. Its ids ascend."""
        if self.draft_ids is None:
            return min(self.lm_head.out_features, vocabulary)
        beyond = (self.draft_ids >= vocabulary).nonzero()  # [beyond, 1]
        return int(beyond[0]) if len(beyond) else len(self.draft_ids)


@dataclass(frozen=True)
class Eagle3:
    """What makes an EAGLE-3 head, beside its layers. The last four leave no trace in its tensors."""

    taps: tuple[int, ...]  # of the target: see `Transformer.forward`
    target_hidden_size: int
    drafted: int  # tokens that it can draft
    own_embedding: bool = False
    own_lm_head: bool = True
    fc_bias: bool = False
    input_norm: bool = False  # before fc, over all taps together
    fc_norm: bool = False  # before fc, over each tap alone
    norm_before_residual: bool = False  # what attention is added to has been normed
    norm_output: bool = False  # what goes round has been normed: EAGLE-3.1
    double_norm: bool = False  # features have the embedding's norm, too, before their own: some of ModelOpt
    window: int | None = None  # entries that each one sees, itself included; None for all


def default_taps(layers: int) -> tuple[int, ...]:
    """Low, middle and high, as all early heads have them."""
    return (2, layers // 2, layers - 3)


class Eagle3Head(EagleHead):
    """EAGLE-3 (arXiv 2503.01840) and 3.1: states of the target as features, a vocabulary of its own.

    What goes round is the state before the norm of the lm_head, which is the head's own, or, in 3.1, after
    it.
    """

    def __init__(self, config: ModelConfig, switches: Eagle3):
        CheckpointModule.__init__(self, config)
        self.switches, self.window = switches, switches.window
        hidden, eps = config.hidden_size, config.norm_eps
        width = len(switches.taps) * switches.target_hidden_size
        if switches.input_norm:
            self.input_norm = RMSNorm(width, eps)
        if switches.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(switches.target_hidden_size, eps) for _ in switches.taps)
        self.fc = Linear(width, hidden, bias=switches.fc_bias)
        self.layers = head_layers(config, 2 * hidden)
        self.layers[0].hidden_norm = RMSNorm(hidden, eps)
        self.layers[0].input_layernorm = RMSNorm(hidden, eps)  # of the embedding
        self.norm = RMSNorm(hidden, eps)
        if switches.own_lm_head:
            self.lm_head = LanguageHead(hidden, switches.drafted)
        self.register_buffer("draft_ids", torch.arange(switches.drafted), persistent=False)
        if switches.own_embedding:
            self.embed_tokens = Embedding(config.vocab_size, hidden)

    @property
    def target_hidden_size(self) -> int:
        return self.switches.target_hidden_size

    def attach(self, target: Transformer) -> EagleHead:
        if not self.switches.own_embedding:
            self.embed_tokens = target.embed_tokens
        if not self.switches.own_lm_head:
            self.lm_head = target.lm_head
        return self

    def taps(self, layers: int) -> tuple[int, ...]:
        return self.switches.taps

    def fuse(self, features: Tensor) -> Tensor:
        if self.switches.fc_norm:
            states = features.split(self.switches.target_hidden_size, dim=-1)  # [B, n, target hidden] each
            features = torch.cat([norm(state) for norm, state in zip(self.fc_norm, states)], dim=-1)
        # [B, n, taps * target hidden] -> [B, n, hidden]
        return self.fc(features, self.input_norm if self.switches.input_norm else None)

    def enter(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.layers[0].input_layernorm(self.embed_tokens(tokens))  # [B, n, hidden]
        twice = self.switches.double_norm
        normed = self.layers[0].hidden_norm(self.layers[0].input_layernorm(features) if twice else features)
        residual = normed if self.switches.norm_before_residual else features
        return torch.cat((embedded, normed), dim=-1), residual  # [B, n, 2 hidden], [B, n, hidden]

    def leave(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.switches.norm_output else x

    def logits(self, features: Tensor) -> Tensor:
        return self.lm_head(features, None if self.switches.norm_output else self.norm)


class HeadCache(KVCache):
    """Keys and values of a head, which may look back only so far."""

    def __init__(self, cache: KVCache, window: int | None):
        """`window`: entries that a query sees, itself included; None for all."""
        super().__init__(cache.keys, cache.values)
        self.window = window

    def row(self, b: int) -> HeadCache:
        return HeadCache(super().row(b), self.window)

    def attend_at(
        self, positions: Tensor, slots: Tensor, ancestors: Tensor, length: Tensor, layer: int, *qkv: Tensor
    ) -> Tensor:
        """As `attend`, for queries at `positions` int64 [B, .]."""
        if self.window is None or self.window >= self.keys[layer].shape[1]:
            return self.attend(slots, ancestors, length, layer, *qkv)
        q, k, v = qkv
        self.write(slots, layer, k, v)
        # From so far back that the window of the first query fits: as many slots for every text.
        start = (length - self.window).clamp(min=0)  # [B]
        count = min(self.window + ancestors.shape[2], self.keys[layer].shape[1])
        slot = start[:, None] + torch.arange(count, device=start.device)  # [B, m]
        node = slot - length[:, None]  # negative: a true entry, whose position is its slot
        within = slot[:, None] > positions[..., None] - self.window  # [B, ., m]
        index = node.clamp(0, ancestors.shape[2] - 1)[:, None].expand_as(within)
        below = ancestors.gather(2, index) & (node < ancestors.shape[2])[:, None]
        seen = torch.where((node < 0)[:, None], within, below)
        row = torch.arange(len(start), device=start.device)[:, None]  # [B, 1]
        slot = slot.clamp(max=self.keys[layer].shape[1] - 1)
        keys, values = self.keys[layer][row, slot], self.values[layer][row, slot]  # [B, m, G, D]
        return kernels.attention(q, keys, values, seen, torch.zeros_like(length))

    def extend(
        self, head: EagleHead, tokens: Tensor, features: Tensor, place: Tensor, count: Tensor
    ) -> Tensor:
        """Write the entries of `place` int64 [B, n], the first `count` [B] of which are there -> the feature
        guessed from the last of these, [B, 1, hidden]. What comes behind them is masked garbage."""
        offset, start = torch.arange(place.shape[1], device=place.device), place[:, 0]
        last = (offset < count[:, None])[:, None]  # [B, 1, n]
        before = (offset <= offset[:, None]).expand(len(place), -1, -1)  # [B, n, n]: all but the last layer
        if self.window is not None:
            last = last & (offset > count[:, None, None] - 1 - self.window)
            before = before & (offset > offset[:, None] - self.window)

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            if layer < len(head.layers) - 1:
                return self.attend_at(place, place, before, start, layer, *qkv)
            return self.attend_at((start + count - 1)[:, None], place, last, start, layer, *qkv)

        return head(tokens, features, place, attend, count - 1)


def frequent_tokens(texts: list[list[int]], count: int, vocabulary: int) -> Tensor:
    """The `count` tokens that are most frequent in some texts, ascending, int64 [count].

    Of equally frequent ones, and of those that are in no text, the lower ones: a tokenizer of pairs (BPE) has
    numbered its tokens by how frequent they were in what it learnt from.
    """
    found = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    return choose_vocabulary(torch.bincount(found, minlength=vocabulary)[:vocabulary], count)


def choose_vocabulary(counts: Tensor, size: int) -> Tensor:
    """The most frequent tokens by their counts int64 [V], ascending, int64 [size]; of equals the lowest."""
    return counts.argsort(descending=True, stable=True)[:size].sort().values


# --------------------------------------------------------------------------------------------------
# Trees
# --------------------------------------------------------------------------------------------------

TREE_DEPTH, TREE_TOPK = 6, 4  # by default


class TreeDrafter(Drafter):
    """An EAGLE head grows a tree where it is sure of itself (EAGLE-2, arXiv 2406.16858, section 4).

    The k best continuations of the root are the first beam. `tree_depth` - 1 times, every node of the beam
    gets its k best children, and the k best of these are the next beam. Of all nodes seen, the best are
    verified. A node is worth the product of the probabilities on its path.

    Two things differ from EAGLE-2. The noise of a position is added to the head's logits, so the tree grows
    around what the target is going to pick. And the logits are multiplied by `trust`: a head that learnt the
    distribution of the target underrates the one token that the target, with this noise, is sure to pick.

    Below `length` the head's cache holds true entries, computed from the target's features. Entries guessed
    while a tree grows go to scratch slots from `length` on, and are discarded. Every step feeds the last
    `window` true entries: some are new, and writing the others again changes nothing.

    Each depth is a pass of the head. So where the number of nodes is chosen by cost, a tree is grown as deep
    as one of the last step's size needs. Up to the next size may be verified, and then the depth follows.
    """

    SIZES = (2, 4, 8, 16, 32, 60)  # what `tree_size` None chooses from, step by step
    reach = len(SIZES) + 1  # 1 + the number of sizes up to that of the last step
    deepens = True  # does a deeper draft take more passes of the head?

    @no_grad
    def __init__(
        self,
        head: EagleHead,
        tree_size: int | None = None,
        tree_depth: int = TREE_DEPTH,
        tree_topk: int = TREE_TOPK,
    ):
        """`tree_size` counts the root, `tree_depth` does not. BadInput for trees that cannot be."""
        check_kind("head", head, EagleHead)
        tree_depth = whole_number("tree_depth", tree_depth)
        tree_topk = whole_number("tree_topk", tree_topk, 1)
        tree_size = None if tree_size is None else whole_number("tree_size", tree_size)
        if not 1 <= tree_depth <= MAX_DRAFT_DEPTH:
            raise BadInput(f"tree_depth is {tree_depth}; it must be 1 to {MAX_DRAFT_DEPTH}")
        self.scratch = tree_topk * (tree_depth - 1)  # slots of entries that are guessed
        pool = tree_topk * (1 + self.scratch)
        if tree_size is not None and not 2 <= tree_size <= pool + 1:
            raise BadInput(
                f"tree_size is {tree_size}; depth {tree_depth} and top-k {tree_topk} allow 2 to {pool + 1}"
            )
        if head.window is not None and head.window <= tree_depth:
            raise BadInput(f"tree_depth is {tree_depth}; the head looks back no further than {head.window}")
        vocabulary = head.config.vocab_size if head.draft_ids is None else len(head.draft_ids)
        if tree_topk > vocabulary:
            raise BadInput(f"tree_topk is {tree_topk}; the head knows {vocabulary} tokens")
        self.head, self.models, self.depth, self.topk = head, (head,), tree_depth, tree_topk
        usual = [n for n in self.SIZES if n <= pool + 1]
        self.sizes = [tree_size] if tree_size else usual if len(usual) > 1 else [pool + 1]
        self.max_nodes, self.needs_costs = self.sizes[-1], tree_size is None
        self.needs_host = len(self.sizes) > 1
        self.trust_tensor = torch.ones((), device=head.layers[0].post_attention_layernorm.weight.device)
        self.trust = 1.0

    @property
    def trust(self) -> float:
        """The factor of the logits. It moves until as much is accepted as expected."""
        return self.trust_value

    @trust.setter
    def trust(self, value: float) -> None:
        self.trust_value = value
        self.trust_tensor.fill_(value)  # `grow` reads the tensor: it may be a recorded graph

    def taps(self, layers: int) -> tuple[int, ...]:
        return self.head.taps(layers)

    def draft_sizes(self) -> list[int]:
        return self.sizes

    def max_depth(self, n: int) -> int:
        return min(self.depth, n - 1)

    def depth_for(self, reach: int) -> int:
        """How deep to grow: like a tree of the last step's size in which every node has two children, and so
        that there are nodes enough for the next size; all of the depth for a fixed size."""
        if len(self.sizes) == 1:
            return self.depth
        last, largest = self.sizes[reach - 2], self.sizes[:reach][-1]
        wide = 1 + -(-(largest - 1 - self.topk) // self.topk**2)
        return min(self.depth, max((last - 1).bit_length(), wide))

    def start(self, level: Any) -> None:
        super().start(level)
        wanted, given = self.head.target_hidden_size, level.model.config.hidden_size
        if wanted != given:
            raise BadInput(f"the head is for a target with a hidden size of {wanted}, not {given}")
        check_vocabulary(self.head.config.vocab_size, level.vocabulary)
        self.drafted = self.head.drafted(level.vocabulary)
        if self.topk > self.drafted:
            raise BadInput(f"tree_topk is {self.topk}; the head drafts {self.drafted} tokens of the target")
        like, setup = self.head.layers[0].post_attention_layernorm.weight, level.setup
        # True entries that may be new: those of the longest path, and those of the levels above.
        self.window = self.max_depth(self.max_nodes) + 1 + level.behind + level.renewed
        cache = KVCache.allocate(self.head.config, setup.batch_size, setup.slots + self.scratch, like)
        self.cache = HeadCache(cache, self.head.window)
        self.controls, self.noisy = level.controls, level.controls.noisy
        self.grow_tree = setup.runtime.recorded(partial(setup.runtime.compiled(self.grow), level.state))

    def warm_up(self, state: State) -> None:
        for n in self.sizes:  # each has its depth
            self.propose(state, n)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        """All entries but the last, whose token is still to be picked. Only keys and values matter."""
        begin, end = max(start - self.window, 0), len(tokens) - 1
        for first in range(begin, end, PREFILL_CHUNK):
            place = torch.arange(first, min(first + PREFILL_CHUNK, end), device=tokens.device)  # [n]
            features = self.head.fuse(state.features[row : row + 1, place])  # [1, n, hidden]
            count = torch.full((1,), len(place), device=tokens.device)
            self.cache.row(row).extend(self.head, tokens[None, place + 1], features, place[None], count)

    def catch_up(self, state: State) -> Tensor:
        """Write the last true entries -> the feature guessed from the last one, [B, 1, hidden].

        There are `window` of them, or fewer where the text is shorter.
        """
        start = (state.length - self.window).clamp(min=0)
        place = start[:, None] + torch.arange(self.window, device=start.device)  # [B, n]
        row = torch.arange(len(start), device=start.device)[:, None]  # [B, 1]
        features = self.head.fuse(state.features[row, place])  # [B, n, hidden]
        return self.cache.extend(
            self.head, state.tokens[row, place + 1], features, place, state.length - start
        )

    def children(
        self, features: Tensor, position: Tensor, seed: Tensor, trust: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The k best tokens at `position` int64 [B], given features [B, n, hidden] -> int64 [B, n, k], and
        their log-probabilities."""
        logits, ids = self.head.logits(features)[..., : self.drafted], self.head.draft_ids  # [B, n, V]
        ids = None if ids is None else ids[: self.drafted]
        # With what the text has gained, but not yet this tree: cheap, and nearly the penalties of the target.
        logits = self.controls.penalize(logits, Nodes.after([], seed), ids)
        if self.noisy:
            size = self.drafted if ids is None else self.head.config.vocab_size
            noise = kernels.gumbel(seed, position[:, None], size)  # [B, 1, V]
            noise = noise if ids is None else noise[..., ids]
            logits = logits + self.controls.settings[:, :1, None].float() * noise
        logits = trust * logits
        best, index = kernels.top_k(logits, self.topk)
        # At most 0, though rounding may say otherwise: no child is better than its parent.
        scores = (best - kernels.logsumexp(logits)).float().clamp(max=0)
        return index if self.head.draft_ids is None else self.head.draft_ids[index], scores

    def grow(self, state: State, trust: Tensor, reach: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Trees of the largest of the first `reach` sizes, best nodes first: tokens int64 [B, n], parents
        int64 [B, n]; the accepted length to expect of each size, float32 [B, sizes], and its mean over active
        rows.

        `trust` float32 []: see the class.
        """
        k, past, depth = self.topk, state.length, self.depth_for(reach)
        rank, row = torch.arange(k, device=past.device), torch.arange(len(past), device=past.device)[:, None]
        features = self.catch_up(state)  # [B, 1, hidden]
        below, steps = self.children(features, past + 1, state.seed, trust)  # [B, 1, k] each
        tokens, scores = below.squeeze(1), steps.squeeze(1)
        pool = Pool([tokens], [scores], [torch.zeros_like(tokens)])
        node, features = 1 + rank.expand_as(tokens), features.repeat(1, k, 1)  # [B, k], [B, k, hidden]
        itself = (rank[:, None] == rank).expand(len(past), -1, -1)  # [B, k, k]
        ancestors = itself
        for beam in range(depth - 1):
            positions = (past + beam)[:, None].expand_as(tokens)  # [B, k]
            slots = past[:, None] + beam * k + rank  # [B, k]
            attend = partial(self.cache.attend_at, positions, slots, ancestors, past)
            features = self.head(tokens, features, positions, attend)  # [B, k, hidden]
            below, steps = self.children(features, past + beam + 2, state.seed, trust)  # [B, k, k] each
            first = pool.size + 1
            pool.add(below, scores[..., None] + steps, node)
            if beam == depth - 2:
                break
            scores, best = kernels.top_k(pool.scores[-1], k)  # [B, k]
            above, tokens, node = best // k, pool.tokens[-1].gather(1, best), first + best  # [B, k] each
            features = features[row, above]
            ancestors = torch.cat((ancestors[row, above], itself), dim=-1)  # [B, k, (beam + 2) k]
        return self.best_nodes(pool, state, self.sizes[:reach])

    def best_nodes(self, pool: Pool, state: State, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `grow` returns, of all nodes that there are."""
        tokens, parents, scores = pool.best(state, sizes[-1] - 1)
        accepted = scores.exp().cumsum(dim=1)  # [B, n - 1]
        worth = torch.stack([accepted[:, n - 2] for n in sizes], dim=1)  # [B, sizes]
        mean = (worth * state.active[:, None]).sum(dim=0) / state.active.sum().clamp(min=1)
        return tokens, parents, worth, mean

    def propose(self, state: State, n: int | None = None) -> Draft:
        reach = min(self.reach, len(self.sizes) + 1) if n is None else self.reach_of(n)
        tokens, parent, worth, mean = self.grow_tree(self.trust_tensor, reach)
        if n is None:
            n = self.choose_size(mean)
            self.reach = max(self.reach_of(n), reach - 1)
        # New tensors, since the compiled verification wants the same strides whatever the batch.
        tokens, parent = (tensor.narrow_copy(1, 0, n) for tensor in (tokens, parent))
        return Draft(tokens, parent, self.max_depth(n), expected=worth[:, self.sizes.index(n)])

    def reach_of(self, n: int) -> int:
        """`reach` after a step of n nodes: in `grow`, the first so many sizes end with the one above n."""
        return (self.sizes.index(n) if self.deepens else len(self.sizes) - 1) + 2

    def choose_size(self, mean: Tensor) -> int:
        """The number of nodes to verify; `mean`, float32 [sizes]: see `grow`."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        # The host reads the device here: the price of choosing.
        return self.pace.best(dict(zip(self.sizes, mean.tolist())))

    def learn(self, draft: Draft, verified: list[Verified], seconds: float) -> None:
        super().learn(draft, verified, seconds)
        # The average over texts: many of them at once would make it swing.
        surplus = sum(row.accepted - row.expected for row in verified) / len(verified)
        self.trust = min(max(self.trust * math.exp(0.02 * surplus), 0.25), 4.0)


@dataclass
class Pool:
    """All nodes that a growing tree has seen, depth by depth. Node 0 is the root, the others count from 1."""

    tokens: list[Tensor]  # int64 [B, .]
    scores: list[Tensor]  # float32 [B, .]: log-probabilities of whole paths, never above the parent's
    parents: list[Tensor]  # int64 [B, .]

    @property
    def size(self) -> int:
        return sum(tokens.shape[1] for tokens in self.tokens)

    def add(self, tokens: Tensor, scores: Tensor, parents: Tensor) -> None:
        """tokens, scores: [B, k, k], the children of `parents` int64 [B, k]."""
        self.tokens.append(tokens.flatten(1))
        self.scores.append(scores.flatten(1))
        self.parents.append(parents[..., None].expand_as(tokens).flatten(1))

    def best(self, state: State, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Root and best nodes, tokens and parents int64 [B, count + 1], and the scores of all but the root.

        Of equals the first wins, so that a parent always precedes its children, and the first n nodes are the
        best tree of n nodes.
        """
        tokens, parents = torch.cat(self.tokens, dim=1), torch.cat(self.parents, dim=1)  # [B, pool]
        scores, order = kernels.top_k(torch.cat(self.scores, dim=1), count)  # [B, count]
        root = state.tokens.gather(1, state.length[:, None])  # [B, 1]
        node = torch.arange(1, count + 1, device=root.device).expand_as(order)
        # Where in the tree a node of the pool is: [B, pool + 1]
        place = torch.zeros_like(F.pad(parents, (1, 0))).scatter(1, order + 1, node)
        parent = torch.cat((torch.full_like(root, -1), place.gather(1, parents.gather(1, order))), dim=1)
        return torch.cat((root, tokens.gather(1, order)), dim=1), parent, scores
