"""api.py: OpenAI's objects: what a request asks for, and what it is answered.

    ask = Reader(name, target, decoders).read(body, chat=True)    # Refused, with a status, for what cannot be
    writer = Writer(name, target.tokenizer, ask)                   # writer.events(news), writer.whole(news)

This file knows fields and their meaning. It knows neither HTTP nor the loop.

The one idea: a request is read in full before anything is decoded. A field that we know and do not implement
is refused with a sentence, so that nothing a client asks for is ignored in silence.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from argparse import Namespace
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from chat import read_messages
from drafts import Text
from engine import Choice, Job, News
from generate import Target
from gpt_spec import Decoder
from grammar import Matcher, Vocabulary, grammar_text
from model import BadInput, check_prompt
from prompts import read_fields, short, token_lists, whole_number
from sampling import Sampling
from show import Output, Said
from text import TextStream

MOST_TEXTS, MOST_STOPS, MOST_LOGPROBS = 128, 16, 20
SAMPLING = {  # fields of `Sampling` that a request may set, and what they are if it does not
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
FIELDS: dict[str, tuple[Any, ...]] = {  # other fields: what they are if a request is silent, and their kinds
    "model": (None, str), "method": (None, str), "n": (1, int), "seed": (None, int), "stop": ([], str, list),
    "prompt": (None, str, list), "messages": (None, list), "chat_template_kwargs": ({}, dict),
    "max_tokens": (None, int), "max_completion_tokens": (None, int), "logit_bias": ({}, dict),
    "stream": (False, bool), "stream_options": ({}, dict), "response_format": ({}, dict),
    "logprobs": (None, bool, int), "top_logprobs": (None, int), "include_usage": (False, bool),
    "ignore_eos": (False, bool), "explain": (False, bool),
}  # fmt: skip
NOT_HERE = (  # fields that are not implemented
    "tools", "tool_choice", "functions", "function_call", "audio", "modalities", "prediction",
    "web_search_options", "verbosity", "reasoning_effort", "store", "service_tier", "suffix", "echo",
    "best_of", "use_beam_search", "bad_words", "stop_token_ids", "documents", "allowed_token_ids",
    "prompt_logprobs", "chat_template", "add_generation_prompt", "continue_final_message", "grammar",
    "regex", "include_stop_str_in_output", "skip_special_tokens", "structured_outputs", "guided_json",
    "guided_regex", "guided_choice", "guided_grammar", "json_schema", "no_repeat_ngram_size",
    "length_penalty", "logits_processors", "return_token_ids", "return_tokens_as_token_ids",
    "truncate_prompt_tokens", "continuous_usage_stats",
)  # fmt: skip
NOTHING = (False, 0, "", [], {})  # values that ask for nothing
USUAL: dict[str, tuple] = {  # where others do
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
    "service_tier": ("auto", "default"), "reasoning_effort": ("none",), "best_of": (1,),
    "add_generation_prompt": (True,), "skip_special_tokens": (True,), "length_penalty": (1,),
}  # fmt: skip
ERRORS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Refused(Exception):
    """A request that is answered with an error: its HTTP status, and what OpenAI's error objects hold."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        kind, self.status = ERRORS.get(status, "invalid_request_error"), status
        self.json = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(eq=False)
class Ask(Job):
    """What a request asks for."""

    chat: bool
    seed: int
    stream: bool
    include_usage: bool
    top: int  # log-probabilities to tell beside the token's own
    explain: bool  # our own extension: who proposed each token, and what the steps were


