"""heads.py: EAGLE heads as they are published, as heads of a loaded target.

    head = load_head("DIR", target)         # a directory or a hub repository id
    head = load_head("DIR", target, "w4a16", norm_output=True)      # with another reading of a switch

EAGLE's authors, SpecForge, speculators (vLLM, Red Hat), NVIDIA ModelOpt, DeepSpec, AngelSlim and NeMo publish
the same few tensors under different names, and say in different keys what the tensors cannot tell. `eagle.py`
has the arithmetic; this file only reads.

The one idea: tensors decide. A bias, a norm, a second layer or an embedding is used if it is there. What
leaves no trace in the tensors comes from the configuration: which states of the target are read, what is
added to, what goes round, RoPE, windows. What changes the arithmetic and is not understood is refused by
name, and what can be read in two ways is said in a line: a head that is read in the wrong way loads well and
drafts badly.
"""

from __future__ import annotations

import re
import sys
import zipfile
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints import (
    ALL_PRECISIONS,
    DTYPES,
    HEAD_FLAG,
    find_checkpoint,
    stored_tensors,
    tensor_names,
    weight_files,
)
from drafts import check_vocabulary
from eagle import Eagle3, Eagle3Head, EagleHead, default_taps, frequent_tokens
from grammar import read_file
from model import BadInput, ModelConfig, Transformer, integer, rope_frequencies
from packing import PRECISIONS, convert, default_quantization, linear_names, reshape, set_precision
from text import Tokenizer, read_json

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
EAGLE_CONFIG = {  # what the keys of `eagle_config` must say to be what is computed here; null says nothing
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
SWITCHES = ("norm_before_residual", "norm_output", "return_hidden_post_norm", "norm_before_fc", "fc_norm")
ELSEWHERE = {"eagle_aux_hidden_state_layer_ids", *SWITCHES}  # keys that are read in their place
OTHER_ARITHMETIC = (  # keys that no head computed here has, unless they say null, 0 or false
    "mask_token_id", "pard_token", "pard_token_id",
    "attn_logit_softcapping", "final_logit_softcapping", "logits_scaling",
    "residual_multiplier", "embedding_multiplier",
)  # fmt: skip
NEUTRAL_IF_ONE = ("logits_scaling", "residual_multiplier", "embedding_multiplier")


@dataclass(frozen=True)
class Published:
    """A head as it lies in a directory: the tensors under our names, and what the configuration says."""

    raw: dict[str, Any]
    tensors: dict[str, Tensor]
    target: ModelConfig
    where: str  # the configuration, for messages
    quiet: bool = False  # without notes

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
        places = (self.raw, self.part("eagle_config"))
        said = {name: place[name] for name in names for place in places if place.get(name) is not None}
        said |= {f"eagle_config.{name}": places[1][name] for name in said if name in places[1]}
        for name, value in said.items():
            if not isinstance(value, bool | None):
                raise self.refuse(f"{name} is {value!r}; it must be true or false")
        values = {value for value in said.values() if value is not None}
        if len(values) > 1:
            raise self.refuse(f"{' and '.join(said)} say different things")
        return values.pop() if values else None

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


def load_head(
    path: str | Path, target: Transformer, precision: str | None = None, **reading: Any
) -> EagleHead:
    """Load an EAGLE-1, EAGLE-2, EAGLE-3 or EAGLE-3.1 head for a loaded target, in `precision` (None: bf16 or
    fp32, as the target's norms), quantized on the way if that asks for it. Raises BadInput for what does not
    fit.

    `reading`: what to take instead of what the configuration says, for fields of `Eagle3` or `ModelConfig`.
    """
    published = open_head(path, target, precision, HEAD_FLAG, quiet=bool(reading))
    return fill_head(*build_head(published, target, reading), published, target, precision)


def open_head(
    path: str | Path, target: Transformer, precision: str | None, flag: str, quiet: bool
) -> Published:
    """A head as it is published, for a target whose dtype it can have."""
    directory, like = find_checkpoint(str(path), flag), target.norm.weight
    where, raw = str(directory / "config.json"), read_json(directory / "config.json", required=True)
    if precision not in (None, *ALL_PRECISIONS):
        raise BadInput(f"precision {precision!r} is none of {', '.join(ALL_PRECISIONS)}")
    dtype = like.dtype if precision is None else DTYPES.get(precision, torch.bfloat16)
    if dtype != like.dtype:
        raise BadInput(
            "--draft_precision: a head shares weights with its target, so both are fp32, or neither"
        )
    return Published(raw, renamed(read_head(directory), where), target.config, where, quiet)


def fill_head(
    head: EagleHead, ids: Tensor | None, published: Published, target: Transformer, precision: str | None
) -> EagleHead:
    """An empty head with its tensors, in `precision`, ready to draft. `ids`: see `build_head`."""
    tensors, like = published.tensors, target.norm.weight
    check_tensors(head, tensors, Path(published.where).parent)
    head, q = head.to(like.dtype), None
    if precision in PRECISIONS:
        q = default_quantization(head, precision)
        reshape(head, q)
    head = head.to_empty(device=like.device).requires_grad_(False).eval()
    head.frequencies = rope_frequencies(head.config).to(like.device)
    head.draft_ids = None if ids is None else ids.to(like.device)
    places, linears = head.checkpoint_tensors(), linear_names(head)
    for name, tensor in tensors.items():
        parts = {name: tensor} if q is None else convert(name, tensor, q, linears, tied=False)
        for part, value in parts.items():
            places[part].copy_(value)
    if q is not None:
        set_precision(head, precision)
    return head.pack().attach(target)


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
    return frequent_tokens([tokenizer.encode(read_file("--draft_vocab_text", path))], count, vocabulary)


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
# What a head is
# --------------------------------------------------------------------------------------------------


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


def layer_config(published: Published) -> ModelConfig:
    """The shapes of the head's layers: what the configuration says, corrected by the tensors."""
    inner, tensors, refuse = published.layer_config, published.tensors, published.refuse
    for name in OTHER_ARITHMETIC:
        value = inner.get(name, published.raw.get(name))
        if value not in (None, 0, False) and not (name in NEUTRAL_IF_ONE and value == 1):
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


def read_window(published: Published, layers: int) -> int | None:
    """How far back the head looks. Configurations of Llamas have a `sliding_window` that says nothing."""
    inner = published.layer_config
    kinds = inner.get("layer_types") or []
    if not isinstance(kinds, list) or any(
        kind not in ("full_attention", "sliding_attention") for kind in kinds
    ):
        raise published.refuse(f"layer_types is {kinds!r}; full_attention and sliding_attention are known")
    if len(set(kinds[:layers])) > 1:
        raise published.refuse("layer_types: windows in some layers of a head only are not implemented")
    # Qwen's layers below `max_window_layers` have none, Mistral's have whenever one is given.
    qwen = bool(inner.get("use_sliding_window")) and not inner.get("max_window_layers")
    unsaid = qwen or (inner.get("model_type") == "mistral" and bool(inner.get("sliding_window")))
    if not (kinds[0] == "sliding_attention" if kinds else unsaid):
        return None
    window = integer_of(inner, "sliding_window", 0, published)
    if window < 1:
        raise published.refuse(f"sliding_window is {window}; it must be at least 1")
    return window


def check_width(published: Published, width: int) -> None:
    if width != published.target.hidden_size:
        wanted = f"a hidden size of {width}, not {published.target.hidden_size}"
        raise published.refuse(f"the head is for a target with {wanted}")


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
    note_rope(published, config)
    own_embedding = "embed_tokens.weight" in tensors
    own_lm_head = "lm_head.weight" in tensors
    if not (own_embedding and own_lm_head):
        check_width(published, config.hidden_size)  # as wide as what it borrows
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
        input_norm=published.norm("input_norm", "norm_before_fc"),
        fc_norm=published.norm("fc_norm", "fc_norm"),
        norm_before_residual=read_residual(published),
        norm_output=read_output(published),
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


def note_rope(published: Published, config: ModelConfig) -> None:
    """Say where RoPE is known to be written in another way than the head was trained with."""
    if config.rope_scaling.kind == "yarn" and published.part("eagle_config"):
        published.note("ModelOpt writes YaRN for heads that were trained without it; it is heeded")
    if config.rope_theta != 10000 and "Eagle3LlamaForCausalLM" in published.architectures:
        published.note(
            f"AngelSlim trained with a RoPE base of 10000 and writes {config.rope_theta:g}, which is taken"
        )


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
    return taps or usual


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
    for ids in readings:
        inside = len(ids) == drafted and bool(((ids >= 0) & (ids < vocabulary)).all())
        if inside and bool((ids.diff() > 0).all()):
            if used is not None and drafted < vocabulary and not torch.equal(used, ids):
                raise published.refuse("t2d and d2t do not map the same tokens")
            return ids
    raise published.refuse(f"d2t does not map {drafted} tokens into the vocabulary")


def integer_of(raw: dict[str, Any], name: str, default: int, published: Published) -> int:
    """An integer of the configuration, `default` where it is missing or null. BadInput for anything else."""
    try:
        return integer(raw, name, default)
    except ValueError as error:
        raise published.refuse(str(error)) from None
