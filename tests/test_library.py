"""The engine as a library: texts as prompts, whole texts as answers."""

import gc
import weakref
from functools import partial

import numpy
import pytest
import torch
from conftest import (
    SHIPPED_SMALL,
    collect,
    guessing_head,
    noisy_copy,
    random_model,
    random_prompts,
    texts,
)

import gpt_spec
from auto import AdaptiveLookup, AutoDrafter
from checkpoints import load_model
from costs import Stats
from drafts import Drafter
from eagle import TreeDrafter
from gpt_spec import (
    Decoder,
    HierarchicalDrafter,
    LookupDrafter,
    SequentialDrafter,
    complete,
    generate,
)
from model import BadInput
from runtime import no_garbage_collection
from sampling import Sampling
from text import load_tokenizer

SAMPLED = Sampling(temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED_SMALL), load_tokenizer(SHIPPED_SMALL)


def test_a_prompt_may_be_a_text(shipped):
    model, tokenizer = shipped
    settings = {"max_new_tokens": 12, "compile": False, "sampling": SAMPLED}
    prompts = ["def add(a, b):", "import "]
    by_ids = complete(model, [tokenizer.encode(prompt) for prompt in prompts], **settings)
    by_text = complete(model, prompts, tokenizer=tokenizer, **settings)
    assert [text.token_ids for text in by_ids] == [text.token_ids for text in by_text]
    assert [text.text for text in by_ids] == [None, None]
    assert [text.text for text in by_text] == [tokenizer.decode(text.token_ids) for text in by_text]
    steps = generate(model, prompts[0], tokenizer=tokenizer, **settings)
    assert [token for emissions in steps for token in emissions[0].tokens] == by_ids[0].token_ids


def test_whole_texts_and_their_statistics(target):
    """In the order of the prompts, with what the emissions of each add up to."""
    prompts, stats = random_prompts([5, 1, 17]), Stats()
    settings = {
        "drafter": SequentialDrafter(noisy_copy(target), 3),
        "sampling": SAMPLED,
        "max_new_tokens": 20,
    }
    found = complete(target, prompts, batch_size=2, compile=False, stats=stats, stop_ids=[3], **settings)
    assert [text.prompt_ids for text in found] == prompts
    assert [text.token_ids for text in found] == texts(target, prompts, None, SAMPLED, 20, stop_ids=[3])
    assert sum(text.steps for text in found) == stats.target_forwards
    assert sum(text.accepted for text in found) == stats.accepted_tokens > 0
    for text in found:
        assert text.finish_reason == ("stop" if text.token_ids[-1] == 3 else "length")
        assert text.tokens_per_step == (len(text.token_ids) - 1) / text.steps


def test_a_text_needs_a_tokenizer(target):
    for prompts in ("text", ["text"], [[1], "text"]):
        with pytest.raises(BadInput, match="no tokenizer"):
            list(generate(target, prompts, compile=False))
    for empty in ([], ""):
        with pytest.raises(BadInput, match="empty|no tokenizer"):
            list(generate(target, empty, compile=False))


# ---- what a caller may hand over -----------------------------------------------------------------

FEW = {"max_new_tokens": 4, "compile": False}
PAIR = [[1, 30, 7], [2, 31, 8]]
KINDS = {
    "lists": PAIR,
    "tuples": tuple(tuple(prompt) for prompt in PAIR),
    "a 2-D tensor": torch.tensor(PAIR),
    "a 2-D tensor of int32": torch.tensor(PAIR, dtype=torch.int32),
    "tensors": [torch.tensor(prompt) for prompt in PAIR],
    "tensors of one number": [[torch.tensor(token) for token in prompt] for prompt in PAIR],
    "a 2-D array": numpy.array(PAIR),
    "arrays": [numpy.array(prompt) for prompt in PAIR],
    "integers of NumPy": [list(numpy.array(prompt)) for prompt in PAIR],
    "ranges and lists": [range(1, 4), [1, 2, 3]],
}


