"""train_head.py: an EAGLE-3 or block head for any target that loads here, quantized ones included.

    python scripts/train_head.py --checkpoint_path DIR --precision w4a16 --data PROMPTS.jsonl --output HEAD
    python scripts/train_head.py ... --tokens 2000000 --steps 0        # the target's own answers alone
    python scripts/train_head.py ... --kind dflash --block_size 8      # a block head: block_training.py
    python generate.py --checkpoint_path DIR --precision w4a16 --method tree --eagle_checkpoint_path HEAD

First the target answers the prompts (`answers.py`), then the head learns from what it wrote, on a CPU or a
GPU. Both stages go on where they stopped when the same command is given again. HEAD is in the layout of
SpecForge, or of z-lab for --kind dflash, with figures of the training in HEAD/training.jsonl.

The one idea: nothing is stored but tokens. The target, in the precision in which it will be served, runs in
the same process, batch by batch, so that the head learns from just what it will see.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import process  # noqa: E402

if __name__ == "__main__":
    process.begin()

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
from contextlib import AbstractContextManager  # noqa: E402
from dataclasses import dataclass, field, replace  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path.insert(0, str(ROOT / "scripts"))
from answers import AnswerFile, Text, read_data, write_answers  # noqa: E402
from block_training import (  # noqa: E402
    BlockLesson,
    block_loss,
    build_block_head,
    count_right_blocks,
    draw_anchors,
    teach_blocks,
    write_block_head,
)
from training import Rates, config_json, fit, silence, unroll, write_folder  # noqa: E402

from block_heads import default_block_taps  # noqa: E402
from chat import read_json  # noqa: E402
from checkpoints import ALL_PRECISIONS, find_checkpoint  # noqa: E402
from cli import OneLineParser, check_device, json_object, load_kernels  # noqa: E402
from dflash import Block  # noqa: E402
from eagle import Eagle3, Eagle3Head, EagleHead, choose_vocabulary, default_taps  # noqa: E402
from generate import Target, load_target  # noqa: E402
from model import BadInput, ModelConfig, Transformer, causal_attention, check_window  # noqa: E402

LEAST = {  # of flags that are whole numbers
    "max_new_tokens": 1, "batch_size": 1, "tokens": 1, "sequences": 1, "ttt_steps": 1, "ttt_every": 1,
    "every": 1, "layers": 1, "anchors": 1, "mask_token_id": 0, "steps": 0, "draft_vocab_size": 2,
    "block_size": 2,
}  # fmt: skip
DECAY = 0.8  # of the weight of the loss, from step to step of a draft
WINDOW = 16  # steps whose texts are sorted by length together
LABEL_ROWS = 1024  # whose logits over a vocabulary are in memory together
JUDGED = 40  # batches of held-out texts, at most
BLOCK_FLAGS = {"block_size": 8, "layers": 5, "anchors": 32, "mask_token_id": None}  # of block heads alone
ROPE_KEYS = (
    "rope_theta", "rope_scaling", "rope_parameters",
    "max_position_embeddings", "original_max_position_embeddings",
)  # fmt: skip


# ---- texts, in batches ---------------------------------------------------------------------------


@dataclass
class Batches:
    """Texts of about one length, so many together. A batch is a function of its number and the seed."""

    texts: list[Text]
    size: int
    seed: int
    plans: dict[int, list[list[int]]] = field(default_factory=dict)  # of the last epoch that was asked for

    @property
    def epoch(self) -> int:
        """Batches that have all texts."""
        return -(-len(self.texts) // self.size)

    def __getitem__(self, step: int) -> list[Text]:
        epoch, place = divmod(step, self.epoch)
        if epoch not in self.plans:
            self.plans = {epoch: self.plan(epoch)}
        return [self.texts[i] for i in self.plans[epoch][place]]

    def plan(self, epoch: int) -> list[list[int]]:
        """The texts of every batch of an epoch."""
        shuffle, order, batches = random.Random(self.seed + epoch).shuffle, [*range(len(self.texts))], []
        shuffle(order)
        for begin in range(0, len(order), WINDOW * self.size):
            part = order[begin : begin + WINDOW * self.size]
            part.sort(key=lambda i: len(self.texts[i].token_ids))
            batches += [part[i : i + self.size] for i in range(0, len(part), self.size)]
        shuffle(batches)
        return batches


def collate(texts: list[Text], longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B, n], padded behind, and which of them the target wrote, bool [B, n]."""
    n = min(max(len(text.token_ids) for text in texts), longest)
    tokens = torch.zeros(len(texts), n, dtype=torch.int64)
    answered = torch.zeros(len(texts), n, dtype=torch.bool)
    for b, text in enumerate(texts):
        ids = text.token_ids[:n]
        tokens[b, : len(ids)] = torch.tensor(ids)
        for begin, end in text.answers:
            answered[b, begin:end] = True
    return tokens.to(device), answered.to(device)


