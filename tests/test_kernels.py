"""Every operation against its slow twin, on every path of this CPU, and its rows bitwise equal for all n."""

import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import NEEDS_EQUAL_ROWS, ROOT

import kernels
import reference
from benchmarks import shapes
from drafts import Draft, extend, tree_geometry
from model import KVCache, ModelConfig
from rotation import hadamard
from runtime import Runtime
from sampling import Sampling

FORMATS = ["bf16", "w8a16", "w8a8", "w8a16 in groups", "w8a8 in groups", "w4a16", "w4a8", "w4a4"]
FORMATS += ["w4a16 asymmetric", "w4a8 asymmetric"]
# out, in, group: whole blocks; no multiple of 64 or 16; a single group; one row of outputs; many groups
SHAPES = [(192, 256, 128), (100, 96, 32), (37, 80, 80), (1, 64, 64), (70, 1024, 64)]
ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 100]
PATHS = ["portable", "avx2", "avx512"]


def random_weights(form: str, out: int, inputs: int, group: int):
    """(weight, scales, zeros) in rows, and the bits of the activations."""
    torch.manual_seed(out + inputs)
    activation_bits = int(form.split()[0][3:]) if form != "bf16" else 16
    if form == "bf16":
        return torch.randn(out, inputs).bfloat16(), None, None, activation_bits
    if form.startswith("w8"):
        weight = torch.randint(-128, 128, (out, inputs), dtype=torch.int8)
        groups = inputs // group if "groups" in form else 1
        return weight, torch.rand(out, groups).half(), None, activation_bits
    weight = torch.randint(0, 256, (out, inputs // 2), dtype=torch.uint8)
    zeros = (15 * torch.rand(out, inputs // group)).half() if "asymmetric" in form else None
    return weight, torch.rand(out, inputs // group).half(), zeros, activation_bits


def packed(weight, scales, zeros):
    return kernels.pack(weight.clone()), *(
        None if t is None else kernels.pack_scales(t) for t in (scales, zeros)
    )


def unpack_by_definition(weight, scales, zeros):
    """The slow twin of `dequantize`: w = (q - zero) * scale in float64, the even input in the low nibble."""
    if scales is None:
        return weight.double()
    rows = []
    for r in range(len(weight)):
        q = [int(x) for x in weight[r]]
        if weight.dtype == torch.uint8:
            q = [nibble for byte in q for nibble in (byte % 16, byte // 16)]
        group = len(q) // scales.shape[1]
        zero = (
            [0.0 if weight.dtype == torch.int8 else 8.0] * scales.shape[1]
            if zeros is None
            else zeros[r].tolist()
        )
        rows.append([(q[i] - zero[i // group]) * float(scales[r, i // group]) for i in range(len(q))])
    return torch.tensor(rows, dtype=torch.float64)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.fixture(scope="module", autouse=True)
def cpu_bodies():
    if not kernels.load() and kernels.PATH != "reference":
        pytest.fail("the kernels were not compiled")


@pytest.mark.parametrize("path", PATHS)
def test_every_path(path):
    """This file once more, with the path forced."""
    if "GPT_SPEC_KERNELS" in os.environ:
        pytest.skip("a path is forced already")
    if PATHS.index(path) > PATHS.index(kernels.best_path()):
        pytest.skip(f"this CPU has no {path}")
    if path == kernels.PATH:
        pytest.skip("the other tests of this file have run on it")
    others = "filters or fakes or one_operator or without_a_compiler or do_not_exist or sums_of or forms_of"
    chosen = f"(not recorded or (recorded_forwards and w4a8)) and not ({others})"  # no path changes those
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--numprocesses", "0", "-k", chosen, __file__]
    ran = subprocess.run(
        command, env=os.environ | {"GPT_SPEC_KERNELS": path}, capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stdout[-2000:]


@NEEDS_EQUAL_ROWS
def test_callers_in_several_threads_do_not_disturb_each_other():
    """The team has one caller at a time; another one works alone."""
    kernels.load()
    weight = kernels.pack(torch.randn(640, 512).bfloat16())
    inputs = [torch.randn(n, 512).bfloat16() for n in (1, 3, 8, 40)]
    expected = [kernels.linear(x, weight, out_features=640) for x in inputs]

    def calls(i):
        return all(
            torch.equal(kernels.linear(inputs[i], weight, out_features=640), expected[i]) for _ in range(300)
        )

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(calls, range(4)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [2, 6, 64, 80, 96])
def test_rope_and_store_are_their_references_to_the_last_bit(size, dtype):
    """Of slices of one result, into a view of one text's cache, too."""
    kernels.load()
    heads = torch.randn(2, 5, 9 + 3 + 3, size).to(dtype)
    q, k, v = heads.split((9, 3, 3), dim=2)
    cos, sin = torch.randn(2, 2, 5, 1, size // 2)
    turned = torch.ops.gpt_spec.rope(q, k, cos, sin)
    assert all(map(torch.equal, turned, kernels.rope_reference(q, k, cos, sin)))
    slots = torch.stack([torch.randperm(40)[:5] for _ in range(2)])
    for rows in (slice(0, 2), slice(1, 2)):
        ours, theirs = (
            torch.zeros(2, 3, 40, 3, size, dtype=dtype) for _ in range(2)
        )  # keys and values of three
        kernels.store(*ours[:, rows.start : rows.stop], k[rows], v[rows], slots[rows])
        kernels.store_reference(*theirs[:, rows.start : rows.stop], k[rows], v[rows], slots[rows])
        assert torch.equal(ours, theirs) and ours.any()
    with pytest.raises(RuntimeError, match="slot 40 of 40"):
        kernels.store(*torch.zeros(2, 2, 40, 3, size, dtype=dtype), k, v, torch.full_like(slots, 40))


def test_threads_do_not_matter():
    """However many there are, and whatever conftest.py says: the same bits."""
    x, weight = torch.randn(5, 512).bfloat16(), torch.randint(0, 256, (4096, 256), dtype=torch.uint8)
    blocks, scales = kernels.pack(weight), kernels.pack_scales(torch.rand(4096, 4).half())
    q, cache = torch.randn(2, 8, 16, 64).bfloat16(), torch.randn(2, 999, 4, 64).bfloat16()
    seen, length = torch.ones(8, 8, dtype=torch.bool).tril().expand(2, 8, 8), torch.tensor([900, 31])
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ours = [kernels.linear(x, blocks, scales, out_features=4096, activation_bits=b) for b in (16, 8, 4)]
        results.append([*ours, kernels.attention(q, cache, cache, seen, length)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


# ---- linear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("out, inputs, group", SHAPES)
def test_linear_against_float64(form, out, inputs, group):
    *weights, bits = random_weights(form, out, inputs, group)
    blocks, exact = packed(*weights), unpack_by_definition(*weights)
    assert torch.equal(kernels.dequantize(*weights).double(), exact.float().double())
    assert torch.equal(kernels.dequantize(*blocks)[:out].double(), exact.float().double())
    x = torch.randn(max(ROWS), inputs).bfloat16()
    quantized = x.double()
    if bits < 16:
        q, scale = kernels.quantize_activations(x, bits, 1 if weights[1] is None else weights[1].shape[1])
        assert q.abs().max() <= 2 ** (bits - 1) - 1 and torch.equal(q, q.round())
        quantized = (q.double() * scale.double()).flatten(-2)
    expected = quantized @ exact.T
    multiply = partial(kernels.linear, out_features=out, activation_bits=bits, float32_out=True)
    for n in ROWS:
        assert error(multiply(x[:n], *blocks), expected[:n]) < (5e-3 if bits == 16 else 1e-5)
    tolerance = 1e-2 if form == "bf16" else 5e-3 if bits == 16 else 1e-5  # bf16: the reference rounds its sum
    assert error(multiply(x, *weights), expected) < tolerance
    narrow = kernels.linear(x, *blocks, out_features=out, activation_bits=bits)
    assert torch.equal(narrow, multiply(x, *blocks).bfloat16())


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("out, inputs, group", [*SHAPES, (256, 4096, 128)])
def test_rows_of_a_linear_do_not_depend_on_each_other(form, out, inputs, group):
    *weights, bits = random_weights(form, out, inputs, group)
    blocks = packed(*weights)
    x, residual = torch.randn(max(ROWS), 2 * inputs).bfloat16(), torch.randn(max(ROWS), out).bfloat16()
    norm, bias = torch.rand(inputs).bfloat16(), torch.randn(out).bfloat16()
    rotation, order = (*hadamard(inputs), 1), torch.randperm(inputs).int()
    for gated, scale, turned in ((False, norm, (None, None)), (True, None, (rotation, order))):
        x = x if gated else x[:, :inputs].contiguous()
        full = None
        for n in reversed(ROWS):
            y = kernels.linear(x[:n], *blocks, bias, residual[:n], scale, 1e-5, gated, *turned, out, bits)
            full = y if full is None else full
            assert torch.equal(y, full[:n]), n
        x = torch.randn(max(ROWS), 2 * inputs).bfloat16()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("what", ["norm", "gated", "bias", "residual", "permutation", "rotation", "all"])
def test_what_stands_next_to_a_linear(form, what):
    """Prologue and epilogue against the reference, which has the weights in rows."""
    out, inputs, group = 100, 160, 32
    *weights, bits = random_weights(form, out, inputs, group)
    x = torch.randn(2, 3, 2 * inputs if what in ("gated", "all") else inputs).bfloat16()
    order, rotation = torch.randperm(inputs).int(), (*hadamard(10), 16)  # orders 1 and 2, 16 numbers apart
    options = {
        "norm": {"norm": torch.rand(inputs).bfloat16(), "eps": 1e-5},
        "gated": {"gated": True},
        "bias": {"bias": torch.randn(out).bfloat16()},
        "residual": {"residual": 30 * torch.randn(2, 3, out).bfloat16()},
        "permutation": {"permutation": order},
        "rotation": {"rotation": rotation},
        "all": {"gated": True, "rotation": (*hadamard(inputs), 1), "permutation": order},
    }[what]
    ours = kernels.linear(x, *packed(*weights), out_features=out, activation_bits=bits, **options)
    reference = kernels.linear(x, *weights, activation_bits=bits, **options)
    assert ours.shape == (2, 3, out) and ours.dtype == torch.bfloat16
    assert error(ours, reference.double()) < 1e-2  # a rounding of an activation may go the other way


@pytest.mark.parametrize("form", ["w4a8", "w4a8 asymmetric"])
def test_zeros_and_tiny_and_huge_rows_are_quantized_without_nan(form):
    *weights, _ = random_weights(form, 64, 64, 32)
    x = torch.tensor([0.0, 1e-38, 1e30])[:, None].repeat(1, 64).bfloat16()
    x[1, 3:] = 0
    for bits in (8, 4):
        for tensors in (packed(*weights), weights):
            y = kernels.linear(x, *tensors, out_features=64, activation_bits=bits, float32_out=True)
            assert torch.equal(y[:2], torch.zeros(2, 64)) and not y.isnan().any()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_row_stays_in_its_row_and_is_not_lost(form, value):
    *weights, bits = random_weights(form, 64, 96, 32)
    multiply = partial(kernels.linear, out_features=64, activation_bits=bits)
    x, blocks = torch.randn(3, 96).bfloat16(), packed(*weights)
    clean = multiply(x, *blocks)
    x[1, 45] = value
    y = multiply(x, *blocks)
    assert not y[1].isfinite().any() and torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])


@pytest.mark.parametrize("form", FORMATS)
def test_packing_is_a_permutation_in_place(form):
    weight, _, _, _ = random_weights(form, 128, 256, 64)
    place, before = weight.data_ptr(), weight.clone()
    blocks = kernels.pack(weight)
    assert blocks.data_ptr() == place and blocks.numel() == before.numel()
    assert torch.equal(kernels.unpack(blocks), before)


def test_an_embedding_may_share_the_packed_weight_of_the_head():
    weight, tokens = torch.randn(100, 48).bfloat16(), torch.tensor([[0, 63, 64], [99, 5, 31]])
    assert torch.equal(kernels.embedding(kernels.pack(weight.clone()), tokens), weight[tokens])
    assert torch.equal(kernels.embedding(weight, tokens), weight[tokens])


@pytest.mark.skipif(kernels.PATH == "reference", reason="the operator's own checks")
def test_wrong_shapes_are_refused():
    blocks = kernels.pack(torch.randn(64, 64).bfloat16())
    for x in (torch.randn(1, 32).bfloat16(), torch.randn(1, 64)):
        with pytest.raises(RuntimeError, match="linear: "):
            kernels.linear(x, blocks, out_features=64)
    x = torch.randn(2, 64).bfloat16()
    with pytest.raises(RuntimeError, match="scales are missing"):
        kernels.linear(x, kernels.pack(torch.zeros(64, 64, dtype=torch.int8)), out_features=64)
    with pytest.raises(ValueError, match="does not tell its out_features"):
        kernels.linear(x, blocks)
    with pytest.raises(RuntimeError, match="200 outputs of 1 blocks"):
        kernels.linear(x, blocks, out_features=200)
    with pytest.raises(RuntimeError, match="rotation: orders 1 and 128 at stride 1 do not fit 64 numbers"):
        kernels.linear(x, blocks, out_features=64, rotation=(torch.ones(1, 1), 128, 1))
    for wrong in (
        {"norm": torch.ones(64)},
        {"permutation": torch.arange(64)},
        {"bias": torch.ones(63).bfloat16()},
        {"residual": x[:1]},
    ):
        with pytest.raises(RuntimeError, match=f"linear: {next(iter(wrong))} should be"):
            kernels.linear(x, blocks, out_features=64, **wrong)
    assert not kernels.can_pack(torch.zeros(64, 63).bfloat16())
    assert not kernels.can_pack(torch.zeros(64, 12, dtype=torch.uint8), torch.zeros(64, 1).half())


# ---- rotation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 12, 14, 40, 80, 96, 172, 256, 768, 896, 5632, 14336])
@pytest.mark.parametrize("stride", [1, 3, 16])
def test_rotations_against_the_reference_and_rows(size, stride):
    matrix, power = hadamard(size)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(9, size * stride).to(dtype)
        turned = kernels.rotate(x, matrix, power, stride)
        exact = kernels.rotate_reference(x.double(), matrix, power, stride)
        assert error(turned, exact) < (1e-6 if dtype == torch.float32 else 4e-3)
        assert torch.equal(kernels.rotate(x[4:5], matrix, power, stride), turned[4:5])


def test_a_rotation_is_the_kronecker_product_of_its_definition():
    matrix, power = hadamard(24)
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert (len(matrix), power) == (12, 2)
    whole = torch.kron(torch.eye(2), torch.kron(torch.kron(matrix, sylvester), torch.eye(3))) / 24**0.5
    x = torch.randn(5, 144)
    torch.testing.assert_close(kernels.rotate(x, matrix, power, 3), x @ whole.T, atol=1e-5, rtol=1e-5)


# ---- norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 100, 256, 4096])
def test_rms_norm_against_its_definition_and_rows(size):
    torch.manual_seed(size)
    x, weight = 3 * torch.randn(64, size).bfloat16(), torch.rand(size).bfloat16()
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    y = kernels.rms_norm(x, weight, 1e-5)
    assert error(y, exact) < 5e-3
    assert error(kernels.rms_norm_reference(x, weight, 1e-5), exact) < 5e-3
    if kernels.PATH != "reference":
        for n in (1, 2, 8, 63):
            assert torch.equal(kernels.rms_norm(x[:n], weight, 1e-5), y[:n])


# ---- attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, nodes", [(1, 1), (4, 9), (7, 60)])
def test_moving_slots_against_indexing(n, nodes, dtype):
    """Every path of every row; what is behind the valid part of a path may come out differently."""
    torch.manual_seed(n)
    for _ in range(20):
        caches = [torch.randn(3, 100, 2, 6).to(dtype) for _ in range(4)]
        expected = [cache.clone() for cache in caches]
        length = torch.randint(0, 100 - nodes, (3,))
        path = torch.stack([torch.randperm(nodes)[:n].sort().values for _ in range(3)])
        count = torch.randint(1, n + 1, (3,))
        for b in range(3):
            path[b, count[b] :] = path[b, count[b] - 1]
        kernels.move_slots(caches, path, length)
        kernels.move_reference(expected, path, length)
        for ours, theirs in zip(caches, expected):
            for b, past in enumerate(length.tolist()):
                valid = past + count[b]
                assert torch.equal(ours[b, :valid], theirs[b, :valid])
                assert torch.equal(ours[b, past + nodes :], theirs[b, past + nodes :])


@pytest.mark.parametrize("size", [1, 15, 64, 65, 1000])
def test_noise_is_the_same_in_every_body(size):
    """Bit for bit, for seeds and positions beyond 32 bits and below 0 too.

    Some by hand: a change of all bodies at once would change every sampled text.
    """
    seeds = torch.tensor([0, 1, -1, 1234, 2**40 + 7, -(2**61), 2**62 - 1])
    positions = torch.tensor([[0, 1, 2**31, 2**33 + 5, -1]]).expand(7, -1)
    noise = kernels.gumbel(seeds, positions, size)
    assert torch.equal(noise, kernels.gumbel_reference(seeds, positions, size))
    assert noise.isfinite().all() and noise.unique().numel() > 0.99 * noise.numel()
    assert torch.equal(noise[3:4, 2:], kernels.gumbel(seeds[3:4], positions[3:4, 2:], size))
    by_hand = [gumbel_by_hand(2**40 + 7, 2**33 + 5, token) for token in range(size)]
    torch.testing.assert_close(noise[4, 3], torch.tensor(by_hand), rtol=1e-6, atol=1e-6)


def gumbel_by_hand(seed: int, position: int, token: int) -> float:
    def mix(x: int) -> int:
        x %= 2**32
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x ^ (x >> 16)

    def exponential(bits: int) -> float:
        return -math.log1p(-(bits + 0.5) / 2**32)

    first = mix(mix(seed % 2**32) ^ (seed >> 32))
    a = mix(position + first)
    b = mix(a ^ mix(first ^ 0x5BF03635))
    block = mix(mix(token // 64 + mix(a ^ 0x2C1B3C6D)) ^ mix(b ^ 0x297A2D39))
    time = exponential(block) / 64
    if token % 64 != mix(block + 0x9E3779B9) % 64:
        time += exponential(mix(mix(token + a) ^ b))
    return -math.log(time)


def random_settings(rows: int) -> torch.Tensor:
    """Of every kind, a row each, float64 [rows, 5]: see `kernels.pick`."""

    def one_of(*values):
        return values[torch.randint(len(values), (1,))]

    samplings = [
        Sampling(
            one_of(0, 0.1, 0.7, 1.0, 2.5, 1e-30, 1e5),
            one_of(0, 0, 1, 5, 50, 4000),
            one_of(1.0, 1.0, 0.95, 0.5, 0.05, 0.999),
            min_p=one_of(0, 0, 0.05, 0.5, 1),
        )
        for _ in range(rows)
    ]
    return torch.tensor([sampling.settings for sampling in samplings], dtype=torch.float64)


def random_logits(kind: int, *shape: int) -> torch.Tensor:
    """Flat and sharp ones, ties, -inf, NaN, inf, and columns of a wider tensor."""
    x = torch.randn(*shape) * (0.1, 1, 3, 10)[kind % 4]
    holes = {0: None, 1: -torch.inf, 2: torch.nan, 3: torch.inf, 4: None}[kind % 5]
    if holes is not None:
        x[torch.rand(shape) < 0.05] = holes
    x = (2 * x).round() / 2 if kind % 3 == 0 else x
    return torch.cat((x, x), dim=-1)[..., : shape[-1]] if kind % 7 == 0 else x


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 200, 1000, 5000])
def test_picks_are_the_same_in_every_body(n):
    """Whatever is asked for, row by row and with rows of the batch that ask for other things."""
    torch.manual_seed(n)
    for kind in range(20):
        logits, settings = random_logits(kind, 3, 4, n), random_settings(3)
        positions, seed = torch.randint(10**6, (3, 4)), torch.randint(-(2**62), 2**62, (3,))
        picks = kernels.pick(logits, positions, seed, settings)
        assert torch.equal(picks, kernels.pick_reference(logits, positions, seed, settings))
        alone = kernels.pick(logits[1:2, 2:3], positions[1:2, 2:3], seed[1:2], settings[1:2])
        assert alone == picks[1, 2]


def test_sums_of_floats_in_another_order_would_be_seen():
    """Why probabilities are whole numbers: sums of floats depend on how they are cut into parts."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 20000)
    weights = (x - x.max()).exp().flatten()
    assert len({float(sum(part.sum() for part in weights.split(size))) for size in (7, 64, 999, 20000)}) > 1
    whole = reference.masses_reference(x, torch.full((1, 1, 1), math.log2(math.e))).flatten()
    assert len({int(sum(part.sum() for part in whole.split(size))) for size in (7, 64, 999, 20000)}) == 1
    shares = whole.double() / whole.sum()
    torch.testing.assert_close(shares, x.double().softmax(-1).flatten(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n", [1, 40, 64, 1000])
def test_penalties_are_the_same_in_every_body(n):
    torch.manual_seed(n)
    for kind in range(20):
        m, logits = kind % 7, random_logits(kind, 2, 3, n)
        tokens, sees = torch.randint(n, (2, m)), torch.rand(2, 3, m) < 0.5
        counts = (torch.randint(4, (2, n)) * (torch.rand(2, n) < 0.3)).int()
        counts += kernels.SEEN * (torch.rand(2, n) < 0.2).int()
        penalties = torch.stack((torch.rand(2) + 0.6, torch.randn(2), torch.randn(2)), dim=1)
        bias = torch.randn(2, n) * (torch.rand(2, n) < 0.2)
        mask = torch.randint(-(2**31), 2**31, (2, 3, -(-n // 32))).int() if kind % 2 else None
        inputs = (logits, tokens, sees, counts, penalties, bias, mask)
        ours, expected = kernels.penalize(*inputs), kernels.penalize_reference(*inputs)
        assert torch.equal(ours.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("n", [1, 40, 64, 1000, 20011])
def test_logsumexp_is_the_same_in_every_body(n):
    torch.manual_seed(n)
    for scale in (0.1, 3, 30):
        x = scale * torch.randn(2, 3, n)
        total = kernels.logsumexp(x)
        assert torch.equal(total, kernels.logsumexp_reference(x))
        assert torch.equal(total[1:, 2:], kernels.logsumexp(x[1:, 2:]))
        torch.testing.assert_close(total, x.double().logsumexp(-1, keepdim=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n, k", [(1, 1), (5, 5), (16, 3), (17, 17), (100, 10), (4096, 64), (20011, 8)])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_top_k_against_sorting(n, k, shape):
    """Random numbers, many equal ones, only equal ones, infinities and NaN."""
    torch.manual_seed(n)
    x = torch.randn(*shape, n)
    holes = torch.where(torch.rand(*shape, n) < 0.3, torch.nan, x)
    for row in (x, (3 * x).round(), torch.zeros_like(x), torch.where(x > 0.5, -torch.inf, x), holes):
        values, places = kernels.top_k(row, k)
        expected_values, expected_places = kernels.top_k_reference(row, k)
        assert torch.equal(values, expected_values) and torch.equal(places, expected_places)
    flat = (3 * x).round().reshape(-1, n).tolist()
    by_hand = [sorted(range(n), key=lambda i, row=row: -row[i])[:k] for row in flat]  # a stable sort
    assert kernels.top_k((3 * x).round(), k)[1].reshape(-1, k).tolist() == by_hand


@pytest.mark.parametrize("n", [1, 15, 40, 4096, 20011])
@pytest.mark.parametrize("top_k", [0, 1, 7, 64, 10**6])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 1e-9])
@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_filters_against_float64(n, top_k, top_p, temperature):
    """Flat rows and sharp ones, with ties; sums within 1e-5 of top_p, which float32 cannot tell, are free."""
    torch.manual_seed(n)
    settings = torch.tensor([Sampling(temperature, top_k, top_p).settings], dtype=torch.float64)
    for scale in (0.5, 4.0):
        logits = (scale * torch.randn(1, 6, n) * 16).round() / 16
        kept = kernels.kept_reference(logits, settings)
        for row, out in zip(logits[0], kept[0]):
            value, place = row.double().sort(descending=True, stable=True)
            value = value[: top_k or n]
            share = (value / temperature).softmax(0)
            before = share.cumsum(0) - share
            expected = (before < top_p) | (torch.arange(len(value)) == 0) | (top_p == 1)
            free = ((before - top_p).abs() < 1e-5) & (top_p < 1)
            decided = place[: len(value)][~free]
            assert torch.equal(out[decided], expected[~free])
            assert not out[place[len(value) :]].any()


def attention_by_definition(q, keys, values, ancestors, length):
    """The slow twin: one query at a time, over the slots it may see, in order, in float64."""
    batch, n, heads, size = q.shape
    m, group = ancestors.shape[-1], heads // keys.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for i in range(n):
            past = list(range(int(length[b])))
            seen = past + [int(length[b]) + j for j in range(m) if ancestors[b, i, j]]
            for h in range(heads):
                k, v = keys[b, seen, h // group].double(), values[b, seen, h // group].double()
                out[b, i, h] = (k @ q[b, i, h].double() / math.sqrt(size)).softmax(0) @ v
    return out


def random_case(n: int, m: int, lengths: list[int], dtype=torch.float32, size: int = 8, seed: int = 0):
    torch.manual_seed(seed)
    batch, slots = len(lengths), max(lengths) + m + 7
    q = torch.randn(batch, n, 4, size, dtype=dtype)
    keys, values = torch.randn(2, batch, slots, 2, size, dtype=dtype)
    ancestors = torch.rand(batch, n, m) < 0.5
    ancestors[:, torch.arange(n), torch.arange(m - n, m)] = True  # every query sees itself
    return q, keys, values, ancestors, torch.tensor(lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 12, 64, 80])
@pytest.mark.parametrize("n, m", [(1, 1), (1, 5), (4, 4), (3, 9), (20, 20)])
@pytest.mark.parametrize("lengths", [[0], [13], [3, 0, 45], [250, 600]])
def test_attention_against_its_definition(n, m, lengths, size, dtype):
    case = random_case(n, m, lengths, dtype, size)
    exact = attention_by_definition(*case)
    assert error(kernels.attention(*case), exact) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_slots_that_nobody_may_see_change_nothing():
    q, keys, values, ancestors, length = random_case(3, 5, [4, 9])
    before = kernels.attention(q, keys, values, ancestors, length)
    for b, end in enumerate((length + 5).tolist()):
        keys[b, end:] = torch.nan  # skipped, not multiplied by nothing
        values[b, end:] = torch.nan
    assert torch.equal(kernels.attention(q, keys, values, ancestors, length), before)


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [37, 254, 511])  # in a range of 256 positions, and over its end
def test_attention_reduces_over_positions_not_slots(length, dtype):
    """A path scattered among the nodes of a tree, a chain, and a text that has all of it below `length` are
    the same keys at the same positions: the same bits."""
    torch.manual_seed(1)
    path = [0, 3, 4, 9, 17]  # nodes of a tree of 20
    q = torch.randn(1, 20, 4, 64, dtype=dtype)
    keys, values = torch.randn(2, 1, length + 43, 2, 64, dtype=dtype)
    parent = torch.arange(20) - 1
    parent[torch.tensor(path)] = torch.tensor([-1, *path[:-1]])
    parent[[1, 5, 10, 18]] = torch.tensor([0, 3, 4, 9])  # branches that leave it
    ancestors, _ = tree_geometry(parent[None], 19)
    tree = kernels.attention(q, keys, values, ancestors, torch.tensor([length]))
    order = [*range(length), *(length + node for node in path)]
    straight = [cache[:, order + [0] * 20] for cache in (keys, values)]
    for count, node in enumerate(path, start=1):
        for past in (length, length + count - 1):  # all nodes as a draft, or all but the last one as the past
            m = length + count - past
            ones = torch.ones(1, 1, m, dtype=torch.bool)
            alone = kernels.attention(q[:, node : node + 1], *straight, ones, torch.tensor([past]))
            assert torch.equal(alone, tree[:, node : node + 1])


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 6])  # that share a key
@pytest.mark.parametrize("size", [24, 64])
def test_queries_of_a_chain_do_not_depend_on_each_other(size, heads, dtype):
    """One after another, or many at once, over several ranges, next to another text: the same bits."""
    torch.manual_seed(2)
    n, length = 19, torch.tensor([503, 40])
    q, (keys, values) = torch.randn(2, n, 2 * heads, size), torch.randn(2, 2, 540, 2, size)
    q, keys, values = q.to(dtype), keys.to(dtype), values.to(dtype)
    chain = torch.ones(n, n, dtype=torch.bool).tril()
    together = kernels.attention(q, keys, values, chain.expand(2, n, n), length)
    for b in range(2):
        text = keys[b : b + 1], values[b : b + 1]
        for begin, end in [(i, i + 1) for i in range(n)] + [(0, 8), (8, 10), (2, 19)]:
            seen = chain[None, : end - begin, : end - begin]
            part = kernels.attention(q[b : b + 1, begin:end], *text, seen, length[b : b + 1] + begin)
            assert torch.equal(part[0], together[b, begin:end])


def test_attention_does_not_trust_the_stride_of_a_single_query():
    """Contiguous tensors may have any stride where a dimension has size 1."""
    q, keys, values, ancestors, length = random_case(1, 4, [5, 9, 0], torch.bfloat16, 32)
    odd = q.view(1, 3, 4, 32).transpose(0, 1)
    assert odd.is_contiguous() and odd.shape == q.shape and odd.stride() != q.stride()
    case = (keys, values, ancestors, length)
    assert torch.equal(kernels.attention(odd, *case), kernels.attention(q, *case))


@pytest.mark.skipif(kernels.PATH == "reference", reason="the operator's own checks")
def test_attention_refuses_what_does_not_fit():
    q, keys, values, ancestors, length = random_case(3, 5, [4, 9])
    with pytest.raises(RuntimeError, match="slots"):
        kernels.attention(q, keys, values, ancestors, length + 100)
    with pytest.raises(RuntimeError, match="do not fit ancestors"):
        kernels.attention(q, keys, values, ancestors[:1], length)
    with pytest.raises(RuntimeError, match="do not fit keys"):
        kernels.attention(q, keys[:1], values[:1], ancestors, length)
    with pytest.raises(RuntimeError, match="dtype"):
        kernels.attention(q, keys.bfloat16(), values.bfloat16(), ancestors, length)


# ---- operators in graphs ---------------------------------------------------------------------------------


def test_attention_is_one_operator_in_a_compiled_graph():
    """Opaque to the compiler: the length is looked at inside, and another length compiles nothing."""
    compiled = torch.compile(lambda *case: kernels.attention(*case) * 2, fullgraph=True, dynamic=False)
    q, keys, values, ancestors, length = random_case(2, 2, [30])
    compiled(q, keys, values, ancestors, length)
    with torch.compiler.set_stance("fail_on_recompile"):
        for past in (0, 5, 29):
            case = (q, keys, values, ancestors, torch.tensor([past]))
            torch.testing.assert_close(compiled(*case), kernels.attention(*case) * 2)


def test_the_fakes_have_the_shapes_of_the_real_ones():
    torch.library.opcheck(torch.ops.gpt_spec.attention.default, random_case(3, 5, [4, 9]))
    x, norm = torch.randn(2, 3, 96).bfloat16(), torch.rand(96).bfloat16()
    torch.library.opcheck(torch.ops.gpt_spec.rms_norm.default, (x, norm, 1e-5))
    torch.library.opcheck(torch.ops.gpt_spec.rotate.default, (x, *hadamard(96), 1))
    *weights, bits = random_weights("w4a8", 100, 96, 32)
    order = torch.randperm(96).int()
    for float32_out in (False, True):
        arguments = (
            x,
            *packed(*weights),
            None,
            None,
            norm,
            1e-5,
            False,
            *hadamard(96),
            1,
            order,
            100,
            bits,
            float32_out,
        )
        torch.library.opcheck(torch.ops.gpt_spec.linear.default, arguments)


def test_without_a_compiler_the_reference_runs_and_says_so(tmp_path):
    script = "import torch, kernels; print(kernels.load()); w = torch.eye(64).bfloat16();"
    script += "print(kernels.can_pack(w), kernels.rms_norm(w, w[0], 1e-5).shape[0])"
    changes = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CXX": "", "GPT_SPEC_KERNELS": ""}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | changes, capture_output=True, text=True, cwd=ROOT
    )
    assert ran.stdout.split() == ["False", "False", "64"], ran.stderr
    assert "running on the slow reference: there is no C++ compiler g++" in ran.stderr


@pytest.mark.parametrize(
    "name, value, reason",
    [("GPT_SPEC_KERNELS", "avx1024", " is 'avx1024'; it must be")]
    + [("GPT_SPEC_REFERENCE", f"pick;{x}", f": '{x}' is none of") for x in ("attend", "linear w3a16")],
)
def test_bodies_that_do_not_exist_are_named(name, value, reason):
    command = [sys.executable, "generate.py", "--max_new_tokens", "1"]
    ran = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2 and ran.stderr.startswith(f"error: {name}{reason}")


@NEEDS_EQUAL_ROWS
def test_single_operations_on_their_references(monkeypatch):
    """Of linears, one form and not another of the same weight."""
    kernels.load()
    x = torch.randn(5, 256).bfloat16()
    *weights, _ = random_weights("w4a16", 192, 256, 128)
    settings = {"out_features": 192, "float32_out": True}
    linears = [partial(kernels.linear, x, *packed(*weights), activation_bits=b, **settings) for b in (16, 8)]
    usual = [linear() for linear in linears]
    monkeypatch.setattr(kernels, "ON_REFERENCE", frozenset({"linear w4a8, groups of 128", "rms_norm"}))
    slow = [linear() for linear in linears]
    assert torch.equal(slow[0], usual[0]) and not torch.equal(slow[1], usual[1])
    extras = (None, None, None, 0.0, False, None, 1, 1, None, 192, 8, True)
    assert torch.equal(slow[1], kernels.linear_reference(x, *weights, *extras))
    twins = [kernels.operator(name) for name in ("rms_norm", "rope")]
    assert twins == [torch.ops.gpt_spec.rms_norm_reference, torch.ops.gpt_spec.rope]


def test_forms_of_linears_have_names():
    """Those that GPT_SPEC_REFERENCE understands."""
    for form, groups in (
        ("bf16", ""),
        ("w8a8", ""),
        ("w4a4", ", groups of 32"),
        ("w4a16 asymmetric", ", groups of 32"),
    ):
        weight, scales, zeros, bits = random_weights(form, 64, 96, 32)
        name = kernels.form_of(weight, scales, zeros, form == "w4a4", 96, bits)
        words = "linear " + form.split()[0] + groups + (", zeros" if zeros is not None else "")
        assert name == words + (", turned" if form == "w4a4" else "") and re.fullmatch(kernels.FORM, name)


# ---- whole forwards --------------------------------------------------------------------------------------

WIDE = ModelConfig(512, 4096, 1024, 1, 32, 8, 128, 1024)
ODD = ModelConfig(500, 160, 96, 2, 2, 1, 80, 1024, qkv_bias=True, qk_norm=True)
PAST = 101


def spread_out(n: int) -> torch.Tensor:
    """Parents of a tree [1, n]: a path on the even nodes, and a leaf next to each of them on the odd ones."""
    node = torch.arange(n)
    return torch.where(node % 2 == 0, node - 2, node - 1).clamp(min=-1)[None]


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize(
    "config, precision",
    [(WIDE, precision) for precision in ("bf16", "w8a16", "w8a8", "w4a16", "w4a8", "w4a4")]
    + [(ODD, "bf16"), (ODD, "w4a8")],
)
@torch.no_grad()
def test_recorded_forwards_are_bitwise_the_same_for_every_n(config, precision):
    """Features, logits and the K/V written, at width 4096: token by token, and 2, 8 or 64 nodes at once, as a
    chain and spread out over a tree, alone and in a batch of eight."""
    torch.manual_seed(2)
    model = shapes.random_model(config, precision)
    text = torch.randint(config.vocab_size, (1, PAST + 64))

    def run(tokens, positions, slots, ancestors, length, *cache):
        attend = partial(KVCache(cache[::2], cache[1::2]).attend, slots, ancestors, length)
        features, tapped = model(tokens, positions, attend, taps=(0, 1))
        return features, model.lm_head(features), tapped

    forward = Runtime(compile=True, device=torch.device("cpu")).recorded(run)
    start = KVCache.allocate(config, 1, 256, model.norm.weight)
    extend(model, start, text[:, :PAST], torch.tensor([0]))

    def decode(tokens, parent, past: int, cache: KVCache):
        length = torch.full((len(tokens),), past)
        ancestors, depth = tree_geometry(parent, parent.shape[1] - 1)
        slots = length[:, None] + torch.arange(parent.shape[1])
        tensors = (t for pair in zip(cache.keys, cache.values) for t in pair)
        return forward(tokens, length[:, None] + depth, slots, ancestors, length, *tensors)

    def copies(count: int) -> KVCache:
        return KVCache(
            *([t.repeat(count, 1, 1, 1) for t in tensors] for tensors in (start.keys, start.values))
        )

    one, steps = copies(1), []
    for t in range(PAST, PAST + 64):
        root = text[:, t : t + 1]
        steps.append(decode(root, Draft.chain(root).parent, t, one))
    # features, logits, what EAGLE-3 heads read: [1, 64, .]
    expected = [torch.cat(parts, dim=1) for parts in zip(*steps)]
    assert len(expected[1][0].argmax(-1).unique()) > 5  # something worth comparing
    for batch in (1, 8):
        for n in (2, 8, 64):
            tree = spread_out(n).expand(batch, -1)
            chain = Draft.chain(text[:, PAST : PAST + n]).parent.expand(batch, -1)
            for parent, on_path in ((chain, torch.arange(n)), (tree, torch.arange(0, n, 2))):
                tokens = torch.randint(config.vocab_size, (batch, n))
                tokens[:, on_path] = text[:, PAST : PAST + len(on_path)]
                cache = copies(batch)
                for ours, theirs in zip(decode(tokens, parent, PAST, cache), expected):
                    assert torch.equal(
                        ours[:, on_path], theirs[:, : len(on_path)].expand_as(ours[:, on_path])
                    )
                for ours, theirs in zip((*cache.keys, *cache.values), (*one.keys, *one.values)):
                    written = ours[:, PAST + on_path]
                    assert torch.equal(written, theirs[:, PAST : PAST + len(on_path)].expand_as(written))
