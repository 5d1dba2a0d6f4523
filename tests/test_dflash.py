"""Block heads and the trees of their blocks: against equations, against brute force, from published files.

That texts and caches are right in every combination of drafters is tested with all others, in
test_decoding.py."""

import heapq
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NEEDS_EQUAL_ROWS,
    SHIPPED_TARGET,
    edit_weights,
    guessing_block_head,
    held_out_prompts,
    noisy_copy,
    random_model,
    random_prompts,
    texts,
)
from safetensors.torch import save_file
from test_heads import GROUPS, HEADS, HIDDEN, INNER, SIZE, VOCABULARY, feed_forward, norm, turn
from test_tree import paths_of

import generate
from block_heads import default_block_taps, load_block_head
from check_head import check_head, other_readings, verdict
from checkpoints import load_model
from costs import Stats
from dflash import Block, BlockDrafter, BlockHead, candidates
from drafts import Draft
from eagle import TreeDrafter
from gpt_spec import Decoder, HierarchicalDrafter, Request
from heads import load_head
from kernels import gumbel
from model import BadInput, causal_attention
from sampling import Sampling

GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, seed=7)
LAYERS, MASK, PLACES = 8, VOCABULARY - 1, 5


# ---- the equations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switches:
    taps: tuple[int, ...] = (1, 3, 5)
    shifted: bool = False
    causal: tuple[bool, ...] = (False, False)
    windows: tuple[int, ...] = (10**6, 10**6)


def naive_block(w, target, text, s):
    """Logits of all guesses after a text whose last token is the root, [guesses, V]: one softmax a row."""
    past, tokens = len(text) - 1, torch.tensor([text])
    states = target(tokens, torch.arange(past + 1)[None], causal_attention, s.taps)[1][0, :past]
    context = norm(states @ w["fc.weight"].T, w["hidden_norm.weight"])
    x = w["embed_tokens.weight"][[text[-1], *(PLACES - 1) * [MASK]]]
    for layer in range(2):
        name = f"layers.{layer}"
        rows = torch.cat((context, norm(x, w[f"{name}.input_layernorm.weight"])))
        q, k, v = ((rows @ w[f"{name}.self_attn.{part}_proj.weight"].T).view(-1, h, SIZE) for part, h in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)))  # fmt: skip  # noqa: E501
        q, k = (norm(each, w[f"{name}.self_attn.{part}_norm.weight"]) for each, part in ((q, "q"), (k, "k")))
        q, k, out = turn(q, 10000.0), turn(k, 10000.0), torch.empty(PLACES, HEADS, SIZE)
        for i in range(PLACES):
            end = past + i + 1 if s.causal[layer] else past + PLACES
            seen = slice(max(past - s.windows[layer], 0), end)
            for h in range(HEADS):
                g = h * GROUPS // HEADS
                out[i, h] = (k[seen, g] @ q[past + i, h] / SIZE**0.5).softmax(0) @ v[seen, g]
        x = feed_forward(w, name, x + out.flatten(1) @ w[f"{name}.self_attn.o_proj.weight"].T)
    logits = norm(x, w["norm.weight"]) @ w["lm_head.weight"].T
    return logits if s.shifted else logits[1:]


# ---- layouts -----------------------------------------------------------------------------------------

FLAT = {
    "model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": SIZE,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "vocab_size": VOCABULARY, "hidden_act": "silu",
}  # fmt: skip


