"""docs/help.md is what the command line says of itself."""

from __future__ import annotations

import re

from help_page import PAGE, help_of, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tools/help_page.py"


def test_it_is_the_help_that_a_user_sees():
    assert help_of("merge").startswith("Usage: melinoe merge [OPTIONS]")
    assert f"```text\n{help_of('tune')}\n```" in page()
    assert "| `gamma` | 0.9 | 0 .. 1 | Forgetting of the simulated cache (Eq. 11). |" in page()


def test_every_number_has_bounds():
    """What an option says it takes is a range; those whose bounds a model has, or that are open, are named
    here."""
    unbounded = set(re.findall(r"--([a-z-]+) <(?:int|float)>", page()))
    assert unbounded == {"slots", "time-limit"}  # tests/test_accepted.py and tests/test_settings.py have them
