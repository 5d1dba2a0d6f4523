"""The border between trees and hierarchies: what is computed is what decoders do, and machines lie on it."""

import json

import pytest
from conftest import ROOT, guessing_head, random_model, random_prompts

import bench
from benchmarks import common, synthetic, when
from benchmarks.acceptance import PRESETS, Acceptance
from costs import Stats
from model import BadInput

HEAD = Acceptance((0.7, 0.6), "test", breadth=0.4)


@pytest.mark.parametrize("nodes, least", [(4, 3), (12, 6)])
def test_a_hierarchy_that_is_decoded_has_the_numbers_that_are_computed(nodes, least):
    """Tokens per step of the target, steps of the middle in one, and how long the chains are."""
    target, middle, shape, q = random_model(), random_model(seed=1, num_layers=1), (3, 3), 0.8
    tree = synthetic.SyntheticTree(HEAD, guessing_head(middle), nodes, *shape)
    drafter, stats = synthetic.SyntheticHierarchy(HEAD, middle, tree, least), Stats()
    options = {"max_length": 512, "batch_size": 8, "compile": False}
    decoder = synthetic.SyntheticDecoder(Acceptance((q,), "test"), 2**40, target, drafter, **options)
    common.decode_all(decoder, random_prompts(list(range(5, 29))), 150, stats)
    chain = when.chain_of(when.Tree(HEAD, nodes, *shape, cost=0.1), least, q)
    steps = stats.target_forwards
    assert stats.tokens_per_step == pytest.approx(chain.tokens, rel=0.05)
    assert stats.inside.target_forwards / steps == pytest.approx(chain.steps, rel=0.05)
    mean = sum(k * p for k, p in chain.lengths.items())
    assert stats.drafted_tokens / steps == pytest.approx(mean, rel=0.05)
    assert sum(chain.lengths.values()) == pytest.approx(1) and min(chain.lengths) == least


def test_by_hand():
    """A head that is right once in two, chains of one or two tokens, and every term of the equations."""
    tree = when.Tree(Acceptance((0.5,), ""), nodes=2, depth=1, topk=1, cost=0.25)
    curve = when.straight(30.0)  # T(n) = n
    assert tree.speed(curve) == 1.5 / (0.25 + 2)
    chain = when.chain_of(tree, 2, 0.5)  # 1 + 1, 1 + 2, or 2 tokens
    assert chain.steps == 1.5 and chain.lengths == {2: 0.75, 3: 0.25}
    assert chain.tokens == 0.75 * 1.75 + 0.25 * 1.875 and chain.whole == 0.75 / 4 + 0.25 / 8
    assert chain.costs(curve) == (1.5 * 2.25 + chain.whole, 0.75 * 3 + 0.25 * 4)
    choice = when.Choice([tree], [chain])
    assert choice.hierarchy(0.1, curve) == chain.tokens / (0.1 * (3.375 + chain.whole) + 3.25)
    assert choice.border(curve) is None  # verification alone is slower than no speculation


@pytest.mark.parametrize("q", when.CHAINS)
def test_on_the_border_both_are_as_fast(q):
    choice = when.choices(PRESETS["eagle3-8b"], 0.05, q, 6, 4)
    for steepness in (1.5, 4.0, 8.0):
        curve = when.straight(steepness)
        middle, least = choice.border(curve), max(1.0, choice.tree(curve))
        assert choice.hierarchy(middle, curve) == pytest.approx(least)
        assert choice.hierarchy(0.9 * middle, curve) > least > choice.hierarchy(1.1 * middle, curve)


def test_t_of_n_of_a_machine():
    curve = when.measured({"1": 2.0, "3": 4.0, "4": 6.0})
    assert [curve(n) for n in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 3.0, 5.0]
    assert when.straight(4.0)(30) == 4 and when.straight(4.0)(1) == 1


def test_the_report_has_borders_and_machines(tmp_path, capsys):
    """Those of `bench.py cost` that go up to 30 nodes and know what a depth of a head costs; of the study,
    what is in when.json is computed again."""
    drafting = {"a token in w4a8": 0.9, "a token of the small model": 0.2, "a level of the EAGLE head": 0.1}
    costs = {"verification": {"1": 1.0, "16": 1.5, "60": 3.0}, "drafting": drafting}
    short = costs | {"verification": {"1": 1.0, "8": 1.2}}
    for name, report, results in (("a", "cost", {"w4a16": costs, "bf16": short}), ("b", "methods", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"report": report, "results": results}))
    output = tmp_path / "out" / "when.json"
    assert bench.main(["when", "--results", str(tmp_path), "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    assert list(results["machines"]) == ["a w4a16, in w4a8", "a w4a16, of the small model"]
    row = results["machines"]["a w4a16, of the small model"]
    assert row["steepness"] == pytest.approx(1.5 + 1.5 * 14 / 44) and (row["middle"], row["head"]) == (
        0.2,
        0.1,
    )
    assert list(row["hierarchy"].values()) == sorted(row["hierarchy"].values()) and row["tree"] > 1
    committed = json.loads((ROOT / "benchmarks" / "results" / "when.json").read_text())["results"]
    for name, border in committed["borders"].items():
        again = results["borders"][name]["points"]
        for key in ("steepness", "middle", "best tree", "largest tree"):
            assert [p[key] for p in border["points"]] == pytest.approx([p[key] for p in again])
        for (
            point
        ) in again:  # a cheaper middle is never slower, and the border is between those that win and lose
            speeds = {float(m): speed for m, speed in point["hierarchy by middle"].items()}
            assert list(speeds.values()) == sorted(speeds.values(), reverse=True)
            least, most = max(1.0, point["best tree"]), point["middle"] or 0.0
            assert all((speed >= least) == (m <= most) for m, speed in speeds.items())
    (tmp_path / "c.json").write_text("{")
    assert bench.main(["when", "--results", str(tmp_path)]) == 2
    assert "c.json is no file of bench.py" in capsys.readouterr().err


def test_a_measured_tree_and_hierarchy_are_near_what_is_computed():
    """Of 70 B on an H100, measured when trees gained nothing by breadth. The host's time between the levels,
    which is not in the model, made the hierarchy slower."""

    def read(name):
        return json.loads((ROOT / "benchmarks" / "results" / name).read_text())["results"]["w4a16"]

    costs, rows = read("gpu_cost_70b.json"), read("gpu_synthetic_70b.json")
    first, units = costs["verification"]["1"], costs["drafting"]
    curve, depth = when.measured(costs["verification"]), units["a level of the EAGLE head"] / first
    head = Acceptance((0.7720850136371764,), "tau 3.67 at depth 6")
    tree = when.Tree(head, 60, 6, 4, depth)
    assert tree.speed(curve) == pytest.approx(rows["tree of 60"]["speedup"][1], rel=0.1)
    chain, measured = when.chain_of(tree._replace(nodes=16), 6, 0.72), rows["hierarchical"]
    steps, verification = chain.costs(curve)
    of_the_middle = measured["levels"][1]["forwards"] / measured["levels"][0]["forwards"]
    assert chain.steps == pytest.approx(of_the_middle, rel=0.05)
    assert verification == pytest.approx(measured["verification_seconds"] / first, rel=0.1)
    middle = units["a token of the small model"] / first
    speed = chain.tokens / (middle * steps + verification)
    assert 1 < speed / measured["speedup"][1] < 1.5


def test_a_folder_without_results_is_said(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(BadInput, match="x.json"):
        list(when.cost_files(tmp_path))
