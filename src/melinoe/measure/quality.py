"""What a model still knows: likelihood, exact match and Rouge-L on rows of text.

A faster model is worth its speed only at the quality that stands beside it. Likelihood is read
teacher-forced and moves with every small change; exact match and Rouge-L judge greedy completions.
Works on any model that transformers can run: resident, tuned, merged or offloaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melinoe.data.batching import length_batches, pad
from melinoe.data.rows import Encoded, Row, encode_rows
from melinoe.errors import MelinoeError
from melinoe.losses.likelihood import next_token_positions, sequence_nll
from melinoe.measure.trace import TOKENS_PER_BATCH, data_rows, open_model, track
from melinoe.models.logits import logits_at

METRICS = ("perplexity", "exact_match", "rouge_l")
GENERATION_BATCH = 64  # rows decoded side by side, where no batch size is given
MAX_LOGITS = 2**27  # elements of one [B, S, V] block: half a GiB in float32


@torch.no_grad()
def completion_nll(
    model: Any,
    sequences: list[Encoded],
    batch_size: int | None = None,
    pad_token_id: int = 0,
    progress: bool = True,
) -> np.ndarray:
    """[S] float64: negative log-likelihood of each completion, nats, summed over its tokens and end token."""
    result = np.zeros(len(sequences))
    budget = max(1, min(TOKENS_PER_BATCH, MAX_LOGITS // model.config.get_text_config().vocab_size))
    batches = length_batches([len(sequence.ids) for sequence in sequences], budget, batch_size)
    for positions in track(batches, "likelihood", progress):
        rows = [sequences[position] for position in positions]
        ids, mask = pad([row.ids for row in rows], pad_token_id, device=model.device)
        lengths = torch.tensor([row.prompt_length for row in rows], device=model.device)
        _, completion_BS = next_token_positions(mask, lengths)
        logits_NV = logits_at(model, {"input_ids": ids, "attention_mask": mask}, completion_BS)
        result[positions] = sequence_nll(logits_NV, ids, completion_BS).cpu().numpy()
    return result


@torch.no_grad()
def greedy_completions(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[str]:
    """The text that greedy decoding appends to each prompt, up to the end token."""
    result = [""] * len(prompts)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    lengths = [len(prompt) for prompt in prompts]
    batches = length_batches(lengths, TOKENS_PER_BATCH, batch_size or GENERATION_BATCH)
    for batch in track(batches, "completions", progress):
        ids, mask = pad([prompts[position] for position in batch], padding, "left", model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=padding,
        )
        for position, text in zip(
            batch, tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True), strict=True
        ):
            result[position] = text
    return result


def final_answer(text: str) -> str | None:
    """The number after GSM8K's `####`, without separators, dollar or full stop; None without one."""
    found = re.findall(r"####\s*(-?[$]?-?[\d.,]+)", text)
    return found[-1].replace(",", "").replace("$", "").rstrip(".") if found else None


def exact_match(completion: str, reference: str) -> bool:
    """Equality of the stripped texts; of the final answers, where the reference has one after `####`."""
    answer = final_answer(reference)
    return completion.strip() == reference.strip() if answer is None else final_answer(completion) == answer


