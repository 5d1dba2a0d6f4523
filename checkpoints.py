"""checkpoints.py: directories in Hugging Face's layout, as models.

    from checkpoints import load_model
    target = load_model("DIR", "w4a16")     # a directory or a hub repository id, in a precision

This file knows directories, headers and weights. It does not know text (`text.py`), how anything is decoded
(`gpt_spec.py`), or how a better quantization is found (`quantize.py`). Heads are read in `heads.py`.

The one idea: check first, read later. A checkpoint is opened by its headers and the model is on the meta
device, so what does not fit is refused before it costs memory. Then each tensor goes from the mapped file
into its place, and weights are never held twice.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from model import BadInput, Linear, ModelConfig, Transformer, rope_frequencies
from packing import (
    PRECISIONS,
    Quantization,
    Stored,
    check_permutations,
    convert,
    default_quantization,
    linear_names,
    reshape,
    set_precision,
)
from parallel import ROWS, Ranks, Share
from published import drop_scales, find_layout, refuse_foreign, translate
from rotation import add_rotations
from text import Tokenizer, load_tokenizer, read_json

MODELS = Path(__file__).resolve().parent / "models"
SHIPPED_TARGET, SHIPPED_SMALL = MODELS / "python-7m", MODELS / "python-1m"
SHIPPED_HEAD, SMALL_HEAD = MODELS / "python-7m-eagle", MODELS / "python-1m-eagle"  # of these two
SOURCES = sorted(
    p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".cpp", ".h")
)  # all of ours
READ_BY_ALL = ("prompts", "prompt", "prompt_file", "json_schema", "grammar", "draft_vocab_text")  # files
HINT = "config.json and the weights do not belong together"
HEAD_FLAG = "--eagle_checkpoint_path"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # precision names that need no quantizer
ALL_PRECISIONS = [*DTYPES, *PRECISIONS]
FILE_PRECISION = {"F32": "fp32", "BF16": "bf16", "F16": "bf16"}  # what a file's own dtype is decoded in


PICKLE = "a pickle; convert it to safetensors"
FOREIGN = {  # files that hold no checkpoint that is read here, and what they are
    "adapter_model.*": "a LoRA adapter and no model; merge it into its model",
    "consolidated*.safetensors": "weights under Mistral's own names; those of Hugging Face are read",
    "pytorch_model*.bin": PICKLE, "consolidated*.pth": PICKLE, "*.pt": PICKLE,
    "*.gguf": "a GGUF file, which is not read", "*.npz": "weights of MLX, which are not read",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Files and their headers
# --------------------------------------------------------------------------------------------------


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

    wanted = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
    wanted += ["pytorch_model.bin"] if flag == HEAD_FLAG else []  # all that most published heads have
    unwanted = ["original/*", "consolidated*"]  # the same weights once more
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # no network, no repository, no permission: the hub has a dozen classes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInput(
            f"{flag}: {name} is not a local directory, and the hub did not give it: {reason}"
        ) from None


def only_file(directory: Path, name: str) -> Path | None:
    """The file of that name, else the only one whose name ends like it: GPTQ tools have their own."""
    if (directory / name).exists():
        return directory / name
    others = list(directory.glob(f"*{name.removeprefix('model')}"))
    return others[0] if len(others) == 1 else None


def refuse_files(directory: Path) -> None:
    """Raise BadInput, naming what is there, for a directory that has weights, but none that are read here."""
    names = sorted(path.name for path in directory.iterdir())
    kinds = {name: next((kind for kind in FOREIGN if fnmatch(name, kind)), None) for name in names}
    if "adapter_config.json" in names and "config.json" in names:  # transformers loads a third model then
        raise BadInput(
            f"{directory}: has config.json and adapter_config.json: is it a model or a LoRA adapter?"
        )
    if not any(name.endswith(".safetensors") and kinds[name] is None for name in names):
        for name, kind in kinds.items():
            if kind is not None:
                raise BadInput(f"{directory}: has only {name}, {FOREIGN[kind]}")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or those of its index; none from outside.

    As transformers does, a whole file is taken whatever an index beside it lists, which may be a stale one.
    """
    single = only_file(directory, "model.safetensors")
    index = only_file(directory, "model.safetensors.index.json")
    if single is not None and (index is None or not re.search(r"-\d+-of-\d+\.", single.name)):
        return [single]
    if index is None:
        has = "several weight files and no index" if any(directory.glob("*.safetensors")) else "no weights"
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


