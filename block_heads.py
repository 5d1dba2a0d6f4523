"""block_heads.py: block heads (DFlash) as they are published, as heads of a loaded target.

    head = load_block_head("DIR", target)         # a directory or a hub repository id
    head = load_block_head("DIR", target, "w4a16", shifted=True)      # with another reading of a switch

z-lab (and NVIDIA ModelOpt), speculators (vLLM, Red Hat) and DeepSpec publish the same tensors, and mean
different things by a place of the block, by the number of a layer, and by a window. `dflash.py` has the
arithmetic; `heads.py` has what this file has in common with EAGLE heads.

The one idea: tensors decide what they can, and the configuration the rest. What changes the arithmetic and is
not understood is refused by name. A head read in the wrong way loads well and drafts badly.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflash import Block, BlockHead
from head_files import (
    Published,
    check_width,
    drop_copies,
    fill_head,
    given_taps,
    integer_of,
    layer_config,
    open_head,
    take_vocabulary,
)
from model import ModelConfig, Transformer

BLOCK_HEAD_FLAG = "--dflash_checkpoint_path"
FOREIGN = {  # parts of names of tensors that only other kinds of heads have; see also `head_files.FOREIGN`
    "qkv_proj": "a Laguna head",
    "g_proj": "a Laguna head",
    "aux_hidden_norms": "a Laguna head",
    "encoder.": "a Muse-Glimmer head",
    "conv": "a DFlash2 head",
    "selector": "a DFlash2 head",
    "mask_embedding": "a head with a mask of its own",
    "sink": "attention with sinks",
}
NAMES = {  # of architectures, in the same way
    "laguna": "a Laguna head", "glimmer": "a Muse-Glimmer head", "dflare": "a DFlare head",
    "domino": "a Domino head", "dflash2": "a DFlash2 head", "treeflash": "a TreeFlash head",
}  # fmt: skip
DFLASH_CONFIG = {  # keys of `dflash_config` that are read
    "target_layer_ids", "mask_token_id", "block_size", "num_target_layers", "projector_type",
    "causal", "is_causal", "use_swa", "swa_window_size", "attention_sink_bias", "sample_from_anchor",
}  # fmt: skip
SPECULATORS_BLOCK = 8  # places, where a configuration of speculators does not say


def load_block_head(
    path: str | Path, target: Transformer, precision: str | None = None, **reading: Any
) -> BlockHead:
    """Load a block head for a loaded target, in `precision`, quantized on the way if need be. None: as the
    norms of the target or, if the file has 4 bits, with activations like its own. Raises BadInput for what
    does not fit.

    `reading`: what to take instead of what the configuration says, for fields of `Block` or `ModelConfig`.
    """
    published = open_head(path, target, precision, BLOCK_HEAD_FLAG, quiet=bool(reading))
    check_kind_of_head(published)
    numbers = replace(published, raw={**published.raw, "mask_token_id": None})  # which no EAGLE head has
    config = layer_config(numbers)
    check_width(published, config.hidden_size)
    named = {field.name for field in fields(ModelConfig)}
    config = replace(config, **{name: value for name, value in reading.items() if name in named})
    drop_copies(published, target)
    block = read_block(published, config.num_layers)
    block = replace(block, **{name: value for name, value in reading.items() if name not in named})
    ids: Tensor | None = None
    if block.drafted is not None:
        ids = take_vocabulary(published, block.drafted, config.vocab_size)
    with torch.device("meta"):
        head = BlockHead(config, block)
    return fill_head(head, ids, published, target)


def check_kind_of_head(published: Published) -> None:
    """Raise BadInput for what is no block head, or one of another kind."""
    refuse, names = published.refuse, " ".join(map(str, published.architectures)).lower()
    for part, kind in NAMES.items():
        if part in names:
            raise refuse(f"{published.architectures} is {kind}, which is not implemented")
    for name in published.tensors:
        for part, kind in FOREIGN.items():
            if part in name:
                raise refuse(f"the tensor {name} belongs to {kind}, which is not implemented")
        if re.match(r"layers\.\d+\.(fc|fusion)", name):
            raise refuse(f"the tensor {name} belongs to a DFlare head, which is not implemented")
    if "hidden_norm.weight" not in published.tensors or published.tensors.get("fc.weight") is None:
        raise refuse("the weights beside it are those of no block head")
    if (Path(published.where).parent / "mask_embedding.pt").exists():
        raise refuse("mask_embedding.pt: a mask of its own is not implemented")
    for name in published.part("dflash_config"):
        if name not in DFLASH_CONFIG:
            raise refuse(f"the key {name} of dflash_config is not known")
    for name, plain in {"projector_type": "dflash", "attention_sink_bias": False, "markov_rank": 0}.items():
        value = said(published, name)
        if value not in (None, plain):
            kind = ", that of a DSpark head" if name == "markov_rank" else ""
            raise refuse(f"{name} is {value!r}{kind}, which is not implemented")


def said(published: Published, *names: str) -> Any:
    """What these keys say, wherever they are; None if none is there. BadInput if they disagree."""
    places = [published.part("dflash_config"), published.raw, published.part("transformer_layer_config")]
    found = [(name, place[name]) for place in places for name in names if place.get(name) is not None]
    for name, value in found[1:]:
        if value != found[0][1]:
            raise published.refuse(f"{found[0][0]} is {found[0][1]!r} and {name} is {value!r}")
    return found[0][1] if found else None


def switch(published: Published, *names: str) -> bool | None:
    """The same of keys that are true or false."""
    value = said(published, *names)
    if not isinstance(value, bool | None):
        raise published.refuse(f"{names[0]} is {value!r}; it must be true or false")
    return value


def whole(published: Published, name: str, least: int) -> int | None:
    """The same of a key that is a number."""
    value = said(published, name)
    if value is not None and (type(value) is not int or value < least):
        raise published.refuse(f"{name} is {value!r}; it must be a whole number from {least} on")
    return value


def read_block(published: Published, layers: int) -> Block:
    """What makes a block head, beside its layers."""
    tensors, refuse = published.tensors, published.refuse
    width, inputs = published.target.hidden_size, published.tensors["fc.weight"].shape[-1]
    if inputs % width:
        raise refuse(f"fc has {inputs} inputs, no multiple of the target's hidden size of {width}")
    size = whole(published, "block_size", 1) or (SPECULATORS_BLOCK if published.is_speculators else None)
    if size is None:
        raise refuse("block_size is missing: how many places a block has")
    shifted = read_shift(published)
    if size < 2 - shifted:
        raise refuse(f"block_size is {size}, which guesses nothing")
    lm_head = tensors.get("lm_head.weight")
    windows, causal = read_masks(published, layers)
    return Block(
        taps=read_block_taps(published, inputs // width),
        size=size,
        mask_token_id=read_mask_token(published),
        shifted=shifted,
        causal=causal,
        windows=windows,
        drafted=None if lm_head is None else len(lm_head),
        own_embedding="embed_tokens.weight" in tensors,
    )


def read_shift(published: Published) -> bool:
    """Does a place guess the token after it, so that the root's guesses, too? Those of DeepSpec do."""
    anchored = switch(published, "sample_from_anchor")
    if anchored is None:
        return any("DSpark" in str(name) for name in published.architectures)
    return anchored


