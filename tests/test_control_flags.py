"""The flags of controls, log-probabilities and structures: what they do, and one line where they cannot."""

import json

import pytest
from conftest import SHIPPED_TARGET, hide_module, random_model, save_checkpoint
from test_generate import SELF, SHORT, assert_refused, run, run_json, talk, write_prompts

from text import load_tokenizer

PROMPT = ["--prompt", "def add(a, b):\n"]
PLAIN = [*SHORT, "--method", "autoregressive", *PROMPT]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED_TARGET)


@pytest.fixture
def free(capsys) -> dict:
    """The output without controls."""
    return run_json(capsys, *PLAIN)["outputs"][0]


def output(capsys, *flags: str) -> dict:
    """With these flags, from plain decoding; a drafter says the same."""
    result = run_json(capsys, *PLAIN, *flags)["outputs"]
    assert run_json(capsys, *SHORT, *PROMPT, "--method", "lookup", *flags)["outputs"] == result
    return result[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--repetition_penalty", "1.5"],
        ["--presence_penalty", "2"],
        ["--frequency_penalty", "1.5"],
        ["--frequency_penalty", "-1"],
        ["--temperature", "1", "--min_p", "0.3"],
    ],
)
def test_a_flag_changes_the_text(capsys, free, flags):
    said = output(capsys, *flags)
    assert said["token_ids"] != free["token_ids"] and said["finish_reason"] in ("stop", "length")
    assert set(said) == {"prompt_ids", "token_ids", "text", "finish_reason", "error"}


def test_logit_bias(capsys, free):
    first, second = list(dict.fromkeys(free["token_ids"]))[:2]
    said = output(capsys, "--logit_bias", f"{first}:-inf,{second}:-3.5")
    assert first not in said["token_ids"] and said["token_ids"] != free["token_ids"]
    assert output(capsys, "--logit_bias", "77:1e4")["token_ids"] == [77] * 24


def test_bad_words(capsys, free, tokenizer):
    """A word is kept from being written in its usual tokens, with and without a blank before it."""
    word = next(word for word in free["text"].split() if word.isalpha())
    said = output(capsys, "--bad_words", word, "--bad_words", "return")
    assert word not in said["text"].split() and "return" not in said["text"].split()
    assert said["token_ids"] != free["token_ids"]


def test_min_tokens_of_stop_tokens_and_stop_strings(capsys, free):
    stop = free["text"].strip()[:1]
    early = output(capsys, "--stop", stop)
    late = output(capsys, "--stop", stop, "--min_tokens", "12")
    assert early["finish_reason"] == "stop" and len(early["token_ids"]) < 12 <= len(late["token_ids"])
    assert stop not in early["text"] and late["token_ids"][:11] == free["token_ids"][:11]
    end = ["--logit_bias", "2:30", "--min_tokens", "7"]
    assert len(output(capsys, *end)["token_ids"]) == 8
    ignored = output(capsys, *end, "--ignore_eos")  # then there is no token that ends a text
    assert ignored["token_ids"] == [2] * 24


def test_log_probabilities(capsys, free):
    said = output(capsys, "--logprobs", "3")
    assert said["token_ids"] == free["token_ids"] and len(said["logprobs"]) == 24
    for token, each in zip(said["token_ids"], said["logprobs"]):
        text = json.dumps(each)
        assert str(token) in text and "NaN" not in text and "Infinity" not in text
    assert "logprobs" not in free
    assert len(json.dumps(output(capsys, "--logprobs", "0"))) < len(json.dumps(said))
    sampled = output(capsys, "--logprobs", "2", "--temperature", "1", "--presence_penalty", "1")
    assert len(sampled["logprobs"]) == len(sampled["token_ids"])


def test_log_probabilities_in_a_batch_are_cut_with_their_texts(capsys, tmp_path):
    lines = [{"prompt": text} for text in ("def f", "import os", "x = 1")]
    flags = ["--prompts", write_prompts(tmp_path / "p.jsonl", *lines), "--logprobs", "1", "--stop", "\n"]
    alone = run_json(capsys, *SHORT, *flags, "--method", "autoregressive")["outputs"]
    assert [len(o["logprobs"]) for o in alone] == [len(o["token_ids"]) for o in alone]
    for method in ("lookup", "sequential"):
        assert run_json(capsys, *SHORT, *flags, "--method", method, "--batch_size", "2")["outputs"] == alone


# ---- structures ----------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 1}}}
SCHEMA |= {"required": ["n"], "additionalProperties": False}


@pytest.fixture
def structures():
    pytest.importorskip("llguidance")


@pytest.mark.usefixtures("structures")
def test_structures(capsys, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "g.lark").write_text('start: "pass" | "return " /[a-z]/')
    long = ["--max_new_tokens", "80"]
    for given in (str(tmp_path / "schema.json"), json.dumps(SCHEMA)):
        said = output(capsys, "--json_schema", given, *long)
        assert said["finish_reason"] == "stop" and 1 <= json.loads(said["text"])["n"] <= 9
    assert output(capsys, "--regex", "(maybe|never)", *long)["text"] in ("maybe", "never")
    lark = output(capsys, "--grammar", str(tmp_path / "g.lark"), "--temperature", "1", *long)
    assert lark["text"] == "pass" or lark["text"].startswith("return ")


