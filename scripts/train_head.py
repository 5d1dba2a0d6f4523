"""train_head.py: an EAGLE-3 head for any target that loads here, quantized ones included.

    python scripts/train_head.py --checkpoint_path DIR --precision w4a16 --data PROMPTS.jsonl --output HEAD
    python scripts/train_head.py ... --tokens 2000000 --steps 0        # the target's own answers alone
    python generate.py --checkpoint_path DIR --precision w4a16 --method tree --eagle_checkpoint_path HEAD

First the target answers the prompts (`answers.py`), then the head learns from what it wrote, on a CPU or a
GPU. Both stages go on where they stopped when the same command is given again. HEAD is in the layout of
SpecForge, with figures of the training in HEAD/training.jsonl.

The one idea: nothing is stored but tokens. The target, in the precision in which it will be served, runs in
the same process one batch ahead of the head, so that the head learns from just what it will see.
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

import torch  # noqa: E402

sys.path.insert(0, str(ROOT / "scripts"))
from answers import AnswerFile, read_data, write_answers  # noqa: E402

from checkpoints import ALL_PRECISIONS  # noqa: E402
from cli import OneLineParser, check_device, json_object, load_kernels  # noqa: E402
from generate import Target, load_target  # noqa: E402
from model import BadInput  # noqa: E402

# ---- the command line ----------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The flags of train_head.py."""
    p = OneLineParser("scripts/train_head.py", description="Train an EAGLE-3 head.", allow_abbrev=False)
    p.add_argument("--checkpoint_path", required=True, help="the target, as in generate.py")
    p.add_argument("--precision", choices=ALL_PRECISIONS, help="as in generate.py")
    p.add_argument("--lm_head_bits", type=int, choices=[4, 8, 16], help="as in generate.py")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--output", metavar="HEAD", help="the directory of the head; may be left out of --steps 0")
    p.add_argument("--seed", type=int, default=1234)
    p.add_argument("--max_length", type=int, default=2048, help="tokens of a text, at most (2048)")
    add_answer_flags(p)
    p.add_argument("--steps", type=int, help="of training (default: three times all texts); 0: answers alone")
    p.set_defaults(compile="default", ignore_eos=False)
    return p


def add_answer_flags(p: argparse.ArgumentParser) -> None:
    """Flags for what the target writes."""
    lines = "prompts: JSON lines as in --prompts of generate.py, all of their turns; .gz is understood"
    p.add_argument("--data", metavar="FILE", nargs="+", default=[], help=lines)
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


def check_flags(args: argparse.Namespace) -> None:
    """Raise BadInput for what is wrong before anything is loaded."""
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("tokens", 1), ("steps", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise BadInput(f"--{name} is {value}; it must be at least {least}")
    if args.output is None and (args.steps != 0 or args.answers is None):
        raise BadInput("--output is missing: the directory of the head (--steps 0 with --answers needs none)")
    if not args.data and args.answers is None:
        raise BadInput("there is nothing to learn from: give --data, --answers of an earlier run, or both")
    check_device(args.device)


def check_length(args: argparse.Namespace, context: int) -> None:
    if not 4 <= args.max_length <= context:
        raise BadInput(
            f"--max_length is {args.max_length}; it must be 4 to the target's context of {context}"
        )


def find_texts(target: Target, args: argparse.Namespace) -> AnswerFile:
    """The answers that are there already, and those that are still missing."""
    prompts = read_data(args.data) if args.data else []
    file = AnswerFile(Path(args.answers or f"{args.output}.answers.jsonl"), target.model.config.vocab_size)
    if prompts:
        write_answers(target, prompts, file, args)
    if not file.texts:
        raise BadInput(f"--answers: {file.path} has no texts, and there is no --data to answer")
    print(f"{len(file.texts)} texts, {file.tokens} tokens of answers in {file.path}", file=sys.stderr)
    return file


def run(args: argparse.Namespace) -> None:
    """Everything between the flags and the exit status. Raises BadInput."""
    check_flags(args)
    load_kernels()
    target = load_target(args)
    args.max_length = min(args.max_length, target.model.config.max_context)
    check_length(args, target.model.config.max_context)
    find_texts(target, args)


def main(argv: list[str] | None = None) -> int:
    """Run the command line -> exit status."""
    try:
        run(build_parser().parse_args(argv))
    except BadInput as error:
        return process.report("error: " + " ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return process.report("\ninterrupted", process.INTERRUPTED)
    return 0


if __name__ == "__main__":
    sys.exit(process.run(main))
