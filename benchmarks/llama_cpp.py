"""llama_cpp.py: llama.cpp as a peer: its programs, what they print, and files for them.

    peer = LlamaCpp(find_llama_cpp("llama.cpp/build"), "model-q4_0.gguf")
    peer.run(550, new=64, runs=3)      # tokens per second of prefill and of decoding

The one idea: llama-bench already measures what we want, so its own numbers count. It has a new process for
every call, loads its model before its clocks start, and prints JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import BadInput, ModelConfig

PROGRAMS = {"llama-bench": ("llama-bench",), "llama-completion": ("llama-completion", "llama-cli")}
FACTS = ("build_commit", "build_number", "cpu_info", "model_type", "model_size", "n_threads")
GGUF_TYPES = {"w4": ("Q4_0", "Q6_K"), "w8": ("Q8_0", "Q8_0")}  # of layers; of embedding and lm_head
BLOCKS = {"Q4_0": (0, 5), "Q8_0": (0, 74), "Q6_K": (208, 18 * 74)}  # where a scale is; size of its integers


def find_llama_cpp(directory: str) -> dict[str, Path]:
    """llama-bench, and llama-completion or what did the same before it, in a directory or its bin/."""
    found = {}
    for name, spellings in PROGRAMS.items():
        places = [Path(directory, folder, file) for file in spellings for folder in ("", "bin")]
        found[name] = next((place.resolve() for place in places if place.is_file()), None)
    missing = [" or ".join(PROGRAMS[name]) for name, place in found.items() if place is None]
    if missing:
        raise BadInput(f"--llama_cpp: {directory} and its bin/ have no {', and no '.join(missing)}")
    return found


def run_program(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Its standard output. Raises BadInput with its last line where it fails."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    except OSError as error:
        raise BadInput(f"{name} cannot be run: {error}") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise BadInput(f"{name} failed with {done.returncode}: {last}")
    return done.stdout


def parse_llama_bench(text: str) -> tuple[dict[tuple[int, int, int], dict], dict[str, Any]]:
    """What `llama-bench -o json` prints -> its rows by (n_prompt, n_gen, n_depth), and facts of the build."""
    try:
        rows = json.loads(text)
        numbers = [{name: float(row[name]) for name in ("avg_ts", "stddev_ts")} for row in rows]
        keys = [(row["n_prompt"], row["n_gen"], row.get("n_depth", 0)) for row in rows]
        facts = {name: rows[0][name] for name in FACTS if name in rows[0]}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadInput(f"llama-bench: its output is not what it should be: {error!r}") from None
    return dict(zip(keys, numbers)), facts


class LlamaCpp:
    """llama-bench on the CPU, with as many threads as we have. `runs`: its repetitions, of which it gives the
    mean. It warms up before, but not where one run takes long."""

    def __init__(self, programs: dict[str, Path], gguf: str | Path):
        self.programs, self.gguf, self.facts = programs, str(Path(gguf).resolve()), {}
        self.threads = str(torch.get_num_threads())
        # What is set for our OpenMP is not meant for theirs: its barriers are slow where waiting is passive.
        ours = ("OMP_", "GOMP_", "KMP_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}

    def command(self, prompt: str, new: str, depth: int, runs: int, form: str = "json") -> list[str]:
        """`prompt`, `new`: numbers of tokens with commas, each a test of its own; 0 is none."""
        flags = {"-m": self.gguf, "-o": form, "-t": self.threads, "-ngl": 0, "-dev": "none"}
        flags |= {"-p": prompt, "-n": new, "-d": depth, "-r": runs}
        pairs = [str(part) for pair in flags.items() for part in pair]
        return [str(self.programs["llama-bench"]), *pairs, *(["--no-warmup"] if runs == 1 else [])]

    def speeds(self, prompt: str, new: str, depth: int, runs: int) -> dict[tuple[int, int, int], float]:
        """Tokens per second by numbers of prompt, new and earlier tokens."""
        output = run_program(self.command(prompt, new, depth, runs), self.environment)
        rows, self.facts = parse_llama_bench(output)
        return {key: row["avg_ts"] for key, row in rows.items()}

    def forwards(self, sizes: tuple[int, ...], depth: int, runs: int) -> dict[int, float]:
        """Seconds of a forward of n tokens, by n. It has the logits of the last one alone."""
        speeds = self.speeds(",".join(map(str, sizes)), "0", depth, runs)
        return {n: n / speeds[n, 0, depth] for n in sizes}

    def run(self, length: int, new: int, runs: int) -> tuple[float, float]:
        """Tokens per second of prefill, and of decoding after it."""
        prefill = self.speeds(str(length), "0", 0, runs)[length, 0, 0]
        return prefill, self.decode(length, new, runs)

    def decode(self, length: int, new: int, runs: int) -> float:
        return self.speeds("0", str(new), length, runs)[0, new, length]

    def copy(self, length: int, new: int) -> tuple[list[str], dict[str, str]]:
        """A long run, which prints a line when a short test is done."""
        tests = ",".join(["1", *10 * [str(new)]])
        return self.command("0", tests, length, 20, "jsonl"), self.environment

    def program(self, prompt: str, new: int) -> tuple[list[str], dict[str, str]]:
        """A program that loads the model and continues a text."""
        settings = ["-t", self.threads, "--temp", "0", "--ignore-eos", "-no-cnv", "-dev", "none"]
        command = [str(self.programs["llama-completion"]), "-m", self.gguf, "-p", prompt, "-n", str(new)]
        return command + settings, self.environment


# --------------------------------------------------------------------------------------------------
# Random weights
# --------------------------------------------------------------------------------------------------


@contextmanager
def random_gguf(config: ModelConfig, precision: str) -> Iterator[Path]:
    """A temporary GGUF of this shape."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "random.gguf")
        write_random_gguf(config, precision, path)
        yield path


