"""The server: what OpenAI's own client gets from it, next to what generate.py prints.

One server with five methods serves nearly all of these tests: a copy of the shipped target that has a chat
template. Texts are compared with those of `generate.main`, in the same process as the tests.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from conftest import NEEDS_EQUAL_ROWS, ROOT, SHIPPED_HEAD, SHIPPED_SMALL, SHIPPED_TARGET, random_model

import bench
import generate
from scripts import soak_server

openai = pytest.importorskip("openai", reason="the package openai is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

METHODS = ("sequential", "autoregressive", "lookup", "tree", "qspec", "auto")
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}# answer:\n"
PROMPTS = (
    "def add(a, b):\n",
    "import os\n\n\ndef walk(",
    "class Stack:\n    def push(self",
    "x",
    "    return ",
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write a loop."}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 9}}}
SCHEMA |= {"required": ["n", "s"], "additionalProperties": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped target, with a chat template."""
    directory = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(SHIPPED_TARGET, directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return directory


def model_flags(model) -> list[str]:
    paths = {"checkpoint": model, "draft_checkpoint": SHIPPED_SMALL, "eagle_checkpoint": SHIPPED_HEAD}
    flags = [word for name, path in paths.items() for word in (f"--{name}_path", str(path))]
    return [*flags, "--precision", "w4a16"]


def plainly(model) -> list[str]:
    """Flags of generate.py for the same target without a drafter."""
    return ["--checkpoint_path", str(model), "--precision", "w4a16", "--method", "autoregressive", "--json"]


class Server:
    """A server in a process of its own."""

    def __init__(self, *flags: str):
        command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", *flags]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored in the background
        )
        self.lines: list[str] = []
        line = next((line for line in self.process.stderr if "http://" in line), "")
        self.port = int(re.search(r":(\d+)$", line)[1])
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def gauge(self, name: str) -> float:
        return soak_server.gauge("127.0.0.1", self.port, name)

    def becomes_idle(self) -> bool:
        return soak_server.idle("127.0.0.1", self.port)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(model):
    methods = [word for method in METHODS for word in ("--method", method)]
    server = Server(*model_flags(model), *methods, "--batch_size", "3", "--prefill_chunk", "16")
    yield server
    assert server.becomes_idle()  # no test leaves a row behind
    assert server.end() == 0 and server.lines == []  # and none makes it complain


SAID: dict[tuple, list[dict]] = {}


def generated(model, capsys, prompts, *flags: str, seed: int = 5, tokens: int = 40) -> list[dict]:
    """What generate.py says to each prompt: output i has the seed `seed` + i. Asked once."""
    asked = (model, tuple(prompts), flags, seed, tokens)
    if asked not in SAID:
        SAID[asked] = generate_now(model, capsys, prompts, *flags, seed=seed, tokens=tokens)
    return SAID[asked]


def generate_now(model, capsys, prompts, *flags: str, seed: int, tokens: int) -> list[dict]:
    file = model.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    given = ["--prompts", str(file), "--seed", str(seed), "--max_new_tokens", str(tokens)]
    capsys.readouterr()
    assert generate.main([*plainly(model), *given, *flags]) == 0
    return json.loads(capsys.readouterr().out)["outputs"]


def completed(server, prompt, stream=False, **options) -> tuple[list[str], list[str], object]:
    """Texts, why they ended, and usage. A stream must look as clients expect it."""
    method, temperature = options.pop("method", None), options.pop("temperature", 0)
    extra = options.pop("extra", {}) | ({"method": method} if method else {})
    ask = {"model": "chatty", "max_tokens": 40, "temperature": temperature, "extra_body": extra} | options
    chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
    create = server.client.chat.completions.create if chat else server.client.completions.create
    ask |= {"messages": prompt} if chat else {"prompt": prompt}
    if not stream:
        answer = create(**ask)
        texts = [c.message.content if chat else c.text for c in answer.choices]
        assert [c.index for c in answer.choices] == list(range(len(texts)))
        return texts, [c.finish_reason for c in answer.choices], answer.usage
    return joined(list(create(**ask, stream=True, stream_options={"include_usage": True})), chat)


