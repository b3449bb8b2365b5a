"""What one step keeps for its backward pass, in bytes, counted on a model without weights.

The model runs on the meta device, which knows shapes and computes nothing, and autograd tells what it would
save. Two parts are not run but counted by what our own functions save: the experts, and everything from the
logits on. Families differ in everything else (attention, state spaces, shared experts), and so nothing is
assumed of it.
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
from melinoe.experts.low_rank import projection_size
from melinoe.models.layers import MoeLayer, experts_per_token
from melinoe.models.undecorated import take_over
from melinoe.tuning.settings import TuneSettings

_STAND_IN = "melinoe_planning"
# float32 tensors of a loss's input that live at once, its backward pass included (measured: docs/log.md)
LOGITS_COPIES, BASE_LOGITS_COPIES, ROUTING_COPIES = 4, 3, 10


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
    dtype = next(model.parameters()).dtype
    num_rows = batch.rows * batch.length * experts_per_token(model)
    own: dict[str | None, int] = {}  # bytes by decoder layer; None: outside of all
    inputs: dict[str, int] = {}
    with _counting(model, layers, own, inputs):
        ids_BS = torch.zeros(batch.rows, batch.length, dtype=torch.long, device="meta")
        # a mask of four dimensions is taken as it is; others are looked into, and there is nothing to see
        shape = (batch.rows, 1, batch.length, batch.length)
        try:
            model(
                input_ids=ids_BS,
                attention_mask=torch.ones(shape, dtype=torch.bool, device="meta"),
                use_cache=False,
            )
        except NotImplementedError as error:  # shapes that hang on values: qwen4_exp
            raise MelinoeError(
                "the memory that tuning needs cannot be counted for this type of model",
                got=model.config.model_type,  # type: ignore[union-attr]
                next_step="tune without --memory and --dry-run",
            ) from error
    transient = 0
    for layer in layers:
        name = max((one for one in inputs if layer.experts_name.startswith(f"{one}.")), key=len, default=None)
        saved, while_backward = _experts_bytes(layer.experts, settings.rank, dtype)
        own[name] = own.get(name, 0) + num_rows * saved
        transient = max(transient, num_rows * while_backward)
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    copies = LOGITS_COPIES + (BASE_LOGITS_COPIES if settings.distill or settings.max_quality_loss else 0)
    losses = copies * batch.predicted * config.vocab_size * 4
    tokens = batch.rows * batch.length
    losses += ROUTING_COPIES * tokens * sum(layer.num_experts for layer in layers) * 4
    outside = own.get(None, 0)
    inside = [size for name, size in own.items() if name is not None]
    return Activations(
        kept=outside + sum(inside) + losses,
        checkpointed=outside + sum(inputs.values()) + max(inside, default=0) + losses,
        transient=transient,
    )


def _experts_bytes(module: Any, rank: int, dtype: torch.dtype) -> tuple[int, int]:
    """(saved, besides while running backward) bytes per routed row.

    The hidden states are counted with the rest.
    """
    (size_in, up), (_, size_out) = projection_size(module, "up"), projection_size(module, "down")
    saved = (up + 2 * rank) * dtype.itemsize + 2 * 8  # and the order of the rows
    scaled = getattr(module, "weights_scale_input", False)  # llama4 keeps rows, multiplied and not
    if scaled or module.has_post_expert_norm:
        saved += ((2 if scaled else 1) * size_in + size_out) * dtype.itemsize + 2 * 8
    return saved, (size_in + size_out) * dtype.itemsize


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
    model: nn.Module, layers: list[MoeLayer], own: dict[str | None, int], inputs: dict[str, int]
) -> Iterator[None]:
    """Adds up what is saved, by decoder layer, and the bytes that each decoder layer is given."""
    model.requires_grad_(False)
    for layer in layers:
        layer.router.requires_grad_(True)
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
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts function that saves what it is given: what is kept per row is counted apart."""
    return hidden_states * top_k_weights[:, :1].to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(_STAND_IN, _shapes_only)
