"""Published 4-bit checkpoints: what independent writers pack, bit by bit, is what is loaded."""

import json
from dataclasses import asdict, dataclass

import pytest
import torch
from conftest import edit_config, edit_weights, logits, random_model, save_checkpoint
from safetensors.torch import load_file, save_file

import generate
import kernels
import quantize
from checkpoints import load_model, open_checkpoint
from model import BadInput, Linear
from packing import precision_of

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_layers": 1}
SHUFFLED = torch.randperm(96, generator=torch.Generator().manual_seed(3))
SHUFFLED = torch.cat((SHUFFLED[SHUFFLED < 64], SHUFFLED[SHUFFLED >= 64]))  # an order of 64 inputs, and of 96
FORMATS = ["awq", "gptq", "gptq_v2", "compressed", "compressed old"]


# ---- models of known integers, and writers that know the formats from their description alone -----------


@dataclass
class Known:
    """A linear of known numbers: w[o, i] = (q[o, i] - zeros[o, g]) * scales[o, g] with g = groups[i]."""

    q: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor  # of every input: sorted, unless there is act-order

    @property
    def weight(self) -> torch.Tensor:
        return (self.q - self.zeros[:, self.groups]) * self.scales.float()[:, self.groups]


def known_linear(out: int, inputs: int, group: int, symmetric: bool, order: torch.Tensor | None) -> Known:
    size = inputs if group == -1 or group > inputs else group
    count = inputs // size
    zeros = torch.full((out, count), 8) if symmetric else torch.randint(0, 16, (out, count))
    groups = torch.arange(inputs) // size
    groups = groups if order is None else groups[order[:inputs].argsort()]
    scales = (0.01 + 0.02 * torch.rand(out, count)).bfloat16().half()  # what both 16-bit formats can say
    return Known(torch.randint(0, 16, (out, inputs)), zeros, scales, groups)


def put_bits(rows: int, columns: int, numbers) -> torch.Tensor:
    """int32 [rows, columns] in which (row, column, nibble, number) are set a bit at a time."""
    words = [[0] * columns for _ in range(rows)]
    for row, column, nibble, number in numbers:
        for bit in range(4):
            if number >> bit & 1:
                words[row][column] |= 1 << (4 * nibble + bit)
    signed = [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int64).to(torch.int32)


def cells(table: torch.Tensor):
    for row, numbers in enumerate(table.tolist()):
        for column, number in enumerate(numbers):
            yield row, column, number


