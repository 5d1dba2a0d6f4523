"""QSpec: the target drafts with its own weights and its own cache, at lower activations.

That its text and its caches are right is tested with all other drafters, in test_decoding.py, where noise
stands for another precision. Here are real precisions, bit for bit.
"""

import pytest
import torch
from conftest import (
    NEEDS_EQUAL_ROWS,
    SHIPPED_TARGET,
    collect,
    held_out_prompts,
    noisy_copy,
    random_model,
    random_prompts,
)
from test_decoding import qspec

from checkpoints import load_model, weight_bytes
from costs import Stats
from drafts import Drafter, prefill
from gpt_spec import Decoder, HierarchicalDrafter, Request, SequentialDrafter
from model import BadInput, KVCache
from packing import share_weights
from sampling import Sampling


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Six held-out prompts, cut to different lengths."""
    return [prompt[: 9 * i + 1] for i, prompt in enumerate(held_out_prompts(6))]


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    return load_model(SHIPPED_TARGET, "w4a16")


@pytest.fixture(scope="module")
def four_bit_head() -> torch.nn.Module:
    return load_model(SHIPPED_TARGET, "w4a16", lm_head_bits=4)


@pytest.fixture(scope="module")
def rotated(rotated_target) -> torch.nn.Module:
    return load_model(rotated_target, "w4a16")


@torch.no_grad()
def forwards_alone(target, tokens: list[int]) -> KVCache:
    """What plain forwards of the target write for a whole text."""
    cache = KVCache.allocate(target.config, 1, len(tokens), target.norm.weight)
    prefill(target, cache, 0, torch.tensor(tokens), 0)
    return cache


def check_bits(decoder: Decoder, prompts: list[list[int]], expected: list[list[int]]) -> tuple[int, Stats]:
    """Decode; after every round, all committed keys and values are those of plain forwards, bit for bit."""
    whole = [prompt + text for prompt, text in zip(prompts, expected)]
    caches, stats = [forwards_alone(decoder.model, text) for text in whole], Stats()
    so_far, rounds = [[] for _ in prompts], 0
    for emissions in decoder.run(prompts, len(expected[0]), stats=stats):
        for emission in emissions:
            row, i = emission.row, emission.prompt_index
            so_far[i] += emission.tokens
            valid = len(prompts[i]) + len(so_far[i]) - 1
            assert int(decoder.state.length[row]) == valid
            for ours, theirs in (
                (decoder.cache.keys, caches[i].keys),
                (decoder.cache.values, caches[i].values),
            ):
                assert all(torch.equal(o[row, :valid], t[0, :valid]) for o, t in zip(ours, theirs))
        rounds += 1
    assert so_far == expected
    return rounds, stats


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "model, precision",
    [("plain", "w4a8"), ("plain", "w4a4"), ("rotated", "w4a4"), ("four_bit_head", "w4a4")],
)
def test_after_every_round_the_cache_is_the_targets(request, prompts, model, precision, temperature):
    """Batches of 1 and 4, rows refilled: keys, values and text are those of w4a16, and it does pay."""
    target, sampling = request.getfixturevalue(model), Sampling(temperature)
    alone = Decoder(target, None, sampling, 192, compile=False)
    expected = collect(alone.run(prompts, 40), len(prompts))
    for batch_size in (1, 4):
        decoder = Decoder(target, qspec(target, precision), sampling, 192, batch_size, compile=False)
        rounds, stats = check_bits(decoder, prompts, expected)
        assert rounds < 40 * len(prompts) and stats.tokens_per_step > 2


@NEEDS_EQUAL_ROWS
def test_verification_overwrites_what_drafts_wrote(plain, prompts):
    """The bitwise test can fail: what a draft writes is not what the target writes."""
    decoder = Decoder(plain, qspec(plain, "w4a4"), max_length=192, compile=False)
    prompt = prompts[5]
    decoder.prefill(0, prompt, Request(decoder.setup.sampling, 0))
    propose, length, written = decoder.drafter.propose, len(prompt), {}

    def keys() -> torch.Tensor:
        return decoder.cache.keys[-1][0].clone()

    def watched(state):
        draft = propose(state)
        written["below"], written["draft"] = keys()[:length], keys()[length : length + 3]
        return draft

    decoder.drafter.propose, before = watched, keys()
    decoder.step()
    assert torch.equal(written["below"], before[:length])  # a draft writes nothing below the length
    assert not before[length:].any() and written["draft"].any(dim=-1).all()
    changed = (keys()[length : length + 3] != written["draft"]).any(dim=-1)  # [3, G]
    assert changed.all()


@pytest.mark.parametrize("precision", ["w4a8", "w4a4"])
def test_weights_and_cache_are_those_of_the_target_alone(plain, precision):
    """Counted: every tensor that a decoder holds on to."""
    drafter = qspec(plain, precision)
    assert drafter.models == () and weight_bytes([plain, drafter.model]) == weight_bytes([plain])
    alone = Decoder(plain, None, max_length=192, batch_size=2, compile=False)
    ours = Decoder(plain, drafter, max_length=192, batch_size=2, compile=False)
    slot = sum(t[:, :1].nbytes for t in (*alone.cache.keys, *alone.cache.values, alone.state.tokens))
    assert held_bytes(alone) > weight_bytes([plain]) + 192 * slot
    assert held_bytes(ours) == held_bytes(alone) + 3 * slot  # room for three nodes more
    assert drafter.cache is ours.cache


def held_bytes(decoder: Decoder) -> int:
    """Bytes of all tensors that can be reached from a decoder, each counted once."""
    seen, storages, todo = set(), {}, [decoder]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (str, int, float, type)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, (list, tuple, set)):
            todo += thing
        elif isinstance(thing, dict):
            todo += thing.values()
        elif getattr(type(thing), "__module__", "").startswith(("gpt_spec", "drafts", "model", "torch.nn")):
            todo.append(vars(thing))
    return sum(storages.values())


@NEEDS_EQUAL_ROWS
def test_confidence_stops_a_draft_before_a_guess(plain, prompts):
    """A draft ends before the first token that the drafter itself finds improbable, and so less is wasted."""
    results = {}
    for confidence in (0.0, 0.6):
        decoder = Decoder(plain, qspec(plain, "w4a4", 5, confidence), max_length=192, compile=False)
        stats = Stats()
        results[confidence] = collect(decoder.run(prompts, 40, stats=stats), len(prompts)), stats
    (texts, whole), (same, early) = results.values()
    assert texts == same
    assert early.drafted_tokens < whole.drafted_tokens and early.target_forwards > whole.target_forwards
    shares = [stats.accepted_tokens / stats.drafted_tokens for stats in (whole, early)]
    assert shares[1] > shares[0] + 0.05


@NEEDS_EQUAL_ROWS
def test_qspec_inside_a_hierarchy(plain, prompts):
    """The middle, which is the target in w4a8, is drafted for by the target in w4a4: one set of weights, one
    cache, three precisions."""
    middle = share_weights(plain, "w4a8")
    drafter = HierarchicalDrafter(middle, qspec(middle, "w4a4", 2), 4, shares_cache=True)
    expected = collect(
        Decoder(plain, Drafter(), max_length=192, compile=False).run(prompts, 40), len(prompts)
    )
    decoder, stats = Decoder(plain, drafter, max_length=192, batch_size=2, compile=False), Stats()
    assert collect(decoder.run(prompts, 40, stats=stats), len(prompts)) == expected
    assert drafter.models == () and drafter.drafter.cache is decoder.cache
    assert stats.tokens_per_step > 3 and stats.inside.tokens_per_step > 2


def test_a_draft_is_what_the_model_says_alone(target):
    """On the target's keys and values below the length, whatever was drafted before."""
    noisy = noisy_copy(target, 0.4)
    drafter = SequentialDrafter(noisy, 4, shares_cache=True)
    decoder = Decoder(target, drafter, max_length=100, compile=False)
    propose, drafts = drafter.propose, []

    def checked(state):
        length = int(state.length)
        cache = KVCache([k.clone() for k in decoder.cache.keys], [v.clone() for v in decoder.cache.values])
        fed, said = state.tokens[0, length : length + 1].tolist(), []
        for d in range(4):
            feature = prefill_one(noisy, cache, fed[-1], length + d)
            fed.append(int(noisy.lm_head(feature).argmax()))
            said.append(fed[-1])
        draft = propose(state)
        assert draft.tokens[0, 1:].tolist() == said
        drafts.append(said)
        return draft

    drafter.propose = checked
    list(decoder.run(random_prompts([9]), 40))
    assert len(drafts) > 8


def prefill_one(model, cache: KVCache, token: int, length: int) -> torch.Tensor:
    return prefill(model, cache, 0, torch.tensor([0] * length + [token]), length)


def test_the_shapes_must_agree(target):
    other = SequentialDrafter(random_model(num_layers=3), shares_cache=True)
    with pytest.raises(BadInput, match="shape"):
        Decoder(target, other, compile=False)