def can_teach(text: Text, longest: int, steps: int) -> bool:
    """Is there room for a whole draft, and in front of the last token that is read, an answer?"""
    n = min(len(text.token_ids), longest)
    return n >= steps + 3 and any(begin < min(end, n) for begin, end in text.answers if end > 1)


def split_texts(texts: list[Text], share: float) -> tuple[list[Text], list[Text]]:
    """(texts to learn from, held-out texts). Prompts are held out by their hash, with all of their samples,
    so that more data holds out the same ones, or nearly."""
    keys = sorted({text.prompt for text in texts})
    if len(keys) < 2:
        raise BadInput("--data: the answers are to a single prompt; one to learn from and one to hold out")
    held = set(keys[: min(max(round(share * len(keys)), 1), len(keys) - 1)])
    return [t for t in texts if t.prompt not in held], [t for t in texts if t.prompt in held]


# ---- the vocabulary ------------------------------------------------------------------------------


def answer_counts(texts: list[Text], vocabulary: int) -> Tensor:
    """How often the answers have each token, int64 [V]."""
    said = [token for text in texts for begin, end in text.answers for token in text.token_ids[begin:end]]
    return torch.tensor(said).bincount(minlength=vocabulary)


# ---- what the target teaches ---------------------------------------------------------------------


@dataclass
class Lesson:
    """What the target says about a batch. Position q is about the token that follows it, q + 1."""

    tokens: Tensor  # int64 [B, n]
    states: Tensor  # [B, n, taps * hidden]: what the head sees
    answered: Tensor  # bool [B, n]: the target wrote the token that follows
    taught: Tensor  # bool [B, n]: and would choose one there that the head can draft
    labels: Tensor  # float32 [rows, drafted]: its distribution over these, at the positions that are taught
    row: Tensor  # int64 [B, n]: which of the rows; only where it is taught


@torch.no_grad()
def teach(target: Transformer, taps: tuple[int, ...], ids: Tensor, tokens: Tensor, wrote: Tensor) -> Lesson:
    """ids: int64 [drafted]; tokens int64 [B, n]; wrote bool [B, n]: the target wrote the token."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    features, states = target(tokens, positions, causal_attention, taps)
    answered = F.pad(wrote[:, 1:], (0, 1))  # [B, n]
    draftable = torch.zeros(target.config.vocab_size, dtype=torch.bool, device=ids.device)
    draftable[ids] = True
    labels, known = [], []
    for rows in features[answered].split(LABEL_ROWS):
        logits = target.lm_head(rows[None])[0].float()  # [rows, V]
        known.append(draftable[logits.argmax(-1)])
        labels.append(logits[:, ids][known[-1]].softmax(-1))
    taught = answered.clone()
    taught[answered] = torch.cat(known)
    row = taught.flatten().cumsum(0).view_as(taught) - 1
    return Lesson(tokens, states, answered, taught, torch.cat(labels), row)


class LabelLoss(torch.autograd.Function):
    """Cross-entropies with given distributions, summed, and their gradients at the same time: logits exist
    for some rows at once. Those of all rows would fill the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, row: Tensor, learns: bool) -> Tensor:
        """x: [rows, hidden]; weight: [drafted, hidden]; their distributions are labels[row], float32"""
        total, to_x, to_weight = (
            x.new_zeros((), dtype=torch.float32),
            torch.empty_like(x),
            torch.zeros_like(weight),
        )
        small = weight.to(x.dtype)
        for part, places, slope_x in zip(x.split(LABEL_ROWS), row.split(LABEL_ROWS), to_x.split(LABEL_ROWS)):
            logs, wanted = (part @ small.T).float().log_softmax(-1), labels[places]  # [some, drafted]
            total -= torch.dot(wanted.flatten(), logs.flatten())
            if not learns:
                continue
            slope = logs.exp_().sub_(wanted).to(x.dtype)  # of the logits
            torch.mm(slope, small, out=slope_x)
            to_weight += slope.T @ part
        ctx.save_for_backward(to_x, to_weight)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_weight = ctx.saved_tensors
        return to_x * slope.to(to_x.dtype), to_weight * slope, None, None, None


