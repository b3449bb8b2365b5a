"""From one number of bytes to slots: what is counted is what is used, and `plan` says what `load` does."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import melinoe
from families import config, enough_for, save_checkpoint
from family_configs import exact_types
from melinoe.demonstration.limited_process import MemoryLimit
from melinoe.machine import free_memory
from melinoe.runtime import division
from melinoe.runtime.plan import deployed_slots, describe
from melinoe.runtime.work_space import twin, work_space


@pytest.mark.parametrize("family", exact_types())
def test_the_cache_of_every_type_is_what_is_planned(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(torch.randint(3, 50, (1, 12)), use_cache=True).past_key_values
    parts = [part for layer in cache.layers for part in tree_leaves(vars(layer))]
    held = sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    found = work_space(twin(model), 2, 12, 20)
    assert held == found.cache_bytes + 12 * found.cache_bytes_per_token
    assert found.num_bytes > 0


def test_a_longer_context_leaves_less_for_slots(olmoe_store):
    memory = enough_for(olmoe_store, 3, context=128)
    short, long = (melinoe.load(olmoe_store, memory=memory, context=tokens) for tokens in (16, 128))
    per_token = work_space(twin(short), 1, 8, 8).cache_bytes_per_token
    assert long.melinoe_budget.cache_bytes - short.melinoe_budget.cache_bytes == 112 * per_token
    assert long.melinoe_budget.slots < short.melinoe_budget.slots
    assert long.melinoe_budget.total_bytes <= memory
    assert melinoe.plan(olmoe_store, memory, context=128)["budget"]["slots"] == long.melinoe_budget.slots


def test_the_exact_boundary(olmoe_store):
    """With all bytes of k slots there are k, with one byte less there are k - 1."""
    of = {slots: melinoe.plan(olmoe_store, slots=slots, measure_seconds=0)["budget"] for slots in range(1, 9)}
    for slots, plan in of.items():
        enough = melinoe.plan(olmoe_store, plan["total_bytes"], measure_seconds=0)["budget"]
        assert enough == plan
        if slots > 1:
            less = melinoe.plan(olmoe_store, plan["total_bytes"] - 1, measure_seconds=0)["budget"]
            assert less == of[slots - 1]
    with pytest.raises(melinoe.MelinoeError, match="too small"):
        melinoe.plan(olmoe_store, of[1]["total_bytes"] - 1)
    assert melinoe.plan(olmoe_store, "1TiB", measure_seconds=0)["budget"]["slots"] == 8


def test_a_share_of_what_is_free(olmoe_store, monkeypatch):
    whole = melinoe.plan(olmoe_store, slots=5, measure_seconds=0)["budget"]["total_bytes"]
    monkeypatch.setattr(division, "free_memory", lambda device=None: 4 * whole)
    assert melinoe.plan(olmoe_store, "25%", measure_seconds=0)["budget"]["slots"] == 5
    assert melinoe.plan(olmoe_store, " 24.99 % ", measure_seconds=0)["budget"]["slots"] == 4


def test_memory_is_that_of_this_process_and_its_cgroup():
    """Free memory is what the process's own cgroup leaves; the peak is not the parent's, which has more."""
    limit = MemoryLimit(2**30)
    if not limit.available:
        pytest.skip("no memory cgroup can be made here")
    ours = bytearray(800 * 2**20)
    ours[::4096] = b"x" * len(ours[::4096])  # resident
    try:
        code = "from melinoe.machine import free_memory, peak_memory; print(free_memory(), peak_memory())"
        inside = subprocess.run(
            [sys.executable, "-c", code], preexec_fn=limit.join, capture_output=True, text=True, check=True
        )
    finally:
        limit.close()
    free, peak = map(int, inside.stdout.split())
    assert 0 < free < 2**30 < free_memory()
    assert 0 < peak < len(ours)


def test_plan_of_a_checkpoint_is_what_load_does_with_it(olmoe, tmp_path):
    """Read in place: measured, and the buffers of the reading threads counted."""
    memory = enough_for(olmoe, 5)
    planned = melinoe.plan(olmoe, memory=memory, measure_seconds=0.2)
    loaded = melinoe.load(olmoe, memory=memory).melinoe_budget
    assert planned["budget"]["total_bytes"] == loaded.total_bytes
    assert planned["budget"]["slots"] == loaded.slots
    assert planned["bandwidth"] > 0
    assert planned["ceiling_tokens_per_second"]
    assert "tok/s" in describe(planned)


def test_plan_of_what_cannot_be_measured(olmoe, tmp_path):
    """A checkpoint that must be converted, and one whose weights have not been fetched."""
    bfloat16 = save_checkpoint(tmp_path / "bfloat16", "olmoe", torch.bfloat16)
    shutil.copy(olmoe / "model.safetensors", bfloat16 / "model.safetensors")
    planned = melinoe.plan(bfloat16, memory="100MiB")
    assert planned["bandwidth"] is None
    assert "the model computes in torch.bfloat16" in describe(planned)
    (bfloat16 / "model.safetensors").unlink()
    planned = melinoe.plan(bfloat16, memory="100MiB")
    assert planned["budget"]["slots"] > 0
    assert "its weights are not here" in describe(planned)


def test_slots_to_tune_for_are_those_that_generating_gets(olmoe, olmoe_store):
    for source in (olmoe, olmoe_store):
        memory = enough_for(source, 5)
        found = deployed_slots(source, memory)
        assert found == max(2, melinoe.load(source, memory=memory).melinoe_budget.slots)
    least = melinoe.plan(olmoe_store, slots=1, measure_seconds=0)["budget"]["total_bytes"]
    assert deployed_slots(olmoe_store, least) == 2  # K: one token's experts at least
    with pytest.raises(melinoe.MelinoeError, match="too small"):
        deployed_slots(olmoe_store, 1000)
