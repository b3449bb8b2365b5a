"""Where the answers stand in the tokens of a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Span = tuple[int, int]  # first token, and the one behind the last


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row.

    answers: the tokens that an assistant says, in order, none of them first: what is learned and scored. The
    end token of each answer is part of it.
    """

    ids: list[int]
    answers: tuple[Span, ...]

    @property
    def prompt_length(self) -> int:
        """Tokens before the first answer: what is read before decoding begins."""
        return self.answers[0][0]

    @property
    def end(self) -> int:
        """The place behind the last answer: what follows is never generated."""
        return self.answers[-1][1]

    @property
    def num_answer_tokens(self) -> int:
        return sum(end - start for start, end in self.answers)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def encoded_or_nothing(ids: list[int], spans: Iterable[Span]) -> Encoded | None:
    """None of the answers begins with the first token, which nothing predicts; empty ones are no answers."""
    kept, behind = [], 1
    for start, end in spans:
        if end > max(start, behind):
            kept.append((max(start, behind), end))
            behind = end
    return Encoded(ids, tuple(kept)) if kept else None