def read_mask_token(published: Published) -> int:
    """The token of all places but the root. It may be one that no text has, but it must have an embedding."""
    token, own = whole(published, "mask_token_id", 0), published.tensors.get("embed_tokens.weight")
    if token is None:
        raise published.refuse("mask_token_id is missing, and a guess would draft badly")
    rows = published.target.vocab_size if own is None else len(own)
    if token >= rows:
        raise published.refuse(f"mask_token_id is {token}, and the embedding has {rows} rows")
    return token


def default_block_taps(layers: int, count: int) -> tuple[int, ...]:
    """Evenly from the second state to the fourth last, as all early block heads have them."""
    if count == 1:
        return (layers // 2 + 1,)
    return tuple(2 + round(i * (layers - 4) / (count - 1)) for i in range(count))


def read_block_taps(published: Published, count: int) -> tuple[int, ...]:
    """The states of the target that the head reads, as `heads.read_taps`: speculators counts as we do."""
    layers = published.target.num_layers
    if said(published, "num_target_layers") not in (None, layers):
        there = said(published, "num_target_layers")
        raise published.refuse(f"the head is for a target of {there} layers, not {layers}")
    places = [(published.part("dflash_config"), "target_layer_ids", 1)]
    places += [(published.raw, "target_layer_ids", 1), (published.raw, "aux_hidden_state_layer_ids", 0)]
    usual = default_block_taps(layers, count) if layers >= count + 3 else ()
    taps = given_taps(published, count, places, usual)
    if taps is None and not usual:
        raise published.refuse(f"fc reads {count} states of the target, and nothing says which")
    return taps or usual


def read_masks(published: Published, layers: int) -> tuple[tuple[int | None, ...], tuple[bool, ...]]:
    """By layer: how far back it looks from the root, and whether a place sees only those before it.

    Layers with a window are causal, unless a key says otherwise; where `use_swa` makes all of them so, none
    is.
    """
    inner, refuse = published.layer_config, published.refuse
    everywhere = bool(switch(published, "causal", "is_causal"))
    if switch(published, "use_swa"):
        window = whole(published, "swa_window_size", 1) or whole(published, "sliding_window", 1)
        if window is None:
            raise refuse("use_swa is true, and swa_window_size is missing")
        return layers * (window,), layers * (everywhere,)
    kinds = inner.get("layer_types")
    if kinds is None:  # as transformers reads Qwen's keys
        first = integer_of(inner, "max_window_layers", 28, published)
        used = bool(inner.get("use_sliding_window"))
        kinds = ["sliding_attention" if used and i >= first else "full_attention" for i in range(layers)]
    known = isinstance(kinds, list) and set(kinds) <= {"full_attention", "sliding_attention"}
    if not known or len(kinds) < layers:
        raise refuse(f"layer_types is {kinds!r}; {layers} of full_attention and sliding_attention are needed")
    slides = [kind == "sliding_attention" for kind in kinds[:layers]]
    window = whole(published, "sliding_window", 1) if any(slides) else None
    if any(slides) and window is None:
        raise refuse("sliding_window is missing, and layer_types has sliding_attention")
    free = bool(switch(published, "sliding_window_non_causal"))
    causal = tuple(everywhere or (slid and not free) for slid in slides)
    return tuple(window if slid else None for slid in slides), causal
