"""The Triton bodies against their references: on a GPU, or without one in Triton's interpreter.

Compiling for GPUs is tested without one. That rows are the same bits whatever rides along, only a GPU can
show: scripts/gpu_pass.py looks at that, and test_decoding.py at whole texts.
"""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl
from conftest import ROOT, random_model
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import kernels
import kernels_cuda
import packing
import sampling_cuda
from drafts import extend
from model import KVCache, Linear
from reference import SEEN, unpack_words
from rotation import paley

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def widened(data: np.ndarray, dtype) -> np.ndarray:
    """The interpreter keeps bf16 numbers as their bits."""
    return (data.astype(np.uint32) << 16).view(np.float32) if dtype.scalar == tl.bfloat16 else data


def narrowed(data: np.ndarray, dtype) -> TensorHandle:
    """To the nearest bf16 number, of two equally near ones to the even one, where bf16 is wanted."""
    if dtype.scalar == tl.bfloat16:
        bits = data.astype(np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(data), np.uint16(0x7FC0), rounded), tl.bfloat16)
    return TensorHandle(data, dtype.scalar)


@pytest.fixture(autouse=True)
def bf16_in_the_interpreter(monkeypatch):
    """Triton 3.6's interpreter calculates with the bits of bf16 numbers, and cuts off instead of rounding.
    Here it does what a GPU does: sums of products in float32, other results rounded."""
    torch.manual_seed(0)
    plain = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "binary_op", "create_dot")}

    def cast(self, source, dtype):
        if tl.bfloat16 not in (source.dtype.scalar, dtype.scalar):
            return plain["cast_impl"](self, source, dtype)
        wide = widened(source.data, source.dtype)
        return (
            narrowed(wide, dtype) if dtype.scalar == tl.bfloat16 else narrowed(wide.astype(np.float32), dtype)
        )

    def binary(self, a, b, op):
        if a.dtype.scalar != tl.bfloat16:
            return plain["binary_op"](self, a, b, op)
        return narrowed(op(widened(a.data, a.dtype), widened(b.data, b.dtype)), a.dtype)

    def dot(self, a, b, *others):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(widened(t.data, t.dtype), tl.float32) for t in (a, b))
        return plain["create_dot"](self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(InterpreterBuilder, "binary_op", binary)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(
        InterpreterBuilder,
        "get_bf16",
        lambda self, value: narrowed(np.array([value], np.float32), tl.bfloat16),
        raising=False,
    )


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def weights_4bit(out: int, inputs: int, group: int, symmetric: bool) -> tuple[tuple, tuple]:
    """In rows, for the reference; and as the GPU wants them."""
    weight = torch.randn(out, inputs) / inputs**0.5
    rows = [t if t is None else t.to(DEVICE) for t in packing.quantize_4_bit(weight, group, symmetric)]
    weight, *others = rows
    return rows, (kernels.pack_words(weight), *(t if t is None else t.T.contiguous() for t in others))


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> bool:
    """In the norm, as rounding differs: bf16 has 8 bits."""
    return bool((ours.double() - reference.double()).norm() <= tolerance * reference.double().norm())


EXTRAS = (None, 0.0, False, None, 1, 1, None)  # norm, eps, gated, rotation, power, stride, permutation


@pytest.mark.parametrize("inputs", [32, 96, 128, 416])
def test_words_are_unpacked_again(inputs):
    rows = torch.randint(0, 256, (70, inputs // 2), dtype=torch.uint8)
    numbers = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(1)
    k = torch.arange(inputs)
    word, nibble = k // 128 * 16 + k % 32 // 2, k % 128 // 32 + 4 * (k % 2)
    words = kernels.pack_words(rows)
    assert torch.equal((words[:, word] >> (4 * nibble)) & 15, numbers.int())
    scales = torch.rand(70, inputs // 32)
    again, *others = unpack_words(words, scales.T, scales.T, inputs)
    assert torch.equal(again, rows) and all(torch.equal(one, scales) for one in others)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "group"), [(512, 128), (256, 64), (160, 32), (192, 96), (512, 512)])
def test_linear_4bit(bits, symmetric, inputs, group):
    out, x, split = 70, randn(3, inputs), 2 if inputs == 512 else 1
    rows, words = weights_4bit(out, inputs, group, symmetric)
    plan = kernels_cuda.Tiles(64, split, warps=4, stages=3)
    reference = kernels.linear_reference(x, *rows, None, None, *EXTRAS, out, bits, True)
    ours = kernels_cuda.linear(x, *words, None, None, *EXTRAS, out, bits, True, plan=plan)
    assert torch.equal(kernels.linear_reference(x, *words, None, None, *EXTRAS, out, bits, True), reference)
    assert ours.dtype == torch.float32 and close(ours, reference, 5e-3 if bits == 16 else 2e-3)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("group", [128, 32])
def test_many_rows(bits, group):
    """More than a program takes, with larger blocks, and parts that several programs add up."""
    out, x = 200, randn(70, 512)
    rows, words = weights_4bit(out, 512, group, True)
    plan = kernels_cuda.Tiles(64, 4, warps=4, stages=3)
    reference = kernels.linear_reference(x, *rows, None, None, *EXTRAS, out, bits, True)
    for _ in range(2):  # the second time with the counters of the first
        ours = kernels_cuda.linear(x, *words, None, None, *EXTRAS, out, bits, True, plan)
        assert close(ours, reference, 5e-3)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    ("inputs", "group"), [(256, 256), (200, 200), (512, 128), (256, 64), (160, 32), (512, 256), (160, 16)]
)
def test_linear_8bit(bits, inputs, group):
    weight = torch.randint(-128, 128, (70, inputs), dtype=torch.int8).to(DEVICE)
    scales = torch.rand(70, inputs // group).half().to(DEVICE)
    x, given = randn(3, inputs), (weight, scales, None, None, None, *EXTRAS, 70, bits, True)
    plan = kernels_cuda.Tiles(64, 2 if inputs == 512 else 1, warps=4, stages=3)
    assert close(kernels_cuda.linear(x, *given, plan=plan), kernels.linear_reference(x, *given), 5e-3)
    gated, given = randn(3, 2 * inputs), (*given[:7], True, *given[8:])
    assert close(kernels_cuda.linear(gated, *given, plan=plan), kernels.linear_reference(gated, *given), 5e-3)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("inputs", [256, 200])
def test_linear_bf16(wide, inputs):
    x, given = randn(2, 20, inputs), (None, None, randn(70), randn(2, 20, 70), *EXTRAS, 70, 16, wide)
    weight = randn(70, inputs) / inputs**0.5
    ours, reference = (f(x, weight, *given) for f in (kernels_cuda.linear, kernels.linear_reference))
    assert ours.dtype == reference.dtype and ours.shape == (2, 20, 70) and close(ours, reference, 5e-3)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("case", ["norm", "gated", "rotation", "permutation"])
def test_what_stands_before_and_after_a_linear(bits, case):
    inputs, out = 384, 70
    x = randn(1, 3, 2 * inputs if case == "gated" else inputs)
    norm = randn(inputs) if case == "norm" else None
    hadamard = paley(12).float().to(DEVICE) if case == "rotation" else None
    order = torch.randperm(inputs).int().to(DEVICE) if case == "permutation" else None
    extras = (norm, 1e-5, case == "gated", hadamard, 32 if case == "rotation" else 1, 1, order)
    rows, words = weights_4bit(out, inputs, 128, True)
    more = (randn(out), randn(1, 3, out))
    reference = kernels.linear_reference(x, *rows, *more, *extras, out, bits, False)
    ours = kernels_cuda.linear(x, *words, *more, *extras, out, bits, False)
    # A number that is rounded to another integer, since what it was rounded from differs in its last bit,
    # makes up for most of it.
    assert ours.shape == (1, 3, out) and close(ours, reference, 1e-2 if bits > 4 else 4e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_are_rounded_like_those_of_the_reference(bits):
    x = randn(5, 384)
    x[1] = 0
    ours, scales = kernels_cuda.prepare(x, None, bits=bits, groups=3)
    q, expected = kernels.quantize_activations(x, bits, 3)
    assert torch.equal(ours.float(), q.flatten(-2))
    expected = expected[:, :1, 0] if bits == 8 else expected[..., 0]
    torch.testing.assert_close(scales.view(expected.shape), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [48, 4096])
def test_rms_norm(size):
    x, weight = randn(2, 3, size), randn(size)
    ours, reference = kernels_cuda.rms_norm(x, weight, 1e-5), kernels.rms_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(ours, reference, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize(("k", "power", "stride", "blocks"), [(1, 512, 1, 1), (1, 8, 16, 2), (12, 16, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotate(k, power, stride, blocks, dtype):
    matrix = (paley(k).float() if k > 1 else torch.ones(1, 1)).to(DEVICE)
    x = randn(3, blocks * k * power * stride, dtype=dtype)
    ours, reference = (f(x, matrix, power, stride) for f in (kernels_cuda.rotate, kernels.rotate_reference))
    assert ours.dtype == dtype and close(ours, reference, 1e-6 if dtype == torch.float32 else 5e-3)


def projected(batch: int, n: int, heads: int, groups: int, size: int, dtype: torch.dtype) -> tuple:
    """Queries, keys and values as parts of one result, and the cosines and sines of angles."""
    counts = (heads, groups, groups)
    parts = randn(batch, n, sum(counts), size, dtype=dtype).split(counts, dim=2)
    angles = 1e4 * torch.rand(batch, n, 1, size // 2).to(DEVICE)
    return (*parts, angles.cos(), angles.sin())


def slots_to_fill(batch: int, n: int, slots: int) -> torch.Tensor:
    """Different ones of every text, int64 [batch, n], which do not lie dense."""
    return torch.rand(batch, slots).argsort(dim=1)[:, : 2 * n : 2].to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize(("batch", "n", "heads", "groups"), [(1, 1, 8, 1), (3, 5, 12, 3), (1, 70, 20, 10)])
def test_rope_is_the_same_bits(batch, n, heads, groups, size, dtype):
    q, k, _, cos, sin = projected(batch, n, heads, groups, size, dtype)
    for keys in (k, k.contiguous(), k.transpose(2, 3).contiguous().transpose(2, 3)):
        given = (q, keys, cos, sin)
        for ours, reference in zip(kernels_cuda.rope(*given), kernels.rope_reference(*given)):
            assert ours.dtype == dtype and ours.is_contiguous() and torch.equal(ours, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2), slice(0, 5, 2)])
@pytest.mark.parametrize(("n", "groups"), [(1, 8), (6, 10)])
def test_store(n, groups, rows, size, dtype):
    """All rows of caches, one of them, or every other one. Nothing else is written."""
    caches = randn(2, rows.stop, 40, groups, size, dtype=dtype)
    expected, (keys, values) = caches.clone(), caches[:, rows]
    _, k, v, cos, sin = projected(len(keys), n, groups, groups, size, dtype)
    given = (kernels.rope_reference(k, k, cos, sin)[1], v, slots_to_fill(len(keys), n, 40))
    kernels_cuda.store(keys, values, *given)
    kernels.store_reference(*expected[:, rows], *given)
    assert torch.equal(caches, expected) and torch.equal(keys[0, given[2][0]], given[0][0])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (3, 60), (1, 2000)])
def test_a_graph_of_rope_and_store_takes_other_tokens(batch, n):
    """The operators, for which the bodies are registered: they ask the host nothing."""
    assert kernels.load_cuda() or kernels.PATH == "reference"
    static = [*projected(batch, n, 32, 8, 128, torch.bfloat16), slots_to_fill(batch, n, 2 * n)]
    caches = torch.zeros(2, batch, 2 * n, 8, 128, device=DEVICE, dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        q, k, v, cos, sin, slots = static
        q, k = kernels.rope(q, k, cos, sin)
        kernels.store(*caches, k, v, slots)
        return q

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = step()
    for _ in range(2):
        fresh = [*projected(batch, n, 32, 8, 128, torch.bfloat16), slots_to_fill(batch, n, 2 * n)]
        for old, new in zip(static, fresh):
            old.copy_(new)
        expected, (q, k, v, cos, sin, slots) = caches.clone(), fresh
        graph.replay()
        q, k = kernels.rope_reference(q, k, cos, sin)
        kernels.store_reference(*expected, k, v, slots)
        assert torch.equal(ours, q) and torch.equal(caches, expected)


def test_all_operators_but_one_have_a_body_here():
    """And each has a twin, whose only body is the reference."""
    schemas = [schema.name for schema in torch._C._jit_get_all_schemas()]
    defined, operations = (
        {name[10:] for name in schemas if name.startswith("gpt_spec::")},
        set(kernels.OPERATIONS),
    )
    assert defined == operations | {f"{name}_reference" for name in operations}
    bodies = {body.__name__ for body in (*kernels_cuda.OPERATIONS, *sampling_cuda.OPERATIONS)}
    assert bodies < operations and operations - bodies == {"penalize"}


RULES = [  # temperature, top_k, top_p, min_p
    *((0.0, 5, 0.5, 0.1), (1.0, 0, 1.0, 0.0), (2.0, 5, 1.0, 0.0), (2.5, 0, 0.3, 0.0), (1.0, 0, 1.0, 0.05)),
    *((2.0, 40, 0.9, 0.02), (0.0, 0, 1.0, 0.0), (1e-6, 7, 0.9, 0.1), (30.0, 0, 1.0, 0.0)),
    *((0.7, 1, 1.0, 0.0), (5.0, 50, 0.999, 0.5), (1.0, 10**6, 0.95, 0.0), (3.0, 0, 1e-6, 0.0)),
]


def row_of_settings(temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """As `kernels.pick` wants them."""
    temperature = float(torch.tensor(temperature))  # as float32 has it
    scale = math.log2(math.e) / temperature if temperature else 0.0
    return [temperature, scale, top_k, top_p, temperature * math.log(min_p) if min_p else -math.inf]


def picks(batch: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions [batch, n], seeds, and settings that differ between rows: of the first RULES."""
    positions = torch.randint(-(2**34), 2**34, (batch, n))
    settings = torch.tensor([row_of_settings(*rules) for rules in RULES[:batch]], dtype=torch.float64)
    return positions, torch.randint(-(2**63), 2**63 - 1, (batch,)), settings


def odd_logits(kind: str, *shape: int) -> torch.Tensor:
    x = torch.randn(shape) * 3
    if kind == "equal ones":
        x = x.round()
        x[::2, :, ::3] = -0.0
    if kind == "not finite":
        for value, share in ((-torch.inf, 0.3), (torch.nan, 0.1), (torch.inf, 2 / shape[-1])):
            x[torch.rand(shape) < share] = value
        x[0], x[1], x[2], x[3] = -torch.inf, torch.nan, 0.0, torch.inf
    if kind == "parts of wider rows":
        x = torch.cat((x, torch.full((*shape[:-1], 7), 99.0)), dim=-1)[..., : shape[-1]]
    return x


def same(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    return ours.dtype == reference.dtype and torch.equal(ours.cpu(), reference)


KINDS = ["equal ones", "not finite", "parts of wider rows"]


def compare_picking(size: int, kind: str, batch: int, n: int) -> None:
    """All of it on DEVICE with the references on the CPU."""
    positions, seed, settings = picks(batch, n)
    logits = odd_logits(kind, batch, n, size)
    x, *given = (t.to(DEVICE) for t in (logits, positions, seed, settings))
    assert same(sampling_cuda.pick(x, *given), kernels.pick_reference(logits, positions, seed, settings))
    noise = sampling_cuda.gumbel(given[1], given[0], size)
    assert same(noise, kernels.gumbel_reference(seed, positions, size))
    sums = kernels.logsumexp_reference(torch.where(logits.isnan(), -torch.inf, logits))
    assert same(sampling_cuda.logsumexp(x), sums)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, of infinities
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 63, 65, 1000])
def test_picking_is_the_same_bits(size, kind):
    compare_picking(size, kind, len(RULES), 1)


def test_picking_from_more_than_a_tile_of_blocks():
    compare_picking(5000, "equal ones", 6, 1)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("size", [128256, 300001])
@pytest.mark.parametrize("kind", KINDS)
def test_picking_from_large_vocabularies(kind, size):
    compare_picking(size, kind, len(RULES), 1)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_graph_of_picking_takes_other_settings():
    """Nothing is decided on the host: what a graph was captured with may change, between rows as well."""
    positions, seed, settings = picks(len(RULES), 1)
    logits = odd_logits("plain", *positions.shape, 128256)
    static = [t.to(DEVICE) for t in (logits, positions, seed, settings)]
    sampling_cuda.pick(*static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = sampling_cuda.pick(*static)
    for turn in range(3):
        settings = settings.roll(turn, dims=0)
        static[3].copy_(settings)
        graph.replay()
        assert same(token, kernels.pick_reference(logits, positions, seed, settings))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_references_of_picking_are_the_same_bits_on_a_gpu():
    """And they do not wait for it. `penalize` has no other body there."""
    (positions, seed, settings), size = picks(len(RULES), 3), 5000
    batch, n = positions.shape
    logits, tokens = odd_logits("equal ones", batch, n, size), torch.randint(0, size, (batch, 9))
    counts = torch.randint(0, 3, (batch, size), dtype=torch.int32)
    counts += SEEN * (torch.rand(batch, size) < 0.1).int()
    penalties, bias = torch.rand(batch, 3) + 0.5, torch.randn(batch, size)
    mask = torch.randint(-(2**31), 2**31, (batch, n, -(-size // 32))).int()
    sees = torch.rand(batch, n, 9) < 0.5
    cases = {
        kernels.penalize_reference: (logits, tokens, sees, counts, penalties, bias, mask),
        kernels.pick_reference: (logits, positions, seed, settings),
        kernels.logsumexp_reference: (logits,),
    }
    for body, given in cases.items():
        there = [t.to(DEVICE) for t in given]
        body(*there)  # what PyTorch sets up once may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = body(*there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert same(ours, body(*given))


@pytest.mark.parametrize(("size", "k"), [(61, 1), (61, 60), (9000, 10)])
def test_top_k(size, k):
    x = torch.randn(2, 3, size).mul(4).round().div(4)  # with many equal ones
    x[0, 1, 7], x[0, 2, 5:9], x[1, 0] = torch.nan, torch.tensor([0.0, -0.0, torch.inf, -torch.inf]), -0.0
    x[1, 0, 3::2] = 0.0
    x = x.to(DEVICE)
    for ours, reference in zip(kernels_cuda.top_k(x, k), kernels.top_k_reference(x, k)):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_move(dtype):
    caches = [randn(2, 40, 2, 12, dtype=dtype) for _ in range(5)]
    expected = [cache.clone() for cache in caches]
    path, length = torch.tensor([[0, 2, 5, 6, 6], [0, 1, 2, 2, 2]], device=DEVICE), torch.tensor([7, 30])
    length = length.to(DEVICE)
    kernels.move_reference(expected, path, length)
    kernels_cuda.move(caches, path, length)
    for ours, reference in zip(caches, expected):
        assert torch.equal(ours, reference)


def random_tree(n: int) -> torch.Tensor:
    """Ancestors of a tree whose parents are drawn: bool [n, n]."""
    seen = torch.eye(n, dtype=torch.bool)
    for node in range(1, n):
        seen[node] |= seen[int(torch.randint(0, node, ()))]
    return seen


def chain(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


CASES = {  # heads, key heads, size of a head, ancestors [B, n, m], lengths
    "one token": (4, 2, 16, chain(1).expand(2, -1, -1), [5, 300]),
    "chain": (8, 2, 32, chain(7).expand(2, -1, -1), [61, 250]),
    "trees": (4, 2, 16, torch.stack([random_tree(9), random_tree(9)]), [60, 255]),
    "wide tree": (6, 2, 12, torch.stack([random_tree(70)])[:, 66:], [30]),
    "last of a tree": (4, 1, 16, torch.stack([random_tree(12), chain(12)])[:, 8:], [3, 126]),
    "window": (4, 4, 16, torch.tensor([[[True, True, False, False]], [[True] * 4]]), [0, 64]),
    "block": (4, 2, 16, torch.ones(2, 8, 8, dtype=torch.bool), [5, 130]),
    "many heads": (20, 1, 16, torch.stack([random_tree(3)]), [10]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention(case, dtype):
    heads, groups, size, ancestors, lengths = CASES[case]
    batch, n, m = ancestors.shape
    q = randn(batch, n, heads, size, dtype=dtype)
    keys, values = randn(2, batch, 512, groups, size, dtype=dtype)
    for b, length in enumerate(lengths):  # what no program may read
        keys[b, length + m :] = values[b, length + m :] = torch.nan
    given = (q, keys, values, ancestors.to(DEVICE), torch.tensor(lengths, device=DEVICE))
    ours, reference = kernels_cuda.attention(*given), kernels.attention_reference(*given)
    assert ours.dtype == dtype and close(ours, reference, 3e-6 if dtype == torch.float32 else 6e-3)


def test_sums_go_over_positions():
    """A node of a tree and the same text as a chain, or cached already, are the same bits, not just close."""
    q, (keys, values), length = randn(1, 9, 4, 16), randn(2, 1, 512, 2, 16), 250
    tree = random_tree(9)
    at = torch.tensor([length], device=DEVICE)
    whole = kernels_cuda.attention(q, keys, values, tree[None].to(DEVICE), at)
    for node in range(9):
        path = tree[node].nonzero()[:, 0].to(DEVICE)
        moved = [cache.clone() for cache in (keys, values)]
        for cache in moved:
            cache[:, length : length + len(path)] = cache[:, length + path]
        for past in (length, length + len(path) - 1):  # the others as nodes, or as past
            m = length + len(path) - past
            seen = torch.ones(1, 1, m, dtype=torch.bool, device=DEVICE)
            alone = kernels_cuda.attention(q[:, node : node + 1], *moved, seen, at - length + past)
            assert torch.equal(alone[0, 0], whole[0, node])


def test_a_whole_model(monkeypatch):
    """All operations of a forward, as `Transformer.forward` puts them together."""
    model = random_model(hidden_size=128, intermediate_size=192, head_dim=32).bfloat16().requires_grad_(False)
    linears = [module for module in model.modules() if isinstance(module, Linear)]  # lm_head too
    for linear in linears:
        linear.set_weights(*packing.quantize_4_bit(linear.weight.float(), 32, True))
    model, tokens = model.to(DEVICE), torch.randint(0, 61, (2, 9), device=DEVICE)
    expected = model.lm_head(model.recompute(tokens))
    for linear in linears:
        linear.set_weights(kernels.pack_words(linear.weight), linear.scales.T.contiguous())

    def multiply(x, *given):
        *tensors, rotation, permutation, out, bits, wide = given
        return kernels_cuda.linear(x, *tensors, *(rotation or (None, 1, 1)), permutation, out, bits, wide)

    monkeypatch.setattr(kernels, "linear", multiply)
    monkeypatch.setattr(kernels, "rms_norm", kernels_cuda.rms_norm)
    for name in ("rope", "store", "attention"):
        monkeypatch.setattr(kernels, name, getattr(kernels_cuda, name))
    cache = KVCache.allocate(model.config, 2, 64, model.norm.weight)
    start = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    features, _ = extend(model, cache, tokens, start)
    assert close(model.lm_head(features), expected, 2e-2)


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict]]:
    """What tests/compile_cuda.py says, by capability."""
    if DEVICE == "cuda":
        pytest.skip("where there is a GPU, time is for what needs it")
    script = ROOT / "tests" / "compile_cuda.py"
    started = {c: subprocess.Popen([sys.executable, script, str(c)], stdout=subprocess.PIPE, text=True)
               for c in (80, 90)}  # fmt: skip
    said = {c: process.communicate(timeout=300)[0] for c, process in started.items()}
    assert not any(process.returncode for process in started.values())
    return {c: [json.loads(line) for line in lines.splitlines()] for c, lines in said.items()}


@pytest.mark.parametrize("capability", [80, 90])
def test_linear_kernels_keep_everything_in_registers(compiled, capability):
    linears = [report for report in compiled[capability] if report["kernel"] == "linear_kernel"]
    assert len(linears) > 15 and all(report["spilled"] == 0 for report in linears)
    others = {report["kernel"] for report in compiled[capability]}
    names = ["prepare", "walsh_hadamard", "small_matrix", "rope", "store", "attention", "combine", "top_k"]
    names += ["move", "tops", "pick", "gumbel", "logsumexp"]
    assert others == {"linear_kernel", *(f"{name}_kernel" for name in names)}


@pytest.mark.parametrize("capability", [80, 90])
def test_what_is_the_same_bits_is_compiled_to_operations_of_ieee(compiled, capability):
    """Products and sums are rounded one by one, small numbers are kept, divisions are exact."""
    names = {f"{name}_kernel" for name in ("rope", "store", "tops", "pick", "gumbel", "logsumexp")}
    inexact = [(report["kernel"], report["inexact"]) for report in compiled[capability]]
    assert {name for name, _ in inexact} > names
    assert [report for report in inexact if report[0] in names and report[1]] == []
    assert any(count for _, count in inexact)  # they can be told


@pytest.mark.parametrize("capability", [80, 90])
def test_more_rows_are_added_up_by_the_same_instructions(compiled, capability):
    """Of other numbers of rows, an instruction has another width, and of no number there is another one."""
    family = {80: "mma.sync.aligned.m16n8k", 90: "wgmma.mma_async.sync.aligned.m64nNk"}[capability]
    kinds: dict[str, set[frozenset]] = {}
    for report in compiled[capability]:
        if report["kernel"] == "linear_kernel":
            constants = {key: value for key, value in report["constants"].items() if key[:6] != "BLOCK_"}
            kinds.setdefault(json.dumps(constants), set()).add(frozenset(report["instructions"]))
            assert all(name.startswith(family) for name in report["instructions"])
    assert all(len(found) == 1 for found in kinds.values())
    attention = [report["instructions"] for report in compiled[capability] if "attention" in report["kernel"]]
    assert all(len(instructions) == 1 for instructions in attention)  # past and trees, both products
    assert sum("8.s8" in next(iter(next(iter(found)))) for found in kinds.values()) >= 4  # of 8-bit integers
