"""Quality: batched numbers equal the ones made row by row, and the filters do what they say."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from melinoe.data.encoding import encode, encode_prompt
from melinoe.data.rows import Row, read_rows
from melinoe.errors import MelinoeError
from melinoe.measure.quality import evaluate, greedy_completions
from melinoe.tiny import data_path
from text_model import model_and_tokenizer, rows, tokenizer


def test_likelihood_equals_row_by_row():
    model, tokenizer = model_and_tokenizer()
    result = evaluate(
        (model, tokenizer), rows(), metrics="perplexity", batch_size=5, progress=False, per_row=True
    )
    total, tokens = 0.0, 0
    for row, batched in zip(rows(), result["per_row"]["nll"], strict=True):
        encoded = encode(tokenizer, row)
        labels = torch.tensor([[-100] * encoded.prompt_length + encoded.ids[encoded.prompt_length :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([encoded.ids]), labels=labels).loss
        count = len(encoded.ids) - encoded.prompt_length
        assert batched == pytest.approx(float(loss) * count, rel=1e-4)
        total, tokens = total + float(loss) * count, tokens + count
    assert result["num_tokens"] == tokens
    assert result["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["nll"]))
    assert "exact_match" not in result
    assert set(result["tasks"]) == {"sum", "echo"}
    weights = {task: part["num_tokens"] for task, part in result["tasks"].items()}
    mean = sum(result["tasks"][task]["nll"] * weights[task] for task in weights) / sum(weights.values())
    assert mean == pytest.approx(result["nll"])


def test_completions_equal_row_by_row_generation():
    model, tokenizer = model_and_tokenizer()
    result = evaluate(
        (model, tokenizer),
        rows(),
        metrics=["rouge_l"],
        batch_size=4,
        max_new_tokens=6,
        progress=False,
        per_row=True,
    )
    for row, text in zip(rows(), result["per_row"]["completions"], strict=True):
        ids = torch.tensor([encode(tokenizer, row).ids[: encode(tokenizer, row).prompt_length]])
        alone = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        assert text == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    assert 0 <= result["rouge_l"] <= 1
    assert "nll" not in result


def test_an_answer_beside_a_longer_prompt_has_the_room_it_has_alone():
    """The context is full sooner for a longer prompt, and for nobody beside it."""
    model, words = model_and_tokenizer()
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = 1
    model.config.max_position_embeddings = 40
    prompts = [encode_prompt(words, "ab" * n) for n in (3, 17, 16, 4)]
    alone = [greedy_completions(model, words, [one], 20, progress=False)[0] for one in prompts]
    assert len(set(map(len, alone))) > 2
    assert greedy_completions(model, words, prompts, 20, batch_size=4, progress=False) == alone


def test_perfect_references_score_one():
    """The model's own completions as references."""
    model, tokenizer = model_and_tokenizer()
    first = evaluate(
        (model, tokenizer), rows(6), metrics="rouge_l", max_new_tokens=5, progress=False, per_row=True
    )
    own = [
        Row(row.messages, text, row.task)
        for row, text in zip(rows(6), first["per_row"]["completions"], strict=True)
    ]
    result = evaluate((model, tokenizer), own, metrics="exact_match", max_new_tokens=5, progress=False)
    assert result["exact_match"] == 1.0


def test_a_filter_is_chosen_by_the_data_set():
    """GSM8K's by its name, as a task or as the data set; nobody else's however the references look."""
    model, tokenizer = model_and_tokenizer()
    marked = [replace(row, completion=f"{row.completion}\n#### 4") for row in rows(4)]
    settings = {"metrics": "exact_match", "max_new_tokens": 2, "progress": False}
    plain = evaluate((model, tokenizer), marked, **settings)
    assert plain["answers"] == {"text": 4} and "exact_match_flexible" not in plain
    assert "--answers strict" in plain["notes"][0]
    known = evaluate((model, tokenizer), [replace(row, task="gsm8k") for row in marked], **settings)
    assert known["answers"] == {"strict": 4} and known["notes"] == []
    assert 0 <= known["exact_match"] <= known["exact_match_flexible"]
    asked = evaluate((model, tokenizer), marked, answers="flexible", **settings)
    assert asked["answers"] == {"flexible": 4} and asked["notes"] == []
    mixed = evaluate((model, tokenizer), [replace(marked[0], task="gsm8k"), *rows(2)], **settings)
    assert mixed["answers"] == {"strict": 1, "text": 2}
    with pytest.raises(
        MelinoeError, match="unknown way to compare answers; got guess; allowed: text, strict, flexible"
    ):
        evaluate((model, tokenizer), marked, answers="guess")


def test_every_answer_of_a_conversation_is_scored():
    """The likelihood against the logarithms of the answers' tokens, one row at a time."""
    model, tokenizer = model_and_tokenizer()
    turns = ({"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"})
    row = Row((*turns, {"role": "user", "content": "say ab"}), "ab")
    encoded = encode(tokenizer, row)
    assert [tokenizer.decode(encoded.ids[a:b]) for a, b in encoded.answers] == ["2<eos>", "ab<eos>"]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
    by_answer = [
        -sum(float(log_probabilities[i - 1, encoded.ids[i]]) for i in range(*span))
        for span in encoded.answers
    ]
    settings = {"metrics": "perplexity", "progress": False}
    both = evaluate((model, tokenizer), [row, *rows(3)], per_row=True, **settings)["per_row"]
    assert both["nll"][0] == pytest.approx(sum(by_answer), rel=1e-5) and both["tokens"][0] == 5
    last = evaluate((model, tokenizer), [row], last_turn_only=True, **settings)
    assert last["nll"] * last["num_tokens"] == pytest.approx(by_answer[1], rel=1e-5)


