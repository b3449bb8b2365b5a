"""Which engine computes, and whether it computes right: tried out before the first client comes."""

from __future__ import annotations

import logging
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from melinoe.errors import MelinoeError
from melinoe.runtime.answer_text import AnswerText
from melinoe.runtime.budget import DEFAULT_CONTEXT
from melinoe.serving.engine.batched import BatchedEngine, CannotBatchError
from melinoe.serving.engine.interface import Engine
from melinoe.serving.engine.one_at_a_time import OneAtATimeEngine
from melinoe.serving.engine.request import EngineRequest, Progress
from melinoe.serving.engine.sampling import Choice
from melinoe.serving.settings import ServeSettings

CONTEXTS = 4  # how many of the longest texts the cache holds, if nothing is said
TOLERANCE = 0.05  # of the largest logit; a cache that is read wrongly is off by the logits themselves
PROBE_SECONDS = 600


def context_tokens(config: Any, settings: ServeSettings) -> int:
    """Tokens of the longest prompt and answer: as asked for, within what the model was made for.

    Raises:
        MelinoeError: more than the model's own limit.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if settings.context is None:
        return min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if limit is not None and settings.context > limit:
        raise MelinoeError(
            "context is longer than the model's", got=settings.context, allowed=f"up to {limit}"
        )
    return settings.context


def cached_tokens(context: int, settings: ServeSettings) -> int:
    """Tokens of the whole KV cache.

    Raises:
        MelinoeError: fewer than one longest text has.
    """
    if settings.engine == "one-at-a-time":
        return context
    tokens = settings.cached_tokens or CONTEXTS * context
    if tokens < context:
        raise MelinoeError(
            "the cache does not hold one longest text", got=tokens, allowed=f"{context} or more"
        )
    return tokens


def start_engine(model: Any, tokenizer: Any, settings: ServeSettings) -> Engine:
    """The engine of the settings, running; auto falls back to one request at a time and says why on stderr.

    Raises:
        MelinoeError: batched was asked for and does not work.
    """
    context = context_tokens(model.config, settings)
    sticky = getattr(model, "melinoe_sticky", None) is not None
    if sticky and settings.engine == "batched":
        raise MelinoeError(
            "sticky routing does not know continuous batching yet",
            next_step="--engine one-at-a-time, or --sticky 0",
        )
    guided = model.generation_config.guidance_scale not in (None, 1)
    if guided and settings.engine == "batched":
        raise MelinoeError(
            "guidance_scale of the checkpoint's generation settings runs the model for one request alone",
            next_step="--engine one-at-a-time",
        )
    if sticky or guided:
        why = "the model is sticky" if sticky else "its generation settings have a guidance_scale"
        print(f"melinoe: one request at a time, because: {why}", file=sys.stderr)
    elif settings.engine != "one-at-a-time":
        batched = BatchedEngine(model, settings.concurrency, context, cached_tokens(context, settings))
        try:
            expected = _forward(model)
            with _without_log():  # a family that it refuses would leave fifty lines, and is explained in one
                batched.start()
                _compare(batched, tokenizer, expected)
            _forget_trial(model)
            return batched
        except CannotBatchError as reason:
            batched.stop()
            if settings.engine == "batched":
                raise MelinoeError(
                    "this model cannot be batched", got=reason, next_step="--engine one-at-a-time"
                ) from None
            print(f"melinoe: one request at a time, because: {reason}", file=sys.stderr)
    single = OneAtATimeEngine(model, context)
    single.start()
    return single


@contextmanager
def _without_log() -> Iterator[None]:
    """Inside of it, transformers' continuous batching logs nothing."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


PROMPT = [3, 5, 7]


@torch.no_grad()
def _forward(model: Any) -> list[torch.Tensor]:
    """[2][V] logits behind a short prompt and behind its greedy next token, without any cache."""
    size = model.get_input_embeddings().num_embeddings
    tokens, expected = [token % size for token in PROMPT], []
    for _ in range(2):
        ids = torch.tensor([tokens], device=model.device)
        expected.append(model(input_ids=ids, use_cache=False).logits[0, -1].float())
        tokens.append(int(expected[-1].argmax()))
    return expected


class _Recorder:
    """In a sampler's place: keeps the logits and goes the way of the comparison."""

    def __init__(self, expected: list[torch.Tensor]) -> None:
        self._tokens = [int(logits.argmax()) for logits in expected]
        self.seen: list[torch.Tensor] = []

    def choose(self, logits: torch.Tensor) -> Choice:
        self.seen.append(logits.clone())
        return Choice(self._tokens[len(self.seen) - 1])


def _compare(engine: BatchedEngine, tokenizer: Any, expected: list[torch.Tensor]) -> None:
    """Raises CannotBatchError where the engine's logits are not the model's."""
    recorder: Any = _Recorder(expected)
    ended: queue.SimpleQueue[Progress] = queue.SimpleQueue()

    def deliver(progress: Progress) -> None:
        if progress.error is not None or progress.finish_reason is not None:
            ended.put(progress)

    size = engine.model.get_input_embeddings().num_embeddings
    prompt = [token % size for token in PROMPT]
    text = AnswerText(tokenizer, [])
    try:
        engine.submit(EngineRequest("trial", prompt, recorder, text, len(expected), [], deliver))
        error = ended.get(timeout=PROBE_SECONDS).error
    except (queue.Empty, MelinoeError) as failed:
        error = failed
    if isinstance(error, MelinoeError):
        raise error  # the store, not the way of computing
    if error is not None:
        raise CannotBatchError(" ".join(str(error).split()))
    for step, (found, right) in enumerate(zip(recorder.seen, expected, strict=True)):
        difference = float((found - right).abs().max() / right.abs().max().clamp_min(1e-6))
        if not difference <= TOLERANCE:
            raise CannotBatchError(f"logits of step {step + 1} differ by {difference:.2g} of the largest")


def _forget_trial(model: Any) -> None:
    paged = getattr(model, "melinoe_paged", None)
    if paged is not None:
        paged.pager.reset()
        paged.pager.statistics.reset()
