"""The model against Hugging Face transformers, and the configurations it reads or refuses."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import random_model, random_prompts, texts

from checkpoints import load_model
from gpt_spec import Decoder, cache_length, generate
from model import BadInput, CheckpointModule, ModelConfig, Transformer, rope_frequencies
from rope import RopeScaling

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
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
# A factor that is not max_position_embeddings / original_max_position_embeddings, in each.
YARN_GIVEN = {"attention_factor": 1.7, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5, "factor": 3.0}
YARN_MSCALE = {"mscale": 1.3, "mscale_all_dim": 0.4, "beta_slow": 2, "factor": 40}
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
    "llama-dynamic": ("Llama", {"rope_parameters": DYNAMIC_ROPE}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN_ROPE, "head_dim": 32}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN_ROPE | YARN_GIVEN, "tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3", {"rope_parameters": YARN_ROPE | YARN_MSCALE, "head_dim": 24}),
    # What transformers takes for a factor that is null, and for an original context that is not given.
    "llama-yarn-ratio": ("Llama", {"rope_parameters": YARN_ROPE | {"factor": None}}),
    "llama-yarn-whole": (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ),
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


def older_spelling(directory, key: str = "rope_type") -> dict:
    """The configuration in a directory of transformers 5, as transformers 4 wrote it."""
    new = json.loads((directory / "config.json").read_text())
    assert "rope_parameters" in new and "dtype" in new
    old = {name: value for name, value in new.items() if name not in ("rope_parameters", "dtype")}
    rope = dict(new["rope_parameters"])
    rope[key] = rope.pop("rope_type")
    return old | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": new["dtype"]}


STRETCHED = ["llama3", "llama-linear-bias", "llama-dynamic", "llama-yarn", "qwen2-yarn", "qwen3-yarn"]


@pytest.mark.parametrize("kind", STRETCHED)
def test_both_spellings_of_the_configuration(kind, tmp_path):
    """transformers 5 writes rope_parameters and dtype; everything published before has the older names."""
    save_reference(kind, tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    expected = ModelConfig.from_dict(new)
    assert expected.rope_scaling != RopeScaling()
    old = older_spelling(tmp_path)
    assert ModelConfig.from_dict(old) == expected
    assert ModelConfig.from_dict(older_spelling(tmp_path, "type")) == expected  # older still
    nested = {"full_attention": new["rope_parameters"], "sliding_attention": {"rope_type": "default"}}
    assert ModelConfig.from_dict(
        new | {"rope_parameters": nested, "layer_types": 3 * ["full_attention"]}
    ) == (expected)
    assert ModelConfig.from_dict(new | {"rope_parameters": {"full_attention": new["rope_parameters"]}}) == (
        expected
    )
    assert ModelConfig.from_dict(old | new) == expected  # both, and they agree
    with pytest.raises(BadInput, match="rope_scaling and rope_parameters contradict each other"):
        ModelConfig.from_dict(old | new | {"rope_parameters": {"rope_type": "default"}})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama-dynamic", "llama-yarn", "qwen2-yarn", "qwen3-yarn"])
def test_a_whole_context_equals_transformers(kind, tmp_path):
    """All that the older spelling says, with transformers reading it too: 256 tokens, of which YaRN's
    original context has 32; for dynamic they are the trained context to its last position."""
    transformers = pytest.importorskip("transformers")
    save_reference(kind, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(older_spelling(tmp_path, "type")))
    model, reference = load_model(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.tensor(random_prompts([256], 97))
    expected, logits = reference(tokens).logits, model.lm_head(model.recompute(tokens))
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-4
    plain = Transformer(replace(model.config, rope_scaling=RopeScaling())).requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    same = torch.equal(plain.lm_head(plain.recompute(tokens)), logits)
    assert same == (kind == "llama-dynamic")  # dynamic is the same as none here


@torch.no_grad()
def test_dynamic_is_not_the_same_as_none_one_token_later(tmp_path):
    """Why its texts end with the trained context."""
    reference = save_reference("llama-dynamic", tmp_path)
    model, tokens = load_model(tmp_path), torch.tensor(random_prompts([257], 97))
    expected, logits = reference(tokens).logits, model.lm_head(model.recompute(tokens))
    assert (logits - expected).abs().max() / expected.abs().max() > 1e-3
    prompt = tokens[0].tolist()
    [text] = texts(model, [prompt[:200]], max_new_tokens=100)
    assert text == reference_greedy(reference, prompt[:200], 56)  # up to the trained context
    for tokens in (prompt, prompt[:256]):
        with pytest.raises(BadInput, match="^dynamic RoPE .* the trained context of 256 tokens only"):
            next(generate(model, tokens, compile=False))
    with pytest.raises(BadInput, match="^dynamic RoPE .* the text may grow to 257$"):
        Decoder(model, max_length=257, compile=False)


REAL = {"rope_theta": 1e6, "original_max_position_embeddings": 32768, "factor": 4.0}  # Qwen's model cards
ROPE = {
    "linear": (LINEAR_ROPE, 1.0),
    "llama3": (LLAMA3_ROPE, 1.0),
    "dynamic": (DYNAMIC_ROPE, 1.0),
    "yarn": (YARN_ROPE, 1 + 0.1 * math.log(8)),
    "yarn, given": (YARN_ROPE | YARN_GIVEN, 1.7),
    "yarn, mscale": (YARN_ROPE | YARN_MSCALE, (1 + 0.13 * math.log(40)) / (1 + 0.04 * math.log(40))),
    "yarn, one mscale": (YARN_ROPE | {"mscale": 0.7}, 1 + 0.1 * math.log(8)),
    "yarn, mscale of zero": (YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 0}, 1 + 0.1 * math.log(8)),
    "yarn, factor below 1": (YARN_ROPE | {"factor": 0.5}, 1.0),
    "yarn, equal limits": (YARN_ROPE | {"truncate": False, "beta_fast": 2, "beta_slow": 2}, 1.2079),
    "yarn, beyond the last pair": (
        YARN_ROPE | {"rope_theta": 1.5, "beta_fast": 0.5, "beta_slow": 0.1},
        1.2079,
    ),
    "yarn, as in Qwen2.5": (YARN_ROPE | REAL, 1.1386),
}


@pytest.mark.parametrize("kind", ROPE)
def test_rope_equals_transformers(kind):
    """Bit for bit, also where a long text ends: angles there are large."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, attention_factor = ROPE[kind]
    config = transformers.LlamaConfig(**SIZES | {"head_dim": 32}, rope_parameters=rope)
    reference = LlamaRotaryEmbedding(config)
    raw = json.loads(config.to_json_string(use_diff=False))
    model = CheckpointModule(ModelConfig.from_dict(raw))
    assert torch.equal(model.frequencies, reference.inv_freq)
    assert model.config.rope_scaling.attention_factor == pytest.approx(attention_factor, abs=1e-4)
    last = 256 if kind == "dynamic" else 131072
    positions = torch.tensor([[0, 1, 17, 100, last - 1]])
    expected = reference(torch.zeros(1), positions)  # [1, 5, D] each: both halves of a head have the same
    for ours, theirs in zip(model.rope(positions), expected):
        assert torch.equal(ours.squeeze(2), theirs[..., :16])  # [1, 5, 16]


