"""text.py: text to token ids and back: the tokenizers of checkpoints, and text as it grows.

    from text import TextStream, load_tokenizer
    tokenizer = load_tokenizer("DIR")               # whichever kind the directory has; None without one
    stream = TextStream(tokenizer, stops=["###"])    # stream.add(token), stream.new_spans()

This file knows bytes, characters and token ids. It knows nothing of models and tensors. Files of tokenizers
are read by the libraries that wrote them; what is here gives them what a directory says beside those files.

The one idea: a token is bytes, so half a character waits until it is whole.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from chat import Settings, Tokenizer, naming_failures, read_json
from model import BadInput

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
LLAMA3_SPECIALS = [
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id",
    "eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248)),
]  # fmt: skip
LONG_BLANK = 5_000  # blanks in a row that tiktoken's regular expression need not try


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model` of Llama 2, Mistral and the shipped models.

    Llama 2 puts a space before every text: `legacy` says whether before every piece between added tokens too.
    """

    def __init__(self, settings: Settings, path: Path):
        import sentencepiece

        model = path.read_bytes()
        no_prefix = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }, merged into it
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
        config, llama = settings.config, settings.kind in AS_LLAMA
        added = {i: {"content": p.id_to_piece(i), "special": True} for i in control}
        extra = isinstance(config.get("extra_special_tokens"), list) or "additional_special_tokens" in config
        for i in user_defined_pieces(model) if llama and not extra else ():
            if "\u2581" not in p.id_to_piece(i):  # which stands for blanks
                added[i] = {"content": p.id_to_piece(i), "special": False, "normalized": False}
        added |= settings.added
        super().__init__(settings, added)
        self.legacy = settings.kind != "CodeLlamaTokenizer" and bool(config.get("legacy", not llama))
        self.skips_blank = llama or not self.legacy  # a text that begins with a space gets no other
        wanted = not (llama and config.get("add_prefix_space") is False)
        self.prefixes = p.encode("a", out_type=str)[0].startswith("\u2581")
        at_once = {} if llama or not self.prefixes else {"normalized": False}
        blanks = None if llama or self.prefixes else normalizers.Replace(" ", "\u2581")
        self.finder = finder_of((entry | at_once for entry in added.values()), blanks)
        self.dummy_prefix = wanted and (llama or self.prefixes)
        self.shrinks |= p.encode("  a  a") == p.encode("a a")

    def encode_ordinary(self, text: str, first: bool = True) -> list[int]:
        blank = self.skips_blank and text.startswith((" ", "\u2581"))
        prefix = self.dummy_prefix and (first or self.legacy) and not blank
        if prefix and self.prefixes:
            return self.processor.encode(text)
        return self.bare.encode(" " + text if prefix and text else text)

    def piece(self, token: int) -> bytes:
        return bytes_of(self.processor.id_to_piece(token))


def user_defined_pieces(model: bytes) -> list[int]:
    """Ids of the pieces that the training was given: type 4 in protobuf, which the library does not tell."""
    found, start, token = [], 0, 0
    while model[start : start + 1] == b"\x0a":  # a piece: its size, its text, a score of four bytes, its type
        size, start = model[start + 1], start + 2
        if size > 127:  # a number of two bytes
            size, start = size - 128 + 128 * model[start], start + 1
        start += size
        found += [token] if re.fullmatch(rb"(?s)\x15.{4}\x18\x04", model[start - 7 : start]) else []
        token += 1
    return found


