"""EAGLE heads and the trees they grow: against a naive head, against brute force, from published files."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, guessing_head, random_model, random_prompts
from safetensors.torch import save_file

from costs import Pace, Stats
from drafts import Draft, Verified, tree_geometry
from eagle import EagleHead, TreeDrafter, default_taps
from gpt_spec import Decoder, Request, generate
from heads import load_head
from kernels import gumbel
from model import BadInput, causal_attention
from sampling import Sampling

GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, seed=7)


# ---- a naive head ---------------------------------------------------------------------------------


def norm(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x, positions, theta):
    """x: [n, heads, D]. theta: the base, or what BY_HAND has"""
    half = x.shape[-1] // 2
    base, change, scale = theta if isinstance(theta, tuple) else (theta, 1.0, 1.0)
    angle = positions[:, None, None] * base ** (-torch.arange(half) / half) * change
    a, b = scale * x[..., :half], scale * x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def naive_rows(w, tokens, features, theta, heads=4, size=12):
    """All rows of a head at once, [n, hidden] -> next features [n, hidden]: weights by their published names,
    no cache, and one softmax a row. Row p stands at position p and sees rows 0 .. p."""
    eagle3 = "midlayer.self_attn.q_proj.weight" in w
    layer = "midlayer." if eagle3 else "layers.0."
    embedded, n = w["embed_tokens.weight"][tokens], len(tokens)
    if eagle3:
        x = torch.cat(
            (
                norm(embedded, w[layer + "input_layernorm.weight"]),
                norm(features, w[layer + "hidden_norm.weight"]),
            ),
            -1,
        )
        residual = features
    else:
        x = residual = torch.cat((embedded, features), -1) @ w["fc.weight"].T + w.get("fc.bias", 0)
    q, k, v = ((x @ w[f"{layer}self_attn.{name}_proj.weight"].T).view(n, -1, size) for name in "qkv")
    positions = torch.arange(n)
    q, k = rope(q, positions, theta), rope(k, positions, theta)
    out = torch.empty(n, heads, size)
    for p in range(n):
        for h in range(heads):
            g = h * k.shape[1] // heads
            out[p, h] = (k[: p + 1, g] @ q[p, h] / size**0.5).softmax(0) @ v[: p + 1, g]
    x = residual + out.flatten(1) @ w[layer + "self_attn.o_proj.weight"].T
    y = norm(x, w[layer + "post_attention_layernorm.weight"])
    gate, up = (y @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w[layer + "mlp.down_proj.weight"].T


def naive_logits(w, features, lm_head):
    return (
        norm(features, w["norm.weight"]) @ w["lm_head.weight"].T
        if "norm.weight" in w
        else features @ lm_head.T
    )


def naive_scores(w, text, features, path, theta, lm_head):
    """Logits of the token after a text, whose last token is the root, and a path of drafts."""
    tokens = torch.tensor(text[1:])
    for token in [*path, None]:  # row by row, each from the guess of the one before
        guess = naive_rows(w, tokens, features, theta)[-1:]
        if token is not None:
            features, tokens = torch.cat((features, guess)), torch.cat((tokens, torch.tensor([token])))
    return naive_logits(w, guess[0], lm_head)


# ---- published files ------------------------------------------------------------------------------

LAYER = {
    **{"self_attn.q_proj": (48, 48), "self_attn.k_proj": (24, 48), "self_attn.v_proj": (24, 48)},
    **{
        "self_attn.o_proj": (48, 48),
        "mlp.gate_proj": (80, 48),
        "mlp.up_proj": (80, 48),
        "mlp.down_proj": (48, 80),
    },
    **{"post_attention_layernorm": (48,)},
}
CONFIG = {  # as in yuhuili/EAGLE-LLaMA3-Instruct-8B, but for the sizes
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bias": False},
    **{"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "vocab_size": 61},
    **{"rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "float16", "pad_token_id": 0},
}


def random_tensors(shapes):
    torch.manual_seed(11)
    return {
        f"{name}.weight": torch.rand(shape) + 0.5 if len(shape) == 1 else torch.randn(shape) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }


def eagle2(target, directory, bias=False, **changes):
    """A head in the layout of the EAGLE-2 heads for Llama 3 -> its tensors."""
    tensors = random_tensors({"fc": (48, 96), **{f"layers.0.{name}": shape for name, shape in LAYER.items()}})
    tensors |= {"embed_tokens.weight": target.embed_tokens.weight.clone()}
    tensors |= {"fc.bias": torch.randn(48)} if bias else {}
    return write(directory, tensors, CONFIG | changes, as_bin=True)


def eagle3(target, directory, **changes):
    """A head in the layout of the EAGLE-3 heads for Llama 3.1 -> its tensors and the embedding it borrows."""
    layer = {**LAYER, "hidden_norm": (48,), "input_layernorm": (48,)}
    layer |= {f"self_attn.{name}_proj": (rows, 96) for name, rows in (("q", 48), ("k", 24), ("v", 24))}
    shapes = {"fc": (48, 144), "norm": (48,), "lm_head": (20, 48)}
    tensors = random_tensors(shapes | {f"midlayer.{name}": shape for name, shape in layer.items()})
    ids = torch.arange(20) * 3  # token i of the head is token 3 i
    known = torch.zeros(61, dtype=torch.bool)
    known[ids] = True
    tensors |= {"d2t": ids - torch.arange(20), "t2d": known}
    config = {name: value for name, value in CONFIG.items() if name != "rope_theta"} | {
        "draft_vocab_size": 20
    }
    write(directory, tensors, config | changes)
    return tensors | {"embed_tokens.weight": target.embed_tokens.weight}


def write(directory, tensors, config, as_bin=False):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save = torch.save if as_bin else save_file
    save(tensors, directory / ("pytorch_model.bin" if as_bin else "model.safetensors"))
    return tensors


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# The same by hand: base, change of the frequencies, scale. The 6 pairs of a head make 10.2, 2.2, 0.5, ...
# cycles in 64 positions. So the limits, 32 cycles and one, are pairs 0 and 2: pair 0 is left alone, pair 1 is
# half slowed, the others are slowed.
BY_HAND = (10000.0, torch.tensor([1, 0.625, 0.25, 0.25, 0.25, 0.25]), 1 + 0.1 * math.log(4))
KINDS = {
    "eagle2": (eagle2, 500000.0),
    "eagle2 with a bias": (lambda *args: eagle2(*args, bias=True), 500000.0),
    "eagle3": (eagle3, 10000.0),
    "eagle2 with YaRN": (lambda *args: eagle2(*args, rope_theta=10000.0, rope_scaling=YARN), BY_HAND),
    "eagle3 with YaRN": (
        lambda *args: eagle3(*args, rope_parameters=YARN | {"rope_theta": 10000.0}),
        BY_HAND,
    ),
}


def true_features(target, w, text, taps):
    tokens = torch.tensor([text])
    states = target(tokens, torch.arange(len(text))[None], causal_attention, taps)[1][0]
    return states @ w["fc.weight"].T if "midlayer.self_attn.q_proj.weight" in w else states


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_head_agrees_with_a_naive_one(deep, tmp_path, kind):
    make, theta = KINDS[kind]
    w = make(deep, tmp_path)
    head = load_head(tmp_path, deep)
    [text] = random_prompts([12])
    states = deep(torch.tensor([text]), torch.arange(12)[None], causal_attention, head.taps(8))[1][:, :-1]
    ours = head(
        torch.tensor([text[1:]]),
        head.fuse(states),
        torch.arange(11)[None],
        causal_attention,
    )
    features = true_features(deep, w, text, head.taps(8))[:-1]
    theirs = naive_rows(w, torch.tensor(text[1:]), features, theta)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-4, atol=1e-4)
    logits = naive_logits(w, theirs, deep.lm_head.weight)
    torch.testing.assert_close(head.logits(ours)[0], logits, rtol=1e-4, atol=1e-3)
    if "eagle3" in kind:
        assert head.draft_ids.tolist() == list(range(0, 60, 3))


def test_the_states_of_eagle_3_are_inputs_of_layers(deep):
    """As transformers counts them: hidden_states[2], [L // 2] and [L - 3], and [0] is the embedding."""
    tokens, positions = torch.arange(5)[None], torch.arange(5)[None]
    states = deep(tokens, positions, causal_attention, (0, 2, 8))[1].chunk(3, dim=-1)
    torch.testing.assert_close(states[0], deep.embed_tokens(tokens))
    x = states[1]
    for i in range(2, 8):
        x = deep.layers[i](x, *deep.rope(positions), lambda q, k, v, i=i: causal_attention(i, q, k, v))
    torch.testing.assert_close(deep.norm(x), states[2])
    for layers, taps in ((8, (2, 4, 5)), (32, (2, 16, 29)), (80, (2, 40, 77))):
        assert default_taps(layers) == taps
        assert EagleHead.taps(None, layers) == (layers,)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_heads_never_change_the_text(deep, tmp_path, kind, sampling):
    KINDS[kind][0](deep, tmp_path)
    prompts = random_prompts([5, 1, 9, 30])

    def texts(drafter, batch_size=1, stats=None):
        out = [[] for _ in prompts]
        steps = generate(
            deep, prompts, drafter, sampling, 30, batch_size, compile=False, stats=stats or Stats()
        )
        for emissions in steps:
            for emission in emissions:
                out[emission.prompt_index] += emission.tokens
        return out

    expected, stats = texts(None), Stats()
    assert texts(TreeDrafter(load_head(tmp_path, deep), 20, 3, 4), 1, stats) == expected
    assert 0 < stats.accepted_tokens < stats.new_tokens
    assert texts(TreeDrafter(load_head(tmp_path, deep)), 4) == expected


@torch.no_grad()
def test_a_head_may_have_its_own_width_and_embedding(deep, tmp_path):
    """As the EAGLE-3 head for Llama 3.3 70B: `target_hidden_size` in its config."""
    w = eagle3(deep, tmp_path)
    wide = random_model(num_layers=8, hidden_size=96)
    own = w | {"fc.weight": torch.randn(48, 3 * 96) / 17, "embed_tokens.weight": torch.randn(61, 48)}
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, own, config | {"target_hidden_size": 96})
    head = load_head(tmp_path, wide)
    assert torch.equal(head.embed_tokens.weight, own["embed_tokens.weight"])
    features = true_features(wide, own, [1, 2, 3, 4], (2, 4, 5))[:-1]
    theirs = naive_rows(own, torch.tensor([2, 3, 4]), features, 10000.0)
    ours = head(torch.tensor([[2, 3, 4]]), features[None], torch.arange(3)[None], causal_attention)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match="hidden size of 96, not 48"):
        load_head(tmp_path, deep)


