"""`memory` holds: what a process takes beyond what it began with stays below it, and nothing is killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig
from typer.testing import CliRunner

import melinoe
from families import FAMILIES, batch, config, enough_for, save_tokenizer
from melinoe.cli.main import app
from melinoe.config import format_bytes
from melinoe.demonstration.limited_process import MemoryLimit
from melinoe.experts.forward import COMBINED_TOKENS, combine, use_melinoe_experts
from melinoe.machine import return_holes
from melinoe.models.layers import moe_layers
from melinoe.models.pretrained import load_model, read_config
from melinoe.paging import paged_experts
from melinoe.runtime.generation import generate
from melinoe.runtime.load import load_tokenizer
from melinoe.runtime.quantizer import set_settings
from melinoe.runtime.settings import LoadSettings, file_bytes
from melinoe.runtime.work_space import LiveBytes, twin, work_space

RUN = Path(__file__).with_name("memory_run.py")


def store_of_large_records(folder, hidden, inner):
    """A store whose 32 records have 3 MiB each."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=hidden // 64 if hidden > 256 else 4,
        num_key_value_heads=hidden // 64 if hidden > 256 else 4,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    store = melinoe.convert(folder / "model", folder / "store", progress=False)
    assert store.max_record_bytes == 3 * 2**20
    return store.folder


@pytest.fixture(scope="module")
def large_records(tmp_path_factory):
    return store_of_large_records(tmp_path_factory.mktemp("large"), 128, 4096)


@pytest.fixture(scope="module")
def large_activations(tmp_path_factory):
    return store_of_large_records(tmp_path_factory.mktemp("wide"), 1024, 512)


@pytest.mark.parametrize(
    ("rows", "prompt", "new"),
    [(1, 12, 24), (1, 440, 16), (16, 24, 16)],
    ids=["short", "long prompt", "batch"],
)
def test_a_budget_holds(large_records, rows, prompt, new):
    hold(large_records, rows, prompt, new)


@pytest.mark.parametrize("prompt", [1500, 6144], ids=["one pass", "three passes"])
def test_a_budget_holds_where_activations_are_large(large_activations, prompt):
    """Attention lays keys and values out anew, and the C library keeps holes between what a pass drops."""
    hold(large_activations, 1, prompt, 2)


def hold(store, rows, prompt, new):
    """Under a cgroup limit of what the process began with and the budget."""
    memory = enough_for(store, 3, context=prompt + new, batch=rows)
    limit = MemoryLimit(2**40)
    command = [str(limit._limit) if limit.available else "-", store, memory, rows, prompt, new]
    try:
        done = subprocess.run(
            [sys.executable, str(RUN), *map(str, command)],
            preexec_fn=limit.join if limit.available else None,
            capture_output=True,
            text=True,
        )
    finally:
        limit.close()
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["slots"] == 3
    assert memory / 3 < found["taken"] <= memory


