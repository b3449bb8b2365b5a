"""A token's experts by the compiled kernels, from the addresses of their slots, and added up in C.

`forward.experts_outputs` and `forward.combine` say what is computed. The first is the same function of the
same library with the same numbers. The second multiplies, rounds as torch does where weights are bfloat16,
and adds up in the order of torch's kernel, which depends on the number of experts, on the width, and on the
vectors of this machine: it is compared with torch for these before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch

from melinoe.decoding.bits import same_bits
from melinoe.decoding.operators import DTYPES, lanes, native
from melinoe.decoding.program import BRIEF
from melinoe.experts import compiled, forward
from melinoe.experts.forward import DOWN, UP
from melinoe.native import library
from melinoe.paging.expansion import PackedExpert
from melinoe.paging.pager import ExpertPager
from melinoe.store import kernels
from melinoe.store.packing import SCALE

_MOST = 15  # experts of a token: torch adds up more in another order
_SEEDS = 4


class CompiledExperts:
    """Of one layer, for one number of experts and one dtype of their weights; called under the pager's lock.

    Args:
        function: of a library: of the row, of one list of addresses for each of `tables`, of outputs and
            numbers.
        tables: by slots, what stands for an expert in a list of addresses.
    """

    def __init__(
        self,
        function: Callable[..., int],
        tables: list[list[bytes]],
        numbers: tuple[int, ...],
        outputs_KH: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._function, self._tables, self._numbers = function, tables, numbers
        self._outputs, self._out, self._top_k = outputs_KH, outputs_KH.data_ptr(), len(outputs_KH)
        self._dtype, self._hidden = dtype, outputs_KH.shape[1]
        self._combine: Any = library.brief(native().melinoe_combine)
        self._sums = *outputs_KH.shape, lanes(), DTYPES[dtype]

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
        lists: list[tuple[str, ...]]
        outputs = torch.empty(top_k, hidden, dtype=torch.bfloat16)
        if isinstance(views, PackedExpert):
            inner = views.layer.out[UP] // 2
            found = kernels.gated_function(views.layer.packing.format, hidden, inner)
            if found is None or not views.few_rows:
                return None
            function, bits = found
            lists = [(UP, UP + SCALE, DOWN, DOWN + SCALE)]
            numbers: tuple[int, ...] = (top_k, 1, hidden, hidden, inner, bits)
        else:
            inner, lists = views[DOWN].shape[-1], [(UP,), (DOWN,)]
            function = compiled.gated_function(hidden_1H, [views[UP], views[DOWN]])
            if function is None:
                return None
            numbers = top_k, 1, hidden, inner
        if 3 * inner * hidden * top_k <= BRIEF:
            function = library.brief(function)
        bank = pager.banks[layer]
        tables = [[struct.pack(f"{len(one)}P", *one) for one in bank.addresses(names)] for names in lists]
        made = cls(function, tables, numbers, outputs, weights_1K.dtype)
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
        addresses = [b"".join([table[slot] for slot in slots]) for table in self._tables]
        if self._function(hidden_1H.data_ptr(), *addresses, self._out, *self._numbers):
            raise MemoryError("no memory for a row of an expert")
        return self._combined(weights_1K)

    def _combined(self, weights_1K: torch.Tensor) -> torch.Tensor:
        out = torch.empty(1, self._hidden, dtype=torch.bfloat16)
        self._combine(self._out, weights_1K.data_ptr(), out.data_ptr(), *self._sums)
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
