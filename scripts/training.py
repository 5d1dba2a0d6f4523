"""training.py: what the trainers of this folder have in common, for models and for heads.

    for step, guess in enumerate(unroll(head, tokens, states, 5)): ...     # a head, drafting along a text
    notes = fit(model, loss, steps, Path("state.pt"), 500, judge)          # goes on where it was killed

The one idea: a head is trained as it drafts. Every row of a text begins a draft of several tokens, all rows
at once. A row sees the true features up to its own, and of what was drafted, its own chain alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eagle import EagleHead  # noqa: E402
from model import BadInput, ModelConfig, causal_attention  # noqa: E402

BLOCK = 512  # rows whose scores are in memory together


# ---- heads that draft along a text ---------------------------------------------------------------


def unroll(head: EagleHead, tokens: Tensor, states: Tensor, steps: int) -> Iterator[Tensor]:
    """What a head guesses in each of `steps` steps of a draft that begins at every row of a text.

    tokens: int64 [B, n]; states [B, n, .]: what the target yields for the head. Row p of step i is given
    token p + 1 + i of the text, as if it had drafted that itself, and stands at position p + i. It guesses
    the feature of position p + 1 + i, and so token p + 2 + i -> [B, n - 1 - i, hidden], step by step.
    """
    past, features = [], head.fuse(states[:, :-1])  # [B, n - 1, hidden]
    for i in range(min(steps, tokens.shape[1] - 1)):
        given = tokens[:, 1 + i :]  # [B, n - 1 - i]
        rows = given.shape[1]
        positions = torch.arange(i, i + rows, device=tokens.device).expand_as(given)
        features = head(given, features[:, :rows], positions, partial(unrolled_attention, past))
        yield features


def unrolled_attention(
    past: list[tuple[Tensor, Tensor]], layer: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention of step len(past) of `unroll`. A row sees the rows of step 0 up to its own, and its own row
    of every step since then. The head has one layer.

    q: [B, n, H, D]; k, v: [B, n, G, D], which are added to `past`; rows beyond n of older ones are not seen.
    """
    past.append((k, v))
    if len(past) == 1:
        return causal_attention(0, q, k, v)
    n = q.shape[1]
    # Of each step but the first, the rows' own: [B, n, steps, G, D].
    own = [torch.stack([part[:, :n] for part in parts], dim=2) for parts in zip(*past[1:])]
    # Where there are several blocks, scores are computed again for the gradient, not kept.
    attend = partial(checkpoint, attend_rows, use_reentrant=False) if n > BLOCK else attend_rows
    blocks = []
    for begin in range(0, n, BLOCK):
        rows, end = slice(begin, begin + BLOCK), min(begin + BLOCK, n)
        blocks.append(attend(q[:, rows], *(t[:, :end] for t in past[0]), *(t[:, rows] for t in own), begin))
    return torch.cat(blocks, dim=1)


def attend_rows(
    q: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, begin: int
) -> Tensor:
    """Rows begin, begin + 1, ... of `unrolled_attention`: q [B, m, H, D] -> [B, m, H, D].

    keys, values: [B, begin + m, G, D], causal; own_keys, own_values: [B, m, steps, G, D], a row's own.
    One softmax over both kinds of scores.
    """
    m, end = q.shape[1], keys.shape[1]
    q = q.unflatten(2, (keys.shape[2], -1)) * q.shape[-1] ** -0.5  # [B, m, G, H / G, D]
    before = torch.einsum("bmghd,bkgd->bghmk", q, keys).float()  # [B, G, H / G, m, end]
    unseen = torch.ones(m, end, dtype=torch.bool, device=q.device).triu(begin + 1)
    own = torch.einsum("bmghd,bmsgd->bghms", q, own_keys).float()  # [B, G, H / G, m, steps]
    scores = torch.cat((before.masked_fill(unseen, -torch.inf), own), dim=-1)
    before, own = scores.softmax(-1).to(values.dtype).split((end, own.shape[-1]), dim=-1)
    out = torch.einsum("bghmk,bkgd->bmghd", before, values)
    return (out + torch.einsum("bghms,bmsgd->bmghd", own, own_values)).flatten(2, 3)