@pytest.mark.parametrize("family", FAMILIES)
def test_work_space_of_every_family(family):
    """What is counted on shapes is what a pass on real tensors makes live at once."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32).eval().requires_grad_(False)
    use_melinoe_experts(model)
    rows, length = 2, 48
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, :5] = 0
    ids = torch.randint(3, 50, (rows, length))
    with torch.no_grad(), LiveBytes() as live:
        live.ignore((*model.parameters(), *model.buffers()))
        model(ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
    counted = work_space(twin(model), rows, length, length).num_bytes
    assert live.peak <= counted <= 1.5 * live.peak


def test_more_rows_tokens_or_context_take_more():
    model = AutoModelForCausalLM.from_config(config("olmoe"))
    least = work_space(twin(model), 1, 32, 32).num_bytes
    for shape in ((2, 32, 32), (1, 64, 64), (1, 32, 64)):
        assert work_space(twin(model), *shape).num_bytes > least
    assert model.config._experts_implementation != "melinoe_work_space"  # the model itself is not touched


def test_what_was_not_set_aside_is_refused(olmoe_store):
    memory = enough_for(olmoe_store, 4, context=20)
    model = melinoe.load(olmoe_store, memory=memory, context=20)
    one = {name: value[:1] for name, value in batch(12).items()}
    greedy = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    model.generate(**one, max_new_tokens=8, min_new_tokens=8, **greedy)  # 20 tokens
    model.generate(**one, max_new_tokens=9, min_new_tokens=9, **greedy)  # the 21st is not fed
    with pytest.raises(melinoe.MelinoeError, match=r"1 sequences of 21 tokens; allowed: 1 of 20.*context=21"):
        model.generate(**one, max_new_tokens=10, min_new_tokens=10, **greedy)
    with pytest.raises(melinoe.MelinoeError, match=r"2 sequences.*batch=2"):
        model(**batch(4))
    with pytest.raises(melinoe.MelinoeError, match=r"3 sequences.*batch=3"):
        model.generate(**one, num_beams=3, max_new_tokens=2, **greedy)
    with pytest.raises(melinoe.MelinoeError, match=r"1 sequences of 39 tokens"):
        model.generate(**one, max_length=40, cache_implementation="static", **greedy)
    wider = melinoe.load(
        olmoe_store, memory=enough_for(olmoe_store, 4, context=20, batch=3), context=20, batch=3
    )
    wider.generate(**one, num_beams=3, max_new_tokens=2, **greedy)
    melinoe.load(olmoe_store, slots=4).generate(
        **batch(12), max_new_tokens=40, **greedy
    )  # no promise was made


def test_a_long_pass_gives_back_what_its_layers_have_dropped(olmoe_store, monkeypatch):
    """Before the pass alone was not enough: holes add up over the layers. No budget, no cost."""
    returned = []

    def counting():
        returned.append(1)
        return_holes()

    monkeypatch.setattr(paged_experts, "return_holes", counting)
    monkeypatch.setattr(paged_experts, "RETURN_LAYERS", 1)
    ids = torch.arange(600)[None] % 50
    outputs = []
    for budget in ({"memory": enough_for(olmoe_store, 4, context=600), "context": 600}, {"slots": 4}):
        model = melinoe.load(olmoe_store, **budget)
        returned.clear()
        outputs.append(model(input_ids=ids).logits)
        layers = len(moe_layers(model))
        assert len(returned) == (1 + layers if "memory" in budget else 0)
        returned.clear()
        model(input_ids=ids[:, :100])
        assert not returned
    assert torch.equal(*outputs)


def test_a_pass_of_more_tokens_is_refused(olmoe_store, monkeypatch):
    from melinoe.runtime import division

    monkeypatch.setattr(division, "PREFILL_CHUNK", 8)
    model = melinoe.load(olmoe_store, memory=enough_for(olmoe_store, 4, context=30), context=30)
    one = {name: value[:1] for name, value in batch(12).items()}
    with pytest.raises(
        melinoe.MelinoeError, match=r"12 tokens at once; allowed: 8 tokens.*prefill_chunk_size=8"
    ):
        model.generate(**one, max_new_tokens=4)
    model.generate(**one, max_new_tokens=4, prefill_chunk_size=8)


def test_the_plan_says_what_is_inside(olmoe_store):
    model = melinoe.load(olmoe_store, memory=enough_for(olmoe_store, 4))
    said = str(melinoe.runtime.load.plan(model))
    for part in ("libraries", "resident", "KV cache", "work", "staging", "4 slots", "the process had"):
        assert part in said
    _, statistics = generate(model, load_tokenizer(olmoe_store), "w1 w2", max_new_tokens=2, raw=True)
    taken, planned = statistics.model_memory_bytes, model.melinoe_budget.total_bytes
    before = model.melinoe_budget.process_bytes
    assert statistics.peak_memory_bytes == before + taken
    assert str(statistics).endswith(
        f"peak memory {format_bytes(before + taken)}: {format_bytes(before)} before the model was opened and"
        f" {format_bytes(taken)} since, {format_bytes(planned)} planned"
    )


def test_an_adapter_and_a_predictor_are_inside(olmoe_store, tmp_path):
    file = tmp_path / "predictor"
    file.write_bytes(bytes(10**6))
    plain = melinoe.load(olmoe_store, slots=2).melinoe_budget
    settings = LoadSettings(slots=2, extra_bytes=file_bytes(file))
    config = read_config(olmoe_store)
    set_settings(config, settings)
    more = load_model(olmoe_store, config=config).melinoe_budget
    assert more.resident_bytes - plain.resident_bytes == 10**6
    assert file_bytes(None) == file_bytes(tmp_path / "nothing") == 0


def test_a_store_is_measured_inside_the_budget(olmoe, olmoe_store, tmp_path, monkeypatch):
    """As many rows at once as the budget is for, and the same numbers as without one."""
    rows = [{"prompt": f"w1 w{number}", "completion": "w3 w4"} for number in range(2, 8)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiet = {"max_new_tokens": 3, "progress": False}
    free = melinoe.evaluate(olmoe_store, tmp_path / "test.jsonl", **quiet)
    monkeypatch.setenv("MELINOE_MEMORY", str(enough_for(olmoe_store, 3)))
    found = melinoe.evaluate(olmoe_store, tmp_path / "test.jsonl", **quiet)
    assert found["exact_match"] == free["exact_match"]
    assert found["nll"] == pytest.approx(free["nll"], rel=1e-5)
    melinoe.trace(olmoe_store, tmp_path / "test.jsonl", tmp_path / "trace", split="test", progress=False)


def test_beams_of_a_checkpoint_are_set_aside_by_generate(olmoe_store, tmp_path, monkeypatch):
    folder = shutil.copytree(olmoe_store, tmp_path / "store")
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 3, "eos_token_id": 1}))
    memory = str(enough_for(olmoe_store, 3, batch=3))
    asked = ["generate", "--model", str(folder), "-p", "w1", "--raw", "--max-new-tokens", "3"]
    done = CliRunner().invoke(app, [*asked, "--memory", memory])
    assert done.exit_code == 0, done.stderr
    assert "before the model was opened and" in done.stderr
    planned = CliRunner().invoke(app, ["plan", "--model", str(folder), "--memory", memory, "--batch", "3"])
    assert "3 slots per layer" in planned.stdout


def test_limits_of_two_children_at_once():
    """A folder of ours that is there already, left over or in use, is in nobody's way."""
    one = MemoryLimit(2**30)
    if not one.available:
        pytest.skip("no memory cgroup can be made here")
    other = MemoryLimit(2**31)
    try:
        assert other.available
        assert other.folder != one.folder
    finally:
        other.close()
        one.close()
    assert not one.folder.exists()


@pytest.mark.parametrize("tokens", [1, 2, COMBINED_TOKENS, COMBINED_TOKENS + 1, 3 * COMBINED_TOKENS - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_added_up_in_parts_to_the_same_bits(tokens, dtype):
    outputs, weights = torch.randn(tokens * 6, 40).to(dtype), torch.rand(tokens, 6)
    whole = (outputs.view(tokens, 6, -1) * weights.unsqueeze(-1)).sum(1).to(dtype)
    assert torch.equal(combine(outputs, weights, 6, dtype), whole)
