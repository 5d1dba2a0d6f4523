"""generate.py: what lies between a user and the engine: checkpoints, tokenizers, chat, the command line.

    python generate.py                                          # the models in models/, offline
    python generate.py --method lookup --prompt "class Stack:"
    python generate.py --checkpoint_path DIR --draft_checkpoint_path DIR --chat --prompt "Hello"
    python generate.py --prompts prompts.jsonl --batch_size 4 --json

Text goes to stdout as it is accepted, statistics to stderr. How a method works is in `gpt_spec.py`; here a
method is a name and a drafter.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
import time
import unicodedata
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # PyTorch can do without

import torch  # noqa: E402

import gpt_spec  # noqa: E402
import kernels  # noqa: E402
import quantize  # noqa: E402
from gpt_spec import (  # noqa: E402
    BadInput,
    Decoder,
    Drafter,
    Eagle3Head,
    EagleHead,
    Emission,
    ModelConfig,
    Sampling,
    Stats,
    Transformer,
)
from quantize import Stored  # noqa: E402

MODELS = Path(__file__).resolve().parent / "models"
SHIPPED_TARGET, SHIPPED_SMALL = MODELS / "python-7m", MODELS / "python-1m"
SHIPPED_HEAD, SMALL_HEAD = MODELS / "python-7m-eagle", MODELS / "python-1m-eagle"  # of these two
HINT = "config.json and the weights do not belong together"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # precision names that need no quantizer
ALL_PRECISIONS = [*DTYPES, *quantize.PRECISIONS]
FILE_PRECISION = {"F32": "fp32", "BF16": "bf16", "F16": "bf16"}  # what a file's own dtype is decoded in
DEFAULT_PROMPT = '''def load(path, mode='r', **kwargs):
    """Load a document from a file, returning a new document.

    The file is opened with the given mode, and closed when the document has
    been read.  See the Document class for available keyword args.
    """
    reader = Reader(mode=mode, **kwargs)
    return reader.load(path)

def save(document, path, **kwargs):
'''


# --------------------------------------------------------------------------------------------------
# Checkpoint directories
# --------------------------------------------------------------------------------------------------


HEAD_FLAG = "--eagle_checkpoint_path"


def find_checkpoint(name: str, flag: str = "--checkpoint_path") -> Path:
    """A local directory, or a hub repository id, downloaded into the hub's cache. BadInput for neither."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise BadInput(f"{flag}: {name} is a file; give the directory that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BadInput(f"{flag}: {name} is not a directory (nor a hub repository id like owner/name)")
    from huggingface_hub import snapshot_download  # slow to import, and most runs are local

    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    wanted += ["pytorch_model.bin"] if flag == HEAD_FLAG else []  # all that most published heads have
    unwanted = ["original/*", "consolidated*"]  # the same weights once more
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # no network, no repository, no permission: the hub has a dozen classes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInput(
            f"{flag}: {name} is not a local directory, and the hub did not give it: {reason}"
        ) from None


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file, unless `required`."""
    if not path.exists() and not required:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file; a checkpoint directory needs it") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def only_file(directory: Path, name: str) -> Path | None:
    """The file of that name, else the only one whose name ends like it: GPTQ tools have their own."""
    if (directory / name).exists():
        return directory / name
    others = list(directory.glob(f"*{name.removeprefix('model')}"))
    return others[0] if len(others) == 1 else None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or those of its index; none from outside."""
    index = only_file(directory, "model.safetensors.index.json")
    if index is None:
        single = only_file(directory, "model.safetensors")
        if single is not None:
            return [single]
        only_bin = any(directory.glob("*.bin"))
        has = "only pytorch_model.bin; convert it to safetensors" if only_bin else "no weights"
        raise BadInput(f"{directory}: has {has}; model.safetensors or model.safetensors.index.json is needed")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadInput(f"{index}: weight_map is missing or no object of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise BadInput(f"{index}: {name} points outside the checkpoint directory")
        if not (directory / name).exists():
            raise BadInput(f"{index}: lists {name}, which is not there")
    return [directory / name for name in names]


def open_weights(path: Path):
    """A safetensors file, memory-mapped: tensors are read when asked for and never held twice."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"{path}: not a whole safetensors file ({error}); it may have been cut off in a download"
        ) from None


def tensor_names(weights) -> list[str]:
    """Of an open file or of a dictionary, without the RoPE frequencies of old Llama checkpoints: they follow
    from the config."""
    return [name for name in weights.keys() if not name.endswith("rotary_emb.inv_freq")]


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its header; nothing is read. BadInput for one that is there twice."""
    tensors = {}
    for path in files:
        weights = open_weights(path)
        for name in tensor_names(weights):
            if name in tensors:
                raise BadInput(f"{path}: {name} is in {tensors[name].where.name} already")
            header = weights.get_slice(name)
            read = partial(weights.get_tensor, name)
            tensors[name] = Stored(tuple(header.get_shape()), header.get_dtype(), path, read)
    return tensors


def stored_quantization(files: list[Path]) -> quantize.Quantization | None:
    """How the weights are quantized, from the metadata of files of ours; None if they are not."""
    metadata = {}
    for path in files:
        with open_weights(path) as weights:
            metadata[path] = (weights.metadata() or {}).get("gpt_spec")
    first = metadata[files[0]]
    for path, text in metadata.items():
        if text != first:
            raise BadInput(f"{path}: is quantized otherwise than {files[0].name}")
    return None if first is None else quantize.Quantization.from_json(first, str(files[0]))


def check_weights(model: Transformer, directory: Path, tensors: dict[str, Stored]) -> str:
    """Each tensor must have a place and each place a tensor -> the precision that 16-bit files ask for.

    Only headers are looked at, and the model may be on the meta device: what does not fit costs nothing.
    """
    places = weight_places(model)
    for name, stored in tensors.items():
        if name not in places:
            raise BadInput(f"{stored.where}: unexpected tensor {name}; {HINT}")
        check_tensor(name, stored, places[name])
    missing = sorted(set(model.checkpoint_tensors()) - set(tensors))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(f"{directory}: the weights lack {missing[0]}{more}; {HINT}")
    kinds = [stored.kind for stored in tensors.values()]
    return FILE_PRECISION.get(max(set(kinds), key=kinds.count), "bf16")


def check_tensor(name: str, stored: Stored, place: torch.Tensor) -> None:
    """Does a tensor of a file, known by its header, fit into its place? Raises BadInput."""
    shape, kind, path, _ = stored
    if shape != tuple(place.shape):
        raise BadInput(f"{path}: {name} has shape {shape}, config.json asks for {tuple(place.shape)}")
    fixed = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.float16: "F16"}.get(place.dtype)
    if fixed and kind != fixed:
        raise BadInput(f"{path}: {name} is {kind}; the format has {fixed}")
    if not fixed and kind not in FILE_PRECISION:
        raise BadInput(f"{path}: {name} is {kind}; float32, bfloat16 and float16 are supported")


def weight_places(model: Transformer) -> dict[str, torch.Tensor]:
    """Where tensors of a checkpoint go; a tied model may come with a second copy of its embedding."""
    places = model.checkpoint_tensors()
    shared = not any(name.startswith("lm_head.") for name in places)
    return places | ({"lm_head.weight": places["model.embed_tokens.weight"]} if shared else {})


def fill_weights(
    model: Transformer, directory: Path, checked: dict[str, Stored], q: quantize.Quantization | None
) -> None:
    """Copy every checked tensor into its place, quantized on the way if `q` is given.

    What a tied model has twice must be the same.
    """
    places, linears, head = model.checkpoint_tensors(), quantize.linear_names(model), None
    tied = model.config.tied_embeddings
    for name, stored in checked.items():
        tensor = stored.read()
        if name == "lm_head.weight" and tied:
            head = tensor
        else:
            tensors = {name: tensor} if q is None else quantize.convert(name, tensor, q, linears, tied)
            for part, value in tensors.items():
                places[part].copy_(value)
    if head is not None and not torch.equal(head.to(model.embed_tokens.weight), model.embed_tokens.weight):
        raise BadInput(
            f"{directory}: lm_head.weight is not the embedding, but config.json says tie_word_embeddings"
        )


