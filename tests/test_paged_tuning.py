"""Tuning with paged experts: gradients, losses and adapters of the resident run, whatever is in the slots."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import melinoe
from families import RandomPolicy, batch, save_checkpoint
from melinoe.adapters.merge import merge
from melinoe.adapters.peft_folder import apply_adapter
from melinoe.conversion.first_use import store_of
from melinoe.errors import MelinoeError
from melinoe.models.layers import experts_modules, moe_layers
from melinoe.paging.pager import ExpertPager
from melinoe.routing.policies import make_policy
from melinoe.runtime.load import load_for_tuning, load_tokenizer, stats
from melinoe.store.manifest import open_store
from melinoe.tuning.memory.needed import memory_needed
from melinoe.tuning.memory.pages import Pages
from melinoe.tuning.model import prepare_model
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.trainer import LocalityTrainer
from melinoe.tuning.training_rows import read_training_rows
from melinoe.tuning.tune import plan_memory, tune

SHORT = {"max_steps": 3, "batch_tokens": 128, "max_length": 32, "rank": 4, "progress": False}
SHORT |= {"learning_rate": 5e-4, "router_learning_rate": 2e-3}
# gates; transposed, interleaved, with biases; sigmoid scores, correction bias, a dense first layer; no gates;
# inputs scaled
FAMILIES = ("olmoe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "llama4_text")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": f"w{i} w{i + 1} w{(3 * i) % 40}", "completion": f"w{i + 2} w{i + 3} w5"} for i in range(30)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Makes a family's checkpoint once: (family, dtype) -> folder."""
    made = {}

    def get(family, dtype=torch.float32):
        if (family, dtype) not in made:
            made[family, dtype] = save_checkpoint(tmp_path_factory.mktemp("m") / family, family, dtype)
        return made[family, dtype]

    return get


def settings_of(given):
    return {name: value for name, value in given.items() if name != "progress"}


def budget(model, data, slots, **settings):
    """The bytes with which `slots` records per layer fit, and no more."""
    needed = plan_memory(model, data, **settings_of(SHORT | settings))
    each = needed.slot if needed.packed_slot is None or slots >= needed.num_experts else needed.packed_slot
    least = needed.paged_checkpointed if needed.checkpointed else needed.paged
    return least.total + slots * each


def losses(folder):
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("total", "nll", "misses", "rank")] for line in lines]


def assert_same_run(one, other, rtol=1e-6, weights=2e-5):
    """Losses to float32's rounding (the log keeps six decimals).

    The adapter's tensors differ by shares of their largest value: AdamW makes whole steps of gradients that
    are nothing but rounding.
    """
    torch.testing.assert_close(
        torch.tensor(losses(one)), torch.tensor(losses(other)), rtol=rtol, atol=2e-6, check_dtype=False
    )
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=weights * float(theirs[name].abs().max())
        )


# ------------------------------------------------------------------ gradients of one step


def prepared(folder, slots=None, policy=None, checkpointing=False):
    """A model as `tune` prepares it, resident or with `slots` records per layer, its factors not zero."""
    pages = None if slots is None else Pages(store_of(folder).folder, slots, None, "auto", "")
    settings = TuneSettings(rank=3, gradient_checkpointing=checkpointing)
    model, layers = prepare_model(folder, settings, "cpu", pages)
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        for parameter in layer.experts.low_rank.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    if policy is not None:
        paged = model.melinoe_paged
        store, count = paged.pager.store, max(layer.num_experts for layer in layers)
        chosen = RandomPolicy if policy == "random" else lambda *sizes: make_policy(policy, *sizes)
        paged.pager.close()
        paged.pager = ExpertPager(store, slots, chosen(len(layers), count, slots))
    if checkpointing:
        model.train()
        for layer in layers:
            layer.router.eval()
    return model


def loss_of(model, seed=0):
    logits = model(**batch(11, seed), use_cache=False).logits
    return logits.float().pow(2).mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(model, expected, tolerance=2e-6):
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0 or "shared" in name, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance * scale + 1e-30, msg=name)


