"""check_head.py: does a head fit its target, and is it read as it was trained?

    python generate.py --checkpoint_path DIR --eagle_checkpoint_path HEAD --check_head --prompts FILE.jsonl

A head that is read in a wrong way, or fed with another template than it learnt from, gives no error: its
drafts are refused more often, and that is all.

The one idea: what tensors cannot tell is measured. The head is loaded again with one switch changed at a
time: other states of the target, another state that goes round, other RoPE. Each reading drafts chains of
five tokens for the same texts. The right one stands out, and where none does, head and target do not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Any

from tqdm import tqdm

from costs import Stats
from dflash import BlockDrafter, BlockHead
from eagle import Eagle3Head, EagleHead, TreeDrafter, default_taps
from gpt_spec import Decoder
from model import ModelConfig, Transformer
from rope import RopeScaling
from sampling import Sampling

DEPTH = 5  # of a chain
BETTER = 1.05  # so much more must another reading accept to be worth a word
SURE = 3  # standard errors, by which it must be more
POOR = 0.2  # of first drafts accepted: no head that fits is so bad
ENOUGH = 100  # steps, for a verdict
PUBLISHED = {  # acceptance by position of chains on MT-Bench, greedy, as vLLM's tests have it
    "RedHatAI's head of Llama-3.1-8B": (0.73, 0.52, 0.35),
    "RedHatAI's head of Qwen3-8B": (0.65, 0.40, 0.20),
}
DEFINITION = "position i: the share of steps that accepted at least i tokens of a chain of five"


@dataclass
class Reading:
    """A way to read a head, what has to be changed for it, and what it came to."""

    name: str
    changes: dict[str, Any]
    acceptance_by_position: list[float]
    steps: int  # that were measured

    @property
    def tokens_per_step(self) -> float:
        return 1 + sum(self.acceptance_by_position)

    @property
    def error(self) -> float:
        """The standard error of `tokens_per_step`, of steps that do not depend on each other."""
        squares = sum((2 * i + 1) * share for i, share in enumerate(self.acceptance_by_position))
        return sqrt(max(squares - (self.tokens_per_step - 1) ** 2, 0.0) / max(self.steps, 1))

    def as_json(self) -> dict[str, Any]:
        changes = {name: value for name, value in self.changes.items() if name != "rope_scaling"}
        facts = {"reading": self.name, "changes": changes, "steps": self.steps}
        shares = [round(share, 4) for share in self.acceptance_by_position]
        return facts | {"acceptance_by_position": shares, "tokens_per_step": round(self.tokens_per_step, 4)}


def other_readings(head: EagleHead, target: ModelConfig) -> dict[str, dict[str, Any]]:
    """What to change in a head for each reading that its tensors allow, too."""
    found: dict[str, dict[str, Any]] = {}
    taps, usual = head.taps(target.num_layers), default_taps(target.num_layers)
    states = isinstance(head, (Eagle3Head, BlockHead))
    lists = [tuple(tap + more for tap in taps) for more in (-1, 1)] if states else []
    lists += [usual] if isinstance(head, Eagle3Head) and len(usual) == len(taps) else []
    for other in dict.fromkeys(lists):
        if other != taps and all(0 <= tap < target.num_layers for tap in other):
            found[f"states {', '.join(map(str, other))}"] = {"taps": other}
    if isinstance(head, Eagle3Head):
        s = head.switches
        normed = ("goes round before the norm", "goes round after the norm")
        found[normed[not s.norm_output]] = {"norm_output": not s.norm_output}
        normed = ("added to before the norm", "added to after the norm")
        found[normed[not s.norm_before_residual]] = {"norm_before_residual": not s.norm_before_residual}
        found["features normed twice"] = {"double_norm": True}
    if isinstance(head, BlockHead):
        shifted, causal = head.block.shifted, any(head.block.causal)
        found[f"a place guesses the {'token there' if shifted else 'next token'}"] = {"shifted": not shifted}
        names = ("a place sees those before it", "a place sees the whole block")
        found[names[causal]] = {"causal": len(head.layers) * (not causal,)}
    for base in dict.fromkeys((10000.0, target.rope_theta)):
        if base != head.config.rope_theta:
            found[f"RoPE base {base:g}"] = {"rope_theta": base}
    if head.config.rope_scaling != RopeScaling():
        found["RoPE without scaling"] = {"rope_scaling": RopeScaling()}
    return found


def measure(
    target: Transformer,
    head: EagleHead,
    prompts: list[list[int]],
    tokens: int,
    stops: list[int],
    compile: bool,
) -> tuple[list[float], int]:
    """Acceptance by position of a head's chains, greedy, over `tokens` new tokens of each prompt, and the
    number of steps."""
    stats = Stats()
    longest = min(max(map(len, prompts)) + tokens, target.config.max_context)
    block = isinstance(head, BlockHead)
    depth = min(DEPTH, head.depth) if block else DEPTH
    drafter = (BlockDrafter if block else TreeDrafter)(head, depth + 1, depth, 1)
    decoder = Decoder(target, drafter, Sampling(), longest, 1, compile=compile)
    for _ in decoder.run(prompts, tokens, stops, stats=stats):
        pass
    found = stats.acceptance_by_position[:DEPTH]
    return found + [0.0] * (DEPTH - len(found)), stats.target_forwards


def check_head(
    head: EagleHead,
    load: Callable[..., EagleHead],
    target: Transformer,
    prompts: list[list[int]],
    tokens: int,
    stops: list[int],
    compile: bool,
) -> list[Reading]:
    """The head as its file says, and with one switch after another changed, as `load(**changes)` reads it."""
    todo = {"as configured": {}} | other_readings(head, target.config)
    readings = []
    for name, changes in tqdm(todo.items(), "readings", disable=None):
        head = load(**changes) if changes else head
        found = measure(target, head, prompts, tokens, stops, compile)
        readings.append(Reading(name, changes, *found))
    return readings


def show(readings: list[Reading], as_json: bool) -> None:
    """The readings as one JSON object, or as a table and what follows from it."""
    if as_json:
        return print(json.dumps({"definition": DEFINITION, "readings": [r.as_json() for r in readings]}))
    width = max(len(name) for name in (*PUBLISHED, *(reading.name for reading in readings)))
    print(f"{'':{width}}  " + "".join(f"{i + 1:6}" for i in range(DEPTH)) + "  tokens/step")
    for reading in readings:
        shares = "".join(f"{share:6.2f}" for share in reading.acceptance_by_position)
        print(f"{reading.name:{width}}  {shares}  {reading.tokens_per_step:11.2f}")
    for name, shares in PUBLISHED.items():
        print(f"{name:{width}}  " + "".join(f"{share:6.2f}" for share in shares))
    print(DEFINITION)
    print(verdict(readings))


def verdict(readings: list[Reading]) -> str:
    """One sentence about the head."""
    configured, best = readings[0], max(readings, key=lambda reading: reading.tokens_per_step)
    if configured.steps < ENOUGH:
        return f"{configured.steps} steps say little: give more prompts, or more --max_new_tokens"
    if best.acceptance_by_position[0] < POOR:
        question = "is it a head of this very target, and are the prompts as it learnt them (--chat)?"
        return f"no reading fits, with one switch changed at a time: {question}"
    gain = best.tokens_per_step - configured.tokens_per_step
    if gain > (BETTER - 1) * configured.tokens_per_step:
        if gain < SURE * hypot(best.error, configured.error):
            return f"'{best.name}' may fit better, or it is chance: give more prompts"
        return f"read it differently: '{best.name}' accepts more than what config.json says (docs/heads.md)"
    if len(readings) == 1:
        return "it is read as config.json says; there is no other reading to compare with"
    return "it is read as config.json says, and no other reading accepts more"
