"""Compiled libraries: whole or compiled again, and quick ones until the complete one is there."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_kernels import FORMATS, packed, random_weights

import building
import generate
import kernels
from building import Build
from costs import assume_costs, assumed_seconds, contestants
from gpt_spec import Decoder

METHODS = ["lookup", "tree", "auto", "hierarchical"]

pytestmark = pytest.mark.skipif(not kernels.load(), reason="no kernels were compiled here")

# It says that it was called, waits if it has to, and copies the true library.
COMPILER = """#!/bin/sh
echo compiled >> "{log}"
n=0
while [ -n "$WAIT_FOR" ] && [ ! -e "$WAIT_FOR" ] && [ $n -lt 600 ]; do sleep 0.05; n=$((n + 1)); done
while [ "$1" != -o ]; do shift; done
cat "{library}" > "$2"
"""
# generate.py, which asks CALLS times which bodies there are, and then waits for the complete ones.
WAITING = """
import os, sys
from kernels import Bodies
said, real = [], Bodies.is_quick
def is_quick(self):
    if len(said) == CALLS:
        open(os.environ["WAIT_FOR"], "w").close()
        self.building.wait()
    said.append(real(self))
    return said[-1]
Bodies.is_quick = is_quick
import generate
status = generate.main(sys.argv[1:])
print(sum(said), len(said), file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture
def copier(tmp_path, monkeypatch):
    """A compiler that copies the library which has been compiled here, into a cache of its own; its log."""
    unsealed = tmp_path / "unsealed"
    unsealed.write_bytes(Build.of(kernels.PATH).library.read_bytes()[:-32])
    return use_compiler(tmp_path, monkeypatch, COMPILER.format(log=tmp_path / "log", library=unsealed))


def use_compiler(folder, monkeypatch, script):
    compiler = folder / "compiler"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("CXX", str(compiler))
    return folder / "log"


@pytest.fixture(scope="module")
def quick_library():
    """Compiled in earnest."""
    return Build.of(kernels.PATH, quick=True).make().library


def test_a_library_that_was_cut_off_is_compiled_again(tmp_path, copier):
    """Or changed, or of a version that did not seal it."""
    build = Build.of(kernels.PATH).make()
    library, whole = build.library, build.library.read_bytes()
    assert build.is_made() and build.make() == build
    calls = copier.read_text().count("compiled")  # one for each source, and one that puts them together
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for i, damaged in enumerate((whole[:middle], b"", whole[:-1], whole[:-32], changed), start=2):
        library.write_bytes(damaged)
        assert not build.is_made()
        assert build.make().library.read_bytes() == whole
        assert copier.read_text().count("compiled") == i * calls
    kept = {path.name for path in (tmp_path / "gpt_spec").iterdir()}
    assert kept == {library.name, library.with_suffix(".lock").name}
    library.write_bytes(whole[:middle])
    command = [sys.executable, "-c", "import kernels; print(kernels.load())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n")


def operands():
    """Arguments of every operator but linear."""
    torch.manual_seed(0)
    x, heads = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 4, 16).bfloat16()
    cache, slots = torch.randn(2, 2, 300, 2, 16).bfloat16(), torch.tensor([[5, 6, 7], [0, 1, 299]])
    logits, positions = 4 * torch.randn(2, 3, 700), torch.arange(6).view(2, 3)
    seen, length = torch.ones(3, 3).tril().bool().expand(2, 3, 3), torch.tensor([290, 2])
    settings = torch.tensor([[1.0, 1.4426950408889634, 40, 0.9, -3.0], [0, 1, 0, 1, -torch.inf]]).double()
    tokens, counts = torch.randint(700, (2, 3)), torch.randint(3, (2, 700), dtype=torch.int32)
    penalties, bias = torch.tensor([[1.3, 0.2, 0.1]] * 2), torch.randn(2, 700)
    mask = torch.randint(-(2**31), 2**31, (2, 3, 22), dtype=torch.int32)
    angles = torch.randn(2, 2, 3, 1, 8)
    return {
        "rms_norm": (x, x[0, 0], 1e-5),
        "rotate": (x, torch.ones(1, 1), 32, 2),
        "pick": (logits, positions, torch.tensor([3, -4]), settings),
        "gumbel": (torch.tensor([3, -4]), positions, 100),
        "penalize": (logits, tokens, seen, counts, penalties, bias, mask),
        "logsumexp": (logits,),
        "top_k": (logits, 9),
        "rope": (heads, heads[:, :, :2], angles[0], angles[1]),
        "store": (cache[0], cache[1], heads[:, :, :2], heads[:, :, 2:], slots),
        "attention": (heads, cache[0], cache[1], seen, length),
        "move": ([cache[0].clone(), cache[1].clone()], torch.tensor([[0, 2], [1, 2]]), length),
    }


