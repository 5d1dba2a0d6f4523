"""Fixtures shared by the tests: tiny random models, and where the shipped and the shared files are."""

import builtins
import copy
import importlib
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, whose threads would wait for each other
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():  # Triton looks once, when it is imported: kernels_cuda.py runs on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import costs  # noqa: E402
import kernels  # noqa: E402
import quantize  # noqa: E402
from dflash import Block, BlockHead  # noqa: E402
from eagle import EagleHead  # noqa: E402
from gpt_spec import generate  # noqa: E402
from model import BadInput, ModelConfig, Transformer  # noqa: E402
from sampling import Sampling  # noqa: E402
from text import load_tokenizer  # noqa: E402

NEEDS_EQUAL_ROWS = pytest.mark.skipif(
    kernels.PATH == "reference", reason="the reference is not row-invariant"
)
SHARED = ROOT.parent / "shared"
SHIPPED_TARGET, SHIPPED_SMALL = ROOT / "models" / "python-7m", ROOT / "models" / "python-1m"
SHIPPED_HEAD, SMALL_HEAD = ROOT / "models" / "python-7m-eagle", ROOT / "models" / "python-1m-eagle"


def find_repetition(text: Tensor, length: Tensor, ngram: int, count: int) -> tuple[Tensor, Tensor]:
    """The slow twin of `TextIndex`: what followed the longest suffix of up to `ngram` tokens.

    text: int64 [B, slots], whose last token is text[length] -> root and `count` tokens int64 [B, count + 1],
    found bool [B]. What follows a place close to the end is read in a loop: a text that repeats goes
    on repeating.
    """
    place = torch.arange(text.shape[1], device=text.device)
    matched, score = place < length[:, None], torch.zeros_like(text)  # [B, slots] each
    for i in range(ngram):  # matched: the i + 1 tokens that end here are the last i + 1 tokens of the text
        last = text.gather(1, (length[:, None] - i).clamp(min=0))  # [B, 1]
        matched = matched & (text.roll(i, dims=1) == last) & (place >= i) & (length[:, None] >= i)
        score = score + matched
    best, place = torch.where(score > 0, score * text.shape[1] + place, -1).max(dim=1)  # [B] each
    period = (length - place).clamp(min=1)[:, None]  # [B, 1]
    index = place[:, None] + 1 + torch.arange(count, device=text.device) % period  # [B, count]
    root = text.gather(1, length[:, None])
    return torch.cat((root, text.gather(1, index)), dim=1), best >= 0


def random_model(seed: int = 0, sharpness: float = 6.0, **changes) -> Transformer:
    """A tiny fp32 model. `sharpness` widens its logits: sampling at temperature 1 is then not uniform
    noise."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 2,
        "max_context": 256,
    }
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 12}
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(sizes | heads | changes))).requires_grad_(False)
    model.lm_head.weight *= sharpness
    return model


def noisy_copy(model: Transformer, noise: float = 0.2) -> Transformer:
    """A model that agrees with the given one at some positions and not at others."""
    torch.manual_seed(99)
    noisy = copy.deepcopy(model)
    for parameter in noisy.parameters():
        parameter += noise * torch.randn_like(parameter) * parameter.abs().mean()
    return noisy


def guessing_head(target: Transformer, noise: float = 0.3) -> EagleHead:
    """An EAGLE-2 head that is often right: what these targets say hangs mostly on the last token.

    Without noise it guesses that the next feature is the embedding of the token, plus a little.
    """
    torch.manual_seed(98)
    head, size = EagleHead(replace(target.config, num_layers=1)), target.config.hidden_size
    head = head.requires_grad_(False)
    guess = torch.cat((torch.eye(size), torch.zeros(size, size)), dim=1)
    head.fc.weight.copy_(guess + noise * torch.randn(size, 2 * size) / size**0.5)
    like = target.norm.weight
    return head.to(like.device, like.dtype).pack().attach(target)


def guessing_block_head(target: Transformer, shifted: bool, noise: float = 0.2, size: int = 5) -> BlockHead:
    """A block head whose first guess is often right, for the reason that `guessing_head` has. Without noise
    its only layer copies the embedding of the root to all places, whose own ones are 0."""
    torch.manual_seed(97)
    c, hidden = target.config, target.config.hidden_size
    heads = {"num_heads": c.num_heads, "num_kv_heads": c.num_heads, "head_dim": hidden // c.num_heads}
    taps, mask = (1, c.num_layers - 1), 0
    block = Block(taps, size, mask, shifted, (shifted,), (8,), own_embedding=True)
    head = BlockHead(replace(c, num_layers=1, **heads), block).requires_grad_(False)
    attention, eye = head.layers[0].self_attn, torch.eye(hidden)
    torch.manual_seed(97)  # what came before depends on the vocabulary
    for weight in (head.fc.weight, attention.qkv_proj.weight, attention.o_proj.weight):
        weight.copy_(noise * torch.randn_like(weight) / hidden**0.5)
    attention.qkv_proj.weight[2 * hidden :] += eye
    attention.o_proj.weight += 8 * eye
    head.layers[0].mlp.down_proj.weight *= noise
    head.hidden_norm.weight *= noise  # what is known of the text before
    head.embed_tokens.weight.copy_(target.embed_tokens.weight)
    head.embed_tokens.weight[mask] = 0
    like = target.norm.weight
    return head.to(like.device, like.dtype).pack().attach(target)


def random_prompts(lengths: list[int], vocab_size: int = 61) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def held_out_prompts(count: int) -> list[list[int]]:
    """The first prompts that ship with the repository, in the tokens of the shipped models."""
    lines = (ROOT / "models" / "held_out.jsonl").read_text().splitlines()[:count]
    return [load_tokenizer(SHIPPED_TARGET).encode(json.loads(line)["prompt"]) for line in lines]


def pick(logits, positions, seed, sampling) -> torch.Tensor:
    """The tokens at `positions` where there is no text: by temperature and filters alone. Shapes as in
    `kernels.pick`."""
    settings = torch.tensor([sampling.settings], dtype=torch.float64)
    return kernels.pick(logits.float(), positions, seed, settings.expand(len(logits), -1))


def hide_module(monkeypatch, name: str) -> None:
    """From here on the module of this name cannot be imported."""
    true_import = builtins.__import__

    def without(wanted, *rest, **more):
        if wanted.partition(".")[0] == name:
            raise ImportError(wanted)
        return true_import(wanted, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)


def texts(model, prompts, drafter=None, sampling=Sampling(), max_new_tokens=40, **options) -> list[list[int]]:
    """What `generate` says after every prompt; uncompiled, unless asked for."""
    options.setdefault("compile", False)
    return collect(generate(model, prompts, drafter, sampling, max_new_tokens, **options), len(prompts))


def run_main(main, *flags: str) -> SimpleNamespace:
    """A program in this process: its `returncode`, `stdout` and `stderr`."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main([*flags])
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def collect(steps, prompts: int) -> list[list[int]]:
    """The new tokens of so many prompts, from the emissions of all steps."""
    out = [[] for _ in range(prompts)]
    for emissions in steps:
        for emission in emissions:
            out[emission.prompt_index] += emission.tokens
    return out


