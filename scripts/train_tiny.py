"""Train the models that ship in models/ from the source of the Python standard library.

    python scripts/train_tiny.py tokenizer      # models/*/tokenizer.model, held-out prompts     seconds
    python scripts/train_tiny.py target         # models/python-7m: 8 layers of width 256        about an hour
    python scripts/train_tiny.py small          # models/python-1m: 2 layers of width 128        20 minutes
    python scripts/train_tiny.py target-eagle   # models/python-7m-eagle: its EAGLE-2 head        40 minutes
    python scripts/train_tiny.py small-eagle    # models/python-1m-eagle: the small model's       10 minutes
    python scripts/train_tiny.py prompts        # .training/prompts.jsonl, for train_head.py        seconds

In this order, on two CPU cores; a GPU is used where there is one. An interrupted run resumes from
`.training/`.

The one idea: a drafter is good when it guesses what the *target* says, so the small model is not trained on
the text but on the target's distribution over the text (distillation), and so are the EAGLE heads, on what
they will see when they draft: first the target's features, then their own guesses of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eagle import EagleHead  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

sys.path.insert(0, str(ROOT / "scripts"))
from training import config_json, fit, silence, unroll, write_folder  # noqa: E402

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
STATE = ROOT / ".training"
VOCABULARY, SEQUENCE, BATCH = 4096, 512, 8
BOS, EOS = 1, 2
IDS = {"bos_token_id": BOS, "eos_token_id": EOS}

SHAPES = {
    "target": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "small": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
    },
}
FOLDERS = {"target": ROOT / "models" / "python-7m", "small": ROOT / "models" / "python-1m"}
HEADS = {f"{kind}-eagle": folder.with_name(f"{folder.name}-eagle") for kind, folder in FOLDERS.items()}
STEPS = {"target": 6000, "small": 4000, "target-eagle": 2000, "small-eagle": 700}
FEATURE_WEIGHT = 1.0  # of the loss of features; that of the distributions has 1
UNROLL = 3  # of a head: one row from the target's features and two from its own guesses

# Modules that no model has seen; files test_<name>.py are left out as well.
HELD_OUT = [
    "argparse", "base64", "bisect", "calendar", "cmd", "colorsys", "configparser", "contextlib", "copy",
    "csv", "dataclasses", "difflib", "fileinput", "fnmatch", "fractions", "getopt", "glob", "graphlib",
    "gzip", "heapq", "inspect", "mailbox", "netrc", "optparse", "pprint", "queue", "random", "sched",
    "shlex", "shutil", "statistics", "string", "tabnanny", "textwrap", "timeit", "uuid", "wave",
]  # fmt: skip

NOTICE = """The prompts in held_out.jsonl are the beginnings of classes and functions of modules of the Python
standard library, Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved. They are used under
the PSF License Agreement, https://docs.python.org/3/license.html, which is why this notice is here. The
models in this folder were trained on the rest of the same library by scripts/train_tiny.py.
"""


# ---- text ----------------------------------------------------------------------------------------


def read_library() -> tuple[list[str], list[str], dict[str, str]]:
    """(library modules, test modules, held-out modules by name), without character tables."""
    library, tests, held_out = [], [], {}
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY).parts
        if {"site-packages", "encodings", "__pycache__", "cjkencodings"} & set(
            parts
        ) or "_sysconfigdata" in path.name:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if parts in [(f"{name}.py",) for name in HELD_OUT]:
            held_out[path.stem] = text
        elif {"test", "tests", "idle_test"} & set(parts):
            if path.stem.removeprefix("test_") not in HELD_OUT:
                tests.append(text)
        else:
            library.append(text)
    return library, tests, held_out


def train_tokenizer() -> None:
    """A SentencePiece BPE that loses nothing: byte fallback, no normalisation, indentation as pieces."""
    library, _, held_out = read_library()
    for folder in FOLDERS.values():
        folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in library for line in text.split("\n") if line),
        model_prefix=str(FOLDERS["target"] / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        character_coverage=0.9995,
        max_sentence_length=4192,
        num_threads=2,
    )
    (FOLDERS["target"] / "tokenizer.vocab").unlink()
    shutil.copy(FOLDERS["target"] / "tokenizer.model", FOLDERS["small"])
    write_prompts(held_out)


def beginnings(text: str) -> list[str]:
    """Prompts of up to 17 lines of a module, each ending where the body of a function begins."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line.lstrip().startswith("def ") and line.endswith(":")]
    return ["\n".join(lines[i - 16 : i + 1]) + "\n" for i in starts if i > 30]


