"""published.py: 4-bit checkpoints of other tools: AutoAWQ gemm, GPTQ, compressed-tensors.

    import published
    layout = published.find_layout(quantization_config, "config.json")
    tensors, q = published.translate(layout, tensors, model, "config.json")

This file knows how other tools name, shape and order their tensors. It does not find or open a checkpoint
(`checkpoints.py` does), and it never computes a weight: integers are kept bit by bit.

The one idea: all of these formats say w = (q - zero) * scale, as ours does (`packing.py`). So a published
checkpoint is a view: our names, with functions that read the tensors and reorder their nibbles.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from model import BadInput, Transformer
from packing import FLOAT_TYPES, STORED_GROUP_SIZES, Quantization, Stored, named_linears, pack_nibbles

READABLE = "AutoAWQ gemm, GPTQ and compressed-tensors pack-quantized, of 4 bits, are"
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds column 0, 1, ... of eight
IN_ORDER = tuple(range(8))

Forms = dict[str, list[tuple[str, tuple[int, ...]]]]  # (kind, shape) that a tensor may have, by suffix


def nibbles(words: Tensor, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """int32 [..., n] -> uint8 [..., 8 n]: number j of a word is its nibble order[j], from the lowest bits."""
    out = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for j, nibble in enumerate(order):
        out[..., j] = (words >> 4 * nibble) & 15
    return out.flatten(-2)


@dataclass
class Layout:
    """How one kind of published checkpoint stores a 4-bit linear. Each kind is a subclass.

    All of them say w = (q - zero) * scale. They differ in names, shapes and the order of nibbles.
    """

    group: int  # inputs that share a scale; -1: a whole row
    zero_offset: int = 0  # what is added to a stored zero, modulo 16
    activation_bits: int = 16

    name = ""
    integers, scales, zeros, index = "qweight", "scales", "qzeros", "g_idx"  # suffixes of the tensors
    optional = ("g_idx",)

    def forms(self, out: int, inputs: int, groups: int) -> Forms:
        """What the tensors of a linear may look like."""
        raise NotImplementedError

    def read_integers(self, stored: Tensor) -> Tensor:
        """-> uint8 [out, in]"""
        raise NotImplementedError

    def read_scales(self, stored: Tensor) -> Tensor:
        """-> [out, groups]"""
        return stored.T

    def read_zeros(self, stored: Tensor, out: int) -> Tensor:
        """-> uint8 [out, groups], before `zero_offset` is added"""
        return nibbles(stored).T


class AwqLayout(Layout):
    name = "AutoAWQ gemm"

    def forms(self, out: int, inputs: int, groups: int) -> Forms:
        return {
            "qweight": [("I32", (inputs, out // 8))],
            "qzeros": [("I32", (groups, out // 8))],
            "scales": [(kind, (groups, out)) for kind in FLOAT_TYPES],
        }

    def read_integers(self, stored: Tensor) -> Tensor:
        return nibbles(stored, AWQ_ORDER).T

    def read_zeros(self, stored: Tensor, out: int) -> Tensor:
        return nibbles(stored, AWQ_ORDER).T


class GptqLayout(Layout):
    name = "GPTQ"

    def forms(self, out: int, inputs: int, groups: int) -> Forms:
        return {
            "qweight": [("I32", (inputs // 8, out))],
            "qzeros": [("I32", (groups, out // 8))],
            "scales": [(kind, (groups, out)) for kind in FLOAT_TYPES],
            "g_idx": [("I32", (inputs,))],
        }

    def read_integers(self, stored: Tensor) -> Tensor:
        return nibbles(stored.T)


class CompressedLayout(Layout):
    name = "compressed-tensors"
    integers, scales, zeros, index = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
    optional = ("weight_zero_point", "weight_g_idx", "weight_shape")

    def forms(self, out: int, inputs: int, groups: int) -> Forms:
        return {
            "weight_packed": [("I32", (out, inputs // 8))],
            "weight_scale": [(kind, (out, groups)) for kind in FLOAT_TYPES],
            "weight_zero_point": [("I32", (-(-out // 8), groups)), ("I8", (out, groups))],
            "weight_g_idx": [("I32", (inputs,))],
            "weight_shape": [("I64", (2,)), ("I32", (2,))],
        }

    def read_integers(self, stored: Tensor) -> Tensor:
        return nibbles(stored)

    def read_scales(self, stored: Tensor) -> Tensor:
        return stored

    def read_zeros(self, stored: Tensor, out: int) -> Tensor:
        if stored.dtype == torch.int8:  # of older files: signed, and not packed
            return (stored + 8).to(torch.uint8)
        return nibbles(stored.T)[:, :out].T


# --------------------------------------------------------------------------------------------------
# What a quantization_config says
# --------------------------------------------------------------------------------------------------


def find_layout(raw: dict[str, Any], where: str) -> Layout:
    """The layout that a `quantization_config` describes. Raises BadInput for layouts that cannot be read."""
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
    """Raise BadInput for a format that this file does not read."""
    raise BadInput(f"{where}: {what} is not supported; {READABLE}")


def awq_layout(raw: dict[str, Any], where: str) -> Layout:
    """`find_layout` for AutoAWQ."""
    bits = raw.get("bits", raw.get("w_bit"))
    if bits != 4:
        refuse(where, f"AutoAWQ of {bits} bits")
    version = raw.get("version") or raw.get("checkpoint_format") or raw.get("format") or "gemm"
    if str(version).lower() != "gemm":
        refuse(where, f"AutoAWQ {version}")
    return AwqLayout(raw.get("group_size", raw.get("q_group_size")))


def gptq_layout(raw: dict[str, Any], where: str) -> Layout:
    """`find_layout` for GPTQ, as AutoGPTQ and GPTQModel write it."""
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
    """`find_layout` for compressed-tensors. All groups of modules must have one group size."""
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
    """The bits of activations: 8 for int8 tokens, else 16. A line is printed for what is not implemented."""
    wanted = [group.get("input_activations") for group in groups]
    ours = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    if all(a and all(a.get(key) == value for key, value in ours.items()) for a in wanted):
        return 8
    if any(wanted):
        print(f"{where}: asks for activations that we do not have; 16 bits it is", file=sys.stderr)
    return 16


# --------------------------------------------------------------------------------------------------
# Tensors of a published checkpoint, seen as ours
# --------------------------------------------------------------------------------------------------


@dataclass
class PublishedLinear:
    """One 4-bit linear of a published checkpoint. Methods raise BadInput, naming file and tensor."""

    layout: Layout
    module: str
    tensors: dict[str, Stored]
    out: int
    inputs: int
    group: int

    def read(self, suffix: str) -> Tensor:
        return self.tensors[f"{self.module}.{suffix}"].read()

    def wrong(self, suffix: str, what: str) -> BadInput:
        """The error about a tensor that is there."""
        name = f"{self.module}.{suffix}"
        return BadInput(f"{self.tensors[name].where}: {name} {what}")

    @property
    def has_zeros(self) -> bool:
        return f"{self.module}.{self.layout.zeros}" in self.tensors

    def check(self) -> None:
        """Raise BadInput if a tensor is missing, or has a form that its layout does not have."""
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

        `g_idx` decides, whatever the configuration says about act-order.
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
        """uint8 [out, in / 2], in `order`"""
        q, order = self.layout.read_integers(self.read(self.layout.integers)), self.order()
        return pack_nibbles(q if order is None else q[:, order])

    def half_scales(self) -> Tensor:
        """float16 [out, groups]. Exact for float16, and for bf16 from 2^-17 on; 0 below 2^-25."""
        scales = self.layout.read_scales(self.read(self.layout.scales)).half()
        if not scales.isfinite().all():
            raise self.wrong(self.layout.scales, "does not fit into float16")
        return scales

    def half_zeros(self) -> Tensor:
        """float16 [out, groups]"""
        if not self.has_zeros:
            return torch.full((self.out, self.inputs // self.group), 8.0, dtype=torch.float16)
        return ((self.stored_zeros() + self.layout.zero_offset) & 15).half()

    def view(self, symmetric: bool) -> dict[str, Stored]:
        """The tensors of this linear in our format."""
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

    Headers, zeros and group indices are read for that, weights are not. The tensors that are there decide
    what is quantized, whatever lists of modules the configuration has. Raises BadInput.
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
    """True if every zero of a checkpoint is 8.

    A GPTQ file stores zeros less one, or as they are (version 2). The label that says which is often wrong
    if all zeros are the same. Then they are 8, since no quantizer finds a zero of 7, or of 9, everywhere.
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
