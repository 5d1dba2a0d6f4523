"""serve.py: an OpenAI-compatible server, with a page at / that shows how drafts are accepted.

    python serve.py --port 8000 --batch_size 8                       # the shipped models
    python serve.py --checkpoint_path DIR --method auto --method lookup --precision w4a8

It takes the flags of generate.py that choose models, methods and precisions. docs/serving.md says what
requests may hold. What they mean is in `api.py`; `engine.py` decodes their texts, in the main thread.

The one idea: a request with a seed has the text that generate.py prints for it, whatever else runs. So a
server is a way to ask, and nothing that it does may show in a text.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import process

if __name__ == "__main__":
    process.begin()
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        sys.exit(process.report(f"error: {missing[0]} missing; pip install -r requirements-serve.txt", 2))

import argparse
import asyncio
import hmac
import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

import generate
from api import MOST_LOGPROBS, Ask, Reader, Refused, Writer
from cli import OneLineParser, load_kernels
from engine import Engine, News
from gpt_spec import Decoder
from model import BadInput, cache_length, check_window
from parallel import Ranks
from sampling import Sampling
from show import metrics_text

FLAGS = (  # of generate.py: those that choose models, methods and precisions, and how they run
    "checkpoint_path", "draft_checkpoint_path", "eagle_checkpoint_path", "dflash_checkpoint_path",
    "precision", "lm_head_bits", "draft_precision", "speculate_k", "draft_confidence", "tree_size",
    "tree_depth", "tree_topk", "draft_vocab_size", "draft_vocab_text", "min_draft_length", "compile",
    "device", "sum_parts",
)  # fmt: skip
PAGE = Path(__file__).with_name("serve.html")
SLOW = 30  # seconds in which the body of a request must have come


def build_parser() -> OneLineParser:
    more = f"These flags of generate.py work here, too: {', '.join(f'--{name}' for name in FLAGS)}"
    p = OneLineParser(prog="serve.py", description="Serve OpenAI's API.", epilog=more, allow_abbrev=False)
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, help="0: any that is free")
    p.add_argument("--api_key", help="what clients must send as a bearer token (default: nothing)")
    p.add_argument("--served_name", metavar="NAME", help="of the model (default: that of its directory)")
    methods = "may be repeated: requests use the first one, and the page can choose the others"
    p.add_argument("--method", action="append", choices=generate.METHODS, help=methods)
    p.add_argument("--batch_size", type=int, default=8, help="texts that each method decodes at a time")
    length = "tokens of a text with its prompt (default: the model's context, at most 8192)"
    p.add_argument("--max_length", type=int, default=generate.CHAT_CONTEXT, help=length)
    p.add_argument("--max_tokens", type=int, help="of an answer (default: what there is room for)")
    chunk = "tokens of a prompt to read between two steps of other texts (default: what takes as long as one)"
    p.add_argument("--prefill_chunk", type=int, metavar="N", help=chunk)
    p.add_argument("--max_waiting", type=int, default=64, help="texts that wait for a row; others get a 429")
    p.add_argument("--max_connections", type=int, default=256, help="others get a 503")
    p.add_argument("--max_body", type=int, default=4 << 20, metavar="BYTES", help="of a request")
    p.add_argument("--grace", type=int, default=30, metavar="SECONDS", help="for running texts after SIGTERM")
    return p


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Our flags and those of generate.py, of which some are for requests to say."""
    own, rest = build_parser().parse_known_args(argv)
    given, usual = (vars(generate.build_parser().parse_args(words)) for words in (rest, []))
    other = next((name for name in given if given[name] != usual[name] and name not in FLAGS), None)
    return argparse.Namespace(**(given | vars(own)), other=other)


def check_flags(args: argparse.Namespace) -> None:
    if args.other:
        raise BadInput(f"--{args.other}: a server has no such flag; each request says what it wants")
    for name in ("batch_size", "max_length", "max_tokens", "prefill_chunk", "max_connections", "max_body"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} is {getattr(args, name)}; it must be at least 1")
    generate.check_arguments(args)


def load(args: argparse.Namespace, ranks: Ranks) -> tuple[generate.Target, dict[str, Decoder]]:
    """The target, and a warm decoder for each method."""
    load_kernels()
    target, decoders, methods = generate.load_target(args, ranks), {}, args.method or [None]
    if target.tokenizer is None:
        raise BadInput(f"{args.checkpoint_path}: has no tokenizer, which a server needs")
    config, compile = target.model.config, generate.can_compile(args)
    window = min(config.max_context, config.sliding_window or config.max_context)
    length = min(args.max_length, cache_length(config, min(args.max_length, window)))
    sizes = (length, args.batch_size, compile)
    more = {"every_control": True, "logprobs": min(MOST_LOGPROBS, config.vocab_size)}
    for args.method in methods:
        method, drafter = generate.build_drafter(only_used(args, methods), target)
        for model in drafter.models:
            check_window(model.config, length)
        decoder = decoders[method] = Decoder(target.model, drafter, Sampling(1.0), *sizes, **more)
        for full in (True, False) if args.device.startswith("cuda") else (False,):
            decoder.expect([], full, None)  # a CPU records other steps when they are first asked for
            generate.warm_up(decoder, target.precision, ranks)
    return target, decoders


