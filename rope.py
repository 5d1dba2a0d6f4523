"""rope.py: how fast the pairs of a query or key turn with its position, and how a config.json says so.

RoPE (arXiv 2104.09864) turns pair i at position p by the angle p * f_i. A model that was stretched to longer
texts has lower frequencies f_i, and with YaRN longer queries and keys too. `model.py` asks for both; how an
angle is applied is there.

    theta, scaling = read_rope(json.load(open("config.json")))
    frequencies(theta, scaling, head_dim)  # float32 [head_dim / 2]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
ORIGINAL = "original_max_position_embeddings"
# What may stand in a configuration. What belongs to another kind has no effect, as in transformers.
KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "truncate"}
KEYS |= {"high_freq_factor", ORIGINAL, "beta_fast", "beta_slow", "attention_factor"}
KEYS |= {"mscale", "mscale_all_dim"}
KEYS |= {"finetuned"}  # a remark of the authors of YaRN


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is stretched beyond the trained context.

    `dynamic` slows the frequencies as a text outgrows the trained context. Keys in a cache would keep older
    angles, so a text would depend on when it was cached. Here a model with it is held to its trained
    context, where dynamic is the same as default. (A drafter is not: its guesses get worse, and no text
    changes.)
    """

    kind: str = "default"  # one of KINDS
    factor: float = 1.0
    original_context: int = 8192  # of llama3 and yarn: what was trained before stretching
    # Of llama3: wavelengths above original_context / low_freq_factor are slowed by `factor`, those below
    # original_context / high_freq_factor are left alone.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # Of yarn: pairs with fewer cycles than beta_slow in the original context are slowed by `factor`, those
    # with more than beta_fast are left alone. `truncate`: the limits between are whole pairs.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # of cos and sin, so that scores grow by its square

    def context(self, trained: int) -> int:
        """Positions to use, where max_position_embeddings says `trained`.

        With YaRN the larger of that and factor * original_context: the recipes on Qwen's model cards add
        the factor and leave max_position_embeddings as it was. As in vLLM, but for its refusal of more.
        """
        return max(trained, int(self.factor * self.original_context)) if self.kind == "yarn" else trained


# --------------------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------------------


def read_rope(raw: dict[str, Any]) -> tuple[float, RopeScaling]:
    """RoPE base and scaling of a config.json, from `rope_parameters` (transformers 5) or from `rope_theta`
    and `rope_scaling` (before).

    Raises ValueError for what is not supported or makes no sense, KeyError for what is missing.
    """
    found = [raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)]
    readings = {read_settings(flat(rope, raw.get("layer_types")), raw) for rope in found or [{}]}
    if len(readings) > 1:  # transformers would take the first, and perhaps its default base
        raise ValueError("rope_scaling and rope_parameters contradict each other; remove one of them")
    return readings.pop()


def flat(rope: Any, layer_types: list[str] | None) -> dict[str, Any]:
    """The settings that all layers have in common. transformers 5 may nest them by kind of layer; a kind that
    no layer has does not count."""
    if not isinstance(rope, dict):
        raise ValueError(f"the RoPE settings are {rope!r}; they must be a dictionary")
    values = [value for value in rope.values() if value is not None]
    if not values or not all(isinstance(value, dict) for value in values):
        return rope
    names = sorted(set(layer_types or rope))
    parts = [rope.get(name) for name in names]
    if parts[0] is None or any(part != parts[0] for part in parts):
        raise ValueError(f"RoPE that differs from layer to layer ({', '.join(names)}) is not supported")
    return parts[0]


