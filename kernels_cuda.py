"""kernels_cuda.py: the bodies of `kernels.py` for NVIDIA GPUs, in Triton.

`kernels.load` imports this file where there is a GPU. It is one of its own, as kernels.cpp is, because Triton
is a compiler that machines without a GPU need not have. Every function here has the signature of its slow
twin in reference.py, called `..._reference` there. With TRITON_INTERPRET=1 it also takes tensors on the CPU,
so the tests run all of them without a GPU.

The one idea is that of the CPU bodies: row i of a result is the same bits however many rows ride along.
Whatever sums does so in an order that depends on the layer and on the positions, never on the number of rows:

- A linear multiplies with tensor cores from the first row on. Weights stand on the side of the instruction
  that is always full, rows on the other, which is 16 wide or more; so one row costs what sixteen do, and
  more rows change how wide the instruction is and not in which order it adds up. A kernel for few rows and
  another one for many would differ in the last bits.
- Inputs are split among programs, as a layer needs it to keep all of the GPU busy, and whichever program of
  an output comes last adds up the parts of all, in order.
- Attention goes over positions. Splits are ranges of them, and a node of a tree reads its ancestors, from
  wherever they lie, as if they stood behind the past in a row.

4-bit weights are words of 32 bits that hold 8 numbers, four pairs (`reference.pack_words`). A shift, a mask
and a subtraction make two bf16 numbers of a pair: nibbles become the last bits of 128 + q, exactly, less 136.
Hopper has no 4-bit arithmetic: with 8-bit or 4-bit activations nibbles become 8-bit integers, and what w4a4
saves there is nothing but activations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

import reference
import sampling_cuda

CHUNK = tl.constexpr(128)  # inputs that a step of a linear reads
PLANE = tl.constexpr(32)  # inputs in one pair of nibbles of all 16 words of a chunk

# --------------------------------------------------------------------------------------------------
# Linear. Tiles are [outputs, inputs] of the weight times [inputs, rows] of the activations.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """How a layer is cut up."""

    block_out: int  # outputs of a program, of up to 32 rows
    split: int  # programs that share the inputs of an output: sums depend on it, so it must not on the rows
    warps: int
    stages: int  # steps whose weights are on their way at a time


def tiles(out_features: int, in_features: int, bits: int) -> Tiles:
    """As many programs as keep some 130 multiprocessors reading, each with four steps or more to do."""
    block_out, split, chunks = 64, 1, triton.cdiv(in_features, CHUNK.value)
    while triton.cdiv(out_features, block_out) * split < 512 and split < 8 and chunks >= 8 * split:
        split *= 2
    return Tiles(block_out, split, warps=4, stages=4 if bits == 4 else 3)


@triton.jit
def nibbles_as_bf16(words, p: tl.constexpr):
    """Pair p of every word: int32 [outputs, 16] -> bf16 [outputs, 32], the numbers 0 to 15 minus 8."""
    both = ((words >> (4 * p)) & 0x000F000F) | 0x43004300  # 128 + q, twice
    low = both.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], 32) - tl.full((), 136.0, tl.bfloat16)


@triton.jit
def nibbles_as_int8(words, p: tl.constexpr):
    """The same as int8. 0xF8 is -8; what is carried out of a byte is cut off."""
    both = ((words >> (4 * p)) & 0x000F000F) + 0x00F800F8
    low, high = both.to(tl.int8), (both >> 16).to(tl.int8)
    return tl.join(low, high).reshape(words.shape[0], 32)


@triton.jit
def load_activations(x, row, first, inputs, COUNT: tl.constexpr, RAGGED: tl.constexpr):
    """[COUNT, rows] from input `first` on; zeros beyond the last, which only RAGGED layers have."""
    k = first + tl.arange(0, COUNT)
    place = x + row[None, :] * inputs + k[:, None]
    return tl.load(place, mask=k[:, None] < inputs, other=0) if RAGGED else tl.load(place)


@triton.jit
def group_of(k, inputs, GROUP: tl.constexpr):
    """The group of an input; of one beyond the last, that of the last."""
    return tl.minimum(k, inputs - 1) // GROUP


@triton.jit
def multiply_4bit(
    x, words, scale, zeros, group_scales, row, o, c, out, inputs, acc,
    GROUP: tl.constexpr, ACTIVATIONS: tl.constexpr, RAGGED: tl.constexpr,
    BEGIN: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """acc + a group's share of a chunk: its pairs BEGIN .. BEGIN + PLANES - 1, of one scale [outputs]."""
    g = group_of(c * CHUNK + BEGIN * PLANE, inputs, GROUP)
    offset = tl.full(scale.shape, 0.0, tl.float32)
    if zeros is not None:
        offset = tl.load(zeros + g * out + o).to(tl.float32) - 8
    part = tl.zeros(acc.shape, tl.float32 if ACTIVATIONS == 16 else tl.int32)
    total = tl.zeros([acc.shape[1]], tl.int32)
    for p in tl.static_range(BEGIN, BEGIN + PLANES):
        xp = load_activations(x, row, c * CHUNK + p * PLANE, inputs, PLANE, RAGGED)
        if ACTIVATIONS == 16:
            w = nibbles_as_bf16(words, p)
            if zeros is not None:
                w = (w.to(tl.float32) - offset[:, None]).to(tl.bfloat16)
            part = tl.dot(w, xp, part)
        else:
            part = tl.dot(nibbles_as_int8(words, p), xp, part, out_dtype=tl.int32)
            if zeros is not None:
                total += tl.sum(xp.to(tl.int32), axis=0)  # of integers: exact, in any order
    value = part.to(tl.float32)
    if ACTIVATIONS != 16 and zeros is not None:
        value -= offset[:, None] * total[None, :].to(tl.float32)
    if ACTIVATIONS == 4:
        value *= tl.load(group_scales + row * (inputs // GROUP) + g)[None, :]
    return acc + scale.to(tl.float32)[:, None] * value


@triton.jit
def sum_inputs(
    x, weight, scales, zeros, x_scales, row, o, first, last, out, inputs,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, ACTIVATIONS: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Chunks first .. last - 1 of the inputs -> [BLOCK_OUT, BLOCK_ROWS], float32; int8 by int8: int32.

    GROUP: inputs that share a scale; 0 where an 8-bit weight has one for a whole row, or a bf16 one has none.
    """
    exact: tl.constexpr = BITS == 8 and ACTIVATIONS == 8 and GROUP == 0
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.int32 if exact else tl.float32)
    if BITS == 4:
        coming = tl.load(scales + group_of(first * CHUNK, inputs, GROUP) * out + o)
    for c in range(first, last):
        if BITS == 4:
            row_of_words = weight + o.to(tl.int64)[:, None] * (tl.cdiv(inputs, CHUNK) * 16)
            words = tl.load(row_of_words + c * 16 + tl.arange(0, 16)[None, :])
            for begin in tl.static_range(0, 4, PLANES):
                # A scale is loaded a step before it is needed. What is multiplied, the compiler loads early.
                scale, after = coming, group_of(c * CHUNK + (begin + PLANES) * PLANE, inputs, GROUP)
                coming = tl.load(scales + after * out + o)
                acc = multiply_4bit(
                    x, words, scale, zeros, x_scales, row, o, c, out, inputs, acc,
                    GROUP, ACTIVATIONS, RAGGED, begin, PLANES,
                )  # fmt: skip
        elif BITS == 8 and GROUP > 0:
            for begin in tl.static_range(0, 4, PLANES):
                first_input = c * CHUNK + begin * PLANE
                k = first_input + tl.arange(0, PLANES * PLANE)
                place = weight + o.to(tl.int64)[:, None] * inputs + k[None, :]
                w = tl.load(place, mask=k[None, :] < inputs, other=0) if RAGGED else tl.load(place)
                xc = load_activations(x, row, first_input, inputs, PLANES * PLANE, RAGGED)
                if ACTIVATIONS == 8:
                    part = tl.dot(w, xc, out_dtype=tl.int32).to(tl.float32)
                else:
                    part = tl.dot(w.to(tl.bfloat16), xc)
                # These weights lie in rows, and so do their scales: [out, groups].
                scale = tl.load(scales + o * (inputs // GROUP) + group_of(first_input, inputs, GROUP))
                acc += scale.to(tl.float32)[:, None] * part
        else:
            k = c * CHUNK + tl.arange(0, CHUNK)
            place = weight + o.to(tl.int64)[:, None] * inputs + k[None, :]
            w = tl.load(place, mask=k[None, :] < inputs, other=0) if RAGGED else tl.load(place)
            xc = load_activations(x, row, c * CHUNK, inputs, CHUNK, RAGGED)
            if exact:  # noqa: SIM108
                acc = tl.dot(w, xc, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(w.to(tl.bfloat16), xc, acc)
    return acc


@triton.jit
def finish(
    acc, scales, x_scales, bias, residual, y, r, o, n, out,
    BITS: tl.constexpr, GROUP: tl.constexpr, ACTIVATIONS: tl.constexpr,
):  # fmt: skip
    """From the sums of all inputs to what is asked for, rounded where the reference rounds."""
    inside = (o[:, None] < out) & (r[None, :] < n)
    if BITS == 8 and GROUP == 0:
        acc *= tl.load(scales + o, mask=o < out, other=0).to(tl.float32)[:, None]
    if ACTIVATIONS == 8:
        acc *= tl.load(x_scales + r, mask=r < n, other=0)[None, :]
    if bias is not None:
        acc += tl.load(bias + o, mask=o < out, other=0).to(tl.float32)[:, None]
    place = r.to(tl.int64)[None, :] * out + o[:, None]
    value = acc.to(y.dtype.element_ty)
    if residual is not None:
        before = tl.load(residual + place, mask=inside, other=0).to(tl.float32)
        value = (before + value.to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + place, value, mask=inside)


@triton.jit(do_not_specialize=["n"])  # one and the same code for all numbers of rows
def linear_kernel(
    x, weight, scales, zeros, x_scales, bias, residual, y, partial, arrived, n, out, inputs,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, ACTIVATIONS: tl.constexpr,
    RAGGED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of outputs, splits of the inputs, blocks of rows."""
    block, split, rows = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, j = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_ROWS)
    o, r = block * BLOCK_OUT + i, rows * BLOCK_ROWS + j
    chunks = tl.cdiv(inputs, CHUNK)
    share = tl.cdiv(chunks, SPLIT)
    first, last = split * share, tl.minimum((split + 1) * share, chunks)
    # What lies beyond the last output or row computes the last one once more.
    row, output = tl.minimum(r, n - 1), tl.minimum(o, out - 1)
    acc = sum_inputs(
        x, weight, scales, zeros, x_scales, row, output, first, last, out, inputs,
        BITS, GROUP, PLANES, ACTIVATIONS, RAGGED, BLOCK_OUT, BLOCK_ROWS,
    ).to(tl.float32)  # fmt: skip
    if SPLIT == 1:
        finish(acc, scales, x_scales, bias, residual, y, r, o, n, out, BITS, GROUP, ACTIVATIONS)
    else:
        tile, size = rows * tl.num_programs(0) + block, BLOCK_OUT * BLOCK_ROWS
        mine = partial + tile.to(tl.int64) * SPLIT * size + j[None, :] * BLOCK_OUT + i[:, None]
        used = r[None, :] < n
        tl.store(mine + split * size, acc, mask=used)
        tl.debug_barrier()  # all threads have stored, and the atomic publishes it
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
            for s in tl.range(0, SPLIT, loop_unroll_factor=2):
                total += tl.load(mine + s * size, mask=used, other=0, cache_modifier=".cg")
            finish(total, scales, x_scales, bias, residual, y, r, o, n, out, BITS, GROUP, ACTIVATIONS)
            tl.store(arrived + tile, 0)  # as the next launch wants it


COUNTERS = 1 << 18  # blocks of outputs times blocks of rows, at most


@functools.cache
def counters(device: torch.device) -> Tensor:
    """Zeros, for programs to count themselves with. Every launch leaves zeros behind, and launches follow one
    another, so one tensor serves all of a device."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def multiply(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    x_scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out: int,
    activation_bits: int,
    float32_out: bool,
    plan: Tiles | None = None,
) -> Tensor:
    """residual + x W^T + bias of prepared x [n, in], bf16 or int8 with `x_scales` -> [n, out]."""
    (n, inputs), bits = x.shape, {torch.int32: 4, torch.int8: 8, torch.bfloat16: 16}[weight.dtype]
    plan = plan or tiles(out, inputs, bits)
    y = torch.empty(n, out, dtype=torch.float32 if float32_out else torch.bfloat16, device=x.device)
    # Rows and outputs of a program decide how often each is read, and no bits.
    block_rows = min(max(triton.next_power_of_2(n), 16), 64)
    groups = count_groups(scales, bits)
    group = inputs // groups if bits == 4 or groups > 1 else 0
    planes = 1 if group % CHUNK.value else 4  # that share a scale
    larger = 2 if block_rows == 64 and planes == 4 else 1
    grid = (triton.cdiv(out, larger * plan.block_out), plan.split, triton.cdiv(n, block_rows))
    partial = arrived = None
    if plan.split > 1:
        size = math.prod(grid) * larger * plan.block_out * block_rows
        partial, arrived = torch.empty(size, dtype=torch.float32, device=x.device), counters(x.device)
        if grid[0] * grid[2] > COUNTERS:
            raise ValueError(f"linear: {n} rows are too many at a time")
    linear_kernel[grid](
        x, weight, scales, zeros, x_scales, bias, residual, y, partial, arrived, n, out, inputs,
        BITS=bits, GROUP=group, PLANES=planes, ACTIVATIONS=activation_bits,
        RAGGED=inputs % CHUNK.value != 0, SPLIT=plan.split, BLOCK_OUT=larger * plan.block_out,
        BLOCK_ROWS=block_rows, num_warps=larger * plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return y


def count_groups(scales: Tensor | None, bits: int) -> int:
    """Scales of a row: words have theirs as [groups, out], rows as [out, groups]."""
    return 1 if scales is None else scales.shape[0 if bits == 4 else 1]


def linear(
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
    plan: Tiles | None = None,
) -> Tensor:
    """See `kernels.linear`. Weights are int32 words of `reference.pack_words` with scales [groups, out], int8
    rows with scales [out, groups], or bf16 rows."""
    known = weight.dtype in (torch.int32, torch.int8, torch.bfloat16)
    groups = count_groups(scales, 8) if weight.dtype == torch.int8 else 1
    narrow = groups > 1 and weight.shape[1] // groups % PLANE.value
    if x.dtype != torch.bfloat16 or not known or narrow:
        return reference.linear_reference(
            x, weight, scales, zeros, bias, residual, norm, eps, gated, rotation, power, stride, permutation,
            out_features, activation_bits, float32_out,
        )  # fmt: skip
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # [B n, in or 2 in]
    if rotation is not None:
        if norm is not None or gated:
            rows, _ = prepare(rows, norm, eps, gated)
        rows, norm, gated = rotate(rows, rotation, power, stride, torch.float32), None, False
    x_scales = None
    if norm is not None or gated or rotation is not None or permutation is not None or activation_bits < 16:
        groups = scales.shape[0] if activation_bits == 4 else 1  # of 4-bit activations, which meet words
        rows, x_scales = prepare(rows, norm, eps, gated, permutation, activation_bits, groups)
    if residual is not None:
        residual = residual.reshape(-1, out_features).contiguous()
    return multiply(
        rows, weight, scales, zeros, x_scales, bias, residual, out_features, activation_bits,
        float32_out, plan,
    ).unflatten(0, x.shape[:-1])  # fmt: skip


# --------------------------------------------------------------------------------------------------
# What stands before a linear: norm or SwiGLU, another order, rounding of the activations
# --------------------------------------------------------------------------------------------------


@triton.jit
def prepared(x, norm, order, i, valid, rms, size, GATED: tl.constexpr):
    """Inputs i of a row, where they are `valid`: what is to be multiplied or rounded, as float32."""
    if order is not None:
        i = tl.load(order + i, mask=valid, other=0)
    v = tl.load(x + i, mask=valid, other=0).to(tl.float32)
    dtype = x.dtype.element_ty
    if GATED:
        up = tl.load(x + size + i, mask=valid, other=0).to(tl.float32)
        v = (v / (1 + tl.exp(-v)) * up).to(dtype).to(tl.float32)
    if norm is not None:
        weight = tl.load(norm + i, mask=valid, other=0).to(tl.float32)
        v = ((v * rms).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    return v


@triton.jit
def inverse_rms(x, size, eps, BLOCK: tl.constexpr):
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        v = tl.load(x + i, mask=i < size, other=0).to(tl.float32)
        squares += v * v
    return 1 / tl.sqrt(tl.sum(squares, axis=0) / size + eps)


@triton.jit
def to_integers(v, absmax, LIMIT: tl.constexpr):
    """Rounded to nearest, ties to even, by a sum with 1.5 * 2^23 that leaves no room for a fraction."""
    factor = tl.where(absmax < 1e-30, 0.0, tl.div_rn(LIMIT, tl.maximum(absmax, 1e-30)))
    return ((v * factor + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def prepare_kernel(
    x, norm, order, y, y_scales, width, size, eps,
    GATED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """A program for each row. CELLS groups of GROUP numbers, which CELL has room for, at a time."""
    row = tl.program_id(0).to(tl.int64)
    x, y = x + row * width, y + row * size
    groups = tl.cdiv(size, GROUP)
    rms = 0.0
    if norm is not None:
        rms = inverse_rms(x, size, eps, CELL * CELLS)
    cell, lane = tl.arange(0, CELLS)[:, None], tl.arange(0, CELL)[None, :]
    absmax = tl.zeros([CELLS, 1], tl.float32)
    if BITS == 8:  # one scale for the whole row
        for g in range(0, groups, CELLS):
            i = (g + cell) * GROUP + lane
            v = prepared(x, norm, order, i, (lane < GROUP) & (i < size), rms, size, GATED)
            absmax = tl.maximum(absmax, tl.max(tl.abs(v), axis=1, keep_dims=True))
        absmax = tl.max(absmax, axis=0, keep_dims=True)
        most = tl.max(tl.max(absmax, axis=1), axis=0)
        tl.store(y_scales + row, tl.where(most < 1e-30, 0.0, tl.div_rn(most, 127.0)))
    for g in range(0, groups, CELLS):
        i = (g + cell) * GROUP + lane
        valid = (lane < GROUP) & (i < size)
        v = prepared(x, norm, order, i, valid, rms, size, GATED)
        if BITS == 4:
            absmax = tl.max(tl.abs(v), axis=1, keep_dims=True)  # [CELLS, 1]
            scale = tl.where(absmax < 1e-30, 0.0, tl.div_rn(absmax, 7.0))
            tl.store(y_scales + row * groups + g + cell, scale, mask=g + cell < groups)
        if BITS == 16:
            tl.store(y + i, v.to(y.dtype.element_ty), mask=valid)
        else:
            tl.store(y + i, to_integers(v, absmax, 127.0 if BITS == 8 else 7.0), mask=valid)


def prepare(
    x: Tensor,
    norm: Tensor | None,
    eps: float = 0.0,
    gated: bool = False,
    permutation: Tensor | None = None,
    bits: int = 16,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """x [n, in], or [n, 2 in] if `gated` -> bf16 [n, in]; or int8 and float32 scales [n], or [n * groups].

    The twin of `reference.prepare_reference` without a rotation and of `reference.quantize_activations`.
    """
    n, size = len(x), x.shape[1] // (2 if gated else 1)
    y = torch.empty(n, size, dtype=torch.bfloat16 if bits == 16 else torch.int8, device=x.device)
    count = {16: 0, 8: n, 4: n * groups}[bits]
    scales = torch.empty(count, dtype=torch.float32, device=x.device) if count else None
    group = size // groups if bits == 4 else 1024
    cell = triton.next_power_of_2(group)
    cells = triton.next_power_of_2(triton.cdiv(min(size, 8192), cell))  # in flight at a time
    prepare_kernel[(n,)](
        x, norm, permutation, y, scales, x.shape[1], size, eps,
        GATED=gated, BITS=bits, GROUP=group, CELL=cell, CELLS=cells, num_warps=8, **sampling_cuda.EXACT,
    )  # fmt: skip
    return y, scales


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype != torch.bfloat16:
        return reference.rms_norm_reference(x, weight, eps)
    return prepare(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps)[0].view(x.shape)


# --------------------------------------------------------------------------------------------------
# Rotations
# --------------------------------------------------------------------------------------------------


@triton.jit
def walsh_hadamard_kernel(x, y, factor, stride, POWER: tl.constexpr, STEPS: tl.constexpr):
    """A program for POWER numbers `stride` apart: sums and differences of those that lie half of them apart,
    then a quarter, and so on."""
    line, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = line * POWER * stride + tl.arange(0, POWER) * stride + s
    v = tl.load(x + place).to(tl.float32)
    for step in tl.static_range(STEPS):
        pairs = v.reshape(1 << step, 2, POWER >> (step + 1)).trans(0, 2, 1)
        a, b = tl.split(pairs)
        v = tl.join(a + b, a - b).trans(0, 2, 1).reshape(POWER)
    tl.store(y + place, (v * factor).to(y.dtype.element_ty))


@triton.jit
def small_matrix_kernel(
    x, matrix, y, factor, length, K: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr
):
    """y[., i, c] = factor * sum over j of matrix[i, j] x[., j, c]; x: [lines, K, length]."""
    line, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, ROOM)
    m = tl.load(matrix + i[:, None] * K + i[None, :], mask=(i[:, None] < K) & (i[None, :] < K), other=0)
    place = line * K * length + i[:, None] * length + c[None, :]
    valid = (i[:, None] < K) & (c[None, :] < length)
    v = tl.load(x + place, mask=valid, other=0)
    mixed = tl.dot(m.to(tl.float32), v, input_precision="ieee") * factor
    tl.store(y + place, mixed.to(y.dtype.element_ty), mask=valid)


def rotate(x: Tensor, matrix: Tensor, power: int, stride: int, dtype: torch.dtype | None = None) -> Tensor:
    """See `kernels.rotate`; the result has another dtype, if asked for."""
    if x.dtype == torch.float64:
        return reference.rotate_reference(x, matrix, power, stride)
    x, k = x.contiguous(), len(matrix)
    result = torch.empty_like(x, dtype=dtype)
    y = result if k == 1 else torch.empty_like(x, dtype=torch.float32)
    lines, factor = x.numel() // (power * stride), (k * power) ** -0.5
    walsh_hadamard_kernel[(lines, stride)](
        x, y, factor if k == 1 else 1.0, stride, POWER=power, STEPS=power.bit_length() - 1,
        num_warps=4 if power < 4096 else 8,
    )  # fmt: skip
    if k > 1:
        length, room = power * stride, max(triton.next_power_of_2(k), 16)
        grid = (lines // k, triton.cdiv(length, 64))
        small_matrix_kernel[grid](y, matrix.contiguous(), result, factor, length, K=k, ROOM=room, BLOCK=64)
    return result


# --------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------

POSITIONS = tl.constexpr(64)  # that a step reads
SPLIT_POSITIONS = tl.constexpr(256)  # that a program reads: its part of the sum
NODES = tl.constexpr(64)  # whose ancestors a step looks at
UNSEEN = tl.constexpr(-1e30)  # less than any product; not -inf, whose difference to itself is not 0


@triton.jit
def count_ancestors(ancestors, i, m):
    """Of queries, whose rows begin at i: how many nodes each sees; and are these the first ones, for all?"""
    count, last = tl.zeros(i.shape, tl.int32), tl.zeros(i.shape, tl.int32)
    for first in range(0, m, NODES):
        node = first + tl.arange(0, NODES)
        seen = tl.load(ancestors + i[:, None] + node[None, :], mask=node[None, :] < m, other=0).to(tl.int32)
        count += tl.sum(seen, axis=1)
        last = tl.maximum(last, tl.max(seen * (node[None, :] + 1), axis=1))
    return count, tl.max(last - count, axis=0) == 0


@triton.jit
def ancestors_at(ancestors, depth, m):
    """The nodes that one query sees at every `depth` [POSITIONS]; 0 where there is none."""
    found, above = tl.zeros(depth.shape, tl.int32), 0
    for first in range(0, m, NODES):
        node = first + tl.arange(0, NODES)
        seen = tl.load(ancestors + node, mask=node < m, other=0).to(tl.int32)
        rank = above + tl.cumsum(seen, axis=0) - 1
        here = (rank[None, :] == depth[:, None]) & (seen[None, :] > 0)
        found += tl.sum(tl.where(here, node[None, :], 0), axis=1)
        above += tl.sum(seen, axis=0)
    return found


@triton.jit
def slots_of(ancestors, p, past, m):
    """Where one query finds positions p: the past in its place, then its ancestors."""
    return tl.where(p < past, p, past + ancestors_at(ancestors, p - past, m))


@triton.jit
def load_slots(cache, slot, valid, d, G: tl.constexpr, D: tl.constexpr):
    """[POSITIONS, ROOM] of a text's keys or values of one head; zeros where there is nothing `valid`."""
    at = slot[:, None] * (G * D) + d[None, :]
    return tl.load(cache + at, mask=valid[:, None] & (d[None, :] < D), other=0)


@triton.jit
def absorb(s, p, count, top, share, scale, dtype: tl.constexpr):
    """Products [rows, POSITIONS] with positions p, of which rows see the first `count`; largest so far [rows]
    and sums of weights [rows, 16] -> these again, the weights, and a factor for earlier sums [rows, 1]."""
    s = tl.where(p[None, :] < count[:, None], s, UNSEEN)
    now = tl.maximum(top, tl.max(s, axis=1))
    weights = tl.exp2((s - now[:, None]) * scale).to(dtype)
    factor = tl.exp2((top - now) * scale)[:, None]
    ones = tl.full([POSITIONS, 16], 1.0, dtype)
    return now, tl.dot(weights, ones, share * factor, input_precision="tf32x3"), weights, factor


@triton.jit(do_not_specialize=["n", "m", "slots", "ancestors_b", "ancestors_n"])
def attention_kernel(
    q, keys, values, ancestors, length, sums, shares, tops, n, m, slots, scale, ancestors_b, ancestors_n,
    G: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Grid: texts times key heads, blocks of QUERIES, ranges of positions. A row is a query's head."""
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    block, split = tl.program_id(1), tl.program_id(2)
    past = tl.load(length + b).to(tl.int32)
    begin, end = split * SPLIT_POSITIONS, tl.minimum((split + 1) * SPLIT_POSITIONS, past + m)
    if begin < end:
        row, d = tl.arange(0, ROWS), tl.arange(0, ROOM)
        i = tl.minimum(block * QUERIES + row // HEADS, n - 1)  # the query of each row
        ancestors += b.to(tl.int64) * ancestors_b
        beyond, chains = count_ancestors(ancestors, i * ancestors_n, m)
        count = past + beyond  # positions that a row sees
        end = tl.minimum(end, tl.max(count, axis=0))
        place = ((b.to(tl.int64) * n + i) * G + g) * HEADS + row % HEADS  # [ROWS] of q [B, n, G, HEADS]
        query = tl.load(q + place[:, None] * D + d[None, :], mask=d[None, :] < D, other=0)
        text = (b.to(tl.int64) * slots * G + g) * D
        keys, values = keys + text, values + text
        dtype: tl.constexpr = values.dtype.element_ty
        top = tl.full([ROWS], UNSEEN, tl.float32)
        total, share = tl.zeros([ROWS, ROOM], tl.float32), tl.zeros([ROWS, 16], tl.float32)
        # As long as positions are slots, for all of these queries, a step is for all of them.
        straight = tl.where(chains, end, tl.minimum(end, past // POSITIONS * POSITIONS))
        for first in range(begin, straight, POSITIONS):
            p = first + tl.arange(0, POSITIONS)
            k = load_slots(keys, p, p < end, d, G, D)
            s = tl.dot(query, k.trans(), input_precision="tf32x3")
            top, share, weights, factor = absorb(s, p, count, top, share, scale, dtype)
            v = load_slots(values, p, p < end, d, G, D)
            total = tl.dot(weights, v, total * factor, input_precision="tf32x3")
        # Where a tree begins, every query has its own way to go.
        for first in range(tl.maximum(begin, straight), end, POSITIONS):
            p = first + tl.arange(0, POSITIONS)
            s = tl.full([ROWS, POSITIONS], UNSEEN, tl.float32)
            for j in range(QUERIES):
                its = ancestors + tl.minimum(block * QUERIES + j, n - 1) * ancestors_n
                k = load_slots(keys, slots_of(its, p, past, m), p < end, d, G, D)
                mine = (row // HEADS == j)[:, None]
                s = tl.where(mine, tl.dot(query, k.trans(), input_precision="tf32x3"), s)
            top, share, weights, factor = absorb(s, p, count, top, share, scale, dtype)
            before = total * factor
            for j in range(QUERIES):
                its = ancestors + tl.minimum(block * QUERIES + j, n - 1) * ancestors_n
                v = load_slots(values, slots_of(its, p, past, m), p < end, d, G, D)
                mine = (row // HEADS == j)[:, None]
                total = tl.where(mine, tl.dot(weights, v, before, input_precision="tf32x3"), total)
        mine = (row < QUERIES * HEADS) & (block * QUERIES + row // HEADS < n)
        place = place * tl.num_programs(2) + split
        tl.store(sums + place[:, None] * D + d[None, :], total, mask=mine[:, None] & (d[None, :] < D))
        tl.store(shares + place, tl.max(share, axis=1), mask=mine)  # all columns are the same
        tl.store(tops + place, top, mask=mine)


@triton.jit(do_not_specialize=["n", "m", "splits", "ancestors_b", "ancestors_n"])
def combine_kernel(
    sums, shares, tops, ancestors, length, out, n, m, heads, splits, scale, ancestors_b, ancestors_n,
    D: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """A program for a query's head: the parts of all ranges of positions that it sees, in their order."""
    line = tl.program_id(0).to(tl.int64)
    b, i = line // heads // n, line // heads % n
    beyond, _ = count_ancestors(ancestors + b * ancestors_b, i * ancestors_n + tl.arange(0, 1), m)
    d, count = tl.arange(0, ROOM), tl.load(length + b).to(tl.int32) + tl.sum(beyond, axis=0)
    top, share, total = UNSEEN + 0.0, 0.0, tl.zeros([ROOM], tl.float32)
    for split in tl.range(0, tl.cdiv(count, SPLIT_POSITIONS), loop_unroll_factor=4):
        place = line * splits + split
        its = tl.load(tops + place)
        now = tl.maximum(top, its)
        old, new = tl.exp2((top - now) * scale), tl.exp2((its - now) * scale)
        part = tl.load(sums + place * D + d, mask=d < D, other=0)
        total, share = total * old + part * new, share * old + tl.load(shares + place) * new
        top = now
    tl.store(out + line * D + d, (total / share).to(out.dtype.element_ty), mask=d < D)


def attention(q: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, length: Tensor) -> Tensor:
    """See `kernels.attention`. Lengths stay on the GPU: programs for positions of no text end at once."""
    q, (batch, n, heads, size), (_, slots, groups, _) = q.contiguous(), q.shape, keys.shape
    seen = ancestors if ancestors.stride(-1) == 1 else ancestors.contiguous()
    strides, m, per_group = seen.stride()[:2], seen.shape[-1], heads // groups
    rows = max(16, triton.next_power_of_2(per_group))
    queries, splits = rows // per_group, triton.cdiv(slots, SPLIT_POSITIONS.value)
    sums = torch.empty(batch * n * heads * splits, size, dtype=torch.float32, device=q.device)
    shares, tops = sums.new_empty(2, len(sums))
    scale, room = size**-0.5 * 1.4426950408889634, max(triton.next_power_of_2(size), 16)  # exp2, not exp
    seen = seen.view(torch.uint8)
    attention_kernel[(batch * groups, triton.cdiv(n, queries), splits)](
        q, keys, values, seen, length, sums, shares, tops, n, m, slots, scale, *strides,
        G=groups, HEADS=per_group, QUERIES=queries, ROWS=rows, D=size, ROOM=room, num_warps=4,
        num_stages=4 if q.dtype == torch.bfloat16 else 2,
    )  # fmt: skip
    out = torch.empty_like(q)
    combine_kernel[(batch * n * heads,)](
        sums, shares, tops, seen, length, out, n, m, heads, splits, scale, *strides,
        D=size, ROOM=room, num_warps=1,
    )  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------
# The others
# --------------------------------------------------------------------------------------------------

HEADS_AT_ONCE = tl.constexpr(8)  # of a token, that a program takes


@triton.jit
def turn_heads(x, y, line, h, d, c, s, heads, stride_h, HALF: tl.constexpr):
    """Heads h [HEADS_AT_ONCE, 1] of the token at x, to a dense y. c, s: [1, ROOM] of the token's angles."""
    valid, place = (h < heads) & (d < HALF), y + (line * heads + h) * (2 * HALF) + d
    a = tl.load(x + h * stride_h + d, mask=valid, other=0).to(tl.float32)
    b = tl.load(x + h * stride_h + d + HALF, mask=valid, other=0).to(tl.float32)
    tl.store(place, (a * c - b * s).to(y.dtype.element_ty), mask=valid)
    tl.store(place + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["n"])
def rope_kernel(
    q, k, cos, sin, new_q, new_k, n, heads, groups, q_b, q_n, q_h, k_b, k_n, k_h,
    HALF: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, blocks of heads: those of queries, then those of keys."""
    line, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.cdiv(heads, HEADS_AT_ONCE)
    b, i, d = line // n, line % n, tl.arange(0, ROOM)[None, :]
    h = block * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)[:, None]
    c = tl.load(cos + line * HALF + d, mask=d < HALF, other=0)
    s = tl.load(sin + line * HALF + d, mask=d < HALF, other=0)
    if block < blocks:
        turn_heads(q + b * q_b + i * q_n, new_q, line, h, d, c, s, heads, q_h, HALF)
    else:
        turn_heads(k + b * k_b + i * k_n, new_k, line, h - blocks * HEADS_AT_ONCE, d, c, s, groups, k_h, HALF)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.rope`: the same bits."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (batch, n, heads, size), groups = q.shape, k.shape[2]
    new_q, new_k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    blocks, half = (triton.cdiv(count, HEADS_AT_ONCE.value) for count in (heads, groups)), size // 2
    rope_kernel[(batch * n, sum(blocks))](
        q, k, cos.contiguous(), sin.contiguous(), new_q, new_k, n, heads, groups, *q.stride()[:3],
        *k.stride()[:3], HALF=half, ROOM=max(triton.next_power_of_2(half), 16), **sampling_cuda.EXACT,
    )  # fmt: skip
    return new_q, new_k


@triton.jit(do_not_specialize=["n"])
def store_kernel(
    k, v, keys, values, slots, n, groups, k_b, k_n, k_h, v_b, v_n, v_h, to_b, to_slot, to_h,
    D: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, blocks of heads, keys or values."""
    line, d = tl.program_id(0).to(tl.int64), tl.arange(0, ROOM)[None, :]
    h = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)[:, None]
    b, i, valid = line // n, line % n, (h < groups) & (d < D)
    to = b * to_b + tl.load(slots + line) * to_slot + h * to_h + d
    if tl.program_id(2) == 0:
        tl.store(keys + to, tl.load(k + b * k_b + i * k_n + h * k_h + d, mask=valid), mask=valid)
    else:
        tl.store(values + to, tl.load(v + b * v_b + i * v_n + h * v_h + d, mask=valid), mask=valid)


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """See `kernels.store`."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, n, groups, size = k.shape
    store_kernel[(batch * n, triton.cdiv(groups, HEADS_AT_ONCE.value), 2)](
        k, v, keys, values, slots.contiguous(), n, groups, *k.stride()[:3], *v.stride()[:3],
        *keys.stride()[:3], D=size, ROOM=max(triton.next_power_of_2(size), 16),
    )  # fmt: skip


@triton.jit
def sortable(x, place):
    """int64 numbers that are ordered as `kernels.top_k` orders: by value, then the lower place first."""
    x = tl.where(x == x, x + 0.0, float("-inf"))  # NaN is not itself, and -0 + 0 is 0
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (0xFFFFFFFF - place.to(tl.int64))


@triton.jit
def top_k_kernel(
    x, keys, values, places, size, k, RAW: tl.constexpr, FINAL: tl.constexpr, BLOCK: tl.constexpr
):
    """The k largest of a block: of numbers, if RAW, or of keys that others found. One after another."""
    line, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    smallest: tl.constexpr = -(2**63)
    if RAW:
        key = sortable(tl.load(x + line * size + i, mask=i < size, other=0.0), i)
    else:
        key = tl.load(keys + line * size + i, mask=i < size, other=smallest)
    key = tl.where(i < size, key, smallest)
    for j in range(k):
        best = tl.max(key, axis=0)
        key = tl.where(key == best, smallest, key)  # there are no two equal ones
        if FINAL:
            bits = (best >> 32).to(tl.int32)
            value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            tl.store(values + line * k + j, value)
            tl.store(places + line * k + j, 0xFFFFFFFF - (best & 0xFFFFFFFF))
        else:
            tl.store(keys + (line * tl.num_programs(1) + block) * k + j, best)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `kernels.top_k`: the k best of every block of a row, then the k best of these."""
    rows, size, block = x.reshape(-1, x.shape[-1]).contiguous(), x.shape[-1], 4096
    if k > 64:  # one after another would be slow, and this many are not in use
        return reference.top_k_reference(x, k)
    n, blocks = len(rows), triton.cdiv(size, block)
    values = torch.empty(n, k, dtype=torch.float32, device=x.device)
    places = torch.empty(n, k, dtype=torch.int64, device=x.device)
    if blocks == 1:
        room = triton.next_power_of_2(size)
        top_k_kernel[(n, 1)](rows, places, values, places, size, k, RAW=True, FINAL=True, BLOCK=room)
    else:
        keys = torch.empty(n, blocks * k, dtype=torch.int64, device=x.device)
        top_k_kernel[(n, blocks)](rows, keys, values, places, size, k, RAW=True, FINAL=False, BLOCK=block)
        room = triton.next_power_of_2(blocks * k)
        top_k_kernel[(n, 1)](rows, keys, values, places, blocks * k, k, RAW=False, FINAL=True, BLOCK=room)
    return values.view(*x.shape[:-1], k), places.view(*x.shape[:-1], k)


@triton.jit(do_not_specialize=["depth"])
def move_kernel(addresses, like, path, length, depth, slots, size, BLOCK: tl.constexpr):
    """Grid: caches, texts, blocks of the numbers of a slot. In order of depth: a path increases, so no slot
    is written that is still to be read."""
    b, i = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    cache = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(like.dtype.element_ty))
    root = cache + (b * slots + tl.load(length + b)) * size + i
    for d in range(depth):
        v = tl.load(root + tl.load(path + b * depth + d) * size, mask=i < size)
        tl.store(root + d * size, v, mask=i < size)


@functools.cache
def table(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    """Where tensors lie, on the device. Kept, since a CUDA graph may read it as long as the process lives."""
    return torch.tensor(addresses, device=device)


def move(caches: list[Tensor], path: Tensor, length: Tensor) -> None:
    """See `kernels.move_slots`. All caches in one launch; they are alike in shape, and contiguous."""
    a, path = caches[0], path.contiguous()
    addresses, size = table(a.device, tuple(cache.data_ptr() for cache in caches)), a[0, 0].numel()
    block = min(triton.next_power_of_2(size), 256)
    grid = (len(caches), len(a), triton.cdiv(size, block))
    move_kernel[grid](addresses, a, path, length, path.shape[1], a.shape[1], size, BLOCK=block)


OPERATIONS = (linear, rms_norm, rotate, rope, store, attention, top_k, move)


def register(library: torch.library.Library) -> None:
    """Make these the bodies of the operators for CUDA."""
    for operation in (*OPERATIONS, *sampling_cuda.OPERATIONS):
        library.impl(operation.__name__, operation, "CUDA")
