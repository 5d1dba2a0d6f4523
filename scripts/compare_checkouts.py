"""compare_checkouts.py: do two checkouts write the same texts, and is the new one as fast as the old one?

    git worktree add /tmp/old HEAD~1
    python scripts/compare_checkouts.py texts /tmp/old .      # every method, precision, temperature and batch
    python scripts/compare_checkouts.py speed /tmp/old .      # medians of new / old, taking turns

For a change that moves code and should change nothing else. `texts` runs the command line of both checkouts
and compares tokens. `speed` keeps a process of each checkout, which decode in turns; the other one sleeps.

The one idea: a checkout is used as a user would use it, through `generate.py`, so the two may differ in
everything else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

METHODS = ("autoregressive", "lookup", "sequential", "tree", "hierarchical", "qspec", "auto")
PRECISIONS = ("fp32", "bf16", "w8a16", "w8a8", "w4a16", "w4a8", "w4a4")
TIMED = list(product(("autoregressive", "sequential", "tree", "auto"), ("bf16", "w4a8")))
PROMPTS, TOKENS = 6, 60


# --------------------------------------------------------------------------------------------------
# In a checkout: a process whose working directory it is
# --------------------------------------------------------------------------------------------------


def write_texts(compile: str) -> None:
    """A line of JSON for every combination: its name and its tokens, or how it was refused."""
    import generate

    lines = Path("models/held_out.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    prompts = Path(os.environ["SCRATCH"], "prompts.jsonl")
    prompts.write_text("\n".join(lines), encoding="utf-8")
    few = compile != "none"  # of older checkouts: compiling took minutes
    methods, precisions = (METHODS[:4], ("bf16", "w4a8")) if few else (METHODS, PRECISIONS)
    for precision, temperature, batch, method in product(precisions, (0, 1), (1, 4), methods):
        flags = ["--method", method, "--precision", precision, "--temperature", str(temperature), "--json"]
        flags += ["--batch_size", str(batch), "--prompts", str(prompts), "--max_new_tokens", str(TOKENS)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = generate.main([*flags, "--compile", compile])
        texts = [o["token_ids"] for o in json.loads(out.getvalue())["outputs"]] if status == 0 else []
        name = f"{precision} T={temperature} batch {batch} {method}"
        refused = "" if status == 0 else err.getvalue().strip().splitlines()[-1]
        print(json.dumps({"name": name, "texts": texts, "refused": refused}), flush=True)


def decode_when_asked(method: str, precision: str) -> None:
    """After every line of input, decode once and answer with tokens per second."""
    import generate

    args = generate.build_parser().parse_args(["--method", method, "--precision", precision])
    target = generate.load_target(args)
    _, drafter = generate.build_drafter(args, target)
    decoder = generate.Decoder(target.model, drafter, max_length=512)
    decoder.warm_up()
    lines = Path("models/held_out.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    prompts = [target.tokenizer.encode(json.loads(line)["prompt"])[:200] for line in lines]
    print("ready", flush=True)
    for _ in sys.stdin:
        stats = generate.Stats()
        for _ in decoder.run(prompts, 150, stats=stats):
            pass
        print(stats.decode_tokens_per_second, flush=True)


# --------------------------------------------------------------------------------------------------
# The comparison
# --------------------------------------------------------------------------------------------------


def start(checkout: str, *words: str, threads: int, **options) -> subprocess.Popen:
    """This file in a process that imports from a checkout."""
    environment = os.environ | {"PYTHONPATH": checkout, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    return subprocess.Popen(
        command, cwd=checkout, env=environment | options.pop("more", {}), text=True, **options
    )


def compare_texts(checkouts: list[str], scratch: str, compile: str) -> int:
    """-> the number of texts that differ."""
    folders = [Path(scratch, name) for name in ("old", "new")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    processes = [
        start(c, "write_texts", compile, threads=1, more={"SCRATCH": str(folder)}, stdout=subprocess.PIPE)
        for c, folder in zip(checkouts, folders)
    ]
    different = total = refused = combinations = 0
    for old, new in zip(*(process.stdout for process in processes)):
        old, new = json.loads(old), json.loads(new)
        combinations, refused = combinations + 1, refused + bool(old["refused"])
        wrong = sum(a != b for a, b in zip(old["texts"], new["texts"]))
        if wrong or old["name"] != new["name"] or old["refused"] != new["refused"]:
            print(f"{old['name']}: {wrong} texts differ; {old['refused']} | {new['refused']}", flush=True)
            wrong = max(wrong, 1)
        different, total = different + wrong, total + len(old["texts"])
    codes = [process.wait() for process in processes]
    print(f"{combinations} combinations, {refused} of them refused by both; {total} texts, ", end="")
    print(f"{different} differ; exit statuses {codes}")
    return different + sum(codes)


def compare_speed(checkouts: list[str], turns: int, only: str) -> int:
    """-> how many medians are below 0.98."""
    slow = 0
    for method, precision in TIMED:
        if only not in ("", f"{method} {precision}"):
            continue
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        both, ratios = [], []
        for checkout in checkouts:  # one after the other: compiling would disturb measuring
            both.append(start(checkout, "decode_when_asked", method, precision, threads=2, **pipes))
            both[-1].stdout.readline()
        for turn in range(turns + 2):
            order = both if turn % 2 else both[::-1]
            speeds = {}
            for process in order:
                time.sleep(0.3)  # threads of the other one have gone to sleep
                process.stdin.write("go\n")
                process.stdin.flush()
                speeds[process.pid] = float(process.stdout.readline())
            ratios += [speeds[both[1].pid] / speeds[both[0].pid]] if turn >= 2 else []
        for process in both:
            process.stdin.close()
            process.wait()
        low, median, high = statistics.quantiles(ratios, n=4)
        slow += median < 0.98
        print(
            f"{method:16} {precision:6} new / old {median:.3f} (quartiles {low:.3f}, {high:.3f})", flush=True
        )
    return slow


def main() -> int:
    inside = {"write_texts": write_texts, "decode_when_asked": decode_when_asked}
    if sys.argv[1:2] and sys.argv[1] in inside:
        inside[sys.argv[1]](*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("texts", "speed"))
    parser.add_argument("old", help="a checkout")
    parser.add_argument("new", help="another one")
    parser.add_argument("--compile", choices=("none", "default"), default="none", help="of texts")
    parser.add_argument("--turns", type=int, default=15, help="of speed")
    parser.add_argument("--only", default="", help="of speed: 'auto w4a8', for one")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="a folder for prompts")
    args = parser.parse_args()
    checkouts = [str(Path(path).resolve()) for path in (args.old, args.new)]
    if args.what == "texts":
        return int(compare_texts(checkouts, args.scratch, args.compile) > 0)
    return int(compare_speed(checkouts, args.turns, args.only) > 0)


if __name__ == "__main__":
    sys.exit(main())
