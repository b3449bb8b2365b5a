"""The text of an answer as it grows: no half characters, and never a part of a stop string."""

from __future__ import annotations

from typing import Any

from melinoe.runtime.detokenize import Detokenizer

_FIRST_MARK = 0xF0000  # private characters: special tokens, which have no text, where a stop string has them


class AnswerText:
    """Text of one answer, ended by the first stop string that it contains.

    Args:
        tokenizer: of transformers.
        stops: the answer ends before the first of these; none of them is empty. One that is a token of its
            own, such as `<|im_end|>`, or has one in it, need not have text in the answer.
    """

    def __init__(self, tokenizer: Any, stops: list[str]) -> None:
        self._pieces = Detokenizer(tokenizer)
        added = tokenizer.get_added_vocab() if stops else {}
        self._stop_tokens = {added[stop] for stop in stops if stop in added}
        tokens = getattr(tokenizer, "added_tokens_decoder", {}) if stops else {}
        special = {token.content: number for number, token in tokens.items() if token.special}
        named = sorted((text for text in special if any(text in stop for stop in stops)), key=len)[::-1]
        self._marks = {special[text]: chr(_FIRST_MARK + place) for place, text in enumerate(named)}
        self._unmarked = dict.fromkeys(map(ord, self._marks.values()))  # as str.translate takes it
        marked = stops
        for text in named:
            marked = [stop.replace(text, self._marks[special[text]]) for stop in marked]
        self._stops = [*stops, *(stop for stop in marked if stop not in stops)]  # spelled, or of the token
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """What may be shown after this token. `stopped` tells whether the answer ends here."""
        if token in self._stop_tokens:
            text = self.finish()
            self.stopped = True
            return text
        if token in self._marks:
            return self._check(self._pieces.finish() + self._marks[token])
        return self._check(self._pieces.add(token))

    def finish(self) -> str:
        """What was held back, after the last token."""
        if self.stopped:
            return ""
        text = self._check(self._pieces.finish())
        return text if self.stopped else text + self._held.translate(self._unmarked)

    def _check(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)].translate(self._unmarked)
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held].translate(self._unmarked)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
