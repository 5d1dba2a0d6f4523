"""The figures: drawn from result files made up here, of the layout that bench.py writes."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import draw  # noqa: E402
import tables  # noqa: E402

NEEDS_MATPLOTLIB = pytest.mark.skipif(draw.matplotlib is None, reason="matplotlib is not installed")


def row(speedup: float) -> dict:
    both = [speedup - 0.1, speedup, speedup + 0.1]
    return {
        "speedup": both,
        "speedup_over_bf16": both,
        "predicted": 1.05 * speedup,
        "against_auto": both,
        "tokens_per_step": 2.0,
        "drafting_seconds": 1e-3,
        "verification_seconds": 2e-3,
        "tokens_per_second": 500.0,
        "time_to_first_token_seconds": 0.01,
        "different_texts": 0,
    }


def real_row(speedup: float) -> dict:
    kinds = {"qa": {"prompts": 6, "tokens_per_step": 1.5, "speedup": 3 * [speedup]}}
    return row(speedup) | {"speedup_of_totals": speedup, "occupancy": 1.0, "categories": kinds}


def write_results(folder) -> None:
    """One file of each kind, two precisions, a few methods."""
    cost = {p: {"verification": {"1": 1.0, "8": 1.5, "64": k}, "drafting": {}} for p, k in PRECISIONS.items()}
    names = ["autoregressive", "lookup K=3", "tree of 60", "tree", "hierarchical", "auto"]
    methods = {p: {name: row(0.5 + i / 4) for i, name in enumerate(names)} for p in PRECISIONS}
    verdict = {"ratio": 0.91, "spread": 0.03, "within": False}
    verdicts = {"against_best_fixed": verdict, "against_autoregressive": verdict, "chosen": {"tree": 3}}
    auto = {f"python-7m {p} batch 1": {"methods": methods[p]} | verdicts for p in PRECISIONS}
    synthetic = {p: {name: row(1.5) | {"note": "drawn"} for name in names} for p in PRECISIONS}
    points = [{"steepness": s, "middle": s / 10 if s < 16 else None} for s in (1, 2, 4, 8, 16)]
    border = {"head": 0.05, "chain": 0.72, "points": points}
    place = {"steepness": 1.16, "middle": 0.19, "head": 0.05, "tree": 3.1, "hierarchy": {"0.72": 2.2}}
    machines = {f"gpu_cost_70b w4a16, {kind}": place for kind in ("in w4a8", "of the small model")}
    for name, results in {
        "when.json": {"borders": {"d = 0.05, q = 0.72": border}, "machines": machines},
        "cpu_cost.json": cost,
        "cpu_cost_1b.json": cost,
        "cpu_methods.json": methods,
        "cpu_auto.json": auto,
        "cpu_synthetic.json": synthetic,
        draw.REAL: {p: {name: real_row(0.5 + i / 4) for i, name in enumerate(names)} for p in PRECISIONS},
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
    shipped = {"cost", "methods", "predicted", "auto", "specmquant", "synthetic", "when"}
    assert set(files) == shipped | {"smollm2_methods", "smollm2_predicted"}
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


def test_tables_hold_what_was_measured(monkeypatch, tmp_path, capsys):
    write_results(tmp_path)
    quality = {"bf16": {"perplexity": 20.786, "agreement": 1.0, "positions": 9}}
    about = {"date": "2026-01-01", "torch": "2", "device": "a test", "commit": "0"}
    solved = {"solved": 3, "problems": 9, "same_answers": 8, "cut_off": 1}
    solved |= {"solution_loss": 1.25, "solution_agreement": 0.6}
    both = {"bf16": quality["bf16"] | solved}
    for name, results in {
        "cpu_quality.json": quality, "cpu_lm_head.json": quality,
        "smollm2_quality.json": both, "smollm2_code.json": both,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(json.dumps(about | {"results": results}))
    alike = {"smollm2_sampled": "smollm2_methods", "smollm2_batches": "smollm2_methods"}
    alike |= {"smollm2_auto": "cpu_auto", "smollm2_auto_sampled": "cpu_auto"}
    for name, like in (alike | {"cpu_synthetic_8b": "cpu_synthetic"}).items():
        (tmp_path / f"{name}.json").write_text((tmp_path / f"{like}.json").read_text())
    output = tmp_path / "tables.md"
    monkeypatch.setattr(sys, "argv", ["tables.py", "--results", str(tmp_path), "--output", str(output)])
    assert tables.main() == 0
    text = output.read_text()
    assert text.count("\n## ") == len(tables.TABLES) and text.count("a test") == len(tables.TABLES)
    for cells in (
        "| `w4a16` | 1000.00 | 1.00 | 1.50 | 9.00 |",
        "| tree | 2.00 | 0.50 | 1.00 | 500 | 1.31 | 1.25 (1.15 to 1.35) | 1.25 | 10 ms |",
        "| python-7m bf16 batch 1 | 1.75 (1.65 to 1.85) | hierarchical, 1.50 | 0.91 (IQR 0.03), **not",
        "| `bf16` | 20.79 | 100.00% |",
        "| d = 0.05, q = 0.72 | 0.100 | 0.200 | 0.400 | 0.800 | never |",
        "| gpu_cost_70b w4a16, of the small model | 1.16 | 0.19 | 0.05 | 3.10 | 2.20 |",
        "| `bf16` | 20.79 | 100.00% | 3 of 9 | 1.250 | 60.0% | 8 | 1 |",
        "| tree | 2.00 | 0.50 | 1.00 | 500 | 1.31 | 1.25 | 1.25 (1.15 to 1.35) | 1.25 | 10 ms |",
        "| `w4a16` | 1.75 | hierarchical, 1.50 | 1.17 | 1.00 | 0 |",
        "| qa | 6 | 1.50, 0.75 | 1.50, 1.00 | 1.50, 1.25 | 1.50, 1.50 | 1.50, 1.75 |",
        "Every row: drawn.",
        "Predicted and measured differ by 5.0%",
    ):
        assert cells in text
    (tmp_path / "cpu_methods.json").write_text('{"results": {"bf16": 3}}')
    assert tables.main() == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "cpu_methods.json" in line and "python bench.py methods" in line and output.read_text() == text
