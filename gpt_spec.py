"""gpt_spec.py: the loop of speculative decoding, and the drafters that need no head.

Read `model.py` (the transformer and its cache), `sampling.py` (how tokens are picked) and `drafts.py` (what a
drafter is) first, and `eagle.py` (EAGLE heads and their trees) after it. The loop is `speculate`: it runs for
every method. To run something, start with `python generate.py`: this file knows tensors. It has no tokenizer
of its own, no files and no command line.

The one idea: a method of speculative decoding is a *drafter* inside one loop. The drafter proposes tokens,
one forward of the target picks its own token after every one of them, and the longest path on which both
agree is kept. What the target picks never depends on what was proposed, so a drafter can change the speed and
nothing else. And a decoder, a model with its drafter, may be the drafter of a larger model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from costs import Acceptance, Clock, Stats, Stopwatch, assumed_seconds
from drafts import (
    MAX_DRAFT_DEPTH,
    Draft,
    Drafter,
    Emission,
    Request,
    State,
    Text,
    Verified,
    accept,
    check_vocabulary,
    cut,
    extend,
    prefill,
    tree_geometry,
)
from eagle import TreeDrafter  # noqa: F401  all drafters can be imported from here
from model import BadInput, KVCache, Transformer, cache_length, check_dynamic, check_prompt, check_window
from prompts import Prompts, check_kind, number, plain, token_lists, whole_number, whole_numbers
from runtime import Fetch, Runtime, no_grad, warm_up
from sampling import Controls, Logprob, Nodes, Sampling, check_seed, logprobs, read_logprobs

# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------


def speculate(level: Level, draft: Draft | None = None) -> tuple[Draft, Tensor]:
    """One step of the loop, for all texts of the batch. This is speculative decoding, for every method, and
    `Decoder.run` repeats it.

    Returns the draft, and the report that the host reads, int64 [B, 2 + max_depth + 1]: the number of tokens
    accepted, the number drafted, then the new tokens (and perhaps their log-probabilities). `draft`: verify
    this one instead of proposing.
    """
    state, cache = level.state, level.cache
    if draft is None:
        # 1. Propose. Node 0 is the root, the last committed token; node i continues the text at its parent.
        draft = level.drafter.propose(state)  # tokens, parent: int64 [B, n]
        level.stats.drafting_seconds += level.watch.lap()
    max_depth = draft.max_depth

    def verify(level: Level, tokens: Tensor, parent: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        state, cache, model = level.state, level.cache, level.model
        # 2. One forward of the target over all nodes. Each has a slot of its own, and sees its ancestors.
        length, node = state.length, torch.arange(tokens.shape[1], device=tokens.device)
        ancestors, depth = tree_geometry(parent, max_depth)  # [B, n, n], [B, n]
        slots, positions = length[:, None] + node, length[:, None] + depth  # [B, n] each
        attend = partial(cache.attend, slots, ancestors, length)
        features, tapped = model(tokens, positions, attend, level.taps)  # [B, n, hidden]
        # 3. Pick the target's own token after every node. It does not depend on what was proposed.
        logits, nodes = model.lm_head(features), Nodes(tokens, parent, ancestors, depth)
        picks = level.pick(logits, positions + 1, nodes, mask)  # [B, n]
        # 4. Accept: from the root, follow the child that carries the pick, until no child does.
        # path: int64 [B, max_depth + 1], accepted: int64 [B]
        path, accepted = accept(tokens, parent, picks, ancestors, depth, max_depth)
        emitted = picks.gather(1, path)  # the accepted drafts, then the bonus, repeated
        state.append(emitted, tapped, path)
        level.controls.count(emitted, accepted, state.active)
        report = level.report(accepted, parent, emitted, logits, path)
        # A row whose text has ended is frozen: it rides along, and its length stays.
        return torch.where(state.active, length + accepted + 1, length), path, report

    run = level.compiled(verify, draft.tokens.shape[1], max_depth)
    length, path, report = run(draft.tokens, draft.parent, level.controls.masks(draft.tokens, draft.parent))
    # 5. Keep. Keys and values of the path move to where they belong. Rejecting the others costs nothing.
    if draft.branches:  # the path of a chain is in place
        cache.keep(path, state.length)
    state.length.copy_(length)  # last: an interrupted step has not happened
    return draft, report


class Step(NamedTuple):
    """A step that was begun: a draft, and what the host will read of it when the device is done."""

    draft: Draft
    fetch: Fetch  # the report of `speculate`, and `Draft.expected`

    def read(self) -> list[Verified]:
        """What became of every row."""
        report, expected = self.fetch.wait()
        expected = [0.0] * len(report) if expected is None else expected.tolist()
        places, rows = self.draft.max_depth + 1, []
        for row, expects in zip(report.tolist(), expected):
            tokens = row[2 : 3 + row[0]]
            said = read_logprobs(tokens, row[2 + places :], places)
            rows.append(Verified(*row[:2], tokens, expects, said))
        return rows


@dataclass(frozen=True)
class Setup:
    """What every part of a decoder has to agree on."""

    sampling: Sampling  # of requests that do not bring their own
    batch_size: int
    slots: int  # of every cache: the longest text and `Drafter.slack`
    runtime: Runtime
    every_control: bool = False  # may requests ask for more than `sampling` does?
    logprobs: int | None = None  # how many to report for each new token, beside its own


class Level:
    """A model, its cache, B texts, and the drafter that proposes to it: all that `speculate` needs.

    The target and its drafter are the first level, the `Decoder`. A drafter that is a decoder itself has a
    level inside, and so on: see `HierarchicalDrafter`.
    """

    def __init__(
        self,
        model: Transformer,
        drafter: Drafter,
        setup: Setup,
        above: Level | None = None,
        shares_cache: bool = False,
        renewed: int = 0,
    ):
        """`above`: the level that this one drafts for, with which it shares the text, and perhaps the cache.

        `renewed`: how many positions just before the new ones may hold new features, because a level above
        has verified them since. The drafter must read those again.
        """
        self.model, self.drafter, self.setup = model, drafter, setup
        self.stats, self.watch, self.clock = Stats(), Stopwatch(), Clock()
        self.taps = drafter.taps(model.config.num_layers)
        # Tokens from here on are never picked: this model or one above does not have them.
        self.vocabulary = min(model.config.vocab_size, above.vocabulary if above else model.config.vocab_size)
        self.verifications: dict[tuple[int, int], Callable] = {}  # by number of nodes and depth
        # How many tokens a text may have gained since the drafter was last asked, beyond its draft and the
        # bonus of this level: one for each level above.
        self.behind = 0 if above is None else above.behind + 1
        self.renewed = renewed
        width = 0 if shares_cache else len(self.taps) * model.config.hidden_size
        self.cache = (above or self).cache_for(model, shares_cache)
        self.state = State.allocate(setup.batch_size, setup.slots, width, model.norm.weight)
        if above is not None:
            self.state.tokens, self.state.seed = above.state.tokens, above.state.seed
        if shares_cache:
            self.state.features = above.state.features
        device = model.norm.weight.device
        requests = (setup.batch_size, self.vocabulary, setup.sampling, device, setup.every_control)
        self.controls = above.controls.below() if above else Controls(*requests)
        self.logprobs = None if above else setup.logprobs
        self.whole_step = setup.runtime.recorded(self.step_tensors)
        drafter.start(self)

    def cache_for(self, model: Transformer, shared: bool) -> KVCache:
        """The cache of a model of this level, or of one that drafts for it: this level's own, if `shared`."""
        if not shared:
            setup = self.setup
            return KVCache.allocate(model.config, setup.batch_size, setup.slots, model.norm.weight)
        if model.config != self.model.config:
            raise BadInput("a model that shares a cache must have the shape of the one whose cache it is")
        return self.cache

    def pick(self, logits: Tensor, positions: Tensor, nodes: Nodes, mask: Tensor | None) -> Tensor:
        """The model's own token after every node, int64 [B, n]. `benchmarks/synthetic.py` overrides this."""
        return self.controls.pick(logits[..., : self.vocabulary], positions, self.state, nodes, mask)

    def report(
        self, accepted: Tensor, parent: Tensor, emitted: Tensor, logits: Tensor, path: Tensor
    ) -> Tensor:
        """What the host reads of a step: see `speculate`."""
        drafted = (parent >= 0).sum(dim=1)  # [B]
        parts = [torch.stack((accepted, drafted), dim=1), emitted]
        if self.logprobs is not None:
            row = torch.arange(len(path), device=path.device)[:, None]  # [B, 1]
            raw = logits[row, path][..., : self.vocabulary].float()  # [B, max_depth + 1, V]
            parts.append(logprobs(raw, emitted, self.logprobs).flatten(1))
        return torch.cat(parts, dim=1)

    def compiled(self, verify: Callable, nodes: int, max_depth: int) -> Callable:
        """`verify` of `speculate` for this level, compiled and recorded where the runtime does so: once for
        each size of drafts. It depends on `max_depth` alone, so the first one serves all later steps."""
        key, runtime = (nodes, max_depth), self.setup.runtime
        if key not in self.verifications:
            self.verifications[key] = runtime.recorded(runtime.compiled(MethodType(verify, self)))
        return self.verifications[key]

    @no_grad
    def begin(self) -> Step:
        """Begin a step. On a GPU this returns before the step is finished."""
        self.watch.start()
        draft, report = self.replay() if self.is_one_graph else speculate(self)
        step = Step(draft, Fetch(report, draft.expected))
        self.stats.verification_seconds += self.watch.lap()
        return step

    def read(self, step: Step) -> list[Verified]:
        """Wait for a step -> what became of every row."""
        self.watch.start()
        rows = step.read()
        self.stats.verification_seconds += self.watch.lap()
        return rows

    def step(self) -> tuple[Draft, list[Verified]]:
        """A whole step, of which the host waits for the end."""
        step = self.begin()
        return step.draft, self.read(step)

    @no_grad
    def commit(self, draft: Draft) -> list[Verified]:
        """Verify a given draft and keep what was accepted -> what became of every row."""
        draft, report = speculate(self, draft)
        return Step(draft, Fetch(report, draft.expected)).read()

    # A whole step as one CUDA graph, for drafters that do not need the host

    @property
    def is_one_graph(self) -> bool:
        hosted = self.drafter.needs_host or self.controls.structured
        return self.setup.runtime.records and not hosted

    def step_tensors(self) -> tuple[Tensor, ...]:
        """`speculate`, as a function that returns tensors alone."""
        draft, report = speculate(self)
        expected = () if draft.expected is None else (draft.expected,)
        return draft.tokens, draft.parent, report, *expected

    def replay(self) -> tuple[Draft, Tensor]:
        """`speculate`, from its recording."""
        tokens, parent, report, *expected = self.whole_step()
        draft = Draft(tokens, parent, self.drafter.max_depth(tokens.shape[1]))
        draft.expected = expected[0] if expected else None
        return draft, report

    # What surrounds the steps

    def warm_up(self, costs: dict[str, float] | None = None) -> float:
        """Compile and record what decoding will run, before it holds any text: see `runtime.warm_up`."""
        return warm_up(self, costs)

    def extend_blank(self) -> None:
        """A forward of two tokens outside the loop, as prefill does it."""
        extend(self.model, self.cache, self.state.tokens[:, :2], self.state.length - 1)

    def blank_draft(self, n: int) -> Draft:
        """Something of the shape of the drafter's drafts: n - 1 children of the root."""
        tokens = self.state.tokens.new_zeros(self.setup.batch_size, n)
        parent = torch.zeros_like(tokens)
        parent[:, 0] = -1
        return Draft(tokens, parent, self.drafter.max_depth(n))

    def count_into(self, stats: Stats) -> None:
        """Count what happens from here on in `stats`."""
        self.stats = stats
        self.drafter.count_into(stats)

    def count_step(self, draft: Draft, rows: list[tuple[Verified, int, int]], seconds: float) -> None:
        """What a step came to, for statistics and for the drafter.

        rows: of each text what was verified, and how many accepted and new tokens of it are used.
        """
        self.stats.row_forwards += self.setup.batch_size
        for result, accepted, tokens in rows:
            self.stats.count_row(draft, result, accepted, tokens)
        self.stats.decode_seconds += seconds
        if kernels.is_quick():  # what steps take now says nothing about later ones
            seconds = assumed_seconds(draft.tokens.shape[1])
        if rows:
            self.drafter.learn(draft, [result for result, _, _ in rows], seconds)


