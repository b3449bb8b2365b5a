"""What a tuning run needs, counted from shapes: against what autograd really keeps, and as a budget."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig
from typer.testing import CliRunner

import melinoe
from families import FAMILIES, config, save_checkpoint
from melinoe.cli.main import app
from melinoe.config import format_bytes
from melinoe.conversion.first_use import store_of
from melinoe.errors import MelinoeError
from melinoe.models.layers import moe_layers
from melinoe.models.pretrained import skeleton
from melinoe.runtime.work_space import LiveBytes
from melinoe.tuning.memory.activations import BatchShape, count
from melinoe.tuning.memory.needed import memory_needed
from melinoe.tuning.memory.pages import Pages
from melinoe.tuning.model import prepare_model
from melinoe.tuning.settings import TuneSettings

BATCH = BatchShape(3, 40, 0)
SETTINGS = TuneSettings(rank=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    row = json.dumps({"prompt": "w1 w2 w3", "completion": "w4 w5"}) + "\n"
    (folder / "train.jsonl").write_text(row * 30)
    return folder


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "dbrx"])
def test_every_family_is_counted(tmp_path, family):
    config(family).save_pretrained(tmp_path)
    needed = memory_needed(tmp_path, SETTINGS, BatchShape(3, 40, 60), "cpu")
    assert 0 < needed.resident.activations <= needed.paged.activations
    assert needed.num_experts == 8


def test_what_cannot_be_tuned_is_not_counted(tmp_path):
    config("dbrx").save_pretrained(tmp_path)
    with pytest.raises(MelinoeError, match="not tuned"):
        memory_needed(tmp_path, SETTINGS, BATCH, "cpu")


def kept_by_autograd(model):
    """Bytes of all that one forward pass saves, weights apart."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def saved(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        ids = torch.randint(3, 50, (BATCH.rows, BATCH.length))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "nemotron_h", "jamba", "llama4_text"])
def test_the_count_is_what_autograd_keeps(tmp_path, family, paged):
    """Within a tenth: attention keeps a little more where nothing is computed."""
    base = save_checkpoint(tmp_path / "m", family)
    pages = Pages(store_of(base).folder, 3, None, "auto", "") if paged else None
    model, layers = prepare_model(base, SETTINGS, "cpu", pages)
    real = kept_by_autograd(model)
    empty = skeleton(base)
    counted = count(empty, moe_layers(empty), BATCH, SETTINGS)
    routing = 10 * BATCH.rows * BATCH.length * sum(layer.num_experts for layer in layers) * 4
    assert real * 0.98 <= counted.kept - routing <= real * 1.1


# few wide experts, and many narrow ones
WIDE = MixtralConfig(
    vocab_size=64, hidden_size=128, intermediate_size=448, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=512,
)  # fmt: skip
NARROW = OlmoeConfig(
    vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, num_experts=32, num_experts_per_tok=4, max_position_embeddings=512, pad_token_id=0,
)  # fmt: skip


