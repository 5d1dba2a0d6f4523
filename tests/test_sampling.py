"""The sampler: the noise is Gumbel noise and nothing is correlated with anything; picks follow the exact
distribution.

Every statistical check is a function that returns how surprised it is. It has to be calm about the real noise
and alarmed about noise that was broken on purpose, or it would prove nothing.
"""

import math

import pytest
import torch
from conftest import pick, random_model

import kernels
from gpt_spec import generate
from kernels import gumbel
from model import BadInput
from reference import kept_reference
from sampling import Sampling

ALARM = 1e-6  # probability below which a check is alarmed; the real noise is fixed, so nothing here is flaky


def chi_square(observed: torch.Tensor, probability: torch.Tensor) -> float:
    """p-value of counts against exact probabilities; cells that expect fewer than 5 are put together."""
    observed, expected = observed.double(), probability.double() * observed.sum()
    small = expected < 5
    observed = torch.cat((observed[~small], observed[small].sum()[None]))
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    keep = expected > 0
    statistic = ((observed - expected)[keep].square() / expected[keep]).sum()
    return torch.special.gammaincc((keep.sum() - 1).double() / 2, statistic / 2).item()


def normal_tail(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """-inf for all tokens [..., V] that the filters do not keep."""
    settings = torch.tensor([sampling.settings], dtype=torch.float64)
    kept = kept_reference(logits.reshape(1, -1, logits.shape[-1]), settings)
    return torch.where(kept.view_as(logits), logits, -torch.inf)


# ---- the checks ----------------------------------------------------------------------------------


def noise(seeds: int, positions: int, tokens: int) -> torch.Tensor:
    """[seeds, positions, tokens] of the noise as the engine gets it: seeds in a row, as the prompts of a
    batch have."""
    return kernels.gumbel(torch.arange(1234, 1234 + seeds), torch.arange(positions).expand(seeds, -1), tokens)


def check_law() -> float:
    """Kolmogorov-Smirnov: are 400 000 values distributed as exp(-exp(-x))?"""
    values = noise(4, 100, 1000).flatten().double().sort().values
    n = len(values)
    distance = (torch.exp(-torch.exp(-values)) - torch.arange(1, n + 1) / n).abs().max().item()
    return min(1.0, 2 * math.exp(-2 * n * distance**2))


def check_correlation() -> float:
    """Neighbouring seeds, neighbouring positions, neighbouring tokens, and positions against shifted
    seeds."""
    x = (
        torch.exp(-torch.exp(-noise(8, 64, 512).double())) - 0.5
    )  # uniform, so that products have finite variance
    pairs = [(x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1]), (x[1:, 1:], x[:-1, :-1])]
    pairs += [(x[1:, :-1], x[:-1, 1:]), (x[:, 1:, :-1], x[:, :-1, 1:])]
    z = [(12 * (a * b).mean() * math.sqrt(a.numel())).item() for a, b in pairs]
    return min(1.0, len(pairs) * min(map(normal_tail, z)))


def check_positions() -> float:
    """One seed, 30 000 positions, one distribution over 5 tokens: triples of neighbours against the exact
    joint."""
    torch.manual_seed(0)
    logits = torch.randn(5)
    draws = pick(logits.expand(1, 30000, 5), torch.arange(30000)[None], torch.tensor([7]), Sampling(1.0))[0]
    p = logits.softmax(0)
    joint = (p[:, None, None] * p[:, None] * p).flatten()
    cells = (draws[:-2] * 25 + draws[1:-1] * 5 + draws[2:])[::3]
    return chi_square(torch.bincount(cells, minlength=125), joint)


