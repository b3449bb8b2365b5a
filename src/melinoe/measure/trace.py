"""Model and text in, trace out: a resident model reads rows teacher-forced and its routers are listened to.

A row that is read whole asks its experts for the same tokens as one that is decoded token by token
(the model is causal), at a fraction of the time. So the rows run in batches of similar length, padded
on the right, and the trace is written as decoding would have gone: a prefill call, then single tokens.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from melinoe.data.batching import length_batches, pad
from melinoe.data.encoding import Encoded, EncodedRows, encode_rows
from melinoe.data.rows import Row, data_rows, describe_rows
from melinoe.errors import MelinoeError
from melinoe.models.folder import resolve_model
from melinoe.models.identity import identity
from melinoe.models.layers import experts_per_token, fingerprint, moe_layers
from melinoe.models.positions import fixed_length
from melinoe.models.router_tap import RouterTap
from melinoe.outputs import Output
from melinoe.routing.trace import TRACE, Trace, from_sequences
from melinoe.runtime.generation_settings import context_length, end_tokens
from melinoe.runtime.load import load, load_resident, load_tokenizer
from melinoe.sticky.model import settle_stickiness
from melinoe.store.manifest import is_store

IN_MEMORY = 64 * 2**20  # bytes of a recording, above which it lies in a file
TOKENS_PER_BATCH = 4096  # padded tokens in one forward pass, where no batch size is given


def open_model(
    model: Any, adapter: str | Path | None = None, dtype: Any = None, sticky: float | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) in evaluation mode, from a path, `tiny`, a hub id, or a pair that is loaded already.

    A store is opened with its experts paged, a checkpoint with all of them in memory.

    Raises:
        MelinoeError: an adapter for a model that is loaded already, or a model without a tokenizer.
    """
    if isinstance(model, str | Path):
        path = resolve_model(model)
        if isinstance(path, Path) and is_store(path):
            return load(path, adapter=adapter, dtype=dtype, sticky=sticky), load_tokenizer(path)
        return load_resident(model, adapter=adapter, dtype=dtype, sticky=sticky)
    if adapter is not None:
        raise MelinoeError(
            "an adapter needs a model path", got=type(model).__name__, allowed="a folder or a hub id"
        )
    if not (isinstance(model, tuple) and len(model) == 2):
        raise MelinoeError(
            "a loaded model is given together with its tokenizer",
            got=type(model).__name__,
            allowed="(model, tokenizer)",
        )
    if sticky is not None:
        settle_stickiness(model[0], sticky)
    model[0].eval()
    return model


def rows_at_once(model: Any, batch_size: int | None) -> int | None:
    """No more than the model's memory budget was made for."""
    limits = getattr(getattr(model, "melinoe_paged", None), "limits", None)
    return batch_size if limits is None else min(batch_size or limits.batch, limits.batch)


def usable_rows(
    model: Any, tokenizer: Any, rows: list[Row], max_length: int | None, last_turn_only: bool
) -> EncodedRows:
    """The rows as this model reads and ends them. max_length: None is the model's own context.

    Raises:
        MelinoeError: see `encode_rows`.
    """
    return encode_rows(
        tokenizer,
        rows,
        max_length or context_length(model),
        end_tokens=end_tokens(model.generation_config, tokenizer),
        last_turn_only=last_turn_only,
    )


