"""Which of torch's functions native/program.c computes with the same bits, and with which operators.

Views are no operators: a result that lies in an argument's memory is an address. What is computed is one
operation in float and one rounding for each number, in bfloat16 or float32, so there is one possible result;
but for the mean of a row, whose order of summation is torch's kernel's, for vectors as wide as this machine
has. Which width that is is found by asking torch, and every program is compared with torch before it is used.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch

from melinoe.decoding.bits import same_bits
from melinoe.decoding.recorded import Call, Slot, map_tensors, tensors_of
from melinoe.native import library

DIMS = 4
_ROWS, _TILE, _SMALL = 4, 32, 2**20  # of a linear layer: rows at most, inputs a multiple of, weights at most
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Code(IntEnum):
    """Of an operator, as in native/program.c."""

    COPY = 0
    NEG = 1
    SQUARE = 2
    RSQRT = 3
    ADD = 4
    MUL = 5
    ADD_SCALAR = 6
    MUL_SCALAR = 7
    MEAN = 8
    PRODUCT = 9
    TILED = 10


MATRICES = (Code.PRODUCT, Code.TILED)
_UNARY = {"neg": Code.NEG, "__neg__": Code.NEG, "rsqrt": Code.RSQRT, "square": Code.SQUARE}
_BINARY = {
    **dict.fromkeys(("add", "__add__", "__radd__"), (Code.ADD, Code.ADD_SCALAR)),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), (Code.MUL, Code.MUL_SCALAR)),
}
_COPIES = ("to", "float", "bfloat16", "type_as", "contiguous", "reshape", "clone")
_VIEWS = (
    "view", "reshape", "transpose", "unsqueeze", "squeeze", "__getitem__", "chunk", "split", "permute",
    "expand", "flatten", "unflatten", "narrow", "select", "view_as", "expand_as",
)  # fmt: skip
_KNOWN = frozenset((*_UNARY, *_BINARY, *_COPIES, *_VIEWS, "pow", "__pow__", "mean", "cat", "linear"))
SAME = frozenset((*_COPIES, *_VIEWS, "dropout"))  # may return what they are given
_CHECKED_SIZES = (64, 65, 192, 1000, 2048, 9999)


@dataclass(frozen=True)
class Part:
    """A slot's tensor, or a piece of it, with a shape of the operator's: dimensions may have stride 0."""

    slot: Slot
    tensor: torch.Tensor


@dataclass(frozen=True)
class Operator:
    """One operator. extra: the bits of a scalar, the lanes of a mean, the address of a product's function.

    sizes: that it runs over; a product's are rows, inputs and outputs.
    """

    code: Code
    extra: int
    sizes: tuple[int, ...]
    out: Part
    a: Part
    b: Part | None = None


@cache
def native() -> Any:
    """The interpreter, or None: no compiler."""
    found: Any = library.opened("program.c")
    if found is not None:
        found.melinoe_program.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        found.melinoe_combine.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4
        found.melinoe_write_behind.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3
        found.melinoe_program_has.argtypes = [ctypes.c_int64] * 4
    return found


@cache
def lanes() -> int:
    """The width of vectors in which torch adds up a row of floats here; 0: none that we know."""
    return next((width for width in (16, 8) if all(_adds_alike(width, n) for n in _CHECKED_SIZES)), 0)


def _adds_alike(width: int, size: int) -> bool:
    rows = torch.randn(16, size, generator=torch.Generator().manual_seed(size))
    found = torch.empty(16)
    numbers = (
        *(Code.MEAN, width, 1, 1, 16, size),
        *(0, 0, 0, 0, 0, 1, 0),
        *(1, 0, 0, 0, 0, size, 1),
        *(1, 0, 0, 0, 0, 0, 0),
    )
    _run_one(numbers, found, rows)
    return same_bits(found, rows.mean(-1))


def _run_one(numbers: tuple[int, ...], *tensors: torch.Tensor) -> None:
    """A program of one operator, on tensors by their number."""
    program = (ctypes.c_int64 * RECORD)(*numbers)
    pointers = (ctypes.c_void_p * len(tensors))(*(one.data_ptr() for one in tensors))
    native().melinoe_program(ctypes.addressof(program), 1, ctypes.addressof(pointers))


RECORD = 2 + DIMS + 3 * (3 + DIMS)  # numbers of one operator


def merged(sizes: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides of tensors that are run over together, with as few dimensions as they have."""
    kept: list[tuple[int, list[int]]] = []
    for number, size in enumerate(sizes):
        steps = [one[number] for one in strides]
        if size == 1:
            continue
        if kept and all(outer == size * step for outer, step in zip(kept[-1][1], steps, strict=True)):
            kept[-1] = kept[-1][0] * size, steps
        else:
            kept.append((size, steps))
    return [size for size, _ in kept], [[steps[n] for _, steps in kept] for n in range(len(strides))]


