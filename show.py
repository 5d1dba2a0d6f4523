"""show.py: what a person or a program sees of a run: texts as they grow, drafts, statistics.

    output.add(emission); screen.update()         # text, as it is accepted
    print(draw_step(emission, tokenizer))         # a draft and what became of it
    print(format_stats(stats_json(...)))          # a few lines for people; `stats_json` is for --json

The one idea: an `Output` collects what became of one prompt, and everything printed is a view of it. Nothing
here decodes, and nothing reads flags.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

import torch

from checkpoints import weight_bytes
from costs import Histogram, Stats
from gpt_spec import Emission
from sampling import Logprob
from text import TextStream, Tokenizer

# --------------------------------------------------------------------------------------------------
# Texts and drafts
# --------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """A token of an output with its log-probability."""

    begin: int  # where its text begins, in characters
    logprob: Logprob


@dataclass
class Output:
    """One prompt and the text that was decoded from it."""

    prompt_ids: list[int]
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)  # per token: did the drafter propose it?
    steps: int = 0  # verifications; the first token comes from prefill
    finish_reason: str | None = None
    error: str | None = None
    logprobs: list[Logprob] | None = None  # of the tokens, where they were asked for
    said: int = 0  # of these, how many `new_logprobs` has handed out

    def add(self, emission: Emission) -> None:
        """Append the tokens of a step."""
        self.token_ids += emission.tokens
        self.steps += emission.draft is not None
        if emission.logprobs is not None:
            self.logprobs = (self.logprobs or []) + emission.logprobs
        self.drafted += [i < emission.accepted for i in range(len(emission.tokens))]
        if emission.finish_reason:
            self.finish(emission.finish_reason)

    def finish(self, reason: str) -> None:
        """End the output, for `reason`."""
        self.finish_reason = reason
        self.stream.finish()

    def new_logprobs(self) -> list[Said]:
        """Of the tokens whose whole text can be shown by now, and were not handed out. A stop token has no
        text, nor have tokens of a stop string."""
        begins, end = [0, *self.stream.ends], self.stream.shown_tokens
        if self.finish_reason:
            cut = self.finish_reason == "stop" and len(self.stream.ends) == len(self.token_ids)
            end = sum(not cut or begin < len(self.stream.text) for begin in begins[:-1])
        first, self.said = self.said, max(self.said, end)
        return [Said(begins[i], self.logprobs[i]) for i in range(first, self.said)]

    @property
    def tokens_per_step(self) -> float | None:
        return (len(self.token_ids) - 1) / self.steps if self.steps else None

    def as_json(self) -> dict[str, Any]:
        """What --json prints as one of `outputs`."""
        has_text = self.stream.tokenizer is not None and self.finish_reason != "error"
        said = {} if self.logprobs is None else {"logprobs": [logprob_json(each) for each in self.logprobs]}
        return {
            "prompt_ids": self.prompt_ids,
            "token_ids": self.token_ids,
            "text": self.stream.text if has_text else None,
            "finish_reason": self.finish_reason,
            "error": self.error,
            **said,
        }


def logprob_json(said: Logprob) -> dict[str, Any]:
    """JSON has no -inf: OpenAI writes -9999."""
    top = [[token, max(value, -9999.0)] for token, value in said.top]
    return {"id": said.token, "logprob": max(said.logprob, -9999.0), "top": top}


class Screen:
    """Writes outputs in input order, the first unfinished one as it grows; with --explain, in colours."""

    DRAFTED, OWN, PLAIN = "\033[32m", "\033[33m", "\033[0m"

    def __init__(self, outputs: list[Output], explain: bool, stream: TextIO | None = None):
        self.outputs, self.explain, self.stream = outputs, explain, stream or sys.stdout
        self.current, self.begun = 0, False

    @classmethod
    def legend(cls) -> str:
        """What the colours mean."""
        return f"{cls.DRAFTED}proposed by the drafter{cls.PLAIN}, {cls.OWN}the target's own{cls.PLAIN}"

    def update(self) -> None:
        """Write everything that is new. A text waits until all texts before it are finished."""
        while self.current < len(self.outputs):
            output = self.outputs[self.current]
            if not self.begun and len(self.outputs) > 1:
                self.stream.write(f"--- {self.current + 1}\n")
            self.begun = True
            for token, text in output.stream.new_spans():
                colour = self.DRAFTED if output.drafted[token] else self.OWN
                self.stream.write(f"{colour}{text}{self.PLAIN}" if self.explain else text)
            if output.finish_reason is None:
                break
            last = f"error: {output.error}" if output.error else output.stream.text
            self.stream.write("" if last.endswith("\n") and not output.error else "\n")
            self.current, self.begun = self.current + 1, False
        self.stream.flush()


def draw_step(emission: Emission, tokenizer: Tokenizer | None) -> str:
    """A drawing of what a step proposed and accepted: nodes in a row, branches below each other."""
    tokens, parents = (t[emission.row].tolist() for t in (emission.draft.tokens, emission.draft.parent))
    children = {
        node: [i for i, parent in enumerate(parents) if parent == node] for node in range(len(tokens))
    }
    accepted, node = set(), 0
    for token in emission.tokens[: emission.accepted]:
        node = next(i for i in children[node] if tokens[i] == token)
        accepted.add(node)

    def word(token: int) -> str:
        return repr(tokenizer.token_bytes(token).decode(errors="replace")) if tokenizer else str(token)

    def draw(node: int, indent: str) -> list[str]:
        """The lines of a subtree; only children stand behind their parents."""
        run = [node]
        while len(children[run[-1]]) == 1:
            run += children[run[-1]]
        words = [
            f"{Screen.DRAFTED}{word(tokens[i])}{Screen.PLAIN}" if i in accepted else word(tokens[i])
            for i in run
        ]
        return [indent + " ".join(words)] + [
            line for child in children[run[-1]] for line in draw(child, indent + "    ")
        ]

    own = "".join(f", then {word(token)}" for token in emission.tokens[emission.accepted :])
    drafted = sum(parent >= 0 for parent in parents)
    head = f"\n[{emission.prompt_index + 1}] {drafted} drafted, {emission.accepted} accepted{own}"
    return "\n".join([head, *draw(0, "    ")])


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------


def peak_memory(device: str) -> int:
    """Bytes: of the GPU, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


