"""answers.py: the texts that a head learns from: the target's own answers to the prompts of data files.

    python scripts/train_head.py --checkpoint_path DIR --data FILE.jsonl --answers ANSWERS.jsonl --steps 0

A line of ANSWERS.jsonl is one text:

    {"prompt": "5d0c...", "sample": 0, "token_ids": [1, 9, 4, 7, 2], "answers": [[2, 5]]}

`prompt` is a hash of what was asked, `answers` are the ranges of tokens that the target wrote, stop tokens
included. Lines are appended as texts end, so a run that was killed goes on where it stopped.

The one idea: a head guesses what *this* target says next. So every answer is the target's own: its weights,
its chat template, its sampling, and of several turns each on the history that it wrote itself.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import sys
import zlib
from collections import deque
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli import naming_flags, read_turns  # noqa: E402
from generate import Conversation, Target, can_compile  # noqa: E402
from gpt_spec import Decoder  # noqa: E402
from model import BadInput  # noqa: E402
from sampling import Sampling  # noqa: E402
from show import Output  # noqa: E402
from text import TextStream  # noqa: E402

WAVE = 16  # prompts that are begun together, for each row of the batch


# ---- data files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    key: str  # a hash of what it says: the same in any file and any order
    said: list[str] | list[int]  # the texts of a user, turn by turn, or token ids
    where: str  # its file and line

    @staticmethod
    def of(said: list[str] | list[int], where: str) -> Prompt:
        return Prompt(hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16], said, where)

    @property
    def opening(self) -> str:
        """The key of its first turn, which may be all of it."""
        return self.key if isinstance(self.said[0], int) else Prompt.of(self.said[:1], "").key


def read_data(paths: list[str], vocabulary: int, flag: str = "--data") -> list[Prompt]:
    """All prompts of JSON lines in the forms of `generate.py --prompts`, once each. Raises BadInput."""
    prompts: dict[str, Prompt] = {}
    for path in paths:
        for number, line in enumerate(read_unpacked(path, flag).split("\n"), start=1):
            where = f"{path} line {number}"
            try:
                prompt = Prompt.of(read_turns(line), where) if line.strip() else None
                ids = [n for n in prompt.said if isinstance(n, int)] if prompt else []
                wrong = next((n for n in ids if not 0 <= n < vocabulary), None)
                if wrong is not None:
                    raise BadInput(f"has the token id {wrong}; the model knows 0 to {vocabulary - 1}")
            except BadInput as error:
                raise BadInput(f"{flag}: {where}: {error}") from None
            if prompt:
                prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise BadInput(f"{flag}: {' '.join(paths)} has no lines")
    return list(prompts.values())


def read_unpacked(path: str, flag: str) -> str:
    try:
        raw = Path(path).read_bytes()
        return (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInput(f"{flag}: {path} cannot be read: {error}") from None


# ---- the file of answers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A prompt with its answers, as the target wrote them."""

    prompt: str  # the key of its prompt
    sample: int  # the number of this answer among those to the same prompt
    token_ids: list[int]
    answers: list[list[int]]  # [begin, end] of each answer in the tokens

    @property
    def answered(self) -> int:
        """Tokens of answers."""
        return sum(end - begin for begin, end in self.answers)

    @staticmethod
    def from_json(line: str, vocabulary: int) -> Text:
        """Raises BadInput, without the number of the line."""
        try:
            text = Text(**json.loads(line))
            bounds = [0, *(place for begin, end in text.answers for place in (begin, end))]
            numbers = [text.sample, *bounds, *text.token_ids]
        except (ValueError, TypeError, RecursionError):
            raise BadInput("not a text with prompt, sample, token_ids and answers") from None
        if not isinstance(text.prompt, str) or not all(type(n) is int for n in numbers):
            raise BadInput("not a text with prompt, sample, token_ids and answers")
        if bounds != sorted(bounds) or bounds[-1] > len(text.token_ids):
            raise BadInput(f"answers {text.answers} are no ranges of {len(text.token_ids)} tokens")
        wrong = next((t for t in text.token_ids if not 0 <= t < vocabulary), None)
        if wrong is not None:
            raise BadInput(f"has the token id {wrong}; the model knows 0 to {vocabulary - 1}")
        return text


