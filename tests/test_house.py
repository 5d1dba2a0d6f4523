"""The house: budgets of lines, imports without circles, short functions, a README that fits on its page.

They are checked here so that they stay. A file that needs more lines has to become two things.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

import building

BUDGETS = {  # lines of each file; what is not listed may have OTHERS
    "reference.py": 420, "kernels.py": 510, "kernels_cuda.py": 820,
    "sampling_cuda.py": 330, "sampling.py": 350, "sampling.cpp": 440,
    "kernels.cpp": 520, "attention.cpp": 430, "operators.h": 50, "vectors.h": 420, "team.h": 280,
    "tape.cpp": 180, "direct.cpp": 120, "tape.py": 190, "building.py": 160,
    "model.py": 550, "drafts.py": 400, "gpt_spec.py": 1000, "costs.py": 320, "runtime.py": 250,
    "eagle.py": 580, "heads.py": 260, "head_files.py": 380, "check_head.py": 170, "auto.py": 500,
    "packing.py": 400, "rotation.py": 250, "published.py": 560,
    "checkpoints.py": 700, "text.py": 420, "cli.py": 240, "show.py": 300, "quantize.py": 700,
    "generate.py": 770, "bench.py": 270, "chat.py": 300, "rope.py": 250,
    "prompts.py": 120, "process.py": 150, "grammar.py": 230, "forced.py": 140,
    "parallel.py": 250, "serve.py": 375, "api.py": 330, "engine.py": 240,
}  # fmt: skip
OTHERS = 1000
SERVER = {"serve.py", "api.py", "engine.py"}
SERVER_CODE = 625  # lines of these files together without docstrings, comments, imports and blank lines
LONGEST_FUNCTION = 60  # lines; main may be longer
THE_LOOP = 50


def sources() -> list[Path]:
    folders = [ROOT, ROOT / "benchmarks", ROOT / "scripts"]
    return [path for folder in folders for path in sorted(folder.glob("*.py"))]


def functions(path: Path) -> list[tuple[str, int]]:
    """Names and lines of all functions and methods."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in found]


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, by its full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; [] if there is none."""
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        circle = next((c for other in sorted(graph[name]) if (c := visit(other, [*above, name]))), [])
        done.add(name)
        return circle

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_a_file_keeps_to_its_budget(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= BUDGETS.get(str(path.relative_to(ROOT)), OTHERS)


def code_lines(text: str) -> int:
    """Lines without docstrings, comments, imports and blank lines."""
    kinds, lines = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*kinds, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node = node.body[0] if ast.get_docstring(node) is not None else None
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            node = None
        lines -= set(range(node.lineno, node.end_lineno + 1)) if node else set()
    return len(lines)


def test_the_server_is_small():
    assert code_lines('"""A."""\nimport os\n\n\ndef f(x):\n    """B.\n    C."""\n    return x  # D\n') == 2
    assert sum(code_lines((ROOT / name).read_text(encoding="utf-8")) for name in SERVER) <= SERVER_CODE


@pytest.mark.parametrize("name", building.SOURCES)
def test_kernels_for_cpus_keep_to_their_budget(name):
    assert len((ROOT / name).read_text().splitlines()) <= BUDGETS[name]


def test_every_budget_is_of_a_file_that_is_there():
    assert all((ROOT / name).exists() for name in BUDGETS)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_functions_are_short(path):
    assert [f for f in functions(path) if f[1] > LONGEST_FUNCTION and f[0] != "main"] == []


def test_the_loop_is_one_function():
    """Propose, one forward, pick, accept, keep, and what a row does when its text has ended, in one place."""
    text = (ROOT / "gpt_spec.py").read_text(encoding="utf-8")
    [loop] = [node for node in ast.parse(text).body if getattr(node, "name", "") == "speculate"]
    assert loop.end_lineno - loop.lineno + 1 <= THE_LOOP
    body = ast.get_source_segment(text, loop)
    words = [".propose(", "model(", ".pick(", "accept(", "state.active", ".keep("]
    places = [body.index(word) for word in words]
    assert places == sorted(places)


def test_imports_go_in_no_circle():
    paths = {module_name(path): path for path in sources()}
    graph = {name: imports(path) & set(paths) for name, path in paths.items()}
    assert find_circle(graph) == []
    assert len(graph["generate"]) > 5  # there is something to find a circle in
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]


def test_the_idea_knows_nothing_of_what_is_plugged_into_it():
    """gpt_spec.py and what is below it know no text, no files, no command line, and no clock of their own."""
    forbidden = {"argparse", "json", "pathlib", "os", "sys", "time", "safetensors", "tokenizers"}
    for name in ("model", "drafts", "gpt_spec", "eagle"):
        assert imports(ROOT / f"{name}.py") & forbidden == set()


def test_every_file_opens_with_a_docstring():
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_ruff_has_no_complaints():
    pytest.importorskip("ruff", reason="ruff is not installed")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_the_readme_fits():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120


def test_the_readme_counts_the_lines_of_every_file():
    """To a tenth, so that a small change does not need another one there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([\w./]+)` \| ([\d,]+) \|", text, re.MULTILINE))
    top = {path.name for path in ROOT.glob("*.py")} | {path.name for path in ROOT.glob("*.cpp")}
    assert top <= set(table)
    for name in top:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(table[name].replace(",", "")) / lines - 1) < 0.1, (name, lines)


def test_the_readme_has_the_commands_of_ci():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("python3")
    ]
    assert len(commands) == 2 and all(command in text for command in commands)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