STATS_FIELDS = [
    "new_tokens", "prefill_seconds", "time_to_first_token_seconds",
    "decode_seconds", "decode_tokens_per_second", "target_forwards",
    "drafted_tokens", "accepted_tokens", "tokens_per_step",
    "acceptance_by_position", "compile_seconds",
    "aggregate_tokens_per_second", "occupancy",
]  # fmt: skip
TREE_FIELDS = ["expected_accepted_tokens", "nodes_histogram"]
LEVEL_FIELDS = [
    "drafted_tokens", "accepted_tokens", "tokens_per_step",
    "drafting_seconds", "verification_seconds",
]  # fmt: skip


def stats_json(
    stats: Stats, models: list[torch.nn.Module], device: str, method: str, outputs: list[Output]
) -> dict[str, Any]:
    """What --json prints as `stats`."""
    memory = {"peak_memory_bytes": peak_memory(device), "weight_bytes": weight_bytes(models)}
    names = STATS_FIELDS + (TREE_FIELDS if method == "tree" else [])
    more = {"levels": levels_json(stats)} if stats.inside else {}
    more |= {"steps_by_drafter": stats.drafter_histogram} if stats.drafter_histogram else {}
    more |= {"tokens_per_step_by_output": [output.tokens_per_step for output in outputs]}
    return {name: getattr(stats, name) for name in names} | memory | more


def levels_json(stats: Stats) -> list[dict[str, Any]]:
    """All levels, the target's first. The drafting_seconds of a level cover all levels behind it."""
    level = {"forwards": stats.target_forwards} | {name: getattr(stats, name) for name in LEVEL_FIELDS}
    return [level, *(levels_json(stats.inside) if stats.inside else [])]


def format_levels(levels: list[dict[str, Any]]) -> str:
    """A line for people: what every level yields, and where the time goes."""
    names = ["the target", "the middle model", *(f"model {i}" for i in range(2, len(levels)))]
    parts = [
        f"{name} {level['tokens_per_step']:.2f} tokens per step, {level['verification_seconds']:.2f} s"
        for name, level in zip(names, levels)
    ]
    return f"levels: {'; '.join(parts)}; its drafter {levels[-1]['drafting_seconds']:.2f} s\n"


def format_drafters(steps: dict[str, int]) -> str:
    """A line for people: the steps that each drafter took."""
    parts = (f"{name} {count}" for name, count in sorted(steps.items(), key=lambda item: -item[1]))
    return f"steps by drafter: {', '.join(parts)}\n"


