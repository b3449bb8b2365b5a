"""Few rows by experts on a GPU, from wherever their weights lie, as they lie.

The kernels are given addresses. A record in device memory and one in pinned host memory, which a GPU reads
over the bus, are the same to them, so the bits of a result do not depend on what was where. Which kernel
computes a row is a matter of the number of an expert's rows, of dtype, format and shapes alone, for paged and
resident experts alike; and up to FEW_ROWS each is computed as one alone is.

A decoded token reads each weight once. Rows of one expert follow each other and find its weights in the
device's cache.

int8 and int4 codes (melinoe.store.rounding says what they are) become weights in registers, rounded to the
row's dtype as they are when a matrix is expanded. The order of a sum is the format's own.

Written in Triton, which torch for CUDA brings along; without it all of this is torch's. Triton's interpreter
(TRITON_INTERPRET=1) runs the same kernels on the CPU, slowly: the tests set `interpreted`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

FEW_ROWS = 16  # of one expert; more are torch's, whose matrix products need no cache to read weights once
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = ("auto", "int8", "int4")
# measured on an H100 (docs/log.md); other numbers give other sums, so none is chosen while running
_ROWS, _WIDTH, _WARPS = 8, 512, 4  # of a tile: outputs, inputs; warps that share it
_GROUP, _GROUPS, _WARPS4 = 64, 2, 2  # of int4: inputs that share a scale, such groups at a time; warps
_SUMS_BYTES = 1 << 25  # of int4, for rows that are computed at once: no budget knows of it
interpreted = False  # the CPU computes by these kernels too


Parts = Sequence[Sequence[torch.Tensor]]  # the tensors of several experts


class Form(NamedTuple):
    """How the two matrices of an expert lie in memory.

    inner: I. format: auto, int8 or int4. tile: of int4 codes.
    """

    inner: int
    format: str = "auto"
    tile: int = 0

    @property
    def computed(self) -> bool:
        """Whether there is a kernel: a tile of int4 holds outputs of the gate, or of what it gates."""
        return self.format in FORMATS and (self.format != "int4" or self.inner % self.tile == 0)


def usable(device: torch.device) -> bool:
    """Whether the kernels run on this device, and compute what they should."""
    if device.type == "cuda":
        return _found(device)
    return interpreted and device.type == "cpu"


@functools.cache
def _found(device: torch.device) -> bool:
    """Whether they can be had: Triton needs a C compiler, and a GPU that it knows in these dtypes."""
    try:
        return all(_agrees(device, *each) for each in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)))
    except Exception as error:  # no Triton, or whatever a compiler or a driver has to say
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"melinoe: no Triton kernels on this machine, decoding is slower: {first}", file=sys.stderr)
        return False


def _agrees(device: torch.device, dtype: torch.dtype, limit: float) -> bool:
    """Whether a small expert gives what it should, but for so much of it."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 64), (96, 64), (64, 48)
    row, up, down = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    with torch.no_grad():
        parts = [(up.to(device), down.to(device))]
        found = gated(row.to(device), parts, Form(48)).cpu().double()
    gate, value = (row.double() @ up.double().T).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * value) @ down.double().T
    return bool((found - expected).norm() < limit * expected.norm())


def fits(hidden_NH: torch.Tensor, dtype: torch.dtype, parts: Parts) -> bool:
    """Whether rows [N, H] and experts are such as the kernels compute, but for the number of rows.

    dtype: of the weights, whatever they are packed in. parts: as for `gated`.
    """
    tensors = [hidden_NH, *[one for each in parts for one in each]]
    return (
        usable(hidden_NH.device)
        and hidden_NH.dtype == dtype
        and dtype in DTYPES
        and all(one.is_contiguous() and one.data_ptr() % 16 == 0 for one in tensors)
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
    )


def gated(hidden_NH: torch.Tensor, parts: Parts, form: Form) -> torch.Tensor:
    """[K * N, H] outputs of experts down(silu(gate(x)) * up(x)) on the same rows, expert by expert.

    parts: for each of K experts: [2 * I, H], the gate's half first, and [H, I]; where they are packed, codes
        and scales of the first and codes and scales of the second.
    """
    count, rows, device = len(parts), len(hidden_NH), hidden_NH.device
    each = torch.tensor([*range(rows)] * count, device=device) if rows > 1 else _zeros(count, device)
    experts = _counting(count, device)
    experts = experts.repeat_interleave(rows) if rows > 1 else experts
    outputs = hidden_NH.new_empty(count * rows, hidden_NH.shape[1])
    places = _counting(len(outputs), device)
    gated_at(hidden_NH, (each, experts, places), outputs, _tables(parts, device), (0, 0, 0, 0), form)
    return outputs


