"""costs.py: what steps cost and what they bring.

`Stats` counts a run, for people. `Pace` estimates, for drafters: the seconds of a step with n nodes, and
recent tokens per second. A drafter that sizes its drafts asks its `Pace` which number of nodes pays best, and
`AutoDrafter` (auto.py) compares the paces of several drafters. `measure_costs` fills them before decoding.

The one idea: a step of n nodes is worth its expected tokens less what its time would bring elsewhere,
E(n) - rate * T(n). Nothing in this file can change a text. The estimates know numbers and clocks, and no
tensors. Only `measure_costs` runs steps, of a level that holds no text yet.
"""

from __future__ import annotations

import math
import operator
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds since it was started, or since the last lap."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now
        self.start()

    def start(self) -> None:
        self.since = self.now()

    @property
    def seconds(self) -> float:
        return self.now() - self.since

    def lap(self) -> float:
        """The seconds so far. The next lap begins."""
        now = self.now()
        seconds, self.since = now - self.since, now
        return seconds


@dataclass
class Stats:
    """Counters of one run. A run cut at a stop token or at the budget is counted as cut."""

    outputs: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0  # target and drafter
    time_to_first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafting_seconds: float = 0.0  # part of decode_seconds; 0 where a whole step is one CUDA graph
    verification_seconds: float = 0.0  # also part of it; on a GPU it includes waiting for the drafting
    compile_seconds: float = 0.0
    target_forwards: int = 0  # without prefill; a batched forward counts once per active row
    row_forwards: int = 0  # the same, but rows without an unfinished text count too
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    expected_accepted_tokens: float = 0.0  # of drafters that say how probable their nodes are
    accepted_histogram: list[int] = field(default_factory=list)  # steps by accepted length
    nodes_histogram: dict[int, int] = field(default_factory=dict)  # steps by nodes verified, root included
    drafter_histogram: dict[str, int] = field(default_factory=dict)  # steps by drafter, where that changes
    inside: Stats | None = None  # of the level that drafts; all its seconds are part of our drafting_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Without the first token of each output, which prefill yields."""
        return (self.new_tokens - self.outputs) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def aggregate_tokens_per_second(self) -> float:
        """Of all rows together, prefill and first tokens included."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0

    @property
    def occupancy(self) -> float:
        """The share of rows that held an unfinished text, averaged over the steps."""
        return self.target_forwards / self.row_forwards if self.row_forwards else 0.0

    @property
    def tokens_per_step(self) -> float:
        return (self.new_tokens - self.outputs) / self.target_forwards if self.target_forwards else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Entry i: the share of steps that accepted more than i draft tokens."""
        steps = self.accepted_histogram
        return [sum(steps[i + 1 :]) / self.target_forwards for i in range(len(steps) - 1)]

    def count_prefill(self, seconds: float, all_is_read: bool = True) -> None:
        """A prompt was read, or a part of it. Its end gives the first new token."""
        self.outputs += all_is_read
        self.new_tokens += all_is_read
        self.prefill_seconds += seconds

    def count_row(self, draft: Any, result: Any, accepted: int, tokens: int) -> None:
        """One text of a verified draft. A cut left `tokens` of it, `accepted` of them drafted."""
        self.target_forwards += 1
        self.new_tokens += tokens
        self.drafted_tokens += result.drafted
        self.accepted_tokens += accepted
        kept = accepted / result.accepted if result.accepted else 1.0  # the share that a cut has left
        self.expected_accepted_tokens += kept * result.expected
        self.accepted_histogram += [0] * (draft.max_depth + 1 - len(self.accepted_histogram))
        self.accepted_histogram[accepted] += 1
        n = draft.tokens.shape[1]
        self.nodes_histogram[n] = self.nodes_histogram.get(n, 0) + 1
        if draft.drafter:
            self.drafter_histogram[draft.drafter] = self.drafter_histogram.get(draft.drafter, 0) + 1


@dataclass
class Histogram:
    """How many times were at most each bound, as Prometheus wants it, and their sum. In seconds."""

    BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, math.inf)
    counts: list[int] = field(default_factory=lambda: [0] * len(Histogram.BOUNDS))
    sum: float = 0.0

    def add(self, value: float) -> None:
        self.counts = [count + (value <= bound) for count, bound in zip(self.counts, self.BOUNDS)]
        self.sum += value


