"""The GPU pass without a GPU: its checks on the CPU bodies, its parts as small processes, its table with
numbers made up here, and all of it once with a kernel that is broken."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from conftest import NEEDS_EQUAL_ROWS, ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import gpu_checks  # noqa: E402
import gpu_pass  # noqa: E402
import gpu_tiles  # noqa: E402
from gpu_pass import Part  # noqa: E402

import bench  # noqa: E402
import kernels  # noqa: E402
from model import ModelConfig  # noqa: E402

TINY = {"tiny": ModelConfig(192, 128, 256, 1, 2, 1, 64, 1024)}
SMALL_OPERATIONS = {"attention", "rms_norm", "rotate", "pick", "gumbel", "logsumexp", "top_k", "rope"}
SMALL_OPERATIONS |= {"store", "move"}


@NEEDS_EQUAL_ROWS
def test_every_check_holds_on_the_cpu():
    """And names an operation, or a form of a linear, that GPT_SPEC_REFERENCE understands."""
    results = gpu_checks.run_checks(TINY, "cpu", 1e9)
    checks = results["checks"]
    names, operations = ([check[key] for check in checks] for key in ("name", "operation"))
    assert [check for check in checks if not check["right"]] == []
    assert results["bodies"] == kernels.PATH and results["not_reached"] == 0
    assert len(names) == len(set(names)) > 60 and "tiny o w4a4, groups of 32, zeros" in names
    forms = {name for name in operations if re.fullmatch(kernels.FORM, name)}
    assert set(operations) - forms == SMALL_OPERATIONS < set(kernels.OPERATIONS) and len(forms) > 20
    assert sum(name.startswith("tiny pick ") for name in names) == 2 * len(gpu_checks.RULES)


@NEEDS_EQUAL_ROWS
def test_the_operation_of_a_check_is_what_it_runs(monkeypatch):
    """With all of a form on the reference, the checks of that form, and no other, have no error at all."""
    form = "linear w4a16, groups of 32, zeros"
    monkeypatch.setattr(kernels, "ON_REFERENCE", frozenset({form}))
    checks = gpu_checks.run_checks(TINY, "cpu", 1e9)["checks"]
    linears = [check for check in checks if "w4a16" in check["operation"]]
    assert {check["operation"] for check in linears if check["error"] == 0} == {form}


def test_time_ends_the_checks():
    results = gpu_checks.run_checks(TINY, "cpu", -1)
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
    results = gpu_checks.run_checks(TINY, "cpu", 1e9)
    json.loads(json.dumps(results, allow_nan=False))
    linears = [c for c in results["checks"] if c["operation"].startswith("linear w")]
    others = [c for c in results["checks"] if not c["operation"].startswith("linear")]
    assert not any(c["right"] for c in linears) and all(c["right"] for c in others) and len(others) > 8
    assert all(c["rows_equal"] == (body is wrong_scale) for c in linears)
    outcomes = {"checks tiny": {"results": results}}
    operations = {c["operation"] for c in results["checks"] if c["operation"].startswith("linear")}
    reasons = dict.fromkeys(operations, "RuntimeError: out of something") if body is broken else {}
    assert gpu_pass.broken_operations(outcomes) == reasons
    lines = gpu_pass.check_lines(outcomes)
    assert f"{len(others)} of {len(results['checks'])} right" in lines[0] or body is wrong_scale
    assert len(lines) == 13 and "wrong: tiny qkv w4a16" in lines[1]


def test_checks_go_on_in_a_new_process_where_the_device_is_lost(monkeypatch, tmp_path, capsys):
    """The third check costs the process its device: the next one has what is known, and less time."""
    found, begun, file = [], [], tmp_path / "checks.json"

    def three(configs, device):
        for name, how in (("a", good), ("b", good), ("c", broken), ("d", good)):
            yield name, "pick", lambda name=name, how=how: found.append(name) or how(None)

    def good(x):
        return gpu_checks.Check(0.0, 0.0, True)

    def execv(program, command):
        begun.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(gpu_checks, "all_checks", three)
    monkeypatch.setattr(gpu_checks, "is_lost", lambda device: found[-1] == "c")
    monkeypatch.setattr(gpu_checks.os, "execv", execv)
    flags = ["--device", "cpu", "--shapes", "tiny", "--output", str(file), "--seconds", "60"]
    with pytest.raises(SystemExit):
        gpu_checks.main(flags)
    again = begun[0][-3:]
    assert found == ["a", "b", "c"] and again[:2] == ["--resume", "--seconds"] and 0 < float(again[2]) < 60
    assert [check["name"] for check in json.loads(file.read_text())["checks"]] == found
    assert gpu_checks.main([*flags, *again]) == 1 and found == ["a", "b", "c", "d"]
    results = json.loads(file.read_text())
    assert [check["reason"] for check in results["checks"]] == ["", "", "RuntimeError: out of something", ""]
    assert "lost" not in results and json.loads(capsys.readouterr().out.splitlines()[-1]) == results


@NEEDS_EQUAL_ROWS
def test_a_broken_kernel_does_not_cost_the_pass(tmp_path):
    """Attention raises an error in a copy of the checkout, unless it is on the reference."""
    skipped = shutil.ignore_patterns(".*", "tests", "docs", "results", "figures", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=skipped)
    with (copy / "kernels.py").open("a") as file:
        file.write(
            """