def published_config(directory: Path, raw: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """How somebody else's tool says that it quantized a checkpoint, in one of the four places that there are,
    and in which file."""
    inside = raw.get("quantization_config") or raw.get("compression_config")
    if inside is not None and not isinstance(inside, dict):
        raise BadInput(f"{directory / 'config.json'}: quantization_config is no object")
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        beside = read_json(directory / name)
        if beside:
            where = directory / ("config.json" if inside else name)
            return {"quant_method": method} | beside | (inside or {}), str(where)
    if inside is not None and "quant_method" not in inside and "config_groups" in inside:
        inside = {"quant_method": "compressed-tensors"} | inside
    return inside, str(directory / "config.json")


@dataclass
class Checkpoint:
    """A directory whose headers have been checked: nothing of its weights is in memory."""

    directory: Path
    files: list[Path]
    tensors: dict[str, Stored]  # in our format, whatever the files have
    model: Transformer  # on the meta device, in the form of the tensors
    quantization: quantize.Quantization | None
    precision: str  # the files' own
    published: str | None = None  # the name of somebody else's 4-bit format


def open_checkpoint(directory: Path) -> Checkpoint:
    """Check a directory: its configuration, and that each weight has a place and each place a weight."""
    where = str(directory / "config.json")
    raw = read_json(directory / "config.json", required=True)
    config = ModelConfig.from_dict(raw, where)
    files = weight_files(directory)
    q, tensors = stored_quantization(files), stored_tensors(files)
    published, settings = published_config(directory, raw) if q is None else (None, where)
    layout = None
    with torch.device("meta"):
        model = Transformer(config)
    if published is not None:
        layout = quantize.find_layout(published, settings)
        tensors, q = quantize.translate(layout, tensors, model, settings)
    if q is not None:
        permuted = quantize.check_permutations(tensors, model)
        try:
            quantize.reshape(model.to(torch.bfloat16), q, permuted)
        except BadInput as error:
            raise BadInput(f"{files[0] if len(files) == 1 else directory}: {error}") from None
    own = check_weights(model, directory, tensors)
    own = f"w{q.bits}a{layout.activation_bits if layout else 16}" if q else own
    return Checkpoint(directory, files, tensors, model, q, own, layout and layout.name)


def check_precision(precision: str, checkpoint: Checkpoint, flag: str) -> None:
    """Quantized weights stay what they are; only their activations are a choice."""
    if precision not in ALL_PRECISIONS:
        raise BadInput(f"precision {precision!r} is none of {', '.join(ALL_PRECISIONS)}")
    q = checkpoint.quantization
    possible = [name for name, (bits, _) in quantize.PRECISIONS.items() if q is not None and bits == q.bits]
    if q is not None and precision not in possible:
        flag = flag.replace("checkpoint_path", "precision")
        raise BadInput(
            f"{flag}: {checkpoint.directory} has {q.bits}-bit weights; "
            f"use {' or '.join(possible)}, not {precision}"
        )


def load_model(
    path: str | Path,
    precision: str | None = None,
    device: str = "cpu",
    flag: str = "--checkpoint_path",
) -> Transformer:
    """Load a Hugging Face directory or hub repository. `precision` is fp32, bf16 or a name of
    `quantize.PRECISIONS`; None is the file's own.

    Weights go from the mapped file into place, one tensor at a time. 16-bit ones are quantized on the way if
    the precision asks for it, published 4-bit ones are brought into our format. Raises BadInput for anything
    that does not fit.
    """
    checkpoint = open_checkpoint(find_checkpoint(str(path), flag))
    precision = precision or checkpoint.precision
    check_precision(precision, checkpoint, flag)
    model, q = checkpoint.model, None
    if checkpoint.quantization is None:
        model = model.to(DTYPES.get(precision, torch.bfloat16))
        if precision in quantize.PRECISIONS:
            q = quantize.default_quantization(model, precision)
            quantize.reshape(model, q)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    if model.config.tied_embeddings and model.lm_head.scales is None:
        model.lm_head.weight = model.embed_tokens.weight
    model.frequencies = gpt_spec.rope_frequencies(model.config).to(device)
    fill_weights(model, checkpoint.directory, checkpoint.tensors, q)
    if checkpoint.quantization is not None and checkpoint.quantization.rotation:
        quantize.add_rotations(model, device)
    if precision in quantize.PRECISIONS:
        quantize.set_precision(model, precision)
    announce(model.pack(), q)
    return model


# --------------------------------------------------------------------------------------------------
# EAGLE heads
# --------------------------------------------------------------------------------------------------


def read_head(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a published head, by name: of safetensors files, or of a pytorch_model.bin."""
    if any(directory.glob("model*.safetensors*")):
        return {name: stored.read() for name, stored in stored_tensors(weight_files(directory)).items()}
    path = directory / "pytorch_model.bin"
    if not path.exists():
        raise BadInput(f"{directory}: has no weights; model.safetensors or pytorch_model.bin is needed")
    try:
        # Weights only: a pickle of somebody else's must not run.
        mapped = zipfile.is_zipfile(path)  # as PyTorch has written them since 1.6
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises what pickle, zipfile and itself do
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: not a whole file of weights ({reason})") from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise BadInput(f"{path}: holds something else than named tensors")
    return {name: tensors[name] for name in tensor_names(tensors)}


def build_head(raw: dict[str, Any], tensors: dict[str, torch.Tensor], target: Transformer, where: str):
    """An empty head of the layout that the names of the tensors tell -> EagleHead, on the meta device."""
    config = ModelConfig.from_dict({"model_type": "llama"} | raw, where)
    third = "midlayer.self_attn.q_proj.weight" in tensors
    if not third and "layers.0.self_attn.q_proj.weight" not in tensors:
        raise BadInput(f"{where}: the weights beside it are those of no EAGLE-2 or EAGLE-3 head")
    layer = "midlayer" if third else "layers.0"
    optional = {"qkv_bias": "self_attn.q_proj.bias", "o_bias": "self_attn.o_proj.bias"}
    optional |= {"mlp_bias": "mlp.gate_proj.bias", "qk_norm": "self_attn.q_norm.weight"}
    present = {name: f"{layer}.{key}" in tensors for name, key in optional.items()}
    config = replace(config, num_layers=1, **present)
    width = integer_of(raw, "target_hidden_size", config.hidden_size, where) if third else config.hidden_size
    for name, ours, theirs in (
        ("vocabulary", config.vocab_size, target.config.vocab_size),
        ("hidden size", width, target.config.hidden_size),
    ):
        if ours != theirs:
            raise BadInput(f"{where}: the head is for a target with a {name} of {ours}, not {theirs}")
    with torch.device("meta"):
        if not third:
            return EagleHead(config, fc_bias="fc.bias" in tensors)
        if target.config.num_layers < 3:
            raise BadInput(f"{where}: an EAGLE-3 head needs a target of at least 3 layers")
        rows = len(tensors["lm_head.weight"]) if "lm_head.weight" in tensors else config.vocab_size
        drafted = integer_of(raw, "draft_vocab_size", rows, where)
        if drafted < 1:
            raise BadInput(f"{where}: draft_vocab_size is {drafted}; it must be at least 1")
        # As in the authors' code: with this key, the embedding in the file is the head's own.
        return Eagle3Head(config, width, drafted, own_embedding="target_hidden_size" in raw)


def integer_of(raw: dict[str, Any], name: str, default: int, where: str) -> int:
    try:
        return gpt_spec.integer(raw, name, default)
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from None


def check_head(head: EagleHead, tensors: dict[str, torch.Tensor], directory: Path) -> None:
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


def take_vocabulary(
    head: EagleHead, tensors: dict[str, torch.Tensor], directory: Path
) -> torch.Tensor | None:
    """Remove the token map of an EAGLE-3 head from its tensors -> token ids of its logits, None for all."""
    offsets, _ = tensors.pop("d2t", None), tensors.pop("t2d", None)  # t2d, the inverse, is for training
    if head.draft_ids is None or offsets is None:
        if head.draft_ids is not None and len(head.draft_ids) != head.config.vocab_size:
            raise BadInput(f"{directory}: the weights lack d2t, which says what the head's tokens are")
        return None
    ids = torch.arange(offsets.numel()) + offsets.flatten().long()
    known = ids.shape == head.draft_ids.shape and 0 <= ids.min() <= ids.max() < head.config.vocab_size
    if not known or len(ids.unique()) < len(ids):
        raise BadInput(f"{directory}: d2t does not map {len(head.draft_ids)} tokens into the vocabulary")
    return ids


def load_head(path: str | Path, target: Transformer, precision: str | None = None) -> EagleHead:
    """Load an EAGLE-1, EAGLE-2 or EAGLE-3 head for a loaded target, in `precision` (None: bf16 or fp32, as
    the target's norms), quantized on the way if that asks for it. Raises BadInput for what does not fit."""
    directory = find_checkpoint(str(path), HEAD_FLAG)
    raw = read_json(directory / "config.json", required=True)
    tensors, like = read_head(directory), target.norm.weight
    if precision not in (None, *ALL_PRECISIONS):
        raise BadInput(f"precision {precision!r} is none of {', '.join(ALL_PRECISIONS)}")
    dtype = like.dtype if precision is None else DTYPES.get(precision, torch.bfloat16)
    if dtype != like.dtype:
        raise BadInput(
            "--draft_precision: a head shares weights with its target, so both are fp32, or neither"
        )
    head = build_head(raw, tensors, target, str(directory / "config.json"))
    ids = take_vocabulary(head, tensors, directory)
    if not hasattr(head, "embed_tokens"):
        tensors.pop("embed_tokens.weight", None)  # a copy of the target's
    check_head(head, tensors, directory)
    head, q = head.to(dtype), None
    if precision in quantize.PRECISIONS:
        q = quantize.default_quantization(head, precision)
        quantize.reshape(head, q)
    head = head.to_empty(device=like.device).requires_grad_(False).eval()
    head.frequencies = gpt_spec.rope_frequencies(head.config).to(like.device)
    if head.draft_ids is not None:
        head.draft_ids = None if ids is None else ids.to(like.device)
    places, linears = head.checkpoint_tensors(), quantize.linear_names(head)
    for name, tensor in tensors.items():
        parts = {name: tensor} if q is None else quantize.convert(name, tensor, q, linears, tied=False)
        for part, value in parts.items():
            places[part].copy_(value)
    if q is not None:
        quantize.set_precision(head, precision)
    return head.pack().attach(target)


def announce(model: Transformer, q: quantize.Quantization | None) -> None:
    """Say what a user would not expect of this model, in a line each."""
    if q is not None and q.bits == 4 and q.group == -1:
        print("no group size divides the inputs: one scale for each row of weights", file=sys.stderr)
    linears = [m for m in model.modules() if isinstance(m, gpt_spec.Linear)]
    rows = sum(m.weight.dim() == 2 for m in linears)
    if rows and model.norm.weight.dtype == torch.bfloat16 and model.norm.weight.is_cpu and kernels.load():
        print(
            f"{rows} matrices have an odd number of inputs and run without our kernels: near-ties may fall "
            "another way when several tokens are verified at once",
            file=sys.stderr,
        )


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPECIALS = [
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"),
    *("eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248))),
]
CHAT_CONTEXT = 8192  # tokens of an --interactive conversation, where the model has that many
GUARD = "\ufdd0"  # a noncharacter: put inside special tokens that a user typed, so that they stay text


class Tokenizer:
    """Text to token ids and back. Subclasses know ordinary tokens, this class the added ones.

    `specials` have no text, and only a chat template can write them; `added` are ordinary text that is one
    token, like the <think> of Qwen3.
    """

    size: int  # ordinary ids are below it

    def __init__(
        self,
        specials: dict[str, int],
        added: dict[str, int],
        bos: str | None,
        eos: str | None,
        add_bos: bool,
        template: str | None,
    ):
        self.specials, self.added, self.bos, self.eos, self.template = specials, added, bos, eos, template
        self.add_bos = add_bos and bos in specials
        self.special_ids = set(specials.values())
        self.added_bytes = {token: text.encode() for text, token in added.items()}

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text without added tokens."""
        raise NotImplementedError

    def piece(self, token: int) -> bytes:
        """The bytes of an ordinary token."""
        raise NotImplementedError

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text in which special tokens have no meaning. Raises BadInput for what is no Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput("the text holds half a character, which UTF-8 cannot write") from None
        tokens = []
        for part in split_at(self.added, text):
            tokens += [self.added[part]] if part in self.added else self.encode_ordinary(part)
        return tokens

    def encode(self, text: str) -> list[int]:
        """A prompt: BOS where the model wants one, then the text as it is. `</s>` in it is text."""
        return ([self.specials[self.bos]] if self.add_bos else []) + self.encode_text(text)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text: nothing for special ones and ids that only pad the vocabulary."""
        if token in self.added_bytes:
            return self.added_bytes[token]
        return b"" if token in self.special_ids or not 0 <= token < self.size else self.piece(token)

    def decode(self, tokens: list[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation, up to where the answer begins. Special tokens come from the template alone."""
        if self.template is None:
            raise BadInput("--chat: this checkpoint has no chat template; use an instruction-tuned model")

        def guard(text: str) -> str:
            parts = split_at(self.specials, text)
            return "".join(p[0] + GUARD + p[1:] if p in self.specials else p for p in parts)

        guarded = [{**message, "content": guard(message["content"])} for message in messages]
        tokens = []
        for part in split_at(self.specials, render_chat(self.template, guarded, self.bos, self.eos)):
            plain = part.replace(GUARD, "")
            tokens += [self.specials[part]] if part in self.specials else self.encode_text(plain)
        return tokens


def split_at(tokens: dict[str, int], text: str) -> list[str]:
    """The text cut before and after every token that occurs in it, longer ones first."""
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)
    return [part for part in re.split(f"({pattern})", text) if part] if pattern else [text]


def render_chat(template: str, messages: list[dict[str, str]], bos: str | None, eos: str | None) -> str:
    """A chat template in jinja2's sandbox, with the helpers that published templates expect."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    try:
        compiled = environment.from_string(template)
        return compiled.render(
            messages=messages, add_generation_prompt=True, bos_token=bos or "", eos_token=eos or ""
        )
    except Exception as error:  # the template is a program of somebody else's
        raise BadInput(
            f"--chat: the checkpoint's chat template does not take this conversation: {error}"
        ) from None


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model` of Llama 2, Mistral and the shipped models."""

    def __init__(self, path: Path, **settings):
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise BadInput(
                f"{path}: neither a SentencePiece model nor a tiktoken vocabulary ({error})"
            ) from None
        p = self.processor
        self.size = p.get_piece_size()
        control = {p.id_to_piece(i): i for i in range(self.size) if p.is_control(i) or p.is_unknown(i)}
        settings["specials"] = control | settings["specials"]
        for name, token in (("bos", p.bos_id()), ("eos", p.eos_id())):
            settings[name] = settings[name] or (p.id_to_piece(token) if token >= 0 else None)
        super().__init__(**{**settings, "add_bos": settings["add_bos"] is not False})
        self.dummy_prefix = p.encode("a", out_type=str)[0].startswith(
            "\u2581"
        )  # Llama 2 puts a space before every text

    def encode_ordinary(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def piece(self, token: int) -> bytes:
        text = self.processor.id_to_piece(token)
        return (
            bytes([int(text[3:5], 16)])
            if self.processor.is_byte(token)
            else text.replace("\u2581", " ").encode()
        )

    def decode(self, tokens: list[int]) -> str:
        text = super().decode(tokens)
        return text.removeprefix(" ") if self.dummy_prefix else text


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE: `tokenizer.model` of Llama 3, or a `tokenizer.json` (Llama 3, Qwen) turned into the
    same thing.

    ranks: bytes -> merge priority. ids: priority -> token id, where the two differ.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str,
        ids: list[int] | None = None,
        normal_form=None,
        **settings,
    ):
        import tiktoken

        self.encoding = tiktoken.Encoding(
            "checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.ids, self.normal_form = ids, normal_form
        self.pieces = {(ids[rank] if ids else rank): text for text, rank in ranks.items()}
        self.size = max(self.pieces) + 1
        super().__init__(**{**settings, "add_bos": bool(settings["add_bos"])})

    def encode_ordinary(self, text: str) -> list[int]:
        text = unicodedata.normalize(self.normal_form, text) if self.normal_form else text
        ranks = self.encoding.encode_ordinary(text)
        return [self.ids[rank] for rank in ranks] if self.ids else ranks

    def piece(self, token: int) -> bytes:
        return self.pieces.get(token, b"")


class LibraryTokenizer(Tokenizer):
    """Any other `tokenizer.json`, through the optional package `tokenizers`."""

    def __init__(self, path: Path, reason: str, **settings):
        try:
            import tokenizers
        except ImportError:
            raise BadInput(f"{path}: {reason}; `pip install tokenizers` makes it readable") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise BadInput(f"{path}: not a tokenizer ({error})") from None
        self.tokenizer.encode_special_tokens = True  # special tokens in a text are text
        self.size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.byte_level = "ByteLevel" in json.dumps(read_json(path).get("decoder") or {})
        super().__init__(**{**settings, "add_bos": bool(settings["add_bos"])})

    def encode_ordinary(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def piece(self, token: int) -> bytes:
        text = self.tokenizer.id_to_token(token) or ""
        if self.byte_level:
            return unmap_bytes(text)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2 writes a byte as one visible character: itself if it is visible, else one from 256 upwards."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


BYTE_OF = byte_alphabet()


def unmap_bytes(text: str) -> bytes:
    return bytes(BYTE_OF[c] for c in text) if all(c in BYTE_OF for c in text) else text.encode()


def split_pattern(raw: dict[str, Any]) -> str | None:
    """The regular expression by which a byte-level BPE `tokenizer.json` cuts texts; None for another kind."""
    steps = (raw.get("pre_tokenizer") or {}).get("pretokenizers") or [raw.get("pre_tokenizer") or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return GPT2_PATTERN
    if (
        kinds == ["Split", "ByteLevel"]
        and not steps[1].get("use_regex", True)
        and not steps[1].get("add_prefix_space")
    ):
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        return (steps[0].get("pattern") or {}).get("Regex") if plain else None
    return None


def read_tokenizer_json(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE becomes a tiktoken encoding; anything else needs the package `tokenizers`."""
    raw = read_json(path)
    model, normalizer = raw.get("model") or {}, raw.get("normalizer")
    pattern = split_pattern(raw)
    sort_added(settings, {token["id"]: token for token in raw.get("added_tokens") or []})
    if settings["add_bos"] is None:  # then the post-processor says whether texts begin with BOS
        settings["add_bos"] = settings["bos"] is not None and f'"{settings["bos"]}"' in json.dumps(
            raw.get("post_processor")
        )
    plain = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback") and model.get("merges")
    if pattern is None or not plain or normalizer not in (None, {"type": "NFC"}):
        return LibraryTokenizer(path, "not a byte-level BPE of the kind of Llama 3 or Qwen2", **settings)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = dict.fromkeys(a + b for a, b in pairs)  # in order of priority, each token once
    singles = [text for text in model["vocab"] if len(text) == 1 and text in BYTE_OF]
    order = [text for text in [*singles, *merged] if text in model["vocab"]]
    ranks = {unmap_bytes(text): rank for rank, text in enumerate(order)}
    ids = [model["vocab"][text] for text in order]
    return TiktokenTokenizer(ranks, pattern, ids, "NFC" if normalizer else None, **settings)


def read_tiktoken(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """`tokenizer.model` of Llama 3: base64 and rank, a line a token; special tokens follow the last."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:
        raise BadInput(f"{path}: not a whole tiktoken vocabulary ({error})") from None
    names = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}
    settings["specials"] = settings["specials"] or names
    settings["bos"] = settings["bos"] or "<|begin_of_text|>"
    settings["eos"] = settings["eos"] or "<|end_of_text|>"
    return TiktokenTokenizer(
        ranks, LLAMA3_PATTERN, **{**settings, "add_bos": settings["add_bos"] is not False}
    )


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, whichever kind it is; None where there is none."""
    directory = Path(path)
    try:
        return read_tokenizer(directory)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{directory}: its tokenizer files make no sense ({error!r})") from None


def read_tokenizer(directory: Path) -> Tokenizer | None:
    raw = read_json(directory / "tokenizer_config.json")
    settings = {
        "specials": {},
        "added": {},
        "bos": special_name(raw.get("bos_token")),
        "eos": special_name(raw.get("eos_token")),
        "add_bos": raw.get("add_bos_token"),
        "template": chat_template(directory, raw),
    }
    sort_added(settings, raw.get("added_tokens_decoder") or {})
    model = directory / "tokenizer.model"
    if model.exists():
        with open(model, "rb") as file:
            is_tiktoken = re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", file.read(200))
        return read_tiktoken(model, settings) if is_tiktoken else SentencePieceTokenizer(model, **settings)
    if (directory / "tokenizer.json").exists():
        return read_tokenizer_json(directory / "tokenizer.json", settings)
    return None


def sort_added(settings: dict[str, Any], tokens: dict[Any, dict[str, Any]]) -> None:
    """Put added tokens, by id, with the special ones or with those that are text."""
    for token, entry in tokens.items():
        settings["specials" if entry.get("special", True) else "added"][entry["content"]] = int(token)


def special_name(value: Any) -> str | None:
    """tokenizer_config.json writes a special token as a string or as an object."""
    return value.get("content") if isinstance(value, dict) else value


def chat_template(directory: Path, raw: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = raw.get("chat_template")
    if isinstance(template, list):  # several, by name
        return next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template


def stop_ids(directory: Path) -> list[int]:
    """All end-of-text ids: those of generation_config.json, else those of config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory / name).get("eos_token_id")
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


# --------------------------------------------------------------------------------------------------
# Text as it is written
# --------------------------------------------------------------------------------------------------


class TextStream:
    """The text of one output, token by token: never half a character, and nothing from a stop string on."""

    def __init__(self, tokenizer: Tokenizer | None, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""
        self.ends: list[int] = []  # where in the text each token ends
        self.shown = 0  # characters and
        self.shown_tokens = 0  # whole tokens that `new_spans` has handed out

    def add(self, token: int) -> bool:
        """Append a token; True if that completes a stop string, which is then cut away."""
        before = len(self.text)
        self.text += self.decoder.decode(self.tokenizer.token_bytes(token)) if self.tokenizer else f"{token} "
        found = [self.text.find(stop, max(0, before - len(stop))) for stop in self.stops]
        found = [place for place in found if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.decoder.reset()  # half a character may have followed
        self.ends.append(len(self.text))
        return bool(found)

    def finish(self) -> None:
        """Nothing more comes: what was held back is text now."""
        self.text += self.decoder.decode(b"", final=True)
        self.ends[-1:] = [len(self.text)] if self.ends else []
        self.stops = []

    def held_back(self) -> int:
        """Characters at the end that may turn out to be the beginning of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        tails = (self.text[-n:] for n in range(min(longest, len(self.text)), 0, -1))
        return next((len(tail) for tail in tails if any(stop.startswith(tail) for stop in self.stops)), 0)

    def new_spans(self) -> list[tuple[int, str]]:
        """What can be shown now and was not yet, as (index of its token, text)."""
        end, spans = len(self.text) - self.held_back(), []
        while self.shown_tokens < len(self.ends) and self.shown < end:
            until = min(self.ends[self.shown_tokens], end)
            spans.append((self.shown_tokens, self.text[self.shown : until]))
            self.shown = max(until, self.shown)
            self.shown_tokens += self.ends[self.shown_tokens] <= end
        return [span for span in spans if span[1]]


@dataclass
class Output:
    """One prompt and what became of it."""

    prompt_ids: list[int]
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)  # per token: did the drafter propose it?
    steps: int = 0  # verifications; the first token comes from prefill
    finish_reason: str | None = None
    error: str | None = None

    def add(self, emission: Emission) -> None:
        self.token_ids += emission.tokens
        self.steps += emission.draft is not None
        self.drafted += [i < emission.accepted for i in range(len(emission.tokens))]
        if emission.finish_reason:
            self.finish(emission.finish_reason)

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        self.stream.finish()

    @property
    def tokens_per_step(self) -> float | None:
        return (len(self.token_ids) - 1) / self.steps if self.steps else None

    def as_json(self) -> dict[str, Any]:
        has_text = self.stream.tokenizer is not None and self.finish_reason != "error"
        return {
            "prompt_ids": self.prompt_ids,
            "token_ids": self.token_ids,
            "text": self.stream.text if has_text else None,
            "finish_reason": self.finish_reason,
            "error": self.error,
        }


class Screen:
    """Writes outputs in input order, the first unfinished one as it grows, in colours if asked to explain."""

    DRAFTED, OWN, PLAIN = "\033[32m", "\033[33m", "\033[0m"

    def __init__(self, outputs: list[Output], explain: bool, stream=None):
        self.outputs, self.explain, self.stream = outputs, explain, stream or sys.stdout
        self.current, self.begun = 0, False

    @classmethod
    def legend(cls) -> str:
        return f"{cls.DRAFTED}proposed by the drafter{cls.PLAIN}, {cls.OWN}the target's own{cls.PLAIN}"

    def update(self) -> None:
        """Write everything that is new. Texts that are not yet their turn wait in their outputs."""
        while self.current < len(self.outputs):
            output = self.outputs[self.current]
            if not self.begun and len(self.outputs) > 1:
                self.stream.write(f"--- {self.current + 1}\n")
            self.begun = True
            for token, text in output.stream.new_spans():
                colour = self.DRAFTED if output.drafted[token] else self.OWN
                self.stream.write(f"{colour}{text}{self.PLAIN}" if self.explain else text)
            if output.finish_reason is None:
                break
            last = f"error: {output.error}" if output.error else output.stream.text
            self.stream.write("" if last.endswith("\n") and not output.error else "\n")
            self.current, self.begun = self.current + 1, False
        self.stream.flush()


def draw_step(emission: Emission, tokenizer: Tokenizer | None) -> str:
    """What was proposed in a step and what became of it: nodes in a row, branches below each other."""
    tokens, parents = (t[emission.row].tolist() for t in (emission.draft.tokens, emission.draft.parent))
    children = {
        node: [i for i, parent in enumerate(parents) if parent == node] for node in range(len(tokens))
    }
    accepted, node = set(), 0
    for token in emission.tokens[: emission.accepted]:
        node = next(i for i in children[node] if tokens[i] == token)
        accepted.add(node)

    def word(token: int) -> str:
        return repr(tokenizer.token_bytes(token).decode(errors="replace")) if tokenizer else str(token)

    def draw(node: int, indent: str) -> list[str]:
        """The lines of a subtree; only children stand behind their parents."""
        run = [node]
        while len(children[run[-1]]) == 1:
            run += children[run[-1]]
        words = [
            f"{Screen.DRAFTED}{word(tokens[i])}{Screen.PLAIN}" if i in accepted else word(tokens[i])
            for i in run
        ]
        return [indent + " ".join(words)] + [
            line for child in children[run[-1]] for line in draw(child, indent + "    ")
        ]

    own = "".join(f", then {word(token)}" for token in emission.tokens[emission.accepted :])
    drafted = sum(parent >= 0 for parent in parents)
    head = f"\n[{emission.prompt_index + 1}] {drafted} drafted, {emission.accepted} accepted{own}"
    return "\n".join([head, *draw(0, "    ")])


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (python {self.prog} --help lists the flags)")


SPECULATE_K = 4  # tokens of a sequence, unless somebody asks for another number
METHODS = ["autoregressive", "lookup", "sequential", "tree", "hierarchical", "qspec", "auto"]


def tree_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of nodes nor auto")
    return text if text == "auto" else int(text)


def build_parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="generate.py",
        description="Decode text with a Llama-family model and speculative decoding.",
        allow_abbrev=False,
    )
    directory = "a Hugging Face directory or hub repository id"
    p.add_argument("--checkpoint_path", help=f"the target: {directory} (default: the shipped model)")
    p.add_argument(
        "--method", choices=METHODS, help="who drafts (default: sequential where there is a drafter)"
    )
    p.add_argument(
        "--precision", choices=ALL_PRECISIONS, help="of weights and activations (default: the file's own)"
    )
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="a text; - reads standard input, @FILE a file")
    source.add_argument("--prompt_ids", help="token ids, 1,2,3, used as they are")
    source.add_argument(
        "--prompts", metavar="FILE", help='JSON lines: {"prompt": TEXT} or {"prompt_ids": [...]}'
    )
    p.add_argument("--batch_size", type=int, default=1, help="texts decoded at a time")
    add_draft_flags(p, directory)
    p.add_argument("--max_new_tokens", type=int, default=200)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top_k", type=int, default=0, help="keep the k most probable tokens (0: all)")
    p.add_argument("--top_p", type=float, default=1.0, help="keep the smallest set with this probability")
    p.add_argument("--seed", type=int, default=1234, help="output i of a run uses seed + i")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    p.add_argument("--ignore_eos", action="store_true", help="end-of-text tokens do not end the text")
    talk = p.add_mutually_exclusive_group()
    talk.add_argument("--chat", action="store_true", help="the prompt is a message: apply the chat template")
    talk.add_argument(
        "--interactive", action="store_true", help="a conversation; history is kept, so is the cache"
    )
    p.add_argument("--system", metavar="TEXT", help="system message of a chat")
    p.add_argument("--num_samples", type=int, default=1, help="outputs of each prompt")
    p.add_argument("--compile", choices=["none", "default"], default="default", help="torch.compile")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--profile", metavar="FILE", help="write a Chrome trace of the decoding")
    p.add_argument(
        "--explain", action="store_true", help="colour each token by who proposed it; every draft to stderr"
    )
    p.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    return p


def add_draft_flags(p: argparse.ArgumentParser, directory: str) -> None:
    """Who drafts, and how much."""
    p.add_argument(
        "--draft_checkpoint_path",
        help=f"sequential, hierarchical, auto: the small model, {directory}, or self",
    )
    p.add_argument(
        "--eagle_checkpoint_path",
        help=f"tree, hierarchical, auto: an EAGLE head of the target or the small model, {directory}",
    )
    p.add_argument(
        "--draft_precision",
        choices=ALL_PRECISIONS,
        help="of the draft model (default: --precision; of qspec, and of hierarchical with self: the next "
        "lower activations, w4a8 for w4a16), or of the EAGLE head of --method tree (default, and in "
        "hierarchies: 16 bits)",
    )
    p.add_argument(
        "--speculate_k",
        type=int,
        help=f"tokens a sequence drafter proposes (default: {SPECULATE_K}; of auto: what pays, step by step)",
    )
    p.add_argument(
        "--draft_confidence", type=float, default=0.0, help="stop a draft before a less probable token"
    )
    p.add_argument(
        "--tree_size",
        type=tree_size,
        metavar="N|auto",
        help="nodes to verify, the root included (default: auto, what pays, step by step)",
    )
    p.add_argument("--tree_depth", type=int, help=f"levels below the root (default: {gpt_spec.TREE_DEPTH})")
    p.add_argument(
        "--tree_topk", type=int, help=f"children of a node, nodes of a beam (default: {gpt_spec.TREE_TOPK})"
    )
    p.add_argument(
        "--min_draft_length",
        type=int,
        help=f"hierarchical: tokens to hand up at least (default: {gpt_spec.MIN_DRAFT_LENGTH})",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """What argparse does not check. BadInput names the flag."""
    counts = ("batch_size", "speculate_k", "max_new_tokens", "num_samples")
    for name in (*counts, "tree_depth", "tree_topk", "min_draft_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} is {value}; it must be at least 1")
    if not 0 <= args.draft_confidence <= 1:
        raise BadInput(f"--draft_confidence is {args.draft_confidence}; it is a probability, 0 (off) to 1")
    if "" in args.stop:
        raise BadInput("--stop is empty; give the text before which to stop")
    if args.system is not None and not (args.chat or args.interactive):
        raise BadInput("--system needs --chat or --interactive")
    one_text = args.prompts or args.prompt_ids or args.prompt or args.num_samples > 1
    if args.interactive and (args.json or one_text):
        raise BadInput("--interactive reads standard input; leave out --json, --prompt and the like")
    if args.chat and args.prompt_ids:
        raise BadInput("--chat needs a text to put into the template, not --prompt_ids")
    if args.profile and (Path(args.profile).is_dir() or not Path(args.profile).absolute().parent.is_dir()):
        raise BadInput(f"--profile: {args.profile} is no file that can be written")
    check_device(args.device)


def check_device(name: str) -> None:
    try:
        device = torch.empty(0, device=name).device
        usable = device.type in ("cpu", "cuda")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched where the current device is
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise BadInput(f"--device: {name} is not usable here; cpu always is, cuda with an NVIDIA GPU")


@dataclass
class Target:
    """A loaded checkpoint: the model and what its directory says about text."""

    model: Transformer
    tokenizer: Tokenizer | None
    stop_ids: list[int]
    precision: str
    drafts: dict[str, Transformer] = field(default_factory=dict)  # draft models that were loaded, by path


def load_target(args: argparse.Namespace) -> Target:
    directory = find_checkpoint(str(args.checkpoint_path or SHIPPED_TARGET))
    model = load_model(directory, args.precision, args.device)
    precision = quantize.precision_of(model)
    return Target(model, load_tokenizer(directory), [] if args.ignore_eos else stop_ids(directory), precision)


# Flags that only some methods understand.
FLAGS_OF = {
    "draft_checkpoint_path": ["sequential", "hierarchical", "auto"],
    "draft_precision": ["sequential", "tree", "hierarchical", "qspec"],
    "draft_confidence": ["sequential", "qspec"],
    "min_draft_length": ["hierarchical", "auto"],
    **dict.fromkeys(
        ["eagle_checkpoint_path", "tree_size", "tree_depth", "tree_topk"], ["tree", "hierarchical", "auto"]
    ),
}


def build_drafter(args: argparse.Namespace, target: Target) -> tuple[str, Drafter]:
    """(method, drafter) of the flags. Which drafter a method needs is settled here and nowhere else."""
    shipped = args.checkpoint_path is None
    paths = (bool(args.draft_checkpoint_path), bool(args.eagle_checkpoint_path))
    named = {(True, True): "hierarchical", (False, True): "tree", (True, False): "sequential"}
    method = args.method or named.get(paths, "sequential" if shipped else "autoregressive")
    for flag, methods in FLAGS_OF.items():
        unset = 0.0 if flag == "draft_confidence" else None
        if getattr(args, flag) != unset and method not in methods:
            raise BadInput(f"--{flag}: method {method} does not use it; --method {' or '.join(methods)} does")
    if method == "auto":
        names = available_methods(args, target)
        for flag, methods in FLAGS_OF.items():
            if getattr(args, flag) not in (None, 0.0) and not set(names) & set(methods):
                raise BadInput(f"--{flag}: method auto has nothing to use it for; it chooses among {names}")
        return method, gpt_spec.AutoDrafter({name: one_drafter(name, args, target, None) for name in names})
    return method, one_drafter(method, args, target, SPECULATE_K)


def one_drafter(method: str, args: argparse.Namespace, target: Target, speculate_k: int | None) -> Drafter:
    """The drafter of a method; `speculate_k` where no flag says it, None for as many as pay."""
    shipped, k = args.checkpoint_path is None, args.speculate_k or speculate_k
    if method == "autoregressive":
        return Drafter()
    if method == "lookup":
        return gpt_spec.LookupDrafter(k)
    if method == "tree":
        return tree_drafter(args, method, target.model, SHIPPED_HEAD if shipped else None)
    if method == "qspec":
        twin = own_twin(args, target, "--method qspec drafts with")
        return gpt_spec.SequentialDrafter(twin, k, args.draft_confidence, shares_cache=True)
    path = args.draft_checkpoint_path or (str(SHIPPED_SMALL) if shipped else None)
    if path is None:
        raise BadInput(
            f"--method {method} needs --draft_checkpoint_path: a smaller model with the target's vocabulary"
        )
    own = path == "self" and method == "hierarchical"
    reason = "--draft_checkpoint_path: self means"
    model = own_twin(args, target, reason) if own else load_draft_model(path, args, target)
    if method == "sequential":
        return gpt_spec.SequentialDrafter(model, k, args.draft_confidence)
    head = SMALL_HEAD if Path(path).resolve() == SHIPPED_SMALL else SHIPPED_HEAD if own and shipped else None
    tree = tree_drafter(args, method, model, head)
    least = args.min_draft_length or gpt_spec.MIN_DRAFT_LENGTH
    with naming_flags():
        return gpt_spec.HierarchicalDrafter(model, tree, least, shares_cache=own)


def available_methods(args: argparse.Namespace, target: Target) -> list[str]:
    """What `auto` chooses from, beside drafting nothing: all that there is a model for.

    A head belongs to the target if it has its hidden size, or else to the small model: a hierarchy. Where
    both are the shipped ones, a hierarchy is not tried: it takes minutes to compile, and loses.
    """
    shipped, small, head = (
        args.checkpoint_path is None,
        args.draft_checkpoint_path,
        args.eagle_checkpoint_path,
    )
    names = ["lookup"]
    if small != "self" and (small or shipped):
        names.append("sequential")
    of_target = shipped
    if head is not None:
        raw = read_json(find_checkpoint(head, "--eagle_checkpoint_path") / "config.json")
        size = raw.get("target_hidden_size", raw.get("hidden_size"))
        of_target = size == target.model.config.hidden_size or not (small or shipped)
    if of_target:
        names.append("tree")
    if (head is not None and not of_target) or (small == "self" and of_target):
        names.append("hierarchical")
    if quantize.lower_precisions(target.precision):
        names.append("qspec")
    return names


def tree_drafter(args: argparse.Namespace, method: str, model: Transformer, default: Path | None) -> Drafter:
    """For the target or, in a hierarchy, for the model in the middle."""
    path = args.eagle_checkpoint_path or default
    if path is None:
        whose = "this very target" if method == "tree" else "the model in --draft_checkpoint_path"
        raise BadInput(f"--method {method} needs --eagle_checkpoint_path: an EAGLE head of {whose}")
    head = load_head(path, model, args.draft_precision if method == "tree" else None)
    size = args.tree_size if isinstance(args.tree_size, int) else None
    shape = (args.tree_depth or gpt_spec.TREE_DEPTH, args.tree_topk or gpt_spec.TREE_TOPK)
    with naming_flags():
        return gpt_spec.TreeDrafter(head, size, *shape)


@contextmanager
def naming_flags():
    """What the engine finds wrong begins with the name of a field, which is that of the flag."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"--{error}") from None


def load_draft_model(path: str, args: argparse.Namespace, target: Target) -> Transformer:
    """The draft model, checked to speak the target's vocabulary."""
    precision = args.draft_precision or target.precision
    if path == "self":
        if precision != target.precision:
            raise BadInput(
                "--draft_precision: self drafts with the target's own weights, in its precision; --method "
                "qspec drafts with them at lower activations"
            )
        return target.model
    if path in target.drafts:
        return target.drafts[path]
    directory = find_checkpoint(path, "--draft_checkpoint_path")
    model = load_model(directory, precision, args.device, "--draft_checkpoint_path")
    difference = compare_vocabularies(target, model.config.vocab_size, load_tokenizer(directory))
    if difference:
        raise BadInput(f"--draft_checkpoint_path: {path} has another vocabulary: {difference}")
    target.drafts[path] = model
    return model


def own_twin(args: argparse.Namespace, target: Target, reason: str) -> Transformer:
    """The target's own weights with lower activations; an error begins with the reason for wanting them."""
    own, lower = target.precision, quantize.lower_precisions(target.precision)
    if not lower:
        raise BadInput(
            f"{reason} the target's weights at lower activations, and {own} has no lower ones; "
            "use --precision w4a16"
        )
    draft = args.draft_precision or lower[0]
    if draft not in (own, *lower):
        raise BadInput(f"--draft_precision is {draft}; weights of {own} draft in {' or '.join(lower)}")
    return quantize.share_weights(target.model, draft)


def compare_vocabularies(target: Target, size: int, tokenizer: Tokenizer | None) -> str | None:
    """How a drafter's vocabulary differs from the target's; None where it does not."""
    if size != target.model.config.vocab_size:
        return f"{size} tokens, not {target.model.config.vocab_size}"
    if tokenizer is None or target.tokenizer is None:
        return None
    pairs = ((target.tokenizer.token_bytes(i), tokenizer.token_bytes(i)) for i in range(size))
    return next((f"token {i} is {b!r}, not {a!r}" for i, (a, b) in enumerate(pairs) if a != b), None)


def read_text(value: str) -> str:
    """--prompt: a text, - for standard input, @FILE for a file. Nothing is stripped."""
    try:
        if value == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(value[1:]).read_bytes().decode("utf-8") if value.startswith("@") else value
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompt: {value} cannot be read as UTF-8 text: {error}") from None


def encode_prompt(text: str, args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise BadInput(
            f"{args.checkpoint_path}: has no tokenizer, so texts cannot be read; give --prompt_ids"
        )
    if not args.chat:
        return tokenizer.encode(text)
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": text}])


def read_line(line: str, args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    """The token ids of one line of --prompts."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise BadInput(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise BadInput("not a JSON object")
    if "prompt_ids" in entry:
        ids = entry["prompt_ids"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise BadInput("prompt_ids is not a list of integers")
        return ids
    key = next((key for key in ("prompt", "question", "turns") if key in entry), None)
    if key is None:
        raise BadInput("has none of prompt, prompt_ids, turns and question")
    turns = entry[key] if key == "turns" else [entry[key]]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise BadInput(f"{key} is not a text" if key != "turns" else "turns is not a list of texts")
    return encode_prompt(turns[0], args, tokenizer)


def read_prompts(args: argparse.Namespace, target: Target) -> list[Output]:
    """One output for every sample of every prompt. A bad line of --prompts is an output with an error."""
    outputs = []

    def add(ids: list[int], error: str | None = None) -> None:
        for _ in range(args.num_samples):
            stream = TextStream(target.tokenizer, args.stop)
            outputs.append(Output(ids, stream, finish_reason="error" if error else None, error=error))

    if args.prompts is None:
        add(read_prompt(args, target))
        return outputs
    try:
        lines = Path(args.prompts).read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts: {args.prompts} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                ids = read_line(line, args, target.tokenizer)
                check_length(ids, args, target)
                add(ids)
            except BadInput as error:
                add([], f"{args.prompts} line {number}: {error}")
    if not outputs:
        raise BadInput(f"--prompts: {args.prompts} has no lines")
    return outputs


def read_prompt(args: argparse.Namespace, target: Target) -> list[int]:
    """The token ids of --prompt, --prompt_ids or the default prompt."""
    flag = "--prompt" if args.prompt_ids is None else "--prompt_ids"
    try:
        if args.prompt_ids is not None:
            ids = [int(part) for part in args.prompt_ids.split(",")]
        else:
            text = DEFAULT_PROMPT if args.prompt is None else read_text(args.prompt)
            ids = encode_prompt(text, args, target.tokenizer)
        check_length(ids, args, target)
    except BadInput as error:
        raise BadInput(str(error) if str(error).startswith("--") else f"{flag}: {error}") from None
    except ValueError:
        raise BadInput(f"{flag}: {args.prompt_ids!r} is not a list of integers like 1,2,3") from None
    return ids


def check_length(ids: list[int], args: argparse.Namespace, target: Target) -> None:
    config = target.model.config
    gpt_spec.check_prompt(config, ids, config.max_context)
    gpt_spec.cache_length(config, min(len(ids) + args.max_new_tokens, config.max_context))


def decode_all(
    decoder: Decoder,
    outputs: list[Output],
    args: argparse.Namespace,
    stops: list[int],
    stats: Stats,
    reuse: bool = False,
) -> None:
    """Run all prompts that are in order, and show what is new after every step."""
    todo = [output for output in outputs if output.error is None]
    seeds = [args.seed + i for i, output in enumerate(outputs) if output.error is None]
    explain_to = sys.stderr if args.json else sys.stdout
    screen = Screen(outputs, args.explain, explain_to) if args.explain or not args.json else None
    why = ""

    def should_stop(prompt: int, token: int) -> bool:
        return todo[prompt].stream.add(token)

    prompts = [output.prompt_ids for output in todo]
    for emissions in decoder.run(prompts, args.max_new_tokens, stops, should_stop, stats, reuse, seeds):
        for emission in emissions:
            todo[emission.prompt_index].add(emission)
            if args.explain and emission.draft is not None:
                if (reason := decoder.drafter.explain()) != why:
                    why = reason
                    print(f"\n{why}", file=sys.stderr)
                print(draw_step(emission, todo[emission.prompt_index].stream.tokenizer), file=sys.stderr)
        if screen:
            screen.update()
    if screen:
        screen.update()


def interact(decoder: Decoder, target: Target, args: argparse.Namespace, stats: Stats) -> None:
    """A conversation on standard input: lines are messages or, without a chat template, more text."""
    tokenizer, history = target.tokenizer, Conversation(target.tokenizer, args.system)
    if tokenizer.template is None:
        print("no chat template: what you type is continued as text", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        try:
            output = Output(history.ask(line), TextStream(tokenizer, args.stop))
            decode_all(decoder, [output], args, target.stop_ids, stats, reuse=True)
        except KeyboardInterrupt:  # ends this answer, not the conversation
            output.finish("stop")
            print()
        except BadInput as error:
            print(f"error: {error}; the conversation starts anew", file=sys.stderr)
            history = Conversation(tokenizer, args.system)
            continue
        history.answer(output)


class Conversation:
    """What has been said, as the prompt of the next answer."""

    def __init__(self, tokenizer: Tokenizer, system: str | None):
        self.tokenizer, self.ids = tokenizer, []
        self.messages = [{"role": "system", "content": system}] if system is not None else []

    def ask(self, line: str) -> list[int]:
        """The prompt that ends with this line of the user's."""
        if self.tokenizer.template is None:
            self.ids = self.ids + (
                self.tokenizer.encode_text(line) if self.ids else self.tokenizer.encode(line)
            )
            return self.ids
        self.messages.append({"role": "user", "content": line.rstrip("\n")})
        return self.tokenizer.encode_chat(self.messages)

    def answer(self, output: Output) -> None:
        self.ids = output.prompt_ids + output.token_ids
        self.messages.append({"role": "assistant", "content": output.stream.text})


def peak_memory(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def weight_bytes(models: list[torch.nn.Module]) -> int:
    tensors = {p.data_ptr(): p.numel() * p.element_size() for model in models for p in model.parameters()}
    return sum(tensors.values())


STATS_FIELDS = [
    *("new_tokens", "prefill_seconds", "time_to_first_token_seconds"),
    *("decode_seconds", "decode_tokens_per_second", "target_forwards"),
    *("drafted_tokens", "accepted_tokens", "tokens_per_step"),
    *("acceptance_by_position", "compile_seconds"),
    *("aggregate_tokens_per_second", "occupancy"),
]

TREE_FIELDS = ["expected_accepted_tokens", "nodes_histogram"]
LEVEL_FIELDS = [
    *("drafted_tokens", "accepted_tokens", "tokens_per_step"),
    *("drafting_seconds", "verification_seconds"),
]


def stats_json(
    stats: Stats, models: list[torch.nn.Module], device: str, method: str, outputs: list[Output]
) -> dict[str, Any]:
    memory = {"peak_memory_bytes": peak_memory(device), "weight_bytes": weight_bytes(models)}
    names = STATS_FIELDS + (TREE_FIELDS if method == "tree" else [])
    more = {"levels": levels_json(stats)} if stats.inside else {}
    more |= {"steps_by_drafter": stats.drafter_histogram} if stats.drafter_histogram else {}
    more |= {"tokens_per_step_by_output": [output.tokens_per_step for output in outputs]}
    return {name: getattr(stats, name) for name in names} | memory | more


def levels_json(stats: Stats) -> list[dict[str, Any]]:
    """The target's level first; the drafting_seconds of a level are all that happens in those behind it."""
    level = {"forwards": stats.target_forwards} | {name: getattr(stats, name) for name in LEVEL_FIELDS}
    return [level, *(levels_json(stats.inside) if stats.inside else [])]


def format_levels(levels: list[dict[str, Any]]) -> str:
    """A line for people: what every level yields, and where the time goes."""
    names = ["the target", "the middle model", *(f"model {i}" for i in range(2, len(levels)))]
    parts = [
        f"{name} {level['tokens_per_step']:.2f} tokens per step, {level['verification_seconds']:.2f} s"
        for name, level in zip(names, levels)
    ]
    return f"levels: {'; '.join(parts)}; its drafter {levels[-1]['drafting_seconds']:.2f} s\n"


def format_drafters(steps: dict[str, int]) -> str:
    """A line for people: who was in charge for how long."""
    parts = (f"{name} {count}" for name, count in sorted(steps.items(), key=lambda item: -item[1]))
    return f"steps by drafter: {', '.join(parts)}\n"


def format_batch(s: dict[str, Any]) -> str:
    """A line for people: how many texts did, and how evenly."""
    rates = [rate for rate in s["tokens_per_step_by_output"] if rate is not None]
    line = f"all texts: {s['aggregate_tokens_per_second']:.1f} tokens/s with prefill"
    if rates:  # texts of one token take no step
        line += f"; rows occupied {s['occupancy']:.2f}; tokens per step of a text {min(rates):.2f} to "
        line += f"{max(rates):.2f}"
    return line + "\n"


def format_stats(s: dict[str, Any]) -> str:
    """Three to six lines for people; `s` is what --json prints as `stats`."""
    by_position = ", ".join(f"{share:.2f}" for share in s["acceptance_by_position"])
    accepted = f"{s['accepted_tokens']} of {s['drafted_tokens']} drafted tokens accepted"
    if "expected_accepted_tokens" in s:
        sizes = ", ".join(f"{n} in {steps}" for n, steps in sorted(s["nodes_histogram"].items()))
        accepted += f", {s['expected_accepted_tokens']:.0f} expected; nodes verified: {sizes} steps"
    return (
        f"{s['new_tokens']} tokens, {s['decode_tokens_per_second']:.1f} tokens/s; "
        f"first token after {s['time_to_first_token_seconds']:.3f} s; warm-up {s['compile_seconds']:.1f} s\n"
        f"{s['tokens_per_step']:.2f} tokens per step of the target"
        + (f"; {accepted}; at least 1, 2, ... in {by_position} of the steps\n" if by_position else "\n")
        + (format_drafters(s["steps_by_drafter"]) if "steps_by_drafter" in s else "")
        + (format_levels(s["levels"]) if "levels" in s else "")
        + (format_batch(s) if len(s["tokens_per_step_by_output"]) > 1 else "")
        + f"weights {s['weight_bytes'] / 1e6:.1f} MB, peak memory {s['peak_memory_bytes'] / 1e6:.0f} MB"
    )


@contextmanager
def trace(path: str | None):
    """Profile what happens inside, if a file is given for it."""
    if path is None:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(path)


def can_compile(args: argparse.Namespace) -> bool:
    """Inductor's CPU code needs a C++ compiler; without one decoding runs eagerly, and says so."""
    if args.compile == "none":
        return False
    if not args.device.startswith("cpu"):
        return True
    from torch._inductor.cpp_builder import get_cpp_compiler  # raises where it finds none that works

    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    try:
        missing = None if get_cpp_compiler() and headers.exists() else f"{headers}, of the Python headers,"
    except Exception:
        missing = "a C++ compiler"
    if missing:
        print(f"{missing} is missing: running without torch.compile, which is slower", file=sys.stderr)
    return missing is None


COSTS_LAST = 24 * 3600  # seconds; a machine changes


def settings_of(drafter: Drafter) -> list[Any]:
    """All that the costs of a drafter hang on: its numbers, its models, and what drafts inside."""
    values = {name: v if isinstance(v, (list, tuple)) else [v] for name, v in vars(drafter).items()}
    fields = [(name, v) for name, v in values.items() if all(isinstance(each, (int, float)) for each in v)]
    models = [(m.config, weight_bytes([m])) for m in vars(drafter).values() if isinstance(m, torch.nn.Module)]
    twins = [quantize.precision_of(m) for m in vars(drafter).values() if isinstance(m, Transformer)]
    inside = [settings_of(inner) for inner in vars(drafter).values() if isinstance(inner, Drafter)]
    return [type(drafter).__name__, fields, models, twins, inside]


def costs_file(decoder: Decoder, precision: str) -> Path:
    """Where the costs of such a decoder on this device are kept: what they hang on is in the name."""
    setup, contestants = decoder.setup, decoder.drafter.contestants()
    cuda = setup.device.type == "cuda"
    machine = torch.cuda.get_device_name(setup.device) if cuda else f"{platform.machine()} {platform.node()}"
    names = ("gpt_spec.py", "quantize.py", "kernels.py", "kernels.cpp", "kernels_cuda.py")
    sources = [Path(__file__).with_name(name).stat().st_mtime_ns for name in names]
    what = [machine, torch.__version__, kernels.PATH, torch.get_num_threads(), sources, precision]
    what += [decoder.model.config, weight_bytes([decoder.model]), replace(setup.sampling, seed=0)]
    what += [setup.batch_size, setup.slots, setup.compile]
    what += [(name, settings_of(drafter)) for name, drafter in contestants.items()]
    return kernels.cache_directory() / f"costs-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"


def read_costs(file: Path) -> dict[str, float]:
    """Seconds by name and size; empty if the file is not there, too old, or damaged."""
    try:
        fresh = 0 <= time.time() - file.stat().st_mtime < COSTS_LAST
        costs = json.loads(file.read_text()) if fresh else {}
        usable = all(isinstance(seconds, float) and 0 < seconds < 1e6 for seconds in costs.values())
        return costs if usable else {}
    except (OSError, ValueError, AttributeError):
        return {}


def warm_up(decoder: Decoder, precision: str) -> float:
    """`Decoder.warm_up` with what steps cost when they were measured last, if that was today."""
    if not decoder.drafter.needs_costs:
        return decoder.warm_up()
    file = costs_file(decoder, precision)
    costs = read_costs(file)
    known = len(costs)
    seconds = decoder.warm_up(costs)
    if len(costs) > known:
        with suppress(OSError):  # a full disk costs a measurement next time
            for old in file.parent.glob("costs-*"):
                if time.time() - old.stat().st_mtime > COSTS_LAST:
                    old.unlink()
            scratch = file.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(costs))
            scratch.replace(file)
    return seconds


def load_kernels() -> None:
    try:
        kernels.load()
    except ValueError as error:  # of the environment variable
        raise BadInput(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Everything between the flags and the exit status."""
    check_arguments(args)
    load_kernels()
    with naming_flags():
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    target = load_target(args)
    method, drafter = build_drafter(args, target)
    config = target.model.config
    if args.interactive and target.tokenizer is None:
        raise BadInput(f"--interactive: {args.checkpoint_path} has no tokenizer")
    outputs = [] if args.interactive else read_prompts(args, target)
    longest = max((len(output.prompt_ids) for output in outputs), default=CHAT_CONTEXT) + args.max_new_tokens
    window = config.sliding_window or config.max_context
    max_length = gpt_spec.cache_length(config, min(longest, config.max_context, window))
    for model in drafter.models:
        gpt_spec.check_window(model.config, max_length)
    compile = can_compile(args)
    try:
        decoder = Decoder(target.model, drafter, sampling, max_length, args.batch_size, compile)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--batch_size {args.batch_size}: the caches cannot be allocated ({reason})") from None
    stats = Stats(compile_seconds=warm_up(decoder, target.precision))
    if args.explain:
        print(Screen.legend(), file=sys.stderr, flush=True)
    with trace(args.profile):
        if args.interactive:
            interact(decoder, target, args, stats)
        else:
            decode_all(decoder, outputs, args, target.stop_ids, stats)
    summary = stats_json(stats, [target.model, *drafter.models], args.device, method, outputs)
    if args.json:
        head = {"method": method, "precision": target.precision, "device": args.device, "seed": args.seed}
        print(json.dumps({**head, "outputs": [output.as_json() for output in outputs], "stats": summary}))
    print(f"\n{method}, {target.precision} on {args.device}: {format_stats(summary)}", file=sys.stderr)
    errors = [output.error for output in outputs if output.error]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(build_parser().parse_args(argv))
    except BadInput as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our text has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
