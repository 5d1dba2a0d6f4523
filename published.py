"""published.py: 4-bit and 8-bit checkpoints of other tools: AutoAWQ, GPTQ, AutoRound, compressed-tensors.

    import published
    layout = published.find_layout(quantization_config, "config.json")
    tensors = published.drop_scales(tensors, quantization_config, "config.json")
    tensors, q = published.translate(layout, tensors, model, "config.json")

This file knows how other tools name, shape and order their tensors. It does not find or open a checkpoint
(`checkpoints.py` does), and it never computes a weight: integers are kept bit by bit.

The one idea: all of these formats say w = (q - zero) * scale, as ours does (`packing.py`). So a published
checkpoint is a view: our names, with functions that read the tensors and reorder their integers.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from model import BadInput, Transformer
from packing import FLOAT_TYPES, STORED_GROUP_SIZES, Quantization, Stored, named_linears, pack_nibbles

READABLE = "AutoAWQ gemm, GPTQ and compressed-tensors pack-quantized and int-quantized are"
IN_ORDER, AWQ_ORDER = tuple(range(8)), (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word for column 0, 1, ...
ONLINE = ("transform_config", "rotation", "rotation_config", "hadamard_config", "adapter")
DROPPED = re.compile(r"(^|\.)(input|output|q|k|v|kv|prob|prob_output)_((global_)?scale|zero_point)$")
NAMES = {  # whose tensors end like this
    "absmax": "bitsandbytes", "SCB": "bitsandbytes", "W_q": "HQQ", "codebooks": "AQLM", "Qidxs": "QuIP#",
    "q_weight": "EXL2", "trellis": "EXL3", "centroids.weight": "VPTQ", "weight_scale_2": "ModelOpt NVFP4",
    "weight_scale_inv": "fp8", "weight_blocks": "MXFP4", "lora_A.weight": "a LoRA adapter",
    "qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors", "weight_scale": "compressed-tensors",
}  # fmt: skip

Forms = dict[str, list[tuple[str, tuple[int, ...]]]]  # (kind, shape) that a tensor may have, by suffix


def unpack_words(words: Tensor, bits: int, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """int32 [..., n] -> uint8 [..., 32 / bits * n]: number j of a word is its field order[j], from the lowest
    bits."""
    fields = order[: 32 // bits]
    out = torch.empty(*words.shape, len(fields), dtype=torch.uint8)
    for j, field in enumerate(fields):
        out[..., j] = (words >> bits * field) & (1 << bits) - 1
    return out.flatten(-2)


def unsigned(stored: Tensor, bits: int) -> Tensor:
    """int8 from -2^(bits - 1) on -> uint8 from 0 on"""
    return (stored.short() + (1 << bits - 1)).to(torch.uint8)


@dataclass
class Layout:
    """How one kind of published checkpoint stores a quantized linear. Each kind is a subclass.

    All of them say w = (q - zero) * scale. They differ in names, shapes and the order of integers.
    """

    group: int  # inputs that share a scale; -1: a whole row
    bits: int = 4
    zero_offset: int = 0  # what is added to a stored zero, modulo 2^bits
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
        """-> [out, groups], or a single number for a whole matrix"""
        return stored.T

    def read_zeros(self, stored: Tensor, out: int) -> Tensor:
        """-> uint8 like the scales, before `zero_offset` is added"""
        return unpack_words(stored, self.bits).T


class AwqLayout(Layout):
    name = "AutoAWQ gemm"

    def forms(self, out: int, inputs: int, groups: int) -> Forms:
        return {
            "qweight": [("I32", (inputs, out // 8))],
            "qzeros": [("I32", (groups, out // 8))],
            "scales": [(kind, (groups, out)) for kind in FLOAT_TYPES],
        }

    def read_integers(self, stored: Tensor) -> Tensor:
        return unpack_words(stored, 4, AWQ_ORDER).T

    def read_zeros(self, stored: Tensor, out: int) -> Tensor:
        return unpack_words(stored, 4, AWQ_ORDER).T


class GptqLayout(Layout):
    name = "GPTQ"

    def forms(self, out: int, inputs: int, groups: int) -> Forms:
        word = 32 // self.bits
        return {
            "qweight": [("I32", (inputs // word, out))],
            "qzeros": [("I32", (groups, out // word))],
            "scales": [(kind, (groups, out)) for kind in FLOAT_TYPES],
            "g_idx": [("I32", (inputs,))],
        }

    def read_integers(self, stored: Tensor) -> Tensor:
        return unpack_words(stored.T, self.bits)


class PackedLayout(Layout):
    name = "compressed-tensors pack-quantized"
    integers, scales, zeros, index = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
    optional = ("weight_zero_point", "weight_g_idx", "weight_shape")

    def forms(self, out: int, inputs: int, groups: int) -> Forms:
        word = 32 // self.bits
        shapes = [(out, groups), *([(1,), ()] if self.group == -1 else [])]  # or one for a whole matrix
        return {
            "weight_packed": [("I32", (out, inputs // word))],
            "weight_scale": [(kind, shape) for kind in FLOAT_TYPES for shape in shapes],
            "weight_zero_point": [("I32", (-(-out // word), groups)), *(("I8", shape) for shape in shapes)],
            "weight_g_idx": [("I32", (inputs,))],
            "weight_shape": [("I64", (2,)), ("I32", (2,))],
        }

    def read_integers(self, stored: Tensor) -> Tensor:
        return unpack_words(stored, self.bits)

    def read_scales(self, stored: Tensor) -> Tensor:
        return stored

    def read_zeros(self, stored: Tensor, out: int) -> Tensor:
        if stored.dtype == torch.int8:  # of older files: signed, and not packed
            return unsigned(stored, self.bits)
        return unpack_words(stored.T, self.bits)[:, :out].T


class IntLayout(PackedLayout):
    """A number a byte, signed."""

    name = "compressed-tensors int-quantized"
    integers = "weight"

    def forms(self, out: int, inputs: int, groups: int) -> Forms:
        forms = super().forms(out, inputs, groups)
        del forms["weight_packed"]
        return forms | {"weight": [("I8", (out, inputs))]}

    def read_integers(self, stored: Tensor) -> Tensor:
        return unsigned(stored, self.bits)


# --------------------------------------------------------------------------------------------------
# What a quantization_config says
# --------------------------------------------------------------------------------------------------


def find_layout(raw: dict[str, Any], where: str) -> Layout | None:
    """The layout that a `quantization_config` describes; None if only the cache is to be quantized.

    Raises BadInput for layouts that cannot be read.
    """
    method = raw.get("quant_method")
    readers = {"awq": awq_layout, "gptq": gptq_layout, "compressed-tensors": compressed_layout}
    readers |= {"auto-round": auto_round_layout, "intel/auto-round": auto_round_layout}
    if not isinstance(method, str) or method not in readers:
        if method is None and {"bits", "group_size"} <= raw.keys() and "sym" not in raw:  # all that MLX says
            refuse(where, "MLX")
        refuse(where, f"quant_method {method!r}" + (f" ({raw['quant_algo']})" if "quant_algo" in raw else ""))
    for key in ONLINE:  # what the tensors do not show
        if raw.get(key):
            refuse(where, f"{method} with {'an' if key == 'adapter' else 'a'} {key}")
    try:
        layout = readers[method](with_numbers(raw, where), where)
    except (TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"{where}: the quantization_config is not understood: {error!r}") from None
    if layout and (type(layout.group) is not int or layout.group not in STORED_GROUP_SIZES):
        sizes = ", ".join(map(str, STORED_GROUP_SIZES))
        raise BadInput(f"{where}: group_size {layout.group!r} is not supported; {sizes} are")
    return layout


def refuse(where: str, what: str) -> NoReturn:
    """Raise BadInput for a format that this file does not read."""
    raise BadInput(f"{where}: {what} is not supported; {READABLE}")


def with_numbers(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The same settings with numbers where bits and group sizes are text. BadInput for text that is none."""
    keys = ("bits", "w_bit", "num_bits", "group_size", "q_group_size")
    texts = {key: raw[key] for key in keys if isinstance(raw.get(key), str)}
    for key, text in texts.items():
        if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
            raise BadInput(f"{where}: {key} is {text!r}, which is no whole number")
    return raw | {key: int(text) for key, text in texts.items()}


