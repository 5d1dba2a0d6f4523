"""A decoder as a drafter: what it hands up, how it goes back, what it counts. That its text and its caches
are right is tested with all other drafters, in test_decoding.py."""

import pytest
import torch
from conftest import (
    NEEDS_EQUAL_ROWS,
    SHIPPED_HEAD,
    SHIPPED_SMALL,
    SHIPPED_TARGET,
    SMALL_HEAD,
    collect,
    guessing_head,
    noisy_copy,
    pick,
    random_model,
    random_prompts,
    texts,
)
from test_decoding import assert_level_is_fresh, check_every_step, hierarchies

from checkpoints import load_model
from costs import Stats
from drafts import Drafter, extend
from eagle import TreeDrafter
from gpt_spec import Decoder, HierarchicalDrafter, LookupDrafter
from heads import load_head
from model import BadInput, KVCache
from packing import share_weights
from sampling import Sampling

GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=7)


def tree(model, **changes):
    return TreeDrafter(guessing_head(model), **{"tree_size": 9, "tree_depth": 3, "tree_topk": 3} | changes)


@torch.no_grad()
def says_alone(model, cache: KVCache, text: list[int], length: int, count: int, seed: int, sampling):
    """What a model says after a text of which `length` tokens are in a cache, one token after the other."""
    cache = KVCache([k.clone() for k in cache.keys], [v.clone() for v in cache.values])
    said, fed = [], text[length:]
    for _ in range(count):
        features, _ = extend(model, cache, torch.tensor([fed]), torch.tensor([length]))
        length += len(fed)
        logits = model.lm_head(features[:, -1:])
        fed = [int(pick(logits, torch.tensor([[length]]), torch.tensor([seed]), sampling))]
        said += fed
    return said


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shares_cache", [False, True])
def test_what_is_handed_up_is_what_the_middle_model_says(target, sampling, shares_cache):
    """Wherever the target cut off what was said before: inside the last tree, before it, or not at all.

    At least min_draft_length tokens, and never one that the middle model alone would not have said.
    """
    middle = noisy_copy(target, 0.4)
    drafter = HierarchicalDrafter(middle, tree(middle), 4, shares_cache)
    decoder = Decoder(target, drafter, sampling, 200, compile=False)
    propose, steps, cuts = drafter.propose, decoder.drafter.level.step, {"whole": 0, "last": 0, "earlier": 0}
    begun = []  # where the last tree was rooted

    def step():
        begun.append(int(drafter.level.state.length))
        result = steps()
        if not shares_cache:  # the middle's cache and the head's, after every step inside too
            text = decoder.state.tokens[0, : int(drafter.level.state.length) + 1].tolist()
            assert_level_is_fresh(drafter.level, middle, 0, text)
        return result

    def checked(state):
        length, seed = int(state.length), int(state.seed)
        text = state.tokens[0, : length + 1].tolist()
        before = int(drafter.level.state.length)
        if begun:
            cut = "whole" if before < length else "last" if length > begun[-1] else "earlier"
            cuts[cut] += 1
        if shares_cache:  # on the target's keys and values up to here
            expected = says_alone(middle, decoder.cache, text, length, 7, seed, sampling)
        else:
            empty = KVCache.allocate(middle.config, 1, 220, middle.norm.weight)
            expected = says_alone(middle, empty, text, 0, 7, seed, sampling)
        draft = propose(state)
        count = int((draft.parent >= 0).sum())
        n = draft.tokens.shape[1]
        assert 4 <= count <= 7 and n == (7 if count < 7 else 8)
        assert draft.tokens[0, : count + 1].tolist() == text[-1:] + expected[:count]
        assert draft.parent[0].tolist() == list(range(-1, count)) + [-1] * (n - 1 - count)
        assert 0 <= draft.tokens.min() <= draft.tokens.max() < 61  # padding is embedded too
        return draft

    drafter.propose, drafter.level.step = checked, step
    for prompt in random_prompts([5, 1, 30]):
        begun.clear()
        list(decoder.run([prompt], 60))
    assert all(cuts.values()), cuts


@pytest.mark.parametrize("broken", ["rewind", "catch_up"])
@pytest.mark.parametrize("name", ["middle", "three levels"])
def test_a_middle_model_that_does_not_follow_is_seen(target, monkeypatch, name, broken):
    monkeypatch.setattr(HierarchicalDrafter, broken, lambda self, *_: None)
    with pytest.raises(AssertionError):
        check_every_step(target, hierarchies(target)[name](), SAMPLED)


