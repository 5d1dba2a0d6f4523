"""acceptance.py: how many tokens a draft brings, from published numbers: chains, trees of every size.

    PRESETS["eagle3-8b"].tokens_per_step(60, depth=8, topk=10)    # tau of the best tree of 60 nodes

Published are the acceptance of chains by position, and the mean of one large tree. What lies between follows
from one number, `breadth`: where the better children of a node were wrong, the share in which the next one is
right. It is chosen so that the large tree has its published mean.

The one idea: a tree gains by breadth what its chain leaves, so both must come from the same probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from heapq import nlargest
from typing import NamedTuple

from model import BadInput


class Acceptance(NamedTuple):
    """`probabilities` that the best child of a node is right if the node was, by depth. The last one holds
    for all deeper ones."""

    probabilities: tuple[float, ...]
    source: str
    breadth: float = 0.0

    def of_child(self, depth: int, rank: int) -> float:
        """That the child of this rank is right, and none of another one. Both count from 0."""
        p = self.probabilities[min(depth, len(self.probabilities) - 1)]
        return p if rank == 0 else (1 - p) * self.breadth * (1 - self.breadth) ** (rank - 1)

    def best_nodes(self, depth: int, topk: int) -> list[tuple[float, int]]:
        """Probability and depth of the nodes of a tree as `TreeDrafter` grows it, the best first: of each
        depth the k best nodes have children, the k best of each."""
        beam, pool = [1.0], []
        for d in range(depth):
            children = [p * self.of_child(d, rank) for p in beam for rank in range(topk)]
            pool += [(p, d + 1) for p in children]
            beam = nlargest(topk, children)
        return sorted(pool, key=lambda node: -node[0])

    def tokens_per_step(self, nodes: int, depth: int, topk: int = 1) -> float:
        """tau of trees of so many nodes, the root among them; with `topk` 1, of chains."""
        return 1 + sum(p for p, _ in self.best_nodes(depth, topk)[: nodes - 1])


def from_shares(shares: Iterable[float], source: str) -> Acceptance:
    """`shares` of the steps that accepted at least 1, 2, ... tokens of a chain."""
    shares = [1.0, *shares]
    return Acceptance(tuple(b / a for a, b in zip(shares, shares[1:])), source)


def fit(
    tau: float, make: Callable[[float], Acceptance], measure: Callable[[Acceptance], float]
) -> Acceptance:
    """Made of the number from 0 to 1 with which `measure`, which grows with it, is tau."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(make(middle)) < tau else (low, middle)
    return make(low)


def with_breadth(chain: Acceptance, tau: float, shape: tuple[int, int, int], source: str) -> Acceptance:
    """The same chains, and trees of this shape (nodes, depth, top-k) that yield tau tokens per step."""
    both = f"{chain.source}; trees: {source}"
    make = partial(Acceptance, chain.probabilities, both)
    return fit(tau, make, lambda acceptance: acceptance.tokens_per_step(*shape))


def from_mean(tau: float, shape: tuple[int, int, int], breadth: float, source: str) -> Acceptance:
    """One probability for all depths, with which trees of this shape yield tau tokens per step."""

    def make(p: float) -> Acceptance:
        return Acceptance((p,), source, breadth)

    return fit(tau, make, lambda acceptance: acceptance.tokens_per_step(*shape))


PAPER = "EAGLE-3 paper (arXiv 2503.01840), Table 1, MT-bench, T=0"
OF_PUBLISHED = (60, 8, 10)  # trees of the EAGLE-3 paper: nodes, depth, top-k
EAGLE3 = with_breadth(
    from_shares(
        (0.74, 0.54, 0.41, 0.31, 0.23, 0.17, 0.13),
        "vLLM issue #26191: Llama-3.1-8B-Instruct, yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, chain, K=7, "
        "MT-bench, T=0",
    ),
    5.37,
    OF_PUBLISHED,
    "SGLang #4247, tau 5.37 with 60 nodes and 8 steps (the paper: 6.13)",
)
ONLY_MEAN = f"{PAPER}, only tau is published, breadth as of eagle3-8b"
PRESETS = {
    "eagle3-8b": EAGLE3,
    "eagle3-redhat-8b": from_shares(
        (0.7296, 0.5208, 0.3545),
        "vLLM tests/v1/spec_decode/test_acceptance_length.py at 029ba375, chain, MT-bench, T=0",
    ),
    "eagle3-70b": with_breadth(
        from_shares((0.751, 0.567, 0.453), "vLLM issue #50170: Llama-3.3-70B, chain, K=3"),
        5.63,
        OF_PUBLISHED,
        f"{PAPER}: Llama-3.3-70B, tau 5.63, as if of 60 nodes and depth 8",
    ),
    "eagle2-8b": from_mean(
        4.05, (60, 6, 10), EAGLE3.breadth, f"{ONLY_MEAN}: Llama-3.1-8B, EAGLE-2, tau 4.05"
    ),
    "eagle2-70b": from_mean(
        3.67, (60, 6, 10), EAGLE3.breadth, f"{ONLY_MEAN}: Llama-3.3-70B, EAGLE-2, tau 3.67"
    ),
    "sequential": Acceptance(
        (0.72,),
        "one user's aggregate for Llama-3.3-70B with a 3B drafter, Hugging Face Nexusflow/Athene-V2-Chat "
        "discussion 6: weak evidence, no numbers by position are published",
    ),
    "qspec": Acceptance((0.96,), "w4a4 drafts of an 8 B model, measured independently"),
}


def read_acceptance(text: str, flag: str) -> Acceptance:
    """The name of a preset, or a list of probabilities like 0.8,0.7. Raises BadInput."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        probabilities = tuple(float(part) for part in text.split(","))
        if not all(0 <= p <= 1 for p in probabilities):
            raise ValueError
    except ValueError:
        names = ", ".join(PRESETS)
        raise BadInput(f"{flag}: {text!r} is neither a list like 0.8,0.7 nor one of {names}") from None
    return Acceptance(probabilities, f"{flag} {text}, breadth as of eagle3-8b", EAGLE3.breadth)
