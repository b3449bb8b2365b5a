"""What this machine does with a model of a given shape: short measurements, on stand-ins instead of weights.

    bookkeeping   the embedded model, opened and run for some tokens, with all experts and with none at hand:
                  its matrices take no time
    experts       what the experts function does with one token, on records of the shape, more of them than a
                  processor's cache holds; and the matrices that every token multiplies by
    reading       records' own size, from any file of the model, past the page cache, one alone and as many at
                  once as a token has experts

Each takes a fraction of a second, and gives means: what else the machine does meets a token as well.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from melinoe.config import RECORD_ALIGNMENT
from melinoe.experts import compiled
from melinoe.experts.forward import experts_outputs
from melinoe.models.folder import resolve_model
from melinoe.models.pretrained import read_config
from melinoe.paging.expansion import PackedExpert, ScratchLayer
from melinoe.paging.pager import Views
from melinoe.paging.reader import READER_THREADS
from melinoe.paging.slots import RecordBuffer
from melinoe.store.layout import RecordLayout, torch_dtype
from melinoe.store.packing import packing_of

SECONDS = 0.2  # of each measurement
OUT_OF_CACHE = 96 * 2**20  # bytes of matrices that are gone through in turn
MOST_COPIES = 64


def _seconds_each(work: Callable[[int], object], copies: int) -> float:
    """The mean of one call, over calls with 0, 1, ... copies - 1 in turn."""
    for index in range(min(copies, 4)):
        work(index)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS or done < 8:
        work(done % copies)
        done += 1
    return (time.perf_counter() - began) / done


def _copies(nbytes: int) -> int:
    return max(2, min(MOST_COPIES, -(-OUT_OF_CACHE // nbytes)))


@torch.no_grad()
def expert_seconds(
    module: nn.Module, layout: RecordLayout, hidden_size: int, top_k: int, format: str
) -> float:
    """One of the top_k experts that a token is computed with, in a store format, as a layer computes them.

    Args:
        module: an experts module, with or without parameters. layout: of one of its experts, in its own
            dtype. hidden_size: of its inputs.
    """
    packing = packing_of(format, layout, bool(module.is_transposed))
    stored = layout if packing is None else packing.record_layout()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for field in layout.fields:
        values = torch.randn(field.shape, generator=generator) * 0.02
        weights[field.name] = values.to(torch_dtype(field.dtype))
    first = torch.zeros(stored.record_bytes, dtype=torch.uint8)
    views = stored.views(first)
    scratch = None
    if packing is None:
        for name, weight in weights.items():
            views[name].copy_(weight)
    else:
        packing.pack(weights, views)
        scratch = ScratchLayer(packing, torch.zeros(layout.record_bytes, dtype=torch.uint8), packing.tile)
    copies = max(top_k, _copies(stored.record_bytes))
    slots = RecordBuffer(copies, stored.record_bytes)  # memory of the same kind
    slots.tensor.copy_(first)
    records = [stored.views(record) for record in slots.tensor]
    experts: list[Views] = [one if scratch is None else PackedExpert(scratch, one) for one in records]
    row = torch.randn(1, hidden_size, generator=generator).to(next(iter(weights.values())).dtype)
    compiled.prepare()

    def compute(index: int) -> None:
        start = index * top_k
        experts_outputs(module, row, [experts[(start + place) % copies] for place in range(top_k)])

    return _seconds_each(compute, copies) / top_k


@torch.no_grad()
def dense_bytes_per_second(size_out: int, size_in: int, dtype: torch.dtype) -> float:
    """One row by matrices of a size: bytes of weights a second."""
    one = torch.randn(size_out, size_in, dtype=torch.float32).to(dtype)
    weights = [one.clone() for _ in range(_copies(one.nbytes))]
    row = torch.randn(1, size_in).to(dtype)
    return one.nbytes / _seconds_each(lambda index: F.linear(row, weights[index]), len(weights))


def bookkeeping() -> tuple[float, float]:
    """(layer, missed) seconds of one layer and token of the embedded model: all of it, with all experts at
    hand; what more where none is, reading apart."""
    path = resolve_model("tiny")
    config: Any = read_config(path)
    layer, bare = (_tiny_layer_seconds(path, slots) for slots in (int(config.num_experts), 0))
    top_k, files = int(config.num_experts_per_tok), sorted(Path(path).glob("*.safetensors"))
    read = group_seconds(files, _tiny_record_bytes(path), (top_k,))
    return layer, max(0.0, bare - layer - (read[0] if read else 0.0))


def _tiny_record_bytes(path: Path | str) -> int:
    from melinoe.conversion.first_use import store_of

    return store_of(path).max_record_bytes


def _tiny_layer_seconds(path: Path | str, slots: int) -> float:
    from melinoe.runtime.generation import stream_generate
    from melinoe.runtime.load import load, load_tokenizer

    model = load(path, slots=slots, context=96)
    config: Any = model.config
    pieces = stream_generate(
        model, load_tokenizer(path), list(range(4, 20)), max_new_tokens=64, temperature=0.0, ignore_eos=True
    )
    times = [time.perf_counter() for piece in pieces if piece.token is not None]
    model.melinoe_paged.pager.close()
    steps = np.diff(times)[8:]  # the first are recorded
    return float(steps.mean()) / int(config.num_hidden_layers)


def group_seconds(files: list[Path], record_bytes: int, groups: Sequence[int]) -> tuple[float, ...] | None:
    """Seconds of reading 1, 2, ... records together, at random places of the files; None where none can be.

    Reads bypass the page cache where the file system allows it; else what they leave there is dropped.

    Args:
        groups: how many records at once are measured; between two of them it is a straight line. One number:
            that group alone.
    """
    size = -(-record_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
    places = [(file, file.stat().st_size - size) for file in files if file.stat().st_size > 2 * size]
    if not places:
        return None
    generator = np.random.default_rng(0)
    descriptors = {file: _open(file) for file, _ in places}
    buffers = [mmap.mmap(-1, size) for _ in range(max(groups))]

    def read(index: int, file: Path, start: int) -> None:
        os.preadv(descriptors[file], [buffers[index]], start)
        os.posix_fadvise(descriptors[file], start, size, os.POSIX_FADV_DONTNEED)

    def group(pool: ThreadPoolExecutor, at_once: int, _: int) -> None:
        asked = []
        for index in range(at_once):
            file, room = places[int(generator.integers(len(places)))]
            start = int(generator.integers(room // RECORD_ALIGNMENT + 1)) * RECORD_ALIGNMENT
            asked.append(pool.submit(read, index, file, start))
        for future in asked:
            future.result()

    with ThreadPoolExecutor(READER_THREADS) as pool:
        measured = [_seconds_each(partial(group, pool, at_once), 1) for at_once in groups]
    for descriptor in descriptors.values():
        os.close(descriptor)
    if len(groups) == 1:
        return tuple(measured)
    return tuple(np.interp(range(1, max(groups) + 1), groups, measured).tolist())


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without it
        return os.open(file, os.O_RDONLY)
