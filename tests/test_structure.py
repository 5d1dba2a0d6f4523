"""Outputs of a given structure under speculation: texts of plain decoding, which follow their schemas.

What was broken in other engines has a test each. The masks themselves are tested in test_grammar.py, and
forced drafts in test_forced.py.
"""

import json
import math
import os
import random
import re
from collections import Counter

import pytest
import torch
from conftest import (
    NEEDS_EQUAL_ROWS,
    SHIPPED_SMALL,
    SMALL_HEAD,
    collect,
    guessing_block_head,
    guessing_head,
    random_model,
    texts,
)
from test_decoding import RandomTreeDrafter

from auto import AdaptiveLookup, AutoDrafter
from checkpoints import load_model
from costs import Stats
from dflash import BlockDrafter
from drafts import Draft, Drafter
from eagle import TreeDrafter
from forced import ForcedDrafter
from gpt_spec import Decoder, HierarchicalDrafter, LookupDrafter, SequentialDrafter
from heads import load_head
from model import BadInput
from packing import share_weights
from sampling import Controls, Sampling
from text import load_tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from grammar import Matcher, Vocabulary, grammar_text  # noqa: E402

SCHEMAS = int(os.environ.get("GPT_SPEC_SCHEMAS", "8"))  # random ones; all 200 take ten minutes
LENGTH = 80
KEYS = ["name", "id", "size", "kind", "x", "items", "state"]


# ---- random schemas ------------------------------------------------------------------------------


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    """Everything that a request may contain: at the top an object, as people ask for."""
    kinds = [an_enum, an_integer, a_string, a_pattern, a_boolean, a_constant]
    kinds += [an_object, an_array, a_choice] if depth < 2 else []
    return rng.choice(kinds if depth else [an_object])(rng, depth)


def an_enum(rng, depth):
    return {"enum": rng.sample(["red", "green", 3, True, None, "a b", "é"], rng.randint(1, 4))}


def an_integer(rng, depth):
    least = rng.randint(-50, 50)
    return {"type": "integer", "minimum": least, "maximum": least + rng.choice([0, 3, 100, 2000])}


def a_string(rng, depth):
    return {"type": "string", "maxLength": rng.randint(0, 12)}


def a_pattern(rng, depth):
    patterns = ["^[a-z]{2,5}$", "^(yes|no)$", "^[0-9]{4}-[0-9]{2}$", "^v[0-9]+(\\.[0-9]+)?$"]
    return {"type": "string", "pattern": rng.choice(patterns)}


def a_boolean(rng, depth):
    return {"type": "boolean"}


def a_constant(rng, depth):
    return {"const": rng.choice([7, "fixed text", None, False, "x"])}


def an_array(rng, depth):
    least = rng.randint(0, 2)
    sizes = {"minItems": least, "maxItems": least + rng.randint(0, 2)}
    return {"type": "array", "items": random_schema(rng, depth + 1), **sizes}


def a_choice(rng, depth):
    return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}


def an_object(rng, depth):
    names = rng.sample(KEYS, rng.randint(1, 4 - depth))
    needed = [name for name in names if rng.random() < 0.7]
    inside = {name: random_schema(rng, depth + 1) for name in names}
    return {"type": "object", "properties": inside, "required": needed, "additionalProperties": False}


