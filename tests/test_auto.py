"""`--method auto`: costs and acceptance choose the drafter; what the others miss is fed to them later.

That texts and caches are right, whichever is in charge, is tested with all other drafters, in
test_decoding.py."""

import json
import sys
from io import BytesIO, TextIOWrapper

import pytest
import torch
from conftest import (
    SHIPPED_HEAD,
    SHIPPED_SMALL,
    find_repetition,
    guessing_block_head,
    guessing_head,
    noisy_copy,
    random_model,
    random_prompts,
    texts,
)

import generate as command
from auto import ALL, AdaptiveLookup, AutoDrafter, ReplayIndex
from costs import Acceptance, Clock, Pace, Stats, set_costs
from dflash import BlockDrafter
from drafts import Drafter, State
from eagle import TreeDrafter
from gpt_spec import Decoder, HierarchicalDrafter, SequentialDrafter
from model import causal_attention
from packing import share_weights
from sampling import Sampling

PROMPTS = random_prompts([5, 1, 17, 9, 30])


def decoder_of(target, drafters: dict[str, Drafter], costs: dict[str, float], batch_size: int = 1) -> Decoder:
    """A decoder that chooses among drafters, whose steps are thought to cost so much each; and do not change
    their minds about it, as time in a test means nothing."""
    auto = AutoDrafter(drafters)
    auto.needs_costs = False
    decoder = Decoder(target, auto, Sampling(), 256, batch_size, compile=False)
    for name, drafter in auto.drafters.items():
        set_costs(drafter, dict.fromkeys(drafter.draft_sizes(), costs[name]))
        drafter.pace.correct = lambda nodes, seconds: None
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
    decoder.drafter.spent = 6 * 5.0 / AutoDrafter.CURIOSITY
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

    auto.choose_drafter = choose
    accepted = []
    for emissions in decoder.run(PROMPTS[:1], 100):
        accepted += [(e.draft.drafter, e.accepted) for e in emissions if e.draft is not None]
    assert all(count == 3 for name, count in accepted[:-1] if name == "same")
    assert [start for start, _ in fed] == [0, 5 + 12]  # a prompt of 5, then three steps of 4 tokens
    assert fed[1][1] == 5 + 12 + 30


def lookup_on(*texts: torch.Tensor, costs: dict[int, float], lucky: int = 0) -> tuple[AdaptiveLookup, State]:
    """A drafter of which so many drafts were accepted, and rows with 151 tokens each."""
    drafter = AdaptiveLookup()
    drafter.pace = Pace()
    drafter.indices = [ReplayIndex(drafter.ngram) for _ in texts]
    drafter.acceptance = [Acceptance() for _ in range(drafter.ngram + 1)]
    drafter.replayed = dict.fromkeys(drafter.FADES, (0.0, 0.0))
    set_costs(drafter, costs)
    for each in drafter.acceptance * lucky:
        each.count(15, 15)
    state = State.allocate(len(texts), 200, 0, torch.zeros(()))
    state.tokens.copy_(torch.stack(texts))
    state.length.fill_(150)
    state.active.fill_(True)
    return drafter, state


FRESH, LOOP = torch.randperm(200), torch.arange(10).repeat(20)
COSTS = {1: 1.0, 4: 1.5, 8: 2.0, 16: 4.0}


def rate_after(drafter: AdaptiveLookup, state: State, tokens: int) -> float:
    """The texts gain tokens one by one, from whichever drafter."""
    drafter.rate(state)
    for _ in range(tokens):
        state.length += 1
        drafter.update(state)
    return drafter.rate(state)


def test_lookup_looks_back():
    """Its rate is what it would have been had it drafted: high where a text repeats itself."""
    drafter, state = lookup_on(FRESH, costs=COSTS)
    assert rate_after(drafter, state, 40) == pytest.approx(1.0)
    drafter, state = lookup_on(LOOP, costs=COSTS, lucky=100)
    assert rate_after(drafter, state, 40) == pytest.approx(4.0)  # 8 tokens for 2.0, or 16 for 4.0


