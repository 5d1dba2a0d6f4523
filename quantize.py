"""quantize.py: weights of 4 and 8 bits, their file format, and what it costs in quality.

    python quantize.py --checkpoint_path DIR --precision w4a16 --group_size 128 --output DIR
    python quantize.py --checkpoint_path DIR --precision w4a8 --evaluate      # perplexity before and after

The one idea: a 4-bit weight is w = (q - zero) * scale with one scale (and perhaps one zero) for each group of
neighbouring inputs, and nothing else has to be decided but the scale. No data is needed: of sixteen scales
that clip the largest weights of a group more and more, the one with the smallest error is kept.

A file has, for a linear with the Hugging Face module path NAME:

    NAME.packed     uint8 [out, in / 2]             4 bits; the low nibble is the even input
    NAME.quantized  int8 [out, in]                  8 bits, symmetric, one scale for each output row
    NAME.scales     float16 [out, in / group] or [out, 1]
    NAME.zeros      float16 [out, in / group]       only if asymmetric; symmetric means zero = 8

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
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from gpt_spec import BadInput, CheckpointModule, Linear, Transformer

PRECISIONS = {"w8a16": (8, 16), "w8a8": (8, 8), "w4a16": (4, 16), "w4a8": (4, 8), "w4a4": (4, 4)}
GROUP_SIZES = (128, 64, 32)  # and -1: one group for the whole row
FORMAT_VERSION = 1
SHARD_BYTES = 2**30  # of a file that is written; what is held in memory at a time
CHUNK = 2**20  # weights that the clip search looks at together: they stay in the cache
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
    lm_head_bits: int = 16  # or 8
    modules_16_bit: tuple[str, ...] = ()  # Hugging Face module paths
    rotation: None = None
    version: int = FORMAT_VERSION

    @staticmethod
    def from_json(text: str, where: str) -> Quantization:
        """Read the metadata of a file. BadInput, naming `where`, for what this version does not know."""
        try:
            raw = json.loads(text)
            q = Quantization(**raw | {"modules_16_bit": tuple(raw.get("modules_16_bit", ()))})
        except (ValueError, TypeError, AttributeError) as error:
            raise BadInput(f"{where}: the metadata gpt_spec is not understood: {error}") from None
        allowed = {"bits": (4, 8), "group": (*GROUP_SIZES, -1), "lm_head_bits": (8, 16)}
        allowed |= {"version": (FORMAT_VERSION,), "rotation": (None,), "symmetric": (True, False)}
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
        group = inputs if self.group == -1 or self.bits_of(module) == 8 else self.group
        if inputs % group or group % kernels.LANES:
            if inputs % kernels.LANES:
                raise BadInput(f"{module} has {inputs} inputs, no multiple of 16: it cannot be quantized")
            raise BadInput(f"{module} has {inputs} inputs, no multiple of a group of {group}")
        return group


def best_group(inputs: list[int]) -> int:
    """The largest group size that divides all of these, else -1."""
    return next((g for g in GROUP_SIZES if all(n % g == 0 for n in inputs)), -1)


def default_quantization(model: CheckpointModule, precision: str) -> Quantization:
    """What `--precision` means for a 16-bit checkpoint: symmetric, groups of 128, lm_head in 8 bits."""
    bits, _ = PRECISIONS[precision]
    inputs = [m.in_features for m in model.modules() if isinstance(m, Linear) and not m.wide]
    return Quantization(bits, best_group(inputs) if bits == 4 else -1, lm_head_bits=8)


def reshape(model: CheckpointModule, q: Quantization) -> None:
    """Replace the 16-bit weights of a model by empty quantized ones, on the same device (meta, mostly)."""
    for path, linear in model.named_modules():
        if not isinstance(linear, Linear):
            continue
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


def lower_activations(precision: str) -> str:
    """The precision of the same weights with the next smaller activations; itself where there is none."""
    same_bits = [name for name in PRECISIONS if PRECISIONS[name][0] == PRECISIONS[precision][0]]
    return same_bits[min(same_bits.index(precision) + 1, len(same_bits) - 1)]


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


def round_groups(w: Tensor, shrink: float, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """w float32 [groups, group] -> q in 0 .. 15, scale and zero [groups, 1], for a range that is shrunk.

    The range includes 0, so that a zero lies between 0 and 15, where float16 is precise.
    """
    low, high = w.amin(dim=1, keepdim=True).clamp(max=0), w.amax(dim=1, keepdim=True).clamp(min=0)
    scale = shrink * (torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15)  # [groups, 1]
    scale = scale.clamp(min=SMALLEST).half().float()  # what the file will say
    zero = torch.full_like(scale, 8.0) if symmetric else (-shrink * low / scale).half().float()
    return (w / scale + zero).round().clamp(0, 15), scale, zero


def quantize_4_bit(
    weight: Tensor, group: int, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[out, in] -> packed uint8 [out, in / 2], float16 scales and, if asymmetric, zeros [out, in / group].

    Of the ranges of SHRINK, each group keeps the one with the smallest sum of squared errors.
    """
    out, inputs = weight.shape
    packed, scales, zeros = [], [], []
    for rows in weight.split(max(1, CHUNK // inputs)):
        w = rows.float().reshape(-1, group)  # [groups, group]
        unknown = torch.full_like(w[:, :1], math.inf)  # [groups, 1]
        best = (torch.zeros_like(w), unknown, unknown, unknown)
        for shrink in SHRINK:
            q, scale, zero = round_groups(w, shrink, symmetric)
            error = ((q - zero) * scale - w).square().sum(dim=1, keepdim=True)
            better = error < best[-1]
            best = tuple(torch.where(better, new, old) for new, old in zip((q, scale, zero, error), best))
        q = best[0].to(torch.uint8).view(len(rows), inputs)
        packed.append(q[:, ::2] | q[:, 1::2] << 4)
        scales.append(best[1].half().view(len(rows), -1))
        zeros.append(best[2].half().view(len(rows), -1))
    return torch.cat(packed), torch.cat(scales), None if symmetric else torch.cat(zeros)


def quantize_weight(module: str, weight: Tensor, q: Quantization) -> dict[str, Tensor]:
    """What stands for NAME.weight [out, in] in a file. BadInput for what float16 scales cannot hold."""
    bits, zeros = q.bits_of(module), None
    if bits == 16:
        return {f"{module}.weight": weight}
    if bits == 8:
        integers, scales = quantize_8_bit(weight)
    else:
        integers, scales, zeros = quantize_4_bit(weight, q.group_of(module, weight.shape[1]), q.symmetric)
    if not (weight.isfinite().all() and scales.isfinite().all()):
        raise BadInput(f"{module}.weight holds infinities, NaN or huge numbers, which cannot be quantized")
    tensors = {"quantized" if bits == 8 else "packed": integers, "scales": scales, "zeros": zeros}
    return {f"{module}.{kind}": tensor for kind, tensor in tensors.items() if tensor is not None}


def linear_names(model: CheckpointModule) -> set[str]:
    """Hugging Face module paths of everything that may be quantized."""
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, Linear)]
    return {part for path, linear in linears for part in model.parts(path, linear.out_features)}