@pytest.mark.parametrize("concentrated", [False, True], ids=["even", "concentrated"])
@pytest.mark.parametrize("theirs", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_step_lives_in_what_is_counted(tmp_path, theirs, concentrated):
    """Forward and backward, with real tensors: what lives at the same time, weights apart."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(theirs, dtype=torch.float32).save_pretrained(tmp_path / "m")
    batch = BatchShape(4, 128, 0)
    model, layers = prepare_model(tmp_path / "m", SETTINGS, "cpu")
    if concentrated:
        for layer in layers:
            torch.nn.init.zeros_(layer.router.weight)
    ids = torch.randint(3, 50, (batch.rows, batch.length))
    with LiveBytes() as live:
        live.ignore((*model.parameters(), *model.buffers()))
        hidden = model.base_model(ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        hidden.sum().backward()
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    empty = skeleton(tmp_path / "m")
    counted = count(empty, moe_layers(empty), batch, SETTINGS)
    routing = 10 * batch.rows * batch.length * sum(layer.num_experts for layer in layers) * 4
    allowed = counted.kept - routing + counted.transient + gradients
    assert live.peak <= allowed
    if concentrated:
        assert allowed <= 1.25 * live.peak


def test_weights_are_counted_to_the_byte(tmp_path, olmoe):
    needed = memory_needed(olmoe, SETTINGS, BATCH, "cpu")
    model, layers = prepare_model(olmoe, SETTINGS, "cpu")
    experts = sum(p.nbytes for layer in layers for p in layer.experts.parameters(recurse=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    routers = sum(p.nbytes for layer in layers for p in layer.router.parameters())
    factors = sum(p.nbytes for p in trained) - routers
    everything = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert needed.resident.experts == experts
    assert needed.resident.resident == everything - experts - factors
    assert needed.resident.gradients == needed.resident.optimizer // 2 == sum(p.nbytes for p in trained)
    store = melinoe.load(olmoe, slots=1).melinoe_paged.pager
    assert needed.slot == sum(bank.buffer.tensor.nbytes for bank in store.banks)


def test_a_budget_becomes_slots_and_the_smallest_works(tmp_path, olmoe):
    needed = memory_needed(olmoe, SETTINGS, BATCH, "cpu")
    least = needed.paged.total
    assert needed.slots(least) == (0, None)
    assert needed.slots(least + 3 * needed.slot) == (3, None)
    assert needed.slots("64GiB") == (8, None)
    with pytest.raises(MelinoeError, match="too small to tune") as raised:
        needed.slots(least - 2**20)
    named = str(raised.value).split("allowed: ")[1].split(" ")[0]
    assert needed.slots(named)[0] >= 0
    melinoe.convert(olmoe, tmp_path / "store", format="int4", progress=False)
    rounded = memory_needed(tmp_path / "store", SETTINGS, BATCH, "cpu")
    assert rounded.packed_slot < rounded.slot == needed.slot
    assert rounded.slots(rounded.paged.total + 3 * rounded.packed_slot) == (3, "packed")
    assert rounded.slots("64GiB") == (8, None)


def test_shorter_steps_and_checkpointing_need_less(olmoe):
    large, small = (memory_needed(olmoe, SETTINGS, BatchShape(rows, 40, 60), "cpu") for rows in (8, 2))
    assert small.paged.activations < large.paged.activations / 3
    assert large.paged_checkpointed.total < large.paged.total
    checkpointed = TuneSettings(rank=4, gradient_checkpointing=True)
    least = memory_needed(olmoe, checkpointed, BatchShape(8, 40, 60), "cpu")
    assert least.slots(least.paged_checkpointed.total) == (0, None)  # less than the run without has to have
    control = memory_needed(olmoe, TuneSettings(rank=4, objective="remoe"), BATCH, "cpu")
    assert control.paged.gradients < large.paged.gradients  # only the routers


def test_dry_run_reads_no_weights_and_writes_nothing(tmp_path, olmoe, data, monkeypatch):
    skeleton = tmp_path / "config-only"
    skeleton.mkdir()
    for file in Path(olmoe).iterdir():
        if file.suffix != ".safetensors":
            (skeleton / file.name).write_bytes(file.read_bytes())
    monkeypatch.setitem(os.environ, "MELINOE_HOME", str(tmp_path / "home"))
    common = ["tune", "--model", str(skeleton), "--data", str(data), "--dry-run"]
    shown = CliRunner().invoke(app, [*common, "--memory", "1GiB"])
    assert shown.exit_code == 0, shown.output
    assert "8 of 8 experts" in shown.output
    asked = CliRunner().invoke(app, [*common, "--json"])
    found = json.loads(asked.stdout.splitlines()[-1])
    assert format_bytes(found["totals"]["paged"]) in shown.output
    assert found["totals"]["paged"] < found["totals"]["resident"]
    assert found["slots"] is None
    little = CliRunner().invoke(app, [*common, "--memory", "1KiB"])
    assert little.exit_code == 1
    assert "or more" in little.stderr
    assert not (tmp_path / "home").exists()


def test_tune_on_the_command_line(tmp_path, olmoe, data):
    common = ["tune", "--model", str(olmoe), "--data", str(data), "--max-steps", "1", "--quiet"]
    assert CliRunner().invoke(app, common).exit_code == 2  # nowhere to write to
    adapter = ["--output-dir", str(tmp_path / "a")]
    little = CliRunner().invoke(app, [*common, *adapter, "--memory", "1KiB"])
    assert little.exit_code == 1
    assert not list(tmp_path.iterdir())
    shared = CliRunner().invoke(app, [*common, *adapter, "--memory", "1GiB", "--shard"])
    assert shared.exit_code == 1
    done = CliRunner().invoke(app, [*common, *adapter, "--memory", "1GiB", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["paged"]["slots"] == 8


def test_a_run_that_no_machine_has_memory_for_is_refused_before_it_loads(tmp_path, olmoe, olmoe_store, data):
    for model in (olmoe, olmoe_store):
        common = ["tune", "--model", str(model), "--data", str(data), "--max-steps", "1", "--quiet"]
        huge = ["--output-dir", str(tmp_path / "a"), "--rank", "100000000"]
        done = CliRunner().invoke(app, [*common, *huge])
        assert done.exit_code == 1
        assert "this run needs more memory than there is; got" in done.stderr
        assert "a smaller --rank" in done.stderr
        assert not list(tmp_path.iterdir())


def test_reading_weights_takes_more_for_a_while(olmoe):
    """The file is mapped while parameters are made of it; paged experts are never read that way."""
    needed = memory_needed(olmoe, TuneSettings(rank=1), BatchShape(1, 2, 0), "cpu")
    assert needed.resident.total >= 2 * (needed.resident.resident + needed.resident.experts)
    assert needed.paged.loading == 0
