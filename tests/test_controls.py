"""Controls: what a request may ask for beyond temperature and filters is exact under every drafter.

A token is a function of raw logits, of the tokens before it, and of constants. So each control is compared
with an independent implementation that goes through a text step by step, each method with plain decoding, and
every part is broken on purpose to see that these comparisons notice.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import (
    NEEDS_EQUAL_ROWS,
    SHIPPED_TARGET,
    collect,
    held_out_prompts,
    random_model,
    random_prompts,
    texts,
)
from test_decoding import drafters, qspec

import kernels
from checkpoints import load_model
from costs import Stats
from drafts import extend
from gpt_spec import Decoder, HierarchicalDrafter, LookupDrafter, SequentialDrafter, complete
from model import BadInput, KVCache
from sampling import BANS, Controls, Sampling
from text import TextStream

STOPS = [3, 19, 38]
LENGTH = 24  # of a text
# One drafter of every method and kind: chains, trees, drafters that stop early, hierarchies, choosers.
METHODS = ["lookup", "noisy", "unsure", "qspec", "bush", "tree", "auto", "middle", "shifted blocks"]
METHODS += ["middle of two models", "three levels", "shared", "shared, three levels", "choosing", "restless"]


# ---- against an independent implementation -------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED_TARGET, "bf16")


@pytest.fixture(scope="module")
def shipped_prompt() -> list[int]:
    return held_out_prompts(1)[0][:60]


@torch.no_grad()
def raw_logits(model, text: list[int]) -> torch.Tensor:
    """Of the model after every token, float32 [n, V]: one plain forward over the whole text."""
    cache = KVCache.allocate(model.config, 1, len(text), model.norm.weight)
    features, _ = extend(model, cache, torch.tensor([text]), torch.tensor([0]))
    return model.lm_head(features)[0].float()


def hugging_face():
    return pytest.importorskip("transformers").generation.logits_process


def presence(ids, scores, prompt, value):
    said = torch.bincount(ids[0, prompt:], minlength=scores.shape[1])
    return scores - value * (said > 0)


def frequency(ids, scores, prompt, value):
    return scores - value * torch.bincount(ids[0, prompt:], minlength=scores.shape[1])


def processors(sampling: Sampling, prompt: int, stops: list[int]) -> list:
    """Functions of token ids [1, n] and logits [1, V], in the order of vLLM."""
    hf, steps = hugging_face(), []
    if sampling.min_tokens:
        steps.append(hf.MinNewTokensLengthLogitsProcessor(prompt, sampling.min_tokens, stops))
    if sampling.logit_bias:
        steps.append(
            hf.SequenceBiasLogitsProcessor([[[token], value] for token, value in sampling.logit_bias])
        )
    if sampling.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    for penalty, value in (
        (frequency, sampling.frequency_penalty),
        (presence, sampling.presence_penalty),
    ):
        if value:
            steps.append(lambda ids, x, penalty=penalty, value=value: penalty(ids, x, prompt, value))
    if sampling.bad_words:
        steps.append(hf.NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    if sampling.temperature:
        steps.append(lambda ids, x: x / sampling.temperature)
        if sampling.min_p:
            steps.append(hf.MinPLogitsWarper(sampling.min_p))
        if sampling.top_k:
            steps.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(hf.TopPLogitsWarper(sampling.top_p))
    return steps


def assert_independent(model, prompt: list[int], text: list[int], sampling: Sampling, stops: list[int]):
    """Every token of a text is what the independent implementation picks behind the tokens before it."""
    logits, steps = raw_logits(model, prompt + text), processors(sampling, len(prompt), stops)
    for i, token in enumerate(text):
        end = len(prompt) + i
        ids, scores = torch.tensor([(prompt + text)[:end]]), logits[end - 1 : end].clone()
        for step in steps:
            scores = step(ids, scores)
        if sampling.temperature:
            noise = kernels.gumbel(torch.tensor([sampling.seed]), torch.tensor([[end]]), scores.shape[1])
            scores = scores + noise[0]
        assert int(scores.argmax()) == token, i


@pytest.fixture(scope="module")
def free(shipped, shipped_prompt) -> list[int]:
    """The text without controls."""
    return texts(shipped, [shipped_prompt], max_new_tokens=100)[0]


def shipped_controls(free: list[int]) -> dict[str, dict]:
    """For a text of 100 tokens: each control, so that it has something to do there."""
    words = ((free[5],), tuple(free[20:22]), tuple(free[40:43]), tuple(free[2:4]), (free[33], free[33]))
    single = {
        "repetition": {"repetition_penalty": 1.3},
        "reward of repetition": {"repetition_penalty": 0.8},
        "presence": {"presence_penalty": 1.5},
        "frequency": {"frequency_penalty": 0.4},
        "reward of frequency": {"frequency_penalty": -0.3},
        "bias": {"logit_bias": {free[3]: -math.inf, free[10]: -1.5, free[30]: 2.0}},
        "min_tokens": {"min_tokens": 50},
        "bad_words": {"bad_words": words},
    }
    some = ("repetition", "presence", "frequency", "bias", "min_tokens", "bad_words")
    return single | {"all": {name: value for control in some for name, value in single[control].items()}}


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("name", shipped_controls([*range(100)]))
def test_greedy_texts_equal_an_independent_implementation(shipped, shipped_prompt, free, name):
    sampling = Sampling(**shipped_controls(free)[name])
    stops = [max(set(free[:40]), key=free[:40].count)] if sampling.min_tokens else []
    [text] = texts(shipped, [shipped_prompt], LookupDrafter(3), sampling, 100, stop_ids=stops)
    assert text != free and (len(text) == 100 or stops)
    assert len(text) > sampling.min_tokens and all(stop not in text[:-1] for stop in stops)
    assert_independent(shipped, shipped_prompt, text, sampling, stops)


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("name", ["min_p", "top_k", "top_p", "filters", "all"])
def test_sampled_texts_equal_an_independent_implementation(shipped, shipped_prompt, free, name):
    """The filters keep the sets that the warpers keep: the same noise picks the same token in them."""
    filters = {"min_p": {"min_p": 0.08}, "top_k": {"top_k": 3}, "top_p": {"top_p": 0.8}}
    filters["filters"] = {"min_p": 0.02, "top_k": 8, "top_p": 0.9}
    filters["all"] = filters["filters"] | shipped_controls(free)["all"] | {"min_tokens": 0}
    sampling = Sampling(0.9, seed=11, **filters[name])
    [text] = texts(shipped, [shipped_prompt], LookupDrafter(3), sampling, 100)
    assert text != texts(shipped, [shipped_prompt], None, Sampling(0.9, seed=11), 100)[0]
    assert_independent(shipped, shipped_prompt, text, sampling, [])


# ---- every method, every control -----------------------------------------------------------------


def controls_of(text: list[int]) -> dict[str, dict]:
    """Each control, so that it changes a text of the tiny target."""
    words = ((text[2],), tuple(text[5:7]), tuple(text[9:12]), (text[0], text[0]))
    bias = {text[1]: -math.inf, text[4]: -2.0, 50: 3.0}
    single = {
        "repetition": {"repetition_penalty": 1.6},
        "presence": {"presence_penalty": 9.0},
        "frequency": {"frequency_penalty": 4.0},
        "reward": {"frequency_penalty": -0.7, "repetition_penalty": 0.9},
        "bias": {"logit_bias": bias},
        "none": {},
        "bad_words": {"bad_words": words},
        "filters": {"min_p": 0.05, "top_k": 5, "top_p": 0.9},
    }
    mild = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3, "min_tokens": 8}
    together = single["filters"] | single["bias"] | single["bad_words"] | mild
    return single | {"all": together, "min_tokens": {"min_tokens": 15}}


Mixed = tuple[list[list[int]], list[Sampling], list[list[int]]]


def mix(target, count: int = 20) -> Mixed:
    """Prompts, what is asked for each, and what plain decoding says to it, alone."""
    prompts, samplings = random_prompts([1 + 7 * i % 23 for i in range(count)]), []
    for i, prompt in enumerate(prompts):
        plain = Sampling(float(i % 2), seed=43 + i)
        [text] = texts(target, [prompt], None, plain, LENGTH)
        samplings.append(replace(plain, **list(controls_of(text).values())[i // 2]))
    expected = [
        texts(target, [prompt], None, sampling, LENGTH, stop_ids=STOPS)[0]
        for prompt, sampling in zip(prompts, samplings)
    ]
    return prompts, samplings, expected


@pytest.fixture(scope="module")
def mixed(target) -> Mixed:
    return mix(target)


def run(target, mixed: Mixed, drafter, batch_size=1, compile=False, **options) -> list[list[int]]:
    prompts, samplings, _ = mixed
    decoder = Decoder(target, drafter, Sampling(), 128, batch_size, compile, every_control=True)
    if compile:
        decoder.warm_up()
    return collect(decoder.run(prompts, LENGTH, STOPS, samplings=samplings, **options), len(prompts))


def test_the_texts_are_worth_comparing(target, mixed):
    """Each control changes its text, stop tokens end some of them, and drafts are accepted."""
    prompts, samplings, expected = mixed
    for prompt, sampling, text in zip(prompts, samplings, expected):
        bare = Sampling(sampling.temperature, seed=sampling.seed)
        [free] = texts(target, [prompt], None, bare, LENGTH, stop_ids=STOPS)
        acts = sampling.changes_logits or (sampling.temperature > 0 and sampling.min_p > 0)
        assert (text != free) == acts, sampling
    ends = [text[-1] in STOPS for text in expected]
    assert 3 < sum(ends) < 17 and len({len(text) for text in expected}) > 4
    stats = Stats()
    run(target, mixed, drafters(target)["tree"], 4, stats=stats)
    assert 0.2 < stats.acceptance_by_position[0] < 0.95


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_autoregressive_text(target, mixed, name):
    """Each control alone and all at once, greedy and sampled, in one row after the other, and in four rows
    of different requests that are refilled."""
    for batch_size in (1, 4):
        assert run(target, mixed, drafters(target)[name], batch_size) == mixed[2]


@pytest.mark.parametrize("name", ["lookup", "tree"])
def test_a_decoder_that_is_made_for_one_request(target, mixed, name):
    """It may lack the tensors of controls that nobody asks for."""
    for prompt, sampling, text in zip(*mixed):
        ours = texts(target, [prompt], drafters(target)[name], sampling, LENGTH, stop_ids=STOPS)
        assert ours == [text]


def test_compiled_with_all_controls():
    """A chain, and a tree in a batch."""
    target = random_model(num_layers=1)
    mixed = mix(target)
    assert run(target, mixed, LookupDrafter(2), 1, compile=True) == mixed[2]
    assert run(target, mixed, drafters(target)["tree"], 4, compile=True) == mixed[2]


@NEEDS_EQUAL_ROWS
def test_qspec_in_real_precisions(shipped_prompt):
    target, prompts = load_model(SHIPPED_TARGET, "w4a16"), [shipped_prompt, shipped_prompt[:20]]
    for temperature in (0.0, 1.0):
        samplings = [
            Sampling(temperature, seed=i, **shipped_controls([*range(50, 150)])["all"]) for i in (3, 4)
        ]
        samplings = [
            replace(samplings[0], presence_penalty=0.0),
            replace(samplings[1], repetition_penalty=1.1),
        ]
        decoder = Decoder(target, None, Sampling(), 256, compile=False, every_control=True)
        expected = collect(decoder.run(prompts, 60, samplings=samplings), 2)
        decoder = Decoder(target, qspec(target, "w4a4"), Sampling(), 256, 2, False, every_control=True)
        assert collect(decoder.run(prompts, 60, samplings=samplings, stats=(stats := Stats())), 2) == expected
        assert stats.acceptance_by_position[0] > 0.3


# ---- counts --------------------------------------------------------------------------------------


def count(controls: Controls, prompt: list[int], output: list[int]) -> torch.Tensor:
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=controls.vocabulary).int()
    counts[torch.tensor(prompt).unique()] += kernels.SEEN
    return counts


def check_counts(target, mixed: Mixed, drafter, batch_size: int, monkeypatch) -> None:
    """After every step, the counts of all levels are those of their texts; those of rows whose texts have
    ended stay."""
    prompts, samplings, _ = mixed
    decoder = Decoder(target, drafter, Sampling(), 128, batch_size, compile=False, every_control=True)
    holds, frozen, levels, propose = {}, {}, [], HierarchicalDrafter.propose

    def check_level(level):
        """Its text may be ahead of the target's; before a step begins, its root is counted, too."""
        for row, i in holds.items():
            if level.state.active[row]:
                end = int(level.state.length[row]) + 1
                output = level.state.tokens[row, len(prompts[i]) : end].tolist()
                assert torch.equal(level.controls.counts[row], count(level.controls, prompts[i], output))

    def watched(self, state, n=None):
        draft = propose(self, state, n)
        self.level.state.active.copy_(state.active)  # those that had enough rode along
        check_level(self.level)
        levels.append(self.level)
        return draft

    monkeypatch.setattr(HierarchicalDrafter, "propose", watched)
    so_far = [[] for _ in prompts]
    for emissions in decoder.run(prompts, LENGTH, STOPS, samplings=samplings):
        for emission in emissions:
            so_far[emission.prompt_index] += emission.tokens
            holds[emission.row] = emission.prompt_index
            frozen.pop(emission.row, None)
        for row, i in holds.items():
            counts = decoder.controls.counts[row]
            if decoder.state.active[row]:
                assert torch.equal(counts, count(decoder.controls, prompts[i], so_far[i]))
            else:
                assert torch.equal(counts, frozen.setdefault(row, counts.clone()))
        check_level(decoder)
    assert so_far == mixed[2]
    assert bool(levels) == isinstance(drafter, HierarchicalDrafter)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["lookup", "bush", "tree", "middle", "three levels", "shared twice"])