def format_batch(s: dict[str, Any]) -> str:
    """A line for people: the speed of all texts together, and how even their steps are."""
    rates = [rate for rate in s["tokens_per_step_by_output"] if rate is not None]
    line = f"all texts: {s['aggregate_tokens_per_second']:.1f} tokens/s with prefill"
    if rates:  # texts of one token take no step
        line += f"; rows occupied {s['occupancy']:.2f}; tokens per step of a text {min(rates):.2f} to "
        line += f"{max(rates):.2f}"
    return line + "\n"


def format_stats(s: dict[str, Any]) -> str:
    """Three to six lines for people; `s` is what --json prints as `stats`."""
    by_position = ", ".join(f"{share:.2f}" for share in s["acceptance_by_position"])
    accepted = f"{s['accepted_tokens']} of {s['drafted_tokens']} drafted tokens accepted"
    if "expected_accepted_tokens" in s:
        sizes = ", ".join(f"{n} in {steps}" for n, steps in sorted(s["nodes_histogram"].items()))
        accepted += f", {s['expected_accepted_tokens']:.0f} expected; nodes verified: {sizes} steps"
    return (
        f"{s['new_tokens']} tokens, {s['decode_tokens_per_second']:.1f} tokens/s; "
        f"first token after {s['time_to_first_token_seconds']:.3f} s; warm-up {s['compile_seconds']:.1f} s\n"
        f"{s['tokens_per_step']:.2f} tokens per step of the target"
        + (f"; {accepted}; at least 1, 2, ... in {by_position} of the steps\n" if by_position else "\n")
        + (format_drafters(s["steps_by_drafter"]) if "steps_by_drafter" in s else "")
        + (format_levels(s["levels"]) if "levels" in s else "")
        + (format_batch(s) if len(s["tokens_per_step_by_output"]) > 1 else "")
        + f"weights {s['weight_bytes'] / 1e6:.1f} MB, peak memory {s['peak_memory_bytes'] / 1e6:.0f} MB"
    )


# --------------------------------------------------------------------------------------------------
# A server's metrics
# --------------------------------------------------------------------------------------------------


METRICS = {  # fields of `Stats`, as Prometheus reads them; most names are those of vLLM
    "outputs": "texts_total", "new_tokens": "generation_tokens_total", "occupancy": "occupancy",
    "prefill_seconds": "prefill_seconds_total", "decode_seconds": "decode_seconds_total",
    "target_forwards": "spec_decode_num_drafts_total", "tokens_per_step": "tokens_per_step",
    "drafted_tokens": "spec_decode_num_draft_tokens_total",
    "accepted_tokens": "spec_decode_num_accepted_tokens_total",
}  # fmt: skip


def metrics_text(stats: dict[str, Stats], more: dict[str, float], times: dict[str, Histogram]) -> str:
    """What Prometheus reads: `Stats` by method; other numbers by name, perhaps with labels; histograms."""
    values = dict(more)
    for method, each in stats.items():
        label = f'method="{method}"'
        values |= {f"{name}{{{label}}}": getattr(each, of) for of, name in METRICS.items()}
        for place in range(len(each.accepted_histogram) - 1):
            name = f'spec_decode_num_accepted_tokens_per_pos_total{{{label},position="{place}"}}'
            values[name] = sum(each.accepted_histogram[place + 1 :])
        for drafter, steps in [*each.drafter_histogram.items()]:  # another thread may add one
            values[f'steps_by_drafter_total{{{label},drafter="{drafter}"}}'] = steps
    for name, histogram in times.items():
        pairs = zip(histogram.BOUNDS, histogram.counts)
        values |= {f'{name}_bucket{{le="{str(bound).replace("inf", "+Inf")}"}}': n for bound, n in pairs}
        values |= {f"{name}_sum": histogram.sum, f"{name}_count": histogram.counts[-1]}
    lines: dict[str, list[str]] = {}
    for name, value in values.items():
        family = next((time for time in times if name.startswith(time)), name.partition("{")[0])
        kind = "histogram" if family in times else "counter" if family.endswith("_total") else "gauge"
        lines.setdefault(f"# TYPE gpt_spec:{family} {kind}", []).append(f"gpt_spec:{name} {value}")
    return "".join(
        f"{head}\n" + "".join(f"{line}\n" for line in all_of_it) for head, all_of_it in lines.items()
    )
