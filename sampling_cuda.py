"""sampling_cuda.py: the bodies of the operations that pick tokens for NVIDIA GPUs, in Triton.

`kernels_cuda.register` registers them, too. To run them without a GPU: python -m pytest tests/test_cuda.py

The one idea is that of sampling.cpp: nothing is sorted, and noise is made where it can matter. Rows of logits
are blocks of 64. One kernel finds the largest logit of each block. In another, a program for each row holds
these at once, with bounds of the blocks' noise, and looks into blocks in the order of what they can come to,
until none can win any more. It reads the row's settings on the device, so that a CUDA graph can hold it.

The bits are those of reference.py: probabilities are whole numbers, divisions are those of IEEE, and products
are never fused with sums, which tests/compile_cuda.py looks at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(64)  # tokens that share a hash
TILE = tl.constexpr(64)  # blocks that a step looks at
END = tl.constexpr(2**31 - 1)  # behind all tokens
LEAST = tl.constexpr(-0x7F800001)  # the key of minus infinity: see `turn`
NOTHING = tl.constexpr(float("-inf"))
EXACT = {"enable_fp_fusion": False}  # every product and every sum is rounded

# --------------------------------------------------------------------------------------------------
# Noise
# --------------------------------------------------------------------------------------------------


@triton.jit
def mix(x):
    """`reference.mix` in 32 bits, which wrap around by themselves."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, position):
    """The two keys of a position, uint32: what its noise depends on."""
    first = mix(mix((seed & 0xFFFFFFFF).to(tl.uint32)) ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    second = mix(first ^ tl.full((), 0x5BF03635, tl.uint32))
    a = mix((position & 0xFFFFFFFF).to(tl.uint32) + first)
    return a, mix(a ^ second)


@triton.jit
def log_of(x):
    """`reference.log_reference` of float64 numbers."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    rest = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    z = (rest - 1) / (rest + 1)
    y = z * z
    series = 1 / 7 + y * (1 / 9 + y * (1 / 11 + y * (1 / 13)))
    series = 1 + y * (1 / 3 + y * (1 / 5 + y * series))
    return exponent.to(tl.float64) * 0.6931471805599453 + 2 * z * series


@triton.jit
def exponential(bits):
    return -log_of(1 - (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10)  # 2^-32


@triton.jit
def block_bits(block, a, b):
    """The hashes of blocks."""
    c, d = mix(a ^ tl.full((), 0x2C1B3C6D, tl.uint32)), mix(b ^ tl.full((), 0x297A2D39, tl.uint32))
    return mix(mix(block.to(tl.uint32) + c) ^ d)


@triton.jit
def noise_of(block, token, a, b):
    """Gumbel noise of the tokens [., 64] of blocks [., 1], or of those [1, 64] of one block: float32."""
    bits = block_bits(block, a, b)
    winner = (mix(bits + tl.full((), 0x9E3779B9, tl.uint32)) % BLOCK).to(tl.int32) + block * BLOCK
    earliest = exponential(bits) / BLOCK
    later = earliest + exponential(mix(mix(token.to(tl.uint32) + a) ^ b))
    return -log_of(tl.where(token == winner, earliest, later)).to(tl.float32)


@triton.jit
def most_noise(block, a, b):
    """At least the noise of all tokens of blocks: the bits of a float are a chord of the logarithm, which is
    concave. What is added covers all roundings."""
    time = (block_bits(block, a, b).to(tl.float32) + 0.5) * 3.637978807091713e-12  # 2^-32 / 64
    bits = time.to(tl.int32, bitcast=True).to(tl.float32)
    return (127.001 - bits * 1.1920928955078125e-07) * 0.69314724  # 2^-23


@triton.jit(do_not_specialize=["n"])
def gumbel_kernel(seed, positions, out, n, size, TOKENS: tl.constexpr):
    """Grid: rows, parts of TOKENS tokens."""
    line = tl.program_id(0).to(tl.int64)
    a, b = noise_key(tl.load(seed + line // n), tl.load(positions + line))
    block = tl.program_id(1) * (TOKENS // BLOCK) + tl.arange(0, TOKENS // BLOCK)[:, None]
    token = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + line * size + token, noise_of(block, token, a, b), mask=token < size)


def gumbel(seed: Tensor, positions: Tensor, size: int) -> Tensor:
    """See `kernels.gumbel`: the same bits."""
    out = torch.empty(*positions.shape, size, dtype=torch.float32, device=positions.device)
    grid, n = (positions.numel(), triton.cdiv(size, 1024)), positions.shape[1]
    gumbel_kernel[grid](seed.contiguous(), positions.contiguous(), out, n, size, TOKENS=1024, **EXACT)
    return out


# --------------------------------------------------------------------------------------------------
# A row of logits. A place in its order is a value and a token: larger values come first, then lower tokens.
# --------------------------------------------------------------------------------------------------


@triton.jit
def load_blocks(row, size, block, used):
    """Logits [., 64] and tokens of the blocks [., 1], or of one, that are `used`; what is NaN or is not there
    is minus infinity."""
    token = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(row + token, mask=used & (token < size), other=NOTHING)
    return tl.where(x == x, x, NOTHING), token


@triton.jit
def up_to(x, token, value, last):
    """Which of these stand up to the place (value, last)?"""
    return (x > value) | ((x == value) & (token <= last))


@triton.jit
def turn(bits):
    """The bits of floats, as int32, to keys in the order of the floats, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["n"])
