"""What one step keeps for its backward pass, in bytes, counted on a model without weights.

The model runs on the meta device, which knows shapes and computes nothing, and autograd tells what it would
save. So nothing is assumed of a family's attention, state spaces or shared experts, nor of our own experts
function, which runs as it does while tuning; a layer's backward pass runs as well, and what lives in it at
the same time is added up. All tokens choose the same experts: no routing needs more. Only what comes from the
logits on is not run, but counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer

from melinoe.errors import MelinoeError
from melinoe.experts.low_rank import attach_low_rank, experts_in_order, projection_size
from melinoe.experts.row_order import Order
from melinoe.losses.likelihood import tokens_at_once
from melinoe.models.layers import MoeLayer, experts_per_token
from melinoe.models.logits import output_layer_given
from melinoe.models.undecorated import take_over
from melinoe.runtime.work_space import LiveBytes, without_values
from melinoe.tuning.settings import TuneSettings

_STAND_IN = "melinoe_planning"
# float32 tensors of a loss's input that live at once, its backward pass included (measured: docs/log.md)
LOGITS_COPIES, BASE_LOGITS_COPIES, ROUTING_COPIES = 4, 3, 10
ROWS_COPIES = 5  # of what the output layer is given, where logits are computed in pieces


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of a plan: rows, tokens of a row, and the tokens whose logits are computed."""

    rows: int
    length: int
    predicted: int


@dataclass(frozen=True)
class Activations:
    """Bytes of one batch.

    kept: what is saved for the backward pass. checkpointed: the same with gradient checkpointing, each
    decoder layer's input and one layer's own. transient: what the largest experts layer needs besides while
    it runs backward.
    """

    kept: int
    checkpointed: int
    transient: int


def count(model: nn.Module, layers: list[MoeLayer], batch: BatchShape, settings: TuneSettings) -> Activations:
    """What one step keeps, whether its experts are resident or paged.

    model: on the meta device, in the dtype in which the run computes.
    """
    with torch.device("meta"):
        for layer in layers:
            attach_low_rank(layer.experts, settings.rank, settings.alpha, device="meta")
    own: dict[str | None, int] = {}  # bytes by decoder layer; None: outside of all
    inputs: dict[str, int] = {}
    with _counting(model, layers, settings.form.experts, own, inputs), without_values():
        ids_BS = torch.zeros(batch.rows, batch.length, dtype=torch.long, device="meta")
        # a mask of four dimensions is taken as it is; others are looked into, and there is nothing to see
        shape = (batch.rows, 1, batch.length, batch.length)
        try:
            mask = torch.ones(shape, dtype=torch.bool, device="meta")
            with output_layer_given(model, ids_BS) as seen:
                logits = model(input_ids=ids_BS, attention_mask=mask, use_cache=False).logits
        except NotImplementedError as error:  # shapes that hang on values
            raise MelinoeError(
                "the memory that tuning needs cannot be counted for this type of model",
                got=model.config.model_type,  # type: ignore[union-attr]
                next_step="tune without --memory and --dry-run",
            ) from error
    tokens, top_k = batch.rows * batch.length, experts_per_token(model)
    transient = max(_backward_bytes(layer, tokens, top_k, settings) for layer in layers)
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    copies = LOGITS_COPIES + (BASE_LOGITS_COPIES if settings.distill or settings.max_quality_loss else 0)
    losses = copies * batch.predicted * config.vocab_size * 4
    at_once = tokens_at_once(config.vocab_size)
    if at_once < batch.predicted and seen.returned_alone(logits):
        losses = (
            copies * at_once * config.vocab_size * 4 + ROWS_COPIES * batch.predicted * config.hidden_size * 4
        )
    losses += ROUTING_COPIES * tokens * sum(layer.num_experts for layer in layers) * 4
    outside = own.get(None, 0)
    inside = [size for name, size in own.items() if name is not None]
    return Activations(
        kept=outside + sum(inside) + losses,
        checkpointed=outside + sum(inputs.values()) + max(inside, default=0) + losses,
        transient=transient,
    )


def _concentrated(tokens: int, top_k: int, num_experts: int) -> Order:
    """All tokens choose the same experts."""
    ends = [tokens * min(expert + 1, top_k) for expert in range(num_experts)]
    return Order(torch.empty(tokens * top_k, dtype=torch.long, device="meta"), top_k, ends)


def _backward_bytes(layer: MoeLayer, tokens: int, top_k: int, settings: TuneSettings) -> int:
    """What an experts layer needs while it runs backward, beside what is saved and the factors' gradients."""
    module: Any = layer.experts
    dtype = next(module.parameters()).dtype
    size_in, _ = projection_size(module, "up")
    hidden_TH = torch.empty(tokens, size_in, dtype=dtype, device="meta", requires_grad=True)
    weights_TK = torch.empty(tokens, top_k, device="meta", requires_grad=True)
    with LiveBytes() as live:
        live.ignore((hidden_TH, weights_TK, *module.parameters()))
        order = _concentrated(tokens, top_k, module.num_experts)
        out_TH = experts_in_order(module, hidden_TH, weights_TK, order)
        live.peak, before = live.now, live.now
        out_TH.backward(torch.empty_like(out_TH))
        factors = list(module.low_rank.parameters())
        gradients = sum(factor.nbytes for factor in factors if factor.requires_grad)
        for factor in factors:
            factor.grad = None
    # of the first batch of a step they are kept as they are, of the others added to what is there
    return live.peak - before - (gradients if settings.accumulate == 1 else 0)


class _Kept:
    """Adds up what autograd saves, each storage once.

    without: tensors that are in memory anyway and do not count.
    """

    def __init__(self, without: list[torch.Tensor]) -> None:
        self._without = {tensor.untyped_storage()._cdata for tensor in without}
        self._alive: dict[int, torch.Tensor] = {}  # so that no address comes twice
        self.nbytes = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._without and storage._cdata not in self._alive:
            self._alive[storage._cdata] = tensor
            self.nbytes += storage.nbytes()


@contextmanager
def _counting(
    model: nn.Module,
    layers: list[MoeLayer],
    experts_too: bool,
    own: dict[str | None, int],
    inputs: dict[str, int],
) -> Iterator[None]:
    """Adds up what is saved, by decoder layer, and the bytes that each decoder layer is given."""
    model.requires_grad_(False)
    for layer in layers:
        layer.router.requires_grad_(True)
        layer.experts.low_rank.requires_grad_(experts_too)  # type: ignore[union-attr]
    kept = _Kept([*model.parameters(), *model.buffers()])
    inside: list[str] = []

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        before, name = kept.nbytes, inside[-1] if inside else None
        kept.add(tensor)
        own[name] = own.get(name, 0) + kept.nbytes - before
        return tensor

    def enter(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside.append(name)
            hidden = args[0] if args else kwargs["hidden_states"]
            inputs[name] = hidden.nbytes

        return hook

    handles: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda *_: (inside.pop(), None)[1]))
    if not take_over(model, _shapes_only):
        model.set_experts_implementation(_STAND_IN)  # type: ignore[operator]
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _shapes_only(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`tuning_experts`, where there is no telling what the router has chosen."""
    tokens, top_k = top_k_index.shape
    return experts_in_order(
        module, hidden_states, top_k_weights, _concentrated(tokens, top_k, module.num_experts)
    )


ALL_EXPERTS_FUNCTIONS.register(_STAND_IN, _shapes_only)
