"""quantize.py: weights of 4 and 8 bits, their file format, and what it costs in quality.

    python quantize.py --checkpoint_path DIR --precision w4a16 --group_size 128 --output DIR
    python quantize.py --checkpoint_path DIR --precision w4a8 --evaluate      # perplexity before and after
    python quantize.py --checkpoint_path DIR --quantizer gptq --rotate --output DIR
    python quantize.py --checkpoint_path AWQ_OR_GPTQ_DIR --output DIR         # converted, bit by bit

The one idea: a 4-bit weight is w = (q - zero) * scale with one scale (and perhaps one zero) for each group of
neighbouring inputs, and whoever made it (round to nearest, HQQ, GPTQ; here or elsewhere) only chose q, zero
and scale. So there is one format, and everything else is a view: tensors of a checkpoint are known by their
headers (`Stored`), and a rotated or a published 4-bit checkpoint is the same dictionary with other functions
that read them.

A file has, for a linear with the Hugging Face module path NAME:

    NAME.packed     uint8 [out, in / 2]             4 bits; the low nibble is the even input
    NAME.quantized  int8 [out, in]                  8 bits, symmetric, one scale for each output row
    NAME.scales     float16 [out, in / group] or [out, 1]
    NAME.zeros      float16 [out, in / group]       only if asymmetric; symmetric means zero = 8
    NAME.permutation  int32 [in]                    only if its columns are in another order than its inputs

and everything else under its own name; the metadata `gpt_spec` is the JSON of `Quantization`. Nothing in it
depends on a device: what order a kernel wants is the kernel's business, when the file is loaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from gpt_spec import (
    BadInput,
    CheckpointModule,
    Linear,
    ModelConfig,
    Rotation,
    Transformer,
    causal_attention,
    rope_frequencies,
)

PRECISIONS = {"w8a16": (8, 16), "w8a8": (8, 8), "w4a16": (4, 16), "w4a8": (4, 8), "w4a4": (4, 4)}
QUANTIZERS = ("rtn", "hqq", "gptq")
GROUP_SIZES = (128, 64, 32)  # that we make; and -1: one group for the whole row
STORED_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, -1)  # that others make
FORMAT_VERSION = 1
SHARD_BYTES = 2**30  # of a file that is written; what is held in memory at a time
FLOAT_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors says
CHUNK = 2**20  # weights that are worked on together: they stay in the cache
SMALLEST = 2.0**-24  # float16 above 0
SHRINK = [1 - i / 40 for i in range(16)]  # shares of a group's range that the clip search tries


# --------------------------------------------------------------------------------------------------
# What is quantized how
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantization:
    """The format of a checkpoint's weights; the metadata of its files, as JSON."""

    bits: int  # 8 or 4, of every linear of the layers but those below
    group: int = -1  # inputs that share a scale; -1: all of a row. 8-bit weights always have -1
    symmetric: bool = True
    lm_head_bits: int = 16  # or 8, or 4
    modules_16_bit: tuple[str, ...] = ()  # Hugging Face module paths
    rotation: str | None = None  # or "hadamard": see `rotated`
    version: int = FORMAT_VERSION

    @staticmethod
    def from_json(text: str, where: str) -> Quantization:
        """Read the metadata of a file. BadInput, naming `where`, for what this version does not know."""
        try:
            raw = json.loads(text)
            q = Quantization(**raw | {"modules_16_bit": tuple(raw.get("modules_16_bit", ()))})
        except (ValueError, TypeError, AttributeError) as error:
            raise BadInput(f"{where}: the metadata gpt_spec is not understood: {error}") from None
        allowed = {"bits": (4, 8), "group": STORED_GROUP_SIZES, "lm_head_bits": (4, 8, 16)}
        allowed |= {"version": (FORMAT_VERSION,), "rotation": (None, "hadamard"), "symmetric": (True, False)}
        for name, values in allowed.items():
            if repr(getattr(q, name)) not in map(repr, values):  # 4.0 is not 4
                raise BadInput(
                    f"{where}: the metadata gpt_spec has {name} {getattr(q, name)!r}; "
                    f"this version knows {', '.join(map(repr, values))}"
                )
        return q

    def bits_of(self, module: str) -> int:
        """16, 8 or 4 for a Hugging Face module path like model.layers.0.self_attn.q_proj."""
        if module in self.modules_16_bit:
            return 16
        return self.lm_head_bits if module == "lm_head" else self.bits

    def group_of(self, module: str, inputs: int) -> int:
        """Inputs that share a scale. Raises BadInput where they do not come out even."""
        whole = self.group == -1 or self.group > inputs or self.bits_of(module) == 8
        group = inputs if whole else self.group
        if inputs % group or group % kernels.LANES:
            if inputs % kernels.LANES:
                raise BadInput(f"{module} has {inputs} inputs, no multiple of 16: it cannot be quantized")
            raise BadInput(f"{module} has {inputs} inputs, no multiple of a group of {group}")
        return group


def named_linears(model: nn.Module) -> list[tuple[str, Linear]]:
    """(path, module) of every linear of a model, or of a part of it."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Linear)]


def best_group(inputs: list[int]) -> int:
    """The largest group size that divides all of these, else -1."""
    return next((g for g in GROUP_SIZES if all(n % g == 0 for n in inputs)), -1)


def default_quantization(model: CheckpointModule, precision: str) -> Quantization:
    """What `--precision` means for a 16-bit checkpoint: symmetric, groups of 128, lm_head in 8 bits."""
    bits, _ = PRECISIONS[precision]
    inputs = [m.in_features for m in model.modules() if isinstance(m, Linear) and not m.wide]
    return Quantization(bits, best_group(inputs) if bits == 4 else -1, lm_head_bits=8)


def reshape(model: CheckpointModule, q: Quantization, permuted: frozenset[str] = frozenset()) -> None:
    """Replace the 16-bit weights of a model by empty quantized ones, on the same device (meta, mostly).

    `permuted`: module paths of linears with a permutation.
    """
    for path, linear in named_linears(model):
        parts = model.parts(path, linear.out_features)
        bits = {q.bits_of(part) for part in parts}
        if len(bits) > 1:
            raise BadInput(f"{', '.join(parts)} are one matrix: all of them stay 16-bit, or none")
        out, inputs, bits = linear.out_features, linear.in_features, bits.pop()
        if bits == 16:
            continue
        groups = inputs // q.group_of(next(iter(parts)), inputs)
        shape, dtype = ((out, inputs), torch.int8) if bits == 8 else ((out, inputs // 2), torch.uint8)
        weight = torch.empty(shape, dtype=dtype, device=linear.weight.device)
        scales = torch.empty(out, groups, dtype=torch.float16, device=weight.device)
        zeros = None if q.symmetric or bits == 8 else torch.empty_like(scales)
        linear.set_weights(weight, scales, zeros)
        if permuted & parts.keys():
            order = torch.empty(inputs, dtype=torch.int32, device=weight.device)
            linear.permutation = nn.Parameter(order, requires_grad=False)


def set_precision(model: CheckpointModule, precision: str) -> None:
    """Choose the activations of a quantized model. 8-bit weights, like lm_head, never meet 4-bit ones."""
    _, activation_bits = PRECISIONS[precision]
    for linear in model.modules():
        if isinstance(linear, Linear) and linear.scales is not None:
            eight = linear.weight.dtype == torch.int8 and activation_bits == 4
            linear.activation_bits = 8 if eight else activation_bits


def precision_of(model: Transformer) -> str:
    """The precision name of a loaded model."""
    for linear in model.modules():  # lm_head is the last of them
        if isinstance(linear, Linear) and linear.scales is not None:
            form = (8 if linear.weight.dtype == torch.int8 else 4, linear.activation_bits)
            return next(name for name, widths in PRECISIONS.items() if widths == form)
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[model.norm.weight.dtype]


def lower_precisions(precision: str) -> list[str]:
    """Those of the same weights with fewer bits of activations, the next one first."""
    weights, activations = PRECISIONS.get(precision, (0, 0))
    return [name for name, (w, a) in PRECISIONS.items() if w == weights and a < activations]


def share_weights(model: Transformer, precision: str) -> Transformer:
    """The same weights with other activations: a second set of modules around the same tensors.

    Raises BadInput where the precision asks for other weights.
    """
    own = precision_of(model)
    if own not in PRECISIONS or precision not in PRECISIONS or PRECISIONS[precision][0] != PRECISIONS[own][0]:
        raise BadInput(f"the weights are those of {own}, which {precision} cannot share")
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    set_precision(twin, precision)
    return twin


# --------------------------------------------------------------------------------------------------
# Round to nearest, with a clip search
# --------------------------------------------------------------------------------------------------


def quantize_8_bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in] in -127 .. 127 and float16 scales [out, 1]."""
    quantized, scales = [], []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        absmax = rows.float().abs().amax(dim=1, keepdim=True)  # [., 1]
        scales.append((absmax / 127).clamp(min=SMALLEST).half())
        quantized.append((rows / scales[-1].float()).round().clamp(-127, 127).to(torch.int8))
    return torch.cat(quantized), torch.cat(scales)