def joined(events, chat):
    """The texts of a stream, which is checked on the way."""
    texts, reasons = {}, {}
    assert len({(e.id, e.created, e.model) for e in events}) == 1
    *events, last = events
    assert last.choices == [] and all(event.usage is None for event in events)
    for [choice] in (event.choices for event in events):
        begins = choice.index not in texts
        assert choice.index not in reasons  # nothing follows the reason
        assert not chat or (choice.delta.role == "assistant") == begins
        text = (choice.delta.content or "") if chat else choice.text
        texts[choice.index] = texts.get(choice.index, "") + text
        if choice.finish_reason is not None:
            reasons[choice.index] = choice.finish_reason
    return *([by_index[i] for i in sorted(by_index)] for by_index in (texts, reasons)), last.usage


SETTINGS = [  # of texts, as flags of generate.py, and as fields of a request
    ([], {}),
    (["--temperature", "0.8"], {"temperature": 0.8}),
    (
        ["--temperature", "1.3", "--top_p", "0.9", "--top_k", "50"],
        {"temperature": 1.3, "top_p": 0.9, "extra": {"top_k": 50}},
    ),
    (
        ["--frequency_penalty", "0.7", "--logit_bias", "10:-100,11:2"],
        {"frequency_penalty": 0.7, "logit_bias": {"10": -100, "11": 2}},
    ),
    (
        [
            "--temperature",
            "0.6",
            "--min_p",
            "0.1",
            "--repetition_penalty",
            "1.2",
            "--presence_penalty",
            "0.4",
        ],
        {"temperature": 0.6, "presence_penalty": 0.4, "extra": {"min_p": 0.1, "repetition_penalty": 1.2}},
    ),
    (
        ["--stop", "\n\n", "--stop", "self", "--ignore_eos", "--min_tokens", "3"],
        {"stop": ["\n\n", "self"], "extra": {"ignore_eos": True, "min_tokens": 3}},
    ),
]


@NEEDS_EQUAL_ROWS
def test_every_text_is_that_of_generate(server, model, capsys):
    """32 clients at a time, all methods, in whatever row, streamed or not: 0 texts differ."""
    prompts, asked = PROMPTS * 3, []
    for flags, fields in SETTINGS:
        for i, output in enumerate(generated(model, capsys, prompts, *flags)):
            text = (
                output["text"],
                output["finish_reason"],
                len(output["prompt_ids"]),
                len(output["token_ids"]),
            )
            asked.append((prompts[i], fields | {"seed": 5 + i}, text))
    random.Random(1).shuffle(asked)

    def ask(number: int) -> bool:
        prompt, fields, expected = asked[number]
        more = {"method": METHODS[number % len(METHODS)], "stream": number % 2 == 0}
        [text], [reason], usage = completed(server, prompt, **fields, **more)
        return (text, reason, usage.prompt_tokens, usage.completion_tokens) == expected

    with ThreadPoolExecutor(32) as clients:
        same = list(clients.map(ask, range(len(asked))))
    assert same == [True] * len(SETTINGS) * len(prompts)
    assert server.gauge("num_requests_running") == 0


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_that_of_generate(server, model, capsys, stream):
    flags = ["--chat", "--system", MESSAGES[0]["content"], "--temperature", "0.7"]
    [expected] = generated(model, capsys, [MESSAGES[1]["content"]], *flags)
    [text], _, usage = completed(server, MESSAGES, stream, temperature=0.7, seed=5)
    assert text == expected["text"] and usage.prompt_tokens == len(expected["prompt_ids"])
    parts = [{"role": "developer", "content": "Be brief."}]
    parts.append(
        {"role": "user", "content": [{"type": "text", "text": "Write "}, {"type": "text", "text": "a loop."}]}
    )
    again = {"max_completion_tokens": 40, "max_tokens": 7}  # the newer name wins
    assert completed(server, parts, stream, temperature=0.7, seed=5, **again)[0] == [text]


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("stream", [False, True])
def test_several_texts_have_the_seeds_that_follow(server, model, capsys, stream):
    expected = generated(model, capsys, PROMPTS[:2], "--num_samples", "3", "--temperature", "1")
    texts, _, usage = completed(server, list(PROMPTS[:2]), stream, n=3, seed=5, temperature=1)
    assert texts == [output["text"] for output in expected] and len(set(texts)) > 3
    assert usage.prompt_tokens == sum(len(output["prompt_ids"]) for output in expected[::3])
    assert usage.completion_tokens == sum(len(output["token_ids"]) for output in expected)
    ids = [output["prompt_ids"] for output in expected[::3]]
    assert (
        completed(server, ids, stream, n=3, seed=5, temperature=1)[0] == texts
    )  # token ids are prompts, too
    assert completed(server, ids[1], stream, seed=8, temperature=1)[0] == texts[3:4]