def test_in_a_batch_one_draft_makes_all_rows_longer():
    """What pays for a text that repeats itself does not if seven others wait for it."""
    for others, least, most in ((0, 8, 16), (7, 1, 1)):
        drafter, state = lookup_on(LOOP, *others * [FRESH], costs=COSTS, lucky=100)
        draft = drafter.propose(state)
        assert least <= draft.tokens.shape[1] <= most
    before = drafter.pace.rate
    assert rate_after(drafter, state, 40) == before  # what they would have shared cannot be told


def test_a_mood_passes_but_what_lasts_counts():
    """Where a text has stopped repeating itself, it is known that it used to."""
    text = torch.cat((torch.arange(10).repeat(30), 100 + torch.randperm(60)))
    drafter, state = lookup_on(text[:200], costs=COSTS, lucky=100)
    state.tokens = text[None]
    in_a_loop = rate_after(drafter, state, 130)
    later = rate_after(drafter, state, 60)
    [late, long] = (tokens / costs for tokens, costs in drafter.replayed.values())
    assert in_a_loop == pytest.approx(4.0, rel=0.05) and late < 2 < later == long < in_a_loop


def test_lookup_learns_what_to_make_of_a_repetition():
    """Where one token agrees with one before, anything follows; where six agree, the same: it drafts only
    there. Also while another drafter is in charge."""
    generator = torch.Generator().manual_seed(5)
    noise, phrase = torch.randint(30, (4000,), generator=generator), torch.arange(30, 60)
    text = torch.cat([torch.cat((phrase, noise[i : i + 30])) for i in range(0, 3000, 30)])
    drafter, state = lookup_on(text[:200], costs=COSTS)
    state.tokens = text[None]
    for length in range(400, 5000):  # one token after another: not what a draft of its own would bring
        state.length.fill_(length)
        drafter.update(state)
    few, many = drafter.acceptance[1], drafter.acceptance[6]
    assert few.kept[0] / few.tried[0] < 0.3 and many.kept[0] / many.tried[0] > 0.6
    sizes = {}
    for offset in (12, 50):
        state.length.fill_(60 * 80 + offset)
        draft = drafter.propose(state)
        sizes[offset] = draft.tokens.shape[1]
    assert sizes[12] >= 8 and sizes[50] == 1


@pytest.mark.parametrize("ngram", [1, 2, 3, 6])
def test_an_index_finds_what_searching_finds(ngram):
    """The slow twin of the index, at every place of a text that repeats itself here and there; then another
    text, and one that goes back."""
    generator = torch.Generator().manual_seed(ngram)
    index, count = ReplayIndex(ngram), 7
    for text in (torch.randint(6, (120,), generator=generator) for _ in range(2)):
        for end in (1, 2, 40, 41, 120, 60, 90):
            index.update(text[:end].tolist())
            places = torch.arange(end)
            row = torch.nn.functional.pad(text[:end], (0, count + 1), value=-1)
            drafted, found = find_repetition(row.expand(end, -1), places, ngram, count)
            assert [place >= 0 for place in index.repeats] == found.tolist()
            assert [agree > 0 for agree in index.agree] == found.tolist()
            for place in range(end):
                if found[place]:
                    assert index.guess(count, place) == drafted[place, 1:].tolist()
                    last, agree = index.repeats[place], index.agree[place]
                    assert text[last + 1 - agree : last + 1].equal(text[place + 1 - agree : place + 1])
            for place in range(end - count):
                if found[place]:
                    said = text[place + 1 : place + 1 + count]
                    expected = int((drafted[place, 1:] == said).long().cumprod(dim=0).sum())
                    assert index.accepted(place, count) == expected


