"""model.py: a Llama-family decoder and its static KV cache.

Configuration, transformer, cache, in this order. The forward is a function of tensors: tokens, positions, and
`attend`, which decides what a token sees. `Linear` and the kernels below it handle how weights are stored
(16, 8 or 4 bits). How tokens are picked is in `sampling.py`; loading weights is in `checkpoints.py`.

    model = Transformer(ModelConfig.from_dict(json.load(open("config.json"))))
    features, _ = model(tokens, positions, causal_attention)  # [B, n] -> [B, n, hidden]

The one idea: keys and values are stored at *slots*, and queries and keys get the RoPE angle of *positions*.
The two are separate arguments. In a chain they coincide. In a tree, siblings share a position, never a slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from rope import RopeScaling, frequencies, read_rope


class BadInput(ValueError):
    """What the user gave cannot work. One line: the file or flag, what is wrong, what would be right."""


# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------


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
    max_context: int  # positions the model was made for: max_position_embeddings, or more with YaRN
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
            theta, scaling = read_rope(raw)
            bias = bool(raw.get("attention_bias", False))
            config = ModelConfig(
                vocab_size=integer(raw, "vocab_size"),
                hidden_size=hidden,
                intermediate_size=integer(raw, "intermediate_size"),
                num_layers=integer(raw, "num_hidden_layers"),
                num_heads=heads,
                num_kv_heads=integer(raw, "num_key_value_heads", heads),
                head_dim=integer(raw, "head_dim", hidden // heads),
                max_context=scaling.context(integer(raw, "max_position_embeddings", 2048)),
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
        if self.head_dim % 2:
            raise BadInput(f"{where}: head_dim is {self.head_dim}; RoPE needs an even one")


def integer(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of the configuration; `default`, if there is one, stands for a missing or null value."""
    value = raw[name] if default is None else raw.get(name)
    value = default if value is None else value
    if type(value) is not int:
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    return value


def read_sliding_window(raw: dict[str, Any], kind: str) -> int | None:
    """Mistral uses a window whenever one is given; Qwen only with `use_sliding_window`; Llama never."""
    used = kind == "mistral" or (kind in ("qwen2", "qwen3") and raw.get("use_sliding_window", False))
    return int(raw["sliding_window"]) if used and raw.get("sliding_window") else None


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of every rotated pair, float32 [head_dim / 2]."""
    return frequencies(config.rope_theta, config.rope_scaling, config.head_dim)


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


class Embedding(nn.Embedding):
    """A state for every token. Models, EAGLE heads and GPTQ all embed by calling this module.

    A drafter may lack the last tokens of its target's vocabulary. It reads its own last one instead.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there, PyTorch would import its compiler for it, which takes seconds
            super().reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        known = tokens.clamp(max=self.num_embeddings - 1)
        return kernels.embedding(self.weight, known)  # int64 [B, n] -> [B, n, hidden]


