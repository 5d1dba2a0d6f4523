"""packing.py: weights of 4 and 8 bits, how they are made, and how a file holds them.

    import packing
    q = packing.default_quantization(model, "w4a16")        # symmetric, groups of 128, lm_head in 8 bits
    packing.quantize_weight("lm_head", weight, q)           # -> the tensors that a file has for it
    packing.share_weights(model, "w4a8")                    # the same weights, other activations

This file knows tensors and models. It does not open files, and it does not know how another tool stores its
weights (`published.py`), what a rotation is (`rotation.py`), or where to find data (`quantize.py`).

The one idea: a 4-bit weight is w = (q - zero) * scale, with one scale (and perhaps one zero) for each group
of neighbouring inputs. Every method (round to nearest, HQQ, GPTQ; ours or another tool's) only chooses q,
zero and scale. So there is one format, and everything else is a view of it: a checkpoint is a dictionary of
tensors known by their headers (`Stored`), and a rotated or a published checkpoint is the same
dictionary with other functions that read the tensors.

A file has, for a linear with the Hugging Face module path NAME:

    NAME.packed     uint8 [out, in / 2]             4 bits; the low nibble is the even input
    NAME.quantized  int8 [out, in]                  8 bits, symmetric; ours have one scale a row
    NAME.scales     float16 [out, in / group] or [out, 1]
    NAME.zeros      float16 [out, in / group]       only if asymmetric; symmetric means zero = 8
    NAME.permutation  int32 [in]                    only if its columns are in another order than its inputs

and everything else under its own name; the metadata `gpt_spec` is the JSON of `Quantization`. Nothing in a
file depends on a device. The order that a kernel wants is made when the file is loaded.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from model import BadInput, CheckpointModule, LanguageHead, Linear, Transformer

PRECISIONS = {"w8a16": (8, 16), "w8a8": (8, 8), "w4a16": (4, 16), "w4a8": (4, 8), "w4a4": (4, 4)}
GROUP_SIZES = (128, 64, 32)  # that we make; also -1: one group for the whole row
STORED_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, -1)  # that other tools make
FORMAT_VERSION = 1
FLOAT_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors says
CHUNK = 2**18  # weights that are worked on together: they stay in the cache
SMALLEST = 2.0**-24  # float16 above 0
SHRINK = [1 - i / 40 for i in range(16)]  # shares of a group's range that the clip search tries


# --------------------------------------------------------------------------------------------------
# What is quantized how
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantization:
    """The format of a checkpoint's weights; the metadata of its files, as JSON."""

    bits: int  # 8 or 4, of every linear of the layers but those below
    group: int = -1  # inputs that share a scale; -1: all of a row, as for an lm_head of other bits
    symmetric: bool = True
    lm_head_bits: int = 16  # or 8, or 4
    modules_16_bit: tuple[str, ...] = ()  # Hugging Face module paths
    rotation: str | None = None  # or "hadamard": see rotation.py
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
        """The bits, 16, 8 or 4, of a Hugging Face module path like model.layers.0.self_attn.q_proj."""
        if module in self.modules_16_bit:
            return 16
        return self.lm_head_bits if module == "lm_head" else self.bits

    def group_of(self, module: str, inputs: int) -> int:
        """Inputs that share a scale. Raises BadInput where they do not come out even."""
        whole = self.group == -1 or self.group > inputs or self.bits_of(module) != self.bits
        group = inputs if whole else self.group
        if inputs % group or group % kernels.LANES:
            if inputs % kernels.LANES:
                raise BadInput(f"{module} has {inputs} inputs, no multiple of 16: it cannot be quantized")
            raise BadInput(f"{module} has {inputs} inputs, no multiple of a group of {group}")
        return group


