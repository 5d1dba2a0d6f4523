"""pack_head.py: a head in 4 bits: a quarter of the size, but for an embedding of its own.

    python scripts/pack_head.py HEAD OUTPUT
    python generate.py --checkpoint_path DIR --eagle_checkpoint_path OUTPUT --prompt "..."

HEAD is a directory of an EAGLE or a block head, in any layout that loads here. OUTPUT has the same
config.json, and our format of quantized weights (see packing.py). Matrices are rounded to nearest; embedding
and norms stay as they are.

The one idea: no target is needed. What is a matrix is told by its name.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import process  # noqa: E402
from checkpoints import HEAD_FLAG, find_checkpoint, stored_quantization, weight_files  # noqa: E402
from cli import OneLineParser  # noqa: E402
from head_files import read_head, renamed  # noqa: E402
from kernels import LANES  # noqa: E402
from model import BadInput  # noqa: E402
from packing import Quantization, best_group, quantize_weight  # noqa: E402
from text import read_json  # noqa: E402

MATRIX = re.compile(r"(^fc|^lm_head|_proj)\.weight$")


def pack(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Quantization]:
    """Tensors of a head -> those of the packed file, all matrices in 4 bits, and how they are quantized."""
    matrices = {name: t for name, t in tensors.items() if MATRIX.search(name) and t.shape[1] % LANES == 0}
    others = [name for name in tensors if MATRIX.search(name) and name not in matrices]
    kept = tuple(name.removesuffix(".weight") for name in others)
    group = best_group([t.shape[1] for t in matrices.values()])
    q = Quantization(4, group, lm_head_bits=4, modules_16_bit=kept)
    packed = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        packed |= quantize_weight(module, tensor, q) if name in matrices else {name: tensor}
    return packed, q


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Raises BadInput for a directory that is no 16-bit head."""
    source, output = find_checkpoint(args.head, HEAD_FLAG), args.output
    if any(source.glob("model*.safetensors*")) and stored_quantization(weight_files(source)) is not None:
        raise BadInput(f"{source}: is quantized already")
    if (source / "mask_embedding.pt").exists():
        raise BadInput(f"{source}: mask_embedding.pt: a mask of its own is not implemented")
    if output.exists():
        raise BadInput(f"{output} is there already")
    read_json(source / "config.json", required=True)
    tensors = renamed(read_head(source), str(source / "config.json"))
    if not {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= tensors.keys():
        raise BadInput(f"{source}: the weights are those of no head")
    packed, q = pack({name: tensor.contiguous() for name, tensor in tensors.items()})
    try:
        output.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"{output} cannot be made: {error}") from None
    metadata = {"format": "pt", "gpt_spec": json.dumps(asdict(q))}
    save_file(packed, output / "model.safetensors", metadata=metadata)
    shutil.copy(source / "config.json", output / "config.json")
    size = (output / "model.safetensors").stat().st_size
    print(f"wrote {output}: {size / 1e6:.1f} MB, groups of {q.group}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line -> exit status."""
    p = OneLineParser(
        "scripts/pack_head.py", description="Write a head in 4 bits: its matrices, rounded to nearest."
    )
    p.add_argument("head", metavar="HEAD", help="a directory or a hub repository id")
    p.add_argument("output", metavar="OUTPUT", type=Path, help="a directory that is not there yet")
    return process.exit_status(lambda: run(p.parse_args(argv)), BadInput)


if __name__ == "__main__":
    sys.exit(process.run(main))