def open_weights(path: Path) -> Any:
    """A safetensors file, memory-mapped: tensors are read when asked for and never held twice."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"{path}: not a whole safetensors file ({error}); it may have been cut off in a download"
        ) from None


def tensor_names(weights: Any) -> list[str]:
    """The names in an open file or a dictionary. RoPE frequencies of old Llama checkpoints are left out: they
    follow from the config."""
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


def stored_quantization(files: list[Path]) -> Quantization | None:
    """How the weights are quantized, from the metadata of files of ours; None if they are not."""
    metadata = {}
    for path in files:
        with open_weights(path) as weights:
            metadata[path] = (weights.metadata() or {}).get("gpt_spec")
    first = metadata[files[0]]
    for path, text in metadata.items():
        if text != first:
            raise BadInput(f"{path}: is quantized otherwise than {files[0].name}")
    return None if first is None else Quantization.from_json(first, str(files[0]))


def published_config(directory: Path, raw: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """How another tool says that it quantized a checkpoint, and the file that says so; there are six places
    for it."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if not isinstance(raw.get(key) or {}, dict):
            raise BadInput(f"{directory / 'config.json'}: {key} is no object")
    inside = raw.get("quantization_config") or raw.get("compression_config") or raw.get("quantization")
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        beside = read_json(directory / name)
        if beside:
            where = directory / ("config.json" if inside else name)
            return {"quant_method": method} | beside | (inside or {}), str(where)
    if inside and "quant_method" not in inside and "config_groups" in inside:
        inside = {"quant_method": "compressed-tensors"} | inside
    beside = read_json(directory / "hf_quant_config.json").get("quantization")
    if not inside and isinstance(beside, dict):
        return {"quant_method": "modelopt"} | beside, str(directory / "hf_quant_config.json")
    return inside or None, str(directory / "config.json")


def stop_ids(directory: Path, tokenizer: Tokenizer | None = None) -> list[int]:
    """All end-of-text ids: those of generation_config.json, else those of config.json; and the tokenizer's.

    A chat model's own end of turn is often only in the files of its tokenizer.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory / name).get("eos_token_id")
        if ids is not None:
            found = ids if isinstance(ids, list) else [ids]
            if not all(type(token) is int and token >= 0 for token in found):
                raise BadInput(
                    f"{directory / name}: eos_token_id is {ids!r}, not a token id or a list of them"
                )
            break
    tokenizer = tokenizer or load_tokenizer(directory)
    own = None if tokenizer is None else tokenizer.specials.get(tokenizer.eos)
    return found if own is None or own in found else [*found, own]


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A directory whose headers have been checked: nothing of its weights is in memory."""

    directory: Path
    files: list[Path]
    tensors: dict[str, Stored]  # in our format, whatever the files have
    model: Transformer  # on the meta device, in the form of the tensors
    quantization: Quantization | None
    precision: str  # the files' own
    published: str | None = None  # another tool's format, by name


def open_checkpoint(directory: Path) -> Checkpoint:
    """Check a directory: its configuration, and that each weight has a place and each place a weight."""
    where = str(directory / "config.json")
    refuse_files(directory)
    raw = read_json(directory / "config.json", required=True)
    config = ModelConfig.from_dict(raw, where)
    files = weight_files(directory)
    q, tensors = stored_quantization(files), stored_tensors(files)
    published, settings = published_config(directory, raw) if q is None else (None, where)
    layout = None
    with torch.device("meta"):
        model = Transformer(config)
    if q is None:
        if published is None:
            refuse_foreign(tensors, where)
        else:
            layout = find_layout(published, settings)
        tensors = drop_scales(tensors, published, layout, settings)
        if layout is not None:
            tensors, q = translate(layout, tensors, model, settings)
    if q is not None:
        permuted = check_permutations(tensors, model)
        try:
            reshape(model.to(torch.bfloat16), q, permuted)
        except BadInput as error:
            raise BadInput(f"{files[0] if len(files) == 1 else directory}: {error}") from None
    own = check_weights(model, directory, tensors)
    own = f"w{q.bits}a{layout.activation_bits if layout else 16}" if q else own
    return Checkpoint(directory, files, tensors, model, q, own, layout and layout.name)


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