def same(ours, theirs) -> bool:
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, (list, tuple)):
        return all(same(*pair) for pair in zip(ours, theirs, strict=True))
    return ours == theirs or ours is None and theirs == ()


def test_quick_bodies_have_the_same_bits(quick_library):
    functions, quick, usual = ctypes.CDLL(str(quick_library)), operands(), operands()
    assert set(quick) | {"linear"} == set(kernels.OPERATIONS)
    for name, arguments in quick.items():
        ours = kernels.direct(functions, name)(*arguments)
        theirs = getattr(torch.ops.gpt_spec, name)(*usual[name])
        assert same(ours, theirs) and same(list(arguments), list(usual[name])), name


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("turned", [False, True])
def test_quick_linears_have_the_same_bits(quick_library, form, turned):
    """With all that may come before and after."""
    linear = kernels.direct(ctypes.CDLL(str(quick_library)), "linear")
    *weights, bits = random_weights(form, 100, 96, 32)
    for n in (1, 7, 20):
        x, residual = torch.randn(n, 96 * (1 + turned)).bfloat16(), torch.randn(n, 100).bfloat16()
        before = (None if turned else torch.rand(96).bfloat16(), 1e-5, turned)
        order = (torch.ones(1, 1), 32, 1, torch.randperm(96).int()) if turned else (None, 1, 1, None)
        bias = None if turned else torch.randn(100).bfloat16()
        arguments = (x, *packed(*weights), bias, residual, *before, *order, 100, bits, n == 7)
        assert same(linear(*arguments), torch.ops.gpt_spec.linear(*arguments))


def test_quick_bodies_refuse_what_the_others_refuse(quick_library):
    functions = ctypes.CDLL(str(quick_library))
    with pytest.raises(RuntimeError, match="top_k: 9 of 5"):
        kernels.direct(functions, "top_k")(torch.randn(2, 5), 9)


@pytest.mark.parametrize("how", ["", "--compile none", *(f"--method {m}" for m in METHODS)])
def test_bodies_change_in_mid_text(tmp_path, quick_library, copier, how, capsys):
    flags = ["--prompt", "def f(", "--max_new_tokens", "40", "--precision", "w4a8", "--temperature", "1"]
    flags += ["--ignore_eos", "--json", *how.split()]
    assert generate.main(flags) == 0
    expected = json.loads(capsys.readouterr().out)["outputs"]
    outputs, log = run_cold(quick_library, flags, 8)
    assert outputs == expected and "quick ones first" in log
    quick, calls = map(int, log.split()[-2:])
    assert quick == 8 < calls  # both were in place for some steps


def test_a_compiler_that_fails_in_the_background(tmp_path, quick_library, monkeypatch):
    use_compiler(tmp_path, monkeypatch, "#!/bin/sh\necho no more memory, error >&2\nexit 1\n")
    outputs, log = run_cold(quick_library, ["--prompt", "def f(", "--max_new_tokens", "40", "--json"], 5)
    assert len(outputs[0]["token_ids"]) == 40
    assert (
        log.count("the kernels cannot be compiled, going on with the quick ones: no more memory, error") == 1
    )


def run_cold(quick_library, flags, calls):
    """generate.py with a cache that has the quick library alone -> (its outputs, its messages)."""
    there = Build.of(kernels.PATH, quick=True).library  # its name depends on the compiler
    shutil.copy(quick_library, there)
    command = [sys.executable, "-c", WAITING.replace("CALLS", str(calls)), *flags]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"WAIT_FOR": f"{there}.go"}
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)["outputs"], ran.stderr


def test_all_sources_are_compiled():
    parts = {name for quick in (True, False) for part in Build.of("portable", quick).parts for name in part}
    there = {path.name for pattern in ("*.cpp", "*.h") for path in ROOT.glob(pattern)}
    assert parts | set(building.HEADERS) == set(building.SOURCES) == there


@pytest.mark.parametrize("method", ["auto", "hierarchical"])
def test_assumed_costs_are_of_one_kind(method):
    """For every drafter that `auto` compares, and for the tree inside a hierarchy."""
    args = generate.build_parser().parse_args(["--method", method])
    target = generate.load_target(args)
    _, drafter = generate.build_drafter(args, target)
    Decoder(target.model, drafter, max_length=64)
    assume_costs(drafter)
    asking = list(contestants(drafter).values()) if method == "auto" else [drafter.level.drafter]
    assert len(asking) == (4 if method == "auto" else 1)
    assert all(each.pace.seconds == {n: assumed_seconds(n) for n in each.draft_sizes()} for each in asking)
