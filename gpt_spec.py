"""gpt_spec.py: a Llama-family model with a static KV cache, and speculative decoding around it.

This file knows tensors. It knows nothing of text, of command lines, or of how a checkpoint was quantized;
`generate.py` does (start there to run something: `python generate.py`).

The one idea: a method of speculative decoding is a *drafter* inside one loop. The drafter proposes tokens,
one forward of the target picks its own token after every one of them, and the longest path on which both
agree is kept. What the target picks never depends on what was proposed (see `pick`), so a drafter can change
the speed and nothing else. And a decoder, a model with its drafter, may be the drafter of a larger model.
"""

from __future__ import annotations

import gc
import inspect
import math
import operator
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, compress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels


class BadInput(ValueError):
    """What the user gave cannot work. One line: the file or flag, what is wrong, what would be right."""


# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched beyond the trained context."""

    kind: str = "default"  # or "linear" or "llama3"
    factor: float = 1.0
    # Of llama3: wavelengths above original_context / low_freq_factor are slowed by `factor`, those below
    # original_context / high_freq_factor are left alone.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family decoder. `from_dict` reads it from a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int  # max_position_embeddings: positions the model was trained for
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tied_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2; Llama with attention_bias
    o_bias: bool = False  # Llama with attention_bias
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm over head_dim of every query and key head
    sliding_window: int | None = None  # not implemented: a longer sequence is refused

    @staticmethod
    def from_dict(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face configuration: Llama, Mistral, Qwen2 or Qwen3, in the spelling of transformers
        4 or 5.

        Raises BadInput, naming `where`, for other architectures, missing or impossible values.
        """
        kind = raw.get("model_type")
        if kind not in ("llama", "mistral", "qwen2", "qwen3"):
            raise BadInput(
                f"{where}: model_type {kind!r} is not supported; use llama, mistral, qwen2 or qwen3"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise BadInput(
                f"{where}: hidden_act {raw['hidden_act']!r} is not supported; SwiGLU models have 'silu'"
            )
        try:
            heads, hidden = integer(raw, "num_attention_heads"), integer(raw, "hidden_size")
            theta, scaling = read_rope(raw, where)
            bias = bool(raw.get("attention_bias", False))
            config = ModelConfig(
                vocab_size=integer(raw, "vocab_size"),
                hidden_size=hidden,
                intermediate_size=integer(raw, "intermediate_size"),
                num_layers=integer(raw, "num_hidden_layers"),
                num_heads=heads,
                num_kv_heads=integer(raw, "num_key_value_heads", heads),
                head_dim=integer(raw, "head_dim", hidden // heads),
                max_context=integer(raw, "max_position_embeddings", 2048),
                norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope_theta=theta,
                rope_scaling=scaling,
                tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
                qkv_bias=kind == "qwen2" or bias,
                o_bias=kind != "qwen2" and bias,
                mlp_bias=bool(raw.get("mlp_bias", False)),
                qk_norm=kind == "qwen3",
                sliding_window=read_sliding_window(raw, kind),
            )
        except KeyError as error:
            raise BadInput(f"{where}: the key {error} is missing") from None
        except BadInput:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise BadInput(f"{where}: {error}") from None
        config.check(where)
        return config

    def check(self, where: str) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_context")
        for name in (*sizes, "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise BadInput(f"{where}: {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise BadInput(
                f"{where}: {self.num_heads} attention heads are no multiple of {self.num_kv_heads} kv heads"
            )
        if not (0 < self.rope_theta < math.inf and 0 < self.rope_scaling.factor < math.inf):
            raise BadInput(
                f"{where}: the RoPE base is {self.rope_theta}, its factor {self.rope_scaling.factor}"
            )
        if self.head_dim % 2:
            raise BadInput(f"{where}: head_dim is {self.head_dim}; RoPE needs an even one")


def integer(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of the configuration; `default`, if there is one, stands for a missing or null value."""
    value = raw[name] if default is None else raw.get(name)
    value = default if value is None else value
    if type(value) is not int:
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    return value


def read_rope(raw: dict[str, Any], where: str) -> tuple[float, RopeScaling]:
    """RoPE base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`
    (before)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise BadInput(f"{where}: RoPE scaling {kind!r} is not supported; use default, linear or llama3")
    if kind == "default":
        return theta, RopeScaling()
    factor = float(rope["factor"])
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    return theta, RopeScaling("llama3", factor, low, high, int(rope["original_max_position_embeddings"]))


def read_sliding_window(raw: dict[str, Any], kind: str) -> int | None:
    """Mistral uses a window whenever one is given; Qwen only with `use_sliding_window`; Llama never."""
    used = kind == "mistral" or (kind in ("qwen2", "qwen3") and raw.get("use_sliding_window", False))
    return int(raw["sliding_window"]) if used and raw.get("sliding_window") else None


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of every rotated pair, float32 [head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        # How many turns a pair makes in the original context says how much of `factor` it gets: all below
        # low_freq_factor turns, none above high_freq_factor, a linear blend between.
        turns = scaling.original_context * frequencies / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return blend * frequencies + (1 - blend) * frequencies / scaling.factor
    return frequencies


# --------------------------------------------------------------------------------------------------
# The transformer. B rows of the batch, n tokens each; H query heads and G key-value heads of size D.
# --------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class Rotation(nn.Module):
    """An orthogonal matrix that is fast to multiply with (`kernels.rotate`): signs, then Hadamard matrices.

    What is large in one number is spread over all of them, which is easier on 4-bit numbers (QuaRot: arXiv
    2404.00456). Weights that read a rotated state are rotated likewise (`quantize.rotated`), and cancel it.
    """

    def __init__(self, matrix: Tensor, power: int, stride: int = 1, signs: Tensor | None = None):
        """matrix: float32 [K, K] of +1 and -1; signs: the same [size], or None for none."""
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("transposed", matrix.T.contiguous(), persistent=False)
        self.register_buffer("signs", signs, persistent=False)
        self.power, self.stride = power, stride

    @property
    def arguments(self) -> tuple[Tensor, int, int]:
        return self.matrix, self.power, self.stride

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.signs is None else x * self.signs.to(x.dtype)
        return kernels.rotate(x, *self.arguments)

    def inverse(self, x: Tensor) -> Tensor:
        x = kernels.rotate(x, self.transposed, self.power, self.stride)
        return x if self.signs is None else x * self.signs.to(x.dtype)


class Linear(nn.Linear):
    """x W^T + bias with weights of 16, 8 or 4 bits, and what stands next to it in a Llama (`kernels.linear`).

    `weight` is nn.Linear's; or int8 [out, in] with `scales`; or 4-bit uint8 [out, in / 2] with `scales` and
    perhaps `zeros`; or, after `pack`, any of these in the order that the CPU kernels want. Inputs are rotated
    first, if there is a `rotation`, and then put into another order, if there is a `permutation`.
    """

    wide = False  # results in float32, not in the dtype of x

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.register_parameter("scales", None)
        self.register_parameter("zeros", None)
        self.register_parameter("permutation", None)
        self.rotation: Rotation | None = None
        self.activation_bits = 16

    def forward(
        self, x: Tensor, norm: RMSNorm | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """residual + (norm(x), or silu(gate) * up of x = (gate, up)) W^T + bias. x: [B, n, .]"""
        scale, eps = (norm.weight, norm.eps) if norm is not None else (None, 0.0)
        weights = (self.weight, self.scales, self.zeros, self.bias)
        extras = (residual, scale, eps, gated, self.rotation and self.rotation.arguments, self.permutation)
        return kernels.linear(x, *weights, *extras, self.out_features, self.activation_bits, self.wide)

    def prepare(
        self, x: Tensor, norm: RMSNorm | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """What `forward`, given the same, multiplies the weights with before it is rounded: [B, n, in]."""
        scale, eps = (norm.weight, norm.eps) if norm is not None else (None, 0.0)
        rotation = self.rotation.arguments if self.rotation else (None, 1, 1)
        return kernels.prepare_reference(x, scale, eps, gated, *rotation, self.permutation)

    def set_weights(self, weight: Tensor, scales: Tensor | None = None, zeros: Tensor | None = None) -> None:
        tensors = {"weight": weight, "scales": scales, "zeros": zeros}
        for name, tensor in tensors.items():
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            setattr(self, name, parameter)

    def pack(self) -> None:
        """Bring the weights into the order that the kernels want, where these can take them."""
        if self.weight.dim() == 2 and kernels.can_pack(self.weight, self.scales):
            scales = [
                None if t is None else kernels.pack_scales(t.detach()) for t in (self.scales, self.zeros)
            ]
            self.set_weights(kernels.pack(self.weight.detach()), *scales)


class LanguageHead(Linear):
    """Logits are float32: rounded to bf16, the best tokens of a large vocabulary often tie."""

    wide = True


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split order of Hugging Face. x: [B, n, heads, D]; cos, sin: [B, n, 1, D / 2]."""
    a, b = x.float().chunk(2, dim=-1)  # [B, n, heads, D / 2] each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, inputs: int | None = None):
        """`inputs`: width of x, where it is not the hidden size."""
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)  # of queries, keys, values
        self.head_dim = config.head_dim
        rows = sum(self.heads) * config.head_dim
        self.qkv_proj = Linear(inputs or config.hidden_size, rows, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def project(
        self, x: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, n, inputs] -> rotated queries [B, n, H, D], rotated keys and values [B, n, G, D]."""
        heads = self.qkv_proj(x, norm).unflatten(-1, (-1, self.head_dim))  # [B, n, H + 2 G, D]
        q, k, v = heads.split(self.heads, dim=2)
        return apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin), v


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + down(silu(gate) * up), where gate and up are two projections of norm(x). x: [B, n, hidden]"""
        return self.down_proj(self.gate_up_proj(x, norm), gated=True, residual=x)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        """x: [B, n, hidden]. `attend(q, k, v)` returns [B, n, H, D]; where keys come from is its business."""
        attended = attend(*self.self_attn.project(x, self.input_layernorm, cos, sin))
        x = self.self_attn.o_proj(attended.flatten(2), residual=x)  # [B, n, H D] -> [B, n, hidden]
        return self.mlp(x, self.post_attention_layernorm)


class CheckpointModule(nn.Module):
    """A module whose weights have names in Hugging Face checkpoints, and RoPE."""

    top = ""  # what those names begin with

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [B, n] -> cos and sin, float32 [B, n, 1, D / 2]."""
        angles = positions[..., None, None].float() * self.frequencies
        return angles.cos(), angles.sin()

    def parts(self, path: str, rows: int) -> dict[str, int]:
        """Hugging Face module paths that the module at `path` stands for, with their numbers of output rows.

        q, k, v and gate, up are rows of one fused matrix each.
        """
        c, kv_rows = self.config, self.config.num_kv_heads * self.config.head_dim
        fused = {
            "qkv_proj": {"q_proj": c.num_heads * c.head_dim, "k_proj": kv_rows, "v_proj": kv_rows},
            "gate_up_proj": {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size},
        }
        parent, _, leaf = path.rpartition(".")
        prefix = "" if path == "lm_head" else self.top
        prefix += f"{parent}." if parent else ""
        return {prefix + part: count for part, count in fused.get(leaf, {leaf: rows}).items()}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Every weight under its name in a checkpoint, as a view: loading copies in, saving copies out.

        A tied lm_head has no name of its own. For weights in rows: not after `pack`.
        """
        names, named = {torch.int8: "quantized", torch.uint8: "packed"}, {}
        for name, tensor in self.named_parameters():
            path, kind = name.rsplit(".", 1)  # ("layers.0.mlp.gate_up_proj", "weight")
            if kind == "permutation":  # of the inputs, which all parts have in common
                named |= {f"{part}.permutation": tensor.detach() for part in self.parts(path, 0)}
                continue
            parts = self.parts(path, tensor.shape[0])
            for part, view in zip(parts, tensor.detach().split(tuple(parts.values()))):
                named[f"{part}.{names.get(tensor.dtype, kind)}"] = view
        return named

    def pack(self) -> CheckpointModule:
        """Bring all weights into the order that the kernels want; a loader does it last -> self."""
        kernels.load()
        for linear in self.modules():
            if isinstance(linear, Linear):
                linear.pack()
        return self


class Transformer(CheckpointModule):
    """A Llama-family decoder. Weights come from `generate.load_model`, or are random after construction."""

    top = "model."

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size)
        self.rotation: Rotation | None = None  # of what goes from layer to layer
        if config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def pack(self) -> Transformer:
        tied = self.lm_head.weight is self.embed_tokens.weight
        super().pack()
        if tied:
            self.embed_tokens.weight = self.lm_head.weight
        return self

    def forward(
        self, tokens: Tensor, positions: Tensor, attend, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Features [B, n, hidden], which `lm_head` turns into logits, and what is tapped on the way there.

        tokens, positions: int64 [B, n]. `attend(layer, q, k, v)` decides what a token sees: `KVCache.attend`
        (with its first arguments bound) continues a cached text, `causal_attention` needs no cache.
        `taps`: tap i is the input of layer i, or the feature itself where there is no such layer; all of them
        side by side, [B, n, len(taps) * hidden].
        """
        cos, sin = self.rope(positions)
        x = kernels.embedding(self.embed_tokens.weight, tokens)  # [B, n, hidden]
        x = x if self.rotation is None else self.rotation(x)
        tapped = {}
        for i, layer in enumerate(self.layers):
            tapped |= {i: self.unrotated(x)} if i in taps else {}  # others are not kept
            x = layer(x, cos, sin, partial(attend, i))
        tapped[len(self.layers)] = self.norm(self.unrotated(x))
        states = torch.cat([tapped[i] for i in taps], dim=-1) if taps else x[..., :0]
        return tapped[len(self.layers)], states

    def unrotated(self, x: Tensor) -> Tensor:
        """A state between layers as a model without rotation has it, which norm, lm_head and heads read."""
        return x if self.rotation is None else self.rotation.inverse(x)

    def recompute(self, tokens: Tensor, attend=None) -> Tensor:
        """The slow twin of cached decoding: whole texts int64 [B, n] -> features [B, n, hidden]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.forward(tokens, positions, attend or causal_attention)[0]


class EagleHead(CheckpointModule):
    """One decoder layer that guesses a model's features (EAGLE-1: arXiv 2401.15077; EAGLE-2: 2406.16858).

    Its row p is made of the feature of position p and the token of position p + 1, and stands at position p:
    it guesses the feature of position p + 1. Embedding and lm_head are the target's (`attach`); there is no
    norm before the layer, and none after it.
    """

    embed_tokens: nn.Embedding
    lm_head: LanguageHead
    draft_ids: Tensor | None  # int64 [drafted vocabulary]: tokens of the logits, if not 0, 1, 2, ...

    def __init__(self, config: ModelConfig, fc_bias: bool = False):
        """`config`: of the one layer, and the target's vocabulary."""
        super().__init__(config)
        self.fc = Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([HeadLayer(config, config.hidden_size)])
        self.register_buffer("draft_ids", None, persistent=False)

    def attach(self, target: Transformer) -> EagleHead:
        """Borrow what the head has in common with its target -> self. A loader does it last."""
        self.embed_tokens, self.lm_head = target.embed_tokens, target.lm_head
        return self

    def taps(self, layers: int) -> tuple[int, ...]:
        """Which states of a target with so many layers are its features: see `Transformer.forward`."""
        return (layers,)

    def fuse(self, features: Tensor) -> Tensor:
        """What the target yields -> features as the head itself yields them, [B, n, hidden]."""
        return features

    def enter(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, n], features [B, n, hidden] -> what attention reads, and what is added to it."""
        embedded = kernels.embedding(self.embed_tokens.weight, tokens)  # [B, n, hidden]
        x = self.fc(torch.cat((embedded, features), dim=-1))  # [B, n, 2 hidden] -> [B, n, hidden]
        return x, x

    def project(
        self, tokens: Tensor, features: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a row adds its guess to, [B, n, hidden], and its queries, keys and values: see `forward`."""
        x, residual = self.enter(tokens, features)
        return residual, *self.layer.self_attn.project(x, None, *self.rope(positions))

    def forward(
        self, tokens: Tensor, features: Tensor, positions: Tensor, attend, last: Tensor | None = None
    ) -> Tensor:
        """Features [B, n, hidden] of `positions` int64 [B, n], tokens after them -> the next features.

        With `last` int64 [B], only that row of each text goes on to attend, and the others are there for
        their keys and values -> [B, 1, hidden].
        """
        residual, q, k, v = self.project(tokens, features, positions)
        if last is not None:
            row = (torch.arange(len(last), device=last.device)[:, None], last[:, None])  # [B, 1] each
            q, residual = q[row], residual[row]  # [B, 1, H, D], [B, 1, hidden]
        attended = attend(q, k, v)
        # [B, n, H D] -> [B, n, hidden]
        x = self.layer.self_attn.o_proj(attended.flatten(2), residual=residual)
        return self.layer.mlp(x, self.layer.post_attention_layernorm)

    @property
    def layer(self) -> HeadLayer:
        return self.layers[0]

    def logits(self, features: Tensor) -> Tensor:
        """[B, n, hidden] -> float32 [B, n, drafted vocabulary]."""
        return self.lm_head(features)


class HeadLayer(nn.Module):
    """The layer of an EAGLE head; what it attends with is not what it adds to: see `EagleHead.enter`."""

    def __init__(self, config: ModelConfig, inputs: int):
        super().__init__()
        self.self_attn = Attention(config, inputs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)


class Eagle3Layer(HeadLayer):
    def __init__(self, config: ModelConfig):
        super().__init__(config, 2 * config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)


class Eagle3Head(EagleHead):
    """EAGLE-3 (arXiv 2503.01840): three states of the target as features, a vocabulary of its own.

    What goes round is the state before the norm of the lm_head, which is the head's own, like the RoPE base.
    """

    def __init__(self, config: ModelConfig, target_hidden_size: int, vocab_size: int, own_embedding: bool):
        """`vocab_size`: tokens that the head can draft; draft_ids [vocab_size] says which."""
        CheckpointModule.__init__(self, config)
        self.fc = Linear(3 * target_hidden_size, config.hidden_size)
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = LanguageHead(config.hidden_size, vocab_size)
        self.register_buffer("draft_ids", torch.arange(vocab_size), persistent=False)
        if own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    @property
    def layer(self) -> HeadLayer:
        return self.midlayer

    def attach(self, target: Transformer) -> EagleHead:
        if not hasattr(self, "embed_tokens"):
            self.embed_tokens = target.embed_tokens
        return self

    def taps(self, layers: int) -> tuple[int, ...]:
        return (2, layers // 2, layers - 3)

    def fuse(self, features: Tensor) -> Tensor:
        return self.fc(features)  # [B, n, 3 target hidden] -> [B, n, hidden]

    def enter(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        embedded = kernels.embedding(self.embed_tokens.weight, tokens)  # [B, n, hidden]
        normed = (self.midlayer.input_layernorm(embedded), self.midlayer.hidden_norm(features))
        return torch.cat(normed, dim=-1), features  # [B, n, 2 hidden], [B, n, hidden]

    def logits(self, features: Tensor) -> Tensor:
        return self.lm_head(features, self.norm)


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token sees itself and what came before. q: [B, n, H, D]; k, v: [B, n, G, D] -> [B, n, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class KVCache:
    """Keys and values of B texts, allocated once, zeroed: per layer [B, slots, G, D].

    How many slots of a row are valid is not stored here: it is the `length` that callers pass. Slots beyond
    it hold garbage that the next write covers, so rejecting a draft costs nothing.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]):
        self.keys, self.values = keys, values

    @staticmethod
    def allocate(config: ModelConfig, batch_size: int, slots: int, like: Tensor) -> KVCache:
        """`like`: any tensor of the dtype and device wanted."""
        shape = (batch_size, slots, config.num_kv_heads, config.head_dim)
        keys, values = ([like.new_zeros(shape) for _ in range(config.num_layers)] for _ in "kv")
        return KVCache(keys, values)

    def row(self, b: int) -> KVCache:
        """A view of one text: what is written there is written here."""
        return KVCache([k[b : b + 1] for k in self.keys], [v[b : b + 1] for v in self.values])

    def attend(
        self, slots: Tensor, ancestors: Tensor, length: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Store k, v [B, n, G, D] at `slots` [B, n], then attend with q [B, ., H, D] -> [B, ., H, D]."""
        self.write(slots, layer, k, v)
        return kernels.attention(q, self.keys[layer], self.values[layer], ancestors, length)

    def write(self, slots: Tensor, layer: int, k: Tensor, v: Tensor) -> None:
        rows = torch.arange(len(slots), device=slots.device)[:, None]  # [B, 1]
        self.keys[layer][rows, slots] = k
        self.values[layer][rows, slots] = v

    def keep(self, path: Tensor, length: Tensor) -> None:
        """Move an accepted path to where it belongs: slot length + path[d] -> length + d, for all d at once.

        path: int64 [B, D + 1], increasing where it is valid, some node beyond. The keys need no new rotation:
        a node of depth d already stands at position length + d.
        """
        kernels.move_slots([*self.keys, *self.values], path, length)


# --------------------------------------------------------------------------------------------------
# Sampling: greedy decoding of perturbed logits
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise BadInput(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise BadInput(f"top_k is {self.top_k}; it must be 0 (keep all) or the number of tokens to keep")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not -(2**62) < self.seed < 2**62:
            raise BadInput(f"seed is {self.seed}; it must be between -2**62 and 2**62")


def gumbel(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise as a function: the same (seed, position, token) has the same noise, whoever asks.

    seed: int64 [B]; positions: int64 [B, n] -> float32 [B, n, vocab_size]. Nothing is drawn from a generator,
    so target and drafter, one row or sixty-four, today or tomorrow, see one vector per position.
    """
    # Uniform in (0, 1), most precise near 0, where large noise comes from; -log(1 - uniform) is exponential.
    uniform = kernels.uniform(seed, positions, vocab_size)
    return -torch.log(-torch.log1p(-uniform))


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """-inf outside the `top_k` largest and the smallest set with `top_p` of their softmax. float32 [..., V]

    Of equal logits the one with the lower index counts as larger, so that exactly `top_k` stay.
    """
    if sampling.top_k == 0 and sampling.top_p == 1:
        return logits
    return kernels.filter_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p)


def perturb(logits: Tensor, positions: Tensor, seed: Tensor, sampling: Sampling) -> Tensor:
    """filter(logits) + temperature * noise, float32 [B, n, V]: its argmax is an exact sample."""
    logits = logits.float()
    if sampling.temperature == 0:
        return logits
    noise = gumbel(seed, positions, logits.shape[-1])
    return filter_logits(logits, sampling) + sampling.temperature * noise


def pick(logits: Tensor, positions: Tensor, seed: Tensor, sampling: Sampling) -> Tensor:
    """The token at each of `positions`. logits [B, n, V], positions int64 [B, n], seed int64 [B] -> int64 [B,
    n].

    The Gumbel-max trick with noise keyed by position: the pick depends on the logits and on nothing that a
    drafter did, and a drafter that asks with its own logits gets the same noise, so it agrees as often as its
    distribution allows (drafter-invariant speculative decoding: Daliri, Musco and Suresh, arXiv 2408.07978).
    """
    return perturb(logits, positions, seed, sampling).argmax(dim=-1)


# --------------------------------------------------------------------------------------------------
# Drafts: trees of tokens whose node 0 is the root
# --------------------------------------------------------------------------------------------------


@dataclass
class Draft:
    """What a drafter proposes, for B rows: n nodes each, node 0 the root, parents before children.

    A sequence is a tree with parent = node - 1. Nodes that only fill the shape have parent -1.
    """

    tokens: Tensor  # int64 [B, n]
    parent: Tensor  # int64 [B, n]; -1 for the root and for padding
    max_depth: int  # of any node: how far the longest path can reach
    branches: bool = True  # may a path skip nodes, so that it has to move when it is accepted?
    expected: Tensor | None = None  # float32 [B]: accepted length that the drafter expects, if it says
    drafter: str = ""  # its name, where there is a choice

    @staticmethod
    def chain(tokens: Tensor, count: Tensor | None = None) -> Draft:
        """Root and n - 1 tokens in a row; those beyond `count` int64 [B], if given, are padding."""
        n = tokens.shape[1]
        node = torch.arange(n, device=tokens.device)
        count = torch.full_like(tokens[:, 0], n - 1) if count is None else count
        parent = torch.where(node <= count[:, None], node - 1, -1)  # [B, n]
        return Draft(tokens, parent, n - 1, branches=False)


def tree_geometry(parent: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """parent int64 [B, n] -> ancestors bool [B, n, n] (j is i or above i) and depth int64 [B, n]."""
    node = torch.arange(parent.shape[1], device=parent.device)
    current = node.expand_as(parent)
    ancestors = (node[:, None] == node).expand(len(parent), -1, -1)  # [B, n, n]
    depth = torch.zeros_like(parent)
    for _ in range(max_depth):  # everybody climbs one step; who has arrived at the top stays there
        above = parent.gather(1, current)
        depth = depth + (above >= 0)
        current = torch.where(above >= 0, above, current)
        ancestors = ancestors | (current[..., None] == node)
    return ancestors, depth


def accept(
    tokens: Tensor, parent: Tensor, choice: Tensor, ancestors: Tensor, depth: Tensor, max_depth: int
) -> tuple[Tensor, Tensor]:
    """Follow from the root the child that carries the target's choice; stop where none does.

    tokens, parent, choice, depth: int64 [B, n] -> path int64 [B, max_depth + 1], accepted length int64 [B].
    Path starts at the root, holds `accepted` more nodes, and is filled up with the last of them.
    """
    follows = (parent >= 0) & (tokens == choice.gather(1, parent.clamp(min=0)))
    follows[:, 0] = True  # the root is committed already
    reached = ~(ancestors & ~follows[:, None, :]).any(dim=-1)  # [B, n]: the whole way from the root agrees
    accepted, last = torch.where(reached, depth, -1).max(dim=-1)  # [B] each
    on_path = ancestors.gather(1, last[:, None, None].expand(-1, 1, tokens.shape[1])).squeeze(1)  # [B, n]
    level = torch.arange(max_depth + 1, device=tokens.device)
    node = torch.arange(tokens.shape[1], device=tokens.device)
    # One node a level: [B, max_depth + 1, n]
    at_level = on_path[:, None, :] & (depth[:, None, :] == level[:, None])
    path = torch.where(at_level, node, -1).amax(dim=-1)
    return torch.where(level <= accepted[:, None], path, last[:, None]), accepted


# --------------------------------------------------------------------------------------------------
# Drafters
# --------------------------------------------------------------------------------------------------

# Tokens of a prompt per forward. It bounds memory; where chunks end depends on the row alone.
PREFILL_CHUNK = 512


def extend(
    model: Transformer, cache: KVCache, tokens: Tensor, length: Tensor, taps: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Continue texts of `length` int64 [B] by chains of tokens int64 [B, n] -> see `Transformer.forward`."""
    n = tokens.shape[1]
    slots = positions = length[:, None] + torch.arange(n, device=tokens.device)  # in a chain they coincide
    ancestors = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril().expand(len(tokens), -1, -1)
    return model(tokens, positions, partial(cache.attend, slots, ancestors, length), taps)


def prefill(
    model: Transformer,
    cache: KVCache,
    row: int,
    tokens: Tensor,
    start: int,
    features: Tensor | None = None,
    taps: tuple[int, ...] = (),
) -> Tensor:
    """Fill slots start .. P - 1 of one row with a prompt int64 [P] -> feature of its end, [1, 1, hidden].

    What is tapped on the way goes to the same places of `features` [slots, width].
    """
    view = cache.row(row)
    for begin in range(start, len(tokens), PREFILL_CHUNK):
        chunk = tokens[None, begin : begin + PREFILL_CHUNK]  # [1, n]
        last, tapped = extend(model, view, chunk, torch.tensor([begin], device=tokens.device), taps)
        if features is not None:
            features[begin : begin + chunk.shape[1]] = tapped[0]
    return last[:, -1:]


@dataclass
class State:
    """B texts being decoded at one level. tokens[length] is the root: committed, not yet in its cache."""

    tokens: Tensor  # int64 [B, slots]; valid up to and including the root
    features: Tensor  # [B, slots, width]; what the drafter wants of the model, of tokens below length
    length: Tensor  # int64 [B]; tokens whose K/V is in the cache of the level
    seed: Tensor  # int64 [B]; seed + prompt index, the key of the row's noise
    active: Tensor  # bool [B]; a row that is not active is frozen: it rides along and nothing of it changes

    @staticmethod
    def allocate(batch_size: int, slots: int, width: int, like: Tensor) -> State:
        """`width` of the features; `like`: any tensor of their dtype and device."""
        tokens = torch.zeros(batch_size, slots, dtype=torch.int64, device=like.device)
        seed = tokens.new_zeros(batch_size)
        length = torch.ones_like(seed)  # of a row that holds no text yet: drafters look one token back
        return State(tokens, like.new_zeros(batch_size, slots, width), length, seed, seed.bool())

    def before(self, end: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` tokens before position `end` int64 [B], and where they start: int64 [B, count],
        [B].

        To feed them once more, where a cache may lack some; feeding the others writes what is there. Where
        the text is shorter, they start at 0, and the last of them come after `end`.
        """
        start = (end - count).clamp(min=0)
        place = start[:, None] + torch.arange(count, device=end.device)  # [B, count]
        return self.tokens.gather(1, place), start


class Acceptance:
    """By depth, of late: how often a draft token so deep could be accepted, since all above were, and how
    often it was. To begin with, as if two of three had been."""

    PRIOR, DEPTHS, DECAY = (2.0, 3.0), 15, 0.98  # kept of tried

    def __init__(self):
        kept, tried = self.PRIOR
        self.kept, self.tried = [kept] * self.DEPTHS, [tried] * self.DEPTHS
        self.sums: list[float] = []  # accepted lengths to expect, by depth; empty if they have to be added up

    def count(self, accepted: int, drafted: int) -> None:
        """Of one draft, whose longest path had `drafted` tokens."""
        seen = min(accepted + 1, drafted, self.DEPTHS)
        for depth in range(seen):
            self.tried[depth] = self.DECAY * self.tried[depth] + 1
            self.kept[depth] = self.DECAY * self.kept[depth] + (depth < accepted)
        kept, tried = ((1 - self.DECAY) * count for count in self.PRIOR)
        for depth in range(drafted, self.DEPTHS):  # forgotten, or short drafts would stay short
            self.tried[depth] = self.DECAY * self.tried[depth] + tried
            self.kept[depth] = self.DECAY * self.kept[depth] + kept
        self.sums = []

    def expected(self, depth: int) -> float:
        """The accepted length to expect of a draft whose longest path has `depth` tokens."""
        if not self.sums:
            reached = accumulate((k / t for k, t in zip(self.kept, self.tried)), operator.mul)
            self.sums = [0.0, *accumulate(reached)]
        return self.sums[min(depth, self.DEPTHS)]


class Clock:
    """How slow the machine is now, against what the steps of a level are thought to cost."""

    def __init__(self):
        # Of the last steps: whose it was and how large, and the logarithm of seconds divided by cost.
        self.recent: deque[tuple[tuple[int, int], float]] = deque(maxlen=16)

    @property
    def usual(self) -> float:
        return sum(log for _, log in self.recent) / max(len(self.recent), 1)

    @property
    def slowness(self) -> float:
        return math.exp(self.usual)

    def surprise(self, kind: tuple[int, int], ratio: float) -> float:
        """By what factor a step took longer than others of late, each for its cost; 1 if there were too few.

        `kind` is its drafter and size: only steps of other kinds tell whether the machine is to blame.
        """
        log = math.log(ratio)
        if self.recent:  # a hiccup counts for little, also when others are compared with it
            log = min(max(log, self.usual - math.log(2)), self.usual + math.log(2))
        others = [other for its, other in self.recent if its != kind]
        self.recent.append((kind, log))
        return math.exp(log - sum(others) / len(others)) if len(others) > 3 else 1.0


@dataclass
class Pace:
    """What a drafter learns while it is used: what a step with n nodes costs, measured before it decodes and
    corrected since, and how fast it has been of late. Nothing of it changes a text."""

    TRUST = (8, 20)  # as how many steps a cost counts at first, and after some: see `correct`

    seconds: dict[int, float] = field(default_factory=dict)  # of a step with n nodes, drafting included
    clock: Clock = field(default_factory=Clock)  # one for all drafters of a level
    # Of recent steps, older ones counting less and less: their tokens, of one text, and what such steps cost.
    # Not how long they took: seconds of now and seconds of then, when a machine was slower, compare badly.
    tokens: float = 0.0
    elapsed: float = 0.0
    corrected: dict[int, int] = field(default_factory=dict)  # how often, up to a point

    @property
    def rate(self) -> float:
        """Tokens per second of a text; 0 if nothing is known."""
        return self.tokens / self.elapsed if self.elapsed else 0.0

    def count(self, tokens: float, nodes: int, seconds: float) -> None:
        """A step that verified so many nodes: its tokens, averaged over the texts, and how long it took."""
        cost = self.seconds.get(nodes, 0.0)
        self.tokens, self.elapsed = 0.98 * self.tokens + tokens, 0.98 * self.elapsed + cost
        if cost > 0:
            self.correct(nodes, seconds)

    def correct(self, nodes: int, seconds: float) -> None:
        """A step that takes longer than others around it, each for its cost, costs more than was thought: by
        a share of that, as a step says little on a busy machine, and what was measured counts as several."""
        surprise = self.clock.surprise((id(self), nodes), seconds / self.seconds[nodes])
        first, later = self.TRUST
        weight = min(first + self.corrected.get(nodes, 0), later)
        self.corrected[nodes] = weight + 1 - first
        self.seconds[nodes] *= surprise ** (1 / weight)

    def best(self, expected: dict[int, float]) -> int:
        """The number of nodes to verify, given the accepted tokens that are expected of each.

        More nodes are worth their time while they bring more tokens than that time brings on average: the
        largest expected - rate * seconds. With the rate that this leads to, it is the fastest choice.
        """
        return max(expected, key=lambda n: expected[n] - self.rate * self.seconds.get(n, 0.0))

    def start(self, seconds: dict[int, float], depths: dict[int, int]) -> None:
        """What steps cost; and something to go by until there are any: the fastest of what is to be expected
        of drafts so deep."""
        self.seconds, usual = dict(seconds), Acceptance()
        steps = [(1 + usual.expected(depth), seconds[n]) for n, depth in depths.items()]
        self.tokens, self.elapsed = max(steps, key=lambda step: step[0] / step[1])


@dataclass(frozen=True)
class Setup:
    """What every part of a decoder has to agree on."""

    sampling: Sampling
    batch_size: int
    slots: int  # of every cache: the longest text and `Drafter.slack`
    compile: bool
    device: torch.device
    cpp_wrapper: bool = True  # what calls the compiled kernels: C++ is faster, Python compiles faster

    def compiled(self, function: Callable) -> Callable:
        if not self.compile:
            return function
        import torch._dynamo.config  # slow to import, and only needed here

        # One function serves every number of nodes, model and batch size of a process: that is not the
        # runaway recompilation which the default limit of 8 guards against.
        torch._dynamo.config.recompile_limit = 256
        # Round where the code says so: which roundings fusion leaves out depends on the number of rows, and a
        # text must not.
        options = {"emulate_precision_casts": True}
        # On the CPU a step is some sixty short calls, and Python between them would be a fifth of its time.
        options["cpp_wrapper"] = self.cpp_wrapper and self.device.type == "cpu"
        # Look for the graph to run among its own only; before PyTorch 2.13, among those of all decoders.
        can_isolate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
        isolate = {"isolate_recompiles": True} if can_isolate else {}
        return torch.compile(function, fullgraph=True, dynamic=False, options=options, **isolate)

    @property
    def records(self) -> bool:
        """Do CUDA graphs launch what a step consists of?"""
        return self.compile and self.device.type == "cuda" and kernels.load_cuda()

    def recorded(self, function: Callable) -> Callable:
        return Recorded(function, self.pool) if self.records else function

    @cached_property
    def pool(self) -> tuple[int, int]:
        """The memory that all graphs share: none needs its own any more when the next one is launched."""
        return torch.cuda.graph_pool_handle()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python may collect an abandoned decoder at any allocation. Its CUDA graphs are destroyed then, which
    CUDA does not allow while another graph is being recorded: that one becomes invalid, without a word."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Recorded:
    """A function of tensors, and of whatever else stays where it is, as CUDA graphs: a step of a small model
    is hundreds of launches, which take the host longer than the GPU.

    Called with tensors of new shapes, or other new arguments, it runs as it is, which compiles what is in it.
    The next time it is recorded, and from then on replayed, on copies of the tensors that it is called with.
    Its results, a tuple of tensors, are copies, too. One that is called while another is being recorded
    becomes part of that.
    """

    def __init__(self, function: Callable, pool: tuple[int, int]):
        self.function, self.pool, self.compiled = function, pool, set()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]] = {}

    def __call__(self, *arguments) -> tuple[Tensor, ...]:
        if torch.cuda.is_current_stream_capturing():
            return self.function(*arguments)
        key = tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in arguments)
        if key not in self.compiled:
            results = self.function(*arguments)
            self.compiled.add(key)  # not before: it may have been interrupted
            return results
        if key not in self.graphs:
            self.graphs[key] = self.record(arguments)
        graph, inputs, outputs = self.graphs[key]
        for mine, given in zip(inputs, (a for a in arguments if isinstance(a, Tensor))):
            mine.copy_(given)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    def record(self, arguments: tuple) -> tuple[torch.cuda.CUDAGraph, list[Tensor], tuple[Tensor, ...]]:
        arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        graph = torch.cuda.CUDAGraph()
        with no_garbage_collection(), torch.cuda.graph(graph, pool=self.pool):
            outputs = self.function(*arguments)
        return graph, [a for a in arguments if isinstance(a, Tensor)], outputs


class Drafter:
    """Proposes what the target will verify. This one proposes nothing: autoregressive decoding."""

    max_nodes = 1  # of any draft, root included
    models: tuple[nn.Module, ...] = ()  # whose weights count as the drafter's
    needs_costs = False  # does `propose` ask what a step costs?
    needs_host = False  # does `propose` look at a tensor, or decide anything, on the host?

    @property
    def slack(self) -> int:
        """Slots from `length` on that a step may touch, in the target's cache or in one of the drafter's."""
        return self.max_nodes

    def taps(self, layers: int) -> tuple[int, ...]:
        """What `State.features` must hold of a target with so many layers: see `Transformer.forward`."""
        return ()

    def start(self, level: Level) -> None:
        """Allocate and compile; called once, by the level that it drafts for."""
        self.pace = Pace(clock=level.clock)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        """A new text int64 [P] begins in `row`; tokens before `start` are in the caches already."""

    def rewind(self, length: Tensor) -> None:
        """Go back to `length` int64 [B], where a row is beyond it: other tokens follow. For those that have
        lengths of their own."""

    def count_into(self, stats: Stats) -> None:
        """Count what happens inside, if anything does, in `stats.inside`."""

    def propose(self, state: State, n: int | None = None) -> Draft:
        """What to verify next. `n`: with so many nodes, instead of as many as the drafter would choose.

        Unless it `needs_host`, it may be recorded: what it does once is what it does always.
        """
        root = state.tokens.gather(1, state.length[:, None])  # [B, 1]
        return Draft(root, torch.full_like(root, -1), 0, branches=False)

    def learn(self, draft: Draft, verified: list[Verified], seconds: float) -> None:
        """What became of a draft, in every row that holds an unfinished text, and how long the step took."""
        tokens = sum(row.accepted + 1 for row in verified) / len(verified)
        self.pace.count(tokens, draft.tokens.shape[1], seconds)

    def set_costs(self, seconds: dict[int, float]) -> None:
        """What a step of every size takes."""
        self.pace.start(seconds, {n: self.max_depth(n) for n in seconds})

    def rate(self, state: State) -> float:
        """Tokens per second of a text that may be hoped for, going by those of late."""
        return self.pace.rate

    def contestants(self) -> dict[str, Drafter]:
        """The drafters that it chooses from, by name: of most there is one, itself."""
        return {"": self}

    def explain(self) -> str:
        """Why this one drafts, in a line for people, where there is a choice."""
        return ""

    def warm_up(self, state: State) -> None:
        """Run once whatever `propose` may run, so that it is compiled. Nothing of the state changes."""
        self.propose(state)

    def draft_sizes(self) -> list[int]:
        """Every number of nodes that `propose` may return: one compiled verification each."""
        return [self.max_nodes]

    def max_depth(self, n: int) -> int:
        """Of drafts of n nodes."""
        return n - 1


class LookupDrafter(Drafter):
    """Prompt lookup: what followed the last few tokens when they occurred before (arXiv 2304.04487).

    The more tokens agree with those before, the likelier is what followed them. So acceptance is counted for
    every number of tokens that agree, and where the length of drafts is not given, each is as long as pays
    for its number, or empty.

    What became of a draft can be looked up, whoever drafted. So a second decoding follows the first: as soon
    as a text is long enough to tell, it takes the step that this drafter would have taken, and learns from
    what it would have brought.
    """

    needs_host = True
    SIZES = (4, 8, 16)  # nodes, where the length of each draft is chosen
    SHARED = 0.7  # what a token is worth in a batch: found by trying
    FADES = (0.96, 0.998)  # what a token counts after the next one: in the rate of late, and of long

    def __init__(self, speculate_k: int | None = 4, ngram: int = 6):
        """`speculate_k` None: as many tokens as pay. `ngram`: that agree, at most."""
        self.sizes = self.SIZES if speculate_k is None else (speculate_k + 1,)
        self.max_nodes, self.ngram, self.needs_costs = self.sizes[-1], ngram, speculate_k is None

    def start(self, level: Level) -> None:
        super().start(level)
        self.indices = [TextIndex(self.ngram) for _ in range(level.setup.batch_size)]
        self.acceptance = [Acceptance() for _ in range(self.ngram + 1)]  # by the number of tokens that agree
        self.replayed = dict.fromkeys(self.FADES, (0.0, 0.0))  # tokens, and what they would have cost

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        self.indices[row].place = -1  # nobody decoded that

    def follow(self, state: State) -> list[TextIndex | None]:
        """Take in what texts have gained -> by row, None where no text is decoded."""
        lengths, actives = state.length.tolist(), state.active.tolist()
        tokens = state.tokens[:, : max(lengths) + 1].tolist()
        decoded = [index if active else None for index, active in zip(self.indices, actives)]
        for index, text, length in zip(decoded, tokens, lengths):
            if index:
                index.follow(text[: length + 1])
        if len(self.sizes) > 1:
            self.replay([index for index in decoded if index])
        return decoded

    def replay(self, indices: list[TextIndex]) -> None:
        """Take the steps that can be told by now."""
        while known := [pair for index in indices if (pair := (index, index.ahead(self.max_nodes - 1)))[1]]:
            n = self.choose([index.agree[index.place] for index, _ in known])
            for index, most in known:
                if agree := index.agree[index.place]:
                    self.acceptance[agree].count(most - 1, self.max_nodes - 1)
                index.place += min(most, n)
            tokens, cost = sum(min(most, n) for _, most in known) / len(known), self.pace.seconds.get(n, 0.0)
            for fade, (all_tokens, all_costs) in self.replayed.items():
                left = fade**tokens
                self.replayed[fade] = (left * all_tokens + tokens, left * all_costs + cost)

    def choose(self, agree: list[int]) -> int:
        """The number of nodes, given how many tokens of each text agree with some before."""
        found = [self.acceptance[count] for count in agree if count]
        # A token that one of several texts does not gain now it may gain in a step that others need anyway.
        weight = 1.0 if len(agree) == 1 else self.SHARED / max(len(agree), 1)
        worth = {n: weight * sum(each.expected(n - 1) for each in found) for n in self.sizes}
        return self.pace.best({1: 0.0} | worth)

    def propose(self, state: State, n: int | None = None) -> Draft:
        indices, device = self.follow(state), state.length.device
        n = n or self.choose([index.agree[-1] for index in indices if index])
        guesses = [index.guess(n - 1) if index and index.agree[-1] else [] for index in indices]
        roots = [index.text[-1] if index else 0 for index in indices]
        # What `Draft.chain` makes, but on the host, where all of it is known already.
        tokens = [[root, *said] + (n - 1 - len(said)) * [0] for root, said in zip(roots, guesses)]
        parent = [[*range(-1, len(said)), *(n - 1 - len(said)) * [-1]] for said in guesses]
        tokens, parent = (torch.tensor(rows, device=device) for rows in (tokens, parent))  # [B, n] each
        return Draft(tokens, parent, n - 1, branches=False)

    def rate(self, state: State) -> float:
        """What it would have been had it drafted: of late, since a text that has begun to repeat itself goes
        on with it; or of long, if that is more, since a text that has not may begin soon. What several texts
        would have shared cannot be told."""
        if len(self.indices) > 1:
            return self.pace.rate
        self.follow(state)
        rates = [tokens / cost for tokens, cost in self.replayed.values() if cost]
        return max(rates, default=self.pace.rate)

    def draft_sizes(self) -> list[int]:
        return [1, *self.sizes]


class TextIndex:
    """Where the last tokens of a text occurred before, for every place of it. On the host, where a new token
    costs a few microseconds."""

    def __init__(self, ngram: int):
        self.ngram = ngram
        self.clear()

    def clear(self) -> None:
        self.text: list[int] = []
        self.latest: dict[tuple[int, ...], int] = {}  # where these tokens ended last
        self.repeats: list[int] = []  # by place: where its longest suffix ended before, or -1
        self.agree: list[int] = []  # and the length of that suffix, at most `ngram`
        self.before: list[list[int]] = []  # and where each suffix ended before, the longest first
        self.place = -1  # of the decoding that follows the first one; negative: it begins at the end

    def follow(self, text: list[int]) -> None:
        """Take in what the text has gained; what is not in it any more is forgotten."""
        if self.text != text[: len(self.text)]:
            pairs = enumerate(zip(self.text, text))
            self.forget(next((i for i, (a, b) in pairs if a != b), min(len(self.text), len(text))))
        for place in range(len(self.text), len(text)):
            self.text.append(text[place])
            suffixes = self.suffixes()
            before = [self.latest.get(suffix, -1) for suffix in suffixes]
            self.latest.update(dict.fromkeys(suffixes, place))
            longest = next((i for i, end in enumerate(before) if end >= 0), len(before))
            self.agree.append(len(before) - longest)
            self.repeats.append(before[longest] if longest < len(before) else -1)
            self.before.append(before)
        self.place = self.place if 0 <= self.place < len(text) else len(text) - 1

    def suffixes(self) -> list[tuple[int, ...]]:
        """The last tokens, the longest suffix first."""
        last = tuple(self.text[-self.ngram :])
        return [last[i:] for i in range(len(last))]

    def forget(self, end: int) -> None:
        """All places from `end` on; those below, too, if it is quicker to take them in again."""
        self.place = self.place if self.place < end else -1
        if end < len(self.text) - end:
            self.clear()
        while len(self.text) > end:
            for suffix, place in zip(self.suffixes(), self.before.pop()):
                if place < 0:
                    del self.latest[suffix]
                else:
                    self.latest[suffix] = place
            for values in (self.text, self.repeats, self.agree):
                values.pop()

    def guess(self, count: int, place: int = -1) -> list[int]:
        """What may follow a place that repeats another. What is close to the end is read around in circles: a
        text that repeats goes on repeating."""
        place = place % len(self.text)
        begin = self.repeats[place] + 1
        said = self.text[begin : min(begin + count, place + 1)]
        return (said * (count // max(len(said), 1) + 1))[:count]

    def accepted(self, place: int, count: int) -> int:
        """Of `count` tokens proposed behind a place, those that did follow."""
        pairs = zip(self.guess(count, place), self.text[place + 1 : place + 1 + count])
        return next((i for i, (ours, said) in enumerate(pairs) if ours != said), count)

    def ahead(self, count: int) -> int:
        """Tokens that a step from `place` would have brought, with a draft of `count` if it repeats another
        place; 0 if the text is too short to tell."""
        known = len(self.text) - 1 - self.place
        accepted = self.accepted(self.place, min(count, known)) if self.agree[self.place] else 0
        return 1 + accepted if accepted < known else 0


CHAIN_SIZES = (2, 4, 8)  # nodes of what a small model writes, where the length is chosen step by step
UNROLLED_LAYERS = 32  # at most, in a compiled call that writes more than one token


class SequentialDrafter(Drafter):
    """A smaller model of the same vocabulary writes K tokens in a row (Leviathan et al., arXiv 2211.17192).

    It picks with the target's noise, so at any temperature it says what the target says wherever their
    distributions let it. The last draft of a run that is accepted whole was never fed to it; so every run
    starts with the last *two* tokens of the text (more, where `Level.behind` says so), which costs no extra
    forward and writes what is there already in every other case.

    The smaller model may be the target itself with lower activations, on the target's own cache (QSpec, arXiv
    2410.11305): drafts write their keys and values from `length` on, verification writes over them before it
    reads, and so there is nothing to prefill, to catch up with or to take back.
    """

    def __init__(
        self,
        model: Transformer,
        speculate_k: int | None = 4,
        draft_confidence: float = 0.0,
        shares_cache: bool = False,
    ):
        """`speculate_k` None: as many as pay, by the acceptance and the speed of late.

        `draft_confidence`: a draft ends before a token that the model finds less probable than this.

        `shares_cache`: the model is the target in another precision of activations, and on its cache.
        """
        if speculate_k is not None and speculate_k < 1:
            raise BadInput(f"speculate_k is {speculate_k}; it must be at least 1")
        self.model, self.shares_cache = model, shares_cache
        self.max_nodes = CHAIN_SIZES[-1] if speculate_k is None else speculate_k + 1
        self.models = () if shares_cache else (model,)
        self.draft_confidence, self.needs_costs = draft_confidence, speculate_k is None
        self.needs_host = draft_confidence > 0 or self.needs_costs
        # The tokens that each compiled call writes: the fewer calls the faster, but each layer of each token
        # takes two or three seconds to compile. With a confidence, `propose` looks at each before the next.
        most = 1 if self.needs_host else max(UNROLLED_LAYERS // model.config.num_layers, 1)
        count = -(-(self.max_nodes - 1) // most)
        self.calls = [(self.max_nodes - 1 + i) // count for i in reversed(range(count))]

    def start(self, level: Level) -> None:
        super().start(level)
        self.cache, setup = level.cache_for(self.model, self.shares_cache), level.setup
        self.sampling, self.window = setup.sampling, 1 if self.shares_cache else 2 + level.behind
        self.acceptance = Acceptance()
        self.write_some = setup.recorded(setup.compiled(self.write))

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        if not self.shares_cache:
            prefill(self.model, self.cache, row, tokens, max(start - self.window, 0))

    def warm_up(self, state: State) -> None:
        # Not by `propose`, which may end early. The first call feeds the window, the others one token.
        for n, count in {(self.window, self.calls[0]), *((1, count) for count in self.calls[1:])}:
            fed, start = state.before(state.length + 1, n)
            self.write_some(fed, start, state.length - start, state.seed, count)

    def write(
        self, fed: Tensor, start: Tensor, last: Tensor, seed: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Feed int64 [B, n] at `start`, of which `last` [B] is the root, and go on from there -> tokens int64
        [B, count], are they sure? bool."""
        tokens, sure, row = [], [], torch.arange(len(fed), device=fed.device)[:, None]  # [B, 1]
        for _ in range(count):
            features, _ = extend(self.model, self.cache, fed, start)
            logits = self.model.lm_head(features[row, last[:, None]])  # [B, 1, V]
            start, last = start + last + 1, torch.zeros_like(last)
            fed = pick(logits, start[:, None], seed, self.sampling)  # [B, 1]
            tokens.append(fed)
            sure.append(self.is_sure(logits, fed))
        return torch.cat(tokens, dim=1), torch.cat(sure, dim=1)

    def is_sure(self, logits: Tensor, token: Tensor) -> Tensor:
        """Is the token, int64 [B, 1], probable enough under logits [B, 1, V]? bool [B, 1]"""
        if self.draft_confidence == 0:
            return torch.ones_like(token, dtype=torch.bool)
        return logits[:, 0].float().softmax(-1).gather(1, token) >= self.draft_confidence

    def propose(self, state: State, n: int | None = None) -> Draft:
        fed, start = state.before(state.length + 1, self.window)
        root, last = state.tokens.gather(1, state.length[:, None]), state.length - start  # [B, 1], [B]
        drafted, sure, count = [root], state.active[:, None], torch.zeros_like(start)
        most = n or self.max_nodes
        if n is None and self.needs_costs:
            most = self.pace.best({n: self.acceptance.expected(n - 1) for n in CHAIN_SIZES})
        for more in self.calls if most == self.max_nodes else [1] * (most - 1):
            tokens, confident = self.write_some(fed, start, last, state.seed, more)  # [B, more] each
            sure = sure[:, -1:] & confident
            # A read of the host, the price of stopping early.
            if self.draft_confidence > 0 and not sure.any():
                break
            drafted.append(tokens)
            count = count + sure.sum(dim=1)  # [B]
            # A new tensor, whose strides are those of the warm-up.
            fed, start = tokens.narrow_copy(1, more - 1, 1), start + last + more
            last = torch.zeros_like(last)
        draft = torch.cat(drafted, dim=1)
        n = next(size for size in self.draft_sizes() if size >= draft.shape[1])
        return Draft.chain(F.pad(draft, (0, n - draft.shape[1])), count)  # [B, n]

    def learn(self, draft: Draft, verified: list[Verified], seconds: float) -> None:
        super().learn(draft, verified, seconds)
        for row in verified if self.needs_costs else ():
            self.acceptance.count(row.accepted, row.drafted)

    def draft_sizes(self) -> list[int]:
        if self.needs_costs:
            return [1, *CHAIN_SIZES] if self.draft_confidence > 0 else list(CHAIN_SIZES)
        if self.draft_confidence == 0:
            return [self.max_nodes]
        return [n for n in (1, 2, 3, 5, 9, 17, 33) if n < self.max_nodes] + [self.max_nodes]


TREE_DEPTH, TREE_TOPK = 6, 4  # unless somebody asks for others
MAX_TREE_DEPTH = 64  # each level is a forward of the head, or a step to an ancestor, unrolled in one graph


class TreeDrafter(Drafter):
    """An EAGLE head grows a tree where it is sure of itself (EAGLE-2, arXiv 2406.16858, section 4).

    The k best continuations of the root are the first beam. `tree_depth` - 1 times, every node of the beam
    gets its k best children, and the k best of these are the next beam. Of all nodes ever seen, the best are
    verified. A node is as good as the product of the probabilities on its path. What is new here: the noise
    of its position is added to the head's logits, so that the tree grows around what the target is going to
    pick; and they are multiplied with `trust`, because a head that learnt the target's distribution is
    too modest about what the target, which has made up its mind, will say.

    The head's cache holds true rows below `length`, made of the target's features; whatever it guesses while
    it grows a tree goes to scratch slots above and is forgotten. Every step feeds the last `window` true rows
    (again): some are new, and writing the others once more changes nothing.
    """

    SIZES = (4, 8, 16, 32, 60)  # what `tree_size` None chooses from, step by step

    def __init__(
        self,
        head: EagleHead,
        tree_size: int | None = None,
        tree_depth: int = TREE_DEPTH,
        tree_topk: int = TREE_TOPK,
    ):
        """`tree_size` counts the root, `tree_depth` does not. BadInput for trees that cannot be."""
        if not 1 <= tree_depth <= MAX_TREE_DEPTH:
            raise BadInput(f"tree_depth is {tree_depth}; it must be 1 to {MAX_TREE_DEPTH}")
        pool = tree_topk + (tree_depth - 1) * tree_topk**2
        if tree_size is not None and not 2 <= tree_size <= pool + 1:
            raise BadInput(
                f"tree_size is {tree_size}; depth {tree_depth} and top-k {tree_topk} allow 2 to {pool + 1}"
            )
        vocabulary = head.config.vocab_size if head.draft_ids is None else len(head.draft_ids)
        if tree_topk > vocabulary:
            raise BadInput(f"tree_topk is {tree_topk}; the head knows {vocabulary} tokens")
        self.head, self.models, self.depth, self.topk = head, (head,), tree_depth, tree_topk
        self.sizes = [n for n in self.SIZES if n <= pool + 1] if tree_size is None else [tree_size]
        self.sizes = self.sizes or [pool + 1]
        self.max_nodes, self.needs_costs = self.sizes[-1], tree_size is None
        self.needs_host = len(self.sizes) > 1
        self.trust_tensor = torch.ones((), device=head.layer.post_attention_layernorm.weight.device)
        self.trust = 1.0

    @property
    def trust(self) -> float:
        """What the logits are multiplied with, so that as much is accepted as is expected."""
        return self.trust_value

    @trust.setter
    def trust(self, value: float) -> None:
        self.trust_value = value
        self.trust_tensor.fill_(value)  # where `grow` looks, which may be a recorded graph

    def taps(self, layers: int) -> tuple[int, ...]:
        return self.head.taps(layers)

    def draft_sizes(self) -> list[int]:
        return self.sizes

    def max_depth(self, n: int) -> int:
        return min(self.depth, n - 1)

    def start(self, level: Level) -> None:
        super().start(level)
        like, setup = self.head.layer.post_attention_layernorm.weight, level.setup
        # True rows that may be new: those of the longest path, and what happened above.
        self.window = self.max_depth(self.max_nodes) + 1 + level.behind + level.renewed
        slots = setup.slots + self.topk * (self.depth - 1)
        self.cache = KVCache.allocate(self.head.config, setup.batch_size, slots, like)
        self.sampling = setup.sampling
        self.grow_tree = setup.recorded(partial(setup.compiled(self.grow), level.state))

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        """All rows but the last, whose token is still to be picked. Only their keys and values matter."""
        begin, end = max(start - self.window, 0), len(tokens) - 1
        for first in range(begin, end, PREFILL_CHUNK):
            place = torch.arange(first, min(first + PREFILL_CHUNK, end), device=tokens.device)  # [n]
            features = self.head.fuse(state.features[row : row + 1, place])  # [1, n, hidden]
            _, _, k, v = self.head.project(tokens[None, place + 1], features, place[None])
            self.cache.row(row).write(place[None], 0, k, v)

    def catch_up(self, state: State) -> Tensor:
        """Write the last true rows -> the feature guessed from the last one, [B, 1, hidden].

        There are `window` of them; where the text is shorter, what comes behind its end is masked garbage.
        """
        start = (state.length - self.window).clamp(min=0)
        offset = torch.arange(self.window, device=start.device)
        count = state.length - start  # [B]
        place = start[:, None] + offset  # [B, n]
        row = torch.arange(len(start), device=start.device)[:, None]  # [B, 1]
        features = self.head.fuse(state.features[row, place])  # [B, n, hidden]
        seen = (offset < count[:, None])[:, None]  # [B, 1, n]
        attend = partial(self.cache.attend, place, seen, start, 0)
        return self.head(state.tokens[row, place + 1], features, place, attend, count - 1)

    def children(
        self, features: Tensor, position: Tensor, seed: Tensor, trust: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The k best tokens at `position` int64 [B], given features [B, n, hidden] -> int64 [B, n, k], and
        their log-probabilities."""
        logits = self.head.logits(features)  # [B, n, V]
        if self.sampling.temperature > 0:
            noise = gumbel(seed, position[:, None], self.head.config.vocab_size)  # [B, 1, V]
            noise = noise if self.head.draft_ids is None else noise[..., self.head.draft_ids]
            logits = logits + self.sampling.temperature * noise
        logits = trust * logits
        best, index = kernels.top_k(logits, self.topk)
        # At most 0, though rounding may say otherwise: no child is better than its parent.
        scores = (best - logits.logsumexp(dim=-1, keepdim=True)).clamp(max=0)
        return index if self.head.draft_ids is None else self.head.draft_ids[index], scores

    def grow(self, state: State, trust: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Trees of `max_nodes`, best nodes first: tokens int64 [B, n], parents int64 [B, n]; the accepted
        length to expect of each size, float32 [B, sizes], and its mean over active rows.

        `trust` float32 []: see the class.
        """
        k, past = self.topk, state.length
        rank, row = torch.arange(k, device=past.device), torch.arange(len(past), device=past.device)[:, None]
        features = self.catch_up(state)  # [B, 1, hidden]
        below, steps = self.children(features, past + 1, state.seed, trust)  # [B, 1, k] each
        tokens, scores = below.squeeze(1), steps.squeeze(1)
        pool = Pool([tokens], [scores], [torch.zeros_like(tokens)])
        node, features = 1 + rank.expand_as(tokens), features.expand(-1, k, -1)  # [B, k], [B, k, hidden]
        itself = (rank[:, None] == rank).expand(len(past), -1, -1)  # [B, k, k]
        ancestors = itself
        for level in range(self.depth - 1):
            positions = (past + level)[:, None].expand_as(tokens)  # [B, k]
            attend = partial(self.cache.attend, past[:, None] + level * k + rank, ancestors, past, 0)
            features = self.head(tokens, features, positions, attend)  # [B, k, hidden]
            below, steps = self.children(features, past + level + 2, state.seed, trust)  # [B, k, k] each
            first = pool.size + 1
            pool.add(below, scores[..., None] + steps, node)
            if level == self.depth - 2:
                break
            scores, best = kernels.top_k(pool.scores[-1], k)  # [B, k]
            above, tokens, node = best // k, pool.tokens[-1].gather(1, best), first + best  # [B, k] each
            features = features[row, above]
            ancestors = torch.cat((ancestors[row, above], itself), dim=-1)  # [B, k, (level + 2) k]
        tokens, parents, scores = pool.best(state, self.max_nodes - 1)
        accepted = scores.exp().cumsum(dim=1)  # [B, n - 1]
        worth = torch.stack([accepted[:, n - 2] for n in self.sizes], dim=1)  # [B, sizes]
        mean = (worth * state.active[:, None]).sum(dim=0) / state.active.sum().clamp(min=1)
        return tokens, parents, worth, mean

    def propose(self, state: State, n: int | None = None) -> Draft:
        tokens, parent, worth, mean = self.grow_tree(self.trust_tensor)
        n = n or self.choose(mean)
        # New tensors, since the compiled verification wants the same strides whatever the batch.
        tokens, parent = (tensor.narrow_copy(1, 0, n) for tensor in (tokens, parent))
        return Draft(tokens, parent, self.max_depth(n), expected=worth[:, self.sizes.index(n)])

    def choose(self, mean: Tensor) -> int:
        """The number of nodes to verify; `mean`, float32 [sizes]: see `grow`."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        # A read of the host, the price of choosing.
        return self.pace.best(dict(zip(self.sizes, mean.tolist())))

    def learn(self, draft: Draft, verified: list[Verified], seconds: float) -> None:
        super().learn(draft, verified, seconds)
        # The average over texts, or many of them at once would make it swing.
        surplus = sum(row.accepted - row.expected for row in verified) / len(verified)
        self.trust = min(max(self.trust * math.exp(0.02 * surplus), 0.25), 4.0)


@dataclass
class Pool:
    """All nodes that a growing tree has seen, level by level; node 0 is the root, the others count from 1."""

    tokens: list[Tensor]  # int64 [B, .]
    scores: list[Tensor]  # float32 [B, .]: log-probabilities of whole paths, never above the parent's
    parents: list[Tensor]  # int64 [B, .]

    @property
    def size(self) -> int:
        return sum(tokens.shape[1] for tokens in self.tokens)

    def add(self, tokens: Tensor, scores: Tensor, parents: Tensor) -> None:
        """tokens, scores: [B, k, k], the children of `parents` int64 [B, k]."""
        self.tokens.append(tokens.flatten(1))
        self.scores.append(scores.flatten(1))
        self.parents.append(parents[..., None].expand_as(tokens).flatten(1))

    def best(self, state: State, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Root and best nodes, tokens and parents int64 [B, count + 1], and the scores of all but the root.

        Of equals the first wins, so that a parent always precedes its children, and the first n nodes are the
        best tree of n nodes.
        """
        tokens, parents = torch.cat(self.tokens, dim=1), torch.cat(self.parents, dim=1)  # [B, pool]
        scores, order = kernels.top_k(torch.cat(self.scores, dim=1), count)  # [B, count]
        root = state.tokens.gather(1, state.length[:, None])  # [B, 1]
        node = torch.arange(1, count + 1, device=root.device).expand_as(order)
        # Where in the tree a node of the pool is: [B, pool + 1]
        place = torch.zeros_like(F.pad(parents, (1, 0))).scatter(1, order + 1, node)
        parent = torch.cat((torch.full_like(root, -1), place.gather(1, parents.gather(1, order))), dim=1)
        return torch.cat((root, tokens.gather(1, order)), dim=1), parent, scores


# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------


@dataclass
class Stats:
    """Counters of one run; a cut at a stop token or at the budget is counted as cut."""

    outputs: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0  # target and drafter
    time_to_first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafting_seconds: float = 0.0  # part of decode_seconds; 0 where a whole step is one CUDA graph
    verification_seconds: float = 0.0  # also; on a GPU it includes waiting for what drafting began
    compile_seconds: float = 0.0
    target_forwards: int = 0  # without prefill; a batched forward counts once per active row
    row_forwards: int = 0  # the same, but rows that held no text, or a finished one, count too
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    expected_accepted_tokens: float = 0.0  # of drafters that say how probable their nodes are
    accepted_histogram: list[int] = field(default_factory=list)  # steps by accepted length
    nodes_histogram: dict[int, int] = field(default_factory=dict)  # steps by nodes verified, root included
    drafter_histogram: dict[str, int] = field(default_factory=dict)  # steps by who drafted, if that changes
    inside: Stats | None = None  # of the level that drafts; all its seconds are part of our drafting_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Without the first token of each output, which prefill yields."""
        return (self.new_tokens - self.outputs) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def aggregate_tokens_per_second(self) -> float:
        """Of all rows together, prefill and first tokens included."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0

    @property
    def occupancy(self) -> float:
        """The share of rows that held an unfinished text, averaged over the steps."""
        return self.target_forwards / self.row_forwards if self.row_forwards else 0.0

    @property
    def tokens_per_step(self) -> float:
        return (self.new_tokens - self.outputs) / self.target_forwards if self.target_forwards else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Entry i: the share of steps that accepted more than i draft tokens."""
        steps = self.accepted_histogram
        return [sum(steps[i + 1 :]) / self.target_forwards for i in range(len(steps) - 1)]

    def count_prefill(self, seconds: float, since_start: float) -> None:
        self.outputs += 1
        self.new_tokens += 1
        self.prefill_seconds += seconds
        self.time_to_first_token_seconds = self.time_to_first_token_seconds or since_start

    def count_row(self, draft: Draft, result: Verified, accepted: int, tokens: int) -> None:
        """One text of a verified draft; a cut left `tokens` of it, `accepted` of them drafted."""
        self.target_forwards += 1
        self.new_tokens += tokens
        self.drafted_tokens += result.drafted
        self.accepted_tokens += accepted
        self.expected_accepted_tokens += result.expected * accepted / max(result.accepted, 1)
        self.accepted_histogram += [0] * (draft.max_depth + 1 - len(self.accepted_histogram))
        self.accepted_histogram[accepted] += 1
        n = draft.tokens.shape[1]
        self.nodes_histogram[n] = self.nodes_histogram.get(n, 0) + 1
        if draft.drafter:
            self.drafter_histogram[draft.drafter] = self.drafter_histogram.get(draft.drafter, 0) + 1


@dataclass
class Emission:
    """New tokens of one prompt; the first `accepted` were drafted, the others are the target's own."""

    prompt_index: int  # in the list of prompts
    tokens: list[int]
    accepted: int = 0
    finish_reason: str | None = None  # "stop" or "length" with the last emission of a prompt
    draft: Draft | None = None  # what was verified for it; the first token comes from prefill and has none
    row: int = 0  # of the batch


@dataclass
class Row:
    """The host's view of a text in a row of the batch."""

    prompt_index: int
    budget: int  # new tokens it may still emit
    text_length: int  # tokens so far, prompt and root included


class Verified(NamedTuple):
    """What the model that verifies made of one row of a draft."""

    accepted: int  # draft tokens kept
    drafted: int  # draft tokens verified, root and padding not counted
    tokens: list[int]  # accepted + 1 new tokens
    expected: float  # accepted length that the drafter expected; 0 if it does not say


@dataclass
class Turn:
    """A step that was begun: a draft, and what the host will read of it when the device is done."""

    draft: Draft
    report: Tensor  # see `Level.verify`
    expected: Tensor | None  # see `Draft`
    done: torch.cuda.Event | None = None

    @staticmethod
    def begun(draft: Draft, report: Tensor) -> Turn:
        if report.device.type == "cpu":
            return Turn(draft, report, draft.expected)
        copies = (t if t is None else to_host(t) for t in (report, draft.expected))
        turn = Turn(draft, *copies, torch.cuda.Event())
        turn.done.record()
        return turn

    def read(self) -> list[Verified]:
        """What became of every row."""
        if self.done is not None:
            self.done.synchronize()
        expected = [0.0] * len(self.report) if self.expected is None else self.expected.tolist()
        rows = zip(self.report.tolist(), expected)
        return [Verified(*row[:2], row[2 : 3 + row[0]], expects) for row, expects in rows]


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the memory of the host, which is there once the device has come to it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Level:
    """A model and the drafter that proposes to it: one turn of the loop at a time, for B texts.

    The target and its drafter are the first level, the `Decoder`. A drafter that is a decoder itself has a
    level inside, and so on: see `HierarchicalDrafter`.
    """

    def __init__(
        self,
        model: Transformer,
        drafter: Drafter,
        setup: Setup,
        above: Level | None = None,
        shares_cache: bool = False,
        renewed: int = 0,
    ):
        """`above`: the level that this one drafts for, with which it shares the text, and perhaps the cache.

        `renewed`: how many positions just before the new ones may have got other features, because a level
        above verified them, so that the drafter must read them again.
        """
        self.model, self.drafter, self.setup, self.stats = model, drafter, setup, Stats()
        self.clock = Clock()
        self.taps = drafter.taps(model.config.num_layers)
        self.verify_steps: dict[tuple[int, int], Callable] = {}  # by number of nodes and depth
        # Tokens that a text may have gained since the drafter was last asked, beside its draft and the one
        # that this level said itself: every level above adds one more.
        self.behind = 0 if above is None else above.behind + 1
        self.renewed = renewed
        width = 0 if shares_cache else len(self.taps) * model.config.hidden_size
        self.cache = (above or self).cache_for(model, shares_cache)
        self.state = State.allocate(setup.batch_size, setup.slots, width, model.norm.weight)
        if above is not None:
            self.state.tokens, self.state.seed = above.state.tokens, above.state.seed
        if shares_cache:
            self.state.features = above.state.features
        self.turn = setup.recorded(self.turn_on_device)
        drafter.start(self)

    def cache_for(self, model: Transformer, shared: bool) -> KVCache:
        """For a model of this level or one that drafts for it: this level's own cache, if `shared`, or a new
        one."""
        if not shared:
            setup = self.setup
            return KVCache.allocate(model.config, setup.batch_size, setup.slots, model.norm.weight)
        if model.config != self.model.config:
            raise BadInput("a model that shares a cache must have the shape of the one whose cache it is")
        return self.cache

    @torch.no_grad()
    def warm_up(self, costs: dict[str, float] | None = None) -> float:
        """Compile every size that decoding will meet -> seconds. For a level that holds no text yet.

        `costs`: what steps cost, if it was measured before; what is missing and needed is added.
        """
        started = time.perf_counter()
        extend(self.model, self.cache, self.state.tokens[:, :2], self.state.length - 1)
        if self.is_one_graph:
            self.begin().read()
            self.begin().read()  # which records it
        else:
            for _ in range(2 if self.setup.records else 1):
                self.warm_up_parts()
        if self.drafter.needs_costs:
            self.measure_costs({} if costs is None else costs)
        return time.perf_counter() - started

    @property
    def is_one_graph(self) -> bool:
        """Is a whole step a CUDA graph?"""
        return self.setup.records and not self.drafter.needs_host

    def warm_up_parts(self) -> None:
        self.drafter.warm_up(self.state)
        if self.setup.compile or self.drafter.needs_costs:
            for n in self.drafter.draft_sizes():
                self.commit(self.blank_draft(n))

    def blank_draft(self, n: int) -> Draft:
        """Something of the shape of the drafter's drafts: n - 1 children of the root."""
        tokens = self.state.tokens.new_zeros(self.setup.batch_size, n)
        parent = torch.zeros_like(tokens)
        parent[:, 0] = -1
        return Draft(tokens, parent, self.drafter.max_depth(n))

    def measure_costs(self, costs: dict[str, float]) -> None:
        """Seconds of a step of every contestant and size, into their `Pace` and into `costs`, which may have
        them already; as if the caches were half full. For a level that holds no text yet.

        They take turns, so that all see the same machine.
        """
        drafters, times = self.drafter.contestants(), {}
        places = {f"{name} {n}".strip(): (d, n) for name, d in drafters.items() for n in d.draft_sizes()}
        missing, begin = [key for key in places if key not in costs], time.perf_counter()
        self.state.active.fill_(True)  # a drafter may have nothing to do for rows that are not
        for turn in range(6):
            if turn > 0 and time.perf_counter() - begin > 0.4 * len(missing):
                break
            for key in missing:
                times[key] = times.get(key, []) + self.time_steps(*places[key])
        self.state.active.fill_(False)
        self.state.length.fill_(1)
        # Not the median: what disturbs only ever adds.
        costs |= {key: sorted(values)[len(values) // 4] for key, values in times.items()}
        for name, drafter in drafters.items():
            drafter.set_costs({n: costs[f"{name} {n}".strip()] for n in drafter.draft_sizes()})

    def time_steps(self, drafter: Drafter, n: int) -> list[float]:
        """Seconds of some steps of n nodes; a few before them bring what they need into the caches."""
        times = []
        while len(times) < 2 or (len(times) < 10 and sum(times) < 0.2):
            self.state.length.fill_(self.setup.slots // 2)
            begin = time.perf_counter()
            draft = drafter.propose(self.state, n)
            draft.max_depth = self.drafter.max_depth(draft.tokens.shape[1])  # as it will be in use
            self.commit(draft)
            times.append(time.perf_counter() - begin)
        return times[len(times) // 2 :]

    def count_into(self, stats: Stats) -> None:
        """Count what happens from here on in `stats`."""
        self.stats = stats
        self.drafter.count_into(stats)

    def verify(self, draft: Draft, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """One forward of the model over a draft; its choices are written behind the root of every text.

        Returns the new length [B], the path [B, max_depth + 1] and the report that the host reads [B, 2 +
        max_depth + 1]: accepted length, drafted tokens, tokens.
        """
        length, max_depth = state.length, draft.max_depth
        nodes = torch.arange(draft.tokens.shape[1], device=length.device)
        ancestors, depth = tree_geometry(draft.parent, max_depth)
        slots, positions = length[:, None] + nodes, length[:, None] + depth  # [B, n] each
        attend = partial(self.cache.attend, slots, ancestors, length)
        features, tapped = self.model(draft.tokens, positions, attend, self.taps)
        choice = self.choose(self.model.lm_head(features), positions + 1, draft, state)  # [B, n]
        path, accepted = accept(draft.tokens, draft.parent, choice, ancestors, depth, max_depth)
        emitted = choice.gather(1, path)  # [B, max_depth + 1]: accepted drafts, the bonus, repetitions of it
        level = nodes[: max_depth + 1]
        state.tokens.scatter_(1, length[:, None] + 1 + level, emitted)
        if self.taps:
            row = torch.arange(len(path), device=path.device)[:, None]  # [B, 1]
            state.features[row, length[:, None] + level] = tapped[row, path]
        drafted = (draft.parent >= 0).sum(dim=1)
        report = torch.cat((torch.stack((accepted, drafted), dim=1), emitted), dim=1)
        return torch.where(state.active, length + accepted + 1, length), path, report

    def choose(self, logits: Tensor, positions: Tensor, draft: Draft, state: State) -> Tensor:
        """The model's own token after every node, int64 [B, n]. `draft`: for experiments, which may cheat."""
        return pick(logits, positions, state.seed, self.setup.sampling)

    def keep(self, draft: Draft) -> Tensor:
        """Verify a draft and keep what was accepted -> the report of `verify`. The host waits for nothing."""
        key = draft.tokens.shape[1], draft.max_depth
        if key not in self.verify_steps:
            verify = self.setup.compiled(self.verify)
            step = self.setup.recorded(lambda *tree: verify(Draft(*tree, key[1]), self.state))
            self.verify_steps[key] = step
        length, path, report = self.verify_steps[key](draft.tokens, draft.parent)
        if draft.branches:  # the path of a chain is in place
            self.cache.keep(path, self.state.length)
        self.state.length.copy_(length)  # last: an interrupted step has not happened
        return report

    @torch.no_grad()
    def commit(self, draft: Draft) -> list[Verified]:
        """Verify a draft and keep what was accepted -> what became of every row."""
        return Turn.begun(draft, self.keep(draft)).read()

    def turn_on_device(self) -> tuple[Tensor, ...]:
        """One turn of the loop, for drafters that do not need the host -> the draft's tokens and parents, the
        report of `verify`, and what the drafter expected, if it says."""
        draft = self.drafter.propose(self.state)
        report = self.keep(draft)
        expected = () if draft.expected is None else (draft.expected,)
        return draft.tokens, draft.parent, report, *expected

    @torch.no_grad()
    def begin(self) -> Turn:
        """One turn of the loop: propose, verify, accept. A GPU may still be at it when this returns."""
        begin = time.perf_counter()
        if self.is_one_graph:
            tokens, parent, report, *expected = self.turn()
            draft = Draft(tokens, parent, self.drafter.max_depth(tokens.shape[1]))
            draft.expected = expected[0] if expected else None
            drafted = begin  # nobody can tell
        else:
            draft, drafted = self.drafter.propose(self.state), time.perf_counter()
            report = self.keep(draft)
        turn = Turn.begun(draft, report)
        self.stats.drafting_seconds += drafted - begin
        self.stats.verification_seconds += time.perf_counter() - drafted
        return turn

    def read(self, turn: Turn) -> list[Verified]:
        """Wait for a turn -> what became of every row."""
        begin = time.perf_counter()
        rows = turn.read()
        self.stats.verification_seconds += time.perf_counter() - begin
        return rows

    def step(self) -> tuple[Draft, list[Verified]]:
        """A whole turn, of which the host waits for the end."""
        turn = self.begin()
        return turn.draft, self.read(turn)

    def count_step(self, draft: Draft, rows: list[tuple[Verified, int, int]], seconds: float) -> None:
        """What a step came to, for those who read statistics and for the drafter.

        rows: of each text what was verified, and how many accepted and new tokens of it are used.
        """
        self.stats.row_forwards += self.setup.batch_size
        for result, accepted, tokens in rows:
            self.stats.count_row(draft, result, accepted, tokens)
        self.stats.decode_seconds += seconds
        if rows:
            self.drafter.learn(draft, [result for result, _, _ in rows], seconds)


MIN_DRAFT_LENGTH = 6  # unless somebody asks for another


class HierarchicalDrafter(Drafter):
    """A decoder that drafts: a smaller model verifies what a drafter of its own proposes, step after step,
    and what it has said after `min_draft_length` tokens or more goes up as one sequence (SpecMQuant, arXiv
    2505.22179).

    So the big quantized target, for which 60 tokens are no longer as cheap as one, verifies a short chain,
    and the tree is left to a model for which it is cheap. What proposes to the middle model is not known
    here: an EAGLE head, a lookup, or another decoder.

    The text is shared, and has a length for each level: C, what is in the target's cache, and Lm, what is in
    the middle model's. Drafting moves Lm ahead of C, and writes tokens from Lm + 1 on. The target verifies,
    which makes C the larger C', and Lm goes back to it. But if all was accepted, C' = Lm + 1: what is lacking
    is fed first, so that Lm >= C whenever anything is drafted, and no committed token is ever overwritten.
    """

    needs_host = True

    def __init__(
        self,
        model: Transformer,
        drafter: Drafter,
        min_draft_length: int = MIN_DRAFT_LENGTH,
        shares_cache: bool = False,
    ):
        """`shares_cache`: the model is the target itself in another precision of activations, and its cache
        is the target's. Nothing below `length` is ever written then, and what is written above, keys, values
        and features, is replaced by the target's when it verifies.
        """
        if not 1 <= min_draft_length <= MAX_TREE_DEPTH:
            raise BadInput(f"min_draft_length is {min_draft_length}; it must be 1 to {MAX_TREE_DEPTH}")
        self.model, self.drafter, self.shares_cache = model, drafter, shares_cache
        self.models = drafter.models if shares_cache else (model, *drafter.models)
        self.min_draft_length = min_draft_length
        # One token short of enough, a step may still add a whole path and the model's own token.
        depth = max(drafter.max_depth(n) for n in drafter.draft_sizes())
        self.max_nodes = 1 + min_draft_length + depth
        self.sizes = sorted({self.max_nodes, self.max_nodes - depth // 2})  # most steps add less

    @property
    def slack(self) -> int:
        # A row that has drafted all it can rides along while others still draft, and so does its next draft.
        return self.max_nodes - 1 + self.drafter.slack

    def taps(self, layers: int) -> tuple[int, ...]:
        return self.drafter.taps(layers) if self.shares_cache else ()

    def start(self, level: Level) -> None:
        super().start(level)
        # Where the cache is shared, so are the features, and the target renews those of all that is drafted.
        renewed = level.renewed + self.min_draft_length - 1 if self.shares_cache else 0
        self.level = self.make_level(level, renewed)
        feed = level.setup.compiled(self.feed)
        self.feed_some = level.setup.recorded(lambda tokens, start: feed(tokens, start, self.level.state))

    def make_level(self, above: Level, renewed: int) -> Level:
        return Level(self.model, self.drafter, above.setup, above, self.shares_cache, renewed)

    def warm_up(self, state: State) -> None:
        self.level.warm_up()
        if not self.shares_cache:
            self.follow(state)

    def count_into(self, stats: Stats) -> None:
        stats.inside = stats.inside or Stats()
        self.level.count_into(stats.inside)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        inside = self.level.state
        start = max(min(start, int(inside.length[row]) - 1), 0)  # it may lack more than the target does
        inside.length[row] = start + 1  # all that may be counted on, should this be interrupted
        if not self.shares_cache:
            features, taps = inside.features[row], self.level.taps
            prefill(self.model, self.level.cache, row, tokens, start, features, taps)
        self.drafter.prefill(inside, row, tokens, start)
        inside.length[row] = len(tokens)

    def rewind(self, length: Tensor) -> None:
        # All levels at once: this one may move on before the next is asked for a draft.
        inside = self.level.state
        inside.length.copy_(torch.minimum(inside.length, length))
        self.drafter.rewind(inside.length)

    def feed(self, tokens: Tensor, start: Tensor, inside: State) -> tuple:
        """Tokens int64 [B, n] at `start` int64 [B]: the middle model's keys, values and features of them."""
        _, tapped = extend(self.model, self.level.cache, tokens, start, self.level.taps)
        if self.level.taps:
            place = start[:, None] + torch.arange(tokens.shape[1], device=start.device)  # [B, n]
            inside.features[torch.arange(len(start), device=start.device)[:, None], place] = tapped
        return ()

    def follow(self, state: State) -> None:
        """Feed the middle model what it may lack of a text of which the target accepted all that it said."""
        begin = time.perf_counter()
        self.feed_some(*state.before(state.length, self.level.behind))
        self.level.state.length.copy_(state.length)
        self.level.stats.verification_seconds += time.perf_counter() - begin

    def propose(self, state: State, n: int | None = None) -> Draft:
        inside = self.level.state
        self.rewind(state.length)
        if self.shares_cache:
            inside.length.copy_(state.length)  # the target has written what was lacking
        elif (inside.length < state.length).any():
            self.follow(state)
        active, drafted = state.active.tolist(), [0] * len(state.active)
        while any(going := [a and count < self.min_draft_length for a, count in zip(active, drafted)]):
            inside.active.copy_(torch.tensor(going))
            begin = time.perf_counter()
            draft, verified = self.level.step()
            rows = [(result, result.accepted, len(result.tokens)) for result in compress(verified, going)]
            self.level.count_step(draft, rows, time.perf_counter() - begin)
            drafted = [count + goes * len(v.tokens) for count, goes, v in zip(drafted, going, verified)]
        n = next(size for size in self.sizes if size > max(drafted))
        place = state.length[:, None] + torch.arange(n, device=state.length.device)  # [B, n]
        return Draft.chain(state.tokens.gather(1, place), inside.length - state.length)

    def draft_sizes(self) -> list[int]:
        return self.sizes


ALL = 2**62  # tokens


class AutoDrafter(Drafter):
    """Whichever drafter is fastest, as costs and acceptance have been of late.

    The one in charge drafts for TURN tokens; then the one that promises the most tokens per second is. What
    is known of the others grows old, so now and then each has a trial of some steps, as often as the time
    that its trials waste allows: CURIOSITY of the whole, so that nobody who is slow can cost more. The first
    ones come at once, the most promising first, going by the costs measured at the start and an acceptance of
    two in three; but not of those who could not win with all of their drafts accepted. Autoregressive
    decoding is one of the drafters: it is in charge where speculation loses.

    Who is not in charge does nothing. What it misses stays in the state of the texts, tokens and features,
    and is fed to it in one chunk, as a prompt is, when its turn comes; it goes on as if never interrupted.
    """

    needs_host = True
    TURN, TRIAL, CURIOSITY = 16, 6, 0.003  # tokens of a text; steps; share of the time
    STAY = 2  # turns in which the feeding before must have paid for itself

    def __init__(self, drafters: dict[str, Drafter]):
        """BadInput where two of them want different features of the target: there is one place for them."""
        self.drafters = {"autoregressive": Drafter()} | drafters
        self.max_nodes = max(drafter.max_nodes for drafter in self.drafters.values())
        models = {id(model): model for drafter in drafters.values() for model in drafter.models}
        self.models, self.needs_costs = tuple(models.values()), True

    @property
    def slack(self) -> int:
        return max(drafter.slack for drafter in self.drafters.values())

    def taps(self, layers: int) -> tuple[int, ...]:
        wanted = {taps for drafter in self.drafters.values() if (taps := drafter.taps(layers))}
        if len(wanted) > 1:
            raise BadInput(f"method auto: drafters of one target must read the same features, not {wanted}")
        return wanted.pop() if wanted else ()

    def contestants(self) -> dict[str, Drafter]:
        return self.drafters

    def draft_sizes(self) -> list[int]:
        return sorted({n for drafter in self.drafters.values() for n in drafter.draft_sizes()})

    def max_depth(self, n: int) -> int:
        # One compiled verification serves all drafts of n nodes, so it must reach as far as any of them.
        return max(d.max_depth(n) for d in self.drafters.values() if n in d.draft_sizes())

    def start(self, level: Level) -> None:
        super().start(level)
        for drafter in self.drafters.values():
            drafter.start(level)
            drafter.set_costs(dict.fromkeys(drafter.draft_sizes(), 1.0))  # until they are measured
        self.depths = {n: self.max_depth(n) for n in self.draft_sizes()}
        # How much of each row a drafter knows; of rows that it drafts for itself, all.
        self.known = {name: [0] * level.setup.batch_size for name in self.drafters}
        self.nested = level.behind > 0  # then rows come and go between two drafts
        self.current = self.leader = "autoregressive"  # who drafts; who would, if this were no trial
        self.rates: dict[str, float] = {}  # by which that was chosen
        self.on_trial, self.steps, self.tokens, self.cost = False, 0, 0.0, 0.0  # of this turn
        self.turns = dict.fromkeys(self.drafters, 0)
        self.feeding = dict.fromkeys(self.drafters, 0.0)  # what it costs to put it in charge
        self.wasted = dict.fromkeys(self.drafters, 0.0)  # by which trials cost more than the best would have
        # Costs of all steps, of the last choice, and of feeding before this step; seconds of both before it.
        self.elapsed = self.choosing = self.catching_up = self.overhead = 0.0

    def warm_up(self, state: State) -> None:
        for drafter in self.drafters.values():
            drafter.warm_up(state)

    def count_into(self, stats: Stats) -> None:
        for drafter in self.drafters.values():
            drafter.count_into(stats)

    def prefill(self, state: State, row: int, tokens: Tensor, start: int) -> None:
        mine = self.known[self.current]
        self.drafters[self.current].prefill(state, row, tokens, min(start, mine[row]))
        for known in self.known.values():
            known[row] = min(known[row], start)
        mine[row] = ALL

    def rewind(self, length: Tensor) -> None:
        for name, drafter in self.drafters.items():
            drafter.rewind(length)
            pairs = zip(self.known[name], length.tolist())
            self.known[name] = [known if known == ALL else min(known, end) for known, end in pairs]

    def catch_up(self, state: State, name: str) -> None:
        """Put a drafter in charge, and feed it what every text has gained since it was."""
        lengths, active = state.length.tolist(), state.active.tolist()
        mine, wanted = self.known[name], [a or (self.nested and n > 1) for a, n in zip(active, lengths)]
        for row in compress(range(len(wanted)), wanted):
            if mine[row] < lengths[row]:
                self.drafters[name].prefill(state, row, state.tokens[row, : lengths[row]], mine[row])
        self.known[self.current] = [min(pair) for pair in zip(self.known[self.current], lengths)]
        self.known[name] = [ALL if fed else known for fed, known in zip(wanted, mine)]
        self.current = name

    def choose(self, state: State) -> tuple[str, bool]:
        """Who is in charge next, and whether that is a trial."""
        self.rates = {name: drafter.rate(state) for name, drafter in self.drafters.items()}
        order = sorted(self.rates, key=self.worth, reverse=True)
        self.leader = order[0]
        for name in order:  # autoregressive decoding, too: nobody may be slower, so its cost must be right
            if not self.turns[name] and (self.could_win(name) or name == "autoregressive"):
                return name, name != self.leader
        for name in order if not self.on_trial else ():  # the leader has a turn between two trials
            seconds = self.TRIAL * min(self.drafters[name].pace.seconds.values())
            wasted = self.wasted[name] if self.turns[name] else seconds
            if name != self.leader and wasted < self.CURIOSITY * self.elapsed:
                return name, True
        return self.leader, False

    def worth(self, name: str) -> float:
        """Tokens per second in the next turns, if it were in charge. A little more for who is: rates are not
        known better than that."""
        tokens, rate = self.STAY * self.TURN, (1.05 if name == self.leader else 1.0) * self.rates[name]
        feeding = 0.0 if name == self.current else self.feeding[name]
        return tokens * rate / (tokens + rate * feeding)

    def could_win(self, name: str) -> bool:
        """Would it be faster than the best one is, if all of its drafts were accepted?"""
        drafter, rate = self.drafters[name], self.rates[self.leader]
        return any((1 + drafter.max_depth(n)) > rate * drafter.pace.seconds[n] for n in drafter.draft_sizes())

    def explain(self) -> str:
        """The choice, in a line for people."""
        parts = []
        for name, rate in sorted(self.rates.items(), key=lambda item: -item[1]):
            tried = "" if self.turns[name] else " (never tried)"
            parts.append(f"{name} {rate:.0f}{tried}")
        reason = "on trial" if self.on_trial else "which promises most"
        return f"{self.current} drafts, {reason}; tokens/s by costs and acceptance: {', '.join(parts)}"

    def turn_is_over(self) -> bool:
        if self.on_trial or self.steps == 0:
            return self.steps in (0, self.TRIAL)
        # Choosing takes its time, too: of a small model, as much as a step.
        return self.tokens >= self.TURN and self.cost > 40 * self.choosing

    def change(self, state: State) -> None:
        """End a turn, and begin the next."""
        begin = time.perf_counter()
        if self.steps > 0:
            self.turns[self.current] += 1
        self.steps, self.tokens, self.cost = 0, 0.0, 0.0
        chosen, self.on_trial = self.choose(state)
        chose = time.perf_counter()
        self.choosing = (chose - begin) / self.pace.clock.slowness
        if chosen != self.current:
            self.catch_up(state, chosen)
            self.catching_up = (time.perf_counter() - chose) / self.pace.clock.slowness
            self.feeding[chosen] = (self.feeding[chosen] + self.catching_up) / 2
        self.overhead = time.perf_counter() - begin

    def propose(self, state: State, n: int | None = None) -> Draft:
        self.overhead = self.catching_up = 0.0
        if self.turn_is_over():
            self.change(state)
        draft = self.drafters[self.current].propose(state, n)
        draft.max_depth, draft.drafter = self.depths[draft.tokens.shape[1]], self.current
        return draft

    def learn(self, draft: Draft, verified: list[Verified], seconds: float) -> None:
        name, drafter = draft.drafter, self.drafters[draft.drafter]
        cost = drafter.pace.seconds[draft.tokens.shape[1]]
        drafter.learn(draft, verified, seconds - self.overhead)
        self.elapsed += cost + self.catching_up
        tokens = sum(row.accepted + 1 for row in verified) / len(verified)
        self.steps, self.tokens, self.cost = self.steps + 1, self.tokens + tokens, self.cost + cost
        if self.on_trial:
            wasted = cost + self.catching_up - tokens / self.rates[self.leader]
            self.wasted[name] = max(self.wasted[name] + wasted, 0.0)


class Decoder(Level):
    """A target, a drafter and their caches, for `batch_size` texts of up to `max_length` tokens at a time."""

    @torch.no_grad()
    def __init__(
        self,
        model: Transformer,
        drafter: Drafter | None = None,
        sampling: Sampling = Sampling(),
        max_length: int = 1024,
        batch_size: int = 1,
        compile: bool = True,
    ):
        kernels.load()
        drafter, self.max_length = drafter or Drafter(), max_length
        slots, device = max_length + drafter.slack, model.norm.weight.device
        super().__init__(model, drafter, Setup(sampling, batch_size, slots, compile, device))
        # Begin a step before the last one is read? Where all of it is the device's work, the device never
        # waits then. What the drafter learns of a step, it knows a step later.
        self.runs_ahead = self.is_one_graph

    @torch.no_grad()
    def prefill(self, row: int, tokens: list[int], seed: int, reuse: bool = False) -> int:
        """Start a text in `row` -> its first new token. `reuse` keeps what it shares with the last text."""
        state, device = self.state, self.state.tokens.device
        start = self.shared_prefix(row, tokens) if reuse else 0
        state.length[row] = start + 1  # all that a next `reuse` may count on, should this be interrupted
        prompt, length = torch.tensor(tokens, device=device), len(tokens)  # int64 [P]
        state.tokens[row, :length] = prompt
        feature = prefill(self.model, self.cache, row, prompt, start, state.features[row], self.taps)
        self.drafter.prefill(state, row, prompt, start)
        position, key = (torch.tensor([value], device=device) for value in (length, seed))  # [1] each
        first = pick(self.model.lm_head(feature), position[None], key, self.setup.sampling)  # [1, 1]
        state.tokens[row, length] = first[0, 0]
        state.length[row], state.seed[row], state.active[row] = length, seed, True
        return int(first)

    def check_request(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Raise BadInput for what cannot be decoded."""
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        for tokens in prompts:
            check_prompt(self.model.config, tokens, self.max_length)

    def freeze(self, row: int, length: int) -> None:
        """A text has ended. Not by assignment, for which a GPU would have to be idle."""
        self.state.active[row].fill_(False)
        self.state.length[row].fill_(length)

    def may_go_on(self, turn: Turn, rows: list[Row | None]) -> bool:
        """May the next step begin before this one is read? A text that says a stop token now is decoded a
        step too far then, which nobody reads. None may be whose budget, or room, this step uses up."""
        most = turn.draft.max_depth + 1
        return self.runs_ahead and all(row is None or row.budget > most for row in rows)

    def shared_prefix(self, row: int, tokens: list[int]) -> int:
        """How many tokens of the new text are in all caches of the row. At least one is left to compute."""
        valid = int(self.state.length[row]) - 1  # a drafter may lack the last one
        old = self.state.tokens[row, : max(valid, 0)].tolist()
        pairs = zip(old, tokens[:-1])
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(tokens) - 1))

    def run(
        self,
        prompts: list[list[int]],
        max_new_tokens: int = 200,
        stop_ids: Iterable[int] = (),
        should_stop: Callable[[int, int], bool] | None = None,
        stats: Stats | None = None,
        reuse: bool = False,
        seeds: list[int] | None = None,
    ) -> Iterator[list[Emission]]:
        """Decode all prompts, yielding what every step emits; a finished row takes the next prompt at once.

        `should_stop(prompt index, token)` is asked about every token in order; true ends the text with it.
        `reuse` continues a conversation: what a prompt shares with the row's last text is not computed again.
        `seeds` are the keys of the prompts' noise; by default the seed, the seed + 1 and so on.
        """
        stats, stop_ids = stats if stats is not None else Stats(), frozenset(stop_ids)
        self.check_request(prompts, max_new_tokens)
        self.state.active.fill_(False)  # an earlier run may have been abandoned half way
        self.count_into(stats)
        seeds = seeds or [self.setup.sampling.seed + i for i in range(len(prompts))]
        waiting = deque(range(len(prompts)))
        rows: list[Row | None] = [None] * self.setup.batch_size
        ahead: tuple[Turn, list[Row | None]] | None = None  # a step that was begun, and for which texts
        started = since = time.perf_counter()

        def emit(b: int, tokens: list[int], accepted: int, draft: Draft | None = None) -> Emission:
            row = rows[b]
            emission = cut(row, tokens, accepted, stop_ids, should_stop)
            emission.draft, emission.row = draft, b
            row.budget -= len(emission.tokens)
            row.text_length += len(emission.tokens)
            if emission.finish_reason:
                self.freeze(b, row.text_length - 1)  # forget what was cut off
                rows[b] = None
            return emission

        while waiting or any(rows):
            for b in range(len(rows)):
                while rows[b] is None and waiting:
                    i, begin = waiting.popleft(), time.perf_counter()
                    room = self.max_length - len(prompts[i])
                    rows[b] = Row(i, min(max_new_tokens, room), len(prompts[i]))
                    first = self.prefill(b, prompts[i], seeds[i], reuse)
                    since = time.perf_counter()
                    stats.count_prefill(since - begin, since - started)
                    yield [emit(b, [first], 0)]
            if not any(rows):
                continue
            begin = since if ahead else time.perf_counter()  # a step ahead ran while nobody asked for one
            turn, texts = ahead or (self.begin(), list(rows))
            ahead = (self.begin(), list(rows)) if self.may_go_on(turn, rows) else None
            draft, verified = turn.draft, self.read(turn)
            both = [b for b, row in enumerate(rows) if row is not None and row is texts[b]]
            results = [(verified[b], emit(b, verified[b].tokens, verified[b].accepted, draft)) for b in both]
            used, since = [(result, e.accepted, len(e.tokens)) for result, e in results], time.perf_counter()
            self.count_step(draft, used, since - begin)
            if results:  # or all texts that it was begun for are done
                yield [emission for _, emission in results]


def cut(row: Row, tokens: list[int], accepted: int, stop_ids: frozenset[int], should_stop) -> Emission:
    """The new tokens of a text up to and including the one that ends it."""
    for i, token in enumerate(tokens, start=1):
        if token in stop_ids or (should_stop is not None and should_stop(row.prompt_index, token)):
            return Emission(row.prompt_index, tokens[:i], min(accepted, i), "stop")
        if i == row.budget:
            return Emission(row.prompt_index, tokens[:i], min(accepted, i), "length")
    return Emission(row.prompt_index, tokens, accepted)


def cache_length(config: ModelConfig, longest: int) -> int:
    """Tokens to allocate a cache for, when the longest text needs `longest`.

    Rounded up, so that most prompts share one set of compiled shapes, but never beyond the model's context.
    """
    check_window(config, longest)
    return min(-(-longest // 512) * 512, config.max_context, config.sliding_window or config.max_context)


def check_window(config: ModelConfig, longest: int) -> None:
    """Raise BadInput where a sliding window, which is not implemented, would make a difference."""
    if config.sliding_window is not None and longest > config.sliding_window:
        raise BadInput(
            f"the model's sliding window of {config.sliding_window} tokens is not implemented, and the text "
            f"may grow to {longest}: shorten the prompt or lower --max_new_tokens"
        )


def check_prompt(config: ModelConfig, tokens: list[int], max_length: int) -> None:
    """Raise BadInput for a prompt that cannot be decoded; `max_length` counts at least one new token."""
    if not tokens:
        raise BadInput("the prompt is empty; at least one token is needed")
    if len(tokens) >= max_length:
        raise BadInput(
            f"the prompt has {len(tokens)} tokens; at most {max_length - 1} leave room for a new one"
        )
    wrong = next((t for t in tokens if not 0 <= t < config.vocab_size), None)
    if wrong is not None:
        raise BadInput(f"the prompt has the token id {wrong}; the model knows 0 to {config.vocab_size - 1}")


def generate(
    model: Transformer,
    prompt_ids: list[int] | list[list[int]],
    drafter: Drafter | None = None,
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 200,
    batch_size: int = 1,
    compile: bool = True,
    **options,
) -> Iterator[list[Emission]]:
    """Decode one prompt or several, a step at a time: the engine in one call. `options`: see `Decoder.run`.

    stats = Stats()
    for emissions in generate(model, [1, 306, 626], drafter=SequentialDrafter(small), stats=stats):
        print(emissions[0].tokens)
    """
    prompts = [prompt_ids] if not prompt_ids or isinstance(prompt_ids[0], int) else prompt_ids
    longest = max(map(len, prompts), default=0) + max_new_tokens
    max_length = cache_length(model.config, longest)
    decoder = Decoder(model, drafter, sampling, max_length, batch_size, compile)
    stats = options.setdefault("stats", Stats())
    stats.compile_seconds += decoder.warm_up()
    yield from decoder.run(prompts, max_new_tokens, **options)
