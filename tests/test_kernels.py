"""Attention over the static cache, against loops over heads, rows and slots."""

import math

import pytest
import torch

import kernels


def attention_by_definition(q, keys, values, ancestors, length):
    """The slow twin: one query at a time, over the slots it may see, in order."""
    batch, n, heads, size = q.shape
    m, group = ancestors.shape[-1], heads // keys.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for i in range(n):
            past = list(range(int(length[b])))
            seen = past + [int(length[b]) + j for j in range(m) if ancestors[b, i, j]]
            for h in range(heads):
                k, v = keys[b, seen, h // group], values[b, seen, h // group]
                out[b, i, h] = (k @ q[b, i, h] / math.sqrt(size)).softmax(0) @ v
    return out


def random_case(n: int, m: int, lengths: list[int], seed: int = 0):
    torch.manual_seed(seed)
    batch, slots = len(lengths), max(lengths) + m + 7
    q = torch.randn(batch, n, 4, 8)
    keys, values = torch.randn(2, batch, slots, 2, 8)
    ancestors = torch.rand(batch, n, m) < 0.5
    ancestors[:, torch.arange(n), torch.arange(m - n, m)] = True  # every query sees itself
    return q, keys, values, ancestors, torch.tensor(lengths)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 5), (4, 4), (3, 9)])
@pytest.mark.parametrize("lengths", [[0], [13], [3, 0, 11]])
def test_attention_against_its_definition(n, m, lengths):
    case = random_case(n, m, lengths)
    torch.testing.assert_close(kernels.attention(*case), attention_by_definition(*case), rtol=1e-5, atol=1e-5)


def test_slots_that_nobody_may_see_change_nothing():
    q, keys, values, ancestors, length = random_case(3, 5, [4, 9])
    before = kernels.attention(q, keys, values, ancestors, length)
    for b, end in enumerate((length + 5).tolist()):
        keys[b, end:] = torch.nan  # skipped, not multiplied by nothing
        values[b, end:] = torch.nan
    assert torch.equal(kernels.attention(q, keys, values, ancestors, length), before)


def test_attention_is_one_operator_in_a_compiled_graph():
    """Opaque to the compiler: the length is looked at inside, and another length compiles nothing."""
    compiled = torch.compile(lambda *case: kernels.attention(*case) * 2, fullgraph=True, dynamic=False)
    q, keys, values, ancestors, length = random_case(2, 2, [30])
    compiled(q, keys, values, ancestors, length)
    with torch.compiler.set_stance("fail_on_recompile"):
        for past in (0, 5, 29):
            case = (q, keys, values, ancestors, torch.tensor([past]))
            torch.testing.assert_close(compiled(*case), kernels.attention(*case) * 2)


def test_the_fake_has_the_shape_of_the_real_one():
    torch.library.opcheck(torch.ops.gpt_spec.attention.default, random_case(3, 5, [4, 9]))
