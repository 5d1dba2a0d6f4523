"""peers.py: this engine next to other engines for CPUs, on one machine in the same minutes.

    python bench.py peers --llama_cpp DIR --shape llama-3.2-1b      # random weights, here and there
    python bench.py peers --llama_cpp DIR --gguf FILE --checkpoint_path DIR
    python bench.py peers --checkpoint_path DIR                     # transformers, PyTorch's own 4-bit linear
    python bench.py peers --checkpoint_path DIR --prompt_file FILE  # and whole answers, with lookup, too

The one idea: an engine is fast or slow only next to another one. Ours and the peer take turns, never at the
same time, with equal threads and equal work, and the ratio of their medians counts. Where a busy machine is
the subject, both get the same company: a busy loop, or a copy of themselves.

llama-bench computes the logits of the last of n tokens alone, and picks no tokens. Ours has the logits of all
n, which verifying needs, and picks. Both count against us. What OMP_WAIT_POLICY says counts for us alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.common import Paths, compiles, fitting_prompts, freeze, head_bits, load_parts, timed
from benchmarks.linears import measure_linear, print_linear
from benchmarks.llama_cpp import LlamaCpp, find_llama_cpp, random_gguf, run_program
from benchmarks.shapes import SHAPES, linears_of, random_model, weights_of_a_step
from benchmarks.timing import copy_bandwidth, rotate_names
from checkpoints import SHIPPED_TARGET, find_checkpoint
from cli import load_kernels
from costs import Stats
from drafts import Draft
from gpt_spec import Decoder, LookupDrafter, cache_length
from model import BadInput

SIZES = (1, 2, 4, 8, 16)  # n of T(n)
DEPTH = 200  # tokens in the cache there: as `freeze` leaves them
SHORT = 32  # tokens of the prompt where it should not matter
LOOKUP = 3  # tokens of a draft
LENGTHS = (SHORT, 550, 4600)
LEAST_TURNS = 3
PROMPT = "The capital of France is"
ROOT = Path(__file__).resolve().parent.parent
BUSY = """import os
parent = os.getppid()
print("ready", flush=True)
while os.getppid() == parent:
    for _ in range(10**6):
        pass"""
COPY = "import json, sys; from benchmarks import peers; peers.keep_decoding(json.loads(sys.argv[1]))"
COMPANY = ("a busy loop", "a copy of itself")


def report_peers(args: argparse.Namespace) -> dict:
    """Decoding, prefill and T(n), ours and a peer's, and their ratios; next to llama.cpp on a busy machine,
    too. The peers are transformers, PyTorch's operators and, with --llama_cpp, llama.cpp."""
    programs = find_llama_cpp(args.llama_cpp) if args.llama_cpp else None
    if args.gguf and not programs:
        raise BadInput("--gguf: it is for llama.cpp, so it needs --llama_cpp")
    if args.gguf and not Path(args.gguf).is_file():
        raise BadInput(f"--gguf: {args.gguf} is no file")
    ours = Ours(args)
    lengths = [n for n in LENGTHS if n + args.max_new_tokens <= ours.config.max_context]
    left_out = f" (longer ones do not fit into {ours.config.max_context})" if lengths != [*LENGTHS] else ""
    print(f"ours {ours.precision}, {torch.get_num_threads()} threads, prompts of {lengths} tokens{left_out}")
    facts = {"precision": ours.precision, "weight_bytes": ours.weight_bytes}
    if programs:
        facts["llama.cpp"] = next_to_llama_cpp(ours, programs, lengths, args)
    return facts | {"transformers": next_to_transformers(ours, lengths, args), "linears": linears(ours, args)}


# --------------------------------------------------------------------------------------------------
# Turns
# --------------------------------------------------------------------------------------------------


def take_turns(sides: dict[str, Any], groups: list[Callable[[Any], dict]], repeats: int) -> dict[str, Any]:
    """Each group of measurements with every side in turn -> medians, ratio and all values by measurement,
    and how busy others kept the machine before every turn."""
    values: dict[str, dict[str, list[float]]] = {}
    turns, busy = max(LEAST_TURNS, repeats), []
    for turn in range(turns):
        busy, begin = [*busy, others_busy()], time.perf_counter()
        for measure in groups:
            for side in rotate_names([*sides], turn):
                for name, value in measure(sides[side]).items():
                    values.setdefault(name, {side: [] for side in sides})[side].append(value)
        seconds, others = time.perf_counter() - begin, f"others keep {busy[-1]:.0%} of the CPUs busy"
        print(f"turn {turn + 1} of {turns}: {seconds:.0f} s; {others}", flush=True)
    rows = {name: {side: median(of[side]) for side in sides} for name, of in values.items()}
    rows = {n: row | {"ratio": row["ours"] / row["peer"], "all": values[n]} for n, row in rows.items()}
    return {"others_busy": busy, "rows": rows}


