"""kernels.py: the operations that PyTorch alone does not do well enough. It knows tensors, not models.

Every operation has one signature and is opaque to torch.compile: it may look at values (how long a text is),
so cost follows the work there is without a recompilation. Bodies that are faster replace a body, never a
signature.

Today there is one operation, attention over a static cache, with one body: the reference, in plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, length: Tensor) -> Tensor:
    """Slice what is valid, mask, and let PyTorch's fused attention do the rest. Shapes as in `attention`.

    A row of the batch at a time, so that none pays for the length of another or reads beyond its own. Queries
    are filled up to a multiple of 16, keys to one of 64: sizes at which, measured in bf16 on a CPU with
    AMX, PyTorch adds up a query in the same order whoever rides along.
    """
    n, m, out = q.shape[1], ancestors.shape[-1], torch.empty_like(q)
    q = F.pad(q, (0, 0, 0, 0, 0, -n % 16))
    for b, past in enumerate(length.tolist()):
        valid = past + m
        k, v = (F.pad(cache[b : b + 1, :valid], (0, 0, 0, 0, 0, -valid % 64)) for cache in (keys, values))
        seen = ancestors.new_zeros(q.shape[1], k.shape[1])
        seen[:, :valid] = True
        seen[:n, past:valid] = ancestors[b]
        heads_first = (tensor.transpose(1, 2) for tensor in (q[b : b + 1], k, v))  # [1, heads, ., D]
        row = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True)
        out[b] = row[0, :, :n].transpose(0, 1)  # [H, n, D] -> [n, H, D]
    return out


library = torch.library.Library("gpt_spec", "DEF")
library.define("attention(Tensor q, Tensor keys, Tensor values, Tensor ancestors, Tensor length) -> Tensor")
library.impl("attention", attention_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("gpt_spec::attention")
def _(q: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, length: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def attention(q: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, length: Tensor) -> Tensor:
    """n queries of each of B rows over a static cache; every row has its own length and its own tree.

    q: [B, n, H, D]; keys, values: [B, slots, G, D] with H a multiple of G; length: int64 [B], how many slots
    are the past that everybody sees; ancestors: bool [B, n, m], which of the m nodes in slots length ..
    length + m - 1 a query sees beyond that (itself included; the queries are the last n of the m nodes).
    Returns [B, n, H, D].
    """
    return torch.ops.gpt_spec.attention(q, keys, values, ancestors, length)
