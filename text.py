"""text.py: text to token ids and back: tokenizers, chat templates, and text as it grows.

    from text import TextStream, load_tokenizer
    tokenizer = load_tokenizer("DIR")               # whichever kind the directory has; None without one
    stream = TextStream(tokenizer, stops=["###"])    # stream.add(token), stream.new_spans()

This file knows bytes, characters and token ids. It knows nothing of models and tensors.

The one idea: a text is text. Special tokens come from a chat template alone, never from what a user typed;
and a token is bytes, so half a character waits until it is whole.
"""

from __future__ import annotations

import base64
import codecs
import json
import re
import time
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from model import BadInput

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPECIALS = [
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"),
    *("eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248))),
]
GUARD = "\ufdd0"  # a noncharacter: put inside special tokens that a user typed, so that they stay text


@dataclass
class Settings:
    """What the files of a checkpoint say about a tokenizer of any kind. `specials` have no text, and only a
    chat template can write them; `added` are ordinary text that is one token, like the <think> of Qwen3."""

    bos: str | None
    eos: str | None
    add_bos: bool | None  # None: not said
    template: str | None
    specials: dict[str, int] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)

    def sort_added(self, tokens: dict[Any, dict[str, Any]]) -> None:
        """Put added tokens, by id, with the special ones or with those that are text."""
        for token, entry in tokens.items():
            (self.specials if entry.get("special", True) else self.added)[entry["content"]] = int(token)


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


