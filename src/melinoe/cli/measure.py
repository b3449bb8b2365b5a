"""The verbs that look at routing and quality: trace, simulate, fit-predictor, placement and evaluate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli.options import (
    Adapter,
    Data,
    Json,
    LastTurnOnly,
    Limit,
    MaxLength,
    Model,
    Quiet,
    Seed,
    Sticky,
    prepare,
    print_json,
    print_notes,
)
from melinoe.errors import MelinoeError


def trace(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Trace file to write.")],
    limit: Limit = None,
    max_length: MaxLength = None,
    last_turn_only: LastTurnOnly = False,
    split: Annotated[str, typer.Option(help="Split of the data to read.")] = "train",
    adapter: Adapter = None,
    sticky: Sticky = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Record which experts every token asks for, teacher-forced."""
    prepare(model)
    from melinoe.measure.trace import trace as run

    recorded = run(
        model,
        data,
        output,
        limit=limit,
        split=split,
        max_length=max_length,
        adapter=adapter,
        sticky=sticky,
        progress=not quiet,
        last_turn_only=last_turn_only,
    )
    found = {"output": str(output), "sequences": recorded.num_sequences, "tokens": len(recorded.indices)}
    found |= {"sticky": recorded.settings["sticky"], "adapter": recorded.settings["adapter"]}
    names = ("data", "num_rows_left_out", "left_out", "max_length", "notes")
    found |= {name: recorded.settings[name] for name in names}
    print_notes(found)
    if as_json:
        return print_json(found)
    print(
        f"{output}: {recorded.num_sequences} sequences, {len(recorded.indices)} tokens of {recorded.made_by}"
    )


def simulate(
    trace: Annotated[Path, typer.Argument(help="Trace that `melinoe trace` wrote.")],
    policy: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "decay,lru,belady",
    slots: Annotated[
        str, typer.Option(help="Experts of each layer to hold; several, separated by commas.")
    ] = "8",
    carry_over: Annotated[
        bool, typer.Option("--carry-over", help="Keep the slots between sequences.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Replay a trace through caches of other sizes and policies."""
    from melinoe.routing.simulate import simulate as run

    try:
        sizes = [int(size) for size in slots.split(",")]
    except ValueError:
        raise MelinoeError("not a number of slots", got=slots, allowed="8 or 4,8,16") from None
    result = run(trace, policy=policy, slots=sizes, carry_over=carry_over)
    if as_json:
        return print_json(result)
    print(f"{trace}: of {result['trace']['made_by']}")
    print(f"{'policy':<16}{'slots':>6}{'hit rate':>10}{'loads/token':>13}{'prefill':>9}")
    for row in result["results"]:
        print(
            f"{row['policy']:<16}{row['slots']:>6}{row['hit_rate']:>10.3f}"
            f"{row['loads_per_token']:>13.2f}{row['prefill_loads_per_token']:>9.2f}"
        )


def fit_predictor(
    model: Model,
    trace: Annotated[Path, typer.Option(help="Trace that `melinoe trace` wrote.")],
    output: Annotated[Path, typer.Option(help="Predictor to write.")],
    adapter: Adapter = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit the predictor of a sequence's experts from its prompt."""
    prepare(model)
    from melinoe.measure.trace import open_model
    from melinoe.outputs import Output
    from melinoe.prediction.fit import fit_predictor as run
    from melinoe.prediction.predictor import PREDICTOR

    opened: Any = model
    if adapter is not None:
        reads = {"model": model, "trace": trace, "adapter": adapter}
        Output(output, PREDICTOR, reads, replace=True).check()
        opened = open_model(model, adapter)
    result = run(opened, trace, output, seed=seed)
    for warning in result["warnings"]:
        print(f"melinoe: {warning}", file=sys.stderr)
    if as_json:
        return print_json(result)
    print(
        f"{output}: {result['kept']}, "
        + ", ".join(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float))
    )


def placement(
    trace: Annotated[Path, typer.Argument(help="Trace that `melinoe trace` wrote.")],
    output: Annotated[Path, typer.Option(help="File to write.")],
    slots: Annotated[
        int | None, typer.Option(help="Experts of each layer. [default: a quarter of them]", min=1)
    ] = None,
    format: Annotated[
        str, typer.Option(help="json, or ktransformers: a .pt file for --init-expert-location.")
    ] = "json",
    model: Annotated[str | None, typer.Option(help="Model of the trace, for ktransformers.")] = None,
    as_json: Json = False,
) -> None:
    """Choose the experts of each layer that a trace asked for most, for engines that keep a fixed set."""
    if model is not None:
        prepare(model)
    from melinoe.prediction.placement import placement as run

    result = run(trace, output, slots=slots, format=format, model=model)
    for note in result.get("notes", ()):
        print(f"melinoe: {note}", file=sys.stderr)
    if as_json:
        return print_json(result)
    print(
        f"{output}: {result['slots']} of {result['num_experts']} experts in each of {len(result['layers'])}"
        f" layers, which serve {result['served']:.1%} of the trace's requests"
    )


def evaluate(
    model: Model,
    data: Data,
    limit: Limit = None,
    metrics: Annotated[
        str, typer.Option(help="Metrics, separated by commas.")
    ] = "perplexity,exact_match,rouge_l",
    answers: Annotated[
        str | None,
        typer.Option(
            help="What exact_match compares: text, or the final number: behind #### (strict) or the last one"
            " (flexible). [default: what the data set is known for, else text]"
        ),
    ] = None,
    max_length: MaxLength = None,
    last_turn_only: LastTurnOnly = False,
    split: Annotated[str, typer.Option(help="Split of the data to read.")] = "test",
    adapter: Adapter = None,
    sticky: Sticky = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure completion NLL, perplexity, exact match and Rouge-L on held-out rows."""
    prepare(model)
    from melinoe.measure.quality import evaluate as run

    names = tuple(name.strip() for name in metrics.split(",") if name.strip())
    result = run(
        model,
        data,
        limit=limit,
        metrics=names,
        split=split,
        max_length=max_length,
        adapter=adapter,
        sticky=sticky,
        progress=not quiet,
        answers=answers,
        last_turn_only=last_turn_only,
    )
    print_notes(result)
    if as_json:
        return print_json(result)
    for name, value in result.items():
        if isinstance(value, int | float):
            print(f"{name:<22}{value:.4f}" if isinstance(value, float) else f"{name:<22}{value}")