def operators(call: Call, real: dict[Slot, torch.Tensor]) -> list[Operator] | None:
    """What computes a call; empty where its results are views, None where we do not know how.

    Args:
        real: the tensors of its arguments, which lie in memory as they will; its results are added.
    """
    given = [real.get(slot) for slot in tensors_of((call.args, call.kwargs))]
    name = getattr(call.function, "__name__", "")
    if name not in _KNOWN or any(one is None or one.dtype not in DTYPES for one in given):
        return None
    args, kwargs = map_tensors((call.args, call.kwargs), real.__getitem__)
    results = tensors_of(call.function(*args, **kwargs))
    if any(one.dtype not in DTYPES for one in results) or not results:
        return None
    real.update(zip(call.results, results, strict=True))
    storages = {one.untyped_storage().data_ptr() for one in given if one is not None}
    if all(one.untyped_storage().data_ptr() in storages for one in results):
        return []
    if len(results) > 1 or not results[0].numel():
        return None
    found = _computing(call, Part(call.results[0], results[0]), real)
    return found if found is not None and all(map(_there, found)) else None


def _there(one: Operator) -> bool:
    """Whether the interpreter has it."""
    if one.code == Code.TILED:
        return True
    parts = [one.out, one.a, one.b or one.out if one.code in (Code.ADD, Code.MUL) else None]
    dtypes = [0 if part is None else DTYPES[part.tensor.dtype] for part in parts]
    if not native().melinoe_program_has(one.code, *dtypes):
        return False
    strides = [part.tensor.stride() for part in parts if part is not None and one.code != Code.MEAN]
    return len(merged(one.sizes, strides)[0] if strides else one.sizes[:-1]) < DIMS + bool(strides)


def _computing(call: Call, out: Part, real: dict[Slot, torch.Tensor]) -> list[Operator] | None:
    name, args = getattr(call.function, "__name__", ""), call.args
    sizes = tuple(out.tensor.shape)
    if name == "cat":
        return _cat(call, out, real)
    if name == "linear":
        return _linear(call, out, real)
    if not args or not isinstance(args[0], Slot):
        return None
    one = Part(args[0], real[args[0]])
    if name in _COPIES and len(tensors_of((args, call.kwargs))) == (2 if name == "type_as" else 1):
        into = out.tensor if name != "reshape" else out.tensor.view(one.tensor.shape)
        return [Operator(Code.COPY, 0, tuple(one.tensor.shape), Part(out.slot, into), one)]
    if name == "mean":
        return _mean(call, out, one)
    if call.kwargs:
        return None
    if name in _UNARY and len(args) == 1:
        return [Operator(_UNARY[name], 0, sizes, out, one)]
    if name in ("pow", "__pow__") and args[1:] == (2,):
        return [Operator(Code.SQUARE, 0, sizes, out, one)]
    if name in _BINARY and len(args) == 2:
        return _binary(*_BINARY[name], out, one, args[1], real)
    return None


def _binary(
    code: Code, by_scalar: Code, out: Part, one: Part, other: Any, real: dict[Slot, torch.Tensor]
) -> list[Operator] | None:
    sizes = tuple(out.tensor.shape)
    a = Part(one.slot, one.tensor.expand(sizes))
    if type(other) in (int, float):
        bits = struct.unpack("<i", struct.pack("<f", other))[0]
        return [Operator(by_scalar, bits & 0xFFFFFFFF, sizes, out, a)]
    if not isinstance(other, Slot) or not (real[other].dim() and one.tensor.dim()):
        return None  # a tensor without dimensions may be rounded before it is used
    return [Operator(code, 0, sizes, out, a, Part(other, real[other].expand(sizes)))]