def lesson_loss(head: Eagle3Head, lesson: Lesson, steps: int) -> Tensor:
    """The mean over answered tokens of every step of the draft, and the weighted mean over these steps."""
    total, weights = torch.zeros((), device=lesson.tokens.device), 0.0
    for i, guess in enumerate(unroll(head, lesson.tokens, lesson.states, steps)):
        taught = lesson.taught[:, 1 + i :]  # [B, n - 1 - i], as the rows of the guess
        x, row = head.norm(guess[taught]).to(guess.dtype), lesson.row[:, 1 + i :][taught]
        part = (x, head.lm_head.weight, lesson.labels, row, torch.is_grad_enabled())
        loss = LabelLoss.apply(*part)
        total = total + DECAY**i * loss / lesson.answered[:, 1 + i :].sum().clamp(min=1)
        weights += DECAY**i
    return total / weights


@torch.no_grad()
def count_right(head: Eagle3Head, lesson: Lesson, steps: int) -> tuple[int, list[int]]:
    """(drafts, those whose first 1, 2, ... tokens are all the text's). A draft is greedy, and begins at every
    row after which the target wrote so many tokens."""
    rows = lesson.tokens.shape[1] - 1 - steps
    begins = torch.stack([lesson.answered[:, 1 + i :][:, :rows] for i in range(steps)]).all(0)  # [B, rows]
    right, counts = torch.ones(int(begins.sum()), dtype=torch.bool, device=begins.device), []
    for i, guess in enumerate(unroll(head, lesson.tokens, lesson.states, steps)):
        drafted = head.draft_ids[head.logits(guess[:, :rows][begins][None])[0].argmax(-1)]
        right = right & (drafted == lesson.tokens[:, 2 + i :][:, :rows][begins])
        counts.append(int(right.sum()))
    return len(right), counts


# ---- the head ------------------------------------------------------------------------------------


def three_taps(layers: int) -> tuple[int, ...]:
    """As most published heads have them; in a target of few layers, three that differ."""
    if layers < 3:
        raise BadInput(f"the target has {layers} layers; an EAGLE-3 head needs 3, or other --taps")
    return default_taps(layers) if layers > 6 else (min(layers - 3, 1), layers // 2, layers - 1)


def tap_list(text: str) -> tuple[int, ...]:
    """The type of --taps."""
    try:
        taps = tuple(int(part) for part in text.split(","))
    except ValueError:
        taps = ()
    if not taps or list(taps) != sorted(set(taps)):
        raise argparse.ArgumentTypeError(f"{text!r} is no ascending list of layers like 2,16,29")
    return taps


@torch.no_grad()
def fresh_head(target: Transformer, taps: tuple[int, ...], ids: Tensor, seed: int) -> Eagle3Head:
    """A head that adds nothing yet to what `fc` makes of the states, mostly of the last. It learns fast from
    there: states have norms, since they differ in size; every head of attention has keys and values of its
    own, through which alone the token comes in; queries and keys are equal, so that a row sees itself first;
    and guesses are flat."""
    torch.manual_seed(seed)
    c, like = target.config, target.norm.weight
    plain = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False, "sliding_window": None}
    config = replace(c, num_layers=1, num_kv_heads=c.num_heads, tied_embeddings=False, **plain)
    switches = Eagle3(taps, c.hidden_size, len(ids), fc_norm=True, norm_before_residual=True)
    head = Eagle3Head(config, switches)
    silence(head)
    head.draft_ids = ids
    head = head.to(like.device)
    head.fc.weight.mul_(0.3)[:, -c.hidden_size :] += torch.eye(c.hidden_size, device=like.device)
    queries, keys, _ = head.layers[0].self_attn.qkv_proj.weight.chunk(3)  # [hidden, 2 hidden] each
    keys.copy_(queries.normal_(std=(2 * c.hidden_size) ** -0.5))
    head.norm.weight.copy_(like).mul_(0.25)
    head.lm_head.weight.copy_(lm_head_rows(target, ids))
    return head.attach(target)