def gated_rows(
    hidden_TH: torch.Tensor,
    choices: Sequence[torch.Tensor],
    parts: Parts,
    outputs_NH: torch.Tensor,
    form: Form,
) -> None:
    """Whole experts, each on rows of its own, to the bits of `gated`.

    Args:
        choices: of each expert the places of its rows in outputs_NH, int64; `N // T` of them have one input.
        outputs_NH: contiguous, written at these places.
    """
    device, top_k = hidden_TH.device, len(outputs_NH) // len(hidden_TH)
    places = torch.cat(list(choices))
    counts = torch.tensor([len(one) for one in choices], device=device)
    experts = torch.repeat_interleave(_counting(len(parts), device), counts, output_size=len(places))
    rows = places.div(top_k, rounding_mode="floor")
    gated_at(hidden_TH, (rows, experts, places), outputs_NH, _tables(parts, device), (0, 0, 0, 0), form)


def _tables(parts: Parts, device: torch.device) -> list[torch.Tensor]:
    lists = [[one.data_ptr() for one in each] for each in zip(*parts, strict=True)]
    tables = list(torch.tensor(lists, dtype=torch.int64).to(device, non_blocking=True))
    return [tables[0], tables[0], tables[1], tables[1]] if len(tables) == 2 else tables  # no scales


@functools.lru_cache(maxsize=64)
def _counting(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)


@functools.lru_cache(maxsize=64)
def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64, device=device)


def gated_at(
    hidden_TH: torch.Tensor,
    which: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    outputs_NH: torch.Tensor,
    tables: Sequence[torch.Tensor],
    offsets: tuple[int, int, int, int],
    form: Form,
) -> None:
    """`gated` of experts that are known by their numbers.

    Args:
        hidden_TH: contiguous.
        which: of each row that is computed: its input, its expert, its place among the outputs; int64.
        tables: of the first matrix, its scales, the second, its scales: int64, an address for each number.
        offsets: bytes from these addresses on.
    """
    from melinoe.native import gathered_kernels as kernels  # here: Triton takes a while to import

    rows, experts, places = which
    count, hidden, inner = len(experts), hidden_TH.shape[1], form.inner
    act_NI = hidden_TH.new_empty(count, inner)
    if form.format == "int4":
        most = max(_parts(hidden) * _padded(2 * inner), _parts(inner) * _padded(hidden))
        at_once = max(2, _SUMS_BYTES // (4 * most) // 2 * 2)  # even, so that what they begin with is aligned
        for start in range(0, count, at_once):
            some = slice(start, start + at_once)
            up = hidden_TH, rows[some], *tables[:2], experts[some], act_NI[some]
            down = act_NI[some], places[some], *tables[2:], experts[some], outputs_NH
            _by_parts((*up, *offsets[:2], hidden, inner), form, gated=True)
            _by_parts((*down, *offsets[2:], inner, hidden), form, gated=False)
        return
    up = hidden_TH, rows, *tables[:2], experts, act_NI, *offsets[:2], hidden, inner
    down = act_NI, places, *tables[2:], experts, outputs_NH, *offsets[2:], inner, hidden
    settings: dict[str, Any] = {"num_warps": _WARPS, "WIDTH": _WIDTH, "CODES": form.format == "int8"}
    with torch.cuda.device_of(hidden_TH):  # Triton's launches are the current device's
        kernels.up[-(-inner // _ROWS), count](*up, ROWS=_ROWS, **settings)
        # twice the outputs: as many weights as of both matrices above
        kernels.down[-(-hidden // (2 * _ROWS)), count](*down, ROWS=2 * _ROWS, **settings)


def _padded(size_out: int) -> int:
    return -(-size_out // _GROUP) * _GROUP


def _parts(size_in: int) -> int:
    return -(-size_in // (_GROUP * _GROUPS))


def _by_parts(given: tuple[Any, ...], form: Form, gated: bool) -> None:
    """A matrix of int4 codes by rows, a tile of outputs and a few groups of inputs at a time.

    A tile is much for one program and there are few: so its inputs are divided among several, whose sums are
    added up in their order afterwards.
    """
    from melinoe.native import gathered_kernels as kernels

    rows, which, table, scale_table, experts, out, offset, scale_offset, size_in, width = given
    size_out, count = width * (2 if gated else 1), len(experts)
    padded, parts = _padded(size_out), _parts(size_in)
    sums = torch.empty(count, parts, padded, dtype=torch.float32, device=out.device)
    sizes: dict[str, Any] = {"HALF": form.tile // 2, "GROUP": _GROUP, "GROUPS": _GROUPS, "num_warps": _WARPS4}
    grid = padded // form.tile, parts, count
    matrix = table, scale_table, experts, sums, offset, scale_offset, size_in, size_out
    with torch.cuda.device_of(out):
        kernels.part4[grid](rows, which, *matrix, PICKED=gated, **sizes)
        kernels.sum4[-(-width // 256), count](sums, out, which, width, padded, parts, gated, 256)
