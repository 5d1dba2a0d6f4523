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
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple
from weakref import WeakValueDictionary

from costs import Histogram, Stats, Stopwatch
from drafts import PREFILL_CHUNK, Emission, Text
from gpt_spec import Decoder
from model import BadInput
from parallel import Ranks
from show import Output, Said

BEAT = 5.0  # seconds after which an idle rank 0 looks whether the other processes are there


class News(NamedTuple):
    """What a text has gained, or why it gains nothing more."""

    choice: int  # which text of its request
    spans: list[tuple[str, bool]] = []  # pieces of text, a token each, and whether the drafter proposed it
    said: list[Said] = []  # where log-probabilities were asked for
    finish_reason: str | None = None
    new: int = 0  # tokens
    accepted: int | None = None  # of the step; None with the first token, which comes from prefill
    nodes: int = 0  # that were verified
    drafter: str = ""  # its name, where there is a choice
    error: str | None = None
    status: int = 200  # of HTTP: whose fault an error is


@dataclass
class Choice:
    """One text of a request."""

    index: int
    text: Text
    output: Output


@dataclass(eq=False)
class Job:
    """A request: its texts, and whom to tell what they gain. `tell` must return at once."""

    method: str
    choices: list[Choice]
    logprobs: bool
    tell: Callable[[list[News]], None] = field(init=False)
    watch: Stopwatch = field(init=False, default_factory=Stopwatch)  # since it came, or since the last news
    begun: bool = field(init=False, default=False)
    number: int = field(init=False, default=-1)  # among those of all clients
    sent: tuple = field(init=False, default=())  # what other processes make it of: see `Engine`


AllNews = dict[Job, list[News]]  # of a step, by whom they are for


