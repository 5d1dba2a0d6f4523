"""sampling.py: from logits to tokens: temperature, filters, penalties, bans, masks, log-probabilities.

    sampling = Sampling(temperature=0.8, min_p=0.05, frequency_penalty=0.5, seed=7)
    tokens = controls.pick(logits, positions, state, nodes)    # of the texts of a batch

The one idea: the token at a position is a function of the raw logits there, of the tokens before it, and of
constants. Noise is a constant, too: a function of seed, position and token. So a token never depends on what
was proposed, accepting a draft is comparing tokens, and a node of a draft sees its own ancestors as its text.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from model import BadInput
from prompts import number, plain, whole_number, whole_numbers

# --------------------------------------------------------------------------------------------------
# What a request asks for
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are picked. What changes logits comes first, in the order of vLLM: the mask of
    a grammar and `min_tokens`, `logit_bias`, the penalties, `bad_words`. All of it acts at every temperature.

    Then, at a temperature above 0, min_p, top_k and top_p say which tokens may be picked, each among those
    that the last one left. Defaults keep everything as it is.
    """

    temperature: float = 0.0  # 0 is greedy: the most probable token
    top_k: int = 0  # the most probable tokens, so many; 0: all
    top_p: float = 1.0  # the fewest tokens with this probability together
    seed: int = 1234
    min_p: float = 0.0  # tokens with this share of the largest probability
    repetition_penalty: float = 1.0  # divides logits of tokens in the text, multiplies those below 0
    presence_penalty: float = 0.0  # subtracted from the logit of every token in the output
    frequency_penalty: float = 0.0  # subtracted as often as the output has the token
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids and what to add; a dict is understood
    min_tokens: int = 0  # as long as the output has fewer, no stop token is picked
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that are never completed
    grammar: Any = None  # a `grammar.Matcher`, at whose beginning the output begins

    def __post_init__(self):
        for name, (read, holds, rule) in RULES.items():
            value = read(name, getattr(self, name))  # perhaps of NumPy
            if not holds(value):
                raise BadInput(f"{name} is {value}; it must be {rule}")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "logit_bias", read_bias(self.logit_bias))
        words = plain(self.bad_words)
        if not isinstance(words, (list, tuple)):
            raise BadInput("bad_words must be a list of token sequences")
        object.__setattr__(self, "bad_words", tuple(tuple(whole_numbers("bad_words", w)) for w in words))
        if not all(self.bad_words):
            raise BadInput("bad_words has an empty word; each needs a token")
        if self.grammar is not None and not hasattr(self.grammar, "walk"):
            raise BadInput("grammar must be a grammar.Matcher")

    @property
    def changes_logits(self) -> bool:
        """Does it ask for more than `kernels.pick` does?"""
        penalties = [getattr(self, name) for name in PENALTIES] != [1, 0, 0]
        return penalties or bool(self.logit_bias or self.min_tokens or self.bad_words or self.grammar)

    @property
    def settings(self) -> list[float]:
        """The row of `kernels.pick`. The temperature is what float32 makes of it, on every device."""
        temperature = struct.unpack("f", struct.pack("f", self.temperature))[0]
        scale = min(math.log2(math.e) / temperature, 1e38) if temperature else 0.0
        gap = temperature * math.log(self.min_p) if self.min_p else -math.inf
        return [temperature, scale, self.top_k, self.top_p, gap]


