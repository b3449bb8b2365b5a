"""Tuning end to end on tiny random models: low rank = PEFT, losses fall, foreign folders are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.moe import grouped_mm_experts_forward, use_experts_implementation

from interrupting import interrupted_at
from melinoe.adapters.merge import merge
from melinoe.adapters.peft_folder import apply_adapter
from melinoe.errors import MelinoeError
from melinoe.experts.low_rank import attach_low_rank, fold_low_rank, tuning_experts
from melinoe.models.layers import fingerprint, moe_layers
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.batches import plan_batches
from melinoe.tuning.trainer import LocalityTrainer
from melinoe.tuning.tune import tune

torch.set_num_threads(1)
SHORT = {"max_steps": 6, "batch_tokens": 128, "max_length": 32, "rank": 4, "progress": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": f"w{i} w{i + 1} w{(3 * i) % 40}", "completion": f"w{i + 2} w{i + 3} w5"} for i in range(30)
    ]
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def checkpoint(folder, family="olmoe", dtype=torch.bfloat16, seed=0):
    """A random model with a word-level tokenizer, saved as any checkpoint is."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    sizes |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if family == "olmoe":
        config = transformers.OlmoeConfig(**sizes, num_experts=8, initializer_range=0.2)
    else:
        config = transformers.MixtralConfig(
            **sizes, num_local_experts=4, sliding_window=None, initializer_range=0.2
        )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(50)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("base"), dtype=torch.float32)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, base, data):
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    return folder, tune(base, data, folder, **SHORT)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


FAST = {
    "max_steps": 30,
    "learning_rate": 5e-3,
    "router_learning_rate": 2e-2,
    "lambda_cs": 3.0,
    "lambda_rm": 0.0,
}
IDS = torch.arange(3, 35).reshape(2, 16)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


# ------------------------------------------------------------------ the experts function


def experts_module(has_gate, has_bias, is_transposed, post_norm):
    @use_experts_implementation(
        has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed, has_post_expert_norm=post_norm
    )
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, hidden, inner, up = 5, 12, 8, 16 if has_gate else 8
            first = "gate_up_proj" if has_gate else "up_proj"
            for name, size_in, size_out in ((first, hidden, up), ("down_proj", inner, hidden)):
                shape = (5, size_in, size_out) if is_transposed else (5, size_out, size_in)
                setattr(self, name, nn.Parameter(torch.randn(shape) * 0.3))
                if has_bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(5, size_out)))
            self.act_fn = nn.SiLU()
            if post_norm:
                self.post_expert_norm = nn.LayerNorm(hidden)

        def forward(self, *args):
            raise NotImplementedError

    return Experts(transformers.OlmoeConfig())


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize("post_norm", [True, False])
def test_tuning_experts_equal_merged_weights(has_gate, has_bias, is_transposed, post_norm):
    """Value and gradient equal transformers' own function on W + dW; sentinels add nothing."""
    torch.manual_seed(0)
    module = experts_module(has_gate, has_bias, is_transposed, post_norm)
    low_rank = attach_low_rank(module, 3, 6.0)
    with torch.no_grad():
        for parameter in low_rank.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    index = torch.randint(0, 4, (7, 2))  # expert 4 is never asked for
    index[2, 1] = index[5] = 5  # sentinels
    weights, x = torch.rand(7, 2), torch.randn(7, 12)
    names = {"up": "gate_up_proj" if has_gate else "up_proj", "down": "down_proj"}

    def run(function, merged):
        x_, weights_ = x.clone().requires_grad_(), weights.clone().requires_grad_()
        originals = {}
        if merged:
            for projection, name in names.items():
                a, b = low_rank.factors(projection)
                delta = low_rank.scale * (b @ a)
                originals[name] = module._parameters.pop(name)
                setattr(module, name, originals[name].detach() + (delta.mT if is_transposed else delta))
        out = function(module, x_, index, weights_)
        for name, original in originals.items():
            delattr(module, name)
            setattr(module, name, original)
        grads = torch.autograd.grad(
            out.pow(2).sum(), [x_, weights_, *low_rank.parameters()], allow_unused=True
        )
        return out, grads

    module._is_expert_parallel = True  # tells transformers' function that there are sentinels
    ours, our_grads = run(tuning_experts, False)
    theirs, their_grads = run(grouped_mm_experts_forward, True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours[5] == 0).all()
    for mine, other in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5 * float(other.abs().max()), rtol=1e-4)
    one = low_rank.term(x, 1, "up")
    torch.testing.assert_close(one, low_rank.scale * x @ low_rank.up_A[1].T @ low_rank.up_B[1].T)
    fold_low_rank(module)
    torch.testing.assert_close(tuning_experts(module, x, index, weights), ours, atol=1e-5, rtol=1e-5)