def test_without_a_seed_one_is_drawn_and_told(server):
    ask = {"model": "chatty", "prompt": PROMPTS[0], "max_tokens": 20, "temperature": 1}
    first, second = (server.client.completions.create(**ask) for _ in range(2))
    assert first.seed != second.seed
    again = server.client.completions.create(**ask, seed=first.seed, stream=True)
    events = list(again)
    assert "".join(event.choices[0].text for event in events) == first.choices[0].text
    assert {event.seed for event in events} == {first.seed}


@NEEDS_EQUAL_ROWS
def test_stop_strings_across_chunks(server, model, capsys):
    """No part of a stop string is ever told, wherever it begins and however many tokens it takes."""
    [whole] = generated(model, capsys, PROMPTS[:1], tokens=60)
    text, tested = whole["text"], 0
    for begin in range(3, len(text) - 6, 7):
        stop = text[begin : begin + 5]
        [said], [reason], _ = completed(server, PROMPTS[0], True, stop=stop, max_tokens=60, seed=5)
        assert (said, reason) == (text[: text.index(stop)], "stop")
        tested += 1
    assert tested > 8


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_waits(server, stream):
    """Each of these characters is several tokens of a byte each."""
    pytest.importorskip("llguidance")
    schema = {"enum": ["\u00e9\u4e16\u754c\U0001f642\ufffd"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    [text], [reason], _ = completed(server, "x = ", stream, extra={"response_format": form}, max_tokens=80)
    assert (json.loads(text), reason) == (schema["enum"][0], "stop")


def test_half_a_character_at_the_end_is_told(server):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "\U0001f642"}}}
    for stream in (False, True):
        texts = {
            completed(server, "x = ", stream, extra={"response_format": form}, max_tokens=n)[0][0]
            for n in range(2, 5)
        }
        assert any(text.endswith("\ufffd") for text in texts)


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("method", METHODS)
def test_a_schema_is_that_of_generate(server, model, capsys, method):
    pytest.importorskip("llguidance")
    flags = ["--json_schema", json.dumps(SCHEMA), "--temperature", "0.7"]
    expected = [output["text"] for output in generated(model, capsys, PROMPTS[:3], *flags, tokens=80)]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    fields = {"extra": {"response_format": form}, "max_tokens": 80, "temperature": 0.7, "method": method}
    found = [completed(server, p, i == 1, seed=5 + i, **fields)[0][0] for i, p in enumerate(PROMPTS[:3])]
    assert found == expected and {"n", "s"} == set(json.loads(found[0]))
    form = {"type": "json_object"}
    [text], [reason], _ = completed(
        server, "x = ", extra={"response_format": form}, max_tokens=200, stop=None
    )
    assert reason == "length" or isinstance(json.loads(text), dict)


# ---- Log-probabilities ---------------------------------------------------------------------------


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [[], ["return"]])
def test_logprobs_are_those_of_generate(server, model, capsys, stream, stop):
    flags = [word for text in stop for word in ("--stop", text)]
    [expected] = generated(model, capsys, PROMPTS[2:3], "--logprobs", "3", *flags, tokens=60)
    ask = {"model": "chatty", "prompt": PROMPTS[2], "max_tokens": 60, "temperature": 0, "stop": stop or None}
    answer = server.client.completions.create(**ask, logprobs=3, stream=stream)
    parts = [e.choices[0] for e in answer] if stream else answer.choices
    said = [part.logprobs for part in parts if part.logprobs]
    values = [value for part in said for value in part.token_logprobs]
    assert values == [each["logprob"] for each in expected["logprobs"]][: len(values)] and len(values) > 5
    tops = [[*top.values()] for part in said for top in part.top_logprobs]
    assert tops == [[v for _, v in each["top"]] for each in expected["logprobs"]][: len(tops)]
    assert "".join(token for part in said for token in part.tokens).startswith(expected["text"])
    offsets = [offset for part in said for offset in part.text_offset]
    assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] < len(expected["text"])
    for part in parts if stream else ():  # text and its log-probabilities come together
        assert not part.logprobs or part.text == "".join(part.logprobs.tokens)[: len(part.text)]