@pytest.mark.parametrize("kind", ["eagle2", "eagle3"])
@pytest.mark.parametrize("precision", ["bf16", "w4a16", "w4a8"])
def test_a_head_loads_in_every_precision(deep, tmp_path, kind, precision):
    KINDS[kind][0](deep, tmp_path)
    target = random_model(num_layers=8).to(torch.bfloat16)
    target.frequencies = deep.frequencies
    head, exact = load_head(tmp_path, target, precision), load_head(tmp_path, deep)
    tokens, positions = torch.tensor(random_prompts([8])), torch.arange(8)[None]
    states = torch.randn(1, 8, 48 * len(head.taps(8)))
    expected = exact(tokens, exact.fuse(states), positions, causal_attention).flatten()
    got = head(tokens, head.fuse(states.bfloat16()), positions, causal_attention).float().flatten()
    assert F.cosine_similarity(got, expected, dim=0) > (0.999 if precision == "bf16" else 0.95)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": 64, "head_dim": 12}, "hidden size of 64, not 48"),
        ({"vocab_size": 600}, "vocabulary of 600, not 61"),
        ({"intermediate_size": 72}, "has shape"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
    ],
)
@pytest.mark.parametrize("make", [eagle2, eagle3])
def test_a_head_that_does_not_fit_is_refused(deep, tmp_path, make, change, words):
    make(deep, tmp_path, **change)
    with pytest.raises(BadInput, match=words) as error:
        load_head(tmp_path, deep)
    assert "\n" not in str(error.value)


