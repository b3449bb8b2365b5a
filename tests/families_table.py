"""docs/families.md, measured: `python tests/families_table.py` writes it, test_families_table.py checks it.

A cell is what a run of the tiny configuration gave, not what somebody remembers.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import melinoe
from families import UNDECORATED, WAYS, batch, generate, resident, save_checkpoint
from family_configs import exact_types, refused_types
from melinoe.conversion.in_place import NotInPlaceError, index_in_place
from melinoe.errors import MelinoeError
from melinoe.models.layers import moe_layers
from melinoe.models.router_tap import RouterTap, score_kind
from melinoe.models.supported import refusal
from melinoe.tuning.memory.needed import check_family

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SLOTS = 3  # of 8 experts, 2 per token: every prompt asks for more than there are
BESIDE_WAYS = (
    "family", "experts class", "router score", "float32", "bfloat16", "paged = resident", "in place", "tuned"
)  # fmt: skip
COLUMNS = (*BESIDE_WAYS, *WAYS)
MEASURED = ("float32", "bfloat16")  # columns whose digits depend on the machine
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-5}  # of the largest logit; two layers add up what one rounds
TEXT = """\
# Families

Written by `python tests/families_table.py` with transformers {version}; `tests/test_families_table.py`
measures every row again (of most families one way to generate) and fails when this page says something else,
or when transformers has a type of model with experts that is not here. The types are found in transformers'
own configurations: every one that has fields about experts, itself or in a part of it, {count} in all.
{exact} of them are exact, the others are refused by their name.

## Exact

All models are tiny and random: one or two MoE layers, 8 experts, 2 per token (1 in zaya, which allows no
other). Types with a text part are written whole, with what makes tokens of pictures or sounds, and
AutoModelForCausalLM opens what it opens: for gemma4 all of it, for the others the text part alone.

- **router score**: how logits become scores, as `melinoe.models.router_tap.score_kind` finds it from one
  recorded call.
- **float32, bfloat16**: the largest difference between our logits with every expert resident and those of
  transformers' `grouped_mm`, over the largest logit. For {undecorated} transformers
  knows only one way, and this is the difference to that. Digits depend on the machine; allowed are
  {float32:.0e} and {bfloat16:.3f}.
- **paged = resident**: logits with {slots} slots and with none equal, bit for bit and in both dtypes, those
  of our own function with every expert resident.
- **in place**: "yes" where the same holds for experts read from the checkpoint's own files; "-" where those
  hold them in another order than they are computed in, so that `melinoe convert` has to write them anew.
- **tuned**: "yes" where `melinoe tune` can (`tests/test_families_tuning.py`); every type can be traced.
- **ways to generate**: "yes" where greedy tokens with {slots} slots equal the resident model's; "-" where
  transformers itself refuses the resident model (the reasons stand below the table).

{table}

### What transformers refuses

{refusals}

### What is special

- llama4 and dbrx are not decorated for transformers' ExpertsInterface; `melinoe/models/undecorated` has what
  differs. dbrx is not tuned: all experts of a layer are one flat matrix, in which PEFT cannot name one.
- The first layers of deepseek_v4 look experts up by token. They are traced and paged like others; tuning
  changes how much such an expert counts, not which one it is.
- A token of zaya may skip the experts of a layer. zaya then asks for expert 0 with weight 0, and so it stands
  in traces.

## Refused

