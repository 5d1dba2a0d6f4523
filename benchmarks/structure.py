"""structure.py: drafts for texts that follow a schema, with and without those that the schema forces.

    python bench.py sampling    # of which this is the last part

The one idea: a draft changes no text, so with and without forced drafts the same tokens are written, and what
differs is the number of steps. All ways to draft are switches of one decoder, and run the same graphs.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import fmean, harmonic_mean, median
from typing import Any

from benchmarks.common import Parts, Prompt, Run, build_decoders, timed
from benchmarks.compare import count_different
from benchmarks.timing import rotate_names
from costs import Stats
from drafts import Draft, Drafter, State
from forced import ForcedDrafter
from generate import Target
from gpt_spec import LookupDrafter
from grammar import Matcher, Vocabulary, grammar_text, library
from model import BadInput
from sampling import Sampling

TURNS = 3  # at most
COMPACT = {"x-guidance": {"whitespace_flexible": False}}  # no blanks between the parts of a text


def text(most: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": most}


def number(most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": most}


def one_of(*names: str) -> dict[str, Any]:
    return {"enum": list(names)}


def record(**properties: dict[str, Any]) -> dict[str, Any]:
    """An object that has all of these, and nothing else."""
    needed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties} | needed


def some(item: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


SCHEMAS = {  # from keys that are most of a text to texts that are most of it
    "a person": record(
        first_name=text(20),
        last_name=text(20),
        date_of_birth=record(year=number(2020), month=number(12), day=number(31)),
        marital_status=one_of("single", "married", "divorced", "widowed"),
    ),
    "an order": record(
        order_number=number(99999),
        customer=record(name=text(30), email_address=text(30)),
        items=some(record(description=text(30), quantity=number(99)), 2, 3),
        currency=one_of("EUR", "USD", "GBP"),
    ),
    "a call of a function": record(
        name=one_of("get_current_weather", "get_weather_forecast"),
        arguments=record(location=text(30), temperature_unit=one_of("celsius", "fahrenheit")),
    ),
    "a review of a program": record(
        summary=text(80),
        severity=one_of("low", "medium", "high"),
        line_number=number(999),
        suggestion=text(80),
    ),
    "a list of numbers": record(values=some(number(999), 8, 16)),
}


class SwitchedLookup(LookupDrafter):
    """`lookup`, or where it is off, no draft."""

    on = True

    def propose(self, state: State, n: int | None = None) -> Draft:
        return super().propose(state, n) if self.on else Drafter.propose(self, state, n)


class SwitchedForced(ForcedDrafter):
    """Forced drafts, or where it is off, only those of the other drafter."""

    on = True

    def propose(self, state: State, n: int | None = None) -> Draft:
        if self.on:
            return super().propose(state, n)
        self.asked, self.forced = self.inner.propose(state, n), [False] * int(state.active.sum())
        return self.asked


WAYS = {  # are forced tokens drafted, and is the text searched?
    "autoregressive": (False, False),
    "forced": (True, False),
    "lookup": (False, True),
    "forced, lookup": (True, True),
}


def measure_structure(parts: Parts, args: argparse.Namespace) -> dict[str, Any]:
    """For each schema and way to draft: tokens per step, tokens/s (medians of up to three turns), and the
    share of all tokens that were accepted from forced drafts. Blanks as usual, and without any."""
    try:
        vocabulary = read_vocabulary(parts)
    except BadInput as error:
        print(f"drafts under a schema are left out: {error}", flush=True)
        return {"left_out": str(error)}
    matchers = {
        name + how: Matcher(vocabulary, grammar_text(schema | options))
        for how, options in (("", {}), (", compact", COMPACT))
        for name, schema in SCHEMAS.items()
    }
    prompts = {name: Prompt(ask_for(name.removesuffix(", compact"), parts.target)) for name in matchers}
    drafter = SwitchedForced(SwitchedLookup())
    usual = Sampling(args.temperature, grammar=next(iter(matchers.values())))
    build = partial(build_decoders, parts.target.model, {"": drafter}, list(prompts.values()), args)
    [decoder] = build(sampling=usual).values()
    results: dict[str, Any] = {}
    for name, matcher in matchers.items():
        options = {"samplings": [Sampling(args.temperature, grammar=matcher)]}
        runs: dict[str, list[Run]] = {way: [] for way in WAYS}
        forced: dict[str, int] = {}
        for turn in range(min(args.repeats, TURNS)):
            for way in rotate_names(list(WAYS), turn):
                drafter.on, drafter.inner.on = WAYS[way]
                settings = ([prompts[name].tokens], args.max_new_tokens, Stats(), parts.target.stop_ids)
                runs[way].append(timed(decoder, *settings, **options))
                forced[way] = drafter.accepted
        results[name] = summarize(runs, forced, parts.target)
    results["all"] = average([row for name, row in results.items() if "compact" not in name])
    results["all, compact"] = average([row for name, row in results.items() if name.endswith(", compact")])
    print_structure(results)
    return results


def read_vocabulary(parts: Parts) -> Vocabulary:
    """The target's. BadInput where there is no llguidance, or no tokenizer."""
    library()
    target = parts.target
    if target.tokenizer is None:
        raise BadInput("the checkpoint has no tokenizer")
    return Vocabulary(target.tokenizer, target.model.config.vocab_size, target.stop_ids)