@torch.no_grad()
def lm_head_rows(target: Transformer, ids: Tensor) -> Tensor:
    """Rows of the target's lm_head, float32 [drafted, hidden], however it is stored: its logits of a state
    with a single 1 are a column."""
    like = target.norm.weight
    states = torch.eye(target.config.hidden_size, dtype=like.dtype, device=like.device)
    columns = [target.lm_head(rows[None])[0][:, ids].float() for rows in states.split(LABEL_ROWS)]
    return torch.cat(columns).T


def write_head(folder: Path, head: Eagle3Head, taps: tuple[int, ...], raw: dict[str, Any]) -> None:
    """The layout of SpecForge. `raw`: the config.json of the target, for its RoPE."""
    borrowed = ("embed_tokens.", "model.embed_tokens.")
    tensors = {
        name.replace("layers.0.", "midlayer."): tensor
        for name, tensor in head.checkpoint_tensors().items()
        if not name.startswith(borrowed)
    }
    ids, drafted = head.draft_ids.cpu(), torch.zeros(head.config.vocab_size, dtype=torch.bool)
    drafted[ids] = True
    tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": drafted}
    config = config_json(head.config)
    config |= rope_of(raw) | {"architectures": ["LlamaForCausalLMEagle3"], "tie_word_embeddings": False}
    config |= {"draft_vocab_size": len(ids), "fc_norm": True, "norm_before_residual": True}
    # vLLM reads the first list, where a layer is named by the state that enters it; SGLang reads the second,
    # where it is named by the state that leaves it.
    name, outputs = "eagle_aux_hidden_state_layer_ids", [tap - 1 for tap in taps]
    config |= {name: list(taps), "eagle_config": {name: outputs, "use_aux_hidden_state": True}}
    write_folder(folder, tensors, config)


def rope_of(raw: dict[str, Any]) -> dict[str, Any]:
    """What the config.json of a target says about RoPE, which its head shares."""
    return {key: raw[key] for key in ROPE_KEYS if raw.get(key) is not None}


# ---- training ------------------------------------------------------------------------------------


