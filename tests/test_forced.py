"""Drafts that a grammar makes: they change no text, and the other drafter goes on as if it had been asked.

Here scripts stand for matchers: what they call forced is what comes next, or something else, or nothing.
"""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import NEEDS_EQUAL_ROWS, collect, guessing_head, noisy_copy, random_prompts, texts

from auto import AdaptiveLookup, AutoDrafter
from costs import Stats
from drafts import Drafter, tree_geometry
from eagle import TreeDrafter
from forced import FORCED, ForcedDrafter
from gpt_spec import Decoder, HierarchicalDrafter, LookupDrafter, Request, SequentialDrafter
from sampling import Sampling

PROMPTS = random_prompts([5, 12, 1, 9])
SAMPLINGS = [Sampling(), Sampling(1.0, seed=7)]


class Script:
    """A matcher of one row that knows how its text goes on."""

    def __init__(self, level, row, whole, wrong):
        self.state, self.row, self.whole, self.wrong = level.state, row, whole, wrong

    def whole_text(self):
        """With what will follow, and where it is now."""
        assert self.state.active[self.row]
        end = int(self.state.length[self.row]) + 1
        said = self.state.tokens[self.row, :end].tolist()
        return next(text for text in self.whole if text[:end] == said), end

    def forced(self, limit):
        """By chance, but the same for the same place: nothing, some tokens, or many in several drafts."""
        whole, end = self.whole_text()
        rng = random.Random(31 * (end // 12) + sum(whole[:3]))  # alike for 12 tokens
        if rng.random() < 0.5:
            return []
        tokens = whole[end : end + random.Random(end).randint(0, limit)]
        return [t if random.Random(end + i).random() > self.wrong else 7 for i, t in enumerate(tokens)]


class Scripted(ForcedDrafter):
    """With scripts for matchers, it watches its drafts and those of the other drafter."""

    def __init__(self, inner, whole, wrong=0.0, script=Script):
        super().__init__(inner)
        self.whole, self.wrong, self.script, self.drafts, self.own, self.learnt = (
            whole,
            wrong,
            script,
            [],
            [],
            [],
        )
        self.inner_propose, inner.propose = inner.propose, self.watch
        self.inner_learn, inner.learn = inner.learn, self.watch_learning

    def start(self, level):
        rows = range(level.setup.batch_size)
        self.history = ["" for _ in rows]
        self.scripts = [self.script(level, row, self.whole, self.wrong) for row in rows]
        super().start(level)
        self.controls = SimpleNamespace(matchers=self.scripts)
        assert level.behind == 0

    def watch(self, state, n=None):
        draft = self.inner_propose(state, n)
        chains = [
            script.forced(FORCED) if a else [] for script, a in zip(self.scripts, state.active.tolist())
        ]
        for row in range(len(chains)) if n is None and not self.warming else ():
            if state.active[row] and not chains[row]:
                text = state.tokens[row, : int(state.length[row]) + 1].tolist()
                self.own.append((text, shape(draft, row), entries(self.inner, row, len(text) - 1)))
        return draft

    warming = False

    def warm_up(self, state):
        self.warming = True
        super().warm_up(state)
        self.warming = False

    def prefill(self, state, row, tokens, start):
        self.history[row] += "caught up " if state.active[row] else "text "
        super().prefill(state, row, tokens, start)

    def watch_learning(self, draft, verified, seconds):
        self.learnt += verified
        self.inner_learn(draft, verified, seconds)

    def propose(self, state, n=None):
        draft = super().propose(state, n)
        self.drafts.append((draft, list(self.forced)))
        assert draft.tokens.shape[1] in self.draft_sizes()
        assert draft.max_depth == self.max_depth(draft.tokens.shape[1])
        assert tree_geometry(draft.parent, 20)[1].max() <= draft.max_depth
        flags = iter(self.forced)
        for row in state.active.nonzero().flatten().tolist():
            self.history[row] += "forced " if next(flags) else "own "
        return draft


def shape(draft, row):
    """The nodes of a row: tokens and parents, without padding."""
    pairs = zip(draft.tokens[row].tolist(), draft.parent[row].tolist())
    return [pair for node, pair in enumerate(pairs) if node == 0 or pair[1] >= 0]


def entries(drafter, row, end):
    """Keys and values below a position, of all models that draft."""
    caches = [drafter.cache] if hasattr(drafter, "cache") else []
    if isinstance(drafter, HierarchicalDrafter):
        return torch.cat((kv(drafter.level.cache, row, end), entries(drafter.drafter, row, end)))
    return torch.cat([torch.empty(0), *(kv(cache, row, end) for cache in caches)])


def kv(cache, row, end):
    return torch.cat([part[row, :end].flatten() for part in cache.keys + cache.values])


def tree(model):
    return TreeDrafter(guessing_head(model), 9, 4, 3)


def middle(model, drafter, shares_cache=False):
    return HierarchicalDrafter(model, drafter, 4, shares_cache)


INNER = {
    "autoregressive": lambda target, small: Drafter(),
    "lookup": lambda target, small: LookupDrafter(3),
    "sequential": lambda target, small: SequentialDrafter(small, 3),
    "confident": lambda target, small: SequentialDrafter(small, 4, draft_confidence=0.2),
    "qspec": lambda target, small: SequentialDrafter(target, 3, shares_cache=True),
    "tree": lambda target, small: tree(target),
    "large tree": lambda target, small: TreeDrafter(guessing_head(target), 20, 6, 3),
    "lookup in the middle": lambda target, small: middle(small, LookupDrafter(3)),
    "tree in the middle": lambda target, small: middle(small, tree(small)),
    "a middle that shares its cache": lambda target, small: middle(target, tree(target), True),
    "three levels": lambda target, small: middle(small, middle(noisy_copy(small), tree(small))),
    "auto": lambda target, small: AutoDrafter(
        {"lookup": AdaptiveLookup(), "sequential": SequentialDrafter(small, 3)}
    ),
}


@pytest.fixture(scope="module")
def small(target):
    return noisy_copy(target)


@pytest.fixture(scope="module")
def wholes(target):
    """Prompts and what follows, by sampling, long enough to be told apart."""
    return {s: [p + t for p, t in zip(PROMPTS, texts(target, PROMPTS, None, s, 60))] for s in SAMPLINGS}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", INNER)
def test_a_text_is_the_same(target, small, wholes, name, batch_size):
    sampling = SAMPLINGS[batch_size > 1]
    wanted = [whole[len(p) :][:40] for whole, p in zip(wholes[sampling], PROMPTS)]
    drafter = Scripted(INNER[name](target, small), wholes[sampling], wrong=0.1)
    assert texts(target, PROMPTS, drafter, sampling, batch_size=batch_size) == wanted
    kinds = {flag for _, flags in drafter.drafts for flag in flags}
    assert kinds == {True, False} and drafter.accepted > 10


class Brief(Script):
    """Forces a single token behind every third one, in one row."""

    def forced(self, limit):
        whole, end = self.whole_text()
        return [] if self.row or end % 3 else whole[end : end + 1]


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("script, batch_size", [(Script, 1), (Script, 3), (Brief, 2)])
@pytest.mark.parametrize("name", [name for name in INNER if name not in ("autoregressive", "auto", "lookup")])
def test_the_other_drafter_goes_on_as_if_it_had_been_asked(
    target, small, wholes, name, script, batch_size, monkeypatch
):
    """Each of its drafts is the one that it makes behind a prompt of the same text, from the same keys and
    values."""
    monkeypatch.setattr(TreeDrafter, "learn", Drafter.learn)  # or a head would trust itself less or more
    drafter = Scripted(INNER[name](target, small), wholes[SAMPLINGS[0]], script=script)
    texts(target, PROMPTS, drafter, batch_size=batch_size)
    alone = INNER[name](target, small)
    decoder, seen = Decoder(target, alone, max_length=128, compile=False), set()
    assert len(drafter.own) > 10
    for text, draft, cached in drafter.own:
        decoder.prefill(0, text[:-1], Request(Sampling(), 0))
        with torch.no_grad():
            assert draft == shape(alone.propose(decoder.state), 0)
        torch.testing.assert_close(cached, entries(alone, 0, len(text) - 1))
        seen.add(len(draft))
    assert max(seen) > 1


def test_it_is_asked_only_where_a_text_has_a_choice(target, small, wholes):
    whole = wholes[SAMPLINGS[0]]
    for batch_size in (1, 3):
        drafter, stats = Scripted(INNER["sequential"](target, small), whole), Stats()
        texts(target, PROMPTS, drafter, batch_size=batch_size, stats=stats)
        asked = [not all(flags) for _, flags in drafter.drafts if flags]
        names = {draft.drafter for draft, flags in drafter.drafts if flags and all(flags)}
        assert 0 < sum(asked) < len(asked) and names == {"forced"}
        own = sum(flags.count(False) for _, flags in drafter.drafts)
        assert len(drafter.own) == len(drafter.learnt) == own
        assert all(row.drafted == 3 for row in drafter.learnt)  # it learns from no others
        for history in drafter.history:
            if batch_size == 1:  # what it has missed is fed to it once, and only when it is asked
                assert re.fullmatch("(text (own |(forced )+caught up own )*(forced )*)*", history)
            else:  # and in a batch, only behind two forced drafts
                assert re.search("(?<!forced forced )caught up", history) is None
        mixed = [draft for draft, flags in drafter.drafts if len(set(flags)) == 2]
        assert bool(mixed) == (batch_size > 1)


def test_all_forced_tokens_are_accepted_and_counted(target, wholes):
    whole = wholes[SAMPLINGS[0]]
    drafter = Scripted(Drafter(), whole)
    decoder = Decoder(target, drafter, max_length=128, compile=False)
    for _ in range(2):
        drafter.drafts, stats = [], Stats()
        collect(decoder.run(PROMPTS, 40, stats=stats), len(PROMPTS))
        drafted = [int((draft.parent >= 0).sum()) for draft, _ in drafter.drafts]
        assert drafter.accepted == sum(drafted) >= stats.accepted_tokens > 0  # a budget may cut some
        assert stats.drafter_histogram == {"forced": sum(count > 0 for count in drafted)}


def test_a_conversation_goes_on_where_the_other_drafter_was_left_behind(target, small, wholes):
    """The next prompt shares tokens with the last text that the small model has never read."""
    [whole, *_] = wholes[SAMPLINGS[0]]
    drafter = Scripted(SequentialDrafter(small, 3), [whole])
    decoder = Decoder(target, drafter, max_length=128, compile=False)
    for script in drafter.scripts:
        script.forced = lambda limit: whole[(end := int(decoder.state.length[0]) + 1) : end + limit]
    collect(decoder.run([whole[:5]], 30, reuse=True), 1)
    assert "own" not in drafter.history[0]
    drafter.scripts[0].forced = lambda limit: []
    starts, prefill = [], SequentialDrafter.prefill
    drafter.inner.prefill = lambda *args: (starts.append(args[3]), prefill(drafter.inner, *args))
    collect(decoder.run([whole[:30]], 2, reuse=True), 1)
    assert starts == [5]
    text, _, cached = drafter.own[0]
    alone = SequentialDrafter(small, 3)
    decoder = Decoder(target, alone, max_length=128, compile=False)
    decoder.prefill(0, text[:-1], Request(Sampling(), 0))
    with torch.no_grad():
        alone.propose(decoder.state)
    torch.testing.assert_close(cached, entries(alone, 0, len(text) - 1))


def test_without_matchers_it_is_the_other_drafter(target, small, wholes):
    drafter, alone = Scripted(INNER["sequential"](target, small), []), INNER["sequential"](target, small)
    start = drafter.start

    def without(level):
        start(level)
        drafter.controls.matchers = [None] * level.setup.batch_size
        drafter.scripts = [SimpleNamespace(forced=lambda limit: [])] * level.setup.batch_size

    drafter.start = without
    ours, theirs = Stats(), Stats()
    assert texts(target, PROMPTS, drafter, batch_size=2, stats=ours) == texts(
        target, PROMPTS, alone, batch_size=2, stats=theirs
    )
    assert ours.accepted_tokens == theirs.accepted_tokens and ours.drafted_tokens == theirs.drafted_tokens
    assert drafter.slack == FORCED + 1 and drafter.max_nodes == FORCED + 1 and drafter.draft_sizes() == [4, 9]
