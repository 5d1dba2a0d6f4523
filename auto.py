"""auto.py: drafters that choose by cost: how long a lookup should be, and which drafter should be in charge.

`AdaptiveLookup` drafts as many tokens as pay, or none. `AutoDrafter` (`--method auto`) puts that drafter in
charge which promises the most tokens per second. Both go by the costs and the acceptance of late
(`costs.py`), and neither can change a text. Nothing here knows how another drafter works inside.

    drafters = {"lookup": AdaptiveLookup(), "tree": TreeDrafter(head)}
    generate(target, prompt_ids, drafter=AutoDrafter(drafters))

The one idea: what a drafter would have brought can often be known without asking it, and where it cannot, a
short trial now and then costs next to nothing.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import compress

from torch import Tensor

from costs import Acceptance, Stats, set_costs
from drafts import Draft, Drafter, State, Verified
from gpt_spec import Level, LookupDrafter, TextIndex


class AdaptiveLookup(LookupDrafter):
    """Prompt lookup whose drafts are as long as pays, or empty.

    The more tokens agree with those before, the likelier is what followed them. So acceptance is counted for
    every number of tokens that agree, and the length of a draft depends on that number.

    The outcome of a draft can be looked up in the text, whichever drafter was in charge. So a simulated
    decoding follows the real one. Once the text is long enough to show the outcome, it takes the step that
    this drafter would have taken, and learns from it.
    """

    needs_costs = True
    SIZES = (4, 8, 16)  # nodes
    SHARED = 0.7  # what a token is worth in a batch: found by trying
    FADES = (0.96, 0.998)  # by which a token counts less after the next one: for a recent and a long-run rate

    def __init__(self, ngram: int = 6):
        super().__init__(self.SIZES[-1] - 1, ngram)

    def start(self, level: Level) -> None:
        super().start(level)
        self.acceptance = [Acceptance() for _ in range(self.ngram + 1)]  # by the number of tokens that agree
        self.replayed = dict.fromkeys(self.FADES, (0.0, 0.0))  # tokens, and what they would have cost

    def make_index(self) -> ReplayIndex:
        return ReplayIndex(self.ngram)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        self.indices[row].place = -1  # a prompt was not decoded

    def update(self, state: State) -> list[ReplayIndex | None]:
        decoded = super().update(state)
        self.replay([index for index in decoded if index])
        return decoded

    def replay(self, indices: list[ReplayIndex]) -> None:
        """Take the steps whose outcome is known by now."""
        while True:
            steps = [(index, index.ahead(self.max_nodes - 1)) for index in indices]
            known = [(index, most) for index, most in steps if most]
            if not known:
                return
            n = self.choose_size([index.agree[index.place] for index, _ in known])
            for index, most in known:
                if agree := index.agree[index.place]:
                    self.acceptance[agree].count(most - 1, self.max_nodes - 1)
                index.place += min(most, n)
            tokens, cost = sum(min(most, n) for _, most in known) / len(known), self.pace.seconds.get(n, 0.0)
            for fade, (all_tokens, all_costs) in self.replayed.items():
                left = fade**tokens
                self.replayed[fade] = (left * all_tokens + tokens, left * all_costs + cost)

    def choose_size(self, agree: list[int]) -> int:
        found = [self.acceptance[count] for count in agree if count]
        # A token that one of several texts does not gain now it may gain in a step that others need anyway.
        weight = 1.0 if len(agree) == 1 else self.SHARED / max(len(agree), 1)
        worth = {n: weight * sum(each.expected(n - 1) for each in found) for n in self.SIZES}
        return self.pace.best({1: 0.0} | worth)

    def rate(self, state: State) -> float:
        """Tokens per second if this drafter had been in charge: the better of the recent and the long-run
        rate. A text that has begun to repeat itself tends to go on, and one that has not may begin soon. What
        several texts of a batch would have shared is not known, so there the measured rate counts."""
        if len(self.indices) > 1:
            return self.pace.rate
        self.update(state)
        rates = [tokens / cost for tokens, cost in self.replayed.values() if cost]
        return max(rates, default=self.pace.rate)

    def draft_sizes(self) -> list[int]:
        return [1, *self.SIZES]


class ReplayIndex(TextIndex):
    """A `TextIndex` with the place of the simulated decoding, which follows the real one."""

    place = -1  # negative: the simulated decoding begins at the end

    def clear(self) -> None:
        super().clear()
        self.place = -1

    def update(self, text: list[int]) -> None:
        super().update(text)
        self.place = self.place if 0 <= self.place < len(text) else len(text) - 1

    def forget(self, end: int) -> None:
        self.place = self.place if self.place < end else -1
        super().forget(end)

    def accepted(self, place: int, count: int) -> int:
        """Of `count` tokens proposed behind a place, those that did follow."""
        pairs = zip(self.guess(count, place), self.text[place + 1 : place + 1 + count])
        return next((i for i, (ours, said) in enumerate(pairs) if ours != said), count)

    def ahead(self, count: int) -> int:
        """Tokens that a step from `place` would have brought, with a draft of `count` if it repeats another
        place; 0 if the text is too short to tell."""
        known = len(self.text) - 1 - self.place
        accepted = self.accepted(self.place, min(count, known)) if self.agree[self.place] else 0
        return 1 + accepted if accepted < known else 0


ALL = 2**62  # tokens read: as many as there are


class AutoDrafter(Drafter):
    """The drafter that is fastest, going by recent costs and acceptance.

    One drafter is in charge for a turn of TURN tokens. The next turn goes to the drafter that promises the
    most tokens per second. What is known of the others grows old, so each has a trial of a few steps now and
    then. Its trials may waste the share CURIOSITY of all time, so a slow drafter cannot cost more than that.
    The first trials come at once, the most promising first, going by the costs measured at the start and an
    acceptance of two in three. A drafter that could not win even if all its drafts were accepted gets none.
    Autoregressive decoding is one of the drafters: it is in charge where speculation loses.

    A drafter that is not in charge does nothing. What it misses stays in the state of the texts, tokens and
    features, and is fed to it in one chunk, as a prompt is, when its turn comes. It then goes on as if it had
    never been interrupted.
    """

    needs_host = True
    TURN, TRIAL, CURIOSITY = 16, 6, 0.003  # tokens of a text; steps; share of the time
    STAY = 2  # turns within which feeding a drafter must pay for itself

    def __init__(self, drafters: dict[str, Drafter]):
        """`drafters`, by name, all for one target; "autoregressive" need not be among them."""
        self.drafters = {"autoregressive": Drafter()} | drafters
        self.max_nodes = max(drafter.max_nodes for drafter in self.drafters.values())
        models = {id(model): model for drafter in drafters.values() for model in drafter.models}
        self.models, self.needs_costs = tuple(models.values()), True

    @property
    def slack(self) -> int:
        return max(drafter.slack for drafter in self.drafters.values())

    def taps(self, layers: int) -> tuple[int, ...]:
        # Drafters that read the same features share them; those of others come after them.
        wanted = dict.fromkeys(drafter.taps(layers) for drafter in self.drafters.values())
        return tuple(tap for taps in wanted for tap in taps)

    def view(self, level: Level, drafter: Drafter) -> State:
        """The texts of a level with those features that one of the drafters reads."""
        width, layers, begin = level.model.config.hidden_size, level.model.config.num_layers, 0
        own = drafter.taps(layers)
        for taps in dict.fromkeys(each.taps(layers) for each in self.drafters.values()):
            if taps == own:
                break
            begin += len(taps) * width
        features = level.state.features[..., begin : begin + len(own) * width]
        return replace(level.state, features=features)

    def draft_sizes(self) -> list[int]:
        return sorted({n for drafter in self.drafters.values() for n in drafter.draft_sizes()})

    def max_depth(self, n: int) -> int:
        # One compiled verification serves all drafts of n nodes, so it must reach as far as any of them.
        return max(d.max_depth(n) for d in self.drafters.values() if n in d.draft_sizes())

    def start(self, level: Level) -> None:
        super().start(level)
        self.watch = level.setup.runtime.stopwatch()
        self.views = {name: self.view(level, drafter) for name, drafter in self.drafters.items()}
        for name, drafter in self.drafters.items():
            its = copy(level)
            its.state = self.views[name]
            drafter.start(its)
            set_costs(drafter, dict.fromkeys(drafter.draft_sizes(), 1.0))  # until they are measured
        self.depths = {n: self.max_depth(n) for n in self.draft_sizes()}
        # How much of each row a drafter has read; ALL in rows for which it is in charge.
        self.known = {name: [0] * level.setup.batch_size for name in self.drafters}
        self.nested = level.behind > 0  # then rows come and go between two drafts
        self.current = "autoregressive"  # drafts now
        self.leader = "autoregressive"  # would draft now if this were not a trial
        self.rates: dict[str, float] = {}  # tokens per second, which that choice went by
        self.on_trial, self.steps, self.tokens, self.cost = False, 0, 0.0, 0.0  # of this turn
        self.turns = dict.fromkeys(self.drafters, 0)
        self.feeding = dict.fromkeys(self.drafters, 0.0)  # what it costs to put each in charge
        self.wasted = dict.fromkeys(self.drafters, 0.0)  # what trials cost beyond the leader's price
        self.spent = 0.0  # the cost of all steps so far, and of feeding
        self.choosing = 0.0  # the cost of the last choice of a drafter
        self.catching_up = 0.0  # the cost of feeding a drafter before this step
        self.overhead = 0.0  # seconds of choosing and feeding before this step

    def warm_up(self, state: State) -> None:
        for name, drafter in self.drafters.items():
            drafter.warm_up(self.views[name])

    def count_into(self, stats: Stats) -> None:
        for drafter in self.drafters.values():
            drafter.count_into(stats)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        mine = self.known[self.current]
        view = self.views[self.current]
        self.drafters[self.current].prefill(view, row, tokens, min(start, mine[row]))
        for known in self.known.values():
            known[row] = min(known[row], start)
        mine[row] = ALL

    def rewind(self, length: Tensor) -> None:
        for name, drafter in self.drafters.items():
            drafter.rewind(length)
            pairs = zip(self.known[name], length.tolist())
            self.known[name] = [known if known == ALL else min(known, end) for known, end in pairs]

    def catch_up(self, state: State, name: str) -> None:
        """Put a drafter in charge, and feed it what every text has gained since it was."""
        lengths, active = state.length.tolist(), state.active.tolist()
        mine, wanted = self.known[name], [a or (self.nested and n > 1) for a, n in zip(active, lengths)]
        for row in compress(range(len(wanted)), wanted):
            if mine[row] < lengths[row]:
                tokens = state.tokens[row, : lengths[row]]
                self.drafters[name].prefill(self.views[name], row, tokens, mine[row])
        self.known[self.current] = [min(pair) for pair in zip(self.known[self.current], lengths)]
        self.known[name] = [ALL if fed else known for fed, known in zip(wanted, mine)]
        self.current = name

    def choose_drafter(self, state: State) -> tuple[str, bool]:
        """The drafter for the next turn, and whether that is a trial."""
        self.rates = {name: rate(drafter, state) for name, drafter in self.drafters.items()}
        order = sorted(self.rates, key=self.worth, reverse=True)
        self.leader = order[0]
        for name in order:  # autoregressive decoding, too: it is the yardstick, so its cost must be right
            if not self.turns[name] and (self.could_win(name) or name == "autoregressive"):
                return name, name != self.leader
        for name in order if not self.on_trial else ():  # the leader has a turn between two trials
            seconds = self.TRIAL * min(self.drafters[name].pace.seconds.values())
            wasted = self.wasted[name] if self.turns[name] else seconds
            if name != self.leader and wasted < self.CURIOSITY * self.spent:
                return name, True
        return self.leader, False

    def worth(self, name: str) -> float:
        """Tokens per second in the next turns with this drafter. The leader gets a little more: rates are not
        known better than that."""
        tokens, rate = self.STAY * self.TURN, (1.05 if name == self.leader else 1.0) * self.rates[name]
        feeding = 0.0 if name == self.current else self.feeding[name]
        return tokens * rate / (tokens + rate * feeding)

    def could_win(self, name: str) -> bool:
        """Would this drafter be faster than the leader if all of its drafts were accepted?"""
        drafter, rate = self.drafters[name], self.rates[self.leader]
        return any((1 + drafter.max_depth(n)) > rate * drafter.pace.seconds[n] for n in drafter.draft_sizes())

    def explain(self) -> str:
        """The choice, in a line for people."""
        parts = []
        for name, rate in sorted(self.rates.items(), key=lambda item: -item[1]):
            tried = "" if self.turns[name] else " (never tried)"
            parts.append(f"{name} {rate:.0f}{tried}")
        reason = "on trial" if self.on_trial else "which promises most"
        return f"{self.current} drafts, {reason}; tokens/s by costs and acceptance: {', '.join(parts)}"

    def turn_is_over(self) -> bool:
        if self.on_trial or self.steps == 0:
            return self.steps in (0, self.TRIAL)
        # Choosing takes time, too: with a small model, as much as a step.
        return self.tokens >= self.TURN and self.cost > 40 * self.choosing

    def change(self, state: State) -> None:
        """End a turn and begin the next."""
        begin = self.watch.seconds
        if self.steps > 0:
            self.turns[self.current] += 1
        self.steps, self.tokens, self.cost = 0, 0.0, 0.0
        chosen, self.on_trial = self.choose_drafter(state)
        chose = self.watch.seconds
        self.choosing = (chose - begin) / self.pace.clock.slowness
        if chosen != self.current:
            self.catch_up(state, chosen)
            self.catching_up = (self.watch.seconds - chose) / self.pace.clock.slowness
            self.feeding[chosen] = (self.feeding[chosen] + self.catching_up) / 2
        self.overhead = self.watch.seconds - begin

    def propose(self, state: State, n: int | None = None) -> Draft:
        self.overhead = self.catching_up = 0.0
        if self.turn_is_over():
            self.change(state)
        draft = self.drafters[self.current].propose(self.views[self.current], n)
        draft.max_depth, draft.drafter = self.depths[draft.tokens.shape[1]], self.current
        return draft

    def learn(self, draft: Draft, verified: list[Verified], seconds: float) -> None:
        name, drafter = draft.drafter, self.drafters[draft.drafter]
        cost = drafter.pace.seconds[draft.tokens.shape[1]]
        drafter.learn(draft, verified, seconds - self.overhead)
        self.spent += cost + self.catching_up
        tokens = sum(row.accepted + 1 for row in verified) / len(verified)
        self.steps, self.tokens, self.cost = self.steps + 1, self.tokens + tokens, self.cost + cost
        if self.on_trial:
            wasted = cost + self.catching_up - tokens / self.rates[self.leader]
            self.wasted[name] = max(self.wasted[name] + wasted, 0.0)


def rate(drafter: Drafter, state: State) -> float:
    """Tokens per second of a text to expect of a drafter, going by those of late."""
    return drafter.rate(state) if isinstance(drafter, AdaptiveLookup) else drafter.pace.rate
