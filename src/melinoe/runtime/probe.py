"""What this machine does with a model of a given shape: short measurements, on stand-ins instead of weights.

    bookkeeping   the embedded model, opened and run for some tokens, with all experts and with none at hand:
                  its matrices take no time
    experts       what the experts function does with one token, on records of the shape, more of them than a
                  processor's cache holds; and the matrices that every token multiplies by
    reading       records' own size, from any file of the model, past the page cache, one alone and as many at
                  once as a token has experts

What is read takes turns of a few milliseconds, so that what else the machine does meets all of it alike, and
each is measured until its turns agree, at most for SECONDS. What computes is measured for all of SECONDS, one
behind the other: its first hundredths of a second are slower by a third and agree with each other (the log).
Means are given, not the best: what else the machine does meets a token as well; and with each how far it may
be off.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
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
from melinoe.store.packing import SCALE, is_matrix, packing_of

SECONDS = 0.2  # of each measurement, at most
TURN_SECONDS = 0.005
FEWEST_TURNS = 6
SURE = 0.03  # a mean whose standard error is this share of it is good enough: the formula is off by more
UNKNOWN = 0.15  # of a mean of too few turns to say
OUT_OF_CACHE = 96 * 2**20  # bytes of matrices that are gone through in turn
MOST_COPIES = 64
SKIPPED_STEPS, STEPS_OF_A_TURN = 8, 4  # of decoding: the first are recorded

Work = Callable[[int], object]  # called with 0, 1, 2, ...


@dataclass(frozen=True)
class Measured:
    """A mean, and its standard error as a share of it."""

    seconds: float
    spread: float


def mean_of(turns: list[tuple[float, int]]) -> Measured:
    """The mean of one call, from (seconds, calls) of turns.

    A turn that is disturbed has fewer calls and counts for so many: no mean of turns' own means. Its error is
    that of turns, because what disturbs one call may disturb its neighbours too.
    """
    count = sum(calls for _, calls in turns)
    mean = sum(seconds for seconds, _ in turns) / count
    if len(turns) < 3 or mean <= 0:
        return Measured(mean, UNKNOWN)
    off = sum((seconds - mean * calls) ** 2 for seconds, calls in turns) / (len(turns) - 1)
    return Measured(mean, math.sqrt(off * len(turns)) / count / mean)


def measure(works: Mapping[str, Work], seconds: float = SECONDS, sure: float = SURE) -> dict[str, Measured]:
    """Seconds of one call of each, in turns, each until it is known well enough, or for so many seconds.

    sure: the standard error, as a share of the mean, that is good enough; 0: all the seconds are taken.
    """
    turns: dict[str, list[tuple[float, int]]] = {name: [] for name in works}
    calls, spent = dict.fromkeys(works, 0), dict.fromkeys(works, 0.0)
    found: dict[str, Measured] = {}
    for name, work in works.items():  # memory, caches and files are there afterwards
        _turn(work, calls, name, 0.0)
    while len(found) < len(works):
        for name in [name for name in works if name not in found]:
            turns[name].append(_turn(works[name], calls, name, TURN_SECONDS))
            spent[name] += turns[name][-1][0]
            known = mean_of(turns[name])
            enough = len(turns[name]) >= FEWEST_TURNS and known.spread <= sure
            if enough or spent[name] >= seconds:
                found[name] = known
    return found


def _turn(work: Work, calls: dict[str, int], name: str, seconds: float) -> tuple[float, int]:
    """(seconds, calls) of at least one call."""
    first, began = calls[name], time.perf_counter()
    while True:
        work(calls[name])
        calls[name] += 1
        passed = time.perf_counter() - began
        if passed >= seconds:
            return passed, calls[name] - first


def _copies(nbytes: int) -> int:
    return max(2, min(MOST_COPIES, -(-OUT_OF_CACHE // nbytes)))


def _fill(tensor: torch.Tensor, scale: bool) -> None:
    """Numbers of the size that weights have, the same ones again and again: kernels do not look at them."""
    if scale:
        tensor.fill_(1e-3)
        return
    some = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    some = (some * 0.02).to(tensor.dtype) if tensor.is_floating_point() else (some * 30).to(torch.int8)
    flat = tensor.view(-1) if tensor.is_floating_point() else tensor.view(torch.int8).view(-1)
    for part in flat.split(len(some)):
        part.copy_(some[: len(part)])


@torch.no_grad()
def expert_work(module: nn.Module, layout: RecordLayout, hidden_size: int, top_k: int, format: str) -> Work:
    """All of the top_k experts that a token is computed with, in a store format, as a layer computes them.

    Args:
        module: an experts module, with or without parameters. layout: of one of its experts, in its own
            dtype. hidden_size: of its inputs.
    """
    packing = packing_of(format, layout, bool(module.is_transposed))
    stored = layout if packing is None else packing.record_layout()
    first = torch.zeros(stored.record_bytes, dtype=torch.uint8)
    for name, view in stored.views(first).items():
        _fill(view, name.endswith(SCALE))
    scratch = None
    if packing is not None:
        scratch = ScratchLayer(packing, torch.zeros(layout.record_bytes, dtype=torch.uint8), packing.tile)
    copies = max(top_k, _copies(stored.record_bytes))
    slots = RecordBuffer(copies, stored.record_bytes)  # memory of the same kind
    slots.tensor.copy_(first)
    records = [stored.views(record) for record in slots.tensor]
    experts: list[Views] = [one if scratch is None else PackedExpert(scratch, one) for one in records]
    dtype = next(torch_dtype(field.dtype) for field in layout.fields if is_matrix(field))
    row = torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    compiled.prepare()

    @torch.no_grad()
    def compute(index: int) -> None:
        start = index * top_k
        experts_outputs(module, row, [experts[(start + place) % copies] for place in range(top_k)])

    return compute


def dense_work(size_out: int, size_in: int, dtype: torch.dtype) -> Work:
    """One row by one of some matrices of a size."""
    one = torch.empty(size_out, size_in, dtype=dtype)
    _fill(one, False)
    weights = [one.clone() for _ in range(_copies(one.nbytes))]
    row = torch.randn(1, size_in).to(dtype)

    @torch.no_grad()
    def multiply(index: int) -> None:
        F.linear(row, weights[index % len(weights)])

    return multiply


def bookkeeping() -> tuple[Measured, Measured]:
    """(layer, missed) seconds of one layer and token of the embedded model: all of it, with all experts at
    hand; what more where none is, reading apart. Its index is made elsewhere: the home may be read-only."""
    from melinoe.conversion.in_place import index_in_place

    path = Path(resolve_model("tiny"))
    config: Any = read_config(path)
    with tempfile.TemporaryDirectory(prefix="melinoe-") as folder:
        store = index_in_place(path, Path(folder) / "tiny")
        layer, bare = (_tiny_layer_seconds(store.folder, slots) for slots in (int(config.num_experts), 0))
    group = store.max_record_bytes, int(config.num_experts_per_tok)
    with reading(sorted(path.glob("*.safetensors")), {"": group}) as reads:
        read = measure(reads).get("", Measured(0.0, 0.0))
    missed = max(0.0, bare.seconds - layer.seconds - read.seconds)
    return layer, Measured(missed, max(bare.spread, read.spread))


def _tiny_layer_seconds(path: Path | str, slots: int) -> Measured:
    from melinoe.runtime.generation import stream_generate
    from melinoe.runtime.load import load, load_tokenizer

    model = load(path, slots=slots, context=96)
    config: Any = model.config
    pieces = stream_generate(
        model, load_tokenizer(path), list(range(4, 20)), max_new_tokens=64, temperature=0.0, ignore_eos=True
    )
    times = [time.perf_counter() for piece in pieces if piece.token is not None]
    model.melinoe_paged.pager.close()
    ends = times[SKIPPED_STEPS::STEPS_OF_A_TURN]
    turns = [(after - before, STEPS_OF_A_TURN) for before, after in pairwise(ends)]
    found = mean_of(turns)
    return Measured(found.seconds / int(config.num_hidden_layers), found.spread)


@contextmanager
def reading(files: list[Path], wanted: Mapping[str, tuple[int, int]]) -> Iterator[dict[str, Work]]:
    """Reads records together, at random places of the files; nothing where none can be read.

    Reads bypass the page cache where the file system allows it; else what they leave there is dropped.

    Args:
        wanted: {name: (bytes of a record, how many at once)}.

    Yields:
        {name: what reads them once}.
    """
    sizes = {name: -(-size // RECORD_ALIGNMENT) * RECORD_ALIGNMENT for name, (size, _) in wanted.items()}
    lengths = {file: file.stat().st_size for file in files}
    largest = max(sizes.values(), default=0)
    places = [file for file in files if lengths[file] > 2 * largest]
    if not places or not wanted:
        yield {}
        return
    generator = np.random.default_rng(0)
    descriptors = {file: _open(file) for file in places}
    buffers = [memoryview(mmap.mmap(-1, largest)) for _ in range(max(count for _, count in wanted.values()))]

    def read(index: int, file: Path, start: int, size: int) -> None:
        os.preadv(descriptors[file], [buffers[index][:size]], start)
        os.posix_fadvise(descriptors[file], start, size, os.POSIX_FADV_DONTNEED)

    def group(size: int, at_once: int) -> None:
        asked = []
        for index in range(at_once):
            file = places[int(generator.integers(len(places)))]
            room = (lengths[file] - size) // RECORD_ALIGNMENT
            start = int(generator.integers(room + 1)) * RECORD_ALIGNMENT
            asked.append(pool.submit(read, index, file, start, size))
        for future in asked:
            future.result()

    def work(name: str) -> Work:
        return lambda _: group(sizes[name], wanted[name][1])

    try:
        with ThreadPoolExecutor(READER_THREADS) as pool:
            yield {name: work(name) for name in wanted}
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without it
        return os.open(file, os.O_RDONLY)