def follows(schema: dict, text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


# ---- models and methods --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED_SMALL)


@pytest.fixture(scope="module")
def target():
    return load_model(SHIPPED_SMALL, "w4a16")


@pytest.fixture(scope="module")
def other():
    """Of other weights, so that it does not always agree."""
    return load_model(SHIPPED_SMALL, "bf16")


@pytest.fixture(scope="module")
def stop(tokenizer) -> int:
    return tokenizer.specials[tokenizer.eos]


@pytest.fixture(scope="module")
def vocabulary(target, tokenizer, stop):
    return Vocabulary(tokenizer, target.config.vocab_size, [stop])


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    said = ['{"name": "', "def f(x):\n    return json.dumps(", "", "x = ", "class A:\n"]
    return [tokenizer.encode(text) for text in said]


def matcher(vocabulary, **given):
    return Matcher(vocabulary, grammar_text(**given))


def tree(model, precision):
    return TreeDrafter(load_head(SMALL_HEAD, model, precision), 12, 4, 4)


def qspec(target):
    return SequentialDrafter(share_weights(target, "w4a4"), 3, shares_cache=True)


def auto(target, other):
    drafter = AutoDrafter({"lookup": AdaptiveLookup(), "sequential": SequentialDrafter(other, 3)})
    drafter.needs_costs = False  # every step is thought to cost the same
    return drafter


METHODS = {  # as generate.py runs them, and as `Decoder` may be asked to
    "lookup": lambda target, other: ForcedDrafter(LookupDrafter(4)),
    "sequential": lambda target, other: ForcedDrafter(SequentialDrafter(other, 4)),
    "tree": lambda target, other: ForcedDrafter(tree(target, "w4a16")),
    "blocks": lambda target, other: ForcedDrafter(BlockDrafter(guessing_block_head(target, True), 9)),
    "hierarchical": lambda target, other: ForcedDrafter(HierarchicalDrafter(other, tree(other, "bf16"), 3)),
    "qspec": lambda target, other: ForcedDrafter(qspec(target)),
    "auto": lambda target, other: ForcedDrafter(auto(target, other)),
    "forced alone": lambda target, other: ForcedDrafter(Drafter()),
    "tree, nothing forced": lambda target, other: tree(target, "w4a16"),
    "bush, nothing forced": lambda target, other: RandomTreeDrafter(target),
    "unsure, nothing forced": lambda target, other: SequentialDrafter(other, 4, draft_confidence=0.3),
}


def decode(target, drafter, prompts, grammars, batch_size=4, length=LENGTH, **options):
    """Texts, and why each ended. Row i has seed i; options that `Sampling` knows go there."""
    known = {name: options.pop(name) for name in list(options) if name in Sampling.__dataclass_fields__}
    samplings = [Sampling(**known, seed=i, grammar=grammar) for i, grammar in enumerate(grammars)]
    decoder = Decoder(target, drafter, Sampling(), 256, batch_size, False, every_control=True)
    said, reasons = [[] for _ in prompts], [None] * len(prompts)
    for emissions in decoder.run(prompts, length, samplings=samplings, **options):
        for emission in emissions:
            said[emission.prompt_index] += emission.tokens
            reasons[emission.prompt_index] = emission.finish_reason
    return said, reasons


# ---- every method --------------------------------------------------------------------------------


def compare(target, other, vocabulary, prompts, stop, schemas, temperature, names) -> Counter:
    """Four schemas and a text without one at a time, in one row after the other and in four rows."""
    found, tokenizer = Counter(), vocabulary.tokenizer
    for begin in range(0, len(schemas), 4):
        some = schemas[begin : begin + 4]
        grammars = [*(matcher(vocabulary, json_schema=schema) for schema in some[:2]), None]
        grammars += [matcher(vocabulary, json_schema=schema) for schema in some[2:]]
        asked = (prompts[: len(grammars)], grammars)
        alone, reasons = decode(target, None, *asked, 1, temperature=temperature, stop_ids=[stop])
        for schema, text, reason in zip([*some[:2], None, *some[2:]], alone, reasons):
            if schema is not None:
                found[reason] += 1
                whole = tokenizer.decode([token for token in text if token != stop])
                found["valid"] += reason == "stop" and follows(schema, whole)
        for name in names:
            drafter = METHODS[name](target, other)
            ours, _ = decode(target, drafter, *asked, 4, temperature=temperature, stop_ids=[stop])
            found["texts"] += len(ours)
            found["differ"] += sum(a != b for a, b in zip(ours, alone))
            found["forced"] += getattr(drafter, "accepted", 0)
    return found


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_schemas(target, other, vocabulary, prompts, stop, temperature):
    """Texts are those of plain decoding, and follow their schemas unless the budget cuts them."""
    rng = random.Random(22)
    schemas = [random_schema(rng) for _ in range(SCHEMAS)]
    found = compare(target, other, vocabulary, prompts, stop, schemas, temperature, METHODS)
    print(f"\ntemperature {temperature}: {SCHEMAS} schemas, {dict(found)}")
    assert found["differ"] == 0 and found["valid"] == found["stop"] >= SCHEMAS // 3
    assert found["stop"] + found["length"] == SCHEMAS and found["forced"] > 20


OTHERS = {
    "words": {"regex": "[a-z]{2,8}( [a-z]{2,8}){0,4}"},
    "numbers": {"regex": "[0-9]+(,[0-9]+)*"},
    "code": {"grammar": 'start: "if" " " NAME ":\\n" ("    " NAME "\\n")+\nNAME: /[a-z_]{1,8}/\n'},
}
EVERYTHING = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3, "min_tokens": 12}
EVERYTHING |= {
    "logit_bias": {300: 2.0, 500: -4.0},
    "bad_words": ((1224,), (570, 2091)),
    "top_p": 0.95,
    "min_p": 0.01,
}


