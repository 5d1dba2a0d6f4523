"""grammar.py: outputs of a given structure: JSON of a schema, a regular expression, a grammar.

    vocabulary = Vocabulary(tokenizer, config.vocab_size, stop_ids)
    matcher = Matcher(vocabulary, grammar_text(regex="[a-z]+"))  # the place of one text in its grammar
    matcher.walk(tokens, parent, masks)                           # a mask for every node of a draft
    matcher.consume(tokens)                                       # what was kept of it

This file knows tokens and their bytes. It knows no models, and grammars only by name: they are read by the
package llguidance, which is needed for nothing else (`pip install llguidance`).

The one idea: the mask of a node depends on the tokens before it and on nothing else. So it belongs to what
the target picks, and a drafter cannot change a text of a structure any more than another one.
"""

from __future__ import annotations

import json
from copy import copy
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chat import Tokenizer, naming_failures
from model import BadInput
from prompts import short

# Between two parts of a JSON text: a blank, or a line break and its indentation. A model that is not sure
# what comes next would otherwise write blanks for ever.
BLANKS = r" |\r?\n[ \t]{0,32}"


def library() -> Any:
    """The package llguidance. BadInput where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise BadInput("an output of a given structure needs a package: pip install llguidance") from None
    return llguidance


def grammar_text(
    json_schema: str | dict[str, Any] | None = None, regex: str | None = None, grammar: str | None = None
) -> str | None:
    """What `Matcher` reads: of a JSON schema; of a regular expression as Rust knows them; or of a grammar in
    the language of Lark, with llguidance's additions. None of nothing. BadInput for what it does not take.

    A schema may hold options of llguidance as "x-guidance", like {"whitespace_flexible": false}.
    """
    given = {"--json_schema": json_schema, "--regex": regex, "--grammar": grammar}
    flags = [flag for flag, value in given.items() if value is not None]
    if len(flags) > 1:
        raise BadInput(f"an output has one structure: give {flags[0]} or {flags[1]}, not both")
    if not flags:
        return None
    reader, what = library().LLMatcher, f"{flags[0]} cannot be used"
    with naming_failures(what):
        if regex is not None:
            text = reader.grammar_from_regex(regex)
        elif grammar is not None:
            text = reader.grammar_from_lark(grammar)
        else:
            schema = json.loads(json_schema) if isinstance(json_schema, str) else json_schema
            if not isinstance(schema, dict):
                raise BadInput(f"{what} (a schema is an object, not {short(schema)})")
            own = schema.get("x-guidance") or {}  # llguidance forgets its defaults where a schema has options
            if not any(name.startswith("whitespace") for name in own):
                schema = schema | {"x-guidance": {"whitespace_pattern": BLANKS} | own}
            text = reader.grammar_from_json_schema(json.dumps(schema))
        check(what, reader.validate_grammar(text))
    return text


def read_grammar(json_schema: str | None, regex: str | None, grammar: str | None) -> str | None:
    """`grammar_text` of what stands on a command line. A schema is there as text, which begins with a brace,
    or as a file; a grammar is a file."""
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        json_schema = read_file("--json_schema", json_schema)
    return grammar_text(json_schema, regex, None if grammar is None else read_file("--grammar", grammar))


def read_file(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{flag}: cannot read a file {short(path)} ({reason})") from None


def check(what: str, problem: str) -> None:
    """Raise BadInput with the gist of what llguidance says, if it says anything."""
    lines = problem.strip().splitlines()
    if lines:  # of a regular expression, the first line says where it is wrong, and a later one why
        why = next((line.removeprefix("error:") for line in lines if line.startswith("error:")), "")
        raise BadInput(f"{what} ({lines[0][:200]}{why})")


class Vocabulary:
    """The tokens of a model as llguidance wants them: what they write, and which of them are special.

    Where a grammar leaves one continuation, llguidance allows only the tokens that a tokenizer makes of it,
    and asks for them. So they have to write exactly that: from anything else its masks would be nonsense.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, stop_ids: list[int]):
        """`size`: the model's, which may be padded. `stop_ids`: the tokens that may end a text."""
        self.tokenizer, self.stops = tokenizer, frozenset(t for t in stop_ids if 0 <= t < size)
        if not self.stops:
            raise BadInput("an output of a given structure needs a token that ends it; there is none here")
        names = {token: b"<|%d|>" % token for token in self.stops}
        names |= {token: name.encode() for name, token in tokenizer.specials.items() if name and token < size}
        self.tokens = [names.get(token) or tokenizer.token_bytes(token) for token in range(size)]
        self.special_token_ids, self.eos_token_id = sorted(names), min(self.stops)
        self.words = (size + 31) // 32  # of a mask: token t is bit t % 32 of word t // 32
        self.spelled = lru_cache(10_000)(self.spell)
        wrapper = library().TokenizerWrapper(self)
        self.table = library().LLTokenizer(wrapper, eos_token=sorted(self.stops))

    def __call__(self, text: bytes | str) -> list[int]:  # a str if there is no token for b"test"
        return self.spelled(text.encode() if isinstance(text, str) else text)

    def spell(self, text: bytes) -> list[int]:
        """The tokens of a text in the middle of another one."""
        for before in ("", "\n"):  # behind a line break, a tokenizer may not put a blank before the text
            known = len(self.tokenizer.encode_text(before))
            try:
                ids = self.tokenizer.encode_text(before + text.decode())[known:]
            except BadInput:  # longer than any text of this model
                break
            if all(t < len(self.tokens) for t in ids) and b"".join(self.tokens[t] for t in ids) == text:
                return ids
        return self.spell_greedily(text)  # it writes another text, like one that composes accents

    def spell_greedily(self, text: bytes) -> list[int]:
        special, ids = set(self.special_token_ids), []
        known = {name: token for token, name in enumerate(self.tokens) if token not in special}
        while text:
            ends = (end for end in range(len(text), 0, -1) if text[:end] in known)
            end = next(ends, 0)
            if not end:
                raise BadInput(f"this model has no token for {text[:1]!r}")
            ids.append(known[text[:end]])
            text = text[end:]
        return ids