def check_bits(bits: Any, known: tuple[int, ...], tool: str, where: str) -> int:
    """`bits` as they are. BadInput, naming the tool, if they are not known."""
    if type(bits) is not int or bits not in known:
        refuse(where, f"{tool} of {bits} bits")
    return bits


def awq_layout(raw: dict[str, Any], where: str) -> Layout:
    """`find_layout` for AutoAWQ."""
    check_bits(raw.get("bits", raw.get("w_bit")), (4,), "AutoAWQ", where)
    version = raw.get("version") or raw.get("checkpoint_format") or raw.get("format") or "gemm"
    if str(version).lower() != "gemm":
        refuse(where, f"AutoAWQ {version}")
    return AwqLayout(raw.get("group_size", raw.get("q_group_size")))


def gptq_layout(raw: dict[str, Any], where: str) -> Layout:
    """`find_layout` for GPTQ, as AutoGPTQ and GPTQModel write it."""
    form = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    form = "marlin" if raw.get("is_marlin_format") else form
    bits = check_bits(raw.get("bits"), (4, 8), "GPTQ", where)
    if form not in ("gptq", "gptq_v2"):
        refuse(where, f"GPTQ with checkpoint_format {form!r}")
    if raw.get("pack_dtype", "int32") != "int32":
        refuse(where, f"GPTQ packed into {raw['pack_dtype']}")
    for pattern, other in (raw.get("dynamic") or {}).items():  # what "-:" excludes is seen by its tensors
        check_exception("GPTQ", raw, pattern, {} if pattern.startswith("-") else other or {}, where)
    return GptqLayout(raw.get("group_size"), bits, zero_offset=0 if form == "gptq_v2" else 1)