def tops_kernel(logits, tops, n, size, stride_b, stride_n):
    """The largest of every block. Grid: rows, tiles of blocks."""
    line, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(size, BLOCK)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row = logits + line // n * stride_b + line % n * stride_n
    x, _ = load_blocks(row, size, block[:, None], block[:, None] < blocks)
    tl.store(tops + line * blocks + block, tl.max(x, axis=1), mask=block < blocks)


@triton.jit
def count_up_to(row, size, tops, blocks, value, last):
    """How many tokens stand up to a place, whose value is finite?"""
    found = tl.zeros([TILE], tl.int32)
    for first in range(0, blocks, TILE):
        block = first + tl.arange(0, TILE)
        top = tl.load(tops + block, mask=block < blocks, other=NOTHING)
        used = top >= value
        if tl.max(used.to(tl.int32), axis=0) > 0:
            x, token = load_blocks(row, size, block[:, None], used[:, None])
            found += tl.sum(up_to(x, token, value, last).to(tl.int32), axis=1)
    return tl.sum(found, axis=0)


@triton.jit
def kth(row, size, tops, blocks, top, k):
    """The place up to which k tokens stand, by bisection of the values and, of equal ones, of the tokens. It
    begins with the k-th largest of the blocks' largest; if there are fewer blocks, with minus infinity."""
    low, key = tl.full((), LEAST, tl.int64), turn((top + 0.0).to(tl.int32, bitcast=True))  # no -0
    for of_tokens in tl.static_range(2):
        high, count = tl.max(key, axis=0).to(tl.int64) + 1, 0
        while (low + 1 < high) & (count != k):
            middle = ((low + high) >> 1).to(tl.int32)
            if of_tokens:
                value = turn(middle).to(tl.float32, bitcast=True)
                count = count_up_to(row, size, tops, blocks, value, END)
            else:
                count = tl.sum((key >= middle).to(tl.int32), axis=0)
            low, high = tl.where(count >= k, middle, low), tl.where(count >= k, high, middle)
    value = turn(low.to(tl.int32)).to(tl.float32, bitcast=True)
    equal = (count != k) & (value > NOTHING)  # of tokens with minus infinity none is picked
    before, last = tl.full((), -1, tl.int32), size - 1
    while equal & (before + 1 < last):
        middle = (before + last) >> 1
        count = count_up_to(row, size, tops, blocks, value, middle)
        before, last = tl.where(count >= k, before, middle), tl.where(count >= k, middle, last)
    return value, tl.where(equal, last, END)


