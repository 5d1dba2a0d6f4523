"""when.py: where a hierarchy begins to win over a tree, computed from the cost model.

    python bench.py when --output benchmarks/results/when.json

Nothing is timed. Everything is in units of T(1), the target's own step, and these are the equations:

    T(n) = 1 + (T(30) - 1) (n - 1) / 29                     the target; one number says how steep it is
    tree of N      = tau(N) / (D d + T(N))                  in tokens per T(1)
    hierarchy      = E / (R m (D d + T(N)) + m F + V)

tau(N) is 1 + the sum of the probabilities of its nodes (acceptance.py); D is its depth, less for fewer nodes,
and d what a depth costs, in T(1) of the model that the head belongs to. m is what a step of the middle model
costs; its T(n) and d are m times the target's. The middle takes R steps until it has at least L tokens, K of
them in the end. The target verifies them as a chain of K + 1 nodes, V = T(K + 1), and accepts E = 1 + q + q^2
+ .. + q^K. If it accepts all, with probability F = q^K, the middle first reads the last one. R, E, F and V
are means over what the steps of the middle may bring, in the order in which `HierarchicalDrafter` decides.

Tree and hierarchy take the best N and L. So the border depends on T(30), m, d and q: below it, with a cheaper
middle, the hierarchy is faster than the tree, and than no speculation. What the host does between the levels
costs nothing in this model.

The one idea: what decides are two ratios that anyone can measure on a machine, so its place can be looked up.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.acceptance import Acceptance, read_acceptance
from eagle import TreeDrafter
from model import BadInput

Curve = Callable[[float], float]  # T(n) / T(1)
CHAINS = (0.72, 0.85, 0.95)  # q, of which the first is that of `sequential`
HEADS = (0.05, 0.3)  # d: about that of a GPU, and of a CPU
STEEPNESS = [2 ** (i / 8) for i in range(33)]  # T(30), 1 to 16
LENGTHS = range(2, 16)  # L
MIDDLES = (0.05, 0.1, 0.2, 0.4, 0.8)  # m for which speedups are given


def straight(steepness: float) -> Curve:
    """T(n) of a machine with this T(30)."""
    return lambda n: 1 + (steepness - 1) * (n - 1) / 29


def measured(seconds: dict[str, float]) -> Curve:
    """T(n) of a result of `bench.py cost`: straight lines between the sizes, the last one goes on."""
    points = sorted((int(n), value / seconds["1"]) for n, value in seconds.items())

    def at(n: float) -> float:
        (a, low), (b, high) = next((pair for pair in pairwise(points) if n <= pair[1][0]), points[-2:])
        return low + (high - low) * (n - a) / (b - a)

    return at


class Tree(NamedTuple):
    """Trees of a head: its acceptance, their nodes, depth and top-k, and what a depth costs."""

    head: Acceptance
    nodes: int
    depth: int
    topk: int
    cost: float

    @property
    def tokens(self) -> float:
        return self.head.tokens_per_step(self.nodes, self.depth, self.topk)

    def step(self, curve: Curve) -> float:
        """Drafting and verification, in T(1) of its own model."""
        return self.depth * self.cost + curve(self.nodes)

    def speed(self, curve: Curve) -> float:
        return self.tokens / self.step(curve)

    def lengths(self) -> list[float]:
        """The probabilities that 0, 1, 2, ... of its tokens are accepted."""
        nodes = self.head.best_nodes(self.depth, self.topk)[: self.nodes - 1]
        reached = [1.0, *(sum(p for p, depth in nodes if depth == d) for d in range(1, self.depth + 1)), 0.0]
        return [a - b for a, b in pairwise(reached)]


class Chain(NamedTuple):
    """What a middle model hands to the target, and what the target makes of it."""

    inner: Tree  # of the middle
    steps: float  # R
    lengths: dict[int, float]  # K and their probabilities
    tokens: float  # E
    whole: float  # F

    def costs(self, curve: Curve) -> tuple[float, float]:
        """What the middle does, in steps of it, and what the target does, in its own."""
        verification = sum(p * curve(k + 1) for k, p in self.lengths.items())
        return self.steps * self.inner.step(curve) + self.whole, verification


def chain_of(inner: Tree, least: int, accepted: float) -> Chain:
    """Steps of the middle, each of which brings what its tree does and one token, until there are `least`."""
    held, done, steps, step = [1.0] + [0.0] * (least - 1), {}, 0.0, inner.lengths()
    for k, p in enumerate(held):  # a step leads to places that are still to come
        steps += p
        for more, probability in enumerate(step, start=1):
            if k + more < least:
                held[k + more] += p * probability
            else:
                done[k + more] = done.get(k + more, 0.0) + p * probability
    tokens = sum(p * sum(accepted**i for i in range(k + 1)) for k, p in done.items())
    return Chain(inner, steps, done, tokens, sum(p * accepted**k for k, p in done.items()))


class Choice(NamedTuple):
    """All trees and chains that may be chosen, of one head and one q."""

    trees: list[Tree]
    chains: list[Chain]

    def tree(self, curve: Curve) -> float:
        return max(tree.speed(curve) for tree in self.trees)

    def hierarchy(self, middle: float, curve: Curve) -> float:
        """With a middle that costs so much."""
        costs = [(chain.tokens, *chain.costs(curve)) for chain in self.chains]
        return max(tokens / (middle * steps + verification) for tokens, steps, verification in costs)

    def border(self, curve: Curve) -> float | None:
        """The most that a middle may cost, for the hierarchy to be as fast as the tree and as no speculation;
        None if nothing is cheap enough."""
        least, costs = (
            max(1.0, self.tree(curve)),
            [(chain.tokens, *chain.costs(curve)) for chain in self.chains],
        )
        most = max((tokens / least - verification) / steps for tokens, steps, verification in costs)
        return most if most > 0 else None

    def point(self, steepness: float) -> dict[str, Any]:
        """The border at this T(30), and the speedups over no speculation around it."""
        curve = straight(steepness)
        place = {"steepness": steepness, "middle": self.border(curve)}
        speeds = {"best tree": self.tree(curve), "largest tree": self.trees[-1].speed(curve)}
        hierarchies = {str(middle): self.hierarchy(middle, curve) for middle in MIDDLES}
        return place | speeds | {"hierarchy by middle": hierarchies}


def choices(head: Acceptance, cost: float, accepted: float, depth: int, topk: int) -> Choice:
    largest = 1 + topk + (depth - 1) * topk**2
    sizes = [n for n in TreeDrafter.SIZES if n <= largest]
    trees = [Tree(head, n, min(depth, (n - 1).bit_length()), topk, cost) for n in sizes]  # as `TreeDrafter`
    return Choice(trees, [chain_of(tree, least, accepted) for tree in trees for least in LENGTHS])


def cost_files(folder: Path) -> Iterable[tuple[str, dict]]:
    """The results of `bench.py cost` in a folder, by machine, with whole T(n)."""
    for path in sorted(folder.glob("*.json")):
        try:
            file = json.loads(path.read_text(encoding="utf-8"))
            if file["report"] == "cost":
                yield path.stem, file
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"--results: {path} is no file of bench.py: {error!r}") from None


def machine_rows(folder: Path, head: Acceptance, shape: tuple[int, int]) -> dict[str, dict]:
    """Every measured machine and precision: where it lies, and what it is predicted with its own T(n).

    The middle is the smaller model, and the target itself with activations of fewer bits.
    """
    rows = {}
    for name, file in cost_files(folder):
        for precision, costs in file["results"].items():
            seconds, units = costs["verification"], costs["drafting"]
            level = units.get("a level of the EAGLE head")
            if max(map(int, seconds)) < 30 or level is None:
                continue
            curve, cost = measured(seconds), level / seconds["1"]
            for unit, value in units.items():
                if unit.startswith("a token"):
                    place = {"steepness": curve(30), "middle": value / seconds["1"], "head": cost}
                    rows[f"{name} {precision}, {unit[len('a token ') :]}"] = place | speeds_at(
                        head, shape, curve, place
                    )
    return rows


def speeds_at(
    head: Acceptance, shape: tuple[int, int], curve: Curve, place: dict[str, float]
) -> dict[str, Any]:
    """Predicted speedups over `autoregressive`, of the best tree and, for each q, of the best hierarchy."""
    of_each = {q: choices(head, place["head"], q, *shape) for q in CHAINS}
    hierarchies = {str(q): choice.hierarchy(place["middle"], curve) for q, choice in of_each.items()}
    return {"tree": of_each[CHAINS[0]].tree(curve), "hierarchy": hierarchies}


def report_when(args: argparse.Namespace) -> dict:
    """The border for three q and two d, over T(30), and the machines of --results as points: see above."""
    head, shape = read_acceptance(args.acceptance, "--acceptance"), (args.tree_depth, args.tree_topk)
    borders: dict[str, Any] = {}
    for cost in HEADS:
        for q in CHAINS:
            choice = choices(head, cost, q, *shape)
            points = [choice.point(s) for s in STEEPNESS]
            borders[f"d = {cost}, q = {q}"] = {"head": cost, "chain": q, "points": points}
    machines = machine_rows(args.results, head, shape)
    print_when(borders, machines)
    return {"head": head._asdict(), "borders": borders, "machines": machines}


def print_when(borders: dict[str, dict], machines: dict[str, dict]) -> None:
    shown = [s for s in STEEPNESS if abs(s - round(s)) < 1e-9]
    print("the most that a step of the middle may cost, in T(1), by T(30) / T(1)")
    print(f"{'':20}" + "".join(f"{s:8.0f}" for s in shown))
    for name, row in borders.items():
        cells = (point["middle"] for point in row["points"] if point["steepness"] in shown)
        print(f"{name:20}" + "".join("   never" if m is None else f"{m:8.3f}" for m in cells))
    print(f"\n{'':56}T(30)   middle   head   tree   hierarchy at q = {', '.join(map(str, CHAINS))}")
    for name, row in machines.items():
        speeds = "".join(f"{speed:8.2f}" for speed in row["hierarchy"].values())
        place = f"{row['steepness']:7.2f}{row['middle']:9.3f}{row['head']:7.2f}"
        print(f"{name:54}{place}{row['tree']:7.2f}{speeds}")
