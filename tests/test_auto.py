"""`--method auto`: who drafts is chosen by costs and acceptance; what the others miss is fed to them later.

That texts and caches are right, whoever is in charge, is tested with all other drafters, in test_decoding.py.
"""

import json
import sys
from io import StringIO

import pytest
import torch
from conftest import (
    SHIPPED_HEAD,
    SHIPPED_SMALL,
    guessing_head,
    noisy_copy,
    random_model,
    random_prompts,
    texts,
)

import generate as command
from gpt_spec import (
    ALL,
    AutoDrafter,
    BadInput,
    Decoder,
    Drafter,
    HierarchicalDrafter,
    LookupDrafter,
    Pace,
    Sampling,
    SequentialDrafter,
    State,
    Stats,
    TextIndex,
    TreeDrafter,
    find_repetition,
)
from quantize import share_weights

PROMPTS = random_prompts([5, 1, 17, 9, 30])


def decoder_of(target, drafters: dict[str, Drafter], costs: dict[str, float], batch_size: int = 1) -> Decoder:
    """A decoder that chooses among drafters, whose steps are thought to cost so much each; and do not change
    their minds about it, as time in a test means nothing."""
    auto = AutoDrafter(drafters)
    auto.CORRECTION = 0.0
    auto.needs_costs = False
    decoder = Decoder(target, auto, Sampling(), 256, batch_size, compile=False)
    for name, drafter in auto.drafters.items():
        drafter.set_costs(dict.fromkeys(drafter.draft_sizes(), costs[name]))
    return decoder


def steps_of(decoder: Decoder, prompts=PROMPTS, tokens: int = 200) -> dict[str, int]:
    stats = Stats()
    list(decoder.run(prompts, tokens, stats=stats))
    return stats.drafter_histogram


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "costs, winner",
    [
        ({"autoregressive": 1.0, "good": 1.5, "bad": 1.5}, "good"),
        ({"autoregressive": 1.0, "good": 9.0, "bad": 9.0}, "autoregressive"),
        ({"autoregressive": 1.0, "good": 4.5, "bad": 1.01}, "bad"),  # hardly ever right, and nearly free
    ],
)
def test_the_fastest_is_in_charge(target, costs, winner, batch_size):
    """Of drafts that are accepted always, and never, at several prices. Trials are a small share."""
    drafters = {"good": SequentialDrafter(target, 3), "bad": SequentialDrafter(random_model(seed=1), 3)}
    if winner == "bad":
        drafters["bad"] = SequentialDrafter(noisy_copy(target), 3)
    steps = steps_of(decoder_of(target, drafters, costs, batch_size))
    assert steps[winner] > 0.8 * sum(steps.values())


def test_what_could_not_win_waits(target):
    """Four tokens for the price of five are slower than one for that of one, whatever is accepted. But costs
    may be those of a bad moment, so there is a trial as soon as it is a small enough share of the time."""
    drafters = {"dear": SequentialDrafter(target, 3)}
    decoder = decoder_of(target, drafters, {"autoregressive": 1.0, "dear": 5.0})
    assert set(steps_of(decoder)) == {"autoregressive"}
    decoder.drafter.elapsed = 6 * 5.0 / AutoDrafter.CURIOSITY
    assert steps_of(decoder)["dear"] >= AutoDrafter.TRIAL


def test_trials_waste_a_small_share(target):
    """The loser is asked again now and then, for no more time than it may waste."""
    costs = {"autoregressive": 1.0, "bad": 2.0}
    decoder = decoder_of(target, {"bad": SequentialDrafter(random_model(seed=1), 3)}, costs)
    stats = Stats()
    for _ in range(5):
        list(decoder.run(PROMPTS, 200, stats=stats))
    steps, auto = stats.drafter_histogram, decoder.drafter
    tokens = stats.new_tokens - stats.outputs
    needed = tokens * costs["autoregressive"]
    took = sum(costs[name] * count for name, count in steps.items())
    assert auto.turns["bad"] > 1  # tried more than once
    assert took < 1.02 * needed


