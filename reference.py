"""reference.py: every operation of `kernels.py` in plain PyTorch, and how packed weights lie in memory.

The slow twins: the tests compare every kernel with its reference, and where there is no compiler, everything
runs on them. They take any device and any dtype, and torch.compile may fuse them. They say what is computed;
`kernels.py` says when, and by which body.

    y = linear_reference(x, weight, scales, zeros, ...)   # the same arguments as `kernels.linear`

The one idea: the plainest code that is right. The last bit of a row may depend on the other rows, except in
`filter_reference`, which GPUs use. In the other bodies it never does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # output rows that lie side by side in a packed weight

# --------------------------------------------------------------------------------------------------
# Weights. On disk and for the reference they lie in rows: bf16 or int8 [out, in], or uint8 [out, in / 2] with
# the even input in the low nibble. The CPU bodies want blocks of 64 rows: 4 bytes of each row side by side,
# step by step, so that 64 bytes are one vector and a block is one stream. A block takes the room that its
# rows took, so packing is done in place. The GPU wants rows of 32-bit words, and all else as it lies.
# --------------------------------------------------------------------------------------------------

INPUTS = {torch.bfloat16: 2, torch.int8: 4, torch.uint8: 8}  # of a row, in the 4 bytes of a step


def swap_nibbles(steps: Tensor) -> Tensor:
    """uint8 [..., 4]: low, high nibbles 0, 1; 2, 3; 4, 5; 6, 7 become 0, 4; 1, 5; 2, 6; 3, 7."""
    a, b, c, d = steps.unbind(-1)
    pairs = (a & 15 | c << 4, a >> 4 | c & 240, b & 15 | d << 4, b >> 4 | d & 240)
    return torch.stack(pairs, dim=-1)


def restore_nibbles(steps: Tensor) -> Tensor:
    """The inverse of `swap_nibbles`."""
    a, b, c, d = steps.unbind(-1)
    pairs = (a & 15 | b << 4, c & 15 | d << 4, a >> 4 | b & 240, c >> 4 | d & 240)
    return torch.stack(pairs, dim=-1)


def fill_up(rows: Tensor) -> Tensor:
    """Rows of zeros up to a whole number of blocks; the tensor itself, if it has one."""
    missing = -len(rows) % BLOCK
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


WORDS, PAIR = 16, 32  # words of a chunk of inputs, and inputs in a pair of nibbles of all of them


def pack_words(weight: Tensor) -> Tensor:
    """4-bit weights in rows, uint8 [out, in / 2], for the GPU: int32 [out, in / 8], inputs rounded up to 128.

    Of a chunk of 128 inputs, word w has inputs 32 p + 2 w and 32 p + 2 w + 1 in its nibbles p and p + 4: a
    shift and a mask make a register of them, one in each half.
    """
    words = []
    for rows in weight.split(4096):  # what is needed in between is eight times as large
        q = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(1)  # [., in / 2, 2] -> [., in]
        q = F.pad(q, (0, -q.shape[1] % (4 * PAIR)), value=8).int().view(len(q), -1, 4, WORDS, 2)
        place = torch.arange(4, dtype=torch.int32, device=q.device)[:, None, None] * 4  # of pair p
        shifts = place + 16 * torch.arange(2, dtype=torch.int32, device=q.device)  # [4, 1, 2]
        words.append((q << shifts).sum(dim=(2, 4), dtype=torch.int32).flatten(1))  # [., chunks, 16]
    return torch.cat(words)


def pack(weight: Tensor) -> Tensor:
    """A weight in rows -> in blocks [out / 64, steps, 64, 2 bf16 or 4 bytes], out rounded up with zeros; a
    4-bit one on the GPU, as `pack_words` says.

    In place: the result lives in the memory of `weight`, unless rows had to be added, or it is on the GPU.
    """
    if weight.device.type == "cuda":
        return pack_words(weight)
    weight = fill_up(weight).contiguous()
    elements = 2 if weight.dtype == torch.bfloat16 else 4  # of a row, in a step
    # [blocks, 64, steps, 2 or 4]
    blocks = weight.view(-1, BLOCK, weight.shape[1] // elements, elements)
    for some in blocks.split(16):
        turned = some.transpose(1, 2)  # [., steps, 64, 2 or 4]
        turned = swap_nibbles(turned) if weight.dtype == torch.uint8 else turned.contiguous()
        some.view(turned.shape).copy_(turned)
    return blocks.view(len(blocks), -1, BLOCK, elements)


def pack_scales(scales: Tensor) -> Tensor:
    """float16 [out, groups] -> [out / 64, groups, 64]; for the GPU, [groups, out]."""
    if scales.device.type == "cuda":
        return scales.T.contiguous()
    scales = fill_up(scales)
    return scales.view(-1, BLOCK, scales.shape[1]).transpose(1, 2).contiguous()


def unpack(weight: Tensor) -> Tensor:
    """What `pack` made, in rows again; rows that were added stay."""
    blocks = restore_nibbles(weight) if weight.dtype == torch.uint8 else weight
    return blocks.transpose(1, 2).reshape(BLOCK * len(weight), -1)  # [out, .]


def dequantize(weight: Tensor, scales: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """float32 [out, in] of a weight in rows or in blocks; bf16 ones as they are."""
    if weight.dim() == 4:
        in_rows = [None if t is None else t.transpose(1, 2).flatten(0, 1) for t in (scales, zeros)]
        weight, (scales, zeros) = unpack(weight), in_rows
    if scales is None:
        return weight
    q = weight.float()
    if weight.dtype == torch.uint8:
        # [out, in / 2, 2] -> [out, in]
        q = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1).float()
        q = q - (8 if zeros is None else zeros.float().repeat_interleave(q.shape[1] // zeros.shape[1], dim=1))
    return q * scales.float().repeat_interleave(q.shape[1] // scales.shape[1], dim=1)


def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows `tokens` of a weight in rows, or of a bf16 one in blocks that lm_head shares -> [..., in]."""
    if weight.dim() == 2:
        return F.embedding(tokens, weight)
    return weight[tokens // BLOCK, :, tokens % BLOCK].flatten(-2)  # [..., steps, 2] -> [..., in]


# --------------------------------------------------------------------------------------------------
# References
# --------------------------------------------------------------------------------------------------


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def rotate_reference(x: Tensor, matrix: Tensor, power: int, stride: int) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    # [..., blocks, K, power, stride]
    wide = wide.unflatten(-1, (x.shape[-1] // (len(matrix) * power * stride), len(matrix), power, stride))
    half = power // 2
    while half:  # the fast Walsh-Hadamard transform: sums and differences of numbers that lie `half` apart
        a, b = wide.unflatten(-2, (-1, 2, half)).unbind(-3)  # [..., K, pairs, half, stride] each
        wide = torch.stack((a + b, a - b), dim=-3).flatten(-4, -2)  # [..., K, power, stride]
        half //= 2
    if len(matrix) > 1:
        wide = torch.einsum("ij,...jps->...ips", matrix.to(wide.dtype), wide)
    return (wide.flatten(-4) / math.sqrt(len(matrix) * power)).to(x.dtype)


def quantize_activations(x: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """x [..., in] as integers, float32 [..., groups, in / groups], and their scales [..., groups, 1].

    8 bits: one scale for the row, -127 .. 127. 4 bits: one for each group, -7 .. 7.
    """
    limit, x = 2.0 ** (bits - 1) - 1, x.float().unflatten(-1, (groups, -1))
    absmax = x.abs().amax(dim=-1, keepdim=True)  # [..., groups, 1]
    if bits == 8:
        absmax = absmax.amax(dim=-2, keepdim=True).expand_as(absmax)
    nothing = absmax < 1e-30  # its inverse would not be finite
    factor = torch.where(nothing, 0.0, torch.full_like(absmax, limit) / absmax)
    return (x * factor).round(), torch.where(nothing, 0.0, absmax / limit)


def linear_reference(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    rotation: Tensor | None,
    power: int,
    stride: int,
    permutation: Tensor | None,
    out_features: int,
    activation_bits: int,
    float32_out: bool,
) -> Tensor:
    """What `linear` computes, in plain PyTorch."""
    dtype = x.dtype
    x = prepare_reference(x, norm, eps, gated, rotation, power, stride, permutation)
    matrix = dequantize(weight, scales, zeros)[:out_features]
    if activation_bits < 16:
        q, scale = quantize_activations(x, activation_bits, scales.shape[1])
        x = (q * scale).flatten(-2)  # float32 [..., in]
    else:
        x = x.to(dtype)
    matrix = matrix if scales is None else matrix.to(x.dtype)
    y = F.linear(x, matrix, None if bias is None else bias.to(x.dtype))
    y = y.float() if float32_out else y.to(dtype)
    return y if residual is None else residual + y


def prepare_reference(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    rotation: Tensor | None,
    power: int,
    stride: int,
    permutation: Tensor | None,
) -> Tensor:
    """What a linear multiplies with, before it is rounded: [..., in], float32 after a rotation."""
    if norm is not None:
        x = rms_norm_reference(x, norm, eps)
    if gated:
        gate, up = x.chunk(2, dim=-1)
        x = (F.silu(gate.float()) * up.float()).to(x.dtype)
    if rotation is not None:
        # By the body of this device, whose rows do not depend on each other
        x = torch.ops.gpt_spec.rotate(x.float(), rotation, power, stride)
    return x if permutation is None else x[..., permutation]


LOW_32 = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (in int64) whose bits look random: lowbias32 by Chris Wellons.

    The second factor is 0x846CA68B as a signed number, so that no product leaves int64.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW_32
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & LOW_32
    return x ^ (x >> 16)


def uniform_reference(seed: Tensor, positions: Tensor, size: int) -> Tensor:
    first = mix(mix(seed & LOW_32) ^ ((seed >> 32) & LOW_32))[:, None]  # [B, 1]
    second = mix(first ^ 0x5BF03635)  # two keys: seeds whose streams meet in one do not meet in the other
    a = mix((positions + first) & LOW_32)[..., None]  # [B, n, 1]
    b = mix(a ^ second[..., None])
    token = torch.arange(size, device=positions.device)
    bits = mix(mix((token + a) & LOW_32) ^ b)  # [B, n, size]
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def top_k_reference(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ordered, index = x.masked_fill(x.isnan(), -torch.inf).sort(dim=-1, descending=True, stable=True)
    return ordered[..., :k].contiguous(), index[..., :k].contiguous()


def filter_reference(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    kept = rank < (top_k or logits.shape[-1])
    if top_p < 1:
        # Probabilities as whole numbers, relative to the largest: their sums are exact in any order, and a
        # GPU, which uses this body, adds up one row and sixty-four in different ones.
        share = ((ordered - ordered[..., :1]) / temperature).double().exp() * 2.0**40
        share = torch.where(kept, share, 0.0).long()
        before = share.cumsum(dim=-1) - share  # what the tokens ahead of this one hold
        kept = kept & ((before < top_p * share.sum(dim=-1, keepdim=True)) | (rank == 0))
    left = torch.full_like(logits, -torch.inf).scatter(-1, token, torch.where(kept, ordered, -torch.inf))
    return torch.where(logits.isnan().any(dim=-1, keepdim=True), logits, left)


def move_reference(caches: list[Tensor], path: Tensor, length: Tensor) -> None:
    rows = torch.arange(len(path), device=path.device)[:, None]  # [B, 1]
    source = length[:, None] + path
    goal = length[:, None] + torch.arange(path.shape[1], device=path.device)
    for cache in caches:
        cache[rows, goal] = cache[rows, source]  # the right side is gathered before the left is written


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, length: Tensor) -> Tensor:
    """Slice what is valid, mask, and let PyTorch's fused attention do the rest. Shapes as in `attention`.

    A row of the batch at a time, so that none pays for the length of another or reads beyond its own.
    """
    n, m, out = q.shape[1], ancestors.shape[-1], torch.empty_like(q)
    for b, past in enumerate(length.tolist()):
        valid = past + m
        seen = ancestors.new_ones(n, valid)
        seen[:, past:] = ancestors[b]
        row = (
            tensor[b : b + 1].transpose(1, 2) for tensor in (q, keys[:, :valid], values[:, :valid])
        )  # [1, heads, ., D]
        attended = F.scaled_dot_product_attention(*row, attn_mask=seen, enable_gqa=True)
        out[b] = attended[0].transpose(0, 1)  # [H, n, D] -> [n, H, D]
    return out
