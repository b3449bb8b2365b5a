"""A conversation with a model in this process: what `melinoe chat` speaks to.

It goes through the engine that serves clients, so earlier turns are not computed again where the engine keeps
them (serving/engine/batched.py), and the same settings give the same answers as the server does.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from melinoe.config import format_bytes, format_rate
from melinoe.data.encoding import encode_prompt
from melinoe.errors import MelinoeError
from melinoe.runtime.answer_text import AnswerText
from melinoe.runtime.generation_settings import AS_THE_CHECKPOINT, Sampling, end_tokens, stop_strings
from melinoe.serving.engine.interface import Engine
from melinoe.serving.engine.request import EngineRequest, Progress
from melinoe.serving.engine.sampling import sampler

POLL_SECONDS = 0.1  # how long a wait for text may keep a stop from being noticed


@dataclass(frozen=True)
class TurnStatistics:
    """Of one answer. Seconds are wall clock; hits, loads and bytes_read are None where nothing is offloaded.

    cached_tokens: of the prompt, known from earlier turns and not computed again.
    """

    prompt_tokens: int
    cached_tokens: int
    tokens: int
    first_seconds: float
    seconds: float
    hits: int | None = None
    loads: int | None = None
    bytes_read: int | None = None

    def __str__(self) -> str:
        after = self.seconds - self.first_seconds
        if not self.tokens:  # of the prompt nobody knows how much was computed
            parts = [
                f"prompt {self.prompt_tokens} tokens",
                f"stopped after {self.seconds:.2f} s, before a token",
            ]
        else:
            speed = (
                f", {format_rate((self.tokens - 1) / after)} tok/s" if self.tokens > 1 and after > 0 else ""
            )
            parts = [
                f"prompt {self.prompt_tokens} tokens ({self.cached_tokens} known from before)",
                f"first token after {self.first_seconds:.2f} s",
                f"answer {self.tokens} tokens{speed}",
            ]
        if self.hits is not None and self.loads is not None and self.bytes_read is not None:
            share = self.hits / max(1, self.hits + self.loads)
            each = self.bytes_read / max(1, self.tokens)
            parts.append(f"hit rate {share:.3f}, {format_bytes(each)} read per token")
        return " | ".join(parts)


def _next_of(arrived: queue.SimpleQueue[Progress]) -> Progress | None:
    """What comes next; None where nothing does for a while."""
    try:
        return arrived.get(timeout=POLL_SECONDS)
    except queue.Empty:
        return None


class Conversation:
    """Turns of one conversation, and the answers to them.

    Args:
        model, tokenizer: as `melinoe.load` and `load_tokenizer` give them.
        engine: started.
        system: text of the system message; "" for none.
        sampling: how tokens are chosen.
        seed: of every answer; None: a fresh one each.
        stops: an answer ends before the first of these.
        max_new_tokens: of an answer; None: whatever the context leaves.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        engine: Engine,
        *,
        system: str = "",
        sampling: Sampling = AS_THE_CHECKPOINT,
        seed: int | None = None,
        stops: tuple[str, ...] = (),
        max_new_tokens: int | None = None,
    ) -> None:
        self.system, self.sampling, self.seed, self.stops = system, sampling, seed, stops
        self.max_new_tokens = max_new_tokens
        self.turns: list[dict[str, str]] = []
        self.statistics: TurnStatistics | None = None
        self._model, self._tokenizer, self._engine = model, tokenizer, engine
        self._names = itertools.count(1)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat templates and `melinoe tune` read it."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def clear(self) -> None:
        """Forgets the turns; the system message stays."""
        self.turns, self.statistics = [], None

    def ask(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yields the answer as it grows. Closing the iterator stops it; what was said until then stays.

        Args:
            text: the question.
            stopped: asked ten times a second and after every piece; once it is true the answer ends. For
                Ctrl-C this is better than KeyboardInterrupt, which comes between any two instructions, those
                of the clean-up too, and which Python 3.11 lets past a `finally` where another `try` begins
                in its loop: then the engine would go on with an answer that nobody hears.

        Raises:
            MelinoeError: the conversation does not fit the template or the context, or the engine failed; the
                question is not part of the turns then.
        """
        self.turns.append({"role": "user", "content": text})
        answer, began, arrived = "", time.perf_counter(), queue.SimpleQueue[Progress]()
        before = self._counted()
        try:
            request = self._request(arrived)
            self._engine.submit(request)
        except BaseException:
            self.turns.pop()
            raise
        first, ended = 0.0, False
        try:
            while not ended and not stopped():
                progress = _next_of(arrived)
                if progress is None:
                    continue
                if progress.error is not None:
                    raise MelinoeError("the answer cannot go on", got=progress.error)
                first = first or progress.at - began
                if progress.text:
                    answer += progress.text
                    yield progress.text
                ended = progress.finish_reason is not None
        finally:
            if not request.finished:
                self._engine.cancel(request)
            if answer or ended:
                self.turns.append({"role": "assistant", "content": answer})
            else:
                self.turns.pop()
            self.statistics = self._statistics(request, before, first, time.perf_counter() - began)

    def _request(self, arrived: queue.SimpleQueue[Progress]) -> EngineRequest:
        prompt = encode_prompt(self._tokenizer, tuple(self.messages))
        room = self._engine.capacity - len(prompt)
        length = room if self.max_new_tokens is None else self.max_new_tokens
        if length < 1 or length > room:
            raise MelinoeError(
                "the conversation and its answer are longer than the context",
                got=f"{len(prompt)} + {max(length, 1)} tokens",
                allowed=f"{self._engine.capacity} together",
                next_step="/clear starts a new conversation; --context sets more aside",
            )
        theirs = self._model.generation_config
        return EngineRequest(
            f"turn-{next(self._names)}",
            prompt,
            sampler(self._model, self._tokenizer, prompt, length, self.sampling, seed=self.seed),
            AnswerText(self._tokenizer, [*stop_strings(theirs), *self.stops]),
            length,
            end_tokens(theirs, self._tokenizer),
            arrived.put,
            self._prediction(prompt),
        )

    def _prediction(self, prompt: list[int]) -> Any:
        paged = getattr(self._model, "melinoe_paged", None)
        return paged.predictor.predict(prompt) if paged is not None and paged.predictor is not None else None

    def _counted(self) -> tuple[int, int, int] | None:
        """(hits, loads, bytes) until now; None where nothing is offloaded."""
        paged = getattr(self._model, "melinoe_paged", None)
        if paged is None:
            return None
        counted = paged.pager.statistics
        return (
            counted.decode_hits + counted.prefill_hits,
            counted.decode_loads + counted.prefill_loads + counted.preload_loads,
            counted.decode_bytes + counted.prefill_bytes + counted.preload_bytes,
        )

    def _statistics(
        self, request: EngineRequest, before: tuple[int, int, int] | None, first: float, seconds: float
    ) -> TurnStatistics:
        after = self._counted()
        moved = {}
        if before is not None and after is not None:
            names = ("hits", "loads", "bytes_read")
            moved = {name: new - old for name, old, new in zip(names, before, after, strict=True)}
        return TurnStatistics(
            len(request.prompt), max(request.cached_tokens, 0), len(request.tokens), first, seconds, **moved
        )
