"""The figures: drawn from result files made up here, of the layout that bench.py writes."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import draw  # noqa: E402

NEEDS_MATPLOTLIB = pytest.mark.skipif(draw.matplotlib is None, reason="matplotlib is not installed")


def row(speedup: float) -> dict:
    both = [speedup - 0.1, speedup, speedup + 0.1]
    return {
        "speedup": both,
        "speedup_over_bf16": both,
        "predicted": 1.05 * speedup,
        "against_auto": both,
    }


def write_results(folder) -> None:
    """One file of each kind, two precisions, a few methods."""
    cost = {p: {"verification": {"1": 1.0, "8": 1.5, "64": k}, "drafting": {}} for p, k in PRECISIONS.items()}
    names = ["autoregressive", "lookup K=3", "tree of 60", "tree", "hierarchical", "auto"]
    methods = {p: {name: row(0.5 + i / 4) for i, name in enumerate(names)} for p in PRECISIONS}
    auto = {f"python-7m {p} batch 1": {"spread": 0.1, "methods": methods[p]} for p in PRECISIONS}
    synthetic = {p: {name: {"speedup": 1.5, "predicted": 1.4} for name in names} for p in PRECISIONS}
    for name, results in {
        "cpu_cost.json": cost,
        "cpu_cost_1b.json": cost,
        "cpu_methods.json": methods,
        "cpu_auto.json": auto,
        "cpu_synthetic.json": synthetic,
    }.items():
        about = {"date": "2026-01-01", "torch": "2", "device": "a test", "commit": "0"}
        (folder / name).write_text(json.dumps(about | {"results": results}))


PRECISIONS = {"bf16": 3.0, "w4a16": 9.0}


def run(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["draw.py", *map(str, flags)])
    return draw.main()


@NEEDS_MATPLOTLIB
def test_every_figure_is_drawn(monkeypatch, tmp_path, capsys):
    write_results(tmp_path)
    assert run(monkeypatch, "--results", tmp_path, "--output", tmp_path / "figures") == 0
    files = {path.stem: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(files) == {"cost", "methods", "predicted", "auto", "specmquant", "synthetic"}
    for content in files.values():
        assert content.startswith(b"\x89PNG") and 5_000 < len(content) < 100_000
    (tmp_path / "cpu_auto.json").unlink()
    assert run(monkeypatch, "--results", tmp_path, "--output", tmp_path / "figures") == 0
    assert "python bench.py auto" in capsys.readouterr().out  # how to measure what is missing


@NEEDS_MATPLOTLIB
@pytest.mark.parametrize("content", ["{", "[]", '{"results": {}}', '{"results": {"bf16": {"tree": 3}}}'])
def test_a_damaged_file_is_named_and_nothing_is_drawn(monkeypatch, tmp_path, capsys, content):
    write_results(tmp_path)
    (tmp_path / "cpu_methods.json").write_text(content)
    assert run(monkeypatch, "--results", tmp_path, "--output", tmp_path / "figures") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "cpu_methods.json" in line and not (tmp_path / "figures").exists()


def test_without_matplotlib_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(draw, "matplotlib", None)
    assert run(monkeypatch, "--results", tmp_path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "pip install matplotlib" in line
