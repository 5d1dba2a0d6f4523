"""A real model: SmolLM2-135M-Instruct, against transformers and against itself.

    python scripts/get_smollm2.py DIR
    GPT_SPEC_SMOLLM2=DIR pytest -n 0 tests/test_smollm2.py        # about ten minutes

Without that variable all of it is skipped: CI downloads no model.
"""

import json
import os

import pytest
import torch
from conftest import NEEDS_EQUAL_ROWS, guessing_head, texts

from auto import AdaptiveLookup, AutoDrafter
from checkpoints import load_model
from drafts import Drafter
from eagle import TreeDrafter
from gpt_spec import HierarchicalDrafter, LookupDrafter, SequentialDrafter
from packing import share_weights
from sampling import Sampling
from text import load_tokenizer

DIRECTORY = os.environ.get("GPT_SPEC_SMOLLM2")
pytestmark = pytest.mark.skipif(
    DIRECTORY is None, reason="GPT_SPEC_SMOLLM2 names no directory; scripts/get_smollm2.py makes it"
)
TEXTS, TOKENS = 20, 64


@pytest.fixture(scope="module")
def conversations(shared) -> list[list[str]]:
    """What the user says in each of the conversations of Spec-Bench: 560 turns."""
    lines = (shared / "spec_bench.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["turns"] for line in lines]


@pytest.fixture(scope="module")
def reference():
    """The tokenizer and the model of transformers, in fp32."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY), model.eval()


def test_all_turns_are_encoded_as_transformers_encodes_them(conversations, reference):
    """As plain text, and as conversations in which every answer is 'So it is.'"""
    theirs, ours, turns = reference[0], load_tokenizer(DIRECTORY), 0
    for said in conversations:
        messages = []
        for turn in said:
            turns += 1
            assert ours.encode(turn) == theirs(turn)["input_ids"]
            messages.append({"role": "user", "content": turn})
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ours.encode_chat(messages) == expected
            messages.append({"role": "assistant", "content": "So it is."})
    assert turns == 560


@pytest.fixture(scope="module")
def questions(conversations) -> list[list[int]]:
    """One of every kind of question, and more: token ids of TEXTS conversations."""
    tokenizer, step = load_tokenizer(DIRECTORY), len(conversations) // TEXTS
    first = [[{"role": "user", "content": said[0]}] for said in conversations[::step][:TEXTS]]
    return [tokenizer.encode_chat(messages) for messages in first]


@torch.no_grad()
def test_greedy_texts_equal_those_of_transformers(questions, reference):
    """fp32, up to 64 tokens of answer to each question."""
    ours = texts(load_model(DIRECTORY, "fp32"), questions, max_new_tokens=TOKENS, stop_ids=[2])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 2, "eos_token_id": 2}
    for prompt, answer in zip(questions, ours):
        theirs = reference[1].generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert answer == theirs.tolist()


def tree(model) -> TreeDrafter:
    """Of a head that nobody trained: it guesses by the last token alone, so its drafts are bad."""
    return TreeDrafter(guessing_head(model), 16, 4, 4)


def methods(target, precision: str) -> dict[str, Drafter]:
    """Every method. Where it wants a small model, that is the same one in 4 bits."""
    small = load_model(DIRECTORY, "w4a8")
    found = {
        "lookup": LookupDrafter(4),
        "adaptive lookup": AdaptiveLookup(),
        "sequential": SequentialDrafter(small, 3),
        "tree": tree(target),
        "hierarchical": HierarchicalDrafter(small, tree(small), 4),
        "auto": AutoDrafter({"lookup": AdaptiveLookup(), "sequential": SequentialDrafter(small, 3)}),
    }
    if precision.startswith("w4"):
        twin = share_weights(target, "w4a4" if precision == "w4a8" else "w4a8")
        found["qspec"] = SequentialDrafter(twin, 3, shares_cache=True)
        found["own middle"] = HierarchicalDrafter(twin, LookupDrafter(4), 4, shares_cache=True)
    return found


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("precision", ["bf16", "w4a16", "w4a8"])
def test_every_method_writes_the_autoregressive_text(questions, precision):
    target = load_model(DIRECTORY, precision)
    for sampling in (Sampling(), Sampling(1.0, seed=5)):
        prompts = questions[::7]
        expected = texts(target, prompts, None, sampling, 48)
        for name, drafter in methods(target, precision).items():
            assert texts(target, prompts, drafter, sampling, 48) == expected, name
            if name in ("tree", "sequential"):
                assert texts(target, prompts, drafter, sampling, 48, batch_size=3) == expected, name
