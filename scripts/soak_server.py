"""soak_server.py: random requests to a server, valid and invalid, huge, cut and slow.

    python serve.py & python scripts/soak_server.py --pid $! --seconds 600 --clients 16

It fails where a status is 500, where a row is still taken at the end, where a text with a seed is not what it
was before, or where the memory of the server at the end is more than 5 % above that after the first minute.

The one idea: a client is a socket. What a library would refuse to send is what a server has to survive.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

PROMPTS = ("import os\n", "def add(a, b):\n", "class Stack:\n    ", "x = ", "# \u00e9\u4e16\U0001f642\n")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
NONSENSE: tuple[Any, ...] = (None, -1, 1e9, "", "x", [], {}, [[]], True, {"a": [1]}, "\ud800", 10**30, [None])
NAMES = (  # of fields, to be filled with nonsense
    "prompt", "model", "n", "seed", "stop", "stream", "max_tokens", "temperature", "top_p", "top_k",
    "logprobs", "logit_bias", "response_format", "messages", "stream_options", "tools", "min_tokens",
    "method",
)  # fmt: skip
BROKEN = (
    b"",
    b"{",
    b"[]",
    b"nul",
    b'{"prompt": NaN}',
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"prompt": "a"',
    b"1" * 5000,
)


def valid(rng: random.Random) -> dict[str, Any]:
    """A request that is answered with a text."""
    body: dict[str, Any] = {"prompt": rng.choice(PROMPTS), "seed": rng.randrange(4)}
    body |= {"max_tokens": rng.choice((1, 2, 20, 60)), "temperature": rng.choice((0, 0.7, 1.3))}
    extras: list[dict[str, Any]] = [{"stream": True}, {"stop": ["\n\n", "return"]}, {"logprobs": 3}, {"n": 3}]
    extras += [{"frequency_penalty": 0.5}, {"logit_bias": {"15": -100}}, {"top_p": 0.9}, {"ignore_eos": True}]
    for extra in rng.sample(extras, rng.randrange(4)):
        body |= extra
    if rng.random() < 0.1 and "ignore_eos" not in body:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    return body


def request(path: str, body: bytes, kind: str = "application/json", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return head.encode() + f"Content-Length: {length}\r\n\r\n".encode() + body


class Soak:
    """Clients, each in a thread, until the time is up."""

    def __init__(self, host: str, port: int, seconds: float):
        self.address, self.end = (host, port), time.monotonic() + seconds
        self.statuses: Counter[str] = Counter()
        self.texts: dict[str, str] = {}  # by request: what its first answer was
        self.wrong: list[str] = []

    def run(self, clients: int) -> None:
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def client(self, number: int) -> None:
        rng = random.Random(number)
        kinds = [self.ask] * 6 + [self.nonsense, self.broken, self.huge, self.cut, self.leave, self.slow]
        while time.monotonic() < self.end:
            kind = rng.choice(kinds)
            try:
                status = kind(rng)
            except ConnectionError as error:  # it may close what it refuses to read
                status = type(error).__name__
            except Exception as error:  # too late, or no answer that can be read
                status = type(error).__name__
                self.wrong.append(f"{kind.__name__}: {error!r}")
            self.statuses[f"{kind.__name__} {status}"] += 1

    def send(self, data: bytes, pause: float = 0.0, most: int | None = None) -> bytes:
        """What is answered; with `most`, the client leaves after so many bytes."""
        with socket.create_connection(self.address, timeout=120) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may be refused before its end
                connection.sendall(data)
            answer = b""
            while (most is None or len(answer) < most) and (part := connection.recv(100 if pause else 65536)):
                answer += part
                time.sleep(pause)
        return answer

    def check(self, body: dict[str, Any], answer: bytes) -> str:
        """The status. A text must be that of every equal request, streamed or not."""
        found = re.match(rb"HTTP/1.1 (\d+)", answer)
        status = found[1].decode() if found else "nothing"
        if status in ("500", "nothing"):
            self.wrong.append(f"status {status}: {body}")
        if status == "200":
            key = json.dumps(
                {k: v for k, v in body.items() if k not in ("stream", "logprobs")}, sort_keys=True
            )
            text = texts_of(answer)
            if self.texts.setdefault(key, text) != text:
                self.wrong.append(f"another text: {body}")
        return status

    def ask(self, rng: random.Random) -> str:
        body = valid(rng)
        return self.check(body, self.send(request("/v1/completions", json.dumps(body).encode())))

    def nonsense(self, rng: random.Random) -> str:
        body = valid(rng) | {name: rng.choice(NONSENSE) for name in rng.sample(NAMES, 2)} | {"seed": None}
        body |= {"max_tokens": 5} if isinstance(body["max_tokens"], float) else {}
        path = rng.choice(("/v1/completions", "/v1/chat/completions", "/v1/models", "/nowhere"))
        answer = self.send(
            request(path, json.dumps(body).encode(), rng.choice(("application/json", "text/plain")))
        )
        return self.check({"max_tokens": rng.random()}, answer)

    def broken(self, rng: random.Random) -> str:
        return self.check({"broken": rng.random()}, self.send(request("/v1/completions", rng.choice(BROKEN))))

    def huge(self, rng: random.Random) -> str:
        bodies = ({"prompt": "a" * 6_000_000}, {"prompt": "import os\n" * 3000}, {"prompt": ["x"] * 500})
        many = (
            {"prompt": "x", "n": 10**6},
            {"prompt": list(range(100_000))},
            {"prompt": "x", "stop": ["a"] * 99},
        )
        body = rng.choice((*bodies, *many, {"prompt": "import re\n" * 100, "max_tokens": 10**9, "seed": 1}))
        return self.check(body, self.send(request("/v1/completions", json.dumps(body).encode())))

    def cut(self, rng: random.Random) -> str:
        """Half a request, and then nobody is there."""
        data = request("/v1/completions", json.dumps(valid(rng)).encode())
        with socket.create_connection(self.address, timeout=120) as connection:
            connection.sendall(data[: rng.randrange(len(data))])
        return "left"

    def leave(self, rng: random.Random) -> str:
        body = valid(rng) | {"stream": rng.random() < 0.7, "max_tokens": 500}
        self.send(request("/v1/completions", json.dumps(body).encode()), most=rng.choice((0, 1, 500, 5000)))
        return "left"

    def slow(self, rng: random.Random) -> str:
        body = valid(rng) | {"stream": True}
        return self.check(body, self.send(request("/v1/completions", json.dumps(body).encode()), pause=0.02))


def texts_of(answer: bytes) -> str:
    """The texts of an answer, by choice, and why they ended."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        body = unchunk(body)
    objects = [body] if b"text/event-stream" not in head else re.findall(rb"data: (\{.*)\n\n", body)
    texts: dict[int, str] = {}
    for choice in (choice for each in objects for choice in json.loads(each).get("choices", [])):
        ending = choice["finish_reason"] or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"] + ending
    return json.dumps(texts, sort_keys=True)


