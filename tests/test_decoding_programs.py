"""Small operators of a recorded step as programs: torch's bits, and no memory used too early again."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

from families import batch, resident
from family_configs import config
from melinoe.decoding import decoder, loop
from melinoe.decoding.compiled_experts import CompiledExperts
from melinoe.decoding.decoder import decoder_of
from melinoe.decoding.groups import growing_slots, written_slots
from melinoe.decoding.operators import native, operators, tiled
from melinoe.decoding.program import Places, Program, Room
from melinoe.decoding.recorded import Call, Read, Slot, map_tensors, tensors_of

pytestmark = pytest.mark.skipif(native() is None, reason="no compiler")
HALF, FLOAT = torch.bfloat16, torch.float32


def program_of(functions, *given):
    """A program of functions, each of what was given and what was made so far; and its recorded tensors."""
    values = {Slot(number): tensor for number, tensor in enumerate(given)}
    real = dict(values)
    calls = []
    for function, *arguments in functions:
        args = map_tensors(tuple(arguments), lambda slot: slot)
        result = function(*map_tensors(args, real.__getitem__))
        slots = [Slot(len(real) + number) for number in range(len(tensors_of(result)))]
        real.update(zip(slots, tensors_of(result), strict=True))
        calls.append(Call(function, args, {}, slots))
    places = Places({**values, **{slot: tensor for slot, tensor in real.items() if slot not in values}})
    found = [(call, operators(call, places.real)) for call in calls]
    assert all(some is not None for _, some in found)
    last = calls[-1].results
    program = Program(found, places, set(last), set(), {}, 0)
    return program, places, last


def run(program, places, given, results):
    blank = [None] * (1 + max(slot.number for slot in places.real))
    room = Room.of(blank, places, [program])
    for number, tensor in enumerate(given):
        room[number] = tensor
    program(room, None)
    return [room[slot.number] for slot in results]


def compare(functions, *given):
    """Whether a program gives torch's results; not a number equals any other such."""
    program, places, results = program_of(functions, *given)
    for found, slot in zip(run(program, places, given, results), results, strict=True):
        expected = places.real[slot]
        whole = torch.int16 if expected.dtype == HALF else torch.int32
        same = found.view(whole) == expected.view(whole)
        assert (found.shape, found.stride()) == (expected.shape, expected.stride())
        assert bool((same | (found.isnan() & expected.isnan())).all()), functions


def every_half():
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(HALF)