def test_counts_are_those_of_the_text_after_every_step(target, mixed, name, batch_size, monkeypatch):
    check_counts(target, mixed, drafters(target)[name], batch_size, monkeypatch)


# ---- log-probabilities ---------------------------------------------------------------------------


def said(target, prompts, drafter, n: int, batch_size: int, samplings, **options) -> list[list]:
    """Tokens and log-probabilities of all prompts."""
    sizes = (Sampling(), 128, batch_size, False, True, n)
    out = [[] for _ in prompts]
    for emissions in Decoder(target, drafter, *sizes).run(
        prompts, LENGTH, STOPS, samplings=samplings, **options
    ):
        for emission in emissions:
            assert [each.token for each in emission.logprobs] == emission.tokens  # cut where the text ends
            out[emission.prompt_index] += emission.logprobs
    return out


@pytest.mark.parametrize("name", ["lookup", "bush", "tree", "middle"])
def test_log_probabilities_are_the_same_whatever_drafted(target, mixed, name):
    prompts, samplings, expected = mixed
    plain = said(target, prompts, None, 3, 1, samplings)
    assert [[each.token for each in text] for text in plain] == expected
    for ours, theirs in zip(said(target, prompts, drafters(target)[name], 3, 4, samplings), plain):
        for one, other in zip(ours, theirs):  # the tiny models are of fp32, whose forwards round as they like
            assert one.token == other.token and [t for t, _ in one.top] == [t for t, _ in other.top]
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@NEEDS_EQUAL_ROWS
def test_log_probabilities_have_the_same_bits(shipped, shipped_prompt):
    """In bf16, whose rows do not depend on each other."""
    prompts, samplings = (
        [shipped_prompt, shipped_prompt[:7]],
        [Sampling(), Sampling(1.0, presence_penalty=0.5)],
    )
    plain = said(shipped, prompts, None, 4, 1, samplings)
    for drafter in (LookupDrafter(3), SequentialDrafter(shipped, 2, shares_cache=True)):
        assert said(shipped, prompts, drafter, 4, 2, samplings) == plain
    for prompt, text in zip(prompts, plain):
        raw = raw_logits(shipped, prompt + [each.token for each in text])[len(prompt) - 1 : -1]
        expected = raw.double().log_softmax(-1)
        for each, row in zip(text, expected):
            assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-5)
            best, ids = row.topk(4)
            assert [value for _, value in each.top] == pytest.approx(best.tolist(), abs=1e-5)
            assert {t for t, _ in each.top} == {*ids.tolist()} or len(best.unique()) < 4


