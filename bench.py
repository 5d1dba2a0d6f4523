"""bench.py: what speculation costs and gains on this machine, measured.

    python bench.py all         # every report below with the settings of the README, tables and figures
    python bench.py cost        # T(n): one target forward over n tokens, and what drafting costs
    python bench.py methods     # every method in three precisions: tokens/s, tokens per step, speedup
    python bench.py auto        # `auto` against every fixed method: models, precisions, batch sizes
    python bench.py synthetic --shape llama-3-8b --middle llama-3.2-1b    # random, published acceptance
    python bench.py when        # where hierarchies begin to win over trees: computed, nothing is measured
    python bench.py quality     # what a precision costs: perplexity, agreement with bf16, GSM8K
    python bench.py tree        # trees of 4 to 60 nodes, and of as many as pay, in three precisions
    python bench.py heads       # tokens per step of chains and trees, by kind of prompt
    python bench.py hierarchical  # a decoder as a drafter, next to flat methods, in two precisions
    python bench.py qspec       # the target's own weights as drafter, at several batch sizes
    python bench.py qspec_shape --shape llama-3.2-1b --max_new_tokens 32    # of random weights
    python bench.py confidence  # drafts of QSpec that end where it is not sure of itself
    python bench.py noise       # acceptance with noise shared by target and drafter, and independent
    python bench.py exact       # every method in every precision: is each text the autoregressive one?
    python bench.py perplexity  # of every precision and quantizer, on held-out modules
    python bench.py rotation    # accepted lengths on a rotated target and on the same one unrotated
    python bench.py hadamard    # what online rotations add to the linears that they belong to
    python bench.py kernels     # the linears of real models for 1 to 64 rows, next to PyTorch's and others'
    python bench.py decode --shape llama-3.2-1b --precision w4a8    # a whole model of random weights
    python bench.py peers --llama_cpp DIR    # next to llama.cpp, where there is one, transformers and PyTorch
    python bench.py processes   # a model in one process with two threads, and in two with a thread each
    python bench.py sampling    # what a pick costs; drafts under penalties and under a schema
    python bench.py serve       # a server under the load of 1 to 64 clients, each method

    # your own models and prompts
    python bench.py methods --checkpoint_path DIR --draft_checkpoint_path DIR --prompt_file spec_bench.jsonl
    python bench.py quality --checkpoint_path DIR --prompt_file gsm8k_test.jsonl --max_new_tokens 400
    python bench.py quality --checkpoint_path DIR --prompt_file human_eval.jsonl.gz --run_code

The one idea: speedup = tau * T(1) / (drafting + T(n)), where tau is tokens per step. Everything is measured
in one process, interleaved, and given as a ratio: ratios vary less with the load of the machine than absolute
times. Run it on an otherwise idle machine. The last line of the output is the results as JSON. The reports
are in the folder benchmarks; this file has the command line and the settings of the study.

`kernels` and `cost` also give shares of the copy bandwidth. The bytes of the weights in memory (nibbles,
bytes or bf16, with scales and zeros) are divided by the seconds of a call or a step, and by the bytes per
second of copying one large tensor, read and written both counted (`copy_bandwidth`, measured once per run).
Weights are only read, which on a CPU is faster than copying: shares above 1 are possible there.
"""

from __future__ import annotations

import process

if __name__ == "__main__":
    process.begin()

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.acceptance import read_acceptance
from benchmarks.common import QUANTIZERS, split, write_json
from benchmarks.cost import report_cost
from benchmarks.decode import report_decode
from benchmarks.drafts import report_confidence, report_hierarchical, report_noise, report_tree
from benchmarks.exact import report_exact
from benchmarks.heads import report_heads
from benchmarks.linears import report_hadamard, report_kernels
from benchmarks.machine import machine
from benchmarks.methods import report_auto, report_methods
from benchmarks.peers import report_peers
from benchmarks.processes import report_processes
from benchmarks.qspec import report_qspec, report_qspec_shape
from benchmarks.quality import report_perplexity, report_quality
from benchmarks.rotation import report_rotation
from benchmarks.sampling import report_sampling
from benchmarks.serve import report_serve
from benchmarks.shapes import REAL_SHAPES, SHAPES
from benchmarks.study import DEFAULTS, REAL_STUDY, STUDY
from benchmarks.synthetic import report_synthetic
from benchmarks.timing import on_gpu
from benchmarks.when import report_when
from checkpoints import ALL_PRECISIONS, HEAD_FLAG
from cli import OneLineParser, check_device, load_kernels
from eagle import TREE_DEPTH, TREE_TOPK
from generate import processes
from gpt_spec import MIN_DRAFT_LENGTH
from model import BadInput
from parallel import Ranks
from quantize import PERPLEXITY_TOKENS