def everything(vocabulary, stop, temperature) -> tuple[list, dict]:
    """A grammar for each prompt, and all that can be asked besides."""
    grammars = [matcher(vocabulary, **given) for given in OTHERS.values()]
    grammars = [*grammars, None, matcher(vocabulary, json_schema=random_schema(random.Random(3)))]
    return grammars, {"temperature": temperature, "stop_ids": [stop], **EVERYTHING}


@pytest.fixture(scope="module")
def plain_texts(target, vocabulary, prompts, stop) -> dict[float, list[list[int]]]:
    """What plain decoding says to `everything`, by temperature."""
    given = {temperature: everything(vocabulary, stop, temperature) for temperature in (0.0, 1.0)}
    return {t: decode(target, None, prompts, masks, 1, **asked)[0] for t, (masks, asked) in given.items()}


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("name", METHODS)
def test_grammars_and_all_controls_together(target, other, vocabulary, prompts, stop, plain_texts, name):
    for temperature in (0.0, 1.0):
        (grammars, asked), alone = everything(vocabulary, stop, temperature), plain_texts[temperature]
        drafter = METHODS[name](target, other)
        assert decode(target, drafter, prompts, grammars, 3, **asked)[0] == alone
        assert len(alone[1]) > 12 < len(alone[3])  # a grammar that may go on, and none
        assert re.fullmatch(OTHERS["words"]["regex"], written(vocabulary, alone[0]))
        assert re.fullmatch("[0-9]+(,[0-9]*)*", written(vocabulary, alone[1]))


def written(vocabulary, tokens: list[int]) -> str:
    return vocabulary.tokenizer.decode([token for token in tokens if token not in vocabulary.stops])


@NEEDS_EQUAL_ROWS
def test_compiled(target, vocabulary, prompts, stop):
    grammars = [matcher(vocabulary, **given) for given in OTHERS.values()]
    alone, _ = decode(target, None, prompts[:3], grammars, 1, stop_ids=[stop])
    sampling = Sampling(grammar=grammars[0])
    decoder = Decoder(target, LookupDrafter(4), sampling, 256, 2, compile=True)
    decoder.warm_up()
    samplings = [Sampling(grammar=grammar, seed=i) for i, grammar in enumerate(grammars)]
    assert collect(decoder.run(prompts[:3], LENGTH, [stop], samplings=samplings), 3) == alone


# ---- what was broken elsewhere -------------------------------------------------------------------


class Parrot(Drafter):
    """Drafts the same tokens in every step, as a chain or as children of the root."""

    needs_host = True

    def __init__(self, tokens: list[int], chain: bool = True):
        self.said, self.chain, self.max_nodes = tokens, chain, len(tokens) + 1

    def propose(self, state, n=None):
        root = state.tokens.gather(1, state.length[:, None])
        tokens = torch.cat((root, torch.tensor(self.said).expand(len(root), -1)), dim=1)
        above = list(range(-1, len(self.said))) if self.chain else [-1, *[0] * len(self.said)]
        return Draft(
            tokens, torch.tensor(above).expand_as(tokens), self.max_nodes - 1, branches=not self.chain
        )


