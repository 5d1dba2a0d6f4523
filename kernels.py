"""kernels.py: the operations that PyTorch alone does not do well enough. It knows tensors, not models.

    linear      x W^T with 4-bit, 8-bit or bf16 weights; what comes before (norm or SwiGLU, rotation, another
                order, rounding of the activations) and after (bias, residual) is part of it
    rms_norm    the norm alone
    rotate      a rotation alone: Hadamard matrices, which spread what is large over many numbers
    pick        a token of every row: temperature, top-k, top-p, min-p and noise, without sorting
    gumbel      the noise alone, as a function of seed, position and token
    penalize    logits after a bias, penalties for what was said, and a mask
    logsumexp   what log-probabilities need, the same bits in any order
    top_k       the largest of every row, with a rule for equal ones
    rope        queries and keys, turned by the angles of their positions
    store       keys and values, to their slots in a static cache
    attention   n queries of every text over a static cache
    move        what an accepted path left in the caches, to where it belongs

Each has one signature and up to three bodies: `reference`, in reference.py, plain PyTorch, which the tests
compare the others with; `cpu`, in kernels.cpp, attention.cpp and sampling.cpp, compiled when needed; and
`cuda`, in kernels_cuda.py, in Triton. GPT_SPEC_KERNELS=reference|portable|avx2|avx512 chooses the CPU body
instead of the best that the machine has; reference means the GPU, too. GPT_SPEC_REFERENCE=attention;pick
puts single operations on their references, on both, for a kernel that does not work on some machine.

The one idea of all bodies but the reference: row i of a result is the same bits however many rows ride along,
because every sum has one order, that of the inputs or of the positions. With it, verifying sixty-four tokens
at once computes what sixty-four steps would have computed. The reference promises this for picking tokens.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Large tensors in huge pages: weights are read a tenth to a fifth faster. PyTorch reads this once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from building import FLAGS, Build, cache_directory, reason_of, user_cache  # noqa: E402, F401
from reference import (  # noqa: E402, F401
    BLOCK,
    INPUTS,
    PAIR,
    SEEN,
    WORDS,
    attention_reference,
    dequantize,
    embedding,
    fill_up,
    gumbel_reference,
    kept_reference,
    linear_reference,
    logsumexp_reference,
    mix,
    move_reference,
    pack,
    pack_scales,
    pack_words,
    penalize_reference,
    pick_reference,
    prepare_reference,
    quantize_activations,
    restore_nibbles,
    rms_norm_reference,
    rope_reference,
    rotate_reference,
    store_reference,
    swap_nibbles,
    top_k_reference,
    unpack,
)

LANES = 16  # groups of inputs are multiples of it


def best_path() -> str:
    """The fastest path that this CPU has the instructions for."""
    if all(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("vnni", "avx512_bf16")):
        return "avx512"
    return "avx2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "portable"


PATH = os.environ.get("GPT_SPEC_KERNELS") or best_path()
ON_REFERENCE = frozenset(filter(None, os.environ.get("GPT_SPEC_REFERENCE", "").split(";")))
FORM = r"linear (bf16|w[48]a(16|8|4))(, groups of \d+)?(, zeros)?(, turned)?"  # of `form_of`


# --------------------------------------------------------------------------------------------------
# Compiling and loading the bodies for this machine
# --------------------------------------------------------------------------------------------------


class Bodies:
    """The compiled bodies for the CPU: the complete ones, or quick ones until these are there."""

    loaded: bool | None = None  # None: nobody has tried
    quick: torch.library.Library | None = None  # what gave the quick ones to PyTorch, while they are in use
    complete: Build | None = None  # what the complete ones are made of
    building: subprocess.Popen | None = None  # what makes them; its last word is why that failed
    failed: bool = False  # has it?

    def load(self, patient: bool) -> bool:
        if self.loaded is None:
            self.loaded = self.find(patient)
        return self.loaded

    def find(self, patient: bool) -> bool:
        check_environment()
        if PATH == "reference":
            return False
        load_cuda()
        if list(FLAGS).index(PATH) < list(FLAGS).index(best_path()):
            raise ValueError(f"GPT_SPEC_KERNELS is {PATH!r}, but this CPU has only {best_path()}")
        try:
            self.put_in_place(Build.of(PATH), patient)
        except (OSError, subprocess.CalledProcessError) as error:
            slow = "the kernels cannot be compiled or loaded, running on the slow reference"
            print(f"{slow}: {reason_of(error)}", file=sys.stderr)
            return False
        return True

    def put_in_place(self, build: Build, patient: bool) -> None:
        """The bodies of this build; if it is not made yet, quick ones may do, where it will be kept."""
        patient = patient or build.is_made() or user_cache() is None
        if not build.is_made():
            line = f"compiling the kernels for {PATH}, once on this machine"
            line += "" if patient else "; quick ones first, which do until the others are there"
            print(line, file=sys.stderr, flush=True)
        if patient:
            torch.ops.load_library(str(build.make().library))
        else:
            self.quick = register_direct(Build.of(PATH, quick=True).make().library)
            self.complete = build

    def is_quick(self) -> bool:
        if self.quick is None or self.failed:
            return self.quick is not None
        if self.building is None:  # not before: loading a model wants all cores
            self.building = self.complete.begin(PATH)
        elif self.building.poll() is not None:
            self.change()
        return self.quick is not None

    def change(self) -> None:
        """Put the complete bodies in place of the quick ones. Ctrl-C may come at any point: then again."""
        if not self.complete.is_made():
            self.failed = True
            reason = self.building.stderr.read().decode(errors="replace").strip() or "no reason given"
            print(f"the kernels cannot be compiled, going on with the quick ones: {reason}", file=sys.stderr)
            return
        self.quick._destroy()
        torch.ops.load_library(str(self.complete.library))
        self.quick = None


def check_environment() -> None:
    """Raise ValueError for what the variables name and there is none of."""
    if PATH not in (*FLAGS, "reference"):
        raise ValueError(f"GPT_SPEC_KERNELS is {PATH!r}; it must be reference, {', '.join(FLAGS)} or unset")
    unknown = [n for n in ON_REFERENCE if n not in OPERATIONS and not re.fullmatch(FORM, n)]
    if unknown:
        raise ValueError(f"GPT_SPEC_REFERENCE: {unknown[0]!r} is none of {', '.join(OPERATIONS)}")


def register_direct(file: Path) -> torch.library.Library:
    """Have the functions of a quick library be the bodies of the operators, through Python."""
    functions, quick = ctypes.CDLL(str(file)), torch.library.Library("gpt_spec", "IMPL")
    for name in OPERATIONS:
        quick.impl(name, direct(functions, name), "CPU")
    return quick


def direct(functions: ctypes.CDLL, name: str) -> Callable:
    """An operator whose body is a function of direct.cpp."""
    function, results = functions[f"direct_{name}"], OPERATIONS[name][0].rpartition("->")[2].count("Tensor")
    function.restype = ctypes.c_char_p

    def body(*arguments):
        flat = [part for a in arguments for part in ([len(a), *a] if isinstance(a, (list, tuple)) else [a])]
        words, made = [word_of(value) for value in flat], [torch.empty(0) for _ in range(results)]
        places = (ctypes.c_void_p * results)(*(tensor._cdata for tensor in made))
        if (error := function((ctypes.c_int64 * len(words))(*words), places)) is not None:
            raise RuntimeError(error.decode())
        return made[0] if results == 1 else tuple(made) or None

    return body


def word_of(value: Tensor | float | None) -> int:
    """64 bits: an address, a whole number, or the bits of a float."""
    if isinstance(value, Tensor):
        return value._cdata
    return struct.unpack("q", struct.pack("d", value))[0] if isinstance(value, float) else int(value or 0)


@functools.cache
def bodies() -> Bodies:
    return Bodies()


def load(patient: bool = True) -> bool:
    """Compile the kernels, once per machine, and load them, and the GPU's bodies, too -> are the CPU's in
    place? If not `patient`, quick ones may do at first: see `is_quick`.

    Where they are not, every operation runs its reference: because that is what GPT_SPEC_KERNELS asks for, or
    because there is no compiler, which is said once. ValueError for a path that this machine does not have,
    or for an operation in GPT_SPEC_REFERENCE that there is none of.
    """
    return bodies().load(patient)


def is_quick() -> bool:
    """Are the quick bodies in place? They give the same bits, row by row, and Python calls them. Where the
    others are compiled by now, these take their place."""
    return bodies().is_quick()


@functools.cache
def load_cuda() -> bool:
    """Register the bodies for the GPU -> are they in place?"""
    if PATH == "reference" or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability() < (8, 0):
        print("this GPU is older than sm_80, running on the slow reference", file=sys.stderr)
        return False
    try:
        import kernels_cuda  # not above: it needs Triton, which comes with PyTorch for GPUs only
    except Exception as error:  # another Triton may refuse anything in it
        print(f"kernels_cuda.py cannot be loaded, running on the slow reference: {error}", file=sys.stderr)
        return False
    kernels_cuda.register(library)
    return True


def uses_kernels(x: Tensor, weight: Tensor) -> bool:
    """Do the operators handle this? Not float32, and not training. Known at compile time."""
    kinds = x.dtype == torch.bfloat16 and weight.dtype in (torch.bfloat16, torch.int8)
    return kinds and x.device.type in ("cpu", "cuda") and PATH != "reference" and not weight.requires_grad


def can_pack(weight: Tensor, scales: Tensor | None = None) -> bool:
    """Can the kernels of its device use this weight, which lies in rows? Its inputs must fill whole steps,
    and its groups whole vectors (on a GPU, whole pairs of `pack_words`)."""
    inputs = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    groups = 1 if scales is None else scales.shape[1]
    if weight.device.type == "cuda":  # there, other weights than those of 4 bits stay as they lie
        return weight.dtype == torch.uint8 and inputs // groups % PAIR == 0 and load_cuda()
    if weight.device.type != "cpu" or weight.dtype not in INPUTS or not load():
        return False
    return inputs % INPUTS[weight.dtype] == 0 and (scales is None or inputs // groups % LANES == 0)


# --------------------------------------------------------------------------------------------------
# The operators. kernels.cpp registers bodies for the CPU, and kernels_cuda.py for the GPU. Where neither is
# loaded, the reference runs.
# --------------------------------------------------------------------------------------------------


def like_first(x, *others):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def like_linear(x, *others):
    *_, out_features, _activation_bits, float32_out = others  # the rest does not matter to shape and dtype
    return x.new_empty(*x.shape[:-1], out_features, dtype=torch.float32 if float32_out else x.dtype)


OPERATIONS = {  # name -> signature, reference, and what a result looks like
    "linear": (
        "(Tensor x, Tensor weight, Tensor? scales, Tensor? zeros, Tensor? bias, Tensor? residual,"
        " Tensor? norm, float eps, bool gated, Tensor? rotation, int power, int stride, Tensor? permutation,"
        " int out_features, int activation_bits, bool float32_out) -> Tensor",
        linear_reference,
        like_linear,
    ),
    "rms_norm": ("(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm_reference, like_first),
    "rotate": (
        "(Tensor x, Tensor matrix, int power, int stride) -> Tensor",
        rotate_reference,
        like_first,
    ),
    "pick": (
        "(Tensor logits, Tensor positions, Tensor seed, Tensor settings) -> Tensor",
        pick_reference,
        lambda logits, positions, *others: like_first(positions),
    ),
    "gumbel": (
        "(Tensor seed, Tensor positions, int size) -> Tensor",
        gumbel_reference,
        lambda seed, places, size: places.new_empty(*places.shape, size, dtype=torch.float32),
    ),
    "penalize": (
        "(Tensor logits, Tensor tokens, Tensor sees, Tensor counts, Tensor penalties, Tensor bias,"
        " Tensor? mask) -> Tensor",
        penalize_reference,
        like_first,
    ),
    "logsumexp": (
        "(Tensor logits) -> Tensor",
        logsumexp_reference,
        lambda logits: logits.new_empty(*logits.shape[:-1], 1, dtype=torch.float64),
    ),
    "top_k": (
        "(Tensor x, int k) -> (Tensor, Tensor)",
        top_k_reference,
        lambda x, k: tuple(x.new_empty(*x.shape[:-1], k, dtype=d) for d in (x.dtype, torch.int64)),
    ),
    "rope": (
        "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
        rope_reference,
        lambda q, k, cos, sin: (like_first(q), like_first(k)),
    ),
    "store": (
        "(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor slots) -> ()",
        store_reference,
        lambda *arguments: None,
    ),
    "attention": (
        "(Tensor q, Tensor keys, Tensor values, Tensor ancestors, Tensor length) -> Tensor",
        attention_reference,
        like_first,
    ),
    "move": (
        "(Tensor(a!)[] caches, Tensor path, Tensor length) -> ()",
        move_reference,
        lambda *arguments: None,
    ),
}
library = torch.library.Library("gpt_spec", "DEF")
for _name, (_signature, _body, _fake) in OPERATIONS.items():
    for _twin in (_name, f"{_name}_reference"):  # the second one has no other body
        library.define(_twin + _signature)
        library.impl(_twin, _body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gpt_spec::{_twin}", _fake)


def operator(name: str, form: str = "") -> Callable:
    """The operator of this name; its reference, if GPT_SPEC_REFERENCE has its name or this form of it."""
    slow = name in ON_REFERENCE or form in ON_REFERENCE
    return getattr(torch.ops.gpt_spec, f"{name}_reference" if slow else name)


def form_of(
    weight: Tensor, scales: Tensor | None, zeros: Tensor | None, turned: bool, inputs: int, bits: int
) -> str:
    """What the kernels of `linear` tell apart. `turned`: are inputs rotated or reordered? `bits`: of
    activations."""
    if scales is None:
        return "linear bf16" + ", turned" * turned
    eight, groups = weight.dtype == torch.int8, scales.shape[0 if weight.dtype == torch.int32 else 1]
    grouped = f", groups of {inputs // groups}" if groups > 1 or not eight else ""
    name = f"linear w{8 if eight else 4}a{bits}{grouped}"
    return name + ", zeros" * (zeros is not None) + ", turned" * turned


def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    rotation: tuple[Tensor, int, int] | None = None,
    permutation: Tensor | None = None,
    out_features: int | None = None,
    activation_bits: int = 16,
    float32_out: bool = False,
) -> Tensor:
    """residual + prepare(x) W^T + bias, of x [..., in] -> [..., out_features].

    weight: float32 or bf16 [out, in]; int8 [out, in] or 4-bit uint8 [out, in / 2], with float16 scales [out,
    groups] and, for 4 bits, unless every zero is 8, zeros [out, groups]: w = (q - zero) * scale. Or
    what `pack` and `pack_scales` made of them, which then needs bf16 activations and, on the CPU,
    `out_features`.
    prepare: with `norm` [in], RMSNorm with `eps`; with `gated`, silu(gate) * up of x [..., 2 in] = (gate,
    up); then, with `rotation`, the arguments of `rotate`; with `permutation` int32 [in], whose numbers must
    be places, input permutation[i] at place i; with 8 or 4 `activation_bits`, rounding to integers
    (`quantize_activations`).
    The result has the dtype of x, or is float32 if `float32_out`: the sum itself, where a
    kernel computed it.
    """
    if out_features is None:
        if weight.dim() == 4:  # rows may have been added
            raise ValueError("linear: a packed weight does not tell its out_features")
        out_features = len(weight)
    packed = weight.dim() == 4 or weight.dtype == torch.int32
    in_rows = x.device.type == "cuda" and uses_kernels(x, weight)  # other weights lie there as on disk
    turned, inputs = bool(rotation) or permutation is not None, x.shape[-1] // (2 if gated else 1)
    form = form_of(weight, scales, zeros, turned, inputs, activation_bits) if ON_REFERENCE else ""
    body = operator("linear", form) if packed or in_rows else linear_reference
    extras = (bias, residual, norm, eps, gated, *(rotation or (None, 1, 1)), permutation)
    extras += (out_features, activation_bits, float32_out)
    return body(x, weight, scales, zeros, *extras)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: [..., size], weight: [size]."""
    if uses_kernels(x, weight):
        return operator("rms_norm")(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rotate(x: Tensor, matrix: Tensor, power: int, stride: int = 1) -> Tensor:
    """x M^T for an orthogonal M, over the last dimension. x: [..., blocks * K * power * stride].

    Numbers that lie `stride` apart are seen as [K, power], and multiplied with the Kronecker product of
    `matrix` [K, K], a Hadamard matrix, and that of Sylvester of the order `power`, a power of two, over the
    root of K * power. K is 1 or a multiple of 4. float32 or bf16.
    """
    return operator("rotate")(x, matrix, power, stride)


def pick(logits: Tensor, positions: Tensor, seed: Tensor, settings: Tensor) -> Tensor:
    """The token of every row: the largest of logit + temperature * noise among those that the filters keep.

    logits: float32 [B, n, V]; positions: int64 [B, n] and seed: int64 [B], the key of the noise; settings:
    float64 [B, 5]: temperature (0: the largest logit), log2(e) / temperature, top_k (0: all), top_p, and
    temperature * log(min_p) -> int64 [B, n].

    Kept are tokens with a probability of at least min_p of the largest; of these the top_k most probable; and
    of these the fewest that hold top_p of their probability. Of equal logits the one with the lower id counts
    as larger, and NaN as -inf. All bodies give the same tokens.
    """
    return operator("pick")(logits, positions, seed, settings)


def gumbel(seed: Tensor, positions: Tensor, size: int) -> Tensor:
    """The noise of `pick`, float32 [B, n, size]: a function of seed int64 [B], position int64 [B, n] and
    token. All bodies give the same bits.
    """
    return operator("gumbel")(seed, positions, size)


def penalize(
    logits: Tensor,
    tokens: Tensor,
    sees: Tensor,
    counts: Tensor,
    penalties: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits float32 [B, n, V] after a bias, penalties for the tokens of a text, and a mask: see `Sampling`.

    counts: int32 [B, V], how often the text has a token, and SEEN more where its prompt does; tokens: int64
    [B, m], which may have come since, and sees: bool [B, n, m], which of them a row of logits comes after;
    penalties: float32 [B, 3]: repetition, presence, frequency; bias: float32 [B, V]; mask: int32 [B, n,
    words], whose bit t % 32 of word t // 32 allows token t. All bodies give the same bits.
    """
    return operator("penalize")(logits, tokens, sees, counts, penalties, bias, mask)


def logsumexp(logits: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials, float32 [B, n, V] -> float64 [B, n, 1]; all bodies give the same
    bits."""
    return operator("logsumexp")(logits)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, float32 [..., n] -> values [..., k] and places int64 [..., k], in order.

    Unlike `torch.topk` it says which of equal numbers comes first: the one with the lower place. NaN counts
    as -inf.
    """
    return operator("top_k")(x, k)


def move_slots(caches: list[Tensor], path: Tensor, length: Tensor) -> None:
    """In every cache [B, slots, G, D], slot length + path[d] -> length + d, as if for all d at once.

    path: int64 [B, n], of which a beginning increases and counts; what is behind it may become anything.
    length: int64 [B].
    """
    operator("move")(caches, path, length)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE in the half-split order of Hugging Face, of queries [B, n, H, D] and keys [B, n, G, D], bf16 or
    float32. cos, sin: float32 [B or 1, n, 1, D / 2]. Computed in float32; all bodies give the same bits.
    """
    if len(cos) != len(q):
        cos, sin = (angle.expand(len(q), -1, -1, -1) for angle in (cos, sin))
    body = rope_reference if q.requires_grad else operator("rope")  # which cannot be trained through
    return body(q, k, cos, sin)


def store(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """k, v [B, n, G, D] to slots int64 [B, n] of keys, values [B, slots, G, D], which lie alike."""
    operator("store")(keys, values, k, v, slots)


def attention(q: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, length: Tensor) -> Tensor:
    """n queries of each of B texts over a static cache; every text has its own length and its own tree.

    q: [B, n, H, D]; keys, values: [B, slots, G, D] with H a multiple of G; length: int64 [B], how many slots
    are the past that every node sees; ancestors: bool [B, n, m], which of the m nodes in slots length ..
    length + m - 1 a query sees beyond that (itself included; parents come before children). Returns
    [B, n, H, D]. float32 or bf16; one operator, so that a compiled graph need not know the lengths.
    """
    return operator("attention")(q, keys, values, ancestors, length)