def test_it_comes_back_when_acceptance_does(target):
    """A drafter that is right, then wrong for a while, then right: found out both times."""

    class Moody(SequentialDrafter):
        wrong = False

        def propose(self, state, n=None):
            draft = super().propose(state, n)
            if self.wrong:
                draft.tokens[:, 1:] = (draft.tokens[:, 1:] + 1) % 61
            return draft

    moody = Moody(target, 3)
    decoder = decoder_of(target, {"moody": moody}, {"autoregressive": 1.0, "moody": 1.5})
    shares = []
    for moody.wrong in (False, True, False):
        steps = {}
        for _ in range(2):
            steps = steps_of(decoder)
        shares.append(steps.get("moody", 0) / sum(steps.values()))
    assert shares[0] > 0.9 and shares[1] < 0.2 and shares[2] > 0.9


def test_what_is_missed_is_fed_in_one_chunk(target, monkeypatch):
    """A drafter that was idle for 30 tokens gets them at once, from where it was, and agrees as before."""
    fed = []
    whole = SequentialDrafter.prefill

    def watched(self, state, row, tokens, start):
        fed.append((start, len(tokens)))
        whole(self, state, row, tokens, start)

    monkeypatch.setattr(SequentialDrafter, "prefill", watched)
    costs = {"autoregressive": 1.0, "same": 1.0}
    decoder = decoder_of(target, {"same": SequentialDrafter(target, 3)}, costs)
    auto, order = decoder.drafter, iter([("same", 3), ("autoregressive", 30), ("same", 99)])
    auto.rates = dict.fromkeys(auto.drafters, 1.0)

    def choose(state):
        name, auto.TRIAL = next(order)
        return name, True

    auto.choose = choose
    accepted = []
    for emissions in decoder.run(PROMPTS[:1], 100):
        accepted += [(e.draft.drafter, e.accepted) for e in emissions if e.draft is not None]
    assert all(count == 3 for name, count in accepted[:-1] if name == "same")
    assert [start for start, _ in fed] == [0, 5 + 12]  # a prompt of 5, then three steps of 4 tokens
    assert fed[1][1] == 5 + 12 + 30


def test_lookup_looks_back():
    """Its rate is what it would have been in the last tokens: high where a text has begun to repeat."""
    drafter = LookupDrafter(None)
    drafter.pace = Pace()
    drafter.set_costs({1: 1.0, 4: 1.5, 8: 2.0})
    drafter.indices = {}
    fresh = torch.randperm(200)[None]
    loop = torch.arange(10).repeat(20)[None]
    rates = []
    for tokens in (fresh, loop):
        state = State.allocate(1, 200, 0, torch.zeros(()))
        state.tokens.copy_(tokens)
        state.length.fill_(150)
        state.active.fill_(True)
        rates.append((drafter.rate(state), drafter.size))
    assert rates == [(pytest.approx(1.0), 4), (pytest.approx(4.0), 8)]


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_an_index_finds_what_searching_finds(ngram):
    """The slow twin of the index, at every place of a text that repeats itself here and there; then another
    text, and one that goes back."""
    generator = torch.Generator().manual_seed(ngram)
    index, count = TextIndex(ngram), 7
    for text in (torch.randint(6, (120,), generator=generator) for _ in range(2)):
        for end in (1, 2, 40, 41, 120, 60, 90):
            index.follow(text[:end].tolist())
            places = torch.arange(end)
            row = torch.nn.functional.pad(text[:end], (0, count + 1), value=-1)
            drafted, found = find_repetition(row.expand(end, -1), places, ngram, count)
            assert [place >= 0 for place in index.repeats] == found.tolist()
            for place in range(end - count):
                if found[place]:
                    said = text[place + 1 : place + 1 + count]
                    expected = int((drafted[place, 1:] == said).long().cumprod(dim=0).sum())
                    assert index.accepted(place, count) == expected


