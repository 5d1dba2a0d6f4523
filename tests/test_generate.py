"""The command line: what users type, what they get, and one clear line when it cannot be."""

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import NEEDS_EQUAL_ROWS, ROOT, SHIPPED_SMALL, SHIPPED_TARGET, random_model, save_checkpoint
from safetensors.torch import load_file, save_file

import generate
from checkpoints import MODELS
from packing import precision_of
from text import SentencePieceTokenizer, load_tokenizer

SMALL_HEAD = MODELS / "python-1m-eagle"
FIELDS = {
    *("new_tokens", "prefill_seconds", "time_to_first_token_seconds", "decode_seconds"),
    *(
        "decode_tokens_per_second",
        "target_forwards",
        "drafted_tokens",
        "accepted_tokens",
        "tokens_per_step",
        "acceptance_by_position",
    ),
    *("compile_seconds", "peak_memory_bytes", "weight_bytes"),
}
EAGER = ["--compile", "none"]
SHORT = [*EAGER, "--max_new_tokens", "24"]


SELF = ["--method", "hierarchical", "--draft_checkpoint_path", "self"]
MIDDLE = ["--draft_checkpoint_path", str(SHIPPED_SMALL)]


def run(capsys, *flags: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command line, in this process."""
    status = generate.main(list(flags))
    out = capsys.readouterr()
    return status, out.out, out.err


def run_json(capsys, *flags: str) -> dict:
    status, out, _ = run(capsys, "--json", *flags)
    assert status == 0 and out.count("\n") == 1
    return json.loads(out)


def assert_refused(capsys, flags: list[str], *words: str) -> None:
    """Exit status 2, nothing on stdout, and one line on stderr with these words in it."""
    status, out, err = run(capsys, *flags)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random fp32 checkpoint without a tokenizer."""
    return str(
        save_checkpoint(random_model(max_context=64), tmp_path_factory.mktemp("tiny"), eos_token_id=60)
    )


# ---- what it prints ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_every_method_prints_the_same_text(capsys, temperature):
    flags = [*SHORT, "--precision", "fp32", "--temperature", temperature, "--top_p", "0.9"]
    expected = run_json(capsys, *flags, "--method", "autoregressive")
    assert expected["outputs"][0]["token_ids"]
    methods = sorted(set(generate.METHODS) - {"autoregressive", "qspec", "dflash"})  # no block head ships
    rounded = ["sequential", "--draft_precision", "bf16"]  # which cannot change the text either
    for method, *more in [[name] for name in methods] + [rounded]:
        result = run_json(capsys, *flags, "--method", method, *more)
        assert result["outputs"] == expected["outputs"]
        assert result["method"] == method
        assert result["stats"]["target_forwards"] <= expected["stats"]["target_forwards"]


def test_both_paths_make_a_hierarchy(capsys):
    """A small model with a head of its own; and the target as its own middle, which only adds a head."""
    flags = [*SHORT, "--precision", "w4a16"]
    expected = run_json(capsys, *flags, "--method", "autoregressive")
    for drafter in ([*MIDDLE, "--eagle_checkpoint_path", str(SMALL_HEAD)], [*SELF, "--tree_size", "8"]):
        result = run_json(capsys, *flags, "--min_draft_length", "4", *drafter)
        assert (result["method"], result["outputs"]) == ("hierarchical", expected["outputs"])
        stats, [outer, inner] = result["stats"], result["stats"]["levels"]
        assert outer["forwards"] == stats["target_forwards"]
        assert inner["tokens_per_step"] > 1.5
        assert stats["drafted_tokens"] == inner["accepted_tokens"] + inner["forwards"]
        spent = inner["drafting_seconds"] + inner["verification_seconds"]
        assert 0 < spent <= outer["drafting_seconds"] < stats["decode_seconds"]
    head = stats["weight_bytes"] - expected["stats"]["weight_bytes"]
    assert head == sum(t.nbytes for t in load_file(generate.SHIPPED_HEAD / "model.safetensors").values())
    _, _, err = run(capsys, *flags, *SELF)
    assert re.search(
        r"levels: the target [\d.]+ tokens per step, [\d.]+ s; the middle model [\d.]+ tokens", err
    )


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_qspec_prints_what_its_target_prints(capsys, temperature):
    """In the target's precision, with the weights of the target alone."""
    for precision, draft in (("w4a16", []), ("w4a16", ["--draft_precision", "w4a4"]), ("w8a16", [])):
        flags = [*SHORT, "--precision", precision, "--temperature", temperature]
        expected = run_json(capsys, *flags, "--method", "autoregressive")
        result = run_json(capsys, *flags, "--method", "qspec", "--speculate_k", "3", *draft)
        assert (result["method"], result["precision"]) == ("qspec", precision)
        assert result["outputs"] == expected["outputs"]
        assert result["stats"]["weight_bytes"] == expected["stats"]["weight_bytes"]
        assert result["stats"]["tokens_per_step"] > 2


@pytest.mark.parametrize(
    "precision, asked, draft",
    [
        *(("w4a16", None, "w4a8"), ("w4a16", "w4a4", "w4a4"), ("w4a16", "w4a16", "w4a16")),
        *(("w4a8", None, "w4a4"), ("w8a16", None, "w8a8")),
    ],
)
def test_the_precision_that_qspec_drafts_in(precision, asked, draft):
    flags = ["--method", "qspec", "--precision", precision, "--speculate_k", "7", "--draft_confidence", "0.2"]
    args = generate.build_parser().parse_args(flags + (["--draft_precision", asked] if asked else []))
    target = generate.load_target(args)
    method, drafter = generate.build_drafter(args, target)
    assert (method, precision_of(drafter.model)) == ("qspec", draft)
    assert (drafter.max_nodes, drafter.draft_confidence, drafter.shares_cache) == (8, 0.2, True)
    assert precision_of(target.model) == precision


def test_statistics_of_a_batch(capsys, tmp_path):
    lines = [{"prompt_ids": [1, *range(50, 50 + 3 * i)]} for i in range(4)]
    file = write_prompts(tmp_path / "p.jsonl", *lines[:2], "{bad", *lines[2:])
    flags = [*SHORT, "--prompts", file, "--batch_size", "3"]
    status, out, err = run(capsys, *flags, "--json")
    result = json.loads(out)
    stats, outputs = result["stats"], result["outputs"]
    rates = stats["tokens_per_step_by_output"]
    assert status == 2 and len(rates) == 5 and rates[2] is None
    steps = [(len(o["token_ids"]) - 1) / rate for o, rate in zip(outputs, rates) if rate]
    assert sum(steps) == pytest.approx(stats["target_forwards"])
    assert 0.5 < stats["occupancy"] < 1
    seconds = stats["prefill_seconds"] + stats["decode_seconds"]
    assert stats["aggregate_tokens_per_second"] == pytest.approx(stats["new_tokens"] / seconds)
    assert re.search(r"all texts: [\d.]+ tokens/s with prefill; rows occupied 0\.\d+; tokens per step", err)
    assert "texts:" not in run(capsys, *SHORT)[2]
    _, _, err = run(capsys, *EAGER, "--max_new_tokens", "1", "--prompts", file)
    assert re.search(r"all texts: [\d.]+ tokens/s with prefill\n", err)


def test_json_has_the_promised_fields(capsys):
    result = run_json(capsys, *SHORT, "--prompt", "def f(x):\n", "--seed", "5")
    assert {"method", "precision", "device", "seed", "outputs", "stats"} <= set(result)
    assert (result["method"], result["precision"], result["seed"]) == ("sequential", "bf16", 5)
    [output] = result["outputs"]
    assert set(output) == {"prompt_ids", "token_ids", "text", "finish_reason", "error"}
    stats = result["stats"]
    assert set(stats) >= FIELDS
    assert output["prompt_ids"][0] == 1  # the BOS that was added
    assert len(output["token_ids"]) == stats["new_tokens"]
    assert stats["tokens_per_step"] == pytest.approx((stats["new_tokens"] - 1) / stats["target_forwards"])
    assert stats["time_to_first_token_seconds"] >= stats["prefill_seconds"] * 0.99
    small = (SHIPPED_SMALL / "model.safetensors").stat().st_size
    target = (SHIPPED_TARGET / "model.safetensors").stat().st_size
    assert stats["weight_bytes"] == pytest.approx(small + target, rel=0.01)


def test_stdout_is_the_text_and_nothing_else(capsys):
    text = run_json(capsys, *SHORT)["outputs"][0]["text"]
    status, out, err = run(capsys, *SHORT)
    assert status == 0 and out.rstrip("\n") == text.rstrip("\n")
    assert "tokens per step" in err and "drafted tokens accepted" in err


def test_explain_colours_tokens_by_who_proposed_them(capsys):
    result = run_json(capsys, *SHORT, "--draft_checkpoint_path", "self")
    _, out, err = run(capsys, *SHORT, "--draft_checkpoint_path", "self", "--explain")
    green = re.findall(r"\033\[32m(.*?)\033\[0m", out, flags=re.DOTALL)
    plain = re.sub(r"\033\[\d+m", "", out)
    assert plain.rstrip("\n") == result["outputs"][0]["text"].rstrip("\n")
    assert 0.5 < len("".join(green)) / len(plain) < 1
    assert "proposed by the drafter" in err


def test_explain_shows_the_tree_of_every_step(capsys):
    """Every drafted token once; the green ones and the target's own are the text."""
    flags = [*SHORT, "--method", "tree", "--tree_size", "8", "--prompt", "def f(x):\n"]
    result = run_json(capsys, *flags)
    _, out, err = run(capsys, *flags, "--explain")
    assert re.sub(r"\033\[\d+m", "", out).rstrip("\n") == result["outputs"][0]["text"].rstrip("\n")
    steps = re.split(r"\n\[1\] ", err.split("\n\ntree,")[0])[1:]
    assert len(steps) == result["stats"]["target_forwards"]
    text = ""
    for step in steps:
        head, *tree = step.rstrip("\n").split("\n")
        drafted, accepted = map(int, re.match(r"(\d+) drafted, (\d+) accepted", head).groups())
        plain = re.sub(r"\033\[\d+m", "", " ".join(tree))
        words = re.findall(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", plain)
        green = re.findall(r"\033\[32m(.*?)\033\[0m", "\n".join(tree))
        assert drafted == 7 and len(words) == 8 and len(green) == accepted  # words: with the root
        own = head.partition(", then ")[2]
        text += "".join(map(ast.literal_eval, [*green, *([own] if own else [])]))
    assert result["outputs"][0]["text"].endswith(text)


def test_stop_strings_and_stop_tokens(capsys):
    free = run_json(capsys, *EAGER, "--max_new_tokens", "40")["outputs"][0]
    stop = free["text"][20:23]
    cut = run_json(capsys, *EAGER, "--max_new_tokens", "40", "--stop", "no such text", "--stop", stop)[
        "outputs"
    ][0]
    assert cut["finish_reason"] == "stop" and free["finish_reason"] == "length"
    assert cut["text"] == free["text"][: free["text"].index(stop)]
    assert cut["token_ids"] == free["token_ids"][: len(cut["token_ids"])]
    assert len(cut["token_ids"]) < len(free["token_ids"])


def test_end_of_text_ends_unless_ignored(capsys, tiny):
    flags = ["--checkpoint_path", tiny, *EAGER, "--temperature", "3", "--max_new_tokens", "40"]
    for seed in range(40):
        [output] = run_json(capsys, *flags, "--prompt_ids", "1,2", "--seed", str(seed))["outputs"]
        if output["finish_reason"] == "stop":
            break
    assert output["token_ids"].count(60) == 1 and output["token_ids"][-1] == 60
    [longer] = run_json(capsys, *flags, "--prompt_ids", "1,2", "--seed", str(seed), "--ignore_eos")["outputs"]
    assert longer["token_ids"][: len(output["token_ids"])] == output["token_ids"]
    assert len(longer["token_ids"]) == 40


def test_without_a_tokenizer_ids_work_and_text_is_null(capsys, tiny):
    [output] = run_json(capsys, "--checkpoint_path", tiny, *SHORT, "--prompt_ids", "1,2,3")["outputs"]
    assert output["prompt_ids"] == [1, 2, 3] and output["text"] is None and output["token_ids"]


def test_num_samples_use_seed_plus_i(capsys):
    flags = [*SHORT, "--temperature", "1"]
    samples = run_json(capsys, *flags, "--num_samples", "3", "--batch_size", "2")["outputs"]
    assert len({tuple(s["token_ids"]) for s in samples}) == 3
    assert samples[2] == run_json(capsys, *flags, "--seed", "1236")["outputs"][0]


def test_a_prompt_is_used_as_it_is(capsys, tmp_path, monkeypatch):
    text = "  def f(x):\r\n\treturn x  \n\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    direct = run_json(capsys, *SHORT, "--prompt", text)["outputs"]
    assert run_json(capsys, *SHORT, "--prompt", f"@{tmp_path}/prompt.txt")["outputs"] == direct
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run_json(capsys, *SHORT, "--prompt", "-")["outputs"] == direct
    [ids] = {tuple(output["prompt_ids"]) for output in direct}
    assert run_json(capsys, *SHORT, "--prompt_ids", ",".join(map(str, ids)))["outputs"] == direct


def test_a_prompt_that_begins_with_at(capsys, tmp_path, monkeypatch):
    """@ names a file; @@ stands for a text that begins with one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataclass").write_text("in the file")
    (tmp_path / "@dataclass").write_text("in the other file")
    tokenizer = generate.load_tokenizer(SHIPPED_TARGET)
    texts = {"@dataclass": "in the file", "@@dataclass": "@dataclass", "@./@dataclass": "in the other file"}
    texts |= {"@@@": "@@", "@@": "@", "a@@b": "a@@b"}
    for prompt, text in texts.items():
        [output] = run_json(capsys, *EAGER, "--max_new_tokens", "1", "--prompt", prompt)["outputs"]
        assert output["prompt_ids"] == tokenizer.encode(text)
    assert_refused(capsys, [*EAGER, "--prompt", "@missing"], "--prompt: @missing cannot be read")


def test_an_empty_prompt_begins_at_the_beginning(capsys):
    [output] = run_json(capsys, *SHORT, "--prompt", "")["outputs"]
    assert output["prompt_ids"] == [1] and output["text"]


def test_a_profile_is_written(capsys, tmp_path):
    run_json(capsys, *SHORT, "--profile", str(tmp_path / "trace.json"))
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


# ---- many prompts --------------------------------------------------------------------------------


def write_prompts(path, *lines) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_prompts_of_a_file_in_input_order(capsys, tmp_path):
    file = write_prompts(tmp_path / "p.jsonl", {"prompt": "def a(\n"}, {"prompt_ids": [1, 50, 60]},
                         {"turns": ["class B:\n", "unused"]}, "", {"question": "import "})  # fmt: skip
    outputs = run_json(capsys, *SHORT, "--prompts", file, "--batch_size", "3")["outputs"]
    assert len(outputs) == 4
    alone = [
        ["--prompt", "def a(\n"],
        ["--prompt_ids", "1,50,60"],
        ["--prompt", "class B:\n"],
        ["--prompt", "import "],
    ]
    for i, flags in enumerate(alone):
        assert run_json(capsys, *SHORT, *flags, "--seed", str(1234 + i))["outputs"][0] == outputs[i]
    _, out, _ = run(capsys, *SHORT, "--prompts", file, "--batch_size", "3")
    assert out == "".join(
        f"--- {i + 1}\n{o['text']}" + "\n" * (not o["text"].endswith("\n")) for i, o in enumerate(outputs)
    )


def test_a_bad_line_fails_alone(capsys, tmp_path):
    file = write_prompts(tmp_path / "p.jsonl", {"prompt": "def a(\n"}, "{not json", {"text": "x"}, [1],
                         {"prompt_ids": [1, 999999]}, {"prompt_ids": ["1"]}, {"prompt_ids": []},
                         {"prompt": "x " * 3000}, {"prompt": "class B:\n"})  # fmt: skip
    status, out, err = run(capsys, *SHORT, "--json", "--prompts", file, "--batch_size", "2")
    outputs = json.loads(out)["outputs"]
    assert status == 2
    assert [o["finish_reason"] for o in outputs] == ["length"] + ["error"] * 7 + ["length"]
    for number, word in [
        (2, "JSON"),
        (3, "prompt_ids"),
        (4, "object"),
        (5, "999999"),
        (6, "integers"),
        (7, "empty"),
        (8, "tokens"),
    ]:
        assert f"line {number}:" in outputs[number - 1]["error"] and word in outputs[number - 1]["error"]
        assert outputs[number - 1]["error"] in err
    good = run_json(capsys, *SHORT, "--prompt", "def a(\n")["outputs"][0]
    assert outputs[0] == good


def test_a_bad_line_leaves_the_noise_of_the_others_alone(capsys, tmp_path):
    good = {"prompt": "def a(\n"}
    file = write_prompts(tmp_path / "p.jsonl", good, "{bad", {"prompt": "class B:\n"})
    flags = [*SHORT, "--temperature", "1"]
    status, out, _ = run(capsys, *flags, "--json", "--prompts", file, "--seed", "10")
    alone = run_json(capsys, *flags, "--prompt", "class B:\n", "--seed", "12")["outputs"][0]
    assert status == 2 and json.loads(out)["outputs"][2] == alone


def test_lines_that_are_nearly_right(capsys, tmp_path):
    wrong = [
        {"turns": 5},
        {"turns": {"a": 1}},
        {"turns": "hello"},
        {"turns": []},
        {"prompt": 5, "question": "x"},
    ]
    lone_surrogate, separators = r'{"prompt": "\ud800"}', '{"prompt": "one\u2028line\u0085"}'
    file = write_prompts(tmp_path / "p.jsonl", *wrong, lone_surrogate, separators)
    status, out, _ = run(capsys, *SHORT, "--json", "--prompts", file)
    outputs = json.loads(out)["outputs"]
    assert status == 2 and [o["finish_reason"] == "error" for o in outputs] == [True] * 6 + [False]
    assert all(f"line {i + 1}:" in o["error"] for i, o in enumerate(outputs[:-1]))


# ---- conversations -------------------------------------------------------------------------------


def talk(capsys, monkeypatch, text: str | bytes, *flags: str) -> tuple[int, str, str]:
    typed = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    return run(capsys, "--interactive", *flags)


def test_interactive_continues_the_text(capsys, monkeypatch):
    status, out, err = talk(capsys, monkeypatch, "def f(x):\n", *SHORT)
    first = run_json(capsys, *SHORT, "--prompt", "def f(x):\n")["outputs"][0]
    assert status == 0 and out.rstrip("\n") == first["text"].rstrip("\n") and "> " in err
    status, out, _ = talk(capsys, monkeypatch, "def f(x):\nclass A:\n", *SHORT)
    tokenizer = generate.load_tokenizer(SHIPPED_TARGET)
    history = first["prompt_ids"] + first["token_ids"] + tokenizer.encode_ordinary("class A:\n")
    second = run_json(capsys, *SHORT, "--prompt_ids", ",".join(map(str, history)))["outputs"][0]
    assert out.rstrip("\n").endswith(second["text"].rstrip("\n"))


def test_a_bad_byte_is_not_asked_and_ends_nothing(capsys, monkeypatch):
    _, expected, _ = talk(capsys, monkeypatch, "def f(x):\nclass A:\n", *SHORT)
    status, out, err = talk(capsys, monkeypatch, b"def f(x):\ndef g(\xff\nclass A:\n", *SHORT)
    assert (status, out) == (0, expected)
    assert err.count("error: this line is not UTF-8") == err.count("error") == 1


@pytest.mark.parametrize("chat", [False, True])
def test_ctrl_c_before_an_answer_takes_the_question_back(capsys, monkeypatch, chat_model, chat):
    flags = [*SHORT, "--stop", "\n\n", *(["--checkpoint_path", chat_model] if chat else [])]
    _, expected, _ = talk(capsys, monkeypatch, "def f(x):\nclass A:\n", *flags)
    encode = "encode_chat" if chat else "encode_text"
    original, calls = getattr(generate.Tokenizer, encode), []

    def interrupted(self, *arguments, **named):
        calls.append(arguments)
        if len(calls) == 2:  # the second question
            raise KeyboardInterrupt
        return original(self, *arguments, **named)

    monkeypatch.setattr(generate.Tokenizer, encode, interrupted)
    status, out, _ = talk(capsys, monkeypatch, "def f(x):\ndef g(\nclass A:\n", *flags)
    assert status == 0 and len(calls) == 3
    assert out.replace("\n", "") == expected.replace("\n", "")


def test_a_line_that_the_tokenizer_does_not_take_fails_alone(capsys, monkeypatch, tmp_path):
    class PanicException(BaseException):
        """What a library in Rust raises: no Exception."""

    def encode_ordinary(self, text, first=True, encode=SentencePieceTokenizer.encode_ordinary):
        if "panic" in text:
            raise PanicException("index out of bounds\nbacktrace")
        return encode(self, text, first)

    monkeypatch.setattr(SentencePieceTokenizer, "encode_ordinary", encode_ordinary)
    lines = [{"prompt": "def a(\n"}, {"prompt": " " * 1_000_000}, {"prompt": "panic"},
             {"prompt_ids": [10**30]}, {"prompt": {"text": "x"}}, {"prompt": None}, r'{"prompt": "a\udfff"}',
             "[" * 100_000, "NaN", {"prompt": "".join(map(chr, range(0xFDD0, 0xFDE0)))},
             {"prompt": "class B:\n"}]  # fmt: skip
    file = write_prompts(tmp_path / "p.jsonl", *lines)
    status, out, err = run(capsys, *SHORT, "--json", "--prompts", file)
    outputs = json.loads(out)["outputs"]
    words = ["tokens", "index out of bounds)", str(10**30), "not a text", "not a text", "half a character"]
    words += ["not JSON", "not a JSON object", "noncharacters"]
    reasons = ["length", *["error"] * len(words), "length"]
    assert status == 2 and [output["finish_reason"] for output in outputs] == reasons
    for number, (word, output) in enumerate(zip(words, outputs[1:-1], strict=True), start=2):
        assert f"line {number}:" in output["error"] and word in output["error"]
        assert output["error"].count("\n") == 0 and output["error"] in err


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The shipped target with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(SHIPPED_TARGET, directory)
    template = (
        "{{ bos_token }}{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}# assistant: "
    )
    (directory / "chat_template.jinja").write_text(template)
    return str(directory)


def test_chat_applies_the_template(capsys, chat_model):
    flags = [*SHORT, "--checkpoint_path", chat_model]
    result = run_json(capsys, *flags, "--chat", "--system", "Be kind.", "--prompt", "Hi")["outputs"]
    plain = run_json(capsys, *flags, "--prompt", "# system\nBe kind.\n# user\nHi\n# assistant: ")["outputs"]
    assert result == plain


def test_variables_of_the_template_from_the_command_line(capsys, chat_model, tmp_path):
    shutil.copytree(chat_model, tmp_path / "model")
    template = (
        "{{ 'quiet' if enable_thinking is false }}{{ messages[0].content }}{{ '+' if add_generation_prompt }}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    flags = [*SHORT, "--max_new_tokens", "1", "--checkpoint_path", str(tmp_path / "model")]
    file = write_prompts(tmp_path / "p.jsonl", {"prompt": "def"})
    ids = load_tokenizer(chat_model).encode_text
    for variables, expected in (
        ('{"enable_thinking": false}', "quietdef+"),
        ('{"enable_thinking": true, "no_such_variable": [1]}', "def+"),
        ('{"add_generation_prompt": false, "self": 1}', "def"),
    ):
        asked = ["--chat", "--template_kwargs", variables]
        for prompt in (["--prompt", "def"], ["--prompts", file]):
            assert run_json(capsys, *flags, *asked, *prompt)["outputs"][0]["prompt_ids"] == ids(expected)
    chat = ["--checkpoint_path", chat_model, "--chat", "--template_kwargs"]
    for variables, words in (
        ("{enable_thinking: false}", ["--template_kwargs", "not JSON"]),
        ("[" * 100_000, ["--template_kwargs", "not JSON"]),
        ("[1]", ["--template_kwargs", "not a JSON object"]),
        ('{"messages": []}', ["--template_kwargs", "messages"]),
    ):
        assert_refused(capsys, [*chat, variables], *words)
    assert_refused(capsys, ["--template_kwargs", "{}"], "--template_kwargs", "--chat")


def test_interactive_keeps_the_history_of_a_chat(capsys, monkeypatch, chat_model):
    flags = [*SHORT, "--checkpoint_path", chat_model, "--stop", "\n"]
    _, out, _ = talk(capsys, monkeypatch, "Hi\nAgain\n", *flags)
    first, second = out.split("\n")[:2]
    asked = f"# user\nHi\n# assistant\n{first}\n# user\nAgain\n# assistant: "
    assert run_json(capsys, *flags, "--prompt", asked)["outputs"][0]["text"] == second


def test_a_conversation_that_outgrows_the_context_says_so(capsys, monkeypatch):
    status, out, err = talk(capsys, monkeypatch, "x " * 3000 + "\ndef f(x):\n", *SHORT)
    assert status == 0 and "starts anew" in err
    assert out.strip() == run_json(capsys, *SHORT, "--prompt", "def f(x):\n")["outputs"][0]["text"].strip()


# ---- wrong flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--no_such_flag"], ["--no_such_flag"]),
        (["--method", "magic"], ["--method", "magic", "sequential"]),
        (["--precision", "w3a16"], ["--precision", "bf16"]),
        (["--max_new_tokens", "0"], ["--max_new_tokens", "at least 1"]),
        (["--max_new_tokens", "many"], ["--max_new_tokens", "many"]),
        (["--speculate_k", "0"], ["--speculate_k"]),
        (["--batch_size", "-1"], ["--batch_size"]),
        (["--num_samples", "0"], ["--num_samples"]),
        (["--temperature", "-0.5"], ["temperature", "-0.5"]),
        (["--temperature", "nan"], ["temperature"]),
        (["--top_p", "0"], ["top_p"]),
        (["--top_k", "-3"], ["top_k"]),
        (["--draft_confidence", "2"], ["--draft_confidence", "probability"]),
        (["--stop", ""], ["--stop"]),
        (["--device", "tpu9"], ["--device", "tpu9"]),
        (["--prompt", "a", "--prompt_ids", "1"], ["--prompt_ids", "--prompt"]),
        (["--prompt_ids", "1,x"], ["--prompt_ids", "1,x"]),
        (["--prompt_ids", "1,4096"], ["4096", "0 to 4095"]),
        (["--prompt", "@/no/such/file"], ["--prompt", "/no/such/file"]),
        (["--prompt", "x " * 3000], ["tokens", "1023"]),
        (["--prompts", "/no/such/file"], ["--prompts", "/no/such/file"]),
        (["--chat", "--interactive"], ["--interactive", "--chat"]),
        (["--chat"], ["--chat", "chat template"]),
        (["--system", "x"], ["--system", "--chat"]),
        (["--interactive", "--json"], ["--interactive", "--json"]),
        (["--interactive", "--prompt", "x"], ["--interactive", "--prompt"]),
        (["--chat", "--prompt_ids", "1,2"], ["--chat", "--prompt_ids"]),
        (["--batch_size", "10000000000"], ["--batch_size", "allocated"]),
        (["--device", "meta"], ["--device", "meta"]),
        (["--profile", "/tmp"], ["--profile", "/tmp"]),
        (["--method", "lookup", "--draft_precision", "fp32"], ["--draft_precision", "lookup"]),
        (["--method", "autoregressive", "--draft_confidence", "0.5"], ["--draft_confidence"]),
        (["--prompt", "x\ud800"], ["--prompt", "half a character"]),
        (["--profile", "/no/such/dir/trace.json"], ["--profile"]),
        (["--checkpoint_path", "/no/such/dir"], ["--checkpoint_path", "/no/such/dir"]),
        (["--checkpoint_path", str(SHIPPED_TARGET), "--method", "sequential"], ["--draft_checkpoint_path"]),
        (["--method", "lookup", "--draft_checkpoint_path", "self"], ["--draft_checkpoint_path", "lookup"]),
        (["--draft_checkpoint_path", "/no/such/dir"], ["--draft_checkpoint_path", "/no/such/dir"]),
        (["--method", "tree", "--tree_size", "1"], ["--tree_size", "2 to"]),
        (["--method", "tree", "--tree_size", "100000"], ["--tree_size", "2 to"]),
        (["--method", "tree", "--tree_size", "all"], ["--tree_size", "all", "auto"]),
        (["--method", "tree", "--tree_depth", "0"], ["--tree_depth", "at least 1"]),
        (["--method", "tree", "--tree_depth", "99999999999999999999"], ["--tree_depth", "1 to"]),
        (["--method", "autoregressive", "--tree_size", "0"], ["--tree_size", "autoregressive"]),
        (["--method", "tree", "--tree_topk", "5000"], ["--tree_topk", "4096"]),
        (["--method", "sequential", "--tree_size", "8"], ["--tree_size", "tree"]),
        (["--eagle_checkpoint_path", "/no/such/dir"], ["--eagle_checkpoint_path", "/no/such/dir"]),
        (["--eagle_checkpoint_path", str(SHIPPED_SMALL)], ["config.json", "no EAGLE"]),
        (["--eagle_checkpoint_path", str(SMALL_HEAD)], ["python-1m-eagle", "hidden size of 128, not 256"]),
        (["--method", "lookup", "--eagle_checkpoint_path", "x"], ["--eagle_checkpoint_path", "tree"]),
        (["--checkpoint_path", str(SHIPPED_TARGET), "--method", "tree"], ["--eagle_checkpoint_path"]),
        (["--method", "tree", "--draft_precision", "fp32"], ["--draft_precision", "fp32"]),
        (["--draft_checkpoint_path", "self", "--draft_precision", "fp32"], ["--draft_precision"]),
        (["--method", "tree", "--min_draft_length", "3"], ["--min_draft_length", "hierarchical"]),
        (["--method", "hierarchical", "--min_draft_length", "0"], ["--min_draft_length", "at least 1"]),
        (["--method", "hierarchical", "--min_draft_length", "9" * 20], ["--min_draft_length", "1 to"]),
        (["--method", "hierarchical", "--draft_checkpoint_path", "self"], ["self", "bf16", "w4a16"]),
        (["--precision", "bf16", "--lm_head_bits", "4"], ["--lm_head_bits 4", "python-7m has 16 bits"]),
        (["--precision", "w8a8", "--lm_head_bits", "4"], ["--lm_head_bits 4", "4-bit weights"]),
        (["--precision", "w4a8", "--lm_head_bits", "2"], ["--lm_head_bits", "2"]),
        (["--method", "qspec"], ["qspec", "bf16", "--precision w4a16"]),
        (["--method", "qspec", "--precision", "w4a4", "--draft_precision", "w4a4"], ["no lower", "w4a16"]),
        (["--method", "qspec", "--precision", "w4a16", "--draft_precision", "w8a8"], ["--draft_precision"]),
        (["--method", "qspec", "--precision", "w4a8", "--draft_precision", "w4a16"], ["w4a8 draft in w4a4"]),
        (["--method", "qspec", "--precision", "w4a16", "--draft_checkpoint_path", "self"], ["sequential"]),
        (["--precision", "w4a16", *MIDDLE[:1], "self", "--draft_precision", "w4a8"], ["--method qspec"]),
        ([*SELF, "--precision", "w4a8", "--draft_precision", "w8a8"], ["--draft_precision", "w4a8", "w8a8"]),
        (["--checkpoint_path", str(SHIPPED_TARGET), "--method", "hierarchical"], ["--draft_checkpoint_path"]),
        (["--checkpoint_path", str(SHIPPED_TARGET), *SELF, "--precision", "w4a8"], ["--eagle_checkpoint"]),
        ([*MIDDLE, "--eagle_checkpoint_path", str(generate.SHIPPED_HEAD)], ["of 256, not 128"]),
        (["--method", "hierarchical", "--draft_confidence", "0.5"], ["--draft_confidence", "sequential"]),
    ],
)  # fmt: skip
def test_wrong_flags_get_one_line(capsys, flags, words):
    assert_refused(capsys, [*EAGER, *flags], *words)


def test_a_profile_does_not_take_the_place_of_a_device(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(capsys, [*SHORT, "--profile", str(tmp_path / "pipe")], "--profile", "pipe")
    assert not (tmp_path / "pipe").is_file()


def test_a_drafter_of_another_vocabulary(capsys, tiny, tmp_path):
    assert_refused(capsys, [*EAGER, "--draft_checkpoint_path", tiny], "another vocabulary", "61", "4096")
    other = tmp_path / "other"
    shutil.copytree(SHIPPED_SMALL, other)
    sentencepiece = (other / "tokenizer.model").read_bytes()
    (other / "tokenizer.model").write_bytes(sentencepiece.replace(b"return", b"nruter"))
    assert_refused(capsys, [*EAGER, "--draft_checkpoint_path", str(other)], "another vocabulary", "nruter")


@pytest.mark.parametrize(
    "fault, words",
    [
        ("unknown", ["unexpected tensor model.extra.weight"]),
        ("misshapen", ["model.norm.weight", "(47,)", "(48,)"]),
        ("missing", ["lack model.norm.weight"]),
        ("truncated", ["model.safetensors", "cut off"]),
        ("outside", ["index.json", "../stolen.safetensors", "outside"]),
        ("config", ["config.json", "num_hidden_layers"]),
    ],
)
def test_broken_checkpoints_get_one_line(capsys, tmp_path, fault, words):
    directory = save_checkpoint(random_model(), tmp_path / "model")
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    changes = {
        "unknown": {"model.extra.weight": torch.ones(3)},
        "misshapen": {"model.norm.weight": torch.ones(47)},
    }
    save_file(tensors | changes.get(fault, {}), weights)
    if fault == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, weights)
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    if fault == "outside":
        index = {"weight_map": dict.fromkeys(tensors, "../stolen.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()  # a whole model counts more than an index
    if fault == "config":
        (directory / "config.json").write_text('{"model_type": "llama"}')
        words = ["config.json", "missing"]
    flags = [*EAGER, "--prompt_ids", "1,2"]
    assert_refused(capsys, [*flags, "--checkpoint_path", str(directory)], *words)
    assert_refused(capsys, [*flags, "--draft_checkpoint_path", str(directory)], *words)


def test_a_text_prompt_without_a_tokenizer(capsys, tiny):
    assert_refused(
        capsys, [*EAGER, "--checkpoint_path", tiny, "--prompt", "x"], "no tokenizer", "--prompt_ids"
    )


def test_a_prompt_that_fills_the_context(capsys, tiny):
    ids = ",".join(["1"] * 64)
    assert_refused(capsys, [*EAGER, "--checkpoint_path", tiny, "--prompt_ids", ids], "64 tokens", "63")
    output = run_json(capsys, *EAGER, "--checkpoint_path", tiny, "--prompt_ids", ids[:-2])["outputs"][0]
    assert len(output["token_ids"]) == 1 and output["finish_reason"] in ("length", "stop")


def test_a_sliding_window_that_would_matter(capsys, tmp_path):
    save_checkpoint(random_model(), tmp_path, model_type="mistral", sliding_window=30)
    flags = [*EAGER, "--checkpoint_path", str(tmp_path), "--prompt_ids", "1,2,3"]
    assert_refused(capsys, [*flags, "--max_new_tokens", "28"], "sliding window", "31")
    assert run_json(capsys, *flags, "--max_new_tokens", "27")["outputs"][0]["token_ids"]


# ---- as a process --------------------------------------------------------------------------------


def start(*flags: str, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "generate.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_leaves_early_is_no_error():
    process = start(*EAGER, "--max_new_tokens", "400", "--ignore_eos")
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) in (0, 141)


def test_ctrl_c_ends_it_without_a_traceback():
    # a shell ignores Ctrl-C in what it runs in the background, and children would inherit that
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    flags = (*EAGER, "--max_new_tokens", "900", "--ignore_eos", "--method", "autoregressive")
    process = start(*flags, preexec_fn=heed)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err and "interrupted" in err
    assert process.returncode == 130


def test_it_runs_from_another_directory_and_prints_soon(tmp_path):
    """`--compile none` needs no compiler: its first token comes within seconds of the command."""
    begin = time.time()
    process = start(*SHORT, cwd=tmp_path, env=os.environ | {"CXX": "/no/such/compiler"})
    assert process.stdout.read(1)
    assert time.time() - begin < 30  # 5 s on an idle machine; tests may run on a busy one
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Warning" not in err


def test_without_a_compiler_it_says_so_and_runs(tmp_path):
    process = start(
        "--max_new_tokens", "5", env=os.environ | {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out and "without our kernels" in err


def test_only_the_declared_dependencies_are_imported():
    """The hub client and tiktoken load when needed, test packages never, and what needs Triton on GPUs only.

    Triton itself PyTorch imports, where it is installed.
    """
    lazy = ("transformers", "huggingface_hub", "tiktoken", "matplotlib")
    lazy += () if torch.cuda.is_available() else ("kernels_cuda",)
    code = f"""
import sys, generate
generate.load_tokenizer(generate.SHIPPED_TARGET)
generate.load_model(generate.SHIPPED_TARGET)
print([name for name in {lazy} if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