@pytest.mark.parametrize("regex", ["yes", "(yes)?", "(yes){1,3}", "(yes)*"])
def test_drafts_past_the_end_of_the_grammar(target, vocabulary, prompts, stop, regex):
    """No exception, no token beyond the end, and a reason for it."""
    yes, grammar = matcher(vocabulary, regex="yes").forced(8), matcher(vocabulary, regex=regex)
    asked, options = (prompts[:3], [grammar] * 3), {"stop_ids": [stop], "length": 20}
    alone, reasons = decode(target, None, *asked, 1, **options)
    for said in (yes * 4, [*yes, stop, *yes, stop], [stop, *yes, stop], [stop, stop, stop], [7, *yes, stop]):
        for chain in (True, False):
            for drafter in (Parrot(said, chain), ForcedDrafter(Parrot(said, chain))):
                assert decode(target, drafter, *asked, 2, **options) == (alone, reasons)
    if regex == "yes":
        assert alone == [[*yes, stop]] * 3 and reasons == ["stop"] * 3


def test_a_stop_token_inside_a_draft(target, vocabulary, prompts, stop):
    """Where the grammar may end or go on, behind a draft that ends and goes on."""
    digit, grammar = matcher(vocabulary, regex="4+").forced(1)[0], matcher(vocabulary, regex="[0-9]+")
    bias = {"logit_bias": {digit: 50.0}, "stop_ids": [stop]}
    alone, _ = decode(target, None, prompts[:2], [grammar] * 2, 1, length=12, **bias)
    assert alone == [[digit] * 12] * 2
    for said in ([digit, digit, stop, digit, digit], [digit, stop, stop, digit]):
        assert decode(target, Parrot(said), prompts[:2], [grammar] * 2, 2, length=12, **bias)[0] == alone
    ends = {"logit_bias": {stop: 50.0}, "stop_ids": [stop], "length": 12}
    assert decode(target, Parrot([digit, stop, digit]), prompts[:2], [grammar] * 2, 2, **ends) == decode(
        target, None, prompts[:2], [grammar] * 2, 1, **ends
    )


def test_the_first_token_is_masked(target, vocabulary, prompts, stop):
    for drafter in (None, ForcedDrafter(Drafter())):
        grammars = [matcher(vocabulary, regex=word) for word in ("q+", "7z", "")]
        said, reasons = decode(target, drafter, prompts[:3], grammars, 2, length=1, stop_ids=[stop])
        assert [written(vocabulary, text)[:1] for text in said] == ["q", "7", ""]
        assert said[2] == [stop] and reasons == ["length", "length", "stop"]


def test_no_row_is_ended_by_another(target, other, vocabulary, prompts, stop):
    """Finished grammars, rows that are refilled, and rows without a grammar in one batch."""
    grammars = [matcher(vocabulary, regex="a"), None, matcher(vocabulary, regex="[a-z]{30}"), None]
    grammars = [*grammars, matcher(vocabulary, regex="b+")]
    alone = decode(target, None, prompts, grammars, 1, stop_ids=[stop])
    assert len({len(text) for text in alone[0]}) > 2
    for name in ("lookup", "tree"):
        assert decode(target, METHODS[name](target, other), prompts, grammars, 2, stop_ids=[stop]) == alone


def test_a_padded_vocabulary(tokenizer, stop):
    """Tokens behind those of the tokenizer are never written, however probable."""
    target = random_model(vocab_size=tokenizer.size + 37, max_context=128)
    target.lm_head.weight[tokenizer.size :] *= 20
    vocabulary, asked = Vocabulary(tokenizer, tokenizer.size + 37, [stop]), [[5, 6], [7]]
    assert max(max(text) for text in texts(target, asked, max_new_tokens=20)) >= tokenizer.size
    grammars = [matcher(vocabulary, regex="[a-z ]{40}"), matcher(vocabulary, json_schema={"type": "object"})]
    for temperature in (0.0, 1.0):
        alone = decode(target, None, asked, grammars, 1, 30, temperature=temperature, stop_ids=[stop])
        assert max(map(max, alone[0])) < tokenizer.size
        drafter = ForcedDrafter(TreeDrafter(guessing_head(target), 9, 3, 3))
        assert (
            decode(target, drafter, asked, grammars, 2, 30, temperature=temperature, stop_ids=[stop]) == alone
        )