{refused}
"""


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def _compare_dtype(family: str, dtype: torch.dtype, folder: Path) -> tuple[float, bool, bool | None]:
    """How a family computes in one dtype.

    Returns:
        (largest difference to transformers over the largest logit, whether paging keeps every bit, whether it
        does so in place or None where the checkpoint cannot be read in place).
    """
    source = save_checkpoint(folder / "model", family, dtype)
    way = {} if family in UNDECORATED else {"experts_implementation": "grouped_mm"}
    expected = _logits(AutoModelForCausalLM.from_pretrained(source, **way).eval())
    own = _logits(resident(source))
    melinoe.convert(source, folder / "store", progress=False)
    paged = [_logits(melinoe.load(folder / "store", slots=slots)) for slots in (SLOTS, 0)]
    difference = float((own - expected).abs().max() / expected.abs().max())
    try:
        index_in_place(source, folder / "in_place")
    except NotInPlaceError:
        in_place = None
    else:
        in_place = torch.equal(_logits(melinoe.load(folder / "in_place", slots=SLOTS)), own)
    return difference, all(torch.equal(logits, own) for logits in paged), in_place


def _ways(
    family: str, source: Path, store: Path, folder: Path, ways: Iterable[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """({way: its cell}, {way: why transformers refuses it})."""
    stock, paged = resident(source), melinoe.load(store, slots=SLOTS)
    cells, refusals = {}, {}
    for way in ways:
        assistant = None
        if way == "assisted":
            assistant = resident(save_checkpoint(folder / "assistant", family, seed=1), use_own=False)
        try:
            expected = generate(stock, way, assistant)
        except Exception as error:
            cells[way] = "-"
            refusals[way] = str(error).splitlines()[0][:160]
            continue
        cells[way] = "yes" if generate(paged, way, assistant) == expected else "WRONG"
    return cells, refusals


def _tuned(model: Any) -> str:
    try:
        check_family(model)
    except MelinoeError:
        return "-"
    return "yes"


def measure(family: str, folder: Path, ways: Iterable[str] = WAYS) -> tuple[dict[str, str], dict[str, str]]:
    """(the family's row, with cells for these ways to generate; {way: why transformers refuses it})."""
    differences, exact, in_place = zip(
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
    generated, refusals = _ways(family, source, store, folder, ways)
    cells = [
        family,
        type(layers[0].experts).__name__,
        ", ".join(kinds),
        *[f"{value:.0e}" if value else "0" for value in differences],
        "yes" if all(exact) else "WRONG",
        {(True, True): "yes", (None, None): "-"}.get(in_place, "WRONG"),
        _tuned(model),
    ]
    return dict(zip(BESIDE_WAYS, cells, strict=True)) | generated, refusals


def _item(text: str) -> str:
    return textwrap.fill(f"- {text}", 110, subsequent_indent="  ", break_on_hyphens=False)


def refused_section() -> str:
    """The types that are refused, by the reason that melinoe gives for each."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name in refused_types():
        found = refusal(name)
        assert found is not None
        by_reason[found.what.partition(": ")[2]].append(name)
    return "\n".join(_item(f"{', '.join(names)}: {reason}.") for reason, names in by_reason.items())


def ways_section(refusals: dict[str, dict[str, str]]) -> str:
    """What transformers refuses. refusals: {family: {way: why}}."""
    ways: dict[tuple[str, str], list[str]] = defaultdict(list)  # by family and reason
    for family, found in refusals.items():
        for way, why in found.items():
            ways[family, why.partition(", such as ")[0].rstrip(".")].append(way)
    families: dict[tuple[str, str], list[str]] = defaultdict(list)  # by ways and reason
    for (family, why), names in ways.items():
        families[", ".join(names), why].append(family)
    return "\n".join(_item(f"{ways}: {why} ({', '.join(names)}).") for (ways, why), names in families.items())


def read_rows(page: str) -> dict[str, dict[str, str]]:
    """{family: {column: cell}} of the page's table."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line
    ]
    header, _, *rows = lines
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def write() -> None:
    """Measures every family and writes the page."""
    rows, refusals = [], {}
    for family in exact_types():
        with tempfile.TemporaryDirectory() as folder:
            row, refusals[family] = measure(family, Path(folder))
        rows.append(row)
        print(" | ".join(row.values()), file=sys.stderr)
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(row.values()) for row in rows]
    PAGE.write_text(
        TEXT.format(
            version=transformers.__version__,
            count=len(exact_types()) + len(refused_types()),
            exact=len(exact_types()),
            undecorated=f"{', '.join(UNDECORATED[:-1])} and {UNDECORATED[-1]}",
            slots=SLOTS,
            table="\n".join(f"| {line} |" for line in lines),
            refusals=ways_section(refusals),
            refused=refused_section(),
            **TOLERANCE,
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
