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
    """Slice what is valid, mask, and let PyTorch's fused attention do the rest. Shapes as in `attention`."""
    m, lengths = ancestors.shape[-1], length.tolist()
    valid = max(lengths) + m  # the only slots anybody may look at
    seen = ancestors.new_zeros(len(q), 1, q.shape[1], valid)  # [B, 1, n, valid]
    for b, past in enumerate(lengths):
        seen[b, 0, :, :past] = True
        seen[b, 0, :, past : past + m] = ancestors[b]
    q, keys, values = q.transpose(1, 2), keys[:, :valid].transpose(1, 2), values[:, :valid].transpose(1, 2)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)  # [B, H, n, D]
    return out.transpose(1, 2).contiguous()


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