def unchunk(body: bytes) -> bytes:
    parts = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        parts, body = parts + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return parts


def gauge(host: str, port: int, name: str) -> float:
    """A number of /metrics."""
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    return float(re.search(rf"^gpt_spec:{name} (\S+)$", text, re.MULTILINE)[1])


def memory(pid: int) -> int:
    """Kilobytes that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def idle(host: str, port: int, seconds: float = 20.0) -> bool:
    """Are all rows free, at the latest in so many seconds?"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        names = ("num_requests_running", "num_requests_waiting")
        if sum(gauge(host, port, name) for name in names) == 0:
            return True
        time.sleep(0.1)
    return False


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--pid", type=int, help="of the server, whose memory is watched")
    p.add_argument("--seconds", type=float, default=600)
    p.add_argument("--clients", type=int, default=16)
    args = p.parse_args()
    soak, early = Soak(args.host, args.port, args.seconds), []
    if args.pid:
        timer = threading.Timer(min(60, args.seconds / 2), lambda: early.append(memory(args.pid)))
        timer.start()
    soak.run(args.clients)
    if not idle(args.host, args.port):
        soak.wrong.append("a row or the queue is not free at the end")
    if early:
        late = memory(args.pid)
        print(
            f"memory: {early[0]} kB after the first minute, {late} kB at the end, {late / early[0] - 1:+.1%}"
        )
        soak.wrong += ["the memory has grown"] if late > 1.05 * early[0] else []
    print(f"{sum(soak.statuses.values())} requests, {len(soak.texts)} different texts")
    print(json.dumps(dict(sorted(soak.statuses.items())), indent=2))
    print("\n".join(soak.wrong[:20]) or "nothing is wrong")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