def others_busy(seconds: float = 1.0) -> float:
    """The share of all CPUs that is busy while we sleep; not a number where Linux does not tell. Above a few
    per cent, the machine is not idle, and the results are of the load, not of the engines."""

    def read() -> tuple[int, int]:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]  # all; idle, and waiting for a disk

    try:
        everything, idle = read()
        time.sleep(seconds)
        after = read()
    except OSError:
        return float("nan")
    return 1 - (after[1] - idle) / max(after[0] - everything, 1)


def print_rows(rows: dict[str, dict], peer: str) -> None:
    print(f"{'':44}{'ours':>11}{peer:>14}{'ours / it':>12}")
    for name, row in rows.items():
        print(f"{name:44}{row['ours']:11.2f}{row['peer']:14.2f}{row['ratio']:12.2f}", flush=True)


def runs_of(length: int) -> int:
    """How many runs a side takes the mean of in a turn."""
    return 3 if length <= 1000 else 1


def forwards(side: Any) -> dict[str, float]:
    """T(n), and how many times T(1) that is."""
    seconds = side.forwards(SIZES, DEPTH, 10)
    ratios = {f"T({n}) / T(1)": seconds[n] / seconds[1] for n in SIZES[1:]}
    return {f"T({n}), ms": 1e3 * value for n, value in seconds.items()} | ratios


def texts(length: int, new: int, side: Any) -> dict[str, float]:
    """A prompt of so many tokens, and new ones after it."""
    prefill, decode = side.run(length, new, runs_of(length))
    prefill_row = {f"prefill of {length:,} tokens, tokens/s": prefill} if length > SHORT else {}
    return prefill_row | {f"decoding after {length:,} tokens, tokens/s": decode}


def answers(prompts: list[list[int]], new: int, side: Any) -> dict[str, float]:
    """Whole answers, prefill included, without a drafter and with prompt lookup."""
    drafted = {"": 0, f" with lookup of {LOOKUP} tokens": LOOKUP}
    return {f"answers{how}, tokens/s": side.answer(prompts, new, k) for how, k in drafted.items()}


def beside(company: str, new: int, side: Any) -> dict[str, float]:
    """Decoding while a busy loop runs, or a copy of this side."""
    busy = [sys.executable, "-c", BUSY], None
    with running(*(busy if company == COMPANY[0] else side.copy(SHORT, new))):
        return {f"decoding beside {company}, tokens/s": side.decode(SHORT, new, runs_of(SHORT))}


def whole_program(side: Any) -> dict[str, float]:
    """Seconds from its start to its end."""
    command, begin = side.program(PROMPT, SHORT), time.perf_counter()
    run_program(*command)
    return {f"a program that writes {SHORT} tokens, s": time.perf_counter() - begin}