@pytest.mark.parametrize("n", [2, 4, 8])
def test_hindsight_equals_asking_then(target, n):
    """The slow twin: go back, and propose step by step."""
    drafter = LookupDrafter(None)
    decoder = Decoder(target, drafter, Sampling(), 256, compile=False)
    costs = {1: 1.0, 4: 1.3, 8: 1.9}
    drafter.set_costs(costs)
    list(decoder.run([n * [3, 4, 5, 6]], 150))
    state = decoder.state
    state.active.fill_(True)
    end, text = int(state.length), state.tokens[0].tolist()
    first = end - 7 - (drafter.LOOKBACK - 1)
    rates = {}
    for size in (4, 8):
        place, seconds = first, 0.0
        while place < first + drafter.LOOKBACK:
            state.length.fill_(place)
            draft = drafter.propose(state, 8)
            found = bool((draft.parent[0] >= 0).any())
            pairs = zip(draft.tokens[0, 1:size].tolist(), text[place + 1 :])
            kept = next((i for i, (ours, said) in enumerate(pairs) if ours != said), size - 1) if found else 0
            seconds += costs[size if found else 1]
            place += 1 + kept
        rates[size] = (place - first) / seconds
    state.length.fill_(end)
    assert drafter.rate(state) == pytest.approx(max(rates.values()))
    assert drafter.size == max(rates, key=rates.get)


def test_in_a_batch_one_draft_makes_all_rows_longer():
    """Two texts, one of which repeats itself: every step costs what a draft costs, if it yields little."""
    drafter = LookupDrafter(None)
    drafter.pace, drafter.indices = Pace(), {}
    drafter.set_costs({1: 1.0, 4: 1.5, 8: 2.0})
    state = State.allocate(2, 200, 0, torch.zeros(()))
    state.tokens.copy_(torch.stack((torch.randperm(200), torch.arange(10).repeat(20))))
    state.length.fill_(150)
    state.active.fill_(True)
    steps, drafts = 24 + 3, 3  # 24 tokens of the one, alone; as many of the other, eight at a time
    nobody = (1 - drafts / steps) ** 2
    assert drafter.rate(state) == pytest.approx(48 / steps / (nobody * 1.0 + (1 - nobody) * 2.0))
    state.active[0] = False
    assert drafter.rate(state) == pytest.approx(4.0)


def test_expected_acceptance_follows_what_happens():
    pace = Pace()
    assert pace.expected(2) == pytest.approx(2 / 3 + 4 / 9)
    for i in range(3000):
        pace.count_accepted((0, 2, 3, 3)[i % 4], 3)  # 3/4 have one, of these all two, of these 2/3 three
    assert [pace.expected(depth) for depth in (1, 2, 3)] == pytest.approx([0.75, 1.5, 2.0], abs=0.03)
    assert pace.expected(4) == pytest.approx(pace.expected(3) + 0.5 * 2 / 3, abs=0.03)  # never tried


def test_chains_have_the_length_that_pays(target):
    """Of 1, 3 and 7 tokens, by what steps cost and how much of drafts is accepted."""
    for drafter_model, costs, expected in (
        (target, {2: 1.0, 4: 1.1, 8: 1.2}, 8),
        (target, {2: 1.0, 4: 2.5, 8: 9.0}, 2),
        (random_model(seed=1), {2: 1.0, 4: 1.1, 8: 1.2}, 2),
    ):
        drafter, stats = SequentialDrafter(drafter_model, None), Stats()
        decoder = Decoder(target, drafter, Sampling(), 256, compile=False)
        drafter.set_costs(costs)
        list(decoder.run(PROMPTS, 150, stats=stats))
        assert stats.nodes_histogram[expected] > 0.8 * stats.target_forwards


