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

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without
    triton = None

FEW_ROWS = 16  # of one expert; more are torch's, whose matrix products need no cache to read weights once
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = ("auto", "int8", "int4")
# measured on an H100 (docs/log.md); other numbers give other sums, so none is chosen while running
_ROWS, _WIDTH, _WARPS = 8, 512, 4  # of a tile: outputs, inputs; warps that share it
_GROUP, _GROUPS, _WARPS4 = 64, 2, 2  # of int4: inputs that share a scale, such groups at a time; warps
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
        return triton is not None and _found(device)
    return triton is not None and interpreted and device.type == "cpu"


@functools.cache
def _found(device: torch.device) -> bool:
    """Tries a small expert: Triton needs a C compiler, and a GPU that it knows."""
    generator = torch.Generator().manual_seed(0)
    row, up, down = (torch.randn(*shape, generator=generator) for shape in ((1, 64), (96, 64), (64, 48)))
    try:
        with torch.no_grad():
            parts = [(up.to(device), down.to(device))]
            found = gated(row.to(device), parts, Form(48)).cpu().double()
    except Exception as error:  # whatever a compiler or a driver has to say
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"melinoe: no Triton kernels on this machine, decoding is slower: {first}", file=sys.stderr)
        return False
    gate, value = (row.double() @ up.double().T).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * value) @ down.double().T
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def takes(hidden_NH: torch.Tensor, dtype: torch.dtype, parts: Parts) -> bool:
    """Whether rows [N, H] and experts are such as the kernels compute: few rows, no gradients.

    dtype: of the weights, whatever they are packed in. parts: as for `gated`.
    """
    return 0 < len(hidden_NH) <= FEW_ROWS and fits(hidden_NH, dtype, parts)


def fits(hidden_NH: torch.Tensor, dtype: torch.dtype, parts: Parts) -> bool:
    """`takes`, but for the number of rows."""
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
    rows, experts, places = which
    count, hidden, inner = len(experts), hidden_TH.shape[1], form.inner
    act_NI = hidden_TH.new_empty(count, inner)
    up = hidden_TH, rows, tables[0], tables[1], experts, act_NI, *offsets[:2], hidden, inner
    down = act_NI, places, tables[2], tables[3], experts, outputs_NH, *offsets[2:], inner, hidden
    if form.format == "int4":
        _by_parts(up, form, gated=True)
        _by_parts(down, form, gated=False)
        return
    settings: dict[str, Any] = {"num_warps": _WARPS, "WIDTH": _WIDTH, "CODES": form.format == "int8"}
    _up[triton.cdiv(inner, _ROWS), count](*up, ROWS=_ROWS, **settings)
    # twice the outputs: as many weights as of both matrices above
    _down[triton.cdiv(hidden, 2 * _ROWS), count](*down, ROWS=2 * _ROWS, **settings)