def test_broken_files_of_heads_are_refused(deep, tmp_path):
    eagle2(deep, tmp_path / "cut")
    whole = (tmp_path / "cut" / "pytorch_model.bin").read_bytes()
    (tmp_path / "cut" / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    tensors = eagle2(deep, tmp_path / "lacks")
    write(tmp_path / "lacks", {k: v for k, v in tensors.items() if "o_proj" not in k}, CONFIG, as_bin=True)
    write(
        tmp_path / "more", tensors | {"layers.0.input_layernorm.weight": torch.ones(48)}, CONFIG, as_bin=True
    )
    write(tmp_path / "other", {"x": torch.ones(2)}, CONFIG, as_bin=True)
    write(tmp_path / "code", {"run": print}, CONFIG, as_bin=True)  # not weights
    third = eagle3(deep, tmp_path / "third")
    del third["embed_tokens.weight"], third["d2t"], third["t2d"]
    write(tmp_path / "third", third, json.loads((tmp_path / "third" / "config.json").read_text()))
    for name, words in [
        *(("cut", "not a whole file"), ("lacks", "lack layers.0.self_attn.o_proj.weight")),
        *(("more", "unexpected tensor layers.0.input_layernorm.weight"), ("other", "no EAGLE-2 or EAGLE-3")),
        *(("code", "not a whole file of weights"), ("third", "lack d2t")),
    ]:
        with pytest.raises(BadInput, match=words) as error:
            load_head(tmp_path / name, deep)
        assert "\n" not in str(error.value)
    for name, change in [("draft_vocab_size", {"draft_vocab_size": -1}), ("precision 'w4a9'", {})]:
        eagle3(deep, tmp_path / "odd", **change)
        with pytest.raises(BadInput, match=name):
            load_head(tmp_path / "odd", deep, None if change else "w4a9")
    for offsets in (
        torch.tensor(3),
        -torch.arange(20),
        torch.arange(20) * 9,
    ):  # one number, all the same, too far
        third = eagle3(deep, tmp_path / "map")
        config = json.loads((tmp_path / "map" / "config.json").read_text())
        del third["embed_tokens.weight"]
        write(tmp_path / "map", third | {"d2t": offsets}, config)
        with pytest.raises(BadInput, match="d2t does not map"):
            load_head(tmp_path / "map", deep)
    write(tmp_path / "keys", {1: torch.ones(2)}, CONFIG, as_bin=True)
    with pytest.raises(BadInput, match="named tensors"):
        load_head(tmp_path / "keys", deep)
    with pytest.raises(BadInput, match="3 layers"):
        eagle3(deep, tmp_path / "short")
        load_head(tmp_path / "short", random_model(num_layers=2))


@torch.no_grad()
def test_training_unrolls_what_drafting_does():
    """Row p of step i has drafted i tokens after position p, in a text that goes on as the training text
    does."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from training import unroll

    target = random_model()
    head = guessing_head(target)
    w = dict(head.checkpoint_tensors())
    [text] = random_prompts([9])
    truth = true_features(target, w, text, (2,))
    for i, guess in enumerate(unroll(head, torch.tensor([text]), truth[None], 3)):
        for p in range(8 - i):
            drafted = truth[: p + 1]
            for _ in range(i + 1):
                rows = naive_rows(w, torch.tensor(text[1 : len(drafted) + 1]), drafted, 10000.0)
                drafted = torch.cat((drafted, rows[-1:]))
            torch.testing.assert_close(guess[0, p], drafted[-1], rtol=1e-4, atol=1e-4)


# ---- trees ----------------------------------------------------------------------------------------


def brute_force(score, depth, k):
    """All nodes that EAGLE-2 looks at, in the order in which it meets them: (path, log-probability of it).

    `score(path)`: float32 [V]. Lists and Python's stable sort; the beam is the first k of the best.
    """
    pool, beam = [], [((), 0.0)]
    for _ in range(depth):
        children = []
        for path, total in beam:
            steps = score(path).log_softmax(-1).tolist()
            best = sorted(range(len(steps)), key=lambda token: -steps[token])[:k]
            children += [((*path, token), total + min(steps[token], 0.0)) for token in best]
        pool += children
        beam = sorted(children, key=lambda entry: -entry[1])[:k]
    return pool


def paths_of(draft):
    """The path of every node of a draft of one row, the root's is ()."""
    tokens, parents, paths = draft.tokens[0].tolist(), draft.parent[0].tolist(), [()]
    for token, parent in zip(tokens[1:], parents[1:]):
        paths.append((*paths[parent], token))  # fails if a child precedes its parent
    return paths


@torch.no_grad()
def check_trees(target, w, theta, taps, ids, drafter, sampling, trust):
    """Three trees in a row, whose catch-up has several rows from the second on, against brute force."""
    decoder = Decoder(target, drafter, sampling, 64, compile=False)
    drafter.trust = trust
    size, n = target.config.vocab_size, drafter.max_nodes
    [prompt] = random_prompts([7], vocab_size=size)
    text = prompt + decoder.prefill(0, prompt, Request(sampling, sampling.seed)).tokens
    for _ in range(3):
        features = true_features(target, w, text[:-1], taps)

        def score(path, text=text, features=features):
            logits = torch.full((size,), -torch.inf)
            logits[ids] = naive_scores(w, text, features, path, theta, target.lm_head.weight)
            if sampling.temperature > 0:
                position = torch.tensor([[len(text) + len(path)]])
                logits += sampling.temperature * gumbel(torch.tensor([sampling.seed]), position, size)[0, 0]
            return trust * logits

        pool = brute_force(score, drafter.depth, drafter.topk)
        expected = sorted(pool, key=lambda entry: -entry[1])[: n - 1]
        draft = drafter.propose(decoder.state)
        paths = paths_of(draft)
        assert draft.tokens[0, 0] == text[-1]
        assert len(set(paths)) == n and set(paths[1:]) == {path for path, _ in expected}
        total = sum(math.exp(score) for _, score in expected)
        torch.testing.assert_close(draft.expected, torch.tensor([total]), rtol=1e-4, atol=1e-4)
        text = text + decoder.commit(draft)[0].tokens


@torch.no_grad()
@pytest.mark.parametrize("trust", [1.0, 2.5])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("depth, k, n", [(1, 3, 4), (2, 5, 31), (3, 2, 8), (4, 3, 12), (3, 5, 40)])
def test_trees_equal_brute_force(depth, k, n, sampling, trust):
    """On a vocabulary of 5: k = 5 and depth 2 is every path there is; k = 2 and 3 prune."""
    target = random_model(vocab_size=5)
    head = guessing_head(target)
    w = dict(head.checkpoint_tensors())
    check_trees(target, w, 10000.0, (2,), torch.arange(5), TreeDrafter(head, n, depth, k), sampling, trust)


@torch.no_grad()
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_trees_of_published_heads_equal_brute_force(deep, tmp_path, kind, sampling):
    """Of EAGLE-3 too: its taps, its own tokens, whose noise is that of the target's, its RoPE base."""
    make, theta = KINDS[kind]
    w = make(deep, tmp_path)
    third = "eagle3" in kind
    taps, ids = ((2, 4, 5), torch.arange(20) * 3) if third else ((8,), torch.arange(61))
    check_trees(deep, w, theta, taps, ids, TreeDrafter(load_head(tmp_path, deep), 16, 4, 3), sampling, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3, 4, 10])
