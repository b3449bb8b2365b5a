"""The command line: one verb per stage, each a function of the library with the same name.

Results go to stdout, progress and diagnostics to stderr; with --json the last line on stdout is one JSON
object. Exit codes: 0, 1 our error (one line), 2 wrong usage, 130 Ctrl-C. Imports that cost time
stand inside the verbs, so that `melinoe --help` needs neither torch nor transformers.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from melinoe._version import __version__
from melinoe.cli.bench import bench
from melinoe.cli.chat import chat
from melinoe.cli.explain import explain
from melinoe.cli.measure import evaluate, fit_predictor, placement, simulate, trace
from melinoe.cli.options import (
    Adapter,
    Device,
    Json,
    Memory,
    MinP,
    Model,
    Overwrite,
    Packed,
    Policy,
    Predictor,
    Quiet,
    RepetitionPenalty,
    Seed,
    Slots,
    Sticky,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    Verify,
    check_choices,
    prepare,
    print_json,
    slots_format_of,
)
from melinoe.cli.order import EXAMPLES
from melinoe.cli.serve import serve
from melinoe.cli.sticky import sticky
from melinoe.cli.stopped import saying_what_is_kept
from melinoe.cli.tune import tune
from melinoe.config import DEFAULT_POLICY
from melinoe.errors import MelinoeError


def _say(error: BaseException) -> int:
    """Prints one line for what stopped a verb and returns the exit code."""
    line, code = explain(error)
    same_for_all = isinstance(error, MelinoeError) and os.environ.get("LOCAL_RANK", "0") != "0"
    if not same_for_all:  # of several processes on a machine, one says it
        print(f"melinoe: {line}", file=sys.stderr)
    return code


class _Verbs(typer.core.TyperGroup):
    """Turns what stops a verb into one line on stderr and an exit code; its help has the verbs in order."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*EXAMPLES, *sorted(self.commands.keys() - EXAMPLES.keys())]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands, in the order in which one uses them"):
            for name in self.list_commands(ctx):
                formatter.write_dl([(f"{name:<13}", self.commands[name].get_short_help_str(60))])
                if name in EXAMPLES:
                    formatter.write(f"{'':17}{EXAMPLES[name]}\n")

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            sys.exit(141)
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "exit_code") or os.environ.get("MELINOE_TRACEBACK") == "1":
                raise  # typer's own: wrong usage, help, exit
            sys.exit(_say(error))


app = typer.Typer(
    name="melinoe",
    cls=_Verbs,
    help="Mixture-of-experts models inside a memory budget, exactly and fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_versions(asked: bool) -> None:
    if not asked:
        return
    names = [f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors")]
    print(f"melinoe {__version__}, Python {platform.python_version()}, {', '.join(names)}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say the versions and exit.", callback=_print_versions, is_eager=True),
    ] = False,
) -> None:
    """Mixture-of-experts models inside a memory budget, exactly and fast."""


