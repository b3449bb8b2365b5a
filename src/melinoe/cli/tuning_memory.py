"""The options of `tune` about its own memory: the budget it runs in, and the table of what it would need."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from melinoe.cli.options import print_json

Memory = Annotated[
    str | None,
    typer.Option(
        help="What tuning itself must fit in, such as 8GiB or 80%: experts are then read from disk for every"
        " pass, the losses stay the same. Not the memory that the result will run in: that is"
        " --deploy-memory."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say how much memory it would need, and load no weights.")
]


def print_needs(memory: str | None, settings: dict[str, Any], as_json: bool) -> None:
    """Prints what `tune --dry-run` answers; `settings` holds model and data, too."""
    from melinoe.tuning.tune import plan_memory

    needed = plan_memory(
        memory=memory, **{name: value for name, value in settings.items() if name != "eval_data"}
    )
    if as_json:
        return print_json(needed.to_json(memory))
    print(needed)
    if memory is not None:
        print(needed.budget_line(memory))
    return None