# --------------------------------------------------------------------------------------------------
# What recent steps cost and brought
# --------------------------------------------------------------------------------------------------


class Acceptance:
    """How often a draft token of each depth was accepted, of late, given that all above it were. It starts as
    if two of three had been."""

    PRIOR, DEPTHS, DECAY = (2.0, 3.0), 15, 0.98  # kept of tried

    def __init__(self):
        kept, tried = self.PRIOR
        self.kept, self.tried = [kept] * self.DEPTHS, [tried] * self.DEPTHS
        self.sums: list[float] = []  # accepted lengths to expect, by depth; empty if they have to be added up

    def count(self, accepted: int, drafted: int) -> None:
        """Count one draft, whose longest path had `drafted` tokens."""
        seen = min(accepted + 1, drafted, self.DEPTHS)
        for depth in range(seen):
            self.tried[depth] = self.DECAY * self.tried[depth] + 1
            self.kept[depth] = self.DECAY * self.kept[depth] + (depth < accepted)
        kept, tried = ((1 - self.DECAY) * count for count in self.PRIOR)
        for depth in range(drafted, self.DEPTHS):  # forget, or short drafts would stay short
            self.tried[depth] = self.DECAY * self.tried[depth] + tried
            self.kept[depth] = self.DECAY * self.kept[depth] + kept
        self.sums = []

    def expected(self, depth: int) -> float:
        """The accepted length to expect of a draft whose longest path has `depth` tokens."""
        if not self.sums:
            reached = accumulate((k / t for k, t in zip(self.kept, self.tried)), operator.mul)
            self.sums = [0.0, *accumulate(reached)]
        return self.sums[min(depth, self.DEPTHS)]


class Clock:
    """How slow the machine is at the moment, relative to the costs on record. All drafters of a level share
    one clock."""

    def __init__(self):
        # For each of the last steps: its drafter and size, and the logarithm of seconds divided by cost.
        self.recent: deque[tuple[tuple[int, int], float]] = deque(maxlen=16)

    @property
    def usual(self) -> float:
        return sum(log for _, log in self.recent) / max(len(self.recent), 1)

    @property
    def slowness(self) -> float:
        return math.exp(self.usual)

    def surprise(self, kind: tuple[int, int], ratio: float) -> float:
        """By what factor a step was slower than other recent steps, each relative to its cost. It is 1 where
        there are too few to compare with.

        `kind` is the step's drafter and size. Only steps of other kinds tell whether the machine is slow.
        """
        log = math.log(ratio)
        if self.recent:  # a hiccup counts for little, also when other steps are compared with it
            log = min(max(log, self.usual - math.log(2)), self.usual + math.log(2))
        others = [other for its, other in self.recent if its != kind]
        self.recent.append((kind, log))
        return math.exp(log - sum(others) / len(others)) if len(others) > 3 else 1.0


