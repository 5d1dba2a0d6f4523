"""serve.py: an OpenAI-compatible server, with a page at / that shows how drafts are accepted.

    python serve.py --port 8000 --batch_size 8                       # the shipped models
    python serve.py --checkpoint_path DIR --method auto --method lookup --precision w4a8

It takes the flags of generate.py that choose models, methods and precisions. docs/serving.md says what
requests may hold. What they mean is in `api.py`; `engine.py` decodes their texts, in the main thread.

The one idea: a request with a seed has the text that generate.py prints for it, whatever else runs. So a
server is a way to ask, and nothing that it does may show in a text.
"""

from __future__ import annotations

import process

if __name__ == "__main__":
    process.begin()

import argparse
import asyncio
import hmac
import json
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import generate
from api import MOST_LOGPROBS, Ask, Reader, Refused, Writer, parse
from cli import OneLineParser, load_kernels
from engine import Engine, Job, News
from gpt_spec import Decoder
from model import BadInput, cache_length, check_window
from sampling import Sampling
from show import metrics_text

NEEDS, PAGE = (Path(__file__).with_name(name) for name in ("requirements-serve.txt", "serve.html"))
FLAGS = {  # of generate.py: those that choose models, methods and precisions, and how they run
    *("checkpoint_path", "precision", "lm_head_bits", "draft_checkpoint_path", "eagle_checkpoint_path"),
    *("draft_precision", "speculate_k", "draft_confidence", "tree_size", "tree_depth", "tree_topk"),
    *("draft_vocab_size", "draft_vocab_text", "min_draft_length", "compile", "device"),
}
PING = 10  # seconds after which a stream with nothing to tell says that it is alive
SLOW = 30  # seconds in which the body of a request must have come


