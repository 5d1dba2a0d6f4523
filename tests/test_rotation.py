"""Rotated models compute what the others compute, and quantize better."""

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import (
    NEEDS_EQUAL_ROWS,
    SHIPPED_HEAD,
    SHIPPED_SMALL,
    SHIPPED_TARGET,
    SMALL_HEAD,
    held_out_prompts,
    random_model,
    save_checkpoint,
    texts,
)

import kernels
import quantize
from checkpoints import load_model, open_checkpoint
from eagle import TreeDrafter
from gpt_spec import HierarchicalDrafter, LookupDrafter, SequentialDrafter
from heads import load_head
from model import Linear, Rotation, causal_attention
from packing import Stored, lower_precisions, share_weights
from rotation import add_rotations, hadamard, paley, rotated
from sampling import Sampling

KINDS = {
    "plain": {},
    "tied": {"tied_embeddings": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "Qwen3": {"qk_norm": True, "num_heads": 4, "num_kv_heads": 1, "head_dim": 20},
    "many heads": {"hidden_size": 144, "num_heads": 12, "num_kv_heads": 4, "intermediate_size": 172},
    "Qwen2.5-0.5B": {"hidden_size": 56, "num_heads": 14, "num_kv_heads": 2, "head_dim": 4, "qkv_bias": True},
    "wide": {"intermediate_size": 76, "hidden_size": 88, "num_layers": 3},
}


def stored(model) -> dict[str, Stored]:
    tensors = {name: tensor.clone() for name, tensor in model.checkpoint_tensors().items()}
    return {name: Stored(tuple(t.shape), "F32", Path("memory"), lambda t=t: t) for name, t in tensors.items()}


def with_odd_norms(**changes):
    """A random fp32 model with random norm weights and biases."""
    model = random_model(**changes)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter += 0.5 * torch.randn_like(parameter)
    return model


def rotate(model):
    """The same model, rotated."""
    turned = copy.deepcopy(model)
    places = turned.checkpoint_tensors()
    for name, tensor in rotated(stored(model), model.config).items():
        places[name].copy_(tensor.read())
    add_rotations(turned)
    return turned


TOKENS = torch.arange(1, 60)[None]


@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 44, 60, 76, 108, 140, 148, 200])
def test_paley_matrices_are_hadamard_matrices(order):
    matrix = paley(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_orders_that_paley_does_not_reach():
    assert [order for order in (2, 6, 16, 40, 52, 92, 156, 172) if paley(order) is not None] == []


@pytest.mark.parametrize(
    "size, order, blocks",
    [
        *((4096, 1, 1), (8192, 1, 1), (14336, 28, 1), (28672, 28, 1), (11008, 1, 43), (13824, 108, 1)),
        *((27648, 108, 1), (8960, 140, 1), (5120, 20, 1), (3072, 12, 1), (18944, 148, 1), (4864, 76, 1)),
        *((5632, 44, 1), (3584, 28, 1), (896, 28, 1), (1536, 12, 1), (12288, 12, 1), (9728, 76, 1)),
        *((17408, 68, 1), (25600, 200, 1), (29568, 1, 231), (768, 12, 1), (384, 12, 1)),
    ],
)  # fmt: skip
def test_the_sizes_of_published_models(size, order, blocks):
    """Llama, Mistral, Qwen and ours: one matrix for all, or blocks where there is none."""
    matrix, power = hadamard(size)
    assert (len(matrix), size // (len(matrix) * power)) == (order, blocks)
    some = torch.randint(size, (40,)).unique()
    rows = torch.zeros(len(some), size, dtype=torch.float64).scatter(1, some[:, None], 1.0)
    turned = kernels.rotate_reference(rows, matrix, power, 1)
    torch.testing.assert_close(turned @ turned.T, torch.eye(len(some)).double(), atol=1e-12, rtol=0)
    back = kernels.rotate_reference(turned, matrix.T, power, 1)
    torch.testing.assert_close(back, rows, atol=1e-12, rtol=0)
    signs = torch.randint(2, (size,)) * 2.0 - 1
    rotation = Rotation(matrix, power, signs=signs)
    torch.testing.assert_close(rotation.inverse(rotation(rows.float())), rows.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_features_are_those_of_the_model_that_was_rotated(kind):
    """What heads read too, whatever layer it comes from; embedding and lm_head are not even touched."""
    model = with_odd_norms(**KINDS[kind])
    turned, layers = rotate(model), model.config.num_layers
    assert torch.equal(turned.embed_tokens.weight, model.embed_tokens.weight)
    assert torch.equal(turned.lm_head.weight, model.lm_head.weight)
    assert not torch.allclose(turned.layers[1].mlp.down_proj.weight, model.layers[1].mlp.down_proj.weight)
    positions, attend, taps = torch.arange(59)[None], causal_attention, tuple(range(layers + 1))
    ours, theirs = (m.forward(TOKENS, positions, attend, taps) for m in (turned, model))
    ours, theirs = (*ours, turned.lm_head(ours[0])), (*theirs, model.lm_head(theirs[0]))
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 1e-5 * b.norm() and (a - b).abs().max() < 1e-5 * b.abs().max()


def inputs_of(model) -> dict[str, torch.Tensor]:
    """What every linear of the layers is multiplied with."""
    found, hooks = {}, []
    for path, linear in model.named_modules():
        if isinstance(linear, Linear) and not linear.float32_out:

            def keep(linear, arguments, options, path=path):
                found[path] = linear.prepare(*arguments, **options)

            hooks.append(linear.register_forward_pre_hook(keep, with_kwargs=True))
    model.recompute(TOKENS)
    for hook in hooks:
        hook.remove()
    return found


def test_outliers_are_spread():
    """A channel of large values in every place makes none in a rotated model, and 4 bits then hold more."""
    model = random_model(hidden_size=64, intermediate_size=96, num_heads=4, head_dim=16)
    model.embed_tokens.weight[:, 5] *= 40
    for layer in model.layers:
        layer.self_attn.qkv_proj.weight[-12:-8] *= 20
        layer.mlp.gate_up_proj.weight[-3:] *= 20
    before, after = inputs_of(model), inputs_of(rotate(model))

    def peak(x):  # largest over root mean square, the median of all tokens
        return (x.abs().amax(-1) / x.square().mean(-1).sqrt()).median().item()

    def loss(x):
        q, scale = kernels.quantize_activations(x, 4, 1)
        return ((q * scale).flatten(-2) - x).norm() / x.norm()

    for path, x in before.items():
        assert peak(after[path]) < 0.8 * peak(x), path
        assert loss(after[path]) < loss(x), path


def test_online_rotations_are_part_of_the_graph():
    model, seen = rotate(random_model()), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda tokens: model.recompute(tokens), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(TOKENS), model.recompute(TOKENS))
    assert sum("rotate" in name for name in seen) == 2 + 2 * model.config.num_layers


# ---- from directories ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_directory(tmp_path, tied):
    """8-bit weights keep the logits; the metadata says that the model turns."""
    model = with_odd_norms(hidden_size=64, intermediate_size=96, head_dim=16, tied_embeddings=tied)
    source = save_checkpoint(model, tmp_path / "source")
    flags = ["--checkpoint_path", str(source), "--precision", "w8a16", "--rotate"]
    assert quantize.main([*flags, "--output", str(tmp_path / "q")]) == 0
    checkpoint, loaded = open_checkpoint(tmp_path / "q"), load_model(tmp_path / "q")
    assert checkpoint.quantization.rotation == "hadamard" and loaded.rotation is not None
    exact = model.lm_head(model.recompute(TOKENS))
    error = (loaded.lm_head(loaded.recompute(TOKENS)) - exact).norm()
    assert error < 0.03 * exact.norm()
    loaded.rotation = None
    assert (loaded.lm_head(loaded.recompute(TOKENS)) - exact).norm() > 3 * error


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("precision", ["w4a16", "w4a8", "w4a4"])
@pytest.mark.parametrize("kind", ["rotated", "4-bit lm_head"])
def test_every_method_is_exact_on_other_targets(rotated_target, kind, precision):
    """With heads that were trained on the model in bf16, unrotated; `bench.py exact` takes more texts."""
    four = load_model(SHIPPED_TARGET, precision, lm_head_bits=4)
    target = four if kind == "4-bit lm_head" else load_model(rotated_target, precision)
    small = load_model(SHIPPED_SMALL)
    prompts = held_out_prompts(2)
    lower = share_weights(target, [*lower_precisions(precision), precision][0])
    heads = {model: load_head(SHIPPED_HEAD, model) for model in (target, lower)}
    inner = TreeDrafter(load_head(SMALL_HEAD, small), 12, 3, 4)
    drafters = {
        "lookup": LookupDrafter(),
        "sequential": SequentialDrafter(small, 4),
        "tree": TreeDrafter(heads[target], 16, 4, 4),
        "hierarchical": HierarchicalDrafter(small, inner, 4),
        "qspec": SequentialDrafter(lower, 3, shares_cache=True),
        "its own middle": HierarchicalDrafter(lower, TreeDrafter(heads[lower], 12, 3, 4), 4, True),
    }
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        expected = texts(target, prompts, None, sampling, 60)
        for name, drafter in drafters.items():
            assert texts(target, prompts, drafter, sampling, 60, batch_size=2) == expected, name


def test_rotation_lowers_the_perplexity_of_4_bit_activations(rotated_target, held_out):
    plain = quantize.mean_loss(load_model(SHIPPED_TARGET, "w4a4"), held_out, 4000)
    turned = quantize.mean_loss(load_model(rotated_target, "w4a4"), held_out, 4000)
    assert math.exp(turned - plain) < 0.98
