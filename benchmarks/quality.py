"""quality.py: what a precision or a quantizer costs in quality.

    python bench.py quality
    python bench.py quality --checkpoint_path DIR --prompt_file gsm8k_test.jsonl --max_new_tokens 400 \\
        --precisions w4a16,w4a4 --quantizer "rtn;gptq;gptq, rotated"
    python bench.py quality --checkpoint_path DIR --prompt_file human_eval.jsonl.gz --run_code
    python bench.py perplexity

The one idea: every precision is measured on the same held-out text as bf16, by loss and by the greedy choices
that it changes.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    QUANTIZERS,
    Parts,
    Paths,
    Prompt,
    build_decoders,
    chosen_paths,
    decode_all,
    fitting_prompts,
    load_parts,
    numbers,
    quantized_by,
    quantized_target,
    split,
)
from benchmarks.shapes import weights_of_a_step
from checkpoints import ALL_PRECISIONS, SHIPPED_TARGET, find_checkpoint, load_model, weight_bytes
from drafts import Drafter
from gpt_spec import SequentialDrafter
from model import BadInput, Transformer
from packing import PRECISIONS, lower_precisions, share_weights
from quantize import held_out_tokens, mean_loss


def report_quality(args: argparse.Namespace, save: Callable[[dict], None] = lambda rows: None) -> dict:
    """What each precision costs: perplexity, and the share of held-out positions where its greedy choice is
    that of bf16; with --prompt_file of problems (GSM8K, HumanEval), see `measure_accuracy`.

    Every precision quantizes the same checkpoint by itself; 4-bit ones with --quantizer, once for each of
    these names, otherwise rounding to nearest; with --lm_head_bits, once for each of these numbers. `save` is
    given all rows so far.
    """
    paths, results = chosen_paths(args), {}
    directory = find_checkpoint(str(paths.target))
    texts, reference = held_out_tokens(directory), None
    for name, precision, quantizer, bits in configurations(args):
        checkpoint = quantized_by(quantizer, directory, precision)
        parts = load_parts(precision, Paths(checkpoint), args.device, bits)
        model = parts.target.model
        choices = greedy_choices(model, texts, args.tokens)
        reference = choices if reference is None else reference
        row = {"perplexity": math.exp(mean_loss(model, texts, args.tokens))}
        row |= {"agreement": (choices == reference).float().mean().item(), "positions": len(choices)}
        row |= measure_accuracy(parts, args, results.get("bf16")) if args.prompt_file else {}
        row["step_bytes"] = sum(p.nbytes for p in weights_of_a_step(model))
        results[name] = row
        print_quality(name, row)
        save(results)
    return results


def configurations(args: argparse.Namespace) -> list[tuple[str, str, str | None, int | None]]:
    """Name, precision, quantizer and bits of lm_head of every row; bf16 is the first."""
    rows = {"bf16": ("bf16", None, None)}
    quantizers = args.quantizer.split(";") if args.quantizer else [None]
    chosen_bits = numbers(args.lm_head_bits) if args.lm_head_bits else [None]
    for precision, quantizer, bits in product(split(args.precisions), quantizers, chosen_bits):
        quantizer = quantizer if PRECISIONS.get(precision, (16, 16))[0] == 4 else None
        bits = bits if precision in PRECISIONS else None
        name = precision + (f" {quantizer}" if quantizer else "") + (f", lm_head {bits}" if bits else "")
        rows[name] = (precision, quantizer, bits)
    return [(name, *row) for name, row in rows.items()]


def print_quality(name: str, row: dict[str, Any]) -> None:
    more = f"   {row['step_bytes'] / 1e6:.1f} MB a step"
    if "solved" in row:
        more += f"   {row['solved']} of {row['problems']} solved ({row['cut_off']} cut off)"
        more += f", {row['same_answers']} answers are those of bf16"
    if "solution_loss" in row:
        more += f"; {row['solution_loss']:.3f} nats per token of right solutions, "
        more += f"{row['solution_agreement']:.1%} of them the greedy choice"
    for drafts, other in row.get("qspec", {}).items():
        more += f", {other['solved']} with drafts in {drafts} ({other['different_texts']} other texts)"
    print(
        f"{name:17} perplexity {row['perplexity']:.3f}   greedy choice that of bf16 in "
        f"{row['agreement']:.2%} of {row['positions']} positions{more}",
        flush=True,
    )


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


def measure_accuracy(
    parts: Parts, args: argparse.Namespace, reference: dict[str, Any] | None
) -> dict[str, Any]:
    """How many problems of --prompt_file are solved, decoding greedily; and where the same weights in `w4a4`
    can draft, what QSpec makes of it: the same texts, so the same number.

    A small model solves few of them, so finer measures stand beside it: how well it foresees a right solution
    (`foresee_solutions`), how many of its texts end in the number of `reference`, the row of bf16, or are
    its texts; and how many were cut off at --max_new_tokens.
    """
    prompts, tokenizer = fitting_prompts(parts, args), parts.target.tokenizer
    check_problems(prompts, args)
    target = parts.target.model
    drafters: dict[str, Drafter] = {"": Drafter()}
    if "w4a4" in lower_precisions(parts.target.precision):
        drafters["w4a4"] = SequentialDrafter(
            share_weights(target, "w4a4"), args.speculate_k, shares_cache=True
        )
    args = argparse.Namespace(**vars(args) | {"temperature": 0.0})
    ids, texts = [prompt.tokens for prompt in prompts], {}
    for name, decoder in build_decoders(target, drafters, prompts, args, 4).items():
        texts[name] = decode_all(decoder, ids, args.max_new_tokens, stop_ids=parts.target.stop_ids)
    said = {name: read_answers(prompts, mine, tokenizer) for name, mine in texts.items()}
    solved = {name: count_solved(prompts, mine) for name, mine in said.items()}
    final = [answer if prompts[0].test else last_number(answer) for answer in said[""]]
    row = {"problems": len(prompts), "solved": solved[""], "answers": final}
    row["same_answers"] = sum(a == b != "" for a, b in zip(final, (reference or row)["answers"]))
    stops = parts.target.stop_ids
    row["cut_off"] = sum(len(t) == args.max_new_tokens and t[-1] not in stops for t in texts[""])
    row |= foresee_solutions(target, prompts, tokenizer, bool(args.prompt_file and tokenizer.template))
    if "w4a4" in solved:
        other = sum(a != b for a, b in zip(texts[""], texts["w4a4"]))
        row["qspec"] = {"w4a4": {"solved": solved["w4a4"], "different_texts": other}}
    return row


def check_problems(prompts: list[Prompt], args: argparse.Namespace) -> None:
    """Raise BadInput for what cannot be judged."""
    if not all("####" in p.answer for p in prompts) and not all(p.test for p in prompts):
        kinds = "answers with #### and a number, or tests"
        raise BadInput(f"--prompt_file: not all lines of {args.prompt_file} have {kinds}, of one kind")
    if prompts[0].test and not args.run_code:
        raise BadInput(
            "--prompt_file: to know what solves HumanEval is to run what a model wrote: --run_code"
        )


@torch.no_grad()
def foresee_solutions(
    model: Transformer, prompts: list[Prompt], tokenizer: Any, chat: bool
) -> dict[str, float]:
    """The right solutions of the file behind their prompts: nats per token, and the share of tokens that are
    the model's greedy choice. Nothing if the file has none. Between models of other tokens or templates these
    cannot be compared."""
    losses, hits = [], []
    for prompt in [prompt for prompt in prompts if prompt.solution or prompt.answer]:
        tail = solution_tokens(prompt, tokenizer, chat)
        row = torch.tensor([[*prompt.tokens, *tail]], device=model.norm.weight.device)
        row = row[:, : model.config.max_context]
        features = model.recompute(row[:, :-1])[:, len(prompt.tokens) - 1 :]  # [1, tail, hidden]
        logits, wanted = model.lm_head(features)[0].float(), row[0, len(prompt.tokens) :]
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(-1) == wanted)
    if not losses:
        return {}
    return {
        "solution_loss": torch.cat(losses).mean().item(),
        "solution_agreement": torch.cat(hits).float().mean().item(),
        "solution_tokens": sum(map(len, hits)),
    }


def solution_tokens(prompt: Prompt, tokenizer: Any, chat: bool) -> list[int]:
    """A right solution as the model would write it: without GSM8K's marks for a calculator, and in a chat the
    whole function in a block."""
    text = prompt.solution or re.sub(r"<<.*?>>|\n?####.*", "", prompt.answer)
    if chat:
        return tokenizer.encode_text(f"```python\n{prompt.text}{text}\n```" if prompt.solution else text)
    before = tokenizer.decode(prompt.tokens)
    whole = tokenizer.encode(before + text)  # alone it might gain a blank in front
    if whole[: len(prompt.tokens)] == prompt.tokens:
        return whole[len(prompt.tokens) :]
    return tokenizer.encode_text(text)


def read_answers(prompts: list[Prompt], texts: list[list[int]], tokenizer: Any) -> list[str]:
    """What was written, decoded behind the prompt: alone it might lose its first blank."""
    both = (
        (tokenizer.decode(p.tokens), tokenizer.decode([*p.tokens, *text])) for p, text in zip(prompts, texts)
    )
    return [whole[len(before) :] for before, whole in both]


def count_solved(prompts: list[Prompt], answers: list[str]) -> int:
    """Answers whose last number is the one behind the #### of the file, or whose program passes its test."""
    return sum(
        passes(program_of(prompt, answer))
        if prompt.test
        else last_number(answer) == last_number(prompt.answer.split("####")[-1])
        for prompt, answer in zip(prompts, answers)
    )


