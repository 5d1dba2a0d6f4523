"""--check_head: which readings are tried, what they come to, and what is said about it."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import guessing_head, random_model, random_prompts, run_main
from test_heads import LAYOUTS

import check_head as checking
from check_head import Reading, check_head, other_readings, show, verdict
from eagle import EagleHead
from generate import main
from gpt_spec import generate
from heads import load_head
from rope import RopeScaling


def test_the_readings_of_a_head(deep, tmp_path):
    """All that its tensors allow, and none that is what the file says."""
    head = load_head(LAYOUTS["speculators"].write(tmp_path / "head"), deep)
    assert other_readings(head, replace(deep.config, rope_theta=5e5)) == {
        "states 1, 3, 4": {"taps": (1, 3, 4)},
        "states 3, 5, 6": {"taps": (3, 5, 6)},
        "goes round after the norm": {"norm_output": True},
        "added to before the norm": {"norm_before_residual": False},
        "features normed twice": {"double_norm": True},
        "RoPE base 10000": {"rope_theta": 10000.0},
        "RoPE base 500000": {"rope_theta": 5e5},
    }
    head = load_head(LAYOUTS["SpecForge"].write(tmp_path / "other"), deep)
    assert {"states 0, 3, 6", "states 2, 4, 5"} < set(other_readings(head, deep.config))  # 8 is no state
    scaled = EagleHead(replace(deep.config, num_layers=1, rope_scaling=RopeScaling("linear", 2.0)))
    assert other_readings(scaled, deep.config) == {"RoPE without scaling": {"rope_scaling": RopeScaling()}}


@torch.no_grad()
def test_what_is_measured_is_what_a_chain_accepts():
    """Step by step: a chain of five is accepted up to the first token that the target would not write."""
    target = random_model()
    head, prompts = guessing_head(target, 0.1), random_prompts([6, 9])
    [reading] = check_head(head, lambda: head, target, prompts, 40, [], False)
    assert 0 < reading.acceptance_by_position[2] < reading.acceptance_by_position[0] < 1
    steps = [
        emission.accepted
        for emissions in generate(
            target, prompts, checking.TreeDrafter(head, 6, 5, 1), max_new_tokens=40, compile=False
        )
        for emission in emissions
        if emission.draft is not None
    ]
    shares = [sum(accepted > i for accepted in steps) / len(steps) for i in range(5)]
    assert reading.acceptance_by_position == pytest.approx(shares) and reading.steps == len(steps)


def test_a_better_reading_is_named(capsys):
    configured = Reading("as configured", {}, [0.5, 0.3, 0.1, 0.0, 0.0], 200)
    better = Reading("states 2, 4, 5", {"taps": (2, 4, 5)}, [0.7, 0.5, 0.4, 0.3, 0.2], 200)
    hardly = Reading("RoPE base 10000", {"rope_theta": 1e4}, [0.5, 0.3, 0.15, 0.0, 0.0], 200)
    poor = Reading("as configured", {}, [0.1, 0.0, 0.0, 0.0, 0.0], 200)
    assert "'states 2, 4, 5' accepts more" in verdict([configured, hardly, better])
    assert "no other reading accepts more" in verdict([configured, hardly])
    perhaps = replace(hardly, acceptance_by_position=[0.5, 0.4, 0.15, 0.1, 0.0])
    assert "may fit better, or it is chance" in verdict([configured, perhaps])
    assert "accepts more than" in verdict([replace(configured, steps=9000), replace(perhaps, steps=9000)])
    # Of drafts of which 0, 1, 1 and 3 tokens were accepted.
    assert Reading("", {}, [0.75, 0.25, 0.25, 0, 0], 4).error == pytest.approx((1.1875 / 4) ** 0.5)
    assert "no reading fits" in verdict([poor])
    assert "no other reading to compare" in verdict([configured])
    assert "5 steps say little" in verdict([Reading("as configured", {}, [1.0] * 5, 5)])
    show([configured, better], as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["states", "2,", "4,", "5", "0.70", "0.50", "0.40", "0.30", "0.20", "3.10"] in lines
    show([configured, better], as_json=True)
    printed = json.loads(capsys.readouterr().out)["readings"][1]
    assert printed["changes"] == {"taps": [2, 4, 5]} and printed["tokens_per_step"] == 3.1


def test_the_command(tmp_path):
    run = partial(run_main, main, "--check_head", "--compile", "none")
    done = run("--method", "tree", "--prompt", "def f(x):\n", "--max_new_tokens", "20", "--json")
    [reading] = json.loads(done.stdout)["readings"]
    assert done.returncode == 0 and reading["acceptance_by_position"][0] > 0.3
    for flags in (("--method", "lookup"), ("--method", "tree", "--interactive"), ("--tree_size", "4")):
        done = run("--method", "tree", *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--check_head" in done.stderr
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no JSON\n")
    done = run("--method", "tree", "--prompts", str(bad))
    assert done.returncode == 2 and "line 1" in done.stderr and "Traceback" not in done.stderr