def test_costs_are_measured_once(target):
    """All of them, by name and size; what is known already is not measured again."""
    drafters = {"lookup": LookupDrafter(None), "tree": TreeDrafter(guessing_head(target), None, 3, 3)}
    decoder, costs = Decoder(target, AutoDrafter(drafters), Sampling(), 128, compile=False), {"tree 8": 77.0}
    decoder.warm_up(costs)
    assert set(costs) == {"autoregressive 1", "lookup 1", "lookup 4", "lookup 8"} | {
        f"tree {n}" for n in (4, 8, 16)
    }
    assert costs["tree 8"] == 77.0 and all(0 < seconds < 10 for seconds in costs.values() if seconds != 77.0)
    assert decoder.drafter.drafters["tree"].pace.seconds[8] == 77.0


def test_corrected_costs_keep_the_estimate_of_the_past():
    pace = Pace({1: 1.0})
    pace.count(3.0, 1)
    pace.correct(2.0)
    assert pace.seconds == {1: 2.0} and pace.rate == 1.5


def test_costs_that_were_wrong_are_corrected(target):
    """By what steps take in turns that follow each other; a hiccup counts for little."""
    auto = Decoder(target, AutoDrafter({"same": SequentialDrafter(target, 3)}), compile=False).drafter
    pace = auto.drafters["same"].pace
    for _ in range(60):
        for auto.current, seconds in (("autoregressive", 1.0), ("same", 3.0)):
            auto.turn_estimate = (
                auto.drafters[auto.current].pace.seconds.get(4, 0.0)
                or (auto.drafters[auto.current].pace.seconds[1])
            )
            auto.turn_seconds, auto.steps = seconds, 6
            auto.compare()
            assert auto.steps == 0  # a turn has ended, whatever interrupts what comes next
    ratio = pace.seconds[4] / auto.drafters["autoregressive"].pace.seconds[1]
    assert ratio == pytest.approx(3.0, rel=0.05)
    before = pace.seconds[4]
    auto.turn_estimate, auto.turn_seconds = before, 1e6
    auto.previous = "autoregressive"
    auto.compare()
    assert pace.seconds[4] < 1.1 * before


def test_short_drafts_do_not_stay_short():
    """What was bad at a depth that is not tried any more is forgotten."""
    pace = Pace()
    for _ in range(300):
        pace.count_accepted(1, 7)
    assert pace.expected(7) - pace.expected(1) < 0.05
    for _ in range(300):
        pace.count_accepted(1, 1)
    assert pace.expected(3) == pytest.approx(1 + 2 / 3 + 4 / 9, abs=0.05)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_inside_a_hierarchy(target, batch_size):
    """Its rows come and go between two drafts, and its deepest draft is not its widest."""
    noisy = noisy_copy(target)
    inner = AutoDrafter(
        {
            "lookup": LookupDrafter(None),
            "same": SequentialDrafter(noisy, 3),
            "tree": TreeDrafter(guessing_head(noisy), 16, 3, 3),
        }
    )
    expected = texts(target, PROMPTS)
    stats = Stats()
    drafter = HierarchicalDrafter(noisy, inner, 4)
    assert texts(target, PROMPTS, drafter, batch_size=batch_size, stats=stats) == expected
    mine = [inner.known[inner.current][row] for row in range(batch_size)]
    assert all(known == ALL for known in mine)


def test_two_heads_that_read_different_features_are_refused(target):
    heads = [TreeDrafter(guessing_head(target)) for _ in range(2)]
    heads[1].taps = lambda layers: (0, 1, 2)
    with pytest.raises(BadInput, match="same features"):
        Decoder(target, AutoDrafter({"one": heads[0], "two": heads[1]}), compile=False)


def test_a_conversation_goes_on(target):
    """`reuse`: what a second prompt shares with the first is not computed again, by nobody who has it."""
    drafters = {"same": SequentialDrafter(target, 3), "tree": TreeDrafter(guessing_head(target), 8, 3, 3)}
    decoder = decoder_of(target, drafters, {"autoregressive": 1.0, "same": 1.2, "tree": 1.2})
    first = [t for emissions in decoder.run([PROMPTS[2]], 20, reuse=True) for t in emissions[0].tokens]
    for cut in (0, 7):
        prompt = PROMPTS[2] + first[: len(first) - cut] + [11, 12]
        [expected] = texts(target, [prompt], max_new_tokens=40)
        assert [t for e in decoder.run([prompt], 40, reuse=True) for t in e[0].tokens] == expected


