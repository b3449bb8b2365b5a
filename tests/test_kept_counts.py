"""Counts of a forward pass are kept, and nothing else than what they hang on tells one from another."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import melinoe
from families import config
from melinoe.config import home
from melinoe.runtime import kept_counts
from melinoe.runtime.kept_counts import kept_work_space
from melinoe.runtime.work_space import twin, work_space


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MELINOE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept_counts, "_known", {})


def new_process() -> None:
    kept_counts._known.clear()


def files() -> list:
    return sorted((home() / "work-space").glob("*.json"))


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_config(config("olmoe"), dtype=torch.float32).eval()


def test_another_process_reads_what_was_counted(model):
    counted = kept_work_space(model, 1, 32, 64)
    assert counted == work_space(twin(model), 1, 32, 64)
    [file] = files()
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_bytes": 12345}))
    assert kept_work_space(model, 1, 32, 64) == counted  # this process has its own
    new_process()
    assert kept_work_space(model, 1, 32, 64).num_bytes == 12345


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"num_bytes": 1}', None])
def test_what_cannot_be_read_is_counted_again(model, text):
    counted = kept_work_space(model, 1, 32, 64)
    [file] = files()
    broken = json.dumps({**json.loads(file.read_text()), "shapes": -1}) if text is None else text
    file.write_text(broken)
    new_process()
    assert kept_work_space(model, 1, 32, 64) == counted
    new_process()
    file.unlink()
    file.mkdir()  # cannot be written either
    assert kept_work_space(model, 1, 32, 64) == counted


def test_sizes_dtype_config_and_class_each_have_their_own(model):
    kept_work_space(model, 1, 32, 64)
    for sizes in ((2, 32, 64), (1, 16, 64), (1, 32, 128)):
        kept_work_space(model, *sizes)
    kept_work_space(AutoModelForCausalLM.from_config(config("olmoe"), dtype=torch.bfloat16), 1, 32, 64)
    other = config("olmoe")
    other.num_experts += 1
    kept_work_space(AutoModelForCausalLM.from_config(other), 1, 32, 64)
    eager = AutoModelForCausalLM.from_config(config("olmoe"), attn_implementation="eager")
    kept_work_space(eager, 1, 32, 64)
    kept_work_space(AutoModelForCausalLM.from_config(config("qwen3_moe")), 1, 32, 64)
    assert len(files()) == 8


def test_a_plan_and_the_model_that_is_loaded_share_it(olmoe, tmp_path):
    """A skeleton, a store's model and a checkpoint's without experts ask for the same count."""
    melinoe.plan(olmoe, slots=2, context=64, measure_seconds=0)
    assert len(files()) == 1
    store = melinoe.convert(olmoe, tmp_path / "store", progress=False)
    for source in (olmoe, store.folder):
        melinoe.load(source, slots=2, context=64)
    assert len(files()) == 1
