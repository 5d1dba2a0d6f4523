"""The study: what it reads, what it draws, and the files that the figures are made of. Nothing is timed."""

import contextlib
import dataclasses
import gc
import gzip
import json
import os
import shlex
import sys
import types
import weakref

import pytest
import torch
from conftest import ROOT, guessing_head, noisy_copy, random_model, random_prompts

import bench
from benchmarks import (
    acceptance,
    common,
    cost,
    exact,
    linears,
    llama_cpp,
    methods,
    peers,
    quality,
    sampling,
    shapes,
    structure,
    study,
    synthetic,
    timing,
)
from checkpoints import SHIPPED_TARGET
from costs import Stats
from drafts import Drafter
from gpt_spec import Decoder, SequentialDrafter
from model import BadInput, ModelConfig
from packing import PRECISIONS
from sampling import Sampling
from text import load_tokenizer

sys.path.insert(0, str(ROOT / "scripts"))

import draw  # noqa: E402
import tables  # noqa: E402

TINY = ModelConfig(256, 128, 256, 2, 2, 1, 64, 1024)


@pytest.mark.parametrize(
    "name, tau, nodes, depth, topk",
    [("eagle3-8b", 3.53, 8, 7, 1), ("eagle3-8b", 5.37, 60, 8, 10), ("eagle3-redhat-8b", 2.6049, 4, 3, 1)]
    + [("eagle2-8b", 4.05, 60, 6, 10), ("eagle2-70b", 3.67, 60, 6, 10), ("eagle3-70b", 2.771, 4, 3, 1)]
    + [
        ("eagle3-70b", 5.63, 60, 8, 10),
        ("sequential", 1 + 0.72 + 0.72**2, 3, 2, 1),
        ("qspec", 1.96, 2, 1, 1),
    ],
)
def test_presets_give_the_tokens_per_step_they_claim(name, tau, nodes, depth, topk):
    """Chains and the one tree of which something is published."""
    preset = acceptance.PRESETS[name]
    assert preset.tokens_per_step(nodes, depth, topk) == pytest.approx(tau, abs=1e-6)
    assert all(0 < p < 1 for p in preset.probabilities) and preset.source


def test_a_tree_never_loses_by_being_larger():
    """And its chain is the worst tree of any size; of a node at most one child is right."""
    preset = acceptance.PRESETS["eagle3-8b"]
    taus = [preset.tokens_per_step(n, 6, 4) for n in (2, 4, 8, 16, 32, 60)]
    assert taus == sorted(taus) and taus[-1] > taus[2] + 1
    assert all(preset.tokens_per_step(n, 6, 4) >= preset.tokens_per_step(n, 6) for n in range(2, 9))
    assert sum(preset.of_child(0, rank) for rank in range(50)) == pytest.approx(1)
    # By hand: 0.5 and 0.25 below the root, and two of each below these; two best nodes of a depth go on.
    nodes = [(0.5, 1), (0.25, 1), (0.25, 2), (0.125, 2), (0.125, 2), (0.0625, 2)]
    assert acceptance.Acceptance((0.5,), "", 0.5).best_nodes(2, 2) == nodes


def test_acceptance_by_name_and_by_list():
    assert acceptance.read_acceptance("qspec", "--acceptance") is acceptance.PRESETS["qspec"]
    assert acceptance.read_acceptance("0.8,0.7", "--acceptance").probabilities == (0.8, 0.7)
    for wrong in ("0.8,x", "1.5", "", "eagle9"):
        with pytest.raises(BadInput, match="--acceptance"):
            acceptance.read_acceptance(wrong, "--acceptance")


def conditional(stats: Stats, depth: int) -> list[float]:
    """Of the steps that accepted i tokens or more, the share that accepted one more; i = 0, 1, ..."""
    shares = [1.0, *stats.acceptance_by_position[:depth]]
    return [b / a for a, b in zip(shares, shares[1:])]


def odds(*probabilities: float, breadth: float = 0.0) -> acceptance.Acceptance:
    return acceptance.Acceptance(probabilities, "test", breadth)


def decode_synthetic(drafter, accepted: acceptance.Acceptance, target) -> Stats:
    stats, options = Stats(), {"max_length": 512, "batch_size": 8, "compile": False}
    decoder = synthetic.SyntheticDecoder(accepted, 2**40, target, drafter, **options)
    common.decode_all(decoder, random_prompts(list(range(5, 21))), 150, stats)
    return stats


def test_chains_are_accepted_at_the_rates_given():
    target = random_model()
    stats = decode_synthetic(SequentialDrafter(noisy_copy(target), 3), odds(0.9, 0.7, 0.4), target)
    assert conditional(stats, 3) == pytest.approx([0.9, 0.7, 0.4], abs=0.06)


@pytest.mark.parametrize("nodes", [8, 16])
def test_trees_are_accepted_at_the_rates_given(nodes):
    target = random_model()
    of_it = odds(0.9, 0.7, 0.8)  # the last one holds for the fourth, too
    tree = synthetic.SyntheticTree(of_it, guessing_head(target), nodes, 4, 4)
    stats = decode_synthetic(tree, of_it, target)
    assert conditional(stats, 4) == pytest.approx([0.9, 0.7, 0.8, 0.8], abs=0.07)


@pytest.mark.parametrize("nodes", [6, 20])
def test_trees_gain_by_breadth_as_much_as_is_computed(nodes):
    """Tokens per step of decoded texts, what the trees themselves expected, and the formula."""
    target, of_it = random_model(), odds(0.6, 0.5, breadth=0.5)
    tree = synthetic.SyntheticTree(of_it, guessing_head(target), nodes, 4, 4)
    stats = decode_synthetic(tree, of_it, target)
    computed = of_it.tokens_per_step(nodes, 4, 4)
    assert 1 + stats.expected_accepted_tokens / stats.target_forwards == pytest.approx(computed, abs=0.03)
    assert stats.tokens_per_step == pytest.approx(computed, rel=0.05)