@pytest.mark.parametrize("levels", [[], [False], [False, False], [True], [False, True]])
def test_the_head_feeds_just_as_many_rows_as_may_be_new(target, monkeypatch, levels):
    """One row less, and its cache goes stale: the longest path, each level above, renewed features count."""
    near, start = noisy_copy(target, 0.001), TreeDrafter.start

    def build() -> Drafter:
        drafter = TreeDrafter(guessing_head(near, noise=0.05), tree_size=3, tree_depth=2, tree_topk=1)
        for shares_cache in levels:
            drafter = HierarchicalDrafter(near, drafter, 2, shares_cache)
        return drafter

    def narrow(self, level):
        start(self, level)
        self.window -= 1

    check_every_step(target, build(), GREEDY)
    monkeypatch.setattr(TreeDrafter, "start", narrow)
    with pytest.raises(AssertionError):
        check_every_step(target, build(), GREEDY)


def test_levels_are_counted_and_timed(target):
    middle, small = noisy_copy(target), noisy_copy(target, 0.3)
    drafter = HierarchicalDrafter(middle, HierarchicalDrafter(small, tree(small), 2), 5)
    decoder = Decoder(target, drafter, SAMPLED, 200, batch_size=2, compile=False)
    outer = Stats()
    for _ in range(2):  # a run counts in what it is given
        list(decoder.run(random_prompts([5, 9, 3]), 40, stats=outer))
    assert outer.outputs == 6 and outer.new_tokens == 240
    level, depth = outer, 0
    while level.inside:
        inner, depth = level.inside, depth + 1
        # All that a level hands up was said by its model; the level above drafts with it.
        assert inner.new_tokens == level.drafted_tokens
        assert inner.new_tokens == inner.accepted_tokens + inner.target_forwards
        assert inner.target_forwards == sum(inner.accepted_histogram)
        assert inner.tokens_per_step == inner.new_tokens / inner.target_forwards > 1
        spent = inner.drafting_seconds + inner.verification_seconds
        assert 0 < spent <= level.drafting_seconds
        level = inner
    assert depth == 2
    assert outer.drafting_seconds + outer.verification_seconds <= outer.decode_seconds


def test_rows_of_a_batch_stop_drafting_each_for_itself(target):
    """A row that has enough is frozen while others go on: nothing is drawn for it any more."""
    middle = noisy_copy(target)
    drafter = HierarchicalDrafter(middle, tree(middle), 6)
    decoder = Decoder(target, drafter, SAMPLED, 200, batch_size=4, compile=False)
    frozen, step = 0, drafter.level.step

    def watched():
        nonlocal frozen
        inside, before = drafter.level.state, drafter.level.state.length.clone()
        active = inside.active.clone()
        assert not (active & ~decoder.state.active).any()
        result = step()
        assert torch.equal(inside.length[~active], before[~active])
        assert (inside.length[active] > before[active]).all()
        frozen += int((decoder.state.active & ~active).sum())
        return result

    drafter.level.step = watched
    list(decoder.run(random_prompts([5, 9, 3, 12, 7]), 40))
    assert frozen > 5


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("precision, middle", [("w4a16", "w4a8"), ("w4a8", "w4a4"), ("w8a16", "w8a8")])
def test_a_target_is_its_own_middle(precision, middle, temperature):
    """Both papers together: trees for the same weights with lower activations, sequences for the target.

    The text and, bit for bit, the keys and values of the target are those of plain decoding, and there is
    one set of weights in memory, and one cache.
    """
    target, prompts = load_model(SHIPPED_TARGET, precision), [list(range(5, 40)), [1]]
    twin = share_weights(target, middle)
    theirs = {tensor.data_ptr() for tensor in twin.parameters()}
    assert theirs == {tensor.data_ptr() for tensor in target.parameters()}
    assert {m.activation_bits for m in twin.modules() if hasattr(m, "activation_bits")} != {
        m.activation_bits for m in target.modules() if hasattr(m, "activation_bits")
    }
    head = load_head(SHIPPED_HEAD, twin, middle)
    drafter = HierarchicalDrafter(twin, TreeDrafter(head, 12, 3, 4), 5, shares_cache=True)
    assert drafter.models == (head,)
    sampling, stats = Sampling(temperature), Stats()
    plain = Decoder(target, None, sampling, 192, 2, compile=False)
    nested = Decoder(target, drafter, sampling, 192, 2, compile=False)
    assert drafter.level.cache is nested.cache and drafter.level.state.features is nested.state.features
    out = [collect(decoder.run(prompts, 100, stats=stats), 2) for decoder in (plain, nested)]
    assert out[0] == out[1]
    assert stats.inside.tokens_per_step > 1.5
    for ours, expected in zip(
        (*nested.cache.keys, *nested.cache.values), (*plain.cache.keys, *plain.cache.values)
    ):
        for row, prompt in enumerate(prompts):
            valid = len(prompt) + 99  # all but the last token
            assert torch.equal(ours[row, :valid], expected[row, :valid])


