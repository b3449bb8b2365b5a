"""What a model still knows: likelihood, exact match and Rouge-L on rows of text.

A faster model is worth its speed only at the quality that stands beside it. Likelihood is read
teacher-forced and moves with every small change; exact match and Rouge-L judge greedy completions.
Works on any model that transformers can run: resident, tuned, merged or offloaded.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melinoe.data.batching import batch_of, length_batches, pad
from melinoe.data.encoding import Encoded, encode_prompt
from melinoe.data.rows import Row, data_rows, describe_rows
from melinoe.errors import MelinoeError
from melinoe.losses.likelihood import next_token_positions, sequence_nll
from melinoe.measure.answers import FILTER_NAMES, FILTERS, Filter, exact_match, final_answer
from melinoe.measure.trace import TOKENS_PER_BATCH, open_model, rows_at_once, track, usable_rows
from melinoe.models.layers import moe_layers
from melinoe.models.logits import logits_at
from melinoe.models.positions import fixed_length
from melinoe.models.router_tap import RouterTap
from melinoe.runtime.generation_settings import (
    Request,
    Sampling,
    context_length,
    end_tokens,
    request,
    stop_strings,
)

METRICS = ("perplexity", "exact_match", "rouge_l")
GENERATION_BATCH = 64  # rows decoded side by side, where no batch size is given,
COMPLETION_TOKENS = 2**16  # and not more padded tokens of prompt and completion than these
MAX_LOGITS = 2**27  # elements of one [B, S, V] block: half a GiB in float32


@torch.no_grad()
def completion_nll(
    model: Any,
    sequences: list[Encoded],
    batch_size: int | None = None,
    pad_token_id: int = 0,
    progress: bool = True,
    routing: list[np.ndarray] | None = None,
) -> np.ndarray:
    """[S] float64: negative log-likelihood of each row's answers, nats, summed over their tokens and ends.

    routing: a list to fill with what `read_routing` gives for these sequences, seen in the same passes.
    """
    layers = [] if routing is None else moe_layers(model)
    chosen_by_position: dict[int, np.ndarray] = {}
    result = np.zeros(len(sequences))
    budget = max(1, min(TOKENS_PER_BATCH, MAX_LOGITS // model.config.get_text_config().vocab_size))
    at_once = rows_at_once(model, batch_size)
    fixed = fixed_length(model.config)
    batches = length_batches(
        [len(sequence.ids) for sequence in sequences], budget, at_once, fixed_length=fixed
    )
    for positions in track(batches, "likelihood", progress):
        batch = batch_of([sequences[position] for position in positions], pad_token_id, model.device)
        _, completion_BS = next_token_positions(batch["attention_mask"], batch["answers"])
        with RouterTap(layers, choices_only=True) as tap:
            logits_NV = logits_at(model, batch, completion_BS)
        result[positions] = sequence_nll(logits_NV, batch["input_ids"], completion_BS).cpu().numpy()
        if layers:
            lengths = [sequences[position].end - 1 for position in positions]
            chosen = tap.by_sequence(batch["input_ids"].shape, lengths)
            chosen_by_position.update(zip(positions, chosen, strict=True))
    if routing is not None:
        routing[:] = [chosen_by_position[position] for position in range(len(sequences))]
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
    """The text that greedy decoding appends to each prompt, up to what the checkpoint says ends a generation.

    The end itself, a token or one of its stop_strings, is no part of the text.
    """
    result = [""] * len(prompts)
    context = context_length(model)
    ends = set(end_tokens(model.generation_config, tokenizer))
    stops = stop_strings(model.generation_config)
    most = min((one for one in (context, fixed_length(model.config)) if one is not None), default=None)
    batches = _completion_batches(prompts, max_new_tokens, rows_at_once(model, batch_size), most)
    for batch in track(batches, "completions", progress):
        width = max(len(prompts[position]) for position in batch)
        room = max_new_tokens if context is None else max(1, min(max_new_tokens, context - width))
        settings = greedy_request(model, tokenizer, room).arguments
        ids, mask = pad([prompts[one] for one in batch], settings["pad_token_id"], "left", model.device)
        output = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, width:].tolist()
        for position, said in zip(batch, output, strict=True):
            end = next((place for place, token in enumerate(said) if token in ends), len(said))
            text = tokenizer.decode(said[:end], skip_special_tokens=True)
            for stop in stops:
                text = text.partition(stop)[0]
            result[position] = text
    return result


def greedy_request(model: Any, tokenizer: Any, max_new_tokens: int) -> Request:
    """How completions are generated: as the checkpoint says, but without chance."""
    why = "completions are compared"
    asked = request(model, tokenizer, max_new_tokens, sampling=Sampling(temperature=0.0), why_greedy=why)
    return replace(asked, arguments=asked.arguments | {"prompt_lookup_num_tokens": None})  # of one row alone


def _completion_batches(
    prompts: list[list[int]], new: int, batch_size: int | None, most: int | None
) -> list[list[int]]:
    """A prompt that leaves less room than `new` is alone: the answers beside it would have no more, or other
    positions.

    most: tokens of the model's context, or up to which its positions are fixed.
    """
    lengths = [len(prompt) + new for prompt in prompts]
    long = [one for one, length in enumerate(lengths) if most is not None and length > most]
    others = sorted({*range(len(prompts))} - {*long})
    batches = length_batches(lengths, COMPLETION_TOKENS, batch_size, positions=others)
    size = batch_size or GENERATION_BATCH
    cut = [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]
    return [[one] for one in long] + cut


def rouge_l(completions: list[str], references: list[str]) -> np.ndarray:
    """[S] Rouge-L F-measure of the rouge-score package, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, completions, strict=True)
    return np.array(
        [scorer.score(reference, completion)["rougeL"].fmeasure for reference, completion in pairs]
    )


