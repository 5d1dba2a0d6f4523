"""api.py: OpenAI's objects: what a request asks for, and what it is answered.

    ask = Reader(name, target, decoders).read(body, chat=True)    # Refused, with a status, for what cannot be
    writer = Writer(name, target.tokenizer, ask)                   # writer.events(news), writer.whole()

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

from drafts import Text
from engine import Choice, News, Said
from generate import Target
from gpt_spec import Decoder
from grammar import Matcher, Vocabulary, grammar_text
from model import BadInput, check_prompt
from prompts import number, short, whole_number, whole_numbers
from sampling import Sampling
from show import Output
from text import TextStream

MOST_TEXTS, MOST_STOPS, MOST_LOGPROBS = 128, 16, 20
SAMPLING = {  # fields of `Sampling` that a request may set, and what they are if it does not
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0},
    **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
}
FIELDS: dict[
    str, tuple[Any, Any]
] = {  # other fields: their kinds, and what they are where a request is silent
    **{"model": (str, None), "method": (str, None), "n": (int, 1), "seed": (int, None)},
    **{"prompt": ((str, list), None), "messages": (list, None), "chat_template_kwargs": (dict, {})},
    **{"max_tokens": (int, None), "max_completion_tokens": (int, None), "stop": ((str, list), [])},
    **{"stream": (bool, False), "stream_options": (dict, {}), "include_usage": (bool, False)},
    **{"logprobs": ((bool, int), None), "top_logprobs": (int, None), "logit_bias": (dict, {})},
    **{"response_format": (dict, {}), "ignore_eos": (bool, False), "explain": (bool, False)},
}
NOT_HERE: dict[str, tuple] = {  # fields that are not implemented, and values of theirs that ask for nothing
    **{
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
    },
    **{"audio": (), "modalities": (["text"],), "prediction": (), "web_search_options": (), "verbosity": ()},
    **{"reasoning_effort": ("none",), "store": (False,), "service_tier": ("auto", "default")},
    **{"suffix": ("",), "echo": (False,), "best_of": (1,), "use_beam_search": (False,), "bad_words": ([],)},
    **{"stop_token_ids": ([],), "allowed_token_ids": (), "prompt_logprobs": (0,), "documents": ([],)},
    **{"chat_template": (), "add_generation_prompt": (True,), "continue_final_message": (False,)},
    **{"include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "structured_outputs": ()},
    **{"guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "grammar": ()},
    **{"json_schema": (), "no_repeat_ngram_size": (0,), "length_penalty": (1,), "logits_processors": ([],)},
}
ERRORS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Refused(Exception):
    """A request that is answered with an error: its HTTP status, and what OpenAI's error objects hold."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        kind, self.status = ERRORS.get(status, "invalid_request_error"), status
        self.json = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Ask:
    """What a request asks for."""

    chat: bool
    method: str
    seed: int
    prompt_tokens: int
    choices: list[Choice]
    stream: bool
    include_usage: bool
    top: int | None  # log-probabilities to tell beside the token's own; None for none at all
    explain: bool  # our own extension: who proposed each token, and what the steps were


