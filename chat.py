"""chat.py: what becomes of a text or a conversation before a library makes tokens of it.

    class SomeTokenizer(Tokenizer): ...              # text.py has three: encode_ordinary, piece
    tokenizer.encode("def f"), tokenizer.encode_chat([{"role": "user", "content": "Hi"}])

This file knows special tokens and chat templates, and neither files of tokenizers nor their libraries.

The one idea: a text is text. Special tokens come from a chat template alone, never from what a user typed.
Where a user did type one, a character that no text has goes into it, a guard, and is taken out at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from model import BadInput

LONG_TEXT = 20_000  # characters from which on it pays to see first whether a text can fit


@dataclass
class Settings:
    """What the files of a checkpoint say about a tokenizer of any kind."""

    config: dict[str, Any]  # tokenizer_config.json with special_tokens_map.json
    kind: str  # the class that transformers takes for it
    named: dict[str, str]  # bos_token, eos_token, ...: what a chat template knows by name
    added: dict[int, dict[str, Any]]  # added tokens by id, as the files describe them
    templates: dict[str, str]

    def name_special(self, key: str, token: str | None) -> None:
        """A special token's text, where no file says it."""
        if token is not None and key not in self.config:
            self.named[key] = token


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file, unless `required`. BadInput for anything else."""
    if not path.exists() and not required:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file; a checkpoint directory needs it") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}, not an object")
    return value


@contextmanager
def naming_failures(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer library raises, a panic included (no Exception to Python), into BadInput."""
    try:
        yield
    except (BadInput, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInput(f"{what} ({reason})") from None


class Tokenizer:
    """Text to token ids and back. Subclasses know the libraries, this class what users may write.

    `specials` have no text, and only a chat template can write them. `added` are ordinary text that is one
    token, like the <think> of Qwen3; those that the template writes are only text when a user writes them.
    """

    size: int  # ordinary ids are below it
    finder: Any  # of the package `tokenizers`: finds the added tokens in a text
    context: int | None = None  # tokens that the model takes: a text that is surely longer is refused at once
    shrinks = False  # a text may lose characters on its way to tokens
    dummy_prefix = False  # tokens begin with a blank that is not in the text

    def __init__(self, settings: Settings, added: dict[int, dict[str, Any]]):
        self.named, self.bos = settings.named, settings.named.get("bos_token")
        self.eos, self.templates = settings.named.get("eos_token"), settings.templates
        self.template, self.specials, self.added = settings.templates.get("default"), {}, {}
        for token, entry in sorted(added.items()):
            special = entry.get("special", True) or entry["content"] in self.named.values()
            (self.specials if special else self.added)[entry["content"]] = token
        self.shrinks = any(entry.get(flag) for entry in added.values() for flag in ("lstrip", "rstrip"))
        self.added_ids = self.specials | self.added
        self.special_ids = set(self.specials.values())
        self.added_bytes = {token: text.encode() for text, token in self.added.items()}
        source = "".join(settings.templates.values())
        written = [name for name in self.added if name in source and name.strip() and len(name) > 1]
        self.protected = [*self.specials, *written]  # and no blanks, which are only text
        # What the tokenizer puts around a prompt.
        self.before, self.after = (
            [self.specials[name]] if wanted and name in self.specials else []
            for wanted, name in (
                (settings.config.get("add_bos_token") is not False, self.bos),
                (settings.config.get("add_eos_token"), self.eos),
            )
        )

    def encode_ordinary(self, text: str, first: bool = True) -> list[int]:
        """Ids of a text without added tokens; `first`: it begins the prompt."""
        raise NotImplementedError

    def piece(self, token: int) -> bytes:
        """The bytes of an ordinary token."""
        raise NotImplementedError

    def added_in(self, text: str, guard: str) -> Iterator[tuple[str, int, int]]:
        """The added tokens of a text and where they are, with the blanks that they take from around them."""
        found = self.finder.encode(text, add_special_tokens=False)
        for token, (begin, end) in zip(found.ids, found.offsets, strict=True):
            name = self.found_names.get(token, "")
            typed = len(name) == 1 and text.startswith(guard, end)  # no guard is inside one character
            if name in self.added_ids and not typed:
                yield name, begin, end

    def encode_guarded(self, text: str, guard: str, whole: bool) -> list[int]:
        """Ids of a text in which every added token is one that holds no guard; `whole`: with BOS and EOS."""
        ids, start = [], 0
        for name, begin, end in self.added_in(text, guard):
            ids += self.encode_ordinary(text[start:begin].replace(guard, ""), start == 0)
            ids.append(self.added_ids[name])
            start = end
        ids += self.encode_ordinary(text[start:].replace(guard, ""), start == 0)
        return self.before + ids + self.after if whole else ids

    def encode_checked(self, text: str, guard: str, whole: bool) -> list[int]:
        """`encode_guarded`, where every reason against it is one line of BadInput."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput("the text holds half a character, which UTF-8 cannot write") from None
        with naming_failures("the tokenizer cannot encode this text"):
            if self.context and len(text) > LONG_TEXT and not self.shrinks:
                normalizer = self.finder.normalizer
                least = len(normalizer.normalize_str(text) if normalizer else text) // self.longest
                if least > self.context:
                    raise BadInput(f"the text is at least {least} tokens, and the model takes {self.context}")
            return self.encode_guarded(text, guard, whole)

    @cached_property
    def found_names(self) -> dict[int, str]:
        """The added tokens by the ids that the finder gives them."""
        return {token: entry.content for token, entry in self.finder.get_added_tokens_decoder().items()}

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(1, *map(len, self.added_ids), *(len(self.token_bytes(i)) for i in range(self.size)))

    def encode_text(self, text: str, whole: bool = False) -> list[int]:
        """Ids of a text in which special tokens have no meaning. Raises BadInput for half a character."""
        guard = unused_character(text)
        return self.encode_checked(guarded(text, self.specials, guard), guard, whole)

    def encode(self, text: str) -> list[int]:
        """A prompt: BOS where the model wants one, then the text as it is. `</s>` in it is text."""
        return self.encode_text(text, whole=True)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text: nothing for special ones and ids that only pad the vocabulary."""
        if token in self.added_bytes:
            return self.added_bytes[token]
        return b"" if token in self.special_ids or not 0 <= token < self.size else self.piece(token)

    def decode(self, tokens: list[int]) -> str:
        text = b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.dummy_prefix else text

    def encode_chat(self, messages: list[dict[str, Any]], /, **template_kwargs: Any) -> list[int]:
        """A conversation, up to where the answer begins. Special tokens come from the template alone.

        Other arguments are variables of the template, like `enable_thinking` of Qwen3, and those that it gets
        anyway, like `add_generation_prompt` and `bos_token`. One that it does not know has no effect.
        """
        if "messages" in template_kwargs:
            raise BadInput(
                "--template_kwargs: messages are the conversation itself, not a variable beside it"
            )
        template = self.templates.get("tool_use") if template_kwargs.get("tools") is not None else None
        template = template or self.template
        if template is None:
            raise BadInput("--chat: this checkpoint has no chat template; use an instruction-tuned model")
        guard, safe = unused_character(json.dumps(messages, ensure_ascii=False, default=str)), []
        for message in messages:
            # What a model answered may hold the added tokens that it writes, but no special ones.
            names = self.specials if message.get("role") == "assistant" else self.protected
            present = {key: value for key, value in message.items() if value is not None}
            safe.append(guarded(present, names, guard))
        variables = self.named | template_kwargs
        return self.encode_checked(render_chat(template, safe, variables), guard, whole=False)


def check_tokens(ours: Tokenizer | None, targets: Tokenizer | None) -> None:
    """Raise BadInput where a token of a drafter is another one of its target. Either may be unknown, or lack
    the last tokens; and added tokens of one id may have other names, as of a model that was trained further.
    """
    if ours is None or targets is None:
        return
    for token in range(min(ours.size, targets.size)):
        a, b = ours.token_bytes(token), targets.token_bytes(token)
        added = token in ours.added_bytes and token in targets.added_bytes
        if a and b and a != b and not added:
            raise BadInput(f"the drafter has another vocabulary: token {token} is {a!r}, not {b!r}")


def unused_character(text: str) -> str:
    """A guard: a noncharacter that the text does not have."""
    found = next((c for c in map(chr, range(0xFDD0, 0xFDE0)) if c not in text), None)
    if found is None:
        raise BadInput("the text holds too many of Unicode's noncharacters")
    return found


def guarded(value: Any, tokens: Iterable[str], guard: str) -> Any:
    """A text, or all texts in lists and objects, with a guard behind the first character of those tokens."""
    if isinstance(value, str):
        names = "|".join(re.escape(token) for token in tokens if token and token in value)
        return re.sub(f"(?s)(?=(?:{names}))(.)", rf"\1{guard}", value) if names else value
    if isinstance(value, list):
        return [guarded(item, tokens, guard) for item in value]
    return {k: guarded(v, tokens, guard) for k, v in value.items()} if isinstance(value, dict) else value


def render_chat(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """A chat template in jinja2's sandbox, with all that transformers gives it."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: marks answers for training; here, what is inside it."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    now = {"strftime_now": lambda form: datetime.now().strftime(form)}
    environment.globals.update(now, raise_exception=raise_exception)
    given = {"add_generation_prompt": True, "tools": None, "documents": None} | variables
    try:
        return environment.from_string(template).render(given | {"messages": messages})
    except Exception as error:  # the template is a downloaded program
        reason = f"the checkpoint's chat template does not take this conversation: {error}"
        raise BadInput(f"--chat: {reason}") from None


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def read_messages(messages: list[Any]) -> list[dict[str, str]]:
    """Messages of OpenAI's API as templates know them: a role and a text. BadInput for all else."""
    found = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise BadInput(f"messages: each needs a role, one of {', '.join(ROLES)}")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
        texts += [None for part in parts if isinstance(part, dict) and part.get("type", "text") != "text"]
        tools = message.get("tool_calls") or message.get("function_call")
        if tools or not all(isinstance(text, str) for text in texts):
            raise BadInput("messages: one holds something else than text, which is not implemented")
        found.append({"role": ROLES[role], "content": "".join(texts)})
    return found
