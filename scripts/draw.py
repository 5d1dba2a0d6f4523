"""draw.py: the figures of the study, from the JSON files that bench.py writes.

    pip install matplotlib
    python scripts/draw.py      # benchmarks/results/*.json -> benchmarks/figures/*.png, a few seconds

A figure whose file is not there is left out, and the last line says how to measure what it needs.

The one idea: every file becomes the same kind of table, group -> row -> quantity -> quartiles, and is checked
while it is read, before anything is drawn. A precision looks the same in every figure, and is told from the
others in black and white, too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.study import REAL_STUDY  # noqa: E402

try:
    import matplotlib.ticker
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from PIL import Image  # comes with matplotlib
except ImportError:  # optional: main says how to install it
    matplotlib = None

Quartiles = tuple[float, float, float]
Table = dict[str, dict[str, dict[str, Quartiles]]]


class Results(NamedTuple):
    name: str  # of the file
    table: Table
    caption: str  # what was measured on, and when


class Look(NamedTuple):
    color: str
    marker: str
    line: str
    hatch: str


# The colours of Okabe and Ito: blues for weights of 8 bits, warm ones for weights of 4.
PRECISIONS = {
    "bf16": Look("#000000", "o", "-", ""),
    "w8a16": Look("#56B4E9", "s", "--", "////"),
    "w8a8": Look("#0072B2", "D", "-.", "...."),
    "w4a16": Look("#E69F00", "^", "-", "\\\\\\\\"),
    "w4a8": Look("#D55E00", "v", "--", "xxxx"),
    "w4a4": Look("#CC79A7", "P", "-.", "----"),
}
OTHER_PRECISION = Look("#777777", "X", ":", "++++")
FAMILIES = {"lookup": "^", "sequential": "s", "tree": "o", "hierarchical": "D", "qspec": "P"}
BASE, GREY, GREEN = "autoregressive", "#777777", "#009E73"
REAL = "smollm2_methods.json"
SOURCES = {
    "cpu_cost.json": "python bench.py cost",
    "cpu_cost_1b.json": "python bench.py cost --shape llama-3.2-1b",
    "cpu_methods.json": "python bench.py methods",
    "cpu_auto.json": "python bench.py auto",
    "cpu_synthetic.json": "python bench.py synthetic",
    "when.json": "python bench.py when",
    REAL: f"python bench.py {REAL_STUDY[REAL]}",
}
QUANTITIES = {
    "cpu_methods.json": ("speedup", "speedup_over_bf16", "predicted"),
    "cpu_auto.json": ("speedup",),
    "cpu_synthetic.json": ("speedup", "predicted"),
    REAL: ("speedup", "speedup_over_bf16", "speedup_of_totals", "predicted"),
}
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 9,
    "legend.frameon": False, "axes.axisbelow": True, "grid.color": "#DDDDDD", "hatch.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 4.5,
    "text.parse_math": False,  # a $ in a name is a $
}  # fmt: skip


def read_results(path: Path) -> Results:
    """The checked contents of one file; a ValueError names the file and how to make it."""
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        read = read_methods if path.name in QUANTITIES else read_cost
        read = read_when if path.name == "when.json" else read
        return Results(path.name, read(file["results"], path.name), describe(file))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, SOURCES[path.name], error) from None


def damaged(path: Path, command: str, error: Exception) -> ValueError:
    """For a file that cannot be read: why, and how to make it again."""
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return ValueError(f"{path} is damaged or of an older layout ({reason}); again: {command} --output {path}")


def read_cost(results: dict, name: str) -> Table:
    """precision -> n -> {"relative": T(n) / T(1)}"""
    table = {}
    for precision, costs in results.items():
        seconds = {int(n): quartiles(value)[1] for n, value in costs["verification"].items()}
        relative = {n: quartiles(seconds[n] / seconds[1]) for n in sorted(seconds)}
        table[precision] = {str(n): {"relative": value} for n, value in relative.items()}
    if not all(table.values()) or not table:
        raise ValueError("nothing was measured")
    return in_order(table)


def read_methods(results: dict, name: str) -> Table:
    """precision or configuration -> method -> quantity -> quartiles"""
    table = {}
    for group, content in results.items():
        rows = content["methods"] if name == "cpu_auto.json" else content
        table[group] = {m: {q: quartiles(row[q]) for q in QUANTITIES[name]} for m, row in rows.items()}
        if name == "cpu_auto.json" and not {"auto", BASE} <= set(rows):
            raise ValueError(f"{group} needs auto and {BASE}")
    if not method_names(table):
        raise ValueError(f"no method besides {BASE}")
    return in_order(table)


def read_when(results: dict, name: str) -> Table:
    """border or machine -> point or place -> quantity; points without a border are left out"""
    table: Table = {}
    for border, row in results["borders"].items():
        fixed = {key: quartiles(row[key]) for key in ("head", "chain")}
        points = {str(p["steepness"]): p for p in row["points"] if p["middle"]}
        points = {s: {key: quartiles(p[key]) for key in ("steepness", "middle")} for s, p in points.items()}
        table[border] = {point: values | fixed for point, values in points.items()}
    if not any(table.values()):
        raise ValueError("no border")
    for machine, row in results["machines"].items():
        place = {key: quartiles(row[key]) for key in ("steepness", "middle", "head")}
        table[machine] = {"": place}
    return table


def quartiles(value: float | list[float]) -> Quartiles:
    """Of a single number: that number three times."""
    low, middle, high = map(float, value if isinstance(value, list) else [value] * 3)
    if not 0 < low <= middle <= high < math.inf:
        raise ValueError(f"{value} is neither a positive number nor quartiles")
    return low, middle, high


def in_order(table: Table) -> Table:
    """Precisions from high to low; anything else follows as it comes in the file."""
    known = [precision for precision in PRECISIONS if precision in table]
    return {group: table[group] for group in dict.fromkeys([*known, *table])}


def describe(file: dict) -> str:
    """The line at the foot of a figure; older files know neither device nor commit."""
    device, commit = file.get("device") or f"cpu {file['cpu']}", str(file.get("commit") or "")
    parts = [device, str(file["date"]), f"PyTorch {file['torch']}"]
    if commit:
        parts.append(f"commit\u00a0{commit}")
    return ", ".join(parts)


def method_names(table: Table) -> list[str]:
    return [name for name in dict.fromkeys(m for rows in table.values() for m in rows) if name != BASE]


def look_of(precision: str) -> Look:
    return PRECISIONS.get(precision, OTHER_PRECISION)


def offsets(count: int) -> list[float]:
    """Where `count` marks stand side by side in a row of width 1, of which they fill 0.8."""
    return [(i - (count - 1) / 2) * 0.8 / count for i in range(count)]


def spread(positions: list[float], gap: float) -> list[float]:
    """Rising positions moved until neighbours are at least `gap` apart; their mean stays."""
    moved = positions[:1]
    for position in positions[1:]:
        moved.append(max(position, moved[-1] + gap))
    return [position - mean(moved) + mean(positions) for position in moved]


def with_whiskers(values: Iterable[Quartiles]) -> tuple[list[float], list[list[float]]]:
    """The medians, and how far the quartiles are below and above them."""
    values = list(values)
    below = [middle - low for low, middle, _ in values]
    return [middle for _, middle, _ in values], [below, [high - middle for _, middle, high in values]]


def new_figure(captions: Iterable[str], height: float = 4.0, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7, max(height, 3)), dpi=150, layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    lines = [textwrap.fill(caption, 95, break_on_hyphens=False) for caption in dict.fromkeys(captions)]
    figure.supxlabel("\n".join(lines), fontsize=9, color=GREY)
    return figure, list(axes)


def list_rows(axes: list[Axes], names: list[str]) -> None:
    """Names on the y axis from the top down, every other one on a light band."""
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for ax in axes:
        ax.tick_params(axis="y", length=0)
        for row in range(0, len(names), 2):
            ax.axhspan(row - 0.5, row + 0.5, color="#F4F4F4", zorder=0)


def draw_cost(*results: Results) -> Figure:
    figure, axes = new_figure([r.caption for r in results], panels=len(results))
    tables = [result.table for result in results]
    costs = [row["relative"][1] for table in tables for rows in table.values() for row in rows.values()]
    top = max(1, math.log2(max(costs)))
    for ax, result in zip(axes, results):
        draw_cost_panel(ax, result.table, gap=0.06 * top)
        shipped = result.name == "cpu_cost.json"
        ax.set_title(
            "shipped model of 7 M parameters" if shipped else "shape of Llama-3.2-1B, random weights"
        )
        ax.set_xlabel("n, tokens of one forward")
    axes[0].set_ylim(0.9 * min(costs), 2 ** (1.15 * top))  # with room for the labels of the highest lines
    axes[0].set_ylabel("T(n) / T(1)   (dotted: n forwards of one)")
    return figure


def draw_cost_panel(ax: Axes, table: Table, gap: float) -> None:
    """On two logarithmic axes; the name of a precision stands at the end of its line."""
    ends = []
    for precision, rows in table.items():
        look, relative = look_of(precision), [row["relative"][1] for row in rows.values()]
        ax.plot(list(map(int, rows)), relative, look.marker, ls=look.line, color=look.color)
        ends.append((math.log2(relative[-1]), precision))
    last = max(int(n) for rows in table.values() for n in rows)
    ax.plot([1, last], [1, last], ":", color=GREY, linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(axis="y")
    ends.sort()
    for height, (_, precision) in zip(spread([end for end, _ in ends], gap), ends):
        place = {"transform": ax.get_yaxis_transform(), "va": "center", "color": look_of(precision).color}
        ax.text(1.01, 2**height, precision, **place)


def draw_methods(results: Results) -> Figure:
    table = results.table
    names = [BASE, *method_names(table)]  # next to bf16, it shows what the precision alone brings
    figure, axes = new_figure([results.caption], 1.3 + 0.5 * len(names), panels=2)
    list_rows(axes, names)
    for ax, quantity, base in zip(axes, ("speedup", "speedup_over_bf16"), ("the same precision", "bf16")):
        for offset, (precision, rows) in zip(offsets(len(table)), table.items()):
            look, shown = look_of(precision), [name for name in names if name in rows]
            middle, whiskers = with_whiskers(rows[name][quantity] for name in shown)
            places = [names.index(name) + offset for name in shown]
            ax.errorbar(middle, places, xerr=whiskers, fmt=look.marker, color=look.color, elinewidth=0.9)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_xlabel(f"speedup over autoregressive\ndecoding in {base}\n(median and quartiles)")
        ax.grid(axis="x")
    handles = [
        Line2D([], [], color=look_of(p).color, marker=look_of(p).marker, ls="", label=p) for p in table
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2)
    return figure


def draw_predicted(results: Results) -> Figure:
    figure, [ax] = new_figure([results.caption], height=4.3)
    points, families = [], {}
    for precision, rows in results.table.items():
        for name in method_names({precision: rows}):
            family = name.replace(",", "").split()[0]
            families[family] = marker = FAMILIES.get(family, "X")
            measured = rows[name].get("speedup_of_totals", rows[name]["speedup"])[1]
            points.append((measured, rows[name]["predicted"][1]))
            ax.plot(*points[-1], marker, color=look_of(precision).color, alpha=0.85, mew=0, ms=6)
    ends = [0.9 * min(map(min, points)), 1.05 * max(map(max, points))]
    ax.fill_between(ends, [0.9 * x for x in ends], [1.1 * x for x in ends], color="#E8E8E8", zorder=0, lw=0)
    ax.plot(ends, ends, color="black", linewidth=0.8, zorder=1)
    ax.set(xlim=ends, ylim=ends, aspect="equal", xlabel="measured speedup")
    ax.set_ylabel("predicted, \u03c4 T(1) / (drafting + T(n))")
    ax.locator_params(nbins=6)
    ax.grid(axis="y")
    off = median(abs(predicted / measured - 1) for measured, predicted in points)
    ax.set_title(f"median deviation {100 * off:.1f} % of {len(points)} points\n(band: \u00b110 %)")
    colors = [Line2D([], [], color=look_of(p).color, lw=5, label=p) for p in results.table]
    shapes = [Line2D([], [], color=GREY, marker=m, ls="", ms=6, label=f) for f, m in families.items()]
    ax.legend(handles=[*colors, *shapes], loc="center left", bbox_to_anchor=(1.05, 0.5))
    return figure


def draw_auto(results: Results) -> Figure:
    """Every configuration's fixed methods, the best of them in hindsight, and `auto`."""
    figure, [ax] = new_figure([results.caption], 1.4 + 0.27 * len(results.table))
    list_rows([ax], list(results.table))
    small, ring = {"color": "#AAAAAA", "ms": 3.5}, {"color": "black", "mfc": "none", "ms": 9}
    filled, best_names = {"color": GREEN, "ms": 5}, []
    for place, rows in enumerate(results.table.values()):
        fixed = {name: row["speedup"][1] for name, row in rows.items() if name != "auto"}
        best_names.append(max(fixed, key=fixed.__getitem__))
        others = [speedup for name, speedup in fixed.items() if name != BASE]
        ax.plot(others, [place] * len(others), "o", **small)
        ax.plot(fixed[best_names[-1]], place, "o", **ring)
        ax.plot(rows["auto"]["speedup"], [place] * 3, "-o", markevery=[1], **filled)
    ax.axvline(1, color="black", linewidth=0.8, zorder=1)
    ax.set_xlabel("speedup over autoregressive decoding (median)")
    ax.grid(axis="x")
    right = ax.secondary_yaxis(1.0)
    right.set_yticks(range(len(best_names)), best_names)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    handles = [
        Line2D([], [], marker="o", ls="", label="fixed methods", **small),
        Line2D([], [], marker="o", ls="", label="best of them in hindsight (right)", **ring),
        Line2D([], [], marker="o", label="auto, with quartiles", **filled),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def draw_specmquant(results: Results) -> Figure | None:
    """Trees next to hierarchies in each precision: what SpecMQuant (arXiv 2505.22179) compares on a GPU."""
    compared = ("bf16", "w8a8", "w4a16", "w4a8", "w4a4")
    table = {p: results.table[p] for p in compared if p in results.table}
    names = method_names(table)
    shown = [name for name in ("tree of 60", "tree") if name in names]
    shown += [name for name in names if name.startswith("hierarchical")]
    if not shown:
        return None
    figure, [ax] = new_figure([results.caption])
    fills = (("#FFFFFF", "....."), ("#D0D0D0", ""), ("#FFFFFF", "/////"), ("#909090", ""))
    for i, (offset, name) in enumerate(zip(offsets(len(shown)), shown)):
        places = [place + offset for place, rows in enumerate(table.values()) if name in rows]
        middle, whiskers = with_whiskers(rows[name]["speedup"] for rows in table.values() if name in rows)
        fill = dict(zip(("color", "hatch"), fills[i % len(fills)])) | {"edgecolor": "black", "lw": 0.6}
        label = "tree, auto-sized" if name == "tree" else name
        ax.bar(places, middle, 0.8 / len(shown), label=label, **fill)
        ax.errorbar(places, middle, yerr=whiskers, fmt="none", color="black", elinewidth=0.9, capsize=2)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xticks(range(len(table)), list(table))
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("speedup (median and quartiles)")
    ax.set_title("Speedup over autoregressive decoding in the same precision")
    ax.grid(axis="y")
    figure.legend(loc="outside upper center", ncols=min(4, len(shown)), columnspacing=1.2)
    return figure


def draw_synthetic(results: Results) -> Figure:
    table, names = results.table, method_names(results.table)
    figure, [ax] = new_figure([results.caption], 1.5 + 0.09 * (len(table) + 1) * len(names))
    list_rows([ax], names)
    for offset, (precision, rows) in zip(offsets(len(table)), table.items()):
        look, shown = look_of(precision), [name for name in names if name in rows]
        places = [names.index(name) + offset for name in shown]
        fill = {"color": look.color, "hatch": look.hatch, "edgecolor": "white", "lw": 0.3}
        ax.barh(
            places, [rows[name]["speedup"][1] for name in shown], 0.8 / len(table), label=precision, **fill
        )
        predicted = [rows[name]["predicted"][1] for name in shown]
        ax.plot(predicted, places, "|", color="white", ms=6, mew=3)  # else unseen on black
        ax.plot(predicted, places, "|", color="black", ms=6, mew=1.2)
    ax.plot([], [], "|", color="black", ms=6, mew=1.2, label="predicted")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("speedup over autoregressive decoding")
    ax.set_title("Synthetic acceptance, random weights")
    ax.grid(axis="x")
    figure.legend(loc="outside upper center", ncols=7, handlelength=1.5, columnspacing=1.0)
    return figure


def draw_when(results: Results) -> Figure:
    """Borders by what a depth of the head costs, a panel each; machines in the panel that is nearer."""
    borders = [[*rows.values()] for rows in results.table.values() if rows and "" not in rows]
    places = {name: rows[""] for name, rows in results.table.items() if "" in rows}
    heads = sorted({rows[0]["head"][1] for rows in borders})
    caption = "Filled: costs of a smaller model in the middle; hollow: of the target itself in fewer bits"
    figure, axes = new_figure([caption, f"computed from measured costs, {results.caption}"], 4.6, len(heads))
    for ax, head in zip(axes, heads):
        lines = [rows for rows in borders if rows[0]["head"][1] == head]
        for line, rows in zip(("-", "--", ":"), lines):
            xs, ys = ([row[key][1] for row in rows] for key in ("steepness", "middle"))
            ax.plot(xs, ys, line, color="black", label=f"q = {rows[0]['chain'][1]}")
        distance = {name: {h: abs(math.log(p["head"][1] / h)) for h in heads} for name, p in places.items()}
        draw_places(ax, {n: p for n, p in places.items() if min(heads, key=distance[n].get) == head})
        ax.set_title(f"a depth of the head costs {head:g} T(1)")
        ax.set(xscale="log", yscale="log", xlabel="T(30) / T(1) of the target", xticks=(1, 2, 4, 8, 16))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        ax.grid()
    axes[0].set_ylabel("a step of the middle, in T(1) of the target")
    handles, labels = axes[0].get_legend_handles_labels()
    handles += [Line2D([], [], color=look_of(p).color, marker=look_of(p).marker, ls="") for p in CHOSEN]
    title = "Below its line a hierarchy is faster than the best tree\n"
    title += "(q: the share of the middle's tokens that the target accepts)"
    figure.legend(handles, [*labels, *CHOSEN], loc="outside upper center", ncols=6, title=title)
    return figure


CHOSEN = ("bf16", "w4a16", "w4a8")  # precisions of the machines


def draw_places(ax: Axes, places: dict[str, dict[str, Quartiles]]) -> None:
    """Measured machines by precision, those of each file with one label."""
    labels: dict[str, tuple[float, float]] = {}
    for name, place in places.items():
        small, point = name.endswith("small model"), (place["steepness"][1], place["middle"][1])
        file, precision = name.split(",")[0].rsplit(" ", 1)
        look = look_of(precision)
        ax.plot(*point, look.marker, color=look.color, mfc=look.color if small else "none", ms=6)
        label = file.replace("_cost", "").replace("_", " ")
        labels[label] = point if small else labels.get(label, point)
    for label, point in labels.items():
        ax.annotate(label, point, xytext=(7, -3), textcoords="offset points")


FIGURES: dict[str, tuple[Callable[..., Figure | None], list[str]]] = {
    "cost": (draw_cost, ["cpu_cost.json", "cpu_cost_1b.json"]),
    "methods": (draw_methods, ["cpu_methods.json"]),
    "predicted": (draw_predicted, ["cpu_methods.json"]),
    "smollm2_methods": (draw_methods, [REAL]),
    "smollm2_predicted": (draw_predicted, [REAL]),
    "auto": (draw_auto, ["cpu_auto.json"]),
    "specmquant": (draw_specmquant, ["cpu_methods.json"]),
    "synthetic": (draw_synthetic, ["cpu_synthetic.json"]),
    "when": (draw_when, ["when.json"]),
}


def save(figure: Figure, path: Path) -> None:
    """With a palette, which makes a third of the bytes, and without the version of matplotlib."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    image.convert("RGB").quantize(256).save(path, optimize=True, dpi=(figure.dpi, figure.dpi))


def draw_all(folder: Path, output: Path) -> None:
    """Everything is read before anything is written: a damaged file leaves all figures as they were."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    results = {name: read_results(folder / name) for name in SOURCES if (folder / name).exists()}
    output.mkdir(parents=True, exist_ok=True)
    for name, (draw, files) in FIGURES.items():
        found = [results[file] for file in files if file in results]
        figure = draw(*found) if found else None
        if figure:
            save(figure, output / f"{name}.png")
            print(output / f"{name}.png")
    missing = [f"{name} ({command})" for name, command in SOURCES.items() if name not in results]
    if missing:
        print(f"missing in {folder}: {', '.join(missing)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default="benchmarks/results", help="folder of JSON files")
    parser.add_argument("--output", type=Path, default="benchmarks/figures", help="folder for the figures")
    args = parser.parse_args()
    try:
        if matplotlib is None:
            raise ValueError("matplotlib draws the figures and is not installed: pip install matplotlib")
        with matplotlib.rc_context(STYLE):
            draw_all(args.results, args.output)
    except (OSError, ValueError) as error:
        print(f"draw.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