def _metrics(metrics: str | Iterable[str]) -> list[str]:
    names = re.split(r"[,\s]+", metrics.strip(", ")) if isinstance(metrics, str) else list(metrics)
    for name in names or [""]:
        if name not in METRICS:
            raise MelinoeError("unknown metric", got=repr(name), allowed=", ".join(METRICS))
    return names


def _summary(rows: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
    """Means over the chosen rows; the likelihood is a mean over tokens."""
    summary: dict[str, Any] = {"num_rows": len(chosen), "num_tokens": int(rows["tokens"][chosen].sum())}
    if "nll" in rows:
        summary["nll"] = float(rows["nll"][chosen].sum() / summary["num_tokens"])
        summary["perplexity"] = math.exp(min(summary["nll"], 700.0))
    for name in ("exact_match", "exact_match_flexible", "rouge_l"):
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
    max_length: int | None = None,
    dtype: Any = None,
    progress: bool = True,
    per_row: bool = False,
    answers: str | None = None,
    last_turn_only: bool = False,
    sticky: float | None = None,
) -> dict[str, Any]:
    """Quality of a model on rows of text.

    The likelihood is that of every answer of a conversation; what is generated and compared is the last one.

    Args:
        model: a path, hub id or `tiny`; or (model, tokenizer).
        data: a file, a folder with splits, a Hub id (data.read_rows), or a list of `data.Row`.
        limit: at most this many rows.
        metrics: of perplexity, exact_match, rouge_l; a list, or text with commas.
        split: of a data folder.
        batch_size: rows side by side; None: about 4096 tokens for likelihood, 64 rows for completions.
        max_new_tokens: of a completion; None: as many as the longest reference has.
        adapter: what `tune` wrote, for a model given by path.
        max_length: rows with more tokens are left out, and counted; None: the model's own context.
        dtype: of the weights, for a model given by path; None: the checkpoint's.
        progress: bars on stderr.
        per_row: adds arrays over the rows, in their order, for paired comparison. The ratio of two models'
            likelihoods with its interval: `routing.paired.ratio_of_sums(a["per_row"]["nll"],
            b["per_row"]["nll"])`.
        answers: how exact_match compares: text, or the final answers that a filter finds, strict or flexible
            (measure.answers); None: the filter of the data set where it has one (answers.FILTERS), else text.
        last_turn_only: the likelihood is that of the last answer alone.
        sticky: as for `melinoe.load`.

    Returns:
        nll: nats per completion token, the end token included; perplexity: its exponential;
        exact_match, rouge_l: means over rows, 0 to 1; exact_match_flexible: with the other filter, where the
        data set has the strict one; num_rows; num_tokens: of the completions; tasks: the same for each task,
        where rows name more than one. Metrics not asked for are absent. answers: how many rows were compared
        how. num_rows_left_out, left_out (by reason), max_length; data: what the rows were read from; notes:
        sentences for people, of what was left out and what the checkpoint would have done otherwise.

    Raises:
        MelinoeError: an unknown metric or filter, no such model or data, a row that cannot be rendered, rows
            of
            plain text where completions are to be generated.
    """
    names, rows = _metrics(metrics), data_rows(data, split, limit)
    if answers not in (None, "text", *FILTER_NAMES):
        raise MelinoeError(
            "unknown way to compare answers", got=answers, allowed=", ".join(("text", *FILTER_NAMES))
        )
    generated = [name for name in names if name != "perplexity"]
    if generated and any(row.is_text for row in rows):
        raise MelinoeError(
            f"{' and '.join(generated)} need prompts",
            got="rows of plain text",
            allowed="messages | prompt + completion",
            next_step="use --metrics perplexity",
        )
    model, tokenizer = open_model(model, adapter, dtype, sticky)
    usable = usable_rows(model, tokenizer, rows, max_length, last_turn_only)
    kept, sequences, notes = usable.rows, usable.encoded, [str(usable)] * bool(usable.left_out)
    arrays = {"tokens": np.array([encoded.num_answer_tokens for encoded in sequences])}
    if "perplexity" in names:
        arrays["nll"] = completion_nll(model, sequences, batch_size, tokenizer.pad_token_id or 0, progress)
    texts: list[str] = []
    result: dict[str, Any] = {}
    if generated:
        prompts = [encode_prompt(tokenizer, row) for row in kept]
        longest = max_new_tokens or max(end - start for start, end in (one.answers[-1] for one in sequences))
        notes += greedy_request(model, tokenizer, longest).overridden
        texts = greedy_completions(model, tokenizer, prompts, longest, batch_size, progress)
        if "exact_match" in names:
            filters = [_filter(answers, data, row) for row in kept]
            arrays |= _matches(texts, kept, filters, flexible_too=answers is None)
            result["answers"] = dict(Counter(filter or "text" for filter in filters))
            notes += _hint(kept, filters) if answers is None else []
        if "rouge_l" in names:
            arrays["rouge_l"] = rouge_l(texts, [row.completion for row in kept])
    result = _summary(arrays, np.arange(len(kept))) | result
    tasks = np.array([row.task for row in kept])
    if len(set(tasks.tolist())) > 1:
        result["tasks"] = {
            task: _summary(arrays, np.flatnonzero(tasks == task)) for task in sorted(set(tasks.tolist()))
        }
    if per_row:
        result["per_row"] = arrays | {"completions": texts}
    return result | usable.to_json() | {"data": describe_rows(rows), "notes": notes}


