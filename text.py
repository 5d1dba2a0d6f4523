"""text.py: text to token ids and back: tokenizers, chat templates, and text as it grows.

    from text import TextStream, load_tokenizer
    tokenizer = load_tokenizer("DIR")               # whichever kind the directory has; None without one
    stream = TextStream(tokenizer, stops=["###"])    # stream.add(token), stream.new_spans()

This file knows bytes, characters and token ids. It knows nothing of models and tensors. Files of tokenizers
are read by the libraries that wrote them; what is here gives them what a directory says beside those files.

The one idea: a text is text. Special tokens come from a chat template alone, never from what a user typed;
and a token is bytes, so half a character waits until it is whole.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from model import BadInput

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
LLAMA3_SPECIALS = [
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"),
    *("finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"),
    *("eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248))),
]
LONG_TEXT = 20_000  # characters from which on it pays to see first whether a text can fit
LONG_BLANK = 5_000  # blanks in a row that tiktoken's regular expression need not try


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
        if token is not None:
            self.named.setdefault(key, token)


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
    context: int | None = None  # tokens that the model takes: a text that is surely longer is refused at once
    shrinks = False  # a text may lose characters on its way to tokens

    def __init__(self, settings: Settings, added: dict[int, dict[str, Any]]):
        self.named, self.bos = settings.named, settings.named.get("bos_token")
        self.eos, self.templates = settings.named.get("eos_token"), settings.templates
        self.template, self.specials, self.added = settings.templates.get("default"), {}, {}
        self.flags = {entry["content"]: entry for entry in added.values()}
        for token, entry in sorted(added.items()):
            special = entry.get("special", True) or entry["content"] in self.named.values()
            (self.specials if special else self.added)[entry["content"]] = token
        self.shrinks = any(entry.get(flag) for entry in added.values() for flag in ("lstrip", "rstrip"))
        self.special_ids = set(self.specials.values())
        self.added_bytes = {token: text.encode() for text, token in self.added.items()}
        source = "".join(settings.templates.values())
        self.protected = [*self.specials, *(name for name in self.added if name in source)]
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

    def normalize(self, text: str) -> str:
        """The characters that become tokens."""
        return text

    def encode_guarded(self, text: str, guard: str, whole: bool) -> list[int]:
        """Ids of a text in which every added token is one that holds no guard; `whole`: with BOS and EOS."""
        ids, start = [], 0
        for match in at_tokens(self.flags, guard).finditer(text):
            (begin, end), entry = match.span(), self.flags[match.group()]
            around = text[max(begin - 1, 0) : begin] + text[end : end + 1]
            if begin < start or (entry.get("single_word") and any(map(is_of_words, around))):
                continue
            chunk, after = text[start:begin], text[end:]
            chunk = chunk.rstrip() if entry.get("lstrip") else chunk
            ids += self.encode_ordinary(chunk.replace(guard, ""), start == 0)
            ids.append(self.specials.get(match.group(), self.added.get(match.group())))
            start = end + (len(after) - len(after.lstrip()) if entry.get("rstrip") else 0)
        ids += self.encode_ordinary(text[start:].replace(guard, ""), start == 0)
        return self.before + ids + self.after if whole else ids

    def encode_checked(self, text: str, guard: str, whole: bool) -> list[int]:
        """`encode_guarded`, where every reason against it is one line of BadInput."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput("the text holds half a character, which UTF-8 cannot write") from None
        if self.context and len(text) > LONG_TEXT and not self.shrinks:
            least = len(self.normalize(text)) // self.longest
            if least > self.context:
                raise BadInput(f"the text is at least {least} tokens, and the model takes {self.context}")
        with naming_failures("the tokenizer cannot encode this text"):
            return self.encode_guarded(text, guard, whole)

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(1, *map(len, self.flags), *(len(self.token_bytes(i)) for i in range(self.size)))

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
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def encode_chat(self, messages: list[dict[str, Any]], **template_kwargs: Any) -> list[int]:
        """A conversation, up to where the answer begins. Special tokens come from the template alone.

        Other arguments are variables of the template, like `enable_thinking` of Qwen3.
        """
        template = self.templates.get("tool_use") if template_kwargs.get("tools") is not None else None
        template = template or self.template
        if template is None:
            raise BadInput("--chat: this checkpoint has no chat template; use an instruction-tuned model")
        guard, safe = unused_character(repr(messages)), []
        for message in messages:
            # What a model answered may hold the added tokens that it writes, but no special ones.
            names = self.specials if message.get("role") == "assistant" else self.protected
            present = {key: value for key, value in message.items() if value is not None}
            safe.append(guarded(present, names, guard))
        variables = self.named | template_kwargs
        return self.encode_checked(render_chat(template, safe, variables), guard, whole=False)