# --------------------------------------------------------------------------------------------------
# Decoding texts
# --------------------------------------------------------------------------------------------------


class Decoder(Level):
    """A target, a drafter and their caches, for `batch_size` texts of up to `max_length` tokens at a time."""

    @no_grad
    def __init__(
        self,
        model: Transformer,
        drafter: Drafter | None = None,
        sampling: Sampling = Sampling(),
        max_length: int = 1024,
        batch_size: int = 1,
        compile: bool = True,
        every_control: bool = False,
        logprobs: int | None = None,
    ):
        """`sampling`: of all prompts, unless `run` is given one for each. These may ask for other
        temperatures and filters; what changes logits they may only ask for if `sampling` does, or with
        `every_control`.

        `logprobs`: report the log-probability of every new token, and so many of the most probable ones.
        """
        drafter = Drafter() if drafter is None else drafter
        self.max_length = whole_number("max_length", max_length, 2)
        batch_size = whole_number("batch_size", batch_size, 1)
        for name, part, kind in (("model", model, Transformer), ("sampling", sampling, Sampling)):
            check_kind(name, part, kind)
        check_kind("drafter", drafter, Drafter)  # not the model that it uses
        kernels.load()
        check_dynamic(model.config, self.max_length)
        runtime = Runtime(compile, model.norm.weight.device, model.clock)
        slots = self.max_length + drafter.slack
        if logprobs is not None and not 0 <= whole_number("logprobs", logprobs) <= model.config.vocab_size:
            raise BadInput(f"logprobs is {logprobs}; it must be 0 to {model.config.vocab_size}")
        setup = Setup(sampling, batch_size, slots, runtime, every_control, logprobs)
        super().__init__(model, drafter, setup)
        # Begin the next step before this one is read? If the device does all the work of a step, it then
        # never waits for the host. In return, the drafter learns from a step one step late.
        self.runs_ahead = self.is_one_graph
        self.rows: list[Text | None] = [None] * batch_size
        self.order = list(range(batch_size))  # of the rows: the one that was left last is the last
        self.ahead: tuple[Step, list[Text | None]] | None = None  # a step that was begun, and for which texts
        self.timer = runtime.stopwatch()
        self.expect([sampling], self.controls.has_room, logprobs)

    def run(
        self,
        prompts: Prompts,
        max_new_tokens: int = 200,
        stop_ids: Iterable[int] | int = (),
        should_stop: Callable[[int, int], bool] | None = None,
        stats: Stats | None = None,
        reuse: bool = False,
        seeds: list[int] | None = None,
        samplings: list[Sampling] | None = None,
    ) -> Iterator[list[Emission]]:
        """Decode all prompts, yielding what every step emits. A row whose text has ended takes the next one.
        What cannot be decoded is refused at once, with a BadInput.

        `should_stop(prompt index, token)` is asked about every token in order; true ends the text with it.
        `reuse` continues a conversation: what a prompt shares with the row's last text is not computed again.
        `samplings`: one for each prompt, instead of the decoder's. `seeds` are the keys of the prompts'
        noise; by default those of `samplings`, or else the seed, the seed + 1 and so on.
        """
        prompts = token_lists(prompts, None)
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
        for tokens in prompts:
            check_prompt(self.model.config, tokens, self.max_length)
            for model in (self.model, *self.drafter.models):
                check_window(model.config, min(len(tokens) + max_new_tokens, self.max_length))
        stops = plain(stop_ids)
        stops = frozenset(whole_numbers("stop id", [stops] if isinstance(stops, int) else stops))
        stats, room = Stats() if stats is None else stats, self.max_length
        each = zip(prompts, self.requests(prompts, seeds, samplings, stops))
        waiting = deque(Text(i, p, r, min(max_new_tokens, room - len(p))) for i, (p, r) in enumerate(each))

        def ends(prompt: int, token: int) -> bool:
            return token in stops or (should_stop is not None and should_stop(prompt, token))

        return self.decode(waiting, ends, stats, reuse)

    def requests(
        self,
        prompts: list[list[int]],
        seeds: list[int] | None = None,
        samplings: list[Sampling] | None = None,
        stops: frozenset[int] = frozenset(),
    ) -> list[Request]:
        """What is asked for each prompt: see `run`. BadInput for what cannot be."""
        ours, count = self.setup.sampling, len(prompts)
        every = [ours] * count if samplings is None else samplings
        check_kind("samplings", every, list)
        known = frozenset(token for token in stops if 0 <= token < self.vocabulary)  # the others never come
        for sampling in every:
            check_kind("sampling", sampling, Sampling)
            self.controls.check(sampling, known)
        keys = [ours.seed + i for i in range(count)] if samplings is None else [each.seed for each in every]
        keys = keys if seeds is None else [check_seed(seed) for seed in whole_numbers("seed", seeds)]
        for name, values in (("samplings", every), ("seeds", keys)):
            if len(values) != count:
                raise BadInput(f"there are {len(values)} {name} for {count} prompts; each needs its own")
        return [Request(sampling, seed, known) for sampling, seed in zip(every, keys)]

    def decode(
        self, waiting: deque[Text], ends: Callable[[int, int], bool], stats: Stats, reuse: bool
    ) -> Iterator[list[Emission]]:
        """`run`, after its checks. `ends(prompt index, token)`: does a text end with this token?"""
        self.state.active.fill_(False)  # an earlier run may have been abandoned half way
        self.rows, self.ahead = [None] * self.setup.batch_size, None
        samplings = [self.setup.sampling, *(text.request.sampling for text in waiting)]
        self.expect(samplings, self.controls.has_room, self.setup.logprobs)
        self.count_into(stats)
        watch = Stopwatch()
        while waiting or any(self.rows):
            for emissions in self.advance(waiting, ends, reuse):
                stats.time_to_first_token_seconds = stats.time_to_first_token_seconds or watch.seconds
                yield emissions

    def expect(self, samplings: list[Sampling], full: bool, logprobs: int | None) -> None:
        """What steps do from now on: masks where one of these requests has a grammar; with `full`, whatever
        else changes logits; and `logprobs`, see `Decoder`. More than texts need costs time, and that is all.
        """
        self.controls.expect(samplings)
        self.controls.full, self.logprobs = full, logprobs
        self.setup.runtime.mode[:] = [full, logprobs]

    def advance(
        self, waiting: deque[Text], ends: Callable, reuse: bool = False, chunk: int | None = None
    ) -> Iterator[list[Emission]]:
        """Free rows take texts that wait. Then every text goes on: by `chunk` tokens of its prompt (None: all
        of it), whose end gives the first new token, or else by a step.

        Between two calls, texts may come to `waiting`, and `leave` may end others.
        """
        read: list[Text] = []  # texts that have had their chunk
        while True:
            while waiting and None in self.rows:  # again and again: a text may end with its first token
                self.join(waiting.popleft(), reuse)
            unread = [row for row, text in enumerate(self.rows) if text is not None and not text.is_read]
            row = next((row for row in unread if self.rows[row] not in read), None)
            if row is None:
                break
            text = self.rows[row]
            read.append(text)
            if first := self.read_prompt(row, text, chunk or len(text.prompt)):
                yield [self.emit(row, first, ends)]
        if any(self.growing()) and (emissions := self.step_texts(ends)):
            yield emissions  # there are none where all texts that the step was begun for are done

    def read_prompt(self, row: int, text: Text, most: int) -> Verified | None:
        """Up to so many tokens of a prompt -> the first new token, where that is the end of it."""
        self.timer.start()
        end = min(text.length + most, len(text.prompt))
        first = self.prefill(row, text.prompt, text.request, text.length, end)
        text.length = end
        self.stats.count_prefill(self.timer.lap(), first is not None)
        return first

    def join(self, text: Text, reuse: bool) -> None:
        """A text takes a free row: one whose last text it continues, or else the one that is free longest."""
        free = [row for row in self.order if self.rows[row] is None]
        shared = {row: self.shared_prefix(row, text.prompt) if reuse else 0 for row in free}
        # A few tokens at their beginning are common to all conversations.
        row = max(free, key=lambda row: shared[row] if 8 * shared[row] > len(text.prompt) else 0)
        self.rows[row], text.length, text.shared = text, shared[row], shared[row]

    def growing(self) -> list[Text | None]:
        """The texts by row, without those whose prompts are still to be read."""
        return [text if text is not None and text.is_read else None for text in self.rows]

    def step_texts(self, ends: Callable[[int, int], bool]) -> list[Emission]:
        """All texts take a step. On a GPU the next one may begin before this one is read."""
        if self.ahead is None:
            self.timer.start()  # otherwise it has been running since the last one was read
        step, texts = self.ahead or (self.begin(), self.growing())
        self.ahead = (self.begin(), self.growing()) if self.may_go_on(step) else None
        verified, emissions, used = self.read(step), [], []
        # Each row emits what it has gained, and is free if its text ends with that.
        for row in (row for row, text in enumerate(texts) if text is not None and text is self.rows[row]):
            emissions.append(self.emit(row, verified[row], ends, step.draft))
            used.append((verified[row], emissions[-1].accepted, len(emissions[-1].tokens)))
        self.count_step(step.draft, used, self.timer.lap())
        return emissions

    @no_grad
    def prefill(
        self, row: int, tokens: list[int], request: Request, start: int = 0, end: int | None = None
    ) -> Verified | None:
        """Read a prompt in `row`, from `start`, below which the caches have it already, to `end` -> the
        first new token, where that is all of it."""
        state, device, length = self.state, self.state.tokens.device, len(tokens)
        end = length if end is None else end
        state.length[row] = start + 1  # if this is interrupted, a later `reuse` may rely on no more
        prompt = torch.tensor(tokens, device=device)  # int64 [P]
        state.tokens[row, :length] = prompt
        read = prompt[:end]
        feature = prefill(self.model, self.cache, row, read, start, state.features[row], self.taps)
        self.drafter.prefill(state, row, read, start)
        if end < length:
            state.length[row] = end  # steps of other rows write behind it, where the next chunk goes
            return None
        # The prompt's end is the root of a draft of one node.
        state.length[row], state.seed[row], state.active[row] = length - 1, request.seed, True
        self.controls.begin(row, request.sampling, prompt, request.stops)
        view, controls = state.row(row), self.controls.row(row)
        position, logits = view.length[:, None] + 1, self.model.lm_head(feature)[..., : self.vocabulary]
        root, parent = prompt[None, -1:], torch.full_like(position, -1)  # [1, 1] each
        mask, nothing = controls.masks(root, parent), Nodes.after([], view.length)
        first = controls.pick(logits, position, view, nothing, mask)  # [1, 1]
        state.tokens[row, length] = first[0, 0]
        state.length[row] = length
        controls.count(first, torch.zeros_like(view.length), view.active)
        path = torch.zeros_like(first)
        report = self.report(path[:, 0], parent, first, logits, path)
        return Step(Draft(first, parent, 0), Fetch(report, None)).read()[0]

    def emit(self, row: int, gained: Verified, ends: Callable, draft: Draft | None = None) -> Emission:
        """What a text has gained, up to and including the token that ends it. Then its row is free."""
        text = self.rows[row]
        emission = cut(text, gained, ends)
        emission.draft, emission.row = draft, row
        text.budget -= len(emission.tokens)
        text.length += len(emission.tokens) - (draft is None)  # the last one is in no cache yet
        if emission.finish_reason:
            self.leave(row)
        else:
            self.controls.consume(row, emission.tokens)
        return emission

    @no_grad
    def leave(self, row: int) -> None:
        """A text leaves its row, which is free from now on and keeps the caches for `reuse`."""
        # Drop what was cut off. By `fill_`: assigning a number would make the host wait for a GPU.
        self.state.active[row].fill_(False)
        self.state.length[row].fill_(max(self.rows[row].length, 1))  # drafters look one token back
        self.controls.matchers[row], self.rows[row] = None, None
        self.order.remove(row)
        self.order.append(row)

    def may_go_on(self, step: Step) -> bool:
        """May the next step begin before this one is read? Not where this one may use up a text's budget or
        its room. A text that meets a stop token now is decoded a step too far, which nothing reads."""
        most, ahead = step.draft.max_depth + 1, self.runs_ahead and not self.controls.structured
        return ahead and all(text is None or text.budget > most for text in self.rows)

    def shared_prefix(self, row: int, tokens: list[int]) -> int:
        """How many tokens of the new text are in all caches of the row. At least one is left to compute."""
        valid = int(self.state.length[row]) - 1  # a drafter may lack the last one
        old = self.state.tokens[row, : max(valid, 0)].tolist()
        pairs = zip(old, tokens[:-1])
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(tokens) - 1))


