"""Checkpoint directories: every tensor accounted for, and a clear one-line error for everything that can be
wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, edit_config, edit_weights, random_model, save_checkpoint
from safetensors.torch import load_file, save_file

from checkpoints import find_checkpoint, load_model, stop_ids
from model import BadInput


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(random_model(), tmp_path / "model")


def shard(directory) -> dict[str, str]:
    """Split the weights into two files with an index -> its weight map."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    write_index(directory, weight_map)
    return weight_map


def write_index(directory, weight_map) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_refused(directory, *words: str) -> None:
    with pytest.raises(BadInput) as error:
        load_model(directory)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "changes", [{}, {"tied_embeddings": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}]
)
def test_what_is_saved_is_loaded(changes, tmp_path):
    model = random_model(**changes)
    names = {"tied_embeddings": "tie_word_embeddings", "mlp_bias": "mlp_bias", "qkv_bias": "attention_bias"}
    directory = save_checkpoint(model, tmp_path, **{names[k]: True for k in changes if k in names})
    loaded = load_model(directory)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(loaded.frequencies, model.frequencies)
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == model.config.tied_embeddings


@pytest.mark.parametrize(
    "dtype, own",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_the_precision_is_the_files_own_unless_asked(dtype, own, tmp_path):
    directory = save_checkpoint(random_model(), tmp_path, dtype)
    assert load_model(directory).norm.weight.dtype == own
    assert load_model(directory, "fp32").layers[0].mlp.down_proj.weight.dtype == torch.float32
    assert load_model(directory, "bf16").frequencies.dtype == torch.float32  # angles are never rounded


def test_sharded_equals_single(checkpoint):
    single = load_model(checkpoint).state_dict()
    shard(checkpoint)
    sharded = load_model(checkpoint).state_dict()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_a_tensor_in_two_shards(checkpoint):
    shard(checkpoint)
    tensors = load_file(checkpoint / "model-00001-of-00002.safetensors")
    other = load_file(checkpoint / "model-00002-of-00002.safetensors")
    save_file(other | dict([tensors.popitem()]), checkpoint / "model-00002-of-00002.safetensors")
    assert_refused(checkpoint, "already")


def test_integer_weights_are_never_cast(checkpoint):
    edit_weights(checkpoint, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    for precision in (None, "fp32"):
        with pytest.raises(BadInput, match="model.norm.weight is I8"):
            load_model(checkpoint, precision)


def test_an_impossible_size_costs_nothing(checkpoint):
    edit_config(checkpoint, vocab_size=10**11)
    assert_refused(checkpoint, "config.json asks for (100000000000, 48)")


def test_a_missing_tensor_is_named(checkpoint):
    edit_weights(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert_refused(checkpoint, "model.layers.1.mlp.up_proj.weight", "lack")


def test_an_unexpected_tensor_is_named(checkpoint):
    edit_weights(checkpoint, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    assert_refused(checkpoint, "unexpected tensor model.layers.0.self_attn.q_proj.bias")


def test_a_misshapen_tensor_is_named(checkpoint):
    edit_weights(checkpoint, lambda t: t.update({"model.norm.weight": torch.zeros(47)}))
    assert_refused(checkpoint, "model.norm.weight", "(47,)", "(48,)")


def test_a_config_of_another_size(checkpoint):
    edit_config(checkpoint, intermediate_size=88)
    assert_refused(checkpoint, "has shape (48, 80), config.json asks for (48, 88)")


def test_old_rotary_buffers_and_tied_copies_are_accepted(tmp_path):
    directory = save_checkpoint(random_model(tied_embeddings=True), tmp_path)
    edit_weights(
        directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    )
    edit_weights(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(directory)
    edit_weights(directory, lambda t: t["lm_head.weight"].add_(1))
    assert_refused(directory, "lm_head.weight is not the embedding")


def test_a_truncated_file(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(checkpoint, "model.safetensors", "cut off")


def test_an_empty_file(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert_refused(checkpoint, "model.safetensors", "cut off")


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "/etc/stolen.safetensors", "a/../../stolen.safetensors", "..\\stolen"]
)
def test_an_index_never_points_outside(checkpoint, name):
    save_file({"x": torch.zeros(1)}, checkpoint.parent / "stolen.safetensors")
    write_index(checkpoint, shard(checkpoint) | {"model.norm.weight": name})
    assert_refused(checkpoint, "index.json", "points outside")


def test_an_index_that_lists_a_missing_file(checkpoint):
    write_index(checkpoint, shard(checkpoint) | {"model.norm.weight": "model-00003.safetensors"})
    assert_refused(checkpoint, "model-00003.safetensors", "not there")


def test_a_whole_file_counts_more_than_an_index_beside_it(checkpoint):
    """As it does to transformers: a stale index, of other files or of none, hides nothing."""
    right = load_model(checkpoint).state_dict()
    names = ["model.safetensors", "gptq_model-4bit-128g.safetensors"]
    for weights, index in ((names[0], names[0]), (names[1], names[1]), (names[1], names[0])):
        for content in ("{", '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'):
            (checkpoint / "model.safetensors").rename(checkpoint / weights)
            (checkpoint / f"{index}.index.json").write_text(content)
            loaded = load_model(checkpoint).state_dict()
            assert all(torch.equal(right[name], loaded[name]) for name in right), (weights, index)
            (checkpoint / f"{index}.index.json").unlink()
            (checkpoint / weights).rename(checkpoint / "model.safetensors")


def test_a_whole_file_counts_more_than_shards_beside_it(checkpoint):
    right, whole = load_model(checkpoint).state_dict(), (checkpoint / "model.safetensors").read_bytes()
    shard(checkpoint)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        edit_shard = {key: tensor + 1 for key, tensor in load_file(checkpoint / name).items()}
        save_file(edit_shard, checkpoint / name)
    (checkpoint / "model.safetensors").write_bytes(whole)
    loaded = load_model(checkpoint).state_dict()
    assert all(torch.equal(right[name], loaded[name]) for name in right)


def test_one_shard_of_two_is_no_whole_file(checkpoint):
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert_refused(checkpoint, "index.json", "lists model-00002-of-00002.safetensors, which is not there")


def test_shards_without_an_index(checkpoint):
    shard(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    assert_refused(checkpoint, "has several weight files and no index")


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {"a": 3}}', '{"weight_map": []}'])
def test_an_index_that_is_no_index(checkpoint, content):
    shard(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(content)
    assert_refused(checkpoint, "index.json")


@pytest.mark.parametrize(
    "name, what",
    [
        ("pytorch_model-00001-of-00002.bin", "a pickle; convert it to safetensors"),
        ("consolidated.00.pth", "a pickle; convert it to safetensors"),
        ("consolidated.safetensors", "weights under Mistral's own names"),
        ("model-Q4_K_M.gguf", "a GGUF file"),
        ("weights.npz", "weights of MLX"),
        ("adapter_model.safetensors", "a LoRA adapter and no model; merge it into its model"),
        ("adapter_model.bin", "a LoRA adapter and no model"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_directories_of_other_formats_are_named(checkpoint, name, what, config):
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    if not config:
        (checkpoint / "config.json").unlink()
    assert_refused(checkpoint, f"{checkpoint}: has only {name}, {what}")


def test_files_of_other_formats_beside_a_model_are_none_of_our_business(checkpoint):
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.gguf", "consolidated.safetensors"):
        (checkpoint / name).write_bytes(b"")
    load_model(checkpoint)


def test_a_model_and_an_adapter_in_one_directory(checkpoint):
    """For transformers this is a third model, with the adapter on it."""
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    assert_refused(checkpoint, "config.json and adapter_config.json")


def test_no_config_no_weights_only_bin(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert_refused(checkpoint, "only pytorch_model.bin")
    (checkpoint / "pytorch_model.bin").unlink()
    assert_refused(checkpoint, "no weights")
    (checkpoint / "config.json").unlink()
    assert_refused(checkpoint, "config.json", "no such file")


def test_config_that_is_no_json(checkpoint):
    (checkpoint / "config.json").write_text("{")
    assert_refused(checkpoint, "config.json", "JSON")


def test_quantized_checkpoints_are_refused_by_name(checkpoint):
    edit_config(checkpoint, quantization_config={"quant_method": "gptq"})
    edit_weights(checkpoint, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(2, 2)}))
    assert_refused(checkpoint, "config.json: GPTQ of None bits is not supported")


@pytest.mark.parametrize(
    "name, words",
    [("nowhere", "not a directory"), ("a/b/c", "not a directory"), (str(ROOT / "LICENSE"), "is a file")],
)
def test_paths_that_are_no_checkpoint(name, words):
    with pytest.raises(BadInput, match=words):
        find_checkpoint(name)


def test_a_hub_id_goes_to_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path)
    )
    assert find_checkpoint("owner/some-model.v1") == tmp_path and asked == ["owner/some-model.v1"]

    def fail(name, **_):
        raise OSError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BadInput, match="the hub did not give it: no network$"):
        find_checkpoint("owner/some-model", "--draft_checkpoint_path")


def test_all_stop_ids(tmp_path):
    assert stop_ids(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert stop_ids(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [128001, 128008, 128009]}')
    assert stop_ids(tmp_path) == [128001, 128008, 128009]


MEASURE = """
import sys, threading, time
import safetensors, torch
import generate

def anonymous():
    status = open("/proc/self/status").read()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

generate.load_model(sys.argv[2])  # what PyTorch imports and allocates once and for all
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = generate.load_model(sys.argv[1])
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc")
def test_loading_never_holds_the_weights_twice(tmp_path):
    """Anonymous memory while loading stays below 1.3 times the checkpoint; mapped files do not count."""
    model = random_model(hidden_size=768, intermediate_size=3072, num_layers=12, vocab_size=8000)
    save_checkpoint(model, tmp_path, torch.bfloat16)
    shard(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size > 150e6
    tiny = save_checkpoint(random_model(), tmp_path / "tiny")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tiny)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0.9 * size < int(out) < 1.3 * size


def test_a_real_model_is_not_written_over_files(tmp_path):
    """scripts/get_smollm2.py looks before it downloads anything."""
    (tmp_path / "precious.txt").write_text("mine")
    script = [sys.executable, str(ROOT / "scripts" / "get_smollm2.py"), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"error: {tmp_path} is there already, and not an empty directory\n"
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