def check_exception(tool: str, raw: dict[str, Any], module: str, other: dict[str, Any], where: str) -> None:
    """Raise BadInput if some modules have other bits or groups than the rest; 16 bits are no quantization."""
    other = with_numbers(other, where)
    changed = [key for key in ("bits", "group_size") if other.get(key, raw.get(key)) != raw.get(key)]
    if changed and other.get("bits") not in (16, 32):
        refuse(where, f"{tool} with another {changed[0]} for {module!r}")


def auto_round_layout(raw: dict[str, Any], where: str) -> Layout:
    """`find_layout` for AutoRound, which packs as AutoGPTQ and as AutoAWQ do."""
    packing = raw.get("packing_format")
    layouts = {"auto_round:auto_gptq": gptq_layout, "auto_round:auto_awq": awq_layout}
    if packing not in layouts:
        refuse(where, f"AutoRound with packing_format {packing!r}")
    if raw.get("data_type", "int") != "int" or (raw.get("act_bits") or 16) < 16:
        refuse(where, f"AutoRound with data_type {raw.get('data_type')!r}, act_bits {raw.get('act_bits')}")
    for module, other in (raw.get("extra_config") or {}).items():
        check_exception("AutoRound", raw, module, other, where)
    return layouts[packing]({key: raw.get(key) for key in ("bits", "group_size")}, where)


def compressed_layout(raw: dict[str, Any], where: str) -> Layout | None:
    """`find_layout` for compressed-tensors. All groups of modules must have one size of groups."""
    groups = [group for group in raw["config_groups"].values() if group.get("weights")]
    sparsity = (raw.get("sparsity_config") or {}).get("format") or "dense"
    if sparsity != "dense":
        refuse(where, f"compressed-tensors {sparsity}")
    if not groups and raw.get("kv_cache_scheme"):
        return None
    if not groups:
        refuse(where, "compressed-tensors without quantized weights")
    kinds = {"pack-quantized": PackedLayout, "int-quantized": IntLayout, "naive-quantized": IntLayout}
    forms = {raw.get("format"), *(group.get("format") for group in groups)} - {None} or {"pack-quantized"}
    for form in forms:
        if form not in kinds:
            refuse(where, f"compressed-tensors {form}")
    widths = set()
    for weights in (with_numbers(group["weights"], where) for group in groups):
        if weights.get("type", "int") != "int":
            refuse(where, f"compressed-tensors {weights['type']} of {weights.get('num_bits')} bits")
        bits = check_bits(weights.get("num_bits"), (4, 8), "compressed-tensors int", where)
        strategy = weights.get("strategy")
        if strategy not in ("group", "channel", "tensor"):
            refuse(where, f"compressed-tensors with strategy {strategy!r}")
        widths.add((bits, weights["group_size"] if strategy == "group" else -1))
    if len(widths) != 1 or len(forms) != 1:
        mixed = ", ".join(f"{bits} bits in groups of {size}" for bits, size in sorted(widths, key=str))
        refuse(where, f"compressed-tensors that mixes {', '.join(sorted(forms))}: {mixed}")
    [(bits, size)] = widths
    wanted = [group.get("input_activations") or {} for group in groups]
    eight = all((a.get("num_bits"), a.get("type", "int")) == (8, "int") for a in wanted)
    return kinds[forms.pop()](size, bits, activation_bits=8 if eight else 16)