def _by_parts(given: tuple[Any, ...], form: Form, gated: bool) -> None:
    """A matrix of int4 codes by rows, a tile of outputs and a few groups of inputs at a time.

    A tile is much for one program and there are few: so its inputs are divided among several, whose sums are
    added up in their order afterwards.
    """
    rows, which, table, scale_table, experts, out, offset, scale_offset, size_in, width = given
    size_out, count = width * (2 if gated else 1), len(experts)
    padded, parts = -(-size_out // _GROUP) * _GROUP, triton.cdiv(size_in, _GROUP * _GROUPS)
    sums = torch.empty(count, parts, padded, dtype=torch.float32, device=out.device)
    sizes: dict[str, Any] = {"HALF": form.tile // 2, "GROUP": _GROUP, "GROUPS": _GROUPS, "num_warps": _WARPS4}
    grid = padded // form.tile, parts, count
    matrix = table, scale_table, experts, sums, offset, scale_offset, size_in, size_out
    _part4[grid](rows, which, *matrix, PICKED=gated, **sizes)
    _sum4[triton.cdiv(width, 256), count](sums, out, which, width, padded, parts, gated, 256)


if triton is not None:

    @triton.jit
    def _address(table, experts, place, offset):  # type: ignore[no-untyped-def]
        return tl.load(table + tl.load(experts + place)) + offset

    @triton.jit
    def _silu(gate, up, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """silu(gate) * up of float32 sums, rounded where torch rounds: both products, silu, the result."""
        g, u = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        return ((g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32) * u).to(dtype)

    @triton.jit
    def _tile(  # type: ignore[no-untyped-def]
        matrix,
        scales,
        rows,
        columns,
        size_out: tl.constexpr,
        size_in: tl.constexpr,
        dtype: tl.constexpr,
        CODES: tl.constexpr,
    ):
        """[ROWS, WIDTH] float32 of a matrix [size_out, size_in] at two addresses; zeros beyond it."""
        inside = (rows[:, None] < size_out) & (columns[None, :] < size_in)
        if CODES:
            width: tl.constexpr = (size_in + 63) // 64 * 64
            codes = matrix.to(tl.pointer_type(tl.int8)) + rows[:, None] * width + columns[None, :]
            code = tl.load(tl.multiple_of(codes, [1, 16]), mask=inside, other=0).to(tl.float32)
            scale = tl.load(scales.to(tl.pointer_type(tl.bfloat16)) + rows, mask=rows < size_out, other=0.0)
            return (code * scale.to(tl.float32)[:, None]).to(dtype).to(tl.float32)
        weights = matrix.to(tl.pointer_type(dtype)) + rows[:, None] * size_in + columns[None, :]
        if size_in % 16 == 0:  # rows begin at multiples of 16 bytes, as matrices do: so much at once
            weights = tl.multiple_of(weights, [1, 16])
        return tl.load(weights, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _up(  # type: ignore[no-untyped-def]
        rows_in,
        which,
        table,
        scale_table,
        experts,
        out,
        offset,
        scale_offset,
        size_in: tl.constexpr,
        inner: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
        CODES: tl.constexpr,
    ):
        """out[n] = silu(gate @ row) * (up @ row), of a matrix whose first half is the gate."""
        place = tl.program_id(1)
        matrix = _address(table, experts, place, offset)
        scales = _address(scale_table, experts, place, scale_offset)
        dtype: tl.constexpr = rows_in.dtype.element_ty
        row = rows_in + tl.load(which + place) * size_in
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        # beyond the gate's rows nothing is stored, so that rows of the other half do no harm there
        gate = tl.zeros([ROWS, WIDTH], tl.float32)
        up = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, size_in, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            x = tl.load(row + columns, mask=columns < size_in, other=0.0).to(tl.float32)[None, :]
            gate += _tile(matrix, scales, rows, columns, 2 * inner, size_in, dtype, CODES) * x
            up += _tile(matrix, scales, inner + rows, columns, 2 * inner, size_in, dtype, CODES) * x
        act = _silu(tl.sum(gate, 1), tl.sum(up, 1), dtype)
        tl.store(out + place * inner + rows, act, mask=rows < inner)

    @triton.jit
    def _down(  # type: ignore[no-untyped-def]
        rows_in,
        places,
        table,
        scale_table,
        experts,
        out,
        offset,
        scale_offset,
        size_in: tl.constexpr,
        size_out: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
        CODES: tl.constexpr,
    ):
        """out[n] = down @ row."""
        place = tl.program_id(1)
        matrix = _address(table, experts, place, offset)
        scales = _address(scale_table, experts, place, scale_offset)
        dtype: tl.constexpr = rows_in.dtype.element_ty
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row = rows_in + place * size_in
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, size_in, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            x = tl.load(row + columns, mask=columns < size_in, other=0.0)
            weights = _tile(matrix, scales, rows, columns, size_out, size_in, dtype, CODES)
            total += weights * x.to(tl.float32)[None, :]
        at = out + tl.load(places + place) * size_out + rows
        tl.store(at, tl.sum(total, 1).to(dtype), mask=rows < size_out)

    @triton.jit
    def _weight(at, code, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """code * scale + zero, of a scale and a zero side by side; the product is exact."""
        scale, zero = tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32)
        return (code.to(tl.float32) * scale + zero).to(dtype).to(tl.float32)

    @triton.jit
    def _part4(  # type: ignore[no-untyped-def]
        rows_in,
        which,
        table,
        scale_table,
        experts,
        out,
        offset,
        scale_offset,
        size_in: tl.constexpr,
        size_out: tl.constexpr,
        HALF: tl.constexpr,
        GROUP: tl.constexpr,
        GROUPS: tl.constexpr,
        PICKED: tl.constexpr,
    ):
        """out[n, part, a tile's outputs] float32: a matrix of int4 codes by some groups of a row's inputs."""
        tile, part, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        parts = tl.num_programs(1)
        matrix = _address(table, experts, place, offset)
        scales = _address(scale_table, experts, place, scale_offset)
        dtype: tl.constexpr = rows_in.dtype.element_ty
        width: tl.constexpr = (size_in + GROUP - 1) // GROUP * GROUP
        outputs: tl.constexpr = (size_out + GROUP - 1) // GROUP * GROUP
        group = part * GROUPS + tl.arange(0, GROUPS)[:, None, None]
        inputs = group * GROUP + tl.arange(0, GROUP)[None, :, None]
        half = tl.arange(0, HALF)[None, None, :]
        row = rows_in + (tl.load(which + place) if PICKED else place) * size_in
        x = tl.load(row + inputs, mask=inputs < size_in, other=0.0).to(tl.float32)
        inputs = tl.minimum(inputs, width - 1)  # beyond them x is zero, whatever the codes are
        codes = matrix.to(tl.pointer_type(tl.uint8)) + (tile * width + inputs) * HALF + half
        byte = tl.load(tl.multiple_of(codes, [1, 1, 16])).to(tl.int32)
        pairs = (tl.minimum(group, width // GROUP - 1) * outputs + tile * 2 * HALF + half) * 2
        at = scales.to(tl.pointer_type(tl.bfloat16)) + pairs
        low = _weight(at, (byte & 15) - 8, dtype) * x
        high = _weight(at + 2 * HALF, (byte >> 4) - 8, dtype) * x
        into = out + (place * parts + part) * outputs + tile * 2 * HALF + tl.arange(0, HALF)
        tl.store(into, tl.sum(tl.sum(low, 0), 0))
        tl.store(into + HALF, tl.sum(tl.sum(high, 0), 0))

    @triton.jit
    def _sum4(  # type: ignore[no-untyped-def]
        sums, out, places, size_out, padded, PARTS: tl.constexpr, GATED: tl.constexpr, WIDTH: tl.constexpr
    ):
        """out[n] of sums [n, PARTS, padded]: added up in their order; GATED: of a gate and what it gates."""
        place = tl.program_id(1)
        columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        inside = columns < size_out
        first = tl.zeros([WIDTH], tl.float32)
        second = tl.zeros([WIDTH], tl.float32)
        for part in tl.static_range(PARTS):
            at = sums + (place * PARTS + part) * padded + columns
            first += tl.load(at, mask=inside, other=0.0)
            if GATED:
                second += tl.load(at + size_out, mask=inside, other=0.0)
        dtype: tl.constexpr = out.dtype.element_ty
        result = _silu(first, second, dtype) if GATED else first.to(dtype)
        at = place if GATED else tl.load(places + place)
        tl.store(out + at * size_out + columns, result, mask=inside)
