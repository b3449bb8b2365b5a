"""benchmarks/english on a model of a few neurons: what is trained is what transformers opens and melinoe
pages, and training starts from the dense model's own neurons."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TopPLogitsWarper

import chat_tokenizers
import melinoe
from melinoe.data.batching import batch_of
from melinoe.data.encoding import encode
from melinoe.data.rows import Row, read_rows
from text_model import model_and_tokenizer

FOLDER = Path(__file__).parents[1] / "benchmarks" / "english"
MODULES = tuple(file.stem for file in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in MODULES:  # they have plain names, and are nobody else's
        sys.modules.pop(name, None)


LAYERS, EXPERTS, SHARED = 30, 4, 8


def dense(num_layers: int = LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    words = model_and_tokenizer()[1]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": num_layers, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(words)}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=2)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 40, (1, 30), generator=generator) for _ in range(4)]


def test_all_experts_together_are_the_dense_layer():
    from cut import cut

    model, ids = dense(), batches()[0]
    with torch.no_grad():
        expected = model(ids).logits
        cut(model, batches(), EXPERTS, EXPERTS, SHARED)
        for layer in model.model.layers:
            layer.mlp.router.zero_()  # all chosen, all alike
        assert torch.allclose(model(ids).logits, expected, atol=1e-3)


def test_experts_are_as_large_as_each_other_and_hold_what_fires_together():
    from cut import divide

    kinds = torch.arange(32) % 4
    fires = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) > 0.7
    strength = fires[:, kinds] * (1 + torch.rand(200, 32, generator=torch.Generator().manual_seed(1)))
    found = kinds[divide(strength, 4)].reshape(4, 8)
    assert (found == found[:, :1]).all() and found[:, 0].sort().values.tolist() == [0, 1, 2, 3]


def test_what_is_trained_is_what_transformers_opens_and_melinoe_pages(tmp_path):
    """30 layers, bit for bit: the factors that go into the down projections are powers of two."""
    from cut import cut
    from export import to_transformers

    model, words = dense(), model_and_tokenizer()[1]
    cut(model, batches(), EXPERTS, 2, SHARED)
    made, ids = to_transformers(model), batches()[0]
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, model(ids).logits, atol=1e-3)
    made.save_pretrained(tmp_path / "english")
    words.save_pretrained(tmp_path / "english")
    resident = melinoe.load(tmp_path / "english", slots=EXPERTS)
    paged = melinoe.load(tmp_path / "english", slots=2)
    with torch.no_grad():
        assert torch.equal(paged(ids).logits, resident(ids).logits)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "english")
        assert torch.allclose(paged(ids).logits, opened(ids).logits, atol=1e-4)


def test_training_goes_on_where_it_was_and_comes_nearer(tmp_path, monkeypatch):
    import train as training
    from cut import cut, cut_anywhere
    from rows import encoded

    monkeypatch.setattr(training, "CROSS_ENTROPY", 0.0)  # it leads away from a dense model of random weights

    rows = [json.dumps({"prompt": f"{i}+{i}=?", "completion": str(2 * i)}) for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    teacher, words = dense(3), model_and_tokenizer()[1]
    data = encoded(words, [tmp_path], "train")
    assert len(data) == len(read_rows(tmp_path, "train"))
    whole, parts = dense(3), dense(3)
    for model, steps in ((whole, (12,)), (parts, (5, 12))):
        folder = tmp_path / str(len(steps))
        folder.mkdir()
        cut(model, batches(), EXPERTS, 2, SHARED)
        for number, until in enumerate(steps):
            if number:
                model = dense(3)
                cut_anywhere(model, EXPERTS, 2, SHARED)
            training.train(teacher, model, data, folder, 12, stop_at=until, tokens=4096)
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").open()] for n in "12"]
    assert [line["kl"] for line in logs[0]] == [line["kl"] for line in logs[1]]
    kl = [line["kl"] for line in logs[0]]
    assert kl[-1] < 0.9 * kl[0]


def test_conversations_that_a_model_makes_up(monkeypatch):
    """What it is given is the template's text before and behind a question, and a batch repeats itself."""
    import talk

    words = copy.deepcopy(chat_tokenizers.tokenizer(template=SMOL))
    words.bos_token, words.eos_token, words.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    monkeypatch.setattr(talk, "QUESTION_TOKENS", 200)
    monkeypatch.setattr(talk, "ANSWER_TOKENS", 200)
    monkeypatch.setattr(talk, "MOST", 400)  # of the random model any token, the end of a turn too
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(words),
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = words.eos_token_id
    given: list[str] = []
    say = talk._say
    monkeypatch.setattr(talk, "_say", lambda m, t, texts, *how: given.extend(texts) or say(m, t, texts, *how))
    rows = talk.conversations(model, words, 3, 12)
    assert talk.conversations(model, words, 3, 12) == rows != talk.conversations(model, words, 4, 12)
    opening = "<|im_start|>system\nYou are SmolLM<|im_end|>\n<|im_start|>user\n"
    assert given[:4] == [opening, f"{opening}What is", opening, f"{opening}Who"]
    behind = "<|im_end|>\n<|im_start|>assistant\n"
    assert rows and all(row["completion"] for row in rows)
    for row in rows:
        assert f"{given[0]}{row['prompt']}{behind}" in given[12:24]
    assert talk.whole_sentences('He said "no." Then 3.5 of th') == 'He said "no."'
    assert talk.whole_sentences("1. One\n2. Tw") == "1. One" and talk.whole_sentences("No end") == ""


