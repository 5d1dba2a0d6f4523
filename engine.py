"""engine.py: the texts of many clients in one decoder, or in one for each method.

    engine = Engine({"tree": decoder}, chunk=64)
    engine.run()                                  # in the thread that owns the decoders, until `stop`
    engine.submit(job); engine.drop(job)          # in any other thread; `job.tell` is told the news

Texts join and leave between steps (`Decoder.advance`): a request waits for a free row and for nothing else.
This file knows texts and their streams. It does not know HTTP, JSON, or how a method works.

The one idea: one thread owns the decoders. All others send it messages, which it reads between two steps, and
what it sends back never changes afterwards. So there is nothing to lock, and no client can stop the others.
"""

from __future__ import annotations

import queue
import sys
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from costs import Stats, Stopwatch
from drafts import Emission, Text
from gpt_spec import Decoder
from model import BadInput
from sampling import Logprob
from show import Output

HISTOGRAMS = {  # seconds: the upper bounds
    "time_to_first_token_seconds": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    "inter_token_latency_seconds": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
}


class Said(NamedTuple):
    """A token that a client is told of together with all of its text."""

    begin: int  # where its text begins, in characters
    logprob: Logprob


class News(NamedTuple):
    """What a text has gained."""

    choice: int  # which text of its request
    spans: list[tuple[str, bool]]  # pieces of text, each of one token, and whether the drafter proposed it
    said: list[Said]  # where log-probabilities were asked for
    accepted: int | None  # of the step; None with the first token, which comes from prefill
    nodes: int = 0  # that were verified
    drafter: str = ""  # its name, where there is a choice
    finish_reason: str | None = None
    error: str | None = None  # why nothing more comes
    status: int = 200  # of such an answer


@dataclass
class Choice:
    """One text of a request."""

    index: int
    text: Text
    output: Output
    said: int = 0  # tokens whose log-probabilities were told


@dataclass
class Job:
    """A request: its texts, and whom to tell what they gain. `tell` must return at once."""

    method: str
    choices: list[Choice]
    logprobs: bool
    tell: Callable[[list[News]], None]
    watch: Stopwatch = field(default_factory=Stopwatch)  # runs since it came, or since the last news
    begun: bool = False