@triton.jit
def power_of_two(t):
    """`reference.power_of_two`, int32."""
    t = tl.where(t > -63.0, t, -63.0)
    whole = -t.to(tl.int32)
    f = t + whole.to(tl.float32)
    p = (f * 0.0009448955534026027 + 0.009205777198076248) * f + 0.05529733747243881
    p = (p * f + 0.2401801347732544) * f + 0.6931437253952026
    return whole, ((p * f + 1.0) * 16777216.0).to(tl.int32)  # 2^24


@triton.jit
def masses(row, size, tops, blocks, most, scale, value, last, ahead, before, least):
    """Sums of `reference.masses_reference`, int64, up to the places (value, last) and (ahead, before), over
    the blocks that have a logit of at least `least`."""
    one, other = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64)
    for first in range(0, blocks, TILE):
        block = first + tl.arange(0, TILE)
        top = tl.load(tops + block, mask=block < blocks, other=NOTHING)
        level, _ = power_of_two((top - most) * scale)
        used = (level <= 42) & (top >= least)
        if tl.max(used.to(tl.int32), axis=0) > 0:
            x, token = load_blocks(row, size, block[:, None], used[:, None])
            whole, part = power_of_two((x - most) * scale)
            drop = tl.maximum(level - 18, 0) - level
            weight = part >> tl.minimum(whole + drop[:, None], 31)
            left = tl.maximum(18 - level, 0)
            mass = tl.sum(tl.where(up_to(x, token, value, last), weight, 0), axis=1)
            one += tl.where(used, mass.to(tl.int64) << left, 0)
            mass = tl.sum(tl.where(up_to(x, token, ahead, before), weight, 0), axis=1)
            other += tl.where(used, mass.to(tl.int64) << left, 0)
    return tl.sum(one, axis=0), tl.sum(other, axis=0)


@triton.jit
def in_nucleus(row, size, tops, blocks, most, scale, share, value, last, ahead, before):
    """1 if tokens up to (ahead, before) hold less than a share of those up to (value, last), else 0. Most
    often, those in the same blocks hold enough to tell."""
    least, inside, tries = ahead, tl.full((), 0, tl.int32), 0
    while (inside == 0) & (tries < 2):
        whole, part = masses(row, size, tops, blocks, most, scale, value, last, ahead, before, least)
        less = (part == 0) | (part.to(tl.float64) < share * whole.to(tl.float64))
        least, inside, tries = tl.full((), NOTHING, tl.float32), less.to(tl.int32), tries + 1
    return inside


@triton.jit(do_not_specialize=["n"])
def logsumexp_kernel(logits, tops, out, n, size, stride_b, stride_n, ROOM: tl.constexpr):
    """A program for each row, with ROOM for the largest of all blocks."""
    line, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(size, BLOCK)
    row = logits + line // n * stride_b + line % n * stride_n
    tops += line * blocks
    block, scale = tl.arange(0, ROOM), tl.full((), 1.4426950408889634, tl.float32)  # log2(e)
    most = tl.max(tl.load(tops + block, mask=block < blocks, other=NOTHING), axis=0)
    mass, _ = masses(row, size, tops, blocks, most, scale, NOTHING, END, NOTHING, END, NOTHING)
    tl.store(out + line, most.to(tl.float64) + log_of(mass.to(tl.float64) * 2.2737367544323206e-13))  # 2^-42


@triton.jit
def sample(row, size, top, block, likely, temperature, a, b, value, last):
    """The token with the most logit + temperature * noise among those up to a place. top, block: [ROOM]."""
    bound = tl.where(top >= value, top + temperature * most_noise(block, a, b), NOTHING)
    best, token = tl.full((), NOTHING, tl.float32), likely
    reach, b_best = tl.max(bound, axis=0, return_indices=True)
    while (reach >= best) & (reach > NOTHING):
        x, t = load_blocks(row, size, b_best, b_best * BLOCK < size)
        total = tl.where(up_to(x, t, value, last), x + temperature * noise_of(b_best, t, a, b), NOTHING)
        most = tl.max(total)
        first = tl.min(tl.where((total == most) & (t < size), t, END))
        better = (most > best) | ((most == best) & (first < token))
        best, token = tl.where(better, most, best), tl.where(better, first, token)
        bound = tl.where(block == b_best, NOTHING, bound)
        reach, b_best = tl.max(bound, axis=0, return_indices=True)
    return token


