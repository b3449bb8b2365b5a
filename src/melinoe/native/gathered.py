"""One token's experts on a GPU: each weight is read once, from wherever it lies, as it lies.

The kernels are given addresses. A record in device memory and one in pinned host memory, which a GPU reads
over the bus, are the same to them, so the bits of a result do not depend on what was where. Which kernel
computes a row is a matter of the number of rows, of dtype, format and shapes alone, for paged and resident
experts alike.

int8 and int4 codes (melinoe.store.rounding says what they are) become weights in registers, rounded to the
row's dtype as they are when a matrix is expanded; of int8, and of weights that are not packed, the sums are
taken in the same order, to the same bits.

Written in Triton, which torch for CUDA brings along; without it all of this is torch's. Triton's interpreter
(TRITON_INTERPRET=1) runs the same kernels on the CPU, slowly: the tests set `interpreted`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = ("auto", "int8", "int4")
_ROWS, _WIDTH, _WARPS = 8, 512, 4  # of a tile: outputs, inputs; warps that share it
_GROUP, _GROUPS = 64, 2  # of int4: inputs that share a scale, and such groups at a time
interpreted = False  # the CPU computes by these kernels too


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
    """Whether the kernels run on this device."""
    return triton is not None and (device.type == "cuda" or interpreted)


def takes(hidden_NH: torch.Tensor, dtype: torch.dtype, parts: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Whether rows [N, H] and experts are such as the kernels compute: one row, no gradients.

    dtype: of the weights, whatever they are packed in. parts: as for `gated`.
    """
    tensors = [hidden_NH, *[one for each in parts for one in each]]
    return (
        len(hidden_NH) == 1
        and usable(hidden_NH.device)
        and hidden_NH.dtype == dtype
        and dtype in DTYPES
        and all(one.is_contiguous() for one in tensors)
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
    )


def gated(hidden_1H: torch.Tensor, parts: Sequence[Sequence[torch.Tensor]], form: Form) -> torch.Tensor:
    """[K, H] outputs of experts down(silu(gate(x)) * up(x)) on one row, where their matrices are.

    parts: for each of K experts: [2 * I, H], the gate's half first, and [H, I]; where they are packed, codes
        and scales of the first and codes and scales of the second.
    """
    device = hidden_1H.device
    lists = [[one.data_ptr() for one in each] for each in zip(*parts, strict=True)]
    tables = list(torch.tensor(lists, dtype=torch.int64).to(device, non_blocking=True))
    if len(tables) == 2:
        tables = [tables[0], tables[0], tables[1], tables[1]]  # no scales
    return gated_at(hidden_1H, tables, _counting(len(parts), device), (0, 0, 0, 0), form)


@functools.lru_cache(maxsize=64)
def _counting(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)


