"""quantize.py: quantized checkpoints: made, converted, written, and what they cost in quality.

    python quantize.py --checkpoint_path DIR --precision w4a16 --group_size 128 --output DIR
    python quantize.py --checkpoint_path DIR --precision w4a8 --evaluate      # perplexity before and after
    python quantize.py --checkpoint_path DIR --quantizer gptq --rotate --output DIR
    python quantize.py --checkpoint_path AWQ_OR_GPTQ_DIR --output DIR         # converted, bit by bit

This file knows data: texts to calibrate on and texts to measure on. The format of what it writes is in
`packing.py`. It does not know how text is decoded with drafters (`generate.py`).

The one idea: tensors stream. A 16-bit checkpoint is a dictionary of functions that read its tensors, and the
quantized tensors leave a few at a time, so a checkpoint larger than the memory can be quantized. GPTQ only
adds a pass over the layers: each is read, run, rounded and forgotten.
"""

from __future__ import annotations

import process

if __name__ == "__main__":
    process.begin()

import argparse
import json
import math
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt_spec
import kernels
from checkpoints import MODELS, Checkpoint, find_checkpoint, load_model, open_checkpoint
from cli import OneLineParser, load_kernels, read_line
from model import BadInput, LanguageHead, Linear, ModelConfig, Transformer, causal_attention, rope_frequencies
from packing import (
    FLOAT_TYPES,
    GROUP_SIZES,
    PRECISIONS,
    SMALLEST,
    Quantization,
    Stored,
    best_group,
    convert,
    default_quantization,
    fit_groups,
    linear_names,
    name_tensors,
    named_linears,
    pack_nibbles,
    reshape,
    to_integers,
)
from rotation import (
    add_rotations,
    rotated,
)
from sampling import Sampling
from text import Tokenizer, load_tokenizer

QUANTIZERS = ("rtn", "hqq", "gptq")
PERPLEXITY_TOKENS = 40000  # of --evaluate, and of `bench.py perplexity`
SHARD_BYTES = 2**30  # of a file that is written, which is held in memory until then
CALIBRATION_LENGTH = 512  # tokens of a text that GPTQ looks at
TOGETHER = 16  # texts that a model writes side by side
GPTQ_BLOCK = 128  # columns whose errors are passed on together
GPTQ_CHUNK = 2**24  # weights that are in memory together, a few times over
GPTQ_TOKENS = 4096  # that go through a layer together


# --------------------------------------------------------------------------------------------------
# GPTQ (arXiv 2210.17323): the error of rounding one input is made good by the inputs after it
# --------------------------------------------------------------------------------------------------