def read_settings(rope: dict[str, Any], raw: dict[str, Any]) -> tuple[float, RopeScaling]:
    """What the settings `rope` of the configuration `raw` say: see `read_rope`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        known = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise ValueError(f"RoPE scaling {kind!r} is not supported; use {known}")
    unknown = sorted(name for name in rope if name not in KEYS and rope[name] is not None)
    if unknown:
        raise ValueError(f"the key {unknown[0]!r} of {kind} RoPE is not supported")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"partial_rotary_factor {partial!r} is not supported; whole heads are rotated")
    base = {"rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0))}
    theta = positive(base, "rope_theta")
    if kind == "default":
        return theta, RopeScaling()
    if kind in ("linear", "dynamic"):
        return theta, RopeScaling(kind, positive(rope, "factor"))
    # As in transformers, the key of the whole configuration comes first, and without it the context counts.
    trained = positive(raw, "max_position_embeddings", 2048.0)
    original = positive(rope if raw.get(ORIGINAL) is None else raw, ORIGINAL, trained)
    if original % 1:
        raise ValueError(f"{ORIGINAL} is {original}; it must be a whole number")
    if kind == "llama3":
        return theta, read_llama3(rope, positive(rope, "factor"), int(original))
    factor = trained / original if rope["factor"] is None else positive(rope, "factor")
    return theta, read_yarn(rope, theta, factor, int(original))


def read_llama3(rope: dict[str, Any], factor: float, original: int) -> RopeScaling:
    low, high = positive(rope, "low_freq_factor"), positive(rope, "high_freq_factor")
    if low >= high:
        raise ValueError(f"low_freq_factor {low} is not below high_freq_factor {high}")
    return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)


def read_yarn(rope: dict[str, Any], theta: float, factor: float, original: int) -> RopeScaling:
    fast, slow = positive(rope, "beta_fast", 32.0), positive(rope, "beta_slow", 1.0)
    if fast < slow:
        raise ValueError(f"beta_fast {fast} is below beta_slow {slow}")
    if theta <= 1:  # its logarithm divides
        raise ValueError(f"rope_theta {theta} is too small for yarn; it must be above 1")
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"truncate is {truncate!r}; it must be true or false")
    attention = attention_factor(rope, factor)
    given = {"beta_fast": fast, "beta_slow": slow, "truncate": truncate, "attention_factor": attention}
    return RopeScaling("yarn", factor, original, **given)


def attention_factor(rope: dict[str, Any], factor: float) -> float:
    """Of cos and sin: 0.1 ln(factor) + 1 (YaRN: arXiv 2309.00071), unless the settings say otherwise.

    The two keys with mscale are DeepSeek's: the ratio of two such numbers. As in transformers, one alone or
    a zero has no effect.
    """

    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scales = [positive(rope, name) for name in ("mscale", "mscale_all_dim") if rope.get(name)]
    default = of(scales[0]) / of(scales[1]) if len(scales) == 2 else of(1.0)
    return positive(rope, "attention_factor", default)


def positive(settings: dict[str, Any], name: str, default: float | None = None) -> float:
    """A positive number; `default`, if there is one, stands for a missing or null value."""
    value = settings[name] if default is None else settings.get(name)
    value = default if value is None and default is not None else value
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"RoPE with {name} {value!r} makes no sense; it must be a positive number")
    return float(value)


# --------------------------------------------------------------------------------------------------
# Frequencies
# --------------------------------------------------------------------------------------------------


def frequencies(theta: float, scaling: RopeScaling, size: int) -> Tensor:
    """Radians per position of every rotated pair of a head with `size` numbers, float32 [size / 2].

    In the order in which transformers computes them (modeling_rope_utils.py), so that they are equal.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    plain = 1.0 / theta**exponents
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        # A pair's share of `factor` depends on its number of cycles in the original context: all of it below
        # low_freq_factor cycles, none above high_freq_factor, and a linear blend between.
        cycles = scaling.original_context * plain / (2 * math.pi)
        blend = (cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return blend * plain + (1 - blend) * plain / scaling.factor
    if scaling.kind == "yarn":
        kept = kept_by_yarn(theta, scaling, size)
        return 1.0 / (scaling.factor * theta**exponents) * (1 - kept) + plain * kept
    return plain


def kept_by_yarn(theta: float, scaling: RopeScaling, size: int) -> Tensor:
    """How much of a pair's own frequency is kept, float32 [size / 2]: 1 for all of it, 0 where it is divided.

    "NTK by parts" of YaRN (arXiv 2309.00071): linear in the number of the pair, not in its cycles as llama3.
    """

    def pair(cycles: float) -> float:
        """Which pair, were it a real number, has so many cycles in the original context."""
        return size * math.log(scaling.original_context / (cycles * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    ramp = (torch.arange(size // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    return 1 - ramp.clamp(0, 1)
