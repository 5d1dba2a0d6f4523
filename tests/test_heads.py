"""Published layouts of EAGLE-3 heads, and every switch, next to a naive head written from the equations."""

import json
import re
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import SHIPPED_HEAD, SHIPPED_TARGET, random_prompts, run_main
from safetensors.torch import save_file

from checkpoints import load_model
from eagle import HeadCache, TreeDrafter, default_taps, frequent_tokens
from generate import main
from gpt_spec import generate
from heads import load_head
from model import BadInput, KVCache, causal_attention
from sampling import Sampling

HIDDEN, HEADS, GROUPS, SIZE, INNER, VOCABULARY, DRAFTED, LAYERS = 48, 4, 2, 12, 80, 61, 20, 8


# ---- the equations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switches:
    taps: tuple[int, ...] = (2, 4, 5)
    before_residual: bool = False
    output: bool = False
    double: bool = False
    theta: float = 10000.0
    window: int = 10**6


def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def turn(x, theta):
    """x [n, heads, SIZE], row i at position i"""
    angle = torch.arange(len(x))[:, None, None] * theta ** (-torch.arange(SIZE // 2) / (SIZE // 2))
    a, b = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def attention(w, layer, x, s):
    """Row p sees rows p - window + 1 to p, one softmax for a row and head"""
    part = lambda name: x @ w[f"{layer}.{name}.weight"].T + w.get(f"{layer}.{name}.bias", 0)  # noqa: E731
    q, k, v = (part(f"self_attn.{name}_proj").view(len(x), -1, SIZE) for name in "qkv")
    if f"{layer}.self_attn.q_norm.weight" in w:
        q = norm(q, w[f"{layer}.self_attn.q_norm.weight"])
        k = norm(k, w[f"{layer}.self_attn.k_norm.weight"])
    q, k, out = turn(q, s.theta), turn(k, s.theta), torch.empty(len(x), HEADS, SIZE)
    for p in range(len(x)):
        seen = slice(max(p - s.window + 1, 0), p + 1)
        for h in range(HEADS):
            g = h * GROUPS // HEADS
            out[p, h] = (k[seen, g] @ q[p, h] / SIZE**0.5).softmax(0) @ v[seen, g]
    out = out.flatten(1)
    return out @ w[f"{layer}.self_attn.o_proj.weight"].T + w.get(f"{layer}.self_attn.o_proj.bias", 0)


def feed_forward(w, layer, x):
    y = norm(x, w[f"{layer}.post_attention_layernorm.weight"])
    gate, up, down = (partial(lambda n, z: z @ w[n + ".weight"].T + w.get(n + ".bias", 0), f"{layer}.mlp.{n}") for n in ("gate_proj", "up_proj", "down_proj"))  # fmt: skip  # noqa: E501
    return x + down(F.silu(gate(y)) * up(y))


def rows(w, tokens, g, s):
    """Tokens after each row and what enters it [n, HIDDEN] -> what goes round, and logits"""
    plain = w["layers.0.input_layernorm.weight"]
    e, h = norm(w["embed_tokens.weight"][tokens], plain), norm(g, plain) if s.double else g
    h = norm(h, w["layers.0.hidden_norm.weight"])
    x, residual, layer = torch.cat((e, h), -1), h if s.before_residual else g, 0
    while f"layers.{layer}.self_attn.q_proj.weight" in w:
        name = f"layers.{layer}"
        x = norm(residual, w[f"{name}.input_layernorm.weight"]) if layer else x
        residual = feed_forward(w, name, residual + attention(w, name, x, s))
        layer += 1
    z = norm(residual, w["norm.weight"])
    return z if s.output else residual, z @ w["lm_head.weight"].T


def fused(w, states):
    """Tapped states, [n, HIDDEN] each -> [n, HIDDEN]"""
    if "fc_norm.0.weight" in w:
        states = [norm(state, w[f"fc_norm.{i}.weight"]) for i, state in enumerate(states)]
    x = torch.cat(states, -1)
    x = norm(x, w["input_norm.weight"]) if "input_norm.weight" in w else x
    return x @ w["fc.weight"].T + w.get("fc.bias", 0)


def naive_logits(w, target, text, path, s):
    """Logits of a chain's steps: from the target's states alone, then with one more of `path` each time"""
    tokens = torch.tensor([text])
    states = target(tokens, torch.arange(len(text))[None], causal_attention, s.taps)[1][0, :-1]
    g, after, found = fused(w, states.split(HIDDEN, -1)), text[1:], []
    for token in [*path, None]:
        carried, logits = rows(w, torch.tensor(after), g, s)
        found.append(logits[-1])
        g, after = torch.cat((g, carried[-1:])), [*after, token]
    return found


def cached_logits(head, target, text, path, slots=40):
    """The same by the head's own cache, as a tree grows"""
    tokens, n = torch.tensor([text]), len(text) - 1
    states = target(tokens, torch.arange(n + 1)[None], causal_attention, head.taps(LAYERS))[1][:, :-1]
    cache = HeadCache(KVCache.allocate(head.config, 1, slots, torch.zeros(())), head.window)
    half, features, place = n // 2, head.fuse(states), torch.arange(n)[None]
    cache.extend(head, tokens[:, 1 : half + 1], features[:, :half], place[:, :half], torch.tensor([half]))
    # The second half with two rows that are not there.
    padded = [torch.cat((t, t[:, -2:]), 1) for t in (tokens[:, half + 1 :], features[:, half:])]
    place = torch.arange(half, n + 2)[None]
    guess = cache.extend(head, *padded, place, torch.tensor([n - half]))
    found, past = [head.logits(guess)[0, 0]], torch.tensor([n])
    for i, token in enumerate(path):
        at = torch.tensor([[n + i]])
        attend = partial(cache.attend_at, at, at, torch.ones(1, 1, i + 1, dtype=torch.bool), past)
        guess = head(torch.tensor([[token]]), guess, at, attend)
        found.append(head.logits(guess)[0, 0])
    return found


# ---- layouts -----------------------------------------------------------------------------------------


def tensors_of(taps=3, layers=1, drafted=DRAFTED, embedding=True, extra=()):
    """Random tensors of a head under plain names; `extra`: names of norms and biases, with their sizes"""
    torch.manual_seed(taps + 10 * layers)
    wide = {"q": HEADS * SIZE, "k": GROUPS * SIZE, "v": GROUPS * SIZE}
    shapes = {"fc": (HIDDEN, taps * HIDDEN), "norm": (HIDDEN,), "lm_head": (drafted, HIDDEN)}
    shapes |= {"embed_tokens": (VOCABULARY, HIDDEN)} if embedding else {}
    for i in range(layers):
        layer = {f"self_attn.{name}_proj": (size, HIDDEN if i else 2 * HIDDEN) for name, size in wide.items()}
        layer |= {"self_attn.o_proj": (HIDDEN, HEADS * SIZE), "mlp.gate_proj": (INNER, HIDDEN)}
        layer |= {"mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
        layer |= {"post_attention_layernorm": (HIDDEN,), "input_layernorm": (HIDDEN,)}
        layer |= {} if i else {"hidden_norm": (HIDDEN,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    w = {
        f"{name}.weight": draw(shape) for name, shape in (shapes | dict(extra)).items() if "bias" not in name
    }
    return w | {name: draw(shape) for name, shape in dict(extra).items() if "bias" in name}


def draw(shape):
    return torch.rand(shape) + 0.5 if len(shape) == 1 else torch.randn(shape) / shape[1] ** 0.5


FLAT = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "hidden_act": "silu",
    "num_key_value_heads": GROUPS, "head_dim": SIZE, "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "model_type": "llama",
}  # fmt: skip
IDS = torch.arange(DRAFTED) * 3
MAPS = {"d2t": IDS - torch.arange(DRAFTED), "t2d": torch.isin(torch.arange(VOCABULARY), IDS)}
QK = {f"layers.0.self_attn.{name}_norm": (SIZE,) for name in "qk"}
BIASES = {
    "layers.0.self_attn.q_proj.bias": (HEADS * SIZE,), "layers.0.self_attn.k_proj.bias": (GROUPS * SIZE,),
    "layers.0.self_attn.v_proj.bias": (GROUPS * SIZE,), "layers.0.self_attn.o_proj.bias": (HIDDEN,),
    "layers.0.mlp.gate_proj.bias": (INNER,), "layers.0.mlp.up_proj.bias": (INNER,),
    "layers.0.mlp.down_proj.bias": (HIDDEN,), "fc.bias": (HIDDEN,),
}  # fmt: skip
FC_NORM = {f"fc_norm.{i}": (HIDDEN,) for i in range(3)}
EAGLE = "eagle_aux_hidden_state_layer_ids"


@dataclass
class Layout:
    """How a trainer publishes a head: configuration, names, and the switches that should be read"""

    config: dict
    tensors: dict
    switches: Switches = Switches()
    names: tuple = ()  # patterns of names, and what they become
    maps: dict | None = None

    def write(self, directory):
        named = {}
        for name, tensor in self.tensors.items():
            for pattern, theirs in self.names:
                name = re.sub(pattern, theirs, name)
            named[name] = tensor
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        save_file(named | (MAPS if self.maps is None else self.maps), directory / "model.safetensors")
        return directory


MID = ((r"^layers\.0\.", "midlayer."),)
NUMBERED = ((r"^layers\.1\.input_layernorm", "layers.1.hidden_norm"), (r"^layers\.", "midlayer."))
INNER_CONFIG = {"speculators_model_type": "eagle3", "target_hidden_size": None, "draft_vocab_size": DRAFTED}


def speculators(inner=(), **config):
    nested = {"transformer_layer_config": FLAT | dict(inner)}
    return INNER_CONFIG | nested | {"norm_before_residual": True} | config


RESIDUAL = Switches(before_residual=True)
LAYOUTS = {
    "SafeAILab": Layout(
        FLAT | {"draft_vocab_size": DRAFTED, "num_hidden_layers": 40}, tensors_of(embedding=False), names=MID
    ),
    "SpecForge": Layout(
        FLAT
        | {"architectures": ["LlamaForCausalLMEagle3"], "eagle_config": {EAGLE: [0, 3, 6]}, "fc_norm": True},
        tensors_of(embedding=False, extra=FC_NORM),
        Switches(taps=(1, 4, 7)),
        MID,
    ),
    "SpecForge, all tokens": Layout(
        FLAT | {"architectures": ["LlamaForCausalLMEagle3"]},
        tensors_of(drafted=VOCABULARY),
        names=MID,
        maps={
            "d2t": torch.zeros(VOCABULARY, dtype=torch.int64),
            "t2d": torch.ones(VOCABULARY, dtype=torch.bool),
        },
    ),
    "speculators": Layout(speculators({"rope_theta": 1e6}), tensors_of(), replace(RESIDUAL, theta=1e6)),
    "speculators, its own taps": Layout(
        speculators(**{EAGLE: [1, 3, 7]}), tensors_of(), replace(RESIDUAL, taps=(1, 3, 7))
    ),
    "speculators, all it has": Layout(
        speculators(
            {"layer_types": ["sliding_attention"], "sliding_window": 7}, norm_before_fc=True, norm_output=True
        ),
        tensors_of(extra={"input_norm": (3 * HIDDEN,), **QK}),
        Switches(before_residual=True, output=True, window=7),
    ),
    "a flat mirror": Layout(
        FLAT | {"norm_before_residual": True, EAGLE: [2, 4, 5]}, tensors_of(), RESIDUAL, MID
    ),
    "ModelOpt": Layout(
        FLAT | {"eagle_config": {EAGLE: [1, 3, 4], "use_aux_hidden_state": True, "parallel_draft_step": 1}},
        tensors_of(embedding=False),
        maps={"d2t": MAPS["d2t"]},
    ),
    "ModelOpt, two norms": Layout(
        FLAT | {"eagle_config": {EAGLE: [1, 3, 4], "use_last_layernorm": True}, "double_norm": True},
        tensors_of(),
        Switches(double=True),
    ),
    "ModelOpt, carrying what is normed": Layout(
        FLAT | {"eagle_config": {EAGLE: [1, 3, 4], "return_hidden_post_norm": True}},
        tensors_of(),
        Switches(output=True),
    ),
    "Megatron, two layers": Layout(FLAT, tensors_of(layers=2), names=NUMBERED),
    "DeepSpec": Layout(
        FLAT | {"model_type": "qwen3", "target_layer_ids": [-1, 0, 2, 4, 6], "rope_theta": 5e5},
        tensors_of(taps=5, drafted=VOCABULARY, extra=QK),
        Switches(taps=(0, 1, 3, 5, 7), theta=5e5),
        maps={},
    ),
    "AngelSlim": Layout(
        FLAT | {"architectures": ["Eagle3LlamaForCausalLM"], "tie_word_embeddings": True, "rope_theta": 1e6},
        tensors_of(),
        Switches(theta=1e6),
        MID,
    ),
    "NeMo": Layout(FLAT, tensors_of(extra=BIASES), names=((r"^(?!lm_head)", "model."),)),
    "TorchSpec": Layout(
        FLAT | {"aux_hidden_states_layer_ids": [0, 2, 5]},
        tensors_of(extra=FC_NORM),
        Switches(taps=(1, 3, 6)),
        (
            *MID,
            ("^fc_norm.0", "aux_norm_low"),
            ("^fc_norm.1", "aux_norm_mid"),
            ("^fc_norm.2", "aux_norm_high"),
        ),
    ),
    "early speculators": Layout(
        speculators(), tensors_of(extra=FC_NORM), RESIDUAL, names=(("^fc_norm", "fc_norms"),)
    ),
    "absolute d2t": Layout(FLAT, tensors_of(), maps={"d2t": IDS}, names=MID),
    "absolute d2t beside t2d": Layout(FLAT, tensors_of(), maps=MAPS | {"d2t": IDS}, names=MID),
    "a short window": Layout(
        speculators({"layer_types": ["sliding_attention"] * 2, "sliding_window": 3}),
        tensors_of(layers=2),
        replace(RESIDUAL, window=3),
    ),
    "t2d alone": Layout(FLAT, tensors_of(), maps={"t2d": MAPS["t2d"]}, names=MID),
}
[TEXT], PATH = random_prompts([15]), [5, 17, 30]


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_as_its_equations_say(deep, tmp_path, name):
    """The first step and three carried ones, with a cache, against whole rows without one."""
    layout = LAYOUTS[name]
    head = load_head(layout.write(tmp_path / "head"), deep)
    assert head.taps(LAYERS) == layout.switches.taps
    tensors = {"embed_tokens.weight": deep.embed_tokens.weight} | layout.tensors
    expected = naive_logits(tensors, deep, TEXT, PATH, layout.switches)
    for ours, theirs in zip(cached_logits(head, deep, TEXT, PATH), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ids = None if len(layout.tensors["lm_head.weight"]) == VOCABULARY else IDS.tolist()
    assert (None if head.draft_ids is None else head.draft_ids.tolist()) == ids


WRONG = [  # a reading, a layout, and the first step that it changes
    ({"taps": (1, 3, 4)}, "SafeAILab", 0),
    ({"norm_before_residual": False}, "speculators", 0),
    ({"norm_output": True}, "SafeAILab", 1),
    ({"double_norm": True}, "ModelOpt", 0),
    ({"norm_output": False}, "speculators, all it has", 1),
    ({"rope_theta": 10000.0}, "speculators", 0),
    ({"window": None}, "speculators, all it has", 0),
]


@torch.no_grad()
@pytest.mark.parametrize("reading, name, step", WRONG, ids=lambda value: str(value)[:24])
def test_a_wrong_switch_is_seen(deep, tmp_path, reading, name, step):
    """Another reading has other logits, from the step on that `--check_head` tells it by."""
    directory = LAYOUTS[name].write(tmp_path / "head")
    right = cached_logits(load_head(directory, deep), deep, TEXT, PATH)
    wrong = cached_logits(load_head(directory, deep, **reading), deep, TEXT, PATH)
    for i, (one, other) in enumerate(zip(right, wrong)):
        assert torch.allclose(one, other, atol=1e-3) == (i < step)


@torch.no_grad()
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, seed=3)], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("name", ["speculators, all it has", "Megatron, two layers", "DeepSpec"])
def test_no_layout_changes_the_text(deep, tmp_path, name, sampling):
    """Trees over windows, over two layers and over five taps, alone and four at once."""
    head = load_head(LAYOUTS[name].write(tmp_path / "head"), deep)
    prompts = random_prompts([5, 1, 9, 30])

    def texts(drafter, batch_size):
        out = [[] for _ in prompts]
        for emissions in generate(deep, prompts, drafter, sampling, 30, batch_size, compile=False):
            for emission in emissions:
                out[emission.prompt_index] += emission.tokens
        return out

    expected = texts(None, 1)
    for batch_size in (1, 4):
        assert texts(TreeDrafter(head, 12, 3, 3), batch_size) == expected


def test_a_copy_of_the_embedding_is_shared(deep, tmp_path):
    layout = LAYOUTS["speculators"]
    copied = layout.tensors | {"embed_tokens.weight": deep.embed_tokens.weight.detach().clone()}
    assert (
        load_head(replace(layout, tensors=copied).write(tmp_path / "a"), deep).embed_tokens
        is deep.embed_tokens
    )
    own = load_head(layout.write(tmp_path / "b"), deep).embed_tokens
    assert own is not deep.embed_tokens and torch.equal(own.weight, layout.tensors["embed_tokens.weight"])


def test_a_head_may_borrow_the_lm_head(deep, tmp_path):
    layout = replace(LAYOUTS["NeMo"], maps={})
    tensors = {
        name: t for name, t in layout.tensors.items() if name not in ("lm_head.weight", "embed_tokens.weight")
    }
    head = load_head(replace(layout, tensors=tensors).write(tmp_path / "head"), deep)
    assert head.lm_head is deep.lm_head and head.embed_tokens is deep.embed_tokens and head.draft_ids is None


def changed(name="SafeAILab", add=None, drop=(), **config):
    layout = LAYOUTS[name]
    tensors = {key: tensor for key, tensor in layout.tensors.items() if key not in drop} | (add or {})
    return replace(layout, config=layout.config | config, tensors=tensors)


ONE = {"weight": torch.ones(HIDDEN)}["weight"]
REFUSED = {
    "P-EAGLE": (changed(add={"mask_hidden": ONE}), "mask_hidden belongs to P-EAGLE"),
    "MLA": (changed(add={"layers.0.self_attn.kv_a_proj_with_mqa.weight": ONE}), "latent attention"),
    "DSpark": (changed(add={"markov_head.weight": ONE}), "DSpark"),
    "pard": (changed(pard_token=7), "pard_token is 7"),
    "a multiplier": (changed(attention_multiplier=0.5), "attention_multiplier is 0.5"),
    "a norm of another kind": (changed("speculators", norm_input=True), "norm_input is True"),
    "a scale inside": (
        changed("speculators", transformer_layer_config=FLAT | {"embedding_scale": 3}),
        "_scale is 3",
    ),
    "two norms before fc": (
        changed("SpecForge", add={"input_norm.weight": torch.ones(3 * HIDDEN)}),
        "have one",
    ),
    "an unknown key": (
        changed("ModelOpt", eagle_config={"use_magic": True}),
        "use_magic of eagle_config is not known",
    ),
    "no aux states": (
        changed("ModelOpt", eagle_config={"use_aux_hidden_state": False}),
        "use_aux_hidden_state is F",
    ),
    "irregular layers": (
        changed("Megatron, two layers", eagle_config={"next_layer_regular": False}),
        "next_layer_regular is False",
    ),
    "a norm that is not there": (
        changed(norm_before_fc=True),
        "norm_before_fc is true, but the weights lack input_norm",
    ),
    "a norm that is off": (
        changed("SpecForge", fc_norm=False),
        "fc_norm is false, but the weights have fc_norm",
    ),
    "a switch of another type": (changed(norm_output="yes"), "norm_output is 'yes'"),
    "two of three taps": (changed(**{EAGLE: [2, 4]}), "fc reads 3 states"),
    "a tap behind the last layer": (changed(**{EAGLE: [2, 4, 8]}), "not all states between"),
    "five taps and no list": (changed("DeepSpec", target_layer_ids=None), "nothing says which"),
    "fc of another target": (
        changed(add={"fc.weight": torch.ones(HIDDEN, 100)}),
        "no multiple of the target's",
    ),
    "a part of RoPE": (changed(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "windows in some layers": (
        changed(
            "Megatron, two layers", layer_types=["sliding_attention", "full_attention"], sliding_window=8
        ),
        "layer_types",
    ),
    "an unknown kind of layer": (changed(layer_types=["chunked_attention"]), "layer_types is"),
    "two lists of taps": (changed("ModelOpt", **{EAGLE: [1, 3, 4]}), "which are different states"),
    "two words on the output": (
        changed("ModelOpt, carrying what is normed", norm_output=False),
        "say different things",
    ),
    "one word in two places": (
        changed("ModelOpt, carrying what is normed", return_hidden_post_norm=False),
        "return_hidden_post_norm and eagle_config.return_hidden_post_norm say different things",
    ),
    "a window without a size": (changed(layer_types=["sliding_attention"]), "sliding_window is 0"),
    "no map": (replace(changed(), maps={}), "lack d2t"),
    "maps that disagree": (replace(changed(), maps=MAPS | {"t2d": MAPS["t2d"].roll(1)}), "t2d and d2t"),
    "twice the same": (
        replace(changed(add={"midlayer.hidden_norm.weight": ONE}), names=()),
        "hidden_norm.weight twice",
    ),
    "lm_head of another size": (
        changed(draft_vocab_size=21),
        "draft_vocab_size is 21, but lm_head has 20 rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(deep, tmp_path, name):
    layout, words = REFUSED[name]
    with pytest.raises(BadInput, match=words) as error:
        load_head(layout.write(tmp_path / "head"), deep)
    assert "\n" not in str(error.value)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
NOTED = {
    "the other way of counting": (changed("speculators", **{EAGLE: [1, 3, 4]}), "the usual [2, 4, 5]"),
    "and the other way round": (changed("ModelOpt", eagle_config={EAGLE: [2, 4, 5]}), "the usual [2, 4, 5]"),
    "no word on the residual": (changed("speculators", norm_before_residual=None), "norm_before_residual"),
    "a base that AngelSlim writes": (changed("AngelSlim"), "AngelSlim trained with a RoPE base of 10000"),
    "YaRN that ModelOpt writes": (
        changed(
            "ModelOpt", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        ),
        "ModelOpt writes YaRN",
    ),
    "an eagle_config without states": (
        changed("ModelOpt", eagle_config={"use_aux_hidden_state": True}),
        "the usual [2, 4, 5] are taken",
    ),
    "two norms of ModelOpt": (changed("ModelOpt, two norms"), "two norms of the features"),
    "a residual of ModelOpt": (changed("ModelOpt, two norms", norm_before_residual=True), "converted heads"),
    "distances that could be tokens": (
        replace(changed(), maps={"d2t": 2 * torch.arange(DRAFTED)}),
        "distances",
    ),
    "no norm at all, once": (
        changed(norm_output=False, architectures=["LlamaForCausalLMEagle3"]),
        "no norm before lm_head",
    ),
    "two meanings of norm_output": (
        changed(norm_output=True, architectures=["LlamaForCausalLMEagle3"]),
        "SpecForge before September 2026",
    ),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_has_two_readings_is_said(deep, tmp_path, name, capsys):
    layout, words = NOTED[name]
    load_head(layout.write(tmp_path / "head"), deep)
    assert words in capsys.readouterr().err
    load_head(LAYOUTS["speculators"].write(tmp_path / "plain"), deep)
    assert capsys.readouterr().err == ""


def test_the_usual_taps():
    assert [default_taps(layers) for layers in (28, 32, 36)] == [(2, 14, 25), (2, 16, 29), (2, 18, 33)]


# ---- fewer tokens ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16", "w8a16", "w4a16", "w4a8"])
def test_a_restricted_head_has_the_logits_of_its_tokens(precision):
    """By the bit, whatever the target's lm_head is stored as, and what the tree proposes is among them."""
    target = load_model(SHIPPED_TARGET, precision, lm_head_bits=4 if precision == "w4a8" else None)
    whole, part = (load_head(SHIPPED_HEAD, target) for _ in range(2))
    ids = frequent_tokens([[70, 70, 3000, 5]], 700, target.config.vocab_size)
    assert part.restrict(ids) is part and {5, 70, 3000} < set(ids.tolist()) and len(ids) == 700
    features = torch.randn(1, 5, target.config.hidden_size).to(target.norm.weight.dtype)
    assert torch.equal(part.logits(features), whole.logits(features)[..., ids])
    drafted, prompt = set(), list(range(300, 330))

    def text(drafter):
        tokens = []
        for emissions in generate(target, prompt, drafter, max_new_tokens=40, compile=False):
            for emission in emissions:
                tokens += emission.tokens
                drafted.update(
                    [] if emission.draft is None else emission.draft.tokens[emission.row, 1:].tolist()
                )
        return tokens

    plain = text(None)
    drafted.clear()
    assert text(TreeDrafter(part, 12, 4, 4)) == plain and drafted and drafted <= set(ids.tolist())


def test_a_head_with_a_vocabulary_of_its_own_keeps_what_it_has_of_others(deep, tmp_path):
    head = load_head(LAYOUTS["SafeAILab"].write(tmp_path / "head"), deep)
    head.restrict(torch.tensor([0, 1, 2, 3, 4, 33]))
    assert head.draft_ids.tolist() == [0, 3, 33]
    torch.testing.assert_close(
        head.lm_head.weight, LAYOUTS["SafeAILab"].tensors["lm_head.weight"][[0, 1, 11]]
    )
    with pytest.raises(BadInput, match="can draft none"):
        head.restrict(torch.tensor([1, 2]))


def test_frequent_tokens():
    assert frequent_tokens([[9, 9, 4], [9, 4, 7]], 3, 12).tolist() == [4, 7, 9]
    assert frequent_tokens([[9, 4]], 4, 12).tolist() == [0, 1, 4, 9]
    assert frequent_tokens([], 3, 12).tolist() == [0, 1, 2] and len(frequent_tokens([], 99, 12)) == 12


def test_the_flags_of_a_drafted_vocabulary(tmp_path):
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x\n" * 2000)  # more than the model takes
    run = partial(run_main, main, "--compile", "none", "--max_new_tokens", "20")
    plain = run("--method", "autoregressive", "--prompt", "def f(x):\n")
    fewer = run(
        "--method",
        "tree",
        "--prompt",
        "def f(x):\n",
        "--draft_vocab_size",
        "200",
        "--draft_vocab_text",
        str(text),
    )
    assert plain.returncode == fewer.returncode == 0 and plain.stdout == fewer.stdout
    for flags, words in (
        (("--method", "tree", "--draft_vocab_size", "0"), "--draft_vocab_size is 0"),
        (("--method", "lookup", "--draft_vocab_size", "9"), "method lookup does not use it"),
        (("--method", "tree", "--draft_vocab_text", "x"), "--draft_vocab_text needs --draft_vocab_size"),
        (
            ("--method", "tree", "--draft_vocab_size", "9", "--draft_vocab_text", "x"),
            "cannot read a file 'x'",
        ),
    ):
        done = run(*flags)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


# ---- EAGLE-1 and EAGLE-2 -----------------------------------------------------------------------------


def plain_head(target, directory, embedding=None, **config):
    """An EAGLE-2 head in its authors' layout"""
    w = tensors_of()
    names = [name for name in w if re.match(r"layers.0.(self_attn.o|mlp|post)", name)]
    w = {name: w[name] for name in names} | {"fc.weight": torch.randn(HIDDEN, 2 * HIDDEN)}
    w |= {
        f"layers.0.self_attn.{n}_proj.weight": torch.randn(rows, HIDDEN)
        for n, rows in (("q", 48), ("k", 24), ("v", 24))
    }
    w["embed_tokens.weight"] = (
        (target.embed_tokens.weight if embedding is None else embedding).detach().clone()
    )
    return Layout(FLAT | config, w, maps={}).write(directory)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"eagle_config": {"use_magic": True}}, "use_magic of eagle_config"),
        ({"norm_output": True}, "norm_output is true, but the weights are those of an EAGLE-1 or EAGLE-2"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 9}, "a sliding window"),
    ],
)
def test_what_an_older_head_does_not_have_is_refused(deep, tmp_path, config, words):
    with pytest.raises(BadInput, match=words):
        load_head(plain_head(deep, tmp_path / "head", **config), deep)


def test_the_embedding_of_an_older_head_is_the_targets(deep, tmp_path, capsys):
    assert load_head(plain_head(deep, tmp_path / "a"), deep).embed_tokens is deep.embed_tokens
    assert capsys.readouterr().err == ""
    assert (
        load_head(plain_head(deep, tmp_path / "b", torch.randn(VOCABULARY, HIDDEN)), deep).embed_tokens
        is deep.embed_tokens
    )
    assert "not quite the target's" in capsys.readouterr().err
    with pytest.raises(BadInput, match="norm_output"):
        load_head(plain_head(deep, tmp_path / "c"), deep, norm_output=True)


def test_a_window_must_be_longer_than_a_tree_is_deep(deep, tmp_path):
    head = load_head(LAYOUTS["a short window"].write(tmp_path / "head"), deep)
    TreeDrafter(head, 4, 2, 2)
    with pytest.raises(BadInput, match="looks back no further than 3"):
        TreeDrafter(head, 4, 3, 2)