def convert(name: str, tensor: Tensor, q: Quantization, linears: set[str], tied: bool) -> dict[str, Tensor]:
    """What stands in a quantized file for one tensor of a 16-bit checkpoint. `linears`: see `linear_names`.

    A tied lm_head has no tensor of its own; to be quantized it is made from the embedding, which stays.
    """
    module = name.removesuffix(".weight")
    if name == "lm_head.weight" and tied:
        return {}
    tensors = quantize_weight(module, tensor, q) if module in linears else {name: tensor}
    if name == "model.embed_tokens.weight" and tied and q.bits_of("lm_head") < 16:
        tensors |= quantize_weight("lm_head", tensor, q)
    return tensors


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
    partial = Path(tempfile.mkdtemp(prefix=f"{output.name}.", dir=output.parent))
    try:
        writer = ShardWriter(partial, {"format": "pt", "gpt_spec": json.dumps(asdict(q))})
        for some in tensors:
            writer.add(some)
        writer.close()
        for file in source.iterdir():
            if file.suffix in (".json", ".model", ".jinja", ".txt") and not file.name.endswith(".index.json"):
                shutil.copy(file, partial)
        partial.chmod(0o755)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return writer.total


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
    if bits == 8 and (args.group_size is not None or args.asymmetric):
        raise BadInput("--group_size and --asymmetric are for 4-bit weights; 8-bit ones have one scale a row")
    default = default_quantization(model, args.precision)
    group = default.group if args.group_size is None else args.group_size
    inputs = [m.in_features for m in model.modules() if isinstance(m, Linear) and not m.wide]
    if group != -1 and any(n % group for n in inputs):
        raise BadInput(
            f"--group_size: {group} does not divide {next(n for n in inputs if n % group)} inputs; "
            f"use {best_group(inputs)}"
        )
    kept = kept_modules(args.keep_16_bit, sorted(linear_names(model))) if args.keep_16_bit else ()
    q = Quantization(bits, group, not args.asymmetric, args.lm_head_bits, kept)
    with torch.device("meta"):
        reshape(Transformer(model.config), q)
    return q


