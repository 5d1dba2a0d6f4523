"""Structures of outputs: masks that are right at every node of a draft, and errors of one line.

Every mask is compared with brute force: a matcher of its own for every node, which has consumed its path.
"""

import json
import random
import shutil

import pytest
import torch
from conftest import SHIPPED_TARGET, hide_module
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from grammar import Matcher, Vocabulary, grammar_text, read_grammar
from model import BadInput
from text import load_tokenizer

llguidance = pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue é"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COMPACT = PERSON | {"x-guidance": {"whitespace_flexible": False}}
LARK = 'start: "if" " " NAME ":\\n" ("    " NAME "\\n")+\nNAME: /[a-z_]{1,8}/\n'
GRAMMARS = {
    "json": {"json_schema": PERSON},
    "compact json": {"json_schema": COMPACT},
    "regex": {"regex": r"hello dear [a-f]{2,5}(-[0-9]{1,3})*( and then nothing else)?"},
    "lark": {"grammar": LARK},
}
PADDING = 37  # tokens of the model that the tokenizer does not have


def byte_level(path, *parts):
    """A tokenizer.json that writes bytes, trained on what little there is here."""
    library = Library(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    library.train_from_iterator([json.dumps(PERSON, indent=4), LARK, *parts] * 3, trainer)
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return load_tokenizer(path)


@pytest.fixture(scope="module", params=["shipped", "llama2", "llama2 legacy", "llama3", "byte level"])
def tokenizer(request, tmp_path_factory):
    if request.param == "shipped":
        return load_tokenizer(SHIPPED_TARGET)
    path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        return byte_level(path)
    name, *legacy = request.param.split()
    shutil.copy(request.getfixturevalue("shared") / f"{name}_tokenizer.model", path / "tokenizer.model")
    if legacy:  # a blank before every text
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(path)


def end_of(tokenizer):
    return tokenizer.specials[tokenizer.eos]


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    """Two tokens may end a text. One of them is padding: no tokenizer knows a text of it."""
    size = max(tokenizer.size, *tokenizer.special_ids) + 1 + PADDING
    return Vocabulary(tokenizer, size, [end_of(tokenizer), size - 1, size + 5])


@pytest.fixture(scope="module")
def shipped():
    tokenizer = load_tokenizer(SHIPPED_TARGET)
    return Vocabulary(tokenizer, tokenizer.size, [end_of(tokenizer)])


def start(vocabulary, **grammar):
    return Matcher(vocabulary, grammar_text(**grammar))


def allowed(mask):
    """The tokens of a mask int32 [words]."""
    bits = mask[:, None] >> torch.arange(32, dtype=torch.int32) & 1  # [words, 32]
    return bits.flatten().nonzero().flatten().tolist()


def brute_force(vocabulary, text, path):
    """The mask behind a text and a path, by a matcher of its own."""
    place = llguidance.LLMatcher(vocabulary.table, text, log_level=0)
    assert place.consume_tokens(path)
    return torch.frombuffer(bytearray(place.compute_bitmask()), dtype=torch.int32)


def write_at_random(vocabulary, matcher, rng, most):
    """Up to `most` tokens that the grammar allows, and whether the text has ended with them."""
    said = []
    while len(said) < most:
        stops = vocabulary.stops & {*(ids := allowed(matcher.mask()))}
        if stops and (len(ids) == len(stops) or rng.random() < 0.3):
            return said, True
        # The shorter the likelier, or strings and numbers would not end.
        ids = sorted(set(ids) - stops, key=lambda token: len(vocabulary.tokens[token]))
        said.append(ids[int(len(ids) * rng.random() ** 3)])
        matcher.consume(said[-1:])
    return said, False


def random_draft(vocabulary, masks, rng, n):
    """A draft of n nodes: tokens, parents, and the mask of every node that should have one. `masks` gives the
    mask behind a path."""
    tokens, parent, paths, found = [7], [-1], [[]], {0: masks([])}
    for node in range(1, n):
        above = rng.choice([*found] if rng.random() < 0.7 else [-1, *range(node)])
        mask = found.get(above)
        good = [] if mask is None else [t for t in allowed(mask) if t not in vocabulary.stops]
        kind = rng.random()
        token = rng.choice(good) if good and kind < 0.7 else rng.randrange(len(vocabulary.tokens))
        token = rng.choice(sorted(vocabulary.stops)) if kind > 0.85 else token
        tokens.append(token)
        parent.append(above)
        paths.append([] if above < 0 else [*paths[above], token])
        if token in good:
            found[node] = masks(paths[node])
    return tokens, parent, found


@pytest.mark.parametrize("name", GRAMMARS)
def test_every_node_has_the_mask_of_its_path(vocabulary, name):
    rng, text, words = random.Random(name), grammar_text(**GRAMMARS[name]), vocabulary.words
    matcher, seen = Matcher(vocabulary, text), 0
    for most in (0, 3, 8, 20, 40, 100):
        matcher = matcher.fresh()
        said, _ = write_at_random(vocabulary, matcher, rng, most)
        for n in (1, 9, 16):
            draft = random_draft(
                vocabulary, lambda path, said=said: brute_force(vocabulary, text, said + path), rng, n
            )
            tokens, parent, masks = draft
            out = torch.zeros(n, words, dtype=torch.int32)
            matcher.walk(tokens, parent, out)
            for node in range(n):
                assert torch.equal(out[node], masks.get(node, torch.full_like(out[node], -1)))
            seen += len(masks) - 1
            assert torch.equal(matcher.mask(), masks[0])  # the place is what it was
    assert seen > 20


@pytest.mark.parametrize("name", GRAMMARS)
def test_texts_end_where_the_grammar_is_complete(vocabulary, name):
    """Tokens that end a text are allowed there and nowhere else, all of them; and padding never is."""
    rng, matcher = random.Random(name), start(vocabulary, **GRAMMARS[name])
    least = max(vocabulary.tokenizer.size, *vocabulary.tokenizer.special_ids)
    for _ in range(3):
        matcher = matcher.fresh()
        for _ in range(60):
            ids = set(allowed(matcher.mask()))
            assert ids & vocabulary.stops == (vocabulary.stops if matcher.place.is_accepting() else set())
            assert ids and {t for t in ids if t > least or not vocabulary.tokens[t]} <= vocabulary.stops
            if write_at_random(vocabulary, matcher, rng, 1) == ([], True):
                break


@pytest.mark.parametrize("name", ["json", "compact json"])
def test_whole_texts_follow_their_schema(vocabulary, name):
    rng, schema, ended = random.Random(5), GRAMMARS[name]["json_schema"], 0
    matcher = start(vocabulary, json_schema=schema)
    for _ in range(8):
        matcher = matcher.fresh()
        said, end = write_at_random(vocabulary, matcher, rng, 300)
        ended += end
        if end:
            jsonschema.validate(json.loads(vocabulary.tokenizer.decode(said)), schema)
    assert ended >= 4


@pytest.mark.parametrize("name", GRAMMARS)
def test_forced_tokens_are_those_that_the_masks_leave(vocabulary, name):
    rng, matcher, forced = random.Random(name), start(vocabulary, **GRAMMARS[name]), 0
    for _ in range(3):
        matcher = matcher.fresh()
        for _ in range(60):
            tokens = matcher.forced(8)
            assert matcher.forced(2) == tokens[:2]
            out = torch.empty(len(tokens) + 1, vocabulary.words, dtype=torch.int32)
            matcher.walk([7, *tokens], [*range(-1, len(tokens))], out)
            assert [allowed(mask) for mask in out[:-1]] == [[token] for token in tokens]
            forced += len(tokens)
            if write_at_random(vocabulary, matcher, rng, 1) == ([], True):
                break
    assert forced > 2


def test_a_draft_may_run_past_the_end(shipped):
    matcher, [stop] = start(shipped, regex="yes"), shipped.stops
    yes = matcher.forced(8)
    assert b"".join(shipped.tokens[token] for token in yes) == b"yes"
    tokens = [7, *yes, stop, *yes, stop, stop]
    out = matcher.walk(
        tokens, [*range(-1, len(tokens) - 1)], torch.empty(len(tokens), 128, dtype=torch.int32)
    )
    end = len(yes)
    assert allowed(out[end]) == [stop] and (out[end + 1 :] == -1).all()
    matcher.consume([*yes, stop, stop])
    assert allowed(matcher.mask()) == [stop] and matcher.forced(8) == []
    assert matcher.fresh().forced(8) == yes


def test_a_token_that_ends_the_text_has_no_place_in_the_grammar(shipped):
    """Not even where it is a token that could be text."""
    stop, newline = shipped.tokenizer.encode_text("\n")[0], 4 + ord("\n")
    vocabulary = Vocabulary(shipped.tokenizer, 4096, [stop])
    assert vocabulary.tokens[newline] == b"\n" and stop != newline
    matcher = start(vocabulary, regex="a\n*b?")
    matcher.consume([4 + ord("a")])
    ids = allowed(matcher.mask())
    assert {stop, newline} <= set(ids)
    matcher.consume([stop])
    assert allowed(matcher.mask()) == ids
    assert stop not in allowed(start(vocabulary, regex="\n+a").mask())


def test_forced_texts_are_the_tokens_that_the_tokenizer_writes(vocabulary):
    """Not the longest ones from the left; and none for a blank that a tokenizer puts before every text."""
    encode, differ = vocabulary.tokenizer.encode_text, 0
    for word in ("sequences", "parameters", "identifications", "unbelievable", "dictionaries", "tags"):
        text = f'{word}":"'
        there = encode('{"\n' + text)
        assert vocabulary.spell(text.encode()) == there[len(encode('{"\n')) :]
        differ += vocabulary.spell(text.encode()) != vocabulary.spell_greedily(text.encode())
    assert differ or vocabulary.tokenizer.size < 1000  # that one has learnt too little


class Letters:
    """A tokenizer of a few letters."""

    specials, tokens = {"<end>": 0}, [b"", b"v", b"w", b"x", b"z"]

    def token_bytes(self, token):
        return self.tokens[token]

    def encode_text(self, text):
        return [self.tokens.index(letter.encode()) for letter in text if letter.encode() in self.tokens]


@pytest.mark.parametrize("regex", ["x[yY]|wz?|v", "xy|wz?|v"])
def test_a_dead_end_of_a_draft_does_no_harm(regex):
    """No token writes what has to follow an x. There a draft may end, but no text."""
    matcher, x, w, v, z = start(Vocabulary(Letters(), 5, [0]), regex=regex), 3, 2, 1, 4
    draft = ([7, w, x, x, v, z, z], [-1, 0, 0, 2, 0, 1, 2])
    out = matcher.walk(*draft, torch.empty(7, 1, dtype=torch.int32))
    masks = [allowed(mask) for mask in out]
    assert masks == [[v, w, x], [0, z], [0], [*range(32)], [0], [0], [*range(32)]]
    matcher.consume([w])
    assert allowed(matcher.mask()) == [0, z]
    with pytest.raises(BadInput) as error:
        matcher = matcher.fresh()
        matcher.consume([x])
        matcher.mask()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_dead_end_is_left_for_where_the_text_was():
    matcher, x, w, z = start(Vocabulary(Letters(), 5, [0]), regex="wz(x[yY]|w)z"), 3, 2, 4
    matcher.consume([w, z])
    out = matcher.walk([7, x, w, z], [-1, 0, 0, 2], torch.empty(4, 1, dtype=torch.int32))
    assert [allowed(mask) for mask in out] == [[w, x], [0], [z], [0]]
    assert allowed(matcher.mask()) == [w, x]


def test_a_text_that_leaves_its_structure_is_an_error(shipped):
    matcher = start(shipped, regex="[0-9]+")
    with pytest.raises(BadInput, match="left its structure") as error:
        matcher.consume(shipped.tokenizer.encode_ordinary("a"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["shipped", "llama2"])
def test_all_tokens_of_the_same_bytes_are_allowed(name, request, tmp_path):
    """In sentencepiece, a character is often a token of its own and a byte, too."""
    path = SHIPPED_TARGET
    if name == "llama2":
        path = tmp_path
        shutil.copy(request.getfixturevalue("shared") / "llama2_tokenizer.model", path / "tokenizer.model")
    tokenizer = load_tokenizer(path)
    vocabulary = Vocabulary(tokenizer, tokenizer.size, [2])
    alike = [token for token, text in enumerate(vocabulary.tokens) if text == b"{"]
    assert len(alike) == 2 and alike[0] in tokenizer.encode_ordinary("{{") + [3 + ord("{"), 4 + ord("{")]
    matcher = start(vocabulary, regex="[{}]{2}a")
    assert set(alike) <= set(allowed(matcher.mask()))
    out = torch.empty(3, vocabulary.words, dtype=torch.int32)
    matcher.walk([7, *alike], [-1, 0, 0], out)
    assert torch.equal(out[1], out[2]) and set(alike) <= set(allowed(out[1]))
    for token in alike:
        other = matcher.fresh()
        other.consume([token, token])
        assert vocabulary.tokens[other.forced(1)[0]] == b"a"


def test_texts_that_the_tokenizer_would_change_are_spelled_by_tokens(tmp_path):
    """NFC composes accents, so encoding the text would give the tokens of another one."""
    tokenizer = byte_level(tmp_path, "caf\u00e9 caf\u00e9")
    vocabulary, wanted = Vocabulary(tokenizer, tokenizer.size, [0]), "cafe\u0301 cafe\u0301"
    matcher = start(vocabulary, regex=wanted)
    while ids := [token for token in allowed(matcher.mask()) if token]:
        assert ids[:1] == matcher.forced(1)
        matcher.consume(ids[:1])
    assert tokenizer.decode(matcher.history) == wanted and len(matcher.history) < len(wanted.encode())


def test_a_model_may_have_fewer_tokens_than_its_tokenizer(shipped):
    """And then a forced text is spelled by those that there are."""
    small = Vocabulary(shipped.tokenizer, 300, [2])
    matcher = start(small, json_schema=COMPACT)
    said, ended = write_at_random(small, matcher, random.Random(0), 300)
    assert ended and max(said) < 300
    jsonschema.validate(json.loads(shipped.tokenizer.decode(said)), PERSON)


def test_special_tokens_are_no_text_and_can_be_named(tmp_path):
    tokenizer = byte_level(tmp_path)
    vocabulary = Vocabulary(tokenizer, tokenizer.size + 1, [tokenizer.size])
    assert tokenizer.specials == {"<|end|>": 0} and 0 not in allowed(start(vocabulary, regex=".*").mask())
    assert allowed(start(vocabulary, grammar="start: <|end|> /a+/").mask()) == [0]


def test_blanks_are_bounded_unless_the_schema_says_otherwise(shipped):
    value, encode = {"name": "a", "age": 1, "tags": ["red", "green"]}, shipped.tokenizer.encode_text
    bounded = start(shipped, json_schema=PERSON)
    for options in ({}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 8}, {"indent": "\t"}):
        for end in ("\n", "\r\n"):
            matcher = bounded.fresh()
            matcher.consume(encode(json.dumps(value, **options).replace("\n", end)))
            assert matcher.place.is_accepting()
    other = start(shipped, json_schema=PERSON | {"x-guidance": {"coerce_one_of": True}})
    free = start(shipped, json_schema=PERSON | {"x-guidance": {"whitespace_pattern": "[ \n\t]*"}})
    for blanks in (50 * " ", 50 * "\n", "\n" + 50 * "\t"):
        ids = encode("{" + blanks)
        for matcher in (bounded, other):
            assert matcher.fresh().place.try_consume_tokens(ids) < len(ids)
        assert free.fresh().place.try_consume_tokens(ids) == len(ids)


# --------------------------------------------------------------------------------------------------
# What people write
# --------------------------------------------------------------------------------------------------

ERRORS = {
    "bad JSON": ({"json_schema": '{"type": }'}, "--json_schema", "Expecting value"),
    "no schema": ({"json_schema": "[1]"}, "--json_schema", "a schema is an object"),
    "bad schema": ({"json_schema": {"type": "nope"}}, "--json_schema", "nope"),
    "not JSON": ({"json_schema": {"type": {1, 2}}}, "--json_schema", "set"),
    "nothing follows it": (
        {"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
        "",
        "Unsat",
    ),
    "unknown keyword": ({"json_schema": {"type": "array", "uniqueItems": True}}, "", "uniqueItems"),
    "bad pattern": ({"json_schema": {"type": "string", "pattern": "("}}, "", "unclosed group"),
    "bad regex": ({"regex": "a(b"}, "--regex", "unclosed group"),
    "regex with a look-ahead": ({"regex": "(?=a)b"}, "--regex", "look-around"),
    "no text": ({"regex": 7}, "--regex", "int"),
    "bad grammar": ({"grammar": "start: foo"}, "--grammar", "foo"),
    "empty grammar": ({"grammar": ""}, "--grammar", "Empty"),
    "two": ({"regex": "a", "json_schema": {}}, "--regex", "--json_schema"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name):
    given, flag, reason = ERRORS[name]
    with pytest.raises(BadInput) as error:
        grammar_text(**given)
    assert "\n" not in str(error.value) and flag in str(error.value) and reason in str(error.value)


def test_a_special_token_that_there_is_not_is_an_error(shipped):
    with pytest.raises(BadInput, match=r"unknown special token.*nope") as error:
        start(shipped, grammar='start: "a" <|nope|>')
    assert "\n" not in str(error.value)


def test_a_text_needs_a_token_that_ends_it(shipped):
    for stops in ([], [4096]):
        with pytest.raises(BadInput, match="a token that ends it"):
            Vocabulary(shipped.tokenizer, 4096, stops)


def test_files_and_texts(tmp_path):
    schema, lark = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text(json.dumps(PERSON))
    lark.write_text(LARK)
    assert read_grammar(str(schema), None, None) == read_grammar(json.dumps(PERSON), None, None)
    assert read_grammar(str(schema), None, None) == grammar_text(json_schema=PERSON)
    assert read_grammar(None, None, str(lark)) == grammar_text(grammar=LARK)
    assert read_grammar(None, "a+", None) == grammar_text(regex="a+")
    assert read_grammar(None, None, None) is None
    schema.write_bytes(b"\xff\xfe{}")
    for path in (str(schema), str(tmp_path / "none"), str(tmp_path), "a\0b", 400 * "x"):
        for flag, arguments in (("--json_schema", (path, None, None)), ("--grammar", (None, None, path))):
            with pytest.raises(BadInput, match=f"{flag}: cannot read") as error:
                read_grammar(*arguments)
            assert "\n" not in str(error.value)


def test_the_order_of_a_schema_is_the_order_of_the_text(shipped):
    schema = {"type": "object", "required": ["b", "a"], "x-guidance": {"whitespace_flexible": False}}
    schema |= {"properties": {"b": {"const": 1}, "a": {"const": 2}}, "additionalProperties": False}
    tokens = start(shipped, json_schema=schema).forced(50)
    assert shipped.tokenizer.decode(tokens).startswith('{"b":1,"a":')


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    hide_module(monkeypatch, "llguidance")
    assert grammar_text() is None
    with pytest.raises(BadInput, match=r"^[^\n]*pip install llguidance$"):
        grammar_text(regex="a")