# ---- the command line -----------------------------------------------------------------------------


def run(monkeypatch, capsys, *flags: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", StringIO(""))
    status = command.main(["--compile", "none", "--max_new_tokens", "30", *flags])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("precision, more", [("bf16", []), ("w4a16", ["qspec"])])
def test_auto_on_the_shipped_models(monkeypatch, capsys, tmp_path, precision, more):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ("--precision", precision, "--json", "--temperature", "0.7")
    status, out, err = run(monkeypatch, capsys, "--method", "auto", "--explain", *flags)
    result = json.loads(out)
    assert status == 0 and result["method"] == "auto"
    assert sum(result["stats"]["steps_by_drafter"].values()) == result["stats"]["target_forwards"]
    assert "on trial; tokens/s by costs" in err
    for name in ("autoregressive", "lookup", "sequential", "tree", *more):
        assert f"{name} " in err
    [file] = (tmp_path / "gpt_spec").glob("costs-*.json")
    before = file.read_text()
    _, plain, _ = run(monkeypatch, capsys, "--method", "autoregressive", *flags)
    assert json.loads(plain)["outputs"] == result["outputs"]
    run(monkeypatch, capsys, "--method", "auto", *flags)
    assert file.read_text() == before  # not measured again
    for damaged in ("no JSON", "[]", '{"tree 8": null}', '{"tree 8": -1.0}', '{"tree 8": NaN}'):
        file.write_text(damaged)
        assert command.read_costs(file) == {}
    assert run(monkeypatch, capsys, "--method", "auto", *flags)[0] == 0
    assert set(json.loads(file.read_text())) == set(json.loads(before))


def test_whose_head_it_is(monkeypatch):
    """By its hidden size: the target's, or the small model's, which makes a hierarchy."""

    def names(*flags):
        args = command.build_parser().parse_args(["--method", "auto", *flags])
        return command.available_methods(args, command.load_target(args))

    assert names() == ["lookup", "sequential", "tree"]
    assert names("--checkpoint_path", "models/python-7m") == ["lookup"]
    small, small_head = ["--draft_checkpoint_path", str(SHIPPED_SMALL)], f"{SHIPPED_SMALL}-eagle"
    assert names(*small, "--eagle_checkpoint_path", str(SHIPPED_HEAD)) == ["lookup", "sequential", "tree"]
    assert names(*small, "--eagle_checkpoint_path", small_head) == ["lookup", "sequential", "hierarchical"]
    assert names("--eagle_checkpoint_path", small_head) == ["lookup", "sequential", "hierarchical"]
    own = ["--precision", "w4a16", "--draft_checkpoint_path", "self"]
    assert names(*own) == ["lookup", "tree", "hierarchical", "qspec"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--draft_confidence", "0.5"], "--draft_confidence"),
        (["--draft_precision", "w4a8"], "--draft_precision"),
        (["--eagle_checkpoint_path", "nowhere"], "--eagle_checkpoint_path"),
        (["--min_draft_length", "3"], "--min_draft_length"),
        (["--checkpoint_path", str(SHIPPED_SMALL), "--tree_depth", "3"], "--tree_depth"),
    ],
)
def test_bad_flags(monkeypatch, capsys, flags, words):
    status, out, err = run(monkeypatch, capsys, "--method", "auto", *flags)
    assert status == 2 and out == "" and words in err and len(err.splitlines()) == 1


def test_a_twin_shares_all_weights():
    """`auto` with qspec in it holds no second copy: the memory is that of the target."""
    target = command.load_model(command.SHIPPED_TARGET, "w4a16")
    auto = AutoDrafter({"qspec": SequentialDrafter(share_weights(target, "w4a8"), None, shares_cache=True)})
    assert command.weight_bytes([target, *auto.models]) == command.weight_bytes([target])
