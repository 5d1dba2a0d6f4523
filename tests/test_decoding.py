"""The loop: whatever drafts, the text is the one that autoregressive decoding gives, and no cache ever goes
stale."""

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import (
    NEEDS_EQUAL_ROWS,
    SHIPPED_HEAD,
    SHIPPED_SMALL,
    SHIPPED_TARGET,
    collect,
    find_repetition,
    guessing_block_head,
    guessing_head,
    held_out_prompts,
    noisy_copy,
    random_model,
    random_prompts,
    texts,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from auto import ALL, AdaptiveLookup, AutoDrafter
from checkpoints import load_model
from costs import Stats
from dflash import BlockDrafter
from drafts import Draft, Drafter, State, accept, tree_geometry
from eagle import TreeDrafter
from gpt_spec import (
    Decoder,
    HierarchicalDrafter,
    Level,
    LookupDrafter,
    SequentialDrafter,
    Text,
    TextIndex,
    cache_length,
    generate,
)
from heads import load_head
from model import BadInput, Transformer, causal_attention
from packing import PRECISIONS, share_weights
from rope import RopeScaling
from runtime import Recorded, Runtime
from sampling import Sampling

GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=7)
WARM = Sampling(temperature=0.7, top_p=0.95, seed=8)
PROMPTS = random_prompts([5, 1, 17, 9, 30])


class RandomTreeDrafter(Drafter):
    """Branching drafts: every step another random tree, with true tokens of the target sprinkled in."""

    max_nodes, needs_host = 9, True

    def __init__(self, model, luck: float = 0.7):
        self.oracle, self.luck = SequentialDrafter(model, 4), luck
        self.generator = torch.Generator().manual_seed(3)

    def start(self, level):
        super().start(level)
        self.oracle.start(level)

    def prefill(self, state, row, tokens, start):
        self.oracle.prefill(state, row, tokens, start)

    def propose(self, state, n=None):
        chain = self.oracle.propose(state).tokens  # [B, 5]: root and what the target itself will say
        batch, n = len(chain), n or self.max_nodes
        tokens = torch.randint(61, (batch, n), generator=self.generator)
        tokens[:, 0] = chain[:, 0]
        parent = torch.full((batch, n), -1)
        for b in range(batch):
            spot = sorted((torch.randperm(n - 1, generator=self.generator)[:4] + 1).tolist())
            on_chain = dict(zip([0, *spot], range(5)))  # node -> place in the chain, scattered over the nodes
            for node in range(1, n):
                above = list(on_chain)[on_chain[node] - 1] if node in on_chain else None
                lucky = torch.rand((), generator=self.generator) < self.luck
                if above is not None and lucky:
                    tokens[b, node] = chain[b, on_chain[node]]
                parent[b, node] = (
                    above if above is not None else torch.randint(node, (), generator=self.generator)
                )
        return Draft(tokens, parent, n - 1)


class RestlessDrafter(AutoDrafter):
    """Another drafter every few tokens, whatever it costs."""

    TURN = 5

    def choose_drafter(self, state):
        names = list(self.drafters)
        self.rates = dict.fromkeys(names, 1.0)
        return names[(names.index(self.current) + 1) % len(names)], False


def all_drafters(target, kind=AutoDrafter) -> AutoDrafter:
    """One that chooses among all kinds; a hierarchy on the target's cache and one on its own, too.

    Every step is thought to cost the same: measuring takes long, and is tested in test_auto.py.
    """
    noisy = noisy_copy(target)

    def tree(model, size=None):
        return TreeDrafter(guessing_head(model), size, tree_depth=3, tree_topk=3)

    drafter = kind(
        {
            "lookup": AdaptiveLookup(),
            "sequential": SequentialDrafter(noisy, None),
            "tree": tree(target),
            "blocks": BlockDrafter(guessing_block_head(target, True), 9),
            "qspec": SequentialDrafter(noisy, None, shares_cache=True),
            "hierarchical": HierarchicalDrafter(noisy, tree(noisy, 9), 4),
            "own middle": HierarchicalDrafter(noisy, tree(noisy, 9), 4, shares_cache=True),
        }
    )
    drafter.needs_costs = False
    return drafter


class Made(dict):
    """Values that are made when they are asked for, each time anew."""

    def __getitem__(self, name):
        return super().__getitem__(name)()


def drafters(target) -> dict[str, Drafter]:
    def noisy():
        return noisy_copy(target)

    def tree(*shape, **noise):
        return TreeDrafter(guessing_head(target, **noise), *shape)

    def blocks(shifted, *shape, **noise):
        return BlockDrafter(guessing_block_head(target, shifted, **noise), *shape)

    # What "another precision" of the same weights changes in qspec is noise here: see test_qspec.py.
    makers = {
        "choosing": lambda: all_drafters(target),
        "restless": lambda: all_drafters(target, RestlessDrafter),
        "lookup": LookupDrafter,
        "random": lambda: SequentialDrafter(random_model(seed=1), 3),
        "itself": lambda: SequentialDrafter(target, 4),
        "noisy": lambda: SequentialDrafter(noisy(), 4),
        "unsure": lambda: SequentialDrafter(noisy(), 3, draft_confidence=0.5),
        "qspec": lambda: SequentialDrafter(noisy(), 4, shares_cache=True),
        "unsure qspec": lambda: SequentialDrafter(noisy(), 4, 0.5, shares_cache=True),
        "qspec of one token": lambda: SequentialDrafter(noisy(), 1, shares_cache=True),
        "qspec, never sure": lambda: SequentialDrafter(noisy(), 2, 1.0, shares_cache=True),
        "bush": lambda: RandomTreeDrafter(target),
        "tree": lambda: tree(9, 3, 3),
        "auto": lambda: tree(None, 2, 3),
        "sure": lambda: tree(6, 3, 2, noise=0.0),
        "blocks": lambda: blocks(False, 9),
        "shifted blocks": lambda: blocks(True, 9, None, 3),
        "sized blocks": lambda: blocks(True, None, 3, 2, noise=0.0),
    }
    return Made(makers | hierarchies(target))