LIMIT = 1e6  # of numbers in a request: float32 has room for what they do to a logit
RULES = {  # of fields: how they are read, what holds for them, and how to say it
    "temperature": (number, lambda x: 0 <= x <= LIMIT, "0 (greedy) or positive, up to 1e6"),
    "top_k": (whole_number, lambda x: 0 <= x < 2**31, "0 (keep all) or the number of tokens to keep"),
    "top_p": (number, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (number, lambda x: 0 <= x <= 1, "from 0 (keep all) to 1"),
    "repetition_penalty": (number, lambda x: 1 / LIMIT <= x <= LIMIT, "positive, 1e-6 to 1e6; 1 is none"),
    "presence_penalty": (number, lambda x: abs(x) <= LIMIT, "a number up to 1e6; 0 is none"),
    "frequency_penalty": (number, lambda x: abs(x) <= LIMIT, "a number up to 1e6; 0 is none"),
    "min_tokens": (whole_number, lambda x: 0 <= x < 2**31, "0 or more"),
}


def check_seed(value: Any) -> int:
    """A seed. BadInput where seed + the index of a prompt might not be an int64."""
    seed = whole_number("seed", value)
    if not -(2**62) < seed < 2**62:
        raise BadInput(f"seed is {seed}; it must be between -2**62 and 2**62")
    return seed


def read_bias(given: Any) -> tuple[tuple[int, float], ...]:
    """A dict or pairs -> pairs of token ids and numbers; -inf forbids a token."""
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        bias = {whole_number("logit_bias", token): number("logit_bias", value) for token, value in pairs}
    except (TypeError, ValueError):
        raise BadInput("logit_bias must be token ids with numbers, such as {15: -2.5}") from None
    for value in bias.values():
        if not (abs(value) <= LIMIT or value == -math.inf):
            raise BadInput(f"logit_bias has {value}; it must be a number up to {LIMIT:.0f}, or -inf")
    return tuple(sorted(bias.items()))


# --------------------------------------------------------------------------------------------------
# What the requests in the rows of a batch ask for
# --------------------------------------------------------------------------------------------------

BANS = 128  # banned words of a request, at most: bad words, and stop tokens where there is `min_tokens`
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Nodes(NamedTuple):
    """Tokens that may follow the texts of a batch: those of a draft, or none."""

    tokens: Tensor  # int64 [B, m]; node 0 is the root, which the text ends with
    parent: Tensor  # int64 [B, m]
    ancestors: Tensor  # bool [B, n, m]; which of them each of n places comes after
    depth: Tensor  # int64 [B, m]

    @staticmethod
    def after(tokens: list[Tensor], like: Tensor) -> Nodes:
        """For one place, after the texts and then these tokens, int64 [B, 1] each. `like`: int64 [B]"""
        row = torch.cat((like[:, None][:, :0], *tokens), dim=1)  # [B, m]
        depth = torch.arange(1, row.shape[1] + 1, device=row.device).expand_as(row)
        return Nodes(row, depth - 2, torch.ones_like(row, dtype=torch.bool)[:, None], depth)


class Controls:
    """Tensors that say what each row of a batch asks for, so that one compiled step serves all requests.

    `counts` [B, V]: how often the output of a row has a token, and `kernels.SEEN` more if its prompt has it.
    It grows with the text. Where no request may change logits, only `settings` is there.
    """

    def __init__(self, rows: int, vocabulary: int, sampling: Sampling, device: torch.device, every: bool):
        """`sampling`: what requests usually ask for. With `every`, a request may ask for anything else."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.vocabulary, self.device = vocabulary, device
        self.noisy = every or sampling.temperature > 0  # may a request have noise?
        self.has_room = every or sampling.changes_logits  # may one change logits?
        self.full = self.has_room  # may one of those that are decoded now?
        self.structured = sampling.grammar is not None  # has one a grammar, whose masks the host makes?
        self.settings = zeros(5, dtype=torch.float64)
        self.matchers: list[Any] = [None] * rows  # `grammar.Matcher`s of the texts
        if self.has_room:
            self.counts = zeros(vocabulary, dtype=torch.int32)
            self.bias = zeros(vocabulary, dtype=torch.float32)
            self.penalties = zeros(len(PENALTIES), dtype=torch.float32).fill_(1)
            longest = max([8 if every else 1, *map(len, sampling.bad_words)])
            # A ban: its last token must not follow the others (-1: any) before position `until`.
            self.bans, self.until = zeros(BANS, longest, dtype=torch.int64), zeros(BANS, dtype=torch.int64)

    def below(self) -> Controls:
        """For a level that drafts: the same requests, but as far as it has written their texts."""
        mine = copy(self)
        mine.structured, mine.matchers = False, [None] * len(self.matchers)
        if self.has_room:
            mine.counts = self.counts.clone()
        return mine

    def expect(self, samplings: list[Sampling]) -> None:
        """These requests may come in a run: masks are made where one has a grammar."""
        self.structured = any(sampling.grammar is not None for sampling in samplings)

    def check(self, sampling: Sampling, stops: Iterable[int]) -> None:
        """BadInput for a request that these tensors have no room for, or that has unknown tokens."""
        if sampling.changes_logits and not self.has_room:
            raise BadInput("this request changes logits; make the decoder with every_control=True for it")
        ids = {"logit_bias": [token for token, _ in sampling.logit_bias]}
        ids |= {"bad_words": [token for word in sampling.bad_words for token in word]}
        for name, tokens in ids.items():
            wrong = next((t for t in tokens if not 0 <= t < self.vocabulary), None)
            if wrong is not None:
                raise BadInput(f"{name} has the token id {wrong}; the model knows 0 to {self.vocabulary - 1}")
        words = ban_list(sampling, stops)
        if self.has_room and (len(words) > BANS or any(len(word) > self.bans.shape[2] for word in words)):
            most = f"there is room for {BANS} token sequences of up to {self.bans.shape[2]} tokens"
            raise BadInput(f"bad_words: {most}, stop tokens counted where there is min_tokens")
        if (grammar := sampling.grammar) is not None:
            if len(grammar.vocabulary.tokens) != self.vocabulary:
                raise BadInput(f"grammar is for another vocabulary; the model has {self.vocabulary} tokens")
            if not grammar.vocabulary.stops <= set(stops):  # behind one of these, there is no mask
                raise BadInput("grammar: the tokens that end its texts must be among the stop_ids")

    def begin(self, row: int, sampling: Sampling, prompt: Tensor, stops: Iterable[int]) -> None:
        """A text begins in a row: what it asks for, and its prompt int64 [P]."""
        self.settings[row] = torch.tensor(sampling.settings, dtype=torch.float64)
        self.matchers[row] = None if sampling.grammar is None else sampling.grammar.fresh()
        if not self.has_room:
            return
        self.penalties[row] = torch.tensor([getattr(sampling, name) for name in PENALTIES])
        self.bias[row].zero_()
        for token, value in sampling.logit_bias:
            self.bias[row, token] = max(value, -1e30)  # -inf is for what a grammar does not allow
        self.counts[row].zero_()
        self.counts[row, prompt] = kernels.SEEN
        self.until[row].zero_()
        for i, word in enumerate(ban_list(sampling, stops)):
            padded = [-1] * (self.bans.shape[2] - len(word)) + list(word)
            self.bans[row, i] = torch.tensor(padded)
            early = i >= len(sampling.bad_words)
            self.until[row, i] = len(prompt) + sampling.min_tokens if early else 2**62

    def row(self, row: int) -> Controls:
        """A view of one row."""
        mine = copy(self)
        mine.matchers = self.matchers[row : row + 1]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(mine, name, value[row : row + 1])
        return mine

    def pick(
        self, logits: Tensor, positions: Tensor, state: Any, nodes: Nodes, mask: Tensor | None = None
    ) -> Tensor:
        """The token at each of `positions` int64 [B, n], given logits [B, n, V] -> int64 [B, n].

        The Gumbel-max trick with noise keyed by position: a drafter that asks with its own logits gets the
        same noise, so it agrees as often as its distribution allows (drafter-invariant speculative decoding:
        Daliri, Musco and Suresh, arXiv 2408.07978).

        `state`: the texts, see `drafts.State`; mask: int32 [B, n, words], see `kernels.penalize`.
        """
        logits = self.penalize(logits, nodes, mask=mask)
        free, logits = logits, self.ban(logits, positions, state, nodes) if self.full else logits
        if mask is not None:  # where bans leave nothing of what a grammar allows, the grammar wins
            logits = torch.where(logits.amax(dim=-1, keepdim=True) == -torch.inf, free, logits)
        return kernels.pick(logits, positions, state.seed, self.settings)

    def penalize(
        self, logits: Tensor, nodes: Nodes, ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits float32 [B, n, V] after mask, bias and penalties. `ids`: int64 [V], the tokens they are of,
        if not those of 0, 1, 2, ... The root counts once: it is in `counts`."""
        logits = logits.float()
        if not self.full:
            return logits
        places = slice(0, logits.shape[-1]) if ids is None else ids
        sees = nodes.ancestors & (nodes.depth > 0)[:, None]  # [B, n, m]
        counts, bias = self.counts[:, places], self.bias[:, places]  # [B, V] each
        return kernels.penalize(logits, nodes.tokens, sees, counts, self.penalties, bias, mask)

    def ban(self, logits: Tensor, positions: Tensor, state: Any, nodes: Nodes) -> Tensor:
        """-inf for the last tokens of banned words whose other tokens are what comes before a position."""
        banned = positions[..., None] < self.until[:, None]  # [B, n, bans]
        for back in range(1, self.bans.shape[2]):
            said = token_before(positions, back, state, nodes)[..., None]  # [B, n, 1]
            wanted = self.bans[:, None, :, -1 - back]  # [B, 1, bans]
            banned = banned & ((wanted < 0) | (wanted == said))
        last = self.bans[:, None, :, -1].expand_as(banned)
        return logits.scatter_add(2, last, torch.where(banned, -torch.inf, 0.0))

    def count(self, emitted: Tensor, accepted: Tensor, active: Tensor) -> None:
        """Count the tokens that texts have gained: emitted int64 [B, D + 1], of which accepted + 1 int64 [B]
        count, in rows that are active, bool [B]."""
        if self.full:
            new = torch.arange(emitted.shape[1], device=emitted.device) <= accepted[:, None]
            self.counts.scatter_add_(1, emitted, (new & active[:, None]).int())

    def restart(self, above: Controls) -> None:
        """A level that drafts begins where the one above is."""
        self.full = above.full
        if self.full:
            self.counts.copy_(above.counts)

    def masks(self, tokens: Tensor, parent: Tensor) -> Tensor | None:
        """Which tokens the grammars allow after every node of a draft, int64 [B, n]: int32 [B, n, words]. The
        host finds it out. None where there can be no grammar."""
        if not self.structured:
            return None
        masks = torch.full((*tokens.shape, -(-self.vocabulary // 32)), -1, dtype=torch.int32)
        walking = [row for row, matcher in enumerate(self.matchers) if matcher is not None]
        for row, *nodes in zip(walking, tokens[walking].tolist(), parent[walking].tolist()):
            self.matchers[row].walk(*nodes, masks[row])
        return masks.to(self.device)

    def consume(self, row: int, tokens: list[int]) -> None:
        """What a text has gained, and it goes on."""
        if self.matchers[row] is not None:
            self.matchers[row].consume(tokens)


def ban_list(sampling: Sampling, stops: Iterable[int]) -> list[tuple[int, ...]]:
    """Bad words, then what `min_tokens` keeps from being picked."""
    return [*sampling.bad_words, *((stop,) for stop in stops if sampling.min_tokens)]


def token_before(positions: Tensor, back: int, state: Any, nodes: Nodes) -> Tensor:
    """The token `back` places before each of `positions` int64 [B, n] -> int64 [B, n]; -2 before the text."""
    place = positions - back
    said = state.tokens.gather(1, place.clamp(0, state.tokens.shape[1] - 1))
    depth = place - state.length[:, None]  # the root is at depth 0
    on_path = nodes.ancestors & (nodes.depth[:, None] == depth[..., None])  # [B, n, m]
    drafted = (nodes.tokens[:, None] * on_path).sum(dim=-1)
    return torch.where(place < 0, -2, torch.where(depth > 0, drafted, said))


# --------------------------------------------------------------------------------------------------
# Log-probabilities
# --------------------------------------------------------------------------------------------------


class Logprob(NamedTuple):
    """A token, its log-probability under the raw logits, and the most probable tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def logprobs(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Log-probabilities of tokens int64 [B, n] and of the `count` best, by raw logits float32 [B, n, V]. They
    are the same bits whatever drafted. -> int64 [B, n, 1 + 2 count]; floats are there as their bits."""
    total = kernels.logsumexp(logits)  # float64 [B, n, 1]
    best, ids = kernels.top_k(logits, max(count, 1))
    values = torch.cat((logits.gather(2, tokens[..., None]), best[..., :count]), dim=2).double()
    bits = (values - total).float().view(torch.int32).long()  # [B, n, 1 + count]
    return torch.cat((bits, ids[..., :count]), dim=2)


def read_logprobs(tokens: list[int], report: list[int], places: int) -> list[Logprob] | None:
    """What `logprobs` made of one text of so many places, for its tokens; of an empty report, None."""
    width, result = len(report) // places, []
    for i, token in enumerate(tokens) if width else ():
        row, count = report[i * width : (i + 1) * width], width // 2
        values = struct.unpack(f"{count + 1}f", struct.pack(f"{count + 1}i", *row[: count + 1]))
        result.append(Logprob(token, values[0], list(zip(row[count + 1 :], values[1:]))))
    return result if width else None
