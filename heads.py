"""heads.py: EAGLE heads as they are published, as heads of a loaded target.

    head = load_head("DIR", target)         # a directory or a hub repository id
    head = load_head("DIR", target, "w4a16", norm_output=True)      # with another reading of a switch

EAGLE's authors, SpecForge, speculators (vLLM, Red Hat), NVIDIA ModelOpt, DeepSpec, AngelSlim and NeMo publish
the same few tensors under different names, and say in different keys what the tensors cannot tell. `eagle.py`
has the arithmetic; this file only reads.

The one idea: what leaves no trace in the tensors comes from the configuration: which states of the target
are read, what is added to, what goes round, RoPE, windows. What can be read in two ways is said in a line: a
head that is read in the wrong way loads well and drafts badly.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chat import LONG_TEXT
from checkpoints import HEAD_FLAG, find_checkpoint
from eagle import Eagle3, Eagle3Head, EagleHead, default_taps, frequent_tokens
from grammar import read_file
from head_files import (
    SWITCHES,
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
from model import BadInput, ModelConfig, Transformer
from text import Tokenizer, read_json

EAGLE_CONFIG = {  # what the keys of `eagle_config` must say to be what is computed here; null says nothing
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
ELSEWHERE = {"eagle_aux_hidden_state_layer_ids", *SWITCHES}  # keys that are read in their place


def load_head(
    path: str | Path, target: Transformer, precision: str | None = None, **reading: Any
) -> EagleHead:
    """Load an EAGLE-1, EAGLE-2, EAGLE-3 or EAGLE-3.1 head for a loaded target, in `precision`, quantized on
    the way if need be. None: as the norms of the target or, if the file has 4 bits, with activations like its
    own. Raises BadInput for what does not fit.

    `reading`: what to take instead of what the configuration says, for fields of `Eagle3` or `ModelConfig`.
    """
    published = open_head(path, target, precision, HEAD_FLAG, quiet=bool(reading))
    return fill_head(*build_head(published, target, reading), published, target)


def build_head(
    published: Published, target: Transformer, reading: dict[str, Any]
) -> tuple[EagleHead, Tensor | None]:
    """An empty head on the meta device, and the token ids of its logits (None: 0, 1, 2, ...).

    Of the tensors, those that have no place in it are removed: maps of tokens, copies of the target's.
    """
    third, config, tensors = published.is_third, layer_config(published), published.tensors
    named = {field.name for field in fields(ModelConfig)}
    config = replace(config, **{name: value for name, value in reading.items() if name in named})
    if not third:
        check_plain(published, config, {name for name in reading if name not in named})
        drop_copies(published, target)
        if tensors.pop("embed_tokens.weight", None) is not None:
            published.note("the embedding beside it is not quite the target's, which is used", measured=False)
        with torch.device("meta"):
            return EagleHead(config, fc_bias="fc.bias" in tensors), None
    switches = read_switches(published, target, config)
    switches = replace(switches, **{name: value for name, value in reading.items() if name not in named})
    ids = take_vocabulary(published, switches.drafted, config.vocab_size)
    with torch.device("meta"):
        return Eagle3Head(config, switches), ids


def check_plain(published: Published, config: ModelConfig, switches: set[str]) -> None:
    """Refuse what EAGLE-1 and EAGLE-2 heads do not have."""
    check_eagle_config(published, config.num_layers)
    check_width(published, config.hidden_size)
    for name in SWITCHES:
        if published.switch(name):
            raise published.refuse(f"{name} is true, but the weights are those of an EAGLE-1 or EAGLE-2 head")
    if read_window(published, config.num_layers) is not None or switches:
        what = sorted(switches)[0] if switches else "a sliding window"
        raise published.refuse(f"{what}: an EAGLE-1 or EAGLE-2 head has none")


def read_switches(published: Published, target: Transformer, config: ModelConfig) -> Eagle3:
    """What makes an EAGLE-3 head: from its tensors as far as they tell, from its configuration otherwise."""
    raw, tensors, refuse = published.raw, published.tensors, published.refuse
    check_eagle_config(published, config.num_layers)
    width = published.target.hidden_size
    check_width(published, integer_of(raw, "target_hidden_size", width, published))
    inputs = tensors["fc.weight"].shape[1]
    if inputs % width:
        raise refuse(f"fc has {inputs} inputs, no multiple of the target's hidden size of {width}")
    drop_copies(published, target)
    note_exports(published, config)
    own_embedding = "embed_tokens.weight" in tensors
    own_lm_head = "lm_head.weight" in tensors
    if not (own_embedding and own_lm_head):
        check_width(published, config.hidden_size)  # as wide as what it borrows
    input_norm, fc_norm = published.norm("input_norm", "norm_before_fc"), published.norm("fc_norm", "fc_norm")
    if input_norm and fc_norm:
        raise refuse("the weights have input_norm and fc_norm; of these, heads have one")
    drafted = tensors["lm_head.weight"].shape[:1].numel() if own_lm_head else published.target.vocab_size
    said = integer_of(raw, "draft_vocab_size", drafted, published)
    if said != drafted:
        raise refuse(f"draft_vocab_size is {said}, but lm_head has {drafted} rows")
    return Eagle3(
        taps=read_taps(published, inputs // width),
        target_hidden_size=width,
        drafted=drafted,
        own_embedding=own_embedding,
        own_lm_head=own_lm_head,
        fc_bias="fc.bias" in tensors,
        input_norm=input_norm,
        fc_norm=fc_norm,
        norm_before_residual=read_residual(published),
        norm_output=read_output(published),
        double_norm=bool(published.switch("double_norm")),
        window=read_window(published, config.num_layers),
    )


def check_eagle_config(published: Published, layers: int) -> None:
    """Refuse what `eagle_config` says and nobody here would heed."""
    for name, value in published.part("eagle_config").items():
        if name in ELSEWHERE or value is None or (name == "next_layer_regular" and layers == 1):
            continue
        if name not in EAGLE_CONFIG:
            raise published.refuse(f"the key {name} of eagle_config is not known")
        if value != EAGLE_CONFIG[name]:
            raise published.refuse(f"{name} is {value!r} in eagle_config, which is not implemented")


def read_window(published: Published, layers: int) -> int | None:
    """How far back the head looks. Configurations of Llamas have a `sliding_window` that says nothing."""
    inner = published.layer_config
    kinds = inner.get("layer_types") or []
    if not kinds and inner.get("use_sliding_window"):  # as transformers reads Qwen's keys
        first = integer_of(inner, "max_window_layers", 28, published)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if not kinds and inner.get("model_type") == "mistral" and inner.get("sliding_window"):
        kinds = layers * ["sliding_attention"]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise published.refuse(f"layer_types is {kinds!r}; full_attention and sliding_attention are known")
    if len(set(kinds[:layers])) > 1:
        raise published.refuse("layer_types: windows in some layers of a head only are not implemented")
    if not kinds or kinds[0] == "full_attention":
        return None
    window = integer_of(inner, "sliding_window", 0, published)
    if window < 1:
        raise published.refuse(f"sliding_window is {window}; it must be at least 1")
    return window


def read_residual(published: Published) -> bool:
    said = published.switch("norm_before_residual")
    if said is None and published.is_speculators:
        published.note("norm_before_residual is not given; in this layout it is taken for true, as vLLM does")
        return True
    return bool(said)


def read_output(published: Published) -> bool:
    said = published.switch("norm_output", "return_hidden_post_norm")
    if said is not None and "LlamaForCausalLMEagle3" in published.architectures:
        meant = "plain EAGLE-3 by it" if said else "no norm before lm_head by it"
        taken = "EAGLE-3.1" if said else "plain EAGLE-3"
        before = f"SpecForge before September 2026 meant {meant}"
        published.note(f"norm_output is taken for {taken}; {before}", measured=said)
    return bool(said)


def read_taps(published: Published, count: int) -> tuple[int, ...]:
    """The states of the target that the head reads, in our numbering: tap i enters layer i.

    speculators counts as we do. In `eagle_config` and under the other names, i is the state that layer i has
    made.
    """
    layers, refuse = published.target.num_layers, published.refuse
    places = [(published.part("eagle_config"), "eagle_aux_hidden_state_layer_ids", 1)]
    places += [(published.raw, name, 1) for name in ("target_layer_ids", "aux_hidden_states_layer_ids")]
    places += [(published.raw, "eagle_aux_hidden_state_layer_ids", 0)]
    usual = default_taps(layers) if layers >= 3 else ()
    taps = given_taps(published, count, places, usual)
    if taps is None and len(usual) != count:
        nothing = f"fc reads {count} states of the target, and nothing says which"
        raise refuse(nothing if layers > 2 else "an EAGLE-3 head needs a target of at least 3 layers")
    if taps is None and published.part("eagle_config"):
        where = f"eagle_config does not say which states are read; the usual {list(usual)} are taken"
        published.note(f"{where}: does --check_head find that they fit?", measured=False)
    return taps or usual


def note_exports(published: Published, config: ModelConfig) -> None:
    """Say what is known to be written in another way than a head was trained."""
    modelopt = {"next_layer_regular", "use_last_layernorm"} & set(published.part("eagle_config"))
    if modelopt:
        published.note("ModelOpt trains some heads with two norms of the features, one of them is computed")
    if modelopt and published.switch("norm_before_residual"):
        published.note("converted heads of ModelOpt say norm_before_residual, though trained without it")
    if config.rope_scaling.kind == "yarn" and published.part("eagle_config"):
        published.note("ModelOpt writes YaRN for heads that were trained without it; it is heeded")
    if config.rope_theta != 10000 and "Eagle3LlamaForCausalLM" in published.architectures:
        published.note(
            f"AngelSlim trained with a RoPE base of 10000 and writes {config.rope_theta:g}, which is taken"
        )


def target_width(path: str | Path, flag: str = HEAD_FLAG) -> int | None:
    """The hidden size of a head's target, as far as its configuration says."""
    raw = read_json(find_checkpoint(str(path), flag) / "config.json")
    inner = raw.get("transformer_layer_config")
    return raw.get("target_hidden_size") or (inner if isinstance(inner, dict) else raw).get("hidden_size")


def read_frequent_tokens(
    path: str | None, tokenizer: Tokenizer | None, count: int, vocabulary: int
) -> Tensor:
    """What `--draft_vocab_size` restricts a head to, int64 [count]: the most frequent tokens of the text in
    `path`, if there is one. BadInput for a file that cannot be read."""
    if path is None:
        return frequent_tokens([], count, vocabulary)
    if tokenizer is None:
        raise BadInput("--draft_vocab_text: the target has no tokenizer to read a text with")
    text = read_file("--draft_vocab_text", path)
    # In pieces, since a tokenizer refuses what is surely longer than the context.
    pieces = [text[begin : begin + LONG_TEXT] for begin in range(0, len(text), LONG_TEXT)]
    return frequent_tokens([tokenizer.encode_text(piece) for piece in pieces], count, vocabulary)