def test_hierarchies_are_accepted_at_the_rates_given_on_both_levels():
    target, middle = random_model(), random_model(seed=1, num_layers=1)
    inside = odds(0.8, 0.6)
    tree = synthetic.SyntheticTree(inside, guessing_head(middle), 8, 3, 3)
    stats = decode_synthetic(synthetic.SyntheticHierarchy(inside, middle, tree, 4), odds(0.9, 0.7), target)
    assert conditional(stats, 4) == pytest.approx([0.9, 0.7, 0.7, 0.7], abs=0.07)
    assert conditional(stats.inside, 3) == pytest.approx([0.8, 0.6, 0.6], abs=0.07)


@pytest.mark.parametrize("p, expected", [(1.0, 3.0), (0.0, 0.0)])
def test_certain_acceptance_is_certain(p, expected):
    target = random_model()
    stats = decode_synthetic(SequentialDrafter(noisy_copy(target), 3), odds(p), target)
    accepted = [i for i, steps in enumerate(stats.accepted_histogram) if steps]
    assert accepted[-1] == expected and stats.tokens_per_step == pytest.approx(1 + expected, abs=0.15)


@pytest.mark.parametrize(
    "text, number",
    [("... is 1,234.", "1234"), ("3 + 4 = 7", "7"), ("7.50 dollars", "7.5"), ("10.00", "10"), ("none", "")]
    + [("-5", "-5"), ("9-5", "5"), ("$1,000,000!", "1000000"), ("1,2", "2"), ("#### 72\n", "72")],
)
def test_last_number(text, number):
    assert quality.last_number(text) == number


def test_right_solutions_are_as_a_model_would_write_them():
    tokenizer = load_tokenizer(SHIPPED_TARGET)
    word = common.Prompt(tokenizer.encode("x"), answer="16-3=<<16-3=13>>13 eggs\nSo 13.\n#### 13")
    assert tokenizer.decode(quality.solution_tokens(word, tokenizer, True)) == "16-3=13 eggs\nSo 13."
    code = common.Prompt(tokenizer.encode(ADD), text=ADD, solution="    return a + b")
    assert tokenizer.decode(quality.solution_tokens(code, tokenizer, False)) == "    return a + b"
    block = tokenizer.decode(quality.solution_tokens(code, tokenizer, True))
    assert block == f"```python\n{ADD}    return a + b\n```"


def test_auto_is_judged_by_all_texts():
    rows = {
        name: {"speedup_of_totals": s} for name, s in (("autoregressive", 1.0), ("tree", 1.6), ("auto", 1.2))
    }
    assert methods.judge_auto(rows).startswith("auto is 0.75 of tree, the best, and 1.20 of autoregressive")


