"""What the verbs of the command line share.

Options that mean the same everywhere, and how a verb starts and answers.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.config import MAX_SEED
from melinoe.machine import uncollected, usable_device
from melinoe.models.folder import resolve_model
from melinoe.native import library
from melinoe.sticky.settings import MAX_STRENGTH

Model = Annotated[str, typer.Option(help="Model folder, store, Hub id, or tiny (the embedded model).")]
Data = Annotated[
    str,
    typer.Option(
        help="A file of rows (jsonl, JSON, csv, parquet), a folder with one per split, a Hub id, or tiny."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=MAX_SEED)]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Rows of more tokens are left out, and counted. [default: the model's context]", min=2),
]
LastTurnOnly = Annotated[
    bool, typer.Option("--last-turn-only", help="Of several answers in a conversation, the last alone.")
]
Limit = Annotated[int | None, typer.Option(help="At most this many rows.", min=1)]
Adapter = Annotated[Path | None, typer.Option(help="Adapter folder that `melinoe tune` wrote.")]
Predictor = Annotated[Path | None, typer.Option(help="Predictor that `melinoe fit-predictor` wrote.")]
Memory = Annotated[str | None, typer.Option(help="Memory budget, such as 4GiB or 80%.")]
Slots = Annotated[int | None, typer.Option(help="Experts of each layer to hold, instead of --memory.")]
Policy = Annotated[str, typer.Option(help="Decides which experts stay in memory: decay, lru, lfu or static.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Sticky = Annotated[
    float | None,
    typer.Option(
        help="How much routing weight a token may give up to keep to its sequence's experts, 0 to 1: fewer"
        " loads for some quality (docs/sticky.md); 0 is off. [default: as the model was tuned]",
        min=0,
        max=MAX_STRENGTH,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the output folder.")]
Packed = Annotated[
    bool | None,
    typer.Option(
        "--packed/--expanded",
        help="Hold int8 or int4 experts as stored (the default where they can be"
        " computed so) or at full size.",
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare each expert with its checksum when it is first read.")
]
System = Annotated[str, typer.Option(help="The system message: who the model is to be.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy. [default: the checkpoint's own settings]", min=0, max=100)
]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the likeliest tokens of this share.", min=0, max=1)
]
TopK = Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens; 0: all.", min=0)]
MinP = Annotated[
    float | None,
    typer.Option(help="Draw from tokens of at least this share of the likeliest one's.", min=0, max=1),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: what was said becomes less likely.", min=0.01)
]
Stop = Annotated[list[str] | None, typer.Option(help="End an answer before this text; may be repeated.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.")]


def is_first_process() -> bool:
    """Whether this process speaks, of those that torchrun or accelerate started; true where nobody did."""
    return os.environ.get("RANK", "0") == "0"


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, allow_nan=False, default=float))


def print_notes(result: dict[str, Any]) -> None:
    """What the rows were read from, and the sentences that come with a result, on stderr."""
    for note in (result["data"], *result["notes"]):
        print(f"melinoe: {note}", file=sys.stderr)


def slots_format_of(packed: bool | None) -> str | None:
    return None if packed is None else "packed" if packed else "expanded"


SMALL_MODEL_BYTES = 200 * 2**20


def check_choices(memory: str | None, slots: int | None, policy: str, device: str) -> None:
    """Refuses in a moment what is no budget and no policy, before seconds of imports.

    Raises:
        MelinoeError: as `division.check_given` and `make_policy`.
    """
    from melinoe.routing.policies import make_policy
    from melinoe.runtime.division import check_given

    check_given(memory, slots, device)
    make_policy(policy, 1, 1, 1)


def prepare(model: str, announce: bool = False, computes: bool = False, device: str = "cpu") -> None:
    """Prepares the process for a verb that runs a model: a small one gets one thread, and no bars but ours.

    Args:
        announce: say what is loaded before anything is; in a terminal, transformers then shows how far its
            weights are.
        device: checked as soon as torch is there.
        computes: this process computes tokens; its kernels are compiled while torch is imported.

    The threads of a small model spend their time waiting for each other: on a busy machine with two
    cores, two threads were measured 50 times slower than one.
    """
    folder = resolve_model(model)  # what is not there is not announced
    if announce:
        print(f"melinoe: loading {model}", file=sys.stderr, flush=True)
    if computes:
        library.begin()
    first = "transformers.modeling_utils" not in sys.modules
    with uncollected():
        import torch

        usable_device(device)
        importlib.import_module("transformers.modeling_utils")  # of every model: seconds, and many objects
        from transformers.utils import logging

    if first:  # none of them ever becomes garbage, and no search for it needs to pass through them
        gc.freeze()
    if isinstance(folder, Path) and "OMP_NUM_THREADS" not in os.environ:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        torch.set_num_threads(1 if size < SMALL_MODEL_BYTES else torch.get_num_threads())

    if not (announce and sys.stderr.isatty()):
        logging.disable_progress_bar()
    logging.set_verbosity_error()
