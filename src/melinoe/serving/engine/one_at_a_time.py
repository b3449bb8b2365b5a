"""One request after the other through `generate`: exact to the bit, and for families that cannot batch.

The answer is computed as `melinoe generate` computes it, whoever else is waiting; on a GPU as transformers'
own loop does over a cache that grows, whose last bit may be another than a captured step's (decision 19).
"""

from __future__ import annotations

import copy
import queue
import threading
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from melinoe.errors import MelinoeError
from melinoe.models.positions import fixed_length
from melinoe.runtime.division import pass_length
from melinoe.serving.engine.request import EngineRequest


class _Chosen(LogitsProcessor):
    """Leaves `generate` one token to choose: the request's own choice."""

    def __init__(self, request: EngineRequest) -> None:
        self._request = request

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self._request.advance(scores[0])
        return torch.full_like(scores, float("-inf")).index_fill_(
            1, torch.tensor([token], device=scores.device), 0.0
        )


class _Over(StoppingCriteria):
    """Ends `generate` with the request, or when nobody wants the answer any more."""

    def __init__(self, request: EngineRequest, cancelled: threading.Event) -> None:
        self._request, self._cancelled = request, cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        over = self._request.finished or self._cancelled.is_set()
        return torch.full((len(input_ids),), over, device=input_ids.device)


def _without_settings(model: Any) -> Any:
    """The model, with the same modules, hooks and weights, but no settings: the request has applied its own.
    The model itself keeps its settings, which other requests read meanwhile."""
    found, theirs = copy.copy(model), model.generation_config
    found.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=theirs.pad_token_id,
        cache_implementation=theirs.cache_implementation,
        disable_compile=True,
    )
    return found


class OneAtATimeEngine:
    """See `Engine`.

    Args:
        model: offloaded or resident, in eval mode.
        context: tokens of the longest prompt and answer.
    """

    name = "one at a time"

    def __init__(self, model: Any, context: int) -> None:
        self.model, self.capacity = model, context
        self._waiting: queue.Queue[EngineRequest | None] = queue.Queue()
        self._cancelled: dict[str, threading.Event] = {}
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._work, name="melinoe-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        if self.failure is not None:
            raise MelinoeError(self.failure)
        self._cancelled[request.name] = threading.Event()
        self._waiting.put(request)

    def cancel(self, request: EngineRequest) -> None:
        event = self._cancelled.get(request.name)
        if event is not None:
            event.set()

    def _work(self) -> None:
        while (request := self._waiting.get()) is not None:
            cancelled = self._cancelled[request.name]
            try:
                if self._failure is not None:
                    raise MelinoeError(self._failure)
                if not cancelled.is_set():
                    self._generate(request, cancelled)
            except BaseException as error:
                if isinstance(error, MelinoeError):  # the store: whatever comes next would fail as well
                    self._failure = self._failure or str(error)
                request.fail(error)
            finally:
                self._cancelled.pop(request.name, None)

    @torch.no_grad()
    def _generate(self, request: EngineRequest, cancelled: threading.Event) -> None:
        inputs = torch.tensor([request.prompt], device=self.model.device)
        settings: dict[str, Any] = {"max_new_tokens": request.max_new_tokens}
        at_once = pass_length(len(request.prompt), fixed_length(self.model.config))
        if len(request.prompt) > at_once:
            settings["prefill_chunk_size"] = at_once
        _without_settings(self.model).generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            logits_processor=[_Chosen(request)],
            stopping_criteria=[_Over(request, cancelled)],
            **settings,
        )

    @property
    def failure(self) -> str | None:
        return self._failure

    @property
    def cache_use(self) -> float:
        return 0.0

    def stop(self) -> None:
        self._failure = self._failure or "the engine was stopped"
        for event in list(self._cancelled.values()):
            event.set()
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=60)