def is_of_words(character: str) -> bool:
    """Whether a character belongs to words, accents included."""
    return character == "_" or character.isalnum() or unicodedata.category(character)[0] == "M"


def at_tokens(tokens: Any, guard: str) -> re.Pattern:
    """Where one of the tokens is in a text, the longest one, unless a guard follows it."""
    names = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)
    return re.compile(f"(?:{names})(?!{guard})" if names else r"(?!)")


def unused_character(text: str) -> str:
    """A guard: a noncharacter that the text does not have."""
    found = next((c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in text), None)
    if found is None:
        raise BadInput("the text holds all of Unicode's noncharacters")
    return found


def guarded(value: Any, tokens: Any, guard: str) -> Any:
    """A text, or all texts in lists and objects, with a guard in every one of the tokens."""
    if isinstance(value, str):
        return at_tokens(tokens, guard).sub(lambda m: m.group()[0] + guard + m.group()[1:], value)
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


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model` of Llama 2, Mistral and the shipped models.

    Llama 2 puts a space before every text: `legacy` says whether before every piece between added tokens too.
    """

    def __init__(self, settings: Settings, path: Path):
        import sentencepiece

        model = path.read_bytes()
        no_prefix = (
            b"\x1a\x02\x18\x00"  # protobuf: normalizer_spec { add_dummy_prefix: false }, merged into it
        )
        try:
            self.processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.bare = sentencepiece.SentencePieceProcessor(model_proto=model + no_prefix)
        except (OSError, RuntimeError) as error:
            reason = f"neither a SentencePiece model nor a tiktoken vocabulary ({error})"
            raise BadInput(f"{path}: {reason}") from None
        self.size = p.get_piece_size()
        settings.name_special("bos_token", p.id_to_piece(p.bos_id()) if p.bos_id() >= 0 else None)
        settings.name_special("eos_token", p.id_to_piece(p.eos_id()) if p.eos_id() >= 0 else None)
        control = [i for i in range(self.size) if p.is_control(i) or p.is_unknown(i)]
        super().__init__(settings, {i: {"content": p.id_to_piece(i)} for i in control} | settings.added)
        config, llama = settings.config, settings.kind == "LlamaTokenizer"
        self.legacy = bool(config.get("legacy", not llama))
        self.skips_blank = llama or not self.legacy  # a text that begins with a space gets no other
        wanted = not (llama and config.get("add_prefix_space") is False)
        self.prefixes = p.encode("a", out_type=str)[0].startswith("\u2581")
        self.dummy_prefix = wanted and (llama or self.prefixes)
        self.shrinks |= p.encode("  a  a") == p.encode("a a")

    def encode_ordinary(self, text: str, first: bool = True) -> list[int]:
        blank = self.skips_blank and text.startswith((" ", "\u2581"))
        prefix = self.dummy_prefix and (first or self.legacy) and not blank
        if prefix and self.prefixes:
            return self.processor.encode(text)
        return self.bare.encode(" " + text if prefix and text else text)

    def piece(self, token: int) -> bytes:
        text, is_byte = self.processor.id_to_piece(token), self.processor.is_byte(token)
        return bytes([int(text[3:5], 16)]) if is_byte else text.replace("\u2581", " ").encode()

    def decode(self, tokens: list[int]) -> str:
        text = super().decode(tokens)
        return text.removeprefix(" ") if self.dummy_prefix else text


class TiktokenTokenizer(Tokenizer):
    """`tokenizer.model` of Llama 3: base64 and rank, a line a token; special tokens follow the last."""

    def __init__(self, settings: Settings, path: Path):
        import tiktoken.load

        with naming_failures(f"{path}: not a whole tiktoken vocabulary"):
            self.ranks = tiktoken.load.load_tiktoken_bpe(str(path))
            self.encoding = self.encoding_of(LLAMA3_PATTERN)
        self.pieces = {rank: text for text, rank in self.ranks.items()}
        self.size = max(self.pieces) + 1
        names = {self.size + i: {"content": f"<|{name}|>"} for i, name in enumerate(LLAMA3_SPECIALS)}
        settings.name_special("bos_token", "<|begin_of_text|>")
        settings.name_special("eos_token", "<|end_of_text|>")
        super().__init__(settings, settings.added or names)

    def encoding_of(self, pattern: str) -> Any:
        import tiktoken

        return tiktoken.Encoding("checkpoint", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={})

    @cached_property
    def uncut(self) -> Any:
        """An encoding that does not cut texts into words."""
        return self.encoding_of(r"[\s\S]+")

    def encode_ordinary(self, text: str, first: bool = True) -> list[int]:
        ids, start = [], 0
        for match in re.finditer(rf"[^\S\r\n]{{{LONG_BLANK},}}", text):  # where tiktoken gives up
            end = match.end() - (match.end() < len(text))  # the last blank belongs to what follows
            if text[match.end() : match.end() + 1] not in ("\r", "\n"):
                ids += self.encoding.encode_ordinary(text[start : match.start()])
                ids += self.uncut.encode_ordinary(text[match.start() : end])
                start = end
        return ids + self.encoding.encode_ordinary(text[start:])

    def piece(self, token: int) -> bytes:
        return self.pieces.get(token, b"")


class LibraryTokenizer(Tokenizer):
    """`tokenizer.json`, through the package `tokenizers`."""

    def __init__(self, settings: Settings, path: Path):
        try:
            import tokenizers
        except ImportError:
            raise BadInput(f"{path}: `pip install tokenizers` makes it readable") from None
        with naming_failures(f"{path}: not a tokenizer"):
            self.library = library = tokenizers.Tokenizer.from_file(str(path))
        library.no_truncation()
        library.no_padding()
        shape = b"".join(part.__getstate__() for part in (library.decoder, library.pre_tokenizer) if part)
        self.byte_level = b"ByteLevel" in shape
        if settings.kind == "Qwen2Tokenizer" or (settings.kind == "LlamaTokenizer" and not self.byte_level):
            build_as_class(library, settings)
        add_tokens(library, settings)
        self.size = library.get_vocab_size(with_added_tokens=True)
        decoder = {token: read_flags(entry) for token, entry in library.get_added_tokens_decoder().items()}
        bytes_too = getattr(library.model, "byte_fallback", False)
        as_bytes = [i for i, entry in decoder.items() if bytes_too and byte_of(entry["content"])]
        super().__init__(settings, {i: entry for i, entry in decoder.items() if i not in as_bytes})
        self.shrinks |= not (self.byte_level or bytes_too)
        tokens = library.encode("a", add_special_tokens=False).tokens
        self.dummy_prefix = bool(tokens) and tokens[0].startswith("\u2581")
        self.secret = secrets.token_hex(8)  # so that nobody can type what stands for a special token

    def normalize(self, text: str) -> str:
        return self.library.normalizer.normalize_str(text) if self.library.normalizer else text

    def encode_ordinary(self, text: str, first: bool = True) -> list[int]:
        return self.encode_text(text)

    def encode_guarded(self, text: str, guard: str, whole: bool) -> list[int]:
        """As transformers does where there is no guard; else in names that no text has."""
        if guard not in text:
            return self.library.encode(text, add_special_tokens=whole).ids
        names, library = self.renamed
        text = at_tokens(self.flags, guard).sub(lambda m: names.get(m.group(), m.group()), text)
        return library.encode(text.replace(guard, ""), add_special_tokens=whole).ids

    @cached_property
    def renamed(self) -> tuple[dict[str, str], Any]:
        """Other names for the protected tokens, and a tokenizer to which the old ones are text."""
        raw = json.loads(self.library.to_str())
        names = {name: f"\ufdf0{self.secret}{i}\ufdf1" for i, name in enumerate(self.protected)}
        model, vocab = raw["model"], raw["model"]["vocab"]
        kept = [token for token in raw["added_tokens"] if token["content"] in self.flags]
        raw["added_tokens"] = [
            token | {"content": names.get(token["content"], token["content"])} for token in kept
        ]
        if isinstance(vocab, list):  # Unigram
            model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
        else:
            model["vocab"] = {names.get(text, text): token for text, token in vocab.items()}
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", []))
        model |= (
            {"merges": [m for m in pairs if not names.keys() & {*m, "".join(m)}]} if "merges" in model else {}
        )
        model |= (
            {"unk_token": names.get(model["unk_token"], model["unk_token"])} if "unk_token" in model else {}
        )
        return names, type(self.library).from_str(json.dumps(raw))

    def piece(self, token: int) -> bytes:
        text = self.library.id_to_token(token) or ""
        if self.byte_level:
            return bytes(BYTE_OF[c] for c in text) if all(c in BYTE_OF for c in text) else text.encode()
        return byte_of(text) or text.replace("\u2581", " ").encode()

    def decode(self, tokens: list[int]) -> str:
        text = super().decode(tokens)
        return text.removeprefix(" ") if self.dummy_prefix else text


def build_as_class(library: Any, settings: Settings) -> None:
    """Two classes of transformers read only the vocabulary of a tokenizer.json; the rest is in their code."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    model, prefix = library.model, settings.config.get("add_prefix_space")
    if settings.kind == "Qwen2Tokenizer":
        model.unk_token, model.byte_fallback, model.fuse_unk = None, False, False
        library.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        for key in ("unk_token", "eos_token", "pad_token"):
            settings.name_special(key, "<|endoftext|>")
        return
    model.unk_token, model.byte_fallback, model.fuse_unk = None, True, True
    scheme = "never" if prefix is False else "always" if settings.config.get("legacy") else "first"
    if "legacy" not in settings.config:  # transformers 5 forgets to save it, and saves what it meant
        scheme = getattr(library.pre_tokenizer, "prepend_scheme", scheme)
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    for key, token in (("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")):
        settings.name_special(key, token)


FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")


def read_flags(token: Any) -> dict[str, Any]:
    """An added token of the library as the files describe it."""
    return {flag: getattr(token, flag) for flag in FLAGS}


def add_tokens(library: Any, settings: Settings) -> None:
    """Give the library the added tokens that the other files of a directory have."""
    from tokenizers import AddedToken

    named = list(settings.named.values())
    entries = [{flag: e[flag] for flag in FLAGS if flag in e} for _, e in sorted(settings.added.items())]
    entries = [e | {"special": True} if e["content"] in named else e for e in entries]
    known = {entry["content"] for entry in entries}
    known |= {entry.content for entry in library.get_added_tokens_decoder().values()}
    more = dict.fromkeys([*named, *extra_specials(settings.config)])
    entries += [{"content": name, "special": True} for name in more if name not in known]
    library.add_tokens([AddedToken(**entry) for entry in entries])
    if settings.kind == "Qwen2Tokenizer":  # whose code adds them once more
        library.add_tokens([AddedToken(name, special=True) for name in more])


def byte_of(text: str) -> bytes | None:
    """The byte of a token like <0x0A>."""
    found = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
    return bytes([int(found[1], 16)]) if found else None


def byte_alphabet() -> dict[str, int]:
    """GPT-2 writes a byte as one visible character: itself if it is visible, else one from 256 upwards."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


BYTE_OF = byte_alphabet()


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, whichever kind it is; None where there is none."""
    directory = Path(path)
    kinds = (("tokenizer.json", LibraryTokenizer), ("tokenizer.model", SentencePieceTokenizer))
    file, kind = next(((directory / n, k) for n, k in kinds if (directory / n).exists()), (None, None))
    if file is None:
        return None
    if file.name == "tokenizer.model":
        with open(file, "rb") as stream:
            is_tiktoken = re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", stream.read(200))
        kind = TiktokenTokenizer if is_tiktoken else kind
    try:
        return kind(read_settings(directory), file)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{directory}: its tokenizer files make no sense ({error!r})") from None


def read_settings(directory: Path) -> Settings:
    """What stands beside the tokenizer itself, as transformers puts it together."""
    config, raw = read_json(directory / "tokenizer_config.json"), read_json(directory / "config.json")
    added = {int(token): entry for token, entry in (config.get("added_tokens_decoder") or {}).items()}
    others = {}
    if "added_tokens_decoder" not in config:
        config |= read_json(directory / "special_tokens_map.json")
        others = read_json(directory / "added_tokens.json")
    is_name = {
        k: special_name(v) for k, v in config.items() if k.endswith("_token") and isinstance(v, (str, dict))
    }
    extra = config.get("extra_special_tokens")
    named = is_name | (extra if isinstance(extra, dict) else {})
    specials = {*named.values(), *extra_specials(config)}
    for name, token in others.items():
        added[token] = {"content": name, "special": name in specials, "normalized": name not in specials}
    family = raw.get("model_type")
    kind = (config.get("tokenizer_class") or raw.get("tokenizer_class") or "").removesuffix("Fast")
    if family == "qwen2" or (family == "qwen3" and not kind):
        kind = "Qwen2Tokenizer"
    elif family in ("mistral", "mixtral", "phi3"):  # which transformers reads as they are
        kind = ""
    return Settings(config, kind, named, added, chat_templates(directory, config))


def extra_specials(config: dict[str, Any]) -> list[str]:
    """Special tokens without a name of their own."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, dict) else [special_name(token) for token in extra]


def special_name(value: Any) -> str | None:
    """tokenizer_config.json writes a special token as a string or as an object."""
    return value.get("content") if isinstance(value, dict) else value


def chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name, "default" first of all: in files of their own, else in tokenizer_config.json."""
    files = {path.stem: path for path in directory.glob("additional_chat_templates/*.jinja")}
    if (directory / "chat_template.jinja").exists():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    given = config.get("chat_template") or {}
    if isinstance(given, list):
        return {entry["name"]: entry["template"] for entry in given}
    return {"default": given} if isinstance(given, str) else dict(given)


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