class Training:
    """A head, its target and their texts: what `fit` asks for the loss of a step, and for a judgement."""

    def __init__(self, target: Transformer, texts: list[Text], args: argparse.Namespace):
        c = target.config
        texts = [text for text in texts if can_teach(text, args.max_length, args.ttt_steps)]
        if not texts:
            raise BadInput(f"--ttt_steps {args.ttt_steps}: no answer is long enough for such drafts")
        learnt, held_out = split_texts(texts, args.held_out)
        counts = answer_counts(learnt, c.vocab_size)
        most = c.vocab_size if args.kind == "dflash" else 32000
        ids = choose_vocabulary(counts, min(args.draft_vocab_size or most, c.vocab_size))
        said = answer_counts(held_out, c.vocab_size)
        self.coverage = (said[ids].sum() / said.sum()).item()
        self.target, self.args, self.device = target, args, target.norm.weight.device
        self.ids, self.taps = ids.to(self.device), args.taps or self.usual_taps(c.num_layers)
        self.head = self.build()
        self.batches = Batches(learnt, args.sequences, args.seed)
        self.held_out = Batches(held_out, args.sequences, args.seed)
        self.steps = args.steps or 3 * self.batches.epoch
        self.raw = read_json(find_checkpoint(args.checkpoint_path) / "config.json")

    def mixed(self) -> AbstractContextManager:
        """The head computes in what it will draft in: bf16, unless the target is in float32."""
        half = self.target.norm.weight.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def usual_taps(self, layers: int) -> tuple[int, ...]:
        return three_taps(layers)

    def build(self) -> EagleHead:
        return fresh_head(self.target, self.taps, self.ids, self.args.seed)

    def lesson(self, texts: list[Text]) -> Any:
        tokens, wrote = collate(texts, self.args.max_length, self.device)
        return self.teach(tokens, wrote)

    def teach(self, tokens: Tensor, wrote: Tensor) -> Any:
        return teach(self.target, self.taps, self.ids, tokens, wrote)

    def loss(self, step: int) -> Tensor:
        lesson = self.lesson(self.batches[step])
        with self.mixed():
            return self.loss_of(lesson, step)

    def loss_of(self, lesson: Any, step: int) -> Tensor:
        steps = 1 if torch.is_grad_enabled() and step % self.args.ttt_every else self.args.ttt_steps
        return lesson_loss(self.head, lesson, steps)

    def count_right(self, lesson: Any, step: int) -> tuple[int, list[int]]:
        return count_right(self.head, lesson, self.args.ttt_steps)

    def write(self) -> None:
        write_head(self.args.output, self.head, self.taps, self.raw)

    @torch.no_grad()
    def judge(self, step: int, mean_loss: float, notes: list[dict[str, Any]]) -> dict[str, Any]:
        """Figures on held-out texts. The head is written if it has never been as good."""
        k, batches = self.args.ttt_steps, min(self.held_out.epoch, JUDGED)
        loss, drafts, right = 0.0, 0, [0] * k
        for i in tqdm(range(batches), "held out", leave=False, disable=None):
            lesson = self.lesson(self.held_out[i])
            with self.mixed():
                loss += self.loss_of(lesson, i).item() / batches
                count, correct = self.count_right(lesson, i)
            drafts, right = drafts + count, [a + b for a, b in zip(right, correct)]
        shares = [round(n / max(drafts, 1), 4) for n in right]
        figures = {"step": step, "steps": self.steps, "loss": round(mean_loss, 4)}
        figures |= {"held_out_loss": round(loss, 4), "drafts": drafts, "acceptance": shares}
        figures |= {"accepted_length": round(sum(shares), 4), "coverage": round(self.coverage, 4)}
        best = max((note["accepted_length"] for note in notes), default=-1.0)
        self.keep(figures, notes, figures["accepted_length"] > best)
        return figures

    def keep(self, figures: dict[str, Any], notes: list[dict[str, Any]], best: bool) -> None:
        """Print and write the figures, and the head if it is the best so far."""
        shares = " ".join(f"{share:.3f}" for share in figures["acceptance"])
        line = "step {step}: loss {loss:.3f}, held out {held_out_loss:.3f}; ".format(**figures)
        line += f"a_1.. = {shares}, {figures['accepted_length']:.3f} tokens of a draft"
        tqdm.write(line + (", the best so far" if best else ""), file=sys.stderr)
        if best:
            self.write()
        lines = "".join(json.dumps(each) + "\n" for each in [*notes, figures])
        self.args.output.mkdir(parents=True, exist_ok=True)
        (self.args.output / "training.jsonl").write_text(lines)

    def settings(self) -> dict[str, Any]:
        """What an interrupted training must have in common with the one that goes on. The number of steps is
        not among it: a finished head learns further when it is given more of them."""
        flags = ["seed", "max_length", "sequences", "ttt_steps", "ttt_every", "held_out"]
        flags += ["kind", *BLOCK_FLAGS] if self.args.kind == "dflash" else []
        found = {name: getattr(self.args, name) for name in (*flags, "learning_rate", "muon_rate")}
        found.setdefault("kind", None)  # as in states from before there were two
        found |= {"checkpoint_path": whole_path(self.args.checkpoint_path), "precision": self.args.precision}
        found["lm_head_bits"] = self.args.lm_head_bits
        found |= {"texts": len(self.batches.texts), "tokens": sum(t.answered for t in self.batches.texts)}
        return found | {"taps": list(self.taps), "draft_vocab_size": len(self.ids)}


