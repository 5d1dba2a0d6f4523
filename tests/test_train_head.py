"""Training EAGLE-3 heads: what the target writes, what the head learns from it, and what is written."""

import gzip
import json
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHIPPED_TARGET, random_model, save_checkpoint, texts

from block_heads import load_block_head
from check_head import check_head
from checkpoints import load_model
from cli import read_turns
from costs import Stats
from dflash import Block, BlockDrafter
from eagle import TreeDrafter
from generate import load_head
from model import BadInput
from process import INTERRUPTED
from sampling import Sampling
from text import load_tokenizer

sys.path.insert(0, str(ROOT / "scripts"))
import answers
import block_training
import train_head
import training
from answers import AnswerFile, Text

LAYERS = 7  # the fewest with the taps that all published heads have
TAPS = (2, 3, 4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny target without a tokenizer."""
    return save_checkpoint(random_model(num_layers=LAYERS), tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    lines = [{"prompt_ids": [(7 * i + j) % 61 for j in range(3 + i % 4)]} for i in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def answered(directory, data, tmp_path_factory):
    """The file of its answers, which most tests learn from."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    assert run(directory, "--data", data, "--answers", path, "--steps", 0, "--temperature", 0) == 0
    return path


def run(directory, *flags) -> int:
    settings = ["--max_new_tokens", 24, "--ttt_steps", 3, "--draft_vocab_size", 40, "--sequences", 4]
    settings = [] if "--help" in flags else [*settings, "--batch_size", 4]
    return train_head.main([str(each) for each in ("--checkpoint_path", directory, *settings, *flags)])


def refusal(capsys, *flags) -> str:
    """The one line with which flags are refused."""
    capsys.readouterr()
    assert run(*flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what a draft sees ---------------------------------------------------------------------------


def masked_attention(past, layer, q, k, v, mask_of):
    """Attention over the keys of all steps so far, with the mask that `mask_of` makes of them."""
    past.append((k, v))
    keys, values = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*past))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask_of(past), enable_gqa=True)
    return out.transpose(1, 2)


def diagonal_mask(past):
    """The keys of step 0 up to a row, and its own of all other steps, bool [rows, keys of all steps]."""
    row = torch.arange(past[-1][0].shape[1])[:, None]
    columns = [torch.arange(k.shape[1]) for k, _ in past]
    return torch.cat([row >= columns[0], *(row == column for column in columns[1:])], dim=1)


def causal_mask(past):
    """All that came before, in order."""
    n, m = past[-1][0].shape[1], sum(k.shape[1] for k, _ in past)
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


@pytest.mark.parametrize("block", [512, 4])
def test_a_row_sees_the_true_rows_before_it_and_its_own_chain(monkeypatch, block):
    """The same results and the same gradients as with an explicit mask."""
    monkeypatch.setattr(training, "BLOCK", block)
    torch.manual_seed(0)
    steps = [[torch.randn(2, 11 - i, heads, 8, requires_grad=True) for heads in (4, 2, 2)] for i in range(4)]
    inputs, weight = [t for step in steps for t in step], torch.randn(8)
    both = []
    for attend in (training.unrolled_attention, partial(masked_attention, mask_of=diagonal_mask)):
        past = []
        outs = [attend(past, 0, *step) for step in steps]
        gradients = torch.autograd.grad(sum((out.sin() * weight).sum() for out in outs), inputs)
        both.append([*outs, *gradients])
    for ours, naive in zip(*both):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_unrolling_is_drafting():
    """Every row of every step is the end of a chain that a head drafts without any tricks."""
    target = random_model(num_layers=LAYERS)
    head = trained_looking_head(target)
    tokens = torch.randint(61, (1, 9))
    _, states = target(tokens, torch.arange(9)[None], training.causal_attention, TAPS)
    for i, guess in enumerate(training.unroll(head, tokens, states, 3)):
        for p in range(8 - i):
            past = []

            def attend(*qkv, past=past):
                return masked_attention(past, *qkv, causal_mask)

            # The true rows, then a row for each token that was drafted.
            positions = torch.arange(p + 1)[None]
            features = head(tokens[:, 1 : p + 2], head.fuse(states[:, : p + 1]), positions, attend)
            for j in range(p + 1, p + 1 + i):
                features = head(tokens[:, j + 1 : j + 2], features[:, -1:], torch.tensor([[j]]), attend)
            torch.testing.assert_close(guess[:, p], features[:, -1], rtol=1e-4, atol=1e-5)


