"""Rotary positions of every kind that transformers has: the tokens are stock transformers', in pieces too."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import melinoe
from families import save_checkpoint
from melinoe.data.columns import Row
from melinoe.data.encoding import encode
from melinoe.measure.quality import completion_nll, greedy_completions
from melinoe.measure.trace import read_routing
from melinoe.models.positions import fixed_length
from melinoe.runtime import division
from melinoe.runtime.load import align, load_tokenizer
from melinoe.serving.engine.batched import BatchedEngine, CannotBatchError
from melinoe.tuning.settings import TuneSettings
from melinoe.tuning.step.pieces import logits_are_plain
from melinoe.tuning.training_rows import read_training_rows

ORIGINAL, LONGEST, NEW = 32, 256, 12
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "phimoe")
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def parameters(kind, half):
    """rope_parameters of a kind; half: of the numbers that are turned, how many frequencies there are."""
    found = {"rope_type": kind, "rope_theta": 10000.0}
    if kind != "default":
        found |= {"factor": 8.0}
    if kind in ("yarn", "longrope", "llama3"):
        found["original_max_position_embeddings"] = ORIGINAL
    if kind == "longrope":
        found |= {"short_factor": [1.0] * half, "long_factor": [4.0 + i for i in range(half)]}
        found |= {"short_mscale": 1.1, "long_mscale": 1.4}  # of phimoe alone
    if kind == "llama3":
        found |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return found


def checkpoint(folder, family, kind):
    save_checkpoint(folder, family)
    config = json.loads((folder / "config.json").read_text())
    turned = config.get("qk_rope_head_dim") or config.get("head_dim")
    turned = turned or config["hidden_size"] // config["num_attention_heads"]
    config["max_position_embeddings"] = LONGEST
    config["rope_parameters"] = config.get("rope_parameters", {}) | parameters(kind, turned // 2)
    if kind == "longrope":
        config["original_max_position_embeddings"] = ORIGINAL
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stock_tokens(model, prompt):
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def our_tokens(model, tokenizer, prompt):
    pieces = melinoe.stream_generate(model, tokenizer, prompt, max_new_tokens=NEW, ignore_eos=True)
    return [piece.token for piece in pieces if piece.token is not None]


def cases():
    for family in FAMILIES:
        for kind in {"phimoe": ("longrope",), "hunyuan_v1_moe": ("dynamic",)}.get(
            family, KINDS
        ):  # as published
            yield family, kind


def test_the_kinds_are_transformers():
    assert set(KINDS) - {"default"} <= set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize(("family", "kind"), list(cases()))
def test_tokens_are_those_of_stock_transformers(tmp_path, monkeypatch, family, kind):
    """Shorter than what was trained first, over its edge while decoding, and longer than it; the pieces of a
    prompt change nothing."""
    folder = checkpoint(tmp_path / "model", family, kind)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    align(stock)
    monkeypatch.setattr(division, "PREFILL_CHUNK", 16)
    ours = melinoe.load(folder, slots=2)
    tokenizer = load_tokenizer(folder)
    for length in (5, ORIGINAL - 4, ORIGINAL + 1, 2 * ORIGINAL):
        prompt = [3 + (7 * place) % 45 for place in range(length)]
        expected = stock_tokens(stock, prompt)
        assert our_tokens(ours, tokenizer, prompt) == expected
        assert our_tokens(stock, tokenizer, prompt) == expected
    logits_are_plain(stock)  # the other who runs models without weights


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_a_text_that_is_one_pass_has_its_work_space(tmp_path, monkeypatch, family):
    folder = checkpoint(tmp_path / "model", family, "longrope")
    monkeypatch.setattr(division, "PREFILL_CHUNK", 16)
    tokenizer = load_tokenizer(folder)
    short, long = (melinoe.load(folder, memory="400MiB", context=length) for length in (ORIGINAL, 100))
    assert (short.melinoe_budget.pass_tokens, long.melinoe_budget.pass_tokens) == (16, 100)
    assert long.melinoe_budget.work_bytes > short.melinoe_budget.work_bytes
    assert len(our_tokens(long, tokenizer, [5] * (100 - NEW))) == NEW


def test_texts_that_change_each_other_are_not_batched(tmp_path):
    folder = checkpoint(tmp_path / "model", "mixtral", "longrope")
    model = melinoe.load(folder, slots=2)
    with pytest.raises(CannotBatchError, match=f"beyond {ORIGINAL} tokens"):
        BatchedEngine(model, 2, ORIGINAL + 1, 4 * ORIGINAL).start()
    engine = BatchedEngine(model, 2, ORIGINAL, 4 * ORIGINAL)
    engine.start()
    engine.stop()


def test_rows_beside_each_other_are_measured_as_if_alone(tmp_path):
    folder = checkpoint(tmp_path / "model", "mixtral", "longrope")
    model, tokenizer = melinoe.load(folder, slots=8), load_tokenizer(folder)
    words = [f"w{3 + (7 * place) % 40}" for place in range(2 * ORIGINAL)]
    lengths = (5, ORIGINAL - 8, ORIGINAL + 3, 2 * ORIGINAL)
    texts = [" ".join(words[: length - 3]) + " " for length in lengths]
    rows = [Row(({"role": "user", "content": text},), "w9 w8") for text in texts]
    encoded = [encode(tokenizer, row) for row in rows]
    assert [len(one.ids) for one in encoded] == list(lengths)
    together = read_routing(model, encoded, batch_size=4, progress=False)
    for one, found in zip(encoded, together, strict=True):
        assert (found == read_routing(model, [one], progress=False)[0]).all()
    alone = [completion_nll(model, [one], progress=False)[0] for one in encoded]
    seen = []
    found = completion_nll(model, encoded, batch_size=4, progress=False, routing=seen)
    assert found == pytest.approx(alone, rel=1e-4)
    assert all((one == other).all() for one, other in zip(seen, together, strict=True))
    prompts = [one.ids[: one.prompt_length] for one in encoded]
    said = [greedy_completions(model, tokenizer, [one], NEW, progress=False) for one in prompts]
    assert greedy_completions(model, tokenizer, prompts, NEW, 4, progress=False) == [one for (one,) in said]


def test_rows_beside_each_other_are_tuned_as_if_alone(tmp_path):
    folder = checkpoint(tmp_path / "model", "mixtral", "longrope")
    words = [f"w{3 + (7 * place) % 40}" for place in range(2 * ORIGINAL)]
    texts = [" ".join(words[: length - 3]) for length in (5, ORIGINAL - 8, ORIGINAL + 3, 2 * ORIGINAL)]
    rows = [json.dumps({"prompt": text, "completion": "w9 w8"}) + "\n" for text in texts]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(rows))
    settings = {"max_length": 3 * ORIGINAL, "rank": 2, "eval_steps": 1, "eval_rows": 4, "max_steps": 1}
    nll = []
    for batch_tokens in (3 * ORIGINAL, 12 * ORIGINAL):
        output = tmp_path / str(batch_tokens)
        melinoe.tune(
            folder, data, output, eval_data=data, batch_tokens=batch_tokens, progress=False, **settings,
        )  # fmt: skip
        before, *_ = (output / "evaluations.jsonl").read_text().splitlines()
        nll.append(json.loads(before)["nll"])
    assert nll[0] == pytest.approx(nll[1], rel=1e-6)
    chosen = TuneSettings(**{**settings, "batch_tokens": 12 * ORIGINAL, "max_steps": 9})
    found = read_training_rows(folder, data, chosen, quiet=True)
    for step in found.plan:
        assert len({len(found.encoded[row].ids) > ORIGINAL for row in step}) == 1


def test_every_layer_type_counts(tmp_path):
    model = melinoe.load(checkpoint(tmp_path / "model", "mixtral", "default"), slots=2)
    assert fixed_length(model.config) is None
    model.config.rope_parameters = {
        "full_attention": parameters("longrope", 8),
        "sliding_attention": parameters("default", 8),
    }
    assert fixed_length(model.config) == ORIGINAL