class TiktokenTokenizer(Tokenizer):
    """`tokenizer.model` of Llama 3: base64 and rank, a line a token; special tokens follow the last."""

    def __init__(self, settings: Settings, path: Path):
        import tiktoken.load

        with naming_failures(f"{path}: not a whole tiktoken vocabulary"):
            self.ranks = tiktoken.load.load_tiktoken_bpe(str(path))
            self.encoding = self.encoding_of(LLAMA3_PATTERN)
        self.pieces = {rank: text for text, rank in self.ranks.items()}
        self.size = max(self.pieces) + 1
        names = [{"content": f"<|{name}|>", "special": True} for name in LLAMA3_SPECIALS]
        added = settings.added or dict(enumerate(names, start=self.size))
        settings.name_special("bos_token", "<|begin_of_text|>")
        settings.name_special("eos_token", "<|end_of_text|>")
        super().__init__(settings, added)
        self.finder = finder_of(added.values())

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
    """`tokenizer.json`, or `vocab.json` and `merges.txt`, through the package `tokenizers`."""

    def __init__(self, settings: Settings, path: Path):
        with naming_failures(f"{path}: not a tokenizer"):
            if path.name == "vocab.json":
                library = Library(models.BPE.from_file(str(path), str(path.with_name("merges.txt"))))
                library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
                settings.config.setdefault("add_bos_token", False)
            else:  # whose post-processor adds them
                library = Library.from_file(str(path))
                settings.config |= {"add_bos_token": False, "add_eos_token": False}
        self.library = library
        library.no_truncation()
        library.no_padding()
        shape = b"".join(part.__getstate__() for part in (library.decoder, library.pre_tokenizer) if part)
        self.byte_level = b"ByteLevel" in shape
        if settings.kind in AS_BYTES or (settings.kind in AS_LLAMA and not self.byte_level):
            build_as_class(library, settings)
        add_tokens(library, settings)
        ids = library.get_vocab(with_added_tokens=True).values()  # which may have holes
        self.size = 1 + max(ids, default=-1)
        bytes_too = getattr(library.model, "byte_fallback", False)
        found = library.get_added_tokens_decoder().items()
        added = {i: t.__getstate__() for i, t in found if not (bytes_too and A_BYTE.fullmatch(t.content))}
        super().__init__(settings, added)
        self.finder = finder_of(added.values(), library.normalizer)
        self.shrinks |= not (self.byte_level or bytes_too)
        tokens = library.encode("a", add_special_tokens=False).tokens
        self.dummy_prefix = bool(tokens) and tokens[0].startswith("\u2581")
        self.secret = secrets.token_hex(8)  # so that nobody can type what stands for a special token

    def encode_guarded(self, text: str, guard: str, whole: bool) -> list[int]:
        """As transformers does where there is no guard; else in names that no text has."""
        library = self.library
        if guard in text:
            (names, library), parts, start = self.renamed, [], 0
            for name, begin, end in self.added_in(text, guard):
                if name in names:
                    parts += [text[start:begin], names[name]]
                    start = end
            text = "".join([*parts, text[start:]]).replace(guard, "")
        ids = library.encode(text, add_special_tokens=whole).ids
        return self.before + ids + self.after if whole else ids

    @cached_property
    def renamed(self) -> tuple[dict[str, str], Any]:
        """Other names for the protected tokens, and a tokenizer to which the old ones are text."""
        raw = json.loads(self.library.to_str())
        names = {name: f"\ufdee{self.secret}{i}\ufdef" for i, name in enumerate(self.protected)}
        model, vocab = raw["model"], raw["model"]["vocab"]
        raw["added_tokens"] = [entry for entry in raw["added_tokens"] if entry["content"] in self.added_ids]
        for entry in raw["added_tokens"]:
            if entry["content"] in names:
                entry |= {"content": names[entry["content"]], **dict.fromkeys(WHERE, False)}
        if isinstance(vocab, list):  # Unigram
            model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
        else:
            model["vocab"] = {names.get(text, text): token for text, token in vocab.items()}
        if "merges" in model:
            model["merges"] = [m for m in model["merges"] if not names.keys() & {*m, "".join(m)}]
        if "unk_token" in model:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        return names, Library.from_str(json.dumps(raw))

    def piece(self, token: int) -> bytes:
        text = self.library.id_to_token(token) or ""
        if not self.byte_level:
            return bytes_of(text)
        return bytes(BYTE_OF[c] for c in text) if BYTE_OF.keys() >= {*text} else text.encode()


AS_BYTES = {  # classes of transformers that read only the vocabulary, and the special tokens that they name
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
}
LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
INFILL = {f"{name}_token": f"\u2581<{name[:3].upper()}>" for name in ("prefix", "middle", "suffix", "eot")}
AS_LLAMA = {"LlamaTokenizer": LLAMA, "CodeLlamaTokenizer": LLAMA | INFILL | {"fill_token": "<FILL_ME>"}}


def build_as_class(library: Any, settings: Settings) -> None:
    """What else is in a tokenizer.json means nothing to these classes: it is in their code."""
    kind, model, prefix = settings.kind, library.model, settings.config.get("add_prefix_space")
    for key, token in (AS_BYTES | AS_LLAMA)[kind].items():
        settings.name_special(key, token)
    model.unk_token, model.byte_fallback, model.fuse_unk = None, kind in AS_LLAMA, kind in AS_LLAMA
    library.normalizer = normalizers.NFC() if kind == "Qwen2Tokenizer" else None
    if kind in AS_BYTES:
        split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=kind == "GPT2Tokenizer")
        parts = [split, whole] if kind == "Qwen2Tokenizer" else [whole]
        library.pre_tokenizer = pre_tokenizers.Sequence(parts)
        return
    scheme = "never" if prefix is False else "always" if settings.config.get("legacy") else "first"
    if kind == "CodeLlamaTokenizer":
        model.unk_token, scheme = settings.named["unk_token"], scheme.replace("always", "first")
    elif "legacy" not in settings.config:  # transformers 5 forgets to save it, and saves what it meant
        scheme = getattr(library.pre_tokenizer, "prepend_scheme", scheme)
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


