"""shapes.py: models of random weights, in the shapes of real ones.

    model = random_model(SHAPES["llama-3.2-1b"], "w4a8")

The one idea: the time of a forward depends on shapes and formats, not on values. A random model has the costs
of a trained one, needs no download, and is made on its device in the precision that it runs in.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import Parts
from eagle import EagleHead
from generate import Target
from model import CheckpointModule, Linear, ModelConfig, Transformer, rope_frequencies
from packing import PRECISIONS, best_group, default_quantization, reshape, set_precision

SHAPES = {
    "llama-3.2-1b": ModelConfig(
        128256, 2048, 8192, 16, 32, 8, 64, 131072, rope_theta=5e5, tied_embeddings=True
    ),
    "llama-3-8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, rope_theta=5e5),
    "llama-3-70b": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, 8192, rope_theta=5e5),
    "tiny": ModelConfig(512, 256, 512, 2, 4, 2, 64, 1024),  # to try a command out
}
REAL_SHAPES = ("llama-3.2-1b", "llama-3-8b", "llama-3-70b")
SMALLER = {"llama-3-70b": SHAPES["llama-3-8b"], "llama-3-8b": SHAPES["llama-3.2-1b"]}  # of one vocabulary


def linears_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices of a layer: outputs and inputs by name."""
    heads, both = config.num_heads * config.head_dim, config.num_heads + 2 * config.num_kv_heads
    return {
        "qkv": (both * config.head_dim, config.hidden_size),
        "o": (config.hidden_size, heads),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
    }


def random_rows(
    out: int, inputs: int, precision: str, device: str = "cpu", group: int = 128, asymmetric: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A weight in rows, plausible scales and perhaps zeros, for `kernels.linear`. `group`: of 4-bit ones."""
    if precision == "bf16":
        return (torch.randn(out, inputs, device=device) / inputs**0.5).bfloat16(), None, None
    four = precision.startswith("w4")
    shape, kind = ((out, inputs // 2), torch.uint8) if four else ((out, inputs), torch.int8)
    weight = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).view(kind)
    groups, size = (inputs // group, 5) if four else (1, 74)  # size: of such integers, root mean square
    scales = (0.5 + torch.rand(out, groups, device=device)) / size / inputs**0.5
    zeros = 15 * torch.rand(out, groups, device=device) if asymmetric else None
    return weight, scales.half(), None if zeros is None else zeros.half()


def packed(
    weight: Tensor, scales: Tensor | None = None, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A weight in rows, packed by `Linear.pack` as in a loaded model. The rows must not be used again."""
    with torch.device("meta"):
        linear = Linear(1, 1)
    linear.set_weights(weight, scales, zeros)
    linear.pack()
    return linear.weight, linear.scales, linear.zeros


def random_weight(
    out: int, inputs: int, precision: str, device: str = "cpu"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, scales and zeros as in a loaded model: groups of 128 for 4 bits, or of as many as divide the
    inputs, symmetric."""
    return packed(*random_rows(out, inputs, precision, device, best_group([inputs])))


def random_model(
    config: ModelConfig, precision: str, device: str = "cpu", lm_head_bits: int | None = None
) -> Transformer:
    """A model of random weights in the given precision. Memory never holds anything larger."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
        if precision in PRECISIONS:
            reshape(model, default_quantization(model, precision, lm_head_bits))
    model = model.to_empty(device=device).requires_grad_(False)
    fill_randomly(model)
    if model.config.tied_embeddings and model.lm_head.scales is None:
        model.lm_head.weight = model.embed_tokens.weight
    if precision in PRECISIONS:
        set_precision(model, precision)
    return model.pack()


def fill_randomly(module: CheckpointModule) -> None:
    """In place: weights that keep states at about their size, the same ones in each call."""
    torch.manual_seed(0)
    device = next(module.parameters()).device
    module.frequencies = rope_frequencies(module.config).to(device)
    for name, tensor in module.checkpoint_tensors().items():
        if tensor.dtype in (torch.uint8, torch.int8):
            tensor.view(torch.uint8).random_(0, 256)
        elif name.endswith("scales"):
            tensor.fill_(1 / (5 if tensor.shape[1] > 1 else 74) / module.config.hidden_size**0.5)
        else:
            tensor.fill_(1.0) if "norm" in name else tensor.normal_(std=module.config.hidden_size**-0.5)


def random_head(target: Transformer, precision: str = "bf16") -> EagleHead:
    """An EAGLE-2 head of random weights, as large as a published one for such a target."""
    with torch.device("meta"):
        head = EagleHead(replace(target.config, num_layers=1)).to(torch.bfloat16)
        if precision in PRECISIONS:
            reshape(head, default_quantization(head, precision))
    head = head.to_empty(device=target.norm.weight.device).requires_grad_(False)
    fill_randomly(head)
    if precision in PRECISIONS:
        set_precision(head, precision)
    return head.pack().attach(target)


def random_parts(
    target: ModelConfig,
    small: ModelConfig | None,
    precision: str,
    device: str,
    lm_head_bits: int | None = None,
) -> Parts:
    """A target, perhaps a small model, and heads, of random weights. `lm_head_bits`: of the target."""
    loaded = Target(random_model(target, precision, device, lm_head_bits), None, [], precision)
    return Parts(loaded, small and random_model(small, precision, device), random_head, random_head)


def weights_of_a_step(model: Transformer) -> list[Tensor]:
    """The weights that one step reads in full. Of the embedding it reads only a few rows."""
    return [p for module in (model.layers, model.lm_head) for p in module.parameters()]
