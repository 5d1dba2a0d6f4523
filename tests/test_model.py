"""The model against Hugging Face transformers, and the configurations it reads or refuses."""

import json

import pytest
import torch
from conftest import random_model, random_prompts

from checkpoints import load_model
from gpt_spec import cache_length, generate
from model import BadInput, ModelConfig, Transformer, rope_frequencies

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32, "tie_word_embeddings": True}),
    "llama-linear-bias": (
        "Llama",
        {"rope_parameters": LINEAR_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
}


def save_reference(kind: str, directory, **save_options):
    """A random model of transformers, every weight perturbed (norms and biases too), written by
    save_pretrained."""
    transformers = pytest.importorskip("transformers")
    name, changes = ARCHITECTURES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory, **save_options)
    return model


@torch.no_grad()
def reference_greedy(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("shards", ["one file", "sharded"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_and_greedy_tokens_equal_transformers(kind, shards, tmp_path):
    reference = save_reference(kind, tmp_path, max_shard_size="50KB" if shards == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "sharded")
    model = load_model(tmp_path)
    tokens = torch.tensor(random_prompts([100], 97))
    with torch.no_grad():
        expected, logits = reference(tokens).logits, model.lm_head(model.recompute(tokens))
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-4
    prompt = random_prompts([20], 97)[0]
    ours = [t for step in generate(model, prompt, max_new_tokens=64, compile=False) for t in step[0].tokens]
    assert ours == reference_greedy(reference, prompt, 64)


@pytest.mark.parametrize("kind", ["llama3", "llama-linear-bias"])
def test_both_spellings_of_the_configuration(kind, tmp_path):
    """transformers 5 writes rope_parameters and dtype; everything published before has the older names."""
    save_reference(kind, tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in new and "dtype" in new
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(new["rope_parameters"])
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": new["dtype"]}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    rope["type"] = rope.pop("rope_type")  # older still
    assert ModelConfig.from_dict(old | {"rope_scaling": rope}) == ModelConfig.from_dict(new)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_frequencies_equal_transformers(kind):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "default": {"rope_type": "default", "rope_theta": 500.0},
        "linear": LINEAR_ROPE,
        "llama3": LLAMA3_ROPE,
    }
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope[kind])
    ours = rope_frequencies(ModelConfig.from_dict(json.loads(config.to_json_string(use_diff=False))))
    if kind == "default":
        expected = 500.0 ** (-torch.arange(0, 16, 2) / 16)
    else:
        expected = ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0]
    torch.testing.assert_close(ours, expected)


RAW = SIZES | {"model_type": "llama", "bos_token_id": 1}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": None}, "use llama, mistral, qwen2 or qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "wide"}, "must be a whole number"),
        ({"head_dim": 15}, "RoPE needs an even one"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "'yarn' is not supported; use default, linear or llama3",
        ),
        ({"rope_scaling": {"type": "linear"}}, "the key 'factor' is missing"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"rope_scaling": "foo"}, "config.json"),
        ({"rope_parameters": [1]}, "config.json"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor 0"),
        ({"rope_theta": -1}, "-1"),
        ({"hidden_size": float("inf")}, "hidden_size is inf"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    ],
)
def test_configurations_that_cannot_work(change, message):
    with pytest.raises(BadInput, match="config.json") as error:
        ModelConfig.from_dict(RAW | change, "DIR/config.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_key_is_named():
    with pytest.raises(BadInput, match="the key 'vocab_size' is missing"):
        ModelConfig.from_dict({key: value for key, value in RAW.items() if key != "vocab_size"})


@pytest.mark.parametrize(
    "raw, window",
    [
        ({"model_type": "mistral", "sliding_window": 40}, 40),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2", "sliding_window": 40, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 40, "use_sliding_window": True}, 40),
        ({"model_type": "llama", "sliding_window": 40}, None),
    ],
)
def test_sliding_windows_are_refused_where_they_matter(raw, window):
    config = ModelConfig.from_dict(RAW | raw)
    assert config.sliding_window == window
    assert cache_length(config, 40) == (window or 256)  # within the window it does not matter
    if window:
        with pytest.raises(BadInput, match="sliding window of 40 tokens"):
            cache_length(config, 41)


def test_checkpoint_tensors_are_views_of_every_weight():
    model = random_model(qkv_bias=True, qk_norm=True)
    views = model.checkpoint_tensors()
    assert sum(view.numel() for view in views.values()) == sum(p.numel() for p in model.parameters())
    views["model.layers.1.self_attn.k_proj.bias"].fill_(7)
    assert (model.layers[1].self_attn.qkv_proj.bias == 7).sum() == 24
    assert "lm_head.weight" in views
    assert "lm_head.weight" not in Transformer(random_model(tied_embeddings=True).config).checkpoint_tensors()