WHERE = ("lstrip", "rstrip", "single_word")  # what is around an added token
FLAGS = ("content", *WHERE, "normalized", "special")


def added_tokens(entries: Iterable[dict[str, Any]]) -> list[AddedToken]:
    """Added tokens of the library, from what files say of them."""
    return [AddedToken(**{flag: entry[flag] for flag in FLAGS if flag in entry}) for entry in entries]


def finder_of(entries: Iterable[dict[str, Any]], normalizer: Any = None) -> Library:
    """A tokenizer of the library that has these tokens and no others."""
    finder = Library(models.BPE())
    if normalizer:
        finder.normalizer = normalizer
    finder.add_tokens(added_tokens(entries))
    return finder


def add_tokens(library: Any, settings: Settings) -> None:
    """Give the library the added tokens that the other files of a directory have."""
    own, named = library.get_added_tokens_decoder(), list(settings.named.values())
    if "added_tokens_decoder" not in settings.config:  # the ids of added_tokens.json alone say less
        settings.added = {token: entry for token, entry in settings.added.items() if token not in own}
    entries = [entry for _, entry in sorted(settings.added.items())]
    entries = [e | {"special": True} if e["content"] in named else e for e in entries]
    known = {entry["content"] for entry in entries} | {entry.content for entry in own.values()}
    names = dict.fromkeys([*named, *extra_specials(settings.config)])
    more = [{"content": name, "special": True} for name in names]
    library.add_tokens(added_tokens([*entries, *(e for e in more if e["content"] not in known)]))
    if settings.kind == "Qwen2Tokenizer":  # whose code adds them once more
        library.add_tokens(added_tokens(more))


A_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def bytes_of(piece: str) -> bytes:
    """The bytes of a token like <0x0A>, or of one that writes blanks as sentencepiece does."""
    byte = A_BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2 writes a byte as one visible character: itself if it is visible, else one from 256 upwards."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    hidden = (byte for byte in range(256) if chr(byte) not in alphabet)
    return {c: ord(c) if ord(c) < 256 else next(hidden) for c in alphabet}


BYTE_OF = byte_alphabet()


def load_tokenizer(path: str | Path, context: int | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, whichever kind it is; None where there is none.

    With the tokens of the model's context, it refuses a text that is surely longer before it reads it.
    """
    directory, kind = Path(path), LibraryTokenizer
    files = (directory / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    if file.name == "tokenizer.model":
        with open(file, "rb") as stream:
            is_tiktoken = re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", stream.read(200))
        kind = TiktokenTokenizer if is_tiktoken else SentencePieceTokenizer
    try:
        tokenizer = kind(read_settings(directory), file)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{directory}: its tokenizer files make no sense ({error!r})") from None
    tokenizer.context = context
    return tokenizer


def read_settings(directory: Path) -> Settings:
    """What stands beside the tokenizer itself, as transformers puts it together."""
    config, raw = read_json(directory / "tokenizer_config.json"), read_json(directory / "config.json")
    added = {int(token): entry for token, entry in (config.get("added_tokens_decoder") or {}).items()}
    others = {}
    if "added_tokens_decoder" not in config:
        config |= read_json(directory / "special_tokens_map.json")
        others = read_json(directory / "added_tokens.json")
    named = {k: special_name(v) for k, v in config.items() if k[-6:] == "_token" and type(v) in (str, dict)}
    extra = config.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
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

    def __init__(self, tokenizer: Tokenizer | None, stops: list[str], min_tokens: int = 0):
        self.tokenizer, self.stops, self.min_tokens = tokenizer, stops, min_tokens
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""
        self.ends: list[int] = []  # where in the text each token ends
        self.shown = 0  # characters and
        self.shown_tokens = 0  # whole tokens that `new_spans` has handed out

    def add(self, token: int) -> bool:
        """Append a token; True if that completes a stop string, which is then cut away."""
        before = len(self.text)
        self.text += self.decoder.decode(self.tokenizer.token_bytes(token)) if self.tokenizer else f"{token} "
        stops = self.stops if len(self.ends) + 1 > self.min_tokens else []
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
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