def only_used(args: argparse.Namespace, methods: list[str]) -> argparse.Namespace:
    """The flags, without those that are meant for another one of these methods."""
    mine = argparse.Namespace(**vars(args))
    for flag, users in generate.FLAGS_OF.items():
        if args.method not in users and set(users) & set(methods):
            setattr(mine, flag, 0.0 if flag == "draft_confidence" else None)
    return mine


# --------------------------------------------------------------------------------------------------
# HTTP
# --------------------------------------------------------------------------------------------------


class Front:
    """The routes. All of it runs in the thread of the event loop; only requests are read in others."""

    def __init__(self, args: argparse.Namespace, engine: Engine, reader: Reader):
        self.args, self.engine, self.reader, self.begun = args, engine, reader, int(time.time())
        self.texts: Counter[str] = Counter()  # that were taken in and have not ended, by method
        self.answered: Counter[int] = Counter()  # requests by status
        self.app = Starlette(
            routes=[
                Route("/", lambda request: FileResponse(PAGE)),
                Route("/health", lambda request: JSONResponse({"status": "ok"})),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", partial(self.answer, chat=True), methods=["POST"]),
                Route("/v1/completions", partial(self.answer, chat=False), methods=["POST"]),
            ],
            exception_handlers=dict.fromkeys((Refused, HTTPException, ClientDisconnect), self.refuse),
        )

    async def refuse(self, request: Request | None, error: Any) -> Response:
        """An error of ours; a path that there is not; or a client that has left, and will not read it."""
        if not isinstance(error, Refused):
            status = getattr(error, "status_code", 499)
            error = Refused(f"{request.url.path}: {getattr(error, 'detail', 'left')}", status=status)
        self.answered[error.status] += 1
        return JSONResponse(error.json, error.status, {"Retry-After": "1"} if error.status == 429 else None)

    def check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.args.api_key and not hmac.compare_digest(given.encode(), self.args.api_key.encode()):
            raise Refused("the API key is missing or wrong", code="invalid_api_key", status=401)

    async def metrics(self, request: Request) -> Response:
        self.check_key(request)
        lanes = self.engine.lanes
        rows = [text for lane in lanes.values() for text in lane.decoder.rows]
        running = sum(text is not None for text in rows)
        numbers = {f'requests_total{{status="{status}"}}': n for status, n in self.answered.items()}
        numbers |= {"rows": len(rows), "num_requests_running": running}
        numbers["num_requests_waiting"] = max(self.texts.total() - running, 0)
        stats = {method: lane.stats for method, lane in lanes.items()}
        return PlainTextResponse(metrics_text(stats, numbers, self.engine.times))

    async def models(self, request: Request) -> Response:
        self.check_key(request)
        reader = self.reader
        model = {"id": reader.name, "object": "model", "created": self.begun, "owned_by": "gpt-spec"}
        model |= {"max_model_len": reader.decoder.max_length, "methods": list(reader.decoders)}
        model["chat"] = reader.tokenizer.template is not None
        return JSONResponse({"object": "list", "data": [model]})

    async def answer(self, request: Request, chat: bool) -> Response | Answer:
        self.check_key(request)
        if not request.headers.get("content-type", "").startswith("application/json"):
            # A page of another site can have a browser send any other type without asking.
            raise Refused("the body must be JSON: send Content-Type: application/json")
        try:
            body = await asyncio.wait_for(self.body(request), SLOW)
            ask = await asyncio.to_thread(self.reader.read, body, chat)
        except asyncio.TimeoutError:
            raise Refused(f"the body has not come within {SLOW} seconds", status=408) from None
        except asyncio.CancelledError:  # --grace is over
            raise Refused("the server ends", status=503) from None
        texts, room = len(ask.choices), self.args.batch_size + self.args.max_waiting
        if texts > room:
            raise Refused(f"n: {texts} texts are asked for; this server takes {room} at a time", "n")
        if texts + self.texts[ask.method] > room:
            raise Refused("too many texts are waiting; try again later", code="queue_full", status=429)
        return Answer(self, ask)

    async def body(self, request: Request) -> bytes:
        """What a client sends. What is too long is read to its end, or else the client would not see why."""
        body = b""
        async for part in request.stream():
            body += part if len(body) <= self.args.max_body else b""
        if len(body) > self.args.max_body:
            raise Refused(f"the body is longer than {self.args.max_body} bytes", status=413)
        return body