def test_equal_scores_go_to_the_first(k):
    """All logits equal: which nodes are best is a matter of the rule for ties alone, and no child may come
    without its parent."""
    target = random_model(vocab_size=12)
    head = guessing_head(target)
    target.lm_head.weight.zero_()
    depth, n = 3, 1 + k + k * k
    drafter = TreeDrafter(head, n, depth, k)
    decoder = Decoder(target, drafter, GREEDY, 64, compile=False)
    decoder.prefill(0, [3, 1, 4], Request(Sampling(), 0))
    draft = drafter.propose(decoder.state)
    expected = sorted(brute_force(lambda path: torch.zeros(12), depth, k), key=lambda entry: -entry[1])
    assert paths_of(draft)[1:] == [path for path, _ in expected[: n - 1]]


@torch.no_grad()
def test_a_sure_head_never_drafts_a_child_without_its_parent():
    """Probabilities that round to 1 make children as good as their parents."""
    target = random_model(sharpness=1e4)
    drafter = TreeDrafter(guessing_head(target), 20, 6, 4)
    decoder = Decoder(target, drafter, GREEDY, 64, compile=False)
    decoder.prefill(0, [3, 1, 4], Request(Sampling(), 0))
    draft = drafter.propose(decoder.state)
    paths = paths_of(draft)
    assert len(set(paths)) == 20 and max(map(len, paths)) == 6
    _, depth = tree_geometry(draft.parent, draft.max_depth)
    assert depth[0].tolist() == [len(path) for path in paths]


