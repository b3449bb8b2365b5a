"""The verb `tune` of the command line: its options, and what a recipe says for those that are not given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli.options import Json, Overwrite, Quiet, is_first_process, prepare, print_json
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
from melinoe.cli.tuning_memory import DryRun, Memory, print_needs
from melinoe.config import DEFAULT_SEED, parse_share
from melinoe.errors import MelinoeError


def tune(
    output_dir: Annotated[
        Path | None, typer.Option(help="Adapter folder to write; not needed with --dry-run.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder, Hub id, or tiny (the embedded model).")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl file, a folder of train/valid/test.jsonl, a Hub id, or tiny."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A .yaml file with any of these settings; options given here win over it."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="counts (default), lru, boundary, clipped, paper, or the rival remoe."),
    ] = None,
    lambda_cs: Annotated[
        float | None, typer.Option(help="Weight of the cache simulation loss; 0 and 0 is the control.", min=0)
    ] = None,
    lambda_rm: Annotated[float | None, typer.Option(help="Weight of the rank matching loss.", min=0)] = None,
    distill: Annotated[
        float | None,
        typer.Option(
            help="Share of the quality term that asks for the base model's own predictions, of prompts too: "
            "0.8 halves the price of locality on real text, for half as much time again per step; "
            "0 if not given.",
            min=0,
            max=1,
        ),
    ] = None,
    cooldown: Annotated[
        float | None,
        typer.Option(
            help="Share of the run over which both weights fall to 0; as the objective has it if not given.",
            min=0,
            max=1,
        ),
    ] = None,
    target_hit_rate: Annotated[
        str | None, typer.Option(help="Instead of a weight: the hit rate to reach, 0.85 or 85%.")
    ] = None,
    max_quality_loss: Annotated[
        str | None, typer.Option(help="Instead of a weight: the rise of perplexity to accept, 1% or 0.01.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Records per layer to tune for; a quarter of the experts if not given.")
    ] = None,
    deploy_memory: Annotated[
        str | None,
        typer.Option(
            help="Instead of --slots: the --memory that the result will be generated in, such as 8GiB."
        ),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; 150 if not given.", min=1)] = None,
    time_limit: Annotated[float | None, typer.Option(help="Stop after this many seconds.", min=1)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Of the experts' low-rank factors; 0.75 over the model's width if not given.", min=0
        ),
    ] = None,
    router_learning_rate: Annotated[
        float | None, typer.Option(help="Of the routers; 0.38 over the width if not given.", min=0)
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the experts' factors; 32 if not given.", min=1)] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Padded tokens that a process holds at once; 2048 if not given.", min=1),
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Such batches per step, as one large batch; 1 if not given.", min=1)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longer rows are left out, never cut; 256 tokens if not given.", min=2)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute inner values again in the backward pass: less memory, a third more time.",
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option("--shard/--no-shard", help="Divide the frozen weights among several processes."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the frozen model: float32 (on a CPU), or auto (elsewhere): the checkpoint's."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(help="Every so many steps: loss, hit rate and loads on held-out rows; 0: never.", min=0),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Those rows; the valid split of --data if not given.")
    ] = None,
    eval_rows: Annotated[
        int | None, typer.Option(help="At most so many of them; 64 if not given.", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="There must be an interrupted run to go on with.")
    ] = False,
    sweep: Sweep = None,
    seeds: Seeds = None,
    hold_out: HoldOut = None,
    limit: Rows = None,
    out_of_domain: OutOfDomain = None,
    at_once: AtOnce = None,
    memory: Memory = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune so that each sequence keeps to few experts; writes a PEFT adapter.

    The same call again goes on with a run that was interrupted. Under `torchrun --nproc-per-node N -m melinoe
    tune ...` or `accelerate launch -m melinoe tune ...` every process takes its part of each step.
    """
    given: dict[str, Any] = {
        "model": model,
        "data": data,
        "eval_data": eval_data,
        "objective": objective,
        "lambda_cs": lambda_cs,
        "lambda_rm": lambda_rm,
        "distill": distill,
        "cooldown": cooldown,
        "target_hit_rate": None if target_hit_rate is None else parse_share(target_hit_rate),
        "max_quality_loss": None if max_quality_loss is None else parse_share(max_quality_loss),
        "slots": slots,
        "max_steps": max_steps,
        "time_limit_seconds": time_limit,
        "learning_rate": learning_rate,
        "router_learning_rate": router_learning_rate,
        "rank": rank,
        "batch_tokens": batch_tokens,
        "accumulate": accumulate,
        "max_length": max_length,
        "gradient_checkpointing": gradient_checkpointing,
        "shard": shard,
        "dtype": dtype,
        "device": device,
        "eval_steps": eval_steps,
        "eval_rows": eval_rows,
        "seed": seed,
    }
    settings: dict[str, Any] = {"seed": DEFAULT_SEED}
    if recipe is not None:
        from melinoe.tuning.recipe import read_recipe

        settings |= read_recipe(recipe)
    settings |= {name: value for name, value in given.items() if value is not None}
    for name in ("model", "data"):
        if name not in settings:
            raise typer.BadParameter("missing, here and in a recipe", param_hint=f"'--{name}'")
    if output_dir is None and not dry_run:
        raise typer.BadParameter("missing, and this is no --dry-run", param_hint="'--output-dir'")
    prepare(settings["model"])
    if deploy_memory is not None:
        if slots is not None:
            raise MelinoeError(
                "give --slots or --deploy-memory, not both", got=f"{slots} and {deploy_memory}"
            )
        from melinoe.runtime.plan import deployed_slots

        settings["slots"] = deployed_slots(settings["model"], deploy_memory)
        print(
            f"melinoe: {deploy_memory} hold {settings['slots']} experts per layer: tuning for these",
            file=sys.stderr,
        )
    if output_dir is None or dry_run:
        return print_needs(memory, settings, as_json)
    if sweep is not None:
        if resume or memory is not None or "eval_data" in settings:
            raise MelinoeError(
                "--resume, --eval-data, --memory: not with --sweep, which goes on and measures by itself, "
                "in memory"
            )
        return run_sweep(
            settings["model"],
            settings["data"],
            output_dir,
            sweep,
            {name: value for name, value in settings.items() if name not in ("model", "data", "seed")},
            seeds or str(settings["seed"]),
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
    from melinoe.tuning.tune import tune as run

    result = run(
        output_dir=output_dir,
        memory=memory,
        resume=resume,
        overwrite=overwrite,
        progress=not quiet,
        **settings,
    )
    if not is_first_process():
        return
    if as_json:
        return print_json(result)
    print(f"{output_dir}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float)))
    if "held_out" in result:
        names = ("nll", "perplexity", "hit_rate", "loads_per_token")
        found = {name: result["held_out"][name] for name in names if result["held_out"][name] is not None}
        print("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
