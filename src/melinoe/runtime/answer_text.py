"""The text of an answer as it grows: no half characters, and never a part of a stop string."""

from __future__ import annotations

from typing import Any

from melinoe.runtime.detokenize import Detokenizer


class AnswerText:
    """Text of one answer, ended by the first stop string that it contains.

    Args:
        tokenizer: of transformers.
        stops: the answer ends before the first of these; none of them is empty. One that is a token of its
            own, such as `<|im_end|>`, need not have text in the answer.
    """

    def __init__(self, tokenizer: Any, stops: list[str]) -> None:
        self._pieces = Detokenizer(tokenizer)
        self._stops = stops
        added = tokenizer.get_added_vocab() if stops else {}
        self._stop_tokens = {added[stop] for stop in stops if stop in added}
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """What may be shown after this token. `stopped` tells whether the answer ends here."""
        if token in self._stop_tokens:
            text = self.finish()
            self.stopped = True
            return text
        return self._check(self._pieces.add(token))

    def finish(self) -> str:
        """What was held back, after the last token."""
        if self.stopped:
            return ""
        text = self._check(self._pieces.finish())
        return text if self.stopped else text + self._held

    def _check(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
