"""One prompt on its way through an engine: what is asked for, and what has been answered so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from melinoe.prediction.predictor import Prediction
from melinoe.runtime.answer_text import AnswerText
from melinoe.serving.engine.sampling import Choice, Sampler


@dataclass(frozen=True)
class Progress:
    """What one step brought.

    text: what may be shown. choices: tokens since the last piece of text.
    finish_reason: "stop" or "length" in the last one. error: the engine could not go on; nothing follows.
    """

    text: str = ""
    choices: tuple[Choice, ...] = ()
    finish_reason: str | None = None
    error: BaseException | None = None
    at: float = 0.0


class EngineRequest:
    """Made by the HTTP side, advanced by an engine's thread.

    Args:
        name: unique.
        prompt: token ids, at least one.
        sampler: chooses its tokens.
        text: makes text of them and looks for stop strings.
        max_new_tokens: 1 or more.
        end_tokens: the answer ends with the first of these.
        deliver: called in the engine's thread with every `Progress`; must not block.
        prediction: of the prompt's experts, where there is a predictor (`Predictor.predict`).
    """

    def __init__(
        self,
        name: str,
        prompt: list[int],
        sampler: Sampler,
        text: AnswerText,
        max_new_tokens: int,
        end_tokens: list[int],
        deliver: Callable[[Progress], Any],
        prediction: Prediction | None = None,
    ) -> None:
        self.name, self.prompt, self.sampler, self.text = name, prompt, sampler, text
        self.max_new_tokens, self.end_tokens = max_new_tokens, frozenset(end_tokens)
        self.prediction = prediction
        self._deliver = deliver
        self._unshown: list[Choice] = []
        self.tokens: list[int] = []
        self.cached_tokens = 0  # of the prompt, not computed again
        self.finished = False

    def advance(self, logits: torch.Tensor) -> int:
        """Chooses the next token, hands on what may be shown, and returns the token.

        Args:
            logits: [V] float32.
        """
        choice = self.sampler.choose(logits)
        self.tokens.append(choice.token)
        self._unshown.append(choice)
        text, reason = self.text.add(choice.token), None
        if self.text.stopped:
            reason = "stop"
        elif choice.token in self.end_tokens or len(self.tokens) >= self.max_new_tokens:
            text += self.text.finish()
            ended = choice.token in self.end_tokens or self.text.stopped
            reason = "stop" if ended else "length"
        if text or reason:
            choices, self._unshown = tuple(self._unshown), []
            self.finished = reason is not None
            self._deliver(Progress(text, choices, reason, at=time.perf_counter()))
        elif len(self.tokens) == 1:
            self._deliver(
                Progress(at=time.perf_counter())
            )  # the first token counts though it has no text yet
        return choice.token

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, unless it has ended."""
        if not self.finished:
            self.finished = True
            self._deliver(Progress(error=error, at=time.perf_counter()))
