"""Several processes, one text: that of one process which adds up in as many parts, with every method."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import NEEDS_EQUAL_ROWS, ROOT, SHIPPED_TARGET, edit_weights, random_model, save_checkpoint
from test_dflash import shipped_block_head

import generate
from benchmarks.common import decode_all, read_prompts
from checkpoints import check_split, load_model, open_checkpoint
from gpt_spec import Decoder
from model import BadInput, Linear, RMSNorm
from packing import default_quantization, reshape
from parallel import Ranks, Share, Summed, bounds, connected, part_of
from sampling import Sampling

METHODS = ["autoregressive", "lookup", "sequential", "tree", "hierarchical", "auto"]
SOME = [("0", "1"), ("1", "4")]  # temperatures and batch sizes
EVERY = [*SOME, ("0", "4"), ("1", "1")]
SHIPPED_SHORT = ["--max_new_tokens", "16", "--precision"]
TINY = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 90, "max_context": 512}
MODEL_FLAGS = ("--checkpoint_path", "--precision")
DONE = "done: "  # begins the line of results


def start(commands: list[list[str]], folders: list[Path]) -> list[subprocess.Popen]:
    """A Python process for every command and folder, and they know each other, as torchrun has it. One thread
    each: they run on the same cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": len(commands),
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "MASTER_ADDR": "127.0.0.1",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # tests in the background ignore it
    processes = []
    for rank, (command, folder) in enumerate(zip(commands, folders)):
        own = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        options = {"env": os.environ | own, "cwd": folder, "stdin": subprocess.PIPE if rank == 0 else None}
        processes.append(subprocess.Popen([sys.executable, *command], **options, **pipes))
    return processes


def finish(processes: list[subprocess.Popen], typed: str = "") -> tuple[list[int], str, str]:
    """Their exit statuses, and what all of them printed, to standard output and to standard error."""
    try:
        printed = [
            process.communicate(typed if i == 0 else None, timeout=600) for i, process in enumerate(processes)
        ]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *("".join(texts) for texts in zip(*printed))


def run(count: int, command: list[str], typed: str = "") -> tuple[list[int], str, str]:
    """`finish` of so many processes with one command."""
    return finish(start([command] * count, [ROOT] * count), typed)


def texts_of(runs: list[list[str]], ranks: Ranks) -> list[list[list[int]]]:
    """The texts of flags of generate.py after the first held-out prompts. A model is loaded once."""
    targets, texts = {}, []
    for flags in runs:
        args = generate.build_parser().parse_args([*flags, "--device", "cpu"])
        name = (args.checkpoint_path, args.precision)
        target = targets[name] = targets.get(name) or generate.load_target(args, ranks)
        _, drafter = generate.build_drafter(args, target)
        decoder = Decoder(target.model, drafter, Sampling(args.temperature), 512, args.batch_size)
        decoder.warm_up()
        vocabulary = target.model.config.vocab_size
        prompts = [[token % vocabulary for token in prompt[:100]] for prompt in read_prompts(5)]
        texts.append(decode_all(decoder, prompts[: args.batch_size + 1], args.max_new_tokens))
    return texts


def compare(
    count: int, model: list[str], runs: list[tuple[str, str, str, list[str]]], parts: int | None = None
) -> None:
    """What all runs (temperature, batch size, method, more flags) say in `count` processes is what one
    process says that decodes autoregressively and adds up in as many `parts` (by default `count`)."""

    def flags(temperature: str, batch_size: str, method: str, more: list[str]) -> list[str]:
        return [*model, "--temperature", temperature, "--batch_size", batch_size, "--method", method, *more]

    parts = parts or count
    statuses, out, errors = run(count, [__file__, json.dumps([flags(*each) for each in runs]), str(parts)])
    assert statuses == [0] * count, errors
    lines = [line for line in out.splitlines() if line.startswith(DONE)]
    assert len(lines) == 1  # rank 0 prints for all
    alone: dict[tuple, list[list[int]]] = {}
    for (temperature, batch_size, method, more), texts in zip(runs, json.loads(lines[0].removeprefix(DONE))):
        named = [word for pair in zip(more, more[1:]) if pair[0] in MODEL_FLAGS for word in pair]
        asked = (temperature, batch_size, *named)
        if asked not in alone:
            plain = flags(temperature, batch_size, "autoregressive", named)
            alone[asked] = texts_of([plain], Ranks(parts=parts))[0]
        assert texts == alone[asked], (method, *more, *asked)


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("precision", ["bf16", "w4a16", "w4a8"])
@pytest.mark.parametrize(
    "count, ways",
    [(2, SOME)] + [pytest.param(count, EVERY, marks=pytest.mark.long) for count in (2, 4)],
    ids=["2", "2 in every way", "4 in every way"],
)
def test_every_method(count, ways, precision, tmp_path):
    methods = METHODS if precision == "bf16" else [*METHODS, "qspec"]
    runs = [(*way, method, []) for way in ways for method in methods]
    runs += [(*way, "tree", []) for way in EVERY if way not in ways]
    runs.append(("1", "4", "tree", ["--draft_vocab_size", "300"]))
    shipped_block_head(load_model(SHIPPED_TARGET), None, tmp_path)
    runs.append(("1", "4", "dflash", ["--dflash_checkpoint_path", str(tmp_path)]))
    compare(count, [*SHIPPED_SHORT, precision], runs)


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("count", [2, 4])
def test_four_parts(count):
    """Of sums. Two processes have two of them each."""
    runs = [("1", "2", name, []) for name in ("autoregressive", "tree", "qspec")]
    compare(count, [*SHIPPED_SHORT, "w4a16"], runs, 4)


