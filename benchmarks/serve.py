"""serve.py: a server under load: what clients see, from one to many of them.

    python bench.py serve --methods autoregressive,sequential --clients 1,8,64
    python bench.py serve --checkpoint_path DIR --llama_cpp DIR --gguf FILE      # next to llama.cpp's server

The one idea: a client's clock is the only one that counts. The server is a process of its own, clients are
coroutines of this one, each with one request at a time, so what they wait for is all in the numbers.

A *gap* is the time between two events of a stream; an event has the tokens of one step. Beside them stand the
speed of generate.py with the same prompts and as many rows, and the longest gap of a stream while a prompt of
--long_prompt tokens is read, next to the longest one without it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.common import HELD_OUT, read_prompt_file, split
from checkpoints import SHIPPED_TARGET, find_checkpoint
from model import BadInput
from text import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PASSED = (
    "checkpoint_path", "draft_checkpoint_path", "eagle_checkpoint_path", "dflash_checkpoint_path",
    "precision", "lm_head_bits",
)  # fmt: skip


@dataclass
class Seen:
    """What a client saw of an answer."""

    begin: float
    events: list[float] = field(default_factory=list)  # when they came
    tokens: int = 0

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.events, self.events[1:])]


async def ask(port: int, prompt: Any, new: int, **fields: Any) -> Seen:
    """One streamed completion."""
    body = {"prompt": prompt, "max_tokens": new, "stream": True, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body | {"stream_options": {"include_usage": True}} | fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    seen = Seen(time.perf_counter())
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise BadInput(f"serve: {status.decode().strip()}: {(await reader.read())[-300:].decode()}")
    async for line in reader:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0].get("text"):
                seen.events.append(time.perf_counter())
            seen.tokens = (event.get("usage") or {}).get("completion_tokens", seen.tokens)
    writer.close()
    return seen


async def load(port: int, prompts: list[Any], clients: int, new: int, **fields: Any) -> list[Seen]:
    """Every prompt once, by so many clients, each of which has one request at a time."""
    waiting, seen = list(prompts), []

    async def client() -> None:
        while waiting:
            seen.append(await ask(port, waiting.pop(0), new, **fields))

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen


def summary(seen: list[Seen], seconds: float) -> dict[str, float]:
    firsts = [each.events[0] - each.begin for each in seen if each.events]
    gaps = [gap for each in seen for gap in each.gaps]
    found = {"tokens_per_second": sum(each.tokens for each in seen) / seconds}
    for name, values in (("first_token", firsts), ("gap", gaps)):
        found |= {f"{name}_median": median(values), f"{name}_99": quantiles(values, n=100)[98]}
    return found


async def longest_gaps(
    port: int, prompts: list[Any], long: Any, clients: int, **fields: Any
) -> dict[str, float]:
    """The longest gap of so many streams, while they are alone and while a long prompt is read."""
    alone = await load(port, prompts[:clients], clients, 200, **fields)
    streams = asyncio.gather(*(ask(port, prompt, 200, **fields) for prompt in prompts[:clients]))
    await asyncio.sleep(max(each.events[0] - each.begin for each in alone if each.events))
    newcomer = await ask(port, long, 2, **fields)
    begin, end = newcomer.begin, newcomer.events[0]
    # The step after the last chunk reaches the streams after the newcomer's first token.
    pairs = [pair for each in await streams for pair in zip(each.events, each.events[1:])]
    during = [b - a for a, b in pairs if begin < b and a < end]
    usual = [gap for each in alone for gap in each.gaps]
    found = {"alone_median": median(usual), "alone_longest": max(usual)}
    return found | {"while_reading_longest": max(during, default=0.0), "reading_seconds": end - begin}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """A server, from the moment when it is healthy."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not is_healthy(port):
                if process.poll() is not None:
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise BadInput(f"serve: {Path(command[0]).name} did not start: {''.join(last)}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait()


def is_healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def flags_of(args: argparse.Namespace) -> list[str]:
    given = {name: getattr(args, name) for name in PASSED}
    return [word for name, value in given.items() if value for word in (f"--{name}", str(value))]


def without_server(prompts: list[list[int]], rows: int, method: str, args: argparse.Namespace) -> float:
    """Tokens per second of generate.py, prefill included."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps({"prompt_ids": prompt}) + "\n" for prompt in prompts))
        file.flush()
        flags = [
            "--prompts",
            file.name,
            "--batch_size",
            str(rows),
            "--method",
            method,
            "--ignore_eos",
            "--json",
        ]
        flags += ["--max_new_tokens", str(args.max_new_tokens), *flags_of(args)]
        command = [sys.executable, str(ROOT / "generate.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"serve: generate.py: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)["stats"]["aggregate_tokens_per_second"]


def measure(
    name: str, port: int, prompts: list[Any], long: Any, args: argparse.Namespace, **fields: Any
) -> dict:
    """Every number of clients, with as many requests for each: a row of results a number."""
    asyncio.run(load(port, prompts[:2], 2, 8, **fields))  # whatever is recorded when it is first needed
    rows = {}
    for clients in map(int, split(args.clients)):
        begin = time.perf_counter()
        seen = asyncio.run(load(port, prompts, clients, args.max_new_tokens, **fields))
        rows[clients] = row = summary(seen, time.perf_counter() - begin)
        times = [1e3 * row[key] for key in ("first_token_median", "first_token_99", "gap_median", "gap_99")]
        line = "".join(f"{value:9.1f}" for value in (row["tokens_per_second"], *times))
        print(f"{name:16}{clients:8}{line}", flush=True)
    streams = max(args.rows - 1, 1)
    rows["long_prompt"] = gaps = asyncio.run(longest_gaps(port, prompts, long, streams, **fields))
    parts = ", ".join(f"{key.replace('_', ' ')} {1e3 * value:.1f} ms" for key, value in gaps.items())
    print(f"{name:16}gaps of {streams} streams: {parts}", flush=True)
    return rows


def report_serve(args: argparse.Namespace) -> dict[str, Any]:
    """Each method of ours in one server, then llama.cpp's."""
    program = find_llama_server(args) if args.llama_cpp else None
    directory = find_checkpoint(str(args.checkpoint_path or SHIPPED_TARGET))
    tokenizer = load_tokenizer(directory)
    prompts = [p.tokens for p in read_prompt_file(args.prompt_file or HELD_OUT, tokenizer, args.prompts)]
    prompts *= -(-max(map(int, split(args.clients))) // len(prompts))  # one for each client at least
    long = (prompts[0] * args.long_prompt)[: args.long_prompt]
    print(f"{'':16}{'clients':>8}{'tokens/s':>9}{'first ms':>9}{'99 %':>9}{'gap ms':>9}{'99 %':>9}")
    results, port, methods = {}, free_port(), split(args.methods)
    words = [word for method in methods for word in ("--method", method)]
    more = ["--batch_size", str(args.rows), "--port", str(port), "--max_waiting", "999", *flags_of(args)]
    with running([sys.executable, str(ROOT / "serve.py"), *words, *more], port):
        for method in methods:
            results[method] = measure(method, port, prompts, long, args, method=method)
    for method in methods:
        results[method]["without_server"] = speed = without_server(prompts, args.rows, method, args)
        print(f"{method:16}generate.py --batch_size {args.rows}: {speed:.1f} tokens/s", flush=True)
    if program:
        results["llama.cpp"] = measure_llama_cpp(program, prompts, long, args)
    return results


def find_llama_server(args: argparse.Namespace) -> Path:
    places = [Path(args.llama_cpp, folder, "llama-server") for folder in ("", "bin")]
    program = next((place for place in places if place.is_file()), None)
    if program is None or not args.gguf:
        raise BadInput("--llama_cpp: serve needs llama-server there or in its bin/, and --gguf")
    return program.resolve()


def measure_llama_cpp(
    program: Path, prompts: list[list[int]], long: list[int], args: argparse.Namespace
) -> dict[str, Any]:
    """The same requests to llama-server, which has one slot for each of our rows."""
    port, room = free_port(), 2 * max(map(len, (*prompts, long))) + args.max_new_tokens
    flags = ["-m", args.gguf, "--port", str(port), "-np", str(args.rows), "-c", str(args.rows * room)]
    with running([str(program), *flags], port):
        return measure("llama.cpp", port, prompts, long, args)
