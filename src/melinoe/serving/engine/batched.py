"""Continuous batching: transformers' engine, with its scheduler and paged cache, and our choice of tokens.

transformers shares blocks of the cache between requests whose prompts begin alike, so that the earlier
turns of a conversation are not computed again; it bounds the cache, joins requests to the batch as they
come and splits long prompts. What it lacks is written here: every request has its own sampling settings,
seed and stop strings (its own sampler draws for all rows alike), an answer may end inside the step, and
errors keep their type.

Private names of transformers are used in two places: `ModelRunner._sample` and the requests of the batch
beside it. `_unlike` says what is missing where another version has moved them.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.model_runner import (
    ModelRunner,
    infer_max_single_request_tokens,
)

from melinoe.errors import MelinoeError
from melinoe.models.positions import fixed_length
from melinoe.runtime.division import PREFILL_CHUNK
from melinoe.serving.engine import packed_attention
from melinoe.serving.engine.request import EngineRequest

PAGE_TOKENS = 16  # of a block of the cache: prompts share whole blocks
TESTED = "5.23"


class CannotBatchError(Exception):
    """This model or this transformers does not do continuous batching."""


def _unlike() -> str | None:
    """What this transformers has not, of what is relied upon."""
    sample = getattr(ModelRunner, "_sample", None)
    if sample is None or list(inspect.signature(sample).parameters) != ["self", "scores", "output_ids"]:
        return "ModelRunner._sample(scores, output_ids)"
    for name in ("deliver", "deliver_batch", "fail_and_deliver"):
        if not hasattr(OutputRouter, name):
            return f"OutputRouter.{name}"
    return None


def _in_one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Router(OutputRouter):
    """Hands the ends of requests to the engine; theirs would keep handlers of cancelled requests."""

    def __init__(self, engine: BatchedEngine) -> None:
        super().__init__()
        self._engine = engine

    def deliver(self, output: Any) -> None:
        if output.is_finished():
            self._engine.ended(output.request_id, output.error)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.deliver(output)

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        self._engine.ended(state.request_id, error)
        super().fail_and_deliver(state, error)


class BatchedEngine:
    """See `Engine`.

    Args:
        model: offloaded or resident, in eval mode.
        concurrency: requests in one batch.
        context: tokens of the longest prompt and answer.
        cached_tokens: of the whole KV cache.
    """

    name = "batched"

    def __init__(self, model: Any, concurrency: int, context: int, cached_tokens: int) -> None:
        self.model, self._concurrency, self._context = model, concurrency, context
        self._cached_tokens = cached_tokens
        self._requests: dict[str, EngineRequest] = {}
        self._lock = threading.Lock()
        self._manager: Any = None
        self._stopped = False
        self._error: str | None = None
        self._attention = model.config._attn_implementation
        self.capacity = context

    def start(self) -> None:
        missing = _unlike()
        if missing is not None:
            raise CannotBatchError(
                f"transformers {transformers.__version__} has no {missing}; tested with {TESTED}"
            )
        fixed = fixed_length(self.model.config)
        if fixed is not None and self._context > fixed:
            raise CannotBatchError(f"beyond {fixed} tokens its positions hang on the longest text of a batch")
        blocks = -(-self._cached_tokens // PAGE_TOKENS)
        pages = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=blocks,
            max_batch_tokens=min(PREFILL_CHUNK, blocks * PAGE_TOKENS),
            max_requests_per_batch=self._concurrency,
            max_memory_percent=1.0,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        # greedy and without processors: what it chooses is not looked at
        plain = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        try:
            self._manager = self.model.init_continuous_batching(plain, pages)
            if self._attention == "sdpa":
                packed_attention.register()
                self.model.set_attn_implementation(packed_attention.NAME)
            self._manager.output_router = _Router(self)
            self._manager.warmup()  # makes the cache and the runner
        except Exception as error:  # families are refused in many words
            self._restore_attention()
            raise CannotBatchError(_in_one_line(error)) from error
        self._processor = self._manager.batch_processor
        self._processor.model_runner._sample = self._sample
        self.capacity = min(self._context, infer_max_single_request_tokens(self._processor.cache))
        self._manager.start()

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """In place of `ModelRunner._sample`.

        Args:
            scores: [1, rows, V]; the first rows are those of requests with a new token.
            output_ids: [1, ...] takes a token for each.
        """
        row = 0
        for scheduled in self._processor.inputs_and_outputs.requests_in_batch:
            request = self._requests.get(scheduled.state.request_id)
            if request is not None and not request.tokens:
                request.cached_tokens -= scheduled.query_length
            if not scheduled.has_new_token:
                continue
            output_ids[0, row] = self._advance(request, scores[0, row]) if request is not None else 0
            row += 1

    def _advance(self, request: EngineRequest, logits: torch.Tensor) -> int:
        if not request.tokens:
            request.cached_tokens = max(request.cached_tokens, 0)
        try:
            token = request.advance(logits)
        except Exception as error:  # its own fault (a processor): the others go on
            request.fail(error)
            token = 0
        full = token in request.end_tokens or len(request.tokens) >= request.max_new_tokens
        if request.finished and not full:  # a stop string, an error: transformers would go on
            self.cancel(request)
        return token

    def submit(self, request: EngineRequest) -> None:
        if self.failure is not None:
            raise MelinoeError(self.failure)
        request.cached_tokens = len(request.prompt)
        with self._lock:
            self._requests[request.name] = request
            self._share_predictions()
        taken = self._manager.add_request(
            request.prompt,
            request_id=request.name,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=sorted(request.end_tokens) or -1,
        )
        if taken is None:
            self._forget(request.name)
            raise MelinoeError(self.failure or "the engine was stopped")

    def cancel(self, request: EngineRequest) -> None:
        self._forget(request.name)
        self._manager.cancel_request(request.name)

    def ended(self, name: str, error: Exception | str | None) -> None:
        """Called by the router: a request has its last token, or cannot have one."""
        status = self._manager.background_thread_status
        if error is not None and status.local_status == status.HARD_STOP:  # known before anybody hears of it
            self._error = self._error or _in_one_line(error)
        request = self._forget(name)
        if request is not None and error is not None:
            request.fail(error if isinstance(error, Exception) else RuntimeError(error))

    def _forget(self, name: str) -> EngineRequest | None:
        with self._lock:
            request = self._requests.pop(name, None)
            if request is not None:
                self._share_predictions()
        return request

    def _share_predictions(self) -> None:
        """The cache's prior is the mean of what was predicted for the requests in flight."""
        paged = getattr(self.model, "melinoe_paged", None)
        if paged is not None and paged.predictor is not None:
            paged.share_predictions(
                {name: r.prediction for name, r in self._requests.items() if r.prediction is not None}
            )

    @property
    def failure(self) -> str | None:
        if self._stopped:
            return "the engine was stopped"
        error = self._error or self._manager.background_thread_status.fatal_error
        if error is not None:
            return _in_one_line(error)
        return None if self._manager.is_running() else "the engine's thread has ended"

    @property
    def cache_use(self) -> float:
        allocators = self._processor.cache.cache_allocators.values()
        # shared blocks count once; copies, because the engine's thread goes on
        held = sum(
            len({block for blocks in list(allocator.block_table.values()) for block in list(blocks)})
            for allocator in allocators
        )
        return held / max(1, sum(allocator.num_blocks for allocator in allocators))

    def stop(self) -> None:
        self._stopped = True
        if self._manager is not None and self._manager.is_running():
            self._manager.stop(block=True, timeout=60, hard_stop=True)
        self._restore_attention()

    def _restore_attention(self) -> None:
        if self.model.config._attn_implementation == packed_attention.NAME:
            self.model.set_attn_implementation(self._attention)
