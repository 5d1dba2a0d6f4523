"""The GPU pass without a GPU: its checks on the CPU bodies, its parts as small processes, its table with
numbers made up here."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import NEEDS_EQUAL_ROWS, ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import gpu_pass  # noqa: E402
from gpu_pass import Part  # noqa: E402

import bench  # noqa: E402
import kernels  # noqa: E402
from model import ModelConfig  # noqa: E402

TINY = ModelConfig(192, 128, 256, 1, 2, 1, 64, 1024)


@NEEDS_EQUAL_ROWS
def test_every_check_holds_on_the_cpu():
    results = gpu_pass.run_checks({"tiny": TINY}, "cpu", 1e9)
    names = [check["name"] for check in results["checks"]]
    assert [check for check in results["checks"] if not check["right"]] == []
    assert results["bodies"] == kernels.PATH and results["not_reached"] == 0
    assert len(names) == len(set(names)) > 60 and "tiny o w4a4, groups of 32, zeros" in names
    for operation in (
        "attention",
        "rms_norm",
        "rotate inner float32",
        "gumbel",
        "logsumexp",
        "top_k",
        "rope",
        "store",
        "move",
    ):
        assert f"tiny {operation}" in names
    assert sum(name.startswith("tiny pick ") for name in names) == 2 * len(gpu_pass.RULES)


def test_time_ends_the_checks():
    results = gpu_pass.run_checks({"tiny": TINY}, "cpu", -1)
    assert results["checks"] == [] and results["not_reached"] > 60


def wrong_scale(x, weight, scales=None, *others, **options):
    return LINEAR(x, weight, None if scales is None else 1.1 * scales, *others, **options)


def lonely_rows(x, *others, **options):
    return LINEAR(x, *others, **options) * (1 + (len(x) == 1) * 2**-7)


def broken(x, *others, **options):
    raise RuntimeError("out of something\nmore about it")


LINEAR = kernels.linear


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("body", [wrong_scale, lonely_rows, broken])
def test_a_wrong_linear_is_found_and_nothing_else(monkeypatch, body, capsys):
    monkeypatch.setattr(kernels, "linear", body)
    results = gpu_pass.run_checks({"tiny": TINY}, "cpu", 1e9)
    json.loads(json.dumps(results, allow_nan=False))
    linears = [c for c in results["checks"] if "a16" in c["name"] or "a8" in c["name"] or "a4" in c["name"]]
    others = [c for c in results["checks"] if c not in linears and "bf16" not in c["name"].split()]
    assert not any(c["right"] for c in linears) and all(c["right"] for c in others) and len(others) > 8
    assert all(c["rows_equal"] == (body is wrong_scale) for c in linears)
    if body is broken:
        assert {c["reason"] for c in linears} == {"RuntimeError: out of something"}
    lines = gpu_pass.check_lines({"checks": {"results": results}})
    assert f"{len(others)} of {len(results['checks'])} right" in lines[0] or body is wrong_scale
    assert len(lines) == 13 and "wrong: tiny qkv w4a16" in lines[1]


def run(parts: list[Part], folder, minutes: float = 1.0) -> dict:
    return gpu_pass.run_all(parts, minutes, folder, {"report": "gpu_pass"})


def test_parts_fail_and_end_by_themselves(tmp_path, capsys):
    good = Part("good", ["-c", "print('a line'); print('{\"a\": 1}'); print('warning: late')"], 20)
    bad = Part("bad", ["-c", "open('/some/where/or other/x')"], 20)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    slow = Part("slow", ["-c", f"print('begun', flush=True); {child}"], 0.7)
    late = Part("late", ["-c", "print('never')"], 20, least=1000)
    outcomes = run([good, bad, slow, late], tmp_path)
    assert [part["status"] for part in outcomes.values()] == ["ok", "failed", "timed out", "skipped"]
    assert outcomes["good"]["results"] == {"a": 1} and outcomes["slow"]["last_lines"] == ["begun"]
    assert outcomes["good"]["last_lines"] == ["a line", "warning: late"] and outcomes["slow"]["seconds"] < 5
    assert outcomes["bad"]["exit_status"] == 1 and "FileNotFoundError" in outcomes["bad"]["last_lines"][-1]
    assert gpu_pass.went_wrong(outcomes) and not gpu_pass.went_wrong({"good": outcomes["good"]})
    file = json.loads((tmp_path / "gpu_pass.json").read_text())
    assert file["parts"] == outcomes and file["report"] == "gpu_pass"
    table = "\n".join(file["table"])
    assert "FileNotFoundError" in table and "skipped" in table and "timed out in 1 s  begun" in table


def test_untimed_parts_run_together_and_timings_alone(tmp_path, capsys):
    """Each of the first two ends only when it has seen the other begin; a timing finds them both ended."""
    meet = (
        "import pathlib, sys, time; mine, other = map(pathlib.Path, sys.argv[1:]); mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "print(mine.name)"
    )
    paths = [str(tmp_path / name) for name in ("a", "b")]
    together = [Part("checks a", ["-c", meet, *paths], 20), Part("exact", ["-c", meet, *paths[::-1]], 20)]
    other = Part("tests", ["-c", "print('never')"], 20, least=1000)
    timings = [Part(f"cost {name}", ["-c", "print(1)"], 20) for name in ("a", "b")]
    parts = [*together, other, *timings]
    assert gpu_pass.batches(parts) == [[*together, other], timings[:1], timings[1:]]
    outcomes = run(parts, tmp_path)
    assert {name: part["status"] for name, part in outcomes.items()} == {
        "tests": "skipped",
        **dict.fromkeys(("checks a", "exact", "cost a", "cost b"), "ok"),
    }
    assert outcomes["checks a"]["last_lines"] == ["a"] and outcomes["exact"]["last_lines"] == ["b"]
    assert list(outcomes)[-2:] == ["cost a", "cost b"]


@pytest.mark.parametrize("given", [None, "3"])
def test_untimed_parts_have_one_thread_each(monkeypatch, tmp_path, capsys, given):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    show = ["-c", "import os; print(os.environ.get('OMP_NUM_THREADS'))"]
    kinds = ("tests", "checks", "exact", "kernels", "cost", "synthetic", "compiled", "tune")
    outcomes = run([Part(f"{kind} x", show, 20) for kind in kinds], tmp_path)
    threads = {name.split()[0]: part["last_lines"] for name, part in outcomes.items()}
    assert threads == {
        kind: [given or ("1" if kind in ("tests", "checks", "exact") else "None")] for kind in kinds
    }


def test_rows_of_a_part_that_ran_out_of_time_are_kept(tmp_path, capsys):
    rows = {"results": {"w4a16 tree": {"texts": 8, "different": 0}}}
    write = f"import pathlib, sys, time; pathlib.Path(sys.argv[2]).write_text({json.dumps(rows)!r})"
    slow = Part("exact", ["-c", f"{write}; time.sleep(60)"], 2, "gpu_exact.json")
    (tmp_path / "gpu_exact.json").write_text('{"results": "of an earlier run"}')
    outcomes = run([slow, Part("compiled", ["-c", "1 / 0"], 20, "gpu_exact.json")], tmp_path)
    assert outcomes["exact"]["status"] == "timed out" and outcomes["exact"]["results"] == rows
    assert outcomes["compiled"]["status"] == "failed" and outcomes["compiled"]["results"] is None
    assert "exact: 0 of 8 texts differ" in "\n".join(gpu_pass.table(outcomes))


def test_folders_of_the_machine_are_not_recorded():
    line = 'File "/home/me/a-b/lib.py", line 3: see https://example.com/a/b or /tmp/x.so, 3/4 of it and a / b'
    short = 'File "lib.py", line 3: see https://example.com/a/b or x.so, 3/4 of it and a / b'
    assert gpu_pass.anonymous(line) == short


def test_the_commands_of_all_parts_are_understood():
    parts = gpu_pass.plan(["llama-3-8b", "llama-3-70b"], "cpu")
    assert len({part.name for part in parts}) == len(parts)
    files = [part.file for part in parts if part.file]
    assert len(set(files)) == len(files) and all(name.startswith("gpu_") for name in files)
    assert [part.name for part in gpu_pass.batches(parts)[0]] == [
        "tests",
        "checks llama-3-8b",
        "checks llama-3-70b",
        "exact",
    ]
    reports = set()
    for part in parts:
        script, *flags = part.command
        if script == "bench.py":
            args = bench.build_parser().parse_args([*flags, "--output", part.file])
            bench.check_arguments(args)
            reports.add(args.report)
            if args.report == "synthetic" and "70b" in args.shape:
                assert args.acceptance == "eagle2-70b" and args.precisions == "w4a16,w4a8"
        elif script != "-m":
            assert gpu_pass.build_parser().parse_args([*flags, "--seconds", "9"]).only in ("checks", "tune")
    assert reports == {"kernels", "cost", "exact", "synthetic"} <= set(bench.ON_GPU)


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_pass.main(["--output", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == "gpu_pass.py: there is no GPU here, so nothing is run\n"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "flags, reason", [(["--shapes", "llama-9"], "llama-9"), (["--parts", "no"], "--parts"), ([], "--output")]
)
def test_bad_flags(capsys, tmp_path, flags, reason):
    output = ["--output", str(tmp_path)] if flags else []
    with pytest.raises(SystemExit) as stop:
        gpu_pass.main(["--device", "cpu", *flags, *output])
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def made_up() -> dict[str, dict]:
    """Results of all parts, as their JSON has them, with round numbers."""

    def part(results: dict, status: str = "ok", **more) -> dict:
        wrapped = {"results": results} if "checks" not in results else results
        return {"status": status, "seconds": 9.0, "last_lines": [], "results": wrapped} | more

    def linear(seconds: float, nbytes: float) -> dict:
        return {"seconds": {str(n): seconds for n in (1, 2, 4, 8, 16, 32, 64)}, "bytes": nbytes}

    rows = {"w4a16": linear(1e-5, 1e7), "torch int4": linear(2e-5, 1e7), "torch bf16": linear(4e-5, 4e7)}
    linears = {"linears": rows, "failed": {"w8a8": "RuntimeError: no"}}
    costs = {"verification": {"1": 0.01, "8": 0.011, "16": 0.012, "60": 0.02}, "share_of_copy": {"1": 0.75}}
    speeds = {"autoregressive": 1.0, "tree of 60": 1.5, "hierarchical": 2.4}
    methods = {name: {"speedup": [speed - 0.1, speed, speed + 0.1]} for name, speed in speeds.items()}
    return {
        "tests": part({}, last_lines=["..", "=== 12 passed, 3 skipped in 40 s ==="]),
        "kernels llama-3-8b": part({"x qkv": linears, "x o": linears, "copy_bandwidth": 2e12}),
        "cost llama-3-70b": part({"w4a16": costs}),
        "exact": part(
            {"w4a16 lookup": {"texts": 20, "different": 1}, "w4a16 tree": {"texts": 20, "different": 0}}
        ),
        "synthetic llama-3-70b": part({"w4a16": methods}),
    }


def test_the_table_has_the_ratios():
    text = "\n".join(gpu_pass.table(made_up()))
    for cells in (
        "ok in 9 s  12 passed, 3 skipped in 40 s",
        "llama-3-8b     w4a16 / torch int4         2.00   2.00",
        "llama-3-8b     w4a16 / torch bf16         4.00   4.00",
        "llama-3-8b     w4a16                      0.50   0.50",  # 1e7 bytes in 1e-5 s, of 2e12 a second
        "x qkv w8a8 FAILED: RuntimeError: no",
        "llama-3-70b    w4a16              10.00 ms   0.75   1.10   1.20   2.00",
        "exact: 1 of 40 texts differ",
        "w4a16 lookup: 1 of 20",
        "tree of 60 1.50  hierarchical 2.40",
        "2.40 over autoregressive, 1.60 over the tree of 60 (SpecMQuant, Llama-3-70B W4A16: 2.78, 1.31)",
    ):
        assert cells in text
    outcomes = made_up()
    assert gpu_pass.went_wrong(outcomes)  # a text differs and w8a8 did not run
    del outcomes["exact"], outcomes["kernels llama-3-8b"]
    assert not gpu_pass.went_wrong(outcomes)
    outcomes["cost llama-3-70b"]["results"] = {"results": {"w4a16": {"verification": {}}}}
    assert "cost_lines: the results are incomplete" in "\n".join(gpu_pass.table(outcomes))


def test_tiles_are_tried_around_those_in_use():
    @dataclass(frozen=True)
    class Tiles:
        block_out: int
        split: int
        warps: int
        stages: int

    plans = gpu_pass.candidates(Tiles(64, 2, 4, 4))
    assert plans[0] == Tiles(64, 2, 4, 4) and len(set(plans)) == len(plans) > 15
    seconds = {"1": {"a": 1.0, "b": 1.1, "c": 0.9}, "64": {"a": 3.0, "b": 1.0}}
    assert gpu_pass.best_for_all(seconds) == "b"