class Reader:
    """Reads requests for one target, in several threads."""

    def __init__(
        self, name: str, target: Target, decoders: dict[str, Decoder], max_tokens: int | None = None
    ):
        """`max_tokens`: of an answer, whatever a request says; None for as many as there is room for."""
        self.name, self.target, self.decoders, self.max_tokens = name, target, decoders, max_tokens
        self.tokenizer, self.decoder = target.tokenizer, next(iter(decoders.values()))
        self.vocabulary, self.lock = None, threading.Lock()
        self.matcher = lru_cache(64)(self.make_matcher)

    def read(self, data: bytes, chat: bool, seed: int | None = None) -> Ask:
        """The request in a body. `seed`: where the body has none; None for one that is drawn."""
        body: Any = None
        try:
            body = json.loads(data)
            ask = self.ask(read_fields(body, FIELDS), body, chat, seed)
            ask.sent = (data, chat, ask.seed)
            return ask
        except BadInput as error:  # which begins with the name of a field
            message = str(error).removeprefix("--")
            param = message.split()[0].rstrip(":")
            raise Refused(message, param if isinstance(body, dict) and param in body else None) from None
        except (ValueError, RecursionError) as error:
            raise Refused(f"the body is not JSON: {error}") from None

    def ask(self, given: Namespace, body: dict[str, Any], chat: bool, seed: int | None) -> Ask:
        asked = body | given.stream_options
        for name in NOT_HERE:
            if asked.get(name) not in (None, *USUAL.get(name, NOTHING)):
                raise BadInput(f"{name} is not implemented here")
        if given.model not in (None, self.name):
            message = f"there is no model {short(given.model)}; this server has {self.name}"
            raise Refused(message, "model", "model_not_found", 404)
        method = given.method or next(iter(self.decoders))
        if method not in self.decoders:
            raise BadInput(f"method is {short(method)}; this server has {', '.join(self.decoders)}")
        seed = next(s for s in (given.seed, seed, secrets.randbelow(2**53)) if s is not None)
        choices, top = self.choices(given, body, chat, self.decoders[method], seed), read_top(given, chat)
        usage = read_fields(given.stream_options, FIELDS).include_usage
        how = {"chat": chat, "seed": seed, "stream": given.stream, "include_usage": usage}
        return Ask(method, choices, top is not None, **how, top=top or 0, explain=given.explain)

    def choices(
        self, given: Namespace, body: dict[str, Any], chat: bool, decoder: Decoder, seed: int
    ) -> list[Choice]:
        """The texts: of each prompt `n`, with seeds that count up."""
        prompts, n = self.prompts(given, chat), whole_number("n", given.n, 1)
        if n * len(prompts) > MOST_TEXTS:
            raise BadInput(f"n is {n}: {n * len(prompts)} texts; at most {MOST_TEXTS} can be asked for")
        prompts = [prompt for prompt in prompts for _ in range(n)]
        for prompt in prompts:
            if len(prompt) >= decoder.max_length:
                message = f"the prompt has {len(prompt)} tokens; at most {decoder.max_length - 1} fit"
                raise Refused(message, "messages" if chat else "prompt", "context_length_exceeded")
            check_prompt(self.target.model.config, prompt, decoder.max_length)
        sampling, stops = self.sampling(given, body, seed), read_stops(given)
        ends = frozenset([] if given.ignore_eos else self.target.stop_ids)
        seeds, samplings = [seed + i for i in range(len(prompts))], [sampling] * len(prompts)
        limits, choices = [self.max_tokens, read_budget(given, chat)], []
        for i, request in enumerate(decoder.requests(prompts, seeds, samplings, ends)):
            budget = min([decoder.max_length - len(prompts[i]), *(each for each in limits if each)])
            output = Output(prompts[i], TextStream(self.tokenizer, stops, sampling.min_tokens))
            choices.append(Choice(i, Text(-1, prompts[i], request, budget), output))
        return choices

    def prompts(self, given: Namespace, chat: bool) -> list[list[int]]:
        """Of a chat, its one prompt; else texts or token ids."""
        if not (given.messages if chat else given.prompt):
            raise BadInput(f"{'messages' if chat else 'prompt'} is missing or empty")
        if not chat and isinstance(given.prompt, list) and isinstance(given.prompt[0], (str, list)):
            given.prompt = given.prompt[: MOST_TEXTS + 1]  # reading more takes time, and more are refused
        if not chat:
            return token_lists(given.prompt, self.tokenizer)
        if self.tokenizer.template is None:
            raise BadInput("messages: this model has no chat template; use /v1/completions")
        variables = given.chat_template_kwargs
        if not all(isinstance(value, (bool, int, float)) for value in variables.values()):
            raise BadInput("chat_template_kwargs may hold numbers and booleans")
        return [self.tokenizer.encode_chat(read_messages(given.messages), **variables)]

    def sampling(self, given: Namespace, body: dict[str, Any], seed: int) -> Sampling:
        fields = {name: usual if body.get(name) is None else body[name] for name, usual in SAMPLING.items()}
        fields["top_k"] = max(whole_number("top_k", fields["top_k"]), 0)  # vLLM says -1 for all
        if not all(token.isdecimal() for token in given.logit_bias):
            raise BadInput('logit_bias must be token ids with numbers, such as {"15": -2}')
        bias = {int(token): value for token, value in given.logit_bias.items()}
        structure = read_structure(given.response_format)
        if structure and given.ignore_eos:
            raise BadInput("ignore_eos: where a structure ends, only the end of the text is left")
        grammar = None if structure is None else self.matcher(structure)
        return Sampling(**fields, logit_bias=bias, seed=seed, grammar=grammar)

    def make_matcher(self, structure: str) -> Matcher:
        with self.lock:
            of_target = (self.tokenizer, self.decoder.vocabulary, self.target.stop_ids)
            ours = self.vocabulary = self.vocabulary or Vocabulary(*of_target)
        return Matcher(ours, structure)