class BlockTraining(Training):
    """The same for a block head. The blocks of a step begin where its number says."""

    def usual_taps(self, layers: int) -> tuple[int, ...]:
        return default_block_taps(layers, 5) if layers > 7 else three_taps(layers)

    def build(self) -> EagleHead:
        args, vocabulary = self.args, self.target.config.vocab_size
        mask = vocabulary - 1 if args.mask_token_id is None else args.mask_token_id
        rows = lm_head_rows(self.target, torch.arange(vocabulary, device=self.device))
        block = Block(self.taps, args.block_size, mask)
        return build_block_head(self.target, block, args.layers, rows, args.seed)

    def teach(self, tokens: Tensor, wrote: Tensor) -> BlockLesson:
        return teach_blocks(self.target, self.taps, tokens, wrote)

    def loss_of(self, lesson: BlockLesson, step: int) -> Tensor:
        drawn = draw_anchors(lesson.wrote, self.args.anchors, self.args.seed + step)
        return block_loss(self.head, lesson, *drawn, min(self.args.block_size / 2, 7.0))

    def count_right(self, lesson: BlockLesson, step: int) -> tuple[int, list[int]]:
        drawn = draw_anchors(lesson.wrote, self.args.anchors, self.args.seed + step)
        return count_right_blocks(self.head, lesson, *drawn)

    def write(self) -> None:
        write_block_head(self.args.output, self.head, rope_of(self.raw))


def train(target: Transformer, texts: list[Text], args: argparse.Namespace) -> None:
    """Train a head, or go on with it, and print the figures of the best."""
    training = (BlockTraining if args.kind == "dflash" else Training)(target, texts, args)
    held = f"{len(training.held_out.texts)} texts held out"
    print(
        f"{len(training.batches.texts)} texts, {held}; {len(training.ids)} tokens can be drafted, "
        f"{training.coverage:.1%} of those in held-out answers; {training.steps} steps\n"
        f"a_i: the share of greedy drafts, one at every held-out token, whose first i tokens are the text's",
        file=sys.stderr,
    )
    state, rates = Path(f"{args.output}.state.pt"), Rates(args.muon_rate, args.learning_rate)
    job = (training.head, training.loss, training.steps, state, args.every, training.judge)
    notes = fit(*job, rates, training.settings())
    best = max(notes, key=lambda note: note["accepted_length"])
    print(json.dumps(best), flush=True)


# ---- the command line ----------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The flags of train_head.py."""
    p = OneLineParser(
        "scripts/train_head.py", description="Train an EAGLE-3 or block head.", allow_abbrev=False
    )
    p.add_argument("--checkpoint_path", required=True, help="the target, as in generate.py")
    p.add_argument("--precision", choices=ALL_PRECISIONS, help="as in generate.py")
    p.add_argument("--lm_head_bits", type=int, choices=[4, 8, 16], help="as in generate.py")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--output", type=Path, metavar="HEAD", help="the directory of the head; may be left out of --steps 0"
    )
    p.add_argument("--seed", type=int, default=1234)
    p.add_argument("--max_length", type=int, help="tokens of a text (default: 2048, or the context)")
    add_answer_flags(p)
    add_training_flags(p)
    p.set_defaults(compile="default", ignore_eos=False)
    return p


