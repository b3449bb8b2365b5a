"""A token's experts by the compiled kernels, from the addresses of their slots, and added up in C.

`forward.experts_outputs` and `forward.combine` say what is computed. The first is the same function of the
same library with the same numbers. The second multiplies, rounds as torch does where weights are bfloat16,
and adds up in the order of torch's kernel, which depends on the number of experts, on the width, and on the
vectors of this machine: it is compared with torch for these before it is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from melinoe.decoding.bits import same_bits
from melinoe.decoding.operators import DTYPES, lanes, native
from melinoe.decoding.program import BRIEF
from melinoe.experts import compiled, forward
from melinoe.native import library
from melinoe.paging.expansion import PackedExpert
from melinoe.paging.pager import ExpertPager
from melinoe.store import kernels
from melinoe.store.packing import SCALE

_UP, _DOWN = "gate_up_proj", "down_proj"
_MOST = 15  # experts of a token: torch adds up more in another order
_SEEDS = 4


class CompiledExperts:
    """Of one layer, for one number of experts and one dtype of their weights; called under the pager's lock.

    Args:
        run: (address of the row, of the outputs) -> 0, from the addresses that are in `pointers` then.
        order: of `pointers`: of which expert, and which of its addresses.
        addresses: of each slot.
    """

    def __init__(
        self,
        run: Callable[[int, int], int],
        pointers: Any,
        order: list[tuple[int, int]],
        addresses: list[tuple[int, ...]],
        outputs_KH: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._run, self._pointers, self._order, self._addresses = run, pointers, order, addresses
        self._outputs, self._dtype, self._top_k = outputs_KH, dtype, len(outputs_KH)
        self._combine: Any = library.brief(native().melinoe_combine)
        self._numbers = *outputs_KH.shape, lanes(), DTYPES[dtype]

    @classmethod
    def made(
        cls,
        module: Any,
        pager: ExpertPager,
        hidden_1H: torch.Tensor,
        weights_1K: torch.Tensor,
        slots: list[int],
    ) -> CompiledExperts | None:
        """For tokens like this one; None: they are not computed so."""
        layer, top_k, hidden = int(module.melinoe_layer), len(slots), hidden_1H.shape[-1]
        if native() is None or not lanes() or not compiled.is_gated_silu(module) or top_k > _MOST:
            return None
        if weights_1K.dtype not in DTYPES or hidden_1H.dtype != torch.bfloat16:
            return None
        views = pager.slot_views(layer, slots[0])
        outputs = torch.empty(top_k, hidden, dtype=torch.bfloat16)
        if isinstance(views, PackedExpert):
            names: tuple[str, ...]
            inner, names = views.layer.out[_UP] // 2, (_UP, _UP + SCALE, _DOWN, _DOWN + SCALE)
            found = kernels.gated_function(views.layer.packing.format, hidden, inner)
            if found is None or not views.few_rows:
                return None
            (function, bits), behind = found, 0
            numbers: tuple[int, ...] = (top_k, 1, hidden, hidden, inner, bits)
            order = [(expert, number) for expert in range(top_k) for number in range(4)]
        else:
            inner, names = views[_DOWN].shape[-1], (_UP, _DOWN)
            function = compiled.gated_function(hidden_1H, [views[_UP], views[_DOWN]])
            if function is None:
                return None
            numbers, behind = (top_k, 1, hidden, inner), top_k
            order = [(expert, number) for number in range(2) for expert in range(top_k)]
        if 3 * inner * hidden * top_k <= BRIEF:
            function = library.brief(function)
        pointers = (ctypes.c_void_p * len(order))()
        first = ctypes.addressof(pointers)
        tables = (first, first + behind * ctypes.sizeof(ctypes.c_void_p)) if behind else (first,)

        def run(row: int, out: int) -> int:
            return int(function(row, *tables, out, *numbers))

        made = cls(run, pointers, order, pager.banks[layer].addresses(names), outputs, weights_1K.dtype)
        return made if made._adds_as_torch() else None

    def fits(self, hidden_1H: torch.Tensor, weights_1K: torch.Tensor) -> bool:
        """Whether a token is like the one that it was made for."""
        return (
            hidden_1H.dtype == torch.bfloat16
            and hidden_1H.is_contiguous()
            and weights_1K.dtype == self._dtype
            and weights_1K.is_contiguous()
            and weights_1K.numel() == self._top_k
            and not hidden_1H.requires_grad
        )

    def __call__(self, hidden_1H: torch.Tensor, weights_1K: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """[1, H] of one token that fits.

        Raises:
            MemoryError: a kernel had none. Nothing else may compute it then: torch has other roundings.
        """
        addresses = [self._addresses[slot] for slot in slots]
        self._pointers[:] = [addresses[expert][number] for expert, number in self._order]
        if self._run(hidden_1H.data_ptr(), self._outputs.data_ptr()):
            raise MemoryError("no memory for a row of an expert")
        return self._combined(weights_1K)

    def _combined(self, weights_1K: torch.Tensor) -> torch.Tensor:
        out = torch.empty(1, self._outputs.shape[1], dtype=torch.bfloat16)
        self._combine(self._outputs.data_ptr(), weights_1K.data_ptr(), out.data_ptr(), *self._numbers)
        return out

    def _adds_as_torch(self) -> bool:
        """Whether outputs are added up to the bits of `forward.combine`."""
        for seed in range(_SEEDS):
            generator = torch.Generator().manual_seed(seed)
            self._outputs.copy_(torch.randn(self._outputs.shape, generator=generator))
            weights = torch.rand(1, self._top_k, generator=generator).to(self._dtype)
            expected = forward.combine(self._outputs, weights, self._top_k, torch.bfloat16)
            if not same_bits(self._combined(weights), expected):
                return False
        return True
