"""Compile all Triton kernels for a GPU that is not here: python tests/compile_cuda.py 90

Runs the host code of every operation on tensors of the CPU, in shapes of real models, with a driver that
knows nothing but the GPU's name, and stops each kernel before its launch. Prints a line of JSON for every
kernel: what it was compiled with, registers and spilled bytes, by ptxas, and of its instructions those that
multiply matrices, and how many round a product and a sum at once, or other than IEEE does.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kernels_cuda
import sampling_cuda

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Absent:
    """The driver of a GPU that is not here."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def matrix_instructions(ptx: str) -> dict[str, int]:
    """How many there are of each kind, without the width of the side where the rows are."""
    found: dict[str, int] = {}
    for name in re.findall(r"\b(wgmma\.mma_async\S+|mma\.sync\S+)", ptx):
        kind = re.sub(r"(m64n)\d+(k\d+)", r"\1N\2", name)
        found[kind] = found.get(kind, 0) + 1
    return found


def inexact_instructions(ptx: str, may_fuse: bool) -> int:
    """Those whose result is not that of one operation of IEEE: fused, approximate, or without the smallest
    numbers. Where ptxas may fuse them, products count, too."""
    fused = r"\b(?:fma|mad)\.\S*f(?:32|64)" + r"|\bmul\.(?:rn\.)?f(?:32|64)" * may_fuse
    return len(re.findall(rf"{fused}|\.approx|\.full\.|\.ftz", ptx))


def report(kernel, name: str, options: dict) -> dict:
    capability = kernel.metadata.target.arch
    architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as scratch:
        ptx = Path(scratch) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        command = [PTXAS, "-v", f"-arch={architecture}", ptx, "-o", f"{scratch}/kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    constants = {
        key: value for key, value in options.items() if isinstance(value, (int, bool)) and key.isupper()
    }
    return {
        "kernel": name, "constants": constants, "registers": registers, "spilled": spilled,
        "shared": kernel.metadata.shared, "instructions": matrix_instructions(kernel.asm["ptx"]),
        "inexact": inexact_instructions(kernel.asm["ptx"], kernel.metadata.enable_fp_fusion),
    }  # fmt: skip


def launch_nothing(capability: int) -> None:
    """Every launch from here on compiles, and prints the report of a new kernel."""
    triton.runtime.driver.set_active(Absent(capability))
    run, seen = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            print(json.dumps(report(kernel, self.fn.__name__, options)), flush=True)
        seen.add(kernel.hash)

    JITFunction.run = compile_only


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def linears() -> None:
    """All kinds of weights, with as many rows as make a difference; the shape of an 8 B model's layer."""
    out, inputs, extras = 4096, 4096, (None, 0.0, False, None, 1, 1, None)
    words, scales = torch.zeros(out, inputs // 8, dtype=torch.int32), torch.zeros(inputs // 128, out).half()
    residual = bf16(64, out)
    for bits in (16, 8, 4):
        for rows in (1, 32, 64):
            x, after = bf16(rows, inputs), (None, residual[:rows])
            kernels_cuda.linear(x, words, scales, None, *after, *extras, out, bits, False)
    small, whole = torch.zeros(inputs // 32, out).half(), scales[:1].T.contiguous()
    wide = torch.zeros(out, inputs, dtype=torch.int8)
    for x in (bf16(1, inputs), bf16(64, inputs)):
        for bits in (16, 8, 4):
            kernels_cuda.linear(x, words, scales, scales, None, None, *extras, out, bits, False)
            kernels_cuda.linear(x, words, small, None, None, None, *extras, out, bits, False)
        for bits, numbers in product((16, 8), (whole, scales.T.contiguous(), small.T.contiguous())):
            kernels_cuda.linear(x, wide, numbers, None, None, None, *extras, out, bits, False)
        kernels_cuda.linear(x, bf16(out, inputs), None, None, None, None, *extras, out, 16, True)
    ragged, few = torch.zeros(out, 16 * 3, dtype=torch.int32), torch.zeros(11, out).half()
    for rows in (1, 64):
        kernels_cuda.linear(bf16(rows, 352), ragged, few, None, None, None, *extras, out, 16, False)


def others() -> None:
    x, norm = bf16(8, 4096), bf16(4096)
    for bits in (16, 8, 4):
        kernels_cuda.prepare(x, norm, 1e-5, bits=bits, groups=32)
    kernels_cuda.prepare(bf16(8, 28672), None, gated=True, bits=8)
    kernels_cuda.rotate(x.float(), torch.ones(1, 1), 4096, 1)
    kernels_cuda.rotate(torch.zeros(8, 14336), torch.ones(28, 28), 512, 1)
    between()
    length, n = torch.full((2,), 100), 8
    for heads, groups, dtype in ((32, 8, torch.bfloat16), (64, 8, torch.bfloat16), (32, 32, torch.float32)):
        q, cache = torch.zeros(2, n, heads, 128, dtype=dtype), torch.zeros(2, 512, groups, 128, dtype=dtype)
        kernels_cuda.attention(q, cache, cache, torch.ones(2, n, n, dtype=torch.bool), length)
    kernels_cuda.move([cache, cache.clone()], torch.zeros(2, 4, dtype=torch.int64), length)
    kernels_cuda.top_k(torch.zeros(2, n, 128256), 10)
    kernels_cuda.top_k(torch.zeros(2, 200), 59)


def between() -> None:
    """Rotation and storing, of heads that fill a program and of others."""
    for groups, size, dtype in ((8, 128, torch.bfloat16), (8, 128, torch.float32), (1, 80, torch.bfloat16)):
        heads = (4 * groups, groups, groups)
        q, k, v = torch.zeros(2, 8, sum(heads), size, dtype=dtype).split(heads, dim=2)
        cos, cache = torch.zeros(2, 8, 1, size // 2), torch.zeros(2, 512, groups, size, dtype=dtype)
        kernels_cuda.rope(q, k, cos, cos)
        kernels_cuda.store(cache, cache.clone(), k.contiguous(), v, torch.zeros(2, 8, dtype=torch.int64))


def picking() -> None:
    """From the vocabulary of Llama 3, and from one that fills no block."""
    seed, positions = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
    settings = torch.zeros(2, 5, dtype=torch.float64)
    for size in (128256, 61):
        logits = torch.zeros(2, 8, size)
        sampling_cuda.pick(logits, positions, seed, settings)
        sampling_cuda.logsumexp(logits)
        sampling_cuda.gumbel(seed, positions, size)


if __name__ == "__main__":
    launch_nothing(int(sys.argv[1]))
    linears()
    others()
    picking()