@pytest.mark.usefixtures("structures")
def test_all_flags_at_once(capsys, tmp_path):
    lines = [{"prompt": text} for text in ("def f", "import os", "x = 1")]
    flags = ["--prompts", write_prompts(tmp_path / "p.jsonl", *lines), "--regex", "[a-z ]{5,60}"]
    flags += ["--temperature", "0.9", "--top_k", "50", "--top_p", "0.95", "--min_p", "0.01", "--seed", "5"]
    flags += ["--repetition_penalty", "1.1", "--presence_penalty", "0.3", "--frequency_penalty", "0.2"]
    flags += ["--logit_bias", "300:1.5,500:-inf", "--min_tokens", "5", "--bad_words", "the"]
    flags += ["--logprobs", "2"]
    alone = run_json(capsys, *SHORT, *flags, "--method", "autoregressive")["outputs"]
    assert all(
        len(o["token_ids"]) >= 5 and set(o["text"]) <= set("abcdefghijklmnopqrstuvwxyz ") for o in alone
    )
    ours = run_json(capsys, *SHORT, *flags, "--method", "tree", "--batch_size", "3")
    assert ours["outputs"] == alone
    flags += ["--precision", "w4a16"]  # another precision of the target, so another text
    alone = run_json(capsys, *SHORT, *flags, "--method", "autoregressive")["outputs"]
    for more in (["--method", "qspec"], [*SELF, "--tree_size", "8"]):
        assert run_json(capsys, *SHORT, *flags, *more, "--batch_size", "2")["outputs"] == alone


# ---- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--min_p", "2"], ["--min_p", "from 0"]),
        (["--min_p", "nan"], ["--min_p"]),
        (["--repetition_penalty", "0"], ["--repetition_penalty", "positive"]),
        (["--presence_penalty", "inf"], ["--presence_penalty", "1e6"]),
        (["--frequency_penalty", "x"], ["--frequency_penalty", "x"]),
        (["--logit_bias", "15"], ["--logit_bias", "'15' is not ID:VALUE"]),
        (["--logit_bias", "a:1"], ["--logit_bias", "ID:VALUE"]),
        (["--logit_bias", ""], ["--logit_bias", "ID:VALUE"]),
        (["--logit_bias", "1:2:3"], ["--logit_bias", "ID:VALUE"]),
        (["--logit_bias", "4096:1"], ["--logit_bias", "4096", "0 to 4095"]),
        (["--logit_bias", "-1:1"], ["--logit_bias"]),
        (["--logit_bias", "3:inf"], ["--logit_bias", "inf"]),
        (["--logit_bias", "3:nan"], ["--logit_bias", "nan"]),
        (["--min_tokens", "-1"], ["--min_tokens"]),
        (["--min_tokens", "25"], ["--min_tokens", "25", "--max_new_tokens 24"]),
        (["--bad_words", ""], ["--bad_words", "empty"]),
        (sum((["--bad_words", f"word{i}"] for i in range(70)), []), ["--bad_words", "128"]),
        (["--logprobs", "3"], ["--logprobs", "--json"]),
        (["--json", "--logprobs", "-1"], ["--logprobs is -1"]),
        (["--json", "--logprobs", "5000"], ["--logprobs", "5000", "4096"]),
        (["--json", "--logprobs", "many"], ["--logprobs", "many"]),
        (["--regex", "a", "--grammar", "b"], ["--regex", "--grammar"]),
        (["--regex", "a", "--json_schema", "{}"], ["--regex", "--json_schema"]),
    ],
)
def test_wrong_flags_get_one_line(capsys, flags, words):
    assert_refused(capsys, [*SHORT, *flags], *words)


@pytest.mark.usefixtures("structures")
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--json_schema", "/no/such/file"], ["--json_schema", "/no/such/file"]),
        (["--json_schema", "/"], ["--json_schema"]),
        (["--json_schema", "{"], ["--json_schema"]),
        (["--json_schema", '{"type": "nope"}'], ["--json_schema", "nope"]),
        (["--json_schema", '{"type": "array", "uniqueItems": true}'], ["--json_schema", "uniqueItems"]),
        (["--regex", "a(b"], ["--regex", "unclosed"]),
        (["--grammar", "/no/such/file"], ["--grammar", "/no/such/file"]),
        (["--regex", "a", "--ignore_eos"], ["error: --ignore_eos"]),
    ],
)
def test_wrong_structures_get_one_line(capsys, flags, words):
    assert_refused(capsys, [*SHORT, *flags], *words)


def test_a_missing_package_is_named(capsys, monkeypatch):
    hide_module(monkeypatch, "llguidance")
    assert_refused(capsys, [*SHORT, "--regex", "a"], "pip install llguidance")
    assert run(capsys, *SHORT, "--max_new_tokens", "2")[0] == 0


def test_a_model_without_a_tokenizer(capsys, tmp_path):
    path = save_checkpoint(random_model(), tmp_path / "tiny", eos_token_id=[60, 10**6])
    flags = [*SHORT, "--checkpoint_path", str(path), "--prompt_ids", "1,2"]
    assert_refused(capsys, [*flags, "--bad_words", "x"], "--bad_words", "tokenizer")
    said = run_json(capsys, *flags, "--min_tokens", "9", "--logit_bias", "60:99", "--logprobs", "1")[
        "outputs"
    ][0]
    assert len(said["token_ids"]) == 10 and said["token_ids"][-1] == 60


def test_a_structure_without_a_tokenizer(capsys, tmp_path, structures):
    path = save_checkpoint(random_model(), tmp_path / "tiny", eos_token_id=60)
    flags = [*SHORT, "--checkpoint_path", str(path), "--prompt_ids", "1,2"]
    assert_refused(capsys, [*flags, "--regex", "x"], "--regex", "tokenizer")


@pytest.mark.usefixtures("structures")
def test_a_conversation_of_structured_answers(capsys, monkeypatch):
    flags = ["--regex", "(yes|no)[.]", "--method", "lookup"]
    status, out, err = talk(capsys, monkeypatch, "Is it?\nReally?\n", *SHORT, *flags)
    assert status == 0 and out.count(".") == 2