@NEEDS_EQUAL_ROWS
def test_logprobs_of_a_chat(server, model, capsys):
    flags = ["--chat", "--system", MESSAGES[0]["content"], "--logprobs", "2"]
    [expected] = generated(model, capsys, [MESSAGES[1]["content"]], *flags)
    ask = {"model": "chatty", "messages": MESSAGES, "max_tokens": 40, "temperature": 0, "logprobs": True}
    whole = server.client.chat.completions.create(**ask, top_logprobs=2).choices[0]
    content = whole.logprobs.content
    assert [each.logprob for each in content] == [each["logprob"] for each in expected["logprobs"]][
        : len(content)
    ]
    assert b"".join(bytes(each.bytes) for each in content).decode() == whole.message.content
    assert all(
        len(each.top_logprobs) == 2 and each.top_logprobs[0].logprob >= each.logprob for each in content
    )
    events = server.client.chat.completions.create(**ask, stream=True)
    streamed = [said for e in events if e.choices[0].logprobs for said in e.choices[0].logprobs.content]
    assert [each.logprob for each in streamed] == [each.logprob for each in content]
    assert all(each.top_logprobs == [] for each in streamed)


# ---- Errors --------------------------------------------------------------------------------------

BAD = [  # fields of completions, and a word of the message
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n is 0"),
    ({"n": 10**6}, "n is"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 99}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"logprobs": 99}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": "x"}}, "logit_bias"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [99999]}, "token id 99999"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [{}]}, "prompt"),
    ({"echo": True}, "echo is not implemented"),
    ({"suffix": "x"}, "suffix is not implemented"),
    ({"best_of": 4}, "best_of is not implemented"),
    ({"stream": "yes"}, "stream"),
    ({"extra_body": {"tools": [{}]}}, "tools is not implemented"),
    ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template is not implemented"),
    ({"extra_body": {"method": "magic"}}, "method"),
    ({"extra_body": {"response_format": {"type": "xml"}}}, "response_format"),
    ({"extra_body": {"response_format": {"type": "json_schema"}}}, "response_format"),
    ({"extra_body": {"response_format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}, "schema"),
    ({"extra_body": {"min_p": 2}}, "min_p"),
    ({"extra_body": {"stream_options": []}}, "stream_options"),
]


@pytest.mark.parametrize("fields, word", BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_are_refused(server, fields, word):
    with pytest.raises(openai.BadRequestError) as error:
        server.client.completions.create(**({"model": "chatty", "prompt": "x"} | fields))
    body = error.value.body
    assert word in body["message"] and "\n" not in body["message"]
    assert body["type"] == "invalid_request_error" and set(body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "messages, fields",
    [
        ([], {}),
        ([{"role": "wizard", "content": "x"}], {}),
        ([{"content": "x"}], {}),
        (["x"], {}),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                }
            ],
            {},
        ),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], {}),
        (MESSAGES, {"top_logprobs": 2}),
        (MESSAGES, {"logprobs": True, "top_logprobs": 21}),
        (MESSAGES, {"extra_body": {"chat_template_kwargs": {"bos_token": "<s>"}}}),
        (MESSAGES, {"extra_body": {"chat_template_kwargs": {"messages": True}}}),
    ],
)
def test_bad_chats_are_refused(server, messages, fields):
    with pytest.raises(openai.BadRequestError):
        server.client.chat.completions.create(model="chatty", messages=messages, **fields)