@torch.no_grad()
def test_a_head_that_yields_nan_drafts_a_tree_all_the_same():
    target = random_model()
    drafter = TreeDrafter(guessing_head(target), 20, 3, 4)
    drafter.head.fc.weight.fill_(torch.nan)
    decoder = Decoder(target, drafter, GREEDY, 64, compile=False)
    texts = [e.tokens for es in decoder.run([[3, 1, 4]], 20) for e in es]
    plain = [
        e.tokens for es in Decoder(target, max_length=64, compile=False).run([[3, 1, 4]], 20) for e in es
    ]
    assert sum(texts, []) == sum(plain, [])


@torch.no_grad()
def test_the_best_small_tree_is_the_beginning_of_a_larger_one():
    target = random_model()
    drafts = []
    for n in (4, 12, 30):
        drafter = TreeDrafter(guessing_head(target), n, 3, 4)
        decoder = Decoder(target, drafter, GREEDY, 64, compile=False)
        decoder.prefill(0, [3, 1, 4], Request(Sampling(), 0))
        drafts.append(drafter.propose(decoder.state))
    for small, large in zip(drafts, drafts[1:]):
        n = small.tokens.shape[1]
        assert torch.equal(small.tokens, large.tokens[:, :n]) and torch.equal(
            small.parent, large.parent[:, :n]
        )
        assert small.expected < large.expected