def write_awq(known: Known) -> dict[str, torch.Tensor]:
    out, inputs = known.q.shape
    holds = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble n of a word holds column holds[n] of its eight
    integers = ((i, o // 8, holds.index(o % 8), v) for o, i, v in cells(known.q))
    zeros = ((g, o // 8, holds.index(o % 8), v) for o, g, v in cells(known.zeros))
    return {
        "qweight": put_bits(inputs, out // 8, integers),
        "qzeros": put_bits(known.zeros.shape[1], out // 8, zeros),
        "scales": known.scales.T.contiguous(),
    }


def write_gptq(known: Known, less: int) -> dict[str, torch.Tensor]:
    out, inputs = known.q.shape
    zeros = ((g, o // 8, o % 8, (v - less) & 15) for o, g, v in cells(known.zeros))
    return {
        "qweight": put_bits(inputs // 8, out, ((i // 8, o, i % 8, v) for o, i, v in cells(known.q))),
        "qzeros": put_bits(known.zeros.shape[1], out // 8, zeros),
        "scales": known.scales.T.contiguous(),
        "g_idx": known.groups.int(),
    }


def write_compressed(known: Known, symmetric: bool, old: bool) -> dict[str, torch.Tensor]:
    out, inputs = known.q.shape
    integers = ((o, i // 8, i % 8, v) for o, i, v in cells(known.q))
    tensors = {
        "weight_packed": put_bits(out, -(-inputs // 8), integers),
        "weight_scale": known.scales.bfloat16(),
        "weight_shape": torch.tensor([out, inputs]),
    }
    zeros = ((o // 8, g, o % 8, v) for o, g, v in cells(known.zeros))
    if not symmetric and old:
        tensors["weight_zero_point"] = (known.zeros - 8).to(torch.int8)
    elif not symmetric:
        tensors["weight_zero_point"] = put_bits(-(-out // 8), known.zeros.shape[1], zeros)
    if not bool((known.groups.diff() >= 0).all()):
        tensors["weight_g_idx"] = known.groups.int()
    return tensors


def settings(form: str, group: int, symmetric: bool) -> dict:
    if form == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    if form.startswith("gptq"):
        names = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "desc_act": False}
        return names | ({"checkpoint_format": "gptq_v2"} if form == "gptq_v2" else {})
    strategy = {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group"}
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "group_size": group} | strategy
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def write(form: str, known: Known, symmetric: bool) -> dict[str, torch.Tensor]:
    if form == "awq":
        return write_awq(known)
    if form.startswith("gptq"):
        return write_gptq(known, less=0 if form == "gptq_v2" else 1)
    return write_compressed(known, symmetric, old=form.endswith("old"))


def publish(tmp_path, form, group=32, symmetric=False, order=None, **changes):
    """A random model of known 4-bit linears -> its directory in the given format, and the linears."""
    model = random_model(**SIZES, **changes)
    directory = save_checkpoint(model, tmp_path / form.replace(" ", "-"), torch.bfloat16, eos_token_id=2)
    tensors, linears = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        module = name.removesuffix(".weight")
        linears[module] = known_linear(*tensors.pop(name).shape, group, symmetric, order)
        written = write(form, linears[module], symmetric)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in written.items()}
    save_file(tensors, directory / "model.safetensors")
    edit_config(directory, quantization_config=settings(form, group, symmetric))
    return directory, linears


def read_all(directory) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in open_checkpoint(directory).tensors.items()}


# ---- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_every_number_is_what_was_written(tmp_path, form, symmetric, group):
    directory, linears = publish(tmp_path, form, group, symmetric)
    tensors = read_all(directory)
    assert any(name.endswith(".zeros") for name in tensors) != symmetric
    for module, known in linears.items():
        kinds = [tensors.get(f"{module}.{kind}") for kind in ("packed", "scales", "zeros")]
        assert torch.equal(kernels.dequantize(*kinds), known.weight), module


@pytest.mark.parametrize("order", [None, SHUFFLED], ids=["in order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_numbers_in_every_format_are_the_same_tensors(tmp_path, symmetric, order):
    forms = FORMATS if order is None else FORMATS[1:]  # AWQ has no act-order
    first = read_all(publish(tmp_path, forms[0], 32, symmetric, order)[0])
    for form in forms[1:]:
        tensors = read_all(publish(tmp_path, form, 32, symmetric, order)[0])
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensors[name], first[name]) for name in first), form


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "compressed"])
def test_act_order(tmp_path, form):
    """Columns of a group become neighbours, and the permutation brings the inputs along."""
    directory, linears = publish(tmp_path, form, 32, False, SHUFFLED)
    tensors = read_all(directory)
    for module, known in linears.items():
        permutation = tensors[f"{module}.permutation"].long()
        assert not torch.equal(permutation, permutation.sort().values)
        kinds = [tensors[f"{module}.{kind}"] for kind in ("packed", "scales", "zeros")]
        assert torch.equal(kernels.dequantize(*kinds)[:, permutation.argsort()], known.weight), module
    model = random_model(**SIZES)
    for name, tensor in model.checkpoint_tensors().items():
        module = name.removesuffix(".weight")
        tensor.copy_(linears[module].weight if module in linears else tensors[name])
    exact, loaded = logits(model), load_model(directory)
    assert (logits(loaded) - exact).norm() < 0.02 * exact.norm()
    for path, linear in loaded.named_modules():
        assert not isinstance(linear, Linear) or linear.float32_out or linear.permutation is not None, path


def test_what_says_act_order_and_has_none(tmp_path):
    """desc_act with groups in order, or with indices that were never set, is no act-order."""
    directory, _ = publish(tmp_path, "gptq", 32)
    before = read_all(directory)
    edit_config(directory, quantization_config=settings("gptq", 32, False) | {"desc_act": True})
    assert read_all(directory).keys() == before.keys()

    def unset(tensors):
        for name in tensors:
            if name.endswith("g_idx"):
                tensors[name].zero_()

    edit_weights(directory, unset)
    assert read_all(directory).keys() == before.keys()


@pytest.mark.parametrize("form, label", [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_the_zeros_of_a_symmetric_file_count_and_not_its_label(tmp_path, form, label):
    directory, linears = publish(tmp_path, form, 32, True)
    right = read_all(directory)
    edit_config(directory, quantization_config=settings(label, 32, True))
    wrong = read_all(directory)
    assert wrong.keys() == right.keys() and all(torch.equal(wrong[name], right[name]) for name in right)
    assert not any(name.endswith("zeros") for name in wrong)


def test_asymmetric_gptq_is_read_as_labelled_and_says_so(tmp_path, capsys):
    directory, linears = publish(tmp_path, "gptq", 32)
    zeros = read_all(directory)["model.layers.0.mlp.up_proj.zeros"]
    assert int(zeros.min()) == 0  # which version 1 stores as 15
    assert torch.equal(zeros, linears["model.layers.0.mlp.up_proj"].zeros.half())
    assert "asymmetric GPTQ; its zeros are taken for version 1, as labelled" in capsys.readouterr().err


def test_settings_in_files_of_their_own(tmp_path):
    """Old checkpoints have their settings beside config.json, under other names."""
    for form, name in (("awq", "quant_config.json"), ("gptq", "quantize_config.json")):
        directory, _ = publish(tmp_path, form, 32, True)
        right, raw = read_all(directory), json.loads((directory / "config.json").read_text())
        raw.pop("quantization_config")
        (directory / "config.json").write_text(json.dumps(raw))
        old = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
        old = old if form == "awq" else {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
        (directory / name).write_text(json.dumps(old))
        assert all(torch.equal(right[key], tensor) for key, tensor in read_all(directory).items())


def test_modules_that_stayed_16_bit_and_a_quantized_head(tmp_path):
    directory, linears = publish(tmp_path, "compressed", 32, True)
    head, weight = known_linear(61, 64, 32, True, None), torch.randn(64, 96).bfloat16()

    def change(tensors):
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            tensors.pop(f"model.layers.0.mlp.down_proj.{suffix}")
        tensors.pop("lm_head.weight")
        tensors["model.layers.0.mlp.down_proj.weight"] = weight
        tensors.update({f"lm_head.{name}": t for name, t in write_compressed(head, True, False).items()})

    edit_weights(directory, change)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.quantization.modules_16_bit == ("model.layers.0.mlp.down_proj",)
    assert checkpoint.quantization.lm_head_bits == 4 and checkpoint.precision == "w4a16"
    model = load_model(directory)
    assert torch.equal(kernels.dequantize(model.lm_head.weight, model.lm_head.scales)[:61], head.weight)
    down = model.layers[0].mlp.down_proj.weight
    assert torch.equal(kernels.unpack(down) if down.dim() == 4 else down, weight)


def test_other_names_for_the_same_settings(tmp_path):
    """AWQ without a version, older compressed-tensors, GPTQ with exclusions, a file name of AutoGPTQ's."""
    for form, change in (
        ("awq", lambda raw: raw.pop("version")),
        ("compressed", lambda raw: raw.pop("quant_method")),
        ("gptq", lambda raw: raw.update(dynamic={"-:lm_head": {}, "up_proj": {"bits": 4}})),
    ):
        directory, _ = publish(tmp_path, form, 32)
        right, raw = read_all(directory), settings(form, 32, False)
        change(raw)
        key = "compression_config" if form == "compressed" else "quantization_config"
        edit_config(directory, quantization_config=None)
        edit_config(directory, **{key: raw})
        (directory / "model.safetensors").rename(directory / "gptq_model-4bit-32g.safetensors")
        assert all(torch.equal(right[name], tensor) for name, tensor in read_all(directory).items())


@pytest.mark.parametrize("form", ["awq", "gptq", "compressed"])
def test_models_of_other_kinds(tmp_path, form):
    """Tied embeddings with a second copy in the file, biases, and groups larger than the inputs."""
    directory, linears = publish(tmp_path, form, 128, True, tied_embeddings=True, qkv_bias=True)
    edit_config(directory, tie_word_embeddings=True, model_type="qwen2")
    edit_weights(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_model(directory)
    assert model.lm_head.weight is model.embed_tokens.weight and model.config.qkv_bias
    model = random_model(**SIZES, tied_embeddings=True, qkv_bias=True)
    tensors = read_all(directory)
    for name, tensor in model.checkpoint_tensors().items():
        module = name.removesuffix(".weight")
        tensor.copy_(linears[module].weight if module in linears else tensors[name])
    exact = logits(model)
    assert (logits(load_model(directory)) - exact).norm() < 0.02 * exact.norm()


def test_a_quantized_head_with_a_second_one_is_refused(tmp_path):
    directory, _ = publish(tmp_path, "gptq", 32, True, vocab_size=64)
    head = write("gptq", known_linear(64, 64, 32, True, None), True)
    edit_weights(directory, lambda t: t.update({f"lm_head.{name}": tensor for name, tensor in head.items()}))
    with pytest.raises(BadInput, match="unexpected tensor lm_head.weight"):
        load_model(directory)
    edit_weights(directory, lambda tensors: tensors.pop("lm_head.weight"))
    assert load_model(directory).lm_head.scales is not None


def test_biases_of_zeros_are_dropped_and_others_are_not(tmp_path):
    directory, _ = publish(tmp_path, "gptq", 32, True)
    name = "model.layers.0.mlp.up_proj.bias"
    edit_weights(directory, lambda tensors: tensors.update({name: torch.zeros(96).half()}))
    assert name not in read_all(directory)
    edit_weights(directory, lambda tensors: tensors.update({name: torch.ones(96).half()}))
    with pytest.raises(BadInput, match=f"unexpected tensor {name}"):
        read_all(directory)


def test_activations_that_the_file_asks_for(tmp_path, capsys):
    directory, _ = publish(tmp_path, "compressed", 32, True)
    raw = settings("compressed", 32, True)
    eight = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    raw["config_groups"]["group_0"]["input_activations"] = eight
    edit_config(directory, quantization_config=raw)
    assert precision_of(load_model(directory)) == "w4a8"
    eight["type"] = "float"
    edit_config(directory, quantization_config=raw)
    assert precision_of(load_model(directory)) == "w4a16"
    assert "asks for activations that we do not have; 16 bits it is" in capsys.readouterr().err


# ---- from the command line -------------------------------------------------------------------------------


def test_converting_keeps_every_number(tmp_path, capsys):
    directory, _ = publish(tmp_path, "gptq", 32, order=SHUFFLED)
    assert quantize.main(["--checkpoint_path", str(directory), "--output", str(tmp_path / "ours")]) == 0
    before, after = read_all(directory), read_all(tmp_path / "ours")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert torch.equal(logits(load_model(directory)), logits(load_model(tmp_path / "ours")))
    for flags in (["--rotate"], ["--group_size", "32"], ["--quantizer", "gptq"], ["--lm_head_bits", "8"]):
        arguments = ["--checkpoint_path", str(directory), "--output", str(tmp_path / "again"), *flags]
        assert quantize.main(arguments) == 2
        assert f"{flags[0]}: {directory} is GPTQ; it is converted as it is" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_generate_takes_the_directory_as_it_is(tmp_path, capsys):
    directory, _ = publish(tmp_path, "awq", 32)
    flags = ["--checkpoint_path", str(directory), "--prompt_ids", "1,5,9", "--compile", "none", "--json"]
    flags += ["--max_new_tokens", "12", "--ignore_eos"]
    texts = {}
    for precision in ("w4a16", "w4a4"):
        for method in ("autoregressive", "lookup"):
            assert generate.main([*flags, "--precision", precision, "--method", method]) == 0
            texts[method] = json.loads(capsys.readouterr().out)
        assert texts["autoregressive"]["precision"] == precision
        assert texts["autoregressive"]["outputs"] == texts["lookup"]["outputs"]
    assert generate.main([*flags, "--precision", "bf16"]) == 2
    assert "has 4-bit weights; use w4a16 or w4a8 or w4a4, not bf16" in capsys.readouterr().err


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, changes, message",
    [
        ("awq", {"version": "gemv"}, "AutoAWQ gemv is not supported; AutoAWQ gemm, GPTQ and"),
        ("awq", {"version": "marlin"}, "AutoAWQ marlin is not supported"),
        ("awq", {"bits": 8}, "AutoAWQ of 8 bits is not supported"),
        ("awq", {"group_size": 48}, "group_size 48 is not supported; 16, 32"),
        ("awq", {"group_size": 64}, r"q_proj.qzeros is I32 \(2, 8\); AutoAWQ gemm has I32 \(1, 8\) here"),
        ("awq", {"group_size": 16}, r"self_attn.*qzeros is I32 \(2, 8\); AutoAWQ gemm has I32 \(4, 8\) here"),
        ("gptq", {"bits": 3}, "GPTQ of 3 bits is not supported"),
        ("gptq", {"bits": 8}, "GPTQ of 8 bits is not supported"),
        ("gptq", {"is_marlin_format": True}, "GPTQ with checkpoint_format 'marlin' is not supported"),
        ("gptq", {"checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas' is not supported"),
        ("gptq", {"pack_dtype": "int16"}, "GPTQ packed into int16 is not supported"),
        ("gptq", {"dynamic": {"up_proj": {"bits": 8}}}, "another bits for 'up_proj' is not supported"),
        ("gptq", {"quant_method": "awq"}, r"qweight is I32 \(8, 64\); AutoAWQ gemm has I32 \(64, 8\) here"),
        ("compressed", {"format": "marlin-24"}, "compressed-tensors marlin-24 is not supported"),
        ("compressed", {"config_groups": 3}, "config.json: the quantization_config is not understood"),
        ("compressed", {"config_groups": {}}, "without quantized weights is not supported"),
        ("compressed", {"transform_config": {"groups": {}}}, "with a transform_config is not supported"),
        ("gptq", {"rotation": "hadamard"}, "gptq with a rotation is not supported"),
        ("awq", {"group_size": 32.0}, "group_size 32.0 is not supported"),
        ("awq", {"quant_method": ["awq"]}, "quant_method .*'awq'.* is not supported"),
        ("awq", {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
        ("compressed", {"quant_method": "gptq", "bits": 4, "group_size": 32}, "no linear has a tensor qwei"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_name(tmp_path, form, changes, message):
    directory, _ = publish(tmp_path, form)
    edit_config(directory, quantization_config=settings(form, 32, False) | changes)
    with pytest.raises(BadInput, match=message) as error:
        open_checkpoint(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_compressed_weights_of_other_widths_are_refused(tmp_path):
    directory, _ = publish(tmp_path, "compressed")
    for changes, message in (
        ({"num_bits": 8}, "int of 8 bits"),
        ({"type": "float"}, "float of 4 bits"),
        ({"strategy": "block"}, "strategy 'block'"),
    ):
        raw = settings("compressed", 32, False)
        raw["config_groups"]["group_0"]["weights"] |= changes
        edit_config(directory, quantization_config=raw)
        with pytest.raises(BadInput, match=message):
            open_checkpoint(directory)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "form, damage, message",
    [
        ("awq", lambda t: t.pop(f"{UP}.scales"), f"model.safetensors: {UP}.qweight has no scales beside it"),
        ("gptq", lambda t: t.pop(f"{UP}.qzeros"), f"{UP}.qweight has no qzeros"),
        ("gptq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].long()}), f"{UP}.qweight is I64"),
        ("awq", lambda t: t.update({f"{UP}.scales": torch.full((2, 96), 1e9)}), "does not fit into float16"),
        ("awq", lambda t: t.update({f"{UP}.scales": torch.full((2, 96), torch.nan)}), f"{UP}.scales does"),
        ("compressed old", lambda t: t[f"{UP}.weight_zero_point"].fill_(9), "is not within -8 and 7"),
        ("gptq", lambda t: t[f"{UP}.g_idx"].fill_(1), f"{UP}.g_idx does not have 32 inputs a group"),
        ("gptq", lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].flip(0)}), "different orders"),
        ("compressed", lambda t: t[f"{UP}.weight_shape"].fill_(3), f"{UP}.weight_shape is \\[3, 3\\]"),
        ("compressed", lambda t: t.update({"model.odd": torch.zeros(1)}), "unexpected tensor model.odd"),
        ("awq", lambda t: [t.pop(n) for n in list(t) if n.startswith(UP)], "one matrix"),
    ],
)  # fmt: skip
def test_malformed_tensors_are_named(tmp_path, form, damage, message):
    directory, _ = publish(tmp_path, form)
    edit_weights(directory, damage)
    with pytest.raises(BadInput, match=message) as error:
        load_model(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_a_permutation_of_ours_that_is_none_is_refused(tmp_path):
    """The kernel trusts its numbers: an index from outside would read memory of others."""
    directory, _ = publish(tmp_path, "gptq", order=SHUFFLED)
    assert quantize.main(["--checkpoint_path", str(directory), "--output", str(tmp_path / "q")]) == 0
    path, name = tmp_path / "q" / "model.safetensors", "model.layers.0.mlp.down_proj.permutation"
    q, tensors = open_checkpoint(tmp_path / "q").quantization, load_file(path)
    for value in (10**6, -1, 5):
        tensors[name][3] = value
        save_file(tensors, path, {"gpt_spec": json.dumps(asdict(q))})
        with pytest.raises(BadInput, match=f"{name} is no permutation of 96 inputs"):
            load_model(tmp_path / "q")


# ---- files written by the package compressed-tensors -----------------------------------------------------


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_files_of_the_package_compressed_tensors(tmp_path, symmetric, group):
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "channel" if group is None else "group"
    weights = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    directory, linears = publish(tmp_path, "compressed", group or -1, symmetric)

    def rewrite(tensors):
        for module, known in linears.items():
            for name in [name for name in tensors if name.startswith(f"{module}.")]:
                del tensors[name]
            state = {"weight": known.weight, "weight_scale": known.scales.float()}
            state |= {} if symmetric else {"weight_zero_point": (known.zeros - 8).to(torch.int8)}
            written = PackedQuantizationCompressor.compress(state, scheme)
            tensors.update({f"{module}.{name}": tensor.contiguous() for name, tensor in written.items()})

    ours = read_all(directory)
    edit_weights(directory, rewrite)
    groups = {"group_0": json.loads(scheme.model_dump_json())}
    raw = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    edit_config(directory, quantization_config=raw)
    theirs = read_all(directory)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