@app.command(short_help="Write a store: experts as records.")
def convert(
    source: str,
    target: Path,
    adapter: Adapter = None,
    format: Annotated[
        str, typer.Option(help="Dtype of the experts: auto (the checkpoint's own), int8 or int4.")
    ] = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a store: the checkpoint with each expert as one record on disk.

    With --adapter the tuning is merged into the records on the way, as `melinoe merge` would.

    An interrupted call goes on where it stopped; a half-written store never loads.
    """
    prepare(source)
    from melinoe.config import format_bytes
    from melinoe.conversion.convert import convert as run
    from melinoe.files import partial_of

    def kept() -> str | None:
        if not any(partial_of(target).glob("*.safetensors")):
            return None
        return f"what is written is kept in {partial_of(target)}, and the same call goes on"

    with saying_what_is_kept(kept):
        store = run(source, target, adapter=adapter, format=format, progress=not quiet)
    records = sum(layer.num_experts for layer in store.layers)
    size, plain = store.expert_bytes, store.expanded_bytes
    result = {
        "store": str(target),
        "layers": len(store.layers),
        "records": records,
        "record_bytes": store.max_record_bytes,
        "format": store.record_format,
        "expert_bytes": size,
        "saved_bytes": plain - size,
        "fingerprint": store.fingerprint,
    }
    if as_json:
        return print_json(result)
    less, share = format_bytes(plain - size), f"{size / plain:.0%} of {format_bytes(plain)}"
    saved = f", {store.record_format}: {less} less ({share})"
    print(
        f"{target}: {records} records of {format_bytes(store.max_record_bytes)}, {format_bytes(size)} in all"
        + (saved if store.record_format != "auto" else "")
    )


@app.command(short_help="Generate text inside a memory budget.")
def generate(
    model: Model,
    prompt: Annotated[
        list[str],  # so that a second one is seen: of a plain option only the last would be answered
        typer.Option("--prompt", "-p", metavar="<str>", help="The prompt; - reads it from stdin."),
    ],
    adapter: Adapter = None,
    sticky: Sticky = None,
    predictor: Predictor = None,
    memory: Memory = None,
    slots: Slots = None,
    policy: Policy = DEFAULT_POLICY,
    device: Device = "cpu",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="At most this many tokens; 256 if not given.", min=1)
    ] = None,
    system: System = "",
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Seed = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    packed: Packed = None,
    verify: Verify = False,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print the text as it is generated, or at its end.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Generate text with the experts paged inside a memory budget."""
    if len(prompt) > 1:
        raise MelinoeError(
            "generate answers one prompt",
            got=f"--prompt {len(prompt)} times",
            next_step="call it once for each; `melinoe chat` and `melinoe serve` answer many",
        )
    text = sys.stdin.read() if prompt[0] == "-" else prompt[0]
    if not text.strip():
        raise MelinoeError("the prompt is empty", allowed="some text, or - to read it from stdin")
    if system and raw:
        raise MelinoeError("--system needs the chat template", next_step="leave out --raw, or --system")
    check_choices(memory, slots, policy, device)
    prepare(model, announce=True, computes=True, device=device)
    from melinoe.data.encoding import encode_prompt
    from melinoe.models.folder import local_folder, resolve_model
    from melinoe.runtime.budget import DEFAULT_CONTEXT
    from melinoe.runtime.generation import DEFAULT_NEW_TOKENS, stream_generate
    from melinoe.runtime.generation_settings import folder_settings
    from melinoe.runtime.load import load, load_tokenizer, plan

    tokenizer = load_tokenizer(model)
    asked = ({"role": "system", "content": system}, {"role": "user", "content": text}) if system else text
    needed = len(encode_prompt(tokenizer, asked, raw)) + (max_new_tokens or DEFAULT_NEW_TOKENS)
    loaded = load(
        model,
        adapter=adapter,
        sticky=sticky,
        predictor=predictor,
        memory=memory,
        slots=slots,
        policy=policy,
        device=device,
        slots_format=slots_format_of(packed),
        context=needed if needed > DEFAULT_CONTEXT else None,
        batch=folder_settings(local_folder(resolve_model(model))).num_beams or 1,
        verify=verify,
    )
    if memory is not None or slots is not None:  # else `load` has said what it found free
        print(f"melinoe: {plan(loaded)}", file=sys.stderr)
    answer, statistics = "", None
    stream = stream and not as_json
    for piece in stream_generate(
        loaded,
        tokenizer,
        asked,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        seed=seed,
        raw=raw,
    ):
        answer += piece.text
        statistics = piece.statistics
        if stream:
            print(piece.text, end="", flush=True)
    assert statistics is not None
    for note in statistics.notes:
        print(f"melinoe: {note}", file=sys.stderr)
    if as_json:
        return print_json({"text": answer, **statistics.to_json()})
    print("" if stream else answer)
    print(statistics, file=sys.stderr)


@app.command(short_help="Say what a memory budget buys.")
def plan(
    model: Model,
    memory: Memory = None,
    slots: Slots = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of KV cache to set aside for a sequence.", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences to set it aside for, all at once.", min=1)] = 1,
    device: Device = "cpu",
    packed: Packed = None,
    machine: Annotated[
        str | None,
        typer.Option(
            help="Another machine than this: gpu=24GiB,ram=64GiB,read=7GB/s,bus=25GB/s; "
            "gpu and bus may be left out, memory=900GB/s may be said too."
        ),
    ] = None,
    anew: Annotated[
        bool, typer.Option("--anew", help="Count and measure anew, not as in the last hour.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a memory budget buys and how fast it will be, without loading weights."""
    from melinoe.runtime.plan import describe
    from melinoe.runtime.plan import plan as run

    result = run(
        model,
        memory,
        slots,
        context=context,
        batch=batch,
        device=device,
        slots_format=slots_format_of(packed),
        speeds=True,
        machine=machine,
        remembered=not anew,
        prepare=lambda: prepare(model, computes=True, device=device),
    )
    if as_json:
        return print_json(result)
    print(describe(result))


app.command(short_help="Talk to a model in the terminal.")(chat)
app.command(short_help="Serve a model over HTTP.")(serve)
app.command(short_help="Find a strength of sticky routing.")(sticky)
app.command(short_help="Fine-tune towards few experts.")(tune)


@app.command(short_help="Write a plain checkpoint.")
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="Adapter folder that `melinoe tune` wrote.")],
    output_dir: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a plain checkpoint with the adapter merged in; it loads without melinoe."""
    prepare(model)
    from melinoe.adapters.merge import merge as run

    result = run(model, adapter, output_dir, overwrite=overwrite)
    if as_json:
        return print_json(result)
    print(f"{output_dir}: a plain checkpoint, AutoModelForCausalLM opens it without melinoe")


app.command(short_help="Record which experts tokens ask for.")(trace)
app.command(short_help="Replay a trace through caches.")(simulate)
app.command("fit-predictor", short_help="Fit the predictor of experts.")(fit_predictor)
app.command(short_help="Choose experts to keep for good.")(placement)
app.command(short_help="Measure quality on held-out rows.")(evaluate)


@app.command(short_help="Check a store's checksums.")
def verify(store: Path) -> None:
    """Check every file of a store against its checksum."""
    from melinoe.conversion.verify import verify as run
    from melinoe.store.manifest import open_store

    opened = open_store(store)
    found = run(opened)
    if opened.shards:
        print(f"{store}: in place; {len(opened.shards)} shards have the size, times and header they had")
        if not found.compared:
            print(f"{store}: no checksums were known; those of now are kept for the next time")
    if found.damaged:
        raise MelinoeError(
            f"{store} is damaged in {len(found.damaged)} of its records and other files",
            got="; ".join(found.damaged[:5]),
            next_step="convert again",
        )
    if found.compared:
        print(f"{store}: every record and every other file matches")


app.command(short_help="Compare every way to run a model.")(bench)


@app.command(short_help="Show the whole method in one table.")
def demo(
    model: Model = "tiny",
    data: Annotated[str | None, typer.Option(help="Data folder; the embedded workload if not given.")] = None,
    limit: Annotated[int | None, typer.Option(help="Held-out rows to score; fewer is faster.", min=8)] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for result.json and report.html.")] = Path(
        "demo-output"
    ),
    seed: Seed = 0,
    sticky: Annotated[
        float | None,
        typer.Option(
            help="How sticky the model is tuned to be (docs/sticky.md). [default: 0.12 for tiny, measured for"
            " others]",
            min=0,
            max=1,
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds for each of the two tunings, side by side. [default: 90 for tiny, 600 for others]",
            min=1,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The whole method in one run: tune, predict, page, and one table."""
    prepare(model)
    from melinoe.demonstration.demo import demo as run

    result = run(model, data, output_dir, limit=limit, seed=seed, sticky=sticky, time_limit=time_limit)
    if as_json:
        print_json(result)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
