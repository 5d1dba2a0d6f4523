"""head_files.py: what heads of all kinds have in common on a disk: files, shapes, states, vocabularies.

`heads.py` and `block_heads.py` make heads of this. A head is opened as `Published`: tensors under our names,
and what the configuration says. They take from it what they know, and `fill_head` does the rest.

The one idea: tensors decide. A bias, a norm, a second layer or an embedding is used if it is there. What
changes the arithmetic and is not understood is refused by name.
"""

from __future__ import annotations

import re
import sys
import zipfile
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints import (
    ALL_PRECISIONS,
    DTYPES,
    find_checkpoint,
    stored_quantization,
    stored_tensors,
    tensor_names,
    weight_files,
)
from drafts import check_vocabulary
from eagle import EagleHead
from model import BadInput, ModelConfig, Transformer, integer, rope_frequencies
from packing import (
    PRECISIONS,
    Quantization,
    convert,
    default_quantization,
    linear_names,
    precision_of,
    reshape,
    set_apart,
    set_precision,
)
from text import read_json

# What the trainers call the same tensor, in this order: a pattern, and what stands for it.
RENAMED = (
    (r"^model\.", ""),  # NeMo
    (r"^midlayer\.(\d+)\.", r"layers.\1."),
    (r"^midlayer\.", "layers.0."),
    (r"^fc_norms\.", "fc_norm."),
    (r"^aux_norm_low\.", "fc_norm.0."),
    (r"^aux_norm_mid\.", "fc_norm.1."),
    (r"^aux_norm_high\.", "fc_norm.2."),
)
USELESS = r"rotary_emb\.inv_freq$"  # made from the configuration
FOREIGN = {  # parts of names that only other kinds of heads have
    "mask_hidden": "P-EAGLE, which drafts several tokens in one pass",
    "kv_a_proj": "latent attention (MLA)",
    "eh_proj": "another way into the first layer",
    "enorm": "another way into the first layer",
    "markov_": "a DSpark head",
    "confidence_": "a DSpark head",
    "prefix_gru": "a Domino head",
    "embed_proj": "an embedding that is projected",
    "experts": "a mixture of experts",
}
SWITCHES = (  # that leave no trace in the tensors, or must agree with them; the last is a key of ours
    "norm_before_residual", "norm_output", "return_hidden_post_norm", "norm_before_fc", "fc_norm",
    "double_norm",
)  # fmt: skip
# Parts of keys that may change the arithmetic, and the keys with such parts that are read or say nothing.
DOUBTFUL = r"norm|scale|scaling|multiplier|softcap|clip|mask_token|pard_token"
PLAIN = {"rms_norm_eps", "layer_norm_eps", "rope_scaling", "use_qk_norm", *SWITCHES}


