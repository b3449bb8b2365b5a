"""The verb `tune` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli_options import Data, Json, Model, Overwrite, Quiet, Seed, prepare, print_json
from melinoe.cli_sweep import (
    AtOnce,
    HoldOut,
    OutOfDomain,
    Rows,
    Seeds,
    Sweep,
    refuse_without_sweep,
    run_sweep,
)
from melinoe.config import parse_share


def tune(
    model: Model,
    data: Data,
    output_dir: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; 150 if not given.", min=1)] = None,
    seed: Seed = 0,
    lambda_cs: Annotated[
        float | None, typer.Option(help="Weight of the cache simulation loss.", min=0)
    ] = None,
    lambda_rm: Annotated[float | None, typer.Option(help="Weight of the rank matching loss.", min=0)] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="counts (default), lru, boundary, clipped, paper, or the rival remoe."),
    ] = None,
    target_hit_rate: Annotated[
        str | None, typer.Option(help="Instead of a weight: the hit rate to reach, 0.85 or 85%.")
    ] = None,
    max_quality_loss: Annotated[
        str | None, typer.Option(help="Instead of a weight: the rise of perplexity to accept, 1% or 0.01.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Records per layer to tune for; a quarter if not given.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Stop after this many seconds.", min=1)] = None,
    sweep: Sweep = None,
    seeds: Seeds = None,
    hold_out: HoldOut = None,
    limit: Rows = None,
    out_of_domain: OutOfDomain = None,
    at_once: AtOnce = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune so that each sequence keeps to few experts; writes a PEFT adapter."""
    prepare(model)
    given: dict[str, Any] = {
        "max_steps": max_steps,
        "lambda_cs": lambda_cs,
        "lambda_rm": lambda_rm,
        "objective": objective,
        "slots": slots,
    }
    given["time_limit_seconds"] = time_limit
    given["target_hit_rate"] = None if target_hit_rate is None else parse_share(target_hit_rate)
    given["max_quality_loss"] = None if max_quality_loss is None else parse_share(max_quality_loss)
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if sweep is not None:
        return run_sweep(
            model,
            data,
            output_dir,
            sweep,
            settings,
            seeds or str(seed),
            overwrite,
            as_json,
            hold_out_rows=hold_out,
            limit=limit,
            out_of_domain=out_of_domain,
            at_once=at_once,
            progress=not quiet,
        )
    refuse_without_sweep(
        seeds=seeds, hold_out=hold_out, limit=limit, out_of_domain=out_of_domain, at_once=at_once
    )
    from melinoe.tuning.trainer import tune as run

    result = run(
        model,
        data,
        output_dir,
        seed=seed,
        overwrite=overwrite,
        progress=not quiet,
        **settings,
    )
    if as_json:
        return print_json(result)
    print(f"{output_dir}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float)))