def generate(
    model: Transformer,
    prompts: Prompts,
    drafter: Drafter | None = None,
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 200,
    batch_size: int = 1,
    compile: bool = True,
    tokenizer: Any = None,
    logprobs: int | None = None,
    **options,
) -> Iterator[list[Emission]]:
    """Decode one prompt or several, a step at a time: the engine in one call. `options`: see `Decoder.run`;
    `logprobs`: see `Decoder`.

    Prompts are token ids in lists, tensors or arrays, of which a 2-D one is a batch, or texts where there is
    a `tokenizer` (anything with `encode` and `decode`).

    stats = Stats()
    for emissions in generate(model, [1, 306, 626], drafter=SequentialDrafter(small), stats=stats):
        print(emissions[0].tokens)
    """
    ids = token_lists(prompts, tokenizer) or [[]]  # which `run` refuses
    longest = max(map(len, ids)) + whole_number("max_new_tokens", max_new_tokens, 1)
    max_length = cache_length(model.config, longest)
    asked = [each for each in options.get("samplings") or [] if isinstance(each, Sampling)]
    usual = max(asked, key=lambda each: (each.grammar is not None, each.temperature), default=sampling)
    sizes = (max_length, batch_size, compile, any(each.changes_logits for each in asked))
    decoder = Decoder(model, drafter, usual, *sizes, logprobs)
    options["stats"] = stats = options.get("stats") or Stats()
    steps = decoder.run(ids, max_new_tokens, **options)  # what it refuses, it refuses before the warm-up
    stats.compile_seconds += decoder.warm_up()
    yield from steps


