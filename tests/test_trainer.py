"""The trainer around the losses: parts of a step, checkpointing, evaluation, resuming, what is not saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import distributed
from transformers import AutoModelForCausalLM

import melinoe
from families import save_checkpoint
from interrupting import interrupted_at
from melinoe.adapters.peft_folder import apply_adapter
from melinoe.errors import MelinoeError
from melinoe.measure.quality import evaluate
from melinoe.models.layers import moe_layers
from melinoe.tuning import training_rows
from melinoe.tuning.model import prepare_model
from melinoe.tuning.parallel.processes import leave
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.batches import padding_share, part_of, plan_batches
from melinoe.tuning.trainer import LocalityTrainer
from melinoe.tuning.tune import tune

SHORT = {"max_steps": 6, "batch_tokens": 64, "max_length": 32, "rank": 4, "progress": False}
SHORT |= {"learning_rate": 2e-3, "router_learning_rate": 1e-2}
# everything that is averaged over a step, or remembered from one step to the next
EVERYTHING = {"distill": 0.3, "balance": 0.5, "max_quality_loss": 0.01, "rank_tokens": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of 6 to 16 tokens, with completions of 3 to 8."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "valid", "test"):
        rows = []
        for i in range(40):
            words = [f"w{(i * k + (split != 'train')) % 50}" for k in range(1, 9)]
            rows.append({"prompt": " ".join(words[: 3 + i % 5]), "completion": " ".join(words[: 2 + i % 6])})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base") / "model", "olmoe")


def lines(folder, name="losses.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def assert_same_run(one, other):
    """The same losses step by step, up to the order of sums."""
    ones, others = lines(one), lines(other)
    assert len(ones) == len(others) > 3
    for mine, theirs in zip(ones, others, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), (mine["step"], name)
    found = [line["nll"] for line in ones]
    assert max(found) != pytest.approx(min(found), rel=1e-2)  # or nothing was compared


# ------------------------------------------------------------------ the parts of a step


def test_parts_keep_their_budget_and_use_every_row():
    lengths = [3, 50, 7, 20, 20, 9, 64, 1, 31] * 5
    for parts in (1, 2, 3, 5):
        plan = plan_batches(lengths, 64, 30, seed=3, parts=parts)
        assert len(plan) == 30
        cut = [part_of(rows, part, parts) for rows in plan for part in range(parts)]
        assert all(len(rows) >= 1 and len(rows) * max(lengths[r] for r in rows) <= 64 for rows in cut)
        assert {row for rows in cut for row in rows} == set(range(len(lengths)))
    assert 0 < padding_share(lengths, plan_batches(lengths, 64, 30, seed=3)) < 0.3
    assert padding_share([2, 4], [[0, 1]]) == pytest.approx(1 - 6 / 8)
    assert padding_share([2, 4], [[0, 1]], parts=2) == 0
    few = plan_batches([5, 6], 16, 4, seed=0, parts=4)  # fewer rows than parts: they come several times
    assert all(len(rows) >= 4 for rows in few)


def test_a_step_has_no_row_that_changes_another_ones_positions():
    lengths = [3, 20, 64, 9, 31, 33, 5]
    for parts in (1, 2, 3, 5):
        plan = plan_batches(lengths, 64, 40, seed=3, parts=parts, fixed_length=32)
        assert len(plan) == 40 and all(len(rows) >= parts for rows in plan)
        assert all(len({lengths[row] > 32 for row in rows}) == 1 for rows in plan)
        assert {row for rows in plan for row in rows} == set(range(len(lengths)))
        cut = [part_of(rows, part, parts) for rows in plan for part in range(parts)]
        assert all(len(rows) * max(lengths[r] for r in rows) <= 64 for rows in cut)
    assert len(plan_batches([5, 40], 64, 9, seed=0, parts=4, fixed_length=32)) == 9


@pytest.mark.parametrize(
    "more", [{}, EVERYTHING, {"equal_sequences": True}], ids=["default", "everything", "equal sequences"]
)
def test_accumulated_parts_are_one_large_batch(tmp_path, base, data, monkeypatch, more):
    tune(base, data, tmp_path / "parts", accumulate=3, **SHORT, **more)
    monkeypatch.setattr(
        training_rows,
        "plan_batches",
        lambda lengths, tokens, steps, seed, parts, fixed: plan_batches(lengths, 64, steps, seed, 3),
    )
    tune(base, data, tmp_path / "whole", **SHORT, **more)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("weights", ["whole", "sharded", "paged"])
def test_two_processes_are_one_large_batch(tmp_path, base, data, weights):
    """Through `accelerate launch`, which calls torchrun, over gloo; its --cpu would start one alone."""
    alone = tune(base, data, tmp_path / "one", accumulate=4, eval_steps=3, **SHORT, **EVERYTHING)
    settings = {
        **SHORT,
        **EVERYTHING,
        "accumulate": 2,
        "eval_steps": 3,
        "model": str(base),
        "data": str(data),
    }
    del settings["progress"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))  # JSON is YAML
    start = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    start += ["--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *start, "melinoe", "tune"]
    command += ["--recipe", "recipe.yaml", "--output-dir", "two", "--device", "cpu", "--json"]
    command += {
        "whole": [],
        "sharded": ["--shard", "--gradient-checkpointing"],
        "paged": ["--memory", "20%"],  # of what is free, which both must take for the same
    }[weights]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (printed,) = [line for line in done.stdout.splitlines() if line.strip()]  # the first process alone
    result = json.loads(printed)
    assert result["processes"] == 2
    # what is trained is whole everywhere, what is frozen is halved, or on disk
    assert (result["weight_bytes"] < 0.8 * alone["weight_bytes"]) == (weights != "whole")
    assert ("paged" in result) == (weights == "paged")
    if weights == "paged":
        assert result["paged"]["parts"] == 1  # of two: there is room
    assert done.stderr.count("rows of prompt + completion") == 1
    assert_same_run(tmp_path / "one", tmp_path / "two")
    for mine, theirs in zip(
        lines(tmp_path / "one", "evaluations.jsonl"),
        lines(tmp_path / "two", "evaluations.jsonl"),
        strict=True,
    ):
        assert mine["step"] == theirs["step"] and mine["rows"] == theirs["rows"]
        for name in ("nll", "hit_rate", "loads_per_token"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name
    assert not (tmp_path / "two.melinoe-partial").exists()


def test_a_group_of_processes_is_left(tmp_path):
    """Before the interpreter ends, where gloo's threads would meet connections that others have closed."""
    leave()  # where there is none
    distributed.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    leave()
    assert not distributed.is_initialized()