def write_prompts(held_out: dict[str, str]) -> None:
    """models/held_out.jsonl: two prompts per module that no model has seen."""
    lines = []
    for name, text in held_out.items():
        found = beginnings(text)
        chosen = (found[len(found) // 3], found[2 * len(found) // 3]) if len(found) > 2 else found[:2]
        lines += [json.dumps({"module": name, "prompt": prompt}) for prompt in chosen]
    (ROOT / "models" / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    (ROOT / "models" / "NOTICE").write_text(NOTICE)
    print(f"{len(lines)} prompts from {len(held_out)} held-out modules")


def write_training_prompts() -> None:
    """.training/prompts.jsonl: every third beginning in the library, for train_head.py."""
    prompts = [prompt for text in read_library()[0] for prompt in beginnings(text)][::3]
    STATE.mkdir(exist_ok=True)
    path = STATE / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    print(f"{path}: {len(prompts)} prompts from modules that the models have seen")


def load_tokens() -> tuple[Tensor, Tensor]:
    """(training tokens, held-out tokens), int64 [n]. Modules start with BOS; the library is there twice."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(FOLDERS["target"] / "tokenizer.model"))
    library, tests, held_out = read_library()

    def encode(texts: list[str]) -> list[int]:
        return [token for ids in tokenizer.encode(texts, add_bos=True, num_threads=2) for token in ids]

    return torch.tensor(2 * encode(library) + encode(tests)), torch.tensor(encode(list(held_out.values())))


# ---- training ------------------------------------------------------------------------------------


def build_model(kind: str) -> Transformer:
    config = ModelConfig(
        vocab_size=VOCABULARY, head_dim=64, max_context=2 * SEQUENCE, tied_embeddings=True, **SHAPES[kind]
    )
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.02)
    silence(model)
    return model


def fresh_head(target: Transformer) -> EagleHead:
    torch.manual_seed(0)
    head = EagleHead(replace(target.config, num_layers=1))
    silence(head)
    return head.attach(target)


def sample_batch(tokens: Tensor, step: int, steps: int) -> Tensor:
    """int64 [B, n + 1]: a function of the step, so that a resumed run sees what it would have seen.

    n is SEQUENCE and, for the last tenth of the steps, twice that: enough to learn the longer context.
    """
    n = 2 * SEQUENCE if step >= 0.9 * steps else SEQUENCE
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(tokens) - n - 1, (BATCH * SEQUENCE // n,), generator=generator)
    return torch.stack([tokens[i : i + n + 1] for i in starts.tolist()])


def make_loss(model: Transformer, teacher: Transformer | None):
    """Cross-entropy with the text or, given a teacher, with the teacher's distribution over the text."""
    device = next(model.parameters()).device.type

    def loss(batch: Tensor) -> Tensor:
        inputs, labels = batch[:, :-1], batch[:, 1:].flatten()  # [B, n], [B n]
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model.lm_head(model.recompute(inputs)).flatten(0, 1).float()  # [B n, vocabulary]
            if teacher is not None:
                with torch.no_grad():
                    labels = teacher.lm_head(teacher.recompute(inputs)).flatten(0, 1).float().softmax(-1)
        return F.cross_entropy(logits, labels)

    return torch.compile(loss, dynamic=False)


def make_head_loss(head: EagleHead, target: Transformer):
    """SmoothL1 between guessed and true features, as the authors do, and cross-entropy with the target.

    Theirs weighs 0.1, and their rows all start from true features (with a little noise); EAGLE-3 showed what
    unrolling is worth.
    """
    device = next(head.parameters()).device.type

    def loss(batch: Tensor) -> Tensor:
        inputs, total = batch[:, :-1], 0.0  # [B, n]
        with torch.autocast(device, dtype=torch.bfloat16):
            with torch.no_grad():
                truth = target.recompute(inputs)  # [B, n, hidden]
                labels = target.lm_head(truth).float().softmax(-1)  # [B, n, vocabulary]
            for i, guess in enumerate(unroll(head, inputs, truth, UNROLL), start=1):
                logits = head.logits(guess).flatten(0, 1).float()  # [B (n - i), vocabulary]
                total = total + F.cross_entropy(logits, labels[:, i:].flatten(0, 1))
                total = total + FEATURE_WEIGHT * F.smooth_l1_loss(guess.float(), truth[:, i:].float())
        return total / UNROLL

    return torch.compile(loss, dynamic=False)


@torch.no_grad()
def evaluate_head(head: EagleHead, target: Transformer, tokens: Tensor) -> list[float]:
    """Share of tokens where the head's first choice is the target's, for 1, 2, ... unrolled steps."""
    device, right, count = next(head.parameters()).device, [0] * UNROLL, 0
    rows = SEQUENCE - UNROLL  # that have all steps
    for window in tokens[: 40 * SEQUENCE].view(-1, SEQUENCE).to(device).split(BATCH):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            truth = target.recompute(window)
            labels = target.lm_head(truth).argmax(-1)  # [B, n]
            for i, guess in enumerate(unroll(head, window, truth, UNROLL)):
                chosen = head.logits(guess[:, :rows]).argmax(-1)
                right[i] += (chosen == labels[:, 1 + i : 1 + i + rows]).sum().item()
        count += len(window) * rows
    return [n / count for n in right]


@torch.no_grad()
def evaluate(model: Transformer, tokens: Tensor) -> tuple[float, float]:
    """(loss in nats per token, share of tokens that are the first choice); windows of SEQUENCE tokens."""
    device, total, right, count = next(model.parameters()).device, 0.0, 0, 0
    for window in tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE).to(device).split(BATCH):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = (
                model.lm_head(model.recompute(window))[:, :-1].flatten(0, 1).float()
            )  # [B (n - 1), vocabulary]
        labels = window[:, 1:].flatten()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        count += len(labels)
    return total / count, right / count


def train(kind: str, steps: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, held_out = load_tokens()
    print(f"{len(tokens) / 1e6:.1f} M training tokens, {len(held_out) / 1e6:.2f} M held out")
    if kind in HEADS:
        target = load_shipped(kind.removesuffix("-eagle")).to(device).requires_grad_(False)
        model = fresh_head(target).to(device)
        loss, judge = make_head_loss(model, target), lambda: evaluate_head(model, target, held_out)
    else:
        model = build_model(kind).to(device)
        teacher = load_shipped("target").to(device).requires_grad_(False) if kind == "small" else None
        loss, judge = make_loss(model, teacher), lambda: evaluate(model, held_out)

    def batch_loss(step: int) -> Tensor:
        return loss(sample_batch(tokens, step, steps).to(device))

    def note(step: int, mean_loss: float, _: list[str]) -> str:
        line = f"step {step}: loss {mean_loss:.3f}, held out {[round(value, 3) for value in judge()]}"
        print(line, flush=True)
        return line

    fit(model, batch_loss, steps, STATE / f"{kind}.pt", 500, note)
    save_head(kind, model) if kind in HEADS else save_shipped(kind, model)


# ---- the Hugging Face layout ---------------------------------------------------------------------


def save_shipped(kind: str, model: Transformer) -> None:
    folder = FOLDERS[kind]
    write_folder(
        folder, model.checkpoint_tensors(), config_json(model.config) | IDS | {"tie_word_embeddings": True}
    )
    tokenizer = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    # In the training text it is the BOS of the next module that ends a module.
    files = {"generation_config": {"eos_token_id": [BOS, EOS]}, "tokenizer_config": tokenizer}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def save_head(kind: str, head: EagleHead) -> None:
    """The published EAGLE-2 layout, but in safetensors and without the copy of the target's embedding."""
    del head.embed_tokens, head.lm_head  # the target's
    write_folder(HEADS[kind], head.checkpoint_tensors(), config_json(head.config) | IDS | {"bias": False})


def load_shipped(kind: str) -> Transformer:
    model = build_model(kind)
    views = model.checkpoint_tensors()
    for name, tensor in load_file(FOLDERS[kind] / "model.safetensors").items():
        views[name].copy_(tensor)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tokenizer", "prompts", *STEPS])
    parser.add_argument("--steps", type=int, help=f"steps of {BATCH} x {SEQUENCE} tokens (default: {STEPS})")
    args = parser.parse_args()
    if args.what == "tokenizer":
        train_tokenizer()
    elif args.what == "prompts":
        write_training_prompts()
    else:
        train(args.what, args.steps or STEPS[args.what])


if __name__ == "__main__":
    main()
