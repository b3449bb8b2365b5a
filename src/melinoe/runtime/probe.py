"""What this machine does with a model of a given shape: short measurements, on stand-ins instead of weights.

    bookkeeping   the embedded model, opened and run for some tokens: its matrices take no time
    matrices      one row by matrices of the shape, more of them than a processor's cache holds
    reading       records' own size, from any file of the model, past the page cache, as many at once as a
                  layer misses

Each takes a fraction of a second.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from melinoe.config import RECORD_ALIGNMENT
from melinoe.models.folder import resolve_model
from melinoe.paging.reader import READER_THREADS
from melinoe.store import kernels
from melinoe.store.layout import RecordLayout, torch_dtype
from melinoe.store.packing import SCALE, is_matrix, packing_of

SECONDS = 0.2  # of each measurement
OUT_OF_CACHE = 96 * 2**20  # bytes of matrices that are gone through in turn
MOST_COPIES = 64


def _seconds_each(work: Callable[[int], object], copies: int) -> float:
    """The median of one call, over calls with 0, 1, ... copies - 1 in turn."""
    for index in range(min(copies, 4)):
        work(index)
    each: list[float] = []
    began = time.perf_counter()
    while (start := time.perf_counter()) - began < SECONDS or len(each) < 8:
        work(len(each) % copies)
        each.append(time.perf_counter() - start)
    return float(np.median(each))


def _copies(nbytes: int) -> int:
    return max(2, min(MOST_COPIES, -(-OUT_OF_CACHE // nbytes)))


@torch.no_grad()
def expert_seconds(layout: RecordLayout, transposed: bool, format: str) -> float:
    """One expert's matrices by one row, in a store format, as the experts function computes them."""
    packing = packing_of(format, layout, transposed)
    stored = layout if packing is None else packing.record_layout()
    generator = torch.Generator().manual_seed(0)
    matrices = [field for field in layout.fields if is_matrix(field)]
    weights = {}
    for field in layout.fields:
        values = torch.randn(field.shape, generator=generator) * 0.02
        weights[field.name] = values.to(torch_dtype(field.dtype))
    first = torch.zeros(stored.record_bytes, dtype=torch.uint8)
    views = stored.views(first)
    for name, weight in weights.items() if packing is None else ():
        views[name].copy_(weight)
    if packing is not None:
        packing.pack(weights, views)
    records = [stored.views(first.clone()) for _ in range(_copies(stored.record_bytes))]
    as_it_lies = packing is not None and kernels.usable(format, packing.tile)
    rows: list[torch.Tensor] = []
    for field in matrices:
        size_in = field.shape[0] if transposed else field.shape[1]
        rows.append(torch.randn(1, size_in, generator=generator).to(torch_dtype(field.dtype)))

    def compute(index: int) -> None:
        own = records[index]
        for field, row in zip(matrices, rows, strict=True):
            if packing is None:
                weight = own[field.name]
                _ = row @ weight if transposed else F.linear(row, weight)
            elif as_it_lies and row.dtype == kernels.DTYPE:
                size_out = packing.out_in(field)[0]
                kernels.product(format, row, own[field.name], own[field.name + SCALE], size_out)
            else:
                packing.expand_one(field, own, weights[field.name])
                weight = weights[field.name]
                _ = row @ weight if transposed else F.linear(row, weight)

    return _seconds_each(compute, len(records))


@torch.no_grad()
def dense_bytes_per_second(size_out: int, size_in: int, dtype: torch.dtype) -> float:
    """One row by matrices of a size: bytes of weights a second."""
    one = torch.randn(size_out, size_in, dtype=torch.float32).to(dtype)
    weights = [one.clone() for _ in range(_copies(one.nbytes))]
    row = torch.randn(1, size_in).to(dtype)
    return one.nbytes / _seconds_each(lambda index: F.linear(row, weights[index]), len(weights))


@cache
def layer_seconds() -> float:
    """Bookkeeping of one layer and token: the embedded model's, all experts at hand, small matrices."""
    from melinoe.runtime.generation import stream_generate
    from melinoe.runtime.load import load, load_tokenizer

    path = resolve_model("tiny")
    config: Any = None
    model = load(path, slots=_experts_of(path), context=96)
    config = model.config
    pieces = stream_generate(
        model, load_tokenizer(path), list(range(4, 20)), max_new_tokens=64, temperature=0.0, ignore_eos=True
    )
    times = [time.perf_counter() for piece in pieces if piece.token is not None]
    model.melinoe_paged.pager.close()
    steps = np.diff(times)[8:]
    return float(np.median(steps)) / config.num_hidden_layers


def _experts_of(path: Path | str) -> int:
    from melinoe.models.pretrained import read_config

    return int(read_config(path).num_experts)


def record_seconds(files: list[Path], record_bytes: int, at_once: int) -> float | None:
    """One record of a size, read at random places of the files, so many at once; None where none can be.

    Reads bypass the page cache where the file system allows it; else what they leave there is dropped.
    """
    size = -(-record_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
    places = [(file, file.stat().st_size - size) for file in files if file.stat().st_size > 2 * size]
    if not places:
        return None
    generator = np.random.default_rng(0)
    descriptors = {file: _open(file) for file, _ in places}
    at_once = max(1, min(at_once, 4 * READER_THREADS))
    buffers = [mmap.mmap(-1, size) for _ in range(at_once)]

    def read(index: int, file: Path, start: int) -> None:
        os.preadv(descriptors[file], [buffers[index]], start)
        os.posix_fadvise(descriptors[file], start, size, os.POSIX_FADV_DONTNEED)

    each: list[float] = []
    began = time.perf_counter()
    with ThreadPoolExecutor(READER_THREADS) as pool:
        while (asked_at := time.perf_counter()) - began < SECONDS or len(each) < 4:
            asked = []
            for index in range(at_once):
                file, room = places[int(generator.integers(len(places)))]
                start = int(generator.integers(room // RECORD_ALIGNMENT + 1)) * RECORD_ALIGNMENT
                asked.append(pool.submit(read, index, file, start))
            for future in asked:
                future.result()
            each.append(time.perf_counter() - asked_at)
    for descriptor in descriptors.values():
        os.close(descriptor)
    return float(np.median(each)) / at_once


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without it
        return os.open(file, os.O_RDONLY)
