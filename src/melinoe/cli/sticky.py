"""The verb sticky: which strength of sticky routing a model bears."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from melinoe.cli.options import Adapter, Data, Json, MaxLength, Model, Quiet, prepare, print_json, print_notes
from melinoe.config import parse_share
from melinoe.errors import MelinoeError


def sticky(
    model: Model,
    data: Data,
    strengths: Annotated[
        str | None,
        typer.Option(help="Strengths to try, separated by commas. [default: six, by the router's K]"),
    ] = None,
    max_quality_loss: Annotated[
        str, typer.Option(help="What the answer may cost of perplexity, such as 1%.")
    ] = "1%",
    slots: Annotated[
        int | None, typer.Option(help="Experts of each layer to hold. [default: a quarter of them]", min=1)
    ] = None,
    limit: Annotated[int, typer.Option(help="At most this many rows.", min=1)] = 200,
    max_length: MaxLength = None,
    split: Annotated[str, typer.Option(help="Split of the data to read.")] = "valid",
    adapter: Adapter = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what sticky routing costs and saves on your rows, strength by strength, without training."""
    loss = parse_share(max_quality_loss)
    try:
        asked = None if strengths is None else [float(one) for one in strengths.split(",")]
    except ValueError:
        raise MelinoeError("not strengths", got=repr(strengths), allowed="0.05 or 0.02,0.05,0.1") from None
    prepare(model)
    from melinoe.measure.stickiness import stickiness_table

    result = stickiness_table(
        model,
        data,
        asked,
        max_quality_loss=loss,
        slots=slots,
        limit=limit,
        split=split,
        max_length=max_length,
        adapter=adapter,
        progress=not quiet,
    )
    print_notes(result)
    if as_json:
        return print_json(result)
    print(_table(result))


def _table(result: dict[str, Any]) -> str:
    """The rows, and one sentence of advice."""
    lines = [f"{'--sticky':<10}{'perplexity':>11}   {'95% interval':<18}{'loads/token':>12}{'of plain':>10}"]
    for row in result["rows"]:
        cost, loads = row["perplexity_ratio"], row["loads_ratio"]
        plain = row["strength"] == 0
        interval = "" if plain else f"{_percent(cost['low'])} to {_percent(cost['high'])}"
        more = f"{row['nll']:.4f} nats" if plain else _percent(cost["ratio"])
        lines.append(
            f"{row['strength']:<10.4g}{more:>11}   {interval:<18}{row['loads_per_token']:>12.2f}"
            f"{loads['ratio']:>10.2f}"
        )
    lines.append(
        f"{result['num_rows']} rows, {result['slots']} experts of each layer in memory,"
        f" policy {result['policy']}"
    )
    return "\n".join([*lines, _advice(result)])


def _advice(result: dict[str, Any]) -> str:
    allowed, best = f"{result['max_quality_loss']:.1%}", result["best"]
    if best is None:
        return f"no strength that was tried saves loads for at most {allowed} of perplexity"
    [row] = [row for row in result["rows"] if row["strength"] == best]
    ratio, cost = row["loads_ratio"]["ratio"], _percent(row["perplexity_ratio"]["ratio"])
    fewer = f"{1 / ratio:.2f} times fewer loads" if ratio > 0 else "no loads any more"
    return f"--sticky {best:g}: {fewer} for {cost} of perplexity (at most {allowed} was allowed)"


def _percent(ratio: float) -> str:
    """+1.5% from 1.015; what rounds to nothing has no sign."""
    text = f"{ratio - 1:+.1%}"
    return text[1:] if text[1:] == "0.0%" else text
