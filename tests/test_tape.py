"""Tapes (tape.py): recorded operator calls give what the function itself gives, step after step."""

import pytest
import torch
from conftest import SHIPPED_TARGET

import kernels
from generate import load_model
from gpt_spec import Decoder, LookupDrafter
from runtime import Runtime, Taped, key_of
from sampling import Sampling
from tape import Recorder, Tape, is_recording, without_constants, without_unused

pytestmark = pytest.mark.skipif(not kernels.load(), reason="tapes are part of the CPU kernels")


class Counter:
    """A function with a state, lists of tensors, numbers for tensors, views, constants and empty lists."""

    def __init__(self):
        self.state, self.length = torch.arange(4.0), torch.tensor([2])

    def __call__(self, x, y):
        row = torch.arange(4)[None] + x.unsqueeze(0)  # [1, 4]
        both = torch.cat([row, row, torch.arange(4)[None].expand(1, -1)])  # [3, 4]
        left, right = both.split(2, dim=1)
        self.state[self.length] = x.float()[:1]
        self.state.add_(1)
        self.length.copy_((self.length + 1) % 4)
        made = torch.zeros(3)
        made[0] = y.sum()  # a constant that is written to is none
        chosen = torch.where(row > 3, row, 0).clone(memory_format=torch.contiguous_format)
        return (left * 2).amax(dim=[]), right, self.state[1:], self.state, made, x, torch.ones(2), chosen


def test_a_tape_is_the_function_step_after_step():
    function, taped = Counter(), Counter()
    tape, results = Tape.record(taped, torch.arange(4), torch.ones(2))
    expected = function(torch.arange(4), torch.ones(2))
    for _ in range(5):
        assert len(results) == len(expected)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, expected))
        x, y = torch.randint(9, (4,)), torch.randn(2)
        results, expected = tape.run((x, y)), function(x, y)


def test_what_it_returns_is_the_callers_own():
    tape, _ = Tape.record(Counter(), torch.arange(4), torch.ones(2))
    first = tape.run((torch.arange(4), torch.ones(2)))
    for tensor in (first[1], first[4], first[6], first[7]):
        tensor.fill_(7)
    second = tape.run((torch.arange(4), torch.ones(2)))
    assert second[6].tolist() == [1, 1] and second[4].tolist() == [2, 0, 0]
    assert second[1].tolist()[0] == [4, 6] and (first[1] == 7).all()


def test_constants_are_made_once():
    """Looks at what stays, and what is made of numbers alone, unless it is written to or handed out."""
    state = torch.zeros(4)

    def function(x):
        written = torch.zeros(4)
        written.add_(x)
        return state[1:] + torch.arange(3) + x[1:], written, torch.ones(1)

    x = torch.ones(4)
    with Recorder() as recorder:
        results = function(x)
    kept = [call.op.overloadpacket.__name__ for call in without_constants(recorder.calls, [x], results)]
    kept = [name for name in kept if name != "detach"]  # which PyTorch adds behind what makes a tensor
    assert kept == ["zeros", "add_", "add", "slice", "add", "ones"]


def test_what_nobody_needs_is_not_made_again():
    """What a change needs stays, and so does the random number that moves the generator on."""
    state = torch.zeros(4)

    def function(x):
        state[1:].add_(x.exp()[1:])
        x.sin().cos()
        torch.rand(1)
        return (x.neg(),)

    x = torch.ones(4)
    with Recorder() as recorder:
        results = function(x)
    kept = [call.op.overloadpacket.__name__ for call in without_unused(recorder.calls, results)]
    assert kept == ["slice", "exp", "slice", "add_", "rand", "neg"]


@pytest.fixture(scope="module")
def count_threads():
    """An operator that says how many threads PyTorch's operators have where it is called."""
    library = torch.library.Library("gpt_spec_test", "DEF")
    library.define("count_threads(Tensor x) -> Tensor")
    library.impl("count_threads", lambda x: torch.tensor([torch.get_num_threads()]), "CPU")
    yield torch.ops.gpt_spec_test.count_threads
    library._destroy()


