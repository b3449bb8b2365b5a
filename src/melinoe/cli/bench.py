"""`melinoe bench`: its options, and how it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli.options import Json, Model, Overwrite, Quiet, Seed, prepare, print_json
from melinoe.cli.stopped import saying_what_is_kept


def bench(
    model: Model = "tiny",
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of every process, such as 600MiB, page cache and interpreter included. "
            "[default: the interpreter and two layers of experts]"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data folder; the embedded workload if not given; random: random prompts."),
    ] = None,
    tuned: Annotated[
        str | None, typer.Option(help="Adapter that tune wrote, or a merged checkpoint.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="The same fine-tune without our losses, to compare with.")
    ] = None,
    predictor: Annotated[
        str | None, typer.Option(help="Predictor of the tuned weights, or of the model where there are none.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows to run, separated by semicolons. [default: all]")
    ] = None,
    record_bytes: Annotated[
        str, typer.Option(help="Widen smaller experts to records of this size; 0: never.")
    ] = "3MiB",
    repeats: Annotated[int, typer.Option(help="Processes of every row, in turn.", min=1)] = 5,
    prompts: Annotated[int, typer.Option(help="Prompts that every process answers.", min=1)] = 2,
    new_tokens: Annotated[int, typer.Option(help="Tokens of every answer.", min=2)] = 32,
    seconds: Annotated[
        float, typer.Option(help="Answers of slow rows are cut behind these.", min=0.1)
    ] = 12.0,
    quality_rows: Annotated[
        int, typer.Option(help="Held-out rows for NLL, Rouge-L and the simulator; 0: neither.", min=0)
    ] = 48,
    threads: Annotated[int, typer.Option(help="Threads of every process.", min=1)] = 1,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for result.json; an interrupted bench goes on.")
    ] = Path("bench-output"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the prepared weights there.")] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure every way to run a model under one memory limit: ours, llama.cpp, accelerate, others' policies.

    Each row runs in a process of its own, in turn with the others, and stands beside the quality of its
    weights. llama.cpp needs the extra `bench`; what cannot run here is named.
    """
    prepare(model)
    from melinoe.benchmark.bench import bench as run
    from melinoe.benchmark.table import print_tables
    from melinoe.config import parse_bytes

    def kept() -> str | None:
        finished = len(list((output_dir / "runs").glob("*.json")))
        return f"{finished} runs are kept in {output_dir}, and the same call goes on" if finished else None

    with saying_what_is_kept(kept):
        result = run(
            model,
            memory,
            data,
            output_dir,
            tuned=tuned,
            control=control,
            predictor=predictor,
            rows=None if rows is None else [name.strip() for name in rows.split(";") if name.strip()],
            record_bytes=0 if record_bytes == "0" else parse_bytes(record_bytes),
            repeats=repeats,
            prompts=prompts,
            new_tokens=new_tokens,
            seconds=seconds,
            quality_rows=quality_rows,
            threads=threads,
            seed=seed,
            keep=keep,
            overwrite=overwrite,
            progress=not quiet,
        )
    if as_json:
        return print_json(result)
    print_tables(result)
    print(f"page: {output_dir / 'bench.html'}   numbers: {output_dir / 'result.json'}")