def test_trees_that_cannot_be_are_refused():
    head = guessing_head(random_model())
    for size, depth, k, words in [
        (1, 3, 4, "tree_size is 1"),
        (38, 3, 4, "2 to 37"),
        (4, 2, 62, "61 tokens"),
    ]:
        with pytest.raises(BadInput, match=words):
            TreeDrafter(head, size, depth, k)
    assert TreeDrafter(head, None, 1, 2).draft_sizes() == [3]
    assert TreeDrafter(head, None, 5, 8).draft_sizes() == [2, 4, 8, 16, 32, 60]


# ---- how many nodes to verify ---------------------------------------------------------------------


def test_the_pace_chooses_what_is_fastest():
    """Held at the rate that it leads to, the choice has the largest tokens per second of all sizes."""
    seconds = {4: 1.5, 8: 1.7, 16: 2.2, 32: 3.5}
    for expected in (
        {4: 2.0, 8: 2.1, 16: 2.2, 32: 2.3},
        {4: 1.5, 8: 2.5, 16: 3.2, 32: 4.0},
        {4: 1, 8: 2, 16: 4, 32: 9},
    ):
        pace = Pace(seconds)
        for _ in range(500):
            n = pace.best(expected)
            pace.count(expected[n], n, seconds[n])
        rates = {n: expected[n] / seconds[n] for n in seconds}
        assert rates[pace.best(expected)] == max(rates.values())


def test_trust_grows_until_as_much_is_accepted_as_expected(target):
    """Of three kinds of nodes, the target accepts what the head's logits times 1.7 would say."""
    drafter, draft = TreeDrafter(guessing_head(target)), Draft.chain(torch.zeros(1, 2, dtype=torch.int64))
    drafter.pace = Pace()

    def learn(accepted: float, expected: float) -> None:
        drafter.learn(draft, [Verified(accepted, 0, [], expected)], 1.0)

    for _ in range(2000):
        for logit in (0.2, 0.8, 2.2):
            learn(1 / (1 + math.exp(-1.7 * logit)), 1 / (1 + math.exp(-drafter.trust * logit)))
    assert drafter.trust == pytest.approx(1.7, rel=0.02)
    for _ in range(1000):
        learn(0.0, 0.9)
    assert drafter.trust == 0.25


def test_trust_does_not_hang_on_the_batch(target):
    """Many texts at once teach no faster than one: the average counts, or trust would swing."""
    decoder = Decoder(target, TreeDrafter(guessing_head(target), 8, 3, 3), SAMPLED, 64, 32, compile=False)
    seen = []
    for _ in decoder.run(random_prompts(32 * [5]), 40):
        seen.append(decoder.drafter.trust)
    assert all(abs(b / a - 1) < 0.07 for a, b in zip(seen, seen[1:]))


def test_costs_are_measured_and_sizes_are_used(target):
    drafter = TreeDrafter(guessing_head(target), None, 3, 4)
    decoder = Decoder(target, drafter, SAMPLED, 128, batch_size=2, compile=False)
    decoder.warm_up()
    pace = drafter.pace
    assert set(pace.seconds) == {2, 4, 8, 16, 32} and all(t > 0 for t in pace.seconds.values())
    stats = Stats()
    pace.seconds = {2: 1e3, 4: 1e-9, 8: 1e3, 16: 1e3, 32: 1e3}  # only four nodes are ever worth it
    list(decoder.run(random_prompts([5, 9]), 20, stats=stats))
    assert set(stats.nodes_histogram) == {4} and sum(stats.nodes_histogram.values()) == stats.target_forwards
    pace.seconds = dict.fromkeys(pace.seconds, 0.0)  # more never hurts
    list(decoder.run(random_prompts([5, 9]), 20, stats=stats))
    assert set(stats.nodes_histogram) == {4, 8, 16, 32}  # up by a size a step