@pytest.mark.parametrize("n", [0, 1, 61])
def test_as_many_log_probabilities_as_were_asked_for(target, n):
    [text] = said(target, [[5, 6]], LookupDrafter(), n, 1, [Sampling()])
    assert all(len(each.top) == n for each in text)
    if n == 61:
        assert all(sum(math.exp(value) for _, value in each.top) == pytest.approx(1) for each in text)
        assert all(dict(each.top)[each.token] == each.logprob for each in text)


def test_no_log_probabilities_unless_asked_for(target):
    for emissions in Decoder(target, max_length=64, compile=False).run([[5, 6]], 5):
        assert emissions[0].logprobs is None
    assert complete(target, [[5, 6]], max_new_tokens=5, compile=False)[0].logprobs == []


# ---- conversations, ends, requests that cannot be ------------------------------------------------


@pytest.mark.parametrize("name", ["lookup", "noisy", "tree", "three levels", "shared"])
def test_a_conversation_counts_each_answer_anew(target, name):
    sampling = Sampling(1.0, seed=5, frequency_penalty=1.0, repetition_penalty=1.3, bad_words=((4, 5), (7,)))
    decoder, history = Decoder(target, drafters(target)[name], sampling, 160, compile=False), [3, 1, 4]
    for turn in random_prompts([3, 1, 8]):
        history = history + turn
        [answer] = collect(decoder.run([history], 12, reuse=True), 1)
        assert [answer] == texts(target, [history], None, sampling, 12)
        history = history + answer