def test_the_likeliest_tokens_are_those_of_top_p():
    from talk import NUCLEUS, Nucleus

    scores = torch.randn(5, 90, generator=torch.Generator().manual_seed(0)) * 3
    theirs = TopPLogitsWarper(NUCLEUS)(None, scores / 0.7)
    assert torch.equal(Nucleus(0.7)(None, scores).isinf(), theirs.isinf())
    assert 1 < theirs.isfinite().sum(-1).float().mean() < 60


def test_a_cut_is_repeated_from_what_was_kept_of_it():
    from cut import cut, cut_as

    first, again, ids = dense(2), dense(2), batches()[0]
    cut_as(again, cut(first, batches(), EXPERTS, 2, SHARED), 2, SHARED)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, first(ids).logits)


def test_training_ends_when_its_time_is_over(tmp_path):
    import train as training
    from cut import cut
    from rows import encoded

    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1+1=?", "completion": "2"}))
    model, data = dense(1), encoded(model_and_tokenizer()[1], [tmp_path], "train")
    cut(model, batches(), EXPERTS, 2, SHARED)
    training.train(dense(1), model, data, tmp_path, 10**6, seconds=0.3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert lines[-1]["step"] == len(lines) < 10**5
    assert lines[-1]["lr"] == 0 and (tmp_path / "state.pt").exists()


SMOL = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are SmolLM<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def test_a_tokenizer_whose_padding_is_the_end_of_every_turn():
    """SmolLM2's: bos is <|im_start|>, pad and eos are both <|im_end|>, and the template writes a line end
    behind it and a system message of its own."""
    words = copy.deepcopy(chat_tokenizers.tokenizer(template=SMOL))
    words.bos_token, words.eos_token, words.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    turns = [("user", "Hello"), ("assistant", "Hi there"), ("user", "2+2?"), ("assistant", "4")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    found = encode(words, Row(messages[:3], "4"))
    assert [words.decode(found.ids[a:b]) for a, b in found.answers] == ["Hi there<|im_end|>", "4<|im_end|>"]
    prompt = words.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert found.ids[: found.answers[1][0]] == list(prompt)
    assert words.decode(found.ids).startswith("<|im_start|>system\nYou are SmolLM<|im_end|>\n")
    batch = batch_of([found, encode(words, Row(messages[:1], "Hi"))], words.pad_token_id)
    real = batch["attention_mask"].bool()
    assert (batch["input_ids"][~real] == words.eos_token_id).all()  # padding, and yet no answer's end
    assert not (batch["answers"] & ~real).any()
    assert int(batch["answers"][1].sum()) == len(words("Hi", add_special_tokens=False)["input_ids"]) + 1
