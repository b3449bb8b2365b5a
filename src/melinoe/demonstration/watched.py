"""One generation token by token: when each came, and until then how long a read was waited for or ran."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from melinoe.runtime.generation import stream_generate
from melinoe.runtime.load import reset_slots, stats


def generate_watched(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    new_tokens: int,
    seconds: float = float("inf"),
    watch: Callable[[], Any] = lambda: None,
    watched: list[Any] | None = None,
) -> tuple[list[int], list[float]]:
    """(tokens, seconds since the call at which each came); at least two, and no more behind `seconds`.

    watched: grows by what `watch` says at each token.
    """
    tokens, times = [], []
    began = time.perf_counter()
    pieces = stream_generate(
        model, tokenizer, prompt, max_new_tokens=new_tokens, ignore_eos=True, temperature=0.0
    )
    for piece in pieces:
        if piece.token is None:
            continue
        tokens.append(piece.token)
        times.append(time.perf_counter() - began)
        if watched is not None:
            watched.append(watch())
        if times[-1] > seconds and len(times) > 1:
            pieces.close()  # type: ignore[attr-defined]
            break
    return tokens, times


def timeline_of(model: Any, tokenizer: Any, prompt: list[int], new_tokens: int) -> dict[str, list[float]]:
    """Of a paged model from empty slots: {"times", "waits", "reads"}, seconds until each token."""
    reset_slots(model)
    pager = model.melinoe_paged.pager
    waited, ran = stats(model).stalled_seconds, pager.reader.busy_seconds
    watched: list[tuple[float, float]] = []
    _, times = generate_watched(
        model,
        tokenizer,
        prompt,
        new_tokens,
        watch=lambda: (stats(model).stalled_seconds - waited, pager.reader.busy_seconds - ran),
        watched=watched,
    )
    return {"times": times, "waits": [one for one, _ in watched], "reads": [one for _, one in watched]}


def steps_of(found: dict[str, list[float]]) -> list[dict[str, float]]:
    """Seconds of each token after the first: {"computing", "waiting", "hidden"} (read while computing)."""
    steps = []
    for before in range(len(found["times"]) - 1):
        took, waited, read = (
            found[name][before + 1] - found[name][before] for name in ("times", "waits", "reads")
        )
        waited = min(max(waited, 0.0), took)
        computing = took - waited
        steps.append(
            {"computing": computing, "waiting": waited, "hidden": min(max(read - waited, 0.0), computing)}
        )
    return steps
