"""Text from tokens as they come: the pieces joined are what the tokenizer makes of all tokens at once.

A tokenizer decodes a sequence, not a token: half a character has no text yet, a run of byte tokens may still
turn out to be no character at all, and some decoders take a space back when punctuation follows. So the whole
of a short window is decoded again with every token, and what a later token could still change is held back.
"""

from __future__ import annotations

import re
from typing import Any

WINDOW = 64  # tokens decoded again for each new one, at most; the first half of them is context
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNKNOWN = "\ufffd"


class Detokenizer:
    """Decodes one sequence step by step.

    Args:
        tokenizer: of transformers, with or without a Rust backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._uncertain_words = _uncertain_words(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {number for number, token in added.items() if token.special}
        self._window: list[int] = []
        self._shown = ""  # of the window
        self._mark: int | None = None  # where the next window may start: everything before it has been shown

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often empty."""
        if token in self._special and not self._decode([token]):
            return ""  # as if it were not there: a run of bytes goes on behind it
        self._window.append(token)
        text = self._decode(self._window)
        piece = self._show(text[: self._certain(text)])
        if self._shown == text:
            self._move_on(text)
        return piece

    def finish(self) -> str:
        """What was held back, after the last token."""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._shown += piece
        return piece

    def _certain(self, text: str) -> int:
        """How many characters of the window's text no later token can change."""
        if _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(self._window[-1]))):
            return len(self._shown)  # a run of bytes is a character or not as a whole
        certain = len(text.rstrip(_UNKNOWN))
        for _ in range(self._uncertain_words):
            certain = max(text.rfind(" ", 0, certain), 0)
        return max(certain, len(self._shown))

    def _move_on(self, text: str) -> None:
        """Forgets the first half of a full window; what remains of it is the context of what comes."""
        if len(self._window) >= WINDOW and self._mark is not None:
            self._window = self._window[self._mark :]
            self._shown, self._mark = self._decode(self._window), None
        elif len(self._window) >= WINDOW // 2 and self._mark is None:
            self._mark = len(self._window)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _uncertain_words(tokenizer: Any) -> int:
    """How many words at the end may still lose the space before them: `do n ' t` becomes `don't`."""
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return 3
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return 1 if decoder is not None and b'"cleanup":true' in decoder.__getstate__() else 0
