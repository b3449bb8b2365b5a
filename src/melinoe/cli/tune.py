"""The verb `tune` of the command line: its options, and what a recipe says for those that are not given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli.options import Json, Overwrite, Quiet, is_first_process, prepare, print_json
from melinoe.cli.stopped import saying_what_is_kept
from melinoe.cli.sweep import (
    AtOnce,
    HoldOut,
    OutOfDomain,
    Rows,
    Seeds,
    Sweep,
    refuse_without_sweep,
    run_sweep,
)
from melinoe.cli.tune_options import with_settings
from melinoe.cli.tuning_memory import DryRun, Memory, print_needs
from melinoe.config import DEFAULT_SEED
from melinoe.errors import MelinoeError
from melinoe.outputs import Output


@with_settings
def tune(
    *,
    output_dir: Annotated[
        Path | None, typer.Option(help="Adapter folder to write; not needed with --dry-run.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder, Hub id, or tiny (the embedded model).")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A file of rows (jsonl, JSON, csv, parquet), a folder with one per split, a Hub id, or tiny."
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out rows of --eval-steps. [default: the valid split of --data]")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A .yaml file with any of the settings; options given here win over it."),
    ] = None,
    deploy_memory: Annotated[
        str | None,
        typer.Option(
            help="Instead of --slots: the --memory that the result will be generated in, such as 8GiB."
        ),
    ] = None,
    memory: Memory = None,
    settings: dict[str, Any],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; an error if there is none.")
    ] = False,
    dry_run: DryRun = False,
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
    """Fine-tune so that each sequence keeps to few experts; writes a PEFT adapter.

    The same call again goes on with a run that was interrupted. Under `torchrun --nproc-per-node N -m melinoe
    tune ...` or `accelerate launch -m melinoe tune ...` every process takes its part of each step.
    """
    given = {"model": model, "data": data, "eval_data": eval_data, **settings}
    chosen = _with_recipe(recipe, {name: value for name, value in given.items() if value is not None})
    if output_dir is None and not dry_run:
        raise typer.BadParameter("missing, and this is no --dry-run", param_hint="'--output-dir'")
    prepare(chosen["model"])
    if deploy_memory is not None:
        chosen["slots"] = _slots_within(deploy_memory, chosen["model"], settings.get("slots"))
    if output_dir is None or dry_run:
        return print_needs(memory, chosen, as_json)
    swept = {
        "seeds": seeds,
        "hold_out": hold_out,
        "limit": limit,
        "out_of_domain": out_of_domain,
        "at_once": at_once,
    }
    if sweep is not None:
        if resume or memory is not None or "eval_data" in chosen:
            raise MelinoeError(
                "--resume, --eval-data and --memory cannot be given with --sweep",
                next_step="leave them out: a sweep goes on and measures by itself, and tunes in memory",
            )
        return run_sweep(sweep, chosen, output_dir, swept, overwrite, as_json, progress=not quiet)
    refuse_without_sweep(**swept)
    from melinoe.adapters.peft_folder import ADAPTER
    from melinoe.tuning.parallel.processes import leave
    from melinoe.tuning.restart import kept_of
    from melinoe.tuning.tune import tune as run

    reads = {"model": chosen["model"], "data": chosen["data"], "recipe": recipe}
    Output(output_dir, ADAPTER, reads, overwrite).check()  # the library's tune knows no recipe
    how: dict[str, Any] = {"memory": memory, "resume": resume, "overwrite": overwrite, "progress": not quiet}
    with saying_what_is_kept(lambda: kept_of(output_dir)):
        result = run(output_dir=output_dir, **how, **chosen)
    if is_first_process():
        _say(output_dir, result, as_json)
    leave()


def _with_recipe(recipe: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the library's `tune`: what the recipe sets, under what is given here."""
    arguments: dict[str, Any] = {"seed": DEFAULT_SEED}
    if recipe is not None:
        from melinoe.tuning.recipe import read_recipe

        arguments |= read_recipe(recipe)
    arguments |= given
    for name in ("model", "data"):
        if name not in arguments:
            raise typer.BadParameter("missing, here and in a recipe", param_hint=f"'--{name}'")
    return arguments


def _slots_within(memory: str, model: str, slots: int | None) -> int:
    """`--deploy-memory` as a number of slots per layer; `slots` is what --slots says."""
    if slots is not None:
        raise MelinoeError("give --slots or --deploy-memory, not both", got=f"{slots} and {memory}")
    from melinoe.runtime.plan import deployed_slots

    found = deployed_slots(model, memory)
    print(f"melinoe: {memory} hold {found} experts per layer: tuning for these", file=sys.stderr)
    return found


def _say(output_dir: Path, result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(result)
    print(f"{output_dir}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float)))
    if "held_out" in result:
        names = ("nll", "perplexity", "hit_rate", "loads_per_token")
        found = {name: result["held_out"][name] for name in names if result["held_out"][name] is not None}
        print("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