def build_parser() -> argparse.ArgumentParser:
    from generate import OneLineParser  # which imports this file

    p = OneLineParser("quantize.py", description="Quantize a checkpoint, without data.", allow_abbrev=False)
    p.add_argument("--checkpoint_path", required=True, help="a Hugging Face directory or hub repository id")
    p.add_argument("--precision", choices=list(PRECISIONS), default="w4a16", help="default: w4a16")
    p.add_argument(
        "--group_size", type=int, choices=[*GROUP_SIZES, -1], help="inputs that share a scale; -1: a row"
    )
    p.add_argument("--asymmetric", action="store_true", help="a zero for each group, not 8")
    p.add_argument("--lm_head_bits", type=int, choices=[8, 16], default=8, help="default: 8")
    p.add_argument("--keep_16_bit", metavar="REGEX", help="modules that are not quantized")
    p.add_argument("--output", help="the directory to write; it must not exist yet")
    p.add_argument("--evaluate", type=int, nargs="?", const=16384, metavar="TOKENS",
                   help="perplexity before and after on held-out Python modules (16384)")  # fmt: skip
    return p


def run(args: argparse.Namespace) -> None:
    import generate

    if not args.output and args.evaluate is None:
        raise BadInput("nothing to do: give --output DIR, --evaluate, or both")
    if args.evaluate is not None and args.evaluate < 100:
        raise BadInput(f"--evaluate is {args.evaluate}; a perplexity of fewer than 100 tokens says nothing")
    if args.output and Path(args.output).exists():
        raise BadInput(f"--output: {args.output} exists already")
    generate.load_kernels()
    directory = generate.find_checkpoint(args.checkpoint_path)
    checkpoint = generate.open_checkpoint(directory)
    if checkpoint.quantization is not None:
        bits = checkpoint.quantization.bits
        raise BadInput(f"--checkpoint_path: {directory} is quantized already, to {bits} bits")
    q = choose_quantization(args, checkpoint.model)
    texts = held_out_tokens(directory) if args.evaluate else []
    if args.output:
        from safetensors import SafetensorError
        from tqdm import tqdm

        total = len(checkpoint.model.checkpoint_tensors())
        tensors = tqdm(
            generate.read_tensors(checkpoint.files), "quantizing", total, unit="tensor", disable=None
        )
        linears, tied = linear_names(checkpoint.model), checkpoint.model.config.tied_embeddings
        converted = (convert(name, read(), q, linears, tied) for name, read in tensors)
        try:
            written = write_checkpoint(Path(args.output), directory, q, converted)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"--output: {args.output} cannot be written: {error}") from None
        before = sum(path.stat().st_size for path in checkpoint.files)
        print(f"{before / 1e6:.1f} MB -> {written / 1e6:.1f} MB in {args.output}", file=sys.stderr)
    if args.evaluate:
        evaluate(directory, checkpoint.precision, q, texts, args)


def held_out_tokens(directory: Path) -> list[list[int]]:
    """The held-out modules in the tokens of a checkpoint. Raises BadInput where there are none."""
    import generate

    tokenizer, texts = generate.load_tokenizer(directory), held_out_texts()
    if tokenizer is None or not texts:
        missing = "this Python has no source of its library" if tokenizer else f"{directory} has no tokenizer"
        raise BadInput(f"--evaluate: {missing}")
    return [tokenizer.encode(text) for text in texts]


def evaluate(
    directory: Path, own: str, q: Quantization, texts: list[list[int]], args: argparse.Namespace
) -> None:
    """Print the perplexity in the file's own precision and in the quantized one."""
    import generate

    for precision in (own, args.precision):
        model = generate.load_model(directory, precision, quantization=q if precision != own else None)
        loss = mean_loss(model, texts, args.evaluate)
        print(f"{precision:6} perplexity {math.exp(loss):.4f}   ({loss:.4f} nats per token)", flush=True)


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