class AnswerFile:
    """The texts of a file, which grows. A last line without an end, of a run that was killed, is dropped."""

    def __init__(self, path: Path, vocabulary: int, excluded: Container[str] = ()):
        """`excluded`: keys of prompts whose texts are passed over."""
        self.path = path
        try:
            raw = path.read_bytes() if path.exists() else b""
            self.size = raw.rfind(b"\n") + 1  # of whole lines
            lines = raw[: self.size].decode("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--answers: {path} cannot be read: {error}") from None
        self.texts: list[Text] = []
        for number, line in enumerate(lines, start=1):
            try:
                self.texts += [Text.from_json(line, vocabulary)] if line.strip() else []
            except BadInput as error:
                raise BadInput(f"--answers: {path} line {number}: {error}") from None
        self.texts = [text for text in self.texts if text.prompt not in excluded]
        self.tokens = sum(text.answered for text in self.texts)

    def add(self, texts: list[Text]) -> None:
        """Append texts, in place of a last line without an end."""
        lines = "".join(json.dumps(asdict(text), separators=(",", ":")) + "\n" for text in texts)
        with self.path.open("ab") as file:
            file.truncate(self.size)
            self.size += file.write(lines.encode())
        self.texts += texts
        self.tokens += sum(text.answered for text in texts)

    def check_origin(self, facts: dict[str, Any]) -> None:
        """Raise BadInput if the answers are by another model, or were sampled in another way. That is kept
        beside them, in a file whose name has `.json` in addition."""
        beside = Path(f"{self.path}.json")
        try:
            known = json.loads(beside.read_text()) if beside.exists() else None
            if known is None and "temperature" in facts:
                beside.write_text(json.dumps(facts, indent=2) + "\n")
        except (OSError, ValueError) as error:
            raise BadInput(f"--answers: {beside} cannot be read or written: {error}") from None
        if not isinstance(known, dict | None):
            raise BadInput(f"--answers: {beside} is no JSON object")
        for name, value in facts.items() if known else ():
            if known.get(name) != value:
                was = f"were written with {name} {known.get(name)!r}, not {value!r}"
                raise BadInput(f"--answers: those in {self.path} {was}; name another file")

    def check_writable(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
        except OSError as error:
            raise BadInput(f"--answers: {self.path} cannot be written: {error}") from None


# ---- answering -----------------------------------------------------------------------------------


class Exchange:
    """A prompt that is being answered, turn by turn on the target's own history."""

    def __init__(self, prompt: Prompt, sample: int, seed: int, target: Target, args: argparse.Namespace):
        self.prompt, self.sample, self.seed, self.longest = prompt, sample, seed, args.max_length
        self.conversation, self.texts = Conversation(target.tokenizer, args), []
        ids = isinstance(prompt.said[0], int)
        self.turns = deque([prompt.said] if ids else prompt.said)
        if not ids and target.tokenizer is None:
            raise BadInput(f"--data: {args.checkpoint_path} has no tokenizer, so prompts must be prompt_ids")

    def ask(self) -> bool:
        """Begin the next turn. False where there is none, or no room for an answer to it, or where the target
        cannot be asked that, which is said in a line."""
        if not self.turns:
            return False
        turn = self.turns.popleft()
        try:
            ids = turn if isinstance(turn, list) else self.conversation.ask(turn)
        except BadInput as error:
            tqdm.write(f"left out: {self.prompt.where}: {error}", file=sys.stderr)
            return False
        self.output = Output(ids, TextStream(self.conversation.tokenizer, []))
        return 0 < len(ids) < self.longest

    def finish_turn(self) -> None:
        """Keep the answer: with the text so far if that goes on, and else, where the template wrote the
        history in other tokens, as a text of its own."""
        output, answers = self.output, []
        self.conversation.answer(output)
        if self.texts and output.prompt_ids[: len(self.texts[-1].token_ids)] == self.texts[-1].token_ids:
            answers = self.texts.pop().answers
        begin, ids = len(output.prompt_ids), output.prompt_ids + output.token_ids
        self.texts.append(Text(self.prompt.key, self.sample, ids, [*answers, [begin, len(ids)]]))


def answer(decoder: Decoder, exchanges: list[Exchange], most: int, stops: list[int]) -> Iterator[Exchange]:
    """Answer all turns of all exchanges, of up to `most` tokens each, yielding those that are whole."""
    asked = [exchange for exchange in exchanges if exchange.ask()]
    while asked:
        prompts, seeds = [each.output.prompt_ids for each in asked], [each.seed for each in asked]
        again = []
        for emissions in decoder.run(prompts, most, stops, seeds=seeds):
            for emission in emissions:
                exchange = asked[emission.prompt_index]
                for token in emission.tokens:
                    exchange.output.stream.add(token)
                exchange.output.add(emission)
                if emission.finish_reason is None:
                    continue
                exchange.finish_turn()
                if exchange.ask():
                    again.append(exchange)
                else:
                    yield exchange
        asked = again


def passes(prompts: list[Prompt], texts: list[Text], args: argparse.Namespace) -> Iterator[list[tuple]]:
    """What is still to be answered: (prompt, sample, seed), a pass over all prompts at a time. There is one
    pass, or with --tokens no end of them. Each has its own order, so that any beginning is a fair sample."""
    done = {(text.prompt, text.sample) for text in texts}
    for sample in count() if args.tokens else range(1):
        order = [(prompt, sample, args.seed + sample * len(prompts) + i) for i, prompt in enumerate(prompts)]
        random.Random(args.seed + sample).shuffle(order)
        yield [each for each in order if (each[0].key, sample) not in done]


def write_answers(target: Target, prompts: list[Prompt], answers: AnswerFile, args) -> None:
    """Have the target answer the prompts, until all are answered once or there are --tokens of answers."""
    if args.tokens and answers.tokens >= args.tokens:
        return
    with naming_flags():
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    decoder = Decoder(target.model, None, sampling, args.max_length, args.batch_size, can_compile(args))
    decoder.warm_up()
    size = WAVE * args.batch_size
    with tqdm(total=args.tokens, initial=answers.tokens, desc="answers", unit="token", disable=None) as bar:
        for todo in passes(prompts, answers.texts, args):
            before = len(answers.texts)
            for begin in range(0, len(todo), size):
                wave = [Exchange(*each, target, args) for each in todo[begin : begin + size]]
                for exchange in answer(decoder, wave, args.max_new_tokens, target.stop_ids):
                    answers.add(exchange.texts)
                    bar.update(answers.tokens - bar.n)
                    if args.tokens and answers.tokens >= args.tokens:
                        return
            if len(todo) == len(prompts) and len(answers.texts) == before:  # not just the rest of a pass
                raise BadInput(f"--data: no prompt has fewer than --max_length {args.max_length} tokens")
