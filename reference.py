"""reference.py: every operation of `kernels.py` in plain PyTorch, and how packed weights lie in memory.

The slow twins: the tests compare every kernel with its reference, and where there is no compiler, everything
runs on them. They take any device and any dtype, and torch.compile may fuse them. They say what is computed;
`kernels.py` says when, and by which body.

    y = linear_reference(x, weight, scales, zeros, ...)   # the same arguments as `kernels.linear`

The one idea: the plainest code that is right. The last bit of a row may depend on the other rows, except
where tokens are picked. In the other bodies it never does.
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


def unpack_words(words: Tensor, scales: Tensor, zeros: Tensor | None, inputs: int) -> tuple:
    """What `pack_words` and `pack_scales` made for the GPU, in rows again."""
    pair = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device)[:, None]
    q = words.view(len(words), -1, 1, WORDS) >> pair  # [out, chunks, 4, 16]
    weight = (q & 15 | q >> 12 & 240).flatten(1)[:, : inputs // 2].byte()  # [out, in / 2]
    return weight, scales.T, None if zeros is None else zeros.T


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
    if weight.dtype == torch.int32:
        weight, scales, zeros = unpack_words(weight, scales, zeros, x.shape[-1])
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


def top_k_reference(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ordered, index = x.masked_fill(x.isnan(), -torch.inf).sort(dim=-1, descending=True, stable=True)
    return ordered[..., :k].contiguous(), index[..., :k].contiguous()


def move_reference(caches: list[Tensor], path: Tensor, length: Tensor) -> None:
    rows = torch.arange(len(path), device=path.device)[:, None]  # [B, 1]
    source = length[:, None] + path
    goal = length[:, None] + torch.arange(path.shape[1], device=path.device)
    for cache in caches:
        cache[rows, goal] = cache[rows, source]  # the right side is gathered before the left is written


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.rope` in plain PyTorch."""

    def turned(x: Tensor) -> Tensor:  # [B, n, heads, D]
        a, b = x.float().chunk(2, dim=-1)  # [B, n, heads, D / 2] each
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turned(q), turned(k)


def store_reference(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """`kernels.store` in plain PyTorch."""
    rows = torch.arange(len(slots), device=slots.device)[:, None]  # [B, 1]
    keys[rows, slots] = k
    values[rows, slots] = v


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, length: Tensor) -> Tensor:
    """Slice what is valid, mask, and let PyTorch's fused attention do the rest. Shapes as in `attention`.

    A row of the batch at a time, so that none pays for the length of another or reads beyond its own.
    """
    m, out = ancestors.shape[-1], torch.empty_like(q)
    for b, past in enumerate(length.tolist()):
        tensors = (q, keys[:, : past + m], values[:, : past + m])
        row = (tensor[b : b + 1].transpose(1, 2) for tensor in tensors)  # [1, heads, ., D]
        seen = F.pad(ancestors[b], (past, 0), value=True)  # [n, past + m]
        attended = F.scaled_dot_product_attention(*row, attn_mask=seen, enable_gqa=True)
        out[b] = attended[0].transpose(0, 1)  # [H, n, D] -> [n, H, D]
    return out


# --------------------------------------------------------------------------------------------------
# Picking tokens: noise, filters, penalties. Every operation is written so that its result is the same bits on
# every machine: whole numbers, and floats that are added and multiplied one operation at a time.
# --------------------------------------------------------------------------------------------------

LOW_32 = 0xFFFFFFFF
NOISE_BLOCK = 64  # tokens that share a hash


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (in int64) whose bits look random: lowbias32 by Chris Wellons.

    The second factor is 0x846CA68B as a signed number, so that no product leaves int64.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW_32
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & LOW_32
    return x ^ (x >> 16)


def log_reference(x: Tensor) -> Tensor:
    """Natural logarithm of positive, normal float64 numbers, within some 1e-12 of it."""
    bits = x.view(torch.int64)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52  # so that the rest is in [sqrt(1/2), sqrt(2))
    rest = (bits - (exponent << 52)).view(torch.float64)
    z = (rest - 1) / (rest + 1)
    y, series = z * z, 1 / 13
    for odd in (11, 9, 7, 5, 3, 1):
        series = 1 / odd + y * series
    return exponent.double() * 0.6931471805599453 + 2 * z * series


def exponential(bits: Tensor) -> Tensor:
    """32 random bits -> a number of the distribution Exp(1), float64."""
    return -log_reference(1 - (bits.double() + 0.5) * 2.0**-32)


