"""What a step reads in place is whole, whenever copies to slots begin and end (a model of two streams)."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melinoe.paging.address_table import AddressTable
from melinoe.paging.device_reader import DeviceReader
from melinoe.paging.pager import ExpertPager
from melinoe.routing.calls import decode_call
from melinoe.routing.policies import make_policy
from melinoe.store.manifest import open_store

CPU = torch.device("cpu")
EXPERTS, TOP_K = 8, 2


class Event:
    done = False

    def query(self):
        return self.done


class Streams:
    """In the place of a device's stream of copies: one is begun and ended when `advance` says so.

    While it is on its way its destination holds neither what was there nor what is to come. The computing
    stream has steps, of which the last one may be running: copies behind it wait.
    """

    stream = None

    def __init__(self):
        self.copies, self.writing = [], None
        self.step = Event()  # the last one launched
        self.step.done = True

    def mark(self):
        return self.step

    def copy(self, destination, source, after):
        event = Event()
        self.copies.append((destination, source, [one for one in after if one is not None], event))
        return event

    def advance(self):
        """Half a copy: begins one, or ends the one that was begun."""
        if self.writing is not None:
            destination, source, _, event = self.writing
            destination.copy_(source)
            event.done, self.writing = True, None
        elif self.copies and all(one.done for one in self.copies[0][2]):
            self.writing = self.copies.pop(0)
            self.writing[0].fill_(0xAA)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_step_reads_a_record_that_is_being_written(olmoe_store, data):
    store = open_store(olmoe_store)
    slots = data.draw(st.integers(0, 4), "slots")
    policy = data.draw(st.sampled_from(["lru", "decay", "lfu"]), "policy")
    reader = DeviceReader(store, CPU, pinned=True)
    streams = reader._stream = Streams()
    made = make_policy(policy, len(store.layers), EXPERTS, slots)
    pager = ExpertPager(store, slots, made, reader=reader)
    table = AddressTable(pager)
    experts = st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True)
    halves = st.integers(0, 3)
    before = None
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        asked = [data.draw(experts, "asked") for _ in store.layers]
        # as CapturedStep does: the last step has ended, the table is made, the next one is launched, and then
        # it is decided what becomes of the experts of the one before
        streams.step.done = True
        read = before and [table.read_in_place(layer, one) for layer, one in enumerate(before)]
        table.refresh()
        named = table.addresses.tolist()
        streams.step = Event()
        reader.copies_after(streams.step)
        for layer, one in enumerate(before or []):
            table.follow(layer, decode_call(one), read[layer])
        for _ in range(data.draw(halves, "copies meanwhile")):
            for layer, one in enumerate(asked):
                for expert in one:
                    stored = reader._records[layer][expert].numpy().tobytes()
                    assert ctypes.string_at(named[layer][expert], len(stored)) == stored
            streams.advance()
        streams.step.done = True
        for _ in range(data.draw(halves, "copies after it")):
            streams.advance()
        before = asked
    pager.close()


class Elsewhere(DeviceReader):
    """Passes that are served wait for copies on a stream of their own."""

    waited = 0

    def arrived(self, event):
        assert not event.done

    def wait_for_copies(self):
        self.waited += 1


@pytest.mark.parametrize("seen", [False, True], ids=["unseen", "seen on its way"])
def test_a_record_that_another_pass_has_waited_for_is_waited_for_again(olmoe_store, seen):
    """And is named by its slot from then on, whether or not the table saw it on its way."""
    store = open_store(olmoe_store)
    reader = Elsewhere(store, CPU, pinned=True)
    reader._stream = Streams()
    made = make_policy("lru", len(store.layers), EXPERTS, 4)
    pager = ExpertPager(store, 4, made, reader=reader)
    table, bank = AddressTable(pager), pager.banks[0]
    table.refresh()
    table.follow(0, decode_call([1, 2]), 2)
    if seen:
        table.refresh()
    waited = reader.waited
    assert [expert for expert, _ in pager.serve(0, decode_call([1, 2]))] == [1, 2]
    for _ in range(2):
        table.refresh()
        assert reader.waited == waited + 1
        for expert in (1, 2):
            assert table.addresses[0, expert] == bank.views(expert)["gate_up_proj"].data_ptr()
    pager.close()