@NEEDS_EQUAL_ROWS
def test_the_shipped_small_model_with_its_head_in_the_middle():
    target, small = load_model(SHIPPED_TARGET, "w4a16"), load_model(SHIPPED_SMALL, "w4a16")
    head = load_head(SMALL_HEAD, small, "w4a16")
    for sampling in (GREEDY, Sampling(temperature=1.0)):
        drafter, stats, prompts = (
            HierarchicalDrafter(small, TreeDrafter(head, 12, 3, 4)),
            Stats(),
            [list(range(5, 40)), [1]],
        )
        expected = texts(target, prompts, None, sampling, 100)
        assert texts(target, prompts, drafter, sampling, 100, batch_size=2, stats=stats) == expected
        assert stats.inside.tokens_per_step > 2


def test_other_weights_are_not_shared():
    model = load_model(SHIPPED_SMALL, "w4a16")
    for precision in ("w8a8", "bf16", "w4a9"):
        with pytest.raises(BadInput, match=f"w4a16, which {precision} cannot share"):
            share_weights(model, precision)
    with pytest.raises(BadInput, match="bf16"):
        share_weights(load_model(SHIPPED_SMALL, "bf16"), "w4a8")


@pytest.mark.parametrize("shares_cache", [False, True])
def test_slots_for_the_widest_of_what_a_step_touches(target, monkeypatch, shares_cache):
    """A row with the longest sequence there can be rides along while another one verifies a tree."""
    touched, write = [], KVCache.write

    def watched(self, slots, *rest):
        touched.append(int(slots.max()))
        write(self, slots, *rest)

    monkeypatch.setattr(KVCache, "write", watched)
    near, lengths = noisy_copy(target, 0.05), [35, 3, 9, 5, 17, 34, 2, 36, 20, 33, 38, 37, 21, 36, 35, 38]
    drafter = HierarchicalDrafter(near, LookupDrafter(5, ngram=1), 3, shares_cache)
    decoder = Decoder(target, drafter, GREEDY, 40, batch_size=4, compile=False)
    list(decoder.run(random_prompts(lengths), 100))
    assert drafter.max_nodes == 1 + 3 + 5 and drafter.slack == 8 + 6
    assert 40 + drafter.slack == decoder.setup.slots > max(touched) >= 40 + (3 - 1) + 6


def test_the_numbers_of_a_hierarchy(target):
    wide = HierarchicalDrafter(target, tree(target, tree_size=22), 3)
    assert wide.draft_sizes() == [1 + 3 + 2, 1 + 3 + 3] and wide.slack == 6 + 22
    nested = HierarchicalDrafter(target, wide, 2)
    assert nested.max_nodes == 1 + 2 + 6 and nested.slack == 8 + wide.slack
    assert HierarchicalDrafter(target, Drafter(), 2).draft_sizes() == [3]
    other = random_model(num_layers=3)
    with pytest.raises(BadInput, match="shape"):
        Decoder(target, HierarchicalDrafter(other, LookupDrafter(), 2, shares_cache=True), compile=False)
    with pytest.raises(BadInput, match="min_draft_length is 0"):
        HierarchicalDrafter(target, LookupDrafter(), 0)


def test_recorded_levels_record_no_more(target, monkeypatch):
    """A head in a model that shares the cache of another, which is in the middle itself."""
    middle, prompts = noisy_copy(target), random_prompts([5, 1, 17])
    inner = tree(middle, tree_depth=1, tree_topk=2, tree_size=3)
    shared = HierarchicalDrafter(noisy_copy(middle, 0.1), inner, 2, shares_cache=True)
    decoder = Decoder(target, HierarchicalDrafter(middle, shared, 3), GREEDY, 128, batch_size=2)
    assert decoder.warm_up() > 0
    monkeypatch.setattr("tape.Tape.record", None)  # every tape is there
    out = collect(decoder.run(prompts, 40), 3)
    assert out == texts(target, prompts)