def named_linears(model: nn.Module) -> list[tuple[str, Linear]]:
    """(path, module) of every linear of a model, or of a part of it."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Linear)]


def linear_names(model: CheckpointModule) -> set[str]:
    """Hugging Face module paths of everything that may be quantized."""
    return {part for path, linear in named_linears(model) for part in model.parts(path, linear.out_features)}


def best_group(inputs: list[int]) -> int:
    """The largest group size that divides all of these, else -1."""
    return next((g for g in GROUP_SIZES if all(n % g == 0 for n in inputs)), -1)


def default_quantization(
    model: CheckpointModule, precision: str, lm_head_bits: int | None = None
) -> Quantization:
    """What `--precision` means for a 16-bit checkpoint: symmetric, groups of 128, lm_head in 8 bits.

    Raises BadInput for a 4-bit lm_head of an 8-bit model. A file has one size of groups, and 8-bit weights
    have a scale a row, which is too few for 4 bits.
    """
    bits, _ = PRECISIONS[precision]
    if lm_head_bits == 4 and bits == 8:
        raise BadInput(f"--lm_head_bits 4 is for 4-bit weights, not for {precision}; use 8 or 16")
    inputs = [m.in_features for m in model.modules() if isinstance(m, Linear) and not m.float32_out]
    return Quantization(bits, best_group(inputs) if bits == 4 else -1, lm_head_bits=lm_head_bits or 8)


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
    """Choose the activations of a quantized model. 8-bit weights never meet 4-bit ones, nor does lm_head.

    Nothing comes after lm_head that could make good what rounding does to its inputs, and the order of close
    logits is the text. It is one matrix of many, so 8 bits there cost little.
    """
    _, activation_bits = PRECISIONS[precision]
    for linear in model.modules():
        if isinstance(linear, Linear) and linear.scales is not None:
            eight = linear.weight.dtype == torch.int8 or isinstance(linear, LanguageHead)
            linear.activation_bits = max(activation_bits, 8) if eight else activation_bits


def precision_of(model: Transformer) -> str:
    """The precision name of a loaded model."""
    for linear in model.modules():  # lm_head is the last of them
        if isinstance(linear, Linear) and linear.scales is not None:
            form = (8 if linear.weight.dtype == torch.int8 else 4, linear.activation_bits)
            return next(name for name, widths in PRECISIONS.items() if widths == form)
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[model.norm.weight.dtype]


def lower_precisions(precision: str) -> list[str]:
    """Precisions of the same weights with fewer bits of activations, the next one first."""
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
    return (w / scale).add_(zero).round_().clamp_(0, 15)


def shrunk(low: Tensor, high: Tensor, shrink: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero [groups, 1] for groups of weights from `low` to `high` [groups, 1], shrunk.

    The range includes 0, so that a zero lies between 0 and 15, where float16 is precise.
    """
    scale = shrink * (torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15)  # [groups, 1]
    scale = scale.clamp(min=SMALLEST).half().float()  # what the file will say
    return scale, torch.full_like(scale, 8.0) if symmetric else (-shrink * low / scale).half().float()


def fit_groups(w: Tensor, symmetric: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """w float32 [groups, group] -> the best scale and zero of each group, [groups, 1].

    Of the ranges of SHRINK, each group keeps the one with the smallest sum of squared errors, weighted with
    `importance` [groups, group] if there is any.
    """
    low, high = (edge.unsqueeze(1) for edge in torch.aminmax(w, dim=1))  # [groups, 1]
    low, high = low.clamp(max=0), high.clamp(min=0)
    best = [torch.full_like(low, math.inf)] * 3  # error, scale, zero: [groups, 1]
    for shrink in SHRINK:
        scale, zero = shrunk(low, high, shrink, symmetric)
        # In place: this is most of the time of quantizing.
        error = to_integers(w, scale, zero).sub_(zero).mul_(scale).sub_(w).square_()
        error = (error if importance is None else error * importance).sum(dim=1, keepdim=True)
        better = error < best[0]
        best = [torch.where(better, new, old) for new, old in zip((error, scale, zero), best)]
    return best[1], best[2]


def refine_zeros(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Better zeros for groups w [groups, group] whose scales stay: HQQ (Badri and Shaji, 2023).

    This minimizes the sum of |error|^0.7, in which a few large errors matter less, by half-quadratic
    splitting. In turn, `outliers` takes large errors out of the sum, and the zero is fitted to the rest.
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


# --------------------------------------------------------------------------------------------------
# Tensors of a file
# --------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of a checkpoint: what its header says, and a function that reads it."""

    shape: tuple[int, ...]
    kind: str  # as safetensors has it: F32, BF16, F16, I32, U8, ...
    where: Path
    read: Callable[[], Tensor]


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
    """A quantized weight under the names of a file. BadInput for what float16 scales cannot hold."""
    extremes = [each for tensor in (weight, scales) for each in tensor.aminmax()]  # NaN, if there is one
    if not torch.stack([each.float() for each in extremes]).isfinite().all():
        raise BadInput(f"{module}.weight holds infinities, NaN or huge numbers, which cannot be quantized")
    tensors = {"quantized" if integers.dtype == torch.int8 else "packed": integers}
    tensors |= {"scales": scales} if zeros is None else {"scales": scales, "zeros": zeros}
    return {f"{module}.{kind}": tensor for kind, tensor in tensors.items()}


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


def set_apart(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors of a file, a NAME.weight on the meta device standing for each quantized one; these)."""
    plain, packed = {}, {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("packed", "quantized", "scales", "zeros") or tensor.dim() != 2:
            plain[name] = tensor
            continue
        packed[name] = tensor
        if kind in ("packed", "quantized"):
            inputs = tensor.shape[1] * (2 if kind == "packed" else 1)
            plain[f"{module}.weight"] = torch.empty(len(tensor), inputs, dtype=torch.bfloat16, device="meta")
    return plain, packed


def check_permutations(tensors: dict[str, Stored], model: Transformer) -> frozenset[str]:
    """The modules that have a permutation.

    Raises BadInput for one that is none, or that is not the same for all parts of a matrix.
    """
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