class Matcher:
    """The place of one text in a grammar. At first that is the beginning of the output."""

    def __init__(self, vocabulary: Vocabulary, grammar: str):
        """`grammar`: see `grammar_text`. BadInput where it names special tokens that there are not."""
        self.vocabulary, what = vocabulary, "the grammar cannot be used with this model"
        with naming_failures(what):
            check(what, library().LLMatcher.validate_grammar(grammar, vocabulary.table))
            self.beginning = library().LLMatcher(vocabulary.table, grammar, log_level=0)
        self.restart()

    def restart(self) -> None:
        """Back to the beginning."""
        self.history: list[int] = []  # tokens consumed
        self.place = self.beginning.deep_copy()

    def fresh(self) -> Matcher:
        """For another text of this grammar, which is not read again."""
        other = copy(self)
        other.restart()
        return other

    def consume(self, tokens: list[int]) -> None:
        """Go on by committed tokens. One that ends the text has no place in the grammar."""
        tokens = [token for token in tokens if token not in self.vocabulary.stops]
        self.history += tokens
        self.place.consume_tokens(tokens)
        check("the text has left its structure", self.place.get_error())

    def mask(self) -> Tensor:
        """The tokens that may come next, int32 [words]."""
        return self.walk([0], [-1], torch.empty(1, self.vocabulary.words, dtype=torch.int32))[0]

    def forced(self, limit: int) -> list[int]:
        """Up to `limit` tokens that have to come next; [] where there is a choice, and at the end."""
        tokens = [] if self.place.is_stopped() else self.place.compute_ff_tokens()
        return list(takewhile(lambda token: token not in self.vocabulary.stops, tokens[:limit]))

    def walk(self, tokens: list[int], parent: list[int], out: Tensor) -> Tensor:
        """The masks of all nodes of a draft (see `drafts.Draft`), of which node 0 has been consumed. They are
        written to `out` int32 [n, words] -> `out`. Afterwards the place is what it was.

        A mask allows everything where it is never asked for: at padding, at nodes that the mask of their
        parent does not allow, at tokens that end the text, and below all of these.
        """
        below: list[list[int]] = [[] for _ in tokens]
        for node in range(len(tokens) - 1, 0, -1):
            if parent[node] >= 0 and tokens[node] not in self.vocabulary.stops:
                below[parent[node]].append(node)
        out.fill_(-1)
        self.fill(out[0])
        check("the text cannot go on in its structure", self.place.get_error())
        path: list[int] = []  # tokens consumed since the root
        waiting = [(node, 0, 0) for node in below[0]]  # nodes, their parents, and the depth of these
        while waiting:  # depth first, so that few steps lead back
            node, above, depth = waiting.pop()
            token = tokens[node]
            if int(out[above, token // 32]) >> token % 32 & 1:
                self.go_back(path, depth)
                self.place.consume_token(token)
                path.append(token)
                self.fill(out[node])
                waiting += [(child, node, depth + 1) for child in below[node]]
        self.go_back(path, 0)
        return out

    def fill(self, mask: Tensor) -> None:
        # Where nothing can follow, llguidance allows the tokens that end the text: no mask is empty.
        self.place.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)

    def go_back(self, path: list[int], depth: int) -> None:
        """From the end of a path to the place after its first `depth` tokens."""
        if self.place.is_error():  # a dead end: there is no way back from it
            self.place = self.beginning.deep_copy()
            self.place.consume_tokens(self.history + path[:depth])
        elif len(path) > depth:
            self.place.rollback(len(path) - depth)
        del path[depth:]
