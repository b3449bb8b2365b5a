"""Quality: batched numbers equal the ones made row by row, and the filters do what they say."""

import math

import numpy as np
import pytest
import torch

from melinoe.data.rows import Row, encode, read_rows
from melinoe.errors import MelinoeError
from melinoe.measure.quality import evaluate, exact_match, final_answer
from melinoe.tiny import data_path
from text_model import model_and_tokenizer, rows


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


def test_exact_match_filters():
    assert exact_match(" yes \n", "yes")
    assert not exact_match("yes, it is", "yes")
    assert exact_match("wrong steps\n#### 1,200.", "right steps\n#### 1200")
    assert not exact_match("1200", "steps\n#### 1200")
    assert exact_match("#### $5\nno, #### -7", "#### -7")
    assert final_answer("no number ####") is None


def test_mistakes_are_named():
    with pytest.raises(
        MelinoeError, match=r"unknown metric; got 'bleu'; allowed: perplexity, exact_match, rouge_l"
    ):
        evaluate(model_and_tokenizer(), rows(), metrics="bleu")
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