def test_the_end_of_an_answer_is_that_of_its_template():
    """A model that ends as its template does, where the tokenizer's own end token is another: Phi's case."""
    model, _ = model_and_tokenizer()
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }}<sep>{% endfor %}"
    words.chat_template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    row = rows(1)[0]
    scored = evaluate((model, words), [row], metrics="perplexity", progress=False)
    ids = words.apply_chat_template(row.conversation)["input_ids"]
    assert words.convert_ids_to_tokens(ids)[-2:] == ["<sep>", "<eos>"]
    start = len(words.apply_chat_template(list(row.messages))["input_ids"]) - 1  # without its <eos>
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    losses = [-float(log_probabilities[i - 1, ids[i]]) for i in range(start, len(ids))]
    assert scored["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    theirs = copy.deepcopy(model)
    theirs.generation_config.eos_token_id = [2, words.convert_tokens_to_ids("<sep>")]
    scored = evaluate((theirs, words), [row], metrics="perplexity", progress=False)
    assert scored["num_tokens"] == len(losses) - 1  # <eos> stands behind the end and is never generated
    assert scored["nll"] == pytest.approx(sum(losses[:-1]) / (len(losses) - 1), rel=1e-5)


def greedy(model, words, row, **settings):
    ids = torch.tensor([encode_prompt(words, row)])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )[0, ids.shape[1] :].tolist()


def test_completions_end_where_the_checkpoint_says():
    """Each of its end tokens ends a completion, and so do its stop_strings; neither is part of it."""
    model, words = copy.deepcopy(model_and_tokenizer())
    prompts = [encode_prompt(words, row) for row in rows(6)]
    free = [greedy(model, words, row) for row in rows(6)]
    chosen = free[0][2]
    model.generation_config.eos_token_id = [2, chosen]
    expected = [
        words.decode(said[: said.index(chosen)] if chosen in said else said, skip_special_tokens=True)
        for said in free
    ]
    assert greedy_completions(model, words, prompts, 8, progress=False) == expected
    model.generation_config.eos_token_id = 2
    text = words.decode(free[1], skip_special_tokens=True)
    model.generation_config.stop_strings = [text[2]]
    found = greedy_completions(model, words, prompts, 8, progress=False)
    assert found[1] == text.partition(text[2])[0] and len(found[1]) <= 2


def test_what_a_checkpoint_wants_otherwise_is_said():
    model, words = copy.deepcopy(model_and_tokenizer())
    config = model.generation_config
    config.do_sample, config.temperature, config.num_return_sequences = True, 0.6, 2
    config.return_dict_in_generate = True
    found = evaluate((model, words), rows(3), metrics="rouge_l", max_new_tokens=4, progress=False)
    assert found["notes"] == [
        "greedy (completions are compared), where the checkpoint draws (temperature 0.6)",
        "one answer, where the checkpoint asks for 2",
    ]
    plain, _ = model_and_tokenizer()
    assert (
        found["rouge_l"]
        == evaluate((plain, words), rows(3), metrics="rouge_l", max_new_tokens=4, progress=False)["rouge_l"]
    )
    config.num_return_sequences, config.num_beams = 1, 3
    prompts = [encode_prompt(words, row) for row in rows(3)]
    beams = greedy_completions(model, words, prompts, 8, progress=False)
    for row, text in zip(rows(3), beams, strict=True):
        alone = greedy(plain, words, row, num_beams=3)
        assert text == words.decode(alone, skip_special_tokens=True)


def test_rows_left_out_are_counted():
    model, words = model_and_tokenizer()
    long = Row(({"role": "user", "content": "a" * 300},), "b")  # the model sees 256 tokens
    empty = Row(({"role": "user", "content": "a"},), "")
    found = evaluate((model, words), [*rows(3), long, empty], metrics="perplexity", progress=False)
    assert (found["num_rows"], found["num_rows_left_out"], found["max_length"]) == (3, 2, 256)
    assert found["left_out"] == {"too_long": 1, "empty": 1}
    assert found["notes"] == ["2 of 5 rows left out: 1 over 256 tokens, 1 with an empty answer"]
    short = evaluate((model, words), rows(6), metrics="perplexity", max_length=9, progress=False)
    assert 0 < short["num_rows_left_out"] < 6


def test_mistakes_are_named():
    with pytest.raises(
        MelinoeError, match=r"unknown metric; got 'bleu'; allowed: perplexity, exact_match, rouge_l"
    ):
        evaluate(model_and_tokenizer(), rows(), metrics="bleu")
    for nothing in ("", ",", []):
        with pytest.raises(MelinoeError, match="unknown metric; got ''"):
            evaluate(model_and_tokenizer(), rows(), metrics=nothing)
    with pytest.raises(MelinoeError, match="need prompts"):
        evaluate(model_and_tokenizer(), [Row((), "plain text")])
    plain = evaluate(model_and_tokenizer(), [Row((), "plain text")], metrics="perplexity", progress=False)
    assert plain["num_rows"] == 1
    assert np.isfinite(plain["nll"])


def test_a_store_is_scored_like_its_checkpoint(tiny_store):
    held_out = read_rows(data_path(), "test", limit=12)
    paged = evaluate(str(tiny_store), held_out, metrics="perplexity,exact_match", progress=False)
    stock = evaluate("tiny", held_out, metrics="perplexity,exact_match", progress=False)
    assert paged["nll"] == pytest.approx(stock["nll"], rel=1e-3)
    assert paged["exact_match"] == stock["exact_match"]