def test_what_asks_for_nothing_is_taken(server):
    nothing = {
        "tools": [],
        "logprobs": False,
        "tool_choice": "none",
        "echo": False,
        "unheard_of": {"a": 1},
        "user": "me",
        "stop": None,
    }
    [text], _, _ = completed(server, PROMPTS[0], extra=nothing, max_tokens=5)
    assert text == completed(server, PROMPTS[0], max_tokens=5)[0][0]


def test_a_user_cannot_write_special_tokens(server):
    """`</s>` in a message is text."""
    plain = completed(server, [{"role": "user", "content": "a"}], max_tokens=1)[2].prompt_tokens
    assert completed(server, [{"role": "user", "content": "</s>"}], max_tokens=1)[2].prompt_tokens > plain


def test_other_errors_have_their_exceptions(server):
    client = server.client
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-4", prompt="x")
    assert error.value.code == "model_not_found" and "chatty" in str(error.value)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="chatty", input="x")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="chatty", prompt="import os\n" * 500)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(model="chatty", prompt="x" * (5 << 20))
    assert error.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="takes 67 at a time") as error:  # however often it asks
        client.completions.create(model="chatty", prompt="x", n=68)
    assert error.value.param == "n"
    ask = {"model": "chatty", "prompt": "x", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    many = client.completions.create(**ask, n=60, stream=True)
    next(iter(many))
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="chatty", prompt="x", n=8)
    assert int(error.value.response.headers["retry-after"]) > 0
    many.close()


@pytest.mark.parametrize("body", soak_server.BROKEN, ids=lambda body: str(body[:20]))
def test_what_is_no_json_is_refused(server, body):
    answer = raw(server, soak_server.request("/v1/completions", body))
    assert answer.startswith(b"HTTP/1.1 400") and b"invalid_request_error" in answer


