"""Packed weights: nibble by nibble, file by file, and what the command line does with them."""

import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import SHIPPED_TARGET, logits, random_model, save_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate
import kernels
import packing
import quantize
from checkpoints import load_model, open_checkpoint, weight_bytes
from model import BadInput, causal_attention
from packing import PRECISIONS, Quantization, precision_of
from text import load_tokenizer

CHOICES = [*((precision, None) for precision in PRECISIONS), ("w4a4", 4), ("w8a16", 16)]  # of lm_head_bits
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def source(tmp_path, **changes):
    model = random_model(**SIZES, **changes)
    return save_checkpoint(model, tmp_path / "source", torch.bfloat16, eos_token_id=2)


def quantized(directory, output, *flags) -> int:
    return quantize.main(["--checkpoint_path", str(directory), "--output", str(output), *flags])


# ---- rounding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 192])
def test_four_bits_hold_what_fits_and_err_by_half_a_step_elsewhere(group, symmetric):
    torch.manual_seed(0)
    weight = torch.randn(20, 192) * torch.rand(20, 1)
    packed, scales, zeros = packing.quantize_4_bit(weight, group, symmetric)
    assert packed.dtype == torch.uint8 and packed.shape == (20, 96) and scales.shape == (20, 192 // group)
    assert scales.dtype == torch.float16 and (zeros is None) == symmetric
    back = kernels.dequantize(packed, scales, zeros)
    steps = scales.float().repeat_interleave(group, dim=1)
    clipped = (back - weight).abs() > 0.51 * steps
    assert clipped.float().mean() < 0.2  # only what the search decided to clip errs by more
    again, scales_again, zeros_again = packing.quantize_4_bit(back, group, symmetric)
    assert (kernels.dequantize(again, scales_again, zeros_again) - back).norm() < 2e-2 * back.norm()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_clip_search_is_never_worse_than_rounding(monkeypatch, symmetric):
    torch.manual_seed(0)
    weight = torch.randn(64, 128) ** 3
    searched = kernels.dequantize(*packing.quantize_4_bit(weight, 64, symmetric))
    monkeypatch.setattr(packing, "SHRINK", [1.0])
    rounded = kernels.dequantize(*packing.quantize_4_bit(weight, 64, symmetric))
    groups = [(w - weight).view(-1, 64).square().sum(dim=1) for w in (searched, rounded)]
    assert (groups[0] <= groups[1] * (1 + 1e-5)).all() and groups[0].sum() < 0.97 * groups[1].sum()


def test_the_search_does_not_depend_on_how_rows_are_cut_into_chunks(monkeypatch):
    weight = torch.randn(50, 64)
    whole = packing.quantize_4_bit(weight, 32)
    monkeypatch.setattr(packing, "CHUNK", 7 * 64)
    for ours, theirs in zip(packing.quantize_4_bit(weight, 32)[:2], whole):
        assert torch.equal(ours, theirs)


def test_eight_bits():
    weight = torch.randn(20, 64)
    q, scales = packing.quantize_8_bit(weight)
    assert q.dtype == torch.int8 and scales.shape == (20, 1) and int(q.abs().max()) == 127
    assert ((kernels.dequantize(q, scales) - weight).abs() <= 0.51 * scales.float()).all()


@pytest.mark.parametrize("value", [0.0, 1e-7, -1e-9])
def test_weights_of_nothing_stay_finite(value):
    weight = torch.full((16, 32), value)
    for tensors in (packing.quantize_4_bit(weight, 32), packing.quantize_4_bit(weight, 32, False)):
        assert (kernels.dequantize(*tensors) - weight).abs().max() < 1e-6
    assert (kernels.dequantize(*packing.quantize_8_bit(weight)) - weight).abs().max() < 1e-6


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_error_does_not_depend_on_the_size_of_the_weights(size, shift):
    """Not for small weights, whose scales are subnormal, nor for groups that lie far from 0."""
    torch.manual_seed(0)
    weight = size * (torch.randn(16, 64) + shift)
    results = {"8": packing.quantize_8_bit(weight)}
    results |= {"4": packing.quantize_4_bit(weight, 32), "4z": packing.quantize_4_bit(weight, 32, False)}
    error = {
        form: float((kernels.dequantize(*q) - weight).norm() / weight.norm()) for form, q in results.items()
    }
    assert error["8"] < 0.02 and error["4"] < 0.15 and error["4z"] < error["4"]


def test_weights_that_are_not_finite_are_refused():
    weights = {"nan": torch.full((16, 32), torch.nan), "huge": torch.full((16, 32), 1e30)}
    for weight in weights.values():
        for q in (Quantization(4, 32), Quantization(8)):
            with pytest.raises(BadInput, match="infinities, NaN or huge"):
                packing.quantize_weight("some.module", weight, q)
    kept = Quantization(4, 32, modules_16_bit=("some.module",))
    assert packing.quantize_weight("some.module", weights["nan"], kept).keys() == {"some.module.weight"}


# ---- HQQ and GPTQ ----------------------------------------------------------------------------------------


def test_hqq_moves_zeros_to_where_most_weights_are_right():
    torch.manual_seed(0)
    w = torch.randn(200, 64) + torch.rand(200, 1)
    w[::3, 5] *= 6
    scale, zero = packing.fit_groups(w, symmetric=False)
    refined = packing.refine_zeros(w, scale, zero)

    def size(zero):  # what HQQ minimizes
        q = (w / scale + zero).round().clamp(0, 15)
        return ((q - zero) * scale - w).abs().pow(0.7).sum(dim=1)

    assert not torch.equal(refined, zero) and size(refined).sum() < 0.995 * size(zero).sum()
    assert torch.equal(refined, refined.half().float())  # what the file will say


def naive_gptq(weight, hessian, group, symmetric):
    """Optimal brain quantization, one input at a time, with the inverse Hessian of those left."""
    size = hessian.diagonal()
    w, importance = weight.view(-1, group), size.expand_as(weight).reshape(-1, group)
    scale, zero = (t.view(len(weight), -1) for t in packing.fit_groups(w, symmetric, importance))
    inverse = torch.linalg.inv(hessian + 0.01 * size.mean() * torch.eye(len(hessian)))
    w, rounded = weight.clone(), torch.zeros_like(weight)
    for i in size.argsort(descending=True).tolist():
        s, z = scale[:, i // group], zero[:, i // group]
        rounded[:, i] = ((w[:, i] / s + z).round().clamp(0, 15) - z) * s
        w -= ((w[:, i] - rounded[:, i]) / inverse[i, i])[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i] / inverse[i, i]
    return rounded


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [128, 7])
def test_gptq_against_its_slow_twin(monkeypatch, symmetric, block):
    monkeypatch.setattr(quantize, "GPTQ_BLOCK", block)
    torch.manual_seed(0)
    weight, x = torch.randn(24, 96).double(), torch.randn(400, 96).double() @ torch.randn(96, 96).double()
    hessian = x.T @ x / len(x)
    fitted = kernels.dequantize(*quantize.gptq_weight(weight, hessian, 32, symmetric))
    expected = naive_gptq(weight, hessian, 32, symmetric)
    torch.testing.assert_close(fitted.double(), expected, atol=1e-6, rtol=1e-6)
    plain = kernels.dequantize(*packing.quantize_4_bit(weight, 32, symmetric))
    loss = [(x @ (w.double() - weight).T).square().sum() for w in (fitted, plain)]
    assert loss[0] < 0.7 * loss[1]


def test_gptq_of_independent_inputs_is_rounding():
    """And inputs that are never there cost nothing."""
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    fitted, plain = quantize.gptq_weight(weight, torch.eye(64), 32, True), packing.quantize_4_bit(weight, 32)
    assert torch.equal(fitted[0], plain[0]) and torch.equal(fitted[1], plain[1])
    hessian = torch.eye(64)
    hessian[5, 5] = 0
    packed = quantize.gptq_weight(weight, hessian, 32, True)
    assert (kernels.dequantize(*packed)[:, 5] == 0).all()
    with pytest.raises(BadInput, match="infinities or NaN"):
        quantize.gptq_weight(weight, torch.full((64, 64), torch.nan), 32, True)


def test_layers_see_what_the_quantized_layers_before_them_made():
    """Layer after layer is the whole model, and the Hessian is the mean over all tokens."""
    model, tokens = random_model(qk_norm=True), torch.randint(61, (5, 30))
    positions, taps = torch.arange(30).expand_as(tokens), (0, 1, 2)
    _, states = model.forward(tokens, positions, causal_attention, taps)
    entering, between, _ = states.split(48, dim=-1)
    run = quantize.LayerRun(model, 0, entering)
    run.rows = 2
    torch.testing.assert_close(run.forward(), between)
    x = kernels.rms_norm(entering, model.layers[0].input_layernorm.weight, 1e-5).flatten(0, 1)
    torch.testing.assert_close(run.hessian(model.layers[0].self_attn.qkv_proj), x.T @ x / len(x))


@pytest.mark.parametrize(
    "more, tied",
    [([], False), (["--rotate"], False), (["--lm_head_bits", "4"], False), (["--lm_head_bits", "4"], True)],
)
def test_gptq_is_better_on_what_it_saw(tmp_path, more, tied):
    """From a file of texts; the output of the model, not the weights, is what comes closer."""
    directory = source(tmp_path, num_layers=3, tied_embeddings=tied)
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt_ids": torch.randint(61, (2000,)).tolist()}))
    shutil.copy(SHIPPED_TARGET / "tokenizer.model", directory)
    flags = ["--group_size", "32", *more]
    assert quantized(directory, tmp_path / "rtn", *flags) == 0
    more = ["--quantizer", "gptq", "--calibration", str(tmp_path / "lines.jsonl")]
    assert quantized(directory, tmp_path / "gptq", *flags, *more) == 0
    names = {name: set(load_file(tmp_path / name / "model.safetensors")) for name in ("rtn", "gptq")}
    assert names["rtn"] == names["gptq"]
    exact = logits(load_model(directory, "fp32"))
    error = {name: (logits(load_model(tmp_path / name)) - exact).norm() for name in names}
    assert error["gptq"] < 0.9 * error["rtn"]


@pytest.mark.parametrize("rotate", [[], ["--rotate"]])
def test_hqq_from_the_command_line(tmp_path, rotate):
    """Zeros, and others than those of round to nearest; the scales are the same."""
    directory, flags = source(tmp_path), ["--group_size", "32", *rotate]
    assert quantized(directory, tmp_path / "rtn", *flags, "--asymmetric") == 0
    assert quantized(directory, tmp_path / "hqq", *flags, "--quantizer", "hqq") == 0
    rtn, hqq = (load_file(tmp_path / name / "model.safetensors") for name in ("rtn", "hqq"))
    assert rtn.keys() == hqq.keys()
    for name, tensor in rtn.items():
        same = not name.endswith((".zeros", ".packed"))
        assert torch.equal(tensor, hqq[name]) == same, name
    exact = logits(load_model(directory))
    assert (logits(load_model(tmp_path / "hqq")) - exact).norm() < 0.3 * exact.norm()


def test_what_a_rotated_model_keeps_in_16_bits_stays_in_16_bits(tmp_path):
    directory = source(tmp_path)
    assert quantized(directory, tmp_path / "q", "--rotate", "--keep_16_bit", "down_proj") == 0
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16, torch.float16}
    assert "model.layers.0.mlp.down_proj.weight" in tensors
    exact = logits(load_model(directory))
    assert (logits(load_model(tmp_path / "q")) - exact).norm() < 0.3 * exact.norm()