@dataclass(frozen=True)
class Published:
    """A head as it lies in a directory: the tensors under our names, and what the configuration says."""

    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    target: ModelConfig
    where: str  # the configuration, for messages
    quiet: bool = False  # without notes
    packed: dict[str, Tensor] = field(default_factory=dict)  # those that are quantized in the file
    quantization: Quantization | None = None  # of the file
    precision: str | None = None  # to be loaded in

    def refuse(self, what: str) -> BadInput:
        return BadInput(f"{self.where}: {what}")

    def note(self, what: str, measured: bool = True) -> None:
        if not self.quiet:
            both = "; --check_head measures both" if measured else ""
            print(f"{self.where}: {what}{both}", file=sys.stderr)

    def part(self, name: str) -> dict[str, Any]:
        """A nested part of the configuration; empty if there is none."""
        value = self.raw.get(name)
        if not isinstance(value, dict | None):
            raise self.refuse(f"{name} is {value!r}; it must be an object")
        return value or {}

    @property
    def layer_config(self) -> dict[str, Any]:
        """Where the shapes of the layers and RoPE are."""
        return self.part("transformer_layer_config") or self.raw

    @property
    def is_speculators(self) -> bool:
        nested = bool(self.part("transformer_layer_config"))
        return nested or self.raw.get("speculators_model_type") is not None

    @property
    def architectures(self) -> list[str]:
        names = self.raw.get("architectures") or []
        return names if isinstance(names, list) else [names]

    @cached_property
    def is_third(self) -> bool:
        """EAGLE-3 or 3.1, not EAGLE-1 or 2? BadInput for neither."""
        q, fc = self.tensors.get("layers.0.self_attn.q_proj.weight"), self.tensors.get("fc.weight")
        if "hidden_norm.weight" in self.tensors:
            raise self.refuse("the weights are those of a block head: --dflash_checkpoint_path")
        if q is None or fc is None or fc.dim() != 2:
            raise self.refuse("the weights beside it are those of no EAGLE-2 or EAGLE-3 head")
        return "layers.0.hidden_norm.weight" in self.tensors

    def switch(self, *names: str) -> bool | None:
        """What these keys say, wherever they are; None if none is there. BadInput if they disagree."""
        places = (("", self.raw), ("eagle_config.", self.part("eagle_config")))
        said = {begin + name: place.get(name) for name in names for begin, place in places}
        said = {name: value for name, value in said.items() if value is not None}
        for name, value in said.items():
            if not isinstance(value, bool):
                raise self.refuse(f"{name} is {value!r}; it must be true or false")
        if len(set(said.values())) > 1:
            raise self.refuse(f"{' and '.join(said)} say different things")
        return next(iter(said.values()), None)

    def norm(self, name: str, key: str) -> bool:
        """Is there such a norm? A key that says something else than the tensors is refused."""
        there, said = any(each.startswith(f"{name}.") for each in self.tensors), self.switch(key)
        if said not in (None, there):
            weights = f"the weights {'have' if there else 'lack'} {name}"
            raise self.refuse(f"{key} is {str(said).lower()}, but {weights}")
        return there


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def open_head(
    path: str | Path, target: Transformer, precision: str | None, flag: str, quiet: bool
) -> Published:
    """A head as it is published, for a target whose dtype it can have."""
    directory, like = find_checkpoint(str(path), flag), target.norm.weight
    where, raw = str(directory / "config.json"), read_json(directory / "config.json", required=True)
    if precision not in (None, *ALL_PRECISIONS):
        raise BadInput(f"precision {precision!r} is none of {', '.join(ALL_PRECISIONS)}")
    whole = any(directory.glob("model*.safetensors*"))
    q = stored_quantization(weight_files(directory)) if whole else None
    if q is not None:
        _, activation_bits = PRECISIONS.get(precision_of(target), (16, 16))
        precision = precision or f"w{q.bits}a{max(activation_bits, 8)}"
        if PRECISIONS.get(precision, (16, 16))[0] != q.bits:
            own = f"{directory} has {q.bits}-bit weights"
            raise BadInput(f"--draft_precision: {own}, not those of {precision}")
    dtype = like.dtype if precision is None else DTYPES.get(precision, torch.bfloat16)
    if dtype != like.dtype:
        own = f" ({directory} has {q.bits}-bit weights)" if q else ""
        both = "a head shares weights with its target, so both are fp32, or neither"
        raise BadInput(f"--draft_precision: {both}{own}")
    tensors = renamed(read_head(directory), where)
    tensors, packed = (tensors, {}) if q is None else set_apart(tensors)
    return Published(raw, tensors, target.config, where, quiet, packed, q, precision)


def read_head(directory: Path) -> dict[str, Tensor]:
    """The tensors of a published head, by name, from safetensors files or from a pytorch_model.bin."""
    if any(directory.glob("model*.safetensors*")):
        return {name: stored.read() for name, stored in stored_tensors(weight_files(directory)).items()}
    path = directory / "pytorch_model.bin"
    if not path.exists():
        raise BadInput(f"{directory}: has no weights; model.safetensors or pytorch_model.bin is needed")
    try:
        # Weights only: a downloaded pickle must not run code.
        mapped = zipfile.is_zipfile(path)  # as PyTorch has written them since 1.6
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises what pickle, zipfile and itself do
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: not a whole file of weights ({reason})") from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise BadInput(f"{path}: holds something else than named tensors")
    return {name: tensors[name] for name in tensor_names(tensors)}