@pytest.mark.parametrize("prompts", KINDS.values(), ids=KINDS)
def test_prompts_of_every_kind(target, prompts):
    """Alone, side by side, and in `Decoder.run`."""
    lists = [[int(token) for token in prompt] for prompt in prompts]
    expected = texts(target, lists, max_new_tokens=4)
    found = complete(target, prompts, **FEW)
    assert [text.prompt_ids for text in found] == lists
    assert [text.token_ids for text in found] == expected
    assert all(type(token) is int for text in found for token in text.prompt_ids)
    [alone] = complete(target, prompts[1], **FEW)
    assert (alone.prompt_ids, alone.token_ids) == (lists[1], texts(target, lists[1:], max_new_tokens=4)[0])
    decoder = Decoder(target, max_length=32, compile=False)
    assert collect(decoder.run(prompts, 4), 2) == expected


@pytest.mark.parametrize(
    "prompts, words",
    [
        (torch.ones(2, 2), "1.0; it must be a whole number"),
        (torch.ones(2, 2, 2, dtype=torch.int64), r"\[1, 1\]; it must be a whole number"),
        (torch.tensor(5), "not 5"),
        (torch.tensor([True, False]), "True; it must be a whole number"),
        ([[1, 2.0]], "2.0; it must be a whole number"),
        ([[1, None]], "None; it must be"),
        ([1, [2, 3]], r"\[2, 3\]; it must be"),
        ([[1, "a"]], "'a'; it must be"),
        ({"input_ids": [[1, 2]]}, "token ids or texts, not {'input_ids'"),
        ([{"role": "user", "content": "x"}], "no list of whole numbers"),
        (b"text", "token ids or texts, not b'text'"),
        (None, "token ids or texts, not None"),
        ("text", "no tokenizer"),
        (["text", [1, 2]], "no tokenizer"),
        ([[1, 61]], "61; the model knows 0 to 60"),
        ([[-1]], "-1; the model knows"),
        (numpy.array([1, 2**40]), "the model knows"),
        ([], "empty"),
        ([[]], "empty"),
        (torch.zeros(2, 0, dtype=torch.int64), "empty"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused_in_a_line(target, prompts, words):
    with pytest.raises(BadInput, match=words) as refused:
        list(generate(target, prompts, **FEW))
    assert "\n" not in str(refused.value)
    with pytest.raises(BadInput):
        complete(target, prompts, **FEW)
    decoder = Decoder(target, max_length=32, compile=False)
    if isinstance(prompts, list) and not prompts:  # a list of prompts, of which there are none
        assert list(decoder.run(prompts, 4)) == []
    else:
        with pytest.raises(BadInput):
            decoder.run(prompts, 4)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"seeds": [1]}, "1 seeds for 2 prompts"),
        ({"seeds": []}, "0 seeds for 2 prompts"),
        ({"seeds": [1, 2, 3]}, "3 seeds for 2 prompts"),
        ({"seeds": 5}, "seed: 5 is no list"),
        ({"seeds": [1, 2.5]}, "seed is 2.5; it must be a whole number"),
        ({"seeds": [1, 2**62]}, "between"),
        ({"stop_ids": "end"}, "stop id: 'end' is no list"),
        ({"stop_ids": [1.5]}, "stop id is 1.5; it must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5; it must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5'; it must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True; it must be a whole number"),
        ({"sampling": 0.8}, "sampling is a float; it must be a Sampling"),
        ({"drafter": random_model()}, "drafter is a Transformer; it must be a Drafter"),
        ({"drafter": SequentialDrafter}, "drafter is .*; it must be a Drafter"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_in_a_line(target, options, words):
    """Before anything is recorded."""
    with pytest.raises(BadInput, match=words) as refused:
        list(generate(target, PAIR, **({"max_new_tokens": 4, "compile": True} | options)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sampling(temperature="hot"),
        lambda: Sampling(temperature=None),
        lambda: Sampling(temperature="0.5"),
        lambda: Sampling(temperature=10**400),
        lambda: Sampling(temperature=True),
        lambda: SequentialDrafter("model"),
        lambda: SequentialDrafter(random_model(), draft_confidence="0.5"),
        lambda: HierarchicalDrafter(random_model(), "drafter"),
        lambda: TreeDrafter(random_model()),
        lambda: Decoder("model"),
        lambda: Sampling(temperature=torch.ones(2)),
        lambda: Sampling(temperature=float("nan")),
        lambda: Sampling(top_k=2.5),
        lambda: Sampling(top_p=[0.5]),
        lambda: Sampling(seed=0.5),
        lambda: LookupDrafter(2.5),
        lambda: LookupDrafter(4, ngram=0),
        lambda: SequentialDrafter(random_model(), "4"),
        lambda: SequentialDrafter(random_model(), 4, 1.5),
        lambda: HierarchicalDrafter(random_model(), LookupDrafter(), 2.5),
        lambda: TreeDrafter(guessing_head(random_model()), tree_topk=0),
        lambda: TreeDrafter(guessing_head(random_model()), tree_size=4.5),
        lambda: Decoder(random_model(), max_length=1),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_line(make):
    with pytest.raises(BadInput, match="^[a-z_]+ is .*; ") as refused:
        make()
    assert "\n" not in str(refused.value)


def test_numbers_of_numpy_and_pytorch_are_numbers(target):
    """Options are their values, whoever made them; and seeds are those that were given."""
    plain = Sampling(0.75, top_k=9, top_p=0.875, seed=5)
    sampling = Sampling(numpy.float32(0.75), numpy.int64(9), torch.tensor(0.875), torch.tensor(5))
    assert sampling == plain and repr(sampling) == repr(plain)
    numbers = {"max_new_tokens": numpy.int64(9), "batch_size": torch.tensor(2)}
    drafter = SequentialDrafter(noisy_copy(target), numpy.int64(3))
    found = complete(target, PAIR, drafter=drafter, sampling=sampling, compile=False,
                     seeds=numpy.array([6, 5]), **numbers)  # fmt: skip
    [second, first] = texts(target, PAIR[::-1], None, plain, 9)
    assert [text.token_ids for text in found] == [first, second]
    for stop in (first[2], numpy.int64(first[2]), torch.tensor([first[2]]), {first[2]}):
        [text] = complete(target, PAIR[0], sampling=plain, seeds=[6], stop_ids=stop, **FEW)
        assert text.finish_reason == "stop" and text.token_ids == first[: first.index(first[2]) + 1]


# ---- inference mode, and memory ------------------------------------------------------------------


def every_drafter(target) -> dict[str, Drafter]:
    """One of each kind."""
    noisy = noisy_copy(target)
    tree = partial(TreeDrafter, guessing_head(target), tree_depth=2, tree_topk=2)
    return {
        "autoregressive": Drafter(),
        "lookup": LookupDrafter(),
        "as many as pay": AdaptiveLookup(),
        "sequential": SequentialDrafter(noisy, 3),
        "sequential, as many as pay": SequentialDrafter(noisy, None),
        "qspec": SequentialDrafter(noisy, 3, shares_cache=True),
        "tree": tree(4),
        "tree, as many as pay": tree(),
        "hierarchical": HierarchicalDrafter(noisy, TreeDrafter(guessing_head(noisy), 4, 2, 2), 3),
        "hierarchical with self": HierarchicalDrafter(noisy, tree(4), 3, shares_cache=True),
        "three levels": HierarchicalDrafter(noisy, HierarchicalDrafter(noisy, LookupDrafter(), 2), 4),
        "auto": AutoDrafter({"lookup": AdaptiveLookup(), "tree": tree(4)}),
    }


KINDS_OF_DRAFTERS = [
    *("autoregressive", "lookup", "as many as pay", "sequential", "sequential, as many as pay", "qspec"),
    *("tree", "tree, as many as pay", "hierarchical", "hierarchical with self", "three levels", "auto"),
]


def decode(target, drafter, compile: bool = False) -> tuple[list, list]:
    """The texts of a decoder that is then dropped, and weak references to it and to what it holds."""
    decoder = Decoder(target, drafter, SAMPLED, max_length=48, batch_size=2, compile=compile)
    decoder.warm_up()
    found = collect(decoder.run(PAIR, 12), 2)
    next(decoder.run(PAIR, 12))  # abandoned half way
    parts = [decoder, decoder.cache, *decoder.cache.keys, decoder.state.features]
    return found, [weakref.ref(part) for part in parts]


@pytest.mark.parametrize("name", KINDS_OF_DRAFTERS)
def test_a_decoder_is_freed_with_its_last_reference(target, name):
    """At once, and not when Python looks for cycles: that goes by the number of objects, not their size."""
    expected = texts(target, PAIR, None, SAMPLED, 12)
    drafter = every_drafter(target)[name]
    with no_garbage_collection():
        found, parts = decode(target, drafter)
        assert found == expected
        assert parts[0]() is None  # though its drafter is still here
        drafter_too = weakref.ref(drafter)
        del drafter
        assert drafter_too() is None and not any(part() is not None for part in parts)


def test_a_compiled_decoder_is_freed_with_its_last_reference(target):
    """Both levels, the feeding of the inner one, and a tree: all that is compiled, but for chains."""
    expected = texts(target, PAIR, None, SAMPLED, 12)
    drafter = every_drafter(target)["hierarchical"]
    with no_garbage_collection():
        found, parts = decode(target, drafter, compile=True)
        assert found == expected
        del drafter
        assert not any(part() is not None for part in parts)


def test_a_run_that_was_abandoned_is_freed(target):
    def alive() -> int:
        return sum(type(each) is Decoder for each in gc.get_objects())

    with no_garbage_collection():
        before = alive()
        steps = generate(target, PAIR, SequentialDrafter(noisy_copy(target), 3), **FEW)
        next(steps)
        assert alive() == before + 1
        del steps
        assert alive() == before


@pytest.mark.parametrize("name", KINDS_OF_DRAFTERS)
def test_a_decoder_made_in_inference_mode(target, name):
    """Serves outside of it, inside, and half way out; and one that was made outside serves inside."""
    expected = texts(target, PAIR, None, SAMPLED, 12)
    options = {"max_length": 48, "compile": False}
    with torch.inference_mode():
        inside = Decoder(target, every_drafter(target)[name], SAMPLED, **options)
        inside.warm_up()
        assert collect(inside.run(PAIR, 12), 2) == expected
        half = inside.run(PAIR, 12)
        first = [next(half)]
    assert collect([*first, *half], 2) == expected
    assert collect(inside.run(PAIR, 12), 2) == expected
    outside = Decoder(target, every_drafter(target)[name], SAMPLED, **options)
    with torch.inference_mode():
        assert collect(outside.run(PAIR, 12), 2) == expected
    assert collect(outside.run(PAIR, 12), 2) == expected


def test_a_model_loaded_in_inference_mode(shipped):
    with torch.inference_mode():
        model = load_model(SHIPPED_SMALL, "w4a16")
        inside = texts(model, [[1, 300]], SequentialDrafter(model, 3), SAMPLED, 8)
    usual = load_model(SHIPPED_SMALL, "w4a16")
    assert inside == texts(model, [[1, 300]], SequentialDrafter(model, 3), SAMPLED, 8)
    assert inside == texts(usual, [[1, 300]], None, SAMPLED, 8)


# ---- names, and the collector --------------------------------------------------------------------


def test_names_that_users_import():
    import eagle
    from eagle import TreeDrafter  # noqa: E402

    assert TreeDrafter is eagle.TreeDrafter
    with pytest.raises(AttributeError, match="no attribute 'Bush'"):
        _ = gpt_spec.Bush


def test_nothing_is_collected_while_a_graph_is_recorded():
    """A CUDA graph that is destroyed meanwhile makes the recording invalid: seen on an H100."""

    class Abandoned:
        def __init__(self):
            self.itself = self  # only the garbage collector can free it

        def __del__(self):
            freed.append(recording)

    freed, recording = [], True
    assert gc.isenabled()
    with no_garbage_collection():
        for _ in range(20000):
            Abandoned()
            torch.empty(0)
        recording = False
    assert gc.isenabled()
    gc.collect()
    assert len(freed) == 20000 and not any(freed)
    with pytest.raises(KeyboardInterrupt), no_garbage_collection():
        raise KeyboardInterrupt
    assert gc.isenabled()
