"""Drafters whose vocabulary is padded otherwise than the target's, or is another one.

Published models of one vocabulary have different sizes (Qwen2.5: 151936 and 152064). A drafter then proposes
only what the target has, reads what it does not have as its own last token, and changes no text.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import (
    SHIPPED_SMALL,
    SHIPPED_TARGET,
    edit_config,
    edit_weights,
    guessing_block_head,
    guessing_head,
    noisy_copy,
    random_model,
    random_prompts,
    texts,
)
from torch import nn

import generate as command
from auto import AdaptiveLookup, AutoDrafter
from chat import check_tokens
from checkpoints import load_model
from dflash import BlockDrafter
from drafts import check_vocabulary
from eagle import TreeDrafter
from gpt_spec import Decoder, HierarchicalDrafter, LookupDrafter, SequentialDrafter
from heads import load_head
from model import BadInput
from sampling import Sampling
from text import load_tokenizer

SAMPLINGS = [Sampling(), Sampling(1.0, seed=7), Sampling(0.8, top_k=20, top_p=0.9, seed=3)]
PROMPTS = random_prompts([5, 1, 17, 9])
SIZE = 61  # of the target's vocabulary


def resized(model, size: int):
    """The model with another vocabulary: it lacks the last tokens, or has more that it finds most likely."""
    other = random_model(vocab_size=size)
    alike = {k: v for k, v in model.state_dict().items() if "embed" not in k and "lm_" not in k}
    other.load_state_dict(alike, strict=False)
    more = max(size - model.config.vocab_size, 0)
    for ours, theirs in ((other.embed_tokens, model.embed_tokens), (other.lm_head, model.lm_head)):
        junk = 5 * torch.randn(more, theirs.weight.shape[1])
        ours.weight = nn.Parameter(torch.cat((theirs.weight, junk))[:size].contiguous(), requires_grad=False)
    assert other.config == replace(model.config, vocab_size=size)
    return other


def tree(model):
    return TreeDrafter(guessing_head(model), 9, 3, 3)


METHODS = {  # by the small model, whose vocabulary is the other one
    "sequential": lambda small: SequentialDrafter(small, 3),
    "confident": lambda small: SequentialDrafter(small, 4, draft_confidence=0.2),
    "lookup in the middle": lambda small: HierarchicalDrafter(small, LookupDrafter(3), 4),
    "tree in the middle": lambda small: HierarchicalDrafter(small, tree(small), 4),
    "blocks in the middle": lambda small: HierarchicalDrafter(
        small, BlockDrafter(guessing_block_head(small, True), 9), 4
    ),
    "three levels": lambda small: HierarchicalDrafter(small, HierarchicalDrafter(small, tree(small), 2), 4),
    "auto": lambda small: AutoDrafter(
        {"lookup": AdaptiveLookup(), "sequential": SequentialDrafter(small, 3)}
    ),
}


def recorded_drafts(model, drafter, sampling, batch_size):
    """The texts, and all tokens that were verified on the way."""
    drafts, propose = [], drafter.propose

    def watched(state, n=None):
        drafts.append(propose(state, n))
        return drafts[-1]

    drafter.propose = watched
    found = texts(model, PROMPTS, drafter, sampling, batch_size=batch_size)
    return found, torch.cat([draft.tokens.flatten() for draft in drafts])


@pytest.mark.parametrize("sampling", SAMPLINGS[1:], ids=["sampled", "filtered"])
@pytest.mark.parametrize("size, batch_size", [(40, 1), (90, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_no_text_changes(target, method, size, sampling, batch_size):
    small = resized(noisy_copy(target), size)
    found, drafted = recorded_drafts(target, METHODS[method](small), sampling, batch_size)
    assert found == texts(target, PROMPTS, None, sampling, batch_size=batch_size)
    assert drafted.max() < SIZE
    if size < SIZE:  # the target says what the drafter has not heard of
        assert any(token >= size for text in found for token in text)


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "auto"])
def test_padding_costs_no_acceptance(target, method, sampling):
    """A drafter with 29 tokens more, which it finds most likely, drafts what it would draft without them."""
    small = noisy_copy(target)
    _, plain = recorded_drafts(target, METHODS[method](small), sampling, 1)
    _, padded = recorded_drafts(target, METHODS[method](resized(small, 90)), sampling, 1)
    assert torch.equal(plain, padded)


def test_compiled(target):
    expected = texts(target, PROMPTS[:2], None, SAMPLINGS[1])
    small = resized(noisy_copy(target), 48)
    assert texts(target, PROMPTS[:2], SequentialDrafter(small, 2), SAMPLINGS[1], compile=True) == expected


@pytest.mark.parametrize("size", [48, 90])
def test_a_head_with_an_embedding_and_a_vocabulary_of_its_own(tmp_path, size):
    """EAGLE-3, padded otherwise than its target: it drafts no token that the target lacks."""
    from test_tree import eagle3, write

    deep = random_model(num_layers=8)
    tensors = eagle3(deep, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors["embed_tokens.weight"] = torch.randn(size, 48)
    ids = torch.linspace(0, size - 1, 20).long()
    tensors["d2t"] = ids - torch.arange(20)
    del tensors["t2d"]
    write(tmp_path, tensors, config | {"vocab_size": size, "target_hidden_size": 48})
    for sampling in SAMPLINGS[::2]:
        drafter = TreeDrafter(load_head(tmp_path, deep), 9, 3, 3)
        found, drafted = recorded_drafts(deep, drafter, sampling, 1)
        assert found == texts(deep, PROMPTS, None, sampling)
        assert drafted.max() < SIZE
        assert drafter.drafted == int((ids < SIZE).sum())


@pytest.mark.parametrize("size", [48, 90])
def test_a_head_that_borrows_all_from_its_target(tmp_path, size):
    """EAGLE-2: what its config.json says of the vocabulary has no bearing on its arithmetic."""
    from test_tree import eagle2

    deep = random_model(num_layers=8)
    eagle2(deep, tmp_path)
    _, plain = recorded_drafts(deep, TreeDrafter(load_head(tmp_path, deep), 9, 3, 3), SAMPLINGS[1], 1)
    eagle2(deep, tmp_path, vocab_size=size)
    found, padded = recorded_drafts(deep, TreeDrafter(load_head(tmp_path, deep), 9, 3, 3), SAMPLINGS[1], 1)
    assert found == texts(deep, PROMPTS, None, SAMPLINGS[1])
    assert torch.equal(plain, padded)


def foreign(method, **changes):
    small = random_model(**changes)
    return METHODS[method](small) if method in METHODS else tree(small)


@pytest.mark.parametrize("method", [*METHODS, "tree"])
@pytest.mark.parametrize("size", [300, 8000])
def test_a_foreign_drafter_is_refused(target, method, size):
    with pytest.raises(BadInput, match=f"another vocabulary: {size} tokens, not 61"):
        Decoder(target, foreign(method, vocab_size=size), compile=False)


def test_a_head_of_a_wider_target_is_refused(target):
    drafter = tree(random_model(hidden_size=64, head_dim=16))
    with pytest.raises(BadInput, match="hidden size of 64, not 48"):
        Decoder(target, drafter, compile=False)


def test_a_head_with_too_few_tokens_of_the_target(tmp_path):
    deep = random_model(num_layers=8)
    from test_tree import eagle3, write

    tensors = eagle3(deep, tmp_path)
    tensors["d2t"] = 50 + torch.arange(20) - torch.arange(20)  # tokens 50 to 69, of which the target has 11
    del tensors["t2d"]
    config = json.loads((tmp_path / "config.json").read_text())
    tensors["embed_tokens.weight"] = torch.randn(90, 48)
    write(tmp_path, tensors, config | {"vocab_size": 90, "target_hidden_size": 48})
    drafter = TreeDrafter(load_head(tmp_path, deep), 30, 3, 12)
    with pytest.raises(BadInput, match="tree_topk is 12; the head drafts 11 tokens"):
        Decoder(deep, drafter, compile=False)


@pytest.mark.parametrize(
    "ours, targets, fits",
    [
        (151936, 152064, True),  # Qwen2.5, up to 3B and from 7B on
        (152064, 151936, True),
        (32000, 32016, True),  # Llama 2 and its code models
        (32000, 32768, True),  # one vocabulary or not, the tokenizers know
        (32000, 128256, False),  # Llama 2 and 3
        (128256, 151936, False),  # Llama 3 and Qwen
    ],
)
def test_sizes_of_one_vocabulary(ours, targets, fits):
    if fits:
        assert check_vocabulary(ours, targets) == min(ours, targets)
    else:
        with pytest.raises(BadInput, match=f"{ours} tokens, not {targets}"):
            check_vocabulary(ours, targets)


# ---- the command line, which has both tokenizers --------------------------------------------------


def decode(capsys, *flags) -> list[int]:
    settings = ["--compile", "none", "--max_new_tokens", "24", "--temperature", "1", "--json"]
    assert command.main([*settings, *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]


@pytest.mark.parametrize("size", [4000, 4160])
def test_a_padded_drafter_on_the_command_line(capsys, tmp_path, size):
    drafter = shutil.copytree(SHIPPED_SMALL, tmp_path / "padded")

    def resize(tensors):
        rows = tensors["model.embed_tokens.weight"]
        junk = torch.randn(max(size - len(rows), 0), rows.shape[1]).to(rows.dtype)
        tensors["model.embed_tokens.weight"] = torch.cat((rows, junk))[:size].contiguous()

    edit_weights(drafter, resize)
    edit_config(drafter, vocab_size=size)
    flags = ("--method", "sequential", "--draft_checkpoint_path", drafter)
    assert decode(capsys, *flags) == decode(capsys, "--method", "autoregressive")


def test_a_padded_target(capsys, tmp_path):
    """The other way round: the shipped small model drafts for a target that was padded."""
    padded = shutil.copytree(SHIPPED_TARGET, tmp_path / "padded")

    def pad(tensors):
        rows = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat((rows, torch.zeros_like(rows[:64])))

    edit_weights(padded, pad)
    edit_config(padded, vocab_size=4160)
    flags = ("--checkpoint_path", padded, "--draft_checkpoint_path", SHIPPED_SMALL)
    assert decode(capsys, *flags, "--method", "sequential") == decode(capsys, "--method", "autoregressive")


class Tokens:
    """What `check_tokens` asks of a tokenizer."""

    def __init__(self, ordinary: list[str], added: list[str] = (), special: int = 0):
        """`special`: of how many tokens behind these nothing is shown."""
        self.size = len(ordinary) + len(added) + special
        texts = [text.encode() for text in (*ordinary, *added)] + special * [b""]
        self.token_bytes = texts.__getitem__
        self.added_bytes = {len(ordinary) + i: text.encode() for i, text in enumerate(added)}


@pytest.mark.parametrize(
    "ours, targets, wrong",
    [
        (Tokens(["a", "b"]), Tokens(["a", "b", "c"]), None),  # lacks the last one
        (Tokens(["a"], ["<think>"]), Tokens(["a"], ["<reserved>"]), None),  # Llama 3 and R1-Distill
        (Tokens(["a"], ["<think>"]), Tokens(["a"], special=2), None),
        (Tokens(["a", "b"]), Tokens(["a", "c"]), "token 1 is b'b', not b'c'"),
        (Tokens(["a", "b"]), Tokens(["a"], ["<think>"]), "token 1 is b'b', not b'<think>'"),
        (None, Tokens(["a"]), None),
    ],
)
def test_tokens_of_one_vocabulary(ours, targets, wrong):
    if wrong is None:
        check_tokens(ours, targets)
    else:
        with pytest.raises(BadInput, match=wrong):
            check_tokens(ours, targets)


def test_the_shipped_tokenizers_agree():
    check_tokens(load_tokenizer(SHIPPED_SMALL), load_tokenizer(SHIPPED_TARGET))
    assert load_model(SHIPPED_SMALL).config.vocab_size == load_model(SHIPPED_TARGET).config.vocab_size