def gumbel_reference(seed: Tensor, positions: Tensor, size: int) -> Tensor:
    """Gumbel noise float32 [B, n, size]: minus the logarithm of when a token's exponential clock rings.

    The first of 64 neighbouring clocks rings after Exp(1) / 64, and may be any of them. The others ring
    Exp(1) after it, since clocks have no memory. So one hash tells what the largest noise of 64 tokens is.
    """
    first = mix(mix(seed & LOW_32) ^ ((seed >> 32) & LOW_32))[:, None]  # [B, 1]
    second = mix(first ^ 0x5BF03635)  # two keys: seeds whose streams meet in one do not meet in the other
    a = mix((positions + first) & LOW_32)[..., None]  # [B, n, 1]
    b = mix(a ^ second[..., None])
    token = torch.arange(size, device=positions.device)
    block = torch.arange(-(-size // NOISE_BLOCK), device=positions.device)
    bits = mix(mix((block + mix(a ^ 0x2C1B3C6D)) & LOW_32) ^ mix(b ^ 0x297A2D39))  # [B, n, blocks]
    winner = mix((bits + 0x9E3779B9) & LOW_32) % NOISE_BLOCK + block * NOISE_BLOCK
    both = (exponential(bits) / NOISE_BLOCK, winner)
    earliest, winner = (t.repeat_interleave(NOISE_BLOCK, dim=-1)[..., :size] for t in both)  # [B, n, size]
    later = earliest + exponential(mix(mix((token + a) & LOW_32) ^ b))
    return -log_reference(torch.where(token == winner, earliest, later)).float()


def power_of_two(t: Tensor) -> tuple[Tensor, Tensor]:
    """2^t for float32 t <= 0 as whole numbers int64: 2^-whole * part / 2^24."""
    t = torch.where(t > -63, t, -63.0)  # also where t is NaN
    whole = -t.int()
    f, p = t + whole.float(), 0.0009448955534026027  # f in (-1, 0]
    for factor in (0.009205777198076248, 0.05529733747243881, 0.2401801347732544, 0.6931437253952026, 1.0):
        p = p * f + factor
    return whole.long(), (p * 2.0**24).long()


def masses_reference(logits: Tensor, scale: Tensor) -> Tensor:
    """2^((x - largest) * scale) in units of 2^-42, int64 [..., V]: sums of them have no order.

    Of a number, as many bits count as can matter next to the largest of its 64 neighbours.
    """
    size = logits.shape[-1]
    blocks = F.pad(logits, (0, -size % NOISE_BLOCK), value=-torch.inf).unflatten(-1, (-1, NOISE_BLOCK))
    most, scale = logits.amax(dim=-1)[..., None, None], scale[..., None]
    top, _ = power_of_two((blocks.amax(dim=-1, keepdim=True) - most) * scale)  # [..., blocks, 1]
    whole, part = power_of_two((blocks - most) * scale)  # [..., blocks, 64]
    weight = part >> (whole - top + (top - 18).clamp(min=0)).clamp(max=31)
    weight = torch.where(top > 42, 0, weight << (18 - top).clamp(min=0))
    return weight.flatten(-2)[..., :size]


def kept_reference(logits: Tensor, settings: Tensor) -> Tensor:
    """Which tokens the filters keep, bool [B, n, V]: see `kernels.pick`. By sorting all logits."""
    _, scale, top_k, top_p, gap = settings[:, None, None].unbind(dim=-1)  # [B, 1, 1] each
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)
    least = torch.where(gap > -torch.inf, ordered[..., :1] + gap.float(), -torch.inf)
    kept = (rank < torch.where(top_k > 0, top_k, len(rank))) & (ordered >= least)
    mass = torch.where(kept, masses_reference(logits, scale.float()).gather(-1, token), 0)
    ahead, whole = mass.cumsum(dim=-1) - mass, mass.sum(dim=-1, keepdim=True)
    kept &= (top_p >= 1) | (ahead == 0) | (ahead.double() < top_p * whole.double())
    return torch.zeros_like(kept).scatter(-1, token, kept)


def pick_reference(logits: Tensor, positions: Tensor, seed: Tensor, settings: Tensor) -> Tensor:
    """What `kernels.pick` computes, with noise for all tokens."""
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    temperature = settings[:, :1, None]  # [B, 1, 1]
    noise = gumbel_reference(seed, positions, logits.shape[-1])
    perturbed = logits + temperature.float() * noise
    perturbed = torch.where(kept_reference(logits, settings), perturbed, -torch.inf)
    return torch.where(temperature == 0, logits, perturbed).argmax(dim=-1)


SEEN = 2**30  # added to the count of a token that the prompt has


def penalize_reference(
    logits: Tensor,
    tokens: Tensor,
    sees: Tensor,
    counts: Tensor,
    penalties: Tensor,
    bias: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """What `kernels.penalize` computes. Only the columns of `tokens` differ between nodes: the others follow
    from the counts of the row."""
    repetition, presence, frequency = penalties[:, :, None, None].unbind(dim=1)  # [B, 1, 1] each

    def change(logits: Tensor, bias: Tensor, count: Tensor) -> Tensor:
        x, output = logits + bias, count & (SEEN - 1)
        x = torch.where(count > 0, torch.where(x > 0, x / repetition, x * repetition), x)
        return x - frequency * output - torch.where(output > 0, presence, 0.0)

    columns = tokens[:, None].expand(-1, logits.shape[1], -1)  # [B, n, m]
    same = (tokens[:, :, None] == tokens[:, None]).int()  # [B, m, m]
    more = (sees.float() @ same.float()).int()  # [B, n, m]: how often a node sees each of the tokens
    count = counts.gather(1, tokens)[:, None] + more
    of_nodes = change(logits.gather(2, columns), bias.gather(1, tokens)[:, None], count)
    x = change(logits, bias[:, None], counts[:, None]).scatter(2, columns, of_nodes)
    if mask is None:
        return x
    bit = torch.arange(x.shape[-1], device=x.device)
    allowed = mask[..., bit // 32] >> (bit % 32) & 1  # [B, n, V]
    return torch.where(allowed > 0, x, -torch.inf)


def logsumexp_reference(logits: Tensor) -> Tensor:
    """Logarithm of the sum of the exponentials of every row, float64 [..., 1]: the same bits in any order."""
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    scale = torch.full_like(logits[..., :1], math.log2(math.e))
    mass = masses_reference(logits, scale).sum(dim=-1, keepdim=True)
    return logits.amax(dim=-1, keepdim=True).double() + log_reference(mass.double() * 2.0**-42)