def write_random_gguf(config: ModelConfig, precision: str, path: Path) -> None:
    """A Llama of random weights, without a vocabulary: layers in Q4_0, Q8_0 or bf16, and embedding and
    lm_head as llama-quantize makes them then."""
    if importlib.util.find_spec("gguf") is None:
        raise BadInput("without --gguf one of random weights is written, which needs: pip install gguf")
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    for name, value in settings_of(config).items():
        getattr(writer, f"add_{name}")(value)
    layer_kind, head_kind = GGUF_TYPES.get(precision[:2], ("BF16", "BF16"))
    for name, (out, inputs) in matrices_of(config).items():
        kind = layer_kind if name.startswith("blk.") else head_kind
        if kind == "Q6_K" and inputs % 256:  # the numbers of a block; llama-quantize falls back likewise
            kind = "Q8_0"
        data = random_blocks(kind, out, inputs)
        writer.add_tensor(f"{name}.weight", data.numpy(), raw_dtype=GGMLQuantizationType[kind])
    norms = [f"blk.{i}.{part}_norm" for i in range(config.num_layers) for part in ("attn", "ffn")]
    for name in ("output_norm", *norms):
        writer.add_tensor(f"{name}.weight", torch.ones(config.hidden_size).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """The names are those of the methods of `GGUFWriter`. Scaled RoPE costs what plain RoPE does."""
    return {
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "head_count": config.num_heads,
        "head_count_kv": config.num_kv_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_theta,
        "layer_norm_rms_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "no_vocab",
    }


def matrices_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every matrix, by its name in a GGUF."""
    width, inside = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "attn_q": (heads, width),
        "attn_k": (kv_heads, width),
        "attn_v": (kv_heads, width),
        "attn_output": (width, heads),
        "ffn_gate": (inside, width),
        "ffn_up": (inside, width),
        "ffn_down": (width, inside),
    }
    ends = {"token_embd": (config.vocab_size, width)}
    ends |= {} if config.tied_embeddings else {"output": (config.vocab_size, width)}
    return ends | {f"blk.{i}.{name}": s for i in range(config.num_layers) for name, s in layer.items()}


def random_blocks(kind: str, out: int, inputs: int) -> Tensor:
    """uint8 [out, bytes of a row]: random integers, with scales that keep states at about their size."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind == "BF16":
        return (torch.randn(out, inputs) / inputs**0.5).bfloat16().view(torch.uint8)
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    place, largest = BLOCKS[kind]
    blocks = torch.randint(0, 256, (out, inputs // numbers, size), dtype=torch.uint8)
    scale = torch.tensor([1 / largest / inputs**0.5], dtype=torch.float16)
    blocks[:, :, place : place + 2] = scale.view(torch.uint8)
    return blocks.flatten(1)