def add_answer_flags(p: argparse.ArgumentParser) -> None:
    """Flags for what the target writes."""
    lines = "prompts: JSON lines as in --prompts of generate.py, all of their turns; .gz is understood"
    p.add_argument("--data", metavar="FILE", nargs="+", default=[], help=lines)
    unseen = "prompts that the head must not learn from, told by their first turns: those of your benchmarks"
    p.add_argument("--exclude", metavar="FILE", nargs="+", default=[], help=unseen)
    kept = "where the answers are kept, and found again (default: HEAD.answers.jsonl)"
    p.add_argument("--answers", metavar="FILE", help=kept)
    several = "answer every prompt again and again until there are so many tokens of answers (default: once)"
    p.add_argument("--tokens", type=int, metavar="N", help=several)
    p.add_argument("--temperature", type=float, default=0.7, help="of the answers (0.7)")
    p.add_argument("--top_k", type=int, default=0)
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--max_new_tokens", type=int, default=512, help="of an answer (512)")
    p.add_argument("--batch_size", type=int, default=16, help="answers that are written side by side (16)")
    p.add_argument("--system", metavar="TEXT", help="system message of every chat")
    p.add_argument("--template_kwargs", metavar="JSON", type=json_object, help="as in generate.py")


def add_training_flags(p: argparse.ArgumentParser) -> None:
    """Flags for what the head learns, and how."""
    p.add_argument("--steps", type=int, help="of training (default: three times all texts); 0: answers alone")
    p.add_argument("--sequences", type=int, default=8, help="texts of a step (8)")
    drafted = "tokens that the head can draft, the most frequent in the answers (32000, or all)"
    p.add_argument("--draft_vocab_size", type=int, metavar="N", help=drafted)
    kinds = "eagle3 (default), or dflash: a block head, which guesses --block_size - 1 tokens in one pass"
    p.add_argument("--kind", choices=["eagle3", "dflash"], default="eagle3", help=kinds)
    p.add_argument("--block_size", type=int, help="dflash: places of a block, the root's included (8)")
    p.add_argument("--layers", type=int, help="dflash: layers of the head (5)")
    p.add_argument("--anchors", type=int, help="dflash: blocks of a text in a step (32)")
    mask = "dflash: the token of all places but the root; one that no text has (default: the last)"
    p.add_argument("--mask_token_id", type=int, help=mask)
    taps = "layers whose input the head sees (default: 2, the middle one, the third last; of dflash: five)"
    p.add_argument("--taps", type=tap_list, metavar="I,J,...", help=taps)
    unrolled = "tokens of the drafts in training, and of those that are judged (5)"
    p.add_argument("--ttt_steps", type=int, default=5, metavar="K", help=unrolled)
    often = "unroll in one of N batches; in the others, learn the first token alone, which is faster (1)"
    p.add_argument("--ttt_every", type=int, default=1, metavar="N", help=often)
    p.add_argument("--learning_rate", type=float, default=2e-3, help="of lm_head and norms, by AdamW (2e-3)")
    p.add_argument("--muon_rate", type=float, default=0.04, help="of all other matrices, by Muon (0.04)")
    p.add_argument("--held_out", type=float, default=0.05, help="share of prompts to judge by (0.05)")
    p.add_argument("--every", type=int, default=500, help="steps between judgements, and saved states (500)")


