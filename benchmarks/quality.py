"""quality.py: what a precision or a quantizer costs in quality.

    python bench.py quality
    python bench.py quality --checkpoint_path DIR --prompt_file gsm8k_test.jsonl --max_new_tokens 400
    python bench.py perplexity

The one idea: every precision is measured on the same held-out text as bf16, by loss and by the greedy choices
that it changes.
"""

from __future__ import annotations

import argparse
import math
import re
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import (
    Parts,
    Paths,
    build_decoders,
    chosen_paths,
    decode_all,
    fitting_prompts,
    load_parts,
    numbers,
    quantized_target,
    split,
)
from benchmarks.shapes import weights_of_a_step
from checkpoints import ALL_PRECISIONS, SHIPPED_TARGET, find_checkpoint, load_model, weight_bytes
from drafts import Drafter
from model import BadInput, Transformer
from packing import PRECISIONS
from quantize import held_out_tokens, mean_loss


def report_quality(args: argparse.Namespace) -> dict:
    """What each precision costs: perplexity, and the share of held-out positions where its greedy choice is
    that of bf16; with --prompt_file of problems and answers (GSM8K), how many it solves, too.

    Every precision quantizes the same checkpoint by itself, rounding to nearest; with --lm_head_bits, once
    for each of these numbers.
    """
    paths, results = chosen_paths(args), {}
    width = 17 if args.lm_head_bits else 6
    directory = find_checkpoint(str(paths.target))
    texts, reference = held_out_tokens(directory), None
    chosen_bits = numbers(args.lm_head_bits) if args.lm_head_bits else [None]
    for precision, bits in dict.fromkeys([("bf16", None), *product(split(args.precisions), chosen_bits)]):
        bits = bits if precision in PRECISIONS else None
        parts = load_parts(precision, Paths(directory), args.device, bits)
        model = parts.target.model
        choices = greedy_choices(model, texts, args.tokens)
        reference = choices if reference is None else reference
        row = {"perplexity": math.exp(mean_loss(model, texts, args.tokens))}
        row |= {"agreement": (choices == reference).float().mean().item(), "positions": len(choices)}
        row |= count_solved(parts, args) if args.prompt_file else {}
        row["step_bytes"] = sum(p.nbytes for p in weights_of_a_step(model))
        name = f"{precision}, lm_head {bits}" if bits else precision
        results[name] = row
        more = f"   {row['step_bytes'] / 1e6:.1f} MB a step"
        more += f"   {row['solved']} of {row['problems']} solved" if "solved" in row else ""
        print(
            f"{name:{width}} perplexity {row['perplexity']:.3f}   greedy choice that of bf16 in "
            f"{row['agreement']:.2%} of {row['positions']} positions{more}",
            flush=True,
        )
    return results


@torch.no_grad()
def greedy_choices(model: Transformer, texts: list[list[int]], tokens: int) -> Tensor:
    """The most probable token after each of about `tokens` positions, int64: the same share of every text, in
    rows of up to 512, as for `mean_loss`."""
    share, choices = max(tokens // len(texts), 1), []
    for text in texts:
        for begin in range(0, min(share, len(text)), 512):
            row = torch.tensor([text[begin : min(begin + 512, share)]], device=model.norm.weight.device)
            choices.append(model.lm_head(model.recompute(row))[0].argmax(dim=-1))
    return torch.cat(choices)


def count_solved(parts: Parts, args: argparse.Namespace) -> dict[str, int]:
    """How many problems of --prompt_file are decoded, greedily, to the number behind the #### of their
    answer. The last number of the text counts."""
    prompts = fitting_prompts(parts, args)
    if not all("####" in prompt.answer for prompt in prompts):
        raise BadInput(f"--prompt_file: {args.prompt_file} has no answers with #### and a number")
    args = argparse.Namespace(**vars(args) | {"temperature": 0.0})
    [decoder] = build_decoders(parts.target.model, {"": Drafter()}, prompts, args, 4).values()
    ids = [prompt.tokens for prompt in prompts]
    texts = decode_all(decoder, ids, args.max_new_tokens, stop_ids=parts.target.stop_ids)
    answers = [last_number(parts.target.tokenizer.decode(text)) for text in texts]
    right = [last_number(prompt.answer.split("####")[-1]) for prompt in prompts]
    return {"problems": len(prompts), "solved": sum(a == b for a, b in zip(answers, right))}


def last_number(text: str) -> str:
    """The last number in a text, without its formatting: "... is 1,234.50." -> "1234.5"; "" if none."""
    found = re.findall(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?", text)
    number = found[-1].replace(",", "") if found else ""
    return number.rstrip("0").rstrip(".") if "." in number else number


QUANTIZERS = {  # flags of quantize.py by name
    "rtn": [],
    "rtn, zeros": ["--asymmetric"],
    "hqq": ["--quantizer", "hqq"],
    "gptq": ["--quantizer", "gptq"],
    "rtn, rotated": ["--rotate"],
    "hqq, rotated": ["--quantizer", "hqq", "--rotate"],
    "gptq, rotated": ["--quantizer", "gptq", "--rotate"],
}


def report_perplexity(args: argparse.Namespace) -> dict:
    """Perplexity of the shipped target on held-out modules: 16 and 8 bits, and 4 bits by every quantizer.

    None of them has seen data: gptq is calibrated on text that the target writes itself.
    """
    texts = held_out_tokens(SHIPPED_TARGET)
    rows, four = {}, [name for name, (bits, _) in PRECISIONS.items() if bits == 4]

    def measure(path: Path | str, precision: str, name: str) -> None:
        model = load_model(path, precision)
        row = {"perplexity": math.exp(mean_loss(model, texts, args.tokens))}
        rows[name] = row | {"weight_bytes": weight_bytes([model])}
        size = rows[name]["weight_bytes"] / 1e6
        print(f"{name:28} perplexity {row['perplexity']:.3f}   {size:.1f} MB", flush=True)

    for precision in [name for name in ALL_PRECISIONS if name not in four]:
        measure(SHIPPED_TARGET, precision, precision)
    for name, flags in QUANTIZERS.items():
        with quantized_target(flags) as directory:
            for precision in four:
                measure(directory, precision, f"{precision} {name}")
    return rows