def to_integers(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """q in 0 .. 15, as floats, so that (q - zero) * scale is nearest to w."""
    return (w / scale + zero).round().clamp(0, 15)


def round_groups(w: Tensor, shrink: float, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """w float32 [groups, group] -> q in 0 .. 15, scale and zero [groups, 1], for a range that is shrunk.

    The range includes 0, so that a zero lies between 0 and 15, where float16 is precise.
    """
    low, high = w.amin(dim=1, keepdim=True).clamp(max=0), w.amax(dim=1, keepdim=True).clamp(min=0)
    scale = shrink * (torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15)  # [groups, 1]
    scale = scale.clamp(min=SMALLEST).half().float()  # what the file will say
    zero = torch.full_like(scale, 8.0) if symmetric else (-shrink * low / scale).half().float()
    return to_integers(w, scale, zero), scale, zero


def fit_groups(w: Tensor, symmetric: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """w float32 [groups, group] -> the best scale and zero of each group, [groups, 1].

    Of the ranges of SHRINK, each group keeps the one with the smallest sum of squared errors, weighted with
    `importance` [groups, group] if there is any.
    """
    best = [torch.full_like(w[:, :1], math.inf)] * 3  # error, scale, zero: [groups, 1]
    for shrink in SHRINK:
        q, scale, zero = round_groups(w, shrink, symmetric)
        error = ((q - zero) * scale - w).square()
        error = (error if importance is None else error * importance).sum(dim=1, keepdim=True)
        better = error < best[0]
        best = [torch.where(better, new, old) for new, old in zip((error, scale, zero), best)]
    return best[1], best[2]


def refine_zeros(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Better zeros for groups w [groups, group] whose scales stay: HQQ (Badri and Shaji, 2023).

    Minimizes the sum of |error|^0.7, for which a few large errors matter less, by half-quadratic splitting:
    in turn, `outliers` takes from the errors what is not worth following, and the zero follows the rest.
    """
    beta, p = 10.0, 0.7
    for _ in range(20):
        q = to_integers(w, scale, zero)
        error = w - (q - zero) * scale
        size = error.abs()
        outliers = error.sign() * (size - size.clamp(min=SMALLEST).pow(p - 1) / beta).clamp(min=0)
        zero = (q - (w - outliers) / scale).mean(dim=1, keepdim=True)  # [groups, 1]
        beta *= 1.01
    return zero.half().float()


def pack_nibbles(q: Tensor) -> Tensor:
    """Integers 0 .. 15, uint8 [out, in] -> [out, in / 2]; the low nibble is the even input."""
    return q[:, ::2] | q[:, 1::2] << 4


def quantize_4_bit(
    weight: Tensor, group: int, symmetric: bool = True, refine: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[out, in] -> packed uint8 [out, in / 2], float16 scales and, if asymmetric, zeros [out, in / group].

    Round to nearest with the ranges of `fit_groups`; `refine`: and the zeros of `refine_zeros`.
    """
    packed, scales, zeros = [], [], []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        w = rows.float().reshape(-1, group)  # [groups, group]
        scale, zero = fit_groups(w, symmetric)
        zero = refine_zeros(w, scale, zero) if refine else zero
        q = to_integers(w, scale, zero).to(torch.uint8)
        packed.append(pack_nibbles(q.view(rows.shape)))
        scales.append(scale.half().view(len(rows), -1))
        zeros.append(zero.half().view(len(rows), -1))
    return torch.cat(packed), torch.cat(scales), None if symmetric else torch.cat(zeros)


def quantize_weight(module: str, weight: Tensor, q: Quantization, refine: bool = False) -> dict[str, Tensor]:
    """What stands for NAME.weight [out, in] in a file. BadInput for what float16 scales cannot hold."""
    bits = q.bits_of(module)
    if bits == 16:
        return {f"{module}.weight": weight}
    if bits == 8:
        return name_tensors(module, weight, *quantize_8_bit(weight))
    group = q.group_of(module, weight.shape[1])
    return name_tensors(module, weight, *quantize_4_bit(weight, group, q.symmetric, refine))


def name_tensors(
    module: str, weight: Tensor, integers: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> dict[str, Tensor]:
    if not (weight.isfinite().all() and scales.isfinite().all()):
        raise BadInput(f"{module}.weight holds infinities, NaN or huge numbers, which cannot be quantized")
    tensors = {"quantized" if integers.dtype == torch.int8 else "packed": integers}
    tensors |= {"scales": scales} if zeros is None else {"scales": scales, "zeros": zeros}
    return {f"{module}.{kind}": tensor for kind, tensor in tensors.items()}


def linear_names(model: CheckpointModule) -> set[str]:
    """Hugging Face module paths of everything that may be quantized."""
    return {part for path, linear in named_linears(model) for part in model.parts(path, linear.out_features)}


def convert(
    name: str, tensor: Tensor, q: Quantization, linears: set[str], tied: bool, refine: bool = False
) -> dict[str, Tensor]:
    """What stands in a quantized file for one tensor of a 16-bit checkpoint. `linears`: see `linear_names`.

    A tied lm_head has no tensor of its own; to be quantized it is made from the embedding, which stays.
    """
    module = name.removesuffix(".weight")
    if name == "lm_head.weight" and tied:
        return {}
    tensors = quantize_weight(module, tensor, q, refine) if module in linears else {name: tensor}
    if name == "model.embed_tokens.weight" and tied and q.bits_of("lm_head") < 16:
        tensors |= quantize_weight("lm_head", tensor, q, refine)
    return tensors


# --------------------------------------------------------------------------------------------------
# Checkpoints whose tensors have not been read, and views of them
# --------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of a checkpoint: what its header says, and a function that reads it."""

    shape: tuple[int, ...]
    kind: str  # as safetensors has it: F32, BF16, F16, I32, U8, ...
    where: Path
    read: Callable[[], Tensor]


def quantize_checkpoint(
    model: Transformer,
    tensors: dict[str, Stored],
    q: Quantization,
    quantizer: str = "rtn",
    calibration: Tensor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The tensors of the quantized checkpoint, a few at a time; of the 16-bit one, no more are in memory.

    model: for its configuration and names, on the meta device. quantizer: one of QUANTIZERS; gptq needs
    `calibration`, tokens int64 [texts, n], and computes with one layer at a time.
    """
    source, tensors = tensors, rotated(tensors, model.config) if q.rotation else tensors
    linears, tied, done = linear_names(model), model.config.tied_embeddings, set()
    if quantizer == "gptq":
        for module, quantized in gptq(model.config, tensors, q, calibration):
            done.add(f"{module}.weight")
            yield quantized
    for name, stored in tensors.items():
        if name not in done:
            converted = convert(name, stored.read(), q, linears, tied, quantizer == "hqq")
            if name in converted:  # rotated or not, what is not quantized is stored as it was
                converted[name] = converted[name].to(FLOAT_TYPES.get(source[name].kind))
            yield converted


# --------------------------------------------------------------------------------------------------
# Rotation: QuaRot (arXiv 2404.00456), with true RMSNorms and without its rotated embedding
# --------------------------------------------------------------------------------------------------

LARGEST_ORDER = 256  # of a Hadamard matrix without a fast transform


def is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix float32 [order, order] by Paley's constructions; None where neither gives one.

    The first is for order = q + 1 with a prime q = 3 mod 4, the second for 2 (q + 1) with q = 1 mod 4.
    """
    q, rest = (order - 1, 3) if is_prime(order - 1) and order % 4 == 0 else (order // 2 - 1, 1)
    if not is_prime(q) or q % 4 != rest:
        return None
    squares, i = {j * j % q for j in range(1, q)}, torch.arange(q)
    character = torch.tensor([0.0] + [1.0 if j in squares else -1.0 for j in range(1, q)])
    matrix = F.pad(character[(i[:, None] - i) % q], (1, 0, 1, 0), value=1.0)  # [q + 1, q + 1]
    matrix[0, 0] = 0
    if rest == 3:
        matrix[1:, 0] = -1
        return matrix + torch.eye(order)
    ones, zero = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(matrix, ones) + torch.kron(torch.eye(q + 1), zero)


def hadamard(size: int) -> tuple[Tensor, int]:
    """The matrix and the power of `kernels.rotate` for so many numbers.

    They span all of them if there is such a Hadamard matrix; if not, as for 11008 = 43 * 256, the power of
    two in `size`, and the rotation is block-diagonal.
    """
    power = size & -size
    odd = size // power
    for order in (odd * 2**t for t in range(2, 9)):
        if odd > 1 and order <= LARGEST_ORDER and size % order == 0 and (matrix := paley(order)) is not None:
            return matrix, size // order
    return torch.ones(1, 1), power


@dataclass(frozen=True)
class Rotations:
    """What a rotated model is rotated with, in the places that QuaRot numbers."""

    hidden: Rotation  # R1: the state between layers, with signs
    value: Rotation  # R2: every value head, offline alone
    heads: Rotation  # online: across the heads, before o_proj
    inner: Rotation  # online: before down_proj

    @staticmethod
    def of(config: ModelConfig) -> Rotations:
        signs = (kernels.mix(torch.arange(config.hidden_size, device="cpu")) & 1) * 2.0 - 1
        return Rotations(
            Rotation(*hadamard(config.hidden_size), signs=signs),
            Rotation(*hadamard(config.head_dim)),
            Rotation(*hadamard(config.num_heads), stride=config.head_dim),
            Rotation(*hadamard(config.intermediate_size)),
        )


def add_rotations(model: Transformer, device: torch.device | str = "cpu") -> None:
    """Have a model rotate what it computes, as its weights expect it.

    After `to_empty` and `to(dtype)`, not before: the matrices have their values, and stay float32.
    """
    r = Rotations.of(model.config)
    model.rotation = r.hidden.to(device)
    for layer in model.layers:
        layer.self_attn.o_proj.rotation = r.heads.to(device)
        layer.mlp.down_proj.rotation = r.inner.to(device)


def turn(weight: Tensor, rotation: Rotation, dim: int = -1) -> Tensor:
    """Rotate a dimension of a float32 weight or bias."""
    return rotation(weight.movedim(dim, -1)).movedim(-1, dim)


def rotate_tensor(name: str, tensors: dict[str, Stored], r: Rotations) -> Tensor:
    """A tensor of a layer, float32: it takes rotated inputs, yields rotated outputs, and the norm before it
    is part of it."""
    *path, module, kind = name.split(".")
    tensor = tensors[name].read().float()
    if module in ("input_layernorm", "post_attention_layernorm"):
        return torch.ones_like(tensor)
    if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") and kind == "weight":
        norm = "input_layernorm" if path[-1] == "self_attn" else "post_attention_layernorm"
        scale = tensors[".".join([*path[:-1], norm, "weight"])].read().float()
        tensor = turn(tensor * scale, r.hidden)
    if module == "v_proj":
        tensor = turn(tensor, r.value, dim=0)
    if module == "o_proj" and kind == "weight":
        tensor = turn(turn(tensor, r.value), r.heads)
    if module == "down_proj" and kind == "weight":
        tensor = turn(tensor, r.inner)
    if module in ("o_proj", "down_proj"):
        tensor = turn(tensor, r.hidden, dim=0)
    return tensor


def rotated(tensors: dict[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """A 16-bit checkpoint for a model with `add_rotations`, which computes the same.

    The state is rotated behind the embedding and turned back before the last norm, which two more online
    rotations pay for: so embedding, lm_head and the features that EAGLE heads read stay what they were.
    """
    r, view = Rotations.of(config), dict(tensors)
    for name, stored in tensors.items():
        if name.startswith("model.layers.") and not name.endswith(("q_norm.weight", "k_norm.weight")):
            view[name] = stored._replace(kind="F32", read=partial(rotate_tensor, name, tensors, r))
    return view


# --------------------------------------------------------------------------------------------------
# GPTQ (arXiv 2210.17323): what rounding did to one input, the inputs after it make good
# --------------------------------------------------------------------------------------------------

GPTQ_BLOCK = 128  # columns whose errors are passed on together
GPTQ_CHUNK = 2**24  # weights that are in memory together, a few times over
GPTQ_TOKENS = 4096  # that go through a layer together


def gptq_weight(
    weight: Tensor, hessian: Tensor, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Like `quantize_4_bit`, for float32 [out, in] and the mean of x^T x, [in, in], of what it is applied to.

    Inputs are rounded in the order of their size ("act-order"), but their groups are those of the file
    ("static groups"), so that nothing needs a permutation.
    """
    size = hessian.diagonal()
    order = size.argsort(descending=True)
    factor = inverse_factor(hessian[order[:, None], order])
    rows = weight.split(max(1, GPTQ_CHUNK // len(size)))
    parts = [gptq_rows(some, size, order, factor, group, symmetric) for some in rows]
    packed, scales, zeros = map(torch.cat, zip(*parts))
    return packed, scales, None if symmetric else zeros


def gptq_rows(
    weight: Tensor, size: Tensor, order: Tensor, factor: Tensor, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of `gptq_weight`; `factor` [in, in] is for inputs in `order`."""
    weight = weight.masked_fill(size == 0, 0.0)  # inputs that are never there
    w, importance = weight.view(-1, group), size.expand_as(weight).reshape(-1, group)
    scale, zero = (t.view(len(weight), -1) for t in fit_groups(w, symmetric, importance))  # [out, groups]
    w, groups = weight.T[order], (order // group).tolist()  # [in, out]: an input's weights lie side by side
    q, (s, z) = torch.empty(w.shape, dtype=torch.uint8), (t.T.contiguous() for t in (scale, zero))
    for begin in range(0, len(order), GPTQ_BLOCK):
        end = min(begin + GPTQ_BLOCK, len(order))
        errors = torch.zeros_like(w[begin:end])
        for i in range(begin, end):
            g = groups[i]
            rounded = to_integers(w[i], s[g], z[g])  # [out]
            q[i] = rounded.to(torch.uint8)
            errors[i - begin] = (w[i] - (rounded - z[g]) * s[g]) / factor[i, i]
            w[i:end] -= factor[i, i:end, None] * errors[i - begin]
        w[end:] -= factor[begin:end, end:].T @ errors
    return pack_nibbles(q[order.argsort()].T.contiguous()), scale.half(), zero.half()


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a Hessian [n, n], damped until it has one."""
    mean = hessian.diagonal().mean().clamp(min=SMALLEST)
    for damping in (0.01, 0.1, 1.0):
        matrix = hessian.clone()
        matrix.diagonal().add_(damping * mean)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        matrix = torch.cholesky_inverse(matrix)
        matrix, failed_too = torch.linalg.cholesky_ex(matrix, upper=True)
        if not failed and not failed_too:
            return matrix
    raise BadInput("gptq: the model computes infinities or NaN on the calibration text")


def gptq(
    config: ModelConfig, tensors: dict[str, Stored], q: Quantization, calibration: Tensor
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(module, its tensors in a file) of every 4-bit linear of the layers.

    calibration: tokens int64 [texts, n]. A layer is read, its linears are quantized one after another on what
    the quantized ones before them make of the texts, and it is forgotten.
    """
    from tqdm import tqdm

    with torch.device("meta"):
        model = Transformer(config)
    model.frequencies = rope_frequencies(config)
    # [texts, n, hidden]
    states = F.embedding(calibration, tensors["model.embed_tokens.weight"].read()).float()
    states = Rotations.of(config).hidden(states) if q.rotation else states
    for i, layer in enumerate(tqdm(model.layers, "gptq", unit="layer", disable=None)):
        layer.to_empty(device="cpu").requires_grad_(False)
        if q.rotation:
            add_rotations(model)
        for name, place in model.checkpoint_tensors().items():
            if not place.is_meta:  # all other layers are
                place.copy_(tensors[name].read())
        run = LayerRun(model, i, states)
        for path, linear in named_linears(layer):
            parts = model.parts(f"layers.{i}.{path}", linear.out_features)
            if q.bits_of(next(iter(parts))) == 4:
                yield from gptq_linear(linear, parts, run.hessian(linear), q)
        states = run.forward()
        layer.to("meta")


def gptq_linear(
    linear: Linear, parts: dict[str, int], hessian: Tensor, q: Quantization
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Quantize one matrix, in place too -> (module, its tensors in a file) of its parts."""
    group = q.group_of(next(iter(parts)), linear.in_features)
    fitted = gptq_weight(linear.weight, hessian, group, q.symmetric)
    linear.weight.copy_(kernels.dequantize(*fitted))
    pieces = [tensor.split(tuple(parts.values())) for tensor in fitted if tensor is not None]
    for module, *own in zip(parts, *pieces):
        yield module, name_tensors(module, linear.weight, *own)


class LayerRun:
    """One layer and the states that enter it."""

    def __init__(self, model: Transformer, index: int, states: Tensor):
        self.layer, self.states = model.layers[index], states
        self.cos, self.sin = model.rope(torch.arange(states.shape[1])[None])
        self.rows = max(1, GPTQ_TOKENS // states.shape[1])  # texts at a time

    @torch.no_grad()
    def forward(self) -> Tensor:
        """What leaves the layer, [texts, n, hidden]."""
        attend = partial(causal_attention, 0)
        return torch.cat([self.layer(x, self.cos, self.sin, attend) for x in self.states.split(self.rows)])

    def hessian(self, linear: Linear) -> Tensor:
        """The mean of x^T x over all that a linear of the layer multiplies with, float32 [in, in]."""
        total = torch.zeros(linear.in_features, linear.in_features)

        def add(_, inputs: tuple, options: dict[str, Any]) -> None:
            x = linear.prepare(*inputs, **options).flatten(0, 1)  # [tokens, in]
            total.addmm_(x.T, x)

        hook = linear.register_forward_pre_hook(add, with_kwargs=True)
        try:
            self.forward()
        finally:
            hook.remove()
        return total / self.states[..., 0].numel()


# --------------------------------------------------------------------------------------------------
# Published 4-bit checkpoints: AutoAWQ gemm, GPTQ, compressed-tensors
# --------------------------------------------------------------------------------------------------

READABLE = "AutoAWQ gemm, GPTQ and compressed-tensors pack-quantized, of 4 bits, are"
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds column 0, 1, ... of eight
IN_ORDER = tuple(range(8))


def nibbles(words: Tensor, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """int32 [..., n] -> uint8 [..., 8 n]: number j of a word is its nibble order[j], from the lowest bits."""
    out = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for j, nibble in enumerate(order):
        out[..., j] = (words >> 4 * nibble) & 15
    return out.flatten(-2)


@dataclass
class Layout:
    """How one kind of published checkpoint stores a 4-bit linear; a subclass for each.

    w = (q - zero) * scale in all of them; they differ in the names, the shapes and the order of nibbles.
    """

    group: int  # inputs that share a scale; -1: a whole row
    zero_offset: int = 0  # what is added to a stored zero, modulo 16
    activation_bits: int = 16

    name = ""
    integers, scales, zeros, index = "qweight", "scales", "qzeros", "g_idx"  # suffixes of the tensors
    optional = ("g_idx",)

    def forms(self, out: int, inputs: int, groups: int) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """(kind, shape) that a tensor may have, by suffix."""
        raise NotImplementedError

    def read_integers(self, stored: Tensor) -> Tensor:
        """-> uint8 [out, in]"""
        raise NotImplementedError

    def read_scales(self, stored: Tensor) -> Tensor:
        """-> [out, groups]"""
        return stored.T

    def read_zeros(self, stored: Tensor, out: int) -> Tensor:
        """-> uint8 [out, groups], as they are stored"""
        return nibbles(stored).T


class AwqLayout(Layout):
    name = "AutoAWQ gemm"

    def forms(self, out, inputs, groups):
        return {
            "qweight": [("I32", (inputs, out // 8))],
            "qzeros": [("I32", (groups, out // 8))],
            "scales": [(kind, (groups, out)) for kind in FLOAT_TYPES],
        }

    def read_integers(self, stored):
        return nibbles(stored, AWQ_ORDER).T

    def read_zeros(self, stored, out):
        return nibbles(stored, AWQ_ORDER).T


class GptqLayout(Layout):
    name = "GPTQ"

    def forms(self, out, inputs, groups):
        return {
            "qweight": [("I32", (inputs // 8, out))],
            "qzeros": [("I32", (groups, out // 8))],
            "scales": [(kind, (groups, out)) for kind in FLOAT_TYPES],
            "g_idx": [("I32", (inputs,))],
        }

    def read_integers(self, stored):
        return nibbles(stored.T)


class CompressedLayout(Layout):
    name = "compressed-tensors"
    integers, scales, zeros, index = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
    optional = ("weight_zero_point", "weight_g_idx", "weight_shape")

    def forms(self, out, inputs, groups):
        return {
            "weight_packed": [("I32", (out, inputs // 8))],
            "weight_scale": [(kind, (out, groups)) for kind in FLOAT_TYPES],
            "weight_zero_point": [("I32", (-(-out // 8), groups)), ("I8", (out, groups))],
            "weight_g_idx": [("I32", (inputs,))],
            "weight_shape": [("I64", (2,)), ("I32", (2,))],
        }

    def read_integers(self, stored):
        return nibbles(stored)

    def read_scales(self, stored):
        return stored

    def read_zeros(self, stored, out):
        if stored.dtype == torch.int8:  # of older files: signed, and not packed
            return (stored + 8).to(torch.uint8)
        return nibbles(stored.T)[:, :out].T


def find_layout(raw: dict[str, Any], where: str) -> Layout:
    """The layout that a `quantization_config` describes. Raises BadInput for those we do not read."""
    method = raw.get("quant_method")
    readers = {"awq": awq_layout, "gptq": gptq_layout, "compressed-tensors": compressed_layout}
    if not isinstance(method, str) or method not in readers:
        refuse(where, f"quant_method {method!r}")
    for key in ("transform_config", "rotation", "rotation_config", "hadamard_config"):
        if raw.get(key):  # online transforms that the tensors do not show
            refuse(where, f"{method} with a {key}")
    try:
        layout = readers[method](raw, where)
    except (TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"{where}: the quantization_config is not understood: {error!r}") from None
    if type(layout.group) is not int or layout.group not in STORED_GROUP_SIZES:
        sizes = ", ".join(map(str, STORED_GROUP_SIZES))
        raise BadInput(f"{where}: group_size {layout.group!r} is not supported; {sizes} are")
    return layout


def refuse(where: str, what: str) -> NoReturn:
    raise BadInput(f"{where}: {what} is not supported; {READABLE}")


def awq_layout(raw: dict[str, Any], where: str) -> Layout:
    bits = raw.get("bits", raw.get("w_bit"))
    if bits != 4:
        refuse(where, f"AutoAWQ of {bits} bits")
    version = raw.get("version") or raw.get("checkpoint_format") or raw.get("format") or "gemm"
    if str(version).lower() != "gemm":
        refuse(where, f"AutoAWQ {version}")
    return AwqLayout(raw.get("group_size", raw.get("q_group_size")))


def gptq_layout(raw: dict[str, Any], where: str) -> Layout:
    form = "marlin" if raw.get("is_marlin_format") else raw.get("checkpoint_format") or "gptq"
    if raw.get("bits") != 4:
        refuse(where, f"GPTQ of {raw.get('bits')} bits")
    if form not in ("gptq", "gptq_v2"):
        refuse(where, f"GPTQ with checkpoint_format {form!r}")
    if raw.get("pack_dtype", "int32") != "int32":
        refuse(where, f"GPTQ packed into {raw['pack_dtype']}")
    for pattern, other in (raw.get("dynamic") or {}).items():  # what "-:" excludes is seen by its tensors
        changed = [key for key in ("bits", "group_size") if other and other.get(key, raw[key]) != raw[key]]
        if changed and not pattern.startswith("-"):
            refuse(where, f"GPTQ with another {changed[0]} for {pattern!r}")
    return GptqLayout(raw.get("group_size"), zero_offset=0 if form == "gptq_v2" else 1)


def compressed_layout(raw: dict[str, Any], where: str) -> Layout:
    groups = [group for group in raw["config_groups"].values() if group.get("weights")]
    if not groups:
        refuse(where, "compressed-tensors without quantized weights")
    for form in {raw.get("format"), *(group.get("format") for group in groups)} - {None}:
        if form != "pack-quantized":
            refuse(where, f"compressed-tensors {form}")
    sizes = set()
    for weights in (group["weights"] for group in groups):
        kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
        if (kind, bits) != ("int", 4):
            refuse(where, f"compressed-tensors {kind} of {bits} bits")
        if strategy not in ("group", "channel"):
            refuse(where, f"compressed-tensors with strategy {strategy!r}")
        sizes.add(weights["group_size"] if strategy == "group" else -1)
    if len(sizes) != 1:
        refuse(where, f"compressed-tensors with group sizes {', '.join(map(str, sorted(sizes)))}")
    if raw.get("kv_cache_scheme") or any(group.get("output_activations") for group in groups):
        print(f"{where}: asks for a quantized cache or outputs; they stay 16-bit", file=sys.stderr)
    return CompressedLayout(sizes.pop(), activation_bits=wanted_activations(groups, where))


def wanted_activations(groups: list[dict[str, Any]], where: str) -> int:
    """What compressed-tensors says of activations: 8 for int8 tokens; a line for what we do not have."""
    wanted = [group.get("input_activations") for group in groups]
    ours = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    if all(a and all(a.get(key) == value for key, value in ours.items()) for a in wanted):
        return 8
    if any(wanted):
        print(f"{where}: asks for activations that we do not have; 16 bits it is", file=sys.stderr)
    return 16


@dataclass
class PublishedLinear:
    """One 4-bit linear of a published checkpoint. Raises BadInput, naming file and tensor."""

    layout: Layout
    module: str
    tensors: dict[str, Stored]
    out: int
    inputs: int
    group: int

    def read(self, suffix: str) -> Tensor:
        return self.tensors[f"{self.module}.{suffix}"].read()

    def wrong(self, suffix: str, what: str) -> BadInput:
        """Of a tensor that is there."""
        name = f"{self.module}.{suffix}"
        return BadInput(f"{self.tensors[name].where}: {name} {what}")

    @property
    def has_zeros(self) -> bool:
        return f"{self.module}.{self.layout.zeros}" in self.tensors

    def check(self) -> None:
        """Is everything there, in a form that it may have?"""
        name, integers = self.layout.name, self.layout.integers
        if self.out % 8 and not isinstance(self.layout, CompressedLayout):
            raise self.wrong(integers, f"has {self.out} outputs by config.json, but {name} packs by eight")
        for suffix, forms in self.layout.forms(self.out, self.inputs, self.inputs // self.group).items():
            tensor = f"{self.module}.{suffix}"
            if tensor in self.tensors:
                shape, kind, _, _ = self.tensors[tensor]
                if (kind, shape) not in forms:
                    expected = " or ".join(f"{kind} {shape}" for kind, shape in forms)
                    raise self.wrong(suffix, f"is {kind} {shape}; {name} has {expected} here")
            elif suffix not in self.layout.optional:
                raise self.wrong(integers, f"has no {suffix} beside it; {name} needs it")
        if f"{self.module}.weight_shape" in self.tensors:
            stored = self.read("weight_shape").tolist()
            if stored != [self.out, self.inputs]:
                raise self.wrong("weight_shape", f"is {stored}; config.json says {[self.out, self.inputs]}")

    def order(self) -> Tensor | None:
        """The input of every column int64 [in], so that groups are neighbours; None for their own order.

        What counts is what `g_idx` says, whatever the configuration says about act-order.
        """
        if f"{self.module}.{self.layout.index}" not in self.tensors:
            return None
        index, plain = self.read(self.layout.index).long(), torch.arange(self.inputs) // self.group
        if torch.equal(index, plain) or bool((index == index[0]).all() and index[0] <= 0):  # 0 or -1: unset
            return None
        order = index.argsort(stable=True)
        if not torch.equal(index[order], plain):
            raise self.wrong(self.layout.index, f"does not have {self.group} inputs a group")
        return order

    def stored_zeros(self) -> Tensor:
        """uint8 [out, groups]"""
        stored = self.read(self.layout.zeros)
        if stored.dtype == torch.int8 and not -8 <= stored.min() <= stored.max() <= 7:
            raise self.wrong(self.layout.zeros, "is not within -8 and 7")
        return self.layout.read_zeros(stored, self.out)

    def packed(self) -> Tensor:
        q, order = self.layout.read_integers(self.read(self.layout.integers)), self.order()
        return pack_nibbles(q if order is None else q[:, order])

    def half_scales(self) -> Tensor:
        """Exact for float16, and for bf16 from 2^-17 on; what is below 2^-25 becomes 0."""
        scales = self.layout.read_scales(self.read(self.layout.scales)).half()
        if not scales.isfinite().all():
            raise self.wrong(self.layout.scales, "does not fit into float16")
        return scales

    def half_zeros(self) -> Tensor:
        if not self.has_zeros:
            return torch.full((self.out, self.inputs // self.group), 8.0, dtype=torch.float16)
        return ((self.stored_zeros() + self.layout.zero_offset) & 15).half()

    def view(self, symmetric: bool) -> dict[str, Stored]:
        """What stands for this linear in our format."""
        groups = (self.out, self.inputs // self.group)
        where = self.tensors[f"{self.module}.{self.layout.integers}"].where
        view = {
            "packed": Stored((self.out, self.inputs // 2), "U8", where, self.packed),
            "scales": Stored(groups, "F16", where, self.half_scales),
        }
        if not symmetric:
            view["zeros"] = Stored(groups, "F16", where, self.half_zeros)
        if (order := self.order()) is not None:
            view["permutation"] = Stored((self.inputs,), "I32", where, order.int)
        return {f"{self.module}.{suffix}": stored for suffix, stored in view.items()}


def translate(
    layout: Layout, tensors: dict[str, Stored], model: Transformer, where: str
) -> tuple[dict[str, Stored], Quantization]:
    """A published checkpoint as one of ours: its tensors, and what its metadata would say.

    Headers, zeros and group indices are read for that, weights are not. What is quantized is decided by the
    tensors that are there, whatever lists of modules the configuration has. Raises BadInput.
    """
    shapes, biases = {}, set()  # [out, in] by module path; biases that the model does not have
    for path, linear in named_linears(model):
        parts = model.parts(path, linear.out_features)
        shapes |= {part: (rows, linear.in_features) for part, rows in parts.items()}
        biases |= {f"{part}.bias" for part in parts if linear.bias is None}
    empty = {name for name in biases & set(tensors) if not tensors[name].read().any()}  # as GPTQ writes them
    present = [module for module in shapes if f"{module}.{layout.integers}" in tensors]
    if not present:
        raise BadInput(f"{where}: says {layout.name}, but no linear has a tensor {layout.integers}")
    kept = tuple(module for module in shapes if module not in present and module != "lm_head")
    q = Quantization(4, layout.group, True, 4 if "lm_head" in present else 16, kept)
    linears = []
    for module in present:
        try:
            group = q.group_of(module, shapes[module][1])
        except BadInput as error:
            raise BadInput(f"{tensors[f'{module}.{layout.integers}'].where}: {error}") from None
        linears.append(PublishedLinear(layout, module, tensors, *shapes[module], group))
        linears[-1].check()
    symmetric = zeros_are_symmetric(layout, linears, where)
    suffixes = tuple(f".{suffix}" for suffix in layout.forms(8, 8, 1))
    used = {name for name in tensors if name.endswith(suffixes) and name.rpartition(".")[0] in present}
    view = {name: stored for name, stored in tensors.items() if name not in used | empty}
    for linear in linears:
        view |= linear.view(symmetric)
    return view, replace(q, symmetric=symmetric)


def zeros_are_symmetric(layout: Layout, linears: list[PublishedLinear], where: str) -> bool:
    """Is every zero of a checkpoint 8?

    A GPTQ file stores them less one, or does not (version 2), and the label that says which is often wrong
    where all are the same: then they are 8, since no quantizer finds a zero of 7, or of 9, everywhere.
    """
    values = set()
    for linear in linears:
        values |= set(linear.stored_zeros().unique().tolist()) if linear.has_zeros else {8}
    if values == {8} or (isinstance(layout, GptqLayout) and values == {7}):
        return True
    if isinstance(layout, GptqLayout):
        version = f"version {1 if layout.zero_offset else 2}, as labelled"
        print(f"{where}: asymmetric GPTQ; its zeros are taken for {version}", file=sys.stderr)
    return False


def check_permutations(tensors: dict[str, Stored], model: Transformer) -> frozenset[str]:
    """The modules with a permutation, which must be one, and the same for all parts of a matrix. BadInput."""
    for path, linear in named_linears(model):
        names = [f"{part}.permutation" for part in model.parts(path, linear.out_features)]
        orders = [tensors[name].read().long() if name in tensors else None for name in names]
        if any(order is not None for order in orders):
            where = next(tensors[name].where for name in names if name in tensors)
            plain = torch.arange(linear.in_features)
            if any(order is None or not torch.equal(order, orders[0]) for order in orders):
                parts = ", ".join(name.removesuffix(".permutation") for name in names)
                raise BadInput(f"{where}: {parts} are one matrix, but their inputs have different orders")
            if not torch.equal(orders[0].sort().values, plain):
                raise BadInput(f"{where}: {names[0]} is no permutation of {linear.in_features} inputs")
    suffix = ".permutation"
    return frozenset(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))


# --------------------------------------------------------------------------------------------------
# Perplexity
# --------------------------------------------------------------------------------------------------


def held_out_texts() -> list[str]:
    """The modules of the Python standard library that the shipped models have not seen."""
    lines = (Path(__file__).parent / "models" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    names = dict.fromkeys(json.loads(line)["module"] for line in lines)
    files = [Path(sysconfig.get_paths()["stdlib"], f"{name}.py") for name in names]
    return [path.read_text(encoding="utf-8") for path in files if path.exists()]


@torch.no_grad()
def mean_loss(model: Transformer, texts: list[list[int]], tokens: int) -> float:
    """Nats per token, over about `tokens` of them: the same share of every text, in rows of up to 512."""
    share, losses = tokens // len(texts), []
    for text in texts:
        for begin in range(0, min(share, len(text) - 1), 512):
            row = torch.tensor([text[begin : min(begin + 513, share + 1)]], device=model.norm.weight.device)
            logits = model.lm_head(model.recompute(row[:, :-1]))  # [1, n, V]
            losses.append(F.cross_entropy(logits[0].float(), row[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


CALIBRATION_LENGTH = 512  # tokens of a text that GPTQ looks at
TOGETHER = 16  # texts that a model writes side by side


class ShardWriter:
    """Writes tensors into safetensors files of about a gigabyte, and an index if there are several."""

    def __init__(self, directory: Path, metadata: dict[str, str]):
        self.directory, self.metadata = directory, metadata
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self.pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self.pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self.pending, self.directory / f"shard-{len(self.shards)}", metadata=self.metadata)
        self.total += sum(tensor.nbytes for tensor in self.pending.values())
        self.shards.append(list(self.pending))
        self.pending = {}

    def close(self) -> None:
        if self.pending:
            self.flush()
        count = len(self.shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        names = names if count > 1 else ["model.safetensors"]
        for i, name in enumerate(names):
            (self.directory / f"shard-{i}").rename(self.directory / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self.shards) for tensor in shard}
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_checkpoint(
    output: Path, source: Path, q: Quantization, tensors: Iterable[dict[str, Tensor]]
) -> int:
    """Write a directory that appears when it is whole, with the small files of `source` -> weight bytes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{output.name}.", dir=output.parent))
    try:
        writer = ShardWriter(unfinished, {"format": "pt", "gpt_spec": json.dumps(asdict(q))})
        for some in tensors:
            writer.add(some)
        writer.close()
        copy_small_files(source, unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return writer.total


def copy_small_files(source: Path, goal: Path) -> None:
    """Configuration and tokenizer, without what they say of another quantization."""
    others = ("quantize_config.json", "quant_config.json")
    for file in source.iterdir():
        small = file.suffix in (".json", ".model", ".jinja", ".txt") and file.name not in others
        if small and not file.name.endswith(".index.json"):
            shutil.copy(file, goal)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.keys() & {"quantization_config", "compression_config"}:
        for key in ("quantization_config", "compression_config"):
            config.pop(key, None)
        (goal / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def kept_modules(pattern: str, modules: list[str]) -> tuple[str, ...]:
    try:
        kept = tuple(module for module in modules if re.search(pattern, module))
    except re.error as error:
        raise BadInput(f"--keep_16_bit: {pattern!r} is no regular expression: {error}") from None
    if not kept:
        raise BadInput(f"--keep_16_bit: no module matches {pattern!r}; they are called like {modules[-1]}")
    return kept


def choose_quantization(args: argparse.Namespace, model: Transformer) -> Quantization:
    """What the flags ask for, checked against the shapes of the model. Raises BadInput."""
    bits, _ = PRECISIONS[args.precision]
    if bits == 8 and (args.group_size is not None or args.asymmetric or args.quantizer != "rtn"):
        raise BadInput(
            "--group_size, --asymmetric and --quantizer are for 4-bit weights; 8-bit ones have a scale a row"
        )
    default = default_quantization(model, args.precision)
    group = default.group if args.group_size is None else args.group_size
    inputs = [m.in_features for m in model.modules() if isinstance(m, Linear) and not m.wide]
    if group != -1 and any(n % group for n in inputs):
        raise BadInput(
            f"--group_size: {group} does not divide {next(n for n in inputs if n % group)} inputs; "
            f"use {best_group(inputs)}"
        )
    kept = kept_modules(args.keep_16_bit, sorted(linear_names(model))) if args.keep_16_bit else ()
    symmetric = not args.asymmetric and args.quantizer != "hqq"
    rotation = "hadamard" if args.rotate else None
    q = Quantization(bits, group, symmetric, args.lm_head_bits or 8, kept, rotation)
    with torch.device("meta"):
        reshape(Transformer(model.config), q)
    return q


def build_parser() -> argparse.ArgumentParser:
    from generate import OneLineParser  # which imports this file

    p = OneLineParser(
        "quantize.py",
        description="Quantize a checkpoint, or convert a published 4-bit one.",
        allow_abbrev=False,
    )
    p.add_argument(
        "--checkpoint_path", required=True, help="a Hugging Face directory or hub repository id, in 16 bits "
        "or in 4 (AutoAWQ gemm, GPTQ, compressed-tensors): these are converted as they are"
    )  # fmt: skip
    p.add_argument("--precision", choices=list(PRECISIONS), default="w4a16", help="default: w4a16")
    p.add_argument(
        "--group_size", type=int, choices=[*GROUP_SIZES, -1], help="inputs that share a scale; -1: a row"
    )
    p.add_argument("--asymmetric", action="store_true", help="a zero for each group, not 8")
    p.add_argument("--quantizer", choices=QUANTIZERS, default="rtn", help="round to nearest (default), "
                   "with refined zeros, or with what the model computes on text in mind")  # fmt: skip
    p.add_argument("--calibration", metavar="FILE", help="for gptq: text, or .jsonl like --prompts of "
                   "generate.py; default: what the model, all of it in memory, writes itself")  # fmt: skip
    p.add_argument("--calibration_tokens", type=int, metavar="N", help="for gptq; default: 32768")
    p.add_argument("--rotate", action="store_true", help="spread large activations over all (QuaRot)")
    p.add_argument("--lm_head_bits", type=int, choices=[8, 16], help="default: 8")
    p.add_argument("--keep_16_bit", metavar="REGEX", help="modules that are not quantized")
    p.add_argument("--output", help="the directory to write; it must not exist yet")
    p.add_argument("--evaluate", type=int, nargs="?", const=16384, metavar="TOKENS",
                   help="perplexity before and after on held-out Python modules (16384)")  # fmt: skip
    p.set_defaults(chat=False)  # texts of --calibration are no conversations
    return p


def check_flags(args: argparse.Namespace) -> None:
    """What can be refused before anything is opened. Raises BadInput."""
    if not args.output and args.evaluate is None:
        raise BadInput("nothing to do: give --output DIR, --evaluate, or both")
    if args.evaluate is not None and args.evaluate < 100:
        raise BadInput(f"--evaluate is {args.evaluate}; a perplexity of fewer than 100 tokens says nothing")
    if args.quantizer != "gptq" and (args.calibration or args.calibration_tokens is not None):
        raise BadInput("--calibration and --calibration_tokens are for --quantizer gptq")
    if args.calibration_tokens is not None and args.calibration_tokens < CALIBRATION_LENGTH:
        raise BadInput(f"--calibration_tokens is {args.calibration_tokens}; use {CALIBRATION_LENGTH} or more")
    if args.output and Path(args.output).exists():
        raise BadInput(f"--output: {args.output} exists already")


def run(args: argparse.Namespace) -> None:
    import generate

    check_flags(args)
    generate.load_kernels()
    directory = generate.find_checkpoint(args.checkpoint_path)
    checkpoint = generate.open_checkpoint(directory)
    q, total = checkpoint.quantization, len(checkpoint.tensors)
    texts = held_out_tokens(directory) if args.evaluate else []
    if q is None:
        q = choose_quantization(args, checkpoint.model)
        tokens = calibration_texts(args, directory, checkpoint.model) if args.quantizer == "gptq" else None
        pieces = quantize_checkpoint(checkpoint.model, checkpoint.tensors, q, args.quantizer, tokens)
    else:
        check_conversion(args, checkpoint)
        pieces = ({name: stored.read()} for name, stored in checkpoint.tensors.items())
        if checkpoint.precision != "w4a16":
            print(f"the file asks for {checkpoint.precision}; ask for it with --precision", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(args.output or f"{scratch}/quantized")
        written = write_with_progress(output, directory, q, pieces, total)
        if args.output:
            before = sum(path.stat().st_size for path in checkpoint.files)
            print(f"{before / 1e6:.1f} MB -> {written / 1e6:.1f} MB in {output}", file=sys.stderr)
        if args.evaluate:
            for path, precision in {directory: checkpoint.precision, output: args.precision}.items():
                loss = mean_loss(generate.load_model(path, precision), texts, args.evaluate)
                perplexity = math.exp(loss)
                print(f"{precision:6} perplexity {perplexity:.4f}   ({loss:.4f} nats per token)", flush=True)


def check_conversion(args: argparse.Namespace, checkpoint) -> None:
    """A published 4-bit checkpoint keeps its integers; nothing about them is a choice. Raises BadInput."""
    directory, bits = checkpoint.directory, checkpoint.quantization.bits
    if checkpoint.published is None or PRECISIONS[args.precision][0] != bits:
        raise BadInput(f"--checkpoint_path: {directory} is quantized already, to {bits} bits")
    chosen = {"--group_size": args.group_size, "--asymmetric": args.asymmetric, "--rotate": args.rotate}
    chosen |= {"--lm_head_bits": args.lm_head_bits, "--keep_16_bit": args.keep_16_bit}
    chosen |= {"--quantizer": args.quantizer != "rtn"}
    for flag, value in chosen.items():
        if value:
            raise BadInput(f"{flag}: {directory} is {checkpoint.published}; it is converted as it is")


def write_with_progress(
    output: Path, source: Path, q: Quantization, pieces: Iterable[dict[str, Tensor]], total: int
) -> int:
    """`write_checkpoint`, and what goes wrong with the disk is about --output. -> weight bytes"""
    from safetensors import SafetensorError
    from tqdm import tqdm

    try:
        pieces = tqdm(pieces, "quantizing", total, unit="tensor", disable=None)
        return write_checkpoint(output, source, q, pieces)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"--output: {output} cannot be written: {error}") from None


def calibration_texts(args: argparse.Namespace, directory: Path, model: Transformer) -> Tensor:
    """Tokens of --calibration, or the model's own text, int64 [texts, n]. Raises BadInput."""
    import generate

    length = min(CALIBRATION_LENGTH, model.config.max_context)
    texts = (args.calibration_tokens or 32768) // length
    tokenizer = generate.load_tokenizer(directory)
    if args.calibration is None:
        return own_texts(directory, tokenizer, texts, length)
    if tokenizer is None:
        raise BadInput(
            f"--calibration: {directory} has no tokenizer; without the flag the model writes itself"
        )
    try:
        content = Path(args.calibration).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--calibration: {args.calibration} cannot be read as UTF-8: {error}") from None
    lines = content.split("\n") if args.calibration.endswith(".jsonl") else []
    try:
        ids = [token for line in lines if line.strip() for token in generate.read_line(line, args, tokenizer)]
    except BadInput as error:
        raise BadInput(f"--calibration: {args.calibration}: a line is {error}") from None
    ids = ids if lines else tokenizer.encode(content[: 32 * texts * length])  # more than enough
    if ids and not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
        wrong = next(token for token in ids if not 0 <= token < model.config.vocab_size)
        raise BadInput(
            f"--calibration: {args.calibration} has token {wrong}; the vocabulary ends at "
            f"{model.config.vocab_size - 1}"
        )
    if len(ids) < length:
        raise BadInput(
            f"--calibration: {args.calibration} has {len(ids)} tokens; at least {length} are needed"
        )
    whole = min(texts, len(ids) // length)
    return torch.tensor(ids[: whole * length]).view(whole, length)


def own_texts(directory: Path, tokenizer, texts: int, length: int) -> Tensor:
    """What a model writes by itself at temperature 1, from its BOS or else some token on: no data needed."""
    from tqdm import tqdm

    import generate
    from gpt_spec import Sampling
    from gpt_spec import generate as decode

    model = generate.load_model(directory)
    first = None if tokenizer is None else tokenizer.specials.get(tokenizer.bos)
    hashes = (kernels.mix(torch.arange(texts)) % model.config.vocab_size).tolist()
    prompts = [[token] if first is None else [first] for token in hashes]
    rows = [list(prompt) for prompt in prompts]
    with tqdm(total=texts * length, desc="writing text", unit="token", disable=None) as bar:
        for begin in range(0, texts, TOGETHER):
            now = prompts[begin : begin + TOGETHER]
            sampling, options = Sampling(1.0, seed=begin), {"batch_size": len(now), "compile": False}
            steps = decode(model, now, None, sampling, length - 1, **options)
            for emission in (emission for emissions in steps for emission in emissions):
                rows[begin + emission.prompt_index] += emission.tokens
                bar.update(len(emission.tokens))
    return torch.tensor(rows)


def held_out_tokens(directory: Path) -> list[list[int]]:
    """The held-out modules in the tokens of a checkpoint. Raises BadInput where there are none."""
    import generate

    tokenizer, texts = generate.load_tokenizer(directory), held_out_texts()
    if tokenizer is None or not texts:
        missing = "this Python has no source of its library" if tokenizer else f"{directory} has no tokenizer"
        raise BadInput(f"--evaluate: {missing}")
    return [tokenizer.encode(text) for text in texts]


def main(argv: list[str] | None = None) -> int:
    try:
        run(build_parser().parse_args(argv))
    except BadInput as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