class Reader:
    """Reads requests for one target, in several threads."""

    def __init__(
        self, name: str, target: Target, decoders: dict[str, Decoder], max_tokens: int | None = None
    ):
        """`max_tokens`: of an answer, whatever a request says; None for as many as there is room for."""
        self.name, self.target, self.decoders, self.max_tokens = name, target, decoders, max_tokens
        self.decoder = next(iter(decoders.values()))
        self.vocabulary, self.lock = None, threading.Lock()
        self.matcher = lru_cache(64)(self.make_matcher)

    def read(self, body: dict[str, Any], chat: bool) -> Ask:
        try:
            return self.ask(read_fields(body), body, chat)
        except BadInput as error:  # which begins with the name of a field
            message = str(error).removeprefix("--")
            param = message.split()[0].rstrip(":")
            raise Refused(message, param if param in body else None) from None

    def ask(self, given: Namespace, body: dict[str, Any], chat: bool) -> Ask:
        if given.model not in (None, self.name):
            message = f"there is no model {short(given.model)}; this server has {self.name}"
            raise Refused(message, "model", "model_not_found", 404)
        method = given.method or next(iter(self.decoders))
        if method not in self.decoders:
            raise Refused(f"method is {short(method)}; this server has {', '.join(self.decoders)}", "method")
        prompts, n = self.prompts(given, chat), whole_number("n", given.n, 1)
        if n * len(prompts) > MOST_TEXTS:
            raise Refused(f"n: {n * len(prompts)} texts are asked for; at most {MOST_TEXTS} can be", "n")
        decoder, total = self.decoders[method], sum(map(len, prompts))
        for prompt in prompts:
            if len(prompt) >= decoder.max_length:
                message = f"the prompt has {len(prompt)} tokens; at most {decoder.max_length - 1} fit"
                raise Refused(message, "messages" if chat else "prompt", "context_length_exceeded")
            check_prompt(self.target.model.config, prompt, decoder.max_length)
        seed = secrets.randbelow(2**53) if given.seed is None else given.seed
        sampling, prompts = self.sampling(given, body, seed), [p for p in prompts for _ in range(n)]
        ends = frozenset([] if given.ignore_eos else self.target.stop_ids)
        seeds, samplings = [seed + i for i in range(len(prompts))], [sampling] * len(prompts)
        limits, choices = [self.max_tokens, read_budget(given, chat)], []
        for i, request in enumerate(decoder.requests(prompts, seeds, samplings, ends)):
            budget = min([decoder.max_length - len(prompts[i]), *(each for each in limits if each)])
            stream = TextStream(self.target.tokenizer, read_stops(given), sampling.min_tokens)
            text, output = Text(-1, prompts[i], request, budget), Output(prompts[i], stream)
            choices.append(Choice(i, text, output))
        top, usage = read_top(given, chat), read_fields(given.stream_options).include_usage
        return Ask(chat, method, seed, total, choices, given.stream, usage, top, given.explain)

    def prompts(self, given: Namespace, chat: bool) -> list[list[int]]:
        """Of a chat, its one prompt; else a text, token ids, or a list of either."""
        tokenizer, given_prompt = self.target.tokenizer, given.messages if chat else given.prompt
        name = "messages" if chat else "prompt"
        if not given_prompt:
            raise Refused(f"{name} is missing or empty", name)
        if chat and tokenizer.template is None:
            raise Refused("this model has no chat template: use /v1/completions", "messages")
        if chat:
            variables = given.chat_template_kwargs
            if not all(isinstance(value, (bool, int, float)) for value in variables.values()):
                raise Refused("chat_template_kwargs may hold numbers and booleans", "chat_template_kwargs")
            return [tokenizer.encode_chat([read_message(each) for each in given_prompt], **variables)]
        several = isinstance(given_prompt, list) and isinstance(given_prompt[0], (str, list))
        every = given_prompt if several else [given_prompt]
        return [tokenizer.encode(p) if isinstance(p, str) else whole_numbers("prompt", p) for p in every]

    def sampling(self, given: Namespace, body: dict[str, Any], seed: int) -> Sampling:
        fields = {name: usual if body.get(name) is None else body[name] for name, usual in SAMPLING.items()}
        fields["top_k"] = max(whole_number("top_k", fields["top_k"]), 0)  # vLLM says -1 for all
        if not all(token.isdecimal() for token in given.logit_bias):
            raise Refused('logit_bias must be token ids with numbers, such as {"15": -2}', "logit_bias")
        bias = {int(token): number("logit_bias", value) for token, value in given.logit_bias.items()}
        structure = read_structure(given.response_format)
        if structure and given.ignore_eos:
            raise Refused(
                "ignore_eos: where a structure ends, only the end of the text is left", "ignore_eos"
            )
        grammar = None if structure is None else self.matcher(structure)
        return Sampling(**fields, logit_bias=bias, seed=seed, grammar=grammar)

    def make_matcher(self, structure: str) -> Matcher:
        with self.lock:
            of_target = (self.target.tokenizer, self.decoder.vocabulary, self.target.stop_ids)
            ours = self.vocabulary or Vocabulary(*of_target)
            self.vocabulary = ours
        return Matcher(ours, structure)


def read_fields(body: dict[str, Any]) -> Namespace:
    """The fields of a request, each of its kind."""
    for name, neutral in NOT_HERE.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise Refused(f"{name} is not implemented here", name)
    given = {name: usual if body.get(name) is None else body[name] for name, (_, usual) in FIELDS.items()}
    for name, (kinds, usual) in FIELDS.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if given[name] is not usual and type(given[name]) not in kinds:
            names = {
                dict: "an object",
                list: "a list",
                str: "a text",
                bool: "true or false",
                int: "a whole number",
            }
            wanted = " or ".join(names[kind] for kind in kinds)
            raise Refused(f"{name} is {short(given[name])}; it must be {wanted}", name)
    return Namespace(**given)


def read_budget(given: Namespace, chat: bool) -> int | None:
    """Tokens of an answer; None for as many as there is room for. The newer name wins."""
    for name in ("max_completion_tokens", "max_tokens"):
        if getattr(given, name) is not None:
            return whole_number(name, getattr(given, name), 1)
    return None if chat else 16


def read_stops(given: Namespace) -> list[str]:
    stops = [given.stop] if isinstance(given.stop, str) else given.stop
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(f"stop must be a text that is not empty, or up to {MOST_STOPS} of them", "stop")
    return stops


def read_top(given: Namespace, chat: bool) -> int | None:
    """How many log-probabilities to tell: for a chat in a field of their own, else instead of true."""
    name, top = ("top_logprobs", given.top_logprobs) if chat else ("logprobs", given.logprobs)
    if chat and given.logprobs is not True:
        if top:
            raise Refused("top_logprobs needs logprobs: true", name)
        return None
    if top is not None and not (0 <= top <= MOST_LOGPROBS and type(top) is int):
        raise Refused(f"{name} is {top}; it must be a whole number, 0 to {MOST_LOGPROBS}", name)
    return 0 if chat and top is None else top