def test_a_page_of_another_site_cannot_ask(server):
    """A browser sends these types without asking the server first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        data = soak_server.request("/v1/completions", b'{"prompt": "x"}', kind)
        assert raw(server, data).startswith(b"HTTP/1.1 400")


def raw(server, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# ---- Rows that come and go -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(server, stream):
    body = {
        "prompt": "x = ",
        "n": 6,
        "max_tokens": 900,
        "stream": stream,
        "ignore_eos": True,
        "temperature": 1,
    }
    before = server.gauge('generation_tokens_total{method="sequential"}')
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(soak_server.request("/v1/completions", json.dumps(body).encode()))
        while server.gauge("num_requests_running") < 3:
            time.sleep(0.01)
        if stream:
            connection.recv(2000)
    assert server.becomes_idle()
    assert server.gauge('generation_tokens_total{method="sequential"}') - before < 6 * 800


def test_a_client_that_leaves_while_its_prompt_is_read(server):
    body = {"prompt": "import os\n" * 240, "max_tokens": 5, "stream": True, "n": 3, "method": "auto"}
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(soak_server.request("/v1/completions", json.dumps(body).encode()))
            time.sleep(0.05)
    assert server.becomes_idle()


def test_a_text_ends_where_the_context_does(server):
    [text], [reason], usage = completed(server, PROMPTS[0], max_tokens=10**9, extra={"ignore_eos": True})
    assert (reason, usage.total_tokens) == ("length", 1024)


@NEEDS_EQUAL_ROWS
def test_a_conversation_finds_its_prefix(server, model, capsys):
    history, before = [*MESSAGES], 0
    for turn, text in enumerate(("And then?", "Why?")):
        [answer], _, usage = completed(server, history, turn == 1, temperature=0.9, seed=3, method="tree")
        cached = usage.prompt_tokens_details.cached_tokens
        assert turn == 0 or cached > before - 8  # the last line of the prompt names no role
        before = usage.prompt_tokens
        history += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    [text], _, usage = completed(server, history, temperature=0.9, seed=3, method="tree")
    ids = generate.load_tokenizer(model).encode_chat(history)
    assert usage.prompt_tokens == len(ids)
    given = [
        "--prompt_ids",
        ",".join(map(str, ids)),
        "--temperature",
        "0.9",
        "--seed",
        "3",
        "--max_new_tokens",
        "40",
    ]
    capsys.readouterr()
    assert generate.main([*plainly(model), *given]) == 0
    assert [text] == [output["text"] for output in json.loads(capsys.readouterr().out)["outputs"]]
    assert usage.prompt_tokens_details.cached_tokens > before - 8


def test_random_requests_for_a_while(server):
    """scripts/soak_server.py does it for ten minutes."""
    soak = soak_server.Soak("127.0.0.1", server.port, seconds=20)
    soak.run(clients=16)
    assert soak.wrong == [] and server.becomes_idle()
    assert soak.statuses["ask 200"] > 20 and soak.statuses["nonsense 400"] > 2


def test_metrics(server):
    completed(server, PROMPTS[0], method="tree", max_tokens=30)
    text = raw(server, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").decode()
    body = text.partition("\r\n\r\n")[2]
    assert "text/plain" in text.partition("\r\n\r\n")[0]
    for line in body.splitlines():
        assert re.fullmatch(
            r'# TYPE [\w:]+ (counter|gauge|histogram)|[\w:]+(\{[\w="+.,]+\})? [-+\d.e]+', line
        ), line
    numbers = dict(line.rsplit(" ", 1) for line in body.splitlines() if line[0] != "#")
    assert float(numbers['gpt_spec:tokens_per_step{method="tree"}']) > 1
    first = 'gpt_spec:spec_decode_num_accepted_tokens_per_pos_total{method="tree",position="%d"}'
    accepted = [
        float(numbers[first % i]) for i in range(6) if first % i in numbers
    ]  # trees are as deep as pays
    assert accepted == sorted(accepted, reverse=True) and accepted[0] > 0
    assert numbers["gpt_spec:rows"] == str(3 * len(METHODS))


def test_the_step_behind_the_tokens_is_told_where_it_is_asked_for(server):
    ask = {"model": "chatty", "prompt": PROMPTS[0], "max_tokens": 30, "temperature": 0, "stream": True}
    plain = list(server.client.completions.create(**ask))
    told = list(server.client.completions.create(**ask, extra_body={"explain": True}))
    assert not any(hasattr(event, "gpt_spec") for event in plain)
    steps = [event.gpt_spec for event in told if event.choices[0].text]
    tokens = [token for step in steps for token in step["tokens"]]
    assert "".join(text for text, _ in tokens) == "".join(event.choices[0].text for event in plain)
    assert any(drafted for _, drafted in tokens) and not all(drafted for _, drafted in tokens)
    assert steps[0]["accepted"] is None and max(step["accepted"] or 0 for step in steps) > 0


# ---- A server's beginning and end ----------------------------------------------------------------


def test_sigterm_lets_running_texts_finish():
    server = Server("--batch_size", "2", "--api_key", "secret", "--grace", "60")
    with pytest.raises(openai.AuthenticationError):
        server.client.models.list()
    client = server.client.with_options(api_key="secret")
    assert [each.id for each in client.models.list()] == ["python-7m"]
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="python-7m", messages=MESSAGES)
    ask = {"model": "python-7m", "prompt": PROMPTS[0], "max_tokens": 500, "extra_body": {"ignore_eos": True}}
    events = iter(client.completions.create(**ask, stream=True, seed=1))
    first = next(events)
    server.process.send_signal(signal.SIGTERM)
    reasons = [event.choices[0].finish_reason for event in events]
    assert first.choices[0].text and reasons[-1] == "length"
    assert server.process.wait(timeout=60) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_does_not_wait_for_ever(number, status):
    server = Server("--batch_size", "1", "--grace", "1", "--method", "autoregressive")
    ask = {"model": "python-7m", "prompt": PROMPTS[0], "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    many = server.client.completions.create(**ask, stream=True, n=62)  # kept: it ends with its last reference
    next(iter(many))
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(raw, server, soak_server.request("/v1/completions", b'{"prompt": "x"}'))
        end = time.monotonic() + 30
        while server.gauge("num_requests_waiting") < 62 and time.monotonic() < end:
            time.sleep(0.05)
        begin = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(timeout=60) == status
        assert time.monotonic() - begin < 30
        answer = waits.result()
    assert b" 503 " in answer.splitlines()[0] and b"the server ends" in answer
    assert not any("Traceback" in line for line in server.lines)


@NEEDS_EQUAL_ROWS
def test_two_processes_serve_one_model(model, capsys, monkeypatch):
    """Rank 0 has the clients. The texts are those of one process that adds up in two parts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    methods = [word for method in ("tree", "lookup", "sequential") for word in ("--method", method)]
    flags = [*model_flags(model), *methods, "--batch_size", "2"]
    command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", *flags]
    other = subprocess.Popen(command, env=os.environ | ranks | {"RANK": "1"})
    with monkeypatch.context() as patch:
        for name, value in (ranks | {"RANK": "0"}).items():
            patch.setenv(name, value)
        server = Server(*flags)
    ask = {"model": "chatty", "max_tokens": 24, "temperature": 1.0}

    def text(i: int) -> str:
        more = {"method": ("tree", "lookup")[i % 2]}
        return (
            server.client.completions.create(prompt=PROMPTS[i], seed=5 + i, extra_body=more, **ask)
            .choices[0]
            .text
        )

    left = server.client.completions.create(prompt="y", stream=True, **ask | {"max_tokens": 400})
    next(iter(left))
    left.close()
    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(text, range(len(PROMPTS))))
    drawn = server.client.completions.create(prompt="z", **ask)  # a seed that rank 0 draws
    assert server.becomes_idle()
    assert server.end() == 0 and other.wait(timeout=60) == 0
    how = ("--sum_parts", "2", "--temperature", "1")
    assert texts == [each["text"] for each in generated(model, capsys, PROMPTS, *how, tokens=24)]
    again = generated(model, capsys, ["z"], *how, seed=drawn.seed, tokens=24)
    assert drawn.choices[0].text == again[0]["text"]