def test_min_tokens_and_a_grammar(target, other, vocabulary, prompts, stop):
    """A text goes on where its grammar lets it. Where it does not, the grammar wins, and the text ends."""
    grammars = [matcher(vocabulary, regex="yes"), matcher(vocabulary, regex="[a-z ]*")]
    grammars = [*grammars, matcher(vocabulary, regex="(yes|no){2,3}")]
    asked = {"min_tokens": 10, "stop_ids": [stop], "logit_bias": {stop: 30.0}}
    alone, reasons = decode(target, None, prompts[:3], grammars, 1, **asked)
    assert written(vocabulary, alone[0]) == "yes" and len(alone[1]) == 11 and reasons == ["stop"] * 3
    assert re.fullmatch("(yes|no){3}", written(vocabulary, alone[2]))
    for name in METHODS:
        assert decode(target, METHODS[name](target, other), prompts[:3], grammars, 3, **asked)[0] == alone


def test_bans_of_all_that_a_grammar_allows(target, other, vocabulary, prompts, stop):
    """The grammar wins, over a bias of -inf, too."""
    grammar = matcher(vocabulary, regex="(yes|no)")
    ids = {
        token for token, text in enumerate(vocabulary.tokens) if text in (b"y", b"ye", b"yes", b"n", b"no")
    }
    for banned in ({"bad_words": tuple((t,) for t in ids)}, {"logit_bias": dict.fromkeys(ids, -math.inf)}):
        alone, reasons = decode(target, None, prompts[:1], [grammar], 1, stop_ids=[stop], **banned)
        assert written(vocabulary, alone[0]) in ("yes", "no") and reasons == ["stop"]
        drafter = ForcedDrafter(tree(target, "w4a16"))
        assert decode(target, drafter, prompts[:1], [grammar], 1, stop_ids=[stop], **banned)[0] == alone


def test_a_ban_holds_where_the_grammar_leaves_a_choice(target, vocabulary, prompts, stop):
    ids = [token for token, text in enumerate(vocabulary.tokens) if text in (b"y", b"ye", b"yes")]
    for banned in ({"bad_words": tuple((t,) for t in ids)}, {"logit_bias": dict.fromkeys(ids, -math.inf)}):
        for seed in range(3):
            grammar = matcher(vocabulary, regex="(yes|no)")
            [said], _ = decode(
                target,
                None,
                prompts[seed : seed + 1],
                [grammar],
                1,
                temperature=5.0,
                stop_ids=[stop],
                **banned,
            )
            assert written(vocabulary, said) == "no"