def test_plain_rope_frequencies():
    ours = rope_frequencies(ModelConfig.from_dict(RAW | {"rope_theta": 500.0}))
    torch.testing.assert_close(ours, 500.0 ** (-torch.arange(0, 16, 2) / 16))


@pytest.mark.parametrize(
    "factor, original, trained, context",
    [
        (4.0, 32768, 32768, 131072),  # as Qwen's model cards say it
        (4.0, 32768, 40960, 131072),  # Qwen3's max_position_embeddings, which counts room for an answer
        (4.0, 32768, 131072, 131072),
        (2.0, 32768, 131072, 131072),  # max_position_embeddings is never cut
        (2.5, 33, 33, 82),
    ],
)
def test_how_long_a_text_may_be_with_yarn(factor, original, trained, context):
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raw = RAW | {"max_position_embeddings": trained, "rope_scaling": yarn}
    assert ModelConfig.from_dict(raw).max_context == context
    assert (
        ModelConfig.from_dict(raw | {"rope_scaling": yarn | {"rope_type": "linear"}}).max_context == trained
    )


def test_the_original_context_may_stand_outside():
    """There it comes first, as in transformers."""
    outside = RAW | {"original_max_position_embeddings": 100}
    for rope in (YARN_ROPE, LLAMA3_ROPE):
        without = {name: value for name, value in rope.items() if name != "original_max_position_embeddings"}
        for given in (rope, without):
            assert (
                ModelConfig.from_dict(outside | {"rope_scaling": given}).rope_scaling.original_context == 100
            )


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
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "'longrope' is not supported; use default, linear, dynamic, llama3 or yarn",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "'mrope' is not supported"),
        ({"rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}, "the key 'mrope_section'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "'proportional' is not supported"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "['yarn'] is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}}, "the key 'alpha' of dynamic"),
        ({"rope_scaling": {"type": "dynamic"}}, "the key 'factor' is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor '2' makes no sense"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": YARN_ROPE | {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        (
            {"rope_parameters": {"full_attention": YARN_ROPE, "sliding_attention": LINEAR_ROPE}},
            "differs from layer to layer (full_attention, sliding_attention)",
        ),
        (
            {"rope_parameters": {"full_attention": YARN_ROPE}, "layer_types": ["full_attention", "other"]},
            "differs from layer to layer (full_attention, other)",
        ),
        ({"rope_parameters": {"full_attention": YARN_ROPE, "rope_type": "yarn"}}, "the key 'full_attention'"),
        ({"rope_scaling": {"type": "linear"}}, "the key 'factor' is missing"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"rope_scaling": "foo"}, "the RoPE settings are 'foo'"),
        ({"rope_parameters": [1]}, "the RoPE settings are [1]"),
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


@pytest.mark.parametrize(
    "change, message",
    [
        *(({"factor": value}, f"factor {value!r}") for value in (0, -4.0, "4", [4], True, float("nan"))),
        ({"factor": float("inf")}, "factor inf makes no sense; it must be a positive number"),
        ({"factor": ...}, "the key 'factor' is missing"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings 0"),
        ({"original_max_position_embeddings": 8.5}, "is 8.5; it must be a whole number"),
        ({"beta_fast": 0.5}, "beta_fast 0.5 is below beta_slow 1.0"),
        ({"beta_slow": 33}, "beta_fast 32.0 is below beta_slow 33.0"),
        ({"beta_slow": -1}, "beta_slow -1"),
        ({"beta_fast": "32"}, "beta_fast '32'"),
        ({"truncate": "false"}, "truncate is 'false'; it must be true or false"),
        ({"attention_factor": 0.0}, "attention_factor 0.0"),
        ({"attention_factor": float("nan")}, "attention_factor nan"),
        ({"mscale": -1.0, "mscale_all_dim": 1.0}, "mscale -1.0"),
        ({"mscale_all_dim": "1"}, "mscale_all_dim '1'"),
        ({"rope_theta": 1.0}, "rope_theta 1.0 is too small"),
        ({"rope_theta": None}, "rope_theta None"),
        ({"llama_4_scaling_beta": 0.1}, "the key 'llama_4_scaling_beta' of yarn RoPE is not supported"),
    ],
)
def test_yarn_that_cannot_work(change, message):
    """... stands for a key that is missing."""
    rope = {name: value for name, value in (YARN_ROPE | change).items() if value is not ...}
    with pytest.raises(BadInput, match="^DIR/config.json: ") as error:
        ModelConfig.from_dict(RAW | {"rope_parameters": rope}, "DIR/config.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_llama3_limits_must_differ():
    """Between them is divided by their difference."""
    with pytest.raises(BadInput, match="low_freq_factor 4.0 is not below high_freq_factor 4.0"):
        ModelConfig.from_dict(RAW | {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}})


def test_keys_without_an_effect_are_no_obstacle():
    extra = {
        "finetuned": True,
        "partial_rotary_factor": 1.0,
        "attention_factor": None,
        "low_freq_factor": 1.0,
    }
    assert ModelConfig.from_dict(RAW | {"rope_scaling": YARN_ROPE | extra}) == (
        ModelConfig.from_dict(RAW | {"rope_scaling": YARN_ROPE})
    )


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