def time_one_step(level, drafter, n: int) -> list[float]:
    """`costs.time_steps`, but one of them. By the stopwatch that all processes of a model share."""
    level.state.length.fill_(min(level.setup.slots // 2, level.setup.slots - level.drafter.slack))
    watch = level.setup.runtime.stopwatch()
    draft = drafter.propose(level.state, n)
    draft.max_depth = level.drafter.max_depth(draft.tokens.shape[1])
    level.commit(draft)
    return [watch.seconds]


@pytest.fixture(scope="session", autouse=True)
def few_steps_are_timed(tmp_path_factory):
    """Costs are measured with one step at a time, not ten: what matters here is that they are measured. They
    do not go where a user's are kept."""
    program, folder = importlib.import_module("generate"), tmp_path_factory.mktemp("costs")
    usual = program.costs_file

    def costs_file(*of) -> Path:
        return usual(*of) if "XDG_CACHE_HOME" in os.environ else folder / usual(*of).name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "time_steps", time_one_step)
        patch.setattr("benchmarks.compare.LEAST", 0.0)
        patch.setattr(program, "costs_file", costs_file)
        yield


@pytest.fixture(scope="session")
def target() -> Transformer:
    return random_model()


@pytest.fixture(scope="session")
def deep() -> Transformer:
    """A target of 8 layers, whose states 2, 4 and 5 an EAGLE-3 head reads."""
    return random_model(num_layers=8)


@pytest.fixture(scope="session")
def held_out() -> list[list[int]]:
    """The modules that the shipped models have not seen, in their tokens."""
    try:
        return quantize.held_out_tokens(SHIPPED_TARGET)
    except BadInput:
        pytest.skip("this Python comes without the source of its library")


@pytest.fixture(scope="session")
def rotated_target(tmp_path_factory) -> Path:
    """The shipped target as `quantize.py --rotate` makes it."""
    output = tmp_path_factory.mktemp("rotated") / "target"
    assert quantize.main(["--checkpoint_path", str(SHIPPED_TARGET), "--rotate", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def shared() -> Path:
    """Tokenizers and prompts that CI has and a fresh clone elsewhere may not."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here; it lies beside the checkout in CI")
    return SHARED / "data"


def save_checkpoint(
    model: Transformer, directory: Path, dtype: torch.dtype = torch.float32, **config
) -> Path:
    """Write a tiny model as a Hugging Face directory, in the spelling of transformers 4."""
    c = model.config
    raw = {
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied_embeddings,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw | config))
    tensors = {name: view.to(dtype).clone() for name, view in model.checkpoint_tensors().items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change) -> None:
    """Have `change` alter the dictionary of all tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@torch.no_grad()
def logits(model: Transformer) -> torch.Tensor:
    """Of some text, float32 [1, 39, V], without a cache."""
    return model.lm_head(model.recompute(torch.arange(1, 40)[None])).float()