def unmet_wishes(raw: dict[str, Any]) -> list[str]:
    """What a `quantization_config` that has been read asks for and does not get."""
    groups = list(raw["config_groups"].values()) if raw.get("quant_method") == "compressed-tensors" else []
    wanted = [group.get("input_activations") for group in groups]
    ours = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    usual = {"type": "int", "symmetric": True}  # what is not said means this
    same = all(a and usual | {key: a[key] for key in ours if key in a} == ours for a in wanted)
    wishes = ["a quantized cache"] if raw.get("kv_cache_scheme") else []
    wishes += ["quantized outputs"] if any(group.get("output_activations") for group in groups) else []
    return wishes + (["activations that we do not have"] if any(wanted) and not same else [])


def drop_scales(
    tensors: dict[str, Stored], raw: dict[str, Any] | None, layout: Layout | None, where: str
) -> dict[str, Stored]:
    """The tensors without scales of quantized caches and static activations, which this engine does not have.

    One line says so, and what else the configuration asks for in vain.
    """
    dropped = [name for name in tensors if DROPPED.search(name)]
    wishes = unmet_wishes(raw or {})
    if dropped or wishes:
        eight = layout is not None and layout.activation_bits == 8
        ours = "int8 activations with a scale for each token, and a 16-bit cache," if eight else "16 bits"
        asks = f"asks for {' and '.join(wishes)}" if wishes else "has scales of a cache or of activations"
        lost = f"; {len(dropped)} scales like {dropped[0]} are dropped" if dropped else ""
        print(f"{where}: {asks}; {ours} it is{lost}", file=sys.stderr)
    return {name: stored for name, stored in tensors.items() if name not in dropped}


def refuse_foreign(tensors: dict[str, Stored], where: str) -> None:
    """Raise BadInput, naming the tool, for tensors of another tool that no configuration tells of."""
    for name, stored in tensors.items():
        tool = next((tool for suffix, tool in NAMES.items() if name.endswith(f".{suffix}")), None)
        if name.endswith(".scales") and f"{name.removesuffix('scales')}biases" in tensors:
            tool = "MLX"
        if tool:
            raise BadInput(
                f"{stored.where}: {name} is of {tool}, of which {where} says nothing; {READABLE} read"
            )


# --------------------------------------------------------------------------------------------------
# Tensors of a published checkpoint, seen as ours
# --------------------------------------------------------------------------------------------------