def check_seeds(sampling: Sampling = Sampling(temperature=1.0)) -> float:
    """`autoregressive` itself: three tokens after one prompt, 3000 seeds, against the model's exact joint."""
    model = random_model(vocab_size=6, num_layers=1, sharpness=2.0)
    counts = torch.zeros(216)
    texts = [[] for _ in range(3000)]
    for emissions in generate(model, [[3, 1]] * 3000, None, sampling, 3, batch_size=500, compile=False):
        for emission in emissions:
            texts[emission.prompt_index] += emission.tokens
    for a, b, c in texts:
        counts[a * 36 + b * 6 + c] += 1
    return chi_square(counts, exact_joint(model, [3, 1], sampling))


@torch.no_grad()
def exact_joint(model, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    """P(a, b, c | prompt) for all triples, from the model's own logits, [216]."""
    triples = torch.cartesian_prod(*[torch.arange(6)] * 3)
    texts = torch.cat((torch.tensor(prompt).expand(216, -1), triples), dim=1)
    logits = filter_logits(model.lm_head(model.recompute(texts)), sampling)
    p = (logits / sampling.temperature).softmax(-1)[:, len(prompt) - 1 : -1]  # [216, 3, 6]
    return p.gather(2, triples[..., None]).prod(dim=1).flatten()


CHECKS = {
    "law": check_law,
    "correlation": check_correlation,
    "positions": check_positions,
    "seeds": check_seeds,
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_noise_passes(name):
    assert CHECKS[name]() > 1e-3


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [(0.6, 0, 1.0, 0), (1.0, 3, 1.0, 0), (1.3, 0, 0.8, 0), (0.9, 4, 0.9, 0), (1.1, 0, 1.0, 0.2)],
)
def test_filtered_texts_follow_the_exact_joint(temperature, top_k, top_p, min_p):
    assert check_seeds(Sampling(temperature, top_k, top_p, min_p=min_p)) > 1e-3


BROKEN = {
    "the position is ignored": lambda seed, positions, v: gumbel(seed, positions * 0, v),
    "every other position repeats": lambda seed, positions, v: gumbel(seed, positions // 2 * 2, v),
    "the seed is ignored": lambda seed, positions, v: gumbel(seed * 0, positions, v),
    "seed and position are added": lambda seed, positions, v: gumbel(seed * 0, positions + seed[:, None], v),
    "a quarter too small": lambda seed, positions, v: 0.75 * gumbel(seed, positions, v),
    "normal noise": lambda seed, positions, v: torch.randn(*positions.shape, v),
    "all tokens share it": lambda seed, positions, v: gumbel(seed, positions, 1).expand(*positions.shape, v),
    "none": lambda seed, positions, v: torch.zeros(*positions.shape, v),
}
SEES = {  # which check has to notice what
    "the position is ignored": ["correlation", "positions"],
    "every other position repeats": ["correlation", "positions"],
    "the seed is ignored": ["correlation", "seeds"],
    "seed and position are added": ["correlation"],
    "a quarter too small": ["law", "positions", "seeds"],
    "normal noise": ["law", "positions", "seeds"],
    "all tokens share it": ["correlation", "positions", "seeds"],
    "none": ["law", "positions", "seeds"],
}


@pytest.mark.parametrize("fault, name", [(fault, name) for fault, names in SEES.items() for name in names])
def test_broken_noise_is_seen(fault, name, monkeypatch):
    def broken_pick(logits, positions, seed, settings):
        noise = settings[:, :1, None].float() * BROKEN[fault](seed, positions, logits.shape[-1])
        return (logits + noise).argmax(dim=-1)

    monkeypatch.setattr(kernels, "gumbel", BROKEN[fault])
    monkeypatch.setattr(kernels, "pick", broken_pick)
    torch.manual_seed(0)
    assert CHECKS[name]() < ALARM


def test_every_check_has_a_fault_that_it_sees():
    assert set(CHECKS) == {name for names in SEES.values() for name in names}


# ---- the rest ------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_position_and_token_alone():
    whole = gumbel(torch.tensor([5, 6]), torch.tensor([[3, 4, 9], [4, 4, 2]]), 1000)
    assert torch.equal(whole[0, 1], gumbel(torch.tensor([5]), torch.tensor([[4]]), 1000)[0, 0])
    assert torch.equal(whole[1, 0], whole[1, 1])  # all nodes of a depth share one vector
    assert torch.equal(
        whole[..., :10], gumbel(torch.tensor([5, 6]), torch.tensor([[3, 4, 9], [4, 4, 2]]), 10)
    )
    assert whole.isfinite().all() and not torch.equal(whole[0, 1], whole[1, 1])


def test_large_and_negative_seeds_differ():
    seeds = torch.tensor([0, 2**32, 2**33, -1, -(2**40), 2**61])
    vectors = gumbel(seeds, torch.zeros(6, 1, dtype=torch.int64), 64)[:, 0]
    assert len({tuple(v.tolist()) for v in vectors}) == 6


def test_noise_is_the_same_compiled():
    seeds, positions = torch.tensor([1, 2]), torch.arange(10).view(2, 5)
    compiled = torch.compile(gumbel, fullgraph=True, dynamic=False)(seeds, positions, 1000)
    assert torch.equal(compiled, gumbel(seeds, positions, 1000))


def naive_filter(logits: list[float], s: Sampling) -> set[int]:
    """The tokens that may be picked, for logits without ties."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = [i for i in order if math.exp((logits[i] - logits[order[0]]) / s.temperature) >= s.min_p]
    order = order[: s.top_k] if s.top_k else order
    weights = [math.exp(logits[i] / s.temperature) for i in order]
    kept, held = [], 0.0
    for i, w in zip(order, weights):
        if s.top_p == 1 or held < s.top_p * sum(weights) or not kept:
            kept.append(i)
        held += w
    return set(kept)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
@pytest.mark.parametrize("min_p", [0, 0.03, 1])
def test_filter_against_the_definition(temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p=min_p)
    logits = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0)) * 3
    filtered = filter_logits(logits, sampling)
    for row, out in zip(logits.view(-1, 40), filtered.view(-1, 40)):
        kept = naive_filter(row.tolist(), sampling)
        assert set(out.isfinite().nonzero().flatten().tolist()) == kept
        assert torch.equal(out[list(kept)], row[list(kept)])


def test_shared_noise_couples_two_distributions():
    """The point of keyed noise: a drafter with a similar distribution proposes the same token most of the
    time."""
    torch.manual_seed(0)
    p = torch.randn(1, 5000, 50) * 2
    q = p + 0.3 * torch.randn_like(p)
    positions, seed = torch.arange(5000)[None], torch.tensor([3])
    sampling = Sampling(temperature=1.0)
    ours = pick(p, positions, seed, sampling)
    shared = (ours == pick(q, positions, seed, sampling)).float().mean()
    independent = (ours == pick(q, positions, seed + 1, sampling)).float().mean()
    best = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).mean()
    assert independent + 0.3 < shared < best


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": 2**63},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"min_tokens": -1},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": [1, 2]},
        {"bad_words": [[]]},
        {"bad_words": [["a"]]},
        {"bad_words": [3]},
    ],
)
def test_impossible_sampling_is_refused(values):
    with pytest.raises(BadInput, match=next(iter(values))):
        Sampling(**values)


def test_ties_keep_exactly_k_and_the_lower_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0]])
    kept = filter_logits(logits, Sampling(1.0, top_k=2)).isfinite()
    assert kept.tolist() == [[False, True, True, False, False]]
    assert filter_logits(logits, Sampling(1.0, top_p=0.25)).isfinite().sum() == 1
    greedy, one = Sampling(0.0), Sampling(2.0, top_k=1)
    logits = torch.randint(5, (1, 200, 30)).float()  # full of ties
    positions, seed = torch.arange(200)[None], torch.tensor([1])
    assert torch.equal(pick(logits, positions, seed, one), pick(logits, positions, seed, greedy))