# ---- the loop ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Learning rates at their highest."""

    muon: float = 0.02  # of the matrices inside the layers
    adamw: float = 0.004  # of all else


def build_optimizers(model: torch.nn.Module, rates: Rates) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, lm_head and norms."""
    trained = trained_parameters(model)
    outside = ("embed_tokens.", "lm_head.")
    matrices = [p for name, p in trained.items() if p.ndim == 2 and not name.startswith(outside)]
    others = [p for p in trained.values() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=rates.muon, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=rates.adamw, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def silence(model: torch.nn.Module) -> None:
    """Have fresh layers add nothing to the residual stream."""
    for name, parameter in model.named_parameters():
        if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
            torch.nn.init.zeros_(parameter)


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Without what a head borrows from its target, which is frozen."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def schedule(step: int, steps: int) -> float:
    """Warm up over 100 steps, or a seventh of all, stay, and go down to nothing over the last half."""
    warm = max(min(100, steps // 7), 1)
    return min(1.0, (step + 1) / warm, 2 * (steps - step) / steps)


def fit(
    model: torch.nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    path: Path,
    every: int,
    judge: Callable[[int, float, list[Any]], Any],
    rates: Rates = Rates(),
    settings: dict[str, Any] | None = None,
) -> list[Any]:
    """Take all steps of a training, or those that an interrupted one has left -> what `judge` has noted.

    loss(step): of the batch of a step, which is a function of its number. Every so many steps and at the end
    judge(steps done, mean loss since the last time, notes so far) notes how good the model is, and the state
    goes to `path`. `settings` are kept with it: BadInput for a state of other ones.
    """
    optimizers = build_optimizers(model, rates)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first, notes = load_state(path, model, optimizers, settings)
    total, count = 0.0, 0
    bar = tqdm(range(first, steps), "training", steps, initial=first, unit="step", disable=None)
    for step in bar:
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * schedule(step, steps)
            optimizer.zero_grad()
        value = loss(step)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        total, count = total + value.item(), count + 1
        bar.set_postfix(loss=f"{total / count:.3f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            notes = [*notes, judge(step + 1, total / count, notes)]
            save_state(path, model, optimizers, step + 1, notes, settings)
            total, count = 0.0, 0
    return notes


def save_state(path, model, optimizers, step: int, notes: list[Any], settings: dict[str, Any] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach() for name, p in trained_parameters(model).items()}
    state = {"model": weights, "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(state | {"notes": notes, "settings": settings}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_state(path, model, optimizers, settings: dict[str, Any] | None) -> tuple[int, list[Any]]:
    """Bring back a state, if there is one -> (steps that are done, notes)."""
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in (settings or {}).items():
        if (kept := state["settings"].get(name)) != value:
            was = f"is of a training with {name} {kept}, not {value}"
            raise BadInput(f"{path} {was}; remove it to begin anew")
    with torch.no_grad():
        for name, p in trained_parameters(model).items():
            p.copy_(state["model"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    print(f"going on at step {state['step']}", file=sys.stderr)
    return state["step"], state["notes"]


# ---- the Hugging Face layout ---------------------------------------------------------------------


def config_json(c: ModelConfig) -> dict[str, Any]:
    """The shape of a model or a head in a config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
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
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights, the floats among them in bf16, and their config.json. An old file is there until the
    new one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        name: t.detach().to("cpu", torch.bfloat16 if t.is_floating_point() else t.dtype).clone()
        for name, t in tensors.items()
    }
    save_file(kept, folder / "new.safetensors", metadata={"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {folder}: {sum(t.numel() for t in kept.values()) / 1e6:.2f} M parameters", file=sys.stderr)
