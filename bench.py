"""bench.py: what speculation costs and brings on this machine, measured.

    python bench.py cost        # T(n): one target forward over n tokens, and one step of the drafter
    python bench.py methods     # every method on held-out prompts: tokens/s, tokens per step, speedup
    python bench.py noise       # acceptance with noise shared by target and drafter, and independent

The one idea: speedup = tau * T(1) / (drafting + T(n)), where tau is tokens per step. Everything is measured
in one process, interleaved, and given as a ratio: absolute times change with the machine's mood, ratios less.
Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import generate
from gpt_spec import Decoder, Draft, Drafter, LookupDrafter, Sampling, SequentialDrafter, Stats, Transformer

HELD_OUT = generate.MODELS / "held_out.jsonl"


class IndependentDrafter(SequentialDrafter):
    """Draws with noise of its own, as every engine does that samples target and drafter separately."""

    def write(self, fed: Tensor, length: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        return super().write(fed, length, seed + 2**40)


class GreedyDrafter(SequentialDrafter):
    """Proposes its most probable token, whatever the temperature."""

    def start(self, setup) -> None:
        super().start(setup)
        self.sampling = Sampling()


def read_prompts(count: int) -> list[list[int]]:
    """`count` prompts of held-out modules, evenly spread over all there are."""
    tokenizer = generate.load_tokenizer(generate.SHIPPED_TARGET)
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()
    return [tokenizer.encode(json.loads(lines[i * len(lines) // count])["prompt"]) for i in range(count)]


def decode(decoder: Decoder, prompt: list[int], tokens: int, stats: Stats) -> list[int]:
    return [t for emissions in decoder.run([prompt], tokens, stats=stats) for t in emissions[0].tokens]


def interleave(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that all see the same machine."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 3):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name] += [time.perf_counter() - begin] if turn >= 3 else []
    return {name: median(values) for name, values in times.items()}


def measure_cost(target: Transformer, small: Transformer, sizes: list[int]) -> dict[str, float]:
    """Seconds of a whole verification of n nodes and of a draft of 4 tokens, 200 tokens in the caches."""
    drafter = SequentialDrafter(small, 4)
    decoder = Decoder(target, drafter, max_length=512)
    decoder.warm_up()
    decoder.prefill(0, list(range(3, 203)), seed=0)
    decoder.state.active.fill_(False)  # frozen: every repetition does the same work

    def verify(n: int) -> None:
        decoder.commit(Draft.chain(torch.randint(3, 4000, (1, n))))

    functions = {f"T({n})": lambda n=n: verify(n) for n in sizes}
    functions["draft of 4"] = lambda: drafter.propose(decoder.state)
    with torch.no_grad():
        return interleave(functions, 100)


def report_cost(target: Transformer, small: Transformer, args: argparse.Namespace) -> dict:
    cost = measure_cost(target, small, [1, 2, 3, 5, 9, 17, 33, 65])
    for name, seconds in cost.items():
        print(f"{name:16} {seconds * 1e3:7.3f} ms   {seconds / cost['T(1)']:5.2f} T(1)")
    return {name: {"seconds": seconds, "relative": seconds / cost["T(1)"]} for name, seconds in cost.items()}


def report_methods(target: Transformer, small: Transformer, args: argparse.Namespace) -> dict:
    """Tokens/s of every method over the same prompts; a speedup is the median of the prompts' ratios."""
    sampling = Sampling(args.temperature, top_p=args.top_p)
    drafters: dict[str, Drafter] = {"autoregressive": Drafter(), "lookup K=4": LookupDrafter(4)}
    drafters |= {f"sequential K={k}": SequentialDrafter(small, k) for k in (2, 3, 4, 6)}
    decoders = {name: Decoder(target, drafter, sampling, 1024) for name, drafter in drafters.items()}
    for decoder in decoders.values():
        decoder.warm_up()
    totals: dict[str, Stats] = {name: Stats() for name in drafters}
    speeds: dict[str, list[float]] = {name: [] for name in drafters}
    same_text = dict.fromkeys(drafters, 0)
    prompts = read_prompts(args.prompts)
    for prompt in prompts:
        texts = {}
        for name, decoder in decoders.items():
            before = totals[name].decode_seconds
            texts[name] = decode(decoder, prompt, args.max_new_tokens, totals[name])
            speeds[name].append((len(texts[name]) - 1) / (totals[name].decode_seconds - before))
            same_text[name] += texts[name] == texts["autoregressive"]
    rows = {}
    for name, stats in totals.items():
        ratios = sorted(ours / base for ours, base in zip(speeds[name], speeds["autoregressive"]))
        rows[name] = {
            "tokens_per_second": median(speeds[name]),
            "speedup": median(ratios),
            "slowest": ratios[0],
            "fastest": ratios[-1],
            "tokens_per_step": stats.tokens_per_step,
            "same_text": same_text[name] / len(prompts),
            "acceptance_by_position": [round(share, 3) for share in stats.acceptance_by_position],
        }
        print(
            "{:16} {:7.1f} tokens/s {:5.2f} x ({:.2f} to {:.2f})  {:.2f} tokens per step"
            "  same text {:.2f}  {}".format(name, *rows[name].values())
        )
    return rows


def report_noise(target: Transformer, small: Transformer, args: argparse.Namespace) -> dict:
    """Share of steps that accepted the first draft token, and tokens per step, by temperature and noise."""
    kinds = {"shared": SequentialDrafter, "independent": IndependentDrafter, "greedy draft": GreedyDrafter}
    rows, prompts = {}, read_prompts(args.prompts)
    for temperature in (0.0, 0.3, 0.7, 1.0):
        for kind, drafter in kinds.items():
            sampling = Sampling(temperature, top_p=args.top_p)
            decoder = Decoder(target, drafter(small, 4), sampling, 1024, args.prompts, compile=False)
            stats = Stats()
            for _ in decoder.run(prompts, args.max_new_tokens, stats=stats):
                pass
            first = stats.acceptance_by_position[0]
            rows[f"{temperature} {kind}"] = {"first": first, "tokens_per_step": stats.tokens_per_step}
            print(
                f"T = {temperature}  {kind:12} first {first:.3f}  {stats.tokens_per_step:.2f} tokens per step"
            )
    return rows


REPORTS = {"cost": report_cost, "methods": report_methods, "noise": report_noise}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", choices=REPORTS)
    parser.add_argument("--precision", choices=list(generate.DTYPES), default="bf16")
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts to use")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--output", help="write the results as JSON to this file")
    args = parser.parse_args()
    target = generate.load_model(generate.SHIPPED_TARGET, args.precision)
    small = generate.load_model(generate.SHIPPED_SMALL, args.precision)
    results = REPORTS[args.report](target, small, args)
    if args.output:
        about = {
            "report": args.report,
            "settings": vars(args),
            "date": str(date.today()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
        }
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(about | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
