"""tables.py: the tables of the study in Markdown, from the JSON files that bench.py writes.

    python scripts/tables.py      # benchmarks/results/*.json -> benchmarks/tables.md, at once

A table whose file is not there is left out. The one idea: no number is typed; all are from the file that the
command above a table measures again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from draw import BASE, REAL, REAL_STUDY, SOURCES, damaged, describe

COMMANDS = SOURCES | {name: f"python bench.py {flags}" for name, flags in REAL_STUDY.items()}
COMMANDS |= {
    "cpu_quality.json": "python bench.py quality",
    "cpu_lm_head.json": "python bench.py quality --precisions w4a16,w4a8,w4a4 --lm_head_bits 16,8,4",
}
DEFAULT = "benchmarks/results"
Lines = Iterator[str]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    assert all(len(row) == len(header) for row in rows)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def between(quartiles: list[float], measured: int = 4) -> str:
    """Of fewer than four measurements the median alone."""
    low, middle, high = quartiles
    return f"{middle:.2f}" + (f" ({low:.2f} to {high:.2f})" if measured >= 4 else "")


def cost_table(results: dict) -> Lines:
    """Whole steps for n nodes, and units of drafting, in T(1)."""
    sizes = list(next(iter(results.values()))["verification"])
    units = list(dict.fromkeys(unit for costs in results.values() for unit in costs["drafting"]))
    rows = []
    for precision, costs in results.items():
        first, drafting = costs["verification"]["1"], costs["drafting"]
        cells = [f"{costs['verification'][n] / first:.2f}" for n in sizes]
        cells += [f"{drafting[unit] / first:.2f}" if unit in drafting else "" for unit in units]
        rows.append([f"`{precision}`", f"{first * 1e3:.2f}", *cells])
    yield "T(n) / T(1), and what drafts are made of, in T(1):"
    yield markdown(["", "T(1), ms", *(f"n = {n}" for n in sizes), *units], rows)


def methods_table(results: dict) -> Lines:
    """One table for each precision: tau is tokens per step, T(n) the mean over the steps."""
    yield (
        "tau is tokens per step; drafting and T(n), means over the steps, are in T(1) of the same precision; "
        "*predicted* is tau T(1) / (drafting + T(n)), for *all texts* together; speedups are medians of the "
        "ratios of prompts, or of groups of them in batches (and quartiles); the first token includes the "
        "drafter's prefill:"
    )
    for precision, methods in results.items():
        first = methods[BASE]["verification_seconds"]
        whole = all("speedup_of_totals" in row for row in methods.values())  # not in older files
        columns = ["tau", "drafting", "T(n)", "tokens/s", "predicted"] + whole * ["all texts"]
        columns += ["speedup", "over `bf16`"]
        rows = []
        for name, row in methods.items():
            over = row.get("speedup_over_bf16")
            drafting, verification = row["drafting_seconds"] / first, row["verification_seconds"] / first
            cells = [f"{row['tokens_per_step']:.2f}", f"{drafting:.2f}", f"{verification:.2f}"]
            cells += [f"{row['tokens_per_second']:.0f}", f"{row['predicted']:.2f}"]
            cells += [f"{row['speedup_of_totals']:.2f}"] if whole else []
            several = between(row["speedup"], len(row.get("speeds", [0] * 4)))
            cells += [several, f"{over[1]:.2f}" if over else ""]
            rows.append([name, *cells, f"{row['time_to_first_token_seconds'] * 1e3:.0f} ms"])
        yield markdown([f"`{precision}`", *columns, "first token"], rows)
    notes = {row["note"] for methods in results.values() for row in methods.values() if "note" in row}
    yield from (f"Every row: {note}." for note in notes)
    rows = [row for methods in results.values() for name, row in methods.items() if name != BASE]
    measured = [row.get("speedup_of_totals", row["speedup"][1]) for row in rows]
    off = [abs(row["predicted"] / value - 1) for row, value in zip(rows, measured)]
    yield f"Predicted and measured differ by {median(off):.1%} (median of {len(off)} rows)."


def real_table(results: dict) -> Lines:
    """The same, what it says of `auto` and of the texts, and the kinds of prompts."""
    yield from methods_table(results)
    rows = []
    for precision, methods in results.items():
        speed = {name: row["speedup_of_totals"] for name, row in methods.items()}
        mine, different = speed.pop("auto"), sum(row["different_texts"] for row in methods.values())
        best = max(speed, key=speed.__getitem__)
        occupancy = f"{methods[BASE]['occupancy']:.2f}"
        cells = [f"{mine:.2f}", f"{best}, {speed[best]:.2f}", f"{mine / speed[best]:.2f}", occupancy]
        rows.append([f"`{precision}`", *cells, str(different)])
    yield "Of all texts together; *occupancy* is the share of rows with a text, of `autoregressive`:"
    header = ["", "`auto`", "best fixed", "`auto` / best fixed", "occupancy", "texts that differ"]
    yield markdown(header, rows)
    for precision, methods in results.items():
        if "categories" in methods[BASE]:
            yield f"By kind of prompt, `{precision}`: how many, then tau and speedup (median) of each method"
            yield category_table(methods)


def category_table(methods: dict) -> str:
    names = [name for name in methods if name != BASE]
    kinds = methods[BASE]["categories"]
    cells = {name: {kind: methods[name]["categories"][kind] for kind in kinds} for name in names}
    rows = [
        [
            kind,
            str(kinds[kind].get("prompts", "")),
            *(f"{c[kind]['tokens_per_step']:.2f}, {c[kind]['speedup'][1]:.2f}" for c in cells.values()),
        ]
        for kind in kinds
    ]
    return markdown(["", "prompts", *names], rows)


def auto_table(results: dict) -> Lines:
    rows = []
    for name, result in results.items():
        methods = result["methods"]
        fixed = {method: row["speedup"][1] for method, row in methods.items() if method != "auto"}
        best = max(fixed, key=fixed.__getitem__)
        against, plain = result["against_best_fixed"], result["against_autoregressive"]
        shares = {who: steps / sum(result["chosen"].values()) for who, steps in result["chosen"].items()}
        cells = [between(methods["auto"]["speedup"]), f"{best}, {fixed[best]:.2f}"]
        for row in (against, plain):
            verdict = "" if row["within"] else ", **not within**"
            cells.append(f"{row['ratio']:.2f} (IQR {row['spread']:.2f}){verdict}")
        different = sum(row["different_texts"] for row in methods.values())
        names = ", ".join(f"{who} {share:.2f}" for who, share in shares.items() if share > 0.02)
        rows.append([name, *cells, names, str(different)])
    yield (
        "Speedups over `autoregressive`: medians of the turns (and quartiles). The ratios are those of each "
        "turn, with their interquartile range (IQR) divided by their median; *not within* is what is below "
        "0.95 of the best fixed method, or 0.97 of `autoregressive`, and further below 1 than that range. "
        "*Chosen* are shares of the steps of `auto`, above 2 %:"
    )
    header = ["", "`auto`", "best fixed", "`auto` / best fixed", "`auto` / `autoregressive`", "chosen"]
    yield markdown([*header, "texts that differ"], rows)


def quality_table(results: dict) -> Lines:
    columns = ["", "perplexity", "greedy choice that of `bf16`"]
    solved, graded = (any(key in row for row in results.values()) for key in ("solved", "solution_loss"))
    drafts = next((list(row["qspec"]) for row in results.values() if "qspec" in row), [])
    sizes, rows = all("step_bytes" in row for row in results.values()), []
    for precision, row in results.items():
        cells = [f"{row['perplexity']:.2f}", f"{row['agreement']:.2%}"]
        cells += [f"{row['step_bytes'] / 1e6:.1f}"] if sizes else []
        cells += [f"{row['solved']} of {row['problems']}"] if solved else []
        if graded:
            cells += [f"{row['solution_loss']:.3f}", f"{row['solution_agreement']:.1%}"]
            cells += [str(row["same_answers"]), str(row["cut_off"])]
        for name in drafts:
            other = row.get("qspec", {}).get(name)
            cells += [f"{other['solved']} ({other['different_texts']} other texts)" if other else ""]
        rows.append([f"`{precision}`", *cells])
    yield "Each precision rounds the same checkpoint to nearest, unless it names another quantizer:"
    more = sizes * ["MB that a step reads"] + solved * ["solved"]
    finer = ["nats per token of right solutions", "of which greedy", "same answers as `bf16`", "cut off"]
    more += graded * finer
    yield markdown(columns + more + [f"with `qspec` drafts in `{name}`" for name in drafts], rows)


def when_table(results: dict) -> Lines:
    """Borders at whole T(30), and every machine."""
    shown = ["1", "2", "4", "8", "16"]
    rows = []
    for name, row in results["borders"].items():
        points = {f"{point['steepness']:g}": point["middle"] for point in row["points"]}
        rows.append([name, *(f"{points[s]:.3f}" if points[s] else "never" for s in shown)])
    yield (
        "The most that a step of the middle may cost, in T(1) of the target, for the hierarchy to be faster "
        "than the best tree and than no speculation. q is the share of the middle's tokens that the target "
        "accepts, d what a depth of a head costs in T(1) of its model:"
    )
    yield markdown(["", *(f"T(30) / T(1) = {s}" for s in shown)], rows)
    chains = list(next(iter(results["machines"].values()))["hierarchy"])
    rows = [
        [
            name,
            *(f"{row[key]:.2f}" for key in ("steepness", "middle", "head", "tree")),
            *map("{:.2f}".format, row["hierarchy"].values()),
        ]
        for name, row in results["machines"].items()
    ]
    yield "Measured costs, and the speedups that the same model predicts from them and from their own T(n):"
    columns = ["T(30) / T(1)", "middle", "d", "best tree", *(f"hierarchy, q = {q}" for q in chains)]
    yield markdown(["costs of, middle", *columns], rows)


TABLES: dict[str, tuple[str, Callable[[dict], Lines]]] = {
    REAL: ("SmolLM2-135M with its head, every method", real_table),
    "smollm2_sampled.json": ("SmolLM2-135M with its head, at temperature 0.8", real_table),
    "smollm2_batches.json": ("SmolLM2-135M with its head, in batches", real_table),
    "smollm2_auto.json": ("SmolLM2-135M: is the choice of `auto` right?", auto_table),
    "smollm2_auto_sampled.json": ("SmolLM2-135M: the same at temperature 0.8", auto_table),
    "smollm2_quality.json": ("SmolLM2-135M: what a precision costs in quality, GSM8K", quality_table),
    "smollm2_code.json": ("SmolLM2-135M: what a precision costs in quality, HumanEval", quality_table),
    "cpu_auto.json": ("Who is chosen by `auto`, and is it right?", auto_table),
    "cpu_methods.json": ("Every method in every precision, the shipped models", methods_table),
    "cpu_cost.json": ("What a step costs, the shipped models", cost_table),
    "cpu_cost_1b.json": ("What a step costs, the shape of Llama-3.2-1B, random weights", cost_table),
    "cpu_synthetic.json": ("Synthetic acceptance, random weights", methods_table),
    "cpu_synthetic_8b.json": ("Synthetic acceptance, the shape of Llama-3-8B", methods_table),
    "when.json": ("When does a hierarchy win? Computed from the cost model", when_table),
    "cpu_quality.json": ("What a precision costs in quality, the shipped target", quality_table),
    "cpu_lm_head.json": ("What fewer bits of `lm_head` cost in quality, the shipped target", quality_table),
}


def write_tables(folder: Path) -> str:
    parts = ["# Tables of the study\n\nWritten by `python scripts/tables.py`; do not edit."]
    for name, (title, table) in TABLES.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            file = json.loads(path.read_text(encoding="utf-8"))
            parts.append(f"## {title}\n\n`{COMMANDS[name]} --output {DEFAULT}/{name}` ({describe(file)})")
            parts.extend(table(file["results"]))
        except (LookupError, TypeError, ArithmeticError, ValueError, RuntimeError, AttributeError) as error:
            raise damaged(path, COMMANDS[name], error) from None
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=DEFAULT, help="folder of JSON files")
    parser.add_argument("--output", type=Path, default="benchmarks/tables.md", help="the file to write")
    args = parser.parse_args()
    try:
        text = write_tables(args.results)
        if "\n## " not in text:
            raise ValueError(f"{args.results} has none of {', '.join(TABLES)}")
        args.output.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