@dataclass
class Completion:
    """A whole text: what became of one prompt."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str | None = None  # where there is a tokenizer
    finish_reason: str | None = None  # "stop" or "length"
    steps: int = 0  # verifications; the first token comes from prefill
    accepted: int = 0  # tokens that were drafted
    logprobs: list[Logprob] = field(default_factory=list)  # where they were asked for

    @property
    def tokens_per_step(self) -> float:
        return (len(self.token_ids) - 1) / self.steps if self.steps else 0.0


def complete(model: Transformer, prompts: Prompts, tokenizer: Any = None, **options) -> list[Completion]:
    """`generate` with the same arguments, but whole texts at the end, in the order of the prompts."""
    texts = [Completion(ids) for ids in token_lists(prompts, tokenizer)]
    for emissions in generate(model, [text.prompt_ids for text in texts], **options):
        for emission in emissions:
            text = texts[emission.prompt_index]
            text.token_ids += emission.tokens
            text.steps += emission.draft is not None
            text.accepted += emission.accepted
            text.logprobs += emission.logprobs or []
            text.finish_reason = emission.finish_reason
    for text in texts:
        if tokenizer:  # by the prompt before it: at its own beginning, a text may lose a blank
            start = len(tokenizer.decode(text.prompt_ids))
            text.text = tokenizer.decode(text.prompt_ids + text.token_ids)[start:]
    return texts


# --------------------------------------------------------------------------------------------------
# Drafters. Those with an EAGLE head are in eagle.py, those that choose among others in auto.py.
# --------------------------------------------------------------------------------------------------


class LookupDrafter(Drafter):
    """Prompt lookup: what followed the last few tokens when they occurred before (arXiv 2304.04487)."""

    needs_host = True

    def __init__(self, speculate_k: int = 4, ngram: int = 6):
        """`ngram`: tokens that agree, at most. The longest repetition counts, and of these the latest."""
        self.max_nodes = whole_number("speculate_k", speculate_k, 1) + 1
        self.ngram = whole_number("ngram", ngram, 1)

    def start(self, level: Level) -> None:
        super().start(level)
        self.indices = [self.make_index() for _ in range(level.setup.batch_size)]

    def make_index(self) -> TextIndex:
        return TextIndex(self.ngram)

    def update(self, state: State) -> list[TextIndex | None]:
        """Add what the texts have gained -> their indices by row, None where no text is decoded."""
        lengths, actives = state.length.tolist(), state.active.tolist()
        tokens = state.tokens[:, : max(lengths) + 1].tolist()
        for index, text, length in compress(zip(self.indices, tokens, lengths), actives):
            index.update(text[: length + 1])
        return [index if active else None for index, active in zip(self.indices, actives)]

    def choose_size(self, agree: list[int]) -> int:
        """The number of nodes, given how many tokens at the end of each text have occurred before."""
        return self.max_nodes if any(agree) else 1

    def propose(self, state: State, n: int | None = None) -> Draft:
        indices, device = self.update(state), state.length.device
        n = n or self.choose_size([index.agree[-1] for index in indices if index])
        guesses = [index.guess(n - 1) if index and index.agree[-1] else [] for index in indices]
        roots = [index.text[-1] if index else 0 for index in indices]
        # What `Draft.chain` makes, but on the host, where all of it is known already.
        tokens = [[root, *said] + (n - 1 - len(said)) * [0] for root, said in zip(roots, guesses)]
        parent = [[*range(-1, len(said)), *(n - 1 - len(said)) * [-1]] for said in guesses]
        tokens, parent = (torch.tensor(rows, device=device) for rows in (tokens, parent))  # [B, n] each
        return Draft(tokens, parent, n - 1, branches=False)

    def draft_sizes(self) -> list[int]:
        return [1, self.max_nodes]


class TextIndex:
    """Where the last tokens of a text occurred before, for every place of it. On the host, where a new token
    costs a few microseconds."""

    def __init__(self, ngram: int):
        self.ngram = ngram
        self.clear()

    def clear(self) -> None:
        self.text: list[int] = []
        self.latest: dict[tuple[int, ...], int] = {}  # by n-gram: the last place where it ended
        self.repeats: list[int] = []  # by place: the earlier end of its longest repeated suffix, or -1
        self.agree: list[int] = []  # by place: the length of that suffix, at most `ngram`
        self.before: list[list[int]] = []  # by place: the earlier end of each suffix, the longest first

    def update(self, text: list[int]) -> None:
        """Add what the text has gained, and forget what is not in it any more."""
        if self.text != text[: len(self.text)]:
            pairs = enumerate(zip(self.text, text))
            self.forget(next((i for i, (a, b) in pairs if a != b), min(len(self.text), len(text))))
        for place in range(len(self.text), len(text)):
            self.text.append(text[place])
            suffixes = self.suffixes()
            before = [self.latest.get(suffix, -1) for suffix in suffixes]
            self.latest.update(dict.fromkeys(suffixes, place))
            longest = next((i for i, end in enumerate(before) if end >= 0), len(before))
            self.agree.append(len(before) - longest)
            self.repeats.append(before[longest] if longest < len(before) else -1)
            self.before.append(before)

    def suffixes(self) -> list[tuple[int, ...]]:
        """The last tokens, the longest suffix first."""
        last = tuple(self.text[-self.ngram :])
        return [last[i:] for i in range(len(last))]

    def forget(self, end: int) -> None:
        """Forget all places from `end` on; those below, too, if it is quicker to add them again."""
        if end < len(self.text) - end:
            self.clear()
        while len(self.text) > end:
            for suffix, place in zip(self.suffixes(), self.before.pop()):
                if place < 0:
                    del self.latest[suffix]
                else:
                    self.latest[suffix] = place
            for values in (self.text, self.repeats, self.agree):
                values.pop()

    def guess(self, count: int, place: int = -1) -> list[int]:
        """What may follow a place that repeats an earlier one. Where the text ends too soon, the guess
        starts over: a text that repeats goes on repeating."""
        place = place % len(self.text)
        begin = self.repeats[place] + 1
        said = self.text[begin : min(begin + count, place + 1)]
        return (said * (count // max(len(said), 1) + 1))[:count]


CHAIN_SIZES = (2, 4, 8)  # nodes of what a small model writes, where the length is chosen step by step
UNROLLED_LAYERS = 32  # at most, in a compiled call that writes more than one token


class SequentialDrafter(Drafter):
    """A smaller model of the same vocabulary writes K tokens in a row (Leviathan et al., arXiv 2211.17192).
    Its `vocab_size` may be padded otherwise: see `check_vocabulary`.

    It picks with the target's noise, so at any temperature it agrees with the target as often as their
    distributions allow. If a whole draft is accepted, the small model has not read its last token yet. So
    every draft starts by feeding the last *two* tokens of the text (more below other levels: `Level.behind`).
    That costs no extra forward, and in all other cases it rewrites what is there already.

    The smaller model may be the target itself with activations of fewer bits, on the target's own cache
    (QSpec, arXiv 2410.11305). Drafts write their keys and values from `length` on, and verification
    overwrites them before it reads. So it needs no prefill, no catching up and no rewinding.
    """

    def __init__(
        self,
        model: Transformer,
        speculate_k: int | None = 4,
        draft_confidence: float = 0.0,
        shares_cache: bool = False,
    ):
        """`speculate_k`: tokens of a draft; None for as many as pay, going by recent acceptance and cost.

        `draft_confidence`: a draft ends before a token that the model finds less probable than this.

        `shares_cache`: the model is the target in another precision of activations, and uses its cache.
        """
        check_kind("model", model, Transformer)
        k = CHAIN_SIZES[-1] - 1 if speculate_k is None else whole_number("speculate_k", speculate_k, 1)
        draft_confidence = number("draft_confidence", draft_confidence)
        if not 0 <= draft_confidence <= 1:
            raise BadInput(f"draft_confidence is {draft_confidence}; it is a probability, 0 (off) to 1")
        self.model, self.shares_cache, self.max_nodes = model, shares_cache, k + 1
        self.models = () if shares_cache else (model,)
        self.draft_confidence, self.needs_costs = draft_confidence, speculate_k is None
        self.needs_host = draft_confidence > 0 or self.needs_costs
        # The tokens that each recorded call writes: the fewer calls the faster, but on a GPU each layer of
        # each token takes seconds to compile. With a confidence, `propose` looks at each before the next.
        most = 1 if self.needs_host else max(UNROLLED_LAYERS // model.config.num_layers, 1)
        count = -(-(self.max_nodes - 1) // most)
        self.calls = [(self.max_nodes - 1 + i) // count for i in reversed(range(count))]

    def start(self, level: Level) -> None:
        super().start(level)
        self.vocabulary = check_vocabulary(self.model.config.vocab_size, level.vocabulary)
        self.cache, setup = level.cache_for(self.model, self.shares_cache), level.setup
        self.controls, self.window = level.controls, 1 if self.shares_cache else 2 + level.behind
        self.acceptance = Acceptance()
        self.write_some = setup.runtime.recorded(setup.runtime.compiled(self.write))

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        if not self.shares_cache:
            prefill(self.model, self.cache, row, tokens, max(start - self.window, 0))

    def warm_up(self, state: State) -> None:
        # `propose` may end early, so it would not run every call. The first feeds the window, the others one.
        for n, count in {(self.window, self.calls[0]), *((1, count) for count in self.calls[1:])}:
            fed, start = state.before(state.length + 1, n)
            self.write_some(fed, start, state.length - start, state.seed, count)

    def write(
        self, fed: Tensor, start: Tensor, last: Tensor, seed: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Feed tokens int64 [B, n] at `start`, of which number `last` [B] is the root, and go on from there.

        Returns `count` new tokens int64 [B, count], and whether the model is sure of each, bool."""
        tokens, sure, row = [], [], torch.arange(len(fed), device=fed.device)[:, None]  # [B, 1]
        for _ in range(count):
            features, _ = extend(self.model, self.cache, fed, start)
            logits = self.model.lm_head(features[row, last[:, None]])[..., : self.vocabulary]  # [B, 1, V]
            start, last = start + last + 1, torch.zeros_like(last)
            fed = self.pick(logits, start[:, None], seed, Nodes.after(tokens, seed))  # [B, 1]
            tokens.append(fed)
            sure.append(self.is_sure(logits, fed))
        return torch.cat(tokens, dim=1), torch.cat(sure, dim=1)

    def pick(self, logits: Tensor, positions: Tensor, seed: Tensor, nodes: Nodes) -> Tensor:
        """The small model's own tokens, int64 [B, 1]: with the filters, the penalties and the noise of the
        target, but without its bans and grammars."""
        return kernels.pick(self.controls.penalize(logits, nodes), positions, seed, self.controls.settings)

    def is_sure(self, logits: Tensor, token: Tensor) -> Tensor:
        """Is the token, int64 [B, 1], probable enough under logits [B, 1, V]? bool [B, 1]"""
        if self.draft_confidence == 0:
            return torch.ones_like(token, dtype=torch.bool)
        return logits[:, 0].float().softmax(-1).gather(1, token) >= self.draft_confidence

    def propose(self, state: State, n: int | None = None) -> Draft:
        fed, start = state.before(state.length + 1, self.window)
        root, last = state.tokens.gather(1, state.length[:, None]), state.length - start  # [B, 1], [B]
        drafted, sure, count = [root], state.active[:, None], torch.zeros_like(start)
        most = n or self.max_nodes
        if n is None and self.needs_costs:
            most = self.pace.best({n: self.acceptance.expected(n - 1) for n in CHAIN_SIZES})
        for more in self.calls if most == self.max_nodes else [1] * (most - 1):
            tokens, confident = self.write_some(fed, start, last, state.seed, more)  # [B, more] each
            sure = sure[:, -1:] & confident
            # The host reads the device here: the price of stopping early.
            if self.draft_confidence > 0 and not sure.any():
                break
            drafted.append(tokens)
            count = count + sure.sum(dim=1)  # [B]
            # A new tensor, whose strides are those of the warm-up.
            fed, start = tokens.narrow_copy(1, more - 1, 1), start + last + more
            last = torch.zeros_like(last)
        draft = torch.cat(drafted, dim=1)
        n = next(size for size in self.draft_sizes() if size >= draft.shape[1])
        return Draft.chain(F.pad(draft, (0, n - draft.shape[1])), count)  # [B, n]

    def learn(self, draft: Draft, verified: list[Verified], seconds: float) -> None:
        super().learn(draft, verified, seconds)
        for row in verified if self.needs_costs else ():
            self.acceptance.count(row.accepted, row.drafted)

    def draft_sizes(self) -> list[int]:
        if self.needs_costs:
            return [1, *CHAIN_SIZES] if self.draft_confidence > 0 else list(CHAIN_SIZES)
        if self.draft_confidence == 0:
            return [self.max_nodes]
        return [n for n in (1, 2, 3, 5, 9, 17, 33) if n < self.max_nodes] + [self.max_nodes]