def test_hindsight_equals_drafting(target):
    """What it would have done while another one drafted is what it does: drafts of the same sizes at the
    same places."""
    prompt, replayed, drafted = 10 * [3, 4, 5, 6], [], []

    class Lookup(AdaptiveLookup):
        def start(self, level):
            super().start(level)
            self.pace.start(COSTS, {1: 0})
            self.pace.count = lambda tokens, nodes, seconds: None  # cost and rate stay
            self.acceptance = [Frozen() for _ in self.acceptance]

        def choose_size(self, agree):
            replayed.append((self.indices[0].place, super().choose_size(agree)))
            return replayed[-1][1]

    class Watched(Drafter):
        """Drafts nothing, and has another one look on."""

        def start(self, level):
            super().start(level)
            self.other = Lookup()
            self.other.start(level)

        def propose(self, state, n=None):
            self.other.update(state)
            return super().propose(state)

    lookup = Lookup()
    lookup.needs_costs = False
    decoder, length = Decoder(target, lookup, Sampling(), 256, compile=False), len(prompt)
    for [emission] in decoder.run([prompt], 150):
        if emission.draft is not None:
            drafted.append((length, emission.draft.tokens.shape[1]))
            length += len(emission.tokens)
    replayed.clear()
    list(Decoder(target, Watched(), Sampling(), 256, compile=False).run([prompt], 150))
    assert len(replayed) > 10 and replayed == drafted[: len(replayed)]
    assert len({n for _, n in replayed}) > 1


class Frozen(Acceptance):
    """Does not learn any more: three of four."""

    def __init__(self):
        super().__init__()
        self.kept = [0.75 * tried for tried in self.tried]

    def count(self, accepted: int, drafted: int) -> None:
        pass


def test_expected_acceptance_follows_what_happens():
    acceptance = Acceptance()
    assert acceptance.expected(0) == 0 and acceptance.expected(2) == pytest.approx(2 / 3 + 4 / 9)
    for i in range(3000):
        acceptance.count((0, 2, 3, 3)[i % 4], 3)  # 3/4 have one, of these all two, of these 2/3 three
    lengths = [acceptance.expected(depth) for depth in (1, 2, 3)]
    assert lengths == pytest.approx([0.75, 1.5, 2.0], abs=0.03)
    assert acceptance.expected(4) == pytest.approx(lengths[2] + 0.5 * 2 / 3, abs=0.03)  # never tried


def test_chains_have_the_length_that_pays(target):
    """Of 1, 3 and 7 tokens, by what steps cost and how much of drafts is accepted."""
    for drafter_model, costs, expected in (
        (target, {2: 1.0, 4: 1.1, 8: 1.2}, 8),
        (target, {2: 1.0, 4: 2.5, 8: 9.0}, 2),
        (random_model(seed=1), {2: 1.0, 4: 1.1, 8: 1.2}, 2),
    ):
        drafter, stats = SequentialDrafter(drafter_model, None), Stats()
        decoder = Decoder(target, drafter, Sampling(), 256, compile=False)
        set_costs(drafter, costs)
        drafter.pace.correct = lambda nodes, seconds: None
        list(decoder.run(PROMPTS, 150, stats=stats))
        assert stats.nodes_histogram[expected] > 0.8 * stats.target_forwards


def test_costs_are_measured_once(target):
    """All of them, by name and size; what is known already is not measured again."""
    drafters = {"lookup": AdaptiveLookup(), "tree": TreeDrafter(guessing_head(target), None, 3, 3)}
    decoder, costs = Decoder(target, AutoDrafter(drafters), Sampling(), 128, compile=False), {"tree 8": 77.0}
    decoder.warm_up(costs)
    assert set(costs) == {"autoregressive 1", "lookup 1", "lookup 4", "lookup 8", "lookup 16"} | {
        f"tree {n}" for n in (2, 4, 8, 16)
    }
    assert costs["tree 8"] == 77.0 and all(0 < seconds < 10 for seconds in costs.values() if seconds != 77.0)
    assert decoder.drafter.drafters["tree"].pace.seconds[8] == 77.0


def test_costs_that_were_wrong_are_corrected():
    """By what steps take next to those of others; whether the machine is slow, and a hiccup, count for
    little."""
    clock = Clock()
    ours, theirs = Pace({1: 1.0}, clock), Pace({4: 1.0, 8: 1.0}, clock)
    for i in range(3000):
        slow = 2.0 if i % 200 < 100 else 1.0
        for pace, nodes, seconds in ((ours, 1, 1.0), (theirs, 4, 3.0), (theirs, 8, 5.0)):
            pace.count(1.0, nodes, slow * seconds)
    assert theirs.seconds[4] / ours.seconds[1] == pytest.approx(3.0, rel=0.1)
    assert theirs.seconds[8] / ours.seconds[1] == pytest.approx(5.0, rel=0.1)
    before = theirs.seconds[4]
    theirs.count(1.0, 4, 1e6)
    assert theirs.seconds[4] < 1.1 * before