def check_tensor(name: str, stored: Stored, place: Tensor) -> None:
    """Raise BadInput if a tensor of a file, known by its header, does not fit into its place."""
    shape, kind, path, _ = stored
    if shape != tuple(place.shape):
        raise BadInput(f"{path}: {name} has shape {shape}, config.json asks for {tuple(place.shape)}")
    fixed = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.float16: "F16"}.get(place.dtype)
    if fixed and kind != fixed:
        raise BadInput(f"{path}: {name} is {kind}; the format has {fixed}")
    if not fixed and kind not in FILE_PRECISION:
        raise BadInput(f"{path}: {name} is {kind}; float32, bfloat16 and float16 are supported")


def weight_places(model: Transformer) -> dict[str, Tensor]:
    """Where tensors of a checkpoint go; a tied model may come with a second copy of its embedding."""
    places = model.checkpoint_tensors()
    shared = not any(name.startswith("lm_head.") for name in places)
    return places | ({"lm_head.weight": places["model.embed_tokens.weight"]} if shared else {})


def check_precision(precision: str, checkpoint: Checkpoint, flag: str) -> None:
    """Raise BadInput for a precision that the weights cannot have. Quantized weights stay what they are; only
    their activations are a choice."""
    if precision not in ALL_PRECISIONS:
        raise BadInput(f"precision {precision!r} is none of {', '.join(ALL_PRECISIONS)}")
    q = checkpoint.quantization
    possible = [name for name, (bits, _) in PRECISIONS.items() if q is not None and bits == q.bits]
    if q is not None and precision not in possible:
        flag = flag.replace("checkpoint_path", "precision")
        raise BadInput(
            f"{flag}: {checkpoint.directory} has {q.bits}-bit weights; "
            f"use {' or '.join(possible)}, not {precision}"
        )


def check_lm_head_bits(bits: int | None, checkpoint: Checkpoint, precision: str) -> None:
    """Raise BadInput for bits that lm_head cannot have. They are a choice where 16-bit weights are quantized
    while they load; elsewhere only those that are there will do."""
    q = checkpoint.quantization
    own = q.bits_of("lm_head") if q is not None else {"fp32": 32, "bf16": 16}.get(precision)
    if None not in (bits, own) and bits != own:
        raise BadInput(
            f"--lm_head_bits {bits} is for 16-bit weights that --precision quantizes; in {precision}, the "
            f"lm_head of {checkpoint.directory} has {own} bits"
        )


def load_model(
    path: str | Path,
    precision: str | None = None,
    device: str = "cpu",
    flag: str = "--checkpoint_path",
    lm_head_bits: int | None = None,
    ranks: Ranks = Ranks(),
) -> Transformer:
    """Load a Hugging Face directory or hub repository. `precision` is fp32, bf16 or a name of
    `packing.PRECISIONS`; None is the file's own. `lm_head_bits`: see `default_quantization`;
    `ranks`: the processes that share the model.

    Weights go from the mapped file into place, one tensor at a time. 16-bit ones are quantized on the way if
    the precision asks for it, those that another tool has quantized are brought into our format. Raises
    BadInput for anything that does not fit.
    """
    checkpoint = open_checkpoint(find_checkpoint(str(path), flag))
    precision = precision or checkpoint.precision
    check_precision(precision, checkpoint, flag)
    check_lm_head_bits(lm_head_bits, checkpoint, precision)
    model, q = checkpoint.model, None
    if checkpoint.quantization is None:
        model = model.to(DTYPES.get(precision, torch.bfloat16))
        if precision in PRECISIONS:
            q = default_quantization(model, precision, lm_head_bits)
            reshape(model, q)
    share = None
    if ranks != Ranks():
        check_split(checkpoint)
        share = Share(model, ranks)
    model = share.model(q or checkpoint.quantization) if share else model
    model = model.to_empty(device=device).requires_grad_(False).eval()
    if model.config.tied_embeddings and model.lm_head.scales is None:
        model.lm_head.weight = model.embed_tokens.weight
    model.frequencies = rope_frequencies(model.config).to(device)
    fill_weights(model, checkpoint.directory, checkpoint.tensors, q, share)
    if checkpoint.quantization is not None and checkpoint.quantization.rotation:
        add_rotations(model, device)
    if share:
        share.join(model)
    if precision in PRECISIONS:
        set_precision(model, precision)
    announce(model.pack(), q)
    return model