def trained_looking_head(target, drafted=40, seed=3):
    """A head whose every weight matters."""
    ids = torch.randperm(61, generator=torch.Generator().manual_seed(seed))[:drafted].sort().values
    head = train_head.fresh_head(target, TAPS, ids, seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.requires_grad and parameter.ndim == 2 and not name.startswith("lm_head"):
                parameter.normal_(std=0.1)
    return head


# ---- what is learnt ------------------------------------------------------------------------------


def test_the_loss_is_the_naive_one(monkeypatch):
    monkeypatch.setattr(train_head, "LABEL_ROWS", 3)
    target = random_model(num_layers=LAYERS)
    head = trained_looking_head(target)
    both = [Text("a", 0, torch.randint(61, (10,)).tolist(), [[2, 5], [7, 10]]),
            Text("b", 0, torch.randint(61, (7,)).tolist(), [[3, 7]])]  # fmt: skip
    tokens, wrote = train_head.collate(both, 64, torch.device("cpu"))
    lesson = train_head.teach(target, TAPS, head.draft_ids, tokens, wrote)
    ours = train_head.lesson_loss(head, lesson, 3)
    with torch.no_grad():
        logits = target.lm_head(target.recompute(tokens))  # [2, 10, V]
    ids, total, weights = head.draft_ids.tolist(), 0.0, 0.0
    for i, guess in enumerate(training.unroll(head, tokens, lesson.states, 3)):
        losses = []
        for b, text in enumerate(both):
            for p in range(guess.shape[1]):
                said = p + 2 + i  # the token that the row guesses
                if not any(begin <= said < end for begin, end in text.answers):
                    continue
                truth = logits[b, said - 1]
                q = head.logits(guess[b : b + 1, p : p + 1])[0, 0].log_softmax(-1)
                known = int(truth.argmax()) in ids
                losses.append(-(truth[ids].softmax(-1) * q).sum() if known else torch.zeros(()))
        assert losses and any(loss == 0 for loss in losses)
        total, weights = total + 0.8**i * torch.stack(losses).mean(), weights + 0.8**i
    torch.testing.assert_close(ours, total / weights, rtol=1e-5, atol=1e-6)
    trained = [p for p in head.parameters() if p.requires_grad]
    for mine, naive in zip(*(torch.autograd.grad(loss, trained) for loss in (ours, total / weights))):
        torch.testing.assert_close(mine, naive, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_drafts_are_right_as_far_as_they_are_the_text():
    target = random_model(num_layers=LAYERS)
    head = trained_looking_head(target)
    tokens, wrote = torch.randint(61, (1, 12)), (torch.arange(12) >= 3)[None]
    _, states = target(tokens, torch.arange(12)[None], training.causal_attention, TAPS)
    [guess] = training.unroll(head, tokens, states, 1)
    tokens[0, 7] = head.draft_ids[head.logits(guess[:, 5:6]).argmax()]  # one draft is right
    lesson = train_head.teach(target, TAPS, head.draft_ids, tokens, wrote)
    drafts, right = train_head.count_right(head, lesson, 2)
    guesses = training.unroll(head, tokens, lesson.states, 2)
    first, second = (head.draft_ids[head.logits(guess)[0].argmax(-1)] for guess in guesses)
    begins = range(1, 9)  # rows p for which the target wrote both tokens that are drafted, p + 2 and p + 3
    good = [bool(first[p] == tokens[0, p + 2]) for p in begins]
    both = [one and bool(second[p] == tokens[0, p + 3]) for one, p in zip(good, begins)]
    assert drafts == len(begins) and right == [sum(good), sum(both)] and sum(good) >= 1


def test_the_vocabulary_is_what_the_answers_say():
    said = [Text("a", 0, [1, 1, 1, 9, 9, 30], [[3, 6]]), Text("b", 0, [2, 50, 9], [[1, 3]])]
    counts = train_head.answer_counts(said, 61)
    assert counts.sum() == 5 and counts[9] == 3 and counts[1] == 0
    assert train_head.choose_vocabulary(counts, 2).tolist() == [9, 30]
    assert train_head.choose_vocabulary(counts, 5).tolist() == [0, 1, 9, 30, 50]


@pytest.mark.parametrize("precision", ["bf16", "w4a16", "w8a8"])
def test_rows_of_any_lm_head(tmp_path, precision):
    model = random_model(hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=80)
    loaded = load_model(save_checkpoint(model, tmp_path, torch.bfloat16), precision)
    rows = train_head.lm_head_rows(loaded, torch.tensor([3, 5, 79]))
    error = (rows - model.lm_head.weight[[3, 5, 79]]).norm() / model.lm_head.weight[[3, 5, 79]].norm()
    assert rows.shape == (3, 64) and error < 0.03


USUAL = [(32, (2, 16, 29)), (7, TAPS), (6, (1, 3, 5)), (4, (1, 2, 3)), (3, (0, 1, 2))]


@pytest.mark.parametrize(("layers", "taps"), USUAL)
def test_taps(layers, taps):
    assert train_head.three_taps(layers) == taps


def test_held_out_prompts_are_held_out_with_all_samples():
    many = [Text(f"{i:03}", sample, [1, 2, 3], [[1, 3]]) for i in range(40) for sample in range(3)]
    learnt, held = train_head.split_texts(many, 0.1)
    assert len(held) == 12 and not {t.prompt for t in learnt} & {t.prompt for t in held}
    with pytest.raises(BadInput, match="single prompt"):
        train_head.split_texts(many[:3], 0.1)


def test_every_epoch_has_every_text_once():
    many = [Text(str(i), 0, [1] * (i % 13 + 3), [[1, 3]]) for i in range(50)]
    batches = train_head.Batches(many, 4, seed=1)
    epochs = [[t.prompt for i in range(13) for t in batches[13 * epoch + i]] for epoch in (0, 1)]
    assert all(sorted(epoch) == sorted(t.prompt for t in many) for epoch in epochs) and epochs[0] != epochs[1]
    assert batches[2] == train_head.Batches(many, 4, seed=1)[2]


# ---- from the command line -----------------------------------------------------------------------


def test_overfitting_and_the_head_that_is_written(directory, answered, tmp_path, capsys):
    """A few texts are learnt by heart, and a tree with the head says what the target says without."""
    few = tmp_path / "few.jsonl"
    [first, *_] = lines(answered)
    few.write_text("".join(json.dumps(first | {"prompt": name}) + "\n" for name in ("a", "b")))
    flags = ["--answers", few, "--output", tmp_path / "head", "--steps", 150, "--every", 50]
    assert run(directory, *flags) == 0
    best = json.loads(capsys.readouterr().out)
    assert best["acceptance"][0] > 0.9 and best["accepted_length"] == pytest.approx(sum(best["acceptance"]))
    assert lines(tmp_path / "head" / "training.jsonl")[-1]["step"] == 150
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 40
    target = load_model(directory)
    drafter = TreeDrafter(load_head(tmp_path / "head", target), 8, 3, 3)
    prompts = [first["token_ids"][: first["answers"][0][0]], [5, 6, 7]]
    assert texts(target, prompts, drafter) == texts(target, prompts)
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]
    # A file that says something else about the same tensors is found out.
    wrong = config | {"norm_before_residual": False}
    (tmp_path / "head" / "config.json").write_text(json.dumps(wrong))
    load = partial(load_head, tmp_path / "head", target)
    readings = check_head(load(), load, target, prompts[:1], 24, [], compile=False)
    found = {reading.name: reading.tokens_per_step for reading in readings}
    assert found["added to after the norm"] == max(found.values()) > 2 * found["as configured"]


def test_a_quantized_target_teaches(tmp_path, data):
    """And its head changes no text, in whatever precision both are loaded."""
    model = random_model(num_layers=LAYERS, hidden_size=64, intermediate_size=96, head_dim=16)
    source = save_checkpoint(model, tmp_path / "target", torch.bfloat16)
    flags = ["--precision", "w4a8", "--data", data, "--output", tmp_path / "head", "--steps", 4, "--every", 2]
    assert run(source, *flags) == 0
    prompts = [[5, 6, 7], [9], [3, 4, 5, 6], [8, 1]]
    for precision in ("bf16", "w4a16", "w4a8"):
        target = load_model(source, precision)
        for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
            expected = texts(target, prompts, sampling=sampling)
            for batch_size in (1, 4):
                drafter = TreeDrafter(load_head(tmp_path / "head", target), 8, 3, 3)
                assert texts(target, prompts, drafter, sampling, batch_size=batch_size) == expected


def test_what_a_target_cannot_be_asked_is_left_out(directory, tmp_path, capsys):
    """A prompt that is surely too long for it, and half a character; with what is around them all is well."""
    target = SimpleNamespace(tokenizer=load_tokenizer(SHIPPED_TARGET, 1024))
    args = SimpleNamespace(max_length=500, system=None, template_kwargs=None)
    said = [["def f(x):"], ["x = 1\n" * 90_000], ["\ud800"], ["one", "\ud800"]]
    prompts = [answers.Prompt.of(turns, f"file line {i}") for i, turns in enumerate(said)]
    assert [answers.Exchange(p, 0, 1, target, args).ask() for p in prompts] == [True, False, False, True]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "left out: file line 1: the text is at least" in err[0] and "half a" in err[1]


def test_flags_for_chats_need_a_template(capsys, directory, data, tmp_path):
    flags = ["--data", data, "--answers", tmp_path / "new" / "a.jsonl", "--steps", 0]
    assert "has no chat template" in refusal(capsys, directory, *flags, "--system", "You are a tree.")
    assert run(directory, *flags) == 0
    with pytest.raises(BadInput, match="lm_head_bits None, not 8"):
        AnswerFile(tmp_path / "new" / "a.jsonl", 61).check_origin({"lm_head_bits": 8})
    (tmp_path / "new" / "a.jsonl.json").write_text("[]")
    assert "is no JSON object" in refusal(capsys, directory, *flags)


def test_answers_that_are_too_short_for_a_draft(capsys, directory, answered, tmp_path):
    flags = ["--answers", answered, "--output", tmp_path / "head", "--ttt_steps", 50]
    assert "--ttt_steps 50: no answer is long enough" in refusal(capsys, directory, *flags)


def test_the_best_head_is_kept(monkeypatch, directory, answered, tmp_path):
    shares, written = iter([1, 3, 2]), []

    def write_head(folder, *_):
        folder.mkdir(exist_ok=True)
        written.append(folder)

    monkeypatch.setattr(train_head, "count_right", lambda *_: (10, [next(shares), 0, 0]))
    monkeypatch.setattr(train_head, "write_head", write_head)
    monkeypatch.setattr(train_head, "JUDGED", 1)
    flags = ["--answers", answered, "--output", tmp_path / "head", "--steps", 6, "--every", 2]
    assert run(directory, *flags) == 0
    assert len(written) == 2 and len(lines(tmp_path / "head" / "training.jsonl")) == 3


def test_an_interrupted_training_ends_as_any_other(monkeypatch, directory, answered, tmp_path, capsys):
    flags = ["--answers", answered, "--steps", 6, "--every", 2]
    assert run(directory, *flags, "--output", tmp_path / "whole") == 0

    def interrupted(self, step, usual=train_head.Training.loss):
        if step == 5:
            raise KeyboardInterrupt
        return usual(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_head.Training, "loss", interrupted)
        assert run(directory, *flags, "--output", tmp_path / "cut") == INTERRUPTED
    assert run(directory, *flags, "--output", tmp_path / "cut") == 0
    assert "going on at step 4" in capsys.readouterr().err
    whole, cut = (torch.load(tmp_path / f"{name}.state.pt") for name in ("whole", "cut"))
    assert whole["notes"] == cut["notes"]
    assert all(torch.equal(tensor, cut["model"][name]) for name, tensor in whole["model"].items())
    assert run(directory, *flags, "--output", tmp_path / "cut", "--seed", 7) == 2
    assert "seed 1234, not 7" in capsys.readouterr().err.splitlines()[-1]
    assert run(directory, *flags, "--output", tmp_path / "cut", "--steps", 8) == 0  # more than before
    assert "going on at step 6" in capsys.readouterr().err
    assert [note["step"] for note in lines(tmp_path / "cut" / "training.jsonl")] == [2, 4, 6, 8]


# ---- answers -------------------------------------------------------------------------------------


def test_answers_are_the_targets_own(directory, data, answered):
    found = {tuple(t["token_ids"][: t["answers"][0][0]]): t["token_ids"] for t in lines(answered)}
    prompts = [line["prompt_ids"] for line in lines(data)]
    expected = texts(load_model(directory), prompts, max_new_tokens=24)
    assert [found[tuple(p)] for p in prompts] == [p + said for p, said in zip(prompts, expected)]


def test_answers_that_were_interrupted_go_on(monkeypatch, directory, data, tmp_path):
    """With a prompt, too, that never has room for an answer."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(data.read_text() + json.dumps({"prompt_ids": [1] * 100}) + "\n")
    flags = ["--data", prompts, "--steps", 0, "--tokens", 500, "--max_length", 100]
    assert run(directory, *flags, "--answers", tmp_path / "whole.jsonl") == 0
    whole = lines(tmp_path / "whole.jsonl")
    assert all(len(text["token_ids"]) <= 100 for text in whole)  # not the one that is too long
    assert sum(end - begin for text in whole for begin, end in text["answers"]) >= 500
    assert {text["sample"] for text in whole} == {0, 1, 2}
    assert len({tuple(text["token_ids"]) for text in whole}) > 8  # other seeds, other answers

    def interrupted(self, some, usual=AnswerFile.add):
        if len(self.texts) == 5:
            raise KeyboardInterrupt
        usual(self, some)

    cut = tmp_path / "cut.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", interrupted)
        assert run(directory, *flags, "--answers", cut) == INTERRUPTED
    with cut.open("a") as file:
        file.write('{"prompt": "half a li')  # a run that was killed
    assert len(AnswerFile(cut, 61).texts) == 5
    assert run(directory, *flags, "--answers", cut) == 0
    same = {(text["prompt"], text["sample"]): text for text in whole}
    shared = [text for text in lines(cut) if (text["prompt"], text["sample"]) in same]
    assert all(text == same[text["prompt"], text["sample"]] for text in shared) and len(shared) > 16
    assert run(directory, *flags, "--answers", cut) == 0  # all is there
    assert len({(text["prompt"], text["sample"]) for text in lines(cut)}) == len(lines(cut))


def test_turns_are_answered_on_the_models_own_history(tmp_path):
    file, kept = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"turns": ["def f(", "class A:"]}\n{"question": "x ="}\n')
    flags = ["--data", file, "--answers", kept, "--steps", 0, "--temperature", 0]
    assert run(SHIPPED_TARGET, *flags) == 0
    [text] = [text for text in lines(kept) if len(text["answers"]) == 2]
    target, ids = load_model(SHIPPED_TARGET), text["token_ids"]
    for begin, end in text["answers"]:
        assert texts(target, [ids[:begin]], max_new_tokens=24)[0] == ids[begin:end]
    assert text["answers"][1][1] == len(ids) and text["answers"][0][1] < text["answers"][1][0]


class Talk(answers.Exchange):
    """An exchange without a tokenizer, in which the test says both parts."""

    def __init__(self):
        self.prompt, self.sample, self.texts = answers.Prompt.of([1], ""), 0, []
        self.conversation = SimpleNamespace(answer=lambda output: None)

    def say(self, prompt, said):
        self.output = SimpleNamespace(prompt_ids=prompt, token_ids=said)
        self.finish_turn()


def test_history_in_other_tokens_is_a_text_of_its_own():
    talk = Talk()
    talk.say([1, 2], [3])
    talk.say([1, 2, 3, 4], [5])
    talk.say([1, 2, 33, 4, 5, 6], [7])
    first, second = talk.texts
    assert (first.token_ids, first.answers) == ([1, 2, 3, 4, 5], [[2, 3], [4, 5]])
    assert (second.token_ids, second.answers) == ([1, 2, 33, 4, 5, 6, 7], [[6, 7]])


def test_compressed_data_and_doubles(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n\n{"question": "b"}\n{"turns": ["a"]}\n'))
    assert [prompt.said for prompt in answers.read_data([str(path)], 10**6)] == [["a"], ["b"]]


def test_prompts_of_a_benchmark_are_left_out(directory, tmp_path, capsys):
    """Whatever follows their first turn; answers of an earlier run, too, which do not count."""
    lines_of = [{"turns": ["a", "b"]}, {"prompt": "a"}, {"question": "c"}, {"prompt_ids": [1, 2]}]
    openings = [answers.Prompt.of(read_turns(json.dumps(line)), "").opening for line in lines_of]
    assert openings[0] == openings[1] and len(set(openings)) == 3
    every, some, kept = tmp_path / "every.jsonl", tmp_path / "some.jsonl", tmp_path / "answers.jsonl"
    every.write_text("".join(json.dumps({"prompt_ids": [i, i + 1]}) + "\n" for i in range(1, 7)))
    some.write_text('{"prompt_ids": [3, 4]}\n\n{"prompt_ids": [50, 51]}\n')
    flags = ["--data", every, "--answers", kept, "--steps", 0, "--max_new_tokens", 3]
    assert run(directory, *flags, "--exclude", some) == 0
    assert sorted(line["token_ids"][0] for line in lines(kept)) == [1, 2, 4, 5, 6]
    assert run(directory, *flags) == 0 and len(lines(kept)) == 6
    capsys.readouterr()
    assert run(directory, *flags, "--exclude", some) == 0
    tokens = sum(end - begin for line in lines(kept)[:5] for begin, end in line["answers"])
    said = capsys.readouterr().err
    assert f"5 texts, {tokens} tokens" in said and "1 of 6 prompts are left out" in said
    assert run(directory, *flags, "--exclude", some, "--tokens", tokens + 1) == 0  # asks once more
    assert len(lines(kept)) > 6
    assert "leaves none of" in refusal(capsys, directory, *flags, "--exclude", every)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", -1], "--steps is -1"),
        (["--sequences", 0], "--sequences is 0"),
        (["--draft_vocab_size", 62], "--draft_vocab_size is 62; the target has 61"),
        (["--max_length", 5], "--max_length is 5"),
        (["--max_length", 1000], "--max_length is 1000"),
        (["--held_out", 1], "--held_out is 1.0"),
        (["--taps", "4,2"], "ascending"),
        (["--taps", "1,2,9"], "0 to 6"),
        (["--temperature", -1], "--temperature is -1"),
        (["--device", "abacus"], "--device"),
        (["--speed", 3], "--speed"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--exclude", "nowhere.jsonl"], "--exclude: nowhere.jsonl cannot be read"),
        (["--answers", "/dev/null/at.jsonl"], "/dev/null/at.jsonl cannot be written"),
    ],
)
def test_nonsense_is_refused_in_one_line(capsys, directory, data, tmp_path, flags, message):
    usual = ["--data", data, "--output", tmp_path / "head"]
    assert message in refusal(capsys, directory, *usual, *flags)


def test_answers_of_another_origin_are_refused(capsys, directory, data, tmp_path):
    """They would be learnt from as the target's own."""
    usual = ["--data", data, "--answers", tmp_path / "a.jsonl", "--steps", 0, "--max_new_tokens", 3]
    assert run(directory, *usual) == 0 and run(directory, *usual) == 0
    assert "temperature 0.7, not 0.1" in refusal(capsys, directory, *usual, "--temperature", 0.1)
    assert "max_new_tokens 3, not 4" in refusal(capsys, directory, *usual, "--max_new_tokens", 4)


TEXT = {"prompt": "a", "sample": 0, "token_ids": [1, 2], "answers": [[1, 2]]}
BAD_FILES = [
    ("--data", "", "has no lines"),
    ("--data", '{"prompt_ids": [1]}\n{nonsense', "line 2: not JSON"),
    ("--data", '{"prompt": "text"}', "no tokenizer"),
    ("--data", '{"prompt_ids": [1]}\n{"prompt_ids": [1, 99]}', "line 2: has the token id 99"),
    ("--answers", "", "has no texts"),
    ("--answers", '{"prompt": "a"}', "line 1: not a text"),
    ("--answers", json.dumps(TEXT | {"token_ids": [1, 99]}), "line 1: has the token id 99"),
    ("--answers", json.dumps(TEXT | {"answers": [[1, 3]]}), "line 1: answers [[1, 3]] are no ranges"),
    ("--answers", json.dumps(TEXT | {"token_ids": [1] * 9, "answers": [[1, 9]]}), "single prompt"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_refused_in_one_line(capsys, directory, tmp_path, name, content, message):
    file = tmp_path / "file.jsonl"
    file.write_text(content + "\n")
    assert message in refusal(capsys, directory, name, file, "--output", tmp_path / "head")


def test_what_is_missing_is_named(capsys, directory, data, tmp_path):
    assert "--output is missing" in refusal(capsys, directory, "--data", data)
    assert "nothing to learn from" in refusal(capsys, directory, "--output", tmp_path / "head")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(capsys, directory, "--data", data, "--output", tmp_path / "file")
    flags = ["--data", data, "--output", tmp_path / "head"]
    assert "not a directory" in refusal(capsys, tmp_path / "nowhere", *flags)


# ---- block heads ---------------------------------------------------------------------------------


def block_head(target, **changes):
    """One whose every weight matters."""
    block = Block((1, 3, 5), 4, 60, **changes)
    rows = train_head.lm_head_rows(target, torch.arange(61))
    head = block_training.build_block_head(target, block, 2, rows, 3)
    with torch.no_grad():
        for parameter in training.trained_parameters(head).values():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
    return head


@pytest.mark.parametrize(
    "changes", [{}, {"shifted": True}, {"causal": (True, False), "windows": (3, None)}], ids=str
)
@torch.no_grad()
def test_blocks_are_guessed_side_by_side_as_one_by_one(changes):
    """No block sees another, or anything of the text from its root on."""
    target = random_model(num_layers=LAYERS)
    head, tokens = block_head(target, **changes), torch.randint(60, (2, 12))
    wrote = (torch.arange(12) >= 3).expand(2, -1)
    lesson = block_training.teach_blocks(target, head.block.taps, tokens, wrote)
    anchors = torch.tensor([[3, 10, 5], [0, 7, 4]])
    together = block_training.guess_blocks(head, lesson, anchors)
    for i, guess in enumerate(together):
        b, anchor = i // 3, int(anchors.flatten()[i])
        cut = block_training.BlockLesson(tokens[b : b + 1, : anchor + 1], lesson.states[b : b + 1, : anchor + 1], wrote)  # fmt: skip  # noqa: E501
        alone = block_training.guess_blocks(head, cut, torch.tensor([[anchor]]))
        torch.testing.assert_close(guess, alone[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_loss_of_blocks_is_the_naive_one():
    target = random_model(num_layers=LAYERS)
    head, tokens = block_head(target), torch.randint(60, (1, 14))
    wrote = torch.zeros(1, 14, dtype=torch.bool)
    wrote[:, 3:8] = wrote[:, 11:13] = True  # the guesses of a block end where an answer ends
    lesson = block_training.teach_blocks(target, head.block.taps, tokens, wrote)
    anchors, there = block_training.draw_anchors(wrote, 9, seed=1)
    roots = anchors[there].tolist()
    assert sorted(roots) == [3, 4, 5, 6, 11]  # all tokens of answers that others follow
    assert len(set(block_training.draw_anchors(wrote, 2, 1)[0][0].tolist() + roots)) == 5
    features, total, weights, right = block_training.guess_blocks(head, lesson, anchors), 0.0, 0.0, []
    for guess, anchor in zip(features, anchors[0].tolist()):
        kept = []
        for i in range(3) if anchor in roots else ():
            if not all(place < 14 and wrote[0, place] for place in range(anchor, anchor + i + 2)):
                break
            logits = head.logits(guess[None, i : i + 1])[0, 0]
            weight = math.exp(-i / 4.0)
            total = total - weight * logits.log_softmax(-1)[tokens[0, anchor + 1 + i]]
            weights += weight
            kept.append(bool(logits.argmax() == tokens[0, anchor + 1 + i]))
        right += [kept] if len(kept) == 3 else []
    loss = block_training.block_loss(head, lesson, anchors, there, 4.0)
    torch.testing.assert_close(loss, total / weights, rtol=1e-5, atol=1e-6)
    whole, counts = block_training.count_right_blocks(head, lesson, anchors, there)
    assert whole == len(right) == 2 and counts == [sum(all(k[: i + 1]) for k in right) for i in range(3)]


def test_a_block_head_of_the_shipped_target(tmp_path, capsys):
    """The loss falls, and what is written loads, drafts, and changes no text."""
    few, ids = tmp_path / "few.jsonl", list(range(40, 60))
    target = load_model(SHIPPED_TARGET)
    [said] = texts(target, [ids], max_new_tokens=40)
    text = {"sample": 0, "token_ids": ids + said, "answers": [[20, 60]]}
    few.write_text("".join(json.dumps(text | {"prompt": name}) + "\n" for name in ("a", "b")))
    flags = ["--answers", few, "--output", tmp_path / "head", "--steps", 60, "--every", 20, "--layers", 1]
    command = [
        "--checkpoint_path",
        SHIPPED_TARGET,
        "--kind",
        "dflash",
        "--block_size",
        6,
        "--anchors",
        12,
        *flags,
    ]
    assert train_head.main([str(each) for each in command]) == 0
    best, notes = json.loads(capsys.readouterr().out), lines(tmp_path / "head" / "training.jsonl")
    assert notes[-1]["loss"] < 0.5 * notes[0]["loss"] and best["accepted_length"] > 2
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["block_size"] == 6 and config["dflash_config"]["target_layer_ids"] == [1, 2, 3, 4, 5]
    head, stats = load_block_head(tmp_path / "head", target), Stats()
    drafter = BlockDrafter(head, 8)
    assert texts(target, [ids], drafter, stats=stats) == [said]
    assert stats.tokens_per_step > 2


BLOCKS = ["--kind", "dflash"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", 2], "--layers is for --kind dflash"),
        ([*BLOCKS, "--draft_vocab_size", 40], "--draft_vocab_size: a block head drafts all"),
        ([*BLOCKS, "--block_size", 1], "--block_size is 1"),
        ([*BLOCKS, "--mask_token_id", 61], "--mask_token_id is 61"),
    ],
)
def test_nonsense_about_blocks_is_refused(capsys, directory, data, tmp_path, flags, message):
    capsys.readouterr()
    usual = ["--checkpoint_path", directory, "--data", data, "--output", tmp_path / "head"]
    assert train_head.main([str(each) for each in (*usual, *flags)]) == 2
    assert message in capsys.readouterr().err