class Rotation(nn.Module):
    """An orthogonal matrix that is fast to multiply with (`kernels.rotate`): signs, then Hadamard matrices.

    It spreads an outlier in one number over all of them, which suits 4-bit numbers better (QuaRot: arXiv
    2404.00456). Weights that read a rotated state are rotated likewise (`rotation.rotated`), and cancel it.
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
    perhaps `zeros`; or, after `pack`, any of these in the order that the CPU kernels want. Inputs pass
    through the norm or SwiGLU, then the `rotation`, then the `permutation`, where there are any.
    """

    float32_out = False  # results in float32, not in the dtype of x

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
        return kernels.linear(x, *weights, *extras, self.out_features, self.activation_bits, self.float32_out)

    def prepare(
        self, x: Tensor, norm: RMSNorm | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """The input of the matrix product in `forward`, for the same arguments, before rounding: [B, n,
        in]."""
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

    float32_out = True

    def rows(self, ids: Tensor) -> LanguageHead:
        """One with the rows `ids` int64 [n] alone, and the same bits for each, before and after `pack`."""

        def chosen(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            if tensor.dim() == 3:  # scales in blocks, [out / 64, groups, 64]
                return tensor.transpose(1, 2).flatten(0, 1)[ids]
            if tensor.dim() == 4:
                return kernels.unpack(tensor)[ids]
            turned = tensor is not self.weight and self.weight.dtype == torch.int32  # on a GPU: [groups, out]
            return tensor[:, ids] if turned else tensor[ids]

        part = LanguageHead(self.in_features, len(ids))
        part.set_weights(chosen(self.weight), chosen(self.scales), chosen(self.zeros))
        part.permutation, part.rotation = self.permutation, self.rotation
        part.activation_bits = self.activation_bits
        part.pack()
        return part


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
        return *kernels.rope(self.q_norm(q), self.k_norm(k), cos, sin), v


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
        """x: [B, n, hidden]. `attend(q, k, v)` returns [B, n, H, D] and supplies the cached keys."""
        attended = attend(*self.self_attn.project(x, self.input_layernorm, cos, sin))
        x = self.self_attn.o_proj(attended.flatten(2), residual=x)  # [B, n, H D] -> [B, n, hidden]
        return self.mlp(x, self.post_attention_layernorm)


class CheckpointModule(nn.Module):
    """A module with RoPE, whose weights are named as in Hugging Face checkpoints."""

    top = ""  # what those names begin with

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def to_empty(self, *, device: str | torch.device | None, recurse: bool = True) -> CheckpointModule:
        """As nn.Module has it, without `empty_like`, for which PyTorch imports half a second of Python."""
        return self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), recurse=recurse)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [B, n] -> cos and sin, float32 [B, n, 1, D / 2]."""
        angles = positions[..., None, None].float() * self.frequencies
        scale = self.config.rope_scaling.attention_factor
        return (angles.cos(), angles.sin()) if scale == 1 else (scale * angles.cos(), scale * angles.sin())

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
    """A Llama-family decoder. Weights come from `checkpoints.load_model`, or are random at first."""

    top = "model."
    clock: Any = None  # a function, where several processes share the model and must decide alike

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
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
        rope, x, tapped = self.rope(positions), self.embed(tokens), {}
        for i in range(len(self.layers)):
            tapped |= {i: self.unrotated(x)} if i in taps else {}  # others are not kept
            x = self.run_layer(i, x, rope, attend)
        tapped[len(self.layers)] = self.norm(self.unrotated(x))
        states = torch.cat([tapped[i] for i in taps], dim=-1) if taps else x[..., :0]
        return tapped[len(self.layers)], states

    def embed(self, tokens: Tensor) -> Tensor:
        """The state that enters the first layer: int64 [B, n] -> [B, n, hidden]."""
        x = self.embed_tokens(tokens)
        return x if self.rotation is None else self.rotation(x)

    def run_layer(self, i: int, x: Tensor, rope: tuple[Tensor, Tensor], attend) -> Tensor:
        """What layer i makes of a state [B, n, hidden]. `rope`: of its positions."""
        return self.layers[i](x, *rope, partial(attend, i))

    def unrotated(self, x: Tensor) -> Tensor:
        """Undo the rotation of a state between layers, for the final norm, lm_head and EAGLE heads."""
        return x if self.rotation is None else self.rotation.inverse(x)

    def recompute(self, tokens: Tensor, attend=None) -> Tensor:
        """Features without a cache, to compare with: whole texts int64 [B, n] -> [B, n, hidden]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.forward(tokens, positions, attend or causal_attention)[0]


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
        count = 2 * config.num_layers
        if like.device.type == "cpu":  # one block, which lies in huge pages
            caches = list(like.new_zeros(count, *shape))
        else:  # what is compiled for a GPU wants caches that share no memory
            caches = [like.new_zeros(shape) for _ in range(count)]
        return KVCache(caches[::2], caches[1::2])

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
        kernels.store(self.keys[layer], self.values[layer], k, v, slots)

    def keep(self, path: Tensor, length: Tensor) -> None:
        """Move an accepted path to where it belongs: slot length + path[d] -> length + d, for all d at once.

        path: int64 [B, D + 1], increasing where it is valid, some node beyond. The keys need no new rotation:
        a node of depth d already stands at position length + d.
        """
        kernels.move_slots([*self.keys, *self.values], path, length)


# --------------------------------------------------------------------------------------------------
# What a model can take
# --------------------------------------------------------------------------------------------------


def cache_length(config: ModelConfig, longest: int) -> int:
    """Tokens to allocate a cache for, when the longest text needs `longest`.

    Rounded up, so that most prompts share one set of shapes, but never beyond the model's context.
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


def check_dynamic(config: ModelConfig, longest: int) -> None:
    """Raise BadInput where a text of `longest` tokens outgrows what dynamic RoPE is implemented for."""
    if config.rope_scaling.kind == "dynamic" and longest > config.max_context:
        raise BadInput(
            f"dynamic RoPE is implemented within the trained context of {config.max_context} tokens only, "
            f"and the text may grow to {longest}"
        )


def check_prompt(config: ModelConfig, tokens: list[int], max_length: int) -> None:
    """Raise BadInput for a prompt that cannot be decoded; `max_length` counts at least one new token."""
    if not tokens:
        raise BadInput("the prompt is empty; at least one token is needed")
    check_dynamic(config, len(tokens) + 1)
    if len(tokens) >= max_length:
        raise BadInput(
            f"the prompt has {len(tokens)} tokens; at most {max_length - 1} leave room for a new one"
        )
    wrong = next((t for t in tokens if not 0 <= t < config.vocab_size), None)
    if wrong is not None:
        raise BadInput(f"the prompt has the token id {wrong}; the model knows 0 to {config.vocab_size - 1}")