def test_gptq_writes_its_own_text(tmp_path):
    """The same each time, and nobody else's."""
    directory = source(tmp_path)
    flags = ["--quantizer", "gptq", "--calibration_tokens", "1024", "--keep_16_bit", "down_proj"]
    for name in ("a", "b"):
        assert quantized(directory, tmp_path / name, *flags) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert "model.layers.0.mlp.down_proj.weight" in a
    rows = quantize.own_texts(directory, None, 3, 40)
    assert rows.shape == (3, 40) and len(rows.unique(dim=0)) == 3 and len(rows[:, 0].unique()) > 1
    tokenizer = load_tokenizer(SHIPPED_TARGET)
    rows = quantize.own_texts(SHIPPED_TARGET, tokenizer, 18, 30)  # more than are written side by side
    assert rows.shape == (18, 30) and (rows[:, 0] == 1).all() and len(rows.unique(dim=0)) == 18


def test_calibration_that_does_not_fit_is_refused(tmp_path, capsys):
    directory = source(tmp_path)

    def refused(*flags) -> str:
        assert quantized(directory, tmp_path / "q", *flags) == 2 and not (tmp_path / "q").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    gptq = ("--quantizer", "gptq")
    assert "are for --quantizer gptq" in refused("--calibration", "x.txt")
    assert "--calibration_tokens is 5; use 512 or more" in refused(*gptq, "--calibration_tokens", "5")
    assert "are for 4-bit weights" in refused(*gptq, "--precision", "w8a8")
    assert "has no tokenizer" in refused(*gptq, "--calibration", str(tmp_path / "x.txt"))
    shutil.copy(SHIPPED_TARGET / "tokenizer.model", directory)
    assert "cannot be read as UTF-8" in refused(*gptq, "--calibration", str(tmp_path / "x.txt"))
    (tmp_path / "x.jsonl").write_text("no json")
    assert "x.jsonl: a line is not JSON" in refused(*gptq, "--calibration", str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt_ids": [5] * 200}))
    assert "200 tokens; at least 256 are needed" in refused(*gptq, "--calibration", str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt_ids": [70] * 300}))
    assert "token 70; the vocabulary ends at 60" in refused(*gptq, "--calibration", str(tmp_path / "x.jsonl"))


# ---- files -----------------------------------------------------------------------------------------------


def test_a_file_nibble_by_nibble(tmp_path):
    """The documented layout, read by loops over bytes, is what the quantizer meant."""
    assert quantized(source(tmp_path), tmp_path / "q", "--group_size", "32", "--asymmetric") == 0
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    original = load_file(tmp_path / "source" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    packed, scales, zeros = (tensors[f"{name}.{kind}"] for kind in ("packed", "scales", "zeros"))
    weight = original[f"{name}.weight"].float()
    assert packed.shape == (32, 32) and scales.shape == zeros.shape == (32, 2)
    for row in range(32):
        for i in range(64):
            nibble = int(packed[row, i // 2]) >> (4 if i % 2 else 0) & 15
            value = (nibble - float(zeros[row, i // 32])) * float(scales[row, i // 32])
            assert abs(value - float(weight[row, i])) < 3 * float(scales[row, i // 32])
    assert tensors["lm_head.quantized"].dtype == torch.int8 and tensors["lm_head.scales"].shape == (61, 1)
    for kept in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(tensors[kept], original[kept])
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["gpt_spec"])
    assert metadata == asdict(Quantization(4, 32, False, 8)) | {"modules_16_bit": []}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision, lm_head_bits", CHOICES)
def test_a_file_and_quantizing_while_loading_are_the_same_model(tmp_path, precision, lm_head_bits, tied):
    directory = source(tmp_path, tied_embeddings=tied)
    flags = ["--lm_head_bits", str(lm_head_bits)] if lm_head_bits else []
    assert quantized(directory, tmp_path / "q", "--precision", precision, *flags) == 0
    from_file = load_model(tmp_path / "q", precision)
    while_loading = load_model(directory, precision, lm_head_bits=lm_head_bits)
    assert from_file.lm_head.activation_bits == max(8, PRECISIONS[precision][1])
    assert precision_of(from_file) == precision_of(while_loading) == precision
    assert torch.equal(logits(from_file), logits(while_loading))
    exact = logits(load_model(directory))
    difference = (logits(from_file) - exact).norm() / exact.norm()
    assert 0 < difference < (0.05 if precision.startswith("w8") else 0.5)
    assert weight_bytes([from_file]) < weight_bytes([load_model(directory)])


@pytest.mark.parametrize("flags", [[], ["--asymmetric"], ["--quantizer", "hqq"]])
def test_a_4_bit_lm_head_is_quantized_like_any_other_module(tmp_path, flags):
    """In groups, with zeros where others have them; the embedding that it is tied to keeps its 16 bits."""
    directory = source(tmp_path, tied_embeddings=True)
    more = ["--lm_head_bits", "4", "--group_size", "32"]
    assert quantized(directory, tmp_path / "q", *more, *flags) == 0
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    kinds = {
        name: t
        for name, t in ((name.removeprefix("lm_head."), t) for name, t in tensors.items())
        if "." not in name
    }
    assert set(kinds) == {"packed", "scales"} | ({"zeros"} if flags else set())
    assert kinds["packed"].shape == (61, 32) and kinds["scales"].shape == (61, 2)
    q = Quantization(4, 32, not flags, 4)
    weight = tensors["model.embed_tokens.weight"]
    same = packing.quantize_weight("lm_head", weight, q, refine="hqq" in flags)
    assert weight.dtype == torch.bfloat16
    assert all(torch.equal(tensors[name], tensor) for name, tensor in same.items())


def test_bits_of_lm_head_are_a_choice_only_where_16_bits_are_quantized(tmp_path):
    directory = source(tmp_path)
    assert quantized(directory, tmp_path / "q", "--lm_head_bits", "4") == 0
    for path, precision, own in ((tmp_path / "q", "w4a8", 4), (directory, "bf16", 16), (directory, None, 16)):
        load_model(path, precision, lm_head_bits=own)
        with pytest.raises(BadInput, match=f"--lm_head_bits 8 is for .* has {own} bits"):
            load_model(path, precision, lm_head_bits=8)
    with pytest.raises(BadInput, match="--lm_head_bits 4 is for 4-bit weights, not for w8a8"):
        load_model(directory, "w8a8", lm_head_bits=4)


def test_files_say_their_own_precision_and_activations_are_a_choice(tmp_path):
    assert quantized(source(tmp_path), tmp_path / "q", "--precision", "w4a4") == 0
    assert precision_of(load_model(tmp_path / "q")) == "w4a16"
    assert precision_of(load_model(tmp_path / "q", "w4a8")) == "w4a8"
    for wrong in ("bf16", "w8a16"):
        with pytest.raises(BadInput, match="has 4-bit weights; use w4a16 or w4a8 or w4a4, not"):
            load_model(tmp_path / "q", wrong)


def test_several_files_and_an_index(tmp_path, monkeypatch):
    directory = source(tmp_path)
    monkeypatch.setattr(quantize, "SHARD_BYTES", 20000)
    assert quantized(directory, tmp_path / "q") == 0
    files = sorted(path.name for path in (tmp_path / "q").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert torch.equal(logits(load_model(tmp_path / "q")), logits(load_model(directory, "w4a16")))


def test_modules_that_stay_16_bit(tmp_path):
    directory = source(tmp_path)
    assert (
        quantized(directory, tmp_path / "q", "--keep_16_bit", "layers.0|mlp.down", "--lm_head_bits", "16")
        == 0
    )
    names = set(load_file(tmp_path / "q" / "model.safetensors"))
    assert {
        "lm_head.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    } <= names
    assert "model.layers.1.mlp.up_proj.packed" in names
    exact, some = logits(load_model(directory)), logits(load_model(tmp_path / "q"))
    every = logits(load_model(directory, "w4a16"))
    assert (some - exact).norm() < (every - exact).norm()


def test_what_cannot_be_quantized_is_refused_in_one_line(tmp_path, capsys):
    def refused(*flags, directory=None) -> str:
        assert quantized(directory or tmp_path / "source", tmp_path / "q", *flags) == 2
        assert not (tmp_path / "q").exists() and not (tmp_path / "q.partial").exists()
        error = capsys.readouterr().err.strip().splitlines()
        return error[-1]

    directory = source(tmp_path)
    assert "--group_size: 64 does not divide 96 inputs; use 32" in refused("--group_size", "64")
    assert "fewer than 100 tokens" in refused("--evaluate", "-5")
    assert "for 4-bit weights" in refused("--precision", "w8a8", "--group_size", "64")
    assert "--lm_head_bits 4 is for 4-bit" in refused("--precision", "w8a8", "--lm_head_bits", "4")
    assert "no module matches 'attention'" in refused("--keep_16_bit", "attention")
    assert "no regular expression" in refused("--keep_16_bit", "(")
    assert "are one matrix" in refused("--keep_16_bit", "q_proj")
    assert "is not a directory" in refused(directory=tmp_path / "nowhere")
    odd = save_checkpoint(random_model(hidden_size=40), tmp_path / "odd", torch.bfloat16)
    assert "40 inputs, no multiple of 16" in refused(directory=odd)
    assert quantize.main(["--checkpoint_path", str(directory)]) == 2
    assert "nothing to do" in capsys.readouterr().err
    assert quantized(directory, tmp_path / "q") == 0
    assert quantized(directory, tmp_path / "q") == 2
    assert "exists already" in capsys.readouterr().err
    assert quantized(tmp_path / "q", tmp_path / "twice") == 2
    assert "quantized already" in capsys.readouterr().err


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, capsys):
    directory, calls = source(tmp_path), []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(quantize, "convert", interrupt)
    assert quantized(directory, tmp_path / "q") == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"bits": 4.0}, "has bits 4.0;"),
        ({"bits": 3}, "has bits 3; this version knows 4, 8"),
        ({"version": 2}, "has version 2"),
        ({"rotation": "dense"}, "has rotation 'dense'"),
        ({"colour": "blue"}, "is not understood"),
        ({"group": 64}, "model.safetensors: model.layers.0.*no multiple of a group of 64"),
        ({"group": -1}, "has shape"),
        ({"symmetric": False}, "lack model.layers.0"),
        ({"lm_head_bits": 16}, "unexpected tensor lm_head.quantized"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, damage, message):
    assert quantized(source(tmp_path), tmp_path / "q") == 0
    path = tmp_path / "q" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["gpt_spec"]) | damage
    save_file(load_file(path), path, {"gpt_spec": json.dumps(metadata)})
    with pytest.raises(BadInput, match=message):
        load_model(tmp_path / "q")


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert quantized(source(tmp_path), tmp_path / "file" / "q") == 2
    assert "error: --output: " in capsys.readouterr().err


def test_a_directory_that_looks_like_a_leftover_is_left_alone(tmp_path):
    (tmp_path / "q.partial").mkdir()
    assert quantized(source(tmp_path), tmp_path / "q") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "q.partial", "source"]


def test_unknown_precisions_are_refused():
    with pytest.raises(BadInput, match="precision 'w4a9' is none of fp32, bf16, w8a16"):
        load_model(SHIPPED_TARGET, "w4a9")


def test_the_precision_of_a_model_with_only_its_head_quantized(tmp_path):
    flags = ("--precision", "w8a8", "--keep_16_bit", "layers")
    assert quantized(source(tmp_path), tmp_path / "q", *flags) == 0
    assert precision_of(load_model(tmp_path / "q", "w8a8")) == "w8a8"


@pytest.mark.parametrize("shift", ["qkv_bias", "qk_norm", "tied_embeddings", "o_bias", "mlp_bias"])
def test_every_kind_of_model_can_be_quantized(shift):
    """8-bit weights keep the logits of a model with biases, Qwen3 norms, tied embeddings."""
    sizes = {"hidden_size": 160, "intermediate_size": 96, "head_dim": 80, "num_heads": 2, "num_kv_heads": 1}
    model = random_model(**sizes, vocab_size=100, **{shift: True})
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    exact, places = logits(model), {name: t.clone() for name, t in model.checkpoint_tensors().items()}
    linears, q = packing.linear_names(model), Quantization(8, lm_head_bits=8)
    packing.reshape(model.to(torch.bfloat16), q)
    goals = model.checkpoint_tensors()
    for name, tensor in places.items():
        for part, value in packing.convert(name, tensor, q, linears, shift == "tied_embeddings").items():
            goals[part].copy_(value)
    in_rows = logits(model)
    in_blocks = logits(model.pack())
    assert (in_rows - exact).norm() < 0.05 * exact.norm() and (in_blocks - exact).norm() < 0.05 * exact.norm()


def test_damaged_tensors_are_refused(tmp_path):
    assert quantized(source(tmp_path), tmp_path / "q") == 0
    path = tmp_path / "q" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name, tensors = "model.layers.1.mlp.up_proj", load_file(path)
    save_file(tensors | {f"{name}.scales": tensors[f"{name}.scales"].float()}, path, metadata)
    with pytest.raises(BadInput, match="up_proj.scales is F32; the format has F16"):
        load_model(tmp_path / "q")
    save_file(tensors, path)
    with pytest.raises(BadInput, match="unexpected tensor .*(packed|quantized)"):
        load_model(tmp_path / "q")


# ---- the shipped target ----------------------------------------------------------------------------------


def test_perplexity_of_the_shipped_target(held_out):
    """8-bit activations cost next to nothing, 4-bit weights a little, 4-bit activations more."""
    precisions = ["bf16", *PRECISIONS]
    loss = {p: quantize.mean_loss(load_model(SHIPPED_TARGET, p), held_out, 8000) for p in precisions}
    perplexity = {p: torch.tensor(value).exp().item() for p, value in loss.items()}
    assert abs(perplexity["w8a16"] / perplexity["bf16"] - 1) < 0.005
    assert abs(perplexity["w4a8"] / perplexity["w4a16"] - 1) < 0.01
    assert 1 < perplexity["w4a16"] / perplexity["bf16"] < 1.1
    assert perplexity["w4a8"] < perplexity["w4a4"] < 1.5 * perplexity["bf16"]


def test_gptq_without_data_on_the_shipped_target(tmp_path, held_out):
    """Within 3 % of bf16, on text that the model wrote itself, and below round to nearest; groups of 128."""
    flags = ["--quantizer", "gptq", "--calibration_tokens", "8192"]
    assert quantized(SHIPPED_TARGET, tmp_path / "gptq", *flags) == 0
    assert open_checkpoint(tmp_path / "gptq").quantization == Quantization(4, 128, lm_head_bits=8)
    models = [load_model(SHIPPED_TARGET, p) for p in ("bf16", "w4a16")]
    models.append(load_model(tmp_path / "gptq"))
    bf16, rtn, gptq = (quantize.mean_loss(model, held_out, 8000) for model in models)
    assert bf16 < gptq < rtn and gptq - bf16 < math.log(1.03)


def test_evaluate_prints_both(capsys):
    flags = ["--checkpoint_path", str(SHIPPED_TARGET), "--precision", "w4a8", "--evaluate", "500"]
    assert quantize.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["bf16", "perplexity"], ["w4a8", "perplexity"]]


def test_a_quantized_directory_is_a_checkpoint(tmp_path, capsys):
    """Tokenizer and configuration come along, and the command line takes it as target and as drafter."""
    assert quantized(SHIPPED_TARGET, tmp_path / "q", "--precision", "w4a8") == 0
    assert (tmp_path / "q" / "tokenizer.model").exists()
    flags = ["--checkpoint_path", str(tmp_path / "q"), "--precision", "w4a8", "--draft_checkpoint_path"]
    more = ["--prompt", "import ", "--max_new_tokens", "20", "--compile", "none", "--json"]
    capsys.readouterr()
    assert generate.main([*flags, str(tmp_path / "q"), *more]) == 0
    with_draft = json.loads(capsys.readouterr().out)
    assert generate.main(["--precision", "w4a8", "--method", "autoregressive", *more]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert with_draft["precision"] == alone["precision"] == "w4a8"
    assert with_draft["outputs"] == alone["outputs"]
    assert with_draft["stats"]["acceptance_by_position"][0] == 1.0  # the drafter is the target
    assert alone["stats"]["weight_bytes"] < 7e6 < with_draft["stats"]["weight_bytes"]