@contextmanager
def running(command: list[str], environment: dict[str, str] | None) -> Iterator[None]:
    """Another program runs until the end of the `with`, which begins when it has printed a line."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as program:
        try:
            if not program.stdout.readline():
                raise BadInput(f"{Path(command[0]).name} was to run beside others, and ended at once")
            yield
            if program.poll() is not None:
                raise BadInput(f"{Path(command[0]).name} was to run beside others, and ended too soon")
        finally:
            program.kill()


# --------------------------------------------------------------------------------------------------
# Sides: ours, and those of the peers
# --------------------------------------------------------------------------------------------------


class Ours:
    """This engine without a drafter, with a checkpoint or with random weights."""

    def __init__(self, args: argparse.Namespace):
        bits = head_bits(args, args.precision)
        if args.gguf and not args.checkpoint_path:
            raise BadInput("peers: --gguf needs --checkpoint_path, the same model for this engine")
        if args.shape and args.prompt_file:
            raise BadInput("--prompt_file: peers answers its prompts with a checkpoint, and --shape has none")
        self.prompts: list[list[int]] = []  # of --prompt_file
        self.stop_ids: list[int] = []
        if args.shape:
            self.model = random_model(SHAPES[args.shape], args.precision, lm_head_bits=bits)
            self.precision = args.precision
        else:
            paths = Paths(args.checkpoint_path or SHIPPED_TARGET)
            parts = load_parts(args.precision, paths, lm_head_bits=bits)
            self.model, self.precision = parts.target.model, parts.target.precision
            self.stop_ids = [*parts.target.stop_ids]
            if args.prompt_file:
                self.prompts = [prompt.tokens for prompt in fitting_prompts(parts, args)]
        self.args, self.config = args, self.model.config
        self.weight_bytes = sum(p.nbytes for p in weights_of_a_step(self.model))
        self.decoders: dict[tuple[int, int], Decoder] = {}  # by the length of their caches and of drafts

    def decoder(self, longest: int, drafted: int = 0) -> Decoder:
        """A warm one with room for so many tokens, whose drafts are looked up and have so many."""
        key = size, _ = cache_length(self.config, longest), drafted
        if key not in self.decoders:
            drafter, compile = LookupDrafter(drafted) if drafted else None, compiles(self.args)
            self.decoders[key] = Decoder(self.model, drafter, max_length=size, compile=compile)
            self.decoders[key].warm_up()
        return self.decoders[key]

    @torch.no_grad()
    def forwards(self, sizes: tuple[int, ...], depth: int, runs: int) -> dict[int, float]:
        """Seconds of a step that verifies n nodes, by n."""
        decoder, seconds = freeze(self.decoder(depth + max(sizes))), {}
        for n in sizes:
            draft, times = Draft.chain(torch.randint(3, self.config.vocab_size, (1, n))), []
            for _ in range(runs + 1):
                begin = time.perf_counter()
                decoder.commit(draft)
                times.append(time.perf_counter() - begin)
            seconds[n] = mean(times[1:])  # the first one warms up
        return seconds

    def run(self, length: int, new: int, runs: int) -> tuple[float, float]:
        """Tokens per second of prefill, and of decoding after it."""
        prompt, decoder = some_tokens(length, self.config.vocab_size), self.decoder(length + new)
        done = [timed(decoder, [prompt], new, Stats()) for _ in range(runs)]
        return mean(length / run.prefill_seconds for run in done), mean(run.speed for run in done)

    def decode(self, length: int, new: int, runs: int) -> float:
        return self.run(length, new, runs)[1]

    def answer(self, prompts: list[list[int]], new: int, drafted: int) -> float:
        """Tokens per second of answers, prefill included."""
        stats, decoder = Stats(), self.decoder(max(map(len, prompts)) + new, drafted)
        timed(decoder, prompts, new, stats, self.stop_ids)
        return stats.aggregate_tokens_per_second

    def copy(self, length: int, new: int) -> tuple[list[str], None]:
        """A program that goes on decoding: see `keep_decoding`."""
        settings = vars(self.args) | {"threads": torch.get_num_threads(), "length": length, "new": new}
        return [sys.executable, "-c", COPY, json.dumps(settings, default=str)], None

    def program(self, prompt: str, new: int) -> tuple[list[str], None]:
        flags = {"--checkpoint_path": self.args.checkpoint_path, "--precision": self.precision}
        flags |= {"--prompt": prompt, "--max_new_tokens": str(new), "--method": "autoregressive"}
        flags |= {"--lm_head_bits": self.args.lm_head_bits} if self.args.lm_head_bits else {}
        flags |= {"--device": "cpu"} | ({} if compiles(self.args) else {"--compile": "none"})
        pairs = [part for pair in flags.items() for part in pair]
        return [sys.executable, str(ROOT / "generate.py"), "--ignore_eos", *pairs], None


def some_tokens(count: int, vocabulary: int) -> list[int]:
    return [3 + i % (vocabulary - 3) for i in range(count)]


def keep_decoding(settings: dict[str, Any]) -> None:
    """Decode until the parent ends. A line of output says that from now on nothing else is done."""
    parent, (length, new) = os.getppid(), (settings["length"], settings["new"])
    torch.set_num_threads(settings["threads"])
    load_kernels()
    ours = Ours(argparse.Namespace(**settings))
    ours.decode(length, new, 1)
    print("ready", flush=True)
    while os.getppid() == parent:
        ours.decode(length, new, 1)


def next_to_llama_cpp(
    ours: Ours, programs: dict[str, Path], lengths: list[int], args: argparse.Namespace
) -> dict[str, Any]:
    """Everything, next to llama.cpp with --gguf, or with random weights of our shape."""
    new = args.max_new_tokens
    groups = [forwards, *(partial(texts, length, new) for length in lengths)]
    groups += [partial(beside, company, new) for company in COMPANY]
    groups += [whole_program] if args.gguf and args.checkpoint_path else []
    with nullcontext(args.gguf) if args.gguf else random_gguf(ours.config, ours.precision) as gguf:
        peer = LlamaCpp(programs, gguf)
        results = take_turns({"ours": ours, "peer": peer}, groups, args.repeats)
    megabytes = f"{ours.weight_bytes / 1e6:.0f} MB, its {peer.facts.get('model_size', 0) / 1e6:.0f} MB"
    print(f"our weights {megabytes}, {peer.facts.get('model_type')}, build {peer.facts.get('build_commit')}")
    print_rows(results["rows"], "llama.cpp")
    return {"facts": peer.facts} | results


class Transformers:
    """`generate` of transformers in bf16, with its usual cache. Decoding is what follows the first token."""

    def __init__(self, path: str | Path, stop_ids: list[int]):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.facts = {"version": transformers.__version__, "dtype": "bf16", "cache": "dynamic"}
        automatic = transformers.AutoModelForCausalLM
        self.model = automatic.from_pretrained(find_checkpoint(str(path)), dtype=torch.bfloat16)
        self.stop_ids = stop_ids

    def generate(self, prompt: list[int], new: int, **flags: Any) -> int:
        """Answer a prompt greedily -> the number of new tokens."""
        ids = torch.tensor([prompt])
        flags |= {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **flags)
        return out.shape[1] - len(prompt)

    def seconds(self, length: int, new: int) -> float:
        prompt, begin = some_tokens(length, self.model.config.vocab_size), time.perf_counter()
        self.generate(prompt, new, min_new_tokens=new)
        return time.perf_counter() - begin

    def answer(self, prompts: list[list[int]], new: int, drafted: int) -> float:
        """Tokens per second of answers, prefill included."""
        flags = {"eos_token_id": self.stop_ids} | ({"prompt_lookup_num_tokens": drafted} if drafted else {})
        begin = time.perf_counter()
        tokens = sum(self.generate(prompt, new, **flags) for prompt in prompts)
        return tokens / (time.perf_counter() - begin)

    def run(self, length: int, new: int, runs: int) -> tuple[float, float]:
        first = mean(self.seconds(length, 1) for _ in range(runs))
        return length / first, (new - 1) / (mean(self.seconds(length, new) for _ in range(runs)) - first)


def next_to_transformers(ours: Ours, lengths: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decoding next to transformers with the same checkpoint."""
    reason = "transformers needs a checkpoint, and --shape has none" if args.shape else ""
    if not reason and importlib.util.find_spec("transformers") is None:
        reason = "pip install transformers"
    if reason:
        print(f"transformers is left out: {reason}", flush=True)
        return {"left_out": reason}
    peer = Transformers(args.checkpoint_path or SHIPPED_TARGET, ours.stop_ids)
    groups = [partial(texts, length, args.max_new_tokens) for length in lengths]
    groups += [partial(answers, ours.prompts, args.max_new_tokens)] if ours.prompts else []
    results = take_turns({"ours": ours, "peer": peer}, groups, args.repeats)
    print_rows(results["rows"], "transformers")
    return {"facts": peer.facts} | results


def linears(ours: Ours, args: argparse.Namespace) -> dict[str, dict]:
    """The matrices of a layer and lm_head, next to PyTorch's own operator of as many bits."""
    peer = {"w4": "torch int4", "w8": "torch int8 x int8"}.get(ours.precision[:2], "torch bf16")
    shapes = linears_of(ours.config) | {"lm_head": (ours.config.vocab_size, ours.config.hidden_size)}
    bandwidth, results = copy_bandwidth(), {}
    for name, (out, inputs) in shapes.items():
        settings = (args.repeats, "cpu", bandwidth, [ours.precision, peer])
        rows, failed = measure_linear(out, inputs, [*SIZES], *settings)
        results[name] = {"out": out, "in": inputs, "linears": rows} | ({"failed": failed} if failed else {})
        print_linear(name, results[name])
        if len(rows) == 2:
            seconds = [rows[kind]["seconds"] for kind in (ours.precision, peer)]
            results[name]["ratio"] = {n: seconds[0][n] / seconds[1][n] for n in SIZES}
            ratios = " ".join(f"{ratio:6.2f}" for ratio in results[name]["ratio"].values())
            print(f"seconds, ours / {peer}, n = {[*SIZES]}: {ratios}", flush=True)
    return results
