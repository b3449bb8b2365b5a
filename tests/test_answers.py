"""Final answers: the same number in any dress is one answer, other numbers are others, a heading is none."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from melinoe.measure.answers import exact_match, final_answer

SAME = {
    "70,000.00": "70000",
    "$29.00": "29",
    "**18**": "18",
    "\\$18": "18",
    "3.0": "3",
    ".5": "0.5",
    "+5": "5",
    "1,200.": "1200",
    "1 200": "1200",
    "1\u202f200": "1200",
    "-$7": "-7",
    "$-7": "-7",
    "\u22125": "-5",
    "\\boxed{18}": "18",
    "$18$": "18",
    "2/4": "0.5",
    "1 1/2": "1.5",
    "50%": "50",
    "18 dollars": "18",
    "1e3": "1000",
    "007": "7",
    "-0": "0",
}
DIFFERENT = [
    ("1/2", "1/3"),
    ("10:30", "10:45"),
    ("1 200", "1 300"),
    ("1e3", "1e6"),
    ("1 20", "1 30"),
    ("5-7", "5-8"),
    ("3,5", "35"),
    ("12/5/2020", "12/5/2021"),
    ("1.2.3", "1.2.4"),
    ("1/3", "0.33"),
    ("1e99999", "1e99998"),
]


@pytest.mark.parametrize(("written", "number"), SAME.items())
def test_one_number_in_any_dress(written, number):
    assert final_answer(f"steps, 7 of them\n#### {written}") == number
    assert exact_match(f"so\n#### {written}", f"otherwise\n#### {number}", "strict")
    assert exact_match(f"so it is {written}", f"otherwise\n#### {number}", "flexible")


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_other_numbers_are_others(one, other):
    assert final_answer(f"#### {one}") is not None
    assert not exact_match(f"#### {one}", f"#### {other}", "strict")


def test_a_heading_is_no_answer():
    assert final_answer("#### 1. Overview") is None
    assert final_answer("#### Overview\n1. one") is None
    assert final_answer("no number ####") is None
    assert final_answer("a\n####\n5") is None
    assert not exact_match("#### 1. Overview", "#### 1", "strict")


def test_of_several_answers_the_last_counts():
    assert final_answer("#### $5\nno, #### -7") == "-7"
    assert final_answer("#### 5\n#### Why\nbecause") == "5"
    assert final_answer("5 and then 7 of them.", "flexible") == "7"
    assert final_answer("none", "flexible") is None


def test_no_filter_no_guess():
    """A reference with #### in it is compared as text unless somebody says how."""
    assert exact_match(" yes \n", "yes")
    assert not exact_match("yes, it is", "yes")
    assert not exact_match("wrong steps\n#### 1,200.", "right steps\n#### 1200")
    assert exact_match("wrong steps\n#### 1,200.", "right steps\n#### 1200", "strict")
    assert not exact_match("1200", "steps\n#### 1200", "strict")
    assert exact_match("1200", "steps\n#### 1200", "flexible")
    assert exact_match("yes", " yes", "strict")  # a reference without a number is a text


def lm_eval(text: str) -> str | None:
    """What the strict filter of lm-eval's gsm8k.yaml finds, and the normalisation it compares with."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return re.sub(r",|\$|\.$", "", found[1]) if found else None


@given(st.integers(-(10**7), 10**7), st.booleans(), st.booleans())
def test_plain_answers_are_those_of_lm_eval(number, grouped, stop):
    text = f"steps\n#### {number:,}{'.' * stop}" if grouped else f"steps\n#### {number}{'.' * stop}"
    assert final_answer(text) == lm_eval(text)


@given(st.text(st.sampled_from("0123456789.,:/ $-+#e\n%*\\"), max_size=25))
def test_anything_has_an_answer_or_none(text):
    found = final_answer(f"#### {text}")
    assert found is None or exact_match(f"so\n#### {text}", f"#### {text}", "strict")
    assert final_answer(text, "flexible") == final_answer(f"so {text}", "flexible")