def read_budget(given: Namespace, chat: bool) -> int | None:
    """Tokens of an answer; None for as many as there is room for. The newer name wins."""
    for name in ("max_completion_tokens", "max_tokens"):
        if getattr(given, name) is not None:
            return whole_number(name, getattr(given, name), 1)
    return None if chat else 16


def read_stops(given: Namespace) -> list[str]:
    stops = [given.stop] if isinstance(given.stop, str) else given.stop
    if len(stops) > MOST_STOPS or not all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stops):
        raise BadInput(f"stop must be a text of 1 to 1000 characters, or up to {MOST_STOPS} of them")
    return stops


def read_top(given: Namespace, chat: bool) -> int | None:
    """How many log-probabilities to tell: for a chat in a field of their own, else in place of true."""
    name, top = ("top_logprobs", given.top_logprobs) if chat else ("logprobs", given.logprobs)
    if chat and not given.logprobs:
        if top:
            raise BadInput("top_logprobs needs logprobs: true")
        return None
    top = 0 if chat and top is None else None if top is False else top
    if top is not None and (top is True or not 0 <= top <= MOST_LOGPROBS):
        raise BadInput(f"{name} is {top}; it must be 0 to {MOST_LOGPROBS}")
    return top


def read_structure(form: dict[str, Any]) -> str | None:
    """`response_format`, as `grammar.grammar_text` makes it. For llama-server, the schema has no name."""
    kind = form.get("type", "text")
    holder = form.get("json_schema", form) if kind == "json_schema" else form
    usual = {"type": "object"} if kind == "json_object" else None
    schema = holder.get("schema", usual) if isinstance(holder, dict) else None
    known = kind in ("text", "json_object", "json_schema")
    if not known or (kind != "text" and not isinstance(schema, dict)):
        raise BadInput("response_format is text, json_object, or json_schema with a schema")
    try:
        return None if kind == "text" else grammar_text(json_schema=schema)
    except BadInput as error:
        raise BadInput(f"response_format: {str(error).replace('--json_schema', 'the schema')}") from None