def ask_for(what: str, target: Target) -> list[int]:
    """A prompt: a message to a model that knows conversations, to others the beginning of a file."""
    if target.tokenizer.template:
        return target.tokenizer.encode_chat([{"role": "user", "content": f"Make up {what}, in JSON."}])
    return target.tokenizer.encode(f"# {what}, in JSON\n")


def summarize(runs: dict[str, list[Run]], forced: dict[str, int], target: Target) -> dict[str, Any]:
    """A row of `measure_structure`: what each way to draft came to."""
    first, base = runs["autoregressive"][0], median(run.speed for run in runs["autoregressive"])
    row: dict[str, Any] = {"tokens": len(first.texts[0]), "ended": first.texts[0][-1] in target.stop_ids}
    for way, mine in runs.items():
        speed = median(run.speed for run in mine)
        row[way] = {
            "tokens_per_step": mine[0].tokens / mine[0].steps,
            "tokens_per_second": speed,
            "speedup": speed / base,
            "forced": forced[way] / row["tokens"],
            "different_texts": count_different(mine, runs["autoregressive"]),
        }
    return row


def average(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the schemas; of tokens/s, the harmonic mean: each schema counts alike."""
    result: dict[str, Any] = {"tokens": fmean(row["tokens"] for row in rows)}
    for way in WAYS:
        mine = [row[way] for row in rows]
        result[way] = {key: fmean(row[key] for row in mine) for key in mine[0]}
        result[way]["tokens_per_second"] = harmonic_mean([row["tokens_per_second"] for row in mine])
        result[way]["different_texts"] = sum(row["different_texts"] for row in mine)
    return result


def print_structure(results: dict[str, Any]) -> None:
    print(f"{'tokens per step, tokens/s (speedup)':34}tokens  forced" + "".join(f"{way:>26}" for way in WAYS))
    for name, row in results.items():
        cells = (
            f"{x['tokens_per_step']:.2f} {x['tokens_per_second']:.0f} ({x['speedup']:.2f})"
            for x in (row[way] for way in WAYS)
        )
        share, cut = row["forced"]["forced"], "" if row.get("ended", True) else ", cut"
        line = f"{name + cut:34}{row['tokens']:6.0f}{share:8.2f}" + "".join(f"{cell:>26}" for cell in cells)
        print(line, flush=True)
    wrong = sum(results["all" + how][way]["different_texts"] for how in ("", ", compact") for way in WAYS)
    print(f"{wrong} texts are not those of autoregressive")