@pytest.fixture(scope="module")
def expected(checkpoints):
    """The resident gradients of one step, and of two batches together."""
    one, two = prepared(checkpoints("olmoe")), prepared(checkpoints("olmoe"))
    loss_of(one).backward()
    (loss_of(two) + loss_of(two, seed=5)).backward()
    return gradients(one), gradients(two)


@pytest.mark.parametrize("policy", ["lru", "decay", "random"])
@pytest.mark.parametrize("slots", [8, 3, 1, 0])
def test_gradients_do_not_depend_on_slots(checkpoints, expected, slots, policy):
    model = prepared(checkpoints("olmoe"), slots, policy)
    for _ in range(2):  # cold, and with what the first step left there
        model.zero_grad()
        loss_of(model).backward()
        assert_same_gradients(model, expected[0])


@pytest.mark.parametrize("slots", [3, 1])
def test_nothing_of_a_slot_waits_for_the_backward_pass(checkpoints, expected, slots):
    """Every byte of slots and staging is overwritten between the passes."""
    model = prepared(checkpoints("olmoe"), slots)
    loss = loss_of(model)
    pager = model.melinoe_paged.pager
    pager.reset()
    for buffer in [*(bank.buffer for bank in pager.banks), pager.staging.buffer]:
        buffer.tensor.fill_(0xFF)  # not a number, in float32
    loss.backward()
    assert_same_gradients(model, expected[0])