@dataclass
class PublishedLinear:
    """One linear of a published checkpoint. Methods raise BadInput, naming file and tensor."""

    layout: Layout
    module: str
    tensors: dict[str, Stored]
    out: int
    inputs: int
    ours: int  # inputs that share a scale in our format: `group`, or a part of it
    symmetric: bool = False  # the zero is the middle, whatever the file says

    @property
    def group(self) -> int:
        """Inputs that share a scale in the file; the last group of a row may have less."""
        return self.inputs if self.layout.group == -1 else min(self.layout.group, self.inputs)

    @property
    def groups(self) -> int:
        """Scales of a row in the file."""
        return -(-self.inputs // self.group)

    def spread(self, numbers: Tensor) -> Tensor:
        """[out, groups], or a single number for a whole matrix -> [out, in / ours]"""
        first = torch.arange(0, self.inputs, self.ours)
        return numbers.reshape(-1, self.groups).expand(self.out, -1)[:, first // self.group]

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
        name, integers, word = self.layout.name, self.layout.integers, 32 // self.layout.bits
        if self.out % word and not isinstance(self.layout, PackedLayout):
            what = f"has {self.out} outputs by config.json, but {name} packs {word} into a word"
            raise self.wrong(integers, what)
        for suffix, forms in self.layout.forms(self.out, self.inputs, self.groups).items():
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
        """uint8 [out, groups], or a single one"""
        return self.layout.read_zeros(self.read_signed(self.layout.zeros), self.out)

    def read_signed(self, suffix: str) -> Tensor:
        """A tensor of integers; those of a byte each must be of so many bits."""
        stored, limit = self.read(suffix), 1 << self.layout.bits - 1
        if stored.dtype == torch.int8 and not -limit <= int(stored.min()) <= int(stored.max()) < limit:
            raise self.wrong(suffix, f"is not within {-limit} and {limit - 1}")
        return stored

    def ordered(self) -> Tensor:
        """uint8 [out, in], in `order`"""
        q, order = self.layout.read_integers(self.read_signed(self.layout.integers)), self.order()
        return q if order is None else q[:, order]

    def packed(self) -> Tensor:
        """uint8 [out, in / 2] of 4 bits"""
        return pack_nibbles(self.ordered())

    def quantized(self) -> Tensor:
        """int8 [out, in] of 8 bits: less 128, the zero"""
        return (self.ordered() ^ 128).view(torch.int8)

    def half_scales(self) -> Tensor:
        """float16 [out, in / ours]. Exact for float16, and for bf16 from 2^-17 on."""
        scales = self.spread(self.layout.read_scales(self.read(self.layout.scales)))
        half = scales.half()
        if not half.isfinite().all():
            raise self.wrong(self.layout.scales, "does not fit into float16")
        lost = (half == 0) & (scales != 0)  # [out, in / ours]; of weights that are 0 it is never missed
        if lost.any():
            q, zeros = self.ordered().unflatten(1, (-1, self.ours)), self.half_zeros()[..., None]
            if (q != zeros)[lost].any():
                raise self.wrong(self.layout.scales, "has scales that are 0 in float16")
        return half

    def half_zeros(self) -> Tensor:
        """float16 [out, in / ours]"""
        if self.symmetric or not self.has_zeros:
            middle = float(1 << self.layout.bits - 1)
            return torch.full((self.out, self.inputs // self.ours), middle, dtype=torch.float16)
        most = (1 << self.layout.bits) - 1
        return self.spread((self.stored_zeros() + self.layout.zero_offset) & most).half()

    def view(self) -> dict[str, Stored]:
        """The tensors of this linear in our format."""
        groups = (self.out, self.inputs // self.ours)
        where = self.tensors[f"{self.module}.{self.layout.integers}"].where
        view = {"scales": Stored(groups, "F16", where, self.half_scales)}
        if self.layout.bits == 8:
            view["quantized"] = Stored((self.out, self.inputs), "I8", where, self.quantized)
        else:
            view["packed"] = Stored((self.out, self.inputs // 2), "U8", where, self.packed)
        if not self.symmetric:
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
    names = {module: f"{module}.{layout.integers}" for module in shapes}
    present = [m for m, name in names.items() if name in tensors and tensors[name].kind not in FLOAT_TYPES]
    if not present:
        raise BadInput(
            f"{where}: says {layout.name}, but no linear has a tensor {layout.integers} of integers"
        )
    kept = tuple(module for module in shapes if module not in present and module != "lm_head")
    group = common_group(layout, [shapes[module][1] for module in present])
    q = Quantization(layout.bits, group, True, layout.bits if "lm_head" in present else 16, kept)
    linears = []
    for module in present:
        try:
            ours = q.group_of(module, shapes[module][1])
        except BadInput as error:
            raise BadInput(f"{tensors[names[module]].where}: {error}") from None
        linears.append(PublishedLinear(layout, module, tensors, *shapes[module], ours))
        linears[-1].check()
    symmetric = zeros_are_symmetric(layout, linears, where)
    suffixes = tuple(f".{suffix}" for suffix in layout.forms(8, 8, 1))
    used = {name for name in tensors if name.endswith(suffixes) and name.rpartition(".")[0] in present}
    view = {name: stored for name, stored in tensors.items() if name not in used | empty}
    for linear in linears:
        view |= replace(linear, symmetric=symmetric).view()
    return view, replace(q, symmetric=symmetric)


def common_group(layout: Layout, inputs: list[int]) -> int:
    """The group size of ours that holds what a file says. `inputs`: of every linear.

    Where groups do not divide the inputs the last one is shorter. Then parts of groups that do, each with
    the scale of the whole, say the same.
    """
    if layout.group == -1:
        return -1
    parts = [size for size in STORED_GROUP_SIZES if size > 0 and layout.group % size == 0]
    fit = [size for size in parts if all(n % size == 0 or n < size for n in inputs)]
    return max(fit, default=layout.group)


def zeros_are_symmetric(layout: Layout, linears: list[PublishedLinear], where: str) -> bool:
    """True if every zero of a checkpoint is 8, or 128 of 8 bits. BadInput for other zeros of 8 bits.

    A GPTQ file stores zeros less one, or as they are (version 2). The label that says which is often wrong
    if all zeros are the same. Then they are 8, since no quantizer finds a zero of 7, or of 9, everywhere.
    """
    values, middle = set(), 1 << layout.bits - 1
    for linear in linears:
        values |= set(linear.stored_zeros().unique().tolist()) if linear.has_zeros else {middle}
    if values == {middle} or (isinstance(layout, GptqLayout) and values == {middle - 1}):
        return True
    if layout.bits == 8:
        refuse(where, f"asymmetric {layout.name} of 8 bits")
    if isinstance(layout, GptqLayout):
        version = f"version {1 if layout.zero_offset else 2}, as labelled"
        print(f"{where}: asymmetric GPTQ; its zeros are taken for {version}", file=sys.stderr)
    return False