def attention(*arguments):
    if "attention" not in ON_REFERENCE:
        raise RuntimeError("out of something\\nmore about it")
    return operator("attention")(*arguments)
"""
        )
    command = ["scripts/gpu_pass.py", "--device", "cpu", "--shapes", "tiny", "--minutes", "5", "--output"]
    output = tmp_path / "results"
    ran = subprocess.run([sys.executable, *command, output], cwd=copy, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr  # a check has failed
    file = json.loads((output / "gpu_pass.json").read_text())
    assert ran.stdout.endswith("\n".join(file["table"]) + "\n")
    status = {name: part["status"] for name, part in file["parts"].items()}
    assert status.pop("checks tiny") == "failed" and set(status.values()) == {"ok"}, ran.stdout
    assert [*status] == ["exact w4a16", "linears", "step tiny", "table tiny", "batches tiny"]
    assert "    attention: RuntimeError: out of something" in file["table"]
    for part in file["parts"]:
        results = file["parts"][part]["results"]
        assert results["bodies" if "checks" in part else "kernels"].endswith("for attention") == (
            "checks" not in part
        )
    assert {path.name for path in output.iterdir()} > {
        "gpu_checks_tiny.json",
        "gpu_step.json",
        "gpu_table.json",
    }


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
    together = [Part("checks a", ["-c", meet, *paths], 20), Part("checks b", ["-c", meet, *paths[::-1]], 20)]
    other = Part("exact", ["-c", "print('never')"], 20, least=1000)
    timings = [Part(f"step {name}", ["-c", "print(1)"], 20) for name in ("a", "b")]
    parts = [*together, other, *timings]
    assert gpu_pass.batches(parts) == [together, [other], timings[:1], timings[1:]]
    outcomes = run(parts, tmp_path)
    assert {name: part["status"] for name, part in outcomes.items()} == {
        "exact": "skipped",
        **dict.fromkeys(("checks a", "checks b", "step a", "step b"), "ok"),
    }
    assert outcomes["checks a"]["last_lines"] == ["a"] and outcomes["checks b"]["last_lines"] == ["b"]
    assert list(outcomes)[-2:] == ["step a", "step b"]


def test_what_follows_a_broken_kernel_is_told(tmp_path, monkeypatch, capsys):
    """Through the environment, which may name operations already."""
    monkeypatch.setenv(gpu_pass.REFERENCE, "rope")
    show = ["-c", f"import os; print(os.environ[{gpu_pass.REFERENCE!r}])"]
    check = {"name": "x pick", "operation": "pick", "reason": "E: no", "right": False, "error": None}
    results = {"bodies": "triton", "not_reached": 0, "checks": [check | {"rows_equal": False}]}
    tell = ["-c", f"print({json.dumps(results)!r})"]
    outcomes = run([Part("checks x", tell, 20), Part("step x", show, 20)], tmp_path)
    assert outcomes["step x"]["last_lines"] == ["rope;pick"]
    assert "    pick: E: no" in gpu_pass.table(outcomes)


def test_what_is_running_is_on_disk(monkeypatch):
    """Should it never end; and not any more when it has."""
    good, saved = (lambda: gpu_checks.Check(0.0, 0.0, True)), []
    monkeypatch.setattr(gpu_checks, "all_checks", lambda *_: [("a", "rope", good), ("b", "pick", good)])
    gpu_checks.run_checks(
        TINY, "cpu", 1e9, save=lambda results: saved.append(json.loads(json.dumps(results)))
    )
    assert [results.get("running") for results in saved] == ["rope", None, "pick", None]
    assert [len(results["checks"]) for results in saved] == [0, 1, 1, 2]


def test_a_kernel_that_hangs_does_not_hang_twice(tmp_path, monkeypatch, capsys):
    """What was running when the time was up is on the reference afterwards, unless it had only begun."""
    monkeypatch.delenv(gpu_pass.REFERENCE, raising=False)
    results = {"bodies": "triton", "not_reached": 0, "checks": [], "running": "pick", "since": time.time()}
    hang = f"import pathlib, sys, time; pathlib.Path(sys.argv[2]).write_text({json.dumps(results)!r})"
    show = ["-c", f"import os; print(os.environ[{gpu_pass.REFERENCE!r}])"]
    parts = [Part("checks x", ["-c", f"{hang}; time.sleep(60)"], 3, "checks.json"), Part("step x", show, 20)]
    monkeypatch.setattr(gpu_pass, "HANGS", 0.5)
    outcomes = run(parts, tmp_path)
    assert outcomes["checks x"]["status"] == "timed out" and outcomes["step x"]["last_lines"] == ["pick"]
    table = "\n".join(gpu_pass.table(outcomes))
    assert "    pick: did not end" in table and "the others after pick not reached" in table
    monkeypatch.setattr(gpu_pass, "HANGS", 100.0)
    outcomes = run(parts, tmp_path)
    assert outcomes["checks x"]["status"] == "timed out" and outcomes["step x"]["last_lines"] == []


@pytest.mark.parametrize("given", [None, "3"])
def test_untimed_parts_have_one_thread_each(monkeypatch, tmp_path, capsys, given):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    show = ["-c", "import os; print(os.environ.get('OMP_NUM_THREADS'))"]
    outcomes = run([Part(f"{kind} x", show, 20) for kind in ("checks", "exact", "linears", "step")], tmp_path)
    threads = {name.split()[0]: part["last_lines"] for name, part in outcomes.items()}
    assert threads == {kind: [given or ("1" if kind in gpu_pass.UNTIMED else "None")] for kind in threads}


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
    parts = gpu_pass.plan(["llama-3-8b", "llama-3-70b"], "cuda")
    assert len({part.name for part in parts}) == len(parts)
    files = [part.file for part in parts if part.file]
    assert len(set(files)) == len(files) and all(name.startswith("gpu_") for name in files)
    reports = set()
    for part in parts:
        script, *flags = part.command
        if script == "bench.py":
            flags = [flag if flag != "cuda" else "cpu" for flag in flags]  # there is none here to look for
            args = bench.build_parser().parse_args([*flags, "--output", part.file])
            bench.check_arguments(args)
            reports.add(args.report)
            if args.report == "synthetic":
                assert args.acceptance == "eagle3-70b" and args.batch_sizes in ("1", "1,8")
        elif "checks" in script:
            assert gpu_checks.build_parser().parse_args([*flags, "--seconds", "9"]).shapes in part.name
    assert reports == {"kernels", "cost", "exact", "synthetic"} < set(bench.ON_GPU)


def test_the_parts_fit_into_their_minutes():
    """If each takes all of its budget: the first four kinds into 5 minutes, and three more into 9."""
    batches = gpu_pass.batches(gpu_pass.plan(["llama-3-8b", "llama-3-70b"], "cuda"))
    kinds = [batch[0].kind for batch in batches]
    assert kinds[:7] == ["checks", "exact", "linears", "step", "table", "batches", "tiles"]
    assert set(kinds[7:]) == gpu_pass.ASKED_FOR
    budgets = [max(part.seconds for part in batch) for batch in batches]
    assert sum(budgets[:4]) <= 5 * 60 - 5 and sum(budgets[:7]) <= 9 * 60 - 5


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
    linears = {"linears": rows, "failed": {"w4a8": "RuntimeError: no"}}
    costs = {"verification": {"1": 0.01, "8": 0.011, "16": 0.012, "60": 0.02}, "share_of_copy": {"1": 0.75}}
    speeds = {"autoregressive": 1.0, "tree of 60": 1.5, "hierarchical": 2.4}
    methods = {name: {"speedup": [speed - 0.1, speed, speed + 0.1]} for name, speed in speeds.items()}
    texts = {"w4a16 lookup": {"texts": 20, "different": 1}, "w4a16 tree": {"texts": 20, "different": 0}}
    seconds = {"1": {"a": 2e-6, "b": 1e-6}, "64": {"a": 2e-6, "b": 3e-6}}
    tiles = part({}) | {"results": {"x qkv": {"used": "a", "best_for_all": "b", "seconds": seconds}}}
    return {
        "tests": part({}, last_lines=["..", "=== 12 passed, 3 skipped in 40 s ==="]),
        "linears": part({"x qkv": linears, "x o": linears, "copy_bandwidth": 2e12, "overhead_seconds": 1e-6}),
        "step x": part({"w4a16": costs}),
        "exact w4a16": part(texts),
        "table y": part({"w4a16": methods}),
        "tiles": tiles,
    }


def test_the_table_has_the_ratios():
    text = "\n".join(gpu_pass.table(made_up()))
    for cells in (
        "ok in 9 s  12 passed, 3 skipped in 40 s",
        "x (2 missing)  w4a16 / torch int4         2.00   2.00",
        "x (2 missing)  w4a16 / torch bf16         4.00   4.00",
        "x (2 missing)  w4a16                      0.50   0.50",  # 1e7 bytes in 1e-5 s, of 2e12 a second
        "x qkv w4a8 FAILED: RuntimeError: no",
        "x              w4a16              10.00 ms   0.75   1.10   1.20   2.00",
        "exact w4a16: 1 of 40 texts differ",
        "w4a16 lookup: 1 of 20",
        "y w4a16: tree of 60 1.50  hierarchical 2.40",
        "x qkv                    used     2.0     2.0   b     1.0     3.0",
    ):
        assert cells in text
    outcomes = made_up()
    assert gpu_pass.went_wrong(outcomes)  # a text differs and w4a8 did not run
    del outcomes["exact w4a16"], outcomes["linears"]
    assert not gpu_pass.went_wrong(outcomes)
    outcomes["step x"]["results"] = {"results": {"w4a16": {"verification": {}}}}
    assert "step_lines: the results are incomplete" in "\n".join(gpu_pass.table(outcomes))


def test_tiles_are_tried_around_those_in_use():
    @dataclass(frozen=True)
    class Tiles:
        block_out: int
        split: int
        warps: int
        stages: int

    plans = gpu_tiles.candidates(Tiles(64, 2, 4, 4))
    assert plans[0] == Tiles(64, 2, 4, 4) and len(set(plans)) == len(plans) > 15
    seconds = {"1": {"a": 1.0, "b": 1.1, "c": 0.9}, "64": {"a": 3.0, "b": 1.0}}
    assert gpu_tiles.best_for_all(seconds) == "b"