def build_parser() -> OneLineParser:
    more = "Flags of generate.py that choose models, methods and precisions work here, too: "
    epilog = more + ", ".join(f"--{name}" for name in sorted(FLAGS))
    p = OneLineParser(prog="serve.py", description="Serve OpenAI's API.", epilog=epilog, allow_abbrev=False)
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, help="0: any that is free")
    p.add_argument("--api_key", help="what clients must send as a bearer token (default: nothing)")
    p.add_argument("--served_name", metavar="NAME", help="of the model (default: that of its directory)")
    methods = "as in generate.py; may be repeated: requests use the first, and the page can choose the others"
    p.add_argument("--method", action="append", choices=generate.METHODS, help=methods)
    p.add_argument("--batch_size", type=int, default=8, help="texts that each method decodes at a time")
    length = "tokens of a text with its prompt (default: the model's context, at most 8192)"
    p.add_argument("--max_length", type=int, default=generate.CHAT_CONTEXT, help=length)
    p.add_argument("--max_tokens", type=int, help="of an answer, at most (default: what there is room for)")
    chunk = "tokens of a prompt to read between two steps of other texts (default: 64, on a GPU 512)"
    p.add_argument("--prefill_chunk", type=int, metavar="N", help=chunk)
    p.add_argument("--max_waiting", type=int, default=64, help="texts that wait for a row; others get a 429")
    p.add_argument("--max_connections", type=int, default=256, help="others get a 503")
    p.add_argument("--max_body", type=int, default=4 << 20, metavar="BYTES", help="of a request")
    p.add_argument("--grace", type=int, default=30, metavar="SECONDS", help="for running texts after SIGTERM")
    return p


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Our flags and those of generate.py, of which those are refused that a request says for itself."""
    own, rest = build_parser().parse_known_args(argv)
    theirs = generate.build_parser()
    given, usual = (vars(theirs.parse_args(words)) for words in (rest, []))
    other = next((name for name in given if given[name] != usual[name] and name not in FLAGS), None)
    if other:
        raise BadInput(f"--{other}: a server has no such flag; what a text should be is said by its request")
    for name in ("batch_size", "max_length", "max_tokens", "prefill_chunk", "max_connections", "max_body"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise BadInput(f"--{name} is {getattr(own, name)}; it must be at least 1")
    return argparse.Namespace(**(given | vars(own)))


def load(args: argparse.Namespace) -> tuple[str, generate.Target, dict[str, Decoder]]:
    """The name of the target, the target, and a warm decoder for each method."""
    methods, args.method = args.method or [None], None
    generate.check_arguments(args)
    load_kernels()
    target, decoders = generate.load_target(args), {}
    if target.tokenizer is None:
        raise BadInput(f"{args.checkpoint_path}: has no tokenizer, which a server needs")
    config = target.model.config
    length = cache_length(config, min(args.max_length, config.max_context, config.sliding_window or 2**62))
    compile = generate.can_compile(args)
    for args.method in methods:
        method, drafter = generate.build_drafter(only_used(args, methods), target)
        for model in drafter.models:
            check_window(model.config, length)
        sizes = (min(length, args.max_length), args.batch_size, compile)
        most = min(MOST_LOGPROBS, config.vocab_size)
        decoder = Decoder(target.model, drafter, Sampling(1.0), *sizes, every_control=True, logprobs=most)
        for full in (True, False) if args.device.startswith("cuda") else (False,):
            decoder.expect([], full, None)  # a CPU records other steps when they are first asked for
            generate.warm_up(decoder, target.precision)
        decoders[method] = decoder
    path = Path(args.checkpoint_path or generate.SHIPPED_TARGET)
    return args.served_name or path.resolve().name or str(path), target, decoders


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
        self.args, self.engine, self.reader = args, engine, reader
        self.texts = 0  # that were taken in and have not ended
        self.answered: dict[int, int] = {}  # requests by status
        self.created = int(time.time())

    def app(self) -> Any:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.routing import Route

        async def wrong_path(request: Any, error: HTTPException) -> Any:
            return self.refuse(Refused(f"{request.url.path}: {error.detail}", status=error.status_code))

        async def refused(request: Any, error: Refused) -> Any:
            return self.refuse(error)

        async def left(request: Any, error: ClientDisconnect) -> Any:
            return self.refuse(Refused("the client has left", status=499))  # nobody reads it

        handlers = {HTTPException: wrong_path, Refused: refused, ClientDisconnect: left}
        paths = {"/": self.page, "/health": self.health, "/metrics": self.metrics, "/v1/models": self.models}
        routes = [Route(path, endpoint) for path, endpoint in paths.items()]
        routes.append(Route("/v1/chat/completions", self.chat, methods=["POST"]))
        routes.append(Route("/v1/completions", self.completions, methods=["POST"]))
        return Starlette(routes=routes, exception_handlers=handlers)

    def refuse(self, error: Refused) -> Any:
        return self.json(error.json, error.status, {"Retry-After": "1"} if error.status == 429 else {})

    def json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
        from starlette.responses import JSONResponse

        self.answered[status] = self.answered.get(status, 0) + 1
        return JSONResponse(content, status, headers)

    def check_key(self, request: Any) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.args.api_key and not hmac.compare_digest(given.encode(), self.args.api_key.encode()):
            raise Refused("the API key is missing or wrong", code="invalid_api_key", status=401)

    async def page(self, request: Any) -> Any:
        from starlette.responses import HTMLResponse

        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def health(self, request: Any) -> Any:
        return self.json({"status": "ok"})

    async def metrics(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse

        self.check_key(request)
        return PlainTextResponse(metrics_text(self.engine, self.texts, self.answered))

    async def models(self, request: Any) -> Any:
        self.check_key(request)
        reader = self.reader
        model = {"id": reader.name, "object": "model", "created": self.created, "owned_by": "gpt-spec"}
        model |= {"max_model_len": reader.decoder.max_length, "methods": list(reader.decoders)}
        model |= {"chat": reader.target.tokenizer.template is not None}
        return self.json({"object": "list", "data": [model]})

    async def chat(self, request: Any) -> Any:
        return await self.answer(request, chat=True)

    async def completions(self, request: Any) -> Any:
        return await self.answer(request, chat=False)

    async def answer(self, request: Any, chat: bool) -> Any:
        self.check_key(request)
        # A page of another site can send any other type without asking.
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise Refused("the body must be JSON: send Content-Type: application/json")
        try:
            body = await asyncio.wait_for(self.body(request), SLOW)
        except asyncio.TimeoutError:
            raise Refused(f"the body has not come within {SLOW} seconds", status=408) from None
        ask = await asyncio.to_thread(lambda: self.reader.read(parse(body), chat))
        room = self.args.max_waiting + sum(len(lane.decoder.rows) for lane in self.engine.lanes.values())
        if self.texts + len(ask.choices) > room:
            raise Refused("too many texts are waiting; try again later", code="queue_full", status=429)
        return Answer(self, ask)

    async def body(self, request: Any) -> bytes:
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
        self.front, self.ask, self.news = front, ask, []
        self.writer = Writer(front.reader.name, front.reader.target.tokenizer, ask)
        self.open, self.changed, self.left = len(ask.choices), asyncio.Event(), False
        self.loop = asyncio.get_running_loop()
        self.job = Job(ask.method, ask.choices, ask.top is not None, self.tell)
        front.texts += self.open
        front.engine.submit(self.job)

    def tell(self, news: list[News]) -> None:
        """Called by the engine, in its thread."""
        with suppress(RuntimeError):  # the loop is closed: the server ends
            self.loop.call_soon_threadsafe(self.take, news)

    def take(self, news: list[News]) -> None:
        self.news += news
        self.changed.set()

    async def next_news(self) -> list[News]:
        """What is new, or [] after a while; ConnectionError where the client has left."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.changed.wait(), PING)
        self.changed.clear()
        if self.left:
            raise ConnectionError
        news, self.news = self.news, []
        ended = sum(each.finish_reason is not None for each in news)
        self.open, self.front.texts = self.open - ended, self.front.texts - ended
        return news

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        watch = asyncio.create_task(self.watch(receive))
        try:
            with suppress(ConnectionError):
                await (self.stream if self.ask.stream else self.whole)(scope, receive, send)
        finally:
            watch.cancel()
            self.front.texts -= self.open
            if self.open:
                self.front.engine.drop(self.job)

    async def watch(self, receive: Any) -> None:
        """A client that goes away frees its rows."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self.changed.set()

    async def whole(self, scope: Any, receive: Any, send: Any) -> None:
        answer = None
        while self.open and answer is None:
            for news in await self.next_news():
                self.writer.said[news.choice] += news.said
                answer = self.front.refuse(Refused(news.error, status=news.status)) if news.error else answer
        await (answer or self.front.json(self.writer.whole()))(scope, receive, send)

    async def stream(self, scope: Any, receive: Any, send: Any) -> None:
        """Server-sent events. The status waits for the first news, so an early error has one of its own."""
        news = await self.next_news()
        if news and news[0].error and not self.open:
            await self.front.refuse(Refused(news[0].error, status=news[0].status))(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would hold the events back
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.front.answered[200] = self.front.answered.get(200, 0) + 1
        while True:
            events = [event for each in news for event in self.events(each)]
            if not self.open:
                events += [self.writer.last()] if self.ask.include_usage else []
                events.append("[DONE]")
            lines = [f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n" for e in events] or [
                ": ping\n\n"
            ]
            body = {"type": "http.response.body", "body": "".join(lines).encode(), "more_body": self.open > 0}
            await send(body)
            if not self.open:
                return
            news = await self.next_news()

    def events(self, news: News) -> list[dict[str, Any]]:
        return [Refused(news.error, status=news.status).json] if news.error else self.writer.events(news)


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def run(argv: list[str] | None) -> int:
    """Serve until a signal says that it is enough -> the exit status."""
    args = read_flags(argv)
    process.check_packages(NEEDS, BadInput)
    import uvicorn

    with open_socket(args) as listener:
        name, target, decoders = load(args)
        engine = Engine(decoders, args.prefill_chunk or (512 if args.device.startswith("cuda") else 64))
        front = Front(args, engine, Reader(name, target, decoders, args.max_tokens))
        limits = {"limit_concurrency": args.max_connections, "timeout_graceful_shutdown": args.grace}
        quiet = {
            "log_level": "warning",
            "access_log": False,
            "lifespan": "off",
            "ws": "none",
            "server_header": False,
        }
        server = uvicorn.Server(uvicorn.Config(front.app(), **limits, **quiet))

        def serve() -> None:
            server.run([listener])
            engine.stop()

        def stop(number: int, _: Any) -> None:
            server.should_exit, server.force_exit = True, server.should_exit  # twice: at once

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        host, port = listener.getsockname()[:2]
        print(f"{name}: http://{host}:{port}", file=sys.stderr, flush=True)
        engine.run()
        thread.join()
    return 0


def open_socket(args: argparse.Namespace) -> socket.socket:
    """The socket to listen at, before models are loaded."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except (OSError, OverflowError) as error:
        raise BadInput(f"--port: cannot listen at {args.host}, port {args.port} ({error})") from None
    return listener


def main(argv: list[str] | None = None) -> int:
    """Run the command line -> exit status."""
    return process.exit_status(lambda: run(argv), BadInput)


if __name__ == "__main__":
    sys.exit(process.run(main))