@dataclass
class Pace:
    """What a drafter learns while it is used: the cost of a step with n nodes, measured before it decodes and
    corrected since, and its tokens per second of late."""

    TRUST = (8, 20)  # how many steps a measured cost weighs as, at first and later: see `correct`

    seconds: dict[int, float] = field(default_factory=dict)  # of a step with n nodes, drafting included
    clock: Clock = field(default_factory=Clock)
    # Sums over recent steps, older ones counting less and less: the tokens of one text, and what such steps
    # cost. Not the time they took: seconds from a moment when the machine was slower do not compare.
    tokens: float = 0.0
    cost: float = 0.0
    corrections: dict[int, int] = field(default_factory=dict)  # by nodes, up to a limit

    @property
    def rate(self) -> float:
        """Tokens per second of a text; 0 if nothing is known."""
        return self.tokens / self.cost if self.cost else 0.0

    def count(self, tokens: float, nodes: int, seconds: float) -> None:
        """Count a step that verified so many nodes: its tokens, averaged over the texts, and its time."""
        cost = self.seconds.get(nodes, 0.0)
        self.tokens, self.cost = 0.98 * self.tokens + tokens, 0.98 * self.cost + cost
        if cost > 0:
            self.correct(nodes, seconds)

    def correct(self, nodes: int, seconds: float) -> None:
        """Move a cost towards what the step took, compared with recent steps of other kinds. One
        step says little on a busy machine, so the cost moves by a fraction of the difference."""
        surprise = self.clock.surprise((id(self), nodes), seconds / self.seconds[nodes])
        first, later = self.TRUST
        weight = min(first + self.corrections.get(nodes, 0), later)
        self.corrections[nodes] = weight + 1 - first
        self.seconds[nodes] *= surprise ** (1 / weight)

    def best(self, expected: dict[int, float]) -> int:
        """The number of nodes to verify, given the accepted tokens to expect of each number.

        More nodes pay while they bring more tokens than their time brings on average: take the largest
        expected - rate * seconds. At the rate that this rule settles at, it is the fastest choice.
        """
        return max(expected, key=lambda n: expected[n] - self.rate * self.seconds.get(n, 0.0))

    def start(self, seconds: dict[int, float], depths: dict[int, int]) -> None:
        """Take the costs of steps; and a first rate, that of the fastest size at the usual acceptance."""
        self.seconds, usual = dict(seconds), Acceptance()
        steps = [(1 + usual.expected(depth), seconds[n]) for n, depth in depths.items()]
        self.tokens, self.cost = max(steps, key=lambda step: step[0] / step[1])


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def contestants(drafter: Any) -> dict[str, Any]:
    """The drafters that `auto` chooses from, by name; of any other drafter, itself."""
    return getattr(drafter, "drafters", {"": drafter})


def set_costs(drafter: Any, seconds: dict[int, float]) -> None:
    """Tell a drafter what a step of every size takes."""
    drafter.pace.start(seconds, {n: drafter.max_depth(n) for n in seconds})


def assumed_seconds(n: int) -> float:
    """Of a step of n nodes, until steps can be measured: a node more takes a tenth of a step more."""
    return 0.01 * (1 + 0.1 * (n - 1))


def assume_costs(drafter: Any) -> None:
    """Costs for all drafters that ask for them, those of inner levels, too."""
    for each in contestants(drafter).values():
        if drafter.needs_costs:
            set_costs(each, {n: assumed_seconds(n) for n in each.draft_sizes()})
        if hasattr(each, "level"):  # a decoder that drafts
            assume_costs(each.level.drafter)


def measure_costs(level: Any, costs: dict[str, float]) -> None:
    """Seconds of a step of every contestant and size, into its `Pace` and into `costs`, unless they are there
    already; as if the caches were half full. The level must hold no text yet.

    The steps of all drafters and sizes are interleaved, so that all see the same machine.
    """
    drafters, times = contestants(level.drafter), {}
    places: dict[str, Any] = {}
    for name, drafter in drafters.items():
        places |= {f"{name} {n}".strip(): (drafter, n) for n in drafter.draft_sizes()}
    missing, watch = [key for key in places if key not in costs], level.setup.runtime.stopwatch()
    level.state.active.fill_(True)  # a drafter may have nothing to do for rows that are not
    for repeat in range(6):
        if repeat > 0 and watch.seconds > 0.4 * len(missing):
            break
        for key in missing:
            times[key] = times.get(key, []) + time_steps(level, *places[key])
    level.state.active.fill_(False)
    level.state.length.fill_(1)
    # The lower quartile: disturbances only make a step slower.
    costs |= {key: sorted(values)[len(values) // 4] for key, values in times.items()}
    for name, drafter in drafters.items():
        set_costs(drafter, {n: costs[f"{name} {n}".strip()] for n in drafter.draft_sizes()})


def time_steps(level: Any, drafter: Any, n: int) -> list[float]:
    """Seconds of some steps of n nodes. The first half warms the caches and does not count."""
    times, watch = [], level.setup.runtime.stopwatch()
    while len(times) < 2 or (len(times) < 10 and sum(times) < 0.2):
        level.state.length.fill_(min(level.setup.slots // 2, level.setup.slots - level.drafter.slack))
        watch.start()
        draft = drafter.propose(level.state, n)
        draft.max_depth = level.drafter.max_depth(draft.tokens.shape[1])  # as it will be in use
        level.commit(draft)
        times.append(watch.seconds)
    return times[len(times) // 2 :]
