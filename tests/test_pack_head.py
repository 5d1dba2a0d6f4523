"""Heads in files of 4-bit weights: what is in them, that they load as they are, and what is refused."""

import json
import sys
from copy import deepcopy

import pytest
import torch
from conftest import ROOT, SHIPPED_HEAD, SHIPPED_TARGET, random_prompts, run_main
from safetensors.torch import load_file, save_file
from test_dflash import z_lab
from test_heads import LAYOUTS

import packing
from block_heads import load_block_head
from checkpoints import load_model
from dflash import BlockDrafter
from eagle import TreeDrafter
from gpt_spec import generate
from heads import load_head
from model import BadInput
from packing import named_linears

sys.path.insert(0, str(ROOT / "scripts"))
import pack_head  # noqa: E402


@pytest.fixture(scope="module")
def target(deep):
    """The tiny target of 8 layers in bf16: quantized heads need no other."""
    return deepcopy(deep).to(torch.bfloat16)


def pack(head, output):
    return run_main(pack_head.main, str(head), str(output))


def own_linears(head, borrowed=("lm_head",)):
    return [linear for name, linear in named_linears(head) if name not in borrowed]


def test_a_packed_head_is_what_loading_it_in_4_bits_makes_of_it(tmp_path):
    """No lm_head, so both are rounded in the same way."""
    assert pack(SHIPPED_HEAD, tmp_path / "head").returncode == 0
    target = load_model(SHIPPED_TARGET)
    packed, rounded = load_head(tmp_path / "head", target), load_head(SHIPPED_HEAD, target, "w4a16")
    ours, theirs = packed.state_dict(), rounded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {linear.weight.dtype for linear in own_linears(packed)} == {torch.uint8}
    for head, bits in (
        (packed, 16),
        (load_head(tmp_path / "head", target, "w4a8"), 8),
        (load_head(tmp_path / "head", load_model(SHIPPED_TARGET, "w4a8")), 8),  # as its target
        (load_head(tmp_path / "head", load_model(SHIPPED_TARGET, "w4a4")), 8),
        (load_head(tmp_path / "head", load_model(SHIPPED_TARGET, "w8a16")), 16),
    ):
        assert {linear.activation_bits for linear in own_linears(head)} == {bits}


def texts(target, prompts, drafter):
    out = [[] for _ in prompts]
    for emissions in generate(target, prompts, drafter, max_new_tokens=20, batch_size=2, compile=False):
        for emission in emissions:
            out[emission.prompt_index] += emission.tokens
    return out


@torch.no_grad()
@pytest.mark.parametrize("kind", ["SafeAILab", "speculators", "block"])
def test_packed_heads_of_other_layouts_draft(target, tmp_path, kind):
    """Rounded as loading rounds them, but for an lm_head of their own, which has 4 bits, too; the tokens that
    they draft are the same, and no text changes."""
    prompts, head = random_prompts([5, 9, 1]), tmp_path / "head"
    if kind == "block":
        z_lab(target, head)
    else:
        LAYOUTS[kind].write(head)
    assert pack(head, tmp_path / "packed").returncode == 0
    load, drafter = (load_block_head, BlockDrafter) if kind == "block" else (load_head, TreeDrafter)
    packed, plain = load(tmp_path / "packed", target), load(head, target)
    if kind != "block":
        assert torch.equal(packed.draft_ids, plain.draft_ids)
    ours, rounded = packed.state_dict(), load(head, target, "w4a16").state_dict()  # lm_head in 8 bits
    same = [name for name in ours if not name.startswith("lm_head.")]
    assert len(same) > 10 and all(torch.equal(ours[name], rounded[name]) for name in same)
    own = own_linears(packed, ("lm_head",) if kind == "block" else ())
    assert {linear.weight.dtype for linear in own} == {torch.uint8}
    if kind != "block":
        rows = LAYOUTS[kind].tensors["lm_head.weight"]
        packed_rows = packing.quantize_4_bit(rows, group=rows.shape[1])
        assert torch.equal(load_file(tmp_path / "packed/model.safetensors")["lm_head.packed"], packed_rows[0])
    assert texts(target, prompts, drafter(packed, 8)) == texts(target, prompts, None)


def test_what_is_refused(target, deep, tmp_path):
    head, packed = LAYOUTS["SafeAILab"].write(tmp_path / "head"), tmp_path / "packed"
    assert pack(head, packed).returncode == 0
    for wrong in ("bf16", "w8a8"):
        with pytest.raises(BadInput, match=f"has 4-bit weights, not those of {wrong}"):
            load_head(packed, target, wrong)
    with pytest.raises(BadInput, match="both are fp32, or neither"):
        load_head(packed, deep)
    for name, words in (
        (packed, "is quantized already"),
        (head, "is there already"),
        (SHIPPED_TARGET, "is there already"),
    ):
        done = pack(name, packed)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1

    done = pack(SHIPPED_TARGET, tmp_path / "new")
    assert done.returncode == 2 and "those of no head" in done.stderr and not (tmp_path / "new").exists()
    (head / "mask_embedding.pt").write_bytes(b"")
    assert "mask of its own" in pack(head, tmp_path / "new").stderr

    tensors = load_file(packed / "model.safetensors")
    del tensors["fc.scales"]
    form = json.dumps({"bits": 4, "lm_head_bits": 4})
    save_file(tensors, packed / "model.safetensors", metadata={"gpt_spec": form})
    with pytest.raises(BadInput, match="packed in another way"):
        load_head(packed, target)