def hierarchies(target) -> dict[str, Callable[[], Drafter]]:
    """Middle models that agree with the target sometimes, always and never; other drafters inside; three
    levels; and a middle that shares the target's cache: what "another precision" changes is noise here."""
    middle, own = HierarchicalDrafter, {"shares_cache": True}

    def noisy():
        return noisy_copy(target)

    def tree(model, noise=0.3):
        return TreeDrafter(guessing_head(model, noise), tree_size=9, tree_depth=3, tree_topk=3)

    def under_trees(model, *more, **options):
        return middle(model, tree(model), *more, **options)

    def of_blocks(model, shifted, **options):
        return middle(model, BlockDrafter(guessing_block_head(model, shifted), 9), 4, **options)

    def inner(drafter, *more, **options):
        return middle(noisy_copy(target, 0.3), drafter, *more, **options)

    return {
        "middle": lambda: under_trees(noisy(), 4),
        "equal middle": lambda: middle(copy.deepcopy(target), tree(target, noise=0.0), 5),
        "strange middle": lambda: under_trees(random_model(seed=1), 1),
        "middle of two models": lambda: middle(noisy(), SequentialDrafter(noisy_copy(target, 0.3), 3), 4),
        "middle alone": lambda: middle(noisy(), Drafter(), 3),
        "three levels": lambda: middle(noisy(), under_trees(noisy_copy(target, 0.3), 2), 5),
        "shared": lambda: under_trees(noisy(), 4, **own),
        "shared, three levels": lambda: middle(noisy(), inner(SequentialDrafter(target, 2), 3), 4, **own),
        "shared twice": lambda: middle(noisy(), inner(tree(target), 2, **own), 5, **own),
        "blocks in the middle": lambda: of_blocks(noisy(), True),
        "shared blocks": lambda: of_blocks(noisy(), False, **own),
        "qspec in the middle": lambda: middle(
            noisy(), SequentialDrafter(noisy_copy(target, 0.3), 2, **own), 4
        ),
    }


def qspec(target, precision: str, k: int = 3, confidence: float = 0.0) -> SequentialDrafter:
    """The target drafts with its own weights and cache, in a lower precision."""
    return SequentialDrafter(share_weights(target, precision), k, confidence, shares_cache=True)


FLAT = [
    "choosing",
    "restless",
    "lookup",
    "random",
    "itself",
    "noisy",
    "unsure",
    "bush",
    "tree",
    "auto",
    "sure",
]
FLAT += ["qspec", "unsure qspec", "qspec of one token", "qspec, never sure"]
FLAT += ["blocks", "shifted blocks", "sized blocks"]
NESTED = ["middle", "equal middle", "strange middle", "middle of two models", "middle alone"]
NESTED += ["three levels", "shared", "shared, three levels", "shared twice", "qspec in the middle"]
NESTED += ["blocks in the middle", "shared blocks"]
NAMES = FLAT + NESTED


