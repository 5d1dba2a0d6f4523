"""The engine as a library: texts as prompts, whole texts as answers."""

import gc

import pytest
import torch
from conftest import SHIPPED_SMALL, noisy_copy, random_prompts, texts

import gpt_spec
from checkpoints import load_model
from costs import Stats
from drafts import Sampling
from gpt_spec import SequentialDrafter, complete, generate
from model import BadInput
from runtime import no_garbage_collection
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
