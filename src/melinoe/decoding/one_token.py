"""The experts of one token, where all of them are in slots: two calls of C, or one function of TorchScript.

C is for experts that the compiled kernels compute (compiled_experts.py). A function of TorchScript is made
from `expert_output` and `combine`. Either computes what `melinoe_experts` does, and is compared with it, bit
for bit, on the first token that it could compute. Where an expert has to be read, and for experts that are
not computed from their slots alone (low-rank additions, packed records that are expanded, ways of their own),
`melinoe_experts` is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from melinoe.decoding.bits import same_bits
from melinoe.decoding.compiled_experts import CompiledExperts
from melinoe.decoding.recorded import tensors_of
from melinoe.decoding.recording import only_about
from melinoe.decoding.segment import CHECKS, Functions, torchscript
from melinoe.experts import forward
from melinoe.paging.expansion import PackedExpert
from melinoe.paging.served_call import Views
from melinoe.routing.calls import DECODE

_OTHERS = ("melinoe_paged", "melinoe_layer", "training")


class OneToken:
    """In the place of an experts module's forward, for one token.

    Args:
        functions: those made so far, by what they depend on; layers alike share one.
    """

    def __init__(self, module: nn.Module, functions: Functions) -> None:
        self._module, self._functions = module, functions
        self._paged: Any = module.melinoe_paged
        self._layer = int(module.melinoe_layer)  # type: ignore[arg-type]
        self._function: Callable[..., Any] | None = None  # once it was made
        self._compiled: CompiledExperts | None = None  # in its place
        self._eager = False  # neither can be made

    def __call__(self, hidden_1H: torch.Tensor, index_1K: torch.Tensor, weights_1K: torch.Tensor) -> Any:
        call = self._paged.call(index_1K.numpy())
        if call.phase == DECODE and len(call.indices) == 1:
            found = self._paged.pager.serve_hits(
                self._layer, call, lambda slots: self._compute(hidden_1H, weights_1K, slots)
            )
            if found is not None:
                return found
        return forward.compute_experts(self._module, hidden_1H, index_1K, weights_1K)

    def _compute(self, hidden_1H: torch.Tensor, weights_1K: torch.Tensor, slots: list[int]) -> torch.Tensor:
        if self._compiled is not None and self._compiled.fits(hidden_1H, weights_1K):
            return self._compiled(hidden_1H, weights_1K, slots)
        experts = [self._paged.pager.slot_views(self._layer, slot) for slot in slots]
        if self._function is not None:
            tensors = [tensor for views in experts for tensor in _stored(views).values()]
            return self._function(hidden_1H, weights_1K, *tensors)
        if self._eager:
            return self._eagerly(hidden_1H, weights_1K, experts)
        with _Watch() as watch:
            expected = self._eagerly(hidden_1H, weights_1K, experts)
        self._eager = True
        self._compiled = CompiledExperts.made(self._module, self._paged.pager, hidden_1H, weights_1K, slots)
        if self._compiled is not None:
            if not same_bits(self._compiled(hidden_1H, weights_1K, slots), expected):
                self._compiled = None
        elif not watch.beyond_torch:
            self._eager = not self._made(hidden_1H, weights_1K, experts, expected)
        return expected

    def _eagerly(
        self, hidden_1H: torch.Tensor, weights_1K: torch.Tensor, experts: list[Views]
    ) -> torch.Tensor:
        """As melinoe_experts does it. Which expert it is matters to low-rank additions alone."""
        outputs = forward.experts_outputs(self._module, hidden_1H, experts)
        return forward.combine(outputs, weights_1K, len(experts), hidden_1H.dtype)

    def _made(
        self, hidden_1H: torch.Tensor, weights_1K: torch.Tensor, experts: list[Views], expected: torch.Tensor
    ) -> bool:
        """Makes the function; whether it computes the same."""
        names, packed_like = list(_stored(experts[0])), getattr(experts[0], "layer", None)
        tensors = [tensor for views in experts for tensor in _stored(views).values()]
        given = (hidden_1H, weights_1K, *tensors)
        key = repr([_what_counts(self._module), names, packed_like and packed_like.packing, _shapes(given)])

        def function(hidden: torch.Tensor, weights: torch.Tensor, *stored: torch.Tensor) -> torch.Tensor:
            ends = range(0, len(stored), len(names))
            each = [dict(zip(names, stored[at : at + len(names)], strict=True)) for at in ends]
            views: list[Views] = [
                one if packed_like is None else PackedExpert(packed_like, one) for one in each
            ]
            return self._eagerly(hidden, weights, views)

        if key not in self._functions:
            try:
                self._functions[key] = torchscript(function, given)
            except Exception:  # whatever TorchScript cannot do, or a torch that no longer has it
                return False
        made = self._functions[key]
        if not all(same_bits(made(*given), expected) for _ in range(CHECKS)):
            return False
        self._function = made
        return True


class _Watch(TorchFunctionMode):
    """Notes whether something is computed that torch does not see, by a pointer or a value.

    It cannot be traced, and what is traced then might still pass a comparison: in new memory that holds the
    right result from before.
    """

    beyond_torch = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not tensors_of(result) and not only_about(func):
            self.beyond_torch = True
        return result


def _stored(views: Views) -> Views:
    return views.packed if isinstance(views, PackedExpert) else views


def _shapes(tensors: tuple[torch.Tensor, ...]) -> list[Any]:
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]


def _what_counts(module: nn.Module) -> list[Any]:
    """All that an experts module computes with besides its experts; the same for layers alike."""
    own = {
        name: value if isinstance(value, (bool, int, float, str)) else id(value)
        for name, value in vars(module).items()
        if name not in _OTHERS and not name.startswith("_")
    }
    weights = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
    return [type(module), own, [str(child) for child in module.children()], weights]


def one_token(module: Any, functions: Functions) -> OneToken | None:
    """For the experts of a paged layer; None where there is nothing to gain, or more to compute."""
    if getattr(module, "melinoe_paged", None) is None or "forward" in vars(module):
        return None
    if module.config._experts_implementation != forward.NAME or module.melinoe_paged.tuning:
        return None
    more = hasattr(module, "low_rank") or hasattr(module, "expert_forward") or module._is_expert_parallel
    packed = module.melinoe_paged.pager.packed
    if more or getattr(module, "weights_scale_input", False) or (packed and module.has_bias):
        return None
    return OneToken(module, functions)