class Lane:
    """A decoder, with the texts that wait for its rows and those that are in them."""

    def __init__(self, decoder: Decoder, chunk: int | None):
        """`chunk`: tokens of a prompt to read between two steps; None for about as many as a step has nodes,
        so that a chunk takes no longer than a step."""
        rows, sizes = decoder.setup.batch_size, sorted(decoder.drafter.draft_sizes())
        usual = max(8, rows * sizes[len(sizes) // 2]) if rows > 1 else PREFILL_CHUNK
        self.decoder, self.chunk, self.stats = decoder, chunk or usual, Stats()
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
        self.owners = {number: owner for number, owner in self.owners.items() if number not in gone}
        self.waiting = deque(text for text in self.waiting if text.prompt_index not in gone)
        for row, text in enumerate(self.decoder.rows):
            if text is not None and text.prompt_index in gone:
                self.decoder.leave(row)
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

    def advance(self, news: AllNews) -> None:
        """Every text goes on by a step, or by a chunk of its prompt. What is new is added to `news`."""
        for emissions in self.decoder.advance(self.waiting, self.ends, True, self.chunk):
            for emission in emissions:
                news[self.owners[emission.prompt_index][0]].append(self.told(emission))
                if emission.finish_reason:
                    del self.owners[emission.prompt_index]
                    self.expect()

    def told(self, emission: Emission) -> News:
        """What a client sees of an emission. What may become a stop string, or half a character, waits."""
        job, choice = self.owners[emission.prompt_index]
        output, draft = choice.output, emission.draft
        output.add(emission)
        spans = [(text, output.drafted[token]) for token, text in output.stream.new_spans()]
        said = output.new_logprobs() if job.logprobs else []
        step = () if draft is None else (emission.accepted, draft.tokens.shape[1], draft.drafter)
        return News(choice.index, spans, said, emission.finish_reason, len(emission.tokens), *step)

    def fail(self, error: Exception, news: AllNews) -> None:
        """A step failed: the texts to blame end, those whose grammars cannot go on, or else all that are in
        rows; and those that have left their rows and told nobody. An interrupted step has not happened, so
        the others go on."""
        texts, self.decoder.ahead = [text for text in self.decoder.rows if text is not None], None
        there = {text.prompt_index for text in (*texts, *self.waiting)}
        lost = [choice.text for number, (_, choice) in self.owners.items() if number not in there]
        stuck = [text for row, text in enumerate(self.decoder.rows) if text and self.is_stuck(row, text)]
        theirs = isinstance(error, BadInput) and stuck != []  # what they asked for is to blame
        how = {"finish_reason": "error", "error": str(error), "status": 400 if theirs else 500}
        blamed = lost + (stuck if theirs else texts)
        for job, choice in (self.owners[text.prompt_index] for text in blamed):
            news[job].append(News(choice.index, **how))
        self.remove(blamed)

    def is_stuck(self, row: int, text: Text) -> bool:
        """Is its grammar at a dead end, or has the text gained what nobody was told of?"""
        matcher, output = self.decoder.controls.matchers[row], self.owners[text.prompt_index][1].output
        untold = text.is_read and text.length != len(text.prompt) + len(output.token_ids) - 1
        return untold or (matcher is not None and matcher.place.is_error())


class Engine:
    """Lanes by the names of their methods, and the thread that runs them."""

    def __init__(
        self,
        decoders: dict[str, Decoder],
        chunk: int | None = None,
        ranks: Ranks = Ranks(),
        read: Callable[..., Job] | None = None,
    ):
        """`ranks`: the processes that share the target. Rank 0 has the clients, and the others do the same
        with what `read` makes of the `Job.sent` of every request."""
        self.lanes = {method: Lane(decoder, chunk) for method, decoder in decoders.items()}
        self.messages: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self.ranks, self.read, self.numbers = ranks, read, count()
        self.jobs: WeakValueDictionary[int, Job] = WeakValueDictionary()  # by number
        self.running, names = True, ("time_to_first_token_seconds", "inter_token_latency_seconds")
        self.times = {name: Histogram() for name in names}

    def submit(self, job: Job) -> None:
        """Decode a request. Its texts must fit the decoder."""
        job.number = next(self.numbers)
        self.messages.put(("add", job))

    def drop(self, job: Job) -> None:
        """Nobody waits for a request any more. Nothing happens if it has ended."""
        self.messages.put(("drop", job))

    def stop(self) -> None:
        """End `run`."""
        self.messages.put(("stop", None))

    def run(self) -> None:
        while self.running:
            busy = [lane for lane in self.lanes.values() if lane.owners]
            self.read_messages(wait=not busy)
            for lane in busy:
                self.advance(lane)

    def read_messages(self, wait: bool) -> None:
        """Do what was sent to rank 0, in all processes."""
        mine: list[tuple[str, Job | None]] = []
        with suppress(queue.Empty):
            while self.ranks.rank == 0:
                mine.append(self.messages.get(wait and not mine, BEAT))
        self.jobs |= {job.number: job for _, job in mine if job}
        for what, number, sent in self.ranks.tell([(w, j and j.number, j and j.sent) for w, j in mine]):
            if what == "stop":
                self.running = False
                continue
            job = self.jobs.get(number) or self.repeat(number, sent)
            lane = self.lanes[job.method]
            lane.add(job) if what == "add" else lane.remove([choice.text for choice in job.choices])

    def repeat(self, number: int, sent: tuple) -> Job:
        """A request of a client of rank 0, in another process. A dropped one may have ended here."""
        job = self.jobs[number] = self.read(*sent)
        job.tell = lambda news: None
        return job

    def advance(self, lane: Lane) -> None:
        """A step of a lane. Its news are told, a message for each request."""
        news: AllNews = defaultdict(list)
        try:
            lane.advance(news)
        except Exception as error:
            if self.ranks.group and not isinstance(error, BadInput):
                raise  # the processes would go on with different texts
            if not isinstance(error, BadInput):
                traceback.print_exc(file=sys.stderr)
            lane.fail(error, news)
        first, later = self.times.values()
        for job, told in news.items():
            (later if job.begun else first).add(job.watch.lap())
            job.begun = True
            job.tell(told)