def rouge_l(completions: list[str], references: list[str]) -> np.ndarray:
    """[S] Rouge-L F-measure of the rouge-score package, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, completions, strict=True)
    return np.array(
        [scorer.score(reference, completion)["rougeL"].fmeasure for reference, completion in pairs]
    )


def _metrics(metrics: str | Iterable[str]) -> list[str]:
    names = re.split(r"[,\s]+", metrics.strip()) if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in METRICS:
            raise MelinoeError("unknown metric", got=repr(name), allowed=", ".join(METRICS))
    return names


def _summary(rows: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
    """Means over the chosen rows; the likelihood is a mean over tokens."""
    summary: dict[str, Any] = {"num_rows": len(chosen), "num_tokens": int(rows["tokens"][chosen].sum())}
    if "nll" in rows:
        summary["nll"] = float(rows["nll"][chosen].sum() / summary["num_tokens"])
        summary["perplexity"] = math.exp(min(summary["nll"], 700.0))
    for name in ("exact_match", "rouge_l"):
        if name in rows:
            summary[name] = float(rows[name][chosen].mean())
    return summary


def evaluate(
    model: Any,
    data: Any,
    limit: int | None = None,
    metrics: str | Iterable[str] = METRICS,
    split: str = "test",
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    adapter: str | Path | None = None,
    max_length: int | None = 512,
    dtype: Any = None,
    progress: bool = True,
    per_row: bool = False,
) -> dict[str, Any]:
    """Quality of a model on rows of text.

    Args:
        model: a path, hub id or `tiny`; or (model, tokenizer).
        data: a .jsonl file, a folder with splits, or a list of `data.Row`.
        limit: at most this many rows.
        metrics: of perplexity, exact_match, rouge_l; a list, or text with commas.
        split: of a data folder.
        batch_size: rows side by side; None: about 4096 tokens for likelihood, 64 rows for completions.
        max_new_tokens: of a completion; None: as many as the longest reference has.
        adapter: what `tune` wrote, for a model given by path.
        max_length: rows with more tokens are left out.
        dtype: of the weights, for a model given by path; None: the checkpoint's.
        progress: bars on stderr.
        per_row: adds arrays over the rows, in their order, for a comparison in pairs:
            `intervals.ratio_of_sums` of two models' ["per_row"]["nll"] is the ratio of their likelihoods.

    Returns:
        nll: nats per completion token, the end token included; perplexity: its exponential;
        exact_match, rouge_l: means over rows, 0 to 1; num_rows; num_tokens: of the completions;
        tasks: the same for each task, where rows name more than one. Metrics not asked for are absent.

    Raises:
        MelinoeError: an unknown metric, no such model or data, rows of plain text where completions are
            to be generated.
    """
    names, rows = _metrics(metrics), data_rows(data, split, limit)
    generated = [name for name in names if name != "perplexity"]
    if generated and not all(row.messages for row in rows):
        raise MelinoeError(
            f"{' and '.join(generated)} need prompts",
            got="rows of plain text",
            allowed="messages | prompt + completion",
            next_step="use --metrics perplexity",
        )
    model, tokenizer = open_model(model, adapter, dtype)
    pairs = encode_rows(tokenizer, rows, max_length)
    sequences = [encoded for _, encoded in pairs]
    arrays = {"tokens": np.array([len(encoded.ids) - encoded.prompt_length for encoded in sequences])}
    if "perplexity" in names:
        arrays["nll"] = completion_nll(model, sequences, batch_size, tokenizer.pad_token_id or 0, progress)
    texts: list[str] = []
    if generated:
        prompts = [encoded.ids[: encoded.prompt_length] for encoded in sequences]
        longest = max_new_tokens or int(arrays["tokens"].max())
        texts = greedy_completions(model, tokenizer, prompts, longest, batch_size, progress)
        arrays |= _judge(generated, texts, [row for row, _ in pairs])
    result = _summary(arrays, np.arange(len(pairs)))
    tasks = np.array([row.task for row, _ in pairs])
    if len(set(tasks.tolist())) > 1:
        result["tasks"] = {
            task: _summary(arrays, np.flatnonzero(tasks == task)) for task in sorted(set(tasks.tolist()))
        }
    if per_row:
        result["per_row"] = arrays | {"completions": texts}
    return result


def _judge(names: list[str], texts: list[str], rows: list[Row]) -> dict[str, np.ndarray]:
    """[S] for each metric of generated text."""
    references, judged = [row.completion for row in rows], {}
    if "exact_match" in names:
        matches = [exact_match(text, reference) for text, reference in zip(texts, references, strict=True)]
        judged["exact_match"] = np.array(matches, float)
    if "rouge_l" in names:
        judged["rouge_l"] = rouge_l(texts, references)
    return judged
