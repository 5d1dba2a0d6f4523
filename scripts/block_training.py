"""block_training.py: what a block head (dflash.py) learns from texts, for train_head.py --kind dflash.

    anchors, there = draw_anchors(lesson.wrote, 32, seed)
    loss = block_loss(head, lesson, anchors, there, gamma)

The one idea: a block begins at a token of an answer and sees what came before that token alone, as it will
when it drafts. Many blocks of one text are guessed in one forward; none sees another.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from training import config_json, silence, write_folder  # noqa: E402

from dflash import Block, BlockHead  # noqa: E402
from model import LanguageHead, ModelConfig, Transformer, causal_attention  # noqa: E402

ROWS = 256  # whose logits over the whole vocabulary are in memory together


@dataclass
class BlockLesson:
    """Texts, and what the target makes of them."""

    tokens: Tensor  # int64 [B, n]
    states: Tensor  # [B, n, taps * hidden]: what the head sees
    wrote: Tensor  # bool [B, n]: the target wrote this token


@torch.no_grad()
def teach_blocks(target: Transformer, taps: tuple[int, ...], tokens: Tensor, wrote: Tensor) -> BlockLesson:
    """tokens int64 [B, n]; wrote bool [B, n]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return BlockLesson(tokens, target(tokens, positions, causal_attention, taps)[1], wrote)