@pytest.mark.parametrize("ours, inside", [(True, 1), (False, 3)])
def test_pytorch_is_alone_in_a_tape_with_our_linears(count_threads, ours, inside):
    """It has one thread there, and all of them again behind it, also if the tape ends by an error."""
    weight, x = kernels.pack(torch.randn(64, 32).bfloat16()), torch.ones(2, 32).bfloat16()

    def function(x):
        y = kernels.linear(x, weight, out_features=64) if ours else x.neg()
        return count_threads(x), y

    tape, _ = Tape.record(function, x)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert tape.run((x,))[0].item() == inside and torch.get_num_threads() == 3
        if ours:
            with pytest.raises(RuntimeError, match="bfloat16"):
                tape.run((x.float(),))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: torch.equal(x, x)]
)
def test_a_function_that_reads_a_tensor_in_python_is_refused(read):
    with pytest.raises(RuntimeError, match="reads a tensor in Python"):
        Tape.record(lambda x: (x * read(x),), torch.ones(3))


@pytest.mark.parametrize("change", [lambda t, x: t.add_(x), lambda t, x: t])
def test_a_constant_that_would_change_is_refused(change):
    """`torch.tensor` is not an operator: in a tape it is made once."""
    with pytest.raises(RuntimeError, match="do not change or return it"):
        Tape.record(lambda x: (change(torch.tensor([0.0]), x),), torch.ones(1))


def test_noise_of_torch_is_drawn_anew():
    tape, first = Tape.record(lambda x: (x + torch.rand(3),), torch.zeros(3))
    assert not torch.equal(tape.run((torch.zeros(3),))[0], first[0])


def test_an_error_of_an_operator_comes_through_and_loses_nothing():
    tape, _ = Tape.record(lambda x, i: (x[i],), torch.arange(3), torch.tensor([0]))
    with pytest.raises(IndexError):
        tape.run((torch.arange(3), torch.tensor([7])))
    assert tape.run((torch.arange(3), torch.tensor([2])))[0].tolist() == [2]


def test_one_tape_for_each_set_of_shapes_and_none_inside_another():
    calls = []

    def inner(x, n):
        calls.append(is_recording())
        return (x * n,)

    taped = Taped(inner)
    outer = Taped(lambda x: (taped(x, 3)[0] + 1,))
    for x in (torch.ones(2), torch.zeros(2), torch.ones(5)):
        assert torch.equal(outer(x)[0], x * 3 + 1) and torch.equal(taped(x, 2)[0], x * 2)
    assert calls == [True] * 4 and len(outer.tapes) == len(taped.tapes) == 2


def test_what_a_recording_is_for():
    """Shapes, dtypes, strides, numbers and their types, and which tensors are one and the same."""
    x, y = torch.ones(3, 3), torch.ones(3, 3)
    different = [
        (x, y),
        (x, x),
        (x, y.int()),
        (x, torch.ones(3, 2)),
        (x, y[:2].T),
        (x, 1),
        (x, True),
        (x, (3, 3)),
    ]
    assert len(set(map(key_of, different))) == len(different)
    assert key_of((x, y)) == key_of((torch.zeros(3, 3), x))


def test_an_interrupted_recording_is_forgotten():
    def function(x):
        raise KeyboardInterrupt

    taped = Taped(function)
    with pytest.raises(KeyboardInterrupt):
        taped(torch.ones(1))
    assert not taped.tapes and not is_recording()


def test_decoding_runs_from_tapes_and_records_no_more_after_the_warm_up():
    target = load_model(SHIPPED_TARGET, precision="w4a8")
    decoder = Decoder(target, LookupDrafter(4), Sampling(), 128)
    decoder.warm_up()
    tapes = [run.tapes for run in decoder.verifications.values()]
    before = [dict(each) for each in tapes]
    assert isinstance(decoder.setup.runtime, Runtime) and all(len(each) == 1 for each in tapes)
    for _ in decoder.run([[1, 310, 867, 310, 867]], 40):
        pass
    assert [run.tapes for run in decoder.verifications.values()] == before