def test_an_idle_server_ends_with_another_of_its_processes(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    flags = ["--batch_size", "1", "--method", "autoregressive"]
    command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", *flags]
    other = subprocess.Popen(command, env=os.environ | ranks | {"RANK": "1"})
    for name, value in (ranks | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    server = Server(*flags)
    other.kill()
    assert server.process.wait(timeout=30) == 1 and other.wait() != 0
    assert server.lines == ["error: another process of this run has ended or does not answer\n"]


def refused(*flags: str, code: str = "pass") -> str:
    """The line with which a server refuses to begin."""
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {['serve.py', *flags]}; {code}; "
    )
    program += f"runpy.run_path({str(ROOT / 'serve.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_server_that_cannot_begin_says_why_in_a_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port" in refused("--port", str(taken.getsockname()[1]))
    assert "--temperature: a server has no such flag" in refused("--temperature", "1")
    assert "--prompt: a server has no such flag" in refused("--prompt", "x")
    assert "--batch_size is 0" in refused("--batch_size", "0")
    assert "--tree_size" in refused("--method", "lookup", "--tree_size", "9")
    none = "import importlib.util as u; true = u.find_spec\n"
    none += "u.find_spec = lambda name, *more: None if name == 'uvicorn' else true(name, *more)"
    assert refused(code=none).strip() == "error: uvicorn missing; pip install -r requirements-serve.txt"


def test_bench_puts_a_server_under_load(capsys, tmp_path):
    sizes = [
        "--clients",
        "1,2",
        "--prompts",
        "3",
        "--max_new_tokens",
        "8",
        "--long_prompt",
        "90",
        "--rows",
        "2",
    ]
    assert bench.main(["serve", "--methods", "lookup", *sizes]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["lookup"]
    assert found["without_server"] > 0 and found["1"]["gap_99"] >= found["1"]["gap_median"] > 0
    assert set(found) == {"1", "2", "long_prompt", "without_server"}
    assert bench.main(["serve", "--llama_cpp", str(tmp_path)]) == 2
    assert "llama-server" in capsys.readouterr().err


# ---- The engine ----------------------------------------------------------------------------------


class DeadEnd:
    """A matcher whose grammar cannot go on after some masks."""

    def __init__(self, masks: int):
        self.masks, self.place, self.beginning = masks, self, None

    def fresh(self):
        return self

    def is_error(self) -> bool:
        return self.masks < 0

    def walk(self, tokens, parent, out):
        self.masks -= 1
        if self.masks < 0:
            raise generate.BadInput("the text cannot go on in its structure")
        return out.fill_(-1)

    def consume(self, tokens):
        pass


@pytest.mark.parametrize("masks", [0, 1, 3])
def test_a_grammar_at_a_dead_end_ends_its_own_text(masks):
    """The others of the batch lose nothing."""
    from engine import Choice, Engine, Job
    from gpt_spec import Decoder, LookupDrafter, Request, Sampling, Text
    from show import Output
    from text import TextStream

    target = random_model()
    decoder = Decoder(target, LookupDrafter(), Sampling(1.0), 64, 3, compile=False, every_control=True)
    engine, told = Engine({"lookup": decoder}, chunk=4), []
    jobs = []
    for i, matcher in enumerate((None, DeadEnd(masks), None)):
        sampling = Sampling(1.0)
        object.__setattr__(sampling, "grammar", matcher)
        text = Text(-1, [1, 2 + i, 3, 4, 5, 6], Request(sampling, 7), 20)
        jobs.append(Job("lookup", [Choice(0, text, Output(text.prompt, TextStream(None, [])))], False))
        jobs[-1].tell = told.extend
        engine.submit(jobs[-1])
    engine.read_messages(wait=True)
    [lane] = engine.lanes.values()
    while lane.owners:
        engine.advance(lane)
    ends = [job.choices[0].output for job in jobs]
    assert [(len(end.token_ids), end.finish_reason) for end in ends[::2]] == [(20, "length")] * 2
    [expected] = [each for each in told if each.error]
    assert expected.status == 400 and "structure" in expected.error
    assert decoder.rows == [None] * 3 and not lane.waiting
    alone = Decoder(target, None, Sampling(1.0), 64, compile=False)
    for i in (0, 2):
        run = alone.run([jobs[i].choices[0].text.prompt], 20, seeds=[7])
        assert [token for [e] in run for token in e.tokens] == ends[i].token_ids


def test_a_text_that_ends_in_a_failed_step_is_told_so():
    """It is in no row any more, and its client waits."""
    from engine import Choice, Engine, Job
    from gpt_spec import Decoder, LookupDrafter, Request, Sampling, Text
    from show import Output
    from text import TextStream

    decoder = Decoder(random_model(), LookupDrafter(), Sampling(1.0), 64, 2, compile=False)
    learn = decoder.drafter.learn

    def fail_when_one_has_ended(*args):
        learn(*args)
        if None in decoder.rows:
            raise RuntimeError("out of luck")

    decoder.drafter.learn = fail_when_one_has_ended
    engine, told = Engine({"lookup": decoder}, chunk=8), []
    for budget in (3, 30):
        text = Text(-1, [1, 2, 3], Request(Sampling(1.0), 7), budget)
        job = Job("lookup", [Choice(0, text, Output(text.prompt, TextStream(None, [])))], False)
        job.tell = told.extend
        engine.submit(job)
    engine.read_messages(wait=True)
    [lane] = engine.lanes.values()
    while lane.owners:
        engine.advance(lane)
    assert [(each.status, each.error) for each in told if each.error] == [(500, "out of luck")] * 2
    assert decoder.rows == [None, None]


def test_a_server_takes_all_flags_of_methods():
    import serve

    assert set(generate.FLAGS_OF) <= set(serve.FLAGS)


def test_others_go_on_while_a_long_prompt_is_read():
    """Between two steps of a text, another one goes on by a chunk of its prompt, and at its end by a step."""
    from gpt_spec import Decoder, Request, Sampling, Stats, Text

    decoder = Decoder(random_model(), None, Sampling(), 200, 2, compile=False)
    decoder.count_into(Stats())
    short, long = (Text(i, [1] * length, Request(Sampling(), 0), 60) for i, length in enumerate((3, 150)))
    waiting, seen = deque([short]), []
    for call in range(40):
        waiting.extend([long] if call == 5 else [])
        for emissions in decoder.advance(waiting, lambda number, token: False, True, chunk=10):
            seen += [(e.prompt_index, long.length) for e in emissions]
    lengths = [length for number, length in seen if number == 0]
    assert len(lengths) == 41  # the first token, and one a call
    assert all(b - a <= 11 for a, b in zip(lengths, lengths[1:])) and long.length > 150