def gated_at(
    hidden_1H: torch.Tensor,
    tables: Sequence[torch.Tensor],
    experts_K: torch.Tensor,
    offsets: tuple[int, int, int, int],
    form: Form,
) -> torch.Tensor:
    """`gated` of the experts with these numbers.

    Args:
        hidden_1H: contiguous.
        tables: of the first matrix, its scales, the second, its scales: int64, an address for each number.
        experts_K: int64, numbers.
        offsets: bytes from these addresses on.
    """
    top_k, hidden, inner = len(experts_K), hidden_1H.shape[1], form.inner
    inner_KI = hidden_1H.new_empty(top_k, inner)
    outputs_KH = hidden_1H.new_empty(top_k, hidden)
    up = hidden_1H, tables[0], tables[1], experts_K, inner_KI, offsets[0], offsets[1], hidden, inner
    down = inner_KI, tables[2], tables[3], experts_K, outputs_KH, offsets[2], offsets[3], inner, hidden
    settings: dict[str, Any] = {"num_warps": _WARPS}
    if form.format == "int4":
        settings |= {"HALF": form.tile // 2, "GROUP": _GROUP, "GROUPS": _GROUPS}
        _up4[inner // form.tile, top_k](*up, **settings)
        _down4[triton.cdiv(hidden, form.tile), top_k](*down, **settings)
        return outputs_KH
    settings |= {"WIDTH": _WIDTH, "CODES": form.format == "int8"}
    _up[triton.cdiv(inner, _ROWS), top_k](*up, ROWS=_ROWS, **settings)
    # twice the outputs: as many weights as of both matrices above
    _down[triton.cdiv(hidden, 2 * _ROWS), top_k](*down, ROWS=2 * _ROWS, **settings)
    return outputs_KH


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
        # 16 bytes at once: records and matrices begin at multiples of that
        weights = matrix.to(tl.pointer_type(dtype)) + rows[:, None] * size_in + columns[None, :]
        return tl.load(tl.multiple_of(weights, [1, 16]), mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _up(  # type: ignore[no-untyped-def]
        row,
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
        """out[k] = silu(gate @ row) * (up @ row), of a matrix whose first half is the gate."""
        place = tl.program_id(1)
        matrix = _address(table, experts, place, offset)
        scales = _address(scale_table, experts, place, scale_offset)
        dtype: tl.constexpr = row.dtype.element_ty
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
        """out[k] = down @ rows_in[k]."""
        place = tl.program_id(1)
        matrix = _address(table, experts, place, offset)
        scales = _address(scale_table, experts, place, scale_offset)
        dtype: tl.constexpr = rows_in.dtype.element_ty
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, size_in, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            x = tl.load(rows_in + place * size_in + columns, mask=columns < size_in, other=0.0)
            weights = _tile(matrix, scales, rows, columns, size_out, size_in, dtype, CODES)
            total += weights * x.to(tl.float32)[None, :]
        tl.store(out + place * size_out + rows, tl.sum(total, 1).to(dtype), mask=rows < size_out)

    @triton.jit
    def _tile4(  # type: ignore[no-untyped-def]
        matrix,
        scales,
        tile,
        inputs,
        size_out: tl.constexpr,
        size_in: tl.constexpr,
        dtype: tl.constexpr,
        HALF: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        """[GROUPS, GROUP, HALF] float32 twice: of the first and of the second half of a tile's outputs.

        inputs: [GROUPS, GROUP, 1].
        """
        width: tl.constexpr = (size_in + GROUP - 1) // GROUP * GROUP
        outputs: tl.constexpr = (size_out + GROUP - 1) // GROUP * GROUP
        half = tl.arange(0, HALF)[None, None, :]
        inside = inputs < width
        codes = matrix.to(tl.pointer_type(tl.uint8)) + (tile * width + inputs) * HALF + half
        byte = tl.load(codes, mask=inside, other=0).to(tl.int32)
        pairs = ((inputs // GROUP) * outputs + tile * 2 * HALF + half) * 2
        at = scales.to(tl.pointer_type(tl.bfloat16)) + pairs
        low = _weight(at, (byte & 15) - 8, inside, dtype)
        high = _weight(at + 2 * HALF, (byte >> 4) - 8, inside, dtype)
        return low, high

    @triton.jit
    def _weight(at, code, inside, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """code * scale + zero, of a scale and a zero side by side; the product is exact."""
        scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
        return (code.to(tl.float32) * scale + zero).to(dtype).to(tl.float32)

    @triton.jit
    def _inputs(start, GROUP: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
        groups = tl.arange(0, GROUPS)[:, None, None] * GROUP
        return start + groups + tl.arange(0, GROUP)[None, :, None]

    @triton.jit
    def _up4(  # type: ignore[no-untyped-def]
        row,
        table,
        scale_table,
        experts,
        out,
        offset,
        scale_offset,
        size_in: tl.constexpr,
        inner: tl.constexpr,
        HALF: tl.constexpr,
        GROUP: tl.constexpr,
        GROUPS: tl.constexpr,
    ):
        """As `_up`, a tile of int4 codes of either half at a time."""
        tile, place = tl.program_id(0), tl.program_id(1)
        matrix = _address(table, experts, place, offset)
        scales = _address(scale_table, experts, place, scale_offset)
        dtype: tl.constexpr = row.dtype.element_ty
        gate_low = tl.zeros([GROUPS, GROUP, HALF], tl.float32)
        gate_high = tl.zeros([GROUPS, GROUP, HALF], tl.float32)
        up_low = tl.zeros([GROUPS, GROUP, HALF], tl.float32)
        up_high = tl.zeros([GROUPS, GROUP, HALF], tl.float32)
        other: tl.constexpr = inner // (2 * HALF)  # tiles of the gate
        for start in range(0, size_in, GROUP * GROUPS):
            inputs = _inputs(start, GROUP, GROUPS)
            x = tl.load(row + inputs, mask=inputs < size_in, other=0.0).to(tl.float32)
            low, high = _tile4(matrix, scales, tile, inputs, 2 * inner, size_in, dtype, HALF, GROUP)
            gate_low += low * x
            gate_high += high * x
            low, high = _tile4(matrix, scales, other + tile, inputs, 2 * inner, size_in, dtype, HALF, GROUP)
            up_low += low * x
            up_high += high * x
        at = out + place * inner + tile * 2 * HALF + tl.arange(0, HALF)
        tl.store(at, _silu(_over_inputs(gate_low), _over_inputs(up_low), dtype))
        tl.store(at + HALF, _silu(_over_inputs(gate_high), _over_inputs(up_high), dtype))

    @triton.jit
    def _over_inputs(total):  # type: ignore[no-untyped-def]
        return tl.sum(tl.sum(total, 0), 0)

    @triton.jit
    def _down4(  # type: ignore[no-untyped-def]
        rows_in,
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
    ):
        """As `_down`, a tile of int4 codes at a time."""
        tile, place = tl.program_id(0), tl.program_id(1)
        matrix = _address(table, experts, place, offset)
        scales = _address(scale_table, experts, place, scale_offset)
        dtype: tl.constexpr = rows_in.dtype.element_ty
        total_low = tl.zeros([GROUPS, GROUP, HALF], tl.float32)
        total_high = tl.zeros([GROUPS, GROUP, HALF], tl.float32)
        for start in range(0, size_in, GROUP * GROUPS):
            inputs = _inputs(start, GROUP, GROUPS)
            x = tl.load(rows_in + place * size_in + inputs, mask=inputs < size_in, other=0.0).to(tl.float32)
            low, high = _tile4(matrix, scales, tile, inputs, size_out, size_in, dtype, HALF, GROUP)
            total_low += low * x
            total_high += high * x
        rows = tile * 2 * HALF + tl.arange(0, HALF)
        at = out + place * size_out + rows
        tl.store(at, _over_inputs(total_low).to(dtype), mask=rows < size_out)
        tl.store(at + HALF, _over_inputs(total_high).to(dtype), mask=rows + HALF < size_out)