@torch.no_grad()
def recompute_keys(model, tokens: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer the keys and values [n, G, D] of a whole text, without a cache."""
    found = []
    if not tokens:
        return found

    def record(layer, q, k, v):
        found.append((k[0], v[0]))
        return causal_attention(layer, q, k, v)

    model.recompute(torch.tensor([tokens]), record)
    return found


def assert_cache_is_fresh(model, cache, row: int, text: list[int], length: int) -> None:
    """Slots below `length` hold exactly what a recomputation of the text would write (to rounding)."""
    for layer, (keys, values) in enumerate(recompute_keys(model, text[:length])):
        torch.testing.assert_close(cache.keys[layer][row, :length], keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.values[layer][row, :length], values, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def plain_texts(target) -> dict[float, list[list[int]]]:
    """What plain decoding says after each of PROMPTS, by temperature."""
    return {s.temperature: texts(target, PROMPTS, sampling=s) for s in (GREEDY, WARM, SAMPLED)}


@pytest.mark.parametrize("sampling", [GREEDY, WARM, SAMPLED], ids=["greedy", "warm", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_every_drafter_gives_the_autoregressive_text(target, plain_texts, name, sampling):
    expected = plain_texts[sampling.temperature]
    assert len({tuple(text) for text in expected}) == len(PROMPTS)  # the texts are worth comparing
    drafter = drafters(target)[name]
    assert texts(target, PROMPTS, drafter, sampling) == expected  # one after another, five refills of one row
    assert texts(target, PROMPTS, drafters(target)[name], sampling, batch_size=4) == expected
    if name in FLAT:  # rows are refilled; in hierarchies, by the test of caches below
        assert texts(target, PROMPTS, drafters(target)[name], sampling, batch_size=2) == expected


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("precision", ["bf16", *PRECISIONS])
def test_every_precision_gives_the_autoregressive_text(precision):
    """Token for token, not up to near-ties: rows of our kernels do not depend on each other.

    Two held-out prompts; `python bench.py exact` takes twenty.
    """
    model, small = load_model(SHIPPED_TARGET, precision), load_model(SHIPPED_SMALL, precision)
    head = load_head(SHIPPED_HEAD, model, precision)
    prompts = held_out_prompts(2)
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        expected = texts(model, prompts, sampling=sampling, max_new_tokens=200)
        for drafter in (SequentialDrafter(small, 4), LookupDrafter(4)):
            assert texts(model, prompts, drafter, sampling, 200) == expected
        assert texts(model, prompts, SequentialDrafter(small, 4), sampling, 200, batch_size=2) == expected
        begun = [text[:100] for text in expected]
        assert texts(model, prompts, TreeDrafter(head), sampling, 100, batch_size=2) == begun


@NEEDS_EQUAL_ROWS
def test_compiled_too_in_a_quantized_precision(rotated_target):
    """And rotated: the online rotations are part of the compiled graphs."""
    model, small = load_model(rotated_target, "w4a8"), load_model(SHIPPED_SMALL, "w4a8")
    prompts, sampling = [list(range(5, 40)), [1]], Sampling(temperature=1.0)
    expected = texts(model, prompts, None, sampling, 100, compile=True)
    assert model.rotation is not None
    assert texts(model, prompts, SequentialDrafter(small, 2), sampling, 100, compile=True) == expected
    tree = TreeDrafter(load_head(SHIPPED_HEAD, model, "w4a8"), 12, 3, 3)
    assert texts(model, prompts, tree, sampling, 100, compile=True) == expected
    decoders = [Decoder(model, None, sampling, 256), Decoder(model, qspec(model, "w4a4", 2), sampling, 256)]
    plain, ours = ((*d.cache.keys, *d.cache.values) for d in decoders)
    for prompt in prompts:
        alone, drafted = (collect(d.run([prompt], 100), 1)[0] for d in decoders)
        assert alone == drafted
        valid = len(prompt) + 99
        assert all(torch.equal(a[:, :valid], b[:, :valid]) for a, b in zip(plain, ours))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "name", ["lookup", "noisy", "qspec", "tree", "auto", "blocks", "sized blocks", "middle", "shared"]
)
def test_every_drafter_gives_the_autoregressive_text_on_a_gpu(target, name, compile):
    target = copy.deepcopy(target).cuda()
    expected = texts(target, PROMPTS, sampling=SAMPLED)
    assert texts(target, PROMPTS, drafters(target)[name], SAMPLED, batch_size=2, compile=compile) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("name", ["autoregressive", "noisy", "tree"])
def test_steps_on_a_gpu_that_begin_before_the_last_one_is_read(target, name):
    """Stop tokens, and rows that take the next prompt, while a graph is a step ahead."""
    target = copy.deepcopy(target).cuda()
    drafter = None if name == "autoregressive" else drafters(target)[name]
    expected = texts(target, MANY, None, SAMPLED, 24, compile=False, stop_ids=STOPS)
    assert texts(target, MANY, drafter, SAMPLED, 24, batch_size=4, compile=True, stop_ids=STOPS) == expected


@pytest.mark.parametrize(
    "name, low, high",
    [
        *(("random", 0.0, 0.2), ("noisy", 0.2, 0.9), ("itself", 0.99, 1.0), ("qspec", 0.2, 0.9)),
        *(("tree", 0.2, 0.95), ("sure", 0.8, 1.0)),
        *(("middle", 0.2, 0.95), ("equal middle", 0.99, 1.0), ("strange middle", 0.0, 0.2)),
    ],
)
def test_drafters_cover_low_mixed_and_full_acceptance(target, name, low, high):
    """The equality test means little if nothing, or everything, was accepted."""
    stats = Stats()
    texts(target, PROMPTS, drafters(target)[name], SAMPLED, stats=stats)
    assert low <= stats.acceptance_by_position[0] <= high


def assert_caches_are_fresh(decoder: Decoder, texts_so_far: list[list[int]]) -> None:
    """All caches of every active row, whichever of the texts it holds."""
    for row in decoder.state.active.nonzero().flatten().tolist():
        text = decoder.state.tokens[row, : int(decoder.state.length[row]) + 1].tolist()
        assert text in texts_so_far  # all that was emitted, up to and including the root
        assert_level_is_fresh(decoder, decoder.model, row, text)


def assert_level_is_fresh(
    level: Level, model: Transformer, row: int, text: list[int], length: int | None = None
) -> None:
    """Keys, values and features of a text whose last token is the root, and those that its drafter made.

    They are those of `model`: the level's own, or the target, whose cache it shares. `length`: how much of it
    the level above has, which may have less than the text by now, where all that it said was accepted.
    """
    length = min(int(level.state.length[row]), len(text) - 1 if length is None else length)
    drafter = level.drafter
    if isinstance(drafter, AutoDrafter):
        assert all(known[row] == ALL or known[row] <= length for known in drafter.known.values())
        drafter = drafter.drafters[drafter.current]
    assert length >= len(text) - 1 - level.behind
    assert_cache_is_fresh(model, level.cache, row, text, length)
    if level.taps:
        tokens, positions = torch.tensor([text[:length]]), torch.arange(length)[None]
        features = model(tokens, positions, causal_attention, level.taps)[1]
        torch.testing.assert_close(level.state.features[row, :length], features[0], rtol=1e-4, atol=1e-5)
    if isinstance(drafter, SequentialDrafter) and not drafter.shares_cache:
        assert_cache_is_fresh(drafter.model, drafter.cache, row, text, length - 1)
    if isinstance(drafter, TreeDrafter):
        fresh = assert_block_is_fresh if isinstance(drafter, BlockDrafter) else assert_head_is_fresh
        fresh(level, drafter, row, text)
    if isinstance(drafter, HierarchicalDrafter):
        inside = drafter.level
        assert_level_is_fresh(inside, model if drafter.shares_cache else inside.model, row, text, length)


def assert_head_is_fresh(level: Level, drafter: TreeDrafter, row: int, text: list[int]) -> None:
    """The keys and values that an EAGLE head made of the features, but those that it is going to renew."""
    rows = len(text) - 1 - drafter.window
    if rows > 0:
        tokens, positions = torch.tensor([text[1 : rows + 1]]), torch.arange(rows)[None]
        features = drafter.head.fuse(drafter_state(level, drafter).features[row : row + 1, :rows])

        def attend(layer, q, k, v):
            torch.testing.assert_close(drafter.cache.keys[layer][row, :rows], k[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(drafter.cache.values[layer][row, :rows], v[0], rtol=1e-4, atol=1e-5)
            return causal_attention(layer, q, k, v)

        drafter.head(tokens, features, positions, attend)


def assert_block_is_fresh(level: Level, drafter: BlockDrafter, row: int, text: list[int]) -> None:
    """The same of a block head, whose keys and values depend on the features alone."""
    rows = len(text) - 1 - drafter.window
    if rows > 0:
        context = drafter.head.fuse(drafter_state(level, drafter).features[row : row + 1, :rows])
        for layer, (keys, values) in enumerate(drafter.head.keys(context, torch.arange(rows)[None])):
            ours = (drafter.cache.keys[layer][row, :rows], drafter.cache.values[layer][row, :rows])
            torch.testing.assert_close(ours, (keys[0], values[0]), rtol=1e-4, atol=1e-5)


def drafter_state(level: Level, drafter: Drafter) -> State:
    """The texts with the features that this drafter reads."""
    auto = level.drafter
    return auto.views[auto.current] if isinstance(auto, AutoDrafter) else level.state


def check_every_step(target, drafter: Drafter, sampling: Sampling, batch_size: int = 1) -> None:
    """Five prompts of different lengths; with fewer rows, rows are refilled."""
    decoder = Decoder(target, drafter, sampling, 128, batch_size, compile=False)
    so_far = [list(prompt) for prompt in PROMPTS]
    steps = 0
    for emissions in decoder.run(PROMPTS, max_new_tokens=20):
        for emission in emissions:
            so_far[emission.prompt_index] += emission.tokens
        assert_caches_are_fresh(decoder, so_far)
        steps += 1
    assert steps > 5


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_caches_equal_a_recomputation_after_every_step(target, name, sampling, batch_size):
    check_every_step(target, drafters(target)[name], sampling, batch_size)


@pytest.fixture(scope="module")
def yarn_target() -> Transformer:
    """Stretched from 16 positions to 256; its texts leave the 16 behind."""
    return random_model(rope_scaling=RopeScaling("yarn", 16.0, 16, attention_factor=1.3))


@pytest.mark.parametrize("name", ["lookup", "noisy", "qspec", "tree", "middle", "choosing"])
def test_yarn(yarn_target, name):
    """One drafter of every method: texts, and all caches after every step against a recomputation."""
    expected = texts(yarn_target, PROMPTS, sampling=SAMPLED)
    weaker = Transformer(replace(yarn_target.config, rope_scaling=RopeScaling("yarn", 16.0, 16)))
    weaker.requires_grad_(False).load_state_dict(yarn_target.state_dict())
    assert texts(weaker, PROMPTS, sampling=SAMPLED) != expected  # the factor reaches the text
    assert texts(yarn_target, PROMPTS, drafters(yarn_target)[name], SAMPLED, batch_size=2) == expected
    check_every_step(yarn_target, drafters(yarn_target)[name], SAMPLED, batch_size=2)


def test_yarn_compiled(yarn_target):
    """The factor reaches compiled code, too."""
    positions = torch.arange(0, 256, 5)[None]
    for ours, expected in zip(torch.compile(yarn_target.rope)(positions), yarn_target.rope(positions)):
        torch.testing.assert_close(ours, expected)


def test_a_stale_cache_is_seen(target, monkeypatch):
    """The recomputation test can fail: a drafter that does not feed the last draft of a whole run leaves a
    hole."""
    feed_two = SequentialDrafter.write

    def feed_one(self, fed, start, last, *rest):
        return feed_two(self, fed[:, -1:], start + last, torch.zeros_like(last), *rest)

    monkeypatch.setattr(SequentialDrafter, "write", feed_one)
    with pytest.raises(AssertionError):
        check_every_step(target, drafters(target)["itself"], GREEDY)


@pytest.mark.parametrize("kind, name", [(SequentialDrafter, "noisy"), (BlockDrafter, "blocks")])
def test_a_skipped_drafter_prefill_is_seen(target, monkeypatch, kind, name):
    """Text equality cannot see that a drafter kept the cache of another text; the recomputation does."""
    whole = kind.prefill
    first = []

    def only_once(self, state, row, tokens, start):
        if not first:
            first.append(whole(self, state, row, tokens, start))

    monkeypatch.setattr(kind, "prefill", only_once)
    with pytest.raises(AssertionError):
        check_every_step(target, drafters(target)[name], GREEDY)


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_token_inside_a_run_cuts_it(target, name):
    [free] = texts(target, PROMPTS[:1], sampling=SAMPLED)
    for stop in dict.fromkeys(free[3:12]):
        stats, last = Stats(), None
        drafter = drafters(target)[name]
        for emissions in generate(
            target, PROMPTS[0], drafter, SAMPLED, 40, compile=False, stop_ids=[stop], stats=stats
        ):
            last = emissions[-1]
        expected = free[: free.index(stop) + 1]
        assert stats.new_tokens == len(expected)
        assert last.tokens[-1] == stop and last.finish_reason == "stop"
        assert stats.accepted_tokens <= len(expected) - 1


@pytest.mark.parametrize("budget", range(1, 8))
def test_the_budget_cuts_inside_a_run(target, budget):
    [free] = texts(target, PROMPTS[:1])
    stats = Stats()
    [text] = texts(target, PROMPTS[:1], SequentialDrafter(target, 4), max_new_tokens=budget, stats=stats)
    assert text == free[:budget]
    assert stats.new_tokens == budget and stats.accepted_tokens <= max(budget - 1, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_may_fill_the_whole_context(name):
    model = random_model(max_context=48)
    expected = texts(model, PROMPTS, max_new_tokens=1000)
    assert [len(p) + len(t) for p, t in zip(PROMPTS, expected)] == [48] * 5
    assert texts(model, PROMPTS, drafters(model)[name], max_new_tokens=1000, batch_size=5) == expected


def test_prompt_i_of_a_batch_is_that_prompt_alone_with_seed_plus_i(target):
    together = texts(target, PROMPTS, SequentialDrafter(noisy_copy(target)), SAMPLED, batch_size=3)
    for i, prompt in enumerate(PROMPTS):
        alone = Sampling(SAMPLED.temperature, SAMPLED.top_k, SAMPLED.top_p, SAMPLED.seed + i)
        assert texts(target, [prompt], sampling=alone) == [together[i]]


MANY, STOPS = random_prompts([1 + 7 * i % 40 for i in range(64)]), [3, 19]


@pytest.fixture(scope="module")
def many_texts(target) -> list[list[int]]:
    """What plain decoding says after each of MANY, alone with its own seed, up to one of two stop tokens."""
    alone = [replace(SAMPLED, seed=SAMPLED.seed + i) for i in range(len(MANY))]
    return [texts(target, [p], None, own, 24, stop_ids=STOPS)[0] for p, own in zip(MANY, alone)]


WHOLE = ["autoregressive", "noisy", "qspec", "tree", "blocks"]  # whose steps can be one graph


def runs_ahead(target, name: str, batch_size: int) -> tuple[Decoder, list[str]]:
    """As on a GPU, where a step is a graph: a decoder, and what it does."""
    drafter = None if name == "autoregressive" else drafters(target)[name]
    decoder, steps = Decoder(target, drafter, SAMPLED, 128, batch_size, compile=False), []
    assert not decoder.drafter.needs_host
    begin, read, decoder.runs_ahead = decoder.begin, decoder.read, True
    decoder.begin = lambda: steps.append("begin") or begin()
    decoder.read = lambda turn: steps.append("read") or read(turn)
    return decoder, steps


@pytest.mark.parametrize("name", WHOLE)
def test_steps_that_begin_before_the_last_one_is_read(target, many_texts, name):
    """What is decoded too far is not emitted, and not in the way of the text that comes next in its row."""
    (decoder, steps), stats = runs_ahead(target, name, 3), Stats()
    assert collect(decoder.run(MANY, 24, STOPS, stats=stats), len(MANY)) == many_texts
    assert "".join(steps).count("beginbeginread") > 15
    assert stats.new_tokens == sum(map(len, many_texts))


@pytest.mark.parametrize("name", WHOLE)
def test_a_conversation_goes_on_from_a_text_that_was_decoded_too_far(target, many_texts, name):
    stopped = next(i for i, text in enumerate(many_texts) if text[-1] in STOPS and 10 < len(text) < 18)
    own = replace(SAMPLED, seed=SAMPLED.seed + stopped)
    longer = [MANY[stopped] + many_texts[stopped] + [5, 7]]
    expected = texts(target, longer, sampling=own, max_new_tokens=24)
    decoder, steps = runs_ahead(target, name, 1)
    first = decoder.run([MANY[stopped]], 100, STOPS, seeds=[own.seed])
    assert collect(first, 1) == [many_texts[stopped]]
    assert steps.count("begin") == steps.count("read") + 1  # the step too far
    assert collect(decoder.run(longer, 24, reuse=True, seeds=[own.seed]), 1) == expected


class Blind(TorchDispatchMode):
    """The host may neither read a tensor nor make one of what it knows while a graph is recorded."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(index is None or index.dtype == torch.int64 for index in args[1])  # masks are read
        return function(*args, **(kwargs or {}))


def refuse(*_, **__):
    raise AssertionError("what a GPU does not do while a graph is recorded")


class Trace:
    """What a CUDA graph does, without a GPU: the operations of one call, again and again, on the tensors that
    it used. What Python decided stays decided, and its numbers stay what they were."""

    recording = False

    def __init__(self, function, arguments: list):
        self.inputs, self.replays = [a for a in arguments if isinstance(a, torch.Tensor)], 0

        def run(*tensors):
            left = iter(tensors)
            self.outputs = function(*(next(left) if isinstance(a, torch.Tensor) else a for a in arguments))
            return tuple(self.outputs)

        with Blind(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trace, "recording", True)
            for owner, name in ((torch.Tensor, "tolist"), (torch.Tensor, "numpy"), (torch, "tensor")):
                patch.setattr(owner, name, refuse)
            self.module = make_fx(run)(*self.inputs)

    def replay(self):
        self.replays += 1
        if self.replays > 1:  # a GPU runs nothing while it records; here, that was the first replay
            for mine, new in zip(self.outputs, self.module(*self.inputs)):
                mine.copy_(new)


@pytest.fixture
def recordings(monkeypatch) -> list[Trace]:
    """All graphs that are recorded: traces."""
    traces = []

    def record(self, arguments):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        traces.append(Trace(self.function, copies))
        return traces[-1], traces[-1].inputs, traces[-1].outputs

    plain = Trace.replay

    def replay(self):
        for other in traces:  # all share their memory, so what others left there is gone
            for output in other.outputs if other is not self else ():
                output.fill_(7)
        plain(self)

    monkeypatch.setattr(Trace, "replay", replay)
    monkeypatch.setattr(Recorded, "record", record)
    monkeypatch.setattr(Runtime, "records", True)
    monkeypatch.setattr(Runtime, "pool", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Trace.recording)
    return traces


@pytest.fixture(scope="module")
def short_texts(target) -> dict[Sampling, list[list[int]]]:
    return {sampling: texts(target, PROMPTS, None, sampling, 30) for sampling in (GREEDY, SAMPLED)}


@pytest.mark.parametrize(
    "name, sampling",
    [
        *((name, SAMPLED) for name in [*WHOLE, "unsure", "auto", "lookup", "shared", "choosing"]),
        *((name, GREEDY) for name in ["tree", "middle"]),
    ],
)
def test_recorded_steps(target, short_texts, name, sampling, recordings):
    """Whole steps, or what they consist of, as on a GPU: recorded once and replayed."""
    drafter = None if name == "autoregressive" else drafters(target)[name]
    decoder = Decoder(target, drafter, sampling, 128, batch_size=2, compile=False)
    decoder.warm_up()
    assert collect(decoder.run(PROMPTS, 30), len(PROMPTS)) == short_texts[sampling]
    assert decoder.runs_ahead == (name in WHOLE) and sum(trace.replays for trace in recordings) > 20
    assert len(recordings) == 1 or name not in WHOLE
    if name == "tree":  # what a graph must not have taken for a constant
        assert float(decoder.drafter.trust_tensor) == pytest.approx(decoder.drafter.trust) != 1.0


@pytest.mark.parametrize("name", NAMES)
def test_64_prompts_through_8_rows(target, many_texts, name):
    """Every text is that of its prompt alone, and no row is idle while a prompt waits."""
    assert len({len(text) for text in many_texts}) > 15  # rows finish at different times
    decoder = Decoder(target, drafters(target)[name], SAMPLED, 128, batch_size=8, compile=False)
    begin, begun, idle, stats = decoder.begin, set(), [], Stats()

    def watched():
        idle.append(len(begun) < len(MANY) and not decoder.state.active.all())
        return begin()

    decoder.begin, out = watched, [[] for _ in MANY]
    for emissions in decoder.run(MANY, 24, STOPS, stats=stats):
        for emission in emissions:
            out[emission.prompt_index] += emission.tokens
            begun.add(emission.prompt_index)
    assert out == many_texts
    assert len(idle) > 10 and not any(idle)
    assert stats.row_forwards == 8 * len(idle) and 0.8 < stats.occupancy < 1


@pytest.mark.parametrize("name", NAMES)
def test_texts_that_come_and_go_between_steps(target, name):
    """Prompts are read seven tokens at a time, beside rows that take steps. Two texts are cancelled half way,
    and one with half its prompt, which then comes again and finds that half in its row."""
    prompts = random_prompts([40, 3, 25, 1, 50, 9, 17])
    alone = texts(target, prompts, sampling=SAMPLED, max_new_tokens=20)
    decoder = Decoder(target, drafters(target)[name], SAMPLED, 90, batch_size=3, compile=False)
    decoder.count_into(stats := Stats())
    requests = decoder.requests(prompts)
    coming = [Text(i, prompt, request, 20) for i, (prompt, request) in enumerate(zip(prompts, requests))]
    waiting, out, shared = deque(), [[] for _ in prompts], 0
    while coming or waiting or any(decoder.rows):
        waiting.extend([coming.pop(0)] if coming and len(waiting) < 2 else [])
        for emissions in decoder.advance(waiting, lambda number, token: False, reuse=True, chunk=7):
            for emission in emissions:
                out[emission.prompt_index] += emission.tokens
        for row, text in enumerate(decoder.rows):
            if text is None:
                continue
            number, said = text.prompt_index, out[text.prompt_index]
            shared = text.shared if number == 4 else shared
            if text.is_read or not isinstance(decoder.drafter, AutoDrafter):  # which may not be fed yet
                assert_level_is_fresh(decoder, target, row, (prompts[number] + said)[: text.length + 1])
            if number in (2, 5) and len(said) > 4:
                decoder.leave(row)
            elif number == 4 and text.length > 20 and not shared and not said:
                decoder.leave(row)
                waiting.appendleft(Text(4, prompts[4], requests[4], 20))
    for number, (text, whole) in enumerate(zip(out, alone)):
        assert text == whole if number not in (2, 5) else text == whole[: len(text)]
    assert shared >= 20 and stats.outputs == len(prompts)
    assert decoder.rows == [None] * 3 and not decoder.state.active.any()


@pytest.mark.parametrize(
    "layers, k, calls",
    [
        *((1, 3, [1, 1, 1]), (2, 4, [1, 1, 1, 1]), (4, 5, [2, 2, 1]), (7, 7, [3, 2, 2])),
        *((8, 4, [4]), (9, 7, [4, 3]), (99, 1, [1])),
    ],
)
@pytest.mark.parametrize("shares_cache", [False, True])
def test_a_call_drafts_as_many_tokens_as_are_worth_compiling(
    target, layers, k, calls, shares_cache, monkeypatch
):
    """Text and acceptance do not depend on it."""
    monkeypatch.setattr("gpt_spec.UNROLLED_LAYERS", layers)
    drafter, stats = SequentialDrafter(noisy_copy(target), k, shares_cache=shares_cache), Stats()
    assert drafter.calls == calls
    expected = texts(target, PROMPTS[:2], sampling=SAMPLED)
    assert texts(target, PROMPTS[:2], drafter, SAMPLED, batch_size=2, stats=stats) == expected
    monkeypatch.undo()
    whole = SequentialDrafter(noisy_copy(target), k, shares_cache=shares_cache)
    texts(target, PROMPTS[:2], whole, SAMPLED, batch_size=2, stats=(again := Stats()))
    assert stats.accepted_histogram == again.accepted_histogram


def test_a_long_prompt_is_prefilled_in_chunks(target, monkeypatch):
    prompt = random_prompts([50])
    expected = texts(target, prompt)
    monkeypatch.setattr("drafts.PREFILL_CHUNK", 7)
    assert texts(target, prompt, SequentialDrafter(target, 3)) == expected


def test_an_abandoned_run_leaves_no_trace(target):
    decoder = Decoder(target, SequentialDrafter(target), max_length=80, batch_size=2, compile=False)
    next(decoder.run(PROMPTS[:2], 30))
    again = [e.tokens for emissions in decoder.run(PROMPTS[2:3], 30) for e in emissions]
    assert [sum(again, [])] == texts(target, PROMPTS[2:3], max_new_tokens=30)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_reuses_the_cache(target, name):
    drafter = drafters(target)[name]
    decoder = Decoder(target, drafter, GREEDY, max_length=160, compile=False)
    history = PROMPTS[0]
    for turn in random_prompts([3, 1, 8]):
        history = history + turn
        answer = []
        for emissions in decoder.run([history], 12, reuse=True):
            answer += emissions[0].tokens
            assert_caches_are_fresh(decoder, [history + answer])
        assert [answer] == texts(target, [history], max_new_tokens=12)
        history = history + answer
    assert decoder.shared_prefix(0, history + [1]) >= len(history) - 3  # nearly all of it would be reused


@pytest.mark.parametrize(
    "name, sampling, batch_size",
    [
        *(("lookup", GREEDY, 2), ("noisy", GREEDY, 1), ("unsure", GREEDY, 2), ("qspec", GREEDY, 2)),
        ("auto", SAMPLED, 2),
    ],
)
def test_recorded_decoding_is_the_same_and_records_no_more(target, name, sampling, batch_size, monkeypatch):
    """After the warm-up every size is there: draft steps, all sizes of drafts, refills."""
    # K = 4 is two calls then, of 2 tokens each.
    monkeypatch.setattr("gpt_spec.UNROLLED_LAYERS", 3 * target.config.num_layers)
    expected = texts(target, PROMPTS[:3], sampling=sampling)
    decoder = Decoder(target, drafters(target)[name], sampling, max_length=128, batch_size=batch_size)
    assert decoder.warm_up() > 0
    monkeypatch.setattr("tape.Tape.record", None)  # every tape is there
    out = collect(decoder.run(PROMPTS[:3], 40), 3)
    assert out == expected


def test_cost_follows_the_length_not_the_allocation(target):
    """Attention visits only what is valid: garbage behind it, NaN even, is not read."""
    decoder = Decoder(target, max_length=200, compile=False)
    for tensor in (*decoder.cache.keys, *decoder.cache.values):
        tensor[:, 60:] = torch.nan
    [expected] = texts(target, PROMPTS[:1], max_new_tokens=50)
    assert [t for es in decoder.run(PROMPTS[:1], 50) for e in es for t in e.tokens] == expected


# ---- trees ---------------------------------------------------------------------------------------

PARENT = torch.tensor(
    [[-1, 0, 0, 1, 1, 2, 4, -1], [-1, 0, 1, 2, 3, 4, 5, 6]]
)  # a bush with padding, and a chain


def climb(parent: list[int], node: int) -> list[int]:
    """The nodes from the top down to `node`: the slow twin of tree_geometry."""
    return (climb(parent, parent[node]) if parent[node] >= 0 else []) + [node]


def test_tree_geometry_against_climbing():
    ancestors, depth = tree_geometry(PARENT, 7)
    for b, parent in enumerate(PARENT.tolist()):
        for node in range(8):
            path = climb(parent, node)
            assert ancestors[b, node].nonzero().flatten().tolist() == sorted(path)
            assert depth[b, node] == len(path) - 1


def test_accept_against_walking_down():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        parent = torch.tensor(
            [[-1] + [int(torch.randint(-1, i, (), generator=generator)) for i in range(1, 8)]]
        )
        tokens, choice = torch.randint(3, (2, 1, 8), generator=generator)
        for i in range(8):  # siblings carry different tokens, as in any real tree
            tokens[0, i] = i if (parent[0] == parent[0, i]).sum() > 3 else tokens[0, i]
        for i in range(1, 8):
            earlier = [j for j in range(i) if parent[0, j] == parent[0, i] and tokens[0, j] == tokens[0, i]]
            tokens[0, i] = 10 + i if earlier else tokens[0, i]
        ancestors, depth = tree_geometry(parent, 7)
        path, accepted = accept(tokens, parent, choice, ancestors, depth, 7)
        walked = [0]
        while True:
            below = [
                i for i in range(1, 8) if parent[0, i] == walked[-1] and tokens[0, i] == choice[0, walked[-1]]
            ]
            if not below:
                break
            walked.append(below[0])
        assert accepted.item() == len(walked) - 1
        assert path[0].tolist() == walked + walked[-1:] * (8 - len(walked))
        seen.add(len(walked))
    assert {1, 2, 3} <= seen


@torch.no_grad()
def test_tree_rows_equal_plain_forwards_over_their_paths(target):
    past = torch.tensor(random_prompts([11, 6])[0][:6] + random_prompts([11, 6])[1]).view(2, 6)
    tokens = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(target, max_length=64, batch_size=2, compile=False)
    from drafts import extend

    length = torch.zeros(2, dtype=torch.int64)
    extend(target, decoder.cache, past, length)
    length = length + 6
    ancestors, depth = tree_geometry(PARENT, 7)
    slots = length[:, None] + torch.arange(8)
    features, _ = target(
        tokens, length[:, None] + depth, partial(decoder.cache.attend, slots, ancestors, length)
    )
    for b in range(2):
        for node in range(8):
            path = climb(PARENT[b].tolist(), node)
            if PARENT[b, path[0]] == -1 and path[0] != 0:
                continue  # padding
            whole = torch.cat((past[b], tokens[b, path]))[None]
            torch.testing.assert_close(
                features[b, node], target.recompute(whole)[0, -1], rtol=1e-4, atol=1e-5
            )


def test_lookup_finds_the_latest_longest_repetition():
    def search(text, ngram=3, count=4):
        padded = torch.tensor([text + [0] * (20 - len(text))])
        tokens, found = find_repetition(padded, torch.tensor([len(text) - 1]), ngram, count)
        assert tokens[0, 0] == text[-1]
        index = TextIndex(ngram)
        index.update(text)
        assert (index.agree[-1] > 0) == bool(found)
        if found:
            assert index.guess(count) == tokens[0, 1:].tolist()
        return tokens[0, 1:].tolist() if found else None

    assert search([1, 2, 3, 4, 5, 6, 7, 2, 3]) == [4, 5, 6, 7]
    assert search([1, 2, 3, 4, 9, 2, 3, 5, 9, 2, 3]) == [5, 9, 2, 3]  # 9 2 3 beats 1 2 3
    assert search([5, 8, 5, 9, 7, 5]) == [9, 7, 5, 9]  # the latest of two; and around in circles
    assert search([1, 7, 7]) == [7, 7, 7, 7]
    assert search([1, 2, 3]) is None
    assert search([4]) is None  # the zeros behind the text are no text


def test_the_cache_is_rounded_up_but_never_beyond_the_context(target):
    assert cache_length(target.config, 30) == 256
    assert cache_length(random_model(max_context=4096).config, 600) == 1024


def test_stats_add_up(target):
    stats = Stats()
    out = texts(target, PROMPTS, SequentialDrafter(noisy_copy(target), 3), batch_size=2, stats=stats)
    assert stats.outputs == 5 and stats.new_tokens == sum(map(len, out)) == 200
    assert stats.target_forwards == sum(stats.accepted_histogram)
    assert stats.accepted_tokens == sum(i * n for i, n in enumerate(stats.accepted_histogram))
    assert stats.drafted_tokens == 3 * stats.target_forwards
    # every step emits its accepted tokens and one more, except where a cut took that one away
    cut = stats.target_forwards + stats.accepted_tokens - (stats.new_tokens - stats.outputs)
    assert 0 <= cut <= 5
    shares = stats.acceptance_by_position
    assert len(shares) == 3 and shares == sorted(shares, reverse=True)
    assert sum(shares) * stats.target_forwards == pytest.approx(stats.accepted_tokens)
    seconds = stats.prefill_seconds + stats.decode_seconds
    assert stats.aggregate_tokens_per_second == 200 / seconds


@pytest.mark.parametrize("name", ["noisy", "qspec", "tree", "middle", "three levels", "shared"])
def test_an_interrupted_prefill_leaves_nothing_to_reuse(target, name, monkeypatch):
    decoder = Decoder(target, drafters(target)[name], max_length=80, compile=False)
    first, second = random_prompts([20, 25])
    list(decoder.run([first], 5))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sampling.Controls.pick", interrupt)
        list(decoder.run([second], 5, reuse=True))
    assert list(decoder.run([first[:12]], 5, reuse=True))
    row_text = decoder.state.tokens[0, :17].tolist()
    assert_level_is_fresh(decoder, target, 0, row_text)
    assert [row_text[12:]] == texts(target, [first[:12]], max_new_tokens=5)


@pytest.mark.parametrize("name", ["tree", "middle", "three levels", "shared"])
def test_an_interrupted_step_has_not_happened(target, name, monkeypatch):
    """Ctrl-C between verifying a tree and moving its path: the text can be continued from what was shown."""
    [prompt], so_far = random_prompts([12]), []
    [expected] = texts(target, [prompt])
    decoder = Decoder(target, drafters(target)[name], max_length=80, compile=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for emissions in decoder.run([prompt], 40):
            so_far += emissions[0].tokens
            if len(so_far) > 8:
                patch.setattr("model.KVCache.keep", interrupt)
    assert 8 < len(so_far) < 40
    for emissions in decoder.run([prompt + so_far], 40 - len(so_far), reuse=True):
        so_far += emissions[0].tokens
        assert_caches_are_fresh(decoder, [prompt + so_far])
    assert so_far == expected


def test_impossible_requests_are_refused(target):
    for prompts, options, words in [
        ([[]], {}, "empty"),
        ([[1] * 300], {}, "300 tokens"),
        ([[61]], {}, "token id 61"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ]:
        with pytest.raises(BadInput, match=words):
            texts(target, prompts, **options)
    with pytest.raises(BadInput, match="speculate_k is 0"):
        SequentialDrafter(target, 0)