def test_forced_tokens_are_counted_and_change_no_text(target, vocabulary, prompts, stop):
    schema = {"type": "object", "properties": {"identifier": {"type": "boolean"}}, "required": ["identifier"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    grammar, stats, drafter = matcher(vocabulary, json_schema=schema), Stats(), ForcedDrafter(Drafter())
    alone, _ = decode(target, None, prompts[:1], [grammar], 1, stop_ids=[stop])
    assert decode(target, drafter, prompts[:1], [grammar], 1, stop_ids=[stop], stats=stats)[0] == alone
    assert drafter.accepted == stats.accepted_tokens >= 3 and stats.target_forwards < len(alone[0]) - 1
    assert follows(schema, written(vocabulary, alone[0]))


def test_log_probabilities_are_those_of_raw_logits(target, vocabulary, prompts, stop):
    """A token that is forced is not certain."""
    sampling = Sampling(grammar=matcher(vocabulary, regex="quite unlikely"))
    decoder = Decoder(target, ForcedDrafter(Drafter()), sampling, 256, compile=False, logprobs=2)
    said = [each for emissions in decoder.run(prompts[:1], 20, [stop]) for each in emissions[0].logprobs]
    assert any(each.logprob < -3 and each.token not in dict(each.top) for each in said)


def test_a_conversation_begins_each_answer_at_the_beginning_of_the_grammar(
    target, other, vocabulary, prompts, stop
):
    grammar, history = matcher(vocabulary, regex="(yes|no), [a-z]{3}"), prompts[1]
    decoder = Decoder(target, METHODS["tree"](target, other), Sampling(grammar=grammar), 256, compile=False)
    for _ in range(3):
        [answer] = collect(decoder.run([history], 20, [stop], reuse=True), 1)
        assert re.fullmatch("(yes|no), [a-z]{3}", written(vocabulary, answer))
        assert decode(target, None, [history], [grammar], 1, 20, stop_ids=[stop])[0] == [answer]
        history = history + answer[:-1] + prompts[3]


def test_an_abandoned_run_leaves_no_trace(target, other, vocabulary, prompts, stop):
    grammars = [matcher(vocabulary, regex="[0-9]{20}"), matcher(vocabulary, regex="[a-z]{20}")]
    sampling = Sampling(grammar=grammars[0])
    decoder = Decoder(target, METHODS["lookup"](target, other), sampling, 256, 2, compile=False)
    steps = decoder.run(prompts[:2], 30, [stop])
    for _ in range(4):
        next(steps)
    again = collect(decoder.run(prompts[1:2], 30, [stop], samplings=[Sampling(grammar=grammars[1])]), 1)
    assert again == decode(target, None, prompts[1:2], grammars[1:], 1, 30, stop_ids=[stop])[0]


@pytest.mark.parametrize("stops", [[], [5]])
def test_requests_that_cannot_be(target, vocabulary, prompts, stop, stops):
    """A grammar is never ignored. Where it cannot be obeyed, that is said."""
    grammar = Sampling(grammar=matcher(vocabulary, regex="a+"))
    decoder = Decoder(target, max_length=64, compile=False)
    with pytest.raises(BadInput, match="every_control=True"):
        decoder.run([[1]], 5, [stop], samplings=[grammar])
    decoder = Decoder(target, None, grammar, 64, compile=False)
    with pytest.raises(BadInput, match="the tokens that end its texts must be among the stop_ids"):
        decoder.run([[1]], 5, stops)
    decoder = Decoder(random_model(), None, grammar, 64, compile=False)
    with pytest.raises(BadInput, match="another vocabulary; the model has 61 tokens"):
        decoder.run([[1]], 5, [stop])


# ---- broken on purpose ---------------------------------------------------------------------------


def change_masks(monkeypatch, change):
    """`change` is of masks int32 [B, n, words]."""
    right = Controls.masks

    def masks(self, *nodes):
        masks = right(self, *nodes)
        return masks if masks is None else change(masks)

    monkeypatch.setattr(Controls, "masks", masks)


def mask_of_the_previous_node(monkeypatch):
    change_masks(monkeypatch, lambda masks: torch.cat((masks[:, :1], masks[:, :-1]), dim=1))


def mask_of_the_root_for_all(monkeypatch):
    change_masks(monkeypatch, lambda masks: masks[:, :1].expand_as(masks).contiguous())


def masks_of_another_row(monkeypatch):
    change_masks(monkeypatch, lambda masks: masks.roll(1, 0))


def first_token_free(monkeypatch):
    change_masks(monkeypatch, lambda masks: None if masks.shape[:2] == (1, 1) else masks)


def tree_masked_as_a_chain(monkeypatch):
    right = Matcher.walk
    flat = lambda self, tokens, parent, out: right(self, tokens, [*range(-1, len(tokens) - 1)], out)  # noqa: E731
    monkeypatch.setattr(Matcher, "walk", flat)


FAULTS = [mask_of_the_previous_node, tree_masked_as_a_chain, mask_of_the_root_for_all, first_token_free]
FAULTS += [masks_of_another_row]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_seen(target, vocabulary, prompts, stop, fault, monkeypatch):
    """By another text, or by a text that leaves its structure."""
    grammars = [matcher(vocabulary, **given) for given in OTHERS.values()]
    alone, _ = decode(target, None, prompts[:3], grammars, 1, stop_ids=[stop], temperature=1.0)
    fault(monkeypatch)
    with pytest.raises((AssertionError, BadInput)):
        drafter = tree(target, "w4a16")
        assert decode(target, drafter, prompts[:3], grammars, 3, stop_ids=[stop], temperature=1.0)[0] == alone
