"""`melinoe serve`: an OpenAI-compatible server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli.options import (
    Adapter,
    Device,
    Memory,
    Model,
    Packed,
    Policy,
    Predictor,
    Slots,
    Sticky,
    Verify,
    check_choices,
    prepare,
    slots_format_of,
)
from melinoe.config import DEFAULT_POLICY
from melinoe.errors import missing_extra
from melinoe.serving.settings import ServeSettings

DEFAULTS = ServeSettings()


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = DEFAULTS.port,
    api_key: Annotated[
        str | None,
        typer.Option(help="Clients must send it. The variable is the safer way.", envvar="MELINOE_API_KEY"),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call the model; may be repeated. The folder's name."),
    ] = None,
    adapter: Adapter = None,
    sticky: Sticky = None,
    predictor: Predictor = None,
    memory: Memory = None,
    slots: Slots = None,
    policy: Policy = DEFAULT_POLICY,
    device: Device = "cpu",
    packed: Packed = None,
    verify: Verify = False,
    engine: Annotated[
        str, typer.Option(help="auto, batched, or one-at-a-time (exact to the bit, slower).")
    ] = DEFAULTS.engine,
    concurrency: Annotated[
        int, typer.Option(help="Requests that are computed together.", min=1)
    ] = DEFAULTS.concurrency,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait; beyond that, 429.", min=0)
    ] = DEFAULTS.queue,
    context: Annotated[
        int | None, typer.Option(help="Tokens of the longest prompt and answer; 2048.", min=2)
    ] = None,
    cached_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the KV cache, all requests together; 4 contexts.", min=2)
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest request body.")] = "2MiB",
    timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take.", min=0.001)
    ] = DEFAULTS.timeout_seconds,
    replicas: Annotated[
        int,
        typer.Option(
            help="Processes that serve, each with a model and a cache of its own; above 1 on Ray Serve.",
            min=1,
        ),
    ] = 1,
    drain: Annotated[
        float, typer.Option(help="Seconds for running answers after SIGTERM.", min=0.0)
    ] = DEFAULTS.drain_seconds,
) -> None:
    """Serve a model over HTTP as OpenAI does: chat and text completions, streams, metrics."""
    _check_extra()
    if replicas > 1:
        require("ray", "ray")
    check_choices(memory, slots, policy, device)
    prepare(model, announce=True, device=device)
    from melinoe.config import parse_bytes
    from melinoe.models.folder import local_folder, resolve_model
    from melinoe.models.pretrained import read_config
    from melinoe.runtime.load import load, load_tokenizer, plan
    from melinoe.serving.engine.start import cached_tokens as tokens_of_cache
    from melinoe.serving.engine.start import context_tokens
    from melinoe.serving.server import run

    settings = ServeSettings(
        host=host,
        port=port,
        api_key=api_key,
        served_model_names=tuple(served_model_name or [Path(model).name or model]),
        engine=engine,
        concurrency=concurrency,
        queue=queue,
        context=context,
        cached_tokens=cached_tokens,
        body_bytes=parse_bytes(max_body),
        timeout_seconds=timeout,
        drain_seconds=drain,
    )

    def open_model() -> tuple[Any, Any]:
        config = read_config(local_folder(resolve_model(model)))
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
            context=tokens_of_cache(context_tokens(config, settings), settings),
            verify=verify,
        )
        print(f"melinoe: {plan(loaded)}", file=sys.stderr, flush=True)
        return loaded, load_tokenizer(model)

    if replicas == 1:
        return run(settings, open_model)
    from melinoe.serving.replicas import run_replicas

    run_replicas(settings, replicas, open_model)


def _check_extra() -> None:
    """Names what is missing before anything is loaded."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve")


def require(package: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise missing_extra(package, extra)
