"""docs/families.md says what is so: every row is measured again, generation by every way included."""

from __future__ import annotations

import pytest
import transformers

from families import FAMILIES, SCORE_KINDS
from families_table import COLUMNS, MEASURED, PAGE, TOLERANCE, measure, read_rows

WRITE_AGAIN = "docs/families.md is out of date: python tests/families_table.py"


def test_the_page_has_every_family_and_no_other():
    page = PAGE.read_text()
    rows = read_rows(page)
    assert tuple(rows) == FAMILIES, WRITE_AGAIN
    assert all(tuple(row) == COLUMNS for row in rows.values()), WRITE_AGAIN
    assert f"transformers {transformers.__version__};" in page, WRITE_AGAIN
    assert "WRONG" not in page


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_a_run_gives(family, tmp_path):
    row, _ = measure(family, tmp_path)
    assert "WRONG" not in row.values(), row  # paging changed a result
    assert row["router score"] == SCORE_KINDS.get(family, "softmax")
    page = read_rows(PAGE.read_text())[family]
    for column in MEASURED:
        assert float(row[column]) <= TOLERANCE[column], (column, row[column])
        assert float(page[column]) <= TOLERANCE[column], WRITE_AGAIN
    fixed = [column for column in COLUMNS if column not in MEASURED]
    assert {column: row[column] for column in fixed} == {column: page[column] for column in fixed}, (
        WRITE_AGAIN
    )


def test_a_stale_page_is_seen(tmp_path):
    """The negative control: a cell that says something else is read as something else."""
    page = PAGE.read_text()
    rows = read_rows(page)
    changed = read_rows(page.replace("| OlmoeExperts | softmax |", "| OlmoeExperts | sigmoid |"))
    assert changed["olmoe"] != rows["olmoe"]
    assert {name: row for name, row in changed.items() if name != "olmoe"} == {
        name: row for name, row in rows.items() if name != "olmoe"
    }
