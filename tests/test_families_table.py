"""docs/families.md says what is so: every type of transformers is on it, and every row is measured again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import FAMILIES, SCORE_KINDS, WAYS
from families_table import COLUMNS, MEASURED, PAGE, TOLERANCE, measure, read_rows, refused_section
from family_configs import exact_types, mixture_types

WRITE_AGAIN = "docs/families.md is out of date: python tests/families_table.py"
CHEAP = ("dynamic cache",)  # of the families that are not in FAMILIES


def out_of_date(page: str) -> list[str]:
    """The types of transformers that a page lacks, or has and should not."""
    rows = read_rows(page)
    return sorted(set(rows) ^ set(exact_types())) + ["refused"] * (refused_section() not in page)


def test_the_page_has_every_type_of_transformers_and_no_other():
    page = PAGE.read_text()
    rows = read_rows(page)
    assert tuple(rows) == exact_types(), WRITE_AGAIN
    assert out_of_date(page) == [], WRITE_AGAIN
    assert all(tuple(row) == COLUMNS for row in rows.values()), WRITE_AGAIN
    assert f"transformers {transformers.__version__};" in page, WRITE_AGAIN
    assert "WRONG" not in page
    assert set(FAMILIES) <= set(rows)


def test_a_type_that_is_missing_is_seen():
    """The negative control: a page without a family, or without one of those that are refused."""
    page = PAGE.read_text()
    without = "\n".join(line for line in page.splitlines() if not line.startswith("| olmoe |"))
    assert out_of_date(without) == ["olmoe"]
    assert out_of_date(page.replace("qwen3_vl_moe,", "")) == ["refused"]


def test_no_mixture_is_missed():
    """The other way round: no causal model has experts in its source and nothing of them in its config."""
    models, found = Path(transformers.__file__).parent / "models", []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = models / model_type_to_module_name(name)
        sources = "".join(path.read_text() for path in folder.glob("modeling_*.py"))
        if re.search(r"use_experts_implementation|class \w+(Experts|MoE|Moe|Router)\b", sources):
            found.append(name)
    assert "olmoe" in found
    assert [name for name in found if name not in mixture_types()] == []


@pytest.mark.parametrize("family", exact_types())
def test_a_row_is_what_a_run_gives(family, tmp_path):
    row, _ = measure(family, tmp_path, WAYS if family in FAMILIES else CHEAP)
    assert "WRONG" not in row.values(), row  # paging changed a result
    assert row["router score"] == SCORE_KINDS.get(family, "softmax")
    page = read_rows(PAGE.read_text())[family]
    for column in MEASURED:
        assert float(row[column]) <= TOLERANCE[column], (column, row[column])
        assert float(page[column]) <= TOLERANCE[column], WRITE_AGAIN
    fixed = [column for column in row if column not in MEASURED]
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