def gptq_weight(
    weight: Tensor, hessian: Tensor, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Like `quantize_4_bit`, for float32 [out, in] and the mean of x^T x, [in, in], over its inputs x.

    Inputs are rounded in the order of their size ("act-order"), but their groups are those of the file
    ("static groups"), so that nothing needs a permutation.
    """
    size = hessian.diagonal()
    order = size.argsort(descending=True)
    factor = inverse_factor(hessian[order[:, None], order])
    rows = weight.split(max(1, GPTQ_CHUNK // len(size)))
    parts = [gptq_rows(some, size, order, factor, group, symmetric) for some in rows]
    packed, scales, zeros = map(torch.cat, zip(*parts))
    return packed, scales, None if symmetric else zeros


def gptq_rows(
    weight: Tensor, size: Tensor, order: Tensor, factor: Tensor, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of `gptq_weight`; `factor` [in, in] is for inputs in `order`."""
    weight = weight.masked_fill(size == 0, 0.0)  # inputs that are never there
    w, importance = weight.view(-1, group), size.expand_as(weight).reshape(-1, group)
    scale, zero = (t.view(len(weight), -1) for t in fit_groups(w, symmetric, importance))  # [out, groups]
    w, groups = weight.T[order], (order // group).tolist()  # [in, out]: an input's weights lie side by side
    q, (s, z) = torch.empty(w.shape, dtype=torch.uint8), (t.T.contiguous() for t in (scale, zero))
    for begin in range(0, len(order), GPTQ_BLOCK):
        end = min(begin + GPTQ_BLOCK, len(order))
        errors = torch.zeros_like(w[begin:end])
        for i in range(begin, end):
            g = groups[i]
            rounded = to_integers(w[i], s[g], z[g])  # [out]
            q[i] = rounded.to(torch.uint8)
            errors[i - begin] = (w[i] - (rounded - z[g]) * s[g]) / factor[i, i]
            w[i:end] -= factor[i, i:end, None] * errors[i - begin]
        w[end:] -= factor[begin:end, end:].T @ errors
    return pack_nibbles(q[order.argsort()].T.contiguous()), scale.half(), zero.half()


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a Hessian [n, n], damped until it has one."""
    mean = hessian.diagonal().mean().clamp(min=SMALLEST)
    for damping in (0.01, 0.1, 1.0):
        matrix = hessian.clone()
        matrix.diagonal().add_(damping * mean)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        matrix = torch.cholesky_inverse(matrix)
        matrix, failed_too = torch.linalg.cholesky_ex(matrix, upper=True)
        if not failed and not failed_too:
            return matrix
    raise BadInput("gptq: the model computes infinities or NaN on the calibration text")


def gptq(
    config: ModelConfig, tensors: dict[str, Stored], q: Quantization, calibration: Tensor
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(module, its tensors in a file) of every 4-bit linear.

    calibration: tokens int64 [texts, n]. Each layer is read, and its linears are quantized one after another.
    Their inputs are what the quantized linears before them compute on the texts. Then the layer is dropped.
    """
    from tqdm import tqdm

    with torch.device("meta"):
        model = Transformer(config)
    model.frequencies = rope_frequencies(config)
    embedding = tensors["model.embed_tokens.weight"].read().float()
    model.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
    if q.rotation:
        add_rotations(model)
    states = model.embed(calibration)  # [texts, n, hidden]
    model.embed_tokens.to("meta")
    for i, layer in enumerate(tqdm(model.layers, "gptq", unit="layer", disable=None)):
        layer.to_empty(device="cpu").requires_grad_(False)
        if q.rotation:
            add_rotations(model)
        for name, place in model.checkpoint_tensors().items():
            if not place.is_meta:  # all other layers are
                place.copy_(tensors[name].read())
        run = LayerRun(model, i, states)
        for path, linear in named_linears(layer):
            parts = model.parts(f"layers.{i}.{path}", linear.out_features)
            if q.bits_of(next(iter(parts))) == 4:
                yield from gptq_linear(linear, parts, run.hessian(linear), q)
        states = run.forward()
        layer.to("meta")
    if q.bits_of("lm_head") == 4:
        yield from gptq_lm_head(model, tensors, states, q)


def gptq_lm_head(
    model: Transformer, tensors: dict[str, Stored], states: Tensor, q: Quantization
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The same for lm_head, which may be tied; `states` [texts, n, hidden] leave the last layer."""
    name = "model.embed_tokens.weight" if model.config.tied_embeddings else "lm_head.weight"
    head = LanguageHead(model.config.hidden_size, model.config.vocab_size).requires_grad_(False)
    head.weight = nn.Parameter(tensors[name].read().float(), requires_grad=False)
    norm = tensors["model.norm.weight"].read().float()
    total = torch.zeros(head.in_features, head.in_features)
    for some in model.unrotated(states).flatten(0, 1).split(GPTQ_TOKENS):
        x = kernels.rms_norm(some, norm, model.config.norm_eps)  # [tokens, hidden]
        total.addmm_(x.T, x)
    yield from gptq_linear(head, {"lm_head": head.out_features}, total / states[..., 0].numel(), q)


def gptq_linear(
    linear: Linear, parts: dict[str, int], hessian: Tensor, q: Quantization
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Quantize one matrix, in place too -> (module, its tensors in a file) of its parts."""
    group = q.group_of(next(iter(parts)), linear.in_features)
    fitted = gptq_weight(linear.weight, hessian, group, q.symmetric)
    linear.weight.copy_(kernels.dequantize(*fitted))
    pieces = [tensor.split(tuple(parts.values())) for tensor in fitted if tensor is not None]
    for module, *own in zip(parts, *pieces):
        yield module, name_tensors(module, linear.weight, *own)


class LayerRun:
    """One layer and the states that enter it."""

    def __init__(self, model: Transformer, index: int, states: Tensor):
        self.model, self.index, self.states = model, index, states
        self.rope = model.rope(torch.arange(states.shape[1])[None])
        self.rows = max(1, GPTQ_TOKENS // states.shape[1])  # texts at a time

    @torch.no_grad()
    def forward(self) -> Tensor:
        """What leaves the layer, [texts, n, hidden]."""
        run = partial(self.model.run_layer, self.index, rope=self.rope, attend=causal_attention)
        return torch.cat([run(x=x) for x in self.states.split(self.rows)])

    def hessian(self, linear: Linear) -> Tensor:
        """The mean of x^T x over all that a linear of the layer multiplies with, float32 [in, in]."""
        total = torch.zeros(linear.in_features, linear.in_features)

        def add(_: Linear, inputs: tuple, options: dict[str, Any]) -> None:
            x = linear.prepare(*inputs, **options).flatten(0, 1)  # [tokens, in]
            total.addmm_(x.T, x)

        hook = linear.register_forward_pre_hook(add, with_kwargs=True)
        try:
            self.forward()
        finally:
            hook.remove()
        return total / self.states[..., 0].numel()


# --------------------------------------------------------------------------------------------------
# Texts: held out for a perplexity, and for calibration
# --------------------------------------------------------------------------------------------------


def held_out_texts() -> list[str]:
    """The modules of the Python standard library that the shipped models have not seen."""
    lines = (MODELS / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    names = dict.fromkeys(json.loads(line)["module"] for line in lines)
    files = [Path(sysconfig.get_paths()["stdlib"], f"{name}.py") for name in names]
    return [path.read_text(encoding="utf-8") for path in files if path.exists()]


def held_out_tokens(directory: Path) -> list[list[int]]:
    """The held-out modules in the tokens of a checkpoint. Raises BadInput where there are none."""
    tokenizer, texts = load_tokenizer(directory), held_out_texts()
    if tokenizer is None or not texts:
        missing = "this Python has no source of its library" if tokenizer else f"{directory} has no tokenizer"
        raise BadInput(f"--evaluate: {missing}")
    return [tokenizer.encode(text) for text in texts]


def mean_loss(model: Transformer, texts: list[list[int]], tokens: int) -> float:
    """Nats per token: the mean of `token_losses`."""
    return token_losses(model, texts, tokens).mean().item()


@torch.no_grad()
def token_losses(model: Transformer, texts: list[list[int]], tokens: int) -> Tensor:
    """Nats of each of about `tokens` tokens, float32 [n].

    Each text gives the same share, or all it has, in rows of up to 512.
    """
    share, losses = tokens // len(texts), []
    for text in texts:
        for begin in range(0, min(share, len(text) - 1), 512):
            row = torch.tensor([text[begin : min(begin + 513, share + 1)]], device=model.norm.weight.device)
            logits = model.lm_head(model.recompute(row[:, :-1]))  # [1, n, V]
            losses.append(F.cross_entropy(logits[0].float(), row[0, 1:], reduction="none"))
    return torch.cat(losses)


def calibration_texts(args: argparse.Namespace, directory: Path, model: Transformer) -> Tensor:
    """Tokens of --calibration, or the model's own text, int64 [texts, n]. Raises BadInput."""
    length = min(CALIBRATION_LENGTH, model.config.max_context)
    texts = (args.calibration_tokens or 32768) // length
    tokenizer = load_tokenizer(directory)
    if args.calibration is None:
        return own_texts(directory, tokenizer, texts, length)
    if tokenizer is None:
        raise BadInput(
            f"--calibration: {directory} has no tokenizer; without the flag the model writes itself"
        )
    try:
        content = Path(args.calibration).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--calibration: {args.calibration} cannot be read as UTF-8: {error}") from None
    lines = content.split("\n") if args.calibration.endswith(".jsonl") else []
    try:
        ids = [token for line in lines if line.strip() for token in read_line(line, args, tokenizer)]
    except BadInput as error:
        raise BadInput(f"--calibration: {args.calibration}: a line is {error}") from None
    ids = ids if lines else tokenizer.encode(content[: 32 * texts * length])  # more than enough
    if ids and not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
        wrong = next(token for token in ids if not 0 <= token < model.config.vocab_size)
        raise BadInput(
            f"--calibration: {args.calibration} has token {wrong}; the vocabulary ends at "
            f"{model.config.vocab_size - 1}"
        )
    if len(ids) < length:
        raise BadInput(
            f"--calibration: {args.calibration} has {len(ids)} tokens; at least {length} are needed"
        )
    whole = min(texts, len(ids) // length)
    return torch.tensor(ids[: whole * length]).view(whole, length)


def own_texts(directory: Path, tokenizer: Tokenizer | None, texts: int, length: int) -> Tensor:
    """Text that a model writes by itself at temperature 1, int64 [texts, length]: no data is needed.

    Each text begins with BOS or, without one, with a token that a hash chooses.
    """
    from tqdm import tqdm

    model = load_model(directory)
    first = None if tokenizer is None else tokenizer.specials.get(tokenizer.bos)
    hashes = (kernels.mix(torch.arange(texts)) % model.config.vocab_size).tolist()
    prompts = [[token] if first is None else [first] for token in hashes]
    rows = [list(prompt) for prompt in prompts]
    with tqdm(total=texts * length, desc="writing text", unit="token", disable=None) as bar:
        for begin in range(0, texts, TOGETHER):
            now = prompts[begin : begin + TOGETHER]
            sampling, options = Sampling(1.0, seed=begin), {"batch_size": len(now), "compile": False}
            steps = gpt_spec.generate(model, now, None, sampling, length - 1, **options)
            for emission in (emission for emissions in steps for emission in emissions):
                rows[begin + emission.prompt_index] += emission.tokens
                bar.update(len(emission.tokens))
    return torch.tensor(rows)


# --------------------------------------------------------------------------------------------------
# Writing a checkpoint
# --------------------------------------------------------------------------------------------------


def quantize_checkpoint(
    model: Transformer,
    tensors: dict[str, Stored],
    q: Quantization,
    quantizer: str = "rtn",
    calibration: Tensor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The tensors of the quantized checkpoint, a few at a time. No more of the 16-bit one are in memory.

    model: for its configuration and names, on the meta device. quantizer: one of QUANTIZERS; gptq needs
    `calibration`, tokens int64 [texts, n], and computes with one layer at a time.
    """
    source, tensors = tensors, rotated(tensors, model.config) if q.rotation else tensors
    linears, tied, done = linear_names(model), model.config.tied_embeddings, set()
    if quantizer == "gptq":
        for module, quantized in gptq(model.config, tensors, q, calibration):
            done.add(f"{module}.weight")
            yield quantized
    rest = replace(q, lm_head_bits=16) if "lm_head.weight" in done else q  # a tied one, not twice
    for name, stored in tensors.items():
        if name not in done:
            converted = convert(name, stored.read(), rest, linears, tied, quantizer == "hqq")
            if name in converted:  # rotated or not, what is not quantized is stored as it was
                converted[name] = converted[name].to(FLOAT_TYPES.get(source[name].kind))
            yield converted


class ShardWriter:
    """Writes tensors into safetensors files of about a gigabyte, and an index if there are several."""

    def __init__(self, directory: Path, metadata: dict[str, str]):
        self.directory, self.metadata = directory, metadata
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors, and write a file when they fill it."""
        self.pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self.pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write a file under a name that is not final: their number is not known yet."""
        from safetensors.torch import save_file

        save_file(self.pending, self.directory / f"shard-{len(self.shards)}", metadata=self.metadata)
        self.total += sum(tensor.nbytes for tensor in self.pending.values())
        self.shards.append(list(self.pending))
        self.pending = {}

    def close(self) -> None:
        """Write the rest, name the files, and write their index."""
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
    """Write a directory, with the small files of `source` -> weight bytes. It appears when it is whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{output.name}.", dir=output.parent))
    try:
        writer = ShardWriter(unfinished, {"format": "pt", "gpt_spec": json.dumps(asdict(q))})
        for some in tensors:
            writer.add(some)
        writer.close()
        copy_small_files(source, unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return writer.total


def write_with_progress(
    output: Path, source: Path, q: Quantization, pieces: Iterable[dict[str, Tensor]], total: int
) -> int:
    """`write_checkpoint` with a progress bar -> weight bytes. Raises BadInput for errors of the disk."""
    from safetensors import SafetensorError
    from tqdm import tqdm

    try:
        pieces = tqdm(pieces, "quantizing", total, unit="tensor", disable=None)
        return write_checkpoint(output, source, q, pieces)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"--output: {output} cannot be written: {error}") from None


def copy_small_files(source: Path, goal: Path) -> None:
    """Copy configuration and tokenizer, without what they say about another quantization."""
    others = ("quantize_config.json", "quant_config.json")
    for file in source.iterdir():
        small = file.suffix in (".json", ".model", ".jinja", ".txt") and file.name not in others
        if small and not file.name.endswith(".index.json"):
            shutil.copy(file, goal)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.keys() & {"quantization_config", "compression_config"}:
        for key in ("quantization_config", "compression_config"):
            config.pop(key, None)
        (goal / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The flags of quantize.py."""
    p = OneLineParser(
        "quantize.py",
        description="Quantize a checkpoint, or convert one that another tool has quantized.",
        allow_abbrev=False,
    )
    p.add_argument(
        "--checkpoint_path", required=True, help="a Hugging Face directory or hub repository id, in 16 bits "
        "or quantized (AutoAWQ gemm, GPTQ, compressed-tensors): these are converted as they are, with "
        "a --precision of their bits"
    )  # fmt: skip
    p.add_argument("--precision", choices=list(PRECISIONS), default="w4a16", help="default: w4a16")
    p.add_argument(
        "--group_size", type=int, choices=[*GROUP_SIZES, -1], help="inputs that share a scale; -1: a row"
    )
    p.add_argument("--asymmetric", action="store_true", help="a zero for each group, not 8")
    p.add_argument("--quantizer", choices=QUANTIZERS, default="rtn", help="round to nearest (default), "
                   "with refined zeros, or with what the model computes on text in mind")  # fmt: skip
    p.add_argument("--calibration", metavar="FILE", help="for gptq: text, or .jsonl like --prompts of "
                   "generate.py; default: what the model, all of it in memory, writes itself")  # fmt: skip
    p.add_argument("--calibration_tokens", type=int, metavar="N", help="for gptq; default: 32768")
    p.add_argument("--rotate", action="store_true", help="spread large activations over all (QuaRot)")
    p.add_argument("--lm_head_bits", type=int, choices=[4, 8, 16], help="default: 8; 4: like other modules")
    p.add_argument("--keep_16_bit", metavar="REGEX", help="modules that are not quantized")
    p.add_argument("--output", help="the directory to write; it must not exist yet")
    about = f"perplexity before and after on held-out Python modules ({PERPLEXITY_TOKENS})"
    p.add_argument("--evaluate", type=int, nargs="?", const=PERPLEXITY_TOKENS, metavar="TOKENS", help=about)
    p.set_defaults(chat=False)  # texts of --calibration are no conversations
    return p


def check_flags(args: argparse.Namespace) -> None:
    """Raise BadInput for what is wrong before anything is opened."""
    if not args.output and args.evaluate is None:
        raise BadInput("nothing to do: give --output DIR, --evaluate, or both")
    if args.evaluate is not None and args.evaluate < 100:
        raise BadInput(f"--evaluate is {args.evaluate}; a perplexity of fewer than 100 tokens says nothing")
    if args.quantizer != "gptq" and (args.calibration or args.calibration_tokens is not None):
        raise BadInput("--calibration and --calibration_tokens are for --quantizer gptq")
    if args.calibration_tokens is not None and args.calibration_tokens < CALIBRATION_LENGTH:
        raise BadInput(f"--calibration_tokens is {args.calibration_tokens}; use {CALIBRATION_LENGTH} or more")
    if args.output and Path(args.output).exists():
        raise BadInput(f"--output: {args.output} exists already")


def kept_modules(pattern: str, modules: list[str]) -> tuple[str, ...]:
    """The modules that --keep_16_bit matches. Raises BadInput if there are none."""
    try:
        kept = tuple(module for module in modules if re.search(pattern, module))
    except re.error as error:
        raise BadInput(f"--keep_16_bit: {pattern!r} is no regular expression: {error}") from None
    if not kept:
        raise BadInput(f"--keep_16_bit: no module matches {pattern!r}; they are called like {modules[-1]}")
    return kept


def choose_quantization(args: argparse.Namespace, model: Transformer) -> Quantization:
    """What the flags ask for. Raises BadInput if the shapes of the model do not allow it."""
    bits, _ = PRECISIONS[args.precision]
    if bits == 8 and (args.group_size is not None or args.asymmetric or args.quantizer != "rtn"):
        raise BadInput(
            "--group_size, --asymmetric and --quantizer are for 4-bit weights; 8-bit ones have a scale a row"
        )
    default = default_quantization(model, args.precision, args.lm_head_bits)
    group = default.group if args.group_size is None else args.group_size
    inputs = [m.in_features for m in model.modules() if isinstance(m, Linear) and not m.float32_out]
    if group != -1 and any(n % group for n in inputs):
        raise BadInput(
            f"--group_size: {group} does not divide {next(n for n in inputs if n % group)} inputs; "
            f"use {best_group(inputs)}"
        )
    kept = kept_modules(args.keep_16_bit, sorted(linear_names(model))) if args.keep_16_bit else ()
    symmetric = not args.asymmetric and args.quantizer != "hqq"
    rotation = "hadamard" if args.rotate else None
    q = Quantization(bits, group, symmetric, default.lm_head_bits, kept, rotation)
    with torch.device("meta"):
        reshape(Transformer(model.config), q)
    return q


def check_conversion(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raise BadInput for flags that a published quantized checkpoint cannot obey: it keeps its integers."""
    directory, bits = checkpoint.directory, checkpoint.quantization.bits
    if checkpoint.published is None or PRECISIONS[args.precision][0] != bits:
        hint = f"; convert it with --precision w{bits}a16" if checkpoint.published else ""
        raise BadInput(f"--checkpoint_path: {directory} is quantized already, to {bits} bits{hint}")
    chosen = {"--group_size": args.group_size, "--asymmetric": args.asymmetric, "--rotate": args.rotate}
    chosen |= {"--lm_head_bits": args.lm_head_bits, "--keep_16_bit": args.keep_16_bit}
    chosen |= {"--quantizer": args.quantizer != "rtn"}
    for flag, value in chosen.items():
        if value:
            raise BadInput(f"{flag}: {directory} is {checkpoint.published}; it is converted as it is")


def run(args: argparse.Namespace) -> None:
    """Everything between the flags and the last line of output. Raises BadInput."""
    check_flags(args)
    load_kernels()
    directory = find_checkpoint(args.checkpoint_path)
    checkpoint = open_checkpoint(directory)
    q, total = checkpoint.quantization, len(checkpoint.tensors)
    texts = held_out_tokens(directory) if args.evaluate else []
    if q is None:
        q = choose_quantization(args, checkpoint.model)
        tokens = calibration_texts(args, directory, checkpoint.model) if args.quantizer == "gptq" else None
        pieces = quantize_checkpoint(checkpoint.model, checkpoint.tensors, q, args.quantizer, tokens)
    else:
        check_conversion(args, checkpoint)
        pieces = ({name: stored.read()} for name, stored in checkpoint.tensors.items())
        if checkpoint.precision != f"w{q.bits}a16":
            print(f"the file asks for {checkpoint.precision}; ask for it with --precision", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(args.output or f"{scratch}/quantized")
        written = write_with_progress(output, directory, q, pieces, total)
        if args.output:
            before = sum(path.stat().st_size for path in checkpoint.files)
            print(f"{before / 1e6:.1f} MB -> {written / 1e6:.1f} MB in {output}", file=sys.stderr)
        if args.evaluate:
            for path, precision in {directory: checkpoint.precision, output: args.precision}.items():
                losses = token_losses(load_model(path, precision), texts, args.evaluate)
                loss = losses.mean().item()
                mean = f"{loss:.4f} nats per token, {len(losses)} tokens"
                print(f"{precision:6} perplexity {math.exp(loss):.4f}   ({mean})", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line -> exit status."""
    return process.exit_status(lambda: run(build_parser().parse_args(argv)), BadInput)


if __name__ == "__main__":
    sys.exit(process.run(main))