OF_TWO = {  # random models for two processes: precision, shape, config.json
    "qwen2": ("bf16", {"qkv_bias": True}, {"model_type": "qwen2"}),
    "biases": (
        "fp32",
        {"o_bias": True, "qkv_bias": True, "mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True},
    ),
    "tied w8a8": ("w8a8", {"tied_embeddings": True}, {}),
    "tied": ("bf16", {"tied_embeddings": True}, {}),
}
OF_FOUR = {"2 kv heads": ("w4a8", {}, {})}  # each of the two in two processes


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("count, models", [(2, OF_TWO), (4, OF_FOUR)])
def test_random_models(count, models, tmp_path):
    runs = []
    for name, (precision, changes, config) in models.items():
        path = save_checkpoint(random_model(**TINY | changes), tmp_path / name, **config)
        model = ["--checkpoint_path", str(path), "--precision", precision]
        runs.append(("1", "2", "lookup", model))
    compare(count, ["--max_new_tokens", "16"], runs)


def size(modules: list) -> int:
    """Bytes of all their weights."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


@pytest.mark.parametrize("count", [2, 4])
def test_a_share_is_its_part_of_the_weights(count):
    """Everybody has the norms. Of four processes, two have the same key-value head; everything else is there
    once, but for the scales of groups of inputs that are cut."""
    whole = open_checkpoint(SHIPPED_TARGET).model.to(torch.bfloat16)
    q = default_quantization(whole, "w4a16")
    reshape(whole, q)
    shares = [Share(whole, Ranks(rank, count, parts=count)).model(q) for rank in range(count)]
    extra = (count - 1) * size([m for m in whole.modules() if isinstance(m, RMSNorm)])
    if count == 4:
        assert whole.config.num_kv_heads == 2
        c, qkv = whole.config, [layer.self_attn.qkv_proj for layer in whole.layers]
        extra += size(qkv) * 2 * c.num_kv_heads // (c.num_heads + 2 * c.num_kv_heads)
    assert size([whole]) + extra <= size(shares) < 1.01 * (size([whole]) + extra)
    one = [size([share]) for share in shares]  # four have 1, 2, 1 and 2 of the 6 groups of down_proj
    assert max(one) < (1.01 if count == 2 else 1.5) * min(one)
    assert size([load_model(SHIPPED_TARGET, "w4a16")]) == size([whole])


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_with_a_killed_process(victim):
    flags = ["--method", "lookup", "--max_new_tokens", "1500", "--ignore_eos"]
    processes = start([["generate.py", *flags]] * 2, [ROOT] * 2)
    assert processes[0].stdout.read(1)  # the text has begun
    processes[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    _, errors = processes[1 - victim].communicate(timeout=60)
    seconds = time.monotonic() - begin
    processes[victim].communicate()
    assert seconds < 30
    assert processes[1 - victim].returncode == 1
    assert errors == "error: another process of this run has ended or does not answer\n"


def test_a_mismatch_is_one_line_of_all(tmp_path):
    command = ["generate.py", "--max_new_tokens", "3", "--seed"]
    statuses, out, errors = finish(start([[*command, "1"], [*command, "2"]], [ROOT] * 2))
    assert statuses == [2, 2] and out == "" and len(errors.splitlines()) == 1
    assert errors == "error: seed: 1 in rank 0, but 2 in rank 1\n"
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        save_checkpoint(random_model(**TINY), folder / "tiny")
    edit_weights(folders[1] / "tiny", lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].mul_(2))
    command = [str(ROOT / "generate.py"), "--checkpoint_path", "tiny", "--prompt_ids", "1,2"]
    statuses, out, errors = finish(start([command] * 2, folders))
    assert statuses == [2, 2] and out == "" and len(errors.splitlines()) == 1
    assert errors.startswith("error: --checkpoint_path: ")
    for folder, text in zip(folders, ("x = 1", "x = 2")):
        (folder / "prompt").write_text(text)
    command = [str(ROOT / "generate.py"), "--prompt", "@prompt"]
    statuses, out, errors = finish(start([command] * 2, folders))
    assert statuses == [2, 2] and out == "" and len(errors.splitlines()) == 1
    assert errors.startswith("error: --prompt: ")


@NEEDS_EQUAL_ROWS
def test_torchrun_and_what_rank_0_reads():
    flags = ["--max_new_tokens", "8", "--prompt", "-", "--temperature", "1", "--method", "autoregressive"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = {"input": "def f(x):\n", "capture_output": True, "text": True, "cwd": ROOT}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    texts = []
    for command in ([*torchrun, "generate.py"], ["generate.py", "--sum_parts", "2"]):
        done = subprocess.run([sys.executable, *command, *flags], env=environment, **options)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1] and len(texts[0]) > 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_a_world_of_one_on_a_gpu():
    """NCCL's collectives are inside compiled steps and CUDA graphs."""
    flags = ["generate.py", "--precision", "w4a16", "--max_new_tokens", "24", "--temperature", "1"]
    methods = ("autoregressive", "tree")
    texts = {run(1, [*flags, "--device", "cuda", "--method", method])[1] for method in methods}
    assert len(texts) == 1 and len(texts.pop()) > 24


def test_bad_input_is_one_line(tmp_path):
    statuses, out, errors = run(2, ["generate.py", "--sum_parts", "3"])
    assert (statuses, out) == ([2, 2], "")
    assert errors == "error: --sum_parts is 3; it must be a multiple of the 2 processes\n"
    statuses, out, errors = run(2, ["generate.py", "--bogus"])
    assert (statuses, out) == ([2, 2], "") and len(errors.splitlines()) == 1 and "--bogus" in errors
    save_checkpoint(random_model(**TINY), tmp_path / "tiny")
    command = [str(ROOT / "generate.py"), "--checkpoint_path", "tiny", "--prompt_ids", "1,2"]
    statuses, out, errors = finish(
        start([command] * 2, [tmp_path / "..", tmp_path])
    )  # rank 0 does not have it
    assert sorted(statuses) == [1, 2] and out == "" and len(errors.splitlines()) == 1
    assert errors.startswith("error: --checkpoint_path: tiny is not a directory")


@NEEDS_EQUAL_ROWS
def test_a_conversation_that_rank_0_reads():
    flags = ["generate.py", "--interactive", "--max_new_tokens", "4", "--temperature", "1"]
    statuses, out, errors = run(2, flags, "def f\nclass A\n")
    assert statuses == [0, 0], errors
    alone = {"input": "def f\nclass A\n", "capture_output": True, "text": True, "cwd": ROOT}
    assert out == subprocess.run([sys.executable, *flags, "--sum_parts", "2"], **alone).stdout != ""


def test_ctrl_c_ends_a_conversation():
    processes = start(
        [["generate.py", "--interactive", "--max_new_tokens", "2000", "--ignore_eos"]] * 2, [ROOT] * 2
    )
    processes[0].stdin.write("def f\n")
    processes[0].stdin.flush()
    assert processes[0].stdout.read(1)  # the answer has begun
    processes[0].send_signal(signal.SIGINT)
    printed = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [130, 1]
    # The store that tells the others is in rank 0, which has ended. (That of torchrun is not.)
    assert printed[1] in [("", ""), ("", "error: another process of this run has ended or does not answer\n")]
    assert "Traceback" not in printed[0][1]


def test_a_profile_is_of_rank_0(tmp_path):
    flags = ["--max_new_tokens", "4", "--profile", str(tmp_path / "trace.json"), "--json"]
    statuses, out, errors = run(2, ["generate.py", *flags])
    assert statuses == [0, 0], errors
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 4
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


def test_what_cannot_be_split_is_refused(rotated_target):
    with pytest.raises(BadInput, match="the model is rotated"):
        load_model(rotated_target, ranks=Ranks(parts=2))
    with pytest.raises(BadInput, match="6 heads in groups of 2 are no 4 parts"):
        Share(random_model(num_heads=6, num_kv_heads=3), Ranks(1, 4, parts=4))
    with pytest.raises(BadInput, match="61 heads, rows or columns are no 100 parts"):
        bounds(61, 100)
    with pytest.raises(BadInput, match="inputs 64 to 192 are no columns of 128 inputs each"):
        part_of(torch.zeros(3, 2), 256, 64, 192)
    name, checkpoint = "model.layers.0.mlp.down_proj.permutation", open_checkpoint(SHIPPED_TARGET)
    checkpoint.tensors[name] = checkpoint.tensors["model.norm.weight"]
    with pytest.raises(BadInput, match=f"{name} is there: act-order"):
        check_split(checkpoint)


def test_parts_are_whole_units():
    assert bounds(1536, 3, (128,)) == [0, 512, 1024, 1536]
    assert bounds(9, 2, (3,)) == [0, 3, 9]  # whole groups of heads
    assert bounds(4, 4, (2,)) == [0, 1, 2, 3, 4]  # shares of groups


def test_a_sum_of_parts_is_the_sum():
    """Up to the order of additions, and to one rounding."""
    torch.manual_seed(0)
    linear = Linear(96, 40, bias=True).requires_grad_(False)
    x, residual = torch.randn(2, 3, 192), torch.randn(2, 3, 40)
    summed = Summed(linear, [0, 16, 64, 96], Ranks(parts=3))
    assert torch.allclose(
        summed(x, gated=True, residual=residual), linear(x, None, True, residual), atol=1e-5
    )


if __name__ == "__main__":
    with connected("cpu", int(sys.argv[2])) as every:
        generate.load_kernels()
        print(DONE + json.dumps(texts_of(json.loads(sys.argv[1]), every)))