def renamed(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The same tensors under our names. Raises BadInput for those of other kinds of heads."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for part, kind in FOREIGN.items():
            if part in name:
                raise BadInput(f"{where}: the tensor {name} belongs to {kind}, which is not implemented")
        short = name
        for pattern, replacement in RENAMED:
            short = re.sub(pattern, replacement, short)
        if short in ours:
            raise BadInput(f"{where}: the weights have {short} twice")
        if not re.search(USELESS, short):
            ours[short] = tensor
    for name in [name for name in ours if re.fullmatch(r"layers\.[1-9]\d*\.hidden_norm\.weight", name)]:
        plain = name.replace("hidden_norm", "input_layernorm")  # what ModelOpt once called it
        if plain not in ours:
            ours[plain] = ours.pop(name)
    return ours


def fill_head(head: EagleHead, ids: Tensor | None, published: Published, target: Transformer) -> EagleHead:
    """An empty head with its tensors, in its precision, ready to draft. `ids`: see `build_head`."""
    tensors, like, precision = published.tensors, target.norm.weight, published.precision
    check_tensors(head, tensors, Path(published.where).parent)
    head, q = head.to(like.dtype), published.quantization
    if precision in PRECISIONS:
        q = q or default_quantization(head, precision)
        reshape(head, q)
    head = head.to_empty(device=like.device).requires_grad_(False).eval()
    head.frequencies = rope_frequencies(head.config).to(like.device)
    head.draft_ids = None if ids is None else ids.to(like.device)
    places, linears, parts = head.checkpoint_tensors(), linear_names(head), dict(published.packed)
    for name, tensor in tensors.items():
        if not tensor.is_meta:
            parts |= {name: tensor} if q is None else convert(name, tensor, q, linears, tied=False)
    if {name: part.shape for name, part in parts.items()} != {name: p.shape for name, p in places.items()}:
        raise published.refuse("the weights are packed in another way than their metadata say")
    for name, part in parts.items():
        places[name].copy_(part)
    if q is not None:
        set_precision(head, precision)
    return head.pack().attach(target)


def check_tensors(head: EagleHead, tensors: dict[str, Tensor], directory: Path) -> None:
    """Each tensor must have a place, and each place a tensor of its shape. Raises BadInput."""
    places = head.checkpoint_tensors()
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise BadInput(f"{directory}: the weights lack {missing[0]}")
    for name, tensor in tensors.items():
        if name not in places:
            raise BadInput(f"{directory}: unexpected tensor {name}")
        if tensor.shape != places[name].shape:
            shapes = f"{tuple(tensor.shape)}, config.json asks for {tuple(places[name].shape)}"
            raise BadInput(f"{directory}: {name} has shape {shapes}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BadInput(f"{directory}: {name} is {tensor.dtype}; 16-bit and 32-bit floats are supported")


# --------------------------------------------------------------------------------------------------
# What they say
# --------------------------------------------------------------------------------------------------


def layer_config(published: Published) -> ModelConfig:
    """The shapes of the head's layers: what the configuration says, corrected by the tensors."""
    inner, tensors, refuse = published.layer_config, published.tensors, published.refuse
    for name, value in (published.raw | inner).items():
        neutral = value in (None, 0, False) or (value is not True and value == 1 and "token" not in name)
        if re.search(DOUBTFUL, name) and name not in PLAIN and not neutral:
            raise refuse(f"{name} is {value!r}, which is not implemented for heads")
    if inner.get("partial_rotary_factor") not in (None, 1):
        raise refuse("partial_rotary_factor: RoPE of a part of a head is not implemented for heads")
    numbers = [re.match(r"layers\.(\d+)\.", name) for name in tensors]
    layers = 1 + max(int(number[1]) for number in numbers if number)
    given = {name: value for name, value in inner.items() if value is not None}
    known = {"vocab_size": published.target.vocab_size} | given
    known |= {"model_type": "llama", "num_hidden_layers": layers}
    config = ModelConfig.from_dict(known, published.where)
    try:
        check_vocabulary(config.vocab_size, published.target.vocab_size)
    except BadInput:
        wanted = f"a vocabulary of {config.vocab_size}, not {published.target.vocab_size}"
        raise refuse(f"the head is for a target with {wanted}") from None
    optional = {"qkv_bias": "self_attn.q_proj.bias", "o_bias": "self_attn.o_proj.bias"}
    optional |= {"mlp_bias": "mlp.gate_proj.bias", "qk_norm": "self_attn.q_norm.weight"}
    present = {name: f"layers.0.{key}" in tensors for name, key in optional.items()}
    return replace(config, **present)


def check_width(published: Published, width: int) -> None:
    if width != published.target.hidden_size:
        wanted = f"a hidden size of {width}, not {published.target.hidden_size}"
        raise published.refuse(f"the head is for a target with {wanted}")


def drop_copies(published: Published, target: Transformer) -> None:
    """Forget an embedding that is the target's own, number by number."""
    given, theirs = published.tensors.get("embed_tokens.weight"), target.embed_tokens
    if given is None or given.shape != (theirs.num_embeddings, theirs.embedding_dim):
        return
    for ids in torch.arange(len(given)).split(4096):
        rows = theirs(ids[None].to(target.norm.weight.device))[0].cpu()  # [., hidden]
        if not torch.equal(rows, given[ids].to(rows.dtype)):
            return
    del published.tensors["embed_tokens.weight"]


def given_taps(
    published: Published, count: int, places: list[tuple[dict, str, int]], usual: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The states that the configuration names, None if it names none. `places`: a part of it, a key, and what
    to add to what is there. `usual`: what most heads read."""
    layers, refuse = published.target.num_layers, published.refuse
    given = [(place[name], name, more) for place, name, more in places if place.get(name)]
    if not given:
        return None
    ids, name, more = given[0]
    if not isinstance(ids, list) or not all(type(i) is int for i in ids) or len(ids) != count:
        raise refuse(f"{name} is {ids!r}; fc reads {count} states of the target")
    taps = tuple(i + more for i in ids)
    for others, other_name, other_more in given[1:]:
        if not isinstance(others, list) or [i + other_more for i in others] != list(taps):
            raise refuse(f"{name} is {ids!r} and {other_name} {others!r}, which are different states")
    if not all(0 <= tap < layers for tap in taps):
        raise refuse(f"{name} is {ids!r}, which are not all states between the {layers} layers of the target")
    other = tuple(tap + (1 if more == 0 else -1) for tap in taps)
    if other == usual:
        said = f"with the other way of counting layers it would be the usual {list(other)}"
        published.note(f"{name} is {ids!r}: {said}")
    return taps


def take_vocabulary(published: Published, drafted: int, vocabulary: int) -> Tensor | None:
    """Remove the maps of tokens from an EAGLE-3 head's tensors -> token ids of its logits, None for all.

    `d2t` says how far from its place a token is; after some conversions, which token it is.
    """
    table, draftable = (published.tensors.pop(name, None) for name in ("d2t", "t2d"))
    used = None if draftable is None or not draftable.any() else draftable.flatten().nonzero().flatten()
    if table is None and drafted == vocabulary:
        return None
    if table is None and used is None:
        raise published.refuse("the weights lack d2t, which says what the head's tokens are")
    table = None if table is None else table.flatten().long()
    readings = [used] if table is None else [torch.arange(table.numel()) + table, table]
    inside = [ids for ids in readings if len(ids) == drafted and bool((ids.diff() > 0).all())]
    inside = [ids for ids in inside if ids[0] >= 0 and ids[-1] < vocabulary]
    if not inside:
        raise published.refuse(f"d2t does not map {drafted} tokens into the vocabulary")
    if used is not None and drafted < vocabulary:
        inside = [ids for ids in inside if torch.equal(used, ids)]
        if not inside:
            raise published.refuse("t2d and d2t do not map the same tokens")
    if not torch.equal(inside[0], inside[-1]):
        published.note("d2t is taken for distances; its numbers could be tokens, too", measured=False)
    return None if drafted == vocabulary else inside[0]


def integer_of(raw: dict[str, Any], name: str, default: int, published: Published) -> int:
    """An integer of the configuration, `default` where it is missing or null. BadInput for anything else."""
    try:
        return integer(raw, name, default)
    except ValueError as error:
        raise published.refuse(str(error)) from None