def tensors_of(target, drafted=None):
    """Random weights; with `drafted`, an lm_head and an embedding of the head's own."""
    torch.manual_seed(21)
    wide = {"q_proj": HEADS * SIZE, "k_proj": GROUPS * SIZE, "v_proj": GROUPS * SIZE}
    shapes = {"fc": (HIDDEN, 3 * HIDDEN), "hidden_norm": (HIDDEN,), "norm": (HIDDEN,)}
    for i in range(2):
        layer = {f"self_attn.{name}": (rows, HIDDEN) for name, rows in wide.items()}
        layer |= {"self_attn.o_proj": (HIDDEN, HEADS * SIZE), "mlp.down_proj": (HIDDEN, INNER)}
        layer |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)}
        layer |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (SIZE,))
        layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (HIDDEN,))
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= {"lm_head": (drafted, HIDDEN), "embed_tokens": (VOCABULARY, HIDDEN)} if drafted else {}
    found = {
        f"{name}.weight": torch.rand(shape) + 0.5 if len(shape) == 1 else torch.randn(shape) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    return found if drafted else found | borrowed(target)


def borrowed(target):
    return {"embed_tokens.weight": target.embed_tokens.weight, "lm_head.weight": target.lm_head.weight}


def save(directory, tensors, config):
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.clone() for name, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def z_lab(target, directory, **changes):
    """-> what the equations need; a key of `dflash_config` may be changed by its name"""
    w = tensors_of(target)
    kept = {name: t for name, t in w.items() if name not in borrowed(target)}
    inner = {"target_layer_ids": [0, 2, 4], "mask_token_id": MASK}
    inner |= {name: changes.pop(name) for name in ("causal", "use_swa", "swa_window_size") if name in changes}
    config = FLAT | {"architectures": ["DFlashDraftModel"], "block_size": PLACES, "dflash_config": inner}
    save(directory, kept, config | changes)
    return w


def speculators(target, directory, **changes):
    w = tensors_of(target, drafted=20)
    ids = torch.arange(20) * 3
    config = {"speculators_model_type": "dflash", "transformer_layer_config": dict(FLAT)}
    config |= {"aux_hidden_state_layer_ids": [1, 3, 5], "mask_token_id": MASK, "draft_vocab_size": 20}
    config |= {"block_size": PLACES, "sample_from_anchor": False}
    for name in ("layer_types", "sliding_window"):
        if name in changes:
            config["transformer_layer_config"][name] = changes.pop(name)
    save(directory, w | {"d2t": ids - torch.arange(20)}, config | changes)
    return w


def deep_spec(target, directory, **changes):
    w = tensors_of(target)
    config = {"architectures": ["Qwen3DSparkModel"], "markov_rank": 0, "target_layer_ids": [0, 2, 4]}
    save(directory, w, FLAT | config | {"block_size": PLACES, "mask_token_id": MASK} | changes)
    return w


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
CASES = {  # writer, changes of the configuration, what they mean
    "z-lab": (z_lab, {}, Switches()),
    "z-lab, causal": (z_lab, {"causal": True}, Switches(causal=(True, True))),
    "z-lab, windows": (z_lab, SLIDING, Switches(causal=(True, False), windows=(4, 10**6))),
    "ModelOpt": (z_lab, {"use_swa": True, "swa_window_size": 3}, Switches(windows=(3, 3))),
    "speculators": (speculators, {}, Switches()),
    "speculators, windows": (speculators, SLIDING, Switches(causal=(True, False), windows=(4, 10**6))),
    "speculators, non-causal windows": (
        speculators,
        SLIDING | {"sliding_window_non_causal": True},
        Switches(windows=(4, 10**6)),
    ),
    "speculators, shifted": (speculators, {"sample_from_anchor": True}, Switches(shifted=True)),
    "DeepSpec": (deep_spec, {}, Switches(shifted=True)),
}


def uncached(head, target, text):
    """Logits of all guesses in one forward, without a cache."""
    past, tokens = len(text) - 1, torch.tensor([text])
    states = target(tokens, torch.arange(past + 1)[None], causal_attention, head.taps(LAYERS))[1][:, :past]
    positions = torch.arange(past + head.block.size)[None]

    def attend(layer, q, k, v):
        window = head.block.windows[layer]
        seen = torch.ones(q.shape[1], past, dtype=torch.bool)
        seen = seen & (torch.arange(past) >= (past - window if window else 0))
        seen = torch.cat((seen, head.visible(layer, q)), dim=1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)

    x = head(head.fuse(states), head.open(tokens[:, -1:]), positions, attend)
    return head.logits(head.guesses(x))[0]


def steps_of(target, head, sampling=GREEDY, size=None, **shape):
    """Texts and a drafter that has decoded them, step by step: every second one accepts all that it can."""
    drafter = BlockDrafter(head, size or 8, **shape)
    decoder = Decoder(target, drafter, sampling, 64, compile=False)
    [prompt] = random_prompts([9], vocab_size=target.config.vocab_size)
    [said] = texts(target, [prompt], sampling=sampling, max_new_tokens=30)
    text = prompt + decoder.prefill(0, prompt, Request(sampling, sampling.seed)).tokens
    for step in range(6):
        yield text, decoder, drafter
        whole = prompt + said
        chain = torch.tensor([whole[len(text) - 1 : len(text) + drafter.depth]])
        draft = Draft.chain(chain) if step % 2 else drafter.propose(decoder.state)
        text = text + decoder.commit(draft)[0].tokens


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_forward_and_cached_forward_equal_the_equations(deep, tmp_path, case):
    write, changes, switches = CASES[case]
    w = write(deep, tmp_path, **changes)
    head = load_block_head(tmp_path, deep)
    longest = 0
    for text, decoder, drafter in steps_of(deep, head):
        expected = naive_block(w, deep, text, switches)
        torch.testing.assert_close(uncached(head, deep, text), expected, rtol=1e-4, atol=1e-3)
        cached = head.logits(head.guesses(drafter.fill_block(decoder.state)))[0]
        torch.testing.assert_close(cached, expected, rtol=1e-4, atol=1e-3)
        longest = max(longest, len(text))
    assert longest > 9 + 2 * PLACES  # some steps accepted all, so that several rows were new


@torch.no_grad()
def test_another_reading_gives_other_guesses(deep, tmp_path):
    """Each switch reaches the logits: which place guesses, states, causal masks, windows, the mask."""
    w = z_lab(deep, tmp_path)
    [text] = random_prompts([12])
    expected = naive_block(w, deep, text, Switches())
    readings = [{"shifted": True}, {"taps": (0, 2, 4)}, {"causal": (True, True)}, {"mask_token_id": 3}]
    for reading in [*readings, {"windows": (4, 4)}, {"rope_theta": 500.0}]:
        head = load_block_head(tmp_path, deep, **{"windows": (None, None)} | reading)
        logits = uncached(head, deep, text)
        assert len(logits) != len(expected) or (logits - expected).abs().max() > 0.1, reading


def test_states_that_nothing_names_are_the_usual_ones(deep, tmp_path):
    assert default_block_taps(36, 5) == (2, 10, 18, 26, 34) and default_block_taps(36, 1) == (19,)
    z_lab(deep, tmp_path, dflash_config={"mask_token_id": MASK})
    assert load_block_head(tmp_path, deep).block.taps == (2, 4, 6)


def test_states_of_the_other_numbering_are_said(deep, tmp_path, capsys):
    """As of a configuration of speculators whose numbers were lifted from z-lab's."""
    speculators(deep, tmp_path, aux_hidden_state_layer_ids=[1, 3, 5])
    load_block_head(tmp_path, deep)
    assert "the usual [2, 4, 6]" in capsys.readouterr().err


REFUSED = [
    ({"dflash_config": {"target_layer_ids": [0, 2, 4]}}, "mask_token_id is missing"),
    ({"dflash_config": {"mask_token_id": 61}}, "mask_token_id is 61, and the embedding has 61 rows"),
    ({"dflash_config": {"mask_token_id": MASK, "gate": 1}}, "key gate of dflash_config"),
    ({"dflash_config": {"mask_token_id": MASK, "projector_type": "domino"}}, "projector_type is 'domino'"),
    ({"dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 2]}}, "fc reads 3 states"),
    ({"dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 2, 7]}}, "not all states"),
    ({"attention_sink_bias": True}, "attention_sink_bias is True"),
    ({"block_size": None}, "block_size is missing"),
    ({"block_size": 1}, "guesses nothing"),
    ({"block_size": "8"}, "block_size is '8'"),
    ({"markov_rank": 256}, "DSpark"),
    ({"num_target_layers": 9}, "target of 9 layers, not 8"),
    ({"architectures": ["DFlareDraftModel"]}, "a DFlare head"),
    ({"architectures": ["TreeFlashModel"]}, "a TreeFlash head"),
    ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ({"layer_types": 2 * ["sliding_attention"]}, "sliding_window is missing"),
    ({"use_swa": True}, "swa_window_size is missing"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_size": 64}, "hidden size of 64, not 48"),
    ({"vocab_size": 600}, "vocabulary of 600, not 61"),
    ({"causal": 1}, "causal is 1; it must be true or false"),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_not_understood_is_refused(deep, tmp_path, changes, words):
    z_lab(deep, tmp_path, **changes)
    with pytest.raises(BadInput, match=words) as error:
        load_block_head(tmp_path, deep)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("layers.0.self_attn.qkv_proj.weight", "Laguna"),
        ("layers.0.self_attn.g_proj.weight", "Laguna"),
        ("encoder.fc.weight", "Muse-Glimmer"),
        ("prefix_gru.weight", "Domino"),
        ("markov_w1.weight", "DSpark"),
        ("layers.0.conv.weight", "DFlash2"),
        ("layers.1.fc.weight", "DFlare"),
        ("mask_embedding", "mask of its own"),
        ("more.weight", "unexpected tensor more.weight"),
    ],
)
def test_other_kinds_of_heads_are_refused_by_name(deep, tmp_path, name, words):
    z_lab(deep, tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    with pytest.raises(BadInput, match=words):
        load_block_head(tmp_path, deep)


def test_heads_of_one_kind_are_not_read_as_the_other(deep, tmp_path):
    z_lab(deep, tmp_path)
    with pytest.raises(BadInput, match="--dflash_checkpoint_path"):
        load_head(tmp_path, deep)
    edit_weights(tmp_path, lambda tensors: tensors.pop("hidden_norm.weight"))
    with pytest.raises(BadInput, match="no block head"):
        load_block_head(tmp_path, deep)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "w4a16", "w4a8"])
def test_a_head_loads_in_every_precision(deep, tmp_path, precision):
    """The embedding that is the target's own, number by number, is shared."""
    deep_spec(deep, tmp_path)
    target = random_model(num_layers=LAYERS).to(torch.bfloat16)
    target.frequencies = deep.frequencies
    [text] = random_prompts([12])
    exact, head = load_block_head(tmp_path, deep), load_block_head(tmp_path, target, precision)
    assert exact.embed_tokens is deep.embed_tokens
    wide = {"windows": (None, None)}
    exact.block, head.block = replace(exact.block, **wide), replace(head.block, **wide)
    got, expected = uncached(head, target, text).flatten(), uncached(exact, deep, text).flatten()
    least = 0.99 if precision == "bf16" else 0.9
    assert F.cosine_similarity(got, expected, dim=0) > least


# ---- trees -------------------------------------------------------------------------------------------


def all_trees(tokens, depth, count):
    """Every tree of `count` nodes below the root, as sets of paths."""
    trees = {frozenset()}
    for _ in range(count):
        grown = set()
        for tree in trees:
            for path in [(), *tree]:
                if len(path) < depth:
                    more = ((*path, token) for token in range(tokens))
                    grown |= {tree | {child} for child in more if child not in tree}
        trees = grown
    return trees


def heap_tree(rows, count):
    """The algorithm of DDTree with a heap: the best `count` paths, in the order in which they are found."""
    ranked = [sorted(range(len(row)), key=lambda token, row=row: -row[token]) for row in rows]
    heap, found = [(-rows[0][ranked[0][0]], 1, 0, ())], []
    while heap and len(found) < count:
        score, depth, rank, above = heapq.heappop(heap)
        row, order = rows[depth - 1], ranked[depth - 1]
        path = (*above, order[rank])
        found.append(path)
        if rank + 1 < len(order):
            sibling = score + row[order[rank]] - row[order[rank + 1]]
            heapq.heappush(heap, (sibling, depth, rank + 1, above))
        if depth < len(rows):
            below = score - rows[depth][ranked[depth][0]]
            heapq.heappush(heap, (below, depth + 1, 0, path))
    return found


def value(rows, path):
    """The logarithm of the product of the probabilities on a path."""
    return sum(rows[i][token] for i, token in enumerate(path))


def rows_of(decoder, drafter, sampling, text):
    """The log-probabilities that a draft should go by, as lists, [depth][V]."""
    head, size = drafter.head, decoder.vocabulary
    logits = head.logits(head.guesses(drafter.fill_block(decoder.state)))[0, : drafter.depth]
    if sampling.temperature > 0:
        positions = len(text) + torch.arange(drafter.depth)[None]
        noise = sampling.temperature * gumbel(torch.tensor([sampling.seed]), positions, size)[0]
        best = drafter.agreed.argmax(-1)
        logits = logits + torch.tensor(drafter.SHARES)[best][:, None] * noise
    return (drafter.trust * logits).log_softmax(-1).tolist()


def tiny_head(target, size=PLACES, shifted=False, sharpness=1.0):
    """Random weights, on a target of any size."""
    torch.manual_seed(5)
    config = replace(target.config, num_layers=1)
    head = BlockHead(config, Block((1,), size, target.config.vocab_size - 1, shifted))
    head = head.requires_grad_(False).attach(target)
    head.norm.weight *= sharpness
    return head


@torch.no_grad()
@pytest.mark.parametrize("trust", [1.0, 2.5])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("vocabulary, depth, nodes", [(2, 3, 9), (3, 2, 7), (3, 3, 6), (4, 2, 6), (2, 4, 7)])
def test_no_tree_of_so_many_nodes_has_a_larger_expected_length(vocabulary, depth, nodes, sampling, trust):
    target = random_model(vocab_size=vocabulary, sharpness=3.0)
    head = tiny_head(target)
    steps = steps_of(target, head, sampling, nodes, tree_depth=depth)
    for text, decoder, drafter in steps:
        drafter.trust = trust
        if sampling.temperature > 0:  # what will be counted by `propose`, before it looks
            drafter.compare(decoder.state, decoder.state.length[:, None] + 1 + torch.arange(drafter.depth))
            drafter.asked.fill_(2**62)
            drafter.MEMORY = 1.0
        rows = rows_of(decoder, drafter, sampling, text)
        worth = {tree: sum(math.exp(value(rows, path)) for path in tree) for tree in all_trees(vocabulary, depth, nodes - 1)}  # fmt: skip  # noqa: E501
        draft = drafter.propose(decoder.state)
        tree = frozenset(paths_of(draft)[1:])
        assert len(tree) == nodes - 1 and draft.tokens[0, 0] == text[-1]
        assert worth[tree] == pytest.approx(max(worth.values()), rel=1e-5)
        assert draft.expected.item() == pytest.approx(worth[tree], rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("nodes", [2, 5, 16, 60, 200])
@pytest.mark.parametrize("shifted", [False, True])
def test_trees_equal_those_of_a_heap(target, nodes, shifted):
    """With all tokens of the vocabulary, of which the drafter looks at fewer."""
    steps = steps_of(target, tiny_head(target, 8, shifted), GREEDY, nodes)
    for text, decoder, drafter in steps:
        rows = rows_of(decoder, drafter, GREEDY, text)
        assert paths_of(drafter.propose(decoder.state))[1:] == heap_tree(rows, nodes - 1)


@torch.no_grad()
@pytest.mark.parametrize("nodes, topk", [(4, None), (8, None), (40, None), (13, 2), (5, 1)])
def test_equal_scores_go_to_the_first(nodes, topk):
    """All logits equal: by depth, then by parent, then by token; and no child without its parent."""
    target = random_model(vocab_size=12)
    head = tiny_head(target)
    target.lm_head.weight.zero_()
    [text, decoder, drafter] = next(steps_of(target, head, GREEDY, nodes, tree_topk=topk))
    paths, pool = [()], []
    for _ in range(drafter.depth):
        paths = [(*path, token) for path in paths for token in range(topk or 12)]
        pool += paths[:nodes]
    assert paths_of(drafter.propose(decoder.state))[1:] == pool[: nodes - 1]


@torch.no_grad()
def test_a_sure_head_never_drafts_a_child_without_its_parent():
    """Probabilities that round to 1 make children as good as their parents; then a small tree is a chain."""
    target = random_model(sharpness=1e4)
    [_, decoder, drafter] = next(steps_of(target, tiny_head(target), GREEDY, 5))
    assert [len(path) for path in paths_of(drafter.propose(decoder.state))] == [0, 1, 2, 3, 4]
    chain = BlockDrafter(drafter.head, 5, 4, 1)
    whole = Decoder(target, chain, GREEDY, 64, compile=False)
    whole.prefill(0, decoder.state.tokens[0, :9].tolist(), Request(GREEDY, 0))
    assert paths_of(chain.propose(whole.state)) == paths_of(drafter.propose(decoder.state))


@torch.no_grad()
def test_the_best_small_tree_is_the_beginning_of_a_larger_one(target):
    drafts = []
    for nodes in (4, 12, 60):
        [_, decoder, drafter] = next(steps_of(target, tiny_head(target), SAMPLED, nodes))
        drafts.append(drafter.propose(decoder.state))
    for small, large in zip(drafts, drafts[1:]):
        n = small.tokens.shape[1]
        assert torch.equal(small.tokens, large.tokens[:, :n])
        assert torch.equal(small.parent, large.parent[:, :n]) and small.expected < large.expected


@torch.no_grad()
def test_a_head_that_yields_nan_drafts_a_tree_all_the_same(target):
    head = tiny_head(target)
    head.norm.weight.fill_(torch.nan)
    assert texts(target, [[3, 1, 4]], BlockDrafter(head, 20)) == texts(target, [[3, 1, 4]])


def test_few_pairs_are_candidates():
    assert list(map(len, candidates(59, 3, 10**6))) == [59, 249, 248]
    assert candidates(4, 2, 2) == [[(0, 0), (0, 1)], [(0, 0), (0, 1), (1, 0), (1, 1)]]


def test_trees_that_cannot_be_are_refused(target):
    head = guessing_block_head(target, False)  # four guesses
    for arguments, words in [
        ((1,), "tree_size is 1"),
        ((1025,), "2 to 1024"),
        ((6, 4, 1), "2 to 5"),
        ((4, 5), "tree_depth is 5; with this head it must be 1 to 4"),
        ((4, 3, 62), "knows 61 tokens"),
        ((4.5,), "tree_size"),
    ]:
        with pytest.raises(BadInput, match=words):
            BlockDrafter(head, *arguments)
    with pytest.raises(BadInput, match="head"):
        BlockDrafter(target)
    assert BlockDrafter(head, None, 4, 1).draft_sizes() == [2, 4]
    assert BlockDrafter(head).draft_sizes() == [2, 4, 8, 16, 32, 60]
    wide = random_model(hidden_size=96)
    with pytest.raises(BadInput, match="hidden size of 48, not 96"):
        Decoder(wide, BlockDrafter(head), compile=False)


# ---- noise -------------------------------------------------------------------------------------------


class Watched(BlockDrafter):
    """Keeps what it would have had first with each share of the noise, and where."""

    MEMORY = 1.0

    def add_noise(self, logits, state, positions):
        result = super().add_noise(logits, state, positions)
        self.blocks.append((int(state.length), self.choices[0].tolist()))
        return result


def test_what_agrees_with_the_text_is_counted(target):
    """Every choice for a position that the text has by the next block, and no other."""
    drafter, [prompt] = Watched(guessing_block_head(target, True), 12), random_prompts([5])
    drafter.blocks = []
    text = prompt + texts(target, [prompt], drafter, SAMPLED, 80)[0]
    del drafter.blocks[0]  # of the warm-up, which has no text
    expected = torch.zeros(5, 4)
    for (here, choices), (after, _) in zip(drafter.blocks, drafter.blocks[1:]):
        for place in range(here + 1, min(here + 5, after) + 1):
            expected[place - here - 1] += torch.tensor(
                [first == text[place] for first in choices[place - here - 1]]
            )
    assert torch.equal(drafter.agreed, expected) and expected.sum() > 20


def test_the_share_that_agrees_most_is_taken(target):
    """What a head says of deeper nodes is settled by the row alone or by the noise: whatever was right."""
    drafter = BlockDrafter(guessing_block_head(target, True), 12)
    decoder = Decoder(target, drafter, SAMPLED, 64, compile=False)
    decoder.prefill(0, [3, 1, 4], Request(SAMPLED, 7))
    drafter.agreed.copy_(
        torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 2], [0, 3, 0, 0], [0, 0, 1, 0], [5, 0, 0, 5]])
    )
    logits = torch.randn(1, 5, 61)
    positions = 4 + torch.arange(5)[None]
    noise = gumbel(torch.tensor([7]), positions, 61)
    shares = torch.tensor([1.0, 0.0, 0.5, 0.25, 1.0])
    ours = drafter.add_noise(logits, decoder.state, positions)
    torch.testing.assert_close(ours, logits + shares[:, None] * noise)


# ---- texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", ["z-lab, windows", "speculators", "DeepSpec"])
def test_random_heads_never_change_the_text(deep, tmp_path, case, sampling):
    write, changes, _ = CASES[case]
    write(deep, tmp_path, **changes)
    prompts, stats = random_prompts([5, 1, 30]), Stats()
    expected = texts(deep, prompts, None, sampling, 24)
    drafter = BlockDrafter(load_block_head(tmp_path, deep), 20)
    assert texts(deep, prompts, drafter, sampling, 24, stats=stats) == expected
    assert 0 < stats.accepted_tokens < stats.new_tokens
    drafter = BlockDrafter(load_block_head(tmp_path, deep))
    assert texts(deep, prompts, drafter, sampling, 24, batch_size=4) == expected


@pytest.mark.parametrize("shifted, low, high", [(False, 0.3, 0.97), (True, 0.5, 0.99)])
def test_a_head_that_guesses_well_is_accepted(target, shifted, low, high):
    """The equality of texts means little if nothing was accepted."""
    stats = Stats()
    drafter = BlockDrafter(guessing_block_head(target, shifted), 12)
    texts(target, random_prompts([5, 9]), drafter, SAMPLED, stats=stats)
    assert low <= stats.acceptance_by_position[0] <= high


def shipped_block_head(model, precision, tmp_path):
    """Random weights for the shipped target; as good as untrained, but in every precision."""
    c = model.config
    torch.manual_seed(4)
    head = BlockHead(
        replace(c, num_layers=1, tied_embeddings=False),
        Block((1, c.num_layers - 1), 6, c.vocab_size - 1, True),
    )
    config = FLAT | {"model_type": "llama", "hidden_size": c.hidden_size, "num_hidden_layers": 1}
    config |= {"intermediate_size": c.intermediate_size, "head_dim": c.head_dim, "vocab_size": c.vocab_size}
    config |= {"num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads}
    config |= {"block_size": 6, "sample_from_anchor": True, "architectures": ["DFlashDraftModel"]}
    config |= {
        "dflash_config": {"target_layer_ids": [0, c.num_layers - 2], "mask_token_id": c.vocab_size - 1}
    }
    save(tmp_path, head.checkpoint_tensors(), config)
    return load_block_head(tmp_path, model, precision)


@NEEDS_EQUAL_ROWS
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("precision", ["bf16", "w4a16", "w4a8"])
def test_texts_are_the_same_to_the_last_bit(tmp_path, precision, sampling):
    """Recorded, batch 1 and 4, head and target in one precision; a hierarchy on the target's own cache."""
    model = load_model(SHIPPED_TARGET, precision)
    head = shipped_block_head(model, precision, tmp_path)
    prompts = held_out_prompts(4)
    expected = texts(model, prompts, sampling=sampling, max_new_tokens=24, compile=True)
    for batch_size in (1, 4):
        drafter = BlockDrafter(head, 16)
        ours = texts(model, prompts, drafter, sampling, 24, batch_size=batch_size, compile=True)
        assert ours == expected
    plain = texts(model, prompts[:2], BlockDrafter(head, 16), sampling, 24)
    assert plain == expected[:2]  # recorded or not


def test_a_hierarchy_with_penalties(target):
    sampling = Sampling(temperature=0.8, seed=3, repetition_penalty=1.3, presence_penalty=0.4)
    middle, prompts = noisy_copy(target), random_prompts([5, 1, 9])
    expected = texts(target, prompts, sampling=sampling)
    for batch_size in (1, 3):
        inner = BlockDrafter(guessing_block_head(middle, True), 9)
        drafter = HierarchicalDrafter(middle, inner, 4)
        assert texts(target, prompts, drafter, sampling, batch_size=batch_size) == expected
        alone = BlockDrafter(guessing_block_head(target, False), 9)
        assert texts(target, prompts, alone, sampling, batch_size=batch_size) == expected


@torch.no_grad()
def test_a_restricted_head_drafts_no_other_tokens(target):
    head = guessing_block_head(target, True).restrict(torch.arange(0, 61, 4))
    [prompt] = random_prompts([7])
    decoder = Decoder(target, BlockDrafter(head, 12), SAMPLED, 64, compile=False)
    decoder.prefill(0, prompt, Request(SAMPLED, 7))
    assert all(int(token) % 4 == 0 for token in decoder.drafter.propose(decoder.state).tokens[0, 1:])
    expected = texts(target, [prompt], sampling=SAMPLED)
    assert texts(target, [prompt], BlockDrafter(head, 12), SAMPLED) == expected


# ---- --check_head -----------------------------------------------------------------------------------


def test_the_readings_of_a_block_head(deep, tmp_path):
    z_lab(deep, tmp_path)
    assert other_readings(load_block_head(tmp_path, deep), deep.config) == {
        "states 0, 2, 4": {"taps": (0, 2, 4)},
        "states 2, 4, 6": {"taps": (2, 4, 6)},
        "a place guesses the next token": {"shifted": True},
        "a place sees those before it": {"causal": (True, True)},
    }
    speculators(deep, tmp_path, sample_from_anchor=True)
    readings = other_readings(load_block_head(tmp_path, deep, causal=(True, True)), deep.config)
    assert readings["a place guesses the token there"] == {"shifted": False}
    assert readings["a place sees the whole block"] == {"causal": (False, False)}


@torch.no_grad()
def test_a_head_with_the_wrong_places_is_seen(target):
    """Its layers say nothing: all that it knows is in the root's place."""

    def load(**changes) -> BlockHead:
        head = guessing_block_head(target, True, noise=0.0)
        head.layers[0].self_attn.o_proj.weight.zero_()
        head.block = replace(head.block, **{"shifted": False} | changes)
        return head

    readings = check_head(load(), load, target, random_prompts([5, 9]), 80, [], False)
    assert "read it differently: 'a place guesses the next token'" in verdict(readings)


# ---- the command line --------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    shipped_block_head(load_model(SHIPPED_TARGET), None, tmp_path)

    def run(*flags) -> tuple[int, str, str]:
        capsys.readouterr()
        common = ("--max_new_tokens", 24, "--precision", "w4a8", "--compile", "none", "--json")
        return generate.main([str(each) for each in (*common, *flags)]), *capsys.readouterr()

    flag = ("--dflash_checkpoint_path", tmp_path)
    plain = json.loads(run("--method", "autoregressive")[1])
    for more in ((), ("--draft_precision", "w4a8", "--tree_size", 8)):
        said = json.loads(run(*flag, *more)[1])
        assert said["outputs"][0]["token_ids"] == plain["outputs"][0]["token_ids"]
        assert said["method"] == "dflash"
    readings = json.loads(run("--check_head", *flag)[1])["readings"]
    assert "a place guesses the token there" in [reading["reading"] for reading in readings]
    for flags, words in [
        (("--method", "dflash"), "needs --dflash_checkpoint_path"),
        (("--method", "tree", *flag), "--dflash_checkpoint_path: method tree does not use it"),
        ((*flag, "--tree_depth", 7), "--tree_depth is 7"),
        (("--method", "hierarchical", "--eagle_checkpoint_path", "x", *flag), "a hierarchy has one head"),
    ]:
        status, _, said = run(*flags)
        assert status == 2 and words in said and said.count("\n") == 1


def test_auto_chooses_among_both_heads(tmp_path):
    """The shipped EAGLE head and a block head, which read different states of the target."""
    args = generate.build_parser().parse_args(["--method", "auto", "--dflash_checkpoint_path", str(tmp_path)])
    target = generate.load_target(args)
    shipped_block_head(target.model, None, tmp_path)
    _, drafter = generate.build_drafter(args, target)
    kinds = {name: type(each) for name, each in drafter.drafters.items()}
    assert kinds["tree"] is TreeDrafter and kinds["dflash"] is BlockDrafter
    [prompt] = held_out_prompts(1)
    drafter.needs_costs = False
    drafter.choose_drafter = lambda state: ("dflash" if drafter.current == "tree" else "tree", False)
    drafter.rates = dict.fromkeys(drafter.drafters, 1.0)
    stats = Stats()
    ours = texts(target.model, [prompt], drafter, max_new_tokens=60, stats=stats)
    assert ours == texts(target.model, [prompt], max_new_tokens=60)
    assert min(stats.drafter_histogram[name] for name in ("tree", "dflash")) > 2