class Tokenizer:
    """Text to token ids and back. Subclasses know ordinary tokens, this class the added ones."""

    size: int  # ordinary ids are below it

    def __init__(self, settings: Settings):
        self.specials, self.added, self.template = settings.specials, settings.added, settings.template
        self.bos, self.eos = settings.bos, settings.eos
        self.add_bos = bool(settings.add_bos) and self.bos in self.specials
        self.special_ids = set(self.specials.values())
        self.added_bytes = {token: text.encode() for text, token in self.added.items()}

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text without added tokens."""
        raise NotImplementedError

    def piece(self, token: int) -> bytes:
        """The bytes of an ordinary token."""
        raise NotImplementedError

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text in which special tokens have no meaning. Raises BadInput for half a character."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput("the text holds half a character, which UTF-8 cannot write") from None
        tokens = []
        for part in split_at(self.added, text):
            tokens += [self.added[part]] if part in self.added else self.encode_ordinary(part)
        return tokens

    def encode(self, text: str) -> list[int]:
        """A prompt: BOS where the model wants one, then the text as it is. `</s>` in it is text."""
        return ([self.specials[self.bos]] if self.add_bos else []) + self.encode_text(text)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text: nothing for special ones and ids that only pad the vocabulary."""
        if token in self.added_bytes:
            return self.added_bytes[token]
        return b"" if token in self.special_ids or not 0 <= token < self.size else self.piece(token)

    def decode(self, tokens: list[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation, up to where the answer begins. Special tokens come from the template alone."""
        if self.template is None:
            raise BadInput("--chat: this checkpoint has no chat template; use an instruction-tuned model")

        def guard(text: str) -> str:
            parts = split_at(self.specials, text)
            return "".join(p[0] + GUARD + p[1:] if p in self.specials else p for p in parts)

        guarded = [{**message, "content": guard(message["content"])} for message in messages]
        tokens = []
        for part in split_at(self.specials, render_chat(self.template, guarded, self.bos, self.eos)):
            plain = part.replace(GUARD, "")
            tokens += [self.specials[part]] if part in self.specials else self.encode_text(plain)
        return tokens


def split_at(tokens: dict[str, int], text: str) -> list[str]:
    """The text cut before and after every token that occurs in it, longer ones first."""
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)
    return [part for part in re.split(f"({pattern})", text) if part] if pattern else [text]


def render_chat(template: str, messages: list[dict[str, str]], bos: str | None, eos: str | None) -> str:
    """A chat template in jinja2's sandbox, with the helpers that published templates expect."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    environment = ImmutableSandboxedEnvironment(**options)
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    variables = {"add_generation_prompt": True, "bos_token": bos or "", "eos_token": eos or ""}
    try:
        return environment.from_string(template).render(messages=messages, **variables)
    except Exception as error:  # the template is a downloaded program
        reason = f"the checkpoint's chat template does not take this conversation: {error}"
        raise BadInput(f"--chat: {reason}") from None


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model` of Llama 2, Mistral and the shipped models."""

    def __init__(self, settings: Settings, path: Path):
        import sentencepiece

        try:
            self.processor = p = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            reason = f"neither a SentencePiece model nor a tiktoken vocabulary ({error})"
            raise BadInput(f"{path}: {reason}") from None
        self.size = p.get_piece_size()
        control = {p.id_to_piece(i): i for i in range(self.size) if p.is_control(i) or p.is_unknown(i)}
        settings.specials = control | settings.specials
        settings.bos = settings.bos or (p.id_to_piece(p.bos_id()) if p.bos_id() >= 0 else None)
        settings.eos = settings.eos or (p.id_to_piece(p.eos_id()) if p.eos_id() >= 0 else None)
        settings.add_bos = settings.add_bos is not False
        super().__init__(settings)
        # Llama 2 puts a space before every text.
        self.dummy_prefix = p.encode("a", out_type=str)[0].startswith("\u2581")

    def encode_ordinary(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def piece(self, token: int) -> bytes:
        text, is_byte = self.processor.id_to_piece(token), self.processor.is_byte(token)
        return bytes([int(text[3:5], 16)]) if is_byte else text.replace("\u2581", " ").encode()

    def decode(self, tokens: list[int]) -> str:
        text = super().decode(tokens)
        return text.removeprefix(" ") if self.dummy_prefix else text


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE: `tokenizer.model` of Llama 3, or a `tokenizer.json` (Llama 3, Qwen) read as one.

    ranks: bytes -> merge priority. ids: priority -> token id, where the two differ.
    """

    normal_form: str | None = None  # of Unicode, into which a text is brought first

    def __init__(
        self, settings: Settings, ranks: dict[bytes, int], pattern: str, ids: list[int] | None = None
    ):
        import tiktoken

        self.ids, vocabulary = ids, {"mergeable_ranks": ranks, "special_tokens": {}}
        self.encoding = tiktoken.Encoding("checkpoint", pat_str=pattern, **vocabulary)
        self.pieces = {(ids[rank] if ids else rank): text for text, rank in ranks.items()}
        self.size = max(self.pieces) + 1
        super().__init__(settings)

    def encode_ordinary(self, text: str) -> list[int]:
        text = unicodedata.normalize(self.normal_form, text) if self.normal_form else text
        ranks = self.encoding.encode_ordinary(text)
        return [self.ids[rank] for rank in ranks] if self.ids else ranks

    def piece(self, token: int) -> bytes:
        return self.pieces.get(token, b"")


class LibraryTokenizer(Tokenizer):
    """Any other `tokenizer.json`, through the optional package `tokenizers`."""

    def __init__(self, settings: Settings, path: Path, reason: str):
        try:
            import tokenizers
        except ImportError:
            raise BadInput(f"{path}: {reason}; `pip install tokenizers` makes it readable") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise BadInput(f"{path}: not a tokenizer ({error})") from None
        self.tokenizer.encode_special_tokens = True  # special tokens in a text are text
        self.size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.byte_level = "ByteLevel" in json.dumps(read_json(path).get("decoder") or {})
        super().__init__(settings)

    def encode_ordinary(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def piece(self, token: int) -> bytes:
        text = self.tokenizer.id_to_token(token) or ""
        if self.byte_level:
            return unmap_bytes(text)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2 writes a byte as one visible character: itself if it is visible, else one from 256 upwards."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


BYTE_OF = byte_alphabet()


def unmap_bytes(text: str) -> bytes:
    """The bytes of a token in GPT-2's visible characters; of any other token, its UTF-8."""
    return bytes(BYTE_OF[c] for c in text) if all(c in BYTE_OF for c in text) else text.encode()


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, whichever kind it is; None where there is none."""
    directory = Path(path)
    try:
        return read_tokenizer(directory)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{directory}: its tokenizer files make no sense ({error!r})") from None


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """`load_tokenizer`, with the exceptions of files that make no sense."""
    raw = read_json(directory / "tokenizer_config.json")
    bos, eos = special_name(raw.get("bos_token")), special_name(raw.get("eos_token"))
    settings = Settings(bos, eos, raw.get("add_bos_token"), chat_template(directory, raw))
    settings.sort_added(raw.get("added_tokens_decoder") or {})
    model = directory / "tokenizer.model"
    if model.exists():
        with open(model, "rb") as file:
            is_tiktoken = re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", file.read(200))
        return read_tiktoken(model, settings) if is_tiktoken else SentencePieceTokenizer(settings, model)
    if (directory / "tokenizer.json").exists():
        return read_tokenizer_json(directory / "tokenizer.json", settings)
    return None


def read_tiktoken(path: Path, settings: Settings) -> Tokenizer:
    """`tokenizer.model` of Llama 3: base64 and rank, a line a token; special tokens follow the last."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:
        raise BadInput(f"{path}: not a whole tiktoken vocabulary ({error})") from None
    names = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}
    settings.specials = settings.specials or names
    settings.bos = settings.bos or "<|begin_of_text|>"
    settings.eos = settings.eos or "<|end_of_text|>"
    settings.add_bos = settings.add_bos is not False
    return TiktokenTokenizer(settings, ranks, LLAMA3_PATTERN)


def read_tokenizer_json(path: Path, settings: Settings) -> Tokenizer:
    """A byte-level BPE becomes a tiktoken encoding; anything else needs the package `tokenizers`."""
    raw = read_json(path)
    model, normalizer, pattern = raw.get("model") or {}, raw.get("normalizer"), split_pattern(raw)
    settings.sort_added({token["id"]: token for token in raw.get("added_tokens") or []})
    if settings.add_bos is None:  # then the post-processor says whether texts begin with BOS
        processor = json.dumps(raw.get("post_processor"))
        settings.add_bos = settings.bos is not None and f'"{settings.bos}"' in processor
    plain = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback") and model.get("merges")
    if pattern is None or not plain or normalizer not in (None, {"type": "NFC"}):
        return LibraryTokenizer(settings, path, "not a byte-level BPE of the kind of Llama 3 or Qwen2")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = dict.fromkeys(a + b for a, b in pairs)  # in order of priority, each token once
    singles = [text for text in model["vocab"] if len(text) == 1 and text in BYTE_OF]
    order = [text for text in [*singles, *merged] if text in model["vocab"]]
    ranks = {unmap_bytes(text): rank for rank, text in enumerate(order)}
    ids = [model["vocab"][text] for text in order]
    tokenizer = TiktokenTokenizer(settings, ranks, pattern, ids)
    tokenizer.normal_form = "NFC" if normalizer else None
    return tokenizer


def split_pattern(raw: dict[str, Any]) -> str | None:
    """The regular expression by which a byte-level BPE `tokenizer.json` cuts texts; None for another kind."""
    steps = (raw.get("pre_tokenizer") or {}).get("pretokenizers") or [raw.get("pre_tokenizer") or {}]
    kinds = [step.get("type") for step in steps]
    own_pattern, prefix = steps[-1].get("use_regex", True), steps[-1].get("add_prefix_space")
    if kinds == ["ByteLevel"] and own_pattern and not prefix:
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not own_pattern and not prefix:
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        return (steps[0].get("pattern") or {}).get("Regex") if plain else None
    return None


def special_name(value: Any) -> str | None:
    """tokenizer_config.json writes a special token as a string or as an object."""
    return value.get("content") if isinstance(value, dict) else value


def chat_template(directory: Path, raw: dict[str, Any]) -> str | None:
    """The template in a file of its own, else the one in tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = raw.get("chat_template")
    if isinstance(template, list):  # several, by name
        return next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template


class TextStream:
    """The text of one output, token by token: never half a character, and nothing from a stop string on."""

    def __init__(self, tokenizer: Tokenizer | None, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""
        self.ends: list[int] = []  # where in the text each token ends
        self.shown = 0  # characters and
        self.shown_tokens = 0  # whole tokens that `new_spans` has handed out

    def add(self, token: int) -> bool:
        """Append a token; True if that completes a stop string, which is then cut away."""
        before = len(self.text)
        self.text += self.decoder.decode(self.tokenizer.token_bytes(token)) if self.tokenizer else f"{token} "
        found = [self.text.find(stop, max(0, before - len(stop))) for stop in self.stops]
        found = [place for place in found if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.decoder.reset()  # half a character may have followed
        self.ends.append(len(self.text))
        return bool(found)

    def finish(self) -> None:
        """Nothing more comes: what was held back is text now."""
        self.text += self.decoder.decode(b"", final=True)
        self.ends[-1:] = [len(self.text)] if self.ends else []
        self.stops = []

    def held_back(self) -> int:
        """Characters at the end that may turn out to be the beginning of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        tails = (self.text[-n:] for n in range(min(longest, len(self.text)), 0, -1))
        return next((len(tail) for tail in tails if any(stop.startswith(tail) for stop in self.stops)), 0)

    def new_spans(self) -> list[tuple[int, str]]:
        """What can be shown now and was not yet, as (index of its token, text)."""
        end, spans = len(self.text) - self.held_back(), []
        while self.shown_tokens < len(self.ends) and self.shown < end:
            until = min(self.ends[self.shown_tokens], end)
            spans.append((self.shown_tokens, self.text[self.shown : until]))
            self.shown = max(until, self.shown)
            self.shown_tokens += self.ends[self.shown_tokens] <= end
        return [span for span in spans if span[1]]