def track(batches: list[list[int]], title: str, show: bool) -> Iterator[list[int]]:
    """The batches, with a progress bar over their sequences on stderr."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task(title, total=sum(map(len, batches)))
        for batch in batches:
            yield batch
            bar.advance(task, len(batch))


@torch.no_grad()
def read_routing(
    model: Any,
    sequences: list[Encoded],
    batch_size: int | None = None,
    pad_token_id: int = 0,
    progress: bool = True,
    folder: Path | None = None,
) -> list[np.ndarray]:
    """The experts that each sequence asked for: [n - 1, L, K] int16 each, n with the last answer (whose last
    token is never fed).

    They are parts of one array, one behind the other; a large one (IN_MEMORY) lies in a file in `folder` that
    is gone with it, so that recording takes the memory of a batch, however many rows there are.
    """
    layers = moe_layers(model)
    backbone = model.base_model  # the logits are not needed
    lengths = [sequence.end - 1 for sequence in sequences]
    ends = np.cumsum(lengths).tolist()
    shape = (ends[-1] if ends else 0, len(layers), experts_per_token(model))
    whole = _room(shape, folder)
    result = [whole[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    at_once = rows_at_once(model, batch_size)
    batches = length_batches(lengths, TOKENS_PER_BATCH, at_once, fixed_length=fixed_length(model.config))
    for batch in track(batches, "tracing", progress):
        fed = [sequences[position].ids[: lengths[position]] for position in batch]
        ids, mask = pad(fed, pad_token_id, device=next(model.parameters()).device)
        with RouterTap(layers, choices_only=True) as tap:
            backbone(input_ids=ids, attention_mask=mask, use_cache=False)
        for position, chosen in zip(batch, tap.by_sequence(ids.shape, map(len, fed)), strict=True):
            result[position][:] = chosen
    return result


def _room(shape: tuple[int, int, int], folder: Path | None) -> np.ndarray:
    """[N, L, K] int16 to be filled."""
    nbytes = 2 * math.prod(shape)
    if nbytes <= IN_MEMORY:
        return np.empty(shape, np.int16)
    with tempfile.TemporaryFile(prefix="melinoe-trace-", dir=folder) as file:
        file.truncate(nbytes)
        return np.memmap(file, np.int16, "r+", shape=shape)


def trace(
    model: Any,
    data: Any,
    output: str | Path | None = None,
    limit: int | None = None,
    split: str = "train",
    batch_size: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
    adapter: str | Path | None = None,
    last_turn_only: bool = False,
    sticky: float | None = None,
) -> Trace:
    """Records which experts a resident model asks for on rows of text, teacher-forced.

    Decoding begins with the first answer; what stands between two answers of a conversation is another
    prompt, read in one call.

    Args:
        model: a path, hub id or `tiny`; or (model, tokenizer).
        data: a file, a folder with splits, a Hub id (data.read_rows), or a list of `data.Row`.
        output: the file to write, or the trace to replace; None: none.
        limit: at most this many rows.
        split: of a data folder.
        batch_size: rows per forward pass; None: about 4096 tokens of similar length.
        max_length: rows of more tokens are left out, and counted in the trace's settings; None: the model's
            own context.
        progress: a bar on stderr.
        adapter: what `tune` wrote, for a model given by path.
        last_turn_only: of conversations of several turns the last answer alone is decoded.
        sticky: as for `melinoe.load`.

    Raises:
        MelinoeError: nothing may be written at `output` (melinoe.outputs), no such model or data, a row that
            cannot be rendered, a dense model, no row that fits.
    """
    written = None
    if output is not None:
        written = Output(
            Path(output), TRACE, {"model": model, "data": data, "adapter": adapter}, replace=True
        )
        written.check()
    rows = data_rows(data, split, limit)
    model, tokenizer = open_model(model, adapter, sticky=sticky)
    moe_layers(model)  # a dense model is refused before the work
    usable = usable_rows(model, tokenizer, rows, max_length, last_turn_only)
    folder = None if written is None else Path(os.path.realpath(written.path)).parent
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    indices = read_routing(model, usable.encoded, batch_size, tokenizer.pad_token_id or 0, progress, folder)
    sticky_now = getattr(model, "melinoe_sticky", None)
    result = from_sequences(
        indices,
        [sequence.ids for sequence in usable.encoded],
        [sequence.answers for sequence in usable.encoded],
        num_experts=moe_layers(model)[0].num_experts,
        fingerprint=fingerprint(model),
        model=str(getattr(model, "name_or_path", "") or type(model).__name__),
        settings={
            "sticky": None if sticky_now is None else sticky_now.settings.to_json(),
            "adapter": getattr(model, "melinoe_adapter", None),
            "identity": identity(model),
            "split": split,
            "limit": limit,
            "last_turn_only": last_turn_only,
            "data": describe_rows(rows),
            "notes": [str(usable)] * bool(usable.left_out),
            **usable.to_json(),
        },
    )
    if written is not None:
        result.save(written.path, written.check)
    return result