def many_floats(seed):
    """Of every exponent, subnormals, infinities and what is not a number among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32).view(FLOAT)


def test_one_argument_of_every_value():
    a, half, single = torch.Tensor, every_half(), many_floats(0)
    for function in (a.neg, a.float, a.clone):
        compare([(function, Slot(0))], half)
        compare([(function, Slot(0))], single)
    compare([(a.pow, Slot(0), 2)], half)
    compare([(a.pow, Slot(0), 2)], single)
    compare([(a.rsqrt, Slot(0))], single)
    compare([(a.to, Slot(0), HALF)], single)
    for scalar in (1e-5, 1.0, 3, 0.1):
        compare([(a.add, Slot(0), scalar)], single)
        compare([(a.mul, Slot(0), scalar)], single)


def test_two_arguments_of_many_values():
    half, single = every_half(), many_floats(1)
    for function in (torch.Tensor.add, torch.Tensor.mul):
        compare([(function, Slot(0), Slot(1))], single, many_floats(2))
        compare([(function, Slot(0), Slot(1))], single, half.repeat(4))
        compare([(function, Slot(0), Slot(1))], half.repeat(4), single)
        for seed in range(8):  # every number with others of its own size, and of all sizes
            other = half[torch.randperm(2**16, generator=torch.Generator().manual_seed(seed))]
            near = (half.view(torch.int16) ^ (seed * 37 + 1)).view(HALF)
            compare([(function, Slot(0), Slot(1))], half, other)
            compare([(function, Slot(0), Slot(1))], half, near)


@pytest.mark.parametrize(
    "size", [16, 17, 63, 64, 96, 127, 128, 192, 1000, 1024, 2048, 2880, 4096, 5120, 7168]
)
def test_the_mean_of_a_row(size):
    for seed in range(4):
        rows = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(seed))
        compare([(torch.Tensor.mean, Slot(0), -1, True)], rows)
        compare([(torch.Tensor.mean, Slot(0), (2,), False)], rows[:, 1:3])
        sizes = 10.0 ** torch.arange(size).remainder(9)
        compare([(torch.Tensor.mean, Slot(0), -1, True)], (rows[:1, :1] * sizes))


@pytest.mark.parametrize("shape", [(1, 192, 32), (1, 256, 60), (2, 1024, 64), (1, 2048, 128)])
def test_a_router_in_the_order_of_tiles(shape):
    count, size_in, size_out = shape
    if not tiled(*shape, torch.get_num_threads(), torch._C._get_mkldnn_enabled()):
        pytest.skip("torch's kernel has another order here")
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows, weight = (torch.randn(n, size_in, generator=generator) for n in (count, size_out))
        scale = 10.0 ** torch.randint(-3, 3, (size_in,), generator=generator)
        rows, weight = (rows * scale).to(HALF), (weight / scale).to(HALF)
        compare([(torch.nn.functional.linear, Slot(0), Slot(1))], rows, weight)
        compare([(torch.nn.functional.linear, Slot(0), Slot(1))], rows, (weight * 1e-38).to(HALF))


def test_a_router_with_another_order_stays_with_torch(monkeypatch):
    call = Call(torch.nn.functional.linear, (Slot(0), Slot(1)), {}, [Slot(2)])
    real = {Slot(0): torch.randn(1, 64).to(HALF), Slot(1): torch.randn(8, 64).to(HALF)}
    expected = tiled(1, 64, 8, torch.get_num_threads(), torch._C._get_mkldnn_enabled())
    assert (operators(call, dict(real)) is not None) == expected
    tiled.cache_clear()
    in_float = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda rows, weight: in_float(rows.float(), weight.float()).to(HALF)
    )
    assert not tiled(1, 192, 32, 1, True)
    tiled.cache_clear()


def test_views_are_addresses_and_layouts_are_kept():
    given = torch.randn(2, 3, 4, 8).to(HALF)
    t = torch.Tensor
    turned = [(t.transpose, Slot(0), 1, 2), (t.mul, Slot(1), Slot(1))]
    compare(turned, given)
    compare([*turned, (t.reshape, Slot(2), 2, 4, 24)], given)
    compare([*turned, (t.contiguous, Slot(2)), (t.chunk, Slot(3), 2, -1), (t.neg, Slot(5))], given)
    compare([(t.__getitem__, Slot(0), (slice(1, 2), Ellipsis, slice(2, 7))), (t.neg, Slot(1))], given)
    halves = [(t.__getitem__, Slot(0), (Ellipsis, slice(at, at + 4))) for at in (0, 4)]
    turning = [*halves, (t.neg, Slot(2)), (torch.cat, (Slot(3), Slot(1)), -1), (t.add, Slot(0), Slot(4))]
    compare(turning, given)
    compare([(t.mul, Slot(0), Slot(1))], given, torch.randn(2, 1, 4, 1))  # broadcast, another dtype
    compare([(t.mul, Slot(0), Slot(1))], torch.randn(3, 8), torch.randn(2, 4, 1, 8).to(HALF))


def test_arguments_that_lie_otherwise_than_recorded():
    given = torch.randn(4, 8), torch.randn(4, 8).to(HALF)
    program, places, results = program_of([(torch.Tensor.mul, Slot(0), Slot(1))], *given)
    assert torch.equal(run(program, places, given, results)[0], given[0] * given[1])
    for seed in range(2):
        others = torch.randn(8, 4).t() + seed, torch.randn(4, 16).to(HALF)[:, ::2]
        assert torch.equal(run(program, places, others, results)[0], others[0] * others[1])


@pytest.mark.parametrize(
    "call",
    [
        (torch.Tensor.add, Slot(0), Slot(1)),  # without dimensions
        (torch.Tensor.mul, Slot(2), 0.5),  # bfloat16 by a scalar
        (torch.Tensor.pow, Slot(0), 3),
        (torch.Tensor.mean, Slot(2), -1),
        (torch.Tensor.mean, Slot(0), 0),
        (torch.Tensor.softmax, Slot(0), -1),
        (torch.nn.functional.dropout, Slot(0), 0.5, True),
        (torch.Tensor.add, Slot(3), 1),
    ],
)
def test_what_is_not_known_stays_with_torch(call):
    real = {
        Slot(0): torch.randn(4, 32), Slot(1): torch.tensor(2.0),
        Slot(2): torch.randn(4, 32).to(HALF), Slot(3): torch.ones(4, dtype=torch.int64),
    }  # fmt: skip
    function, *arguments = call
    state = torch.get_rng_state()
    assert operators(Call(function, tuple(arguments), {}, [Slot(9)]), real) is None
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_written_in_place_is_found():
    def call(function, given, made, **more):
        return Call(function, tuple(map(Slot, given)), more, list(map(Slot, made)))

    t = torch.Tensor
    assert written_slots([call(t.mul, [0, 1], [2]), call(t.contiguous, [2], [2])]) == set()
    assert written_slots([call(t.__itruediv__, [0, 1], [0])]) == {Slot(0)}
    assert written_slots([call(t.clamp_, [3], [3])]) == {Slot(3)}
    assert written_slots([call(t.__setitem__, [4, 5], [])]) == {Slot(4)}
    assert written_slots([call(torch.relu, [6], [6])]) == {Slot(6)}
    assert written_slots([call(torch.add, [0, 1], [7], out=Slot(7))]) >= {Slot(7)}
    items = [Read(0, "keys", Slot(0)), call(torch.cat, [0, 1], [2]), call(torch.relu, [2], [3])]
    assert growing_slots(items) == {Slot(0), Slot(2)}


def model(family="olmoe", dtype=HALF):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(family), dtype=dtype).eval()
    for name, parameter in made.named_parameters():
        if "norm" not in name and parameter.numel() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.requires_grad_(False)


SETTINGS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def programs(one):
    return [step for step in decoder_of(one).steps if isinstance(step, Program)]


def test_logits_of_a_step_outlive_the_next(monkeypatch):
    one, seen = model(), []

    class Logits(decoder.Logits):
        def __init__(self, logits):
            seen.append(logits)
            super().__init__(logits)

    ids = batch(9)["input_ids"][:1]
    expected = one.generate(ids, output_logits=True, return_dict_in_generate=True, **SETTINGS)
    loop.generate(one, ids, **SETTINGS)
    monkeypatch.setattr(decoder, "Logits", Logits)
    loop.generate(one, ids, **SETTINGS)
    assert programs(one) and len(seen) == 11
    for ours, theirs in zip(seen, expected.logits[1:], strict=True):
        assert torch.equal(ours[:, -1].float(), theirs)


def test_two_answers_at_once(monkeypatch):
    one = model()
    prompts = [batch(7 + seed, seed)["input_ids"][:1] for seed in range(3)]
    expected = [one.generate(ids, **SETTINGS) for ids in prompts]
    assert torch.equal(loop.generate(one, prompts[0], **SETTINGS), expected[0])
    found, barrier = {}, threading.Barrier(3)
    run_program = Program.__call__

    def together(self, room, cache):  # every program of the three steps runs side by side
        barrier.wait(20)
        run_program(self, room, cache)

    def work(number):
        found[number] = loop.generate(one, prompts[number], **SETTINGS)

    assert programs(one)
    monkeypatch.setattr(Program, "__call__", together)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(3))


def test_nothing_of_a_step_is_held_on_to():
    one, held = model(), []
    ids = batch(9)["input_ids"][:1]
    for _ in range(2):
        held.clear()
        found = one.generate(ids, return_dict_in_generate=True, **SETTINGS)
        loop.generate(one, ids, **SETTINGS)
        cache = found.past_key_values
        held.append(weakref.ref(cache.layers[0].keys))
        again = loop.generate(one, torch.cat([found.sequences[:, :20]]), past_key_values=cache, **SETTINGS)
        assert again.shape[1] > 20
        del found, cache, again
        gc.collect()
        assert held[0]() is None
    assert programs(one)


def test_nothing_of_the_recorded_step_is_held_on_to(monkeypatch):
    one, held = model(), []
    update = DynamicLayer.update

    def noted(self, key, value, *more, **named):
        keys, values = update(self, key, value, *more, **named)
        with torch._C.DisableTorchFunction():
            held.extend(StorageWeakRef(one.untyped_storage()) for one in (key, value, keys, values))
        return keys, values

    monkeypatch.setattr(DynamicLayer, "update", noted)
    loop.generate(one, batch(9)["input_ids"][:1], **SETTINGS)
    gc.collect()
    assert programs(one) and held and all(memory.expired() for memory in held)


def test_a_program_that_errs_is_not_used(monkeypatch):
    one = model()
    ids = batch(9)["input_ids"][:1]
    expected = one.generate(ids, **SETTINGS)
    monkeypatch.setattr(Program, "computes_as_torch", lambda *_: False)
    assert torch.equal(loop.generate(one, ids, **SETTINGS), expected)
    assert decoder_of(one).replays == 1 and not programs(one)


def test_a_program_with_another_result_is_found(monkeypatch):
    one = model()
    ids = batch(9)["input_ids"][:1]
    expected = one.generate(ids, **SETTINGS)
    numbers = Program._numbers

    def wrong(self, operator, places):
        found = numbers(self, operator, places)
        return [5 if operator.code == 4 else found[0], *found[1:]]  # products in the place of sums

    monkeypatch.setattr(Program, "_numbers", wrong)
    assert torch.equal(loop.generate(one, ids, **SETTINGS), expected)
    assert decoder_of(one).replays == 1 and not programs(one)


def test_a_resident_model_in_float32(olmoe):
    one = resident(olmoe)
    for seed in range(3):
        ids = batch(5 + 4 * seed, seed)["input_ids"][:1]
        assert torch.equal(loop.generate(one, ids, **SETTINGS), one.generate(ids, **SETTINGS))
    assert programs(one)


def test_values_clamped_in_place_are_left_to_torch():
    settings = config("olmoe")
    settings.clip_qkv = 0.5
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(settings).eval().requires_grad_(False)
    for seed in range(2):
        ids = batch(6, seed)["input_ids"][:1]
        assert torch.equal(loop.generate(one, ids, **SETTINGS), one.generate(ids, **SETTINGS))
    assert decoder_of(one).replays == 1


@pytest.mark.parametrize("hidden", [16, 40, 64, 192, 200, 512, 1088, 2048])
def test_experts_are_added_up_in_torchs_order(hidden):
    for top_k in (1, 2, 3, 4, 6, 8, 10, 15):
        for dtype in (HALF, FLOAT):
            outputs = torch.empty(top_k, hidden, dtype=HALF)
            one = CompiledExperts(lambda *_: 0, [], (), outputs, dtype)
            assert one._adds_as_torch(), (top_k, dtype)


def test_layers_alike_are_compared_with_other_inputs_once(monkeypatch):
    found = []
    by_torch = Program._by_torch
    monkeypatch.setattr(Program, "_by_torch", lambda self, real: found.append(self) or by_torch(self, real))
    settings = config("olmoe")
    settings.num_hidden_layers = 5
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(settings, dtype=HALF).eval().requires_grad_(False)
    ids = batch(6)["input_ids"][:1]
    assert torch.equal(loop.generate(one, ids, **SETTINGS), one.generate(ids, **SETTINGS))
    times = [found.count(program) for program in programs(one)]
    assert set(times) == {1, 3} and times.count(3) <= 5  # the first and the last, and of two layers
