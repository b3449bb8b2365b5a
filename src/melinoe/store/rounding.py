"""One matrix of an expert as int8 or int4 codes, in the form that torch's packed kernels compute, and back.

A matrix is [out, in] here, whichever way round the module has it. Inputs are filled up with zeros to a
multiple of 64, and for int4 outputs too: the kernels read whole vectors.

    int8  codes [out, in] -127..127, scale [out] = max |w| / 127, rounded away from zero, so that
          |w - w'| <= scale / 2; w' = code * scale
    int4  codes 0..15, two per byte; scales [in / 64, out, 2], a scale and a zero for each group of 64 inputs
          of an output; w' = (code - 8) * scale + zero. The two are fitted by least squares, so the squared
          error of a group is not above that of rounding to sixteen even steps between its extremes

The bytes of int4 codes are tiles of 64 or 32 outputs, [tiles, in, tile / 2]: byte b of a tile's row has
output b in its low four bits and output b + tile / 2 in its high ones. That is what the kernel reads on a
processor with AVX-512 (64) or AVX2 (32), and `retile` makes one of the other.

Scales are bfloat16. Expanding is exact up to one rounding of the product plus the zero to float32 (none for
int8) and one to the matrix's dtype, so it gives the same bits on any device, in any order, at any alignment.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from melinoe.store.fitting import fitted_tile

GROUP = 64  # inputs that share a scale and a zero (int4)
TILES = (64, 32)  # outputs side by side
_BLOCK = 2**18  # weights expanded at a time: they stay in the processor's cache on their way
_TRANSPOSED = 256  # outputs expanded at a time where inputs lie side by side
_SHRINK = (1.0, 0.85)  # of the distance between a group's extremes, where the fit starts


def padded(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // GROUP) * GROUP


def shapes(name: str, size_out: int, size_in: int, tile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a matrix's codes and scales."""
    if name == "int8":
        return (size_out, padded(size_in)), (size_out,)
    tiles = padded(size_out) // tile
    return (tiles, padded(size_in), tile // 2), (padded(size_in) // GROUP, padded(size_out), 2)


def of(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """(matrix, codes, scales) -> None that writes codes, and (codes, scales, matrix) -> None, its inverse."""
    return (round_int8, expand_int8) if name == "int8" else (round_int4, expand_int4)


def by_torch(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """As `of`, with the same bits, and nothing has to be compiled for it: for a small matrix."""
    return (round_int8, expand_int8) if name == "int8" else (_round_int4_by_torch, expand_int4)


def round_int8(weight_OI: torch.Tensor, codes: torch.Tensor, scale_O: torch.Tensor) -> None:
    """Writes codes [out, in] and scales [out] of a matrix [out, in]."""
    weights = weight_OI.float()
    scale_O.copy_(away_from_zero(weights.abs().amax(1) / 127))
    divisor = torch.where(scale_O == 0, torch.ones_like(scale_O), scale_O).float()
    codes.zero_()
    codes[:, : weight_OI.shape[1]].copy_((weights / divisor[:, None]).round_().clamp_(-127, 127))


def expand_int8(codes: torch.Tensor, scale_O: torch.Tensor, weight_OI: torch.Tensor) -> None:
    """The inverse of `round_int8`, a block at a time; a code fits every floating dtype, so one rounding."""
    size_out, size_in = weight_OI.shape
    step = max(1, _BLOCK // size_in)
    for start in range(0, size_out, step):
        block = weight_OI[start : start + step]
        block.copy_(codes[start : start + step, :size_in])
        block.mul_(scale_O[start : start + step, None])


def round_int4(weight_OI: torch.Tensor, codes: torch.Tensor, scale_GO2: torch.Tensor) -> None:
    """Writes codes [tiles, in, tile / 2] and scales [groups, out, 2] of a matrix [out, in]."""

    def fit(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        if not fitted_tile(rows, codes, scales, fit_tile):
            fit_tile(rows, codes, scales)

    _round_tiles(weight_OI, codes, scale_GO2, fit)


def _round_int4_by_torch(weight_OI: torch.Tensor, codes: torch.Tensor, scale_GO2: torch.Tensor) -> None:
    _round_tiles(weight_OI, codes, scale_GO2, fit_tile)


def _round_tiles(
    weight_OI: torch.Tensor, codes: torch.Tensor, scale_GO2: torch.Tensor, fit: Callable[..., None]
) -> None:
    size_in = weight_OI.shape[1]
    tile = codes.shape[2] * 2
    for index in range(len(codes)):
        outputs = slice(index * tile, (index + 1) * tile)
        rows = weight_OI[outputs].float()
        rows = F.pad(rows, (0, padded(size_in) - size_in, 0, tile - rows.shape[0]))
        fit(rows, codes[index], scale_GO2[:, outputs])


def fit_tile(rows: torch.Tensor, codes: torch.Tensor, scale_GO2: torch.Tensor) -> None:
    """Writes one tile: codes [in, outputs / 2] and scales [groups, outputs, 2] of rows [outputs, in]."""
    code_OGI, scale_OG, zero_OG = _fitted(rows.unflatten(1, (-1, GROUP)))
    scale_GO2[..., 0], scale_GO2[..., 1] = scale_OG.T, zero_OG.T
    code_IO, half = code_OGI.flatten(1).T.to(torch.uint8), len(rows) // 2
    torch.bitwise_or(code_IO[:, :half], code_IO[:, half:] << 4, out=codes)


def expand_int4(codes: torch.Tensor, scale_GO2: torch.Tensor, weight_OI: torch.Tensor) -> None:
    """The inverse of `round_int4`, a block at a time; fastest where outputs lie side by side, as codes do."""
    size_out, size_in = weight_OI.shape
    tiles, tile = codes.shape[0], codes.shape[2] * 2
    direct = weight_OI.stride(0) == 1
    step = tiles if direct or codes.is_cuda else _TRANSPOSED // tile
    for first in range(0, tiles, step):
        outputs = slice(first * tile, min(size_out, (first + step) * tile))
        if outputs.start >= size_out:
            break
        part_OI = weight_OI[outputs]
        part_IO = part_OI.T if direct else part_OI.new_empty(size_in, len(part_OI))
        _expand_block(
            codes[first : first + step], scale_GO2[:, first * tile : (first + step) * tile], part_IO
        )
        if not direct:
            part_OI.copy_(part_IO.T)


def _expand_block(codes: torch.Tensor, scale_GO2: torch.Tensor, weight_IO: torch.Tensor) -> None:
    """Expands some tiles, a few groups of inputs at a time, into [in, out]."""
    tiles, _, half = codes.shape
    outputs = tiles * half * 2
    scale_GO, zero_GO = scale_GO2[..., 0].float(), scale_GO2[..., 1].float()
    step = len(scale_GO) if codes.is_cuda else max(1, _BLOCK // (GROUP * outputs))
    space = torch.empty(step * GROUP, tiles, 2, half, dtype=torch.float32, device=codes.device)
    for start in range(0, len(scale_GO), step):
        inputs = slice(start * GROUP, (start + step) * GROUP)
        packed = codes[:, inputs]
        values = space[: packed.shape[1]]
        values[:, :, 0].copy_((packed & 15).view(torch.int8).sub_(8).transpose(0, 1))
        values[:, :, 1].copy_((packed >> 4).view(torch.int8).sub_(8).transpose(0, 1))
        values_GIO = values.view(-1, GROUP, outputs)
        here = slice(start, start + step)
        # the product of a code and a scale is exact, so only the sum rounds
        torch.addcmul(zero_GO[here, None], values_GIO, scale_GO[here, None], out=values_GIO)
        into = weight_IO[inputs]
        into.copy_(values.view(-1, outputs)[: into.shape[0], : into.shape[1]])


def retile(codes: torch.Tensor, tile: int) -> None:
    """Makes int4 codes those of another tile, in place; `codes` keeps its shape, which then means nothing.

    codes: of one matrix, on the CPU. tile: 64 or 32, what they become.
    """
    low = 0x0F0F0F0F0F0F0F0F  # four bits of each byte of a word
    for pair in codes.view(-1, codes.shape[1] * 32):  # 64 outputs at a time
        if tile == 32:  # rows of 32 bytes become two tiles with rows of 16
            first, second = _columns(pair)
            into = pair.view(torch.int64).view(2, -1)
            torch.bitwise_or(first & low, (second & low) << 4, out=into[0])
            torch.bitwise_or((first >> 4) & low, second & ~low, out=into[1])
        else:
            tiles = pair.view(torch.int64).view(2, -1).clone()
            low_half = (tiles[0] & low) | ((tiles[1] & low) << 4)
            high_half = ((tiles[0] >> 4) & low) | (tiles[1] & ~low)
            into = pair.view(torch.complex128).view(
                -1, 2
            )  # 16 bytes at a time; nothing is computed with them
            into[:, 0].copy_(low_half.view(torch.complex128))
            into[:, 1].copy_(high_half.view(torch.complex128))


def _columns(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The left and the right 16 bytes of rows of 32, as words."""
    halves = rows.view(torch.complex128).view(-1, 2)
    return halves[:, 0].contiguous().view(torch.int64), halves[:, 1].contiguous().view(torch.int64)


def _fitted(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes 0..15 [O, G, 64], scales [O, G], zeros [O, G], both of bfloat16) of weights [O, G, 64].

    Each start is a range of the codes around the middle between the group's extremes. From there scale and
    zero are fitted to the codes by least squares and the codes taken anew; the best of all is kept.
    """
    high, low = weights.amax(2, keepdim=True), weights.amin(2, keepdim=True)
    middle, mean = (high + low) / 2, weights.mean(2, keepdim=True)
    space = torch.empty_like(weights)
    best: tuple[torch.Tensor, ...] = ()

    def consider(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        nonlocal best
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = torch.sub(weights, zero).div_(divisor).round_().clamp_(-8, 7)
        error = torch.mul(codes, scale, out=space).add_(zero).sub_(weights).square_().sum(2, keepdim=True)
        if best:
            better = error < best[0]
            chosen = zip((error, scale, zero), (best[0], *best[2:]), strict=True)
            error, scale, zero = (torch.where(better, new, old) for new, old in chosen)
            kept = torch.where(better, codes, best[1], out=best[1])
            best = error, kept, scale, zero
        else:
            best = error, codes.clone(), scale, zero
        return codes

    for shrink in _SHRINK:
        half = (high - low) * (shrink / 2)
        scale = _bfloat16(half * (2 / 15))
        codes = consider(scale, _bfloat16(middle - half + 8 * scale))
        code_mean = codes.mean(2, keepdim=True)
        codes.sub_(code_mean)
        slope = torch.mul(codes, weights, out=space).sum(2, keepdim=True)
        spread = codes.square_().sum(2, keepdim=True)
        fitted = _bfloat16(torch.where(spread == 0, scale, slope / spread.clamp_min(1e-6)))
        consider(fitted, _bfloat16(mean - fitted * code_mean))
    _, codes, scale, zero = best
    return codes + 8, scale[..., 0], zero[..., 0]


def _bfloat16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).float()


def away_from_zero(values: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 that is not smaller; values: float32, not negative."""
    rounded = values.to(torch.bfloat16)
    smaller = rounded.float() < values
    return (rounded.view(torch.int16) + smaller).view(torch.bfloat16)