def check_split(checkpoint: Checkpoint) -> None:
    """Raise BadInput for weights that several processes, or --sum_parts, cannot share."""
    wanted = ("o_proj.permutation", "down_proj.permutation")
    wrong = next((name for name in checkpoint.tensors if name.endswith(wanted)), None)
    q = checkpoint.quantization
    if wrong or (q is not None and q.rotation):
        what = f"{wrong} is there: act-order" if wrong else "the model is rotated"
        raise BadInput(f"{checkpoint.directory}: {what}, which mixes what several processes or parts split")


def fill_weights(
    model: Transformer,
    directory: Path,
    checked: dict[str, Stored],
    q: Quantization | None,
    share: Share | None,
) -> None:
    """Copy every checked tensor into its place, or its share, quantized on the way if `q` is given.

    What a tied model has twice must be the same.
    """
    places, linears, head = model.checkpoint_tensors(), linear_names(model), None
    tied = model.config.tied_embeddings
    for name, stored in checked.items():
        tensor = stored.read()
        by_rows = share is not None and name.split(".")[-2] in ROWS  # cut before it is quantized
        tensor = share.of(name, tensor) if by_rows else tensor
        if name == "lm_head.weight" and tied:
            head = tensor
        else:
            tensors = {name: tensor} if q is None else convert(name, tensor, q, linears, tied)
            for part, value in tensors.items():
                places[part].copy_(value if share is None or by_rows else share.of(part, value))
    if head is not None and not torch.equal(head.to(model.embed_tokens.weight), model.embed_tokens.weight):
        raise BadInput(
            f"{directory}: lm_head.weight is not the embedding, but config.json says tie_word_embeddings"
        )


def fingerprint(directory: Path) -> str:
    """A hash of the files of a checkpoint, of large ones their sizes and some of what is in them."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*")):
        if path.suffix in (".json", ".safetensors", ".model", ".bin", ".txt", ".jinja"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for place in range(0, size, max(size // 8, 1 << 20)):
                    file.seek(place)
                    digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


def facts(flags: dict[str, Any]) -> dict[str, Any]:
    """What all processes of a model must have in common: versions, kernels, which are loaded by now, the time
    zone, for which a chat template may ask, flags, and the files that flags name."""
    paths = {name: path for name, path in flags.items() if name.endswith("checkpoint_path") and path}
    paths = {"checkpoint_path": str(SHIPPED_TARGET)} | paths
    files = {n: fingerprint(find_checkpoint(p, f"--{n}")) for n, p in paths.items() if p != "self"}
    named = {name: flags[name] for name in READ_BY_ALL if isinstance(flags.get(name), str)}
    files |= {name: hash_of(*contents(name, value)) for name, value in named.items()}
    versions = {"torch": torch.__version__, "gpt-spec": hash_of(*map(Path.read_bytes, SOURCES))}
    versions["GPT_SPEC_KERNELS"] = kernels.PATH if kernels.load() else "reference"
    versions["GPT_SPEC_REFERENCE"] = sorted(kernels.ON_REFERENCE)
    return versions | {"time zone": time.strftime("%z")} | flags | {f"--{n}": f for n, f in files.items()}


def hash_of(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def contents(flag: str, value: str) -> list[bytes]:
    """Those of the files that a flag names, if it does and they can be read twice: no pipes."""
    if flag == "prompt" and not re.match("@[^@]", value):
        return []
    paths = map(Path, value.split(",") if flag == "prompt_file" else [value.removeprefix("@")])
    with suppress(OSError, ValueError):  # a text, too long for a name
        return [path.read_bytes() for path in paths if path.is_file()]
    return []


def announce(model: Transformer, q: Quantization | None) -> None:
    """Print what a user would not expect of this model, a line each."""
    if q is not None and q.bits == 4 and q.group == -1:
        print("no group size divides the inputs: one scale for each row of weights", file=sys.stderr)
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    rows = sum(m.weight.dim() == 2 for m in linears)
    if rows and model.norm.weight.dtype == torch.bfloat16 and model.norm.weight.is_cpu and kernels.load():
        print(
            f"{rows} matrices have an odd number of inputs and run without our kernels: near-ties may fall "
            "another way when several tokens are verified at once",
            file=sys.stderr,
        )


def weight_bytes(models: list[nn.Module]) -> int:
    """The memory of all parameters; what models share counts once."""
    tensors = {p.data_ptr(): p.numel() * p.element_size() for model in models for p in model.parameters()}
    return sum(tensors.values())