REPORTS = {
    "cost": report_cost, "methods": report_methods, "auto": report_auto, "synthetic": report_synthetic,
    "quality": report_quality, "noise": report_noise, "exact": report_exact, "tree": report_tree,
    "hierarchical": report_hierarchical, "qspec": report_qspec, "qspec_shape": report_qspec_shape,
    "confidence": report_confidence, "perplexity": report_perplexity, "rotation": report_rotation,
    "hadamard": report_hadamard, "kernels": report_kernels, "decode": report_decode,
    "peers": report_peers, "sampling": report_sampling, "processes": report_processes,
    "when": report_when, "serve": report_serve, "heads": report_heads,
}  # fmt: skip
IN_PARTS = ("methods", "auto", "exact")  # reports that torchrun may start, and that take --sum_parts
# Reports that take --device:
ON_GPU = ("cost", "heads", "methods", "auto", "synthetic", "quality", "exact", "kernels")
SAVED = ("auto", "cost", "exact", "kernels", "methods", "quality", "synthetic")  # --output has what is done


def run_study(results: Path, only_list: bool) -> int:
    """Every report of `STUDY` in a process of its own, one after another, then tables and figures. Those
    after a failed one still run -> exit status: 1 if one failed."""
    here, failed = Path(__file__).resolve().parent, []
    commands = {
        name: ["bench.py", *flags.split(), "--output", str(results / name)] for name, flags in STUDY.items()
    }
    for script, output in (("tables", "tables.md"), ("draw", "figures")):
        folders = ["--results", str(results), "--output", str(results.parent / output)]
        commands[f"the {output}"] = [f"scripts/{script}.py", *folders]
    for name, (script, *flags) in commands.items():
        print(" ".join(["python", script, *flags]), flush=True)
        if not only_list and subprocess.run([sys.executable, here / script, *flags]).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if only_list:
        print("by hand, of a real model:")
        for name, flags in REAL_STUDY.items():
            print(f"python bench.py {flags} --output {results / name}")
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("report", choices=[*REPORTS, "all"])
    p.add_argument("--precision", choices=ALL_PRECISIONS, help="noise, decode (bf16), sampling, peers (w4a8)")
    p.add_argument("--precisions", help="cost, methods, auto, synthetic, quality, exact: which, with commas")
    only = p.add_mutually_exclusive_group()
    only.add_argument("--uncompiled", action="store_true", help="exact: only what is not; others: all")
    only.add_argument("--compiled", action="store_true", help="exact: only what is compiled")
    p.add_argument(
        "--prompts", type=int, help="so many (default: 20; auto 24, cost, sampling 8, synthetic 4)"
    )
    p.add_argument(
        "--max_new_tokens", type=int, help="(200; auto 128, sampling 100, cost, synthetic, peers 64)"
    )
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--top_p", type=float, default=1.0)
    add_model_flags(p)
    p.add_argument("--tree_depth", type=int, default=TREE_DEPTH, help="depth of all trees")
    p.add_argument("--tree_topk", type=int, default=TREE_TOPK, help="nodes of a beam")
    p.add_argument("--tree_size", type=int, help="nodes of trees in a hierarchy (auto; synthetic 16)")
    rows = "auto (1,8), methods, synthetic (1), sampling (1,4), qspec, qspec_shape (1,4,8,16)"
    p.add_argument("--batch_sizes", help=f"rows, with commas: {rows}")
    p.add_argument("--methods", help="methods, synthetic: which besides autoregressive (all); serve: which")
    p.add_argument("--speculate_k", type=int, default=3, help="qspec, qspec_shape: tokens of a draft")
    p.add_argument("--min_draft_length", type=int, default=MIN_DRAFT_LENGTH)
    p.add_argument("--tokens", type=int, default=PERPLEXITY_TOKENS, help="perplexity, quality: count so many")
    p.add_argument("--sizes", default="1,2,3,4,6,8,12,16,24,32,48,64", help="cost: n of T(n), with commas")
    p.add_argument("--acceptance", help="synthetic: of heads, a preset or 0.8,0.7 (default: that of EAGLE-2)")
    p.add_argument("--middle_acceptance", default="sequential", help="synthetic: of chains, likewise")
    p.add_argument("--repeats", type=int, default=7, help="measurements, of which the median counts")
    p.add_argument("--output", help="write the results as JSON to this file")
    p.add_argument("--results", type=Path, default="benchmarks/results", help="all: folder of the files")
    p.add_argument("--list", action="store_true", help="all: print the commands, run nothing")
    return p