def draw_anchors(wrote: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The roots of `count` blocks a text, drawn from the answers: int64 [B, count], and which are there,
    bool. A text with fewer has others, which are not."""
    followed = wrote & F.pad(wrote[:, 1:], (0, 1))  # [B, n]
    drawn = torch.rand(wrote.shape, generator=torch.Generator().manual_seed(seed)).to(wrote.device)
    best = drawn.masked_fill(~followed, -1).topk(min(count, wrote.shape[1]))
    return best.indices, best.values >= 0


def guess_blocks(head: BlockHead, lesson: BlockLesson, anchors: Tensor) -> Tensor:
    """All blocks that begin at `anchors` int64 [B, A] -> their guesses, [B * A, depth, hidden]."""
    n, size = lesson.tokens.shape[1], head.block.size
    places = anchors[..., None] + torch.arange(size, device=anchors.device)  # [B, A, size]
    blocks = head.open(lesson.tokens.gather(1, anchors)[..., None])  # [B, A, size]
    text = torch.arange(n, device=anchors.device).expand_as(lesson.tokens)  # [B, n]
    positions = torch.cat((text, places.flatten(1)), dim=1)  # [B, n + A size]
    attend = partial(block_attention, head, anchors, n)
    x = head(head.fuse(lesson.states), blocks.flatten(1), positions, attend)  # [B, A size, hidden]
    return head.guesses(x.unflatten(1, (-1, size)).flatten(0, 1))


def block_attention(
    head: BlockHead, anchors: Tensor, n: int, layer: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Each place sees the text before its anchor, and its own block. q: [B, A size, H, D]; k, v: [B, n + A
    size, G, D]."""
    text, size, count = torch.arange(n, device=q.device), head.block.size, anchors.shape[1]
    window = head.block.windows[layer] if head.block.windows else None
    seen = text < anchors[..., None]  # [B, A, n]
    if window is not None:
        seen = seen & (text >= anchors[..., None] - window)
    own = torch.kron(torch.eye(count, device=q.device), head.visible(layer, q).float()).bool()
    own = own.expand(len(q), -1, -1)  # [B, A size, A size]
    mask = torch.cat((seen.repeat_interleave(size, dim=1), own), dim=-1)[:, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def labels_of(head: BlockHead, lesson: BlockLesson, anchors: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """What the text has where blocks guess, int64 [B * A, depth], and whether the target wrote it, bool."""
    places = anchors[..., None] + 1 + torch.arange(head.depth, device=anchors.device)  # [B, A, depth]
    inside, n = places < lesson.tokens.shape[1], lesson.tokens.shape[1]
    row = torch.arange(len(anchors), device=anchors.device)[:, None, None]
    places = places.clamp(max=n - 1)
    wrote = lesson.wrote[row, places] & inside & there[..., None]
    # Nothing is asked of what comes after an end of an answer: another speaker's words.
    return lesson.tokens[row, places].flatten(0, 1), wrote.cummin(dim=-1).values.flatten(0, 1)


def rows_loss(head: BlockHead, rows: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropies, summed. rows: [rows, hidden]; labels: int64 [rows]; weights: [rows]"""
    logits = head.logits(rows[None])[0].float()  # [rows, V]
    return (weights * F.cross_entropy(logits, labels, reduction="none")).sum()


def block_loss(head: BlockHead, lesson: BlockLesson, anchors: Tensor, there: Tensor, gamma: float) -> Tensor:
    """The weighted mean over all guesses of answers; guess i, from 1 on, weighs exp(-(i - 1) / gamma)."""
    labels, known = labels_of(head, lesson, anchors, there)
    decay = torch.exp(-torch.arange(head.depth, device=known.device) / gamma).expand(known.shape)
    rows, labels, weights = guess_blocks(head, lesson, anchors)[known], labels[known], decay[known]
    total = torch.zeros((), device=known.device)
    for part in zip(*(t.split(ROWS) for t in (rows, labels, weights))):
        # Logits are computed again for the gradient: those of all rows would fill the memory.
        total = total + checkpoint(partial(rows_loss, head), *part, use_reentrant=False)
    return total / weights.sum().clamp(min=1e-6)


@torch.no_grad()
def count_right_blocks(
    head: BlockHead, lesson: BlockLesson, anchors: Tensor, there: Tensor
) -> tuple[int, list[int]]:
    """(blocks that the text has whole, those whose first 1, 2, ... greedy guesses are all the text's)."""
    labels, known = labels_of(head, lesson, anchors, there)
    whole = known.all(dim=-1)
    rows = guess_blocks(head, lesson, anchors)[whole]  # [blocks, depth, hidden]
    picks = [head.logits(part)[..., :].argmax(-1) for part in rows.split(ROWS)]
    right = (torch.cat(picks) == labels[whole]).cumprod(dim=-1) if picks else labels[:0]
    return len(rows), right.sum(dim=0).tolist()


def build_block_head(target: Transformer, block: Block, layers: int, lm_head: Tensor, seed: int) -> BlockHead:
    """A head that adds nothing yet to its embeddings. `lm_head`: the target's, float32 [V, hidden], which is
    not trained; as it is stored, it may have no gradient."""
    torch.manual_seed(seed)
    c, like = target.config, target.norm.weight
    plain = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "sliding_window": None}
    head = BlockHead(replace(c, num_layers=layers, tied_embeddings=False, qk_norm=True, **plain), block)
    silence(head)
    head = head.to(like.device)
    head.norm.weight.data.copy_(like)
    head.attach(target)
    head.lm_head = LanguageHead(c.hidden_size, c.vocab_size).requires_grad_(False)
    head.lm_head.weight.data = lm_head
    return head


def write_block_head(folder: Path, head: BlockHead, rope: dict[str, Any]) -> None:
    """The layout of z-lab. `rope`: what the target's config.json says of RoPE."""
    borrowed = ("embed_tokens.", "model.embed_tokens.", "lm_head.")
    tensors = {n: t for n, t in head.checkpoint_tensors().items() if not n.startswith(borrowed)}
    config: ModelConfig = head.config
    outputs = [tap - 1 for tap in head.block.taps]  # there, a layer is named by the state that leaves it
    inner = {"target_layer_ids": outputs, "mask_token_id": head.block.mask_token_id}
    raw = config_json(config) | rope | {"model_type": "qwen3", "architectures": ["DFlashDraftModel"]}
    write_folder(folder, tensors, raw | {"block_size": head.block.size, "dflash_config": inner})