@dataclass
class Histogram:
    """How many values were at most each bound, and their sum, as Prometheus wants it."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: int = 0
    sum: float = 0.0

    def add(self, value: float) -> None:
        self.counts = self.counts or [0] * len(self.bounds)
        self.counts = [c + (value <= bound) for c, bound in zip(self.counts, self.bounds)]
        self.total, self.sum = self.total + 1, self.sum + value

    def lines(self, name: str) -> list[str]:
        pairs = zip((*self.bounds, "+Inf"), (*(self.counts or [0] * len(self.bounds)), self.total))
        lines = [f'{name}_bucket{{le="{bound}"}} {value}' for bound, value in pairs]
        return [*lines, f"{name}_sum {self.sum}", f"{name}_count {self.total}"]


class Lane:
    """A decoder with the texts that wait for its rows and those that are in them."""

    def __init__(self, decoder: Decoder, chunk: int):
        self.decoder, self.chunk, self.stats = decoder, chunk, Stats()
        self.waiting: deque[Text] = deque()
        self.owners: dict[int, tuple[Job, Choice]] = {}  # of all these texts, by their prompt_index
        self.numbers = count()
        decoder.count_into(self.stats)

    def add(self, job: Job) -> None:
        for choice in job.choices:
            choice.text.prompt_index = next(self.numbers)
            self.owners[choice.text.prompt_index] = (job, choice)
            self.waiting.append(choice.text)
        self.expect()

    def remove(self, texts: list[Text]) -> None:
        """These are told nothing any more, wherever they are."""
        gone = {text.prompt_index for text in texts}
        for number in gone:
            self.owners.pop(number, None)
        for row, text in enumerate(self.decoder.rows):
            if text is not None and text.prompt_index in gone:
                self.decoder.leave(row)
        self.waiting = deque(text for text in self.waiting if text.prompt_index not in gone)
        self.expect()

    def expect(self) -> None:
        """Have steps do what these texts ask for, and no more."""
        samplings = [choice.text.request.sampling for _, choice in self.owners.values()]
        full = any(sampling.changes_logits for sampling in samplings)
        wanted = any(job.logprobs for job, _ in self.owners.values())
        self.decoder.expect(samplings, full, self.decoder.setup.logprobs if wanted else None)

    def ends(self, number: int, token: int) -> bool:
        """Does a text end with this token?"""
        choice = self.owners[number][1]
        return token in choice.text.request.stops or choice.output.stream.add(token)

    def advance(self, news: list[tuple[Job, News]]) -> None:
        """Every text goes on by a step, or by a chunk of its prompt. What is new is added to `news`."""
        for emissions in self.decoder.advance(self.waiting, self.ends, True, self.chunk):
            news += [(self.owners[e.prompt_index][0], self.tell(e)) for e in emissions]
            ended = [e.prompt_index for e in emissions if e.finish_reason]
            for number in ended:
                del self.owners[number]
            if ended:
                self.expect()

    def tell(self, emission: Emission) -> News:
        """What a client sees of an emission. What may become a stop string, or half a character, waits."""
        job, choice = self.owners[emission.prompt_index]
        output = choice.output
        output.add(emission)
        spans = [(text, output.drafted[token]) for token, text in output.stream.new_spans()]
        said = self.new_logprobs(choice) if job.logprobs else []
        draft, accepted = emission.draft, emission.accepted
        step = (None,) if draft is None else (accepted, draft.tokens.shape[1], draft.drafter)
        news = News(choice.index, spans, said, *step)
        return news._replace(finish_reason=emission.finish_reason)

    def new_logprobs(self, choice: Choice) -> list[Said]:
        """Of the tokens whose text is told by now. A stop token has no text, nor have the tokens of a stop
        string."""
        output, stream = choice.output, choice.output.stream
        begins, end = [0, *stream.ends], stream.shown_tokens
        if output.finish_reason:
            cut = output.finish_reason == "stop" and len(stream.ends) == len(output.token_ids)
            whole = [i for i in range(len(stream.ends)) if not cut or begins[i] < len(stream.text)]
            end = len(whole)
        new = range(choice.said, end)
        choice.said = max(choice.said, end)
        return [Said(begins[i], output.logprobs[i]) for i in new]

    def fail(self, error: Exception, news: list[tuple[Job, News]]) -> None:
        """A step failed: the texts to blame end, those whose grammars cannot go on, or else all that are in
        rows. An interrupted step has not happened, so the others go on."""
        self.decoder.ahead, texts = None, [text for text in self.decoder.rows if text is not None]
        broken = [
            text for row, text in enumerate(self.decoder.rows) if text is not None and self.is_stuck(row)
        ]
        texts = broken if broken and isinstance(error, BadInput) else texts
        what = {"finish_reason": "error", "error": str(error), "status": 400 if texts is broken else 500}
        for job, choice in (self.owners[text.prompt_index] for text in texts):
            news.append((job, News(choice.index, [], [], None, **what)))
        self.remove(texts)

    def is_stuck(self, row: int) -> bool:
        """Is a row's grammar at a dead end, or has its text gained what nobody was told of?"""
        text, matcher = self.decoder.rows[row], self.decoder.controls.matchers[row]
        told = len(text.prompt) + len(self.owners[text.prompt_index][1].output.token_ids) - 1
        return (matcher is not None and matcher.place.is_error()) or (text.is_read and text.length != told)


class Engine:
    """Lanes by the names of their methods, and the thread that runs them."""

    def __init__(self, decoders: dict[str, Decoder], chunk: int):
        self.lanes = {method: Lane(decoder, chunk) for method, decoder in decoders.items()}
        self.messages: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self.running = True
        self.histograms = {name: Histogram(bounds) for name, bounds in HISTOGRAMS.items()}

    def submit(self, job: Job) -> None:
        """Decode a request. Its texts must fit the decoder."""
        self.messages.put(("add", job))

    def drop(self, job: Job) -> None:
        """Nobody waits for a request any more. Nothing happens if it has ended."""
        self.messages.put(("drop", job))

    def stop(self) -> None:
        """End `run`. A signal handler may call this."""
        self.messages.put(("stop", None))

    def run(self) -> None:
        while self.running:
            busy = [lane for lane in self.lanes.values() if lane.owners]
            self.read_messages(wait=not busy)
            for lane in busy:
                self.advance(lane)

    def read_messages(self, wait: bool) -> None:
        while wait or not self.messages.empty():
            what, job = self.messages.get()
            wait = False
            if what == "stop":
                self.running = False
            elif what == "add":
                self.lanes[job.method].add(job)
            else:
                self.lanes[job.method].remove([choice.text for choice in job.choices])

    def advance(self, lane: Lane) -> None:
        news: list[tuple[Job, News]] = []
        try:
            lane.advance(news)
        except Exception as error:
            if not isinstance(error, BadInput):
                traceback.print_exc(file=sys.stderr)
            lane.fail(error, news)
        by_job: dict[int, tuple[Job, list[News]]] = {}
        for job, each in news:
            by_job.setdefault(id(job), (job, []))[1].append(each)
        for job, all_of_it in by_job.values():
            first, later = self.histograms.values()
            (later if job.begun else first).add(job.watch.lap())
            job.begun = True
            job.tell(all_of_it)