def add_model_flags(p: argparse.ArgumentParser) -> None:
    directory = "a Hugging Face directory or hub repository id"
    p.add_argument("--checkpoint_path", help=f"cost, methods, auto, quality, sampling, peers: {directory}")
    bits = "of quantized targets: cost, methods, auto, synthetic, exact, decode, peers; quality (a,b)"
    p.add_argument("--lm_head_bits", metavar="4|8|16", help=bits)
    p.add_argument("--draft_checkpoint_path", help="a smaller model of its vocabulary")
    p.add_argument(HEAD_FLAG, help="an EAGLE head of one of these two")
    p.add_argument("--dflash_checkpoint_path", help="methods, auto, exact: a block head of the target")
    p.add_argument("--sum_parts", type=int, help=f"{', '.join(IN_PARTS)}: as in generate.py")
    p.add_argument("--device", default="cpu", help=f"{', '.join(ON_GPU)}: cpu or cuda")
    p.add_argument(
        "--prompt_file",
        help="methods, auto, exact, cost, heads, quality: .jsonl[.gz], several with commas",
    )
    p.add_argument("--shape", choices=SHAPES, help="cost, decode, qspec_shape, synthetic, peers: random")
    p.add_argument("--middle", choices=SHAPES, help="synthetic: of the smaller model (default: the next one)")
    p.add_argument("--shapes", default=",".join(REAL_SHAPES), help="kernels, hadamard: which, with commas")
    quantizers = f"of 4-bit targets, methods and auto: {', '.join(QUANTIZERS)}; quality: several, with ;"
    p.add_argument("--quantizer", help=quantizers)
    p.add_argument("--run_code", action="store_true", help="quality: of HumanEval, run what a model wrote")
    p.add_argument("--llama_cpp", help="peers, serve: the directory of llama-bench, llama-server")
    p.add_argument("--gguf", help="peers: the file for llama.cpp (default: random weights of the same shape)")
    p.add_argument("--clients", default="1,2,4,8,16,32,64", help="serve: how many at a time, with commas")
    p.add_argument("--rows", type=int, default=8, help="serve: texts that the server decodes at a time")
    p.add_argument("--long_prompt", type=int, default=700, help="serve: tokens of a prompt that disturbs")
    p.add_argument("--contestants", help="kernels: names in its table, with commas (default: all)")


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in the defaults of the report. Raises BadInput for impossible values."""
    of_shape = DEFAULTS.get(f"{args.report} {args.shape}", {})
    for flag, value in (DEFAULTS[""] | DEFAULTS.get(args.report, {}) | of_shape).items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    lists = {"precisions": ALL_PRECISIONS, "shapes": SHAPES, "lm_head_bits": ("4", "8", "16")}
    for flag, possible in lists.items():
        given = getattr(args, flag)
        unknown = set(split(given)) - set(possible) if given is not None else ()
        if unknown:
            raise BadInput(f"--{flag}: {', '.join(unknown)} is none of {', '.join(possible)}")
    quantizers = args.quantizer.split(";") if args.quantizer else []
    if set(quantizers) - set(QUANTIZERS) or (args.report != "quality" and len(quantizers) > 1):
        raise BadInput(f"--quantizer: {args.quantizer} is none of {'; '.join(QUANTIZERS)}")
    for flag in ("batch_sizes", "sizes"):
        text = getattr(args, flag)
        if not all(size.isdecimal() and 0 < int(size) <= 256 for size in split(text)):
            raise BadInput(f"--{flag}: {text} is no list of numbers up to 256 like 1,8")
    if args.report != "quality" and "," in (args.lm_head_bits or ""):
        raise BadInput(f"--lm_head_bits: {args.report} takes one number, not {args.lm_head_bits}")
    if "1" not in split(args.sizes):
        raise BadInput(f"--sizes: {args.sizes} has no 1, with which the others are compared")
    least = {"prompts": 1, "max_new_tokens": 2, "repeats": 1, "tokens": 1, "sum_parts": 1}
    for flag, value in ((flag, getattr(args, flag)) for flag in least):
        if value is not None and value < least[flag]:
            raise BadInput(f"--{flag} is {value}; it must be at least {least[flag]}")
    check_device(args.device)
    if on_gpu(args.device) and args.report not in ON_GPU:
        raise BadInput(f"--device: {args.report} runs on the CPU; on a GPU do {', '.join(ON_GPU)}")
    if args.checkpoint_path is None and (args.draft_checkpoint_path or args.eagle_checkpoint_path):
        raise BadInput(f"--draft_checkpoint_path and {HEAD_FLAG} need --checkpoint_path")
    read_acceptance(args.acceptance, "--acceptance")
    read_acceptance(args.middle_acceptance, "--middle_acceptance")


def run(args: argparse.Namespace) -> int:
    with processes(args) as ranks:
        check_arguments(args)
        if ranks != Ranks() and args.report not in IN_PARTS:
            others = f"{', '.join(IN_PARTS)} run in several, or with --sum_parts"
            raise BadInput(f"{args.report} runs in one process; {others}")
        return run_study(args.results, args.list) if args.report == "all" else run_report(args, ranks)


def run_report(args: argparse.Namespace, ranks: Ranks) -> int:
    load_kernels()
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "results")}
    settings |= {"processes": ranks.count}
    args.ranks, args.output = ranks, args.output if ranks.rank == 0 else None
    facts, early = {"report": args.report, "settings": settings} | machine(args.device), {}
    if args.report in SAVED:
        early["save"] = lambda rows: write(args.output, facts | {"unfinished": True, "results": rows})
    results = facts | {"results": REPORTS[args.report](args, **early)}
    write(args.output, results)
    print(json.dumps(results))
    return 0


def write(path: str | None, results: dict) -> None:
    if path:
        write_json(Path(path), results)


def main(argv: list[str] | None = None) -> int:
    return process.exit_status(lambda: run(build_parser().parse_args(argv)), BadInput)


if __name__ == "__main__":
    sys.exit(process.run(main))