MIN_DRAFT_LENGTH = 6  # by default


class HierarchicalDrafter(Drafter):
    """A level that drafts (SpecMQuant, arXiv 2505.22179). A smaller model, the middle, decodes with a
    drafter of its own, step after step, until it has at least `min_draft_length` tokens. The target then
    verifies them as one sequence.

    So the large quantized target, for which 60 tokens cost more than one, verifies a short chain, and the
    tree is left to a model for which it is cheap. The drafter inside may be an EAGLE head, a lookup, or
    another decoder.

    The levels share the text, and each has its own `length`. Drafting moves the middle's ahead of the
    target's. After verification, `rewind` takes it back to the target's. If everything was accepted, the
    middle has not read its last token, and `catch_up` feeds it first. So the middle is never behind the
    target when it drafts, and no committed token is ever overwritten.
    """

    needs_host = True

    def __init__(
        self,
        model: Transformer,
        drafter: Drafter,
        min_draft_length: int = MIN_DRAFT_LENGTH,
        shares_cache: bool = False,
    ):
        """`shares_cache`: the model is the target itself in another precision of activations, on the target's
        cache. It never writes below `length`, and the keys, values and features that it writes above are
        replaced by the target's when it verifies.
        """
        check_kind("model", model, Transformer)
        check_kind("drafter", drafter, Drafter)
        min_draft_length = whole_number("min_draft_length", min_draft_length)
        if not 1 <= min_draft_length <= MAX_DRAFT_DEPTH:
            raise BadInput(f"min_draft_length is {min_draft_length}; it must be 1 to {MAX_DRAFT_DEPTH}")
        self.model, self.drafter, self.shares_cache = model, drafter, shares_cache
        self.models = drafter.models if shares_cache else (model, *drafter.models)
        self.min_draft_length = min_draft_length
        # One token short of the minimum, a step may still add a whole path and the bonus token.
        depth = max(drafter.max_depth(n) for n in drafter.draft_sizes())
        self.max_nodes = 1 + min_draft_length + depth
        self.sizes = sorted({self.max_nodes, self.max_nodes - depth // 2})  # most steps add less

    @property
    def slack(self) -> int:
        # A row that has enough rides along while others still draft, and inner drafts are written after it.
        return self.max_nodes - 1 + self.drafter.slack

    def taps(self, layers: int) -> tuple[int, ...]:
        return self.drafter.taps(layers) if self.shares_cache else ()

    def start(self, level: Level) -> None:
        super().start(level)
        # A shared cache means shared features, and the target renews those of everything drafted.
        renewed = level.renewed + self.min_draft_length - 1 if self.shares_cache else 0
        check_vocabulary(self.model.config.vocab_size, level.vocabulary)
        self.level, self.above = self.make_level(level, renewed), level.controls
        runtime = level.setup.runtime
        self.feed_some = runtime.recorded(partial(runtime.compiled(self.feed), self.level.state))

    def make_level(self, above: Level, renewed: int) -> Level:
        return Level(self.model, self.drafter, above.setup, above, self.shares_cache, renewed)

    def warm_up(self, state: State) -> None:
        self.level.warm_up()
        if not self.shares_cache:
            self.catch_up(state)

    def count_into(self, stats: Stats) -> None:
        stats.inside = stats.inside or Stats()
        self.level.count_into(stats.inside)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        inside = self.level.state
        start = max(min(start, int(inside.length[row]) - 1), 0)  # the middle may lack more than the target
        inside.length[row] = start + 1  # all that may be counted on, should this be interrupted
        if not self.shares_cache:
            features, taps = inside.features[row], self.level.taps
            prefill(self.model, self.level.cache, row, tokens, start, features, taps)
        self.drafter.prefill(inside, row, tokens, start)
        inside.length[row] = len(tokens)

    def rewind(self, length: Tensor) -> None:
        # All levels at once: this one may move on before the inner one is asked for a draft.
        inside = self.level.state
        inside.length.copy_(torch.minimum(inside.length, length))
        self.drafter.rewind(inside.length)

    def feed(self, inside: State, tokens: Tensor, start: Tensor) -> tuple:
        """Tokens int64 [B, n] at `start` int64 [B]: the middle model's keys, values and features of them."""
        _, tapped = extend(self.model, self.level.cache, tokens, start, self.level.taps)
        if self.level.taps:
            place = start[:, None] + torch.arange(tokens.shape[1], device=start.device)  # [B, n]
            inside.features[torch.arange(len(start), device=start.device)[:, None], place] = tapped
        return ()

    def catch_up(self, state: State) -> None:
        """Feed the middle model the tokens that it lacks after the target accepted a whole draft."""
        self.level.watch.start()
        self.feed_some(*state.before(state.length, self.level.behind))
        self.level.state.length.copy_(state.length)
        self.level.stats.verification_seconds += self.level.watch.lap()

    def propose(self, state: State, n: int | None = None) -> Draft:
        inside = self.level.state
        self.rewind(state.length)
        self.level.controls.restart(self.above)
        if self.shares_cache:
            inside.length.copy_(state.length)  # the target has written what it lacked
        elif (inside.length < state.length).any():
            self.catch_up(state)
        active, drafted = state.active.tolist(), [0] * len(state.active)
        while any(going := [a and count < self.min_draft_length for a, count in zip(active, drafted)]):
            inside.active.copy_(torch.tensor(going))
            watch = self.level.setup.runtime.stopwatch()
            draft, verified = self.level.step()
            rows = [(result, result.accepted, len(result.tokens)) for result in compress(verified, going)]
            self.level.count_step(draft, rows, watch.lap())
            drafted = [count + goes * len(v.tokens) for count, goes, v in zip(drafted, going, verified)]
        n = next(size for size in self.sizes if size > max(drafted))
        place = state.length[:, None] + torch.arange(n, device=state.length.device)  # [B, n]
        return Draft.chain(state.tokens.gather(1, place), inside.length - state.length)

    def draft_sizes(self) -> list[int]:
        return self.sizes