def test_what_needs_other_processes_is_refused_before_any_work(tmp_path, base, data, monkeypatch):
    with pytest.raises(MelinoeError, match="nothing to divide"):
        tune(base, data, tmp_path / "a", shard=True, **SHORT)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MelinoeError, match="--shard divides the frozen weights"):
        tune(base, data, tmp_path / "a", **SHORT)
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_not_finite_spoils_its_step_alone(tmp_path, base, data, monkeypatch):
    original, calls = LocalityTrainer.compute_loss, []

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if len(calls) == 5 else loss  # the second part of the third step

    monkeypatch.setattr(LocalityTrainer, "compute_loss", poisoned)
    result = tune(base, data, tmp_path / "a", accumulate=2, **SHORT)
    assert result["skipped_steps"] == 1
    assert [line["skipped"] for line in lines(tmp_path / "a")] == [False, False, True, False, False, False]
    apply_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a")


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "family",
    ["olmoe", "phimoe", "deepseek_v3", "gpt_oss", "jamba", "gemma4_text", "minimax_m2", "llama4_text"],
)
def test_checkpointing_computes_again_and_changes_nothing(tmp_path, data, family, monkeypatch):
    """The routers run twice, the tap hears them once, and their logits carry a gradient."""
    base = save_checkpoint(tmp_path / "base", family)
    settings = SHORT | {"max_steps": 2}
    counts = []
    original = LocalityTrainer.train

    def train(self, **options):
        counts.append(0)
        for layer in self.layers:

            def count(*_):
                counts[-1] += 1

            layer.router.register_forward_hook(count)
        return original(self, **options)

    monkeypatch.setattr(LocalityTrainer, "train", train)
    tune(base, data, tmp_path / "plain", **settings)
    tune(base, data, tmp_path / "again", gradient_checkpointing=True, **settings)
    assert counts[1] == 2 * counts[0] > 0
    plain, again = lines(tmp_path / "plain"), lines(tmp_path / "again")
    for mine, theirs in zip(plain, again, strict=True):
        for name in ("total", "nll", "misses", "rank"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    before, after = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    apply_adapter(after, tmp_path / "again")
    for old, new in zip(moe_layers(before), moe_layers(after), strict=True):
        assert any(
            not torch.equal(value, new.router.state_dict()[name])
            for name, value in old.router.state_dict().items()
        )


def test_what_is_trained_is_float32_over_a_bfloat16_model(tmp_path, data):
    base = save_checkpoint(tmp_path / "base", "olmoe", torch.bfloat16)
    seen = {}
    settings = TuneSettings(rank=2, dtype="auto")
    model, _ = prepare_model(base, settings, "cpu")
    for name, parameter in model.named_parameters():
        seen.setdefault((parameter.requires_grad, parameter.dtype), []).append(name)
    assert set(seen) == {(True, torch.float32), (False, torch.bfloat16)}
    assert all("gate" in name or "low_rank" in name for name in seen[True, torch.float32])


# ------------------------------------------------------------------ evaluation


def test_evaluation_says_what_trace_and_evaluate_say(tmp_path, base, data):
    result = tune(base, data, tmp_path / "a", eval_steps=4, eval_rows=25, slots=3, **SHORT)
    records = lines(tmp_path / "a", "evaluations.jsonl")
    assert [record["step"] for record in records] == [0, 4, 6]
    assert result["held_out"] == records[-1]
    assert records[-1]["nll"] != records[0]["nll"]
    for record, adapter in ((records[0], None), (records[-1], tmp_path / "a")):
        trace = melinoe.trace(base, data, limit=25, split="valid", progress=False, adapter=adapter)
        (simulated,) = melinoe.simulate(trace, policy="decay", slots=3)["results"]
        assert record["hit_rate"] == pytest.approx(simulated["hit_rate"], abs=2e-3)
        assert record["loads_per_token"] == pytest.approx(simulated["loads_per_token"], rel=5e-3)
        options = {"limit": 25, "split": "valid", "adapter": adapter, "progress": False}
        scored = evaluate(base, data, metrics=("perplexity",), **options)
        assert record["nll"] == pytest.approx(scored["nll"], rel=1e-4)
        assert record["perplexity"] == pytest.approx(scored["perplexity"], rel=1e-4)


def test_evaluation_changes_nothing_and_needs_held_out_rows(tmp_path, base, data):
    tune(base, data, tmp_path / "a", eval_steps=2, **SHORT)
    tune(base, data, tmp_path / "b", **SHORT)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    with pytest.raises(MelinoeError, match="held-out"):
        tune(base, data / "train.jsonl", tmp_path / "c", eval_steps=2, **SHORT)
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.melinoe-partial").exists()
    file = {"eval_data": data / "test.jsonl", "eval_steps": 3}
    tune(base, data / "train.jsonl", tmp_path / "c", **file, **SHORT)
    assert len(lines(tmp_path / "c", "evaluations.jsonl")) == 3


# ------------------------------------------------------------------ going on


def test_resume_demands_what_it_goes_on_with(tmp_path, base, data):
    settings = SHORT | {"checkpoint_steps": 2, "eval_steps": 2, "accumulate": 2}
    with pytest.raises(MelinoeError, match="nothing to resume"):
        tune(base, data, tmp_path / "cut", resume=True, **settings)
    assert not (tmp_path / "cut.melinoe-partial").exists()
    tune(base, data, tmp_path / "whole", **settings)
    with interrupted_at(2 * 5 + 1):  # in the sixth step
        tune(base, data, tmp_path / "cut", **settings)
    with pytest.raises(MelinoeError, match="another one; got other learning_rate"):
        tune(base, data, tmp_path / "cut", resume=True, **settings | {"learning_rate": 1e-4})
    with pytest.raises(MelinoeError, match="contradict"):
        tune(base, data, tmp_path / "cut", resume=True, overwrite=True, **settings)
    free = {"batch_tokens": 64, "gradient_checkpointing": True}  # changes no loss
    result = tune(base, data, tmp_path / "cut", resume=True, **settings | free)
    assert result["resumed_from"] == 4
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    for name in ("losses.jsonl", "evaluations.jsonl"):
        steps = [record["step"] for record in lines(tmp_path / "cut", name)]
        assert steps == [record["step"] for record in lines(tmp_path / "whole", name)]


def test_overwrite_starts_anew(tmp_path, base, data):
    settings = SHORT | {"checkpoint_steps": 2}
    with interrupted_at(4):
        tune(base, data, tmp_path / "cut", **settings)
    result = tune(base, data, tmp_path / "cut", overwrite=True, **settings)
    assert result["resumed_from"] is None
    assert [record["step"] for record in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