def program_of(prompt: Prompt, answer: str) -> str:
    """What a model wrote to a prompt of HumanEval, and the test of it, as one program.

    A model that chats writes blocks of code, of which the first with the function counts, or else the first;
    or the whole function without a block. Others go on with the prompt, and end where something begins that
    is not part of the function.
    """
    blocks = [block for _, block in re.findall(r"```(\w*)\n(.*?)(?:```|\Z)", answer, re.DOTALL)]
    head, name = prompt.text, f"def {prompt.function}("
    whole = [block for block in blocks if name in block]
    if not blocks and (found := re.search(rf"^{re.escape(name)}", answer, re.MULTILINE)):
        whole = [cut_off(answer[found.start() :])]
    code = (whole or blocks or [cut_off("\n" + answer)[1:]])[0]
    if whole:
        head = head[: head.find(name)]  # imports, and functions that it may call
    return f"{head}{code}\n{prompt.test}\ncheck({prompt.function})\n"


def cut_off(code: str) -> str:
    """Up to the first line, after the first one, that is not indented."""
    return re.split(r"\n(?=[^\s])", code, maxsplit=1)[0]


def passes(program: str, seconds: float = 10.0) -> bool:
    """Does it end without an error? In a process of its own with limits of time and memory, in an empty
    folder. These are against accidents, not against malice."""
    limits = (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**31, 2**31)); r.setrlimit(r.RLIMIT_FSIZE, (0, 0))"
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", f"{limits}\nexec({program!r}, {{'__name__': 'solution'}})"]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        try:
            return subprocess.run(command, cwd=folder, env={}, timeout=seconds, **quiet).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def last_number(text: str) -> str:
    """The last number in a text, without its formatting: "... is 1,234.50." -> "1234.5"; "" if none."""
    found = re.findall(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?", text)
    number = found[-1].replace(",", "") if found else ""
    return number.rstrip("0").rstrip(".") if "." in number else number


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
