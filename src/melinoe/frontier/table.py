"""The tables of a sweep, for the page and for documents: pooled, per seed, and what a loss buys."""

from __future__ import annotations

import re
from typing import Any

Table = tuple[list[str], list[list[str]]]  # headings, rows
LOSSES = (0.01, 0.05)  # of perplexity, for the sentence on what they buy


def entry_at(rows: list[dict[str, Any]], policy: str, slots: int) -> dict[str, Any] | None:
    """The entry of one policy at one budget."""
    return next((row for row in rows if (row["policy"], row["slots"]) == (policy, slots)), None)


def reference(result: dict[str, Any]) -> tuple[str, int]:
    """The policy and the budget that the plot and the first table look at: what was tuned for."""
    settings = result["settings"]
    budgets = settings["budgets"]
    slots = settings["slots"] if settings["slots"] in budgets else budgets[len(budgets) // 2]
    return settings["policies"][0], slots


def interval(ratio: dict[str, float], digits: int = 4) -> str:
    return f"{ratio['ratio']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def rows_of(result: dict[str, Any], data: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, measured) of the base and of every point."""
    return [("base", result["base"][data]), *((row["name"], row[data]) for row in result["points"])]


def _looked_at(
    row: dict[str, Any], policy: str, slots: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(loads, their ratio to the control's, static sets) of what was measured, at the reference."""
    loads, ratio = entry_at(row["loads"], policy, slots), entry_at(row["to_control"]["loads"], policy, slots)
    assert loads is not None and ratio is not None
    return loads, ratio, next(entry for entry in row["static"] if entry["slots"] == slots)


def _static_headings(slots: int) -> list[str]:
    return [f"own {slots}", f"shared {slots}", "own - shared", "/ one set"]


def _static_cells(row: dict[str, Any], static: dict[str, Any], policy: str) -> list[str]:
    """What belongs to the sequence, and the loads over those of the best set for all in the same slots."""
    own, shared = static["own"], static["shared"]
    bar = entry_at(row["to_shared"], policy, static["slots"])
    assert bar is not None
    over = interval(bar, 3) if shared < 1 else "-"  # slots for all experts: nothing is left to load
    return [f"{own:.3f}", f"{shared:.3f}", f"{own - shared:.3f}", over]


def pooled_table(result: dict[str, Any], data: str) -> Table:
    """One row for each set of weights; seeds pooled. Ratios are to the control of the same seeds."""
    policy, slots = reference(result)
    others = [
        (row["policy"], row["slots"])
        for row in result["points"][0][data]["loads"]
        if (row["policy"], row["slots"]) != (policy, slots)
    ]
    headings = ["weights", "perplexity", "/ control", f"{policy} {slots}: loads/token", "hits", "/ control"]
    headings += [f"{name} {size} / control" for name, size in others]
    headings += [*_static_headings(slots), "balance"]
    judged = all("judged" in row for _, row in rows_of(result, data))
    headings += ["exact match", "Rouge-L"] if judged else []
    rows = []
    for name, row in rows_of(result, data):
        loads, ratio, static = _looked_at(row, policy, slots)
        cells = [name, f"{row['perplexity']:.4f}", interval(row["to_control"]["perplexity"])]
        cells += [f"{loads['loads_per_token']:.3f}", f"{loads['hit_rate']:.3f}", interval(ratio, 3)]
        for other in others:
            entry = entry_at(row["to_control"]["loads"], *other)
            cells.append("-" if entry is None else f"{entry['ratio']:.3f}")  # the base has no predictor
        cells += [*_static_cells(row, static, policy), f"{row['load_entropy']:.3f}"]
        cells += [f"{row['judged'][key]:.3f}" for key in ("exact_match", "rouge_l")] if judged else []
        rows.append(cells)
    return headings, rows


def seeds_table(result: dict[str, Any], data: str) -> Table:
    """The two ratios of every point and seed."""
    _, slots = reference(result)
    headings = ["point", "seed", "NLL", "perplexity / control", "NLL / control"]
    headings += [f"{name} {slots}: loads / control" for name in result["settings"]["policies"]]
    rows = []
    for point in result["points"]:
        for seed in point[data]["seeds"]:
            ratios = seed["to_control"]
            cells = [point["name"], str(seed["seed"]), f"{seed['nll']:.5f}"]
            cells += [interval(ratios["perplexity"]), interval(ratios["nll"])]
            for name in result["settings"]["policies"]:
                entry = entry_at(ratios["loads"], name, slots)
                assert entry is not None
                cells.append(interval(entry))
            rows.append(cells)
    return headings, rows


def origins_table(result: dict[str, Any], data: str) -> Table | None:
    """Where several folders were one: the ratios on each of them. None: one folder, or rows were left out."""
    policy, slots = reference(result)
    headings = ["point", "rows of", "sequences", "NLL", "perplexity / control"]
    headings += [f"{policy} {slots}: loads/token", "/ control", *_static_headings(slots)]
    rows = []
    for point in result["points"]:
        for source, found in point[data].get("origins", {}).items():
            loads, ratio, static = _looked_at(found, policy, slots)
            cells = [point["name"], source, str(found["num_sequences"]), f"{found['nll']:.5f}"]
            cells += [interval(found["to_control"]["perplexity"]), f"{loads['loads_per_token']:.3f}"]
            rows.append([*cells, interval(ratio, 3), *_static_cells(found, static, policy)])
    return (headings, rows) if rows else None


def best_within(result: dict[str, Any], data: str, loss: float) -> dict[str, Any] | None:
    """The point with the fewest loads whose perplexity is at most 1 + loss times the control's.

    Returns:
        {"name", "perplexity", "loads": ratios with intervals, "sure": whether the whole interval of the
        perplexity stays within}; None: no point but the control does.
    """
    policy, slots = reference(result)
    found = []
    for point in result["points"][1:]:
        ratios = point[data]["to_control"]
        loads = entry_at(ratios["loads"], policy, slots)
        assert loads is not None
        if ratios["perplexity"]["ratio"] <= 1 + loss:
            found.append({"name": point["name"], "perplexity": ratios["perplexity"], "loads": loads})
    if not found:
        return None
    best = min(found, key=lambda entry: entry["loads"]["ratio"])
    return best | {"sure": best["perplexity"]["high"] <= 1 + loss}


def sentences(result: dict[str, Any], data: str) -> list[str]:
    """What one and five percent of perplexity buy; one sentence where they buy the same."""
    policy, slots = reference(result)
    said: list[str] = []
    before = None
    for loss in LOSSES:
        best = best_within(result, data, loss)
        if best is not None and best == before:
            continue  # what is said of less holds for more
        before = best
        if best is None or best["loads"]["ratio"] >= 1:
            said.append(
                f"At no more than {loss:.0%} higher perplexity no point needs fewer loads than the control."
            )
            continue
        times = f"{1 / best['loads']['ratio']:.2f} times fewer expert loads per token"
        within = "" if best["sure"] else "; its interval reaches beyond the bound"
        said.append(
            f"At no more than {loss:.0%} higher perplexity than the control: {times} ({best['name']}, "
            f"{policy}, {slots} slots; loads {interval(best['loads'], 3)} of the control's, perplexity "
            f"{interval(best['perplexity'])}{within})."
        )
    return said


def escaped(text: str) -> str:
    """Text that means itself in Markdown: in it no cell or line ends, and no link, code or HTML begins."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(re.sub(r"([\\`*|\[\]])", r"\\\1", text).split())


def markdown(table: Table) -> str:
    headings, rows = table
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    cells = [[escaped(text) for text in row] for row in rows]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def document(result: dict[str, Any]) -> str:
    """All of it as Markdown, in the manner of docs/results.md."""
    settings, machine = result["settings"], result["machine"]
    parts = [
        f"## Frontier: {escaped(settings['model'])}",
        f"{escaped(machine['processor'])}, {machine['cores']} cores; Python {machine['python']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, melinoe {machine['melinoe']}; "
        f"seeds {', '.join(map(str, settings['seeds']))}; {result['seconds']:.0f} s of this call.",
    ]
    for data, title in (("held_out", "Held-out rows"), ("out_of_domain", "Out of domain")):
        if data not in result["base"]:
            continue
        count = result["base"][data]["num_sequences"]
        source = settings["out_of_domain"] if data == "out_of_domain" else ", ".join(settings["data"])
        parts.append(f"### {title}: {count} sequences of {escaped(source)}")
        parts += [*map(escaped, sentences(result, data)), markdown(pooled_table(result, data))]
        by_origin = origins_table(result, data)
        parts += [markdown(by_origin)] if by_origin else []
        parts.append(markdown(seeds_table(result, data)))
    parts.append(
        "Ratios below 1 are better. Intervals: 95 percent, paired bootstrap over sequences, seeds pooled. "
        "own, shared: hits of the best fixed set of each sequence and of the one best set for all; / one "
        "set: loads over those of that one set, which is chosen with hindsight; "
        "balance: entropy of the load over experts, 1 is even."
    )
    return "\n\n".join(parts) + "\n"