@pytest.mark.parametrize("budget", range(1, 8))
def test_the_budget_cuts_inside_a_run(target, mixed, budget):
    prompts, samplings, expected = mixed
    for prompt, sampling, text in list(zip(prompts, samplings, expected))[16:]:
        for name in ("itself", "sure"):
            ours = texts(target, [prompt], drafters(target)[name], sampling, budget, stop_ids=STOPS)
            assert ours == [text[:budget]]


@pytest.mark.parametrize("name", ["itself", "tree", "middle", "shared"])
def test_a_stop_token_inside_a_run_ends_it_after_min_tokens(target, name):
    free = texts(target, [[8, 9]], None, Sampling(1.0, seed=7), 40)[0]
    for least in (0, 1, 3, 4, 8):
        sampling = Sampling(1.0, seed=7, min_tokens=least)
        [expected] = texts(target, [[8, 9]], None, sampling, 40, stop_ids=free[3:6])
        ours = texts(target, [[8, 9]], drafters(target)[name], sampling, 40, stop_ids=free[3:6])
        assert ours == [expected] and len(expected) > least
        assert not {*free[3:6]} & {*expected[:-1]}


@pytest.mark.parametrize("least, end", [(0, 2), (1, 2), (2, 5), (4, 5), (5, None)])
def test_min_tokens_of_stop_strings(least, end):
    """They are not looked for before: one that is complete by then is text."""
    stream, tokens = TextStream(None, ["7 1"], least), [7, 1, 4, 7, 1, 4]
    ends = [i for i, token in enumerate(tokens, start=1) if stream.add(token)]
    assert ends[:1] == ([] if end is None else [end])
    assert stream.text.startswith("7 1 4 ") == (end != 2)