class Writer:
    """Writes what a request is answered. The same `id` and `created` are in all of it."""

    def __init__(self, name: str, tokenizer: Any, ask: Ask):
        self.ask, self.tokenizer = ask, tokenizer
        kind, prefix = ("chat.completion", "chatcmpl-") if ask.chat else ("text_completion", "cmpl-")
        self.head = {"id": prefix + secrets.token_hex(12), "object": kind, "created": int(time.time())}
        self.head |= {"model": name, "system_fingerprint": "gpt-spec", "seed": ask.seed}
        self.chunk = self.head | ({"object": "chat.completion.chunk"} if ask.chat else {})
        self.chunk |= {"usage": None} if ask.include_usage else {}
        self.names = {token: name for name, token in tokenizer.specials.items()}

    def events(self, news: News) -> list[dict[str, Any]]:
        """The events of a stream: a role first, then text, and why it ends."""
        if news.error:
            return [Refused(news.error, status=news.status).json]
        text, chat, found = "".join(text for text, _ in news.spans), self.ask.chat, []
        if chat and news.accepted is None:
            found.append({"delta": {"role": "assistant", "content": ""}})
        if text or news.said or self.ask.explain:
            written = {"delta": {"content": text}} if chat else {"text": text}
            found.append(written | self.logprobs(news.said))
        if news.finish_reason:
            found.append(({"delta": {}} if chat else {"text": ""}) | {"finish_reason": news.finish_reason})
        usual = {"index": news.choice, "logprobs": None, "finish_reason": None}
        step = {"tokens": news.spans, "new": news.new, "accepted": news.accepted, "nodes": news.nodes}
        step |= {"drafter": news.drafter}
        more = {"gpt_spec": step} if self.ask.explain else {}
        return [self.chunk | {"choices": [usual | each]} | more for each in found]

    def last(self) -> list[dict[str, Any]]:
        """What ends a stream."""
        return [self.chunk | {"choices": [], "usage": self.usage()}] if self.ask.include_usage else []

    def whole(self, news: list[News]) -> dict[str, Any]:
        """The answer that is not streamed, when all its texts have ended."""
        choices = []
        for choice in self.ask.choices:
            text = choice.output.stream.text
            said = [s for n in news if n.choice == choice.index for s in n.said]
            message = {"message": {"role": "assistant", "content": text, "refusal": None}}
            body = (message if self.ask.chat else {"text": text}) | self.logprobs(said)
            choices.append({"index": choice.index, **body, "finish_reason": choice.output.finish_reason})
        return self.head | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        each = self.ask.choices
        new = sum(len(choice.output.token_ids) for choice in each)
        prompts = {id(choice.text.prompt): choice for choice in each}
        prompt = sum(len(choice.text.prompt) for choice in prompts.values())
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return usage | {"prompt_tokens_details": {"cached_tokens": each[0].text.shared}}

    def logprobs(self, said: list[Said]) -> dict[str, Any]:
        if not said:
            return {"logprobs": None}
        own, tops = [s.logprob for s in said], [s.logprob.top[: self.ask.top] for s in said]
        if self.ask.chat:
            entries = [self.entry(each.token, each.logprob) for each in own]
            more = [{"top_logprobs": [self.entry(*pair) for pair in top]} for top in tops]
            content = [entry | top for entry, top in zip(entries, more)]
            return {"logprobs": {"content": content, "refusal": None}}
        parts = {"tokens": [self.name(each.token) for each in own], "text_offset": [s.begin for s in said]}
        parts |= {"token_logprobs": [least(each.logprob) for each in own]}
        parts |= {"top_logprobs": [{self.name(t): least(v) for t, v in top} for top in tops]}
        return {"logprobs": parts}

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        written = list(self.tokenizer.token_bytes(token))
        return {"token": self.name(token), "bytes": written, "logprob": least(logprob)}

    def name(self, token: int) -> str:
        """The text of a token or, where it has none, its name."""
        text = self.tokenizer.token_bytes(token).decode(errors="replace")
        return text or self.names.get(token) or f"token_id:{token}"


def least(logprob: float) -> float:
    """JSON has no -inf."""
    return max(logprob, -9999.0)