def test_prompt_files_of_three_layouts(tmp_path):
    tokenizer = load_tokenizer(SHIPPED_TARGET)
    lines = [{"turns": ["a = 1", "later"], "category": "math"}, {"question": "b", "answer": "so\n#### 2"}]
    text = "\n\n".join(map(json.dumps, [*lines, {"prompt": "c", "test": "check", "entry_point": "f"}])) + "\n"
    (tmp_path / "plain.jsonl").write_text(text)
    (tmp_path / "small.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("plain.jsonl", "small.jsonl.gz"):
        first, second, third = common.read_prompt_file(tmp_path / name, tokenizer, 10)
        assert first[:3] == (tokenizer.encode("a = 1"), "math", "")
        assert second[:3] == (tokenizer.encode("b"), "", "so\n#### 2")
        assert third == (tokenizer.encode("c"), "", "", "c", "check", "f", "")
        assert common.read_prompt_file(tmp_path / name, tokenizer, 2) == [first, second]
    files = ",".join(str(tmp_path / name) for name in ("plain.jsonl", "small.jsonl.gz"))
    args = types.SimpleNamespace(prompt_file=files, prompts=3, max_new_tokens=9)
    both = common.fitting_prompts(common.load_parts("bf16", common.SHIPPED_ALONE), args)  # two of each file
    assert [prompt.category for prompt in both] == ["math", "plain", "math", "small"]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("bad.jsonl", b'{"prompt": "x"}\n{"nothing": 1}\n', "line 2"),
        ("bad.jsonl", b"no json\n", "line 1: not JSON"),
        ("bad.jsonl", b"\xff\xfe\n", "cannot be read"),
        ("bad.jsonl", b"\n", "has no lines"),
        ("bad.jsonl.gz", b"not gzipped", "cannot be read"),
        ("bad.jsonl.gz", gzip.compress(b'{"prompt": "x"}' * 99, mtime=0)[:30], "cannot be read"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"(?s)--prompt_file: .*{name}.*{reason}"):
        common.read_prompt_file(tmp_path / name, load_tokenizer(SHIPPED_TARGET), 10)
    with pytest.raises(BadInput, match="cannot be read"):
        common.read_prompt_file(tmp_path / "missing", None, 10)


ADD = 'def add(a, b):\n    """The sum."""\n'
TEST = "def check(f):\n    assert f(2, 3) == 5\n"


@pytest.mark.parametrize(
    "answer, right",
    [
        ("    return a + b\n\nprint(add(1, 2))", True),  # what follows the function is cut off
        ("    return a - b\n", False),
        ("    if a:\n        return a + b\n\n    return b\n", True),
        ("Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds.", True),
        ("```\ndef add(a, b):\n    return sqrt(a * a) + b\n```", True),  # sqrt is of the head of the prompt
        ("```python\n    return a + b", True),  # a block that was cut off
        ("def add(a, b):\n    return a + b\n\nThat is it.", True),
        ("Here:\ndef add(a, b):\n    return a - b\n", False),
        ("First:\n```bash\npip list\n```\nThen\n```python\ndef add(a, b):\n    return a + b\n```", True),
        ("I do not know", False),
        ("    raise SystemExit(1)\n", False),
        ("    while True: pass\n", False),
        ("    with open('file', 'w') as f:\n        f.write('x')\n    return a + b\n", False),
    ],
)
def test_a_program_is_right_if_its_test_passes(answer, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = common.Prompt([], text="from math import sqrt\n\n\n" + ADD, test=TEST, function="add")
    assert quality.passes(quality.program_of(prompt, answer), seconds=2.0) == right
    assert not any(tmp_path.iterdir())


def write_lines(path, *entries: dict) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_problems_are_counted_alone_and_with_drafts_of_qspec(tmp_path, monkeypatch, capsys, held_out):
    """In 4 bits as two quantizers leave them. The shipped model says something, and what is counted as right
    is what it says in bf16."""
    monkeypatch.setattr(common, "cache_directory", lambda: tmp_path)
    path, file = tmp_path / "quality.json", tmp_path / "problems.jsonl"
    prompts, tokenizer = ["x = 17\ny = 1", "def add(a, b):\n    "], load_tokenizer(SHIPPED_TARGET)
    decoder = Decoder(common.load_parts("bf16", common.SHIPPED).target.model, max_length=128, compile=False)
    said = common.decode_all(decoder, [tokenizer.encode(prompt) for prompt in prompts], 24)
    numbers = [quality.last_number(tokenizer.decode(text)) for text in said]
    lines = [{"question": p, "answer": f"so\n#### {n}"} for p, n in zip(prompts, numbers)]
    flags = ["--prompt_file", write_lines(file, *lines), "--precisions", "w4a16", "--tokens", "300"]
    flags += ["--max_new_tokens", "24", "--uncompiled", "--output", str(path)]
    assert bench.main(["quality", *flags, "--quantizer", "rtn;rtn, zeros"]) == 0
    rows = json.loads(path.read_text())["results"]
    assert list(rows) == ["bf16", "w4a16 rtn", "w4a16 rtn, zeros"]
    assert rows["bf16"]["solved"] == rows["bf16"]["problems"] == 2
    assert rows["bf16"]["answers"] == numbers and rows["bf16"]["cut_off"] == 2
    for row in rows.values():
        assert row["same_answers"] == sum(a == b != "" for a, b in zip(row["answers"], numbers))
    model = common.load_parts("bf16", common.SHIPPED).target.model
    losses, tails = [], [tokenizer.encode(p + "so")[len(tokenizer.encode(p)) :] for p in prompts]
    assert tails == [
        quality.solution_tokens(common.Prompt(tokenizer.encode(p), "", "so"), tokenizer, False)
        for p in prompts
    ]
    for prompt, tail in zip(prompts, tails):  # token by token
        before = tokenizer.encode(prompt)
        for i, token in enumerate(tail):
            features = model.recompute(torch.tensor([before + tail[:i]]))[:, -1:]
            losses.append(-model.lm_head(features)[0, 0].log_softmax(-1)[token].item())
    assert rows["bf16"]["solution_tokens"] == len(losses)
    assert rows["bf16"]["solution_loss"] == pytest.approx(sum(losses) / len(losses), rel=0.02)
    assert len({row["solution_loss"] for row in rows.values()}) == 3
    assert len({rows[name]["perplexity"] for name in rows}) == 3
    for name, row in rows.items():
        drafted = {"w4a4": {"solved": row["solved"], "different_texts": 0}}
        assert row.get("qspec") == (drafted if "w4a16" in name else None)
    task = {"prompt": ADD, "test": "def check(f):\n    assert f(1, 2) is None\n", "entry_point": "add"}
    flags[1] = write_lines(file, task, task)
    assert bench.main(["quality", *flags]) == 2 and "--run_code" in capsys.readouterr().err
    assert bench.main(["quality", *flags, "--run_code"]) == 0
    assert all(row["problems"] == 2 for row in json.loads(path.read_text())["results"].values())
    args = types.SimpleNamespace(prompt_file=str(file), prompts=2, max_new_tokens=24, run_code=True)
    vars(args).update({"temperature": 0.0, "top_p": 1.0, "uncompiled": True, "speculate_k": 3})
    parts = common.load_parts("bf16", common.SHIPPED_ALONE)
    first = common.decode_all(
        Decoder(parts.target.model, max_length=128, compile=False), [tokenizer.encode(ADD)], 24
    )
    parts.target.stop_ids.append(first[0][3])
    row = quality.measure_accuracy(parts, args, {"answers": ["something else", ""]})
    assert row["cut_off"] == row["same_answers"] == 0 and "solution_loss" not in row
    flags[1] = write_lines(file, {"prompt": "x"})
    assert bench.main(["quality", *flags]) == 2
    assert "answers with #### and a number, or tests" in capsys.readouterr().err


def test_methods_by_category_and_batch_size(tmp_path, monkeypatch, capsys):
    """With a quantizer, one text at a time and in batches whose rows are refilled; all that tables need. A
    precision leaves out the methods that it lacks."""
    monkeypatch.setattr(common, "cache_directory", lambda: tmp_path)
    path, texts = tmp_path / "methods.json", ["import os\n", "class A:\n", "def f(x):\n"]
    lines = [{"turns": [text], "category": name} for name in ("math", "qa") for text in texts]
    flags = ["--prompt_file", write_lines(tmp_path / "spec.jsonl", *lines), "--precisions", "w4a16,w8a8"]
    flags += ["--batch_sizes", "1,2", "--methods", "lookup,tree,hierarchical,qspec", "--uncompiled"]
    flags += ["--repeats", "1"]
    flags += ["--quantizer", "rtn, zeros", "--temperature", "0.8", "--prompts", "6", "--max_new_tokens", "12"]
    flags += ["--checkpoint_path", str(common.SHIPPED_SMALL), "--output", str(path)]
    assert bench.main(["methods", *flags, "--eagle_checkpoint_path", str(common.SMALL_HEAD)]) == 0
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["w4a16", "w4a16, batch 2", "w8a8", "w8a8, batch 2"]
    names = ["autoregressive", "lookup K=3", "lookup K=7", "tree of 60", "tree of 16", "tree"]
    names += ["hierarchical, own middle", "hierarchical, own middle, lookup"]
    names += ["qspec w4a8 K=3", "qspec w4a4 K=3"]
    for rows in (results["w4a16"], results["w4a16, batch 2"]):
        assert list(rows) == names
        for row in rows.values():
            assert row["different_texts"] == 0 and row["speedup_of_totals"] > 0 and 0 < row["occupancy"] <= 1
            assert row["predicted"] > 0 and "speedup_over_bf16" in row and row["verification_seconds"] > 0
    assert list(results["w4a16"]["tree"]["categories"]) == ["math", "qa"]
    assert list(results["w8a8"]) == ["autoregressive", "lookup K=3", "lookup K=7", *names[3:6]]
    assert [len(rows["tree"]["speeds"]) for rows in results.values()] == [6, 1, 6, 1]
    for rows in results.values():
        assert rows["autoregressive"]["predicted"] == pytest.approx(1)


def test_the_study_makes_all_that_figures_are_drawn_from():
    for name, flags in (bench.STUDY | bench.REAL_STUDY).items():
        args = bench.build_parser().parse_args([*shlex.split(flags), "--output", name])
        bench.check_arguments(args)
        assert args.prompts and args.precisions
    for name, command in tables.COMMANDS.items():
        assert command == f"python bench.py {(bench.STUDY | bench.REAL_STUDY)[name]}"
    assert set(draw.SOURCES) < set(tables.COMMANDS) == set(tables.TABLES)
    assert study.EVERY_PRECISION.split(",") == ["bf16", *PRECISIONS]


def test_listing_the_study_runs_nothing(capsys, tmp_path):
    assert bench.main(["all", "--list", "--results", str(tmp_path / "none")]) == 0
    lines = capsys.readouterr().out.splitlines()
    by_hand = lines.index("by hand, of a real model:")
    assert by_hand == len(bench.STUDY) + 2 and not (tmp_path / "none").exists()
    assert lines[by_hand - 1].startswith("python scripts/draw.py")
    assert len(lines) == by_hand + 1 + len(bench.REAL_STUDY)


def test_a_report_that_fails_is_named_and_the_others_go_on(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "STUDY", {"a.json": "cost", "b.json": "auto"})
    ran = []

    def run(command):
        ran.append([str(part) for part in command[1:]])
        return bench.subprocess.CompletedProcess(command, 2 if "cost" in ran[-1] else 0)

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert bench.main(["all", "--results", str(tmp_path)]) == 1
    assert [command[1] for command in ran] == ["cost", "auto", "--results", "--results"]
    assert capsys.readouterr().err == "failed: a.json\n"


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["costs"], "costs"),
        (["cost", "--precisions", "w5"], "--precisions: w5"),
        (["cost", "--sizes", "2,4"], "--sizes: 2,4 has no 1"),
        (["auto", "--batch_sizes", "0"], "--batch_sizes: 0"),
        (["cost", "--lm_head_bits", "5"], "--lm_head_bits: 5 is none of 4, 8, 16"),
        (["cost", "--lm_head_bits", "4,8"], "--lm_head_bits: cost takes one number"),
        (["cost", "--lm_head_bits", "4", "--precisions", "w8a8"], "--lm_head_bits 4 is for 4-bit"),
        (["methods", "--prompts", "0"], "--prompts is 0"),
        (["methods", "--methods", "trees"], "--methods: trees is none of autoregressive, lookup, sequential"),
        (["methods", "--quantizer", "awq"], "--quantizer: awq is none of rtn; rtn, zeros; hqq"),
        (["methods", "--quantizer", "rtn;gptq"], "--quantizer: rtn;gptq is none of"),
        (["methods", "--eagle_checkpoint_path", "x"], "need --checkpoint_path"),
        (["methods", "--checkpoint_path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["synthetic", "--acceptance", "2"], "--acceptance: '2'"),
    ],
)
def test_bad_flags_end_in_one_line(capsys, flags, reason):
    assert bench.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setitem(shapes.SMALLER, "tiny", TINY)


def test_costs_are_positive_and_drawn(tiny_shape, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "DRAFTED", TINY.vocab_size // 4)
    path = tmp_path / "cpu_cost.json"
    flags = ["--shape", "tiny", "--sizes", "1,3,4", "--precisions", "bf16,w4a8", "--repeats", "1"]
    assert bench.main(["cost", *flags, "--output", str(path)]) == 0
    file = json.loads(path.read_text())
    for costs in file["results"].values():
        assert list(costs["verification"]) == ["1", "3", "4"]
        measured = [(name, each) for part in costs.values() for name, each in part.items()]
        assert all(seconds > 0 for name, seconds in measured if "level" not in name)  # these are differences
    names = ["a token of the small model", "a level of the EAGLE head"]
    some = f", {TINY.vocab_size // 4} tokens"
    assert list(file["results"]["bf16"]["drafting"]) == [*names, names[1] + some]
    quantized = f"{names[1]}, in w4a8"
    more = [quantized, names[1] + some, quantized + some]
    assert list(file["results"]["w4a8"]["drafting"]) == ["a token in w4a4", *names, *more]
    assert list(draw.read_results(path).table) == ["bf16", "w4a8"]
    assert file["device"].startswith("cpu ") and "commit" in file


def test_levels_have_their_acceptance(tmp_path, capsys, held_out, monkeypatch):
    """The shipped head accepts less with the fewest tokens that there are."""
    monkeypatch.setattr(cost, "DRAFTED", 40)
    path = tmp_path / "cpu_cost.json"
    flags = [
        "--sizes",
        "1",
        "--precisions",
        "bf16",
        "--repeats",
        "1",
        "--prompts",
        "2",
        "--max_new_tokens",
        "24",
    ]
    assert bench.main(["cost", *flags, "--output", str(path)]) == 0
    costs = json.loads(path.read_text())["results"]["bf16"]
    levels = [name for name in costs["drafting"] if cost.LEVEL in name]
    assert list(costs["acceptance"]) == levels == [cost.LEVEL, f"{cost.LEVEL}, 40 tokens"]
    usual, few = costs["acceptance"].values()
    assert 1 > usual[0] > few[0] and usual == sorted(usual, reverse=True)
    assert list(draw.read_results(path).table) == ["bf16"]
    assert f"accepted {usual[0]:.2f}" in capsys.readouterr().out


def test_heads_by_kind_of_prompt(tmp_path, capsys):
    """Every token but the first of each text is one of a step, and steps that accepted more are among those
    that accepted less."""
    lines = [
        {"category": c, "turns": [t]} for c, t in (("a", "def f("), ("b", "import os"), ("a", "class A"))
    ]
    file, path = tmp_path / "p.jsonl", tmp_path / "heads.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--precisions", "w4a8", "--max_new_tokens", "24", "--prompt_file", str(file)]
    assert bench.main(["heads", *flags, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]["w4a8"]
    assert {kind: row.pop("prompts") for kind, row in rows.items()} == {"a": 2, "b": 1, "all": 3}
    for row in rows.values():
        assert list(row) == ["chain of 5", "tree of 8", "tree of 16"]
        for found in row.values():
            shares = found["acceptance_by_position"]
            assert shares == sorted(shares, reverse=True)
            assert found["tokens_per_step"] <= 1 + sum(shares) + 1e-9  # a cut may take some
    steps = [sum(rows[kind]["chain of 5"]["steps"] for kind in kinds) for kinds in ("ab", ["all"])]
    assert steps[0] == steps[1] > 0
    assert bench.main(["heads", "--checkpoint_path", str(SHIPPED_TARGET)]) == 2
    assert "heads: --eagle_checkpoint_path is missing" in capsys.readouterr().err


def test_bits_of_lm_head_in_reports(tiny_shape, tmp_path, capsys, held_out):
    """quality takes several; the others have fewer bytes to read with fewer bits."""
    path = tmp_path / "q.json"
    flags = ["--precisions", "w4a16", "--tokens", "600", "--output", str(path)]
    assert bench.main(["quality", "--lm_head_bits", "16,8,4", *flags]) == 0
    rows = json.loads(path.read_text())["results"]
    assert list(rows) == ["bf16", *(f"w4a16, lm_head {bits}" for bits in (16, 8, 4))]
    assert [row["step_bytes"] for row in rows.values()] == sorted(
        (row["step_bytes"] for row in rows.values()), reverse=True
    )
    flags = ["--shape", "tiny", "--sizes", "1", "--precisions", "bf16,w4a8", "--repeats", "1"]
    nbytes = {}
    for bits in ("4", "8"):
        assert bench.main(["cost", *flags, "--lm_head_bits", bits, "--output", str(path)]) == 0
        costs = json.loads(path.read_text())["results"]
        nbytes[bits] = [costs[precision]["memory"]["weight_bytes"] for precision in ("bf16", "w4a8")]
    assert nbytes["4"][0] == nbytes["8"][0] and nbytes["4"][1] < nbytes["8"][1]


def test_synthetic_rows_are_drawn_and_marked(tiny_shape, tmp_path, capsys):
    path = tmp_path / "cpu_synthetic.json"
    flags = ["--shape", "tiny", "--precisions", "w4a8", "--prompts", "1", "--max_new_tokens", "12"]
    assert bench.main(["synthetic", *flags, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]["w4a8"]
    assert {"hierarchical", "tree of 60", "tree of 16", "tree", "qspec w4a4 K=3"} < set(rows)
    assert all(row["note"] == synthetic.SYNTHETIC and row["acceptance"] for row in rows.values())
    assert list(draw.read_results(path).table) == ["w4a8"]
    table = capsys.readouterr().out.splitlines()
    assert sum(synthetic.SYNTHETIC in line for line in table) > len(rows)


def test_a_middle_model_and_batches_by_name(tiny_shape, tmp_path, monkeypatch, capsys):
    """Rows of each batch size, of the chosen methods, written as they come; a middle of another size."""
    monkeypatch.setitem(shapes.SHAPES, "smaller", dataclasses.replace(TINY, num_layers=1))
    path, made = tmp_path / "synthetic.json", []
    true = synthetic.random_parts
    monkeypatch.setattr(synthetic, "random_parts", lambda *given: made.append(given[1]) or true(*given))
    flags = ["--shape", "tiny", "--middle", "smaller", "--precisions", "w4a16", "--prompts", "1"]
    flags += ["--max_new_tokens", "8", "--batch_sizes", "1,3", "--methods", "tree,qspec"]
    assert bench.main(["synthetic", *flags, "--output", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["w4a16", "w4a16, batch 3"] and [c.num_layers for c in made] == [1, 1]
    for rows in results.values():
        names = ["autoregressive", "tree of 60", "tree of 16", "tree", "qspec w4a4 K=3"]
        assert list(rows) == names and rows["autoregressive"]["predicted"] == pytest.approx(1)
    assert bench.main(["synthetic", *flags, "--methods", "trie"]) == 2
    assert "--methods: trie is none of autoregressive, sequential" in capsys.readouterr().err
    monkeypatch.setitem(shapes.SHAPES, "smaller", dataclasses.replace(TINY, vocab_size=512))
    assert bench.main(["synthetic", *flags]) == 2
    assert "--middle: smaller has another vocabulary than tiny" in capsys.readouterr().err


@pytest.mark.parametrize("report, module", [("cost", cost), ("synthetic", synthetic)])
def test_models_of_one_precision_are_gone_before_the_next(tiny_shape, monkeypatch, capsys, report, module):
    """Decoders and drafters refer to each other: without a collection, two models would be in memory."""
    made, alive = [], []

    def random_parts(*settings):
        alive.append(sum(model() is not None for model in made))
        parts = shapes.random_parts(*settings)
        made.extend(weakref.ref(model) for model in (parts.target.model, parts.small))
        return parts

    monkeypatch.setattr(module, "random_parts", random_parts)
    gc.disable()
    try:
        flags = ["--sizes", "1,2", "--repeats", "1", "--prompts", "1", "--max_new_tokens", "4"]
        assert bench.main([report, "--shape", "tiny", "--precisions", "bf16,w4a16,w4a8", *flags]) == 0
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_exact_saves_every_row_at_once(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        if len(texts) == 2:
            raise KeyboardInterrupt
        texts.append([[1, 2], [3, len(texts)]])
        return texts[-1]

    texts, path = [], tmp_path / "exact.json"
    monkeypatch.setattr(exact, "decode_entry", interrupted)
    flags = ["--precisions", "w4a16", "--uncompiled", "--prompts", "2", "--output", str(path)]
    assert bench.main(["exact", *flags]) == 130
    file = json.loads(path.read_text())
    assert list(file["results"].values()) == [{"texts": 2, "different": 0}, {"texts": 2, "different": 1}]
    assert file["unfinished"] and file["report"] == "exact"


def test_exact_with_a_checkpoint_of_ones_own(tmp_path):
    """Without a draft model, and with a head."""
    flags = [
        "--checkpoint_path",
        str(common.SHIPPED_SMALL),
        "--eagle_checkpoint_path",
        str(common.SMALL_HEAD),
    ]
    flags += ["--precisions", "w4a16", "--uncompiled", "--prompts", "1", "--max_new_tokens", "6"]
    assert bench.main(["exact", *flags, "--output", str(tmp_path / "exact.json")]) == 0
    rows = json.loads((tmp_path / "exact.json").read_text())["results"]
    assert "w4a16 T=1.0 tree, batch of 8, recorded" in rows and not any("sequential" in name for name in rows)
    assert all(row == {"texts": 1, "different": 0} for row in rows.values())


def test_shares_of_the_copy_bandwidth(tiny_shape, tmp_path, monkeypatch, capsys):
    """Bytes of the weights over seconds over what copying moves in a second, for steps and for linears."""
    assert timing.shares_of_copy({"1": 2.0, "8": 4.0}, 12, 3.0) == {"1": 2.0, "8": 1.0}
    assert timing.copy_bandwidth(size=2**16) > 1e6
    for module in (cost, linears):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device: 5e9)
    monkeypatch.setattr(linears, "LARGER_THAN_CACHE", {"cpu": 0})
    path = tmp_path / "cost.json"
    flags = ["--shape", "tiny", "--sizes", "1,3", "--precisions", "w4a8", "--repeats", "1"]
    assert bench.main(["cost", *flags, "--output", str(path)]) == 0
    costs = json.loads(path.read_text())["results"]["w4a8"]
    inside = 256 * 128 + 128 * 128 + 512 * 128 + 128 * 256  # weights of a layer
    layer = inside // 2 + 2 * inside // 128 + 2 * 2 * 128  # nibbles, scales, norms
    nbytes = 2 * layer + 256 * 128 + 2 * 256  # and lm_head: 8 bits, a scale for each row
    assert costs["memory"] == {"copy_bandwidth": 5e9, "weight_bytes": nbytes}
    assert costs["share_of_copy"]["3"] == pytest.approx(nbytes / costs["verification"]["3"] / 5e9)
    assert "of copying" in capsys.readouterr().out
    flags = ["--shapes", "tiny", "--contestants", "w4a16,torch bf16", "--repeats", "1"]
    assert bench.main(["kernels", *flags, "--output", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert results["copy_bandwidth"] == 5e9 and set(results["tiny o"]["linears"]) == {"w4a16", "torch bf16"}
    row = results["tiny gate_up"]["linears"]["w4a16"]
    assert row["bytes"] == 512 * 128 // 2 + 2 * 512 and list(row["seconds"]) == list(row["share_of_copy"])
    assert row["share_of_copy"]["8"] == pytest.approx(row["bytes"] / row["seconds"]["8"] / 5e9)


def test_a_contestant_that_does_not_run_is_named(tiny_shape, monkeypatch, capsys):
    monkeypatch.setattr(linears, "LARGER_THAN_CACHE", {"cpu": 0})
    makers = linears.contestants(64, 128) | {"another": lambda: (None, lambda x, w: x @ w)}
    monkeypatch.setattr(linears, "contestants", lambda *shape: makers)
    rows, failed = linears.measure_linear(64, 128, [1, 2], 1, "cpu", 1e9, ["w8a8", "another"])
    assert set(rows) == {"w8a8"} and failed["another"].startswith("TypeError: ")
    linears.print_linear("x", {"out": 64, "in": 128, "linears": rows, "failed": failed})
    assert "another           does not run here: TypeError" in capsys.readouterr().out


@pytest.fixture
def pretended_gpu(monkeypatch) -> list[str]:
    """The calls of CUDA graphs and events. A graph takes 8 ms, and a function named no cannot be recorded."""
    log, events = [], types.SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 8.0)

    @contextlib.contextmanager
    def graph(recorded):
        recorded.replay = lambda: log.append("replay")
        log.append("capture")
        yield
        if log[-1] == "no":
            raise RuntimeError("not permitted when stream is capturing\nmore")

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": contextlib.nullcontext}
    fakes |= {"CUDAGraph": types.SimpleNamespace, "graph": graph, "Event": lambda enable_timing: events}
    for name, fake in (fakes | {"synchronize": lambda device=None: log.append("wait")}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_graphs_take_turns_and_are_timed_by_events(pretended_gpu, capsys):
    functions = {name: lambda name=name: pretended_gpu.append(name) for name in ("yes", "no")}
    seconds = timing.interleave_on_device(functions, 3, "cuda", calls=4)
    assert seconds == {"yes": 8e-3 / 4, "no": 8e-3 / 4}
    begin = pretended_gpu.index("no")
    assert pretended_gpu[:begin] == ["yes", "yes", "wait", "capture", *4 * ["yes"]]
    assert pretended_gpu[begin:] == ["no", "no", "wait", "capture", *4 * ["no"]] + 5 * (
        ["replay", "replay", *4 * ["no"], "wait"]
    )
    assert (
        "no: no CUDA graph, timed with its launches: RuntimeError: not permitted" in capsys.readouterr().out
    )


def test_a_clock_waits_for_the_gpu(pretended_gpu):
    timing.interleave({"a": lambda: pretended_gpu.append("a")}, 1, device="cuda")
    assert pretended_gpu == 4 * ["wait", "a", "wait"]


def test_reports_for_the_cpu_refuse_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(bench, "check_device", lambda name: None)
    assert bench.main(["tree", "--device", "cuda"]) == 2
    assert "--device: tree runs on the CPU" in capsys.readouterr().err


def test_wider_logits_have_the_same_peak():
    logits = 3 * torch.randn(1, 4, 300)
    wide = sampling.widen(logits, 1000)
    best, same = (x.topk(64, dim=-1).values for x in (wide, logits))
    assert wide.shape == (1, 4, 1000) and torch.equal(best, same)
    assert torch.equal(wide, sampling.widen(logits, 1000))


def test_every_way_to_pick_is_timed_on_the_same_logits():
    logits = torch.randn(1, 3, 200)
    picks = {name: pick() for name, pick in sampling.picks_after(logits).items()}
    assert list(picks) == [sampling.ARGMAX, *sampling.SAMPLINGS]
    assert torch.equal(picks[sampling.ARGMAX], picks[sampling.GREEDY])
    assert all(tokens.shape == (1, 3) for tokens in picks.values())
    assert not torch.equal(picks["T = 1"], picks[sampling.GREEDY])


def test_a_forgetful_drafter_drafts_as_if_there_were_no_penalties():
    """And so it agrees less often, in a text that is the same."""
    target, prompts = random_model(), random_prompts([5, 9])
    asked, stats = Sampling(frequency_penalty=3.0), {}
    texts = {}
    for make in (Drafter, SequentialDrafter, sampling.ForgetfulSequential):
        drafter = make() if make is Drafter else make(target, 3)
        decoder = Decoder(target, drafter, asked, 128, 2, compile=False)
        stats[make] = Stats()
        texts[make] = common.decode_all(decoder, prompts, 40, stats[make])
    assert texts[Drafter] == texts[SequentialDrafter] == texts[sampling.ForgetfulSequential]
    all_agree, some_agree = (stats[make].tokens_per_step for make in list(stats)[1:])
    assert all_agree > 3.5 > some_agree + 0.5


@pytest.fixture
def few_picks(monkeypatch):
    monkeypatch.setattr(sampling, "PLACES", (1, 2))
    monkeypatch.setattr(sampling, "VOCABULARIES", (5000,))
    names = ("a person", "a call of a function")
    monkeypatch.setattr(structure, "SCHEMAS", {name: structure.SCHEMAS[name] for name in names})


SMALL = ["--uncompiled", "--repeats", "1", "--prompts", "2", "--batch_sizes", "1,2", "--max_new_tokens"]


def test_what_picks_cost_and_drafts_bring(few_picks, tmp_path, capsys):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    path = tmp_path / "sampling.json"
    assert bench.main(["sampling", *SMALL, "30", "--output", str(path)]) == 0
    file = json.loads(path.read_text())
    picks, steps, penalties, structured = file["results"].values()
    assert file["settings"]["precision"] == "w4a8"
    sources = {name: row["logits"].split(":")[0] for name, row in picks.items()}
    assert sources.pop("4,096 peaked") == "of the shipped target"
    assert sources == dict.fromkeys(["4,096 flat", "5,000 peaked", "5,000 flat"], "synthetic")
    for row in picks.values():
        assert list(row["seconds"]) == ["1", "2"] and row["noise_seconds"] > 0
        for n, seconds in row["seconds"].items():
            ratios = row["over torch.argmax"][n]
            assert ratios["penalized"] == pytest.approx(seconds["penalized"] / seconds["torch.argmax"])
    assert list(steps) == [f"{m}, batch {b}" for b in (1, 2) for m in ("autoregressive", "lookup")]
    row = steps["autoregressive, batch 2"]["1"]
    assert row["steps"] == {"greedy": 29, "top-p 0.95": 29}  # the first token comes from prefill
    assert row["ratio"] == row["seconds"]["top-p 0.95"] / row["seconds"]["greedy"]
    assert len(penalties) == 6 and len(penalties["tree, T = 1"]) == 3 and len(penalties["lookup, T = 0"]) == 2
    assert list(structured)[-2:] == ["all", "all, compact"] and len(structured) == 6
    for row in structured.values():
        assert all(row[way]["different_texts"] == 0 for way in structure.WAYS)
        assert row["autoregressive"]["tokens_per_step"] == 1 and row["lookup"]["forced"] == 0
        assert row["forced"]["tokens_per_step"] >= 1 + row["forced"]["forced"]
    assert structured["all, compact"]["forced"]["forced"] > 0.3
    assert "0 texts are not those of autoregressive" in capsys.readouterr().out


def test_without_llguidance_schemas_are_left_out(few_picks, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    parts = common.load_parts("w4a8", common.SHIPPED)
    args = bench.build_parser().parse_args(["sampling", *SMALL, "4"])
    assert "pip install llguidance" in structure.measure_structure(parts, args)["left_out"]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("drafts under a schema are left out: ")


BENCH_ROW = {"build_commit": "abc1234", "cpu_info": "a CPU", "model_type": "llama 1B Q4_0", "n_threads": 2}
FAKE_PROGRAM = """#!{python}
import json, os, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open("{log}", "a") as log:
    omp = [name for name in os.environ if name.startswith("OMP_")]
    print(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], omp]), file=log)
if "-o" in flags:
    sizes = [(int(p), 0) for p in flags["-p"].split(",")] + [(0, int(n)) for n in flags["-n"].split(",")]
    rows = [dict(n_prompt=p, n_gen=n, n_depth=int(flags["-d"]), avg_ts=100.0 + p, stddev_ts=1.0)
            | {facts} for p, n in sizes if p or n]
    print(json.dumps(rows[0] if flags["-o"] == "jsonl" else rows), flush=True)
    time.sleep(60 * (flags["-o"] == "jsonl"))
"""


@pytest.fixture
def fake_llama_cpp(tmp_path, monkeypatch):
    """A directory with programs that print what those of llama.cpp would, and the file of their calls."""
    monkeypatch.setattr(peers, "LEAST_TURNS", 1)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    log = tmp_path / "calls"
    (tmp_path / "build" / "bin").mkdir(parents=True)
    for name in ("llama-bench", "llama-cli"):
        program = tmp_path / "build" / "bin" / name
        program.write_text(FAKE_PROGRAM.format(python=sys.executable, log=log, facts=BENCH_ROW))
        program.chmod(0o755)
    return tmp_path / "build", log


def test_what_llama_bench_prints_is_read():
    rows = [
        BENCH_ROW | {"n_prompt": 4, "n_gen": 0, "n_depth": 200, "avg_ts": 50.5, "stddev_ts": 0.5},
        BENCH_ROW | {"n_prompt": 0, "n_gen": 64, "n_depth": 4600, "avg_ts": 9, "stddev_ts": 0},
    ]
    speeds, facts = llama_cpp.parse_llama_bench(json.dumps(rows))
    assert speeds == {
        (4, 0, 200): {"avg_ts": 50.5, "stddev_ts": 0.5},
        (0, 64, 4600): {"avg_ts": 9.0, "stddev_ts": 0.0},
    }
    assert facts == BENCH_ROW
    for wrong in ("", "[]", "{}", "[1]", '[{"n_prompt": 1}]', "llama-bench: error"):
        with pytest.raises(BadInput, match="llama-bench: its output"):
            llama_cpp.parse_llama_bench(wrong)


def test_ours_and_llama_cpp_take_turns(fake_llama_cpp, tmp_path, monkeypatch, capsys):
    (directory, log), path = fake_llama_cpp, tmp_path / "peers.json"
    for name in ("next_to_transformers", "linears"):  # the other peers have their own test
        monkeypatch.setattr(peers, name, lambda *args: {})
    gguf = tmp_path / "some.gguf"
    gguf.write_text("nothing")
    flags = ["--llama_cpp", str(directory), "--gguf", str(gguf), "--checkpoint_path", str(SHIPPED_TARGET)]
    flags += ["--uncompiled", "--repeats", "1", "--max_new_tokens", "4", "--output", str(path)]
    assert bench.main(["peers", *flags]) == 0
    results = json.loads(path.read_text())["results"]
    rows = results["llama.cpp"]["rows"]
    assert results["precision"] == "w4a8" and results["llama.cpp"]["facts"] == BENCH_ROW
    assert [name for name in rows if name.startswith("deco")] == [
        "decoding after 32 tokens, tokens/s",
        "decoding after 550 tokens, tokens/s",
        "decoding beside a busy loop, tokens/s",
        "decoding beside a copy of itself, tokens/s",
    ]
    assert rows["T(4), ms"]["peer"] == pytest.approx(1e3 * 4 / 104)
    assert rows["T(4) / T(1)"]["peer"] == pytest.approx(4 / 104 * 101)
    assert rows["prefill of 550 tokens, tokens/s"]["peer"] == 650
    assert rows["decoding beside a copy of itself, tokens/s"]["peer"] == 100
    for row in rows.values():
        assert row["ratio"] == row["ours"] / row["peer"] > 0 and len(row["all"]["ours"]) == 1
    assert "a program that writes 32 tokens, s" in rows
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(omp == [] for _, _, omp in calls)
    assert [name for name, *_ in calls].count("llama-cli") == 1
    assert all(command[command.index("-t") + 1] == str(torch.get_num_threads()) for _, command, _ in calls)
    assert "ours / it" in capsys.readouterr().out and len(results["llama.cpp"]["others_busy"]) == 1


def test_company_is_gone_afterwards(tmp_path):
    file = tmp_path / "pid"
    tell = f"import os; open({str(file)!r}, 'w').write(str(os.getpid()))\n"
    with peers.running([sys.executable, "-c", tell + peers.BUSY], None):
        os.kill(int(file.read_text()), 0)  # it is there
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    with pytest.raises(BadInput, match="ended at once"), peers.running([sys.executable, "-c", ""], None):
        pass


def test_the_peers_without_llama_cpp_are_pytorch_and_transformers(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(peers, "LEAST_TURNS", 1)
    monkeypatch.setattr(linears, "LARGER_THAN_CACHE", {"cpu": 0})
    monkeypatch.setattr(peers, "copy_bandwidth", lambda: 5e9)
    path, prompts = tmp_path / "peers.json", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def add(a, b):"}\n{"prompt": "import"}\n')
    flags = ["--uncompiled", "--repeats", "1", "--max_new_tokens", "4", "--output", str(path)]
    assert bench.main(["peers", *flags, "--prompt_file", str(prompts)]) == 0
    results = json.loads(path.read_text())["results"]
    rows = results["transformers"]["rows"]
    assert list(rows) == [
        "decoding after 32 tokens, tokens/s",
        "prefill of 550 tokens, tokens/s",
        "decoding after 550 tokens, tokens/s",
        "answers, tokens/s",
        "answers with lookup of 3 tokens, tokens/s",
    ]
    assert all(row["ours"] > 0 for row in rows.values())
    assert list(results["linears"]) == ["qkv", "o", "gate_up", "down", "lm_head"]
    assert list(results["linears"]["o"]["ratio"]) == ["1", "2", "4", "8", "16"]


def test_a_shape_has_no_peer_in_transformers(tiny_shape, monkeypatch, capsys):
    args = bench.build_parser().parse_args(["peers"])
    args.shape = "tiny"
    assert "--shape" in peers.next_to_transformers(None, [], args)["left_out"]
    args.shape = None
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.next_to_transformers(None, [], args) == {"left_out": "pip install transformers"}


def test_a_random_gguf_has_the_shape_of_the_model(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    path = tmp_path / "random.gguf"
    llama_cpp.write_random_gguf(TINY, "w4a8", path)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: (tensor.tensor_type.name, *tensor.shape.tolist()) for tensor in reader.tensors}
    assert tensors["token_embd.weight"] == ("Q8_0", 128, 256)  # 128 is no multiple of the 256 of Q6_K
    assert tensors["blk.1.ffn_down.weight"] == ("Q4_0", 256, 128)
    assert tensors["blk.0.attn_k.weight"] == ("Q4_0", 128, 64)
    assert tensors["output.weight"][0] == "Q8_0" and len(tensors) == 2 * 9 + 3
    assert reader.get_field("llama.vocab_size").contents() == 256
    wide = {kind: llama_cpp.random_blocks(kind, 4, 512) for kind in ("Q4_0", "Q6_K", "Q8_0")}
    for kind, blocks in wide.items():
        weights = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
        assert weights.shape == (4, 512) and 0.7 < 512**0.5 * weights.std() < 1.4


def test_bad_flags_of_peers_end_in_one_line(fake_llama_cpp, tmp_path, monkeypatch, capsys):
    directory, _ = fake_llama_cpp
    shown = [
        (["--llama_cpp", str(tmp_path)], "no llama-bench, and no llama-completion or llama-cli"),
        (["--gguf", "x"], "--gguf: it is for llama.cpp"),
        (["--llama_cpp", str(directory), "--gguf", "/nowhere"], "--gguf: /nowhere is no file"),
        (["--shape", "llama-3.2-1b", "--prompt_file", "x"], "--prompt_file: peers answers its prompts"),
    ]
    for flags, reason in shown:
        assert bench.main(["peers", *flags]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install gguf"):
        llama_cpp.write_random_gguf(TINY, "w4a8", tmp_path / "x.gguf")


def test_a_program_that_fails_says_why(tmp_path):
    failing = "import sys; print('out of memory', file=sys.stderr); sys.exit(3)"
    with pytest.raises(BadInput, match="failed with 3: out of memory"):
        llama_cpp.run_program([sys.executable, "-c", failing])
    with pytest.raises(BadInput, match="none cannot be run"):
        llama_cpp.run_program([str(tmp_path / "none")])