def test_a_slow_machine_is_nobodys_fault():
    """All that runs takes twice the time: a drafter that does not run must not look cheap for it."""
    clock = Clock()
    one, two, idle = Pace({4: 1.0}, clock), Pace({4: 1.0}, clock), Pace({4: 1.0}, clock)
    for turn in range(300):
        slow = 2.0 if turn % 20 < 10 else 1.0
        for _ in range(8):
            (one, two)[turn % 2].count(1.0, 4, slow)
    assert 0.7 < one.seconds[4] < 1.4 and 0.7 < two.seconds[4] < 1.4 and idle.seconds[4] == 1.0


def test_hiccups_do_not_make_costs_drift():
    """One step of fifty takes ten times as long: those that run keep what they cost against one that does
    not."""
    clock, generator = Clock(), torch.Generator().manual_seed(1)
    paces = [Pace({4: 1.0}, clock) for _ in range(3)]
    for _ in range(6000):
        pace = paces[int(torch.randint(3, (), generator=generator))]
        spike = torch.rand((), generator=generator) < 0.02
        pace.count(1.0, 4, 10.0 if spike else 1.0)
    assert all(0.7 < pace.seconds[4] < 1.4 for pace in paces)


def test_short_drafts_do_not_stay_short():
    """What was bad at a depth that is not tried any more is forgotten."""
    acceptance = Acceptance()
    for _ in range(300):
        acceptance.count(1, 7)
    assert acceptance.expected(7) - acceptance.expected(1) < 0.05
    for _ in range(300):
        acceptance.count(1, 1)
    assert acceptance.expected(3) == pytest.approx(1 + 2 / 3 + 4 / 9, abs=0.05)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_inside_a_hierarchy(target, batch_size):
    """Its rows come and go between two drafts, and its deepest draft is not its widest."""
    noisy = noisy_copy(target)
    inner = AutoDrafter(
        {
            "lookup": AdaptiveLookup(),
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


@torch.no_grad()
def test_heads_that_read_different_features_get_their_own(target):
    """Two read the same, which is kept once; the third reads other ones, in a part of its own."""
    drafters = {name: TreeDrafter(guessing_head(target), 8, 3, 3) for name in ("one", "same")}
    drafters["blocks"] = BlockDrafter(guessing_block_head(target, True), 8)
    decoder = decoder_of(target, drafters, {"autoregressive": 1.0, **dict.fromkeys(drafters, 1.2)})
    assert decoder.taps == (2, 1, 1)
    said = [token for emissions in decoder.run([PROMPTS[2]], 20) for token in emissions[0].tokens]
    text = torch.tensor([PROMPTS[2] + said])
    for name, drafter in drafters.items():
        positions = torch.arange(text.shape[1])[None]
        features = target(text, positions, causal_attention, drafter.taps(2))[1][0]
        length = int(decoder.state.length[0])
        ours = decoder.drafter.views[name].features[0, :length]
        torch.testing.assert_close(ours, features[:length], rtol=1e-4, atol=1e-5)


def test_a_conversation_goes_on(target):
    """`reuse`: what a second prompt shares with the first is not computed again."""
    drafters = {"same": SequentialDrafter(target, 3), "tree": TreeDrafter(guessing_head(target), 8, 3, 3)}
    decoder = decoder_of(target, drafters, {"autoregressive": 1.0, "same": 1.2, "tree": 1.2})
    first = [t for emissions in decoder.run([PROMPTS[2]], 20, reuse=True) for t in emissions[0].tokens]
    for cut in (0, 7):
        prompt = PROMPTS[2] + first[: len(first) - cut] + [11, 12]
        [expected] = texts(target, [prompt], max_new_tokens=40)
        assert [t for e in decoder.run([prompt], 40, reuse=True) for t in e[0].tokens] == expected


# ---- the command line -----------------------------------------------------------------------------


def run(monkeypatch, capsys, *flags: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"")))
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
    assert "drafts, " in err and "tokens/s by costs and acceptance: " in err
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
