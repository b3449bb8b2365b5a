"""Codes and scales of int4 that C fits have torch's bits: a store's checksums are of them."""

from __future__ import annotations

import pytest
import torch

from melinoe.store import fitting, rounding

KINDS = "normal heavy denormal large integers zeros one_of_a_group signed_zeros even".split()


def _matrix(kind: str, size_out: int, size_in: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(size_out, size_in, generator=generator)
    if kind == "heavy":
        weights = weights / torch.rand(size_out, size_in, generator=generator).clamp_min(1e-3)
    elif kind == "denormal":
        weights *= 1e-41
    elif kind == "large":
        weights *= 1e37
    elif kind == "integers":
        weights = weights.mul(3).round()
    elif kind == "zeros":
        weights.zero_()
    elif kind == "one_of_a_group":
        weights[:, 1:] = 0
    elif kind == "signed_zeros":
        weights = torch.where(weights > 0, 0.0, -0.0)
        weights[::7] = 1.0
    elif kind == "even":
        weights = weights.sign()
    return weights


def _tile_by_tile(
    weight_OI: torch.Tensor, write: fitting.Write, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a function makes of the tiles that `round_int4` gives it."""
    code_shape, scale_shape = rounding.shapes("int4", *weight_OI.shape, tile)
    codes, scale = torch.zeros(code_shape, dtype=torch.uint8), torch.zeros(scale_shape, dtype=torch.bfloat16)
    size_in = rounding.padded(weight_OI.shape[1])
    for index in range(len(codes)):
        rows = weight_OI[index * tile : (index + 1) * tile].float()
        missing = (0, size_in - rows.shape[1], 0, tile - rows.shape[0])
        write(
            torch.nn.functional.pad(rows, missing), codes[index], scale[:, index * tile : (index + 1) * tile]
        )
    return codes, scale.view(torch.int16)


@pytest.mark.parametrize("tile", rounding.TILES)
@pytest.mark.parametrize("lies", ["outputs apart", "inputs apart"])
@pytest.mark.parametrize("shape", [(128, 256), (70, 192), (33, 100), (64, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_has_the_bits_of_torch(kind: str, shape: tuple[int, int], lies: str, tile: int) -> None:
    weight_OI = _matrix(kind, *shape)
    if lies == "inputs apart":
        weight_OI = weight_OI.T.contiguous().T
    for dtype in (torch.float32, torch.bfloat16):
        codes, scale = (torch.empty_like(one) for one in _tile_by_tile(weight_OI, rounding.fit_tile, tile))
        rounding.round_int4(weight_OI.to(dtype), codes, scale.view(torch.bfloat16))
        wanted = _tile_by_tile(weight_OI.to(dtype), rounding.fit_tile, tile)
        torch.testing.assert_close((codes, scale), wanted, rtol=0, atol=0)


needs_compiler = pytest.mark.skipif(fitting._library() is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("lies", ["outputs apart", "inputs apart"])
def test_usual_matrices_do_not_go_through_torch(lies: str) -> None:
    done = []

    def write(rows: torch.Tensor, codes: torch.Tensor, scale_GO2: torch.Tensor) -> None:
        done.append(fitting.fitted_tile(rows, codes, scale_GO2, rounding.fit_tile))

    weight_OI = _matrix("normal", 128, 256)
    _tile_by_tile(weight_OI if lies == "outputs apart" else weight_OI.T.contiguous().T, write, 64)
    assert done == [True, True]


@needs_compiler
def test_what_torch_alone_knows_is_left_to_it() -> None:
    """Not a number, and groups whose largest weight is a zero of either sign: compared as values only."""
    rows = _matrix("normal", 64, 128)
    codes, scale = fitting._empty(64, 128)
    assert fitting.fitted_tile(rows, codes, scale, rounding.fit_tile)
    for odd in (float("nan"), float("inf")):
        rows[5, 70] = odd
        assert not fitting.fitted_tile(rows, codes, scale, rounding.fit_tile)
    rows[5, 64:], rows[5, 70] = 0.0, -0.0
    assert not fitting.fitted_tile(rows, codes, scale, rounding.fit_tile)


@needs_compiler
@pytest.mark.parametrize("lies", ["outputs apart", "inputs apart"])
def test_another_order_of_sums_is_noticed(lies: str) -> None:
    """It would change few codes: a store converted here would seldom differ from one converted before."""
    rows = fitting._samples(64, 256)
    rows = rows if lies == "outputs apart" else rows.T.contiguous().T
    assert sum(fitting._sums_agree(rows, order) for order in fitting.ORDERS) == 1
