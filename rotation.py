"""rotation.py: rotated models, whose large activations are spread over all inputs.

    import rotation
    tensors = rotation.rotated(tensors, config)     # the weights of a 16-bit checkpoint, rotated
    rotation.add_rotations(model)                   # the model that such weights are for

The method is QuaRot (arXiv 2404.00456), with true RMSNorms and without its rotated embedding. This file
knows weights by name and matrices. It does not quantize anything, and it does not read or write files.

The one idea: a Hadamard matrix is orthogonal, so a weight that is rotated on its input side and an input
that is rotated alike multiply to the same product. Only the rounding in between changes, and it has fewer
outliers to round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from model import ModelConfig, Rotation, Transformer
from packing import Stored

LARGEST_ORDER = 256  # of a Hadamard matrix without a fast transform


def is_prime(n: int) -> bool:
    """Trial division; orders are small."""
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix float32 [order, order] by Paley's constructions; None where neither gives one.

    The first is for order = q + 1 with a prime q = 3 mod 4, the second for 2 (q + 1) with q = 1 mod 4.
    """
    q, rest = (order - 1, 3) if is_prime(order - 1) and order % 4 == 0 else (order // 2 - 1, 1)
    if not is_prime(q) or q % 4 != rest:
        return None
    squares, i = {j * j % q for j in range(1, q)}, torch.arange(q)
    character = torch.tensor([0.0] + [1.0 if j in squares else -1.0 for j in range(1, q)])
    matrix = F.pad(character[(i[:, None] - i) % q], (1, 0, 1, 0), value=1.0)  # [q + 1, q + 1]
    matrix[0, 0] = 0
    if rest == 3:
        matrix[1:, 0] = -1
        return matrix + torch.eye(order)
    ones, zero = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(matrix, ones) + torch.kron(torch.eye(q + 1), zero)


def hadamard(size: int) -> tuple[Tensor, int]:
    """The matrix and the power of `kernels.rotate` for `size` numbers.

    They span all numbers if there is such a Hadamard matrix. If not, as for 11008 = 43 * 256, they span the
    power of two in `size`, and the rotation is block-diagonal.
    """
    power = size & -size
    odd = size // power
    for order in (odd * 2**t for t in range(2, 9)):
        if odd > 1 and order <= LARGEST_ORDER and size % order == 0 and (matrix := paley(order)) is not None:
            return matrix, size // order
    return torch.ones(1, 1), power


@dataclass(frozen=True)
class Rotations:
    """What a rotated model is rotated with, in the places that QuaRot numbers."""

    hidden: Rotation  # R1: the state between layers, with signs
    value: Rotation  # R2: every value head, offline alone
    heads: Rotation  # online: across the heads, before o_proj
    inner: Rotation  # online: before down_proj

    @staticmethod
    def of(config: ModelConfig) -> Rotations:
        signs = (kernels.mix(torch.arange(config.hidden_size, device="cpu")) & 1) * 2.0 - 1
        return Rotations(
            Rotation(*hadamard(config.hidden_size), signs=signs),
            Rotation(*hadamard(config.head_dim)),
            Rotation(*hadamard(config.num_heads), stride=config.head_dim),
            Rotation(*hadamard(config.intermediate_size)),
        )


def add_rotations(model: Transformer, device: torch.device | str = "cpu") -> None:
    """Make a model rotate what it computes, as rotated weights expect.

    Call this after `to_empty` and `to(dtype)`: the matrices have values, and stay float32.
    """
    r = Rotations.of(model.config)
    model.rotation = r.hidden.to(device)
    for layer in model.layers:
        layer.self_attn.o_proj.rotation = r.heads.to(device)
        layer.mlp.down_proj.rotation = r.inner.to(device)


def turn(weight: Tensor, rotation: Rotation, dim: int = -1) -> Tensor:
    """Rotate a dimension of a float32 weight or bias."""
    return rotation(weight.movedim(dim, -1)).movedim(-1, dim)


def rotate_tensor(name: str, tensors: dict[str, Stored], r: Rotations) -> Tensor:
    """A tensor of a layer, float32. It takes rotated inputs and yields rotated outputs, and the scales of the
    norm before it are multiplied in."""
    *path, module, kind = name.split(".")
    tensor = tensors[name].read().float()
    if module in ("input_layernorm", "post_attention_layernorm"):
        return torch.ones_like(tensor)
    if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") and kind == "weight":
        norm = "input_layernorm" if path[-1] == "self_attn" else "post_attention_layernorm"
        scale = tensors[".".join([*path[:-1], norm, "weight"])].read().float()
        tensor = turn(tensor * scale, r.hidden)
    if module == "v_proj":
        tensor = turn(tensor, r.value, dim=0)
    if module == "o_proj" and kind == "weight":
        tensor = turn(turn(tensor, r.value), r.heads)
    if module == "down_proj" and kind == "weight":
        tensor = turn(tensor, r.inner)
    if module in ("o_proj", "down_proj"):
        tensor = turn(tensor, r.hidden, dim=0)
    return tensor


def rotated(tensors: dict[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """A 16-bit checkpoint, as a view, for a model with `add_rotations`, which computes the same.

    The state is rotated behind the embedding and turned back before the last norm. That costs two more online
    rotations, and embedding, lm_head and the features that EAGLE heads read stay what they were.
    """
    r, view = Rotations.of(config), dict(tensors)
    for name, stored in tensors.items():
        if name.startswith("model.layers.") and not name.endswith(("q_norm.weight", "k_norm.weight")):
            view[name] = stored._replace(kind="F32", read=partial(rotate_tensor, name, tensors, r))
    return view