def _filter(answers: str | None, data: Any, row: Row) -> Filter | None:
    """How the completion of a row is compared: as asked, else as its task or its data set has it."""
    if answers is not None:
        return next((name for name in FILTER_NAMES if name == answers), None)
    name = Path(str(data)).name.partition(":")[0] if isinstance(data, str | Path) else ""
    return FILTERS.get(row.task.lower()) or FILTERS.get(name.lower())


def _matches(
    texts: list[str], rows: list[Row], filters: list[Filter | None], flexible_too: bool
) -> dict[str, np.ndarray]:
    """[S] exact_match, and with the flexible filter where all rows have the strict one."""
    triples = list(zip(texts, [row.completion for row in rows], filters, strict=True))
    found = {"exact_match": [exact_match(*triple) for triple in triples]}
    if flexible_too and set(filters) == {"strict"}:
        found["exact_match_flexible"] = [exact_match(text, right, "flexible") for text, right, _ in triples]
    return {name: np.array(matches, float) for name, matches in found.items()}


def _hint(rows: list[Row], filters: list[Filter | None]) -> list[str]:
    """A filter is never guessed, but that one may be meant is said."""
    marked = sum(
        filter is None and final_answer(row.completion) is not None
        for row, filter in zip(rows, filters, strict=True)
    )
    if not marked:
        return []
    return [f"{marked:,} references hold a number behind ####: --answers strict compares that number alone"]
