"""`melinoe tune --sweep`: the options that only a sweep has, and how it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli.options import print_json
from melinoe.cli.stopped import saying_what_is_kept
from melinoe.errors import MelinoeError

Sweep = Annotated[
    str | None,
    typer.Option(
        help="Tune many ways and draw quality against locality: a .yaml or .json list of points, or default. "
        "--output-dir then takes frontier.html, table.md and result.json, and an interrupted sweep goes on."
    ),
]
Seeds = Annotated[str | None, typer.Option(help="Seeds of a sweep, separated by commas.")]
HoldOut = Annotated[
    int | None, typer.Option(help="Sweep: rows at the end of train.jsonl to measure on instead.", min=0)
]
Rows = Annotated[int | None, typer.Option("--limit", help="Sweep: at most this many held-out rows.", min=1)]
OutOfDomain = Annotated[str | None, typer.Option(help="Sweep: other data, only measured on.")]
AtOnce = Annotated[int | None, typer.Option(help="Sweep: processes side by side.", min=1)]


def run_sweep(
    points: str,
    arguments: dict[str, Any],
    output_dir: Path,
    options: dict[str, Any],
    overwrite: bool,
    as_json: bool,
    progress: bool,
) -> None:
    """Runs the sweep and says where the page is.

    Args:
        arguments: of `tune`: model, data (a folder, or several separated by commas) and the settings of all
            points.
        options: those that only a sweep has, by name; None: the sweep's own default.
    """
    from melinoe.frontier.sweep import sweep as run
    from melinoe.frontier.table import sentences

    if overwrite:
        raise MelinoeError(
            "--overwrite: a sweep keeps the points it has",
            next_step="choose another --output-dir to start anew",
        )
    settings = dict(arguments)
    model, data, seed = (settings.pop(name) for name in ("model", "data", "seed"))
    given = {name: value for name, value in options.items() if value is not None}
    seeds = _seeds(given.pop("seeds", str(seed)))
    if "hold_out" in given:
        given["hold_out_rows"] = given.pop("hold_out")
    folders: list[str | Path] = [data] if Path(data).exists() else [*data.split(",")]
    options = {"common": settings, "seeds": seeds, "progress": progress, **given}
    with saying_what_is_kept(lambda: _kept(output_dir)):
        result = run(model, folders, output_dir, points, **options)
    if as_json:
        return print_json(result)
    print("\n".join(sentences(result, "held_out")))
    print(f"page: {output_dir / 'frontier.html'}   table: {output_dir / 'table.md'}")


def _kept(output_dir: Path) -> str | None:
    finished = len(list(output_dir.glob("points/*/measured-*.json")))
    if not finished:
        return None
    return f"{finished} finished runs are kept in {output_dir / 'points'}, and the same call goes on"


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise MelinoeError("not a list of seeds", got=text, allowed="0 or 0,1,2") from None


def refuse_without_sweep(**options: Any) -> None:
    """Options that mean something only with --sweep.

    Raises:
        MelinoeError: one of them is given.
    """
    names = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if names:
        raise MelinoeError(f"{', '.join(names)} can only be given with --sweep")