class Answer:
    """The answer to a request, streamed or whole: what starlette calls to send it."""

    def __init__(self, front: Front, ask: Ask):
        self.front, self.ask, self.open = front, ask, len(ask.choices)  # texts that have not ended
        self.writer = Writer(front.reader.name, front.reader.tokenizer, ask)
        self.queue: asyncio.Queue[list[News]] = asyncio.Queue()
        self.loop, self.begun = asyncio.get_running_loop(), False  # has the client been told anything?
        ask.tell = self.tell
        front.texts[ask.method] += self.open
        front.engine.submit(ask)

    def tell(self, news: list[News]) -> None:
        """The engine calls this, in its thread."""
        with suppress(RuntimeError):  # the loop is closed: the server ends
            self.loop.call_soon_threadsafe(self.take, news)

    def take(self, news: list[News]) -> None:
        """Now, and not when a slow client has read it: texts that have ended leave the queue to others."""
        self.end(sum(each.finish_reason is not None for each in news))
        self.queue.put_nowait(news)

    def end(self, texts: int) -> None:
        texts = min(texts, self.open)  # news of texts that were dropped may still come
        self.open -= texts
        self.front.texts[self.ask.method] -= texts

    def more(self) -> bool:
        """Are there news to come?"""
        return self.open > 0 or not self.queue.empty()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it, unless the client goes away: then its rows are free."""
        work = asyncio.create_task((self.stream if self.ask.stream else self.whole)(scope, receive, send))
        left = asyncio.create_task(self.client_leaves(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except asyncio.CancelledError:  # --grace is over
            if not self.begun:
                failed = await self.front.refuse(None, Refused("the server ends", status=503))
                await failed(scope, receive, send)
        finally:
            work.cancel()
            left.cancel()
            if self.open:
                self.end(self.open)
                self.front.engine.drop(self.ask)

    async def client_leaves(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def whole(self, *connection: Any) -> None:
        news = []
        while self.more():
            news += await self.queue.get()
        await (await self.failure(news) or JSONResponse(self.writer.whole(news)))(*connection)

    async def failure(self, news: list[News]) -> Response | None:
        """The answer where one of the texts ended with an error."""
        failed = next((each for each in news if each.error), None)
        self.front.answered[200] += failed is None
        return failed and await self.front.refuse(None, Refused(failed.error, status=failed.status))

    async def stream(self, scope: Any, receive: Any, send: Any) -> None:
        """Server-sent events. The status waits for the first news, so an early error has one of its own."""
        news = await self.queue.get()
        self.begun = True
        if failed := await self.failure(news):
            await failed(scope, receive, send)
            return
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx would hold the events back
        response = StreamingResponse(self.events(news), headers=headers, media_type="text/event-stream")
        await response.stream_response(send)

    async def events(self, news: list[News]) -> AsyncIterator[str]:
        """What each piece of news is to the client, until all texts have ended."""
        while news:
            events = [json.dumps(event) for each in news for event in self.writer.events(each)]
            if not self.more():
                events += [json.dumps(event) for event in self.writer.last()] + ["[DONE]"]
            yield "".join(f"data: {event}\n\n" for event in events)
            news = await self.queue.get() if self.more() else []


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def run(argv: list[str] | None) -> int:
    """Serve until a signal says that it is enough -> the exit status."""
    args = read_flags(argv)
    with generate.processes(args) as ranks:
        check_flags(args)
        listener = listen(args) if ranks.rank == 0 else None  # before models are loaded
        target, decoders = load(args, ranks)
        name = args.served_name or Path(args.checkpoint_path or generate.SHIPPED_TARGET).resolve().name
        reader = Reader(name, target, decoders, args.max_tokens)
        chunk = args.prefill_chunk or (512 if args.device.startswith("cuda") else None)
        engine = Engine(decoders, chunk, ranks, reader.read)
        if listener:
            return serve(args, engine, reader, listener)
        for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 says when it is enough
            signal.signal(number, signal.SIG_IGN)
        engine.run()
        return 0


def listen(args: argparse.Namespace) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        return socket.create_server((args.host, args.port), family=family)
    except (OSError, OverflowError) as error:
        raise BadInput(f"--port: cannot listen at {args.host}, port {args.port} ({error})") from None


def serve(args: argparse.Namespace, engine: Engine, reader: Reader, listener: socket.socket) -> int:
    limits = {"limit_concurrency": args.max_connections + 1, "timeout_graceful_shutdown": args.grace}
    quiet = {"log_level": "warning", "lifespan": "off", "ws": "none", "server_header": False}
    server = uvicorn.Server(uvicorn.Config(Front(args, engine, reader).app, **limits, **quiet))

    def answer() -> None:
        try:
            server.run([listener])
        finally:
            engine.stop()

    def stop(number: int, _: Any) -> None:
        server.should_exit, server.force_exit = True, server.should_exit  # at once if asked twice
        signals.add(number)

    signals: set[int] = set()
    signal.signal(signal.SIGTERM, stop)
    process.heed_ctrl_c(stop)
    sys.setswitchinterval(2e-4)  # seconds: the engine gets Python's lock back from the other thread sooner
    threading.Thread(target=answer, daemon=True).start()
    host, port = listener.getsockname()[:2]
    print(f"{reader.name}: http://{host}:{port}", file=sys.stderr, flush=True)
    engine.run()
    return process.INTERRUPTED if signal.SIGINT in signals else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line -> exit status."""
    return process.exit_status(lambda: run(argv), BadInput)


if __name__ == "__main__":
    sys.exit(process.run(main))