@triton.jit
def draw(row, size, tops, blocks, top, block, most, likely, a, b, rules):
    """The pick of a row that has a temperature. `rules`: the five settings of `kernels.pick`."""
    temperature, scale = tl.load(rules).to(tl.float32), tl.load(rules + 1).to(tl.float32)
    share, gap = tl.load(rules + 3), tl.load(rules + 4).to(tl.float32)
    k = tl.minimum(tl.load(rules + 2), END).to(tl.int32)
    value, last = tl.where(gap > NOTHING, most + gap, NOTHING), tl.full((), END, tl.int32)  # what min_p keeps
    if (k > 0) & (k < size):
        x, t = kth(row, size, tops, blocks, top, k)
        value, last = tl.maximum(x, value), tl.where(x >= value, t, last)
    ahead, before, token, inside = value, last, likely, 0
    while inside == 0:  # the winner among those ahead of the last one
        token = sample(row, size, top, block, likely, temperature, a, b, ahead, before)
        ahead, before, inside = tl.load(row + token), token - 1, 1
        if share < 1:
            inside = in_nucleus(row, size, tops, blocks, most, scale, share, value, last, ahead, before)
    return token


@triton.jit(do_not_specialize=["n"])
def pick_kernel(logits, tops, seed, positions, rules, out, n, size, stride_b, stride_n, ROOM: tl.constexpr):
    """A program for each row, with ROOM for the largest of all blocks."""
    line, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(size, BLOCK)
    row = logits + line // n * stride_b + line % n * stride_n
    tops, rules = tops + line * blocks, rules + line // n * 5
    block = tl.arange(0, ROOM)
    top = tl.load(tops + block, mask=block < blocks, other=NOTHING)
    most, first = tl.max(top, axis=0, return_indices=True)
    x, t = load_blocks(row, size, first, first < blocks)
    token = tl.min(tl.where(x == most, t, END))
    if (tl.load(rules) != 0) & (most > NOTHING):
        a, b = noise_key(tl.load(seed + line // n), tl.load(positions + line))
        token = draw(row, size, tops, blocks, top, block, most, token, a, b, rules)
    tl.store(out + line, token.to(tl.int64))


def find_tops(logits: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], dict[str, int]]:
    """The largest of every block [B n, blocks], the rows, their numbers for kernels, and launch options."""
    if logits.shape[-1] == 1:  # Triton 3.6 breaks down where a size is 1
        logits = F.pad(logits, (0, 1), value=-torch.inf)
    rows = logits if logits.stride(-1) == 1 else logits.contiguous()
    (batch, n, size), blocks = rows.shape, triton.cdiv(rows.shape[-1], BLOCK.value)
    tops = torch.empty(batch * n, blocks, dtype=torch.float32, device=rows.device)
    shape = (n, size, *rows.stride()[:2])
    tops_kernel[(batch * n, triton.cdiv(blocks, TILE.value))](rows, tops, *shape)
    return tops, rows, shape, {"ROOM": max(triton.next_power_of_2(blocks), 64), "num_warps": 8}


def pick(logits: Tensor, positions: Tensor, seed: Tensor, settings: Tensor) -> Tensor:
    """See `kernels.pick`: the same tokens."""
    tops, rows, shape, options = find_tops(logits)
    out = torch.empty_like(positions, memory_format=torch.contiguous_format)
    given = (rows, tops, *(t.contiguous() for t in (seed, positions, settings)))
    pick_kernel[(len(tops),)](*given, out, *shape, **options, **EXACT)
    return out


def logsumexp(logits: Tensor) -> Tensor:
    """See `kernels.logsumexp`: the same bits."""
    tops, rows, shape, options = find_tops(logits)
    out = torch.empty(*logits.shape[:-1], 1, dtype=torch.float64, device=logits.device)
    logsumexp_kernel[(len(tops),)](rows, tops, out, *shape, **options, **EXACT)
    return out


OPERATIONS = (pick, gumbel, logsumexp)