def check_flags(args: argparse.Namespace) -> None:
    """Raise BadInput for what is wrong before anything is loaded."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise BadInput(f"--{name} is {value}; it must be at least {least}")
    for name in ("learning_rate", "muon_rate", "held_out"):
        if not 0 < getattr(args, name) < 1:
            raise BadInput(f"--{name} is {getattr(args, name)}; it must be above 0 and below 1")
    if args.output is None and (args.steps != 0 or args.answers is None):
        raise BadInput("--output is missing: the directory of the head (--steps 0 with --answers needs none)")
    if not args.data and args.answers is None:
        raise BadInput("there is nothing to learn from: give --data, --answers of an earlier run, or both")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise BadInput(f"--output: {args.output} is a file; give a directory")
    check_kind_flags(args)
    check_device(args.device)


def check_kind_flags(args: argparse.Namespace) -> None:
    """Raise BadInput for flags of the other kind of head; fill in those of blocks."""
    for name, usual in BLOCK_FLAGS.items():
        if args.kind == "eagle3" and getattr(args, name) is not None:
            raise BadInput(f"--{name} is for --kind dflash")
        setattr(args, name, usual if getattr(args, name) is None else getattr(args, name))
    if args.kind == "dflash":
        if args.draft_vocab_size is not None:
            raise BadInput("--draft_vocab_size: a block head drafts all tokens of its target")
        args.ttt_steps = args.block_size - 1  # tokens of a draft


def check_shape(args: argparse.Namespace, config: ModelConfig) -> None:
    """Raise BadInput for flags that this target does not allow."""
    least, context = args.ttt_steps + 3, config.max_context
    if not least <= args.max_length <= context:
        room = f"{least} to {context}, the target's context"
        raise BadInput(f"--max_length is {args.max_length}; it must be {room}")
    check_window(config, args.max_length)
    if (args.draft_vocab_size or 2) > config.vocab_size:
        raise BadInput(f"--draft_vocab_size is {args.draft_vocab_size}; the target has {config.vocab_size}")
    if args.mask_token_id is not None and args.mask_token_id >= config.vocab_size:
        raise BadInput(f"--mask_token_id is {args.mask_token_id}; the target has {config.vocab_size} tokens")
    if args.taps and not 0 <= args.taps[0] <= args.taps[-1] < config.num_layers:
        raise BadInput(f"--taps: the layers of the target are 0 to {config.num_layers - 1}")


def whole_path(path: str) -> str:
    """The same for all ways to write the path of a directory; an id of the hub stays."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def origin(target: Target, args: argparse.Namespace, writing: bool) -> dict[str, Any]:
    """Who answers, and how: see `AnswerFile.check_origin`."""
    facts = {"checkpoint_path": whole_path(args.checkpoint_path), "precision": target.precision}
    facts["lm_head_bits"] = args.lm_head_bits
    sampling = ("temperature", "top_k", "top_p", "max_new_tokens", "system", "template_kwargs")
    return facts | ({name: getattr(args, name) for name in sampling} if writing else {})


def find_texts(target: Target, args: argparse.Namespace) -> AnswerFile:
    """The answers that are there already, and those that are still missing."""
    vocabulary = target.model.config.vocab_size
    prompts = read_data(args.data, vocabulary) if args.data else []
    unseen = read_data(args.exclude, vocabulary, "--exclude") if args.exclude else []
    openings = {prompt.opening for prompt in unseen}  # benchmarks ask the first turn alone
    excluded = {prompt.key for prompt in prompts if prompt.opening in openings}
    if prompts and len(excluded) == len(prompts):
        raise BadInput("--exclude: leaves none of the prompts of --data")
    if args.exclude:
        print(f"{len(excluded)} of {len(prompts)} prompts are left out: --exclude", file=sys.stderr)
    prompts, excluded = [p for p in prompts if p.key not in excluded], excluded | {p.key for p in unseen}
    file = AnswerFile(Path(args.answers or f"{args.output}.answers.jsonl"), vocabulary, excluded)
    if (args.system is not None or args.template_kwargs) and getattr(
        target.tokenizer, "template", None
    ) is None:
        raise BadInput("--system and --template_kwargs: the target has no chat template")
    if prompts:
        file.check_writable()
    file.check_origin(origin(target, args, bool(prompts)))
    if prompts:
        write_answers(target, prompts, file, args)
    if not file.texts:
        raise BadInput(f"--answers: {file.path} has no texts to learn from, and there is no --data to answer")
    return file


def run(args: argparse.Namespace) -> None:
    """Everything between the flags and the exit status. Raises BadInput."""
    check_flags(args)
    load_kernels()
    target = load_target(args)
    config = target.model.config
    usual = min(2048, config.max_context, config.sliding_window or 2048)
    args.max_length = usual if args.max_length is None else args.max_length
    check_shape(args, config)
    file = find_texts(target, args)
    if args.steps == 0:
        print(f"{len(file.texts)} texts, {file.tokens} tokens of answers in {file.path}", file=sys.stderr)
    else:
        train(target.model, file.texts, args)


def main(argv: list[str] | None = None) -> int:
    """Run the command line -> exit status."""
    return process.exit_status(lambda: run(build_parser().parse_args(argv)), BadInput)


if __name__ == "__main__":
    sys.exit(process.run(main))
