"""Slots on a device: the same pager over DeviceReader. Without an accelerator its logic runs on the CPU."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import batch
from melinoe.paging.device_reader import DeviceReader
from melinoe.paging.pager import ExpertPager
from melinoe.paging.slots import HostRecords
from melinoe.routing.policies import make_policy

CPU = torch.device("cpu")


def through_device(store_folder, slots, pinned):
    """A model whose pager moves records by DeviceReader, on the CPU."""
    model = melinoe.load(store_folder, slots=slots)
    paged = model.melinoe_paged
    store = paged.pager.store
    policy = make_policy("decay", len(store.layers), 8, slots)
    paged.pager.close()
    paged.pager = ExpertPager(store, slots, policy, reader=DeviceReader(store, CPU, pinned))
    return model


@pytest.mark.parametrize("pinned", [True, False], ids=["host", "disk-behind"])
@pytest.mark.parametrize("slots", [8, 3, 0])
def test_equals_the_host_pager(olmoe_store, slots, pinned):
    expected = melinoe.load(olmoe_store, slots=8)
    model = through_device(olmoe_store, slots, pinned)
    inputs = batch()
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    ours = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, expected.generate(**inputs, max_new_tokens=12, do_sample=False))


def test_read_errors_pass_through(olmoe_store, monkeypatch):
    model = through_device(olmoe_store, 2, pinned=False)
    expected = model(**batch()).logits
    real = os.preadv

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    model.melinoe_paged.pager.reset()
    with pytest.raises(melinoe.MelinoeError, match="cannot read expert"):
        model(**batch())
    monkeypatch.setattr(os, "preadv", real)
    assert torch.equal(model(**batch()).logits, expected)


def flags(address):
    """The kernel's words for a mapping; dc: a fork's children do not get it."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(one, 16) for one in first.split("-"))
            here = start <= address < end
        elif here and first == "VmFlags:":
            return line.split()[1:]
    return []


def test_host_records_are_no_childs_while_they_are_filled():
    held = HostRecords(3, 4096, torch.device("cpu"))
    assert "dc" in flags(held.tensor.data_ptr())
    held.pin()
    assert "dc" not in flags(held.tensor.data_ptr())


def test_host_records_do_without_huge_pages(monkeypatch):
    class Kernel(mmap.mmap):
        def madvise(self, advice):
            if advice == mmap.MADV_HUGEPAGE:
                raise OSError(errno.EINVAL, "no such advice")
            super().madvise(advice)

    monkeypatch.setattr(mmap, "mmap", Kernel)
    held = HostRecords(3, 4096, torch.device("cpu"))
    held.pin()
    assert held.tensor.shape == (3, 4096)


def test_devices_are_checked(olmoe_store):
    for device in ("tpu", "meta", "gpu0"):
        with pytest.raises(melinoe.MelinoeError, match="device"):
            melinoe.load(olmoe_store, slots=2, device=device)
    if not torch.cuda.is_available():
        with pytest.raises(melinoe.MelinoeError, match="no CUDA device"):
            melinoe.load(olmoe_store, slots=2, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [8, 3, 0])
def test_on_a_gpu_equals_all_resident_on_it(olmoe, olmoe_store, slots):
    inputs = {name: value.cuda() for name, value in batch().items()}
    reference = melinoe.load(olmoe_store, slots=8, device="cuda")
    model = melinoe.load(olmoe_store, slots=slots, device="cuda")
    for _ in range(3):
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    stock = AutoModelForCausalLM.from_pretrained(olmoe, device_map={"": "cuda"}).eval()
    with torch.no_grad():
        expected = stock(**inputs).logits
    assert (model(**inputs).logits - expected).abs().max() < 1e-4 * expected.abs().max()
    ours = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(ours, reference.generate(**inputs, max_new_tokens=24, do_sample=False))


@pytest.mark.gpu
def test_on_a_gpu_from_disk(olmoe_store):
    inputs = {name: value.cuda() for name, value in batch().items()}
    model = melinoe.load(olmoe_store, slots=3, device="cuda")
    expected = model(**inputs).logits
    paged = model.melinoe_paged
    store = paged.pager.store
    reader = DeviceReader(store, model.device, pinned=False)
    paged.pager = ExpertPager(store, 3, make_policy("decay", len(store.layers), 8, 3), reader=reader)
    assert torch.equal(model(**inputs).logits, expected)
