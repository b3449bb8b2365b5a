"""docs/families.md, measured: `python tests/families_table.py` writes it, test_families_table.py checks it.

A cell is what a run of the tiny configuration gave, not what somebody remembers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import melinoe
from families import FAMILIES, UNDECORATED, WAYS, batch, generate, resident, save_checkpoint
from melinoe.models.layers import moe_layers
from melinoe.models.router_tap import RouterTap, score_kind

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SLOTS = 3  # of 8 experts, 2 per token: every prompt asks for more than there are
COLUMNS = ("family", "experts class", "router score", "float32", "bfloat16", "paged = resident", *WAYS)
MEASURED = ("float32", "bfloat16")  # columns whose digits depend on the machine
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-5}  # of the largest logit; two layers add up what one rounds
TEXT = """\
# Families

Written by `python tests/families_table.py` with transformers {version}; `tests/test_families_table.py`
measures every row again and fails when this page says something else. All models are tiny and random: two MoE
layers (one where the first is dense), 8 experts, 2 per token.

- **router score**: how logits become scores, as `melinoe.models.router_tap.score_kind` finds it from one
  recorded call.
- **float32, bfloat16**: the largest difference between our logits with every expert resident and those of
  transformers' `grouped_mm`, over the largest logit. For {undecorated} transformers knows only one way,
  and this is the difference to that. Digits depend on the machine; allowed are
  {float32:.0e} and {bfloat16:.3f}.
- **paged = resident**: logits with {slots} slots and with none equal, bit for bit and in both dtypes, those
  of our own function with every expert resident.
- **ways to generate**: "yes" where greedy tokens with {slots} slots equal the resident model's; "-" where
  transformers itself refuses the resident model (the reasons stand below the table).

{table}

## What transformers refuses

{refusals}

llama4 and dbrx are not decorated for transformers' ExpertsInterface (`melinoe/models/undecorated` has what
differs). They convert, load, trace and generate; llama4 can be tuned, dbrx is refused there (all experts of a
layer are one flat matrix, in which PEFT cannot name one expert). jetmoe, longcat_flash and doge are not
decorated either: they are refused as models without experts modules.
"""


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def _compare_dtype(family: str, dtype: torch.dtype, folder: Path) -> tuple[float, bool]:
    """(largest difference to transformers over the largest logit, whether paging keeps every bit)."""
    source = save_checkpoint(folder / "model", family, dtype)
    way = {} if family in UNDECORATED else {"experts_implementation": "grouped_mm"}
    expected = _logits(AutoModelForCausalLM.from_pretrained(source, **way).eval())
    own = _logits(resident(source))
    melinoe.convert(source, folder / "store", progress=False)
    paged = [_logits(melinoe.load(folder / "store", slots=slots)) for slots in (SLOTS, 0)]
    difference = float((own - expected).abs().max() / expected.abs().max())
    return difference, all(torch.equal(logits, own) for logits in paged)


def _ways(family: str, source: Path, store: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """(a cell for each of WAYS, {way: why transformers refuses it})."""
    stock, paged = resident(source), melinoe.load(store, slots=SLOTS)
    assistant = resident(save_checkpoint(folder / "assistant", family, seed=1), use_own=False)
    cells, refusals = [], {}
    for way in WAYS:
        try:
            expected = generate(stock, way, assistant)
        except Exception as error:
            cells.append("-")
            refusals[way] = str(error).splitlines()[0][:160]
            continue
        cells.append("yes" if generate(paged, way, assistant) == expected else "WRONG")
    return cells, refusals


def measure(family: str, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(the family's row, {way: why transformers refuses it})."""
    differences, exact = zip(
        _compare_dtype(family, torch.float32, folder / "float32"),
        _compare_dtype(family, torch.bfloat16, folder / "bfloat16"),
        strict=True,
    )
    source, store = folder / "float32" / "model", folder / "float32" / "store"
    model = resident(source, use_own=False)
    layers = moe_layers(model)
    with torch.no_grad(), RouterTap(layers) as tap:
        model(**batch())
    kinds = sorted({score_kind(record) for record in tap.records})
    ways, refusals = _ways(family, source, store, folder)
    cells = [
        family,
        type(layers[0].experts).__name__,
        ", ".join(kinds),
        *[f"{value:.0e}" if value else "0" for value in differences],
        "yes" if all(exact) else "WRONG",
        *ways,
    ]
    return dict(zip(COLUMNS, cells, strict=True)), refusals


def read_rows(page: str) -> dict[str, dict[str, str]]:
    """{family: {column: cell}} of the page's table."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line
    ]
    header, _, *rows = lines
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def write() -> None:
    """Measures every family and writes the page."""
    rows, reasons = [], []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            row, refusals = measure(family, Path(folder))
        rows.append(row)
        reasons += [f"- {family}, {way}: {why}" for way, why in refusals.items()]
        print(" | ".join(row.values()), file=sys.stderr)
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(row.values()) for row in rows]
    PAGE.write_text(
        TEXT.format(
            version=transformers.__version__,
            undecorated=" and ".join(UNDECORATED),
            slots=SLOTS,
            table="\n".join(f"| {line} |" for line in lines),
            refusals="\n".join(reasons),
            **TOLERANCE,
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