def test_stop_tokens_that_the_model_does_not_have(target):
    sampling = Sampling(min_tokens=5)
    assert texts(target, [[1]], None, sampling, 9, stop_ids=[61, -1, 10**9]) == texts(
        target, [[1]], None, max_new_tokens=9
    )


@pytest.mark.parametrize(
    "every, sampling, words",
    [
        (True, {"logit_bias": {61: 1.0}}, "logit_bias has the token id 61; the model knows 0 to 60"),
        (True, {"bad_words": ((3, -1),)}, "bad_words has the token id -1"),
        (True, {"bad_words": ((1,) * 9,)}, f"room for {BANS} token sequences of up to 8"),
        (True, {"bad_words": ((1,),) * (BANS + 1)}, f"room for {BANS} token"),
        (True, {"bad_words": ((1,),) * (BANS - 1), "min_tokens": 1}, f"room for {BANS} token"),
        (False, {"presence_penalty": 1.0}, "every_control=True"),
        (False, {"min_tokens": 1}, "every_control=True"),
        (True, {"grammar": "a"}, "grammar must be a grammar.Matcher"),
    ],
)
def test_requests_that_cannot_be(target, every, sampling, words):
    """They are refused before anything is decoded, in one line."""
    decoder = Decoder(target, max_length=64, compile=False, every_control=every)
    with pytest.raises(BadInput) as error:
        decoder.run([[1], [2]], 5, [1, 2, 3, 4, 5], samplings=[Sampling(), Sampling(**sampling)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_temperatures_and_filters_need_no_control(target):
    """Any decoder takes them by request."""
    decoder, warm = (
        Decoder(target, LookupDrafter(), max_length=64, compile=False),
        Sampling(1.0, 5, 0.9, seed=3),
    )
    expected = [*texts(target, [[1]], max_new_tokens=9), *texts(target, [[2]], None, warm, 9)]
    assert collect(decoder.run([[1], [2]], 9, samplings=[Sampling(), warm]), 2) == expected


def test_samplings_and_seeds_by_prompt(target):
    decoder = Decoder(target, max_length=64, compile=False, every_control=True)
    for wrong in ([], [Sampling()], [Sampling()] * 3):
        with pytest.raises(BadInput, match=f"there are {len(wrong)} samplings for 2 prompts"):
            decoder.run([[1], [2]], 5, samplings=wrong)
    with pytest.raises(BadInput, match="sampling"):
        decoder.run([[1]], 5, samplings=[0.7])
    warm = [Sampling(1.0, seed=5), Sampling(1.0, seed=9)]
    own = collect(decoder.run([[1], [1]], 9, samplings=warm), 2)
    assert own != collect(decoder.run([[1], [1]], 9, samplings=warm, seeds=[9, 5]), 2)
    assert own[::-1] == collect(decoder.run([[1], [1]], 9, samplings=warm, seeds=[9, 5]), 2)


@pytest.mark.parametrize("n", [-1, 62, 1.5, "3"])
def test_log_probabilities_that_there_are_not(target, n):
    with pytest.raises(BadInput, match="^logprobs is [^\n]*$"):
        Decoder(target, max_length=64, compile=False, logprobs=n)


# ---- broken on purpose ---------------------------------------------------------------------------


def root_counted_twice(monkeypatch):
    after = Controls.penalize

    def penalize(self, logits, nodes, *rest, **more):
        return after(self, logits, nodes._replace(depth=nodes.depth + 1), *rest, **more)

    monkeypatch.setattr(Controls, "penalize", penalize)


def history_of_the_steps_start(monkeypatch):
    after = Controls.penalize

    def penalize(self, logits, nodes, *rest, **more):
        return after(self, logits, nodes._replace(ancestors=nodes.ancestors & False), *rest, **more)

    monkeypatch.setattr(Controls, "penalize", penalize)


def history_of_the_node_before(monkeypatch):
    after = Controls.penalize

    def penalize(self, logits, nodes, *rest, **more):
        return after(self, logits, nodes._replace(ancestors=nodes.ancestors.roll(1, 1)), *rest, **more)

    monkeypatch.setattr(Controls, "penalize", penalize)


def trees_as_chains(monkeypatch):
    after = Controls.penalize

    def penalize(self, logits, nodes, *rest, **more):
        return after(
            self, logits, nodes._replace(ancestors=torch.ones_like(nodes.ancestors).tril()), *rest, **more
        )

    monkeypatch.setattr(Controls, "penalize", penalize)


def first_token_unpenalised(monkeypatch):
    view = Controls.row

    def row(self, number):
        mine = view(self, number)
        mine.full = False
        return mine

    monkeypatch.setattr(Controls, "row", row)


def counts_of_the_whole_draft(monkeypatch):
    right = Controls.count
    whole = lambda self, emitted, accepted, active: right(self, emitted, accepted * 0 + 99, active)  # noqa: E731
    monkeypatch.setattr(Controls, "count", whole)


def no_counts(monkeypatch):
    monkeypatch.setattr(Controls, "count", lambda *_: None)


def counts_of_frozen_rows(monkeypatch):
    """No text can see them, but a row that is refilled must not, either."""
    right = Controls.count
    every = lambda self, emitted, accepted, active: right(self, emitted, accepted, active | True)  # noqa: E731
    monkeypatch.setattr(Controls, "count", every)


def counts_of_the_last_text_kept(monkeypatch):
    right = Controls.begin

    def begin(self, row, *rest):
        old = self.counts[row].clone()
        right(self, row, *rest)
        self.counts[row] += old & (kernels.SEEN - 1)

    monkeypatch.setattr(Controls, "begin", begin)


def words_that_end_in_a_draft_not_seen(monkeypatch):
    def without_draft(positions, back, state, nodes):
        return state.tokens.gather(1, (positions - back).clamp(min=0))

    monkeypatch.setattr("sampling.token_before", without_draft)


def requests_of_another_row(monkeypatch):
    after = Controls.penalize

    def penalize(self, *rest, **more):
        mine = copy.copy(self)
        mine.penalties = self.penalties.roll(1, 0)
        return after(mine, *rest, **more)

    monkeypatch.setattr(Controls, "penalize", penalize)


def min_tokens_by_steps(monkeypatch):
    """One token more is forbidden for each node of a chain."""
    after = Controls.ban

    def ban(self, logits, positions, *rest):
        return after(self, logits, positions[:, :1].expand_as(positions), *rest)

    monkeypatch.setattr(Controls, "ban", ban)


FAULTS = [root_counted_twice, history_of_the_steps_start, history_of_the_node_before, trees_as_chains]
FAULTS += [first_token_unpenalised, counts_of_the_whole_draft, no_counts, counts_of_the_last_text_kept]
FAULTS += [words_that_end_in_a_draft_not_seen, min_tokens_by_steps]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_seen(target, mixed, fault, monkeypatch):
    """The comparison with plain decoding, which `mixed` holds, can fail."""
    fault(monkeypatch)
    assert any(run(target, mixed, drafters(target)[name], 4) != mixed[2] for name in ("bush", "tree"))


def test_requests_of_another_row_are_seen(target, mixed, monkeypatch):
    requests_of_another_row(monkeypatch)
    assert run(target, mixed, None, 4) != mixed[2]


@pytest.mark.parametrize("fault", [no_counts, counts_of_the_whole_draft, counts_of_frozen_rows])
def test_wrong_counts_are_seen(target, mixed, fault, monkeypatch):
    """Also those that no text shows."""
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_counts(target, mixed, drafters(target)["tree"], 3, monkeypatch)


def test_a_middle_that_keeps_the_counts_of_rejected_tokens_is_seen(target, mixed, monkeypatch):
    """It changes no text, only what is accepted."""
    monkeypatch.setattr(Controls, "restart", lambda *_: None)
    assert run(target, mixed, drafters(target)["middle"], 3) == mixed[2]
    with pytest.raises(AssertionError):
        check_counts(target, mixed, drafters(target)["middle"], 3, monkeypatch)


@NEEDS_EQUAL_ROWS
def test_a_wrong_order_of_controls_is_seen(shipped, shipped_prompt, free, monkeypatch):
    """By the independent implementation: a bias after the penalties."""
    right = kernels.penalize

    def late(logits, tokens, sees, counts, penalties, bias, mask=None):
        return right(logits, tokens, sees, counts, penalties, 0 * bias, mask) + bias[:, None]

    sampling = Sampling(repetition_penalty=3.0, logit_bias=dict.fromkeys(free[:40], 4.0))
    [text] = texts(shipped, [shipped_prompt], None, sampling, 60)
    assert_independent(shipped, shipped_prompt, text, sampling, [])
    monkeypatch.setattr(kernels, "penalize", late)
    [text] = texts(shipped, [shipped_prompt], None, sampling, 60)
    with pytest.raises(AssertionError):
        assert_independent(shipped, shipped_prompt, text, sampling, [])