def read_structure(form: dict[str, Any]) -> str | None:
    """`response_format`, as `grammar.grammar_text` makes it. For llama-server, the schema has no name."""
    kind = form.get("type", "text")
    holder = form.get("json_schema", form) if kind == "json_schema" else form
    schema = holder.get("schema") if isinstance(holder, dict) else None
    schema = {"type": "object"} if kind == "json_object" and schema is None else schema
    if kind not in ("text", "json_object", "json_schema") or (
        kind != "text" and not isinstance(schema, dict)
    ):
        raise Refused("response_format is text, json_object, or json_schema with a schema", "response_format")
    try:
        return None if kind == "text" else grammar_text(json_schema=schema)
    except BadInput as error:
        raise Refused(str(error).replace("--json_schema", "the schema"), "response_format") from None


def read_message(message: Any) -> dict[str, Any]:
    """A message as chat templates know it: a role and a text."""
    role, content = (
        (message.get(name) for name in ("role", "content")) if isinstance(message, dict) else (0, 0)
    )
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(f"messages: each needs a role, which must be one of {', '.join(ROLES)}", "messages")
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if message.get("tool_calls") or not all(isinstance(text, str) for text in texts):
        raise Refused("messages: one holds something else than text, which is not implemented", "messages")
    return {"role": ROLES[role], "content": "".join(texts)}


def parse(body: bytes) -> dict[str, Any]:
    """The object in a body. NaN and its like are not JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        found = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused("the body is not a JSON object")
    return found


class Writer:
    """Writes what a request is answered. The same `id` and `created` are in all of it."""

    def __init__(self, name: str, tokenizer: Any, ask: Ask):
        self.ask, self.tokenizer = ask, tokenizer
        kind, prefix = ("chat.completion", "chatcmpl-") if ask.chat else ("text_completion", "cmpl-")
        self.head = {"id": prefix + secrets.token_hex(12), "object": kind, "created": int(time.time())}
        self.head |= {"model": name, "system_fingerprint": "gpt-spec", "seed": ask.seed}
        self.chunk = self.head | ({"object": "chat.completion.chunk"} if ask.chat else {})
        self.chunk |= {"usage": None} if ask.include_usage else {}
        self.said: list[list[Said]] = [[] for _ in ask.choices]  # for an answer that is not streamed
        self.names = {token: name for name, token in tokenizer.specials.items()}

    def events(self, news: News) -> list[dict[str, Any]]:
        """The events of a stream: a role first, then text, and why it ends."""
        text, found = "".join(text for text, _ in news.spans), []
        if self.ask.chat and news.accepted is None:
            found.append({"delta": {"role": "assistant", "content": ""}})
        if text or news.said or self.ask.explain:
            found.append(
                ({"delta": {"content": text}} if self.ask.chat else {"text": text}) | self.logprobs(news.said)
            )
        if news.finish_reason:
            found.append(
                ({"delta": {}} if self.ask.chat else {"text": ""}) | {"finish_reason": news.finish_reason}
            )
        usual = {"index": news.choice, "logprobs": None, "finish_reason": None}
        step = {"tokens": news.spans, "accepted": news.accepted, "nodes": news.nodes, "drafter": news.drafter}
        more = {"gpt_spec": step} if self.ask.explain else {}
        return [self.chunk | {"choices": [usual | each]} | more for each in found]

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed, when all its texts have ended."""
        choices = []
        for choice, said in zip(self.ask.choices, self.said):
            text, reason = choice.output.stream.text, choice.output.finish_reason
            message = {"role": "assistant", "content": text, "refusal": None}
            body = {"message": message} if self.ask.chat else {"text": text}
            choices.append({"index": choice.index} | body | self.logprobs(said) | {"finish_reason": reason})
        return self.head | {"choices": choices, "usage": self.usage()}

    def last(self) -> dict[str, Any]:
        """The event at the end of a stream for `include_usage`."""
        return self.chunk | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        new, prompt = sum(len(each.output.token_ids) for each in self.ask.choices), self.ask.prompt_tokens
        cached = {"cached_tokens": self.ask.choices[0].text.shared}
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return usage | {"prompt_tokens_details": cached}

    def logprobs(self, said: list[Said]) -> dict[str, Any]:
        if self.ask.top is None or not said:
            return {"logprobs": None}
        tops = [each.logprob.top[: self.ask.top] for each in said]
        if self.ask.chat:
            own = (self.entry(each.logprob.token, each.logprob.logprob) for each in said)
            more = ({"top_logprobs": [self.entry(*pair) for pair in top]} for top in tops)
            return {"logprobs": {"content": [each | top for each, top in zip(own, more)], "refusal": None}}
        parts = {"tokens": [self.name(each.logprob.token) for each in said]}
        parts |= {"token_logprobs": [least(each.logprob.logprob) for each in said]}
        parts |= {"top_logprobs": [{self.name(token): least(value) for token, value in top} for top in tops]}
        return {"logprobs": parts | {"text_offset": [each.begin for each in said]}}

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