@pytest.mark.parametrize("slots", [3, 0])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_two_batches_in_flight_and_one_after_the_other(checkpoints, expected, slots, checkpointing):
    model = prepared(checkpoints("olmoe"), slots, checkpointing=checkpointing)
    (
        loss_of(model) + loss_of(model, seed=5)
    ).backward()  # the second forward pass lies before the first backward
    assert_same_gradients(model, expected[1])
    model.zero_grad()
    for seed in (0, 5):  # accumulated
        loss_of(model, seed).backward()
    assert_same_gradients(model, expected[1], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_kind_of_experts(checkpoints, family):
    resident, paged = prepared(checkpoints(family)), prepared(checkpoints(family), 3, checkpointing=True)
    loss_of(resident).backward()
    loss_of(paged).backward()
    assert_same_gradients(paged, gradients(resident), 2e-5)


def test_each_pass_reads_an_expert_once_and_starts_with_what_is_there(checkpoints):
    """Training is counted by itself, and inference's counters stay as they were."""
    model = prepared(checkpoints("olmoe"), 3)
    counters = stats(model)
    loss_of(model).backward()
    asked = counters.training_requests // 2  # of both layers, in one pass
    counters.reset()
    loss_of(model).backward()
    layers = len(moe_layers(model))
    assert counters.training_requests == 2 * asked > 2 * 3 * layers
    assert counters.training_hits == 2 * 3 * layers
    assert counters.training_loads == 2 * (asked - 3 * layers)
    record = model.melinoe_paged.pager.store.max_record_bytes
    assert counters.training_bytes == counters.training_loads * record
    others = {name: value for name, value in counters.to_json().items() if isinstance(value, int)}
    assert not any(
        value for name, value in others.items() if name.startswith(("prefill", "decode", "preload"))
    )
    counters.reset()
    loss_of(prepared(checkpoints("olmoe"), 3, checkpointing=True)).backward()
    with torch.no_grad():
        loss_of(model)
    assert counters.training_requests == asked


def test_a_call_inside_a_call_is_refused(checkpoints):
    pager = prepared(checkpoints("olmoe"), 3).melinoe_paged.pager
    from melinoe.experts.backward import training_call

    outer = pager.serve(0, training_call([0, 1]))
    next(outer)
    with pytest.raises(AssertionError, match="inside a call"):
        next(pager.serve(1, training_call([2])))
    outer.close()
    assert sorted(expert for expert, _ in pager.serve(0, training_call([0, 1]))) == [0, 1]


def test_a_read_error_in_the_backward_pass_is_named_and_leaves_no_damage(checkpoints, expected, monkeypatch):
    model = prepared(checkpoints("olmoe"), 2)
    loss, real = loss_of(model), os.preadv

    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(MelinoeError, match="cannot read expert"):
        loss.backward()
    monkeypatch.setattr(os, "preadv", real)
    model.zero_grad()
    loss_of(model).backward()
    assert_same_gradients(model, expected[0])


# ------------------------------------------------------------------ whole runs


def test_parts_of_a_step_and_checkpointing(tmp_path, checkpoints, data):
    """Accumulated, with the layers computed again, and measured on held-out rows between the steps."""
    base = checkpoints("olmoe")
    more = {"accumulate": 2, "batch_tokens": 64, "gradient_checkpointing": True, "eval_steps": 1}
    tune(base, data, tmp_path / "resident", **SHORT | more, eval_data=data / "train.jsonl")
    memory = budget(base, data, 2, **more)
    tune(base, data, tmp_path / "paged", memory=memory, **SHORT | more, eval_data=data / "train.jsonl")
    assert_same_run(tmp_path / "paged", tmp_path / "resident")
    logs = [(tmp_path / name / "evaluations.jsonl").read_text() for name in ("paged", "resident")]
    held_out = [[{**json.loads(line), "seconds": 0} for line in log.splitlines()] for log in logs]
    assert held_out[0] == held_out[1]


def test_parts_of_a_step_share_what_is_read(tmp_path, checkpoints, data):
    """Four parts computed as two or one where there is room for that: less is read, the run is the same."""
    base = checkpoints("olmoe")
    more = {"accumulate": 4, "batch_tokens": 12, "max_length": 12, "rank_tokens": 16}
    tune(base, data, tmp_path / "resident", **SHORT | more)
    store, settings = store_of(base).folder, TuneSettings(**settings_of(SHORT | more))
    rows, read = read_training_rows(store, data, settings), []
    for parts in (4, 2, 1):
        alone = replace(settings, accumulate=parts)
        needed = memory_needed(store, alone, rows.largest_batch(settings, parts), "cpu")
        memory = needed.paged.total  # of so many parts, and no slot beside them
        found = tune(store, data, tmp_path / str(parts), memory=memory, **SHORT | more)["paged"]
        assert found["parts"] == parts
        assert plan_memory(store, data, memory=memory, **settings_of(SHORT | more)).parts == parts
        assert_same_run(tmp_path / str(parts), tmp_path / "resident")
        read.append(found["bytes_read"])
    assert read[2] < read[1] < read[0]


def test_a_run_goes_on_with_its_steps_divided_otherwise(tmp_path, checkpoints, data, monkeypatch):
    base, more = checkpoints("olmoe"), {"accumulate": 2, "batch_tokens": 64, "checkpoint_steps": 1}
    tune(base, data, tmp_path / "resident", **SHORT | more)
    with monkeypatch.context() as stopped:
        real = LocalityTrainer._get_grad_norm

        def interrupted(trainer, *args, **options):
            if trainer.state.global_step == 1:
                raise KeyboardInterrupt
            return real(trainer, *args, **options)

        stopped.setattr(LocalityTrainer, "_get_grad_norm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(base, data, tmp_path / "paged", memory=budget(base, data, 0, **more), **SHORT | more)
    found = tune(base, data, tmp_path / "paged", memory="2GiB", resume=True, **SHORT | more)
    assert found["resumed_from"] == 1
    assert found["paged"]["parts"] == 1
    assert_same_run(tmp_path / "paged", tmp_path / "resident")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_paged_run_gives_the_resident_adapter(tmp_path, checkpoints, data, family):
    base = checkpoints(family)
    tune(base, data, tmp_path / "resident", **SHORT)
    found = tune(base, data, tmp_path / "paged", memory=budget(base, data, 3), **SHORT)
    assert found["paged"]["slots"] == 3
    assert found["paged"]["loads"] > found["paged"]["hits"] > 0
    assert_same_run(tmp_path / "paged", tmp_path / "resident")
    cards = [json.loads((tmp_path / name / "melinoe.json").read_text()) for name in ("paged", "resident")]
    assert cards[0]["base_identity"]
    for name in ("base", "base_fingerprint", "base_format", "base_identity", "settings"):
        assert cards[0][name] == cards[1][name], name


def test_bfloat16_records_are_computed_in_float32(tmp_path, checkpoints, data):
    base, slots = checkpoints("olmoe", torch.bfloat16), 3
    tune(base, data, tmp_path / "resident", **SHORT)
    tune(base, data, tmp_path / "paged", memory=budget(base, data, slots), **SHORT)
    assert_same_run(tmp_path / "paged", tmp_path / "resident")
    tune(base, data, tmp_path / "own", memory=budget(base, data, slots, dtype="auto"), dtype="auto", **SHORT)
    tune(base, data, tmp_path / "own-resident", dtype="auto", **SHORT)
    assert_same_run(tmp_path / "own", tmp_path / "own-resident", 1e-2, 0.2)  # bfloat16 has eight bits


def test_only_the_routers_trained(tmp_path, checkpoints, data):
    """The rival's objective leaves the factors alone."""
    base, common = checkpoints("olmoe"), SHORT | {"objective": "remoe"}
    tune(base, data, tmp_path / "resident", **common)
    tune(base, data, tmp_path / "paged", memory=budget(base, data, 2, objective="remoe"), **common)
    assert_same_run(tmp_path / "paged", tmp_path / "resident")


def test_the_base_model_as_teacher(tmp_path, checkpoints, data):
    """Distillation runs the paged experts without their factors and without gradient."""
    base, common = checkpoints("olmoe"), SHORT | {"distill": 0.5}
    tune(base, data, tmp_path / "resident", **common)
    tune(base, data, tmp_path / "paged", memory=budget(base, data, 2, distill=0.5), **common)
    assert_same_run(tmp_path / "paged", tmp_path / "resident")


def test_ctrl_c_keeps_the_checkpoint_and_another_budget_resumes_it(tmp_path, checkpoints, data, monkeypatch):
    base, settings = checkpoints("olmoe"), SHORT | {"checkpoint_steps": 1}
    tune(base, data, tmp_path / "whole", memory=budget(base, data, 2), **settings)
    real, calls = ExpertPager.serve, []

    def stopped(self, *args, **options):
        for served in real(self, *args, **options):
            calls.append(1)
            if len(calls) == 60:  # in the middle of a layer
                raise KeyboardInterrupt
            yield served

    monkeypatch.setattr(ExpertPager, "serve", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune(base, data, tmp_path / "cut", memory=budget(base, data, 2), **settings)
    monkeypatch.setattr(ExpertPager, "serve", real)
    assert not (tmp_path / "cut").exists()
    found = tune(base, data, tmp_path / "cut", memory=budget(base, data, 5), **settings)
    assert found["resumed_from"] and found["paged"]["slots"] == 5
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


KILLED = """
import os, signal, sys
from melinoe.paging.pager import ExpertPager
from melinoe.tuning.tune import tune
real, calls = ExpertPager.serve, []
def killed(self, *args, **options):
    for served in real(self, *args, **options):
        calls.append(1)
        if len(calls) == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        yield served
ExpertPager.serve = killed
tune(sys.argv[1], sys.argv[2], sys.argv[3], memory=int(sys.argv[4]), max_steps=3, batch_tokens=128,
     max_length=32, rank=4,
     progress=False, checkpoint_steps=1, learning_rate=5e-4, router_learning_rate=2e-3)
"""


def test_a_killed_run_resumes(tmp_path, checkpoints, data):
    base, memory = checkpoints("olmoe"), budget(checkpoints("olmoe"), data, 2)
    arguments = [str(base), str(data), str(tmp_path / "cut"), str(memory)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert not (tmp_path / "cut").exists()
    settings = SHORT | {"checkpoint_steps": 1}
    assert tune(base, data, tmp_path / "cut", memory=memory, **settings)["resumed_from"]
    tune(base, data, tmp_path / "whole", memory=memory, **settings)
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_peft_opens_it_and_it_merges(tmp_path, checkpoints, data):
    peft = pytest.importorskip("peft")
    base = checkpoints("olmoe")
    tune(base, data, tmp_path / "a", memory=budget(base, data, 1), **SHORT | {"learning_rate": 1e-2})
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "a")
    ).eval()
    merge(base, tmp_path / "a", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        before, after, same = (model(**batch()).logits for model in (plain, theirs, merged))
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, same, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ a rounded base


def rounded_checkpoint(base, store_path, target):
    """A plain checkpoint whose experts are what the store's records stand for."""
    model, store = AutoModelForCausalLM.from_pretrained(base), open_store(store_path)
    pager = load_for_tuning(store_path, 0, None, "cpu", None).melinoe_paged.pager
    from melinoe.experts.backward import training_call

    with torch.no_grad():
        for index, (_, module) in enumerate(experts_modules(model)):
            for expert, views in pager.serve(index, training_call(list(range(module.num_experts)))):
                for name, value in views.items():
                    getattr(module, name)[expert].copy_(value)
    assert store.record_format != "auto"
    model.save_pretrained(target)
    load_tokenizer(base).save_pretrained(target)
    return target


@pytest.mark.parametrize(("family", "name"), [("olmoe", "int4"), ("gpt_oss", "int8")])
def test_a_rounded_base(tmp_path, checkpoints, data, family, name):
    """Tuned on a packed store is tuned on the rounded weights; the adapter then fits both bases."""
    base, store = checkpoints(family), tmp_path / "store"
    melinoe.convert(base, store, format=name, progress=False)
    rounded = rounded_checkpoint(base, store, tmp_path / "rounded")
    settings = SHORT | {"learning_rate": 1e-2}
    tune(rounded, data, tmp_path / "truth", **settings)
    tune(store, data, tmp_path / "resident", **settings)
    found = tune(store, data, tmp_path / "paged", memory=budget(store, data, 3), **settings)
    assert found["paged"]["slots_format"] == "packed"
    for run in ("resident", "paged"):
        assert_same_run(tmp_path / run, tmp_path / "truth", weights=2e-4)
        card = json.loads((tmp_path / run / "melinoe.json").read_text())
        assert card["base_format"] == name
        assert card["base"] == str(base)
    # the store with the adapter is the rounded checkpoint with it
    expected = AutoModelForCausalLM.from_pretrained(rounded).eval()
    anywhere = shutil.copytree(tmp_path / "paged", tmp_path / "anywhere")  # though these are other weights
    del card["base_identity"]
    (anywhere / "melinoe.json").write_text(json.dumps(card))
    apply_adapter(expected, anywhere)
    paged = melinoe.load(store, adapter=tmp_path / "paged", slots=2)
    with torch.no_grad():
        ours, theirs = paged(**batch()).logits, expected(**batch()).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    text, _ = melinoe.generate(paged, load_tokenizer(store), "w1 w2", max_new_tokens=3)
    assert isinstance(text, str)
    merge(base, tmp_path / "paged", tmp_path / "merged")  # and the unrounded one takes it
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    applied = AutoModelForCausalLM.from_pretrained(base).eval()
    apply_adapter(applied, tmp_path / "paged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch()).logits, applied(**batch()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "int8", "int4"])
def test_on_a_gpu(tmp_path, checkpoints, data, name):
    """What `tune` does on one consumer card: the base in memory or paged from the host, rounded or not."""
    base, store = checkpoints("olmoe"), tmp_path / "store"
    melinoe.convert(base, store, format=name, progress=False)
    settings = SHORT | {"device": "cuda", "dtype": "float32"}
    tune(store, data, tmp_path / "resident", **settings)
    limit = budget(store, data, 3, device="cuda", dtype="float32")
    found = tune(store, data, tmp_path / "paged", memory=limit, **settings)
    assert found["paged"]["loads"] > 0
    assert_same_run(tmp_path / "paged", tmp_path / "resident", weights=2e-4)
