"""docs/paper.md maps equations to functions and tests: everything that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = [line for line in (ROOT / "docs" / "paper.md").read_text().splitlines() if line.startswith("| ")]


def test_every_function_is_in_its_file():
    seen = 0
    for row in ROWS:
        code = re.findall(r"`([^`]+)`", "|".join(row.split("|")[:-2]))
        text = ""
        for name in code:
            if name.endswith((".py", "/")):
                place = ROOT / "src" / "melinoe" / name
                assert place.exists(), name
                text = place.read_text() if place.is_file() else ""
            elif text:
                word = re.match(r"\w+", name)[0]
                assert re.search(rf"^(def {word}\(|class {word}\b|{word}\b)", text, re.MULTILINE), (row, name)
                seen += 1
    assert seen > 15


def test_every_test_is_there():
    seen, text = 0, ""
    for row in ROWS:
        for name in re.findall(r"`((?:test_\w+\.py)?(?:::test_\w+)?)`", row):
            file, _, test = name.partition("::")
            if file:
                text = (ROOT / "tests" / file).read_text()
            assert not test or f"\ndef {test}(" in text, name
            seen += 1
    assert seen > 20
