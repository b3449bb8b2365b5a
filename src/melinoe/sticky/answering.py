"""Puts an answer in the place of a router's own `topk`: what it does before and after is its own code.

Which functions made the scores is followed, so that a bias in logits is added to logits and multiplies their
softmax. A router that chooses by anything else is refused.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from melinoe.errors import MelinoeError
from melinoe.models.layers import MoeLayer


class Answers(Protocol):
    """Who answers. num_experts, top_k: of every layer."""

    num_experts: int
    top_k: int

    def ask(self, layer: int, kind: str, top_k: int, scores_TE: torch.Tensor) -> Any:
        """(values [T, K], indices [T, K]). kind: the scores are "logits" or "probabilities"."""


class RouterHooks:
    """The two hooks of one router; between them its `topk` is answered."""

    def __init__(self, sticky: Answers, layer: MoeLayer) -> None:
        self.sticky, self._layer = sticky, layer
        self._open = threading.local()
        self._follows = False  # the router's output is what was answered; seen once, of another choice

    def begin(self, _module: nn.Module, _args: Any) -> None:
        self._open.mode = _Answering(self.sticky, self._layer)
        self._open.mode.__enter__()

    def end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        mode = self._open.mode
        mode.__exit__(None, None, None)
        if output is None:  # it raised an error
            return
        if len(mode.answers) != 1:
            raise unknown_routers(self._layer.router, f"{len(mode.answers)} choices in one call")
        if not self._follows:
            # the experts may be chosen a second time behind the router (llama4): then not by our answer
            logits, _, found = self._layer.routing_of(output)
            [answer] = mode.answers
            if not torch.equal(found.flatten(), answer.flatten()):
                raise unknown_routers(self._layer.router, "a choice that is not the router's own")
            own = logits.topk(answer.shape[-1], -1).indices
            self._follows = not torch.equal(own, answer)


# functions that leave what a tensor means as it is
_SAME = {
    torch.Tensor.to, torch.Tensor.float, torch.Tensor.type, torch.Tensor.view, torch.Tensor.reshape,
    torch.Tensor.contiguous, torch.Tensor.type_as, torch.reshape,
}  # fmt: skip
_LOGITS = {nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.addmm}
_PROBABILITIES = {nn.functional.softmax, torch.softmax, torch.Tensor.softmax}
_TOPK = {torch.topk, torch.Tensor.topk}


class _Answering(TorchFunctionMode):
    """Answers one router's `topk` over its experts, and follows what it is made of."""

    def __init__(self, sticky: Answers, layer: MoeLayer) -> None:
        super().__init__()
        self._sticky, self._layer = sticky, layer
        self._kinds: dict[int, tuple[str, torch.Tensor]] = {}  # by id, which holds as long as the tensor
        self.answers: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TOPK:
            return self._answer(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in _LOGITS or (func in _PROBABILITIES and self._kind(args[0]) == "logits"):
            self._kinds[id(result)] = ("logits" if func in _LOGITS else "probabilities", result)
        elif func in _SAME and self._kind(args[0]):
            self._kinds[id(result)] = (self._kind(args[0]), result)
        return result

    def _kind(self, tensor: torch.Tensor) -> str:
        return self._kinds[id(tensor)][0] if id(tensor) in self._kinds else ""

    def _answer(
        self, scores_TE: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> Any:
        sticky, kind = self._sticky, self._kind(scores_TE)
        last = dim in (-1, scores_TE.ndim - 1) and largest
        if not kind or not last or scores_TE.shape[1:] != (sticky.num_experts,) or k != sticky.top_k:
            raise unknown_routers(self._layer.router, "a choice that is not of softmax or of logits alone")
        values, chosen = sticky.ask(self._layer.index, kind, k, scores_TE)
        self.answers.append(chosen)
        return torch.return_types.topk((values, chosen))  # type: ignore[arg-type]


def unknown_routers(module: nn.Module, reason: str) -> MelinoeError:
    return MelinoeError(
        f"sticky routing does not know the routers of {type(module).__name__}",
        got=reason,
        next_step="load the model without it",
    )


def plain_copy(router: nn.Module) -> nn.Module:
    """A copy of a router that routes as the router did before it was sticky."""
    kept = router._forward_pre_hooks, router._forward_hooks
    router._forward_pre_hooks, router._forward_hooks = (
        OrderedDict(
            (key, hook)
            for key, hook in hooks.items()
            if not isinstance(getattr(hook, "__self__", None), RouterHooks)
        )
        for hooks in kept
    )
    try:
        return copy.deepcopy(router)
    finally:
        router._forward_pre_hooks, router._forward_hooks = kept