def test_a_tree_is_grown_no_deeper_than_its_size_needs(target, monkeypatch):
    """Passes of the head, step by step: two nodes need one, and when more are worth it, the depth follows by
    a size a step. No text changes."""
    drafter, grown = TreeDrafter(guessing_head(target), None, 6, 4), []
    decoder = Decoder(target, drafter, SAMPLED, 128, compile=False)
    monkeypatch.setattr(
        drafter,
        "grow_tree",
        lambda trust, reach: grown.append(reach) or drafter.grow(decoder.state, trust, reach),
    )
    assert [drafter.depth_for(drafter.reach_of(n)) for n in drafter.sizes] == [1, 2, 3, 4, 5, 6]
    [prompt], sizes = random_prompts([5]), iter([2, 2, 2, 2, 2, 2, 60, 8, 16, 32, 60, 60] + 99 * [2])
    monkeypatch.setattr(drafter, "choose_size", lambda mean: min(next(sizes), drafter.sizes[len(mean) - 1]))
    text = [token for emissions in decoder.run([prompt], 60) for token in emissions[0].tokens]
    assert grown[:12] == [7, 6, 5, 4, 3, 2, 2, 3, 4, 5, 6, 7]
    plain = generate(target, [prompt], None, SAMPLED, max_new_tokens=60, compile=False)
    assert text == [token for emissions in plain for token in emissions[0].tokens]


def test_every_depth_is_recorded_before_a_text(target, monkeypatch):
    """Where costs are known, too, so that nothing is measured."""
    drafter = TreeDrafter(guessing_head(target), None, 4, 3)
    decoder, sizes = Decoder(target, drafter, SAMPLED, 128), iter(6 * [2] + [4, 8, 16] + 99 * [2])
    decoder.warm_up({str(n): 1.0 for n in drafter.sizes})
    monkeypatch.setattr("tape.Tape.record", None)
    monkeypatch.setattr(drafter, "choose_size", lambda mean: min(next(sizes), drafter.sizes[len(mean) - 1]))
    stats = Stats()
    list(decoder.run(random_prompts([5]), 60, stats=stats))
    assert drafter.sizes == [2, 4, 8, 16] and set(stats.nodes_histogram) == {2, 4, 8, 16}


def test_depths_hold_their_nodes():
    """Enough for the next size, in chains, too; and a fixed size has all that was asked for."""
    head = guessing_head(random_model())
    for k in (1, 2, 3, 8):
        drafter = TreeDrafter(head, None, 6, k)
        for n in drafter.sizes:
            depth = drafter.depth_for(drafter.reach_of(n))
            largest = drafter.sizes[: drafter.reach_of(n)][-1]
            assert largest <= 1 + k + k**2 * (depth - 1)
    assert TreeDrafter(head, 4, 6, 4).depth_for(2) == 6


def test_expected_tokens_are_counted(target):
    """The sum of the path probabilities: 2 nodes of probability near 1, and what the target makes of them."""
    stats = Stats()
    sharp = random_model(sharpness=1e4)
    drafter = TreeDrafter(guessing_head(sharp, noise=0.0), 3, 2, 1)
    list(generate(sharp, random_prompts([5]), drafter, GREEDY, 40, compile=False, stats=stats))
    assert stats.expected_accepted_tokens == pytest.approx(2 * stats.target_forwards, rel=1e-3)
    assert stats.drafted_tokens == 2 * stats.target_forwards


@pytest.mark.parametrize("accepted, cut, counted", [(0, 0, 1.5), (4, 4, 1.5), (4, 2, 0.75)])
def test_what_was_expected_counts_where_nothing_was_accepted(accepted, cut, counted):
    """A cut takes its share of the expectation away; a rejected draft expected something all the same."""
    stats, draft = Stats(), Draft.chain(torch.zeros(1, 5, dtype=torch.int64))
    stats.count_row(draft, Verified(accepted, 4, [], 1.5), cut, cut + 1)
    assert stats.expected_accepted_tokens == counted
