"""Text with statistics: `generate` over `stream_generate` over transformers' generate and its own loop."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from melinoe.config import format_bytes, format_rate
from melinoe.data.encoding import encode_prompt
from melinoe.decoding import loop as decoding
from melinoe.errors import MelinoeError
from melinoe.machine import peak_memory
from melinoe.models.positions import fixed_length
from melinoe.paging.statistics import Statistics
from melinoe.runtime.answer_text import AnswerText
from melinoe.runtime.division import pass_length
from melinoe.runtime.generation_settings import Sampling, context_length, request

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class GenerationStatistics:
    """One request. Seconds are wall clock; loads are records read; None where nothing was offloaded.

    ttft_seconds: from the call to the first token, prediction and preload included.
    generation_tokens_per_second: tokens after the first, over the time after the first.
    peak_memory_bytes: the largest resident set of the process so far.
    model_memory_bytes: that without what the process had when the model was opened: what a budget is for.
    planned_bytes: what the plan adds up to.
    notes: what the checkpoint's generation settings ask for and was done otherwise.
    """

    prompt_tokens: int
    generated_tokens: int
    ttft_seconds: float
    seconds: float
    peak_memory_bytes: int
    hit_rate: float | None = None
    prefill_loads: int | None = None
    preload_loads: int | None = None
    decode_loads: int | None = None
    loads_per_token: float | None = None
    bytes_per_token: float | None = None
    model_memory_bytes: int | None = None
    planned_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.ttft_seconds

    @property
    def generation_tokens_per_second(self) -> float | None:
        after_first = self.seconds - self.ttft_seconds
        return (self.generated_tokens - 1) / after_first if self.generated_tokens > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "generation_tokens_per_second": self.generation_tokens_per_second,
        }

    def __str__(self) -> str:
        speed = self.generation_tokens_per_second
        parts = [
            f"prompt {format_rate(self.prompt_tokens_per_second)} tok/s",
            f"generation {format_rate(speed)} tok/s" if speed else "generation -",
            f"TTFT {self.ttft_seconds * 1000:.0f} ms",
        ]
        if self.hit_rate is not None:
            parts += [f"hit rate {self.hit_rate:.3f}", f"{format_bytes(self.bytes_per_token or 0)} per token"]
        peak = f"peak memory {format_bytes(self.peak_memory_bytes)}"
        if self.model_memory_bytes is not None and self.planned_bytes is not None:
            before = self.peak_memory_bytes - self.model_memory_bytes
            peak += (
                f": {format_bytes(before)} before the model was opened and"
                f" {format_bytes(self.model_memory_bytes)} since, {format_bytes(self.planned_bytes)} planned"
            )
        return " | ".join([*parts, peak])


@dataclass(frozen=True)
class Piece:
    """A bit of streamed text; `statistics` stands in the last one."""

    text: str
    token: int | None
    statistics: GenerationStatistics | None = None


class _Tokens(BaseStreamer):
    """Hands each new token to the reading thread. transformers sends the prompt first."""

    def __init__(self) -> None:
        self.queue: queue.Queue[int | BaseException | None] = queue.Queue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self.queue.put(token)

    def end(self) -> None:
        self.queue.put(None)


class _Stopped(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | list[int] | tuple[dict[str, str], ...],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Collection[str] = (),
    seed: int | None = None,
    raw: bool = False,
    ignore_eos: bool = False,
) -> Iterator[Piece]:
    """Yields text as it is generated; the last piece carries the statistics.

    Args:
        model: offloaded (`melinoe.load`) or resident.
        prompt: text, messages, or token ids; text goes through the chat template unless `raw`.
        max_new_tokens: None: 256, or what the model's context leaves room for.
        temperature, top_p, top_k, min_p, repetition_penalty: see `Sampling`; None: as the checkpoint's
            generation settings have it, which hold for everything that is not said here. With several beams
            all text comes at the end.
        stop: the text ends before the first of these.
        ignore_eos: go on for exactly `max_new_tokens` (for measurements).

    Raises:
        MelinoeError: an empty prompt, settings of the checkpoint that cannot be followed, or whatever stops
            the generation (a read error).
    """
    ids = prompt if isinstance(prompt, list) else encode_prompt(tokenizer, prompt, raw)
    if not ids:
        raise MelinoeError("the prompt is empty", allowed="at least one token")
    limit = context_length(model)
    if max_new_tokens is None:
        max_new_tokens = (
            DEFAULT_NEW_TOKENS if limit is None else max(1, min(DEFAULT_NEW_TOKENS, limit - len(ids)))
        )
    if max_new_tokens < 1:
        raise MelinoeError("nothing to generate", got=f"max_new_tokens {max_new_tokens}", allowed="1 or more")
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise MelinoeError(
            "the prompt and the answer are longer than the model's context",
            got=f"{len(ids)} + {max_new_tokens} tokens",
            allowed=f"{limit} together",
            next_step="lower --max-new-tokens or shorten the prompt",
        )
    if "" in stop:
        raise MelinoeError("a stop string is empty", allowed="one character or more")
    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty)
    asked = request(model, tokenizer, max_new_tokens, sampling=sampling, exactly=ignore_eos)
    settings = asked.arguments
    at_once = pass_length(len(ids), fixed_length(model.config))
    if len(ids) > at_once:  # resident models too: what is computed must not depend on where experts are
        settings["prefill_chunk_size"] = at_once
    if seed is not None:
        torch.manual_seed(seed)
    counters = getattr(getattr(model, "melinoe_paged", None), "pager", None)
    tokens, stopped = _Tokens(), _Stopped()

    def work() -> None:
        try:
            inputs = torch.tensor([ids], device=model.device)
            # resident models are what ours is compared with: transformers' own loop
            generate = partial(decoding.generate, model) if counters else model.generate
            whole = generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                streamer=tokens if asked.beams == 1 else None,
                stopping_criteria=StoppingCriteriaList([stopped]),
                **settings,
            )
            if asked.beams > 1:  # which beam wins is known at the end
                tokens.put(inputs)
                tokens.put(whole[0, len(ids) :])
                tokens.end()
        except BaseException as error:  # the reading thread raises it again
            tokens.queue.put(error)

    before = replace(counters.statistics) if counters else None  # a copy
    thread = threading.Thread(target=work, name="melinoe-generate", daemon=True)
    began = time.perf_counter()
    first = 0.0
    count = 0
    decoder = AnswerText(tokenizer, list(stop))
    thread.start()
    try:
        while (token := tokens.queue.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            count += 1
            first = first or time.perf_counter() - began
            yield Piece(decoder.add(token), token)
            if decoder.stopped:
                break
    finally:  # also when the reader stops early: the model is never left running
        stopped.event.set()
        thread.join()
    seconds = time.perf_counter() - began
    yield Piece(
        decoder.finish(), None, _statistics(len(ids), count, first, seconds, model, before, asked.overridden)
    )


def _statistics(
    prompt: int,
    generated: int,
    ttft: float,
    seconds: float,
    model: Any,
    before: Statistics | None,
    notes: tuple[str, ...],
) -> GenerationStatistics:
    peak = peak_memory()
    if before is None:
        return GenerationStatistics(prompt, generated, ttft, seconds, peak, notes=notes)
    new = model.melinoe_paged.pager.statistics.since(before)
    started = model.melinoe_budget.process_bytes
    return GenerationStatistics(
        prompt,
        generated,
        ttft,
        seconds,
        peak,
        hit_rate=new.hit_rate,
        prefill_loads=new.prefill_loads,
        preload_loads=new.preload_loads,
        decode_loads=new.decode_loads,
        loads_per_token=new.loads_per_token,
        bytes_per_token=new.bytes_per_token,
        model_memory_bytes=peak - started if started else None,
        planned_bytes=model.melinoe_budget.total_bytes,
        notes=notes,
    )


def generate(
    model: Any, tokenizer: Any, prompt: str | list[int], **settings: Any
) -> tuple[str, GenerationStatistics]:
    """(text, statistics) of one request; arguments as for `stream_generate`."""
    text, statistics = "", None
    for piece in stream_generate(model, tokenizer, prompt, **settings):
        text += piece.text
        statistics = piece.statistics
    assert statistics is not None
    return text, statistics