def _cat(call: Call, out: Part, real: dict[Slot, torch.Tensor]) -> list[Operator] | None:
    sequence, *more = call.args
    dim = more[0] if more else call.kwargs.get("dim", 0)
    if not isinstance(sequence, (list, tuple)) or len(more) > 1 or set(call.kwargs) - {"dim"}:
        return None
    found, at = [], 0
    for slot in sequence:
        part = real[slot]
        if part.dtype != out.tensor.dtype or part.dim() != out.tensor.dim():
            return None
        into = out.tensor.narrow(dim, at, part.shape[dim])
        found.append(Operator(Code.COPY, 0, tuple(part.shape), Part(out.slot, into), Part(slot, part)))
        at += part.shape[dim]
    return found


def _mean(call: Call, out: Part, one: Part) -> list[Operator] | None:
    """Of the last dimension, in float32, of neighbouring numbers."""
    dims = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    given, last = one.tensor, one.tensor.dim() - 1
    if call.kwargs.keys() - {"dim", "keepdim"} or len(call.args) > 3 or not isinstance(dims, (list, tuple)):
        return None
    if (
        list(dims) not in ([-1], [last])
        or last < 0
        or given.stride(last) != 1
        or given.dtype != torch.float32
    ):
        return None
    if not 0 < lanes() <= given.shape[last] or given.shape[last] > _CHECKED_SIZES[-1]:
        return None
    into = out.tensor if out.tensor.dim() == given.dim() else out.tensor.unsqueeze(-1)
    return [Operator(Code.MEAN, lanes(), tuple(given.shape), Part(out.slot, into), one)]


def _linear(call: Call, out: Part, real: dict[Slot, torch.Tensor]) -> list[Operator] | None:
    """Of few bfloat16 rows by a small matrix without a bias, where we know the order of torch's kernel."""
    given = [*call.args, *call.kwargs.values()]
    if len(given) not in (2, 3) or given[2:] not in ([], [None]) or set(call.kwargs) - {"weight", "bias"}:
        return None
    rows, weight = (Part(slot, real[slot]) for slot in given[:2])
    half = all(part.tensor.dtype == torch.bfloat16 and part.tensor.is_contiguous() for part in (rows, weight))
    size_out, size_in = weight.tensor.shape if weight.tensor.dim() == 2 else (0, 1)
    count = rows.tensor.numel() // size_in
    if not half or not 0 < count <= _ROWS or size_in % _TILE or not 0 < weight.tensor.numel() <= _SMALL:
        return None
    if not tiled(count, size_in, size_out, torch.get_num_threads(), torch._C._get_mkldnn_enabled()):
        return None
    return [Operator(Code.TILED, 0, (count, size_in, size_out), out, rows, weight)]


@cache
def tiled(count: int, size_in: int, size_out: int, _threads: int, _onednn: bool) -> bool:
    """Whether torch's linear layer of such rows adds up in tiles of 32 inputs, as matrix instructions do.

    What is asked are sums that nearly cancel: any other order has other bits in most of them.
    """
    generator = torch.Generator().manual_seed(size_in)
    for size in (1.0, 1e-3, 1e4, 1e-19):  # the last: with results that are no normal numbers
        rows, weight = torch.randn(count, size_in, generator=generator), torch.randn(
            size_out, size_in, generator=generator
        )  # fmt: skip
        order = torch.randperm(size_in, generator=generator)
        one, other = order[: size_in // 2], order[size_in // 2 :]
        rows[:, other], weight[:, other] = rows[:, one], -weight[:, one]
        weight[:, order[:2]] += 1e-4 * torch.randn(size_out, 2, generator=generator)
        rows, weight = (rows * size).bfloat16(), (weight * size).bfloat16()
        found = torch.empty(count, size_out, dtype=torch.bfloat16)
        numbers = Code.TILED, 0, count, size_in, size_out, 1
        places = *(0, 0, 1, 0, 0, 0, 0), *(1, 0, 1, 0, 0, 0, 0), *(2, 0, 1, 0, 0, 0, 0)
        _run_one((*numbers, *places), found, rows, weight)
        with torch.no_grad():
            if not same_bits(found, torch.nn.functional.linear(rows, weight)):
                return False
    return True


def product(out: Part, rows: Part, weight: Part, function: Callable[..., Any]) -> Operator:
    """rows [.., in], contiguous, by weight [out, in].

    function: of the compiled library, like melinoe_product.
    """
    count, size_in = rows.tensor.numel() // rows.tensor.shape[-1], rows.tensor.shape[-1]
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return Operator(Code.PRODUCT, address, (count, size_in, len(weight.tensor)), out, rows, weight)
