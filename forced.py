"""forced.py: drafts that a grammar makes, where it leaves no choice.

    generate(target, prompt_ids, drafter=ForcedDrafter(LookupDrafter()))  # with matchers: see grammar.py

In a JSON text, whole keys follow from the schema. They cost a draft nothing, and the target's masks allow
nothing else, so they are all accepted. This file knows drafters, and asks a matcher for tokens.

The one idea: forced tokens are a draft like any other. The target reads them anyway, for its cache. So they
never skip the model, and they change no text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from costs import Pace, Stats, contestants
from drafts import Draft, Drafter, State, Verified

FORCED = 8  # tokens of such a draft, at most
ALL = 2**62  # tokens read: as many as there are


class ForcedDrafter(Drafter):
    """Drafts what the grammar of a text forces. For the other texts of the batch, another drafter is asked.

    What that drafter misses stays in the state of the texts, tokens and features. If it is asked for one text
    of a batch, it is asked for all, and what it drafts for forced ones is thrown away. So it may be a whole
    forced draft behind. It reads so much once more with every draft, as it does below other levels
    (`Level.behind`). It is not asked at all while all texts are forced. What it misses then is fed to it in
    one chunk, as a prompt is, before its next draft, as `AutoDrafter` does it.
    """

    needs_host = True

    def __init__(self, inner: Drafter):
        self.inner, self.models, self.needs_costs = inner, inner.models, inner.needs_costs
        self.drafters = contestants(inner)  # whose costs are measured, and not those of forced drafts
        self.max_nodes = max(inner.max_nodes, FORCED + 1)

    @property
    def slack(self) -> int:
        return max(self.inner.slack, self.max_nodes)

    def taps(self, layers: int) -> tuple[int, ...]:
        return self.inner.taps(layers)

    def draft_sizes(self) -> list[int]:
        return sorted({*self.inner.draft_sizes(), FORCED + 1})

    def max_depth(self, n: int) -> int:
        # One compiled verification serves all drafts of n nodes, so it must reach as far as any of them.
        inner = self.inner.max_depth(n) if n in self.inner.draft_sizes() else 0
        return max(inner, min(n - 1, FORCED))

    def start(self, level: Any) -> None:
        # A text that is alone is forced or is not, and then nothing has to be read twice.
        self.reach = FORCED + 1 if level.setup.batch_size > 1 else 0
        level.behind += self.reach
        self.inner.start(level)
        level.behind -= self.reach
        self.controls = level.controls  # its matchers are those of the rows; None where there is no grammar
        self.known = [ALL] * level.setup.batch_size  # how much of each row the other drafter has read
        self.asked = Draft(torch.empty(0), torch.empty(0), 0)  # the last draft of the other drafter
        self.forced: list[bool] = []  # of the rows that hold an unfinished text: was the last draft forced?
        self.accepted = 0  # forced tokens of this run

    @property
    def pace(self) -> Pace:
        return self.inner.pace

    def warm_up(self, state: State) -> None:
        self.inner.warm_up(state)

    def count_into(self, stats: Stats) -> None:
        self.accepted = 0
        self.inner.count_into(stats)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        self.inner.prefill(state, row, tokens, min(start, self.known[row]))
        self.known[row] = ALL

    def rewind(self, length: Tensor) -> None:
        self.inner.rewind(length)
        pairs = zip(self.known, length.tolist())
        self.known = [known if known == ALL else min(known, end) for known, end in pairs]

    def catch_up(self, state: State, lengths: list[int], active: list[bool]) -> None:
        """Before the other drafter is asked, give it what it will not read again by itself."""
        for row in (row for row, a in enumerate(active) if a):
            if lengths[row] - self.known[row] > self.reach:
                self.prefill(state, row, state.tokens[row, : lengths[row]], self.known[row])
        known = [min(pair) for pair in zip(self.known, lengths)]
        if known != lengths:  # what it drafted behind that is not what followed
            self.inner.rewind(torch.tensor(known).to(state.length))

    def propose(self, state: State, n: int | None = None) -> Draft:
        lengths, active = state.length.tolist(), state.active.tolist()
        limit = FORCED if n is None else min(FORCED, n - 1)
        rows = zip(self.controls.matchers, active)
        chains = [matcher.forced(limit) if matcher and a else [] for matcher, a in rows]
        self.forced = [bool(chain) for chain, a in zip(chains, active) if a]
        draft = None
        if not self.forced or not all(self.forced):
            self.catch_up(state, lengths, active)
            self.asked = draft = self.inner.propose(state, n)
            self.known = [ALL if a else known for known, a in zip(self.known, active)]
        self.known = [min(known, end) if c else known for known, end, c in zip(self.known, lengths, chains)]
        return self.merge(state, chains, draft, n)

    def merge(self, state: State, chains: list[list[int]], draft: Draft | None, n: int | None) -> Draft:
        """The chains, and `draft` in the rows that have none; all have one where it is None."""
        size = 1 if draft is None else draft.tokens.shape[1]
        least = max(size, 1 + max(map(len, chains)))
        n = n or next(n for n in self.draft_sizes() if n >= least)
        root = state.tokens.gather(1, state.length[:, None])  # [B, 1]
        said = torch.tensor([chain + (n - 1 - len(chain)) * [0] for chain in chains]).to(root)  # [B, n - 1]
        count = torch.tensor([len(chain) for chain in chains]).to(root)  # [B]
        forced = Draft.chain(torch.cat((root, said), dim=1), count)
        if draft is None:
            return replace(forced, max_depth=self.max_depth(n), drafter="forced")
        more, here = n - size, (count > 0)[:, None]
        tokens = torch.where(here, forced.tokens, F.pad(draft.tokens, (0, more)))
        parent = torch.where(here, forced.parent, F.pad(draft.parent, (0, more), value=-1))
        expected = None if draft.expected is None else torch.where(count > 0, count, draft.expected)
        return replace(draft, tokens=tokens, parent=parent, max_depth=self.max_depth(n), expected=expected)

    def learn(self, draft: Draft, verified: list[Verified], seconds: float) -> None:
        """The other drafter learns from its own drafts alone."""
        self.accepted += sum(row.accepted for row, forced in zip(verified, self.forced) if forced)
        own = [row for row, forced in zip(verified, self.forced) if not forced]
        if own:
            self.inner.learn(self.asked, own, seconds)