def test_low_rank_equals_peft(base):
    """Same factors, same logits and gradients as PEFT's target_parameters."""
    peft = pytest.importorskip("peft")
    ours, theirs = load(base), load(base)
    targets = [
        f"{layer.experts_name}.{name}" for layer in moe_layers(ours) for name in ("gate_up_proj", "down_proj")
    ]
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=[], target_parameters=targets, init_lora_weights=False
    )
    theirs = peft.get_peft_model(theirs, config)
    wrapped = {
        name.split("base_model.model.")[1]: parameter
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    ours.requires_grad_(False)
    pairs = []
    for layer in moe_layers(ours):
        low_rank = attach_low_rank(layer.experts, 4, 2.0)
        for projection, nest in (("up", ".base_layer"), ("down", "")):
            start = f"{layer.experts_name}{nest}"
            a, b = (wrapped[f"{start}.lora_{x}.default.weight"] for x in "AB")
            mine_a, mine_b = low_rank.factors(projection)
            mine_a.data = a.data.reshape(mine_a.shape).clone()
            mine_b.data = b.data.reshape(b.shape[0], 4, -1).permute(2, 0, 1).contiguous()
            pairs += [(mine_a, a), (mine_b, b)]
    ours.set_experts_implementation("melinoe_tuning")
    mine, other = ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    mine.pow(2).mean().backward()
    other.pow(2).mean().backward()
    for number, (a, b) in enumerate(pairs):
        grad = (
            b.grad.reshape(a.shape) if number % 2 == 0 else b.grad.reshape(b.shape[0], 4, -1).permute(2, 0, 1)
        )
        torch.testing.assert_close(a.grad, grad, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ tune


def test_a_few_steps_reduce_the_losses(tmp_path, base, data):
    result = tune(base, data, tmp_path / "a", **SHORT | FAST)
    log = [json.loads(line) for line in (tmp_path / "a" / "losses.jsonl").read_text().splitlines()]
    assert len(log) == result["steps"] == 30
    first, last = log[:5], log[-5:]
    for name in ("nll", "misses"):
        assert sum(r[name] for r in last) < 0.9 * sum(r[name] for r in first), name
    assert result["skipped_steps"] == 0
    assert result["tokens"] > 0
    assert not (tmp_path / "a.melinoe-partial").exists()


def test_every_router_and_factor_moves_and_nothing_else(tuned, base):
    folder, result = tuned
    before, after = load(base), load(base)
    apply_adapter(after, folder)
    for old, new in zip(moe_layers(before), moe_layers(after), strict=True):
        assert not torch.equal(old.router.weight, new.router.weight)
        assert all(factor.abs().sum() > 0 for factor in new.experts.low_rank.parameters())
    changed = {
        name
        for name, value in before.state_dict().items()
        if not torch.equal(value, after.state_dict()[name])
    }
    assert changed == {f"{layer.router_name}.weight" for layer in moe_layers(before)}
    assert result["base_fingerprint"] == fingerprint(before)
    assert result["fingerprint"] == fingerprint(after) != fingerprint(before)


def test_same_seed_same_adapter(tmp_path, tuned, base, data):
    folder, _ = tuned
    tune(base, data, tmp_path / "again", **SHORT)
    tune(base, data, tmp_path / "other", **SHORT, seed=1)
    weights = [
        (f / "adapter_model.safetensors").read_bytes()
        for f in (folder, tmp_path / "again", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_control_and_paper_objective_on_bfloat16_checkpoints(tmp_path, data, family):
    base = checkpoint(tmp_path / "base", family)
    common = SHORT | {"max_steps": 2}
    control = tune(base, data, tmp_path / "control", lambda_cs=0, lambda_rm=0, **common)
    paper = tune(base, data, tmp_path / "paper", objective="paper", lambda_cs=0.5, **common)
    assert control["total"] == pytest.approx(control["nll"], rel=0.2)
    assert paper["misses"] is not None
    merge(base, tmp_path / "paper", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    auto = tune(base, data, tmp_path / "auto", dtype="auto", **common)  # what a GPU would do, on bfloat16
    assert auto["nll"] == pytest.approx(control["nll"], rel=0.1)


def test_base_router_stays_frozen(base, data, tmp_path, monkeypatch):
    seen = []
    original = LocalityTrainer.train
    monkeypatch.setattr(
        LocalityTrainer, "train", lambda self, **k: (seen.append(self), original(self, **k))[1]
    )
    tune(base, data, tmp_path / "a", **SHORT)
    for router, layer in zip(seen[0].losses.base_routers, moe_layers(load(base)), strict=True):
        assert torch.equal(router.weight, layer.router.weight)


def test_interrupted_run_resumes_to_the_same_adapter(tmp_path, base, data):
    settings = SHORT | {"checkpoint_steps": 2}
    tune(base, data, tmp_path / "whole", **settings)
    with interrupted_at(6):
        tune(base, data, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / "cut.melinoe-partial" / "checkpoint").is_dir()
    result = tune(base, data, tmp_path / "cut", **settings)
    assert result["resumed_from"] == 4
    names = ("adapter_model.safetensors",)
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = (tmp_path / "cut" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_non_finite_step_is_skipped_and_never_saved(tmp_path, base, data, monkeypatch):
    original, calls = LocalityTrainer.compute_loss, []

    def poisoned(self, *args, **kwargs):
        calls.append(1)
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if len(calls) in (2, 3) else loss

    monkeypatch.setattr(LocalityTrainer, "compute_loss", poisoned)
    result = tune(base, data, tmp_path / "a", **SHORT)
    assert result["skipped_steps"] == 2
    apply_adapter(load(base), tmp_path / "a")
    monkeypatch.setattr(
        LocalityTrainer, "compute_loss", lambda self, *a, **k: original(self, *a, **k) * float("nan")
    )
    with pytest.raises(MelinoeError, match="not finite"):
        tune(base, data, tmp_path / "b", **SHORT | {"max_steps": 20})
    assert not (tmp_path / "b").exists()


def test_time_limit_ends_a_run_early(tmp_path, base, data):
    result = tune(base, data, tmp_path / "a", **SHORT | {"max_steps": 10_000, "time_limit": 1.0})
    assert 0 < result["steps"] < 10_000


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_rates_rise_over_a_share_of_the_run_whatever_ends_it(warmup):
    """Counted by steps alone, a run that its time ends would rise nearly to its end."""
    trainer = object.__new__(LocalityTrainer)
    for limits in ({"max_steps": 100}, {"max_steps": 10_000, "time_limit": 100.0}):
        trainer.settings = TuneSettings(warmup=warmup, **limits)
        rates = []
        for step in range(100):  # of one second each
            trainer.seconds = float(step)
            rates.append(trainer._learning_rate_at(step))
        assert 0.9 <= max(rates) <= 1
        assert rates.index(max(rates)) == pytest.approx(100 * warmup, abs=1)
        assert rates[50] == pytest.approx(0.5, abs=0.1) and rates[99] < 0.15


def test_output_folder_is_respected(tmp_path, base, data):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(MelinoeError, match="exists already and is not replaced"):
            tune(base, data, tmp_path / "mine", overwrite=overwrite, **SHORT)
        with pytest.raises(MelinoeError, match="exists already and is not replaced"):
            merge(base, tmp_path / "no-adapter", tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma": 1.5},
        {"objective": "fast"},
        {"max_steps": 0},
        {"slots": 1},
        {"slots": 9},
        {"lambda_cs": -1},
        {"x": 1},
    ],
)
def test_settings_are_checked(tmp_path, base, data, wrong):
    with pytest.raises(MelinoeError):
        tune(base, data, tmp_path / "a", **SHORT | wrong)
    assert not (tmp_path / "a").exists()


def test_capacity_follows_the_paper():
    assert TuneSettings().capacity(64, 8) == 16
    assert TuneSettings().capacity(8, 4) == 4
    assert TuneSettings(slots=12).capacity(32, 4) == 12


def test_batches_keep_their_budget_and_use_every_row():
    lengths = [3, 50, 7, 20, 20, 9, 64, 1] * 5
    plan = plan_batches(lengths, 64, 40, seed=3)
    assert plan == plan_batches(lengths, 64, 40, seed=3) != plan_batches(lengths, 64, 40, seed=4)
    assert len(plan) == 40
    assert all(len(rows) * max(lengths[r] for r in rows) <= 64 for rows in plan)
    assert {r for rows in plan for r in rows} == set(range(len(lengths)))


# ------------------------------------------------------------------ adapter and merge


def test_merged_equals_applied_and_needs_no_melinoe(tmp_path, tuned, base):
    folder, result = tuned
    applied = load(base)
    card = apply_adapter(applied, folder)
    assert card["format_version"] == 1
    assert card["settings"]["rank"] == 4
    report = merge(base, folder, tmp_path / "merged")
    assert report["fingerprint"] == result["fingerprint"]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "melinoe" not in json.dumps(config)
    assert "quantization_config" not in config
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(applied), atol=1e-5, rtol=1e-5)
    assert (logits(load(base)) - logits(merged)).abs().max() > 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("w1 w2")["input_ids"] == AutoTokenizer.from_pretrained(base)("w1 w2")["input_ids"]
    assert merged.generation_config.eos_token_id == load(base).generation_config.eos_token_id


def test_peft_opens_the_adapter(tuned, base):
    peft = pytest.importorskip("peft")
    folder, _ = tuned
    ours = load(base)
    apply_adapter(ours, folder)
    theirs = peft.PeftModel.from_pretrained(load(base), str(folder)).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)
    model = theirs.merge_and_unload()
    torch.testing.assert_close(logits(model), logits(ours), atol=1e-5, rtol=1e-5)


def test_adapter_of_another_model_is_refused(tmp_path, tuned, data):
    folder, _ = tuned
    other = load(checkpoint(tmp_path / "other", dtype=torch.float32, seed=5))
    before = logits(other)
    with pytest.raises(MelinoeError, match="another model"):
        apply_adapter(other, folder)
    assert torch.equal(logits(other), before)
    with pytest.raises(MelinoeError, match="another model"):
        merge(checkpoint(tmp_path / "mixtral", "mixtral"), folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


ADDED = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "q_proj")


@pytest.mark.parametrize("changed", ADDED)
def test_what_peft_would_add_otherwise_is_refused(tmp_path, tuned, base, changed):
    """Somebody went on with an adapter in PEFT, in its folder: half of it is worse than none."""
    folder = shutil.copytree(tuned[0], tmp_path / "adapter")
    if changed == "q_proj":
        weights = load_file(folder / "adapter_model.safetensors")
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        save_file({**weights, name: torch.ones(2, 32)}, folder / "adapter_model.safetensors")
    else:
        config = json.loads((folder / "adapter_config.json").read_text())
        config[changed] = {"experts": 7} if "pattern" in changed else True
        (folder / "adapter_config.json").write_text(json.dumps(config))
    model = load(base)
    before = logits(model)
    with pytest.raises(MelinoeError, match=f"{changed}.*with PEFT"):
        apply_adapter(model, folder)
    assert torch.equal(logits(model), before)


def test_adapter_is_not_applied_twice_and_broken_ones_are_named(tmp_path, tuned, base):
    folder, _ = tuned
    model = load(base)
    apply_adapter(model, folder)
    with pytest.raises(MelinoeError, match="already"):
        apply_adapter(model, folder)
    with pytest.raises(MelinoeError, match="no such adapter"):
        apply_adapter(model, tmp_path / "nothing")
    (tmp_path / "half").mkdir()
    for name in ("melinoe.json", "adapter_config.json"):
        (tmp_path / "half" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(MelinoeError):
        apply_adapter(load(base), tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(MelinoeError, match="cannot read"):
        apply_adapter(load(base), tmp_path / "half")
