"""Final answers: what in a long text is the answer, and when two of them are the same number.

Two filters, named as lm-eval names those of GSM8K:

    strict     what stands behind `####`; a text without one has no answer
    flexible   the last number of the text

Which one judges a row is chosen by its data set (FILTERS), or by whoever asks; never guessed from a `####`,
which may be a heading. Without a filter a completion is compared as it stands.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

Filter = Literal["strict", "flexible"]
FILTER_NAMES: tuple[Filter, ...] = ("strict", "flexible")
FILTERS: dict[str, Filter] = {"gsm8k": "strict"}  # data sets whose answers stand behind ####, by name or task

_SPACE = "[ \u00a0\u2009\u202f]"  # between groups of three digits: a space, a narrow or a fixed one
_GROUPED = rf"\d{{1,3}}(?:,\d{{3}})+|\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)"
_DECIMAL = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_VALUE = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<whole>\d+) )?(?P<above>\d+)/(?P<below>\d+)(?!\d|[.,:/]\d)"  # 1/2, 1 1/2
    rf"|(?P<sign2>[+-]?)(?P<decimal>{_DECIMAL})(?!\d|[.,:/]\d)"
    r"|(?P<other>[+-]?\d[\d.,:/]*\d)"  # 10:30, 1.2.3: no number, but an answer
)
_MARKER = re.compile(r"####[ \t]*(?P<line>[^\n]*)")
_DRESS = re.compile(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}|\\[()\[\]]|[*_`{}]|\\?[$€£¥]")
_GOES_ON = re.compile(r"(?:\s*[-+*/^×–:.,]?\s*\d+)+")
_HEADING = re.compile(r"\d+[.)]\s+\S")  # `#### 1. Overview`


def final_answer(text: str, filter: Filter = "strict") -> str | None:
    """The answer in a text, as one text for all ways to write the same number; None where there is none.

    `70,000.00` is 70000, `$29.00` 29, `**18**` 18, `.5` 0.5; `1/2`, `10:30`, `1 200` and `1e3` stay what they
    are.
    Of several answers the last counts: whoever corrects himself means it.
    """
    if filter == "flexible":
        found = [_plain(match) for match in _VALUE.finditer(_undressed(text))]
        return found[-1] if found else None
    for line in reversed([match["line"] for match in _MARKER.finditer(text)]):
        line = _undressed(line).strip()
        match = _VALUE.match(line)
        if match is not None and not _HEADING.match(line):
            more = _GOES_ON.match(line, match.end())  # `5-7`, `1 20`: not one number
            return " ".join(line[: more.end()].split()) if more else _plain(match)
    return None


def exact_match(completion: str, reference: str, filter: Filter | None = None) -> bool:
    """Equality of the final answers that a filter finds; without one, of the stripped texts.

    Of a reference that has no answer behind `####` the filter finds none, and the texts are compared.
    """
    answer = None if filter is None else final_answer(reference, "strict") or final_answer(reference, filter)
    if answer is None or filter is None:
        return completion.strip() == reference.strip()
    return final_answer(completion, filter) == answer


def _undressed(text: str) -> str:
    """Without what sets a number off: emphasis, currency, LaTeX."""
    text = text.replace("−", "-")
    while (less := _DRESS.sub(r"\1", text)) != text:
        text = less
    return text


def _plain(match: re.Match[str]) -> str:
    """One text for every way to write a number."""
    if match["other"]:
        return match["other"]
    sign = -1 if "-" in (match["sign"] or "") + (match["sign2"] or "") else 1
    if match["above"]:
        if int(match["below"]) == 0:
            return match[0]
        value = int(match["whole"] or 0) + Fraction(int(match["above"]), int(match["below"]))
    else:
        digits = re.sub(f"[,]|{_SPACE}", "", match["decimal"])
        exponent = re.search(r"[eE]([+-]?\d+)$", digits)
        if (
            exponent and abs(int(exponent[1])) > 999
        ):  # nobody means such a number, and it would be written out
            return match[0]
        value = Fraction(digits)
    value *= sign
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    while rest % 10 == 0 or rest % 2 == 0 or rest % 5 == 0:
        rest = rest // 10 if rest % 10 == 0 else rest // 2 if rest % 2 == 0 else rest // 5
        places += 1
    if rest > 1:  # no end behind the point
        return f"{value.numerator}/{value.denominator}"
    whole = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' * (value < 0)}{whole[:-places]}.{whole[-places:].rstrip('0')}"
