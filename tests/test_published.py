"""Published checkpoints of 4 and 8 bits: what independent writers pack, bit by bit, is what is loaded."""

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
FORMATS = ["awq", "gptq", "gptq_v2", "compressed", "compressed old", "int"]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
KINDS = ("packed", "scales", "zeros")
FORMATS_8 = ["gptq", "gptq_v2", "compressed", "int", "int whole", "int whole scalar"]


# ---- models of known integers, and writers that know the formats from their description alone -----------


@dataclass
class Known:
    """A linear of known numbers: w[o, i] = (q[o, i] - zeros[o, g]) * scales[o, g] with g = groups[i]."""

    q: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor  # of every input: sorted, unless there is act-order
    bits: int = 4

    @property
    def weight(self) -> torch.Tensor:
        return (self.q - self.zeros[:, self.groups]) * self.scales.float()[:, self.groups]


def known_linear(
    out: int, inputs: int, group: int, symmetric: bool, order: torch.Tensor | None, bits: int = 4
) -> Known:
    size = inputs if group == -1 or group > inputs else group
    count, most = -(-inputs // size), 1 << bits  # the last group may be shorter
    zeros = torch.full((out, count), most // 2) if symmetric else torch.randint(0, most, (out, count))
    groups = torch.arange(inputs) // size
    groups = groups if order is None else groups[order[:inputs].argsort()]
    scales = (0.01 + 0.02 * torch.rand(out, count)).bfloat16().half()  # what both 16-bit formats can say
    return Known(torch.randint(0, most, (out, inputs)), zeros, scales * 16 / most, groups, bits)


def put_bits(rows: int, columns: int, numbers, bits: int = 4) -> torch.Tensor:
    """int32 [rows, columns] in which (row, column, field, number) are set a bit at a time."""
    words = [[0] * columns for _ in range(rows)]
    for row, column, field, number in numbers:
        for bit in range(bits):
            if number >> bit & 1:
                words[row][column] |= 1 << (bits * field + bit)
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
    (out, inputs), bits, n = known.q.shape, known.bits, 32 // known.bits
    zeros = ((g, o // n, o % n, (v - less) % 2**bits) for o, g, v in cells(known.zeros))
    return {
        "qweight": put_bits(inputs // n, out, ((i // n, o, i % n, v) for o, i, v in cells(known.q)), bits),
        "qzeros": put_bits(known.zeros.shape[1], out // n, zeros, bits),
        "scales": known.scales.T.contiguous(),
        "g_idx": known.groups.int(),
    }


def write_compressed(known: Known, symmetric: bool, old: bool) -> dict[str, torch.Tensor]:
    (out, inputs), bits, n = known.q.shape, known.bits, 32 // known.bits
    integers = ((o, i // n, i % n, v) for o, i, v in cells(known.q))
    tensors = {
        "weight_packed": put_bits(out, -(-inputs // n), integers, bits),
        "weight_scale": known.scales.bfloat16(),
        "weight_shape": torch.tensor([out, inputs]),
    }
    zeros = ((o // n, g, o % n, v) for o, g, v in cells(known.zeros))
    if not symmetric and old:
        tensors["weight_zero_point"] = (known.zeros - 8).to(torch.int8)
    elif not symmetric:
        tensors["weight_zero_point"] = put_bits(-(-out // n), known.zeros.shape[1], zeros, bits)
    if not bool((known.groups.diff() >= 0).all()):
        tensors["weight_g_idx"] = known.groups.int()
    return tensors


def write_int(known: Known, symmetric: bool) -> dict[str, torch.Tensor]:
    """A byte each, signed."""
    tensors = write_compressed(known, symmetric, old=True)
    del tensors["weight_packed"], tensors["weight_shape"]
    tensors["weight"] = (known.q - 2 ** (known.bits - 1)).to(torch.int8)
    return tensors


def make_whole(tensors: dict[str, torch.Tensor], known: Known, shape: tuple[int, ...]) -> None:
    """Have one scale and one zero for a whole matrix: those of its first row."""
    known.scales[:], known.zeros[:] = known.scales[:1].clone(), known.zeros[:1].clone()
    for name in {"weight_scale", "weight_zero_point"} & tensors.keys():
        tensors[name] = tensors[name][0, :1].view(shape)


def settings(form: str, group: int, symmetric: bool, bits: int = 4) -> dict:
    if form == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    if form.startswith("gptq"):
        names = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": False,
        }
        return names | ({"checkpoint_format": "gptq_v2"} if form == "gptq_v2" else {})
    strategy = {"strategy": "tensor" if "whole" in form else "channel", "group_size": None}
    strategy = strategy if group == -1 else {"strategy": "group"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group} | strategy
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    name = "int-quantized" if form.startswith("int") else "pack-quantized"
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": groups}


def write(form: str, known: Known, symmetric: bool) -> dict[str, torch.Tensor]:
    if form == "awq":
        return write_awq(known)
    if form.startswith("gptq"):
        return write_gptq(known, less=0 if form == "gptq_v2" else 1)
    if form.startswith("int"):
        tensors = write_int(known, symmetric)
    else:
        tensors = write_compressed(known, symmetric, old="old" in form or "whole" in form)
    if "whole" in form:
        make_whole(tensors, known, () if form.endswith("scalar") else (1,))
    return tensors


def publish(tmp_path, form, group=32, symmetric=False, order=None, bits=4, **changes):
    """A random model of known linears -> its directory in the given format, and the linears."""
    model = random_model(**SIZES | changes)
    directory = save_checkpoint(model, tmp_path / form.replace(" ", "-"), torch.bfloat16, eos_token_id=2)
    tensors, linears = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        module = name.removesuffix(".weight")
        linears[module] = known_linear(*tensors.pop(name).shape, group, symmetric, order, bits)
        written = write(form, linears[module], symmetric)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in written.items()}
    save_file(tensors, directory / "model.safetensors")
    edit_config(directory, quantization_config=settings(form, group, symmetric, bits))
    return directory, linears


def read_all(directory) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in open_checkpoint(directory).tensors.items()}


def exact_logits(directory, linears, **changes) -> torch.Tensor:
    """Those of an fp32 model that has the known weights in its linears, and the file's other tensors."""
    model, tensors = random_model(**SIZES | changes), read_all(directory)
    for name, tensor in model.checkpoint_tensors().items():
        module = name.removesuffix(".weight")
        tensor.copy_(linears[module].weight if module in linears else tensors[name])
    return logits(model)


# ---- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_every_number_is_what_was_written(tmp_path, form, symmetric, group):
    directory, linears = publish(tmp_path, form, group, symmetric)
    tensors = read_all(directory)
    assert any(name.endswith(".zeros") for name in tensors) != symmetric
    for module, known in linears.items():
        kinds = [tensors.get(f"{module}.{kind}") for kind in KINDS]
        assert torch.equal(kernels.dequantize(*kinds), known.weight), module


@pytest.mark.parametrize("form", ["compressed whole", "int whole", "int whole scalar"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_for_a_whole_matrix_of_4_bits(tmp_path, form, symmetric):
    directory, linears = publish(tmp_path, form, -1, symmetric)
    tensors = read_all(directory)
    for module, known in linears.items():
        kinds = [tensors.get(f"{module}.{kind}") for kind in KINDS]
        assert kinds[1].shape == (len(known.q), 1) and symmetric == (kinds[2] is None)
        assert torch.equal(kernels.dequantize(*kinds), known.weight), module
    assert logits(load_model(directory)).isfinite().all()


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
        kinds = [tensors[f"{module}.{kind}"] for kind in KINDS]
        assert torch.equal(kernels.dequantize(*kinds)[:, permutation.argsort()], known.weight), module
    exact, loaded = exact_logits(directory, linears), load_model(directory)
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
    exact = exact_logits(directory, linears, tied_embeddings=True, qkv_bias=True)
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
    eight |= {"type": "int", "strategy": "tensor", "dynamic": False}
    edit_config(directory, quantization_config=raw)
    assert precision_of(load_model(directory)) == "w4a8"
    assert "not have; int8 activations with a scale for each token" in capsys.readouterr().err


def test_groups_that_do_not_divide_the_inputs(tmp_path):
    """The last group of a row is shorter: parts of groups, each with the scale of the whole, say the same."""
    for form in ("gptq", "compressed", "int"):
        for order in (None, torch.randperm(352, generator=torch.Generator().manual_seed(4))):
            sizes = {"intermediate_size": 352, "num_layers": 1}
            order = order if order is None else torch.cat((order[order < 64], order[order >= 64]))
            directory, linears = publish(tmp_path, form, 128, False, order, **sizes)
            assert (
                linears[DOWN].scales.shape == (64, 3) and open_checkpoint(directory).quantization.group == 32
            )
            tensors = read_all(directory)
            assert tensors[f"{DOWN}.scales"].shape == (64, 11)
            for module, known in linears.items():
                weight = kernels.dequantize(*(tensors[f"{module}.{kind}"] for kind in KINDS))
                places = tensors.get(f"{module}.permutation", torch.arange(weight.shape[1])).long()
                assert torch.equal(weight[:, places.argsort()], known.weight), (form, module)
            exact = exact_logits(directory, linears, **sizes)
            assert (logits(load_model(directory)) - exact).norm() < 0.02 * exact.norm()
    directory, _ = publish(tmp_path, "gptq", 128, intermediate_size=200)
    with pytest.raises(BadInput, match="down_proj has 200 inputs, no multiple of 16"):
        open_checkpoint(directory)


@pytest.mark.parametrize("form", ["awq", "gptq", "compressed"])
def test_numbers_as_text(tmp_path, form):
    directory, _ = publish(tmp_path, form, 32)
    right, raw = read_all(directory), settings(form, 32, False)
    for part in (raw, raw.get("config_groups", {}).get("group_0", {}).get("weights", {})):
        part |= {key: str(part[key]) for key in ("bits", "group_size", "num_bits") if key in part}
    assert '"32"' in json.dumps(raw) and '"4"' in json.dumps(raw)
    edit_config(directory, quantization_config=raw)
    assert all(torch.equal(right[name], tensor) for name, tensor in read_all(directory).items())


def test_the_layouts_of_auto_round(tmp_path):
    for form in ("gptq", "awq"):
        directory, _ = publish(tmp_path, form, 32)
        right = read_all(directory)
        other = {"lm_head": {"bits": 16, "data_type": "float"}, UP: {"bits": 4}}
        raw = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "extra_config": other}
        raw |= {"packing_format": f"auto_round:auto_{form}", "data_type": "int", "sym": False}
        edit_config(directory, quantization_config=raw)
        assert all(torch.equal(right[name], tensor) for name, tensor in read_all(directory).items())
        for changes, message in (
            ({"packing_format": "auto_round:gptq"}, "AutoRound with packing_format 'auto_round:gptq'"),
            ({"data_type": "mx_fp"}, "AutoRound with data_type 'mx_fp'"),
            ({"act_bits": 8}, "act_bits 8"),
            ({"extra_config": {UP: {"bits": 8}}}, f"AutoRound with another bits for '{UP}'"),
        ):
            edit_config(directory, quantization_config=raw | changes)
            with pytest.raises(BadInput, match=message):
                open_checkpoint(directory)


# ---- 8 bits ----------------------------------------------------------------------------------------------


IN_GROUPS = [form for form in FORMATS_8 if not form.startswith("int whole")]


@pytest.mark.parametrize("form, group", [*((f, -1) for f in FORMATS_8), *((f, 32) for f in IN_GROUPS)])
def test_8_bits_are_taken_as_they_are(tmp_path, form, group):
    directory, linears = publish(tmp_path, form, group, True, bits=8)
    checkpoint, tensors = open_checkpoint(directory), read_all(directory)
    assert checkpoint.precision == "w8a16" and checkpoint.quantization.modules_16_bit == ()
    for module, known in linears.items():
        quantized, scales = tensors[f"{module}.quantized"], tensors[f"{module}.scales"]
        assert torch.equal(quantized, (known.q - 128).to(torch.int8)) and quantized.min() == -128
        assert scales.shape == (len(quantized), 1 if group == -1 else quantized.shape[1] // group)
        assert torch.equal(kernels.dequantize(quantized, scales), known.weight), module
    exact = exact_logits(directory, linears)
    for precision, error in (("w8a16", 0.02), ("w8a8", 0.05)):
        assert (logits(load_model(directory, precision)) - exact).norm() < error * exact.norm()
    with pytest.raises(BadInput, match="has 8-bit weights; use w8a16 or w8a8, not w4a16"):
        load_model(directory, "w4a16")


def test_8_bits_in_groups_with_act_order(tmp_path):
    directory, linears = publish(tmp_path, "gptq", 32, True, SHUFFLED, bits=8)
    assert any(name.endswith("permutation") for name in read_all(directory))
    exact = exact_logits(directory, linears)
    for precision, error in (("w8a16", 0.02), ("w8a8", 0.05)):
        assert (logits(load_model(directory, precision)) - exact).norm() < error * exact.norm()


def test_8_bits_with_act_order_of_one_group(tmp_path):
    """All inputs share a scale, so their order means nothing."""
    directory, _ = publish(tmp_path, "gptq", -1, True, SHUFFLED, bits=8)
    assert not any(name.endswith("permutation") for name in read_all(directory))


@pytest.mark.parametrize("form", FORMATS_8)
def test_8_bits_that_ours_cannot_say_are_refused(tmp_path, form):
    directory, _ = publish(tmp_path, form, -1, False, bits=8)
    with pytest.raises(
        BadInput, match=r"config.json: asymmetric (GPTQ|compressed-tensors .*) of 8 bits is not"
    ):
        open_checkpoint(directory)


def test_8_bit_activations(tmp_path, capsys):
    directory, _ = publish(tmp_path, "int", -1, True, bits=8)
    raw, right = settings("int", -1, True, 8), read_all(directory)
    eight = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    raw["config_groups"]["group_0"]["input_activations"] = eight
    edit_config(directory, quantization_config=raw)
    model = load_model(directory)
    assert precision_of(model) == "w8a8" and capsys.readouterr().err == ""
    eight |= {"strategy": "tensor", "dynamic": False}
    edit_config(directory, quantization_config=raw)
    static = {f"{UP}.input_scale": torch.ones(1), f"{UP}.input_zero_point": torch.zeros(1).to(torch.int8)}
    edit_weights(directory, lambda tensors: tensors.update(static))
    assert (
        torch.equal(logits(load_model(directory)), logits(model))
        and read_all(directory).keys() == right.keys()
    )
    [line, _] = capsys.readouterr().err.splitlines()
    assert "asks for activations that we do not have; int8 activations with a scale for each token" in line
    assert line.endswith(f"; 2 scales like {UP}.input_scale are dropped")


def test_converting_8_bits_keeps_every_number(tmp_path, capsys):
    directory, _ = publish(tmp_path, "gptq", -1, True, bits=8)
    flags = ["--checkpoint_path", str(directory), "--output", str(tmp_path / "ours")]
    assert quantize.main(flags) == 2
    assert f"{directory} is quantized already, to 8 bits" in capsys.readouterr().err
    assert quantize.main([*flags, "--precision", "w8a8"]) == 0
    assert "the file asks for" not in capsys.readouterr().err
    before, after = read_all(directory), read_all(tmp_path / "ours")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for precision in ("w8a16", "w8a8"):
        models = [load_model(path, precision) for path in (directory, tmp_path / "ours")]
        assert torch.equal(logits(models[0]), logits(models[1]))


@pytest.mark.parametrize("bits, form", [(4, "gptq"), (8, "gptq"), (8, "int")])
def test_scales_that_float16_turns_into_0(tmp_path, bits, form):
    """They are missed where a weight is not 0, and only there."""
    directory, _ = publish(tmp_path, form, -1, True, bits=bits)
    name, row = (f"{UP}.weight_scale", (3, 0)) if form == "int" else (f"{UP}.scales", (0, 3))

    def shrink(tensors):
        tensors[name] = tensors[name].float()
        tensors[name][row] = 1e-9

    edit_weights(directory, shrink)
    with pytest.raises(BadInput, match=f"model.safetensors: {name} has scales that are 0 in float16"):
        load_model(directory)

    def empty(tensors):
        if form == "int":
            tensors[f"{UP}.weight"][3] = 0
        else:
            middle = 0x88888888 if bits == 4 else 0x80808080
            tensors[f"{UP}.qweight"][:, 3] = middle - 2**32

    edit_weights(directory, empty)
    for label in (form, "gptq_v2" if form == "gptq" else form):  # a wrong label changes nothing, as it should
        edit_config(directory, quantization_config=settings(label, -1, True, bits))
        load_model(directory)
        assert read_all(directory)[f"{UP}.scales"][3, 0] == 0


def test_bytes_that_are_too_large_for_4_bits(tmp_path):
    directory, _ = publish(tmp_path, "int", 32, True)
    edit_weights(directory, lambda tensors: tensors[f"{UP}.weight"].fill_(8))
    with pytest.raises(BadInput, match=f"{UP}.weight is not within -8 and 7"):
        load_model(directory)


def test_checkpoints_of_several_widths_are_refused(tmp_path):
    directory, _ = publish(tmp_path, "compressed", 32, True)
    raw = settings("compressed", 32, True)
    groups = raw["config_groups"]
    for form, bits, message in (
        ("compressed", 8, "mixes pack-quantized: 4 bits in groups of 32, 8 bits in groups of 32 is not"),
        ("int", 4, "compressed-tensors that mixes int-quantized, pack-quantized: 4 bits in groups of 32"),
    ):
        other = settings(form, 32, True, bits)
        raw["config_groups"] = groups | {
            "group_1": other["config_groups"]["group_0"] | {"format": other["format"]}
        }
        edit_config(directory, quantization_config=raw)
        with pytest.raises(BadInput, match=message):
            open_checkpoint(directory)


# ---- scales of what we do not quantize, and formats of other tools ---------------------------------------

SCALES = [
    *(f"self_attn.{name}" for name in ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale")),
    *(
        f"self_attn.{name}"
        for name in ("attn.k_scale", "k_zero_point", "k_proj.k_scale", "prob_output_scale")
    ),
    *("self_attn.k_proj.output_scale", "self_attn.v_proj.output_zero_point", "mlp.up_proj.input_scale"),
    *("mlp.up_proj.input_zero_point", "self_attn.v_global_scale"),
]


@pytest.mark.parametrize("form", ["16 bits", "gptq", "compressed"])
def test_scales_of_caches_and_activations_are_dropped_as_announced(tmp_path, form, capsys):
    directory = (
        save_checkpoint(random_model(**SIZES), tmp_path / "plain", torch.bfloat16)
        if form == "16 bits"
        else publish(tmp_path, form, 32, True)[0]
    )
    right = read_all(directory)
    if form == "compressed":
        edit_config(
            directory, quantization_config=settings(form, 32, True) | {"kv_cache_scheme": {"num_bits": 8}}
        )
    scales = {f"model.layers.0.{name}": torch.ones(1) for name in SCALES}
    edit_weights(directory, lambda tensors: tensors.update(scales))
    assert read_all(directory).keys() == right.keys()
    [line] = capsys.readouterr().err.splitlines()
    assert (
        f"config.json: {'asks for a quantized cache' if form == 'compressed' else 'has scales of a cache'}"
        in line
    )
    assert f"; {len(SCALES)} scales like model.layers.0." in line and line.endswith("_scale are dropped")
    edit_weights(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.scale": torch.ones(1)}))
    with pytest.raises(BadInput, match="unexpected tensor model.layers.0.self_attn.scale"):
        read_all(directory)


def test_16_bit_weights_for_a_quantized_cache(tmp_path, capsys):
    directory = save_checkpoint(random_model(**SIZES), tmp_path, torch.bfloat16)
    right = logits(load_model(directory))
    raw = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    edit_config(directory, quantization_config=raw | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    assert torch.equal(logits(load_model(directory)), right)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("config.json: asks for a quantized cache; 16 bits it is")


@pytest.mark.parametrize(
    "suffix, tool",
    [
        ("weight.absmax", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("W_q", "HQQ"),
        ("codebooks", "AQLM"),
        ("Qidxs", "QuIP#"),
        ("q_weight", "EXL2"),
        ("trellis", "EXL3"),
        ("weight_scale_2", "ModelOpt NVFP4"),
        ("weight_scale_inv", "fp8"),
        ("weight_blocks", "MXFP4"),
        ("qweight", "GPTQ or AWQ"),
        ("weight_scale", "compressed-tensors"),
    ],
)  # fmt: skip
def test_tensors_of_other_tools_are_named_without_a_configuration(tmp_path, suffix, tool):
    directory = save_checkpoint(random_model(**SIZES), tmp_path, torch.bfloat16)
    edit_weights(directory, lambda tensors: tensors.update({f"{UP}.{suffix}": torch.zeros(2, 2)}))
    with pytest.raises(
        BadInput, match=f"{UP}.{suffix} is of {tool}, of which .*config.json says nothing"
    ) as error:
        open_checkpoint(directory)
    assert "\n" not in str(error.value)


def test_mlx_is_named(tmp_path):
    """With its settings under its own name, under that of all, and without any."""
    directory = save_checkpoint(random_model(**SIZES), tmp_path, torch.bfloat16)
    weight = torch.zeros(96, 8).to(torch.uint32)
    parts = {"weight": weight, "scales": torch.ones(96, 1), "biases": torch.ones(96, 1)}
    edit_weights(directory, lambda tensors: tensors.update({f"{UP}.{name}": t for name, t in parts.items()}))
    for key in ("quantization", "quantization_config", "something_else"):
        raw = json.loads((directory / "config.json").read_text())
        own = {name: value for name, value in raw.items() if not name.startswith("quantization")}
        (directory / "config.json").write_text(json.dumps(own | {key: {"group_size": 64, "bits": 4}}))
        with pytest.raises(
            BadInput, match=r"config.json: MLX is not supported|up_proj.scales is of MLX"
        ) as error:
            open_checkpoint(directory)
        assert ("is of MLX" in str(error.value)) == (key == "something_else")


def test_modelopt_is_named(tmp_path):
    directory = save_checkpoint(random_model(**SIZES), tmp_path, torch.bfloat16)
    raw = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (directory / "hf_quant_config.json").write_text(json.dumps(raw))
    message = r"hf_quant_config.json: quant_method 'modelopt' \(NVFP4\) is not supported"
    with pytest.raises(BadInput, match=message):
        open_checkpoint(directory)


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
        ("gptq", {"bits": 8}, r"q_proj.qweight is I32 \(8, 64\); GPTQ has I32 \(16, 64\) here"),
        ("gptq", {"bits": 8, "group_size": -1}, r"qweight is I32 \(8, 64\); GPTQ has I32 \(16, 64\) here"),
        ("gptq", {"bits": "four"}, "config.json: bits is 'four', which is no whole number"),
        ("gptq", {"group_size": "a row"}, "config.json: group_size is 'a row', which is no whole"),
        ("gptq", {"bits": 4.0}, "GPTQ of 4.0 bits is not supported"),
        ("gptq", {"bits": True}, "GPTQ of True bits is not supported"),
        ("gptq", {"adapter": {"name": "lora"}}, "gptq with an adapter is not supported"),
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
        ("compressed", {"quant_method": "gptq", "bits": 4, "group_size": 32}, "format 'pack-quantized'"),
        ("gptq", {"quant_method": "auto-round"}, "AutoRound with packing_format None is not supported"),
        ("gptq", {"quant_method": None}, "quant_method None is not supported; AutoAWQ gemm, GPTQ and"),
        ("gptq", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method 'modelopt' .NVFP4. is"),
        ("gptq", {"quant_method": "exl2", "bits": 4.25}, "quant_method 'exl2' is not supported"),
        ("compressed", {"format": "mixed-precision"}, "compressed-tensors mixed-precision is not supported"),
        ("compressed", {"format": "int-quantized"}, "no linear has a tensor weight of integers"),
        ("compressed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "tensors sparse-24-bitmask is"),
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
        ({"num_bits": 8}, r"weight_packed is I32 \(64, 8\); compressed-tensors pack-quantized has I32"),
        ({"num_bits": 2}, "int of 2 bits"),
        ({"num_bits": "two"}, "num_bits is 'two', which is no whole number"),
        ({"type": "float"}, "float of 4 bits"),
        ({"strategy": "block"}, "strategy 'block'"),
    ):
        raw = settings("compressed", 32, False)
        raw["config_groups"]["group_0"]["weights"] |= changes
        edit_config(directory, quantization_config=raw)
        with pytest.raises(BadInput, match=message):
            open_checkpoint(directory)


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


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_8_bit_files_of_the_package_compressed_tensors(tmp_path, strategy):
    """Its own dequantized weights are ours."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors import IntQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=8, symmetric=True, strategy=strategy)
    activations = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    model = random_model(**SIZES)
    directory, dequantized = save_checkpoint(model, tmp_path, torch.bfloat16), {}

    def rewrite(tensors):
        for name in [name for name in tensors if "_proj.weight" in name]:
            module, weight = name.removesuffix(".weight"), tensors.pop(name).float()
            largest = (
                weight.abs().amax(dim=1, keepdim=True) if strategy == "channel" else weight.abs().max()[None]
            )
            state = {"weight": weight, "weight_scale": (largest / 127.5).half().float()}
            written = IntQuantizationCompressor.compress(state, scheme)
            dequantized[module] = IntQuantizationCompressor.decompress(written, scheme)["weight"]
            tensors.update({f"{module}.{suffix}": tensor for suffix, tensor in written.items()})

    edit_weights(directory, rewrite)
    groups = {"group_0": json.loads(scheme.model_dump_json())}
    raw = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    edit_config(directory, quantization_config=raw)
    tensors = read_all(directory)
    for module, weight in dequantized.items():
        ours = kernels.dequantize(tensors[f"{module}.quantized"], tensors[f"{module}.scales"])
        assert torch.equal(ours, weight.float()), module
    assert precision_of(load_model(directory)) == "w8a8"


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
