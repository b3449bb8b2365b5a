"""The kernels of gathered.py, in Triton: importing them takes Triton.

Sizes are known when a kernel is compiled, so every shape of a model has its own. A program computes a few
outputs of one row: `place` numbers the rows that are computed, `experts[place]` is the row's expert, and
tables name the address of every expert's matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def up(  # type: ignore[no-untyped-def]
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
def down(  # type: ignore[no-untyped-def]
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
def part4(  # type: ignore[no-untyped-def]
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
def sum4(  # type: ignore[no-untyped-def]
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
